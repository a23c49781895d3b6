"""MIWAE: the bound by hand and against the oracle, weights, draws, cells, no peek, checkpoints, bad input.

Mutations are named and run: each is a copy of the module, without the hook that checks shapes, edited in its source."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Interruptible, mutant_fails, refuses, seed, with_holes
from scipy import stats
from sklearn.datasets import load_digits, load_iris
from torch.distributions import MultivariateNormal

from missingbook.foundations import imputer as imputer_module
from missingbook.foundations.imputer import DeepImputer, Layout, check_no_peek
from missingbook.foundations.training import Noise, TrainingDiverged, TrainingRun, seeded
from missingbook.vaes import miwae
from missingbook.vaes.miwae import MIWAEImputer
from missingbook.vaes.vae import importance_weighted_bound

CPU = torch.device("cpu")
SMALL = dict(
    hidden=16,
    latent=3,
    n_samples=5,
    n_importance=20,
    max_epochs=3,
    min_steps=8,
    random_state=0,
    verbose=False,
    device="cpu",
)
MIXED = Layout(6, (0,), (1,), ((2, 4), (4, 6)))


def table(n=200, p=5, number=0):
    """Numbers of which two hidden causes explain most."""
    rng = np.random.default_rng(number)
    return rng.normal(size=(n, 2)) @ rng.normal(size=(2, p)) + 0.4 * rng.normal(size=(n, p))


def flowers(rate=0.3):
    """Iris with a category, an ordered one, a boolean and whole numbers; with holes."""
    frame = load_iris(as_frame=True).data
    frame["kind"] = np.array(list("abc"), dtype=object)[load_iris().target]
    frame["size"] = pd.cut(frame.iloc[:, 2], 3, labels=["low", "middle", "high"])
    frame["wide"] = (frame.iloc[:, 1] > 3).astype("boolean")
    frame["count"] = (frame.iloc[:, 2] * 10).round().astype("Int64")
    return frame.mask(np.random.default_rng(0).random(frame.shape) < rate)


# --- weights and bound -----------------------------------------------------------------------------------------------


def check_weights_by_hand(module):
    log_p, z = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[[0.5, -1.0]], [[0.0, 2.0]]])
    mean, sigma = torch.tensor([[0.2, 0.1]]), torch.tensor([[0.5, 2.0]])
    found = module.importance_log_weights(log_p, z, mean, sigma)
    by_hand = (
        log_p.numpy()[:, 0] + stats.norm.logpdf(z[:, 0]).sum(1) - stats.norm.logpdf(z[:, 0], mean[0], sigma[0]).sum(1)
    )
    assert np.allclose(found[:, 0], by_hand, atol=1e-5)


def test_weights_by_hand():
    """Mutations: the proposal's density with the wrong sign; the prior forgotten."""
    mutant_fails(miwae, check_weights_by_hand, ("prior - normal_log_prob(z, mean", "prior + normal_log_prob(z, mean"))
    mutant_fails(miwae, check_weights_by_hand, ("log_p_observed + prior - ", "log_p_observed - "))


class Oracle(torch.nn.Module):
    """A linear normal decoder in the clothes of MIWAE's: t with so many degrees of freedom that it is normal."""

    def __init__(self, W, sd):
        super().__init__()
        self.W, self.sd = W, sd

    def forward(self, z):
        spread = torch.full_like(z[..., :1], math.log(math.expm1(self.sd))).expand(*z.shape[:-1], len(self.W))
        return torch.cat([z @ self.W.T, spread, torch.full_like(spread, 1e4)], -1)


def oracle(module, n=60, rate=0.4):
    """(network, x, observed, exact log p(x_obs), exact means of all cells, their standard deviations)."""
    g, p = seed(0), 5
    W, sd = torch.randn(p, 2, generator=g), 0.5
    x = torch.randn(n, 2, generator=g) @ W.T + sd * torch.randn(n, p, generator=g)
    observed = torch.rand(n, p, generator=g) >= rate
    observed[:, 0] = True
    with seeded(0, CPU):
        network = module.MIWAE(Layout(p, tuple(range(p))), 8, 2, scale_min=0.0)
    network.decoder = Oracle(W, sd)
    torch.nn.init.zeros_(network.encoder[-1].weight)
    network.encoder[-1].bias.data = torch.tensor([0.0, 0.0, math.log(math.e - 1), math.log(math.e - 1)])  # the prior
    cov = W @ W.T + sd**2 * torch.eye(p)
    log_p, means, sds = torch.zeros(n), x.clone(), torch.zeros(n, p)
    for i, o in enumerate(observed):
        log_p[i] = MultivariateNormal(torch.zeros(int(o.sum())), cov[o][:, o]).log_prob(x[i, o])
        gain = cov[~o][:, o] @ torch.linalg.inv(cov[o][:, o])
        means[i, ~o] = gain @ x[i, o]
        sds[i, ~o] = (cov[~o][:, ~o] - gain @ cov[o][:, ~o]).diagonal().sqrt()
    return network, x, observed, log_p, means, sds


def check_oracle(module):
    network, x, observed, log_p, means, _ = oracle(module)
    gaps = []
    with torch.no_grad():
        for k in (1, 20, 4000):
            log_weights, _, place = network.weigh(x, observed, torch.randn(len(x), k, 2, generator=seed(1)))
            gaps.append((importance_weighted_bound(log_weights) - log_p).mean().item())
        fills = module.self_normalized_mean(log_weights, place)
    assert gaps[0] < gaps[1] < 0 and abs(gaps[2]) < 0.06
    assert (fills - means)[~observed].square().mean().sqrt() < 0.1


@pytest.mark.parametrize(
    "edit",
    [
        ("log_p = torch.where(observed, cells, 0.0).sum(-1)", "log_p = cells.sum(-1)"),
        ("log_p = torch.where(observed, cells, 0.0).sum(-1)", "log_p = torch.where(observed, cells, 0.0).mean(-1)"),
        ("log_weights.softmax(0)[..., None] * values", "log_weights.softmax(1)[..., None] * values"),
        ("log_weights.softmax(0)[..., None] * values", "values / len(values)"),
    ],
)
def test_against_the_linear_normal_oracle(edit):
    """Mutations: holes count; a mean in place of a sum; weights over rows in place of samples; no weights."""
    mutant_fails(miwae, check_oracle, edit)


def check_resample(module):
    weights = torch.tensor([0.05, 0.0, 0.7, 0.25])
    u = torch.linspace(0, 1 - 2**-24, 20_001)
    chosen = module.resample((3 * weights).log()[:, None].expand(4, 20_001), u)
    assert ((chosen.bincount(minlength=4) / 20_001) - weights).abs().max() < 2e-4 and chosen.max() < 4
    sure = torch.tensor([[-1e5], [0.0], [-1e5]])
    assert (
        module.resample(sure, torch.tensor([0.0])).item()
        == 1
        == module.resample(sure, torch.tensor([1 - 2**-24])).item()
    )


def test_resample():
    """Mutations: the sample after the right one; an equal chance for each; the constant does not cancel."""
    mutant_fails(miwae, check_resample, (">= steps).sum(0)", ">= steps).sum(0).add(1)"))
    mutant_fails(
        miwae, check_resample, ("log_weights.double().softmax(0)", "torch.zeros_like(log_weights).double().softmax(0)")
    )
    mutant_fails(
        miwae,
        check_resample,
        ("log_weights.double().softmax(0)", "log_weights.double().exp()"),
        ("u.double() * steps[-1]", "u.double()"),
    )


def check_draws_of_the_oracle(module):
    network, x, observed, _, means, sds = oracle(module, 40)
    imputer = module.MIWAEImputer(**(SMALL | {"n_importance": 200, "latent": 2}))
    with torch.no_grad():
        noise = Noise(0, CPU)
        draws = torch.stack([imputer._draw(network, x, observed, noise) for _ in range(100)])
    assert ((draws.mean(0) - means)[~observed] / sds[~observed]).square().mean().sqrt() < 0.25
    assert abs((draws.std(0) / sds)[~observed].mean() - 1) < 0.08


def test_draws_of_the_oracle():
    """Mutations: any sample serves; the location without the cell's own noise."""
    mutant_fails(miwae, check_draws_of_the_oracle, ("network.decode(z[chosen,", "network.decode(z[0 * chosen,"))
    mutant_fails(miwae, check_draws_of_the_oracle, ("cell_draw_t(place, scale, df, network.layout, noise)", "place"))


# --- cells -----------------------------------------------------------------------------------------------------------


def check_student(module):
    x, m, s, v = (
        torch.tensor(a, dtype=torch.float64)
        for a in ([0.3, 40.0, -2.0], [0.0, 1.0, 2.0], [1.0, 0.2, 3.0], [3.0, 2.5, 30.0])
    )
    assert np.allclose(module.student_log_prob(x, m, s, v), stats.t(v, m, s).logpdf(x))
    ones = torch.ones(40_000)
    made = module.student_draw(2.0 * ones, 0.5 * ones, 3.5 * ones, *torch.rand(2, 40_000, generator=seed(2)))
    assert stats.kstest(made.numpy(), stats.t(3.5, 2.0, 0.5).cdf).pvalue > 1e-3
    assert module.student_draw(*torch.tensor([[0.0], [1.0], [3.0], [0.0], [0.1]])).isfinite().all()


def test_student():
    """Mutations: the scale forgotten in the constant; half the degrees of freedom in a draw."""
    mutant_fails(miwae, check_student, (".log() - scale.log()", ".log()"))
    mutant_fails(miwae, check_student, ("torch.expm1(-2 / df", "torch.expm1(-1 / df"))


def check_cells(module):
    output = torch.tensor([[0.5, math.log(3.0), 0.0, math.log(3.0), 0.0, 0.0, 0.3, 0.7]])
    place, scale, df = module.split_cells(output, MIXED, 0.1, 3.0)
    soft = math.log(1 + math.exp(0.3)) + 0.1, math.log(1 + math.exp(0.7)) + 3
    assert np.allclose([scale.item(), df.item()], soft, atol=1e-6)
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0, 0.0]])
    cells = module.cell_log_prob_t(place, scale, df, x, MIXED)
    by_hand = [stats.t(soft[1], 0.5, soft[0]).logpdf(1.0), math.log(0.25), math.log(0.75), 0, math.log(0.5), 0]
    assert np.allclose(cells[0], by_hand, atol=1e-5)
    mean = module.cell_mean_t(place, MIXED)
    assert np.allclose(mean[0], [0.5, 0.75, 0.25, 0.75, 0.5, 0.5], atol=1e-6)
    n = 20_000
    drawn = module.cell_draw_t(place.expand(n, 6), scale.expand(n, 1), df.expand(n, 1), MIXED, Noise(0, CPU))
    assert (drawn.mean(0) - mean).abs().max() < 0.03 and (drawn[:, 2:4].sum(1) == 1).all()


@pytest.mark.parametrize(
    "edit",
    [
        ("F.softplus(df) + df_min", "F.softplus(df)"),
        ("result[..., start] = (x", "result[..., stop - 1] = (x"),
        ("result[..., b] = place[..., b].sigmoid()", "pass"),
        ("winner = (place + gumbel)", "winner = place"),
    ],
)
def test_cells(edit):
    """Mutations: no floor for degrees of freedom; a block in its last column; no sigmoid; always the likeliest."""
    mutant_fails(miwae, check_cells, edit)


def check_wild_input(module):
    with seeded(0, CPU):
        network = module.MIWAE(Layout(3, (0, 1, 2)), 8, 2)
    seen = torch.ones(1, 3, dtype=torch.bool)
    near, far = (network.encode(torch.tensor([[v, 0.0, 0.0]]), seen)[0] for v in (10.0, 1e6))
    assert torch.equal(near, far)
    hole = torch.tensor([[False, True, True]])
    assert torch.equal(
        network.encode(torch.tensor([[7.0, 1.0, 2.0]]), hole)[0],
        network.encode(torch.tensor([[0.0, 1.0, 2.0]]), hole)[0],
    )


def test_the_encoder_sees_zero_in_holes_and_no_wild_values():
    """Mutations: nothing is cut; a peek."""
    mutant_fails(miwae, check_wild_input, (".clamp(-10.0, 10.0)", ""))
    mutant_fails(miwae, check_wild_input, ("self.encoder(torch.where(observed, x, 0.0).clamp", "self.encoder(x.clamp"))


# --- training --------------------------------------------------------------------------------------------------------


def trained(module, **own):
    x = torch.tensor(table(300), dtype=torch.float32)
    observed = torch.rand(x.shape, generator=seed(0)) < 0.7
    run = TrainingRun(0, "cpu", verbose=False, patience=50)
    with seeded(0, CPU):
        network = module.MIWAE(Layout(5, tuple(range(5))), 16, 2)
        module.train_miwae(network, x, observed, run, 8, 64, 3e-3, 5, 20, **own)
    return network, run.history


def check_training(module):
    network, history = trained(module)
    assert history["loss"].iloc[-1] < history["loss"].iloc[0] - 1
    assert len(history) == 8 and history["validation"].iloc[-1] < history["validation"].iloc[0] - 0.5
    assert all(w.grad is not None and w.grad.any() for w in network.parameters())


def test_training():
    """Mutations: down the bound; gradients are cut off between encoder and decoder."""
    mutant_fails(
        miwae,
        check_training,
        (
            "loss = -importance_weighted_bound(log_weights).mean()",
            "loss = importance_weighted_bound(log_weights).mean()",
        ),
    )
    mutant_fails(
        miwae,
        check_training,
        ("z = reparameterize(mean, sigma,", "z = reparameterize(mean.detach(), sigma.detach(),"),
        (
            "importance_log_weights(log_p, z, mean, sigma)",
            "importance_log_weights(log_p, z, mean.detach(), sigma.detach())",
        ),
    )
    assert "validation" not in trained(miwae, validation_fraction=0.0)[1]


class Stopped(Interruptible, MIWAEImputer):
    """Ctrl-C before epoch `stop`; where not `kept`, the run forgets the optimizer."""

    kept = True

    def _train(self, network, x, observed, run):
        keep = run.keep
        run.keep = lambda **parts: keep(**{k: v for k, v in parts.items() if self.kept or k != "adam"})
        super()._train(network, x, observed, run)


def test_an_interrupted_fit_goes_on_bit_for_bit(tmp_path):
    """Mutation (run below): the optimizer is not stored."""
    X, options = with_holes(table(100)), SMALL | {"max_epochs": 6}
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
    np.testing.assert_array_equal(again.sample(X, 2), whole.sample(X, 2))
    assert not resumed(False).history_["loss"].equals(whole.history_["loss"])


@pytest.mark.filterwarnings("ignore:the loss became NaN")
def test_a_diverged_training_is_reported():
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        MIWAEImputer(**(SMALL | {"max_epochs": 10}), learning_rate=1e9, validation_fraction=0.0).fit(
            with_holes(table(80))
        )


def check_untied(module):
    """log p of columns without ties, cell by cell, as the observed cells of other rows tell it."""
    layout = module.Layout(*vars(MIXED).values())
    x, observed = torch.zeros(4, 6), torch.ones(4, 6, dtype=torch.bool)
    x[:, 0] = torch.tensor([1.0, 3.0, 2.0, 50.0])
    x[:, 1] = torch.tensor([1.0, 0.0, 0.0, 9.0])
    observed[3, :2] = False  # what stands there does not count
    x[:, 2], x[:2, 4], x[2:, 5] = 1.0, 1.0, 1.0
    rows, asked = x[:1] + torch.tensor([1.5, 0, 0, 0, 0, 0]), torch.ones(1, 6, dtype=torch.bool)
    number = stats.norm.logpdf(2.5, 2, math.sqrt(2 / 3))
    parts = [number, math.log(2 / 5), math.log(5 / 6), math.log(3 / 6)]  # each value is counted once more
    assert module.untied_log_prob(x, observed, rows, asked, layout).item() == pytest.approx(sum(parts), abs=1e-5)
    asked[:, 0] = asked[:, 4:] = False
    assert module.untied_log_prob(x, observed, rows, asked, layout).item() == pytest.approx(sum(parts[1:3]), abs=1e-5)
    flat = module.untied_log_prob(0 * x, observed, 0 * rows, ~asked, layout)
    assert flat.isfinite() and flat > number  # a column that never varies has a spread all the same


def test_untied_columns():
    check_untied(imputer_module)
    mutant_fails(imputer_module, check_untied, ("x_learn - mean, 0.0).square()", "x_learn, 0.0).square()"))
    mutant_fails(imputer_module, check_untied, ("n = torch.where(observed_learn, x_learn, 0.0)", "n = x_learn"))
    mutant_fails(imputer_module, check_untied, ("torch.where(target, log_p, 0.0).sum(1)", "log_p.sum(1)"))
    mutant_fails(imputer_module, check_untied, ("sqrt().clamp(min=0.1)", "sqrt()"))


def check_majority(module):
    "Few rows may say no by chance; NaN says no."
    best = torch.zeros(100)
    for worse, complaints in ((64, 0), (66, 1), (100, 1), (0, 0)):
        for value in (-1.0, math.nan):
            ours = torch.where(torch.arange(100) < worse, value, 1.0)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                module.warn_of_nothing_learned(ours, best, 1e-3)
            assert len(said) == complaints


def test_a_majority_warns():
    check_majority(imputer_module)
    mutant_fails(imputer_module, check_majority, ("1 - (ours >= untied)", "(ours < untied)"))
    mutant_fails(imputer_module, check_majority, ("worse > 0.5 + 1.5", "worse > 0.5 + 1.2"))


def check_ruin(module):
    """A rate far too large: said; a sound fit: nothing said."""
    for rate, epochs, complaints in ((30.0, 2, 1), (2e-3, 8, 0)):
        own = SMALL | {"max_epochs": epochs, "min_steps": 30, "learning_rate": rate}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            module.MIWAEImputer(**own).fit(with_holes(table(300)))
        assert sum("do not trust this fit" in str(w.message) for w in said) == complaints


def test_a_ruined_fit_is_reported():
    mutant_fails(miwae, check_ruin, ("warn_of_nothing_learned(ours, untied", "warn_of_nothing_learned(untied, ours"))


# --- the estimator ---------------------------------------------------------------------------------------------------


def test_no_peek():
    check_no_peek(MIWAEImputer(**SMALL), with_holes(table(60)))
    check_no_peek(MIWAEImputer(**SMALL), flowers())


class Peeking(MIWAEImputer):
    """The mutation: the weights take what stands behind a hole for observed."""

    def _weigh(self, network, x, observed, noise):
        return super()._weigh(network, x, torch.ones_like(observed), noise)


def test_a_peek_is_found():
    with pytest.raises(AssertionError, match="depends on what stands behind the holes"):
        check_no_peek(Peeking(**SMALL), with_holes(table(60)))


def test_mixed_tables_keep_what_was_observed_and_are_stored(tmp_path):
    holes = flowers()
    imputer = MIWAEImputer(**SMALL).fit(holes)
    for filled in (imputer.transform(holes), *imputer.sample(holes, 2)):
        assert filled.dtypes.equals(holes.dtypes) and not filled.isna().any(axis=None)
        for column in holes:
            kept = holes[column].notna()
            assert filled.loc[kept, column].equals(holes.loc[kept, column])
    imputer.save(tmp_path / "model")
    loaded = DeepImputer.load(tmp_path / "model", device="cpu")
    assert loaded.transform(holes).equals(imputer.transform(holes))
    np.testing.assert_array_equal(loaded.log_prob(holes), imputer.log_prob(holes))
    np.testing.assert_array_equal(loaded.effective_sample_size(holes), imputer.effective_sample_size(holes))


def test_rows_do_not_depend_on_company_or_place():
    holes = with_holes(table(80))
    imputer = MIWAEImputer(**SMALL).fit(holes)
    whole, turned = imputer.transform(holes), imputer.transform(holes[::-1])[::-1]
    np.testing.assert_allclose(whole, turned, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(imputer.transform(holes[7:8]), whole[7:8], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(imputer.log_prob(holes[7:9]), imputer.log_prob(holes)[7:9], rtol=1e-5)


def test_fills_beat_the_mean_and_density_knows_its_units():
    x = table(400, 6)
    holes = with_holes(x)
    imputer = MIWAEImputer(**(SMALL | {"max_epochs": 12, "min_steps": 25, "n_importance": 50})).fit(holes)
    lost = np.isnan(holes)
    means = np.broadcast_to(np.nanmean(holes, 0), x.shape)
    assert np.square(imputer.transform(holes) - x)[lost].mean() < 0.8 * np.square(means - x)[lost].mean()
    wide = MIWAEImputer(**(SMALL | {"max_epochs": 12, "min_steps": 25, "n_importance": 50})).fit(10 * holes)
    shift = imputer.log_prob(holes) - wide.log_prob(10 * holes)
    np.testing.assert_allclose(shift, (~lost).sum(1) * math.log(10), atol=0.5)
    assert imputer.log_prob(np.full((2, 6), np.nan)).tolist() == [0.0, 0.0]


def check_effective_sample_size(module):
    holes = with_holes(table(100))
    imputer = module.MIWAEImputer(**SMALL).fit(holes)
    ess = imputer.effective_sample_size(holes)
    assert ess.shape == (100,) and ess.dtype == "float64" and 1 - 1e-6 <= ess.min() and ess.max() <= 20 + 1e-6
    nothing = imputer.effective_sample_size(np.full((1, 5), np.nan))[0]
    wild = holes[:1].copy()
    wild[0] = 1e6
    assert ess.min() < nothing and np.isfinite(imputer.effective_sample_size(wild)).all()


def test_effective_sample_size():
    """Mutation: the log-likelihood in its place."""
    mutant_fails(
        miwae,
        check_effective_sample_size,
        ("return effective_sample_size(self._weigh", "return importance_weighted_bound(self._weigh"),
    )


def test_images():
    x = with_holes(load_digits().images[:40, None].astype("float32"))
    x[3] = np.nan
    imputer = MIWAEImputer(**SMALL).fit(x)
    filled, kept = imputer.transform(x), ~np.isnan(x)
    assert np.array_equal(filled[kept], x[kept]) and np.isfinite(filled).all() and filled.shape == x.shape
    assert imputer.sample(x, 2).shape == (2, *x.shape) and len(imputer.effective_sample_size(x)) == 40


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own, words",
    [
        ({"hidden": 0}, "hidden"),
        ({"latent": 0}, "latent"),
        ({"n_importance": 0}, "n_importance"),
        ({"n_samples": 2.5}, "n_samples"),
        ({"scale_min": 0.0}, "scale_min"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"min_steps": None}, "min_steps"),
    ],
)
def test_refusals(own, words):
    refuses(lambda: MIWAEImputer(**(SMALL | own)).fit(table(40, 3)), ValueError, words)


def test_an_unknown_category_is_named():
    holes = flowers()
    strange = holes.head(4).copy()
    strange.loc[strange.index[0], "kind"] = "orchid"
    with pytest.raises(ValueError, match="orchid"):
        MIWAEImputer(**SMALL).fit(holes).transform(strange)


def check_constants(module):
    x = torch.tensor([[1.0, 5.0, 1.0, 9.0], [2.0, 5.0, 1.0, 9.0], [3.0, 7.0, 1.0, 0.0]])
    seen = torch.tensor([[True] * 4, [True] * 4, [True, False, True, True]])
    constants = module.Constants(4)
    constants.learn(x, seen)
    assert constants(torch.full((1, 4), -1.0)).tolist() == [[-1.0, 5.0, 1.0, -1.0]]


def test_constants():
    """Mutation: a peek at hidden values."""
    mutant_fails(imputer_module, check_constants, ("torch.where(observed, x, -math.inf).amax(0)", "x.amax(0)"))


def check_filled(frame, **own):
    """Fit, fill, draw, and density without a warning of ours; nothing is left open and what was seen stays."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "on rows set aside MIWAE")  # three epochs teach some of these nothing
        imputer = MIWAEImputer(**(SMALL | own)).fit(frame)
        for filled in (imputer.transform(frame), imputer.sample(frame, 1)[0]):
            filled, before = pd.DataFrame(filled), pd.DataFrame(frame)
            open_ = before.columns[before.isna().all()]
            assert not filled.drop(columns=open_).isna().any(axis=None)
            assert all(filled.loc[before[c].notna(), c].equals(before.loc[before[c].notna(), c]) for c in before)
        assert np.isfinite(imputer.log_prob(frame)).all() and np.isfinite(imputer.effective_sample_size(frame)).all()
    return pd.DataFrame(imputer.transform(frame))


def test_odd_tables():
    rng = np.random.default_rng(0)
    check_filled(with_holes(50 + 5 * rng.normal(size=(100, 1))))
    constant = with_holes(np.c_[table(80, 3), np.full(80, 5.25)])
    assert (check_filled(constant)[3] == 5.25).all()
    check_filled(pd.DataFrame(constant, columns=list("abcd")).assign(e=np.nan))
    check_filled(with_holes(table(200, 5), 0.95))
    check_filled(np.array([[1.0, 2.0], [3.0, np.nan]]))
    huge = with_holes(table() * 1e12 + 3e12)
    assert np.nanmin(huge) - 1e13 < check_filled(huge).to_numpy().min()
    wild = with_holes(table())
    wild[7, 1] = 1e12
    check_filled(wild)
    two = with_holes(np.c_[table(80, 2), rng.integers(0, 2, 80)])
    check_filled(two)


def test_odd_categories():
    rng = np.random.default_rng(0)
    hole = rng.random(300) < 0.3
    many = pd.DataFrame(
        {
            "many": pd.Series([f"level {i}" for i in rng.permutation(np.r_[np.arange(150), np.arange(150)])]).mask(
                hole
            ),
            "rare": pd.Series(["once", *["often", "seldom"] * 149, "often"]).mask(np.r_[False, hole[1:]]),
        }
    )
    assert set(check_filled(many, kinds={"many": "category"})["rare"]) <= {"once", "often", "seldom"}
    wide = pd.DataFrame(
        {"code": pd.Categorical(np.arange(1000).repeat(2).astype(str)), "x": rng.normal(size=2000)}
    ).mask(rng.random((2000, 2)) < 0.2)
    check_filled(wide, kinds={"code": "category"}, max_epochs=1, n_importance=3, n_samples=2)
    logic = pd.DataFrame(
        {
            "yes": pd.array(rng.random(120) < 0.4, dtype="boolean"),
            "no": pd.array(rng.random(120) < 0.9, dtype="boolean"),
        }
    )
    check_filled(logic.mask(rng.random((120, 2)) < 0.3))
    ordered = flowers()[["size", "kind"]]
    assert check_filled(ordered)["size"].cat.ordered
