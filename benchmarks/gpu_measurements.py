"""What a GPU session measures: ceilings of the device, every operator, an end-to-end step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch._functorch import config as functorch_config
from torch.nn import functional as F

import iib_kernels
from benchmarks import timing
from benchmarks.cases import ONLY_ALIGNMENT, OPS, Case, function, in_mode
from benchmarks.gpu_checks import DTYPES
from benchmarks.gpu_session import Session
from benchmarks.resnet import resnet18


def measure_ceilings(session: Session) -> dict:
    """Copy bandwidth and matrix products: what the kernels are measured against."""
    small = session.dry_run
    copy = timing.copy_bandwidth(session.device, mebibytes=1 if small else 1024)
    products = timing.matmul_rates(session.device, side=64 if small else 8192)
    session.results["ceilings"] = {"copy_bytes_per_second": copy, "matmul_flops": products}
    return session.results["ceilings"]


def _plan(session: Session, rows: Sequence[str]) -> Iterator[tuple[Case, str, str]]:
    """(case, dtype, row), one case's inputs at a time."""
    for dtype in DTYPES:
        for shape in session.shapes:
            for name, build in OPS.items():
                if shape == ONLY_ALIGNMENT and name != "alignment_loss":
                    continue
                if session.dry_run and "reference" not in rows and name != "gated_fusion":
                    continue  # a dry run compiles one operator only
                torch.manual_seed(0)
                case = build(shape, DTYPES[dtype], session.device)
                for row in (*rows, *(case.peers if "reference" in rows else ())):
                    yield case, dtype, row


def _measure_rows(session: Session, rows: Sequence[str]) -> dict:
    """Every mode of every planned row, until the section's time is over."""
    functorch_config.donated_buffer = False  # compiled backwards are repeated on one output
    copy, left_out = session.results.get("ceilings", {}).get("copy_bytes_per_second"), 0
    for case, dtype, row in _plan(session, rows):
        if session.left() < 0:
            left_out += 1
            continue
        if row.startswith("compiled"):
            torch._dynamo.reset()
        about = {"op": case.op, "shape": str(case.shape), "dtype": dtype, "row": row}
        try:
            forward = function(case, row)  # once: to compile it takes seconds
            calls = {mode: in_mode(forward, case, mode) for mode in case.modes}
        except Exception as error:
            session.add(**about, mode="step", error=f"{type(error).__name__}: {error}"[:500])
            continue
        for mode, call in calls.items():
            entry = {**about, "mode": mode, "least_bytes": case.bytes[mode]}
            try:
                entry |= timing.measure(
                    call, session.device, milliseconds=2 if session.dry_run else 30
                )
            except Exception as error:
                session.add(**entry, error=f"{type(error).__name__}: {error}"[:500])
                continue
            rate = case.bytes[mode] / entry.get("graph_seconds", entry["seconds"])
            share = {"share_of_copy": rate / copy} if copy else {}
            session.add(**entry, gigabytes_per_second=rate / 1e9, **share)
    return {"left_out": f"{left_out} rows: the section's time was over"} if left_out else {}


def measure_kernels(session: Session) -> dict:
    """The kernels beside the eager reference and peers."""
    return _measure_rows(session, ("reference", *([] if session.dry_run else ["triton"])))


def measure_compiled(session: Session) -> dict:
    """The reference through torch.compile."""
    return _measure_rows(session, ("compiled",))


def measure_autotuned(session: Session) -> dict:
    """The reference through torch.compile with max-autotune."""
    return _measure_rows(session, ("compiled max-autotune",))


def measure_end_to_end(session: Session) -> dict:
    """A training step of two ResNet-18 streams, and the share of it that is the head.

    The head is classifiers, alignment, fusion losses and prototypes.
    """
    batch, side, classes, width = (4, 32, 3, 4) if session.dry_run else (64, 224, 31, 64)
    streams = torch.nn.ModuleList([resnet18(3, width), resnet18(1, width)]).to(session.device)
    device = session.device
    inputs = [torch.randn(batch, channels, side, side, device=device) for channels in (3, 1)]
    targets = torch.randint(classes, (batch,), device=device)
    heads = torch.nn.ModuleList([torch.nn.Linear(8 * width, classes) for _ in streams]).to(device)
    tables = [F.normalize(torch.randn(classes, 8 * width, device=device)) for _ in streams]
    counts = torch.ones(classes, dtype=torch.int64, device=device)
    budgets = torch.tensor([0.6, 0.4], device=device)
    parameters = [*streams.parameters(), *heads.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-4)

    def losses(embeddings, implementation):
        logits = [head(values) for head, values in zip(heads, embeddings)]
        entropies = iib_kernels.fusion_cross_entropy(
            logits, targets, scale=2.0, uncertainty_weight=0.0, impl=implementation
        )
        contrastive, alignment, _ = iib_kernels.alignment_loss(
            embeddings, tables, targets, budgets, impl=implementation
        )
        for table, values in zip(tables, embeddings):
            iib_kernels.update_prototypes(
                table, counts, values.detach(), targets, impl=implementation
            )
        return entropies.fused + entropies.unimodal.sum() + contrastive.sum() + 5 * alignment.sum()

    alone = lambda embeddings: sum(values.float().square().mean() for values in embeddings)
    eager = lambda embeddings: losses(embeddings, "reference")
    variants = {"encoders alone": alone, "reference": eager}
    if not session.dry_run:
        variants["triton"] = lambda embeddings: losses(embeddings, "triton")
        variants["compiled"] = torch.compile(eager, dynamic=False)

    def step(head):
        def call():
            with torch.autocast(session.device, dtype=torch.bfloat16):
                embeddings = [stream(values) for stream, values in zip(streams, inputs)]
            head([values.float() for values in embeddings]).backward()
            optimizer.step()
            optimizer.zero_grad()

        return call

    found = {
        "batch": batch,
        "side": side,
        "classes": classes,
        "encoders": f"two ResNet-18, width {width}, bf16 autocast",
        "steps": {},
    }
    for name, head in variants.items():
        if session.left() < 0:
            found["left_out"] = "the section's time was over"
            break
        milliseconds = 5 if session.dry_run else 600
        measured = timing.measure(step(head), device, milliseconds=milliseconds)
        base = found["steps"].get("encoders alone", measured)["seconds"]
        found["steps"][name] = {**measured, "head_share": 1 - base / measured["seconds"]}
        session.results["sections"]["end_to_end"] = found
        session.save()
    return found
