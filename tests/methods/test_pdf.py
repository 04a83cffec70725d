"""PDF against its formulas, sample by sample."""

import math

import numpy as np
import pytest
import torch
from test_formulas import CLASSES, INPUTS, arrays, by_encoder, close, draw, ready, run, softmax
from torch.nn import functional as F

from iibalance.methods.pdf import co_belief, relative_calibration


def sharper(model):
    """Confidences and logits of any size, instead of a new network's."""
    with torch.no_grad():
        for network in model.head.predictors:
            network[-1].weight.mul_(8)
        for classifier in model.head.classifiers:
            classifier.weight.mul_(5)


def told(model, batch):
    """Each modality's logits and predicted confidence, M of [B, K] and M of [B] arrays."""
    logits, confidence = [], []
    parts = zip(arrays(model.embed(batch.inputs)), model.head.classifiers, model.head.predictors)
    for z, classifier, network in parts:
        weight, bias = arrays(classifier.parameters())
        logits.append(z @ weight.T + bias)
        first, second, last = (arrays(network[i].parameters()) for i in (0, 2, 4))
        hidden = np.maximum(z @ first[0].T + first[1], 0)
        hidden = np.maximum(hidden @ second[0].T + second[1], 0)
        score = (hidden @ last[0].T + last[1])[:, 0]
        confidence.append(1 / (1 + np.exp(-score)))
    return logits, confidence


def weights_of(confidence, logits, there, calibrated):
    """w of one sample, for the modalities that it has."""
    log = {m: math.log(confidence[m]) for m in there}
    values = []
    for m in there:
        holo = sum(log[j] for j in there if j != m) / sum(log.values())
        belief = confidence[m] + holo
        if calibrated and len(there) > 1:
            spread = {
                j: sum(abs(p - 1 / CLASSES) for p in softmax(logits[j])) / CLASSES for j in there
            }
            others = [spread[j] for j in there if j != m]
            belief *= min(1.0, spread[m] / (sum(others) / len(others)))
        values.append(belief)
    return dict(zip(there, softmax(np.array(values))))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_predictions_are_weighted_by_calibrated_beliefs(count, missing):
    _, model = ready("pdf", count)
    sharper(model)
    split = draw(count, missing=missing)
    head = model.eval().head
    head.own_temperature.copy_(torch.tensor([3.0, 0.3, 2.0])[:count])
    head.cool(1.7)
    out = head.fuse(model.embed(split.inputs), split.mask)
    logits, confidence = told(model, split)
    moved = 0.0
    for i in range(len(split)):
        there = [m for m in range(count) if split.mask[i, m]]
        own = [values[i] for values in logits]
        w = weights_of([p[i] for p in confidence], own, there, calibrated=True)
        plain = weights_of([p[i] for p in confidence], own, there, calibrated=False)
        moved = max([moved, *(abs(w[m] - plain[m]) for m in there)])
        expected = [w.get(m, 0.0) for m in range(count)]
        assert out.weights[i].tolist() == pytest.approx(expected, abs=1e-5)
        fused = sum(w[m] * own[m] for m in there) / 1.7
        np.testing.assert_allclose(out.logits[i].detach(), fused, atol=1e-4)
        for m in there:
            np.testing.assert_allclose(
                out.modality_logits[m][i].detach(), own[m] / head.own_temperature[m], atol=1e-4
            )
    if count > 1:
        assert out.weights.std(0).min() > 0.01 and moved > 0.02


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("unimodal", [1.0, 0.3])
def test_the_loss_and_what_goes_back_from_it(count, missing, unimodal):
    method, model = ready("pdf", count, unimodal=unimodal)
    sharper(model)
    split = draw(count, missing=missing)
    split.targets[3] = -100
    batch = split.batch()
    out = run(model, batch)
    logits, confidence = told(model, split)
    z = model.embed(batch.inputs)
    total, uncalibrated, valid = 0.0, torch.zeros(len(split), count), split.targets != -100
    for i in range(len(split)):
        there = [m for m in range(count) if split.mask[i, m]]
        w = weights_of([p[i] for p in confidence], [v[i] for v in logits], there, calibrated=False)
        for m, share in w.items():
            uncalibrated[i, m] = share
    close(out.weights, uncalibrated)
    own = [
        (values @ classifier.weight.T + classifier.bias) * split.mask[:, m, None]
        for m, (values, classifier) in enumerate(zip(z, model.head.classifiers))
    ]
    fused = sum(uncalibrated[:, m, None] * own[m] for m in range(count))
    close(out.logits, fused)
    total = F.cross_entropy(fused[valid], split.targets[valid])
    far = 0.0
    for m in range(count):
        rows = valid & split.mask[:, m]
        total = total + unimodal * F.cross_entropy(own[m][rows], split.targets[rows])
        gaps = [
            abs(confidence[m][i] - softmax(logits[m][i])[split.targets[i]])
            for i in range(len(split))
            if rows[i]
        ]
        far += sum(gaps) / len(gaps)
    assert far > 0.1
    assert method.loss(out, model, batch, 0.5).item() == pytest.approx(total.item() + far, rel=1e-4)
    # Weights, confidences and their targets are constants to encoders and classifiers
    for found, plain in zip(by_encoder(model, out.loss), by_encoder(model, total)):
        close(found, plain)
    classifiers = list(model.head.classifiers.parameters())
    for found, plain in zip(
        *(torch.autograd.grad(loss, classifiers, retain_graph=True) for loss in (out.loss, total))
    ):
        close(found, plain)
    # and the predictors learn from their own term alone
    gap = 0
    for m, network in enumerate(model.head.predictors):
        rows = valid & split.mask[:, m]
        truth = own[m].softmax(1)[torch.arange(len(split)), split.targets.clamp_min(0)]
        gap = gap + (network(z[m])[:, 0].sigmoid() - truth.detach())[rows].abs().mean()
    predictors = list(model.head.predictors.parameters())
    for found, plain in zip(
        *(torch.autograd.grad(loss, predictors, retain_graph=True) for loss in (out.loss, gap))
    ):
        close(found, plain)
        assert found.any()


def test_predictors_learn_how_right_a_modality_is():
    """One always right and one that guesses: their confidences come to about 1 and 1 / K."""
    method, model = ready("pdf", seed=1)
    with torch.no_grad():
        for index in range(2):
            model.head.classifiers[index].weight.zero_()
            model.head.classifiers[index].bias.zero_()
        model.head.classifiers[0].bias[1] = 6.0
    split = draw(size=60)
    split.targets[:] = 1
    optimizer = torch.optim.Adam(model.head.predictors.parameters(), lr=0.02)
    for step in range(150):
        method.step(model, optimizer, split.batch(), progress=step / 150)
    with torch.no_grad():
        z = model.embed(split.inputs)
        p = model.head.log_confidence(z, None).exp().mean(0)
        weights = model.eval().head.fuse(z).weights.mean(0)
    right = math.exp(6) / (math.exp(6) + 2)
    assert p.tolist() == pytest.approx([right, 1 / 3], abs=0.05)
    assert weights[0] > 0.75


def test_two_modalities_of_which_the_answer_is_known():
    """p = 0.8 and 0.4: holo-confidences log 0.4 / log 0.32 and log 0.8 / log 0.32."""
    holo = math.log(0.4) / math.log(0.32), math.log(0.8) / math.log(0.32)
    found = co_belief(torch.tensor([[0.8, 0.4]]).log())[0].tolist()
    assert found == pytest.approx([0.8 + holo[0], 0.4 + holo[1]], rel=1e-5)
    # (3/4, 1/4) is 1/4 from uniform, (5/8, 3/8) is 1/8
    logits = [torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.625, 0.375]]).log()]
    k = relative_calibration(logits, None)[0].tolist()
    assert k == pytest.approx([1.0, 0.5], rel=1e-5)


def test_holo_confidences_are_shares_however_sure_all_are():
    log_p = torch.nn.functional.logsigmoid(torch.linspace(-40, 40, 801, dtype=torch.float64))
    pairs = torch.stack([log_p, log_p.flip(0).roll(7)], 1).float()
    for log_confidence in (pairs, log_p[:, None].float().expand(-1, 2)):
        holo = co_belief(log_confidence) - log_confidence.exp()
        assert (holo > -1e-6).all() and (holo < 1 + 1e-6).all()


@pytest.mark.parametrize("score", [200.0, -200.0])
def test_confidences_of_0_and_1_divide_by_nothing(score):
    _, model = ready("pdf")
    with torch.no_grad():
        for network in model.head.predictors:
            network[-1].weight.zero_()
            network[-1].bias.fill_(score)
    batch = draw().batch()
    out = run(model, batch)
    close(out.weights, torch.full((12, 2), 0.5))
    out.loss.backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in model.parameters())


def test_a_prediction_that_is_uniform_weighs_least():
    _, model = ready("pdf")
    with torch.no_grad():
        model.head.classifiers[1].weight.zero_()
        model.head.classifiers[1].bias.zero_()
        for network in model.head.predictors:
            network[-1].weight.zero_()
            network[-1].bias.fill_(1.0)
    inputs = {m: torch.randn(5, INPUTS[m]) for m in ("audio", "video")}
    weights = model.eval()(inputs).weights
    p = 1 / (1 + math.exp(-1))
    expected = softmax(np.array([p + 0.5, 0.0]))
    for row in weights.tolist():
        assert row == pytest.approx(expected.tolist(), abs=1e-4)
