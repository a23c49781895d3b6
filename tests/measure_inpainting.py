"""Measure VAEAC on MNIST's lines and on faces, and write results/inpainting; run by hand, no test.

    python tests/measure_inpainting.py mnist --minutes 20          table 9's VAEAC: mnist.json, mnist.npz
    python tests/measure_inpainting.py mnist --model gsnn          table 9's GSNN, same networks: gsnn.json, gsnn.npz
    python tests/measure_inpainting.py speed                       appendix D.1: a VAE beside a VAEAC, speed.json
    python tests/measure_inpainting.py mnist --device cuda --wall 4 --minutes 60 --hidden 1024 --name mnist-gpu
    python tests/measure_inpainting.py faces --device cuda --wall 4 --minutes 60 --batch-size 32     tables 3 and 4

Digits are white above one half; three of 28 rows are seen (VAEAC, A.3). Of the 60,000 training digits the last 1,000
judge the run; the table's numbers are of the first 1,000 test digits, with lines drawn once. Faces: 2,000 of CelebA at
64 × 64, 1,700 to learn from, also mirrored, 100 to judge, 200 for the tables; masks of all kinds come in one training
(A.3 trains once for each table). Of the faces numbers alone are kept.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from measure_simple_rivals import ROOT, commit, device_name, write_facts
from torch import Tensor

from missingbook.foundations.data import load
from missingbook.foundations.imputer import Layout
from missingbook.foundations.masks import (
    FACE_PARTS,
    centre_hidden,
    face_part_hidden,
    half_hidden,
    independent_dropout,
    line_observed,
    pattern_hidden,
    rectangle_hidden,
)
from missingbook.foundations.training import Noise, TrainingRun, in_chunks, seeded
from missingbook.vaes.gsnn import gsnn_bound, prior_log_probs
from missingbook.vaes.inpainting import inpaint, naive_bayes_nll
from missingbook.vaes.vae import importance_weighted_bound, normal_kl, reparameterize
from missingbook.vaes.vaeac import (
    VAEAC,
    ImageNetworks,
    TableNetworks,
    importance_score,
    log_weights,
    reconstruction,
    vaeac_bound,
)

BEGUN_AT = commit()  # of the code that is loaded; the checkout may move on meanwhile
FOLDER = ROOT / "results" / "inpainting"
CPU = torch.device("cpu")
WIDTH, FACE = 784, (3, 64, 64)


def about(**facts) -> dict:
    """What every file says of its run."""
    return {"device": "cpu"} | facts | {
        "threads": torch.get_num_threads(), "commit": BEGUN_AT,
        "versions": {p: version(p) for p in ("torch", "numpy")},
    }


def digits(split: str) -> Tensor:
    """Black and white digits, flat."""
    return (load("mnist", split=split).x > 127).float().flatten(1)


def lines(observed: Tensor, noise: Noise) -> Tensor:
    """What is shown of each digit: three rows."""
    return line_observed((len(observed), 28, 28), 3, noise.generator).flatten(1)


def build(args: argparse.Namespace) -> VAEAC:
    """The networks, all pixels Bernoulli."""
    with seeded(args.seed, CPU):
        networks = TableNetworks(WIDTH, WIDTH, args.hidden, args.depth, args.latent)
        return VAEAC(Layout(WIDTH, (), tuple(range(WIDTH))), networks, args.latent)


class Clock:
    """CPU seconds without those of judging, and how far the run is: by CPU time or the wall's, whichever ends first."""

    def __init__(self, minutes: float, wall: float):
        self.cpu, self.wall, self.limits = time.process_time(), time.perf_counter(), (60 * minutes, 60 * wall)
        self.aside = 0.0

    def seconds(self) -> float:
        return time.process_time() - self.cpu - self.aside

    def done(self) -> float:
        return max(self.seconds() / self.limits[0], (time.perf_counter() - self.wall) / self.limits[1])


def rate(done: float, highest: float) -> float:
    """Learning rate: constant for 30 per cent of the run, then half a cosine down to a hundredth."""
    fall = max(done - 0.3, 0) / 0.7
    return highest * (0.01 + 0.99 * (1 + math.cos(math.pi * min(fall, 1))) / 2)


def judged(network: VAEAC, judge: tuple[Tensor, ...], model: str) -> float:
    """Negative log-likelihood of the judging digits by 25 draws, from the proposal or the prior."""
    if model == "vaeac":
        return float(importance_score(network, *judge, Noise(3, judge[0].device), k=25, chunk=128))
    return -float(monte_carlo(network, *judge, 25, 3).mean())


def monte_carlo(network: VAEAC, x: Tensor, observed: Tensor, seen: Tensor, k: int, seed: int) -> Tensor:
    """Eq. 17 with k draws, in portions of 100."""
    noise = Noise(seed, x.device)

    def value(*rows: Tensor) -> Tensor:
        parts = [prior_log_probs(network, *rows, noise.normal(min(100, k - start), len(rows[0]), network.latent))
                 for start in range(0, k, 100)]
        return importance_weighted_bound(torch.cat(parts).double())

    return in_chunks(value, x, observed, seen, chunk=50)


def mirrored(x: Tensor, noise: Noise) -> Tensor:
    """Half of the faces, by chance, in the mirror."""
    turned = x.view(-1, *FACE).flip(3).flatten(1)
    return torch.where(noise.uniform(len(x))[:, None] < 0.5, x, turned)


def train(network: VAEAC, args: argparse.Namespace, x: Tensor, judge: tuple[Tensor, ...], hide: Callable = lines,
          vary: Callable = lambda x, noise: x) -> tuple[list[dict], float]:
    """Adam up the bound until the clock says stop; the curve of the judging rows, and the CPU seconds of training.

    hide(observed, noise): what is shown; vary(x, noise): the rows as they are learned. The last weights stay, or with
    args.best those that were best on the judging rows."""
    bound = vaeac_bound if args.model == "vaeac" else gsnn_bound
    run, observed = TrainingRun(args.seed, args.device, args.precision, verbose=False), torch.ones_like(x).bool()
    curve, best = [], (math.inf, {})
    optimizer = run.adam(network, args.learning_rate)
    warm = args.warm_up > 0 and args.model == "vaeac"
    step = run.stepper(lambda *batch: {"loss": -bound(network, *batch).mean()}, optimizer)
    clock = Clock(args.minutes, args.wall)
    for epoch in run.epochs(10**6):
        for batch in run.batches(x, observed, batch_size=args.batch_size):
            optimizer.param_groups[0]["lr"] = rate(clock.done(), args.learning_rate)
            eps = run.noise.normal(len(batch[0]), network.latent)
            weight = (torch.full_like(eps[:, 0], min(clock.done() / args.warm_up, 1.0)),) if warm else ()
            step(vary(batch[0], run.noise), batch[1], hide(batch[1], run.noise), eps, *weight)
            if clock.done() >= 1:
                run.end()
                break
        if run.ended or (epoch + 1) % args.every == 0:
            begun = time.process_time()
            nll = judged(network, judge, args.model)
            clock.aside += time.process_time() - begun
            curve.append({"epoch": epoch + 1, "nll": round(nll, 3), "cpu_seconds": round(clock.seconds(), 1)})
            print(curve[-1], flush=True)
            if args.best and nll < best[0] and clock.done() > args.warm_up:
                best = nll, {name: value.clone() for name, value in network.state_dict().items()}
    if best[1]:
        network.load_state_dict(best[1])
    return curve, clock.seconds()


def mean_and_error(nll: Tensor) -> dict:
    """Mean over the digits and its standard error."""
    error = (nll.std() / len(nll) ** 0.5).item()
    return {"value": round(nll.mean().item(), 3), "error": round(error, 3), "digits": len(nll)}


def table9(network: VAEAC, args: argparse.Namespace, x: Tensor, observed: Tensor, seen: Tensor, share: Tensor) -> dict:
    """Its rows. MC with many draws is for the first `args.rows` digits, and MC-100 of the same digits is beside it."""
    few = tuple(t[: args.rows] for t in (x, observed, seen))
    whole = digits("test").to(x.device)  # what the printed 205 nats may be: all test digits, seen pixels and all
    found = {"naive_bayes": mean_and_error(naive_bayes_nll(x, ~seen, share)),
             "naive_bayes_all_pixels": mean_and_error(naive_bayes_nll(whole, torch.ones_like(whole).bool(), share))}
    if args.model == "vaeac":
        noise = Noise(5, x.device)

        def value(*rows: Tensor) -> Tensor:
            eps = noise.normal(100, len(rows[0]), network.latent)
            return importance_weighted_bound(log_weights(network, *rows, eps).double())

        by_proposal = -in_chunks(value, x, observed, seen, chunk=50)
        found["is_100"] = mean_and_error(by_proposal)
        found["is_100_few"] = mean_and_error(by_proposal[: args.rows])
    by_prior = -monte_carlo(network, x, observed, seen, 100, 6)
    found["mc_100"] = mean_and_error(by_prior)
    found["mc_100_few"] = mean_and_error(by_prior[: args.rows])
    found["mc_10000_few"] = mean_and_error(-monte_carlo(network, *few, 10_000, 7))
    return found


def save_pictures(path: Path, network: VAEAC, x: Tensor, seen: Tensor) -> None:
    """Draws for twelve test digits: ten completions each, as probabilities of white in bytes. Whole or not at all."""
    with torch.no_grad():
        draws = inpaint(network, x, seen, Noise(8, x.device).normal(10, len(x), network.latent))
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    kept = {"truth": x.bool(), "seen": seen, "draws": (255 * draws).round().byte()}
    with draft.open("wb") as file:
        np.savez_compressed(file, **{name: value.cpu().numpy() for name, value in kept.items()})
    os.replace(draft, path)


def measure_mnist(args: argparse.Namespace) -> None:
    """One row group of table 9."""
    x, test = digits("train"), digits("test")[:1000]
    learn, judge = x[:-1000], x[-1000:]
    share = (learn.sum(0) + 1) / (len(learn) + 2)
    shown = [lines(part, Noise(seed, CPU)).to(args.device) for part, seed in ((judge, 1), (test, 2))]
    learn, judge, test, share = (part.to(args.device) for part in (learn, judge, test, share))
    everything = [torch.ones_like(part).bool() for part in (judge, test)]
    network, name = build(args).to(args.device), args.name or {"vaeac": "mnist", "gsnn": "gsnn"}[args.model]
    curve, seconds = train(network, args, learn, (judge, everything[0], shown[0]))
    names = ("hidden", "depth", "latent", "batch_size", "learning_rate", "warm_up", "precision", "seed")
    settings = {n: getattr(args, n) for n in names}
    facts = about(what="negative log-likelihood of 25 hidden rows given a line of three, binarized MNIST, in nats",
                  model=args.model, device=device_name(args.device), settings=settings,
                  training_digits=len(learn), cpu_seconds=round(seconds, 1),
                  parameters=sum(p.numel() for p in network.parameters()), curve=curve)
    write_facts(FOLDER / f"{name}.json", facts)  # a run that is cut off leaves what it had
    rows = torch.tensor([int(np.flatnonzero(load("mnist", split="test").y[:1000] == c)[0]) for c in range(10)])
    save_pictures(FOLDER / f"{name}.npz", network, test[rows], shown[1][rows])
    facts["test"] = table9(network, args, test, everything[1], shown[1], share)
    print(facts["test"], flush=True)
    write_facts(FOLDER / f"{name}.json", facts)


KINDS = {"center": lambda shape, noise: centre_hidden(shape, noise.device),
         "pattern": lambda shape, noise: pattern_hidden(shape, noise.generator),
         "random": lambda shape, noise: independent_dropout(shape, 0.8, noise.generator),
         "half": lambda shape, noise: half_hidden(shape, noise.generator),
         "rectangle": lambda shape, noise: rectangle_hidden(shape, 1 / 16, noise.generator)}


def all_kinds(observed: Tensor, noise: Noise) -> Tensor:
    """What is shown of each face: a fifth of the rows for each kind of mask, the batch being in random order."""
    sizes = [len(part) for part in np.array_split(np.arange(len(observed)), len(KINDS))]
    seen = torch.cat([kind((n, *FACE[1:]), noise) for kind, n in zip(KINDS.values(), sizes, strict=True) if n])
    return seen[:, None].expand(-1, 3, -1, -1).flatten(1)


@torch.no_grad()
def peak_ratios(network: VAEAC, x: Tensor, unit: Callable, mean: Tensor) -> list[dict]:
    """Tables 3 and 4: PSNR in dB, means over the faces: one completion, the best of ten, their mean, the mean face."""
    masks = {name: KINDS[name] for name in KINDS if name != "rectangle"} | {
        part: lambda shape, noise, part=part: face_part_hidden(shape, part, noise.device) for part in FACE_PARTS}
    found, truth = [], unit(x)
    for name, kind in masks.items():
        seen = kind((len(x), *FACE[1:]), Noise(4, x.device))[:, None].expand(-1, 3, -1, -1).flatten(1)
        eps = Noise(8, x.device).normal(10, len(x), network.latent)
        made = torch.stack([inpaint(network, x, seen, e[None])[0] for e in eps])
        every = (*made, made.mean(0), mean.expand_as(x))
        errors = torch.stack([(unit(torch.where(seen, x, m)) - truth).square().mean(1) for m in every])
        ratios = -10 * errors.log10()
        values = {"one": ratios[0], "best_of_10": ratios[:10].amax(0), "mean_of_10": ratios[10]}
        values |= {"mean_face": ratios[11]}
        found.append({"mask": name, "hidden": round((~seen).float().mean().item(), 4)}
                     | {k: round(v.mean().item(), 2) for k, v in values.items()} | {"faces": len(x)})
        print(found[-1], flush=True)
    return found


def measure_faces(args: argparse.Namespace) -> None:
    """Tables 3 and 4 with what 1,700 faces teach."""
    images = load("celeba-64").x.float() / 255
    mean, sd = images[:1700].mean((0, 2, 3), keepdim=True), images[:1700].std((0, 2, 3), keepdim=True)
    x = ((images - mean) / sd).flatten(1).to(args.device)
    mean, sd = (t.expand(1, *FACE).flatten(1).to(args.device) for t in (mean, sd))
    learn, judge, test = x.split([1700, 100, 200])
    width = x.shape[1]
    with seeded(args.seed, CPU):
        networks = ImageNetworks(FACE, 6, tuple(args.channels), args.blocks, args.latent)
        network = VAEAC(Layout(width, tuple(range(width))), networks, args.latent, sigma_min=0.05).to(args.device)
    everything = torch.ones_like(judge).bool()
    held = (judge, everything, all_kinds(everything, Noise(1, CPU)).to(args.device))
    curve, seconds = train(network, args, learn, held, all_kinds, mirrored)
    names = ("channels", "blocks", "latent", "batch_size", "learning_rate", "warm_up", "precision", "seed", "best")
    facts = about(what="PSNR (dB) of completed faces of CelebA, 64 × 64", device=device_name(args.device),
                  settings={n: getattr(args, n) for n in names}, faces=len(learn), cpu_seconds=round(seconds, 1),
                  parameters=sum(p.numel() for p in network.parameters()), curve=curve,
                  test=peak_ratios(network, test, lambda x: (x * sd + mean).clamp(0, 1), learn.mean(0)))
    write_facts(FOLDER / "faces.json", facts)


def vae_bound(network: VAEAC, x: Tensor, observed: Tensor, seen: Tensor, eps: Tensor) -> Tensor:
    """Eq. 1 with the same proposal and generative networks, no prior network and no memory."""
    nothing = torch.zeros_like(observed)
    mean, sigma = network.propose(x, nothing, observed)
    output, spread = network.generate(reparameterize(mean, sigma, eps), [0.0] * (len(network.networks.memories) + 1))
    kl = normal_kl(mean, sigma, torch.zeros_like(mean), torch.ones_like(mean))
    return reconstruction(output, x, observed, network.layout, spread) - kl


def climb(args: argparse.Namespace, x: Tensor, bound: Callable, seed: int) -> tuple[list[float], float]:
    """Means of the bound over every 50 of the iterations, in nats, and CPU seconds an iteration."""
    args.seed = seed
    network, values = build(args), []
    run = TrainingRun(seed, "cpu", "float32", verbose=False)
    step = run.stepper(lambda *batch: {"loss": -bound(network, *batch).mean()}, run.adam(network, args.learning_rate))
    for _ in run.epochs(1):  # of as many digits as the iterations need
        begun = time.process_time()
        for batch in run.batches(x, torch.ones_like(x).bool(), batch_size=args.batch_size):
            shown = lines(batch[1], run.noise)
            values.append(step(*batch, shown, run.noise.normal(len(batch[0]), network.latent))["loss"])
        seconds = (time.process_time() - begun) / len(values)
    means = torch.stack(values).view(-1, 50).mean(1)
    return [round(-v, 2) for v in means.tolist()], seconds


def measure_speed(args: argparse.Namespace) -> None:
    """Appendix D.1: bounds over iterations, and what an iteration costs; the two take turns."""
    x, found = digits("train")[: 300 * args.batch_size], []
    for seed in range(args.repeats):
        for name, bound in (("vae", vae_bound), ("vaeac", vaeac_bound)):
            curve, seconds = climb(args, x, bound, seed)
            found.append({"model": name, "seed": seed, "seconds": round(seconds, 5), "curve": curve})
            print(found[-1], flush=True)
    settings = {n: getattr(args, n) for n in ("hidden", "depth", "latent", "batch_size", "learning_rate")}
    write_facts(FOLDER / "speed.json", about(
        what="bound (nats) by iteration and CPU seconds an iteration of a VAE (two networks) and a VAEAC (three)",
        every=50, settings=settings, precision="float32", runs=found))


def main() -> None:
    """One of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["mnist", "speed", "faces"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", help="of the file of `mnist`, if not the model's")
    parser.add_argument("--every", type=int, default=2, help="epochs between two looks at the judging rows")
    parser.add_argument("--best", action="store_true", help="keep the weights that were best on the judging rows")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 96, 128, 128, 128], help="faces: of stages")
    parser.add_argument("--blocks", type=int, default=2, help="faces: in a stage")
    parser.add_argument("--model", choices=["vaeac", "gsnn"], default="vaeac")
    parser.add_argument("--minutes", type=float, default=20.0, help="of CPU time for training")
    parser.add_argument("--wall", type=float, default=math.inf, help="minutes by the clock, if these end first")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warm-up", type=float, default=0.2,
                        help="share of the run in which the weight of the divergence rises to 1")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="bf16")
    parser.add_argument("--rows", type=int, default=100, help="test digits for Monte Carlo with 10,000 draws")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    {"mnist": measure_mnist, "speed": measure_speed, "faces": measure_faces}[args.what](args)


if __name__ == "__main__":
    main()
