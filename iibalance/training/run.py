"""One training run into a folder: options and data checked, the stages run, stopped runs gone on with.

Each stage writes its result whole before the next begins, so a run killed at any moment goes on from the last stage or checkpoint and ends with the same
numbers, bit for bit on the CPU.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, is_tensorboard_available
from torch import nn

import iib_kernels
from iibalance.budgets import Budgets
from iibalance.config import RunConfig, save_config
from iibalance.data import load_data
from iibalance.data.dataset import MultimodalData, Split
from iibalance.errors import InputError
from iibalance.files import file_digest, read_json, versions, write_json
from iibalance.methods import make_method
from iibalance.nn.model import encoder_size
from iibalance.training.folder import RunFolder
from iibalance.training.stages import Run
from iibalance.training.trainer import make_accelerator


def train(
    config: RunConfig,
    *,
    data: MultimodalData | None = None,
    encoders: Mapping[str, Callable[[], nn.Module]] | None = None,
    resume: bool = False,
) -> dict:
    """Train by ``config`` into the folder ``config.output`` and return what ``metrics.json`` holds.

    Args:
        data: by default what ``config.data`` names.
        encoders: modality name -> function that makes a new encoder (several copies of each are trained); built-in ones by layout by default. Given
            encoders must be given to :func:`iibalance.load` as well.
        resume: go on with the run in ``config.output``; a finished run is left as it is.

    Raises :class:`~iibalance.errors.InputError` for anything that is wrong with data, options or folder, before anything is written where it can.
    """
    method = make_method(config.method, config)
    check_options(config)
    data = load_data(config.data) if data is None else data
    method.check(data.modalities)
    for name, make in (encoders or {}).items():
        if name not in data.modalities:
            raise InputError(
                f"encoders: {name!r} is none of the data's modalities ({', '.join(data.modalities)})"
            )
        encoder_size(make(), data.train.inputs[name][:2])  # refused before a folder is made
    given = Budgets.load(config.budgets.path) if config.budgets.path else None
    if given is not None and set(given.modalities) != set(data.modalities):
        raise InputError(
            f"{config.budgets.path}: budgets of {', '.join(given.modalities)}, the data has {', '.join(data.modalities)}"
        )
    folds = None if given is not None else Run.folds_of(method, config, data.train)
    _check_samples(data.train, folds or [])
    config = replace(config, output=config.output or default_output(config))
    accelerator = make_accelerator(config.training, **_trackers(config))
    if accelerator.num_processes > 1 and not method.processes:
        raise InputError(
            f"method: {config.method} trains in one process only, there are {accelerator.num_processes}"
        )
    _check_kernels(config.kernels, accelerator.device)
    main, threads = accelerator.is_main_process, torch.get_num_threads()
    if accelerator.device.type == "cpu" and set(data.layouts.values()) == {"vector"}:
        torch.set_num_threads(
            1
        )  # so small that two threads mostly wait for each other: 66 against 46 s of CPU time on digits
    folder = RunFolder.create(config.output, resume=resume) if main else RunFolder(config.output)
    try:
        if main:
            _describe(folder, config, data, resume)
        accelerator.wait_for_everyone()
        if (folder.path / "metrics.json").exists():
            return read_json(folder.path / "metrics.json")
        if main and resume:
            folder.latest_checkpoint()  # damaged: refused before anything else is written
        if accelerator.log_with:
            accelerator.init_trackers("tensorboard")  # the folder of the events
        return Run(config, data, method, folder, accelerator, encoders, given, folds).run()
    finally:
        accelerator.end_training()
        torch.set_num_threads(threads)
        folder.close()


def check_options(config: RunConfig) -> None:
    """InputError for an option out of range."""
    t, c, o, inf = config.training, config.calibration, config.objective, float("inf")
    checks = [
        (config.epochs >= 1, "epochs", config.epochs, "at least 1"),
        (
            t.batch_size is None or t.batch_size >= 2,
            "training.batch_size",
            t.batch_size,
            "at least 2",
        ),
        (0 < t.learning_rate < inf, "training.learning_rate", t.learning_rate, "a number above 0"),
        (0 <= t.weight_decay < inf, "training.weight_decay", t.weight_decay, "a number >= 0"),
        (
            t.max_gradient_norm >= 0,
            "training.max_gradient_norm",
            t.max_gradient_norm,
            "a number >= 0",
        ),
        (
            t.checkpoint_seconds >= 0,
            "training.checkpoint_seconds",
            t.checkpoint_seconds,
            "a number >= 0",
        ),
        (
            t.gradient_accumulation >= 1,
            "training.gradient_accumulation",
            t.gradient_accumulation,
            "at least 1",
        ),
        (
            0 <= t.modality_dropout < 1,
            "training.modality_dropout",
            t.modality_dropout,
            "a number in [0, 1)",
        ),
        (t.patience >= 1, "training.patience", t.patience, "at least 1"),
        (
            config.budgets.epochs is None or config.budgets.epochs >= 1,
            "budgets.epochs",
            config.budgets.epochs,
            "at least 1",
        ),
        (config.budgets.folds >= 2, "budgets.folds", config.budgets.folds, "at least 2"),
        (c.copies >= 1, "calibration.copies", c.copies, "at least 1"),
        (
            0 <= c.corrupted_weight < inf,
            "calibration.corrupted_weight",
            c.corrupted_weight,
            "a number >= 0",
        ),
        (0 <= c.max_strength < inf, "calibration.max_strength", c.max_strength, "a number >= 0"),
        (c.hidden >= 0, "calibration.hidden", c.hidden, "0 or more"),
        (c.prior_scale > 0, "calibration.prior_scale", c.prior_scale, "a number above 0"),
        (
            0 <= config.model.dropout < 1,
            "model.dropout",
            config.model.dropout,
            "a number in [0, 1)",
        ),
        (config.model.width >= 1, "model.width", config.model.width, "at least 1"),
        (
            config.model.embedding_dim >= 1,
            "model.embedding_dim",
            config.model.embedding_dim,
            "at least 1",
        ),
        (0 <= o.fused_weight < inf, "objective.fused_weight", o.fused_weight, "a number >= 0"),
        (0 <= o.alpha < inf, "objective.alpha", o.alpha, "a number >= 0"),
        (0 <= o.beta < inf, "objective.beta", o.beta, "a number >= 0"),
        (o.temperature > 0, "objective.temperature", o.temperature, "a number above 0"),
        (0 <= o.warmup <= 1, "objective.warmup", o.warmup, "a number in [0, 1]"),
        (0 <= o.ramp <= 1, "objective.ramp", o.ramp, "a number in [0, 1]"),
        (0 <= o.momentum < 1, "objective.momentum", o.momentum, "a number in [0, 1)"),
    ]
    for right, name, value, expected in checks:
        if not right:
            raise InputError(f"{name}: {value} cannot be used; give {expected}")


def _check_kernels(impl: str, device: torch.device) -> None:
    try:
        iib_kernels.gated_fusion([torch.zeros(1, 2, device=device)], impl=impl)
    except RuntimeError as error:
        raise InputError(f"kernels: {impl} cannot run on {device} ({error})") from None


def _check_samples(train: Split, folds: Sequence[np.ndarray]) -> None:
    """Every training of one modality must find two samples of it, and those outside a fold two classes."""
    for index, name in enumerate(train.inputs):
        present = train.mask[:, index]
        if int(present.sum()) < 2:
            raise InputError(
                f"{name}: present in only 1 training sample; give more of them, or leave {name} out with data.modalities"
            )
        for held in folds:
            rest = present.clone()
            rest[torch.from_numpy(held)] = False
            if len(train.targets[rest].unique()) < 2:
                raise InputError(
                    f"budgets.folds: outside one of the {len(folds)} folds {name} is present for fewer than two classes; "
                    f"leave {name} out with data.modalities, or give budgets.path"
                )


def default_output(config: RunConfig) -> str:
    """``runs/<data>-<method>-seed<seed>``, numbered so that it is a folder that is not there yet; the same on every process."""
    source = (
        Path(config.data.path).stem
        if config.data.name == "npz" and config.data.path
        else config.data.name
    )
    name, number = f"runs/{source}-{config.method}-seed{config.seed}", 1
    while Path(name if number == 1 else f"{name}-{number}").exists():
        number += 1
    chosen = [name if number == 1 else f"{name}-{number}"]
    PartialState()  # joins the processes, if there are several
    return broadcast_object_list(chosen)[0]


def _trackers(config: RunConfig) -> dict:
    return (
        {"log_with": "tensorboard", "project_dir": config.output}
        if is_tensorboard_available()
        else {}
    )


def _describe(folder: RunFolder, config: RunConfig, data: MultimodalData, resume: bool) -> None:
    """Write ``config.yaml`` and ``run.json``; on resuming, check that the data are still those of the first start."""
    path = config.data.path if config.data.name == "npz" else None
    digest = file_digest(Path(path).expanduser()) if path else None
    if resume:
        first = read_json(folder.path / "run.json").get("data_sha256")
        if first != digest:
            raise InputError(
                f"data.path: {path} is not the file that this run was started on (its sha256 differs); restore it, or start a new run"
            )
        return
    write_json(
        folder.path / "run.json",
        {
            "command": sys.argv,
            "python": platform.python_version(),
            "machine": platform.platform(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "data_sha256": digest,
        },
    )
    save_config(folder.config_path, config)  # last: with it the folder is a run
