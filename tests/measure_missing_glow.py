r"""Measure the Missing Glow phenomenon and write results/missing_glow/NAME.json; run by hand, it is no test.

    python tests/measure_missing_glow.py train NAME --coupling affine --size 5 --epochs 40 --seed 0 [--pictures]
    python tests/measure_missing_glow.py train NAME --model realnvp …
    python tests/measure_missing_glow.py rivals --method prflow --seed 0
    python tests/measure_missing_glow.py train mnist --data mnist --grey 0.5
    python tests/measure_missing_glow.py detector
    python tests/measure_missing_glow.py matched affine-5-0 … --weights FOLDER     after `train … --keep FOLDER/NAME.pt`
    python tests/measure_missing_glow.py train celeba-16-0 --data celeba --grey 0.5 --side 64 --size 16 --levels 4 \
        --steps 32 --hidden 512 --batch 32 --epochs 30 --warm 8 --rate 6e-5 --draws 500 --tolerance 0.12 \
        --device cuda     the paper's architecture and pictures, 2,000 of them

Olivetti's 400 faces, ten crops of 56 × 56 of each, half of them mirrored, averaged to side × side pixels, in 5 bits,
with one square each. The squares are white: mid-grey is skin in a grey picture. Persons 1 to 32 are for training, 33 to
36 judge the epochs, 37 to 40 are completed. MNIST: 4,000, 500 and 500 digits of the sample, averaged to 14 × 14 and
framed. Photo patches: colour pictures from two photographs, in random order. CelebA: numbers alone are kept.
"""

import argparse
import json
import math
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure_simple_rivals import ROOT, commit, device_name, write_facts
from torch import Tensor

from missingbook.flows.coupling import Flow, bits_per_dimension, dequantize
from missingbook.flows.glow import Glow
from missingbook.flows.missing_glow import (
    ALPHAS,
    add_squares,
    choose_alpha,
    complete,
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
from missingbook.foundations.data import load, photo_patches
from missingbook.foundations.training import TrainingRun, in_chunks, seeded
from missingbook.vaes.vaeac import VAEACImputer

FOLDER, BEGUN_AT, LEVELS = ROOT / "results" / "missing_glow", commit(), 32
TEMPERATURES = tuple(k / 10 for k in range(1, 16))
PRFLOW, VAEAC = dict(max_epochs=24, hidden=128, latent_hidden=256), dict(channels=())
RIVALS = {"prflow": lambda seed: PRFlowImputer(**PRFLOW, random_state=seed, verbose=False),
          "vaeac": lambda seed: VAEACImputer(**VAEAC, random_state=seed, verbose=False)}


def faces(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ten crops of each of 320, 40 and 40 faces, in random order; no person is in two parts."""
    x, generator, crops = load("olivetti").x.float() / 255, torch.Generator().manual_seed(0), []
    for face in x:
        for _ in range(10):
            top, left, mirrored = torch.randint(0, 9, (3,), generator=generator).tolist()
            crop = face[:, top : top + 56, left : left + 56]
            crops.append(F.adaptive_avg_pool2d(crop.flip(2) if mirrored > 4 else crop, side))
    parts = torch.stack(crops).split([3200, 400, 400])
    return tuple(part[torch.randperm(len(part), generator=generator)] for part in parts)


def pictures(data: str, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """(training, judging, test) in [0, 1], whole levels' middles, (n, channels, side, side)."""
    if data == "olivetti":
        parts = faces(side)
    elif data == "celeba":
        parts = F.adaptive_avg_pool2d(load("celeba-64").x.float() / 255, side).split([1600, 200, 200])
    elif data == "mnist":
        parts = F.pad(F.avg_pool2d(load("mnist-sample").x.float() / 255, 2), 4 * [1]).split([4000, 500, 500])
    else:
        x = F.adaptive_avg_pool2d(photo_patches(32, 8).x.float() / 255, side)
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
        parts = x[:4000].split([len(x[:4000]) - 1000, 500, 500])
    return tuple(((x * LEVELS).floor().clamp(0, LEVELS - 1) + 0.5) / LEVELS for x in parts)


def level(grey: float) -> float:
    """The middle of a grey level in [0, 1]."""
    return (min(int(grey * LEVELS), LEVELS - 1) + 0.5) / LEVELS


def squares_in(parts: tuple[Tensor, Tensor, Tensor], size: int, grey: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """One square in every picture of every part: the same for all runs."""
    return [add_squares(part, size, 1, level(grey), torch.Generator().manual_seed(100 + k))
            for k, part in enumerate(parts)]


def levels_of(x: Tensor) -> Tensor:
    """Middles of levels as whole levels."""
    return (x * LEVELS - 0.5).round()


class Watched(TrainingRun):
    """A run whose learning rate rises for `warm` epochs and falls along a cosine; it looks at the flow now and then."""

    def __init__(self, *args, total: int, warm: int, look, at: tuple[int, ...], **kwargs):
        super().__init__(*args, **kwargs)
        self.total, self.warm, self.look, self.at, self.notes = total, warm, look, at, []

    def keep(self, **parts):
        super().keep(**parts)
        self.optimizer, self.flow = parts["optimizer"], parts["flow"]
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def epochs(self, n):
        for epoch in super().epochs(n):
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                begun = min(1.0, (epoch + 1) / (self.warm + 1))
                group["lr"] = rate * begun * max(0.02, 0.5 * (1 + math.cos(math.pi * epoch / self.total)))
            yield epoch
            if epoch + 1 in self.at:
                self.flow.eval()
                self.notes.append({"epoch": epoch + 1, **self.look(self.flow)})
                print(self.notes[-1], round(self._seconds()), flush=True)


def counts_at(flow: Flow, s: argparse.Namespace, n: int, seed: int, at: tuple[float, ...] = TEMPERATURES) -> Tensor:
    """(temperatures, n) numbers of squares, of the same latent draws."""
    draws = draw_at(flow, at, n, torch.Generator().manual_seed(seed))
    return torch.stack([count_squares(x, s.size, grey=level(s.grey), tolerance=s.tolerance) for x in draws])


def bits(flow: Flow, x: Tensor) -> float:
    """Bits per dimension of pictures, one dequantization."""
    noisy = dequantize(levels_of(x), LEVELS, torch.Generator().manual_seed(0))
    log_prob = in_chunks(flow.log_prob, noisy, chunk=500)
    return round(bits_per_dimension(log_prob.double(), x[0].numel(), LEVELS).mean().item(), 4)


def rmse_at(a: Tensor, b: Tensor, where: Tensor) -> float:
    """Root mean square difference where `where` is True."""
    return round((a - b)[where].square().mean().sqrt().item(), 5)


ROUNDS = (1, 8)  # of completion; on the first 200 pictures, for they cost eight times as much


def completion(flow: Flow, truth: Tensor, painted: Tensor, observed: Tensor, size: int, grey: float) -> dict:
    """For every α: error in the square, also after rounds, change outside, squares left; and at its own α."""
    hidden, table = ~observed[:, None].expand(truth.shape), []
    for alpha in ALPHAS:
        made = shrink(flow, painted, alpha)
        rounds = complete(flow, painted[:200], ~hidden[:200], alpha, ROUNDS[1], grey)
        table.append({"alpha": alpha, "inside": rmse_at(made, truth, hidden), "outside": rmse_at(made, truth, ~hidden),
                      "inside_rounds": rmse_at(rounds, truth[:200], hidden[:200]),
                      "squares": round(count_squares(made, size, grey=grey).double().mean().item(), 4)})
    made, own = shrink_until_clean(flow, painted, size, grey=grey)
    clean = {"inside": rmse_at(made, truth, hidden), "outside": rmse_at(made, truth, ~hidden),
             "squares": round(count_squares(made, size, grey=grey).double().mean().item(), 4),
             "mean_alpha": round(own.mean().item(), 3)}
    return {"by_alpha": table, "until_clean": clean}


def norms(flow: Flow, x: Tensor, size: int, grey: float, n: int = 200) -> dict:
    """Latent norms of pictures with other squares than the flow was trained on (appendix B, figure 6)."""
    sides = {f"{side} × {side}": (side, 1) for side in (2, 3, 5, 8)}
    result, numbers = {}, {f"{k} squares": (size, k) for k in range(4)}
    for name, (side, k) in (sides | numbers).items():
        painted = add_squares(x[:n], side, k, grey, torch.Generator().manual_seed(7))[0]
        noisy = dequantize(levels_of(painted), LEVELS, torch.Generator().manual_seed(8))
        z = in_chunks(lambda rows: flow(rows)[0], noisy)
        result[name] = [round(v, 2) for v in z.norm(dim=1).tolist()]
    return result


def build(s: argparse.Namespace) -> Flow:
    """The untrained flow."""
    shape = (3 if s.data in ("photo", "celeba") else 1, s.side, s.side)
    generator = torch.Generator().manual_seed(s.seed)
    if s.model == "realnvp":
        return ImageRealNVP(shape, s.levels, s.steps, s.hidden, generator=generator)
    return Glow(shape, s.levels, s.steps, s.hidden, s.coupling, generator=generator)


def about(s: argparse.Namespace) -> dict:
    """What every record says of its run."""
    return {"settings": {k: v for k, v in vars(s).items() if not isinstance(v, Path) and k not in ("job", "keep")},
            "device": device_name(s.device) if "device" in s else "cpu",
            "threads": torch.get_num_threads(), "commit": BEGUN_AT, "versions": {"torch": version("torch")}}


def train(s: argparse.Namespace) -> None:
    """Train one flow, look at it on the way, and write what was seen."""
    parts = tuple(part.to(s.device) for part in pictures(s.data, s.side))
    painted, few = squares_in(parts, s.size, s.grey), (0.3, 0.5, 0.7, 1.0, 1.3)

    def look(flow: Flow) -> dict:
        counts = counts_at(flow, s, min(500, s.draws), 5, few).double().mean(1)
        means = {str(t): round(c, 4) for t, c in zip(few, counts.tolist(), strict=True)}
        return {"bits": bits(flow, painted[1][0]), "squares": means}

    marks = tuple(sorted({max(1, round(s.epochs * share)) for share in (0.1, 0.25, 0.5, 0.75)}))
    run = Watched(s.seed, s.device, s.precision, verbose=False, total=s.epochs, warm=s.warm, look=look, at=marks)
    with seeded(s.seed, run.device):
        flow = build(s)
        train_flow(flow, levels_of(painted[0][0]), run, s.epochs, s.batch, s.rate, levels_of(painted[1][0]), LEVELS)
    if s.keep:
        torch.save(flow.state_dict(), s.keep)
    s.out.mkdir(parents=True, exist_ok=True)
    write_facts(s.out / f"{s.name}.json", about(s) | facts_of(flow, s, run, parts, painted))
    if s.pictures and s.data != "celeba":  # whose licence forbids to show them
        keep_pictures(flow, s, parts[2], *painted[2][:2])


def facts_of(flow: Flow, s: argparse.Namespace, run: Watched, parts: tuple, painted: list) -> dict:
    """What is measured of a trained flow."""
    counts, (x, _, test) = counts_at(flow, s, s.draws, 6), parts
    found = {name: count_squares(p, s.size, grey=level(s.grey), tolerance=s.tolerance).double().mean().item()
             for name, p in (("painted", painted[2][0]), ("not painted", test))}
    seen = painted[0][1][:200, None].expand(x[:200].shape)
    second = {n: choose_alpha(flow, painted[0][0][:200], seen, ALPHAS, n, level(s.grey),
                              torch.Generator().manual_seed(9)) for n in ROUNDS}
    return {
        "parameters": sum(p.numel() for p in flow.parameters()), "seconds": round(run._seconds()),
        "bits": {"train": bits(flow, painted[0][0][:500]), "test": bits(flow, painted[2][0])},
        "judged": [round(v, 3) for v in run.history["validation"].tolist()], "curve": run.notes,
        "found_in_test": found, "draws": s.draws, "temperatures": TEMPERATURES,
        "histogram": [torch.bincount(c, minlength=8).tolist() for c in counts],
        "second_hole": {n: {"alpha": alpha, "errors": [round(e, 5) for e in errors]}
                        for n, (alpha, errors) in second.items()},
        "test": completion(flow, test, *painted[2][:2], s.size, level(s.grey)),
        "train": completion(flow, x[:200], painted[0][0][:200], painted[0][1][:200], s.size, level(s.grey)),
        "norms": norms(flow, test, s.size, level(s.grey))}


def keep_pictures(flow: Flow, s: argparse.Namespace, test: Tensor, painted: Tensor, observed: Tensor) -> None:
    """Draws at every temperature and completions at every α, as bytes."""
    byte = lambda x: (x * 255).round().byte().cpu().numpy()  # noqa: E731
    draws = draw_at(flow, TEMPERATURES, 48, torch.Generator().manual_seed(6))
    made = torch.stack([shrink(flow, painted[:12], alpha) for alpha in ALPHAS])
    seen = observed[:12, None].expand(test[:12].shape)
    rounds = complete(flow, painted[:12], seen, 0.8, 8, level(s.grey))
    np.savez_compressed(s.out / f"{s.name}.npz", draws=byte(draws), made=byte(made), rounds=byte(rounds),
                        truth=byte(test[:12]), painted=byte(painted[:12]), observed=observed[:12].cpu().numpy())


def rivals(s: argparse.Namespace) -> None:
    """One imputer on the same pictures, holes marked: error in the square of the test pictures."""
    parts = pictures("olivetti", 16)
    (x, _, test), (seen, _, seen_test) = parts, [o[:, None] for _, o, _ in squares_in(parts, s.size, 1.0)]
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
                        "inside_200": rmse_at(made[:200], test[:200], ~seen_test[:200]),
                        "own": {"prflow": PRFLOW, "vaeac": VAEAC}.get(s.method, {}),
                        "seconds": round(time.perf_counter() - began)}
    write_facts(s.out / f"{name}.json", facts)
    print(name, facts["inside"], facts["seconds"])


def matched(s: argparse.Namespace) -> None:
    """Completion with the brightness matched, of flows whose weights were kept: FOLDER/NAME.json, WEIGHTS/NAME.pt."""
    parts, rows = pictures("olivetti", 16), {}
    painted = squares_in(parts, 5, 1.0)
    (truth, seen), (x, seen_x) = ((parts[k][:200], painted[k][1][:200, None]) for k in (2, 0))
    mean = torch.where(painted[0][1][:, None], parts[0], torch.nan).nanmean(0).expand(truth.shape)
    gap = torch.where(seen, truth - mean, 0.0).sum((1, 2, 3), keepdim=True) / seen.sum((1, 2, 3), keepdim=True)
    for name in s.names:
        settings = argparse.Namespace(**json.loads((s.out / f"{name}.json").read_text())["settings"])
        flow = build(settings)
        flow.load_state_dict(torch.load(s.weights / f"{name}.pt"))
        flow.eval()
        rows[name] = {}
        for n in (1,):  # more rounds did not pay here
            alpha, errors = choose_alpha(flow, x, seen_x, ALPHAS, n, level(1.0), torch.Generator().manual_seed(9), True)
            made = [complete(flow, truth, seen, a, n, level(1.0), True) for a in ALPHAS]
            rows[name][n] = {"alpha": alpha, "errors": errors, "inside": [rmse_at(m, truth, ~seen) for m in made]}
        print(name, rows[name], flush=True)
    both = {"mean": rmse_at(mean, truth, ~seen), "mean_matched": rmse_at(mean + gap, truth, ~seen)}
    write_facts(s.out / "matched.json", about(s) | both | {"alphas": ALPHAS, "flows": rows})


def detector(s: argparse.Namespace) -> None:
    """Precision and recall on test faces with 0 to 4 known squares, without and with noise."""
    test, rows = pictures("olivetti", 16)[2], []
    for size in (3, 5, 7):
        for noise in (0.0, 0.05, 0.1):
            for k in range(5):
                x, _, corners = add_squares(test, size, k, level(1.0), torch.Generator().manual_seed(k))
                x = (x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))).clamp(0, 1)
                found = find_squares(x, size, level(1.0))
                hits = detection_scores(found, corners, size)
                number = found.flatten(1).sum(1).double().mean().item()
                rows.append({"size": size, "noise": noise, "squares": k, "found": number,
                             "precision": None if math.isnan(hits[0]) else hits[0],
                             "recall": None if math.isnan(hits[1]) else hits[1]})
    write_facts(s.out / "detector.json", about(s) | {"pictures": len(test), "rows": rows})


def arguments() -> argparse.Namespace:
    """What is asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = parser.add_subparsers(dest="job", required=True)
    one, two, three, four = (jobs.add_parser(name) for name in ("train", "rivals", "detector", "matched"))
    four.add_argument("names", nargs="+")
    four.add_argument("--weights", type=Path, required=True, help="where `train --keep` put NAME.pt")
    one.add_argument("name")
    one.add_argument("--model", default="glow", choices=["glow", "realnvp"])
    one.add_argument("--coupling", default="affine", choices=["affine", "additive"])
    one.add_argument("--data", default="olivetti", choices=["olivetti", "mnist", "photo", "celeba"])
    one.add_argument("--grey", type=float, default=1.0)
    numbers = dict(side=16, size=5, epochs=16, warm=0, batch=100, seed=0, levels=3, steps=8, hidden=48, draws=2000)
    for name, value in numbers.items():
        one.add_argument(f"--{name}", type=int, default=value)
    one.add_argument("--rate", type=float, default=1e-3)
    one.add_argument("--tolerance", type=float, default=0.2, help="of the detector")
    one.add_argument("--device", default="cpu")
    one.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    one.add_argument("--pictures", action="store_true")
    one.add_argument("--keep", type=Path)
    two.add_argument("--method", default="mean", choices=["mean", "knn", *RIVALS])
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--size", type=int, default=5)
    for job in (one, two, three, four):
        job.add_argument("--out", type=Path, default=FOLDER)
    return parser.parse_args()


def main() -> None:
    """One job, one file."""
    asked = arguments()
    torch.set_num_threads(1)
    {"train": train, "rivals": rivals, "detector": detector, "matched": matched}[asked.job](asked)


if __name__ == "__main__":
    main()
