"""The one exception that means "your input, not our code", and checks of the modalities' names.

What may come in: nothing of this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value")


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names it, says what is wrong and what to do, in one line. The command line prints
    the message alone and exits with code 2; in Python it is an ordinary ``ValueError``.

    >>> raise InputError("targets: row 3 holds 7, outside 0..4")
    Traceback (most recent call last):
        ...
    iibalance.errors.InputError: targets: row 3 holds 7, outside 0..4
    """


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple, or an InputError.

    Names are distinct and not empty. They hold no dot, because they become parts of parameter
    names, and no '=' and ',', which separate them on the command line.

    >>> check_names(["audio", "visual"])
    ('audio', 'visual')
    """
    names = tuple(names)
    for name in names:
        if not isinstance(name, str) or not name or "." in name or "=" in name or "," in name:
            raise InputError(
                f"modalities: {name!r} cannot name a modality; "
                "use a non-empty string without '.', '=' and ','"
            )
    if len(set(names)) < len(names):
        raise InputError(
            f"modalities: {', '.join(names)} holds a name twice; give each modality its own"
        )
    if not names:
        raise InputError("modalities: at least one is needed")
    return names


def as_sequence(
    values: Mapping[str, Value] | Sequence[Value], names: Sequence[str], argument: str
) -> list[Value]:
    """``values`` (a dict by name, or a list in order) as a list in the order of ``names``.

    >>> as_sequence({"visual": 2, "audio": 1}, ("audio", "visual"), "embeddings")
    [1, 2]
    """
    if isinstance(values, Mapping):
        if set(values) != set(names):
            given = ", ".join(map(str, values)) or "none"
            raise ValueError(
                f"{argument}: expected the modalities {', '.join(names)}, got {given}; a modality "
                "missing from some samples is told by mask, with any values in its rows"
            )
        return [values[name] for name in names]
    if len(values) != len(names):
        raise ValueError(
            f"{argument}: expected {len(names)} entries in the order {', '.join(names)}, "
            f"got {len(values)}"
        )
    return list(values)
