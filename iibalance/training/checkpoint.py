"""How far a training is, and the checkpoints that a stopped one goes on from, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from iibalance.methods import Method
from iibalance.training.folder import RunFolder


class Progress:
    """What a checkpoint holds beside weights and optimiser, and the best weights so far.

    Args:
        groups: column of the history -> names of the weights that keep the epoch in which it was
            lowest. Weights of no group follow the first epoch, then any group's best one.
        method: whose state is kept too.
    """

    def __init__(self, groups: Mapping[str, set[str]], method: Method):
        self.method = method
        self.epoch, self.best_epoch, self.stopped = 0, 0, False
        self.history: list[dict] = []
        self.best = dict.fromkeys(groups, math.inf)
        self.best_weights: dict[str, Tensor] | None = None
        self._column_of = {key: column for column, keys in groups.items() for key in keys}

    def record(self, row: dict, module: nn.Module, patience: int) -> None:
        """Take in an epoch's row, and the weights where they are the best so far."""
        self.epoch += 1
        self.history.append(row)
        better = [column for column in self.best if row.get(column, math.inf) < self.best[column]]
        if better:
            self.best_epoch = self.epoch
            self.best |= {column: row[column] for column in better}
            state = module.state_dict()
            if self.best_weights is None:
                self.best_weights = {key: value.detach().clone() for key, value in state.items()}
            for key, value in state.items():
                column = self._column_of.get(key)
                if column is None or column in better:
                    self.best_weights[key] = value.detach().clone()
        self.stopped = bool(self.best_epoch) and self.epoch - self.best_epoch >= patience

    def save(self, path: Path) -> None:
        """Write into a checkpoint's folder."""
        progress = {
            "epoch": self.epoch,
            "stopped": self.stopped,
            "best": {column: value for column, value in self.best.items() if value < math.inf},
            "best_epoch": self.best_epoch,
            "history": self.history,
        }
        (path / "progress.json").write_text(json.dumps(progress))
        if self.best_weights is not None:
            _write(path / "best.safetensors", self.best_weights)
        if self.method.state:
            _write(path / "method.safetensors", self.method.state)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint's folder."""
        progress = json.loads((path / "progress.json").read_text())
        self.epoch, self.best_epoch = progress["epoch"], progress["best_epoch"]
        self.history, self.stopped = progress["history"], progress["stopped"]
        self.best |= progress["best"]
        if (path / "best.safetensors").exists():
            self.best_weights = load_file(path / "best.safetensors")
        if (path / "method.safetensors").exists():
            self.method.state = load_file(path / "method.safetensors")


def write_checkpoint(
    folder: RunFolder, name: str, accelerator: Accelerator, progress: Progress
) -> None:
    """Write a whole checkpoint; all processes take part."""
    main = accelerator.is_main_process
    scratch = folder.path / "checkpoints" / f".writing-{name}"  # what the main process is given
    with folder.checkpoint(name) if main else nullcontext(scratch) as path:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(path))
        if main:
            progress.save(path)
        accelerator.wait_for_everyone()


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, path)
