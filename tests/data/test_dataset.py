"""Layouts, standardisation, splits as batches, and what every source shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from iibalance.config import DataConfig
from iibalance.data import load_data
from iibalance.data.dataset import Split, identity
from iibalance.data.layouts import check_layout, infer_layout
from iibalance.data.samples import Samples
from iibalance.data.splits import hold_out, make_folds
from iibalance.data.standardize import Standardizer
from iibalance.errors import InputError


@pytest.mark.parametrize(
    "shape, dtype, layout",
    [
        ((7,), None, "vector"),
        ((28, 28), None, "image"),
        ((40, 26), None, "sequence"),
        ((1, 5), None, "sequence"),
        ((64, 1), None, "sequence"),
        ((3, 48, 48), None, "image"),
        ((1, 28, 30), None, "image"),
        ((1, 4, 4), None, "image"),
        ((32, 20, 3), np.float16, "sequence"),
        ((32, 20, 3), np.uint8, "image"),
        ((32, 20, 3), torch.uint8, "image"),
        ((32, 20, 3), torch.float32, "sequence"),
        ((32, 32, 3), None, "image"),
        ((16, 30, 40), None, "video"),
        ((8, 3, 32, 32), None, "video"),
        ((8, 32, 30, 3), None, "video"),
    ],
)
def test_layout_rules(shape, dtype, layout):
    assert infer_layout(shape, dtype) == layout
    check_layout(shape, layout)


@pytest.mark.parametrize(
    "shape", [(), (0,), (3, 0), (3, 48, 3), (8, 3, 32, 3), (8, 32, 32, 32), (2, 3, 4, 5, 6)]
)
def test_layout_that_cannot_be_told_is_an_error(shape):
    with pytest.raises(InputError):
        infer_layout(shape)


def test_doubtful_layout_error_gives_the_remedy():
    with pytest.raises(
        InputError,
        match=r"\(3, 48, 3\).*pass its layout \(vector, sequence, image, video\) "
        "or bring your own encoder",
    ):
        infer_layout((3, 48, 3))


@pytest.mark.parametrize(
    "shape, layout, over",
    [
        ((5,), "vector", (0,)),
        ((2, 3), "vector", (0,)),
        ((6, 5), "sequence", (0, 1)),
        ((6, 5, 3), "sequence", (0, 1)),
        ((6, 6), "image", (0, 1, 2)),
        ((3, 6, 7), "image", (0, 2, 3)),
        ((6, 7, 3), "image", (0, 1, 2)),
        ((6, 7, 8), "image", (0, 2, 3)),
        ((5, 6, 7), "video", (0, 1, 2, 3)),
        ((5, 3, 6, 7), "video", (0, 1, 3, 4)),
        ((5, 6, 7, 3), "video", (0, 1, 2, 3)),
    ],
)
def test_standardizer_matches_numpy(shape, layout, over):
    values = np.random.default_rng(0).normal(3, 2, (2500, *shape)) * (
        1 + np.arange(np.prod(shape)).reshape(shape)
    )
    present = np.random.default_rng(1).random(2500) < 0.7
    inputs, mask = {"a": torch.from_numpy(values)}, torch.from_numpy(present)[:, None]
    inputs["a"][~mask[:, 0]] = float("nan")
    standardizer = Standardizer({"a": shape}, {"a": layout}).fit(inputs, mask)
    kept = values[present]
    np.testing.assert_allclose(standardizer.mean_a, kept.mean(over, keepdims=True)[0], rtol=1e-5)
    np.testing.assert_allclose(standardizer.std_a, kept.std(over, keepdims=True)[0], rtol=1e-5)
    output = standardizer.transform(inputs, mask)["a"]
    assert (
        output.dtype == torch.float32 and not output[~mask[:, 0]].any() and output.isfinite().all()
    )
    np.testing.assert_allclose(output[mask[:, 0]].double().mean(over), 0, atol=1e-5)
    np.testing.assert_allclose(output[mask[:, 0]].double().std(over, correction=0), 1, rtol=1e-4)
    assert inputs["a"].isnan().any()  # the input is as it was


def test_standardizer_leaves_constant_and_nearly_constant_features_alone():
    values = torch.zeros(1000, 4, dtype=torch.float64)
    values[:, 0] = 7.0
    values[:, 1] = 1e6 + 1e-3 * torch.randn(1000)  # below what float32 resolves beside 1e6
    values[:, 2] = 1e-30 * torch.randn(1000)
    values[:, 3] = torch.randn(1000)
    standardizer = Standardizer({"a": (4,)}).fit(
        {"a": values.float()}, torch.ones(1000, 1, dtype=torch.bool)
    )
    assert (
        standardizer.std_a[:3].tolist() == [1.0, 1.0, 1.0] and abs(standardizer.std_a[3] - 1) < 0.1
    )
    unusual = standardizer.transform(
        {"a": torch.tensor([[8.0, 1e6 + 1, 1.0, 0.0]])}, torch.ones(1, 1, dtype=torch.bool)
    )["a"]
    assert unusual.abs().max() < 3


def test_transform_leaves_its_input_alone():
    inputs, mask = {"a": torch.ones(3, 2)}, torch.tensor([[True], [False], [True]])
    Standardizer({"a": (2,)}).fit(
        {"a": torch.randn(9, 2)}, torch.ones(9, 1, dtype=torch.bool)
    ).transform(inputs, mask)
    assert torch.equal(inputs["a"], torch.ones(3, 2))


def test_standardizer_keeps_small_units():
    values = 1e-6 * torch.randn(500, 3)  # volts, say: small is not constant
    standardizer = Standardizer({"a": (3,)}).fit(
        {"a": values}, torch.ones(500, 1, dtype=torch.bool)
    )
    assert (standardizer.std_a < 2e-6).all()


def test_standardizer_reads_its_state_back_from_shapes_alone(tmp_path):
    from safetensors.torch import load_file, save_file

    shapes = {"audio": (6, 5), "view-1": (4,), "image": (3, 8, 8)}
    inputs = {name: 2 + 3 * torch.randn(50, *shape) for name, shape in shapes.items()}
    mask = torch.ones(50, 3, dtype=torch.bool)
    first = Standardizer(shapes).fit(inputs, mask)
    save_file(first.state_dict(), tmp_path / "s.safetensors")
    second = Standardizer(shapes)
    second.load_state_dict(load_file(tmp_path / "s.safetensors"))
    for name, values in first.transform(inputs, mask).items():
        assert torch.equal(values, second.transform(inputs, mask)[name])


def test_standardizer_without_a_row_names_the_modality():
    with pytest.raises(InputError, match="b: missing in every training sample"):
        Standardizer({"a": (2,), "b": (2,)}).fit(
            {"a": torch.ones(3, 2), "b": torch.ones(3, 2)}, torch.tensor([[True, False]] * 3)
        )


def _split(count: int = 7) -> Split:
    rows = torch.arange(float(count))
    return Split(
        {
            "a": rows[:, None].expand(-1, 3).contiguous(),
            "b": rows[:, None, None].expand(-1, 2, 2).contiguous(),
        },
        torch.arange(count),
        torch.ones(count, 2, dtype=torch.bool),
        torch.arange(count) * 10,
    )


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_loader_fetches_whole_batches(workers, monkeypatch):
    split = _split()
    monkeypatch.setattr(Split, "__getitem__", lambda *_: pytest.fail("one sample at a time"))
    batches = list(DataLoader(split, batch_size=3, collate_fn=identity, num_workers=workers))
    assert [batch.targets.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    for batch in batches:
        assert batch.inputs["a"].shape == (len(batch.targets), 3) and batch.inputs["b"].shape == (
            len(batch.targets),
            2,
            2,
        )
        assert torch.equal(
            batch.inputs["b"][:, 1, 1], batch.targets.float()
        ) and batch.mask.shape == (len(batch.targets), 2)


def test_split_items_subset_and_batch():
    split = _split()
    assert torch.utils.data.default_collate([split[4], split[1]]).inputs["a"].tolist() == [
        [4.0] * 3,
        [1.0] * 3,
    ]
    for indices in ([5, 0], torch.tensor([5, 0]), np.array([5, 0])):
        part = split.subset(indices)
        assert (
            part.targets.tolist() == [5, 0]
            and part.groups.tolist() == [50, 0]
            and part.inputs["a"][:, 0].tolist() == [5.0, 0.0]
        )
    assert split.subset(split.targets > 4).targets.tolist() == [5, 6]
    assert len(split.subset([])) == 0
    assert split.batch().inputs["a"].data_ptr() == split.inputs["a"].data_ptr() and len(split) == 7
    with pytest.raises(IndexError):
        split[7]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=8), st.floats(0.01, 0.99), st.integers(0, 5)
)
def test_hold_out_is_stratified_and_spares_every_class(sizes, fraction, seed):
    targets = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    held = hold_out(targets, fraction, seed=seed)
    assert np.array_equal(held, hold_out(targets, fraction, seed=seed))
    for label, size in enumerate(sizes):
        count = held[targets == label].sum()
        assert count <= size - 1 and (abs(count - fraction * size) <= 1 + 1e-6)
    assert abs(held.sum() - fraction * len(targets)) <= 1 + len(sizes)


def test_hold_out_depends_on_the_seed():
    targets = np.arange(200) % 4
    assert not np.array_equal(hold_out(targets, 0.3, seed=0), hold_out(targets, 0.3, seed=1))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.sampled_from([0.1, 0.2, 0.5]), st.integers(0, 5))
def test_hold_out_keeps_groups_whole(count, fraction, seed):
    groups = np.repeat(np.arange(count), 12)
    targets = np.tile(np.arange(3), 4 * count)
    held = hold_out(targets, fraction, seed=seed, groups=groups)
    assert (
        not set(groups[held]) & set(groups[~held])
        and held.any()
        and set(targets[~held]) == {0, 1, 2}
    )
    assert abs(held.mean() - max(fraction, 1 / count)) <= 1 / count


def test_hold_out_takes_the_groups_nearest_to_the_share():
    groups = np.repeat(np.arange(4), [15, 75, 75, 75])  # 6 % or 31 %
    targets = np.tile(np.arange(3), 80)
    for seed in range(4):
        assert hold_out(targets, 0.25, seed=seed, groups=groups).sum() == 75
        assert hold_out(targets, 0.15, seed=seed, groups=groups).sum() == 15


def test_hold_out_refuses_groups_that_cannot_be_divided():
    with pytest.raises(InputError, match="1 group cannot"):
        hold_out(np.array([0, 1, 0, 1]), 0.2, groups=np.zeros(4, int))
    with pytest.raises(InputError, match="every sample of some class"):
        hold_out(np.array([0, 0, 1, 1]), 0.5, groups=np.array([0, 0, 1, 1]))


def test_digits_views_are_as_strong_as_documented():
    from sklearn.linear_model import LogisticRegression

    data = load_data(DataConfig())
    for name, expected in {"pixels": 0.967, "fourier": 0.835, "shape": 0.774}.items():
        model = LogisticRegression(max_iter=2000).fit(data.train.inputs[name], data.train.targets)
        assert abs(model.score(data.test.inputs[name], data.test.targets) - expected) < 0.05, name


def test_digits_shape_view_counts_holes_and_strokes():
    from iibalance.data.digits import shape_view

    ring = np.zeros((1, 8, 8))
    ring[0, 2:6, 2:6] = 16
    ring[0, 3:5, 3:5] = 0
    view = shape_view(ring)[0]
    assert view[0] == 12 * 16 and view[6] == 1  # ink, one hole
    # Strokes met along its eight rows, and columns
    np.testing.assert_allclose(view[4:6], (1 + 2 + 2 + 1) / 8)
    np.testing.assert_allclose(view[1], view[2])
    np.testing.assert_allclose(view[3], 0, atol=1e-12)


def test_digits_are_deterministic_disjoint_and_standardised_on_training():
    data, again, other = (
        load_data(DataConfig()),
        load_data(DataConfig()),
        load_data(DataConfig(split_seed=1)),
    )
    assert torch.equal(data.test.inputs["pixels"], again.test.inputs["pixels"])
    assert not torch.equal(data.test.targets, other.test.targets)
    for name in data.modalities:
        mean = data.train.inputs[name].double().mean(0)
        assert mean.abs().max() < 1e-5
        # Not standardised with its own
        assert data.test.inputs[name].double().mean(0).abs().max() > 1e-3
    mean, std = data.standardizer.mean_pixels, data.standardizer.std_pixels
    raw = [part.inputs["pixels"] * std + mean for part in (data.train, data.validation, data.test)]
    from sklearn.datasets import load_digits

    ours = torch.cat(raw).round().numpy()
    # Each image once
    np.testing.assert_array_equal(
        np.sort(ours @ np.arange(1, 65)), np.sort(load_digits().data @ np.arange(1, 65))
    )


def test_train_fraction_keeps_every_class_and_fits_on_what_is_kept():
    data = load_data(DataConfig(train_fraction=0.1))
    full = load_data(DataConfig())
    assert abs(len(data.train) - 108) <= 1 and len(data.test) == len(full.test)
    assert torch.bincount(data.train.targets).min() >= 9
    assert data.train.inputs["shape"].mean(0).abs().max() < 1e-5
    assert (
        torch.bincount(load_data(DataConfig(train_fraction=0.0001)).train.targets).tolist()
        == [1] * 10
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "nope"}, "data.name: 'nope' is none of digits, npz"),
        ({"name": "digits", "path": "a.npz"}, "data.path: 'a.npz' is given, but the digits .* lea"),
        ({"groups": "writer"}, "data.groups"),
        ({"split": "mine"}, "data.split"),
        ({"modalities": "pixels,sound"}, "no 'sound'; there are pixels, fourier, shape"),
        ({"modalities": "pixels,pixels"}, "'pixels' is named twice"),
        ({"modalities": "pixels,,shape"}, "empty name"),
        ({"modalities": []}, "empty name"),
        (
            {"layouts": {"sound": "image"}},
            "data.layouts: 'sound' is no modality in use; there are pixels",
        ),
        ({"layouts": {"pixels": "cube"}}, "digits: pixels: layout 'cube' is none of vector"),
        (
            {"layouts": {"pixels": "video"}},
            "digits: pixels: layout 'video' takes samples of 3 or 4 dimensions, not of sh",
        ),
        ({"train_fraction": 0.0}, "data.train_fraction: 0.0"),
        ({"train_fraction": 1.5}, "data.train_fraction: 1.5"),
        ({"train_fraction": float("nan")}, "data.train_fraction: nan"),
        ({"split_seed": -1}, "data.split_seed: -1"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(InputError, match=message) as caught:
        load_data(DataConfig(**options))
    assert "\n" not in str(caught.value)


def test_a_trained_models_standardisation_takes_the_place_of_ones_own():
    full = load_data(DataConfig())
    few = load_data(DataConfig(train_fraction=0.1), standardizer=full.standardizer)
    assert few.standardizer is full.standardizer and few.layouts == full.layouts
    for name in full.modalities:
        assert torch.equal(few.test.inputs[name], full.test.inputs[name])
    other = load_data(DataConfig(train_fraction=0.1))
    assert not torch.equal(other.test.inputs["pixels"], full.test.inputs["pixels"])
    again = load_data(DataConfig(), standardizer=full.standardizer)  # fitted on the same rows
    assert torch.equal(again.train.inputs["shape"], full.train.inputs["shape"])


@pytest.mark.parametrize("asked", ["pixels", "shape,fourier,pixels"])
def test_a_trained_model_takes_its_own_modalities_in_its_own_order(asked):
    standardizer = load_data(DataConfig()).standardizer
    message = f"^digits has the modalities {asked.replace(',', ', ')}, the run pixels, fourier, sh"
    with pytest.raises(InputError, match=message):
        load_data(DataConfig(modalities=asked), standardizer=standardizer)


def test_modalities_keep_the_asked_order():
    data = load_data(DataConfig(modalities=["shape", "pixels"]))
    assert (
        data.modalities
        == tuple(data.train.inputs)
        == tuple(data.shapes)
        == tuple(data.layouts)
        == ("shape", "pixels")
    )


@pytest.mark.parametrize(
    "shape, layout", [((5,), "vector"), ((6, 5), "sequence"), ((3, 6, 7), "image")]
)
@pytest.mark.parametrize("size", [1, 7, 1024])
def test_statistics_of_batches_are_those_of_everything(shape, layout, size):
    random = np.random.default_rng(0)
    # Far from zero, and of sizes apart: what naive sums of squares lose.
    values = random.normal(1e4, 1, (300, *shape)) * (1 + np.arange(shape[-1])) ** 3
    words = torch.from_numpy(random.integers(0, 9, (300, 4)))
    inputs = {"a": torch.from_numpy(values), "words": words}
    mask = torch.from_numpy(random.random((300, 2)) < 0.7)
    mask[:40, 0] = False  # whole batches without it
    inputs["a"][~mask[:, 0]] = float("nan")
    make = lambda: Standardizer({"a": shape, "words": (4,)}, {"a": layout, "words": "tokens"})
    whole = make().fit(inputs, mask)
    blocks = torch.arange(300).split(size)
    batches = (({name: part[rows] for name, part in inputs.items()}, mask[rows]) for rows in blocks)
    found = make().fit_batches(batches)
    torch.testing.assert_close(found.mean_a, whole.mean_a, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.std_a, whole.std_a, rtol=1e-6, atol=0)
    kept = values[mask[:, 0].numpy()]
    axes = tuple(axis for axis, n in enumerate((1, *found.mean_a.shape)) if n == 1)
    np.testing.assert_allclose(found.std_a, kept.std(axes, keepdims=True)[0], rtol=1e-6)
    assert found.vocabularies == whole.vocabularies == {"words": 9}


def test_a_modality_that_no_batch_has_is_refused():
    standardizer = Standardizer({"a": (2,), "b": (2,)})
    batch = {"a": torch.ones(3, 2), "b": torch.ones(3, 2)}, torch.tensor([[True, False]] * 3)
    for fit in (lambda: standardizer.fit(*batch), lambda: standardizer.fit_batches([batch])):
        with pytest.raises(InputError, match="b: missing in every training sample; leave this mod"):
            fit()


def test_what_is_not_standardised_passes_as_it_is():
    shapes = {"bytes": (2, 2), "floats": (2,), "ids": (3,), "raw": (2,)}
    shapes["text"] = {"x": (2,), "y": ()}
    standardizer = Standardizer(
        shapes, {"bytes": "image", "ids": "tokens", "raw": "raw"}, off=("bytes", "floats", "text")
    )
    inputs = {
        "bytes": torch.full((3, 2, 2), 51, dtype=torch.uint8),
        "floats": torch.full((3, 2), 7.0, dtype=torch.float64),
        "ids": torch.tensor([[1, 2, 0], [3, 0, 0], [2, 9, 5]], dtype=torch.uint8),
        "raw": torch.full((3, 2), 200, dtype=torch.uint8),
        "text": {"x": torch.full((3, 2), 200, dtype=torch.uint8), "y": torch.tensor([True] * 3)},
    }
    mask = torch.tensor([[True] * 5, [True] * 5, [False] * 5])
    standardizer.fit(inputs, mask)
    out = standardizer.transform(inputs, mask)
    assert standardizer.vocabularies == {"ids": 4}
    torch.testing.assert_close(out["bytes"], 0.2 * mask[:, :1, None] * torch.ones(3, 2, 2))
    assert out["floats"].dtype == torch.float32
    assert out["floats"].tolist() == [[7, 7], [7, 7], [0, 0]]
    assert out["ids"].dtype == torch.int64
    assert out["ids"].tolist() == [[1, 2, 0], [3, 0, 0], [0, 0, 0]]
    assert out["raw"].dtype == torch.uint8 and out["raw"].tolist() == [[200, 200]] * 2 + [[0, 0]]
    assert out["text"]["x"].dtype == torch.uint8
    assert out["text"]["y"].tolist() == [True, True, False]
    assert int(inputs["raw"].min()) == 200 and int(inputs["ids"][2, 1]) == 9  # as they were
    everywhere = torch.ones(3, 5, dtype=torch.bool)
    assert standardizer.transform(inputs, everywhere)["ids"][2].tolist() == [2, 4, 4]
    wrong = {**inputs, "ids": inputs["ids"].int() - 1}
    with pytest.raises(InputError, match="ids: holds the token id -1; number tokens from 1, and"):
        standardizer.transform(wrong, mask)


def test_standardize_by_name_and_not_at_all():
    options = {"name": "digits"}
    raw = load_data(DataConfig(**options, standardize=False))
    some = load_data(DataConfig(**options, standardize=["fourier"]))
    full = load_data(DataConfig(**options))
    assert torch.equal(some.train.inputs["fourier"], full.train.inputs["fourier"])
    assert torch.equal(some.train.inputs["pixels"], raw.train.inputs["pixels"])
    assert raw.train.inputs["pixels"].max() == 16
    assert full.train.inputs["pixels"].mean().abs() < 1e-5
    with pytest.raises(InputError, match="data.standardize: 'pixel' is no modality in use; there"):
        load_data(DataConfig(**options, standardize=["pixel"]))


def test_the_head_of_a_split_is_of_samples_that_are_there():
    mask = torch.tensor([[False, True], [True, True], [False, True], [True, False]])
    inputs = {"a": torch.arange(4.0)[:, None], "b": torch.arange(4.0)[:, None]}
    split = Split(inputs, torch.arange(4), mask)
    assert split.head("a").flatten().tolist() == [1.0, 3.0]
    assert split.head("b").flatten().tolist() == [0.0, 1.0]
    assert split.head("a", 3).flatten().tolist() == [0.0, 1.0, 2.0]  # fewer are there


def test_what_is_in_memory_is_called_so_and_names_its_own_groups():
    samples = Samples({"a": np.random.default_rng(0).normal(size=(40, 3))}, np.arange(40) % 2)
    data = load_data(DataConfig(), samples)
    assert data.name == "samples" and load_data(DataConfig()).name == "digits"
    assert load_data(data=data) is data  # ready already
    with pytest.raises(
        InputError, match="data.groups: 'who' names a column of a file, and data is"
    ):
        load_data(DataConfig(groups="who"), samples)
    groups = Samples(samples.inputs, samples.targets, groups=np.arange(40) // 4)
    parts = load_data(DataConfig(), groups)
    seen = [set(part.groups.tolist()) for part in (parts.train, parts.validation, parts.test)]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 10


@pytest.mark.parametrize("batches", [False, True])
def test_the_scale_of_what_is_not_standardised(batches):
    random = np.random.default_rng(0)
    shapes = {"on": (2,), "off": (3,), "pixels": (6, 6), "raw": (2,), "ids": (2,), "fields": {}}
    layouts = {"raw": "raw", "ids": "raw", "fields": "raw"}
    off = ["off", "pixels", "fields"]
    inputs = {
        "on": 1000 * random.normal(size=(200, 2)),
        "off": np.stack([1000 * random.normal(size=200), random.normal(size=200), np.ones(200)], 1),
        "pixels": random.integers(0, 256, (200, 6, 6)).astype(np.uint8),
        "raw": 50 * random.normal(size=(200, 2)),
        "ids": random.integers(0, 9, (200, 2)),
        "fields": {},
    }
    tensors = {n: torch.from_numpy(v) if len(v) else v for n, v in inputs.items()}
    mask = torch.ones(200, 6, dtype=torch.bool)
    standardizer = Standardizer(shapes, layouts, off=off)
    if batches:
        parts = torch.arange(200).split(70)
        cut = lambda rows: {n: v[rows] if len(v) else v for n, v in tensors.items()}
        standardizer.fit_batches((cut(rows), mask[rows]) for rows in parts)
    else:
        standardizer.fit(tensors, mask)
    scale = standardizer.scale()
    assert set(scale) == {"off", "pixels", "raw", "ids"}
    np.testing.assert_allclose(scale["off"][:2], inputs["off"].std(0)[:2], rtol=1e-5)
    assert scale["off"][2] == 0  # what does not vary gets no noise
    np.testing.assert_allclose(scale["pixels"].item(), inputs["pixels"].std() / 255, rtol=1e-5)
    np.testing.assert_allclose(scale["raw"].item(), inputs["raw"].std(), rtol=1e-5)
    assert set(standardizer.scale(["raw", "on"])) == {"raw"}
    again = Standardizer(shapes, layouts, off=off, kinds=standardizer.kinds)
    again.load_state_dict(standardizer.state_dict())
    assert all(torch.equal(again.scale()[name], scale[name]) for name in scale)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.bool_, np.float64])
def test_numbers_that_are_not_standardised_become_floats(dtype):
    values = (np.arange(120) % 2).reshape(40, 3).astype(dtype)
    samples = Samples({"a": values}, np.arange(40) % 2)
    data = load_data(DataConfig(standardize=False), samples)
    assert data.train.inputs["a"].dtype == torch.float32
    assert set(data.train.inputs["a"].unique().tolist()) == {0.0, 1.0}
    assert data.train.scale["a"].tolist() == pytest.approx([0.5] * 3, abs=0.01)


@pytest.mark.parametrize(
    "trained, other, message",
    [
        (np.uint8, np.float32, "a: was trained on bytes .uint8., this is float32; give uint8$"),
        (np.uint8, np.int64, "a: was trained on bytes .uint8., this is int64; give uint8$"),
        (
            np.float32,
            np.uint8,
            "a: was trained on float32, this is bytes .uint8.; give float32, such as by .astype",
        ),
        (np.float32, np.int64, None),
        (np.uint8, np.uint8, None),
    ],
)
def test_bytes_and_other_numbers_are_not_taken_for_each_other(trained, other, message):
    values, y = np.arange(160).reshape(40, 4), np.arange(40) % 2
    config = DataConfig(standardize=False)
    first = load_data(config, Samples({"a": values.astype(trained)}, y))
    load = lambda kind: load_data(
        config,
        Samples({"a": values.astype(kind)}, y),
        standardizer=first.standardizer,
        classes=first.class_names,
    )
    if message is None:
        assert torch.equal(load(other).train.inputs["a"], first.train.inputs["a"])
    else:
        with pytest.raises(InputError, match=message):
            load(other)
    # Standardised, they are the same numbers.
    first = load_data(DataConfig(), Samples({"a": values.astype(trained)}, y))
    assert torch.equal(load(other).train.inputs["a"], first.train.inputs["a"])


def test_a_rare_class_is_called_by_its_name():
    targets = torch.tensor([0] * 9 + [1] + [2] * 9)
    with pytest.raises(InputError, match="class 'cat' has 1 in the training split; give more"):
        make_folds(targets, 3, names=["ape", "cat", "dog"])
    with pytest.raises(InputError, match="class 1 has 1 in the training split"):
        make_folds(targets, 3)
