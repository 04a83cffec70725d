"""Built-in encoders, chosen by input shape.

They are small on purpose: good enough to train real data on two cores, plain enough to be read in a
minute.

Any ``nn.Module`` that maps [B, ...] to [B, D] serves just as well. A research model brings its own
encoder (``MultimodalClassifier({"audio": my_resnet, ...}, ...)``), and everything downstream stays
the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from iibalance.config import ModelConfig
from iibalance.data.layouts import check_layout, infer_layout
from iibalance.data.standardize import Standardizer
from iibalance.errors import InputError


def build_encoder(
    shape: Sequence[int],
    *,
    embedding_dim: int = ModelConfig.embedding_dim,
    width: int = ModelConfig.width,
    dropout: float = ModelConfig.dropout,
    layout: str | None = None,
    vocabulary: int | None = None,
) -> nn.Module:
    """The built-in encoder for samples of ``shape``: [B, *shape] float -> [B, embedding_dim].

    ``shape`` is without the batch dimension. ``layout`` is one of ``"vector"``, ``"sequence"``,
    ``"image"``, ``"video"`` and ``"tokens"`` ([B, T] int64, 0 = padding, below ``vocabulary``);
    None infers it from the shape, by the rules of :func:`iibalance.data.layouts.infer_layout`.
    ``width`` scales the hidden channels.

    Raises :class:`~iibalance.errors.InputError` for a layout that does not exist or does not fit
    the shape.

    >>> encoder = build_encoder((40, 26))  # a sequence: 40 frames of 26 features
    >>> encoder(torch.zeros(2, 40, 26)).shape
    torch.Size([2, 128])
    """
    shape = tuple(int(size) for size in shape)
    layout = layout or infer_layout(shape)
    if layout not in (*_BUILDERS, "tokens"):
        raise InputError(f"layout: {layout!r} is none of {', '.join(_BUILDERS)}, tokens")
    try:
        check_layout(shape, layout)
    except InputError:
        raise InputError(
            f"layout: {layout!r} does not fit samples of shape {shape}; "
            "choose another layout or bring your own encoder"
        ) from None
    if layout == "tokens":
        if vocabulary is None:
            raise InputError("vocabulary: layout 'tokens' needs the number of ids; give it")
        return TokenEncoder(shape, embedding_dim, width, dropout, vocabulary)
    return _BUILDERS[layout](shape, embedding_dim, width, dropout)


def builtin(name: str, model: ModelConfig, standardizer: Standardizer) -> Callable[[], nn.Module]:
    """A function that makes the built-in encoder of a modality, as its standardizer reads it."""
    return partial(
        build_encoder,
        standardizer.shapes[name],
        embedding_dim=model.embedding_dim,
        width=model.width,
        dropout=model.dropout,
        layout=standardizer.layouts[name],
        # One more than training saw: all ids that it did not see.
        vocabulary=standardizer.vocabularies.get(name, 0) + 1,
    )


class VectorEncoder(nn.Sequential):
    """An MLP of two layers with batch normalisation over [B, D].

    Anything else is flattened first.
    """

    def __init__(self, shape: tuple[int, ...], embedding_dim: int, width: int, dropout: float):
        features = int(torch.Size(shape).numel())
        super().__init__(
            nn.Flatten(),
            nn.Linear(features, 4 * width, bias=False),
            nn.BatchNorm1d(4 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
        )


class SequenceEncoder(nn.Module):
    """Three 1-D convolutions over [B, T, C], then mean and maximum over time.

    Each of the T frames of [B, T, J, C] is flattened first.
    """

    def __init__(self, shape: tuple[int, ...], embedding_dim: int, width: int, dropout: float):
        super().__init__()
        channels = int(torch.Size(shape[1:]).numel())
        self.convolutions = nn.Sequential(
            *_block(
                nn.Conv1d(channels, width, 5, padding=2, bias=False),
                nn.BatchNorm1d(width),
                nn.MaxPool1d(2, ceil_mode=True),
            ),
            *_block(
                nn.Conv1d(width, 2 * width, 5, padding=2, bias=False),
                nn.BatchNorm1d(2 * width),
                nn.MaxPool1d(2, ceil_mode=True),
            ),
            *_block(
                nn.Conv1d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm1d(2 * width)
            ),
        )
        self.project = _projection(4 * width, embedding_dim, dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.convolutions(inputs.flatten(2).transpose(1, 2))  # [B, 2 * width, T / 4]
        return self.project(torch.cat([hidden.mean(-1), hidden.amax(-1)], 1))


class TokenEncoder(nn.Sequential):
    """Learnt vectors of token ids [B, T], read as a sequence. Padding, id 0, is zero."""

    def __init__(
        self,
        shape: tuple[int, ...],
        embedding_dim: int,
        width: int,
        dropout: float,
        vocabulary: int,
    ):
        vectors = nn.Embedding(vocabulary, 2 * width, padding_idx=0)
        with torch.no_grad():
            vectors.weight[-1] = 0.0  # the ids that training has not seen: as good as padding
        super().__init__(
            vectors, SequenceEncoder((*shape, 2 * width), embedding_dim, width, dropout)
        )


class ImageEncoder(nn.Module):
    """Three 2-D convolutions over [B, C, H, W], then average pooling on a 2 x 2 grid.

    One channel [B, H, W] and channels last [B, H, W, C] are understood too.
    """

    def __init__(self, shape: tuple[int, ...], embedding_dim: int, width: int, dropout: float):
        super().__init__()
        self.channels_last = len(shape) == 3 and shape[0] > 4 >= shape[2]
        channels = 1 if len(shape) == 2 else shape[2] if self.channels_last else shape[0]
        half = max(width // 2, 1)
        self.convolutions = nn.Sequential(
            *_block(
                nn.Conv2d(channels, half, 5, padding=2, bias=False),
                nn.BatchNorm2d(half),
                nn.MaxPool2d(2, ceil_mode=True),
            ),
            *_block(
                nn.Conv2d(half, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.MaxPool2d(2, ceil_mode=True),
            ),
            *_block(
                nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
            ),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        # 65 against 102 ms a step of 32 images of 3 x 48 x 48 on one CPU thread.
        self.convolutions.to(memory_format=torch.channels_last)
        self.project = _projection(8 * width, embedding_dim, dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dim() == 3:
            inputs = inputs.unsqueeze(1)
        elif self.channels_last:
            inputs = inputs.movedim(-1, 1)
        return self.project(self.convolutions(inputs))


class VideoEncoder(nn.Module):
    """2-D convolutions over each frame of short clips [B, T, H, W], then 1-D ones over time.

    Channels may come first [B, T, C, H, W] or last [B, T, H, W, C].
    """

    def __init__(self, shape: tuple[int, ...], embedding_dim: int, width: int, dropout: float):
        super().__init__()
        self.channels_last = len(shape) == 4 and shape[1] > 4 >= shape[3]
        channels = 1 if len(shape) == 3 else shape[3] if self.channels_last else shape[1]
        first, second = max(width // 4, 1), max(width // 2, 1)
        self.frames = nn.Sequential(
            *_block(
                nn.Conv2d(channels, first, 5, stride=2, padding=2, bias=False),
                nn.BatchNorm2d(first),
                nn.MaxPool2d(2, ceil_mode=True),
            ),
            *_block(
                nn.Conv2d(first, second, 3, padding=1, bias=False),
                nn.BatchNorm2d(second),
                nn.AdaptiveAvgPool2d((3, 4)),
            ),
            nn.Flatten(),
        )
        # 0.10 against 0.14 s a step of 64 clips of 16 x 30 x 40 on one CPU thread.
        self.frames.to(memory_format=torch.channels_last)
        self.time = nn.Sequential(
            nn.Dropout(dropout),
            *_block(
                nn.Conv1d(12 * second, 2 * width, 3, padding=1, bias=False),
                nn.BatchNorm1d(2 * width),
                nn.MaxPool1d(2, ceil_mode=True),
            ),
            *_block(
                nn.Conv1d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm1d(2 * width)
            ),
        )
        self.project = _projection(4 * width, embedding_dim, dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dim() == 4:
            inputs = inputs.unsqueeze(2)
        elif self.channels_last:
            inputs = inputs.movedim(-1, 2)
        batch, frames = inputs.shape[:2]
        hidden = self.frames(inputs.flatten(0, 1))  # [B * T, 6 * width]
        hidden = hidden.unflatten(0, (batch, frames))
        hidden = self.time(hidden.transpose(1, 2))
        return self.project(torch.cat([hidden.mean(-1), hidden.amax(-1)], 1))


def _block(convolution: nn.Module, norm: nn.Module, *pool: nn.Module) -> tuple[nn.Module, ...]:
    return (convolution, norm, nn.ReLU(), *pool)


def _projection(features: int, embedding_dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(features, embedding_dim, bias=False),
        nn.BatchNorm1d(embedding_dim),
        nn.ReLU(),
    )


_BUILDERS = {
    "vector": VectorEncoder,
    "sequence": SequenceEncoder,
    "image": ImageEncoder,
    "video": VideoEncoder,
}
