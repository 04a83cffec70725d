"""The comparison: what it writes, that it goes on, and that every method gets the same.

And that its numbers are those of the predictions that it keeps.
"""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from iibalance import InputError
from iibalance.cli import run as cli
from iibalance.comparison.cells import Cell, cell_files, run_cell, run_config
from iibalance.comparison.protocol import choose, compare, settings_of
from iibalance.comparison.results import METRICS, by_method, group_means, read_table
from iibalance.comparison.statistics import (
    _samples,
    ablation_names,
    ablations,
    heads_over_alone,
    paired_bootstrap,
    ranks,
)
from iibalance.comparison.tables import page as markdown
from iibalance.config import CompareConfig, CompareData, ModelConfig
from iibalance.data.dataset import Batch
from iibalance.files import recorded_command
from iibalance.methods import METHODS, make_method, search_of
from iibalance.methods.iibalance import ABLATIONS

METHOD_PAGE = Path(__file__).parents[2] / "iibalance" / "README.md"
SMALL = dict(
    seeds=2,
    trials=2,
    epochs=2,
    workers=1,
    timing_steps=1,
    bootstrap=50,
    model=ModelConfig(embedding_dim=8, width=4),
)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Two views of a label: the second alone is good, the first helps."""
    generator = np.random.default_rng(0)
    y = np.arange(240) % 3
    path = tmp_path_factory.mktemp("compare") / "two.npz"
    signal = np.eye(3)[y]
    np.savez(
        path,
        x_weak=signal @ generator.normal(size=(3, 6)) + generator.normal(size=(240, 6)),
        x_strong=2 * signal @ generator.normal(size=(3, 5)) + generator.normal(size=(240, 5)),
        y=y,
    )
    return str(path)


def config(npz, folder, **options):
    return CompareConfig(
        **{
            **SMALL,
            "data": {"two": CompareData(name="npz", path=npz)},
            "output": str(folder),
            **options,
        }
    )


@pytest.fixture(scope="module")
def done(npz, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "out"
    return folder, compare(
        config(npz, folder, methods="concat,iibalance,iibalance_fixed_gate,ensemble,ogm_ge")
    )


def test_what_is_written(done):
    folder, result = done
    assert {"comparison.csv", "comparison.md", "comparison.png", "compare.yaml", "run.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert not result["failures"]
    table = by_method(read_table(folder / "comparison.csv"))
    whole = {
        name: entry for name, entry in table["two"].items() if not name.startswith("iibalance_")
    }
    assert ranks({"two": whole}) == result["ranks"]
    for method, entry in result["results"]["two"].items():
        assert table["two"][method] == {key: entry[key] for key in table["two"][method]}
    assert set(result["results"]["two"]) == {
        "unimodal",
        "concat",
        "iibalance",
        "iibalance_fixed_gate",
        "ensemble",
        "ogm_ge",
    }
    entry = result["results"]["two"]["iibalance"]
    assert set(entry["conditions"]) == {
        "clean",
        "weak missing",
        "strong missing",
        "weak noise",
        "strong noise",
        "low data",
    }
    assert (
        set(entry["conditions"]["clean"]["accuracy"]["values"]) == {0, 1}
        and entry["seconds_a_step"]["mean"] > 0
    )
    (start,) = result["machine"]["starts"]
    assert (
        start["versions"]["torch"]
        and start["command"] == recorded_command()
        and result["machine"]["data_sha256"]["two"]
    )
    text = (folder / "comparison.md").read_text()
    for part in (
        "Average rank",
        "| iibalance |",
        "ms a step",
        "Chosen settings",
        "Paired bootstrap",
        "utilisation",
    ):
        assert part in text


def test_the_numbers_are_those_of_the_kept_predictions(done):
    folder, result = done
    for method in ("concat", "iibalance"):
        entry = result["results"]["two"][method]
        for seed in (0, 1):
            with np.load(cell_files(folder, Cell("two", method, seed, 0, "test"))[1]) as arrays:
                for condition, row in entry["conditions"].items():
                    if condition == "low data":
                        continue
                    log_p = arrays[condition]
                    assert row["accuracy"]["values"][seed] == pytest.approx(
                        (log_p.argmax(1) == arrays["targets"]).mean()
                    )
                    assert row["nll"]["values"][seed] == pytest.approx(
                        -log_p[np.arange(len(log_p)), arrays["targets"]].mean(), rel=1e-4
                    )
        values = list(entry["conditions"]["clean"]["nll"]["values"].values())
        assert entry["conditions"]["clean"]["nll"]["mean"] == pytest.approx(np.mean(values))
        assert entry["conditions"]["clean"]["nll"]["error"] == pytest.approx(
            np.std(values, ddof=1) / math.sqrt(2)
        )
    alone, ours = (
        result["results"]["two"]["unimodal"]["heads"]["strong"],
        result["results"]["two"]["iibalance"]["heads"]["strong"],
    )
    assert ours["utilisation"]["values"][1] == pytest.approx(
        ours["accuracy"]["values"][1] / alone["accuracy"]["values"][1]
    )


def _accuracies(**by_seed):
    return {
        "heads": {
            modality: {
                "accuracy": {"mean": 0.0, "error": None, "values": values},
                "utilisation": None,
            }
            for modality, values in by_seed.items()
        }
    }


def test_heads_are_set_beside_those_alone_seed_by_seed(done):
    results = {
        "two": {
            "ours": _accuracies(a={0: 0.5, 1: 0.7, 2: 0.6}, b={0: 0.9, 1: 0.9}),
            "alone": _accuracies(a={0: 0.4, 1: 0.8, 2: 0.6}, b={1: 0.8, 2: 0.1}),
            "concat": _accuracies(a={0: 0.1}),
        },
        "one": {"alone": _accuracies(a={0: 1.0})},
    }
    found = heads_over_alone(results, "ours", ["alone", "ours", "elsewhere"])
    assert set(found) == {"two"} and set(found["two"]["a"]) == set(found["two"]["b"]) == {"alone"}
    a, b = found["two"]["a"]["alone"], found["two"]["b"]["alone"]
    assert (
        a["values"] == pytest.approx({0: 0.1, 1: -0.1, 2: 0.0})
        and a["mean"] == pytest.approx(0, abs=1e-12)
        and a["error"] == pytest.approx(0.1 / math.sqrt(3))
    )
    assert b["values"] == pytest.approx({1: 0.1}) and b["error"] is None
    result = dict(done[1])
    assert set(result["heads"]["two"]["strong"]) == {
        "unimodal",
        "ensemble",
    }  # concat and ogm_ge train no encoder alone
    row = lambda mean, error: {"mean": mean, "error": error, "values": {}}
    result["heads"] = {
        "two": {
            "weak": {"unimodal": row(-0.03, 0.01), "ensemble": row(-0.03, 0.02)},
            "strong": {"unimodal": row(0.0, 0.01), "ensemble": row(-0.01, None)},
        }
    }
    text = markdown(result)
    assert (
        "| two | weak | -3.0 +- 1.0 | -3.0 +- 2.0 |" in text
        and "|  | 1 of 2, 1 | 0 of 2, 0 |" in text
    )


def test_the_lowest_validation_nll_is_chosen_and_ablations_take_their_methods_settings(done):
    folder, result = done
    tried = {row["method"]: row["tried"] for row in result["trials"]}
    assert "iibalance_fixed_gate" not in tried and set(tried) == {
        "unimodal",
        "concat",
        "iibalance",
        "ensemble",
        "ogm_ge",
    }
    for method, rows in tried.items():
        assert len(rows) == 2
        best = min(rows, key=lambda trial: rows[trial]["validation_nll"])
        assert result["results"]["two"][method]["trial"] == best
    assert (
        result["results"]["two"]["iibalance_fixed_gate"]["setting"]
        == result["results"]["two"]["iibalance"]["setting"]
    )


@pytest.mark.slow
def test_every_setting_is_tried_with_each_tuning_seed_and_the_mean_is_what_counts(npz, tmp_path):
    result = compare(
        config(
            npz, tmp_path, methods="concat,iibalance", tuning_seeds=2, low_data=0.0, timing_steps=0
        )
    )
    for row in result["trials"]:
        for trial, tried in row["tried"].items():
            cells = [
                cell_files(tmp_path, Cell("two", row["method"], seed, int(trial), "trial"))[0]
                for seed in (0, 1)
            ]
            found = [json.loads(path.read_text())["validation"] for path in cells]
            assert tried["seeds"] == 2 and found[0] != found[1]
            for metric in ("nll", "accuracy"):
                assert tried[f"validation_{metric}"] == pytest.approx(
                    (found[0][metric] + found[1][metric]) / 2
                )
    assert "with seeds 0 to 1" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    "nll, best",
    [
        (
            {(0, 0): 0.5, (0, 1): 0.4, (1, 0): 0.5, (1, 1): 0.7},
            0,
        ),  # seed 0 alone would take the second
        ({(0, 0): 0.5, (0, 1): 0.4, (1, 0): 0.5, (1, 1): 0.5}, 1),
        ({(0, 0): 0.5, (0, 1): 0.1, (1, 0): 0.5}, 0),  # the better one has failed once
        ({(1, 0): 0.5, (0, 1): 0.1}, 1),  # each failed once
    ],
)
def test_the_setting_with_the_lowest_mean_is_chosen_and_one_that_failed_once_is_not(
    tmp_path, nll, best
):
    trials = [Cell("two", "concat", seed, trial, "trial") for seed in (0, 1) for trial in (0, 1)]
    (tmp_path / "cells").mkdir()
    for (seed, trial), value in nll.items():
        cell_files(tmp_path, Cell("two", "concat", seed, trial, "trial"))[0].write_text(
            json.dumps({"validation": {"nll": value, "accuracy": 0.5}})
        )
    chosen, searched = choose(
        tmp_path, trials, {"concat": [{"learning_rate": 1.0}, {"learning_rate": 2.0}]}
    )
    assert chosen == {("two", "concat"): best}
    for trial, row in searched["two", "concat"].items():
        values = [value for (_, number), value in nll.items() if number == trial]
        assert row == {
            "learning_rate": trial + 1.0,
            "validation_nll": pytest.approx(sum(values) / len(values)),
            "validation_accuracy": 0.5,
            "seeds": len(values),
        }


@pytest.mark.usefixtures("no_pictures")
def test_going_on_trains_nothing_again(done, npz):
    folder, first = done
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    result = compare(
        config(npz, folder, methods="concat,iibalance,iibalance_fixed_gate,ensemble,ogm_ge")
    )
    assert stamps == {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    assert (
        result["results"] == first["results"]
        and result["bootstrap"] == first["bootstrap"]
        and result["machine"] == first["machine"]
    )
    with pytest.raises(InputError, match="epochs: differs"):
        compare(config(npz, folder, epochs=3))


@pytest.mark.slow
def test_going_on_takes_more_seeds_and_methods_and_says_what_it_was_started_with(
    npz, tmp_path, monkeypatch
):
    options = dict(methods="concat", focus="concat", trials=1, timing_steps=0)
    first = compare(config(npz, tmp_path, **options | {"seeds": 1}))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    monkeypatch.setattr(sys, "argv", ["iibalance", "compare", "--seeds", "3"])
    result = compare(
        config(
            npz, tmp_path, **options | {"methods": "concat,sum", "seeds": 3, "low_data_seeds": 2}
        )
    )
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    for method in ("concat", "sum"):
        conditions = result["results"]["two"][method]["conditions"]
        assert set(conditions["clean"]["nll"]["values"]) == {0, 1, 2} and set(
            conditions["low data"]["nll"]["values"]
        ) == {0, 1}
    assert (
        result["results"]["two"]["concat"]["conditions"]["clean"]["nll"]["values"][0]
        == first["results"]["two"]["concat"]["conditions"]["clean"]["nll"]["values"][0]
    )
    before, after = result["machine"]["starts"]
    assert before == first["machine"]["starts"][0] and after["command"] == recorded_command()
    text = (tmp_path / "comparison.md").read_text()
    assert (
        "3 seeds (low data: 2 seeds); mean" in text
        and "Command: `iibalance compare --seeds 3`" in text
        and f"Command: `{' '.join(before['command'])}`" in text
    )


def test_trainings_of_another_version_of_the_code_are_not_shared(npz, tmp_path, monkeypatch):
    options, setting = config(npz, tmp_path), settings_of(config(npz, tmp_path), "ensemble")[0]
    run_cell(str(tmp_path), options, Cell("two", "ensemble", 0, 0, "test"), setting)
    before = {path.name for path in (tmp_path / "stages").glob("*.safetensors")}
    run_cell(str(tmp_path), options, Cell("two", "ensemble_gated", 0, 0, "test"), setting)
    alone = lambda: {path.name for path in (tmp_path / "stages").glob("alone-*.safetensors")}
    assert before == alone() and len(before) == 2
    monkeypatch.setattr("iibalance.comparison.cells.code_digest", lambda: "another")
    run_cell(str(tmp_path), options, Cell("two", "unimodal", 0, 0, "test"), setting)
    assert len(alone()) == 4


@pytest.mark.usefixtures("no_pictures")
def test_predictions_of_a_cell_without_numbers_count_for_nothing(npz, tmp_path, monkeypatch):
    options = config(npz, tmp_path, methods="concat,sum", trials=1, low_data=0.0, timing_steps=0)
    assert compare(options)["focus"] == "concat"  # ours is not among them
    numbers, predictions = cell_files(tmp_path, Cell("two", "concat", 1, 0, "test"))
    assert set(
        _samples(
            tmp_path,
            [Cell("two", "concat", seed, 0, "test") for seed in (0, 1)],
            "two",
            "concat",
            "clean",
            "nll",
        )
    ) == {0, 1}
    numbers.unlink()
    assert set(
        _samples(
            tmp_path,
            [Cell("two", "concat", seed, 0, "test") for seed in (0, 1)],
            "two",
            "concat",
            "clean",
            "nll",
        )
    ) == {0}
    monkeypatch.setattr(
        "iibalance.comparison.cells.load_data",
        lambda options: (_ for _ in ()).throw(InputError("data: gone")),
    )
    result = compare(options)
    assert "data: gone" in result["failures"]["test-two-concat-seed1"] and not predictions.exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_cell_that_was_lost_comes_back_the_same(done, npz):
    folder, first = done
    numbers, predictions = cell_files(folder, Cell("two", "concat", 1, 0, "test"))
    before, kept = json.loads(numbers.read_text()), predictions.read_bytes()
    numbers.unlink()
    predictions.unlink()
    for path in (folder / "stages").glob("joint-*"):
        path.unlink()
    compare(config(npz, folder, methods="concat,iibalance,iibalance_fixed_gate,ensemble,ogm_ge"))
    after = json.loads(numbers.read_text())
    times = ("seconds", "train_seconds")
    assert {key: value for key, value in after.items() if key not in times} == {
        key: value for key, value in before.items() if key not in times
    }
    assert predictions.read_bytes() == kept


@pytest.mark.slow
def test_shared_trainings_are_made_once(npz, tmp_path):
    settings = config(npz, tmp_path)
    (tmp_path / "cells").mkdir()
    made = lambda: sorted(
        path.name.rsplit("-", 1)[0] for path in (tmp_path / "stages").glob("*.safetensors")
    )
    run = lambda *methods: [
        run_cell(
            str(tmp_path),
            settings,
            Cell("two", method, 0, 0, "trial"),
            settings_of(settings, "concat")[0],
        )
        for method in methods
    ]
    run("unimodal", "ensemble", "mla", "iibalance", "iibalance_no_gate", "iibalance_fixed_gate")
    alone, folds = (
        ["alone-0", "alone-1"],
        [f"fold-{fold}-{m}" for fold in range(3) for m in range(2)],
    )
    assert made() == sorted([*alone, *folds, "joint"])
    run(
        "iibalance_no_warm_start", "iibalance_with_alignment"
    )  # trainings of their own, after the same budgets
    assert made() == sorted([*alone, *folds, *3 * ["joint"]])
    run("ensemble_gated")  # its budget stage has no prototype terms, as its training has none
    assert made() == sorted([*alone, *2 * folds, *3 * ["joint"]])
    run("iibalance_no_prototypes")  # nor has this one's
    assert made() == sorted([*alone, *2 * folds, *4 * ["joint"]])


def test_every_method_tries_the_same_learning_rates_and_decays(npz, tmp_path):
    settings = config(npz, tmp_path, trials=5)
    drawn = {method: settings_of(settings, method) for method in METHODS}
    rates = {
        tuple((row["learning_rate"], row["weight_decay"]) for row in rows)
        for rows in drawn.values()
    }
    assert len(rates) == 1 and len(set(next(iter(rates)))) == 5
    for name, rows in drawn.items():  # every value of the main parameter has its turn
        for parameter, values in search_of(METHODS[name]).items():
            assert tuple(row[parameter] for row in rows[: len(values)]) == values
    first = drawn["ogm_ge"][0]
    assert (
        first["learning_rate"] == pytest.approx(settings.training.learning_rate)
        and first["alpha"] == make_method("ogm_ge").options.alpha
    )
    made = run_config(
        settings,
        Cell("two", "iibalance", 0, 1, "test"),
        {"learning_rate": 0.1, "weight_decay": 0.2, "objective.alpha": 0.3},
    )
    assert (
        made.training.learning_rate,
        made.training.weight_decay,
        made.objective.alpha,
        made.method_options,
    ) == (0.1, 0.2, 0.3, {})


@pytest.mark.slow
def test_a_method_defined_for_two_modalities_is_left_out_of_three(tmp_path):
    result = compare(
        CompareConfig(
            **{**SMALL, "seeds": 1, "trials": 1, "low_data": 0.0, "timing_steps": 0},
            methods="ogm_ge,concat,iibalance",
            output=str(tmp_path / "o"),
        )
    )
    assert set(result["results"]["digits"]) == {"unimodal", "concat", "iibalance"}
    assert "low data" not in result["results"]["digits"]["concat"]["conditions"]


@pytest.mark.slow
def test_a_users_own_method(npz, tmp_path):
    """The method page's own, as it stands there."""
    text = next(
        block
        for block in re.findall(
            r"```python\n(.*?)```", METHOD_PAGE.read_text(encoding="utf-8"), re.S
        )
        if "class Smoothed" in block
    )
    (tmp_path / "mine.py").write_text(text)
    name = f"{tmp_path}/mine.py:Smoothed"
    result = compare(
        config(
            npz,
            tmp_path / "out",
            methods=[name, "iibalance"],
            seeds=1,
            low_data=0.0,
            focus="smoothed",
        )
    )
    assert (
        "smoothed" in result["results"]["two"]
        and result["focus"] == "smoothed"
        and not result["failures"]
    )
    tried = next(row["tried"] for row in result["trials"] if row["method"] == "smoothed")
    assert [row["amount"] for row in tried.values()] == [0.1, 0.3] and result["results"]["two"][
        "smoothed"
    ]["seconds_a_step"]["mean"] > 0
    plain, little, much = (_smoothed(amount, name) for amount in (0.0, 0.1, 5.0))
    assert plain > little > much  # smoother


def _smoothed(amount, name):
    """The largest probability, on average, of a model trained with README's method."""
    targets = torch.arange(600) % 4
    generator = torch.Generator().manual_seed(0)
    inputs = {
        m: scale * torch.eye(5)[targets] + torch.randn(600, 5, generator=generator)
        for m, scale in (("weak", 1.0), ("strong", 2.0))
    }
    torch.manual_seed(0)
    method = make_method(name, amount=amount)
    model = method.build({m: torch.nn.Linear(5, 8) for m in inputs}, 4)
    optimizer = torch.optim.Adam(method.parameter_groups(model), lr=0.03)
    batch = Batch(inputs, targets, None)
    for _ in range(30):
        out = method.step(model, optimizer, batch)
    return out.logits.softmax(-1).amax(1).mean()


@pytest.mark.slow
def test_a_users_file_that_changed_is_trained_anew(npz, tmp_path):
    def write(text):
        (tmp_path / "mine.py").write_text(
            "from iibalance.methods.iibalance import IIBalance\n\n"
            f"class Mine(IIBalance):\n    name = 'mine'\n\n{text}\n"
            "\n\nclass Other(IIBalance):\n    name = 'other'\n"
        )
        for name in [name for name in sys.modules if name.startswith("iibalance_user_mine")]:
            del sys.modules[name]  # as another process
        specs = [f"{tmp_path}/mine.py:{name}" for name in ("Mine", "Other")]
        result = compare(
            config(
                npz,
                tmp_path / "out",
                methods=[*specs, "iibalance"],
                seeds=1,
                trials=1,
                low_data=0.0,
                timing_steps=0,
            )
        )
        stamps = {
            path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()
        }
        mine, other, ours = (
            result["results"]["two"][name]["conditions"]["clean"]["nll"]["mean"]
            for name in ("mine", "other", "iibalance")
        )
        assert other == ours
        return mine, ours, stamps

    mine, ours, before = write(
        "    def loss(self, output, model, batch, progress):\n        return 0.0 * output.loss"
    )
    assert mine > ours + 0.05  # not the training of the class it is derived from
    again, _, same = write(
        "    def loss(self, output, model, batch, progress):\n        return 0.0 * output.loss"
    )
    assert again == mine and same == before
    changed, kept, after = write("    pass")
    assert changed == kept == ours
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if "-own-" in name
    }


@pytest.mark.usefixtures("no_pictures")
def test_a_users_file_that_changes_under_a_process_is_read_again(npz, tmp_path):
    """As in a notebook; and the focus may be given as the methods are."""
    place = tmp_path / "shifting.py"
    name = f"{place}:Shifting"
    for factor in ("1.0", "0.0", "1.0"):
        place.write_text(
            "from iibalance.methods.sum import Sum\n\n"
            "class Shifting(Sum):\n    name = 'shifting'\n\n"
            "    def loss(self, output, model, batch, progress):\n"
            f"        return {factor} * output.loss\n"
        )
        result = compare(
            config(
                npz,
                tmp_path / "out",
                methods=[name, "sum"],
                focus=name,
                seeds=1,
                trials=1,
                low_data=0.0,
                timing_steps=0,
            )
        )
        assert result["focus"] == "shifting" and not result["failures"]
        ours, plain = (
            result["results"]["two"][method]["conditions"]["clean"]["nll"]["mean"]
            for method in ("shifting", "sum")
        )
        assert (ours == plain) == (factor == "1.0")


def test_a_cell_of_another_setting_is_made_anew(npz, tmp_path):
    """A trial that had failed and comes out best later changes the setting of what follows."""
    settings, cell = config(npz, tmp_path), Cell("two", "sum", 0, 0, "test")
    first, second = settings_of(settings, "sum")
    numbers = cell_files(tmp_path, cell)[0]
    (tmp_path / "cells").mkdir()
    seen = []
    for setting in (first, first, second, first):
        run_cell(str(tmp_path), settings, cell, setting)
        seen.append(numbers.stat().st_mtime_ns)
        assert json.loads(numbers.read_text())["setting"] == setting
    assert seen[0] == seen[1] < seen[2] < seen[3]


@pytest.mark.usefixtures("no_pictures")
def test_it_says_which_versions_made_it(done, npz):
    folder, result = done
    ((only, count),) = result["made_by"].items()
    assert (
        re.match(r"code [0-9a-f]{12}, torch ", only)
        and count == 6 * 2 * 2
        and "Not all of one version" not in (folder / "comparison.md").read_text()
    )
    path = cell_files(folder, Cell("two", "concat", 1, 0, "test"))[0]
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"code": "0123456789ab"}))
    compare(config(npz, folder, methods="concat,iibalance,iibalance_fixed_gate,ensemble,ogm_ge"))
    assert "1 cells by code 0123456789ab" in (folder / "comparison.md").read_text()
    path.write_text(kept)


@pytest.mark.slow
def test_a_method_that_comes_later_is_timed_beside_the_others_and_more_steps_are_timed_anew(
    npz, tmp_path
):
    options = dict(seeds=1, trials=1, low_data=0.0, folder=tmp_path)

    def seconds(methods, steps):
        results = compare(config(npz, methods=methods, timing_steps=steps, **options))["results"][
            "two"
        ]
        return {
            method: entry["seconds_a_step"]["values"]
            for method, entry in results.items()
            if method in methods.split(",")
        }

    first = seconds("concat,iibalance", 2)
    assert seconds("concat,iibalance", 2) == first
    later = seconds("concat,iibalance,sum", 2)
    assert (
        set(later) == {"concat", "iibalance", "sum"}
        and all(len(values) == 2 for values in later.values())
        and later["concat"] != first["concat"]
    )
    assert all(len(values) == 3 for values in seconds("concat,iibalance,sum", 3).values())


@pytest.mark.slow
def test_two_workers_give_what_one_gives(npz, tmp_path):
    options = dict(
        methods="concat,ensemble,iibalance", seeds=1, trials=1, timing_steps=0, low_data=0.0
    )
    one, two = (
        compare(config(npz, tmp_path / str(workers), workers=workers, **options))
        for workers in (1, 2)
    )
    assert one["results"] == two["results"]


@pytest.mark.slow
def test_workers_end_with_a_comparison_that_is_killed_and_another_goes_on(npz, tmp_path):
    (tmp_path / "compare.yaml").write_text(
        f"data: {{two: {{name: npz, path: {npz}}}}}\n"
        "methods: [concat, sum, mslr, agm, ensemble, iibalance]\n"
        "seeds: 2\ntrials: 1\nepochs: 3\nworkers: 2\nlow_data: 0\n"
        "timing_steps: 0\nmodel: {width: 4, embedding_dim: 8}\n"
    )
    command = [
        sys.executable,
        "-m",
        "iibalance",
        "compare",
        "--config",
        str(tmp_path / "compare.yaml"),
        "--output",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers = []
    for _ in range(600):
        time.sleep(0.1)
        workers = workers or [
            int(pid)
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        if process.poll() is None and len(list((tmp_path / "out" / "cells").glob("*.json"))) >= 2:
            break
    workers = [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    process.kill()
    process.wait()
    for _ in range(150):
        alive = [
            pid
            for pid in workers
            if Path(f"/proc/{pid}/stat").exists()
            and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
        ]
        if not alive:
            break
        time.sleep(0.1)
    assert len(workers) >= 2 and not alive
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "out" / "comparison.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seeds=0), "seeds: 0"),
        (dict(tuning_seeds=0), "tuning_seeds: 0"),
        (dict(seeds=1, tuning_seeds=2), "tuning_seeds: 2"),
        (dict(methods="magic"), "method: 'magic'"),
        (dict(low_data=1.5), "low_data: 1.5"),
        (dict(data={}), "data: {}"),
        (
            dict(focus="ogm_ge", methods="concat"),
            "focus: ogm_ge is not compared; give --focus NAME, one of unimodal, concat",
        ),
        (dict(methods="concat,nowhere.py:Mine"), "nowhere.py: no such file"),
        (dict(methods="concat,iibalance.nn.model:Prediction"), "has no class Prediction derived"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(npz, tmp_path, options, message):
    with pytest.raises(InputError, match=message.replace("{", r"\{").replace("}", r"\}")):
        compare(config(npz, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_failed_cell_is_reported_and_the_others_go_on(npz, tmp_path, monkeypatch):
    from iibalance.methods.concat import Concat

    def diverge(self, *_):
        raise FloatingPointError("the loss became nan")

    monkeypatch.setattr(Concat, "loss", diverge)
    result = compare(
        config(
            npz,
            tmp_path / "out",
            methods="concat,iibalance",
            seeds=1,
            trials=1,
            low_data=0.0,
            timing_steps=0,
        )
    )
    assert "concat" not in result["results"]["two"] and "iibalance" in result["results"]["two"]
    assert (
        any("the loss became nan" in text for text in result["failures"].values())
        and "Failed" in (tmp_path / "out" / "comparison.md").read_text()
    )


def test_the_command(npz, tmp_path, capsys):
    (tmp_path / "compare.yaml").write_text(
        f"data: {{two: {{name: npz, path: {npz}, epochs: 1}}}}\nmethods: [concat, iibalance]\n"
        "seeds: 1\ntrials: 1\nepochs: 2\nworkers: 1\nlow_data: 0\ntiming_steps: 0\n"
        "model: {width: 4, embedding_dim: 8}\n"
    )
    assert (
        cli(
            [
                "compare",
                "--config",
                str(tmp_path / "compare.yaml"),
                "--output",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "average rank" in out and "comparison.md" in out and "iibalance" in out
    assert "48 samples, 1 epochs." in (tmp_path / "out" / "comparison.md").read_text()
    assert cli(["compare", "--seeds", "0"]) == 2 and "seeds: 0" in capsys.readouterr().err


# -- statistics


def test_ranks_share_ties_and_average_over_sets():
    def entry(accuracy, nll):
        spread = lambda value: {"mean": value, "error": None, "values": {0: value}}
        return {"conditions": {"clean": {"accuracy": spread(accuracy), "nll": spread(nll)}}}

    table = ranks(
        {
            "one": {"a": entry(0.9, 0.2), "b": entry(0.9, 0.1), "c": entry(0.5, 0.3)},
            "two": {"a": entry(0.7, 0.5), "c": entry(0.8, 0.9)},
        }
    )
    accuracy = table["clean"]["accuracy"]
    assert (accuracy["a"]["rank"], accuracy["b"]["rank"], accuracy["c"]["rank"]) == (1.75, 1.5, 2.0)
    assert table["clean"]["nll"]["a"] == {"rank": 1.5, "sets": 2} and accuracy["b"]["sets"] == 1

    def seeds(*values):
        return {
            "conditions": {
                "clean": {
                    metric: {"values": dict(enumerate(values))} for metric in ("accuracy", "nll")
                }
            }
        }

    first, second = (0.1, 0.2, 0.3), (0.3, 0.2, 0.1)
    assert sum(first) != sum(second)  # the same three, added in another order
    table = ranks(
        {"one": {"a": seeds(*first), "b": seeds(*second), "c": seeds(0.3, 0.2, 0.100001)}}
    )
    assert {method: row["rank"] for method, row in table["clean"]["accuracy"].items()} == {
        "c": 1.0,
        "a": 2.5,
        "b": 2.5,
    }


def test_conditions_of_a_kind_are_averaged_over_the_modalities():
    row = lambda value: {"accuracy": {"values": {0: value, 1: value + 0.1}}}
    means = group_means(
        {
            "conditions": {
                "clean": row(0.9),
                "left noise": row(0.5),
                "right noise": row(0.7),
                "my left missing": row(0.2),
            }
        },
        "accuracy",
    )
    assert (
        means["noise"][0] == pytest.approx(0.6)
        and means["noise"][1] == pytest.approx(0.7)
        and means["missing"][0] == 0.2
    )


def test_the_bootstrap_covers_what_it_should():
    """Of many pairs without a difference about one in twenty is called different.

    A real difference is found.
    """
    generator = np.random.default_rng(0)
    wrong = 0
    for trial in range(100):
        first, second = generator.normal(size=(2, 1, 80))
        found = paired_bootstrap(first, second, resamples=200, seed=trial)
        wrong += not found["low"] <= 0 <= found["high"]
    assert wrong <= 14
    base = generator.normal(size=(5, 100))
    found = paired_bootstrap(
        base + 0.3 + 0.1 * generator.normal(size=(5, 100)), base, resamples=500
    )
    by_seed = np.array([[0.5], [-0.1], [0.3], [-0.3], [0.1]]) + np.zeros(
        (5, 100)
    )  # samples agree, seeds do not
    unsure = paired_bootstrap(by_seed, np.zeros((5, 100)), resamples=500)
    assert unsure["low"] < 0 < unsure["high"] and unsure["p"] > 0.2
    assert (
        found["low"] > 0.2
        and found["p"] < 0.01
        and found["difference"] == pytest.approx(0.3, abs=0.03)
    )


def test_ablations_are_set_beside_the_whole_and_take_no_rank(done):
    def entry(*values):
        return {
            "conditions": {
                "clean": {metric: {"values": dict(enumerate(values))} for metric in METRICS}
            }
        }

    table = ablations(
        {
            "one": {"m": entry(0.5, 0.6), "m_less": entry(0.4, 0.7), "other": entry(0.9, 0.9)},
            "two": {"m": entry(0.5, 0.5), "m_less": entry(0.2, 0.5)},
        },
        "m",
        ["m_less"],
    )
    assert set(table) == {"clean"} and set(table["clean"]["accuracy"]) == {"m_less"}
    found = table["clean"]["accuracy"]["m_less"]
    assert (
        found["values"] == pytest.approx({0: -0.2, 1: 0.05})
        and found["mean"] == pytest.approx(-0.075)
        and found["error"] == pytest.approx(0.125)
    )
    partial = ablations(
        {
            "one": {"m": entry(0.5, 0.6), "m_less": entry(0.4, 0.7)},
            "two": {"m": entry(0.5), "m_less": entry(0.2)},
        },
        "m",
        ["m_less"],
    )
    assert partial["clean"]["nll"]["m_less"]["values"] == pytest.approx(
        {0: -0.2}
    )  # a seed that one set does not have yet would be another average
    folder, result = done
    assert set(result["ranks"]["clean"]["nll"]) == {
        "unimodal",
        "concat",
        "iibalance",
        "ensemble",
        "ogm_ge",
    }
    assert set(result["ablations"]["noise"]["accuracy"]) == {"iibalance_fixed_gate"}
    conditions = {
        name: result["results"]["two"][name]["conditions"]
        for name in ("iibalance", "iibalance_fixed_gate")
    }
    expected = [
        sum(
            conditions["iibalance_fixed_gate"][f"{m} noise"]["nll"]["values"][seed]
            - conditions["iibalance"][f"{m} noise"]["nll"]["values"][seed]
            for m in ("weak", "strong")
        )
        / 2
        for seed in (0, 1)
    ]
    assert list(
        result["ablations"]["noise"]["nll"]["iibalance_fixed_gate"]["values"].values()
    ) == pytest.approx(expected)
    assert "## Ablations of iibalance" in (folder / "comparison.md").read_text()


def test_what_an_ablation_is():
    names = [method.name for method in ABLATIONS]
    assert ablation_names(METHODS) == dict.fromkeys(names, "iibalance") and len(names) == 5
    assert ablation_names([*names, "ensemble", "ensemble_gated"]) == {}  # no whole; a longer name


def test_the_picture_draws_every_method(done):
    from iibalance.comparison.picture import picture

    figure = picture(done[1])
    assert len(figure.axes) == 8  # accuracy and NLL of four kinds of conditions
    for axes in figure.axes:
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert sorted(names) == ["concat", "ensemble", "iibalance", "ogm_ge", "unimodal"]
        metric, kind = axes.get_title(loc="left").split(": ")[::-1]
        rows = done[1]["ranks"][kind][metric.lower()]
        assert [text.get_text() for text in axes.texts] == [f"{rows[n]['rank']:.1f}" for n in names]
    assert figure.get_suptitle() == "Rank on two (1 is best), 2 seeds"
