"""What an encoder is asked: an embedding of its inputs, its size, and to be trained or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from iibalance.data.values import Values, count, each
from iibalance.errors import InputError


def encode(encoder: nn.Module, values: Values, present: Tensor | None = None) -> Tensor:
    """An encoder's embeddings [B, D] of a batch; fields are given by name.

    An output with a ``pooler_output``, as those of Hugging Face's encoders, stands for that.

    ``present`` [B] bool: the encoder sees these rows alone, and the others' embeddings are 0.
    """
    if present is not None and not bool(present.all()):
        rows = present.nonzero().squeeze(1)
        if not len(rows):  # one stand-in, for the size of what is 0
            with torch.no_grad(), evaluating(encoder):
                some = encode(encoder, each(lambda part: part[:1], values))
            return some.new_zeros(len(present), some.shape[1])
        # Twice where there is one: batch normalisation cannot train on one sample.
        seen = rows.repeat(2) if len(rows) == 1 else rows
        some = encode(encoder, each(lambda part: part[seen], values))[: len(rows)]
        return some.new_zeros(len(present), some.shape[1]).index_copy(0, rows, some)
    output = encoder(**values) if isinstance(values, dict) else encoder(values)
    if isinstance(output, Tensor):
        return output
    return getattr(output, "pooler_output", output)


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


def train_mode(model: nn.Module) -> None:
    """A ``MultimodalClassifier`` in training mode, but for parts of encoders that are frozen.

    A part whose parameters are all frozen stays in evaluation mode, as its norms and dropout
    should: it is not being trained.
    """
    model.train()
    for encoder in model.encoders:
        for part in encoder.modules():
            parameters = list(part.parameters())
            if parameters and not any(value.requires_grad for value in parameters):
                part.eval()


def encoder_size(encoder: nn.Module, sample: Values, name: str = "") -> int:
    """D of an encoder, from what it returns for a batch of samples.

    InputError where it cannot take them, or does not give [B, D]. ``name``: of its modality.
    """
    called = (
        f"encoders: {name}: {type(encoder).__name__}"
        if name
        else "encoders: " + type(encoder).__name__
    )
    try:
        with torch.no_grad(), evaluating(encoder):
            embedding = encode(encoder, sample)
    except Exception as error:  # whatever the user's own module raises
        reason = " ".join(str(error).split())[:160]
        form = (
            {k: list(v.shape) for k, v in sample.items()}
            if isinstance(sample, dict)
            else list(sample.shape)
        )
        raise InputError(
            f"{called} cannot take a batch of shape {form} ({type(error).__name__}: {reason}); "
            + (_type_remedy(sample, name or "name", reason) or _WANTED)
        ) from error
    if isinstance(embedding, Tensor) and embedding.dim() == 2 and len(embedding) == count(sample):
        return embedding.shape[1]
    found = list(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
    raise InputError(
        f"{called} returned {found} for a batch of {count(sample)}; an encoder must return [B, D]"
    )


_WANTED = "give an encoder that maps this modality's [B, ...] to [B, D]"


def _type_remedy(sample: Values, name: str, reason: str) -> str | None:
    """What to do where an encoder wants numbers and is given ids, or the other way round."""
    if not isinstance(sample, Tensor) or "type" not in reason:
        return None
    if sample.dtype == torch.int64:
        return (
            "integers are taken for ids: give floats (.astype('float32')), "
            f"or layouts={{{name!r}: 'vector'}}"
        )
    if sample.is_floating_point() and "indices" in reason:
        return "numbers and bytes are taken for features: give ids as .astype('int64')"
    return None


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
