"""The public names: what `iibalance` promises, what editors see, and that each is documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import iib_kernels
import iibalance

# A name that is added here is a promise; one that is taken away breaks somebody's code.
NAMES = """
    Batch BudgetConfig Budgets CalibrationConfig CompareConfig CompareData DataConfig Gate
    HeadOutput IIBalanceClassifier IIBalanceHead IIBalanceLoss InputError LossOutput METHODS Method
    ModelConfig MultimodalClassifier MultimodalData ObjectiveConfig Prediction PrototypeBank
    RunConfig Samples TrainResult TrainingConfig budgets_from_logits build_encoder compare
    estimate_budgets infer_layout load load_config load_data make_method train tuned
""".split()
# Plain containers, whose docstring or fields say all there is.
FIELDS = {"Batch", "HeadOutput", "LossOutput", "MultimodalData", "Prediction", "TrainResult"}
OPTIONS = {name for name in NAMES if name.endswith(("Config", "CompareData"))}


def test_the_public_names_are_these():
    assert sorted(iibalance.__all__) == NAMES
    assert set(NAMES) <= set(dir(iibalance))
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = iibalance.nothing_of_that_name


@pytest.mark.parametrize("name", NAMES)
def test_each_is_there_and_documented_with_an_example(name):
    value = getattr(iibalance, name)
    assert getattr(iibalance, name) is value
    if name == "METHODS":
        return
    text = inspect.getdoc(value)
    assert value.__module__.startswith("iibalance.") and text and len(text) > 40
    if name in OPTIONS:
        assert ">>> " in text, f"{name} has no example"
    elif name not in FIELDS | {"compare", "Method"}:
        assert ">>> " in text or ">>> " in inspect.getsource(value), f"{name} has no example"


def test_importing_the_package_is_light():
    """Not torch, nor anything else that takes long."""
    code = (
        "import sys, iibalance; iibalance.__all__; dir(iibalance); "
        "print([n for n in ('torch', 'numpy', 'sklearn', 'pandas') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_editors_see_the_names_and_types():
    """The stub is in the package, and every name in it is one that its module has."""
    package = Path(iibalance.__file__).parent
    assert (package / "py.typed").exists()
    assert (Path(iib_kernels.__file__).parent / "py.typed").exists()
    tree = ast.parse((package / "__init__.pyi").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert sorted(node.names[0].name for node in found) == NAMES
    assert all(node.names[0].asname == node.names[0].name for node in found)  # re-exported
