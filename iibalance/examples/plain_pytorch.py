"""A PyTorch loop of your own: two encoders, one IIBalanceHead, budgets before and a gate after.

Each handwritten digit of scikit-learn is cut in two: its upper and its lower half are the
modalities. The script estimates how much of the label each half can tell, trains two encoders and
the head in a plain loop, and fits the gate on validation samples and noisy copies of them.

It prints the budgets, and the accuracy on test samples with the gate still neutral (a plain sum)
and fitted: clean, without the lower half, and with noise on the lower half.

    python iibalance/examples/plain_pytorch.py
"""

import torch
from sklearn.datasets import load_digits

import iibalance

HALVES = ("upper", "lower")


def load_halves():
    """({"upper": [N, 32], "lower": [N, 32]}, targets [N]) for training, validation and test."""
    pixels, targets = map(torch.tensor, load_digits(return_X_y=True))
    train, validation, test = torch.randperm(len(targets)).split([1077, 360, 360])
    pixels = (pixels - pixels[train].mean(0)) / pixels[train].std(0).clamp_min(1)
    halves = dict(zip(HALVES, pixels.float().split(32, dim=1)))
    return [
        ({name: half[rows] for name, half in halves.items()}, targets[rows])
        for rows in (train, validation, test)
    ]


def make_encoder():
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))


def embed(encoders, inputs):
    return {name: encoders[name](inputs[name]) for name in HALVES}


def train(encoders, head, inputs, targets, epochs=20):
    optimizer = torch.optim.AdamW([*encoders.parameters(), *head.parameters()], lr=3e-3)
    for epoch in range(epochs):
        for rows in torch.randperm(len(targets)).split(64):
            batch = {name: values[rows] for name, values in inputs.items()}
            # With `progress` the prototype losses come in a little after the cross-entropies.
            out = head(embed(encoders, batch), targets[rows], progress=epoch / epochs)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()


def with_noise(inputs, name, strength):
    """The same samples with noise on one half; ``strength`` in standard deviations."""
    return {**inputs, name: inputs[name] + strength * torch.randn(inputs[name].shape)}


@torch.no_grad()
def fit_gate(encoders, head, inputs, targets):
    """On samples that were not trained on, and on copies with more or less noise on one half."""
    strength = 4 * torch.rand(len(targets), 1)
    copies = [inputs, *(with_noise(inputs, name, strength) for name in HALVES)]
    embedded = [embed(encoders, copy) for copy in copies]
    head.prototypes.set_usual(head.prototypes.novelty(embedded[0]))  # what clean samples look like
    together = {name: torch.cat([part[name] for part in embedded]) for name in HALVES}
    clean = torch.arange(3 * len(targets)) < len(targets)
    head.gate.fit(
        head.heads(together),
        targets.repeat(3),
        surprise=head.prototypes.surprise(together),
        clean=clean,
        sample_weight=torch.where(clean, 1.0, 0.25),  # clean input matters most
    )


@torch.no_grad()
def accuracy(encoders, head, inputs, targets, mask):
    answer = head(embed(encoders, inputs), mask=mask).logits.argmax(1)
    return (answer == targets).float().mean().item()


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # models this small gain nothing from a second one
    (inputs, targets), validation, (test, test_targets) = load_halves()
    makers = dict.fromkeys(HALVES, make_encoder)
    budgets = iibalance.estimate_budgets(inputs, targets, encoders=makers, epochs=8)
    print(budgets.table())

    encoders = torch.nn.ModuleDict({name: make_encoder() for name in HALVES})
    head = iibalance.IIBalanceHead({"upper": 32, "lower": 32}, 10, budgets=budgets)
    train(encoders, head, inputs, targets)
    head.eval()
    noisy = with_noise(test, "lower", strength=3)
    upper_alone = torch.tensor([[True, False]]).expand(len(test_targets), 2)
    cases = {"clean": (test, None), "missing": (test, upper_alone), "noise": (noisy, None)}
    for gate in ("neutral", "fitted"):
        if gate == "fitted":
            fit_gate(encoders, head, *validation)
        for case, (samples, mask) in cases.items():
            score = accuracy(encoders, head, samples, test_targets, mask)
            print(f"{gate} gate, {case}: {score:.3f}")


if __name__ == "__main__":
    main()
