"""torch Datasets: what items may be, how they are split, and how many of them are held at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from iibalance import DataConfig, InputError, load_data
from iibalance.data import lazy, torch_dataset
from iibalance.data.lazy import LazySplit


class Clips(Dataset):
    """Items of a dict: audio [3] with the row's number, an image of bytes, text of two fields."""

    def __init__(self, count: int = 40, change=None, start: int = 0):
        self.count, self.change, self.start, self.reads = count, change, start, []

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        if not 0 <= row < self.count:
            raise IndexError(row)
        self.reads.append(row)
        number = row + self.start
        item = {
            "audio": np.full(3, number, np.float64),
            "image": np.full((4, 4), number % 256, np.uint8),
            "text": {"ids": torch.arange(5) + number, "mask": torch.ones(5, dtype=torch.bool)},
        }
        if number % 5 == 1:
            item["image"] = None
        if number % 5 == 2:
            del item["text"]
        if number % 5 == 3:
            item["audio"] = torch.full((3,), torch.nan)
        target = ["no", "yes"][number % 2]
        return (item, target) if self.change is None else self.change(row, item, target)


def _load(data, own=("text",), **options):
    return load_data(DataConfig(**options), data, own=own)


def test_one_dataset_is_split_and_read_as_it_stands():
    data = _load(Clips())
    assert data.modalities == ("audio", "image", "text") and data.class_names == ["no", "yes"]
    assert data.shapes == {"audio": (3,), "image": (4, 4), "text": {"ids": (5,), "mask": (5,)}}
    assert data.layouts == {"audio": "vector", "image": "image", "text": "raw"}
    assert [len(part) for part in (data.train, data.validation, data.test)] == [28, 4, 8]
    seen = []
    for part in (data.train, data.validation, data.test):
        rows = part.rows
        assert isinstance(part, LazySplit) and torch.equal(part.targets, rows % 2)
        assert part.mask[:, 0].tolist() == (rows % 5 != 3).tolist()
        assert part.mask[:, 1].tolist() == (rows % 5 != 1).tolist()
        assert part.mask[:, 2].tolist() == (rows % 5 != 2).tolist()
        inputs = part.batch().inputs
        raw = inputs["audio"] * data.standardizer.std_audio + data.standardizer.mean_audio
        torch.testing.assert_close(raw[part.mask[:, 0], 0], rows[part.mask[:, 0]].float())
        raw = inputs["image"] * data.standardizer.std_image + data.standardizer.mean_image
        torch.testing.assert_close(raw[part.mask[:, 1], 0, 0], rows[part.mask[:, 1]].float())
        there = part.mask[:, 2]
        assert torch.equal(inputs["text"]["ids"][there, 0], rows[there])
        assert inputs["text"]["ids"].dtype == torch.int64
        assert inputs["text"]["mask"].dtype == torch.bool and inputs["text"]["mask"][there].all()
        for column, values in enumerate((inputs["audio"], inputs["image"], inputs["text"]["ids"])):
            assert not values[~part.mask[:, column]].any()
        seen += rows.tolist()
    assert sorted(seen) == list(range(40))
    # Statistics are those of the training rows that are there.
    numbers = np.array([row for row in data.train.rows.tolist() if row % 5 != 3], np.float64)
    torch.testing.assert_close(data.standardizer.mean_audio[0].item(), numbers.mean())
    torch.testing.assert_close(
        data.standardizer.std_audio[0].item(), numbers.std(), rtol=1e-6, atol=1e-6
    )


def test_groups_of_a_dataset_share_no_split_also_through_a_subset():
    clips = Clips(60)
    clips.groups = [f"s{row // 6}" for row in range(60)]
    turned = list(range(59, 49, -1)) + list(range(50))
    for dataset, numbers in ((clips, range(60)), (Subset(clips, turned), turned)):
        data = _load(dataset)
        for part in (data.train, data.validation, data.test):
            assert part.groups.tolist() == [numbers[row] // 6 for row in part.rows.tolist()]
        groups = [set(p.groups.tolist()) for p in (data.train, data.validation, data.test)]
        assert all(groups) and sum(map(len, groups)) == len(set.union(*groups)) == 10


def test_a_dict_of_datasets_keeps_its_parts():
    parts = {"test": Clips(10, start=202), "train": Clips(30), "validation": Clips(12, start=100)}
    data = _load(parts)
    first = {name: getattr(data, name).batch().targets[:2].tolist() for name in parts}
    assert first == {"test": [0, 1], "train": [0, 1], "validation": [0, 1]}
    assert [len(p) for p in (data.train, data.validation, data.test)] == [30, 12, 10]
    ids = data.test.batch().inputs["text"]["ids"][:, 0].tolist()
    assert ids == [0, 203, 204, 205, 206, 0, 208, 209, 210, 211]
    # Without a validation part, a fifth of the training samples.
    del parts["validation"]
    data = _load(parts)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [24, 6, 10]
    assert set(data.train.rows.tolist()).isdisjoint(data.validation.rows.tolist())
    assert len(_load(parts, train_fraction=0.5).train) == 12
    parts["validation"] = Clips(12)
    assert len(_load(parts, train_fraction=0.5).train) == 15


def test_modalities_are_chosen_and_others_are_left_alone():
    data = _load(Clips(), modalities="image,audio", own=())
    assert data.modalities == ("image", "audio") and list(data.train.batch().inputs) == [
        "image",
        "audio",
    ]


def test_bytes_are_pixels_in_0_to_1_where_they_are_not_standardised():
    data = _load(Clips(), standardize=["audio"])
    batch, rows = data.train.batch(), data.train.rows
    there = batch.mask[:, 1]
    torch.testing.assert_close(batch.inputs["image"][there, 0, 0], rows[there] / 255)
    assert abs(batch.inputs["audio"].mean()) < 1e-5


def test_a_trained_model_standardises_another_dataset():
    first = _load(Clips())
    other = load_data(
        DataConfig(),
        Clips(start=100),
        own=("text",),
        standardizer=first.standardizer,
        classes=first.class_names,
    )
    assert other.standardizer is first.standardizer
    audio, rows = other.test.batch().inputs["audio"][:, 0], other.test.rows
    wanted = (100 + rows - first.standardizer.mean_audio[0]) / first.standardizer.std_audio[0]
    torch.testing.assert_close(audio[other.test.mask[:, 0]], wanted[other.test.mask[:, 0]])
    with pytest.raises(InputError, match="data has the modalities audio, image, the run aud"):
        load_data(DataConfig(modalities="audio,image"), Clips(), standardizer=first.standardizer)


def test_no_more_than_a_chunk_is_held_and_each_item_is_read_as_often_as_needed(monkeypatch):
    most = []

    def counting(self, rows, names, read=torch_dataset.DatasetReader.__call__):
        most.append(len(rows))
        return read(self, rows, names)

    monkeypatch.setattr(torch_dataset.DatasetReader, "__call__", counting)
    monkeypatch.setattr(lazy, "CHUNK", 8)
    clips = Clips()
    data = _load(clips)
    # Once for targets and what is missing (and the first item for the names), once more for the
    # statistics of the training rows, and never more than 8 of them together.
    assert sorted(clips.reads) == sorted([0, *range(40), *data.train.rows.tolist()])
    assert most == [8, 8, 8, 4]
    clips.reads.clear(), most.clear()
    for batch in data.train.batches(5):
        assert len(clips.reads) <= sum(most) and len(batch.targets) <= 5
    assert clips.reads == data.train.rows.tolist() and most == [5] * 5 + [3]


def _item(**changes):
    """An item of row 7 that is different: keys changed, or left out where the change is None."""

    def change(row, item, target):
        if row == 7:
            item = {**item, **changes}
            item = {name: value for name, value in item.items() if value is not ...}
        return item, target

    return change


def _instead(other):
    return lambda row, item, target: other if row == 7 else (item, target)


def _target(other):
    return lambda row, item, target: (item, other if row == 7 else target)


@pytest.mark.parametrize(
    "change, message",
    [
        (_instead(3), r"data: item 7 is a int; a dataset must give \(inputs, target\)"),
        (_instead((1, 2, 3)), "data: item 7 is a tuple of 3; a dataset must give"),
        (_instead({"audio": 1}), "data: item 7 is a dict; a dataset must give"),
        (_instead((np.ones(3), 1)), "the inputs of item 7 are ndarray; give a dict by modality"),
        (_instead(({}, 1)), "the inputs of item 7 are an empty dict; give a dict by modality"),
        (
            _item(video=np.ones(3)),
            "item 7 has 'video', .* first item's modalit.* give None for it in the first item",
        ),
        (
            _item(audio=np.ones(4)),
            r"audio of item 7 has float32 of shape \(4,\), others float32 of",
        ),
        (
            _item(audio={"x": np.ones(3)}),
            r"audio of item 7 has x: .*others float32 of shape \(3,\)",
        ),
        (_item(text=np.ones(5)), "text of item 7 has float32 .*, others ids: int64 of shape"),
        (_item(text={"ids": np.ones(5, int)}), "text of item 7 has ids: .*, others ids: .*, mask:"),
        (
            _item(text={"ids": np.ones(5), "mask": np.ones(5, bool)}),
            "text of item 7 has ids: float32 of shape .5,., mask: bool.*, others ids: int64",
        ),
        (_item(text={}), "text of item 7: holds no field; give at least one array, or None"),
        (_item(audio=[1, np.nan, 2]), "data: audio of item 7 holds nan; clean it, or give None"),
        (_item(audio=[1, np.inf, 2]), "data: audio of item 7 holds inf; clean it, or give None"),
        (_item(audio=[1, 1e300, 2]), "data: audio of item 7 holds inf; clean it"),
        (_item(audio=["a", "b", "c"]), "audio of item 7: dtype <U1 is not a real number"),
        (_item(audio=[1j, 2, 3]), "audio of item 7: dtype complex128 is not a real number"),
        (_item(audio=torch.tensor([1j, 2, 3])), "audio of item 7: dtype complex64 is not a real"),
        (_item(audio=[[1], [2, 3]]), "audio of item 7: its 2 entries differ in shape"),
        (_item(audio=torch.eye(3).to_sparse()), "audio of item 7: is sparse; give a dense tensor"),
        (_item(audio=None, image=None, text=None), "item 7 has none of audio, image, text; leave"),
        (_target(None), "data: target: row 7 holds None; give every sample a class"),
        (_target(3), "data: target: mixes int and str; give labels of one kind"),
        (
            lambda row, item, target: (item, np.eye(2)[row % 2]),
            "data: target: has shape .40, 2.; several targets a sample",
        ),
        (lambda row, item, target: (item, row / 3), "target: row 1 holds 0.333.*: regression"),
        (lambda row, item, target: (item, 1), "data: target: holds only class 1"),
        (lambda row, item, target: ({3: item["audio"]}, target), "3 cannot name a modality"),
    ],
)
def test_items_that_are_something_else_are_one_line(change, message):
    with pytest.raises(InputError, match=message) as caught:
        _load(Clips(change=change))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


class _Stream(IterableDataset):
    def __iter__(self):
        yield {"a": torch.ones(2)}, 0


class _NoLength(Dataset):
    def __getitem__(self, row):
        return {"a": torch.ones(2)}, 0


@pytest.mark.parametrize(
    "data, options, message",
    [
        (Clips(0), {}, "data: holds no samples"),
        (_Stream(), {}, "data: a _Stream gives no item by its number; give a Dataset with __geti"),
        (_NoLength(), {}, "data: a _NoLength has no length; give its class a __len__"),
        ({"train": Clips()}, {}, "data: there is no 'test'; give at least 'train' and 'test'"),
        ({"test": Clips()}, {}, "data: there is no 'train'"),
        ({"train": Clips(), "tst": Clips()}, {}, "data: 'tst' is none of train, validation, test"),
        ({"train": Clips(), "test": Clips(0)}, {}, r"data\['test'\]: holds no samples"),
        ({"train": Clips(), "test": 3}, {}, r"data\['test'\]: a int gives no item by its number"),
        (
            {"train": Clips(), "test": Clips(change=_item(audio=np.ones(9)))},
            {},
            r"data\['test'\]: audio of item 7 has float32 of shape \(9,\), others float32",
        ),
        (
            {"train": Clips(), "test": Clips(change=lambda r, item, t: (item, r % 2))},
            {},
            "data: the targets differ in type .train: <U3, test: int64.; give labels of one kind",
        ),
        (
            {"train": Clips(), "test": Clips(change=_target("perhaps"))},
            {},
            "data: class 1 .perhaps. has no training sample; move some to the training split",
        ),
        (
            {"train": Clips(change=lambda r, i, t: ({**i, "image": None}, t)), "test": Clips()},
            {},
            "data: image is missing in every training sample; leave it out with data.modalities",
        ),
        (Clips(3), {"modalities": "audio,video"}, "data: no item has video; there are audio"),
        (Clips(), {"layouts": {"audio": "image"}}, "data: audio: layout 'image' takes samples of"),
        (Clips(), {"standardize": ["video"]}, "data.standardize: 'video' is no modality in use"),
        ([Clips()], {}, "data: a list is no data set; give iibalance.Samples"),
        ({"audio": np.ones((4, 2))}, {}, "data: a dict is no data set; give iibalance.Samples"),
    ],
)
def test_what_is_no_dataset_is_one_line(data, options, message):
    with pytest.raises(InputError, match=message) as caught:
        _load(data, **options)
    assert "\n" not in str(caught.value)


def test_fields_need_an_encoder_and_groups_one_value_a_sample():
    with pytest.raises(InputError, match="data: text: holds the fields ids, mask, which only an e"):
        _load(Clips(), own=())
    clips = Clips()
    clips.groups = [1, 2]
    with pytest.raises(
        InputError, match=r"data: groups: has shape \(2,\); give one value a sample"
    ):
        _load(clips)


def test_integers_may_stand_for_floats_and_numbers_for_arrays_of_them():
    whole = _item(audio=[1, 2, 3], image=np.zeros((4, 4), np.uint8))
    data = _load(Clips(change=whole))
    part = next(p for p in (data.train, data.validation, data.test) if 7 in p.rows)
    at = part.rows.tolist().index(7)
    audio = part[at].inputs["audio"] * data.standardizer.std_audio + data.standardizer.mean_audio
    torch.testing.assert_close(audio, torch.tensor([1.0, 2.0, 3.0]), rtol=1e-4, atol=1e-4)


def test_bytes_of_another_dataset_must_be_bytes_where_they_are_not_standardised():
    first = _load(Clips(), standardize=["audio"])
    assert first.standardizer.kinds["image"] == "uint8"
    as_floats = lambda row, item, target: (
        {**item, "image": None if item["image"] is None else item["image"].astype(np.float32)},
        target,
    )
    how = {"standardizer": first.standardizer, "classes": first.class_names, "own": ("text",)}
    again = load_data(DataConfig(), Clips(), **how)
    assert torch.equal(again.train.batch().inputs["image"], first.train.batch().inputs["image"])
    with pytest.raises(InputError, match="image: was trained on bytes .uint8., this is float32"):
        load_data(DataConfig(), Clips(change=as_floats), **how)


def test_a_first_item_that_lacks_a_modality_says_so_with_none():
    without = lambda row, item, target: (
        {n: v for n, v in item.items() if row or n != "audio"},
        target,
    )
    with pytest.raises(InputError, match="item 1 has 'audio'.* give None for it in the first item"):
        _load(Clips(change=without))
    with_none = lambda row, item, target: ({**item, **({} if row else {"audio": None})}, target)
    data = _load(Clips(change=with_none))
    assert data.modalities == ("audio", "image", "text")
    for part in (data.train, data.validation, data.test):
        present = (part.rows != 0) & (part.rows % 5 != 3)
        assert torch.equal(part.mask[:, 0], present)
