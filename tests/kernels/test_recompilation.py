"""No launch of a batch of odd size compiles a kernel anew, but for the known ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Their block sizes follow the batch
KNOWN = {
    "nearest_prototype": {"nearest_forward", "measure_rows"},
    "prototype_distance": {"distance_forward", "distance_backward", "measure_rows"},
    "update_prototypes_": {"move_prototypes"},
}


@pytest.mark.slow
def test_a_last_batch_of_odd_size_compiles_nothing():
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "tests/launch_keys.py"],
        cwd=root,
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert len(found) == 48  # 8 operations, 3 shapes, 2 types
    unexpected = [
        (operation, shape, dtype, new)
        for operation, shape, dtype, new in found
        if set(new) - KNOWN.get(operation, set())
    ]
    assert not unexpected
