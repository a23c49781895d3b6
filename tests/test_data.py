"Loading, kinds and the encoder on real data; downloads only through stand-ins."

import gzip
import io
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
import torch
from PIL import Image

from missingbook.foundations import data
from missingbook.foundations.data import (
    DATASETS,
    KINDS,
    Images,
    Table,
    TableEncoder,
    class_balanced,
    infer_kinds,
    load,
    photo_patches,
    published,
    results_folder,
)

BUNDLED = ("iris", "wine", "breast_cancer", "diabetes", "digits", "digits-images", "mnist-sample", "photo-patches")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    "No test may download; the cache is an empty folder."
    monkeypatch.setenv("MISSINGBOOK_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def shared() -> Path:
    "The development data, where they are."
    folder = os.environ.get("MISSINGBOOK_DATA")
    if not folder or not (Path(folder) / "uci").is_dir():
        pytest.skip("MISSINGBOOK_DATA is unset and ../shared/data is absent: the real tables are not on this machine")
    return Path(folder)


# ---------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("x", [1.5, 2.0, np.nan], "number"),
        ("x", [0, 1, 1], "boolean"),
        ("x", [0.0, 1.0, np.nan], "boolean"),
        ("x", [1, 1, 1], "number"),  # a constant is no boolean
        ("x", [0, 1, 2], "number"),
        ("x", [True, False, True], "boolean"),
        ("x", pd.array([True, None, False], dtype="boolean"), "boolean"),
        ("x", [True, None, False], "boolean"),
        ("x", ["yes", "no", None], "boolean"),
        ("x", ["Yes", "No", "yes"], "category"),  # three spellings cannot be two values
        ("x", ["True", "False"], "boolean"),
        ("x", ["t", "f", "t"], "category"),  # mushroom's bruises
        ("x", ["1", "2", "3"], "category"),  # what pandas read as text stays text
        ("x", ["a", "b", None, "a"], "category"),
        ("x", ["a", "b", "c"], "category"),  # all distinct, but few and nothing says identifier
        ("name", ["Ann", "Bob", "Cid"], "identifier"),
        ("x", [f"u{i}" for i in range(30)], "identifier"),
        ("x", [f"u{i % 10}" for i in range(30)], "category"),
        ("patient_id", [3, 5, 9], "identifier"),
        ("Unnamed: 0", [0, 1, 2], "identifier"),
        ("id", [3, 5, 5], "number"),
        ("id", [9, 5, 3], "number"),
        ("weight", [3, 5, 9], "number"),
        ("acid", [3, 5, 9], "number"),  # ends in id, is none
        ("x", pd.Categorical(["b", "a"], ["a", "b"]), "category"),
        ("x", pd.Categorical(["b", "a"], ["a", "b"], ordered=True), "ordered"),
        ("x", pd.Categorical([1, 0], [0, 1]), "category"),
        ("x", pd.to_datetime(["2020-01-01", None]), "date"),
        ("x", pd.to_timedelta(["1 day", "2 days"]), "date"),
        ("x", ["10/03/2004", "31/12/2004", None], "date"),
        ("x", ["18:00:00", "19:00"], "date"),
        ("x", ["2004-03-10", "2004-03-11 12:30"], "date"),
        ("x", ["10/03/2004", "n/a?"], "category"),
        ("x", ["1.2.3", "1.2.4"], "category"),
        ("x", ["99/99/2004", "98/98/2004"], "category"),
        ("x", [20040310, 20040311], "number"),
        ("x", [None, None], "category"),
        ("x", [np.nan, np.nan], "number"),
        ("x", [[1], [2]], "identifier"),
        ("x", [1, "a", None], "category"),
        ("x", pd.array([1, 2, None], dtype="Int64"), "number"),
    ],
)
def test_kind(name, values, kind):
    assert infer_kinds(pd.DataFrame({name: values})) == {name: kind}


def test_kinds_are_overruled_and_checked():
    frame = pd.DataFrame({"ward": [1, 2], "age": [30, 40]})
    assert infer_kinds(frame, {"ward": "category"}) == {"ward": "category", "age": "number"}
    with pytest.raises(ValueError, match="'wrad', which the table lacks; did you mean 'ward'"):
        infer_kinds(frame, {"wrad": "category"})
    with pytest.raises(ValueError, match="column 'ward': unknown kind 'categry'; did you mean 'category'"):
        infer_kinds(frame, {"ward": "categry"})
    with pytest.raises(ValueError, match="'a' occurs twice"):
        infer_kinds(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(ValueError, match="column 'z' holds complex"):
        infer_kinds(pd.DataFrame({"z": [1j]}))


# Where inference from the file alone is meant to differ from the card, and why.
ACCEPTED = {
    "air_quality": {"Date": "date", "Time": "date"},  # the card calls dates categorical; they are no features
    "zoo": {"animal_name": "identifier"},  # the card's note says so too
    "credit_default": {
        "SEX": "number",
        "EDUCATION": "number",
        "MARRIAGE": "number",
    },  # integer codes: only the card knows
    "ctg": {"CLASS": "number", "NSP": "number"},  # integer codes of the classes
}


@pytest.mark.parametrize("name", sorted(data._TABLES))
def test_real_tables_against_their_cards(name, shared):
    path = shared / "uci" / f"{name}.csv"
    if not path.exists():
        pytest.skip(f"{name}.csv is not among the development data")
    card, frame = json.loads(path.with_suffix(".json").read_text()), pd.read_csv(path)
    inferred = infer_kinds(frame)
    categorical = set(card["categorical_columns"])
    differ = {c: k for c, k in inferred.items() if (k in ("category", "boolean")) != (c in categorical)}
    assert differ == ACCEPTED.get(name, {})

    table = load(name, root=shared)
    assert table.frame.shape == (card["rows"], card["columns"]) == data._TABLES[name].shape
    assert table.target == tuple(card["target"]) and table.name == name and table.source and table.licence
    for column, kind in table.kinds.items():  # with the card's help only dates and identifiers remain different
        if kind not in ("date", "identifier"):
            assert (kind in ("category", "boolean")) == (column in categorical), column
    assert int(table.frame.isna().sum().sum()) == card["missing_cells"]
    round_trip(table.frame, TableEncoder(table.kinds, "minmax"))


def round_trip(frame: pd.DataFrame, encoder: TableEncoder) -> pd.DataFrame:
    "Encode, decode, and assert that observed cells, dtypes and labels return."
    x, observed = encoder.fit(frame).transform(frame)
    assert (
        x.dtype == np.float64 and observed.dtype == bool and x.shape == observed.shape == (len(frame), encoder.width_)
    )
    assert np.isfinite(x).all() and (x[~observed] == 0).all()
    back = encoder.inverse_transform(np.where(observed, np.nan, x), frame)
    pd.testing.assert_frame_equal(back[frame.notna()], frame[frame.notna()], check_exact=True)
    assert back.dtypes.equals(frame.dtypes)
    return back


def test_mushroom_is_all_category_and_zoo_has_an_identifier(shared):
    assert set(load("mushroom", root=shared).kinds.values()) == {"category"}
    assert load("zoo", root=shared).kinds["animal_name"] == "identifier"
    assert load("credit_default", root=shared).kinds["EDUCATION"] == "category"


# ---------------------------------------------------------------- tables and images


def test_table_features_summary_split():
    table = load("diabetes")
    assert table.kinds["sex"] == "boolean" and "target" not in table.features.frame and table.features.target == ()
    assert list(table.summary().index) == list(table.frame.columns) and table.summary().loc["sex", "distinct"] == 2
    train, test = table.split(0.25, random_state=0)
    again, _ = table.split(0.25, random_state=0)
    assert train.frame.equals(again.frame) and set(train.frame.index).isdisjoint(test.frame.index)
    assert (
        len(train.frame) + len(test.frame) == 442
        and train.kinds == test.kinds == table.kinds
        and test.target == ("target",)
    )
    with pytest.raises(ValueError, match="target 'tagret' is no column; did you mean 'target'"):
        Table(table.frame, target="tagret")


def test_columns_of_two_levels_are_named_whole():
    frame = pd.DataFrame([[1.0, 2.0], [3.0, np.nan]], columns=pd.MultiIndex.from_tuples([("a", "x"), ("b", "y")]))
    assert Table(frame, target=("a", "x")).target == (("a", "x"),) == Table(frame, target=[("a", "x")]).target
    assert list(Table(frame, target=("a", "x")).features.frame) == [("b", "y")]
    with pytest.raises(ValueError, match="kinds names column 'a', which the table lacks"):
        infer_kinds(frame, {"a": "category"})  # the first level alone would be ignored without a word
    with pytest.raises(ValueError, match="target 'a' is no column"):
        Table(frame, target="a")
    assert Table(pd.DataFrame([[1.0, 2.0]]), target=1).features.kinds == {0: "number"}


def test_summary_counts_every_kind_of_cell():
    words = pd.Series(["a", "b", None, "a", "c", "d"])
    frame = pd.DataFrame(
        {"s": words, "c": words.astype("category"), "o": words.astype(object), "x": [1, 1, 2, 2, 3, 3.5]}
    )
    summary = Table(frame).summary()
    assert summary["distinct"].tolist() == [4, 4, 4, 4] and summary["missing"].tolist() == [1, 1, 1, 0]
    assert summary["example"].tolist() == ["a, b, c, …"] * 3 + ["1 … 3.5"]


def test_summary_takes_any_column():
    frame = pd.DataFrame(
        {"l": [[1], [2], None], "m": [1, "a", None], "n": [None] * 3, "d": pd.to_datetime(["2020-01-01", None, None])}
    )
    summary = Table(frame).summary()
    assert summary["missing"].tolist() == [1, 1, 3, 2] and summary["distinct"].tolist() == [2, 2, 0, 1]


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled(name, monkeypatch):
    monkeypatch.delenv("MISSINGBOOK_DATA", raising=False)
    found = load(name)
    assert found.name == name and found.source and found.licence
    if isinstance(found, Table):
        assert set(found.kinds.values()) <= set(KINDS) and found.target
        round_trip(found.frame, TableEncoder(found.kinds))
    else:
        assert found.x.dtype == torch.uint8 and len(found) == len(found.y) == len(found.x) and found.x.max() > 200
        assert torch.equal(load(name).x, found.x)
    with pytest.raises(ValueError, match=f"{name} has no split 'tset'"):
        load(name, split="tset")


def test_photo_patches_share_no_pixel_between_train_and_test():
    photos = sklearn.datasets.load_sample_images().images
    train, test = (photo_patches(32, 16, split) for split in ("train", "test"))
    both = photo_patches(32, 16)
    assert torch.equal(both.x, torch.cat([train.x, test.x])) and set(both.y.tolist()) == {0, 1}
    assert np.array_equal(test.x[0].permute(1, 2, 0).numpy(), photos[0][:32, 480:512])
    last = train.x[train.y == 0][-1].permute(1, 2, 0).numpy()
    assert np.array_equal(last, photos[0][384:416, 448:480])  # ends where the test begins
    with pytest.raises(ValueError, match="size must lie in"):
        photo_patches(161)


def test_mnist_sample_is_the_sample_of_the_full_set(shared):
    full = {split: load("mnist", split=split, root=shared) for split in ("train", "test")}
    assert tuple(full["train"].x.shape) == (60000, 1, 28, 28) and tuple(full["test"].x.shape) == (10000, 1, 28, 28)
    for split, per_class in (("train", 400), ("test", 100)):
        chosen = class_balanced(full[split].y.numpy(), per_class)
        sample = load("mnist-sample", split=split)
        assert torch.equal(sample.x, full[split].x[chosen]) and torch.equal(sample.y, full[split].y[chosen])
    assert len(load("mnist-sample")) == 5000
    with np.load(Path(data.__file__).parent.parent / "_data" / "mnist_sample.npz") as stored:
        assert np.array_equal(stored["train_index"], class_balanced(full["train"].y.numpy(), 400))
    assert (Path(data.__file__).parent.parent / "_data" / "mnist_sample.npz").stat().st_size < 2e6


def test_class_balanced_names_the_short_class():
    with pytest.raises(ValueError, match="class 1 has 1 examples, fewer than 2"):
        class_balanced(np.array([0, 0, 1]), 2)


def test_images_check_their_shape():
    # called unbound: the shape checker of the tests would answer before our own error
    check = Images.__post_init__
    with pytest.raises(
        ValueError, match=r"x must be uint8 \(n, channels, height, width\), not torch.float32 \(2, 3, 4\)"
    ):
        check(SimpleNamespace(x=torch.zeros(2, 3, 4), y=None))
    with pytest.raises(ValueError, match="2 pictures but 3 labels"):
        check(SimpleNamespace(x=torch.zeros(2, 1, 4, 4, dtype=torch.uint8), y=torch.zeros(3)))


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("cifar10-4000", (4000, 3, 32, 32), 10),
        ("celeba-32", (10000, 3, 32, 32), None),
        ("celeba-64", (2000, 3, 64, 64), None),
        ("omniglot-small", (4840, 1, 105, 105), 242),
        ("olivetti", (400, 1, 64, 64), 40),
    ],
)
def test_local_pictures(name, shape, classes, shared):
    found = load(name, root=shared)
    assert tuple(found.x.shape) == shape and (found.y is None if classes is None else len(found.y.unique()) == classes)


# ---------------------------------------------------------------- finding and fetching


def test_unknown_name_lists_close_ones_and_all():
    with pytest.raises(ValueError) as error:
        load("wine-quality")
    assert "did you mean 'wine_quality'" in str(error.value) and all(name in str(error.value) for name in DATASETS)


def test_missing_file_says_which_where_and_from_where(tmp_path, monkeypatch):
    monkeypatch.setenv("MISSINGBOOK_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        load("glass")
    text = str(error.value)
    assert (
        "uci/glass.csv" in text
        and "archive.ics.uci.edu/dataset/42" in text
        and str(tmp_path / "uci" / "glass.csv") in text
    )
    assert str(tmp_path / "cache" / "missingbook") in text and "MISSINGBOOK_OFFLINE" in text
    with pytest.raises(FileNotFoundError, match="No download is known"):
        load("concrete")


def test_missing_folder_is_named(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="root is .*nowhere"):
        load("glass", root=tmp_path / "nowhere")
    monkeypatch.setenv("MISSINGBOOK_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="environment variable MISSINGBOOK_DATA is .*elsewhere"):
        load("glass")


def test_related_subset_is_offered(tmp_path):
    (tmp_path / "cifar10").mkdir()
    np.savez(
        tmp_path / "cifar10" / "cifar10_train_first4000_lossless.npz",
        images=np.zeros((2, 4, 4, 3), "uint8"),
        labels=np.array([1, 2]),
    )
    with pytest.raises(FileNotFoundError, match="On this machine there is cifar10-4000"):
        load("cifar10", root=tmp_path)
    assert load("cifar10-4000", root=tmp_path).y.tolist() == [1, 2]


def test_changed_table_is_refused_and_so_is_another_shape_without_card(tmp_path):
    (tmp_path / "uci").mkdir()
    table, card = tmp_path / "uci" / "concrete.csv", tmp_path / "uci" / "concrete.json"
    table.write_text("a,b\n1,2\n3,5\n")
    with pytest.raises(ValueError, match=r"concrete.csv is 2×2 and not 1030×9: its header row may be missing.*sha256"):
        load("concrete", root=tmp_path)
    table.write_text(pd.DataFrame(np.ones((1030, 9)), columns=list("abcdefghi")).to_csv(index=False))
    assert load("concrete", root=tmp_path).target == ()  # no card, but the shape of the papers' table
    table.write_text("a,b\n1,2\n3,5\n")
    digest = data.hashlib.sha256(table.read_bytes()).hexdigest()
    card.write_text(json.dumps(dict(sha256=digest, target=["b"], categorical_columns=["a"])))
    loaded = load("concrete", root=tmp_path)
    assert loaded.kinds == {"a": "category", "b": "number"} and loaded.target == ("b",)
    table.write_text("a,b\n1,2\n3,6\n")
    with pytest.raises(ValueError, match="is not the file of its card"):
        load("concrete", root=tmp_path)
    assert table.read_text() == "a,b\n1,2\n3,6\n"


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("concrete", "uci/concrete.csv", b""),
        ("olivetti", "olivetti/olivetti_64x64.npz", b"<html>"),
        ("olivetti", "olivetti/olivetti_64x64.npz", b"PK\x03\x04 cut short"),
        ("cifar10-jpeg", "cifar10/cifar10_jpeg_60000.tar.xz", b"<html>"),
        ("mnist", "mnist/MNIST/raw/train-images-idx3-ubyte.gz", b"<html>"),
        ("mnist", "mnist/MNIST/raw/train-images-idx3-ubyte.gz", gzip.compress(b"\x00\x00\x08\x01\x00", mtime=0)[:-4]),
    ],
)
def test_a_damaged_file_is_named(name, file, content, tmp_path):
    for other in data._PICTURES.get(name, data._TABLES.get(name)).files:
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_bytes(b"")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=Path(file).name + ".*is damaged .*delete it and load again"):
        load(name, root=tmp_path)


def test_a_broken_card_is_named(tmp_path):
    (tmp_path / "uci").mkdir()
    (tmp_path / "uci/yeast.csv").write_text("a\n1\n")
    for text in ("{", "[1]", "3"):
        (tmp_path / "uci/yeast.json").write_text(text)
        with pytest.raises(ValueError, match="the card .*yeast.json is no JSON object"):
            load("yeast", root=tmp_path)


def test_names_are_close_whatever_their_case():
    with pytest.raises(ValueError, match="unknown data set 'MNIST'; did you mean 'mnist'"):
        load("MNIST")


class Bunch(dict):
    __getattr__ = dict.__getitem__


def openml(rows: int):
    frame = pd.DataFrame(
        {"RI": np.linspace(1.51, 1.53, rows), **{f"c{j}": np.arange(rows) * 0.5 + j for j in range(8)}}
    )
    frame["Type"] = pd.Categorical(np.where(np.arange(rows) % 2, "headlamps", "containers"))
    return Bunch(frame=frame, target_names=["Type"])


def test_openml_download_is_stored_and_read_back(monkeypatch, tmp_path):
    calls = []
    monkeypatch.delenv("MISSINGBOOK_OFFLINE")
    monkeypatch.delenv("MISSINGBOOK_DATA", raising=False)
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda **k: calls.append(k) or openml(214))
    first, second = load("glass"), load("glass")
    assert len(calls) == 1 and calls[0]["name"] == "glass" and calls[0]["version"] == 1
    pd.testing.assert_frame_equal(first.frame, second.frame)
    assert first.frame.shape == (214, 10) and first.target == ("Type",) and first.kinds["Type"] == "category"
    assert np.array_equal(first.frame["RI"], openml(214).frame["RI"])  # through the CSV bit for bit
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_another_table_under_that_name_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("MISSINGBOOK_OFFLINE")
    monkeypatch.delenv("MISSINGBOOK_DATA", raising=False)
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda **k: openml(100))
    with pytest.raises(FileNotFoundError, match="is 100×10 and not 214×10"):
        load("glass")
    assert not list((tmp_path / "cache").rglob("glass.csv"))


def test_failed_download_keeps_its_reason(monkeypatch):
    import torchvision

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.delenv("MISSINGBOOK_OFFLINE")
    monkeypatch.delenv("MISSINGBOOK_DATA", raising=False)
    monkeypatch.setattr(torchvision.datasets, "MNIST", refuse)
    with pytest.raises(FileNotFoundError, match="OSError: no route to host"):
        load("mnist")


def idx(array: np.ndarray) -> bytes:
    return (
        b"\x00\x00\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype("uint8").tobytes()
    )


def test_torchvision_download_of_mnist(monkeypatch, tmp_path):
    import torchvision

    def fake(root, download, train):
        assert download
        folder, n = Path(root) / "FashionMNIST" / "raw", 3 if train else 2
        folder.mkdir(parents=True, exist_ok=True)
        part = "train" if train else "t10k"
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.full((n, 28, 28), n))))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(n))))

    monkeypatch.delenv("MISSINGBOOK_OFFLINE")
    monkeypatch.delenv("MISSINGBOOK_DATA", raising=False)
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fake)
    found = load("fashion-mnist")
    assert (
        tuple(found.x.shape) == (5, 1, 28, 28)
        and found.y.tolist() == [0, 1, 2, 0, 1]
        and found.x[0].unique().tolist() == [3]
    )
    path = tmp_path / "cache/missingbook/fashion-mnist/FashionMNIST/raw/train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((3, 28, 28)))[:-1]))
    with pytest.raises(ValueError, match="holds 2351 bytes where its header says 2352"):
        load("fashion-mnist")
    path.write_bytes(gzip.compress(b"<html>not found", mtime=0))
    with pytest.raises(ValueError, match="no IDX file"):
        load("fashion-mnist")


@pytest.mark.parametrize(
    ("name", "cls", "mode", "pixels", "split"),
    [
        ("cifar10", "CIFAR10", "RGB", 32, "test"),
        ("celeba", "CelebA", "RGB", (178, 218), "valid"),
        ("omniglot", "Omniglot", "L", 105, None),
    ],
)
def test_torchvision_classes(monkeypatch, tmp_path, name, cls, mode, pixels, split):
    "Their downloads, calls and pictures, with a stand-in that records what it was asked for."
    import torchvision

    calls, size = [], (pixels, pixels) if isinstance(pixels, int) else pixels

    def fake(root, download=False, **arguments):
        calls.append((download, arguments))
        for f in data._PICTURES[name].files:
            (Path(root).parent / f).parent.mkdir(parents=True, exist_ok=True)
            (Path(root).parent / f).touch()
        return [(Image.new(mode, size, 7), 0), (Image.new(mode, size, 9), 1)]

    monkeypatch.delenv("MISSINGBOOK_OFFLINE")
    monkeypatch.delenv("MISSINGBOOK_DATA", raising=False)
    monkeypatch.setattr(torchvision.datasets, cls, fake)
    found = load(name, split=split)
    side = 64 if name == "celeba" else pixels
    parts = 2 if split is None else 1
    assert tuple(found.x.shape) == (2 * parts, 1 if mode == "L" else 3, side, side)
    assert found.y.tolist() == ([0, 1, 2, 3] if name == "omniglot" else [0, 1])  # alphabets of the two parts stay apart
    assert [c for c in calls if not c[0]] == [
        (False, a)
        for a in data._PICTURES[name].arguments
        if split is None or a in ({"train": False}, {"split": "valid", "target_type": "identity"})
    ]


def test_a_picture_in_two_archives_is_read_once(tmp_path):
    (tmp_path / "omniglot").mkdir()
    picture = io.BytesIO()
    Image.new("L", (105, 105), 255).save(picture, "png")
    for i, paths in ((1, ("Greek/character01/1.png", "Latin/character02/1.png")), (2, ("Greek/character01/1.png",))):
        with zipfile.ZipFile(tmp_path / "omniglot" / f"images_background_small{i}.zip", "w") as z:
            for path in paths:
                z.writestr(f"images_background_small{i}/{path}", picture.getvalue())
    found = load("omniglot-small", root=tmp_path)
    assert len(found) == 2 and found.y.tolist() == [0, 1]


# ---------------------------------------------------------------- the encoder


def mixed() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "n": [1.5, np.nan, 4.0],
            "c": ["a", "b", None],
            "b": pd.array([True, None, False], dtype="boolean"),
            "o": pd.Categorical(["lo", None, "hi"], ["lo", "mid", "hi"], ordered=True),
            "i": pd.array([1, 2**60 + 1, None], dtype="Int64"),
            "d": pd.to_datetime(["2020-01-01", None, "2020-01-03"]),
            "e": [np.nan] * 3,
        },
        index=["x", "x", "y"],
    )


def test_blocks():
    encoder = TableEncoder().fit(mixed())
    assert [(b.column, b.position, b.kind, b.start, b.stop) for b in encoder.blocks_] == [
        ("n", 0, "number", 0, 1),
        ("c", 1, "category", 1, 3),
        ("b", 2, "boolean", 3, 4),
        ("o", 3, "ordered", 4, 5),
        ("i", 4, "number", 5, 6),
    ]
    assert encoder.width_ == 6 and encoder.n_features_in_ == 7 and list(encoder.feature_names_in_) == list(mixed())
    assert encoder.blocks_[1].categories == ("a", "b") and encoder.blocks_[3].categories == ("lo", "mid", "hi")
    codes = TableEncoder(one_hot=False, scale="none").fit(mixed())
    assert codes.width_ == 5 and codes.transform(mixed())[0][:, 1].tolist() == [0, 1, 0]
    back = round_trip(mixed(), TableEncoder())
    assert back.index.tolist() == ["x", "x", "y"] and back["d"].isna().sum() == 1 and back["e"].isna().all()


@pytest.mark.parametrize("scale", ["standard", "minmax", "none"])
def test_scales_use_observed_training_values_only(scale):
    train, test = pd.DataFrame({"a": [2.0, np.nan, 6.0, 4.0]}), pd.DataFrame({"a": [10.0]})
    encoder = TableEncoder(scale=scale).fit(train)
    offset, spread = {"standard": (4.0, np.std([2, 6, 4])), "minmax": (2.0, 4.0), "none": (0.0, 1.0)}[scale]
    assert encoder.transform(test)[0][0, 0] == pytest.approx((10 - offset) / spread)
    assert np.allclose(encoder.transform(train)[0][:, 0], np.array([2 - offset, 0, 6 - offset, 4 - offset]) / spread)


def test_filled_cells_take_the_columns_dtype():
    encoder = TableEncoder(scale="none").fit(mixed())
    x, observed = encoder.transform(mixed())
    x[~observed] = 0.6
    back = encoder.inverse_transform(x, mixed())
    assert (
        back["n"].tolist() == [1.5, 0.6, 4.0] and back["i"].tolist() == [1, 2**60 + 1, 1] and back["i"].dtype == "Int64"
    )
    assert (
        back["b"].tolist() == [True, True, False]
        and back["o"].tolist() == ["lo", "mid", "hi"]
        and back["c"].tolist() == ["a", "b", "a"]
    )


def test_integers_with_holes_are_rounded():
    train, holes = pd.DataFrame({"a": [1, 2, 9]}), pd.DataFrame({"a": [1.0, np.nan]})
    assert TableEncoder(scale="none").fit(train).inverse_transform(np.array([[0.0], [2.6]]), holes)["a"].tolist() == [
        1,
        3,
    ]
    whole = pd.DataFrame({"a": [1.0, 2.0, np.nan]})
    x = np.array([[0.0], [0.0], [2.6]])
    assert TableEncoder(scale="none").fit(whole).inverse_transform(x, whole)["a"].tolist() == [1, 2, 2.6]
    assert TableEncoder(scale="none", round_integers=True).fit(whole).inverse_transform(x, whole)["a"].tolist() == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "object"])
def test_arrays(dtype):
    X = np.array([[1.1, np.nan], [3.3, 0.0], [np.nan, 1.0]], dtype=dtype)
    encoder = TableEncoder().fit(X)
    x, observed = encoder.transform(X)
    assert [b.kind for b in encoder.blocks_] == ["number", "number"] and not hasattr(encoder, "feature_names_in_")
    back = encoder.inverse_transform(np.where(observed, np.nan, x), X)
    seen = ~pd.isna(X)
    assert back.dtype == X.dtype and back is not X and (back[seen] == X[seen]).all() and not pd.isna(back).any()
    assert TableEncoder({1: "boolean"}).fit(X).kinds_ == {0: "number", 1: "boolean"}


def test_errors_name_column_value_and_remedy():
    frame = pd.DataFrame({"a": [1.0, 2.0], "c": ["x", "y"]})
    encoder = TableEncoder().fit(frame)
    with pytest.raises(ValueError, match="column 'c': the value 'z' was not seen in fit.*CategoricalDtype"):
        encoder.transform(frame.assign(c=["x", "z"]))
    with pytest.raises(ValueError, match="column 'a', row 1: the value is infinite"):
        encoder.transform(frame.assign(a=[1.0, -np.inf]))
    with pytest.raises(ValueError, match="column 'c' is of kind 'number' but holds 'x'"):
        TableEncoder({"c": "number"}).fit(frame)
    with pytest.raises(ValueError, match="column 'a' is of kind 'boolean' but has 3 levels"):
        TableEncoder({"a": "boolean"}).fit(pd.DataFrame({"a": [1, 2, 3]}))
    with pytest.raises(ValueError, match=r"lacking \['c'\], not known \['d'\]"):
        encoder.transform(frame.rename(columns={"c": "d"}))
    with pytest.raises(ValueError, match="another order"):
        encoder.transform(frame[["c", "a"]])
    with pytest.raises(ValueError, match="unknown scale 'standrad'; did you mean 'standard'"):
        TableEncoder(scale="standrad").fit(frame)
    with pytest.raises(ValueError, match=r"must be \(2, 3\)"):
        encoder.inverse_transform(np.zeros((2, 2)), frame)
    with pytest.raises(ValueError, match="column 'a': x is NaN or infinite"):
        encoder.inverse_transform(np.full((2, 3), np.nan), frame.assign(a=[1.0, np.nan]))
    with pytest.raises(ValueError, match="column 'a' spans"):
        TableEncoder(scale="minmax").fit(pd.DataFrame({"a": [-1.7e308, 1.7e308]}))


def test_a_filled_level_must_be_declared():
    train = pd.DataFrame({"c": pd.Categorical(["x", "y"])})
    narrow = pd.DataFrame({"c": pd.Categorical(["x", None])})
    with pytest.raises(ValueError, match="'y' is no category of this table's dtype"):
        TableEncoder().fit(train).inverse_transform(np.array([[1.0, 0.0], [0.0, 1.0]]), narrow)


def test_what_is_no_table_of_levels_or_numbers_is_refused():
    lists = pd.DataFrame({"l": pd.Series([[1], None, [2]], dtype=object)})
    with pytest.raises(ValueError, match="column 'l' holds a list, which cannot be a level"):
        TableEncoder({"l": "category"}).fit(lists)
    with pytest.raises(ValueError, match="array of text and numbers; an array holds numbers only"):
        TableEncoder().fit(np.array([["a", 1], ["b", 2]], dtype=object))
    with pytest.raises(TypeError, match="X is a Table; pass its frame"):
        TableEncoder().fit(load("iris"))
    holes = np.array([[1, None], [2, 3]], dtype=object)
    x, observed = TableEncoder(scale="none").fit(holes).transform(holes)
    assert x.tolist() == [[1, 0], [2, 3]] and observed.tolist() == [[True, False], [True, True]]


def test_filled_floats_stay_in_the_range_of_their_dtype():
    for dtype in ("float16", "float32", "Float32"):
        frame = pd.DataFrame({"a": pd.Series([1.0, None, 3.0], dtype=dtype)})
        filled = TableEncoder(scale="none").fit(frame).inverse_transform(np.full((3, 1), 1e300), frame)["a"]
        assert filled.dtype == dtype and float(filled[1]) == float(np.finfo(dtype.lower()).max) and filled[0] == 1


def test_input_is_never_touched():
    frame, kept = mixed(), mixed()
    encoder = TableEncoder().fit(frame)
    x, _ = encoder.transform(frame)
    back = encoder.inverse_transform(x, frame)
    back.iloc[0, 0] = -1.0
    pd.testing.assert_frame_equal(frame, kept)


def test_clone_and_repeat():
    from sklearn.base import clone

    encoder = TableEncoder({"c": "category"}, "minmax", one_hot=False)
    first = clone(encoder).fit(mixed()).transform(mixed())[0]
    assert (
        np.array_equal(first, encoder.fit(mixed()).transform(mixed())[0]) and encoder.get_params()["scale"] == "minmax"
    )


# ---------------------------------------------------------------- published numbers


def test_published_numbers_of_one_table():
    rows = published("vaeac", 10)
    assert set(rows["paper"]) == {"vaeac"} and set(rows["table"]) == {10} and list(rows.index) == list(range(len(rows)))
    cell = rows[(rows["dataset"] == "Breast") & (rows["method"] == "MICE")]
    assert cell[["metric", "value", "std"]].to_numpy().tolist() == [["nrmse", 0.58, 0.02]]
    assert len(rows) == 14 * 6  # fourteen tables, six methods
    assert published("prflow", 1)["std"].isna().all()  # printed without a spread


def test_every_published_table_is_reachable():
    everything = pd.read_csv(results_folder() / "published.csv")
    tables = everything[["paper", "table"]].drop_duplicates().itertuples(index=False)
    assert sum(len(published(p, t)) for p, t in tables) == len(everything)


def test_unknown_published_tables_are_named():
    with pytest.raises(ValueError, match="'vaec'; did you mean 'vaeac'.*Choices: .*prflow"):
        published("vaec", 10)
    with pytest.raises(ValueError, match="table 1 of vaeac. Tables: 3, 4, 5, 7, 8, 9, 10, 11"):
        published("vaeac", 1)


def test_an_installed_package_has_no_results(monkeypatch, tmp_path):
    import missingbook

    monkeypatch.setattr(missingbook, "__file__", str(tmp_path / "installed/missingbook/__init__.py"))
    for call in (results_folder, lambda: published("vaeac", 10)):
        with pytest.raises(FileNotFoundError, match="clone of the repository, not with an installed package"):
            call()
    (tmp_path / "installed/results").mkdir(parents=True)  # somebody else's folder
    with pytest.raises(FileNotFoundError, match="clone"):
        results_folder()
