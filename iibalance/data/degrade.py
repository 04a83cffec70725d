"""What an input can be degraded by, and checks of what a user asks for. Nothing imports torch."""

from __future__ import annotations

from collections.abc import Sequence

from iibalance.errors import InputError

# What the gate is calibrated on: the only kinds that training ever draws.
CALIBRATION_KINDS = ("noise", "missing", "shuffled")
# All kinds. What the gate has never seen is there to evaluate it by.
KINDS = (*CALIBRATION_KINDS, "blur", "dropped", "gain")

# The most strength that a kind takes: a blur 10,000 positions wide, longer than most samples, and a
# level changed by exp(33); soon after that float32 overflows, and a network's numbers are no more.
MOST = {"blur": 10_000.0, "gain": 100.0}


def parse_degrade(text: str, modalities: Sequence[str]) -> tuple[str, str]:
    """``"audio=noise"`` -> ``("audio", "noise")``.

    Raises InputError that says which modalities and kinds there are.

    >>> parse_degrade("audio=noise", ["audio", "visual"])
    ('audio', 'noise')
    """
    modality, equals, kind = text.partition("=")
    if not equals:
        raise InputError(
            f"degrade: {text!r} is not <modality>=<kind>, such as {modalities[0]}=noise"
        )
    return check_degradation(modality.strip(), kind.strip(), modalities)


def check_degradation(modality: str, kind: str, modalities: Sequence[str]) -> tuple[str, str]:
    """Both names as they are; InputError where there is no such modality or kind.

    >>> check_degradation("audio", "fog", ["audio", "visual"])
    Traceback (most recent call last):
        ...
    iibalance.errors.InputError: degrade: 'fog' is none of
        noise, missing, shuffled, blur, dropped, gain
    """
    if modality not in modalities:
        raise InputError(f"degrade: no modality {modality!r}; there are {', '.join(modalities)}")
    if kind not in KINDS:
        raise InputError(f"degrade: {kind!r} is none of {', '.join(KINDS)}")
    return modality, kind


def check_amount(fraction: float, strength: float, kind: str | None = None) -> None:
    """InputError unless ``fraction`` is in 0..1 and ``strength`` is 0 or more, and finite.

    With ``kind``, also where the strength is more than that kind can take.

    >>> check_amount(1.5, 3.0)
    Traceback (most recent call last):
        ...
    iibalance.errors.InputError: fraction: 1.5 is no share of the samples; give a number from 0 to 1
    """
    if not 0 <= fraction <= 1:
        raise InputError(
            f"fraction: {fraction} is no share of the samples; give a number from 0 to 1"
        )
    if not 0 <= strength < float("inf"):
        raise InputError(
            f"strength: {strength} is no noise level, nor any other amount; give 0 or more"
        )
    most = MOST.get(kind or "", float("inf"))
    if strength > most:
        raise InputError(f"strength: {strength} is too much for {kind!r}; give at most {most:g}")
