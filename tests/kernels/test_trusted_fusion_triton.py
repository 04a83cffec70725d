"""The Triton kernels of trusted_fusion against the reference in float64, within its rounding.

They run in the interpreter, under the sanitizer of tests/interpreter.py: no access outside of an
argument, no element stored twice, no program reads what another one writes.
"""

import math

import pytest
import torch

pytest.importorskip("triton")
from hypothesis import given
from hypothesis import strategies as st
from test_triton_values import (
    ANY,
    DEVICE,
    FLAGS,
    FLOATS,
    LEADING,
    ORDERS,
    SEEDS,
    Case,
    bits,
    cases,
    check,
    evaluate,
    examples,
    kinds,
    laid_out,
    pick,
    series,
    some,
    spoil,
    start,
    watched,  # noqa: F401, the sanitizer, for every test of this file
)

from iib_kernels import trusted_fusion
from iib_kernels.ops.fusion import launch as fusion


def trust_case(
    seed=0,
    leading=(7,),
    classes=5,
    modalities=2,
    dtype=torch.float32,
    parameter_dtype=None,
    stacked=False,
    trust="row",
    temperature="each",
    scale="scalar",
    masked=False,
    extreme=False,
    layout="plain",
    parameter_layout="plain",
    upstream="plain",
    everything=True,
) -> Case:
    """A call with logits of any size and layout; ``trust`` a "row", "each" modality or "none".

    Extreme logits reach 1e4, and classes are ruled out where there is a trust, and no gradient by
    the temperature.
    """
    g = start(seed)
    logits = 2 * torch.randn(modalities, math.prod(leading), classes, generator=g)
    if extreme:
        which = torch.randint(4, logits.shape[:2], generator=g)[..., None]
        logits = torch.where(which == 0, 1e4 * logits.sign(), logits)
        logits = torch.where(which == 1, logits * 5e3, logits)
        never = torch.rand(logits.shape, generator=g) < 0.3
        logits = logits.masked_fill(never & (torch.arange(classes) > 0), -math.inf)
    v = 2 * torch.randn(*leading, modalities, generator=g)
    mask = None
    if masked:
        mask = torch.rand(*leading, modalities, generator=g) < 0.6
        mask |= torch.arange(modalities) == torch.randint(modalities, (*leading, 1), generator=g)
        logits = spoil(g, logits, mask.reshape(-1, modalities).T, layout)
        if parameter_layout != "expanded":
            v = torch.where(mask, v, math.nan)
    logits = logits.reshape(modalities, *leading, classes)
    parameter = lambda values: laid_out(
        values, parameter_layout, parameter_dtype or pick(g, FLOATS)
    )
    if stacked:
        inputs = {"logits": laid_out(logits, layout, kinds(g, dtype, 1)[0])}
    else:
        inputs = {
            f"logits[{m}]": laid_out(logits[m], layout, kind)
            for m, kind in enumerate(kinds(g, dtype, modalities))
        }
    if trust == "each":
        v = 2 * torch.randn(modalities, generator=g)
    if trust != "none":
        inputs["trust_logits"] = parameter(v)
    numbers = {"temperature": 0.7, "scale": 1.7}
    for name, form in (("temperature", temperature), ("scale", scale)):
        if form != "number":
            size = (modalities,) if form == "each" else ()
            inputs[name] = parameter(0.5 + torch.rand(size, generator=g))
    needs = some(g, list(inputs), everything)
    if masked:
        inputs["mask"] = laid_out(mask, "plain" if layout == "expanded" else layout)

    def call(given, impl):
        values = given["logits"] if stacked else series(given, "logits", modalities)
        options = numbers | {name: given[name] for name in numbers if name in given}
        return trusted_fusion(
            values, given.get("trust_logits"), mask=given.get("mask"), impl=impl, **options
        )._asdict()

    return Case(call, inputs, needs, ["logits"], upstream)


DRAWN = cases(
    trust_case,
    seed=SEEDS,
    leading=LEADING,
    classes=st.sampled_from([1, 2, 3, 5, 7, 31, 64, 129, 309]),
    modalities=st.integers(1, 6),
    dtype=ANY,
    parameter_dtype=ANY,
    stacked=FLAGS,
    trust=st.sampled_from(["row", "each", "none"]),
    temperature=st.sampled_from(["number", "scalar", "each"]),
    scale=st.sampled_from(["number", "scalar"]),
    masked=FLAGS,
    extreme=FLAGS,
    layout=ORDERS,
    parameter_layout=ORDERS,
    upstream=ORDERS,
    everything=FLAGS,
)


@pytest.mark.parametrize("count", [15, pytest.param(80, marks=pytest.mark.slow)])
def test_values_and_gradients(count):
    @examples(count)
    @given(DRAWN)
    def holds(case):
        check(case)

    holds()


@pytest.mark.parametrize("trust", ["row", "each", "none"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes, modalities", [(1, 1), (2, 6), (5, 3), (64, 4)])
def test_few_classes(classes, modalities, dtype, trust):
    """A batch that no block divides, with missing modalities that hold NaN."""
    check(
        trust_case(
            3,
            (13,),
            classes,
            modalities,
            dtype,
            torch.float32 if dtype == torch.float64 else None,
            trust=trust,
            masked=True,
            extreme=classes > 2,
            layout="sliced",
            temperature=pick(start(classes), ["number", "each"]),
        )
    )


@pytest.mark.parametrize(
    "classes, modalities, dtype, trust, layout",
    [
        (1000, 2, torch.float32, "row", "plain"),
        pytest.param(1000, 6, torch.bfloat16, "each", "transposed", marks=pytest.mark.slow),
        (4096, 1, torch.float16, "none", "plain"),
        (4099, 2, torch.float32, "row", "sliced"),
        pytest.param(4099, 3, torch.float64, "each", "plain", marks=pytest.mark.slow),
        pytest.param(5000, 6, torch.float16, "row", "transposed", marks=pytest.mark.slow),
        pytest.param(4097, 2, torch.bfloat16, "none", "expanded", marks=pytest.mark.slow),
    ],
)
def test_many_classes(classes, modalities, dtype, trust, layout):
    check(
        trust_case(
            5,
            (3,),
            classes,
            modalities,
            dtype,
            torch.float32,
            trust=trust,
            masked=True,
            extreme=True,
            temperature="number" if trust == "row" else "each",
            layout=layout,
            upstream=layout,
        )
    )


@pytest.mark.parametrize(
    "temperature, trust", [("number", "row"), ("each", "each"), ("each", "none")]
)
@pytest.mark.parametrize("form", ["streamed", "joint"])
@pytest.mark.parametrize("modalities", [1, 3, 5])
def test_rows_in_pieces_and_reductions_in_one(modalities, form, temperature, trust, monkeypatch):
    """Streamed rows of few classes, and the reductions of rows that several warps share."""
    if form == "joint":
        monkeypatch.setattr(fusion, "is_joint", lambda config: True)
    else:
        monkeypatch.setattr(fusion, "MOST_CLASSES", 0)
        monkeypatch.setattr(fusion, "STREAMED", 8)
    options = {"trust": trust, "temperature": temperature, "masked": True, "extreme": True}
    check(trust_case(13, (3,), 19, modalities, **options))


@pytest.mark.parametrize("trust", ["row", "each", "none"])
@pytest.mark.parametrize("classes", [7, 4099])
def test_each_gradient_alone(classes, trust):
    whole = trust_case(9, (2,), classes, 2, trust=trust, masked=True)
    for needed in whole.needs:
        check(whole._replace(needs=[needed]))


@pytest.mark.parametrize("trust", ["row", "each", "none"])
@pytest.mark.parametrize("classes", [1, 4, pytest.param(4099, marks=pytest.mark.slow)])
def test_float64_gradcheck(classes, trust):
    case = trust_case(2, (3,), classes, 2, torch.float64, torch.float64, trust=trust, masked=True)
    leaves = [case.inputs[name].detach().requires_grad_() for name in case.needs]
    if trust == "row":  # differences of NaN would be none
        leaves[2] = leaves[2].detach().nan_to_num().requires_grad_()
    leaves[:2] = [value.detach().nan_to_num(0.0).requires_grad_() for value in leaves[:2]]

    def call(*values):
        return case.call({**case.inputs, **dict(zip(case.needs, values))}, "triton")["logits"]

    assert torch.autograd.gradcheck(call, leaves, fast_mode=classes > 1024)


@pytest.mark.parametrize("trust", ["row", "none"])
@pytest.mark.parametrize("classes", [6, 4099])
def test_missing_modalities_have_no_say(classes, trust):
    """Whatever stands there; and they get no gradient and no trust."""
    found, mask = [], torch.tensor([[True, False], [True, True], [False, True]], device=DEVICE)
    case = trust_case(4, (3,), classes, 2, trust=trust)
    for garbage in (0.0, math.nan, math.inf, -math.inf):
        inputs = {name: value.clone() for name, value in case.inputs.items()}
        for m in range(2):
            inputs[f"logits[{m}]"][~mask[:, m]] = garbage
        if trust == "row":
            inputs["trust_logits"][~mask] = garbage
        found.append(evaluate(case._replace(inputs={**inputs, "mask": mask}), "triton", {}))
        for name, value in found[-1].items():
            assert value.isfinite().all() and bits(value, found[0][name]), (garbage, name)
    for m in range(2):
        assert not found[0][f"grad logits[{m}]"][~mask[:, m]].any()
    if trust == "row":
        assert not found[0]["grad trust_logits"][~mask].any()
    assert not found[0]["trust"][~mask].any() and (found[0]["trust"][mask] > 0).all()


@pytest.mark.parametrize("classes", [5, 4099])
def test_a_class_ruled_out_by_one_that_is_trusted_wholly(classes):
    """It is -inf whatever the scale's sign, and its upstream gradient, NaN say, reaches nobody."""
    case = trust_case(6, (4,), classes, 2, parameter_dtype=torch.float32, trust="none")
    case.inputs["logits[0]"][1, 2] = case.inputs["logits[1]"][3, 0] = -math.inf
    for sign in (1.0, -1.0):
        inputs = {**case.inputs, "scale": torch.tensor(sign, device=DEVICE)}
        logits = [inputs[f"logits[{m}]"].detach().requires_grad_() for m in range(2)]
        leaves = [*logits, *(inputs[name].requires_grad_() for name in ("temperature", "scale"))]
        out = trusted_fusion(logits, temperature=leaves[2], scale=leaves[3], impl="triton")
        ruled = torch.zeros_like(out.logits, dtype=torch.bool)
        ruled[1, 2] = ruled[3, 0] = True
        assert bool((out.logits[ruled] == -math.inf).all()) and out.logits[~ruled].isfinite().all()
        upstream = torch.ones_like(out.logits).masked_fill(ruled, math.nan)
        gradients = torch.autograd.grad(out.logits, leaves, upstream)
        assert all(value.isfinite().all() for value in gradients)
        expected = torch.stack([rows.double() / t for rows, t in zip(logits, leaves[2])])
        (by_scale,) = expected.log_softmax(-1).sum(0)[~ruled].sum()[None]
        torch.testing.assert_close(gradients[3].double(), by_scale, rtol=1e-5, atol=1e-4)
        assert gradients[0][1, 2] == 0 == gradients[1][3, 0]


@pytest.mark.parametrize("classes", [5, 4099])
def test_the_temperature_of_an_expert_that_rules_a_class_out(classes):
    """Its gradient is that of the other classes: the equations without the one ruled out."""
    case = trust_case(11, (3,), classes, 1, torch.float64, torch.float64)
    case.inputs["logits[0]"][:, 1] = -math.inf
    found = evaluate(case, "triton", upstream := {})
    temperature = case.inputs["temperature"].clone().requires_grad_()
    keep = torch.arange(classes, device=DEVICE) != 1
    p = (case.inputs["logits[0]"][:, keep] / temperature).softmax(-1)
    r = case.inputs["trust_logits"].sigmoid()
    fused = case.inputs["scale"] * (r * p + (1 - r) / classes).log()
    torch.testing.assert_close(found["logits"][:, keep], fused.detach())
    (expected,) = torch.autograd.grad(fused, temperature, upstream["logits"][:, keep])
    torch.testing.assert_close(found["grad temperature"], expected)
    assert not found["grad logits[0]"][:, 1].any()


@pytest.mark.parametrize("classes", [5, 4099])
@pytest.mark.parametrize("trust", ["row", "none"])
def test_logits_of_1e30(classes, trust):
    """A finite loss has finite gradients."""
    case = trust_case(8, (4,), classes, 2, trust=trust)
    case.inputs["logits[0]"][0, 1], case.inputs["logits[0]"][1, 0] = 1e30, -1e30
    case.inputs["logits[1]"][2] = -1e30
    found, expected = (
        evaluate(case, impl, {}, wide=impl == "reference") for impl in ("triton", "reference")
    )
    assert all(value.isfinite().all() for value in found.values())
    for name in ("logits", "trust", "grad logits[0]", "grad logits[1]"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [5, 4099])
def test_trust_that_is_nearly_whole_or_none(classes):
    """A trust's logit of 200 still bounds what is said, at -200; one of -200 says nothing."""
    case = trust_case(15, (4,), classes, 2, trust="each", parameter_dtype=torch.float32)
    case.inputs["logits[0]"][:, 0] = -1e4
    case.inputs["trust_logits"].copy_(torch.tensor([200.0, -200.0]))
    found = check(case)
    least = case.inputs["scale"] * -(200 + 2 * math.log(classes))
    torch.testing.assert_close(found["logits"][:, 0], least.expand(4))
    torch.testing.assert_close(found["trust"], torch.tensor([1.0, 0.0]).to(DEVICE).expand(4, 2))


@pytest.mark.parametrize("classes", [5, 4099])
def test_rows_without_any_modality(classes, monkeypatch):
    """Where nobody may look: 0 in every class, no trust, no gradient."""
    import iib_kernels._checks

    monkeypatch.setattr(iib_kernels._checks, "eager_on_cpu", lambda value: False)
    mask = torch.tensor([[True, True], [False, False]], device=DEVICE)
    case = trust_case(7, (2,), classes, 2)
    found = check(case._replace(inputs={**case.inputs, "mask": mask}))
    assert not found["logits"][1].any() and not found["trust"][1].any()
    assert not found["grad logits[0]"][1].any() and found["logits"][0].all()


ROUGH = pytest.mark.parametrize(
    "build",
    [
        lambda: trust_case(23, (19,), 31, 3, masked=True),
        lambda: trust_case(23, (5, 3), 1, 1, torch.float16, trust="each"),
        lambda: trust_case(23, (3,), 4099, 2, torch.bfloat16, trust="none", masked=True),
        lambda: trust_case(23, (3,), 4099, 3, trust="each", masked=True),
    ],
    ids=["rows", "one class", "streamed", "streamed trust"],
)


@ROUGH
def test_results_are_the_same_whatever_the_memory_held(build, monkeypatch):
    case, found, empty = build(), [], torch.Tensor.new_empty
    for garbage in (math.nan, 1e4):
        filled = lambda self, *size, **how: empty(self, *size, **how).fill_(garbage)  # noqa: B023
        monkeypatch.setattr(torch.Tensor, "new_empty", filled)
        found.append(evaluate(case, "triton", {}))
    for name, value in found[0].items():
        assert bits(value, found[1][name]), name


@ROUGH
def test_results_repeat_bit_for_bit(build):
    first, second = (evaluate(build(), "triton", {}) for _ in range(2))
    assert all(bits(value, second[name]) for name, value in first.items())


def test_one_launch_each(watched):  # noqa: F811
    for classes in (31, 4099):
        before = watched.count
        evaluate(trust_case(1, (3,), classes, 2), "triton", {})
        assert watched.count == before + 2


@pytest.mark.parametrize(
    "backend, dynamic",
    [
        ("aot_eager", True),
        pytest.param("aot_eager", False, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_training_step(backend, dynamic):
    """In one graph, with a trust a row and learned numbers; batches of any size where asked for."""
    torch._dynamo.reset()
    step = lambda logits, v, t, s, mask: trusted_fusion(
        logits, v, temperature=t.exp(), scale=s, mask=mask, impl="triton"
    )
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (8, 11, 9) if dynamic else (8,):
            case = trust_case(16, (rows,), 5, 3, parameter_dtype=torch.float32)
            mask = torch.arange(3 * rows, device=DEVICE).reshape(rows, 3) % 4 > 0
            leaves = [case.inputs[name].detach().requires_grad_() for name in case.needs]
            found = []
            for call in (compiled, step):
                out = call(leaves[:3], *leaves[3:], mask)
                found.append([*out, *torch.autograd.grad(out.logits.square().sum(), leaves)])
            for value, right in zip(*found, strict=True):
                torch.testing.assert_close(value, right)
