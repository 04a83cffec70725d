"""Tensors of the meta device: shapes and dtypes without values, forward and backward.

They are those that the same call gives on the CPU; values are never looked at.
"""

import copy
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import iib_kernels
from iib_kernels import modules, nearest_prototype
from iib_kernels.cpu import alignment_rows
from iibalance.errors import InputError
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.model import MultimodalClassifier

FLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
# B, K, M: few classes, one modality, rows in registers, streamed rows
SIZES = [(5, 3, 2), (4, 7, 1), (6, 200, 3), (3, 5000, 2)]
IMPLEMENTATIONS = ["auto", "reference", "triton"]


def cases(batch, classes, count, dtype):
    """Every public function's calls, by name: (function, its arguments by name)."""
    random = lambda *size, kind=dtype: torch.randn(*size).to(kind)
    logits = [random(batch, classes) for _ in range(count)]
    features = [random(batch, 8 + index) for index in range(count)]
    prototypes = [random(classes, 8 + index, kind=FLOAT) for index in range(count)]
    values = [random(batch, 10, kind=HALF) for _ in range(count)]
    targets = torch.arange(batch) % classes
    mask = torch.ones(batch, count, dtype=torch.bool)
    gate = {
        "log_prior": random(count, kind=FLOAT),
        "gate_logits": random(batch, count),
        "temperature": torch.ones(count),
        "uncertainty_weight": torch.ones(()),
        "mask": mask,
    }
    labels = {"targets": targets, "weight": torch.ones(classes), "label_smoothing": 0.1}
    tables = {"features": features, "prototypes": prototypes}
    seen = {"seen": [torch.ones(classes, dtype=torch.bool)] * count}
    anchored = {**tables, "targets": targets, "budgets": [0.5] * count}
    moved = {"prototypes": prototypes[0], "features": features[0], "targets": targets}
    counts = lambda: torch.ones(classes, dtype=torch.int64)
    own = iib_kernels
    found = {
        "fusion": (own.gated_fusion, {"logits": logits}),
        "fusion, gated": (own.gated_fusion, {"logits": logits, **gate, "scale": "present"}),
        "fusion of values": (own.gated_fusion, {"logits": logits, "values": values, **gate}),
        "fusion of images": (own.gated_fusion, {"logits": random(count, 2, 3, batch, classes)}),
        "trust": (own.trusted_fusion, {"logits": logits}),
        "trust, all": (
            own.trusted_fusion,
            {
                "logits": logits,
                "trust_logits": random(batch, count),
                "temperature": torch.ones(count),
                "scale": torch.ones(()),
                "mask": mask,
            },
        ),
        "trust of images": (
            own.trusted_fusion,
            {"logits": random(count, 2, 3, batch, classes), "trust_logits": random(count)},
        ),
        "distance": (
            own.prototype_distance,
            {"features": features[0], "prototypes": prototypes[0]},
        ),
        "nearest": (own.nearest_prototype, tables),
        "nearest seen": (own.nearest_prototype, {**tables, **seen}),
        "objective": (own.multimodal_objective, {"logits": logits, **gate, **labels}),
        "objective, all": (
            own.multimodal_objective,
            {"logits": logits, **gate, **labels, **anchored, **seen},
        ),
        "sums": (
            own.class_sums,
            {"features": features[0], "targets": targets, "num_classes": classes},
        ),
        "update": (own.update_prototypes, {**moved, "counts": counts()}),
    }
    for reduction in ("mean", "sum", "none"):
        how = {"reduction": reduction}
        found |= {
            f"entropies, {reduction}": (
                own.fusion_cross_entropy,
                {"logits": logits, **labels} | how,
            ),
            f"entropies, gated, {reduction}": (
                own.fusion_cross_entropy,
                {"logits": logits, **gate, **labels} | how,
            ),
            f"alignment, {reduction}": (
                own.alignment_loss,
                {**anchored, **seen, "mask": mask} | how,
            ),
        }
    return found


def on(device, arguments):
    """The arguments there, floating-point ones of the models as leaves that ask for gradients."""

    def move(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().to(device, copy=True)
        wanted = name in ("logits", "features", "values", "log_prior", "gate_logits", "temperature")
        wanted |= name in ("trust_logits", "scale")
        return value.requires_grad_(wanted and value.is_floating_point())

    return {
        name: [move(name, each) for each in value] if isinstance(value, list) else move(name, value)
        for name, value in arguments.items()
    }


def leaves_of(arguments):
    flat = torch.utils._pytree.tree_leaves(arguments)
    return [value for value in flat if isinstance(value, torch.Tensor) and value.requires_grad]


def described(values):
    """Shapes and dtypes, in the same structure."""
    return tree_map(lambda value: None if value is None else (value.shape, value.dtype), values)


def call(function, arguments, **options):
    """Outputs and the leaves' gradients."""
    out = function(**arguments, **options)
    differentiable = [
        value
        for value in torch.utils._pytree.tree_leaves(out)
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    leaves = leaves_of(arguments)
    gradients = []
    if differentiable:
        gradients = torch.autograd.grad(
            [value.sum() for value in differentiable], leaves, allow_unused=True
        )
    return out, list(gradients)


@pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_function_tells_shapes_and_dtypes(sizes, dtype, impl):
    """As on the CPU, gradients included."""
    for name, (function, arguments) in cases(*sizes, dtype).items():
        expected, gradients = call(function, on("cpu", arguments), impl="reference")
        found, others = call(function, on("meta", arguments), impl=impl)
        flat = torch.utils._pytree.tree_leaves([found, others])
        assert all(value.is_meta for value in flat if value is not None), name
        assert described(found) == described(expected), name
        assert type(found) is type(expected), name
        assert described(others) == described(gradients), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_one_and_of_none(batch, impl):
    for name, (function, arguments) in cases(batch, 4, 2, FLOAT).items():
        expected = call(function, on("cpu", arguments), impl="reference")
        found = call(function, on("meta", arguments), impl=impl)
        assert described(found) == described(expected), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_functions_without_outputs_and_without_implementations(impl):
    tables, counts = ([torch.empty(*size, device="meta") for _ in "ab"] for size in ((3, 4), (3,)))
    counts = [value.long() for value in counts]
    features, targets = [torch.empty(5, 4, device="meta")] * 2, torch.empty(5, device="meta").long()
    mask = torch.empty(5, 2, dtype=torch.bool, device="meta")
    moved = iib_kernels.update_prototypes_(tables, counts, features, targets, mask=mask, impl=impl)
    assert moved is None
    sums = iib_kernels.class_sums(features[0], targets, 3, impl=impl)
    after = iib_kernels.ema_from_sums(tables[0].half(), counts[0], *sums)
    assert described(after) == ((torch.Size([3, 4]), torch.half), (torch.Size([3]), torch.int64))
    copied = iib_kernels.snapshot(tables[0])
    assert copied.is_meta and copied.shape == (3, 4) and copied is not tables[0]


def test_targets_and_masks_are_not_looked_at():
    """On the CPU both are refused."""
    logits, targets = [torch.zeros(2, 3)] * 2, torch.tensor([0, 9])
    mask = torch.zeros(2, 2, dtype=torch.bool)
    for device in ("cpu", "meta"):
        given = {"logits": [rows.to(device) for rows in logits], "targets": targets.to(device)}
        if device == "meta":
            out = iib_kernels.fusion_cross_entropy(**given, mask=mask.to(device))
            assert out.fused.is_meta and out.unimodal.shape == (2,)
            continue
        with pytest.raises(ValueError, match="targets: row 1 holds 9"):
            iib_kernels.fusion_cross_entropy(**given)
        with pytest.raises(ValueError, match="mask: row 0 has no modality"):
            iib_kernels.gated_fusion(logits, mask=mask)


def test_shapes_are_checked_as_everywhere():
    empty = lambda *size: torch.empty(*size, device="meta")
    with pytest.raises(ValueError, match=r"logits\[1\]: expected shape \[2, 3\]"):
        iib_kernels.gated_fusion([empty(2, 3), empty(2, 4)])
    with pytest.raises(ValueError, match="prototypes.*: is on cpu, the other arguments on meta"):
        nearest_prototype([empty(2, 3)], [torch.zeros(5, 3)])


def test_second_derivatives_have_shapes_too():
    """Those of the reference; the kernels refuse them here as on a GPU."""
    arguments = on("meta", cases(5, 3, 2, FLOAT)["alignment, mean"][1])
    for impl in ("reference", "triton"):
        out = iib_kernels.alignment_loss(**arguments, impl=impl)
        (first, *_) = torch.autograd.grad(
            out.contrastive.sum() + out.alignment.sum(), leaves_of(arguments), create_graph=True
        )
        if impl == "triton":
            with pytest.raises(NotImplementedError, match="no second derivative"):
                first.square().sum().backward()
            continue
        second = torch.autograd.grad(first.square().sum(), arguments["features"][0])[0]
        assert second.is_meta and second.shape == (5, 8)


def test_modules_and_autocast():
    fuse = modules.GatedFusion(scale=2.0)
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        out = fuse([torch.zeros(4, 3), torch.zeros(4, 3)])
    assert out.logits.is_meta and out.logits.dtype == FLOAT and out.weights.shape == (4, 2)


def test_products_are_counted():
    """The distances are one product of [B, D] and [D, K]: 2 B D K operations."""
    features, table = torch.empty(50, 16, device="meta"), torch.empty(7, 16, device="meta")
    with FlopCounterMode(display=False) as counter:
        iib_kernels.prototype_distance(features, table)
    assert counter.get_total_flops() == 2 * 50 * 16 * 7


# ----- Models made without memory


def head_of(**options):
    torch.manual_seed(0)
    return IIBalanceHead({"audio": 6, "visual": 6}, 3, budgets=(0.8, 0.3), **options)


def rows(size=9):
    generator = torch.Generator().manual_seed(size)
    return [torch.randn(size, 6, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_head_on_the_meta_device_predicts_and_trains(impl, masked):
    mask = torch.ones(9, 2, dtype=torch.bool) if masked else None
    with torch.device("meta"):
        head = head_of(impl=impl)
    given = [values.to("meta") for values in rows()]
    targets = torch.empty(9, dtype=torch.int64, device="meta")
    for training in (True, False):
        expected = head_of().train(training)(rows(), torch.arange(9) % 3, mask=mask)
        found = head.train(training)(given, targets, mask=None if mask is None else mask.to("meta"))
        for name in ("logits", "weights", "uncertainty", "modality_logits", "loss", "parts"):
            assert described(getattr(found, name)) == described(getattr(expected, name)), name
        found.loss.backward()
    gradients = [value.grad for value in head.classifiers.parameters()]
    assert [value.shape for value in gradients] == [(3, 6), (3,)] * 2
    assert not head.prototypes.complete


@pytest.mark.parametrize("assign", [False, True])
def test_a_head_made_on_the_meta_device_is_filled_later(assign):
    """By to_empty and load_state_dict, or by the loaded tensors themselves."""
    trained = head_of()
    for _ in range(2):
        trained(rows(), torch.arange(9) % 3).loss.backward()
    with torch.device("meta"):
        head = head_of()
    assert all(value.is_meta for value in head.state_dict().values())
    state = copy.deepcopy(trained.state_dict())
    head = head if assign else head.to_empty(device="cpu")
    head.load_state_dict(state, assign=assign)
    for mask in (None, torch.tensor([[True, False]] * 9)):
        found, expected = (each.eval()(rows(), mask=mask) for each in (head, trained))
        for name in ("logits", "trust", "uncertainty"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
    steps = [each.train()(rows(4), torch.tensor([0, 1, 2, 0])) for each in (head, trained)]
    assert head.prototypes.complete and torch.equal(*(out.loss for out in steps))
    for a, b in zip(*(each.state_dict().values() for each in (head, trained)), strict=True):
        assert torch.equal(a, b)


def test_a_classifier_on_the_meta_device():
    with torch.device("meta"):
        encoders = {"audio": nn.Linear(5, 6), "visual": nn.Linear(4, 6)}
        model = MultimodalClassifier(encoders, 3)
        inputs = {"audio": torch.empty(7, 5), "visual": torch.empty(7, 4)}
        out = model(inputs, torch.zeros(7, dtype=torch.int64))
    out.loss.backward()
    assert out.logits.shape == (7, 3) and model.encoders[0].weight.grad.shape == (6, 5)


def test_what_needs_values_says_so():
    """And what it says to do works."""
    with torch.device("meta"):
        gate = head_of().gate
    logits, targets = [torch.randn(30, 3) for _ in "ab"], torch.arange(30) % 3
    for calibrate in ("fit", "fit_scale"):
        with pytest.raises(
            InputError, match=r'^gate: is on the meta device.*to_empty\(device="cpu'
        ):
            getattr(gate, calibrate)(logits, targets)
        with pytest.raises(InputError, match="^logits: are on the meta device"):
            getattr(head_of().gate, calibrate)([values.to("meta") for values in logits], targets)
    gate = gate.to_empty(device="cpu")
    gate.load_state_dict(head_of().gate.state_dict())
    assert gate.fit(logits, targets) > 0


def test_the_default_device_does_not_reach_the_fast_cpu_path():
    """Its small constants are made once, and kept for later calls."""
    step = import_module("iib_kernels.cpu.step")
    kept = step._shares, step._anchor_and_relative, alignment_rows._anchor_and_relative
    losses = []
    for device in ("meta", "cpu"):
        head, given, targets = head_of(), rows(), torch.arange(9) % 3
        head(given, targets)  # all classes seen: then comes the fast step
        for cached in kept:
            cached.cache_clear()
        with torch.device(device):
            losses.append(head(given, targets).loss)
            losses.append(head.eval()(given, targets).loss)
    assert torch.equal(losses[0], losses[2]) and torch.equal(losses[1], losses[3])
