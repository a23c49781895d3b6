"""Glow: actnorm, mixing, priors, round trip, log-determinants, reversible mode, bad input; mutations run."""

import copy
import math

import pytest
import torch
from conftest import copy_of, mutant_fails, refuses, seed
from sklearn.datasets import load_digits

from missingbook.flows import glow
from missingbook.flows.coupling import bits_per_dimension, dequantize
from missingbook.flows.glow import ActNorm, CouplingNetwork, Glow, GlowLevel, InvertibleConv, SplitPrior
from missingbook.flows.realnvp import train_flow
from missingbook.foundations.training import TrainingRun

SHAPES = {(2, 2, 4): 1, (1, 4, 8): 2, (3, 8, 8): 3}


def trained(module, shape=(2, 2, 4), n_levels=1, n_steps=3, **options):
    "A flow of float64, away from its start."
    flow = module.Glow(shape, n_levels, n_steps, 8, generator=seed(), **options).double()
    x = torch.rand(32, *shape, dtype=torch.float64, generator=seed(1))
    adam = torch.optim.Adam(flow.parameters(), lr=0.01)
    for _ in range(10):
        adam.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        adam.step()
    return flow.eval(), x


def check_flow(module, shape=(2, 2, 4), n_levels=1, **options):
    "Round trip to 1e-10, log-determinants against the whole Jacobian, both ways, one a row."
    flow, x = trained(module, shape, n_levels, **options)
    size = math.prod(shape)
    z, log_det = flow(x)
    back, log_det_back = flow.inverse(z)
    assert z.shape == (32, size) and (back - x).abs().max() < 1e-10
    assert (log_det + log_det_back).abs().max() < 1e-8
    for k in (0, 5):
        jacobian = torch.autograd.functional.jacobian(lambda row: flow(row)[0], x[k : k + 1]).reshape(size, size)
        assert (torch.linalg.slogdet(jacobian)[1] - log_det[k]).abs() < 1e-8
    assert options.get("coupling") == "additive" or log_det.std() > 1e-4


@pytest.mark.parametrize("options", [{}, {"coupling": "additive"}, {"lu": False}, {"learn_top": False}], ids=str)
def test_flow(options):
    check_flow(glow, **options)


@pytest.mark.parametrize("shape", list(SHAPES)[1:], ids=str)
def test_shapes(shape):
    check_flow(glow, shape, SHAPES[shape])


BREAKS_THE_FLOW = {
    "actnorm's determinant": ("self.log_scale.sum() * x.shape[2] * x.shape[3]", "self.log_scale.sum()"),
    "the matrices' determinant": ("upper, log_diagonal.sum()", "upper, log_diagonal.sum() * 0.9"),
    "the fold forgets actnorm's": ("log_det + log_scale.sum()", "log_det"),
    "the coupling's inverse": ("(old - shift) * torch.exp(-log_scale)", "old * torch.exp(-log_scale) - shift"),
    "the sign of the way back": ("* (-1 if back else 1)", "* 1"),
}


@pytest.mark.parametrize("edit", BREAKS_THE_FLOW.values(), ids=BREAKS_THE_FLOW)
def test_the_referee_catches(edit):
    mutant_fails(glow, check_flow, edit)


def check_actnorm(module):
    "Mean 0, variance 1; a channel without variation is centred and keeps its scale; one pixel is enough."
    x = torch.randn(16, 3, 4, 6, generator=seed()) * torch.tensor([1e-3, 1, 100])[:, None, None] + 5
    x[:, 1] = 5
    norm = module.ActNorm(3)
    norm.start(x)
    z = norm(x)[0]
    assert z.mean((0, 2, 3)).abs().max() < 1e-2
    assert torch.allclose(z.var((0, 2, 3), correction=0), torch.tensor([1.0, 0, 1]), atol=1e-2)
    norm.start(x[:1, :, :1, :1])
    assert not norm.log_scale.any() and torch.equal(norm.shift, -x[0, :, 0, 0])
    few = torch.tensor([[[[0.0, 1e-3]], [[0.0, 2.0]]]])  # two values a channel: one deviation for both
    norm = module.ActNorm(2)
    norm.start(few)
    assert norm.log_scale[0] == norm.log_scale[1] and torch.allclose(norm(few)[0].square().mean(), torch.tensor(1.0))
    level = module.GlowLevel(8, 3, 8, generator=seed()).train()
    z = level(3 * torch.rand(64, 8, 4, 4, generator=seed()) + 1)[0]
    assert level.started and z.mean((0, 2, 3)).abs().max() < 0.05 and (z.std((0, 2, 3)) - 1).abs().max() < 0.1
    kept, network = 20 * torch.rand(64, 2, 4, 4, generator=seed()), module.CouplingNetwork(2, 4, 8, seed())
    network.start(kept)
    assert (network.first(kept).std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("edit", [
    ("still = deviation <= 1e-5 * (1 + mean.abs())", "still = deviation < 0"),
    ("x[:, 0].numel() < 32", "x[:, 0].numel() < 2"),
    ("self.shift.copy_(-mean)", "self.shift.copy_(mean)"),
    ("conv.weight.mul_(scale[:, None, None, None])", "pass"),
    ("        if self.training and self._waits and len(x):\n            self.start(x)\n", ""),
], ids=["divides by nothing", "trusts two values", "wrong mean", "networks do not start", "nobody starts"])
def test_actnorm(edit):
    mutant_fails(glow, check_actnorm, edit)


def test_one_picture_starts_a_flow():
    flow = Glow((1, 8, 8), 3, 2, 8, generator=seed())
    x = torch.rand(40, 1, 8, 8, generator=seed())
    flow.start(x[:1])
    assert torch.isfinite(flow.log_prob(x)).all() and all(level.started for level in flow.levels)
    flow.start(torch.full((1, 1, 8, 8), 0.5))
    assert torch.isfinite(flow.log_prob(x)).all()


def test_the_start_is_kept():
    "Copied and loaded flows do not start again; `start` does, and leaves the mode as it was."
    flow = Glow((1, 4, 4), 1, 2, 4, generator=seed()).eval()
    x = torch.rand(16, 1, 4, 4, generator=seed())
    flow.start(x)
    assert not flow.training
    other = Glow((1, 4, 4), 1, 2, 4, generator=seed(1))
    other.load_state_dict(flow.state_dict())
    for candidate in (other.train(), copy.deepcopy(flow).train()):
        candidate(5 * x)
        assert torch.equal(candidate.levels[0].actnorms[0].shift, flow.levels[0].actnorms[0].shift)
    before = flow.levels[0].actnorms[0].log_scale.clone()
    flow.start(5 * x)
    assert torch.allclose(flow.levels[0].actnorms[0].log_scale, before - math.log(5), atol=1e-4)


def test_lu_and_plain_agree():
    lu, plain = InvertibleConv(6, generator=seed()).double(), InvertibleConv(6, lu=False, generator=seed()).double()
    assert abs(lu.matrix()[1]) < 1e-5 and torch.allclose(lu.matrix()[0], plain.matrix()[0], atol=1e-6)
    for weight in lu.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=seed(1)))
    plain.weight.data.copy_(lu.matrix()[0])
    x = torch.randn(3, 6, 2, 5, dtype=torch.float64, generator=seed(2))
    (z, log_det), (z_plain, log_det_plain) = lu(x), plain(x)
    assert torch.allclose(z, z_plain) and torch.allclose(log_det, log_det_plain)
    assert torch.allclose(log_det, 10 * torch.linalg.slogdet(plain.weight)[1].expand(3)) and log_det[0].abs() > 0.1
    assert torch.allclose(lu.inverse(z)[0], x) and torch.allclose(lu.inverse(z)[1], -log_det)


def check_prior(module):
    "A split prior says log N(leaving; mean, sd²) of what stays."
    prior = module.SplitPrior(4)
    for weight in prior.parameters():
        weight.data.normal_(0, 0.3, generator=seed())
    x = torch.randn(3, 4, 2, 2, generator=seed(1))
    z, log_det = prior(x)
    mean, log_sd = prior.network(x[:, 2:]).chunk(2, dim=1)
    told = torch.distributions.Normal(mean, log_sd.exp()).log_prob(x[:, :2]).sum((1, 2, 3))
    ours = torch.distributions.Normal(0, 1).log_prob(z[:, :2]).sum((1, 2, 3)) + log_det
    assert torch.allclose(told, ours, atol=1e-4) and torch.allclose(prior.inverse(z)[0], x, atol=1e-4)


@pytest.mark.parametrize("edit", [
    ("kept], dim=1), -log_sd.sum((1, 2, 3))", "kept], dim=1), log_sd.sum((1, 2, 3))"),
    ("torch.addcmul(mean, left, log_sd.exp())", "left * log_sd.exp() - mean"),
], ids=["sign", "mean"])
def test_prior(edit):
    mutant_fails(glow, check_prior, edit)


def check_uniform(module):
    "A started flow needs n + log2(2πe/12)/2 bits for n-bit noise."
    for n_bits in (1, 5, 8):
        x = dequantize(torch.randint(2**n_bits, (4000, 1, 8, 8), generator=seed(n_bits)), 2**n_bits, seed(9))
        flow = module.Glow((1, 8, 8), 2, 2, 8, generator=seed())
        flow.start(x)
        with torch.no_grad():
            bits = bits_per_dimension(flow.log_prob(x), 64, 2**n_bits).mean().item()
        assert abs(bits - n_bits - 0.5 * math.log2(2 * math.pi * math.e / 12)) < 0.01


def test_uniform_noise():
    mutant_fails(glow, check_uniform, ("total + log_det * x.shape[2] * x.shape[3]", "total"))


def gradients(flow, x):
    flow.zero_grad()
    (-flow.log_prob(x).mean()).backward()
    return {name: w.grad.clone() for name, w in flow.named_parameters()}


def check_reversible(module):
    "Gradients of both modes agree, in float32 to 1e-4 and in float64 to 1e-9; the input's too."
    for coupling in ("affine", "additive"):
        flow, x = trained(module, (1, 8, 8), 2, 4, coupling=coupling)
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            flow.to(dtype)
            pair = []
            for reversible in (False, True):
                for level in flow.levels:
                    level.reversible = reversible
                rows = x.to(dtype).requires_grad_()
                pair.append(gradients(flow, rows) | {"x": torch.autograd.grad(flow.log_prob(rows).sum(), rows)[0]})
            assert all(pair[0][name].norm() > 0 for name in pair[0])
            gap = {name: ((pair[1][name] - g).norm() / g.norm()).item() for name, g in pair[0].items()}
            assert max(gap.values()) < tolerance, max(gap, key=gap.get)


@pytest.mark.parametrize("edit", [
    ("_mix(grad_y, weight[k].T)", "_mix(grad_y, weight[k])"),
    ('"nchw,ndhw->cd", grad_y, z', '"nchw,ndhw->cd", grad_y, y'),
    ("upstream = ((z, log_det), (grad_z, grad_log_det)) if affine", "upstream = ((z,), (grad_z,)) if affine"),
    ("_mix(y - bias[k, :, None, None], inverse[k])", "_mix(y, inverse[k])"),
], ids=["transpose", "input of the mixing", "no log-determinant", "no bias"])
def test_reversible(edit):
    mutant_fails(glow, check_reversible, edit)


def kept_bytes(flow, x):
    kept, weights = {}, {w.untyped_storage().data_ptr() for w in flow.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = flow.log_prob(x)
    del loss
    return sum(kept.values())


def check_memory(module):
    "What 32 steps a level keep is at most 1.3 times what 8 keep; four times that in the ordinary mode."
    x, kept = torch.rand(64, 1, 16, 16, generator=seed()), {}
    for n_steps in (8, 32):
        flow = module.Glow((1, 16, 16), 2, n_steps, 8, generator=seed()).eval()
        for reversible in (False, True):
            for level in flow.levels:
                level.reversible = reversible
            kept[n_steps, reversible] = kept_bytes(flow, x)
    assert kept[32, False] > 3.5 * kept[8, False] and kept[32, True] <= 1.3 * kept[8, True]
    assert kept[32, True] < 0.05 * kept[32, False]


def test_memory():
    mutant_fails(glow, check_memory, (
        "        z, log_det = level.run(x, weight, bias)\n",
        "        with torch.enable_grad():\n            ctx.graph = level.run(x, weight, bias)\n"
        "        z, log_det = (t.detach() for t in ctx.graph)\n"))


def test_autocast():
    "In bf16 the log-density keeps the precision of x, and the modes' gradients point the same way."
    flow, x = trained(glow, (1, 8, 8), 2, 4)
    flow, x, pair = flow.float(), x.float(), []
    exact = gradients(flow, x)
    for reversible in (False, True):
        for level in flow.levels:
            level.reversible = reversible
        with torch.autocast("cpu", torch.bfloat16):
            assert flow.log_prob(x).dtype == torch.float32
            loss = -flow.log_prob(x).mean()
        flow.zero_grad()
        loss.backward()
        pair.append(torch.cat([w.grad.flatten() for w in flow.parameters()]))
    flat = torch.cat([g.flatten() for g in exact.values()])
    for grads in pair:
        assert torch.cosine_similarity(grads, flat, 0) > 0.99 and not torch.equal(grads, flat)


def test_training():
    "train_flow starts the actnorms, learns, and gives the same flow in both modes to rounding."
    digits = torch.tensor(load_digits().images[:300], dtype=torch.float32)[:, None]
    bits = []
    for reversible in (False, True):
        flow = Glow((1, 8, 8), 2, 2, 16, reversible=reversible, generator=seed())
        run = TrainingRun(seed=0, device="cpu", verbose=False)
        train_flow(flow, digits, run, 6, 64, levels=17)
        loss = run.history["loss"]
        assert loss.iloc[-1] < loss.iloc[0] - 5
        bits.append(bits_per_dimension(flow.log_prob(dequantize(digits, 17, seed(1))), 64, 17).mean().item())
    assert abs(bits[0] - bits[1]) < 0.01 and bits[0] < 3.75


def check_temperature(module):
    "A draw at temperature T is the inverse of T times the same standard normal row, whatever the chunk."
    flow, _ = trained(module)
    eps = torch.randn(20, 16, dtype=torch.float64, generator=seed(3))
    for t in (0, 0.5, 1):
        draws = flow.sample(20, t, seed(3), chunk=7)
        assert draws.shape == (20, 2, 2, 4) and torch.allclose(draws, flow.inverse(t * eps)[0], atol=1e-8)
    assert flow.sample(0).shape == (0, 2, 2, 4)


def test_temperature():
    mutant_fails(glow, check_temperature, ("self.base.sample(n, temperature, generator)",
                                           "self.base.sample(n, 1.0, generator)"))


def test_centred():
    "The middle of the pixels' range goes to zero where nothing was started or learned."
    assert not Glow((1, 4, 4), 2, 2, 4, generator=seed()).eval()(torch.full((2, 1, 4, 4), 0.5))[0].any()
    with pytest.raises(AssertionError):
        mutant = copy_of(glow, ("return x - 0.5,", "return x,"))
        assert not mutant.Glow((1, 4, 4), 2, 2, 4).eval()(torch.full((2, 1, 4, 4), 0.5))[0].any()


def test_bad_input():
    refuses(lambda: Glow((1, 28, 28), 3), ValueError, "28 × 28 pixels cannot be halved 3 times: .* 32 × 32, or .*=2")
    refuses(lambda: Glow((1, 7, 8), 1), ValueError, "pad the images to 8 × 8$")
    refuses(lambda: Glow((1, 8), 1), ValueError, "give \\(channels, height, width\\)")
    refuses(lambda: Glow((1, 8, 8), 0), ValueError, "levels, each 1 or more")
    refuses(lambda: Glow((1, 8, 8), 2, 0), ValueError, "1 step or more")
    refuses(lambda: Glow((1, 8, 8), 2, 2, 0), ValueError, "use 1 or more")
    refuses(lambda: Glow((1, 8, 8), 2, coupling="afine"), ValueError, "it is 'affine' or 'additive'")
    refuses(lambda: GlowLevel(3), ValueError, "even number of channels")
    refuses(lambda: InvertibleConv(0), ValueError, "use 1 or more")
    refuses(lambda: CouplingNetwork(0, 2), ValueError, "use 1 or more")
    refuses(lambda: SplitPrior(5), ValueError, "even number of channels")
    flow = Glow((2, 4, 4), 1, 1, 4, generator=seed())
    x = torch.rand(3, 2, 4, 4, generator=seed())
    refuses(lambda: flow(x[:, :1]), ValueError, "built for \\(batch, 2, 4, 4\\)")
    refuses(lambda: flow(x.double()), TypeError, "the weights are torch.float32")
    refuses(lambda: flow((x * 255).long()), TypeError, "dequantize whole numbers")
    refuses(lambda: flow.start(x[:0]), ValueError, "no pictures")
    refuses(lambda: flow.start(x / 0), ValueError, "NaN or infinite")
    refuses(lambda: flow.log_prob(x / 0), ValueError, "NaN or infinite")
    refuses(lambda: flow.inverse(torch.zeros(2, 31)), ValueError, "needed is \\(batch, 32\\)")
    refuses(lambda: flow.sample(-1), ValueError, "0 or more")
    refuses(lambda: flow.sample(1, -0.5), ValueError, "temperature")
    refuses(lambda: ActNorm(3)(x), ValueError, "built for \\(batch, 3\\)")
