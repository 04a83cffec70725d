"""What each modality adds to the prediction of a sample: exact Shapley values of its log-odds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn

from iibalance.errors import InputError
from iibalance.metrics import MAX_PLAYERS, shapley_terms


@torch.no_grad()
def contributions(
    head: nn.Module, embeddings: Sequence[Tensor], mask: Tensor, base_rate: Tensor
) -> Tensor:
    """[B, M] float64 nats: what each modality adds to the log-odds of the class that is predicted.

    The log-odds are log p - log(1 - p). These are the exact Shapley values over all subsets of the
    modalities: a row's sum is the fused prediction's log-odds minus those of the class's base rate,
    which is what is predicted from nothing. A modality that tells nothing adds about 0, one that
    speaks against the prediction less than 0, and a missing one 0.

    Args:
        head: has ``fuse(embeddings, mask)``.
        embeddings: M of [B, D_m].
        mask: [B, M] bool, True = present.
        base_rate: [K] each class's share of the training samples.

    Raises InputError for more than six modalities.

    >>> from iibalance.nn.head import IIBalanceHead
    >>> head = IIBalanceHead({"audio": 3, "video": 2}, 2).eval()
    >>> embeddings, mask = [torch.randn(4, 3), torch.randn(4, 2)], torch.ones(4, 2) > 0
    >>> found = contributions(head, embeddings, mask, torch.tensor([0.5, 0.5]))
    >>> p = head.fuse(embeddings, mask).logits.softmax(1).amax(1)
    >>> torch.allclose(found.sum(1).float(), (p / (1 - p)).log(), atol=1e-5)
    True
    """
    count = mask.shape[1]
    if count > MAX_PLAYERS:
        raise InputError(
            f"X: {count} modalities have {2**count} subsets; "
            f"contributions are computed for at most {MAX_PLAYERS}"
        )
    predicted = head.fuse(embeddings, mask).logits.argmax(1, keepdim=True)
    base = log_odds(base_rate.to(mask.device).double().log().expand(len(mask), -1), predicted)

    def value(subset: tuple[bool, ...]) -> Tensor:
        part = mask & torch.tensor(subset, device=mask.device)
        rows, found = part.any(1), base.clone()
        if rows.any():
            logits = head.fuse([values[rows] for values in embeddings], part[rows]).logits
            found[rows] = log_odds(logits.double(), predicted[rows])
        return found

    worth = {subset: value(subset) for subset in product((False, True), repeat=count)}
    found = torch.stack([sum(shapley_terms(worth, player)) for player in range(count)], 1)
    return found.masked_fill(~mask, 0.0)  # exactly: what rounding leaves of a missing one is 1e-7


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """[B] log p - log(1 - p) of one of the ``classes`` [B, 1] a row, under ``logits`` [B, K].

    Within +-100, so that differences are numbers where a class is certain or ruled out.

    >>> log_odds(torch.tensor([[0.0, 2.0]]), torch.tensor([[1]]))
    tensor([2.])
    """
    others = logits.scatter(1, classes, -torch.inf).logsumexp(1)
    return (logits.gather(1, classes).squeeze(1) - others).clamp(-100.0, 100.0)
