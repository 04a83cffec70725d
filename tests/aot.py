"""Compile what the launchers launch, for GPUs that are not here, and read what it uses.

    python tests/aot.py OUTPUT.json [--full] [OPERATOR ...]

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
import triton.language as tl
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
    if value is None or isinstance(value, tl.constexpr) or (isinstance(value, int) and value == 1):
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
        elif parameter.do_not_specialize:
            signature[parameter.name] = "i32"
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


def _fusion(dtype, modalities, classes, what, layout="usual"):
    """Forward and backward of a fusion operator with everything that can be given.

    ``what``: ``"logits"``, ``"values"``, ``"losses"``, ``"smoothed"`` losses, the ``"objective"``
    (losses and gradients in one launch) or the ``"smoothed objective"``.
    """
    batch = 1 if layout == "ones" else 64
    logits = [_matrix(batch, classes, dtype, layout) for _ in range(modalities)]
    vector, table = torch.empty(modalities), torch.empty(batch, modalities)
    mask, scale = torch.empty(batch, modalities, dtype=torch.bool), torch.empty(())
    parameters = (vector, vector, scale, [1.0, 1.0, 1.0], mask)
    targets = torch.empty(batch, dtype=torch.int64)
    smoothed = (torch.empty(classes), 0.1) if "smoothed" in what else (None, 0.0)
    labels, needs = (targets, -100, *smoothed), (True, True, torch.float32)
    if "objective" in what:
        from iib_kernels.ops.fusion import launch

        gating = launch.Gating(launch.Parameters(*parameters), vector, table)
        launch.objective(
            logits,
            launch.Labels(*labels),
            gating,
            torch.empty(modalities + 1),
            need_gate=True,
            need_parameters=True,
        )
    elif what in ("losses", "smoothed"):
        for reduction in ("none", "mean"):
            fused, unimodal, weights, *kept = torch.ops.iib.fusion_cross_entropy(
                logits, *labels, vector, table, *parameters, reduction
            )
            torch.ops.iib.fusion_cross_entropy_backward(
                logits, *labels, *parameters, weights, *kept, fused, unimodal, weights, *needs
            )
    else:
        values = [_matrix(batch, 512, dtype, layout) for _ in logits] if what == "values" else []
        *outputs, kept = torch.ops.iib.gated_fusion(logits, values, vector, table, *parameters)
        torch.ops.iib.gated_fusion_backward(
            logits, values, *parameters, outputs[1], kept, *outputs, *needs, bool(values)
        )


def _trust(dtype, modalities, classes, layout="usual"):
    """Forward and backward of the trusted fusion, with a trust a row, one a modality and none."""
    batch = 1 if layout == "ones" else 64
    logits = [_matrix(batch, classes, dtype, layout) for _ in range(modalities)]
    vector, table = torch.empty(modalities), torch.empty(batch, modalities)
    mask, scale = torch.empty(batch, modalities, dtype=torch.bool), torch.empty(())
    for trust, kind in ((table, torch.float32), (vector, None), (None, None)):
        given = (trust, vector, scale, [1.0, 1.0], mask)
        fused, _, kept = torch.ops.iib.trusted_fusion(logits, *given)
        torch.ops.iib.trusted_fusion_backward(logits, *given, kept, fused, True, True, kind)


def _tables(dtype, modalities, classes, layout):
    """Features and prototypes [., 512] of every modality; ``dtype`` of both, or one of each."""
    dtype, other = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    batch, width = {"ones": (1, 1), "tall": (4096, 512)}.get(layout, (64, 512))
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
    torch.ops.iib.alignment_loss(*shared, False, "mean")
    for reduction in ("none", "mean"):
        contrastive, alignment, _, *kept = torch.ops.iib.alignment_loss(*shared, True, reduction)
        torch.ops.iib.alignment_loss_backward(*shared, *kept, contrastive, alignment)


def _objective(dtype, modalities, classes, layout="usual"):
    """The objective with everything that can be given, and its backward; bare for many classes,
    whose halves are compiled by themselves.
    """
    features, prototypes = _tables(dtype, modalities, classes, layout)
    logits = [_matrix(len(rows), classes, rows.dtype, layout) for rows in features]
    batch, few = len(features[0]), classes <= 128
    outputs = torch.ops.iib.multimodal_objective(
        logits,
        torch.empty(batch, dtype=torch.int64),
        features if few else [],
        prototypes if few else [],
        torch.empty(modalities) if few else None,
        torch.empty(modalities),
        torch.empty(batch, modalities),
        None,
        None,
        None,
        [torch.empty(classes, dtype=torch.bool)] * modalities if few else [],
        torch.empty(batch, modalities, dtype=torch.bool),
        torch.empty(classes),
        [1.0, 1.0, 1.0, 1.0, 0.2, 0.1, 1.0, 1.0, 1.0],
        True,
        True,
        False,
        -100,
        True,
    )
    gradients = outputs[3]
    inputs = [*logits, *features][: len(gradients)]
    torch.ops.iib.scale_gradients(gradients, torch.empty(()), inputs)


def _nearest(dtype, modalities, classes, layout="usual"):
    """Forward and backward of the nearest prototype, few rows and many, narrow and wide ones."""
    features, prototypes = _tables(dtype, modalities, classes, layout)
    seen = [torch.empty(classes, dtype=torch.bool)] * modalities
    distance, index = torch.ops.iib.nearest_prototype(features, prototypes, True, seen)
    torch.ops.iib.nearest_prototype_backward(features, prototypes, True, index, distance)
    if layout != "usual":
        return
    for batch, width, known in ((64, 77, seen), (4096, 512, seen), (4096, 309, [])):
        rows = [torch.empty(batch, width, dtype=values.dtype) for values in features]
        tables = [torch.empty(classes, width, dtype=table.dtype) for table in prototypes]
        torch.ops.iib.nearest_prototype(rows, tables, True, known)
    wide = [torch.empty(64, 4104, dtype=values.dtype) for values in features]
    tables = [torch.empty(classes, 4104, dtype=table.dtype) for table in prototypes]
    torch.ops.iib.nearest_prototype_backward(wide, tables, True, index, distance)


def _distance(dtype, classes, layout="usual"):
    """Forward and backward of the distances, with both gradients; few rows and many."""
    (*_, features), (*_, prototypes) = _tables(dtype, 2, classes, layout)
    sizes = [(features, prototypes)]
    if layout == "usual":
        sizes += [
            (
                torch.empty(batch, width, dtype=features.dtype),
                torch.empty(count, width, dtype=prototypes.dtype),
            )
            for batch, count, width in (
                (4096, classes, 512),
                *(((4096, 1000, 309), (64, 31, 77)) if _tuning.hopper(None) else ()),
            )
        ]
    for features, prototypes in sizes:
        distance, squares, others, exact = torch.ops.iib.prototype_distance(
            features, prototypes, True, True
        )
        exact = exact if exact.numel() else distance
        torch.ops.iib.prototype_distance_backward(
            features, prototypes, True, squares, others, exact, distance, True, True
        )


def _update(dtype, modalities, classes, layout="usual"):
    """Moving average in place, and class sums; of wide rows too."""
    features, prototypes = _tables(dtype, modalities, classes, layout)
    batch = len(features[0])
    counts = [torch.empty(classes, dtype=torch.int64) for _ in features]
    targets = torch.empty(batch, dtype=torch.int64)
    mask = torch.empty(batch, modalities, dtype=torch.bool)
    torch.ops.iib.update_prototypes_(prototypes, counts, features, targets, mask, 0.9, True, -100)
    torch.ops.iib.class_sums(features[-1], targets, classes, True, -100)
    if layout != "usual":
        return
    # Rows beyond what registers hold, and more of them than one look at the targets takes
    features = [torch.empty(5000, 4104, dtype=rows.dtype) for rows in features]
    prototypes = [torch.empty(classes, 4104, dtype=table.dtype) for table in prototypes]
    targets = torch.empty(5000, dtype=torch.int64)
    for cosine in (True, False):
        torch.ops.iib.update_prototypes_(
            prototypes, counts, features, targets, None, 0.9, cosine, -100
        )
    torch.ops.iib.class_sums(features[0], targets, classes, True, -100)


FUSED = {  # classes, and what is fused: the other code paths
    31: ["smoothed objective"],
    309: ["smoothed", "smoothed objective"],
    1000: ["values"],
    4096: ["logits", "losses", "objective"],
    5000: ["logits", "values", "losses", "smoothed", "objective", "smoothed objective"],
}


EVERY = tuple(TARGETS)
ONE = ("sm_90",)


def usual(name: str, modalities: int) -> list[tuple[str, tuple]]:
    """Every operator once, or in its two main forms."""
    found = [("fusion", (name, modalities, 1000, what)) for what in ("logits", "losses")]
    # 1100: in two parts
    found += [("alignment", (name, modalities, classes)) for classes in (31, 1100)]
    found += [("objective", (name, modalities, classes)) for classes in (31, 309)]
    found += [("trust", (name, modalities, classes)) for classes in (31, 1000)]
    return [*found, ("nearest", (name, modalities, 309)), ("update", (name, modalities, 309))]


def variants(full: bool) -> list[tuple[str, tuple, tuple[str, ...]]]:
    """(operator, arguments, targets) of every call to compile.

    All targets for bf16 and two modalities, all dtypes and six modalities for one target; with
    ``full``, which takes an hour of two cores, all of all.
    """
    found = []
    for name in ("bf16", "fp32", "fp16"):
        for modalities in (2, 6, 1, 3):
            main = modalities == 2 and name == "bf16"
            if full or modalities == 2 or (modalities, name) == (6, "bf16"):
                targets = EVERY if main or full else ONE
                found += [(*call, targets) for call in usual(name, modalities)]
        found.append(("distance", (name, 309), EVERY if full or name == "bf16" else ONE))
        if full or name == "bf16":
            found.append(("trust", (name, 2, 5000), EVERY if full else ONE))
            found += [
                ("fusion", (name, 2, size, what), EVERY if full else ONE)
                for size, whats in FUSED.items()
                for what in whats
                if full or (size, what) in ((1000, "values"), (5000, "objective"))
            ]
    # Many modalities times many classes in one tile
    found += [("objective", (name, 3, 128), EVERY if full else ONE) for name in ("bf16", "fp32")]
    # Rows enough to keep a device busy
    found += [("alignment", ("fp32", 2, 1100, "tall"), EVERY if full else ONE)]
    for name, classes, layout in (
        ("bf16, fp32", 309, "usual"),
        ("tf32", 309, "usual"),
        ("fp64", 309, "usual"),
        ("fp32", 309, "transposed"),
        ("fp32", 1, "ones"),
    ):
        modalities = 1 if layout == "ones" else 2
        rest = (name, modalities, min(31, classes), layout)
        calls = [("alignment", rest), ("objective", rest)]
        if full:
            calls += [
                ("update", (name, modalities, classes, layout)),
                ("alignment", (name, modalities, classes, layout)),
                ("nearest", (name, modalities, classes, layout)),
                ("distance", (name, classes, layout)),
            ]
        if full and name in DTYPES:
            calls += [
                ("fusion", (name, modalities, size, what, layout))
                for what in ("logits", "values", "losses", "objective")
                for size in {classes, 1 if classes == 1 else 5000}
            ]
            calls += [
                ("trust", (name, modalities, size, layout))
                for size in {classes, 1 if classes == 1 else 5000}
            ]
        found += [(*call, EVERY if full else ONE) for call in calls]
    return found


CALLS = {
    "fusion": _fusion,
    "alignment": _alignment,
    "objective": _objective,
    "nearest": _nearest,
    "distance": _distance,
    "update": _update,
    "trust": _trust,
}


def _modalities(named: dict) -> int:
    """How many modalities a launch is given, 1 where it has no such number."""
    if "flow" in named:  # of the nearest prototype's backward
        return len(named["flow"].features)
    constants = named.get("plan", named.get("HOW"))
    return int(named["M"] if "M" in named else getattr(constants, "M", 1))


def compile_variant(variant: tuple[str, tuple, tuple[str, ...]]) -> list[dict]:
    """One row for every launch of an operator call and every target."""
    operator, (dtype, *sizes), targets = variant
    rows = []
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    for target in targets:
        _tuning.hip = _runtime.hip = lambda: TARGETS[target].backend == "hip"
        _tuning.hopper = lambda device: target == "sm_90"
        _tuning.processors = lambda device: 132
        for kernel, named, options in recorded(
            lambda: CALLS[operator]({**DTYPES, **PAIRS}[dtype], *sizes)
        ):
            began = time.perf_counter()
            row = {
                "kernel": kernel.__name__,
                "dtype": dtype,
                "modalities": _modalities(named),
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
    output, full = Path(sys.argv[1]), "--full" in sys.argv
    chosen = [argument for argument in sys.argv[2:] if not argument.startswith("--")]
    wanted = [variant for variant in variants(full) if not chosen or variant[0] in chosen]
    with ProcessPoolExecutor(2) as pool:
        rows = [row for rows in pool.map(compile_variant, wanted) for row in rows]
    output.write_text(
        json.dumps(
            {"torch": torch.__version__, "triton": triton.__version__, "rows": rows}, indent=1
        )
    )


if __name__ == "__main__":
    main()
