"""Pooling: published numbers, refits, regressions, traces, shifts; and for each the mutation that it must catch."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.base import BaseEstimator
from sklearn.datasets import load_iris
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.svm import LinearSVC

from missingbook.foundations.autoencoder import AutoencoderImputer
from missingbook.foundations.classics import CLASSICS, LinearICEImputer, MICEImputer, NeighboursImputer
from missingbook.foundations.data import infer_kinds
from missingbook.practice import pooling
from missingbook.practice.pooling import (
    bootstrap_rows,
    convergence,
    fit_each,
    impute_many,
    linear_regression,
    plot_traces,
    pool,
    r_hat,
    regress_each,
    shift_imputations,
    traces,
    wald_test,
)

QUICK = MICEImputer(2, 3, random_state=0)
SOME = [[i, (i * 7) % 5, np.nan if i % 3 == 0 else i % 4] for i in range(30)]


def mixed(n=90, seed=0):
    """A number, a whole number, a category with a rare level, an ordered, a boolean, a name, a date; holes in four."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({
        "x": rng.standard_normal(n), "count": pd.array(rng.integers(0, 9, n), dtype="Int64"),
        "kind": pd.Series(rng.choice(["a", "b"], n), dtype=object), "wide": rng.random(n) < 0.5,
        "size": pd.Categorical(rng.choice(["s", "m", "l"], n), ["s", "m", "l"], ordered=True),
        "name": [f"P{i}" for i in range(n)], "when": pd.Timestamp("2024-01-01"),
    })
    frame.loc[0, "kind"] = "rare"
    frame["y"] = frame["x"] + 0.5 * (frame["kind"] == "b") + 0.3 * rng.standard_normal(n)
    for column in ("x", "count", "kind", "size"):
        frame.loc[(rng.random(n) < 0.3) & (np.arange(n) > 0), column] = None
    frame.index = [f"row {i}" for i in range(n)]
    return frame


# --- Rubin's rules ---------------------------------------------------------------------------------------------------

PRINTED = pd.DataFrame(  # R's mice on the mammalsleep data, m = 5, 59 complete-data degrees of freedom
    {"estimate": [10.0739157, -1.4513424, -0.5504494], "within": [0.71206627, 0.10052200, 0.08902854],
     "between": [0.83964136, 0.30175131, 0.01146902], "total": [1.7196359, 0.4626236, 0.1027914],
     "dof": [7.805051, 4.277824, 40.480414], "relative_increase": [1.4149942, 3.6022121, 0.1545889],
     "missing_information": [0.6625659, 0.8424252, 0.1737299], "std_error": [1.3113489, 0.6801644, 0.3206109],
     "p_value": [6.666925e-05, 9.530451e-02, 9.364526e-02]})


def published():
    """Five estimates with the printed mean and variance."""
    five = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) / np.sqrt(2.5)
    return PRINTED["estimate"].to_numpy() + five[:, None] * np.sqrt(PRINTED["between"].to_numpy())


def check_published():
    table = pool(published(), np.tile(PRINTED["within"], (5, 1)), 59)
    np.testing.assert_allclose(table[PRINTED.columns], PRINTED, rtol=1e-6)


def test_pool_agrees_with_r():
    check_published()


@pytest.mark.parametrize("mutant", [
    lambda q, u: (u.mean(0), q.var(0, ddof=1), u.mean(0) + q.var(0, ddof=1)),  # the 1/m is dropped
    lambda q, u: (u.mean(0), q.var(0), u.mean(0) + (1 + 1 / len(q)) * q.var(0)),  # divided by m
    lambda q, u: (np.sqrt(u).mean(0) ** 2 + 0.01, q.var(0, ddof=1), u.mean(0)),  # the between variance is forgotten
])
def test_published_numbers_catch_wrong_variances(monkeypatch, mutant):
    monkeypatch.setattr(pooling, "_spreads", mutant)
    with pytest.raises(AssertionError):
        check_published()


@pytest.mark.parametrize("mutant", [
    lambda share, m, complete: (m - 1) / share**2,  # Rubin's old degrees of freedom
    lambda share, m, complete: m / share**2,
    lambda share, m, complete: 1 / (share**2 / (m - 1) + 1 / (complete * (1 - share))),  # without (ν + 1)/(ν + 3)
])
def test_published_numbers_catch_wrong_degrees_of_freedom(monkeypatch, mutant):
    monkeypatch.setattr(pooling, "_degrees", mutant)
    with pytest.raises(AssertionError):
        check_published()


def test_pool_takes_all_shapes():
    q, u = published(), np.tile(PRINTED["within"], (5, 1))
    many = pool(pd.DataFrame(q, columns=list("abc")), u, 59)
    assert list(many.index) == list("abc")
    one = pool(q[:, 1], u[:, 1], 59)
    np.testing.assert_allclose(one.iloc[0], many.loc["b"])
    full = pool(q, np.stack([np.diag(v) + 0.01 * (1 - np.eye(3)) for v in u]), 59, names=list("abc"))
    pd.testing.assert_frame_equal(full, many)
    pd.testing.assert_frame_equal(pool(q, u, [59, 59, 59], names=list("abc")), many)
    assert (pool(q, u)["dof"] > many["dof"].to_numpy()).all()


def test_the_interval_is_students():
    table = pool(published(), np.tile(PRINTED["within"], (5, 1)), 59, level=0.9)
    half = stats.t.ppf(0.95, PRINTED["dof"]) * PRINTED["std_error"]
    np.testing.assert_allclose(table["high"] - table["estimate"], half, rtol=1e-6)
    np.testing.assert_allclose(table["estimate"] - table["low"], half, rtol=1e-6)


def test_no_holes_cost_nothing():
    table = pool([[1.0], [1.0]], [[0.25], [0.25]])
    line = table.iloc[0]
    assert line["std_error"] == 0.5 and line["dof"] == np.inf and line["missing_information"] == 0
    assert np.isclose(line["high"], 1 + 0.5 * stats.norm.ppf(0.975))


def test_pool_at_the_borders():
    """No variance inside: complete-data degrees of freedom leave nothing, without them B's own m − 1 are left."""
    endless = pool([1.0, 2.0, 3.0], [0, 0, 0], 30).iloc[0]
    assert endless["low"] == -np.inf and endless["high"] == np.inf and endless["p_value"] == 1 and endless["dof"] == 0
    line = pool([1.0, 2.0, 3.0], [0, 0, 0]).iloc[0]
    assert line["dof"] == 2 and np.isclose(line["high"], 2 + stats.t.ppf(0.975, 2) * np.sqrt(4 / 3))
    assert pool([0.0, 0.0], [0, 0])["p_value"].iloc[0] == 1 and pool([1.0, 1.0], [0, 0])["p_value"].iloc[0] == 0
    q, u = published(), np.tile(PRINTED["within"], (5, 1))
    pd.testing.assert_frame_equal(pool(q, u, np.inf), pool(q, u))  # once NaN: ∞ / ∞ in @eq-pooling-dof
    np.testing.assert_allclose(pool(q, u, 1e12), pool(q, u), rtol=1e-6)


@pytest.mark.parametrize(("keywords", "said"), [
    ({"dof_complete": -3}, "dof_complete=-3"), ({"dof_complete": 0}, "dof_complete=0"),
    ({"dof_complete": np.nan}, "dof_complete=nan"), ({"dof_complete": [9, 9]}, "one a coefficient"),
    ({"names": ["a", "b"]}, "2 names for 3 coefficients"), ({"names": "slope"}, "1 names for 3 coefficients"),
])
def test_pool_wants_what_goes_together(keywords, said):
    with pytest.raises(ValueError, match=said):
        pool(published(), np.tile(PRINTED["within"], (5, 1)), **keywords)


def test_pool_does_not_pair_columns_of_other_names():
    q = pd.DataFrame(published(), columns=list("abc"))
    with pytest.raises(ValueError, match="must agree"):
        pool(q, pd.DataFrame(np.ones((5, 3)), columns=list("bac")))
    with pytest.raises(ValueError, match="must agree"):
        pool(q, np.ones((5, 3, 4)))
    assert list(pool([1.0, 2.0], [1.0, 1.0], names="slope").index) == ["slope"]


@pytest.mark.parametrize(("arguments", "said"), [
    (([1.0], [0.1]), "one imputation cannot be pooled"),
    (([[1.0, 2.0]], [[0.1, 0.1]]), "one imputation cannot be pooled"),
    (([1.0, np.nan], [0.1, 0.1]), "imputation 1"),
    (([1.0, 2.0], [0.1, -0.1]), "negative"),
    (([[1.0, 2.0], [1.0, 2.0]], [0.1, 0.1]), "must agree"),
    ((["a", "b"], [0.1, 0.1]), "must be numbers"),
    ((1.0, 0.1), "dimensions"),
])
def test_pool_says_what_is_wrong(arguments, said):
    with pytest.raises(ValueError, match=said):
        pool(*arguments)
    with pytest.raises(ValueError, match="level"):
        pool([1.0, 2.0], [0.1, 0.1], level=95)


# --- the joint test --------------------------------------------------------------------------------------------------


def check_wald(test):
    """Three coefficients that are zero, fills that double the variance: about 5% must be rejected."""
    rng, hits, root = np.random.default_rng(0), [], np.array([[1.0, 0, 0], [0.5, 1, 0], [0.2, -0.4, 1]])
    for _ in range(1500):
        centre = root @ rng.standard_normal(3) * np.sqrt(2)
        q = centre + rng.standard_normal((20, 3)) @ root.T
        hits.append(test(q, np.tile(root @ root.T, (20, 1, 1))).p_value < 0.05)
    assert abs(np.mean(hits) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 1500) + 0.01


def test_wald_keeps_its_level():
    check_wald(wald_test)


def test_wald_level_catches_a_forgotten_increase():
    def mutant(q, u):
        statistic = q.mean(0) @ np.linalg.solve(u.mean(0), q.mean(0)) / 3  # without 1 + r
        return pooling.WaldTest(statistic, (3, 100.0), float(stats.f.sf(statistic, 3, 100)))

    with pytest.raises(AssertionError):
        check_wald(mutant)


def check_wald_dof(measure):
    """k = 3, m = 4, t = 9, r = 1.25: w = 4 + 5 (1 + 7/9 / 1.25)²; for one coefficient and few draws w is Rubin's ν."""
    q = np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * np.sqrt(0.75)  # covariance: the identity
    assert np.isclose(measure(q, np.tile(np.eye(3), (4, 1, 1))), 4 + 5 * (1 + 7 / 9 / 1.25) ** 2)
    assert np.isclose(measure(q[:, :1], np.ones((4, 1, 1))), pool(q[:, :1], np.ones((4, 1)))["dof"].iloc[0])


def test_wald_degrees_of_freedom():
    check_wald_dof(lambda q, u: wald_test(q, u).dof[1])


@pytest.mark.parametrize("mutant", [
    lambda r, k, t: 4 + (t - 4) * (1 + 1 / r) ** 2 if t > 4 else t * (1 + 1 / k) * (1 + 1 / r) ** 2 / 2,  # no 1 − 2/t
    lambda r, k, t: 4 + (t - 4) * (1 + (1 - 2 / t) / r) ** 2,  # one formula for all t
    lambda r, k, t: np.inf,
])
def test_wald_degrees_of_freedom_catch_wrong_formulas(mutant):
    def measure(q, u):
        (m, k), r = q.shape, (1 + 1 / len(q)) * np.trace(np.atleast_2d(np.cov(q, rowvar=False))) / q.shape[1]
        return mutant(r, k, k * (m - 1))

    with pytest.raises(AssertionError):
        check_wald_dof(measure)


def test_wald_does_not_look_at_units():
    """A slope of 1e-7 beside an intercept of 1000 is no singular matrix (judged by its own rank, it was)."""
    q, u = np.array([[1.0, 2.0], [1.5, 1.8], [0.9, 2.2]]), np.tile(np.diag([0.5, 0.2]), (3, 1, 1))
    units = np.array([1e3, 1e-7])
    there, here = wald_test(q * units, u * np.outer(units, units)), wald_test(q, u)
    assert np.isclose(there.statistic, here.statistic) and np.isclose(there.p_value, here.p_value)
    with pytest.raises(ValueError, match="no covariance matrix"):
        wald_test(q, np.tile([[1.0, 2.0], [2.0, 1.0]], (3, 1, 1)))
    with pytest.raises(ValueError, match="null="):
        wald_test(q, u, null=[1.0, 2.0, 3.0])


def test_wald_in_the_limits():
    q, u = np.array([[1.0, 2.0], [1.0, 2.0]]), np.tile(np.diag([0.5, 0.2]), (2, 1, 1))
    sure = wald_test(q, u)  # no variance between: a chi-square test
    assert np.isclose(sure.statistic, (1 / 0.5 + 4 / 0.2) / 2) and sure.dof == (2, np.inf)
    assert np.isclose(sure.p_value, stats.chi2.sf(2 * sure.statistic, 2))
    assert wald_test(q, u, null=[1.0, 2.0]).p_value == 1
    small = wald_test(np.array([[1.0, 2.0], [1.5, 1.8]]), u)  # t = 2: the other formula for w
    r = 1.5 * (0.125 / 0.5 + 0.02 / 0.2) / 2
    assert np.isclose(small.dof[1], 2 * 1.5 * (1 + 1 / r) ** 2 / 2)
    with pytest.raises(ValueError, match="singular"):
        wald_test(q, np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match="one imputation"):
        wald_test(q[:1], u[:1])


# --- many imputations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("name", ["knn", "mice", "missforest", "trees"])
def test_every_drawing_imputer(name, bootstrap):
    settings = {"mice": dict(n_chains=2, max_rounds=2), "trees": dict(n_estimators=5, max_rounds=1),
                "missforest": dict(n_estimators=5, max_rounds=1)}.get(name, {})
    X = mixed()
    keep = X.copy(deep=True)
    imputer = CLASSICS[name](**settings)
    first, again = (impute_many(imputer, X, 3, bootstrap=bootstrap, random_state=4, verbose=False) for _ in range(2))
    pd.testing.assert_frame_equal(X, keep)
    assert not hasattr(imputer, "encoder_") and len(first) == 3 and not first[0].equals(first[1])
    for table, same in zip(first, again):
        pd.testing.assert_frame_equal(table, same)
        assert table.notna().all(axis=None) and (table.dtypes == X.dtypes).all() and table.index.equals(X.index)
        for column in X:
            seen = X[column].notna()
            pd.testing.assert_series_equal(table.loc[seen, column], X.loc[seen, column])


def test_arrays_and_iterative_imputer():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((80, 3))
    X[:, 2] += X[:, 0]
    X[rng.random(X.shape) < 0.2] = np.nan
    for imputer in (MICEImputer(2, 2), IterativeImputer(sample_posterior=True, max_iter=2, tol=0.0)):
        for bootstrap in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                drawn = impute_many(imputer, X, 3, bootstrap=bootstrap, random_state=0, verbose=False)
                frames = impute_many(imputer, pd.DataFrame(X, columns=list("abc")), 2, bootstrap=bootstrap)
            assert drawn.shape == (3, 80, 3) and np.isfinite(drawn).all() and not (drawn[0] == drawn[1]).all()
            assert (drawn[:, ~np.isnan(X)] == X[~np.isnan(X)]).all()
            assert list(frames[0].columns) == list("abc")


def test_what_draws_nothing_is_refused():
    for imputer in (LinearICEImputer(), IterativeImputer(), CLASSICS["mean"]()):
        with pytest.raises(ValueError, match="best guess"):
            impute_many(imputer, mixed(), 2, bootstrap=True)
    for wrong in (0, 2.0):
        with pytest.raises(ValueError, match=f"n_imputations={wrong}"):
            impute_many(QUICK, mixed(), wrong)
    for wrong in (MICEImputer, None, "mice"):
        with pytest.raises(ValueError, match="is no imputer"):
            impute_many(wrong, mixed(), 2)
    X = np.c_[np.arange(9.0), np.full(9, np.nan)]
    with pytest.raises(ValueError, match="keep_empty_features"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        impute_many(IterativeImputer(sample_posterior=True), X, 2)
    with pytest.raises(ValueError, match="add_indicator=False"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        impute_many(IterativeImputer(sample_posterior=True, add_indicator=True, max_iter=1), np.array(SOME), 2)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_a_deep_estimator(bootstrap):
    X = np.array(SOME)
    drawn, again, other = (
        impute_many(AutoencoderImputer(max_epochs=2, random_state=0, verbose=False), X, 3, bootstrap=bootstrap,
                    random_state=state, verbose=False) for state in (None, None, 1))
    seen = ~np.isnan(X)
    assert (drawn == again).all() and (drawn[:, seen] == X[seen]).all() and np.isfinite(drawn).all()
    hidden = np.array([*drawn, *other])[:, ~seen]
    assert all((hidden[i] != hidden[j]).all() for i in range(6) for j in range(i))


class OneFit(BaseEstimator):
    """The contract of a deep estimator, with noise around a line as its draw: fit, transform, sample."""

    def __init__(self, random_state=None):
        self.random_state = random_state

    def fit(self, X):
        seen = ~np.isnan(X[:, 1])
        design = np.c_[np.ones(len(X)), X[:, 0]]
        self.line_, rss = np.linalg.lstsq(design[seen], X[seen, 1], rcond=None)[:2]
        self.noise_ = float(np.sqrt(rss[0] / (seen.sum() - 2)))
        return self

    def transform(self, X):
        return self.sample(X, 1)[0]

    def sample(self, X, n_samples, random_state=None):
        rng, guess = np.random.default_rng(random_state), self.line_[0] + self.line_[1] * X[:, 0]
        noise = self.noise_ * rng.standard_normal((n_samples, len(X)))
        return np.stack([np.c_[X[:, 0], np.where(np.isnan(X[:, 1]), guess + e, X[:, 1])] for e in noise])


def check_bootstrap_spreads_the_parameters():
    """With most of y hidden, the mean of y must differ more between refits than between draws from one fit."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 2))
    X[20:, 1] = np.nan
    one, refits = (impute_many(OneFit(), X, 60, bootstrap=b, random_state=1)[:, :, 1].mean(1) for b in (False, True))
    assert refits.var() > 4 * one.var()


def test_bootstrap_spreads_the_parameters():
    check_bootstrap_spreads_the_parameters()


def test_the_spread_catches_a_resample_that_is_none(monkeypatch):
    monkeypatch.setattr(pooling, "bootstrap_rows", lambda X, kinds, rng: np.arange(len(X)))
    with pytest.raises(AssertionError):
        check_bootstrap_spreads_the_parameters()


def test_a_fitted_imputer_is_used_as_it_is():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((50, 2))
    X[25:, 1] = np.nan
    fitted = OneFit().fit(X)
    fitted.line_ = np.array([1000.0, 0.0])
    assert impute_many(fitted, X, 2)[:, 25:, 1].min() > 900
    assert impute_many(fitted, X, 2, bootstrap=True, verbose=False)[:, 25:, 1].max() < 900  # a copy is fitted again


class Pictures(OneFit):
    """An imputer of pictures that remembers how it was asked to fit."""

    def __init__(self, checkpoint=None, verbose=True, random_state=None):
        self.checkpoint, self.verbose, self.random_state = checkpoint, verbose, random_state

    def fit(self, X):
        assert self.checkpoint is None and not self.verbose
        self.mean_ = np.nanmean(X)
        return self

    def sample(self, X, n_samples, random_state=None):
        return np.stack([np.where(np.isnan(X), self.mean_, X)] * n_samples)


def test_pictures_are_resampled_whole_and_copies_resume_nothing():
    X = np.random.default_rng(0).random((12, 1, 4, 4))
    X[:, :, :2] = np.nan
    drawn = impute_many(Pictures(checkpoint="here", verbose=True), X, 3, bootstrap=True, random_state=0)
    assert drawn.shape == (3, 12, 1, 4, 4) and len(np.unique(drawn[:, 0, 0, 0, 0])) == 3


def check_levels():
    X = mixed()
    kinds = infer_kinds(X)
    for seed in range(30):
        rows = bootstrap_rows(X, kinds, np.random.default_rng(seed))
        assert set(X["kind"].dropna()) == set(X["kind"].iloc[rows].dropna())
        assert set(X["size"].dropna()) == set(X["size"].iloc[rows].dropna())


def test_no_level_is_lost():
    check_levels()
    for draw in impute_many(NeighboursImputer(), mixed(), 8, bootstrap=True, random_state=0, verbose=False):
        assert draw["kind"].iloc[0] == "rare"


def test_levels_catch_a_plain_resample(monkeypatch):
    def plain(X, kinds, rng):
        return rng.integers(len(X), size=len(X))

    monkeypatch.setitem(globals(), "bootstrap_rows", plain)
    with pytest.raises(AssertionError):
        check_levels()
    monkeypatch.setattr(pooling, "bootstrap_rows", plain)
    with pytest.raises(ValueError, match="rare"):
        impute_many(NeighboursImputer(), mixed(), 8, bootstrap=True, random_state=0, verbose=False)


def test_the_only_observed_cell_stays():
    X = np.c_[np.arange(30.0), np.full(30, np.nan)]
    X[7, 1] = 5.0
    for seed in range(20):
        assert 7 in bootstrap_rows(X, {0: "number", 1: "number"}, np.random.default_rng(seed))
    drawn = impute_many(MICEImputer(1, 1), X, 4, bootstrap=True, random_state=0, verbose=False)
    assert (drawn[:, :, 1] == 5.0).all()
    empty = bootstrap_rows(np.full((5, 1), np.nan), {0: "number"}, np.random.default_rng(0))
    assert len(empty) == 5


@pytest.mark.parametrize("state", [3, np.random.RandomState(3), np.random.default_rng(3), None])
def test_random_states(state):
    assert len(impute_many(QUICK, mixed(), 2, random_state=state, verbose=False)) == 2


def test_the_imputers_own_seed_counts():
    first, again = (impute_many(MICEImputer(1, 1, random_state=5), mixed(), 2, verbose=False) for _ in range(2))
    assert all(a.equals(b) for a, b in zip(first, again))


# --- regressions and models ------------------------------------------------------------------------------------------


def completions(n=3):
    return impute_many(QUICK, mixed().drop(columns=["name", "when"]), n, random_state=0, verbose=False)


def test_least_squares_against_scikit_learn_and_scipy():
    table = completions(1)[0]
    fits = regress_each([table, table], "y", ["x", "count"])
    X, y = table[["x", "count"]].to_numpy(float), table["y"].to_numpy()
    model = LinearRegression().fit(X, y)
    np.testing.assert_allclose(fits.estimates[0], [model.intercept_, *model.coef_])
    line = stats.linregress(X[:, 0], y)
    one = regress_each([table, table], "y", ["x"])
    np.testing.assert_allclose(np.sqrt(np.diag(one.covariances[0])), [line.intercept_stderr, line.stderr])
    assert fits.dof == 87 and fits.names == ["intercept", "x", "count"]
    pooled = linear_regression([table, table], "y", ["x"])
    assert (pooled["between"] == 0).all() and np.isclose(pooled.loc["x", "std_error"], line.stderr)


def test_categories_become_the_same_columns_everywhere():
    tables = completions()
    tables[0].loc[tables[0]["kind"] == "rare", "kind"] = "a"  # a level that one completion lacks
    with pytest.raises(ValueError, match="level 'rare' of column 'kind' does not occur in imputation 0"):
        linear_regression(tables, "y", ["x", "kind"])
    tables = completions()
    names = list(linear_regression(tables, "y").index)
    assert names == ["intercept", "x", "count", "wide", "kind_b", "kind_rare", "size_m", "size_l"]
    assert list(linear_regression(tables, "y", []).index) == ["intercept"]


@pytest.mark.parametrize(("call", "said"), [
    (lambda t: linear_regression(t, "z"), "no column 'z'"),
    (lambda t: linear_regression(t, "y", ["x", "u"]), "no column 'u'"),
    (lambda t: linear_regression(t[:1], "y", ["x"]), "one imputation"),
    (lambda t: linear_regression(t[0], "y"), "several completions"),
    (lambda t: linear_regression([], "y"), "several completions"),
    (lambda t: linear_regression([t[0], t[1].iloc[:-1]], "y"), "differ"),
    (lambda t: linear_regression(t, "kind", ["x"]), "target 'kind' is no number"),
    (lambda t: linear_regression([f.assign(twin=2 * f["x"]) for f in t], "y", ["x", "twin"]), "'twin' repeats others"),
    (lambda t: linear_regression([f.iloc[:3] for f in t], "y", ["x", "count"]), "too few rows"),
    (lambda t: linear_regression([f.assign(x=np.nan) for f in t], "y", ["x"]), "column 'x' still has holes"),
    (lambda t: linear_regression(t, "y", ["x", "y"]), "'y' stands twice"),
    (lambda t: linear_regression(t, "y", ["x", "x"]), "'x' stands twice"),
    (lambda t: linear_regression([pd.concat([f, f[["x"]]], axis=1) for f in t], "y"), "two columns .* called 'x'"),
    (lambda t: linear_regression([f.assign(c="a") for f in t], "y"), "'c' has a single level, 'a'"),
    (lambda t: linear_regression([f.assign(c=1.0) for f in t], "y"), "'c' repeats others"),
    (lambda t: linear_regression([f.assign(c=pd.Timestamp("2024")) for f in t], "y"), "'c' holds datetime64"),
    (lambda t: linear_regression([f.assign(c=f["x"].where(f["x"] > 0, np.inf)) for f in t], "y"), "infinite"),
    (lambda t: linear_regression([f.assign(c=f["x"] if i else "a") for i, f in enumerate(t)], "y"), "numbers in one"),
    (lambda t: linear_regression([f.assign(intercept=f["x"] ** 2) for f in t], "y"), "would be called 'intercept'"),
    (lambda t: linear_regression([t[0], t[1].iloc[::-1]], "y"), "order"),
    (lambda t: linear_regression(None, "y"), "several completions"),
    (lambda t: fit_each(LinearRegression(), t, t[0]["y"].iloc[::-1]), "another order"),
    (lambda t: fit_each(LinearRegression(), t, "z"), "no column 'z'"),
    (lambda t: fit_each(LinearSVC(), t, "kind"), "no predict_proba"),
])
def test_regressions_say_what_is_wrong(call, said):
    with pytest.raises(ValueError, match=said):
        call(completions())


def check_twins(fit):
    """big2 is three times big; a column of tiny numbers, and no copy of anything, must not hide that."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 2))
    twins = np.c_[np.ones(40), 1e-9 * x[:, 0], 1e8 * x[:, 1], 3e8 * x[:, 1]]
    fit(twins[:, :3], x[:, 0])
    try:
        fit(twins, x[:, 0])
    except np.linalg.LinAlgError:
        return
    raise AssertionError("twins were not found")


def test_twins_are_found_in_any_unit():
    check_twins(pooling.least_squares)
    assert list(linear_regression(completions(), "y", "x").index) == ["intercept", "x"]  # not letters


def test_twins_catch_a_search_by_size():
    def mutant(X, y):
        size = np.abs(np.diag(np.linalg.qr(X)[1]))
        if size.min() <= 1e-10 * np.linalg.norm(X, axis=0)[size.argmin()]:
            raise np.linalg.LinAlgError

    with pytest.raises(AssertionError):
        check_twins(mutant)


def test_arrays_can_be_analysed():
    X = np.stack([t[["x", "y"]].to_numpy() for t in completions()])
    assert list(linear_regression(X, 1).index) == ["intercept", 0]
    pair = fit_each(LinearRegression(), X, 1)
    assert np.allclose(pair.predict(X[0][:, :1]), np.mean([m.predict(X[0][:, :1]) for m in pair.models], axis=0))


def test_fit_each_averages():
    tables = [t[["x", "count", "y"]].astype(float) for t in completions()]
    each = fit_each(LinearRegression(), tables, "y")
    own = np.mean([m.predict(t.drop(columns="y")) for m, t in zip(each.models, tables)], axis=0)
    np.testing.assert_allclose(each.predict(tables), own)  # model i on completion i
    same = np.mean([m.predict(tables[0].drop(columns="y")) for m in each.models], axis=0)
    np.testing.assert_allclose(each.predict(tables[0]), same)  # all models on one table
    assert not np.allclose(own, same)
    with pytest.raises(ValueError, match="2 completions for 3 models"):
        each.predict(tables[:2])
    apart = fit_each(LinearRegression(), [t.drop(columns="y") for t in tables], tables[0]["y"])
    np.testing.assert_allclose(apart.predict(tables[0].drop(columns="y")), same)


def test_classifiers_average_probabilities():
    X, y = load_iris(return_X_y=True)
    X = np.where(np.random.default_rng(0).random(X.shape) < 0.5, np.nan, X)
    drawn = impute_many(NeighboursImputer(), X, 3, random_state=0)
    each = fit_each(LogisticRegression(max_iter=1000), drawn, np.array(["a", "b", "c"])[y])
    chance = np.mean([m.predict_proba(d) for m, d in zip(each.models, drawn)], axis=0)
    np.testing.assert_allclose(each.predict_proba(drawn), chance)
    assert (each.predict(drawn) == np.array(["a", "b", "c"])[chance.argmax(1)]).all()
    tables = [pd.DataFrame({"x": [0.0, 1, 2, 3], "y": list(labels)}) for labels in ("aabb", "aabc")]
    with pytest.raises(ValueError, match="classes of 'y' differ"):
        fit_each(LogisticRegression(), tables, "y")


# --- chains ----------------------------------------------------------------------------------------------------------


def check_r_hat(measure):
    noise = np.random.default_rng(1).standard_normal((4, 400))
    assert measure(noise) < 1.01
    assert measure(noise + np.array([0, 0, 0, 5])[:, None]) > 1.5  # apart
    assert measure(noise + np.linspace(0, 3, 400)) > 1.1  # drifting together
    assert measure(noise * np.array([1, 1, 1, 4])[:, None]) > 1.1  # of another width
    assert measure(np.random.default_rng(2).standard_cauchy((4, 400))) < 1.01


def test_r_hat():
    check_r_hat(r_hat)
    constant = np.ones((3, 8))
    assert np.isnan(r_hat(constant))
    for few in (np.ones((3, 3)), np.ones((0, 8))):
        with pytest.raises(ValueError, match="at least 4"):
            r_hat(few)
    odd = np.random.default_rng(0).standard_normal((3, 9))
    odd[:, 4] = [50, -50, 0]  # the middle round is in neither half, nor may it move the ranks
    assert r_hat(odd) == r_hat(np.delete(odd, 4, axis=1))
    assert np.isinf(r_hat(np.repeat([[1.0], [2.0]], 8, axis=1)))  # stuck apart
    with pytest.raises(ValueError, match="nan"):
        r_hat(np.full((3, 8), np.nan))


def unsplit(chains):
    n = chains.shape[1]
    return np.sqrt((n - 1) / n + chains.mean(1).var(ddof=1) / chains.var(1, ddof=1).mean())


@pytest.mark.parametrize("mutant", [
    lambda t: max(unsplit(pooling._normal_scores(t)), unsplit(pooling._normal_scores(np.abs(t - np.median(t))))),
    lambda t: pooling._split_r_hat(pooling._normal_scores(t)),  # not folded
    lambda t: 1.0,
])
def test_r_hat_catches_what_does_not_split_or_fold(mutant):
    with pytest.raises(AssertionError):
        check_r_hat(mutant)


def test_mice_keeps_its_trace():
    X = mixed()
    imputer = MICEImputer(3, 4, random_state=0).fit(X)
    trace = imputer.trace_
    expected = {"x", "count", "size", "kind=a", "kind=b", "kind=rare"}
    assert list(trace.columns) == ["chain", "round", "column", "mean", "std"] and set(trace["column"]) == expected
    assert len(trace) == 3 * 4 * 6 and trace["mean"].notna().all()
    assert set(trace["chain"]) == {0, 1, 2} and set(trace["round"]) == {1, 2, 3, 4}
    shares = trace[trace["column"].str.startswith("kind=")].groupby(["chain", "round"])["mean"].sum()
    np.testing.assert_allclose(shares, 1.0)
    assert trace.loc[trace["column"] == "count", "mean"].between(-3, 12).all()  # in the column's own units
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(imputer)).trace_, trace)
    assert MICEImputer(2, 3).fit(X.dropna()).trace_.empty


def test_the_trace_holds_the_fills(monkeypatch):
    """The trace of round n is that of the cells filled in round n: a chain that fills 7 everywhere traces 7."""
    from missingbook.foundations import classics

    monkeypatch.setattr(classics.PosteriorColumn, "value", lambda self, x, z, theta=0: np.full(len(x), 2.0))
    X = np.random.default_rng(0).standard_normal((60, 2)) * 3 + 1
    X[:20, 1] = np.nan
    trace = MICEImputer(2, 3, random_state=0).fit(X).trace_
    seven = X[20:, 1].mean() + 2 * X[20:, 1].std()
    np.testing.assert_allclose(trace["mean"], seven)
    np.testing.assert_allclose(trace["std"], 0, atol=1e-12)


def test_traces_as_arrays_and_figure():
    import matplotlib

    matplotlib.use("Agg")
    imputer = MICEImputer(3, 6, random_state=0).fit(mixed())
    arrays = traces(imputer, "std")
    assert arrays["x"].shape == (3, 6) and list(traces(imputer.trace_)) == list(arrays)
    line = imputer.trace_.query("chain == 1 and round == 5 and column == 'x'")["std"].item()
    assert arrays["x"][1, 4] == line
    table = convergence(imputer, burn_in=1)
    assert list(table.columns) == ["mean", "std"] and np.isclose(table.loc["x", "std"], r_hat(arrays["x"][:, 1:]))
    figure = plot_traces(imputer, ["x", "count"])
    assert len(figure.axes) == 2 and len(figure.axes[0].lines) == 3
    for call, said in ((lambda: traces(NeighboursImputer()), "MICEImputer"),
                       (lambda: traces(imputer, "median"), "'mean'"),
                       (lambda: plot_traces(imputer, ["y"]), "there are traces of 'x'"),
                       (lambda: convergence(imputer, burn_in=3), "burn_in"),
                       (lambda: convergence(imputer, burn_in=-1), "burn_in"),
                       (lambda: plot_traces(MICEImputer(2, 4).fit(mixed().dropna())), "no column")):
        with pytest.raises(ValueError, match=said):
            call()


# --- delta adjustment ------------------------------------------------------------------------------------------------


def check_shift(shift):
    X, tables = mixed().drop(columns=["name", "when"]), completions()
    keep = [t.copy(deep=True) for t in tables]
    moved = shift(tables, X, {"x": 0.5, "count": 2})
    for before, after, kept in zip(tables, moved, keep):
        pd.testing.assert_frame_equal(before, kept)
        assert (after.dtypes == before.dtypes).all()
        for column, step in (("x", 0.5), ("count", 2)):
            seen = X[column].notna()
            pd.testing.assert_series_equal(after.loc[seen, column], X.loc[seen, column], check_exact=True)
            np.testing.assert_allclose((after.loc[~seen, column] - before.loc[~seen, column]).astype(float), step)
        pd.testing.assert_frame_equal(after.drop(columns=["x", "count"]), before.drop(columns=["x", "count"]))


def test_shift_moves_imputed_cells_alone():
    check_shift(shift_imputations)


@pytest.mark.parametrize("mutant", [
    lambda tables, X, delta: [t.assign(**{c: t[c] + d for c, d in delta.items()}) for t in tables],  # every cell
    lambda tables, X, delta: tables,  # none
    lambda tables, X, delta: [t.assign(x=t["x"] - 0.5 * X["x"].isna(), count=t["count"]) for t in tables],  # the sign
])
def test_shift_catches_wrong_cells(mutant):
    with pytest.raises(AssertionError):
        check_shift(mutant)


def test_shift_of_some_rows_and_of_arrays():
    X, tables = mixed().drop(columns=["name", "when"]), completions()
    rows = np.arange(len(X)) < 40
    moved = shift_imputations(tables, X, {"x": 1.0}, rows=rows)[0]
    changed = (moved["x"] != tables[0]["x"]).to_numpy()
    assert (changed == (X["x"].isna().to_numpy() & rows)).all()
    array, holes = np.stack([t[["x", "y"]].to_numpy() for t in tables]), X[["x", "y"]].to_numpy()
    shifted = shift_imputations(array, holes, {0: -2.0})
    assert np.allclose(shifted[:, np.isnan(holes[:, 0]), 0], array[:, np.isnan(holes[:, 0]), 0] - 2)
    assert (shifted[:, ~np.isnan(holes[:, 0])] == array[:, ~np.isnan(holes[:, 0])]).all()


@pytest.mark.parametrize(("delta", "said"), [
    ({"z": 1.0}, "no column 'z'"), ({"kind": 1.0}, "'kind' holds"), ({"wide": 1.0}, "'wide' holds"),
    ({"count": 0.5}, "'count' holds whole numbers"), ({"size": 1.0}, "'size' holds"),
    ({"y": 1.0}, "'y' of X has no hole"), ({"x": np.nan}, "is nan"), ({"x": "1"}, "is '1'"), (1.0, "delta=1.0"),
])
def test_shift_says_what_is_wrong(delta, said):
    X = mixed().drop(columns=["name", "when"])
    with pytest.raises(ValueError, match=said):
        shift_imputations(completions(2), X, delta)


def test_shift_wants_the_table_that_was_imputed():
    X = mixed().drop(columns=["name", "when"])
    with pytest.raises(ValueError, match="differ in rows or columns"):
        shift_imputations(completions(2), X.iloc[1:], {"x": 1.0})
    for rows in ([True], np.arange(len(X))):
        with pytest.raises(ValueError, match="rows has shape"):
            shift_imputations(completions(2), X, {"x": 1.0}, rows=rows)


def check_row_order(shift):
    """X in another order would shift observed cells: that must be refused, not done."""
    X, tables = mixed().drop(columns=["name", "when"]), completions(2)
    backwards = X["x"].isna().iloc[::-1]
    with pytest.raises(ValueError, match="order"):
        shift(tables, X.iloc[::-1], {"x": 1.0}, None)
    with pytest.raises(ValueError, match="order"):
        shift(tables, X, {"x": 1.0}, backwards)


def test_shift_wants_one_row_order():
    check_row_order(shift_imputations)


def test_row_order_catches_a_shift_by_position():
    def mutant(tables, X, delta, rows):
        cells = X["x"].isna().to_numpy() & (True if rows is None else np.asarray(rows))
        return [t.assign(x=t["x"] + delta["x"] * cells) for t in tables]

    with pytest.raises(pytest.fail.Exception):
        check_row_order(mutant)


# --- the promise -----------------------------------------------------------------------------------------------------


def coverage(bootstrap, pooled=True, repeats=250):
    """How often the 95% interval of the mean of y holds zero; four fifths of y hidden, filled by `OneFit`."""
    hits = []
    for seed in range(repeats):
        rng = np.random.default_rng([5, seed])
        X = rng.standard_normal((60, 2))
        X[rng.random(60) < 0.6, 1] = np.nan
        y = impute_many(OneFit(), X, 20, bootstrap=bootstrap, random_state=seed, verbose=False)[:, :, 1]
        y = y if pooled else np.repeat(y[:1], 2, axis=0)
        line = pool(y.mean(1), y.var(1, ddof=1) / 60, 59).iloc[0]
        hits.append(line["low"] <= 0 <= line["high"])
    return np.mean(hits)


def test_pooled_intervals_hold_what_they_promise_and_others_do_not():
    error = np.sqrt(0.95 * 0.05 / 250)
    assert abs(coverage(True) - 0.95) < 0.02 + 2 * error
    assert coverage(False) < 0.95 - 3 * error  # parameters from one fit
    assert coverage(True, pooled=False) < 0.85  # one imputation taken for data
