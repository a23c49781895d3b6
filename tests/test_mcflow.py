"""MCFlow: equations by hand, who gets a gradient, fills, rounds, checkpoints, bad input; mutations, all run.

A mutation is a copy of the module, without the hook that checks shapes, with one piece of its source replaced."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Interruptible, copy_of, refuses, seed
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris

from missingbook.flows import mcflow
from missingbook.flows.mcflow import MCFlowImputer
from missingbook.flows.realnvp import RealNVP
from missingbook.foundations.imputer import check_no_peek
from missingbook.foundations.masks import independent_dropout
from missingbook.foundations.training import Noise, TrainingRun, seeded

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
CPU = torch.device("cpu")
SMALL = dict(hidden=16, latent_hidden=16, n_couplings=2, max_epochs=4, random_state=0, verbose=False, device="cpu")


def must_fail(check, *edits):
    """The check passes on the module and fails on its mutation."""
    check(mcflow)
    with pytest.raises((AssertionError, RuntimeError)):
        check(copy_of(mcflow, *edits))


def table(n=120, width=5, rate=0.4, number=0):
    """(x, observed): correlated normal columns, no row empty."""
    half = torch.randn(width, width, generator=seed(number))
    x = torch.randn(n, width, generator=seed(number + 1)) @ half
    observed = independent_dropout((n, width), rate, seed(number + 2))
    observed[:, 0] |= ~observed.any(1)
    return x, observed


def pictures(n=80, rate=0.5):
    """8 × 8 digits from 0 to 16, NaN where missing; the last one has nothing."""
    x = load_digits().images[:n, None].astype("float32")
    x[~independent_dropout(x.shape, rate, seed(1)).numpy()] = np.nan
    x[-1] = np.nan
    return x


def network(module=mcflow, shape=(5,), fill="centre", **options):
    with seeded(0, CPU):
        return module.MCFlow(shape, torch.arange(math.prod(shape)), 2, 16, 16, fill, **options)


def live_flow(width=5):
    """A flow that is not the identity, float64."""
    return RealNVP(width, 4, 8, generator=seed(), identity=False).double()


# --- equations -------------------------------------------------------------------------------------------------------


def check_likelihoods(module):
    flow, x = live_flow(), torch.randn(30, 5, generator=seed(), dtype=torch.float64)
    z, log_det = flow(x)
    by_hand = (-0.5 * z.square().sum(1) - 2.5 * math.log(2 * math.pi) + log_det).sum().item()
    assert math.isclose(module.joint_log_likelihood(flow, x).item(), by_hand, rel_tol=1e-12)
    assert math.isclose(module.flow_loss(flow, x).item(), -by_hand / 30, rel_tol=1e-12)


@pytest.mark.parametrize("edit", [
    ("return -flow.log_prob(x).mean()", "return flow.log_prob(x).mean()"),
    ("return flow.log_prob(x).sum()", "return flow.log_prob(x).mean()"),
])
def test_equations_1_2_6(edit):
    """Mutations: the sign of J; a mean for the sum of eq. 1."""
    must_fail(check_likelihoods, edit)


def check_conditional_mean(module):
    half = torch.randn(5, 5, generator=seed(), dtype=torch.float64)
    mean, covariance = torch.arange(5.0, dtype=torch.float64), half @ half.T + torch.eye(5, dtype=torch.float64)
    flow = RealNVP(5, 2, hidden=4, generator=seed()).double()
    flow.base.set(mean, covariance)
    x, observed = flow.base.sample(40, generator=seed(1)), torch.rand(40, 5, generator=seed(2)) < 0.5
    observed[0], observed[1] = True, False  # a complete row, and an empty one
    found = module.most_probable(flow, torch.where(observed, x, 9.0), observed)
    for row, z, o in zip(x, found, observed, strict=True):
        weights = torch.linalg.solve(covariance[o][:, o], covariance[o][:, ~o])
        assert torch.equal(z[o], row[o])
        assert torch.allclose(z[~o], mean[~o] + weights.T @ (row[o] - mean[o]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("edit", [
    ("loss = -joint_log_likelihood", "loss = joint_log_likelihood"),
    ("max_iter=steps", "max_iter=2"),
    ("return x.detach().masked_scatter(~observed, free)", "return torch.zeros_like(x).masked_scatter(~observed, free)"),
])
def test_equation_3_gives_the_conditional_mean(edit):
    """Mutations: downhill; two steps; the observed entries are forgotten."""
    must_fail(check_conditional_mean, edit)


def test_most_probable_of_a_flow_is_a_maximum_and_of_a_complete_row_itself():
    flow = live_flow()
    x, observed = (t[:20] for t in table())
    x = x.double()
    found = mcflow.most_probable(flow, torch.where(observed, x, 0.0), observed)
    assert torch.equal(found[observed], x[observed])
    with torch.no_grad():
        top = flow.log_prob(found)
        assert top.mean() > flow.log_prob(torch.where(observed, x, 0.0)).mean() + 0.1
        for k in range(20):  # the density has kinks, where no gradient vanishes: look around instead
            step = 0.05 * torch.randn(x.shape, generator=seed(k), dtype=x.dtype)
            assert (flow.log_prob(torch.where(observed, x, found + step)) < top + 0.02).all()
    assert torch.equal(mcflow.most_probable(flow, x, torch.ones_like(observed)), x)
    assert all(w.grad is None for w in flow.parameters())


def check_reconstruction(module):
    flow, x = live_flow(), torch.randn(30, 5, generator=seed(), dtype=torch.float64)
    with seeded(0, CPU):
        latent = module.LatentNetwork(5, 7).double()
    latent.layers[-1].weight.data *= 20
    x_rec, log_prob = module.reconstruct(flow, latent, x)
    assert torch.allclose(flow(x_rec)[0], latent(flow(x)[0]), atol=1e-10)
    assert torch.allclose(log_prob, flow.log_prob(x_rec), atol=1e-9) and log_prob.std() > 0.01
    assert torch.isclose(module.unlikelihood(log_prob), -flow.log_prob(x_rec).mean())


@pytest.mark.parametrize("edit", [
    ("flow.base.log_prob(y) - log_det", "flow.base.log_prob(y) + log_det"),
    ("flow.base.log_prob(y) - log_det", "flow.base.log_prob(y)"),
    ("y = latent(flow(x)[0])", "y = latent(x)"),
    ("return -log_prob.mean()", "return log_prob.mean()"),
])
def test_equation_7(edit):
    """Mutations: the sign of the log-determinant; no log-determinant; H in pixel space; the sign of J₁."""
    must_fail(check_reconstruction, edit)


def check_observed_error(module):
    made = torch.tensor([[1.0, 5.0, 2.0], [0.0, 3.0, 7.0], [4.0, 4.0, 4.0]])
    given = torch.tensor([[0.0, math.nan, 4.0], [math.nan, 2.0, math.nan], 3 * [math.nan]])
    made.requires_grad_()
    value = module.observed_error(made, given, ~given.isnan())
    assert math.isclose(value.item(), ((1 + 4) / 2 + 1 + 0) / 3, rel_tol=1e-6)
    (slope,) = torch.autograd.grad(value, made)
    assert torch.allclose(slope, torch.tensor([[1.0, 0.0, -2.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]) / 3)


@pytest.mark.parametrize("edit", [
    ("torch.where(observed, x_rec - torch.where(observed, x, 0.0), 0.0)", "(x_rec - torch.where(observed, x, 0.0))"),
    ("torch.where(observed, x_rec - torch.where(observed, x, 0.0), 0.0)", "torch.where(observed, x_rec - x, 0.0) + x"),
    (".clamp(min=1)).mean()", ").mean()"),
    ("squared.sum(1) / observed.sum(1)", "squared.sum(1) / x.shape[1] * 1.0 ** observed.sum(1)"),
])
def test_equation_8(edit):
    """Mutations: no mask; a peek; an empty row is 0 / 0; the mean runs over all entries."""
    must_fail(check_observed_error, edit)


def check_objective(module):
    """Weights and parts; the prior sees the observed entries in place."""
    net, (x, observed) = network(module), table()
    begin = net.begin(x, observed)
    values = module.latent_objective(net, begin, x, observed, 2.0, lambda rows: rows.square().sum(1), 3.0)
    x_rec, log_prob = module.reconstruct(net.flow, net.latent, begin)
    j1, j2 = -log_prob.mean(), module.observed_error(x_rec, x, observed)
    j3 = torch.where(observed, x, x_rec).square().sum(1).mean()
    assert torch.allclose(values["loss"], j2 + (2 * j1 + 3 * j3) / 5) and torch.allclose(values["J3"], j3)


@pytest.mark.parametrize("edit", [
    ("likelihood_weight / network.width", "likelihood_weight"),
    ("prior(torch.where(observed, x, x_rec)).mean()", "prior(x_rec).mean()"),
])
def test_objective(edit):
    """Mutations: the weight counts pixels; the prior sees a reconstruction."""
    must_fail(check_objective, edit)


# --- who gets a gradient ---------------------------------------------------------------------------------------------


def check_gradients(module):
    net, (x, observed) = network(module), table()
    module.latent_objective(net, net.begin(x, observed), x, observed, 1.0)["loss"].backward()
    assert all(w.grad is not None and w.grad.any() for w in net.latent.parameters())
    assert all(w.grad is None for w in net.flow.parameters())
    net.zero_grad(set_to_none=True)
    with torch.no_grad():
        completed = net.complete(x, observed)
    module.flow_loss(net.flow, completed).backward()
    assert all(w.grad is None for w in net.latent.parameters())
    assert any(w.grad is not None and w.grad.any() for w in net.flow.parameters())


@pytest.mark.parametrize("edit", [
    ("w.requires_grad_(False)", "pass"),
    ("y = latent(flow(x)[0]).to(x.dtype)", "y = latent(flow(x)[0]).detach().to(x.dtype)"),
    ("            w.requires_grad_(True)", "            pass"),
])
def test_gradients(edit):
    """Mutations: frozen does not freeze; H is cut off; G stays frozen for ever."""
    must_fail(check_gradients, edit)


def test_every_weight_of_the_flow_moves_in_training():
    x, observed = table()
    net = network()
    before = {name: w.clone() for name, w in net.named_parameters()}
    run = TrainingRun(0, "cpu", verbose=False)
    mcflow.train_mcflow(net, x, observed, run, 3, 16, flow_learning_rate=1e-3)
    same = [name for name, w in net.named_parameters() if torch.equal(w, before[name])]
    assert same == [] and {"J", "J1", "J2", "loss", "validation"} <= set(run.history)


def test_frozen_ends_after_an_error_and_leaves_what_was_frozen():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with pytest.raises(KeyError), mcflow.frozen(layer):
        assert not layer.weight.requires_grad
        raise KeyError
    assert layer.weight.requires_grad and not layer.bias.requires_grad


# --- fills and hiding ------------------------------------------------------------------------------------------------


def check_hidden_again(module, share=0.6):
    owner = torch.tensor([0, 0, 1, 2, 2, 2])
    observed = torch.rand(3000, 6, generator=seed()) < 0.7
    observed[:5] = torch.tensor([False, False, True, False, False, False])
    shown = module.hide_again(observed, share, owner, Noise(0, CPU))
    assert not (shown & ~observed).any() and torch.equal(shown.any(1), observed.any(1))
    for a, b in ((0, 1), (3, 4), (4, 5)):
        both = observed[:, a] & observed[:, b]
        assert torch.equal(shown[both, a], shown[both, b])
    whole = torch.ones(20_000, 6, dtype=torch.bool)
    hidden = 1 - module.hide_again(whole, share, owner, Noise(1, CPU)).double().mean().item()
    assert abs(hidden - share * (1 - share**2)) < 0.01  # a row of which all owners would go keeps everything
    assert torch.equal(module.hide_again(whole, 0.0, owner, Noise(1, CPU)), whole)


@pytest.mark.parametrize("edit", [
    ("(lot >= share)[:, owner]", "(noise.uniform(*observed.shape) >= share)"),
    ("return shown | (observed & ~shown.any(1, keepdim=True))", "return shown"),
    ("shown = observed & (lot >= share)", "shown = (lot >= share)"),
    ("(lot >= share)", "(lot < share)"),
])
def test_hide_again(edit):
    """Mutations: every entry by itself; rows that lose everything; the missing is shown; the share turned round."""
    must_fail(check_hidden_again, edit)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.0, 0.95), st.floats(0.05, 1.0))
def test_hide_again_leaves_no_row_empty(number, owners, share, rate):
    owner = torch.arange(owners).repeat(2)
    observed = torch.rand(40, 2 * owners, generator=seed(number)) < rate
    shown = mcflow.hide_again(observed, share, owner, Noise(number, CPU))
    assert torch.equal(shown.any(1), observed.any(1)) and not (shown & ~observed).any()


def check_random_fill(module):
    x, observed = table(2000, 3, 0.5)
    junk = torch.where(observed, x, -1e3)
    quantiles = module.observed_quantiles(junk, observed)
    assert (quantiles.diff(dim=0) >= 0).all()
    filled = module.random_fill(junk, observed, quantiles, Noise(0, CPU))
    assert torch.equal(filled[observed], x[observed])
    for j in range(3):
        have, new = x[observed[:, j], j].sort().values, filled[~observed[:, j], j].sort().values
        assert torch.isin(new, have).all()
        apart = max(((have <= v).double().mean() - (new <= v).double().mean()).abs() for v in have)
        assert apart < 1.63 * math.sqrt(1 / len(have) + 1 / len(new)) + 1 / 64  # Kolmogorov-Smirnov, 1%
    codes = [torch.searchsorted(quantiles[:, j].contiguous(), filled[:, j].contiguous()).double() for j in (0, 1)]
    both = ~observed[:, 0] & ~observed[:, 1]
    assert abs(np.corrcoef(codes[0][both], codes[1][both])[0, 1]) < 0.2  # no entry looks at another


@pytest.mark.parametrize("edit", [
    ("order = torch.where(observed, x, math.inf).sort(0).values", "order = x.sort(0).values"),
    ("noise.uniform(*x.shape)", "noise.uniform(len(x), 1).expand(x.shape)"),
    ("noise.uniform(*x.shape)", "noise.uniform(*x.shape) ** 2"),
    ("torch.where(observed, x, quantiles.gather(0, level))", "quantiles.gather(0, level)"),
])
def test_random_fill(edit):
    """Mutations: quantiles of hidden values; one lot a row; low values too often; observed entries overwritten."""
    must_fail(check_random_fill, edit)


def test_quantiles_of_few_and_no_values():
    x = torch.tensor([[5.0, 7.0, 1.0], [6.0, 8.0, 3.0]])
    observed = torch.tensor([[True, False, True], [False, False, True]])
    quantiles = mcflow.observed_quantiles(x, observed)
    assert (quantiles[:, 0] == 5).all() and (quantiles[:, 1] == 0).all() and quantiles[:, 2].mean() == 2


@pytest.mark.parametrize("kind", ["bilinear", "nearest"])
def test_first_fill(kind):
    x, observed = torch.rand(4, 2, 5, 6, generator=seed()), independent_dropout((4, 2, 5, 6), 0.7, seed(1))
    observed[0, 1], observed[1] = False, False
    centre = torch.rand(2, 5, 6, generator=seed(2))
    filled = mcflow.first_fill(torch.where(observed, x, math.nan), observed, centre, kind)
    assert torch.isfinite(filled).all() and torch.equal(filled[observed], x[observed])
    assert torch.equal(filled[0, 1], centre[1]) and torch.equal(filled[1], centre)
    assert mcflow.first_fill(x[:0], observed[:0], centre, kind).shape == (0, 2, 5, 6)
    with pytest.raises(ValueError, match="'bilinear' or 'nearest'"):
        mcflow.first_fill(x, observed, centre, "best")


def check_complete(module):
    x, observed = table()
    for fill in ("centre", "random"):
        net = network(module, fill=fill)
        net.learn_columns(x, observed)
        with torch.no_grad():
            a, b = net.complete(x, observed), net.complete(torch.where(observed, x, 1e6), observed)
        assert torch.equal(a[observed], x[observed]) and torch.equal(a[~observed], b[~observed])
    assert torch.allclose(net.centre[0], x[observed[:, 0], 0].mean())


@pytest.mark.parametrize("edit", [
    ("return torch.where(observed, x, made)", "return made"),
    ("return torch.where(observed, x, self.centre)", "return torch.where(observed, x, self.centre + 1e-6 * x)"),
    ("self.centre.copy_(torch.where(observed, x, 0.0)", "self.centre.copy_(x"),
])
def test_complete(edit):
    """Mutations: observed entries are overwritten; a peek in the first fill; a mean of hidden values."""
    must_fail(check_complete, edit)


def test_one_column_has_a_flow_of_its_own():
    layer = mcflow.Scaling(3).double()
    layer.log_scale.data.copy_(torch.tensor([0.5, -1.0, 0.0])), layer.shift.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    x = torch.randn(6, 3, generator=seed(), dtype=torch.float64)
    z, log_det = layer(x)
    back, log_det_back = layer.inverse(z)
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda row: layer(row[None])[0][0]))(x)
    assert torch.allclose(back, x) and torch.allclose(log_det, torch.linalg.slogdet(jacobian)[1])
    assert torch.allclose(log_det + log_det_back, torch.zeros(6, dtype=torch.float64))
    column = 50 + 5 * np.random.default_rng(0).normal(size=(200, 1))
    imputer = MCFlowImputer(**(SMALL | {"max_epochs": 30}), flow_learning_rate=1e-2).fit(column)
    sd = column.std()
    exact = -0.5 * ((column[:, 0] - column.mean()) / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi))
    assert np.abs(imputer.log_prob(column) - exact).mean() < 0.1
    assert abs(imputer.transform([[np.nan]])[0, 0] - 50) < 5


# --- the loop --------------------------------------------------------------------------------------------------------


def counted(owner, name):
    """A list that grows with every call of the method, which goes on as before."""
    calls, honest = [], getattr(owner, name)

    def call(*args):
        calls.append(args)
        return honest(*args)

    setattr(owner, name, call)
    return calls


def check_rounds(module):
    assert [e for e in range(100) if module.new_round(e, 100)] == [2, 4, 8, 16, 32, 64]
    assert not module.new_round(4, 4)  # nothing comes after it
    x, observed = table()
    for feed, restart in (("first", False), ("last", True)):
        net = network(module)
        made = counted(net, "new_flow")
        run = TrainingRun(0, "cpu", verbose=False)
        module.train_mcflow(net, x, observed, run, 6, 64, hide=0.0, feed=feed, restart=restart, decay=0.5,
                            validation_fraction=0.0)
        done = run.parts["done"]
        rows, seen = done.rows
        assert torch.equal(done.x[seen], rows[seen])
        assert not torch.equal(done.x, done.begin) and len(made) == 2 * restart
        assert math.isclose(run.parts["adam_latent"].param_groups[0]["lr"], 1e-3 * 0.5**2)
        assert math.isclose(run.parts["adam_flow"].param_groups[0]["lr"], 3e-5 * 0.5**2)


@pytest.mark.parametrize("edit", [
    ("return 2 <= epoch < max_epochs and epoch & (epoch - 1) == 0", "return False"),
    ("done.x, done_judge.x = done.again(feed), done_judge.again(feed)", "pass"),
    ("            if restart:", "            if False:"),
    ('adam.param_groups[0]["lr"] *= decay', "pass"),
])
def test_rounds(edit):
    """Mutations: no round is ever new; nothing is completed; no restart; no decay."""
    must_fail(check_rounds, edit)


def check_copying(module):
    """The first fill shows H what it was not hidden: with hide, the fill knows less than was seen."""
    x, observed = table(200, 5, 0.1)
    net = network(module)
    net.learn_columns(x, observed)
    begun = counted(net, "begin")
    run = TrainingRun(0, "cpu", verbose=False)
    module.train_mcflow(net, x, observed, run, 2, 64, hide=0.5, validation_fraction=0.0)
    shares = [(args[1].double().mean() / observed.double().mean()).item() for args in begun if len(args[1]) == 200]
    assert len(shares) >= 3 and shares[0] == 1 and max(shares[1:]) < 0.7 and shares[1] != shares[2]


def test_hide_hides():
    """Mutation: what is hidden stays in the first fill."""
    before = "network.begin(*rows, run.noise), x, shown)"
    must_fail(check_copying, (before, before.replace("shown", "observed")))


def check_learning(module):
    """Half of the cells of strongly related columns: far better than the mean, in training and on new rows."""
    common = torch.randn(450, 1, generator=seed())
    x = common + 0.3 * torch.randn(450, 6, generator=seed(1))
    observed = independent_dropout(x.shape, 0.5, seed(2))
    observed[:, 0] |= ~observed.any(1)
    with seeded(0, CPU):
        net = module.MCFlow((6,), torch.arange(6), 2, 32, 32, "centre")
        run = TrainingRun(0, "cpu", verbose=False)
        module.train_mcflow(net, x[:300], observed[:300], run, 24, 32, learning_rate=2e-3)
        made = net.complete(x, observed)

    def error(z, rows):
        return (z - x)[rows][~observed[rows]].square().mean().sqrt().item()

    for rows in (slice(0, 300), slice(300, 450)):
        assert error(made, rows) < 0.6 * error(net.centre.expand_as(x), rows)


def test_learning():
    """Mutation: H's loss has the wrong sign."""
    must_fail(check_learning, ('loss = values["J2"] + likelihood', 'loss = -0.01 * values["J2"] + likelihood'))


class Interrupted(Interruptible, MCFlowImputer):
    """Ctrl-C before epoch `stop`."""

    def __init__(self, **common):
        super().__init__(**common)


def check_resume(folder, feed, hide, fill, restart=False):
    X = pictures(40)
    own = SMALL | dict(max_epochs=7, batch_size=16, flow_learning_rate=1e-3)
    own |= dict(feed=feed, hide=hide, fill=fill, restart=restart)
    whole = Interrupted(**own).fit(X)
    broken = Interrupted(**own, checkpoint=str(folder / "fit"))
    broken.stop = 5  # rounds began at 2 and 4
    with pytest.raises(KeyboardInterrupt):
        broken.fit(X)
    broken.stop = None
    broken.fit(X)
    pairs = zip(whole.network_.state_dict().items(), broken.network_.state_dict().values(), strict=True)
    assert [name for (name, a), b in pairs if not torch.equal(a, b)] == []
    assert np.array_equal(whole.transform(X), broken.transform(X)) and not (folder / "fit").exists()


@pytest.mark.parametrize("feed, hide, fill, restart", [
    ("first", 0.5, "bilinear", False), ("last", 0.0, "random", False), ("first", 0.0, "random", True)])
def test_an_interrupted_fit_goes_on_bit_for_bit(tmp_path, feed, hide, fill, restart):
    check_resume(tmp_path, feed, hide, fill, restart)


def test_a_forgotten_completion_is_found(tmp_path, monkeypatch):
    """Mutation: a checkpoint keeps the first fill in place of the last completion."""
    monkeypatch.setattr(mcflow.Completion, "state_dict", lambda self: {"x": self.begin})
    with pytest.raises(AssertionError):
        check_resume(tmp_path, "last", 0.0, "random")


# --- the estimator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [{}, {"feed": "last", "hide": 0.0, "fill": "random"}, {"fill": "nearest"}])
def test_no_peek(own):
    check_no_peek(MCFlowImputer(**SMALL, **own), pictures())
    if own.get("fill") != "nearest":
        check_no_peek(MCFlowImputer(**SMALL, **own), torch.where(table()[1], table()[0], math.nan).numpy())


class Peeking(MCFlowImputer):
    """The mutation: the first fill of a completion is made from what stands behind the holes."""

    def __init__(self, **common):
        super().__init__(**common)

    def _complete(self, x, observed):
        return super()._complete(x + 0.0, observed) + 1e-3 * x


class RefusingOnlyTheDirty(MCFlowImputer):
    """The mutation: whether a density is given depends on what stands behind the holes."""

    def __init__(self, **common):
        super().__init__(**common)

    def _log_prob(self, network, x, observed):
        if x.abs().max() > 100:
            raise ValueError("too large")
        return network.flow.log_prob(x.flatten(1))


class RefusingInOtherWords(RefusingOnlyTheDirty):
    """The mutation: the refusal tells what stands there."""

    def _log_prob(self, network, x, observed):
        raise ValueError(f"the largest entry is {x.abs().max()}")


@pytest.mark.parametrize("mutant", [Peeking, RefusingOnlyTheDirty, RefusingInOtherWords])
def test_no_peek_finds(mutant):
    with pytest.raises(AssertionError, match="depends on what stands behind"):
        check_no_peek(mutant(**SMALL), pictures())


@pytest.mark.parametrize("own, X, words", [
    (dict(fill="best"), pictures(), "fill='best'.*bilinear"),
    (dict(feed="both"), pictures(), "feed='both'.*'first' or 'last'"),
    (dict(feed="last", hide=0.5), pictures(), "feed='last' with hide=0.5.*hide=None"),
    (dict(restart="no"), pictures(), "restart='no'"), (dict(fill=2), pictures(), "fill=2"),
    (dict(feed="last", hide="0"), pictures(), "hide='0'"),
    (dict(likelihood_weight=math.inf), pictures(), "likelihood_weight"),
    (dict(fill="bilinear"), np.ones((9, 3)), "fill='bilinear'.*table.*'centre' or 'random'"),
    (dict(fill="nearest"), pd.DataFrame(np.ones((9, 3))), "table"),
    (dict(fill="nearest"), [[1.0, 2.0], [3.0, 4.0]], "table"),
    (dict(hide=0.99), pictures(), "hide=0.99"), (dict(hide=-0.1), pictures(), "hide=-0.1"),
    (dict(decay=0.0), pictures(), "decay=0.0"), (dict(n_couplings=0), pictures(), "n_couplings=0"),
    (dict(latent_hidden=0), pictures(), "latent_hidden=0"),
    (dict(likelihood_weight=-1.0), pictures(), "likelihood_weight"),
    (dict(flow_learning_rate=0), pictures(), "flow_learning_rate"),
    (dict(), np.full((3, 1, 4, 4), np.nan), "no pixel of X is observed"),  # a missing rate of 1
    (dict(), [np.zeros((1, 8, 8)), np.zeros((1, 6, 6))], "2 shapes.*bring them to one"),  # pictures of several sizes
])
def test_refusals(own, X, words):
    refuses(lambda: MCFlowImputer(**(SMALL | own)).fit(X), ValueError, words)


def test_bad_sizes_of_the_latent_network():
    refuses(lambda: mcflow.LatentNetwork(0), ValueError, "use 1 or more")
    refuses(lambda: mcflow.LatentNetwork(3, n_hidden=0), ValueError, "n_hidden=0")


def test_pictures_of_another_shape_than_fitted():
    imputer = MCFlowImputer(**SMALL).fit(pictures())
    for other in (np.zeros((2, 3, 8, 8)), np.zeros((2, 1, 8, 7)), np.zeros((2, 1, 16, 16))):
        with pytest.raises(ValueError, match=r"X holds images of shape.*fit saw \(1, 8, 8\)"):
            imputer.transform(other)


def test_nothing_missing_nothing_seen_and_one_picture():
    X = pictures()
    whole = load_digits().images[:30, None].astype("float32")
    assert np.array_equal(MCFlowImputer(**SMALL).fit_transform(whole), whole)  # a missing rate of 0
    imputer = MCFlowImputer(**SMALL).fit(X)
    nothing = imputer.transform(np.full((2, 1, 8, 8), np.nan, dtype="float32"))
    assert np.isfinite(nothing).all() and np.array_equal(nothing[0], nothing[1])
    assert np.isfinite(MCFlowImputer(**SMALL).fit_transform(X[:1])).all()
    assert imputer.transform(X[:0]).shape == (0, 1, 8, 8)
    with pytest.raises(ValueError, match="no image"):
        MCFlowImputer(**SMALL).fit(X[:0])


def test_whole_numbers_to_255_and_colour():
    x = (load_digits().images[:40, None] * 255 / 16).astype("uint8")
    assert MCFlowImputer(**SMALL).fit_transform(x).dtype == np.uint8
    holes = np.where(independent_dropout(x.shape, 0.5, seed()).numpy(), x, np.nan)
    filled = MCFlowImputer(**SMALL).fit_transform(holes)
    assert filled.min() >= 0 and filled.max() <= 255 and filled[np.isnan(holes)].max() > 2  # in the user's units
    colour = np.concatenate([holes, 255 - holes, holes], axis=1)
    imputer = MCFlowImputer(**SMALL).fit(colour)
    assert np.isfinite(imputer.transform(colour)).all()
    owner = imputer.network_.owner.view(3, 64)
    assert torch.equal(owner[0], torch.arange(64)) and torch.equal(owner[0], owner[2])  # a pixel's channels together


def test_density_of_complete_rows():
    """Against automatic differentiation, in the columns' own units; refused for holes and for categories."""
    x = load_iris().data * [1.0, 10.0, 100.0, 0.01]
    imputer = MCFlowImputer(**(SMALL | {"max_epochs": 10}), flow_learning_rate=1e-2).fit(x)
    rows = torch.tensor(imputer.encoder_.transform(x[:6])[0], dtype=torch.float64)
    flow = clone(imputer).fit(x).network_.flow.double()
    z = flow(rows)[0]
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda row: flow(row[None])[0][0]))(rows)
    exact = -0.5 * z.square().sum(1) - 2 * math.log(2 * math.pi) + torch.linalg.slogdet(jacobian)[1]
    exact = exact.detach().numpy() - np.log(x.std(0)).sum()
    assert np.allclose(imputer.log_prob(x[:6]), exact, atol=1e-3) and torch.linalg.slogdet(jacobian)[1].std() > 1e-3
    holed = x[:5].copy()
    holed[3, 1] = np.nan
    with pytest.raises(ValueError, match="row 3 has holes.*transform"):
        imputer.log_prob(holed)
    assert np.isfinite(imputer.log_prob(imputer.transform(holed))).all()
    mixed = pd.DataFrame({"a": np.arange(30.0), "b": list("xyz") * 10})
    with pytest.raises(ValueError, match="categories or booleans"):
        MCFlowImputer(**SMALL).fit(mixed).log_prob(mixed)
    assert not hasattr(imputer, "sample")


def test_validation_keeps_the_best_epoch_and_few_rows_have_no_judge():
    x, observed = table(200)
    net, run = network(), TrainingRun(0, "cpu", verbose=False)
    mcflow.train_mcflow(net, x, observed, run, 8, 32, learning_rate=3e-3, validation_fraction=0.25)
    assert math.isclose(run.stopping.value, run.history["validation"].min(), rel_tol=1e-5)
    judging, teaching = len(run.parts["done_judge"].x), len(run.parts["done"].x)
    assert judging + teaching == 200 and 25 < judging <= 50  # a row of one seen cell cannot judge
    run = TrainingRun(0, "cpu", patience=1, verbose=False)
    mcflow.train_mcflow(network(), x[:5], observed[:5], run, 3)
    assert len(run.history) == 3 and "validation" not in run.history


def test_the_same_seed_gives_the_same_network():
    X = pictures()
    a, b, c = (MCFlowImputer(**(SMALL | {"random_state": s})).fit(X).transform(X) for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_agree():
    X = pictures()
    imputer = MCFlowImputer(**(SMALL | {"device": "cuda", "precision": "float32"})).fit(X)
    on_gpu = imputer.transform(X)
    assert np.allclose(on_gpu, imputer.set_params(device="cpu").transform(X), atol=1e-2, equal_nan=True)


def check_nothing_to_judge(module):
    """Rows with one seen cell cannot judge: all epochs count, and more of them give another result."""
    X = np.random.default_rng(0).normal(size=(60, 4))
    X[np.arange(4)[None] != np.arange(60)[:, None] % 4] = np.nan
    few, many = (module.MCFlowImputer(**(SMALL | dict(max_epochs=e, patience=1))).fit(X) for e in (1, 6))
    assert len(many.history_) == 6 and "validation" not in many.history_
    assert not np.array_equal(few.transform(X), many.transform(X))


def test_rows_of_which_nothing_can_be_hidden_do_not_judge():
    """Mutation: with every row as a judge the score is 0 from the first epoch on, and nothing learned later is kept."""
    check_nothing_to_judge(mcflow)
    mutant = copy_of(mcflow, ("useful = (observed[order[:n]] & ~shown).any(1)", "useful = observed[order[:n]].any(1)"))
    with pytest.raises(AssertionError):
        check_nothing_to_judge(mutant)


def check_never_seen(module):
    """A pixel that no training picture had keeps its first fill."""
    X = pictures(rate=0.3)
    X[:, :, 2, 3] = np.nan
    imputer = module.MCFlowImputer(**SMALL).fit(X)
    x, seen = imputer._encode(X)
    begin = imputer.network_.begin(x.flatten(1), seen.flatten(1)).view(x.shape)[:, :, 2, 3]
    made = torch.from_numpy(imputer.encoder_.transform(imputer.transform(X))[0])[:, :, 2, 3]
    assert torch.allclose(made, begin, atol=1e-5) and begin.std() > 0.01


def test_a_pixel_never_seen_keeps_its_first_fill():
    """Mutation: H's output there, which nothing taught."""
    check_never_seen(mcflow)
    mutant = copy_of(mcflow, ("self.known.copy_(observed.any(0))", "pass"))
    with pytest.raises(AssertionError):
        check_never_seen(mutant)


def test_the_passes_of_the_last_completion_belong_to_the_epoch_that_is_kept():
    X = pictures()
    own = SMALL | dict(feed="last", fill="random", max_epochs=9)
    assert int(MCFlowImputer(**own, validation_fraction=0.0).fit(X).network_.passes) == 4  # rounds at 2, 4 and 8
    assert int(MCFlowImputer(**(own | dict(feed="first", hide=0.0))).fit(X).network_.passes) == 1
    judged = MCFlowImputer(**own).fit(X)
    best = int(judged.history_["validation"].idxmin())
    assert int(judged.network_.passes) == 1 + sum(mcflow.new_round(e, 9) for e in range(best + 1))


def test_widths_follow_the_data_within_limits():
    def sizes(X, **own):
        net = MCFlowImputer(**(SMALL | dict(max_epochs=1, hidden=None, latent_hidden=None) | own)).fit(X).network_
        return net.sizes[1], net.latent.layers[0].out_features

    assert sizes(pictures(12)) == (64, 64) and sizes(np.random.default_rng(0).normal(size=(20, 3))) == (64, 64)
    assert sizes(pictures(12), hidden=5) == (5, 64)
    assert sizes(np.random.default_rng(0).random((4, 3, 20, 20)).astype("float32")) == (1024, 1024)
