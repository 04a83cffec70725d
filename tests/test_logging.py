"""How far a command is, and what it says when it is interrupted."""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import synthetic

import iibalance
from iibalance import cli
from iibalance.config import BudgetConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from iibalance.data import load_data
from iibalance.training import run as run_module
from iibalance.training.loop import speaker
from iibalance.training.stages import Run

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "
TRAINED = r"epoch (\d)/2  loss \d+\.\d{3}  \d+\.\d s"
JUDGED = (
    r"epoch (\d)/2  loss \d+\.\d{3}  validation NLL \d+\.\d{3}  accuracy [01]\.\d{3}  \d+\.\d s"
)
SMALL = ["--epochs", "2", "--model.width", "4", "--model.embedding_dim", "8"]
QUICK = ["--method", "concat", "--training.alone", "false", *SMALL]

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("data") / "clips.npz")


def run(*arguments) -> int:
    return cli.run([str(argument) for argument in arguments])


def config(data, output, **options) -> RunConfig:
    return RunConfig(
        data=DataConfig(path=data),
        model=ModelConfig(width=4, embedding_dim=8),
        budgets=BudgetConfig(folds=2, epochs=2),
        epochs=2,
        output=output,
        **options,
    )


# Logging


def test_every_epoch_of_every_training_is_a_line(data, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="iibalance")
    iibalance.train(config(data, tmp_path / "run"))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("iibal")]
    first = "budgets: 2 folds x 2 modalities, then 2 encoders alone, then iibalance on all 2"
    assert lines[0] == f"{tmp_path / 'run'}: {first} together"
    expected = []
    for stage in ("fold-0", "fold-1", "alone"):
        for index, name in enumerate(("audio", "visual")):
            epoch = JUDGED if stage == "alone" else TRAINED
            expected.append((f"{stage}-{index} ({name})", epoch))
    expected.append(("joint", JUDGED))
    assert len(lines) == 1 + 3 * len(expected)
    for number, (label, epoch) in enumerate(expected):
        begins, *epochs = lines[1 + 3 * number : 4 + 3 * number]
        assert re.fullmatch(rf"{re.escape(label)}: \d+ samples", begins), begins
        found = [re.fullmatch(f"{re.escape(label)}: {epoch}", line) for line in epochs]
        assert [match and match[1] for match in found] == ["1", "2"], epochs


def test_a_resumed_and_a_stopped_training_say_so(data, tmp_path, caplog, monkeypatch):
    options = {
        "method": "concat",
        "training": TrainingConfig(
            alone=False, patience=1, learning_rate=0.5, checkpoint_seconds=0
        ),
    }
    again = config(data, tmp_path / "run", **options)
    again.epochs = 9
    with monkeypatch.context() as patch:
        patch.setattr(Run, "report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            iibalance.train(again)
    caplog.set_level(logging.INFO, logger="iibalance")
    iibalance.train(again, resume=True)
    assert "joint: is done already" in caplog.messages
    caplog.clear()
    (tmp_path / "run" / "metrics.json").unlink()  # its stages are gone, its checkpoints are there
    iibalance.train(again, resume=True)
    (goes_on,) = [line for line in caplog.messages if "goes on after epoch" in line]
    (stopped,) = [line for line in caplog.messages if "stopped after epoch" in line]
    last = re.fullmatch(r"joint: \d+ samples, goes on after epoch (\d)", goes_on)[1]
    assert stopped == f"joint: stopped after epoch {last}, none was better since {int(last) - 1}"


def test_without_progress_nothing_is_said(data, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, logger="iibalance")
    quiet = TrainingConfig(alone=False, progress=False)
    iibalance.train(config(data, tmp_path / "a", method="concat", training=quiet))
    assert not [record for record in caplog.records if record.name.startswith("iibalance")]
    options = ["--data.path", data, "--output", tmp_path / "b", *QUICK]
    assert run("train", *options, "--training.progress", "false") == 0
    assert capsys.readouterr().err == ""


def test_a_library_configures_nothing(data, tmp_path, capsys):
    iibalance.train(config(data, tmp_path / "run", method="concat"))
    logger = logging.getLogger("iibalance")
    assert capsys.readouterr().err == "" and logger.level == logging.NOTSET
    assert not [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]


def test_only_the_main_process_says_anything(data, caplog):
    caplog.set_level(logging.INFO, logger="iibalance")
    split = load_data(DataConfig(path=data)).train
    for main in (False, True):
        accelerator = SimpleNamespace(is_main_process=main)
        speaker("joint", split, TrainingConfig(), accelerator)(f"main {main}")
    assert caplog.messages == ["joint: main True"]


def test_the_command_line_shows_the_lines_where_no_terminal_shows_bars(
    data, tmp_path, capsys, monkeypatch
):
    assert run("train", "--data.path", data, "--output", tmp_path / "a", *QUICK) == 0
    printed = capsys.readouterr()
    begins, *lines = printed.err.splitlines()
    assert re.fullmatch(f"{STAMP}{tmp_path / 'a'}: concat on all 2 together", begins)
    assert re.fullmatch(rf"{STAMP}joint: \d+ samples", lines[0])
    assert [re.fullmatch(f"{STAMP}joint: {JUDGED}", line)[1] for line in lines[1:]] == ["1", "2"]
    assert "joint" not in printed.out and "run folder" in printed.out
    assert not logging.getLogger("iibalance").handlers
    assert logging.getLogger("iibalance").level == logging.NOTSET

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert run("train", "--data.path", data, "--output", tmp_path / "b", *QUICK) == 0
    shown = capsys.readouterr().err
    assert not re.search(STAMP, shown) and "joint:" in shown  # a bar


def test_budgets_say_their_folds(data, capsys):
    options = ["--budgets.source", "probe", "--budgets.folds", "2"]
    assert run("budgets", "--data.path", data, *options) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("  budgets: linear probes, 2 folds x 2 modalities")


COMPARED = [*SMALL[2:], "--epochs", "1", "--seeds", "1", "--trials", "1", "--timing_steps", "0"]
COMPARED += ["--low_data", "0", "--workers", "1", "--methods", "concat,sum"]


def test_a_comparison_says_every_cell_and_not_their_epochs(data, tmp_path, capsys):
    options = ["--data.path", data, "--output", tmp_path / "out", *COMPARED]
    assert run("compare", *options) == 0
    lines = [re.sub(STAMP, "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "tuning: 3 cells, 0 of them done, 1 workers",
        "tuning: cell 1/3  trial-clips-unimodal-seed0-trial0",
        "tuning: cell 2/3  trial-clips-concat-seed0-trial0",
        "tuning: cell 3/3  trial-clips-sum-seed0-trial0",
        "comparing: 3 cells, 0 of them done, 1 workers",
        "comparing: cell 1/3  test-clips-unimodal-seed0",
        "comparing: cell 2/3  test-clips-concat-seed0",
        "comparing: cell 3/3  test-clips-sum-seed0",
    ]
    assert run("compare", *options) == 0  # it goes on where it was
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[1] for line in lines] == [
        "tuning: 3 cells, 3 of them done, 1 workers",
        "comparing: 3 cells, 3 of them done, 1 workers",
    ]
    assert run("compare", *options, "--training.progress", "false") == 0
    assert capsys.readouterr().err == ""


# Ctrl-C


def interrupt(*_, **__):
    raise KeyboardInterrupt


def interrupted(capsys, *arguments) -> str:
    """Run a command that is interrupted; the last line that it says."""
    assert run(*arguments) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("iibalance: interrupted; ")
    return last.removeprefix("iibalance: interrupted; ")


def test_an_interrupted_training_is_gone_on_with_by_what_it_says(
    data, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "my run"  # with a space
    options = ["--data.path", data, "--output", output, *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_joint", interrupt)
        advice = interrupted(capsys, "train", *options)
        first, program, *command = advice.partition(": ")[0], *shlex.split(advice.split(": ")[1])
        assert (first, program) == ("go on with", "iibalance") and str(output) in command
        assert interrupted(capsys, *command) == advice
    assert run(*command) == 0 and (output / "metrics.json").exists()


def test_a_training_interrupted_before_it_began_is_started_again(
    data, tmp_path, capsys, monkeypatch
):
    options = ["--data.path", data, "--output", tmp_path / "run", *QUICK]
    again = "no run had begun; give the same command again"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "make_accelerator", interrupt)
        assert interrupted(capsys, "train", *options) == again
        assert not (tmp_path / "run").exists()
    assert run("train", *options) == 0
    finished = (tmp_path / "run" / "metrics.json").read_bytes()
    with monkeypatch.context() as patch:  # the run that is there is the old one
        patch.setattr(run_module, "make_accelerator", interrupt)
        assert interrupted(capsys, "train", *options, "--overwrite") == again
    assert (tmp_path / "run" / "metrics.json").read_bytes() == finished
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_joint", interrupt)
        advice = interrupted(capsys, "train", *options, "--overwrite")
    assert advice == f"go on with: iibalance train --resume {tmp_path / 'run'}"


def test_the_default_folder_is_named_too(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "train_joint", interrupt)
    advice = interrupted(capsys, "train", *QUICK)
    assert advice == "go on with: iibalance train --resume runs/digits-concat-seed0"


def test_other_commands_say_what_is_left_of_them(data, tmp_path, capsys, monkeypatch):
    assert run("train", "--data.path", data, "--output", tmp_path / "run", *QUICK) == 0
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("iibalance.training.saving.load", interrupt)
    monkeypatch.setattr(run_module, "make_accelerator", interrupt)
    predict = ["predict", tmp_path / "run", "--data.path", data, "--output", tmp_path / "p.csv"]
    for command in (
        ["evaluate", tmp_path / "run"],
        predict,
        ["budgets", "--data.path", data, "--output", tmp_path / "b.json"],
    ):
        assert interrupted(capsys, *command) == "nothing was written"
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr("iibalance.comparison.workers.run_cell", interrupt)
    options = ["--data.path", data, "--output", tmp_path / "out", *COMPARED]
    advice = "give the same command again: it goes on where it was"
    assert interrupted(capsys, "compare", *options) == advice


def test_interrupted_while_it_reads_its_options(capsys, monkeypatch):
    monkeypatch.setattr("iibalance.cli.main.one_data_set", interrupt)
    assert interrupted(capsys, "train") == "nothing was written"
