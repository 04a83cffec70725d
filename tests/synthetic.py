"""A small data set of the user's own kind, and the command line as a user runs it.

Shared by the tests of the command line.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def arrays(count: int = 200, seed: int = 0) -> dict[str, np.ndarray]:
    """Three classes, audio (clear) and visual (less so), ten samples a speaker.

    Some rows have one of the two only.
    """
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(count) % 3)
    audio = np.eye(3)[y] @ rng.normal(size=(3, 6)) * 1.5 + rng.normal(size=(count, 6))
    visual = np.eye(3)[y] @ rng.normal(size=(3, 4)) * 0.6 + rng.normal(size=(count, 4))
    has_audio, has_visual = np.ones(count, bool), np.ones(count, bool)
    has_audio[::11] = False
    has_visual[5::13] = False
    has_visual[~has_audio] = True
    return {
        "x_audio": audio,
        "x_visual": visual,
        "y": y,
        "mask_audio": has_audio,
        "mask_visual": has_visual,
        "speaker": np.arange(count) // 10,
    }


def write(path: Path, **changes) -> Path:
    """``arrays()`` as an npz file, some of them replaced, or left out where the change is None."""
    content = {**arrays(), **changes}
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path


def command(*arguments) -> list[str]:
    """``python -m iibalance ...`` as an argument list."""
    return [sys.executable, "-m", "iibalance", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """One thread a process: the same numbers on every machine, and no fight over its cores."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **more}


def call(*arguments, timeout: float = 300, **more: str) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**more),
    )
