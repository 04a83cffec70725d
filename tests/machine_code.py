"""The machine code of kernels compiled for Hopper, read without a GPU.

The interpreter and the compiler cannot share a process. So a test module that reads code compiles
it in a process of its own: :func:`rows_of` runs the module as a program, and its ``compile_all``
makes the rows.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTION = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)"


def compiled(kernel, named: dict, options: dict):
    """A recorded launch (aot.recorded), compiled."""
    import aot
    import triton

    return triton.compile(aot.source(kernel, named), target=aot.TARGETS["sm_90"], options=options)


def instructions(code) -> Counter:
    """How often each instruction stands in compiled code (not how often it runs)."""
    import aot

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [aot.CUOBJDUMP, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Counter(re.findall(INSTRUCTION, text, re.M))


def count(row: dict, prefix: str) -> int:
    """Instructions of a row's ``code`` that begin so."""
    return sum(number for name, number in row["code"].items() if name.startswith(prefix))


def resident_warps(registers: int, warps: int, shared: int = 0) -> int:
    """Warps that a multiprocessor holds at once.

    It has 65,536 registers, given out in units of 256 a warp, 64 warps, 32 programs, and 227 KB of
    shared memory, of which a program takes one more.
    """
    per_warp = -(-registers * 32 // 256) * 256
    programs = min(65536 // (per_warp * warps), 64 // warps, 32, 227 * 1024 // (shared + 1024))
    return programs * warps


def rows_of(module: str, folder: Path) -> list[dict]:
    """The rows that a test module's ``compile_all`` makes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = environment.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), given])
    command = [sys.executable, module, str(folder / "rows.json")]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=1200)
    return json.loads((folder / "rows.json").read_text())


def write_rows(rows: list[dict]) -> None:
    """What the module does as a program, with its rows."""
    Path(sys.argv[1]).write_text(json.dumps(rows))
