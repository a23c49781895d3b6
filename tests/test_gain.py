"""GAIN: losses by hand, hints, the range of numbers, what judges, no peek, checkpoints, bad input; mutations, all run.

A mutation is a copy of the module, without the hook that checks shapes, with pieces of its source replaced."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Interruptible, copy_of, refuses, with_holes
from sklearn.datasets import load_digits, load_iris

from missingbook.foundations.imputer import Layout, check_no_peek
from missingbook.foundations.training import Noise, TrainingDiverged, TrainingRun, seeded
from missingbook.gans import gain
from missingbook.gans.gain import GAINImputer

CPU = torch.device("cpu")
SMALL = dict(hidden=16, max_epochs=3, min_steps=10, n_draws=2, random_state=0, verbose=False, device="cpu")
MIXED = Layout(6, (0,), (1,), ((2, 4), (4, 6)))


def must_fail(check, *edits):
    """The check passes on the module and fails on its mutation."""
    check(gain)
    with pytest.raises((AssertionError, RuntimeError)):
        check(copy_of(gain, *edits))


def table(n=300, p=6, number=0):
    """Numbers of which three hidden causes explain most."""
    rng = np.random.default_rng(number)
    return rng.normal(size=(n, 3)) @ rng.normal(size=(3, p)) + 0.4 * rng.normal(size=(n, p))


def flowers(rate=0.3):
    """Iris with a category, a boolean and whole numbers; with holes."""
    frame = load_iris(as_frame=True).data
    frame["kind"] = np.array(list("abc"), dtype=object)[load_iris().target]
    frame["wide"] = (frame.iloc[:, 1] > 3).astype("boolean")
    frame["count"] = (frame.iloc[:, 2] * 10).round().astype("Int64")
    return frame.mask(np.random.default_rng(0).random(frame.shape) < rate)


# --- losses ----------------------------------------------------------------------------------------------------------


def check_game(module):
    m_hat = torch.tensor([[0.8, 0.5, 0.25], [0.9, 0.5, 0.5]]).logit().requires_grad_()
    seen = torch.tensor([[True, False, False], [True, True, False]])
    judged = torch.tensor([[True, False, True], [False, False, True]])
    l_d, l_g = module.discriminator_loss(m_hat, seen, judged), module.generator_loss(m_hat, seen, judged)
    assert math.isclose(l_d.item(), -math.log(0.8 * 0.75 * 0.5) / 3, rel_tol=1e-5)
    assert math.isclose(l_g.item(), -math.log(0.25 * 0.5) / 3, rel_tol=1e-5)
    (slope,) = torch.autograd.grad(l_d, m_hat, retain_graph=True)  # (m̂ − m) / 3 where it counts
    assert torch.allclose(slope, torch.tensor([[-0.2, 0.0, 0.25], [0.0, 0.0, 0.5]]) / 3)
    assert module.discriminator_loss(m_hat, seen, ~(judged | ~judged)) == 0  # over no cell


@pytest.mark.parametrize("edit", [
    ("logits, seen.float(), reduction", "logits, (~seen).float(), reduction"),
    ("torch.where(seen, 0.0, F.softplus(-logits))", "torch.where(seen, F.softplus(-logits), 0.0)"),
    ("torch.where(seen, 0.0, F.softplus(-logits))", "torch.where(seen, 0.0, F.softplus(logits))"),
    ("cells.sum().clamp(min=1)", "cells.numel()"),
    ("torch.where(cells, values, 0.0).sum()", "values.sum()"),
])
def test_losses_of_the_game(edit):
    """Mutations: observed and missing change places, in L_D, in L_G; L_G the wrong way; a mean over all; all count."""
    must_fail(check_game, edit)


def check_reconstruction(module):
    logits = torch.tensor([[0.0, math.log(3.0), math.log(0.75), math.log(0.25), 0.0, 0.0]])
    x = torch.tensor([[0.2, 1.0, 0.0, 1.0, 1.0, 0.0]])
    means = module.unit_mean(logits, MIXED)
    assert torch.allclose(means, torch.tensor([[0.5, 0.75, 0.75, 0.25, 0.5, 0.5]]))
    first = list(MIXED.first)
    assert first == [0, 1, 2, 4]
    surprise = -np.log([0.75, 0.25, 0.5])
    squares = np.array([0.25**2, 2 * 0.75**2, 2 * 0.5**2])
    plain = module.cell_errors(logits, x, MIXED, "gain")[0, first].tolist()
    assert np.allclose(plain, [0.09, *surprise], rtol=1e-5)
    mixed = module.cell_errors(logits, x, MIXED, "vaeac")[0, first].tolist()
    assert np.allclose(mixed, [0.09, *((0.2 * surprise + 0.8 * squares) / [1, 2, 2])], rtol=1e-5)


@pytest.mark.parametrize("edit", [
    ("(0.2, 0.8)", "(0.8, 0.2)"),
    ('size = stop - start if loss == "vaeac" else 1', "size = 1"),
    ("logits[:, start:stop].log_softmax(1)", "torch.nn.functional.logsigmoid(logits[:, start:stop])"),
    ("result[:, start:stop] = logits[:, start:stop].softmax(1)", "pass"),
    ("w[1] * squares[:, start:stop].sum(1)", "w[1] * squares[:, start]"),
])
def test_equation_12_of_both_papers(edit):
    """Mutations: weights exchanged; not divided by the categories; no softmax, twice; one column of a block."""
    must_fail(check_reconstruction, edit)


def check_hints(module):
    n = 30_000
    for rate in (None, 0.9, 0.01, 0.0, 1.0):
        told = module.draw_hints(n, 5, rate, Noise(0, CPU))
        share = told.float().mean(0)
        assert (share - (0.8 if rate is None else rate)).abs().max() < 0.01
        assert rate is not None or ((~told).sum(1) == 1).all()
        if rate == 0.9:  # independent
            assert abs((told[:, 0] & told[:, 1]).float().mean() - 0.81) < 0.01
    seen, told = torch.tensor([[True, False, True, False]]), torch.tensor([[True, True, False, False]])
    assert module.hint(seen, told).tolist() == [[1.0, 0.0, 0.5, 0.5]]


@pytest.mark.parametrize("edit", [
    ("lot > lot.amin(1, keepdim=True)", "lot >= lot.amin(1, keepdim=True)"),
    ("lot < hint_rate", "lot > hint_rate"),
    ("torch.where(told, seen.float(), 0.5)", "torch.where(told, seen.float(), 0.0)"),
])
def test_hints(edit):
    """Mutations: nothing left untold; the rate upside down; untold looks like missing, as in the public code."""
    must_fail(check_hints, edit)


# --- the network -----------------------------------------------------------------------------------------------------


def check_range(module):
    with seeded(0, CPU):
        network = module.GAIN(MIXED, 8)
    x = torch.tensor([[10.0, 1.0, 1, 0, 0, 1], [30.0, 0.0, 0, 1, 1, 0], [-5e5, 0.0, 0, 1, 1, 0]])
    seen = torch.tensor([[True] * 6, [True] * 6, [False] * 6])
    network.learn_range(x, seen)
    unit = network.to_unit(x[:2])
    assert torch.equal(unit, torch.tensor([[0.0, 1.0, 1, 0, 0, 1], [1.0, 0.0, 0, 1, 1, 0]]))
    made = network.from_unit(torch.full((1, 6), 50.0))
    assert torch.allclose(made, torch.tensor([[30.0, 1.0, 0.5, 0.5, 0.5, 0.5]]))
    assert network.to_unit(torch.full((1, 6), 1e6)).max() == 2 and network.to_unit(torch.full((1, 6), -1e6)).min() == -1
    z = torch.rand(2, 6)
    whole = torch.ones_like(unit, dtype=torch.bool)
    inside = network.generate(unit, whole, z)
    assert torch.equal(inside, network.generate(unit, whole, 1 - z))  # z only in holes


@pytest.mark.parametrize("edit", [
    ("torch.where(observed, x, math.inf).amin(0)", "x.amin(0)"),
    (".clamp(-1.0, 2.0)", ""),
    ("torch.where(observed, unit, self.noise * z)", "unit + self.noise * z"),
    ("self.low + self.spread * unit_mean", "self.spread * unit_mean"),
])
def test_range_of_numbers(edit):
    """Mutations: a peek at hidden values; no limit; noise on what was observed; the lower end forgotten."""
    must_fail(check_range, edit)


def check_begin(module):
    with seeded(0, CPU):
        network = module.GAIN(MIXED, 8)
    x = torch.tensor([[10.0, 1, 1, 0, 0, 1], [30.0, 0, 0, 1, 1, 0], [18.0, 1, 1, 0, 1, 0], [-5e5, 0, 0, 1, 0, 1]])
    seen = torch.tensor([[True] * 6] * 3 + [[False] * 6])
    network.learn_range(x, seen)
    network.begin_at_means(x, seen)
    torch.nn.init.zeros_(network.generator[-1].weight)  # what the bias says alone
    filled = network.from_unit(network.generate(network.to_unit(x), seen, torch.zeros(4, 6)))
    assert torch.allclose(filled, x[:3].mean(0).expand(4, 6), rtol=1e-4)


@pytest.mark.parametrize("edit", [
    ("self.generator[-1].bias.copy_(", "self.generator[-1].bias.clone().copy_("),
    ("torch.where(observed, unit, 0.0).sum(0)", "unit.sum(0)"),
    ("result = means.logit()", "result = means.clone()"),
    ("result[start:stop] = means[start:stop].log()", "pass"),
])
def test_a_generator_begins_at_the_means(edit):
    """Mutations: the bias stays at 0; a peek at hidden values; no logit; categories through the wrong door."""
    must_fail(check_begin, edit)


def check_wild_value(module):
    x = torch.randn(600, 2, generator=torch.Generator().manual_seed(0)).numpy()
    x[:, 1] += x[:, 0]
    lost = np.random.default_rng(0).random(600) < 0.3
    holes = x.copy()
    holes[lost, 1] = np.nan
    holes[np.flatnonzero(~lost)[0], 1] = 300.0
    filled = module.GAINImputer(**(SMALL | {"max_epochs": 4, "min_steps": 50})).fit(holes).transform(holes)
    by_gain, by_mean = (np.square(fills - x[lost, 1]).mean() for fills in (filled[lost, 1], np.nanmean(holes[:, 1])))
    assert by_gain < 4 * by_mean


def test_the_bias_bounds_what_one_wild_value_does():
    """Mutation: the bias begins at 0, in the middle of a range that one value stretches."""
    must_fail(check_wild_value, ("network.begin_at_means(x, observed)", "pass"))


def trained(module, **own):
    """Networks after a few steps, with what a run logged; and the observed cells that judged."""
    x = torch.tensor(table(200, 4), dtype=torch.float32)
    observed = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    run, layout = TrainingRun(0, "cpu", verbose=False), Layout(4, (0, 1, 2, 3))
    with seeded(0, CPU):
        network = module.GAIN(layout, 8)
        before = {k: v.clone() for k, v in network.state_dict().items()}
        network.learn_range(x, observed)
        module.train_gain(network, x, observed, run, 2, 64, 4, **own)
    return network, before, run.history


def check_training(module):
    network, before, history = trained(module, validation_fraction=0.0)
    for name, weights in network.named_parameters():
        assert not torch.equal(weights, before[name]), name
    assert list(history.columns) == ["L_D", "L_G", "L_M", "seconds"] and len(history) == 2
    quiet = trained(module, validation_fraction=0.0, adversarial=0.0)[0]
    moved = {k: not torch.equal(v, network.state_dict()[k]) for k, v in quiet.state_dict().items()}
    assert any(moved[k] for k in moved if k.startswith("generator"))  # the game changes the generator
    alone = trained(module, validation_fraction=0.0, adversarial=0.0, hint_rate=0.5)[0]
    for name, weights in alone.generator.state_dict().items():  # and without it the hints are nothing to it
        assert torch.equal(weights, quiet.generator.state_dict()[name])


@pytest.mark.parametrize("edit", [
    ("run.step(loss_d, adam_d)", "pass"),
    ("adversarial * loss_g + alpha * loss_m", "loss_g + alpha * loss_m"),
    ("generator_loss(network.discriminate(imputed, h)", "generator_loss(network.discriminate(imputed.detach(), h)"),
])
def test_training(edit):
    """Mutations: the discriminator stands still; the switch is deaf; the game never reaches the generator."""
    must_fail(check_training, edit)


def check_judge(module):
    x, observed = torch.rand(500, 6), torch.rand(500, 6) < 0.8
    observed[:, 2:4], observed[:, 4:6] = observed[:, 2:3].clone(), observed[:, 4:5].clone()
    judge = module.Judge(x, observed, MIXED, 0.1, Noise(0, CPU))
    taken = observed & ~judge.left
    assert not (judge.left & ~observed).any() and 0.07 < taken.sum() / observed.sum() < 0.13
    assert torch.equal(taken[:, 2], taken[:, 3]) and torch.equal(taken[:, 4], taken[:, 5])  # blocks go whole
    assert torch.equal(judge.aside, taken[taken.any(1)]) and not (judge.shown & judge.aside).any()
    with seeded(0, CPU):
        network = gain.GAIN(MIXED, 8)
    means = gain.unit_mean(network.generate(judge.unit, judge.shown, judge.z), MIXED)
    errors, cells = (means[:, 0] - judge.unit[:, 0]) ** 2, judge.aside[:, 0]
    judge.aside[:, 1:] = False
    assert torch.isclose(judge.score(network, "gain"), errors[cells].mean())
    assert not module.Judge(x, observed, MIXED, 0.0, Noise(0, CPU)).found


@pytest.mark.parametrize("edit", [
    ("aside = observed & (lot < fraction)", "aside = lot < fraction"),
    ("self.left = observed & ~aside", "self.left = observed"),
    ("[:, layout.owner().to(unit.device)]\n        aside", 
     "[:, torch.arange(layout.width) % layout.n_columns]\n        aside"),
    ("self.left[rows], aside[rows]", "observed[rows], aside[rows]"),
])
def test_judge(edit):
    """Mutations: holes judge; what judges teaches; blocks are torn; the answers are shown."""
    must_fail(check_judge, edit)


# --- the estimator ---------------------------------------------------------------------------------------------------


OTHER = {"loss": "vaeac", "hint_rate": None, "adversarial": 0.0}


@pytest.mark.parametrize("own", [{}, OTHER], ids=["default", "other"])
def test_no_peek(own):
    check_no_peek(GAINImputer(**SMALL, **own), with_holes(table(80, 4)))
    check_no_peek(GAINImputer(**SMALL, **own), flowers())


def test_images_do_not_peek_and_observed_pixels_stay():
    x = with_holes(load_digits().images[:60, None].astype("float32"))
    x[3] = np.nan
    check_no_peek(GAINImputer(**SMALL), x)
    filled, seen = GAINImputer(**SMALL).fit_transform(x), ~np.isnan(x)
    assert np.array_equal(filled[seen], x[seen]) and np.isfinite(filled).all() and filled.shape == x.shape


class Peeking(GAINImputer):
    """The mutation: the generator's input holds what stands behind a hole."""

    def __init__(self, **common):
        super().__init__(**common)

    def _draw(self, network, x, observed, noise):
        unit = network.to_unit(x.flatten(1))
        return network.from_unit(network.generate(unit, torch.ones_like(unit, dtype=torch.bool), unit)).view(x.shape)


def test_a_peek_is_found():
    with pytest.raises(AssertionError, match="depends on what stands behind the holes"):
        check_no_peek(Peeking(**SMALL), with_holes(table(80, 4)))


def test_mixed_tables_keep_what_was_observed():
    holes = flowers()
    imputer = GAINImputer(**SMALL).fit(holes)
    for filled in (imputer.transform(holes), *imputer.sample(holes, 2)):
        assert filled.dtypes.equals(holes.dtypes) and not filled.isna().any(axis=None)
        for column in holes:
            seen = holes[column].notna()
            assert filled.loc[seen, column].equals(holes.loc[seen, column])


def test_fills_stay_in_the_range_of_training_and_beat_the_mean():
    x = table(400, 6)
    holes = with_holes(x)
    filled = GAINImputer(**(SMALL | {"max_epochs": 12, "min_steps": 50})).fit(holes).transform(holes)
    hidden = np.isnan(holes)
    means = np.broadcast_to(np.nanmean(holes, 0), x.shape)
    assert np.square(filled - x)[hidden].mean() < 0.8 * np.square(means - x)[hidden].mean()
    for j in range(6):
        assert np.nanmin(holes[:, j]) <= filled[:, j].min() and filled[:, j].max() <= np.nanmax(holes[:, j])


def test_draws_differ_by_the_noise_alone():
    holes = with_holes(table(100, 4))
    spread = {}
    for noise in (0.0, 0.01, 1.0):
        draws = GAINImputer(**SMALL, noise=noise).fit(holes).sample(holes, 5)
        lost = np.isnan(holes)
        assert (draws[:, ~lost] == holes[~lost]).all()
        spread[noise] = draws[:, lost].std(0).mean()
    assert spread[0.0] < 1e-6 < spread[0.01] < spread[1.0]


class Stopped(Interruptible, GAINImputer):
    """Ctrl-C before epoch `stop`; where not `kept`, the run forgets the discriminator's optimizer."""

    kept = True

    def __init__(self, **common):
        super().__init__(**common)

    def _train(self, network, x, observed, run):
        keep = run.keep
        run.keep = lambda **parts: keep(**{k: v for k, v in parts.items() if self.kept or k != "adam_d"})
        super()._train(network, x, observed, run)


def test_an_interrupted_fit_goes_on_bit_for_bit(tmp_path):
    """Mutation (run below): the discriminator's optimizer is not stored."""
    X, options = with_holes(table(150, 4)), SMALL | {"max_epochs": 7}
    whole = Stopped(**options).fit(X)

    def resumed(kept):
        imputer = Stopped(**options, checkpoint=str(tmp_path / f"fit{kept}"))
        imputer.stop, imputer.kept = 4, kept
        with pytest.raises(KeyboardInterrupt):
            imputer.fit(X)
        imputer.stop = None
        imputer.fit(X)
        assert imputer.begun == [4, 5, 6]
        return imputer

    again = resumed(True)
    assert again.history_.drop(columns="seconds").equals(whole.history_.drop(columns="seconds"))
    np.testing.assert_array_equal(again.sample(X, 2), whole.sample(X, 2))
    assert not resumed(False).history_["L_D"].equals(whole.history_["L_D"])


@pytest.mark.filterwarnings("ignore:the loss became NaN")
def test_a_diverged_training_is_reported():
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        GAINImputer(**SMALL, learning_rate=1e9, alpha=1e9, validation_fraction=0.0).fit(flowers())


def said(module=gain, **own):
    """What a fit warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.GAINImputer(**(SMALL | {"max_epochs": 6, "min_steps": 50} | own)).fit(with_holes(table(200, 4)))
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("fraction", [0.0, 0.05])
def test_a_generator_that_learned_nothing_is_reported(fraction):
    """Mutation: nobody asks the judge. Sigmoids at the ends of the range; a dead layer."""
    wrong = dict(learning_rate=10.0, validation_fraction=fraction)
    assert any("learning_rate" in words for words in said(**wrong))
    silent = copy_of(gain, ("judge.complaint(network, loss)) is not None", "None) is not None"))
    assert said(silent, **wrong) == [] == said(validation_fraction=fraction)
    with seeded(0, CPU):
        network, x = gain.GAIN(MIXED, 8), torch.rand(20, 6)
    judge = gain.Judge(x, torch.ones(20, 6, dtype=torch.bool), MIXED, fraction, Noise(0, CPU))
    assert "dead" not in str(judge.complaint(network, "gain"))
    torch.nn.init.constant_(network.generator[-3].bias, -1e3)
    assert "dead" in judge.complaint(network, "gain")


def test_a_game_that_is_off_is_reported():
    """Mutation: a hint that tells everything passes in silence."""
    assert any("hint_rate=1 tells every cell" in words for words in said(hint_rate=1.0, max_epochs=1))
    assert said(hint_rate=1.0, adversarial=0.0) == []
    assert said(copy_of(gain, ("self.hint_rate == 1 and", "False and")), hint_rate=1.0) == []
    nothing = GAINImputer(**SMALL, alpha=0, adversarial=0.0)
    refuses(lambda: nothing.fit(table(40, 3)), ValueError, "alpha=0 and adversarial=0")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own, words", [
    ({"hint_rate": 1.5}, "hint_rate=1.5"), ({"hint_rate": -0.1}, "hint_rate=-0.1"),
    ({"loss": "square"}, "'gain' or 'vaeac'"),
    ({"alpha": -1.0}, "alpha"), ({"adversarial": None}, "adversarial"), ({"noise": -1.0}, "noise"),
    ({"depth": 0}, "depth"), ({"min_steps": 0}, "min_steps"), ({"validation_fraction": 1.0}, "validation_fraction"),
])
def test_refusals(own, words):
    refuses(lambda: GAINImputer(**(SMALL | own)).fit(table(40, 3)), ValueError, words)


def test_an_unknown_category_is_named():
    holes = flowers()
    imputer = GAINImputer(**SMALL).fit(holes)
    strange = holes.head(4).copy()
    strange.loc[strange.index[0], "kind"] = "orchid"
    with pytest.raises(ValueError, match="orchid"):
        imputer.transform(strange)


def test_one_column_constant_and_empty_columns():
    column = with_holes(50 + 5 * np.random.default_rng(0).normal(size=(200, 1)))
    made = GAINImputer(**SMALL).fit(column).transform([[np.nan]])[0, 0]
    assert np.nanmin(column) <= made <= np.nanmax(column)
    holes = with_holes(np.c_[table(100, 3), np.full(100, 5.25)])
    imputer = GAINImputer(**SMALL).fit(holes)
    assert (imputer.transform(holes)[:, -1] == 5.25).all() and (imputer.sample(holes, 2)[:, :, -1] == 5.25).all()
    empty = pd.DataFrame(holes, columns=list("abcd")).assign(e=np.nan)
    filled = GAINImputer(**SMALL).fit_transform(empty)
    assert filled["e"].isna().all() and not filled[list("abcd")].isna().any(axis=None)
    assert np.isfinite(GAINImputer(**SMALL).fit(np.array([[1.0, 2.0], [3.0, np.nan]])).transform([[np.nan, 2.0]])).all()


def test_hardly_anything_seen_and_huge_values():
    sparse = with_holes(table(200, 5), 0.95)
    assert np.isfinite(GAINImputer(**SMALL).fit(sparse).transform(sparse)).all()
    huge = with_holes(table() * 1e12 + 3e12)
    filled = GAINImputer(**SMALL).fit(huge).transform(huge)
    assert np.isfinite(filled).all() and np.nanmin(huge) <= filled.min() and filled.max() <= np.nanmax(huge)
    wild = with_holes(table())
    wild[7] = 1e12
    assert np.isfinite(GAINImputer(**SMALL).fit(wild).transform(wild)).all()


def test_ordinary_use_warns_of_nothing(recwarn):
    """Mutation: patience is kept where no cell judges, and the run says that it had no effect."""
    GAINImputer(**SMALL, validation_fraction=0.0).fit(with_holes(table(60, 3)))
    assert [w for w in recwarn if issubclass(w.category, RuntimeWarning)] == []
    kept = copy_of(gain, ("run.stopping.patience if judge.found else None", "run.stopping.patience"))
    kept.GAINImputer(**SMALL, validation_fraction=0.0).fit(with_holes(table(60, 3)))
    assert any("patience" in str(w.message) for w in recwarn)
