"""The contract: every imputer through scikit-learn's battery, with and without holes; every deep one through ours.

A new method enters the three tables below and is tested. Mutations: PeekingImputer, PeekingLoss, RefittingImputer,
TouchingImputer and GlobalNoiseImputer each break one promise, and the test of that promise must find them; further down
each mutation stands in the docstring of its test.
"""

import contextlib
import inspect
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Interruptible
from scipy.stats import norm
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from missingbook.flows.emflow import EMFlowImputer
from missingbook.flows.mcflow import MCFlowImputer
from missingbook.flows.missing_glow import MissingGlowImputer
from missingbook.flows.prflow import PRFlowImputer
from missingbook.foundations import imputer as imputer_module
from missingbook.foundations.autoencoder import AutoencoderImputer, DenoisingAutoencoder, residual_sigma
from missingbook.foundations.classics import CLASSICS
from missingbook.foundations.imputer import DeepImputer, Layout, check_no_peek
from missingbook.foundations.training import Noise, SharedNoise, TrainingRun
from missingbook.gans.gain import GAINImputer
from missingbook.gans.misgan import MisGANImputer
from missingbook.gaussian.em import GaussianImputer
from missingbook.vaes.gsnn import GSNNImputer
from missingbook.vaes.marginalizer import MarginalizerImputer
from missingbook.vaes.miwae import MIWAEImputer
from missingbook.vaes.vaeac import VAEACImputer

pytestmark = pytest.mark.filterwarnings("ignore:.*generator collapsed")  # a few steps of a GAN, and it says so

# --- what is tested: small enough for seconds, trained enough to mean something ---------------------------------------

SMALL = dict(max_epochs=4, n_draws=4, hidden=16, random_state=0, verbose=False)
SMALL_FLOW = SMALL | dict(latent_hidden=16, n_couplings=2)
SMALL_EMFLOW = SMALL | dict(n_couplings=2, n_passes=2)
SMALL_GAIN = SMALL | dict(min_steps=8)
SMALL_MIWAE = SMALL | dict(min_steps=8, latent=3, n_samples=5, n_importance=20)
SMALL_MARGINALIZER = SMALL | dict(depth=1, n_orders=2)
SMALL_VAEAC = SMALL | dict(min_steps=8, depth=2, latent=4, channels=(4, 8), blocks=1)
SMALL_GAUSSIAN = dict(max_epochs=4, n_draws=4, random_state=0, verbose=False)
TABLES = {"autoencoder": lambda **own: AutoencoderImputer(**(SMALL | own)),
          "gaussian": lambda **own: GaussianImputer(**(SMALL_GAUSSIAN | own)),
          "emflow": lambda **own: EMFlowImputer(**(SMALL_EMFLOW | own)),
          "gaussian, normal": lambda **own: GaussianImputer(**(SMALL_GAUSSIAN | {"marginals": "normal"} | own)),
          "mcflow": lambda **own: MCFlowImputer(**(SMALL_FLOW | own)),
          "prflow": lambda **own: PRFlowImputer(**(SMALL_FLOW | own)),
          "gain": lambda **own: GAINImputer(**(SMALL_GAIN | own)),
          "miwae": lambda **own: MIWAEImputer(**(SMALL_MIWAE | own)),
          "vaeac": lambda **own: VAEACImputer(**(SMALL_VAEAC | own)),
          "marginalizer": lambda **own: MarginalizerImputer(**(SMALL_MARGINALIZER | own)),
          "gsnn": lambda **own: GSNNImputer(**(SMALL_VAEAC | own))}
IMAGES = {"autoencoder": lambda **own: AutoencoderImputer(**(SMALL | own)),
          "emflow": lambda **own: EMFlowImputer(**(SMALL_EMFLOW | own)),
          "gaussian": lambda **own: GaussianImputer(**(SMALL_GAUSSIAN | own)),
          "mcflow": lambda **own: MCFlowImputer(**(SMALL_FLOW | own)),
          "prflow": lambda **own: PRFlowImputer(**(SMALL_FLOW | own)),
          "gain": lambda **own: GAINImputer(**(SMALL_GAIN | own)),
          "miwae": lambda **own: MIWAEImputer(**(SMALL_MIWAE | own)),
          "misgan": lambda **own: MisGANImputer(**(SMALL | {"latent": 4} | own)),
          "missing glow": lambda **own: MissingGlowImputer(**(SMALL | {"n_steps": 2, "n_rounds": 2} | own)),
          "vaeac": lambda **own: VAEACImputer(**(SMALL_VAEAC | own)),
          "marginalizer": lambda **own: MarginalizerImputer(**(SMALL_MARGINALIZER | own)),
          "gsnn": lambda **own: GSNNImputer(**(SMALL_VAEAC | own))}
QUICK = {
    "ice": dict(max_rounds=2), "mice": dict(n_chains=2, max_rounds=2, n_draws=4), "softsvd": dict(n_strengths=4),
    "missforest": dict(n_estimators=3, max_rounds=2), "trees": dict(n_estimators=3, max_rounds=1),
}
CLASSICAL = {name: (lambda kind=kind, name=name: kind(**QUICK.get(name, {}))) for name, kind in CLASSICS.items()}
# Why a check of scikit-learn's may fail, by imputer: a check that expects an error for NaN would stand here. None does:
# the tag `allow_nan` tells the battery, and what is left of it holds.
REASONS: dict[str, dict[str, str]] = {}


# --- scikit-learn's battery ------------------------------------------------------------------------------------------


def with_holes(X):
    """X with about a fifth of its cells blanked, by their value: the same row has the same holes in any company."""
    if not isinstance(X, np.ndarray) or X.dtype.kind != "f" or X.ndim != 2 or not np.isfinite(X).all():
        return X
    return np.where((np.abs(X) * 1e3).astype("int64") % 5 == 0, np.nan, X)


def holed(kind):
    """The same imputer, which finds holes in whatever the battery hands it."""

    def fit(self, X, y=None):
        return super(self.__class__, self).fit(with_holes(X), y)

    def transform(self, X):
        return super(self.__class__, self).transform(with_holes(X))

    name = f"Holed{kind.__name__}"
    globals()[name] = type(name, (kind,), {"fit": fit, "transform": transform, "__module__": __name__})
    return globals()[name]


DEEP = (AutoencoderImputer, EMFlowImputer, GAINImputer, GaussianImputer, GSNNImputer, MarginalizerImputer,
        MCFlowImputer, MIWAEImputer, PRFlowImputer, VAEACImputer)
HOLED = {kind: holed(kind) for kind in (*DEEP, *CLASSICS.values())}


def failures(imputer, reasons=()):
    """Checks of the battery that the imputer fails, with the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(imputer, on_fail=None, on_skip=None)
    assert len(results) > 40  # the battery ran
    return {r["check_name"]: str(r["exception"])[:300] for r in results
            if r["status"] == "failed" and r["check_name"] not in reasons}


EVERYBODY = {**CLASSICAL, **TABLES}


@pytest.mark.parametrize("holes", [False, True], ids=["complete", "holes"])
@pytest.mark.parametrize("name", EVERYBODY)
def test_scikit_learn_battery(name, holes):
    imputer = EVERYBODY[name]()
    if holes:
        imputer = HOLED[type(imputer)](**imputer.get_params())
    assert failures(imputer, REASONS.get(name, ())) == {}


class RefittingImputer(AutoencoderImputer):
    """The mutation: transform looks at the rows it is given."""

    def __init__(self, **common):
        super().__init__(**common)

    def transform(self, X):
        return np.asarray(super().transform(X)) + np.nanmean(X)


def test_the_battery_finds_a_transform_that_looks_at_other_rows():
    assert "check_methods_subset_invariance" in failures(RefittingImputer(max_epochs=1, verbose=False))


# --- data for our own ------------------------------------------------------------------------------------------------


def mixed(seed=0):
    """(complete, with holes): numbers, whole numbers, categories, levels, a boolean, a date, an empty column."""
    bunch, rng = load_iris(as_frame=True), np.random.default_rng(seed)
    frame = bunch.data.copy()
    frame["species"] = np.array(["setosa", "versicolor", "virginica"], dtype=object)[bunch.target]
    sizes = np.array(["s", "m", "l"])[np.digitize(frame.iloc[:, 0], [5.4, 6.3])]
    frame["size"] = pd.Categorical(sizes, ["s", "m", "l"], ordered=True)
    frame["wide"] = (frame.iloc[:, 1] > 3).astype("boolean")
    frame["count"] = np.round(frame.iloc[:, 2] * 10).astype("Int64")
    frame["narrow"] = frame.iloc[:, 3].astype("float32")
    holes = frame.mask(rng.random(frame.shape) < 0.3)
    holes["seen_on"], holes["empty"] = pd.Timestamp("2024-01-01"), np.nan
    holes.iloc[7, :-2] = None  # nothing observed in this row
    holes.index = frame.index = [f"flower {i}" for i in range(150)]
    return frame, holes


def pictures(n=200, dtype="float32"):
    """(complete, with a square and single pixels missing), (n, 1, 8, 8)."""
    x = load_digits().images[:n, None].astype(dtype)
    holes = x.copy()
    holes[:, :, 2:5, 3:6] = np.nan
    holes[np.random.default_rng(0).random(x.shape) < 0.1] = np.nan
    holes[3] = np.nan  # an image of which nothing was seen
    return x, holes


def data(kind):
    return mixed()[1] if kind == "table" else pictures()[1]


CASES = [*(pytest.param("table", make, id=f"table-{n}") for n, make in TABLES.items()),
         *(pytest.param("images", make, id=f"images-{n}") for n, make in IMAGES.items())]
each = pytest.mark.parametrize("kind, make", CASES)
MADE = {}


def fitted(kind, make):
    """An imputer fitted to the data of its kind, once a session."""
    key = kind, repr(make())
    if key not in MADE:
        MADE[key] = make().fit(data(kind))
    return MADE[key]


def drawn_by(imputer, X, n):
    """n draws; of a method that cannot draw, its completion n times."""
    return imputer.sample(X, n) if hasattr(imputer, "sample") else n * [imputer.transform(X)]


def equal(a, b):
    """Equal in every cell, NaN included; lists of frames and arrays."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a.equals(b) if isinstance(a, pd.DataFrame) else np.array_equal(a, b, equal_nan=True)


def close(a, b):
    """Equal up to float32, on a GPU up to TF32, in which it multiplies convolutions: categories exactly."""
    if isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            close(one, other)
        return
    tolerance = dict(rtol=2e-3, atol=2e-3) if torch.cuda.is_available() else dict(rtol=1e-4, atol=1e-4)
    if isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, **tolerance)
    else:
        np.testing.assert_allclose(a, b, **tolerance)


# --- the promises ----------------------------------------------------------------------------------------------------


@each
def test_no_peek(kind, make):
    check_no_peek(make(), data(kind))


class PeekingImputer(AutoencoderImputer):
    """The mutation: the network is told that everything was seen."""

    def __init__(self, **common):
        super().__init__(**common)

    def _expect(self, network, x, observed, noise):
        return super()._expect(network, x, torch.ones_like(observed), noise)


class PeekingLoss(AutoencoderImputer):
    """The mutation: training is judged on hidden cells too."""

    def __init__(self, **common):
        super().__init__(**common)

    def _train(self, network, x, observed, run):
        super()._train(network, x, torch.ones_like(observed), run)


@pytest.mark.parametrize("mutant", [PeekingImputer, PeekingLoss])
@pytest.mark.parametrize("kind", ["table", "images"])
def test_no_peek_finds(mutant, kind):
    with pytest.raises(AssertionError, match="depends on what stands behind"):
        check_no_peek(mutant(**SMALL), data(kind))


def kept(before, after):
    """True where every observed cell is the same, bit for bit, and every hole that can be filled is."""
    if isinstance(before, pd.DataFrame):
        here = before.notna()
        same = all(before.loc[here[c], c].equals(after.loc[here[c], c]) for c in before)
        return same and after.drop(columns="empty", errors="ignore").notna().all(axis=None) and (
            after.dtypes.equals(before.dtypes) and after.index.equals(before.index))
    seen = ~np.isnan(before)
    return before.dtype == after.dtype and (before[seen] == after[seen]).all() and not np.isnan(after).any()


@each
def test_observed_cells_return_bit_for_bit(kind, make):
    X = data(kind)
    before = X.copy()
    imputer = fitted(kind, make)
    for result in (imputer.transform(X), *list(drawn_by(imputer, X, 2))):
        assert kept(X, result)
    assert equal(X, before)  # the input is left alone


class TouchingImputer(AutoencoderImputer):
    """The mutation: what comes back went through the network's float32."""

    def __init__(self, **common):
        super().__init__(**common)

    def _decode(self, x, like):
        return super()._decode(x, like) + 1e-6


def test_a_touched_cell_is_found():
    X = pictures()[1]
    assert not kept(X, TouchingImputer(**SMALL).fit(X).transform(X))


@each
def test_a_row_depends_on_no_other_row_and_no_place(kind, make):
    X, imputer = data(kind), fitted(kind, make)
    whole = imputer.transform(X)
    close(imputer.transform(X[::-1]), whole[::-1])
    close(imputer.transform(X[40:43]), whole[40:43])
    close(imputer.transform(X[3:4]), whole[3:4])


class GlobalNoiseImputer(AutoencoderImputer):
    """The mutation: transform draws its own noise for every row."""

    def __init__(self, **common):
        super().__init__(**common)

    def _expect(self, network, x, observed, noise):
        own = torch.Generator().manual_seed(0)
        return super()._expect(network, x, observed, noise) + 0.1 * torch.randn(x.shape, generator=own)


@pytest.mark.parametrize("kind", ["table", "images"])
def test_own_noise_is_found(kind):
    with pytest.raises(AssertionError):
        test_a_row_depends_on_no_other_row_and_no_place(kind, lambda: GlobalNoiseImputer(**SMALL))


@each
def test_transform_fits_nothing(kind, make):
    X, imputer = data(kind), clone(fitted(kind, make)).fit(data(kind))
    drawn_by(imputer, X[:1], 1)  # the first draw may prepare what all draws need, from the rows of fit
    before = {k: v.clone() for k, v in imputer.network_.state_dict().items()}, repr(vars(imputer.encoder_))
    imputer.transform(X[:5])
    drawn_by(imputer, X[:5], 2)
    assert all(torch.equal(v, before[0][k]) for k, v in imputer.network_.state_dict().items())
    assert repr(vars(imputer.encoder_)) == before[1]


@each
def test_the_same_seed_gives_the_same_result(kind, make):
    X = data(kind)
    a, b = fitted(kind, make), make().fit(X)
    assert equal(a.transform(X), b.transform(X)) and equal(drawn_by(a, X, 2), drawn_by(b, X, 2))
    assert all(torch.equal(u, v) for u, v in zip(a.network_.parameters(), b.network_.parameters(), strict=True))
    c = make(random_state=1).fit(X)
    assert not equal(drawn_by(a, X, 1), drawn_by(c, X, 1))  # a Gaussian's transform needs no random numbers


@each
def test_fit_leaves_the_users_random_numbers_alone(kind, make):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    make().fit(data(kind))
    assert torch.equal(torch.rand(3), expected)


@each
def test_draws(kind, make):
    X, imputer = data(kind), fitted(kind, make)
    if not hasattr(imputer, "sample"):
        pytest.skip("it cannot draw")
    three = imputer.sample(X, 3)
    assert len(three) == 3 and equal(list(imputer.sample(X, 2)), list(three[:2]))  # more draws leave the first ones
    assert not equal(three[0], three[1])  # the mutation is a draw without noise, below
    assert equal(list(imputer.sample(X, 2, random_state=5)), list(imputer.sample(X, 2, random_state=5)))
    assert not equal(list(imputer.sample(X, 1, random_state=5)), list(imputer.sample(X, 1, random_state=6)))
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="n_samples"):
            imputer.sample(X, wrong)


def test_draws_without_noise_are_found(monkeypatch):
    monkeypatch.setattr(AutoencoderImputer, "_draw", AutoencoderImputer._expect)
    monkeypatch.setattr(imputer_module, "RowNoise", lambda seed, k, row, device: SharedNoise(0, 0, device))
    with pytest.raises(AssertionError):
        test_draws("table", lambda **own: AutoencoderImputer(**(SMALL | {"max_epochs": 3} | own)))


@each
def test_chunks_change_nothing(kind, make, monkeypatch):
    X, imputer = data(kind), fitted(kind, make)
    whole, drawn = imputer.transform(X), drawn_by(imputer, X, 1)[0]
    monkeypatch.setattr(imputer, "_chunk", 37)
    close(imputer.transform(X), whole)
    close(drawn_by(imputer, X, 1)[0], drawn)


@each
def test_save_and_load(kind, make, tmp_path):
    X, imputer = data(kind), fitted(kind, make)
    imputer.save(tmp_path / "model")
    for loaded in (DeepImputer.load(tmp_path / "model"), type(imputer).load(tmp_path / "model", device="cpu"),
                   pickle.loads(pickle.dumps(imputer))):
        if loaded.device == imputer.device or not torch.cuda.is_available():
            assert equal(loaded.transform(X), imputer.transform(X))
            assert equal(drawn_by(loaded, X, 2), drawn_by(imputer, X, 2))
        else:
            close(loaded.transform(X), imputer.transform(X))
            close(drawn_by(loaded, X, 2), drawn_by(imputer, X, 2))
        assert loaded.n_features_in_ == imputer.n_features_in_
        names = "feature_names_in_"
        assert kind == "images" or np.array_equal(getattr(loaded, names), getattr(imputer, names))
        assert type(getattr(loaded, names, None)) is type(getattr(imputer, names, None))  # an array, no list
        if kind == "table":
            assert list(loaded.get_feature_names_out()) == list(imputer.get_feature_names_out())
        assert loaded.history_.equals(imputer.history_)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]  # no draft is left


@each
def test_a_damaged_foreign_or_newer_model_is_an_error(kind, make, tmp_path, monkeypatch):
    path = tmp_path / "model"
    fitted(kind, make).save(path)
    whole = path.read_bytes()
    for share in (0.0, 0.01, 0.3, 0.6, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match="damaged"):
            DeepImputer.load(path)
    path.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(ValueError, match="newer"):
        DeepImputer.load(path)
    name = type(fitted(kind, make)).__name__.encode()
    path.write_bytes(whole.replace(name, name.replace(b"Imputer", b"Amputer")))
    with pytest.raises(ValueError, match="import it first"):
        DeepImputer.load(path)
    with pytest.raises(FileNotFoundError):
        DeepImputer.load(tmp_path / "nothing")


# --- tables ----------------------------------------------------------------------------------------------------------

tables = pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
images = pytest.mark.parametrize("make", IMAGES.values(), ids=IMAGES)


@tables
def test_another_table_is_an_error_that_names_the_columns(make):
    holes, imputer = mixed()[1], fitted("table", make)
    with pytest.raises(ValueError, match="another order"):
        imputer.transform(holes[holes.columns[::-1]])
    with pytest.raises(ValueError, match="lacking.*sepal length"):
        imputer.transform(holes.drop(columns="sepal length (cm)"))
    with pytest.raises(ValueError, match="not known.*weather"):
        imputer.transform(holes.assign(weather=1.0))
    with pytest.raises(ValueError, match="'species'.*'rosa'"):
        imputer.transform(holes.assign(species="rosa"))
    with pytest.raises(ValueError, match="infinit"):
        imputer.transform(holes.assign(**{"petal width (cm)": np.inf}))


@tables
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "Float64", "Int16", "int64", "float64[pyarrow]"])
def test_numeric_dtypes(make, dtype):
    frame = pd.DataFrame(np.round(load_iris().data[:60] * 4), columns=list("abcd"))
    if dtype != "int64":  # it cannot hold a hole
        frame = frame.mask(np.random.default_rng(0).random((60, 4)) < 0.2)
    frame = frame.astype(dtype)
    filled = make().fit_transform(frame)
    assert filled.notna().all(axis=None) and filled.dtypes.equals(frame.dtypes)


@tables
@pytest.mark.parametrize("dtype", ["object", "string", "category", "str"])
def test_text_dtypes(make, dtype):
    words = pd.Series(["red", None, "blue", "red", "green"] * 12).astype(dtype)
    frame = pd.DataFrame({"colour": words, "size": np.arange(60.0)})
    filled = make().fit_transform(frame)
    assert filled["colour"].dtype == frame["colour"].dtype and filled["colour"].isin(["red", "blue", "green"]).all()


@tables
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_arrays(make, dtype):
    x = load_iris().data[:60].astype(dtype)
    holes = np.where(np.random.default_rng(0).random(x.shape) < 0.3, np.nan, x).astype(dtype)
    assert kept(holes, make().fit_transform(holes))


@tables
def test_rows_without_anything_no_rows_and_one_row(make):
    holes, imputer = mixed()[1], fitted("table", make)
    assert imputer.transform(holes.iloc[:0]).shape == (0, holes.shape[1])
    assert drawn_by(imputer, holes.iloc[:0], 2)[1].shape == (0, holes.shape[1])
    assert imputer.transform(holes.iloc[[7]]).drop(columns="empty").notna().all(axis=None)  # an all-missing row
    one = holes.iloc[:1].dropna(axis=1)
    assert kept(one, make().fit(one).transform(one))
    with pytest.raises(ValueError, match="0 sample"):
        make().fit(holes.iloc[:0])


@tables
def test_only_dates_and_empty_columns(make):
    frame = pd.DataFrame({"day": pd.to_datetime(["2024-01-01", None]), "nothing": [np.nan, np.nan]})
    imputer = make().fit(frame)
    assert imputer.transform(frame).equals(frame) and drawn_by(imputer, frame, 2)[1].equals(frame)


@tables
def test_bounds_and_whole_numbers(make):
    holes = mixed()[1]
    bounds = {"sepal length (cm)": (5.0, 5.1), "count": (0, 12)}
    imputer = make(bounds=bounds).fit(holes)
    for version in (imputer.transform(holes), *drawn_by(imputer, holes, 3)):
        for column, (low, high) in bounds.items():
            filled = version.loc[holes[column].isna(), column]
            assert filled.between(low, high).all() and version[column].dtype == holes[column].dtype
    free = drawn_by(make().fit(holes), holes, 3)
    assert max(d.loc[holes["count"].isna(), "count"].max() for d in free) > 12  # the bound is what held it
    with pytest.raises(ValueError, match="did you mean|no column"):
        make(bounds={"counts": (0, 1)}).fit(holes)


@tables
def test_a_wild_value_far_from_the_fit(make):
    holes, imputer = mixed()[1], fitted("table", make)
    wild = holes.copy()
    wild.iloc[0, 0], wild.iloc[0, 2] = 1e300, np.nan
    filled = imputer.transform(wild)
    assert filled.iloc[0, 0] == 1e300 and np.isfinite(filled.iloc[0, 2])


@tables
@pytest.mark.parametrize("name, value", [
    ("max_epochs", 0), ("batch_size", 0), ("batch_size", 1.5), ("learning_rate", 0), ("learning_rate", "fast"),
    ("n_draws", 0), ("patience", 0), ("device", "tpu9"), ("precision", "int8"), ("checkpoint", "here"),
    ("random_state", -1)])
def test_parameters_that_cannot_be_meant(make, name, value):
    own = {name: value} | ({"random_state": None} if name == "checkpoint" else {})
    with pytest.raises(ValueError, match="random_state" if name == "checkpoint" else name):
        make(**own).fit(mixed()[1])


def wild_columns(X):
    """The columns that a fit calls wild."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        AutoencoderImputer(**(SMALL | {"max_epochs": 1})).fit(X)
    return [str(w.message).split(":")[0] for w in said if "wild ones" in str(w.message)]


def test_a_column_with_wild_values_is_named(monkeypatch):
    """Mutation: no word is said. Zeros with a few counts, constants, booleans and categories are not wild."""
    X = mixed()[1].assign(zeros=np.r_[np.zeros(140), 1:11].astype(float))
    assert wild_columns(X) == []
    X.iloc[[3, 50], 0] = 1e9, 1e8
    assert wild_columns(X) == [f"column {X.columns[0]!r}"]
    monkeypatch.setattr(imputer_module, "_warn_of_wild", lambda *_: None)
    assert wild_columns(X) == []


@tables
def test_parameters_changed_after_the_fit_are_looked_at(make, monkeypatch):
    """Mutation: parameters are looked at by `fit` alone."""
    X, changed = data("table"), pickle.loads(pickle.dumps(fitted("table", make))).set_params(batch_size=0)
    with pytest.raises(ValueError, match="batch_size"):
        changed.transform(X)
    monkeypatch.setattr(imputer_module, "_check_parameters", lambda *_: None)
    changed.transform(X)


@tables
def test_in_a_pipeline_with_pandas_out(make):
    x, y = load_iris(return_X_y=True)
    holes = np.where(np.random.default_rng(0).random(x.shape) < 0.3, np.nan, x)
    imputer = make().set_output(transform="pandas")
    out = imputer.fit_transform(holes)
    assert isinstance(out, pd.DataFrame) and list(out) == ["x0", "x1", "x2", "x3"]
    assert cross_val_score(make_pipeline(make(max_epochs=20), LogisticRegression(max_iter=500)), holes, y).mean() > 0.7


@tables
def test_a_failed_fit_is_not_fitted(make):
    imputer = make().fit(mixed()[1])
    with pytest.raises(ValueError):
        imputer.fit(mixed()[1].assign(species=np.inf))
    with pytest.raises(ValueError, match="not fitted"):
        imputer.transform(mixed()[1])


# --- images ----------------------------------------------------------------------------------------------------------


@images
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_image_dtypes(make, dtype):
    X = pictures(60, dtype)[1]
    assert kept(X, make().fit_transform(X))


@images
def test_images_in_other_units_and_channels(make):
    X = pictures(60)[1]
    imputer, shifted = make().fit(X), make().fit(100 * X - 7)
    np.testing.assert_allclose(shifted.transform(100 * X - 7), 100 * imputer.transform(X) - 7, rtol=1e-3, atol=0.5)
    colour = np.concatenate([X, 16 - X, X], axis=1)
    assert kept(colour, make().fit_transform(colour))


@images
def test_complete_whole_number_images_return_as_they_are(make):
    X = load_digits().images[:60, None].astype("uint8")
    filled = make().fit_transform(X)
    assert filled.dtype == np.uint8 and np.array_equal(filled, X)


@images
def test_tensors_in_tensors_out(make):
    X = torch.from_numpy(pictures(60)[1])
    imputer = make().fit(X)
    assert isinstance(imputer.transform(X), torch.Tensor) and drawn_by(imputer, X, 2)[1].shape == X.shape
    assert torch.equal(imputer.transform(X), torch.from_numpy(imputer.transform(X.numpy())))


@images
def test_images_stay_in_range(make):
    X = pictures(60)[1]
    for low, high, imputer in ((0, 16, make()), (4, 5, make(bounds=(4, 5)))):
        drawn = np.stack(list(drawn_by(imputer.fit(X), X, 3)))[:, np.isnan(X)]
        assert drawn.min() >= low and drawn.max() <= high


@images
def test_bad_images(make):
    X, imputer = pictures(60)[1], fitted("images", make)
    with pytest.raises(ValueError, match="add the channel axis"):
        imputer.transform(X[:, 0])
    with pytest.raises(ValueError, match=r"\(1, 8, 7\).*\(1, 8, 8\)"):
        imputer.transform(X[..., :7])
    with pytest.raises(ValueError, match="infinite"):
        imputer.transform(np.where(np.isnan(X), np.inf, X))
    with pytest.raises(TypeError, match="numbers"):
        imputer.transform(X.astype(str))
    with pytest.raises(ValueError, match="no pixel"):
        make().fit(np.full((3, 1, 4, 4), np.nan))
    with pytest.raises(ValueError, match="no image"):
        make().fit(X[:0])
    assert imputer.transform(X[:0]).shape == (0, 1, 8, 8)


# --- faults that a reader found --------------------------------------------------------------------------------------


class MeanOnlyImputer(DeepImputer):
    """A method that cannot draw: `_complete` alone."""

    def _build(self):
        network = torch.nn.Module()
        network.register_buffer("mean", torch.zeros(self.encoder_.width_))
        return network

    def _train(self, network, x, observed, run):
        network.mean.copy_(torch.where(observed, x, 0.0).sum(0) / observed.sum(0).clamp(min=1))

    def _complete(self, x, observed):
        return self._run(lambda net, x, o: torch.where(o, x, net.mean), x, observed)


class NormalImputer(MeanOnlyImputer):
    """… with a density: standard normal in encoded units."""

    def _log_prob(self, network, x, observed):
        layout = imputer_module.layout_of(self.encoder_.blocks_)
        return (imputer_module.cell_log_prob(network.mean.expand(x.shape), x, layout) * observed).sum(1)


def test_a_method_that_cannot_draw_has_no_sample(tmp_path):
    X = mixed()[1].iloc[:, :4]
    imputer = MeanOnlyImputer(random_state=0, verbose=False).fit(X)
    assert not hasattr(imputer, "sample") and not hasattr(imputer, "log_prob")
    pd.testing.assert_frame_equal(imputer.transform(X), X.fillna(X.mean()), rtol=1e-5)
    check_no_peek(imputer, X)
    imputer.save(tmp_path / "model")
    assert MeanOnlyImputer.load(tmp_path / "model").transform(X).equals(imputer.transform(X))


def test_a_method_that_writes_too_little_says_what_is_lacking(monkeypatch):
    X = mixed()[1].iloc[:, :4]
    monkeypatch.delattr(MeanOnlyImputer, "_complete")
    with pytest.raises(NotImplementedError, match="_draw, or _complete"):
        MeanOnlyImputer(verbose=False).fit(X).transform(X)


def densities():
    """(ours, scipy's) log p of a column of numbers far from unit scale and one of levels."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, 300)
    frame = pd.DataFrame({"length": 1e3 * rng.normal(size=300),
                          "level": pd.Categorical.from_codes(codes, list("abcdefgh"), ordered=True)})
    ours = NormalImputer(random_state=0, verbose=False).fit(frame).log_prob(frame)
    values = np.stack([frame["length"], codes], axis=1)
    return ours, norm.logpdf(values, values.mean(0), values.std(0)).sum(1)


def test_density_has_the_units_of_the_columns(monkeypatch):
    """Mutation: the spread of ordered columns is forgotten."""
    np.testing.assert_allclose(*densities(), atol=1e-4)
    honest = imputer_module._Density._log_spread
    monkeypatch.setattr(imputer_module._Density, "_log_spread", lambda self: honest(self) * torch.tensor([1.0, 0.0]))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(*densities(), atol=1e-4)


def test_a_density_of_the_wrong_shape_is_an_error(monkeypatch):
    X = mixed()[1].iloc[:, :4]
    monkeypatch.setattr(NormalImputer, "_log_prob", lambda self, network, x, observed: x[:, :1])
    with pytest.raises(ValueError, match="one number a row"):  # the mutation: (n, 1) is broadcast to (n, n)
        NormalImputer(verbose=False).fit(X).log_prob(X)


def check_set_output(make):
    x = load_iris().data[:60]
    out = make().set_output(transform="pandas").fit(x).transform(x)
    assert isinstance(out, pd.DataFrame) and list(out) == ["x0", "x1", "x2", "x3"]


@tables
def test_transform_obeys_set_output(make, monkeypatch):
    """Mutation: `transform` is defined where scikit-learn does not wrap it; `fit_transform` alone would obey."""
    check_set_output(make)
    monkeypatch.setattr(DeepImputer, "transform", DeepImputer.transform.__wrapped__, raising=False)
    with pytest.raises(AssertionError):
        check_set_output(make)


@images
def test_images_have_no_columns(make):
    X = pictures(60)[1]
    imputer = make().set_output(transform="pandas").fit(X)
    assert isinstance(imputer.transform(X), np.ndarray) and isinstance(imputer.fit_transform(X), np.ndarray)
    assert not hasattr(imputer, "get_feature_names_out")


@tables
def test_a_table_as_a_tensor(make):
    X = torch.from_numpy(load_iris().data[:60].astype("float32"))
    X[::3, 1] = torch.nan
    imputer = make().fit(X)
    assert imputer.transform(X).dtype == X.dtype and drawn_by(imputer, X, 2)[1].shape == X.shape
    assert torch.equal(imputer.transform(X), torch.from_numpy(imputer.transform(X.numpy())))


@images
def test_half_precision_tensors(make):
    X = torch.from_numpy(pictures(60)[1]).to(torch.bfloat16)
    filled, seen = make().fit_transform(X), ~torch.isnan(X)
    assert filled.dtype == X.dtype and torch.equal(filled[seen], X[seen]) and not torch.isnan(filled).any()


@images
@pytest.mark.parametrize("name, value, says", [
    ("bounds", (1, 0), "above high"), ("bounds", (0, np.nan), "NaN"), ("bounds", {"a": (0, 1)}, "one pair"),
    ("bounds", "seen", "one pair"), ("bounds", (0, 1, 2), "one pair"), ("bounds", 1, "one pair"),
    ("kinds", {"a": "number"}, "columns of a table")])
def test_parameters_that_images_do_not_have(make, name, value, says):
    with pytest.raises(ValueError, match=f"^{name}=.*{says}"):
        make(**{name: value}).fit(pictures(20)[1])


@images
def test_one_sided_bounds_of_images(make):
    X = pictures(60)[1]
    imputer = make(bounds=(4, None), max_epochs=30, batch_size=8).fit(X)
    drawn = np.stack(list(drawn_by(imputer, X, 2)))[:, np.isnan(X)]
    assert drawn.min() == 4 and drawn.max() > 8


@tables
@pytest.mark.parametrize("name", ["max_epochs", "learning_rate", "n_draws"])
def test_none_is_no_number(make, name):
    with pytest.raises(ValueError, match=f"{name}=None"):
        make(**{name: None}).fit(mixed()[1])


@tables
def test_what_is_no_dictionary_and_no_path(make):
    with pytest.raises(ValueError, match="kinds=.*dictionary"):
        make(kinds=["number"]).fit(mixed()[1])
    with pytest.raises(ValueError, match="checkpoint=3"):
        make(checkpoint=3).fit(mixed()[1])


@tables
def test_images_for_a_table_imputer(make):
    with pytest.raises(ValueError, match="fitted to a table"):
        fitted("table", make).transform(pictures(5)[1])


@tables
def test_labels_that_cannot_be_stored(make, tmp_path):
    frame = pd.DataFrame(load_iris().data[:30, :2], columns=pd.to_datetime(["2020-01-01", "2021-01-01"]))
    with pytest.raises(TypeError, match="Timestamp.*column labels"):
        make().fit(frame).save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def defined_again(version):
    """The same class, as a notebook cell that is run once more makes it."""
    return type("Again", (MeanOnlyImputer,), {"version": version, "__module__": __name__})


def test_load_takes_the_newest_class_of_a_name(tmp_path):
    """Mutation: the oldest one wins, and an edited cell has no effect on `load`."""
    first = defined_again(1)
    X = load_iris().data[:30]
    first(random_state=0, verbose=False).fit(X).save(tmp_path / "model")
    second = defined_again(2)
    assert DeepImputer.load(tmp_path / "model").version == 2
    assert second.load(tmp_path / "model").version == 2 and first.load(tmp_path / "model").version == 1


class SlowImputer(MeanOnlyImputer):
    """Notes how many fits are between _build and _train at the same time."""

    here, most = 0, 0

    def _train(self, network, x, observed, run):
        SlowImputer.here += 1
        SlowImputer.most = max(SlowImputer.most, SlowImputer.here)
        time.sleep(0.2)
        SlowImputer.here -= 1
        super()._train(network, x, observed, run)


def fits_at_a_time():
    SlowImputer.here = SlowImputer.most = 0
    X = load_iris().data
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: SlowImputer(random_state=seed, verbose=False).fit(X), range(2)))
    return SlowImputer.most


def test_fits_in_threads_do_not_share_random_numbers(monkeypatch):
    """Mutation: no lock; two of five fits in threads then had another result than alone."""
    assert fits_at_a_time() == 1
    monkeypatch.setattr(imputer_module, "_one_fit", contextlib.nullcontext())
    assert fits_at_a_time() == 2


class InterruptedImputer(Interruptible, AutoencoderImputer):
    """Ctrl-C before epoch `stop`."""

    def __init__(self, **common):
        super().__init__(**common)


def interrupted(X, path):
    """An imputer whose fit was stopped in its fifth epoch and left a checkpoint; `stop` is off again."""
    imputer = InterruptedImputer(**(SMALL | {"max_epochs": 6}), checkpoint=str(path))
    imputer.stop = 4
    with pytest.raises(KeyboardInterrupt):
        imputer.fit(X)
    imputer.stop = None
    return imputer


@pytest.mark.parametrize("kind", ["table", "images"])
def test_an_interrupted_fit_goes_on_to_the_same_result(kind, tmp_path):
    X, path = data(kind), tmp_path / "fit"
    whole = InterruptedImputer(**(SMALL | {"max_epochs": 6})).fit(X)
    imputer = interrupted(X, path)
    with pytest.raises(ValueError, match="not fitted"):
        imputer.transform(X)
    assert path.exists()
    assert equal(list(imputer.fit(X).sample(X, 2)), list(whole.sample(X, 2)))
    assert imputer.begun == [4, 5] and not path.exists()


def test_a_checkpoint_belongs_to_its_data_and_parameters(tmp_path, monkeypatch):
    """Mutation: a fingerprint of nothing."""
    X, path = mixed()[1], tmp_path / "fit"
    imputer = interrupted(X, path)
    for other, rows in ((clone(imputer), X[::-1]), (clone(imputer).set_params(dropout=0.2), X)):
        with pytest.raises(ValueError, match="another fit.*delete it"):
            other.fit(rows)
    path.unlink()
    monkeypatch.setattr(DeepImputer, "_fingerprint", lambda self, x, observed: "")
    interrupted(X, path).fit(X[::-1])  # no error: the test above would fail


# --- the autoencoder's own -------------------------------------------------------------------------------------------


def mutant(function, before, after):
    """`function` with one piece of its source replaced."""
    source, names = inspect.getsource(function), dict(vars(inspect.getmodule(function)))
    assert source.count(before) == 1
    exec("from __future__ import annotations\n" + source.replace(before, after), names)
    return names[function.__name__]


class Scattered(DenoisingAutoencoder):
    """A network whose answers scatter by `scatter` around 0."""

    def __init__(self, width, scatter):
        super().__init__(width, hidden=1)
        self.scatter = scatter

    def forward(self, x, observed, noise=None):
        return self.scatter * noise.normal(*x.shape)


def sigma_of(function, rows, observed_share, n_draws):
    """What `function` gives for standard normal columns: σ² = 1 − 0.25, since the error of the mean answer is 1."""
    generator = torch.Generator().manual_seed(0)
    x, observed = torch.randn(rows, 3, generator=generator), torch.rand(rows, 3, generator=generator) < observed_share
    return function(Scattered(3, 0.5), x, observed, Layout(3, (0, 1, 2)), Noise(1, x.device), n_draws)


def test_noise_makes_up_for_what_dropout_lacks():
    """Mutation: the mean of a few patterns is taken for the mean of all."""
    assert abs((sigma_of(residual_sigma, 100_000, 0.5, 2) ** 2).mean() - 0.75) < 0.03
    forgetful = mutant(residual_sigma, "(1 + 1 / n_draws)", "1.0")
    assert abs((sigma_of(forgetful, 100_000, 0.5, 2) ** 2).mean() - 0.75) > 0.09


def test_noise_from_a_few_complete_rows():
    """Mutation: each row is asked once, and most columns are not hidden twice; they used to get the noise 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0.02, 0.2, 200) * torch.randn(20, 200, generator=generator)
    seen, layout = torch.ones(x.shape, dtype=torch.bool), Layout(200, tuple(range(200)))

    silent = Scattered(200, 0.0)
    sigma = residual_sigma(silent, x, seen, layout, Noise(1, x.device))
    assert sigma.max() < 0.4 and (sigma / x.std(0)).log().std() < 0.3
    asked_once = mutant(residual_sigma, "math.ceil(30 / float(rate * len(x)))", "1")
    once = asked_once(silent, x, seen, layout, Noise(1, x.device))
    assert (once / x.std(0)).log().std() > 0.4


def steps_an_epoch(monkeypatch, **own):
    steps, honest = [], TrainingRun.step
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "step", lambda *args, **named: (steps.append(1), honest(*args, **named)))
        AutoencoderImputer(**(SMALL | own)).fit(mixed()[1])
    return len(steps) / SMALL["max_epochs"]


def test_a_small_table_gets_small_batches(monkeypatch):
    """Mutation: batches of 128, with which 30 epochs of patience are 60 steps."""
    assert steps_an_epoch(monkeypatch) >= 10
    assert steps_an_epoch(monkeypatch, batch_size=128) == 2  # what is asked for is what is done


@pytest.mark.parametrize("rows, own", [(5, {}), (150, {"validation_fraction": 0.0}), (150, {})])
def test_ordinary_use_warns_of_nothing(rows, own):
    """Mutation: patience is kept where no row judges, and the run warns that it had no effect."""
    holes = mixed()[1].iloc[:rows]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoencoderImputer(**(SMALL | own)).fit(holes).transform(holes)


def test_a_category_is_filled_with_what_is_drawn_most_often():
    frame = load_iris(as_frame=True).data.assign(species=np.array(list("abc"))[load_iris().target])
    holes = frame.mask(np.random.default_rng(0).random(frame.shape) < 0.4)
    imputer = AutoencoderImputer(**(SMALL | {"max_epochs": 40, "n_draws": 100})).fit(holes)
    hidden = holes["species"].isna()
    draws = pd.DataFrame([d.loc[hidden, "species"] for d in imputer.sample(holes, 100)])
    shares = draws.apply(lambda column: column.value_counts(normalize=True)).fillna(0.0)
    chosen = imputer.transform(holes).loc[hidden, "species"]
    assert all(shares.loc[level, row] > shares[row].max() - 0.2 for row, level in chosen.items())  # 4 standard errors
    assert chosen.nunique() == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each
def test_gpu_and_cpu_agree(kind, make):
    X = data(kind)
    on_gpu = make(device="cuda", precision="float32").fit(X)
    on_cpu = pickle.loads(pickle.dumps(on_gpu)).set_params(device="cpu")
    close(on_cpu.transform(X), on_gpu.transform(X))
    close(drawn_by(on_cpu, X, 1)[0], drawn_by(on_gpu, X, 1)[0])
