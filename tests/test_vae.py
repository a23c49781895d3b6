"""The variational autoencoder: densities, divergence, bounds and gradients against exact values; mutations, all run.

A mutation is a copy of the module, without the hook that checks shapes, with pieces of its source replaced."""

import math

import pytest
import torch
from conftest import mutant_fails, refuses, seed
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from missingbook.foundations.training import TrainingDiverged, TrainingRun, seeded
from missingbook.vaes import vae

CPU = torch.device("cpu")
D = torch.float64
WEIGHTS = torch.tensor([[1.2, 0.3], [0.8, 0.9], [-0.5, 0.7], [0.2, 1.0]], dtype=D)  # columns not orthogonal
MU, SD = torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=D), torch.tensor(0.5, dtype=D)
ZERO, ONE = torch.zeros(2, dtype=D), torch.ones(2, dtype=D)


def rows(n=40, number=0):
    """Rows of the linear model."""
    g = seed(number)
    z = torch.randn(n, 2, generator=g, dtype=D)
    return z @ WEIGHTS.T + MU + SD * torch.randn(n, 4, generator=g, dtype=D)


def linear_weights(module, x, mean, sigma, k, number=1):
    """k log weights for every row of the linear model."""
    z = module.reparameterize(mean, sigma, torch.randn(k, len(x), 2, generator=seed(number), dtype=D))
    joint = module.normal_log_prob(z, ZERO, ONE) + module.normal_log_prob(x, z @ WEIGHTS.T + MU, SD[None])
    return joint - module.normal_log_prob(z, mean, sigma)


def linear_bound(module, x, mean, sigma):
    """The bound of a factorized q in the linear model, exactly."""
    spread = (sigma**2 * (WEIGHTS**2).sum(0)).sum(-1) / (2 * SD**2)
    log_p = module.normal_log_prob(x, mean @ WEIGHTS.T + MU, SD[None]) - spread
    return module.elbo(log_p, module.normal_kl(mean, sigma, ZERO, ONE))


# --- densities and divergence ----------------------------------------------------------------------------------------


def check_normals(module):
    g = seed()
    mean, sigma = torch.randn(5, 3, generator=g, dtype=D), torch.rand(5, 3, generator=g, dtype=D) + 0.2
    other, width = torch.randn(5, 3, generator=g, dtype=D), torch.rand(5, 3, generator=g, dtype=D) + 0.2
    z = torch.randn(7, 5, 3, generator=g, dtype=D)
    q, p = Normal(mean, sigma), Normal(other, width)
    assert torch.allclose(module.normal_log_prob(z, mean, sigma), q.log_prob(z).sum(-1))
    closed = module.normal_kl(mean, sigma, other, width)
    assert torch.allclose(closed, kl_divergence(q, p).sum(-1))
    assert (closed > 0).all() and (module.normal_kl(mean, sigma, mean, sigma) == 0).all()
    draws = module.reparameterize(mean, sigma, torch.randn(40_000, 5, 3, generator=g, dtype=D))
    assert (draws.mean(0) - mean).abs().max() < 0.03 and (draws.std(0) - sigma).abs().max() < 0.03
    sampled = module.normal_log_prob(draws, mean, sigma) - module.normal_log_prob(draws, other, width)
    assert ((sampled.mean(0) - closed).abs() < 5 * sampled.std(0) / 200).all()


@pytest.mark.parametrize("edit", [
    ("- ratio.log()).sum(-1)", "+ ratio.log()).sum(-1)"),
    ("ratio = sigma_q / sigma_p", "ratio = sigma_p / sigma_q"),
    ("((mean_q - mean_p) / sigma_p) ** 2", "((mean_q - mean_p) / sigma_q) ** 2"),
    ("- sigma.log() - 0.5 * math.log(2 * math.pi)).sum(-1)", "- 0.5 * math.log(2 * math.pi)).sum(-1)"),
    ("- sigma.log() - 0.5 * math.log(2 * math.pi)).sum(-1)", "- sigma.log()).sum(-1)"),
    ("return mean + sigma * eps", "return mean + sigma**2 * eps"),
])
def test_normals(edit):
    """Mutations: a sign; q and p exchanged, in the ratio, in the distance; no log sigma; no constant; the variance."""
    mutant_fails(vae, check_normals, edit)


def check_split(module):
    mean, sigma = module.split_normal(torch.tensor([[1.0, -2.0, 0.0, -100.0]]), 0.01)
    assert mean.tolist() == [[1.0, -2.0]] and torch.allclose(sigma, torch.tensor([[0.01 + math.log(2), 0.01]]))
    assert module.split_normal(torch.randn(3, 5, 8))[0].shape == (3, 5, 4)


def test_split():
    """Mutations: halves exchanged; no floor."""
    mutant_fails(vae, check_split, ("mean, raw = output.chunk", "raw, mean = output.chunk"))
    mutant_fails(vae, check_split, ("return mean, sigma_min + F", "return mean, F"))
    refuses(lambda: vae.split_normal(torch.zeros(2, 5)), ValueError, "5 outputs")
    refuses(lambda: vae.split_normal(torch.zeros(2, 4), -1), ValueError, "sigma_min=-1")


# --- the bound, against the linear model -----------------------------------------------------------------------------


def check_bound(module):
    x = rows()
    exact = module.linear_log_prob(x, WEIGHTS, MU, SD)
    covariance = WEIGHTS @ WEIGHTS.T + SD**2 * torch.eye(4, dtype=D)
    assert torch.allclose(exact, MultivariateNormal(MU, covariance).log_prob(x))
    m, S = module.linear_posterior(x, WEIGHTS, MU, SD)
    precision = torch.linalg.inv(S)
    best = precision.diagonal().rsqrt().expand_as(m)
    for mean, sigma in ((torch.zeros_like(m), torch.ones_like(m)), (m, best), (m + 0.1, 0.8 * best)):
        bound = linear_bound(module, x, mean, sigma)
        apart = kl_divergence(MultivariateNormal(mean, torch.diag_embed(sigma**2)), MultivariateNormal(m, S))
        assert (bound < exact).all() and torch.allclose(bound + apart, exact)
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    assert torch.allclose(exact - linear_bound(module, x, m, best), gap.expand_as(exact)) and gap > 0.01


@pytest.mark.parametrize("edit", [
    ("return log_p - kl", "return log_p + kl"),
    ("(x - mean) @ weights @ covariance / sigma**2, covariance", "(x - mean) @ weights @ covariance, covariance"),
    ("identity + weights.T @ weights / sigma**2", "identity + weights.T @ weights / sigma"),
    ("- factor.diagonal().log().sum()", "- 0.5 * factor.diagonal().log().sum()"),
])
def test_bound_and_gap(edit):
    """Mutations: the divergence added; the posterior's mean and covariance off; half a log-determinant lost."""
    mutant_fails(vae, check_bound, edit)


def test_tight_where_the_posterior_is_factorized():
    """Orthogonal columns: the bound is the log-likelihood, and every weight is p(x)."""
    x, turned = rows(), WEIGHTS @ torch.linalg.eigh(WEIGHTS.T @ WEIGHTS)[1]
    m, S = vae.linear_posterior(x, turned, MU, SD)
    z = vae.reparameterize(m, S.diagonal().sqrt(), torch.randn(6, 40, 2, generator=seed(), dtype=D))
    joint = vae.normal_log_prob(z, ZERO, ONE) + vae.normal_log_prob(x, z @ turned.T + MU, SD[None])
    log_weights = joint - vae.normal_log_prob(z, m, S.diagonal().sqrt())
    exact = vae.linear_log_prob(x, WEIGHTS, MU, SD)  # a rotation changes nothing
    assert torch.allclose(log_weights, exact.expand_as(log_weights))
    assert torch.allclose(vae.effective_sample_size(log_weights), torch.full_like(exact, 6.0))


def check_weights(module):
    hand = torch.tensor([[0.0], [math.log(3.0)]])
    assert torch.allclose(module.importance_weighted_bound(hand), torch.tensor([math.log(2.0)]))
    assert torch.allclose(module.effective_sample_size(hand), torch.tensor([1.6]))
    x = rows()
    m, S = module.linear_posterior(x, WEIGHTS, MU, SD)
    log_weights = linear_weights(module, x, m, 1.5 * S.diagonal().sqrt(), 20_000)
    exact = module.linear_log_prob(x, WEIGHTS, MU, SD)
    means = {k: module.importance_weighted_bound(torch.stack(log_weights.split(k), 1)).mean() for k in (1, 5, 50, 500)}
    values = [v.item() for v in means.values()]
    assert values == sorted(values) and values[-1] < exact.mean() + 0.01 and abs(values[-1] - exact.mean()) < 0.02
    assert torch.allclose(module.importance_weighted_bound(log_weights), exact, atol=0.05)


@pytest.mark.parametrize("edit", [
    ("log_weights.logsumexp(0) - math.log(len(log_weights))", "log_weights.logsumexp(0)"),
    ("log_weights.logsumexp(0) - math.log(len(log_weights))", "log_weights.mean(0)"),
    ("1 / log_weights.softmax(0).square().sum(0)", "1 / log_weights.softmax(0).amax(0)"),
])
def test_importance_weights(edit):
    """Mutations: a sum in place of the mean; a mean of logarithms; the largest weight in place of the squares."""
    mutant_fails(vae, check_weights, edit)


def test_effective_sample_size_has_limits():
    log_weights = 30 * torch.randn(50, 200, generator=seed())
    size = vae.effective_sample_size(log_weights)
    assert (size >= 1 - 1e-5).all() and (size <= 50).all() and size.min() < 1.01
    assert torch.allclose(vae.effective_sample_size(torch.full((50, 3), -700.0)), torch.full((3,), 50.0))
    one = torch.full((50, 1), -1e6).index_fill(0, torch.tensor([7]), 900.0)  # beyond what exp can hold
    assert vae.effective_sample_size(one) == 1 and torch.isfinite(vae.importance_weighted_bound(one)).all()


def check_gradient(module):
    x, n = rows(1), 40_000
    m, s = torch.tensor([0.4, -0.2], dtype=D), torch.tensor([0.5, 0.7], dtype=D)
    mean, sigma = (t.expand(n, 2).clone().requires_grad_() for t in (m, s))
    z = module.reparameterize(mean, sigma, torch.randn(n, 2, generator=seed(), dtype=D))
    log_p = module.normal_log_prob(x, z @ WEIGHTS.T + MU, SD[None])
    bound = module.elbo(log_p, module.normal_kl(mean, sigma, ZERO, ONE))
    drawn = torch.autograd.grad(bound.sum(), (mean, sigma))
    m, s = m[None].requires_grad_(), s[None].requires_grad_()
    exact = torch.autograd.grad(linear_bound(module, x, m, s).sum(), (m, s))
    for found, true in zip(drawn, exact, strict=True):
        assert ((found.mean(0) - true[0]).abs() < 5 * found.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("edit", [
    ("return mean + sigma * eps", "return mean + (sigma * eps).detach()"),
    ("return mean + sigma * eps", "return mean.detach() + sigma * eps"),
])
def test_gradient_of_the_bound(edit):
    """Mutations: the draw does not move with sigma, or not with the mean."""
    mutant_fails(vae, check_gradient, edit)


# --- networks --------------------------------------------------------------------------------------------------------


def check_network(module):
    for cells, x in (("normal", torch.randn(30, 4, generator=seed())), ("bernoulli", torch.ones(30, 4))):
        with seeded(0, CPU):
            network = module.VAE(4, 2, 8, cells, sigma=0.7)
        eps = torch.randn(3, 30, 2, generator=seed(1))
        log_p, kl = network.terms(x, eps[0])
        mean, sigma = network.encoder(x)[:, :2], 1e-3 + torch.nn.functional.softplus(network.encoder(x)[:, 2:])
        q, prior = Normal(mean, sigma), Normal(torch.zeros(2), torch.ones(2))
        z = mean + sigma * eps
        given = Normal(network.decoder(z), 0.7) if cells == "normal" else Bernoulli(logits=network.decoder(z))
        log_x = given.log_prob(x).sum(-1)
        assert torch.allclose(log_p, log_x[0], atol=1e-4)
        assert torch.allclose(kl, kl_divergence(q, prior).sum(-1), atol=1e-4)
        by_hand = log_x + prior.log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
        assert torch.allclose(network.log_weights(x, eps), by_hand, atol=1e-4)
        module.elbo(log_p, kl).mean().backward()
        assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in network.parameters())


@pytest.mark.parametrize("edit", [
    ("(x * output - F.softplus(output))", "(x * output + F.softplus(output))"),
    ("self.decoder(z)) + prior - normal_log_prob(z, mean", "self.decoder(z)) - normal_log_prob(z, mean"),
    ("self.decoder(z)), normal_kl", "self.decoder(mean)), normal_kl"),
    ("normal_log_prob(x, output, self.log_sigma.exp())", "normal_log_prob(x, output, self.log_sigma)"),
])
def test_network(edit):
    """Mutations: a sign in the cells; weights without the prior; no draw; sigma without its exponential."""
    mutant_fails(vae, check_network, edit)


def check_conditional(module):
    x, y = torch.randn(20, 3, generator=seed()), torch.randn(20, 2, generator=seed(1))
    with seeded(0, CPU):
        network = module.CVAE(3, 2, 2, 8)
    eps = torch.randn(4, 20, 2, generator=seed(2))
    q = Normal(*module.split_normal(network.encoder(torch.cat([x, y], 1))))
    prior = Normal(*module.split_normal(network.prior(y)))
    z = q.mean + q.stddev * eps
    output = network.decoder(torch.cat([z, y.expand(4, 20, 2)], -1))
    log_x = Normal(output, network.log_sigma.exp()).log_prob(x).sum(-1)
    log_p, kl = network.terms(x, y, eps[0])
    assert torch.allclose(log_p, log_x[0], atol=1e-3) and torch.allclose(kl, kl_divergence(q, prior).sum(-1), atol=1e-4)
    by_hand = log_x + prior.log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
    assert torch.allclose(network.log_weights(x, y, eps), by_hand, atol=1e-3)
    drawn = network.decoder(torch.cat([prior.mean + prior.stddev * eps[0], y], 1))
    assert torch.allclose(network.draw(y, eps[0]), drawn, atol=1e-5)
    module.elbo(log_p, kl).mean().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in network.parameters())


@pytest.mark.parametrize("edit", [
    ("normal_kl(mean, sigma, *split_normal(self.prior(y)))",
     "normal_kl(mean, sigma, torch.zeros_like(mean), torch.ones_like(sigma))"),
    ("normal_log_prob(z, *split_normal(self.prior(y)))",
     "normal_log_prob(z, torch.zeros_like(mean), torch.ones_like(sigma))"),
    ("torch.cat([reparameterize(*split_normal(self.prior(y)), eps), y], -1)", "torch.cat([eps, y], -1)"),
])
def test_conditional_prior(edit):
    """Mutations: a prior that does not look at y, in the divergence, in the weights, in the draws."""
    mutant_fails(vae, check_conditional, edit)


def plane(n=300):
    """Rows near a plane."""
    g = seed(3)
    x = torch.randn(n, 2, generator=g) @ torch.tensor([[1.5, 0.3, -0.4, 1.0], [0.0, 1.0, 0.8, -0.5]])
    return x + 0.5 * torch.randn(n, 4, generator=g) + 1


def check_ppca(module):
    x = plane()
    found = module.ppca(x, 2)
    optimum = module.linear_log_prob(x, *found).mean()
    assert module.linear_log_prob(x, found[0], found[1] + 0.05, found[2]).mean() < optimum
    for factor in (0.97, 1.03):
        assert module.linear_log_prob(x, found[0] * factor, found[1], found[2]).mean() < optimum
        assert module.linear_log_prob(x, found[0], found[1], found[2] * factor).mean() < optimum
    same = x[:1] + torch.zeros(20, 4)  # no spread at all
    assert all(torch.isfinite(part).all() for part in module.ppca(same, 2))


@pytest.mark.parametrize("edit", [
    ("values[: width - latent].mean()", "values[: width - latent].amin()"),
    ("(values[width - latent :] - variance).clamp(min=0).sqrt()", "values[width - latent :].clamp(min=0).sqrt()"),
    ("vectors[:, width - latent :] *", "vectors[:, :latent] *"),
])
def test_ppca_is_the_optimum(edit):
    """Mutations: the wrong eigenvalue as variance; weights too long; the wrong directions."""
    mutant_fails(vae, check_ppca, edit)


def check_training(module):
    x = plane()
    optimum = module.linear_log_prob(x, *module.ppca(x, 2)).mean()
    with seeded(0, CPU):
        network = module.VAE(4, 2, hidden=0, sigma=1, shared_sigma=True)
    run = TrainingRun(0, "cpu", verbose=False)
    module.train_vae(network, (x,), run, 100, 100, 3e-2)
    module.train_vae(network, (x,), TrainingRun(0, "cpu", verbose=False), 40, 100, 3e-3)
    sigma = network.log_sigma.detach().exp()[0]
    reached = module.linear_log_prob(x, network.decoder.weight.detach(), network.decoder.bias.detach(), sigma).mean()
    assert -1e-4 < optimum - reached < 0.03
    log_weights = network.log_weights(x, torch.randn(200, 300, 2, generator=seed())).detach()
    assert log_weights.mean() < reached and abs(vae.importance_weighted_bound(log_weights).mean() - reached) < 0.02
    assert list(run.history.columns[:2]) == ["bound", "kl"]
    assert run.history["bound"].iloc[-1] > run.history["bound"].iloc[0]


def test_training_reaches_the_optimum_of_pca():
    """Mutation: no divergence in the loss."""
    mutant_fails(vae, check_training, ("run.step(-bound, optimizer)", "run.step(-log_p.mean(), optimizer)"))


def test_same_seed_same_weights():
    found = []
    for number in (0, 0, 1):
        with seeded(number, CPU):
            network = vae.CVAE(1, 1, 1, 8)
        run = TrainingRun(number, "cpu", verbose=False)
        vae.train_vae(network, (torch.randn(50, 1, generator=seed()), torch.ones(50, 1)), run, 2)
        found.append(torch.cat([w.detach().flatten() for w in network.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_refusals():
    refuses(lambda: vae.VAE(3, cells="gamma"), ValueError, "'normal' or 'bernoulli'")
    refuses(lambda: vae.VAE(3, sigma=0), ValueError, "sigma=0")
    for latent in (0, 4):
        refuses(lambda latent=latent: vae.ppca(torch.randn(10, 4), latent), ValueError, f"latent={latent}")
    refuses(lambda: vae.ppca(torch.randn(4, 4), 2), ValueError, "columns < rows")


@pytest.mark.filterwarnings("ignore:the loss became NaN")
def test_a_hole_is_said():
    """NaN reaches the loss and stops the training: this network takes complete rows."""
    x = torch.randn(100, 3, generator=seed())
    x[0, 0] = torch.nan
    with pytest.raises(TrainingDiverged):
        vae.train_vae(vae.VAE(3, 1, 8), (x,), TrainingRun(0, "cpu", verbose=False), 2)
