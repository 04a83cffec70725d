"""Fixtures shared by all tests, and their order: quick ones first, so that a mistake shows early."""
from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning cost several times the work on a shared machine

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run on CPU tensors


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets: ``IIBALANCE_DATA``, or ``../shared/data`` beside the repository. Skips where there is neither."""
    given = os.environ.get("IIBALANCE_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent (set IIBALANCE_DATA to the folder that holds avletters/, utd_mhad/, ...)")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # stable: the order within each half stays
