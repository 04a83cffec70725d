"""A moving average of the weights of a training: what is judged and kept in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

EVERY = 2  # steps


class WeightAverage:
    """Exponential moving average of a model's trained weights and of its batch normalisations' running statistics.

    After every second step t the average is ``keep`` squared times what it was plus the rest of the weights now, keep = min(1 - 1 / horizon, (1 + t) / (10 + t)):
    the second is a short start, in which the first weights are soon forgotten. (Every step would give much the same for twice the cost, which small encoders
    feel.) Frozen weights and other buffers are not averaged: prototypes, which are moving averages already, budgets, the gate, a user's own.

    Args:
        model: whose weights; they must stay the same tensors (moved to their device before).
        horizon: steps over which the average reaches back; 1 or less = the weights as they are.

    Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; as moving average with this start, the practice of TensorFlow's
    ``ExponentialMovingAverage``.

    In a loop of your own: one per training, ``update`` after each step, and ``with average.used():`` around validation and saving.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> average = WeightAverage(model, horizon=20)
    >>> for step in range(100):
    ...     _ = model.weight.data.fill_(step // 2 % 2)  # a training that jumps to and fro
    ...     average.update()
    >>> with average.used():
    ...     print(round(float(model.weight.detach()), 1))
    0.5
    """

    def __init__(self, model: nn.Module, horizon: float):
        self.horizon, self.steps = max(1.0, horizon), 0
        live = {
            name: value
            for name, value in model.named_parameters()
            if value.requires_grad and value.is_floating_point()
        }
        for (
            place,
            module,
        ) in (
            model.named_modules()
        ):  # other buffers are tables and masks: an average of minus infinity would be NaN
            if isinstance(module, _NormBase):
                live |= {
                    f"{place}.{name}" if place else name: value
                    for name, value in module.named_buffers(recurse=False)
                    if value.is_floating_point()
                }
        self.values = {name: value.detach().clone() for name, value in live.items()}
        self._live, self._values = (
            [value.detach() for value in live.values()],
            list(self.values.values()),
        )

    @torch.no_grad()
    def update(self) -> None:
        """Call after each step: every second one takes the weights as they are now into the average."""
        self.steps += 1
        if self.steps % EVERY:
            return
        keep = min(1 - 1 / self.horizon, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._values, self._live, 1 - keep**EVERY)

    @contextmanager
    def used(self) -> Iterator[None]:
        """The model with the averaged weights, and as it was afterwards."""
        now = [value.clone() for value in self._live]
        self.apply()
        try:
            yield
        finally:
            self._set(now)

    def apply(self) -> None:
        """Give the model the averaged weights, for good."""
        self._set(self._values)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._live, values)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""
        return {
            "steps": torch.tensor(self.steps),
            **{f"average.{name}": value for name, value in self.values.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`."""
        self.steps = int(state["steps"])
        for name, value in self.values.items():
            value.copy_(state[f"average.{name}"])
