"""Measure the Universal Marginalizer on binarized MNIST, three rows observed, and write results/marginalizer/; no test.

    MISSINGBOOK_DATA=… python tests/measure_marginalizer.py [--epochs 15] [--hidden 512] [--rows 1000] [--times-only]
    … --device cuda --name mnist-gpu --epochs 100       no times of draws, which are CPU seconds

Trained on 60,000 pictures (VAEAC, table 5). log p of the hidden pixels of test pictures given the line by the chain
rule, in random orders. Seconds are CPU seconds on one thread: a VAEAC's time for draws does not depend on its weights,
so that one with the same hidden layers, trained for one epoch on a few pictures, stands for it. --times-only measures
the times anew, with a marginalizer trained as briefly, and leaves the rest of the record as it is.
"""

import argparse
import json
import os
import time
from importlib.metadata import version

import numpy as np
import torch
from measure_simple_rivals import ROOT, commit, device_name, write_facts

from missingbook.foundations.data import load
from missingbook.foundations.masks import line_observed
from missingbook.vaes.marginalizer import MarginalizerImputer
from missingbook.vaes.vaeac import VAEACImputer

BEGUN_AT = commit()  # of the code that is loaded; the checkout may move on meanwhile
FOLDER = ROOT / "results" / "marginalizer"
SMALL = dict(verbose=False, device="cpu", random_state=0, pixels="bernoulli", pattern="line")


def pictures(split: str, n: int | None = None) -> np.ndarray:
    """Black and white, (n, 1, 28, 28): a pixel is white above one half."""
    x = load("mnist", split=split).x[:n].float() / 255
    return (x > 0.5).float().view(-1, 1, 28, 28).numpy()


def seconds(call, repeats: int) -> tuple[float, list[float]]:
    """(the least, all) CPU seconds of several calls."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        call()
        times.append(round(time.process_time() - begun, 5))
    return min(times), times


def draw_times(imputer: MarginalizerImputer, holes: np.ndarray, few: np.ndarray, args: argparse.Namespace) -> list:
    """CPU seconds for one draw of each of 100 pictures."""
    rivals = {"marginalizer": imputer}
    dense = dict(channels=(), hidden=args.hidden, depth=args.depth)
    for name, own in (("vaeac, dense", dense), ("vaeac, convolutions", {})):
        rivals[name] = VAEACImputer(max_epochs=1, validation_fraction=0.0, **SMALL, **own).fit(few)
    found = []
    for name, rival in rivals.items():
        rival.sample(holes, 1)  # what is set up once does not count
        least, every = seconds(lambda rival=rival: rival.sample(holes, 1), 2 if rival is imputer else 20)
        found.append({"method": name, "rows": len(holes), "seconds": least, "all": every,
                      "parameters": sum(p.numel() for p in rival.network_.parameters())})
        print(found[-1], flush=True)
    for row in found:
        row["times_slower_than_this"] = round(found[0]["seconds"] / row["seconds"], 1)
    return found


def save_draws(imputer: MarginalizerImputer, test: np.ndarray, holes: np.ndarray) -> None:
    """Eight pictures and three draws of each, whole or not at all."""
    path = FOLDER / "mnist.npz"
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    kept = {"truth": test[:8], "draws": imputer.sample(holes[:8], 3), "observed": ~np.isnan(holes[:8])}
    with draft.open("wb") as file:
        np.savez_compressed(file, **{name: value.astype("uint8") for name, value in kept.items()})
    os.replace(draft, path)


def times_only(args: argparse.Namespace) -> None:
    """The times of the record, measured anew; its `times_commit` says with which code."""
    few, test = pictures("train", 256), pictures("test", 100)
    given = line_observed((len(test), 28, 28), 3, torch.Generator().manual_seed(0))[:, None].numpy()
    settings = dict(hidden=args.hidden, depth=args.depth, max_epochs=1, validation_fraction=0.0)
    imputer = MarginalizerImputer(**settings, **SMALL).fit(few)
    facts = json.loads((FOLDER / "mnist.json").read_text())
    facts |= {"draw_times": draw_times(imputer, np.where(given, test, np.nan), few, args), "times_commit": BEGUN_AT}
    write_facts(FOLDER / "mnist.json", facts)


def main() -> None:
    """Train, score, time, write."""
    args = arguments()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    times_only(args) if args.times_only else measure(args)


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"epochs": 15, "hidden": 512, "depth": 2, "rows": 1000, "orders": 1, "train": 60_000}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--times-only", action="store_true")
    parser.add_argument("--weighting", default="sum")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="mnist")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> None:
    """Train, score, time, write the whole record."""
    train, test = pictures("train", args.train), pictures("test", args.rows)
    given = line_observed((len(test), 28, 28), 3, torch.Generator().manual_seed(0))[:, None].numpy()
    settings = dict(hidden=args.hidden, depth=args.depth, weighting=args.weighting, max_epochs=args.epochs)
    settings |= dict(learning_rate=args.learning_rate, batch_size=256, validation_fraction=1 / 30)  # 2,000 pictures
    begun = time.process_time(), time.perf_counter()
    imputer = MarginalizerImputer(**settings, **SMALL | {"device": args.device}).fit(train)
    trained, wall = round(time.process_time() - begun[0], 1), round(time.perf_counter() - begun[1], 1)
    print(imputer.history_.tail(3), trained, flush=True)
    begun = time.process_time()
    each, mixed = imputer.log_prob_by_order(test, given, args.orders)
    spent = round(time.process_time() - begun, 1)
    error = lambda v: round(float(v.std(ddof=1) / len(v) ** 0.5), 3)  # noqa: E731
    holes = np.where(given, test, np.nan)
    facts = {"what": "Universal Marginalizer on binarized MNIST: three rows observed", "settings": settings,
             "train": len(train), "rows": len(test), "training_cpu_seconds": trained, "training_seconds": wall,
             "log_prob_cpu_seconds": spent,
             "nll_by_order": [round(-float(v.mean()), 3) for v in each], "standard_errors": [error(v) for v in each],
             "nll_mixture": round(-float(mixed.mean()), 3), "standard_error_mixture": error(mixed),
             "spread_between_orders": round(float(each.std(0, ddof=1).mean()), 3) if args.orders > 1 else None,
             "validation": [round(float(v), 3) for v in imputer.history_["validation"]],
             "draw_times": draw_times(imputer, holes[:100], train[:256], args) if args.device == "cpu" else [],
             "seed": 0,
             "device": device_name(args.device), "threads": 1, "commit": BEGUN_AT,
             "versions": {p: version(p) for p in ("torch", "numpy")}}
    print({k: v for k, v in facts.items() if k.startswith(("nll", "stand", "spread"))}, flush=True)
    write_facts(FOLDER / f"{args.name}.json", facts)
    if args.name == "mnist":
        save_draws(imputer, test, holes)


if __name__ == "__main__":
    main()
