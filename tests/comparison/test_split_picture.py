"""The picture over data sets and splits: a block a dot, six groups of conditions, legible."""

import pandas as pd
import pytest
from test_blocks import METHODS, drawn, table_of
from test_picture import assert_legible, is_bar, panels

from iibalance.comparison.blocks import critical_difference, friedman
from iibalance.comparison.joining import over_all
from iibalance.comparison.picture import picture, redraw
from iibalance.comparison.results import GROUPS, by_method, write_table
from iibalance.config import CompareConfig

CONDITIONS = ("clean", "missing", "noise", "gain", "mild", "low data")


def measured(sets=3, splits=4, conditions=CONDITIONS):
    tables = [table_of(drawn(sets, splits, seed), name) for seed, name in enumerate(conditions)]
    return pd.concat(tables, ignore_index=True)


def of(table):
    results = by_method(table)
    result = {"focus": "iibalance", "seeds": 4, "splits": 4, "results": results}
    return result | over_all(result, CompareConfig(bootstrap=10), list(METHODS))


def test_every_group_and_metric_has_its_panel_with_the_ranks_that_were_tested():
    result = of(measured())
    figure = picture(result)
    assert_legible(figure)
    found = panels(figure)
    assert len(found) == 12 and len(figure.axes) == 12
    for (kind, metric), axes in found.items():
        test = friedman(result["results"], kind, metric)
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == list(test["ranks"])
        assert [text.get_text() for text in axes.texts] == [
            f"{rank:.1f}" for rank in test["ranks"].values()
        ]
        bars = [line for line in axes.lines if is_bar(line)]
        joined = {tuple(round(value) for value in line.get_ydata()) for line in bars}
        means, distance = list(test["ranks"].values()), critical_difference(5, 12)
        for first, last in joined:
            assert means[last] - means[first] <= distance
        assert bool(joined) == any(b - a <= distance for a, b in zip(means, means[1:]))
    # Accuracy above, NLL below, each in the order of the groups.
    order = [axes.get_title(loc="left").split(": ")[0] for axes in figure.axes[:6]]
    assert order == list(GROUPS)
    assert "12 blocks" in figure.get_suptitle() and "3 data sets" in figure.get_suptitle()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_fewer_groups_leave_no_empty_frame(count):
    figure = picture(of(measured(conditions=CONDITIONS[:count])))
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == 2 * count
    assert {axes.get_title(loc="left").split(": ")[1] for axes in shown} == {"accuracy", "NLL"}
    assert_legible(figure)


def test_one_set_is_ranked_split_by_split_and_one_split_is_drawn_too():
    figure = picture(of(measured(sets=1)))
    assert "4 blocks" in figure.get_suptitle() and "the splits of set0" in figure.get_suptitle()
    assert_legible(picture(of(measured(sets=1, splits=1))))


def test_who_lacks_a_set_is_named():
    table = measured()
    table = table[~((table["method"] == "sum") & (table["data"] == "set1"))]
    heading = " ".join(picture(of(table)).get_suptitle().split())
    assert heading.endswith("Left out, as not every data set has them: sum")


def test_it_is_drawn_again_from_the_table(tmp_path):
    write_table(tmp_path / "comparison.csv", measured(), splits=True)
    assert redraw(tmp_path / "comparison.csv").stat().st_size > 10_000
