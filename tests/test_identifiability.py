"""Identifiability: exact algebra on small spaces, each check with the mutation that it must catch."""

import itertools
from fractions import Fraction as F

import numpy as np
import pytest
import sympy
from conftest import copy_of, refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from missingbook.gans import identifiability

BITS = (0, 1)
APART = {(1, 0): F(1, 2), (0, 1): F(1, 2)}  # two bits, never seen together
PAIRS = {(1, 1, 0): F(1, 3), (1, 0, 1): F(1, 3), (0, 1, 1): F(1, 3)}
CHAIN = {(1, 1, 0): F(1, 4), (0, 1, 1): F(3, 4)}
SPACES = [(BITS, 2), (BITS, 3), (("a", "b", "c"), 2)]


def mutant_fails(check, *edits):
    """The check holds for the module, and fails for a copy with these edits."""
    check(identifiability)
    mutant = copy_of(identifiability, *edits)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check(mutant)


def share(weights):
    """Whole numbers as fractions that sum to 1."""
    return [F(w, sum(weights)) for w in weights]


@st.composite
def worlds(draw, signed=False, spaces=SPACES):
    """(q, values, x): x a distribution with zeros, or any vector; q may hold masks of probability 0."""
    values, n = draw(st.sampled_from(spaces))
    every = list(itertools.product(BITS, repeat=n))
    masks = draw(st.lists(st.sampled_from(every), min_size=1, max_size=5, unique=True))
    weights = draw(st.lists(st.integers(0, 5), min_size=len(masks), max_size=len(masks)).filter(any))
    size = len(values) ** n
    entries = st.integers(-4, 4) if signed else st.sampled_from([0, 0, 1, 2, 5])
    x = draw(st.lists(entries, min_size=size, max_size=size).filter(lambda x: signed or any(x)))
    return dict(zip(masks, share(weights))), values, [F(a) for a in x] if signed else share(x)


def size_of(q):
    return len(next(iter(q)))


# --- oracles, written another way ---------------------------------------------------------------------------


def masked_by_hand(x, q, values, tau, entries):
    """Equation 13: push each row through each mask."""
    n = size_of(q)
    y = dict.fromkeys(itertools.product(entries, repeat=n), F(0))
    for row, weight in zip(itertools.product(values, repeat=n), x):
        for mask, probability in q.items():
            y[tuple(row[j] if mask[j] == 1 else tau for j in range(n))] += weight * probability
    return list(y.values())


def marginals_by_hand(x, q, values):
    """Sums of x, one class of rows at a time, by looking each of its members up."""
    n, result = size_of(q), {}
    rows = dict(zip(itertools.product(values, repeat=n), x))
    for mask in (m for m, probability in q.items() if probability):
        at = [j for j in range(n) if mask[j]]
        for part in itertools.product(values, repeat=len(at)):
            result[mask, part] = sum(w for row, w in rows.items() if all(row[j] == v for j, v in zip(at, part)))
    return result


def vertices(matrix, y):
    """The corners of {p ≥ 0: matrix · p = y}, exactly: solutions on independent columns, found through null spaces."""
    found, width = set(), len(matrix[0])
    for size in range(1, width + 1):
        for at in itertools.combinations(range(width), size):
            basis = identifiability.null_space([[*(row[j] for j in at), -b] for row, b in zip(matrix, y)])
            if len(basis) == 1 and basis[0][-1] != 0:
                p = [F(0)] * width
                for j, a in zip(at, basis[0]):
                    p[j] = a / basis[0][-1]
                if min(p) >= 0:
                    found.add(tuple(p))
    return found


# --- the matrix ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(worlds(signed=True), st.integers(0, 3))
def test_matrix_and_marginals_agree_with_enumeration(world, which):
    q, values, x = world
    entries = values if which < len(values) else (*values, None)
    tau = entries[min(which, len(entries) - 1)]
    y = masked_by_hand(x, q, values, tau, entries)
    assert identifiability.apply(identifiability.transition_matrix(q, values, tau), x) == y
    found = identifiability.marginals(x, q, values)
    assert found == marginals_by_hand(x, q, values)
    assert identifiability.apply(identifiability.marginal_matrix(q, values), x) == list(found.values())
    assert identifiability.masked_from_marginals(found, q, values, tau) == y  # proposition 1
    assert identifiability.marginals_from_masked(y, q, values, tau) == found  # proposition 2


@settings(max_examples=40, deadline=None)
@given(worlds())
def test_theorem_1_corollaries_and_the_dimension(world):
    q, values, p = world
    spaces = []
    for tau in (*values, None):
        matrix = identifiability.transition_matrix(q, values, tau)
        assert all(sum(column) == 1 and min(column) >= 0 for column in zip(*matrix))
        spaces.append(identifiability.null_space(matrix))
    assert all(space == spaces[0] for space in spaces)  # theorem 1; the last one is corollary 2
    assert spaces[0] == identifiability.null_space(identifiability.marginal_matrix(q, values))
    assert len(spaces[0]) == identifiability.null_dimension(q, len(values))
    assert all(sum(v) == 0 for v in spaces[0])
    everything = (1,) * size_of(q)
    assert q.get(everything, 0) == 0 or spaces[0] == []
    verdicts = {identifiability.is_uniquely_recoverable(p, identifiability.transition_matrix(q, values, tau))
                for tau in (*values, None)}
    assert len(verdicts) == 1  # corollary 1


def test_extended_space_of_appendix_b():
    """All fillings share a null space there, too; it is larger, and its part on complete rows is the old one."""
    for q in (APART, PAIRS, {(1, 1): F(1, 3), (0, 1): F(2, 3)}):
        large = (*BITS, "ψ")
        spaces = [identifiability.null_space(identifiability.transition_matrix(q, large, tau)) for tau in large]
        assert spaces[0] == spaces[1] == spaces[2]
        old = identifiability.null_space(identifiability.transition_matrix(q, BITS, 0))
        assert len(spaces[0]) == identifiability.null_dimension(q, 3) >= len(old)
        rows = identifiability.states(large, size_of(q))
        matrix = identifiability.transition_matrix(q, large, "ψ")
        inside = [i for i, row in enumerate(rows) if "ψ" not in row]
        assert identifiability.null_space([[line[i] for i in inside] for line in matrix]) == old


def check_masking(module):
    q = {(1, 0): F(1, 2), (1, 1): F(1, 3), (0, 0): F(1, 6)}
    for tau, entries in ((0, BITS), (None, (*BITS, None))):
        x = [F(3), F(-1), F(2), F(7)]
        assert module.apply(module.transition_matrix(q, BITS, tau), x) == masked_by_hand(x, q, BITS, tau, entries)


@pytest.mark.parametrize("edit", [
    ("masked = tuple(value if o else tau", "masked = tuple(tau if o else value"),
    ("matrix[where[masked]][j] += share", "matrix[where[masked]][j] = share"),
    ("if a and b), Fraction(0)) for row in rows]", "if a and b), Fraction(0)) for row in zip(*rows)]"),
])
def test_masking(edit):
    mutant_fails(check_masking, edit)


def check_null_space(module):
    """SymPy's symbolic null space, which is another implementation, spans the same; equal spaces give equal lists."""
    wide, full = [[F(1, 3), F(2), F(0), F(-1)], [F(2, 3), F(4), F(1), F(5)]], [[F(1), F(0)], [F(1), F(1)]]
    third = sympy.Rational(1, 3)  # a Rational that is no Fraction
    assert module.null_space([[third, 1]]) == [[F(-3), F(1)]]
    for matrix in (wide, [[F(0), F(3)]], [[F(3), F(2)]], full):
        found = module.null_space(matrix)
        symbolic = sympy.Matrix([[sympy.Rational(str(a)) for a in row] for row in matrix])
        expected = [list(v) for v in symbolic.nullspace()]
        assert len(found) == len(expected) and all(isinstance(a, F) for v in found for a in v)
        assert all(not any(module.apply(matrix, v)) for v in found)
        both = sympy.Matrix([[sympy.Rational(str(a)) for a in v] for v in [*found, *expected]] or [[0]])
        assert both.rank() == len(found)
        scaled = [[5 * a for a in row] for row in reversed(matrix)] + [[sum(column) for column in zip(*matrix)]]
        assert module.null_space(scaled) == found
        assert all(next(a for a in reversed(v) if a) == 1 for v in found)


@pytest.mark.parametrize("edit", [
    ("Fraction(int(entry.numerator), int(entry.denominator))", "Fraction(int(entry.numerator), 1)"),
    ("Fraction(int(a.numerator), int(a.denominator))", "Fraction(int(a.numerator))"),
    ("QQ(entry.numerator, entry.denominator)", "QQ(entry.numerator, 1)"),
])
def test_null_space(edit):
    mutant_fails(check_null_space, edit)


# --- propositions 1 and 2 -----------------------------------------------------------------------------------


def check_induction(module):
    """Masks whose classes overlap in the masked rows, with unequal probabilities, and a vector of both signs."""
    q = {(1, 1, 0): F(1, 2), (0, 1, 1): F(1, 3), (1, 0, 0): F(1, 6), (0, 0, 1): F(0)}
    x = [F(a, 7) for a in (3, -1, 4, 1, -5, 9, 2, 6)]
    for tau in BITS:
        y = masked_by_hand(x, q, BITS, tau, BITS)
        assert module.masked_from_marginals(marginals_by_hand(x, q, BITS), q, BITS, tau) == y
        assert module.marginals_from_masked(y, q, BITS, tau) == marginals_by_hand(x, q, BITS)


@pytest.mark.parametrize("edit", [
    ("if all(seen or value == tau", "if all(seen or value != tau"),
    ("tuple(min(bits) for bits in zip(*masks))", "tuple(max(bits) for bits in zip(*masks))"),
    ("total - rest[o]", "total + rest[o]"),
    ("sum(q[o] * rest[o] for o in masks)", "sum(rest[o] for o in masks)"),
    ("/ Fraction(sum(q[o] for o in masks))", "/ 1"),
    ("key=lambda item: len(item[1]))", "key=lambda item: -len(item[1]))"),
    ("if o and not c else (value,)", "if o else (value,)"),
    ("parts = [[q[o] * masses", "parts = [[masses"),
    ("return [observed for observed, share in q.items() if share > 0]", "return list(q)"),
])
def test_induction(edit):
    mutant_fails(check_induction, edit)


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_the_inclusion_is_strict(world):
    """Every row that equation 17 asks for fits strictly fewer masks, and the mask it is asked for is among them."""
    q, values, _ = world
    for tau in values:
        for row in identifiability.states(values, size_of(q)):
            fits = identifiability.consistent(row, q, tau)
            common = tuple(min(bits) for bits in zip(*fits))
            for observed in fits:
                for other in identifiability._siblings(row, observed, common, values):
                    now = identifiability.consistent(other, q, tau)
                    assert observed in now and set(now) < set(fits)


def check_dimension(module):
    four = list(itertools.product(BITS, repeat=4))
    for k, expected in ((0, 15), (1, 11), (2, 5), (3, 1), (4, 0)):
        masks = [m for m in four if sum(m) == k]
        assert module.null_dimension({m: F(1, len(masks)) for m in masks}, 2) == expected
    assert module.null_dimension(APART, 3) == 4 and module.null_dimension({(1, 0): F(1), (1, 1): F(0)}, 2) == 2


@pytest.mark.parametrize("edit", [
    ("if all(subset & ~mask for mask in seen)", "if any(subset & ~mask for mask in seen)"),
    ("sum((n_values - 1) ** subset.bit_count() for", "sum(n_values ** subset.bit_count() for"),
    ("sum(int(o) << j for j, o in enumerate(observed))", "sum(int(o) for j, o in enumerate(observed))"),
])
def test_dimension(edit):
    mutant_fails(check_dimension, edit)


def check_kinds_of_integers(module):
    """Integers of NumPy have few bits and overflow in silence."""
    with np.errstate(all="ignore"):
        assert module.null_dimension({(1, *[0] * 9): F(1)}, np.int64(10**4)) == 10**40 - 10**4
        assert module.null_dimension({(1, *[0] * 9): F(1)}, np.int8(12)) == 12**10 - 12
        for kind in (np.int8, np.bool_):
            assert module.null_dimension({tuple(np.ones(12, dtype=kind)): F(1)}, 2) == 0


@pytest.mark.parametrize("edit", [
    ("_check_q(q), index(n_values)", "_check_q(q), n_values"),
    ("sum(int(o) << j", "sum(o << j"),
])
def test_kinds_of_integers(edit):
    check_kinds_of_integers(copy_of(identifiability))  # without the shape hook, which wants an int
    with pytest.raises((AssertionError, TypeError, OverflowError)):
        check_kinds_of_integers(copy_of(identifiability, edit))


def test_the_rate_decides_nothing():
    """5% missing and half of all dimensions lost, 99.9% and none; other probabilities of one support change nothing."""
    assert identifiability.null_dimension({(0, *[1] * 19): F(1)}, 2) == 2**19
    assert identifiability.null_dimension(PAIRS, 2) == 1
    assert identifiability.null_dimension({(1, 1, 1): F(1, 1000), (0, 0, 0): F(999, 1000)}, 2) == 0
    other = dict(zip(PAIRS, (F(1, 100), F(1, 100), F(98, 100))))
    spaces = [identifiability.null_space(identifiability.transition_matrix(q, BITS, 1)) for q in (PAIRS, other)]
    assert spaces[0] == spaces[1]


# --- uniqueness and bounds ----------------------------------------------------------------------------------


def unique_cases():
    """(p, matrix, answer by enumeration of corners) for the supports of small worlds."""
    for q in (APART, {(1, 0): F(1)}, {(1, 1): F(1, 9), (0, 0): F(8, 9)}, CHAIN):
        matrix = identifiability.transition_matrix(q, BITS, 0)
        supports = [s for k in range(1, 5) for s in itertools.combinations(range(len(matrix)), k)]
        for support in supports[:: 1 if len(matrix) == 4 else 19]:
            p = [F(j + 1, sum(i + 1 for i in support)) if j in support else F(0) for j in range(len(matrix))]
            yield p, matrix, vertices(matrix, identifiability.apply(matrix, p)) == {tuple(p)}


CASES = list(unique_cases())


def check_unique(module):
    assert {answer for *_, answer in CASES} == {True, False}
    for p, matrix, answer in CASES:
        assert module.is_uniquely_recoverable(p, matrix) == answer


@pytest.mark.parametrize("edit", [
    ("if not basis or not all(any(v) for v in basis):", "if not basis:"),
    ("key=lambda j: p[j] == 0)", "key=lambda j: p[j] > 0)"),
    ("c = -best.ineqlin", "c = best.ineqlin"),
    ("< 0 for v in rest):", "> 0 for v in rest):"),
])
def test_unique(edit):
    check_unique(identifiability)
    mutant = copy_of(identifiability, edit)
    with pytest.raises((AssertionError, ArithmeticError, ValueError)):
        check_unique(mutant)


def check_large_numbers(module):
    """p = (0, 0, 1) is the only solution, since v ∝ (1, −10^−k, …), however small the second entry is."""
    for k in range(1, 31):
        assert module.is_uniquely_recoverable([F(0), F(0), F(1)], [[F(1), F(1), F(1)], [F(1), F(10**k), F(0)]])
        assert not module.is_uniquely_recoverable([F(0), F(0), F(1)], [[F(1), F(1), F(1)], [F(1), F(-(10**k)), F(0)]])


def test_large_numbers():
    check_large_numbers(identifiability)
    mutant = copy_of(identifiability, ("table.shape, table / size[:, None]", "table.shape, table"))
    with pytest.raises((AssertionError, ArithmeticError, ValueError, TypeError)):
        check_large_numbers(mutant)


SIZES = st.sampled_from([0, 0, 1, -1, 2, 10**4, -(10**4), 10**9, -(10**11), 10**13])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(SIZES, min_size=4, max_size=4), min_size=1, max_size=2), st.integers(1, 14))
def test_any_matrix_gets_a_true_answer_or_none(rows, support):
    """Numbers of very different size: what the function says is what the corners say, or it says nothing."""
    matrix = [[F(a) for a in row] for row in [*rows, [1, 1, 1, 1]]]
    p = share([support >> j & 1 for j in range(4)])
    try:
        answer = identifiability.is_uniquely_recoverable(p, matrix)
    except ArithmeticError:
        return
    assert answer == (vertices(matrix, identifiability.apply(matrix, p)) == {tuple(p)})


def check_verification(module):
    """A proposal that does not hold never becomes an answer."""
    matrix = module.transition_matrix(APART, BITS, 0)
    for w, c in ((0, 0), (-1, -1)):
        module._proposals = lambda rest, w=w, c=c: ([F(w)] * len(rest[0]), [F(c)] * len(rest))
        for p in ([F(1, 2), F(0), F(0), F(1, 2)], [F(7, 10), F(0), F(3, 10), F(0)]):
            with pytest.raises(ArithmeticError, match="undecided"):
                assert module.is_uniquely_recoverable(p, matrix) is None


@pytest.mark.parametrize("edit", [
    ("if min(v) >= 0 and any(v):", "if min(v) >= 0:"),
    ("if min(v) >= 0 and any(v):", "if any(v):"),
    ("if min(w, default=1) > 0 and all(", "if all("),
    ("for a, b in zip(v, w)) < 0 for v in rest):", "for a, b in zip(v, w)) < 0 for v in rest) or True:"),
])
def test_verification(edit):
    check_verification(copy_of(identifiability))
    with pytest.raises(AssertionError):
        check_verification(copy_of(identifiability, edit))


@settings(max_examples=25, deadline=None)
@given(worlds(spaces=[(BITS, 2)]))
def test_unique_and_range_agree_with_the_corners(world):
    q, values, p = world
    matrix = identifiability.transition_matrix(q, values, values[0])
    y = identifiability.apply(matrix, p)
    corners = vertices(matrix, y)
    assert identifiability.is_uniquely_recoverable(p, matrix) == (corners == {tuple(p)})
    for weights in ([0, 0, 0, 1], [1, 0, 0, 1], [3, -1, 2, 0]):
        values_there = [float(sum(w * a for w, a in zip(weights, corner))) for corner in corners]
        found = identifiability.recoverable_range(matrix, y, weights)
        assert np.allclose(found, (min(values_there), max(values_there)), atol=1e-8)


@pytest.mark.parametrize("tau", [0, 1, None])
def test_a_tiny_probability_of_seeing_all_is_enough(tau):
    """q(1) > 0, however small: the exact part of the test is not fooled by rounding."""
    q = {(1, 0): F(1, 2), (0, 1): F(1, 2) - F(1, 10**30), (1, 1): F(1, 10**30)}
    assert identifiability.is_uniquely_recoverable([F(1, 4)] * 4, identifiability.transition_matrix(q, BITS, tau))
    matrix = identifiability.marginal_matrix(q, BITS)  # zeros and ones: no mask is lost in a solver's tolerance
    y = identifiability.apply(matrix, [F(1, 4)] * 4)
    assert np.allclose(identifiability.recoverable_range(matrix, y, [0, 0, 0, 1]), (0.25, 0.25), atol=1e-9)
    never = identifiability.transition_matrix(APART, BITS, tau)
    assert not identifiability.is_uniquely_recoverable([F(1, 4)] * 4, never)


def test_necessity_by_construction():
    """Where p is not unique, p + εv is another solution, exactly."""
    p, v = [F(1, 2), F(0), F(0), F(1, 2)], [F(-1), F(1), F(1), F(-1)]
    matrix = identifiability.transition_matrix(APART, BITS, 0)
    other = [a + F(1, 3) * b for a, b in zip(p, v)]
    assert min(other) >= 0 and sum(other) == 1 and not identifiability.is_uniquely_recoverable(p, matrix)
    assert identifiability.apply(matrix, other) == identifiability.apply(matrix, p)


def check_range(module):
    """Bounds of P(11) from two means, with and without slack: Fréchet's, widened."""
    matrix = module.marginal_matrix(APART, BITS)
    for a, b in ((0.3, 0.9), (0.5, 0.5), (0.0, 0.4), (1.0, 0.25)):
        y = [1 - a, a, 1 - b, b]
        assert np.allclose(module.recoverable_range(matrix, y, [0, 0, 0, 1]), (max(0, a + b - 1), min(a, b)), atol=1e-9)
        assert np.allclose(module.recoverable_range(matrix, y, [2, 2, 2, 2]), (2, 2))
        wide = module.recoverable_range(matrix, y, [0, 0, 0, 1], [1.0, 0.1, 0.0, 0.0])  # the first mean is uncertain
        expected = (max(0, max(a - 0.1, 0) + b - 1), min(a + 0.1, 1, b))
        assert np.allclose(wide, expected, atol=1e-9)
        assert np.allclose(module.recoverable_range(matrix, y, [0, 0, 0, 1], 1), (0, 1), atol=1e-9)
        for unit in (1e-300, 1e-9, 1e20):  # the interval is in the unit of the weights
            found = module.recoverable_range(matrix, y, [0, 0, 0, unit])
            assert np.allclose(np.array(found) / unit, (max(0, a + b - 1), min(a, b)), atol=1e-9)


@pytest.mark.parametrize("edit", [
    ('"bounds": (0, None)', '"bounds": (None, None)'),
    ("np.append(b[fixed], 1.0)", "np.append(b[fixed], 2.0)"),
    ("(b + room)[loose], (room - b)[loose]", "(b + room)[loose], (b + room)[loose]"),
    ("for sign in (1, -1)]", "for sign in (1, 1)]"),
    ("linprog(sign * c / size, **limits)", "linprog(sign * c, **limits)"),
    ("np.abs(c).max() or 1.0", "1.0"),
    ("fixed, loose = room == 0, room > 0", "fixed, loose = room == 0, room > 9"),
])
def test_range(edit):
    check_range(identifiability)
    mutant = copy_of(identifiability, edit)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        check_range(mutant)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_range_wants_finite_numbers(bad):
    matrix, y, w = identifiability.marginal_matrix(APART, BITS), [0.3, 0.7, 0.4, 0.6], [0, 0, 0, 1]
    for call in (lambda m: m.recoverable_range(matrix, [bad, *y[1:]], w),
                 lambda m: m.recoverable_range(matrix, y, [bad] * 4),
                 lambda m: m.recoverable_range(matrix, y, w, bad),
                 lambda m: m.recoverable_range(matrix, y, w, [0.1, bad, 0, 0]),
                 lambda m: m.recoverable_range([[bad] * 4] * 4, y, w)):
        refuses(lambda call=call: call(identifiability), ValueError, "NaN or infinity")
    for slack in ([0.1], [0.1, 0.1], [[0.1] * 4]):
        with pytest.raises(ValueError, match="one slack or one a row"):
            copy_of(identifiability).recoverable_range(matrix, y, w, slack)


def test_range_tells_why_the_solver_failed(monkeypatch):
    """Only status 2 means that no distribution fits."""
    failed = identifiability.linprog([1.0], bounds=(None, None))  # unbounded
    monkeypatch.setattr(identifiability, "linprog", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="not solved: .*unbounded"):
        identifiability.recoverable_range([[1.0, 0.0]], [0.5], [1.0, 0.0])


def test_range_of_a_chain():
    """Features that no row shows together are still bound through a third."""
    keep = lambda a, b: F(9, 10) if a == b else F(1, 10)  # noqa: E731
    rows = identifiability.states(BITS, 3)
    p = [F(1, 2) * keep(a, b) * keep(b, c) for a, b, c in rows]
    matrix = identifiability.transition_matrix(CHAIN, BITS, 0)
    same = [int(a == c) for a, _, c in rows]
    assert np.allclose(identifiability.recoverable_range(matrix, identifiability.apply(matrix, p), same), (0.8, 1))


def test_missing_not_at_random_identifies_nothing():
    """One bit, holes marked: two complete worlds, two mechanisms, one masked distribution; MCAR finds a third."""
    worlds = [(F(1, 2), F(1), F(1, 2)), (F(1, 4), F(2, 3), F(1))]  # P(1), and P(seen) for 0 and for 1
    masked = {((1 - one) * s0, one * s1, 1 - (1 - one) * s0 - one * s1) for one, s0, s1 in worlds}
    assert masked == {(F(1, 2), F(1, 4), F(1, 4))}
    q = {(1,): F(3, 4), (0,): F(1, 4)}
    found = identifiability.marginals_from_masked(list(masked.pop()), q, BITS, None)
    assert found[(1,), (1,)] == F(1, 3)


def test_filled_rows_do_not_show_q():
    """One bit, holes filled with 0: two worlds with two q give the same rows. With the holes marked they differ."""
    worlds = (([F(3, 4), F(1, 4)], {(1,): F(1)}), ([F(1, 2), F(1, 2)], {(1,): F(1, 2), (0,): F(1, 2)}))
    filled, marked = ([identifiability.apply(identifiability.transition_matrix(q, BITS, tau), p) for p, q in worlds]
                      for tau in (0, None))
    assert filled[0] == filled[1] == [F(3, 4), F(1, 4)] and marked[0] != marked[1]


def impossible(module):
    """y that no x gives: each must be refused. The last two: marginals of two masks that contradict each other."""
    both = {(1, 1): F(1, 2), (1, 0): F(1, 2)}
    for y, q, tau in (([F(0)] * 3 + [F(1)], APART, 0), ([F(1, 10)] * 4, APART, 0),
                      ([F(1, 4), 0, F(1, 2), 0, 0, 0, F(1, 4), 0, 0], APART, None),
                      ([F(1, 8), F(1, 8), F(1, 8), F(1, 8), F(1, 8), F(3, 8), 0, 0, 0], both, None)):
        try:
            module.marginals_from_masked(y, q, BITS, tau)
        except ValueError as refusal:
            assert "no x gives this y" in str(refusal)
        else:
            raise AssertionError("accepted")


@pytest.mark.parametrize("edit", [
    ("if any(impossible):", "if False:"),
    ("impossible = [given[row] for row, masks in fitting.items() if not masks]", "impossible = []"),
    ("impossible += [mass for key, mass in masses.items() if key not in found]", "impossible += []"),
])
def test_impossible_rows_are_refused(edit):
    mutant_fails(impossible, edit)


@settings(max_examples=25, deadline=None)
@given(worlds(signed=True), st.booleans(), st.integers(0, 100))
def test_accepted_rows_are_those_that_some_x_gives(world, marked, which):
    """One entry of T x is changed: it is accepted if and only if the new one is in the column space of T."""
    q, values, x = world
    tau = None if marked else values[0]
    matrix = identifiability.transition_matrix(q, values, tau)
    y = identifiability.apply(matrix, x)
    y[which % len(y)] += 1
    kernel = identifiability.null_space([[*row, b] for row, b in zip(matrix, y)])
    try:
        identifiability.marginals_from_masked(y, q, values, tau)
        accepted = True
    except ValueError:
        accepted = False
    assert accepted == any(v[-1] for v in kernel)


# --- the door -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "kind", "words"), [
    ({(1, 0): F(1, 2)}, ValueError, "sums to 1/2"),
    ({(1, 0): F(3, 2), (0, 1): F(-1, 2)}, ValueError, "negative"),
    ({(1, 0): F(1, 2), (1,): F(1, 2)}, ValueError, "lengths"),
    ({}, ValueError, "lengths"),
    ({(1, 2): F(1)}, ValueError, "1 .seen. or 0"),
    ({(1, 0): 0.5, (0, 1): 0.5}, TypeError, "Fraction"),
    ({(1.0, 0.0): F(1)}, ValueError, "whole numbers"),
    ({1: F(1)}, TypeError, "dictionary"),
    ([(1, 0)], TypeError, "dictionary"),
    ({(1, 0): np.int64(1)}, TypeError, "Fraction"),
])
def test_q_is_checked(q, kind, words):
    for call in (lambda m: m.transition_matrix(q, BITS, 0), lambda m: m.marginal_matrix(q, BITS),
                 lambda m: m.marginals([F(1, 4)] * 4, q, BITS), lambda m: m.null_dimension(q, 2),
                 lambda m: m.marginals_from_masked([F(1, 4)] * 4, q, BITS, 0)):
        refuses(lambda call=call: call(identifiability), kind, words)
        with pytest.raises(kind, match=words):  # where shapes are not enforced, our own message arrives
            call(copy_of(identifiability))


@pytest.mark.parametrize(("values", "tau", "kind", "words"), [
    ((0, 1, 0), 0, ValueError, "each once"),
    ((), 0, ValueError, "one or more"),
    ((0, 1), [0], TypeError, "cannot be a value"),
    ((0, 1), float("nan"), ValueError, "NaN"),
    ((0, float("nan")), 0, ValueError, "NaN"),
    (tuple(range(32)), 0, ValueError, "1024 states, more than 1000: take fewer features"),
    (tuple(range(31)), None, ValueError, "31 values and the symbol for holes, 2 features: 1024 states"),
])
def test_values_and_tau_are_checked(values, tau, kind, words):
    for call in (lambda m: m.transition_matrix(APART, values, tau),
                 lambda m: m.marginals_from_masked([F(1)], APART, values, tau)):
        with pytest.raises(kind, match=words):
            call(copy_of(identifiability))


def test_lengths_and_distributions_are_checked():
    matrix = identifiability.transition_matrix(APART, BITS, 0)
    one = [F(1), F(0), F(0), F(0)]
    refuses(lambda: identifiability.marginals([F(1)], APART, BITS), ValueError, "4 states")
    refuses(lambda: identifiability.marginals_from_masked(one, APART, BITS, None), ValueError, "9 masked rows")
    refuses(lambda: identifiability.apply(matrix, [F(1)]), ValueError, "1 entries")
    for wrong in ([], [[]], [[F(1), F(1)], [F(1)]]):
        refuses(lambda wrong=wrong: identifiability.null_space(wrong), ValueError, "empty or ragged")
        refuses(lambda wrong=wrong: identifiability.is_uniquely_recoverable([], wrong), ValueError, "empty or ragged")
        refuses(lambda wrong=wrong: identifiability.apply(wrong, [F(1)]), ValueError, "empty or ragged")
    plain = copy_of(identifiability)  # where shapes are not enforced
    for call in (lambda: plain.null_space(np.array([[0.5, 0.5]])), lambda: plain.apply(matrix, [float("nan")] * 4),
                 lambda: plain.marginals([0.25] * 4, APART, BITS), lambda: plain.null_dimension(APART, 2.5),
                 lambda: plain.marginals_from_masked([0.25] * 4, APART, BITS, 0)):
        with pytest.raises(TypeError, match="not exact|integer"):
            call()
    assert plain.null_space(np.array([[1, 1]])) == [[F(-1), F(1)]]
    refuses(lambda: identifiability.consistent((0,), APART, 0), ValueError, "1 entries, the masks 2")
    refuses(lambda: identifiability.consistent((0, 1), {(1, 0): F(3)}, 0), ValueError, "sums to 3")
    refuses(lambda: identifiability.masked_from_marginals({}, APART, BITS, 0), ValueError, "4 marginals are missing")
    extra = {**marginals_by_hand(one, APART, BITS), ((1, 1), (0, 0)): F(1)}
    refuses(lambda: identifiability.masked_from_marginals(extra, APART, BITS, 0), ValueError, "1 marginals")
    refuses(lambda: identifiability.null_dimension(APART, 0), ValueError, "1 or more values")
    refuses(lambda: identifiability.null_dimension({(1,) * 21: F(1)}, 2), ValueError, "at most 20")
    refuses(lambda: identifiability.is_uniquely_recoverable([F(1)], matrix), ValueError, "4 columns")
    below = [F(1), F(1), F(0), F(-1)]
    refuses(lambda: identifiability.is_uniquely_recoverable(below, matrix), ValueError, "minimum -1")
    refuses(lambda: identifiability.is_uniquely_recoverable([0.5, 0.5, 0.0, 0.0], matrix), TypeError, "not exact")
    refuses(lambda: identifiability.recoverable_range(matrix, one, [1.0]), ValueError, "one weight a column")
    refuses(lambda: identifiability.recoverable_range(matrix, one, one, -1.0), ValueError, "negative")
    refuses(lambda: identifiability.recoverable_range(matrix, [0, 0, 0, 1], one), ValueError, "no distribution")
