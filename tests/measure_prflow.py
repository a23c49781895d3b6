"""Measure MCFlow and PRFlow on images as PRFlow's paper does, and write results/prflow/NAME.json; run by hand, no test.

    MISSINGBOOK_DATA=… python tests/measure_prflow.py NAME --rate 0.8 --seed 0 --epochs 128 [--set hide=0.0 …]

Pixels of training and test images are dropped at random; nothing complete is ever seen. Scored are the hidden pixels
of the test images (RMSE) and the completed test images (FID, SCC), at some epochs on the way; training does not look.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from measure_simple_rivals import ROOT, commit, write_facts
from torch import Tensor

from missingbook.flows.mcflow import Completion, MCFlow, new_round, train_mcflow
from missingbook.flows.prflow import HyperLaplacianPrior
from missingbook.foundations.data import load
from missingbook.foundations.metrics import feature_network, fid, scc
from missingbook.foundations.training import Noise, TrainingRun, seeded

SETTINGS = dict(
    epochs=64, batch_size=64, learning_rate=1e-3, flow_learning_rate=3e-5, decay=1.0, hide=0.5, feed="first",
    fill="bilinear", restart=False, hidden=0, latent_hidden=0, n_couplings=6, validation_fraction=0.0,
    likelihood_weight=0.0, prior_weight=0.0, alpha=1 / 3, order=1, eps=1e-2)
LOOP = ("batch_size", "learning_rate", "flow_learning_rate", "decay", "hide", "feed", "restart", "validation_fraction")


def pictures(data: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Training and test images in [0, 1], and the test labels: a whole data set, or the sample split 4,000 to 1,000."""
    if data == "mnist-sample":
        sample = load(data)
        return sample.x[:4000].float() / 255, sample.x[4000:].float() / 255, sample.y[4000:]
    train, test = load(data, split="train"), load(data, split="test")
    return train.x.float() / 255, test.x.float() / 255, test.y


def holes(shape: torch.Size, rate: float, seed: int) -> Tensor:
    """observed: pixels dropped by a Bernoulli draw each, all channels of a pixel together."""
    keep = torch.rand(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(seed)) >= rate
    return keep.expand(shape).contiguous()


class Watched(TrainingRun):
    """A run that scores the test images at some epochs; they are completed anew when the training images are."""

    def __init__(self, *args, score, every, note, **kwargs):
        super().__init__(*args, **kwargs)
        self.score, self.every, self.note, self.curve, self.test, self.feed = score, every, note, [], None, "first"

    def epochs(self, n):
        for epoch in super().epochs(n):
            if new_round(epoch, n):
                self.test.x = self.test.again(self.feed)
            yield epoch
            if (epoch + 1) % self.every == 0 or epoch + 1 == n:
                seconds = round(time.perf_counter() - self._begun, 1)
                self.curve.append({"epoch": epoch + 1, **self.score(self.test.again(self.feed)), "seconds": seconds})
                self.note(self)


def scores(made: Tensor, x: Tensor, observed: Tensor, y: Tensor | None, lenet: torch.nn.Module | None) -> dict:
    """RMSE on hidden pixels, FID and SCC of the completed images; filled pixels are kept in [0, 1]."""
    made = made.clamp(0, 1).view(x.shape)
    result = {"rmse": (made - x)[~observed].square().mean().sqrt().item()}
    if lenet is not None:
        result |= {"fid": fid(made.cpu(), x.cpu(), lenet), "scc": scc(x.cpu(), made.cpu(), y, lenet)}
    return {name: round(value, 5) for name, value in result.items()}


def settings_from(pairs: list[str]) -> dict:
    """NAME=VALUE pairs as settings, the others at their defaults. Raises KeyError for a name that is none."""
    given = dict(pair.split("=", 1) for pair in pairs)
    return SETTINGS | {k: v if isinstance(SETTINGS[k], str) else json.loads(v) for k, v in given.items()}


def networks(s: dict, shape: tuple[int, ...], device: torch.device) -> tuple[MCFlow, dict]:
    """MCFlow for images of this shape, and the weights of its objective."""
    width = math.prod(shape)
    owner = torch.arange(math.prod(shape[1:])).repeat(shape[0])
    sizes = s["n_couplings"], s["hidden"] or width, s["latent_hidden"] or width
    network = MCFlow(shape, owner, *sizes, s["fill"]).to(device)
    weights = {"likelihood_weight": s["likelihood_weight"]}
    if s["prior_weight"]:
        prior = HyperLaplacianPrior(shape, s["alpha"], s["order"], s["eps"]).to(device)
        weights |= {"prior": prior, "prior_weight": s["prior_weight"]}
    return network, weights


def measure(data: str, rate: float, seed: int, every: int, device: str, s: dict, note: Callable[[dict], None]) -> dict:
    """Train; at every score hand what is known so far to `note`. Gives 20 test images: truth, seen, completed."""
    train, test, y = pictures(data)
    seen, seen_test = holes(train.shape, rate, 1000 + seed), holes(test.shape, rate, 2000 + seed)
    shape = tuple(train.shape[1:])
    about = {"data": data, "rate": rate, "seed": seed, "settings": s, "train": len(train), "test": len(test)}

    def noted(run: Watched) -> None:
        last = (run.history.tail(1).round(6).to_dict("records") or [{}])[0]
        cuda = run.device.type == "cuda"
        note(about | {"finished": run.curve[-1]["epoch"] == s["epochs"], "curve": run.curve, "losses": last,
                      "device": torch.cuda.get_device_name(run.device) if cuda else "cpu",
                      "matrix_products": f"float32, {torch.get_float32_matmul_precision()}",
                      "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
                      "threads": torch.get_num_threads(), "versions": {"torch": version("torch")}})

    run = Watched(seed, device, "float32", verbose=False, every=every, note=noted,
                  score=lambda made: scores(made, test, seen_test, y, lenet))
    lenet = feature_network(device=run.device) if shape == (1, 28, 28) else None
    test, seen_test = run.place(test), run.place(seen_test)
    with seeded(seed, run.device):
        network, weights = networks(s, shape, run.device)
        taught = run.place(train.flatten(1)), run.place(seen.flatten(1))
        network.learn_columns(*taught)
        run.test = Completion(network, test.flatten(1), seen_test.flatten(1), Noise(3000 + seed, run.device))
        run.feed = s["feed"]
        train_mcflow(network, *taught, run, s["epochs"], **{name: s[name] for name in LOOP}, **weights)
    made = run.test.again(run.feed).clamp(0, 1).view(test.shape)
    return {"seen": seen_test[:20].cpu().numpy()} | {
        name: (255 * t[:20]).round().byte().cpu().numpy() for name, t in (("truth", test), ("completed", made))}


def main() -> None:
    """One run, one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the file that is written")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--rate", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=16, help="epochs between two scores")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "prflow")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--pictures", action="store_true", help="write NAME.npz, too: twenty completed test images")
    parser.add_argument("--tf32", action="store_true", help="matrix products of a GPU in TF32")
    asked = parser.parse_args()
    torch.set_float32_matmul_precision("high" if asked.tf32 else "highest")
    asked.out.mkdir(parents=True, exist_ok=True)
    path, about = asked.out / f"{asked.name}.json", {"name": asked.name, "commit": commit()}

    def note(record: dict) -> None:
        write_facts(path, about | record)
        print(asked.name, record["curve"][-1], flush=True)

    made = measure(asked.data, asked.rate, asked.seed, asked.every, asked.device, settings_from(asked.set), note)
    if asked.pictures:
        np.savez_compressed(path.with_suffix(".npz"), **made)


if __name__ == "__main__":
    main()
