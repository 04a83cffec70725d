"""Saved measurements as a Markdown table and a picture.

``python -m benchmarks.report SAVED [...] --output DIR`` reads what ``pytest benchmarks/
--benchmark-only --benchmark-json SAVED.json`` and ``python -m benchmarks.on_gpu`` (results.csv)
wrote. The CSVs of several sessions become one, ``results.csv`` in DIR.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import gpu_session
from benchmarks.picture import duration, picture

# What the report tells of the machine, where it is known.
FACTS = ("device", "capability", "driver", "torch", "triton", "cuda", "date", "commit", "sources")
HEADER = (
    "| shape | precision | implementation | time | p20 to p80 | host | eager / this "
    "| compiled / this | peak memory | GB/s | of a copy | TFLOP/s | of a product |",
    "|---|---|---|" + "---:|" * 10,
)


def read(path: Path) -> list[dict]:
    """Measurements of one file; SystemExit, one line, for one that is not ours."""
    try:
        if path.suffix == ".csv":
            return gpu_session.read(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SystemExit(f"{path}: is not JSON ({error})") from None
    except ValueError as error:
        raise SystemExit(str(error)) from None
    content = content if isinstance(content, dict) else {}
    if "machine_info" in content and isinstance(content.get("benchmarks"), list):
        machine = {name: content["machine_info"].get(name) for name in FACTS}
        return [
            {"p50": entry["stats"]["median"], **_quartiles(entry), **machine, **entry["extra_info"]}
            for entry in content["benchmarks"]
        ]
    raise SystemExit(
        f"{path}: holds neither pytest-benchmark's results nor those of benchmarks.on_gpu"
    )


def _quartiles(entry: dict) -> dict:
    """What the picture shows of the spread, where it was saved."""
    return {name: entry["stats"][name] for name in ("q1", "q3") if name in entry["stats"]}


def machines(rows: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Rows by device and code: times of two of them are not set beside each other."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row.get("device"), row.get("sources")), []).append(row)
    return found


def table(rows: Sequence[dict]) -> str:
    """One Markdown table for each machine, operator and mode."""
    lines = ["# Benchmarks", ""]
    for chosen in machines(rows).values():
        facts = [f"{name} {chosen[0][name]}" for name in FACTS if chosen[0].get(name)]
        lines += [", ".join(facts) + ".", ""]
        if chosen[0].get("dry_run"):
            lines += [
                "**A dry run on a CPU with tiny shapes: it shows that the program works, "
                "and nothing about speed.**",
                "",
            ]
        timers = dict.fromkeys(row["timer"] for row in chosen if row.get("timer"))
        lines += [
            f"Time is the median of one call ({'; '.join(timers)}), `host` the time until the host",
            "is free again. GB/s are the operation's least bytes over the time, TFLOP/s its least",
            "products; shares are of a copy of as many bytes and of a large product, measured in",
            "the same run and in the same way.",
            "",
        ]
        for op, mode in dict.fromkeys((row["op"], row["mode"]) for row in chosen):
            lines += [f"## {op}, {mode}", "", *HEADER]
            lines += _lines([row for row in chosen if (row["op"], row["mode"]) == (op, mode)])
            lines.append("")
    return "\n".join(lines)


def _lines(rows: Sequence[dict]) -> list[str]:
    """The rows of one table."""
    times = {
        (row["shape"], row.get("precision"), row["row"]): row["p50"]
        for row in reversed(rows)  # the first of several files counts
        if row.get("p50")
    }
    return [_line(row, times) for row in rows]


def _line(row: dict, times: dict) -> str:
    """One measurement, or what went wrong with it."""
    about = f"| {row['shape']} | {row.get('precision', '')} | {row['row']} |"
    if not row.get("p50"):
        return f"{about} {(row.get('error') or 'not measured')[:80]} |" + " |" * 9

    def against(other: str) -> str:
        seconds = times.get((row["shape"], row.get("precision"), other))
        return f"{seconds / row['p50']:.2f} x" if seconds else ""

    def number(name: str, factor: float, form: str) -> str:
        return "" if row.get(name) is None else form.format(factor * row[name])

    spread = f"{duration(row['p20'])} to {duration(row['p80'])}" if row.get("p20") else ""
    cells = (
        duration(row["p50"]),
        spread,
        duration(row.get("host_seconds")),
        against("reference"),
        against("compiled"),
        number("peak_bytes", 2**-20, "{:.1f} MiB"),
        number("gigabytes_per_second", 1, "{:.0f}"),
        number("share_of_copy", 100, "{:.0f} %"),
        number("teraflops", 1, "{:.1f}"),
        number("share_of_products", 100, "{:.0f} %"),
    )
    return f"{about} {' | '.join(cells)} |"


def write(output: Path, machine: dict, rows: Sequence[dict], extra: str = "") -> list[Path]:
    """``benchmarks.md`` and ``benchmarks.png`` in ``output``; the paths written.

    The picture is of ``machine`` alone.
    """
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "benchmarks.md"]
    device, version, date = (machine.get(name) or "" for name in ("device", "torch", "date"))
    title = f"{device}, torch {version}, {date[:10]}"
    if machine.get("dry_run"):
        title = f"DRY RUN, NOT A MEASUREMENT ({title})"
    drawn = machines(rows).get((machine.get("device"), machine.get("sources")), [])
    if picture(drawn, output / "benchmarks.png", title):
        written.append(output / "benchmarks.png")
        note = "\n![time by operator, mode, shape and precision](benchmarks.png)\n"
    else:
        note = (
            "\nNo picture: matplotlib is not installed here, or there is nothing to draw; "
            "`python -m benchmarks.report` makes it from results.csv elsewhere.\n"
        )
    gpu_session.write(written[0], table(rows) + extra + note)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "saved",
        nargs="+",
        type=Path,
        help="JSON of pytest-benchmark, or results.csv of benchmarks.on_gpu, the newest first",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for benchmarks.md and benchmarks.png"
    )
    options = parser.parse_args(arguments)
    files = [read(path) for path in options.saved]
    rows = [row for found in files for row in found]
    if not rows:
        raise SystemExit(f"{options.saved[0]}: holds no measurements")
    if len({bool(row.get("dry_run")) for row in rows}) > 1:
        raise SystemExit("some of the files are of a dry run, and others of a measurement")
    if all(path.suffix == ".csv" for path in options.saved):
        options.output.mkdir(parents=True, exist_ok=True)
        rows = gpu_session.merged(rows)
        gpu_session.write(options.output / "results.csv", gpu_session.text(rows))
        print(options.output / "results.csv")
    for path in write(options.output, rows[0], rows):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
