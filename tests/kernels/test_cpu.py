"""The CPU's training step computes what the general path computes.

It steps aside where it does not apply.
"""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from iib_kernels import cpu
from iibalance import IIBalanceHead, IIBalanceLoss, PrototypeBank

SHAPES = [
    (1, 8, 3, 4),
    (2, 64, 26, 128),
    (3, 8, 4, 6),
    (6, 64, 10, 32),
]  # modalities, batch, classes, size


def draw(count, batch, classes, size, seed=0):
    """A head, embeddings (the first has no direction) and targets.

    The targets hold every class, and the head has seen them all.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = [torch.relu(torch.randn(batch, size, generator=generator)) for _ in range(count)]
    embeddings[0][0] = 0
    targets = torch.cat(
        [torch.arange(classes), torch.randint(classes, (batch - classes,), generator=generator)]
    )
    torch.manual_seed(seed)
    head = IIBalanceHead(
        [size] * count,
        classes,
        budgets=(0.8 + 0.2 * torch.rand(count, generator=generator)).tolist(),
        objective=IIBalanceLoss(
            fused_weight=0.6, unimodal_weight=1.3, alpha=0.7, beta=3.0, warmup=0.0, ramp=1.0
        ),
    )
    head(embeddings, targets)
    return head, embeddings, targets


def reference(head):
    """The same head, by ``impl="reference"``."""
    twin = copy.deepcopy(head)
    twin.objective.impl = twin.prototypes.impl = "reference"
    return twin


@pytest.fixture
def steps(monkeypatch):
    """How often the fast path was taken."""
    taken, original = [], cpu.step
    monkeypatch.setattr(cpu, "step", lambda *arguments: taken.append(1) or original(*arguments))
    return taken


def run(head, embeddings, targets, scalar, progress=0.9):
    """Outputs, gradients of a scalar of them by embeddings and parameters, and the prototypes after
    the step.
    """
    leaves = [value.clone().requires_grad_() for value in embeddings]
    out = head(leaves, targets, progress=progress)
    gradients = torch.autograd.grad(scalar(out), [*leaves, *head.classifiers.parameters()])
    return [
        out.logits,
        *out.modality_logits,
        out.loss,
        *out.parts,
        *gradients,
        *head.prototypes.prototypes,
        head.prototypes.counts,
    ]


@pytest.mark.parametrize("what", ["loss", "logits", "fused"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_the_references(shape, what, steps):
    head, embeddings, targets = draw(*shape)

    def scalar(out):
        assert not any(part.requires_grad for part in out.parts[1:])  # for reading
        if what == "loss":
            return out.loss
        if what == "logits":
            return sum(values.square().mean() for values in out.modality_logits)
        return out.loss + 0.3 * out.logits.square().mean()

    slow = run(reference(head), embeddings, targets, scalar)
    assert not steps
    fast = run(head, embeddings, targets, scalar)
    assert steps == [1] and len(fast) == len(slow)
    for number, (one, other) in enumerate(zip(fast, slow)):
        torch.testing.assert_close(
            one, other, atol=3e-6, rtol=2e-5, msg=lambda text: f"{number}: {text}"
        )
    assert all(values.requires_grad for values in (*fast[: shape[0] + 2], *slow[: shape[0] + 2]))
    assert shape[0] == 1 or slow[shape[0] + 5].sum() > 0  # the alignment acts


def test_before_the_prototypes_begin_only_cross_entropies_count(steps):
    head, embeddings, targets = draw(2, 16, 4, 8)
    leaves = [value.clone().requires_grad_() for value in embeddings]
    out = head(leaves, targets, progress=0.0)
    assert steps == [1]
    logits = [classifier(value) for classifier, value in zip(head.classifiers, embeddings)]
    torch.testing.assert_close(
        out.loss,
        0.6 * F.cross_entropy(sum(logits), targets)
        + 1.3 * sum(F.cross_entropy(value, targets) for value in logits),
    )
    out.loss.backward()
    one_hot = F.one_hot(targets, 4)
    by_logits = (
        1.3 * (logits[1].softmax(1) - one_hot) + 0.6 * (sum(logits).softmax(1) - one_hot)
    ) / 16
    torch.testing.assert_close(leaves[1].grad, by_logits @ head.classifiers[1].weight)


def test_gradients_add_up_over_steps():
    head, embeddings, targets = draw(2, 16, 4, 8)
    twin = reference(head)
    for one in (head, twin):
        for _ in range(3):
            one(embeddings, targets).loss.backward()
    for one, other in zip(head.classifiers.parameters(), twin.classifiers.parameters()):
        torch.testing.assert_close(one.grad, other.grad, atol=3e-6, rtol=2e-5)


@pytest.mark.parametrize("budgets", [[0.0, 0.0], [0.5, 0.5], [0.9, 0.0]])
def test_budgets_at_their_limits(budgets, steps):
    head, embeddings, targets = draw(2, 16, 4, 8)
    head.set_budgets(budgets)
    slow = run(reference(head), embeddings, targets, lambda out: out.loss)
    for one, other in zip(run(head, embeddings, targets, lambda out: out.loss), slow):
        torch.testing.assert_close(one, other, atol=3e-6, rtol=2e-5)
    assert steps == [1]


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_prototypes_move_as_in_the_general_path(momentum):
    fast, slow = (
        PrototypeBank({"a": 6, "b": 6}, 5, impl=impl, momentum=momentum)
        for impl in ("auto", "reference")
    )
    for bank in (fast, slow):
        bank.prototypes_1[4] = 1.0  # whatever stands there before the class is seen does not count
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        targets = torch.randint(
            5 if step else 3, (7,), generator=generator
        )  # some classes come later
        embeddings = [torch.randn(7, 6, generator=generator) for _ in range(2)]
        embeddings[0][0] = 0
        for bank in (fast, slow):
            bank.update(embeddings, targets)
        assert torch.equal(fast.counts, slow.counts)
        for one, other in zip(fast.prototypes, slow.prototypes):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert fast.complete and slow.complete
    state = PrototypeBank({"a": 6, "b": 6}, 5).state_dict()
    fast.load_state_dict(state)
    assert not fast.complete


class Halved(IIBalanceLoss):
    def forward(self, *arguments, **options):
        out = super().forward(*arguments, **options)
        return out._replace(total=out.total / 2)


@pytest.mark.parametrize(
    "what",
    [
        "mask",
        "ignored",
        "sizes",
        "dtype",
        "autocast",
        "sqeuclidean",
        "reference",
        "unseen",
        "objective",
        "classifier",
        "no bias",
        "hook",
        "objective's hook",
        "evaluation",
    ],
)
def test_everything_else_takes_the_general_path(what, steps):
    head, embeddings, targets = draw(2, 16, 4, 8)
    mask, called = None, []
    if what == "mask":
        mask = torch.ones(16, 2, dtype=torch.bool)
    if what == "ignored":
        targets[3] = -100
    if what == "sizes":
        head, embeddings = IIBalanceHead([8, 5], 4), [embeddings[0], embeddings[1][:, :5]]
        head(embeddings, targets)
    if what == "dtype":
        head, embeddings = head.double(), [value.double() for value in embeddings]
    if what == "sqeuclidean":
        head = IIBalanceHead([8, 8], 4, metric="sqeuclidean")
        head(embeddings, targets)
    if what == "reference":
        head = reference(head)
    if what == "unseen":
        head = IIBalanceHead([8, 8], 5)
        head(embeddings, targets)
    if what == "objective":
        head.objective = Halved()
    if what == "classifier":
        head.classifiers[1] = nn.Sequential(nn.Linear(8, 4))
        head.classifiers[1].weight, head.classifiers[1].bias = (
            head.classifiers[1][0].weight,
            head.classifiers[1][0].bias,
        )
    if what == "no bias":
        head.classifiers[1] = nn.Linear(8, 4, bias=False)
    if what == "hook":
        head.classifiers[1].register_forward_hook(lambda *_: called.append(1))
    if what == "objective's hook":
        head.objective.register_forward_hook(lambda *_: called.append(1))
    if what == "evaluation":
        head.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=what == "autocast"):
        out = head(embeddings, targets, mask=mask)
    assert out.loss.isfinite() and not steps and bool(called) == ("hook" in what)


def test_function_transforms_take_the_general_path(steps):
    head, embeddings, targets = draw(2, 16, 4, 8)
    parameters, buffers = (
        dict(head.named_parameters()),
        {name: value.clone() for name, value in head.named_buffers()},
    )
    loss = lambda parameters, buffers: (
        functional_call(head, (parameters, buffers), (embeddings, targets)).loss
    )
    gradients = grad(loss)(parameters, buffers)
    assert not steps
    head(embeddings, targets).loss.backward()
    assert steps == [1]
    torch.testing.assert_close(
        gradients["classifiers.1.weight"], head.classifiers[1].weight.grad, atol=3e-6, rtol=2e-5
    )


def test_a_target_out_of_range_is_still_an_error_that_says_so():
    head, embeddings, targets = draw(2, 16, 4, 8)
    targets[5] = 4
    with pytest.raises(ValueError, match="targets"):
        head(embeddings, targets)


def test_a_second_derivative_is_refused_and_the_reference_has_it():
    head, embeddings, targets = draw(2, 16, 4, 8)
    weight = head.classifiers[0].weight
    with pytest.raises(RuntimeError, match='impl="reference"'):
        torch.autograd.grad(head(embeddings, targets).loss, weight, create_graph=True)
    head = reference(head)
    weight = head.classifiers[0].weight
    (gradient,) = torch.autograd.grad(head(embeddings, targets).loss, weight, create_graph=True)
    gradient.square().sum().backward()
    assert weight.grad.isfinite().all()
