"""The head over any encoders, and the classifier around both.

What they compute, what they refuse, and that they learn.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from iibalance.budgets import Budgets
from iibalance.data.dataset import Split
from iibalance.data.standardize import Standardizer
from iibalance.errors import InputError, as_sequence, check_names
from iibalance.methods.heads import ConcatHead
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.loss import IIBalanceLoss
from iibalance.nn.model import MultimodalClassifier, embed_split

DIMS = {"audio": 6, "lip video": 4}  # a name need not be a Python identifier


def embeddings(size=8, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, dim, generator=generator).requires_grad_(grad)
        for name, dim in DIMS.items()
    }


def make_head(seed=0, **options):
    torch.manual_seed(seed)
    return IIBalanceHead(DIMS, 3, **options)


def trained_head(**options):
    """A head whose prototypes have been seen and whose gate is anything but neutral."""
    head = make_head(budgets={"audio": 0.8, "lip video": 0.2}, **options)
    head(embeddings(30, seed=7), torch.arange(30) % 3)
    gate = head.gate
    gate.log_temperature.copy_(torch.tensor([0.3, -0.4]))
    gate.trust_offset.copy_(torch.tensor([1.0, 2.5]))
    gate.surprise_weight.copy_(torch.tensor([2.0, 3.0]))
    gate.log_scale.fill_(0.3)
    gate.own_temperature.copy_(torch.tensor([2.0, 0.8]))
    return head


class Toy:
    """Two modalities that tell two halves of a 4-class label; raw inputs far from standardised."""

    def __init__(self, count=400, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(4, (count,), generator=generator)
        bits = torch.stack([self.targets % 2, self.targets // 2], 1).float() * 2 - 1
        noise = lambda *shape: torch.randn(*shape, generator=generator)
        self.inputs = {
            "audio": 100
            + 30 * (bits[:, :1] * torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0]) + 0.7 * noise(count, 5)),
            "image": 0.01 * (bits[:, 1:, None] * torch.ones(1, 3, 4) + 1.5 * noise(count, 3, 4)),
        }
        self.standardizer = Standardizer({"audio": (5,), "image": (3, 4)}, {"image": "image"})
        self.standardizer.fit(self.inputs, torch.ones(count, 2, dtype=torch.bool))

    def encoders(self):
        """What a user might have before knowing of this project."""
        return {
            "audio": nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8)),
            "image": nn.Sequential(
                nn.Unflatten(1, (1, 3)),
                nn.Conv2d(1, 6, 3, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(72, 12),
            ),
        }

    def model(self, seed=0, **options):
        torch.manual_seed(seed)
        return MultimodalClassifier(self.encoders(), 4, standardizer=self.standardizer, **options)

    def train(self, model, steps=60, mask=None):
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
        inputs = self.standardizer.transform(
            self.inputs, torch.ones(len(self.targets), 2, dtype=torch.bool)
        )
        for step in range(steps):
            loss = model(inputs, self.targets, mask=mask, progress=step / steps).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


@pytest.fixture(scope="module")
def toy():
    return Toy()


@pytest.fixture(scope="module")
def trained(toy):
    model = toy.model(budgets={"audio": 0.5, "image": 0.45})
    toy.train(model)
    return model


# -- the head


def test_outputs_are_what_they_are_called():
    head, z = trained_head().eval(), embeddings()
    out = head(z)
    l = [head.classifiers[m](values).detach() for m, values in enumerate(z.values())]
    for got, values, temperature in zip(out.modality_logits, l, head.gate.own_temperature):
        torch.testing.assert_close(got, values / temperature)
    t = [values / temperature for values, temperature in zip(l, head.gate.temperature)]
    p = [values.softmax(-1) for values in out.modality_logits]
    torch.testing.assert_close(
        out.uncertainty, torch.stack([-(q * q.log()).sum(-1) / math.log(3) for q in p], 1)
    )
    # The fused logits are the sum of what each says as far as it is trusted, times the scale
    p, surprise = [values.softmax(-1) for values in t], head.prototypes.surprise(z)
    assert (surprise > 0).any()
    r = (head.gate.trust_offset - head.gate.surprise_weight * surprise).sigmoid()
    said = [r[:, m, None] * q + (1 - r[:, m, None]) / 3 for m, q in enumerate(p)]
    torch.testing.assert_close(out.logits, math.exp(0.3) * (said[0].log() + said[1].log()))
    belief = out.logits.softmax(-1)
    trust = [(belief * r[:, m, None] * q / said[m]).sum(-1) for m, q in enumerate(p)]
    torch.testing.assert_close(out.trust, torch.stack(trust, 1))
    assert out.weights is None and out.loss is None and out.parts is None


def test_a_new_head_sums_its_modalities_logits():
    head, z = make_head(budgets=[0.9, 0.1]), embeddings()
    total = sum(c(v) for c, v in zip(head.classifiers, z.values()))
    torch.testing.assert_close(head(z).logits.softmax(-1), total.softmax(-1))
    torch.testing.assert_close(head(z).trust, torch.ones(8, 2))


def test_dict_or_list_in_any_order():
    head, z = trained_head().eval(), embeddings()
    mask = torch.tensor([[True, True], [True, False], [False, True], [True, True]] * 2)
    targets = torch.arange(8) % 3
    one = head(z, targets, mask=mask)
    for other in (
        head(list(z.values()), targets, mask=mask),
        head(dict(reversed(z.items())), targets, mask=mask),
    ):
        for a, b in zip(
            (one.logits, one.trust, one.uncertainty, one.loss),
            (other.logits, other.trust, other.uncertainty, other.loss),
        ):
            assert torch.equal(a, b)


def test_unnamed_modalities_are_numbered():
    head = IIBalanceHead([6, 4], 3)
    assert head.modalities == ("0", "1") and head(
        {"0": torch.zeros(1, 6), "1": torch.zeros(1, 4)}
    ).logits.shape == (1, 3)


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_the_objectives(masked):
    objective = IIBalanceLoss(alpha=0.3, beta=2.0, warmup=0.0, ramp=1.0)
    head, z, targets = trained_head(objective=objective), embeddings(), torch.arange(8) % 3
    mask = (
        torch.tensor([[True, True], [True, False], [False, True], [True, True]] * 2)
        if masked
        else None
    )
    prototypes, seen = [p.clone() for p in head.prototypes.prototypes], list(head.prototypes.seen)
    logits = [c(v) for c, v in zip(head.classifiers, z.values())]
    expected = objective(
        logits,
        targets,
        embeddings=list(z.values()),
        prototypes=prototypes,
        seen=seen,
        budgets=head.budgets,
        mask=mask,
        progress=0.5,
    )
    out = head(z, targets, mask=mask, progress=0.5)
    assert (
        out.loss.item() == pytest.approx(expected.total.item(), rel=1e-6)
        and out.loss is out.parts.total
    )
    torch.testing.assert_close(out.parts.alignment, expected.alignment)
    assert out.parts.alignment.sum() > 0
    # They move after the loss, not before it
    assert not torch.equal(prototypes[0], head.prototypes.prototypes_0)


def test_in_training_the_gate_is_neutral_whatever_its_calibration():
    head, z, targets = trained_head(), embeddings(), torch.arange(8) % 3
    mask = torch.tensor([[True, True], [True, False], [False, True], [True, True]] * 2)
    out = head(z, targets, mask=mask)
    total = sum(
        c(v).masked_fill(~mask[:, m, None], 0.0)
        for m, (c, v) in enumerate(zip(head.classifiers, z.values()))
    )
    torch.testing.assert_close(out.logits, total.detach())
    assert out.parts.fused.item() == pytest.approx(
        nn.functional.cross_entropy(total, targets).item(), rel=1e-5
    )


def test_the_first_batch_has_no_prototypes_and_a_finite_loss():
    head, z = make_head(), embeddings(grad=True)
    out = head(z, torch.arange(8) % 3)
    out.loss.backward()
    assert not out.parts.contrastive.any()
    for values in z.values():
        assert values.grad.isfinite().all() and values.grad.any()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e20])
@pytest.mark.parametrize(
    "make",
    [trained_head, lambda: ConcatHead(DIMS, 3)],
    ids=["iibalance", "concat"],
)
def test_what_stands_in_a_masked_row_changes_nothing(make, garbage):
    mask = torch.tensor([[True, True], [True, False], [False, True], [True, True]] * 2)
    targets, results = torch.arange(8) % 3, []
    for fill in (0.25, garbage):
        torch.manual_seed(0)
        head = make()
        z = {
            name: v.masked_fill(~mask[:, m, None], fill).requires_grad_(True)
            for m, (name, v) in enumerate(embeddings().items())
        }
        out, fused = head(z, targets, mask=mask), head.fuse(z, mask)
        out.loss.backward()
        gradients = [
            p.grad for p in (*z.values(), *(p for p in head.parameters() if p.requires_grad))
        ]
        buffers = [b for b in head.buffers()]
        results.append(
            [
                out.loss,
                out.logits,
                fused.logits,
                *([] if fused.trust is None else [fused.trust, fused.uncertainty]),
                *gradients,
                *buffers,
            ]
        )
        for m, values in enumerate(z.values()):
            assert not values.grad[~mask[:, m]].any()
    for clean, dirty in zip(*results):
        torch.testing.assert_close(dirty, clean, atol=0, rtol=0)


def test_a_modality_missing_everywhere_takes_no_gradient():
    head, z = make_head(), embeddings(grad=True)
    mask = torch.tensor([[True, False]] * 8)
    out = head(z, torch.arange(8) % 3, mask=mask)
    out.loss.backward()
    torch.testing.assert_close(head.fuse(z, mask).trust, mask.float())
    assert not head.classifiers[1].weight.grad.any() and head.classifiers[0].weight.grad.any()
    torch.testing.assert_close(out.logits, head.classifiers[0](z["audio"]))
    assert not head.prototypes.seen[1].any() and head.prototypes.seen[0].all()


def test_ignored_targets():
    z, targets = embeddings(), torch.arange(8) % 3
    keep = torch.arange(8) < 5
    expected = make_head()({name: v[keep] for name, v in z.items()}, targets[keep])
    targets[~keep] = -100
    assert make_head()(z, targets).loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


def test_budgets_by_name_in_order_or_as_budgets():
    estimated = Budgets(("lip video", "audio"), (0.2, 0.8), (0.01, 0.02))  # the other way round
    for given in (
        {"audio": 0.8, "lip video": 0.2},
        [0.8, 0.2],
        np.array([0.8, 0.2]),
        torch.tensor([0.8, 0.2]),
        estimated,
    ):
        head = make_head(budgets=given)
        torch.testing.assert_close(head.budgets, torch.tensor([0.8, 0.2]))
    head = make_head()
    assert head.budgets.tolist() == [1.0, 1.0]
    head.set_budgets({"lip video": 0.5, "audio": 0.0})
    assert head.budgets.tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (
            {"audio": 0.5, "text": 0.5},
            "budgets: expected the modalities audio, lip video, got audio, text",
        ),
        ([0.5], "budgets: expected 2 entries in the order audio, lip video, got 1"),
        ([0.5, 1.2], "budgets: lip video is 1.2, expected a number in"),
        ([-0.5, 0.2], "budgets: audio is -0.5, expected a number in"),
        ([math.nan, 0.2], "budgets: audio is nan, expected a number in"),
        (
            Budgets.given({"text": 0.4}),
            "budgets: expected the modalities audio, lip video, got text",
        ),
    ],
)
def test_budgets_that_cannot_be_used(budgets, message):
    with pytest.raises(ValueError, match=message):
        make_head(budgets=budgets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda z: {"audio": z["audio"]},
            "embeddings: expected the modalities audio, lip video, got audio; .* mask",
        ),
        (
            lambda z: {**z, "text": z["audio"]},
            "embeddings: expected the modalities audio, lip video, got audio, lip video, text",
        ),
        (
            lambda z: {"audio": z["audio"], "lips": z["lip video"]},
            "embeddings: expected the modalities audio, lip video, got audio, lips",
        ),
        (
            lambda z: [z["audio"]],
            "embeddings: expected 2 entries in the order audio, lip video, got 1",
        ),
        (
            lambda z: [z["lip video"], z["audio"]],
            r"embeddings: audio has shape \(8, 4\), expected \[B, 6\]",
        ),
        (
            lambda z: {**z, "audio": z["audio"][:, None]},
            r"embeddings: audio has shape \(8, 1, 6\), expected \[B, 6\]; "
            "the encoder must return one vector",
        ),
    ],
)
@pytest.mark.parametrize("targets", [None, torch.arange(8) % 3])
def test_embeddings_that_cannot_be_used(change, message, targets):
    with pytest.raises(ValueError, match=message):
        make_head()(change(embeddings()), targets)


def test_a_sample_without_any_modality_is_an_error():
    mask = torch.ones(8, 2, dtype=torch.bool)
    mask[5] = False
    with pytest.raises(ValueError, match="mask"):
        make_head()(embeddings(), mask=mask)
    with pytest.raises(ValueError, match="mask"):
        make_head()(embeddings(), torch.zeros(8, dtype=torch.long), mask=mask)


@pytest.mark.parametrize("name", ["", "a.b", "a=b", "a,b", 3])
def test_what_cannot_name_a_modality(name):
    with pytest.raises(InputError, match="cannot name a modality"):
        IIBalanceHead({name: 3}, 2)


def test_names():
    with pytest.raises(InputError, match="holds a name twice"):
        check_names(["a", "b", "a"])
    with pytest.raises(InputError, match="at least one"):
        check_names([])
    with pytest.raises(ValueError, match="batch: expected the modalities a, got none"):
        as_sequence({}, ("a",), "batch")


# -- the classifier


@pytest.mark.parametrize("mask_some", [False, True])
def test_two_existing_encoders_become_a_model_that_learns(toy, mask_some):
    model, mask = toy.model(budgets=[0.5, 0.5]), None
    if mask_some:
        mask = torch.rand(len(toy.targets), 2, generator=torch.Generator().manual_seed(3)) < 0.85
        mask[~mask.any(1)] = True
    losses = toy.train(model, mask=mask)
    assert losses[-1] < 0.75 * losses[0] and all(map(math.isfinite, losses))
    test = Toy(seed=1)
    accuracy = (model.predict(test.inputs).probabilities.argmax(1) == test.targets).float().mean()
    assert accuracy > 0.8  # chance 0.25; each modality alone can reach 0.5
    for index, out in enumerate(
        model(
            toy.standardizer.transform(test.inputs, torch.ones(400, 2, dtype=torch.bool))
        ).modality_logits
    ):
        assert 0.4 < (out.argmax(1) == test.targets).float().mean() < 0.55, index
    assert model.head.prototypes.seen.all()


def test_predict_is_the_softmax_of_forward_on_standardised_inputs(toy, trained):
    standardised = {
        "audio": (toy.inputs["audio"] - toy.inputs["audio"].mean(0))
        / toy.inputs["audio"].std(0, correction=0),
        "image": (toy.inputs["image"] - toy.inputs["image"].mean())
        / toy.inputs["image"].std(correction=0),
    }
    out = trained.eval()(standardised)
    got = trained.predict(toy.inputs)
    torch.testing.assert_close(
        got.probabilities, out.logits.softmax(-1).detach(), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(got.trust, out.trust.detach())
    torch.testing.assert_close(got.uncertainty, out.uncertainty.detach(), atol=1e-5, rtol=1e-4)
    # Standardising matters here
    assert not torch.allclose(got.probabilities, trained(toy.inputs).logits.softmax(-1), atol=0.1)
    assert got.probabilities.max() > 0.9


@pytest.mark.parametrize("batch_size", [1, 7, 400, 1000])
def test_predict_does_not_depend_on_the_batch_size(toy, trained, batch_size):
    expected, got = trained.predict(toy.inputs), trained.predict(toy.inputs, batch_size=batch_size)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_predict_takes_numpy_of_any_real_dtype(toy, trained):
    expected = trained.predict({name: values.round() for name, values in toy.inputs.items()})
    got = trained.predict(
        {
            "audio": toy.inputs["audio"].round().numpy().astype(np.int16),
            "image": toy.inputs["image"].round().double().numpy(),
        },
        np.ones((400, 2), bool),
    )
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def test_predict_leaves_the_mode_and_its_inputs_as_they_are(toy, trained):
    before = toy.inputs["audio"].clone()
    for mode in (True, False):
        trained.train(mode)
        trained.predict(toy.inputs)
        assert trained.training == trained.head.training == mode
    with pytest.raises(InputError):
        trained.train().predict({})
    assert trained.training and torch.equal(toy.inputs["audio"], before)


def test_predict_runs_in_evaluation_mode(toy):
    torch.manual_seed(0)
    model = MultimodalClassifier(
        {"audio": nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))},
        4,
        embedding_dims={"audio": 8},
    ).train()
    first = model.predict({"audio": toy.inputs["audio"]})
    assert torch.equal(
        first.probabilities, model.predict({"audio": toy.inputs["audio"]}).probabilities
    )
    assert not model.encoders[0][1].running_mean.any()


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 1e9])
def test_masked_rows_may_hold_anything(toy, trained, fill):
    mask = torch.ones(400, 2, dtype=torch.bool)
    mask[:50, 0], mask[50:100, 1] = False, False
    dirty = {name: values.clone() for name, values in toy.inputs.items()}
    dirty["audio"][:50], dirty["image"][50:100] = fill, fill
    got, clean = trained.predict(dirty, mask), trained.predict(toy.inputs, mask)
    for a, b in zip(got, clean):
        assert torch.equal(a, b)
    torch.testing.assert_close(got.trust[:50], torch.tensor([[0.0, 1.0]] * 50))
    assert not got.trust[:50, 0].any() and not got.contributions[:50, 0].any()
    assert torch.equal(got.probabilities[100:], trained.predict(toy.inputs).probabilities[100:])
    rest = trained.head.fuse(
        [trained.embed(toy.standardizer.transform(toy.inputs, mask))[0]] * 1
        + [torch.zeros(400, 12)],
        torch.tensor([[True, False]] * 400),
    )
    torch.testing.assert_close(
        got.probabilities[50:100], rest.logits.softmax(-1)[50:100].detach(), atol=1e-6, rtol=1e-5
    )


def test_encoders_never_meet_what_stands_in_a_masked_row():
    """Some modules raise on NaN, or mix samples; there need not be a standardizer in between."""
    met = []

    class Witness(nn.Linear):
        def forward(self, x):
            met.append(x)
            return super().forward(x)

    model = MultimodalClassifier({"a": Witness(2, 3), "b": nn.Linear(2, 3)}, 2)
    model.predict(
        {"a": torch.full((4, 2), math.nan), "b": torch.ones(4, 2)},
        torch.tensor([[False, True]] * 4),
    )
    assert met[0].tolist() == [[0.0, 0.0]] * 4


def test_a_modality_left_out_is_missing_everywhere(toy, trained):
    # Its column of the mask is ignored
    alone = trained.predict({"image": toy.inputs["image"]}, np.ones((400, 2)))
    masked = trained.predict(toy.inputs, torch.tensor([[False, True]] * 400))
    for a, b in zip(alone, masked):
        assert torch.equal(a, b)
    assert not torch.allclose(
        alone.probabilities, trained.predict(toy.inputs).probabilities, atol=0.05
    )


def test_masks_are_not_changed(toy, trained):
    mask = torch.ones(400, 2, dtype=torch.bool)
    trained.predict({"image": toy.inputs["image"]}, mask)
    assert mask.all()


def bad(row, value):
    def change(toy):
        audio = toy.inputs["audio"].clone()
        audio[row, 2] = value
        return {**toy.inputs, "audio": audio}

    return change


@pytest.mark.parametrize(
    ("change", "mask", "message"),
    [
        (lambda toy: None, None, "batch: is a NoneType; give a dict of arrays by modality"),
        (lambda toy: pd.DataFrame({"a": [1.0]}), None, "batch: is a DataFrame; give a dict"),
        (
            lambda toy: toy.inputs,
            torch.full((400, 2), 0.5),
            "mask: row 0 holds 0.5 for audio",
        ),
        (
            lambda toy: {**toy.inputs, "text": torch.zeros(400, 2)},
            None,
            r"batch: 'text' is none of this model's modalities \(audio, image\)",
        ),
        (lambda toy: {}, None, "batch: expected at least one of the modalities audio, image"),
        (
            lambda toy: {**toy.inputs, "audio": toy.inputs["audio"][:-1]},
            None,
            "batch: image: has 400 rows, but batch: audio has 399",
        ),
        (
            lambda toy: {**toy.inputs, "audio": toy.inputs["audio"][:, :4]},
            None,
            r"batch: audio has samples of shape \(4,\), the model was trained on \(5,\)",
        ),
        (
            lambda toy: {name: values[:0] for name, values in toy.inputs.items()},
            None,
            "batch: audio: is empty",
        ),
        (
            lambda toy: toy.inputs,
            torch.ones(400, 3),
            r"mask: has shape \[400, 3\], expected a row a sample and 2 columns \(audio, image\)",
        ),
        (
            lambda toy: toy.inputs,
            torch.arange(400)[:, None].ne(6).expand(400, 2),
            "row 6 has none of audio, image",
        ),
        (
            lambda toy: {"audio": toy.inputs["audio"]},
            torch.tensor([[False, True]] * 400),
            "row 0 has none of audio",
        ),
        (bad(17, math.nan), None, "batch: audio: row 17 holds nan; clean it, or mark the row"),
        (
            bad(399, -math.inf),
            torch.ones(400, 2),
            "batch: audio: row 399 holds -inf",
        ),
    ],
)
def test_batches_that_cannot_be_used(toy, trained, change, mask, message):
    with pytest.raises(InputError, match=message):
        trained.predict(change(toy), mask)


def test_without_a_standardizer_inputs_are_used_as_they_are(toy):
    model = MultimodalClassifier(toy.encoders(), 4)
    torch.testing.assert_close(
        model.predict(toy.inputs).probabilities, model(toy.inputs).logits.softmax(-1).detach()
    )
    with pytest.raises(
        InputError, match="image is not there; a model without a standardizer needs an array of it"
    ):
        model.predict({"audio": toy.inputs["audio"]})


class Pooled(nn.Module):
    """A user's module that says its size and ends in no linear layer."""

    embedding_dim = 7

    def forward(self, x):
        return x.unfold(1, 3, 1)[:, :7].mean(-1)


def test_embedding_sizes_are_read_from_the_encoders():
    wide = nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 11), nn.BatchNorm1d(11))
    model = MultimodalClassifier({"a": Pooled(), "b": wide}, 3)
    assert model.head.embedding_dims == {"a": 7, "b": 11}
    assert model({"a": torch.randn(2, 9), "b": torch.randn(2, 9)}).logits.shape == (2, 3)
    flat = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    with pytest.raises(
        ValueError,
        match="embedding_dims: the size of c's embedding cannot be told from its encoder",
    ):
        MultimodalClassifier({"c": flat}, 3)
    assert MultimodalClassifier({"c": flat}, 3, embedding_dims={"c": 8})(
        {"c": torch.randn(2, 1, 4, 4)}
    ).logits.shape == (2, 3)


def test_a_model_needs_classes_or_a_head_and_not_options_for_both():
    with pytest.raises(ValueError, match="num_classes"):
        MultimodalClassifier({"a": nn.Linear(2, 2)})
    head = IIBalanceHead({"a": 2}, 5)
    assert MultimodalClassifier({"a": nn.Linear(2, 2)}, head=head).num_classes == 5
    with pytest.raises(TypeError, match="momentum"):
        MultimodalClassifier({"a": nn.Linear(2, 2)}, head=head, momentum=0.5)


def test_head_and_standardizer_of_other_modalities_are_refused():
    """In another order they would be silently mixed up: equal sizes tell nothing."""
    encoders = {"a": nn.Linear(2, 4), "b": nn.Linear(2, 4)}
    with pytest.raises(ValueError, match="head: .*b, a"):
        MultimodalClassifier(encoders, head=IIBalanceHead({"b": 4, "a": 4}, 3))
    with pytest.raises(ValueError, match="standardizer: .*b, a"):
        MultimodalClassifier(encoders, 3, standardizer=Standardizer({"b": (2,), "a": (2,)}))


def test_inputs_are_matched_by_name_not_by_order(toy, trained):
    expected = trained.predict(toy.inputs)
    got = trained.predict(dict(reversed(toy.inputs.items())))
    assert torch.equal(got.probabilities, expected.probabilities)


def test_state_dict_holds_all_that_predict_needs(toy, trained):
    other = MultimodalClassifier(
        toy.encoders(),
        4,
        standardizer=Standardizer({"audio": (5,), "image": (3, 4)}, {"image": "image"}),
    )
    other.load_state_dict(trained.state_dict())
    for a, b in zip(other.predict(toy.inputs), trained.predict(toy.inputs)):
        assert torch.equal(a, b)
    assert torch.equal(other.head.budgets, trained.head.budgets)


def test_embed_split_is_embed_in_evaluation_mode(toy):
    torch.manual_seed(0)
    model = MultimodalClassifier(
        {"audio": nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))}, 4
    ).train()
    split = Split({"audio": toy.inputs["audio"]}, toy.targets, torch.ones(400, 1, dtype=torch.bool))
    got = embed_split(model, split, batch_size=64)
    assert model.training
    torch.testing.assert_close(got[0], model.eval().embed(split.inputs)[0].detach())


@pytest.mark.slow
def test_compiled(toy, trained):
    inputs = toy.standardizer.transform(toy.inputs, torch.ones(400, 2, dtype=torch.bool))
    compiled = torch.compile(trained.eval(), backend="aot_eager")
    torch.testing.assert_close(
        compiled(inputs).logits, trained(inputs).logits, atol=1e-5, rtol=1e-5
    )


def test_a_head_and_its_loss_have_one_metric():
    euclidean = IIBalanceLoss(metric="sqeuclidean")
    head = IIBalanceHead(DIMS, 3, objective=euclidean)
    assert head.prototypes.metric == "sqeuclidean"
    with pytest.raises(ValueError, match="metric: 'cosine' is not the objective's 'sqeuclidean'"):
        IIBalanceHead(DIMS, 3, objective=euclidean, metric="cosine")
    assert IIBalanceHead(DIMS, 3, metric="sqeuclidean").objective.metric == "sqeuclidean"


@pytest.mark.parametrize("make", [trained_head, lambda: ConcatHead(DIMS, 3)])
def test_what_belongs_to_a_modality_is_told_by_the_head(make):
    """By its own parts: modality 1 is not modality 11, and nothing belongs to two."""
    head = make()
    encoders = {name: nn.Linear(3, size) for name, size in DIMS.items()}
    model = MultimodalClassifier(encoders, head=head)
    keys = [model.keys_of(index) for index in range(len(DIMS))]
    assert not keys[0] & keys[1] and set.union(*keys) <= set(model.state_dict())
    assert {"encoders.1.weight", "encoders.1.bias"} <= keys[1]
    if isinstance(head, IIBalanceHead):
        assert "head.classifiers.1.weight" in keys[1] and "head.prototypes.counts_1" in keys[1]


def test_encoders_that_are_none_or_do_not_fit_are_named():
    with pytest.raises(InputError, match="encoders: a is a function; give a torch.nn.Module"):
        MultimodalClassifier({"a": lambda x: x}, 3)
    model = MultimodalClassifier({"a": nn.Linear(4, 8), "b": nn.Linear(2, 8)}, 3)
    message = r"encoders: a: Linear cannot take a batch of shape \[3, 5\] .*; give an encoder that"
    with pytest.raises(InputError, match=message):
        model.predict({"a": torch.zeros(3, 5), "b": torch.zeros(3, 2)})


def test_a_model_without_numbers_says_so():
    with torch.device("meta"):
        model = MultimodalClassifier({"a": nn.Linear(4, 8)}, 3)
    with pytest.raises(InputError, match="batch: the model is on the meta device"):
        model.predict({"a": torch.zeros(3, 4)})
