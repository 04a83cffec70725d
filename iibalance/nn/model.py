"""MultimodalClassifier: named encoders and a head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from iibalance.data.dataset import Split
from iibalance.errors import InputError, as_sequence, check_names
from iibalance.nn.head import HeadOutput, IIBalanceHead


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode, and every part of it back in its own mode afterwards (a frozen encoder stays in evaluation mode)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class Prediction(NamedTuple):
    """What :meth:`MultimodalClassifier.predict` returns, on the CPU."""

    probabilities: Tensor  #: [B, K] float32
    weights: (
        Tensor | None
    )  #: [B, M] float32, the share each modality had in the fused prediction; None where the method has none
    uncertainty: (
        Tensor | None
    )  #: [B, M] float32 in [0, 1], normalised entropy of each modality's own prediction


class MultimodalClassifier(nn.Module):
    """One encoder a modality and a head over their embeddings.

    Args:
        encoders: modality name -> any module that maps [B, ...] to [B, D_m].
        num_classes: K; ignored when ``head`` is given.
        embedding_dims: modality name -> D_m. Left out, it is read from each encoder's ``embedding_dim`` attribute or its last ``nn.Linear``.
        head: by default an :class:`~iibalance.nn.head.IIBalanceHead` (``head_options`` go to it).
        standardizer: applied by :meth:`predict` to raw inputs (:meth:`forward` takes standardised ones); None = inputs are used as they are.
        class_names: names of the K classes, for reports.

    >>> model = MultimodalClassifier({"text": nn.Linear(5, 8), "image": nn.Sequential(nn.Flatten(), nn.Linear(16, 4))}, num_classes=3)
    >>> batch = {"text": torch.randn(2, 5), "image": torch.randn(2, 4, 4)}
    >>> bool(model(batch, torch.tensor([0, 2])).loss > 0)
    True
    >>> torch.allclose(model.predict(batch).probabilities.sum(1), torch.ones(2))
    True
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        num_classes: int | None = None,
        *,
        embedding_dims: Mapping[str, int] | None = None,
        head: nn.Module | None = None,
        standardizer: nn.Module | None = None,
        class_names: list[str] | None = None,
        **head_options,
    ):
        super().__init__()
        self.modalities = check_names(encoders)
        if head is None:
            if num_classes is None:
                raise ValueError("num_classes: expected the number of classes (or give a head)")
            sizes = (
                {name: _embedding_dim(name, encoder) for name, encoder in encoders.items()}
                if embedding_dims is None
                else dict(embedding_dims)
            )
            head = IIBalanceHead(
                dict(zip(self.modalities, as_sequence(sizes, self.modalities, "embedding_dims"))),
                num_classes,
                **head_options,
            )
        elif head_options:
            raise TypeError(
                f"{next(iter(head_options))}: options of the head cannot be given together with a head"
            )
        for what, given in (
            ("head", getattr(head, "modalities", None)),
            ("standardizer", getattr(standardizer, "shapes", None)),
        ):
            if (
                given is not None and tuple(given) != self.modalities
            ):  # masks and embeddings go by order
                raise ValueError(
                    f"{what}: expected the modalities {', '.join(self.modalities)} in this order, got {', '.join(given)}"
                )
        self.encoders = nn.ModuleList(
            encoders[name] for name in self.modalities
        )  # a list: names need not be Python identifiers
        self.head, self.standardizer = head, standardizer
        self.num_classes = head.num_classes
        self.class_names = class_names or [str(index) for index in range(self.num_classes)]

    def embed(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Embeddings of standardised inputs, M of [B, D_m]."""
        return [
            encoder(values)
            for encoder, values in zip(
                self.encoders, as_sequence(inputs, self.modalities, "inputs")
            )
        ]

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        progress: float = 1.0,
    ) -> HeadOutput:
        """Args: inputs by name, [B, ...] each; targets [B] int64 or None; mask [B, M] bool (True = present); progress in [0, 1], see the head."""
        return self.head(self.embed(inputs), targets, mask=mask, progress=progress)

    @torch.inference_mode()
    def predict(
        self,
        batch: Mapping[str, Tensor | np.ndarray],
        mask: Tensor | np.ndarray | None = None,
        *,
        batch_size: int = 256,
    ) -> Prediction:
        """Probabilities, fusion weights and uncertainty of raw inputs, as they stand in the data (standardisation is part of the model).

        Args:
            batch: modality name -> [N, ...] array or tensor. A modality left out is missing in every sample; its column of ``mask`` is ignored.
            mask: [N, M] bool, True = present; all present by default. Rows of a missing modality may hold anything, NaN included.
            batch_size: samples a step, to bound memory.

        Raises :class:`~iibalance.errors.InputError` for unknown names, differing lengths, NaN or infinite values and samples with no modality.
        The model is put in evaluation mode for the call and back afterwards.
        """
        inputs, mask = self._check_batch(batch, mask)
        device = next(self.parameters()).device
        outputs = []
        with evaluating(self):
            for start in range(0, len(mask), batch_size):
                rows = slice(start, start + batch_size)
                present = mask[rows].to(device)
                part = {name: values[rows].to(device) for name, values in inputs.items()}
                if self.standardizer is not None:
                    part = self.standardizer.transform(part, present)
                out = self.head.fuse(self.embed(part), present)
                outputs.append(
                    [
                        None if value is None else value.float().cpu()
                        for value in (out.logits.float().softmax(-1), out.weights, out.uncertainty)
                    ]
                )
        if not outputs:
            raise InputError("batch: holds no samples")
        return Prediction(
            *(None if column[0] is None else torch.cat(column) for column in zip(*outputs))
        )

    def _check_batch(self, batch: Mapping, mask) -> tuple[dict[str, Tensor], Tensor]:
        unknown = [name for name in batch if name not in self.modalities]
        if unknown:
            raise InputError(
                f"batch: {unknown[0]!r} is none of this model's modalities ({', '.join(self.modalities)})"
            )
        given = {name: torch.as_tensor(batch[name]) for name in self.modalities if name in batch}
        if not given:
            raise InputError(
                f"batch: expected at least one of the modalities {', '.join(self.modalities)}"
            )
        lengths = {name: len(values) for name, values in given.items()}
        count = next(iter(lengths.values()))
        if len(set(lengths.values())) > 1:
            raise InputError(
                "batch: modalities differ in length ("
                + ", ".join(f"{name}: {size}" for name, size in lengths.items())
                + ")"
            )
        mask = (
            torch.ones(count, len(self.modalities), dtype=torch.bool)
            if mask is None
            else torch.as_tensor(mask).bool().clone()
        )
        if mask.shape != (count, len(self.modalities)):
            raise InputError(
                f"mask: has shape {list(mask.shape)}, expected [{count}, {len(self.modalities)}] ({', '.join(self.modalities)})"
            )
        inputs = {}
        for index, name in enumerate(self.modalities):
            if name not in given:
                mask[:, index] = False
                shape = self.standardizer.shapes[name] if self.standardizer is not None else None
                if shape is None:
                    raise InputError(
                        f"batch: {name} is not there; a model without a standardizer needs an array of it (any values, with mask False)"
                    )
                inputs[name] = torch.zeros(count, *shape)
                continue
            values = given[name].float()
            shape = None if self.standardizer is None else tuple(self.standardizer.shapes[name])
            if shape is not None and tuple(values.shape[1:]) != shape:
                raise InputError(
                    f"batch: {name} has samples of shape {tuple(values.shape[1:])}, the model was trained on {shape}"
                )
            bad = ~torch.isfinite(values.flatten(1)).all(1)
            if (bad & mask[:, index]).any():
                raise InputError(
                    f"batch: {name} row {int((bad & mask[:, index]).nonzero()[0])} holds a NaN or infinite value; repair it or mask the row"
                )
            inputs[name] = values.masked_fill(bad.view(-1, *[1] * (values.dim() - 1)), 0.0)
        if not mask.any(1).all():
            raise InputError(
                f"mask: row {int((~mask.any(1)).nonzero()[0])} has no modality present; leave such samples out"
            )
        return inputs, mask


@torch.no_grad()
def embed_split(model: MultimodalClassifier, split: Split, batch_size: int = 256) -> list[Tensor]:
    """Embeddings (M of [N, D_m]) of a split by a model in evaluation mode, on its device."""
    device, parts = next(model.parameters()).device, []
    with evaluating(model):
        for start in range(0, len(split), batch_size):
            rows = slice(start, start + batch_size)
            parts.append(
                model.embed(
                    {name: values[rows].to(device) for name, values in split.inputs.items()}
                )
            )
    return [torch.cat(values).float() for values in zip(*parts)]


def encoder_size(encoder: nn.Module, sample: Tensor) -> int:
    """D of an encoder, from what it returns for a sample batch; InputError if that is not [B, D]."""
    with torch.no_grad(), evaluating(encoder):
        embedding = encoder(sample)
    if not isinstance(embedding, Tensor) or embedding.dim() != 2 or len(embedding) != len(sample):
        shape = list(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
        raise InputError(
            f"encoders: {type(encoder).__name__} returned {shape} for a batch of {len(sample)}; an encoder must return [B, D]"
        )
    return embedding.shape[1]


def _embedding_dim(name: str, encoder: nn.Module) -> int:
    size = getattr(encoder, "embedding_dim", None)
    if isinstance(size, int):
        return size
    linears = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(
            f"embedding_dims: the size of {name}'s embedding cannot be told from its encoder; give embedding_dims={{{name!r}: ...}}"
        )
    return linears[-1].out_features
