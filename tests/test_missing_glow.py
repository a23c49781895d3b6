"""Missing Glow: squares, their detector, temperature, completion, the choice of α, the estimator; mutations, all run.

A mutation is a copy of the module with one piece of its source replaced."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import mutant_fails, refuses, seed
from sklearn.datasets import load_digits, load_iris
from torch import nn

from missingbook.flows import missing_glow
from missingbook.flows.coupling import Flow, GaussianBase
from missingbook.flows.missing_glow import (
    MissingGlowImputer,
    add_squares,
    choose_alpha,
    complete,
    count_squares,
    detection_scores,
    draw_at,
    find_squares,
    grey_share,
    mean_and_interval,
    second_hole,
    shrink,
    shrink_until_clean,
    threshold_law,
    uncovered_pixels,
)
from missingbook.foundations.data import load
from missingbook.foundations.imputer import DeepImputer, check_no_peek

NAN = float("nan")
QUICK = dict(max_epochs=2, n_steps=2, hidden=8, n_rounds=2, random_state=0, verbose=False)


class Linear(nn.Module):
    """z = (x − mean) / scale, flat."""

    def __init__(self, shape, mean=0.3, scale=0.1):
        super().__init__()
        self.shape, self.mean, self.scale = shape, mean, scale

    def forward(self, x):
        log_det = -math.prod(self.shape) * math.log(self.scale)
        return (x.flatten(1) - self.mean) / self.scale, x.new_full((len(x),), log_det)

    def inverse(self, z):
        return (self.mean + self.scale * z).unflatten(1, self.shape), z.new_zeros(len(z))


def linear(shape=(1, 6, 6), **own):
    return Flow([Linear(shape, **own)], GaussianBase(math.prod(shape)))


def digits(n=60, rate=None, number=0):
    """(complete, with square holes or random ones), (n, 1, 8, 8), from 0 to 1."""
    x = torch.tensor(load_digits().images[:n, None], dtype=torch.float32) / 16
    if rate is None:
        observed = add_squares(x, 3, 1, 1.0, seed(number))[1][:, None]
    else:
        observed = torch.rand(x.shape, generator=seed(number)) >= rate
    return x.numpy(), torch.where(observed, x, NAN).numpy()


# --- squares ---------------------------------------------------------------------------------------------------------


def check_squares(module):
    x = torch.rand(50, 2, 9, 12, generator=seed()) * 0.3
    painted, observed, corners = module.add_squares(x, 4, 2, 0.5, seed(1))
    for k in range(50):
        expected = torch.ones(9, 12, dtype=torch.bool)
        for r, c in corners[k].tolist():
            expected[r : r + 4, c : c + 4] = False
        assert torch.equal(observed[k], expected)
        assert torch.equal(painted[k, :, ~expected], torch.full_like(painted[k, :, ~expected], 0.5))
    assert torch.equal(painted[observed[:, None].expand(x.shape)], x[observed[:, None].expand(x.shape)])
    assert corners[:, :, 0].unique().tolist() == list(range(6)) and corners[:, :, 1].unique().tolist() == list(range(9))


@pytest.mark.parametrize("before, after", [
    ("torch.stack([first // width, first % width], 1)", "torch.stack([first % width, first // width], 1)"),
    ("observed &= seen", "observed = seen"),
], ids=["row and column exchanged", "last square only"])
def test_squares(before, after):
    mutant_fails(missing_glow, check_squares, (before, after))


def test_no_square_and_the_same_seed():
    x = torch.rand(3, 1, 8, 8, generator=seed())
    painted, observed, corners = add_squares(x, 3, 0)
    assert torch.equal(painted, x) and observed.all() and corners.shape == (3, 0, 2)
    assert torch.equal(add_squares(x, 3, generator=seed(4))[0], add_squares(x, 3, generator=seed(4))[0])
    refuses(lambda: add_squares(x, 9), ValueError, "does not fit")
    for n_squares in (-2, 1.5, True):
        refuses(lambda n=n_squares: add_squares(x, 3, n), ValueError, "n_squares")


def strokes(n=400):
    """Digits of the MNIST sample at 16 × 16: strokes and no areas."""
    x = load("mnist-sample").x[:n].float() / 255
    return torch.nn.functional.pad(torch.nn.functional.avg_pool2d(x, 2), (1, 1, 1, 1))


def check_detector(module, size=5):
    """On strokes, with mid-grey squares and noise: precision and recall, by number of squares."""
    x = strokes()
    assert not module.count_squares(x, size).any()
    for noise in (0.0, 0.05):
        for k in range(1, 5):
            painted, _, corners = add_squares(x, size, k, 0.5, seed(k))
            noisy = painted + noise * torch.randn(x.shape, generator=seed(9))
            found = module.find_squares(noisy, size)
            precision, recall = detection_scores(found, corners, size)
            assert precision >= 0.98 and recall >= 0.98, (noise, k, precision, recall)
            assert torch.equal(module.count_squares(noisy, size), found.flatten(1).sum(1))


@pytest.mark.parametrize("before, after", [
    ("left = left * (1 - F.max_pool2d", "left = left * (1 - 0 * F.max_pool2d"),
    ("quota: float = 0.9", "quota: float = 0.5"),
    ("tolerance: float = 0.2, quota", "tolerance: float = 0.04, quota"),
    ("torch.where(share >= quota - 1e-6, gain, 0.0)", "torch.where(share >= quota - 1e-6, share, 0.0)"),
], ids=["nothing is explained", "half a square will do", "noise is forgotten", "no gain asked for"])
def test_the_detector(before, after):
    mutant_fails(missing_glow, check_detector, (before, after))


def test_the_detector_takes_all_channels_and_no_edge():
    grey = torch.full((1, 3, 8, 8), 0.5)
    assert count_squares(grey, 8).tolist() == [1] and count_squares(grey, 4).tolist() == [4]
    tinted = grey.clone()
    tinted[:, 2] = 0.9
    assert count_squares(tinted, 4).tolist() == [0]
    line = torch.zeros(1, 1, 8, 8)
    line[:, :, 3:5] = 0.5  # an edge, two pixels wide
    assert count_squares(line, 3).tolist() == [0] and grey_share(line, 2)[0, 3].min() == 1
    none = torch.zeros(0, 1, 8, 8)
    assert find_squares(none, 3).shape == (0, 6, 6) and count_squares(none, 3).shape == (0,)
    for size in (0, 9, 2.5, True):
        refuses(lambda size=size: find_squares(grey, size), ValueError, "size=")


def check_most(module):
    """A white picture is full of squares; the count ends at max_squares, 12."""
    white = torch.ones(1, 1, 12, 12)
    assert module.count_squares(white, 2, grey=1.0).tolist() == [12]
    assert module.find_squares(white, 2, grey=1.0, max_squares=40).sum() == 36


def test_the_count_ends_at_max_squares():
    mutant_fails(missing_glow, check_most, ("max_squares: int = 12", "max_squares: int = 50"))


def test_two_squares_a_pixel_apart_and_one_that_is_hidden():
    x = torch.zeros(1, 1, 12, 12)
    corners = torch.tensor([[[2, 2], [2, 3], [2, 4]]])
    for r, c in corners[0].tolist():
        x[:, :, r : r + 5, c : c + 5] = 0.5
    assert uncovered_pixels(corners, 5).tolist() == [[5, 0, 5]]
    found = find_squares(x, 5)
    assert found.nonzero()[:, 1:].tolist() == [[2, 2], [2, 4]] and detection_scores(found, corners, 5) == (1.0, 1.0)
    nothing = torch.zeros_like(found)
    assert detection_scores(nothing, corners, 5)[1] == 0 and math.isnan(detection_scores(nothing, corners, 5)[0])
    precision, recall = detection_scores(found, corners[:, :0], 5)
    assert math.isnan(recall) and precision == 0


# --- temperature -----------------------------------------------------------------------------------------------------


def check_temperature(module):
    """N(μ, σ²) becomes N(μ, t²σ²), of the same latent draws."""
    flow = linear(mean=0.5, scale=0.05)
    draws = module.draw_at(flow, [0.5, 1.0, 1.5], 2000, seed(3))
    for t, x in zip((0.5, 1.0, 1.5), draws, strict=True):
        assert abs(x.std().item() - 0.05 * t) < 0.001 and abs(x.mean().item() - 0.5) < 0.001
    torch.testing.assert_close(draws[2] - 0.5, 3 * (draws[0] - 0.5), rtol=1e-4, atol=1e-4)


def test_temperature():
    mutant_fails(missing_glow, check_temperature, ("flow.inverse(t * rows)", "flow.inverse(t**2 * rows)"))
    for t in (0.0, -1.0, NAN, math.inf):
        refuses(lambda t=t: draw_at(linear(), [1.0, t], 3), ValueError, "temperatures")
    refuses(lambda: draw_at(linear(), [], 3), ValueError, "give 1 or more")
    for n in (0, 2.5, True):
        refuses(lambda n=n: draw_at(linear(), [1.0], n), ValueError, "n=")


def check_interval(module):
    counts = torch.distributions.Poisson(0.7).sample((300, 400)).long()
    mean, half = module.mean_and_interval(counts)
    covered = ((mean - 0.7).abs() <= half).double().mean().item()
    assert 0.91 < covered < 0.98


def test_the_interval_covers():
    torch.manual_seed(0)
    mutant_fails(missing_glow, check_interval, ("counts.shape[1] ** 0.5", "counts.shape[1]"))


def check_law(module):
    """The law against simulated thresholds, and its parameters found again."""
    t = torch.linspace(0.1, 1.5, 15, dtype=torch.float64)
    z = torch.randn(40_000, 3, generator=seed(), dtype=torch.float64)
    simulated = torch.stack([((s * z).abs() > 1.2).double().sum(1).mean() for s in t])
    assert (module.threshold_law(t, 3.0, 1.2) - simulated).abs().max() < 0.03
    height, c = module.fit_threshold_law(t, threshold_law(t, 2.5, 1.3))
    assert abs(height - 2.5) < 1e-6 and abs(c - 1.3) < 1e-9


@pytest.mark.parametrize("before, after", [
    ("return 2 * height * torch", "return height * torch"),
    ("torch.special.ndtr(-c / t)", "torch.special.ndtr(-c * t)"),
], ids=["one side", "t turned over"])
def test_the_threshold_law(before, after):
    mutant_fails(missing_glow, check_law, (before, after))


def test_an_event_of_probability_one_at_every_temperature_and_the_bound():
    """eq-missing-glow-exact and eq-missing-glow-bound, for a ball in d dimensions."""
    d, radius = 256, torch.tensor(13.0).double()
    half = torch.tensor(d / 2).double()
    inside = {t: torch.special.gammainc(half, radius**2 / t**2 / 2).item() for t in (0.5, 0.7, 0.9, 1.0)}
    assert inside[1.0] < 1e-5 and inside[0.7] > 0.99
    assert all(p <= t**-d * inside[1.0] for t, p in inside.items())


# --- completion ------------------------------------------------------------------------------------------------------


def check_linear(module):
    """eq-missing-glow-shrink and eq-missing-glow-linear: what a linear flow does, in closed form."""
    flow, x = linear(), torch.rand(40, 1, 6, 6, generator=seed())
    observed = add_squares(x, 2, 1, 1.0, seed(1))[1][:, None]
    torch.testing.assert_close(module.shrink(flow, x, 0.5), 0.3 + 0.5 * (x - 0.3), atol=1e-5, rtol=0)
    for rounds in (1, 3):
        expected = torch.where(observed, x, 0.3 + 0.5**rounds * (0.9 - 0.3))
        got = module.complete(flow, x, observed, 0.5, rounds, 0.9)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert torch.equal(got[observed], x[observed])
    for match in (False, True):
        assert torch.equal(module.complete(flow, torch.where(observed, x, 7.0), observed, 0.5, 2, 0.9, match),
                           module.complete(flow, x, observed, 0.5, 2, 0.9, match))


def check_match(module):
    """eq-missing-glow-match: a linear flow's decoded picture is moved by its mean gap at observed pixels."""
    x = 0.3 + 0.4 * torch.rand(40, 1, 6, 6, generator=seed())
    observed = add_squares(x, 2, 1, 1.0, seed(1))[1][:, None]
    got = module.complete(linear(), x, observed, 0.5, 1, 0.9, True)
    for picture, seen, made in zip(x, observed, got, strict=True):
        decoded = 0.3 + 0.5 * (torch.where(seen, picture, 0.9) - 0.3)
        moved = decoded + (picture - decoded)[seen].mean()
        torch.testing.assert_close(made, torch.where(seen, picture, moved.clamp(0, 1)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("before, after", [
    ("torch.where(observed, x - decoded, 0.0)", "(made - decoded)"), ("(decoded + gap).clamp", "(decoded - gap).clamp"),
], ids=["the hole counts as well", "wrong way"])
def test_the_brightness_is_that_of_the_observed_pixels(before, after):
    mutant_fails(missing_glow, check_match, (before, after))


@pytest.mark.parametrize("before, after", [
    ("flow.inverse(alpha * flow(rows)[0])", "flow.inverse(flow(alpha * rows)[0])"),
    ("made = torch.where(observed, x, decoded)", "made = decoded"),
    ("torch.where(observed, x, grey), observed.sum", "x, observed.sum"),
], ids=["picture scaled, not z", "observed pixels fade", "looks into the hole"])
def test_a_linear_flow_in_closed_form(before, after):
    mutant_fails(missing_glow, check_linear, (before, after))


@pytest.mark.parametrize("alpha", [0.0, -0.5, 1.01, NAN, True, "auto"])
def test_alpha_has_limits(alpha):
    refuses(lambda: shrink(linear(), torch.rand(2, 1, 6, 6), alpha), ValueError, "alpha=")


def test_match_is_true_or_false():
    x, holes = torch.rand(2, 1, 6, 6), digits(20)[1]
    refuses(lambda: complete(linear(), x, x > 0.5, 0.5, match="no"), ValueError, "match='no'")
    imputer = MissingGlowImputer(**QUICK).fit(holes).set_params(match="no")
    refuses(lambda: imputer.transform(holes), ValueError, "match='no'")


def check_choice(module):
    """With a linear flow at mean 0.3 and holes at 0.9, pixels of 0.6 ask for α = 0.5; nothing behind a hole is seen."""
    x = torch.full((30, 1, 6, 6), 0.6)
    observed = add_squares(x, 2, 1, 1.0, seed(2))[1][:, None]
    junk = torch.where(observed, x, torch.rand(x.shape, generator=seed(3)))
    results = [module.choose_alpha(linear(), y, observed, n_rounds=1, grey=0.9, generator=seed(4)) for y in (x, junk)]
    assert results[0][0] == 0.5 and results[0] == results[1] and results[0][1][4] < 1e-5
    assert len(results[0][1]) == 9 and abs(results[0][1][8] - 0.24) < 1e-5  # α = 0.9; 1 is no candidate


@pytest.mark.parametrize("before, after", [
    ("alphas[min(range", "alphas[max(range"),
    ("(m - x)[heldout].square()", "(m - x)[~heldout].square()"),
    ("observed & ~heldout, a, n_rounds", "observed, a, n_rounds"),
], ids=["the worst", "error elsewhere", "second hole not painted"])
def test_the_choice_of_alpha(before, after):
    mutant_fails(missing_glow, check_choice, (before, after))


def test_second_holes():
    observed = add_squares(torch.zeros(200, 1, 8, 8), 3, 1, 1.0, seed())[1][:, None]
    heldout = second_hole(observed, seed(1))
    assert not (heldout & ~observed).any() and 0 < heldout.flatten(1).sum(1).double().mean() <= 9
    x = torch.rand(5, 1, 8, 8)
    for seen in (torch.ones(5, 1, 8, 8, dtype=torch.bool), observed[:1].expand(5, -1, -1, -1)):
        refuses(lambda seen=seen: choose_alpha(linear((1, 8, 8)), x, seen), ValueError, "no second hole")


def test_shrink_until_clean():
    x = torch.full((4, 1, 8, 8), 0.3)
    painted = x.clone()
    painted[:2, :, 2:5, 2:5] = 0.95
    made, alpha = shrink_until_clean(linear((1, 8, 8)), painted, 3, grey=1.0)
    assert torch.equal(made[2:], x[2:]) and alpha[2:].tolist() == [1, 1]  # clean pictures stay
    assert not count_squares(made, 3, grey=1.0).any() and alpha[:2].tolist() == [pytest.approx(0.7)] * 2


# --- the estimator ---------------------------------------------------------------------------------------------------


def test_observed_pixels_stay_and_holes_are_filled():
    x, holes = digits()
    imputer = MissingGlowImputer(**QUICK).fit(holes)
    filled = imputer.transform(holes)
    seen = ~np.isnan(holes)
    assert np.array_equal(filled[seen], holes[seen]) and np.isfinite(filled).all() and filled.dtype == holes.dtype
    assert 0.1 <= imputer.network_.alpha.item() <= 1 and not hasattr(imputer, "sample")
    assert np.array_equal(MissingGlowImputer(**QUICK).fit_transform(holes), filled)


@pytest.mark.parametrize("rate", [None, 0.5], ids=["squares", "single pixels"])
def test_no_peek(rate):
    check_no_peek(MissingGlowImputer(**QUICK), digits(40, rate)[1])


def test_no_peek_finds_a_flow_that_is_shown_the_truth():
    """Mutation: holes are not painted."""

    class Peeks(MissingGlowImputer):
        def _build(self):
            network = super()._build()
            network.paint = lambda x, observed: (x * 32).floor().clamp(0, 31)
            return network

    with pytest.raises(AssertionError, match="depends on what stands behind"):
        check_no_peek(Peeks(**QUICK), digits(40)[1])


def test_save_and_load_keep_alpha(tmp_path):
    holes = digits()[1]
    imputer = MissingGlowImputer(**QUICK, alpha=0.35).fit(holes)
    imputer.save(tmp_path / "flow")
    loaded = DeepImputer.load(tmp_path / "flow", device="cpu")
    assert isinstance(loaded, MissingGlowImputer) and loaded.network_.alpha.item() == pytest.approx(0.35)
    assert np.array_equal(loaded.transform(holes), imputer.transform(holes))


def check_candidates(module):
    """Holes as grey as the truth: α = 1 would err least at the second hole, and is no candidate."""
    flat = np.full((20, 1, 8, 8), 0.3, "float32")
    flat[:, :, 0, 0], flat[:, :, 7, 7] = 0, 1
    for k in range(20):
        flat[k, :, 2 + k % 3 : 4 + k % 3, 2:4] = NAN
    assert module.MissingGlowImputer(**QUICK | dict(match=False), grey=0.3).fit(flat).network_.alpha.item() < 0.95


def test_auto_never_chooses_no_change():
    mutant_fails(missing_glow, check_candidates, ("few, seen, ALPHAS[:-1], self", "few, seen, ALPHAS, self"))


def test_a_parameter_of_the_fit_does_nothing_before_the_next_one():
    """As the docstring says: alpha, grey, n_bits and coupling act at fit, n_rounds and match at once."""
    holes = digits(30)[1]
    imputer = MissingGlowImputer(**QUICK, alpha=0.5).fit(holes)
    before = imputer.transform(holes)
    imputer.set_params(alpha=0.9, grey=1.0, n_bits=3, coupling="additive")
    assert np.array_equal(imputer.transform(holes), before)
    assert not np.array_equal(imputer.set_params(n_rounds=5).transform(holes), before)


def test_restore():
    x, holes = digits()
    grey = np.where(np.isnan(holes), np.float32(1), x)
    imputer = MissingGlowImputer(**QUICK, grey=1.0).fit(holes)
    made, half = imputer.restore(grey), imputer.restore(255 * grey / 255, alpha=0.5)
    assert made.shape == x.shape and np.isfinite(made).all() and not np.array_equal(made, half)
    one = imputer.restore(grey, alpha=1.0)
    assert np.abs(one - grey).max() < 0.05  # up to the levels: α = 1 changes nothing
    clean = imputer.restore(grey, size=3)
    assert np.isfinite(clean).all() and clean.min() >= 0 and clean.max() <= 1
    with pytest.raises(ValueError, match="transform"):
        imputer.restore(holes)
    with pytest.raises(ValueError, match="alpha="):
        imputer.restore(grey, alpha=1.5)
    for own, words in ((dict(size=9), "size=9"), (dict(size=2.5), "size=2.5"), (dict(size=True), "size=True"),
                       (dict(alpha="auto"), "alpha='auto'"), (dict(alpha=True), "alpha=True"),
                       (dict(size=3, alpha=0.5), "not both")):
        with pytest.raises(ValueError, match=words):
            imputer.restore(grey, **own)
    no_square = imputer.restore(x, size=3)  # pictures without a square are rounded to levels, no more
    clean_already = ~count_squares(torch.tensor(x), 3, grey=1.0).bool().numpy()
    assert clean_already.any() and 0 < np.abs(no_square - x)[clean_already].max() <= 0.5 / 32 + 1e-6


def test_grey_levels_from_0_to_255():
    holes = digits()[1]
    a = MissingGlowImputer(**QUICK).fit(holes).transform(holes)
    b = MissingGlowImputer(**QUICK).fit(255 * holes).transform(255 * holes)
    np.testing.assert_allclose(255 * a, b, rtol=1e-3, atol=0.6)


def test_colour_and_sides_that_are_not_equal():
    x = np.random.default_rng(0).random((20, 3, 4, 8)).astype("float32")
    x[:, :, 1:3, 2:5] = NAN
    filled = MissingGlowImputer(**QUICK).fit_transform(x)
    assert np.isfinite(filled).all()  # one hole in all of them: no second one, α is 0.6
    assert MissingGlowImputer(**QUICK).fit(x).network_.alpha.item() == pytest.approx(0.6)


@pytest.mark.parametrize("X", [digits(1)[1], np.full((6, 1, 8, 8), 0.5, "float32"), digits(20)[0]],
                         ids=["one picture", "constant", "no hole"])
def test_little_to_learn_from(X):
    imputer = MissingGlowImputer(**QUICK).fit(X)
    assert np.isfinite(imputer.transform(X)).all()


def test_a_constant_picture_with_a_hole_comes_back_constant():
    X = np.full((12, 1, 8, 8), 0.5, "float32")
    X[:6, :, 2:5, 2:5] = NAN
    assert (MissingGlowImputer(**QUICK).fit_transform(X) == 0.5).all()


@pytest.mark.parametrize("shape, own, words", [
    ((4, 1, 7, 8), {}, "pad or crop"), ((4, 1, 12, 12), dict(n_levels=3), "squeezed|halved"), ((4, 8, 8), {}, "axes"),
    ((4, 5), {}, "takes pictures"),
])
def test_shapes_that_do_not_fit(shape, own, words):
    with pytest.raises(ValueError, match=words):
        MissingGlowImputer(**QUICK, **own).fit(np.random.default_rng(0).random(shape))


def test_tables_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match="EMFlowImputer"):
        MissingGlowImputer(**QUICK).fit(load_iris().data)


@pytest.mark.parametrize("own, words", [
    (dict(alpha=0), "alpha=0"), (dict(alpha=1.2), "alpha=1.2"), (dict(alpha="best"), "alpha='best'"),
    (dict(alpha=NAN), "alpha"), (dict(match="no"), "match='no'"), (dict(match=1), "match=1"),
    (dict(alpha=True), "alpha=True"), (dict(alpha=None), "alpha=None"), (dict(coupling="linear"), "coupling"),
    (dict(n_bits=0), "n_bits"), (dict(n_bits=9), "n_bits"), (dict(n_rounds=0), "n_rounds"), (dict(grey=1.5), "grey"),
    (dict(hidden=0), "hidden"), (dict(n_steps=1.5), "n_steps"), (dict(n_levels=0), "n_levels"),
], ids=str)
def test_refusals(own, words):
    with pytest.raises(ValueError, match=words):
        MissingGlowImputer(**QUICK | own).fit(digits(20)[1])


# --- the phenomenon --------------------------------------------------------------------------------------------------


def test_mean_and_interval_of_equal_counts():
    mean, half = mean_and_interval(torch.full((2, 10), 3))
    assert mean.tolist() == [3, 3] and half.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["affine-5-0", "affine-5-1", "affine-5-2", "additive-5-0", "realnvp-5-0"])
def test_the_measured_flows_show_it(root, name):
    """At temperature 0.5 at most half as many squares as at 1; the number rises; 2,000 draws each."""
    facts = json.loads((root / "results" / "missing_glow" / f"{name}.json").read_text(encoding="utf-8"))
    counts = [torch.arange(len(h)).repeat_interleave(torch.tensor(h)) for h in facts["histogram"]]
    assert all(len(c) >= 2000 for c in counts)
    mean = dict(zip(facts["temperatures"], [c.double().mean().item() for c in counts], strict=True))
    assert mean[0.5] <= mean[1.0] / 2 and list(mean.values()) == pytest.approx(sorted(mean.values()), abs=0.02)
    rows = {r["alpha"]: r for r in facts["test"]["by_alpha"]}
    assert rows[1.0]["outside"] < 1e-3 and rows[0.1]["outside"] > rows[0.5]["outside"] > rows[0.9]["outside"]
