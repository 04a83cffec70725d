"""Zero mean and unit variance, with statistics that are part of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from iibalance.data.layouts import MAX_CHANNELS, check_layout, infer_layout
from iibalance.data.values import Values, each
from iibalance.errors import InputError

MAX_ID = 10_000_000  # token ids above are no row of a table of vectors that fits memory


class Standardizer(nn.Module):
    """Zero mean and unit variance per feature or channel of each modality.

    The statistics are those of the rows it was fitted on, the training split. They are taken over
    samples and over what a layout holds to be alike: per feature of a vector, per channel of a
    sequence (over its frames), of an image or of a video (over their pixels).

    Modalities that are ``off`` keep their numbers, as float32; bytes become numbers in [0, 1].
    Their statistics are kept all the same: they say how much is one standard deviation of noise
    (:meth:`scale`). Layout ``raw`` passes as it is, as float32, int64, uint8 or bool. Token ids
    beyond those seen in training become one more id.

    The buffers ``mean_<modality>`` and ``std_<modality>``, float32, are the whole state, and the
    constructor's arguments tell their shapes: to read a saved one,
    ``Standardizer(shapes, layouts).load_state_dict(...)``.

    Args:
        shapes: modality -> shape of one sample, or a dict of them by field.
        layouts: modality -> layout; inferred where not given.
        off: modalities that are not to be standardised.
        vocabularies: of ``tokens``: modality -> number of ids; :meth:`fit` counts them.
        kinds: modality -> the type its numbers had in training; :meth:`fit` notes it.
        columns: modality -> names of its columns in training, where it came from a table.

    >>> standardizer = Standardizer({"audio": (40, 26)})
    >>> standardizer.mean_audio.shape
    torch.Size([1, 26])
    >>> audio = 5 + 3 * torch.randn(100, 40, 26)
    >>> fitted = standardizer.fit({"audio": audio}, torch.ones(100, 1, dtype=torch.bool))
    >>> (standardizer.std_audio - 3).abs().max() < 0.5
    tensor(True)
    """

    def __init__(
        self,
        shapes: Mapping[str, Any],
        layouts: Mapping[str, str] | None = None,
        *,
        off: Collection[str] = (),
        vocabularies: Mapping[str, int] | None = None,
        kinds: Mapping[str, str] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ):
        super().__init__()
        self.shapes = {name: _as_shape(shape) for name, shape in shapes.items()}
        self.layouts = {
            name: (layouts or {}).get(name)
            or ("raw" if isinstance(shape, dict) else infer_layout(shape))
            for name, shape in self.shapes.items()
        }
        self.off = tuple(name for name in self.shapes if name in off)
        self.vocabularies = dict(vocabularies or {})
        self.kinds = dict(kinds or {})
        self.columns = {
            name: [str(column) for column in its] for name, its in (columns or {}).items()
        }
        for name, shape in self.shapes.items():
            if self.has_statistics(name):
                statistic = statistic_shape(shape, self.layouts[name])
                self.register_buffer(f"mean_{name}", torch.zeros(statistic))
                self.register_buffer(f"std_{name}", torch.ones(statistic))

    def applies_to(self, name: str) -> bool:
        """Whether a modality is standardised."""
        return name not in self.off and self.layouts[name] not in ("tokens", "raw")

    def has_statistics(self, name: str) -> bool:
        """Whether the mean and std of a modality are kept, applied or not."""
        return self.layouts[name] != "tokens" and not isinstance(self.shapes[name], dict)

    def scale(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Modality -> one standard deviation of what :meth:`transform` gives, where that is not 1.

        That is where numbers are not standardised. It broadcasts to a sample, and is 0 where
        nothing varies.
        """
        found = {}
        for name in self.shapes if names is None else names:
            if self.has_statistics(name) and not self.applies_to(name):
                std = getattr(self, f"std_{name}")
                bytes_off = self.kinds.get(name) == "uint8" and self.layouts[name] != "raw"
                found[name] = std / 255 if bytes_off else std
        return found

    def check_kind(self, name: str, values: Any) -> None:
        """InputError where ``values`` of a modality would be read otherwise than in training.

        Bytes that are not standardised are divided by 255, as pixels, and other numbers are not.

        >>> standardizer = Standardizer({"x": (2,)}, off=["x"], kinds={"x": "uint8"})
        >>> standardizer.check_kind("x", torch.ones(3, 2))
        Traceback (most recent call last):
            ...
        iibalance.errors.InputError: x: was trained on bytes (uint8), this is float32; give uint8
        """
        trained = self.kinds.get(name)
        if trained is None or self.applies_to(name) or self.layouts[name] in ("tokens", "raw"):
            return
        kind = kind_of(values)
        if "uint8" in (kind, trained) and kind != trained:
            called = {"uint8": "bytes (uint8)"}
            remedy = (
                trained if trained == "uint8" else f"{trained}, such as by .astype({trained!r})"
            )
            raise InputError(
                f"{name}: was trained on {called.get(trained, trained)}, "
                f"this is {called.get(kind, kind)}; give {remedy}"
            )

    def fit(self, inputs: Mapping[str, Values], mask: Tensor) -> Standardizer:
        """Set the statistics from ``inputs[m]`` [N, ...] where ``mask`` [N, M] is True.

        The inputs are of any real dtype. Returns itself.

        A feature that does not vary, or varies less than float32 can tell beside its mean (1e-6) or
        its neighbours (1e-9), gets std 1: dividing by rounding noise would turn the first unusual
        value into an enormous one. Where nothing is divided (``off``, floats of ``raw``) it gets 0.

        Raises InputError where a modality has no row at all, and for token ids below 0.
        """
        for column, name in enumerate(self.shapes):
            rows = mask[:, column].nonzero().squeeze(1)
            if not len(rows):
                raise InputError(
                    f"{name}: missing in every training sample; leave this modality out"
                )
            values = cast(Tensor, inputs[name])
            self._note_kind(name, values)
            if self._is_measured(name):
                self._set(name, *_mean_and_std(values, rows, self._axes(name)))
            elif self.layouts[name] == "tokens":
                self.count_ids(name, values[rows])
        return self

    def fit_batches(self, batches: Iterable[tuple[Mapping[str, Values], Tensor]]) -> Standardizer:
        """As :meth:`fit`, from (inputs, mask) a batch at a time: for data that memory cannot hold.

        The moments are merged as Chan, Golub and LeVeque do (1979).
        """
        moments: dict[str, tuple[int, Tensor, Tensor]] = {}
        there = dict.fromkeys(self.shapes, 0)
        for inputs, mask in batches:
            for column, name in enumerate(self.shapes):
                rows = mask[:, column].nonzero().squeeze(1)
                there[name] += len(rows)
                if not len(rows):
                    continue
                values = cast(Tensor, inputs[name])
                self._note_kind(name, values)
                if self._is_measured(name):
                    fresh = _moments(values[rows].double(), self._axes(name))
                    moments[name] = _merged(moments[name], fresh) if name in moments else fresh
                elif self.layouts[name] == "tokens":
                    self.count_ids(name, values[rows])
        for name, count in there.items():
            if not count:
                raise InputError(
                    f"{name}: missing in every training sample; leave this modality out"
                )
        for name, (count, mean, squares) in moments.items():
            self._set(name, mean, (squares / count).sqrt())
        return self

    def _note_kind(self, name: str, values: Values) -> None:
        if isinstance(values, Tensor):
            self.kinds[name] = kind_of(values)

    def _is_measured(self, name: str) -> bool:
        """Whether statistics are to be taken: what is raw may be ids, which have none."""
        raw_ids = self.layouts[name] == "raw" and self.kinds.get(name) != "float32"
        return self.has_statistics(name) and not raw_ids

    def _axes(self, name: str) -> list[int]:
        """The axes of a batch that a modality's statistics are taken over."""
        held = getattr(self, f"mean_{name}")
        return [0, *(1 + axis for axis, size in enumerate(held.shape) if size == 1)]

    def _set(self, name: str, mean: Tensor, std: Tensor) -> None:
        floor = torch.maximum(1e-6 * mean.abs(), 1e-9 * std.max())
        varies = std > floor.clamp_min(torch.finfo(torch.float32).tiny)
        # Nothing is divided by the std of what is off: it only scales noise.
        std = torch.where(varies, std, 1.0 if self.applies_to(name) else 0.0)
        getattr(self, f"mean_{name}").copy_(mean)
        getattr(self, f"std_{name}").copy_(std)

    def count_ids(self, name: str, ids: Tensor) -> None:
        """Note the token ids [N, T] that training holds."""
        _check_ids(name, ids)
        if ids.max() > MAX_ID:
            raise InputError(
                f"{name}: holds the token id {ids.max().item()}, of a vocabulary too large for a "
                "table of vectors; number the tokens from 1 without gaps"
            )
        known = self.vocabularies.get(name, 1)
        self.vocabularies[name] = max(known, int(ids.max()) + 1)

    def transform(
        self, inputs: Mapping[str, Values], mask: Tensor, names: Sequence[str] | None = None
    ) -> dict[str, Values]:
        """What encoders are given: copies [N, ...] of ``inputs``, on their device.

        Standardised modalities are float32. Rows that ``mask`` [N, M] says are missing may hold
        anything, NaN included; they become 0. Its columns are ``names``, all by default.
        """
        output: dict[str, Values] = {}
        for column, name in enumerate(self.shapes if names is None else names):
            missing = ~mask[:, column]
            if self.applies_to(name):
                values = cast(Tensor, inputs[name]).to(torch.float32, copy=True)
                values.sub_(getattr(self, f"mean_{name}")).div_(getattr(self, f"std_{name}"))
                values[missing] = 0.0
                output[name] = values
            else:
                output[name] = each(lambda part: self._as_is(name, part, missing), inputs[name])
        return output

    def first_bad(self, inputs: Mapping[str, Values]) -> tuple[str, int] | None:
        """(modality, row) of the first standardised value that float32 cannot hold."""
        for name, values in inputs.items():
            if self.applies_to(name) and isinstance(values, Tensor):
                bad = ~values.flatten(1).isfinite().all(1)
                if bad.any():
                    return name, int(bad.nonzero()[0])
        return None

    def _as_is(self, name: str, values: Tensor, missing: Tensor) -> Tensor:
        if self.layouts[name] == "tokens":
            values = values.masked_fill(missing.view(-1, *[1] * (values.dim() - 1)), 0)
            _check_ids(name, values)
            return values.long().clamp_(max=self.vocabularies[name])
        if self.layouts[name] != "raw":  # numbers, whatever their type; bytes are pixels
            pixels = values.dtype == torch.uint8
            values = values.to(torch.float32, copy=True)
            values = values.div_(255) if pixels else values
        elif values.dtype not in (torch.uint8, torch.bool):
            number = values.is_floating_point()
            values = values.to(torch.float32 if number else torch.int64, copy=True)
        else:
            values = values.clone()
        values[missing] = 0
        return values


def kind_of(values: Any) -> str:
    """What an encoder would be given of an array or tensor: float32, int64, uint8 or bool.

    >>> kind_of(torch.zeros(2, dtype=torch.float64)), kind_of(torch.zeros(2, dtype=torch.int16))
    ('float32', 'int64')
    """
    kind = str(values.dtype).removeprefix("torch.")
    if kind in ("uint8", "bool"):
        return kind
    return "float32" if "float" in kind else "int64"


def _check_ids(name: str, ids: Tensor) -> None:
    kind = str(ids.dtype).removeprefix("torch.")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(
            f"{name}: layout 'tokens' takes integers, and this is {kind}; convert it, such as "
            "with .astype(int), and tell what is missing by a mask"
        )
    if len(ids) and ids.min() < 0:
        raise InputError(
            f"{name}: holds the token id {ids.min().item()}; "
            "number tokens from 1, and give 0 for padding"
        )


def _as_shape(shape: Any) -> Any:
    if isinstance(shape, Mapping):
        return {field: tuple(sizes) for field, sizes in shape.items()}
    return tuple(shape)


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
    if layout == "raw":  # nothing is known of its axes
        return (1,) * len(shape)
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


def _moments(values: Tensor, over: list[int]) -> tuple[int, Tensor, Tensor]:
    """Count, mean and summed squares about the mean of ``values`` over the axes ``over``."""
    count = math.prod(values.shape[axis] for axis in over)
    mean = values.mean(over, keepdim=True)
    return count, mean[0], (values - mean).square().sum(over, keepdim=True)[0]


def _merged(
    one: tuple[int, Tensor, Tensor], other: tuple[int, Tensor, Tensor]
) -> tuple[int, Tensor, Tensor]:
    (n, mean, squares), (m, its, more) = one, other
    apart = its - mean
    total = n + m
    return total, mean + apart * (m / total), squares + more + apart.square() * (n * m / total)
