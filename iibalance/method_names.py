"""The methods' names, and what can be told of one without importing it.

What may come in: errors.
"""

from __future__ import annotations

from pathlib import Path

from iibalance.errors import InputError

#: The names that ``--method`` knows, in the order of ``iibalance.methods.METHODS``. They stand here
#: because importing that takes seconds; a test holds them to it.
METHOD_NAMES = (
    "unimodal",
    "concat",
    "sum",
    "ensemble",
    "ensemble_gated",
    "g_blend",
    "mslr",
    "ogm_ge",
    "agm",
    "pmr",
    "mmpareto",
    "greedy",
    "mla",
    "qmf",
    "tmc",
    "pdf",
    "transformer",
    "d_and_r",
    "reconboost",
    "lfm",
    "inforeg",
    "iibalance",
    "iibalance_drawn",
    "iibalance_with_alignment",
    "iibalance_no_prototypes",
    "iibalance_no_warm_start",
    "iibalance_no_gate",
    "iibalance_fixed_gate",
)


def check_method(name: str) -> None:
    """InputError for a name that no method has, without the seconds that importing one takes.

    Of ``my_file.py:MyMethod`` it says whether the file is there; what is in it, and modules, are
    looked at when the method is made.

    >>> check_method("iibalance")
    >>> check_method("mine.py:Mine")
    Traceback (most recent call last):
        ...
    iibalance.errors.InputError: method: mine.py: no such file
    """
    place, _, attribute = name.rpartition(":")
    if name not in METHOD_NAMES and not (place and attribute):
        raise InputError(
            f"method: {name!r} is none of {', '.join(METHOD_NAMES)}; "
            "a method of your own is given as my_file.py:MyMethod"
        )
    if place.endswith(".py") and not Path(place).expanduser().is_file():
        raise InputError(f"method: {place}: no such file")


def absolute_method(name: str) -> str:
    """A method's name that means the same from any folder: a ``.py`` file by its whole path.

    >>> absolute_method("iibalance")
    'iibalance'
    """
    place, colon, attribute = name.rpartition(":")
    if not (colon and place.endswith(".py")):
        return name
    return f"{Path(place).expanduser().resolve()}:{attribute}"
