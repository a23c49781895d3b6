"""Measure VAEAC, hybrid and GSNN on the mixture of appendix C.2; write results/gsnn/mixture.json; run by hand, no test.

    python tests/measure_gsnn.py --seeds 0 1 2 --alphas 1 0.99 0.9

Eight equal parts N(centre, 0.01 I) in the plane, centres from N(0, I) by seed; 100,000 points; either coordinate is
hidden with probability 1/2. Scores, in nats, are means over 5,000 fresh points and the four masks, each weighing 1/4:
the mask that hides nothing counts 0, as in the expectation over p(b). It teaches nothing either and is left out of
training: the other three come equally often. A run replaces the one of its seed and weight, and runs of that seed with
another recipe go: all weights of a seed get the same steps. Several processes may run side by side. mixture.npz has 500
draws by mask, of seed 0.
"""

import argparse
import json
import time
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from measure_simple_rivals import ROOT, commit, write_facts
from torch import Tensor

from missingbook.foundations.imputer import Layout, cell_draw
from missingbook.foundations.training import Noise, TrainingRun, seeded
from missingbook.vaes.gsnn import hybrid_bound, mixture_draw, mixture_log_prob, monte_carlo_log_prob
from missingbook.vaes.vae import importance_weighted_bound, reparameterize
from missingbook.vaes.vaeac import VAEAC, TableNetworks, log_weights, train_vaeac

BEGUN_AT = commit()
PATH = ROOT / "results" / "gsnn" / "mixture.json"
LAYOUT, SIGMA, CPU = Layout(2, (0, 1)), 0.1, torch.device("cpu")
ABOUT = {"sigma": SIGMA, "latent": 25, "device": "cpu", "threads": 1}
MASKS = {"both hidden": (False, False), "x1 given x2": (False, True), "x2 given x1": (True, False)}


def some_hidden(observed: Tensor, noise: Noise) -> Tensor:
    """1 − b: one of the three masks that hide something."""
    return torch.tensor(list(MASKS.values()))[(noise.uniform(len(observed)) * len(MASKS)).long()]


def train(x: Tensor, alpha: float, seed: int, args: argparse.Namespace) -> VAEAC:
    """All epochs, no early stop. In the first stage the divergence counts a tenth, then the learning rate falls.

    Without that stage the proposal may give up at once, and z says nothing for thousands of steps."""
    with seeded(seed, CPU):
        network = VAEAC(LAYOUT, TableNetworks(2, 4, args.hidden, args.depth, 25), 25)
    for stage, (rate, epochs) in enumerate(zip(args.rates, args.epochs, strict=True)):
        bound = partial(hybrid_bound, alpha=alpha, weight=0.1 if stage == 0 else 1.0)
        run = TrainingRun(1000 * seed + stage, "cpu", verbose=False)
        train_vaeac(network, x, torch.ones_like(x, dtype=torch.bool), run, some_hidden,
                    epochs, args.batch, rate, 0.0, bound=bound)
    return network.eval()


@torch.inference_mode()
def scores(network: VAEAC, x: Tensor, centres: Tensor, noise: Noise) -> dict:
    """−log p(hidden | seen) by mask: the truth, and the model's by 10 draws of each kind and 100 from the proposal."""
    every, found = torch.ones_like(x, dtype=torch.bool), {}
    for name, mask in MASKS.items():
        seen = torch.tensor(mask).expand(len(x), 2)
        truth = mixture_log_prob(x, every, centres, SIGMA) - mixture_log_prob(x, seen, centres, SIGMA)
        ten = [noise.normal(10, len(x), 25) for _ in range(2)]
        parts = [(x[k], every[k], seen[k], noise.normal(100, len(k), 25)) for k in torch.arange(len(x)).split(500)]
        by_100 = torch.cat([importance_weighted_bound(log_weights(network, *part)) for part in parts])
        values = {"exact": truth, "is_10": importance_weighted_bound(log_weights(network, x, every, seen, ten[0])),
                  "mc_10": monte_carlo_log_prob(network, x, every, seen, ten[1]), "is_100": by_100}
        found[name] = {k: -v.mean().item() for k, v in values.items()}
    total = {k: sum(found[m][k] for m in MASKS) / 4 for k in found["both hidden"]}
    return {"mean": total, "by_mask": found}


@torch.inference_mode()
def modes(network: VAEAC, x: Tensor, centres: Tensor, noise: Noise) -> tuple[dict, dict]:
    """Of draws by mask: the share within three sigma of a centre, how many of eight get half their due; and draws."""
    found, kept = {}, {}
    for name, mask in MASKS.items():
        seen = torch.tensor(mask).expand(len(x), 2)
        mean, sigma, memory = network.recall(x, seen)
        output, spread = network.generate(reparameterize(mean, sigma, noise.normal(len(x), 25)), memory)
        drawn = torch.where(seen, x, cell_draw(output, LAYOUT, noise, spread))
        near = torch.cdist(drawn, centres) < 3 * SIGMA
        found[name] = {"near": near.any(1).float().mean().item(), "alive": int((near.float().mean(0) >= 1 / 16).sum())}
        kept[name] = drawn[:500].numpy().astype("float16")
    return found, kept


def keep(facts: dict) -> None:
    """One run more in the file, read anew: another process may have written meanwhile."""
    before = json.loads(PATH.read_text())["runs"] if PATH.exists() else []
    facts = facts | {"commit": BEGUN_AT, "torch": version("torch")}
    runs = [facts] + [r for r in before if r["seed"] != facts["seed"] or (
        r["recipe"] == facts["recipe"] and r["alpha"] != facts["alpha"])]
    runs.sort(key=lambda r: (r["seed"], -r["alpha"]))
    write_facts(PATH, {"what": "appendix C.2: eight normals in the plane", "settings": ABOUT, "runs": runs})


def keep_pictures(centres: Tensor, draws: dict) -> None:
    """Draws of one weight more in mixture.npz."""
    path, before = PATH.with_suffix(".npz"), {}
    if path.exists():
        with np.load(path) as stored:
            before = dict(stored)
    np.savez_compressed(path, **before | {"centres": centres.numpy()} | draws)


def main() -> None:
    """Every seed and alpha; the file is written after each."""
    ask = argparse.ArgumentParser()
    ask.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    ask.add_argument("--alphas", type=float, nargs="+", default=[1.0, 0.9, 0.99])
    ask.add_argument("--rows", type=int, default=100_000)
    ask.add_argument("--hidden", type=int, default=64)
    ask.add_argument("--depth", type=int, default=2)
    ask.add_argument("--batch", type=int, default=512)
    ask.add_argument("--rates", type=float, nargs="+", default=[2e-3, 2e-3, 5e-4, 1e-4])
    ask.add_argument("--epochs", type=int, nargs="+", default=[5, 35, 14, 10])
    args = ask.parse_args()
    torch.set_num_threads(1)
    PATH.parent.mkdir(exist_ok=True)
    recipe = {k: v for k, v in vars(args).items() if k not in ("seeds", "alphas")}
    for seed in args.seeds:
        source = Noise(seed, CPU)
        centres = source.normal(8, 2)
        x, fresh = mixture_draw(args.rows, centres, SIGMA, source), mixture_draw(5000, centres, SIGMA, source)
        for alpha in args.alphas:
            begun = time.process_time()
            network = train(x, alpha, seed, args)
            seconds, (shares, kept) = time.process_time() - begun, modes(network, fresh, centres, Noise(2, CPU))
            steps = sum(args.epochs) * -(-args.rows // args.batch)
            facts = {"seed": seed, "alpha": alpha, "cpu_seconds": round(seconds, 1), "recipe": recipe, "steps": steps,
                     "modes": shares, **scores(network, fresh, centres, Noise(1, CPU))}
            if seed == 0:
                keep_pictures(centres, {f"{alpha:g} {name}": v for name, v in kept.items()})
            print(json.dumps(facts), flush=True)
            keep(facts)


if __name__ == "__main__":
    main()
