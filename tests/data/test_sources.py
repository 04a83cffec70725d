"""Files: an npz, a folder of arrays, CSV and Parquet tables give the same samples."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
import torch

from iibalance import DataConfig, InputError, load_data
from iibalance.data import assemble, lazy
from iibalance.data.lazy import LazySplit
from iibalance.data.sources import read_samples, read_to_predict

COLUMNS = {"audio": "a_*", "video": ["v0", "v1"]}
N = 40


def _frame() -> pd.DataFrame:
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.normal(size=(N, 5)), columns=["a_0", "a_1", "a_2", "v0", "v1"])
    frame.loc[3, ["v0", "v1"]] = np.nan  # sample 3 has no video
    frame["label"] = np.array(["no", "yes"])[np.arange(N) % 2]
    frame["who"] = [f"s{row // 4}" for row in range(N)]
    frame["part"] = np.array(["train", "train", "val", "test"])[np.arange(N) // 2 % 4]
    frame["clip"] = [f"c{row}" for row in range(N)]
    return frame


def _arrays() -> dict[str, np.ndarray]:
    frame = _frame()
    return {
        "x_audio": frame[["a_0", "a_1", "a_2"]].to_numpy(),
        "x_video": frame[["v0", "v1"]].to_numpy(),
        **{name: frame[name].to_numpy().astype(str) for name in ("label", "who", "part", "clip")},
    }


def _written(folder, kind: str):
    path = folder / f"clips.{kind}"
    if kind == "npz":
        np.savez(path, **_arrays())
    elif kind == "folder":
        path.mkdir()
        for name, array in _arrays().items():
            np.save(path / f"{name}.npy", array)
    elif kind == "csv":
        _frame().to_csv(path, index=False)
    else:
        _frame().to_parquet(path)
    return path


def _config(path, **options) -> DataConfig:
    table = path.suffix in (".csv", ".parquet")
    named = {"target": "label", "groups": "who", "split": "part", "ids": "clip"}
    return DataConfig(path=path, **{**({"columns": COLUMNS} if table else {}), **named, **options})


@pytest.mark.parametrize("kind", ["npz", "folder", "csv", "parquet"])
def test_every_source_gives_the_same_samples(tmp_path, kind):
    path = _written(tmp_path, kind)
    config = _config(path)
    assert config.name == kind  # told by the ending
    samples, frame = read_samples(config), _frame()
    assert samples.modalities == ("audio", "video")
    np.testing.assert_array_equal(samples.inputs["audio"], frame[["a_0", "a_1", "a_2"]])
    np.testing.assert_array_equal(samples.inputs["video"], frame[["v0", "v1"]])
    assert np.flatnonzero(~samples.mask[:, 1]).tolist() == [3] and samples.mask[:, 0].all()
    assert samples.targets.tolist() == frame["label"].tolist()
    assert samples.groups.tolist() == (np.arange(N) // 4).tolist()
    assert samples.split.tolist() == [[0, 0, 1, 2][row // 2 % 4] for row in range(N)]
    assert samples.ids == frame["clip"].tolist()
    only = read_samples(_config(path, modalities="video,audio"))
    assert only.modalities == ("video", "audio")
    data = load_data(config)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [20, 10, 10]
    assert data.class_names == ["no", "yes"] and data.layouts["audio"] == "vector"
    raw = data.test.inputs["audio"] * data.standardizer.std_audio + data.standardizer.mean_audio
    np.testing.assert_allclose(raw, frame.loc[samples.split == 2, "a_0":"a_2"], atol=1e-5)


@pytest.mark.parametrize("kind", ["npz", "folder", "csv", "parquet"])
def test_what_is_predicted_needs_no_labels(tmp_path, kind):
    path = _written(tmp_path, kind)
    config = _config(path, target="y")  # there is none
    with pytest.raises(InputError, match="no y|data.target: no column 'y'"):
        read_samples(config)
    samples = read_to_predict(config, ["video", "audio"])
    assert samples.modalities == ("video", "audio") and samples.targets is None
    assert read_to_predict(_config(path), ["audio", "video"]).targets[1] == "yes"
    with pytest.raises(InputError, match="text is not there; it holds .*audio, .*video"):
        read_to_predict(config, ["audio", "text"])
    assert read_to_predict(config, ["audio", "text"], missing=["text"]).modalities == ("audio",)
    with pytest.raises(InputError, match="missing: 'txt' is none of the model's modalities"):
        read_to_predict(config, ["audio", "text"], missing=["txt"])


def test_a_large_folder_stays_on_the_disk_and_gives_the_same_batches(tmp_path, monkeypatch):
    config = _config(_written(tmp_path, "folder"))
    whole = load_data(config)
    assert type(whole.train).__name__ == "Split"
    monkeypatch.setattr(assemble, "IN_MEMORY", 4 * 5 * N - 1)
    monkeypatch.setattr(lazy, "CHUNK", 7)
    data = load_data(config)
    for name in ("audio", "video"):
        for kind in ("mean", "std"):
            torch.testing.assert_close(
                getattr(data.standardizer, f"{kind}_{name}"),
                getattr(whole.standardizer, f"{kind}_{name}"),
                rtol=1e-6,
                atol=1e-6,
            )
    for part in ("train", "validation", "test"):
        stored, split = getattr(data, part), getattr(whole, part)
        assert isinstance(stored, LazySplit) and stored.targets.tolist() == split.targets.tolist()
        assert stored.groups.tolist() == split.groups.tolist()
        for name in ("audio", "video"):
            torch.testing.assert_close(stored.batch().inputs[name], split.inputs[name])
    # One byte more of memory, and they are loaded.
    monkeypatch.setattr(assemble, "IN_MEMORY", 4 * 5 * N)
    assert type(load_data(config).train).__name__ == "Split"


def test_fields_of_an_npz_and_of_a_folder(tmp_path):
    ids = np.arange(12).reshape(4, 3)
    arrays = {"x_text.ids": ids, "x_text.mask": ids > 0, "y": [0, 1, 0, 1], "x_a": ids * 1.0}
    np.savez(tmp_path / "d.npz", **arrays, mask_text=[1, 0, 1, 1])
    (tmp_path / "d").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "d" / f"{name}.npy", array)
    for path, mask in (
        (tmp_path / "d.npz", [True, False, True, True]),
        (tmp_path / "d", [True] * 4),
    ):
        samples = read_samples(DataConfig(path=path, modalities="text,a"))
        assert samples.inputs["text"]["ids"].tolist() == ids.tolist()
        assert samples.inputs["text"]["mask"].dtype == bool and samples.mask[:, 0].tolist() == mask


CSV = "a_0,a_1,v0,label,part\n1,2,3,no,train\n4,5,6,yes,test\n"


@pytest.mark.parametrize(
    "content, options, message",
    [
        ("", {}, "cannot be read as a table .No columns to parse from file.; give UTF-8 text with"),
        ("a_0,a_1,v0,label\n", {}, "holds no row; give one row a sample"),
        ("1,2,3,4\n5,6,7,8\n", {}, "its first row holds numbers .1, 2, 3, 4.; write the names"),
        ("a_0,a_0,v0,label\n1,2,3,4\n", {}, "column 'a_0' is there twice; rename one of them"),
        ("a_0,v0,label\n1,2,no,x\n", {}, "cannot be read as a table .*; give UTF-8 text with"),
        ("a_0,v0,label\n1,2,no\n1,2,3,4,5\n", {}, "cannot be read .*Expected 3 fields in line 3"),
        (b"a_0,v0,label\n1,2,\xff\n", {}, "cannot be read as a table .*utf-8.*; give UTF-8 text"),
        (b"\x00\x01\x02", {}, "holds no row|cannot be read as a table"),
        (
            "a_0;v0;label\n1;2;no\n",
            {},
            "its columns are not parted by commas .'a_0;v0;label'.; save it with",
        ),
        (CSV, {"columns": {}}, "data.columns: say which columns belong to which modality, such as"),
        (
            CSV,
            {"columns": {"audio": "b_*"}},
            "data.columns: audio: there is no column 'b_.'; there",
        ),
        (
            CSV,
            {"columns": {"audio": "part"}, "split": "split"},
            "data.columns: audio: column 'part' holds no numbers",
        ),
        (
            CSV,
            {"columns": {"audio": ["a_0", "label"]}},
            "data.columns: audio: 'label' holds the labels .data.target., which is no feature",
        ),
        (CSV, {"columns": {"audio": "a_*", "video": ["a_1"]}}, "'a_1' belongs to audio and to vid"),
        (CSV, {"target": "class"}, "data.target: no column 'class'; there are a_0, a_1, v0, label"),
        (CSV, {"groups": "who"}, "data.groups: no column 'who'; there are a_0"),
        (CSV, {"ids": "clip"}, "data.ids: no column 'clip'; there are a_0"),
        (CSV, {"split": "fold"}, "data.split: no column 'fold'; there are a_0"),
        (CSV, {"split": "label"}, "split: row 0 holds no; give integers 0 .train., 1 .valid"),
        (
            CSV,
            {"modalities": "text"},
            "data.modalities: there is no 'text'; there are audio, video",
        ),
        (CSV.replace("yes", ""), {}, "label: row 1 holds nan; give every sample a class"),
        (
            CSV.replace("no", "0.5").replace("yes", "1"),
            {},
            "label: row 0 holds 0.5, no class: regr",
        ),
        (
            CSV.replace("4,5", "4,"),
            {},
            "audio: row 1 holds nan; clean it .a row of NaN alone is miss",
        ),
        (CSV.replace("4,5,6", ",,"), {}, "row 1 has none of audio, video"),
        (CSV, {"split": "part"}, "the validation split is empty|has no training sample"),
    ],
)
def test_a_broken_table_is_one_line_that_names_it(tmp_path, content, options, message):
    path = tmp_path / "d.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    columns = {"audio": "a_*", "video": "v0"}
    with pytest.raises(InputError, match=message) as caught:
        load_data(DataConfig(path=path, **{"columns": columns, "target": "label", **options}))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500 and (str(path) in text or text.startswith("data."))


def test_paths_that_are_nothing(tmp_path, monkeypatch):
    for name, message in {
        "d.csv": "no such file; check data.path",
        "d.parquet": "no such file; check data.path",
        "d.npz": "no such file; check data.path",
        "d.txt": "cannot be told from its name; give an .npz, .csv or .parquet file or a folder",
    }.items():
        with pytest.raises(InputError, match=message):
            read_samples(DataConfig(path=tmp_path / name, columns=COLUMNS))
    with pytest.raises(InputError, match="no such folder; check data.path"):
        read_samples(DataConfig(name="folder", path=tmp_path / "none"))
    with pytest.raises(InputError, match="holds no .npy file; write one for each array, such as"):
        read_samples(DataConfig(path=tmp_path))
    with pytest.raises(InputError, match="cannot be read as a table .*directory"):
        read_samples(DataConfig(name="csv", path=tmp_path, columns=COLUMNS))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="cannot be read as a table .*; give a Parquet file"):
        read_samples(DataConfig(path=tmp_path / "d.parquet", columns=COLUMNS))
    path = _written(tmp_path, "parquet")
    for module in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match="reading Parquet needs pyarrow; pip install pyarrow, or"):
        read_samples(_config(path))


@pytest.mark.parametrize(
    "name, array, message",
    [
        (
            "x_audio",
            np.zeros((0, 3)),
            "x_audio: has 0 rows, but label has 40; give one row a sample",
        ),
        ("x_audio", np.array([[None]] * N), "x_audio: holds pickled Python objects"),
        ("x_audio", np.zeros((N - 1, 3)), f"x_audio: has {N - 1} rows, but label has {N}"),
        ("mask_audio", np.ones(3), r"mask_audio: has shape \(3,\)"),
        ("x_video.ids", np.zeros((N, 3)), "x_video: stands beside fields of its own .x_video.ids."),
        ("x_a.b.c", np.zeros((N, 3)), "x_a.b.c: cannot name a modality; name it x_<modality>, or"),
    ],
)
def test_a_broken_folder_is_one_line_that_names_it(tmp_path, name, array, message):
    path = _written(tmp_path, "folder")
    np.save(path / f"{name}.npy", array)
    with pytest.raises(InputError, match=message) as caught:
        read_samples(_config(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    (path / f"{name}.npy").write_bytes(b"\x93NUMPY cut")
    with pytest.raises(InputError, match=f"{name}: cannot be read|cannot name|stands beside"):
        read_samples(_config(path))


def test_a_table_with_its_index_and_one_without_names(tmp_path):
    _frame().to_csv(tmp_path / "indexed.csv")  # an unnamed first column
    assert read_samples(_config(tmp_path / "indexed.csv")).shape == (N, 2)
    numbered = pd.DataFrame(np.arange(12).reshape(4, 3))
    numbered.to_csv(tmp_path / "numbered.csv", index=False)  # pandas' own names 0, 1, 2
    config = DataConfig(path=tmp_path / "numbered.csv", columns={"a": ["0", "1"]}, target="2")
    samples = read_samples(config)
    assert samples.inputs["a"].tolist() == [[0, 1], [3, 4], [6, 7], [9, 10]]
    assert samples.targets.tolist() == [2, 5, 8, 11]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_pattern_takes_in_no_column_that_is_no_feature(tmp_path, kind):
    frame = _frame().fillna(0.0)
    frame["label"] = np.arange(N) % 2  # numbers, so that each could pass for a feature
    frame["who"], frame["clip"] = np.arange(N) // 4, np.arange(N)
    frame["part"] = np.arange(N) // 2 % 4 % 3
    path = tmp_path / f"clips.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    samples = read_samples(_config(path, columns={"all": "*"}))
    assert samples.columns == {"all": ["a_0", "a_1", "a_2", "v0", "v1"]}
    features = frame[samples.columns["all"]].to_numpy()
    np.testing.assert_array_equal(samples.inputs["all"], features)
    roles = {"label": "labels", "who": "groups", "part": "splits"}
    roles["clip"] = "names of the samples"
    for column, role in roles.items():
        message = f"data.columns: a: '{column}' holds the {role} .data.* is no feature; take it out"
        with pytest.raises(InputError, match=message):
            read_samples(_config(path, columns={"a": ["a_0", column]}))
