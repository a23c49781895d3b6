"""MisGAN: losses, who gets which gradient, networks, loops, collapse, estimator; each with its mutations."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import mutant_fails as holds_and_mutant_fails
from conftest import refuses, seed
from sklearn.datasets import load_digits
from torch import nn

from missingbook.foundations.imputer import DeepImputer, check_no_peek
from missingbook.foundations.masks import masking_operator, square_observed
from missingbook.foundations.training import TrainingDiverged, TrainingRun
from missingbook.gans import misgan
from missingbook.gans.misgan import MisGAN, MisGANImputer
from missingbook.gans.wgan import Critic, Generator, dense, draw


def quiet(**options):
    return TrainingRun(**({"seed": 0, "device": "cpu", "verbose": False} | options))


mutant_fails = partial(holds_and_mutant_fails, misgan)


def small(module=misgan, source=None, imputer=True, mask_critic=True, latent=2):
    """Six small networks for rows of three numbers, in float64."""
    source = source or seed()

    def net(*widths):
        return nn.Sequential(dense(widths, source), nn.Sigmoid())

    makes = net(latent, 16, 3), net(latent, 16, 3)
    for made in makes:
        made.latent, made.shape = latent, (3,)
    critics = [Critic(3, (16,), source) for _ in range(3)]
    extra = (net(3, 16, 3), critics[2]) if imputer else (None, None)
    return module.MisGAN(*makes, critics[0], critics[1] if mask_critic else None, *extra, tau=0.3).double()


def batch(n=6, latent=2, number=5):
    source, wide = seed(number), dict(dtype=torch.float64)
    x, observed = torch.rand(n, 3, generator=source, **wide), torch.rand(n, 3, generator=source) < 0.5
    return (
        x,
        observed,
        torch.randn(n, latent, generator=source, **wide),
        torch.randn(n, latent, generator=source, **wide),
        torch.rand(n, 3, generator=source, **wide),
    )


def digits(n=400, side=4):
    x = torch.from_numpy(load_digits().images[:n, None]).float() / 16
    return x, square_observed((n, 8, 8), side, seed())[:, None]


def tiny_misgan(**options):
    torch.manual_seed(0)
    return misgan.dense_misgan((1, 8, 8), **({"hidden": 32, "latent": 8} | options))


# --- equations ------------------------------------------------------------------------------------------------


def check_losses(module):
    """Equations 4 and 5 and the imputer's loss with critics that count; what stands behind a hole has no influence."""

    def total(rows):
        return rows.sum(1)

    x, seen = torch.tensor([[3.0, 7.0], [5.0, 9.0]]), torch.tensor([[True, False], [True, True]])
    fake, masks = torch.tensor([[2.0, 4.0], [6.0, 8.0]]), torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    assert module.mask_loss(total, seen.float(), masks) == 1.5 - 1.25
    for behind in (7.0, math.nan, 1e9):
        x[0, 1] = behind
        assert module.data_loss(total, x, seen, fake, masks, 10) == (3 + 10 + 5 + 9) / 2 - (2 + 7 + 10 + 8) / 2
    assert module.imputer_loss(total, fake, masks) == 10 - 1.25
    assert torch.equal(module.fill_relaxed(fake, masks, 10), masking_operator(fake, masks, 10))


@pytest.mark.parametrize(
    "edit",
    [
        (
            "return critic(observed).mean() - critic(fake_observed).mean()",
            "return critic(fake_observed).mean() - critic(observed).mean()",
        ),
        ("critic(torch.where(observed, x, tau)).mean()", "critic(x * observed + tau * ~observed).mean()"),
        ("critic(torch.where(observed, x, tau)).mean()", "critic(torch.where(observed, x, 0.0)).mean()"),
        ("return x * observed + tau * (1 - observed)", "return x * (1 - observed) + tau * observed"),
        (
            "return critic(fake).mean() - critic(completed).mean()",
            "return critic(completed).mean() - critic(fake).mean()",
        ),
    ],
)
def test_losses(edit):
    mutant_fails(check_losses, edit)


def check_relaxed_mask(module):
    """A sigmoid at a temperature; stretched by .1 it reaches 0 and 1 where the sigmoid is .0833 and .9167."""
    logits = torch.tensor([-3.0, -0.66, 0.0, 0.66, 3.0], dtype=torch.float64, requires_grad=True)
    plain = module.relaxed_mask(logits, 0.66)
    assert torch.allclose(plain, 1 / (1 + torch.exp(-logits / 0.66)))
    stretched = module.relaxed_mask(logits, 0.66, 0.1)
    assert (
        stretched[[0, 2, 4]].tolist() == [0, 0.5, 1]
        and abs(stretched[3].item() - (1.2 / (1 + math.exp(-1)) - 0.1)) < 1e-12
    )
    (gradient,) = torch.autograd.grad(stretched.sum(), logits)
    assert gradient[0] == gradient[4] == 0 < gradient[2]


@pytest.mark.parametrize(
    "edit",
    [
        ("(logits / temperature).sigmoid()", "(logits * temperature).sigmoid()"),
        ("* (1 + 2 * stretch) - stretch)", "* (1 + stretch) - stretch)"),
        (".clamp(0, 1)", ""),
    ],
)
def test_relaxed_mask(edit):
    mutant_fails(check_relaxed_mask, edit)


def check_imputed(module):
    """Equation 12: noise in the holes and nowhere else, observed entries bit for bit, NaN behind holes unseen."""
    x, seen = torch.tensor([[3.0, math.nan], [5.0, 9.0]]), torch.tensor([[True, False], [True, True]])
    omega, inputs = torch.tensor([[0.1, 0.2], [0.3, 0.4]]), []
    filled = module.imputed(lambda rows: inputs.append(rows) or 2 * rows, x, seen, omega)
    assert torch.equal(filled, torch.tensor([[3.0, 0.4], [5.0, 9.0]]))
    assert torch.equal(inputs[0], torch.tensor([[3.0, 0.2], [5.0, 9.0]]))


@pytest.mark.parametrize(
    "edit",
    [
        ("made = network(torch.where(observed, x, omega))", "made = network(x)"),
        ("made = network(torch.where(observed, x, omega))", "made = network(torch.where(observed, x + omega, omega))"),
        ("return torch.where(observed, x, made.to(x.dtype))", "return made"),
        ("return torch.where(observed, x, made.to(x.dtype))", "return torch.where(~observed, x, made.to(x.dtype))"),
    ],
)
def test_imputed(edit):
    mutant_fails(check_imputed, edit)


# --- who gets which gradient ------------------------------------------------------------------------------------


def objectives(model, x, observed, z, epsilon, omega, alpha=0.2, beta=0.1):
    """What each maker minimizes in equations 7, 9 and 10, each to be differentiated alone."""
    fake, masks = model.data_generator(z), model.mask_generator(epsilon)
    completed = torch.where(observed, x, model.imputer(torch.where(observed, x, omega)))
    l_x = (
        model.data_critic(torch.where(observed, x, 0.3)) - model.data_critic(fake * masks + 0.3 * (1 - masks))
    ).mean()
    l_m = (model.mask_critic(observed.double()) - model.mask_critic(masks)).mean()
    l_i = (model.imputer_critic(fake) - model.imputer_critic(completed)).mean()
    return (l_x, l_m, l_i), {"data_generator": l_x + beta * l_i, "mask_generator": l_m + alpha * l_x, "imputer": l_i}


def check_makers(module):
    model, data = small(module), batch()
    module.misgan_generators_loss(model, *data, 0.2, 0.1).backward()
    for name, objective in objectives(model, *data)[1].items():
        maker = getattr(model, name)
        own = torch.autograd.grad(objective, list(maker.parameters()), retain_graph=True)
        assert all(torch.allclose(a, w.grad, atol=1e-12) for a, w in zip(own, maker.parameters(), strict=True)), name
        assert max(a.abs().max() for a in own) > 1e-4


@pytest.mark.parametrize(
    "edit",
    [
        ("return weight * x + (1 - weight) * x.detach()", "return weight * x"),
        ("return weight * x + (1 - weight) * x.detach()", "return x"),
        (
            "weighted_gradient(fake_observed, into_masks), model.tau)",
            "fake_observed, model.tau)",
        ),
        ("weighted_gradient(fake, beta), completed)", "fake.detach(), completed)"),  # what the authors' code does
        ("weighted_gradient(fake, beta), completed)", "fake, completed)"),
        (
            "loss = loss - model.mask_critic(fake_observed).mean()",
            "loss = loss + model.mask_critic(fake_observed).mean()",
        ),
    ],
)
def test_each_maker_gets_the_gradient_of_its_objective(edit):
    mutant_fails(check_makers, edit)


def test_without_a_mask_critic_the_masks_descend_the_data_loss_alone():
    model, data = small(mask_critic=False, imputer=False), batch()
    misgan.misgan_generators_loss(model, *data, 0.2, 0.1).backward()
    fake, masks = model.data_generator(data[2]), model.mask_generator(data[3])
    l_x = -model.data_critic(fake * masks + 0.3 * (1 - masks)).mean()
    own = torch.autograd.grad(l_x, list(model.mask_generator.parameters()))
    assert all(torch.allclose(a, w.grad) for a, w in zip(own, model.mask_generator.parameters(), strict=True))


def check_critics(module):
    """The three losses, and each critic's gradient: that of minus its own loss plus ten times its own penalty."""
    from missingbook.gans.wgan import gradient_penalty

    model, (x, observed, z, epsilon, omega) = small(module), batch()
    mix = torch.rand(6, 3, generator=seed(9), dtype=torch.float64)
    found = module.misgan_critics_loss(model, x, observed, z, epsilon, omega, mix)
    losses = objectives(model, x, observed, z, epsilon, omega)[0]
    assert all(
        abs(found[name].item() - loss.item()) < 1e-12
        for name, loss in zip(("data", "mask", "imputer"), losses, strict=True)
    )
    found["loss"].backward()
    assert all(w.grad is None for maker in model.makers for w in maker.parameters())
    fake, masks = model.data_generator(z).detach(), model.mask_generator(epsilon).detach()
    completed = torch.where(observed, x, model.imputer(torch.where(observed, x, omega))).detach()
    pairs = [
        (model.data_critic, torch.where(observed, x, 0.3), fake * masks + 0.3 * (1 - masks)),
        (model.mask_critic, observed.double(), masks),
        (model.imputer_critic, fake, completed),
    ]
    for k, (critic, real, made) in enumerate(pairs):
        own = -(critic(real).mean() - critic(made).mean()) + 10 * gradient_penalty(critic, real, made, mix[:, k])
        gradients = torch.autograd.grad(own, list(critic.parameters()))
        assert all(torch.allclose(a, w.grad, atol=1e-12) for a, w in zip(gradients, critic.parameters(), strict=True))


@pytest.mark.parametrize(
    "edit",
    [
        (
            "(model.data_critic, torch.where(observed, x, model.tau), behind)",
            "(model.data_critic, torch.where(observed, x, model.tau), fake)",
        ),
        (
            "(model.mask_critic, model.masks_of(observed), fake_observed)",
            "(model.mask_critic, model.masks_of(~observed), fake_observed)",
        ),
        ("(model.imputer_critic, fake, completed)", "(model.imputer_critic, completed, fake)"),
        ("critic_loss(*pair, mix[:, k], penalty)", "critic_loss(*pair, mix[:, 0], penalty)"),
    ],
)
def test_critics(edit):
    mutant_fails(check_critics, edit)


@pytest.mark.parametrize("module", [misgan])
def test_losses_do_not_look_behind_holes(module):
    model, (x, observed, *noise) = small(module), batch()
    mix = torch.rand(6, 3, generator=seed(9), dtype=torch.float64)
    results = []
    for junk in (0.0, 1e6):
        behind = torch.where(observed, x, junk)
        for value in (
            module.misgan_critics_loss(model, behind, observed, *noise, mix)["loss"],
            module.misgan_generators_loss(model, behind, observed, *noise),
        ):
            model.zero_grad()
            value.backward()
            results.append([value.detach(), *(w.grad.clone() for w in model.parameters() if w.grad is not None)])
    for a, b in ((0, 2), (1, 3)):
        assert all(torch.equal(u, v) for u, v in zip(results[a], results[b], strict=True))


# --- networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, networks", [((1, 8, 8), "dense"), ((2, 6, 10), "dense"), ((1, 8, 12), "conv"), ((3, 16, 20), "conv")]
)
def test_shapes_and_gradients_of_the_networks(shape, networks):
    make = misgan.dense_misgan if networks == "dense" else misgan.conv_misgan
    model = make(shape, 8, latent=5)
    z = torch.randn(4, 5, generator=seed())
    pictures, masks = model.data_generator(z), model.mask_generator(z)
    seen = (masks > 0.5).expand_as(pictures)
    completed = misgan.imputed(model.imputer, pictures, seen, torch.rand(4, *shape, generator=seed()))
    assert pictures.shape == completed.shape == (4, *shape) and masks.shape == (
        4,
        1 if networks == "conv" else shape[0],
        *shape[1:],
    )
    assert 0 <= pictures.min() <= pictures.max() <= 1 and 0 <= masks.min() <= masks.max() <= 1
    total = sum(c(t).sum() for c, t in zip(model.critics, (pictures, masks, completed), strict=True))
    total.backward()
    assert all(w.grad is not None and torch.isfinite(w.grad).all() for w in model.parameters())


@pytest.mark.parametrize(
    "network",
    [
        lambda: misgan.UNet((3, 16, 16), 8, 3),
        lambda: misgan.DenseImputer((3, 16, 16), (20, 20)),
        lambda: misgan.ConvCritic((3, 16, 16), 8),
    ],
)
def test_no_picture_sees_another(network):
    """Normalization over the batch would fail here."""
    torch.manual_seed(0)
    network, x = network().double(), torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=seed())
    changed = torch.cat([x[:1], 5 * x[1:]])
    assert torch.allclose(network(x)[0], network(changed)[0], atol=1e-12)
    assert not torch.allclose(network(x)[1], network(changed)[1])


def test_sides_that_four_does_not_divide_are_refused():
    refuses(lambda: misgan.conv_misgan((1, 6, 8)), ValueError, "four must divide")
    refuses(lambda: misgan.ConvGenerator((1, 8, 7)), ValueError, "8 × 7")
    refuses(lambda: misgan.UNet((1, 12, 12), depth=3), ValueError, "multiple of 8")
    holed = np.where(np.arange(49).reshape(1, 1, 7, 7) % 3 == 0, np.nan, np.random.default_rng(0).random((5, 1, 7, 7)))
    refuses(
        lambda: MisGANImputer(networks="conv", max_epochs=1, verbose=False).fit(holed), ValueError, "dense networks"
    )
    with pytest.warns(RuntimeWarning, match="collapsed"):
        MisGANImputer(hidden=8, max_epochs=2, random_state=0, verbose=False).fit(holed)  # dense ones take any side


def test_an_imputer_needs_its_critic():
    model = small()
    refuses(
        lambda: MisGAN(model.data_generator, model.mask_generator, model.data_critic, model.mask_critic, model.imputer),
        ValueError,
        "critic of its own",
    )
    lone = small(imputer=False)
    refuses(
        lambda: misgan.train_imputer(lone, quiet(), None, torch.ones(4, 3, dtype=torch.bool)), ValueError, "no imputer"
    )


# --- training ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """MisGAN on digits of which a square of 4 × 4 was seen, long enough to judge: about ten seconds."""
    x, observed = digits(1797)
    model = tiny_misgan(hidden=96, latent=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a sound run warns of nothing
        misgan.train_misgan(model, x, observed, quiet(), 40, 64, 1e-3, 2)
    return model, x, observed


def test_generated_masks_have_the_rate_and_the_marginals_of_the_data(trained):
    model, _, observed = trained
    masks = draw(model.mask_generator, 1000, seed(1)) > 0.5
    assert abs(masks.float().mean() - 0.25).item() < 0.03
    share, wanted = masks.float().mean(0), observed.float().mean(0)
    assert (share - wanted).abs().mean() < 0.06
    flat = torch.full_like(wanted, 0.25)  # masks without a place in the picture would not do
    assert (share - wanted).abs().mean() < (flat - wanted).abs().mean() / 2
    assert (misgan.square_overlap(masks[:, 0], 4) >= 0.7).mean() > 0.5


def test_draws_are_nearer_to_complete_digits_than_zero_filled_ones(trained):
    """The generator saw quarters of digits only; its draws have the share of ink of whole ones."""
    model, x, observed = trained
    ink = draw(model.data_generator, 1000, seed(1)).mean()
    assert abs(ink - x.mean()) < 0.05 < x.mean() - (x * observed).mean()


def test_completions_vary_with_the_noise_and_less_where_more_is_seen(trained):
    model, x, _ = trained
    spread = []
    for side in (2, 4, 6):
        seen = square_observed((200, 8, 8), side, seed(side))[:, None]
        with torch.no_grad():
            several = torch.stack(
                [
                    misgan.imputed(model.imputer, x[:200], seen, torch.rand(200, 1, 8, 8, generator=seed(k)))
                    for k in range(6)
                ]
            )
        assert torch.equal(several[:, seen], x[:200][seen].expand(6, -1))
        spread.append(several.std(0).mean().item())
    assert spread[0] > spread[1] > spread[2] > 0


def test_an_imputer_for_other_holes_is_trained_without_data(trained):
    """Equation 11: the generator is left as it is, and the imputer learns the new holes."""
    from missingbook.foundations.metrics import energy_distance

    model, x, _ = trained
    left = torch.zeros(256, 1, 8, 8, dtype=torch.bool)
    left[..., :4] = True
    torch.manual_seed(1)
    other = model.with_makers([model.data_generator, model.mask_generator, misgan.DenseImputer((1, 8, 8), (64, 64))])
    other.imputer_critic = Critic(64, (64, 32), seed(2))
    before = [w.clone() for w in model.data_generator.parameters()]

    def distance():
        with torch.no_grad():
            filled = misgan.imputed(other.imputer, x, left[:1].expand_as(x), torch.rand(x.shape, generator=seed()))
        return energy_distance(filled.flatten(1).numpy(), x.flatten(1).numpy())

    untrained = distance()
    misgan.train_imputer(other, quiet(), None, left, 60, 64, 1e-3, 2)
    assert distance() < untrained / 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.data_generator.parameters(), strict=True))


def test_an_imputer_alone_learns_from_rows():
    x, observed = digits(300)
    model = tiny_misgan()
    before = [w.clone() for w in model.imputer.parameters()]
    run = quiet()
    misgan.train_imputer(model, run, x, observed, 3, 64, 1e-3, 2)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.imputer.parameters(), strict=True))
    assert list(run.history.columns) == ["imputer", "seconds"]


class Killed(Exception):
    pass


def weights_of(run, epochs=4, stop=None):
    x, observed = digits(200)
    model = tiny_misgan()

    def on_epoch(epoch, shown):
        if epoch == stop:
            raise Killed

    misgan.train_misgan(model, x, observed, run, epochs, 32, 1e-3, 3, on_epoch=on_epoch)
    return model.state_dict()


@pytest.mark.filterwarnings("ignore:.*collapsed")
def test_a_resumed_run_ends_at_the_same_weights(tmp_path):
    """Mutation: a run that forgets where in the five steps it stood, or the running mean, ends elsewhere."""
    whole = weights_of(quiet())
    place = dict(checkpoint=tmp_path / "run", checkpoint_seconds=0)
    with pytest.raises(Killed):
        weights_of(quiet(**place), stop=2)
    resumed = weights_of(quiet(**place))
    assert all(torch.equal(whole[name], w) for name, w in resumed.items())


@pytest.mark.filterwarnings("ignore:.*collapsed")
def test_bf16():
    weights = weights_of(quiet(precision="bf16"), epochs=2)
    assert all(torch.isfinite(w).all() for w in weights.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:.*collapsed")
def test_gpu_agrees_with_cpu():
    on_cpu, on_gpu = weights_of(quiet(), epochs=1), weights_of(quiet(device="cuda"), epochs=1)
    assert set(on_cpu) == set(on_gpu) and all(torch.isfinite(w).all() for w in on_gpu.values())


def test_the_mean_of_the_weights_is_what_comes_back():
    """With average=0 the last weights come back; the callback sees the networks that a run would return."""
    x, observed = digits(200)
    ends = {}
    for average in (0.0, 0.9):
        model, seen = tiny_misgan(), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            misgan.train_misgan(
                model,
                x,
                observed,
                quiet(),
                2,
                32,
                1e-3,
                2,
                average=average,
                on_epoch=lambda epoch, shown, seen=seen: seen.append(shown),
            )
        ends[average] = model.data_generator.state_dict()
        assert all(torch.equal(w, seen[-1].data_generator.state_dict()[name]) for name, w in ends[average].items())
    assert any(not torch.equal(w, ends[0.9][name]) for name, w in ends[0.0].items())


def check_collapse(module):
    """Draws that are all the same are called so although their masks vary; masks that are all the same likewise."""
    x, observed = digits(300)
    sound = Generator((1, 8, 8), 8, (16, 64), nn.Sigmoid(), seed())
    flat = Generator((1, 8, 8), 8, (16, 64), nn.Sigmoid(), seed())
    varied = Generator((1, 8, 8), 8, (16, 64), misgan.RelaxedMask(0.02), seed(1))
    for network, scale in ((sound, 6.0), (flat, 0.0), (varied, 6.0)):
        network.layers[-1].weight.data *= scale
    for makers, words in (
        ((sound, varied), ""),
        ((flat, varied), "data generator collapsed"),
        ((sound, flat), "mask generator collapsed"),
    ):
        model = module.MisGAN(*makers, Critic(64), Critic(64))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.check_misgan(model, x, observed)
        assert [words in str(c.message) for c in caught] == ([True] if words else []), [str(c.message) for c in caught]


@pytest.mark.parametrize(
    "edit",
    [
        ("both = observed & observed.roll(k, 0)", "both = torch.ones_like(observed)"),
        ('trouble = spread_trouble(spread, f"the {name} generator")', 'trouble = ""'),
        ("(fake.to(x.dtype), x)]", "(x, x)]"),
    ],
)
def test_a_collapse_is_reported(edit):
    if "torch.ones_like" in edit[1]:  # then what stands behind holes counts

        def check(module):
            x, observed = digits(300)
            junk = torch.where(observed, x, 1e3 * torch.rand(x.shape, generator=seed()))
            assert abs(module.observed_spread_ratio(junk, observed, x).item() - 1) < 1e-6

        mutant_fails(check, edit)
    else:
        mutant_fails(check_collapse, edit)


def test_draws_that_are_not_finite_raise():
    x, observed = digits(50)
    model = tiny_misgan()
    model.data_generator.layers[0].weight.data[0] = math.nan
    with pytest.raises(TrainingDiverged, match="NaN or infinite"):
        misgan.check_misgan(model, x, observed)


@pytest.mark.filterwarnings("ignore:.*half the learning rate")
def test_a_diverged_run_raises():
    x, observed = digits(100)
    with pytest.raises(TrainingDiverged):
        misgan.train_misgan(tiny_misgan(), x, observed, quiet(), 40, 32, 1e18, 2)


def check_overlap(module):
    masks = torch.zeros(5, 8, 8, dtype=torch.bool)
    masks[0, 1:5, 2:6] = True
    masks[1, 1:5, 2:6], masks[1, 7, 7], masks[1, 1, 2] = True, True, False  # a speck elsewhere, a corner lacking
    masks[2, 0:4, 0:4], masks[2, 4:8, 4:8] = True, True  # two squares that touch at a corner: each a part of its own
    masks[3, 0:4, 0:8] = True  # a square twice as long
    assert np.allclose(module.square_overlap(masks, 4), [1, 15 / 16, 1, 0.5, 0])


@pytest.mark.parametrize(
    "edit",
    [
        ("np.argmax(ndimage.sum_labels", "np.argmin(ndimage.sum_labels"),
        ("part.sum() + side**2 - inside", "part.sum() + side**2"),
        ("inside / (part.sum() + side**2 - inside)", "inside / side**2"),
    ],
)
def test_square_overlap(edit):
    mutant_fails(check_overlap, edit)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, o: (x, o[:-1]), "must agree"),
        (lambda x, o: (x[:1], o[:1]), "2 rows or more"),
        (
            lambda x, o: (torch.where(torch.arange(64).view(8, 8) == 0, math.nan, x), torch.ones_like(o)),
            "NaN or infinite",
        ),
    ],
)
def test_bad_rows_are_refused(change, words):
    refuses(lambda: misgan.train_misgan(tiny_misgan(), *change(*digits(20)), quiet()), ValueError, words)


@pytest.mark.parametrize("name", ["n_critic", "batch_size"])
def test_bad_counts_are_refused(name):
    refuses(lambda: misgan.train_misgan(tiny_misgan(), *digits(20), quiet(), **{name: 0}), ValueError, name)


def test_a_run_without_a_step_of_the_generators_is_refused():
    """Mutation: the run would end at the first weights, and only look collapsed."""
    x, observed = digits(40)
    for options in ({"n_critic": 100}, {"batch_size": 64, "n_critic": 2}):
        refuses(
            lambda options=options: misgan.train_misgan(tiny_misgan(), x, observed, quiet(), 1, **options),
            ValueError,
            "first of the generators",
        )
    refuses(lambda: misgan.train_imputer(tiny_misgan(), quiet(), None, observed, 1, 64), ValueError, "more epochs")


# --- the estimator ------------------------------------------------------------------------------------------------

SMALL = dict(hidden=16, latent=4, max_epochs=2, n_draws=4, random_state=0, verbose=False)
pytestmark = pytest.mark.filterwarnings("ignore:.*(collapsed|ran away)")


def holed(n=120, channels=1, rate=0.5):
    x = np.repeat(load_digits().images[:n, None].astype("float32"), channels, axis=1)
    gone = np.random.default_rng(0).random((n, 1, 8, 8)) < rate
    return x, np.where(gone, np.nan, x)


@pytest.mark.parametrize(
    "channels, options",
    [
        (1, {}),
        (3, {"channels": 4}),
        (1, {"networks": "conv", "channels": 4}),
        (1, {"tau": 0.5, "stretch": 0.1, "beta": 0.0, "alpha": 0.0, "average": 0.0}),
    ],
)
def test_estimator(channels, options):
    x, holes = holed(channels=channels)
    imputer = MisGANImputer(**(SMALL | options)).fit(holes)
    seen = ~np.isnan(holes)
    for filled in (imputer.transform(holes), *imputer.sample(holes, 2)):
        assert (filled[seen] == holes[seen]).all() and not np.isnan(filled).any() and filled.dtype == holes.dtype
        assert filled.min() >= x.min() and filled.max() <= x.max()
    new, masks = imputer.generate(5), imputer.generate_masks(5)
    assert (
        new.shape == masks.shape == (5, channels, 8, 8)
        and masks.dtype == bool
        and x.min() <= new.min() <= new.max() <= x.max()
    )
    assert (masks == masks[:, :1]).all() or (channels > 1 and options.get("networks") == "dense")
    assert np.array_equal(new, imputer.generate(5)) and not np.array_equal(new, imputer.generate(5, random_state=1))
    assert np.allclose(imputer.generate(7)[:5], new, atol=1e-4)
    bounded = MisGANImputer(**(SMALL | options | {"bounds": (7.0, 7.5)})).fit(holes).generate(5)
    assert bounded.min() >= 7.0 and bounded.max() <= 7.5
    check_no_peek(MisGANImputer(**(SMALL | options)), holes)


def test_channels_masked_apart_keep_their_masks_with_dense_networks():
    """One mask for all channels would lose them; conv networks say so."""
    x, holes = holed(channels=2)
    holes[:, 1] = np.where(np.random.default_rng(1).random((120, 8, 8)) < 0.5, np.nan, x[:, 1])
    imputer = MisGANImputer(**(SMALL | {"networks": "dense"})).fit(holes)
    assert (imputer.generate_masks(50)[:, 0] != imputer.generate_masks(50)[:, 1]).any()
    refuses(
        lambda: MisGANImputer(**(SMALL | {"networks": "conv", "channels": 4})).fit(holes),
        ValueError,
        "one mask for all channels",
    )


def test_complete_pictures_are_said_to_give_a_plain_wgan():
    with pytest.warns(RuntimeWarning, match="plain Wasserstein GAN"):
        imputer = MisGANImputer(**SMALL).fit(holed()[0])
    assert imputer.generate(3).shape == (3, 1, 8, 8)


def test_save_and_load(tmp_path):
    _, holes = holed()
    imputer = MisGANImputer(**SMALL).fit(holes)
    imputer.save(tmp_path / "misgan.safetensors")
    again = DeepImputer.load(tmp_path / "misgan.safetensors", device="cpu")
    assert np.array_equal(again.sample(holes, 2), imputer.sample(holes, 2)) and np.array_equal(
        again.generate(3), imputer.generate(3)
    )
    assert np.array_equal(again.generate_masks(3), imputer.generate_masks(3))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"networks": "deep"}, "'auto', 'dense' or 'conv'"),
        ({"tau": 2.0}, "tau"),
        ({"temperature": 0.0}, "temperature"),
        ({"n_critic": 0}, "n_critic"),
        ({"average": 1.0}, "average"),
        ({"alpha": -1.0}, "alpha"),
        ({"hidden": 0}, "hidden"),
    ],
)
def test_bad_parameters_are_named(options, words):
    refuses(lambda: MisGANImputer(**(SMALL | options)).fit(holed()[1]), ValueError, words)


def test_tables_are_refused_and_generate_says_what_it_wants():
    refuses(
        lambda: MisGANImputer(**SMALL).fit(np.random.default_rng(0).random((20, 3))),
        ValueError,
        "(n, channels, height, width)",
    )
    imputer = MisGANImputer(**SMALL).fit(holed()[1])
    for bad in (0, -1, 1.5, "3", True):
        refuses(lambda bad=bad: imputer.generate(bad), ValueError, "whole number")


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[:2],
        lambda h: np.where(np.isnan(h), np.nan, 5.0).astype("float32"),
        lambda h: h * 1e12,
        lambda h: np.round(h),
        lambda h: np.where(np.random.default_rng(1).random(h.shape) < 0.9, np.nan, h),
        lambda h: h[:65],
    ],
    ids=["two", "one value", "1e12", "whole", "95 % missing", "65"],
)
def test_odd_data_pass(change):
    holes = change(holed()[1])
    filled = MisGANImputer(**SMALL).fit(holes).transform(holes)
    assert not np.isnan(filled).any() and np.isfinite(filled).all()
