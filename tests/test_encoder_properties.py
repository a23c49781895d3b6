"For any frame: decoding gives back every observed cell bit for bit, and what is hidden never matters."

import struct
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from missingbook.foundations.data import TableEncoder, infer_kinds

COMMON = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
HUGE = 1e300  # beyond it a range may leave float64, which has an error and a test of its own

finite = st.floats(-HUGE, HUGE) | st.sampled_from([0.0, -0.0, 0.1, 5e-324, 1e-310, 1e16, 1e16 + 2])
words = st.sampled_from(["a", "b", "yes", "no", "", " ", "10/03/2004", "2004-03-10", "1", "0", "é", "NaN?"]) | st.text(
    max_size=4
)
int64 = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([2**53 + 1, -(2**53) - 1, 2**60 + 1, 0, 1])


NONE = st.none()


def column(rows: int, values, holes=NONE):
    return st.lists(st.one_of(values, holes) if holes is not None else values, min_size=rows, max_size=rows)


def series(rows: int):
    "One column of any common type, with holes where its dtype has any."
    build = pd.Series
    constant = st.one_of(finite, words, st.booleans())
    return st.one_of(
        column(rows, finite, st.just(np.nan)).map(lambda v: build(v, dtype="float64")),
        column(rows, st.floats(-(2.0**99), 2.0**99, width=32), st.just(np.nan)).map(
            lambda v: build(v, dtype="float32")
        ),
        column(rows, int64, None).map(lambda v: build(v, dtype="int64")),
        column(rows, st.integers(0, 2**64 - 1), None).map(lambda v: build(v, dtype="uint64")),
        column(rows, st.integers(-128, 127), None).map(lambda v: build(v, dtype="int8")),
        column(rows, int64).map(lambda v: build(pd.array(v, dtype="Int64"))),
        column(rows, finite).map(lambda v: build(pd.array(v, dtype="Float64"))),
        column(rows, st.sampled_from([0, 1]), st.just(np.nan)).map(lambda v: build(v, dtype="float64")),
        column(rows, st.booleans(), None).map(lambda v: build(v, dtype="bool")),
        column(rows, st.booleans()).map(lambda v: build(pd.array(v, dtype="boolean"))),
        column(rows, words).map(lambda v: build(v, dtype="string")),
        column(rows, words, st.sampled_from([None, np.nan, pd.NA])).map(lambda v: build(v, dtype="object")),
        column(rows, words).map(lambda v: build(pd.Categorical(v))),
        column(rows, st.sampled_from(["lo", "mid", "hi"])).map(
            lambda v: build(pd.Categorical(v, ["lo", "mid", "hi", "top"], ordered=True))
        ),
        column(rows, st.sampled_from([1, 2, 7])).map(lambda v: build(pd.Categorical(v, [7, 1, 2]))),
        column(rows, st.datetimes(), st.just(pd.NaT)).map(lambda v: build(pd.to_datetime(v, errors="coerce"))),
        column(rows, st.one_of(int64, finite, st.booleans(), words, st.decimals(-9, 9, places=2))).map(
            lambda v: build(v, dtype="object")
        ),
        column(rows, st.sampled_from([True, False])).map(lambda v: build(v, dtype="object")),
        column(rows, st.decimals(-9, 9, places=2)).map(lambda v: build(v, dtype="object")),
        st.just([None] * rows).map(lambda v: build(v, dtype="object")),
        st.just([np.nan] * rows).map(lambda v: build(v, dtype="float64")),
        constant.map(lambda v: build([v] * rows)),
    )


@st.composite
def frames(draw, min_rows=1):
    rows = draw(st.integers(min_rows, 7))
    names = draw(
        st.lists(
            st.one_of(st.text(max_size=3), st.integers(0, 9), st.sampled_from(["id", "x_id", "name"])),
            min_size=1,
            max_size=5,
            unique_by=str,
        )
    )
    frame = pd.concat([draw(series(rows)).rename(None) for _ in names], axis=1)
    frame.columns = pd.Index(names, dtype=object)
    frame.index = pd.Index(
        draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)), name=draw(st.sampled_from([None, "k"]))
    )
    return frame


def same_cell(a: object, b: object) -> bool:
    "The same type and the same bits."
    if type(a) is not type(b):
        return False
    if isinstance(a, (float, np.floating)):
        return struct.pack("d", a) == struct.pack("d", b)
    return a == b


def assert_kept(back: pd.DataFrame, frame: pd.DataFrame) -> None:
    "Index, columns, dtypes, categories and every observed cell."
    assert type(back) is pd.DataFrame and back.index.equals(frame.index) and back.index.name == frame.index.name
    assert back.columns.equals(frame.columns) and back.columns.dtype == frame.columns.dtype
    for j in range(frame.shape[1]):
        before, after = frame.iloc[:, j], back.iloc[:, j]
        assert after.dtype == before.dtype, (before.dtype, after.dtype)
        if isinstance(before.dtype, pd.CategoricalDtype):
            assert list(after.cat.categories) == list(before.cat.categories) and after.cat.ordered == before.cat.ordered
        seen = before.notna().to_numpy()
        assert all(same_cell(a, b) for a, b in zip(before[seen], after[seen], strict=True))


def fitted(frame: pd.DataFrame, **options) -> TableEncoder:
    return TableEncoder(**options).fit(frame)


options = st.fixed_dictionaries(
    dict(scale=st.sampled_from(["standard", "minmax", "none"]), one_hot=st.booleans(), round_integers=st.booleans())
)


@COMMON
@given(frames(), options)
@example(pd.DataFrame({"n": pd.array([2**60 + 1, None], dtype="Int64")}), {})
@example(pd.DataFrame({"c": [0.1] * 3}), {})
@example(pd.DataFrame({"c": [1.0, np.nan]}, index=[1, 1]), {"scale": "minmax"})
@example(pd.DataFrame({"c": [None]}), {})
def test_observed_cells_return_bit_for_bit(frame, options):
    encoder = fitted(frame, **options)
    before = frame.copy(deep=True)
    x, observed = encoder.transform(frame)
    assert (
        x.dtype == np.float64 and observed.dtype == bool and x.shape == observed.shape == (len(frame), encoder.width_)
    )
    assert np.isfinite(x).all() and (x[~observed] == 0).all()
    back = encoder.inverse_transform(np.where(observed, np.nan, 0.3), frame)  # x is not even read where observed
    assert_kept(back, frame)
    assert_kept(frame, before)
    encoded = [b.position for b in encoder.blocks_]
    assert not back.iloc[:, encoded].isna().any(axis=None)  # every hole of an encoded column is filled
    rest = [j for j in range(frame.shape[1]) if j not in encoded]
    assert back.iloc[:, rest].isna().equals(frame.iloc[:, rest].isna())  # and no other


@COMMON
@given(frames(), options)
def test_blocks_tile_the_matrix_and_follow_the_observed(frame, options):
    encoder = fitted(frame, **options)
    x, observed = encoder.transform(frame)
    assert [b.start for b in encoder.blocks_] + [encoder.width_] == [0] + [b.stop for b in encoder.blocks_]
    for b in encoder.blocks_:
        seen = frame.iloc[:, b.position].notna().to_numpy()
        assert (observed[:, b.start : b.stop] == seen[:, None]).all()
        if b.kind == "category" and options["one_hot"]:
            assert (x[seen, b.start : b.stop].sum(1) == 1).all() and set(np.unique(x[:, b.start : b.stop])) <= {
                0.0,
                1.0,
            }
        if b.kind == "boolean":
            assert set(np.unique(x[seen, b.start])) <= {0.0, 1.0}
        if b.kind == "number" and options["scale"] == "minmax":
            assert x[seen, b.start].min() >= -1e-9 and x[seen, b.start].max() <= 1 + 1e-9


@COMMON
@given(frames(), st.sampled_from(["standard", "minmax", "none"]))
def test_decoding_inverts_encoding(frame, scale):
    "Levels come back exactly from x alone; numbers to rounding."
    encoder = fitted(frame, scale=scale)
    x, _ = encoder.transform(frame)
    for b in encoder.blocks_:
        column = frame.iloc[:, b.position]
        seen = column.notna().to_numpy()
        if b.kind == "category":
            assert [b.categories[i] for i in x[seen, b.start : b.stop].argmax(1)] == column[seen].tolist()
        elif b.kind == "boolean":
            assert [b.categories[int(v)] for v in x[seen, b.start]] == column[seen].tolist()
        elif b.kind == "number":
            values = np.array([float(v) for v in column[seen]])
            size = np.abs(values).max()
            assert (np.abs(b.offset + b.spread * x[seen, b.start] - values) <= 1e-12 * size + 1e-300).all()


@COMMON
@given(frames(min_rows=2))
def test_a_row_is_encoded_alike_alone_and_in_company(frame):
    encoder = fitted(frame)
    together, seen = encoder.transform(frame)
    for i in range(len(frame)):
        x, observed = encoder.transform(frame.iloc[[i]])
        assert np.array_equal(x[0], together[i]) and np.array_equal(observed[0], seen[i])


@COMMON
@given(frames(), st.data())
def test_infinities_name_their_column(frame, draw):
    numeric = [
        c
        for c, k in infer_kinds(frame).items()
        if k == "number" and frame[c].dtype == "float64" and frame[c].notna().any()
    ]
    assume(numeric)
    column = draw.draw(st.sampled_from(numeric))
    row = draw.draw(st.integers(0, len(frame) - 1))
    bad = frame.copy()
    bad.iloc[row, list(frame.columns).index(column)] = draw.draw(st.sampled_from([np.inf, -np.inf]))
    kinds = infer_kinds(frame)
    with pytest.raises(ValueError, match="infinite") as error:
        TableEncoder(kinds).fit(bad)
    assert repr(column) in str(error.value) and f"row {row}" in str(error.value)
    with pytest.raises(ValueError, match="infinite"):
        TableEncoder(kinds).fit(frame).transform(bad)


@COMMON
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(["float32", "float64"]), st.data())
def test_arrays_return_bit_for_bit(rows, columns, dtype, draw):
    cells = draw.draw(
        st.lists(
            st.floats(-(2.0**99), 2.0**99, width=32) | st.just(float("nan")),
            min_size=rows * columns,
            max_size=rows * columns,
        )
    )
    X = np.array(cells, dtype=dtype).reshape(rows, columns)
    kept = X.copy()
    encoder = TableEncoder().fit(X)
    x, observed = encoder.transform(X)
    back = encoder.inverse_transform(np.where(observed, np.nan, 0.3), X)
    seen = ~np.isnan(X)
    assert back.dtype == X.dtype and back[seen].tobytes() == X[seen].tobytes() and X.tobytes() == kept.tobytes()
    empty = ~seen.any(0)
    assert np.isnan(back[:, empty]).all() and not np.isnan(back[:, ~empty]).any()


def test_a_broken_round_trip_is_noticed(monkeypatch):
    "The mutation: decode every cell instead of copying the observed ones. The property above must see it."
    frame = pd.DataFrame({"a": [0.1, 0.2, 0.7, np.nan, 1e16 + 2]})
    encoder = TableEncoder().fit(frame)
    x, _ = encoder.transform(frame)
    block = encoder.blocks_[0]
    decoded = pd.DataFrame({"a": block.offset + block.spread * x[:, 0]})
    with pytest.raises(AssertionError):
        assert_kept(decoded, frame)


def test_decimals_and_mixed_numbers():
    frame = pd.DataFrame(
        {
            "d": pd.Series([Decimal("1.10"), None, Decimal("2.20")], dtype=object),
            "m": pd.Series([1, 2.5, None], dtype=object),
        }
    )
    encoder = TableEncoder(scale="none").fit(frame)
    back = encoder.inverse_transform(np.full((3, 2), 1.65), frame)
    assert back["d"].tolist() == [Decimal("1.10"), 1.65, Decimal("2.20")] and back["m"].tolist() == [1, 2.5, 1.65]
