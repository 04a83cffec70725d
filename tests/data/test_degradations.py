"""The kinds of degradation that no calibration sees, against plain loops on single samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from iibalance.data.corruption import corrupt, random_corruptions
from iibalance.data.dataset import Batch, Split
from iibalance.data.degrade import CALIBRATION_KINDS, KINDS, check_amount, parse_degrade
from iibalance.errors import InputError
from iibalance.training.evaluation import degrade

UNSEEN = ("blur", "dropped", "gain")

#: What a sample may be: its layout (None: inferred), its shape, the shape it is degraded in, and
#: the axes of that along which it is blurred and loses a segment.
SAMPLES = {
    "vector": (None, (9,), (9,), [0]),
    "flattened": ("vector", (3, 4), (12,), [0]),
    "sequence": (None, (11, 3), (11, 3), [0]),
    "skeleton": (None, (7, 5, 3), (7, 5, 3), [0]),
    "square sequence": ("sequence", (6, 6), (6, 6), [0]),
    "grey image": (None, (7, 7), (7, 7), [0, 1]),
    "oblong image": ("image", (5, 8), (5, 8), [0, 1]),
    "channels first": (None, (3, 6, 8), (3, 6, 8), [1, 2]),
    "channels last": ("image", (6, 8, 3), (6, 8, 3), [0, 1]),
    "video": (None, (5, 6, 7), (5, 6, 7), [0]),
    "colour video": (None, (5, 3, 6, 8), (5, 3, 6, 8), [0]),
    "raw": ("raw", (11, 3), (11, 3), [0]),
}
EVERY = pytest.mark.parametrize("sample", SAMPLES)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _batch(shape: tuple[int, ...], count: int = 60, missing: float = 0.25) -> Batch:
    """A modality ``x``, standard normal, 0 where it is missing, and ``y`` beside it."""
    mask = torch.rand(count, 2, generator=_generator(1)) >= missing
    mask[:, 1] = True
    x = torch.randn(count, *shape, generator=_generator(2))
    x[~mask[:, 0]] = 0
    y = torch.randn(count, 4, generator=_generator(3))
    return Batch({"x": x, "y": y}, torch.arange(count), mask)


def _rows(batch: Batch, fraction: float, seed: int = 0) -> set[int]:
    """The rows that ``missing`` is done to."""
    after = corrupt(batch, "x", "missing", fraction=fraction, generator=_generator(seed))
    return set((batch.mask[:, 0] & ~after.mask[:, 0]).nonzero().flatten().tolist())


def _smooth(values: np.ndarray, axis: int, width: float) -> np.ndarray:
    """A Gaussian cut at four standard deviations, one position and one offset at a time."""
    reach, size = int(4 * width + 0.5), values.shape[axis]
    found = np.zeros(values.shape)
    for at in np.ndindex(*values.shape):
        total = 0.0
        for offset in range(-reach, reach + 1):
            weight = math.exp(-(offset**2) / (2 * width**2))
            near = list(at)
            near[axis] = min(max(at[axis] + offset, 0), size - 1)
            found[at] += weight * values[tuple(near)]
            total += weight
        found[at] /= total
    return found


@EVERY
@pytest.mark.parametrize("width", [0.6, 1.5, 4.0])
def test_blur_is_a_gaussian_along_the_axes_of_its_layout(sample, width):
    layout, shape, taken, axes = SAMPLES[sample]
    batch = _batch(shape, 12)
    how = {"fraction": 0.5, "strength": width, "layout": layout}
    after = corrupt(batch, "x", "blur", generator=_generator(), **how).inputs["x"]
    rows = _rows(batch, 0.5)
    assert len(rows) == int(0.5 * int(batch.mask[:, 0].sum()) + 0.5) > 2
    for row in range(12):
        expected = batch.inputs["x"][row].double().numpy().reshape(taken)
        if row in rows:
            for axis in axes:
                expected = _smooth(expected, axis, width)
        found = after[row].double().numpy().reshape(taken)
        np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("width", [0.05, 0.125, 2.0, 30.0, 1000.0])
def test_blur_is_that_of_scipy_however_wide(width):
    batch = _batch((40, 2), 8, missing=0.0)
    how = {"fraction": 1.0, "strength": width, "generator": _generator()}
    found = corrupt(batch, "x", "blur", **how).inputs["x"].numpy()
    values = batch.inputs["x"].double().numpy()
    expected = gaussian_filter1d(values, width, axis=1, mode="nearest")
    np.testing.assert_allclose(found, expected, atol=2e-6)
    if width == 1000.0:  # half of the first frame, half of the last, nearly
        ends = (values[:, :1] + values[:, -1:]) / 2
        assert np.abs(found - ends).max() < 0.1


def test_blur_of_a_single_frame_changes_nothing():
    batch = _batch((1, 5), 20)
    after = corrupt(batch, "x", "blur", fraction=1.0, layout="sequence", generator=_generator())
    torch.testing.assert_close(after.inputs["x"], batch.inputs["x"])


@EVERY
@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0])
def test_dropped_is_one_segment_of_the_mean(sample, strength):
    layout, shape, taken, axes = SAMPLES[sample]
    batch = _batch(shape, 40)
    how = {"fraction": 0.5, "strength": strength, "layout": layout}
    after = corrupt(batch, "x", "dropped", generator=_generator(), **how).inputs["x"]
    rows = _rows(batch, 0.5)
    share = strength / (1 + strength)
    lengths = [int(share ** (1 / len(axes)) * taken[axis] + 0.5) for axis in axes]
    assert 0 < lengths[0] < taken[axes[0]]
    seen = set()
    for row in range(40):
        was, found = (v[row].numpy().reshape(taken) for v in (batch.inputs["x"], after))
        if row not in rows:
            assert np.array_equal(found, was)
            continue
        # The places that hold the mean: a box, the whole of every axis that is not degraded.
        gone = np.argwhere(found == 0)
        low, high = gone.min(0), gone.max(0)
        sizes = dict(zip(axes, lengths))
        for axis, size in enumerate(taken):
            assert high[axis] - low[axis] + 1 == sizes.get(axis, size)
        box = tuple(slice(a, b + 1) for a, b in zip(low, high))
        assert not found[box].any()
        expected = was.copy()
        expected[box] = 0
        assert np.array_equal(found, expected)
        seen.add(tuple(low[axis] for axis in axes))
    assert len(seen) > 1
    box = math.prod(lengths) / math.prod(taken[axis] for axis in axes)
    assert abs(box - share) < 1 / min(taken[axis] for axis in axes)


def test_a_segment_begins_anywhere_alike_and_may_be_everything():
    batch = _batch((10, 2), 7000, missing=0.0)
    how = {"fraction": 1.0, "generator": _generator()}
    after = corrupt(batch, "x", "dropped", strength=1.5, **how).inputs["x"]  # 6 of 10 frames
    starts = (after[:, :, 0] == 0).int().argmax(1).bincount(minlength=10)
    assert starts[5:].sum() == 0 and (starts[:5] - 1400).abs().max() < 130
    after = corrupt(batch, "x", "dropped", strength=1e6, **how).inputs["x"]
    assert not after.any()


@EVERY
@pytest.mark.parametrize("strength", [0.3, 3.0, 6.0])
def test_gain_is_one_factor_a_sample(sample, strength):
    layout, shape, _, _ = SAMPLES[sample]
    batch = _batch(shape, 200)
    how = {"fraction": 0.5, "strength": strength, "layout": layout}
    after = corrupt(batch, "x", "gain", generator=_generator(), **how).inputs["x"]
    rows, loud = _rows(batch, 0.5), 0
    for row in range(200):
        was = batch.inputs["x"][row].double()
        factors = [math.exp(strength / 3), math.exp(-strength / 3)] if row in rows else [1.0]
        near = [torch.allclose(after[row].double(), f * was, atol=1e-5) for f in factors]
        assert any(near)
        loud += row in rows and near[0]
    assert abs(loud - len(rows) / 2) < 2.6 * math.sqrt(len(rows)) / 2


def test_at_strength_3_gain_is_a_factor_e():
    batch = _batch((4,), 100, missing=0.0)
    after = corrupt(batch, "x", "gain", fraction=1.0, generator=_generator()).inputs["x"]
    ratio = (after / batch.inputs["x"]).log()
    torch.testing.assert_close(ratio.abs(), torch.ones_like(ratio), atol=1e-4, rtol=0)
    assert {-1, 1} == set(ratio.sign().flatten().tolist())


@EVERY
@pytest.mark.parametrize("kind", UNSEEN)
def test_a_kind_touches_its_rows_and_nothing_else_and_nothing_at_strength_0(sample, kind):
    layout, shape, _, _ = SAMPLES[sample]
    batch = _batch(shape)
    before = {name: values.clone() for name, values in batch.inputs.items()}
    for fraction, strength in itertools.product((0.0, 0.3, 1.0), (0.0, 3.0)):
        how = {"fraction": fraction, "strength": strength, "layout": layout}
        after = corrupt(batch, "x", kind, generator=_generator(5), **how)
        again = corrupt(batch, "x", kind, generator=_generator(5), **how)
        assert torch.equal(after.inputs["x"], again.inputs["x"])
        assert after.inputs["x"].dtype == torch.float32
        assert torch.equal(after.mask, batch.mask) and torch.equal(after.targets, batch.targets)
        assert torch.equal(after.inputs["y"], before["y"])
        changed = (after.inputs["x"] != before["x"]).flatten(1).any(1)
        rows = _rows(batch, fraction, 5) if strength else set()
        assert set(changed.nonzero().flatten().tolist()) == rows
    for name, values in before.items():
        assert torch.equal(batch.inputs[name], values)


def test_every_kind_is_done_to_the_same_rows():
    batch = _batch((6, 3), 300)
    split = Split(*batch[:3])
    rows = _rows(batch, 0.4, seed=8)
    assert len(rows) == int(0.4 * int(batch.mask[:, 0].sum()) + 0.5)
    for kind in KINDS:
        after = degrade(split, "x", kind, fraction=0.4, seed=8)
        changed = (after.inputs["x"] != batch.inputs["x"]).flatten(1).any(1)
        assert set(changed.nonzero().flatten().tolist()) == rows


def test_of_what_is_not_standardised_the_mean_is_that_of_the_samples():
    """A sequence in its own units: 100 in one channel and -20 in the other, give or take."""
    batch = _batch((8, 2), 50)
    units = torch.tensor([3.0, 0.5])
    present = batch.mask[:, 0]
    values = batch.inputs["x"] * units + torch.tensor([100.0, -20.0])
    values[~present] = 0
    batch = Batch({**batch.inputs, "x": values}, batch.targets, batch.mask)
    mean = values[present].double().mean((0, 1))
    assert (mean - torch.tensor([100.0, -20.0])).abs().max() < 1
    how = {"fraction": 1.0, "scale": {"x": units[None]}, "strength": 1.0}

    found = corrupt(batch, "x", "dropped", generator=_generator(), **how).inputs["x"]
    gone = (found != values).any(2)
    assert torch.equal(gone.sum(1), 4 * present)  # half of 8 frames
    for frame in found[gone].double():
        torch.testing.assert_close(frame, mean, atol=1e-4, rtol=0)

    found = corrupt(batch, "x", "gain", generator=_generator(), **how).inputs["x"][present].double()
    far = values[present].double() - mean
    factor = ((found - mean) / far).flatten(1).median(1).values.log()
    torch.testing.assert_close(factor.abs(), torch.full_like(factor, 1 / 3), atol=1e-3, rtol=0)
    expected = mean + far * factor.exp()[:, None, None]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)

    plain = corrupt(batch, "x", "blur", fraction=1.0, strength=1.0, generator=_generator())
    found = corrupt(batch, "x", "blur", generator=_generator(), **how)
    assert torch.equal(found.inputs["x"], plain.inputs["x"])  # a mean of neighbours has no unit
    for kind in UNSEEN:
        same = corrupt(batch, "x", kind, generator=_generator(), **{**how, "strength": 0.0})
        assert torch.equal(same.inputs["x"], values)


def test_a_vector_in_its_own_units_has_a_mean_a_feature():
    batch = _batch((2, 3), 30, missing=0.0)
    values = batch.inputs["x"] + 10 * torch.arange(6.0).view(2, 3)
    batch = Batch({**batch.inputs, "x": values}, batch.targets, batch.mask)
    how = {"fraction": 1.0, "scale": {"x": torch.ones(2, 3)}, "layout": "vector", "strength": 1.0}
    found = corrupt(batch, "x", "dropped", generator=_generator(), **how).inputs["x"].flatten(1)
    mean = values.double().mean(0).flatten().float()
    gone = found == mean
    assert torch.equal(gone.sum(1), torch.full((30,), 3))
    assert torch.equal(found[~gone], values.flatten(1)[~gone])


def test_a_run_of_token_ids_becomes_padding():
    ids = 1 + torch.arange(30 * 12).view(30, 12)
    batch = Batch({"text": ids}, torch.arange(30), torch.ones(30, 1) > 0)
    found = corrupt(batch, "text", "dropped", fraction=0.5, strength=1.0, generator=_generator())
    found = found.inputs["text"]
    gone = found == 0
    assert found.dtype == torch.int64 and gone.any(1).sum() == 15
    assert torch.equal(found[~gone], ids[~gone])
    for row in gone[gone.any(1)]:
        places = row.nonzero().flatten()
        assert len(places) == 6 and places[-1] - places[0] == 5
    same = corrupt(batch, "text", "dropped", fraction=1.0, strength=0.0, generator=_generator())
    assert torch.equal(same.inputs["text"], ids)
    raw = {"text": torch.ones(1)}  # what a standardizer has of ids that it was not fitted on
    assert torch.equal(
        corrupt(
            batch, "text", "dropped", fraction=0.5, strength=1.0, generator=_generator(), scale=raw
        ).inputs["text"],
        found,
    )


@pytest.mark.parametrize(
    ("values", "kinds", "holds", "choose"),
    [
        (torch.ones(4, 6, dtype=torch.int64), ("blur", "gain"), "ids", "dropped"),
        (torch.ones(4, 6, 2, dtype=torch.uint8), UNSEEN, "ids", "shuffled"),
        ({"ids": torch.ones(4, 6)}, UNSEEN, "fields", "shuffled"),
        (
            torch.ones(4, 2, 3, 2, 2),
            ("blur", "dropped"),
            r"samples of shape \(2, 3, 2, 2\)",
            "gain",
        ),
    ],
    ids=["tokens", "raw bytes", "fields", "no layout"],
)
def test_what_has_no_such_kind_is_refused_and_the_advice_works(values, kinds, holds, choose):
    batch = Batch({"text": values}, torch.arange(4), torch.ones(4, 1) > 0)
    for kind in kinds:
        said = (
            rf"^degrade: '{kind}' of 'text' is not defined: it holds {holds}.*; choose .*{choose}$"
        )
        with pytest.raises(InputError, match=said) as caught:
            corrupt(batch, "text", kind, fraction=0.0, generator=_generator())
        for advised in str(caught.value).rpartition("choose ")[2].split(", "):
            corrupt(batch, "text", advised, generator=_generator())


def test_a_layout_must_exist_and_fit():
    for layout, said in {"smell": "'smell' is none of", "video": "takes samples of 3 or 4"}.items():
        with pytest.raises(InputError, match=said):
            corrupt(_batch((5, 2)), "x", "blur", layout=layout, generator=_generator())


def test_words_and_amounts_are_refused_with_every_kind_there_is():
    every = "'fog' is none of noise, missing, shuffled, blur, dropped, gain$"
    with pytest.raises(InputError, match=every):
        corrupt(_batch((3,)), "x", "fog", generator=_generator())
    with pytest.raises(InputError, match=every):
        parse_degrade("x=fog", ["x"])
    for kind in KINDS:
        assert parse_degrade(f"x={kind}", ["x"]) == ("x", kind)
    for kind, most in (("gain", "100"), ("blur", "10000")):
        said = f"^strength: .* is too much for '{kind}'; give at most {most}$"
        with pytest.raises(InputError, match=said):
            check_amount(0.5, 1.01 * float(most), kind)
        with pytest.raises(InputError, match=said):
            corrupt(_batch((3,)), "x", kind, strength=1e30, generator=_generator())
        how = {"strength": float(most), "fraction": 1.0, "generator": _generator()}
        assert corrupt(_batch((3,)), "x", kind, **how).inputs["x"].isfinite().all()
    check_amount(0.5, 1e30, "noise")
    with pytest.raises(InputError, match="strength: -1"):
        check_amount(0.5, -1, "gain")


def test_calibration_never_sees_them():
    assert CALIBRATION_KINDS == ("noise", "missing", "shuffled")
    assert KINDS == (*CALIBRATION_KINDS, *UNSEEN)
    batch = _batch((6, 3), 200)
    for kind in UNSEEN:
        with pytest.raises(InputError, match=f"'{kind}' is none of noise, missing, shuffled$"):
            random_corruptions(batch, kinds=[kind], generator=_generator())
    named = random_corruptions(batch, kinds=CALIBRATION_KINDS, generator=_generator())
    default = random_corruptions(batch, generator=_generator())
    assert torch.equal(named.inputs["x"], default.inputs["x"])


def test_degrade_hands_the_layout_on():
    batch = _batch((6, 6), 20, missing=0.0)
    split = Split(*batch[:3])
    how = {"fraction": 1.0, "strength": 1.0}
    found = {
        layout: degrade(split, "x", "blur", layout=layout, **how).inputs["x"]
        for layout in (None, "sequence", "image")
    }
    assert torch.equal(found[None], found["image"])  # as its shape has it
    values = batch.inputs["x"].double().numpy()
    frames = gaussian_filter1d(values, 1.0, axis=1, mode="nearest")
    np.testing.assert_allclose(found["sequence"].numpy(), frames, atol=2e-6)
