"""A training step of two ResNet-18 streams on a GPU, and the share of it that is the head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._functorch import config as functorch_config
from torch.nn import functional as F

import iib_kernels
from benchmarks import timing
from benchmarks.gpu_session import Session
from benchmarks.resnet import resnet18
from benchmarks.shapes import PRECISIONS, conditions
from benchmarks.workers import Task
from iib_kernels.objective import multimodal_objective

ALONE = "encoders alone"
VARIANTS = (ALONE, "reference", "ours", "compiled")
LIMIT = 60.0


class Network(torch.nn.Module):
    """Encoders, classifiers and prototypes."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.streams = torch.nn.ModuleList([resnet18(3, width), resnet18(1, width)])
        self.heads = torch.nn.ModuleList([torch.nn.Linear(8 * width, classes) for _ in range(2)])
        for m in range(2):
            table = F.normalize(torch.randn(classes, 8 * width))
            self.register_buffer(f"table{m}", table)
            self.register_buffer(f"counts{m}", torch.ones(classes, dtype=torch.int64))
        self.register_buffer("budgets", torch.tensor([0.6, 0.4]))

    def embed(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [stream(values) for stream, values in zip(self.streams, inputs)]

    def loss(self, embeddings, targets, implementation: str) -> torch.Tensor:
        """The objective; it moves the prototypes as well."""
        logits = [head(values) for head, values in zip(self.heads, embeddings)]
        tables = [self.table0, self.table1]
        copies = [iib_kernels.snapshot(table) for table in tables]
        counts = [self.counts0, self.counts1]
        iib_kernels.update_prototypes_(
            tables, counts, [values.detach() for values in embeddings], targets, impl=implementation
        )
        return multimodal_objective(
            logits,
            targets,
            features=embeddings,
            prototypes=copies,
            budgets=self.budgets,
            uncertainty_weight=0.0,
            scale=2.0,
            impl=implementation,
        ).loss


def measure_step(device: str, dry_run: bool, variant: str) -> Iterator[dict]:
    """Time of one step, by graph and without one."""
    functorch_config.donated_buffer = False
    batch, side, classes, width = (4, 32, 3, 4) if dry_run else (64, 224, 31, 64)
    clock = timing.clock(device)
    row = "ours" if variant == "ours" else "reference"
    with clock.stream(), conditions(PRECISIONS["amp"], row, device):
        torch.manual_seed(0)
        network = Network(width, classes).to(device)
        inputs = [torch.randn(batch, channels, side, side, device=device) for channels in (3, 1)]
        targets = torch.randint(classes, (batch,), device=device)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
        ours = "triton" if device == "cuda" else "auto"
        implementation = ours if variant == "ours" else "reference"
        head = lambda embeddings: network.loss(embeddings, targets, implementation)
        if variant == "compiled":
            head = torch.compile(head, dynamic=False)
        if variant == ALONE:
            head = lambda embeddings: sum(values.float().square().mean() for values in embeddings)

        def step():
            optimizer.zero_grad()
            # A cache of weights in half precision would outlive the graph's capture
            with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
                loss = head(network.embed(inputs))
            loss.backward()
            optimizer.step()

        milliseconds = 5 if dry_run else 400
        entry = {
            "op": "training_step",
            "mode": "step",
            "shape": f"B={batch} K={classes} two ResNet-18, {side} x {side}, width {width}",
            "precision": "amp",
            "row": variant,
        }
        yield entry | timing.measure(clock, [step], milliseconds=milliseconds)
        plain = timing.measure(clock, [step], milliseconds=milliseconds, graph=False)
        # As a training loop without graphs runs it, the launches' gaps included
        yield {**entry, "op": "training_step, no graph", **plain}


def measure_end_to_end(session: Session) -> dict:
    """Every variant; the head's share is what it takes beyond the encoders alone."""
    arguments = session.device, session.dry_run
    variants = VARIANTS[:3] if session.dry_run else VARIANTS
    tasks = [Task(measure_step, (*arguments, variant), variant) for variant in variants]
    medians: dict[str, float] = {}
    found: dict = {"head_share": {}, "failed": {}, "left_out": []}
    for event in session.run(tasks, LIMIT):
        label = event.task.label
        if event.kind == "value":
            session.add(**event.value)
            if event.value["op"] == "training_step":
                medians[label] = event.value["p50"]
                alone = medians.get(ALONE, medians[label])
                found["head_share"][label] = round(1 - alone / medians[label], 4)
        elif event.kind == "left out":
            found["left_out"].append(label)
        elif event.kind in ("error", "late"):
            found["failed"][label] = str(event.value)
        session.note("end_to_end", **found)
    return found
