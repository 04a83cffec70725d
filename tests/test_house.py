"""The floors of the house: what may import what (CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"errors"},
    {"files"},
    {"checks", "method_names"},
    {"config"},
    {"config_files"},
    {"metrics"},
    {"budgets"},
    {"data"},
    {"nn"},
    {"methods"},
    {"training"},
    {"estimator", "estimator_inputs"},
    {"comparison"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(ROOT.glob("iibalance/**/*.py"))


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_goes_up(path):
    room = path.relative_to(ROOT / "iibalance").parts[0].removesuffix(".py")
    if room in ("__init__", "examples"):
        return  # give and use the public names, each when it is asked for
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "iibalance" and len(parts) > 1:
            assert FLOOR[parts[1]] <= FLOOR[room], f"{path} imports {name}"


def test_the_kernels_stand_on_torch_and_triton_alone():
    for path in sorted(ROOT.glob("iib_kernels/**/*.py")):
        assert not [name for name in imported(path) if name.split(".")[0] == "iibalance"], path


def test_every_room_says_what_lives_there():
    for path in [*ROOT.glob("iibalance/**/__init__.py"), ROOT / "iib_kernels/__init__.py"]:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text and len(text.splitlines()) >= 3, path


def test_no_device_function_returns_none():
    """Triton 3.6 compiles none that does; 3.7, which CI compiles with, would not tell."""
    found = []
    for path in sorted((ROOT / "iib_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "triton.jit" in "".join(
                map(ast.unparse, node.decorator_list)
            ):
                returned = [part for part in ast.walk(node) if isinstance(part, ast.Return)]
                found += [
                    f"{path.name}: {node.name}"
                    for part in returned
                    if isinstance(part.value, ast.Constant) and part.value.value is None
                ]
    assert not found
