"""Measure MisGAN and write results/misgan/NAME.json (and pictures, NAME.npz); run by hand, no test.

    python tests/measure_misgan.py images --kind square --rate 0.8 --epochs 400  the MNIST sample, 4,000 digits
    … images --data mnist --device cuda                                          all 60,000, on a GPU
    python tests/measure_misgan.py rivals               mean, neighbours and SVD on the same holes
    python tests/measure_misgan.py speed --public PATH  beside the authors' code, its folder src-torch1.6

A square of 9 or 13 pixels a side is observed of 28 × 28 (MisGAN section 5), or each pixel is dropped with probability
rate. Networks are fully connected, as FC-MisGAN's. FIDs use the shipped LeNet; training never looks at them.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from measure_simple_rivals import ROOT, commit, device_name, write_facts
from torch import Tensor
from torch.utils.data import Dataset

from missingbook.foundations.classics import MeanImputer, NeighboursImputer, SoftSVDImputer
from missingbook.foundations.data import load
from missingbook.foundations.masks import independent_dropout, square_observed
from missingbook.foundations.metrics import feature_network, fid, rmse
from missingbook.foundations.training import TrainingRun, seeded
from missingbook.gans.misgan import (
    ConvCritic,
    ConvGenerator,
    MisGAN,
    UNet,
    dense_misgan,
    imputed,
    square_overlap,
    train_misgan,
)
from missingbook.gans.wgan import Critic, draw

BEGUN_AT = commit()  # of the code that is loaded; the checkout may move on meanwhile
FOLDER = ROOT / "results" / "misgan"
SIDES = {0.8: 13, 0.9: 9}
RIVALS = {
    "mean": MeanImputer,
    "knn": NeighboursImputer,
    "softsvd": partial(SoftSVDImputer, n_strengths=6, smallest=0.03, max_steps=40, tol=1e-3, random_state=0),
}
FIT_ROWS = {"softsvd": 1000}  # its singular value decompositions grow with the rows; all are filled


def data(kind: str, rate: float, seed: int = 0, name: str = "mnist-sample") -> tuple[Tensor, Tensor]:
    """(x, observed): the 4,000 digits of the sample's training part, or MNIST's 60,000, and their holes."""
    digits = load(name).x[:4000] if name == "mnist-sample" else load(name, split="train").x
    x = digits.view(-1, 1, 28, 28).float() / 255
    source, shape = torch.Generator().manual_seed(seed), (len(x), 28, 28)
    observed = (
        square_observed(shape, SIDES[rate], source) if kind == "square" else independent_dropout(shape, rate, source)
    )
    return x, observed[:, None]


def about(**facts) -> dict:
    """What every file says of its run."""
    return {"device": "cpu"} | facts | {
        "threads": torch.get_num_threads(),
        "commit": BEGUN_AT,
        "versions": {p: version(p) for p in ("torch", "numpy", "scikit-learn")},
    }


@torch.no_grad()
def scores(model: MisGAN, x: Tensor, observed: Tensor, kind: str, rate: float) -> tuple[dict, dict]:
    """FIDs of as many draws as rows and of one completion a row, RMSE, what 1,000 masks look like; and pictures."""
    source, lenet = torch.Generator().manual_seed(1), feature_network(device=x.device)
    made, masks = draw(model.data_generator, len(x), source), draw(model.mask_generator, 1000, source)
    filled = [imputed(model.imputer, x, observed, torch.rand(x.shape, generator=source).to(x.device)) for _ in range(3)]
    cut = masks > 0.5
    found = {
        "fid_generated": fid(x, made, lenet),
        "fid_imputed": fid(x, filled[0], lenet),
        "rmse": rmse(x, filled[0], ~observed),
        "mask_rate": 1 - cut.float().mean().item(),
        "mask_undecided": ((masks > 0.1) & (masks < 0.9)).float().mean().item(),
        "marginal_error": (cut.float().mean(0) - observed.float().mean(0)).abs().mean().item(),
    }
    if kind == "square":
        found["squares"] = float((square_overlap(cut[:, 0].cpu(), SIDES[rate]) >= 0.8).mean())
    kept = {"generated": made[:24], "masks": masks[:24], "truth": x[:8], "draws": torch.stack(filled)[:, :8]}
    pictures = {name: (t * 255).round().byte().cpu().numpy() for name, t in kept.items()}
    pictures |= {"observed": observed[:8].cpu().numpy()}
    return {name: round(value, 5) for name, value in found.items()}, pictures


def measure_images(args: argparse.Namespace) -> None:
    """Train, score on the way, write after each score: a run that is cut off leaves what it had."""
    x, observed = data(args.kind, args.rate, args.seed, args.data)
    name = f"{args.data}-{args.kind}-{args.rate}-{args.seed}" + (f"-{args.tag}" if args.tag else "")
    run, begun, curve = TrainingRun(args.seed, args.device, args.precision, verbose=False), time.perf_counter(), []
    with seeded(args.seed, run.device):
        model = dense_misgan((1, 28, 28), stretch=args.stretch)
        if args.channels:
            model.data_generator = ConvGenerator((1, 28, 28), 128, args.channels)
            model.data_critic = ConvCritic((1, 28, 28), args.channels)
            if args.unet:
                model.imputer = UNet((1, 28, 28), args.channels, 2)
                model.imputer_critic = ConvCritic((1, 28, 28), args.channels)
    x, observed = run.place(x), run.place(observed)
    settings = {n: getattr(args, n) for n in ("batch_size", "learning_rate", "n_critic", "alpha")} | {"beta": 0.1}

    def look(epoch: int, shown: MisGAN) -> None:
        if (epoch + 1) % args.every and epoch + 1 < args.epochs:
            return
        found, pictures = scores(shown, x, observed, args.kind, args.rate)
        curve.append(
            {
                "epoch": epoch + 1,
                **found,
                "seconds": round(time.perf_counter() - begun, 1),
                "cpu_seconds": round(time.process_time(), 1),
            }
        )
        print(curve[-1], flush=True)
        write_facts(
            FOLDER / f"{name}.json",
            about(
                what=f"MisGAN on {len(x):,} digits of MNIST with holes",
                device=device_name(args.device),
                kind=args.kind,
                rate=args.rate,
                seed=args.seed,
                settings=settings
                | {"average": 0.999}
                | {n: getattr(args, n) for n in ("stretch", "channels", "unet", "precision")},
                epochs=args.epochs,
                last=curve[-1],
                curve=curve,
            ),
        )
        save_pictures(FOLDER / f"{name}.npz", pictures)

    train_misgan(model, x, observed, run, args.epochs, on_epoch=look, **settings)


def save_pictures(path: Path, pictures: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    with draft.open("wb") as file:
        np.savez_compressed(file, **pictures)
    os.replace(draft, path)


def measure_rivals(args: argparse.Namespace) -> None:
    """FID and RMSE of simple fills of the same holes."""
    found = []
    for kind in ("square", "dropout"):
        for rate in (0.8, 0.9):
            x, observed = data(kind, rate, args.seed)
            holed = torch.where(observed, x, torch.nan).flatten(1).numpy()
            for name, rival in RIVALS.items():
                begun = time.perf_counter()
                filled = rival().fit(holed[: FIT_ROWS.get(name)]).transform(holed)
                filled = torch.from_numpy(filled).float().view(x.shape)
                filled = filled.nan_to_num(0).clamp(0, 1)  # a pixel that no row shows is black
                found.append(
                    {
                        "kind": kind,
                        "rate": rate,
                        "method": name,
                        "fid": round(fid(x, filled), 4),
                        "rmse": round(rmse(x, filled, ~observed), 5),
                        "seconds": round(time.perf_counter() - begun, 1),
                    }
                )
                print(found[-1], flush=True)
                write_facts(
                    FOLDER / "rivals.json", about(what="simple fills of 4,000 digits", seed=args.seed, runs=found)
                )


class Holed(Dataset):
    """Pictures with masks, as the authors' loader wants them."""

    def __init__(self, n: int):
        source = torch.Generator().manual_seed(0)
        self.x, self.observed = torch.rand(n, 1, 28, 28, generator=source), square_observed((n, 28, 28), 13, source)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return self.x[k], self.observed[k].byte(), 0, k


def public_modules(folder: str) -> types.SimpleNamespace:
    """The authors' modules; plots are left out, for they would count as time."""
    for name in ("seaborn",):
        sys.modules.setdefault(name, types.SimpleNamespace(set=lambda: None))
    sys.path.insert(0, folder)
    return types.SimpleNamespace(
        **{
            name: importlib.import_module(name)
            for name in ("misgan", "misgan_impute", "mnist_generator", "mnist_critic", "mnist_imputer")
        }
    )


def networks(public: types.SimpleNamespace, kind: str, imputer: bool, gated: bool) -> MisGAN:
    """The authors' networks in our container; gated: critics of the same layers with our ReLU."""
    made, judges = public.mnist_generator, public.mnist_critic
    prefix = "Conv" if kind == "conv" else "FC"
    critic = getattr(judges, f"{prefix}Critic")
    if gated:
        critic = partial(ConvCritic, (1, 28, 28)) if kind == "conv" else partial(Critic, 784)
    g, m = getattr(made, f"{prefix}DataGenerator")(), getattr(made, f"{prefix}MaskGenerator")(hard_sigmoid=False)
    for network in (g, m):
        network.latent, network.shape = 128, (1, 28, 28)
    extra = (public.mnist_imputer.ComplementImputer((500, 500)), critic()) if imputer else (None, None)
    return MisGAN(g, m, critic(), critic(), *extra)


class Alone(torch.nn.Module):
    """The authors' imputer takes (x, mask, noise) and mixes them itself; ours gets the mixture."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x, 1.0, 0.0)


def public_seconds(public: types.SimpleNamespace, made: Callable[[], MisGAN], imputer: bool, n: int) -> float:
    """The authors' loop over n rows, batch 64, plots and files left out where the code lets us."""
    model = made()
    args = types.SimpleNamespace(
        n_critic=5,
        gp_lambda=10,
        batch_size=64,
        n_latent=128,
        epoch=1,
        plot_interval=0,
        save_interval=0,
        alpha=0.2,
        beta=0.1,
        gamma=0,
        tau=0,
        imputeronly=False,
        resume=None,
        pretrain=None,
        workers=0,
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        begun = time.process_time()
        if imputer:
            public.misgan_impute.misgan_impute(
                args,
                model.data_generator,
                model.mask_generator,
                model.imputer,
                model.data_critic,
                model.mask_critic,
                model.imputer_critic,
                Holed(n),
                Path(folder),
            )
        else:
            public.misgan.misgan(
                args,
                model.data_generator,
                model.mask_generator,
                model.data_critic,
                model.mask_critic,
                Holed(n),
                Path(folder),
            )
        return time.process_time() - begun


def our_seconds(made: Callable[[], MisGAN], precision: str, n: int) -> float:
    """Our loop over as many rows."""
    model = made()
    if model.imputer is not None:
        model.imputer = Alone(model.imputer)
    rows = Holed(n)
    run, begun = TrainingRun(0, "cpu", precision, verbose=False), time.process_time()
    train_misgan(model, rows.x, rows.observed[:, None], run, 1, 64)
    return time.process_time() - begun


def measure_speed(args: argparse.Namespace) -> None:
    """CPU seconds an iteration, five steps of the critics and one of the generators: the slope between two lengths."""
    public, found = public_modules(args.public), []
    for kind in ("dense", "conv"):
        iterations = args.iterations if kind == "conv" else 8 * args.iterations
        few, many = 5 * 64, (1 + iterations) * 5 * 64
        for imputer in (False, True):
            made = partial(networks, public, kind, imputer)
            ways = {
                "public": partial(public_seconds, public, partial(made, False), imputer),
                "our loop": partial(our_seconds, partial(made, False), "float32"),
                "ours": partial(our_seconds, partial(made, True), "float32"),
                "ours, bf16": partial(our_seconds, partial(made, True), "bf16"),
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(args.repeats):
                for name, seconds in ways.items():
                    times[name].append((seconds(many) - seconds(few)) / iterations)
            best = {name: round(min(values), 4) for name, values in times.items()}
            found.append(
                {
                    "networks": kind,
                    "imputer": imputer,
                    "seconds": best,
                    "all": times,
                    "ratio": {name: round(best["public"] / best[name], 3) for name in ways if name != "public"},
                }
            )
            print(found[-1], flush=True)
            write_facts(
                FOLDER / "speed.json",
                about(what="CPU seconds an iteration, batch 64, 28 × 28", repeats=args.repeats, runs=found),
            )


def main() -> None:
    """One of the three measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["images", "rivals", "speed"])
    parser.add_argument("--kind", choices=["square", "dropout"], default="square")
    parser.add_argument("--rate", type=float, choices=list(SIDES), default=0.8)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", choices=["mnist-sample", "mnist"], default="mnist-sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--n-critic", type=int, default=2)
    parser.add_argument("--stretch", type=float, default=0.0)
    parser.add_argument("--alpha", type=float, default=0.2)
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--channels", type=int, default=0, help="convolutions for pictures, with so many channels")
    parser.add_argument("--unet", action="store_true", help="with channels: a U-Net imputes, convolutions judge it")
    parser.add_argument("--tag", default="")
    parser.add_argument("--public", help="folder of the authors' code")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    FOLDER.mkdir(parents=True, exist_ok=True)
    {"images": measure_images, "rivals": measure_rivals, "speed": measure_speed}[args.what](args)


if __name__ == "__main__":
    main()
