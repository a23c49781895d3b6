"The missingness mechanisms: properties on many tables, and mutations that those properties must catch."

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from missingbook.foundations import mechanisms
from missingbook.foundations.mechanisms import (
    MECHANISMS,
    calibrated_intercept,
    censoring,
    emflow_mar,
    hide,
    little_mcar_test,
    mar,
    mcar,
    missing_probabilities,
    mnar,
    self_masking,
)

STOCHASTIC = ("mcar", "mar", "mnar", "self_masking")
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
rates = st.floats(0, 1, allow_nan=False)
seeds = st.integers(0, 2**32 - 1)
names = st.sampled_from(sorted(MECHANISMS))
finite = st.floats(allow_nan=True, allow_infinity=False)  # NaN: a cell that is missing already

COLUMNS = {
    "float": finite,
    "small": st.floats(-10, 10, width=32),
    "int": st.integers(-(2**62), 2**62),
    "text": st.one_of(st.none(), st.text(max_size=3)),
    "mixed": st.one_of(st.none(), st.integers(-5, 5), st.text(max_size=2)),
    "bool": st.booleans(),
}
CASTS = {
    "Int64": ("int", "Int64"), "uint8": ("bool", "uint8"), "boolean": ("bool", "boolean"),
    "Float64": ("float", "Float64"),
    "category": ("text", "category"), "string": ("text", "string"), "float32": ("small", "float32"),
}


@st.composite
def frames(draw, min_rows=0, min_columns=2):
    "Tables with columns of many dtypes, dates included, with a duplicated or textual index and odd column names."
    rows, width = draw(st.integers(min_rows, 12)), draw(st.integers(min_columns, 5))
    data = []
    for _ in range(width):
        kind = draw(st.sampled_from([*COLUMNS, *CASTS, "date"]))
        if kind == "date":
            days = draw(st.lists(st.one_of(st.none(), st.integers(0, 20000)), min_size=rows, max_size=rows))
            data.append(pd.Series(pd.to_datetime(pd.array(days, dtype="Int64"), unit="D"), dtype="datetime64[ns]"))
            continue
        source, cast = CASTS.get(kind, (kind, {"int": "int64", "bool": "bool", "float": "float64"}.get(kind, "object")))
        data.append(pd.Series(draw(st.lists(COLUMNS[source], min_size=rows, max_size=rows)), dtype=cast))
    frame = pd.concat(data, axis=1)
    frame.columns = draw(st.lists(st.one_of(st.text(max_size=3), st.integers(0, 9)), min_size=width, max_size=width))
    frame.index = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    return frame


def table(rows=400, seed=0):
    "Strings, categories, booleans, nullable integers, dates and numbers, all related to one hidden cause."
    rng = np.random.default_rng(seed)
    cause = rng.normal(size=rows)
    level = pd.cut(cause + rng.normal(size=rows), [-np.inf, -0.7, 0.7, np.inf], labels=["low", "mid", "top"])
    return pd.DataFrame({
        "number": cause + rng.normal(size=rows),
        "text": [str(name).upper() for name in level],
        "level": level,
        "flag": cause > 0,
        "count": pd.array(np.round(5 * cause).astype(int), dtype="Int64"),
        "whole": np.round(3 * cause).astype(np.int32),
        "date": pd.Timestamp("2020-01-01") + pd.to_timedelta(np.round(100 * cause), unit="D"),
        "last": rng.normal(size=rows) + cause,
    }, index=[f"r{i}" for i in range(rows)])


# ---------------------------------------------------------------- shape, kind, determinism

@quick
@given(frames(), names, rates, seeds)
def test_shape_kind_and_old_holes(frame, name, rate, seed):
    before = frame.copy(deep=True)
    observed = MECHANISMS[name](frame, rate, random_state=seed)
    assert isinstance(observed, pd.DataFrame) and observed.shape == frame.shape
    assert observed.index.equals(frame.index) and observed.columns.equals(frame.columns)
    assert all(dtype == np.bool_ for dtype in observed.dtypes)
    assert not (observed.to_numpy() & frame.isna().to_numpy()).any()  # what was missing stays missing
    pd.testing.assert_frame_equal(frame, before)
    assert observed.equals(MECHANISMS[name](frame, rate, random_state=seed))


@quick
@given(st.integers(0, 20), st.integers(2, 6), names, rates, seeds)
def test_arrays_give_arrays(rows, width, name, rate, seed):
    x = np.random.default_rng(seed).normal(size=(rows, width))
    observed = MECHANISMS[name](x, rate, random_state=seed)
    assert isinstance(observed, np.ndarray) and observed.dtype == bool and observed.shape == x.shape
    assert (observed == MECHANISMS[name](pd.DataFrame(x), rate, random_state=seed).to_numpy()).all()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_random_states(name):
    x, mechanism = table(), MECHANISMS[name]
    assert not mechanism(x, 0.5, random_state=1).equals(mechanism(x, 0.5, random_state=2))
    for make in (np.random.default_rng, np.random.RandomState):
        assert mechanism(x, 0.5, random_state=make(3)).equals(mechanism(x, 0.5, random_state=make(3)))
    with pytest.raises((ValueError, TypeError)):
        mechanism(x, 0.5, random_state=-1)


def test_the_seed_of_the_data_is_no_trap():
    for seed in range(5):
        x = np.random.default_rng(seed).random((4000, 2))
        assert abs(x[mcar(x, 0.5, random_state=seed)].mean() - 0.5) < 0.03


# ---------------------------------------------------------------- rate

def check_rate(X, columns):
    "Expected rates exactly, drawn rates within five standard errors, other columns untouched."
    places = [list(X.columns).index(c) for c in columns]
    others = [k for k in range(X.shape[1]) if k not in places]
    for name, rate, strength in itertools.product(STOCHASTIC, (0.05, 0.3, 0.8), (-3.0, 1.0, 6.0)):
        p = missing_probabilities(X, name, rate, columns=columns, strength=strength)
        assert np.abs(p[:, places].mean(axis=0) - rate).max() < 1e-6
        assert not p[:, others].any()
        extra = {} if name == "mcar" else {"strength": strength}
        observed = MECHANISMS[name](X, rate, columns=columns, random_state=0, **extra).to_numpy()
        assert observed[:, others].all()
        cells = len(X) * len(places)
        assert abs((~observed[:, places]).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / cells)


def test_rate():
    check_rate(table(), ["text", "level", "last"])


@quick
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_intercept(score, rate):
    score = np.array(score)
    a = calibrated_intercept(score, rate)
    assert abs(expit(a + score).mean() - rate) < 1e-6
    if 1e-6 < rate < 1 - 1e-6:
        assert expit(a - 0.1 + score).mean() < expit(a + 0.1 + score).mean()


@quick
@given(frames(min_rows=1), st.sampled_from(STOCHASTIC), st.floats(0.01, 0.99), st.floats(-20, 20))
def test_rate_on_any_table(frame, name, rate, strength):
    p, present = missing_probabilities(frame, name, rate, strength=strength), frame.notna().to_numpy()
    assert ((p >= 0) & (p <= 1)).all() and not p[~present].any()
    for k in np.flatnonzero(p.any(axis=0)):
        assert abs(p[present[:, k], k].mean() - rate) < 1e-6


@quick
@given(frames(), names)
def test_rate_zero_and_one(frame, name):
    present = frame.notna()
    assert MECHANISMS[name](frame, 0).equals(present)
    columns = [frame.shape[1] - 1]
    if isinstance(frame.columns[-1], str) and columns[0] not in list(frame.columns):
        hidden = MECHANISMS[name](frame, 1, columns=columns).to_numpy()
        assert not hidden[:, -1].any() and (hidden[:, :-1] == present.to_numpy()[:, :-1]).all()


@quick
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), rates, st.sampled_from(["above", "below"]))
def test_censoring_is_a_threshold(values, rate, side):
    x = np.array(values, dtype=float)[:, None]
    observed = censoring(x, rate, side=side)[:, 0]
    if 0 < observed.sum() < len(x):
        kept, hidden = x[observed], x[~observed]
        assert (kept.max() < hidden.min()) if side == "above" else (kept.min() > hidden.max())
    assert (~observed).sum() <= rate * len(x) + 1e-6
    if len(set(values)) == len(values):
        assert (~observed).sum() == int(np.floor(rate * len(x) + 1e-9))


# ---------------------------------------------------------------- what a mechanism may look at

def check_no_peek(mechanism="mar"):
    "MAR: the hidden columns' values must not move a probability. MNAR ones must move some."
    X, columns = table(), ["text", "count", "last"]
    junk, rng = X.copy(), np.random.default_rng(9)
    junk["last"], junk["text"] = rng.normal(size=len(X)) ** 5, rng.permutation(X["text"].to_numpy())
    junk["count"] = pd.array(rng.integers(-9, 9, len(X)), dtype="Int64")
    before = missing_probabilities(X, mechanism, 0.3, columns=columns, strength=2.0)
    assert (before == missing_probabilities(junk, mechanism, 0.3, columns=columns, strength=2.0)).all()
    assert mar(X, 0.3, columns=columns, random_state=0).equals(mar(junk, 0.3, columns=columns, random_state=0))


def check_direction():
    "A positive strength hides high values: what is left lies below the truth; a negative one above."
    X = table(4000)
    for mechanism, columns in ((mar, ["last"]), (mnar, ["last"]), (self_masking, ["last"])):
        for strength in (2.0, -2.0):
            observed = mechanism(X, 0.4, columns=columns, strength=strength, random_state=0)["last"]
            gap = X.loc[observed, "last"].mean() - X["last"].mean()
            assert gap * strength < 0 and abs(gap) > 0.1
    assert X.loc[censoring(X, 0.3, columns="last")["last"], "last"].max() <= X["last"].quantile(0.71)


def test_no_peek():
    check_no_peek()
    for mechanism in ("mnar", "self_masking"):
        with pytest.raises(AssertionError):
            check_no_peek(mechanism)


def test_direction():
    check_direction()


def test_strings_enter_by_sorted_level_categories_by_declared_order():
    X = pd.DataFrame({"text": ["b", "a", "c"] * 50, "other": range(150)})
    p = missing_probabilities(X, "self_masking", 0.4, columns="text", strength=2)[:3, 0]
    assert p[1] < p[0] < p[2]
    X["text"] = pd.Categorical(X["text"], categories=["c", "b", "a"])
    p = missing_probabilities(X, "self_masking", 0.4, columns="text", strength=2)[:3, 0]
    assert p[2] < p[0] < p[1]


def test_emflow():
    x = np.random.default_rng(0).normal(size=(500, 10))
    scaled = (x - x.min(axis=0)) / (x.max(axis=0) - x.min(axis=0))
    p = missing_probabilities(x, "emflow", None)
    assert np.allclose(p[:, 7:], expit(scaled[:, :7].sum(axis=1))[:, None]) and not p[:, :7].any()
    assert emflow_mar(x, random_state=0)[:, :7].all() and (p[:, 7:] >= 0.5).all()
    assert abs(missing_probabilities(x, "emflow", 0.26)[:, 7:].mean() - 0.26) < 1e-6
    assert missing_probabilities(np.ones((2, 90)), "emflow", 0.3)[0].nonzero()[0][0] == 63  # not 62


# ---------------------------------------------------------------- hide

@quick
@given(frames(), st.data())
def test_hide_keeps_what_is_seen(frame, data):
    before = frame.copy(deep=True)
    cells = data.draw(st.lists(st.booleans(), min_size=frame.size, max_size=frame.size))
    observed = np.array(cells, dtype=bool).reshape(frame.shape)
    hidden = hide(frame, observed)
    pd.testing.assert_frame_equal(frame, before)  # the input is not touched
    assert hidden.index.equals(frame.index) and hidden.columns.equals(frame.columns)
    assert (hidden.notna().to_numpy() == (observed & frame.notna().to_numpy())).all()
    for k in range(frame.shape[1]):
        old, new, seen = frame.iloc[:, k], hidden.iloc[:, k], observed[:, k]
        plain = isinstance(old.dtype, np.dtype) and old.dtype.kind in "iub"
        if seen.all() or not plain:
            assert new.dtype == old.dtype
        else:
            assert new.dtype.name.lower() == {"bool": "boolean"}.get(old.dtype.name, old.dtype.name)
        for a, b in zip(old[seen].tolist(), new[seen].tolist(), strict=True):
            assert (pd.isna(a) and pd.isna(b)) or a == b


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "bool", "datetime64[s]", "<U3", "object"])
def test_hide_arrays(dtype):
    x = np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype)
    observed = np.array([[True, False], [True, True], [False, True]])
    hidden = hide(x, observed)
    assert (pd.isna(pd.DataFrame(hidden)).to_numpy() == ~observed).all() and (hidden[observed] == x[observed]).all()
    assert hidden.dtype == (np.dtype(dtype) if np.dtype(dtype).kind in "fMO" else object if dtype == "<U3" else float)
    assert hide(x, np.ones_like(observed)).dtype == x.dtype


def test_hide_complains():
    X, ok = table(10), np.ones((10, 8), dtype=bool)
    for observed in (ok[:, :2], ok.astype(int), pd.DataFrame(ok)):
        with pytest.raises((ValueError, TypeError)):
            hide(X, observed)
    for large in (2**60 + 1, 2**53 + 1, -(2**53) - 1):  # the nearest float of 2**53 + 1 is 2**53
        with pytest.raises(ValueError, match="2\\*\\*53"):
            hide(np.array([[large, 1]]), np.array([[True, False]]))
    assert hide(np.array([[2**53 - 1, 1]]), np.array([[True, False]]))[0, 0] == 2**53 - 1


@pytest.mark.skipif(not hasattr(np, "dtypes") or not hasattr(np.dtypes, "StringDType"), reason="needs NumPy 2")
def test_hide_text_of_variable_width():
    hidden = hide(np.array([["a"], ["b"]], dtype=np.dtypes.StringDType()), np.array([[True], [False]]))
    assert hidden.tolist() == [["a"], [None]]  # not the word "nan"


# ---------------------------------------------------------------- at the door

@pytest.mark.parametrize("call, word", [
    (lambda X: mcar(X, 30), "0.3 for 30%"),
    (lambda X: mcar(X, float("nan")), "from 0 to 1"),
    (lambda X: mcar(X, True), "rate"),
    (lambda X: mcar(X, 0.3, columns="nmuber"), "'nmuber'"),
    (lambda X: mcar(X, 0.3, columns=99), "99"),
    (lambda X: mcar(X, 0.3, columns=[True, False]), "True"),
    (lambda X: mcar(X, 0.3, columns=np.array([True, False])), "True"),
    (lambda X: mar(X, 0.3, strength="high"), "'high'"),
    (lambda X: self_masking(X.assign(text=[[1]] * 60), 0.3), "'text'"),
    (lambda X: mar(X, 0.3, columns=list(X)), "leave at least one"),
    (lambda X: mar(X[["number"]], 0.3), "leave at least one"),
    (lambda X: mnar(X.assign(number=np.inf), 0.3), "'number'"),
    (lambda X: mnar(X, 0.3, strength=float("inf")), "strength"),
    (lambda X: censoring(X, 0.3, side="left"), "side"),
    (lambda X: missing_probabilities(X, "nmar", 0.3), "mechanism"),
    (lambda X: missing_probabilities(X, "mar", None), "rate"),
    (lambda X: mcar(np.zeros(3), 0.3), "two dimensions"),
    (lambda X: little_mcar_test(X), "'text'"),
    (lambda X: little_mcar_test(X[["number"]].assign(flat=1.0)), "'flat'"),
    (lambda X: little_mcar_test(hide(X[["number"]].assign(copy=X["number"], last=X["last"]),
                                     mcar(X[["number", "last", "flag"]], 0.1, random_state=0).to_numpy())), "singular"),
])
def test_errors_name_the_remedy(call, word):
    with pytest.raises((ValueError, TypeError)) as error:
        call(table(60))
    assert word in str(error.value)


def test_columns_by_name_position_and_integer_label():
    X = pd.DataFrame(np.zeros((50, 3)), columns=[2, "b", 0])
    assert (~mcar(X, 1, columns=[0]).to_numpy()).all(axis=0).tolist() == [False, False, True]  # the label wins
    assert (~mcar(X, 1, columns=[1]).to_numpy()).all(axis=0).tolist() == [False, True, False]  # no label: the position
    assert mcar(X, 1, columns=[]).all(axis=None)
    days = pd.DataFrame(np.zeros((50, 2)), columns=pd.to_datetime(["2020-01-01", "2021-01-01"]))
    assert mcar(days, 1, columns=days.columns[1]).all(axis=0).tolist() == [True, False]  # one label, of any kind
    assert mcar(days.set_axis([0.5, 1.5], axis=1), 1, columns=1.5).all(axis=0).tolist() == [True, False]


# ---------------------------------------------------------------- Little's test

def little_by_search(x):
    "The statistic at the maximum that a general optimiser finds on an explicit sum over rows: no EM, no patterns."
    n, p = x.shape
    rows = [(np.flatnonzero(~np.isnan(row)), row[~np.isnan(row)]) for row in x]
    lower = np.tril_indices(p)

    def unpack(theta):
        factor = np.zeros((p, p))
        factor[lower] = theta[p:]
        return theta[:p], factor @ factor.T

    def loss(theta):
        mean, cov = unpack(theta)
        gaps = [(v - mean[o], cov[np.ix_(o, o)]) for o, v in rows]
        return sum(np.linalg.slogdet(block)[1] + gap @ np.linalg.solve(block, gap) for gap, block in gaps)

    start = np.concatenate([np.nanmean(x, axis=0), np.diag(np.nanstd(x, axis=0))[lower]])
    mean, cov = unpack(minimize(loss, start, method="BFGS", options={"gtol": 1e-4}).x)
    statistic = 0.0
    for o in {tuple(o) for o, _ in rows}:
        group = np.array([v for other, v in rows if tuple(other) == o])
        gap = group.mean(axis=0) - mean[list(o)]
        statistic += len(group) * gap @ np.linalg.solve(cov[np.ix_(o, o)] * n / (n - 1), gap)
    return statistic


def check_little():
    "Against a closed form and a search; unchanged by units and by the order of rows and columns."
    x = np.random.default_rng(1).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=150)
    x = hide(x, mar(x, 0.4, columns=1, strength=1, random_state=1))
    r = np.corrcoef(x[:, 0], np.isnan(x[:, 1]))[0, 1]
    result = little_mcar_test(x)
    assert result.dof == 1 and abs(result.statistic - 149 * r**2) < 1e-6
    rng = np.random.default_rng(2)
    y = rng.multivariate_normal(np.zeros(3), np.full((3, 3), 0.5) + 0.5 * np.eye(3), size=150)
    y = hide(y, mcar(y, 0.2, random_state=2))
    y = y[~np.isnan(y).all(axis=1)]
    base = little_mcar_test(y)
    assert abs(base.statistic - little_by_search(y)) < 1e-3
    other = little_mcar_test(pd.DataFrame(y[rng.permutation(len(y))][:, [2, 0, 1]] * [10.0, -1, 3] + 5))
    assert abs(base.statistic - other.statistic) < 1e-6 and base.dof == other.dof == 9


def test_little():
    check_little()
    empty_rows = np.vstack([np.full((5, 3), np.nan), table(80)[["number", "last", "count"]].to_numpy(float)])
    assert np.isnan(little_mcar_test(empty_rows).p_value) and little_mcar_test(empty_rows).dof == 0


# ---------------------------------------------------------------- mutations

def _flipped_draw(X, mechanism, rate, columns, strength, random_state):
    "observed and hidden exchanged."
    p = missing_probabilities(X, mechanism, rate, columns=columns, strength=strength)
    hidden = mechanisms._generator(random_state).random(p.shape) < p
    return mechanisms._like(X, mechanisms._present(mechanisms._as_frame(X)) & hidden)


def _em_without_gap(groups, mean, covariance):
    "An M-step that forgets how far a pattern's mean lies from the current one."
    new_mean, _ = mechanisms_em_round(groups, mean, covariance)
    still = type(groups)(groups.seen, groups.rows, mean * groups.seen, groups.scatter)
    return new_mean, mechanisms_em_round(still, mean, covariance)[1]


mechanisms_em_round = mechanisms._em_round


def _no_em(groups, tol=1e-9, max_rounds=5000):
    "The moments of what is seen, column by column, in place of the maximum."
    return np.zeros(groups.seen.shape[1]), np.eye(groups.seen.shape[1])


@pytest.mark.parametrize("mutate, check, caught", [
    (lambda m: m.setattr(mechanisms, "_draw", _flipped_draw), lambda: check_rate(table(), ["text", "last"]), None),
    (lambda m: m.setattr(mechanisms, "_draw", _flipped_draw), check_direction, None),
    (lambda m: m.setattr(mechanisms, "calibrated_intercept", lambda score, rate: 0.0),
     lambda: check_rate(table(), ["text", "last"]), None),
    (lambda m: m.setitem(mechanisms._SCORES, "mar", mechanisms._mnar_score), check_no_peek, None),
    (lambda m: m.setitem(mechanisms._SCORES, "mar", mechanisms._self_score), check_no_peek, None),
    (lambda m: m.setattr(mechanisms, "_sum_score", lambda f, looked_at: np.zeros((len(f), 1))), check_direction, None),
    (lambda m: m.setattr(mechanisms, "_standardised", lambda v, s=mechanisms._standardised: -s(v)),
     check_direction, None),
    (lambda m: m.setattr(mechanisms, "_em_round", _em_without_gap), check_little, "no maximum"),
    (lambda m: m.setattr(mechanisms, "_precisions", lambda c, s, p=mechanisms._precisions: p(np.diag(np.diag(c)), s)),
     check_little, "no maximum"),
    (lambda m: m.setattr(mechanisms, "_gaussian_em", _no_em), check_little, None),
], ids=["flipped rate", "flipped sign", "no intercept", "mar sees the row", "mar sees itself", "no score",
        "negated score", "M-step without gap", "covariances dropped", "no EM"])
def test_mutations_are_caught(monkeypatch, mutate, check, caught):
    "caught: the package's own complaint; None where an assertion of the check must fail."
    check()  # sound as it is …
    mutate(monkeypatch)
    with pytest.raises(ValueError if caught else AssertionError, match=caught):
        check()  # … and caught when broken
