"""MultimodalClassifier: named encoders and a head, and predictions in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from iibalance.data.dataset import Batch, Split
from iibalance.data.lazy import ArrayReader
from iibalance.data.samples import Samples, as_array
from iibalance.data.values import Values, each, is_numeric, shapes_of
from iibalance.errors import InputError, as_sequence, check_names
from iibalance.metrics import MAX_PLAYERS
from iibalance.nn.contributions import contributions
from iibalance.nn.encoding import embedding_dims_of, encode, encoder_size, evaluating
from iibalance.nn.head import HeadOutput, IIBalanceHead

BATCH_SIZE = 256  # samples a step where nothing is trained: bounds memory


class Prediction(NamedTuple):
    """What :meth:`MultimodalClassifier.predict` returns, on the CPU."""

    probabilities: Tensor  #: [B, K] float32
    #: [B, M] float32 in [0, 1], how far each modality was trusted; 0 where missing, None without a
    #: gate.
    trust: Tensor | None
    #: [B, M] float64 nats, what each modality adds to the log-odds of the class that is predicted
    #: (:func:`~iibalance.nn.contributions.contributions`); None for more than six modalities.
    contributions: Tensor | None
    uncertainty: Tensor | None  #: [B, M] float32 in [0, 1], normalised entropies of own predictions


class MultimodalClassifier(nn.Module):
    """One encoder a modality and a head over their embeddings.

    Args:
        encoders: modality name -> any module that maps [B, ...] to [B, D_m]. One whose input has
            several fields (``{"input_ids": ..., "attention_mask": ...}``) is given them by name.
        num_classes: K; ignored when ``head`` is given.
        embedding_dims: modality name -> D_m. Left out, it is read from each encoder's
            ``embedding_dim`` attribute or its last ``nn.Linear``.
        head: by default an :class:`~iibalance.nn.head.IIBalanceHead` (``head_options`` go to it).
        standardizer: applied by :meth:`predict` to raw inputs (:meth:`forward` takes standardised
            ones); None = inputs are used as they are.
        class_names: names of the K classes, for reports.
        base_rate: [K] each class's share of the training samples, which is what is predicted where
            nothing is known; equal shares by default.

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
        base_rate: Tensor | None = None,
        **head_options,
    ):
        super().__init__()
        self.modalities = check_names(encoders)
        for name, encoder in encoders.items():
            if not isinstance(encoder, nn.Module):
                raise InputError(
                    f"encoders: {name} is a {type(encoder).__name__}; give a torch.nn.Module"
                )
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
        if base_rate is None:
            base_rate = torch.full((self.num_classes,), 1 / self.num_classes)
        self.register_buffer("base_rate", base_rate.float())

    def embed(self, inputs: Mapping[str, Values], mask: Tensor | None = None) -> list[Tensor]:
        """Embeddings of standardised inputs, M of [B, D_m].

        What is no number (token ids, fields) has no neutral value to stand for a missing row, so
        its encoder sees the rows that ``mask`` [B, M] says are present, and the others are 0.
        """
        values = as_sequence(inputs, self.modalities, "inputs")
        embeddings = []
        sizes = list(getattr(self.head, "embedding_dims", {}).values())
        for index, (encoder, rows) in enumerate(zip(self.encoders, values)):
            present = None if mask is None or is_numeric(rows) else mask[:, index]
            if present is not None and sizes and not bool(present.any()):
                embeddings.append(torch.zeros(len(present), sizes[index], device=present.device))
            else:
                embeddings.append(encode(encoder, rows, present))
        return embeddings

    def forward(
        self,
        inputs: Mapping[str, Values],
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
        embeddings = self.embed(inputs, mask)
        return self.head(embeddings, targets, mask=mask, progress=progress)

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
        batch: Mapping[str, Any] | Samples,
        mask: Tensor | np.ndarray | None = None,
        *,
        batch_size: int = BATCH_SIZE,
    ) -> Prediction:
        """Probabilities, and what they rest on, of raw inputs as they stand in the data.

        Standardisation is part of the model. The model is put in evaluation mode for the call and
        back afterwards.

        Args:
            batch: modality name -> [N, ...] array or tensor, or whatever
                :class:`~iibalance.data.samples.Samples` takes. A modality left out is missing in
                every sample; its column of ``mask`` is ignored.
            mask: [N, M] bool, True = present; all present by default. Rows of a missing modality
                may hold anything, NaN included.
            batch_size: samples a step, to bound memory.

        Raises :class:`~iibalance.errors.InputError` for unknown names, differing lengths, NaN or
        infinite values and samples with no modality.
        """
        if next(self.parameters()).is_meta:
            raise InputError(
                "batch: the model is on the meta device and holds no numbers; "
                "model.to_empty(device=...) and load_state_dict first"
            )
        inputs, mask = self.check_batch(batch, mask)
        samples = Split(inputs, torch.zeros(len(mask), dtype=torch.int64), mask)
        outputs = []
        try:
            for _, embeddings, present in in_batches(self, samples.batches(batch_size), raw=True):
                out = self.head.fuse(embeddings, present)
                shares = None
                if len(self.modalities) <= MAX_PLAYERS:
                    shares = contributions(self.head, embeddings, present, self.base_rate)
                columns = (out.logits.float().softmax(-1), out.trust, shares, out.uncertainty)
                outputs.append([None if value is None else value.cpu() for value in columns])
        except InputError:
            raise
        except Exception:
            for name, encoder, its in zip(self.modalities, self.encoders, mask.T):
                if its.any():  # an encoder of the user's own may be to blame: it says so, by name
                    rows = its.nonzero().squeeze(1)[:64]
                    encoder_size(encoder, each(lambda part: part[rows], inputs[name]), name)
            raise
        return Prediction(
            *(None if column[0] is None else torch.cat(column) for column in zip(*outputs))
        )

    def check_batch(self, batch: Any, mask: Any = None) -> tuple[dict[str, Values], Tensor]:
        """Raw inputs of every modality in order, zeros for those left out, and the mask [N, M]."""
        names = ", ".join(self.modalities)
        given = batch.inputs if isinstance(batch, Samples) else batch
        if not isinstance(given, Mapping):
            raise InputError(
                f"batch: is a {type(batch).__name__}; give a dict of arrays by modality ({names})"
            )
        for name in given:
            if name not in self.modalities:
                raise InputError(f"batch: {name!r} is none of this model's modalities ({names})")
        there = [name for name in self.modalities if name in given]
        if not there:
            raise InputError(f"batch: expected at least one of the modalities {names}")
        columns = [self.modalities.index(name) for name in there]
        if mask is not None:
            mask = as_array(mask)
            if mask.ndim != 2 or mask.shape[1] != len(self.modalities):
                raise InputError(
                    f"mask: has shape {list(mask.shape)}, expected a row a sample and "
                    f"{len(self.modalities)} columns ({names})"
                )
            mask = mask[:, columns]
        if isinstance(batch, Samples):
            samples = batch.select(there)
            if self.standardizer is not None:  # tables go by the names that training saw
                samples = samples.in_order(self.standardizer.columns)
            samples = samples if mask is None else samples.with_mask(mask)
        else:
            samples = Samples(
                {name: given[name] for name in there}, mask=mask, key="batch: {}".format
            )
        if not len(samples):
            raise InputError("batch: holds no samples")
        present = torch.zeros(len(samples), len(self.modalities), dtype=torch.bool)
        present[:, columns] = torch.from_numpy(samples.mask)
        read = ArrayReader(samples.inputs)(range(len(samples)), there)
        inputs = {n: self._check_modality(n, read.get(n), present) for n in self.modalities}
        return inputs, present

    def _check_modality(self, name: str, values: Values | None, present: Tensor) -> Values:
        """Raw inputs of one modality, whose missing rows are finite."""
        shape = None if self.standardizer is None else self.standardizer.shapes[name]
        if values is None:
            if shape is None:
                raise InputError(
                    f"batch: {name} is not there; a model without a standardizer needs an array "
                    "of it (any values, with mask False)"
                )
            # Of what is no number no row is seen; integers say so, whatever the encoder takes.
            whole = self.standardizer.layouts[name] in ("tokens", "raw")
            kind = torch.int64 if whole else torch.float32
            if isinstance(shape, dict):
                sizes = shape.items()
                return {f: torch.zeros(len(present), *size, dtype=kind) for f, size in sizes}
            return torch.zeros(len(present), *shape, dtype=kind)
        if self.standardizer is not None:
            try:
                self.standardizer.check_kind(name, values)
            except InputError as error:
                raise InputError(f"batch: {error}") from None
        if shape is not None and shapes_of(values) != shape:
            raise InputError(
                f"batch: {name} has samples of shape {shapes_of(values)}, "
                f"the model was trained on {shape}"
            )
        return each(
            lambda part: part.nan_to_num(0.0, 0.0, 0.0) if part.is_floating_point() else part,
            values,
        )


def in_batches(
    model: MultimodalClassifier,
    batches: Iterable[Batch],
    *,
    raw: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
    """The embeddings of N samples, a batch at a time, by a model in evaluation mode.

    The one loop behind every prediction. Yields (rows, embeddings, mask): the slice of the samples,
    M of [B, D_m] and [B, M] on the model's device. Call it where no gradient is wanted: the
    caller's ``torch.no_grad()`` holds for what it does with the embeddings too.

    Args:
        batches: of ``Split.batches``, standardised; with ``raw`` the model's standardizer is
            applied first.
        autocast: makes the encoders' context, such as ``accelerator.autocast``.
    """
    device, start = next(model.parameters()).device, 0
    with evaluating(model):
        for batch in batches:
            rows = slice(start, start + len(batch.mask))
            start = rows.stop
            present = batch.mask.to(device)
            part = {
                name: each(lambda field: field.to(device), values)
                for name, values in batch.inputs.items()
            }
            if raw and model.standardizer is not None:
                part = model.standardizer.transform(part, present)
            with autocast():
                embeddings = model.embed(part, present)
            yield rows, embeddings, present


@torch.no_grad()
def embed_split(
    model: MultimodalClassifier, split: Split, batch_size: int = BATCH_SIZE
) -> list[Tensor]:
    """Embeddings (M of [N, D_m]) of a split by a model in evaluation mode, on its device."""
    parts = [embeddings for _, embeddings, _ in in_batches(model, split.batches(batch_size))]
    return [torch.cat(values).float() for values in zip(*parts)]
