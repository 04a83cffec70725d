"""The command line from end to end on a small npz file.

Every command, what a run's folder holds, and that the numbers in it agree.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic
import torch
import yaml

import iibalance
from iibalance import cli
from iibalance.config import BudgetConfig, DataConfig, RunConfig, TrainingConfig
from iibalance.config_files import load_config
from iibalance.data import load_data
from iibalance.errors import InputError
from iibalance.files import read_model
from iibalance.training import budget_stage, loop
from iibalance.training.run import estimate_run_budgets

METHODS = ["iibalance", "concat", "sum", "unimodal", "ensemble"]
SMALL = [
    "--epochs",
    "2",
    "--model.width",
    "8",
    "--model.embedding_dim",
    "16",
    "--calibration.copies",
    "2",
    "--training.learning_rate",
    "0.02",
]
QUICK = ["--method", "concat", "--training.alone", "false"]  # one training
# Budgets by unimodal trainings take one training a fold and modality.
SOURCES = ["probe", pytest.param("unimodal", marks=pytest.mark.slow)]
TEST = np.arange(200) % 4 == 3  # the rows of the test split


def run(*arguments) -> str:
    """Run a command in this process; it must succeed. Returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.run([str(argument) for argument in arguments]) == 0
    return printed.getvalue()


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    split = np.select([TEST, np.arange(200) % 8 == 2], [2, 1], 0)
    return synthetic.write(
        tmp_path_factory.mktemp("data") / "clips.npz",
        split=split,
        classes=np.array(["go", "stop", "wait"]),
    )


@pytest.fixture(scope="module")
def train(tmp_path_factory, data):
    """Train with some options and return the run's folder; once for equal options."""
    done = {}

    def start(*more) -> Path:
        if more not in done:
            folder = tmp_path_factory.mktemp("runs") / "run"
            run(
                "train",
                "--data.name",
                "npz",
                "--data.path",
                data,
                "--output",
                folder,
                *SMALL,
                *more,
            )
            done[more] = folder
        return done[more]

    return start


@pytest.fixture(scope="module")
def test_file(tmp_path_factory) -> Path:
    """The samples of the test split, as new data to predict."""
    path = tmp_path_factory.mktemp("new") / "test.npz"
    np.savez(
        path,
        **{key: values[TEST] for key, values in synthetic.arrays().items()},
        ids=np.array([f"clip{row}" for row in np.flatnonzero(TEST)]),
    )
    return path


# What a run's folder holds


@pytest.mark.parametrize("method", METHODS)
def test_the_files_of_a_run(method, train):
    folder = train("--method", method)
    files = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    expected = {
        "config.yaml",
        "run.json",
        "metrics.json",
        "history.csv",
        "model.safetensors",
        "report.png",
        "report.svg",
        "report.pdf",
    }
    expected |= {"budgets.json"} if method == "iibalance" else set()
    expected |= {"tensorboard"} if importlib.util.find_spec("tensorboard") else set()
    assert files - {"checkpoints"} == expected
    config = load_config(folder / "config.yaml")
    assert (config.method, config.epochs, config.model.width, config.output) == (
        method,
        2,
        8,
        str(folder),
    )
    assert [row["epoch"] for row in rows(folder / "history.csv")] == ["1", "2"]
    assert (folder / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    weights, metadata = read_model(folder / "model.safetensors")
    assert json.loads(metadata["iibalance"])["classes"] == ["go", "stop", "wait"]
    assert (
        sum(values.numel() for values in weights.values())
        > read(folder / "metrics.json")["parameters"]
        > 0
    )


@pytest.mark.parametrize("method", METHODS)
def test_metrics_have_every_key_and_agree_with_each_other(method, train, data):
    metrics = read(train("--method", method) / "metrics.json")
    test = metrics["test"]
    assert metrics["method"] == method and metrics["samples"] == {
        "train": 125,
        "validation": 25,
        "test": 50,
    }
    for numbers in (test, *test["modalities"].values()):
        assert (
            0 <= numbers["accuracy"] <= 1
            and 0 <= numbers["macro_f1"] <= 1
            and 0 <= numbers["ece"] <= 1
            and 0 <= numbers["brier"] <= 2
        )
        assert 0 < numbers["nll"] < 5
    assert test["accuracy"] > 0.5, "three classes, and the features tell them apart"
    assert list(test["modalities"]) == list(test["shapley"]) == ["audio", "visual"]
    for own in test["modalities"].values():
        assert own["utilisation"] == own["accuracy"] / own["alone_accuracy"]
    arrays = synthetic.arrays()
    majority = np.bincount(
        arrays["y"][(np.arange(200) % 4 != 3) & (np.arange(200) % 8 != 2)]
    ).argmax()
    assert sum(test["shapley"].values()) == pytest.approx(
        test["accuracy"] - np.mean(arrays["y"][TEST] == majority), abs=1e-9
    )
    if method == "concat":
        assert test["trust"] is None
    else:
        assert all(0 <= value <= 1 for value in test["trust"].values())
        assert list(test["trust"]) == list(test["contributions"]) == ["audio", "visual"]
    if method == "unimodal":  # the chosen modality, and the other where that is missing
        best = max(test["trust"], key=test["trust"].get)
        (other,) = set(test["trust"]) - {best}
        alone = ~arrays[f"mask_{best}"][TEST & arrays[f"mask_{other}"]]
        assert test["trust"] == {best: 1.0, other: pytest.approx(alone.mean(), abs=1e-6)}
    if method in ("unimodal", "ensemble"):
        assert all(own["utilisation"] == 1 for own in test["modalities"].values())


def test_budgets_in_the_folder_are_those_of_the_metrics(train):
    folder = train("--method", "iibalance")
    budgets, metrics = read(folder / "budgets.json"), read(folder / "metrics.json")
    assert (
        metrics["budgets"] == dict(zip(budgets["modalities"], budgets["values"]))
        and budgets["source"] == "unimodal"
    )
    assert all(0 <= value <= 1 for value in budgets["values"]) and any(budgets["values"])
    weights, _ = read_model(folder / "model.safetensors")
    assert weights["head.budgets"].tolist() == pytest.approx(budgets["values"])


def test_without_training_alone_there_is_no_utilisation(train):
    for own in read(train(*QUICK) / "metrics.json")["test"]["modalities"].values():
        assert own["alone_accuracy"] is None and own["utilisation"] is None


@pytest.mark.skipif(
    not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed"
)
def test_tensorboard_events_are_the_history(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train("--method", "iibalance")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for column in ("train.loss", "validation.nll", "validation.accuracy.audio"):
        found = {event.step: event.value for event in events.Scalars(column)}
        assert found == {
            int(row["epoch"]): pytest.approx(float(row[column]), rel=1e-5)
            for row in rows(folder / "history.csv")
        }


def recorded_digest(folder: Path) -> str | None:
    return read(folder / "run.json")["data_sha256"]


def test_a_run_records_the_sha256_of_its_file(data, train, tmp_path):
    expected = hashlib.sha256(data.read_bytes()).hexdigest()
    folder = train(*QUICK)
    assert recorded_digest(folder) == expected
    config = replace(load_config(folder / "config.yaml"), output=tmp_path / "python")
    iibalance.train(config)
    assert recorded_digest(tmp_path / "python") == expected
    assert (tmp_path / "python" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


@pytest.mark.usefixtures("no_pictures")
def test_digits_have_no_digest_and_are_resumed(tmp_path):
    run("train", *SMALL, *QUICK, "--output", tmp_path / "run")
    assert recorded_digest(tmp_path / "run") is None
    run("train", "--resume", tmp_path / "run")


def test_data_in_memory_are_not_given_beside_a_path(data, tmp_path):
    with np.load(data) as file:
        inputs = {name: file[f"x_{name}"] for name in ("audio", "visual")}
        samples = iibalance.Samples(inputs, file["y"])
    config = RunConfig(
        data=DataConfig(path=data),
        training=TrainingConfig(alone=False),
        method="concat",
        epochs=1,
        output=tmp_path / "run",
    )
    with pytest.raises(InputError, match=f"^data: is given beside config.data.path .{data}.; give"):
        iibalance.train(config, data=samples)
    assert not (tmp_path / "run").exists()
    iibalance.train(replace(config, data=DataConfig()), data=samples)  # the advice works
    assert recorded_digest(tmp_path / "run") == samples.digest()
    # The command line has no such data: of the run it can only say so.
    with pytest.raises(InputError, match="the run was started on samples, these are digits"):
        iibalance.train(replace(config, data=DataConfig()), resume=True)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_of_arrays_is_evaluated_and_predicts_on_files(data, test_file, tmp_path, capsys):
    with np.load(data) as file:
        inputs = {name: file[f"x_{name}"] for name in ("visual", "audio")}  # in another order
        mask = np.stack([file[f"mask_{name}"] for name in inputs], 1)
        samples = iibalance.Samples(
            inputs, file["y"], mask=mask, split=file["split"], classes=file["classes"].tolist()
        )
    folder, quick = tmp_path / "run", TrainingConfig(alone=False)
    config = RunConfig(method="concat", epochs=2, training=quick, output=folder)
    test = iibalance.train(config, data=samples).metrics["test"]
    run("evaluate", folder, "--data.path", data, "--output", tmp_path / "e.json")
    assert read(tmp_path / "e.json")["test"]["nll"] == pytest.approx(test["nll"], rel=1e-5)
    printed = run("predict", folder, "--data.path", test_file, "--output", tmp_path / "p.csv")
    assert f"accuracy on the labels in the file: {test['accuracy']:.4f}" in printed
    # A table, by its ending: its columns are not those that the run knows.
    np.savetxt(tmp_path / "new.csv", np.zeros((3, 2)), header="a,v", comments="", delimiter=",")
    for words, path in (
        ("digits: holds the modalities pixels, fourier, shape, the run has visual, audio", []),
        ("new.csv: data.columns: say which columns", ["--data.path", tmp_path / "new.csv"]),
        ("new.dat holds cannot be told from its name", ["--data.path", tmp_path / "new.dat"]),
    ):
        (tmp_path / "new.dat").touch()
        assert cli.run(["evaluate", str(folder), *map(str, path)]) == 2
        assert words in capsys.readouterr().err


# In a process of its own: where torch.compile has been at work, every call holds on to what it is
# given until it returns, as Python 3.10 does.
KEPT = """
import gc, sys, weakref
from iibalance import cli
from iibalance.data.samples import Samples
from iibalance.training import stages

made, init, fit = [], Samples.__init__, stages.Run.fit

def noted(self, *more, **options):
    init(self, *more, **options)
    made.append(weakref.ref(self))

def looked(self):
    gc.unfreeze()
    gc.collect()
    print("left:", [reference() for reference in made])
    return fit(self)

Samples.__init__, stages.Run.fit = noted, looked
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="a call holds on to its arguments")
def test_the_arrays_of_a_file_are_not_kept_beside_the_tensors(data, tmp_path):
    options = ["train", "--data.path", data, "--output", tmp_path / "run", *SMALL, *QUICK]
    command = [sys.executable, "-c", KEPT, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "left: [None]" in done.stdout


# Labels and columns of other files


@pytest.mark.usefixtures("no_pictures")
def test_labels_of_another_file_are_the_classes_by_name(tmp_path, capsys):
    """Eleven classes called "0" to "10", whose order as words is not that of the numbers."""
    random, y = np.random.default_rng(0), np.arange(330) % 11
    audio, other = 4 * np.eye(11)[y] + random.normal(size=(330, 11)), random.normal(size=(330, 2))
    inputs = {"x_audio": audio, "x_other": other}
    np.savez(tmp_path / "words.npz", **inputs, y=y.astype(str))
    folder = tmp_path / "run"
    options = [*SMALL, *QUICK, "--epochs", "20"]
    run("train", "--data.path", tmp_path / "words.npz", "--output", folder, *options)
    test = read(folder / "metrics.json")["test"]
    assert test["accuracy"] > 0.8
    names = sorted(map(str, range(11)))
    positions = np.array([names.index(str(label)) for label in y])
    same = {
        "words": {"y": y.astype(str)},
        "numbers": {"y": y},
        "positions": {"y": positions, "classes": np.array(names)},
        "otherwise": {"y": 10 - y, "classes": np.arange(10, -1, -1).astype(str)},
    }
    for kind, labels in same.items():
        path = tmp_path / f"{kind}.npz"
        np.savez(path, **inputs, **labels)
        run("evaluate", folder, "--data.path", path, "--output", tmp_path / "e.json")
        assert read(tmp_path / "e.json")["test"]["accuracy"] == pytest.approx(
            test["accuracy"], abs=0.03
        ), kind
        printed = run("predict", folder, "--data.path", path, "--output", tmp_path / "p.csv")
        found = float(printed.split("labels in the file: ")[1])
        predicted = np.array([row["prediction"] for row in rows(tmp_path / "p.csv")])
        assert found == pytest.approx((predicted == y.astype(str)).mean(), abs=1e-4)
    np.savez(tmp_path / "unknown.npz", **inputs, y=y + 1)
    for command in (["evaluate", folder], ["predict", folder, "--output", tmp_path / "q.csv"]):
        arguments = [*command, "--data.path", tmp_path / "unknown.npz"]
        assert cli.run([str(argument) for argument in arguments]) == 2
        assert "y: row 10 holds '11', which is none of the classes (0" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_columns_of_another_table_are_found_by_the_names_they_had_in_training(tmp_path, capsys):
    random, y = np.random.default_rng(0), np.arange(120) % 2
    frame = pd.DataFrame(random.normal(size=(120, 5)), columns=["a_1", "a_2", "a_3", "v_1", "v_2"])
    frame["a_1"] += 3 * y
    frame["a_y"] = y  # the pattern of audio fits the labels
    frame["split"] = np.arange(120) // 2 % 4 % 3
    frame.to_csv(tmp_path / "first.csv", index=False)
    folder = tmp_path / "run"
    columns = ["--data.columns", '{"audio": "a_*", "video": "v_*"}', "--data.target", "a_y"]
    path = tmp_path / "first.csv"
    run("train", "--data.path", path, "--output", folder, *SMALL, *QUICK, *columns)
    about = json.loads(read_model(folder / "model.safetensors")[1]["iibalance"])
    assert about["columns"] == {"audio": ["a_1", "a_2", "a_3"], "video": ["v_1", "v_2"]}

    def outcome(table) -> tuple:
        table.to_csv(tmp_path / "other.csv", index=False)
        other = ["--data.path", tmp_path / "other.csv", "--output"]
        run("evaluate", folder, *other, tmp_path / "e.json")
        run("predict", folder, *other, tmp_path / "p.csv")
        return read(tmp_path / "e.json")["test"], rows(tmp_path / "p.csv")

    first = outcome(frame)
    assert first[0]["nll"] == pytest.approx(read(folder / "metrics.json")["test"]["nll"], rel=1e-5)
    assert outcome(frame[frame.columns[::-1]]) == first
    more = frame.copy()
    more.insert(0, "a_0", 100.0)  # fits the pattern, and was not there in training
    assert outcome(more) == first
    frame.rename(columns={"a_2": "a_4"}).to_csv(tmp_path / "less.csv", index=False)
    for command in (["evaluate", folder], ["predict", folder, "--output", tmp_path / "q.csv"]):
        arguments = [*command, "--data.path", tmp_path / "less.csv"]
        assert cli.run([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert "less.csv: data.columns: audio: there is no column 'a_2'; there are a_1" in error


# Prediction


@pytest.mark.parametrize("method", METHODS)
def test_predictions_as_csv_npz_and_in_python_are_the_same_and_give_the_metrics(
    method, train, test_file, tmp_path
):
    folder = train("--method", method)
    printed = run("predict", folder, "--data.path", test_file, "--output", tmp_path / "p.csv")
    run("predict", folder, "--data.path", test_file, "--output", tmp_path / "p.npz")
    with np.load(test_file) as file:
        batch = {name: file[f"x_{name}"] for name in ("audio", "visual")}
        mask, targets = np.stack([file["mask_audio"], file["mask_visual"]], 1), file["y"]
    found = iibalance.load(folder).predict(batch, mask)
    with np.load(tmp_path / "p.npz") as file:
        assert np.array_equal(file["probabilities"], found.probabilities.numpy()) and list(
            file["classes"]
        ) == ["go", "stop", "wait"]
        assert list(file["id"]) == [f"clip{row}" for row in np.flatnonzero(TEST)]
        assert "weights" not in file
        for name in ("trust", "contributions", "uncertainty"):
            values = getattr(found, name)
            assert (name in file) == (values is not None) and (
                values is None or np.array_equal(file[name], values.numpy())
            )
    lines = rows(tmp_path / "p.csv")
    table = np.array(
        [[float(line[f"p.{name}"]) for name in ("go", "stop", "wait")] for line in lines]
    )
    assert np.allclose(table, found.probabilities.numpy(), rtol=1e-5, atol=1e-9)
    assert [line["prediction"] for line in lines] == [
        ["go", "stop", "wait"][index] for index in found.probabilities.argmax(1)
    ]
    assert [line["id"] for line in lines] == [f"clip{row}" for row in np.flatnonzero(TEST)]
    columns = {
        "trust": found.trust,
        "contribution": found.contributions,
        "uncertainty": found.uncertainty,
    }
    assert list(lines[0])[5:] == [
        f"{kind}.{name}" for kind, values in columns.items() for name in batch if values is not None
    ]
    for kind, values in columns.items():
        if values is not None:
            written = [[float(line[f"{kind}.{name}"]) for name in batch] for line in lines]
            assert np.allclose(written, values.numpy(), rtol=1e-5, atol=1e-9)
            assert (values.numpy()[~mask] == (kind == "uncertainty")).all()
    rate = iibalance.load(folder).base_rate.double()
    best = found.probabilities.double().max(1)
    gained = best.values.logit() - rate[best.indices].logit()
    told = best.values < 0.999  # beyond it float32 rounds 1 - p
    added = found.contributions.sum(1)
    torch.testing.assert_close(added[told], gained[told], atol=1e-3, rtol=1e-3)
    if method == "iibalance":
        assert ((found.uncertainty >= 0) & (found.uncertainty <= 1)).all()
    test = read(folder / "metrics.json")["test"]
    accuracy = float((found.probabilities.argmax(1).numpy() == targets).mean())
    assert accuracy == pytest.approx(test["accuracy"]) and f"{accuracy:.4f}" in printed
    assert -found.probabilities[
        torch.arange(50), torch.from_numpy(targets)
    ].log().mean().item() == pytest.approx(test["nll"], rel=1e-4)
    assert np.allclose(found.probabilities.sum(1), 1, atol=1e-5)
    for kind, values in (("trust", found.trust), ("contributions", found.contributions)):
        if values is None:
            assert test[kind] is None
            continue
        for index, name in enumerate(batch):  # over the samples that have it
            its = values[torch.from_numpy(mask[:, index]), index].double().mean().item()
            assert test[kind][name] == pytest.approx(its, rel=1e-3, abs=1e-4)


def test_predictions_without_a_modality_are_those_with_it_masked(train, test_file, tmp_path):
    folder = train("--method", "iibalance")
    with np.load(test_file) as file:
        audio, has = file["x_audio"][file["mask_audio"]], file["mask_audio"]
        visual = file["x_visual"][has]
    np.savez(tmp_path / "a.npz", x_audio=audio)
    visual[0] = np.nan  # a missing row may hold anything
    np.savez(
        tmp_path / "m.npz", x_audio=audio, x_visual=visual, mask_visual=np.zeros(len(audio), bool)
    )
    np.savez(
        tmp_path / "half.npz", x_audio=audio, x_visual=visual, mask_visual=np.arange(len(audio)) > 0
    )
    arrays = {}
    for name in ("a", "m", "half"):
        run(
            "predict",
            folder,
            "--data.path",
            tmp_path / f"{name}.npz",
            "--output",
            tmp_path / f"{name}-p.npz",
            *(["--missing", "visual"] if name == "a" else []),
        )
        with np.load(tmp_path / f"{name}-p.npz") as file:
            arrays[name] = dict(file)
    assert np.array_equal(arrays["a"]["probabilities"], arrays["m"]["probabilities"])
    found = iibalance.load(folder).predict({"audio": audio})  # in Python, too
    assert np.array_equal(
        found.probabilities.numpy(), arrays["a"]["probabilities"]
    ) and np.array_equal(found.trust.numpy(), arrays["a"]["trust"])
    for kind in ("trust", "contributions"):
        assert (arrays["a"][kind][:, 0] != 0).all() and (arrays["a"][kind][:, 1] == 0).all()
        assert arrays["half"][kind][0, 1] == 0 and (arrays["half"][kind][1:] != 0).all()
    assert np.allclose(arrays["half"]["probabilities"][0], arrays["a"]["probabilities"][0])
    assert (
        np.abs(arrays["half"]["probabilities"][1:] - arrays["a"]["probabilities"][1:]).max() > 1e-3
    )
    assert list(arrays["a"]["id"]) == [str(row) for row in range(len(audio))]


# Evaluation


@pytest.mark.parametrize("method", ["iibalance", "concat"])
def test_a_clean_evaluation_repeats_the_metrics(method, train, data, tmp_path):
    folder = train("--method", method)
    run("evaluate", folder)
    clean = read(folder / "evaluation-clean.json")
    assert clean["test"] == read(folder / "metrics.json")["test"] and clean["method"] == method
    shutil.copy(data, tmp_path / "copy.npz")
    run("evaluate", folder, "--data.path", tmp_path / "copy.npz", "--output", tmp_path / "e.json")
    other = read(tmp_path / "e.json")["test"]  # standardised back and forth
    assert (
        other["nll"] == pytest.approx(clean["test"]["nll"], rel=1e-4)
        and other["accuracy"] == clean["test"]["accuracy"]
    )


def test_another_file_is_standardised_as_the_training_data_were(train, data, tmp_path):
    folder = train("--method", "iibalance")
    with np.load(data) as file:
        arrays = dict(file)
    arrays["x_audio"][arrays["split"] != 2] *= 100  # its own statistics would be others
    np.savez(tmp_path / "other.npz", **arrays)
    run("evaluate", folder, "--data.path", tmp_path / "other.npz", "--output", tmp_path / "e.json")
    assert read(tmp_path / "e.json")["test"]["nll"] == pytest.approx(
        read(folder / "metrics.json")["test"]["nll"], rel=1e-3
    )


@pytest.mark.parametrize(
    "kind",
    [
        "noise",
        pytest.param("missing", marks=pytest.mark.slow),
        pytest.param("shuffled", marks=pytest.mark.slow),
    ],
)
def test_a_degradation_changes_one_modality_and_is_reproducible(kind, train, tmp_path):
    folder = train("--method", "iibalance")
    clean = read(folder / "metrics.json")["test"]

    def evaluate(name: str, *more) -> dict:
        run("evaluate", folder, "--degrade", f"audio={kind}", "--output", tmp_path / name, *more)
        return read(tmp_path / name)["test"]

    all_rows = ["--fraction", "1", "--strength", "20"]
    found = evaluate("a.json", *all_rows)
    assert (
        evaluate("b.json", *all_rows) == found
        and (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    )
    assert found["modalities"]["visual"] == clean["modalities"]["visual"]
    assert found["accuracy"] < clean["accuracy"]
    if kind == "missing":
        # A sample keeps its only modality
        arrays = synthetic.arrays()
        mask = np.stack([arrays["mask_audio"], arrays["mask_visual"]], 1)[TEST]
        mask[:, 0] &= ~mask[:, 1]
        batch = {name: arrays[f"x_{name}"][TEST] for name in ("audio", "visual")}
        trust = iibalance.load(folder).predict(batch, mask).trust[mask[:, 0], 0]
        assert 0 < mask[:, 0].mean() < 0.5
        assert found["trust"]["audio"] == pytest.approx(trust.mean().item(), abs=1e-5)
    else:
        assert found["modalities"]["audio"]["accuracy"] < clean["modalities"]["audio"]["accuracy"]
    assert evaluate("c.json", "--fraction", "0") == clean
    assert evaluate("d.json", "--seed", "1") != evaluate("e.json", "--seed", "2")
    run("evaluate", folder, "--degrade", f"audio={kind}")
    assert read(folder / f"evaluation-audio-{kind}.json")["conditions"] == [f"audio={kind}"]


def test_several_degradations_at_once(train, tmp_path):
    folder = train("--method", "iibalance")
    clean = read(folder / "metrics.json")["test"]
    run(
        "evaluate",
        folder,
        "--degrade",
        "audio=noise",
        "visual=shuffled",
        "--fraction",
        "1",
        "--output",
        tmp_path / "e.json",
    )
    found = read(tmp_path / "e.json")["test"]
    assert all(
        found["modalities"][name]["accuracy"] < clean["modalities"][name]["accuracy"]
        for name in ("audio", "visual")
    )


# Options


@pytest.fixture
def print_config(capsys):
    """What ``train ... --print_config`` prints."""

    def printed(*more) -> dict:
        with pytest.raises(SystemExit) as end:
            cli.run(["train", *map(str, more), "--print_config"])
        assert end.value.code in (0, None)
        return yaml.safe_load(capsys.readouterr().out)

    return printed


def swapped_options(data) -> list:
    """Options that differ from the defaults, the order of the modalities among them."""
    options = ["--data.name", "npz", "--data.path", data, "--data.modalities", "visual,audio"]
    return [*options, *SMALL, *QUICK, "--seed", "3"]


def test_defaults_are_those_of_the_dataclasses_and_configuration_files_go_round(
    data, tmp_path, print_config
):
    defaults = print_config()
    expected = asdict(RunConfig())
    expected["data"]["name"] = None  # as the path says, and digits without one
    assert {key: value for key, value in defaults.items() if key in expected} == expected
    first = print_config(*swapped_options(data))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(first))
    assert print_config("--config", tmp_path / "run.yaml") == first
    assert print_config("--config", tmp_path / "run.yaml", "--seed", "4") == {**first, "seed": 4}


@pytest.mark.slow
def test_a_configuration_file_trains_what_its_options_train(data, tmp_path, print_config):
    options = swapped_options(data)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(print_config(*options)))
    run("train", *options, "--output", tmp_path / "a")
    run("train", "--config", tmp_path / "run.yaml", "--output", tmp_path / "b")
    run("train", "--config", tmp_path / "a" / "config.yaml", "--output", tmp_path / "c")
    for name in ("b", "c"):
        assert (tmp_path / "a" / "metrics.json").read_bytes() == (
            tmp_path / name / "metrics.json"
        ).read_bytes()
        assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
            tmp_path / name / "model.safetensors"
        ).read_bytes()
    assert list(read(tmp_path / "a" / "metrics.json")["test"]["modalities"]) == ["visual", "audio"]


def test_help_lists_every_option_with_its_description(capsys):
    with pytest.raises(SystemExit):
        cli.run(["train", "--help"])
    text = capsys.readouterr().out
    for option in (
        "--config",
        "--print_config",
        "--data.name NAME",
        "``digits``",
        "``npz``",
        "--data.path",
        "--data.modalities",
        "--data.groups",
        "--method",
        "--kernels",
        "--seed",
        "--epochs",
        "--output",
        "--resume DIR",
    ):
        assert option in text, option
    assert "Folds of the training split" in text


@pytest.mark.usefixtures("no_pictures")
def test_seeds(train, data, tmp_path):
    first = train(*QUICK)
    for seed, same in ((0, True), (1, False)):
        folder = tmp_path / str(seed)
        run(
            "train",
            "--data.name",
            "npz",
            "--data.path",
            data,
            "--output",
            folder,
            *SMALL,
            *QUICK,
            "--seed",
            seed,
        )
        for name in ("model.safetensors", "history.csv"):
            assert ((folder / name).read_bytes() == (first / name).read_bytes()) is same


@pytest.mark.usefixtures("no_pictures")
def test_budgets_alone_and_budgets_given(data, train, tmp_path):
    printed = run(
        "budgets",
        "--data.name",
        "npz",
        "--data.path",
        data,
        "--budgets.source",
        "probe",
        "--output",
        tmp_path / "b.json",
    )
    budgets = read(tmp_path / "b.json")
    assert (
        budgets["modalities"] == ["audio", "visual"]
        and budgets["values"][0] > budgets["values"][1] > 0
    )
    assert f"{budgets['values'][0]:.3f}" in printed and "anchor" in printed.splitlines()[1]
    folder = train("--budgets.path", str(tmp_path / "b.json"), "--training.alone", "false")
    assert (
        read(folder / "budgets.json")["values"]
        == budgets["values"]
        == list(read(folder / "metrics.json")["budgets"].values())
    )
    (tmp_path / "given.json").write_text('{"visual": 0.9, "audio": 0.1}')  # by name, in any order
    folder = train("--budgets.path", str(tmp_path / "given.json"), "--training.alone", "false")
    assert read(folder / "metrics.json")["budgets"] == {"audio": 0.1, "visual": 0.9}
    weights, _ = read_model(folder / "model.safetensors")
    assert weights["head.budgets"].tolist() == pytest.approx([0.1, 0.9])


@pytest.mark.slow
def test_budgets_alone_by_unimodal_trainings(data, tmp_path):
    run(
        "budgets",
        "--data.name",
        "npz",
        "--data.path",
        data,
        "--data.modalities",
        "visual,audio",
        "--epochs",
        "4",
        "--output",
        tmp_path / "b.json",
    )
    budgets = read(tmp_path / "b.json")
    assert (
        budgets["modalities"] == ["visual", "audio"]
        and budgets["source"] == "unimodal"
        and 0 < budgets["values"][0] < budgets["values"][1] < 1
    )


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("source", SOURCES)
def test_budgets_alone_are_those_that_train_estimates_to_the_last_digit(
    data, train, tmp_path, source
):
    options = ["--budgets.source", source, "--objective.alpha", "0.5", "--seed", "3"]
    options += ["--model.dropout", "0.4"]
    folder = train(*options, "--training.alone", "false", "--method", "ensemble_gated")
    trained = read(folder / "budgets.json")
    file = ["--data.name", "npz", "--data.path", data]
    own = [*options, "--method", "ensemble_gated", "--output", tmp_path / "b.json"]
    run("budgets", *file, *SMALL, *own)
    assert read(tmp_path / "b.json") == trained


@pytest.mark.parametrize("source", SOURCES)
def test_estimated_from_arrays_they_are_the_same(source):
    """``estimate_budgets`` on the training split of the digits, with the defaults of ``train``."""
    config = RunConfig(epochs=2, seed=1, budgets=BudgetConfig(source=source))
    train = load_data(config.data).train
    by_run = estimate_run_budgets(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inputs, targets = train.inputs, train.targets
        by_arrays = iibalance.estimate_budgets(inputs, targets, source=source, epochs=1, seed=1)
    finally:
        torch.set_num_threads(threads)
    assert by_arrays == by_run


def test_budgets_that_stand_in_a_file_are_not_estimated(data, capsys):
    file = ["--data.name", "npz", "--data.path", str(data)]
    assert cli.run(["budgets", *file, "--budgets.path", "given.json"]) == 2
    assert "budgets.path: given.json holds budgets already" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("source", ["probe", "online"])
def test_other_sources_of_budgets(source, train):
    folder = train("--budgets.source", source, "--training.alone", "false")
    budgets, history = read(folder / "budgets.json"), rows(folder / "history.csv")
    assert budgets["source"] == source and read(folder / "metrics.json")["budgets"] == dict(
        zip(budgets["modalities"], budgets["values"])
    )
    assert all(0 <= value <= 1 for value in budgets["values"]) and any(budgets["values"])
    assert ("budget.audio" in history[0]) == (source == "online")
    if source == "online":
        assert [budgets["values"]] == [
            [float(row[f"budget.{name}"]) for name in ("audio", "visual")]
            for row in history
            if float(row["validation.nll"]) == min(float(row["validation.nll"]) for row in history)
        ]


@pytest.mark.slow
def test_gradient_accumulation_takes_fewer_steps(train, data, tmp_path, monkeypatch):
    counts = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *more, **options: counts.append(1) or step(self, *more, **options),
    )
    for accumulation in (1, 2):
        counts.clear()
        run(
            "train",
            "--data.name",
            "npz",
            "--data.path",
            data,
            "--output",
            tmp_path / str(accumulation),
            *SMALL,
            *QUICK,
            "--training.batch_size",
            "25",
            "--training.gradient_accumulation",
            accumulation,
        )
        # 2 epochs of 5 batches; the last batches of an epoch are stepped with, too
        assert len(counts) == 2 * math.ceil(5 / accumulation)
    assert (tmp_path / "1" / "model.safetensors").read_bytes() != (
        tmp_path / "2" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_mixed_precision_is_close_but_not_equal(train):
    full, mixed = (train(*QUICK, *more) for more in ((), ("--training.mixed_precision", "bf16")))
    first, second = (
        float(rows(folder / "history.csv")[0]["train.loss"]) for folder in (full, mixed)
    )
    assert 1e-7 < abs(first - second) < 0.05
    assert {
        values.dtype
        for values in read_model(mixed / "model.safetensors")[0].values()
        if values.is_floating_point()
    } == {torch.float32}
    assert (
        train(*QUICK, "--training.gradient_accumulation", "1")
        and (full / "model.safetensors").read_bytes()
        == (
            train(*QUICK, "--training.gradient_accumulation", "1") / "model.safetensors"
        ).read_bytes()
    ), "the precision of an earlier run must not stay"


@pytest.mark.usefixtures("no_pictures")
def test_modality_dropout_hides_modalities_in_training_alone(data, tmp_path, monkeypatch):
    masks = []

    def record(mask, probability, generator):
        result = drop(mask, probability, generator)
        masks.append((probability, mask.float().mean(), result.float().mean()))
        return result

    drop = loop.drop_modalities
    monkeypatch.setattr(loop, "drop_modalities", record)
    run(
        "train",
        "--data.name",
        "npz",
        "--data.path",
        data,
        "--output",
        tmp_path / "run",
        *SMALL,
        *QUICK,
        "--training.modality_dropout",
        "0.4",
        "--training.batch_size",
        "25",
    )
    assert len(masks) == 10 and {probability for probability, _, _ in masks} == {0.4}
    before, after = (float(sum(values)) / 10 for values in list(zip(*masks))[1:])
    # 0.6 of them, and what a sample keeps at least
    assert before > 0.9 and 0.5 < after / before < 0.85


@pytest.mark.usefixtures("no_pictures")
def test_groups_keep_speakers_apart_in_splits_and_folds(tmp_path, monkeypatch):
    path, folds = synthetic.write(tmp_path / "clips.npz"), []
    make = budget_stage.make_folds

    def recorded(targets, count, *, groups, **more):
        found = make(targets, count, groups=groups, **more)
        folds.append((groups, found))
        return found

    monkeypatch.setattr(budget_stage, "make_folds", recorded)
    run(
        "train",
        "--data.name",
        "npz",
        "--data.path",
        path,
        "--data.groups",
        "speaker",
        "--output",
        tmp_path / "run",
        *SMALL,
        "--training.alone",
        "false",
        "--budgets.source",
        "probe",
    )
    data = load_data(load_config(tmp_path / "run" / "config.yaml").data)
    parts = [set(part.groups.tolist()) for part in (data.train, data.validation, data.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20
    ((groups, held),) = folds
    parts = [set(groups[torch.from_numpy(fold)].tolist()) for fold in held]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(set(data.train.groups.tolist()))


@pytest.mark.usefixtures("no_pictures")
def test_digits_from_the_command_line(tmp_path):
    run(
        "train",
        *SMALL,
        *QUICK,
        "--epochs",
        "1",
        "--data.train_fraction",
        "0.2",
        "--output",
        tmp_path / "run",
    )
    metrics = read(tmp_path / "run" / "metrics.json")
    assert (
        metrics["classes"] == 10
        and metrics["test"]["accuracy"] > 0.5
        and list(metrics["test"]["modalities"]) == ["pixels", "fourier", "shape"]
    )


# Processes


@pytest.mark.slow
def test_the_command_and_the_module_are_the_same_program(data, train, tmp_path):
    done = synthetic.call(
        "train",
        "--data.name",
        "npz",
        "--data.path",
        data,
        "--output",
        tmp_path / "run",
        *SMALL,
        *QUICK,
    )
    assert done.returncode == 0
    assert all("joint: " in line for line in done.stderr.splitlines()[1:]), done.stderr
    accuracy = read(tmp_path / "run" / "metrics.json")["test"]["accuracy"]
    assert f"{100 * accuracy:.1f}" in done.stdout and "audio" in done.stdout
    installed = Path(sys.executable).with_name("iibalance")
    if not installed.exists():
        pytest.skip("the command is not installed here")
    help_of = [
        subprocess.run(
            [*start, "--help"],
            capture_output=True,
            text=True,
            timeout=300,
            env=synthetic.environment(),
        )
        for start in ([installed], [sys.executable, "-m", "iibalance"])
    ]
    assert help_of[0].stdout == help_of[1].stdout and "evaluate" in help_of[0].stdout


TWO_PROCESSES = """
import sys
import torch
from accelerate import PartialState
from iibalance import cli
from iibalance.training import stages

built = stages.Run.train_joint

def train_joint(self, budgets, alone):
    result = built(self, budgets, alone)
    kept = {"weights": result[0].state_dict(), "history": result[1]}
    torch.save(kept, f"{sys.argv[1]}.{PartialState().process_index}")
    return result

stages.Run.train_joint = train_joint
sys.exit(cli.run(sys.argv[2:]))
"""


@pytest.mark.slow
def test_two_processes_train_one_model(data, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        str(tmp_path / "rank"),
    ]
    options = [
        "train",
        "--data.name",
        "npz",
        "--data.path",
        data,
        "--output",
        tmp_path / "run",
        *SMALL,
        "--training.checkpoint_seconds",
        "0",
    ]
    done = subprocess.run(
        [*launch, *map(str, options)],
        capture_output=True,
        text=True,
        timeout=600,
        env=synthetic.environment(ACCELERATE_USE_CPU="true"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank.{index}") for index in range(2)]
    assert ranks[0]["history"] == ranks[1]["history"]
    for key, values in ranks[0]["weights"].items():
        if (
            "running_" not in key and "num_batches" not in key
        ):  # batch statistics are each process's own
            assert torch.equal(values, ranks[1]["weights"][key]), key
    assert any("prototypes" in key and values.any() for key, values in ranks[0]["weights"].items())
    assert done.stdout.count("run folder") == 1, "one process reports"
    assert [path.name for path in (tmp_path / "run").rglob("metrics.json")] == ["metrics.json"]
    metrics = read(tmp_path / "run" / "metrics.json")
    assert metrics["test"]["accuracy"] > 0.5
    run("evaluate", tmp_path / "run")
    assert read(tmp_path / "run" / "evaluation-clean.json")["test"] == metrics["test"]


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--epochs", "x"]])
def test_help_and_mistakes_are_answered_without_torch(arguments):
    code = (
        "import sys; from iibalance.cli import run\n"
        "try: run(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = set(found.stdout.splitlines()[-1].split())
    assert "jsonargparse" in modules
    assert not {"torch", "scipy", "pandas", "iib_kernels"} & modules
