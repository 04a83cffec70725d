"""The examples run as a stranger would run them, and what they print is true."""

import ast
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "iibalance" / "examples"
SCRIPTS = sorted(
    path for path in EXAMPLES.glob("*.py") if path.stem not in ("__init__", "conftest")
)
NUMBER = r"([-+]?\d*\.?\d+)"

pytestmark = pytest.mark.slow


def printed(name, folder, needs=()):
    """What an example prints, run in an empty folder; skipped where a library is not installed."""
    for library in needs:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f'{name}.py needs {library}: pip install -e ".[examples]"')
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(folder.iterdir()), "an example leaves files behind"
    return done.stdout


def number(pattern, text):
    """The number that follows what ``pattern`` matches, once in ``text``."""
    (found,) = re.findall(pattern + r"([-+]?\d*\.?\d+)", text)
    return float(found)


def test_plain_pytorch(tmp_path):
    text = printed("plain_pytorch", tmp_path)
    assert number(r"upper +", text) > 0.7 and number(r"lower +", text) > 0.7  # budgets
    neutral, fitted = (
        {case: number(f"{gate} gate, {case}: ", text) for case in ("clean", "missing", "noise")}
        for gate in ("neutral", "fitted")
    )
    assert fitted["clean"] > 0.93 and fitted["clean"] > neutral["clean"] - 0.03
    assert fitted["missing"] == neutral["missing"] > 0.8  # one modality: nothing to weigh
    assert fitted["noise"] > neutral["noise"] + 0.2


def test_with_accelerate(tmp_path):
    text = printed("with_accelerate", tmp_path)
    losses = [number(f"epoch {epoch}: loss ", text) for epoch in (4, 8, 12)]
    assert losses[0] > losses[1] > losses[2]
    assert number("all views: ", text) > 0.95
    # The pixels tell most, and the other two views still tell a lot.
    without = {name: number(f"without {name}: ", text) for name in ("pixels", "fourier", "shape")}
    assert 0.8 < without["pixels"] < min(without["fourier"], without["shape"])
    assert without["fourier"] > 0.93 and without["shape"] > 0.93


def test_with_lightning(tmp_path):
    text = printed("with_lightning", tmp_path, needs=["lightning"])
    assert number("test accuracy ", text) > 0.95
    assert number("NLL ", text) < 0.15
    assert "after pickling: same predictions: True" in text


def test_with_transformers(tmp_path):
    text = printed("with_transformers", tmp_path, needs=["transformers"])
    assert number("train: test accuracy ", text) > 0.88
    assert "the first image alone is a zero: zero" in text
    text_budget, image_budget = (number(f"{name}: budget ", text) for name in ("text", "image"))
    assert 0.1 < text_budget < image_budget
    own = {
        name: number(f"{name}: budget {NUMBER[1:-1]}, .*head ", text) for name in ("text", "image")
    }
    # A sentence names two digits or three, and one in ten is wrong.
    assert 0.25 < own["text"] < 0.5 and own["image"] > 0.8
    assert number("IIBalanceClassifier: test accuracy ", text) > 0.85
    assert number("without the sentences ", text) > 0.8


def test_with_scikit_learn(tmp_path):
    text = printed("with_scikit_learn", tmp_path)
    assert number("cross-validated accuracy: ", text) > 0.93
    assert number("test accuracy: ", text) > 0.93
    assert number("half without the worst values: ", text) > 0.88
    assert number(r"mean +", text.split("test accuracy")[0]) > 0.5  # its budget
    # Contributions add up to the log-odds less those of the class's share: 0.627 are benign.
    probability = number("p = ", text)
    added = [number(f"{name} ", text.split("p = ")[1]) for name in ("mean", "error", "worst")]
    answer = re.search(r"least certain sample: (\w+)", text).group(1)
    share = {"benign": 357 / 569, "malignant": 212 / 569}[answer]
    assert 0.5 <= probability < 0.8
    odds = [math.log(p / (1 - p)) for p in (probability, share)]
    assert abs(sum(added) - (odds[0] - odds[1])) < 0.06  # they are printed with two digits
    assert "same predictions: True" in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_a_script_to_read(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree)
    assert f"python iibalance/examples/{path.name}" in docstring and "print" in docstring
    assert len(text.splitlines()) <= 110
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    assert f"test_{path.stem}" in globals(), "an example without a test of what it prints"
