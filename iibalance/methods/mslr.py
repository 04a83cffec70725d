"""MSLR: a learning rate of its own for each modality."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
from torch import nn

from iibalance.methods.gradients import groups_by_modality
from iibalance.methods.sum import Sum


class MSLR(Sum):
    """Joint late fusion in which validation accuracy moves each modality's own learning rate.

    Yao, Mihalcea: "Modality-specific Learning Rates for Effective Multimodal Additive Late-fusion",
    Findings of ACL 2022, the dynamic strategy, for any number of modalities. Every ``window``
    epochs, for the encoder and the classifier of modality m:

        rate_m <- rate_m * accuracy_m / mean(accuracy_m over the last ``window`` epochs)

    A modality that still gains goes faster, and one that falls back goes slower.

    The rates start alike. The paper's "keep" strategy is a start from rates tuned for each modality
    alone: set ``scale`` in the groups of :meth:`parameter_groups` for it. This class is written
    after the paper's summary and others' accounts of it, because the paper could not be had.

    Parameters: ``window`` (5 epochs).

    >>> MSLR.factor([0.25, 0.5, 0.75])
    1.5
    """

    name = "mslr"
    defaults = {"window": 5.0}

    @staticmethod
    def factor(accuracies) -> float:
        """By how much the rate is multiplied, given the last accuracies, oldest first."""
        mean = sum(accuracies) / len(accuracies)
        return accuracies[-1] / mean if mean > 0 else 1.0

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        return groups_by_modality(model)

    def after_epoch(self, row: Mapping[str, float], optimizer: torch.optim.Optimizer) -> None:
        window = max(1, round(self.options.window))
        for group in optimizer.param_groups:
            accuracy = row.get(f"validation.accuracy.{group.get('modality')}")
            if accuracy is None:
                continue
            key = f"accuracy.{group['modality']}"
            before = self.state.get(key, torch.zeros(0, dtype=torch.float64)).tolist()
            recent = deque([*before, accuracy], maxlen=window)
            self.state[key] = torch.tensor(list(recent), dtype=torch.float64)
            if row["epoch"] % window == 0:
                group["scale"] *= self.factor(list(recent))
