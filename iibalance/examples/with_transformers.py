"""Hugging Face transformers: a BERT and a ViT, made from configs, as encoders.

The samples are scikit-learn's digits, each with a sentence that someone might say of it: "i think
it is odd and small". It tells part of the label, and one sentence in ten is wrong. A tokenizer's
output goes in as it is, a dict of input_ids and attention_mask; encoders of your own are given its
fields by name, and their pooler_output is the embedding.

Both ways of training are shown: ``iibalance.train``, which writes a run's folder with everything in
it, and ``IIBalanceClassifier``, which is scikit-learn's interface. It prints what each gives, and
the budgets of both modalities. With ``BertModel.from_pretrained(...)`` in place of the configs, the
rest stays as it is.

    python iibalance/examples/with_transformers.py
"""

import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import iibalance

WORDS = ["[pad]", *"i think it is well maybe odd even and small large".split()]
TINY = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
TINY["initializer_range"] = 0.2  # the default 0.02 is for wide models and long training


def make_bert():
    return BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **TINY))


def make_vit():
    return ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, **TINY))


def tokenize(sentences):
    """What a tokenizer with padding gives: input_ids and attention_mask, both [N, T] int64."""
    ids = [[WORDS.index(word) for word in sentence.split()] for sentence in sentences]
    length = max(map(len, ids))
    padded = np.array([row + [0] * (length - len(row)) for row in ids])
    return {"input_ids": padded, "attention_mask": (padded > 0).astype(np.int64)}


def make_samples(count=900):
    """Images [N, 1, 8, 8] with sentences, and names of digits as targets."""
    random = np.random.default_rng(0)
    pixels, digits = load_digits(return_X_y=True)
    pixels, digits = pixels[:count], digits[:count]
    said = np.where(random.random(count) < 0.1, random.integers(0, 10, count), digits)
    openings = random.choice(["", "well ", "maybe ", "i think "], count)
    sentences = [
        f"{opening}it is {'odd' if digit % 2 else 'even'} and {'large' if digit > 4 else 'small'}"
        for opening, digit in zip(openings, said)
    ]
    names = np.array("zero one two three four five six seven eight nine".split())
    inputs = {"text": tokenize(sentences), "image": pixels.reshape(-1, 1, 8, 8)}
    return iibalance.Samples(inputs, names[digits])


def main():
    torch.set_num_threads(1)  # models this small gain nothing from a second one
    samples = make_samples()
    encoders = {"text": make_bert, "image": make_vit}

    with tempfile.TemporaryDirectory() as folder:
        config = iibalance.RunConfig(
            epochs=12,
            output=f"{folder}/run",
            training=iibalance.TrainingConfig(learning_rate=5e-3, alone=False, progress=False),
            budgets=iibalance.BudgetConfig(folds=2),
        )
        result = iibalance.train(config, data=samples, encoders=encoders)
        scores = result.metrics["test"]
        print(f"train: test accuracy {scores['accuracy']:.3f}, NLL {scores['nll']:.3f}")
        again = iibalance.load(folder + "/run", encoders=encoders)
        first = again.predict({"image": samples.inputs["image"][:1]})  # a sample without text
        answer = again.class_names[int(first.probabilities.argmax())]
        print(f"  loaded again, the first image alone is a {answer}: {samples.targets[0]}")
    for name, value in zip(result.budgets.modalities, result.budgets.values):
        alone = scores["modalities"][name]["accuracy"]
        print(f"  {name}: budget {value:.2f}, accuracy of its own head {alone:.3f}")

    train, test = train_test_split(np.arange(len(samples)), test_size=0.2, random_state=0)
    classifier = iibalance.IIBalanceClassifier(
        encoders=encoders, epochs=12, learning_rate=5e-3, folds=2
    )
    classifier.fit(samples[train], samples.targets[train])
    whole = classifier.score(samples[test], samples.targets[test])
    image = classifier.score({**samples[test].inputs, "text": None}, samples.targets[test])
    print(f"IIBalanceClassifier: test accuracy {whole:.3f}, without the sentences {image:.3f}")


if __name__ == "__main__":
    main()
