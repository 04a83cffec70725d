"""Saved measurements as a Markdown table and a picture.

``python -m benchmarks.report SAVED.json [...] --output DIR`` reads what ``pytest benchmarks/
--benchmark-only --benchmark-json SAVED.json`` and ``python -m benchmarks.on_gpu`` wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

# What the report tells of the machine, where it is known.
FACTS = ("device", "capability", "driver", "torch", "triton", "python", "date", "commit")
HEADER = (
    "| shape | dtype | implementation "
    "| time | graph | against eager | peak memory | GB/s | share |",
    "|---|---|---|---:|---:|---:|---:|---:|---:|",
)


def read(path: Path) -> tuple[dict, list[dict]]:
    """(machine, measurements) of one file; SystemExit, one line, for one that is not ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SystemExit(f"{path}: is not JSON ({error})") from None
    content = content if isinstance(content, dict) else {}
    if "machine_info" in content and isinstance(content.get("benchmarks"), list):
        rows = [
            {"seconds": entry["stats"]["median"], **entry["extra_info"]}
            for entry in content["benchmarks"]
        ]
        return content["machine_info"], rows
    if "environment" in content and isinstance(content.get("measurements"), list):
        return content["environment"], content["measurements"]
    raise SystemExit(
        f"{path}: holds neither pytest-benchmark's results nor those of benchmarks.on_gpu"
    )


def duration(seconds: float | None) -> str:
    """Seconds in a unit that can be read.

    >>> duration(0.00123), duration(4.2e-6), duration(2.5), duration(None)
    ('1.23 ms', '4.20 us', '2.50 s', '')
    """
    if seconds is None:
        return ""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.2f} {unit}"
    return ""


def table(environment: dict, rows: Sequence[dict]) -> str:
    """One Markdown table for each operator and mode, with the machine above all."""
    facts = [f"{name} {environment[name]}" for name in FACTS if environment.get(name)]
    lines = ["# Benchmarks", "", ", ".join(facts) + ".", ""]
    if environment.get("dry_run"):
        lines += [
            "**A dry run on a CPU with tiny shapes: it shows that the program works, "
            "and nothing about speed.**",
            "",
        ]
    lines += [
        "Medians. `graph` is the time of one call among several captured in a CUDA graph, without",
        "launch gaps; GB/s are the least bytes of the operation over that time; share is of a",
        "copy's bandwidth measured in the same run.",
        "",
    ]
    for op, mode in dict.fromkeys((row["op"], row["mode"]) for row in rows):
        chosen = [row for row in rows if (row["op"], row["mode"]) == (op, mode)]
        lines += [f"## {op}, {mode}", "", *HEADER]
        place = lambda row: (row["shape"], row.get("dtype"))
        eager_rows = {
            place(row): row
            for row in reversed(chosen)  # the first of several files counts
            if row["row"] == "reference" and row.get("seconds")
        }
        lines += [_line(row, eager_rows.get(place(row))) for row in chosen]
        lines.append("")
    return "\n".join(lines)


def _line(row: dict, eager: dict | None) -> str:
    """One measurement, or what went wrong with it; ``eager`` is the reference's at its shape."""
    about = f"| {row['shape']} | {row.get('dtype', '')} | {row['row']} |"
    if not row.get("seconds"):
        return f"{about} {row.get('error', 'not measured')[:80]} | | | | | |"
    cells = (
        duration(row["seconds"]),
        duration(row.get("graph_seconds")),
        f"{eager['seconds'] / row['seconds']:.2f} x" if eager else "",
        f"{row['peak_bytes'] / 2**20:.1f} MiB" if "peak_bytes" in row else "",
        f"{row['gigabytes_per_second']:.0f}" if "gigabytes_per_second" in row else "",
        f"{100 * row['share_of_copy']:.0f} %" if "share_of_copy" in row else "",
    )
    return f"{about} {' | '.join(cells)} |"


def picture(rows: Sequence[dict], path: Path, title: str) -> bool:
    """Time (upper) and peak memory (lower) by shape, one column an operator and mode.

    False where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.get("seconds")]
    groups = list(dict.fromkeys((row["op"], row["mode"]) for row in rows))
    figure, axes = pyplot.subplots(
        2, max(1, len(groups)), figsize=(max(6, 3.2 * len(groups)), 7.5), squeeze=False
    )
    names = list(dict.fromkeys((row["row"], row.get("dtype", "")) for row in rows))
    for column, (op, mode) in enumerate(groups):
        chosen = [row for row in rows if (row["op"], row["mode"]) == (op, mode)]
        shapes = list(dict.fromkeys(row["shape"] for row in chosen))
        for line, key, scale in ((0, "seconds", 1e3), (1, "peak_bytes", 2**-20)):
            for index, name in enumerate(names):
                points = [
                    (shapes.index(row["shape"]), row[key] * scale)
                    for row in chosen
                    if (row["row"], row.get("dtype", "")) == name and row.get(key)
                ]
                if points:
                    axes[line][column].plot(
                        *zip(*points),
                        marker="o",
                        color=f"C{index}",
                        label=" ".join(filter(None, name)),
                    )
            axes[line][column].set_xticks(
                range(len(shapes)), shapes, rotation=30, ha="right", fontsize=6
            )
            if axes[line][column].lines:
                axes[line][column].set_yscale("log")
        axes[0][column].set_title(f"{op}\n{mode}", fontsize=8)
    axes[0][0].set_ylabel("time, ms")
    axes[1][0].set_ylabel("peak memory, MiB")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=max(1, len(labels)), fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def write(output: Path, environment: dict, rows: Sequence[dict], extra: str = "") -> list[Path]:
    """``benchmarks.md`` and ``benchmarks.png`` in ``output``; the paths written."""
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "benchmarks.md"]
    note = ""
    device, version, date = (environment.get(name, "") for name in ("device", "torch", "date"))
    title = f"{device}, torch {version}, {date}"
    if environment.get("dry_run"):
        title += " (dry run: not a measurement)"
    if picture(rows, output / "benchmarks.png", title):
        written.append(output / "benchmarks.png")
        note = "\n![time and peak memory by shape](benchmarks.png)\n"
    else:
        note = (
            "\nNo picture: matplotlib is not installed here; "
            "`python -m benchmarks.report` makes it from the JSON file elsewhere.\n"
        )
    written[0].write_text(table(environment, rows) + extra + note, encoding="utf-8")
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "saved", nargs="+", type=Path, help="JSON files of pytest-benchmark or benchmarks.on_gpu"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for benchmarks.md and benchmarks.png"
    )
    options = parser.parse_args(arguments)
    read_files = [read(path) for path in options.saved]
    devices = {environment.get("device") for environment, _ in read_files}
    if len(devices) > 1:
        raise SystemExit(
            f"the files are from different machines ({', '.join(map(str, devices))}); "
            "make one report for each"
        )
    for path in write(
        options.output, read_files[0][0], [row for _, rows in read_files for row in rows]
    ):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
