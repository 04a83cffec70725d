"""What a training step costs: seconds, method beside method."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from iibalance.config import RunConfig
from iibalance.data.dataset import MultimodalData
from iibalance.files import read_json, write_json
from iibalance.methods import Method, make_method
from iibalance.training.stages import Run
from iibalance.training.trainer import alone_model, make_accelerator


def time_steps(
    path: Path,
    config: Callable[[str, str], RunConfig],
    sets: Mapping[str, MultimodalData],
    defined: Mapping[str, Sequence[str]],
    *,
    steps: int,
    batch_size: int,
    progress: bool = False,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each of ``steps`` training steps, by data set and method.

    Methods take turns in one thread, and nothing else is to run.

    Args:
        path: a JSON file that keeps what was measured.
        config: ``config(data set, method)`` gives the options of a run.
        defined: the methods of each set.
    """
    found = read_json(path) if path.exists() else {}
    late = [
        name
        for name in sets
        if any(len(found.get(name, {}).get(method, ())) != steps for method in defined[name])
    ]
    if not late:
        return found
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in tqdm(late, desc="timing", unit="set", disable=None if progress else True):
            step = {
                method: _stepper(config(name, method), sets[name], batch_size)
                for method in defined[name]
            }
            found[name] = {method: [] for method in step}
            for turn in range(steps + 3):
                for method, one in step.items():
                    seconds = one()
                    if turn >= 3:
                        found[name][method].append(seconds)
            write_json(path, found)
    finally:
        torch.set_num_threads(threads)
    return found


def _stepper(config: RunConfig, data: MultimodalData, batch_size: int) -> Callable[[], float]:
    """A function that does one training step of a method and returns its seconds.

    Where its encoders are trained alone, that is one step of each.
    """
    config = replace(config, method_options={})
    method = make_method(config.method, config)
    torch.manual_seed(0)
    run = Run(config, data, method, None, make_accelerator(config.training), None, None, None)
    rows = torch.randperm(len(data.train)).repeat(-(-batch_size // len(data.train)))[:batch_size]
    parts = []
    if method.joint:
        parts.append((run.build(), method, data.train))
    else:
        for modality in data.modalities:
            split = data.train.only(modality)
            alone = alone_model(
                modality, run.encoders[modality](), split.head(modality), data.num_classes
            )
            parts.append((alone, Method(config), split))
    work = []
    for model, hooks, split in parts:
        model.train()
        optimizer = torch.optim.AdamW(hooks.parameter_groups(model), lr=1e-4, fused=True)
        hooks.before_epoch(model, split, 0.9)
        model.train()
        with torch.no_grad():  # every class seen, as after the first steps of a training
            model(
                split.inputs,
                split.targets,
                mask=None if bool(split.mask.all()) else split.mask,
                progress=0.9,
            )
        batch = split.__getitems__(rows % len(split))
        work.append(
            (
                model,
                hooks,
                optimizer,
                batch._replace(mask=None) if bool(batch.mask.all()) else batch,
            )
        )

    def step() -> float:
        started = time.perf_counter()
        for model, hooks, optimizer, batch in work:
            hooks.step(model, optimizer, batch, progress=0.9, max_gradient_norm=1.0)
        return time.perf_counter() - started

    return step
