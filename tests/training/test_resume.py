"""A run may be killed at any moment: resumed, it ends with the same metrics, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import synthetic
import torch

from iibalance import cli

# Forks a training and its resumptions, each killed by a SIGKILL of its own just before or after a
# named file or folder is renamed into place (None: not killed): those are the steps at which the
# state on disk changes. Forking saves importing torch for each.
KILLER = """
import json, os, signal, sys
if sum(len(moments) for _, moments in json.loads(sys.argv[1])) > 1:  # imported once for all
    import matplotlib.pyplot, sklearn.linear_model, sklearn.model_selection, torch._dynamo
    try:
        import torch.utils.tensorboard
    except ImportError:
        pass
from iibalance import cli

def arm(moment):
    when, name = moment.split(" ")
    def wrap(function):
        def step(source, target, **options):
            hit = str(target).endswith(name)
            if hit and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            function(source, target, **options)
            if hit:
                os.kill(os.getpid(), signal.SIGKILL)
        return step
    os.replace, os.rename = wrap(os.replace), wrap(os.rename)

runs = []
for arguments, moments in json.loads(sys.argv[1]):
    runs.append([])
    for moment in moments:
        child = os.fork()
        if child == 0:
            if moment is not None:
                arm(moment)
            os._exit(cli.run(arguments))
        runs[-1].append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if "--output" in arguments:
            arguments = ["train", "--resume", arguments[arguments.index("--output") + 1]]
print(json.dumps(runs))
"""

SMALL = [
    "--epochs",
    "3",
    "--budgets.epochs",
    "3",
    "--model.width",
    "8",
    "--model.embedding_dim",
    "16",
    "--calibration.copies",
    "2",
    "--training.checkpoint_seconds",
    "0",
]


def train(data: Path, output: Path, *more) -> list[str]:
    return list(
        map(
            str,
            ["train", "--data.name", "npz", "--data.path", data, "--output", output, *SMALL, *more],
        )
    )


def kill_at(*runs: tuple[list[str], list[str | None]]) -> list[list[int]]:
    """For each (command line, moments): the exit codes of that training and of its resumptions.

    The training is killed at the first moment, its resumptions at the others.
    """
    done = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=600,
        env=synthetic.environment(),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("data") / "clips.npz")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(
        synthetic.command(*train(data, folder)),
        capture_output=True,
        text=True,
        timeout=600,
        env=synthetic.environment(),
    )
    assert done.returncode == 0, done.stderr
    return folder


RESULTS = ["metrics.json", "model.safetensors", "history.csv", "budgets.json"]


def same(run: Path, other: Path) -> bool:
    """Equal results, byte for byte, and nothing left of the trainings that were killed."""
    left = [
        path
        for path in run.rglob("*")
        if path.name.endswith(".tmp") or path.name.startswith((".writing", ".removing"))
    ]
    return [
        name for name in RESULTS if (run / name).read_bytes() != (other / name).read_bytes()
    ] == [] and left == []


# One run, killed again and again

MOMENTS = [
    "after config.yaml",
    "after stage-000-epoch-00001",
    "before stages/fold-0-0.safetensors",
    "after stage-003-epoch-00002",
    "before stages/fold-2-1.safetensors",
    "after budgets.json",
    "before stage-006-epoch-00002",
    "after stages/alone-0.safetensors",
    "after stage-008-epoch-00001",
    "before stage-008-epoch-00003",
    "before stages/joint.safetensors",
    "before history.csv",
    "after model.safetensors",
    "before metrics.json",
]


@pytest.mark.slow
def test_killed_in_every_stage_and_resumed_each_time_it_ends_the_same(tmp_path, data, whole):
    run = tmp_path / "run"
    assert kill_at((train(data, run), [*MOMENTS, None])) == [[KILLED] * len(MOMENTS) + [0]]
    assert same(run, whole)


@pytest.mark.slow
def test_early_stopping_is_resumed_too(tmp_path, data):
    """The last checkpoint may be of a training that had stopped early: it must not train on."""
    options = [
        "--epochs",
        "12",
        "--training.patience",
        "1",
        "--training.learning_rate",
        "0.5",
        "--budgets.source",
        "probe",
        "--training.alone",
        "false",
    ]
    moments = ["after stage-000-epoch-00001", "before stages/joint.safetensors"]
    ends = kill_at(
        (train(data, tmp_path / "whole", *options), [None]),
        (train(data, tmp_path / "run", *options), [*moments, None]),
    )
    history = (tmp_path / "whole" / "history.csv").read_text().splitlines()
    assert 3 <= len(history) < 13, "the case needs a training that stops early"
    assert ends == [[0], [KILLED, KILLED, 0]]
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_online_budgets_are_resumed_too(tmp_path, data):
    """They live in the history: each epoch's moving average starts from the one before."""
    options = [
        "--budgets.source",
        "online",
        "--training.alone",
        "false",
        "--training.modality_dropout",
        "0.3",
        "--training.gradient_accumulation",
        "2",
    ]
    ends = kill_at(
        (train(data, tmp_path / "whole", *options), [None]),
        (train(data, tmp_path / "run", *options), ["after stage-000-epoch-00002", None]),
    )
    assert ends == [[0], [KILLED, 0]]
    assert same(tmp_path / "run", tmp_path / "whole")


# Killed from outside, at no moment in particular


@pytest.mark.slow
def test_killed_from_outside_at_random(tmp_path, data, whole):
    run, rng, killed = tmp_path / "run", random.Random(0), 0
    arguments = train(data, run)
    for _ in range(2):
        process = subprocess.Popen(
            synthetic.command(*arguments),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=synthetic.environment(),
        )
        deadline = time.monotonic() + 300
        while (
            not (run / "config.yaml").exists()
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.5))
        process.kill()
        error = process.communicate()[1]
        assert process.returncode in (KILLED, 0), error
        killed += process.returncode != 0
        arguments = ["train", "--resume", str(run)]
    assert killed, "the machine is too fast for this test"
    done = synthetic.call(*arguments, timeout=600)
    assert done.returncode == 0, done.stderr
    assert same(run, whole)


# What resuming refuses, and what it leaves alone


@pytest.fixture
def killed(tmp_path_factory, half) -> Path:
    """A copy of a run that was killed in its joint training."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    shutil.copytree(half, folder)
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("half") / "run"
    own = data.with_name("own.npz")  # one of the tests changes it
    shutil.copy(data, own)
    assert kill_at((train(own, folder, *QUICK), ["after stage-000-epoch-00002"])) == [[KILLED]]
    return folder


@pytest.fixture
def one_thread():
    """As many as the killed run had: the order of a sum is part of bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


QUICK = ["--method", "concat", "--training.alone", "false"]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(capsys, *arguments) -> str:
    assert cli.run([str(argument) for argument in arguments]) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert not [earlier for earlier in before if "error" in earlier], before  # progress alone
    return line


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(capsys, whole):
    before = contents(whole)
    assert cli.run(["train", "--resume", str(whole)]) == 0
    assert contents(whole) == before
    accuracy = json.loads(before["metrics.json"])["test"]["accuracy"]
    assert f"{100 * accuracy:.1f}" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_the_options_come_from_the_run_and_may_be_repeated_but_not_changed(capsys, killed):
    before = contents(killed)
    for more, name in [
        (["--epochs", "4"], "epochs"),
        (["--seed", "1"], "seed"),
        (["--model.width", "9"], "model.width"),
        (["--method", "sum"], "method"),
        (["--data.groups", "speaker"], "data.groups"),
    ]:
        line = refused(capsys, "train", "--resume", killed, *more)
        assert (
            f"{name}: {more[1]!r}" in line.replace(f": {more[1]} ", f": {more[1]!r} ")
            and str(killed) in line
        )
        assert contents(killed) == before
    assert cli.run(["train", "--resume", str(killed), "--epochs", "3", "--model.width", "8"]) == 0
    assert json.loads((killed / "metrics.json").read_text())["epochs"] == 3


def test_a_changed_data_file_is_refused(capsys, killed, data):
    own = data.with_name("own.npz")
    whole = own.read_bytes()
    before = contents(killed)
    try:
        synthetic.write(own, x_visual=synthetic.arrays()["x_visual"] + 1e-3)
        line = refused(capsys, "train", "--resume", killed)
        assert "own.npz" in line and "sha256" in line
        own.unlink()
        assert "own.npz: no such file" in refused(capsys, "train", "--resume", killed)
    finally:
        own.write_bytes(whole)
    assert contents(killed) == before


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.bin", "progress.json", "best.safetensors", "manifest.json"],
)
@pytest.mark.parametrize("damage", ["truncated", "garbled", "missing"])
def test_a_damaged_checkpoint_is_refused_by_name(name, damage, capsys, killed):
    path = killed / "checkpoints" / "stage-000-epoch-00002" / name
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            whole[:-20] if damage == "truncated" else bytes(255 - byte for byte in whole)
        )
    before = contents(killed)
    assert f"stage-000-epoch-00002/{name}" in refused(capsys, "train", "--resume", killed)
    assert contents(killed) == before


@pytest.mark.usefixtures("no_pictures")
def test_without_the_damaged_checkpoint_the_one_before_is_taken(
    capsys, killed, half, tmp_path, one_thread
):
    (killed / "checkpoints" / "stage-000-epoch-00002" / "optimizer.bin").write_bytes(b"")
    line = refused(capsys, "train", "--resume", killed)
    assert (
        f"delete {killed}/checkpoints/stage-000-epoch-00002 to resume from the one before" in line
    )
    shutil.rmtree(killed / "checkpoints" / "stage-000-epoch-00002")
    other = tmp_path / "run"
    shutil.copytree(half, other)
    for folder in (killed, other):
        assert cli.run(["train", "--resume", str(folder)]) == 0
    assert (killed / "metrics.json").read_bytes() == (other / "metrics.json").read_bytes()


def test_a_damaged_result_of_a_stage_is_refused_by_name(capsys, killed):
    path = killed / "stages" / "joint.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(
        (killed / "checkpoints" / "stage-000-epoch-00002" / "best.safetensors").read_bytes()[:-30]
    )
    assert "stages/joint.safetensors" in refused(capsys, "train", "--resume", killed)


def test_two_processes_do_not_train_into_one_folder(capsys, killed):
    from iibalance.training.folder import RunFolder

    with RunFolder.create(killed, resume=True):
        line = refused(capsys, "train", "--resume", killed)
        assert str(killed) in line and "another process" in line
