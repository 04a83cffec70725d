"""What the texts show is what runs and what is there: commands, examples, names, links, figures."""

import re
from pathlib import Path

import pytest
import yaml

import iibalance
from iibalance import cli
from iibalance.methods import METHODS

ROOT = Path(__file__).parent.parent
CODE = [
    path
    for room in ("iib_kernels", "iibalance", "benchmarks", "tests")
    for path in sorted((ROOT / room).rglob("*.py"))
]
TEXTS = [
    *sorted(ROOT.glob("*.md")),
    *(
        path
        for room in ("iib_kernels", "iibalance", "benchmarks")
        for path in sorted((ROOT / room).rglob("*.md"))
    ),
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHOD_PAGE = (ROOT / "iibalance" / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
CHOICES = (ROOT / "benchmarks" / "results" / "choices.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def examples(text):
    """The blocks of Python that are to run."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    return [block for block in blocks if not block.startswith("# not run here")]


PYTHON = [
    pytest.param(block, id=f"{name}-{number}")
    for name, text in (("README", README), ("method page", METHOD_PAGE))
    for number, block in enumerate(examples(text))
]


def test_the_two_commands_stand_there():
    assert "pip install -c constraints.txt -e . && python -m iibalance train\n" in README
    assert 'pip install -c constraints.txt -e ".[test]" && pytest -n 2\n' in README


def test_the_ten_lines_are_ten():
    first = examples(README)[0]
    lines = [line for line in first.splitlines() if line.strip()]
    assert "IIBalanceHead" in first and len(lines) <= 10


def run_example(block):
    namespace = {}
    exec(compile(block, "an example", "exec"), namespace)  # noqa: S102 - our own text
    return namespace


@pytest.mark.parametrize("block", PYTHON)
def test_examples_run(block):
    run_example(block)


def test_the_ten_lines_train_a_model_and_predict():
    names = run_example(examples(README)[0])
    assert names["out"].loss.item() < 2
    assert names["prediction"].weights.sum(1).sub(1).abs().max() < 1e-5


def test_the_method_of_ones_own_is_found_by_its_file(tmp_path):
    (block,) = (block for block in examples(METHOD_PAGE) if "class Smoothed" in block)
    (tmp_path / "mine.py").write_text(block)
    method = iibalance.make_method(f"{tmp_path}/mine.py:Smoothed", amount=0.3)
    assert method.name == "smoothed" and method.options.amount == 0.3


# References and links.


def slugs(text):
    """The anchors of a Markdown text's headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        again = sum(earlier.rpartition("~")[0] == slug for earlier in found)
        found.append(f"{slug}~{again}")
    return {slug.replace("~0", "").replace("~", "-") for slug in found}


def test_anchors_are_made_as_github_makes_them():
    text = "# A `b`, c!\n## Same\n## Same\n```\n# no heading\n```\n## 1. Intrinsic budgets"
    assert slugs(text) == {"a-b-c", "same", "same-1", "1-intrinsic-budgets"}


REFERENCE = re.compile(r"method\s+page,[\s#]+sections?[\s#]+(\d+)(?:(?:,| and| to)[\s#]+(\d+))?")


def test_every_section_of_the_method_page_that_the_code_names_is_there():
    headings = set(re.findall(r"^## (\d+)\. ", METHOD_PAGE, re.M))
    assert headings == {"1", "2", "3", "4", "5", "6"}
    named = {}
    for path in CODE:
        for groups in REFERENCE.findall(path.read_text(encoding="utf-8")):
            named.setdefault(path.relative_to(ROOT), set()).update(filter(None, groups))
    assert len(named) > 10  # the pattern finds them
    wrong = {str(path): numbers - headings for path, numbers in named.items() if numbers - headings}
    assert not wrong, wrong
    for room in ("iib_kernels", "iibalance"):
        found = set().union(*(numbers for path, numbers in named.items() if path.parts[0] == room))
        assert found >= ({"2", "3", "4"} if room == "iib_kernels" else headings)


def test_no_docstring_names_the_page_of_the_first_plan():
    gone = "method" + ".md"
    assert not [str(path) for path in CODE if gone in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = path.parent / place if place else path
        assert target.exists(), f"{link}: no such file"
        assert not place.startswith("/") and ROOT in target.resolve().parents, link
        if anchor:
            assert anchor in slugs(target.read_text(encoding="utf-8")), f"{link}: no such heading"


def test_the_files_that_contributing_names_are_there():
    rooms = r"`((?:iib_kernels|iibalance|benchmarks|tests)/[\w/.]*)`"
    named = re.findall(rooms, CONTRIBUTING)
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_names_that_contributing_sends_to_are_there():
    for file, names in {
        "iibalance/nn/encoders.py": ["_BUILDERS"],
        "iibalance/data/__init__.py": ["_SOURCES"],
        "iibalance/data/assemble.py": ["RawData"],
        "iibalance/data/layouts.py": ["LAYOUT_DIMENSIONS"],
        "iibalance/data/standardize.py": ["statistic_shape"],
        "iibalance/methods/registry.py": ["METHODS", "_SEARCH"],
        "benchmarks/cases.py": ["OPS"],
    }.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in names:
            assert f"`{name}`" in CONTRIBUTING
            assert re.search(rf"^(class |def )?{name}\b", text, re.M), f"{file}: {name}"


# Options and figures.

# Of accelerate, torchrun, pytest-benchmark, benchmarks.report, host_time and on_gpu.
OTHERS = {"--num_processes", "--nproc_per_node", "--benchmark", "--output", "--section", "--dry"}
OTHERS |= {"--against"}


def test_every_option_that_is_named_exists(capsys):
    known = set()
    for command in ("train", "evaluate", "predict", "budgets", "compare"):
        with pytest.raises(SystemExit) as ended:
            cli.run([command, "--help"])
        assert ended.value.code == 0
        known |= set(re.findall(r"--[a-z_.]+", capsys.readouterr().out))
    for text in (README, METHOD_PAGE, BENCHMARKS, CHOICES):
        named = set(re.findall(r"(--[a-z_]+(?:\.[a-z_]+)*)", text)) - OTHERS
        assert not named - known, named - known


def rows(text, first):
    """The cells of the table whose first header cell is ``first``, by the first cell of a row."""
    (lines,) = re.findall(rf"^\| {re.escape(first)} \|.*\n\|[-:|]+\|\n((?:\|.*\n)+)", text, re.M)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_table_of_methods_is_that_of_the_code():
    table = rows(METHOD_PAGE, "name")
    ablations = {name for name in METHODS if name.startswith("iibalance_")}
    assert set(table) == set(METHODS) - ablations
    assert all(f"`{name}`" in METHOD_PAGE for name in ablations)
    for name, (_, modalities, parameters, _) in table.items():
        method = METHODS[name]
        assert modalities == {None: "any", 2: "two"}[method.modalities], name
        given = {key: float(value) for key, value in re.findall(r"`(\w+)` ([\d.]+)", parameters)}
        assert given == method.defaults, name


def test_the_ranks_in_readme_are_those_of_the_benchmarks():
    ours = re.search(r"^\| \| clean \| one modality missing.*?\n\n", README, re.S | re.M).group()
    ranks = rows(BENCHMARKS, "average rank, accuracy / NLL")
    named = {
        "`iibalance`": "iibalance",
        "encoders trained alone, under our gate": "ensemble_gated",
        "encoders trained alone, summed": "ensemble",
        "one classifier on all embeddings": "concat",
    }
    for label, method in named.items():
        figures = [cell.replace("*", "") for cell in ranks[method][1:]]
        assert f"| {label} | {' | '.join(figures)} |\n" in ours


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == iibalance.__version__
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert "2603.17347" in citation["references"][0]["identifiers"][0]["value"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{iibalance.__version__}]" in changes
