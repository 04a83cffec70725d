"""Numbers about predictions: quality, calibration, and who contributed (method page, section 6).

Pure functions of logits or log-probabilities and targets; no model, no trainer.

The metrics are computed on the CPU in float64, and means are exactly rounded sums (``math.fsum``).
So neither the number of threads nor the device moves the last bit: the ``metrics.json`` of a
resumed run equals that of the run which was never interrupted.

Calibration is one parameter, the temperature, and one fit: :func:`fit_temperature` serves every
head, every method and the budgets.

What may come in: torch alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor

IGNORE_INDEX = -100  # rows with this target contribute nothing, here as in the losses
MAX_PLAYERS = 6  # 2**6 = 64 evaluations of a test set; every further player doubles them

Worth = TypeVar("Worth", float, Tensor)


def classification_metrics(
    log_probabilities: Tensor, targets: Tensor, *, bins: int = 15
) -> dict[str, float]:
    """The five numbers reported of any predictor (method page, section 6).

    ``log_probabilities`` [N, K] are floating point and normalised over K (natural logarithm; -inf
    is a probability of 0). ``targets`` [N] are integers in 0..K-1, or -100 for a row to leave out.
    The predicted class is the first of the most probable ones.

    - ``accuracy`` in [0, 1];
    - ``macro_f1`` in [0, 1]: the mean F1 over the classes that occur in the targets *or* the
      predictions. A class that occurs in neither says nothing and is left out; one that is
      predicted without ever occurring counts 0, as in scikit-learn;
    - ``nll`` in nats: the mean of -log p(target); infinite where a target was given probability 0;
    - ``ece`` in [0, 1]: the mean absolute gap of confidence and accuracy over ``bins`` equal-mass
      bins, see :func:`reliability_curve`;
    - ``brier`` in [0, 2]: the mean over samples of the squared error *summed* over classes (Brier
      1950), not halved for two classes.

    Raises ``ValueError`` naming the argument: wrong shapes or types, nothing to score, NaN or
    unnormalised rows, targets out of range, bins < 1.

    >>> probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]], dtype=torch.float64)
    >>> classification_metrics(probabilities.log(), torch.tensor([0, 0]))
    {'accuracy': 0.5, 'macro_f1': 0.333..., 'nll': 1.0397..., 'ece': 0.625, 'brier': 0.8125}
    """
    log_probabilities, targets = _checked(log_probabilities, targets)
    confidence, accuracy, count = reliability_curve(log_probabilities, targets, bins)
    predictions = log_probabilities.argmax(1)
    rows = torch.arange(len(targets))
    squared = log_probabilities.exp()
    squared[rows, targets] -= 1.0
    squared.square_()
    gaps = (count * (confidence - accuracy).abs()).tolist()
    return {
        "accuracy": (predictions == targets).sum().item() / len(targets),
        "macro_f1": _macro_f1(predictions, targets, log_probabilities.shape[1]),
        # Not below 0: float32 may round the logarithm of a certain row to +1e-7.
        "nll": max(0.0, _mean(-log_probabilities[rows, targets])),
        "ece": math.fsum(gaps) / len(targets),
        "brier": _mean(squared.sum(1)),
    }


def reliability_curve(
    log_probabilities: Tensor, targets: Tensor, bins: int = 15
) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence against accuracy in equal-mass bins (method page, section 6).

    This is what a reliability diagram draws and what the ECE sums. It takes what
    :func:`classification_metrics` takes and raises what that raises.

    Samples are sorted by confidence, the probability of the predicted class, and cut into
    b = min(bins, N) consecutive groups whose sizes differ by at most one, the larger ones first.
    Bins of equal width would be nearly empty but for a few where the model is good (Nixon et al.
    2019, "Measuring Calibration in Deep Learning").

    Samples of exactly equal confidence share their mean accuracy, so that a cut through a tie
    depends on no order: a predictor with one constant confidence that is right has an ECE of 0,
    however its samples are listed.

    Returns float64 mean ``confidence`` [b], never falling, float64 mean ``accuracy`` [b] and int64
    ``count`` [b], which sums to the rows scored.

    >>> probabilities = [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]
    >>> log_probabilities = torch.tensor(probabilities, dtype=torch.float64).log()
    >>> curve = reliability_curve(log_probabilities, torch.tensor([0, 1, 0, 1]), bins=2)
    >>> [[round(value, 4) for value in values.tolist()] for values in curve]
    [[0.65, 0.85], [0.5, 1.0], [2, 2]]
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins: {bins!r} is not a whole number of at least 1")
    log_probabilities, targets = _checked(log_probabilities, targets)
    log_confidence, predictions = log_probabilities.max(1)
    # Ties are found before exp(), whose last bit may differ between the lanes of a vector.
    log_confidence, order = log_confidence.sort(stable=True)
    correct = (predictions == targets).double()[order]
    _, group, size = log_confidence.unique_consecutive(return_inverse=True, return_counts=True)
    correct = (torch.bincount(group, weights=correct) / size)[group]
    parts = min(bins, len(targets))
    confidence = [_mean(part) for part in log_confidence.exp().tensor_split(parts)]
    accuracy = [_mean(part) for part in correct.tensor_split(parts)]
    count = [len(part) for part in correct.tensor_split(parts)]
    return (
        torch.tensor(confidence, dtype=torch.float64),
        torch.tensor(accuracy, dtype=torch.float64),
        torch.tensor(count),
    )


def exact_shapley(value: Callable[[tuple[bool, ...]], float], num_players: int) -> list[float]:
    """Each player's share of v(everyone) - v(nobody), after Shapley (1953): exact, no sampling.

    ``value`` takes a presence mask of ``num_players`` booleans and returns a finite number, such as
    the accuracy with the absent modalities masked (method page, section 6); for the empty mask that
    is what a prediction from nothing achieves. It is called once per subset: 2**num_players times.

        phi_m = sum over S without m of |S|! (M - |S| - 1)! / M! * (v(S + m) - v(S))

    The shares sum to v(full) - v(empty), in the units of ``value``; a negative one means that the
    player hurts on average.

    Raises ``ValueError`` for fewer than 1 or more than 6 players, and for a value that is not
    finite.

    >>> exact_shapley(lambda present: 0.5 * present[0] + 0.25 * present[1] + 0.25 * all(present), 2)
    [0.625, 0.375]
    """
    if num_players < 1:
        raise ValueError(f"num_players: {num_players} is less than 1")
    if num_players > MAX_PLAYERS:
        raise ValueError(
            f"num_players: {num_players} would need 2**{num_players} = {2**num_players} "
            f"evaluations; exact Shapley values are computed for at most {MAX_PLAYERS} "
            "(merge modalities that belong together, or leave the contributions out)"
        )
    worth = {}
    for present in product((False, True), repeat=num_players):
        worth[present] = float(value(present))
        if not math.isfinite(worth[present]):
            raise ValueError(
                f"value: returned {worth[present]} for the subset {present}; it must be finite"
            )
    return [math.fsum(shapley_terms(worth, player)) for player in range(num_players)]


def shapley_terms(worth: Mapping[tuple[bool, ...], Worth], player: int) -> Iterator[Worth]:
    """The terms of a player's Shapley value, which is their sum: each gain by its weight.

    ``worth``: presence mask -> v of that subset, a number or a tensor, for every subset.

    >>> sum(shapley_terms({(False,): 0.25, (True,): 1.0}, 0))
    0.75
    """
    for without, before in worth.items():
        if not without[player]:
            players = len(without)
            weight = 1 / (players * math.comb(players - 1, sum(without)))
            yield weight * (worth[without[:player] + (True,) + without[player + 1 :]] - before)


def mean_and_stderr(values: Iterable[float]) -> tuple[float, float]:
    """Mean over repeated runs and its standard error (method page, section 6).

    The standard error is the sample standard deviation / sqrt(n). That of a single value is unknown
    and therefore NaN, never 0. Raises ``ValueError`` where there is no value.

    >>> mean_and_stderr([0.8, 0.9, 1.0])
    (0.9, 0.0577...)
    """
    values = [float(value) for value in values]
    if not values:
        raise ValueError("values: there is none to average")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(
        math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
    )


def fit_temperature(
    logits: Tensor, targets: Tensor, *, weight: float = 1.0, around: float = 1.0
) -> float:
    """The temperature T > 0 that minimises the NLL of ``logits / T``: the one calibration here.

    ``logits`` [N, K] and ``targets`` [N] are of held-out samples. T is found in [0.05, 20] by
    bisection on the derivative in log T, in float64, so that it is the same every time.

    A prior, log T normal around that of ``around`` with standard deviation 1, counts as much as
    ``weight`` samples. It keeps T finite where every sample is right, and is soon outweighed where
    they are many.

    >>> logits = torch.tensor([[4.0, 0.0]]).repeat(1000, 1)
    >>> targets = torch.tensor([0] * 731 + [1] * 269)  # right 73.1 % of the time, sigmoid(1):
    >>> round(fit_temperature(logits, targets), 2)  # these logits are four times too large
    3.97
    """
    logits, low, high = logits.double(), math.log(0.05), math.log(20.0)
    true = logits.gather(1, targets[:, None]).squeeze(1)
    centre = math.log(around)

    def slope(log_t: float) -> float:
        scale = math.exp(-log_t)
        expected = ((logits * scale).softmax(-1) * logits.clamp_min(-1e30)).sum(-1)
        return float((true - expected).sum() * scale + weight * (log_t - centre))

    if slope(low) >= 0:
        return math.exp(low)
    if slope(high) <= 0:
        return math.exp(high)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp((low + high) / 2)


def entropy_temperature(logits: Tensor, nats: float) -> float:
    """The temperature T at which softmax(``logits`` [N, K] / T) has a mean entropy of ``nats``.

    A calibrated prediction's mean entropy is its mean cross-entropy. So where that is known from
    elsewhere, a budget say, T needs no labels. It is found in [0.05, 20] by bisection, in float64.

    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    >>> round(entropy_temperature(logits, 0.5823), 2)  # the entropy of sigmoid(1)
    4.0
    """
    logits, low, high = logits.double(), math.log(0.05), math.log(20.0)
    for _ in range(50):
        middle = (low + high) / 2
        p = (logits * math.exp(-middle)).softmax(-1)
        below = float(torch.special.entr(p).sum(-1).mean()) < nats
        low, high = (middle, high) if below else (low, middle)
    return math.exp((low + high) / 2)


def scaled(logits: Tensor, targets: Tensor) -> Tensor:
    """``logits`` [N, K] divided by their best temperature on ``targets`` [N], in float64."""
    return logits.double() / fit_temperature(logits, targets)


def own_temperatures(
    logits: Sequence[Tensor],
    targets: Tensor,
    mask: Tensor | None = None,
    clean: Tensor | None = None,
    *,
    nats: Tensor | None = None,
    weight: float = 10.0,
) -> Tensor:
    """[M] float64: the temperature that calibrates each modality's own prediction.

    ``logits`` M of [N, K] on held-out ``targets`` [N]. Only rows in which the modality is present
    count (``mask`` [N, M] bool), and only ``clean`` ones [N] bool; 1 where there is none.

    With ``nats`` [M], a cross-entropy that each modality is known to have on other samples, the
    prior of its temperature is around the one that gives these predictions that entropy
    (:func:`entropy_temperature`), and counts as much as ``weight`` samples.

    >>> sure = torch.tensor([[9.0, 0.0]]).repeat(50, 1)
    >>> absent = torch.zeros(50, 1, dtype=torch.bool)
    >>> own_temperatures([sure], torch.zeros(50, dtype=torch.long), absent).tolist()
    [1.0]
    """
    found = []
    for index, values in enumerate(logits):
        rows = torch.ones_like(targets, dtype=torch.bool) if clean is None else clean
        rows = rows if mask is None else rows & mask[:, index]
        its, labels = values[rows].cpu(), targets[rows].cpu()
        if not len(labels):
            found.append(1.0)
        elif nats is None or not math.isfinite(float(nats[index])):
            found.append(fit_temperature(its, labels))
        else:
            around = entropy_temperature(its, float(nats[index]))
            found.append(fit_temperature(its, labels, weight=weight, around=around))
    return torch.tensor(found, dtype=torch.float64, device=logits[0].device)


def _macro_f1(predictions: Tensor, targets: Tensor, num_classes: int) -> float:
    right, predicted, occurring = (
        torch.bincount(classes, minlength=num_classes).double()
        for classes in (targets[predictions == targets], predictions, targets)
    )
    total = predicted + occurring  # 2 TP + FP + FN, and F1 = 2 TP / total
    return _mean((2 * right / total)[total > 0])


def _mean(values: Tensor) -> float:
    return math.fsum(values.tolist()) / len(values)


def _checked(log_probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU, float64 [N, K] and int64 [N], without the ignored rows.

    Raises ``ValueError`` for what cannot be scored.
    """
    if (
        not isinstance(log_probabilities, Tensor)
        or log_probabilities.dim() != 2
        or not log_probabilities.is_floating_point()
    ):
        raise ValueError(
            "log_probabilities: expected a floating-point tensor [N, K], "
            f"got {_described(log_probabilities)}"
        )
    if (
        not isinstance(targets, Tensor)
        or targets.shape != log_probabilities.shape[:1]
        or targets.is_floating_point()
        or targets.is_complex()
        or targets.dtype == torch.bool
    ):
        raise ValueError(
            f"targets: expected an integer tensor [N] with N = {len(log_probabilities)}, "
            f"got {_described(targets)}"
        )
    log_probabilities, targets = (
        log_probabilities.detach().cpu().double(),
        targets.detach().cpu().long(),
    )
    kept = targets != IGNORE_INDEX
    if not kept.all():
        log_probabilities, targets = log_probabilities[kept], targets[kept]
    classes = log_probabilities.shape[1]
    if not len(targets):
        raise ValueError("targets: there is no sample to score")
    outside = (targets < 0) | (targets >= classes)
    if outside.any():
        raise ValueError(f"targets: holds {targets[outside][0].item()}, outside 0..{classes - 1}")
    if not (log_probabilities.logsumexp(1).abs() < 1e-3).all():  # written so that NaN fails too
        raise ValueError(
            "log_probabilities: a row is NaN or its probabilities do not sum to 1 "
            "(within 0.001); pass log_softmax(logits.float(), 1)"
        )
    return log_probabilities, targets


def _described(value: object) -> str:
    return (
        f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    )
