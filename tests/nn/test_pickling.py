"""Modules are copied, pickled, saved and sent to another process, and go on there as they would.

Bit for bit: losses, predictions, prototypes and every other entry of the state.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from iib_kernels import modules
from iibalance.nn.gate import Gate
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.loss import IIBalanceLoss
from iibalance.nn.model import MultimodalClassifier
from iibalance.nn.prototypes import PrototypeBank

NAMES, CLASSES, ROWS = ("audio", "lip video"), 3, 12
BUDGETS = (0.8, 0.3)


def draw(number, *sizes):
    """Random tensors of these sizes, the same for the same number."""
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(*size, generator=generator) for size in sizes]


def classifier(dims):
    """A classifier; embeddings of one size take the CPU's fast step, others do not."""
    image = nn.Sequential(nn.Flatten(), nn.Linear(8, dims[1]), nn.Dropout(0.2))
    encoders = {NAMES[0]: nn.Linear(5, dims[0]), NAMES[1]: image}
    return MultimodalClassifier(encoders, CLASSES, budgets=BUDGETS)


MAKE = {
    "classifier": lambda: classifier((6, 6)),
    "classifier of two sizes": lambda: classifier((6, 4)),
    "head": lambda: IIBalanceHead(dict(zip(NAMES, (6, 6))), CLASSES, budgets=BUDGETS),
    "bank": lambda: PrototypeBank(dict(zip(NAMES, (6, 4))), CLASSES),
    "gate": lambda: Gate(NAMES),
    "loss": lambda: IIBalanceLoss(alpha=0.7),
    "GatedFusion": lambda: modules.GatedFusion(uncertainty_weight=2.0),
    "MultimodalObjective": lambda: modules.MultimodalObjective(scale="present"),
    "PrototypeDistance": lambda: modules.PrototypeDistance(metric="sqeuclidean"),
    "AlignmentLoss": lambda: modules.AlignmentLoss(temperature=0.5),
}


def make(name):
    torch.manual_seed(0)
    return MAKE[name]()


def call(module, number):
    """What the module makes of batch ``number``, as tensors; the first stands for a loss.

    Where it moves without gradients (prototypes, calibration), it moves.
    """
    targets = (torch.arange(ROWS) + number) % CLASSES
    logits = [rows.requires_grad_() for rows in draw(number, *[(ROWS, CLASSES)] * 2)]
    features = draw(number, (ROWS, 6), (ROWS, 4))
    if isinstance(module, MultimodalClassifier):
        inputs = dict(zip(NAMES, draw(number, (ROWS, 5), (ROWS, 2, 4))))
        torch.manual_seed(number)  # of dropout
        return [module.train()(inputs, targets).loss]
    if isinstance(module, IIBalanceHead):
        return [module.train()(draw(number, *[(ROWS, 6)] * 2), targets).loss]
    if isinstance(module, PrototypeBank):
        module.update(features, targets)
        return [module.nearest(features), module.surprise(features)]
    if isinstance(module, Gate):
        surprise = draw(number, (ROWS, 2))[0].abs()
        module.fit(logits, targets, surprise=surprise)
        return [*module(logits, surprise)]
    if isinstance(module, modules.PrototypeDistance):
        return [module(logits[0], draw(7, (CLASSES, CLASSES))[0])]
    tables = draw(7, (CLASSES, 6), (CLASSES, 4))
    if isinstance(module, modules.AlignmentLoss):
        return [*module(features, tables, targets, BUDGETS)]
    if isinstance(module, IIBalanceLoss):
        return [module(logits, targets, embeddings=features, prototypes=tables).total]
    if isinstance(module, modules.MultimodalObjective):
        out = module(logits, targets, features=features, prototypes=tables)
        return [out.loss, out.weights]
    return [*module(logits)]


def advance(module, number):
    """One training step; everything that came of it."""
    found = call(module, number)
    if found[0].requires_grad:
        found[0].sum().backward()
    with torch.no_grad():
        for value in module.parameters():
            if value.grad is not None:
                value -= 0.1 * value.grad
                value.grad = None
    return [value.detach().clone() for value in (*found, *module.state_dict().values())]


@torch.inference_mode()
def look(module):
    """Predict, as a user does between two epochs."""
    pair = dict(zip(NAMES, draw(99, (ROWS, 6), (ROWS, 6))))
    if isinstance(module, MultimodalClassifier):
        module.predict(dict(zip(NAMES, draw(99, (ROWS, 5), (ROWS, 2, 4)))))
    elif isinstance(module, IIBalanceHead):
        module.eval()(pair, torch.arange(ROWS) % CLASSES)
    elif isinstance(module, PrototypeBank):
        module.surprise(draw(99, (ROWS, 6), (ROWS, 4)))
    elif isinstance(module, Gate):
        module(pair)
    else:
        call(module, 99)


STAGES = {
    "new": lambda module: None,
    "trained": lambda module: advance(module, 1),
    "looked at": lambda module: (advance(module, 1), look(module)),
}


def three_steps(module):
    return [advance(module, number) for number in (2, 3, 4)]


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
}


def assert_same(found, expected):
    for step, other in zip(found, expected, strict=True):
        for a, b in zip(step, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", MAKE)
def test_a_copy_trains_on_as_the_original_does(name, stage, how):
    module = make(name)
    STAGES[stage](module)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    other = COPIES[how](module)
    assert type(other) is type(module) and repr(other) == repr(module)
    found = three_steps(other)
    for key, value in module.state_dict().items():  # the copy shares nothing with it
        assert torch.equal(value, before[key])
    assert_same(found, three_steps(module))


def test_what_is_compared_moves():
    """Or the tests here would compare what nothing changes."""
    for name in MAKE:
        first, second, _ = three_steps(make(name))
        assert not torch.equal(first[0], second[0])
    model = make("classifier")
    first, second, _ = three_steps(model)
    moved = [not torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True)]
    for key, value in zip(model.state_dict(), moved, strict=True):
        assert value or not key.startswith(("encoders", "head.prototypes.prototypes")), key


def _continue(rank, trained, folder):
    """In a process of its own: three steps of every module that came."""
    found = {name: three_steps(module) for name, module in trained.items()}
    torch.save(found, f"{folder}/{rank}.pt")


def test_a_spawned_process_trains_on_what_it_is_given(tmp_path):
    """As Lightning's ddp_spawn sends a model to its processes."""
    trained = {name: make(name) for name in MAKE}
    for module in trained.values():
        STAGES["looked at"](module)
    expected = {name: three_steps(copy.deepcopy(module)) for name, module in trained.items()}
    torch.multiprocessing.spawn(_continue, (trained, str(tmp_path)), nprocs=1)
    found = torch.load(tmp_path / "0.pt")
    assert list(found) == list(MAKE)
    for name, steps in found.items():
        assert_same(steps, expected[name])


def test_the_tables_of_a_copy_may_be_loaded_anew():
    """A copy that knew all classes of the original does not know those of another state."""
    head = make("head")
    advance(head, 1)
    assert head.prototypes.complete
    other = pickle.loads(pickle.dumps(head))
    other.load_state_dict(make("head").state_dict())
    assert head.prototypes.complete and not other.prototypes.complete
    assert_same([advance(other, 1)], [advance(make("head"), 1)])
