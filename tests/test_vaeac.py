"""VAEAC: what is hidden, cells by hand, an exact model, no peek, training, draws, densities, pictures, bad input.

A mutation is a copy of the module, without the hook that checks shapes, with a piece of its source replaced."""

import contextlib
import itertools
import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import Interruptible, copy_of, mutant_fails, refuses, seed, with_holes
from scipy.special import log_expit, log_softmax
from scipy.stats import gamma, multivariate_normal, norm
from sklearn.datasets import load_digits, load_iris
from torch import nn

from missingbook.foundations.imputer import DeepImputer, Layout, cell_mean
from missingbook.foundations.training import Noise, TrainingDiverged, TrainingRun, seeded
from missingbook.practice.pooling import impute_many, linear_regression, regress_each
from missingbook.vaes import vaeac
from missingbook.vaes.vae import effective_sample_size, importance_weighted_bound, reparameterize
from missingbook.vaes.vaeac import VAEACImputer, hide_cells

CPU = torch.device("cpu")
SMALL = dict(
    hidden=16,
    depth=1,
    latent=3,
    channels=(4, 8),
    blocks=1,
    max_epochs=2,
    min_steps=5,
    n_draws=2,
    n_importance=20,
    random_state=0,
    verbose=False,
    device="cpu",
)
MIXED = Layout(6, (0, 1), (2,), ((3, 6),))  # two numbers, a boolean, a category of three levels


def table(n=200, p=4, number=0):
    """Numbers of which two hidden causes explain most."""
    rng = np.random.default_rng(number)
    return rng.normal(size=(n, 2)) @ rng.normal(size=(2, p)) + 0.4 * rng.normal(size=(n, p))


def flowers(rate=0.3):
    """Iris with a category, levels, a boolean and whole numbers; with holes."""
    frame = load_iris(as_frame=True).data
    frame["kind"] = np.array(list("abc"), dtype=object)[load_iris().target]
    frame["size"] = pd.Categorical(
        np.array(list("sml"))[np.digitize(frame.iloc[:, 0], [5.4, 6.3])], list("sml"), ordered=True
    )
    frame["wide"] = (frame.iloc[:, 1] > 3).astype("boolean")
    frame["count"] = (frame.iloc[:, 2] * 10).round().astype("Int64")
    return frame.mask(np.random.default_rng(0).random(frame.shape) < rate)


# --- what is hidden --------------------------------------------------------------------------------------------------


def check_hide_cells(module):
    n = 20_000
    observed = torch.rand(n, 6, generator=seed()) > 0.3
    observed[:, 3:] = observed[:, 3:4].clone()
    everything = torch.ones(n, 6, dtype=torch.bool)
    for rate in (0.0, 0.2, 0.7, 1.0):
        shown = module.hide_cells(observed, MIXED, rate, Noise(0, CPU))
        assert not (shown & ~observed).any()  # missing cells are never shown
        assert ((shown.sum(0) / observed.sum(0)) - (1 - rate)).abs().max() < 0.015
        assert torch.equal(shown[:, 3], shown[:, 4]) and torch.equal(shown[:, 3], shown[:, 5])  # the block goes whole
        whole = module.hide_cells(everything, MIXED, rate, Noise(1, CPU))[:, :4].float()
        assert abs((whole[:, 0] * whole[:, 3]).mean() - (1 - rate) ** 2) < 0.015  # independent
    spread = module.hide_cells(everything, MIXED, None, Noise(0, CPU))
    counts = torch.bincount(spread[:, :4].sum(1), minlength=5) / n  # every number of seen columns equally often
    assert (counts - 0.2).abs().max() < 0.015 and torch.equal(spread[:, 3], spread[:, 5])


@pytest.mark.parametrize(
    "edit",
    [
        ("(lot >= rate)[", "(lot < rate)["),
        ("observed & (lot >= rate)", "(lot >= rate)"),
        ("[:, layout.owner().to(observed.device)]", "[:, torch.arange(layout.width) % layout.n_columns]"),
        ("return hide_more(observed, layout, noise)", "return hide_cells(observed, layout, 0.5, noise)"),
        (
            "noise.uniform(len(observed), layout.n_columns)",
            "noise.uniform(len(observed), 1).expand(-1, layout.n_columns)",
        ),
    ],
)
def test_hidden_cells(edit):
    """Mutations: the rate upside down; missing cells shown; blocks torn; U(0, 1) becomes ½; a row goes whole."""
    mutant_fails(vaeac, check_hide_cells, edit)


def check_hide_pattern(module):
    observed = torch.rand(300, 3 * 28 * 28, generator=seed()) > 0.1
    for name, low, high in (
        ("line", 25 / 28, 25 / 28),
        ("half", 0.5, 0.5),
        ("centre", 0.25, 0.25),
        ("rectangle", 0.25, 1),
    ):
        everything = torch.ones(300, 3 * 28 * 28, dtype=torch.bool)
        shown = module.hide_pattern(everything, (3, 28, 28), name, Noise(0, CPU)).view(300, 3, 28, 28)
        hidden = 1 - shown.float().mean((1, 2, 3))
        assert (hidden >= low - 1e-6).all() and (hidden <= high + 1e-6).all(), name
        assert torch.equal(shown[:, 0], shown[:, 1]) and torch.equal(shown[:, 0], shown[:, 2])
        box = shown[:, 0] if name == "line" else ~shown[:, 0]
        assert torch.equal(box, box.any(2)[:, :, None] & box.any(1)[:, None])  # rows times columns
        assert name == "centre" or len(shown[:, 0].unique(dim=0)) > 3  # drawn for every picture
        some = module.hide_pattern(observed, (3, 28, 28), name, Noise(0, CPU))
        assert torch.equal(some, observed & shown.flatten(1))
    odd = module.hide_pattern(torch.ones(5, 105, dtype=torch.bool), (3, 7, 5), "line", Noise(0, CPU))
    assert (odd.view(5, 3, 35).sum(2) == 5).all()  # 3 rows of 28 are one of 7


@pytest.mark.parametrize(
    "edit",
    [
        ("max(1, round(3 * shape[1] / 28))", "3"),
        ("rectangle_hidden(shape, 0.25, generator)", "rectangle_hidden(shape, 0.0, generator)"),
        ("observed & shown.to(observed.device)", "shown.to(observed.device)"),
        ("(len(observed), *shape[1:]), generator", "(1, *shape[1:]), generator"),
        (
            '"half": half_hidden',
            '"half": lambda shape, generator: torch.zeros(shape, dtype=torch.bool)',
        ),
    ],
)
def test_hidden_patterns(edit):
    """Mutations: a line of the wrong height; small rectangles; missing pixels shown; one for all; all hidden."""
    mutant_fails(vaeac, check_hide_pattern, edit)


# --- terms by hand ---------------------------------------------------------------------------------------------------


def check_reconstruction(module):
    output = torch.tensor([[0.3, -1.0, 0.5, 0.1, 0.2, 0.3]] * 4, requires_grad=True)
    x = torch.tensor(
        [
            [1.0, torch.nan, 1.0, 0.0, 1.0, 0.0],
            [1.0, 2.0, 0.0, 0.0, 0.0, 1.0],
            [torch.nan] * 6,
            [1.0, 2.0, torch.nan, torch.nan, torch.nan, torch.nan],
        ]
    )
    seen = torch.tensor([[False] * 6, [True, False, False, True, True, True], [False] * 6, [False, True] + [False] * 4])
    observed, sigma = ~x.isnan(), torch.tensor([[0.5, 2.0, 9.0, 9.0, 9.0, 9.0]])
    ours = module.reconstruction(output, x, observed & ~seen, MIXED, sigma)
    first = norm.logpdf(1.0, 0.3, 0.5)
    by_hand = [
        first + log_expit(0.5) + log_softmax([0.1, 0.2, 0.3])[1],
        norm.logpdf(2.0, -1.0, 2.0) + log_expit(-0.5),
        0.0,
        first,
    ]
    assert np.allclose(ours.detach(), by_hand, atol=1e-6)
    (slope,) = torch.autograd.grad(ours.sum(), output)
    assert torch.isfinite(slope).all()  # a NaN that drops out must not come back as a gradient
    values = torch.tensor([[0.0, 0.0, float(b), *(float(k == c) for k in range(3))] for b in (0, 1) for c in range(3)])
    target = torch.tensor([[False, False, True, True, True, True]]).expand(6, 6)
    total = module.reconstruction(output[:1].expand(6, 6), values, target, MIXED).exp().sum()
    assert math.isclose(total.item(), 1.0, rel_tol=1e-5)  # over both booleans and three categories


@pytest.mark.parametrize(
    "edit",
    [
        (
            "cell_log_prob(output, torch.where(target, x, 0.0), layout, sigma)",
            "cell_log_prob(output, x, layout, sigma)",
        ),
        (
            "torch.where(target, cell_log_prob(output, torch.where(target, x, 0.0), layout, sigma), 0.0).sum(1)",
            "cell_log_prob(output, torch.where(target, x, 0.0), layout, sigma).sum(1)",
        ),
        ("layout, sigma), 0.0).sum(1)", "layout, sigma), 0.0).mean(1)"),
        ("torch.where(target, x, 0.0), layout, sigma), 0.0)", "torch.where(target, x, 0.0), layout), 0.0)"),
    ],
)
def test_equation_9(edit):
    """Mutations: NaN in the gradient; seen and missing cells count; a mean in place of the sum; sigma forgotten."""
    mutant_fails(vaeac, check_reconstruction, edit)


def check_regularizer(module):
    sigma, mean = (torch.rand(50, 2, generator=seed(k), dtype=torch.float64) * 3 + 0.1 for k in (0, 1))
    for width, share in ((2.0, 0.5), (1e4, 1e-4)):
        ours = module.prior_regularizer(mean, sigma, width, share).numpy()
        by_scipy = (norm.logpdf(mean, 0, width) + gamma.logpdf(sigma, 1 + share, scale=1 / share)).sum(1)
        assert np.allclose(ours - ours[0], by_scipy - by_scipy[0], atol=1e-9)  # the constants drop out
    assert np.allclose(module.prior_regularizer(mean, sigma), ours) and np.ptp(ours) > 1e-5


@pytest.mark.parametrize(
    "edit",
    [
        ("(sigma.log() - sigma)", "(sigma - sigma.log())"),
        ("(2 * sigma_mu**2)", "(2 * sigma_mu)"),
        ("sigma_sigma * (sigma.log() - sigma)", "sigma.log() - sigma_sigma * sigma"),
        ("sigma_sigma: float | int = 1e-4", "sigma_sigma: float = 1e-3"),
    ],
)
def test_regularizer_is_a_gamma_density(edit):
    """Mutations: a sign; a square lost; the printed density, Gamma(2, σ_σ); another default."""
    mutant_fails(vaeac, check_regularizer, edit)


# --- networks --------------------------------------------------------------------------------------------------------


def check_memory(module):
    with seeded(0, CPU):
        net = module.TableNetworks(4, 8, hidden=8, depth=2, latent=3).double()
    inputs, z = (
        torch.randn(5, 8, generator=seed(), dtype=torch.float64),
        torch.randn(7, 5, 3, generator=seed(1), dtype=torch.float64),
    )
    kept = [F.leaky_relu(net.first_p(inputs))]
    for layer in net.layers_p:
        kept.append(kept[-1] + F.leaky_relu(layer.linear(kept[-1])))
    h = F.leaky_relu(net.first_g(z))
    for layer, remember, m in zip(
        net.layers_g, net.memories, reversed(kept), strict=True
    ):  # the paper's concatenations
        joined = torch.cat([layer.linear.weight, remember.weight], 1)
        h = h + F.leaky_relu(torch.cat([h, m.expand(7, 5, 8)], -1) @ joined.T + layer.linear.bias)
    joined = torch.cat([net.last_g.weight, net.input_memory.weight], 1)
    by_hand = torch.cat([h, inputs.expand(7, 5, 8)], -1) @ joined.T + net.last_g.bias
    parameters, memory = net.recall(inputs)
    assert torch.allclose(parameters, net.last_p(kept[-1])) and torch.allclose(net.generate(z, memory), by_hand)


@pytest.mark.parametrize(
    "edit",
    [
        ("zip(self.memories, reversed(kept), strict=True)]", "zip(self.memories, kept, strict=True)]"),
        ("h + F.leaky_relu(self.linear(h) + memory)", "h + F.leaky_relu(self.linear(h)) + memory"),
        ("self.last_g(h) + memory[-1]", "self.last_g(h)"),
    ],
)
def test_memory_is_a_concatenation(edit):
    """Mutations: the first memory to the first layer; added after the bend; the input forgotten."""
    mutant_fails(vaeac, check_memory, edit)


PICTURE = Layout(3 * 7 * 5, tuple(range(3 * 7 * 5)))


def built(module, kind):
    """A VAEAC whose zero weights are random, and its layout."""
    with seeded(0, CPU):
        layout = MIXED if kind == "table" else PICTURE
        nets = (
            module.TableNetworks(6, 12, 16, 2, 3)
            if kind == "table"
            else module.ImageNetworks((3, 7, 5), 6, (4, 8), 1, 3)
        )
        for weights in nets.parameters():
            if not weights.any():
                nn.init.normal_(weights, std=0.3)
        return module.VAEAC(layout, nets, 3), layout


def check_one_by_one(module):
    for kind in ("table", "images"):
        network, layout = built(module, kind)
        x, seen = torch.randn(4, layout.width, generator=seed()), torch.rand(4, layout.width, generator=seed(1)) > 0.5
        memory, z = network.recall(x, seen)[2], torch.randn(3, 4, 3, generator=seed(2))
        output, sigma = network.generate(z, memory)
        assert output.shape == sigma.shape == (12, layout.width) and (sigma >= network.sigma_min).all()
        for k, i in itertools.product(range(3), range(4)):  # row i of draw k stands at 4 k + i
            one, spread = network.generate(z[k, i : i + 1], [m[i : i + 1] for m in memory])
            assert torch.allclose(output[4 * k + i], one[0], atol=1e-5) and torch.allclose(
                sigma[4 * k + i], spread[0], atol=1e-5
            )
        assert not torch.allclose(output[0], output[4]) and not torch.allclose(output[0], output[1])


@pytest.mark.parametrize(
    "edit",
    [
        ("(h.view(draws, *m.shape) + m).view(h.shape)", "h + m.repeat_interleave(draws, 0)"),
        ("F.softplus(raw[:, width:]) + self.sigma_min", "F.softplus(raw[:, width:] - 20)"),
        (
            "[..., : self.shape[1], : self.shape[2]].reshape(*z.shape[:-1], -1)",
            "[..., : self.shape[1], : self.shape[2]].reshape(z.shape[1], z.shape[0], -1).transpose(0, 1)"
            " if z.dim() == 3 else self.up(z, memory)[..., : self.shape[1], : self.shape[2]].flatten(1)",
        ),
    ],
)
def test_all_draws_at_once_are_those_one_by_one(edit):
    """Mutations: a memory meets another row; sigma has no floor; pictures in another order."""
    mutant_fails(vaeac, check_one_by_one, edit)


def peek_case(module, kind):
    network, layout = built(module, kind)
    n = 6
    x, observed = torch.randn(n, layout.width, generator=seed()), torch.rand(n, layout.width, generator=seed(1)) > 0.3
    if kind == "table":
        observed[:, 4:] = observed[:, 3:4].clone()
    seen = module.hide_cells(observed, layout, 0.5, Noise(0, CPU))
    return network, x, observed, seen


def check_no_peek_inside(module):
    for kind in ("table", "images"):
        network, x, observed, seen = peek_case(module, kind)
        hidden_junk, missing_junk = torch.where(seen, x, 50.0), torch.where(observed, x, torch.nan)
        clean, dirty = network.recall(x, seen), network.recall(hidden_junk, seen)
        assert all(map(torch.equal, (*clean[:2], *clean[2]), (*dirty[:2], *dirty[2])))  # prior and memory
        z = torch.randn(2, 6, 3, generator=seed(3))
        assert all(map(torch.equal, network.generate(z, clean[2]), network.generate(z, dirty[2])))
        q = network.propose(x, seen, observed)
        assert all(map(torch.equal, q, network.propose(missing_junk, seen, observed)))
        assert not torch.equal(q[0], network.propose(hidden_junk, seen, observed)[0])  # what is hidden it must see
        blank = torch.where(observed, x, 0.0)
        assert not torch.equal(q[0], network.propose(blank, seen, torch.ones_like(observed))[0])  # zeros, or holes?
        eps = torch.randn(4, 6, 3, generator=seed(4))
        for value, noise in ((module.vaeac_bound, eps[0]), (module.log_weights, eps)):
            clean, missing, hidden = (value(network, v, observed, seen, noise) for v in (x, missing_junk, hidden_junk))
            assert torch.isfinite(missing).all() and torch.equal(missing, clean) and not torch.equal(hidden, clean)


@pytest.mark.parametrize(
    "edit",
    [
        ("[soften(torch.where(seen, x, 0.0)), seen.to(x.dtype)], 1)", "[x, seen.to(x.dtype)], 1)"),
        ("[soften(torch.where(observed, x, 0.0)), seen", "[x, seen"),
        ("[soften(torch.where(observed, x, 0.0)), seen", "[torch.where(seen, x, 0.0), seen"),
        ("seen.to(x.dtype), observed.to(x.dtype)], 1)", "seen.to(x.dtype), seen.to(x.dtype)], 1)"),
        ("output, x, observed & ~seen, network.layout", "output, x, ~seen, network.layout"),
        ("reparameterize(mean_q, sigma_q, eps), observed & ~seen", "reparameterize(mean_q, sigma_q, eps), ~seen"),
    ],
)
def test_who_sees_what(edit):
    """Mutations: the prior peeks; the proposal peeks at missing cells, is blind, or takes them for hidden ones;
    missing cells are scored, by the bound and by the weights."""
    mutant_fails(vaeac, check_no_peek_inside, edit)


# --- the model where all is known ------------------------------------------------------------------------------------


def raw(sigma):
    """What softplus + 0.001 turns into sigma."""
    return math.log(math.expm1(sigma - 1e-3))


class Known(nn.Module):
    """z | x₁ ~ N(.8 x₁, .6²), x₂ | z ~ N(z, .5²), and the posterior; `wide` multiplies its standard deviation."""

    def __init__(self, wide=1.0):
        super().__init__()
        self.wide, self.gain = wide, 0.36 / (0.36 + 0.25)

    def propose(self, inputs):
        mean = 0.8 * inputs[:, :1] + self.gain * (inputs[:, 1:2] - 0.8 * inputs[:, :1])
        return torch.cat([mean, torch.full_like(mean, raw(self.wide * 0.6 * math.sqrt(1 - self.gain)))], 1)

    def recall(self, inputs):
        mean = 0.8 * inputs[:, :1]
        return torch.cat([mean, torch.full_like(mean, raw(0.6))], 1), []

    def generate(self, z, memory):
        return torch.cat([torch.zeros_like(z), z], -1)


def known(module, wide, n=60):
    """(network, pairs, observed, seen, log p(x₂ | x₁)) of the two-number model."""
    pair = torch.randn(n, 2, generator=seed()).clamp(-3, 3)  # what lies farther out is softened
    shown, both = torch.tensor([[True, False]]).expand(n, 2), torch.ones(n, 2, dtype=torch.bool)
    exact = torch.from_numpy(norm.logpdf(pair[:, 1], 0.8 * pair[:, 0], math.sqrt(0.61))).float()
    return module.VAEAC(Layout(2, (0, 1)), Known(wide), 1, sigma=0.5), pair, both, shown, exact


def check_bound(module):
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)  # exact for what is quadratic in eps
    for wide in (1.0, 0.5, 2.0):
        network, pair, both, shown, exact = known(module, wide)
        values = torch.stack(
            [module.vaeac_bound(network, pair, both, shown, torch.full((60, 1), float(e))) for e in nodes]
        )
        bound = (torch.tensor(weights / weights.sum()).float()[:, None] * values).sum(0)
        apart = math.log(1 / wide) + (wide**2 - 1) / 2
        leash = 1e-4 * (math.log(0.6) - 0.6) - (0.8 * pair[:, 0]) ** 2 / 2e8
        assert torch.allclose(exact - bound, apart - leash, atol=1.5e-5)


@pytest.mark.parametrize(
    "edit",
    [
        ("normal_kl(mean_q, sigma_q, mean_p, sigma_p)) + ", "normal_kl(mean_p, sigma_p, mean_q, sigma_q)) + "),
        ("+ prior_regularizer(mean_p, sigma_p)", "- prior_regularizer(mean_p, sigma_p)"),
        ("reparameterize(mean_q, sigma_q, eps), memory", "reparameterize(mean_p, sigma_p, eps), memory"),
    ],
)
def test_the_bound_misses_the_exact_value_by_the_divergence(edit):
    """Mutations: the divergence the other way round; the leash pushes; z drawn from the prior."""
    mutant_fails(vaeac, check_bound, edit)


def check_weights(module):
    network, pair, both, shown, exact = known(module, 1.0)
    weights = module.log_weights(network, pair, both, shown, torch.randn(50, 60, 1, generator=seed(1)))
    assert torch.allclose(weights, exact.expand(50, 60), atol=1e-4)  # the posterior itself: each weight is p(x₂ | x₁)
    network, pair, both, shown, exact = known(module, 2.0)
    eps = torch.randn(20_000, 60, 1, generator=seed(1))
    weights = module.log_weights(network, pair, both, shown, eps)
    assert torch.allclose(importance_weighted_bound(weights), exact, atol=0.05)
    shares = effective_sample_size(weights) / 20_000  # of N(0, 1) drawn from N(0, 2²): √(2·4 − 1) / 4
    assert torch.allclose(shares, torch.full((60,), math.sqrt(7) / 4), atol=0.02)
    same = module.log_weights(network, pair, both, shown, eps[:30, :1])  # one row of noise serves all rows
    assert torch.allclose(
        same[:, 7], module.log_weights(network, *(t[7:8] for t in (pair, both, shown)), eps[:30, :1])[:, 0]
    )


@pytest.mark.parametrize(
    "edit",
    [
        ("log_p + normal_log_prob(z, mean_p, sigma_p) -", "log_p -"),
        ("log_p + normal_log_prob(z, mean_p, sigma_p) -", "log_p + normal_log_prob(z, mean_p, sigma_p) +"),
        (".view(z.shape[:2])", ".view(z.shape[1], -1).T"),
    ],
)
def test_importance_weights(edit):
    """Mutations: no prior; the proposal multiplied; draws and rows change places."""
    mutant_fails(vaeac, check_weights, edit)


def check_score(module):
    network, pair, both, shown, exact = known(module, 1.0)
    for chunk in (7, 512):
        assert torch.isclose(
            module.importance_score(network, pair, both, shown, Noise(0, CPU), 5, chunk), -exact.mean(), atol=1e-4
        )
    network, pair, both, shown, exact = known(module, 2.0)
    eps = Noise(0, CPU).normal(60, 25, 1).transpose(0, 1)
    by_hand = importance_weighted_bound(
        vaeac.log_weights(vaeac.VAEAC(network.layout, Known(2.0), 1, 0.5), pair, both, shown, eps)
    )
    assert torch.isclose(module.importance_score(network, pair, both, shown, Noise(0, CPU)), -by_hand.mean(), atol=1e-5)


@pytest.mark.parametrize(
    "edit",
    [
        ("return -in_chunks(value", "return in_chunks(value"),
        ("noise.normal(len(x), k, network.latent)", "noise.normal(len(x), 1, network.latent)"),
        ("chunk=chunk, home=x.device).mean()", "chunk=chunk, home=x.device).sum()"),
    ],
)
def test_score_of_an_epoch(edit):
    """Mutations: the worst epoch wins; one draw in place of 25; a sum over rows."""
    mutant_fails(vaeac, check_score, edit)


# --- training --------------------------------------------------------------------------------------------------------


def watched(module, scores, fraction=0.25, patience=None):
    """Train on 100 rows that can be told apart; note what is asked for, and the weights after each epoch."""
    x = torch.arange(100.0)[:, None] + torch.zeros(1, 3)
    observed = torch.rand(100, 3, generator=seed()) < 0.8
    run, seen_by = TrainingRun(0, "cpu", verbose=False, patience=patience), {"steps": [], "judged": [], "after": []}
    with seeded(0, CPU):
        layout = Layout(3, (0, 1, 2))
        network = module.VAEAC(layout, module.TableNetworks(3, 6, 8, 1, 2), 2)

        def bound(network, x, observed, seen, eps):
            seen_by["steps"].append((x[:, 0].clone(), observed, seen))
            return module.vaeac_bound(network, x / 100, observed, seen, eps)

        def score(network, x, observed, seen, noise):
            seen_by["judged"].append((x[:, 0].clone(), seen))
            seen_by["after"].append([w.detach().clone() for w in network.parameters()])
            return torch.tensor(scores[len(seen_by["judged"]) - 1])

        module.train_vaeac(
            network,
            x,
            observed,
            run,
            lambda o, noise: module.hide_cells(o, layout, 0.3, noise),
            len(scores),
            32,
            1e-3,
            fraction,
            10,
            bound,
            score,
        )
    return network, run.history, seen_by


def check_training(module):
    network, history, seen_by = watched(module, [3.0, 1.0, 2.0, 5.0])
    assert len(seen_by["steps"]) == 4 * 12  # 75 rows are 3 batches; 4 passes make 10 steps or more
    for epoch in range(4):
        rows = torch.cat([x for x, _, _ in seen_by["steps"][12 * epoch : 12 * (epoch + 1)]])
        values, counts = rows.unique(return_counts=True)
        assert len(values) == 75 and (counts == 4).all()
    judged, shown = seen_by["judged"][0]
    assert len(judged) == 500 and len(judged.unique()) == 25 and not np.isin(judged, values).any()
    assert all(torch.equal(s, shown) for _, s in seen_by["judged"])  # every epoch is asked the same
    assert all(not (seen & ~o).any() for _, o, seen in seen_by["steps"])
    (_, o, a), (_, p, b) = seen_by["steps"][:2]
    both = (o & p)[: len(b)]
    assert (a != b)[both].float().mean() > 0.2  # b is drawn anew in every step
    assert all(map(torch.equal, network.parameters(), seen_by["after"][1]))  # the second epoch was the best
    assert list(history.columns) == ["loss", "validation", "seconds"] and history["validation"].tolist() == [3, 1, 2, 5]
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert len(watched(module, [1.0, 2.0, 2.0, 2.0, 2.0], patience=2)[1]) == 3
    alone = watched(module, [0.0] * 3, fraction=0.0, patience=1)
    assert len(alone[1]) == 3 and alone[2]["judged"] == [] and "validation" not in alone[1]


@pytest.mark.parametrize(
    "edit",
    [
        ("passes = math.ceil(min_steps / ", "passes = math.ceil(1 / "),
        ("run.watch(value)", "pass"),
        ("run.batches(*learn, ", "run.batches(x, observed, "),
        (
            "seen, eps = hide(observed_batch, run.noise),",
            "seen, eps = observed_batch & hide(torch.ones_like(observed_batch), Noise(0, run.device)),",
        ),
        ('"loss": -bound(', '"loss": 0 * bound('),
        ("run.stopping.patience if n_judge else None", "run.stopping.patience if n_judge else 0"),
    ],
)
def test_training(edit):
    """Mutations: too few steps; the last epoch stays; judges teach; one b for all; nothing is learned; no epoch."""
    mutant_fails(vaeac, check_training, edit)


class Stopped(Interruptible, VAEACImputer):
    """Ctrl-C before epoch `stop`; where not `kept`, the run forgets the optimizer."""

    kept = True

    def __init__(self, **common):
        super().__init__(**common)

    def _train(self, network, x, observed, run):
        keep = run.keep
        run.keep = lambda **parts: keep(**{k: v for k, v in parts.items() if self.kept or k != "optimizer"})
        super()._train(network, x, observed, run)


def test_an_interrupted_fit_goes_on_bit_for_bit(tmp_path):
    """Mutation (run below): the optimizer is not stored."""
    X, options = flowers(), SMALL | {"max_epochs": 6}
    whole = Stopped(**options).fit(X)

    def resumed(kept):
        imputer = Stopped(**options, checkpoint=str(tmp_path / f"fit{kept}"))
        imputer.stop, imputer.kept = 3, kept
        with pytest.raises(KeyboardInterrupt):
            imputer.fit(X)
        imputer.stop = None
        imputer.fit(X)
        assert imputer.begun == [3, 4, 5]
        return imputer

    again = resumed(True)
    assert again.history_.drop(columns="seconds").equals(whole.history_.drop(columns="seconds"))
    assert all(a.equals(b) for a, b in zip(again.sample(X, 2), whole.sample(X, 2), strict=True))
    assert not resumed(False).history_["loss"].equals(whole.history_["loss"])


@pytest.mark.filterwarnings("ignore:the loss became NaN")
def test_a_diverged_training_is_reported():
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        VAEACImputer(**SMALL, learning_rate=1e8, validation_fraction=0.0).fit(table())


# --- completions -----------------------------------------------------------------------------------------------------


def test_mixed_tables_keep_what_was_observed_and_fill_with_what_exists():
    holes = flowers()
    imputer = VAEACImputer(**SMALL).fit(holes)
    for filled in (imputer.transform(holes), *imputer.sample(holes, 2)):
        assert filled.dtypes.equals(holes.dtypes) and not filled.isna().any(axis=None)
        for column in holes:
            seen = holes[column].notna()
            assert filled.loc[seen, column].equals(holes.loc[seen, column])
        assert filled["kind"].isin(list("abc")).all() and filled["wide"].isin([True, False]).all()
        assert filled["size"].cat.ordered and list(filled["size"].cat.categories) == list("sml")
    drawn = pd.concat(imputer.sample(holes, 5))
    lost = drawn[holes["kind"].isna().to_numpy().tolist() * 5]
    assert lost["kind"].nunique() == 3  # draws, not the likeliest
    strange = holes.head(4).copy()
    strange.loc[strange.index[0], "kind"] = "orchid"
    with pytest.raises(ValueError, match="orchid"):
        imputer.transform(strange)


def encoded_draws(imputer, X, n):
    """Draws before they are decoded: what rounding to categories would hide is seen."""
    x, observed = imputer._encode(X)
    return imputer._all_draws(x, observed, imputer.seed_, n)


def check_draws(module):
    holes, numbers = pd.concat([flowers(), flowers()], ignore_index=True), [0, 1, 2, 3]
    imputer = module.VAEACImputer(**SMALL).fit(holes)
    x, observed = imputer._encode(holes)
    six = encoded_draws(imputer, holes, 6)
    for k in range(6):
        assert torch.allclose(six[k], imputer._one_draw(x, observed, imputer.seed_, k), atol=1e-5)
    assert (six[0] - six[1])[:, numbers].abs().median() > 0.1
    assert (six[0, :150] - six[0, 150:])[:, numbers].abs().median() > 0.1  # twins in other rows draw on their own
    for n, at_once, chunk in (
        (1, 2**13, 256),
        (3, 2**13, 256),
        (4, 1, 256),
        (4, 700, 256),
        (4, 64, 37),
        (2, 2**13, 1000),
    ):
        imputer._at_once, imputer._chunk = at_once, chunk
        assert torch.allclose(encoded_draws(imputer, holes, n), six[:n], atol=1e-5), (n, at_once, chunk)


@pytest.mark.parametrize(
    "edit",
    [
        ("RowNoise(seed, k, int(row[0]), x.device)", "RowNoise(seed, k, 0, x.device)"),
        ("parts = zip(output.chunk(len(noises)), noises,", "parts = zip(output.chunk(len(noises)), noises[::-1],"),
        (
            "torch.stack([noise.normal(len(x), network.latent) for noise in group])",
            "torch.stack(len(group) * [group[0].normal(len(x), network.latent)])",
        ),
        ("noises[i : i + few] for i in range(0, len(noises), few)", "noises[:few] for i in range(0, len(noises), few)"),
    ],
)
def test_draws_depend_on_nothing_but_their_number_and_row(edit):
    """Mutations: a row's place in its chunk decides; noise of another draw; one z; some repeat."""
    mutant_fails(vaeac, check_draws, edit)


def check_transform(module):
    holes = flowers()
    imputer = module.VAEACImputer(**(SMALL | {"n_draws": 7})).fit(holes)
    x, observed = imputer._encode(holes)
    whole = imputer._complete(x, observed)
    assert torch.allclose(imputer._complete(x[40:43], observed[40:43]), whole[40:43], atol=1e-5)
    assert torch.allclose(imputer._complete(x.flip(0), observed.flip(0)), whole.flip(0), atol=1e-5)
    imputer._at_once = 1
    assert torch.allclose(imputer._complete(x, observed), whole, atol=1e-5)
    b = imputer.encoder_.blocks_
    kind = next(block for block in b if block.one_hot)
    assert torch.allclose(whole[:, kind.start : kind.stop].sum(1), torch.ones(150, dtype=torch.float64), atol=1e-5)
    z = torch.stack(
        [
            s * torch.randn((1, 3), generator=module.SharedNoise(0, k, CPU).generator)
            for k, s in zip(range(7), itertools.cycle((1, -1)))
        ]
    ).expand(7, 150, 3)  # mirrored in pairs
    mean, sigma, memory = imputer.network_.recall(x, observed)
    expected = (
        cell_mean(imputer.network_.generate(mean + sigma * z, memory)[0], imputer.network_.layout)
        .view(7, 150, -1)
        .mean(0)
    )
    assert torch.allclose(whole.float(), expected.detach(), atol=1e-4)


@pytest.mark.parametrize(
    "edit",
    [
        ("SharedNoise(self.seed_, k, x.device) for k in", "RowNoise(self.seed_, k, 0, x.device) for k in"),
        (
            "self._complete_with(network, x, observed, noises, True).double()",
            "self._complete_with(network, x, observed, noises, False).double()",
        ),
        (
            "network.recall(x.flatten(1), observed.flatten(1))\n        few",
            "network.recall(x.flatten(1) + x.mean(), observed.flatten(1))\n        few",
        ),
    ],
)
def test_transform_is_the_mean_of_what_is_expected(edit):
    """Mutations: a row's place decides; cells are drawn; other rows are looked at."""
    mutant_fails(vaeac, check_transform, edit)


def test_noise_of_cells_can_be_left_out():
    holes = with_holes(table())
    lost = np.isnan(holes)
    spread = {}
    for on in (True, False):
        draws = VAEACImputer(**SMALL, sigma=1.0, cell_noise=on).fit(holes).sample(holes, 40)[:, lost]
        spread[on] = draws.std(0).mean() / np.nanstd(holes)
    assert spread[True] > 0.8 and 0 < spread[False] < 0.6 * spread[True]


# --- densities -------------------------------------------------------------------------------------------------------

LOADINGS = np.random.default_rng(0).normal(size=(5, 2))
COVARIANCE = LOADINGS @ LOADINGS.T + 0.3 * np.eye(5)
MADE = {}


def gaussian():
    """(imputer, complete test rows, the same with holes): five columns with a known covariance; fitted once."""
    if not MADE:
        rng = np.random.default_rng(1)
        complete = rng.multivariate_normal(np.zeros(5), COVARIANCE, size=3000)
        seen = rng.random(complete.shape) > 0.4
        seen[~seen.any(1), 0] = True
        holes = np.where(seen, complete, np.nan)
        imputer = VAEACImputer(
            hidden=32,
            depth=1,
            latent=4,
            max_epochs=EPOCHS,
            batch_size=128,
            min_steps=1,
            learning_rate=3e-3,
            random_state=0,
            verbose=False,
            device="cpu",
            n_importance=100,
        ).fit(holes[:2000])
        MADE["it"] = imputer, complete[2000:], holes[2000:]
    return MADE["it"]


EPOCHS = 40


def test_intervals_of_draws_cover():
    """Mutations, on the fitted model: z alone, without the noise of cells; sigma twice as large."""
    imputer, complete, holes = gaussian()
    hidden = np.isnan(holes)

    def coverage(model):
        draws, truth = model.sample(holes, 100)[:, hidden], complete[hidden]
        low, high = np.quantile(draws, [0.05, 0.95], axis=0, method="weibull")  # the default covers 88 %
        return ((truth >= low) & (truth <= high)).mean()

    assert hidden.sum() > 1900 and 0.88 <= coverage(imputer) <= 0.92
    quiet = copy_of(vaeac, ("mean or not self.cell_noise)", "True)"))
    loud = copy_of(vaeac, ("cell_draw(o, network.layout, noise, s)", "cell_draw(o, network.layout, noise, 2 * s)"))
    for module in (quiet, loud):
        mutant = module.VAEACImputer(**imputer.get_params())
        vars(mutant).update({k: v for k, v in vars(imputer).items() if k.endswith("_")})
        assert not 0.88 <= coverage(mutant) <= 0.92


def test_density_against_the_exact_one_and_against_the_prior():
    imputer, complete, holes = gaussian()
    rows, given = complete[:400], np.tile(np.arange(5) < 2, (400, 1))
    joint = multivariate_normal(np.zeros(5), COVARIANCE).logpdf(rows)
    exact = {None: joint, "given": joint - multivariate_normal(np.zeros(2), COVARIANCE[:2, :2]).logpdf(rows[:, :2])}
    for name, g in ((None, None), ("given", given)):
        ours, ess = imputer.log_prob(rows, g), imputer.effective_sample_size(rows, g)
        assert (
            ours.dtype == np.float64
            and ours.shape == (400,)
            and exact[name].mean() - 1.2 < ours.mean() < exact[name].mean()
        )
        assert ((ess >= 1 - 1e-6) & (ess <= 100 + 1e-6)).all() and ess.mean() > 20


def test_weights_from_the_proposal_are_worth_more_than_draws_from_the_prior():
    """Three columns that one hidden cause explains nearly whole, all hidden in training."""
    rng = np.random.default_rng(0)
    complete = rng.normal(size=(1300, 1)) + 0.3 * rng.normal(size=(1300, 3))
    own = SMALL | dict(hide_rate=1.0, hidden=32, max_epochs=15, min_steps=50, learning_rate=5e-3, n_importance=20)
    imputer, rows = VAEACImputer(**own).fit(complete[:1000]), complete[1000:]
    exact = multivariate_normal(np.zeros(3), np.ones((3, 3)) + 0.09 * np.eye(3)).logpdf(rows).mean()
    x, observed = imputer._encode(rows)
    with torch.inference_mode():
        mean, sigma, memory = imputer.network_.recall(x, torch.zeros_like(observed))
        z = reparameterize(mean, sigma, torch.randn(20, 300, 3, generator=seed()))
        output, spread = imputer.network_.generate(z, memory)
        whole, layout = observed.repeat(20, 1), imputer.network_.layout
        log_p = vaeac.reconstruction(output, x.repeat(20, 1), whole, layout, spread).view(20, 300)
    prior = importance_weighted_bound(log_p).mean().item() - float(imputer._log_spread().sum())
    assert prior < imputer.log_prob(rows).mean() - 0.02 and imputer.log_prob(rows).mean() < exact


def check_units(module):
    frame = flowers().dropna().drop(columns=["size", "count"])
    a, b = frame.columns[:2]
    scaled = frame.assign(**{a: 10 * frame[a]})
    one, ten = (module.VAEACImputer(**SMALL).fit(f) for f in (frame, scaled))
    given = frame.notna()
    given[a] = False
    alone = one.log_prob(frame, given)
    assert np.allclose(one.log_prob(frame) - ten.log_prob(scaled), math.log(10), atol=1e-3)
    assert np.allclose(alone - ten.log_prob(scaled, given.to_numpy()), math.log(10), atol=1e-3)
    given[a], given[b] = True, False  # the scaled column is given: it is no longer in the density
    assert np.allclose(one.log_prob(frame, given), ten.log_prob(scaled, given), atol=1e-3)
    target, x = given.to_numpy() & False, one._encode(frame)[0]
    target[:, 0] = True
    pair = x[:, :1] * one.encoder_.blocks_[0].spread
    assert np.allclose(pair.numpy()[:, 0] - pair.numpy()[0, 0], frame[a] - frame[a].iloc[0], atol=1e-4)


@pytest.mark.parametrize(
    "edit",
    [
        ("target.double() @ self._log_spread()", "0 * (target.double() @ self._log_spread())"),
        ("return values, rows[1] & ~rows[2]", "return values, rows[1]"),
        ("values - target.double()", "values + target.double()"),
    ],
)
def test_densities_are_in_the_columns_own_units(edit):
    """Mutations: encoded units; what is given counts; the wrong sign."""
    mutant_fails(vaeac, check_units, edit)


def test_given_refuses_and_forms_agree():
    X = table()
    imputer, given = VAEACImputer(**SMALL).fit(X), np.arange(4) < 2
    whole = np.tile(given, (200, 1))
    for wrong in (given, whole[:3], whole[:, :3], True):
        with pytest.raises(ValueError, match="mark every cell"):
            imputer.log_prob(X, wrong)
        with pytest.raises(ValueError, match="mark every cell"):
            imputer.effective_sample_size(X, wrong)
    named = pd.DataFrame(X, columns=list("abcd"))
    by_name = VAEACImputer(**SMALL).fit(named)
    for mask in (whole, pd.DataFrame(whole, columns=named.columns)):
        assert np.allclose(by_name.log_prob(named, mask), imputer.log_prob(X, whole), atol=1e-5)
    holes = np.where(whole, np.nan, X)  # a given cell that is missing tells nothing
    assert np.allclose(imputer.log_prob(holes, whole), imputer.log_prob(holes), atol=1e-5)
    assert imputer.log_prob(X[:0]).shape == imputer.effective_sample_size(X[:0], whole[:0]).shape == (0,)


# --- pictures --------------------------------------------------------------------------------------------------------


def bars(n=400):
    """Pictures of 2×2 pixels: the left or the right column is black, with one pixel in ten turned over."""
    rng = np.random.default_rng(0)
    left = rng.random((n, 1, 1, 1)) < 0.3
    x = np.where(left, [[[1, 0], [1, 0]]], [[[0, 1], [0, 1]]])
    return np.abs(x - (rng.random(x.shape) < 0.1)).astype("float32")


def check_bernoulli(module):
    x = bars()
    imputer = module.VAEACImputer(
        **(SMALL | {"channels": (), "max_epochs": 8, "min_steps": 40, "learning_rate": 5e-3, "n_importance": 2000}),
        pixels="bernoulli",
        validation_fraction=0.0,
    ).fit(x)
    every = np.array(list(itertools.product([0, 1], repeat=4)), dtype="float32").reshape(16, 1, 2, 2)
    chances = np.exp(imputer.log_prob(every))
    assert abs(chances.sum() - 1) < 0.03
    drawn = imputer.sample(np.full((4000, 1, 2, 2), np.nan, dtype="float32"), 1)[0].reshape(4000, 4)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    often = np.array([(drawn == e.reshape(4)).all(1).mean() for e in every])
    assert np.abs(often - chances).max() < 0.04
    truth = np.array([(x.reshape(-1, 4) == e.reshape(4)).all(1).mean() for e in every])
    assert np.abs(truth - chances).max() < 0.2
    upper = np.zeros(every.shape, dtype=bool)
    upper[:, :, 0] = True
    shares = np.exp(imputer.log_prob(every, upper)).reshape(4, 4)  # product: the first two pixels change slowest
    assert np.abs(shares.sum(1) - 1).max() < 0.03


@pytest.mark.parametrize(
    "edit",
    [
        (
            'Layout(len(cells), (), cells) if self.pixels == "bernoulli"',
            'Layout(len(cells), cells) if self.pixels == "x"',
        ),
        (
            "log_weights(network, x, observed, seen, eps.to(x.device))",
            "log_weights(network, x, observed, seen, 2 * eps.to(x.device))",
        ),
    ],
)
def test_probabilities_of_black_and_white_pictures_sum_to_one(edit):
    """Mutations: pixels are normal after all; draws that are not the proposal's."""
    mutant_fails(vaeac, check_bernoulli, edit)


def test_a_grey_scale_of_zeros_and_255_is_a_probability_too():
    """Mutation: the density of a pixel's own unit is taken off."""
    x, coins = 255 * bars(100), dict(pixels="bernoulli", **(SMALL | {"channels": ()}))
    assert np.allclose(
        VAEACImputer(**coins).fit(x).log_prob(x), VAEACImputer(**coins).fit(x / 255).log_prob(x / 255), atol=1e-5
    )
    loud = copy_of(vaeac, ('if self._images() and self.pixels == "bernoulli":', "if False:"))
    assert loud.VAEACImputer(**coins).fit(x).log_prob(x).mean() < VAEACImputer(**coins).fit(x).log_prob(x).mean() - 20


@pytest.mark.parametrize(
    "shape, own",
    [
        ((40, 3, 7, 5), {}),
        ((40, 3, 7, 5), {"channels": (4, 4, 4, 4), "pixels": "bernoulli"}),
        ((40, 1, 5, 9), {"pattern": "half"}),
        ((40, 1, 7, 5), {"pattern": "rectangle", "channels": ()}),
        ((1, 1, 8, 8), {"pattern": "line"}),
        ((40, 2, 1, 1), {}),
        ((40, 3, 7, 5), {"pattern": "centre", "sigma": 0.5}),
    ],
)
def test_pictures_of_any_size(shape, own, tmp_path):
    x = np.random.default_rng(0).random(shape).astype("float32")
    x = np.round(x) if own.get("pixels") else x
    holes = with_holes(x).astype("float32")
    imputer = VAEACImputer(**(SMALL | own)).fit(holes)
    imputer.save(tmp_path / "model")
    loaded, seen = DeepImputer.load(tmp_path / "model"), ~np.isnan(holes)
    for model in (imputer, loaded):
        for filled in (model.transform(holes), *model.sample(holes, 2)):
            assert filled.shape == shape and filled.dtype == np.float32
            assert np.isfinite(filled).all() and np.array_equal(filled[seen], holes[seen])
    assert np.array_equal(imputer.sample(holes, 2), loaded.sample(holes, 2))
    assert (
        np.array_equal(imputer.log_prob(holes), loaded.log_prob(holes)) and np.isfinite(imputer.log_prob(holes)).all()
    )


def test_digits_are_better_than_their_mean():
    x = (load_digits().images[:600, None] / 16).astype("float32")
    shown = (
        vaeac.hide_pattern(torch.ones(100, 64, dtype=torch.bool), (1, 8, 8), "half", Noise(1, CPU))
        .view(100, 1, 8, 8)
        .numpy()
    )
    own = SMALL | dict(pattern="half", latent=8, hidden=64, channels=(), max_epochs=8, min_steps=50, learning_rate=2e-3)
    filled = VAEACImputer(**own).fit(x[:500]).transform(np.where(shown, x[500:], np.nan))
    ours, plain = (
        np.square(guess - x[500:])[~shown].mean()
        for guess in (filled, np.broadcast_to(x[:500].mean(0), (100, 1, 8, 8)))
    )
    assert ours < 0.85 * plain


# --- after imputation ------------------------------------------------------------------------------------------------


def test_pooling_runs_on_its_draws():
    imputer, complete, holes = gaussian()
    names = list("abcde")
    many = [pd.DataFrame(t, columns=names) for t in impute_many(imputer, holes, 10, verbose=False)]
    fits, pooled = regress_each(many, "a", ["b", "c"]), linear_regression(many, "a", ["b", "c"])
    exact = np.linalg.solve(COVARIANCE[1:3, 1:3], COVARIANCE[1:3, 0])
    assert fits.estimates.shape == (10, 3) and (pooled["between"] > 0).all()
    assert np.abs(pooled.loc[["b", "c"], "estimate"] - exact).max() < 0.15


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own, words",
    [
        ({"hide_rate": 1.5}, "hide_rate=1.5"),
        ({"hide_rate": -0.1}, "hide_rate=-0.1"),
        ({"hide_rate": "half"}, "hide_rate='half'"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"sigma_min": 0.0}, "sigma_min=0.0"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"sigma": 1e4}, "sigma=10000.0"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"hidden": 0}, "hidden=0"),
        ({"depth": 0}, "depth=0"),
        ({"latent": 0}, "latent=0"),
        ({"latent": 2.5}, "latent=2.5"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"n_importance": 0}, "n_importance=0"),
        ({"min_steps": 0}, "min_steps=0"),
        ({"pattern": "half"}, "is for images"),
        ({"pattern": "diagonal"}, "None or one of line, half, rectangle, centre"),
        ({"pixels": "binary"}, "'gaussian' or 'bernoulli'"),
        ({"channels": (8, 0)}, "whole numbers above 0"),
        ({"channels": (8.5,)}, "whole numbers above 0"),
    ],
)
def test_refusals(own, words):
    refuses(lambda: VAEACImputer(**(SMALL | own)).fit(table(40, 3)), ValueError, words)


@pytest.mark.parametrize(
    "own, words",
    [
        ({"pattern": "diagonal"}, "None or one of"),
        ({"pixels": "binary"}, "'gaussian' or"),
        ({"channels": (0,)}, "above 0"),
        ({"blocks": -1}, "blocks=-1"),
    ],
)
def test_refusals_of_pictures(own, words):
    refuses(lambda: VAEACImputer(**(SMALL | own)).fit(np.zeros((5, 1, 4, 4))), ValueError, words)


def complete_and_sound(X, **own):
    """Fit, fill, draw and judge without NaN; what was observed stays. Returns (imputer, filled)."""
    imputer = VAEACImputer(**(SMALL | own)).fit(X)
    before = X if isinstance(X, pd.DataFrame) else pd.DataFrame(X)
    results = [pd.DataFrame(r) for r in (imputer.transform(X), *imputer.sample(X, 2))]
    for filled in results:
        assert not filled.drop(columns="empty", errors="ignore").isna().any(axis=None)
        assert all(filled.loc[before[c].notna(), c].equals(before.loc[before[c].notna(), c]) for c in before)
    assert np.isfinite(imputer.log_prob(X)).all()
    return imputer, results[0]


def test_one_column_constant_and_empty_columns():
    complete_and_sound(with_holes(table(100, 1)))
    filled = complete_and_sound(with_holes(np.c_[table(100, 3), np.full(100, 5.25)]))[1]
    assert (filled[3] - 5.25).abs().max() < 1
    empty = pd.DataFrame(with_holes(table(100, 3)), columns=list("abc")).assign(empty=np.nan)
    assert complete_and_sound(empty)[1]["empty"].isna().all()
    complete_and_sound(np.array([[1.0, 2.0], [3.0, np.nan]]))


def test_hardly_anything_seen_and_huge_values():
    complete_and_sound(with_holes(table(300), 0.95))
    huge = with_holes(table() * 1e12 + 3e12)
    filled = complete_and_sound(huge)[1]
    assert np.nanmin(huge) <= filled.min(axis=None) and filled.max(axis=None) <= np.nanmax(huge)
    wild = with_holes(table())
    wild[7] = 1e12
    complete_and_sound(wild)


def test_columns_of_every_kind():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    holes = rng.random(200) < 0.3
    one = pd.DataFrame({"x": x, "k": pd.Series(["only"] * 200, dtype=object).mask(holes)})
    assert (complete_and_sound(one)[1]["k"] == "only").all()
    many = pd.DataFrame(
        {"x": np.tile(x, 10), "k": pd.Categorical(np.repeat(np.arange(1000), 2).astype(str)).astype(object)}
    )
    many["k"] = many["k"].mask(np.tile(holes, 10))
    imputer, filled = complete_and_sound(many, kinds={"k": "category"}, max_epochs=1)
    assert filled["k"].isin(many["k"].dropna()).all() and imputer.network_.layout.width > 800
    truth = pd.DataFrame({"x": x, "yes": pd.array(x > 0, dtype="boolean")}).mask(rng.random((200, 2)) < 0.2)
    assert complete_and_sound(truth)[1]["yes"].dtype == "boolean"
    words = pd.DataFrame({c: rng.choice(list("abc"), 200) for c in "uvw"}).mask(rng.random((200, 3)) < 0.3)
    imputer = complete_and_sound(words)[0]
    assert imputer.network_.layout.numbers == () and imputer.log_prob(words).mean() < 0
    complete_and_sound(with_holes(3.0 * (table() > 0)))  # two values


def test_ordinary_use_warns_of_nothing():
    """Mutation: patience is kept where no row judges, and the run says that it had no effect."""

    def said(module):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for own in ({}, {"validation_fraction": 0.0}):
                module.VAEACImputer(**SMALL, **own).fit(with_holes(table(60, 3))).transform(with_holes(table(60, 3)))
        return [str(w.message) for w in caught]

    assert said(vaeac) == []
    assert any(
        "patience" in words
        for words in said(copy_of(vaeac, ("run.stopping.patience if n_judge else None", "run.stopping.patience")))
    )


def check_soften(module):
    x = torch.tensor([-1e4, -4.0, -3.0, -0.5, 0.0, 2.9, 3.0, 3.5, 1e4])
    shown = module.soften(x)
    assert torch.equal(shown[2:7], x[2:7]) and (shown.diff() > 0).all() and shown.abs().max() < 4
    assert torch.allclose(shown[[1, 7]], torch.tensor([-3.5, 3 + 1 / 3]))


@pytest.mark.parametrize(
    "edit",
    [
        ("x.clamp(-to, to) + x.sign() * beyond / (1 + beyond)", "x"),
        ("x.sign() * beyond / (1 + beyond)", "beyond / (1 + beyond)"),
        ("beyond / (1 + beyond)", "beyond.log1p()"),
    ],
)
def test_soften(edit):
    """Mutations: nothing is softened; the lower tail is bent upwards; the tail has no end."""
    mutant_fails(vaeac, check_soften, edit)


def check_warm_up(module):
    """The weight of the divergence: one half in the first epoch of two, then 1, and half of all epochs at most."""
    weights = []

    def bound(network, x, observed, seen, eps, weight=None):
        weights.append(None if weight is None else weight.unique().tolist())
        return module.vaeac_bound(network, x, observed, seen, eps, *([] if weight is None else [weight]))

    x, observed = torch.randn(40, 3, generator=seed()), torch.ones(40, 3, dtype=torch.bool)
    for warm_up, expected in ((2, [[0.5], [1.0], [1.0], [1.0]]), (9, [[0.5], [1.0], [1.0], [1.0]]), (0, [None] * 4)):
        weights.clear()
        with seeded(0, CPU):
            network = module.VAEAC(Layout(3, (0, 1, 2)), module.TableNetworks(3, 6, 8, 1, 2), 2)
        run = TrainingRun(0, "cpu", verbose=False)
        hidden = lambda o, noise: hide_cells(o, Layout(3, (0, 1, 2)), 0.5, noise)  # noqa: E731
        module.train_vaeac(network, x, observed, run, hidden, 4, 40, 1e-3, 0.0, 1, bound, warm_up=warm_up)
        assert weights == expected
    eps, seen = torch.randn(40, 2, generator=seed(1)), observed & (torch.arange(3) < 1)
    free, half, full = (module.vaeac_bound(network, x, observed, seen, eps, w) for w in (0.0, 0.5, 1.0))
    assert torch.allclose(half, (free + full) / 2, atol=1e-5) and not torch.allclose(free, full, atol=1e-3)


@pytest.mark.parametrize(
    "edit",
    [
        ("min((epoch + 1) / warm_up, 1.0)", "(epoch + 1) / warm_up"),
        ("weight * normal_kl(", "normal_kl("),
        ("if warm_up else ()", "if not warm_up else ()"),
        ("warm_up = min(warm_up, max_epochs // 2)", "warm_up = warm_up"),
    ],
)
def test_warm_up(edit):
    """Mutations: the weight goes on rising; nothing is weighted; the wrong way round; no limit."""
    with contextlib.suppress(ZeroDivisionError):
        mutant_fails(vaeac, check_warm_up, edit)


def check_constant_columns(module):
    """A column that held one value is filled and drawn with it, exactly."""
    X = np.random.default_rng(0).normal(size=(60, 3))
    X[:, 1], X[::3, 1], X[1::3, 2] = 7.25, np.nan, np.nan
    imputer = module.VAEACImputer(**SMALL).fit(X)
    for filled in (imputer.transform(X), *imputer.sample(X, 2)):
        assert (filled[:, 1] == 7.25).all() and np.unique(filled[:, 2]).size > 40


@pytest.mark.parametrize("edit", [("return network.constants(cell_mean(output, network.layout))",
                                   "return cell_mean(output, network.layout)"),
                                  ("return network.constants(torch.cat(", "return (torch.cat(")])
def test_constant_columns(edit):
    """Mutations: the networks fill them, in means or in draws."""
    mutant_fails(vaeac, check_constant_columns, edit)


def test_of_nothing_the_probability_is_one():
    """Mutation: Monte Carlo error where there is nothing to estimate."""
    x = np.random.default_rng(0).normal(size=(40, 3))
    x[0] = np.nan
    model = VAEACImputer(**SMALL).fit(x)
    assert (model.log_prob(x, np.ones((40, 3), bool)) == 0).all() and model.log_prob(x)[0] == 0
    assert np.allclose(model.effective_sample_size(x)[0], model.n_importance)
    loud = copy_of(vaeac, ("torch.where((observed & ~seen).any(1), weights, 0.0)", "weights"))
    assert (loud.VAEACImputer(**SMALL).fit(x).log_prob(x, np.ones((40, 3), bool)) != 0).any()


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (dict(channels=16), "channels=16"),
        (dict(channels=None), "channels=None"),
        (dict(channels=(True,)), "channels="),
        (dict(pattern=["half"]), "pattern="),
        (dict(cell_noise="no"), "cell_noise='no'"),
        (dict(hide_rate=0.0), "hide_rate=0.0"),
    ],
)
def test_wrong_types_are_named(own, words):
    """Mutation: a bare TypeError from the inside."""
    with pytest.raises(ValueError, match=re.escape(words)):
        VAEACImputer(**(SMALL | own)).fit(np.random.default_rng(0).normal(size=(20, 3)))


def test_given_is_named_where_it_is_wrong():
    """Mutation: a complaint about `observed`, which the user never passed."""
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 3)), columns=list("abc"))
    model, given = VAEACImputer(**SMALL).fit(frame), pd.DataFrame(True, frame.index, frame.columns)
    for wrong in (given[["b", "a", "c"]], given.astype(float), given.iloc[:, :2]):
        with pytest.raises(ValueError, match="^given"):
            model.log_prob(frame, wrong)
