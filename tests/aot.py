"""Compile what the launchers launch, for GPUs that are not here, and read what it uses.

    python tests/aot.py OUTPUT.json [--quick] [OPERATOR ...]

The public operators run on CPU tensors with Triton's launch replaced by a recorder, so that each
variant is compiled with the signature, constants and block sizes that a GPU would get.

Needs TRITON_INTERPRET unset; the interpreter and the compiler cannot share a process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from iib_kernels import _runtime, _tuning  # and with them the operators, torch.ops.iib

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
PAIRS = {
    "bf16, fp32": (torch.bfloat16, torch.float32),
    "tf32": (torch.float32, torch.float32),
}  # features and prototypes; products in TF32 where it exists
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def recorded(call) -> list[tuple]:
    """(kernel, arguments by name, launch options) of every launch in ``call``; none runs."""
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        named = dict(zip(self.arg_names, args))
        named |= {name: kwargs.pop(name) for name in list(kwargs) if name in self.arg_names}
        launches.append((self, named, kwargs))

    original, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def _describe(value, path: tuple, constants: dict, attributes: dict):
    """Type of one argument as the launcher would specialise it.

    Constants and divisibility by 16 are added to their tables.
    """
    if isinstance(value, tuple):
        entries = [
            _describe(entry, (*path, index), constants, attributes)
            for index, entry in enumerate(value)
        ]
        # A named tuple stays one: kernels ask for its fields
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]  # fresh allocations are
        return "*" + TYPES[value.dtype]
    if isinstance(value, int):
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def source(kernel: JITFunction, named: dict) -> ASTSource:
    """The launch as something to compile."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr:
            constants[(index,)] = value
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = _describe(value, (index,), constants, attributes)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(compiled) -> dict:
    """Registers, spilled words and shared memory (bytes) of a compiled kernel."""
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = subprocess.run(
                [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        read = lambda key: int(re.search(rf"\b{key}:(\d+)", text).group(1))
        return {
            "registers": read("REG"),
            "spills": read("STACK") // 4,
            "shared": compiled.metadata.shared,
        }
    read = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", compiled.asm["amdgcn"]).group(1))
    return {
        "registers": read("vgpr_count"),
        "spills": read("vgpr_spill_count"),
        "shared": compiled.metadata.shared,
    }


def _matrix(rows, columns, dtype, layout):
    """An uninitialised matrix, ``"usual"`` or ``"transposed"``.

    ``"ones"`` is usual, and every size of the call is 1, which Triton takes for a constant.
    """
    return (
        torch.empty(columns, rows, dtype=dtype).T
        if layout == "transposed"
        else torch.empty(rows, columns, dtype=dtype)
    )


def _fusion(dtype, modalities, classes, loss, layout="usual"):
    """Forward and backward of a fusion operator with everything that can be given."""
    batch = 1 if layout == "ones" else 64
    logits = [_matrix(batch, classes, dtype, layout) for _ in range(modalities)]
    vector, table = torch.empty(modalities), torch.empty(batch, modalities)
    mask, scale = torch.empty(batch, modalities, dtype=torch.bool), torch.empty(())
    parameters = (vector, vector, scale, [1.0, 1.0, 1.0], mask)
    targets = torch.empty(batch, dtype=torch.int64)
    if loss:
        losses = torch.ops.iib.fusion_cross_entropy(
            logits, targets, vector, table, *parameters, -100
        )
        torch.ops.iib.fusion_cross_entropy_backward(
            logits,
            targets,
            *parameters,
            -100,
            losses[2],
            losses[4],
            losses[0],
            losses[1],
            None,
            True,
            True,
            torch.float32,
        )
    else:
        fused, weights, uncertainty, statistics = torch.ops.iib.gated_fusion(
            logits, vector, table, *parameters
        )
        torch.ops.iib.gated_fusion_backward(
            logits,
            *parameters,
            weights,
            statistics,
            fused,
            weights,
            uncertainty,
            True,
            True,
            torch.float32,
        )


def _tables(dtype, modalities, classes, layout):
    """Features and prototypes [., 512] of every modality; ``dtype`` of both, or one of each."""
    dtype, other = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    batch, width = (1, 1) if layout == "ones" else (64, 512)
    layouts = ["usual", layout] * modalities  # of several modalities not all are alike
    features = [_matrix(batch, width, dtype, kind) for kind in layouts[:modalities]]
    return features, [_matrix(classes, width, other, kind) for kind in layouts[:modalities]]


def _alignment(dtype, modalities, classes, layout="usual"):
    """Forward and backward of the alignment loss with seen classes and a mask."""
    features, prototypes = _tables(dtype, modalities, classes, layout)
    batch = len(features[0])
    seen = [torch.empty(classes, dtype=torch.bool)] * modalities
    shared = (
        features,
        prototypes,
        torch.empty(batch, dtype=torch.int64),
        torch.empty(modalities),
        0.2,
        True,
        seen,
        torch.empty(batch, modalities, dtype=torch.bool),
        -100,
    )
    contrastive, alignment, confidence, _, statistics = torch.ops.iib.alignment_loss(*shared)
    torch.ops.iib.alignment_loss_backward(*shared, confidence, statistics, contrastive, alignment)


def _nearest(dtype, modalities, classes, layout="usual"):
    """Forward and backward of the nearest prototype."""
    features, prototypes = _tables(dtype, modalities, classes, layout)
    distance, index = torch.ops.iib.nearest_prototype(
        features, prototypes, True, [torch.empty(classes, dtype=torch.bool)] * modalities
    )
    torch.ops.iib.nearest_prototype_backward(features, prototypes, True, index, distance)


def _distance(dtype, classes, layout="usual"):
    """Forward and backward of the distances, with both gradients."""
    (*_, features), (*_, prototypes) = _tables(dtype, 2, classes, layout)
    distance, squares, others, exact = torch.ops.iib.prototype_distance(
        features, prototypes, True, True
    )
    exact = exact if exact.numel() else distance
    torch.ops.iib.prototype_distance_backward(
        features, prototypes, True, squares, others, exact, distance, True, True
    )


def _update(dtype, classes, layout="usual"):
    """Moving average and class sums."""
    (*_, features), (*_, prototypes) = _tables(dtype, 2, classes, layout)
    targets = torch.empty(len(features), dtype=torch.int64)
    torch.ops.iib.update_prototypes(
        prototypes, torch.empty(classes, dtype=torch.int64), features, targets, 0.9, True, -100
    )
    torch.ops.iib.class_sums(features, targets, classes, True, -100)


def variants(quick: bool) -> list[tuple[str, tuple]]:
    """(name, arguments) of every operator call to compile."""
    found = []
    for name in ("bf16", "fp32") if quick else ("bf16", "fp16", "fp32"):
        for modalities in (2,) if quick else (1, 2, 3, 6):
            found += [("fusion", (name, modalities, 1000, loss)) for loss in (False, True)]
            found += [("alignment", (name, modalities, classes)) for classes in (31, 309)]
            found.append(("nearest", (name, modalities, 309)))
        found += [("fusion", (name, 2, 4000, loss)) for loss in (False, True)]
        found += [("distance", (name, 309)), ("update", (name, 309))]
    for name, classes, layout in (
        ("bf16, fp32", 309, "usual"),
        ("tf32", 309, "usual"),
        ("fp64", 309, "usual"),
        ("fp32", 309, "transposed"),
        ("fp32", 1, "ones"),
    ):
        modalities = 1 if layout == "ones" else 2
        found += [
            ("alignment", (name, modalities, size, layout))
            for size in dict.fromkeys((min(31, classes), classes))
        ]
        found += [
            ("nearest", (name, modalities, classes, layout)),
            ("distance", (name, classes, layout)),
            ("update", (name, classes, layout)),
        ]
        if name in DTYPES:
            found += [
                ("fusion", (name, modalities, size, loss, layout))
                for loss in (False, True)
                for size in {classes, 1 if classes == 1 else 4000}
            ]
    return found


CALLS = {
    "fusion": _fusion,
    "alignment": _alignment,
    "nearest": _nearest,
    "distance": _distance,
    "update": _update,
}


def compile_variant(variant: tuple[str, tuple], targets: tuple[str, ...]) -> list[dict]:
    """One row for every launch of an operator call and every target."""
    operator, (dtype, *sizes) = variant
    rows = []
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    for target in targets:
        _tuning.hip = _runtime.hip = lambda: TARGETS[target].backend == "hip"
        for kernel, named, options in recorded(
            lambda: CALLS[operator]({**DTYPES, **PAIRS}[dtype], *sizes)
        ):
            began = time.perf_counter()
            row = {
                "kernel": kernel.__name__,
                "dtype": dtype,
                "modalities": int(named.get("M", 1)),
                "sizes": sizes,
                "target": target,
                "num_warps": options.get("num_warps", 4),
            }
            try:
                compiled = triton.compile(
                    source(kernel, named), target=TARGETS[target], options=options
                )
                row |= resources(compiled)
                row["wide_rows"] = bool(
                    re.search(r"arith\.muli .*: (?:tensor<[^>]*x)?i64", compiled.asm["ttir"])
                )
            except Exception as error:  # a row of the table, and the test's failure
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
            row["seconds"] = round(time.perf_counter() - began, 2)
            rows.append(row)
    return rows


def main() -> None:
    """Compile every variant on two processes and write the rows.

    What the compiler prints about a failure is in its row.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.nice(19)  # the test suite runs meanwhile
    output, quick = Path(sys.argv[1]), "--quick" in sys.argv
    chosen = [argument for argument in sys.argv[2:] if not argument.startswith("--")]
    targets = tuple(TARGETS)
    wanted = [variant for variant in variants(quick) if not chosen or variant[0] in chosen]
    with ProcessPoolExecutor(2) as pool:
        rows = [
            row
            for rows in pool.map(compile_variant, wanted, [targets] * len(wanted))
            for row in rows
        ]
    output.write_text(
        json.dumps(
            {"torch": torch.__version__, "triton": triton.__version__, "rows": rows}, indent=1
        )
    )


if __name__ == "__main__":
    main()
