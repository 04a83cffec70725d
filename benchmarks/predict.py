"""How long each operator should take on an H100 and on an H200, from its counts. Nothing is timed.

    python -m benchmarks.predict

It prints the table of results/predicted.md and writes it there, without a GPU. Of each launch
(benchmarks/counts.py) the slowest of three counts, and one cost for the launch itself:

    max(bytes that memory must move / bandwidth,
        bytes that programs ask for / rate of the second-level cache,
        operations of the products / rate of their type) + LAUNCH

A launch of fewer programs than there are multiprocessors has as much less of the cache's and the
products' rates. Nothing else is in it: neither the latency of what a program does one after the
other, nor any arithmetic but products, nor launches that overlap. So it is what to compare a
measurement with, and in most cases a bound from below.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from benchmarks import counts
from benchmarks.cases import OPS, at
from benchmarks.shapes import PRECISIONS, SHAPES, Precision, Shape, conditions, in_mode

OUTPUT = Path(__file__).parent / "results" / "predicted.md"

# The design's figures for an H100 SXM (shared/design/speed.md), each of what can be had, not of the
# data sheet; none was measured here. The H200 is the same chip with other memory: 4.8 TB/s on its
# data sheet, of which the same share as of the H100's 3.35 is taken to be had.
BANDWIDTH = {"H100": 3.0e12, "H200": 4.8e12 * 3.0 / 3.35}  # bytes a second
CACHE = 5.5e12  # bytes a second out of the second-level cache
RATES = {"bf16": 800e12, "tf32": 400e12, "fp32": 50e12}  # operations a second of products
LAUNCH = 2e-6  # seconds of a launch in a CUDA graph: assumed, a round figure without a source

PREDICTED = ("fp32", "bf16")
MODES = {
    "gated_fusion": ("forward", "backward"),
    "fusion_cross_entropy": ("forward", "backward", "step"),
    "alignment_loss": ("forward", "backward", "step"),
    "multimodal_objective": ("step",),
    "nearest_prototype": ("forward",),
    "prototype_distance": ("forward", "backward"),
    "update_prototypes_": ("forward",),
}
HEADER = (
    "shape", "operator", "mode", "dtype", "launches", "bytes, MB", "/ least", "memory / least",
    "products, GFLOP", "/ least", "H100, us", "H200, us", "measured, us",
)  # fmt: skip
INTRODUCTION = """\
# Predicted times

**None of these times was measured.** `python -m benchmarks.predict` makes this page out of counts,
by the formula and the constants in [predict.py](../predict.py);
[benchmarks](../README.md#predicted-times) says what they leave out. The column for measured times
waits for a GPU.
"""


class Row(NamedTuple):
    """One operator, mode, shape and precision."""

    shape: Shape
    op: str
    mode: str
    precision: str
    launches: list[counts.Launch]
    least_bytes: float
    least_products: float  #: multiplications

    @property
    def counts(self) -> list[counts.Counts]:
        """Of each launch."""
        return [counts.counts(launch) for launch in self.launches]

    @property
    def bytes(self) -> float:
        """What programs ask for; of prototypes and other shared arguments once a launch."""
        return sum(found.moved for found in self.counts)

    @property
    def memory(self) -> float:
        """What memory must move: all that a launch touches, once a launch."""
        return sum(found.memory for found in self.counts)

    @property
    def products(self) -> float:
        """Multiplications, those of padding included."""
        return sum(found.products + found.slopes for found in self.counts)

    def seconds(self, device: str) -> float:
        """The prediction."""
        return sum(
            seconds(launch, PRECISIONS[self.precision], BANDWIDTH[device])
            for launch in self.launches
        )


def seconds(launch: counts.Launch, precision: Precision, bandwidth: float) -> float:
    """Of one launch, by the formula at the head of this file."""
    found = counts.counts(launch)
    busy = min(1.0, launch.programs / counts.PROCESSORS)
    slopes = "tf32" if precision.rate == "bf16" else precision.rate
    products = 2 * (found.products / RATES[precision.rate] + found.slopes / RATES[slopes])
    memory, cache = found.memory / bandwidth, found.asked / CACHE
    return max(memory, cache / busy, products / busy) + LAUNCH


def least_products(op: str, mode: str, shape: Shape) -> int:
    """The fewest multiplications: two products for the anchor and three for each other modality.

    Those are each modality's scores, and the means of its prototypes under its own posterior and
    the anchor's; forward without a gradient has the scores alone. Where one block holds all classes
    a single mean would do for both, which is not asked for.
    """
    both = 3 * shape.modalities - 1
    alone = {"forward": shape.modalities, "backward": both - shape.modalities, "step": both}
    times = {
        "alignment_loss": alone,
        "multimodal_objective": alone,
        "nearest_prototype": alone,
        "prototype_distance": {"forward": 1, "backward": 1},
    }.get(op, {})
    return times.get(mode, 0) * shape.batch * shape.classes * shape.width


class _Uninitialised(TorchFunctionMode):
    """Random tensors are left unfilled: only sizes matter here, and filling gigabytes takes long.

    Targets are filled: the prototypes' update moves those of classes that are there.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        instead = {torch.randn: torch.empty, torch.randn_like: torch.empty_like}
        return instead.get(function, function)(*args, **(kwargs or {}))


def row(op: str, mode: str, shape: Shape, precision: str) -> Row:
    """The launches of one call, none of which runs."""
    torch.manual_seed(0)
    with conditions(PRECISIONS[precision], "ours", "cpu"), _Uninitialised():
        case = OPS[op](shape, PRECISIONS[precision], "cpu")
        with counts.recorded() as launches:
            call = in_mode(lambda inputs: case.run("triton", inputs), case, mode)
            call()  # the first may make what stays
            launches.clear()
            call()
    least = case.bytes[mode], least_products(op, mode, shape)
    return Row(shape, op, mode, precision, list(launches), *least)


def rows(shapes=SHAPES) -> Iterator[Row]:
    """Every row of the table."""
    for shape in shapes:
        for op, modes in MODES.items():
            if op not in at(shape):
                continue
            for mode in modes:
                for precision in PREDICTED:
                    yield row(op, mode, shape, precision)


def cells(found: Row) -> list[str]:
    """A row's texts; the last is for a measurement."""
    against = lambda value, least: f"{value / least:.2f}" if least else "-"
    return [
        str(found.shape),
        f"`{found.op}`",
        found.mode,
        found.precision,
        str(len(found.launches)),
        f"{found.bytes / 1e6:.3g}",
        against(found.bytes, found.least_bytes),
        against(found.memory, found.least_bytes),
        f"{2 * found.products / 1e9:.3g}" if found.least_products else "-",
        against(found.products, found.least_products),
        *(text(1e6 * found.seconds(device)) for device in BANDWIDTH),
        "",
    ]


def text(microseconds: float) -> str:
    """Three digits, as the counts are no better."""
    return f"{microseconds:.1f}" if microseconds < 100 else f"{float(f'{microseconds:.3g}'):.0f}"


def table(header, lines) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def is_step(found: Row) -> bool:
    """Whether it is a shape's whole training step: of one half where only that half is timed."""
    whole = "multimodal_objective"
    halves = ("fusion_cross_entropy", "alignment_loss")
    return found.mode == "step" and found.op in ((whole,) if whole in at(found.shape) else halves)


def extract(found: list[Row]) -> str:
    """The table of benchmarks/README.md: the training step of each shape."""
    columns = [0, 1, 3, *range(len(HEADER) - 3, len(HEADER))]
    pick = lambda line: [line[column] for column in columns]
    return table(pick(HEADER), [pick(cells(entry)) for entry in found if is_step(entry)])


def page(found: list[Row]) -> str:
    """The page results/predicted.md."""
    return f"{INTRODUCTION}\n{table(HEADER, [cells(entry) for entry in found])}\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the page is written")
    options = parser.parse_args()
    found = list(rows())
    options.output.write_text(page(found), encoding="utf-8")
    print(page(found))
    print(f"The training step of each shape, for benchmarks/README.md:\n\n{extract(found)}")


if __name__ == "__main__":
    main()
