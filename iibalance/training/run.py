"""One training run into a folder: options and data checked, the stages run, stopped runs gone on.

Each stage writes its result whole before the next begins, so a run killed at any moment goes on
from the last stage or checkpoint and ends with the same numbers, bit for bit on the CPU.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, is_tensorboard_available

from iibalance.budgets import Budgets
from iibalance.config import RunConfig
from iibalance.config_files import save_config
from iibalance.data import load_data
from iibalance.data.dataset import MultimodalData
from iibalance.data.samples import Samples
from iibalance.errors import InputError
from iibalance.files import data_digest, read_json, recorded_command, versions, write_json
from iibalance.method_names import absolute_method
from iibalance.methods import Method, make_method, method_class
from iibalance.nn.encoding import encoder_size
from iibalance.nn.model import MultimodalClassifier
from iibalance.nn.own_encoders import Encoder, Factory, GroupMaker, as_factories
from iibalance.training.budget_stage import check_folds, folds_of
from iibalance.training.folder import RunFolder
from iibalance.training.run_checks import (
    check_groups,
    check_kernels,
    check_overwrite,
    check_processes,
    check_rates,
    given_budgets,
)
from iibalance.training.sampling import class_weights
from iibalance.training.saving import load
from iibalance.training.stages import Run
from iibalance.training.surroundings import surroundings
from iibalance.training.trainer import make_accelerator

logger = logging.getLogger(__name__)


class TrainResult(NamedTuple):
    """What :func:`train` returns: the model, its numbers and the folder they stand in.

    It is a tuple as well: ``model, metrics, budgets, folder = train(config)``.
    """

    model: MultimodalClassifier  #: trained and calibrated, in evaluation mode
    metrics: dict  #: what ``metrics.json`` holds; empty on processes other than the main one
    budgets: Budgets | None  #: None where the method needs none
    folder: Path  #: the run's folder


def train(
    config: RunConfig | None = None,
    *,
    data: Any = None,
    encoders: Mapping[str, Encoder] | None = None,
    parameter_groups: Mapping[str, GroupMaker] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainResult:
    """Train by ``config`` into the folder ``config.output``.

    Args:
        config: every option; ``RunConfig()`` by default.
        data: by default what ``config.data`` names. In memory, ``iibalance.Samples(inputs,
            targets)``; else a ``torch.utils.data.Dataset`` whose items are (inputs by modality,
            target), or a dict of such datasets for ``train``, ``validation`` and ``test``. The
            other options in ``config.data`` say how these are split, read and standardised;
            ``config.data.path`` is not given then.
        encoders: modality name -> a module, or a function that makes one (several copies of each
            are trained); built-in ones by layout by default. An encoder maps its modality's
            [B, ...] to [B, D]; fields are given by name, and a Hugging Face encoder's
            ``pooler_output`` is understood. Parts whose parameters are all frozen stay frozen and
            in evaluation mode. Given encoders must be given to :func:`iibalance.load` as well.
        parameter_groups: modality name -> function of its encoder that gives groups for the
            optimiser, dicts of ``params`` and any of ``scale`` (multiplies the learning rate) and
            ``weight_decay``.
        resume: go on with the run in ``config.output``; a finished run is left as it is.
        overwrite: replace the run in ``config.output``, finished or not. It is removed once
            everything about the new one has been checked; other files in the folder stay.

    Raises :class:`~iibalance.errors.InputError` for anything that is wrong with data, options or
    folder, before anything is written where it can.

    >>> import tempfile
    >>> from iibalance import RunConfig, Samples, TrainingConfig
    >>> audio, text = torch.randn(60, 8), torch.randint(1, 9, (60, 5))
    >>> words = torch.nn.Sequential(torch.nn.EmbeddingBag(9, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = train(
    ...         RunConfig(epochs=1, output=f"{folder}/run", training=TrainingConfig(alone=False)),
    ...         data=Samples({"audio": audio, "text": text}, ["yes", "no", "maybe"] * 20),
    ...         encoders={"text": words},
    ...     )
    >>> result.model.class_names, sorted(result.budgets.modalities)
    (['maybe', 'no', 'yes'], ['audio', 'text'])
    """
    config = RunConfig() if config is None else config
    if data is not None and config.data.path is not None:
        raise InputError(
            f"data: is given beside config.data.path ({config.data.path}); give one of the two"
        )
    return run_training(
        config,
        data,
        encoders=encoders,
        parameter_groups=parameter_groups,
        resume=resume,
        overwrite=overwrite,
        digest=data.digest() if isinstance(data, Samples) else None,
    )


def run_training(
    config: RunConfig,
    data: Any = None,
    *,
    encoders: Mapping[str, Encoder] | None = None,
    parameter_groups: Mapping[str, GroupMaker] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    digest: str | None = None,
) -> TrainResult:
    """:func:`train`, for the command line too, which has read what ``config.data`` names already.

    ``digest``: of data in memory, which have no path to take it from.
    """
    if overwrite:
        check_overwrite(config)
    method = make_method(config.method, config)
    data, factories = prepare(config, data, encoders)
    if config.data.path is not None:
        digest = data_digest(config.data.path)
    method.check(data.modalities)
    check_groups(parameter_groups, factories)
    class_weights(data.train.targets, config.training.class_weight, data.class_names)
    given = given_budgets(config, data)
    folds = Run.folds_of(method, config, data, given)
    check_folds(data.train, folds or [])
    output = config.output or default_output(config, data.name)
    config = replace(config, output=output, method=absolute_method(config.method))
    accelerator = make_accelerator(config.training, **_trackers(config))
    check_processes(config, method, accelerator.num_processes)
    check_kernels(config.kernels, accelerator.device)
    main = accelerator.is_main_process
    folder = RunFolder.create(output, resume, overwrite) if main else RunFolder(output)
    with surroundings(data.layouts, accelerator.device):
        try:
            if main:
                _describe(folder, config, resume, data.name, digest)
            accelerator.wait_for_everyone()
            if (folder.path / "metrics.json").exists():
                return _finished(folder.path, encoders)
            if main and resume:
                folder.latest_checkpoint()  # damaged: refused before anything else is written
            if accelerator.log_with:
                accelerator.init_trackers("tensorboard")  # the folder of the events
            _say_stages(config, method, data, folds, main)
            run = Run(
                config,
                data,
                method,
                folder,
                accelerator,
                factories,
                given,
                folds,
                parameter_groups=parameter_groups,
            )
            model, metrics, budgets = run.run()
            return TrainResult(model, metrics, budgets, folder.path)
        finally:
            accelerator.end_training()
            folder.close()


def estimate_run_budgets(
    config: RunConfig, *, data: Any = None, encoders: Mapping[str, Encoder] | None = None
) -> Budgets:
    """Stage 1 of :func:`train` alone: the budgets that it estimates, to the last digit.

    They do not depend on whether the method needs budgets. Nothing is written. Arguments and
    errors as for :func:`train`; ``data`` may be what ``config.data`` names, read already.
    """
    config.budgets.check_estimable()
    method = make_method(config.method, config)
    data, factories = prepare(config, data, encoders)
    folds = folds_of(data.train, config.budgets.folds, config.seed, data.class_names)
    check_folds(data.train, folds)
    accelerator = make_accelerator(config.training)
    check_kernels(config.kernels, accelerator.device)
    if config.training.progress and accelerator.is_main_process:
        logger.info("budgets: %s", _budget_stage(config, data, folds))
    with surroundings(data.layouts, accelerator.device):
        return Run(config, data, method, None, accelerator, factories, None, folds).budgets()[0]


def default_output(config: RunConfig, data: str | None = None) -> str:
    """``runs/<data>-<method>-seed<seed>``, numbered where that is there; the same on every rank.

    ``data``: what the data are called, where they have no path; by default their source.
    """
    source = Path(config.data.path).stem if config.data.path else data or config.data.name
    name = f"runs/{source}-{method_class(config.method).name}-seed{config.seed}"
    chosen, number = name, 1
    while Path(chosen).exists():
        number += 1
        chosen = f"{name}-{number}"
    PartialState()  # joins the processes, if there are several
    return broadcast_object_list([chosen])[0]


def _say_stages(
    config: RunConfig, method: Method, data: MultimodalData, folds: list | None, main: bool
) -> None:
    """Tell the logger ``iibalance`` which trainings the run has."""
    if not config.training.progress or not main:
        return
    count, stages = len(data.modalities), []
    if folds is not None:
        stages.append(f"budgets: {_budget_stage(config, data, folds)}")
    if config.training.alone or not method.joint or method.starts_alone:
        stages.append(f"{count} encoders alone")
    if method.joint:
        stages.append(f"{method.name} on all {count} together")
    logger.info("%s: %s", config.output, ", then ".join(stages))


def _budget_stage(config: RunConfig, data: MultimodalData, folds: list) -> str:
    way = "linear probes, " if config.budgets.source == "probe" else ""
    return f"{way}{len(folds)} folds x {len(data.modalities)} modalities"


def prepare(
    config: RunConfig,
    data: Any,
    encoders: Mapping[str, Encoder] | None,
    parts: Sequence[str] = ("train", "validation", "test"),
) -> tuple[MultimodalData, dict[str, Factory]]:
    """The data ready to train on, and the user's encoders, tried on two samples.

    ``parts``: the splits that are needed.
    """
    data = load_data(config.data, data, own=tuple(encoders or ()), parts=parts)
    check_rates(config.training, data.modalities)
    factories = as_factories(encoders, data.modalities)
    for name, make in factories.items():  # refused before a folder is made
        encoder_size(make(), data.train.head(name), name)
    return data, factories


def _finished(path: Path, encoders: Mapping[str, Encoder] | None) -> TrainResult:
    """The result of a run that is done."""
    budgets = path / "budgets.json"
    return TrainResult(
        load(path, encoders=encoders),
        read_json(path / "metrics.json"),
        Budgets.load(budgets) if budgets.exists() else None,
        path,
    )


def _trackers(config: RunConfig) -> dict:
    if not is_tensorboard_available():
        return {}
    return {"log_with": "tensorboard", "project_dir": config.output}


def _describe(
    folder: RunFolder, config: RunConfig, resume: bool, data: str, digest: str | None
) -> None:
    """Write ``config.yaml`` and ``run.json``; on resuming, check that the data are still those.

    ``data``: their source; ``digest``: of the data, None for data that have none.
    """
    if resume:
        first = read_json(folder.path / "run.json")
        if first.get("data", data) != data:
            raise InputError(
                f"data: the run was started on {first['data']}, these are {data}; "
                "go on with it as it was started"
            )
        if first.get("data_sha256") != digest:
            path = config.data.path
            what = f"data.path: {path} is not the file" if path else "data: these are not the data"
            raise InputError(
                f"{what} that this run was started on (its sha256 differs); "
                "restore it, or start a new run"
            )
        return
    about = {
        "command": recorded_command(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "data": data,
        "data_sha256": digest,
    }
    write_json(folder.path / "run.json", about)
    save_config(folder.config_path, config)  # last: with it the folder is a run
