"""`multimodal_objective` is the sum of what its two halves return, in every implementation.

The Triton kernels and the CPU's implementation give its gradients from one pass; autograd through
plain PyTorch in float64 is the truth.
"""

import contextlib
import math

import pytest
import torch
from torch import Tensor

import iib_kernels
from iib_kernels import ObjectiveWeights, alignment_loss, fusion_cross_entropy, multimodal_objective

pytest.importorskip("triton")
import interpreter
from test_triton_values import TOLERANCE, bits, close

from iib_kernels.ops.objective import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = ObjectiveWeights(0.7, 1.3, 0.5, 2.0)
SIZES = [(6, 5, 2, 4), (37, 17, 3, 33), (5, 1, 1, 3), (19, 128, 2, 20), (7, 150, 2, 9)]
NAMES = ("plain", "sum", "gate", "labels", "euclidean")
IMPLEMENTATIONS = ("triton", "auto")


@pytest.fixture(autouse=True)
def watched():
    """The sanitizer around every interpreted kernel."""
    with (
        interpreter.sanitized() if interpreter.interpreted() else contextlib.nullcontext() as report
    ):
        yield report


def draw(batch, classes, modalities, width, dtype=torch.float64, *, masked=False, seed=0):
    """Leaves (logits and features), and everything else, by name."""
    g = torch.Generator().manual_seed(seed + classes)
    randn = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64).to(DEVICE, dtype)
    rand = lambda *size: torch.rand(*size, generator=g).to(DEVICE)
    logits = [(2 * randn(batch, classes)).requires_grad_() for _ in range(modalities)]
    features = [randn(batch, width + m).requires_grad_() for m in range(modalities)]
    targets = torch.randint(classes, (batch,), generator=g).to(DEVICE)
    targets[1] = -100
    rest = {
        "prototypes": [randn(classes, width + m) for m in range(modalities)],
        "budgets": rand(modalities).to(dtype),
        "prototype_temperature": 0.3,
        "weights": WEIGHTS,
    }
    if masked:
        rest["mask"] = rand(batch, modalities) > 0.3
        rest["mask"][:, 0] |= ~rest["mask"].any(1)
        rest["seen"] = [rand(classes) > 0.2 for _ in range(modalities)]
    return logits, features, targets, rest


def options(name, batch, classes, modalities, dtype):
    """Arguments of the fusion and of the cross-entropies."""
    g = torch.Generator().manual_seed(9)
    randn = lambda *size: torch.randn(size, generator=g).to(DEVICE, dtype)
    return {
        "plain": {},
        "sum": {"scale": "present", "uncertainty_weight": 0.0},
        "gate": {
            "log_prior": randn(modalities),
            "gate_logits": randn(batch, modalities),
            "temperature": randn(modalities).abs() + 0.5,
            "uncertainty_weight": randn(modalities),
            "scale": randn().abs(),
        },
        "labels": {"weight": randn(classes).abs() + 0.1, "label_smoothing": 0.2},
        "euclidean": {"metric": "sqeuclidean"},
    }[name]


def value_and_gradients(logits, features, targets, rest, impl):
    """Everything that comes out, in one list, by name."""
    out = multimodal_objective(logits, targets, features=features, **rest, impl=impl)
    gradients = torch.autograd.grad(out.loss, [*logits, *features])
    named = {"loss": out.loss, **out.parts._asdict(), "weights": out.weights}
    return named | {f"gradient {i}": value for i, value in enumerate(gradients)}


EQUATIONS = [(size, name) for size in (SIZES[0], SIZES[-1]) for name in NAMES]
EQUATIONS += [(size, "plain") for size in SIZES[1:-1]]
ONCE_IN_MANY = ("plain", "gate")  # masked; the kernels of many classes take the longest


def _slow(impl, masked, size, name):
    return impl == "triton" and size == SIZES[-1] and not (masked and name in ONCE_IN_MANY)


@pytest.mark.parametrize(
    "impl, masked, size, name",
    [
        pytest.param(*case, marks=[pytest.mark.slow] if _slow(*case) else [])
        for impl in IMPLEMENTATIONS
        for masked in (False, True)
        for case in ((impl, masked, *equation) for equation in EQUATIONS)
    ],
    ids=str,
)
def test_it_is_what_autograd_makes_of_the_equations(impl, masked, size, name):
    logits, features, targets, rest = draw(*size, masked=masked)
    rest |= options(name, *size[:3], torch.float64)
    truth = value_and_gradients(logits, features, targets, rest, "reference")
    found = value_and_gradients(logits, features, targets, rest, impl)
    for key, value in truth.items():
        torch.testing.assert_close(found[key], value, atol=1e-9, rtol=1e-9, msg=key)
    assert size[1] == 1 or truth["gradient 0"].any()


@pytest.mark.parametrize("impl", ("reference", *IMPLEMENTATIONS))
def test_the_loss_is_the_weighted_sum_of_the_two_functions(impl):
    logits, features, targets, rest = draw(37, 5, 2, 4, masked=True)
    out = multimodal_objective(logits, targets, features=features, **rest, impl=impl)
    entropies = fusion_cross_entropy(logits, targets, mask=rest["mask"], impl="reference")
    losses = alignment_loss(
        features,
        rest["prototypes"],
        targets,
        rest["budgets"],
        temperature=0.3,
        seen=rest["seen"],
        mask=rest["mask"],
        impl="reference",
    )
    expected = (
        0.7 * entropies.fused
        + 1.3 * entropies.unimodal.sum()
        + 0.5 * losses.contrastive.sum()
        + 2.0 * losses.alignment.sum()
    )
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.parts.contrastive, losses.contrastive)
    assert losses.alignment.amax() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(37, 17, 3, 33), (7, 150, 2, 9)], ids=str)
def test_lower_precision_is_no_worse_than_plain_pytorch(size, dtype):
    logits, features, targets, rest = draw(*size, dtype)
    found = value_and_gradients(logits, features, targets, rest, "triton")
    eager = value_and_gradients(logits, features, targets, rest, "reference")
    wide = lambda values: [value.detach().double().requires_grad_() for value in values]
    rest |= {"prototypes": wide(rest["prototypes"]), "budgets": rest["budgets"].double()}
    rest["prototypes"] = [table.detach() for table in rest["prototypes"]]
    truth = value_and_gradients(wide(logits), wide(features), targets, rest, "reference")
    for key, value in truth.items():
        if key == "loss" or "gradient" not in key:
            assert found[key].dtype == torch.float32
        close(key, found[key].double(), eager[key].double(), value, TOLERANCE[dtype], 1e-3)


@pytest.mark.parametrize("impl", ("reference", *IMPLEMENTATIONS))
@pytest.mark.parametrize("classes", [5, 150])
def test_without_features_or_weight_the_prototype_losses_are_left_out(impl, classes):
    logits, features, targets, rest = draw(6, classes, 2, 4)
    alone = multimodal_objective(logits, targets, weights=WEIGHTS, impl=impl)
    rest["weights"] = (0.7, 1.3, 0.0, 0.0)
    unweighted = multimodal_objective(logits, targets, features=features, **rest, impl=impl)
    torch.testing.assert_close(alone.loss, unweighted.loss)
    assert not alone.parts.contrastive.any() and not alone.parts.alignment.any()
    assert alone.parts.fused > 0


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("classes", [5, 150])
def test_what_does_not_count_may_hold_anything(impl, classes):
    """An ignored row, a missing modality, an unseen class, and a class ruled out by -inf."""
    logits, features, targets, rest = draw(6, classes, 2, 4)
    mask = torch.ones(6, 2, dtype=torch.bool, device=DEVICE)
    mask[3, 0] = False
    seen = [torch.ones(classes, dtype=torch.bool, device=DEVICE) for _ in range(2)]
    seen[1][2] = False
    with torch.no_grad():
        logits[1][4, (int(targets[4]) + 1) % classes] = -math.inf
    rest |= {"mask": mask, "seen": seen}
    clean = value_and_gradients(logits, features, targets, rest, impl)
    with torch.no_grad():
        for values in (*logits, *features):
            values[1] = math.nan
        logits[0][3], features[0][3] = math.nan, math.inf
        rest["prototypes"][1][2] = math.nan
    found = value_and_gradients(logits, features, targets, rest, impl)
    for key, value in clean.items():
        if key == "weights":  # of a row that says nothing they are what they are
            continue
        assert bits(found[key], value), key
        assert value.isfinite().all(), key


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("classes", [5, 150])
def test_where_no_row_counts_everything_is_zero(impl, classes):
    logits, features, targets, rest = draw(4, classes, 2, 4)
    found = value_and_gradients(logits, features, torch.full_like(targets, -100), rest, impl)
    del found["weights"]
    assert not [key for key, value in found.items() if value.any() or value.isnan().any()]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_backward_multiplies_by_what_comes_in_and_may_be_repeated(impl):
    logits, features, targets, rest = draw(6, 5, 2, 4)
    out = multimodal_objective(logits, targets, features=features, **rest, impl=impl)
    leaves = [*logits, *features]
    once = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    thrice = torch.autograd.grad(3 * out.loss, leaves, retain_graph=True)
    again = torch.autograd.grad(out.loss, leaves)
    for a, b, c in zip(once, thrice, again):
        torch.testing.assert_close(b, 3 * a)
        assert bits(a, c)


@pytest.mark.parametrize("batch, classes", [(200, 3), (20, 150)])
def test_float16_gradients_survive_a_gradient_scaler(batch, classes):
    """Scaled by 65,536 in float32: in float16 they would be 0 before, and the factor infinite."""
    logits, features, targets, rest = draw(batch, classes, 2, 4, torch.float16)
    targets[:] = -100
    targets[:2] = 1
    rest["weights"] = tuple(1e-7 * weight for weight in WEIGHTS)
    out = multimodal_objective(logits, targets, features=features, **rest, impl="triton")
    gradients = torch.autograd.grad(out.loss * 65536.0, [*logits, *features])
    assert all(value.dtype == torch.float16 for value in gradients)
    assert all(value[:2].abs().amax() > 1e-4 for value in gradients)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_only_the_loss_is_differentiable_and_only_once(impl):
    logits, features, targets, rest = draw(6, 5, 2, 4)
    out = multimodal_objective(logits, targets, features=features, **rest, impl=impl)
    assert out.loss.requires_grad
    assert not any(part.requires_grad for part in (*out.parts, out.weights))
    with pytest.raises((RuntimeError, NotImplementedError), match="impl=.reference.") as error:
        (gradient,) = torch.autograd.grad(out.loss, logits[0], create_graph=True)
        gradient.sum().backward()
    assert "multimodal_objective" in str(error.value)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_parameters_of_the_gate_are_differentiated_as_well(impl):
    logits, features, targets, rest = draw(6, 5, 2, 4)
    prior = torch.randn(2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    rest["log_prior"] = prior
    losses = [
        multimodal_objective(logits, targets, features=features, **rest, impl=kind).loss
        for kind in ("reference", impl)
    ]
    expected, found = (torch.autograd.grad(loss, [prior, *logits]) for loss in losses)
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("classes", [5, pytest.param(150, marks=pytest.mark.slow)])
def test_repeats_are_equal_bit_for_bit_and_inputs_stay_as_they_are(classes):
    logits, features, targets, rest = draw(20, classes, 2, 20, torch.float32, masked=True)
    before = [value.detach().clone() for value in (*logits, *features, *rest["prototypes"])]
    one, two = (value_and_gradients(logits, features, targets, rest, "triton") for _ in range(2))
    assert all(bits(one[key], two[key]) for key in one)
    after = [*logits, *features, *rest["prototypes"]]
    assert all(bits(a, b.detach()) for a, b in zip(before, after))


def test_several_programs_share_the_rows(monkeypatch):
    """More blocks of rows than programs: each walks on, and the last one adds up."""
    logits, features, targets, rest = draw(100, 5, 2, 4, torch.float64, masked=True)
    truth = value_and_gradients(logits, features, targets, rest, "reference")
    for programs in (1, 3):
        monkeypatch.setattr(launch, "grid_limit", lambda device, programs=programs: programs)
        found = value_and_gradients(logits, features, targets, rest, "triton")
        for key, value in truth.items():
            torch.testing.assert_close(found[key], value, atol=1e-9, rtol=1e-9, msg=key)


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("classes", [5, 17])
def test_every_launch_to_choose_from_gives_the_same(monkeypatch, classes, place):
    """What IIB_KERNELS_AUTOTUNE times beside the table's: 40 rows are more than a block of each."""
    original, seen = launch._candidates, []

    def candidates(arguments):
        found = original(arguments)
        seen.append(found)
        return [found[place], *found]

    logits, features, targets, rest = draw(40, classes, 2, 20, masked=True)
    truth = value_and_gradients(logits, features, targets, rest, "reference")
    monkeypatch.setattr(launch, "_candidates", candidates)
    found = value_and_gradients(logits, features, targets, rest, "triton")
    for key, value in truth.items():
        torch.testing.assert_close(found[key], value, atol=1e-9, rtol=1e-9, msg=key)
    (offered,) = seen
    assert len(set(map(str, offered))) == len(offered) == 3
    assert offered[0].blocks["BLOCK_B"] == 16  # the table's own


@pytest.mark.parametrize("classes, launches", [(31, 1), (128, 1)])
@pytest.mark.parametrize("modalities", [2, 6])
def test_one_launch_and_one_more_for_backward(watched, classes, launches, modalities):
    if watched is None:
        pytest.skip("launches are counted in the interpreter")
    logits, features, targets, rest = draw(16, classes, modalities, 8, torch.float32)
    out = multimodal_objective(logits, targets, features=features, **rest, impl="triton")
    assert watched.count == launches
    out.loss.backward()
    assert watched.count == launches + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes(watched, dtype):
    """Logits are read once and their gradients written once. Features are read twice, for the
    scores and for the cosine's gradient, and those of the anchor once more.
    """
    if watched is None:
        pytest.skip("bytes are counted in the interpreter")
    logits, features, targets, rest = draw(64, 31, 2, 96, dtype)
    multimodal_objective(logits, targets, features=features, **rest, impl="triton")
    size = lambda values: sum(value.numel() * value.element_size() for value in values)
    assert watched.loaded_by("logits.ptrs") == size(logits)
    assert watched.stored_by("outputs.grad_logits") == size(logits)
    assert watched.stored_by("outputs.grad_features") == size(features)
    assert watched.loaded_by("tables.features") <= 2.6 * size(features)


# ----- What PyTorch asks for


@pytest.mark.parametrize("classes", [5, 140])
@pytest.mark.parametrize(
    "dtypes",
    [
        ("float32", ("bfloat16", "float32"), ("float32", "float32")),
        ("float32", ("float32", "float32"), ("bfloat16", "float32")),
        ("float32", ("float64", "float32"), ("float64", "float64")),
        ("float64", ("float32", "float32"), ("float32", "float32")),
    ],
)
def test_types_may_differ_from_modality_to_modality(dtypes, classes):
    """As autocast leaves them where one encoder ends in a normalisation."""
    kinds = [[getattr(torch, name) for name in names] for names in (dtypes[1], dtypes[2])]
    logits, features, targets, rest = draw(6, classes, 2, 4, torch.float32)
    logits = [rows.detach().to(getattr(torch, dtypes[0])).requires_grad_() for rows in logits]
    features = [rows.detach().to(kind).requires_grad_() for rows, kind in zip(features, kinds[0])]
    rest["prototypes"] = [table.to(kind) for table, kind in zip(rest["prototypes"], kinds[1])]
    leaves, found = [*logits, *features], {}
    for impl in ("triton", "reference"):
        out = multimodal_objective(logits, targets, features=features, **rest, impl=impl)
        found[impl] = [out.loss, *torch.autograd.grad(out.loss, leaves)]
    wide = "float64" in (dtypes[0], *dtypes[1])
    assert found["triton"][0].dtype == (torch.float64 if wide else torch.float32)
    for value, right in zip(found["triton"], found["reference"]):
        half = right.dtype == torch.bfloat16
        torch.testing.assert_close(
            value.double(), right.double(), rtol=1e-2 if half else 1e-4, atol=1e-5
        )


LOSSES = {
    "multimodal_objective": lambda logits, features, targets, rest: (
        multimodal_objective(logits, targets, features=features, **rest, impl="triton").loss
    ),
    "fusion_cross_entropy": lambda logits, features, targets, rest: (
        fusion_cross_entropy(logits, targets, impl="triton").fused
    ),
    "alignment_loss": lambda logits, features, targets, rest: alignment_loss(
        features, rest["prototypes"], targets, rest["budgets"], impl="triton"
    )[0],
}


@pytest.mark.parametrize("name", LOSSES)
def test_dispatcher_operations(name, monkeypatch):
    """One forward, its means included, and one for backward beside the 1 that comes in."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        names: list = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr("iib_kernels._checks.eager_on_cpu", lambda tensor: False)  # as on a GPU
    logits, features, targets, rest = draw(6, 31, 2, 4, torch.float32)
    with Record() as record:
        loss = LOSSES[name](logits, features, targets, rest)
        mine = [name for name in record.names if name.startswith("iib.")]
        free = ("view", "detach", "select", "split", "slice", "alias", "unbind", "empty")
        others = [n for n in record.names if n not in mine and not any(f in n for f in free)]
        assert mine == [f"iib.{name}.default"] and not others
        record.names.clear()
        loss.backward(torch.ones_like(loss))
    done = [name for name in record.names if not any(part in name for part in free)]
    last = "scale_gradients" if name == "multimodal_objective" else f"{name}_backward"
    assert done == ["aten.ones_like.default", f"iib.{last}.default"]


@pytest.mark.parametrize("classes", [5, pytest.param(150, marks=pytest.mark.slow)])
def test_compiles_in_full(classes):
    logits, features, targets, rest = draw(6, classes, 2, 4, torch.float32, masked=True)

    def loss(logits, features):
        out = multimodal_objective(logits, targets, features=features, **rest, impl="triton")
        return out.loss, out.parts.fused

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, found = loss(logits, features), compiled(logits, features)
    torch.testing.assert_close(found, expected)
    leaves = [*logits, *features]
    pairs = zip(torch.autograd.grad(expected[0], leaves), torch.autograd.grad(found[0], leaves))
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_torch_func_grad():
    logits, features, targets, rest = draw(6, 5, 2, 4)

    def loss(first):
        given = [first, *logits[1:]]
        return multimodal_objective(given, targets, features=features, **rest, impl="triton").loss

    expected = torch.autograd.grad(loss(logits[0]), logits[0])[0]
    torch.testing.assert_close(torch.func.grad(loss)(logits[0].detach()), expected)


# ----- Errors


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"weights": (1, 1, 1)}, ValueError, r"weights: expected four numbers .* got 3"),
        ({"weights": (1, -1, 1, 1)}, ValueError, r"weights.unimodal: expected a number >= 0"),
        ({"weights": 1.0}, TypeError, r"weights: expected ObjectiveWeights, got float"),
        ({"prototypes": None}, ValueError, r"prototypes: give features and prototypes together"),
        ({"scale": "all"}, ValueError, r"scale: expected a number, a tensor \[\] or 'present'"),
        ({"prototype_temperature": 0}, ValueError, r"prototype_temperature: .* above 0"),
        (
            {"unit_prototypes": True, "metric": "sqeuclidean"},
            ValueError,
            r"unit_prototypes: goes with the cosine alone",
        ),
        (
            {"prototypes": [torch.ones(4, 3)] * 2},
            ValueError,
            r"prototypes\[0\]: expected 5 classes",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ("reference", *IMPLEMENTATIONS))
def test_errors_name_the_argument(impl, change, kind, message):
    logits, features, targets, rest = draw(6, 5, 2, 3)
    if "prototypes" in change and change["prototypes"]:
        rest["prototypes"], features = change["prototypes"], [torch.ones(6, 3)] * 2
    else:
        rest |= change
    with pytest.raises(kind, match=message):
        multimodal_objective(logits, targets, features=features, **rest, impl=impl)


def test_modules_hold_the_options():
    logits, features, targets, rest = draw(6, 5, 2, 4)
    tensors = {"features": features, "prototypes": rest.pop("prototypes")}
    tensors["budgets"] = rest.pop("budgets")
    module = iib_kernels.MultimodalObjective(**rest)
    found: Tensor = module(logits, targets, **tensors).loss
    torch.testing.assert_close(found, multimodal_objective(logits, targets, **tensors, **rest).loss)
    assert repr(module).startswith("MultimodalObjective(prototype_temperature=0.3, weights=")
    assert not list(module.parameters())
