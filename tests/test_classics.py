"""Classical imputers: no-peek, observed cells kept, rows independent, draws of the right spread; mutations of each."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer

from missingbook.foundations import classics
from missingbook.foundations.classics import CLASSICS
from missingbook.foundations.data import TableEncoder

QUICK = {
    "knn": dict(n_neighbors=5, random_state=0),
    "ice": dict(max_rounds=4),
    "mice": dict(n_chains=2, max_rounds=4, n_draws=10, random_state=0),
    "missforest": dict(n_estimators=8, max_rounds=3, random_state=0),
    "trees": dict(n_estimators=8, max_rounds=2, random_state=0),
    "softsvd": dict(random_state=0),
}
DRAWING = ["knn", "mice", "missforest", "trees"]


def make(name):
    return CLASSICS[name](**QUICK.get(name, {}))


def mixed(rate=0.3, seed=0):
    """(complete, with holes): iris with a category, an ordered, a boolean, a date, an empty and a constant column."""
    bunch, rng = load_iris(as_frame=True), np.random.default_rng(seed)
    frame = bunch.data.copy()
    frame["species"] = np.array(["setosa", "versicolor", "virginica"], dtype=object)[bunch.target]
    sizes = np.array(["s", "m", "l"])[np.digitize(frame.iloc[:, 0], [5.4, 6.3])]
    frame["size"] = pd.Categorical(sizes, ["s", "m", "l"], ordered=True)
    frame["wide"] = (frame.iloc[:, 1] > 3).astype("boolean")
    frame["count"] = np.round(frame.iloc[:, 2] * 10).astype("Int64")
    frame["constant"] = 3.5
    holes = frame.mask(rng.random(frame.shape) < rate)
    holes["seen_on"], frame["seen_on"] = pd.Timestamp("2024-01-01"), pd.Timestamp("2024-01-01")
    holes["empty"] = frame["empty"] = np.nan
    holes.iloc[7, :-2] = None  # nothing observed in this row
    holes.index = frame.index = [f"row {i}" for i in range(150)]
    return frame, holes


def numbers(rate=0.3, seed=0):
    """(complete, with holes, observed): the ten measurements of the diabetes table, standardized."""
    x = load_diabetes().data
    x = (x - x.mean(0)) / x.std(0)
    observed = np.random.default_rng(seed).random(x.shape) >= rate
    return x, np.where(observed, x, np.nan), observed


@pytest.fixture(scope="module")
def fitted():
    """Every imputer fitted on the mixed table, once."""
    _, holes = mixed()
    return holes, {name: make(name).fit(holes) for name in CLASSICS}


# --- no-peek ---------------------------------------------------------------------------------------------------------


class JunkEncoder(TableEncoder):
    """An encoder that leaves junk in the hidden entries of x."""

    def transform(self, X):
        x, observed = super().transform(X)
        return np.where(observed, x, np.random.default_rng(len(x)).normal(0, 1e3, x.shape)), observed


def check_no_peek(monkeypatch, name):
    _, holes = mixed()
    clean = make(name).fit(holes)
    expected, drawn = clean.transform(holes), clean.sample(holes, 2) if name in DRAWING else []
    with monkeypatch.context() as patch:
        patch.setattr(classics, "TableEncoder", JunkEncoder)
        junk = make(name).fit(holes)
        pd.testing.assert_frame_equal(junk.transform(holes), expected)
        for a, b in zip(junk.sample(holes, 2) if name in DRAWING else [], drawn, strict=True):
            pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("name", CLASSICS)
def test_no_peek(monkeypatch, name):
    check_no_peek(monkeypatch, name)


def test_no_peek_catches_a_start_that_averages_hidden_cells(monkeypatch):
    def peeking(x, observed, blocks, centre=np.mean):
        return x.mean(0)

    monkeypatch.setattr(classics, "start_values", peeking)
    with pytest.raises(AssertionError):
        check_no_peek(monkeypatch, "mean")


def test_no_peek_catches_a_fill_that_keeps_hidden_cells(monkeypatch):
    def keeping(x, observed, start, order, n_rounds, propose):
        return x

    monkeypatch.setattr(classics, "sweep", keeping)
    with pytest.raises(AssertionError):
        check_no_peek(monkeypatch, "ice")


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSICS)
def test_frames_come_back_as_they_were(fitted, name):
    holes, imputers = fitted
    keep = holes.copy(deep=True)
    tables = [imputers[name].transform(holes)] + (imputers[name].sample(holes, 2) if name in DRAWING else [])
    pd.testing.assert_frame_equal(holes, keep)
    for out in tables:
        assert list(out.columns) == list(holes.columns) and out.index.equals(holes.index)
        assert out.dtypes.equals(holes.dtypes)
        assert out["empty"].isna().all() and not out.drop(columns="empty").isna().any().any()
        for column in holes:
            seen = holes[column].notna()
            assert out.loc[seen, column].equals(holes.loc[seen, column])
        assert (out["constant"] == 3.5).all() and set(out["species"]) <= {"setosa", "versicolor", "virginica"}


@pytest.mark.parametrize("name", CLASSICS)
def test_arrays_keep_observed_cells_bit_for_bit(name):
    _, holes, observed = numbers()
    imputer = make(name).fit(holes[:300])
    out = imputer.transform(holes)
    assert type(out) is np.ndarray and out.dtype == holes.dtype and np.isfinite(out).all()
    assert out[observed].tobytes() == holes[observed].tobytes()
    if name in DRAWING:
        drawn = imputer.sample(holes, 3)
        assert drawn.shape == (3, *holes.shape) and (drawn[:, observed] == holes[observed]).all()
        assert not np.allclose(drawn[0], drawn[1])


@pytest.mark.parametrize("name", CLASSICS)
def test_fit_transform_is_fit_then_transform(fitted, name):
    holes, imputers = fitted
    pd.testing.assert_frame_equal(make(name).fit_transform(holes), imputers[name].transform(holes))


@pytest.mark.parametrize("name", CLASSICS)
def test_a_row_depends_on_no_other_row(fitted, name):
    holes, imputers = fitted
    whole = imputers[name].transform(holes)
    order = np.random.default_rng(1).permutation(len(holes))
    pd.testing.assert_frame_equal(imputers[name].transform(holes.iloc[order]), whole.iloc[order], rtol=1e-9)
    for i in (0, 7, 99):
        pd.testing.assert_frame_equal(imputers[name].transform(holes.iloc[[i]]), whole.iloc[[i]], rtol=1e-9)


def test_row_independence_catches_noise_by_row(fitted, monkeypatch):
    holes, imputers = fitted
    mice = imputers["mice"]
    rng = np.random.default_rng(0)
    monkeypatch.setattr(type(mice), "_fill", lambda self, x, observed: next(self._draws(x, observed, 1, rng)))
    with pytest.raises(AssertionError):
        test_a_row_depends_on_no_other_row(fitted, "mice")


def test_transform_fits_nothing(fitted):
    holes, imputers = fitted
    for name, imputer in imputers.items():
        before = pickle.dumps(imputer)
        imputer.transform(holes.iloc[:20])
        assert pickle.dumps(imputer) == before, name


# --- chained equations -----------------------------------------------------------------------------------------------


def check_against_iterative_imputer():
    _, holes, _ = numbers()
    imputer = classics.LinearICEImputer(max_rounds=6).fit(holes)
    encoder = imputer.encoder_
    x, observed = encoder.transform(holes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rival = IterativeImputer(max_iter=6, tol=0, imputation_order="ascending")
        theirs = rival.fit_transform(np.where(observed, x, np.nan))
    assert np.abs(imputer.chain_.x - theirs).max() < 1e-6
    assert np.abs(imputer.transform(holes) - encoder.inverse_transform(theirs, holes)).max() < 1e-6


def test_our_loop_is_iterative_imputer_on_numbers():
    check_against_iterative_imputer()


@pytest.mark.parametrize("mutation", ["no update", "reversed order", "own column among the others"])
def test_the_comparison_catches(monkeypatch, mutation):
    if mutation == "no update":
        real = classics._write
        monkeypatch.setattr(classics, "_write", lambda x, rows, b, v: real(x, rows, b, v) if len(x) == 1 else None)
    elif mutation == "reversed order":
        monkeypatch.setattr(classics, "sorted", lambda items, key: sorted(items, key=key, reverse=True), raising=False)
    else:
        monkeypatch.setattr(classics, "_others", lambda x, block: x)
    with pytest.raises(AssertionError):
        check_against_iterative_imputer()


def test_a_column_complete_in_training_may_have_holes_later():
    x, holes, _ = numbers()
    train = holes[:300].copy()
    train[:, 4] = x[:300, 4]  # s1, which s2 nearly repeats
    test = x[300:].copy()
    test[:, 4] = np.nan
    for name in ("ice", "mice", "trees", "missforest"):
        error = make(name).fit(train).transform(test)[:, 4] - x[300:, 4]
        assert np.sqrt((error**2).mean()) < 0.7, name  # its mean would give 1


def test_linear_models_fill_dummies_that_iterative_imputer_leaves(fitted):
    truth, holes = mixed()
    hidden = holes["species"].isna() & (holes.iloc[:, :4].notna().sum(axis=1) > 1)
    for name in ("ice", "mice", "trees", "missforest", "knn"):
        right = (fitted[1][name].transform(holes)["species"] == truth["species"])[hidden].mean()
        assert right > 0.7, (name, right)  # the most frequent species is right for about a third


def test_rising_change_stops_only_when_both_kinds_rise():
    blocks = [classics.Block("a", 0, "number", 0, 1), classics.Block("b", 1, "category", 1, 2, ("x", "y"))]
    stop = classics.RisingChange(np.zeros((2, 2), dtype=bool), blocks)
    fills = [[[1.0, 0], [1, 0]], [[2.0, 1], [2, 0]], [[2.1, 1], [2, 0]], [[2.1, 0], [3, 0]]]
    x = [np.array(f, dtype=float) for f in fills]
    assert [stop(x[0], x[1]), stop(x[1], x[2]), stop(x[2], x[3])] == [False, False, True]
    stop = classics.RisingChange(np.zeros((2, 2), dtype=bool), blocks)
    assert [stop(x[0], x[1]), stop(x[1], x[2]), stop(x[2], x[2] + [[1.0, 0], [0, 0]])] == [False, False, False]


# --- draws -----------------------------------------------------------------------------------------------------------


def gaussian(n=1500, rate=0.4, rho=0.8, seed=0):
    """Two standard normals with correlation rho, the second hidden at random with probability `rate`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 1))
    x = np.hstack([x, rho * x + np.sqrt(1 - rho**2) * rng.standard_normal((n, 1))])
    holes = x.copy()
    holes[rng.random(n) < rate, 1] = np.nan
    return x, holes


def check_variance_restored(name):
    x, holes = gaussian()
    imputer = make(name)
    if name == "trees":  # with one predictor a random threshold often leaves too few rows, and the node stays whole
        imputer.set_params(min_samples_leaf=1)
    imputer.fit(holes)
    drawn, hidden = imputer.sample(holes, 8), np.isnan(holes[:, 1])
    ratio = drawn[:, :, 1].var(axis=1).mean() / x[:, 1].var()
    assert 0.9 < ratio < 1.1, (name, ratio)
    inner = (drawn[:, hidden, 1] - 0.8 * x[hidden, 0]).var()
    assert 0.75 < inner / 0.36 < 1.25, (name, inner)


@pytest.mark.parametrize("name", DRAWING)
def test_draws_restore_the_variance(name):
    check_variance_restored(name)


def test_variance_check_catches_a_draw_without_noise(monkeypatch):
    real = classics.PosteriorColumn.value
    monkeypatch.setattr(classics.PosteriorColumn, "value", lambda self, x, z, theta=0: real(self, x, 0 * z, theta))
    with pytest.raises(AssertionError):
        check_variance_restored("mice")
    monkeypatch.setattr(classics.ForestColumn, "draw", lambda self, x, rng: self.predict(x))
    with pytest.raises(AssertionError):
        check_variance_restored("missforest")
    monkeypatch.setattr(classics.NeighboursImputer, "_draws", lambda self, x, o, n, rng: [self._fill(x, o)] * n)
    with pytest.raises(AssertionError):
        check_variance_restored("knn")


@pytest.mark.parametrize("name", DRAWING)
def test_the_mean_of_draws_is_near_transform(name):
    _, holes = gaussian(n=300)
    imputer = make(name).fit(holes)
    drawn, point = imputer.sample(holes, 400), imputer.transform(holes)
    hidden = np.isnan(holes[:, 1])
    gap = (drawn[:, hidden, 1].mean(axis=0) - point[hidden, 1]).mean()
    assert abs(gap) < 0.05
    error = drawn[:, hidden, 1].std(axis=0) / 20  # of the mean of 400 draws
    near = np.abs(drawn[:, hidden, 1].mean(axis=0) - point[hidden, 1]) < 4 * error + 0.15
    assert near.mean() > 0.95


def test_forest_draws_have_the_mean_of_the_forest():
    x, _, _ = numbers()
    forest = classics.ExtraTreesRegressor(20, min_samples_leaf=5, random_state=0)
    column = classics.ForestColumn(forest).fit(x[:, 1:], x[:, 0])
    rng = np.random.default_rng(0)
    drawn = np.mean([column.draw(x[:50, 1:], rng) for _ in range(3000)], axis=0)
    assert np.abs(drawn - forest.predict(x[:50, 1:])).max() < 0.12
    assert set(column.draw(x[:, 1:], rng)) <= set(x[:, 0])  # every draw is a value of a training row


def test_donors_are_those_of_knn_imputer():
    _, holes, observed = numbers(rate=0.2)
    knn = classics.NeighboursImputer(5).fit(holes[:300])
    x, seen = knn.encoder_.transform(holes)
    expected = KNNImputer(n_neighbors=5).fit(np.where(seen, x, np.nan)[:300]).transform(np.where(seen, x, np.nan))
    for block in knn.encoder_.blocks_:
        near = classics.nearest_donors(x, seen, knn.x_, knn.observed_, block, 5)
        assert near.known.all()
        np.testing.assert_allclose(knn.x_[near.donor, block.start].mean(1), expected[near.rows, block.start], atol=1e-9)


def test_a_row_that_shares_no_column_gets_the_mean_and_any_value():
    train = np.array([[1.0, np.nan], [2.0, np.nan], [6.0, np.nan], [np.nan, 5.0]])
    row = np.array([[np.nan, 5.0]])
    knn = classics.NeighboursImputer(1).fit(train)
    assert knn.transform(row)[0, 0] == pytest.approx(3.0)
    assert set(knn.sample(row, 60, random_state=0)[:, 0, 0]) == {1.0, 2.0, 6.0}


def test_the_mean_and_other_point_methods_cannot_draw(fitted):
    for name in set(CLASSICS) - set(DRAWING):
        assert not hasattr(fitted[1][name], "sample")
    with pytest.raises(ValueError, match="at least one"):
        fitted[1]["mice"].sample(fitted[0], 0)


# --- soft-thresholded SVD --------------------------------------------------------------------------------------------


def prox_objective(z, y, strength):
    return 0.5 * ((y - z) ** 2).sum() + strength * np.linalg.svd(z, compute_uv=False).sum()


def check_soft_threshold(threshold):
    rng = np.random.default_rng(0)
    y = rng.standard_normal((6, 4))
    z = threshold(y, 0.8)[0]
    best = prox_objective(z, y, 0.8)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(200):
            assert prox_objective(z + size * rng.standard_normal(z.shape), y, 0.8) >= best
    for t in (0.999, 1.001):
        assert prox_objective(t * z, y, 0.8) > best


def test_soft_threshold_solves_its_problem():
    check_soft_threshold(classics.soft_threshold)


@pytest.mark.parametrize("wrong", ["hard", "half"])
def test_the_check_catches_another_threshold(wrong):
    def other(y, strength):
        u, s, vt = np.linalg.svd(y, full_matrices=False)
        s = s * (s > strength) if wrong == "hard" else np.maximum(s - strength / 2, 0)
        return (u * s) @ vt, s, vt

    with pytest.raises(AssertionError):
        check_soft_threshold(other)


def test_the_objective_never_rises_and_rows_follow_from_the_factors():
    _, holes, observed = numbers()
    x = np.where(observed, holes, 1e6)
    strength = 6.0
    fit = classics.soft_impute(x, observed, strength, tol=1e-12, max_steps=3000)
    assert (np.diff(fit.objective) <= 1e-9).all() and fit.objective[-1] < 0.98 * fit.objective[0]
    rows = classics.soft_rows(x, observed, fit.singular, fit.right, strength)
    assert np.abs(rows - fit.z).max() < 1e-5


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSICS)
def test_contract(fitted, name):
    holes, imputers = fitted
    imputer = imputers[name]
    assert list(imputer.get_feature_names_out()) == list(holes.columns) and imputer.n_features_in_ == holes.shape[1]
    assert clone(imputer).get_params() == imputer.get_params()
    again = pickle.loads(pickle.dumps(imputer))
    pd.testing.assert_frame_equal(again.transform(holes), imputer.transform(holes))
    with pytest.raises(ValueError, match="another order"):
        imputer.transform(holes[holes.columns[::-1]])
    with pytest.raises(ValueError, match="lacking"):
        imputer.transform(holes.drop(columns="species"))
    with pytest.raises(ValueError, match="puma"):
        imputer.transform(holes.assign(species="puma"))


@pytest.mark.parametrize("name", sorted(QUICK))
def test_seeds(name):
    _, holes, _ = numbers()
    a, b = make(name).fit(holes), make(name).fit(holes)
    np.testing.assert_array_equal(a.transform(holes), b.transform(holes))
    if name in DRAWING:
        np.testing.assert_array_equal(a.sample(holes, 2), b.sample(holes, 2))
        assert not np.allclose(a.sample(holes, 1), a.sample(holes, 1, random_state=1))
        free = clone(a).set_params(random_state=None).fit(holes)
        assert not np.allclose(free.sample(holes, 1), free.sample(holes, 1))


@pytest.mark.parametrize("name", CLASSICS)
def test_small_and_odd_tables(name):
    nan = np.nan
    for X in ([[1.0, nan]], [[nan, nan], [1.0, 2.0]], [[1.0], [nan], [3.0]], [[2.0, 2.0], [2.0, nan], [2.0, 2.0]],
              [[1.0, 2.0], [3.0, 5.0], [4.0, 1.0]], [[nan], [nan]]):
        X = np.array(X)
        imputer = make(name).fit(X)
        out = imputer.transform(X)
        filled = ~np.isnan(X).all(axis=0)
        assert np.isfinite(out[:, filled]).all() and np.isnan(out[:, ~filled]).all()
        if name in DRAWING:
            assert np.isfinite(imputer.sample(X, 2)[:, :, filled]).all()


def test_max_fit_rows_n_jobs_and_progress(capfd):
    x, holes, observed = numbers()
    few = make("trees").set_params(max_fit_rows=60, n_jobs=2, verbose=1).fit(holes)
    assert len(few.chain_.x) == 60 and "rounds" in (said := capfd.readouterr()).err and said.out == ""
    assert np.isfinite(few.transform(holes)).all()
    with pytest.raises(ValueError, match="max_fit_rows=0"):
        make("trees").set_params(max_fit_rows=0).fit(holes)
    make("trees").fit(holes)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", CLASSICS)
def test_no_rows_to_fill(name):
    _, holes, _ = numbers()
    imputer = make(name).fit(holes[:60])
    assert imputer.transform(holes[:0]).shape == (0, 10)
    if name in DRAWING:
        assert imputer.sample(holes[:0], 2).shape == (2, 0, 10)


@pytest.mark.parametrize(("name", "count"), [("knn", "n_neighbors"), ("softsvd", "n_strengths"), ("mice", "n_chains"),
                                             ("trees", "n_estimators"), ("softsvd", "max_steps")])
def test_a_count_below_one_is_an_error(name, count):
    with pytest.raises(ValueError, match=f"{count}=0: it must be at least 1"):
        make(name).set_params(**{count: 0}).fit(np.array([[1.0, np.nan], [2.0, 3.0]]))


@pytest.mark.parametrize("name", ["ice", "mice", "trees", "missforest"])
def test_no_round_is_an_error(name):
    with pytest.raises(ValueError, match="max_rounds=0"):
        make(name).set_params(max_rounds=0).fit(np.array([[1.0, np.nan], [2.0, 3.0]]))
