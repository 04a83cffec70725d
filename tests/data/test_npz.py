"""A user's npz: what is read, and that every mistake is one line that names it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from iibalance.config import DataConfig
from iibalance.data import load_data
from iibalance.data.sources import read_to_predict
from iibalance.errors import InputError


def _arrays(count: int = 60) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "x_a": random.normal(size=(count, 5)).astype(np.float32),
        "x_b": random.integers(0, 255, (count, 6, 6), dtype=np.uint8),
        "y": np.arange(count) % 3,
        "split": np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2])[np.arange(count) % 12],
        "speaker": np.array([f"s{index // 12}" for index in range(count)]),
    }


def _write(folder, **changes):
    arrays = {**_arrays(), **changes}
    path = folder / "d.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def _load(path, **options):
    return load_data(DataConfig(name="npz", path=path, **options))


def test_reads_splits_modalities_and_groups(tmp_path):
    arrays = _arrays()
    data = _load(_write(tmp_path), modalities="b, a", groups="speaker")
    assert (
        data.modalities == ("b", "a")
        and data.shapes == {"b": (6, 6), "a": (5,)}
        and data.layouts == {"b": "image", "a": "vector"}
    )
    assert data.num_classes == 3 and data.class_names == ["0", "1", "2"]
    for code, part in enumerate((data.train, data.validation, data.test)):
        chosen = arrays["split"] == code
        assert part.targets.tolist() == arrays["y"][chosen].tolist()
        assert part.groups.tolist() == [int(name[1:]) for name in arrays["speaker"][chosen]]
        raw = part.inputs["b"] * data.standardizer.std_b + data.standardizer.mean_b
        np.testing.assert_allclose(raw, arrays["x_b"][chosen], atol=1e-3)
        assert part.inputs["b"].dtype == part.inputs["a"].dtype == torch.float32
        assert part.mask.all() and part.mask.shape == (chosen.sum(), 2)


def test_statistics_come_from_training_rows_only(tmp_path):
    arrays = _arrays()
    arrays["x_a"][arrays["split"] != 0] += 100
    train = arrays["x_a"][arrays["split"] == 0]
    data = _load(_write(tmp_path, **arrays))
    np.testing.assert_allclose(data.standardizer.mean_a, train.mean(0), atol=1e-5)
    assert data.test.inputs["a"].mean() > 50


@pytest.mark.parametrize(
    "dtype",
    [np.bool_, np.uint8, np.int16, np.uint16, np.int64, np.uint64, np.float16, np.float64, ">f4"],
)
def test_real_dtypes(tmp_path, dtype):
    values = (_arrays()["x_a"] * 10).clip(0, 100).astype(dtype)
    data = _load(_write(tmp_path, x_a=np.asfortranarray(values)))
    raw = data.train.inputs["a"] * data.standardizer.std_a + data.standardizer.mean_a
    np.testing.assert_allclose(raw, values[_arrays()["split"] == 0].astype(np.float32), atol=1e-3)


def test_missing_rows_may_hold_anything(tmp_path):
    arrays = _arrays()
    present = np.arange(60) % 5 != 0
    arrays["x_a"] = arrays["x_a"].astype(np.float64)
    arrays["x_a"][~present] = np.nan
    arrays["x_a"][0], arrays["x_a"][5] = np.inf, 1e300
    for mask in (present, present.astype(np.int8)):
        data = _load(_write(tmp_path, **arrays, mask_a=mask))
        for code, part in enumerate((data.train, data.validation, data.test)):
            assert (
                part.mask[:, 0].tolist() == present[arrays["split"] == code].tolist()
                and part.mask[:, 1].all()
            )
            assert (
                part.inputs["a"].isfinite().all() and not part.inputs["a"][~part.mask[:, 0]].any()
            )
        np.testing.assert_allclose(
            data.standardizer.mean_a,
            arrays["x_a"][present & (arrays["split"] == 0)].mean(0),
            rtol=1e-5,
        )


def test_without_a_split_column_seventy_ten_twenty(tmp_path):
    data = _load(_write(tmp_path, split=None))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [42, 6, 12]
    assert torch.bincount(data.test.targets).tolist() == [4, 4, 4]


def test_splits_made_here_share_no_group(tmp_path):
    for split in (
        None,
        np.where(np.arange(60) < 36, 0, 2),
    ):  # none at all, and one without validation rows
        data = _load(_write(tmp_path, split=split), groups="speaker")
        groups = [set(part.groups.tolist()) for part in (data.train, data.validation, data.test)]
        assert (
            not groups[0] & groups[1]
            and not groups[1] & groups[2]
            and not groups[0] & groups[2]
            and all(groups)
        )


def test_validation_comes_from_training_where_there_is_none(tmp_path):
    split = np.where(np.arange(60) < 45, 0, 2)
    data = _load(_write(tmp_path, split=None, mine=split), split="mine")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [36, 9, 15]
    assert torch.bincount(data.validation.targets).tolist() == [3, 3, 3]


def test_class_names(tmp_path):
    assert _load(_write(tmp_path, classes=np.array(["x", "y", "z"]))).class_names == ["x", "y", "z"]


_Y, _SPLIT = _arrays()["y"], _arrays()["split"]
_BAD_ROW = np.zeros((60, 5), np.float32)
_BAD_ROW[4, 2] = np.nan
_HUGE = np.zeros((60, 5))
_HUGE[7] = -1e39


@pytest.mark.parametrize(
    "changes, options, message",
    [
        (
            {"x_a": None, "x_b": None},
            {},
            "no modality: array names must begin with x_, such as x_audio; "
            "it holds y, split, speaker",
        ),
        ({}, {"modalities": "a,c"}, "no x_c; there are a, b"),
        ({"x_a.b": _BAD_ROW}, {}, "x_a: stands beside fields of its own .x_a.b.; name one"),
        ({"x_c.d.e": _BAD_ROW}, {}, "x_c.d.e: cannot name a modality; name it x_<modality>"),
        ({"x_c.d": _BAD_ROW}, {}, "x_c.d: row 4 holds nan; clean it"),
        ({"y": None}, {}, "no y; add the class"),
        ({"y": _Y + 0.5}, {}, "y: row 0 holds 0.5, no class: regression is not supported"),
        ({"y": np.where(_Y == 1, np.nan, _Y)}, {}, "y: row 1 holds nan; give every sample a class"),
        ({"y": np.eye(3)[_Y]}, {}, "y: has shape .60, 3.; several targets a sample"),
        ({"y": _Y[:, None]}, {}, r"y: has shape \(60, 1\); give one class a sample"),
        (
            {"y": np.where(np.arange(60) == 8, 2**63, _Y.astype(np.uint64))},
            {},
            "y: row 8 holds 9223372036854775808",
        ),
        (
            {"y": _Y, "classes": np.array(["p", "q"])},
            {},
            r"y: row 2 holds 2, outside 0\.\.1: classes has 2 names",
        ),
        ({"classes": np.array([["p", "q", "r"]])}, {}, r"classes: has shape \(1, 3\)"),
        (
            {"classes": np.array(["p", "q", "r", "s"])},
            {},
            r"class 3 \(s\) has no training sample \(0 in all\)",
        ),
        (
            {"y": np.where(_arrays()["split"] == 0, _Y % 2, _Y)},
            {},
            r"class 2 \(2\) has no training sample \(10 in all\)",
        ),
        ({"y": _Y * 0}, {}, "y: holds only class 0; give samples of at least two"),
        ({"y": _Y[:0]}, {}, "x_a: has 60 rows, but y has 0"),
        ({"x_a": _BAD_ROW[:50]}, {}, "x_a: has 50 rows, but y has 60"),
        ({"x_a": _BAD_ROW[:, 0]}, {}, r"x_a: has shape \(60,\); give \[N, ...\]"),
        ({"x_a": _BAD_ROW[:, :0]}, {}, "x_a: is empty"),
        (
            {"x_a": _BAD_ROW},
            {},
            "x_a: row 4 holds nan; clean it, or mark the row missing in mask_a",
        ),
        (
            {"x_a": np.where(np.isnan(_BAD_ROW), -np.inf, 0).astype(np.float16)},
            {},
            "x_a: row 4 holds -inf",
        ),
        ({"x_a": _BAD_ROW, "mask_a": np.arange(60) == 4}, {}, "x_a: row 4 holds nan"),
        ({"x_a": _HUGE}, {}, r"x_a: row 7 holds -1e\+39, too large for float32"),
        ({"x_a": _BAD_ROW.astype(str)}, {}, "x_a: dtype <U.* is not a real number"),
        ({"x_a": _BAD_ROW.astype(complex)}, {}, "x_a: dtype complex128 is not a real number"),
        (
            {"x_a": _BAD_ROW.astype(object)},
            {},
            "x_a: holds pickled Python objects, which are never loaded",
        ),
        (
            {"x_a": np.zeros((60, 1, 1, 1, 1))},
            {},
            r"x_a: a sample of shape \(1, 1, 1, 1\) can be read in more than one way",
        ),
        (
            {"mask_a": np.ones(50, bool)},
            {},
            r"mask_a: has shape \(50,\); give one value a sample, shape \(60,\)",
        ),
        ({"mask_a": np.full(60, 2)}, {}, "mask_a: row 0 holds .*2.*; give a bool array"),
        ({"mask_a": np.full(60, 0.5)}, {}, "mask_a: row 0 holds"),
        (
            {"mask_a": np.zeros(60, bool)},
            {},
            "mask_a: missing in every training sample; leave a out with data.modalities",
        ),
        (
            {"mask_a": np.arange(60) != 9},
            {"modalities": "a"},
            "row 9 has none of a; remove the sample",
        ),
        (
            {"split": _arrays()["split"].clip(1)},
            {},
            "the train split is empty: no row of 'split' is 0",
        ),
        (
            {"split": _arrays()["split"].clip(0, 1)},
            {},
            "the test split is empty: no row of 'split' is 2",
        ),
        (
            {"split": np.where(np.arange(60) == 11, 3, 0)},
            {},
            "split: row 11 holds .*3.*; give integers 0 .train., 1 .validation., 2 .test.",
        ),
        ({"split": np.zeros(60)}, {}, "split: row 0 holds .*0.0"),
        ({"split": np.zeros(59, int)}, {}, r"split: has shape \(59,\)"),
        (
            {},
            {"split": "other"},
            "data.split: no column 'other'; the file holds x_a, x_b, y, split, speaker",
        ),
        ({}, {"groups": "person"}, "data.groups: no column 'person'; the file holds"),
        ({"speaker": np.arange(7)}, {"groups": "speaker"}, r"groups: has shape \(7,\)"),
        (
            {"split": None, "speaker": np.zeros(60, int)},
            {"groups": "speaker"},
            "1 group cannot be divided",
        ),
        (
            {},
            {"layouts": {"a": "image"}},
            r"x_a: layout 'image' takes samples of 2 or 3 dimensions, not of shape \(5,\)",
        ),
    ],
)
def test_every_mistake_is_one_line_that_names_it(tmp_path, changes, options, message):
    path = _write(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        _load(path, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    assert path in text or text.startswith("data.")


def test_files_that_are_no_npz(tmp_path):
    with pytest.raises(InputError, match="data.path: no file is given"):
        _load(None)
    with pytest.raises(InputError, match="no such file; check data.path"):
        _load(str(tmp_path / "none.npz"))
    with pytest.raises(InputError, match="is a folder"):
        _load(str(tmp_path))
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(InputError, match="holds one array"):
        _load(str(tmp_path / "one.npy"))
    for content in (b"", b"hello", b"PK\x03\x04", b"\x80\x04]\x94."):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(InputError, match="is not a readable npz"):
            _load(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_cut_and_garbled_files_never_escape_as_other_errors(tmp_path, save):
    buffer = io.BytesIO()
    save(buffer, **_arrays())
    whole, path, random = buffer.getvalue(), tmp_path / "d.npz", np.random.default_rng(0)
    for cut in random.integers(0, len(whole), 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError):
            _load(str(path))
    refused = 0
    for _ in range(
        150
    ):  # headers and directory included; a flip may also hit padding, and then loading is right
        garbled = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            garbled[place] ^= 1 << int(random.integers(8))
        path.write_bytes(garbled)
        try:
            _load(str(path))
        except InputError:
            refused += 1
    assert refused > 100


def _read(folder, missing=(), **arrays):
    np.savez(folder / "p.npz", **arrays)
    return read_to_predict(DataConfig(path=folder / "p.npz"), ["a", "b"], missing)


def test_what_is_predicted_is_read_raw_with_masks_ids_and_labels(tmp_path):
    arrays = _arrays()
    arrays["x_a"][3] = np.nan
    samples = _read(
        tmp_path,
        **arrays,
        mask_a=np.arange(60) != 5,
        ids=np.array([f"c{index}" for index in range(60)]),
    )
    assert samples.modalities == ("a", "b") and samples.ids[:2] == ["c0", "c1"]
    np.testing.assert_array_equal(samples.inputs["b"], arrays["x_b"])
    # Told by the mask, or a row of NaN alone.
    assert samples.mask[:, 0].tolist() == [index not in (3, 5) for index in range(60)]
    assert samples.mask[:, 1].all() and samples.targets.tolist() == arrays["y"].tolist()


def test_a_modality_that_is_not_there_must_be_said_to_be_missing(tmp_path):
    with pytest.raises(InputError, match="x_a is not there; it holds x_b. .* --missing a to pred"):
        _read(tmp_path, x_b=np.ones((4, 6, 6)))
    with pytest.raises(InputError, match="x_a is not there; it holds x_A, x_b. Name it as in"):
        _read(tmp_path, x_A=np.ones((4, 5)), x_b=np.ones((4, 6, 6)))
    with pytest.raises(InputError, match="missing: 'c' is none of the model's modalities .a, b."):
        _read(tmp_path, ["c"], x_b=np.ones((4, 6, 6)))
    samples = _read(tmp_path, ["a"], x_b=np.ones((4, 6, 6)))
    assert samples.modalities == ("b",) and samples.targets is None and samples.ids is None
    both = _read(tmp_path, ["a"], x_a=np.ones((4, 5)), x_b=np.ones((4, 6, 6)))
    assert both.modalities == ("b",)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x_c": np.ones((4, 5))}, "none of a, b is there"),
        ({"x_a": np.ones((4, 5)), "x_b": np.ones((3, 6, 6))}, "x_b: has 3 rows, but x_a has 4"),
        ({"x_a": np.full((4, 5), np.inf)}, "x_a: row 0 holds inf"),
        (
            {"x_a": np.ones((4, 5)), "mask_a": np.array([1, 1, 0, 1], bool)},
            "row 2 has none of a",
        ),
        ({"x_a": np.ones((4, 5)), "y": np.arange(3)}, "x_a: has 4 rows, but y has 3"),
        ({"x_a": np.ones((4, 5)), "ids": np.arange(3)}, r"ids: has shape \(3,\)"),
        ({"x_a": np.ones((0, 5))}, "x_a: is empty"),
    ],
)
def test_errors_of_what_is_predicted(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        _read(tmp_path, ["a", "b"], **arrays)


def test_labels_are_words_or_any_integers(tmp_path):
    words = np.array(["no", "yes", "perhaps"])[_Y]
    data = _load(_write(tmp_path, y=words))
    assert data.class_names == ["no", "perhaps", "yes"]
    assert [data.class_names[k] for k in data.train.targets] == words[_SPLIT == 0].tolist()
    data = _load(_write(tmp_path, y=2 * _Y - 1))
    assert data.class_names == ["-1", "1", "3"]
    assert data.test.targets.tolist() == _Y[_SPLIT == 2].tolist()
    data = _load(_write(tmp_path, y=_Y + 1.0))  # whole floats
    assert data.class_names == ["1", "2", "3"]


def test_splits_may_be_words(tmp_path):
    words = np.array(["train", "val", "test"])[_SPLIT]
    assert len(_load(_write(tmp_path, split=words)).validation) == (_SPLIT == 1).sum()


def test_another_file_is_standardised_as_the_model_was(tmp_path):
    path = _write(tmp_path)
    first = _load(path)
    arrays = _arrays()
    arrays["x_a"][arrays["split"] != 2] *= 100  # its own statistics would be others
    other = load_data(
        DataConfig(name="npz", path=_write(tmp_path, **arrays)), standardizer=first.standardizer
    )
    for name in first.modalities:
        assert torch.equal(other.test.inputs[name], first.test.inputs[name])
    assert other.train.inputs["a"].std() > 50
    # A layout is read as it was in training, whatever the type of the numbers tells.
    assert other.layouts == first.layouts == {"a": "vector", "b": "image"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_b": None}, "data.path: {path} has the modalities a, the run a, b"),
        ({"x_c": np.ones((60, 2))}, "data.path: {path} has the modalities a, b, c, the run a, b"),
        (
            {"x_b": np.ones((60, 6, 7))},
            "data.path: {path}: x_b: samples have shape (6, 7), but the model was trained on "
            "(6, 6)",
        ),
        (  # of a shape that no layout could be told of
            {"x_a": np.ones((60, 3, 48, 3))},
            "data.path: {path}: x_a: samples have shape (3, 48, 3), but the model was trained on "
            "(5,)",
        ),
    ],
)
def test_another_file_must_be_of_the_models_shapes(tmp_path, changes, message):
    standardizer = _load(_write(tmp_path)).standardizer
    path = _write(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        load_data(DataConfig(name="npz", path=path), standardizer=standardizer)
    assert str(caught.value) == message.format(path=path)


@pytest.mark.parametrize(
    "path, options, sizes, layouts, classes",
    [
        (
            "utd_mhad/utd_mhad.npz",
            {"groups": "subject"},
            (323, 108, 430),
            {"depth": "image", "skeleton": "sequence", "inertial": "sequence"},
            27,
        ),
        (
            "avletters/avletters.npz",
            {"groups": "speaker"},
            (416, 104, 260),
            {"audio": "sequence", "visual": "video"},
            26,
        ),
        (
            "avletters/avletters.npz",
            {"split": "split_speaker_independent"},
            (546, 78, 156),
            {"audio": "sequence", "visual": "video"},
            26,
        ),
        (
            "avdigits/avdigits.npz",
            {"modalities": "audio,visual"},
            (4500, 600, 1000),
            {"audio": "image", "visual": "image"},
            10,
        ),
        (
            "handwritten6/handwritten6.npz",
            {},
            (1400, 200, 400),
            {f"view{index}": "vector" for index in range(1, 7)},
            10,
        ),
    ],
)
def test_real_data(data_folder, path, options, sizes, layouts, classes):
    if not (data_folder / path).is_file():
        pytest.skip(f"{data_folder / path} is absent")
    data = _load(str(data_folder / path), **options)
    assert tuple(len(part) for part in (data.train, data.validation, data.test)) == sizes
    assert (
        data.layouts == layouts
        and data.num_classes == classes
        and (data.train.groups is None) == ("groups" not in options)
    )
    for part in (data.train, data.validation, data.test):
        for values in part.inputs.values():
            assert values.isfinite().all() and values.abs().max() < 100
    if path.startswith("avletters"):
        assert data.class_names == [chr(ord("A") + index) for index in range(26)]


def test_official_split_takes_whole_subjects_for_validation(data_folder):
    path = data_folder / "utd_mhad" / "utd_mhad.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    data = _load(str(path), split="split_official", groups="subject", modalities="inertial")
    train, validation, test = (
        set(part.groups.tolist()) for part in (data.train, data.validation, data.test)
    )
    assert len(validation) == 1 and len(train) == 3 and len(test) == 4 and not train & validation
    assert len(data.train) + len(data.validation) == 431
