"""How the kernels live with torch.

Derivatives, opcheck, torch.compile, autocast, two processes, transforms, launches, and which
implementation runs.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
import interpreter

import iib_kernels
from iib_kernels import (
    _runtime,
    _tuning,
    alignment_loss,
    fusion_cross_entropy,
    gated_fusion,
    multimodal_objective,
    nearest_prototype,
    prototype_distance,
    trusted_fusion,
    update_prototypes,
    update_prototypes_,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[2]
ops = torch.ops.iib
cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def checked():
    """The sanitizer around every interpreted kernel."""
    with (
        interpreter.sanitized() if interpreter.interpreted() else contextlib.nullcontext() as report
    ):
        yield report


def draw(*size, dtype=torch.float64, grad=False, seed=0):
    """Random numbers, the same for the same sizes and seed."""
    generator = torch.Generator().manual_seed(seed + 1000 * sum(size))
    return (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        .to(DEVICE, dtype)
        .requires_grad_(grad)
    )


def fusion_inputs(batch=3, classes=4, modalities=2, dtype=torch.float64, grad=True):
    """logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, mask and targets."""
    logits = [draw(batch, classes, dtype=dtype, grad=grad, seed=m) for m in range(modalities)]
    vector = lambda seed: (
        (draw(modalities, dtype=dtype, seed=seed).abs() + 0.5).detach().requires_grad_(grad)
    )
    mask = torch.ones(batch, modalities, dtype=torch.bool, device=DEVICE)
    mask[-1, 0] = False
    targets = torch.arange(batch, device=DEVICE) % classes
    targets[1] = -100
    return (
        logits,
        vector(1),
        draw(batch, modalities, dtype=dtype, grad=grad),
        vector(2),
        vector(3),
        torch.full((), 1.7, dtype=dtype, device=DEVICE, requires_grad=grad),
        mask,
        targets,
    )


def tables(batch=4, classes=5, widths=(3, 4), dtype=torch.float64, grad=True):
    """features, prototypes, targets, budgets."""
    features = [
        draw(batch, width, dtype=dtype, grad=grad, seed=m) for m, width in enumerate(widths)
    ]
    prototypes = [draw(classes, width, dtype=dtype, seed=m) for m, width in enumerate(widths)]
    return (
        features,
        prototypes,
        torch.arange(batch, device=DEVICE) % classes,
        torch.tensor([0.9, 0.6, 0.3], device=DEVICE, dtype=dtype)[: len(widths)],
    )


# ----- derivatives


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 4, 4099])
@pytest.mark.parametrize("what", ["logits", "values", "losses", "smoothed losses"])
def test_float64_gradcheck_of_fusion(classes, what):
    logits, prior, gate, temperature, kappa, scale, mask, targets = fusion_inputs(
        2 if classes > 1024 else 3, classes
    )
    targets = targets.clamp_min(0) if classes > 1024 else targets
    values = [draw(len(targets), 3, grad=True, seed=9 + m) for m in range(2)]
    smoothed = {"label_smoothing": 0.2, "weight": draw(classes, seed=8).abs() + 0.1}

    def call(prior, gate, temperature, kappa, scale, *logits):
        logits, values = logits[:2], logits[2:]
        arguments = dict(
            gate_logits=gate,
            temperature=temperature,
            uncertainty_weight=kappa,
            scale=scale,
            mask=mask,
            impl="triton",
        )
        if "losses" in what:
            arguments |= smoothed if "smoothed" in what else {}
            return tuple(
                fusion_cross_entropy(logits, targets, prior, reduction="none", **arguments)
            )
        return tuple(gated_fusion(logits, prior, values=values or None, **arguments))

    rows = [*logits, *values] if what == "values" else logits
    assert torch.autograd.gradcheck(
        call, (prior, gate, temperature, kappa, scale, *rows), fast_mode=classes > 1024
    )
    single = torch.full((), 0.8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t, k: call(prior, gate, t, k, scale, *rows),
        (single, single.detach().clone().requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("classes", [5, 130])
def test_float64_gradcheck_of_distances_and_alignment(metric, classes):
    features, prototypes, targets, budgets = tables(3, classes)
    seen = torch.ones(classes, dtype=torch.bool, device=DEVICE)
    seen[-1] = False
    mask = torch.tensor([[True, True], [True, False], [True, True]], device=DEVICE)
    fast = classes > 100
    leaf = prototypes[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, p: prototype_distance(f, p, metric=metric, impl="triton"),
        (features[0], leaf),
        fast_mode=fast,
    )
    assert torch.autograd.gradcheck(
        lambda *f: (
            nearest_prototype(f, prototypes, metric=metric, seen=seen, impl="triton").distance
        ),
        features,
        fast_mode=fast,
    )
    arguments = dict(metric=metric, seen=seen, mask=mask, reduction="none", temperature=0.7)
    call = lambda *f: alignment_loss(f, prototypes, targets, budgets, impl="triton", **arguments)
    assert torch.autograd.gradcheck(lambda *f: call(*f).contrastive, features, fast_mode=fast)
    # delta and q_a carry no gradient by definition, so differences of the alignment term are not
    # its derivative: the reference's is
    expected = alignment_loss(features, prototypes, targets, budgets, impl="reference", **arguments)
    for found, right in zip(
        torch.autograd.grad(call(*features).alignment.sum(), features),
        torch.autograd.grad(expected.alignment.sum(), features),
    ):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
    assert expected.alignment.abs().sum() > 0


TABLE = draw(5, 4)
LABELS = torch.zeros(3, dtype=torch.int64, device=DEVICE)
KNOWN = torch.ones(5, dtype=torch.bool, device=DEVICE)
SECOND = {
    "gated_fusion": lambda l: gated_fusion([l, l * 2], impl="triton").logits,
    "trusted_fusion": lambda l: trusted_fusion([l, l * 2], l[:, :2], impl="triton").logits,
    "fusion_cross_entropy": lambda l: fusion_cross_entropy([l, l * 2], LABELS, impl="triton").fused,
    "alignment_loss": lambda f: (
        alignment_loss([f], [TABLE], LABELS, [1.0], impl="triton").contrastive
    ),
    "nearest_prototype": lambda f: nearest_prototype([f], [TABLE], impl="triton").distance,
    "prototype_distance": lambda f: prototype_distance(f, TABLE, impl="triton"),
}


@pytest.mark.parametrize("name", SECOND)
def test_what_the_kernels_do_not_differentiate_raises(name):
    """Never a silent zero: second derivatives, forward-mode derivatives and vmap say what to do.

    func.grad is right.
    """
    call, leaf = SECOND[name], draw(3, 4, grad=True)
    (first,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
    assert first.abs().sum() > 0  # create_graph by itself works
    with pytest.raises(
        NotImplementedError,
        match=f"{name}: the Triton kernels have no second derivative; use impl='reference'",
    ):
        torch.autograd.grad(first.sum(), leaf)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.functional.hessian(lambda value: call(value).square().sum(), leaf.detach())
    torch.testing.assert_close(
        torch.func.grad(lambda value: call(value).square().sum())(leaf.detach()), first.detach()
    )
    with pytest.raises(NotImplementedError, match="no jvp .*use impl='reference'"):
        torch.func.jvp(call, (leaf.detach(),), (torch.ones_like(leaf),))
    with pytest.raises(NotImplementedError, match="no vmap .*use impl='reference'"):
        torch.func.vmap(call)(torch.stack([leaf.detach()] * 2))
    # Which maps backward alone
    with pytest.raises(NotImplementedError, match=f"{name}: .* no vmap.*use impl='reference'"):
        torch.func.jacrev(call)(leaf.detach())
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no jvp .*use impl='reference'"),
    ):
        torch.autograd.forward_ad.unpack_dual(
            call(torch.autograd.forward_ad.make_dual(leaf.detach(), torch.ones_like(leaf)))
        )


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("classes", [4, 4099])
def test_whatever_stands_in_an_ignored_row_reaches_no_gradient(garbage, classes):
    logits, prior, gate, temperature, kappa, scale, mask, targets = fusion_inputs(classes=classes)
    leaves, results = [prior, gate, temperature, kappa, scale, *logits], []
    for value in (1.0, garbage):
        with torch.no_grad():
            for table in logits:
                table[1] = value
        out = fusion_cross_entropy(
            logits,
            targets,
            prior,
            gate_logits=gate,
            temperature=temperature,
            uncertainty_weight=kappa,
            scale=scale,
            impl="triton",
        )
        results.append(
            [out.fused, out.unimodal, *torch.autograd.grad(out.fused + out.unimodal.sum(), leaves)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results)) and results[0][3][1].abs().sum() == 0


# ----- the operators


def operator_calls():
    """(operator, arguments) of every operator, with what is optional and without."""
    logits, prior, gate, temperature, kappa, scale, mask, targets = fusion_inputs(
        dtype=torch.float32
    )
    plain = [value.detach() for value in logits]
    numbers = [1.0, 1.0, 1.0]
    for full in (False, True):
        parameters = (
            (temperature.detach(), kappa.detach(), scale.detach(), numbers, mask)
            if full
            else (None, None, None, numbers, None)
        )
        first = (prior.detach(), gate.detach()) if full else (None, None)
        needs = (True, full, torch.float32 if full else None)
        class_weight = draw(4, dtype=torch.float32).abs() if full else None
        labels = (targets, -100, class_weight, 0.1 if full else 0.0)
        values = [value.detach()[:, :3] * 2 for value in logits] if full else []
        yield ops.gated_fusion, (logits, values, *first, *parameters)
        fused, weights, uncertainty, statistics = (
            value.detach() for value in ops.gated_fusion(plain, values, *first, *parameters)
        )
        yield (
            ops.gated_fusion_backward,
            (
                plain,
                values,
                *parameters,
                weights,
                statistics,
                fused,
                weights if full else None,
                uncertainty if full else None,
                *needs,
                full,
            ),
        )
        trust = draw(3, 2, dtype=torch.float32) if full else draw(2, dtype=torch.float32)
        doubted = (trust, *(parameters[0], parameters[2], [1.0, 1.0], parameters[4]))
        yield ops.trusted_fusion, (logits, *doubted)
        fused, _, kept = (value.detach() for value in ops.trusted_fusion(plain, *doubted))
        yield ops.trusted_fusion_backward, (plain, *doubted, kept, fused, *needs)
        reduction = "mean" if full else "none"
        yield ops.fusion_cross_entropy, (logits, *labels, *first, *parameters, reduction)
        nll, unimodal, weights, statistics, divisors = (
            value.detach()
            for value in ops.fusion_cross_entropy(plain, *labels, *first, *parameters, reduction)
        )
        yield (
            ops.fusion_cross_entropy_backward,
            (
                plain,
                *labels,
                *parameters,
                weights,
                statistics,
                divisors,
                nll,
                unimodal if full else None,
                None,
                *needs,
            ),
        )
    for classes in (5, 130):
        features, prototypes, targets, budgets = tables(3, classes, dtype=torch.float32)
        plain = [value.detach() for value in features]
        for full in (False, True):
            seen = [torch.ones(classes, dtype=torch.bool, device=DEVICE)] * 2 if full else []
            rest = (
                prototypes,
                targets,
                budgets,
                0.2,
                full,
                seen,
                torch.ones(3, 2, dtype=torch.bool, device=DEVICE) if full else None,
                -100,
            )
            reduction = "mean" if full else "none"
            yield ops.alignment_loss, (features, *rest, full, reduction)
            contrastive, alignment, _, *kept = (
                value.detach() for value in ops.alignment_loss(plain, *rest, True, reduction)
            )
            yield (
                ops.alignment_loss_backward,
                (plain, *rest, *kept, contrastive, alignment if full else None),
            )
            yield ops.nearest_prototype, (features, prototypes, full, seen)
            distance, index = (
                value.detach() for value in ops.nearest_prototype(plain, prototypes, full, seen)
            )
            yield ops.nearest_prototype_backward, (plain, prototypes, full, index, distance)
        yield ops.prototype_distance, (features[0], prototypes[0], True, True)
        distance, squares, others, _ = (
            value.detach() for value in ops.prototype_distance(plain[0], prototypes[0], True, True)
        )
        for needs in ((True, False), (False, True), (True, True)):
            yield (
                ops.prototype_distance_backward,
                (plain[0], prototypes[0], True, squares, others, distance, distance, *needs),
            )
        yield (
            ops.update_prototypes,
            (
                prototypes[0],
                torch.ones(classes, dtype=torch.int64, device=DEVICE),
                plain[0],
                targets,
                0.9,
                True,
                -100,
            ),
        )
        for mask in (None, torch.ones(3, 2, dtype=torch.bool, device=DEVICE)):
            counts = [torch.ones(classes, dtype=torch.int64, device=DEVICE) for _ in prototypes]
            yield (
                ops.update_prototypes_,
                (prototypes, counts, plain, targets, mask, 0.9, True, -100),
            )
        logits = [torch.randn(3, classes, device=DEVICE) for _ in features]
        numbers = [1.0, 1.0, 1.0, 1.0, 0.2, 0.0, 1.0, 1.0, 1.0]
        nothing = (None,) * 5
        for full in (False, True):
            given = (logits, targets, plain, prototypes, budgets, *nothing, [], None, None, numbers)
            arguments = (*given, full, True, False, -100, full)
            yield ops.multimodal_objective, arguments
        gradients = [value.detach() for value in ops.multimodal_objective(*arguments)[3]]
        factor = torch.tensor(2.0, device=DEVICE)
        yield ops.scale_gradients, (gradients, factor, [*logits, *plain])
        yield ops.snapshot, (prototypes[0],)
        yield ops.class_sums, (plain[0], targets, classes, True, -100)


@pytest.mark.slow
def test_opcheck_of_every_operator():
    seen = set()
    for operator, arguments in operator_calls():
        assert set(torch.library.opcheck(operator.default, arguments).values()) == {"SUCCESS"}
        seen.add(operator._qualified_op_name.removeprefix("iib::"))
    assert seen == {name for name in _defined()}


def _defined():
    """Names of all operators that the package registers."""
    return {
        schema.name.removeprefix("iib::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("iib::")
    }


# ----- torch.compile, autocast, checkpointing, processes


class Model(nn.Module):
    """All six operations in one forward; prototypes and counts are buffers that move."""

    def __init__(self, impl, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.impl = impl
        self.encoders = nn.ModuleList([nn.Linear(5, 6), nn.Linear(4, 7)])
        self.classifiers = nn.ModuleList([nn.Linear(6, classes), nn.Linear(7, classes)])
        for m, width in enumerate((6, 7)):
            self.register_buffer(f"prototypes_{m}", torch.randn(classes, width))
            self.register_buffer(f"counts_{m}", torch.ones(classes, dtype=torch.int64))
        self.to(DEVICE)

    def forward(self, inputs, targets):
        embeddings = [encoder(values) for encoder, values in zip(self.encoders, inputs)]
        logits = [classifier(values) for classifier, values in zip(self.classifiers, embeddings)]
        prototypes = [
            iib_kernels.snapshot(self.prototypes_0),
            iib_kernels.snapshot(self.prototypes_1),
        ]  # they move below
        surprise = nearest_prototype(embeddings, prototypes, impl=self.impl).distance
        fused = gated_fusion(logits, gate_logits=-surprise, impl=self.impl)
        entropies = fusion_cross_entropy(
            logits, targets, gate_logits=-surprise, scale=2.0, impl=self.impl
        )
        losses = alignment_loss(embeddings, prototypes, targets, [0.9, 0.5], impl=self.impl)
        spread = prototype_distance(embeddings[0], prototypes[0], impl=self.impl)
        update_prototypes_(
            [self.prototypes_0, self.prototypes_1],
            [self.counts_0, self.counts_1],
            embeddings,
            targets,
            impl=self.impl,
        )
        total = (
            entropies.fused
            + entropies.unimodal.sum()
            + losses.contrastive.sum()
            + 5 * losses.alignment.sum()
            + spread.float().mean()
        )
        return (
            total + fused.logits.float().square().mean() + (fused.weights * fused.uncertainty).sum()
        )


def results(model, batch, call=None, autocast=None):
    """Loss, gradients and prototypes after one step."""
    inputs, targets = (
        [draw(batch, 5, dtype=torch.float32), draw(batch, 4, dtype=torch.float32)],
        torch.arange(batch, device=DEVICE) % 3,
    )
    model.zero_grad()
    with torch.autocast(DEVICE, dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        loss = (model if call is None else call)(inputs, targets)
        if autocast == "inside":
            loss.backward()
    if autocast != "inside":
        loss.backward()
    return [
        loss.detach(),
        *(parameter.grad.clone() for parameter in model.parameters()),
        model.prototypes_0.clone(),
        model.counts_1.clone(),
    ]


@pytest.mark.parametrize(
    "backend, dynamic",
    [
        pytest.param("eager", False, marks=pytest.mark.slow),
        ("aot_eager", False),
        pytest.param("aot_eager", True, marks=pytest.mark.slow),
        pytest.param("inductor", False, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_fullgraph_compile_of_a_module_with_all_six(backend, dynamic):
    torch._dynamo.reset()
    eager, compiled = Model("triton"), Model("triton")
    call = torch.compile(compiled, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (
            (8, 11, 9) if dynamic else (8,)
        ):  # unlike every other size, which would be taken for it
            for found, expected in zip(results(compiled, batch, call), results(eager, batch)):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


COMPILED = {
    "gated_fusion": lambda x: gated_fusion([x, x * 2], impl="triton").logits,
    "the same logits twice": lambda x: gated_fusion([x, x], impl="triton").logits,
    "trusted_fusion": lambda x: trusted_fusion([x, x * 2], x[:, :2], impl="triton").logits,
    "fusion_cross_entropy": lambda x: fusion_cross_entropy([x, x * 2], LABELS, impl="triton").fused,
    "alignment_loss": lambda x: (
        alignment_loss([x, x * 2], [TABLE, TABLE], LABELS, [1.0, 0.5], impl="triton").contrastive
    ),
    "nearest_prototype": lambda x: (
        nearest_prototype([x, x * 2], [TABLE, TABLE], seen=KNOWN, impl="triton").distance
    ),
    "prototype_distance": lambda x: prototype_distance(x, TABLE, impl="triton"),
    "a distance to itself": lambda x: prototype_distance(x, x, impl="triton"),
}


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("fusion_cross_entropy", "trusted_fusion", "nearest_prototype")
        or name == "a distance to itself"
        else pytest.param(name, marks=pytest.mark.slow)
        for name in COMPILED
    ],
)
def test_compiled_code_without_gradients_and_inside_func_grad(name):
    """Evaluation, inputs new at each call, and ``torch.func.grad`` give what eager code gives.

    Derivatives that are not there raise.
    """
    torch._dynamo.reset()
    call = COMPILED[name]
    total = lambda x: call(x).square().sum()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        for seed in range(2):
            leaf = draw(3, 4, seed=seed)
            with torch.no_grad():
                assert torch.equal(compiled(leaf), call(leaf))
    torch.testing.assert_close(
        torch.compile(lambda x: torch.func.grad(total)(x), backend="aot_eager", fullgraph=True)(
            leaf
        ),
        torch.func.grad(total)(leaf),
    )
    for transformed in (
        lambda x: torch.func.jvp(call, (x,), (x,))[1],
        lambda x: torch.func.grad(lambda y: torch.func.grad(total)(y).sum())(x),
    ):
        with pytest.raises(
            Exception,
            match="the Triton kernels have no|second derivative|jvp|unsupported|Unsupported",
        ):
            torch.compile(transformed, backend="eager", fullgraph=True)(leaf)


def test_the_whole_module_equals_the_reference():
    for found, expected in zip(results(Model("triton"), 7), results(Model("reference"), 7)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast_changes_nothing_inside_the_kernels(where):
    """Under autocast embeddings and logits are bfloat16, prototypes float32.

    Backward inside the block gives the gradients of one outside.
    """
    found, expected = (
        results(Model("triton"), 5, autocast=where),
        results(Model("reference"), 5, autocast="outside"),
    )
    for value, right in zip(found, expected):
        torch.testing.assert_close(value, right, rtol=2e-2, atol=2e-2)
    for value, right in zip(found, results(Model("triton"), 5, autocast="outside")):
        torch.testing.assert_close(
            value, right, rtol=0, atol=1e-2 if value.dtype == torch.float32 else 0
        )


@pytest.mark.parametrize("name", COMPILED)
def test_activation_checkpointing(name):
    leaf = draw(3, 4, grad=True)
    call = lambda x: COMPILED[name](x).square().sum()
    found = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(call, leaf, use_reentrant=False), leaf
    )
    assert torch.equal(*found, *torch.autograd.grad(call(leaf), leaf)) and found[0].abs().sum() > 0


WORKER = """
import os, sys
sys.path[:0] = ["tests", "tests/kernels"]
import torch, torch.distributed as dist
import conftest
from torch.nn.parallel import DistributedDataParallel
import iib_kernels, test_triton_functions as T
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
model = T.Model("triton")
inputs = [T.draw(8, 5, dtype=torch.float32), T.draw(8, 4, dtype=torch.float32)]
targets = torch.arange(8) % 3
share = slice(4 * rank, 4 * rank + 4)
parallel = DistributedDataParallel(model, broadcast_buffers=False)
parallel([values[share] for values in inputs], targets[share]).backward()
expected = [torch.zeros_like(p) for p in model.parameters()]
for half in (slice(0, 4), slice(4, 8)):
    alone = T.Model("triton")
    alone([values[half] for values in inputs], targets[half]).backward()
    expected = [total + p.grad / 2 for total, p in zip(expected, alone.parameters())]
for p, right in zip(model.parameters(), expected):
    torch.testing.assert_close(p.grad, right, rtol=1e-5, atol=1e-6)
sums = iib_kernels.class_sums(inputs[0][share], targets[share], 3, impl="triton")
for value in sums:
    dist.all_reduce(value)
empty = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
moved, counts = iib_kernels.ema_from_sums(*empty, *sums)
both = [torch.empty_like(moved) for _ in range(2)]
dist.all_gather(both, moved)
assert torch.equal(*both) and counts.sum() == 8
whole, _ = iib_kernels.update_prototypes(*empty, inputs[0], targets, impl="triton")
torch.testing.assert_close(moved, whole)
print("rank", rank, "done")
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="two processes on the CPU")
def test_two_processes_over_gloo(tmp_path):
    """Gradients are the mean of the halves' and class sums make one table of prototypes."""
    port = str(29500 + os.getpid() % 2000)
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(
        process.returncode == 0 and f"rank {rank} done" in output
        for rank, (process, output) in enumerate(zip(processes, outputs))
    ), "\n".join(outputs)


# ----- launches and memory


def test_one_launch_forward_and_one_backward(checked):
    if checked is None:
        pytest.skip("launches are counted in the interpreter")
    logits, prior, gate, temperature, kappa, scale, mask, targets = fusion_inputs(
        classes=31, dtype=torch.float32
    )
    features, prototypes, labels, budgets = tables(dtype=torch.float32)
    many = tables(classes=140, dtype=torch.float32)
    leaf = prototypes[0].clone().requires_grad_()
    calls = {
        "gated_fusion": lambda: gated_fusion(
            logits, prior, gate_logits=gate, mask=mask, impl="triton"
        ),
        "gated_fusion of one tensor": lambda: gated_fusion(
            torch.stack([value.detach() for value in logits]).requires_grad_(), impl="triton"
        ),
        "trusted_fusion": lambda: trusted_fusion(
            logits, gate, temperature=temperature, scale=scale, mask=mask, impl="triton"
        )[:1],
        "fusion_cross_entropy": lambda: fusion_cross_entropy(
            logits,
            targets,
            prior,
            gate_logits=gate,
            temperature=temperature,
            uncertainty_weight=kappa,
            scale=scale,
            impl="triton",
        ),
        "alignment_loss": lambda: alignment_loss(
            features, prototypes, labels, budgets, impl="triton"
        )[:2],
        "alignment_loss of many classes": lambda: alignment_loss(*many, impl="triton")[:2],
        "nearest_prototype": lambda: nearest_prototype(features, prototypes, impl="triton")[:1],
        "prototype_distance": lambda: [prototype_distance(features[0], leaf, impl="triton")],
    }
    for name, call in calls.items():
        before = checked.count
        outputs = call()
        # Many classes: the tables, an attention by each posterior, and what follows from them
        forward = 4 if name == "alignment_loss of many classes" else 1
        assert checked.count == before + forward, name
        sum(value.sum() for value in outputs).backward()
        assert checked.count == before + forward + 1, name
    before = checked.count
    update_prototypes(
        prototypes[0], torch.zeros(5, dtype=torch.int64), features[0], labels, impl="triton"
    )
    assert checked.count == before + 1


def test_an_empty_batch_launches_nothing_but_has_gradients(checked):
    features, prototypes, targets, budgets = tables(batch=0)
    logits = [torch.empty(0, 4, device=DEVICE, requires_grad=True) for _ in range(2)]
    outputs = [
        *gated_fusion(logits, impl="triton"),
        *trusted_fusion(logits, torch.zeros(2, device=DEVICE), impl="triton"),
        *fusion_cross_entropy(logits, targets, impl="triton"),
        nearest_prototype(features, prototypes, impl="triton")[0],
        *alignment_loss(features, prototypes, targets, budgets, impl="triton")[:2],
        prototype_distance(features[0], prototypes[0], impl="triton"),
    ]
    for value in torch.autograd.grad(
        [value for value in outputs if value.requires_grad],
        [*logits, *features],
        [torch.zeros_like(value) for value in outputs if value.requires_grad],
    ):
        assert value.shape[0] == 0
    assert checked is None or checked.count == 0


@pytest.mark.parametrize("classes", [pytest.param(7, marks=pytest.mark.slow), 150])
def test_nothing_of_the_size_of_rows_times_classes_is_kept_or_made(classes, monkeypatch):
    batch = 13
    features, prototypes, targets, budgets = tables(batch, classes, dtype=torch.float32)
    made, kept, original = [], [], torch.Tensor.new_empty

    def recorded(self, *args, **kwargs):
        made.append(original(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value) or value, lambda value: value
    ):
        losses = alignment_loss(features, prototypes, targets, budgets, impl="triton")
        near = nearest_prototype(features, prototypes, impl="triton")
    torch.autograd.grad(
        losses.contrastive.sum() + losses.alignment.sum() + near.distance.sum(), features
    )
    padded = -(-classes // 128) * 128
    of_both = [
        tuple(value.shape)
        for value in [*made, *kept]
        if value.numel() >= batch * classes
        and batch in value.shape
        and any(size in value.shape for size in (classes, padded))
    ]
    assert made and kept and not of_both


def test_narrow_targets_of_many_classes():
    """A class whose number is all ones in the targets' type does not stand for rows beyond the
    batch.
    """
    features, targets = (
        draw(3, 4, dtype=torch.float32),
        torch.tensor([255, 7, 255], dtype=torch.uint8, device=DEVICE),
    )
    for found, expected in zip(
        iib_kernels.class_sums(features, targets, 256, impl="triton"),
        iib_kernels.class_sums(features, targets, 256, impl="reference"),
    ):
        torch.testing.assert_close(found, expected)


# ----- which implementation runs


def test_auto_on_the_cpu_is_plain_pytorch_even_where_kernels_could_be_interpreted(checked):
    if checked is None:
        pytest.skip("on a GPU auto is Triton")
    logits = [draw(3, 4), draw(3, 4, seed=1)]
    found, expected = (gated_fusion(logits, impl=impl).logits for impl in ("auto", "reference"))
    torch.testing.assert_close(found, expected)
    assert checked.count == 0


def test_triton_that_cannot_run_says_why(monkeypatch):
    logits = [torch.zeros(2, 3), torch.zeros(2, 3)]
    monkeypatch.setattr(_runtime, "interpreting", lambda: False)
    with pytest.raises(
        RuntimeError,
        match="impl='triton' cannot run: the tensors are on cpu; move them to a GPU, or set "
        "TRITON_INTERPRET=1",
    ):
        gated_fusion(logits, impl="triton")
    monkeypatch.setattr(
        _runtime,
        "triton_missing",
        lambda: "triton cannot be imported (no module); install triton>=3.6",
    )
    with pytest.raises(RuntimeError, match="install triton>=3.6"):
        nearest_prototype([torch.zeros(2, 3)], [torch.zeros(4, 3)], impl="triton")
    with pytest.raises(ValueError, match="impl: 'cuda' is none of auto, triton, reference"):
        update_prototypes(
            torch.zeros(2, 3),
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(1, 3),
            torch.zeros(1, dtype=torch.int64),
            impl="cuda",
        )


def test_importing_the_package_imports_no_triton():
    script = "import sys, iib_kernels; assert 'triton' not in sys.modules, 'triton'; print('ok')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


def test_every_operation_has_its_function_exported():
    for name in (
        "AlignmentLoss",
        "FusionCrossEntropy",
        "GatedFusion",
        "NearestPrototype",
        "PrototypeDistance",
        "TrustedFusion",
        "UpdatePrototypes",
    ):
        assert (
            issubclass(getattr(iib_kernels, f"{name}Function"), torch.autograd.Function)
            and f"{name}Function" in iib_kernels.__all__
        )


L, Z, P, Y = (
    [torch.zeros(2, 3)] * 2,
    [torch.ones(2, 3), torch.ones(2, 4)],
    [torch.ones(5, 3), torch.ones(5, 4)],
    torch.tensor([0, 1]),
)


@pytest.mark.skipif(DEVICE == "cuda", reason="values are looked at on the CPU only")
@pytest.mark.parametrize(
    "call, error, words",
    [
        (
            lambda i: gated_fusion([torch.zeros(2, 3), torch.zeros(2, 4)], impl=i),
            ValueError,
            r"logits\[1\]: expected shape \[2, 3\]",
        ),
        (
            lambda i: gated_fusion([torch.zeros(2, 3, dtype=torch.int64)], impl=i),
            TypeError,
            r"logits\[0\]: expected float16",
        ),
        (
            lambda i: gated_fusion(L, torch.zeros(3), impl=i),
            ValueError,
            "log_prior: expected shape",
        ),
        (
            lambda i: gated_fusion(L, mask=torch.tensor([[True, True], [False, False]]), impl=i),
            ValueError,
            "mask: row 1 has no modality present",
        ),
        (
            lambda i: fusion_cross_entropy(L, torch.tensor([0, 3]), impl=i),
            ValueError,
            "targets: row 1 holds 3, outside 0..2",
        ),
        (
            lambda i: fusion_cross_entropy(L, torch.tensor([0.0, 1.0]), impl=i),
            TypeError,
            "targets: expected int64",
        ),
        (
            lambda i: alignment_loss(Z, P, torch.tensor([0, 5]), [1.0, 0.5], impl=i),
            ValueError,
            "targets: row 1 holds 5, outside 0..4",
        ),
        (lambda i: alignment_loss(Z, P, Y, [1.0], impl=i), ValueError, "budgets: expected shape"),
        (
            lambda i: alignment_loss(
                Z, [p.clone().requires_grad_() for p in P], Y, [1.0, 0.5], impl=i
            ),
            ValueError,
            "prototypes: requires grad",
        ),
        (
            lambda i: alignment_loss(Z, P, Y, [1.0, 0.5], temperature=0.0, impl=i),
            ValueError,
            "temperature: expected a number above 0",
        ),
        (
            lambda i: nearest_prototype(Z, P, seen=torch.ones(4, dtype=torch.bool), impl=i),
            ValueError,
            r"seen\[0\]: expected shape",
        ),
        (
            lambda i: prototype_distance(torch.zeros(2, 3), torch.zeros(5, 4), impl=i),
            ValueError,
            r"features: expected shape \[..., D\] with D = 4",
        ),
        (
            lambda i: prototype_distance(torch.zeros(2, 3), P[0].to("meta"), impl=i),
            ValueError,
            "prototypes: is on meta",
        ),
        (
            lambda i: update_prototypes(P[0], torch.zeros(5), Z[0], Y, impl=i),
            TypeError,
            "counts: expected an int64 tensor",
        ),
        (
            lambda i: update_prototypes(
                P[0], torch.zeros(5).long(), Z[0], torch.tensor([0, 9]), impl=i
            ),
            ValueError,
            "targets: row 1 holds 9",
        ),
    ],
)
def test_wrong_input_is_named_alike_by_both(call, error, words):
    for implementation in ("triton", "reference"):
        with pytest.raises(error, match=words):
            call(implementation)


# ----- autotuning


def test_autotuning_times_candidates_once_and_never_when_interpreting(monkeypatch):
    candidates = [_tuning.Launch({"BLOCK": size}) for size in (16, 32, 64)]
    launched, timed = [], []
    launch = lambda candidate: launched.append(candidate.blocks["BLOCK"])

    def bench(call, return_mode):
        call()
        timed.append(launched[-1])
        return {16: 3.0, 32: 1.0, 64: 2.0}[launched[-1]]

    monkeypatch.setattr("triton.testing.do_bench", bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_tuning, "_best", {})
    monkeypatch.setattr(_tuning, "interpreting", lambda: True)
    monkeypatch.setenv("IIB_KERNELS_AUTOTUNE", "1")
    _tuning.run(("k",), candidates, launch)
    assert (launched, timed) == ([16], [])
    monkeypatch.setattr(_tuning, "interpreting", lambda: False)
    for _ in range(2):
        _tuning.run(("k",), candidates, launch)
    assert timed == [16, 32, 64] and launched[-2:] == [32, 32]
    monkeypatch.setenv("IIB_KERNELS_AUTOTUNE", "0")
    _tuning.run(("k",), candidates, launch)
    assert launched[-1] == 16 and len(timed) == 3


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch):
    """Timing synchronises, which ends the capture; afterwards the size is timed as any other."""
    candidates = [_tuning.Launch({"BLOCK": size}) for size in (16, 32)]
    launched, capturing = [], [True]
    launch = lambda candidate: launched.append(candidate.blocks["BLOCK"])

    def bench(call, return_mode):
        assert not capturing[0]
        call()
        return -launched[-1]

    monkeypatch.setattr("triton.testing.do_bench", bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(_tuning, "_best", {})
    monkeypatch.setattr(_tuning, "autotuning", lambda: True)
    _tuning.run(("k",), candidates, launch)
    assert launched == [16] and not _tuning._best
    capturing[0] = False
    _tuning.run(("k",), candidates, launch)
    assert launched == [16, 16, 32, 32]
    capturing[0] = True
    _tuning.run(("k",), candidates, launch)
    assert launched[-1] == 32  # what was timed before holds inside a capture too


# ----- on a GPU


def gpu_calls():
    """Every differentiable operation with numbers, masks and targets: (call, leaves)."""
    logits, prior, gate, temperature, kappa, scale, mask, targets = fusion_inputs(
        dtype=torch.float32
    )
    features, prototypes, labels, budgets = tables(dtype=torch.float32)
    return {
        "gated_fusion": (
            lambda: gated_fusion(
                logits, prior, gate_logits=gate, mask=mask, scale=2.0, impl="triton"
            ),
            logits,
        ),
        "trusted_fusion": (
            lambda: trusted_fusion(
                logits, gate, temperature=temperature, scale=2.0, mask=mask, impl="triton"
            )[:1],
            [*logits, gate, temperature],
        ),
        "fusion_cross_entropy": (
            lambda: fusion_cross_entropy(
                logits, targets, gate_logits=gate, temperature=0.7, impl="triton"
            )[:2],
            logits,
        ),
        "alignment_loss": (
            lambda: alignment_loss(features, prototypes, labels, [0.9, 0.5], impl="triton")[:2],
            features,
        ),
        "multimodal_objective": (
            lambda: multimodal_objective(
                logits,
                targets,
                features=features,
                prototypes=prototypes,
                budgets=torch.tensor([0.9, 0.5], device=DEVICE),
                impl="triton",
            )[:1],
            [*logits, *features],
        ),
        "nearest_prototype": (
            lambda: nearest_prototype(features, prototypes, impl="triton")[:1],
            features,
        ),
        "prototype_distance": (
            lambda: [prototype_distance(features[0], prototypes[0], impl="triton")],
            features[:1],
        ),
    }


def stepped(call, leaves):
    """Gradients of the sum of all outputs."""
    return torch.autograd.grad(sum(value.sum() for value in call()), leaves)


@cuda_only
@pytest.mark.parametrize(
    "name",
    [
        "gated_fusion",
        "trusted_fusion",
        "fusion_cross_entropy",
        "alignment_loss",
        "multimodal_objective",
        "nearest_prototype",
        "prototype_distance",
    ],
)
def test_on_a_gpu_graph_capture_repeats_and_no_synchronisation(name):
    call, leaves = gpu_calls()[name]
    expected = stepped(call, leaves)
    assert all(
        torch.equal(a, b) for _ in range(20) for a, b in zip(stepped(call, leaves), expected)
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepped(call, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        stepped(call, leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = stepped(call, leaves)
    for value in captured:
        value.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))


MEANS = ["fusion_cross_entropy", "alignment_loss", "multimodal_objective"]


@cuda_only
@pytest.mark.parametrize("name", MEANS)
def test_on_a_gpu_graphs_share_no_counter(name):
    """The second of two graphs gives the same before the first has run, and both at once."""
    call, leaves = gpu_calls()[name]
    expected = stepped(call, leaves)
    graphs, found = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found.append(stepped(call, leaves))
        graphs.append(graph)
    graphs[1].replay()
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected))
    streams = [torch.cuda.Stream() for _ in graphs]
    for stream, graph in zip(streams, graphs):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(50):
                graph.replay()
    torch.cuda.synchronize()
    for values in found:
        assert all(torch.equal(a, b) for a, b in zip(values, expected))
    assert all(torch.equal(a, b) for a, b in zip(stepped(call, leaves), expected))


@cuda_only
@pytest.mark.parametrize("name", MEANS)
def test_on_a_gpu_compiled_with_graphs(name):
    call, leaves = gpu_calls()[name]
    expected = stepped(call, leaves)
    compiled = torch.compile(lambda: sum(value.sum() for value in call()), mode="reduce-overhead")
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        for a, b in zip(torch.autograd.grad(compiled(), leaves), expected):
            torch.testing.assert_close(a, b)


def test_the_default_stream_alone_keeps_a_counter(monkeypatch):
    """What a captured stream allocates belongs to its graph."""
    from iib_kernels.ops import arguments

    class Stream:
        cuda_stream = 0

    made = []
    monkeypatch.setattr(arguments, "_tickets", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: made.append(1) or torch.ones(1))
    device = torch.device("cuda", 0)
    assert arguments.tickets(device) is arguments.tickets(device) and len(made) == 1
    Stream.cuda_stream = 7
    assert arguments.tickets(device) is not arguments.tickets(device) and len(made) == 3
    assert arguments.tickets(torch.device("cpu")) is not arguments.tickets(torch.device("cpu"))
