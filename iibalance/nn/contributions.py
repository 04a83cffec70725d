"""What each modality adds to the prediction of a sample: exact Shapley values of log p."""

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
    """[B, M] float64 nats: what each modality adds to log p of the class that is predicted.

    The exact Shapley values over all subsets of the modalities. A row's sum is log p(predicted)
    minus the log of that class's base rate, which is what is predicted from nothing; a missing
    modality adds 0.

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
    >>> log_p = head.fuse(embeddings, mask).logits.log_softmax(1).amax(1)
    >>> torch.allclose(found.sum(1).float(), log_p - torch.tensor(0.5).log(), atol=1e-5)
    True
    """
    count = mask.shape[1]
    if count > MAX_PLAYERS:
        raise InputError(
            f"X: {count} modalities have {2**count} subsets; "
            f"contributions are computed for at most {MAX_PLAYERS}"
        )
    whole = head.fuse(embeddings, mask).logits.double().log_softmax(-1)
    predicted = whole.argmax(1, keepdim=True)
    base = base_rate.to(whole).log()[predicted].squeeze(1)

    def value(subset: tuple[bool, ...]) -> Tensor:
        part = mask & torch.tensor(subset, device=mask.device)
        rows, found = part.any(1), base.clone()
        if rows.any():
            logits = head.fuse([values[rows] for values in embeddings], part[rows]).logits
            log_p = logits.double().log_softmax(-1)
            found[rows] = log_p.gather(1, predicted[rows]).squeeze(1)
        return found

    worth = {subset: value(subset) for subset in product((False, True), repeat=count)}
    return torch.stack([sum(shapley_terms(worth, player)) for player in range(count)], 1)
