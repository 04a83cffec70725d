"""Block sizes and warps, by the sizes of a call: small static tables.

IIB_KERNELS_AUTOTUNE=1 times a few alternatives on the first call of each size.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from iib_kernels._runtime import hip, interpreting

ALIGNMENT_CLASSES = 128  # up to this many classes one block of scores holds them all
LEAST = 512  # classes of a part, where they are split
RESIDENT = 768  # rows of up to this many components of half precision stay in shared memory


class Launch(NamedTuple):
    """Constant block sizes of one launch, its warps and its stages of software pipelining."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of the launch."""
        return {**self.blocks, **self.compiler()}

    def compiler(self) -> dict[str, int | bool]:
        """Those among them that are the compiler's."""
        options = {
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


def alignment(classes: int, width: int, modalities: int, itemsize: int) -> list[Launch]:
    """Rows, classes and components of a tile of scores; all modalities' tiles are held at once."""
    columns = tile(classes, ALIGNMENT_CLASSES)
    many = modalities > 3 or columns > 64 or (columns > 32 and itemsize > 2)
    warps = 8 if many and not hip() else 4
    return [Launch({"BLOCK_B": 16, "BLOCK_K": columns, "BLOCK_D": depth(width, itemsize)}, warps)]


def padded(width: int) -> int:
    """Components of the tables that attention over prototypes reads, for so many of a modality."""
    if width <= 128:
        return tile(width, 128)
    return -(-width // 128) * 128 if width <= RESIDENT else -(-width // 256) * 256


def tables(width: int) -> Launch:
    """Whole rows of a table."""
    components = power_of_two(width)
    return Launch({"BLOCK_K": max(1, 4096 // components), "BLOCK_D": components})


def attention(
    width: int, itemsize: int, tensor_cores: bool, device: torch.device, rows: int, across: bool
) -> Launch:
    """Rows, classes and components of attention over prototypes of padded ``width``.

    With HELD times CHUNK components of means in registers; without, where rows stay in shared
    memory, all of them, and BLOCK_D divides the width. ``rows`` of all modalities; ``across``: with
    two modalities' prototypes in shared memory at once.
    """
    if itemsize > 4:
        blocks = {"BLOCK_B": 16, "BLOCK_K": 32, "BLOCK_D": 16, "CHUNK": min(64, width), "HELD": 1}
        return Launch(blocks, 8)
    warps = 8 if width > 128 else 4
    if itemsize == 2 and width <= RESIDENT and hopper(device):
        columns = 32 if width > 512 or (across and width > 256) else 64
        stages = 1 if across and width > 512 else 2
        blocks = {"BLOCK_B": 64, "BLOCK_K": columns, "BLOCK_D": min(128, width)}
        return Launch(blocks, warps, stages)
    chunk = next(size for size in (256, 128, 64, 32, 16) if width % size == 0)
    blocks = {"BLOCK_B": 64, "BLOCK_K": 64, "BLOCK_D": depth(width, itemsize), "CHUNK": chunk}
    if tensor_cores:
        columns = 32 if itemsize > 2 and not hopper(device) else 64
        return Launch({**blocks, "BLOCK_K": columns, "HELD": 1}, warps)
    # What a program does not hold, another one does, and computes all scores again. That is worth
    # it only where a device would have too few programs; otherwise rows make room for components
    pieces = width // 256 if width % 256 == 0 else 1
    held = next(count for count in (4, 3, 2, 1) if pieces % count == 0)
    if held == 1 or rows < 16 * processors(device):
        return Launch({**blocks, "BLOCK_B": 32, "BLOCK_K": 32, "HELD": 1}, warps)
    blocks |= {"BLOCK_B": 16, "BLOCK_K": 16 if held == 4 else 32}
    blocks |= {"CHUNK": 512, "HELD": 1} if held == 2 else {"HELD": held}
    return Launch(blocks, warps)


def evidence(
    width: int, itemsize: int, modalities: int, rows: int, classes: int, device: torch.device
) -> Launch:
    """Tiles of all modalities' scores, over many classes; smaller ones for a device that would be
    mostly idle, its classes split as well.
    """
    if itemsize > 4:
        return Launch({"BLOCK_B": 16, "BLOCK_K": 32, "BLOCK_D": 16}, 8)
    few = 4 * -(-rows // 64) * max(1, classes // LEAST) < processors(device)
    blocks = {"BLOCK_B": 16 if few else 64, "BLOCK_K": 32 if modalities > 3 else 64}
    return Launch({**blocks, "BLOCK_D": depth(width, itemsize)}, 4 if few else 8)


def gradients(width: int) -> Launch:
    """Whole rows of gradients."""
    components = power_of_two(width)
    warps = 4 if components <= 4096 else 8
    return Launch({"BLOCK_B": max(1, 2048 // components), "BLOCK_D": components}, warps)


def splits(programs: int, classes: int, device: torch.device) -> int:
    """Parts of the classes, so that few rows and many classes keep a device busy.

    Each has at least LEAST classes.
    """
    return max(1, min(processors(device) // max(programs, 1), classes // LEAST))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether this is a Hopper GPU, for whose warp groups and 227 KB of shared memory a program the
    resident kernels are written; also where there is no GPU.

    Of those kernels, Triton 3.7 leaves nothing when it compiles them for Blackwell.
    """
    if device.type != "cuda":
        return True
    return not hip() and torch.cuda.get_device_capability(device)[0] == 9


_best: dict[tuple, Launch] = {}


def autotuning() -> bool:
    """Whether IIB_KERNELS_AUTOTUNE asks for timing; never when interpreted, where it is void."""
    return os.environ.get("IIB_KERNELS_AUTOTUNE", "0") not in ("", "0") and not interpreting()


def run(key: tuple, candidates: list[Launch], launch: Callable[[Launch], object]) -> object:
    """``launch`` with the first candidate, or, where autotuning is asked for, with the fastest.

    ``key`` says for which sizes. Inside a capture of a CUDA graph, which timing would break, an
    unknown size takes the first as well, and is timed when it comes again outside.
    """
    if not autotuning() or len(candidates) == 1:
        return launch(candidates[0])
    if key not in _best:
        if torch.cuda.is_current_stream_capturing():
            return launch(candidates[0])
        from triton.testing import do_bench

        time = lambda candidate: do_bench(lambda: launch(candidate), return_mode="median")
        _best[key] = min(candidates, key=time)
    return launch(_best[key])
