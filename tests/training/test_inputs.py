"""Runs on what a user has: token ids, fields, bytes, torch Datasets, encoders of one's own."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import iibalance
from iibalance import DataConfig, InputError, ModelConfig, RunConfig, Samples, TrainingConfig, train
from iibalance.config import BudgetConfig, CalibrationConfig
from iibalance.data import assemble
from iibalance.data.lazy import ArrayReader, LazySplit
from iibalance.nn import calibration
from iibalance.training import loop
from iibalance.training.evaluation import degrade
from iibalance.training.sampling import EpochSampler, class_weights

pytestmark = pytest.mark.usefixtures("no_pictures")

N = 160
Y = np.arange(N) % 2
RANDOM = np.random.default_rng(0)
WEAK = 0.3 * Y[:, None] + RANDOM.normal(size=(N, 4))
# A word of its class's own (1, 2 or 3, 4) somewhere among words that tell nothing; 0 = padding.
WORDS = RANDOM.integers(5, 12, (N, 6))
WORDS[np.arange(N), RANDOM.integers(0, 3, N)] = 1 + 2 * Y + RANDOM.integers(0, 2, N)
WORDS[::4, 4:] = 0
HAS_TEXT = np.arange(N) % 7 != 0


def _config(output=None, epochs: int = 2, data=None, training=None, **more) -> RunConfig:
    return RunConfig(
        data=DataConfig(**(data or {})),
        model=ModelConfig(width=4, embedding_dim=8),
        training=TrainingConfig(
            **{"progress": False, "alone": False, "learning_rate": 0.02, **(training or {})}
        ),
        budgets=BudgetConfig(folds=2, epochs=1),
        calibration=CalibrationConfig(copies=1),
        epochs=epochs,
        output=None if output is None else str(output),
        **more,
    )


def _mask(text=HAS_TEXT) -> np.ndarray:
    return np.stack([np.ones(N, bool), text], 1)


class _Reader(nn.Module):
    """Reads ids and an attention mask, as a transformer does, and records what it is given.

    A sample without any token is 0 / 0.
    """

    def __init__(self):
        super().__init__()
        self.vectors, self.project = nn.Embedding(12, 6), nn.Linear(6, 5)

    def forward(self, input_ids, attention_mask):
        assert input_ids.dtype == attention_mask.dtype == torch.int64
        assert bool((attention_mask.sum(1) > 0).all()), "a sample that is not there"
        weight = attention_mask[..., None].float()
        return self.project((self.vectors(input_ids) * weight).sum(1) / weight.sum(1))


def _fields() -> dict[str, np.ndarray]:
    return {"input_ids": WORDS.copy(), "attention_mask": (WORDS > 0).astype(int)}


def _all_finite(model: nn.Module) -> bool:
    return all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_token_ids_are_learnt_saved_and_loaded(tmp_path):
    config = _config(tmp_path / "run", 15, {"layouts": {"text": "tokens"}}, {"batch_size": 16})
    samples = Samples({"audio": WEAK, "text": WORDS}, Y, mask=_mask())
    result = train(config, data=samples)
    scores = result.metrics["test"]["modalities"]
    assert scores["text"]["accuracy"] > 0.9 > scores["audio"]["accuracy"]
    assert result.budgets.anchor == "text" and result.metrics["test"]["accuracy"] > 0.85
    assert result.model.standardizer.vocabularies == {"text": 12}
    # Ids that training has not seen are one more id, and as good as padding.
    vectors = result.model.encoders[1][0]
    assert vectors.weight.shape[0] == 13 and not vectors.weight[[0, 12]].any()
    batch = {"audio": WEAK[:8], "text": WORDS[:8].copy()}
    batch["text"][:, 5] = 0
    padded = result.model.predict(batch).probabilities
    for unseen in (12, 10**12):
        batch["text"][:, 5] = unseen
        assert torch.equal(result.model.predict(batch).probabilities, padded)
    batch["text"][3, 5] = -1
    with pytest.raises(InputError, match="text: holds the token id -1; number tokens from 1, and"):
        result.model.predict(batch)
    with pytest.raises(InputError, match="text: layout 'tokens' takes integers, and this is float"):
        result.model.predict({"text": WORDS[:8] + 0.5})
    loaded = iibalance.load(tmp_path / "run")
    for given in (samples, {"audio": WEAK}, {"text": WORDS}, {"text": WORDS.astype(np.uint8)}):
        one, other = result.model.predict(given), loaded.predict(given)
        assert torch.equal(one.probabilities, other.probabilities)
        assert torch.equal(one.trust, other.trust)
    assert torch.equal(loaded.predict({"audio": WEAK}).trust[:, 1], torch.zeros(N))


def test_bytes_may_be_token_ids_whatever_is_standardised(tmp_path):
    text = WORDS.astype(np.uint8)
    for standardize in (True, False):
        config = DataConfig(layouts={"text": "tokens"}, standardize=standardize)
        data = iibalance.load_data(config, Samples({"text": text}, Y))
        ids = data.train.inputs["text"]
        assert ids.dtype == torch.int64 and int(ids.max()) == 11
        assert data.standardizer.vocabularies == {"text": 12}


@pytest.mark.parametrize(
    "words, message",
    [
        (WORDS - 1, "text: holds the token id -1; number tokens from 1, and give 0 for padding"),
        (WORDS * 1.0, "text: layout 'tokens' takes integers, and this is float32; convert it"),
        (WORDS * 10**7, "text: holds the token id 110000000, of a vocabulary too large"),
        (WORDS[..., None], "text: layout 'tokens' takes samples of 1 dimensions"),
    ],
)
def test_what_is_no_token_id_is_refused(words, message):
    config = DataConfig(layouts={"text": "tokens"})
    with pytest.raises(InputError, match=message) as caught:
        iibalance.load_data(config, Samples({"text": words}, Y))
    assert "\n" not in str(caught.value)


def test_an_encoder_of_ones_own_sees_fields_by_name_and_no_missing_rows(tmp_path):
    fields = _fields()
    fields["input_ids"][~HAS_TEXT] = 10**6  # beyond its vectors
    config = _config(
        tmp_path / "run", training={"modality_dropout": 0.3, "alone": True, "batch_size": 8}
    )
    samples = Samples({"audio": WEAK, "text": fields}, Y, mask=_mask())
    result = train(config, data=samples, encoders={"text": _Reader})
    assert _all_finite(result.model) and result.metrics["test"]["nll"] < 2
    loaded = iibalance.load(tmp_path / "run", encoders={"text": _Reader})
    for given in (samples, {"audio": WEAK}, samples[:1], samples[~HAS_TEXT]):
        one, other = result.model.predict(given), loaded.predict(given)
        assert one.probabilities.isfinite().all()
        assert torch.equal(one.probabilities, other.probabilities)
    with pytest.raises(InputError, match="was trained with encoders of your own .text.; give enco"):
        iibalance.load(tmp_path / "run")
    with pytest.raises(InputError, match="text: holds the fields input_ids, attention_mask, which"):
        train(_config(), data=samples)


class _Ids(nn.Module):
    """Takes ids as they are."""

    def __init__(self):
        super().__init__()
        self.vectors = nn.Embedding(10**5, 4)

    def forward(self, ids):
        assert ids.dtype == torch.int64 and bool((ids >= 50_000).all()), ids
        return self.vectors(ids).mean(1)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_integers_reach_an_encoder_of_ones_own_unchanged(dtype):
    samples = Samples({"audio": WEAK, "text": (WORDS + 50_000).astype(dtype)}, Y, mask=_mask())
    seen = iibalance.load_data(DataConfig(), samples, own=["text"]).train
    rows = seen.mask[:, 1]
    assert seen.inputs["text"].dtype == torch.int64
    everything = {tuple(row) for row in (WORDS + 50_000).tolist()}
    assert {tuple(row) for row in seen.inputs["text"][rows].tolist()} <= everything
    assert not seen.inputs["text"][~rows].any()
    if dtype == np.int64:
        config = _config(None, 1)
        assert iibalance.training.run.estimate_run_budgets(
            config, data=samples, encoders={"text": _Ids}
        ).modalities == ("audio", "text")


def test_one_row_that_is_there_counts_once():
    """Batch normalisation needs two rows, so a single one is given twice; its gradient is one's."""
    encoder = nn.Sequential(nn.Embedding(9, 3), nn.Flatten())
    ids, there = torch.tensor([[4], [5], [6]]), torch.tensor([False, True, False])
    found = iibalance.nn.model.encode(encoder, ids, there)
    assert found[[0, 2]].abs().sum() == 0 and torch.equal(found[1], encoder[0].weight[5])
    found.sum().backward()
    assert encoder[0].weight.grad[5].tolist() == [1.0] * 3


class _Items(Dataset):
    """The same samples one by one, the image in bytes; may fail at its n-th reading."""

    def __init__(self, fail_at: int | None = None):
        self.image = (100 + 40 * Y[:, None, None] + RANDOM_IMAGE).astype(np.uint8)
        self.reads, self.fail_at = 0, fail_at

    def __len__(self):
        return N

    def __getitem__(self, row):
        self.reads += 1
        if self.reads == self.fail_at:
            raise KeyboardInterrupt
        image = self.image[row] if HAS_TEXT[row] else None
        return {"audio": WEAK[row], "image": image}, int(Y[row])

    def samples(self) -> Samples:
        """All of them in memory."""
        return Samples({"audio": WEAK, "image": self.image}, Y, mask=_mask())


RANDOM_IMAGE = RANDOM.integers(0, 100, (N, 5, 5))


@pytest.fixture(scope="module")
def lazy_run(tmp_path_factory):
    """A run on a Dataset that nobody disturbed, and how many items it read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iibalance.training.stages.write_report", lambda *_, **__: None)
        data = _Items()
        folder = tmp_path_factory.mktemp("lazy") / "run"
        result = train(_config(folder, 4, training={"checkpoint_seconds": 0.0}), data=data)
    return result, data.reads


def _close(one: dict, other: dict, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            _close(value, other[key], tolerance)
        elif isinstance(value, float):
            assert abs(value - other[key]) <= tolerance, key
        else:
            assert value == other[key], key


def test_a_run_on_a_dataset_gives_what_one_in_memory_gives(lazy_run, tmp_path):
    result, _ = lazy_run
    whole = train(
        _config(tmp_path / "run", 4, training={"checkpoint_seconds": 0.0}), data=_Items().samples()
    )
    assert whole.metrics["test"]["accuracy"] > 0.8
    assert whole.metrics.pop("data") == "samples" and result.metrics["data"] == "dataset"
    whole.metrics["data"] = "dataset"
    _close(result.metrics, whole.metrics, 2e-3)
    assert result.metrics["test"]["accuracy"] == whole.metrics["test"]["accuracy"]
    given = _Items().samples()
    torch.testing.assert_close(
        result.model.predict(given).probabilities,
        whole.model.predict(given).probabilities,
        rtol=0,
        atol=5e-3,
    )


def test_a_run_on_a_dataset_is_resumed(lazy_run, tmp_path):
    result, reads = lazy_run
    config = _config(tmp_path / "run", 4, training={"checkpoint_seconds": 0.0})
    with pytest.raises(KeyboardInterrupt):
        train(config, data=_Items(fail_at=int(0.8 * reads)))
    assert (tmp_path / "run" / "budgets.json").exists()
    assert not (tmp_path / "run" / "metrics.json").exists()
    again = _Items()
    resumed = train(config, data=again, resume=True)
    assert again.reads < 0.8 * reads and resumed.metrics == result.metrics


@pytest.mark.slow
def test_workers_of_a_dataset_change_nothing(lazy_run, tmp_path):
    training = {"checkpoint_seconds": 0.0, "workers": 1}
    result = train(_config(tmp_path / "run", 4, training=training), data=_Items())
    assert result.metrics == lazy_run[0].metrics


def test_a_folder_that_stays_on_the_disk_is_trained_on(tmp_path, monkeypatch):
    (tmp_path / "clips").mkdir()
    for name, array in {"x_audio": WEAK, "x_image": _Items().image, "y": Y}.items():
        np.save(tmp_path / "clips" / f"{name}.npy", array)
    options = {"path": tmp_path / "clips"}
    whole = train(_config(tmp_path / "whole", data=options))
    monkeypatch.setattr(assemble, "IN_MEMORY", 0)
    result = train(_config(tmp_path / "lazy", data=options))
    _close(result.metrics, whole.metrics, 2e-3)
    probe = _config(tmp_path / "probe", data=options)
    probe.budgets.source = "probe"
    with pytest.raises(InputError, match="budgets.source: probe needs all inputs in memory"):
        train(probe)


class _Half(nn.Module):
    """An encoder with a part that is frozen, norms and dropout included."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.frozen.requires_grad_(False)
        self.top = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
        self.modes: set[bool] = set()

    def forward(self, values):
        if torch.is_grad_enabled() and self.top.training:
            self.modes.add(self.frozen[2].training)
        return self.top(self.frozen(values))


def test_frozen_parts_stay_as_they_are_and_all_copies_start_alike(tmp_path):
    encoder = _Half()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    samples = Samples({"audio": WEAK, "other": WEAK[:, ::-1]}, Y)
    result = train(_config(tmp_path / "run"), data=samples, encoders={"audio": encoder})
    after = result.model.encoders[0].state_dict()
    for name, value in before.items():
        same = torch.equal(after[name], value)
        assert same == name.startswith("frozen."), name
    for name, value in encoder.state_dict().items():  # the given one is copied, never trained
        assert torch.equal(value, before[name])
    assert result.model.encoders[0].modes == {False}
    loaded = iibalance.load(tmp_path / "run", encoders={"audio": _Half})
    given = {"audio": WEAK, "other": WEAK}
    assert torch.equal(
        loaded.predict(given).probabilities, result.model.predict(given).probabilities
    )


def test_parameter_groups_arrive_in_the_optimiser(tmp_path, monkeypatch):
    made, rates = [], {}

    class Recorder(torch.optim.AdamW):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            made.append(self)

        def step(self, closure=None):
            rates[id(self)] = [group["lr"] for group in self.param_groups]
            return super().step(closure)

    monkeypatch.setattr(loop.torch.optim, "AdamW", Recorder)

    def groups(encoder):
        yield {"params": encoder[0].parameters(), "scale": 0.1, "weight_decay": 0.0}

    train(
        _config(tmp_path / "run", 1, training={"weight_decay": 0.03}),
        data=Samples({"audio": WEAK, "other": WEAK}, Y),
        encoders={"audio": lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))},
        parameter_groups={"audio": groups},
    )
    # Two folds of two modalities, both alone, and the joint training.
    assert len(made) == 2 * 2 + 2 + 1
    groups_of = made[-1].param_groups
    *others, mine = groups_of
    assert [tuple(value.shape) for value in mine["params"]] == [(6, 4), (6,)]
    assert mine["weight_decay"] == 0.0 and mine["scale"] == 0.1
    assert all(group["weight_decay"] == 0.03 and group["scale"] == 1.0 for group in others)
    *others, own = rates[id(made[-1])]
    assert set(others) == {others[0]} and own == pytest.approx(0.1 * others[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"encoders": [nn.Linear(4, 5)]}, "encoders: is a list; give a dict of modules"),
        ({"encoders": {"video": nn.Linear(4, 5)}}, "encoders: 'video' is none of the data's modal"),
        (
            {"encoders": {"audio": 3}},
            "encoders: audio is a int; give a torch.nn.Module, or a funct",
        ),
        (
            {"encoders": {"audio": nn.Linear}},
            "audio: calling it without arguments failed .*missing",
        ),
        (
            {"encoders": {"audio": lambda: 3}},
            "audio: the function made a int; it must make a torch",
        ),
        (
            {"encoders": {"audio": nn.Linear(5, 4)}},
            "audio: Linear cannot take a batch of shape .2, 4",
        ),
        (
            {"encoders": {"audio": nn.Unflatten(1, (2, 2))}},
            r"Unflatten returned \[2, 2, 2\] for a b",
        ),
        (
            {"encoders": {"audio": nn.LSTM(4, 3)}},
            "LSTM returned tuple for a batch of 2; an encoder",
        ),
        (
            {"encoders": {"audio": lambda: nn.Flatten(0)}},
            r"Flatten returned \[8\] for a batch of 2",
        ),
        ({"parameter_groups": {"audio": list}}, "parameter_groups: 'audio' has no encoder of your"),
        (
            {"encoders": {"audio": nn.Linear(4, 5)}, "parameter_groups": {"audio": 3}},
            "parameter_groups: audio is a int; give a function of the encoder that returns groups",
        ),
        (
            {"config": {"training": {"class_weight": {"2": 1.0}}}},
            "training.class_weight: '2' is none of the classes .0, 1.",
        ),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_written(tmp_path, arguments, message):
    config = _config(tmp_path / "run", **arguments.pop("config", {}))
    with pytest.raises(InputError, match=message) as caught:
        train(config, data=Samples({"audio": WEAK, "other": WEAK}, Y), **arguments)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


RARE = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)


@pytest.mark.parametrize(
    "weight, shares",
    [
        ("balanced", [1 / 3, 1 / 3, 1 / 3]),
        ({"c": 6.0}, [0.4, 0.2, 0.4]),
        ({"a": 0.5, "b": 2.0, "c": 1.0}, [0.3, 0.6, 0.1]),
    ],
)
def test_classes_are_drawn_as_often_as_their_weights_say(weight, shares):
    weights = class_weights(RARE, weight, ["a", "b", "c"])
    sampler = EpochSampler(100, 32, 0, weights)
    drawn, orders = torch.zeros(3), set()
    for sampler.epoch in range(300):
        rows = list(sampler)
        assert len(rows) == len(sampler) == 100
        drawn += RARE[rows].bincount(minlength=3)
        orders.add(tuple(rows))
    assert len(orders) == 300
    assert (drawn / drawn.sum() - torch.tensor(shares)).abs().max() < 0.01
    # The epoch is the seed: a resumed run draws the same.
    sampler.epoch = 7
    assert list(sampler) == list(sampler)
    assert class_weights(RARE, None) is None


def test_a_class_that_a_fold_lacks_does_not_break_its_weights():
    weights = class_weights(RARE[:90], "balanced", ["a", "b", "c"])
    assert weights.tolist() == pytest.approx([0.75] * 60 + [1.5] * 30)
    with pytest.raises(InputError, match="training.class_weight: 'd' is none of the classes .a, b"):
        class_weights(RARE, {"d": 1.0}, ["a", "b", "c"])


def test_class_weights_reach_every_training(tmp_path, monkeypatch):
    drawn = []
    real = EpochSampler.__iter__

    def noting(self):
        rows = list(real(self))
        drawn.append((self.size, rows, self.weights))
        return iter(rows)

    monkeypatch.setattr(EpochSampler, "__iter__", noting)
    rare = np.where(np.arange(N) % 8 == 0, "rare", "usual")
    train(
        _config(tmp_path / "run", 3, training={"class_weight": {"rare": 7.0}}),
        data=Samples({"audio": WEAK, "other": WEAK}, rare),
    )
    assert drawn and all(weights is not None for *_, weights in drawn)
    whole = [rows for size, rows, _ in drawn if size == 112]
    weights = drawn[-1][2]
    # Three epochs of both modalities alone and of the joint training.
    assert sorted(set(weights.tolist())) == [1.0, 7.0] and len(whole) == 3 * 3
    share = float((weights[torch.tensor(whole).flatten()] == 7).double().mean())
    assert abs(share - 0.5) < 0.1


# Labels, scales and types as they come


@pytest.mark.parametrize("kind", ["positions", "words"])
def test_eleven_classes_named_by_digits_are_learnt_and_called_by_their_names(tmp_path, kind):
    """As strings "10" sorts before "2": positions must not be taken for names, nor the reverse."""
    digits = np.arange(11 * 16) % 11
    names = sorted(map(str, range(11)))
    values = 6 * np.eye(11)[digits] + np.random.default_rng(0).normal(size=(len(digits), 11))
    words = np.array([str(digit) for digit in digits])
    inputs = {"a": values, "b": np.ones((len(digits), 2))}
    if kind == "words":
        samples = Samples(inputs, words)
    else:
        positions = np.array([names.index(word) for word in words])
        samples = Samples(inputs, positions, classes=names)
    config = _config(tmp_path / "run", 30, training={"batch_size": 16}, method="concat")
    result = train(config, data=samples)
    model = iibalance.load(tmp_path / "run")
    assert model.class_names == names and result.metrics["test"]["accuracy"] > 0.9
    sure = model.predict({"a": 6 * np.eye(11), "b": np.ones((11, 2))}).probabilities.argmax(1)
    assert [model.class_names[at] for at in sure] == [str(digit) for digit in range(11)]


@pytest.mark.parametrize("lazily", [False, True])
def test_noise_is_as_strong_whatever_the_unit_of_what_is_not_standardised(monkeypatch, lazily):
    """A thousand times the values are given a thousand times the noise."""
    found = {}
    for unit in (1.0, 1000.0):
        samples = Samples({"a": WEAK * unit, "b": WEAK}, Y)
        data = iibalance.load_data(DataConfig(standardize=["b"]), samples)
        split = data.train
        if lazily:
            everything = torch.arange(len(Y))
            split = LazySplit(
                ArrayReader(samples.inputs),
                everything,
                torch.from_numpy(Y),
                torch.from_numpy(samples.mask),
                None,
                data.standardizer,
            )
        assert set(split.scale) == {"a"}
        noisy = degrade(split, "a", "noise", fraction=1.0, strength=3.0)
        found[unit] = (noisy.inputs["a"] - split.batch().inputs["a"]) / unit
    torch.testing.assert_close(found[1.0], found[1000.0], rtol=1e-3, atol=1e-4)
    assert found[1.0].std() == pytest.approx(3 * WEAK.std(), rel=0.1)


def test_the_gate_is_calibrated_on_noise_of_the_scale_of_the_data(tmp_path, monkeypatch):
    seen = []
    real = calibration.random_corruptions

    def noted(batch, **options):
        seen.append((batch.inputs["a"].std().item(), options["scale"]["a"].mean().item()))
        return real(batch, **options)

    monkeypatch.setattr(calibration, "random_corruptions", noted)
    samples = Samples({"a": 1e-3 * WEAK, "b": WEAK}, Y)
    train(_config(tmp_path / "run", 1, {"standardize": ["b"]}), data=samples)
    assert seen
    for spread, scale in seen:
        assert scale == pytest.approx(spread, rel=0.3)


def test_what_a_saved_model_knows_of_types_and_columns(tmp_path):
    pixels = (100 + 60 * Y[:, None] + RANDOM.normal(0, 9, (N, 5))).astype(np.uint8)
    names = [f"c{column}" for column in range(4)]
    frame = pd.DataFrame(WEAK, columns=names)
    samples = Samples({"pixels": pixels, "table": frame}, Y)
    train(_config(tmp_path / "run", 1, {"standardize": False}, method="concat"), data=samples)
    model = iibalance.load(tmp_path / "run")
    assert model.standardizer.kinds == {"pixels": "uint8", "table": "float32"}
    assert model.standardizer.columns == {"table": names}
    how = {"standardizer": model.standardizer, "classes": model.class_names}
    first = iibalance.load_data(DataConfig(), samples, **how)
    swapped = Samples({"pixels": pixels, "table": frame[names[::-1]]}, Y)
    again = iibalance.load_data(DataConfig(), swapped, **how)
    assert torch.equal(first.test.inputs["table"], again.test.inputs["table"])
    with pytest.raises(InputError, match="columns: table: there is no column 'c1', which the mod"):
        other = Samples({"pixels": pixels, "table": frame.rename(columns={"c1": "d1"})}, Y)
        iibalance.load_data(DataConfig(), other, **how)
    with pytest.raises(InputError, match="pixels: was trained on bytes .uint8., this is float32"):
        wrong = Samples({"pixels": pixels.astype(np.float32), "table": frame}, Y)
        iibalance.load_data(DataConfig(), wrong, **how)


class _Vectors(nn.Module):
    def __init__(self):
        super().__init__()
        self.vectors = nn.Embedding(256, 5)

    def forward(self, ids):
        return self.vectors(ids).mean(1)


def test_ids_and_numbers_that_are_taken_for_each_other_say_what_to_give(tmp_path):
    counts = RANDOM.integers(0, 9, (N, 4))
    linear = {"a": lambda: nn.Linear(4, 5)}
    message = r"integers are taken for ids: give floats \(.astype\('float32'\)\), or layouts={'a'"
    with pytest.raises(InputError, match=message):
        train(_config(tmp_path / "a"), data=Samples({"a": counts, "b": WEAK}, Y), encoders=linear)
    # Both that it says do work.
    estimate = iibalance.training.run.estimate_run_budgets
    b = {"b": WEAK}
    for options, values in (({}, counts.astype("float32")), ({"layouts": {"a": "vector"}}, counts)):
        config = _config(None, 1, options)
        found = estimate(config, data=Samples({"a": values, **b}, Y), encoders=linear)
        assert found.modalities == ("a", "b")
    ids = {"a": _Vectors}
    samples = Samples({"a": counts.astype(np.uint8), **b}, Y)
    with pytest.raises(InputError, match=r"give ids as .astype\('int64'\)"):
        train(_config(tmp_path / "b"), data=samples, encoders=ids)
    samples = Samples({"a": samples.inputs["a"].astype("int64"), **b}, Y)
    assert estimate(_config(None, 1), data=samples, encoders=ids).modalities == ("a", "b")
