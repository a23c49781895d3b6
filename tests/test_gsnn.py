"""GSNN and the hybrid: bounds and estimates against closed forms, the ends of alpha, no peek, bad input; mutations.

A mutation is a copy of the module, without the hook that checks shapes, with pieces of its source replaced."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import mutant_fails, refuses
from sklearn.base import clone

from missingbook.foundations.imputer import Layout, check_no_peek
from missingbook.foundations.training import Noise, seeded
from missingbook.vaes import gsnn
from missingbook.vaes.gsnn import GSNNImputer
from missingbook.vaes.vae import importance_weighted_bound, normal_kl
from missingbook.vaes.vaeac import VAEAC, TableNetworks, VAEACImputer, hide_cells, importance_score, log_weights

CPU, PLANE = torch.device("cpu"), Layout(2, (0, 1))
SMALL = dict(hidden=16, depth=1, latent=4, max_epochs=2, min_steps=5, n_draws=2, random_state=0, verbose=False,
             device="cpu")


def small(kind=VAEAC, seed=0):
    with seeded(seed, CPU):
        return kind(PLANE, TableNetworks(2, 4, 16, 1, 4), 4)


def batch(n=40, number=0):
    """(x, observed, seen, eps): a third of the cells missing, with NaN behind them; some of the others hidden."""
    noise = Noise(number, CPU)
    observed = noise.uniform(n, 2) > 0.3
    x = torch.where(observed, noise.normal(n, 2), torch.nan)
    return x, observed, hide_cells(observed, PLANE, 0.5, noise), noise.normal(n, 4)


def table(n=80, rate=0.3):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 1)) + 0.5 * rng.normal(size=(n, 3))
    return np.where(rng.random(x.shape) < rate, np.nan, x)


# --- the objectives --------------------------------------------------------------------------------------------------


def check_objectives(module):
    network, (x, observed, seen, eps) = small(), batch()
    parts = network, x, observed, seen
    bound = module.vaeac_bound(*parts, eps)
    assert torch.equal(module.hybrid_bound(*parts, eps, 1), bound)  # bit for bit
    mirrored = module.gsnn_bound(*parts, -eps)
    assert torch.equal(module.hybrid_bound(*parts, eps, 0.0), mirrored)
    for alpha in (0.2, 0.9):
        mixed = module.hybrid_bound(*parts, eps, alpha)
        assert torch.allclose(mixed, alpha * bound + (1 - alpha) * mirrored, atol=1e-5)
        eased = module.hybrid_bound(*parts, eps, alpha, 0.25)
        divergence = normal_kl(*network.propose(x, seen, observed), *network.recall(x, seen)[:2])
        assert torch.allclose(eased, mixed + 0.75 * alpha * divergence, atol=1e-4)
    assert torch.equal(module.hybrid_bound(*parts, eps, 1, 0.25), module.vaeac_bound(*parts, eps, 0.25))
    mean, sigma, memory = network.recall(x, seen)
    output, spread = network.generate(mean + sigma * eps, memory)
    target = observed & ~seen
    by_hand = torch.distributions.Normal(output, spread).log_prob(torch.where(target, x, 0.0))
    assert torch.allclose(module.gsnn_bound(*parts, eps), torch.where(target, by_hand, 0.0).sum(1), atol=1e-5)


@pytest.mark.parametrize("edit", [
    ("alpha * bound + (1 - alpha) * log_p", "(1 - alpha) * bound + alpha * log_p"),
    ("reparameterize(mean_p, sigma_p, -eps)])", "reparameterize(mean_p, sigma_p, eps)])"),
    (" + prior_regularizer(mean_p, sigma_p)\n", "\n"),
    ("log_q, log_p = reconstruction", "log_p, log_q = reconstruction"),
    ("target = (observed & ~seen).repeat(times)", "target = observed.repeat(times)"),
    ("weight * normal_kl", "normal_kl"),
])
def test_objectives(edit):
    """Mutations: weights change places; the same eps twice; no regularizer; draws swapped; seen cells count."""
    mutant_fails(gsnn, check_objectives, edit)


def check_gradients(module):
    for alpha, moved in ((0, False), (0.5, True), (1, True)):
        network, parts = small(), batch()
        module.hybrid_bound(network, *parts, alpha).mean().backward()
        trained = [p.grad is not None for name, p in network.named_parameters() if "_q" in name]
        assert any(trained) == all(trained) == moved
        grads = [p.grad for name, p in network.named_parameters() if "_p" in name or "_g" in name]
        assert all(g is not None and torch.isfinite(g).all() for g in grads)


def test_only_vaeacs_part_trains_the_proposal():
    """Mutations: at alpha = 0 VAEAC's bound is used; or it counts, with weight 0."""
    for edit in (("seen, eps, weight) if alpha else gsnn_bound", "seen, eps) if True else gsnn_bound"),
                 ("if alpha in (0, 1):", "if alpha == 1:")):
        mutant_fails(gsnn, check_gradients, edit)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_wrong_weight_is_refused(alpha):
    refuses(lambda: gsnn.hybrid_bound(small(), *batch(), alpha), ValueError, "alpha=.*between 0 and 1")


def test_hidden_cells_are_judged_and_not_read():
    """What stands behind a missing cell changes nothing."""
    network, (x, observed, seen, eps) = small(), batch()
    junk = torch.where(observed, x, 1e3)
    for alpha in (0, 0.5, 1):
        a, b = (gsnn.hybrid_bound(network, v, observed, seen, eps, alpha) for v in (x, junk))
        assert torch.equal(a, b)


# --- estimates of the likelihood -------------------------------------------------------------------------------------


class Linear(VAEAC):
    """z ~ N(0, I), x = W z + noise of width ½, all hidden; the proposal is the posterior of each z, widened."""

    def __init__(self):
        super().__init__(PLANE, torch.nn.Identity(), 2, 0.5)
        self.W = torch.tensor([[1.0, 0.5], [-0.3, 0.8]])
        self.covariance = torch.linalg.inv(torch.eye(2) + 4 * self.W.T @ self.W)

    def propose(self, x, seen, observed):
        mean = 4 * x @ self.W @ self.covariance
        return mean, 1.1 * self.covariance.diagonal().sqrt().expand_as(mean)

    def recall(self, x, seen):
        return torch.zeros_like(x), torch.ones_like(x), []

    def generate(self, z, memory):
        return (z @ self.W.T).flatten(0, -2), torch.tensor(0.5)


def check_estimates(module):
    network, noise = Linear(), Noise(1, CPU)
    x = noise.normal(300, 2) @ network.W.T + 0.5 * noise.normal(300, 2)
    every = torch.ones(300, 2, dtype=torch.bool)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), network.W @ network.W.T + 0.25 * torch.eye(2))
    exact = normal.log_prob(x).mean()
    gaps = {}
    for draws in (1, 10, 2000):
        eps = [noise.normal(draws, 300, 2) for _ in range(2)]
        by_mc = module.monte_carlo_log_prob(network, x, every, ~every, eps[0]).mean()
        by_is = importance_weighted_bound(log_weights(network, x, every, ~every, eps[1])).mean()
        gaps[draws] = (by_is - exact).item(), (by_mc - exact).item()
    assert gaps[1][1] < gaps[1][0] - 0.3 and gaps[10][1] < gaps[10][0] - 0.1  # importance sampling above Monte Carlo
    assert gaps[1][1] < gaps[10][1] < 0 and max(abs(g) for g in gaps[2000]) < 0.02  # from below, to the exact value


def test_estimates_meet_at_the_exact_value():
    """Mutation: Monte Carlo draws half as wide as the prior."""
    draw = "z, times = reparameterize(mean_p, {}sigma_p, eps)"
    mutant_fails(gsnn, check_estimates, (draw.format(""), draw.format("0.5 * ")))


def check_own_proposal(module):
    network, (x, observed, seen, _) = small(module.GSNN), batch()
    parts, draws = (network, x, observed, seen), Noise(2, CPU).normal(6, 40, 4)
    with torch.no_grad():
        by_is, by_mc = importance_weighted_bound(log_weights(*parts, draws)), module.monte_carlo_log_prob(*parts, draws)
        assert torch.allclose(by_is, by_mc, atol=1e-4)
        judged = importance_score(*parts, Noise(3, CPU), k=6)
        eps = Noise(3, CPU).normal(40, 6, 4).transpose(0, 1)
        assert torch.allclose(judged, -module.monte_carlo_log_prob(*parts, eps).mean(), atol=1e-4)
        network.deterministic = True
        assert torch.equal(module.gsnn_bound(*parts, draws[0]), module.gsnn_bound(*parts, draws[1]))
        assert torch.isfinite(importance_weighted_bound(log_weights(*parts, draws))).all()


@pytest.mark.parametrize("edit", [("return self.recall(x, seen)[:2]", "return super().propose(x, seen, observed)"),
                                  ("_point = 1e-30", "_point = 1e-2"), ("_point = 1e-30", "_point = 0.0")])
def test_the_prior_as_proposal(edit):
    """Mutations: the untrained proposal is asked; a point with a width; one whose density is not a number."""
    mutant_fails(gsnn, check_own_proposal, edit)


# --- a latent variable with K values ---------------------------------------------------------------------------------


def check_categorical(module):
    log_f = 2 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alpha in (0.0, 0.4, 1.0):
        best = module.best_categorical_hybrid(log_f, alpha)
        assert torch.allclose(module.categorical_hybrid(log_f, log_f.softmax(1), alpha), best)
        other = module.categorical_hybrid(log_f, (1.3 * log_f).softmax(1), alpha)
        assert other < best or alpha == 0
    assert torch.allclose(module.best_categorical_hybrid(log_f, 1), log_f.exp().mean(1).log().mean())
    assert torch.allclose(module.best_categorical_hybrid(log_f, 0), log_f.mean())


@pytest.mark.parametrize("edit", [("- q.log())).sum(1)", "+ q.log())).sum(1)"),
                                  ("log_f.logsumexp(1) - math.log(log_f.shape[1])", "log_f.logsumexp(1)")])
def test_categorical_hybrid(edit):
    """Mutations: the entropy with the wrong sign; a mixture whose parts have weight 1."""
    mutant_fails(gsnn, check_categorical, edit)


def check_mixture(module):
    noise = Noise(0, CPU)
    centres = noise.normal(3, 2)
    grid = torch.cartesian_prod(torch.linspace(-5, 5, 401), torch.linspace(-5, 5, 401))
    both = module.mixture_log_prob(grid, torch.ones_like(grid, dtype=torch.bool), centres, 0.3).exp().view(401, 401)
    assert abs(both.sum() * 0.025**2 - 1) < 1e-3
    first = module.mixture_log_prob(grid, torch.tensor([True, False]).expand(len(grid), 2), centres, 0.3).exp()
    assert torch.allclose(both.sum(1) * 0.025, first.view(401, 401)[:, 0], atol=1e-4)
    drawn = module.mixture_draw(20_000, centres, 0.3, noise)
    assert (drawn.mean(0) - centres.mean(0)).abs().max() < 0.03
    assert (drawn.var(0) - centres.var(0, correction=0) - 0.09).abs().max() < 0.05


def test_the_mixtures_density():
    """Mutation: the parts' weights are forgotten."""
    mutant_fails(gsnn, check_mixture, ("return logs.logsumexp(1) - math.log(len(centres))", "return logs.logsumexp(1)"))


# --- the estimator ---------------------------------------------------------------------------------------------------


def test_weight_one_is_vaeac():
    x = table()
    ours, theirs = GSNNImputer(alpha=1.0, **SMALL).fit(x), VAEACImputer(**SMALL).fit(x)
    assert np.array_equal(ours.transform(x), theirs.transform(x))
    assert np.array_equal(ours.log_prob(x), theirs.log_prob(x))


@pytest.mark.parametrize("own", [{}, {"alpha": 0.5}, {"deterministic": True}])
def test_no_peek_and_store(own, tmp_path):
    x = table()
    check_no_peek(GSNNImputer(**SMALL | own), x)
    fitted = GSNNImputer(**SMALL | own).fit(x)
    fitted.save(tmp_path / "kept")
    again = GSNNImputer.load(tmp_path / "kept", device="cpu")
    assert again.get_params()["deterministic"] == fitted.deterministic and clone(fitted).alpha == fitted.alpha
    assert np.array_equal(again.transform(x), fitted.transform(x))
    assert np.array_equal(again.log_prob(x), fitted.log_prob(x))
    filled = fitted.transform(x)
    assert np.isfinite(filled).all() and np.array_equal(filled[~np.isnan(x)], x[~np.isnan(x)])


def check_deterministic(module):
    x = table()
    plain = module.GSNNImputer(deterministic=True, **SMALL).fit(x)
    draws = plain.sample(x, 3)
    assert np.array_equal(draws[0], draws[1]) and np.allclose(draws[2], plain.transform(x), atol=1e-6)
    noisy = module.GSNNImputer(**SMALL).fit(x).sample(x, 2)
    assert not np.array_equal(noisy[0], noisy[1])


@pytest.mark.parametrize("edit", [("mean or self.deterministic)", "mean)"),
                                  ("network.deterministic = self.deterministic", "network.deterministic = False")])
def test_deterministic_draws_are_alike(edit):
    """Mutations: the cells' noise stays; the prior's does."""
    mutant_fails(gsnn, check_deterministic, edit)


def test_mixed_tables():
    frame = pd.DataFrame(table(), columns=list("abc"))
    frame["kind"] = pd.Series(np.array(["x", "y"], dtype=object)[(np.arange(80) % 2)]).where(np.arange(80) % 3 > 0)
    for own in ({}, {"deterministic": True}, {"alpha": 0.3}):
        model = GSNNImputer(**SMALL | own).fit(frame)
        filled, drawn = model.transform(frame), model.sample(frame, 1)[0]
        assert not filled.isna().any(axis=None) and set(drawn["kind"]) <= {"x", "y"}
        assert np.isfinite(model.log_prob(frame)).all()


@pytest.mark.parametrize("own, words", [
    ({"alpha": 1.5}, "alpha=1.5"), ({"alpha": -0.1}, "alpha"), ({"alpha": None}, "alpha"),
    ({"alpha": 0.5, "deterministic": True}, "no proposal.*alpha=0.5"), ({"pattern": "line"}, "pattern"),
])
def test_refusals(own, words):
    refuses(lambda: GSNNImputer(**(SMALL | own)).fit(table(30)), ValueError, words)
