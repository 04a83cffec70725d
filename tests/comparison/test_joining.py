"""``compare --join``: the tables of several comparisons on one page."""

import re
from pathlib import Path

import pandas as pd
import pytest
from test_blocks import METHODS, drawn, table_of

from iibalance import InputError
from iibalance.cli import run as cli
from iibalance.comparison.joining import join, over_all
from iibalance.comparison.protocol import compare
from iibalance.comparison.results import by_method, read_table, training_seconds, write_table
from iibalance.comparison.split_tables import split_sections
from iibalance.config import CompareConfig

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "results"


def measured(sets=3, splits=4):
    """A tidy table of several conditions, with heads and seconds."""
    tables = []
    for number, condition in enumerate(("clean", "noise", "noise6", "gain", "mild")):
        table = table_of(drawn(sets, splits, seed=number), condition)
        if condition == "clean":
            table["train_seconds"] = [float(10 + row) for row in range(len(table))]
            own = table.assign(modality="audio", accuracy=table["accuracy"] - 0.1)
            own[["macro_f1", "nll", "ece", "train_seconds"]] = float("nan")
            tables.append(own)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


@pytest.fixture
def parts(tmp_path):
    """The table of three sets, in two files, and as one."""
    whole = measured()
    (tmp_path / "parts").mkdir()
    here = whole["data"] == "set1"
    write_table(tmp_path / "parts" / "b.csv", whole[here], splits=True)
    write_table(tmp_path / "parts" / "a.csv", whole[~here], splits=True)
    return tmp_path / "parts", whole


def options(parts, **more):
    given = dict(join=str(parts / "*.csv"), output=str(parts.parent / "out"), bootstrap=300)
    return CompareConfig(**{**given, **more})


def test_two_parts_say_what_one_run_says(parts):
    folder, whole = parts
    found = join(options(folder))
    results = by_method(whole)
    one = over_all({"results": results, "focus": "iibalance"}, options(folder), list(METHODS))
    assert found["ranks"] == one["ranks"] and found["tests"] == one["tests"]
    assert found["estimates"] == one["estimates"] and found["utilisation"] == one["utilisation"]
    assert found["tests"]["clean"]["nll"]["blocks"] == 12
    assert found["train_seconds"] == training_seconds(whole)
    page = (folder.parent / "out" / "comparison.md").read_text()
    lines = set(page.splitlines())
    for section in split_sections({**one, "splits": 4, "focus": "iibalance"}):
        assert set(section) <= lines  # sets come in the order of the parts
    assert "Joined from 2 tables" in page and "Paired bootstrap" not in page
    key = ["data", "method", "seed", "condition", "modality"]
    table = read_table(folder.parent / "out" / "comparison.csv")
    assert table.attrs["splits"]
    pd.testing.assert_frame_equal(
        table.set_index(key).sort_index(), whole.set_index(key).sort_index(), check_like=True
    )
    assert (folder.parent / "out" / "comparison.png").stat().st_size > 10_000


def test_each_sets_section_has_its_seconds_and_figures(parts):
    folder, whole = parts
    join(options(folder))
    page = (folder.parent / "out" / "comparison.md").read_text()
    section = page.split("\n## set1\n")[1].split("\n## ")[0]
    cells = re.search(r"^\| concat \| (.*) \|$", section, re.M)[1].split(" | ")
    header = re.search(r"^\| method \| (.*) \|$", section, re.M)[1].split(" | ")
    clean = whole.query("data == 'set1' and method == 'concat' and condition == 'clean'")
    fused = clean[clean["modality"] == ""]
    row = dict(zip(header, cells))
    assert row["training, s"] == f"{fused['train_seconds'].mean():.1f}"
    assert row["accuracy"].startswith(f"{100 * fused['accuracy'].mean():.1f} +- ")


@pytest.mark.usefixtures("no_pictures")
def test_joining_again_does_not_take_its_own_table_for_a_part(parts):
    folder, _ = parts
    first = join(options(folder, output=str(folder)))  # beside the parts
    again = join(options(folder, output=str(folder)))
    assert len(first["parts"]) == len(again["parts"]) == 2 and first["ranks"] == again["ranks"]


def test_a_list_of_files_and_the_regions(parts):
    folder, whole = parts
    files = [str(folder / "b.csv")]
    wide, narrow = (
        join(options(folder, join=files, focus="concat", region_accuracy=points))["estimates"]
        for points in (100.0, 0.0)
    )
    assert set(wide["clean"]) == set(METHODS) - {"concat"}
    assert wide["clean"]["sum"]["accuracy"]["equal"] == 1.0
    assert narrow["clean"]["sum"]["accuracy"]["equal"] == 0.0
    assert wide["clean"]["sum"]["accuracy"]["sets"] == 1


@pytest.mark.slow
def test_published_tables_of_seeds_can_be_joined(tmp_path):
    """They are of an earlier version: no seconds, one condition a modality, seeds of one split."""
    found = join(
        CompareConfig(
            join=str(PUBLISHED / "comparison.csv"), output=str(tmp_path), focus="iibalance"
        )
    )
    assert found["tests"]["clean"]["nll"]["blocks"] == 7 * 5
    assert found["train_seconds"] == {} and "unseen" not in found["ranks"]
    assert (tmp_path / "comparison.csv").read_text().startswith("data,method,seed,condition")


# What is refused


def refused(arguments, capsys):
    assert cli(["compare", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_command_joins_and_prints_the_ranks(parts, capsys):
    folder, _ = parts
    out = folder.parent / "printed"
    assert cli(["compare", "--join", str(folder / "*.csv"), "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert (
        "average rank, clean" in text and "iibalance" in text and (out / "comparison.md").exists()
    )


def test_wrong_parts_get_one_line_and_nothing_is_written(parts, tmp_path, capsys):
    folder, whole = parts
    out = str(tmp_path / "refused")
    line = refused(["--join", str(folder / "no*.csv"), "--output", out], capsys)
    assert "join: there is no file" in line and "no*.csv" in line
    for text, reason in (
        ("a,b\n1,2\n", "it lacks the columns data, method, seed"),
        ("", "is no table of a comparison"),
        ('a,"b\n', "is no table of a comparison"),
        ("data,method,seed,condition,modality,accuracy,macro_f1,nll,ece\n", "holds no row"),
        (
            "data,method,seed,condition,modality,accuracy,macro_f1,nll,ece\n"
            "a,sum,0,clean,,high,1,1,1\n",
            "accuracy holds no numbers",
        ),
    ):
        (tmp_path / "bad.csv").write_text(text)
        line = refused(["--join", str(tmp_path / "bad.csv"), "--output", out], capsys)
        assert reason in line and "bad.csv" in line
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00\x01" * 20)
    line = refused(["--join", str(tmp_path / "bad.csv"), "--output", out], capsys)
    assert "is no table of a comparison" in line
    write_table(folder / "c.csv", whole[whole["data"] == "set0"], splits=True)
    line = refused(["--join", str(folder / "*.csv"), "--output", out], capsys)
    assert re.search(r"c\.csv holds \w+ on set0, split 0, as .*a\.csv does; leave one out", line)
    assert not Path(out).exists()


def test_a_focus_that_no_part_has_is_refused(parts):
    with pytest.raises(InputError, match="^focus: qmf is not compared; give --focus NAME, one of"):
        compare(options(parts[0], focus="qmf"))


def test_a_comparisons_own_table_is_not_replaced(parts):
    folder, _ = parts
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "compare.yaml").write_text("splits: true\n")
    with pytest.raises(InputError, match="^output: .* holds a comparison of its own"):
        join(options(folder))
