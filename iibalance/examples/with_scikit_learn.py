"""scikit-learn: a DataFrame through a Pipeline, cross-validation, missing modalities, saving.

The breast cancer data of scikit-learn are one table whose 30 columns are three groups of ten: the
mean, the standard error and the worst value of ten measurements of cell nuclei. Each group is one
modality here, named by a pattern of column names.

The script prints the accuracy of five-fold cross-validation, the accuracy on test samples of which
half have lost one modality (NaN), and what each modality adds to the prediction that is least
certain. It saves the classifier and loads it again.

    python iibalance/examples/with_scikit_learn.py
"""

import tempfile
from pathlib import Path

import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import iibalance

MODALITIES = {"mean": "mean *", "error": "* error", "worst": "worst *"}


def load_table():
    """A DataFrame [569, 30] and the diagnosis of each row, "benign" or "malignant"."""
    data = load_breast_cancer(as_frame=True)
    return data.data, data.target_names[data.target]


def make_classifier(columns):
    # Column names must survive the first step: they say which modality a column belongs to.
    scale = ColumnTransformer(
        [("scale", StandardScaler(), list(columns))], verbose_feature_names_out=False
    ).set_output(transform="pandas")
    return make_pipeline(
        scale,
        iibalance.IIBalanceClassifier(MODALITIES, epochs=8, embedding_dim=16, width=8),
    )


def main():
    table, diagnosis = load_table()
    classifier = make_classifier(table.columns)
    scores = cross_val_score(classifier, table, diagnosis, cv=5)
    print(f"cross-validated accuracy: {scores.mean():.3f} +- {scores.std():.3f}")

    train, test, train_y, test_y = train_test_split(
        table, diagnosis, test_size=0.25, stratify=diagnosis, random_state=0
    )
    classifier.fit(train, train_y)
    fitted = classifier[-1]
    print(fitted.budgets_.table())
    print(f"test accuracy: {classifier.score(test, test_y):.3f}")

    # A sample whose columns of one modality are all NaN lacks that modality.
    incomplete = test.copy()
    worst = [column for column in table.columns if column.startswith("worst")]
    incomplete.iloc[::2, incomplete.columns.get_indexer(worst)] = np.nan
    score = classifier.score(incomplete, test_y)
    print(f"test accuracy, half without the worst values: {score:.3f}")

    # Nats by which each modality raises the log-odds of what is predicted.
    scaled = classifier[:-1].transform(test)
    probability = fitted.predict_proba(scaled).max(1)
    doubtful = scaled.iloc[[probability.argmin()]]
    added = fitted.contributions(doubtful)[0]
    parts = ", ".join(f"{name} {nats:+.2f}" for name, nats in zip(fitted.modalities_, added))
    answer = fitted.predict(doubtful)[0]
    print(f"least certain sample: {answer}, p = {probability.min():.2f} ({parts} nats)")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "classifier.safetensors"
        fitted.save(file)
        again = iibalance.IIBalanceClassifier.load(file)
        same = np.array_equal(again.predict_proba(scaled), fitted.predict_proba(scaled))
        print(f"saved and loaded, {file.stat().st_size // 1024} KiB: same predictions: {same}")


if __name__ == "__main__":
    main()
