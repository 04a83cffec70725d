"""Corruptions touch what they say, only that, and never empty a sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iibalance.data.corruption import corrupt, drop_modalities, random_corruptions
from iibalance.data.dataset import Batch, Split
from iibalance.data.degrade import CALIBRATION_KINDS, parse_degrade
from iibalance.errors import InputError
from iibalance.training.evaluation import degrade


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _batch(count: int = 200, missing: float = 0.0, modalities: int = 3, seed: int = 0) -> Batch:
    """Every row has values of its own (row + 1), which tell a stranger's; missing ones are 0."""
    mask = torch.rand(count, modalities, generator=_generator(seed)) >= missing
    mask[torch.arange(count), torch.arange(count) % modalities] = True
    shapes = [(4,), (3, 2), (2, 2, 2)][:modalities]
    rows = torch.arange(1.0, count + 1)
    inputs = {}
    for column, shape in enumerate(shapes):
        values = rows.view(-1, *[1] * len(shape)).expand(-1, *shape).clone()
        values[~mask[:, column]] = 0
        inputs["abc"[column]] = values
    return Batch(inputs, torch.arange(count), mask)


def _copy(batch: Batch) -> Batch:
    return Batch(
        {name: values.clone() for name, values in batch.inputs.items()},
        batch.targets.clone(),
        batch.mask.clone(),
    )


def _same(first: Batch, second: Batch) -> bool:
    return (
        all(torch.equal(first.inputs[name], second.inputs[name]) for name in first.inputs)
        and torch.equal(first.mask, second.mask)
        and torch.equal(first.targets, second.targets)
    )


def _changed(before: Batch, after: Batch, name: str) -> torch.Tensor:
    return (before.inputs[name] != after.inputs[name]).flatten(1).any(1)


@pytest.mark.parametrize("kind", CALIBRATION_KINDS)
def test_corrupt_changes_the_fraction_and_nothing_else(kind):
    batch = _batch()
    before = _copy(batch)
    after = corrupt(batch, "b", kind, fraction=0.3, generator=_generator())
    assert _same(batch, before)
    changed = _changed(batch, after, "b")
    assert changed.sum() == 60
    assert (
        not _changed(batch, after, "a").any()
        and not _changed(batch, after, "c").any()
        and torch.equal(after.targets, batch.targets)
    )
    assert torch.equal(
        ~after.mask[:, 1], changed if kind == "missing" else torch.zeros(200, dtype=torch.bool)
    )
    assert after.mask[:, [0, 2]].all()
    assert _same(after, corrupt(batch, "b", kind, fraction=0.3, generator=_generator()))
    assert not torch.equal(
        changed,
        _changed(batch, corrupt(batch, "b", kind, fraction=0.3, generator=_generator(1)), "b"),
    )
    for other in CALIBRATION_KINDS:  # the same samples whatever is done to them
        assert torch.equal(
            changed,
            _changed(batch, corrupt(batch, "b", other, fraction=0.3, generator=_generator()), "b"),
        )


def test_noise_has_the_strength():
    batch = _batch(4000)
    noise = (
        corrupt(batch, "c", "noise", fraction=1.0, strength=2.5, generator=_generator()).inputs["c"]
        - batch.inputs["c"]
    )
    assert abs(noise.std() - 2.5) < 0.05 and abs(noise.mean()) < 0.05
    assert _same(
        batch, corrupt(batch, "c", "noise", fraction=1.0, strength=0.0, generator=_generator())
    )


def test_noise_leaves_missing_rows_at_zero():
    batch = _batch(missing=0.5)
    after = corrupt(batch, "a", "noise", fraction=1.0, generator=_generator())
    assert not after.inputs["a"][~batch.mask[:, 0]].any() and torch.equal(
        _changed(batch, after, "a"), batch.mask[:, 0]
    )


def test_missing_spares_a_last_modality():
    batch = _batch(missing=0.9)
    after = corrupt(batch, "a", "missing", fraction=1.0, generator=_generator())
    assert after.mask.any(1).all()
    only = batch.mask[:, 0] & (batch.mask.sum(1) == 1)
    assert only.any() and torch.equal(after.mask[:, 0], only) and not after.inputs["a"][~only].any()


def test_missing_of_the_only_modality_changes_nothing():
    batch = _batch(modalities=1)
    assert _same(batch, corrupt(batch, "a", "missing", fraction=1.0, generator=_generator()))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.floats(0, 1), st.floats(0, 0.9), st.integers(0, 1000))
def test_shuffled_is_a_derangement_of_present_rows(count, fraction, missing, seed):
    batch = _batch(count, missing, seed=seed)
    after = corrupt(batch, "a", "shuffled", fraction=fraction, generator=_generator(seed))
    present = batch.mask[:, 0]
    chosen = int(fraction * int(present.sum()) + 0.5)
    changed = _changed(batch, after, "a")
    assert changed.sum() == (chosen if present.sum() > 1 else 0) and not (changed & ~present).any()
    values = after.inputs["a"][changed, 0]
    if chosen > 1:
        assert sorted(values.tolist()) == sorted(batch.inputs["a"][changed, 0].tolist())
    assert (values > 0).all() and torch.equal(after.mask, batch.mask)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("d", "noise"), {}, "no modality 'd'; there are a, b, c"),
        (("a", "fog"), {}, "'fog' is none of noise, missing, shuffled, blur"),
        (("a", "noise"), {"fraction": 1.1}, "fraction: 1.1"),
        (("a", "noise"), {"strength": -1.0}, "strength: -1.0"),
        (("a", "noise"), {"strength": float("nan")}, "strength: nan"),
    ],
)
def test_corrupt_refuses(arguments, options, message):
    with pytest.raises(InputError, match=message):
        corrupt(_batch(), *arguments, generator=_generator(), **options)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 3),
    st.floats(0, 0.9),
    st.integers(0, 1000),
    st.sets(st.sampled_from(CALIBRATION_KINDS), min_size=1),
)
def test_random_corruptions_touch_one_present_modality_a_sample(
    count, modalities, missing, seed, kinds
):
    batch = _batch(count, missing, modalities, seed)
    before = _copy(batch)
    after = random_corruptions(batch, kinds=sorted(kinds), generator=_generator(seed))
    assert _same(batch, before) and _same(
        after, random_corruptions(batch, kinds=sorted(kinds), generator=_generator(seed))
    )
    changed = torch.stack([_changed(batch, after, name) for name in batch.inputs], 1)
    assert (changed.sum(1) <= 1).all() and not (changed & ~batch.mask).any()
    assert after.mask.any(1).all() and torch.equal(batch.mask & ~after.mask, changed & ~after.mask)
    for column, values in enumerate(after.inputs.values()):
        assert not values[~after.mask[:, column]].any()
    alone = batch.mask.sum(1) == 1
    assert torch.equal(after.mask[alone], batch.mask[alone])
    assert torch.equal(changed[alone].any(1), torch.full((int(alone.sum()),), "noise" in kinds))
    if kinds == {"missing"} or kinds == {"noise"} or kinds == {"noise", "missing"}:
        assert torch.equal(changed.any(1) | alone, torch.ones(count, dtype=torch.bool))


def test_random_corruptions_are_spread_evenly():
    batch = _batch(6000)
    after = random_corruptions(batch, generator=_generator(), max_strength=4.0)
    changed = torch.stack([_changed(batch, after, name) for name in batch.inputs], 1)
    assert changed.any(1).all() and (changed.sum(0) - 2000).abs().max() < 200
    missing = ~after.mask.all(1)
    values = after.inputs["a"]
    # Noise would differ between the four features
    stranger = changed[:, 0] & (values == values[:, :1]).all(1) & ~missing
    assert abs(int(missing.sum()) - 2000) < 200 and abs(int(stranger.sum()) - 667) < 100
    noisy = changed[:, 2] & ~missing & (after.inputs["c"].flatten(1).std(1) > 1e-6)
    levels = (after.inputs["c"] - batch.inputs["c"])[noisy].flatten(1).square().mean(1).sqrt()
    # Uniform in 0..4: root mean square 4 / sqrt(3)
    assert levels.max() < 10 and abs(levels.square().mean().sqrt() - 4 / 3**0.5) < 0.2
    assert levels.min() < 0.2


def test_random_corruptions_refuses():
    with pytest.raises(InputError, match="'blur' is none of"):
        random_corruptions(_batch(), kinds=["blur"], generator=_generator())
    with pytest.raises(InputError, match="kinds"):
        random_corruptions(_batch(), kinds=[], generator=_generator())
    with pytest.raises(InputError, match="max_strength: -1"):
        random_corruptions(_batch(), max_strength=-1, generator=_generator())


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.8, 1.0])
def test_dropout_never_empties_a_row_nor_adds(probability):
    mask = _batch(6000, missing=0.4).mask
    before = mask.clone()
    kept = drop_modalities(mask, probability, _generator(1))  # not the seed that made the mask
    assert torch.equal(mask, before) and kept.any(1).all() and not (kept & ~mask).any()
    full = kept[mask.all(1)]
    # The second term is the rescue of rows that lost all three, each modality alike
    expected = (1 - probability) + probability**3 / 3
    assert (full.float().mean(0) - expected).abs().max() < 0.04
    if probability == 0:
        assert torch.equal(kept, mask)


def test_dropout_leaves_an_empty_row_empty_and_refuses_no_probability():
    assert not drop_modalities(torch.zeros(3, 2, dtype=torch.bool), 0.5, _generator()).any()
    with pytest.raises(InputError, match="1.2 is no probability"):
        drop_modalities(torch.ones(3, 2, dtype=torch.bool), 1.2, _generator())


def test_parse_degrade():
    assert parse_degrade(" audio = missing", ["visual", "audio"]) == ("audio", "missing")
    for text, message in {
        "audio": "is not <modality>=<kind>, such as visual=noise",
        "x=noise": "no modality 'x'; there are visual, audio",
        "audio=fog": "'fog' is none of noise, missing, shuffled, blur",
    }.items():
        with pytest.raises(InputError, match=message):
            parse_degrade(text, ["visual", "audio"])


def _text(count: int = 400, length: int = 12, missing: float = 0.2) -> Batch:
    """Text of two fields and a number a sample, ids that tell row and position, and audio.

    The mask of a token is its id's sign turned, so that they can only move together.
    """
    mask = torch.rand(count, 2, generator=_generator(5)) >= missing
    mask[:, 1] = True
    ids = 1 + torch.arange(count)[:, None] * length + torch.arange(length)
    text = {"ids": ids, "mask": -ids, "pairs": torch.stack([ids, ids], 2), "size": ids[:, 0] * 3}
    text = {field: values.clone() for field, values in text.items()}
    for values in text.values():
        values[~mask[:, 0]] = 0
    inputs = {"text": text, "audio": torch.randn(count, 3, generator=_generator(6))}
    return Batch(inputs, torch.arange(count), mask)


def _moved(before: Batch, after: Batch) -> torch.Tensor:
    """[N, T] bool: the positions that hold another sample's token, all fields of them."""
    was, text = before.inputs["text"], after.inputs["text"]
    assert torch.equal(text["mask"], -text["ids"])
    assert torch.equal(text["pairs"], torch.stack([text["ids"], text["ids"]], 2))
    changed = text["ids"] != was["ids"]
    there = text["ids"] > 0  # position t of any row: tokens keep their place
    length = was["ids"].shape[1]
    place = torch.arange(length).expand_as(text["ids"])
    assert torch.equal((text["ids"] - 1)[there] % length, place[there])
    return changed


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 3.0])
def test_noise_takes_a_share_of_the_positions_from_another_sample(strength):
    batch = _text()
    after = corrupt(batch, "text", "noise", fraction=0.5, strength=strength, generator=_generator())
    changed = _moved(batch, after)
    present = batch.mask[:, 0]
    count = int(0.5 * int(present.sum()) + 0.5)
    assert not changed[~present].any() and not after.inputs["text"]["ids"][~present].any()
    noisy = changed.any(1)
    assert noisy.sum() <= count and (strength == 0) == (not noisy.any())
    share = strength / (1 + strength)
    assert abs(float(changed.sum()) / (count * 12) - share) < 0.03
    # A row's strange tokens come from one other row, whose other tokens are not touched.
    strangers = (after.inputs["text"]["ids"] - 1) // 12
    for row in noisy.nonzero().flatten().tolist():
        source = strangers[row][changed[row]].unique()
        assert len(source) == 1 and present[source] and source != row
    assert torch.equal(after.mask, batch.mask)
    assert torch.equal(after.inputs["audio"], batch.inputs["audio"])


@pytest.mark.parametrize("kind", ["shuffled", "missing"])
def test_fields_are_shuffled_and_cleared_together(kind):
    batch = _text()
    after = corrupt(batch, "text", kind, fraction=0.5, generator=_generator())
    changed = _moved(batch, after)
    rows = changed.any(1)
    assert torch.equal(changed, rows[:, None].expand_as(changed))  # whole rows
    size, ids = after.inputs["text"]["size"], after.inputs["text"]["ids"]
    assert torch.equal(size, ids[:, 0] * 3) and rows.sum() == int(
        0.5 * batch.mask[:, 0].sum() + 0.5
    )
    if kind == "missing":
        assert torch.equal(~after.mask[:, 0] & batch.mask[:, 0], rows) and not ids[rows].any()
    else:
        assert torch.equal(after.mask, batch.mask)
        moved = batch.inputs["text"]["ids"]
        assert sorted(ids[rows, 0].tolist()) == sorted(moved[rows, 0].tolist())


def test_random_corruptions_of_fields():
    batch = _text(3000)
    before = {field: values.clone() for field, values in batch.inputs["text"].items()}
    after = random_corruptions(batch, generator=_generator(), max_strength=4.0)
    for field, values in before.items():
        assert torch.equal(batch.inputs["text"][field], values)
    changed = _moved(batch, after)
    gone = batch.mask[:, 0] & ~after.mask[:, 0]
    assert not after.inputs["text"]["ids"][~after.mask[:, 0]].any()
    whole = changed.all(1) & ~gone
    part = changed.any(1) & ~changed.all(1)
    both = batch.mask.all(1)
    # Half of those that have both get it in text, a third of these by each kind.
    for rows in (gone, whole & both, part & both):
        assert abs(float(rows[both].double().mean()) - 1 / 6) < 0.05
    # Of a strength uniform in 0..4 the share s / (1 + s) has the mean 1 - ln(5) / 4.
    noisy = part | (changed.any(1) & ~gone & ~whole)
    assert abs(float(changed[noisy].double().mean()) - (1 - np.log(5) / 4)) < 0.05


def test_noise_of_one_sample_among_others_and_of_the_only_one():
    batch = _text(10, missing=0.0)
    after = corrupt(batch, "text", "noise", fraction=0.1, strength=1e6, generator=_generator())
    assert _moved(batch, after).all(1).sum() == 1
    lonely = Batch(
        {"ids": torch.arange(6).view(2, 3)}, torch.arange(2), torch.tensor([[True], [False]])
    )
    for kind in ("noise", "shuffled"):
        done = corrupt(lonely, "ids", kind, fraction=1.0, generator=_generator())
        assert torch.equal(done.inputs["ids"], lonely.inputs["ids"])
    done = random_corruptions(lonely, generator=_generator())
    assert torch.equal(done.inputs["ids"], lonely.inputs["ids"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_ids_keep_their_type(dtype):
    ids = torch.randint(0, 2, (50, 4), generator=_generator()).to(dtype)
    batch = Batch({"ids": ids}, torch.arange(50), torch.ones(50, 1, dtype=torch.bool))
    for kind in CALIBRATION_KINDS:
        after = corrupt(batch, "ids", kind, fraction=1.0, generator=_generator()).inputs["ids"]
        assert after.dtype == dtype and set(after.flatten().tolist()) <= set(ids.flatten().tolist())


#: Sum of the values, and how many are present, of the version that the tables were made with.
PUBLISHED = {
    "noise": (3785.7055, 94),
    "missing": (1980.0, 79),
    "shuffled": (3786.0, 94),
    "random": (9680.0780, 79),
}


def test_numbers_are_degraded_as_published():
    """What every table of results was made with: the very draws of each kind of corruption."""
    batch = _batch(40, missing=0.3)
    found = {}
    for kind in CALIBRATION_KINDS:
        after = corrupt(batch, "b", kind, generator=_generator(3))
        found[kind] = float(after.inputs["b"].double().sum()), int(after.mask.sum())
    after = random_corruptions(batch, generator=_generator(3))
    total = sum(float(values.double().sum()) for values in after.inputs.values())
    found["random"] = total, int(after.mask.sum())
    for kind, (total, present) in PUBLISHED.items():
        assert found[kind][1] == present and found[kind][0] == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("function", [corrupt, random_corruptions])
def test_noise_is_measured_by_the_scale_of_a_modality(function):
    """The same draws, times the scale of each feature; other modalities are left alone."""
    how = {"modality": "a", "kind": "noise"} if function is corrupt else {"kinds": ["noise"]}
    batch = _batch()
    scale = {"a": torch.tensor([0.0, 1.0, 1000.0, 0.001])}
    plain = function(batch, **how, generator=_generator())
    scaled = function(batch, **how, generator=_generator(), scale=scale)
    noise = plain.inputs["a"].double() - batch.inputs["a"]
    found = scaled.inputs["a"].double() - batch.inputs["a"]
    assert int((noise != 0).sum()) > 200
    torch.testing.assert_close(found, noise * scale["a"], rtol=1e-2, atol=1e-4)
    assert torch.equal(scaled.inputs["b"], plain.inputs["b"])


def test_splits_hand_their_scale_on():
    scale = {"a": torch.tensor([2.0]), "b": torch.tensor([3.0])}
    batch = _batch(modalities=2)
    split = Split(batch.inputs, batch.targets, batch.mask, None, scale)
    for part in (split.subset([0, 1]), split.only("a"), degrade(split, "a", "noise")):
        assert part.scale is scale
