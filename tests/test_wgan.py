"""Wasserstein GAN: distance, penalty, losses, loop, detection of a collapse; each with the mutation it must catch."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import copy_of, refuses, seed
from conftest import mutant_fails as holds_and_mutant_fails
from scipy.optimize import linprog
from torch import nn

from missingbook.foundations.training import TrainingDiverged, TrainingRun
from missingbook.gans import wgan


def quiet(**options):
    return TrainingRun(**({"seed": 0, "device": "cpu", "verbose": False} | options))


mutant_fails = partial(holds_and_mutant_fails, wgan)


def pair(n=16, *shape):
    shape = shape or (2,)
    return (torch.randn(n, *shape, dtype=torch.float64, generator=seed(1)),
            torch.randn(n, *shape, dtype=torch.float64, generator=seed(2)),
            torch.rand(n, dtype=torch.float64, generator=seed(3)))


def line(*weights):
    critic = nn.Linear(len(weights), 1, bias=False).double()
    critic.weight.data = torch.tensor([weights], dtype=torch.float64)
    return critic


# --- the distance -------------------------------------------------------------------------------------------


def check_distance(module):
    """Primal and dual as linear programs, and a shift whose length is known."""
    x, y, _ = pair(6, 3)
    cost = torch.cdist(x, y).numpy()
    ends = np.vstack([np.kron(np.eye(6), np.ones(6)), np.kron(np.ones(6), np.eye(6))])
    primal = linprog(cost.ravel(), A_eq=ends, b_eq=np.full(12, 1 / 6)).fun
    every = torch.cat([x, y])
    rows = [(i, j) for i in range(12) for j in range(12) if i != j]
    slope = np.array([np.eye(12)[i] - np.eye(12)[j] for i, j in rows])
    reach = np.array([(every[i] - every[j]).norm().item() for i, j in rows])
    dual = -linprog(np.repeat([-1 / 6, 1 / 6], 6), A_ub=slope, b_ub=reach, bounds=[(None, None)] * 12).fun
    found = module.wasserstein1(x, y)
    assert abs(found - primal) < 1e-9 and abs(found - dual) < 1e-9
    shifted = x[torch.randperm(6, generator=seed())] + torch.tensor([2.0, 3.0, 6.0])
    assert abs(module.wasserstein1(x, shifted) - 7) < 1e-9
    assert module.wasserstein1(x, x) < 1e-12 and abs(module.wasserstein1(y, x) - found) < 1e-12


@pytest.mark.parametrize("edit", [
    ("return cost[linear_sum_assignment(cost.numpy())].mean().item()", "return cost.diagonal().mean().item()"),
    ("return cost[linear_sum_assignment(cost.numpy())]", "return cost.square()[linear_sum_assignment(cost.numpy())]"),
    ("    return torch.cdist(x.detach()", "    return (lambda *a, **o: torch.cdist(*a, p=1))(x.detach()"),
])
def test_distance(edit):
    mutant_fails(check_distance, edit)


def check_far_away(module):
    """Far from the origin nothing is lost: for as many float64 rows, and for the radii of the coverage."""
    x = torch.randn(60, 2, dtype=torch.float64, generator=seed())
    assert module.wasserstein1(x + 1e6, x + 1e6) == 0
    assert abs(module.wasserstein1(x + 1e6, x + 1e6 + 1e-3) - math.sqrt(2) * 1e-3) < 1e-6
    near, far = (module.coverage(x + c, x[torch.randperm(60, generator=seed())] + c + 0.1) for c in (0.0, 1e6))
    assert near == far
    assert module.coverage(x[:20].repeat(6, 1).float() + 1e3, x[20:].float() + 1e3) == 0  # six copies: a radius of 0


@pytest.mark.parametrize("edit", [
    ('compute_mode="donot_use_mm_for_euclid_dist"', 'compute_mode="use_mm_for_euclid_dist"'),
    ("x.detach().flatten(1).double(), y.detach().flatten(1).double(),",
     "x.detach().flatten(1).float(), y.detach().flatten(1).float(),"),
])
def test_distances_far_from_the_origin(edit):
    mutant_fails(check_far_away, edit)


# --- penalty and losses ---------------------------------------------------------------------------------------


def check_linear_penalty(module):
    """f(x) = w·x: the penalty is (‖w‖ − 1)², its gradient 2 (‖w‖ − 1) w / ‖w‖."""
    critic, (real, fake, mix) = line(3, 4), pair()
    penalty = module.gradient_penalty(critic, real, fake, mix)
    assert penalty.requires_grad and abs(penalty.item() - 16) < 1e-9
    penalty.backward()
    assert torch.allclose(critic.weight.grad, torch.tensor([[4.8, 6.4]], dtype=torch.float64))
    assert module.gradient_penalty(line(0.6, 0.8), real, fake, mix) < 1e-12


def check_place(module):
    """f(x) = ‖x‖²/2 has the gradient x: the penalty is that of the points themselves, mix = 1 at the real ones."""
    real, fake, mix = pair(16, 1, 3, 2)
    between = mix.view(-1, 1, 1, 1) * real + (1 - mix.view(-1, 1, 1, 1)) * fake
    expected = (between.flatten(1).norm(dim=1) - 1).square().mean()
    found = module.gradient_penalty(lambda x: x.flatten(1).square().sum(1) / 2, real, fake, mix)
    assert abs(found.item() - expected.item()) < 1e-9


PENALTY = [
    ("create_graph=True", "create_graph=False"),
    ("torch.linalg.vector_norm(gradient.flatten(1), dim=1)", "gradient.flatten(1).square().sum(1)"),
    ("(slopes(critic, between) - 1).square()", "slopes(critic, between).square()"),
]


@pytest.mark.parametrize("edit", PENALTY)
def test_penalty_of_a_linear_critic(edit):
    mutant_fails(check_linear_penalty, edit)


@pytest.mark.parametrize("edit", [
    ("torch.lerp(fake, real, ", "torch.lerp(real, fake, "),
    ("mix.to(dtype).view(-1, *[1] * (real.ndim - 1))", "mix.to(dtype).mean()"),
])
def test_penalty_between_the_points(edit):
    mutant_fails(check_place, edit)


def test_penalty_agrees_with_finite_differences():
    """The second differentiation, weight by weight, in float64 and through a smooth critic."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critic, (real, fake, mix) = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double(), pair()
    wgan.gradient_penalty(critic, real, fake, mix).backward()
    weight, step = critic[0].weight, 1e-5
    with torch.no_grad():
        for place in ((0, 0), (2, 1)):
            ends = []
            for sign in (1, -1):
                weight[place] += sign * step
                ends.append(wgan.gradient_penalty(critic, real, fake, mix).item())
                weight[place] -= sign * step
            assert abs((ends[0] - ends[1]) / (2 * step) - weight.grad[place].item()) < 1e-6


def test_flat_critic_has_a_finite_gradient():
    """At slope zero the norm has no derivative; the step must not become NaN."""
    critic, (real, fake, mix) = line(0, 0), pair()
    penalty = wgan.gradient_penalty(critic, real, fake, mix)
    penalty.backward()
    assert penalty == 1 and torch.isfinite(critic.weight.grad).all()


def check_losses(module):
    """Values of a linear critic by hand; who gets a gradient, and uphill which way."""
    critic, (real, fake, mix) = line(3, 4), pair()
    fake = fake.requires_grad_(True)
    values = module.critic_loss(critic, real, fake, mix, weight=2)
    distance = (critic(real).mean() - critic(fake).mean()).item()
    assert abs(values["distance"].item() - distance) < 1e-9 and abs(values["penalty"].item() - 16) < 1e-9
    assert abs(values["loss"].item() - (2 * 16 - distance)) < 1e-9
    values["loss"].backward()
    assert fake.grad is None
    module.generator_loss(critic, fake).backward()
    assert torch.allclose(fake.grad, -torch.tensor([3.0, 4.0], dtype=torch.float64) / 16)


@pytest.mark.parametrize("edit", [
    ("weight * penalty - distance", "weight * penalty + distance"),
    ("weight * penalty - distance", "penalty - distance"),
    ("on_real.mean() - on_fake.mean()", "on_fake.mean() - on_real.mean()"),
    ("torch.cat([real.detach(), fake.detach()])", "torch.cat([real.detach(), fake])"),
    ("return -_values(critic, fake).mean()", "return _values(critic, fake).mean()"),
])
def test_losses(edit):
    mutant_fails(check_losses, edit)


def check_frozen(module):
    critic, held = line(3, 4), nn.Linear(2, 1)
    held.bias.requires_grad_(False)
    fake = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    with module.frozen(critic, held):
        loss = module.generator_loss(critic, fake)
    loss.backward()
    assert critic.weight.grad is None and fake.grad.any()
    assert critic.weight.requires_grad and held.weight.requires_grad and not held.bias.requires_grad


@pytest.mark.parametrize("edit", [("            w.requires_grad_(False)", "            pass"),
                                  ("in module.parameters() if w.requires_grad]", "in module.parameters()]")])
def test_frozen(edit):
    mutant_fails(check_frozen, edit)


def test_a_linear_critic_ends_where_the_theory_says():
    """Slope 1 + δ/(2λ) for a shift of length δ = 5 and λ = 10."""
    critic, (real, _, mix) = line(0.1, 0.1), pair(64)
    adam = torch.optim.Adam(critic.parameters(), lr=0.02)
    for _ in range(500):
        values = wgan.critic_loss(critic, real, real - torch.tensor([3.0, 4.0]), mix)
        adam.zero_grad()
        values["loss"].backward()
        adam.step()
    assert abs(critic.weight.norm().item() - 1.25) < 1e-3 and abs(values["distance"].item() - 6.25) < 1e-2


def test_bf16_values_are_averaged_in_float32():
    real, fake, mix = (x.float() for x in pair(64))
    critic = wgan.Critic(2, (8,), seed())
    with torch.autocast("cpu", torch.bfloat16):
        values = wgan.critic_loss(critic, real, fake, mix)
    assert all(v.dtype == torch.float32 for v in values.values())
    exact = wgan.critic_loss(critic, real, fake, mix)
    assert abs(values["distance"] - exact["distance"]) < 0.05


# --- networks -------------------------------------------------------------------------------------------------


def test_networks():
    """MisGAN's widths by default; same seed, same weights; nobody's random numbers are touched."""
    before = torch.get_rng_state()
    critic = wgan.Critic(784, generator=seed())
    generator = wgan.Generator((1, 28, 28), last=nn.Sigmoid(), generator=seed())
    assert torch.equal(before, torch.get_rng_state())
    assert [w.shape[0] for w in critic.parameters() if w.ndim == 2] == [512, 256, 128, 1]
    assert [w.shape[0] for w in generator.parameters() if w.ndim == 2] == [256, 512, 784]
    again = wgan.Critic(784, generator=seed())
    assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), again.parameters(), strict=True))
    drawn = wgan.draw(generator, 3, seed(1))
    assert drawn.shape == (3, 1, 28, 28) and critic(drawn).shape == (3,) and 0 <= drawn.min() and drawn.max() <= 1
    weights = torch.cat([w.flatten() for w in wgan.dense((100, 1000), seed()).parameters()])
    assert 0.095 < weights.abs().max() <= 0.1 and abs(weights.std() - 0.1 / math.sqrt(3)) < 1e-3
    assert torch.equal(wgan.draw(generator, 3, seed(1)), drawn) and not drawn.requires_grad


# --- spread and coverage ----------------------------------------------------------------------------------------


def check_spread(module):
    real = torch.randn(300, 3, generator=seed())
    assert abs(module.spread_ratio(real, torch.randn(200, 3, generator=seed(1))).item() - 1) < 0.1
    assert abs(module.spread_ratio(real, 3 * real + 5).item() - 3) < 1e-4
    assert module.spread_ratio(real, real[:200]) == module.spread_ratio(real, real[:200])  # the pairs are seeded
    assert module.spread_ratio(real, torch.ones(50, 3)).item() == 0
    one = torch.rand(300, 1, generator=seed(2))
    assert abs(module.spread_ratio(one, one.sort(0)[0]).item() - 1) < 0.1  # rows may come sorted
    for period in (2, 16):  # or in turns
        turns = (torch.arange(512) % period).float()[:, None] + 0.01 * torch.randn(512, 1, generator=seed(4))
        mixed = turns[torch.randperm(512, generator=seed(5))]
        assert abs(module.spread_ratio(mixed, turns).item() - 1) < 0.05
    two = torch.tensor([[0.0], [1.0]])
    assert abs(module.spread_ratio(two, 3 * torch.rand(2000, 1, generator=seed(6))) - 1) < 0.05  # no row meets itself


def check_apart(module):
    """0 for equal distributions, 1 for two points; by all pairs in between; no unit."""
    real, fake = torch.randn(400, 2, generator=seed()), torch.randn(300, 2, generator=seed(1))
    assert abs(module.apartness(real, fake)) < 0.02 and abs(module.apartness(real, real)) < 0.02
    assert module.apartness(torch.zeros(5, 2), torch.ones(5, 2)) == 1
    moved = 0.5 * fake + torch.tensor([1.0, 0.0])
    own = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (real, moved)]
    exact = 1 - (own[0] + own[1]) / (2 * torch.cdist(real, moved).mean())
    assert exact > 0.1 and abs(module.apartness(real, moved) - exact) < 0.02
    assert abs(module.apartness(7 * real + 3, 7 * moved + 3) - module.apartness(real, moved)) < 1e-5


def check_coverage(module):
    real = torch.randn(300, 2, generator=seed())
    assert module.coverage(real, torch.randn(300, 2, generator=seed(1))) > 0.9
    assert module.coverage(real, real + 100) == 0
    line_ = torch.arange(4.0)[:, None]  # neighbours at 1: only the rows within 1 of the draw are covered
    assert module.coverage(line_, torch.tensor([[-0.5]]), k=1) == 0.25
    assert module.coverage(line_, torch.tensor([[0.5]]), k=1) == 0.5


@pytest.mark.parametrize("check, edit", [
    (check_spread, ("_mean_distance(fake) / _mean_distance(real)", "_mean_distance(real) / _mean_distance(fake)")),
    (check_spread, ("parts.append((x[i] - other)", "parts.append(x[i]")),
    (check_spread, ("x[(i + 1 + j) % n]", "x[j]")),
    (check_spread, ("x[(i + 1 + j) % n]", "x[(i + 1) % n]")),
    (check_apart, ("(2 * _mean_distance(real, fake))", "_mean_distance(real, fake)")),
    (check_apart, ("(_mean_distance(real) + _mean_distance(fake))", "(2 * _mean_distance(real))")),
    (check_apart, ("else y[j]", "else y[i % m]")),
    (check_coverage, (".kthvalue(k + 1, dim=1)", ".kthvalue(k, dim=1)")),
    (check_coverage, ("_distances(real, fake).min(dim=1)", "_distances(fake, real).min(dim=1)")),
])
def test_spread_and_coverage(check, edit):
    mutant_fails(check, edit)


def warned(module, fake, **options):
    real = torch.randn(200, 2, generator=seed())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.check_generator(real, fake, **options)
    return " ".join(str(w.message) for w in caught)


def check_detection(module):
    sound = torch.randn(200, 2, generator=seed(1))
    assert warned(module, sound, min_coverage=0.5) == ""
    assert "collapsed" in warned(module, 0.01 * sound)
    assert "ran away" in warned(module, 50 * sound)
    assert "misses" in warned(module, sound + 100) and "misses" in warned(module, sound + 1)
    assert "leaves data out" in warned(module, sound + 4, min_coverage=0.5, farthest=1)
    assert warned(module, sound + 4, farthest=1) == ""


@pytest.mark.parametrize("edit", [
    ("if not spread >= lowest:", "if False:"), ("if spread > highest else", "if False else"),
    ('if not trouble and found["apart"] > farthest:', "if False:"),
    ('if not trouble and found["coverage"] < min_coverage:', "if False:"),
])
def test_detection(edit):
    mutant_fails(check_detection, edit)


def test_a_warning_points_at_the_caller():
    with pytest.warns(RuntimeWarning, match="collapsed") as caught:
        copy_of(wgan).check_generator(torch.randn(20, 2, generator=seed()), torch.zeros(20, 2))
    assert caught[0].filename == __file__


def check_faults_of_the_data(module):
    """Draws that are not finite are the generator's fault; data that are not, or that are all the same, are not."""
    nan, sound = torch.full((4, 2), torch.nan), torch.randn(4, 2, generator=seed())
    for real, fake, kind, words in ((sound, nan, TrainingDiverged, "NaN"), (nan, sound, ValueError, "8 entries"),
                                    (torch.ones(4, 2), sound, ValueError, "the same"),
                                    (torch.ones(4, 2), torch.ones(4, 2), ValueError, "the same")):
        try:
            module.check_generator(real, fake)
        except (ValueError, TrainingDiverged) as error:
            assert isinstance(error, kind) and words in str(error)
        else:
            raise AssertionError("no error")


@pytest.mark.filterwarnings("ignore:the generator:RuntimeWarning")
@pytest.mark.parametrize("edit", [("if (real == real[:1]).all():", "if False:"),
                                  ("    if not torch.isfinite(fake).all():", "    if False:"),
                                  ("len(real) < 2 or not torch.isfinite(real).all()", "len(real) < 2")])
def test_whose_fault(edit):
    mutant_fails(check_faults_of_the_data, edit)


# --- the running mean of the weights ------------------------------------------------------------------------------


def check_average(module):
    """a ← a + w (c − a) with w = max(1 − decay, 9 / (10 + n)); a count is copied; the module itself is left alone."""
    network = nn.BatchNorm1d(1)
    mean, by_hand = module.weight_average(network, 0.6), 1.0
    for n, value in enumerate((2.0, -1.0, 4.0) * 6):
        network.weight.data.fill_(value)
        network.running_mean.fill_(value - 1)
        network.num_batches_tracked.fill_(n)
        mean.update_parameters(network)
        by_hand += max(0.4, 9 / (10 + n)) * (value - by_hand)
    assert abs(mean.module.weight.item() - by_hand) < 1e-5 and abs(mean.module.running_mean.item() - by_hand + 1) < 1e-5
    assert mean.module.num_batches_tracked == 17 == mean.n_averaged - 1 and network.weight.item() == 4
    assert network.training and not mean.module.training and not any(w.requires_grad for w in mean.parameters())
    last = module.weight_average(network, 0.0)
    network.weight.data.fill_(7)
    last.update_parameters(network)
    assert last.module.weight.item() == 7


@pytest.mark.parametrize("edit", [
    ("clamp(min=1 - decay)", "clamp(min=decay)"), ("w = (9 / (10 + n))", "w = (1 / (10 + n))"),
    ("a.lerp_(c.to(a.dtype), w.to(a.dtype))", "a.lerp_(c.to(a.dtype), 1 - w.to(a.dtype))"),
    ("            if not a.is_floating_point():", "            if False:"),
    ("self.n_averaged += 1", "pass"),
])
def test_average(edit):
    mutant_fails(check_average, edit)


def test_average_is_stored_and_restored():
    network = nn.Linear(2, 1)
    mean, other = wgan.weight_average(network), wgan.weight_average(network)
    for _ in range(3):
        network.weight.data += 1
        mean.update_parameters(network)
    other.load_state_dict(mean.state_dict())
    for each in (mean, other):
        network.weight.data.zero_()
        each.update_parameters(network)
    assert torch.equal(mean.module.weight, other.module.weight) and mean.n_averaged == other.n_averaged == 4


# --- the loop -----------------------------------------------------------------------------------------------------


def players(latent=2, hidden=(16, 16), module=wgan):
    return module.Generator(2, latent, hidden, generator=seed()), module.Critic(2, hidden, seed(1))


def far_cloud(n=512):
    return torch.randn(n, 2, generator=seed(5)) * 0.3 + torch.tensor([3.0, -2.0])


def check_learns(module, epochs=25):
    """From the origin to a cloud 3.6 away."""
    generator, critic = players(module=module)
    x = far_cloud()
    begin = wgan.wasserstein1(wgan.draw(generator, 256, seed(3)), x[:256])
    run = quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        module.train_wgan(generator, critic, x, run, epochs, 64, learning_rate=5e-3)
    end = wgan.wasserstein1(wgan.draw(generator, 256, seed(3)), x[:256])
    assert begin > 3 and end < begin / 3, (begin, end)
    assert not generator.training and not critic.training
    assert {"distance", "penalty", "spread", "apart"} <= set(run.history.columns)
    assert np.isfinite(run.history).all().all()


@pytest.mark.parametrize("edit", [
    ("return -_values(critic, fake).mean()", "return _values(critic, fake).mean()"),
    ("weight * penalty - distance", "weight * penalty + distance"),
    ("if step % n_critic == 0:", "if False:"),
])
def test_training_brings_draws_to_the_data(edit):
    mutant_fails(check_learns, edit)


def check_rhythm(module):
    """Two batches an epoch, five critic steps: a step of the generator after steps 5, 10, 15 and 20 of 20."""
    generator, critic = players(module=module)
    calls = []
    take = TrainingRun.count_step
    try:
        TrainingRun.count_step = lambda self, loss: (calls.append("step"), take(self, loss))[1]
        loss_of, order = module.generator_loss, []
        module.generator_loss = lambda *a: (order.append(len(calls)), loss_of(*a))[1]
        module.train_wgan(generator, critic, far_cloud(20), quiet(), 10, 10)
    finally:
        TrainingRun.count_step, module.generator_loss = take, loss_of
    assert order == [5, 11, 17, 23] and len(calls) == 24


@pytest.mark.filterwarnings("ignore:the generator:RuntimeWarning")
@pytest.mark.parametrize("edit", [("epoch * per_epoch + 1)", "1)"), ("n_critic: int = 5", "n_critic: int = 2")])
def test_five_to_one(edit):
    mutant_fails(check_rhythm, edit)


def waits(module, n_batches, monkeypatch):
    """How often a number was fetched from a tensor."""
    count = [0]
    generator, critic = players(module=module)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "cpu"):
            method = getattr(torch.Tensor, name)

            def counted(self, *args, _method=method, **options):
                count[0] += 1
                return _method(self, *args, **options)

            patch.setattr(torch.Tensor, name, counted)
        module.train_wgan(generator, critic, far_cloud(10 * n_batches), quiet(), 2, 10)
    return count[0]


@pytest.mark.filterwarnings("ignore:the generator:RuntimeWarning")
def test_no_step_waits_for_the_device(monkeypatch):
    assert waits(wgan, 30, monkeypatch) <= waits(wgan, 5, monkeypatch) + 4
    mutant = copy_of(wgan, ('run.log(distance=values["distance"]', 'run.log(distance=values["distance"].item()'))
    assert waits(mutant, 30, monkeypatch) > waits(mutant, 5, monkeypatch) + 4


def weights_of(*networks):
    return torch.cat([w.detach().flatten() for network in networks for w in network.parameters()])


def interrupted(path, stop):
    def at(epoch, shown):
        if epoch == stop:
            raise KeyboardInterrupt

    generator, critic = players()
    run = quiet(checkpoint=path, checkpoint_seconds=0)
    run._mark_steps = 1
    wgan.train_wgan(generator, critic, far_cloud(96), run, 8, 32, on_epoch=at)
    return weights_of(generator, critic)


@pytest.mark.filterwarnings("ignore:the generator:RuntimeWarning")
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path):
    whole = interrupted(tmp_path / "a", None)
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "b", 4)
    assert (tmp_path / "b").exists()
    assert torch.equal(interrupted(tmp_path / "b", None), whole)
    generator, critic = players()
    wgan.train_wgan(generator, critic, far_cloud(96), quiet(seed=1), 8, 32)
    assert not torch.equal(weights_of(generator, critic), whole)  # the mutant: other noise, other weights


def test_a_run_that_collapses_says_so():
    generator, critic = players()
    with torch.no_grad():
        for w in generator.parameters():
            w.zero_()
    with pytest.warns(RuntimeWarning, match="collapsed"):
        wgan.train_wgan(generator, critic, far_cloud(64), quiet(), 5, 64)


def check_ends_with_the_mean(module):
    """What on_epoch was shown last is what the generator ends with: the mean, or without one the last weights."""
    def ends(average):
        generator, critic = players(module=module)
        seen = {}
        note = lambda _, shown: seen.update(shown=weights_of(shown), last=weights_of(generator))  # noqa: E731
        module.train_wgan(generator, critic, far_cloud(96), quiet(), 10, 32, on_epoch=note, average=average)
        assert torch.equal(weights_of(generator), seen["shown"])
        return torch.equal(seen["shown"], seen["last"])

    assert [ends(average) for average in (0.999, None, 0)] == [False, True, True]


@pytest.mark.filterwarnings("ignore:the generator:RuntimeWarning")
@pytest.mark.parametrize("edit", [
    ("    generator.load_state_dict(mean.module.state_dict())", "    pass"),
    ("                mean.update_parameters(generator)", "                pass"),
    ("average or 0.0", "0.0"), ("average or 0.0", "0.999"),
    ("on_epoch(epoch, mean.module)", "on_epoch(epoch, generator)"),
])
def test_the_generator_ends_with_the_mean(edit):
    mutant_fails(check_ends_with_the_mean, edit)


@pytest.mark.filterwarnings("ignore:the generator:RuntimeWarning")
def test_types_of_data_and_networks():
    """Any type of numbers trains, to the same result; weights may be float64, and a step may run in 16 bits."""
    ends = {}
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int64):
        generator, critic = players()
        wgan.train_wgan(generator, critic, (4 * far_cloud(64)).round().to(dtype), quiet(), 4, 32)
        ends[dtype] = weights_of(generator, critic)
    assert all(torch.equal(end, ends[torch.float32]) for end in ends.values())
    generator, critic = (network.double() for network in players())
    wgan.train_wgan(generator, critic, far_cloud(64), quiet(), 4, 32)
    assert weights_of(generator).dtype == torch.float64 and torch.isfinite(weights_of(generator, critic)).all()
    for precision in ("float32", "bf16"):
        generator, critic = players()
        wgan.train_wgan(generator, critic, far_cloud(64), quiet(precision=precision), 10, 32)
        ends[precision] = weights_of(generator, critic)
    assert 0 < (ends["bf16"] - ends["float32"]).abs().max() < 0.05 and ends["bf16"].dtype == torch.float32


def test_pictures_and_images_of_another_critic():
    """Convolutional networks with a value of shape (batch, 1, 1, 1)."""
    x = torch.rand(32, 1, 8, 8, generator=seed())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critic = nn.Sequential(nn.Conv2d(1, 4, 4, 2), nn.LeakyReLU(), nn.Conv2d(4, 1, 3))
    generator = wgan.Generator((1, 8, 8), 4, (16,), nn.Sigmoid(), seed())
    before = [w.detach().clone() for network in (generator, critic) for w in network.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        wgan.train_wgan(generator, critic, x, quiet(), 5, 16, n_critic=2)
    after = [w for network in (generator, critic) for w in network.parameters()]
    shift = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(shift[:-1])  # all but the critic's last bias, which no difference of means can feel


def trains(x=None, networks=None, **options):
    return lambda: wgan.train_wgan(*(networks or players()), far_cloud(20) if x is None else x, quiet(), **options)


NORMALIZED = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


@pytest.mark.parametrize("call, words", [
    (lambda: wgan.wasserstein1(torch.zeros(3, 2), torch.zeros(4, 2)), "3 rows and y 4"),
    (lambda: wgan.wasserstein1(torch.zeros(0, 2), torch.zeros(0, 2)), "0 and 0 rows"),
    (lambda: wgan.wasserstein1(torch.zeros(3), torch.zeros(3)), "cannot be compared"),
    (lambda: wgan.wasserstein1(torch.zeros(4, 1, 2, 2), torch.zeros(4, 4)), "cannot be compared"),
    (lambda: wgan.wasserstein1(torch.full((3, 2), torch.nan), torch.zeros(3, 2)), "all finite"),
    (lambda: wgan.gradient_penalty(nn.Linear(2, 1), torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3)),
     "as many rows"),
    (lambda: wgan.gradient_penalty(nn.Linear(2, 1), *(torch.zeros(3, 2),) * 2, torch.zeros(1)), "one number a row"),
    (lambda: wgan.gradient_penalty(nn.Linear(2, 2), *(torch.zeros(3, 2),) * 2, torch.zeros(3)), "one number a row"),
    (lambda: wgan.slopes(lambda x: torch.ones(len(x)), torch.zeros(3, 2)), "do not depend"),
    (lambda: wgan.slopes(lambda x: torch.ones(len(x), requires_grad=True), torch.zeros(3, 2)), "do not depend"),
    (lambda: wgan.critic_loss(nn.Linear(2, 1), *(torch.zeros(3, 2),) * 2, torch.zeros(3), -1), "weight=-1"),
    (lambda: wgan.generator_loss(nn.Linear(2, 2), torch.zeros(3, 2)), "one number a row"),
    (lambda: wgan.dense((3,)), "two or more"),
    (lambda: wgan.Critic(2, (0,)), "two or more"),
    (lambda: wgan.spread_ratio(torch.zeros(1, 2), torch.zeros(4, 2)), "2 or more"),
    (lambda: wgan.check_generator(torch.rand(16, 2), torch.rand(16, 5)), "cannot be compared"),
    (lambda: wgan.coverage(torch.zeros(4, 2), torch.zeros(4, 2), k=4), "k=4 with 4 rows"),
    (lambda: wgan.coverage(torch.full((8, 2), torch.nan), torch.zeros(4, 2)), "finite"),
    (lambda: wgan.weight_average(nn.Linear(2, 1), 1.0), "decay=1.0"),
    (trains(torch.zeros(1, 2)), "1 rows"),
    (trains(torch.full((4, 2), torch.nan)), "8 entries"),
    (trains(torch.ones(4, 2)), "the same"),
    (trains(n_critic=0), "n_critic=0"), (trains(n_critic=2.5), "n_critic=2.5"),
    (trains(n_critic=10**6), "100 steps of the critic"), (trains(far_cloud(6), max_epochs=4), "4 steps of the critic"),
    (trains(batch_size=0), "batch_size=0"), (trains(max_epochs=0), "max_epochs=0"), (trains(weight=-10), "weight=-10"),
    (trains(average=1.5), "decay=1.5"),
    (trains(networks=(players()[0], players()[1].double())), "one type"),
    (trains(networks=(players()[0], NORMALIZED)), "normalizes over the batch"),
    (trains(networks=(nn.Linear(2, 2), nn.Linear(2, 1))), "no `latent`"),
])
def test_clear_errors(call, words):
    refuses(call, ValueError, words)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore:the generator:RuntimeWarning")
def test_gpu():
    """The double differentiation is recorded and replayed; penalty and losses agree with the CPU's."""
    critic, (real, fake, mix) = wgan.Critic(2, (16, 16), seed()), (x.float() for x in pair(64))
    on_cpu = wgan.critic_loss(critic, real, fake, mix)
    on_gpu = wgan.critic_loss(critic.cuda(), real.cuda(), fake.cuda(), mix.cuda())
    assert all(abs(on_cpu[name] - on_gpu[name].cpu()) < 1e-3 for name in on_cpu)
    generator, critic = players()
    x, run = far_cloud(), quiet(device="cuda")
    wgan.train_wgan(generator, critic, x, run, 25, 64, learning_rate=5e-3)
    assert all(stepper.graph is not None for stepper in run.steppers)
    assert wgan.wasserstein1(wgan.draw(generator, 256, seed(3)), x[:256]) < 1.2
