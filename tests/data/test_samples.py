"""Samples: what may come in, what is missing, and that every mistake is one line with a remedy."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import GroupKFold, cross_val_score, train_test_split
from sklearn.utils import _safe_indexing

from iibalance import InputError, Samples

Y = ["no", "yes", "no", "yes"]
AUDIO = np.arange(12.0).reshape(4, 3)
NAN = float("nan")


def _objects(*items) -> np.ndarray:
    """A 1-D array of Python objects, whatever they are."""
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def _samples(**more) -> Samples:
    text = {"input_ids": np.arange(8).reshape(4, 2), "attention_mask": np.ones((4, 2), int)}
    given = {
        "mask": [[1, 1], [1, 0], [0, 1], [1, 1]],
        "groups": ["s2", "s1", "s2", "s1"],
        "split": ["train", "train", "val", "test"],
        "ids": list("wxyz"),
        "classes": ["no", "yes"],
    }
    return Samples({"audio": AUDIO, "text": text}, [0, 1, 0, 1], **{**given, **more})


@pytest.mark.parametrize(
    "values, dtype",
    [
        (AUDIO, np.float64),
        (AUDIO.tolist(), np.float64),
        (np.asfortranarray(AUDIO), np.float64),
        (AUDIO.astype(">f4"), np.dtype(">f4")),
        (AUDIO.astype(np.uint8), np.uint8),
        (AUDIO > 3, np.bool_),
        (torch.tensor(AUDIO, requires_grad=True), np.float64),
        (torch.tensor(AUDIO).bfloat16(), np.float32),
        (torch.tensor(AUDIO).half(), np.float16),
        (list(torch.tensor(AUDIO)), np.float64),
        (list(AUDIO), np.float64),
        (_objects(*AUDIO), np.float64),
        (pd.Series(list(AUDIO), index=[7, 8, 9, 10]), np.float64),
        (pd.DataFrame(AUDIO, index=list("abcd")), np.float64),
        (pd.DataFrame(AUDIO.astype(int)).astype("Int64"), np.int64),
        (pd.DataFrame(AUDIO > 3).astype("boolean"), np.bool_),
        (pd.DataFrame(AUDIO).astype({0: "Float32", 1: "int8"}), np.float64),
    ],
)
def test_numbers_of_every_kind(values, dtype):
    samples = Samples({"audio": values}, Y)
    array = samples.inputs["audio"]
    wanted = AUDIO > 3 if array.dtype == bool else AUDIO
    assert type(array) is np.ndarray and array.dtype == dtype
    assert array.tolist() == wanted.tolist() and samples.mask.all()


@pytest.mark.parametrize(
    "values",
    [
        [AUDIO[0], None, AUDIO[2], None],
        (list(AUDIO[0]), None, torch.tensor(AUDIO[2]).float(), None),
        [torch.tensor(AUDIO[0]).bfloat16(), None, AUDIO[2], NAN],
        _objects(AUDIO[0], None, AUDIO[2], NAN),
        pd.Series([AUDIO[0], None, AUDIO[2], pd.NA]),
        np.where(np.array([[1], [0], [1], [0]]), AUDIO, NAN),
        pd.DataFrame(AUDIO).where(pd.Series([True, False, True, False]), NAN),
        pd.DataFrame({k: pd.array(AUDIO[:, k], "Float64") for k in range(3)}).where(
            pd.Series([True, False, True, False]), pd.NA
        ),
        np.ma.masked_array(AUDIO, np.repeat([[0], [1], [0], [1]], 3, 1)),
    ],
)
def test_a_missing_row_is_none_or_nan_alone(values):
    samples = Samples({"other": AUDIO, "audio": values}, Y)
    assert samples.mask.tolist() == [[True, True], [True, False], [True, True], [True, False]]
    assert samples.inputs["audio"][[0, 2]].tolist() == AUDIO[[0, 2]].tolist()


def test_rows_that_the_mask_hides_may_hold_anything():
    values = AUDIO.copy()
    values[1], values[2, 0] = np.inf, NAN
    mask = np.array([[1, 1], [1, 0], [1, 0], [0, 1]], np.int8)
    samples = Samples({"other": AUDIO, "audio": values}, Y, mask=mask)
    assert samples.mask.tolist() == mask.astype(bool).tolist()
    # NaN alone is missing even where the mask says otherwise.
    values[0] = NAN
    assert Samples({"other": AUDIO, "audio": values}, mask=mask).mask[0].tolist() == [True, False]


def test_columns_of_a_table():
    frame = pd.DataFrame(AUDIO, columns=["a1", "a2", "v"])
    frame["v"] = pd.array([1, None, 3, 4], dtype="Int64")
    samples = Samples(frame, Y, columns={"audio": "a?", "video": "v"})
    assert samples.inputs["audio"].tolist() == AUDIO[:, :2].tolist()
    assert samples.mask.tolist() == [[True, True], [True, False], [True, True], [True, True]]
    samples = Samples(torch.tensor(AUDIO), Y, columns={"last": -1, "rest": slice(0, 2)})
    assert samples.inputs["last"].tolist() == AUDIO[:, 2:].tolist()
    assert samples.inputs["rest"].tolist() == AUDIO[:, :2].tolist()


def test_what_is_known_of_the_samples():
    samples = _samples()
    assert samples.shape == (4, 2) and len(samples) == 4 and samples.modalities == ("audio", "text")
    assert samples.groups.tolist() == [1, 0, 1, 0] and samples.split.tolist() == [0, 0, 1, 2]
    assert samples.ids == list("wxyz") and samples.classes == ["no", "yes"]
    assert Samples({"a": AUDIO}, ids=[b"x", b"y", b"\xc3\xa4", b"z"]).ids == ["x", "y", "ä", "z"]


@pytest.mark.parametrize(
    "split",
    [
        [0, 1, 2, 0],
        ["train", "Validation", "TEST", "train"],
        ["0", "dev", "test", b"train"],
        pd.Categorical(["train", "val", "test", "train"]),
        pd.array([0, 1, 2, 0], dtype="Int64"),
        torch.tensor([0, 1, 2, 0]),
        np.array([0, 1, 2, 0], np.uint8),
    ],
)
def test_a_split_is_numbers_or_words(split):
    found = Samples({"a": AUDIO}, split=split).split
    assert found.dtype == np.int64 and found.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "groups",
    [[7, 3, 7, 5], ["c", "a", "c", "b"], _objects("z", 0.5, "z", "a"), np.array([2.5, 0, 2.5, 1])],
)
def test_groups_are_anything_and_become_numbers(groups):
    found = Samples({"a": AUDIO}, groups=groups).groups
    assert found.dtype == np.int64 and found.tolist() == [2, 0, 2, 1]


@pytest.mark.parametrize("rows", [[2, 0], [-2, -4], np.array([2, 0]), torch.tensor([2, 0])])
def test_slicing_keeps_everything_together(rows):
    part = _samples()[rows]
    assert part.inputs["audio"].tolist() == AUDIO[[2, 0]].tolist()
    assert part.inputs["text"]["input_ids"].tolist() == [[4, 5], [0, 1]]
    assert part.mask.tolist() == [[False, True], [True, True]]
    assert part.targets.tolist() == [0, 0] and part.groups.tolist() == [1, 1]
    assert part.split.tolist() == [1, 0] and part.ids == ["y", "w"]
    assert part.classes == ["no", "yes"]


def test_slices_are_views_and_bools_and_single_rows_work():
    samples = _samples()
    part = samples[1:3]
    assert np.shares_memory(part.inputs["audio"], samples.inputs["audio"]) and part.ids == [
        "x",
        "y",
    ]
    assert samples[np.array([False, True, False, True])].ids == ["x", "z"]
    assert samples[3].ids == ["z"] and samples[-1].shape == (1, 2) and len(samples[[]]) == 0
    for rows in ([True], [0.5], "x", None, [[0]], 4, [7]):
        with pytest.raises(IndexError):
            samples[rows]


class _Recorder(ClassifierMixin, BaseEstimator):
    """Tells a class by the sign of its audio; the ids that it saw are on record."""

    seen: list = []

    def fit(self, X, y):
        assert isinstance(X, Samples)
        self.classes_ = np.unique(y)
        _Recorder.seen.append((set(X.ids), None))
        return self

    def predict(self, X):
        _Recorder.seen[-1] = (_Recorder.seen[-1][0], set(X.ids))
        return (X.inputs["audio"][:, 0] > 0).astype(int)


def test_scikit_learn_slices_samples():
    y = np.arange(40) % 2
    audio = (2.0 * y - 1)[:, None]
    samples = Samples({"audio": audio}, ids=range(40), groups=np.arange(40) // 4)
    assert _safe_indexing(samples, [3, 1]).ids == ["3", "1"]
    assert _safe_indexing(samples, np.arange(40) < 2).ids == ["0", "1"]
    _Recorder.seen = []
    scores = cross_val_score(
        _Recorder(), samples, y, cv=GroupKFold(5), groups=samples.groups, error_score="raise"
    )
    assert scores.tolist() == [1.0] * 5
    everyone = {str(row) for row in range(40)}
    for fitted, judged in _Recorder.seen:
        assert len(judged) == 8 and fitted == everyone - judged
        assert {int(row) // 4 for row in fitted}.isdisjoint({int(row) // 4 for row in judged})
    train, test, y_train, y_test = train_test_split(samples, y, stratify=y, random_state=0)
    assert len(train) == 30 and sorted(train.ids + test.ids) == sorted(everyone)
    assert test.inputs["audio"][:, 0].tolist() == (2.0 * y_test - 1).tolist()


def test_select_changes_order_and_refuses_rows_left_with_nothing():
    samples = _samples(mask=[[1, 1], [1, 1], [0, 1], [1, 1]])
    part = samples.select(["text", "audio"])
    assert part.modalities == ("text", "audio")
    assert part.mask[2].tolist() == [True, False] and samples.modalities == ("audio", "text")
    with pytest.raises(InputError, match="^row 2 has none of audio; remove the sample or choose"):
        samples.select(["audio"])
    with pytest.raises(InputError, match="no 'video'; there are audio, text"):
        samples.select(["video"])


def test_the_digest_tells_every_change():
    base = {"a": AUDIO, "b": {"x": AUDIO, "y": AUDIO}}
    digest = lambda inputs=base, targets=Y, **more: Samples(inputs, targets, **more).digest()
    turned = AUDIO.copy()
    turned[3, 2] = np.nextafter(turned[3, 2], 99)
    changed = [
        digest(),
        digest(targets=Y[::-1]),
        digest(targets=[0, 1, 0, 1]),
        digest(targets=None),
        digest(groups=[1, 1, 2, 2]),
        digest(groups=[1, 2, 2, 2]),
        digest(split=[0, 0, 1, 2]),
        digest(classes=["no", "yes"]),
        digest(classes=["no", "yes", "maybe"]),
        digest(mask=[[1, 1], [1, 1], [0, 1], [1, 1]]),
        digest({"a": turned, "b": base["b"]}),
        digest({"a": AUDIO[:, ::-1], "b": base["b"]}),
        digest({"a": AUDIO.astype(np.float32), "b": base["b"]}),
        digest({"a": AUDIO.reshape(4, 3, 1), "b": base["b"]}),
        digest({"b": base["b"], "a": AUDIO}),
        digest({"a": AUDIO, "b": {"y": AUDIO, "x": AUDIO}}),
        digest({"a": AUDIO, "b": {"x": AUDIO, "z": AUDIO}}),
        digest({"a": AUDIO, "b": AUDIO}),
    ]
    assert len(set(changed)) == len(changed)
    # Neither where the numbers lie nor how the samples are called matters.
    assert digest({**base, "a": np.asfortranarray(AUDIO)}, ids=list("abcd")) == digest()
    groups = _objects("s", "s", "t", "t")
    assert digest(groups=groups) == digest(groups=[1, 1, 2, 2])


def test_samples_can_be_pickled_for_other_processes():
    samples = _samples()
    assert pickle.loads(pickle.dumps(samples)).digest() == samples.digest()


def _with(values, **more):
    return lambda: Samples({"audio": values}, Y, **more)


_GAP = np.where(np.arange(12).reshape(4, 3) == 4, NAN, AUDIO)
_DF = pd.DataFrame({"n": [1.0, 2, 3, 4], "w": list("abcd")})


@pytest.mark.parametrize(
    "make, message",
    [
        (_with([[1, 2], [3], [4], [5]]), "inputs: audio: its 4 entries differ in shape; bring"),
        (_with([[1, 2], None, [3], [4]]), r"samples have the shapes \(2,\) and \(1,\); bring"),
        (_with([torch.ones(2), torch.ones(3)]), "inputs: audio: its 2 entries differ in shape"),
        (_with(["a", "b", "c", "d"]), "inputs: audio: dtype <U1 is not a real number"),
        (_with([None, "b", "c", "d"]), "inputs: audio: dtype <U1 is not a real number"),
        (_with([{}, {}, {}, {}]), "inputs: audio: its samples are dicts; give a dict of arrays"),
        (_with(AUDIO.astype(object)), r"not a real number; .* such as values.astype\(float\)"),
        (_with([{"x": 1}, None, {}, {}]), "its samples are dicts; give a dict of arrays"),
        (_with(AUDIO + 1j), "inputs: audio: dtype complex128 is not a real number"),
        (_with([]), "inputs: audio: has shape"),
        (_with(AUDIO[:0]), r"inputs: audio: is empty \(shape \(0, 3\)\)"),
        (_with(AUDIO[:, :0]), r"inputs: audio: is empty \(shape \(4, 0\)\)"),
        (_with(3.0), r"has shape \(\); give \[N, ...\]"),
        (_with(AUDIO[:, 0]), r"has shape \(4,\); .* \(a single feature is \[N, 1\]\)"),
        (_with(None), "inputs: audio: is None; leave a modality out"),
        (_with([None] * 4), "inputs: audio: every sample is None; leave this modality out"),
        (_with(scipy.sparse.csr_matrix(AUDIO)), "is sparse; .* such as its .toarray()"),
        (_with(torch.eye(4).to_sparse()), "is sparse; .* such as its .to_dense()"),
        (_with(_GAP), "inputs: audio: row 1 holds nan; clean it, or mark the row missing in mask"),
        (_with(np.where(AUDIO == 5, np.inf, AUDIO)), "row 1 holds inf; clean it"),
        (_with(1e300 * (1 + AUDIO)), "row 0 holds 1e.300, too large for float32; rescale"),
        (_with(np.full((4, 1), 2**63, np.uint64)), "row 0 holds 9223.*, too large for int64"),
        (_with(np.full((4, 2), NAN)), "row 0 has none of audio; remove the sample"),
        (_with(_DF), r"audio: column 'w' holds no numbers \(row 0 holds 'a'\); make them numbers"),
        (_with({}), "inputs: audio: holds no field; give at least one array"),
        (_with({"x": AUDIO, "y": AUDIO[:3]}), r"audio: fields differ in length \(x: 4, y: 3\)"),
        (_with({"x": [[1], None, [1], [1]]}), "inputs: audio.x: holds None; give a row of zeros"),
        (_with({"x": [[1], [1, 2], [1], [1]]}), "inputs: audio.x: its 4 entries differ in shape"),
        (_with({"x": _GAP}), "inputs: audio.x: row 1 holds nan; clean it, or mark .* in mask$"),
        (
            lambda: Samples(AUDIO, Y),
            "inputs: is a ndarray; give a dict of arrays by modality, or c",
        ),
        (lambda: Samples(_DF, Y), "inputs: is a DataFrame; give .* or columns= to say which"),
        (lambda: Samples({}, Y), "modalities: at least one is needed"),
        (lambda: Samples({3: AUDIO}, Y), "modalities: 3 cannot name a modality; use a non-empty"),
        (lambda: Samples({"a": AUDIO, "b": AUDIO[:3]}), "inputs: b: has 3 rows, but inputs: a has"),
        (lambda: Samples({"a": AUDIO}, Y[:3]), r"targets: has shape \(3,\); .* shape \(4,\)"),
        (_with(AUDIO, mask=[1, 1, 1, 1]), r"mask: has shape \(4,\), expected \(4, 1\): a column"),
        (
            _with(AUDIO, mask=np.array([[1.0], [0.0], [0.25], [2.0]])),
            "mask: row 2 holds 0.25 for audio; give bool values, .*such as mask > 0.5",
        ),
        (_with(AUDIO, mask=[["a"]] * 4), "mask: dtype <U1; give bool values"),
        (
            _with([{"ids": [1, 2]}] * 4),
            "inputs: audio: its samples are dicts; give a dict of arrays .*, one a field, and mask",
        ),
        (_with(AUDIO, mask=[[2]] * 4), "mask: row 0 holds 2 for audio; give bool"),
        (_with(AUDIO, mask=[[1], [0, 1], [1], [1]]), "mask: its 4 entries differ in shape"),
        (_with(AUDIO, mask=[[1], [1], [0], [1]]), "row 2 has none of audio"),
        (_with(AUDIO, groups=[1, 2]), r"groups: has shape \(2,\); give one value a sample"),
        (_with(AUDIO, groups=["a", None, "b", 1]), "groups: row 1 holds None; give every sample"),
        (_with(AUDIO, groups=[1, 2, NAN, 3]), "groups: row 2 holds nan; give every sample a group"),
        (_with(AUDIO, split=[0, 1, 2, 3]), "split: row 3 holds 3; give integers 0 .train., 1"),
        (_with(AUDIO, split=["train", "tset", "x", 0]), "split: row 1 holds tset; give integers"),
        (_with(AUDIO, split=[0, NAN, 1, 2]), "split: row 1 holds nan; give integers"),
        (_with(AUDIO, split=[True, False, True, True]), "split: row 0 holds True; give integers"),
        (_with(AUDIO, ids=["x"]), r"ids: has shape \(1,\); give one value a sample"),
        (_with(AUDIO, classes=["no", "no"]), "classes: 'no' is there twice; give each class its"),
        (_with(AUDIO, classes="no"), "classes: 'no' are no names; give a list of at least two"),
        (_with(AUDIO, columns=["a"]), "columns: \\['a'\\] does not name columns by modality"),
    ],
)
def test_every_mistake_is_one_line_with_its_remedy(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_columns_are_remembered_and_brought_into_the_order_of_others():
    frame = pd.DataFrame(np.arange(20.0).reshape(4, 5), columns=list("abcde"))
    samples = Samples(frame, columns={"x": ["c", "a"], "y": "[be]"})
    assert samples.columns == {"x": ["c", "a"], "y": ["b", "e"]}
    assert samples[1:].columns == samples.columns
    assert samples.select(["y"]).columns == {"y": ["b", "e"]}
    ordered = samples.in_order({"x": ["a", "c"], "y": ["e"], "z": ["?"]})
    assert ordered.columns == {"x": ["a", "c"], "y": ["e"]}
    np.testing.assert_array_equal(ordered.inputs["x"], frame[["a", "c"]])
    np.testing.assert_array_equal(ordered.inputs["y"], frame[["e"]])
    np.testing.assert_array_equal(samples.inputs["x"], frame[["c", "a"]])  # as it was
    with pytest.raises(InputError, match="columns: x: there is no column 'f', which the model was"):
        samples.in_order({"x": ["a", "f"]})


def test_columns_of_frames_by_modality_and_of_arrays():
    frame = pd.DataFrame({"a": [1.0, 2.0], 7: [3.0, 4.0]})
    samples = Samples({"x": frame, "y": np.ones((2, 3))})
    assert samples.columns == {"x": ["a", 7]}
    assert samples.select(["y"]).columns is None
    assert samples.in_order({"x": ["7", "a"], "y": ["p"]}).inputs["x"].tolist() == [[3, 1], [4, 2]]
    assert Samples(np.ones((2, 4)), columns={"x": slice(0, 2), "y": 3}).columns == {
        "x": [0, 1],
        "y": [3],
    }
    assert Samples({"y": np.ones((2, 3))}).columns is None
