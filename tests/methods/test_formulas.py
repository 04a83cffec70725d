"""One step of each balancing method against its published formula.

Computed by hand: plain loops, and no helper of the class under test.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from iibalance.budgets import Budgets
from iibalance.data.dataset import Batch, Split
from iibalance.errors import InputError
from iibalance.methods import METHODS, make_method

CLASSES = 3
INPUTS = {"audio": 5, "video": 7, "text": 4}
SIZES = {"audio": 4, "video": 6, "text": 3}


def ready(name, count=2, seed=0, **options):
    """(method, model) over the first ``count`` modalities, two layers an encoder.

    Biases are not small, so that a forgotten one shows.
    """
    torch.manual_seed(seed)
    method = make_method(name, **options)
    encoders = {
        m: nn.Sequential(nn.Linear(INPUTS[m], 8), nn.Tanh(), nn.Linear(8, SIZES[m]))
        for m in list(INPUTS)[:count]
    }
    # The draws below are such that modalities conflict, or not, by the right margins: weights of
    # other sizes come first.
    nn.ModuleList(nn.Linear(SIZES[m], CLASSES) for m in encoders)
    model = method.build(encoders, CLASSES)
    for key, value in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(value, std=0.5)
    return method, model


def draw(count=2, size=12, seed=0, missing=0.0):
    generator = torch.Generator().manual_seed(seed)
    inputs = {m: torch.randn(size, INPUTS[m], generator=generator) for m in list(INPUTS)[:count]}
    mask = torch.rand(size, count, generator=generator) >= missing
    mask[~mask.any(1), 0] = True
    inputs = {m: values * mask[:, i, None] for i, (m, values) in enumerate(inputs.items())}
    return Split(inputs, torch.arange(size) % CLASSES, mask)


def run(model, batch, progress=1.0):
    return model(batch.inputs, batch.targets, mask=batch.mask, progress=progress)


def arrays(tensors):
    return [values.detach().double().numpy() for values in tensors]


def softmax(logits):
    shifted = np.exp(logits - np.max(logits))
    return shifted / shifted.sum()


def slices(head):
    """The concatenated head's weight by modality, [K, D_m] each."""
    weight, start, parts = head.classifier.weight, 0, []
    for size in head.embedding_dims.values():
        parts.append(weight[:, start : start + size])
        start += size
    return parts


def mean_nll(logits, targets):
    return sum(-math.log(softmax(row)[y]) for row, y in zip(logits, targets)) / len(targets)


def by_encoder(model, loss):
    """The gradient of ``loss`` on each encoder as one vector."""
    vectors = []
    for encoder in model.encoders:
        values = list(encoder.parameters())
        found = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
        vectors.append(
            torch.cat(
                [
                    torch.zeros(p.numel()) if g is None else g.flatten()
                    for p, g in zip(values, found)
                ]
            )
        )
    return vectors


def filled(module):
    """What stands in ``.grad`` of a module, as one vector."""
    return torch.cat([value.grad.flatten() for value in module.parameters()])


def close(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=10 * tolerance)


# -- OGM-GE


def ogm_coefficients(model, batch, alpha):
    scores, both = [], batch.mask.all(1)
    for m, (weight, inputs) in enumerate(zip(arrays(slices(model.head)), batch.inputs.values())):
        (z,), (bias,) = arrays([model.encoders[m](inputs)]), arrays([model.head.classifier.bias])
        scores.append(
            sum(
                softmax(weight @ z[i] + bias / 2)[y]
                for i, y in enumerate(batch.targets.tolist())
                if both[i]
            )
        )
    ratios = [scores[0] / scores[1], scores[1] / scores[0]]
    return [1 - math.tanh(alpha * rho) if rho > 1 else 1.0 for rho in ratios]


def one_ahead(model, split, ahead):
    """The split with the labels that modality ``ahead`` predicts, and a head sure of them."""
    with torch.no_grad():
        slices(model.head)[ahead].mul_(4)
        z = model.embed(split.inputs)[ahead]
        targets = (z @ slices(model.head)[ahead].T + model.head.classifier.bias / 2).argmax(1)
    return Split(split.inputs, targets, split.mask)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_ogm_multiplies_every_gradient_of_the_encoder_ahead_and_none_of_the_head(ahead, missing):
    method, model = ready("ogm_ge", alpha=0.4, noise=0.0)
    split = one_ahead(model, draw(missing=missing), ahead)
    batch = split.batch()
    out = run(model, batch)
    method.backward(method.loss(out, model, batch, 0.5), model, batch, out)
    before = {
        key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None
    }
    method.after_backward(model, batch, out)
    k = ogm_coefficients(model, batch, 0.4)
    assert k[1 - ahead] == 1.0 and 0 < k[ahead] < 0.7
    names = [key for key in before if key.startswith("encoders")]
    assert {before[key].dim() for key in names} == {1, 2} and len(names) == 8
    for key, value in model.named_parameters():
        if key in before:
            factor = k[int(key.split(".")[1])] if key in names else 1.0
            close(value.grad, factor * before[key], 1e-6)


def test_ogm_coefficient_grows_with_the_lead():
    """rho = 1.5 by hand.

    A head of zeros but for its bias gives softmax(bias / 2) in both modalities; a lead is then made
    by weights on a one-hot embedding.
    """
    method = make_method("ogm_ge", alpha=0.7, noise=0.0)
    model = method.build({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)}, 2)
    with torch.no_grad():
        model.encoders[0].weight.fill_(1.0)
        model.encoders[1].weight.fill_(1.0)
        model.head.classifier.bias.zero_()
        # p of class 0: 3/4 by a, 1/2 by b
        model.head.classifier.weight.copy_(torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]))
    batch = Batch(
        {"a": torch.ones(4, 1), "b": torch.ones(4, 1)}, torch.zeros(4, dtype=torch.long), None
    )
    out = model(batch.inputs, batch.targets)
    model.encoders[0].weight.grad, model.encoders[1].weight.grad = (
        torch.ones(1, 1),
        torch.ones(1, 1),
    )
    method.after_backward(model, batch, out)
    assert model.encoders[0].weight.grad.item() == pytest.approx(1 - math.tanh(0.7 * 1.5), rel=1e-5)
    assert model.encoders[1].weight.grad.item() == 1.0


@pytest.mark.parametrize("noise", [1.0, 0.5])
def test_ge_adds_noise_of_each_gradients_own_deviation_to_both_encoders(noise):
    torch.manual_seed(0)
    method = make_method("ogm_ge", alpha=0.4, noise=noise)
    model = method.build({"a": nn.Linear(100, 2000), "b": nn.Linear(100, 2000)}, CLASSES)
    split = one_ahead(
        model,
        Split(
            {m: torch.randn(8, 100) for m in "ab"},
            torch.arange(8) % 3,
            torch.ones(8, 2, dtype=torch.bool),
        ),
        1,
    )
    batch = split.batch()
    out = run(model, batch)
    out.loss.backward()
    before = [[value.grad.clone() for value in encoder.parameters()] for encoder in model.encoders]
    head = [value.grad.clone() for value in model.head.classifier.parameters()]
    method.after_backward(model, batch, out)
    k = ogm_coefficients(model, batch, 0.4)
    assert k[0] == 1.0 and k[1] < 0.9
    for encoder, old, factor in zip(model.encoders, before, k):
        for value, gradient in zip(encoder.parameters(), old):
            added = value.grad - factor * gradient
            deviation = noise * gradient.std(correction=0)
            assert added.std() == pytest.approx(
                deviation.item(), rel=0.08 if value.dim() == 1 else 0.01
            )
            assert abs(added.mean()) < 5 * deviation / value.numel() ** 0.5
            # N(0, .) knows nothing of g
            assert (
                abs((added * gradient).mean() / added.std() / gradient.std())
                < 5 / value.numel() ** 0.5
            )
    assert all(
        torch.equal(value.grad, old) for value, old in zip(model.head.classifier.parameters(), head)
    )


@pytest.mark.parametrize("name", ["ogm_ge", "pmr", "greedy"])
@pytest.mark.parametrize("count", [1, 3])
def test_formulas_for_two_modalities_refuse_other_numbers(name, count):
    with pytest.raises(
        InputError, match=f"{name} is defined for 2 modalities, the data has {count}"
    ):
        ready(name, count)
    with pytest.raises(InputError, match="defined for 2 modalities"):
        make_method(name).check(tuple(list(INPUTS)[:count]))
    make_method(name).check(("one", "other"))


# -- AGM


@pytest.mark.parametrize("count", [2, 3])
def test_agm_responses_are_shapley_values_and_a_share_of_the_bias(count):
    method, model = ready("agm", count)
    with torch.no_grad():
        z = model.embed(draw(count).inputs)
        value = lambda subset: (
            model.head.fuse(
                [part if m in subset else torch.zeros_like(part) for m, part in enumerate(z)]
            ).logits
        )
        for m, response in enumerate(method.responses(model.head, z)):
            others, shapley = [j for j in range(count) if j != m], 0
            for size in range(count):
                weight = (
                    math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
                )
                for subset in itertools.combinations(others, size):
                    shapley = shapley + weight * (value({*subset, m}) - value(set(subset)))
            close(response - model.head.classifier.bias / count, shapley, 1e-6)


def agm_scores(model, batch):
    """s_m: mean of -log softmax(W_m z_m + bias / M)[y] over the samples that have m."""
    scores, (bias,) = [], arrays([model.head.classifier.bias])
    for m, (weight, z) in enumerate(
        zip(arrays(slices(model.head)), arrays(model.embed(batch.inputs)))
    ):
        rows = batch.mask[:, m].numpy()
        scores.append(
            mean_nll(z[rows] @ weight.T + bias / len(model.encoders), batch.targets.numpy()[rows])
        )
    return scores


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_agm_multiplies_what_comes_back_through_each_response(count, missing):
    method, model = ready("agm", count, alpha=1.5)
    with torch.no_grad():
        model.head.classifier.weight.mul_(6)
    history = []
    for step in range(3):
        batch = draw(count, size=7, seed=step, missing=missing).batch()
        history.append(agm_scores(model, batch))
        s, running = history[-1], [sum(column) / len(history) for column in zip(*history)]
        k = []
        for m in range(count):
            others = [j for j in range(count) if j != m]
            r = math.exp(sum(s[j] - s[m] for j in others) / len(others))
            usual = math.exp(sum(running[j] - running[m] for j in others) / len(others))
            k.append(math.exp(1.5 * min(usual - r, 10)))
        out = run(model, batch)
        loss = method.loss(out, model, batch, 0.5)
        close(loss, out.loss)  # forward: the plain cross-entropy
        for factor, found, plain in zip(k, by_encoder(model, loss), by_encoder(model, out.loss)):
            close(found, factor * plain)
        weight, sizes = model.head.classifier.weight, list(model.head.embedding_dims.values())
        found, plain = (
            torch.autograd.grad(value, weight, retain_graph=True)[0].split(sizes, 1)
            for value in (loss, out.loss)
        )
        for factor, slice_found, slice_plain in zip(k, found, plain):
            close(slice_found, factor * slice_plain)
        assert all(factor == pytest.approx(1) for factor in k) == (step == 0)
        assert step == 0 or max(abs(factor - 1) for factor in k) > 0.02


def test_agm_caps_the_exponent_at_ten():
    """Logits x and 0 for either modality by itself.

    First a leads b by 40 nats, then it does not, in the end it lags.
    """
    method = make_method("agm", alpha=0.2)
    model = method.build({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)}, 2)
    with torch.no_grad():
        model.head.classifier.bias.zero_()
        model.head.classifier.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        for encoder in model.encoders:
            encoder.weight.fill_(1.0)
    leads, exponents = [], []
    for a, b in ((20.0, -20.0), (1.0, 1.0), (1.0, 3.0), (-20.0, 1.0)):
        batch = Batch(
            {"a": torch.tensor([[a]]), "b": torch.tensor([[b]])},
            torch.tensor([0]),
            torch.ones(1, 2, dtype=torch.bool),
        )
        out = run(model, batch)
        loss = method.loss(out, model, batch, 0.5)
        nll = [math.log1p(math.exp(-x)) for x in (a, b)]
        leads.append(nll[1] - nll[0])
        usual = sum(leads) / len(leads)
        exponents.append([math.exp(sign * usual) - math.exp(sign * leads[-1]) for sign in (1, -1)])
        for found, plain, exponent in zip(
            by_encoder(model, loss), by_encoder(model, out.loss), exponents[-1]
        ):
            assert (found / plain).item() == pytest.approx(
                math.exp(0.2 * min(exponent, 10)), rel=1e-4
            )
    assert exponents[1][0] > 1000 > 10 and exponents[3][1] < -1000  # capped above, not below


# -- PMR


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_pmr_prototypes_are_epoch_means_and_keep_epsilon_of_the_old(missing):
    method, model = ready("pmr", epsilon=0.3)
    split = draw(size=40, missing=missing)
    means = []
    for _ in range(2):
        method.before_epoch(model, split, 0.0)
        part = []
        for m, z in enumerate(arrays(model.embed(split.inputs))):
            rows = [
                [z[i] for i in range(40) if split.targets[i] == k and split.mask[i, m]]
                for k in range(CLASSES)
            ]
            part.append(np.stack([np.mean(own, 0) for own in rows]))
        means.append(part)
        if len(means) == 1:
            for m in range(2):
                np.testing.assert_allclose(method.state[f"prototypes_{m}"], means[0][m], atol=1e-5)
            with torch.no_grad():
                for value in model.encoders.parameters():
                    value.mul_(1.5)
    for m in range(2):
        np.testing.assert_allclose(
            method.state[f"prototypes_{m}"], 0.7 * means[1][m] + 0.3 * means[0][m], atol=1e-5
        )
        assert np.abs(means[1][m] - means[0][m]).max() > 0.1


def pmr_loss(plain, embeddings, prototypes, batch, options, regularised, classes=range(CLASSES)):
    """Sample by sample, over the classes that training has shown."""
    scores, pce, entropy = [], [], []
    for m, (z, c) in enumerate(zip(embeddings, prototypes)):
        own, spread, score = [], [], 0.0
        for i, y in enumerate(batch.targets.tolist()):
            if batch.mask[i, m] and y in classes:
                p = torch.softmax(
                    torch.stack([-torch.linalg.vector_norm(z[i] - c[k]) for k in classes]), 0
                )
                own.append(-p[list(classes).index(y)].log())
                spread.append(-(p * p.log()).sum())
                score += p[list(classes).index(y)].item()
        scores.append(score)
        pce.append(sum(own) / len(own))
        entropy.append(sum(spread) / len(spread))
    rho = scores[0] / scores[1]
    b, g = min(max(1 / rho - 1, 0), 1), min(max(rho - 1, 0), 1)
    loss = plain + options.alpha * (b * pce[0] + g * pce[1])
    return (loss - options.mu * (g * entropy[0] + b * entropy[1]) if regularised else loss), b, g


def pmr_ready(ahead, missing, sharp):
    """Prototypes that separate modality ``ahead``'s embeddings by label, and hardly the other's."""
    method, model = ready("pmr", alpha=0.8, mu=0.3, regularise=0.25)
    split = draw(seed=1, missing=missing)
    method.before_epoch(model, split, 0.0)
    with torch.no_grad():
        method.state[f"prototypes_{1 - ahead}"] = 0.1 * method.state[f"prototypes_{1 - ahead}"]
        method.state[f"prototypes_{ahead}"] = sharp * torch.randn(
            method.state[f"prototypes_{ahead}"].shape
        )
        targets = torch.cdist(
            model.embed(split.inputs)[ahead], method.state[f"prototypes_{ahead}"]
        ).argmin(1)
    return method, model, Split(split.inputs, targets, split.mask).batch()


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize(
    ("progress", "regularised"), [(0.0, True), (0.24, True), (0.25, False), (1.0, False)]
)
@pytest.mark.parametrize("sharp", [4.0, 0.7])
def test_pmr_loss_and_gradients(ahead, missing, progress, regularised, sharp):
    method, model, batch = pmr_ready(ahead, missing, sharp)
    out = run(model, batch, progress)
    prototypes = [method.state[f"prototypes_{m}"] for m in range(2)]
    expected, b, g = pmr_loss(
        out.loss, model.embed(batch.inputs), prototypes, batch, method.options, regularised
    )
    if not missing:
        assert (b, g)[ahead] == 0 and (b, g)[1 - ahead] > 0.1  # the other one is pulled
    assert 0.3 < b + g < 0.9 or (sharp > 1 and b + g == 1)  # clipped at 1, or not
    loss = method.loss(out, model, batch, progress)
    close(loss, expected)
    for found, plain in zip(by_encoder(model, loss), by_encoder(model, expected)):
        close(found, plain)


def test_pmr_leaves_a_class_that_training_never_shows_out_of_the_softmax():
    method, model = ready("pmr", regularise=0.5)
    split = draw(size=30)
    train = split.subset(split.targets != 2)
    for _ in range(2):
        method.before_epoch(model, train, 0.0)
    assert all(value.isfinite().all() for value in method.state.values())
    batch = split.batch()
    assert (batch.targets == 2).any()
    out = run(model, batch)
    loss = method.loss(out, model, batch, 0.0)
    prototypes = [method.state[f"prototypes_{m}"] for m in range(2)]
    expected, b, g = pmr_loss(
        out.loss, model.embed(batch.inputs), prototypes, batch, method.options, True, classes=(0, 1)
    )
    assert b + g > 0
    close(loss, expected)
    for found, plain in zip(by_encoder(model, loss), by_encoder(model, expected)):
        assert found.isfinite().all()
        close(found, plain)


# -- MMPareto


def pareto_ready(count, conflict, seed=0):
    method, model = ready("mmpareto", count, seed=seed)
    with torch.no_grad():  # own classifiers that want what the fused one wants, or its opposite
        for classifier, weight in zip(model.head.classifiers, slices(model.head)):
            classifier.weight.copy_(
                (-1.3 if conflict else 1.3) * weight + 0.05 * torch.randn_like(weight)
            )
    return method, model


def pareto(fused, own):
    """By a search over the segment, no closed form."""
    fused, own = fused.double(), own.double()
    if fused @ own >= 0:
        return fused + own
    shares = torch.linspace(0, 1, 20001, dtype=torch.float64)
    points = shares[:, None] * fused + (1 - shares)[:, None] * own
    smallest = 2 * points[points.norm(dim=1).argmin()]
    length = (fused + own).norm()
    return smallest * max(1.0, (length / smallest.norm()).item())


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("conflict", [False, True])
def test_mmpareto_combines_the_two_gradients_of_each_encoder(count, conflict):
    method, model = pareto_ready(count, conflict)
    batch = draw(count).batch()
    out = run(model, batch)
    fused, own = out.parts.fused, out.parts.unimodal
    pairs = [(by_encoder(model, fused)[m], by_encoder(model, own[m])[m]) for m in range(count)]
    assert all((a @ b < 0) == conflict for a, b in pairs)
    head = torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(
                fused + own.sum(), list(model.head.classifier.parameters()), retain_graph=True
            )
        ]
    )
    heads = torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(
                fused + own.sum(), list(model.head.classifiers.parameters()), retain_graph=True
            )
        ]
    )
    method.backward(method.loss(out, model, batch, 0.5), model, batch, out)
    for encoder, (a, b) in zip(model.encoders, pairs):
        found = filled(encoder)
        close(found, pareto(a, b).float(), 1e-4 if conflict else 1e-6)
        assert found.norm().item() == pytest.approx((a + b).norm().item(), rel=1e-4)
        if conflict:
            assert found @ a > 0 and found @ b > 0  # it lowers both losses, which the sum need not
            assert F.cosine_similarity(found, a + b, dim=0) < 0.999
    close(filled(model.head.classifier), head, 1e-6)
    close(filled(model.head.classifiers), heads, 1e-6)


def test_mmpareto_accumulates():
    method, model = pareto_ready(2, True)
    single = []
    for seeds in ((0,), (1,), (0, 1)):
        model.zero_grad()
        for seed in seeds:
            batch = draw(seed=seed).batch()
            out = run(model, batch)
            method.backward(method.loss(out, model, batch, 0.5), model, batch, out)
        single.append(filled(model))
    close(single[2], single[0] + single[1], 1e-6)
    assert single[0].abs().max() > 1e-2 and not torch.allclose(single[0], single[1])


# -- G-Blend


def blend_weights(train_before, train_after, held_before, held_after):
    ratios = []
    for t0, t1, h0, h1 in zip(train_before, train_after, held_before, held_after):
        gain, overfitting = h0 - h1, (h1 - t1) - (h0 - t0)
        ratios.append(max(gain, 0) / overfitting**2)
    return [ratio / sum(ratios) for ratio in ratios]


@pytest.mark.parametrize("count", [2, 3])
def test_g_blend_prepares_its_weights_from_two_trainings(count):
    method, model = ready("g_blend", count, share=0.25)
    split = draw(count, size=60, missing=0.2)
    generator, calls = torch.Generator().manual_seed(5), []
    falling = lambda low, high: (
        low + (high - low) * torch.rand(count + 1, generator=generator, dtype=torch.float64)
    )
    before = torch.stack([falling(1.9, 2.0), falling(2.1, 2.2)])
    unimodal, fused = (torch.stack([falling(0.1, 0.9), falling(1.1, 1.9)]) for _ in range(2))

    def train(name, loss, part, measure, share):
        assert share == 0.25
        batch = part.batch()
        out = run(model.eval(), batch)
        calls.append(name)
        assert len(part) == 48
        own = [
            F.cross_entropy(
                out.modality_logits[m][batch.mask[:, m]], batch.targets[batch.mask[:, m]]
            )
            for m in range(count)
        ]
        everything = F.cross_entropy(out.logits, batch.targets)
        close(loss(out), sum(own) if len(calls) == 1 else everything)
        close(measure(model)[0].float(), torch.stack([*own, everything]))
        fit = torch.cat(list(part.inputs.values()), 1).tolist()
        held = split.subset(
            [
                i
                for i, row in enumerate(torch.cat(list(split.inputs.values()), 1).tolist())
                if row not in fit
            ]
        ).batch()
        assert len(held.targets) == 12
        close(
            measure(model)[1, count].float(), F.cross_entropy(run(model, held).logits, held.targets)
        )
        return before, unimodal if len(calls) == 1 else fused

    method.prepare(train, split, seed=3)
    assert len(calls) == 2 and len(set(calls)) == 2
    after = torch.cat([unimodal[:, :count], fused[:, count:]], 1)
    expected = blend_weights(
        before[0].tolist(), after[0].tolist(), before[1].tolist(), after[1].tolist()
    )
    assert method.state["weights"].tolist() == pytest.approx(expected, rel=1e-9) and sum(
        expected
    ) == pytest.approx(1)
    assert max(expected) > 1.2 * min(expected)


def test_g_blend_gives_no_weight_to_what_gains_nothing():
    before, after = (
        torch.tensor([[2.0, 2.0, 2.0]] * 2),
        torch.tensor([[0.5, 0.5, 0.5], [1.0, 1.5, 2.5]]),
    )
    method = make_method("g_blend")
    method.prepare(lambda *arguments: (before, after), draw(size=30), seed=0)
    assert method.state["weights"].tolist() == pytest.approx(
        [1 / 0.5**2 / (1 / 0.5**2 + 0.5), 0.5 / (1 / 0.5**2 + 0.5), 0]
    )
    method.prepare(lambda *arguments: (before, torch.full((2, 3), 2.5)), draw(size=30), seed=0)
    assert method.state["weights"].tolist() == pytest.approx([1 / 3] * 3)


def test_g_blend_compares_each_loss_with_its_own_start():
    """Each training comes with its own losses before.

    It starts from its own initialisation, because stages are seeded by their name.
    """
    method = make_method("g_blend")
    # Of the unimodal and of the fused training
    befores = [
        torch.tensor([[2.0, 2.0, 5.0]] * 2),
        torch.tensor([[5.0, 5.0, 2.0]] * 2),
    ]
    after, calls = torch.tensor([[0.5, 0.5, 0.5], [1.0, 1.5, 1.25]]), iter(befores)
    method.prepare(lambda *arguments: (next(calls), after), draw(size=30), seed=0)
    expected = blend_weights([2.0] * 3, after[0].tolist(), [2.0] * 3, after[1].tolist())
    assert method.state["weights"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_g_blend_loss_is_the_weighted_sum(count, missing):
    method, model = ready("g_blend", count)
    batch = draw(count, missing=missing).batch()
    out = run(model, batch)
    z = arrays(
        [values * batch.mask[:, m, None] for m, values in enumerate(model.embed(batch.inputs))]
    )
    losses = []
    for m, classifier in enumerate(model.head.classifiers):
        (weight, bias), rows = arrays(classifier.parameters()), batch.mask[:, m].numpy()
        losses.append(mean_nll(z[m][rows] @ weight.T + bias, batch.targets.numpy()[rows]))
    weight, bias = arrays(model.head.classifier.parameters())
    losses.append(mean_nll(np.concatenate(z, 1) @ weight.T + bias, batch.targets.numpy()))
    assert method.loss(out, model, batch, 0.5).item() == pytest.approx(
        sum(losses) / (count + 1), rel=1e-5
    )
    weights = [0.1, 0.2, 0.3, 0.4][-count - 1 :]
    method.state["weights"] = torch.tensor(weights)
    assert method.loss(out, model, batch, 0.5).item() == pytest.approx(
        sum(w * loss for w, loss in zip(weights, losses)), rel=1e-5
    )


# -- MSLR


@pytest.mark.parametrize("count", [2, 3])
def test_mslr_groups_hold_each_modalitys_own_parameters(count):
    method, model = ready("mslr", count)
    groups = {group["modality"]: group for group in method.parameter_groups(model)}
    assert list(groups) == list(INPUTS)[:count]
    for m, group in enumerate(groups.values()):
        own = {
            key
            for key, value in model.named_parameters()
            if any(value is other for other in group["params"])
        }
        assert own == {
            key
            for key, _ in model.named_parameters()
            if key.startswith((f"encoders.{m}.", f"head.classifiers.{m}."))
        }
        assert len(own) == 6 and group["scale"] == 1.0


def test_mslr_moves_the_rates_every_window_and_by_the_own_accuracy():
    method, model = ready("mslr", window=3)
    optimizer = torch.optim.SGD(method.parameter_groups(model), lr=0.1)
    accuracies = {
        "audio": [0.2, 0.3, 0.7, 0.8, 0.6, 0.4, 0.5],
        "video": [0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.1],
    }
    expected = {m: [1, 1, row[2] / (sum(row[:3]) / 3)] for m, row in accuracies.items()}
    for m, row in accuracies.items():
        scale = expected[m][-1]
        expected[m] += [scale, scale, *[scale * row[5] / (sum(row[3:6]) / 3)] * 2]
    assert (
        expected["audio"][2] > 1 > expected["audio"][5] / expected["audio"][2]
        and expected["video"][2] == 1
    )
    for epoch in range(7):
        method.after_epoch(
            {
                "epoch": epoch + 1,
                **{f"validation.accuracy.{m}": row[epoch] for m, row in accuracies.items()},
            },
            optimizer,
        )
        for group in optimizer.param_groups:
            assert group["scale"] == pytest.approx(expected[group["modality"]][epoch], rel=1e-9), (
                epoch,
                group["modality"],
            )
    before = [group["scale"] for group in optimizer.param_groups]
    method.after_epoch({"epoch": 9}, optimizer)  # no validation split
    assert [group["scale"] for group in optimizer.param_groups] == before


def test_mslr_loss_is_the_cross_entropy_of_the_summed_logits():
    method, model = ready("mslr", 3)
    batch = draw(3, missing=0.3).batch()
    total = 0
    for m, (values, classifier) in enumerate(
        zip(arrays(model.embed(batch.inputs)), model.head.classifiers)
    ):
        weight, bias = arrays(classifier.parameters())
        total = total + (values @ weight.T + bias) * batch.mask[:, m, None].numpy()
    loss = method.loss(run(model, batch), model, batch, 0.5)
    assert loss.item() == pytest.approx(mean_nll(total, batch.targets.numpy()), rel=1e-5)


# -- greedy


def fill_gradients(model, factors, seed):
    """Random gradients, times ``factors[prefix]`` where a parameter's name begins with prefix."""
    torch.manual_seed(seed)
    for key, value in model.named_parameters():
        value.grad = torch.randn_like(value) * next(
            (factor for prefix, factor in factors.items() if key.startswith(prefix)), 1.0
        )


def add_speeds(model, sums):
    """Add to ``sums``: |gradient|^2 / |parameter|^2 of each branch's bypass and main parameters."""
    prefixes = {}
    for m in range(2):
        prefixes["bypass", m] = (f"head.excite.{m}.", "head.squeeze.")
        prefixes["main", m] = (f"encoders.{m}.", f"head.classifiers.{m}.")
    for place, start in prefixes.items():
        gradient = parameter = 0.0
        for key, value in model.named_parameters():
            if key.startswith(start):
                gradient += sum(x * x for x in value.grad.flatten().tolist())
                parameter += sum(x * x for x in value.detach().flatten().tolist())
        sums[place] = sums.get(place, 0.0) + gradient / parameter


def gap_of(sums):
    speed = [math.log10(sums["bypass", m] / sums["main", m]) for m in range(2)]
    return speed[0] - speed[1]


@pytest.mark.parametrize("caring", [0, 1])
@pytest.mark.parametrize(("scaled", "factor"), [("encoders", 0.1), ("head.excite", 9.0)])
def test_greedy_rebalances_the_branch_that_learns_faster_from_what_it_is_told(
    scaled, factor, caring
):
    sums, gaps, factors = {}, [], {f"{scaled}.{caring}": factor}
    method, model = ready("greedy", alpha=1e9)
    batch = draw().batch()
    for step in range(3):
        fill_gradients(model, factors, step)
        add_speeds(model, sums)
        gaps.append(gap_of(sums))
    assert all((gap > 0) == (caring == 0) for gap in gaps)
    for edge, expected in (
        (0.999, caring),
        (1.001, None),
    ):  # alpha just under the third step's |gap|, and just over it
        method, model = ready("greedy", alpha=1e9)
        for step in range(3):
            if step == 2:
                method.options.alpha = edge * abs(gaps[2])
            assert model.head.rebalance is None
            fill_gradients(model, factors, step)
            method.after_backward(model, batch, None)
        assert model.head.rebalance == expected


def test_greedy_rebalances_for_its_number_of_steps_which_do_not_count():
    method, model = ready("greedy", alpha=1e-6, steps=3)
    batch, sums, regular = draw().batch(), {}, []
    for step in range(9):
        regular.append(model.head.rebalance is None)
        fill_gradients(model, {"encoders.0": 0.1} if step == 0 else {"encoders.0": 30.0}, step)
        if regular[-1]:
            add_speeds(model, sums)
        method.after_backward(model, batch, None)
        if step % 4 != 3:  # a regular one and three that re-balance
            assert model.head.rebalance == (0 if gap_of(sums) > 0 else 1), step
    assert regular == [step % 4 == 0 for step in range(9)]
    assert gap_of(sums) < 0  # the regular steps have turned it round


def greedy_logits(model, batch, branch, replaced=None):
    z, head = model.embed(batch.inputs), model.head
    seen = [
        getattr(head, f"average_{m}").expand_as(z[m]) if m == replaced else z[m] for m in range(2)
    ]
    joint = torch.relu(torch.cat(seen, 1) @ head.squeeze.weight.T + head.squeeze.bias)
    gate = torch.sigmoid(joint @ head.excite[branch].weight.T + head.excite[branch].bias)
    return (2 * gate * z[branch]) @ head.classifiers[branch].weight.T + head.classifiers[
        branch
    ].bias


@pytest.mark.parametrize("caring", [0, 1])
def test_greedy_passes_nothing_to_the_other_encoder_in_a_rebalancing_step(caring):
    method, model = ready("greedy")
    with torch.no_grad():
        model.head.squeeze.bias.add_(1)  # no dead unit
    batch = draw().batch()
    z = arrays(model.embed(batch.inputs))
    run(model, batch)
    for m in range(2):
        np.testing.assert_allclose(
            getattr(model.head, f"average_{m}"), 0.1 * z[m].mean(0), atol=1e-6
        )
    model.head.momentum = 1.0  # the averages stay
    for rebalance in (None, caring):
        model.head.rebalance = rebalance
        replaced = None if rebalance is None else 1 - rebalance
        out = run(model, batch)
        for branch in range(2):
            close(out.modality_logits[branch], greedy_logits(model, batch, branch, replaced), 1e-6)
        close(
            out.logits,
            sum(greedy_logits(model, batch, branch, replaced) for branch in range(2)) / 2,
            1e-6,
        )
        close(
            method.loss(out, model, batch, 0.5),
            sum(F.cross_entropy(logits, batch.targets) for logits in out.modality_logits),
        )
        to_other = by_encoder(model, F.cross_entropy(out.modality_logits[caring], batch.targets))[
            1 - caring
        ]
        assert (to_other.abs().max() > 1e-4) == (rebalance is None)
        assert not to_other.any() or rebalance is None
        assert (
            by_encoder(model, F.cross_entropy(out.modality_logits[caring], batch.targets))[caring]
            .abs()
            .max()
            > 1e-3
        )


def test_greedy_steps_start_and_resume_rebalancing():
    method, model = ready("greedy", alpha=1e-9, steps=2)
    optimizer, seen, batch = (
        torch.optim.SGD(method.parameter_groups(model), lr=0.1),
        [],
        draw().batch(),
    )
    for _ in range(7):
        seen.append(model.head.rebalance is not None)
        method.step(model, optimizer, batch, progress=0.1)
    assert seen == [False, True, True, False, True, True, False]
    caring, model.head.rebalance = model.head.rebalance, None
    assert caring is not None
    method.before_epoch(model, draw(), 0.5)
    assert model.head.rebalance == caring


def test_greedy_predicts_alike_between_rebalancing_steps_and_others():
    method, model = ready("greedy", alpha=1e-9)
    optimizer, batch = torch.optim.SGD(method.parameter_groups(model), lr=0.1), draw().batch()
    with torch.no_grad():
        model.head.squeeze.bias.add_(1)  # no dead unit
    method.step(model, optimizer, batch, progress=0.1)
    assert model.head.rebalance is not None  # so epochs end, and are scored, more often than not
    whole = sum(greedy_logits(model, batch, branch) for branch in range(2)) / 2
    replaced = (
        sum(greedy_logits(model, batch, branch, 1 - model.head.rebalance) for branch in range(2))
        / 2
    )
    assert (whole - replaced).abs().max() > 1e-3
    close(model(batch.inputs).logits, whole, 1e-6)
    close(model.eval()(batch.inputs).logits, whole, 1e-6)
    close(model(batch.inputs, batch.targets).logits, whole, 1e-6)


# -- QMF


@pytest.mark.parametrize("count", [2, 3])
def test_qmf_confidences_weigh_the_logits_and_send_nothing_back(count):
    method, model = ready("qmf", count)
    batch = draw(count).batch()
    out = run(model, batch)
    logits = [
        z @ classifier.weight.T + classifier.bias
        for z, classifier in zip(model.embed(batch.inputs), model.head.classifiers)
    ]
    confidence = np.array(
        [
            [math.log(sum(math.exp(x) for x in row)) / 10 for row in values]
            for values in arrays(logits)
        ]
    ).T
    np.testing.assert_allclose(out.weights.detach(), confidence, atol=1e-6)
    constant = torch.tensor(confidence, dtype=torch.float32)
    fused = sum(constant[:, m, None] * values for m, values in enumerate(logits))
    close(out.logits, fused, 1e-6)
    close(model.head.fuse(model.embed(batch.inputs)).logits, fused, 1e-6)
    loss = F.cross_entropy(fused, batch.targets)
    close(out.parts.fused, loss, 1e-6)
    close(out.loss, loss + sum(F.cross_entropy(values, batch.targets) for values in logits))
    for found, expected in zip(by_encoder(model, out.parts.fused), by_encoder(model, loss)):
        close(found, expected, 1e-6)
    through = F.cross_entropy(
        sum(out.weights[:, m, None] * values for m, values in enumerate(logits)), batch.targets
    )
    # It would have shown
    assert (
        max(
            (a - b).abs().max() for a, b in zip(by_encoder(model, through), by_encoder(model, loss))
        )
        > 1e-3
    )


def qmf_ranking(confidence, history):
    total, size = 0.0, len(history)
    for i in range(size):
        for j in range(size):
            if j == (i + 1) % size and history[i] != history[j]:
                g = 1 if history[i] > history[j] else -1
                term = g * (confidence[i] - confidence[j]) + abs(history[i] - history[j])
                total = total + (term if term > 0 else 0 * term)
    return total / size


@pytest.mark.parametrize("count", [2, 3])
def test_qmf_ranks_confidences_by_the_running_mean_of_the_own_losses(count):
    """Three epochs of two batches, the encoders moving between them.

    Loss and gradients are computed by hand at each step.
    """
    method, model = ready("qmf", count, weight=0.7)
    split, size = draw(count, size=14), 14
    losses = [[[] for _ in range(size)] for _ in range(count)]  # of a sample in the epochs so far
    zero = 0
    for epoch in range(3):
        method.before_epoch(model, split, epoch / 3)
        for rows in torch.randperm(size, generator=torch.Generator().manual_seed(epoch)).split(7):
            batch = split.__getitems__(rows)
            out = run(model, batch)
            expected = out.loss
            for m in range(count):
                mean = [sum(own) / len(own) if own else 0.0 for own in losses[m]]
                width = max(mean) - min(mean)
                scaled = [(value - min(mean)) / width if width else 0.0 for value in mean]
                assert not width or (min(scaled) == 0 and max(scaled) == 1)
                confidence = torch.logsumexp(out.modality_logits[m], 1) / 10
                ranking = qmf_ranking(confidence, [scaled[i] for i in rows.tolist()])
                zero += not isinstance(ranking, torch.Tensor)
                expected = expected + 0.7 * ranking
            loss = method.loss(out, model, batch, epoch / 3)
            close(loss, expected)
            for found, plain in zip(by_encoder(model, loss), by_encoder(model, expected)):
                close(found, plain)
            if epoch:
                assert (loss - out.loss).abs() > 0.01
                assert (
                    max(
                        (a - b).abs().max()
                        for a, b in zip(by_encoder(model, loss), by_encoder(model, out.loss))
                    )
                    > 1e-3
                )
            for m, values in enumerate(arrays(out.modality_logits)):
                for i, row in zip(rows.tolist(), values):
                    losses[m][i].append(-math.log(softmax(row)[split.targets[i]]))
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.3 * torch.randn_like(value))
    assert zero == 2 * count  # no sample of the first epoch's batches has a history yet


@pytest.mark.parametrize("perfect", [True, False])
def test_qmf_ranks_among_the_samples_that_have_the_modality(perfect):
    """``perfect``: one sample of each modality has a history of 0.

    Then samples without any cannot move the scale's lower end.
    """
    method, model = ready("qmf", weight=1.0)
    split = draw(size=14, missing=0.4)
    batch = split.__getitems__(torch.arange(14))
    out, expected = run(model, batch), 0
    method.before_epoch(model, split, 0.0)
    method.loss(out, model, batch, 0.0)  # fills the history
    for m, logits in enumerate(arrays(out.modality_logits)):
        rows = [i for i in range(14) if split.mask[i, m]]
        history = [-math.log(softmax(logits[i])[split.targets[i]]) for i in rows]
        if perfect:
            history[2] = method.state["sum"][rows[2], m] = 0.0
        scaled = [(value - min(history)) / (max(history) - min(history)) for value in history]
        expected += qmf_ranking(torch.logsumexp(out.modality_logits[m][rows], 1) / 10, scaled)
        assert 5 < len(rows) < 14
    close(method.loss(out, model, batch, 0.0) - out.loss, expected)


# -- MLA


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_mla_weighs_by_the_entropy_of_the_raw_logits(count, missing):
    method, model = ready("mla", count)
    with torch.no_grad():
        # Of the heads' own figures: not in the fusion
        model.head.gate.own_temperature.copy_(torch.tensor([3.0, 0.3, 2.0])[:count])
        model.head.gate.log_scale.fill_(math.log(1.7))
        for classifier in model.head.classifiers:
            classifier.weight.mul_(6)
    split = draw(count, missing=missing)
    out = model.eval().head.fuse(model.embed(split.inputs), split.mask)
    logits = []
    for z, classifier in zip(arrays(model.embed(split.inputs)), model.head.classifiers):
        weight, bias = arrays(classifier.parameters())
        logits.append(z @ weight.T + bias)
    for i in range(len(split)):
        there = [m for m in range(count) if split.mask[i, m]]
        entropy = {m: -sum(p * math.log(p) for p in softmax(logits[m][i])) for m in there}
        weights = dict(
            zip(there, softmax(np.array([max(entropy.values()) - entropy[m] for m in there])))
        )
        assert out.weights[i].tolist() == pytest.approx(
            [weights.get(m, 0.0) for m in range(count)], abs=1e-5
        )
        assert all(out.weights[i, m] == 0 for m in range(count) if m not in there)
        np.testing.assert_allclose(
            out.logits[i].detach(),
            1.7 * sum(w * logits[m][i] for m, w in weights.items()),
            atol=1e-4,
        )
    assert split.mask.all() == (missing == 0) and out.weights.std(0).min() > 0.02


# -- missing modalities


class Direction(nn.Module):
    """A layer over its input divided by the input's norm.

    NaN where the input is zero, as a missing modality's is; if it is ``careful``, zero there.
    """

    def __init__(self, size, careful):
        super().__init__()
        self.layer, self.careful = nn.Linear(size, size), careful

    def forward(self, values):
        direction = values / values.norm(dim=1, keepdim=True)
        return self.layer(values) + (direction.nan_to_num() if self.careful else direction)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.joint))
def test_a_missing_modalitys_embedding_may_be_nan(name, count):
    """Two steps: all gradients are finite, and as with zeros there.

    (An encoder whose own backward divides by zero is out of reach.)
    """
    if METHODS[name].modalities not in (None, count):
        pytest.skip("defined for two modalities")
    found = []
    for careful in (True, False):
        torch.manual_seed(1)
        method = make_method(name)
        model = method.build(
            {m: Direction(INPUTS[m], careful) for m in list(INPUTS)[:count]}, CLASSES
        )
        split = draw(count, size=24, missing=0.4)
        nan = [bool(z.isnan().any()) for z in model.embed(split.inputs)]
        assert nan == [not careful] * count
        if method.needs_budgets:
            method.set_budgets(
                model, Budgets.given({m: 0.3 + 0.1 * i for i, m in enumerate(split.inputs)})
            )
        optimizer, gradients = torch.optim.SGD(method.parameter_groups(model), lr=0.1), []
        for progress in (0.1, 0.9):
            method.before_epoch(model, split, progress)
            batch = split.__getitems__(torch.arange(24))
            out = run(model, batch, progress)
            loss = method.loss(out, model, batch, progress)
            assert loss.isfinite()
            method.backward(loss, model, batch, out)
            torch.manual_seed(2)
            method.after_backward(model, batch, out)
            gradients.append(
                {
                    key: value.grad.clone()
                    for key, value in model.named_parameters()
                    if value.grad is not None
                }
            )
            first = len(gradients) == 1  # of ReconBoost's epochs: one modality alone learns
            learns = 1 if name == "reconboost" and first else count
            assert sum(key.startswith("encoders") for key in gradients[-1]) == 2 * learns
            assert all(value.isfinite().all() for value in gradients[-1].values())
            optimizer.step()
            optimizer.zero_grad()
        assert all(
            value.isfinite().all()
            for value in model.state_dict().values()
            if value.is_floating_point()
        )
        found.append(gradients)
    for careful, careless in zip(*found):
        assert careful.keys() == careless.keys() and all(
            values.any() for key, values in careless.items() if key.startswith("encoders")
        )
        for key in careful:
            close(careless[key], careful[key], 1e-6)
