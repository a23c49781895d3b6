"""Invertible layers: round trip, log-determinants against jacfwd, densities, precision, bad input; mutations run."""

import math

import pytest
import torch
from conftest import refuses, seed
from torch import nn
from torch.func import jacfwd, vmap

from missingbook.flows import coupling
from missingbook.flows.coupling import (
    AdditiveCoupling,
    AffineCoupling,
    Conditioner,
    Flow,
    GaussianBase,
    Logit,
    Sequence,
    bits_per_dimension,
    channel_mask,
    checkerboard_mask,
    dequantize,
    half_mask,
    random_half_masks,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
WIDTH = 5


def conditioner(mask, heads=2, **options):
    return Conditioner(int(mask.sum()), int((~mask).sum()), heads, 8, zero_last=False, generator=seed(), **options)


def affine(mask, **options):
    return AffineCoupling(mask, conditioner(mask), **options)


def additive(mask):
    return AdditiveCoupling(mask, conditioner(mask, heads=1))


MASKS = random_half_masks(WIDTH, 4, seed(7))
LAYERS = {
    "affine": lambda: affine(MASKS[0]),
    "affine, learned bound": lambda: affine(MASKS[1], bound=2.0, learn_bound=True),
    "affine, one kept": lambda: affine(torch.arange(WIDTH) == 3),
    "additive": lambda: additive(MASKS[0]),
    "logit": lambda: Logit(0.05),
    "sequence": lambda: Sequence([Logit(0.1), *(affine(m) for m in MASKS), additive(MASKS[2])]),
}


def check_layer(layer, x):
    """Round trip to 1e-10, log-determinants to 1e-8, one a row, of the map that was applied."""
    z, log_det = layer(x)
    back, log_det_back = layer.inverse(z)
    jacobian = vmap(jacfwd(lambda row: layer(row[None])[0][0]))(x)
    jacobian_back = vmap(jacfwd(lambda row: layer.inverse(row[None])[0][0]))(z)
    assert log_det.shape == log_det_back.shape == (len(x),)
    assert (back - x).abs().max() < 1e-10
    assert (log_det - torch.linalg.slogdet(jacobian)[1]).abs().max() < 1e-8
    assert (log_det_back - torch.linalg.slogdet(jacobian_back)[1]).abs().max() < 1e-8


def unit_rows(n=6):
    return torch.rand(n, WIDTH, dtype=torch.float64, generator=seed(1))


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    check_layer(LAYERS[name]().double(), unit_rows())


IMAGE_MASKS = [[m] for m in torch.eye(4, dtype=torch.bool)] + [list(random_half_masks(4, 6, seed()))]


@pytest.mark.parametrize("masks", IMAGE_MASKS)
def test_couplings_serve_images_too(masks):
    class Bend(nn.Module):
        def __init__(self, n_out):
            super().__init__()
            self.n_out = n_out

        def forward(self, kept):
            return torch.stack([torch.sin(kept.sum(1, keepdim=True)), kept.mean(1, keepdim=True)]).expand(
                2, -1, self.n_out, -1, -1)

    layer = Sequence([AffineCoupling(m, Bend(int((~m).sum()))) for m in masks])
    x = torch.randn(3, 4, 2, 3, dtype=torch.float64, generator=seed())
    z, log_det = layer(x)
    jacobian = vmap(jacfwd(lambda r: layer(r[None])[0].flatten()))(x).view(3, 24, 24)
    assert (layer.inverse(z)[0] - x).abs().max() < 1e-10
    assert (log_det - torch.linalg.slogdet(jacobian)[1]).abs().max() < 1e-8


def dropped(self, x):
    log_scale, shift, old = self._log_scale_and_shift(x)
    return self._with(x, torch.addcmul(shift, old, log_scale.exp())), log_scale.new_zeros(len(x))


def half_of_the_sum(self, x):
    z, log_det = FORWARD(self, x)
    return z, log_det / 2


def mean_over_the_batch(self, x):
    z, log_det = FORWARD(self, x)
    return z, log_det.mean().expand(len(x))


def wrong_sign(self, z):
    log_scale, shift, old = self._log_scale_and_shift(z)
    return self._with(z, (old - shift) * log_scale.exp()), -log_scale.flatten(1).sum(1)


def wrong_order(self, z):
    log_scale, shift, old = self._log_scale_and_shift(z)
    return self._with(z, old * torch.exp(-log_scale) - shift), -log_scale.flatten(1).sum(1)


def forward_log_det(self, z):
    x, log_det = INVERSE(self, z)
    return x, -log_det


def no_scale_bound(self, x):
    (raw, shift), old = self._parameters_for(x)
    return raw, shift, old


FORWARD, INVERSE = AffineCoupling.forward, AffineCoupling.inverse
MUTANTS = [("forward", dropped), ("forward", half_of_the_sum), ("forward", mean_over_the_batch),
           ("inverse", wrong_sign), ("inverse", wrong_order), ("inverse", forward_log_det)]


@pytest.mark.parametrize("method, mutant", MUTANTS, ids=lambda m: getattr(m, "__name__", m))
def test_the_referee_catches(monkeypatch, method, mutant):
    layer = affine(MASKS[0], bound=1.5).double()
    check_layer(layer, unit_rows())
    monkeypatch.setattr(AffineCoupling, method, mutant)
    with pytest.raises(AssertionError):
        check_layer(layer, unit_rows())


def test_the_referee_catches_a_conditioner_that_sees_what_changes(monkeypatch):
    """A flipped mask: the entries that change feed the networks, and the inverse no longer knows them."""
    mask = torch.tensor([True, True, False, False])
    layer = affine(mask).double()
    rows = torch.randn(4, 4, dtype=torch.float64, generator=seed())
    check_layer(layer, rows)
    layer.kept = layer.changed
    with pytest.raises(AssertionError):
        check_layer(layer, rows)


def check_sequence():
    check_layer(LAYERS["sequence"]().double(), unit_rows())


@pytest.mark.parametrize("mutant", ["order", "only the last"])
def test_the_referee_catches_a_wrong_sequence(monkeypatch, mutant):
    def same_order(self, z):
        total = 0.0
        for layer in self.layers:
            z, log_det = layer.inverse(z)
            total = total + log_det
        return z, total

    def last(self, x):
        for layer in self.layers:
            x, log_det = layer(x)
        return x, log_det

    check_sequence()
    monkeypatch.setattr(Sequence, *(("inverse", same_order) if mutant == "order" else ("forward", last)))
    with pytest.raises(AssertionError):
        check_sequence()


def check_mask_is_kept(layer, mask):
    x = torch.randn(20, len(mask), generator=seed())
    z = layer(x)[0]
    assert torch.equal(z[:, mask], x[:, mask])
    assert ((z - x)[:, ~mask] != 0).all()


def test_true_stays(monkeypatch):
    mask = torch.tensor([True, False, True, False, False])
    check_mask_is_kept(affine(mask), mask)
    flipped = AffineCoupling(~mask, Conditioner(3, 2, hidden=8, zero_last=False, generator=seed()))
    with pytest.raises(AssertionError):
        check_mask_is_kept(flipped, mask)


def check_scale_is_bounded():
    layer = affine(MASKS[0], bound=0.7)
    for weight in layer.parameters():
        weight.data.mul_(20)
    log_det = layer(100 * torch.randn(50, WIDTH, generator=seed()))[1]
    assert log_det.abs().max() <= 0.7 * int((~MASKS[0]).sum()) + 1e-5
    assert log_det.abs().max() > 1  # the weights do reach the bound


def test_scale_is_bounded(monkeypatch):
    check_scale_is_bounded()
    monkeypatch.setattr(AffineCoupling, "_log_scale_and_shift", no_scale_bound)
    with pytest.raises(AssertionError):
        check_scale_is_bounded()


def toy_flow(**options):
    masks = random_half_masks(2, 4, seed())
    return Flow([affine(m, **options) for m in masks], GaussianBase(2))


def check_gradients(flow):
    x = torch.randn(32, 2, generator=seed())
    flow.log_prob(x).mean().backward()
    idle = [name for name, w in flow.named_parameters() if (w.grad != 0).float().mean() < 0.9]  # heads share a tensor
    assert idle == [], idle
    for weight in flow.parameters():
        weight.grad = None
    z = torch.randn(32, 2, generator=seed())
    back, log_det = flow.inverse(z)
    (back.square().sum() + log_det.sum()).backward()
    assert all(w.grad is not None and w.grad.any() for w in flow.parameters())


def test_every_parameter_gets_a_gradient(monkeypatch):
    check_gradients(toy_flow(learn_bound=True))
    original = AffineCoupling._log_scale_and_shift

    def detached(self, x):
        log_scale, shift, old = original(self, x)
        return log_scale, shift.detach(), old

    monkeypatch.setattr(AffineCoupling, "_log_scale_and_shift", detached)
    with pytest.raises(AssertionError):
        check_gradients(toy_flow(learn_bound=True))


def test_identity_at_first_and_learning_afterwards():
    mask = half_mask(4)
    layer = AffineCoupling(mask, Conditioner(2, 2, hidden=8, generator=seed()))
    x = torch.randn(20, 4, generator=seed())
    z, log_det = layer(x)
    assert torch.equal(z, x) and not log_det.any()
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        z, log_det = layer(x)
        (0.5 * z.square().sum(1) - log_det).mean().backward()
        optimizer.step()
    assert all(w.grad.any() for w in layer.parameters())


def check_density(flow):
    """The density integrates to one, and the draws come from it."""
    side = torch.linspace(-12, 12, 601)
    lattice = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).view(-1, 2)
    with torch.no_grad():
        total = flow.log_prob(lattice).exp().sum().item() * (side[1] - side[0]).item() ** 2
        assert abs(total - 1) < 0.01, total
        draws = flow.sample(40_000, generator=seed(3))
        z = flow.base.sample(40_000, generator=seed(4))
        log_det = flow.inverse(z)[1]
        entropy = 1 + math.log(2 * math.pi) + flow.base.cholesky.diagonal().log().sum() + log_det.mean()
        assert abs(entropy + flow.log_prob(draws).mean()) < 0.04
        quadrant = (lattice > 0).all(1)
        inside = flow.log_prob(lattice[quadrant]).exp().sum().item() * (side[1] - side[0]).item() ** 2
        assert abs(inside - (draws > 0).all(1).float().mean()) < 0.015


def bent_flow():
    flow = toy_flow()
    for weight in flow.parameters():
        weight.data.mul_(1.6)
    flow.base.set(torch.tensor([0.5, -0.3]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]))
    return flow


@pytest.mark.parametrize("method, mutant", [("forward", dropped), ("inverse", wrong_sign)])
def test_draws_agree_with_the_density(monkeypatch, method, mutant):
    check_density(bent_flow())
    monkeypatch.setattr(AffineCoupling, method, mutant)
    with pytest.raises(AssertionError):
        check_density(bent_flow())


def check_base(base, dtype=torch.float64):
    half = torch.randn(4, 4, dtype=torch.float64, generator=seed())
    mean, covariance = torch.arange(4.0, dtype=torch.float64), half @ half.T + torch.eye(4)
    base.set(mean, covariance)
    referee = torch.distributions.MultivariateNormal(mean, covariance)
    z = torch.randn(10, 4, dtype=torch.float64, generator=seed(1))
    assert torch.allclose(base.log_prob(z), referee.log_prob(z), atol=1e-10)
    draws = base.sample(200_000, 0.5, seed(2))
    assert torch.allclose(torch.cov(draws.T), 0.25 * covariance, atol=0.05)
    assert torch.allclose(draws.mean(0), mean, atol=0.02)


def no_log_diagonal(self, z):
    white = torch.linalg.solve_triangular(self.cholesky, (z - self.mean).T, upper=False)
    return -0.5 * z.shape[1] * math.log(2 * math.pi) - 0.5 * white.square().sum(0)


def transposed(self, n, temperature=1.0, generator=None):
    noise = torch.randn(n, len(self.mean), generator=generator, dtype=self.mean.dtype)
    return self.mean + temperature * noise @ self.cholesky


def variance_not_deviation(self, n, temperature=1.0, generator=None):
    return SAMPLE(self, n, temperature**0.5, generator)


SAMPLE = GaussianBase.sample


@pytest.mark.parametrize("method, mutant", [
    ("log_prob", no_log_diagonal), ("sample", transposed), ("sample", variance_not_deviation)])
def test_base(monkeypatch, method, mutant):
    check_base(GaussianBase(4).double())
    monkeypatch.setattr(GaussianBase, method, mutant)
    with pytest.raises(AssertionError):
        check_base(GaussianBase(4).double())


def test_base_survives_storage_and_stays_out_of_the_parameters():
    base, other = GaussianBase(3), GaussianBase(3)
    assert not list(base.parameters()) and base.standard
    base.set(torch.ones(3), 2 * torch.eye(3))
    other.load_state_dict(base.state_dict())
    z = torch.randn(5, 3, generator=seed())
    assert not other.standard and torch.equal(base.log_prob(z), other.log_prob(z))
    base.load_state_dict(GaussianBase(3).state_dict())
    assert base.standard and torch.allclose(base.log_prob(z), torch.distributions.Normal(0, 1).log_prob(z).sum(1))
    assert torch.allclose(other.covariance, 2 * torch.eye(3))


@pytest.mark.parametrize("mean, covariance, words", [
    (torch.zeros(2), torch.eye(3), "width 3"),
    (torch.zeros(3), torch.eye(2), "width 3"),
    (torch.full((3,), torch.nan), torch.eye(3), "NaN"),
    (torch.zeros(3), -torch.eye(3), "positive definite"),
    (torch.zeros(3), torch.ones(3, 3), "positive definite"),
    (torch.zeros(3), torch.eye(3) + torch.tensor([[0, 0.5, 0], [0, 0, 0], [0, 0, 0]]), "symmetric"),
])
def test_base_refuses(mean, covariance, words):
    base = GaussianBase(3)
    refuses(lambda: base.set(mean, covariance), ValueError, words)
    assert base.standard and torch.equal(base.cholesky, torch.eye(3))  # nothing half done


def check_autocast(device="cpu"):
    """In bf16 the products are rough, everything else is not: log-determinants stay float32, near the exact ones."""
    masks = random_half_masks(40, 4, seed())
    flow = Flow([affine(m) for m in masks], GaussianBase(40)).to(device)
    x = torch.randn(64, 40, generator=seed()).to(device)
    exact_z, exact = flow(x)
    with torch.autocast(device, torch.bfloat16):
        z, log_det = flow(x)
        back, _ = flow.inverse(z)
        log_prob = flow.log_prob(x)
    assert z.dtype == log_det.dtype == log_prob.dtype == torch.float32
    assert 0 < (z - exact_z).abs().max() < 0.1  # bf16 was used, and does little harm
    assert (log_det - exact).abs().max() < 0.05
    assert (back - x).abs().max() < 0.05
    (-log_prob.mean()).backward()
    assert all(w.grad.dtype == torch.float32 and torch.isfinite(w.grad).all() for w in flow.parameters())


def test_autocast(monkeypatch):
    check_autocast()

    def in_low_precision(self, x):
        coupling._check_features(x, self.width)
        old = x.index_select(1, self.changed).bfloat16()
        return self.conditioner(x.index_select(1, self.kept)), old

    monkeypatch.setattr(AffineCoupling, "_parameters_for", in_low_precision)
    with pytest.raises((AssertionError, RuntimeError)):
        check_autocast()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu():
    check_autocast("cuda")
    flow, x = bent_flow(), torch.randn(100, 2, generator=seed())
    on_cpu = flow.log_prob(x)
    on_gpu = flow.cuda().log_prob(x.cuda())
    assert torch.allclose(on_cpu, on_gpu.cpu(), atol=1e-4)
    there = flow.sample(5, generator=seed())
    assert there.is_cuda and flow.sample(5).is_cuda
    assert torch.allclose(there.cpu(), flow.cpu().sample(5, generator=seed()), atol=1e-4)


def test_float32_agrees_with_float64():
    flow, x = bent_flow(), torch.randn(100, 2, generator=seed())
    assert torch.allclose(flow.log_prob(x).double(), flow.double().log_prob(x.double()), atol=1e-4)


def test_rows_do_not_know_each_other():
    flow, x = bent_flow(), torch.randn(100, 2, generator=seed())
    assert torch.allclose(flow.log_prob(x)[:7], flow.log_prob(x[:7]), atol=1e-5)
    assert flow.log_prob(x[:0]).shape == (0,) and flow.sample(0).shape == (0, 2)


def test_draws_follow_generator_and_temperature():
    flow = bent_flow()
    state = torch.get_rng_state()
    assert torch.equal(flow.sample(9, generator=seed(1)), flow.sample(9, generator=seed(1)))
    assert not torch.equal(flow.sample(9, generator=seed(1)), flow.sample(9, generator=seed(2)))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are touched
    assert flow.sample(9, 0.0).std(0).max() < 1e-6 and not flow.sample(2).requires_grad
    with pytest.raises(ValueError, match="temperature=-1"):
        flow.sample(3, -1)


def check_masks():
    for width in (2, 5, 8):
        masks = random_half_masks(width, 5, seed())
        assert masks.shape == (5, width) and masks.dtype == torch.bool
        assert torch.equal(masks[1:4:2], ~masks[0:4:2]) and (masks[::2].sum(1) == width // 2).all()
    assert len({tuple(m.tolist()) for m in random_half_masks(30, 6, seed())}) == 6
    assert checkerboard_mask(2, 3).tolist() == [[True, False, True], [False, True, False]]
    assert channel_mask(4).tolist() == half_mask(4).tolist() == [True, True, False, False]
    assert torch.equal(random_half_masks(30, 6, seed()), random_half_masks(30, 6, seed()))


def test_masks(monkeypatch):
    check_masks()
    right = coupling.half_mask
    monkeypatch.setattr(coupling, "half_mask", lambda width: ~right(width))
    with pytest.raises(AssertionError):
        check_masks()


@pytest.mark.parametrize("call, words", [
    (lambda: half_mask(1), "width=1"),
    (lambda: random_half_masks(1, 2), "width=1"),
    (lambda: random_half_masks(4, 0), "n_layers=0"),
    (lambda: checkerboard_mask(1, 1), "2 pixels"),
    (lambda: channel_mask(1), "2 or more"),
    (lambda: affine(torch.ones(4, dtype=torch.bool)), "hidden|n_out|one entry that stays"),
    (lambda: AffineCoupling(torch.ones(4, dtype=torch.bool), nn.Identity()), "4 True"),
    (lambda: AffineCoupling(torch.zeros(4, dtype=torch.bool), nn.Identity()), "0 True"),
    (lambda: AdditiveCoupling(torch.ones(2, 2, dtype=torch.bool), nn.Identity()), "one-dimensional"),
    (lambda: affine(half_mask(4), bound=0), "bound=0"),
    (lambda: Conditioner(0, 2), "n_in=0"),
    (lambda: Conditioner(2, 2, n_hidden=0), "n_hidden=0"),
    (lambda: Sequence([]), "empty"),
    (lambda: Logit(0.5), "alpha=0.5"),
    (lambda: affine(half_mask(4))(torch.zeros(3, 5)), "built for .batch, 4"),
    (lambda: affine(half_mask(4))(torch.zeros(4)), "built for .batch, 4"),
    (lambda: additive(half_mask(4)).inverse(torch.zeros(3, 5)), "built for .batch, 4"),
    (lambda: AffineCoupling(half_mask(4), nn.Linear(2, 2))(torch.zeros(3, 4)), "the conditioner gave"),
    (lambda: toy_flow().log_prob(torch.tensor([[0.0, torch.nan]])), "1 NaN"),
    (lambda: toy_flow().log_prob(torch.tensor([[0.0, torch.inf]])), "1 NaN or infinite"),
    (lambda: GaussianBase(3).log_prob(torch.zeros(2, 4)), "3"),
    (lambda: GaussianBase(2).log_prob(torch.zeros(2, 2, 2)), "the base takes .batch, 2"),
    (lambda: GaussianBase(2).sample(-1), "n=-1"),
    (lambda: GaussianBase(2).sample(3, math.inf), "temperature=inf"),
    (lambda: affine(half_mask(4), bound=math.inf), "bound=inf"),
    (lambda: affine(half_mask(4))(torch.zeros(3, 4, 2)), "built for .batch, 2.: flatten"),
    (lambda: Flow([Logit(0.0)], GaussianBase(2)).log_prob(torch.tensor([[0.0, 0.5]])), "ends only with a margin"),
    (lambda: Flow([Logit(0.0)], GaussianBase(2)).log_prob(torch.tensor([[1.0, 0.5]])), "ends only with a margin"),
    (lambda: Flow([Logit(1e-9)], GaussianBase(2)).log_prob(torch.tensor([[1.0, 0.5]])), "ends only with a margin"),
    (lambda: dequantize(torch.tensor([17.0]), 17), "levels − 1 = 16"),
    (lambda: dequantize(torch.tensor([0.5]), 17), "whole"),
    (lambda: dequantize(torch.tensor([torch.nan]), 17), "whole"),
])
def test_clear_errors(call, words):
    refuses(call, ValueError, words)


@pytest.mark.parametrize("call, words", [
    (lambda: AffineCoupling(torch.ones(4), nn.Identity()), "use bool"),
    (lambda: affine(half_mask(4))(torch.zeros(3, 4, dtype=torch.int64)), "float32 or float64"),
    (lambda: affine(half_mask(4))(torch.zeros(3, 4, dtype=torch.bfloat16)), "float32 or float64"),
    (lambda: toy_flow().log_prob(torch.zeros(3, 2, dtype=torch.int64)), "float32 or float64 .dequantize"),
    (lambda: affine(half_mask(4))(torch.zeros(3, 4, dtype=torch.float64)), "weights are torch.float32: use x.to"),
    (lambda: affine(half_mask(4)).double().inverse(torch.zeros(3, 4)), "weights are torch.float64: use x.to"),
])
def test_clear_type_errors(call, words):
    refuses(call, TypeError, words)


def test_whatever_the_door_lets_in_has_a_density():
    """The old door compared x with the margin, not p as computed: at the very edge it let NaN through."""
    for alpha in (0.0, 1e-9, 0.001, 0.05, 0.3):
        flow = Flow([Logit(alpha)], GaussianBase(1))
        room = alpha / (1 - 2 * alpha)
        for end in (-room, 0.0, 1.0, 1 + room):
            near = torch.tensor(end) + torch.arange(-4, 5) * 2**-24
            for x in near.view(-1, 1, 1):
                try:
                    assert torch.isfinite(flow.log_prob(x)).all(), (alpha, x)
                except ValueError:
                    assert not 0 < alpha + (1 - 2 * alpha) * x < 1


def check_dequantize():
    x = torch.arange(256).repeat(400).to(torch.uint8)
    y = dequantize(x, 256, seed())
    assert y.dtype == torch.float32 and y.min() >= 0 and y.max() < 1
    assert torch.equal((y.double() * 256).floor().to(torch.uint8), x)
    spread = y * 256 - x
    assert abs(spread.mean() - 0.5) < 0.01 and abs(spread.var() - 1 / 12) < 0.002
    assert not torch.equal(y, dequantize(x, 256, seed(1)))


def test_dequantize(monkeypatch):
    check_dequantize()
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 0.5))  # no noise
    with pytest.raises(AssertionError):
        check_dequantize()


def test_bits_bound_the_true_cost():
    """Bits of dequantized data are never fewer than the entropy of the levels, and reach it for the right density."""
    p = torch.tensor([0.7, 0.2, 0.1])
    entropy = -(p * p.log2()).sum()
    levels = torch.multinomial(p, 60_000, replacement=True, generator=seed())
    y = dequantize(levels.float(), 3, seed(1))

    def bits(q):
        log_prob = (3 * q)[(y * 3).long()].log()
        return bits_per_dimension(log_prob, 1, 3).mean()

    assert abs(bits(p) - entropy) < 0.01
    assert bits(torch.tensor([0.4, 0.3, 0.3])) > entropy + 0.1 and bits_per_dimension(torch.zeros(1), 5, 8) == 3


def test_no_entry_is_multiplied_in_vain():
    """Networks see the kept entries and give the changed ones; weights have just those sizes, indices are buffers."""
    mask = torch.arange(10) < 3
    layer = AffineCoupling(mask, Conditioner(3, 7, hidden=4))
    assert layer.conditioner.first.shape == (8, 3) and layer.conditioner.weights[-1].shape == (2, 4, 7)
    assert set(dict(layer.named_buffers())) == {"kept", "changed"}
