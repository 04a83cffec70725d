"""One training run into a folder: options and data checked, the stages run, stopped runs gone on.

Each stage writes its result whole before the next begins, so a run killed at any moment goes on
from the last stage or checkpoint and ends with the same numbers, bit for bit on the CPU.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, is_tensorboard_available
from torch import nn

import iib_kernels
from iibalance.budgets import Budgets
from iibalance.config import RunConfig, save_config
from iibalance.data import load_data
from iibalance.data.dataset import MultimodalData
from iibalance.errors import InputError
from iibalance.files import data_digest, read_json, recorded_command, versions, write_json
from iibalance.methods import Method, make_method, method_class
from iibalance.methods.registry import absolute
from iibalance.nn.model import encoder_size
from iibalance.training.budget_stage import check_folds, folds_of
from iibalance.training.folder import RunFolder
from iibalance.training.stages import Run
from iibalance.training.trainer import make_accelerator

Encoders = Mapping[str, Callable[[], nn.Module]]


def train(
    config: RunConfig,
    *,
    data: MultimodalData | None = None,
    encoders: Encoders | None = None,
    resume: bool = False,
) -> dict:
    """Train by ``config`` into the folder ``config.output``; returns what ``metrics.json`` holds.

    Args:
        data: by default what ``config.data`` names.
        encoders: modality name -> function that makes a new encoder (several copies of each are
            trained); built-in ones by layout by default. Given encoders must be given to
            :func:`iibalance.load` as well.
        resume: go on with the run in ``config.output``; a finished run is left as it is.

    Raises :class:`~iibalance.errors.InputError` for anything that is wrong with data, options or
    folder, before anything is written where it can.
    """
    method = make_method(config.method, config)
    data = load_data(config.data) if data is None else data
    method.check(data.modalities)
    _check_encoders(encoders or {}, data)
    given = _given_budgets(config, data)
    folds = None if given is not None else Run.folds_of(method, config, data.train)
    check_folds(data.train, folds or [])
    output = config.output or default_output(config)
    config = replace(config, output=output, method=absolute(config.method))
    accelerator = make_accelerator(config.training, **_trackers(config))
    _check_processes(config, method, accelerator.num_processes)
    _check_kernels(config.kernels, accelerator.device)
    main = accelerator.is_main_process
    folder = RunFolder.create(output, resume=resume) if main else RunFolder(output)
    with _threads(data, accelerator.device):
        try:
            if main:
                _describe(folder, config, resume)
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
            folder.close()


def estimate_run_budgets(
    config: RunConfig, *, data: MultimodalData | None = None, encoders: Encoders | None = None
) -> Budgets:
    """Stage 1 of :func:`train` alone: the budgets that it estimates, to the last digit.

    They do not depend on whether the method needs budgets. Nothing is written. Arguments and
    errors as for :func:`train`.
    """
    if config.budgets.source == "online":
        raise InputError(
            "budgets.source: online budgets are estimated while training; "
            "use train --budgets.source online"
        )
    method = make_method(config.method, config)
    data = load_data(config.data) if data is None else data
    _check_encoders(encoders or {}, data)
    folds = folds_of(data.train, config.budgets.folds, config.seed)
    check_folds(data.train, folds)
    accelerator = make_accelerator(config.training)
    _check_kernels(config.kernels, accelerator.device)
    with _threads(data, accelerator.device):
        return Run(config, data, method, None, accelerator, encoders, None, folds).budgets()


def default_output(config: RunConfig) -> str:
    """``runs/<data>-<method>-seed<seed>``, numbered where that is there; the same on every rank."""
    source = config.data.name
    if source == "npz" and config.data.path:
        source = Path(config.data.path).stem
    name = f"runs/{source}-{method_class(config.method).name}-seed{config.seed}"
    chosen, number = name, 1
    while Path(chosen).exists():
        number += 1
        chosen = f"{name}-{number}"
    PartialState()  # joins the processes, if there are several
    return broadcast_object_list([chosen])[0]


@contextmanager
def _threads(data: MultimodalData, device: torch.device) -> Iterator[None]:
    """One thread where all encoders are small.

    Two threads mostly wait for each other then: 66 against 46 s of CPU time on digits.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu" and set(data.layouts.values()) == {"vector"}:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_encoders(encoders: Encoders, data: MultimodalData) -> None:
    for name, make in encoders.items():
        if name not in data.modalities:
            raise InputError(
                f"encoders: {name!r} is none of the data's modalities "
                f"({', '.join(data.modalities)})"
            )
        encoder_size(make(), data.train.inputs[name][:2])  # refused before a folder is made


def _given_budgets(config: RunConfig, data: MultimodalData) -> Budgets | None:
    path = config.budgets.path
    given = Budgets.load(path) if path else None
    if given is not None and set(given.modalities) != set(data.modalities):
        raise InputError(
            f"{path}: budgets of {', '.join(given.modalities)}, "
            f"the data has {', '.join(data.modalities)}"
        )
    return given


def _check_processes(config: RunConfig, method: Method, count: int) -> None:
    if count > 1 and not method.processes:
        raise InputError(f"method: {config.method} trains in one process only, there are {count}")


def _check_kernels(impl: str, device: torch.device) -> None:
    try:
        iib_kernels.gated_fusion([torch.zeros(1, 2, device=device)], impl=impl)
    except RuntimeError as error:
        raise InputError(f"kernels: {impl} cannot run on {device} ({error})") from None


def _trackers(config: RunConfig) -> dict:
    if not is_tensorboard_available():
        return {}
    return {"log_with": "tensorboard", "project_dir": config.output}


def _describe(folder: RunFolder, config: RunConfig, resume: bool) -> None:
    """Write ``config.yaml`` and ``run.json``; on resuming, check that the data are still those."""
    path = config.data.path if config.data.name == "npz" else None
    digest = data_digest(path)
    if resume:
        if read_json(folder.path / "run.json").get("data_sha256") != digest:
            raise InputError(
                f"data.path: {path} is not the file that this run was started on "
                "(its sha256 differs); restore it, or start a new run"
            )
        return
    about = {
        "command": recorded_command(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "data_sha256": digest,
    }
    write_json(folder.path / "run.json", about)
    save_config(folder.config_path, config)  # last: with it the folder is a run
