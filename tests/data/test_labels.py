"""Labels: what is a class, what is none, and their positions."""

from __future__ import annotations

import datetime

import numpy as np
import pandas as pd
import pytest
import torch

from iibalance.data.labels import check_labels, encode_as_trained, encode_labels
from iibalance.errors import InputError


def _encoded(values, classes=None):
    labels = check_labels(values, len(values), InputError)
    targets, names = encode_labels(labels, classes, InputError)
    assert targets.dtype == np.int64
    return targets.tolist(), names


@pytest.mark.parametrize(
    "values, names",
    [
        ([1, 2, 1, 2], ["1", "2"]),
        ([-5, 3, -5, 3], ["-5", "3"]),
        ([9, 10, 9, 10], ["9", "10"]),  # by number, not by word
        ([2**62, 2**63 - 1, 2**62, 2**63 - 1], [str(2**62), str(2**63 - 1)]),
        (np.array([1, 3, 1, 3], np.uint64), ["1", "3"]),
        (np.array([0, 7, 0, 7], np.float16), ["0", "7"]),
        ([0.0, 1.0, 0.0, 1.0], ["0", "1"]),
        ([False, True, False, True], ["False", "True"]),
        (["b", "c", "b", "c"], ["b", "c"]),
        (["", "ä", "", "ä"], ["", "ä"]),
        ([b"b", "\u00e4".encode(), b"b", "\u00e4".encode()], ["b", "ä"]),
        (np.array(["no", "yes"] * 2, object), ["no", "yes"]),
        (np.array(["no", np.str_("yes")] * 2, object), ["no", "yes"]),
        (np.array([0, 1.0] * 2, object), ["0", "1"]),
        (pd.Series(["no", "yes"] * 2, index=list("wxyz")), ["no", "yes"]),
        (pd.Categorical(["no", "yes"] * 2, categories=["yes", "no"]), ["no", "yes"]),
        (pd.array([3, 5, 3, 5], dtype="Int64"), ["3", "5"]),
        (pd.array([False, True] * 2, dtype="boolean"), ["False", "True"]),
        (pd.array(["no", "yes"] * 2, dtype="string"), ["no", "yes"]),
        (torch.tensor([1, 2, 1, 2]), ["1", "2"]),
        (torch.tensor([0, 1, 0, 1]).bfloat16(), ["0", "1"]),
        ([torch.tensor(4), torch.tensor(5)] * 2, ["4", "5"]),
    ],
)
def test_labels_become_positions_in_order(values, names):
    assert _encoded(values) == ([0, 1, 0, 1], names)


def test_class_names_are_given_by_position_or_by_name():
    assert _encoded([1, 0, 1], ["cat", "dog"]) == ([1, 0, 1], ["cat", "dog"])
    assert _encoded(["dog", "cat"], ["dog", "cat"]) == ([0, 1], ["dog", "cat"])
    assert _encoded(["10", "20"], ["20", "10"]) == ([1, 0], ["20", "10"])
    with pytest.raises(InputError, match="y: row 0 holds 10, outside 0..1: classes has 2 names"):
        _encoded([10, 20], ["20", "10"])  # integers are positions, even where the names are numbers
    with pytest.raises(InputError, match="y: row 1 holds 2, outside 0..1: classes has 2 names"):
        _encoded([1, 2], ["cat", "dog"])
    with pytest.raises(InputError, match=r"y: row 1 holds 'cow', .* none of the classes .cat, dog"):
        _encoded(["cat", "cow"], ["cat", "dog"])


# As strings sort: "10" stands between "1" and "2".
DIGITS = sorted(str(digit) for digit in range(11))


def test_integers_are_positions_and_strings_names_whatever_the_names_look_like():
    assert _encoded(list(range(11)), DIGITS) == (list(range(11)), DIGITS)
    assert _encoded(list("0123456789"), DIGITS) == ([0, 1, *range(3, 11)], DIGITS)
    assert _encoded([1, 0, 1], ["1", "0"]) == ([1, 0, 1], ["1", "0"])


def _as_trained(values, trained, classes=None) -> list[int]:
    labels = check_labels(values, len(values), InputError)
    targets = encode_as_trained(labels, trained, InputError, classes=classes)
    assert targets.dtype == np.int64
    return targets.tolist()


@pytest.mark.parametrize(
    "values, trained, classes, expected",
    [
        (list(range(11)), DIGITS, None, [0, 1, *range(3, 11), 2]),  # names, by their numbers
        (["10", "2"], DIGITS, None, [2, 3]),
        ([5, 0, 2.0], ["0", "2", "5"], None, [2, 0, 1]),
        ([-1, 1], ["-1", "1"], None, [0, 1]),
        ([7], ["7", "other"], None, [0]),
        ([1, 0], ["no", "yes"], None, [1, 0]),  # positions, where no class is named by a number
        (["yes", "no"], ["no", "yes"], None, [1, 0]),
        ([True, False], ["False", "True"], None, [1, 0]),
        ([1, 0], ["no", "yes"], ["yes", "no"], [0, 1]),  # positions in the names that came along
        ([0, 2], ["5", "7", "9"], ["9", "1", "5"], [2, 0]),
        ([1, 0, 1], DIGITS, ["10", "3"], [4, 2, 4]),
    ],
)
def test_labels_for_a_trained_model_are_its_classes_by_name(values, trained, classes, expected):
    assert _as_trained(values, trained, classes) == expected


@pytest.mark.parametrize(
    "values, trained, classes, message",
    [
        ([0, 1, 2], ["0", "2", "5"], None, r"y: row 1 holds '1', .* the classes \(0, 2, 5\)"),
        ([0, 1], ["7", "other"], None, "y: row 0 holds '0', which is none of the classes"),
        ([0, 2], ["no", "yes"], None, "y: row 1 holds 2, outside 0..1: classes has 2 names"),
        (["0", "1"], ["no", "yes"], None, "y: row 0 holds '0', which is none of the classes"),
        ([0, 1], ["no", "yes"], ["yes", "maybe"], "y: row 1 holds 'maybe', which is none of"),
        ([0, 3], ["no", "yes"], ["yes", "no"], "y: row 1 holds 3, outside 0..1"),
    ],
)
def test_a_label_that_a_trained_model_does_not_know_is_refused(values, trained, classes, message):
    with pytest.raises(InputError, match=message):
        _as_trained(values, trained, classes)


@pytest.mark.parametrize(
    "values, message",
    [
        ([0, 1, np.nan], "y: row 2 holds nan; give every sample a class, or leave it out"),
        ([0, 1, None], "y: row 2 holds None; give every sample a class"),
        (["a", "b", np.nan], "y: row 2 holds nan; give every sample a class"),
        (["a", None, "b"], "y: row 1 holds None; give every sample a class"),
        (pd.array([1, None, 2], dtype="Int64"), "y: row 1 holds nan; give every sample a class"),
        (pd.array(["a", None], dtype="string"), "y: row 1 holds <NA>; give every sample a class"),
        (pd.array([True, None], dtype="boolean"), "y: row 1 holds nan; give every sample a class"),
        ([pd.NA, 1, 2], "y: row 0 holds <NA>; give every sample a class"),
        (pd.Categorical(["a", None]), "y: row 1 holds nan; give every sample a class"),
        ([0.0, np.inf], "y: row 1 holds inf; give every sample a class"),
        ([0.0, 0.5], "y: row 1 holds 0.5, no class: regression is not supported"),
        (np.array([1, 2.5], object), "y: row 1 holds 2.5, no class: regression is not supported"),
        ([1.0, 1e300], "y: row 1 holds 1e.300, too large for a class number"),
        ([1, 2**63], "y: row 1 holds 9.22.*, too large for a class number"),
        (np.array([1, 2**64 - 1], np.uint64), "y: row 1 holds 1844.*, too large for a class"),
        ([1, 2**70], "y: row 0 holds 1 .object., no class; give integers or strings"),
        ([0, "a"], "y: mixes int and str; give labels of one kind"),
        (np.array(["a", 1.5], object), "y: mixes float and str; give labels of one kind"),
        (
            np.eye(3),
            r"y: has shape \(3, 3\); several targets a sample .* are not supported: .*argm",
        ),
        ([[0, 1], [1, 0]], "several targets a sample .multi-label, one-hot. are not supported"),
        ([("a", "b"), ("c", "d")], "several targets a sample .multi-label, one-hot. are not supp"),
        ([[1], [1, 2]], "y: its 2 entries differ in shape"),
        (np.ones((3, 1)), r"y: has shape \(3, 1\); give one class a sample, shape \(3,\)"),
        ([1j, 2], "y: row 0 holds .*1j.* .complex128., no class; give integers or strings"),
        ([datetime.date(2020, 1, 1)] * 2, "y: row 0 holds datetime.date.*, no class; give integ"),
        ([], "y: is empty; give at least two samples"),
        ([5, 5, 5], "y: holds only class 5; give samples of at least two classes"),
        (["a"], "y: holds only class a; give samples of at least two classes"),
    ],
)
def test_what_is_no_class_is_refused_in_one_line(values, message):
    with pytest.raises(InputError, match=message) as caught:
        _encoded(values)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_no_warning_of_numpy_escapes():
    for values in ([1.0, 1e300], [1, 2**63], np.array([0, 1], np.float16)):
        try:
            check_labels(values, 2, InputError)
        except InputError:
            pass
