"""Inpainting: completions keep what is seen and never peek, eq. 17 against a grid, best of m; mutations, all run."""

import itertools
import json
import math

import pytest
import torch
from conftest import ROOT, mutant_fails, refuses, seed

from missingbook.foundations.imputer import Layout
from missingbook.foundations.training import Noise, seeded
from missingbook.vaes import inpainting
from missingbook.vaes.inpainting import best_of, naive_bayes_nll, psnr_of_draws
from missingbook.vaes.vaeac import VAEAC, TableNetworks

CPU = torch.device("cpu")


def network(latent=2, numbers=False, number=0):
    """Sixteen cells, black and white or numbers; weights large enough that z matters."""
    layout = Layout(16, tuple(range(16))) if numbers else Layout(16, (), tuple(range(16)))
    with seeded(number, CPU):
        made = VAEAC(layout, TableNetworks(16, 32 if numbers else 16, 8, 1, latent), latent)
        for weight in made.parameters():
            weight.data *= 2.0
    return made


def rows(n=6):
    source = seed(1)
    return (torch.rand(n, 16, generator=source) < 0.5).float(), torch.rand(n, 16, generator=source) < 0.4


# --- completions -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_inpaint(module):
    for numbers in (False, True):
        model, (x, seen) = network(numbers=numbers), rows()
        eps = torch.randn(5, 6, 2, generator=seed(2))
        draws, means = module.inpaint(model, x, seen, eps, Noise(3, CPU)), module.inpaint(model, x, seen, eps)
        assert draws.shape == means.shape == (5, 6, 16)
        assert torch.equal(draws[:, seen], x[seen].expand(5, -1)) and torch.equal(means[:, seen], x[seen].expand(5, -1))
        assert means[:, ~seen].std(0).mean() > 1e-4 and not torch.equal(draws, means)
        junk = torch.where(seen, x, torch.nan)  # whatever stands behind the holes
        assert torch.equal(module.inpaint(model, junk, seen, eps), means)
        if not numbers:
            assert set(draws.unique().tolist()) == {0.0, 1.0} and ((means >= 0) & (means <= 1)).all()


def test_completions_keep_what_is_seen_and_differ():
    kept, drawn = "torch.where(seen, x, cells.view(*z.shape[:2], -1))", "cell_draw(output, layout, noise, spread)"
    mutant_fails(inpainting, check_inpaint, (kept, "cells.view(*z.shape[:2], -1)"))
    mutant_fails(inpainting, check_inpaint, (drawn, "cell_mean(output, layout)"))
    mutant_fails(inpainting, check_inpaint, ("    z = reparameterize(mean, sigma, eps)\n    output",
                                             "    z = reparameterize(mean, sigma, 0 * eps)\n    output"))


@torch.no_grad()
def check_share_of_white(module):
    """Drawn cells are white as often as their expected values say."""
    model, (x, seen) = network(), rows(1)
    eps = torch.zeros(4000, 1, 2)  # one z, many coins
    drawn = module.inpaint(model, x, seen, eps, Noise(4, CPU)).mean(0)
    assert (drawn - module.inpaint(model, x, seen, eps[:1])[0]).abs().max() < 0.05


def test_cells_are_drawn_with_their_probabilities():
    mutant_fails(inpainting, check_share_of_white, ("cell_draw(output, layout", "cell_draw(-output, layout"))


# --- likelihoods -----------------------------------------------------------------------------------------------------


def check_naive_bayes(module):
    x, target = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[True, True], [True, False]])
    nll = module.naive_bayes_nll(x, target, torch.tensor([0.2, 0.4]))
    assert torch.allclose(nll, -torch.tensor([0.2 * 0.6, 0.8]).log())
    x[1, 1] = torch.nan  # not a target
    assert torch.isfinite(module.naive_bayes_nll(x, target, torch.tensor([0.2, 0.4]))).all()


def test_naive_bayes_by_hand():
    cost = "torch.where(x > 0.5, share, 1 - share)"
    mutant_fails(inpainting, check_naive_bayes, (cost, "torch.where(x > 0.5, 1 - share, share)"))
    mutant_fails(inpainting, check_naive_bayes, (f"torch.where(target, {cost}.log(), 0.0)", f"{cost}.log()"))
    for wrong in (0.0, 1.0, math.nan):
        refuses(lambda w=wrong: naive_bayes_nll(torch.ones(1, 2), torch.ones(1, 2).bool(), torch.tensor([0.5, w])),
                ValueError, "strictly between 0 and 1")


# --- PSNR ------------------------------------------------------------------------------------------------------------


def check_best_of(module):
    scores = torch.randn(6, 4, generator=seed(7), dtype=torch.float64)
    for m in range(1, 7):
        choices = [scores[list(c)].amax(0) for c in itertools.combinations(range(6), m)]
        assert torch.allclose(module.best_of(scores, m), torch.stack(choices).mean(0))


def test_best_of_by_all_choices():
    mutant_fails(inpainting, check_best_of, ("math.comb(i, m - 1)", "math.comb(k - 1 - i, m - 1)"))
    mutant_fails(inpainting, check_best_of, ("math.comb(i, m - 1)", "math.comb(i + 1, m)"))
    for m in (0, 4):
        refuses(lambda m=m: best_of(torch.zeros(3, 1), m), ValueError, "cannot be told from 3 draws")


def check_psnr(module):
    truth, hidden = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, 4, 4, dtype=torch.bool)
    hidden[:, :2] = True
    draws = torch.stack([truth + 0.1 * hidden[:, None], truth + 5.0])  # the second is cut to white
    found = module.psnr_of_draws(truth, draws, hidden)
    expected = torch.tensor([[20.0], [-20 * math.log10(0.5)]]).expand(2, 2)
    assert torch.allclose(found, expected, atol=1e-4)


def test_psnr_of_draws_by_hand():
    mutant_fails(inpainting, check_psnr, ("draw.clamp(0, 1), hidden, reduction", "draw.clamp(0, 1), reduction"))
    mutant_fails(inpainting, check_psnr, ("draw.clamp(0, 1), hidden", "draw.clamp(0, 0.9), hidden"))
    with pytest.raises(ValueError):
        psnr_of_draws(torch.zeros(1, 1, 2, 2), torch.zeros(2, 1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool))


# --- records ---------------------------------------------------------------------------------------------------------


def test_records_are_of_one_protocol():
    """The two runs of table 9 share digits, networks and test lines; the likelihoods can be compared."""
    folder = ROOT / "results" / "inpainting"
    runs = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("mnist", "gsnn")}
    runs["mnist"]["settings"].pop("warm_up")  # of a divergence, which the GSNN does not have
    same = ("what", "settings", "training_digits", "parameters", "threads")
    assert all(runs["mnist"][key] == runs["gsnn"][key] for key in same)
    assert runs["mnist"]["test"]["naive_bayes"] == runs["gsnn"]["test"]["naive_bayes"]
    assert all(run["cpu_seconds"] > 0 and run["commit"] for run in runs.values())
