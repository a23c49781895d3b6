"""Properties of the missing-data patterns, and the mutations that they must catch.

Each property is a plain function `property(make, ...)` that fails by assertion. Hypothesis runs it on the package's
function; the mutation tests run it on a broken one and expect the failure.
"""

import inspect
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from missingbook.foundations import masks
from missingbook.foundations.masks import (
    FACE_PARTS,
    centre_hidden,
    co_observation,
    face_part_hidden,
    grey_square,
    half_hidden,
    independent_dropout,
    line_observed,
    masking_operator,
    pattern_hidden,
    quadrant_observed,
    rectangle_hidden,
    rectangle_observed,
    square_observed,
)

quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)
counts = st.integers(0, 6)
lengths = st.integers(2, 40)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_kind(observed: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert observed.dtype == torch.bool and tuple(observed.shape) == shape and observed.device.type == "cpu"


def box(region: torch.Tensor) -> tuple[int, int, int, int]:
    "Top, left, height, width of one picture's region, which must be a filled rectangle."
    rows, columns = region.any(1).nonzero()[:, 0], region.any(0).nonzero()[:, 0]
    assert len(rows) and len(columns), "the region is empty"
    top, left, height, width = rows[0].item(), columns[0].item(), len(rows), len(columns)
    assert rows[-1] == top + height - 1 and columns[-1] == left + width - 1, "the region has a gap"
    assert region[top : top + height, left : left + width].all(), "the region is no rectangle"
    return top, left, height, width


# --- properties ---------------------------------------------------------------------------------------------


def square_is_seen(make, shape, side, seed):
    observed = make(shape, side, seeded(seed))
    check_kind(observed, shape)
    assert all(box(picture)[2:] == (side, side) for picture in observed)


def square_is_hidden(make, shape, side, seed):
    observed = make(shape, side, seeded(seed))
    check_kind(observed, shape)
    assert all(box(~picture)[2:] == (side, side) for picture in observed)


def line_is_seen(make, shape, thickness, seed):
    observed = make(shape, thickness, seeded(seed))
    check_kind(observed, shape)
    assert all(box(picture)[1:] == (0, thickness, shape[2]) for picture in observed)


def rectangle_is_seen(make, shape, low, high, seed):
    observed = make(shape, low, high, seeded(seed))
    check_kind(observed, shape)
    for picture in observed:
        for side, length in zip(box(picture)[2:], shape[1:], strict=True):
            assert max(1, low * length - 1e-6) <= side <= high * length + 1e-6


def rectangle_is_hidden(make, shape, min_area, seed):
    observed = make(shape, min_area, seeded(seed))
    check_kind(observed, shape)
    for picture in observed:
        _, _, height, width = box(~picture)
        assert height * width >= min_area * shape[1] * shape[2] - 1e-6


def quadrant_is_seen(make, shape, seed):
    observed = make(shape, seeded(seed))
    check_kind(observed, shape)
    half = [(length // 2, length - length // 2) for length in shape[1:]]
    for picture in observed:
        top, left, height, width = box(picture)
        assert (top, height) in ((0, half[0][0]), half[0]) and (left, width) in ((0, half[1][0]), half[1])


def half_is_hidden(make, shape, seed):
    observed = make(shape, seeded(seed))
    check_kind(observed, shape)
    for picture in observed:
        top, left, height, width = box(~picture)
        cut = [length // 2 for length in shape[1:]]
        rows = (left, width) == (0, shape[2]) and (top, height) in ((0, cut[0]), (cut[0], shape[1] - cut[0]))
        columns = (top, height) == (0, shape[1]) and (left, width) in ((0, cut[1]), (cut[1], shape[2] - cut[1]))
        assert rows or columns


def centre_is_hidden(make, shape):
    observed = make(shape)
    check_kind(observed, shape)
    for picture in observed:
        top, left, height, width = box(~picture)
        assert (height, width) == (shape[1] // 2, shape[2] // 2)
        assert abs(2 * top + height - shape[1]) <= 1 and abs(2 * left + width - shape[2]) <= 1


def face_part_is_hidden(make, shape, part):
    observed = make(shape, part)
    check_kind(observed, shape)
    first, end, left, right = FACE_PARTS[part]
    for picture in observed:
        found = box(~picture)
        wanted = (first, left, end - first, right - left)
        for got, want, length in zip(found, wanted, (shape[1], shape[2]) * 2, strict=True):
            assert abs(got - want * length / 128) <= 1


def blobs_are_hidden(make, shape, seed):
    observed = make(shape, seeded(seed))
    check_kind(observed, shape)
    rates = (~observed).double().mean((1, 2))
    assert ((rates >= 0.2 - 1e-9) & (rates <= 0.3 + 1e-9)).all()


def dropout_has_its_rate(make, shape, rate, seed):
    observed = make(shape, rate, seeded(seed))
    check_kind(observed, shape)
    if rate in (0, 1):
        assert (~observed).all() if rate else observed.all()
    elif observed.numel():
        error = math.sqrt(rate * (1 - rate) / observed.numel())
        assert abs((~observed).double().mean().item() - rate) < 6 * error + 2 / observed.numel()


def operator_keeps_what_was_seen(operate, shape, tau, seed):
    x = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
    observed = torch.rand(shape, generator=seeded(seed + 1)) < 0.5
    observed[0], observed[-1] = True, False
    masked = operate(x, observed, tau)
    assert torch.equal(masked[observed], x[observed]) and (masked[~observed] == tau).all()
    assert torch.equal(operate(masked, observed, tau), masked)
    for junk in (torch.nan, torch.inf, 1e30):
        assert torch.equal(operate(torch.where(observed, x, junk), observed, tau), masked)
    leaf = torch.where(observed, x, torch.nan).requires_grad_()
    operate(leaf, observed, tau).sum().backward()
    assert torch.equal(leaf.grad, observed.double())


def every_place_occurs(make, shape, *arguments):
    "Every row and every column is seen in some masks and missing in others: no place is left out by an off-by-one."
    observed = make(shape, *arguments, seeded(0))
    for region in (observed, ~observed):
        assert region.any(0).all()


def pairs_are_counted(count, observed):
    "Against two loops over the offsets."
    n, height, width = observed.shape
    found = count(observed)
    assert found.shape == (height, width) and found.dtype == torch.float64
    for i in range(height):
        for j in range(width):
            down = observed[:, : height - i, : width - j] & observed[:, i:, j:]
            up = observed[:, i:, : width - j] & observed[:, : height - i, j:]
            assert abs(found[i, j].item() - (down.double().mean() + up.double().mean()).item() / 2) < 1e-9


# --- hypothesis ---------------------------------------------------------------------------------------------


@quick
@given(counts, lengths, lengths, st.data(), seeds)
def test_squares(n, height, width, data, seed):
    side = data.draw(st.integers(1, min(height, width)))
    square_is_seen(square_observed, (n, height, width), side, seed)
    square_is_hidden(grey_square, (n, height, width), side, seed)
    line_is_seen(line_observed, (n, height, width), data.draw(st.integers(1, height)), seed)


@quick
@given(counts, lengths, lengths, seeds)
def test_quadrant_half_centre(n, height, width, seed):
    quadrant_is_seen(quadrant_observed, (n, height, width), seed)
    half_is_hidden(half_hidden, (n, height, width), seed)
    centre_is_hidden(centre_hidden, (n, height, width))


@quick
@given(counts, lengths, lengths, st.floats(0, 0.4), st.floats(0.6, 1), seeds)
def test_rectangle_observed(n, height, width, low, high, seed):
    rectangle_is_seen(rectangle_observed, (n, height, width), low, high, seed)


@quick
@given(counts, lengths, lengths, st.floats(0, 1), seeds)
def test_rectangle_hidden(n, height, width, min_area, seed):
    rectangle_is_hidden(rectangle_hidden, (n, height, width), min_area, seed)


@quick
@given(st.integers(1, 4), st.integers(8, 160), st.integers(8, 160), st.sampled_from(sorted(FACE_PARTS)))
def test_face_parts(n, height, width, part):
    face_part_is_hidden(face_part_hidden, (n, height, width), part)


@settings(quick, max_examples=15)
@given(counts, st.integers(16, 64), st.integers(16, 64), seeds)
def test_pattern(n, height, width, seed):
    blobs_are_hidden(pattern_hidden, (n, height, width), seed)


@quick
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.sampled_from([0, 0.0, 0.1, 0.5, 0.9, 1, 1.0]), seeds)
def test_dropout(shape, rate, seed):
    dropout_has_its_rate(independent_dropout, tuple(shape), rate, seed)


@quick
@given(st.integers(2, 4), st.integers(1, 9), st.sampled_from([0.0, -1.0, 0.5, 3]), st.integers(0, 2**31))
def test_masking_operator(n, width, tau, seed):
    operator_keeps_what_was_seen(masking_operator, (n, width), tau, seed)


@quick
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.floats(0, 1), seeds)
def test_co_observation(n, height, width, rate, seed):
    pairs_are_counted(co_observation, independent_dropout((n, height, width), rate, seeded(seed)))


def test_relaxed_masks_blend_and_pass_gradients():
    x = torch.randn(3, 4, dtype=torch.float64, generator=seeded(0))
    soft = torch.rand(3, 4, dtype=torch.float64, generator=seeded(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: masking_operator(x, m, 0.3), soft)
    assert torch.equal(masking_operator(x, torch.ones_like(x), 0.3), x)


def test_masks_broadcast_over_channels():
    x = torch.randn(2, 3, 5, 5, generator=seeded(0))
    observed = square_observed((2, 5, 5), 2, seeded(1))
    masked = masking_operator(x, observed[:, None])
    assert torch.equal(masked, x * observed[:, None]) and masked.shape == x.shape


# --- randomness ---------------------------------------------------------------------------------------------

RANDOM = {
    "independent_dropout": lambda g: independent_dropout((64, 28, 28), 0.5, g),
    "square_observed": lambda g: square_observed((64, 28, 28), 9, g),
    "rectangle_observed": lambda g: rectangle_observed((64, 28, 28), generator=g),
    "quadrant_observed": lambda g: quadrant_observed((64, 28, 28), g),
    "line_observed": lambda g: line_observed((64, 28, 28), generator=g),
    "rectangle_hidden": lambda g: rectangle_hidden((64, 28, 28), generator=g),
    "half_hidden": lambda g: half_hidden((64, 28, 28), g),
    "pattern_hidden": lambda g: pattern_hidden((64, 28, 28), g),
    "grey_square": lambda g: grey_square((64, 28, 28), 5, g),
}


def test_every_random_pattern_is_listed():
    functions = {name: getattr(masks, name) for name in masks.__all__ if callable(getattr(masks, name))}
    assert {name for name, f in functions.items() if "generator" in inspect.signature(f).parameters} == set(RANDOM)


@pytest.mark.parametrize("name", RANDOM)
def test_deterministic_given_the_generator(name):
    before = torch.get_rng_state()
    first, again, other = (RANDOM[name](seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before), "a pattern with a generator must not touch the global one"
    generator = seeded(3)
    RANDOM[name](generator)
    assert not torch.equal(RANDOM[name](generator), first), "the generator must move on"
    torch.manual_seed(5)
    unseeded = RANDOM[name](None)
    torch.manual_seed(5)
    assert torch.equal(RANDOM[name](None), unseeded)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", RANDOM)
def test_masks_lie_on_the_generators_device(name):
    first, again = (RANDOM[name](torch.Generator("cuda").manual_seed(3)) for _ in range(2))
    assert first.is_cuda and torch.equal(first, again)
    expected = RANDOM[name](seeded(4)).double().mean().item()
    assert abs(first.double().mean().item() - expected) < 0.15


def test_places_are_all_used():
    every_place_occurs(square_observed, (3000, 12, 9), 2)
    every_place_occurs(line_observed, (500, 12, 9), 1)
    every_place_occurs(grey_square, (3000, 12, 9), 2)
    every_place_occurs(quadrant_observed, (100, 7, 9))


# --- errors at the door -------------------------------------------------------------------------------------

REFUSED = {
    "square too large": (lambda: square_observed((1, 28, 28), 29), "side=29"),
    "square of nothing": (lambda: square_observed((1, 28, 28), 0), "side=0"),
    "grey square too large": (lambda: grey_square((1, 20, 64), 21), "choose 1 to 20"),
    "line too thick": (lambda: line_observed((1, 2, 28)), "thickness=3"),
    "rate above one": (lambda: independent_dropout((3, 3), 1.01), "missing_rate=1.01"),
    "rate below zero": (lambda: independent_dropout((3, 3), -0.01), "missing_rate=-0.01"),
    "rate NaN": (lambda: independent_dropout((3, 3), math.nan), "missing_rate=nan"),
    "low above high": (lambda: rectangle_observed((1, 9, 9), 0.7, 0.3), "swap"),
    "high above one": (lambda: rectangle_observed((1, 9, 9), 0.7, 1.3), "high=1.3"),
    "no pixel between": (lambda: rectangle_observed((1, 5, 5), 0.45, 0.55), "widen"),
    "area above one": (lambda: rectangle_hidden((1, 9, 9), 1.5), "min_area=1.5"),
    "one-pixel quadrant": (lambda: quadrant_observed((1, 1, 5)), "at least 2"),
    "one-pixel half": (lambda: half_hidden((1, 5, 1)), "at least 2"),
    "one-pixel centre": (lambda: centre_hidden((1, 1, 1)), "at least 2"),
    "two axes": (lambda: square_observed((28, 28), 3), "(n, height, width)"),
    "unknown part": (lambda: face_part_hidden((1, 64, 64), "O7"), "O1, O2"),
    "pattern without pixels": (lambda: pattern_hidden((1, 1, 1)), "widen"),
    "resolution of nothing": (lambda: pattern_hidden((1, 64, 64), resolution=0.0), "resolution"),
    "mask without channels": (lambda: masking_operator(torch.ones(3, 3, 5, 5), torch.ones(3, 5, 5) > 0), "[:, None]"),
    "relaxed mask above one": (lambda: masking_operator(torch.ones(3), 2 * torch.ones(3)), "[0, 1]"),
    "relaxed mask NaN": (lambda: masking_operator(torch.ones(3), torch.full((3,), math.nan)), "[0, 1]"),
    "no masks": (lambda: co_observation(torch.ones(0, 3, 3) > 0), "at least one"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_value_and_remedy(name):
    call, words = REFUSED[name]
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


def test_integer_masks_are_refused():
    with pytest.raises(TypeError):
        masking_operator(torch.ones(3), torch.ones(3, dtype=torch.uint8))


UNTYPED = """
import torch
from missingbook.foundations.masks import co_observation, line_observed, masking_operator, square_observed

x, shape = torch.ones(1, 5, 5), (1, 5, 5)
for call, words in (
    (lambda: square_observed(shape, 2.5), "side=2.5 does not fit"),
    (lambda: line_observed(shape, 2.5), "thickness=2.5 does not fit"),
    (lambda: masking_operator(x, torch.ones(4, 5, 5) > 0), "does not fit x"),
    (lambda: masking_operator(x, torch.ones(1, 4, 5)), "does not fit x"),
    (lambda: co_observation(torch.ones(3, 3) > 0), "boolean"),
    (lambda: co_observation(torch.ones(1, 3, 3)), "boolean"),
):
    try:
        call()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
"""


def test_the_doors_hold_without_a_type_checker(root):
    "A user's process checks no annotations: half a pixel, or a mask larger than x, must still be refused."
    result = subprocess.run([sys.executable, "-c", UNTYPED], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("part", FACE_PARTS)
@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_face_parts_hide_something_however_small(part, side):
    assert not face_part_hidden((1, side, side), part).all()


def test_a_whole_data_set_of_pattern_masks():
    "No fixed number of rounds: CelebA needs 160 000 masks, more than 400 rounds of 1024 proposals give at 1 in 8."
    one_in_eight = lambda candidates: torch.arange(len(candidates)) % 8 == 0  # noqa: E731
    made = masks._draw_until(160_000, lambda count: torch.ones(count, 1, 1) > 0, one_in_eight)
    assert len(made) == 160_000


def test_a_picture_with_more_sizes_than_multinomial_takes():
    rectangle_is_hidden(rectangle_hidden, (1, 4100, 4100), 0.25, 0)


def test_a_pattern_that_is_never_accepted_says_so():
    with pytest.raises(RuntimeError, match="0 of 2 masks were accepted"):
        pattern_hidden((2, 16, 16), seeded(0), threshold=0.0, low=0.9, high=1.0)


# --- mutations: each must be caught -------------------------------------------------------------------------


def flipped(make):
    "Observed and missing swapped."
    return lambda *arguments: ~make(*arguments)


small, odd = (4, 12, 16), (4, 11, 9)
FLIPPED = {
    "square": lambda: square_is_seen(flipped(square_observed), small, 5, 0),
    "square of half the area": lambda: square_is_seen(flipped(square_observed), (4, 10, 10), 7, 0),
    "grey square": lambda: square_is_hidden(flipped(grey_square), small, 5, 0),
    "line": lambda: line_is_seen(flipped(line_observed), small, 3, 0),
    "rectangle observed": lambda: rectangle_is_seen(flipped(rectangle_observed), small, 0.25, 0.75, 0),
    "rectangle hidden": lambda: rectangle_is_hidden(flipped(rectangle_hidden), (32, 12, 16), 0.25, 0),
    "quadrant": lambda: quadrant_is_seen(flipped(quadrant_observed), small, 0),
    "centre": lambda: centre_is_hidden(flipped(centre_hidden), odd),
    "face part": lambda: face_part_is_hidden(flipped(face_part_hidden), (1, 64, 64), "O6"),
    "pattern": lambda: blobs_are_hidden(flipped(pattern_hidden), (4, 32, 32), 0),
    "dropout": lambda: dropout_has_its_rate(flipped(independent_dropout), (50, 50), 0.9, 0),
    "dropout, all": lambda: dropout_has_its_rate(flipped(independent_dropout), (5, 5), 1, 0),
    "operator": lambda: operator_keeps_what_was_seen(lambda x, m, tau: masking_operator(x, ~m, tau), (3, 5), -1.0, 0),
}


@pytest.mark.parametrize("name", FLIPPED)
def test_a_flipped_mask_is_caught(name):
    with pytest.raises(AssertionError):
        FLIPPED[name]()


def test_halves_are_their_own_mutant():
    "Hiding the upper half is showing the lower: no property can catch this flip, for the distribution is the same."
    halves = half_hidden((200, 5, 6), seeded(0))
    kinds = [region.flatten(1).unique(dim=0) for region in (halves, ~halves)]
    assert len(kinds[0]) == 4 and torch.equal(*kinds)


def literal(x, observed, tau):
    "Equation 3 as printed: NaN in a hole leaks."
    return x * observed + tau * (~observed)


def without_last_place(shape, side, generator):
    "NumPy's randint(0, length − side): the last place is never used."
    limit = torch.tensor([length - side for length in shape[1:]])
    top, left = (torch.randint(0, int(m), (shape[0],), generator=generator) for m in limit)
    sides = torch.full((shape[0],), side)
    return inspect.unwrap(masks._inside)(shape, top, left, sides, sides)


def circular(observed):
    "Pairs counted without zeros around the mask: they meet across the edge."
    n, height, width = observed.shape
    power = torch.fft.rfft2(observed.double()).abs().square().mean(0)
    pairs = torch.fft.irfft2(power, s=(height, width))
    return pairs / (torch.arange(height, 0, -1)[:, None] * torch.arange(width, 0, -1))


def wrong_tau(x, observed, tau):
    return masking_operator(x, observed, 0.0)


def any_area(shape, min_area, generator):
    return rectangle_hidden(shape, 0.0, generator)


def any_density(shape, generator):
    return pattern_hidden(shape, generator, low=0, high=1)


def upper_quadrants(shape, generator):
    return quadrant_observed(shape, generator) & (torch.arange(shape[1]) < shape[1] // 2)[:, None]


def complement_rate(shape, rate, generator):
    return independent_dropout(shape, 1 - rate, generator)


BROKEN = {
    "τ is ignored": lambda: operator_keeps_what_was_seen(wrong_tau, (3, 5), -1.0, 0),
    "literal product": lambda: operator_keeps_what_was_seen(literal, (3, 5), -1.0, 0),
    "mask is ignored": lambda: operator_keeps_what_was_seen(lambda x, m, tau: x, (3, 5), -1.0, 0),
    "area is not enforced": lambda: rectangle_is_hidden(any_area, (64, 12, 16), 0.25, 0),
    "density is not enforced": lambda: blobs_are_hidden(any_density, (64, 32, 32), 0),
    "columns shown for rows": lambda: line_is_seen(lambda *a: line_observed(*a).mT, (4, 12, 12), 3, 0),
    "last place unused": lambda: every_place_occurs(without_last_place, (3000, 12, 9), 2),
    "upper quadrants only": lambda: every_place_occurs(upper_quadrants, (100, 8, 8)),
    "pairs across the edge": lambda: pairs_are_counted(circular, square_observed((5, 6, 7), 2, seeded(0))),
    "rate is its complement": lambda: dropout_has_its_rate(complement_rate, (50, 50), 0.1, 0),
    "face part transposed": lambda: face_part_is_hidden(lambda *a: face_part_hidden(*a).mT, (1, 64, 64), "O3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pattern_is_caught(name):
    with pytest.raises(AssertionError):
        BROKEN[name]()


@pytest.mark.parametrize("name", FLIPPED)
def test_the_same_checks_pass_unbroken(name, monkeypatch):
    "The checks above fail because of the flip alone: with the identity in its place they pass."
    monkeypatch.setitem(globals(), "flipped", lambda make: make)
    if name == "operator":
        operator_keeps_what_was_seen(masking_operator, (3, 5), -1.0, 0)
    else:
        FLIPPED[name]()
