"""The classifier behind scikit-learn's interface: its checks, and what modalities add to them."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from torch import nn

from iibalance import Budgets, IIBalanceClassifier, InputError, Samples

SMALL = {"epochs": 6, "embedding_dim": 16, "width": 8, "dropout": 0.0}


# scikit-learn's own checks. X is a table there: without `modalities`, all columns are one modality.
# The one check that is not run by this list needs an array library that is not torch's or numpy's.


def _checks():
    found = []
    for estimator, check in estimator_checks.estimator_checks_generator(
        IIBalanceClassifier(**SMALL)
    ):
        name = check.func.__name__
        if name == "check_array_api_input":
            continue
        # A weight of 1000 to 0.0001 is to be seen in the predictions: 40 samples are two steps an
        # epoch.
        if name == "check_class_weight_classifiers":
            estimator.set_params(epochs=40)
        options = "-".join(map(str, check.keywords.values()))
        found.append(pytest.param(estimator, check, id=f"{name}-{options}"[:60]))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator, check", _checks())
def test_scikit_learns_checks(estimator, check):
    check(estimator)


# Modalities.


def task(count=150, seed=0):
    """Three classes; audio tells most, video something, noise nothing."""
    random = np.random.default_rng(seed)
    k = np.arange(count) % 3
    audio = 1.5 * np.eye(3)[k] + 0.5 * random.normal(size=(count, 3))
    video = np.stack([k == 0, k == 1], 1) + 0.8 * random.normal(size=(count, 2))
    return {"audio": audio, "video": video}, np.array(["no", "yes", "maybe"])[k]


@pytest.fixture(scope="module")
def fitted():
    X, y = task()
    return IIBalanceClassifier(**{**SMALL, "epochs": 20}).fit(X, y)


def test_labels_budgets_and_probabilities(fitted):
    X, y = task(seed=1)
    assert list(fitted.classes_) == ["maybe", "no", "yes"]
    assert fitted.score(X, y) > 0.85
    p = fitted.predict_proba(X)
    assert p.shape == (150, 3) and p.dtype == np.float64
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
    assert (fitted.classes_[p.argmax(1)] == fitted.predict(X)).all()
    budgets = dict(zip(fitted.budgets_.modalities, fitted.budgets_.values))
    assert fitted.budgets_.anchor == "audio" and budgets["audio"] > budgets["video"] + 0.1
    trust = fitted.trust(X)
    assert trust.shape == (150, 2) and trust.dtype == np.float64
    assert (trust > 0).all() and (trust <= 1).all() and (trust.mean(0) > 0.8).all()
    X["audio"] = 30 + 9 * X["audio"]  # far from everything seen
    assert fitted.trust(X)[:, 0].mean() < trust[:, 0].mean() - 0.2


def test_contributions_add_up_to_the_gain_over_the_base_rate(fitted):
    X, _ = task(seed=1)
    X["video"] = [None if row % 3 == 0 else value for row, value in enumerate(X["video"])]
    found, p = fitted.contributions(X), fitted.predict_proba(X)
    rate = fitted.model_.base_rate.double().numpy()
    np.testing.assert_allclose(rate, 1 / 3, atol=0.03)  # of what is left beside validation
    best = p.argmax(1)
    odds = np.log(p.max(1) / (1 - p.max(1))) - np.log(rate[best] / (1 - rate[best]))
    np.testing.assert_allclose(found.sum(1), odds, atol=1e-4)
    assert (found[::3, 1] == 0).all() and (found[1::3, 1] != 0).all()
    alone = fitted.predict_proba({"audio": X["audio"], "video": None})
    np.testing.assert_allclose(alone[::3], p[::3], atol=1e-6)


def test_missing_is_the_same_however_it_is_told(fitted):
    X, _ = task(seed=1)
    gone = np.arange(150) % 4 == 0
    mask = np.stack([np.ones(150, bool), ~gone], 1)
    by_mask = fitted.predict_proba(X, mask)
    by_none = {**X, "video": [None if hole else v for hole, v in zip(gone, X["video"])]}
    by_nan = {**X, "video": np.where(gone[:, None], np.nan, X["video"])}
    for other in (by_none, by_nan, Samples(X, mask=mask)):
        assert np.array_equal(by_mask, fitted.predict_proba(other))
    assert not np.array_equal(by_mask, fitted.predict_proba(X))


def test_kinds_of_x_give_the_same_fit():
    X, y = task()
    frame = pd.DataFrame(np.concatenate([X["audio"], X["video"]], 1), columns=list("abcde"))
    by_column = {"audio": ["a", "b", "c"], "video": "[de]"}
    expected = IIBalanceClassifier(**SMALL).fit(X, y).predict_proba(X)
    tensors = {name: torch.from_numpy(values) for name, values in X.items()}
    for given, modalities in (
        (Samples(X), None),
        (tensors, None),
        (frame, by_column),
        (frame.to_numpy(), {"audio": [0, 1, 2], "video": slice(3, None)}),
    ):
        found = IIBalanceClassifier(modalities, **SMALL).fit(given, y)
        assert np.array_equal(found.predict_proba(given), expected)


@pytest.mark.parametrize("labels", [[1, 2, 3], [-1, 0, 7], [1.0, 2.0, 3.0], ["b", "a", "c"]])
def test_labels_come_back_as_they_were_given(labels):
    X, y = task(90)
    y = np.array(labels)[np.unique(y, return_inverse=True)[1]]
    found = IIBalanceClassifier(**SMALL).fit(X, y)
    assert found.classes_.dtype == y.dtype and sorted(found.classes_) == sorted(labels)
    assert found.predict(X).dtype == y.dtype and found.score(X, y) > 0.8


def test_boolean_labels():
    X, y = task(90)
    found = IIBalanceClassifier(**{**SMALL, "epochs": 12}).fit(X, y == "no")
    assert found.classes_.tolist() == [False, True] and found.score(X, y == "no") > 0.85


def test_save_load_pickle_and_clone(fitted, tmp_path):
    X, _ = task(seed=1)
    expected = fitted.predict_proba(X)
    fitted.save(tmp_path / "c.safetensors")
    loaded = IIBalanceClassifier.load(tmp_path / "c.safetensors")
    assert loaded.get_params() == fitted.get_params()
    assert loaded.budgets_ == fitted.budgets_ and list(loaded.classes_) == list(fitted.classes_)
    for other in (loaded, pickle.loads(pickle.dumps(fitted))):
        assert np.array_equal(other.predict_proba(X), expected)
        assert np.array_equal(other.contributions(X), fitted.contributions(X))
    again = clone(fitted)
    assert not hasattr(again, "model_")
    assert np.array_equal(again.fit(*task()).predict_proba(X), expected)


def test_own_encoders_are_saved_without_their_code(tmp_path):
    X, y = task()
    encoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
    found = IIBalanceClassifier(encoders={"audio": encoder}, **SMALL).fit(X, y)
    found.save(tmp_path / "c.safetensors")
    with pytest.raises(InputError, match="encoders of your own .audio.; give encoders="):
        IIBalanceClassifier.load(tmp_path / "c.safetensors")
    loaded = IIBalanceClassifier.load(tmp_path / "c.safetensors", encoders={"audio": encoder})
    assert np.array_equal(loaded.predict_proba(X), found.predict_proba(X))
    assert not torch.equal(loaded.model_.encoders[0][0].weight, encoder[0].weight)


def test_a_pipeline_on_a_data_frame():
    X, y = task()
    frame = pd.DataFrame(np.concatenate([X["audio"], X["video"]], 1), columns=list("abcde"))
    scale = make_column_transformer(
        (StandardScaler(), list("abc")), remainder="passthrough", verbose_feature_names_out=False
    ).set_output(transform="pandas")
    modalities = {"audio": ["a", "b", "c"], "video": ["d", "e"]}
    pipeline = make_pipeline(scale, IIBalanceClassifier(modalities, **SMALL))
    assert cross_val_score(pipeline, frame, y, cv=3).min() > 0.8
    train, test, y_train, y_test = train_test_split(frame, y, random_state=0)
    assert pipeline.fit(train, y_train).score(test, y_test) > 0.8
    with pytest.raises(ValueError, match="e"):
        pipeline.predict(frame.drop(columns="e"))


def test_samples_go_through_cross_validation_and_search():
    X, y = task()
    groups = np.arange(150) % 10
    samples = Samples(X)
    scores = cross_val_score(
        IIBalanceClassifier(**SMALL),
        samples,
        y,
        groups=groups,
        cv=GroupKFold(3),
        params={"groups": groups},
    )
    assert scores.min() > 0.8
    search = GridSearchCV(IIBalanceClassifier(**SMALL), {"epochs": [1, 6]}, cv=2).fit(samples, y)
    assert search.best_params_ == {"epochs": 6}


def test_groups_stay_together():
    """One group a class and half: the held-out fifth can only be whole groups."""
    X, y = task()
    found = IIBalanceClassifier(**SMALL).fit(X, y, groups=np.arange(150) // 15)
    assert found.score(X, y) > 0.8
    with pytest.raises(InputError, match="groups: 1 group cannot be divided"):
        IIBalanceClassifier(**SMALL).fit(X, y, groups=np.zeros(150))


def test_class_weights_move_the_predictions():
    X, y = task(120)
    rare = {**SMALL, "epochs": 20}
    light = IIBalanceClassifier(class_weight={"no": 0.02}, **rare).fit(X, y)
    heavy = IIBalanceClassifier(class_weight={"no": 50}, **rare).fit(X, y)
    share = [np.mean(found.predict(X) == "no") for found in (light, heavy)]
    assert share[0] < 1 / 3 < share[1] and share[1] - share[0] > 0.1
    with pytest.raises(InputError, match="training.class_weight: 'nope' is none of the classes"):
        IIBalanceClassifier(class_weight={"nope": 2}, **SMALL).fit(X, y)


def test_given_budgets_and_options():
    X, y = task()
    budgets = {"audio": 0.7, "video": 0.1}
    options = {"objective.alpha": 0.5, "calibration.copies": 2}
    found = IIBalanceClassifier(budgets=budgets, options=options, **SMALL).fit(X, y)
    assert found.budgets_ == Budgets.given(budgets)
    assert found.model_.head.objective.alpha == 0.5
    for wrong in ({"alpha": 1}, {"objective.gamma": 1}, {"nothing.alpha": 1}):
        with pytest.raises(InputError, match="options: .* is no option here; give dotted names"):
            IIBalanceClassifier(options=wrong, **SMALL).fit(X, y)
    with pytest.raises(InputError, match="method: 'magic' is none of"):
        IIBalanceClassifier(method="magic", **SMALL).fit(X, y)


@pytest.mark.parametrize("method", ["concat", "ensemble", "ogm_ge"])
def test_other_methods(method):
    X, y = task()
    found = IIBalanceClassifier(method=method, **SMALL).fit(X, y)
    assert found.score(X, y) > 0.8 and found.budgets_ is None
    if method == "concat":
        with pytest.raises(InputError, match="method: concat has no gate"):
            found.trust(X)


def _frame():
    X, _ = task()
    return pd.DataFrame(np.concatenate([X["audio"], X["video"]], 1), columns=list("abcde"))


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda X, y: (X, np.where(np.arange(150) == 7, np.nan, 1.0)), "y: row 7 holds nan"),
        (lambda X, y: (X, [None, *y[1:]]), "y: row 0 holds None; give every sample a class"),
        (lambda X, y: (X, ["no"] * 150), "y: holds one class alone, 'no'"),
        (lambda X, y: (X, np.linspace(0, 1, 150)), "y: row 1 holds .* regression is not supported"),
        (lambda X, y: (X, np.eye(3)[np.arange(150) % 3]), "y: has shape .150, 3.; several targets"),
        (lambda X, y: (X, y[:9]), "y: has shape .9,.; give one class a sample, shape .150,."),
        (lambda X, y: (X, None), "y: is None"),
        (lambda X, y: (None, y), "X: is None; give a dict of arrays"),
        (lambda X, y: (Items(), y), "X: is a torch Dataset; iibalance.train"),
        (lambda X, y: ({}, y), "modalities: at least one is needed"),
        (
            lambda X, y: ({**X, "video": X["video"][:9]}, y),
            "X: video: has 9 rows, but X: audio has",
        ),
        (lambda X, y: ({**X, "video": None}, y), "X: video: is None; leave a modality out"),
        (lambda X, y: ({**X, "video": y}, y), "X: video: dtype <U5 is not a real number"),
        (lambda X, y: ({**X, "video": [[1.0], [1.0, 2.0]]}, y), "its 2 entries differ in shape"),
        (lambda X, y: ({**X, "a.b": X["video"]}, y), "modalities: 'a.b' cannot name a modality"),
        (lambda X, y: ({**X, "video": np.full((150, 2), np.inf)}, y), "video: row 0 holds inf"),
    ],
)
def test_bad_input_is_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        IIBalanceClassifier(**SMALL).fit(*change(*task()))
    assert "\n" not in str(caught.value)


def test_bad_masks_and_columns(fitted):
    X, y = task()
    with pytest.raises(InputError, match="mask: row 0 holds 0.5 for audio; give bool values"):
        fitted.predict(X, np.full((150, 2), 0.5))
    with pytest.raises(InputError, match=r"mask: has shape \(150, 3\), expected a row a sample"):
        fitted.predict(X, np.ones((150, 3), bool))
    with pytest.raises(InputError, match="columns: video: there is no column 'z'; there are a, b"):
        IIBalanceClassifier({"audio": ["a"], "video": ["z"]}, **SMALL).fit(_frame(), y)
    with pytest.raises(InputError, match="'a' belongs to audio and to video"):
        IIBalanceClassifier({"audio": "a", "video": ["a", "b"]}, **SMALL).fit(_frame(), y)
    words = _frame().assign(d="word")
    with pytest.raises(InputError, match="column 'd' holds no numbers .row 0 holds 'word'."):
        IIBalanceClassifier({"audio": "a", "video": "d"}, **SMALL).fit(words, y)
    with pytest.warns(UserWarning, match="modalities: not given, so all columns are one modality"):
        IIBalanceClassifier(**SMALL).fit(_frame(), y)


def test_a_misspelt_modality_is_refused(fitted):
    X, _ = task()
    with pytest.raises(InputError, match="X: vidoe was not trained on: the classifier knows audio"):
        fitted.predict({"audio": X["audio"], "vidoe": X["video"]})
    with pytest.raises(InputError, match="X: video is not there: .* give a dict with None"):
        fitted.predict({"audio": X["audio"]})
    with pytest.raises(InputError, match="has samples of shape .3,., the model was trained on .2"):
        fitted.predict({"audio": X["audio"], "video": X["audio"]})


def test_damaged_and_foreign_files_are_refused(fitted, tmp_path):
    path = tmp_path / "c.safetensors"
    fitted.save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        IIBalanceClassifier.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(InputError, match="holds no IIBalanceClassifier"):
        IIBalanceClassifier.load(path)


def test_digits_as_strings_are_the_same_classes():
    """Eleven of them: as positions 0..10 these would be names of others."""
    random = np.random.default_rng(0)
    k = np.arange(220) % 11
    X = {"a": 3 * random.normal(size=(11, 6))[k] + random.normal(size=(220, 6))}
    options = {**SMALL, "epochs": 15, "folds": 2}
    numbers = IIBalanceClassifier(**options).fit(X, k)
    words = IIBalanceClassifier(**options).fit(X, k.astype(str))
    assert (
        numbers.score(X, k) > 0.8 and abs(words.score(X, k.astype(str)) - numbers.score(X, k)) < 0.1
    )


def test_a_mask_beside_samples_hides_more(fitted):
    X, y = task(90)
    holes = [None if row % 3 == 0 else value for row, value in enumerate(X["video"])]
    samples = Samples({**X, "video": holes}, groups=np.arange(90) // 9)
    mask = np.ones((90, 2), bool)
    mask[:5, 0] = mask[6, 0] = False
    with pytest.raises(InputError, match="row 0 has none of audio, video"):
        fitted.predict(samples, mask)
    mask[::3, 0] = True
    seen = fitted.trust(samples, mask) > 0
    assert (seen == (mask & samples.mask)).all()
    both = fitted.model_.predict(samples, mask).probabilities
    np.testing.assert_allclose(fitted.predict_proba(samples, mask), both, atol=1e-6)
    found = IIBalanceClassifier(**SMALL).fit(samples, y, sample_mask=mask)
    told = IIBalanceClassifier(**SMALL).fit(
        X, y, groups=np.arange(90) // 9, sample_mask=mask & samples.mask
    )
    assert np.array_equal(found.predict_proba(X), told.predict_proba(X))


def test_the_order_of_fit_is_that_of_every_mask(fitted):
    X, y = task(60)
    mask = np.stack([np.zeros(60, bool), np.ones(60, bool)], 1)  # audio is hidden
    turned = {"video": X["video"], "audio": X["audio"]}
    assert np.array_equal(fitted.trust(turned, mask), fitted.trust(X, mask))
    assert (fitted.trust(turned, mask)[:, 0] == 0).all()
    gone = fitted.predict_proba({"audio": None, "video": X["video"]}, np.ones((60, 2), bool))
    np.testing.assert_allclose(gone, fitted.predict_proba(X, mask), atol=1e-6)
    assert fitted.score(X, y) > fitted.score(X, y, sample_mask=mask)
    with pytest.raises(InputError, match="X: video is not there: .* give a dict with None"):
        fitted.predict(Samples({"audio": X["audio"]}))
    with pytest.raises(InputError, match="batch: holds no samples"):
        fitted.predict(Samples(X)[:0])


def test_tables_go_by_the_names_that_fit_saw():
    X, y = task()
    frame, by_column = _frame(), {"audio": "[abc]", "video": ["d", "e"]}
    found = IIBalanceClassifier(by_column, **SMALL).fit(frame, y)
    expected = found.predict_proba(frame)
    turned = frame[list("ecdab")].assign(f=1.0)
    assert np.array_equal(found.predict_proba(turned), expected)
    with pytest.raises(InputError, match="there is no column 'b'") as caught:
        found.predict(frame.drop(columns="b"))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="X: was a DataFrame in fit and is an array now"):
        found.predict(frame.to_numpy())
    parts = {"audio": frame[list("abc")], "video": frame[["d", "e"]]}
    found = IIBalanceClassifier(**SMALL).fit(parts, y)
    expected = found.predict_proba(parts)
    turned = {"video": frame[["e", "d"]], "audio": frame[list("cab")]}
    assert np.array_equal(found.predict_proba(turned), expected)
    assert np.array_equal(found.predict_proba(Samples(turned)), expected)
    with pytest.raises(InputError, match="X: audio: there is no column 'c', which fit had"):
        found.predict({**parts, "audio": frame[list("ab")]})
    with pytest.raises(
        InputError, match="X: was a dict of arrays by modality in fit and is a Data"
    ):
        found.predict(frame)


def test_what_save_writes_comes_back(tmp_path):
    X, y = task(90)
    options = {"random_state": np.int64(3), **SMALL}
    for extra in (
        {"class_weight": {True: 2.0}, "budgets": Budgets.given({"audio": 0.5, "video": 0.25})},
        {"class_weight": "balanced", "budgets": {"audio": 0.5, "video": 0.25}},
    ):
        found = IIBalanceClassifier(**options, **extra).fit(X, y == "no")
        found.save(tmp_path / "c.safetensors")
        again = IIBalanceClassifier.load(tmp_path / "c.safetensors")
        assert again.get_params() == found.get_params() and again.classes_.dtype == bool
        assert np.array_equal(again.fit(X, y == "no").predict_proba(X), found.predict_proba(X))
    table = np.concatenate([X["audio"], X["video"]], 1)
    found = IIBalanceClassifier({"audio": range(3), "video": slice(3, None)}, **SMALL)
    found.fit(table, np.unique(y, return_inverse=True)[1].astype(np.uint8))
    found.save(tmp_path / "c.safetensors")
    again = IIBalanceClassifier.load(tmp_path / "c.safetensors")
    assert again.modalities == {"audio": [0, 1, 2], "video": [3, 4]}
    assert again.classes_.dtype == np.uint8
    assert np.array_equal(again.predict_proba(table), found.predict_proba(table))


def test_groups_of_parameters_and_budgets_are_checked():
    X, y = task(60)
    with pytest.raises(InputError, match="parameter_groups: 'audoi' has no encoder of your own"):
        IIBalanceClassifier(parameter_groups={"audoi": list}, **SMALL).fit(X, y)
    with pytest.raises(InputError, match="budgets: are of audio, X has audio, video"):
        IIBalanceClassifier(budgets={"audio": 0.5}, **SMALL).fit(X, y)
    with pytest.raises(InputError, match="options: 'data.path' is no option here"):
        IIBalanceClassifier(options={"data.path": "x.npz"}, **SMALL).fit(X, y)


def test_fit_leaves_torchs_generator_as_it_is():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    IIBalanceClassifier(**{**SMALL, "epochs": 1}).fit(*task(60))
    assert torch.equal(torch.rand(3), expected)
