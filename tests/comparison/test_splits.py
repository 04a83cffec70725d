"""``compare --splits``: resampled splits, tuned within each, and what is said over all of them."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from iibalance import InputError, Samples
from iibalance.comparison import cells as cells_module
from iibalance.comparison.cells import Cell, cell_files, conditions, run_cell, run_config
from iibalance.comparison.protocol import compare
from iibalance.comparison.resampling import load_split, redrawn
from iibalance.comparison.results import condense, group_of, read_table
from iibalance.comparison.tuning import Choice, choices, chosen_setting, settings_of, wins
from iibalance.config import CompareConfig, CompareData, ModelConfig

CONDITIONS = "missing,noise,noise6,gain,shuffled,mild"
SHOWN = {"clean", "missing", "noise", "noise6", "gain", "shuffled", "mild", "low data"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two sets of two views of a label, with speakers, and a split column of their own."""
    folder, found = tmp_path_factory.mktemp("splits"), {}
    for seed, name in enumerate(("first", "second")):
        generator = np.random.default_rng(seed)
        y = np.arange(120) % 3
        signal = np.eye(3)[y]
        found[name] = str(folder / f"{name}.npz")
        np.savez(
            found[name],
            x_weak=signal @ generator.normal(size=(3, 6)) + generator.normal(size=(120, 6)),
            x_strong=2 * signal @ generator.normal(size=(3, 5)) + generator.normal(size=(120, 5)),
            y=y,
            speaker=np.arange(120) // 6,
            split=np.repeat([0, 1, 2], [40, 40, 40]),
        )
    return found


def config(files, folder, **options):
    data = {name: CompareData(path=path, groups="speaker", folds=2) for name, path in files.items()}
    small = dict(
        data=data,
        methods="concat,ensemble",
        focus="ensemble",
        splits=2,
        trials=2,
        epochs=2,
        workers=1,
        low_data=0.5,
        timing_steps=0,
        bootstrap=200,
        conditions=CONDITIONS,
        output=str(folder),
        model=ModelConfig(embedding_dim=8, width=4),
    )
    return CompareConfig(**{**small, **options})


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits") / "out"
    return folder, compare(config(files, folder))


def cell_json(folder, *cell):
    return json.loads(cell_files(folder, Cell(*cell))[0].read_text())


# Splits


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_groups_are_on_one_side_and_every_sample_is_used(seed):
    groups = np.random.default_rng(seed).integers(40, size=600)
    targets = np.random.default_rng(seed + 1).integers(4, size=600)
    samples = Samples({"a": np.zeros((600, 1))}, targets, groups=groups, split=[2] * 600)
    found = redrawn(samples, test=0.2, validation=0.15, seed=seed)
    assert np.bincount(found.split).sum() == 600 and set(found.split) == {0, 1, 2}
    sides = [set(found.groups[found.split == code].tolist()) for code in range(3)]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    shares = np.bincount(found.split) / 600
    assert shares == pytest.approx([0.65, 0.15, 0.2], abs=0.05)
    for label in range(4):  # stratified
        own = np.bincount(found.split[targets == label], minlength=3) / (targets == label).sum()
        assert own == pytest.approx(shares, abs=0.1)
    assert set(samples.split) == {2}  # what came in is as it was


def test_without_groups_the_shares_are_exact_and_a_seed_makes_the_split():
    samples = Samples({"a": np.zeros((200, 1))}, ["x"] * 100 + ["y"] * 100)
    first, again, other = (
        redrawn(samples, test=0.2, validation=0.15, seed=seed).split for seed in (3, 3, 4)
    )
    assert (first == again).all() and (first != other).any()
    for half in (first[:100], first[100:]):
        assert np.bincount(half).tolist() == [65, 15, 20]


def test_groups_that_cannot_be_divided_are_refused_before_anything_is_trained(tmp_path):
    np.savez(tmp_path / "a.npz", x_a=np.zeros((30, 2)), y=np.arange(30) % 3, g=np.arange(30) % 3)
    data = {"a": CompareData(path=str(tmp_path / "a.npz"), groups="g")}
    with pytest.raises(InputError, match="give no groups, or leave splits out"):
        compare(CompareConfig(data=data, splits=2, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_split_has_its_own_seed_for_data_and_training(files, tmp_path):
    options = config(files, tmp_path)
    made = run_config(options, Cell("first", "concat", 1, 0, "low"), {})
    assert made.seed == made.data.split_seed == 1 and made.data.train_fraction == 0.5
    data = load_split(options, made.data)
    groups = [set(part.groups.tolist()) for part in (data.train, data.validation, data.test)]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    whole = load_split(options, replace(made.data, train_fraction=1.0))
    assert len(whole.train) + len(whole.validation) + len(whole.test) == 120
    assert len(data.train) == pytest.approx(len(whole.train) / 2, abs=1)
    assert len(data.test) == len(whole.test)


# The protocol


def test_the_table_has_a_row_a_split_and_kind_of_condition(done):
    folder, result = done
    assert not result["failures"] and result["splits"] == 2
    assert (folder / "comparison.csv").read_text().startswith("data,method,split,condition")
    table = read_table(folder / "comparison.csv")
    assert table.attrs["splits"]
    for (_, _, split), rows in table.groupby(["data", "method", "seed"]):
        fused = rows[rows["modality"] == ""]
        assert Counter(fused["condition"]) == Counter(SHOWN) and split in (0, 1)
        assert set(rows["modality"]) - {""} == {"weak", "strong"}
    assert len(table.groupby(["data", "method", "seed"])) == 2 * 3 * 2
    cell = cell_json(folder, "first", "concat", 1, 0, "test")["test"]
    row = table.query("data == 'first' and method == 'concat' and seed == 1").set_index("condition")
    mean = (cell["weak noise6"]["nll"] + cell["strong noise6"]["nll"]) / 2
    assert row.loc["noise6", "nll"] == pytest.approx(mean, rel=1e-3)
    assert row.loc["mild", "nll"] == pytest.approx(cell["mild"]["nll"], rel=1e-3)


@pytest.fixture(scope="module")
def otherwise(done, files, tmp_path_factory):
    """The same, gone on with after validation has come out otherwise here and there."""
    folder = tmp_path_factory.mktemp("splits") / "otherwise"
    shutil.copytree(done[0], folder)

    def change(loss, data, method, split, *modality):
        path = cell_files(folder, Cell(data, method, split, 1, "trial"))[0]
        found = json.loads(path.read_text())
        at = found["validation"]
        for name in modality:
            at = at["modalities"][name]
        at["nll"] = loss
        path.write_text(json.dumps(found))

    change(0.01, "first", "concat", 1)
    change(0.02, "first", "ensemble", 0, "weak")
    change(0.03, "second", "ensemble", 1, "weak")
    change(0.03, "second", "ensemble", 1, "strong")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iibalance.comparison.protocol.write_picture", lambda *_: None)
        return folder, compare(config(files, folder))


def test_each_split_is_tuned_by_itself_and_tested_with_its_own_winner(otherwise, files):
    folder, result = otherwise
    settings, best = settings_of(config(files, folder), "concat"), []
    for split in (0, 1):
        losses = [
            cell_json(folder, "first", "concat", split, trial, "trial")["validation"]["nll"]
            for trial in (0, 1)
        ]
        best.append(int(np.argmin(losses)))
        for kind in ("test", "low"):
            found = cell_json(folder, "first", "concat", split, 0, kind)
            assert found["setting"] == settings[best[-1]]
    assert best == [0, 1]
    (row,) = (
        row for row in result["trials"] if row["data"] == "first" and row["method"] == "concat"
    )
    assert row["wins"] == {"": [1, 1]}


def test_what_is_trained_separately_chooses_for_each_modality_by_its_own_loss(otherwise, files):
    folder, _ = otherwise
    settings, winners = settings_of(config(files, folder), "ensemble"), []
    for data, split in (("first", 0), ("first", 1), ("second", 0), ("second", 1)):
        found = [
            cell_json(folder, data, "ensemble", split, trial, "trial")["validation"]
            for trial in (0, 1)
        ]
        setting = cell_json(folder, data, "ensemble", split, 0, "test")["setting"]
        for modality in ("weak", "strong"):
            winners.append(int(np.argmin([row["modalities"][modality]["nll"] for row in found])))
            for option in ("learning_rate", "weight_decay"):
                chosen = setting.get(f"{option}s", {}).get(modality, setting[option])
                assert chosen == settings[winners[-1]][option]
    assert winners == [1, 0, 0, 0, 0, 0, 1, 1]


def test_nothing_of_the_test_part_is_seen_in_tuning(files, tmp_path, monkeypatch):
    options = config(files, tmp_path)
    setting = settings_of(options, "ensemble")[0]
    plain = cells_module.load_split

    def poisoned(*arguments):
        data = plain(*arguments)
        inputs = {name: 1e3 + 0 * values for name, values in data.test.inputs.items()}
        return replace(data, test=replace(data.test, inputs=inputs, targets=data.test.targets * 0))

    found = {}
    for name, loaded in (("plain", plain), ("poisoned", poisoned)):
        monkeypatch.setattr(cells_module, "load_split", loaded)
        (tmp_path / name).mkdir()
        for kind in ("trial", "test"):
            run_cell(str(tmp_path / name), options, Cell("first", "ensemble", 0, 0, kind), setting)
        found[name] = {
            kind: cell_json(tmp_path / name, "first", "ensemble", 0, 0, kind)
            for kind in ("trial", "test")
        }
    for kind in ("trial", "test"):
        assert found["plain"][kind]["validation"] == found["poisoned"][kind]["validation"]
    assert "test" not in found["plain"]["trial"]
    assert found["plain"]["test"]["test"] != found["poisoned"]["test"]["test"]


@pytest.mark.usefixtures("no_pictures")
def test_it_goes_on_where_it_was_and_takes_more_splits(done, files):
    folder, first = done
    cell = cell_files(folder, Cell("second", "concat", 1, 0, "test"))[0]
    kept = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    cell.unlink()
    result = compare(config(files, folder))
    assert result["results"] == first["results"] and result["tests"] == first["tests"]
    again = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    assert {path for path in kept if kept[path] != again[path]} == {cell, cell.with_suffix(".npz")}
    with pytest.raises(InputError, match="^splits: differs"):
        compare(config(files, folder, splits=0))


def test_of_resampled_splits_the_clean_predictions_alone_are_kept(done):
    with np.load(cell_files(done[0], Cell("first", "concat", 0, 0, "test"))[1]) as arrays:
        assert set(arrays.files) == {"targets", "clean"}


def test_the_page_says_what_was_done(done):
    folder, result = done
    text = (folder / "comparison.md").read_text()
    for part in (
        "2 resampled splits of all samples",
        "test 20 % and validation 15 %",
        "## Average rank over data sets and splits",
        "## Are the ranks chance?",
        "## ensemble against each other method",
        "## What ensemble makes of each encoder",
        "training, s",
        "In how many splits each setting won",
    ):
        assert part in text
    assert "Paired bootstrap" not in text
    assert result["tests"]["clean"]["nll"]["blocks"] == 4
    row = result["ranks"]["unseen"]["nll"]["concat"]
    assert row == {"rank": result["tests"]["unseen"]["nll"]["ranks"]["concat"], "sets": 4}


# Conditions


def test_strengths_of_noise_are_the_same_noise_and_mild_is_on_everything(files, tmp_path):
    options = config(files, tmp_path, conditions="all")
    data = load_split(options, run_config(options, Cell("first", "sum", 0, 0, "test"), {}).data)
    found = conditions(data, options, 5)
    clean = data.test.inputs
    kinds = ("missing", "noise", "noise1", "noise6", "blur", "dropped", "gain", "shuffled")
    names = {f"{modality} {kind}" for kind in kinds for modality in ("weak", "strong")}
    assert set(found) == {"clean", "mild", *names}
    noise = {
        kind: found[f"weak {kind}"].inputs["weak"] - clean["weak"]
        for kind in ("noise1", "noise", "noise6")
    }
    touched = (noise["noise1"] != 0).any(1)
    assert int(touched.sum()) == round(len(touched) / 2)
    assert torch.allclose(noise["noise"], 3 * noise["noise1"], atol=1e-5)
    assert torch.allclose(noise["noise6"], 6 * noise["noise1"], atol=1e-5)
    assert torch.equal(found["weak noise6"].inputs["strong"], clean["strong"])
    for modality, values in found["mild"].inputs.items():
        off = values - clean[modality]
        assert (off != 0).all() and float(off.std()) == pytest.approx(1.0, abs=0.15)
    default = conditions(data, replace(options, conditions="missing,noise"), 5)
    assert list(default) == ["clean", *(f"{m} {k}" for k in kinds[:2] for m in clean)]


def test_what_is_not_defined_for_a_modality_is_refused_before_training(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 9, size=(60, 5))
    path = str(tmp_path / "text.npz")
    np.savez(path, x_text=tokens, x_a=np.random.default_rng(0).normal(size=(60, 3)), y=tokens[:, 0])
    data = {"text": CompareData(path=path, layouts={"text": "tokens"})}
    options = dict(data=data, methods="sum", splits=1, output=str(tmp_path / "out"))
    with pytest.raises(InputError, match="'blur' of 'text' is not defined"):
        compare(CompareConfig(**options, conditions="blur"))
    assert not (tmp_path / "out").exists()


def test_groups_of_conditions():
    found = {
        name: group_of(name)
        for name in ("clean", "a b missing", "a noise1", "noise6", "a blur", "dropped", "mild")
    }
    assert list(found.values()) == [
        "clean", "missing", "noise", "noise", "unseen", "unseen", "mild"
    ]  # fmt: skip


def test_a_condensed_table_keeps_the_means_of_its_groups(done):
    folder, _ = done
    table = read_table(folder / "comparison.csv")
    again = condense(table)
    key = ["data", "method", "seed", "condition", "modality"]
    assert again.set_index(key).sort_index().equals(table.set_index(key).sort_index())


# Settings of their own for modalities


def test_a_tie_and_a_modality_without_validation_samples(tmp_path):
    (tmp_path / "cells").mkdir()
    losses = {  # trial -> weak, strong (None: no validation sample has it)
        0: (0.9, 0.2),
        1: (0.5, 0.3),
        2: (0.5, 0.1),
    }
    cells = []
    for trial, (weak, strong) in losses.items():
        cells.append(Cell("two", "ensemble", 0, trial, "trial"))
        own = {"weak": {"nll": weak}, "strong": {"nll": strong}, "none": None}
        row = {"validation": {"nll": 0.4, "accuracy": 0.5, "modalities": own}}
        cell_files(tmp_path, cells[-1])[0].write_text(json.dumps(row))
    found = choices(tmp_path, cells, {("two", "ensemble"): 0})
    choice = found["two", "ensemble"]
    assert choice == Choice(0, {"weak": 1, "strong": 2})
    settings = [{"learning_rate": r, "weight_decay": r / 10} for r in (1.0, 2.0, 3.0)]
    assert chosen_setting(settings, choice) == {
        "learning_rate": 1.0,
        "weight_decay": 0.1,
        "learning_rates": {"weak": 2.0, "strong": 3.0},
        "weight_decays": {"weak": 0.2, "strong": 0.3},
    }
    assert chosen_setting(settings, Choice(1, {"weak": 1, "strong": 1})) == settings[1]
    assert wins([choice, choice, Choice(0, {"weak": 0, "strong": 2})], 3) == {
        "weak": [1, 2, 0],
        "strong": [0, 0, 3],
    }


def test_joint_methods_choose_one_setting(tmp_path):
    (tmp_path / "cells").mkdir()
    cell = Cell("two", "concat", 0, 0, "trial")
    own = {"weak": {"nll": 0.1}}
    row = {"validation": {"nll": 0.4, "accuracy": 0.5, "modalities": own}}
    cell_files(tmp_path, cell)[0].write_text(json.dumps(row))
    found = choices(tmp_path, [cell], {("two", "concat"): 0})
    assert found == {("two", "concat"): Choice(0, {}, joint=True)}


def test_what_goes_on_from_encoders_alone_takes_their_rates_and_its_own_trial(tmp_path):
    """The rates by the encoders' own trials, and the parameter by the fused prediction's."""
    (tmp_path / "cells").mkdir()
    cells = []
    for method, losses in (("unimodal", (0.3, 0.2)), ("iibalance", (0.5, 0.9))):
        for trial, loss in enumerate(losses):
            cell = Cell("two", method, 0, trial, "trial")
            own = {"weak": {"nll": loss}, "strong": {"nll": 1 - loss}}
            row = {"validation": {"nll": loss, "accuracy": 0.5, "modalities": own}}
            cell_files(tmp_path, cell)[0].write_text(json.dumps(row))
            cells.append(cell)
    found = choices(tmp_path, cells, {("two", "unimodal"): 1, ("two", "iibalance"): 0})
    choice = Choice(0, {"weak": 1, "strong": 0}, joint=True)
    assert found["two", "iibalance"] == choice
    tried = [
        {"learning_rate": rate, "weight_decay": 0.1, "objective.alpha": alpha}
        for rate, alpha in ((0.1, 1.0), (0.2, 0.3))
    ]
    setting = chosen_setting(tried, choice)
    assert setting["learning_rates"] == {"weak": 0.2, "strong": 0.1}
    assert setting["objective.alpha"] == 1.0
    assert wins([choice], 2) == {"": [1, 0], "weak": [0, 1], "strong": [1, 0]}


def stages(folder):
    return {path.stem for path in (folder / "stages").glob("*.safetensors")}


def test_composing_what_won_trains_no_encoder_anew_and_costs_add_up(files, tmp_path):
    options = config(files, tmp_path)
    first, second = settings_of(options, "ensemble")

    def seconds(method, trial, kind, setting):
        run_cell(str(tmp_path), options, Cell("first", method, 0, trial, kind), setting)
        found = cell_json(tmp_path, "first", method, 0, trial, kind)
        return found["train_seconds"], found["validation"]

    def cost(names):
        files = [tmp_path / "stages" / f"{name}.json" for name in names]
        return sum(json.loads(path.read_text())["seconds"] for path in files)

    one, by_first = seconds("ensemble", 0, "trial", first)
    own = stages(tmp_path)
    two, by_second = seconds("ensemble", 1, "trial", second)
    other = stages(tmp_path) - own
    assert len(own) == len(other) == 2 and min(one, two) > 0
    assert one == pytest.approx(cost(own)) and two == pytest.approx(cost(other))
    mixed = chosen_setting([first, second], Choice(0, {"weak": 0, "strong": 1}))
    both, by_both = seconds("ensemble", 0, "test", mixed)
    assert stages(tmp_path) == own | other  # nothing new
    needed = [name for name in own if name.startswith("alone-0")]
    needed += [name for name in other if name.startswith("alone-1")]
    assert both == pytest.approx(cost(needed)) and len(needed) == 2
    for modality, found in (("weak", by_first), ("strong", by_second)):
        assert by_both["modalities"][modality] == found["modalities"][modality]
    # The gate's budget stage is part of its cost, whoever made the rest.
    alone, _ = seconds("unimodal", 0, "test", mixed)
    gated, _ = seconds("ensemble_gated", 0, "test", mixed)
    folds = stages(tmp_path) - own - other
    assert alone == pytest.approx(both) and len(folds) == 2 * 2
    assert gated == pytest.approx(both + cost(folds)) and cost(folds) > 0
    table = compare_seconds(tmp_path, options)
    assert table["ensemble_gated"] == pytest.approx(gated)


def compare_seconds(folder, options):
    """method -> the column of the table, for the tested cells of one split."""
    from iibalance.comparison.results import collect, training_seconds

    cells = [Cell("first", method, 0, 0, "test") for method in ("ensemble", "ensemble_gated")]
    table = collect(folder, cells)
    rows = table[table["train_seconds"].notna()]
    assert set(rows["condition"]) == {"clean"} and set(rows["modality"]) == {""}
    return training_seconds(table)["first"]


def test_a_training_that_was_killed_before_its_seconds_were_written_is_made_again(files, tmp_path):
    options = config(files, tmp_path)
    setting = settings_of(options, "unimodal")[0]
    run_cell(str(tmp_path), options, Cell("first", "unimodal", 0, 0, "trial"), setting)
    (lost,) = (tmp_path / "stages").glob("alone-0-*.json")
    (kept,) = (tmp_path / "stages").glob("alone-1-*.json")
    before = kept.read_text()
    lost.unlink()
    run_cell(str(tmp_path), options, Cell("first", "ensemble", 0, 0, "trial"), setting)
    assert json.loads(lost.read_text())["seconds"] > 0 and kept.read_text() == before


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(splits=-1), "^splits: -1 cannot be used; give 0 or more$"),
        (dict(splits=2, seeds=3), "^seeds: 3 beside splits, .* leave seeds out$"),
        (dict(splits=2, tuning_seeds=2), "^tuning_seeds: 2 beside splits"),
        (
            dict(splits=2, data={"a": CompareData(path="a.npz", split_seed=1)}),
            "^data: split_seed of a is 1, .* leave it out$",
        ),
        (dict(test_fraction=0.0), "^test_fraction: 0.0"),
        (dict(validation_fraction=1.0), "^validation_fraction: 1.0"),
        (dict(test_fraction=0.5, validation_fraction=0.5), "leaves none for training; give less$"),
        (dict(conditions="noise,fog"), "^conditions: 'fog' is none of missing, noise, .*mild"),
        (dict(region_nll=-1.0), "^region_nll: -1.0"),
        (dict(join=""), "^join: names no file"),
        (dict(join="a.csv", splits=2), "^splits: the parts of join have theirs"),
    ],
)
def test_wrong_options_get_one_line(options, message):
    with pytest.raises(InputError, match=message) as error:
        CompareConfig(**options)
    assert "\n" not in str(error.value)


def test_rates_by_modality_are_what_compare_chooses():
    from iibalance.config import TrainingConfig

    with pytest.raises(InputError, match="^training.learning_rates: compare chooses them"):
        CompareConfig(training=TrainingConfig(alone=False, learning_rates={"a": 0.1}))
