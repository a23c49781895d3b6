"""Gaussian conditionals: means, draws, densities, sums of covariances against the oracle; bad input; mutations run."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import copy_of, refuses, seed
from hypothesis import given, settings
from hypothesis import strategies as st

from missingbook.gaussian import conditional
from missingbook.gaussian.conditional import (
    Conditional,
    conditional_moments,
    conjugate_gradients,
    find_patterns,
    mean_operator_inverse,
)

METHODS = ("direct", "cg", "auto")
# of a row's error over the size of what it should hold, by precision and method: what the docstring promises, and slack
BOUNDS = {(torch.float32, "direct"): 5e-4, (torch.float32, "cg"): 3e-3, (torch.float64, "direct"): 1e-6,
          (torch.float64, "cg"): 1e-6}


def spectrum(p, kappa=30.0, number=0):
    """A covariance with this condition number and directions at random, and a mean; float64."""
    turn = torch.linalg.qr(torch.randn(p, p, dtype=torch.float64, generator=seed(number)))[0]
    values = torch.logspace(0, math.log10(kappa), p, dtype=torch.float64)
    covariance = (turn * values) @ turn.T
    return torch.randn(p, dtype=torch.float64, generator=seed(number + 1)), (covariance + covariance.T) / 2


def case(n, p, rate=0.4, kappa=30.0, number=0, dtype=torch.float64):
    """(rows, observed, mean, covariance), rows from the Gaussian itself."""
    mean, covariance = spectrum(p, kappa, number)
    z = mean + torch.randn(n, p, dtype=torch.float64, generator=seed(number + 2)) @ torch.linalg.cholesky(covariance).T
    observed = torch.rand(n, p, generator=seed(number + 3)) >= rate
    return z.to(dtype), observed, mean.to(dtype), covariance.to(dtype)


def row_errors(filled, z, observed, mean, covariance):
    """Error in the holes of each row over the size of what they should hold (deviations plus standard deviations)."""
    truth, _ = conditional_moments(z, observed, mean, covariance)
    size = torch.where(observed, 0.0, (truth - mean.double()).abs() + covariance.double().diagonal().sqrt())
    error = torch.where(observed, 0.0, filled.double() - truth)
    return error.norm(dim=1) / size.norm(dim=1).clamp(min=1e-300)


def check_means(module=conditional, method="direct", dtype=torch.float64, bound=None, data=None):
    z, observed, mean, covariance = data or case(40, 12, dtype=dtype)
    filled = module.Conditional(mean, covariance, method).expect(z, observed)
    assert filled.dtype == z.dtype and torch.equal(filled[observed], z[observed])
    assert row_errors(filled, z, observed, mean, covariance).max() < (bound or BOUNDS[dtype, method])


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), p=st.integers(1, 40), rate=st.floats(0, 1), power=st.floats(0, 1),
       number=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.float64]),
       method=st.sampled_from(["direct", "cg"]))
def test_means_against_the_oracle(n, p, rate, power, number, dtype, method):
    """Condition numbers up to 1e4 in float32 and up to 1e8 in float64."""
    kappa = 10 ** (power * (4 if dtype == torch.float32 else 8))
    check_means(method=method, dtype=dtype, data=case(n, p, rate, kappa, number, dtype))


FILLED, DEVIATION = "(self.mean + whole + filled * size)", "_tamed(torch.where(observed, d - whole, 0.0))"
MISSING = "return d + x, torch.linalg.vecdot(d + x, pull), self.log_det + log_det"
MEAN_MUTANTS = {
    "the pull's sign": ("self.precision, patterns, -pull)", "self.precision, patterns, pull)"),
    "blocks of the wrong side": ("patterns._replace(observed=~patterns.observed), d)", "patterns, d)"),
    "padding with features": ("index = torch.where(inside, index[:, :k], p)", "index = index[:, :k]"),
    "half of the triangles": ("return torch.linalg.solve_triangular(factor.mT, half, upper=True)[:, :, 0]",
                              "return half[:, :, 0]"),
    "the mean forgotten": (FILLED, "(whole + filled * size)"),
}


@pytest.mark.parametrize("name", MEAN_MUTANTS)
def test_means_find_mutants(name):
    check_means()
    module = copy_of(conditional, MEAN_MUTANTS[name])
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check_means(module)


def check_group(module=conditional):
    """Many rows a pattern: one call for each pattern."""
    z, _, mean, covariance = case(400, 6)
    observed = (torch.arange(400)[:, None] % 7 != torch.arange(6)) & (torch.arange(400)[:, None] % 3 != torch.arange(6))
    assert max(find_patterns(observed).count) > 10
    check_means(module, data=(z, observed, mean, covariance))


def test_rows_that_share_a_pattern():
    check_group()
    cut = ("side.split(torch.bincount(self.of_row, minlength=len(self.index)).tolist())",
           "side.split(len(side) // len(self.index))")
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check_group(copy_of(conditional, cut))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_none_one(method, dtype):
    """All missing, none missing, one feature, one row, no row."""
    z, observed, mean, covariance = case(5, 20, dtype=dtype)
    gaussian = Conditional(mean, covariance, method)
    nothing, everything = torch.zeros_like(observed), torch.ones_like(observed)
    assert torch.equal(gaussian.expect(z, nothing), mean.expand(5, 20))
    assert torch.equal(gaussian.expect(z, everything), z)
    assert torch.equal(gaussian.log_prob(z, nothing), torch.zeros(5, dtype=dtype))
    whole = gaussian.draw(z, nothing, z - mean)
    torch.testing.assert_close(whole, mean + (z - mean) @ torch.linalg.cholesky(covariance).T, rtol=1e-4, atol=1e-4)
    one = Conditional(mean[:1], covariance[:1, :1], method)
    assert torch.equal(one.expect(z[:, :1], nothing[:, :1]), mean[:1].expand(5, 1))
    torch.testing.assert_close(one.log_prob(z[:, :1], everything[:, :1]), torch.distributions.Normal(
        mean[0], covariance[0, 0].sqrt()).log_prob(z[:, 0]))
    alone = gaussian.expect(z[:1], observed[:1])
    assert row_errors(alone, z[:1], observed[:1], mean, covariance).max() < 1e-3
    for result in (gaussian.expect(z[:0], observed[:0]), gaussian.draw(z[:0], observed[:0], z[:0])):
        assert result.shape == (0, 20) and result.dtype == dtype
    empty = gaussian.moments(z[:0], observed[:0])
    assert empty.filled.shape == (0, 20) and not empty.spread.any() and empty.log_prob.shape == (0,)
    assert gaussian.log_prob(z[:0], observed[:0]).shape == (0,)


def check_moments(module=conditional, dtype=torch.float64, bound=1e-9):
    z, observed, mean, covariance = case(60, 8, dtype=dtype)
    observed[20:40] = observed[0]  # a pattern that counts more than once
    found = module.Conditional(mean, covariance).moments(z, observed)
    filled, spread = conditional_moments(z, observed, mean, covariance)
    assert (found.filled - filled).abs().max() < bound and torch.equal(found.filled[observed], z[observed])
    assert (found.spread - spread.sum(0)).abs().max() < 60 * bound
    known = module.Conditional(mean, covariance).moments(z, observed, module.find_patterns(observed))
    assert all(torch.equal(a, b) for a, b in zip(found, known, strict=True))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=str)
def test_moments(dtype, bound):
    check_moments(dtype=dtype, bound=bound)


@pytest.mark.parametrize("edit", [
    ("part.inverse * patterns.count[part.part, None, None].to(d.dtype)", "part.inverse"),
    ("spread.index_add_(0, place.flatten(), weighted.flatten())", "spread[place.flatten()] = weighted.flatten()"),
    ("return torch.cholesky_inverse(self.factor)", "return self.factor @ self.factor.mT"),
], ids=["a pattern counts once", "the last pattern only", "precision for covariance"])  # fmt: skip
def test_moments_find_mutants(edit):
    with pytest.raises(AssertionError):
        check_moments(copy_of(conditional, edit))


def exact_log_prob(z, observed, mean, covariance):
    """By torch.distributions on the observed block, in float64."""
    result = torch.zeros(len(z), dtype=torch.float64)
    for i, o in enumerate(observed):
        if o.any():
            block = covariance[o][:, o].double()
            result[i] = torch.distributions.MultivariateNormal(mean[o].double(), block).log_prob(z[i, o].double())
    return result


def check_density(module=conditional, dtype=torch.float64, kappa=30.0, bound=1e-9):
    z, _, mean, covariance = case(60, 12, kappa=kappa, dtype=dtype)
    observed = torch.rand(60, 12, generator=seed(9)) > torch.rand(60, 1, generator=seed(10))  # few and many holes
    assert 0 < (observed.sum(1) > 6).sum() < 60
    gaussian, exact = module.Conditional(mean, covariance), exact_log_prob(z, observed, mean, covariance)
    assert (gaussian.log_prob(z, observed) - exact).abs().max() < bound
    assert (gaussian.moments(z, observed).log_prob - exact).abs().max() < bound


@pytest.mark.parametrize("dtype, kappa, bound", [(torch.float64, 30.0, 1e-10), (torch.float64, 1e8, 1e-5),
                                                 (torch.float32, 1e4, 0.02)], ids=str)
def test_log_prob(dtype, kappa, bound):
    check_density(dtype=dtype, kappa=kappa, bound=bound)


@pytest.mark.parametrize("edit", [
    (MISSING, MISSING.replace("d + x, pull", "d, pull")),
    (MISSING, MISSING.replace("self.log_det + log_det", "self.log_det - log_det")),
    ("return 2 * self.factor.diagonal", "return self.factor.diagonal"),
    ("observed.sum(1).to(square.dtype) * math.log(2 * math.pi)", "observed.shape[1] * math.log(2 * math.pi)"),
    ("add_((~inside).to(matrix.dtype))", "add_((~inside).to(matrix.dtype) * 2)"),
], ids=["the row not filled", "sign of the determinant", "half of it", "all features counted", "padded with two"])
def test_log_prob_finds_mutants(edit):
    check_density()
    with pytest.raises(AssertionError):
        check_density(copy_of(conditional, edit))


def check_draws(module=conditional, method="direct", n=40_000):
    """Mean and covariance of draws of one row, within five standard errors."""
    z, observed, mean, covariance = case(1, 6, kappa=20.0)
    observed[0] = torch.tensor([True, False, False, True, False, True])
    gaussian = module.Conditional(mean, covariance, method, tolerance=1e-8)
    noise = torch.randn(n, 6, dtype=torch.float64, generator=seed(5))
    draws = gaussian.draw(z.expand(n, -1), observed.expand(n, -1), noise)
    filled, spread = conditional_moments(z, observed, mean, covariance)
    sd = spread[0].diagonal().sqrt()
    assert torch.equal(draws[:, observed[0]], z[:, observed[0]].expand(n, -1))
    assert ((draws.mean(0) - filled[0]).abs() <= 5 * sd / math.sqrt(n) + 1e-12).all()
    assert ((draws.T.cov() - spread[0]).abs() <= 5 * math.sqrt(2 / n) * torch.outer(sd, sd) + 1e-12).all()


@pytest.mark.parametrize("method", METHODS)
def test_draws(method):
    check_draws(method=method)


@pytest.mark.parametrize("edit", [
    ("normal.to(d.dtype) @ self.factor.T", "normal.to(d.dtype) @ self.factor"),
    (DEVIATION, DEVIATION.replace("d - whole", "d")),
    (DEVIATION, DEVIATION.replace("d - whole", "d + whole")),
    (FILLED, "(self.mean + filled * size)"),
], ids=["transposed factor", "no correction", "correction the wrong way", "mean for a draw"])
def test_draws_find_mutants(edit):
    with pytest.raises(AssertionError):
        check_draws(copy_of(conditional, edit))


def test_one_draw_a_row_estimates_the_sum_of_covariances():
    """Without bias: its average over repetitions, within five standard errors of each entry."""
    z, observed, mean, covariance = case(10, 5, kappa=10.0)
    gaussian, repeats = Conditional(mean, covariance), 4000
    rows, holes = z.repeat(repeats, 1), observed.repeat(repeats, 1)
    noise = torch.randn(len(rows), 5, dtype=torch.float64, generator=seed(6))
    away = gaussian.draw(rows, holes, noise) - gaussian.expect(rows, holes)
    products = (away[:, :, None] * away[:, None]).view(repeats, 10, 5, 5).sum(1)
    exact = conditional_moments(z, observed, mean, covariance)[1].sum(0)
    assert ((products.mean(0) - exact).abs() <= 5 * products.std(0) / math.sqrt(repeats) + 1e-12).all()
    assert not torch.allclose(products.mean(0), conditional_moments(z, observed, mean, covariance)[1].mean(0), rtol=0.1)


def check_no_peek(module=conditional, method="direct"):
    z, observed, mean, covariance = case(30, 20, dtype=torch.float32)
    gaussian, noise = module.Conditional(mean, covariance, method), torch.randn(30, 20, generator=seed(8))
    for junk in (math.nan, math.inf, -1e30):
        dirty = torch.where(observed, z, junk)
        assert torch.equal(gaussian.expect(dirty, observed), gaussian.expect(z, observed))
        assert torch.equal(gaussian.draw(dirty, observed, noise), gaussian.draw(z, observed, noise))
        assert torch.equal(gaussian.log_prob(dirty, observed), gaussian.log_prob(z, observed))
        for a, b in zip(gaussian.moments(dirty, observed), gaussian.moments(z, observed), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_no_peek(method):
    check_no_peek(method=method)


def test_no_peek_finds_a_product_instead_of_a_choice():
    edit = ("torch.where(observed, z - mean, 0.0).to(mean.dtype)", "((z - mean) * observed).to(mean.dtype)")
    with pytest.raises((AssertionError, ValueError)):
        check_no_peek(copy_of(conditional, edit))


def check_neighbours(module=conditional, method="cg"):
    """Twenty rows with other neighbours, alone, and upside down: the same, but for rounding, which in batches of
    other sizes may cost one of them a step. The tolerance is a thousand times wider than what is asked here."""
    z, observed, mean, covariance = case(200, 30, kappa=1000.0, dtype=torch.float32)
    gaussian, few = module.Conditional(mean, covariance, method, tolerance=1e-2), slice(0, 20)
    size = (z - mean).norm(dim=1).mean()
    together = gaussian.expect(z, observed)
    for rate in (0.0, 0.1, 0.95):
        others = observed.clone()
        others[20:] = torch.rand(180, 30, generator=seed(4)) >= rate
        changed = gaussian.expect(z, others)[few]
        assert (together[few] - changed).norm(dim=1).max() < 1e-5 * size
    alone = torch.cat([gaussian.expect(z[i : i + 1], observed[i : i + 1]) for i in range(20)])
    turned = gaussian.expect(z.flip(0), observed.flip(0)).flip(0)
    assert max((together[few] - other).norm(dim=1).quantile(0.8) for other in (alone, turned[few])) < 1e-5 * size


@pytest.mark.parametrize("method", ("direct", "cg"))
def test_rows_do_not_depend_on_neighbours(method):
    check_neighbours(method=method)


@pytest.mark.parametrize("edit", [
    ("torch.where(live, rz / dot(direction, product).clamp(min=tiny), 0.0)[:, None]",
     "(rz / dot(direction, product).clamp(min=tiny))[:, None]"),
    ("0.9 * limit, self.preconditioner, self.max_steps",
     "0.9 * limit, mean_operator_inverse(self.unit, max(float(inside.mean()), 0.1)), self.max_steps"),
], ids=["steps as long as neighbours take them", "a preconditioner for the batch"])
def test_neighbours_find_mutants(edit):
    with pytest.raises(AssertionError):
        check_neighbours(copy_of(conditional, edit))


def test_auto_stays_within_the_tolerance_whatever_the_batch():
    """It solves the batch with many holes by iteration, that with few by factorization."""
    z, observed, mean, covariance = case(200, 64, 0.5, 100.0, dtype=torch.float32)
    others = observed.clone()
    others[20:] = True
    gaussian = Conditional(mean, covariance)
    assert gaussian._prefers_cg(find_patterns(observed)) and not gaussian._prefers_cg(find_patterns(others))
    gap = (gaussian.expect(z, observed) - gaussian.expect(z, others))[:20].norm(dim=1)
    assert 0 < gap.max() < 4e-4 * (z - mean).norm(dim=1).mean()


def test_more_rows_than_go_at_once():
    z, observed, mean, covariance = case(70_000, 16, dtype=torch.float32)  # 2**20 numbers are 65,536 rows
    filled = Conditional(mean, covariance, "cg").expect(z, observed)
    exact = Conditional(mean, covariance, "direct").expect(z, observed)
    assert (filled - exact).norm() < 3e-4 * (exact - mean).norm()


# --- when the iteration fails -----------------------------------------------------------------------------------


def check_fallback(module):
    """Two steps are too few, and yet the result is right."""
    data = case(30, 24, kappa=1000.0, dtype=torch.float32)
    check_means(module, "cg", torch.float32, bound=1e-5, data=data)  # better than the iteration ever is


def test_what_does_not_converge_is_solved_directly():
    short = ("    max_steps = 200\n", "    max_steps = 2\n")
    check_fallback(copy_of(conditional, short))
    with pytest.raises(AssertionError):
        check_fallback(copy_of(conditional, short, ("        if poor.any():", "        if False:")))
    with pytest.raises(AssertionError):
        check_fallback(conditional)  # no fallback there: the bound is what tells them apart


def test_the_fallback_is_used_for_poor_rows_only(monkeypatch):
    z, observed, mean, covariance = case(30, 24, kappa=1000.0)
    gaussian, sizes = Conditional(mean, covariance, "cg"), []
    plain = Conditional._direct

    def count(self, d, patterns):
        sizes.append(len(d))
        return plain(self, d, patterns)

    monkeypatch.setattr(Conditional, "_direct", count)
    gaussian.expect(z, observed)
    assert sizes == []
    limited = conjugate_gradients

    def spoil(*args, **options):
        solution = limited(*args, **options)
        return solution._replace(residual=torch.where(torch.arange(30) < 3, math.nan, solution.residual))

    monkeypatch.setattr(conditional, "conjugate_gradients", spoil)
    filled = gaussian.expect(z, observed)
    assert sizes == [3] and row_errors(filled, z, observed, mean, covariance).max() < 1e-8


def check_delicate(module=conditional):
    """Condition number 1e7 in float32: rounding the precision alone would cost two digits."""
    data = case(16, 64, 0.8, 1e7, dtype=torch.float32)
    for method in METHODS:
        check_means(module, method, torch.float32, bound=1e-5, data=data)
    z, observed, mean, covariance = data
    _, spread = conditional_moments(*data)
    found = module.Conditional(mean, covariance).moments(z, observed)
    assert (found.spread - spread.sum(0)).norm() < 1e-5 * spread.sum(0).norm()
    assert (module.Conditional(mean, covariance).log_prob(z, observed) - exact_log_prob(*data)).abs().max() < 1e-3
    mean_of = module.Conditional(mean, covariance).draw(z, observed, torch.zeros_like(z))
    assert row_errors(mean_of, *data).max() < 1e-5


def test_float32_is_left_where_it_is_not_enough():
    check_delicate()
    with pytest.raises(AssertionError):
        check_delicate(copy_of(conditional, ("and self.condition > 1e5", "and self.condition > 1e50")))


def check_strain(module=conditional):
    """The tolerance is the error that a row typically has, whatever the condition number and the rate."""
    for kappa, rate in ((1e2, 0.5), (1e2, 0.8), (1e3, 0.5), (1e3, 0.8), (5e4, 0.5)):
        z, observed, mean, covariance = case(64, 64, rate, kappa, dtype=torch.float32)
        gaussian = module.Conditional(mean, covariance, "cg")
        truth = conditional_moments(z, observed, mean, covariance)[0]
        gap = torch.where(observed, 0.0, gaussian.expect(z, observed) - truth).norm(dim=1)
        error = gap / torch.where(observed, 0.0, truth - mean).norm(dim=1)
        assert error.median() < 1e-4 and error.max() < 6e-4


def test_tolerance_is_of_the_error():
    check_strain()
    for edit in (("limit = self.tolerance / self.strain", "limit = self.tolerance"),
                 ("math.sqrt(self.condition) / 4)", "math.sqrt(self.condition) / 20)")):
        with pytest.raises(AssertionError):
            check_strain(copy_of(conditional, edit))


def test_a_tighter_tolerance_gives_a_smaller_error():
    data = case(40, 40, kappa=1000.0)
    errors = [row_errors(Conditional(*data[2:], "cg", tolerance).expect(*data[:2]), *data).max() for tolerance in
              (1e-2, 1e-5, 1e-9)]
    assert errors[0] > 30 * errors[1] > 900 * errors[2]


# --- the pieces ---------------------------------------------------------------------------------------------------


def check_iteration(module=conditional):
    """Within the bound on the steps; zero rows stay zero; rows of any size; unfinished rows are seen."""
    matrix = spectrum(60, 100.0)[1]
    inside = (torch.rand(20, 60, generator=seed(1)) < 0.5).double()
    b = torch.randn(20, 60, dtype=torch.float64, generator=seed(2)) * inside
    b[0] = 0.0
    b[1] *= 1e-200
    b[2] *= 1e200
    found = module.conjugate_gradients(matrix, inside, b, 1e-8)
    assert found.n_steps <= math.log(2 * 10 / 1e-8) / math.log(11 / 9) + 1 and found.residual.max() < 2e-8
    assert not found.x[0].any() and not found.x[inside == 0].any()
    exact = torch.zeros_like(b)
    for i, m in enumerate(inside.bool()):
        exact[i, m] = torch.linalg.solve(matrix[m][:, m], b[i, m])
    size = exact.abs().amax(1, keepdim=True).clamp(min=1e-300)
    assert ((found.x - exact) / size).abs().max() < 1e-6
    few = module.conjugate_gradients(matrix, inside, b, 1e-8, max_steps=3)
    assert few.n_steps == 3 and (few.residual[1:] > 1e-4).all()


def test_conjugate_gradients():
    check_iteration()


@pytest.mark.parametrize("edit", [
    ("    b = b / size\n", "    b, size = b / 1.0, 1.0\n"),
    ("product = (direction @ matrix).mul_(keep)", "product = direction @ matrix"),
    ("residual = torch.linalg.vector_norm(b - (x @ matrix) * inside, dim=1)", "residual = 0 * b[:, 0]"),
    ("direction = torch.addcmul(z, (rz / before.clamp(min=tiny))[:, None], direction)", "direction = z"),
    ("rz, limit, keep, live))", "rz, limit, keep.flip(0), live))"),
], ids=["sizes", "no mask", "residual not computed", "steepest descent", "masks exchanged"])
def test_conjugate_gradients_find_mutants(edit):
    with pytest.raises((AssertionError, RuntimeError)):
        check_iteration(copy_of(conditional, edit))


def test_preconditioner():
    """The inverse of what a mask leaves on average; fewer steps than without it, in bf16 as well."""
    _, covariance = spectrum(80, 1000.0)
    scale = covariance.diagonal().rsqrt()
    unit = (covariance * scale * scale[:, None]).float()
    m = (torch.rand(20_000, 80, generator=seed(3)) < 0.7).float()
    average = (m.T @ m / 20_000) * unit
    inverse = mean_operator_inverse(unit, 0.7, 1.0)
    assert (0.7 * torch.linalg.inv(inverse) - average).abs().max() < 0.02
    inside = (torch.rand(30, 80, generator=seed(4)) < 0.7).float()
    b = torch.randn(30, 80, generator=seed(5)) * inside
    steps = [conjugate_gradients(unit, inside, b, 1e-4, kind).n_steps for kind in
             (None, inverse, mean_operator_inverse(unit, 0.7), mean_operator_inverse(unit, 0.7).bfloat16())]
    assert steps[0] > 1.5 * steps[1] and steps[2] <= steps[1] and steps[3] < steps[1]


def test_patterns():
    observed = torch.rand(200, 5, generator=seed()) < 0.5
    found = find_patterns(observed)
    assert torch.equal(found.observed[found.of_row], observed)
    assert torch.equal(torch.bincount(found.of_row), found.count)
    assert (~found.observed).sum(1).tolist() == sorted((~found.observed).sum(1).tolist())
    assert len(found.observed.unique(dim=0)) == len(found.count) == len(observed.unique(dim=0))
    rows, some = found.choose(found.count > 5)
    assert torch.equal(some.observed[some.of_row], observed[rows]) and (some.count > 5).all()
    assert len(rows) == some.count.sum()
    assert find_patterns(observed[:0]).of_row.shape == (0,) and find_patterns(observed[:, :0]).count.tolist() == [200]
    wide = torch.rand(50, 1000, generator=seed()) < 0.5
    assert len(find_patterns(wide).count) == 50


def check_parts(module=conditional, budget=40):
    """Every subset comes once, with its own factor, whatever fits into a batch."""
    z, observed, mean, covariance = case(40, 7)
    precision, patterns, rows = torch.linalg.inv(covariance), module.find_patterns(observed), []
    for part in module.conditional_parts(precision, patterns, budget):
        rows += part.rows.tolist()
        for own, row in zip(part.of_row.tolist(), part.rows.tolist(), strict=True):
            m = (~observed[row]).nonzero()[:, 0]
            assert part.index[own, : len(m)].tolist() == m.tolist() and (part.index[own, len(m) :] == 7).all()
            block = torch.linalg.inv(precision[m][:, m])
            torch.testing.assert_close(part.inverse[own, : len(m), : len(m)], block)
            torch.testing.assert_close(part.log_det[own], -torch.logdet(block))
    assert sorted(rows) == list(range(40))
    assert sum(len(b.index) for b in module.cholesky_blocks(precision, observed, budget)) == 40
    b = torch.randn(40, 7, dtype=torch.float64, generator=seed())
    x, _ = module.solve_patterns(precision, patterns, b)
    assert not x[observed].any() and torch.allclose((x @ precision)[~observed], b[~observed])


@pytest.mark.parametrize("budget", [1, 40, 2**20])
def test_blocks_and_parts(budget):
    check_parts(budget=budget)


@pytest.mark.parametrize("edit", [
    ("patterns.of_row.argsort(stable=True)", "patterns.of_row.argsort(descending=True)"),
    ("        start = stop\n", "        start = stop + 1\n"),
], ids=["rows of other patterns", "a pattern left out"])
def test_parts_find_mutants(edit):
    with pytest.raises((AssertionError, IndexError)):
        check_parts(copy_of(conditional, edit))


def check_condition(module=conditional):
    """Never too large, and less than five per cent too small, for spectra that are hard for the power method too."""
    turn = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64, generator=seed()))[0]
    spectra = (torch.logspace(0, -4, 300), torch.linspace(1e-3, 1, 300), torch.arange(1, 301.0) ** -2,
               torch.cat([torch.ones(299), torch.tensor([3.0])]), torch.cat([torch.ones(299), torch.tensor([1e-5])]))
    for values in spectra:
        values = values.double()
        found = module.condition_number((turn * values) @ turn.T, (turn / values) @ turn.T)
        assert 0.95 < found / (values.max() / values.min()) < 1.0001
    small = spectrum(12, 1e6)[1]  # fewer features than steps: exact
    assert abs(module.condition_number(small, torch.linalg.inv(small)) / 1e6 - 1) < 1e-6
    assert abs(module.condition_number(torch.eye(3), torch.eye(3)) - 1) < 1e-5
    assert module.condition_number(torch.eye(1), torch.eye(1)) == 1


def test_condition_number():
    check_condition()


@pytest.mark.parametrize("edit", [
    ("n_steps: int = 24", "n_steps: int = 4"), ("basis = torch.linalg.qr(basis.T)[0]", "basis = basis.T"),
    ("return torch.linalg.eigvalsh((small + small.T) / 2)[-1]", "return small[-1, -1]")],
    ids=["few steps", "a basis that is none", "the last vector"])  # fmt: skip
def test_condition_number_finds_mutants(edit):
    with pytest.raises(AssertionError):
        check_condition(copy_of(conditional, edit))


def chosen(monkeypatch, gaussian, z, observed):
    """Which way `expect` went."""
    ways = []
    monkeypatch.setattr(Conditional, "_by_cg", lambda self, d, missing: ways.append("cg") or d)
    monkeypatch.setattr(Conditional, "_direct", lambda self, d, patterns: ways.append("direct") or (d, None, None))
    gaussian.expect(z, observed)
    return ways


@pytest.mark.parametrize("way, options", [
    ("cg", {}), ("direct", {"dtype": torch.float64, "rate": 0.2}), ("direct", {"p": 8}), ("direct", {"rate": 0.03}),
    ("direct", {"rate": 0.97}), ("direct", {"kappa": 9e4}), ("direct", {"shared": True})], ids=str)  # fmt: skip
def test_auto_takes_what_is_faster(monkeypatch, way, options):
    options = {"p": 64, "rate": 0.4, "kappa": 100.0, "dtype": torch.float32, "shared": False} | options
    shared = options.pop("shared")
    z, observed, mean, covariance = case(200, **options)
    observed = observed[:2].repeat(100, 1) if shared else observed
    assert chosen(monkeypatch, Conditional(mean, covariance), z, observed) == [way]


# --- at the door, and around ---------------------------------------------------------------------------------------


def test_refusals():
    z, observed, mean, covariance = case(4, 3, dtype=torch.float32)
    refuses(lambda: Conditional(mean, -covariance), ValueError, "not positive definite")
    refuses(lambda: Conditional(mean, torch.ones(3, 3)), ValueError, "not positive definite")
    refuses(lambda: Conditional(mean, covariance, "cgs"), ValueError, "'auto', 'direct' or 'cg'")
    refuses(lambda: Conditional(mean, covariance, tolerance=0.0), ValueError, "above 0")
    refuses(lambda: Conditional(mean[:2], covariance), ValueError, r"give \(p,\) and \(p, p\)")
    refuses(lambda: Conditional(mean[:0], covariance[:0, :0]), ValueError, "p > 0")
    refuses(lambda: Conditional(mean, covariance[:2]), ValueError, "give")
    refuses(lambda: Conditional(mean, covariance.half()), ValueError, "float32 or float64")
    refuses(lambda: Conditional(mean, covariance + torch.eye(3).roll(1, 0)), ValueError, "not symmetric")
    refuses(lambda: Conditional(mean * math.nan, covariance), ValueError, "NaN")
    refuses(lambda: Conditional(mean, covariance * math.nan), ValueError, "NaN")
    small = torch.diag(torch.tensor([1e16, 1.0, 1.0]))
    small[1, 2] = 0.9  # its other half is 0; beside 1e16 that is little, beside its own variances it is not
    refuses(lambda: Conditional(mean, small), ValueError, "not symmetric")
    gaussian, holed = Conditional(mean, covariance), torch.where(observed, math.nan, z)
    row, column = observed.nonzero()[0].tolist()
    for call in (gaussian.expect, gaussian.log_prob, gaussian.moments, lambda *a: gaussian.draw(*a, z)):
        refuses(lambda call=call: call(holed, observed), ValueError, f"nan in row {row}, column {column}")
        refuses(lambda call=call: call(z[:, :2], observed[:, :2]), ValueError, r"\(n, 3\)")
        refuses(lambda call=call: call(z, observed[:3]), ValueError, r"\(n, 3\)")


def check_noise_and_numbers(module=conditional):
    """Whole numbers, and noise that would be copied to every row, or holds NaN. The copy has no hook for shapes."""
    for kappa in (30.0, 1e7):
        z, observed, mean, covariance = case(4, 3, kappa=kappa, dtype=torch.float32)
        gaussian = module.Conditional(mean, covariance)
        for call in (gaussian.expect, gaussian.log_prob, gaussian.moments, partial(gaussian.draw, normal=z)):
            with pytest.raises(ValueError, match="floating-point"):
                call((10 * z).long(), observed)
        for noise in (z[:1], z[0], z[:, :1], z * math.nan):
            with pytest.raises(ValueError, match=r"in the shape of z, \(4, 3\)"):
                gaussian.draw(z, observed, noise)


def test_noise_and_numbers():
    check_noise_and_numbers(copy_of(conditional))
    for edit in (("if not z.is_floating_point():", "if False:"), ("(normal.shape != z.shape or ", "("),
                 ("or not torch.isfinite(normal).all()", "or False")):
        with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
            check_noise_and_numbers(copy_of(conditional, edit))


def check_dtypes(module=conditional):
    """Filled rows come in the precision of z, all else in that of the covariance, delicate or not."""
    for kappa in (30.0, 1e7):
        z, observed, mean, covariance = case(6, 8, kappa=kappa, dtype=torch.float32)
        gaussian = module.Conditional(mean, covariance)
        assert gaussian.delicate == (kappa > 1e6)
        for rows in (z, z.double(), z.half()):
            found = gaussian.moments(rows, observed)
            filled = found.filled, gaussian.expect(rows, observed), gaussian.draw(rows, observed, rows)
            assert {t.dtype for t in filled} == {rows.dtype} and torch.equal(found.filled[observed], rows[observed])
            rest = found.spread, found.log_prob, gaussian.log_prob(rows, observed)
            assert {t.dtype for t in rest} == {torch.float32}


def test_dtypes():
    check_dtypes(copy_of(conditional))
    for edit in (("(z.double(), observed).to(self.mean.dtype)", "(z.double(), observed).to(z.dtype)"),
                 ("observed, patterns), self.mean.dtype", "observed, patterns), z.dtype")):
        with pytest.raises(AssertionError):
            check_dtypes(copy_of(conditional, edit))


def check_huge(module=conditional):
    """Means grow with the rows; a density that is too small for its precision is −∞, never NaN."""
    z, observed, mean, covariance = case(30, 24, kappa=100.0, dtype=torch.float32)
    observed[0], z, mean = False, z - mean, 0 * mean
    for method in ("direct", "cg"):
        gaussian = module.Conditional(mean, covariance, method)
        plain, holes = gaussian.expect(z, observed), ~observed
        for big in (1e15, 1e30, 1e37):
            assert torch.allclose(gaussian.expect(z * big, observed) / big, plain, atol=2e-3)
            found = gaussian.moments(z * big, observed)
            assert torch.allclose((found.filled / big)[holes], plain[holes], atol=2e-3)
            assert found.spread.isfinite().all()
            for density in (found.log_prob, gaussian.log_prob(z * big, observed)):
                assert density[0].abs() < 1e-4 and not density.isnan().any() and (density[1:] < -1e28).all()
    exact = conditional_moments(z, observed, mean, covariance)[0]
    assert (plain - exact).norm() < 1e-3 * exact.norm()


def test_huge_rows():
    check_huge()
    for edit in (("size > 1e12", "size > math.inf"), ("square * size[:, 0].square(), log_det)", "square, log_det)"),
                 ("torch.linalg.vecdot(d, pull) * size[:, 0].square()", "torch.linalg.vecdot(d, pull)"),
                 ("(self.mean + d * size)", "(self.mean + d)")):
        with pytest.raises(AssertionError):
            check_huge(copy_of(conditional, edit))


def test_the_covariance_is_made_symmetric():
    z, observed, mean, covariance = case(20, 6)
    skew = torch.randn(6, 6, dtype=torch.float64, generator=seed()) * 1e-6
    skew = skew - skew.T
    gaussian = Conditional(mean, covariance + skew)
    assert torch.equal(gaussian.covariance, gaussian.covariance.T)
    assert torch.allclose(gaussian.expect(z, observed), Conditional(mean, covariance).expect(z, observed), atol=1e-13)


def test_float32_and_float64_agree():
    z, observed, mean, covariance = case(60, 40, kappa=100.0)
    for method, bound in (("direct", 1e-5), ("cg", 5e-4)):
        single = Conditional(mean.float(), covariance.float(), method).expect(z.float(), observed)
        double = Conditional(mean, covariance, method).expect(z, observed)
        assert single.dtype == torch.float32 and (single - double).norm() < bound * (double - mean).norm()


def test_observed_values_keep_their_precision():
    """Rows in float64, a covariance in float32: what was seen comes back bit for bit."""
    z, observed, mean, covariance = case(20, 6)
    filled = Conditional(mean.float(), covariance.float()).expect(z, observed)
    assert filled.dtype == torch.float64 and torch.equal(filled[observed], z[observed])
    assert row_errors(filled, z, observed, mean, covariance).max() < 1e-5


def check_surroundings(monkeypatch, module=conditional):
    """The same bits under autocast; products in full precision inside, as allowed outside; no gradients."""
    z, observed, mean, covariance = case(30, 64, kappa=300.0, dtype=torch.float32)
    gaussian, inside, plain = module.Conditional(mean, covariance, "cg"), [], module.conjugate_gradients

    def note(*args):
        inside.append(torch.get_float32_matmul_precision())
        return plain(*args)

    monkeypatch.setattr(module, "conjugate_gradients", note)
    before = gaussian.expect(z, observed)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            after = gaussian.expect(z.clone().requires_grad_(), observed)
        assert torch.get_float32_matmul_precision() == "medium" and inside == ["highest", "highest"]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(before, after) and not after.requires_grad


def test_surroundings_do_not_matter(monkeypatch):
    check_surroundings(monkeypatch)
    for edit in (("torch.autocast(z.device.type, enabled=False)", "torch.no_grad()"),
                 ('torch.set_float32_matmul_precision("highest")', "pass"),
                 ("torch.set_float32_matmul_precision(before)", "pass"), ("with torch.no_grad(), ", "with ")):
        with pytest.raises((AssertionError, RuntimeError)):
            check_surroundings(monkeypatch, copy_of(conditional, edit))


def test_the_preconditioner_is_as_precise_as_the_processor_likes(monkeypatch):
    z, observed, mean, covariance = case(30, 64, kappa=300.0, dtype=torch.float32)
    filled = {}
    for fast, kind in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(conditional, "_bf16_is_fast", lambda device, fast=fast: fast)
        gaussian = Conditional(mean, covariance, "cg")
        filled[fast] = gaussian.expect(z, observed)
        assert gaussian.preconditioner.dtype == kind
    assert (filled[True] - filled[False]).norm() < 5e-4 * (z - mean).norm()
    monkeypatch.undo()
    for abilities, fast in (({"avx512_bf16": True}, True), ({"avx512_f": True, "amx_bf16": False}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda abilities=abilities: abilities)
        assert conditional._bf16_is_fast(torch.device("cpu")) is fast


def test_features_in_other_units():
    """Columns in millimetres and in light years: the scaled problem is the same."""
    z, observed, mean, covariance = case(30, 20, kappa=50.0)
    units = torch.from_numpy(np.logspace(-8, 8, 20))
    plain = Conditional(mean, covariance, "cg").expect(z, observed)
    scaled = Conditional(mean * units, covariance * units * units[:, None], "cg").expect(z * units, observed)
    assert ((scaled / units - plain).abs() / (1 + plain.abs())).max() < 1e-7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_gpu_and_cpu_agree(method):
    z, observed, mean, covariance = case(100, 80, kappa=100.0, dtype=torch.float32)
    noise = torch.randn(100, 80, generator=seed(1))
    here = Conditional(mean, covariance, method)
    there = Conditional(mean.cuda(), covariance.cuda(), method)
    args = z.cuda(), observed.cuda()
    assert torch.allclose(there.expect(*args).cpu(), here.expect(z, observed), atol=2e-3)
    assert torch.allclose(there.draw(*args, noise.cuda()).cpu(), here.draw(z, observed, noise), atol=2e-3)
    assert torch.allclose(there.log_prob(*args).cpu(), here.log_prob(z, observed), atol=1e-2)
    assert torch.allclose(there.moments(*args).spread.cpu(), here.moments(z, observed).spread, atol=1e-2)
