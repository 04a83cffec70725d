"""What a call costs on the host before a GPU has anything to do, without a GPU.

    python -m benchmarks.host_time [--against CHECKOUT]

Kernels are not launched: each launch stops after its arguments have been bound and hashed, which is
host time too. With ``--against`` the same calls of another checkout are measured in turn, each in
processes of its own. One thread; the least of many repeats. Compare ratios, not microseconds: what
CUDA itself takes to launch is not in them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
# Views and allocations launch nothing
FREE = (
    "view", "detach", "expand", "select", "slice", "squeeze", "permute", "transpose", "alias",
    "unbind", "split", "as_strided", ".t.", "empty",
)  # fmt: skip


def without_launches() -> None:
    """From now on kernels are not launched, and functions take CPU tensors for a GPU's."""
    import triton.runtime.jit as jit
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    from iib_kernels import _checks, _runtime

    backend, binders = CUDABackend(GPUTarget("cuda", 90, 32)), {}

    def run(self, *arguments, grid, warmup, **options):
        if self not in binders:
            binders[self] = (
                jit.create_function_from_signature(self.signature, self.params, backend),
                {},
            )
        binder, keys = binders[self]
        _, specialization, options = binder(*arguments, **options)
        jit.compute_cache_key(keys, specialization, options)

    jit.JITFunction.run = run
    _runtime.interpreting = lambda: True
    _checks.eager_on_cpu = _runtime.eager_on_cpu = lambda tensor: False


def calls(classes: int = 31, batch: int = 64, width: int = 512, count: int = 2) -> dict:
    """The operations by name, forward and backward, on small inputs."""
    import torch

    import iib_kernels

    logits = [torch.randn(batch, classes, requires_grad=True) for _ in range(count)]
    features = [torch.randn(batch, width, requires_grad=True) for _ in range(count)]
    prototypes = [torch.randn(classes, width) for _ in range(count)]
    targets, budgets = torch.randint(classes, (batch,)), torch.rand(count)
    counts = [torch.ones(classes, dtype=torch.int64) for _ in range(count)]
    rows = [value.detach() for value in features]

    def objective():
        if hasattr(iib_kernels, "multimodal_objective"):
            out = iib_kernels.multimodal_objective(
                logits, targets, features=features, prototypes=prototypes, budgets=budgets,
                impl="triton",
            )  # fmt: skip
            return out.loss
        losses = iib_kernels.fusion_cross_entropy(logits, targets, impl="triton")
        contrast, alignment, _ = iib_kernels.alignment_loss(
            features, prototypes, targets, budgets, impl="triton"
        )
        return losses.fused + losses.unimodal.sum() + contrast.sum() + alignment.sum()

    def update():
        if hasattr(iib_kernels, "update_prototypes_"):
            iib_kernels.update_prototypes_(prototypes, counts, rows, targets, impl="triton")
            return
        for table, seen, values in zip(prototypes, counts, rows):
            new = iib_kernels.update_prototypes(table, seen, values, targets, impl="triton")
            table.copy_(new[0])
            seen.copy_(new[1])

    forward = {
        "gated_fusion": lambda: iib_kernels.gated_fusion(logits, impl="triton").logits.sum,
        "fusion_cross_entropy": lambda: (
            iib_kernels.fusion_cross_entropy(logits, targets, impl="triton").fused.sum
        ),
        "alignment_loss": lambda: (
            iib_kernels.alignment_loss(
                features, prototypes, targets, budgets, impl="triton"
            ).contrastive.sum
        ),
        "nearest_prototype": lambda: (
            iib_kernels.nearest_prototype(features, prototypes, impl="triton").distance.sum
        ),
        "prototype_distance": lambda: (
            iib_kernels.prototype_distance(features[0], prototypes[0], impl="triton").sum
        ),
        "the objective": lambda: objective().sum,
    }
    found = dict(forward)
    for name, call in forward.items():
        found[f"{name}, backward"] = _backward(call)
    found["the prototypes' update"] = update
    return found


def _backward(call: Callable) -> Callable:
    """Backward alone, of an output made once."""
    output = call()()
    return lambda: output.backward(retain_graph=True)


def microseconds(call: Callable, repeats: int = 30, inner: int = 20) -> float:
    """The least mean time of ``inner`` calls in ``repeats`` tries."""
    for _ in range(10):
        call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        best = min(best, (time.perf_counter() - start) / inner)
    return 1e6 * best


def operations(call: Callable) -> int:
    """Operators that a call sends through the dispatcher: each about one launch on a GPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Record():
        call()
    return sum(not any(free in name for free in FREE) for name in seen)


def measure() -> dict[str, list[float]]:
    """(microseconds, operators) of each call."""
    import torch

    torch.set_num_threads(1)
    without_launches()
    return {name: [microseconds(call), operations(call)] for name, call in calls().items()}


def measured_in(checkout: Path) -> dict[str, list[float]]:
    """:func:`measure` in a process whose ``iib_kernels`` is that of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, __file__, "--measure"],
        env=environment, cwd=checkout, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def table(here: dict, there: dict | None) -> str:
    """Markdown."""
    if there is None:
        lines = ["| call | microseconds | operators |", "|---|---:|---:|"]
        return "\n".join(
            lines + [f"| {name} | {took:.0f} | {count} |" for name, (took, count) in here.items()]
        )
    lines = [
        "| call | microseconds, before | now | now / before | operators, before | now |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (took, count) in here.items():
        old, old_count = there[name]
        lines.append(
            f"| {name} | {old:.0f} | {took:.0f} | {took / old:.2f} | {old_count} | {count} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout, to be measured in turn")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure()))
        return
    checkouts = [ROOT] + ([options.against.resolve()] if options.against else [])
    least: list[dict] = [{} for _ in checkouts]
    for _ in range(ROUNDS):
        for found, checkout in zip(least, checkouts):
            for name, (took, count) in measured_in(checkout).items():
                found[name] = [min(took, found.get(name, [took])[0]), count]
    print(table(least[0], least[1] if options.against else None))


if __name__ == "__main__":
    main()
