"""The pieces that tables of figures are made of: lines of Markdown, ranks, spreads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

PAIR = ("accuracy", "nll")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def by_rank(ranks: Mapping) -> list[str]:
    """The methods, the best over all kinds and both metrics first; those that lack one last."""
    rows = [by_metric[metric] for by_metric in ranks.values() for metric in PAIR]
    methods = dict.fromkeys(method for row in rows for method in row)
    worst = {"rank": 99}
    return sorted(methods, key=lambda method: sum(row.get(method, worst)["rank"] for row in rows))


def rank_text(rows: Mapping, method: str, digits: int) -> str:
    """A method's average rank: the best of ``rows`` in bold, - where there is none."""
    if method not in rows:
        return "-"
    text = f"{rows[method]['rank']:.{digits}f}"
    best = min(row["rank"] for row in rows.values())
    return f"**{text}**" if rows[method]["rank"] == best else text


def spread_text(
    spread: Mapping | None, scale: float, digits: int = 1, *, sign: str = "", error: bool = True
) -> str:
    """``scale`` times a mean and its standard error; - where there is none."""
    if spread is None:
        return "-"
    text = f"{scale * spread['mean']:{sign}.{digits}f}"
    if not error or spread["error"] is None:
        return text
    return f"{text} +- {scale * spread['error']:.{digits}f}"


def pair_text(row: Mapping | None, digits: int = 3, *, sign: str = "", error: bool = True) -> str:
    """Accuracy in percent (or points) / NLL in nats, as spreads."""
    if row is None:
        return "-"
    accuracy, nll = (row.get(metric) for metric in PAIR)
    nll = spread_text(nll, 1, digits, sign=sign, error=error)
    return f"{spread_text(accuracy, 100, sign=sign)} / {nll}"
