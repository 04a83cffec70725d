"""The items of a ``torch.utils.data.Dataset``, read and checked one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from iibalance.data.arrays import as_array, is_absent
from iibalance.data.labels import check_labels, group_codes
from iibalance.data.values import Values, as_tensor, each
from iibalance.errors import InputError


class DatasetReader:
    """Rows of a dataset as raw inputs; a modality that an item lacks is 0.

    Args:
        dataset: gives ``(inputs by modality, target)``.
        called: what messages call it.
        like: one sample a modality, which all others must resemble; a scan fills it.
    """

    def __init__(self, dataset: Dataset, called: str, like: dict[str, Values]):
        self.dataset, self.called, self.like = dataset, called, like
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise self.error(
                f"a {type(dataset).__name__} gives no item by its number; "
                "give a Dataset with __getitem__ and __len__"
            )
        try:
            self.count = len(dataset)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            raise self.error(
                f"a {type(dataset).__name__} has no length; give its class a __len__"
            ) from None
        if not self.count:
            raise self.error("holds no samples")

    def error(self, text: str) -> InputError:
        """An InputError that begins with what this dataset is called."""
        return InputError(f"{self.called}: {text}")

    def __call__(self, rows: Sequence[int], names: Sequence[str]) -> dict[str, Values]:
        """Raw inputs of ``rows``: modality -> [B, ...]."""
        found: dict[str, list[Values]] = {name: [] for name in names}
        for row in rows:
            inputs, _ = self.item(row)
            for name in names:
                value = inputs.get(name)
                if value is None:
                    value = each(torch.zeros_like, self.like[name])
                found[name].append(self.checked(row, name, value))
        return {name: _stacked(values) for name, values in found.items()}

    def item(self, row: int) -> tuple[dict[str, Values | None], Any]:
        """(inputs by modality, target) of one row; a modality that it lacks is None or not there.

        InputError where it is something else.
        """
        found = self.dataset[row]
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            kind = type(found).__name__ + (f" of {len(found)}" if _is_row(found) else "")
            raise self.error(
                f"item {row} is a {kind}; "
                "a dataset must give (inputs, target), inputs a dict by modality"
            )
        inputs, target = found
        if not isinstance(inputs, Mapping) or not inputs:
            kind = "an empty dict" if isinstance(inputs, Mapping) else type(inputs).__name__
            raise self.error(
                f"the inputs of item {row} are {kind}; "
                "give a dict by modality, such as {'audio': ..., 'video': ...}"
            )
        return {name: self._tensors(row, name, value) for name, value in inputs.items()}, target

    def checked(self, row: int, name: str, value: Values) -> Values:
        """``value`` with the shapes and types of the modality's other samples, or InputError."""
        like = self.like.setdefault(name, value)
        fits = isinstance(value, dict) == isinstance(like, dict)
        if isinstance(value, dict) and isinstance(like, dict):
            fits = value.keys() == like.keys() and all(
                _fits(value[field], like[field]) for field in like
            )
            if fits:
                return {field: value[field].to(like[field].dtype) for field in like}
        elif fits and _fits(value, like):  # type: ignore[arg-type]
            return value.to(like.dtype)  # type: ignore[union-attr]
        raise self.error(
            f"{name} of item {row} has {_form(value)}, others {_form(like)}; "
            "bring samples to one shape and type, such as by cutting or padding"
        )

    def is_present(self, row: int, name: str, value: Values) -> bool:
        """False where a value is NaN alone: missing. InputError where it is NaN in part."""
        if isinstance(value, dict):
            for field, part in value.items():
                self._check_finite(row, f"{name}.{field}", part)
            return True
        if value.is_floating_point() and bool(value.isnan().all()):
            return False
        self._check_finite(row, name, value)
        return True

    def _check_finite(self, row: int, called: str, value: Tensor) -> None:
        if value.is_floating_point():
            bad = ~value.isfinite()
            if bool(bad.any()):
                raise self.error(
                    f"{called} of item {row} holds {value[bad][0].item()}; "
                    "clean it, or give None for this modality"
                )

    def _tensors(self, row: int, name: str, value: Any) -> Values | None:
        called = f"{self.called}: {name} of item {row}"
        if is_absent(value):
            return None
        if isinstance(value, Mapping):
            if not value:
                raise InputError(f"{called}: holds no field; give at least one array, or None")
            return {
                str(field): _tensor(part, f"{self.called}: {name}.{field} of item {row}")
                for field, part in value.items()
            }
        return _tensor(value, called)


class Scan:
    """What one pass over a dataset learns: labels, mask [N, M] and groups.

    Args:
        reader: of the dataset.
        names: the modalities.
        chosen: whether items may hold others too.
    """

    def __init__(self, reader: DatasetReader, names: Sequence[str], chosen: bool):
        count, labels = reader.count, []
        self.mask = torch.zeros(count, len(names), dtype=torch.bool)
        for row in range(count):
            inputs, target = reader.item(row)
            unknown = [name for name in inputs if name not in names]
            if unknown and not chosen:
                raise reader.error(
                    f"item {row} has {unknown[0]!r}, which is none of the first item's modalities "
                    f"({', '.join(names)}); name them alike, give None for it in the first item, "
                    "or choose some with data.modalities"
                )
            for column, name in enumerate(names):
                value = inputs.get(name)
                if value is not None:
                    value = reader.checked(row, name, value)
                    self.mask[row, column] = reader.is_present(row, name, value)
            if not self.mask[row].any():
                raise reader.error(f"item {row} has none of {', '.join(names)}; leave it out")
            labels.append(_label(target))
        self.labels = check_labels(labels, count, reader.error, "target")
        groups = _groups_of(reader.dataset)
        self.groups = None if groups is None else group_codes(groups, count, reader.error)


def _tensor(value: Any, called: str) -> Tensor:
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex():
        return as_tensor(value).cpu()
    array = as_array(value, called)
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{called}: dtype {array.dtype} is not a real number; give integers or floats"
        )
    return as_tensor(array)


def _stacked(values: list[Values]) -> Values:
    first = values[0]
    if isinstance(first, dict):
        fields = cast(list[dict[str, Tensor]], values)
        return {field: torch.stack([value[field] for value in fields]) for field in first}
    return torch.stack(values)  # type: ignore[arg-type]


def _fits(value: Tensor, like: Tensor) -> bool:
    """Integers may stand for floats: a list of numbers may happen to hold whole ones."""
    return value.shape == like.shape and (value.dtype == like.dtype or like.is_floating_point())


def _form(value: Values) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{field}: {_form(part)}" for field, part in value.items())
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _label(target: Any) -> Any:
    """A label as Python has it; several of them (one-hot) stay an array, to be refused."""
    if not hasattr(target, "item"):
        return target
    array = as_array(target, "target")
    return array.item() if array.size == 1 else array


def _groups_of(dataset: Any) -> Any:
    """``dataset.groups``, also through the ``Subset`` that ``random_split`` makes."""
    groups = getattr(dataset, "groups", None)
    if groups is None and isinstance(dataset, Subset):
        groups = _groups_of(dataset.dataset)
        if groups is not None:
            groups = as_array(groups, "groups")[list(dataset.indices)]
    return groups


def _is_row(value: Any) -> bool:
    return isinstance(value, (tuple, list))
