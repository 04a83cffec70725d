"""Bad input from the command line: one line that names the thing, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
import yaml

from iibalance import cli


@pytest.fixture
def refuse(capsys, tmp_path):
    """Run the command line in this process; it must refuse.

    In one line that holds every one of ``words``, and leaving ``tmp_path`` as it is.
    """

    def check(*arguments, words: tuple[str, ...]) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert code == 2, printed.err
        lines = printed.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("iibalance: error: "), printed.err
        assert [word for word in words if word not in lines[0]] == [], lines[0]
        assert "Traceback" not in lines[0] and printed.out == ""
        assert snapshot(tmp_path) == before
        return lines[0]

    return check


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below ``folder`` with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def options(path: Path, *more) -> list:
    return [
        "--data.name",
        "npz",
        "--data.path",
        path,
        "--epochs",
        "1",
        "--output",
        path.parent / "run",
        *more,
    ]


def changed(key: str, row: int | tuple[int, int], value, dtype=None) -> dict:
    array = synthetic.arrays()[key].astype(dtype) if dtype else synthetic.arrays()[key].copy()
    array[row] = value
    return {key: array}


# What may be wrong with a file

split = np.arange(200) % 3
BAD_FILES = {
    "missing key y": ({"y": None}, ["y", "x_audio"]),
    "no modality": ({"x_audio": None, "x_visual": None}, ["no modality", "x_"]),
    "wrong length of y": ({"y": np.arange(199) % 3}, ["x_audio", "200", "199"]),
    "wrong length of a modality": ({"x_visual": np.zeros((150, 4))}, ["x_visual", "150", "200"]),
    "wrong length of a mask": ({"mask_visual": np.ones(10, bool)}, ["mask_visual", "(10,)", "200"]),
    "NaN feature": (changed("x_audio", (7, 2), np.nan), ["x_audio", "row 7", "nan"]),
    "infinite feature": (changed("x_visual", 12, -np.inf), ["x_visual", "row 12", "-inf"]),
    "feature too large": (changed("x_visual", 12, 1e300), ["x_visual", "row 12", "float32"]),
    "label out of range": (
        {**changed("y", 9, 5), "classes": np.array(["a", "b", "c"])},
        ["y", "row 9", "5", "0..2"],
    ),
    "label with a fraction": (changed("y", 9, 0.5, float), ["y", "row 9", "0.5"]),
    "one class": ({"y": np.zeros(200, int)}, ["y", "class 0", "two"]),
    "a modality all missing": (
        {"mask_audio": np.zeros(200, bool), "mask_visual": np.ones(200, bool)},
        ["mask_audio", "missing in every", "audio"],
    ),
    "a row without any modality": (
        {**changed("mask_audio", 3, False), **changed("mask_visual", 3, False)},
        ["row 3", "audio", "visual"],
    ),
    "mask of floats": ({"mask_audio": np.ones(200) * 0.5}, ["mask_audio", "0.5"]),
    "empty test split": (
        {"split": np.where(split == 2, 0, split)},
        ["test split", "empty", "split"],
    ),
    "empty training split": (
        {"split": np.where(split == 0, 1, split)},
        ["train split", "empty", "split"],
    ),
    "unknown split code": ({"split": np.where(split == 2, 3, split)}, ["split", "row 2", "3"]),
    "a class without training sample": (
        {"split": np.where(synthetic.arrays()["y"] == 1, 2, split)},
        ["class 1", "training"],
    ),
    "features of text": ({"x_audio": np.full((200, 3), "a")}, ["x_audio", "dtype"]),
    "features without a column": ({"x_audio": np.zeros(200)}, ["x_audio", "(200,)"]),
    "pickled objects": ({"x_audio": np.full((200, 3), None, object)}, ["x_audio", "pickled"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_before_anything_is_written(case, tmp_path, refuse):
    changes, words = BAD_FILES[case]
    path = synthetic.write(tmp_path / "clips.npz", **changes)
    refuse("train", *options(path), words=("clips.npz", *words))
    assert not (tmp_path / "run").exists()


def test_a_modality_too_rare_to_train_on(tmp_path, refuse):
    train = {
        "split": np.where(np.arange(200) < 120, 0, 1 + split % 2),
        "mask_visual": np.ones(200, bool),
    }
    path = synthetic.write(
        tmp_path / "clips.npz", mask_audio=(np.arange(200) == 7) | (np.arange(200) > 150), **train
    )
    for method in ("iibalance", "concat", "ensemble"):
        refuse("train", *options(path, "--method", method), words=("audio", "1 training sample"))
    path = synthetic.write(
        tmp_path / "clips.npz", mask_audio=(np.arange(200) < 3) | (np.arange(200) > 150), **train
    )
    for source in ("unimodal", "probe"):
        refuse(
            "train",
            *options(path, "--budgets.source", source),
            words=("budgets.folds", "audio", "fewer than two classes"),
        )


def test_a_training_that_diverges_says_so(tmp_path, capsys):
    path = synthetic.write(tmp_path / "clips.npz")
    assert (
        cli.run(
            list(
                map(
                    str,
                    [
                        "train",
                        *options(path, "--method", "concat", "--training.learning_rate", "1e35"),
                    ],
                )
            )
        )
        == 2
    )
    *progress, last = capsys.readouterr().err.splitlines()
    assert "training.learning_rate" in last and "1e+35" in last
    assert not [line for line in progress if "error" in line or "Traceback" in line]
    assert (
        not (tmp_path / "run" / "metrics.json").exists()
        and not (tmp_path / "run" / "model.safetensors").exists()
    )


def test_budgets_and_predict_refuse_bad_files_too(tmp_path, refuse, trained):
    path = synthetic.write(tmp_path / "clips.npz", **changed("x_audio", (7, 2), np.nan))
    refuse(
        "budgets",
        "--data.name",
        "npz",
        "--data.path",
        path,
        "--output",
        tmp_path / "budgets.json",
        words=("clips.npz", "x_audio", "row 7"),
    )
    refuse(
        "predict",
        trained,
        "--data.path",
        path,
        "--output",
        tmp_path / "p.csv",
        words=("clips.npz", "x_audio", "row 7"),
    )
    refuse(
        "evaluate",
        trained,
        "--data.path",
        path,
        "--output",
        tmp_path / "e.json",
        words=("clips.npz", "x_audio", "row 7"),
    )


def test_files_that_are_no_npz(tmp_path, refuse):
    whole = synthetic.write(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("audio,visual\n1,2\n")
    np.save(tmp_path / "one.npy", np.zeros((4, 4)))
    (tmp_path / "folder.npz").mkdir()
    for name, words in {
        "cut.npz": ["cut short"],
        "text.npz": ["not a readable npz"],
        "one.npy": ["one array"],
        "folder.npz": ["is a folder"],
        "absent.npz": ["no such file"],
    }.items():
        refuse("train", *options(tmp_path / name), words=(name, *words))
    refuse("train", "--data.name", "npz", "--output", tmp_path / "run", words=("data.path",))


# What may be wrong with options

BAD_OPTIONS = {
    "unknown option": (["--epoch_count", "3"], ["epoch_count"]),
    "unknown nested option": (["--training.speed", "3"], ["training.speed"]),
    "unknown method": (["--method", "magic"], ["method", "magic", "iibalance", "concat"]),
    "unknown data source": (["--data.name", "mnist"], ["data.name", "mnist"]),
    "unknown kernels": (["--kernels", "cuda"], ["kernels", "cuda"]),
    "text for a number": (["--epochs", "many"], ["epochs", "many"]),
    "no epochs": (["--epochs", "0"], ["epochs", "0"]),
    "text for a seed": (["--seed", "x"], ["seed"]),
    "unknown modality": (
        ["--data.modalities", "audio,smell"],
        ["data.modalities", "smell", "visual"],
    ),
    "modality named twice": (["--data.modalities", "audio,audio"], ["data.modalities", "audio"]),
    "unknown group column": (["--data.groups", "family"], ["data.groups", "family", "speaker"]),
    "unknown split column": (["--data.split", "fold"], ["data.split", "fold"]),
    "unknown layout": (["--data.layouts", '{"audio": "cube"}'], ["audio", "cube"]),
    "layout that does not fit": (["--data.layouts", '{"audio": "image"}'], ["audio", "image"]),
    "batch of one": (["--training.batch_size", "1"], ["training.batch_size", "1"]),
    "negative learning rate": (
        ["--training.learning_rate", "-1"],
        ["training.learning_rate", "-1"],
    ),
    "learning rate of NaN": (
        ["--training.learning_rate", "nan"],
        ["training.learning_rate", "nan"],
    ),
    "no accumulation": (
        ["--training.gradient_accumulation", "0"],
        ["training.gradient_accumulation", "0"],
    ),
    "modality dropout of 1": (
        ["--training.modality_dropout", "1"],
        ["training.modality_dropout", "1"],
    ),
    "unknown precision": (
        ["--training.mixed_precision", "fp4"],
        ["training.mixed_precision", "fp4"],
    ),
    "negative patience": (["--training.patience", "-2"], ["training.patience", "-2"]),
    "negative weight decay": (["--training.weight_decay", "-1"], ["training.weight_decay", "-1"]),
    "negative gradient norm": (
        ["--training.max_gradient_norm", "-1"],
        ["training.max_gradient_norm", "-1"],
    ),
    "one fold": (["--budgets.folds", "1"], ["folds", "1"]),
    "more folds than samples of a class": (["--budgets.folds", "100"], ["folds", "100"]),
    "unknown budget source": (["--budgets.source", "guess"], ["budgets.source", "guess"]),
    "no budget epochs": (["--budgets.epochs", "0"], ["budgets.epochs", "0"]),
    "unknown calibration source": (
        ["--calibration.source", "test"],
        ["calibration.source", "test"],
    ),
    "no corrupted copies": (["--calibration.copies", "0"], ["calibration.copies", "0"]),
    "negative corruption": (["--calibration.max_strength", "-1"], ["max_strength", "-1"]),
    "prior scale of 0": (["--calibration.prior_scale", "0"], ["calibration.prior_scale", "0"]),
    "an option that is gone": (["--calibration.hidden", "1"], ["calibration.hidden", "no such"]),
    "no width": (["--model.width", "0"], ["model.width", "0"]),
    "no embedding": (["--model.embedding_dim", "0"], ["model.embedding_dim", "0"]),
    "dropout of 1": (["--model.dropout", "1"], ["model.dropout", "1"]),
    "warm-up beyond training": (["--objective.warmup", "2"], ["objective.warmup", "2"]),
    "negative ramp": (["--objective.ramp", "-1"], ["objective.ramp", "-1"]),
    "momentum above 1": (["--objective.momentum", "1.5"], ["objective.momentum", "1.5"]),
    "negative alpha": (["--objective.alpha", "-1"], ["objective.alpha", "-1"]),
    "negative fused weight": (["--objective.fused_weight", "-1"], ["objective.fused_weight", "-1"]),
    "temperature of 0": (["--objective.temperature", "0"], ["objective.temperature", "0"]),
    "a share above 1": (["--data.train_fraction", "1.5"], ["data.train_fraction", "1.5"]),
    "absent budgets": (["--budgets.path", "/absent/budgets.json"], ["/absent/budgets.json"]),
    "absent configuration": (["--config", "/absent/run.yaml"], ["/absent/run.yaml"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_refused_before_anything_is_written(case, tmp_path, refuse):
    more, words = BAD_OPTIONS[case]
    path = synthetic.write(tmp_path / "clips.npz")
    refuse("train", *options(path, *more), words=tuple(words))
    assert not (tmp_path / "run").exists()


def test_commands_that_do_not_exist_or_lack_something(tmp_path, refuse, trained):
    refuse("fly", words=("fly", "train", "evaluate", "predict", "budgets"))
    refuse(words=("train",))
    refuse("predict", trained, words=("data.path",))
    refuse("evaluate", words=("run",))
    refuse("budgets", "--budgets.source", "online", words=("budgets.source", "online"))
    refuse("budgets", "--budgets.folds", "1", "--budgets.source", "probe", words=("folds", "1"))


def test_bad_configuration_files(tmp_path, refuse):
    path, config = synthetic.write(tmp_path / "clips.npz"), tmp_path / "run.yaml"
    for text, words in {
        "speed: 3\n": ["speed"],
        "training:\n  speed: 3\n": ["speed"],
        "epochs: many\n": ["epochs", "many"],
        "epochs: [\n": ["run.yaml"],
        "- a\n- b\n": ["run.yaml"],
    }.items():
        config.write_text(text)
        refuse("train", "--config", config, *options(path), words=tuple(words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton may run here")
def test_kernels_that_cannot_run_here(tmp_path, refuse, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("iib_kernels._runtime.interpreting", lambda: False)
    refuse(
        "train",
        *options(synthetic.write(tmp_path / "clips.npz"), "--kernels", "triton"),
        words=("kernels", "triton", "cpu"),
    )


def test_budget_files_that_do_not_fit(tmp_path, refuse):
    path, budgets = synthetic.write(tmp_path / "clips.npz"), tmp_path / "budgets.json"
    good = {
        "modalities": ["audio", "visual"],
        "values": [0.5, 0.2],
        "standard_errors": [0.1, 0.1],
        "label_entropy": 1.09,
        "source": "unimodal",
    }
    bad = {
        "cut": json.dumps(good)[:30],
        "other": json.dumps({**good, "modalities": ["audio", "smell"]}),
        "count": json.dumps({**good, "values": [0.5]}),
        "nan": json.dumps({**good, "values": [0.5, float("nan")]}),
        "list": "[1, 2]",
    }
    for name, text in bad.items():
        budgets.write_text(text)
        refuse(
            "train",
            *options(path, "--budgets.path", budgets),
            words=("smell",) if name == "other" else ("budgets.json",),
        )


# What may be wrong with folders


def test_output_that_is_a_file_or_below_one_or_not_writable(tmp_path, refuse):
    path = synthetic.write(tmp_path / "clips.npz")
    (tmp_path / "file").write_text("mine")
    for folder in (
        tmp_path / "file",
        tmp_path / "file" / "run",
        "/proc/iibalance",
        "/sys/iibalance/run",
    ):
        refuse("train", *options(path), "--output", folder, words=(str(folder),))
    (tmp_path / "readonly").mkdir(mode=0o555)
    if not os.access(tmp_path / "readonly", os.W_OK):  # root may write anywhere
        refuse("train", *options(path), "--output", tmp_path / "readonly", words=("readonly",))


def test_results_that_cannot_be_written(tmp_path, refuse, trained, data):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file" / "p.csv", tmp_path / "absent" / "p.npz", Path("/proc/p.csv")):
        refuse("predict", trained, "--data.path", data, "--output", target, words=(str(target),))
    refuse(
        "predict",
        trained,
        "--data.path",
        data,
        "--output",
        tmp_path / "p.txt",
        words=("p.txt", ".csv", ".npz"),
    )
    refuse("evaluate", trained, "--output", tmp_path / "absent" / "e.json", words=("absent",))
    refuse(
        "budgets",
        *options(data)[:4],
        "--budgets.source",
        "probe",
        "--output",
        tmp_path / "absent" / "b.json",
        words=("absent",),
    )


def test_a_folder_with_a_run_is_not_overwritten(tmp_path, refuse, trained, data):
    shutil.copytree(trained, tmp_path / "run")
    refuse(
        "train",
        *options(data),
        "--output",
        tmp_path / "run",
        words=(str(tmp_path / "run"), "resume"),
    )


def test_folders_without_a_run(tmp_path, refuse, data):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        refuse("train", "--resume", tmp_path / folder, words=("resume", folder))
        refuse("evaluate", tmp_path / folder, words=(folder,))
        refuse(
            "predict",
            tmp_path / folder,
            "--data.path",
            data,
            "--output",
            tmp_path / "p.csv",
            words=(folder,),
        )


# A finished run, and what may be wrong with it or asked of it


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("data") / "clips.npz")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert (
        cli.run(
            list(
                map(
                    str,
                    [
                        "train",
                        "--method",
                        "concat",
                        "--training.alone",
                        "false",
                        *options(data)[:-2],
                        "--output",
                        folder,
                    ],
                )
            )
        )
        == 0
    )
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.json", "config.yaml"])
def test_damaged_files_of_a_run(name, tmp_path, refuse, trained):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    whole = (run / name).read_bytes()
    (run / name).write_bytes(b"{[" if name == "config.yaml" else whole[: len(whole) // 2])
    refuse("evaluate", run, words=(f"run/{name}",))
    (run / name).unlink()
    refuse("evaluate", run, words=(name,))


def test_a_model_of_another_configuration(tmp_path, refuse, trained):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["width"] *= 2
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    refuse("evaluate", run, words=("model.safetensors", "configuration"))
    config["method"] = "magic"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    refuse("evaluate", run, words=("magic",))


def test_impossible_degradations(refuse, trained):
    refuse("evaluate", trained, "--degrade", "smell=noise", words=("smell", "audio", "visual"))
    refuse(
        "evaluate", trained, "--degrade", "audio=fog", words=("fog", "noise", "missing", "shuffled")
    )
    refuse("evaluate", trained, "--degrade", "audio", words=("degrade", "audio=noise"))
    refuse(
        "evaluate",
        trained,
        "--degrade",
        "audio=noise",
        "--fraction",
        "1.5",
        words=("fraction", "1.5"),
    )
    refuse(
        "evaluate",
        trained,
        "--degrade",
        "audio=noise",
        "--strength",
        "-1",
        words=("strength", "-1"),
    )
    refuse("evaluate", trained, "--degrade", "audio=noise", "--seed", "x", words=("seed",))


def test_samples_that_do_not_fit_the_model(tmp_path, refuse, trained):
    path, output = tmp_path / "new.npz", tmp_path / "p.csv"
    for arrays, words in [
        ({"x_smell": np.zeros((3, 6))}, ["x_audio", "x_smell", "--missing audio"]),
        ({"x_audio": np.zeros((3, 5))}, ["audio", "(5,)", "(6,)"]),
        ({"x_audio": np.zeros((3, 6)), "x_visual": np.zeros((2, 4))}, ["x_visual", "2", "3"]),
        (
            {"x_audio": np.zeros((3, 6)), "mask_audio": np.array([1, 0, 1], bool)},
            ["row 1", "audio"],
        ),
        ({"x_audio": np.zeros((3, 6)), "y": np.full(3, 0.5)}, ["y", "row 0", "0.5"]),
        ({"x_audio": np.zeros((0, 6))}, ["x_audio", "empty"]),
    ]:
        np.savez(path, **arrays)
        absent = [] if "x_visual" in arrays or "x_smell" in arrays else ["--missing", "visual"]
        arguments = ["--data.path", path, "--output", output, *absent]
        refuse("predict", trained, *arguments, words=("new.npz", *words))


def test_evaluation_on_data_of_other_classes_or_modalities(tmp_path, refuse, trained):
    arrays = synthetic.arrays()
    path = synthetic.write(tmp_path / "two.npz", y=arrays["y"] % 2)
    refuse("evaluate", trained, "--data.path", path, words=("two.npz", "class 2", "no training"))
    path = synthetic.write(tmp_path / "third.npz", x_smell=np.zeros((200, 2)))
    refuse("evaluate", trained, "--data.path", path, words=("third.npz", "smell"))
    path = synthetic.write(tmp_path / "wide.npz", x_audio=np.zeros((200, 9)))
    refuse("evaluate", trained, "--data.path", path, words=("wide.npz", "audio"))


# The same in a process of its own


@pytest.mark.slow
def test_the_process_exits_with_code_2_and_one_line(tmp_path):
    path = synthetic.write(tmp_path / "clips.npz", **changed("x_audio", (7, 2), np.nan))
    done = synthetic.call("train", *options(path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "clips.npz: x_audio: row 7 holds nan" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["clips.npz"]
