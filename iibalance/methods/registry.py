"""Methods by name, what a comparison tunes of each, and classes from a user's own file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from iibalance.config import RunConfig
from iibalance.errors import InputError
from iibalance.files import file_digest
from iibalance.method_names import check_method
from iibalance.methods.agm import AGM
from iibalance.methods.base import Method
from iibalance.methods.concat import Concat
from iibalance.methods.d_and_r import DAndR
from iibalance.methods.ensemble import Ensemble
from iibalance.methods.ensemble_gated import GatedEnsemble
from iibalance.methods.g_blend import GBlend
from iibalance.methods.greedy import Greedy
from iibalance.methods.iibalance import ABLATIONS, IIBalance
from iibalance.methods.iibalance_drawn import IIBalanceDrawn
from iibalance.methods.inforeg import InfoReg
from iibalance.methods.lfm import LFM
from iibalance.methods.mla import MLA
from iibalance.methods.mmpareto import MMPareto
from iibalance.methods.mslr import MSLR
from iibalance.methods.ogm_ge import OGMGE
from iibalance.methods.pdf import PDF
from iibalance.methods.pmr import PMR
from iibalance.methods.qmf import QMF
from iibalance.methods.reconboost import ReconBoost
from iibalance.methods.sum import Sum
from iibalance.methods.tmc import TMC
from iibalance.methods.transformer import Transformer
from iibalance.methods.unimodal import Unimodal

#: Every method that ``--method`` knows by name, in the order in which comparisons list them.
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Unimodal,
        Concat,
        Sum,
        Ensemble,
        GatedEnsemble,
        GBlend,
        MSLR,
        OGMGE,
        AGM,
        PMR,
        MMPareto,
        Greedy,
        MLA,
        QMF,
        TMC,
        PDF,
        Transformer,
        DAndR,
        ReconBoost,
        LFM,
        InfoReg,
        IIBalance,
        IIBalanceDrawn,
        *ABLATIONS,
    )
}

#: The main parameter of a method and the values that a comparison tries, the default first. A
#: dotted name is an option of the run.
_SEARCH: dict[type[Method], Mapping[str, Sequence[float]]] = {
    AGM: {"alpha": (1.0, 0.3, 2.0)},
    DAndR: {"strength": (3.0, 1.0, 6.0)},
    GBlend: {"share": (0.5, 0.25, 1.0)},
    Greedy: {"alpha": (0.01, 0.1, 0.5)},
    IIBalance: {"objective.alpha": (1.0, 0.3, 0.0)},
    IIBalanceDrawn: {"tau_b": (1.0, 0.3, 3.0)},
    InfoReg: {"beta": (0.9, 0.3, 2.0)},
    LFM: {"rate": (1.0, 0.5, 3.0)},
    MSLR: {"window": (5.0, 3.0, 2.0)},
    OGMGE: {"alpha": (0.3, 0.1, 0.8)},
    PDF: {"unimodal": (1.0, 0.3, 3.0)},
    PMR: {"alpha": (1.0, 0.3, 3.0)},
    QMF: {"weight": (0.1, 0.03, 0.5)},
    ReconBoost: {"reconcile": (0.2, 0.5, 1.0)},
    TMC: {"annealing": (0.1, 0.5, 1.0)},
    Transformer: {"layers": (2.0, 1.0, 4.0)},
}

#: The method that an ablation lacks a piece of. An ablation takes that method's settings, is set
#: beside it, and has no rank of its own.
_ABLATION_OF: dict[type[Method], str] = dict.fromkeys(ABLATIONS, IIBalance.name)


def tuned(
    *, ablation_of: str | None = None, **search: Sequence[float]
) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: what ``iibalance compare`` is to try of a method of your own.

    Args:
        ablation_of: the name of the method that this one lacks a piece of.
        search: the method's main parameter and the values to try, the default first. Options of the
            run have dotted names: ``**{"objective.alpha": (1.0, 0.5)}``.

    A class without it tries learning rates and weight decays alone, or what its parent tries.

    >>> @tuned(amount=(0.1, 0.3))
    ... class Smoothed(Sum):
    ...     name = "smoothed"
    ...     defaults = {"amount": 0.1}
    >>> search_of(Smoothed)
    {'amount': (0.1, 0.3)}
    """

    def note(kind: type[Method]) -> type[Method]:
        if search:
            _SEARCH[kind] = search
        if ablation_of is not None:
            _ABLATION_OF[kind] = ablation_of
        return kind

    return note


def search_of(kind: type[Method]) -> dict[str, tuple[float, ...]]:
    """The main parameter and the values a comparison tries, of a class or its nearest parent."""
    search = next((_SEARCH[base] for base in kind.__mro__ if base in _SEARCH), {})
    return {name: tuple(values) for name, values in search.items()}


def ablation_of(kind: type[Method]) -> str | None:
    """The name of the method that this class lacks a piece of, or None."""
    return next((_ABLATION_OF[base] for base in kind.__mro__ if base in _ABLATION_OF), None)


def make_method(name: str, config: RunConfig | None = None, **options: float) -> Method:
    """The method called ``name``, or the class that ``my_file.py:MyMethod`` names.

    ``my.module:MyMethod`` is understood too.

    Args:
        config: of the run, ``RunConfig()`` by default.
        options: the method's own parameters, over those in ``config.method_options``.

    Raises :class:`~iibalance.errors.InputError` for a name, class or parameter that is not there.

    >>> make_method("ogm_ge", alpha=0.5).options.alpha
    0.5
    """
    return method_class(name)(config, **options)


def method_class(name: str) -> type[Method]:
    """The class behind a method's name (see :func:`make_method`)."""
    if name in METHODS:
        return METHODS[name]
    check_method(name)
    place, _, attribute = name.rpartition(":")
    try:
        found = getattr(_module(place), attribute, None)
    except Exception as error:  # whatever the user's own file does
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"method: {place} cannot be imported ({said})") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(f"method: {place} has no class {attribute} derived from iibalance.Method")
    if not isinstance(getattr(found, "name", None), str):
        raise InputError(
            f'method: {attribute} in {place} has no name; give the class one, such as name = "mine"'
        )
    return found


def own_source(name: str) -> str | None:
    """A digest of the file that defines a user's own method; None for ours.

    With it the results of one version of the file are not taken for those of a later one.
    """
    if name in METHODS:
        return None
    return _source(sys.modules[method_class(name).__module__])


@cache
def _source(module: ModuleType) -> str | None:
    """The digest of a module's file when it was first asked for.

    What is imported stays what it is when the file changes.
    """
    file = getattr(module, "__file__", None)
    return None if file is None else file_digest(file)[:16]


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).expanduser().resolve()
    # A file that has changed is another module.
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]
    name = f"iibalance_user_{path.stem}_{digest}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
