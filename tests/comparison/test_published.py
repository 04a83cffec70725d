"""The tables of benchmarks/README.md are held to the published comparison, by value."""

import re
from pathlib import Path

import pytest

from benchmarks.tables import means, tables
from iibalance.comparison.results import METRICS, by_method, read_table
from iibalance.comparison.statistics import heads_over_alone
from iibalance.metrics import mean_and_stderr

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"[+-]?\d*\.\d+")  # .212 is a number too


def parsed(lines: list[str]) -> dict[str, list[tuple[str, list[float]]]]:
    """Row label -> its cells, each as its words and its numbers."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return {
        row[0]: [
            (NUMBER.sub("", cell), [float(number) for number in NUMBER.findall(cell)])
            for cell in row[1:]
        ]
        for row in rows
    }


def on_the_page(first_cell: str) -> list[str]:
    """The lines of the page's table whose header begins with ``first_cell``."""
    lines = PAGE.splitlines()
    (start,) = [n for n, line in enumerate(lines) if line.startswith(f"| {first_cell} |")]
    end = next(n for n, line in enumerate([*lines, ""]) if n > start and not line.startswith("|"))
    return lines[start:end]


def rows_of(page: str, heading: str, columns: str) -> dict[str, list[str]]:
    """First cell -> the other cells of a table in a section of a published page."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = section[section.index(columns) :].split("\n\n")[0].splitlines()[2:]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: row[1:] for row in cells}


def same(shown: str, exact: float) -> bool:
    """Whether a printed number is ``exact``, to its last digit."""
    return float(shown) == pytest.approx(exact, abs=0.501 * 10 ** -len(shown.split(".")[1]))


FOUND = tables(str(RESULTS / "comparison.csv"))
NAMES = ["ranks", "means", "clean", "ablations", "heads", "without the warm start"]


@pytest.mark.parametrize("lines", FOUND, ids=NAMES)
def test_the_page_says_what_the_table_holds(lines):
    first_cell = lines[0].strip("| ").split(" |")[0]
    expected, found = parsed(lines), parsed(on_the_page(first_cell))
    del expected["---"]
    found = {label: cells for label, cells in found.items() if set(label) != {"-"}}
    assert found.keys() == expected.keys()
    for label, cells in expected.items():
        assert found[label] == cells, label


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_a_published_page_and_its_table_agree(path):
    """Clean accuracy and NLL of every method and set, as the run's own page prints them."""
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    checked = 0
    for data, methods in by_method(read_table(path)).items():
        section = page.split(f"\n## {data}\n")[1].split("\n## ")[0]
        for method, entry in methods.items():
            row = re.search(rf"^\| {method} \| (.*) \|$", section, re.M)[1].split(" | ")
            for cell, metric, scale in zip(row, METRICS, (100, 100, 1, 1)):
                spread = entry["conditions"]["clean"][metric]
                shown = [float(number) for number in NUMBER.findall(cell)]
                exact = [scale * spread["mean"], scale * spread["error"]][: len(shown)]
                digits = len(NUMBER.findall(cell)[0].split(".")[1])
                assert shown == pytest.approx(exact, abs=0.501 * 10**-digits), (data, method)
                checked += 1
    assert checked >= 4 * 2


PUBLISHED = (RESULTS / "comparison.md").read_text(encoding="utf-8")


def test_the_differences_to_the_best_other_are_those_of_the_published_page():
    heading = "iibalance against the best other method"
    section = PUBLISHED.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if "[" in line]
    assert len(lines) == 28
    expected = {}
    for data, _, other, accuracy, p, other_nll, nll, p_nll in lines:
        triples = ((accuracy, p, other), (nll, p_nll, other_nll))
        texts = [
            f"{difference.split()[0]}{'*' if float(chance) < 0.05 else ''} ({against})"
            for difference, chance, against in triples
        ]
        expected.setdefault(data, []).append("; ".join(texts))
    rows = [
        line.strip("| ").split(" | ")
        for line in on_the_page("against the best other: accuracy; NLL")
    ]
    assert {row[0]: row[1:] for row in rows[2:]} == expected


def test_the_milliseconds_of_a_step_are_those_of_the_published_page():
    header, _, *lines = (line.strip("| ").split(" | ") for line in on_the_page("step, ms"))
    sections = {name: rows_of(PUBLISHED, name, "| method | accuracy") for name in header[1:]}
    timed = [row for row in lines if "medians" not in row[0]]
    assert len(timed) == 4 and len(sections) == 7
    for method, *cells in timed:
        assert cells == [rows[method.strip("`")][-1] for rows in sections.values()]


def test_the_control_with_twice_the_epochs_is_that_of_its_table():
    results = by_method(read_table(RESULTS / "comparison_doubled.csv"))
    rows = [line.strip("| ").split(" | ") for line in on_the_page("epochs of the rivals")]
    doubled = {row[0].split("`")[1]: row[1:] for row in rows if row[0].endswith("twice")}
    assert set(doubled) == {"ensemble", "ensemble_gated", "qmf"}
    for method, cells in doubled.items():
        accuracy, nll = (means(results, method, metric) for metric in ("accuracy", "nll"))
        for kind, cell in zip(("clean", "missing", "noise"), cells, strict=True):
            first, second = cell.split(" / ")
            assert same(first, 100 * accuracy[kind]) and same(second, nll[kind]), (method, kind)


@pytest.mark.parametrize(
    ("label", "name", "alone"),
    [
        ("tuned by themselves", "comparison", "unimodal"),
        ("with the very settings", "comparison_heads", "alone_as_iibalance"),
        ("nothing tuned", "heads_at_defaults", "unimodal"),
    ],
)
def test_the_controls_of_the_heads_are_those_of_their_tables(label, name, alone):
    results = by_method(read_table(RESULTS / f"{name}.csv"))
    found = heads_over_alone(results, "iibalance", [alone])
    heads = [row[alone] for modalities in found.values() for row in modalities.values()]
    assert len(heads) == 19
    lines = on_the_page("encoders alone")
    (line,) = (line for line in lines if line.startswith(f"| {label}"))
    difference, level, below = line.strip("| ").split(" | ")[1:]
    mean, error = mean_and_stderr([100 * head["mean"] for head in heads])
    shown = NUMBER.findall(difference)
    assert same(shown[0], mean) and same(shown[1], error)
    assert int(level) == sum(head["mean"] >= 0 for head in heads)
    far = [head for head in heads if head["mean"] < -2 * head["error"]]
    assert int(below.split()[0]) == len(far)
    if far:  # it is named, with its figures
        numbers = NUMBER.findall(below)
        assert same(numbers[0], 100 * far[0]["mean"]) and same(numbers[1], 100 * far[0]["error"])


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_the_tables_of_every_published_run_can_be_made(path):
    """One has a method that is no longer part of the package, and one has no focus of ours."""
    first, *others = tables(str(path))
    methods = {method for entries in by_method(read_table(path)).values() for method in entries}
    assert {row.split("`")[1] for row in first[2:]} <= methods and others
