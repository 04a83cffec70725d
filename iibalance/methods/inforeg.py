"""InfoReg: the modality that is ahead is held back while it learns fast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iibalance.data.dataset import Batch, Split
from iibalance.methods.agm import AGM
from iibalance.methods.concat import Concat
from iibalance.methods.gradients import mean_over_processes, unwrap
from iibalance.methods.heads import own_cross_entropies


class InfoReg(Concat):
    """Ties the encoder that is ahead to its weights of the epoch before, in its prime window.

    Huang, Wei, Yang, Hu: "Adaptive Unimodal Regulation for Balanced Multimodal Information
    Acquisition", CVPR 2025, equations 7 to 16 and algorithm 1. For any number M of modalities.

    The trace of the Fisher information of encoder m is the mean square length of its gradient over
    the steps of an epoch t. While it grows by more than ``window``, the modality is in its prime
    learning window:

        Tr_m(t) = mean over steps |gradient of w_m|^2
        (T_m(t - 1) - T_m(t - 2)) / T_m(t - 1) > window

    where T_m(t) is the mean of Tr_m over ``average`` epochs up to t, 0 before the first.

    A modality is scored by its slice of the concatenated head's weights, s_m the batch's mean of
    log softmax(W_m z_m + bias / M)[y]. Its lead is the mean over those that are behind it, and in
    its window it is regulated by that lead, from the third epoch on:

        lead_m = mean_{j: s_j < s_m} (s_m - s_j),  0 for the last
        gradient of w_m <- gradient + exp(beta tanh(lead_m)) (w_m - w_m at the epoch's start)

    That is the gradient of the penalty exp(...) / 2 |w_m - w_m(t - 1)|^2. The loss is the fused
    cross-entropy plus ``unimodal`` times the sum of the modalities' own, -s_m: 1 is what the paper
    calls InfoReg*, which the code does and which is the better one in its tables; 0 is InfoReg.

    The paper's equation 8 gives s_m the other sign, by which the modality that is behind would be
    held back; its text and its code hold the better one back, and so is it here. The code knows two
    modalities, with factors of their own (0.95 and 0.1); it sums scores over a batch, takes the
    window from the audio's trace alone, and the trace after the penalty. The paper is followed in
    all of that. It has no averages, ``average`` = 1; the code's are over ten epochs, and so here:
    from one epoch to the next the trace of a small data set moves by far more than ``window``
    either way, and the window would open and close by chance all through the training. Where
    samples lack a modality, its score is of those that have it, and a modality that a batch has not
    takes no part.

    Parameters: ``beta`` (0.9), ``window`` (0.04), ``average`` (10 epochs), ``unimodal`` (1).

    The first is ahead of both others, by 1 and 3; the second of the third, by 2:

    >>> InfoReg.leads(torch.tensor([-1.0, -2.0, -4.0]))
    tensor([2., 2., 0.])
    """

    name = "inforeg"
    defaults = {"beta": 0.9, "window": 0.04, "average": 10.0, "unimodal": 1.0}

    #: One, differentiated beside the loss: its gradient is what mixed precision multiplies by.
    _unit: Tensor | None = None
    #: The encoders' parameters at the start of the epoch.
    _start: list[list[Tensor]] | None = None

    @property
    def average(self) -> int:
        """Over how many epochs a trace is averaged."""
        return max(1, round(self.options.average))

    @staticmethod
    def leads(scores: Tensor) -> Tensor:
        """lead [M] of the scores [M]; NaN stands for a modality that is not there."""
        gaps = scores[:, None] - scores
        behind = gaps > 0  # false beside NaN
        return gaps.where(behind, 0.0).sum(1) / behind.sum(1).clamp_min(1)

    @staticmethod
    @torch.no_grad()
    def scores(head: nn.Module, batch: Batch, output) -> Tensor:
        """s [M] over the batch's samples, of all processes."""
        sums = []
        for index, values in enumerate(AGM.responses(head, output.embeddings)):
            own = batch.targets
            if batch.mask is not None:
                own = own.masked_fill(~batch.mask[:, index], -100)
            loss = F.cross_entropy(values.float(), own, reduction="sum")
            sums.append(torch.stack([-loss, (own != -100).sum().to(loss)]))
        total, count = mean_over_processes(torch.stack(sums)).unbind(1)
        return total / count  # 0 / 0 is NaN

    @staticmethod
    def in_window(traces: Tensor, window: float, average: int) -> list[bool]:
        """For each modality, from the traces [T, M] of the epochs up to t - 1."""
        padded = torch.cat([torch.zeros_like(traces[:1]).expand(average, -1), traces])
        last, before = padded[-average:].mean(0), padded[-average - 1 : -1].mean(0)
        return (last - before > window * last).tolist()

    def before_epoch(self, model: nn.Module, train: Split, progress: float) -> None:
        model = unwrap(model)
        count = len(model.encoders)
        if "steps" in self.state and self.state["steps"] > 0:
            trace = self.state["squares"] / self.state["steps"]
            old = self.state.get("traces", torch.zeros(0, count, dtype=torch.float64))
            self.state["traces"] = torch.cat([old, trace[None]])[-self.average - 1 :]
        self.state["squares"] = torch.zeros(count, dtype=torch.float64)
        self.state["steps"] = torch.tensor(0)
        self._start = [
            [value.detach().clone() for value in encoder.parameters()] for encoder in model.encoders
        ]

    def loss(self, output, model: nn.Module, batch: Batch, progress: float) -> Tensor:
        if not self.options.unimodal:
            return output.loss
        own = AGM.responses(unwrap(model).head, output.embeddings)
        losses = own_cross_entropies(own, batch.targets, batch.mask)
        return output.loss + self.options.unimodal * losses.sum()

    def backward(
        self,
        loss: Tensor,
        model: nn.Module,
        batch: Batch,
        output,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        backward(loss)
        if self._unit is None:  # kept over the micro-batches of a step, as gradients are
            self._unit = torch.ones_like(loss, requires_grad=True)
        backward(self._unit)

    @torch.no_grad()
    def after_backward(self, model: nn.Module, batch: Batch, output) -> None:
        if self._start is None:
            raise ValueError(
                "inforeg: the weights at the epoch's start are not known; "
                "call before_epoch(model, train, progress) before each epoch"
            )
        model = unwrap(model)
        unit, self._unit = self._unit, None
        scale = 1.0 if unit is None else float(unit.grad)
        for index, encoder in enumerate(model.encoders):
            grads = [value.grad for value in encoder.parameters() if value.grad is not None]
            square = sum(float((grad.double() / scale).square().sum()) for grad in grads)
            self.state["squares"][index] += square
        self.state["steps"] += 1
        traces = self.state.get("traces")
        if traces is None or len(traces) < 2:
            return
        leads = self.leads(self.scores(model.head, batch, output))
        factors = torch.exp(self.options.beta * torch.tanh(leads)).tolist()
        fast = self.in_window(traces, self.options.window, self.average)
        for index, encoder in enumerate(model.encoders):
            if not (fast[index] and leads[index] > 0):
                continue
            for value, start in zip(encoder.parameters(), self._start[index]):
                if value.grad is not None:
                    value.grad.add_((value - start).to(value.grad), alpha=scale * factors[index])
