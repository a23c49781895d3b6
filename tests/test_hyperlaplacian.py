"""Hyper-Laplacian prior: energy by hand, symmetries, gradients, fits, imputation, fills; bad input; mutations, all run.

The import hook checks shapes before any door of ours is reached, so doors are tested on an unhooked copy, and
a mutation is such a copy with one piece of its source replaced."""

import math

import numpy as np
import pytest
import torch
from conftest import copy_of
from hypothesis import given, settings
from hypothesis import strategies as st

from missingbook.flows import hyperlaplacian
from missingbook.flows.hyperlaplacian import (
    bilinear_fill,
    derivative_filters,
    filter_response,
    fit_hyperlaplacian,
    hyperlaplacian_energy,
    hyperlaplacian_log_prob,
    impute_by_prior,
    nearest_fill,
    profile_log_likelihood,
    sample_hyperlaplacian,
)
from missingbook.foundations.data import load
from missingbook.foundations.masks import independent_dropout

FILLS = [impute_by_prior, nearest_fill, bilinear_fill]
NAN = float("nan")


PLAIN = copy_of(hyperlaplacian)


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def digits(n=12, rate=0.7):
    x = load("mnist-sample", split="test").x[:n].float() / 255
    return x, independent_dropout((n, 28, 28), rate, torch.Generator().manual_seed(0))


# --- energy ----------------------------------------------------------------------------------------------------------


def check_energy_by_hand(module):
    x = torch.tensor([[[[0.0, 1.0, 1.0], [0.0, 9.0, 1.0]]], [[[0.0, 0.0, 0.0], [0.0, 0.0, 4.0]]]], dtype=torch.float64)
    expected = [1 + 3 + 2 * math.sqrt(8), 2 + 2]  # across 1, 0, 9, −8 and down 0, 8, 0; across 4, down 4
    assert np.allclose(module.hyperlaplacian_energy(x, 0.5), expected, rtol=1e-12)
    smooth = module.hyperlaplacian_energy(x, 0.5, eps=3.0)[1].item()
    assert math.isclose(smooth, 5 * math.sqrt(3) + 2 * math.sqrt(5))  # four and two differences; (16 + 9)^(1/4) = √5
    second = module.hyperlaplacian_energy(x[1:], 1.0, module.derivative_filters(2)).item()
    assert math.isclose(second, 4 + 4)  # [1, −2, 1] across: 4; down: does not fit; the mixed one: 4


@pytest.mark.parametrize("name, before, after", [
    ("wrong sign", "return sum(terms, x.new_zeros(len(x)))", "return -sum(terms, x.new_zeros(len(x)))"),
    ("[1, 1] kernel", "[[1.0, -1.0]] if order == 1", "[[1.0, 1.0]] if order == 1"),
    ("vertical kernel dropped", "return (line, line.T.contiguous(), *mixed)", "return (line, *mixed)"),
    ("one axis summed twice", "return (line, line.T.contiguous(), *mixed)", "return (line, line, *mixed)"),
    ("mean for sum", "_power(v, alpha, eps).sum((1, 2, 3))", "_power(v, alpha, eps).mean((1, 2, 3))"),
    ("eps forgotten", "torch.hypot(v, v.new_full((), eps)) ** alpha", "v.abs() ** alpha"),
])
def test_energy_by_hand(name, before, after):
    check_energy_by_hand(hyperlaplacian)
    with pytest.raises(AssertionError):
        check_energy_by_hand(copy_of(hyperlaplacian, (before, after)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.sampled_from([1 / 3, 1, 2]),
       st.sampled_from([0.0, 0.1]), st.sampled_from([1, 2]))
def test_symmetries(seed, channels, height, width, alpha, eps, order):
    """Brightness, mirrors, a quarter turn, and joint scaling of picture and ε; a flat picture has the least energy."""
    x = numbers(2, channels, height, width, seed=seed)
    filters = derivative_filters(order)
    e = hyperlaplacian_energy(x, alpha, filters, eps)
    for same in (x + 3, 1 - x, x.flip(-1), x.flip(-2), x.transpose(-1, -2), x.flip(0).flip(1)[[1, 0]]):
        torch.testing.assert_close(hyperlaplacian_energy(same, alpha, filters, eps), e, atol=1e-6, rtol=1e-6)
    scaled = hyperlaplacian_energy(5 * x, alpha, filters, 5 * eps)
    torch.testing.assert_close(scaled, 5**alpha * e, atol=1e-6, rtol=1e-6)
    assert (e >= hyperlaplacian_energy(torch.zeros_like(x), alpha, filters, eps) - 1e-9).all()


def test_translation_inside_a_frame():
    """A spot on a flat ground has the same energy wherever it is, off the border."""
    x = torch.zeros(3, 1, 12, 12, dtype=torch.float64)
    for i, (top, left) in enumerate(((3, 3), (5, 4), (4, 6))):
        x[i, 0, top : top + 3, left : left + 2] = numbers(3, 2)
    e = hyperlaplacian_energy(x, 1 / 3)
    assert torch.allclose(e, e[:1].expand(3)) and e[0] > 0


def check_gradient(module, eps=0.05):
    x = numbers(2, 2, 5, 4)
    for alpha in (1 / 3, 2 / 3, 1, 2):
        for filters in (derivative_filters(1), derivative_filters(2), (numbers(2, 3),)):
            z = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(module.hyperlaplacian_energy(z, alpha, filters, eps).sum(), z)
            for at in ((0, 0, 0, 0), (1, 1, 2, 3), (0, 1, 4, 1)):
                step = torch.zeros_like(x)
                step[at] = 1e-6
                ends = [module.hyperlaplacian_energy(x + s * step, alpha, filters, eps).sum() for s in (1, -1)]
                assert math.isclose((ends[0] - ends[1]).item() / 2e-6, gradient[at].item(), rel_tol=1e-5, abs_tol=1e-6)


def test_gradient_against_finite_differences():
    """Mutation: a part of the graph is cut."""
    check_gradient(hyperlaplacian)
    cut = ("shifted = (flipped[i, j] * x[..., i", "shifted = (flipped[i, j] * (x if i else x.detach())[..., i")
    with pytest.raises(AssertionError):
        check_gradient(copy_of(hyperlaplacian, cut))


def gradient_on_flat_ground(module):
    x = torch.full((1, 1, 4, 4), 0.5, requires_grad=True)
    return torch.autograd.grad(module.hyperlaplacian_energy(x, 1 / 3).sum(), x)[0]


def test_no_nan_at_the_cusp():
    """Mutation: |v|^α as it stands."""
    assert gradient_on_flat_ground(hyperlaplacian).abs().max() == 0
    naive = copy_of(hyperlaplacian, ("    return torch.where(flat, 0.0, torch.where(flat, 1.0, v.abs()) ** alpha)",
                            "    return v.abs() ** alpha"))
    assert not torch.isfinite(gradient_on_flat_ground(naive)).all()


def test_filters_can_be_learned_and_are_convolved():
    x, kernel = numbers(1, 2, 6, 7), numbers(2, 3, seed=1).requires_grad_()
    conv = torch.nn.functional.conv2d(x.transpose(0, 1), kernel.flip(0, 1)[None, None]).transpose(0, 1)
    torch.testing.assert_close(filter_response(x, kernel), conv)
    hyperlaplacian_energy(x, 1.0, [kernel]).sum().backward()
    assert kernel.grad.abs().min() > 0


# --- density and fits ------------------------------------------------------------------------------------------------


def check_density(module):
    v = torch.logspace(-15, 4, 40_001, dtype=torch.float64)
    for alpha, k in ((2.0, 0.5), (1.0, 3.0), (2 / 3, 2.0), (1 / 3, 5.0)):
        assert abs(2 * torch.trapezoid(module.hyperlaplacian_log_prob(v, alpha, k).exp(), v).item() - 1) < 1e-4


@pytest.mark.parametrize("before, after", [
    (" - math.lgamma(1 / alpha) - k * _exact_power(v, alpha)", " - k * _exact_power(v, alpha)"),
    ("math.log(alpha) + math.log(k) / alpha - math.log(2) - math.lgamma(1 / alpha) - k", "0.0 - k"),
    ("math.log(k) / alpha - math.log(2)", "math.log(k) - math.log(2)"),
])
def test_density_has_mass_one(before, after):
    """Mutations: Γ is missing; the whole normaliser is missing; k enters without its root."""
    check_density(hyperlaplacian)
    with pytest.raises(AssertionError):
        check_density(copy_of(hyperlaplacian, (before, after)))


def check_recovery(module):
    """The maximum lies within four standard errors of the truth; those come from the curvature of the likelihood."""
    n, generator = 4_000, torch.Generator().manual_seed(5)
    for alpha, k in ((2.0, 0.5), (1.0, 3.0), (2 / 3, 2.0), (1 / 3, 5.0)):
        v = sample_hyperlaplacian((n,), alpha, k, generator)
        fit = module.fit_hyperlaplacian(v)
        h = 0.02 * alpha
        bend = sum(s * profile_log_likelihood(v, alpha + d * h) for s, d in ((1, -1), (-2, 0), (1, 1))) / h**2
        error = 1 / math.sqrt(-n * bend)
        assert abs(fit.alpha - alpha) < 4 * error and fit.n == n
        assert abs(module.fit_hyperlaplacian(v, alpha).k / k - 1) < 4 * math.sqrt(alpha / n)
        exact = hyperlaplacian_log_prob(v, fit.alpha, fit.k).mean().item()
        assert math.isclose(fit.log_likelihood, exact, rel_tol=1e-9)
        assert fit.log_likelihood >= hyperlaplacian_log_prob(v, alpha, k).mean().item() - 1e-9


@pytest.mark.parametrize("before, after", [
    (" - math.lgamma(1 / alpha) + (log_k - 1) / alpha", " + (log_k - 1) / alpha"),
    ("log_k = -math.log(alpha) - _log_moment", "log_k = -_log_moment"),
    ("math.exp(-math.log(alpha) - _log_moment(v, alpha))", "math.exp(-_log_moment(v, alpha))"),
])
def test_fits_recover_what_was_drawn(before, after):
    """Mutations: no Γ in the profile; α missing from k in the profile, and in the result."""
    check_recovery(hyperlaplacian)
    with pytest.raises((AssertionError, ValueError)):  # without Γ the likelihood has no maximum inside
        check_recovery(copy_of(hyperlaplacian, (before, after)))


def check_draws(module):
    v = module.sample_hyperlaplacian((40_000,), 2 / 3, 2.0, torch.Generator().manual_seed(1))
    gamma = 2.0 * v.abs() ** (2 / 3)  # Gamma(3/2): mean 3/2, variance 3/2
    assert abs(gamma.mean() - 1.5) < 4 * math.sqrt(1.5 / 40_000) and abs(gamma.var() - 1.5) < 0.12
    assert abs((v > 0).double().mean() - 0.5) < 0.01
    assert abs(((v > 0) == (v.abs() > v.abs().median())).double().mean() - 0.5) < 0.01  # sign and size are independent


def test_draws_are_gamma_in_disguise():
    """Mutations: the size without k; sign and size from the same half of the uniform."""
    check_draws(hyperlaplacian)
    for edit in (("(gamma / k) **", "gamma **"), ("(2 * uniform - 1).abs().numpy()", "uniform.numpy()")):
        with pytest.raises(AssertionError):
            check_draws(copy_of(hyperlaplacian, edit))
    seeded = [sample_hyperlaplacian((3, 2), 1, 1, torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*seeded) and seeded[0].shape == (3, 2)


def test_fit_scales_with_its_data():
    v = sample_hyperlaplacian((5000,), 0.5, 1.0, torch.Generator().manual_seed(3))
    one, large = fit_hyperlaplacian(v), fit_hyperlaplacian(1e150 * v)
    assert math.isclose(one.alpha, large.alpha, rel_tol=1e-3)
    assert math.isclose(one.log_likelihood - 150 * math.log(10), large.log_likelihood, rel_tol=1e-6)


@pytest.mark.parametrize("v, error, says", [
    (torch.zeros(5), ValueError, "flat"), (torch.empty(0), ValueError, "0 values"),
    (torch.tensor([1.0, NAN]), ValueError, "1 not finite"), (torch.tensor([1, 2]), TypeError, "x.float"),
    (torch.tensor([0.0, 0.0, 1.0, 2.0, -1.0]), ValueError, "exactly 0: add uniform noise"),
    (torch.ones(9), ValueError, "exactly 0: use other bounds or more values"),
])
def test_values_that_cannot_be_fitted(v, error, says):
    with pytest.raises(error, match=says):
        PLAIN.fit_hyperlaplacian(v)


@pytest.mark.parametrize("bounds", [(0, 4), (4, 1), (1, math.inf), (NAN, 4)])
def test_bounds_out_of_range(bounds):
    with pytest.raises(ValueError, match="0 < low < high"):
        PLAIN.fit_hyperlaplacian(numbers(50) - 0.5, bounds=bounds)


def test_density_has_a_finite_gradient_at_the_cusp():
    v = torch.tensor([0.0, 0.25], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(PLAIN.hyperlaplacian_log_prob(v, 0.5, 3.0).sum(), v)
    assert slope.tolist() == [0.0, -3.0]  # −k α v^(α − 1) = −3 · ½ · 2


def test_energy_of_half_precision_does_not_overflow():
    x = numbers(1, 3, 200, 200).float()
    exact = PLAIN.hyperlaplacian_energy(x)
    for dtype in (torch.float16, torch.bfloat16):
        x_half = x.to(dtype).requires_grad_()
        energy = PLAIN.hyperlaplacian_energy(x_half)
        assert energy.dtype == torch.float32 and exact > 65504 and torch.allclose(energy, exact, rtol=1e-2)
        assert torch.isfinite(torch.autograd.grad(energy.sum(), x_half)[0]).all()


@pytest.mark.parametrize("alpha", [0, -1, 2.1, NAN, math.inf, True])
def test_alpha_out_of_range(alpha):
    x, seen = numbers(1, 1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    for call in (lambda: PLAIN.hyperlaplacian_energy(x, alpha), lambda: PLAIN.impute_by_prior(x, seen, alpha)):
        with pytest.raises(ValueError, match="alpha=.*above 0 and at most 2"):
            call()
    with pytest.raises(ValueError, match="k=0"):
        PLAIN.hyperlaplacian_log_prob(x, 1.0, 0)


@pytest.mark.parametrize("call, error, says", [
    (lambda x: PLAIN.hyperlaplacian_energy((255 * x).byte()), TypeError, "x.float.. / 255"),
    (lambda x: PLAIN.hyperlaplacian_energy(x[0]), ValueError, "n, channels, height, width"),
    (lambda x: PLAIN.hyperlaplacian_energy(x, 1, []), ValueError, "filters must be"),
    (lambda x: PLAIN.hyperlaplacian_energy(x, 1, [torch.zeros(1, 2)]), ValueError, "filters must be"),
    (lambda x: PLAIN.hyperlaplacian_energy(x, 1, eps=-1), ValueError, "eps=-1"),
    (lambda x: PLAIN.derivative_filters(3), ValueError, "order=3"),
    (lambda x: PLAIN.hyperlaplacian_energy(x, 1, [torch.tensor([[1.0, NAN]])]), ValueError, "finite kernels"),
    (lambda x: PLAIN.filter_response((255 * x).byte(), torch.tensor([[1.0, -1.0]])), TypeError, "wrap around"),
])
def test_bad_input_of_the_energy(call, error, says):
    with pytest.raises(error, match=says):
        call(numbers(1, 1, 4, 4))


# --- imputation and fills --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", FILLS)
def test_no_peek_and_observed_bit_for_bit(fill):
    x, seen = digits()
    filled = fill(x, seen)
    for junk in (NAN, 1e6, -math.inf):
        assert torch.equal(fill(torch.where(seen[:, None], x, junk), seen), filled)
    assert torch.equal(filled[seen[:, None]], x[seen[:, None]]) and torch.isfinite(filled).all()
    assert filled.min() >= -0.01 and filled.max() <= 1.01  # an average of observed pixels, solved to a few digits


def test_a_peeking_imputer_is_found():
    """Mutation: hidden entries are not blanked at the door."""
    x, seen = digits()
    peeking = copy_of(hyperlaplacian, ("return torch.where(seen, x, torch.zeros_like(x)), seen", "return x, seen"))
    peeked = [peeking.impute_by_prior(torch.where(seen[:, None], x, junk), seen) for junk in (0.0, 1e6)]
    assert not torch.equal(*peeked)


@pytest.mark.parametrize("fill", FILLS)
def test_a_picture_does_not_depend_on_its_company(fill):
    x, seen = digits(5)
    together = fill(x, seen)
    alone = torch.cat([fill(x[i : i + 1], seen[i : i + 1]) for i in (4, 2, 0)])
    torch.testing.assert_close(together[[4, 2, 0]], alone, atol=1e-4, rtol=0)  # sums are rounded in another order


@pytest.mark.parametrize("fill", FILLS)
def test_masks_of_both_shapes_and_one_for_each_channel(fill):
    x = numbers(3, 2, 7, 6)
    seen = independent_dropout((3, 2, 7, 6), 0.6, torch.Generator().manual_seed(1))
    own = [2] if fill is impute_by_prior else []  # convex, so that both ways lead to one minimum
    both = fill(x, seen, *own)
    for c in range(2):
        torch.testing.assert_close(fill(x[:, c : c + 1], seen[:, c], *own), both[:, c : c + 1], atol=1e-4, rtol=0)
    same = seen[:, :1].expand_as(x)
    torch.testing.assert_close(fill(x, same), fill(x, same[:, 0]), atol=0, rtol=0)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-2), (torch.bfloat16, 4e-2), (torch.float32, 1e-3)])
def test_dtypes(fill, dtype, tolerance):
    x, seen = digits(3)
    low = fill(x.to(dtype), seen, *([2] if fill is impute_by_prior else []))
    high = fill(x.double(), seen, *([2] if fill is impute_by_prior else []))
    assert low.dtype == dtype and (low.double() - high).abs().max() < tolerance


@pytest.mark.parametrize("fill", FILLS)
def test_small_and_empty(fill):
    one, seen = torch.full((2, 1, 1, 1), 0.3), torch.ones(2, 1, 1, dtype=torch.bool)
    assert torch.equal(fill(one, seen), one)
    assert fill(one[:0], seen[:0]).shape == (0, 1, 1, 1)
    x = numbers(2, 3, 4, 5)
    whole = fill(x, torch.ones(2, 4, 5, dtype=torch.bool))
    assert torch.equal(whole, x) and whole.data_ptr() != x.data_ptr()  # nothing missing: a copy
    row = torch.tensor([[[[0.0, NAN, NAN, 0.9, NAN]]]])
    assert torch.isfinite(fill(row, ~row[0].isnan())).all()
    flat = fill(torch.full((1, 1, 5, 5), 0.4), torch.eye(5, dtype=torch.bool)[None])
    assert torch.allclose(flat, torch.tensor(0.4), atol=1e-6)  # one value seen: that value everywhere
    single = torch.zeros(1, 6, 6, dtype=torch.bool)
    single[0, 2, 3] = True
    assert torch.allclose(fill(x[:1, :, :1, :1].expand(1, 3, 6, 6), single), x[:1, :, :1, :1], atol=1e-6)


@pytest.mark.parametrize("name", [f.__name__ for f in FILLS])
@pytest.mark.parametrize("change, error, says", [
    (lambda x, o: ((255 * x).byte(), o), TypeError, "x.float.. / 255"),
    (lambda x, o: ((255 * x).long(), o), TypeError, "x.float.. / 255"),
    (lambda x, o: (x[0], o), ValueError, "n, channels, height, width"),
    (lambda x, o: (x, o.float()), TypeError, "must be bool"),
    (lambda x, o: (x, o[:, :3]), ValueError, "n, height, width"),
    (lambda x, o: (x.index_fill(3, torch.tensor([1]), NAN), o), ValueError, "NaN or infinite at the observed position"),
    (lambda x, o: (x, o & (torch.arange(2) == 0)[:, None, None]), ValueError, "picture 1 has no observed pixel"),
    (lambda x, o: (x[:1, :, :1, :1], torch.zeros(1, 1, 1, dtype=torch.bool)), ValueError, "picture 0 has no observed"),
])
def test_bad_input_of_the_fills(name, change, error, says):
    x, seen = numbers(2, 1, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    seen[:, 0, 0] = False
    with pytest.raises(error, match=says):
        getattr(PLAIN, name)(*change(x, seen))


@pytest.mark.parametrize("own, says", [
    (dict(eps=0), "eps=0"), (dict(stages=0), "stages=0"), (dict(steps=0), "steps=0"),
    (dict(filters=[torch.ones(9, 9)]), "larger than the pictures"),
    (dict(start=torch.full((1, 1, 4, 4), NAN)), "finite wherever x is missing"),
    (dict(start=torch.zeros(1, 1, 1, 4)), "must have that of x"),
])
def test_bad_parameters_of_the_imputer(own, says):
    with pytest.raises(ValueError, match=says):
        PLAIN.impute_by_prior(numbers(1, 1, 4, 4), torch.eye(4, dtype=torch.bool)[None], **own)


def check_harmonic(module):
    """α = 2: every missing pixel is the average of its neighbours, as a dense solve says."""
    x, seen = numbers(2, 1, 5, 6), independent_dropout((2, 5, 6), 0.6, torch.Generator().manual_seed(2))
    z = module.impute_by_prior(x, seen, 2)
    for i in range(2):
        rows = torch.eye(30, dtype=torch.float64).reshape(30, 1, 5, 6)
        D = torch.cat([filter_response(rows, f).flatten(1).T for f in derivative_filters(1)])
        o = seen[i].flatten()
        exact = -torch.linalg.solve(D[:, ~o].T @ D[:, ~o], D[:, ~o].T @ D[:, o] @ x[i].flatten()[o])
        assert torch.allclose(z[i].flatten()[~o], exact, atol=1e-8)


@pytest.mark.parametrize("before, after", [
    ("residual = -gradient(z)", "residual = gradient(z)"),
    ("* missing\n", "* 1.0\n"),
    ("x[..., i : i + v.shape[-2], j : j + v.shape[-1]] += flipped[i, j] * v",
     "x[..., i : i + v.shape[-2], j : j + v.shape[-1]] += kernel[i, j] * v"),
])
def test_harmonic_fill_is_exact(before, after):
    """Mutations: uphill instead of down; observed pixels move too; the adjoint forgets to flip."""
    check_harmonic(hyperlaplacian)
    with pytest.raises(AssertionError):
        check_harmonic(copy_of(hyperlaplacian, (before, after)))


def check_minimum(module):
    """No single missing pixel can be moved to lower the energy, and annealing ends below a descent from the mean."""
    x, seen = digits(6, 0.6)
    x, energy = x.double(), lambda z: hyperlaplacian_energy(z, 2 / 3, eps=1e-2)
    own = dict(eps=1e-2, stages=80, verbose=False)
    z = module.impute_by_prior(x, seen, 2 / 3, **own)
    free = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(free).sum(), free)
    start = torch.where(seen[:, None], x, 0.1)
    (steep,) = torch.autograd.grad(energy(start.requires_grad_()).sum(), start)
    hidden = ~seen[:, None]
    assert slope[hidden].square().mean() < 1e-2 * steep[hidden].square().mean()
    there = module.impute_by_prior(x, seen, 2 / 3, start=start.detach(), **own)
    assert energy(z).mean() < energy(there).mean() and energy(z).mean() < energy(start).mean()


@pytest.mark.parametrize("before, after", [
    ("(1 + r.square()) ** (alpha / 2 - 1)", "(1 + r.square()) ** (1 - alpha / 2)"),
    ("(1 + r.square()) ** (alpha / 2 - 1)", "(1 + r.square()) ** (alpha - 1)"),
])
def test_the_imputer_minimizes_the_energy(before, after):
    """Mutations: the weights' exponent has the wrong sign; the half is missing."""
    check_minimum(hyperlaplacian)
    with pytest.raises(AssertionError):
        check_minimum(copy_of(hyperlaplacian, (before, after)))


def test_the_wrong_kernel_and_the_wrong_sign_do_not_restore():
    """PRFlow's equation 9 as printed and the kernel [1, 1]: both lose to the mean of the observed pixels."""
    x, seen = digits(20, 0.6)
    hidden = ~seen[:, None]
    mean = (x * seen[:, None]).sum((2, 3), keepdim=True) / seen[:, None].sum((2, 3), keepdim=True)

    def error(z):
        return (z - x)[hidden].square().mean().sqrt().item()

    base = error(torch.where(hidden, mean, x))
    assert error(impute_by_prior(x, seen, 2)) < 0.6 * base
    assert error(impute_by_prior(x, seen, 2, [f.abs() for f in derivative_filters(1)])) > base
    z = torch.where(hidden, mean, x)
    for _ in range(100):
        z.requires_grad_()
        (slope,) = torch.autograd.grad(-hyperlaplacian_energy(z, 1 / 3, eps=1e-2).sum(), z)
        z = torch.where(hidden, (z - 0.01 * slope).clamp(0, 1), x).detach()
    assert error(z) > 1.5 * base


def check_nearest(module):
    seen = independent_dropout((4, 9, 13), 0.9, torch.Generator().manual_seed(4))
    seen[:, 0, 0] = True
    x = torch.arange(4 * 9 * 13.0).reshape(4, 1, 9, 13)  # every value names its place
    place = torch.cartesian_prod(torch.arange(9.0), torch.arange(13.0))
    apart = torch.cdist(place, place)
    source = module.nearest_fill(x, seen).flatten(1).long() % 117
    least = torch.where(seen.flatten(1)[:, None], apart, math.inf).amin(2)
    assert torch.equal(apart[torch.arange(117).expand(4, -1), source], least)


def check_many_steps(module):
    """Far beyond the solution: conjugate gradients must stop where only rounding errors are left."""
    x, seen = numbers(64, 1, 4, 4).float(), numbers(64, 4, 4, seed=1) < 0.5
    seen[:, 0, 0] = True
    short, long = (module.impute_by_prior(x, seen, 2 / 3, stages=4, steps=n, verbose=False) for n in (40, 400))
    assert torch.isfinite(long).all() and torch.allclose(short, long, atol=1e-3)


def test_many_steps_do_no_harm():
    """Mutation: no floor under the residual, as it was: the last divisions are 0 / 0."""
    check_many_steps(PLAIN)
    with pytest.raises(AssertionError):
        module = copy_of(hyperlaplacian, ("(curvature > 0) & (norm > floor)", "curvature > 0"),
                                ("if not torch.isfinite(z).all():", "if False:"))
        check_many_steps(module)


def test_pictures_too_large_to_be_squared_are_refused():
    seen = torch.eye(4, dtype=torch.bool)[None]
    with pytest.raises(ValueError, match="too large for torch.float32: rescale"):
        PLAIN.impute_by_prior(numbers(1, 1, 4, 4).float() * 1e30, seen)


def test_nearest_is_nearest():
    """Mutations: city-block instead of straight distance; the row of the nearest pixel below is forgotten."""
    check_nearest(hyperlaplacian)
    for edit in (("(columns - j).square()", "(columns - j).abs() * 20"),
                 ("torch.where(rows[:, None] - above <= below - rows[:, None], above, below)", "above")):
        with pytest.raises((AssertionError, RuntimeError)):
            check_nearest(copy_of(hyperlaplacian, edit))


def check_bilinear(module):
    corners, seen = numbers(2, 3, 3, 4), torch.zeros(2, 9, 13, dtype=torch.bool)
    seen[:, ::4, ::4] = True
    x = torch.full((2, 3, 9, 13), NAN, dtype=torch.float64)
    x[..., ::4, ::4] = corners
    exact = torch.nn.functional.interpolate(corners, size=(9, 13), mode="bilinear", align_corners=True)
    assert torch.allclose(module.bilinear_fill(x, seen), exact)


def test_bilinear_is_bilinear_on_a_grid():
    """Mutations: the squared distance; one axis only."""
    check_bilinear(hyperlaplacian)
    for edit in (("(at - place).abs().clamp(min=1)", "(at - place).square().clamp(min=1)"),
                 ("for axis in (-1, -2):", "for axis in (-1, -1):")):
        with pytest.raises(AssertionError):
            check_bilinear(copy_of(hyperlaplacian, edit))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.floats(0.3, 0.95))
def test_fills_stay_between_the_observed_values(seed, height, width, channels, rate):
    x = numbers(2, channels, height, width, seed=seed)
    seen = independent_dropout((2, height, width), rate, torch.Generator().manual_seed(seed))
    seen[:, 0, 0] = True
    low = torch.where(seen[:, None], x, math.inf).amin((2, 3), keepdim=True)
    high = torch.where(seen[:, None], x, -math.inf).amax((2, 3), keepdim=True)
    for fill in FILLS:
        z = fill(x, seen)
        slack = 0.01 if fill is impute_by_prior else 1e-6  # conjugate gradients are stopped early
        assert (z >= low - slack).all() and (z <= high + slack).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fill", FILLS)
def test_gpu_and_cpu_agree(fill):
    x, seen = digits()
    assert (fill(x.double().cuda(), seen.cuda()).cpu() - fill(x.double(), seen)).abs().max() < 1e-3
    e = hyperlaplacian_energy(x.double().cuda(), 1 / 3, eps=1e-3).cpu()
    torch.testing.assert_close(e, hyperlaplacian_energy(x.double(), 1 / 3, eps=1e-3))


def test_energies_and_fills_are_deterministic():
    x, seen = digits(4)
    assert torch.equal(impute_by_prior(x, seen, 1 / 3), impute_by_prior(x, seen, 1 / 3))
    assert hyperlaplacian_energy(x, 1 / 3).shape == (4,)
