"""MultimodalClassifier: named encoders and a head, and predictions in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from iibalance.data.dataset import Split
from iibalance.errors import InputError, as_sequence, check_names
from iibalance.nn.head import HeadOutput, IIBalanceHead

BATCH_SIZE = 256  # samples a step where nothing is trained: bounds memory


class Prediction(NamedTuple):
    """What :meth:`MultimodalClassifier.predict` returns, on the CPU."""

    probabilities: Tensor  #: [B, K] float32
    weights: Tensor | None  #: [B, M] float32, shares in the fused prediction; None without a gate
    uncertainty: Tensor | None  #: [B, M] float32 in [0, 1], normalised entropies of own predictions


class MultimodalClassifier(nn.Module):
    """One encoder a modality and a head over their embeddings.

    Args:
        encoders: modality name -> any module that maps [B, ...] to [B, D_m].
        num_classes: K; ignored when ``head`` is given.
        embedding_dims: modality name -> D_m. Left out, it is read from each encoder's
            ``embedding_dim`` attribute or its last ``nn.Linear``.
        head: by default an :class:`~iibalance.nn.head.IIBalanceHead` (``head_options`` go to it).
        standardizer: applied by :meth:`predict` to raw inputs (:meth:`forward` takes standardised
            ones); None = inputs are used as they are.
        class_names: names of the K classes, for reports.

    >>> image = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    >>> model = MultimodalClassifier({"text": nn.Linear(5, 8), "image": image}, num_classes=3)
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
            if embedding_dims is None:
                embedding_dims = embedding_dims_of(encoders)
            sizes = as_sequence(embedding_dims, self.modalities, "embedding_dims")
            head = IIBalanceHead(dict(zip(self.modalities, sizes)), num_classes, **head_options)
        elif head_options:
            name = next(iter(head_options))
            raise TypeError(f"{name}: options of the head cannot be given together with a head")
        given = {
            "head": getattr(head, "modalities", None),
            "standardizer": getattr(standardizer, "shapes", None),
        }
        for what, names in given.items():
            if names is not None and tuple(names) != self.modalities:
                # Masks and embeddings go by order.
                raise ValueError(
                    f"{what}: expected the modalities {', '.join(self.modalities)} in this order, "
                    f"got {', '.join(names)}"
                )
        # A list: names need not be Python identifiers.
        self.encoders = nn.ModuleList(encoders[name] for name in self.modalities)
        self.head, self.standardizer = head, standardizer
        self.num_classes = head.num_classes
        self.class_names = class_names or [str(index) for index in range(self.num_classes)]

    def embed(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Embeddings of standardised inputs, M of [B, D_m]."""
        values = as_sequence(inputs, self.modalities, "inputs")
        return [encoder(rows) for encoder, rows in zip(self.encoders, values)]

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        progress: float = 1.0,
    ) -> HeadOutput:
        """The head's output for standardised inputs.

        Args:
            inputs: modality name -> [B, ...].
            targets: [B] int64, or None.
            mask: [B, M] bool, True = present.
            progress: in [0, 1]; see the head.
        """
        return self.head(self.embed(inputs), targets, mask=mask, progress=progress)

    def keys_of(self, index: int) -> set[str]:
        """Names, in the state dict, of what belongs to modality ``index`` alone.

        Its encoder and what the head keeps for it (``head.keys_of``, where it has such a method).
        """
        encoder = (f"encoders.{index}.{name}" for name in self.encoders[index].state_dict())
        keys_of = getattr(self.head, "keys_of", lambda index: [])
        return {*encoder, *(f"head.{name}" for name in keys_of(index))}

    @torch.inference_mode()
    def predict(
        self,
        batch: Mapping[str, Tensor | np.ndarray],
        mask: Tensor | np.ndarray | None = None,
        *,
        batch_size: int = BATCH_SIZE,
    ) -> Prediction:
        """Probabilities, fusion weights and uncertainty of raw inputs, as they stand in the data.

        Standardisation is part of the model. The model is put in evaluation mode for the call and
        back afterwards.

        Args:
            batch: modality name -> [N, ...] array or tensor. A modality left out is missing in
                every sample; its column of ``mask`` is ignored.
            mask: [N, M] bool, True = present; all present by default. Rows of a missing modality
                may hold anything, NaN included.
            batch_size: samples a step, to bound memory.

        Raises :class:`~iibalance.errors.InputError` for unknown names, differing lengths, NaN or
        infinite values and samples with no modality.
        """
        inputs, mask = self._check_batch(batch, mask)
        if not len(mask):
            raise InputError("batch: holds no samples")
        outputs = []
        for _, embeddings, present in in_batches(
            self, inputs, mask, batch_size=batch_size, raw=True
        ):
            out = self.head.fuse(embeddings, present)
            columns = (out.logits.float().softmax(-1), out.weights, out.uncertainty)
            outputs.append([None if value is None else value.float().cpu() for value in columns])
        return Prediction(
            *(None if column[0] is None else torch.cat(column) for column in zip(*outputs))
        )

    def _check_batch(self, batch: Mapping, mask) -> tuple[dict[str, Tensor], Tensor]:
        names = ", ".join(self.modalities)
        unknown = [name for name in batch if name not in self.modalities]
        if unknown:
            raise InputError(f"batch: {unknown[0]!r} is none of this model's modalities ({names})")
        given = {name: torch.as_tensor(batch[name]) for name in self.modalities if name in batch}
        if not given:
            raise InputError(f"batch: expected at least one of the modalities {names}")
        lengths = {name: len(values) for name, values in given.items()}
        if len(set(lengths.values())) > 1:
            sizes = ", ".join(f"{name}: {size}" for name, size in lengths.items())
            raise InputError(f"batch: modalities differ in length ({sizes})")
        shape = next(iter(lengths.values())), len(self.modalities)
        mask = torch.ones(shape) if mask is None else torch.as_tensor(mask)
        mask = mask.bool().clone()
        if mask.shape != shape:
            raise InputError(
                f"mask: has shape {list(mask.shape)}, expected {list(shape)} ({names})"
            )
        inputs = {
            name: self._check_modality(name, given.get(name), mask[:, index])
            for index, name in enumerate(self.modalities)
        }
        if not mask.any(1).all():
            row = int((~mask.any(1)).nonzero()[0])
            raise InputError(f"mask: row {row} has no modality present; leave such samples out")
        return inputs, mask

    def _check_modality(self, name: str, values: Tensor | None, present: Tensor) -> Tensor:
        """Float inputs of one modality, missing rows finite; ``present`` [N] is cleared without."""
        shape = None if self.standardizer is None else tuple(self.standardizer.shapes[name])
        if values is None:
            if shape is None:
                raise InputError(
                    f"batch: {name} is not there; a model without a standardizer needs an array "
                    "of it (any values, with mask False)"
                )
            present.fill_(False)
            return torch.zeros(len(present), *shape)
        values = values.float()
        if shape is not None and tuple(values.shape[1:]) != shape:
            raise InputError(
                f"batch: {name} has samples of shape {tuple(values.shape[1:])}, "
                f"the model was trained on {shape}"
            )
        bad = ~torch.isfinite(values.flatten(1)).all(1)
        if (bad & present).any():
            row = int((bad & present).nonzero()[0])
            raise InputError(
                f"batch: {name} row {row} holds a NaN or infinite value; repair it or mask the row"
            )
        return values.masked_fill(bad.view(-1, *[1] * (values.dim() - 1)), 0.0)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode, and every part of it back in its own mode afterwards.

    A frozen encoder, say, stays in evaluation mode.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def in_batches(
    model: MultimodalClassifier,
    inputs: Mapping[str, Tensor],
    mask: Tensor,
    *,
    batch_size: int = BATCH_SIZE,
    raw: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
    """The embeddings of N samples, a batch at a time, by a model in evaluation mode.

    The one loop behind every prediction. Yields (rows, embeddings, mask): the slice of the samples,
    M of [B, D_m] and [B, M] on the model's device. Call it where no gradient is wanted: the
    caller's ``torch.no_grad()`` holds for what it does with the embeddings too.

    Args:
        inputs: modality name -> [N, ...], standardised; with ``raw`` the model's standardizer is
            applied first.
        mask: [N, M] bool, True = present.
        autocast: makes the encoders' context, such as ``accelerator.autocast``.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        for start in range(0, len(mask), batch_size):
            rows = slice(start, start + batch_size)
            present = mask[rows].to(device)
            part = {name: values[rows].to(device) for name, values in inputs.items()}
            if raw and model.standardizer is not None:
                part = model.standardizer.transform(part, present)
            with autocast():
                embeddings = model.embed(part)
            yield rows, embeddings, present


@torch.no_grad()
def embed_split(
    model: MultimodalClassifier, split: Split, batch_size: int = BATCH_SIZE
) -> list[Tensor]:
    """Embeddings (M of [N, D_m]) of a split by a model in evaluation mode, on its device."""
    batches = in_batches(model, split.inputs, split.mask, batch_size=batch_size)
    parts = [embeddings for _, embeddings, _ in batches]
    return [torch.cat(values).float() for values in zip(*parts)]


def encoder_size(encoder: nn.Module, sample: Tensor) -> int:
    """D of an encoder, from what it returns for a batch; InputError if that is not [B, D]."""
    with torch.no_grad(), evaluating(encoder):
        embedding = encoder(sample)
    if isinstance(embedding, Tensor) and embedding.dim() == 2 and len(embedding) == len(sample):
        return embedding.shape[1]
    found = list(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
    raise InputError(
        f"encoders: {type(encoder).__name__} returned {found} for a batch of {len(sample)}; "
        "an encoder must return [B, D]"
    )


def embedding_dims_of(encoders: Mapping[str, nn.Module]) -> dict[str, int]:
    """Modality name -> D_m: an encoder's ``embedding_dim``, or the size of its last Linear."""
    return {name: _embedding_dim(name, encoder) for name, encoder in encoders.items()}


def _embedding_dim(name: str, encoder: nn.Module) -> int:
    size = getattr(encoder, "embedding_dim", None)
    if isinstance(size, int):
        return size
    linears = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(
            f"embedding_dims: the size of {name}'s embedding cannot be told from its encoder; "
            f"give embedding_dims={{{name!r}: ...}}"
        )
    return linears[-1].out_features
