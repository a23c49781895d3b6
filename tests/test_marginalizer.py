"""The Universal Marginalizer: equations 10 and 11 by enumeration, request masks, the sampler, no peek, checkpoints, bad
input; mutations, all run.

A mutation is a copy of the module, without the hook that checks shapes, with pieces of its source replaced."""

import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Interruptible, copy_of, mutant_fails, refuses, seed, with_holes
from sklearn.datasets import load_digits, load_iris
from torch import nn

from missingbook.foundations.imputer import Layout, cell_log_prob, cell_mean, check_no_peek
from missingbook.foundations.training import Noise, TrainingDiverged, TrainingRun, seeded
from missingbook.vaes import marginalizer
from missingbook.vaes.marginalizer import MarginalizerImputer

CPU = torch.device("cpu")
SMALL = dict(hidden=16, depth=1, max_epochs=3, n_orders=2, random_state=0, verbose=False, device="cpu")
MIXED = Layout(5, (), (0, 4), ((1, 4),))  # two states, three, two
STATES = torch.tensor([[a, *np.eye(3)[k], b] for a, k, b in itertools.product((0, 1), range(3), (0, 1))]).float()
OWNER = MIXED.owner()


class Exact(nn.Module):
    """The true marginals of a joint distribution over the twelve states, for every set of seen columns."""

    def __init__(self, joint):
        super().__init__()
        self.layout, self.joint = MIXED, joint

    def forward(self, x, seen):
        weight = ((x[:, None] == STATES) | ~seen[:, None]).all(2) * self.joint
        p = (weight @ STATES / weight.sum(1, keepdim=True)).clamp(1e-9, 1 - 1e-7)
        return torch.where(torch.tensor([True, False, False, False, True]), p.logit(), p.log()), torch.ones(())


def truth():
    joint = torch.rand(12, generator=seed(1)) ** 2 + 0.01
    return joint / joint.sum()


def columns(*which):
    """Cells of these columns, one row."""
    return torch.isin(OWNER, torch.tensor(which, dtype=torch.int64))[None]


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


# --- equations -------------------------------------------------------------------------------------------------------


def check_loss(module):
    layout = Layout(3, (0,), (1, 2))
    output, sigma = torch.tensor([[1.0, math.log(3), 0.0], [0.0, 0.0, 0.0]]), torch.tensor([2.0, 1.0, 1.0])
    x = torch.tensor([[3.0, 1.0, math.nan], [math.nan, 0.0, 1.0]])
    target = torch.tensor([[True, True, False], [False, True, True]])
    rows = [-0.5 - math.log(2) - 0.5 * math.log(2 * math.pi) + math.log(0.75), 2 * math.log(0.5)]
    assert torch.isclose(module.marginalizer_loss(output, x, target, layout, sigma), -torch.tensor(rows).mean())
    weighted = module.marginalizer_loss(output, x, target, layout, sigma, torch.tensor([3.0, 0.5]))
    assert torch.isclose(weighted, -torch.tensor([3 * rows[0], 0.5 * rows[1]]).mean())


@pytest.mark.parametrize("edit", [
    ("return -(weight * torch", "return (weight * torch"),
    ("-(weight * torch.where(target, log_p, 0.0)", "-(torch.where(target, log_p, 0.0)"),
    ("-(weight * torch.where(target, log_p, 0.0).sum(1))", "-(weight * log_p.sum(1))"),
])
def test_equation_10(edit):
    """Mutations: the wrong sign; no weight; seen and missing cells count."""
    mutant_fails(marginalizer, check_loss, edit)


def check_chain(module):
    network, joint = Exact(truth()), truth()
    none, every = torch.zeros(12, 5, dtype=torch.bool), torch.ones(12, 5, dtype=torch.bool)
    for order in itertools.permutations((0.1, 0.5, 0.9)):  # exact marginals: all orders give the joint
        log_p = module.chain_log_prob(network, STATES, none, every, torch.tensor([order]), chunk=7)
        assert torch.allclose(log_p.exp().float(), joint, rtol=1e-4)
    given = columns(1).expand(12, -1)
    conditional = joint.view(2, 3, 2) / joint.view(2, 3, 2).sum((0, 2), keepdim=True)
    log_p = module.chain_log_prob(network, STATES, given, ~given, torch.rand(12, 3, generator=seed()))
    assert torch.allclose(log_p.exp().float(), conditional.flatten(), rtol=1e-4)
    with seeded(0, CPU):
        wrong = module.UniversalMarginalizer(MIXED, 8)  # inexact: orders differ, and each sums to one
    by_order = torch.stack([module.chain_log_prob(wrong, STATES, none, every, torch.tensor([order]))
                            for order in itertools.permutations((0.1, 0.5, 0.9))])
    assert torch.allclose(by_order.exp().sum(1), torch.ones(6, dtype=torch.float64), atol=1e-6)
    assert by_order.std(0).min() > 1e-5


def check_order(module):
    """p(x0, x2 | x1) = p(x2 | x1) p(x0 | x1, x2), step by step."""
    with seeded(0, CPU):
        network = module.UniversalMarginalizer(MIXED, 8)
    x, seen = STATES[3:4], columns(1)
    first, second = (cell_log_prob(network(x, s)[0], x, MIXED) for s in (seen, columns(1, 2)))
    log_p = module.chain_log_prob(network, x, seen, ~seen, torch.tensor([[0.9, 0.5, 0.1]]))
    assert math.isclose(log_p.item(), (first[0, 4] + second[0, 0]).item(), rel_tol=1e-5)


@pytest.mark.parametrize("check, edit", [
    (check_chain, ("(rank[r] < rank[r, c][:, None])", "(rank[r] <= rank[r, c][:, None])")),
    (check_chain, ("seen[r] | answered[:, owner]", "seen[r]")),
    (check_chain, ("seen[r] | answered[:, owner]", "answered[:, owner]")),
    (check_order, ("(rank[r] < rank[r, c][:, None])", "(rank[r] > rank[r, c][:, None])")),
    (check_order, ("log_p.gather(1, first[c][:, None])[:, 0]", "log_p.sum(1)")),
])
def test_equation_11(check, edit):
    """Mutations: the answer is shown; nothing is answered; no condition; the order reversed; all cells count."""
    mutant_fails(marginalizer, check, edit)


# --- the masks of the requests ---------------------------------------------------------------------------------------


def check_requests(module):
    n = 60_000
    observed, shown = torch.ones(n, 5, dtype=torch.bool), torch.zeros(n, 5, dtype=torch.bool)
    observed[: n // 2, 0] = False  # a missing cell is never asked for
    seen = module.request_masks(observed, shown, MIXED, Noise(0, CPU))
    assert not (seen & ~observed).any() and torch.equal(seen[:, 1], seen[:, 2]) and torch.equal(seen[:, 1], seen[:, 3])
    rows, h = observed[:, 0], 3
    asked = (observed & ~seen)[rows][:, [0, 1, 4]]
    for subset in itertools.product((False, True), repeat=h):
        share = (asked == torch.tensor(subset)).all(1).float().mean().item()
        assert abs(share - 1 / ((h + 1) * math.comb(h, sum(subset)))) < 0.01
    shown[:, 1:4] = True
    kept = module.request_masks(observed, shown, MIXED, Noise(0, CPU))
    assert kept[:, 1:4].all() and 0.6 < (~kept)[rows][:, [0, 4]].any(1).float().mean() < 0.7  # two hidden: 1 - 1/3


@pytest.mark.parametrize("edit", [
    ("return shown | hide_more(observed, layout, noise)", "return hide_more(observed, layout, noise)"),
    ("return shown | hide_more(observed, layout, noise)", "return shown"),
    ("return shown | hide_more(observed, layout, noise)", "return shown | hide_cells(observed, layout, 0.5, noise)"),
])
def test_request_masks(edit):
    """Mutations: what p(b) shows is hidden, too; p(b) alone; one rate for all rows."""
    mutant_fails(marginalizer, check_requests, edit)


def check_weight(module):
    """The mean over all subsets, weighted, is the mean over all orders of the chain rule's log p."""
    with seeded(0, CPU):
        network = marginalizer.UniversalMarginalizer(MIXED, 8)
    x, h = STATES[4:5], 3
    by_order = [marginalizer.chain_log_prob(network, x, columns(), columns(0, 1, 2), torch.tensor([order]))
                for order in itertools.permutations((0.1, 0.5, 0.9))]
    total = 0.0
    for size in range(h + 1):
        for subset in itertools.combinations(range(h), size):
            target = columns(*subset)
            weight = module.chain_weight(columns(0, 1, 2), target, MIXED)
            log_p = -marginalizer.marginalizer_loss(network(x, ~target)[0], x, target, MIXED, 1.0, weight)
            total += log_p.item() / ((h + 1) * math.comb(h, size))
    assert math.isclose(total, torch.stack(by_order).mean().item(), rel_tol=1e-5)


@pytest.mark.parametrize("edit", [
    ("(hidden[:, first].sum(1) + 1)", "hidden[:, first].sum(1)"),
    ("asked = target[:, first].sum(1)", "asked = target.sum(1)"),
    ("/ asked.clamp(min=1)", ""),
])
def test_weights_make_equation_10_the_chain_rule(edit):
    """Mutations: |b_0| for |b_0| + 1; cells for columns; not divided."""
    mutant_fails(marginalizer, check_weight, edit)


# --- draws -----------------------------------------------------------------------------------------------------------


def check_draws(module):
    n, joint = 30_000, truth().view(2, 3, 2)
    network = Exact(truth())
    for given in ((), (1,)):
        seen = columns(*given).expand(n, -1)
        x = torch.where(seen, STATES[2], math.nan)  # the second of three, where it is given
        rank = torch.rand(n, 3, generator=seed())
        made = module.chain_draw(network, x, seen, rank, Noise(0, CPU))
        assert torch.equal(made[seen], STATES[2].expand(n, -1)[seen])
        found = (made[:, None] == STATES).all(2).float().mean(0).view(2, 3, 2)
        expected = joint.clone()
        if given:
            expected[:, [0, 2]] = 0
            expected /= expected.sum()
        assert (found - expected).abs().max() < 0.01 and math.isclose(found.sum(), 1, rel_tol=1e-6)


@pytest.mark.parametrize("edit", [
    ("torch.where(now, drawn, x[rows]), seen[rows] | now", "torch.where(now, drawn, x[rows]), seen[rows]"),
    ("_Kept(u[rows], z[rows])", "_Kept(u[:1].expand(len(rows), -1), z[rows])"),
])
def test_sequential_draws_follow_the_joint(edit):
    """Mutations: answers are not shown to the next request; one number for all rows."""
    mutant_fails(marginalizer, check_draws, edit)


def check_rows(module):
    """A row's draw depends on its own numbers alone, whatever its neighbours lack."""
    with seeded(0, CPU):
        network = module.UniversalMarginalizer(Layout(4, (0, 1), (2, 3)), 8)
    x, seen = torch.randn(6, 4, generator=seed()), torch.rand(6, 4, generator=seed(1)) < 0.5
    rank, u, z = (torch.rand(6, 4, generator=seed(k)) for k in (2, 3, 4))
    whole = module.chain_draw(network, x, seen, rank, module._Kept(u, z))
    assert torch.equal(whole[seen], x[seen])
    for k in range(6):
        one = slice(k, k + 1)
        alone = module.chain_draw(network, x[one], seen[one], rank[one], module._Kept(u[one], z[one]))
        assert torch.allclose(alone[0], whole[k], atol=1e-6)


@pytest.mark.parametrize("edit", [
    ("rows = (count > step).nonzero()[:, 0]", "rows = (count > -1).nonzero()[:, 0]"),
    ("torch.where(now, drawn, x[rows]), seen[rows] | now", "drawn, seen[rows] | now"),
])
def test_neighbours_change_nothing_and_answers_stay(edit):
    """Mutations: rows that are done go on; all is drawn anew in each step."""
    mutant_fails(marginalizer, check_rows, edit)


# --- training --------------------------------------------------------------------------------------------------------


def trained(module, **own):
    x = torch.randn(400, 1, generator=seed()) + 0.3 * torch.randn(400, 4, generator=seed(1))  # one cause
    observed = torch.rand(400, 4, generator=seed()) < 0.8
    run, layout = TrainingRun(0, "cpu", verbose=False), Layout(4, (0, 1, 2, 3))
    with seeded(0, CPU):
        network = module.UniversalMarginalizer(layout, 32, 1)
        before = {name: w.clone() for name, w in network.state_dict().items()}
        hide = lambda observed, noise: torch.zeros_like(observed)  # noqa: E731  p(b): all is hidden
        module.train_marginalizer(network, x, observed, run, hide, 20, 32, 3e-3, **own)
    return network, before, run.history, x, observed


def check_training(module):
    network, before, history, x, observed = trained(module)
    assert all(not torch.equal(w, before[name]) for name, w in network.state_dict().items())
    assert list(history.columns) == ["loss", "validation", "seconds"]
    whole = observed.all(1)
    rank, none = torch.rand(1, 4, generator=seed()), torch.zeros(int(whole.sum()), 4, dtype=torch.bool)
    log_p = marginalizer.chain_log_prob(network, x[whole], none, ~none, rank).mean().item()
    means = x[whole].mean(0).expand(len(none), -1)
    alone = cell_log_prob(means, x[whole], network.layout, x[whole].std(0)).sum(1).mean()
    assert log_p > alone.item() + 1  # dependence was learned
    assert -history["validation"].min() > log_p  # of rows with fewer cells


@pytest.mark.parametrize("edit", [
    ("if thin else shown", "if False else shown"),
    ("target = network(x, seen), observed & ~seen", "target = network(x, observed), observed & ~seen"),
])
def test_training(edit):
    """Mutations: under p(b) alone nothing but the unconditional marginals is learned; the answers are shown."""
    mutant_fails(marginalizer, check_training, edit)


class Stopped(Interruptible, MarginalizerImputer):
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
    assert not resumed(False).history_["loss"].equals(whole.history_["loss"])


@pytest.mark.filterwarnings("ignore:the loss became NaN")
def test_a_diverged_training_is_reported():
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        MarginalizerImputer(**SMALL, learning_rate=1e9).fit(table())


# --- the estimator ---------------------------------------------------------------------------------------------------


def pictures(n=60):
    return with_holes((load_digits().images[:n, None] > 7.5).astype("float32"), 0.2)


@pytest.mark.parametrize("own", [{}, {"hide_rate": 0.5, "weighting": "sum"}], ids=["default", "other"])
def test_no_peek(own):
    check_no_peek(MarginalizerImputer(**SMALL, **own), with_holes(table(80, 4)))
    check_no_peek(MarginalizerImputer(**SMALL, **own), flowers())


@pytest.mark.parametrize("own", [{"pixels": "bernoulli", "pattern": "half"}, {}], ids=["black and white", "grey"])
def test_images_do_not_peek_and_observed_pixels_stay(own):
    x = pictures(40)
    x[3] = np.nan
    small = SMALL | {"n_orders": 1, "max_epochs": 1}
    check_no_peek(MarginalizerImputer(**small, **own), x)
    filled, seen = MarginalizerImputer(**small, **own).fit_transform(x), ~np.isnan(x)
    assert np.array_equal(filled[seen], x[seen]) and np.isfinite(filled).all() and filled.shape == x.shape


def test_a_peek_is_found():
    """Mutation: the network's input holds what stands behind a hole."""
    mutant = copy_of(marginalizer, ("torch.cat([torch.where(seen, x, 0.0), seen", "torch.cat([x, seen"))
    with pytest.raises(AssertionError, match="depends on what stands behind the holes"):
        check_no_peek(mutant.MarginalizerImputer(**SMALL), with_holes(table(80, 4)))


def check_one_pass(module):
    holes = with_holes(table(80, 4))
    imputer = module.MarginalizerImputer(**SMALL).fit(holes)
    passes = []
    imputer.network_.register_forward_hook(lambda *_: passes.append(1))
    filled = imputer.transform(holes)
    assert len(passes) == 1
    x, observed = imputer._encode(holes)
    means = cell_mean(imputer.network_(x, observed)[0], imputer.network_.layout).detach().numpy()
    assert np.allclose(filled, imputer.encoder_.inverse_transform(means, holes), atol=1e-5)
    passes.clear()
    imputer.sample(holes, 1)
    assert len(passes) == np.isnan(holes).sum(1).max()  # as many as the row with the most holes needs


def test_transform_is_the_marginals_mean_in_one_pass():
    """Mutation: a draw is taken for the mean."""
    honest = "return cell_mean(network(x.flatten(1), observed.flatten(1))[0], network.layout)"
    mutant_fails(marginalizer, check_one_pass, (honest, "return network(x.flatten(1), observed.flatten(1))[1]"))


def check_density(module):
    X = with_holes(table(120, 4), 0.2)
    imputer = module.MarginalizerImputer(**SMALL).fit(X)
    each, mixed = imputer.log_prob_by_order(X, n_orders=2)
    assert np.array_equal(imputer.log_prob(X), mixed) and each.shape == (2, 120)
    assert np.allclose(np.exp(mixed), np.exp(each).mean(0)) and (each[0] != each[1]).mean() > 0.5
    given = np.zeros(X.shape, dtype=bool)
    given[:, :2] = True
    natural = torch.arange(4.0)[None]  # in this order the chain rule splits where `given` ends
    x, observed = imputer._encode(X)
    split = [module.chain_log_prob(imputer.network_, x, s, t, natural) for s, t in (
        (observed & False, observed), (observed & False, observed & torch.tensor(given)),
        (observed & torch.tensor(given), observed & ~torch.tensor(given)))]
    assert torch.allclose(split[0], split[1] + split[2], atol=1e-5)
    assert np.allclose(imputer.log_prob(X, given)[np.isnan(X[:, 2:]).all(1)], 0)
    scaled = module.MarginalizerImputer(**SMALL).fit(1000 * X)
    assert np.allclose(scaled.log_prob(1000 * X), mixed - (~np.isnan(X)).sum(1) * math.log(1000), atol=1e-3)


@pytest.mark.parametrize("edit", [
    ("each.logsumexp(0) - math.log(len(orders))", "each.mean(0)"),
    ("- target.double() @ self._log_spread()", ""),
])
def test_density(edit):
    """Mutations: the mean of logarithms, which is no density; the units are forgotten."""
    mutant_fails(marginalizer, check_density, edit)


def check_orders(module):
    for columns, asked, found in ((2, 4, 2), (3, 6, 6), (4, 4, 4), (1, 3, 1), (64, 5, 5)):
        ranks = module.different_orders(columns, asked, seed(0))
        assert ranks.shape == (found, columns) and len({tuple(r.argsort().tolist()) for r in ranks}) == found
    imputer = module.MarginalizerImputer(**SMALL).fit(table(60, 2))
    each, mixed = imputer.log_prob_by_order(table(60, 2), n_orders=7)
    assert each.shape == (2, 60) and np.allclose(np.exp(mixed), np.exp(each).mean(0))
    for wrong in (0, 1.5, None):
        refuses(lambda wrong=wrong: imputer.log_prob_by_order(table(60, 2), n_orders=wrong), ValueError, "n_orders")


def test_no_order_comes_twice():
    mutant_fails(marginalizer, check_orders, ("found.setdefault(tuple(rank.argsort().tolist()), rank)",
                                              "found[len(found)] = rank"))
    mutant_fails(marginalizer, check_orders, ("- math.log(len(orders))", "- math.log(n_orders)"))


def test_black_and_white_pictures_have_probabilities():
    x = (load_digits().images[:60, None] > 7.5).astype("float32")
    imputer = MarginalizerImputer(**SMALL, pixels="bernoulli").fit(x)
    assert (imputer.log_prob(x) < 0).all() and set(np.unique(imputer.sample(pictures(), 1))) == {0.0, 1.0}


def test_mixed_tables_keep_what_was_observed():
    holes = flowers()
    imputer = MarginalizerImputer(**SMALL).fit(holes)
    for filled in (imputer.transform(holes), *imputer.sample(holes, 2)):
        assert filled.dtypes.equals(holes.dtypes) and not filled.isna().any(axis=None)
        for column in holes:
            seen = holes[column].notna()
            assert filled.loc[seen, column].equals(holes.loc[seen, column])


def test_fills_beat_the_mean():
    x = table(400, 6)
    holes, hidden = with_holes(x), np.isnan(with_holes(x))
    filled = MarginalizerImputer(**(SMALL | {"max_epochs": 40})).fit(holes).transform(holes)
    means = np.broadcast_to(np.nanmean(holes, 0), x.shape)
    assert np.square(filled - x)[hidden].mean() < 0.7 * np.square(means - x)[hidden].mean()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own, words", [
    ({"hide_rate": 1.5}, "hide_rate=1.5"), ({"hide_rate": -0.1}, "hide_rate=-0.1"),
    ({"hide_rate": 0.0}, "hide_rate=0.0"), ({"pattern": ["line"]}, "pattern="),
    ({"pattern": "star"}, "line, half"),
    ({"pattern": "line"}, "is for images"), ({"weighting": "mean"}, "'sum' or 'chain'"),
    ({"pixels": "red"}, "'bernoulli'"),
    ({"hidden": 0}, "hidden"), ({"depth": -1}, "depth"), ({"n_orders": 0}, "n_orders"),
    ({"validation_fraction": 1.0}, "validation_fraction"),
])
def test_refusals(own, words):
    refuses(lambda: MarginalizerImputer(**(SMALL | own)).fit(table(40, 3)), ValueError, words)


def test_a_density_given_cells_of_another_shape_is_refused():
    imputer = MarginalizerImputer(**SMALL).fit(table(40, 3))
    refuses(lambda: imputer.log_prob(table(40, 3), np.ones((40, 2), dtype=bool)), ValueError, "mark every cell")


def test_an_unknown_category_is_named():
    holes = flowers()
    imputer = MarginalizerImputer(**SMALL).fit(holes)
    strange = holes.head(4).copy()
    strange.loc[strange.index[0], "kind"] = "orchid"
    with pytest.raises(ValueError, match="orchid"):
        imputer.transform(strange)


def test_one_column_constant_and_empty_columns():
    column = with_holes(50 + 5 * np.random.default_rng(0).normal(size=(200, 1)))
    made = MarginalizerImputer(**SMALL).fit(column).transform([[np.nan]])[0, 0]
    assert np.nanmin(column) <= made <= np.nanmax(column)
    holes = with_holes(np.c_[table(100, 3), np.full(100, 5.25)])
    imputer = MarginalizerImputer(**SMALL).fit(holes)
    assert np.abs(imputer.transform(holes)[:, -1] - 5.25).max() < 1 and np.isfinite(imputer.sample(holes, 2)).all()
    empty = pd.DataFrame(holes, columns=list("abcd")).assign(e=np.nan)
    filled = MarginalizerImputer(**SMALL).fit_transform(empty)
    assert filled["e"].isna().all() and not filled[list("abcd")].isna().any(axis=None)
    few = MarginalizerImputer(**SMALL).fit(np.array([[1.0, 2.0], [3.0, np.nan]]))
    assert np.isfinite(few.transform([[np.nan, 2.0]])).all()


def test_hardly_anything_seen_and_huge_values():
    sparse = with_holes(table(200, 5), 0.95)
    assert np.isfinite(MarginalizerImputer(**SMALL).fit(sparse).transform(sparse)).all()
    huge = with_holes(table() * 1e12 + 3e12)
    imputer = MarginalizerImputer(**SMALL).fit(huge)
    assert np.isfinite(imputer.transform(huge)).all() and np.isfinite(imputer.log_prob(huge)).all()
    wild = with_holes(table())
    wild[7] = 1e12
    assert np.isfinite(MarginalizerImputer(**SMALL).fit(wild).sample(wild, 1)).all()


def test_ordinary_use_warns_of_nothing(recwarn):
    """Mutation: patience is kept where nobody judges, and the run says that it had no effect."""
    MarginalizerImputer(**SMALL, validation_fraction=0.0).fit(with_holes(table(60, 3)))
    assert [w for w in recwarn if issubclass(w.category, RuntimeWarning)] == []
    kept = copy_of(marginalizer, ("run.stopping.patience if n_judge else None", "run.stopping.patience"))
    kept.MarginalizerImputer(**SMALL, validation_fraction=0.0).fit(with_holes(table(60, 3)))
    assert any("patience" in str(w.message) for w in recwarn)


def untied(n=300):
    """Columns that know nothing of one another: two numbers, a boolean, a category."""
    rng = np.random.default_rng(3)
    letters = pd.Categorical(rng.choice(list("xyz"), n, p=[0.5, 0.3, 0.2]))
    columns = {"a": rng.normal(size=n), "b": rng.exponential(size=n), "c": rng.random(n) < 0.3, "d": letters}
    return pd.DataFrame(columns).mask(rng.random((n, 4)) < 0.2)


@pytest.mark.parametrize("holes", [table(), untied(), flowers()], ids=["numbers", "untied", "mixed"])
def test_a_fit_that_learned_nothing_warns(holes):
    "Mutation: without the comparison a learning rate of 10 fills in nonsense and says nothing."
    with pytest.warns(RuntimeWarning, match="do not trust this fit"):
        MarginalizerImputer(**SMALL | {"max_epochs": 10}, learning_rate=10).fit(holes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MarginalizerImputer(**SMALL | {"max_epochs": 150}).fit(holes)


def test_pictures_that_teach_nothing_warn():
    x = np.where(np.random.default_rng(0).random((200, 1, 8, 8)) < 0.3, np.nan, load_digits().images[:200, None])
    with pytest.warns(RuntimeWarning, match="do not trust this fit"):
        MarginalizerImputer(**SMALL).fit(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MarginalizerImputer(**SMALL | {"max_epochs": 300, "hidden": 64}).fit(x)
