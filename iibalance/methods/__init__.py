"""Training methods behind one interface. ``make_method("concat")`` is the way in; ``METHODS`` lists them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from iibalance.config import RunConfig
from iibalance.errors import InputError
from iibalance.files import file_digest
from iibalance.methods.agm import AGM
from iibalance.methods.base import Method
from iibalance.methods.concat import Concat
from iibalance.methods.g_blend import GBlend
from iibalance.methods.greedy import Greedy
from iibalance.methods.iibalance import ABLATIONS, IIBalance
from iibalance.methods.late import MLA, Ensemble, GatedEnsemble, Sum, Unimodal
from iibalance.methods.mmpareto import MMPareto
from iibalance.methods.mslr import MSLR
from iibalance.methods.ogm_ge import OGMGE
from iibalance.methods.pmr import PMR
from iibalance.methods.qmf import QMF

__all__ = ["ABLATIONS", "METHODS", "Method", "make_method", "own_source"]

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
        IIBalance,
        *ABLATIONS,
    )
}


def make_method(name: str, config: RunConfig | None = None, **options: float) -> Method:
    """The method called ``name``, or the class that ``my_file.py:MyMethod`` or ``my.module:MyMethod`` names.

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
    place, colon, attribute = name.rpartition(":")
    if not colon:
        raise InputError(
            f"method: {name!r} is none of {', '.join(METHODS)}; a method of your own is given as my_file.py:MyMethod"
        )
    try:
        found = getattr(_module(place), attribute, None)
    except InputError:
        raise
    except Exception as error:  # whatever the user's own file does
        raise InputError(
            f"method: {place} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(f"method: {place} has no class {attribute} derived from iibalance.Method")
    if not isinstance(getattr(found, "name", None), str):
        raise InputError(
            f'method: {attribute} in {place} has no name; give the class one, such as name = "mine"'
        )
    return found


def own_source(name: str) -> str | None:
    """A digest of the file that defines a method of the user's own, so that its results are not taken for those of a later version; None for ours."""
    if name in METHODS:
        return None
    return _source(sys.modules[method_class(name).__module__])


@cache
def _source(module: ModuleType) -> str | None:
    """The digest of a module's file when it was first asked for: what is imported stays what it is when the file changes."""
    file = getattr(module, "__file__", None)
    return None if file is None else file_digest(file)[:16]


def _module(place: str):
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise InputError(f"method: {place}: no such file")
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[
        :16
    ]  # a file that has changed is another module
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
