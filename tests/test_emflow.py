"""EMFlow: losses by hand, fills, the base against online EM, what judges, draws, checkpoints, bad input; mutations.

A mutation is a copy of the module, without the hook that checks shapes, with pieces of its source replaced."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Interruptible, copy_of, refuses, seed, with_holes
from sklearn.datasets import load_digits, load_iris

from missingbook.flows import emflow
from missingbook.flows.coupling import Flow, GaussianBase
from missingbook.flows.emflow import EMFlowImputer
from missingbook.flows.mcflow import Scaling
from missingbook.flows.realnvp import RealNVP
from missingbook.foundations.imputer import check_no_peek
from missingbook.foundations.mechanisms import emflow_mar
from missingbook.foundations.training import Noise, TrainingRun, seeded
from missingbook.gaussian.conditional import Conditional
from missingbook.gaussian.em import (
    GaussianImputer,
    GaussianModel,
    Prior,
    begin,
    expect_exactly,
    fit_online,
    maximize,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
CPU = torch.device("cpu")
SMALL = dict(hidden=16, n_couplings=2, max_epochs=4, random_state=0, verbose=False, device="cpu")


def must_fail(check, *edits):
    """The check passes on the module and fails on its mutation."""
    check(emflow)
    with pytest.raises((AssertionError, RuntimeError)):
        check(copy_of(emflow, *edits))


def quiet(number=0):
    return TrainingRun(number, "cpu", verbose=False)


def table(n=300, p=8, noise=0.4, number=0):
    """Numbers of which three hidden causes explain most."""
    rng = np.random.default_rng(number)
    return rng.normal(size=(n, 3)) @ rng.normal(size=(3, p)) + noise * rng.normal(size=(n, p))


def rows_of(n=230, p=5, rate=0.3, mechanism="mcar", number=0):
    """(x, observed) as tensors; n is no multiple of the batches below. No row is empty."""
    x = table(n, p, number=number)
    if mechanism == "mar":
        observed = torch.tensor(emflow_mar(x, rate=rate, random_state=0))
    else:
        observed = torch.rand(n, p, generator=seed(number)) >= rate
        observed[:, 0] |= ~observed.any(1)
    return torch.tensor(x, dtype=torch.float32), observed


def network(module=emflow, width=5, **options):
    with seeded(0, CPU):
        return module.EMFlow((width,), 2, 16, **options)


def live_flow(width=5):
    """A flow that is not the identity in front of a Gaussian that is not standard, float64."""
    flow = RealNVP(width, 4, 8, generator=seed(), identity=False).double()
    root = torch.randn(width, width, generator=seed(1), dtype=torch.float64)
    flow.base.set(torch.arange(width).double(), root @ root.T + torch.eye(width))
    return flow


# --- equations -------------------------------------------------------------------------------------------------------


def check_reconstruction(module):
    made = torch.tensor([[1.0, 5.0, 2.0], [0.0, 3.0, 7.0], [4.0, 4.0, 4.0]], requires_grad=True)
    given = torch.tensor([[0.5, math.nan, 4.0], [math.nan, 1.0, math.nan], 3 * [math.nan]])
    values = module.reconstruction_error(made, given, ~given.isnan())
    assert torch.allclose(values, torch.tensor([0.25 + 4.0, 4.0, 0.0]))
    (slope,) = torch.autograd.grad(values.sum(), made)
    assert torch.equal(slope, torch.tensor([[1.0, 0.0, -4.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("edit", [
    ("torch.where(observed, x_rec - torch.where(observed, x, 0.0), 0.0)", "(x_rec - torch.where(observed, x, 0.0))"),
    ("torch.where(observed, x_rec - torch.where(observed, x, 0.0), 0.0)", "torch.where(observed, x_rec - x, 0.0) + x"),
    (".square().sum(1)\n", ".square().mean(1)\n"),
])
def test_equation_15(edit):
    """Mutations: holes count; a peek; a mean in place of a sum."""
    must_fail(check_reconstruction, edit)


def check_composite(module):
    flow, z = live_flow(), torch.randn(40, 5, generator=seed(2), dtype=torch.float64)
    x, observed = torch.randn(40, 5, generator=seed(3), dtype=torch.float64), torch.rand(40, 5, generator=seed(4)) > 0.4
    x_rec = flow.inverse(z)[0]
    apart = (((x_rec - x) ** 2) * observed).sum(1)
    log_det = torch.linalg.slogdet(torch.func.vmap(torch.func.jacfwd(lambda r: flow(r[None])[0][0]))(x_rec))[1]
    base = torch.distributions.MultivariateNormal(flow.base.mean, flow.base.covariance)
    for alpha in (0.0, 3.0):
        by_hand = -(base.log_prob(z) + log_det - alpha * apart).mean()
        assert torch.isclose(module.composite_loss(flow, z, x, observed, alpha), by_hand)


@pytest.mark.parametrize("edit", [
    ("- flow.base.log_prob(z) + log_det", "- flow.base.log_prob(z) - log_det"),
    ("- flow.base.log_prob(z) + log_det", "+ flow.base.log_prob(z) + log_det"),
    ("alpha * reconstruction_error(x_rec, x, observed)", "alpha * reconstruction_error(x_rec, x, ~observed)"),
    ("alpha * reconstruction_error(x_rec, x, observed)", "-alpha * reconstruction_error(x_rec, x, observed)"),
])
def test_equation_14(edit):
    """Mutations: the sign of the log-determinant, of the density, of the penalty; the penalty at the holes."""
    must_fail(check_composite, edit)


def check_filled_by(module):
    root = torch.randn(5, 5, generator=seed(), dtype=torch.float64)
    mean, covariance = torch.arange(5.0).double(), root @ root.T + torch.eye(5)
    gaussian = Conditional(mean, covariance, "direct")
    z, observed = torch.randn(20, 5, generator=seed(1), dtype=torch.float64), torch.rand(20, 5, generator=seed(2)) > 0.4
    filled = module.filled_by(gaussian, torch.where(observed, z, math.nan), observed)
    for row, o, made in zip(z, observed, filled, strict=True):
        gain = torch.linalg.solve(covariance[o][:, o], covariance[o][:, ~o]).T
        assert torch.equal(made[o], row[o]) and torch.allclose(made[~o], mean[~o] + gain @ (row[o] - mean[o]))
    o = observed[0]
    many = z[:1].expand(20_000, 5)
    drawn = module.filled_by(gaussian, many, o.expand(20_000, 5), Noise(0, CPU))
    gain = torch.linalg.solve(covariance[o][:, o], covariance[o][:, ~o]).T
    expected = covariance[~o][:, ~o] - gain @ covariance[o][:, ~o]
    assert torch.equal(drawn[:, o], many[:, o])
    assert (torch.cov(drawn[:, ~o].T) - expected).abs().max() < 0.06 * expected.diagonal().max()


@pytest.mark.parametrize("edit", [
    ("noise.normal(*z.shape).to(wide.dtype)", "0.7 * noise.normal(*z.shape).to(wide.dtype)"),
    ("return gaussian.expect(wide, observed)", "return gaussian.expect(wide, ~observed)"),
])
def test_equations_13_and_18(edit):
    """Mutations: narrow draws; the mask turned round."""
    must_fail(check_filled_by, edit)


# --- fills -----------------------------------------------------------------------------------------------------------


def trained(module=emflow, **options):
    """A network after two epochs of a fast flow, with the rows that taught it."""
    x, observed = rows_of()
    net = network(module)
    module.train_emflow(net, x, observed, torch.arange(5), quiet(), 3, 64, 1e-2, validation_fraction=0.0, **options)
    net.low.copy_(x.quantile(0.2, dim=0))  # narrow, so that it matters
    net.high.copy_(x.quantile(0.8, dim=0))
    return net, x, observed


def check_again(module):
    net, x, observed = trained(module)
    with torch.no_grad():
        filled = net.begin(torch.where(observed, x, 1e9), observed)
        for noise in (None, Noise(0, CPU)):
            made = net.again(filled, observed, noise)
            assert torch.equal(made[observed], x[observed]) and not torch.equal(made, filled)
            assert ((made >= net.low) & (made <= net.high))[~observed].all()
        whole = torch.ones_like(observed)
        assert torch.equal(net.complete(x, whole, 3, Noise(0, CPU)), x)
        z = net.flow(filled)[0].double()
        target = Conditional(net.latent.mean, net.latent.covariance, "direct").expect(z, observed)
        made = net.again(filled, observed)
        free = ~observed & (made > net.low + 1e-4) & (made < net.high - 1e-4)
        assert torch.allclose(made[free], net.flow.inverse(target.float())[0][free], atol=1e-4)


@pytest.mark.parametrize("edit", [
    ("return torch.where(observed, filled, made)", "return made"),
    ("self.flow(filled)[0], observed, noise)", "filled, observed, noise)"),
    ("self.latent.conditional(), self.flow", "self.start.conditional(), self.flow"),
    ("self.high), self.low)", "self.high), self.low - 9.0)"),
])
def test_algorithm_2(edit):
    """Mutations: observed cells are overwritten; the fill is done in data space; by the data's Gaussian; no range."""
    must_fail(check_again, edit)


@pytest.mark.parametrize("fill", ["gaussian", "centre", "random"])
def test_first_fills(fill):
    """Mutation of the fill itself: junk behind the holes would show."""
    x, observed = rows_of()
    net = network(fill=fill)
    emflow.fit_start(net, torch.where(observed, x, 1e9), observed, quiet())
    for noise in (None, Noise(0, CPU)):
        filled = net.begin(torch.where(observed, x, math.nan), observed, noise)
        assert torch.equal(filled[observed], x[observed]) and filled.abs().max() < 20
    hole = ~observed[:, 1]
    assert (filled[hole, 1].std() == 0) == (fill == "centre")


def check_random_fill(module):
    """Holes that begin at random do so without draws, too."""
    x, observed = rows_of()
    begun = []
    net = network(module, fill="random")
    honest, net.begin = net.begin, lambda x, o, noise=None: (begun.append(honest(x, o, noise)), begun[-1])[1]
    module.train_emflow(net, x, observed, torch.arange(5), quiet(), 1, draws=False, validation_fraction=0.0)
    hole = ~observed[:, 1]
    assert begun[0][hole, 1].std() > 0.1 and torch.isin(begun[0][hole, 1], x[observed[:, 1], 1]).any()


def test_random_fills_are_random():
    """Mutation: without draws they are the column's mean."""
    must_fail(check_random_fill, ('run.noise if network.fill == "random" else noise', "noise"))


def test_pictures_begin_by_their_neighbours():
    net = emflow.EMFlow((1, 4, 4), 2, 8, "nearest")
    x, observed = torch.rand(6, 16, generator=seed()), torch.rand(6, 16, generator=seed(1)) > 0.3
    filled = net.begin(x, observed)
    assert torch.equal(filled[observed], x[observed])
    assert all(torch.isin(f[~o], f[o]).all() for f, o in zip(filled, observed, strict=True))


# --- the base is online EM -------------------------------------------------------------------------------------------


FROZEN = dict(max_epochs=4, batch_size=64, learning_rate=1e-30, validation_fraction=0.0, draws=False, restart=True,
              round_epochs=99)  # one round without a refill: three passes of EM over the same rows


def check_identity(module, mechanism="mcar", width=5):
    """With a flow that stays the identity the base is what `fit_online` makes of the same batches."""
    x, observed = rows_of(p=width, mechanism=mechanism)
    net = network(module, width)
    module.train_emflow(net, x, observed, torch.arange(width), quiet(), **FROZEN)
    model, prior = GaussianModel(width), begin(x.double(), observed)[2]
    model.set(net.start.mean, net.start.covariance)
    fit_online(model, x.double(), observed, quiet(), prior, 3, 64)
    assert not torch.allclose(model.covariance, net.start.covariance, atol=1e-3)
    torch.testing.assert_close(net.latent.mean, model.mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(net.latent.covariance, model.covariance, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(net.flow.base.covariance, model.covariance.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mechanism, width", [("mcar", 5), ("mar", 5), ("mcar", 66)])
def test_with_the_identity_the_base_is_online_em(mechanism, width):
    """66 columns: their E-step is by draws."""
    check_identity(emflow, mechanism, width)


@pytest.mark.parametrize("edit", [
    ("rho = step_size(self.t, power=self.power)", "rho = step_size(self.t + 5, power=self.power)"),
    ("maximize_average(network.latent, new, n, rho, prior)", "maximize_average(network.latent, new, n, rho, None)"),
    ("new = expect_exactly(z, observed, gaussian)", "new = expect_exactly(z, torch.ones_like(observed), gaussian)"),
    ("self.every = min(max(1,", "self.every = min(max(2,"),
])
def test_online_em_catches(edit):
    """Mutations: another step size; no prior; fills count as seen; every other batch is lost."""
    must_fail(check_identity, edit)


def check_scaling(module):
    """Behind a feature-wise linear map the base is that of the data, mapped: a·μ + b, a·Σ·a."""
    x, observed = rows_of()
    net = network(module)
    net.flow = Flow([Scaling(5)], GaussianBase(5))
    a, b = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.8]), torch.tensor([1.0, -1.0, 0.0, 2.0, 5.0])
    net.flow.layers.layers[0].log_scale.data.copy_(a.log())
    net.flow.layers.layers[0].shift.data.copy_(b)
    module.train_emflow(net, x, observed, torch.arange(5), quiet(), **FROZEN)
    a, b, prior = a.double(), b.double(), begin(x.double(), observed)[2]
    model = GaussianModel(5)
    model.set((net.start.mean - b) / a, net.start.covariance / torch.outer(a, a))
    fit_online(model, x.double(), observed, quiet(), prior._replace(variance=prior.variance / a**2), 3, 64)
    torch.testing.assert_close(net.latent.mean, a * model.mean + b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net.latent.covariance, model.covariance * torch.outer(a, a), atol=1e-5, rtol=1e-5)


class Mixing(torch.nn.Module):
    """A linear map that mixes the features."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.eye(5) + 0.3 * torch.randn(5, 5, generator=seed(3)).tril(-1))

    def forward(self, x):
        return x @ self.matrix.T, torch.zeros(len(x)) + self.matrix.diagonal().log().sum()

    def inverse(self, z):
        return torch.linalg.solve(self.matrix, z.T).T, torch.zeros(len(z)) - self.matrix.diagonal().log().sum()


def check_mixing(module):
    """Behind a map that mixes, the base is online EM on the mapped rows, whose holes are where the data's are."""
    x, observed = rows_of()
    net = network(module)
    net.flow = Flow([Mixing()], GaussianBase(5))
    module.train_emflow(net, x, observed, torch.arange(5), quiet(), **FROZEN)
    with torch.no_grad():
        z = net.flow(net.begin(x, observed))[0].double()
    model = GaussianModel(5)
    model.set(net.start.mean, net.start.covariance)
    fit_online(model, z, observed, quiet(), begin(x.double(), observed)[2], 3, 64)
    torch.testing.assert_close(net.latent.covariance, model.covariance, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("check", [check_scaling, check_mixing])
def test_behind_a_linear_map(check):
    """Mutation: EM sees the rows of the data."""
    must_fail(check, ("z = network.flow(rows)[0]  # line 8", "z = rows  # line 8"))


class Both:
    """A run of which another process has seen other rows: their statistics are added."""

    def __init__(self, others):
        self.others = list(others)

    def sum(self, value):
        return value + self.others.pop(0)


def check_processes(module):
    x, observed = rows_of()
    x = x.double()
    net, prior = network(module), Prior(2, torch.ones(5).double())
    there = expect_exactly(x[100:], observed[100:], net.latent.conditional()).statistics
    whole = maximize(expect_exactly(x, observed, net.latent.conditional()).statistics, prior)
    module.update_base(net, x[:100], observed[:100], 230, prior, 1.0, Both(there))
    torch.testing.assert_close(net.latent.covariance, whole[1])


def test_processes_add_up_their_statistics():
    """Mutation: each learns a base of its own."""
    edit = ("run.sum(torch.as_tensor(part, dtype=torch.float64, device=z.device))", "torch.as_tensor(part)")
    check = copy_of(emflow)  # without the hook: the run is a stand-in
    check_processes(check)
    with pytest.raises(AssertionError):
        check_processes(copy_of(emflow, edit))


def check_beta(module):
    x, observed = rows_of()
    pair = []
    for beta in (0.0, 0.5):
        net = network(module)
        module.update_base(net, x, observed, 230, Prior(2, torch.ones(5).double()), 0.5, quiet(), beta)
        pair.append(net.latent.covariance.clone())
    torch.testing.assert_close(pair[1], pair[0] + 0.5 * torch.diag(pair[0].diagonal()))
    online = module.OnlineBase(network(module), 230, 64, Prior(2, torch.ones(5).double()), quiet(), beta=0.4)
    online.begin_epoch(2, 0)
    assert online.fading == 0.1


@pytest.mark.parametrize("edit", [("robust_covariance(covariance, beta)", "covariance"),
                                  ("self.beta * 0.5**epoch", "self.beta")])
def test_equation_31(edit):
    """Mutations: no β; a β that stays."""
    must_fail(check_beta, edit)


def check_super_batches(module):
    """500 rows in batches of 50: how many steps of EM an epoch, and how many rows each has seen."""
    x, observed = rows_of(500)
    for size, steps, rows in ((None, 10, 50), (200, 2, 200), (10_000, 1, 500), (20, 10, 20)):
        seen, honest = [], module.update_base
        module.update_base = lambda net, z, *rest, to=seen, do=honest: (to.append(len(z)), do(net, z, *rest))
        try:
            module.train_emflow(network(module), x, observed, torch.arange(5), quiet(), 3, 50, super_batch=size,
                                validation_fraction=0.0)
        finally:
            module.update_base = honest
        assert seen == 2 * steps * [rows], (size, seen)


@pytest.mark.parametrize("edit", [
    (", n_batches)\n", ", 10**9)\n"), ("if self.super_batch else None", "if False else None"),
    ("if self.batches % self.every == 0", "if True"),
])
def test_super_batches(edit):
    """Mutations: a small table never steps; nothing is gathered; a step at every batch."""
    must_fail(check_super_batches, edit)


# --- the loop --------------------------------------------------------------------------------------------------------


def check_start(module):
    """Epoch 0 is the Gaussian's answer, in the range of what was seen."""
    X = with_holes(table())
    ours = module.EMFlowImputer(**(SMALL | {"max_epochs": 1}), validation_fraction=0.0).fit(X).transform(X)
    theirs = GaussianImputer(random_state=0, verbose=False).fit(X).transform(X)
    theirs = np.clip(theirs, np.nanmin(X, 0), np.nanmax(X, 0))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("edit", [
    ("    fit_em(network.start,", "    (lambda *rest: None)(network.start,"),
    ("    network.set_base(network.start.mean, network.start.covariance)\n    network.q", "    network.q"),
])
def test_epoch_0_is_the_gaussian(edit):
    """Mutations: EM is left out; the base does not begin there."""
    must_fail(check_start, edit)


def check_judged(module):
    """Rows that judge teach nothing: other values there change the score alone. Each of their entries judges once."""
    x, observed = rows_of()
    judge = module.Judge(x, observed, torch.arange(5), 0.2, quiet().noise)
    aside = judge.aside
    assert aside.sum() == 46 and torch.equal(judge.hidden.view(4, 46, 5).sum(0), observed[aside].long())
    assert torch.equal(judge.shown, observed[aside].repeat(4, 1) & ~judge.hidden)
    assert torch.equal(judge.x, x[aside].repeat(4, 1))
    net, holes = network(module), (~observed).double().mean(0)
    net.complete = lambda x, o, n: torch.where(o, x, x + 1.0 + torch.arange(5))  # in column j it is off by 1 + j
    judged, off = judge.hidden.double().sum(0) * holes, (1.0 + torch.arange(5)) ** 2
    assert torch.isclose(judge.score(net, 1).double(), ((judged * off).sum() / judged.sum()).sqrt())
    whole = module.Judge(x, torch.ones_like(observed), torch.arange(5), 0.2, quiet().noise)
    assert torch.equal(whole.weight, whole.hidden.float())
    histories = []
    for shift in (0.0, 50.0):
        run = quiet()
        there = torch.where(aside[:, None] & (torch.arange(5) == 1), x + shift, x)
        module.train_emflow(network(module), there, observed, torch.arange(5), run, 3, 64, validation_fraction=0.2)
        histories.append(run.history)
    assert histories[0]["L1"].equals(histories[1]["L1"]) and histories[0]["validation"].notna().all()
    assert (histories[1]["validation"] > histories[0]["validation"] + 10).all()


@pytest.mark.parametrize("edit", [
    ("x, observed = x[~judge.aside], observed[~judge.aside]", "pass"),
    ("observed[self.aside].repeat(4, 1) & ~self.hidden", "observed[self.aside].repeat(4, 1)"),
    ("return torch.cat([observed & (quarter == k)", "return torch.cat([(quarter == k)"),
    ("torch.where(self.hidden, made", "torch.where(self.shown, made"),
    ("holes = (~observed)", "holes = observed"), ("self.hidden * (holes if", "(holes if"),
])
def test_what_judges_does_not_teach(edit):
    """Mutations: it teaches; the judged entries are shown; holes judge; other entries are scored."""
    must_fail(check_judged, edit)


def check_rows_aside(module):
    """A share of the rows, one at least, or what holds 8,192 entries, or 256 rows; all others teach."""
    sizes = ((100, 5, 0.1, 10), (30_000, 5, 0.5, 1638), (30_000, 784, 0.1, 256), (9, 5, 0.1, 1), (1, 5, 0.1, 0))
    for n, width, fraction, expected in sizes:
        assert module.rows_aside(n, width, fraction, quiet().noise).sum() == expected
    x, observed = rows_of(500)
    taught, honest = [], module.train_batch
    module.train_batch = lambda net, rows, *rest: (taught.append(len(rows)), honest(net, rows, *rest))
    for fraction, expected in ((0.2, 400), (0.0, 500)):
        taught.clear()
        module.train_emflow(network(module), x, observed, torch.arange(5), quiet(), 2, 50, validation_fraction=fraction)
        assert sum(taught) == expected


@pytest.mark.parametrize("edit", [
    ("max(256, 8192 // width)", "max(256, 9999 // width)"), ("max(256, 8192 // width)", "8192 // width"),
    ("x, observed = x[~judge.aside], observed[~judge.aside]", "x, observed = x[judge.aside], observed[judge.aside]"),
    ("if fraction else torch.zeros_like(observed[:, 0])", "if fraction else torch.arange(len(x)) > 400"),
])
def test_rows_aside(edit):
    """Mutations: more rows; fewer of wide tables; those aside teach; rows are lost where nobody judges."""
    check_rows_aside(copy_of(emflow))
    with pytest.raises((AssertionError, RuntimeError)):
        check_rows_aside(copy_of(emflow, edit))


def check_rounds(module):
    """When rows are filled anew, and when flow and base begin anew; the last round's flow stays."""
    x, observed = rows_of()
    refills, restarts = [], []

    class Spy(module.Current):
        def renew(self, function, noise):
            refills.append((function.__name__, noise is not None))
            super().renew(function, noise)

    class Net(module.EMFlow):
        def restart(self):
            restarts.append(len(refills))
            super().restart()

    honest, module.Current = module.Current, Spy
    try:
        with seeded(0, CPU):
            net = Net((5,), 2, 16)
        module.train_emflow(net, x, observed, torch.arange(5), quiet(), 7, 64, round_epochs=2, restart=True,
                            draws=False, validation_fraction=0.0)
    finally:
        module.Current = honest
    assert refills == [("begin", False)] + 3 * [("again", False)] and restarts == [2, 3]
    with torch.no_grad():
        assert not torch.allclose(net.flow(x)[0], x, atol=1e-3)


@pytest.mark.parametrize("edit", [
    ("if restart and rounds and within == 0", "if restart and within == 0"),
    ("if epoch and epoch % round_epochs == 0", "if epoch"),
    ("run.noise), run.noise if draws else None", "run.noise), run.noise"),
])
def test_rounds(edit):
    """Mutations: a restart before the first round; a refill every epoch; draws although means were asked for."""
    must_fail(check_rounds, edit)


def check_steps(module):
    """Every weight moves, with and without eq. 14; the base is no parameter; L2 is logged where it is descended."""
    x, observed = rows_of()
    for alpha in (None, 10.0):
        net, run = network(module), quiet()
        before = {name: w.clone() for name, w in net.named_parameters()}
        module.train_emflow(net, x, observed, torch.arange(5), run, 4, 64, alpha=alpha, validation_fraction=0.0)
        assert [name for name, w in net.named_parameters() if torch.equal(w, before[name])] == []
        assert ("L2" in run.history) == (alpha is not None)


@pytest.mark.parametrize("edit", [
    ("    run.step(loss, adam, max_norm)\n    run.log(L1=loss)", "    run.log(L1=loss)"),
    ("    if alpha is not None:\n        with run", "    if True:\n        alpha = 1.0\n        with run"),
])
def test_every_weight_moves(edit):
    """Mutations: no step down eq. 11; eq. 14 unasked."""
    must_fail(check_steps, edit)


def banana(n, number=0):
    rng = np.random.default_rng(number)
    x = rng.normal(size=n)
    return np.stack([x, 0.6 * x**2 + 0.25 * rng.normal(size=n)], 1)


def check_bow(module):
    """x₂ follows a bow that no Gaussian sees; draws of it cover the truth."""
    X = banana(1000)
    holes = X.copy()
    holes[np.random.default_rng(1).random(1000) < 0.4, 1] = np.nan
    hidden = np.isnan(holes[:, 1])
    imputer = module.EMFlowImputer(hidden=32, max_epochs=25, batch_size=128, random_state=0, verbose=False,
                                   device="cpu", learning_rate=3e-3, patience=None).fit(holes)
    filled = imputer.transform(holes)
    assert np.sqrt(np.mean((filled - X)[hidden, 1] ** 2)) < 0.6 * X[:, 1].std()
    draws = imputer.sample(holes, 60)[:, hidden, 1]
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    assert 0.84 < ((low <= X[hidden, 1]) & (X[hidden, 1] <= high)).mean() < 0.985  # rather wide: see the chapter


def test_a_bow_and_the_spread_of_draws():
    """Mutation: a pass fills with means, whatever noise there is."""
    must_fail(check_bow, ("self.flow(filled)[0], observed, noise)", "self.flow(filled)[0], observed, None)"))


def check_constant_pixels(module):
    """Digits have pixels that are always dark: the density of the first epoch stays within reason."""
    X = with_holes(load_digits().images[:300, None].astype("float32"), 0.5)
    imputer = module.EMFlowImputer(**(SMALL | {"max_epochs": 3, "hidden": 32}), learning_rate=1e-3).fit(X)
    assert (imputer.history_["L1"].iloc[1:] < -20).all()


def test_constant_columns_get_a_little_variance():
    """Mutation: none, and the loss of a constant pixel explodes."""
    must_fail(check_constant_pixels, ("(1e-4 - covariance.diagonal())", "(1e-12 - covariance.diagonal())"))


# --- the estimator ---------------------------------------------------------------------------------------------------


def test_log_prob_is_a_change_of_variables():
    """In the table's units, against the Jacobian by automatic differentiation."""
    X = table(200, 4) * np.array([1.0, 10.0, 100.0, 0.1]) + 5
    imputer = EMFlowImputer(**(SMALL | {"max_epochs": 6}), learning_rate=1e-2, validation_fraction=0.0)
    imputer.fit(with_holes(X))
    spread = np.array([b.spread for b in imputer.encoder_.blocks_])
    flow = imputer.network_.flow
    x = torch.tensor(imputer.encoder_.transform(X)[0], dtype=torch.float32)
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda row: flow(row[None])[0][0]))(x)
    base = torch.distributions.MultivariateNormal(flow.base.mean.double(), flow.base.covariance.double())
    with torch.no_grad():
        expected = base.log_prob(flow(x)[0].double()) + torch.linalg.slogdet(jacobian.double())[1]
    assert torch.linalg.slogdet(jacobian)[1].std() > 1e-3
    np.testing.assert_allclose(imputer.log_prob(X), expected.numpy() - np.log(spread).sum(), rtol=1e-4, atol=1e-3)


def test_densities_that_are_refused():
    X = with_holes(table(60, 3))
    imputer = EMFlowImputer(**SMALL).fit(X)
    row = int(np.isnan(X).any(1).nonzero()[0][0])
    with pytest.raises(ValueError, match=f"row {row} has holes"):
        imputer.log_prob(X)
    frame = load_iris(as_frame=True).data.assign(kind=np.array(list("abc"), dtype=object)[load_iris().target])
    with pytest.raises(ValueError, match="has categories"):
        EMFlowImputer(**SMALL).fit(frame).log_prob(frame)


@pytest.mark.parametrize("own", [{}, {"fill": "random", "draws": False, "alpha": 10.0}], ids=["default", "paper"])
def test_no_peek(own):
    check_no_peek(EMFlowImputer(**SMALL, **own), with_holes(table(80, 4)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fill", ["gaussian", "bilinear"])
def test_images(channels, fill):
    """No peek; observed pixels stay; an empty picture is filled."""
    x = np.random.default_rng(0).random((40, channels, 4, 4)).astype("float32")
    x[:, :, 1:3] += x[:, :, :1]
    holes = with_holes(x, 0.4).astype("float32")
    holes[3] = np.nan
    if channels == 3:
        check_no_peek(EMFlowImputer(**SMALL, fill=fill), holes)
    imputer = EMFlowImputer(**SMALL, fill=fill).fit(holes)
    filled, seen = imputer.transform(holes), ~np.isnan(holes)
    assert np.array_equal(filled[seen], holes[seen]) and np.isfinite(filled).all()
    assert imputer.sample(holes, 2)[:, ~seen].std(0).mean() > 0.01


class Stopped(Interruptible, EMFlowImputer):
    """Ctrl-C before epoch `stop`."""

    def __init__(self, **common):
        super().__init__(**common)


@pytest.mark.parametrize("own", [
    {}, {"super_batch": 128, "batch_size": 32, "restart": True, "round_epochs": 2, "alpha": 1.0},
], ids=["default", "everything"])
def test_an_interrupted_fit_goes_on_to_the_same_result(own, tmp_path):
    """Mutation (run below): the rows as last filled are not stored."""
    X, options = with_holes(table(200, 4)), SMALL | {"max_epochs": 7} | own
    whole = Stopped(**options).fit(X)

    def resumed(path):
        imputer = Stopped(**options, checkpoint=str(path))
        imputer.stop = 4
        with pytest.raises(KeyboardInterrupt):
            imputer.fit(X)
        imputer.stop = None
        imputer.fit(X)
        assert imputer.begun == [4, 5, 6] and not path.exists()
        return imputer

    again = resumed(tmp_path / "fit")
    assert again.history_.drop(columns="seconds").equals(whole.history_.drop(columns="seconds"))
    np.testing.assert_array_equal(again.sample(X, 2), whole.sample(X, 2))
    if not own:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(emflow.Current, "load_state_dict", lambda self, state: None)
            forgetful = resumed(tmp_path / "forgetful")
        assert not forgetful.history_["L1"].equals(whole.history_["L1"])


def error_of(X, rate=0.3, **own):
    """RMSE over hidden cells in standard deviations, ours over the column mean's."""
    holes = with_holes(X, rate)
    hidden, spread = np.isnan(holes), X.std(0)
    filled = EMFlowImputer(**(SMALL | own)).fit(holes).transform(holes)
    assert np.isfinite(filled).all() and np.array_equal(filled[~hidden], holes[~hidden])
    means = np.broadcast_to(np.nanmean(holes, 0), X.shape)
    ours, theirs = (np.sqrt(np.mean(((f - X) / np.where(spread > 0, spread, 1))[hidden] ** 2)) for f in (filled, means))
    return ours / theirs


@pytest.mark.parametrize("n, p", [(50, 120), (12, 40), (100, 100)])
def test_more_columns_than_rows(n, p):
    assert error_of(table(n, p)) < 0.75


def test_collinear_duplicated_and_constant_columns():
    x = table(300, 6)
    assert error_of(np.c_[x, x @ np.random.default_rng(1).normal(size=(6, 3))]) < 0.5
    assert error_of(np.c_[x, x]) < 0.5
    holes = with_holes(np.c_[x, np.full(300, 5.25)])
    imputer = EMFlowImputer(**SMALL).fit(holes)
    assert (imputer.transform(holes)[:, -1] == 5.25).all() and (imputer.sample(holes, 2)[:, :, -1] == 5.25).all()


def test_one_column_one_row_and_one_value():
    column = with_holes(50 + 5 * np.random.default_rng(0).normal(size=(200, 1)))
    imputer = EMFlowImputer(**SMALL).fit(column)
    assert abs(imputer.transform([[np.nan]])[0, 0] - 50) < 2
    assert 3 < imputer.sample(np.full((300, 1), np.nan), 1).std() < 8
    one = EMFlowImputer(**SMALL).fit(np.array([[1.0, 2.0, np.nan], [3.0, np.nan, np.nan]]))
    assert np.isfinite(one.transform([[np.nan, 2.0, np.nan]])[0, :2]).all()
    assert (EMFlowImputer(**SMALL).fit(np.ones((20, 3))).transform(np.full((2, 3), np.nan)) == 1).all()


def test_huge_values_whole_numbers_and_hardly_anything_seen():
    assert error_of(table() * 1e12 + 3e12) < 0.6
    whole = pd.DataFrame(np.round(table(300, 5) * 20).astype(int)).astype("Int64")
    holes = whole.mask(np.random.default_rng(0).random(whole.shape) < 0.3)
    filled = EMFlowImputer(**SMALL).fit_transform(holes)
    assert (filled.dtypes == "Int64").all() and not filled.isna().any(axis=None)
    assert error_of(table(1000, 20), 0.95) < 1.0


def test_a_wild_value():
    X = table(300, 5)
    X[7] = 1e9
    filled = EMFlowImputer(**SMALL).fit_transform(with_holes(X))
    assert np.isfinite(filled).all()


def test_words_and_switches_that_are_none():
    X = with_holes(table(40, 3))
    for own, words in (({"fill": "best"}, "'gaussian' or 'centre'"), ({"fill": None}, "fill=None"),
                       ({"fill": "nearest"}, "X is a table"), ({"draws": 1}, "draws=1"),
                       ({"restart": "no"}, "restart='no'"),
                       ({"power": 0.5}, "power=0.5"), ({"alpha": -1.0}, "alpha"), ({"n_passes": 0}, "n_passes"),
                       ({"super_batch": 0}, "super_batch"), ({"validation_fraction": 1.0}, "validation_fraction")):
        refuses(lambda own=own: EMFlowImputer(**SMALL, **own).fit(X), ValueError, words)


def test_the_published_setting_runs():
    """Random fill, means, restart, super-batches, a large α that no step overflows."""
    X = with_holes(table(300, 6))
    imputer = EMFlowImputer(**(SMALL | {"max_epochs": 7}), fill="random", draws=False, restart=True, round_epochs=2,
                            alpha=1e6, beta=0.01, super_batch=256, batch_size=64).fit(X)
    assert np.isfinite(imputer.transform(X)).all() and np.isfinite(imputer.history_["L2"].iloc[1:]).all()


def test_ordinary_use_warns_of_nothing(recwarn):
    """Mutation: patience is kept where no cell judges, and the run says that it had no effect."""
    EMFlowImputer(**SMALL, validation_fraction=0.0).fit(with_holes(table(60, 3)))
    assert [w for w in recwarn if issubclass(w.category, RuntimeWarning)] == []
