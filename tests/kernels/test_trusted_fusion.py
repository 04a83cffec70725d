"""trusted_fusion against the equations in plain loops (method page, section 4)."""

import math

import pytest
import torch

from iib_kernels import TrustedFusion, trusted_fusion


def by_hand(logits, trust_logits, temperature, scale, mask):
    """Loops over rows, modalities and classes in Python's own floats."""
    rows, classes = len(logits[0]), len(logits[0][0])
    fused, trust = [], []
    for b in range(rows):
        said, shares = [], []
        for m, values in enumerate(logits):
            if not mask[b][m]:
                said.append([0.0] * classes)
                shares.append([0.0] * classes)
                continue
            t = [value / temperature[m] for value in values[b]]
            total = sum(math.exp(value - max(t)) for value in t)
            p = [math.exp(value - max(t)) / total for value in t]
            r = 1 / (1 + math.exp(-trust_logits[b][m]))
            mixed = [r * one + (1 - r) / classes for one in p]
            said.append([math.log(one) for one in mixed])
            shares.append([r * one / whole for one, whole in zip(p, mixed)])
        f = [scale * sum(part[k] for part in said) for k in range(classes)]
        total = sum(math.exp(value - max(f)) for value in f)
        belief = [math.exp(value - max(f)) / total for value in f]
        fused.append(f)
        trust.append([sum(q * one for q, one in zip(belief, part)) for part in shares])
    return fused, trust


def drawn(dtype=torch.float64, seed=0, count=3, rows=7, classes=5):
    generator = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(rows, classes, generator=generator).to(dtype) for _ in range(count)]
    trust = 2 * torch.randn(rows, count, generator=generator).to(dtype)
    temperature = torch.rand(count, generator=generator).to(dtype) + 0.5
    mask = torch.rand(rows, count, generator=generator) > 0.3
    mask[~mask.any(1), 0] = True
    return logits, trust, temperature, mask


def test_values_by_hand():
    logits, trust, temperature, mask = drawn()
    found = trusted_fusion(logits, trust, temperature=temperature, scale=1.3, mask=mask)
    fused, expected = by_hand(
        [values.tolist() for values in logits],
        trust.tolist(),
        temperature.tolist(),
        1.3,
        mask.tolist(),
    )
    torch.testing.assert_close(found.logits, torch.tensor(fused, dtype=torch.float64))
    torch.testing.assert_close(found.trust, torch.tensor(expected, dtype=torch.float64))


def test_gradients():
    logits, trust, temperature, mask = drawn(rows=3)
    inputs = [*logits, trust, temperature, torch.tensor(0.8, dtype=torch.float64)]
    inputs = [value.clone().requires_grad_() for value in inputs]

    def fused(*values):
        *rows, v, t, g = values
        return trusted_fusion(rows, v, temperature=t, scale=g, mask=mask).logits

    assert torch.autograd.gradcheck(fused, inputs)


def test_whole_trust_is_the_product_of_the_experts():
    logits, _, _, _ = drawn()
    found = trusted_fusion(logits)
    expected = sum(logits).softmax(-1)
    torch.testing.assert_close(found.logits.softmax(-1), expected)
    torch.testing.assert_close(found.trust, torch.ones_like(found.trust))


def test_a_wrong_and_sure_expert_is_outvoted_and_loses_trust():
    wrong = torch.tensor([[40.0, 0.0, 0.0]])
    right = torch.tensor([[0.0, 3.0, 0.0]])
    found = trusted_fusion([wrong, right, right], torch.tensor([2.0, 2.0, 2.0]))
    assert int(found.logits.argmax()) == 1
    assert float(trusted_fusion([wrong, right, right]).logits.argmax()) == 0
    assert float(found.trust[0, 0]) < 0.2 < 0.8 < float(found.trust[0, 1])


def test_missing_rows_may_hold_anything_and_get_no_gradient():
    logits, trust, temperature, mask = drawn()
    clean = trusted_fusion(logits, trust, temperature=temperature, mask=mask)
    spoilt = [
        torch.where(mask[:, [m]], values, torch.nan).requires_grad_()
        for m, values in enumerate(logits)
    ]
    v = torch.where(mask, trust, torch.nan).requires_grad_()
    found = trusted_fusion(spoilt, v, temperature=temperature, mask=mask)
    assert torch.equal(found.logits, clean.logits) and torch.equal(found.trust, clean.trust)
    found.logits.square().sum().backward()
    for m, values in enumerate(spoilt):
        assert torch.isfinite(values.grad).all() and (values.grad[~mask[:, m]] == 0).all()
    assert torch.isfinite(v.grad).all() and (v.grad[~mask] == 0).all()


def test_a_class_that_an_expert_rules_out_is_only_doubted():
    ruled = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    other = torch.tensor([[0.0, 9.0, 0.0]])
    found = trusted_fusion([ruled, other], torch.tensor([1.0, 3.0]))
    assert int(found.logits.argmax()) == 1
    found.logits.sum().backward()
    assert torch.isfinite(ruled.grad).all()
    assert float(trusted_fusion([ruled.detach(), other]).logits[0, 1]) == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_single_precision(dtype):
    logits, trust, _, _ = drawn(torch.float32)
    half = [values.to(dtype) for values in logits]
    found = trusted_fusion(half, trust.to(dtype))
    whole = trusted_fusion([values.float() for values in half], trust.to(dtype).float())
    assert found.logits.dtype == dtype and found.trust.dtype == torch.float32
    assert torch.equal(found.logits, whole.logits.to(dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trust_logits": torch.zeros(2)}, "trust_logits: expected shape"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"scale": torch.ones(3)}, "scale: expected a number or a tensor"),
        ({"scale": "present"}, "scale: expected a number or a tensor"),
        ({"trust_logits": torch.zeros(7, 2)}, r"trust_logits: expected shape .* = \[7, 3\]"),
        ({"mask": torch.zeros(7, 3, dtype=torch.bool)}, "mask: "),
        ({"impl": "fast"}, "impl: 'fast' is none of"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    logits = drawn()[0]
    with pytest.raises((ValueError, TypeError), match=message):
        trusted_fusion(logits, **arguments)


def test_leading_dimensions_are_rows():
    logits, trust, temperature, mask = drawn(rows=6)
    options = {"temperature": temperature, "scale": 0.7}
    flat = trusted_fusion(logits, trust, mask=mask, **options)
    found = trusted_fusion(
        torch.stack([values.reshape(2, 3, -1) for values in logits]),
        trust.reshape(2, 3, -1),
        mask=mask.reshape(2, 3, -1),
        **options,
    )
    assert torch.equal(found.logits, flat.logits.reshape(2, 3, -1))
    assert torch.equal(found.trust, flat.trust.reshape(2, 3, -1))
    one = trusted_fusion([values[0] for values in logits], trust[0], mask=mask[0], **options)
    torch.testing.assert_close(one.logits, flat.logits[0])
    torch.testing.assert_close(one.trust, flat.trust[0])


def test_one_trust_a_modality_is_that_of_every_row():
    logits, trust, _, _ = drawn()
    found = trusted_fusion(logits, trust[0])
    assert torch.equal(found.logits, trusted_fusion(logits, trust[:1].expand(7, 3)).logits)
    assert torch.equal(TrustedFusion()(logits, trust[0]).trust, found.trust)


class Fused(torch.nn.Module):
    """As the gate calls it: parameters are tensors, and a mask says who is there."""

    def __init__(self, impl):
        super().__init__()
        self.fuse = TrustedFusion(impl=impl)
        self.log_temperature = torch.nn.Parameter(torch.tensor([0.2, -0.3]))
        self.scale = torch.nn.Parameter(torch.tensor(0.9))

    def forward(self, first, second, trust, mask):
        temperature = self.log_temperature.exp()
        return self.fuse(
            [first, second], trust, temperature=temperature, scale=self.scale, mask=mask
        )


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_module_takes_any_batch(strict):
    """A batch that is traced as a symbol is not compared with the number of modalities."""
    batch = torch.export.Dim("batch", min=1, max=2**20)

    def given(rows):
        logits, trust, _, mask = drawn(torch.float32, rows, 2, rows)
        return *logits, trust, mask

    model = Fused("auto")
    program = torch.export.export(
        model, given(7), dynamic_shapes=[{0: batch}] * 4, strict=strict
    ).module()
    for rows in (1, 2, 3, 50):
        for found, expected in zip(program(*given(rows)), model(*given(rows)), strict=True):
            torch.testing.assert_close(found, expected)
