"""What every source of data gives: batches, splits, and one standardisation fitted on the training split.

Modalities keep one order everywhere: the keys of ``inputs`` and the columns of ``mask`` are the modalities in that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from iibalance.errors import InputError

Layout = Literal["vector", "sequence", "image", "video"]
LAYOUT_DIMENSIONS = {
    "vector": None,
    "sequence": (2, 3, 4),
    "image": (2, 3),
    "video": (3, 4),
}  # None: any number, flattened
MAX_CHANNELS = 4  # an axis of 1 to 4 may be colour channels; a longer one is not taken for them


class Batch(NamedTuple):
    """B samples of every modality.

    ``inputs[m]`` is [B, ...] float32, standardised, zero where missing; ``targets`` [B] int64;
    ``mask`` [B, M] bool, True where the modality is present, columns in the order of ``inputs``.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    mask: Tensor
    index: Tensor | None = None  #: [B] row numbers in the split, where the batch was taken from one


@dataclass(eq=False)
class Split(torch.utils.data.Dataset):
    """The N samples of one split, in memory. Same fields as :class:`Batch`, plus ``groups`` [N] int64 or None.

    ``__getitems__`` serves a whole batch with one gather per modality: give a ``DataLoader`` ``collate_fn=identity``.

    >>> split = Split({"a": torch.arange(6.).view(3, 2)}, torch.tensor([0, 1, 0]), torch.ones(3, 1, dtype=torch.bool))
    >>> loader = torch.utils.data.DataLoader(split, batch_size=2, collate_fn=identity)
    >>> [batch.targets.tolist() for batch in loader]
    [[0, 1], [0]]
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    mask: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Batch:
        """One sample, without the batch dimension: ``default_collate`` makes a :class:`Batch` of a list of them."""
        return Batch(
            {name: values[index] for name, values in self.inputs.items()},
            self.targets[index],
            self.mask[index],
            torch.tensor(index),
        )

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at ``indices`` [B] as one :class:`Batch` (a copy)."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        return Batch(
            {name: values[rows] for name, values in self.inputs.items()},
            self.targets[rows],
            self.mask[rows],
            rows,
        )

    def subset(self, indices: Sequence[int] | Tensor | np.ndarray) -> Split:
        """A new split of the samples at ``indices``, in that order (integer indices or a bool [N]; a copy)."""
        rows = torch.as_tensor(indices)
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows.long()
        return Split(
            *self.__getitems__(rows)[:3], None if self.groups is None else self.groups[rows]
        )

    def batch(self) -> Batch:
        """Everything as one :class:`Batch` (views, no copy)."""
        return Batch(dict(self.inputs), self.targets, self.mask)


def identity(batch: Any) -> Any:
    """The ``collate_fn`` for a :class:`Split`: what ``__getitems__`` gives is a batch already. A function: workers can pickle it."""
    return batch


class Standardizer(nn.Module):
    """Zero mean and unit variance per feature or channel, with the statistics of the rows it was fitted on (the training split).

    Statistics are taken over samples, and over what a layout holds to be alike: per feature of a vector, per channel of a
    sequence (over its frames), image or video (over their pixels). Buffers ``mean_<modality>`` and ``std_<modality>``, float32, are the
    whole state, and the constructor tells their shapes: read a saved one with ``Standardizer(shapes, layouts).load_state_dict(...)``.
    ``shapes[m]`` is the shape of one sample; layouts not given are inferred.

    >>> standardizer = Standardizer({"audio": (40, 26)})
    >>> standardizer.mean_audio.shape
    torch.Size([1, 26])
    >>> fitted = standardizer.fit({"audio": 5 + 3 * torch.randn(100, 40, 26)}, torch.ones(100, 1, dtype=torch.bool))
    >>> (standardizer.std_audio - 3).abs().max() < 0.5
    tensor(True)
    """

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], layouts: Mapping[str, str] | None = None
    ):
        super().__init__()
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.layouts = {
            name: (layouts or {}).get(name) or infer_layout(shape)
            for name, shape in self.shapes.items()
        }
        for name, shape in self.shapes.items():
            statistic = statistic_shape(shape, self.layouts[name])
            self.register_buffer(f"mean_{name}", torch.zeros(statistic))
            self.register_buffer(f"std_{name}", torch.ones(statistic))

    def fit(self, inputs: Mapping[str, Tensor], mask: Tensor) -> Standardizer:
        """Set the statistics from ``inputs[m]`` [N, ...] (any real dtype) where ``mask`` [N, M] is True; returns itself.

        A feature that does not vary, or varies less than float32 can tell beside its mean (1e-6) or its neighbours (1e-9), gets std 1:
        dividing by rounding noise would turn the first unusual value into an enormous one. InputError where a modality has no row at all.
        """
        for column, name in enumerate(self.shapes):
            rows = mask[:, column].nonzero().squeeze(1)
            if not len(rows):
                raise InputError(
                    f"{name}: missing in every training sample; leave this modality out"
                )
            shape = getattr(self, f"mean_{name}").shape
            over = [0] + [1 + axis for axis, size in enumerate(shape) if size == 1]
            chunks = [
                rows[start : start + 1024] for start in range(0, len(rows), 1024)
            ]  # float64 sums without a float64 copy of everything
            count = len(rows) * int(torch.Size(self.shapes[name]).numel()) // max(shape.numel(), 1)
            mean = (
                sum(inputs[name][chunk].double().sum(over, keepdim=True) for chunk in chunks)[0]
                / count
            )
            variance = (
                sum(
                    (inputs[name][chunk].double() - mean).square().sum(over, keepdim=True)
                    for chunk in chunks
                )[0]
                / count
            )
            std = variance.sqrt()
            floor = torch.maximum(1e-6 * mean.abs(), 1e-9 * std.max())
            std = torch.where(std > floor.clamp_min(torch.finfo(torch.float32).tiny), std, 1.0)
            getattr(self, f"mean_{name}").copy_(mean)
            getattr(self, f"std_{name}").copy_(std)
        return self

    def transform(self, inputs: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Standardised float32 copies [N, ...], on the inputs' device; rows that ``mask`` [N, M] says are missing (perhaps NaN) are 0."""
        output = {}
        for column, name in enumerate(self.shapes):
            values = inputs[name].to(torch.float32, copy=True)
            values.sub_(getattr(self, f"mean_{name}")).div_(getattr(self, f"std_{name}"))
            values[~mask[:, column]] = 0.0
            output[name] = values
        return output


@dataclass(eq=False)
class MultimodalData:
    """A data set ready to train on: three standardised splits and what an encoder must know of each modality.

    ``shapes[m]`` is the shape of one sample as the source gave it, ``layouts[m]`` how to read it. ``standardizer`` was fitted on ``train``.
    """

    name: str
    modalities: tuple[str, ...]
    num_classes: int
    class_names: list[str]
    train: Split
    validation: Split
    test: Split
    standardizer: Standardizer
    shapes: dict[str, tuple[int, ...]]
    layouts: dict[str, str]


def infer_layout(shape: Sequence[int], dtype: Any = None) -> Layout:
    """How to read one sample of ``shape`` (without the batch dimension); ``dtype`` (numpy or torch) settles one doubt.

    ======================== ==========================================================================================
    [D]                      vector
    [A, A]                   image (one channel)
    [T, C]                   sequence of T frames with C features
    [C, H, W], C in 1..4     image, channels first
    [A, B, C], C in 1..4     image, channels last, if ``dtype`` is an integer type or A = B; else a sequence of A frames of
                             B points with C coordinates (skeletons)
    [T, H, W]                video of one channel (no axis of 1..4 at either end)
    [T, C, H, W], [T, H, W, C]  video, C in 1..4
    ======================== ==========================================================================================

    InputError for anything else (0 or more than 4 dimensions, an empty one, channels at both ends or at neither):
    pass the layout yourself (``layouts={"name": "image"}``), or bring your own encoder.

    >>> infer_layout((40, 26)), infer_layout((28, 28)), infer_layout((16, 30, 40))
    ('sequence', 'image', 'video')
    >>> infer_layout((32, 20, 3)), infer_layout((32, 20, 3), "uint8")
    ('sequence', 'image')
    """
    shape = tuple(int(size) for size in shape)
    channels = [1 <= size <= MAX_CHANNELS for size in shape]
    if not shape or min(shape) < 1:
        raise InputError(
            f"a sample of shape {shape} holds nothing to encode; give every sample at least one feature"
        )
    if len(shape) == 1:
        return "vector"
    if len(shape) == 2:
        return "image" if shape[0] == shape[1] else "sequence"
    if len(shape) == 3:
        if channels[0] and (not channels[2] or shape[1] == shape[2]):
            return "image"
        if channels[2] and not channels[0]:
            return "image" if _is_integer(dtype) or shape[0] == shape[1] else "sequence"
        if not channels[2]:
            return "video"
    if len(shape) == 4 and channels[1] != channels[3]:
        return "video"
    raise InputError(
        f"a sample of shape {shape} can be read in more than one way; pass its layout "
        f"({', '.join(LAYOUT_DIMENSIONS)}) or bring your own encoder"
    )


def check_layout(shape: Sequence[int], layout: str) -> None:
    """InputError unless ``layout`` exists and fits the number of dimensions of a sample of ``shape``.

    >>> check_layout((40, 26), "sequence")
    """
    if layout not in LAYOUT_DIMENSIONS:
        raise InputError(f"layout {layout!r} is none of {', '.join(LAYOUT_DIMENSIONS)}")
    allowed = LAYOUT_DIMENSIONS[layout]
    if allowed and len(shape) not in allowed:
        raise InputError(
            f"layout {layout!r} takes samples of {' or '.join(map(str, allowed))} dimensions, not of shape {tuple(shape)}"
        )


def statistic_shape(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    """Shape of the mean and std of samples of ``shape``: 1 on each axis that is averaged over, so that it broadcasts.

    >>> statistic_shape((3, 48, 48), "image"), statistic_shape((32, 20, 3), "sequence"), statistic_shape((16, 30, 40), "video")
    ((3, 1, 1), (1, 20, 3), (1, 1, 1))
    """
    shape = tuple(shape)
    check_layout(shape, layout)
    if layout == "vector":
        return shape
    if layout == "sequence":
        return (1, *shape[1:])
    first = (
        0 if layout == "image" else 1
    )  # where channels stand when they come first; as the built-in encoders read them
    if len(shape) < first + 3:
        return (1,) * len(shape)
    last = shape[first] > MAX_CHANNELS >= shape[first + 2]
    axis = first + 2 if last else first
    return tuple(size if index == axis else 1 for index, size in enumerate(shape))


def _is_integer(dtype: Any) -> bool:
    if dtype is None:
        return False
    if isinstance(dtype, torch.dtype):
        return not (dtype.is_floating_point or dtype.is_complex)
    return np.dtype(dtype).kind in "iu"
