"""What a result came from: the code and the packages it depends on."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

import iib_kernels

PACKAGES = ("torch", "triton", "numpy", "accelerate", "torchmetrics", "scikit-learn", "iibalance")


@cache
def code_digest() -> str:
    """A digest of the two packages' source, to tell results of different versions apart."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(iib_kernels.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(
                str(path.relative_to(package.parent)).encode() + b"\0" + path.read_bytes()
            )
    return digest.hexdigest()[:12]


def versions() -> dict[str, str | None]:
    """What is installed of the packages that numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except Exception:  # not installed here: nothing to record
            found[package] = None
    return found
