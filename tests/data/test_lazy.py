"""A split that stays on the disk gives what the same split in memory gives."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from iibalance import InputError
from iibalance.data import lazy
from iibalance.data.dataset import Batch, Split, identity
from iibalance.data.lazy import ArrayReader, LazySplit
from iibalance.data.standardize import Standardizer
from iibalance.data.values import parts_of

N = 30
ROWS = torch.arange(N - 1, -1, -2)  # the split has every second row, from the end


def _inputs(folder=None):
    random = np.random.default_rng(0)
    inputs = {
        "audio": random.normal(3, 5, (N, 6, 4)),
        "words": random.integers(1, 50, (N, 7)),
        "text": {"ids": random.integers(0, 9, (N, 5)), "mask": random.random((N, 5)) < 0.7},
    }
    if folder is not None:  # mapped from files, one of them in Fortran's order
        inputs["audio"] = np.asfortranarray(inputs["audio"])
        np.save(folder / "audio.npy", inputs["audio"])
        np.save(folder / "words.npy", inputs["words"])
        inputs["audio"] = np.load(folder / "audio.npy", mmap_mode="r")
        inputs["words"] = np.load(folder / "words.npy", mmap_mode="r")
    return inputs


def _splits(folder=None) -> tuple[LazySplit, Split]:
    """The same 15 samples, once to be read and once in memory."""
    read = ArrayReader(_inputs(folder))
    mask = torch.rand(N, 3, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[torch.arange(N), torch.arange(N) % 3] = True
    shapes = {"audio": (6, 4), "words": (7,), "text": {"ids": (5,), "mask": (5,)}}
    standardizer = Standardizer(shapes, {"words": "tokens"})
    whole = read(range(N), list(shapes))
    standardizer.fit(whole, mask)
    targets, groups = torch.arange(N) % 4, torch.arange(N) // 5
    raw = read(ROWS.tolist(), list(shapes))
    inputs = standardizer.transform(raw, mask[ROWS])
    return (
        LazySplit(read, ROWS, targets[ROWS], mask[ROWS], groups[ROWS], standardizer),
        Split(inputs, targets[ROWS], mask[ROWS], groups[ROWS]),
    )


def _equal(one: Batch, other: Batch) -> None:
    assert list(one.inputs) == list(other.inputs)
    for name, values in one.inputs.items():
        for left, right in parts_of(values, other.inputs[name]):
            assert left.dtype == right.dtype and torch.equal(left, right), name
    assert torch.equal(one.targets, other.targets) and torch.equal(one.mask, other.mask)


def test_every_way_to_its_samples_gives_the_same():
    lazy_split, split = _splits()
    assert len(lazy_split) == len(split) == 15 and lazy_split.modalities == split.modalities
    _equal(lazy_split.batch(), split.batch())
    _equal(lazy_split[4], split[4])
    one, other = lazy_split.__getitems__([3, 1, 3]), split.__getitems__([3, 1, 3])
    _equal(one, other)
    assert one.index.tolist() == other.index.tolist() == [3, 1, 3]
    for size in (4, 15, 99):
        batches = list(lazy_split.batches(size))
        assert len(batches) == -(-15 // size)
        for batch, wanted in zip(batches, split.batches(size), strict=True):
            _equal(batch, wanted)
    for name in split.modalities:
        for left, right in parts_of(lazy_split.head(name, 3), split.head(name, 3)):
            assert torch.equal(left, right) and len(left) == 3


@pytest.mark.parametrize(
    "rows", [[2, 0, 7], torch.tensor([5, 5]), np.arange(15) % 2 == 0, torch.arange(15) < 3]
)
def test_subsets_are_the_same_also_of_one_modality(rows):
    lazy_split, split = (part.subset(rows) for part in _splits())
    _equal(lazy_split.batch(), split.batch())
    assert torch.equal(lazy_split.groups, split.groups)
    for name in split.modalities:
        one, other = lazy_split.only(name), split.only(name)
        assert len(one) == len(other) and one.modalities == other.modalities == (name,)
        assert one.mask.all() and torch.equal(one.groups, other.groups)
        if len(one):
            _equal(one.batch(), other.batch())
            _equal(one.subset([0]).batch(), other.subset([0]).batch())


def test_chunks_hold_no_more_than_they_may(monkeypatch):
    monkeypatch.setattr(lazy, "CHUNK", 4)
    lazy_split, split = _splits()
    sizes = [len(batch.targets) for batch in lazy_split.chunks()]
    assert sizes == [4, 4, 4, 3]
    for batch, wanted in zip(lazy_split.chunks(), split.batches(4), strict=True):
        _equal(batch, wanted)


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_same(tmp_path, way):
    lazy_split, split = _splits(tmp_path)
    loader = DataLoader(
        lazy_split, 4, collate_fn=identity, num_workers=2, multiprocessing_context=way
    )
    for batch, wanted in zip(loader, split.batches(4), strict=True):
        _equal(batch, wanted)


def test_a_mapped_file_travels_by_its_name(tmp_path):
    inputs = _inputs(tmp_path)
    inputs["part"] = inputs["words"][3:]  # a view: its place in the file is not known to numpy
    reader = ArrayReader(inputs)
    text = pickle.dumps(reader)
    assert b"audio.npy" in text and inputs["audio"].tobytes()[:64] not in text
    again = pickle.loads(text)
    assert isinstance(again.inputs["audio"], np.memmap)
    rows = [5, 0, 2]
    for name, values in reader(rows, list(inputs)).items():
        for left, right in parts_of(values, again(rows, [name])[name]):
            assert torch.equal(left, right), name


def test_a_batch_that_is_too_large_for_float32_is_refused():
    lazy_split, _ = _splits()
    lazy_split.standardizer.std_audio.fill_(1e-38)
    with pytest.raises(InputError, match="data: audio of row 29 is too large to standardise in fl"):
        lazy_split.__getitems__([0])
