"""Options from Python and from the command line: types, names in the help, one data set, checks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import synthetic
import yaml

import iibalance
from iibalance import cli
from iibalance.config import (
    BudgetConfig,
    CalibrationConfig,
    CompareConfig,
    CompareData,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainingConfig,
)
from iibalance.config_files import load_config, save_config
from iibalance.errors import InputError
from iibalance.files import read_metadata
from iibalance.method_names import METHOD_NAMES, absolute_method, check_method
from iibalance.methods import METHODS
from iibalance.training.folder import RUN_FILES, RunFolder

SMALL = ["--epochs", "1", "--model.width", "4", "--model.embedding_dim", "8"]
QUICK = ["--method", "concat", "--training.alone", "false", *SMALL]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("data") / "clips.npz")


def run(*arguments) -> int:
    return cli.run([str(argument) for argument in arguments])


# Types


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunConfig(seed="a"), "seed: 'a' is no integer; give an integer, such as 1"),
        (lambda: RunConfig(seed=-1), r"seed: -1 cannot be used; give an integer from 0 to 2\*\*63"),
        (lambda: RunConfig(seed=2**63), "seed: 9223372036854775808 cannot be used"),
        (lambda: RunConfig(seed=True), "seed: True is no integer"),
        (lambda: RunConfig(seed=np.zeros(99)), r"^seed: array.{0,70} is no integer; give"),
        (lambda: RunConfig(epochs=2.5), "epochs: 2.5 is no integer"),
        (lambda: RunConfig(epochs=None), "epochs: None is no integer"),
        (lambda: RunConfig(method_options=5), "method_options: 5 is no dict of numbers"),
        (lambda: RunConfig(method_options={"a": "b"}), "method_options: {'a': 'b'} is no dict"),
        (lambda: RunConfig(output=""), "output: '' cannot be used"),
        (lambda: RunConfig(method=METHODS["sum"]), "method: .* is no string"),
        (
            lambda: RunConfig(data={"name": "npz"}),
            r"data: {'name': 'npz'} is no DataConfig; give iibalance.config.DataConfig\(...\)",
        ),
        (lambda: RunConfig(training=ModelConfig()), "training: ModelConfig.* no TrainingConfig"),
        (lambda: DataConfig(modalities=5), "data.modalities: 5 is no string and no list; give"),
        (lambda: DataConfig(modalities=["a", 5]), "data.modalities: .* a list of strings, or None"),
        (lambda: DataConfig(train_fraction="x"), "data.train_fraction: 'x' is no number"),
        (lambda: ModelConfig(width="8"), "model.width: '8' is no integer"),
        (lambda: ObjectiveConfig(alpha=None), "objective.alpha: None is no number"),
        (lambda: ObjectiveConfig(temperature=float("inf")), "objective.temperature: inf"),
        (lambda: TrainingConfig(learning_rate="x"), "training.learning_rate: 'x' is no number"),
        (lambda: TrainingConfig(alone=1), "training.alone: 1 is no bool; give True or False"),
        (lambda: TrainingConfig(batch_size=8.0), "training.batch_size: 8.0 .*, or None"),
        (
            lambda: TrainingConfig(mixed_precision="fp8"),
            "training.mixed_precision: 'fp8' is none of no, fp16, bf16; give one of them",
        ),
        (lambda: BudgetConfig(source=None), "budgets.source: None is none of unimodal"),
        (lambda: CalibrationConfig(copies="4"), "calibration.copies: '4' is no integer"),
        (lambda: CompareData(folds="3"), "data.folds: '3' is no integer"),
        (lambda: CompareConfig(seeds="3"), "seeds: '3' is no integer"),
        (lambda: CompareConfig(data={"a": DataConfig()}), r"data: .* a dict of CompareData\(...\)"),
        (lambda: CompareConfig(low_data_seeds=-1), "low_data_seeds: -1"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(make, message):
    with pytest.raises(InputError, match=message) as found:
        make()
    assert "\n" not in str(found.value) and len(str(found.value)) < 250


def test_numbers_of_numpy_paths_and_tuples_become_what_yaml_holds(tmp_path):
    config = RunConfig(
        seed=np.int64(3),
        epochs=np.uint8(2),
        output=tmp_path,
        method=np.str_("sum"),
        method_options={"a": np.float32(0.5), "b": 2},
        data=DataConfig(modalities=("a", "b")),
        training=TrainingConfig(learning_rate=1, alone=np.bool_(False)),
    )
    plain = RunConfig(
        seed=3,
        epochs=2,
        output=str(tmp_path),
        method="sum",
        method_options={"a": 0.5, "b": 2.0},
        data=DataConfig(modalities=["a", "b"]),
        training=TrainingConfig(learning_rate=1.0, alone=False),
    )
    assert repr(config) == repr(plain)
    save_config(tmp_path / "config.yaml", config)
    assert load_config(tmp_path / "config.yaml") == plain


# Names


def test_the_names_in_the_configuration_are_those_of_the_registry():
    assert METHOD_NAMES == tuple(METHODS) and METHOD_NAMES[0] == "unimodal"


def test_a_method_has_the_same_absolute_name_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for name, expected in {
        "iibalance": "iibalance",
        "a.b:C": "a.b:C",
        "mine.py:Mine": f"{tmp_path.resolve()}/mine.py:Mine",
        "~/mine.py:Mine": "/home/me/mine.py:Mine",
        "/there/mine.py:Mine": "/there/mine.py:Mine",
    }.items():
        assert absolute_method(name) == expected


def test_methods_are_checked_by_name(tmp_path):
    (tmp_path / "mine.py").write_text("broken(")  # not looked into
    for name in (*METHOD_NAMES, f"{tmp_path}/mine.py:Mine", "no.such.module:Mine"):
        check_method(name)
    for name in ("", ":", "magic", "mine.py:", ":Mine"):
        with pytest.raises(InputError, match="^method: .* is none of unimodal, .*my_file.py:My"):
            check_method(name)
    with pytest.raises(InputError, match="^method: absent.py: no such file$"):
        check_method("absent.py:Mine")


@pytest.mark.parametrize("command", ["train", "budgets", "compare"])
def test_help_names_every_method(command, capsys):
    with pytest.raises(SystemExit):
        run(command, "--help")
    words = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert not [name for name in METHOD_NAMES if name not in words]


def test_all_stands_for_every_method_and_beside_ones_own():
    assert CompareConfig().method_list() == list(METHOD_NAMES)
    assert CompareConfig(methods=" sum,concat, sum").method_list() == ["unimodal", "sum", "concat"]
    own = CompareConfig(methods=["mine.py:Mine", "all"]).method_list()
    assert own == ["unimodal", "mine.py:Mine", *METHOD_NAMES[1:]]


def test_the_focus_is_ours_or_else_the_first_that_is_named(tmp_path):
    for methods, focus in {
        "all": "iibalance",
        "concat,iibalance": "iibalance",
        "sum,concat": "sum",
        "unimodal,sum": "unimodal",
    }.items():
        config = CompareConfig(methods=methods)
        config.check_focus()
        assert config.focus_method() == focus
    assert CompareConfig(methods=[]).focus_method() == "unimodal"
    assert CompareConfig(focus="qmf").focus_method() == "qmf"
    with pytest.raises(InputError, match="^focus: iibalance is not compared; give --focus NAME, "):
        CompareConfig(methods="concat", focus="iibalance").check_focus()
    # What a method of one's own is called is told when its file is read.
    CompareConfig(methods="mine.py:Mine", focus="mine").check_focus()
    assert CompareConfig(methods="mine.py:Mine,sum").focus_method() == "mine.py:Mine"


# One data set for compare


def compared(capsys, *arguments) -> dict:
    with pytest.raises(SystemExit):
        run("compare", *arguments, "--print_config")
    return yaml.safe_load(capsys.readouterr().out)["data"]


def test_one_data_set_is_given_to_compare_as_to_train(capsys):
    found = compared(
        capsys,
        "--data.path",
        "some/my-clips.npz",
        "--data.groups=speaker",
        "--seeds",
        "2",
        "--data.layouts",
        '{"audio": "vector"}',
        "--data.folds",
        "4",
    )
    expected = CompareData(
        path="some/my-clips.npz", groups="speaker", layouts={"audio": "vector"}, folds=4
    )
    assert found == {"my_clips": asdict(expected)}
    assert found["my_clips"]["name"] == "npz"
    assert list(compared(capsys, "--data.split_seed", "3")) == ["digits"]
    assert compared(capsys, "--data.split_seed", "3")["digits"]["split_seed"] == 3


def test_the_forms_of_data_by_name_stay(capsys, tmp_path):
    sets = {"a": {"name": "npz", "path": "x.npz"}, "b": {"name": "digits"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": sets}))
    for arguments in (["--data", json.dumps(sets)], ["--config", tmp_path / "c.yaml"]):
        found = compared(capsys, *arguments)
        assert {name: (one["name"], one["path"]) for name, one in found.items()} == {
            "a": ("npz", "x.npz"),
            "b": ("digits", None),
        }


def test_the_two_forms_are_not_mixed(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("data: {a: {name: digits}}\n")
    for other in (
        ["--data", '{"a": {"name": "digits"}}'],
        ["--data.a", '{"name": "digits"}'],
        ["--config", tmp_path / "c.yaml"],
    ):
        assert run("compare", "--data.path", "x.npz", *other) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "data: give one data set by options such as --data.path, or several" in line


@pytest.mark.parametrize("given", ["5", "x.npz", '{"path": "x.npz"}', "[1]"])
def test_data_without_names_are_explained(capsys, tmp_path, given):
    (tmp_path / "c.yaml").write_text(f"data: {given}\n")
    for arguments in (["--data", given], ["--config", tmp_path / "c.yaml"]):
        assert run("compare", *arguments) == 2
        assert "data: expected data sets by name, such as {clips:" in capsys.readouterr().err


# Values that jsonargparse refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "1e3"], "epochs: 1000.0 cannot be used; give an integer"),
        (["--training.progress", "maybe"], "training.progress: maybe cannot be used; give true or"),
        (["--training.learning_rate", "x"], "training.learning_rate: x .* give a number"),
        (["--method_options", "5"], "method_options: 5 cannot be used; give values by name"),
        (["--kernels", "cuda"], "kernels: cuda .* give one of 'auto', 'triton', 'reference'$"),
    ],
)
def test_refused_values_are_told_in_plain_words(capsys, arguments, message):
    assert run("train", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^iibalance: error: {message}", line), line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "train --data.path absent.npz --epoch 3",
            "--epoch: no such option; did you mean --epochs?",
        ),
        ("train --epocs=3", "--epocs: no such option; did you mean --epochs?"),
        (
            "budgets --data.path absent.npz --epoch 3",
            "--epoch: no such option; did you mean --epochs?",
        ),
        (
            "compare --data.path absent.npz --epoch 3",
            "--epoch: no such option; did you mean --epochs?",
        ),
        (
            "compare --methods absent.py:Mine --method sum",
            "--method: no such option; did you mean --methods?",
        ),
        ("compare --data.group a", "--data.group: no such option; did you mean --data.groups?"),
        (
            "compare --data.nothing 3",
            "--data.nothing: no such option; iibalance train --help lists",
        ),
        ("evaluate run --strengt 2", "--strengt: no such option; did you mean --strength?"),
        ("predict run --data.pat new.npz", "--data.pat: no such option; did you mean --data.path?"),
        ("train --learning_rate 1", "no such option; did you mean --training.learning_rate?"),
        ("train --path x.npz", "--path: no such option; did you mean --data.path?"),
        ("train --qqqq 1", "--qqqq: no such option; iibalance train --help lists them"),
        ("--qqqq", "--qqqq: no such option; iibalance --help lists them"),
        (
            "compare --methods concat, sum",
            "sum: belongs to no option; put a value that holds spaces",
        ),
        ("predict run", "predict needs --data.path (file or folder of new samples, as for train;"),
        ("predict", "predict needs run (the run's folder) and --data.path (file or folder of"),
        ("evaluate", "evaluate needs run (the run's folder)"),
    ],
)
def test_options_that_there_are_not_and_those_that_are_missing(capsys, arguments, message):
    """Not one of them is taken for another: a typo must not train."""
    assert run(*arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iibalance: error: ") and message in line


def test_configuration_files_that_are_no_options(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    for content, words in (
        (b"method: caf\xe9\n", "c.yaml: is not a readable YAML file"),
        (b"[" * 3000, "c.yaml: is not a readable YAML file"),
        (b"", "c.yaml: expected options by name"),
        (b"1: 2\n", "c.yaml: expected options by name"),
        (b"training: {mixed_precision: no}\n", "mixed_precision: False .* in quotes"),
    ):
        file.write_bytes(content)
        assert run("train", "--config", file) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(words, line), line
    file.write_bytes(b"training: {mixed_precision: 'no'}\nepochs: 0\n")  # the advice works
    assert run("train", "--config", file) == 2 and "epochs: 0" in capsys.readouterr().err


# Told without torch

CHEAP = """
import sys
from iibalance.cli import run
code = run(sys.argv[1:])
print(code, "torch" in sys.modules, "scipy" in sys.modules)
"""


def cheap(*arguments) -> str:
    """The one line with which a command ends; it must not have imported torch."""
    command = [sys.executable, "-c", CHEAP, *map(str, arguments)]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=synthetic.environment()
    )
    assert found.stdout.split() == ["2", "False", "False"], (found.stdout, found.stderr)
    (line,) = found.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "absent"], "absent: no such run folder"),
        (["evaluate", "."], "holds no trained model"),
        (["evaluate", "run", "--output", "absent/e.json"], "output: absent/e.json"),
        (["evaluate", "run", "--data.path", "absent.npz"], "absent.npz: no such file"),
        (["predict", "absent", "--data.path", "clips.npz"], "absent: no such run folder"),
        (["predict", "run", "--data.path", "absent.npz"], "absent.npz: no such file"),
        (["predict", "run", "--data.path", "clips.npz", "--output", "p.txt"], "p.txt must end in"),
        (["train", "--data.path", "absent.npz"], "absent.npz: no such file"),
        (["train", "--method", "magic"], "'magic' is none of unimodal"),
        (["train", "--method", "mine.py:Mine"], "mine.py: no such file"),
        (["train", "--budgets.path", "absent.json"], "absent.json: no such file"),
        (["train", "--resume", "absent"], "resume: absent holds no run"),
        (["train", "--resume", "run", "--epochs", "7"], "epochs: 7 differs from 1 of the run"),
        (["train", "--resume", "run", "--overwrite"], "overwrite: not together with resume"),
        (["train", "--overwrite"], "overwrite: name the folder to replace"),
        (["train", "--output", "run"], "run: holds another run; resume it"),
        (["train", "--output", "clips.npz"], "clips.npz: is a file"),
        (["train", "--output", "other", "--overwrite"], "other: holds files but no run"),
        (["budgets", "--data.path", "absent.npz"], "absent.npz: no such file"),
        (["budgets", "--budgets.source", "online"], "budgets.source: online"),
        (["budgets", "--method", "magic"], "'magic' is none of"),
        (["compare", "--data.path", "absent.npz"], "absent.npz: no such file"),
        (["compare", "--methods", "sum,magic"], "'magic' is none of"),
        (["compare", "--output", "clips.npz"], "clips.npz: is a file"),
        (
            ["compare", "--methods", "concat,sum", "--focus", "qmf"],
            "focus: qmf is not compared; give --focus NAME, one of unimodal, concat, sum",
        ),
    ],
)
def test_cheap_mistakes_are_told_without_torch(tmp_path, monkeypatch, data, arguments, words):
    shutil.copy(data, tmp_path / "clips.npz")
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path / "run")
    Path("other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("theirs: 1\n")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert words in cheap(*arguments)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def finished_run(folder: Path, **changes) -> None:
    """What commands look at of a run before they import torch; there are no weights.

    ``changes``: to the description of the model.
    """
    about = {
        "modalities": ["audio", "visual"],
        "classes": ["0", "1", "2"],
        "shapes": {"audio": [6], "visual": [4]},
        "layouts": {"audio": "vector", "visual": "vector"},
        "embedding_dims": {"audio": 8, "visual": 8},
        "own_encoders": [],
        **changes,
    }
    folder.mkdir()
    data = DataConfig(path="clips.npz")
    save_config(folder / "config.yaml", RunConfig(data=data, epochs=1, method="concat"))
    for name in ("run.json", "metrics.json"):
        (folder / name).write_text("{}")
    weights, metadata = {"weight": np.zeros(1)}, {"iibalance": json.dumps(about)}
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata)


SEVERAL = """
import functools, json, sys
from iibalance.cli import main, run
main.main_parser = functools.cache(main.main_parser)  # 0.4 s a command
for arguments in json.loads(sys.argv[1]):
    print(run(arguments), "torch" in sys.modules)
"""


def refusals(cases: dict[tuple[str, ...], str]) -> None:
    """Each command ends with one line that holds the words, and before torch is imported."""
    command = [sys.executable, "-c", SEVERAL, json.dumps(list(cases))]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=synthetic.environment()
    )
    lines = found.stderr.splitlines()
    assert found.stdout.splitlines() == ["2 False"] * len(cases), (found.stdout, found.stderr)
    assert len(lines) == len(cases), found.stderr
    for (arguments, words), line in zip(cases.items(), lines):
        assert line.startswith("iibalance: error: ") and words in line, f"{arguments}: {line}"


def test_every_bad_file_is_refused_without_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = synthetic.arrays()
    synthetic.write(tmp_path / "clips.npz")
    finished_run(tmp_path / "run")
    value, label = arrays["x_audio"].copy(), arrays["y"].astype(float)
    value[7, 2] = label[9] = np.nan
    synthetic.write(tmp_path / "value.npz", x_audio=value)
    synthetic.write(tmp_path / "label.npz", y=label)
    synthetic.write(tmp_path / "lengths.npz", x_visual=np.zeros((150, 4)))
    synthetic.write(tmp_path / "one.npz", y=np.zeros(200, int))
    synthetic.write(tmp_path / "strange.npz", y=arrays["y"] + 1)
    synthetic.write(tmp_path / "key.npz", y=None)
    synthetic.write(tmp_path / "smell.npz", x_smell=np.zeros((200, 2)))
    synthetic.write(tmp_path / "audio.npz", x_visual=None, mask_audio=None)
    table = np.column_stack([arrays["x_audio"], arrays["y"]])
    header = ",".join([*(f"a_{column}" for column in range(6)), "y"])
    np.savetxt("clips.csv", table, header=header, comments="", delimiter=",")
    columns = ["--data.path", "clips.csv", "--data.columns", '{"audio": "a_*", "visual": "v_9"}']
    cases = {}
    for command in ("train", "budgets", "compare", "evaluate run", "predict run"):
        where = (*command.split(), "--data.path")
        cases[*where, "value.npz"] = "value.npz: x_audio: row 7 holds nan"
        cases[*where, "label.npz"] = "label.npz: y: row 9 holds nan"
        cases[*where, "lengths.npz"] = "lengths.npz: x_visual: has 150 rows, but y has 200"
        if "run" not in command:
            cases[*where, "one.npz"] = "one.npz: y: holds only class 0"
            cases[*where, "clips.npz", "--data.modalities", "audio,smell"] = "no x_smell; there are"
            cases[command, *columns] = "clips.csv: data.columns: visual: there is no column 'v_9'"
        else:
            cases[*where, "strange.npz"] = "strange.npz: y: row "
        if "predict" not in command:
            cases[*where, "key.npz"] = "key.npz: no y; add the class of each sample"
    cases["evaluate", "run", "--data.path", "smell.npz"] = "smell.npz: holds the modalities audio, "
    cases["predict", "run", "--data.path", "audio.npz"] = "audio.npz: x_visual is not there"
    cases["predict", "run", "--data.path", "clips.npz", "--missing", "smell"] = "missing: 'smell'"
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    refusals(cases)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_what_is_wrong_with_a_run_or_its_degradation_is_told_without_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synthetic.write(tmp_path / "clips.npz")
    finished_run(tmp_path / "run")
    finished_run(tmp_path / "own", own_encoders=["visual"])
    finished_run(tmp_path / "first", custom_encoders=True)
    finished_run(tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-1])
    finished_run(tmp_path / "theirs")
    safetensors.numpy.save_file({"weight": np.zeros(1)}, tmp_path / "theirs" / "model.safetensors")
    # The first format named no encoders: all were the user's, or none.
    about = json.loads(read_metadata(tmp_path / "first" / "model.safetensors")["iibalance"])
    del about["own_encoders"]
    safetensors.numpy.save_file(
        {"weight": np.zeros(1)},
        tmp_path / "first" / "model.safetensors",
        {"iibalance": json.dumps(about)},
    )
    evaluate = ("evaluate", "run")
    cases = {
        (
            *evaluate,
            "--degrade",
            "audio",
        ): "degrade: 'audio' is not <modality>=<kind>, such as au",
        (*evaluate, "--degrade", "smell=noise"): "no modality 'smell'; there are audio, visual",
        (*evaluate, "--degrade", "audio=fog"): "'fog' is none of noise, missing, shuffled",
        (*evaluate, "--fraction", "1.5"): "fraction: 1.5 is no share",
        (*evaluate, "--fraction", ".nan"): "fraction: nan is no share",
        (*evaluate, "--strength", "-1"): "strength: -1.0 is no noise level",
        (*evaluate, "--seed", "-1"): "seed: -1 cannot be used; give an integer from 0 to 2**63 - 1",
    }
    for command in ("evaluate", "predict"):
        data = ("--data.path", "clips.npz")
        cases[command, "cut", *data] = "cut/model.safetensors: is not a whole safetensors file"
        cases[command, "theirs", *data] = "theirs/model.safetensors: was not written by iibalance"
        cases[command, "own", *data] = "encoders of your own (visual), which a command cannot be"
        cases[command, "first", *data] = "encoders of your own (audio, visual), which a command"
    refusals(cases)


# Overwriting


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run("train", "--data.path", data, "--output", folder, *QUICK) == 0
    return folder


@pytest.fixture
def old(tmp_path, trained) -> Path:
    """A finished run, with a file of the user's own in it."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    return tmp_path / "run"


def test_all_that_a_run_writes_is_known(trained):
    names = [path.name for path in trained.iterdir() if not path.name.startswith(".")]
    known = {path.name for pattern in RUN_FILES for path in trained.glob(pattern)}
    assert set(names) == known


@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_is_replaced_and_nothing_else(old, data, capsys):
    (old / "evaluation-clean.json").write_text("{}")  # of the old model
    options = ["train", "--data.path", data, "--output", old, *QUICK, "--seed", "1"]
    assert run(*options) == 2 and "--overwrite" in capsys.readouterr().err
    assert run(*options, "--overwrite") == 0
    assert load_config(old / "config.yaml").seed == 1
    assert json.loads((old / "metrics.json").read_text())["seed"] == 1
    assert (old / "notes.txt").read_text() == "mine" and not (
        old / "evaluation-clean.json"
    ).exists()
    assert not list(old.glob(".removing-*"))


@pytest.mark.usefixtures("no_pictures")
def test_an_unfinished_run_and_an_empty_folder_are_replaced(old, data, tmp_path):
    (old / "metrics.json").unlink()
    (old / "checkpoints" / "stage-000-epoch-00001").mkdir(parents=True, exist_ok=True)  # damaged
    (tmp_path / "empty").mkdir()
    for folder in (old, tmp_path / "empty", tmp_path / "new"):
        options = ["--data.path", data, "--output", folder, *QUICK, "--seed", "1"]
        assert run("train", *options, "--overwrite") == 0
        assert json.loads((folder / "metrics.json").read_text())["seed"] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        ["--data.path", "absent.npz"],
        ["--data.modalities", "audio,smell"],
        ["--method_options", '{"nothing": 1}'],
        ["--budgets.folds", "100", "--method", "iibalance"],
    ],
)
def test_nothing_is_removed_before_the_new_run_has_been_checked(old, data, wrong):
    before = contents(old)
    options = ["--data.path", data, "--output", old, *QUICK, *wrong]
    assert run("train", *options, "--overwrite") == 2
    assert contents(old) == before


def test_a_folder_of_another_kind_or_in_use_is_not_overwritten(old, tmp_path, data):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.yaml").write_text("a: 1\n")
    with pytest.raises(InputError, match="theirs: holds files but no run"):
        RunFolder.create(tmp_path / "theirs", overwrite=True)
    assert contents(tmp_path / "theirs") == {"config.yaml": b"a: 1\n"}
    before = contents(old)
    with RunFolder.create(old, resume=True):
        for look in (RunFolder(old).check, lambda **how: RunFolder.create(old, **how)):
            with pytest.raises(InputError, match="another process is training into this folder"):
                look(overwrite=True)
    with pytest.raises(InputError, match="overwrite: not together with resume"):
        RunFolder.create(old, resume=True, overwrite=True)
    config = RunConfig(data=DataConfig(path=data), method="concat")
    with pytest.raises(InputError, match="overwrite: name the folder to replace"):
        iibalance.train(config, overwrite=True)
    assert contents(old) == before


def test_budgets_inside_the_run_are_not_removed(old, data, capsys):
    (old / "budgets.json").write_text('{"audio": 0.5, "visual": 0.2}')
    options = ["--data.path", data, "--output", old, *SMALL, "--budgets.path", old / "budgets.json"]
    assert run("train", *options, "--overwrite") == 2
    assert "budgets.path" in capsys.readouterr().err and (old / "budgets.json").exists()


@pytest.mark.parametrize("kept", range(len(RUN_FILES)))
def test_a_removal_that_was_killed_leaves_a_run_or_none(old, monkeypatch, kept):
    """Whatever was removed already, the folder can be resumed, overwritten, or trained into."""
    (old / "notes.txt").unlink()
    for pattern in RUN_FILES[: kept + 1]:
        for path in old.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    RunFolder(old).check(overwrite=True)
    if (old / "config.yaml").exists():
        RunFolder(old).check(resume=True)
        assert not (old / "metrics.json").exists(), "it would be taken for finished"
    else:
        RunFolder(old).check()
