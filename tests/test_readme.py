"""What the texts show is what runs and what is there: commands, examples, names, links, figures."""

import ast
import csv
import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

import iib_kernels
import iibalance
from benchmarks import noise_picture
from iibalance import cli
from iibalance.comparison.picture import places
from iibalance.comparison.results import by_method, read_table
from iibalance.comparison.statistics import ablation_names, ranks
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


EXAMPLES = sorted((ROOT / "iibalance" / "examples").glob("*.py"))


def blocks(text, language):
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


PYTHON = [
    pytest.param(block, id=f"{name}-{number}")
    for name, text in (("README", README), ("method page", METHOD_PAGE))
    for number, block in enumerate(blocks(text, "python"))
]


def test_the_readme_can_be_read_in_a_few_minutes():
    lines = README.splitlines()
    assert 120 <= len(lines) <= 180
    assert not [line for line in lines if len(line) > 100]
    # Mathematics that goes over the end of a line is not set by GitHub.
    assert not [line for line in lines if line.count("$") % 2]


def test_the_two_commands_stand_there():
    assert "pip install -c constraints.txt -e . && python -m iibalance train\n" in README
    assert 'pip install -c constraints.txt -e ".[test]" && pytest -n 2\n' in README


def test_the_ten_lines_are_ten():
    first = blocks(README, "python")[0]
    lines = [line for line in first.splitlines() if line.strip()]
    assert "IIBalanceHead" in first and len(lines) <= 10


def run_example(block, folder, monkeypatch):
    """The names that a block leaves, run in an empty folder."""
    if "transformers" in block and importlib.util.find_spec("transformers") is None:
        pytest.skip('the example needs transformers: pip install -e ".[examples]"')
    monkeypatch.chdir(folder)
    namespace = {}
    exec(compile(block, "an example", "exec"), namespace)  # noqa: S102 - our own text
    return namespace


@pytest.mark.parametrize("block", PYTHON)
def test_examples_run(block, tmp_path, monkeypatch):
    run_example(block, tmp_path, monkeypatch)


def example_with(name):
    (block,) = (block for block in blocks(README, "python") if name in block)
    return block


def test_the_ten_lines_train_a_model_and_predict(tmp_path, monkeypatch):
    names = run_example(blocks(README, "python")[0], tmp_path, monkeypatch)
    assert names["out"].loss.item() < 2
    trust = names["prediction"].trust
    assert trust.shape == (64, 2) and 0 <= trust.min() <= trust.max() <= 1


def test_the_example_with_arrays_gives_what_its_comments_say(tmp_path, monkeypatch):
    np.random.seed(0)
    names = run_example(example_with("IIBalanceClassifier"), tmp_path, monkeypatch)
    table, y = names["table"], names["y"]
    again = iibalance.IIBalanceClassifier.load(tmp_path / "classifier.safetensors")
    assert again.modalities_ == ("sound", "person") and list(again.classes_) == sorted(set(y))
    added = again.contributions(table)
    assert added.shape == (120, 2)
    # What they add to: the log-odds of what is predicted less those of its class's share, a third.
    p = again.predict_proba(table).max(1)
    expected = np.log(p / (1 - p)) - np.log(1 / 2)
    assert np.abs(added.sum(1) - expected).max() < 1e-4


def test_the_example_with_bert_trains_it_and_predicts_without_text(tmp_path, monkeypatch):
    names = run_example(example_with("BertModel"), tmp_path, monkeypatch)
    assert type(names["model"].encoders[0]).__name__ == "BertModel"
    assert names["probabilities"].shape == (90, 3)
    assert names["trust"][:, 0].abs().max() == 0  # the text is missing
    assert (tmp_path / "runs" / "bert" / "metrics.json").exists()


# What makes a command of the README quick; nothing else about it is changed.
QUICK = {
    "train": "--epochs 1 --budgets.folds 2 --training.alone false",
    "compare": "--epochs 1 --budgets.folds 2 --seeds 1 --trials 1 --low_data 0 --timing_steps 0"
    " --workers 1 --model.width 8",
}


def command_lines(text):
    """The arguments of each ``python -m iibalance`` among the commands of the bash blocks."""
    found = []
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command)
                if words[:3] == ["python", "-m", "iibalance"]:
                    found.append(words[3:])
    return found


def made_files(folder):
    """The files that the commands name: two modalities, of which the audio tells the class."""
    random = np.random.default_rng(0)
    y = np.array(["up", "down"])[np.arange(80) % 2]
    audio = random.normal(size=(80, 6)) + 3 * (y == "up")[:, None]
    video = random.normal(size=(80, 3, 8, 8))
    clips = {"x_audio": audio, "x_video": video, "y": y, "speaker": np.arange(80) // 8}
    np.savez(folder / "clips.npz", **clips)
    np.savez(folder / "new.npz", x_audio=audio[:10])
    table = pd.DataFrame(audio).add_prefix("a_").assign(v1=video[:, 0, 0, 0], v2=1.0, label=y)
    table.to_csv(folder / "table.csv", index=False)


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    made_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = command_lines(README)
    assert {"train", "evaluate", "predict", "compare"} == {words[0] for words in lines}
    for words in lines:
        quick = shlex.split(QUICK.get(words[0], ""))
        assert cli.run([*words, *quick]) == 0, f"{words}: {capsys.readouterr().err}"
    with open("predictions.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 10
    assert all(abs(float(row["p.up"]) + float(row["p.down"]) - 1) < 1e-4 for row in found)
    assert all(float(row["trust.video"]) == 0 for row in found)  # it is missing
    assert all(float(row["contribution.video"]) == 0 for row in found)
    assert Path("runs/clips/evaluation-audio-noise.json").exists()
    pd.read_csv("table.csv").filter(like="a_").to_csv("new.csv", index=False)
    assert cli.run("predict runs/table --data.path new.csv --missing video".split()) == 0
    assert Path("runs/compared/comparison.csv").exists()


PUBLIC = {"iibalance": set(iibalance.__all__), "iib_kernels": set(iib_kernels.__all__)}


def imported_parts(text):
    """What a piece of code imports of the two packages beside their public names."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in PUBLIC and "." in name]
        elif isinstance(node, ast.ImportFrom) and node.module:
            room, dot, _ = node.module.partition(".")
            names = [alias.name for alias in node.names]
            if room in PUBLIC:
                found += [node.module] if dot else [n for n in names if n not in PUBLIC[room]]
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_no_example_imports_a_module_inside_the_package(path):
    assert not imported_parts(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("block", PYTHON)
def test_no_block_imports_a_module_inside_the_package(block):
    assert not imported_parts(block)


def test_imports_from_inside_are_found():
    assert imported_parts("from iibalance.data.dataset import Batch") == ["iibalance.data.dataset"]
    assert imported_parts("import iibalance.cli") == ["iibalance.cli"]
    assert imported_parts("from iibalance import nn") == ["nn"]
    assert not imported_parts("from iibalance import Batch, tuned\nimport iib_kernels, iibalance")


def test_the_method_of_ones_own_is_found_by_its_file(tmp_path):
    (block,) = (block for block in blocks(METHOD_PAGE, "python") if "class Smoothed" in block)
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
        "iibalance/data/sources.py": ["_SOURCES"],
        "iibalance/data/samples.py": ["Samples"],
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

# Of accelerate, torchrun, pytest-benchmark, and of report, host_time, on_gpu and generated in
# benchmarks.
OTHERS = {"--num_processes", "--nproc_per_node", "--benchmark", "--output", "--section", "--dry"}
OTHERS |= {"--against", "--truth"}


def test_every_option_that_is_named_exists(capsys):
    known = set()
    for command in ("train", "evaluate", "predict", "budgets", "compare"):
        with pytest.raises(SystemExit) as ended:
            cli.run([command, "--help"])
        assert ended.value.code == 0
        known |= set(re.findall(r"--[a-z_.]+", capsys.readouterr().out))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Removed")[0]
    for text in (README, METHOD_PAGE, BENCHMARKS, CHOICES, changes):
        named = set(re.findall(r"(--[a-z_]+(?:\.[a-z_]+)*)", text)) - OTHERS
        assert not named - known, named - known


def rows(text, first):
    """The cells of the table whose first header cell is ``first``, by the first cell of a row."""
    (lines,) = re.findall(rf"^\| {re.escape(first)} \|.*\n\|[-:|]+\|\n((?:\|.*\n)+)", text, re.M)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_table_of_methods_is_that_of_the_code():
    table = rows(METHOD_PAGE, "name")
    ablations = set(ablation_names(METHODS))
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


def test_who_is_ahead_on_clean_input_is_told_as_the_picture_shows_it():
    """Of the methods that every setting has, and of all of them, as both pages say."""
    results = by_method(read_table(ROOT / "benchmarks" / "results" / "comparison.csv"))
    parts = ablation_names({name for methods in results.values() for name in methods})
    whole = {
        name: {method: entry for method, entry in entries.items() if method not in parts}
        for name, entries in results.items()
    }
    every = ranks(whole)
    shown = places({"results": results, "ranks": every}, "clean", "accuracy")
    means = shown.mean()
    assert len(shown) == 7 and list(means.index[:2]) == ["ensemble", "iibalance"]
    pair = rf"\({means['ensemble']:.1f}\sagainst\s{means['iibalance']:.1f}\)"
    among = rf"the\s{len(means)}\smethods\sthat\sall\ssettings\shave"
    for text, first in (
        (README, r"encoders\strained\salone\sand\ssummed\sare"),
        (BENCHMARKS, "`ensemble`\\sis"),
    ):
        assert re.search(
            rf"no\slead\sin\saccuracy:.*{among},\s{first}\sahead\s{pair}", text, re.S | re.I
        )
    rank = {name: row["rank"] for name, row in every["clean"]["accuracy"].items()}
    other = f"`iibalance` is ({rank['iibalance']:.1f} against {rank['ensemble']:.1f})"
    assert other in " ".join(BENCHMARKS.split())
    assert f"{len(rank)} methods tuned alike" in README
    fewer = [name for name in rank if name not in means]
    assert len(fewer) == 3 and {every["clean"]["accuracy"][name]["sets"] for name in fewer} == {5}


def test_every_effect_that_the_readme_names_is_one_of_the_benchmarks():
    named = re.findall(r"[-+]\d+\.\d\s\+-\s\d+\.\d", README)
    assert len(named) == 5
    assert not [effect for effect in named if " ".join(effect.split()) not in BENCHMARKS]
    ranks = rows(BENCHMARKS, "average rank, accuracy / NLL")["iibalance"][1:]
    assert all(cell.split(" / ")[1].startswith("**") for cell in ranks)  # "best ... in NLL"


def test_the_picture_is_of_the_published_table_and_the_text_under_it_true():
    with Image.open(noise_picture.PICTURE) as image:
        assert image.text["Description"] == noise_picture.digest()
    found = noise_picture.rows()
    lost = [row.clean[0] - row.noise[0] for row in found.values()]
    first, last = re.search(r"the last three (\d+) to (\d+) points", README).groups()
    assert [round(min(lost[2:])), round(max(lost[2:]))] == [int(first), int(last)]
    assert f"and iibalance {lost[0]:.0f}" in README
    means = rows(BENCHMARKS, "mean over the settings")
    for method in ("iibalance", "ensemble_gated", "ensemble"):
        clean, _, noise, _ = (cell.split(" / ")[0] for cell in means[method])
        assert [f"{found[method].clean[0]:.1f}", f"{found[method].noise[0]:.1f}"] == [clean, noise]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == iibalance.__version__
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert "2603.17347" in citation["references"][0]["identifiers"][0]["value"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{iibalance.__version__}]" in changes
