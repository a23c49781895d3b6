"""PRFlow: the prior as a module, where it pulls, what it changes; odd and bad pictures; mutations, all run.

A mutation is a copy of the module with one piece of its source replaced."""

import math

import numpy as np
import pytest
import torch
from conftest import copy_of, refuses, seed
from sklearn.datasets import load_digits, load_iris

from missingbook.flows import mcflow, prflow
from missingbook.flows.hyperlaplacian import derivative_filters, hyperlaplacian_energy
from missingbook.flows.mcflow import MCFlow, MCFlowImputer, reconstruct
from missingbook.flows.prflow import HyperLaplacianPrior, PRFlowImputer, balance
from missingbook.foundations.data import load
from missingbook.foundations.imputer import DeepImputer, check_no_peek

NAN = float("nan")
QUICK = dict(max_epochs=3, hidden=16, latent_hidden=32, random_state=0, verbose=False)
PUBLISHED = dict(fill="random", feed="last", hide=0.0, decay=1.0, validation_fraction=0.0)  # as in the papers
RANDOM = PUBLISHED | {"feed": "first"}


def digits(n=120, rate=0.8, number=0):
    """(complete, with holes), (n, 1, 8, 8), from 0 to 1."""
    x = load_digits().images[:n, None].astype("float32") / 16
    keep = torch.rand(x.shape, generator=seed(number)).numpy() >= rate
    return x, np.where(keep, x, np.float32(NAN))


def network(shape=(1, 8, 8), fill="bilinear"):
    torch.manual_seed(0)
    n = math.prod(shape)
    return MCFlow(shape, torch.arange(n), 4, 16, 32, fill)


def pair(n=20, rate=0.7):
    """(x, observed), flat."""
    x, holes = digits(n, rate)
    return torch.from_numpy(x).flatten(1), torch.from_numpy(~np.isnan(holes)).flatten(1)


# --- the prior -------------------------------------------------------------------------------------------------------


def check_prior(module):
    for shape in ((1, 8, 8), (3, 5, 7), (1, 1, 6), (2, 1, 1)):
        x = torch.rand(4, math.prod(shape), generator=seed())
        for alpha, order, eps in ((1 / 3, 1, 1e-2), (1.0, 2, 1e-3), (2.0, "both", 0.1)):
            both = derivative_filters(1) + derivative_filters(2)
            filters = both if order == "both" else derivative_filters(order)
            expected = hyperlaplacian_energy(x.double().view(4, *shape), alpha, filters, eps)
            got = module.HyperLaplacianPrior(shape, alpha, order, eps)(x)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
            half = module.HyperLaplacianPrior(shape, alpha, order, eps)(x.bfloat16())
            assert half.dtype == torch.float32 and got.shape == (4,)


@pytest.mark.parametrize("before, after", [
    ("return sum(energy_of_responses", "return -sum(energy_of_responses"),
    ("self.alpha, self.eps) for f in self.kernels)", "self.alpha, self.eps) for f in list(self.kernels)[:1])"),
    ("self.alpha, self.eps) for f", "self.alpha, 0.0) for f"),
    ("else x).unflatten(1, self.shape)", "else x).unflatten(1, (self.shape[0], *self.shape[:0:-1]))"),
], ids=["sign", "one kernel", "eps forgotten", "height and width exchanged"])
def test_the_prior_is_the_energy(before, after):
    check_prior(prflow)
    mutant = copy_of(prflow, (before, after))
    with pytest.raises(AssertionError):
        check_prior(mutant)


def test_the_prior_has_no_weights_to_learn_and_travels_with_the_module():
    prior = HyperLaplacianPrior((1, 8, 8), order="both")
    assert len(prior.kernels) == 5 and not any(w.requires_grad for w in prior.parameters())
    assert all(f.dtype == torch.float64 for f in prior.double().kernels)


def test_the_prior_refuses():
    for own, words in ((dict(order=3), "order=3"), (dict(alpha=0.0), "alpha=0"), (dict(alpha=2.5), "alpha=2.5"),
                       (dict(eps=-1.0), "eps=-1")):
        refuses(lambda own=own: HyperLaplacianPrior((1, 8, 8), **own), ValueError, words)


# --- where it pulls --------------------------------------------------------------------------------------------------


def check_pull(module):
    """J₃ pulls at missing pixels alone, and sees the observed ones as they are."""
    x, observed = pair()
    x_rec = torch.rand(x.shape, generator=seed(1)).requires_grad_()
    original, module.reconstruct = module.reconstruct, lambda *_: (x_rec, torch.zeros(len(x)))
    try:
        values = module.latent_objective(network(), x, x, observed, 0.0, HyperLaplacianPrior((1, 8, 8)), 1.0)
    finally:
        module.reconstruct = original
    (pull,) = torch.autograd.grad(values["J3"], x_rec)
    assert not pull[observed].any() and (pull[~observed] != 0).float().mean() > 0.95
    completed = torch.where(observed, x, x_rec).detach()
    torch.testing.assert_close(values["J3"].detach(), HyperLaplacianPrior((1, 8, 8))(completed).mean())
    torch.testing.assert_close(values["loss"].detach(), (values["J2"] + values["J3"] / 64).detach())


def test_the_prior_pulls_at_missing_pixels_alone():
    """Mutations: the prior on x_rec in place of the completed picture; its weight ignored; not divided by the width."""
    check_pull(mcflow)
    for before, after in (("prior(torch.where(observed, x, x_rec))", "prior(x_rec)"),
                          ("loss + prior_weight / network.width * values[\"J3\"]", "loss + 0.0 * values[\"J3\"]"),
                          ("prior_weight / network.width", "prior_weight")):
        mutant = copy_of(mcflow, (before, after))
        with pytest.raises(AssertionError):
            check_pull(mutant)


def check_balance(module):
    """At λ the slopes of J₁ and of λ·J₃ have one norm over the missing pixels, worked out here."""
    x, observed = pair()
    model = network()
    prior = HyperLaplacianPrior((1, 8, 8))
    with torch.no_grad():
        x_rec = torch.where(observed, x, reconstruct(model.flow, model.latent, model.begin(x, observed))[0])
    x_rec.requires_grad_()
    slopes = [torch.autograd.grad(e.sum(), x_rec)[0][~observed].norm().item()
              for e in (-model.flow.log_prob(x_rec), hyperlaplacian_energy(x_rec.view(-1, 1, 8, 8), 1 / 3, None, 1e-2))]
    assert math.isclose(module.balance(model, prior, x, observed) * slopes[1], slopes[0], rel_tol=1e-4)
    junk = torch.where(observed, x, 100.0)
    assert module.balance(model, prior, junk, observed) == module.balance(model, prior, x, observed)


def test_balance():
    """Mutations: the ratio turned over; slopes at observed pixels counted too; no completion."""
    check_balance(prflow)
    for before, after in (("(norms[0] / norms[1])", "(norms[1] / norms[0])"),
                          (".masked_fill(observed, 0.0)", ""),
                          ("torch.where(observed, x, x_rec).requires_grad_()", "x_rec.requires_grad_()")):
        mutant = copy_of(prflow, (before, after))
        with pytest.raises(AssertionError):
            check_balance(mutant)


def test_balance_refuses_what_cannot_be_balanced():
    x, observed = pair()
    with pytest.raises(ValueError, match="no pixel is missing"):
        balance(network(), HyperLaplacianPrior((1, 8, 8)), x, torch.ones_like(observed))
    one = MCFlow((1, 1, 1), torch.zeros(1, dtype=torch.int64), 2, 8, 8)
    with pytest.raises(ValueError, match="no slope"):  # a picture of one pixel has no neighbours
        balance(one, HyperLaplacianPrior((1, 1, 1)), torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.bool))


# --- what it changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [{}, PUBLISHED], ids=["default", "published"])
def test_weight_zero_is_mcflow_bit_for_bit(own):
    X = digits()[1]
    a, b, c = (kind(**QUICK, **own).fit(X) for kind in (MCFlowImputer, lambda **k: PRFlowImputer(prior_weight=0.0, **k),
                                                       PRFlowImputer))
    assert np.array_equal(a.transform(X), b.transform(X)) and not np.array_equal(a.transform(X), c.transform(X))
    assert all(torch.equal(u, v) for u, v in zip(a.network_.parameters(), b.network_.parameters(), strict=True))
    assert list(b.history_) == list(a.history_) and set(c.history_) - set(a.history_) == {"J3"}
    assert [tuple(w.shape) for w in c.network_.parameters()] == [tuple(w.shape) for w in a.network_.parameters()]


FITTED = {}


def completed(weight, number=0, kind=PRFlowImputer, key=None):
    """(error at hidden pixels, mean energy) of half-size digits, 90% missing, from a random first fill."""
    name = key, weight, number
    if name not in FITTED:
        x = torch.nn.functional.avg_pool2d(load("mnist-sample").x[:500].float() / 255, 2).numpy()
        hidden = torch.rand(x.shape, generator=seed(number)).numpy() < 0.9
        own = dict(max_epochs=24, hidden=32, latent_hidden=128, random_state=number, verbose=False, **RANDOM)
        made = kind(prior_weight=weight, **own).fit_transform(np.where(hidden, np.float32(NAN), x))
        energy = HyperLaplacianPrior((1, 14, 14))(torch.from_numpy(made).flatten(1)).mean().item()
        FITTED[name] = float(np.sqrt(((made - x)[hidden] ** 2).mean())), energy
    return FITTED[name]


WEIGHT = 0.1


def check_the_prior_helps(kind=PRFlowImputer, key=None):
    for number in (0, 1):
        error, energy = completed(0.0, number=number)
        with_prior = completed(WEIGHT, number=number, kind=kind, key=key)
        assert with_prior[0] < 0.96 * error and with_prior[1] < 0.85 * energy


def test_the_prior_lowers_error_and_energy_at_ninety_per_cent():
    """Mutations: the sign as printed in the paper; the weight ignored."""
    check_the_prior_helps()

    class Printed(PRFlowImputer):
        def __init__(self, **common):
            super().__init__(**common)

        def _weights(self, *data):
            weights = super()._weights(*data)
            honest = weights["prior"]
            return weights | {"prior": lambda x: -honest(x)}

    class Deaf(Printed):
        def _weights(self, *data):
            return MCFlowImputer._weights(self, *data)

    for mutant in (Printed, Deaf):
        with pytest.raises(AssertionError):
            check_the_prior_helps(lambda mutant=mutant, **own: mutant_of(mutant, **own), key=mutant.__name__)


def mutant_of(kind, prior_weight, **own):
    imputer = kind(**own)
    imputer.prior_weight = prior_weight
    return imputer


def test_more_weight_less_energy():
    energies = [completed(weight, number=0)[1] for weight in (0.0, WEIGHT, 5 * WEIGHT)]
    assert energies == sorted(energies, reverse=True) and energies[2] < 0.9 * energies[1]


def test_the_prior_is_off_for_tables():
    x = load_iris().data
    holes = np.where(np.random.default_rng(0).random(x.shape) < 0.3, NAN, x)
    a, b = (kind(**QUICK).fit_transform(holes) for kind in (MCFlowImputer, PRFlowImputer))
    assert np.array_equal(a, b) and "J3" not in PRFlowImputer(**QUICK).fit(holes).history_


@pytest.mark.parametrize("own", [{}, PUBLISHED], ids=["default", "published"])
def test_no_peek(own):
    check_no_peek(PRFlowImputer(**QUICK, **(own | {"prior_weight": 0.5})), digits(60)[1])


def test_no_peek_finds_a_prior_on_the_truth(monkeypatch):
    """Mutation: the prior is shown what stands in x at missing pixels."""
    honest = mcflow.latent_objective

    def peeks(network, begin, x, observed, likelihood_weight=0.0, prior=None, prior_weight=0.0):
        values = honest(network, begin, x, observed, likelihood_weight, prior, prior_weight)
        return values | {"J3": prior(x).mean()}

    monkeypatch.setattr(mcflow, "latent_objective", peeks)
    with pytest.raises(AssertionError, match="depends on what stands behind"):
        check_no_peek(PRFlowImputer(**QUICK), digits(60)[1])


def test_save_and_load(tmp_path):
    X = digits(60)[1]
    imputer = PRFlowImputer(**QUICK, order="both", alpha=1.0).fit(X)
    imputer.save(tmp_path / "model")
    loaded = DeepImputer.load(tmp_path / "model", device="cpu")
    assert isinstance(loaded, PRFlowImputer) and loaded.get_params() == imputer.get_params() | {"device": "cpu"}
    assert np.array_equal(loaded.transform(X), imputer.transform(X))


# --- odd and bad pictures --------------------------------------------------------------------------------------------


def kept(before, after):
    seen = ~np.isnan(before)
    return after.dtype == before.dtype and np.array_equal(before[seen], after[seen]) and np.isfinite(after).all()


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.99])
def test_rates(rate):
    X = digits(60, rate)[1]
    assert kept(X, PRFlowImputer(**QUICK).fit_transform(X))


def test_nothing_observed_anywhere_is_refused():
    with pytest.raises(ValueError, match="no pixel"):
        PRFlowImputer(**QUICK).fit(np.full((5, 1, 8, 8), NAN, "float32"))


@pytest.mark.parametrize("own", [{}, PUBLISHED], ids=["default", "published"])
def test_pictures_of_which_nothing_was_seen(own):
    X = digits(60)[1]
    X[[0, 7]] = NAN
    filled = PRFlowImputer(**QUICK, **own).fit(X).transform(X)
    assert kept(X, filled) and 0 <= filled[[0, 7]].min() and filled[[0, 7]].max() <= 1


def test_a_pixel_that_was_never_seen():
    X = digits(60)[1]
    X[:, :, 3, 4] = NAN
    assert kept(X, PRFlowImputer(**QUICK).fit_transform(X))


def test_one_picture():
    X = digits(1, 0.5)[1]
    assert kept(X, PRFlowImputer(**QUICK).fit_transform(X))


@pytest.mark.parametrize("shape", [(1, 1, 9), (1, 7, 1), (3, 4, 5)], ids=str)
def test_shapes(shape):
    X = np.random.default_rng(0).random((30, *shape)).astype("float32")
    X[np.random.default_rng(1).random(X.shape) < 0.5] = NAN
    imputer = PRFlowImputer(**QUICK, order=2).fit(X)
    assert kept(X, imputer.transform(X)) and np.isfinite(imputer.history_["J3"]).all()


def test_grey_levels_and_values_outside_the_unit_interval():
    x, X = digits(60)
    grey = PRFlowImputer(**QUICK).fit(255 * X).transform(255 * X)
    np.testing.assert_allclose(grey, 255 * PRFlowImputer(**QUICK).fit_transform(X), rtol=1e-3, atol=0.1)
    wide = 10 * X - 4
    assert kept(wide, PRFlowImputer(**QUICK).fit_transform(wide))
    whole = (255 * x).astype("uint8")
    assert np.array_equal(PRFlowImputer(**QUICK).fit_transform(whole), whole)


def test_pictures_unlike_those_of_the_fit():
    imputer = PRFlowImputer(**QUICK).fit(digits(60)[1])
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*\(1, 8, 8\)"):
        imputer.transform(np.zeros((2, 3, 8, 8), "float32"))
    with pytest.raises(ValueError, match=r"\(1, 8, 9\).*\(1, 8, 8\)"):
        imputer.transform(np.zeros((2, 1, 8, 9), "float32"))


def test_pictures_of_mixed_size():
    with pytest.raises((ValueError, TypeError)):
        PRFlowImputer(**QUICK).fit([np.zeros((1, 8, 8)), np.zeros((1, 9, 8))])


@pytest.mark.parametrize("own, words", [
    (dict(prior_weight=-1.0), "prior_weight"), (dict(prior_weight="much"), "prior_weight"),
    (dict(prior_weight=NAN), "prior_weight"),
    (dict(alpha=0.0), "alpha"), (dict(alpha=3.0), "alpha"), (dict(eps=0.0), "eps"), (dict(eps=NAN), "eps"),
    (dict(order=0), "order=0"), (dict(order="first"), "order='first'"),
], ids=str)
def test_refusals(own, words):
    refuses(lambda: PRFlowImputer(**QUICK, **own).fit(digits(20)[1]), ValueError, words)


@pytest.mark.parametrize("order", [0, 3, 7, True, "first", None])
def test_an_unknown_order_is_refused_whatever_the_data(order):
    table = np.random.default_rng(0).normal(size=(20, 3))
    for X in (table, digits(20)[1]):
        with pytest.raises(ValueError, match="order="):
            PRFlowImputer(order=order, prior_weight=0.0, **QUICK).fit(X)


@pytest.mark.parametrize("shape", [(8, 8), (0, 8, 8), (1, 8, 8.0)])
def test_the_prior_refuses_shapes(shape):
    refuses(lambda: HyperLaplacianPrior(shape), ValueError, "shape=")


def test_the_prior_refuses_rows_of_another_width_and_keeps_double_precision():
    prior = HyperLaplacianPrior((1, 8, 8))
    with pytest.raises(ValueError, match="flat rows"):
        prior(torch.rand(2, 63))
    x = torch.rand(2, 64, dtype=torch.float64, generator=seed(0))
    assert prior.double()(x).dtype == torch.float64 and prior(x.bfloat16()).dtype == torch.float32
