"""RealNVP for vectors and images: referee, scales, gradients, training, precision, bad input; mutations run."""

import math

import pytest
import torch
from conftest import refuses, seed
from sklearn.datasets import load_digits
from torch.func import jacfwd, vmap

from missingbook.flows import realnvp
from missingbook.flows.coupling import (
    AffineCoupling,
    Flow,
    GaussianBase,
    bits_per_dimension,
    checkerboard_mask,
    dequantize,
)
from missingbook.flows.realnvp import (
    ConvConditioner,
    ImageRealNVP,
    MultiScale,
    RealNVP,
    Squeeze,
    fit_base,
    train_flow,
)
from missingbook.foundations.training import TrainingRun

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
SHAPES = {"one channel": (1, 4, 4), "colour, not square": (3, 2, 4), "three scales": (1, 8, 8)}


def quiet(**options):
    return TrainingRun(seed=0, **({"device": "cpu", "verbose": False} | options))


def vector(width=6, **options):
    return RealNVP(width, hidden=8, generator=seed(), **({"identity": False} | options))


def image(shape=(1, 4, 4), **options):
    return ImageRealNVP(shape, **({"n_couplings": 2, "hidden": 4, "identity": False, "generator": seed()} | options))


def check_flow(flow, x):
    """Round trip to 1e-10 and both log-determinants to 1e-8, in float64, one a row."""
    z, log_det = flow(x)
    back, log_det_back = flow.inverse(z)
    width = z.shape[1]
    jacobian = vmap(jacfwd(lambda row: flow(row[None])[0][0]))(x).reshape(len(x), width, width)
    assert z.shape == (len(x), x[0].numel()) and back.shape == x.shape and log_det.shape == (len(x),)
    assert (back - x).abs().max() < 1e-10
    assert (log_det - torch.linalg.slogdet(jacobian)[1]).abs().max() < 1e-8
    assert (log_det + log_det_back).abs().max() < 1e-8
    assert log_det.std() > 1e-4


OPTIONS = [{}, {"learn_bound": True, "bound": 2}, {"alpha": 0.1}, {"n_couplings": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_vectors(options):
    check_flow(vector(**options).double(), torch.rand(4, 6, dtype=torch.float64, generator=seed(1)))


@pytest.mark.parametrize("name", SHAPES)
def test_images(name):
    shape = SHAPES[name]
    flow = image(shape, n_scales=3 if name == "three scales" else None).double()
    check_flow(flow, torch.rand(2, *shape, dtype=torch.float64, generator=seed(1)))


def small_image_check():
    check_flow(image(n_scales=2).double(), torch.rand(3, 1, 4, 4, dtype=torch.float64, generator=seed(1)))


def forgets_a_scale(self, x):
    left = []
    for stage in self.stages:
        x, log_det = stage(x)
        if stage is not self.stages[-1]:
            out, x = x.chunk(2, dim=1)
            left.append(out.flatten(1))
    return torch.cat([*left, x.flatten(1)], dim=1), log_det


def swaps_the_halves(self, z):
    (c, h, w), size = self.shapes[0], math.prod(self.shapes[0]) // 2
    rest = z[:, size:].unflatten(1, self.shapes[1])
    x, one = self.stages[1].inverse(rest)
    x, two = self.stages[0].inverse(torch.cat([x, z[:, :size].unflatten(1, (c // 2, h, w))], dim=1))
    return x, one + two


def squeezes_otherwise(self, z):
    b, c, h, w = z.shape
    return z.reshape(b, c // 4, 2 * h, 2 * w), z.new_zeros(b)


MUTANTS = [(MultiScale, "forward", forgets_a_scale), (MultiScale, "inverse", swaps_the_halves),
           (Squeeze, "inverse", squeezes_otherwise)]


@pytest.mark.parametrize("owner, method, mutant", MUTANTS, ids=lambda m: getattr(m, "__name__", m))
def test_the_referee_catches(monkeypatch, owner, method, mutant):
    small_image_check()
    monkeypatch.setattr(owner, method, mutant)
    with pytest.raises(AssertionError):
        small_image_check()


def check_checkerboard():
    """In a scale's first couplings the pixels that stay form the paper's checkerboard, in every channel, in turns."""
    stage = realnvp._stage(2, 2, 4, 1, False, False, seed())
    squeeze, first, second = stage.layers[:3]
    assert isinstance(first, AffineCoupling)
    x = torch.randn(1, 2, 4, 6, generator=seed())
    z = squeeze.inverse(first(squeeze(x)[0])[0])[0]
    board = checkerboard_mask(4, 6).expand(1, 2, 4, 6)
    assert torch.equal(z == x, board)
    z = squeeze.inverse(second(squeeze(x)[0])[0])[0]
    assert torch.equal(z == x, ~board)


def test_checkerboard(monkeypatch):
    check_checkerboard()
    forward, inverse = Squeeze.forward, Squeeze.inverse
    order = torch.tensor([0, 3, 1, 2, 4, 7, 5, 6])  # the pixels of a square in another order
    monkeypatch.setattr(Squeeze, "forward", lambda self, x: (forward(self, x)[0][:, order], forward(self, x)[1]))
    monkeypatch.setattr(Squeeze, "inverse", lambda self, z: inverse(self, z[:, order.argsort()]))
    with pytest.raises(AssertionError):
        check_checkerboard()


def check_gradients(flow, x):
    flow.log_prob(x).mean().backward()
    idle = [name for name, w in flow.named_parameters() if w.grad is None or (w.grad != 0).float().mean() < 0.5]
    assert idle == [], idle


def test_every_parameter_gets_a_gradient(monkeypatch):
    check_gradients(vector(learn_bound=True), torch.randn(16, 6, generator=seed()))
    pictures = torch.rand(16, 1, 8, 8, generator=seed())
    check_gradients(image((1, 8, 8)), pictures)
    monkeypatch.setattr(ConvConditioner, "forward", no_blocks)
    with pytest.raises(AssertionError):
        check_gradients(image((1, 8, 8)), pictures)


def no_blocks(self, kept):
    h = self.last(torch.relu(self.first(kept)))
    return h.unflatten(1, (self.n_heads, -1)).transpose(0, 1)


def test_identity_and_seeds():
    x = torch.randn(5, 6, generator=seed())
    assert torch.equal(vector(identity=True)(x)[0], x) and not vector(identity=True)(x)[1].any()
    pictures = torch.randn(5, 1, 4, 4, generator=seed())
    flow = image(identity=True, alpha=None)
    exact = torch.distributions.Normal(0, 1).log_prob(pictures).sum((1, 2, 3))
    assert torch.allclose(flow.log_prob(pictures), exact, atol=1e-4)
    for build in (vector, image):
        first, second = build().state_dict().values(), build().state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = RealNVP(6, hidden=8, generator=seed(1), identity=False)
    assert not torch.equal(other(x)[0], vector()(x)[0])


def test_paper_sizes():
    """MCFlow's: six couplings, two networks of four layers each, as wide as the data."""
    flow = RealNVP(10)
    couplings = [layer for layer in flow.layers.layers if isinstance(layer, AffineCoupling)]
    assert len(couplings) == 6 and all(layer.bound == 1 for layer in couplings)
    network = couplings[0].conditioner
    assert network.first.shape == (2 * 10, 5)
    assert [tuple(w.shape) for w in network.weights] == [(2, 10, 10), (2, 10, 10), (2, 10, 5)]
    assert all(torch.equal(a.kept, b.changed) for a, b in zip(couplings[::2], couplings[1::2], strict=True))


def check_fit_base(flow=None):
    half = torch.randn(4, 4, generator=seed())
    x = torch.randn(3000, 4, generator=seed(1)) @ half.T + 5
    flow = flow or RealNVP(4)
    fit_base(flow, x, ridge=0.0)
    oracle = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    assert torch.allclose(flow.log_prob(x[:50]), oracle.log_prob(x[:50]), atol=1e-2)


def test_fit_base(monkeypatch):
    check_fit_base()
    monkeypatch.setattr(realnvp.torch, "cov", lambda z: z @ z.T / z.shape[1])  # second moment, not covariance
    with pytest.raises(AssertionError):
        check_fit_base()


def test_fit_base_works_with_constant_columns_and_refuses_one_row():
    x = torch.randn(50, 3, generator=seed())
    x[:, 1] = 2.0
    flow = RealNVP(3)
    fit_base(flow, x)
    assert torch.isfinite(flow.log_prob(x)).all()
    with pytest.raises(ValueError, match="1 rows"):
        fit_base(flow, x[:1])


def ring(n, number):
    angle = 2 * math.pi * torch.rand(n, generator=seed(number))
    noise = 0.15 * torch.randn(n, 2, generator=seed(number + 1))
    return torch.stack([angle.cos(), angle.sin()], 1) + noise


def check_training():
    """A ring: better than the Gaussian by far, integrates to one, draws lie on the ring."""
    flow = RealNVP(2, n_couplings=6, hidden=32, n_hidden=2, generator=seed())
    run = quiet()
    train_flow(flow, ring(1500, 0), run, max_epochs=25, learning_rate=4e-3, x_judge=ring(300, 10))
    assert not flow.training and {"loss", "validation"} <= set(run.history.columns)
    x = ring(500, 20)
    plain = GaussianBase(2)
    plain.set(x.mean(0), torch.cov(x.T))
    with torch.no_grad():
        assert flow.log_prob(x).mean() > plain.log_prob(x).mean() + 0.3
        side = torch.linspace(-6, 6, 401)
        lattice = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).view(-1, 2)
        assert abs(flow.log_prob(lattice).exp().sum() * (side[1] - side[0]) ** 2 - 1) < 0.02
        radius = flow.sample(2000, generator=seed(5)).norm(dim=1)
    assert abs(radius.mean() - x.norm(dim=1).mean()) < 0.1 and (radius < 0.4).float().mean() < 0.1


def test_training(monkeypatch):
    check_training()
    original = Flow.log_prob

    def without_log_det(self, x):
        return self.base.log_prob(self(x)[0]) if self.training else original(self, x)

    monkeypatch.setattr(Flow, "log_prob", without_log_det)
    with pytest.raises(AssertionError):
        check_training()


@pytest.fixture(scope="module")
def digits():
    return torch.tensor(load_digits().images, dtype=torch.float32)[:, None]


def test_training_on_digits_beats_the_gaussian(digits):
    """Two flows against the Gaussian of the same rows, in bits per dimension, on rows that nobody has seen."""
    train, test = digits[:1400], dequantize(digits[1400:], 17, seed(1))
    y = dequantize(train, 17, seed(2)).flatten(1)
    plain = GaussianBase(64)
    plain.set(y.mean(0), torch.cov(y.T))
    limit = bits_per_dimension(plain.log_prob(test.flatten(1)), 64, 17).mean() - 0.4
    flow = RealNVP(64, n_hidden=2, generator=seed(), alpha=0.05, learn_bound=True)
    fit_base(flow, y)
    train_flow(flow, train.flatten(1), quiet(), 3, 64, levels=17)
    pictures = ImageRealNVP((1, 8, 8), n_couplings=2, hidden=16, generator=seed())
    train_flow(pictures, train.to(torch.uint8), quiet(), 4, 64, 3e-3, levels=17)
    with torch.no_grad():
        assert bits_per_dimension(flow.log_prob(test.flatten(1)), 64, 17).mean() < limit
        assert bits_per_dimension(pictures.log_prob(test), 64, 17).mean() < limit
        draws = pictures.sample(300, generator=seed())
    assert draws.shape == (300, 1, 8, 8) and draws.min() > -0.1 and draws.max() < 1.1
    assert (draws.mean(0) - train.mean(0) / 16).abs().mean() < 0.1


def test_noise_is_new_in_every_epoch(digits, monkeypatch):
    """Dequantized once, a flow would learn the noise."""
    seen = []

    def note(x, levels, generator):
        seen.append(dequantize(x, levels, generator))
        return seen[-1]

    monkeypatch.setattr(realnvp, "dequantize", note)
    flow = RealNVP(64, n_couplings=2, hidden=4, generator=seed(), alpha=0.05)
    train_flow(flow, digits[:50].flatten(1), quiet(), 3, x_judge=digits[50:60].flatten(1), levels=17)
    assert [len(s) for s in seen] == [10, 50, 50, 50]
    assert not torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[3])


def fitted(**options):
    flow = RealNVP(2, n_couplings=2, hidden=8, generator=seed())
    run = quiet(**options)
    train_flow(flow, ring(200, 0), run, 4, 64, x_judge=ring(50, 9))
    return flow, run


def test_same_seed_same_result_and_the_best_epoch_is_kept():
    (one, run), (two, _) = fitted(), fitted()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    with torch.no_grad():
        assert abs(-one.log_prob(ring(50, 9)).mean().item() - run.history["validation"].min()) < 1e-5


def test_a_base_that_was_set_survives_training():
    """Early stopping puts stored weights back; the base must come with them, and know that it is not N(0, I)."""
    flow = RealNVP(2, n_couplings=2, hidden=8, generator=seed())
    flow.base.set(torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    train_flow(flow, ring(200, 0), quiet(), 3, 64, x_judge=ring(50, 9))
    assert not flow.base.standard and flow.base.mean.tolist() == [1.0, 2.0]


def test_bf16_training():
    flow, run = fitted(precision="bf16")
    exact, _ = fitted()
    x = ring(200, 30)
    with torch.no_grad():
        assert abs(flow.log_prob(x).mean() - exact.log_prob(x).mean()) < 0.05
        with torch.autocast("cpu", torch.bfloat16):
            z, log_det = image((1, 8, 8))(torch.rand(8, 1, 8, 8, generator=seed()))
    assert z.dtype == log_det.dtype == torch.float32
    assert all(w.dtype == torch.float32 for w in flow.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu(digits):
    for flow, x in ((vector(64, alpha=0.05), digits[:20].flatten(1)), (image((1, 8, 8)), digits[:20])):
        y = dequantize(x, 17, seed())
        on_cpu = flow.log_prob(y)
        assert torch.allclose(flow.cuda().log_prob(y.cuda()).cpu(), on_cpu, atol=1e-2, rtol=1e-4)
    flow = RealNVP(2, n_couplings=2, hidden=8, generator=seed())
    train_flow(flow, ring(200, 0), quiet(device="cuda"), 3, 64, x_judge=ring(50, 9))
    fit_base(flow, ring(200, 0))
    assert flow.sample(4).is_cuda and torch.isfinite(flow.sample(4)).all()


@pytest.mark.parametrize("call, words", [
    (lambda: RealNVP(1), "width=1"),
    (lambda: RealNVP(4, n_couplings=0), "n_layers=0"),
    (lambda: RealNVP(4, hidden=0), "hidden=0"),
    (lambda: RealNVP(4, bound=-1), "bound=-1"),
    (lambda: RealNVP(4, alpha=0.7), "alpha=0.7"),
    (lambda: RealNVP(4).log_prob(torch.zeros(2, 5)), "built for .batch, 4"),
    (lambda: RealNVP(4).inverse(torch.zeros(2, 5)), "built for .batch, 4"),
    (lambda: RealNVP(4).log_prob(torch.full((2, 4), torch.nan)), "8 NaN"),
    (lambda: ImageRealNVP((1, 7, 8)), "squeezed 0 times"),
    (lambda: ImageRealNVP((1, 12, 12), n_scales=3), "squeezed 2 times"),
    (lambda: ImageRealNVP((1, 8, 8), n_scales=-1), "n_scales is -1"),
    (lambda: image().log_prob(torch.zeros(2, 1, 6, 6)), "shape"),
    (lambda: image().log_prob(torch.zeros(2, 3, 4, 4)), "shape"),
    (lambda: image().log_prob(torch.zeros(2, 16)), "shape"),
    (lambda: image().inverse(torch.zeros(2, 15)), "needed is .batch, 16"),
    (lambda: image().log_prob(torch.full((2, 1, 4, 4), 3.0)), "between 0 and 1"),
    (lambda: ImageRealNVP((1, 8, 8), n_scales=0), "n_scales is 0"),
    (lambda: ImageRealNVP((8, 8)), "channels, height, width"),
    (lambda: ImageRealNVP((1, 0, 8)), "channels, height, width"),
    (lambda: image(n_couplings=0), "n_couplings=0"),
    (lambda: image(hidden=0), "hidden=0"),
    (lambda: image(n_blocks=-1), "n_blocks=-1"),
    (lambda: Squeeze()(torch.zeros(1, 1, 3, 4)), "both sides even"),
    (lambda: Squeeze().inverse(torch.zeros(1, 3, 4, 4)), "multiple of 4"),
    (lambda: MultiScale([Squeeze(), Squeeze()], [(4, 4, 4)]), "2 stages"),
    (lambda: MultiScale([], []), "0 stages"),
    (lambda: RealNVP(3).log_prob(torch.zeros(2, 3, 5)), "flatten"),
    (lambda: fit_base(RealNVP(3), torch.full((4, 3), torch.nan)), "12 NaN"),
    (lambda: fit_base(RealNVP(3, alpha=0.05), torch.full((4, 3), 255.0)), "between 0 and 1"),
    (lambda: train_flow(RealNVP(3), torch.zeros(0, 3), quiet()), "no rows"),
    (lambda: train_flow(RealNVP(3), torch.zeros(4, 3), quiet(), x_judge=torch.zeros(0, 3)), "no rows"),
])
def test_clear_errors(call, words):
    refuses(call, ValueError, words)


def test_float64_data_meet_float32_weights():
    """What NumPy and pandas hand over; the remedy in the message works."""
    x = torch.rand(6, 4, dtype=torch.float64, generator=seed())
    for call in (lambda: RealNVP(4).log_prob(x), lambda: fit_base(RealNVP(4), x),
                 lambda: train_flow(RealNVP(4), x, quiet())):
        refuses(call, TypeError, "weights are torch.float32: use x.to")
    assert torch.isfinite(RealNVP(4).to(x.dtype).log_prob(x)).all()


def test_scales_that_fit():
    for shape, n in {(1, 28, 28): 2, (3, 32, 32): 3, (1, 8, 8): 2, (1, 4, 4): 1, (1, 2, 2): 1, (1, 64, 64): 3}.items():
        assert realnvp._scales(shape, None) == n, shape


def test_rows_do_not_know_each_other():
    flow, x = image((1, 8, 8)), torch.rand(20, 1, 8, 8, generator=seed())
    assert torch.allclose(flow.log_prob(x)[:3], flow.log_prob(x[:3]), atol=1e-3)
    assert flow.sample(0).shape == (0, 1, 8, 8) and flow.log_prob(x[:0]).shape == (0,)
