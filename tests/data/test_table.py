"""Columns of a table by modality."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from iibalance.data.table import find_columns, pick_columns
from iibalance.errors import InputError

ARRAY = np.arange(12.0).reshape(3, 4)
FRAME = pd.DataFrame(
    {
        "a1": [1.0, 2.0, 3.0],
        "a2": pd.array([1, None, 3], dtype="Int64"),
        "a[3]": [7, 8, 9],
        "flag": pd.array([True, None, False], dtype="boolean"),
        "bool": [True, False, True],
        "zero": pd.arrays.SparseArray([0.0, 0.0, 1.0]),
        "word": pd.array(["x", "y", "z"], dtype="string"),
        "kind": pd.Categorical([1, 2, 1]),
        "mixed": np.array([1, "x", 2.5], dtype=object),
        "day": pd.to_datetime(["2020-01-01"] * 3),
    }
)


@pytest.mark.parametrize(
    "which, expected",
    [
        ("a1", [[1.0], [2.0], [3.0]]),
        ("a[3]", [[7], [8], [9]]),  # a name first, a pattern only else
        (["a1", "a2"], [[1.0, 1.0], [2.0, None], [3.0, 3.0]]),
        ("a?", [[1.0, 1.0], [2.0, None], [3.0, 3.0]]),
        (["a2", "a*"], [[1.0, 1.0, 7.0], [None, 2.0, 8.0], [3.0, 3.0, 9.0]]),
        (("bool", "a1"), [[1.0, 1.0], [0.0, 2.0], [1.0, 3.0]]),
        ("flag", [[1.0], [None], [0.0]]),
        ("bool", [[True], [False], [True]]),
        (FRAME.columns[[5, 0]], [[0.0, 1.0], [0.0, 2.0], [1.0, 3.0]]),
    ],
)
def test_columns_of_a_frame(which, expected):
    found = pick_columns(FRAME, {"m": which})["m"]
    assert found.dtype.kind in "biuf"
    assert [[None if v != v else v for v in row] for row in found.tolist()] == expected


@pytest.mark.parametrize(
    "which, expected",
    [
        (0, [0]),
        (np.int64(2), [2]),
        ([3, 1], [3, 1]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        (range(2), [0, 1]),
        ([True, False, False, True], [0, 3]),
        (np.array([False, True, False, False]), [1]),
    ],
)
def test_columns_of_an_array(which, expected):
    assert pick_columns(ARRAY, {"m": which})["m"].tolist() == ARRAY[:, expected].tolist()


@pytest.mark.parametrize(
    "table, columns, message",
    [
        (FRAME, {}, "columns: {} does not name columns by modality; give a dict such as"),
        (FRAME, "a1", "columns: 'a1' does not name columns by modality"),
        (FRAME, {"m": "b1*"}, "columns: m: there is no column 'b1.'; there are a1, a2, a.3., flag"),
        (FRAME, {"m": ["a1", None]}, "columns: m: there is no column None"),
        (FRAME, {"m": None}, "columns: m: there is no column None"),
        (FRAME, {"m": slice(2)}, "columns: m: there is no column slice"),
        (FRAME, {"m": 0}, "columns: m: there is no column 0"),
        (FRAME, {"m": []}, "columns: m has no column; leave this modality out"),
        (FRAME, {"m": "a*", "n": ["a1"]}, "columns: 'a1' belongs to m and to n; give it to one"),
        (FRAME, {"m": "word"}, "columns: m: column 'word' holds no numbers .row 0 holds 'x'"),
        (FRAME, {"m": "kind"}, "column 'kind' holds no numbers .*; .* pandas.get_dummies of categ"),
        (FRAME, {"m": "mixed"}, "column 'mixed' holds no numbers .*; .* pandas.to_numeric"),
        (FRAME, {"m": "day"}, "column 'day' holds no numbers"),
        (FRAME[["a1", "a1"]], {"m": "a1"}, "columns: m: column 'a1' is there twice; rename one"),
        (ARRAY, {"m": [4]}, r"columns: m: \[4\] are no positions among 4 columns; give integers"),
        (ARRAY, {"m": [0.5]}, "are no positions among 4 columns"),
        (ARRAY, {"m": "a*"}, "columns: m: 'a.' are no positions among 4 columns"),
        (ARRAY, {"m": [True]}, "are no positions among 4 columns"),
        (ARRAY, {"m": None}, "are no positions among 4 columns"),
        (ARRAY, {"m": [[0], [1]]}, "are no positions among 4 columns"),
        (ARRAY, {"m": []}, "columns: m has no column; leave this modality out"),
        (ARRAY, {"m": [0, 1], "n": -3}, "columns: 1 belongs to m and to n; give it to one of them"),
        (ARRAY[0], {"m": 0}, r"this ndarray has shape \(4,\); give a DataFrame or an array"),
        ({"a": ARRAY}, {"m": 0}, "this dict has shape .*; give a DataFrame or an array"),
        ([[1], [1, 2]], {"m": 0}, "its 2 entries differ in shape"),
    ],
)
def test_what_is_refused(table, columns, message):
    with pytest.raises(InputError, match=message) as caught:
        pick_columns(table, columns)
    assert "\n" not in str(caught.value)


def test_the_remedies_work():
    dummies = pd.get_dummies(FRAME[["a1", "kind"]], columns=["kind"])
    assert pick_columns(dummies, {"m": "kind_*"})["m"].tolist() == [
        [True, False],
        [False, True],
        [True, False],
    ]
    numbers = pd.to_numeric(FRAME["mixed"], errors="coerce").to_frame()
    assert np.isnan(pick_columns(numbers, {"m": "mixed"})["m"][1, 0])


def test_names_and_positions_are_told_one_by_one():
    chosen = {"m": ["bool", "a?"], "n": "a[3]"}
    assert find_columns(FRAME, chosen) == {"m": ["bool", "a1", "a2"], "n": ["a[3]"]}
    positions = {"m": slice(1, 3), "n": [True, False, False, False]}
    assert find_columns(ARRAY, positions) == {"m": [1, 2], "n": [0]}


def test_columns_that_are_no_features_are_left_out_or_refused_by_name():
    apart = {"a2": "the labels (data.target)"}
    assert find_columns(FRAME, {"m": "a?", "n": "[bz]*"}, apart) == {
        "m": ["a1"],
        "n": ["bool", "zero"],
    }
    message = r"columns: m: 'a2' holds the labels .data.target., which is no feature; take it out"
    with pytest.raises(InputError, match=message):
        find_columns(FRAME, {"m": ["a1", "a2"]}, apart)
    with pytest.raises(InputError, match="columns: m: there is no column '.2'"):
        find_columns(FRAME, {"m": "?2"}, apart)
