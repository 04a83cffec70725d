"""Checks of options: that each holds what its annotation says, and is in its range.

Options come from Python, where anything can be given. A value of another type is refused when its
object is made, not by what uses it hours later.

What may come in: errors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from iibalance.errors import InputError


def require(right: bool, name: str, value: object, expected: str) -> None:
    """InputError about the option ``name`` unless ``right``; ``expected`` says what to give.

    >>> require(0 < 1, "epochs", 0, "at least 1")
    >>> require(0 >= 1, "epochs", 0, "at least 1")
    Traceback (most recent call last):
        ...
    iibalance.errors.InputError: epochs: 0 cannot be used; give at least 1
    """
    if not right:
        raise InputError(f"{name}: {value} cannot be used; give {expected}")


def check_types(config: Any, prefix: str = "") -> None:
    """InputError unless every field of a dataclass holds what its annotation says.

    Numbers of numpy, paths and tuples become the plain numbers, strings and lists that YAML can
    hold. An integer is taken for a float, a bool for no number. ``prefix`` stands before the
    field's name in the error, as ``training.`` does on the command line.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Options:
    ...     width: int = 8
    >>> check_types(Options(), "model.")
    >>> check_types(Options(width="wide"), "model.")
    Traceback (most recent call last):
        ...
    iibalance.errors.InputError: model.width: 'wide' is no integer; give an integer, such as 1
    """
    kind: Any = type(config)
    hints = _hints(kind)
    for option in fields(config):
        hint, value = hints[option.name], getattr(config, option.name)
        try:
            setattr(config, option.name, _plain(value, hint))
        except _MISFITS:
            shown = " ".join(repr(value).split())
            shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
            noun, remedy = _described(hint)
            raise InputError(f"{prefix}{option.name}: {shown} is {noun}; give {remedy}") from None


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _plain(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` has it; one of ``_MISFITS`` is raised where it is none."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    origin, inner = get_origin(hint), get_args(hint)
    if origin is list and isinstance(value, (list, tuple)):
        return [_plain(part, inner[0]) for part in value]
    if origin is dict and isinstance(value, Mapping):
        return {_plain(key, inner[0]): _plain(part, inner[1]) for key, part in value.items()}
    if origin is Literal and isinstance(value, str) and value in inner:
        return value
    if origin in (Union, UnionType):
        for one in inner:
            with suppress(*_MISFITS):
                return _plain(value, one)
    if hint in _NUMBERS and isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool):
        return hint(value)
    if hint is str:
        return str.__str__(os.fspath(value))
    if origin is None and hint not in _NUMBERS and isinstance(value, hint):  # bool, None, a section
        return value
    raise TypeError


def _described(hint: Any) -> tuple[str, str]:
    """What a value that is not of the type ``hint`` is ("no integer"), and what to give."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"none of {', '.join(inner)}", "one of them"
    if origin is list:
        return "no list", f"a list of {_plural(inner[0])}"
    if origin is dict:
        of = _plural(inner[1])
        return f"no dict of {of}", f"a dict of {of} by name"
    if origin is not None:
        known = [_described(one) for one in inner if one is not type(None)]
        nouns, remedies = zip(*known)
        last = ", or None" if type(None) in inner else ""
        return " and ".join(nouns), " or ".join(remedies) + last
    if isinstance(hint, type) and is_dataclass(hint):
        return f"no {hint.__name__}", f"{hint.__module__}.{hint.__name__}(...)"
    return _PLAIN[hint]


def _plural(hint: Any) -> str:
    if isinstance(hint, type) and is_dataclass(hint):
        return f"{hint.__name__}(...)"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_plural, get_args(hint)))
    return {float: "numbers", str: "strings"}.get(hint, "lists")


_MISFITS = (TypeError, ValueError, OverflowError)
_NUMBERS: dict[Any, Any] = {int: Integral, float: Real}
_PLAIN: dict[Any, tuple[str, str]] = {
    int: ("no integer", "an integer, such as 1"),
    float: ("no number", "a number, such as 0.5"),
    str: ("no string", "a string"),
    bool: ("no bool", "True or False"),
}
