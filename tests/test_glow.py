"""Glow: actnorm, mixing, priors, round trip, log-determinants, reversible mode, bad input; mutations run."""

import copy
import math
import warnings

import pytest
import torch
from conftest import copy_of, mutant_fails, refuses, seed
from sklearn.datasets import load_digits

from missingbook.flows import glow
from missingbook.flows.coupling import bits_per_dimension, dequantize
from missingbook.flows.glow import ActNorm, CouplingNetwork, Glow, GlowLevel, InvertibleConv, SplitPrior, reversible_gap
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


@pytest.mark.filterwarnings("ignore:this flow was never started")
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


@pytest.mark.filterwarnings("ignore:this flow was never started")
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
    refuses(lambda: Glow((1, 8, 8), 0), ValueError, "n_levels=0: use 1 or more")
    refuses(lambda: Glow((1, 8, 8), 2, 0), ValueError, "n_steps=0: use 1 or more")
    refuses(lambda: Glow((1, 8, 8), 2, 2, 0), ValueError, "hidden=0: use 1 or more")
    refuses(lambda: Glow((1, 8, 8), 2, 2, 8.5), TypeError, "hidden=8.5: use a whole number")
    refuses(lambda: Glow((1, 8, 8), 2.0), TypeError, "n_levels=2.0: use a whole number")
    refuses(lambda: ActNorm(0), ValueError, "channels=0: use 1 or more")
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
    refuses(lambda: flow.inverse(torch.zeros(2, 31)), ValueError, "built for \\(batch, 32\\)")
    refuses(lambda: flow.inverse(torch.zeros(2, 32).double()), TypeError, "z is torch.float64, the weights are")
    refuses(lambda: flow((x * 255).byte()), TypeError, "x is torch.uint8; needed is torch.float32: dequantize")
    refuses(lambda: flow.sample(2.0), TypeError, "n=2.0: the number of draws, a whole number")
    refuses(lambda: reversible_gap(flow, x[:0]), ValueError, "0 pictures")
    refuses(lambda: reversible_gap(torch.nn.Identity(), x), ValueError, "0 levels")
    refuses(lambda: flow.sample(-1), ValueError, "0 or more")
    refuses(lambda: flow.sample(1, -0.5), ValueError, "temperature")
    refuses(lambda: ActNorm(3)(x), ValueError, "built for \\(batch, 3\\)")


def raised(call, kind):
    "The words of the error, or an AssertionError where there is none of this kind."
    try:
        call()
    except kind as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    raise AssertionError("nothing was raised")


def check_messages(module):
    "Wrong sizes and dtypes are named, as a user without shape checks meets them."
    flow, x = module.Glow((2, 4, 4), 1, 1, 4, generator=seed()), torch.rand(3, 2, 4, 4, generator=seed())
    assert "hidden=8.5: use a whole number" in raised(lambda: module.Glow((1, 8, 8), 2, 2, 8.5), TypeError)
    assert "n_levels=2.0: use a whole number" in raised(lambda: module.Glow((1, 8, 8), 2.0), TypeError)
    assert "channels=0: use 1 or more" in raised(lambda: module.ActNorm(0), ValueError)
    assert "hidden=0: use 1 or more" in raised(lambda: module.Glow((1, 8, 8), 2, 2, 0), ValueError)
    assert "dequantize whole numbers" in raised(lambda: flow((x * 255).byte()), TypeError)
    assert "z is torch.float64" in raised(lambda: flow.inverse(torch.zeros(2, 32).double()), TypeError)
    assert "a whole number" in raised(lambda: flow.sample(2.0), TypeError)


@pytest.mark.parametrize("edit", [
    ('if not hasattr(value, "__index__")', "if False"),
    ("if value < 1:", "if False:"),
    ("if not x.is_floating_point():", "if False:"),
    ('self._check_input(z, (self.base.mean.numel(),), "z")', "pass"),
    ('if not hasattr(n, "__index__")', "if False"),
], ids=["whole sizes", "small sizes", "whole pixels", "z's dtype", "whole draws"])
def test_messages(edit):
    check_messages(copy_of(glow))  # without the hook that checks shapes and kinds
    with pytest.raises(AssertionError):
        check_messages(copy_of(glow, edit))


def check_start_from_nan(module):
    "One NaN starts nothing, in training mode; a start that is refused leaves mode and actnorms as they were."
    flow = module.Glow((1, 4, 4), 1, 2, 4, generator=seed())
    x = torch.rand(16, 1, 4, 4, generator=seed())
    bad = x.clone()
    bad[3, 0, 1, 1] = math.nan
    assert "1 NaN or infinite entries: no actnorm" in raised(lambda: flow(bad), ValueError)
    assert not flow.levels[0].started and not flow.levels[0].actnorms[0].shift.any()
    flow(x)
    assert flow.levels[0].started and torch.isfinite(flow.levels[0].actnorms[0].shift).all()
    flow.eval()
    raised(lambda: flow.start(x.double()), TypeError)
    before = flow.levels[0].actnorms[0].shift.clone()
    assert not flow.training and torch.equal(flow.train()(5 * x)[0], flow(5 * x)[0])
    assert torch.equal(before, flow.levels[0].actnorms[0].shift)


@pytest.mark.parametrize("edit", [
    ("        if not torch.isfinite(x).all():\n", "        if False:\n"),
    ("        self._check_input(x, self.shape)\n        self.check(x)\n", "        self.check(x)\n"),
], ids=["starts from NaN", "waits again after a refusal"])
def test_start_from_nan(edit):
    mutant_fails(glow, check_start_from_nan, edit)


def check_warning(module):
    "Evaluated without a start a flow warns once; started, it never does."
    x = torch.rand(8, 1, 4, 4, generator=seed())
    for started in (False, True):
        flow = module.Glow((1, 4, 4), 1, 2, 4, generator=seed()).eval()
        if started:
            flow.start(x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                flow.log_prob(x)
        told = [w for w in caught if w.category is RuntimeWarning and "never started" in str(w.message)]
        assert len(told) == (0 if started else 1)


@pytest.mark.parametrize("edit", [
    ("            self._look()\n", "            pass\n"),
    ("        self._looked = True\n", ""),
    ("if any(level._waits for level in self.levels):", "if True:"),
], ids=["never", "always", "also when started"])
def test_warning(edit):
    mutant_fails(glow, check_warning, edit)


def steep(module, deviation, coupling="affine"):
    "A started level with orthogonal W, whose networks' last convolutions have weights of this deviation."
    level = module.GlowLevel(8, 8, 16, coupling, lu=False, generator=seed())
    x = torch.randn(16, 8, 4, 4, generator=seed())
    level.start(x)
    for k, network in enumerate(level.networks):
        network.last.weight.data.normal_(0, deviation, generator=seed(k))
    return level, x


def check_gap(module):
    "Rounding where all is well, above 1 where networks are steep though W is orthogonal; modes stay as they were."
    level, x = steep(module, 0.02)
    level.reversible = True
    assert 0 < module.reversible_gap(level, x) < 1e-2 and module.reversible_gap(level.double(), x.double()) < 1e-9
    assert level.reversible and level.training
    level, x = steep(module, 0.6)
    assert module.reversible_gap(level, x) > 1
    level.networks[0].last.bias.data.fill_(math.inf)
    assert module.reversible_gap(level, x) == math.inf
    flow, x = trained(module, (1, 8, 8), 2, 2)
    flow.train().levels[0].networks[0].requires_grad_(False)
    assert 0 < module.reversible_gap(flow, x) < 1e-9 and not any(layer.reversible for layer in flow.levels)


@pytest.mark.parametrize("edit", [
    ("level.reversible = reversible\n            pair", "level.reversible = False\n            pair"),
    ("level.reversible = mode", "level.reversible = False"),
    ("    flow.eval()  # a comparison starts nothing\n    try:", "    flow.eval()\n    was = False\n    try:"),
    ("if all(map(math.isfinite, gaps)) else math.inf", "if True else math.inf"),
    ("*(w for w in weights if w.requires_grad)]", "*weights]"),
], ids=["one mode only", "changes the mode", "stays in eval", "NaN is no number", "frozen weights"])
def test_gap(edit):
    if "*weights" in edit[1]:  # torch refuses to differentiate by a frozen weight
        mutant = copy_of(glow, edit)
        with pytest.raises(RuntimeError):
            check_gap(mutant)
        return
    mutant_fails(glow, check_gap, edit)


def test_frozen_network():
    "A frozen network gets no gradient, the others those of the ordinary mode."
    flow, x = trained(glow, (1, 8, 8), 2, 3)
    flow.levels[0].networks[1].requires_grad_(False)
    flow.levels[1].networks[0].first.requires_grad_(False)
    pair = []
    for reversible in (False, True):
        for level in flow.levels:
            level.reversible = reversible
        flow.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        pair.append({name: w.grad for name, w in flow.named_parameters()})
    for name, exact in pair[0].items():
        assert (exact is None) == (pair[1][name] is None)
        assert exact is None or torch.allclose(exact, pair[1][name], rtol=1e-7, atol=1e-12), name


def check_own_parameters(module):
    "The backward pass refuses parameters that were swapped for the forward pass, or have changed since."
    flow, x = trained(module, (1, 8, 8), 1, 2, reversible=True)
    doubled = {name: (2 * w).detach().requires_grad_() for name, w in flow.named_parameters()}
    loss = torch.func.functional_call(flow, doubled, (x,))[0].sum()
    assert "functional_call" in raised(loss.backward, RuntimeError)
    loss = flow(x)[0].sum()
    with torch.no_grad():
        flow.levels[0].networks[0].last.bias.add_(1)
    assert "inplace" in raised(loss.backward, RuntimeError)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):  # copies, as save_on_cpu makes
        loss = flow(x)[0].sum()
    loss.backward()


@pytest.mark.parametrize("edit", [
    ("        _check_own(level, ctx.parameters)\n", ""),
    ("ctx.save_for_backward(z, weight, bias, *parameters)", "ctx.save_for_backward(z, weight, bias)"),
    ("_check_own(level, ctx.parameters)", "_check_own(level, ctx.saved_tensors[3:])"),
], ids=["swapped", "changed", "copies"])
def test_own_parameters(edit):
    if "saved_tensors" in edit[1]:  # it refuses what is right
        mutant = copy_of(glow, edit)
        with pytest.raises(RuntimeError):
            check_own_parameters(mutant)
        return
    mutant_fails(glow, check_own_parameters, edit)
