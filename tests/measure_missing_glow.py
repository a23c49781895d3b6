r"""Measure the Missing Glow phenomenon and write results/missing_glow/NAME.json; run by hand, it is no test.

    python tests/measure_missing_glow.py train NAME --coupling affine --size 5 --epochs 40 --seed 0 [--pictures]
    python tests/measure_missing_glow.py train NAME --model realnvp …
    python tests/measure_missing_glow.py rivals --method prflow --seed 0
    python tests/measure_missing_glow.py train paper --data olivetti --side 64 --size 16 --levels 4 --steps 32 \
        --hidden 512 --batch 16 --device cuda     the paper's architecture; never run

Digits of the MNIST sample, averaged to 14 × 14 and framed to 16 × 16, in 5 bits, with one grey square each. Of 5,000
pictures the first 4,000 are for training, the next 500 judge the epochs, the last 500 are completed. Olivetti: the last
tenth is completed, the tenth before it judges.
"""

import argparse
import math
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure_simple_rivals import ROOT, commit, write_facts
from torch import Tensor

from missingbook.flows.coupling import Flow, bits_per_dimension, dequantize
from missingbook.flows.glow import Glow
from missingbook.flows.missing_glow import (
    ALPHAS,
    add_squares,
    choose_alpha,
    count_squares,
    detection_scores,
    draw_at,
    find_squares,
    shrink,
    shrink_until_clean,
)
from missingbook.flows.prflow import PRFlowImputer
from missingbook.flows.realnvp import ImageRealNVP, train_flow
from missingbook.foundations.classics import NeighboursImputer
from missingbook.foundations.data import load
from missingbook.foundations.training import TrainingRun, in_chunks, seeded
from missingbook.vaes.vaeac import VAEACImputer

FOLDER, BEGUN_AT, LEVELS = ROOT / "results" / "missing_glow", commit(), 32
TEMPERATURES = tuple(k / 10 for k in range(1, 16))
PRFLOW, VAEAC = dict(max_epochs=24, hidden=128, latent_hidden=256), dict(max_epochs=24)
RIVALS = {"prflow": lambda seed: PRFlowImputer(**PRFLOW, random_state=seed, verbose=False),
          "vaeac": lambda seed: VAEACImputer(**VAEAC, random_state=seed, verbose=False)}


def pictures(data: str, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """(training, judging, test) in [0, 1], whole levels' middles, (n, 1, side, side)."""
    x = load("mnist-sample" if data == "mnist" else data).x.float() / 255
    if data == "mnist":
        x = F.pad(F.avg_pool2d(x, 2), 4 * [1])
    elif x.shape[2] != side:
        x = F.adaptive_avg_pool2d(x, side)
    else:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    x = ((x * LEVELS).floor().clamp(0, LEVELS - 1) + 0.5) / LEVELS
    tenth = len(x) // 10
    return x[: -2 * tenth], x[-2 * tenth : -tenth], x[-tenth:]


def levels_of(x: Tensor) -> Tensor:
    """Middles of levels as whole levels."""
    return (x * LEVELS - 0.5).round()


class Watched(TrainingRun):
    """A run whose learning rate falls along a cosine, and which looks at the flow after some epochs."""

    def __init__(self, *args, total: int, look, at: tuple[int, ...], **kwargs):
        super().__init__(*args, **kwargs)
        self.total, self.look, self.at, self.notes = total, look, at, []

    def keep(self, **parts):
        super().keep(**parts)
        self.optimizer, self.flow = parts["optimizer"], parts["flow"]
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def epochs(self, n):
        for epoch in super().epochs(n):
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * max(0.02, 0.5 * (1 + math.cos(math.pi * epoch / self.total)))
            yield epoch
            if epoch + 1 in self.at:
                self.flow.eval()
                self.notes.append({"epoch": epoch + 1, **self.look(self.flow)})
                print(self.notes[-1], round(self._seconds()), flush=True)


def counts_at(flow: Flow, size: int, n: int, seed: int, temperatures: tuple[float, ...] = TEMPERATURES) -> Tensor:
    """(temperatures, n) numbers of squares, of the same latent draws."""
    draws = draw_at(flow, temperatures, n, torch.Generator().manual_seed(seed))
    return torch.stack([count_squares(x, size) for x in draws])


def bits(flow: Flow, x: Tensor) -> float:
    """Bits per dimension of pictures, one dequantization."""
    noisy = dequantize(levels_of(x), LEVELS, torch.Generator().manual_seed(0))
    log_prob = in_chunks(flow.log_prob, noisy, chunk=500)
    return round(bits_per_dimension(log_prob.double(), x[0].numel(), LEVELS).mean().item(), 4)


def rmse_at(a: Tensor, b: Tensor, where: Tensor) -> float:
    """Root mean square difference where `where` is True."""
    return round((a - b)[where].square().mean().sqrt().item(), 5)


def completion(flow: Flow, truth: Tensor, painted: Tensor, observed: Tensor, size: int) -> dict:
    """For every α: error in the square, change outside of it, squares left; and each picture at its own α."""
    hidden, table = ~observed[:, None].expand(truth.shape), []
    for alpha in ALPHAS:
        made = shrink(flow, painted, alpha)
        table.append({"alpha": alpha, "inside": rmse_at(made, truth, hidden), "outside": rmse_at(made, truth, ~hidden),
                      "squares": round(count_squares(made, size).double().mean().item(), 4)})
    made, own = shrink_until_clean(flow, painted, size)
    clean = {"inside": rmse_at(made, truth, hidden), "outside": rmse_at(made, truth, ~hidden),
             "squares": round(count_squares(made, size).double().mean().item(), 4),
             "mean_alpha": round(own.mean().item(), 3)}
    return {"by_alpha": table, "until_clean": clean}


def norms(flow: Flow, x: Tensor, size: int, n: int = 200) -> dict:
    """Latent norms of pictures with other squares than the flow was trained on (appendix B, figure 6)."""
    sides = {f"{side} × {side}": (side, 1) for side in (2, 3, 5, 8)}
    result, numbers = {}, {f"{k} squares": (size, k) for k in range(4)}
    for name, (side, k) in (sides | numbers).items():
        painted = add_squares(x[:n], side, k, 16.5 / LEVELS, torch.Generator().manual_seed(7))[0]
        noisy = dequantize(levels_of(painted), LEVELS, torch.Generator().manual_seed(8))
        z = in_chunks(lambda rows: flow(rows)[0], noisy)
        result[name] = [round(v, 2) for v in z.norm(dim=1).tolist()]
    return result


def build(s: argparse.Namespace) -> Flow:
    """The untrained flow."""
    shape, generator = (1, s.side, s.side), torch.Generator().manual_seed(s.seed)
    if s.model == "realnvp":
        return ImageRealNVP(shape, s.levels, s.steps, s.hidden, generator=generator)
    return Glow(shape, s.levels, s.steps, s.hidden, s.coupling, generator=generator)


def about(s: argparse.Namespace) -> dict:
    """What every record says of its run."""
    return {"settings": {k: v for k, v in vars(s).items() if not isinstance(v, Path) and k not in ("job", "keep")},
            "device": s.device if "device" in s else "cpu",
            "threads": torch.get_num_threads(), "commit": BEGUN_AT, "versions": {"torch": version("torch")}}


def train(s: argparse.Namespace) -> None:
    """Train one flow, look at it on the way, and write what was seen."""
    x, judge, test = pictures(s.data, s.side)
    painted = [add_squares(part, s.size, 1, 16.5 / LEVELS, torch.Generator().manual_seed(100 + k))
               for k, part in enumerate((x, judge, test))]
    few = (0.3, 0.5, 0.7, 1.0, 1.3)

    def look(flow: Flow) -> dict:
        counts = counts_at(flow, s.size, 500, 5, few).double().mean(1)
        means = {str(t): round(c, 4) for t, c in zip(few, counts.tolist(), strict=True)}
        return {"bits": bits(flow, painted[1][0]), "squares": means}

    marks = tuple(sorted({max(1, round(s.epochs * share)) for share in (0.1, 0.25, 0.5, 0.75)}))
    run = Watched(s.seed, s.device, "float32", verbose=False, total=s.epochs, look=look, at=marks)
    with seeded(s.seed, run.device):
        flow = build(s)
        train_flow(flow, levels_of(painted[0][0]), run, s.epochs, s.batch, s.rate, levels_of(painted[1][0]), LEVELS)
    flow.cpu()
    if s.keep:
        torch.save(flow.state_dict(), s.keep)
    counts = counts_at(flow, s.size, s.draws, 6)
    alpha, errors = choose_alpha(flow, painted[0][0][:500], painted[0][1][:500, None], ALPHAS, 16.5 / LEVELS,
                                 torch.Generator().manual_seed(9))
    truth = add_squares(test, s.size, 3, generator=torch.Generator().manual_seed(10))
    facts = about(s) | {
        "parameters": sum(p.numel() for p in flow.parameters()), "seconds": round(run._seconds()),
        "bits": {"train": bits(flow, painted[0][0][:500]), "test": bits(flow, painted[2][0])},
        "judged": [round(v, 3) for v in run.history["validation"].tolist()], "curve": run.notes,
        "detector": detection_scores(find_squares(truth[0], s.size), truth[2], s.size),
        "draws": s.draws, "temperatures": TEMPERATURES,
        "histogram": [torch.bincount(c, minlength=8).tolist() for c in counts],
        "alpha_second_hole": {"alpha": alpha, "errors": [round(e, 5) for e in errors]},
        "test": completion(flow, test, painted[2][0], painted[2][1], s.size),
        "train": completion(flow, x[:500], painted[0][0][:500], painted[0][1][:500], s.size),
        "norms": norms(flow, test, s.size)}
    s.out.mkdir(parents=True, exist_ok=True)
    write_facts(s.out / f"{s.name}.json", facts)
    if s.pictures:
        keep_pictures(flow, s, test, *painted[2][:2])


def keep_pictures(flow: Flow, s: argparse.Namespace, test: Tensor, painted: Tensor, observed: Tensor) -> None:
    """Draws at every temperature and completions at every α, as bytes."""
    byte = lambda x: (x * 255).round().byte().numpy()  # noqa: E731
    draws = draw_at(flow, TEMPERATURES, 48, torch.Generator().manual_seed(6))
    made = torch.stack([shrink(flow, painted[:12], alpha) for alpha in ALPHAS])
    np.savez_compressed(s.out / f"{s.name}.npz", draws=byte(draws), made=byte(made), truth=byte(test[:12]),
                        painted=byte(painted[:12]), observed=observed[:12].numpy())


def rivals(s: argparse.Namespace) -> None:
    """One imputer on the same pictures, holes marked: error in the square of the test pictures."""
    x, judge, test = pictures("mnist", 16)
    holes = []
    for k, part in enumerate((x, judge, test)):
        observed = add_squares(part, s.size, generator=torch.Generator().manual_seed(100 + k))[1]
        holes.append((part, observed[:, None]))
    (x, seen), _, (test, seen_test) = holes
    X, X_test = (torch.where(o, p, torch.nan).numpy() for p, o in ((x, seen), (test, seen_test)))
    began = time.perf_counter()
    if s.method == "mean":
        made = np.broadcast_to(np.nanmean(X, 0), X_test.shape)
    elif s.method == "knn":
        knn = NeighboursImputer(5, scale="minmax").fit(X.reshape(len(X), -1))
        made = np.asarray(knn.transform(X_test.reshape(len(test), -1))).reshape(X_test.shape)
    else:
        made = RIVALS[s.method](s.seed).fit(X).transform(X_test)
    made = torch.where(seen_test, test, torch.as_tensor(np.array(made), dtype=torch.float32))
    name = f"rival-{s.method}-{s.size}-{s.seed}"
    facts = about(s) | {"method": s.method, "inside": rmse_at(made, test, ~seen_test),
                        "own": {"prflow": PRFLOW, "vaeac": VAEAC}.get(s.method, {}),
                        "seconds": round(time.perf_counter() - began)}
    write_facts(s.out / f"{name}.json", facts)
    print(name, facts["inside"], facts["seconds"])


def arguments() -> argparse.Namespace:
    """What is asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = parser.add_subparsers(dest="job", required=True)
    one, two = jobs.add_parser("train"), jobs.add_parser("rivals")
    one.add_argument("name")
    one.add_argument("--model", default="glow", choices=["glow", "realnvp"])
    one.add_argument("--coupling", default="affine", choices=["affine", "additive"])
    one.add_argument("--data", default="mnist", choices=["mnist", "olivetti"])
    numbers = dict(side=16, size=5, epochs=40, batch=100, seed=0, levels=3, steps=8, hidden=48, draws=2000)
    for name, value in numbers.items():
        one.add_argument(f"--{name}", type=int, default=value)
    one.add_argument("--rate", type=float, default=1e-3)
    one.add_argument("--device", default="cpu")
    one.add_argument("--pictures", action="store_true")
    one.add_argument("--keep", type=Path)
    two.add_argument("--method", default="mean", choices=["mean", "knn", *RIVALS])
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--size", type=int, default=5)
    for job in (one, two):
        job.add_argument("--out", type=Path, default=FOLDER)
    return parser.parse_args()


def main() -> None:
    """One job, one file."""
    asked = arguments()
    torch.set_num_threads(1)
    {"train": train, "rivals": rivals}[asked.job](asked)


if __name__ == "__main__":
    main()
