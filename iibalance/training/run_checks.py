"""What a run is refused for, beside its data, before a folder is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import iib_kernels
from iibalance.budgets import Budgets
from iibalance.config import RunConfig, TrainingConfig
from iibalance.data.dataset import MultimodalData
from iibalance.errors import InputError
from iibalance.methods import Method
from iibalance.nn.own_encoders import Factory, GroupMaker


def check_overwrite(config: RunConfig) -> None:
    """InputError unless the run to replace is named, and its budgets are not part of it."""
    if config.output is None:
        raise InputError(
            "overwrite: name the folder to replace with output; without one a new folder is made"
        )
    given, folder = config.budgets.path, Path(config.output).expanduser().resolve()
    if given is not None and folder in Path(given).expanduser().resolve().parents:
        raise InputError(
            f"budgets.path: {given} is part of the run that overwrite would remove; "
            "copy it to another folder, and give the copy"
        )


def check_groups(groups: Mapping[str, GroupMaker] | None, own: Mapping[str, Factory]) -> None:
    """InputError unless ``parameter_groups`` are functions, and of the user's ``own`` encoders."""
    for name, make in (groups or {}).items():
        if name not in own:
            given = ", ".join(own) or "none"
            raise InputError(
                f"parameter_groups: {name!r} has no encoder of your own; those given: {given}"
            )
        if not callable(make):
            raise InputError(
                f"parameter_groups: {name} is a {type(make).__name__}; "
                "give a function of the encoder that returns groups"
            )


def given_budgets(config: RunConfig, data: MultimodalData) -> Budgets | None:
    """The budgets in ``config.budgets.path``, None without; InputError where others are meant."""
    path = config.budgets.path
    given = Budgets.load(path) if path else None
    if given is not None and set(given.modalities) != set(data.modalities):
        raise InputError(
            f"{path}: budgets of {', '.join(given.modalities)}, "
            f"the data has {', '.join(data.modalities)}; give budgets of these"
        )
    return given


def check_processes(config: RunConfig, method: Method, count: int) -> None:
    """InputError unless the method can be trained in ``count`` processes."""
    if count > 1 and not method.processes:
        raise InputError(
            f"method: {config.method} trains in one process only, there are {count}; start one"
        )


def check_rates(training: TrainingConfig, modalities: Sequence[str]) -> None:
    """InputError where a modality is given a rate or decay of its own that the data has not."""
    for option in ("learning_rates", "weight_decays"):
        for name in getattr(training, option):
            if name not in modalities:
                raise InputError(
                    f"training.{option}: {name!r} is none of the data's modalities "
                    f"({', '.join(modalities)})"
                )


def check_kernels(impl: str, device: torch.device) -> None:
    """InputError unless the kernels can run on ``device``."""
    try:
        iib_kernels.gated_fusion([torch.zeros(1, 2, device=device)], impl=impl)
    except RuntimeError as error:
        raise InputError(f"kernels: {impl} cannot run on {device} ({error}); give auto") from None
