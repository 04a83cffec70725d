"""Zero mean and unit variance, with statistics that are part of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from iibalance.data.layouts import MAX_CHANNELS, check_layout, infer_layout
from iibalance.errors import InputError


class Standardizer(nn.Module):
    """Zero mean and unit variance per feature or channel of each modality.

    The statistics are those of the rows it was fitted on, the training split. They are taken over
    samples and over what a layout holds to be alike: per feature of a vector, per channel of a
    sequence (over its frames), of an image or of a video (over their pixels).

    The buffers ``mean_<modality>`` and ``std_<modality>``, float32, are the whole state, and the
    constructor's arguments tell their shapes: to read a saved one,
    ``Standardizer(shapes, layouts).load_state_dict(...)``. ``shapes[m]`` is the shape of one
    sample; layouts not given are inferred.

    >>> standardizer = Standardizer({"audio": (40, 26)})
    >>> standardizer.mean_audio.shape
    torch.Size([1, 26])
    >>> audio = 5 + 3 * torch.randn(100, 40, 26)
    >>> fitted = standardizer.fit({"audio": audio}, torch.ones(100, 1, dtype=torch.bool))
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
        """Set the statistics from ``inputs[m]`` [N, ...] where ``mask`` [N, M] is True.

        The inputs are of any real dtype. Returns itself.

        A feature that does not vary, or varies less than float32 can tell beside its mean (1e-6) or
        its neighbours (1e-9), gets std 1: dividing by rounding noise would turn the first unusual
        value into an enormous one.

        Raises InputError where a modality has no row at all.
        """
        for column, name in enumerate(self.shapes):
            rows = mask[:, column].nonzero().squeeze(1)
            if not len(rows):
                raise InputError(
                    f"{name}: missing in every training sample; leave this modality out"
                )
            held_mean, held_std = getattr(self, f"mean_{name}"), getattr(self, f"std_{name}")
            over = [0, *(1 + axis for axis, size in enumerate(held_mean.shape) if size == 1)]
            mean, std = _mean_and_std(inputs[name], rows, over)
            floor = torch.maximum(1e-6 * mean.abs(), 1e-9 * std.max())
            std = torch.where(std > floor.clamp_min(torch.finfo(torch.float32).tiny), std, 1.0)
            held_mean.copy_(mean)
            held_std.copy_(std)
        return self

    def transform(self, inputs: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Standardised float32 copies [N, ...] of ``inputs``, on their device.

        Rows that ``mask`` [N, M] says are missing may hold anything, NaN included; they become 0.
        """
        output = {}
        for column, name in enumerate(self.shapes):
            values = inputs[name].to(torch.float32, copy=True)
            values.sub_(getattr(self, f"mean_{name}")).div_(getattr(self, f"std_{name}"))
            values[~mask[:, column]] = 0.0
            output[name] = values
        return output


def statistic_shape(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    """Shape of the mean and std of samples of ``shape``, such that it broadcasts.

    It is 1 on each axis that is averaged over. Where the channels stand is found as the built-in
    encoders find it.

    >>> statistic_shape((3, 48, 48), "image"), statistic_shape((32, 20, 3), "sequence")
    ((3, 1, 1), (1, 20, 3))
    >>> statistic_shape((16, 30, 40), "video")
    (1, 1, 1)
    """
    shape = tuple(shape)
    check_layout(shape, layout)
    if layout == "vector":
        return shape
    if layout == "sequence":
        return (1, *shape[1:])
    first = 0 if layout == "image" else 1  # the axis of the channels where they come first
    if len(shape) < first + 3:
        return (1,) * len(shape)
    last = shape[first] > MAX_CHANNELS >= shape[first + 2]
    axis = first + 2 if last else first
    return tuple(size if index == axis else 1 for index, size in enumerate(shape))


def _mean_and_std(values: Tensor, rows: Tensor, over: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ``values[rows]`` over the axes ``over``, in float64.

    Both keep a sample's number of axes. They are summed in blocks of rows, without a float64 copy
    of everything.
    """
    count = len(rows) * math.prod(values.shape[axis] for axis in over[1:])

    def average(function: Callable[[Tensor], Tensor]) -> Tensor:
        blocks = (function(values[block].double()) for block in rows.split(1024))
        sums = (block.sum(over, keepdim=True) for block in blocks)
        return sum(sums, torch.zeros((), dtype=torch.float64))[0] / count

    mean = average(lambda block: block)
    return mean, average(lambda block: (block - mean).square()).sqrt()
