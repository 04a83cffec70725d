"""Block sizes and warps, by the sizes of a call: small static tables.

IIB_KERNELS_AUTOTUNE=1 times a few alternatives on the first call of each size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from iib_kernels._runtime import hip, interpreting

FUSION_CLASSES = 1024  # logits of up to this many classes stay in registers
ALIGNMENT_CLASSES = 128  # up to this many classes one block of scores holds them all
COMPONENTS = 1024  # rows of up to this many components stay in registers


class Launch(NamedTuple):
    """Constant block sizes of one launch, its warps and its stages of software pipelining."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of the launch."""
        options = {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        # On NVIDIA all registers may be used: left alone, ptxas spills a few to fit one more block
        return options if hip() else {**options, "maxnreg": 255}


def power_of_two(value: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(0, value - 1).bit_length()


def tile(size: int, most: int) -> int:
    """A power of two that holds ``size``, between 16, the least products take, and ``most``."""
    return max(16, min(most, power_of_two(size)))


def depth(width: int, itemsize: int) -> int:
    """Components of one step of a product: 64 bytes of each row, or 128 in float32."""
    return tile(width, {2: 32, 4: 32}.get(itemsize, 16))


def fusion(classes: int, modalities: int, wide: bool) -> list[Launch]:
    """BLOCK_B rows and BLOCK_K classes of all modalities in registers."""
    columns = power_of_two(min(classes, FUSION_CLASSES))
    if classes > FUSION_CLASSES and modalities > 3:
        columns //= 2
    rows = max(1, min(32, (1024 if wide else 2048) // (columns * power_of_two(modalities))))
    warps = 8 if columns * modalities >= (2048 if wide else 4096) else 4
    return [
        Launch({"BLOCK_B": count, "BLOCK_K": columns}, warps)
        for count in dict.fromkeys((rows, max(1, rows // 2), rows * 2))
    ]


def alignment(classes: int, width: int, modalities: int, itemsize: int) -> list[Launch]:
    """Rows, classes and components of a tile of scores; all modalities' tiles are held at once."""
    columns = tile(classes, ALIGNMENT_CLASSES if classes <= ALIGNMENT_CLASSES else 64)
    many = modalities > 3 or columns > 64 or (columns > 32 and itemsize > 2)
    warps = 8 if many and not hip() else 4
    return [Launch({"BLOCK_B": 16, "BLOCK_K": columns, "BLOCK_D": depth(width, itemsize)}, warps)]


def alignment_tiled(width: int, itemsize: int) -> list[Launch]:
    """The same, with CHUNK components of a gradient kept over all classes."""
    blocks = {
        "BLOCK_B": 16,
        "BLOCK_K": 32,
        "BLOCK_D": depth(width, itemsize),
        "CHUNK": tile(width, 256 if itemsize <= 4 else 64),
    }
    return [Launch(blocks, 8)]


def distance(batch: int, classes: int, width: int, itemsize: int) -> list[Launch]:
    """Tile of distances."""
    blocks = {
        "BLOCK_B": tile(batch, 64 if batch >= 1024 and itemsize <= 4 else 16),
        "BLOCK_K": tile(classes, 128 if itemsize <= 4 else 32),
        "BLOCK_D": depth(width, itemsize),
    }
    return [Launch(blocks, 8 if itemsize > 2 else 4)]


def distance_backward(batch: int, classes: int, width: int, itemsize: int) -> list[Launch]:
    """Tile of the distances' gradient, and CHUNK components at a time."""
    wide = itemsize > 4
    blocks = {
        "BLOCK_B": tile(batch, 16 if wide else 32),
        "BLOCK_K": tile(classes, 32 if wide else 64 if hip() else 128),
        "CHUNK": tile(width, 32 if wide else 64),
    }
    return [Launch(blocks, 8)]


def nearest_backward(width: int) -> list[Launch]:
    """Rows held whole, up to COMPONENTS of them."""
    components = tile(width, COMPONENTS)
    return [Launch({"BLOCK_B": max(1, 2048 // components), "BLOCK_D": components})]


def update(width: int) -> list[Launch]:
    """Rows of one class at a time, found among SEARCH targets."""
    components = tile(width, COMPONENTS)
    rows = max(1, min(64, 8192 // components))
    return [Launch({"SEARCH": 256, "BLOCK_B": rows, "BLOCK_D": components})]


_best: dict[tuple, Launch] = {}


def autotuning() -> bool:
    """Whether IIB_KERNELS_AUTOTUNE asks for timing; never when interpreted, where it is void."""
    return os.environ.get("IIB_KERNELS_AUTOTUNE", "0") not in ("", "0") and not interpreting()


def run(key: tuple, candidates: list[Launch], launch: Callable[[Launch], object]) -> object:
    """``launch`` with the first candidate, or, where autotuning is asked for, with the fastest.

    ``key`` says for which sizes.
    """
    if not autotuning() or len(candidates) == 1:
        return launch(candidates[0])
    if key not in _best:
        from triton.testing import do_bench

        time = lambda candidate: do_bench(lambda: launch(candidate), return_mode="median")
        _best[key] = min(candidates, key=time)
    return launch(_best[key])
