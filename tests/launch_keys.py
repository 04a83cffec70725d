"""Which launches a GPU would compile anew for a batch of another size.

    python tests/launch_keys.py

Prints JSON: for each operation and shape the kernels whose compiled form a batch of odd size would
not share. Launches are recorded and their arguments specialised as Triton does, for sm_90. Needs
TRITON_INTERPRET unset.
"""

from __future__ import annotations

import json

import torch
import triton.runtime.jit as jit
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

import iib_kernels
from benchmarks import host_time
from iib_kernels import _tuning

SHAPES = {
    (64, 31, 512, 2): (37, 48),
    (256, 309, 512, 2): (113, 17),
    (4096, 1000, 768, 3): (1001,),
}  # batch, classes, width and modalities: other batches


def calls(batch: int, classes: int, width: int, modalities: int, dtype: torch.dtype) -> dict:
    """A training step of each operation."""
    like = lambda columns: torch.zeros(batch, columns, dtype=dtype, requires_grad=True)
    logits = [like(classes) for _ in range(modalities)]
    features = [like(width) for _ in range(modalities)]
    tables = [torch.zeros(classes, width) for _ in range(modalities)]
    targets, budgets = torch.zeros(batch, dtype=torch.long), torch.ones(modalities)
    counts = [torch.zeros(classes, dtype=torch.long) for _ in range(modalities)]
    rows = [values.detach() for values in features]
    mask = torch.ones(batch, modalities, dtype=torch.bool)
    options = {"features": features, "prototypes": tables, "budgets": budgets, "impl": "triton"}
    return {
        "gated_fusion": lambda: iib_kernels.gated_fusion(logits, impl="triton").logits,
        "trusted_fusion": lambda: (
            iib_kernels.trusted_fusion(
                logits, torch.zeros(batch, modalities), mask=mask, impl="triton"
            ).logits
        ),
        "fusion_cross_entropy": lambda: (
            iib_kernels.fusion_cross_entropy(logits, targets, impl="triton").fused
        ),
        "alignment_loss": lambda: iib_kernels.alignment_loss(
            features, tables, targets, budgets, impl="triton"
        )[0],
        "multimodal_objective": lambda: (
            iib_kernels.multimodal_objective(logits, targets, **options).loss
        ),
        "nearest_prototype": lambda: (
            iib_kernels.nearest_prototype(features, tables, impl="triton").distance
        ),
        "prototype_distance": lambda: iib_kernels.prototype_distance(
            features[0], tables[0], impl="triton"
        ),
        "update_prototypes_": lambda: iib_kernels.update_prototypes_(
            tables, counts, rows, targets, impl="triton"
        ),
    }


def main() -> None:
    """Record, and print what differs."""
    host_time.without_launches()
    backend, binders, launches = CUDABackend(GPUTarget("cuda", 90, 32)), {}, set()

    def run(self, *arguments, grid, warmup, **options):
        if self not in binders:
            make = jit.create_function_from_signature
            binders[self] = make(self.signature, self.params, backend), {}
        binder, keys = binders[self]
        _, specialization, options = binder(*arguments, **options)
        launches.add((self.__name__, jit.compute_cache_key(keys, specialization, options)))

    jit.JITFunction.run = run
    _tuning.processors = lambda device: 132
    found = []
    for shape, others in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            for name in calls(*shape, dtype):
                seen = []
                for batch in (shape[0], *others):
                    launches.clear()
                    output = calls(batch, *shape[1:], dtype)[name]()
                    if output is not None:
                        output.sum().backward()
                    seen.append(set(launches))
                new = sorted({kernel for odd in seen[1:] for kernel, key in odd - seen[0]})
                found.append([name, list(shape), str(dtype), new])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
