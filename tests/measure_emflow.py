"""Measure EMFlow beyond the bench and write results/emflow/NAME.json; run by hand, it is no test.

    MISSINGBOOK_DATA=… python tests/measure_emflow.py curves --data news_popularity_subset [--mechanism mar]
    … congeniality --folds 3 | scaling | air | shares | memory
    … images --data mnist --rate 0.5 --epochs 24 [--precision bf16]

curves: test RMSE by seconds and epochs of EMFlow and of MCFlow on one fold; the clock stands while a test is scored.
congeniality: the distance between two (logistic) regressions, of the complete and of the imputed test rows (table 5).
scaling: table 1's protocol with columns scaled over all of their cells, hidden ones and test rows included.
air: air_quality with its code for missing, −200, as a value, as the paper evidently took it, and as missing.
shares: what of a training step's time is spent in matrix products and factorizations.
memory: peak of a fit on colour images of 32 × 32 pixels, in a fresh process. images: test RMSE by epoch (table 2).
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure_prflow import holes as pixel_holes
from measure_prflow import pictures
from measure_simple_rivals import ROOT, commit, write_facts
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch.profiler import ProfilerActivity, profile

from missingbook.flows.emflow import EMFlow, EMFlowImputer, OnlineBase, fit_start, train_batch
from missingbook.flows.mcflow import MCFlowImputer
from missingbook.foundations.classics import NeighboursImputer
from missingbook.foundations.data import photo_patches
from missingbook.foundations.metrics import rmse
from missingbook.foundations.training import TrainingRun
from missingbook.gaussian.em import GaussianImputer
from missingbook.practice.bench import Split, emflow_split, memory_mb, numbers_of, plan, read_data

OUT = ROOT / "results" / "emflow"
QUIET = dict(random_state=0, verbose=False, device="cpu")
METHODS = {"gaussian": partial(GaussianImputer, **QUIET), "emflow": partial(EMFlowImputer, **QUIET),
           "mcflow": partial(MCFlowImputer, **QUIET), "knn": partial(NeighboursImputer, scale="minmax")}
PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::linalg_", "aten::cholesky", "aten::_linalg",
            "aten::triangular", "aten::mkldnn", "aten::convolution")


def watched(imputer: Any, score: Callable[[Any], float], every: int, note: Callable[[list], None]) -> list[dict]:
    """Have `fit` score the imputer every so many epochs, its clock stopped: epoch, seconds, rmse."""
    curve, train, paused = [], imputer._train, 0.0

    def counted(epochs: Callable, n: int, network: torch.nn.Module, began: float):
        nonlocal paused
        for epoch in epochs(n):
            yield epoch
            now = time.perf_counter()
            if epoch % every == 0 or epoch + 1 == n:
                imputer.network_ = network
                seconds = round(now - began - paused, 2)
                curve.append({"epoch": epoch, "seconds": seconds, "rmse": round(score(imputer), 5)})
                note(curve)
            paused += time.perf_counter() - now

    def trained(network: torch.nn.Module, x: torch.Tensor, observed: torch.Tensor, run: TrainingRun) -> None:
        imputer.seed_, began, epochs = run.seed, time.perf_counter(), run.epochs
        run.epochs = lambda n: counted(epochs, n, network, began)
        train(network, x, observed, run)

    imputer._train = trained
    return curve


def fold(name: str, mechanism: str, seed: int) -> tuple[Split, float]:
    """A fold of EMFlow's protocol at table 4's rate, and the rate."""
    rate = plan("emflow", [name], ["mean"], mechanism)[0].rate
    return emflow_split(read_data(name), mechanism, rate, seed), rate


def error(split: Split, imputer: Any) -> float:
    """RMSE over the hidden cells of the test rows."""
    made = imputer.transform(split.holes_test)
    return float(rmse(split.test.to_numpy(), made.to_numpy(), split.heldout.to_numpy()))


def curves(asked: argparse.Namespace) -> dict:
    """Both methods on one fold, in turn; and when EMFlow is first as good as MCFlow is at its end."""
    split, rate = fold(asked.data, asked.mechanism, 0)
    found = {}
    for name in ("emflow", "mcflow"):
        imputer = METHODS[name](kinds=split.kinds)
        every = 1 if name == "emflow" else 4
        curve = watched(imputer, partial(error, split), every, lambda c: print(c[-1], flush=True))
        imputer.fit(split.holes_train)
        found[name] = {"curve": curve, "final": round(error(split, imputer), 5), "seconds": curve[-1]["seconds"]}
    first = next((p for p in found["emflow"]["curve"] if p["rmse"] <= found["mcflow"]["final"]), None)
    return {"data": asked.data, "mechanism": asked.mechanism, "rate": rate, "rows": len(split.train),
            "columns": split.train.shape[1], "methods": found, "emflow_as_good": first}


def coefficients(x: np.ndarray, y: np.ndarray, discrete: bool) -> np.ndarray:
    """Of a linear regression, or of a logistic one, which converges."""
    if not discrete:
        return LinearRegression().fit(x, y).coef_.ravel()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return LogisticRegression(max_iter=5000).fit(x, y).coef_.ravel()


def congeniality(asked: argparse.Namespace) -> dict:
    """Euclidean distance of coefficients, mean and standard deviation over folds, by data and method."""
    found = {}
    for name in ("letter", "credit_default"):
        table = read_data(name)
        (target,) = table.target
        distance, off = {m: [] for m in METHODS}, {m: [] for m in METHODS}
        for seed in range(asked.folds):
            split, _ = fold(name, "mcar", seed)
            y = table.frame[target].reset_index(drop=True).loc[split.test.index].astype(str)
            columns = [c for c in split.test if c != target]
            whole = coefficients(split.test[columns].to_numpy(), y, True)
            for method, make in METHODS.items():
                imputer = make(kinds=split.kinds).fit(split.holes_train)
                made = imputer.transform(split.holes_test)
                distance[method].append(float(np.linalg.norm(coefficients(made[columns].to_numpy(), y, True) - whole)))
                off[method].append(float(rmse(split.test.to_numpy(), made.to_numpy(), split.heldout.to_numpy())))
                print(name, seed, method, round(distance[method][-1], 4), round(off[method][-1], 4), flush=True)
        found[name] = {m: {"distance": np.mean(d).round(4), "sd": np.std(d).round(4), "rmse": np.mean(off[m]).round(5)}
                       for m, d in distance.items()}
    return {"folds": asked.folds, "mechanism": "mcar", "rate": 0.2, "tables": found}


def scaled_over_all(name: str, mechanism: str, rate: float, seed: int) -> Split:
    """`emflow_split`, but for the scale: every column's minimum and maximum over all of its cells."""
    table = read_data(name)
    split, frame = emflow_split(table, mechanism, rate, seed), numbers_of(table).reset_index(drop=True)
    parts = []
    for part in (split.train, split.test, split.holes_train, split.holes_test):
        there = frame.loc[part.index]
        scaled = (there - frame.min()) / (frame.max() - frame.min()).replace(0, 1)
        parts.append(scaled.where(part.notna()))
    return Split(*parts, split.kinds)


def scaling(asked: argparse.Namespace) -> dict:
    """RMSE of the Gaussian and of EMFlow, by data, mechanism and method; means over folds."""
    found = []
    for name in ("wine_quality", "credit_default"):
        for mechanism in ("mcar", "mar"):
            rate = plan("emflow", [name], ["mean"], mechanism)[0].rate
            for method in ("gaussian", "emflow"):
                splits = [scaled_over_all(name, mechanism, rate, seed) for seed in range(asked.folds)]
                errors = [error(s, METHODS[method](kinds=s.kinds).fit(s.holes_train)) for s in splits]
                found.append({"data": name, "mechanism": mechanism, "rate": rate, "method": method,
                              "folds": asked.folds, "rmse": round(float(np.mean(errors)), 5)})
                print(found[-1], flush=True)
    return {"scale": "minimum and maximum over all cells of a column", "runs": found}


def air(asked: argparse.Namespace) -> dict:
    """RMSE with −200 as a value; the same with it as missing is in the bench's records."""
    table, found = read_data("air_quality"), []
    table = replace(table, frame=table.frame.fillna(-200.0))
    for mechanism in ("mcar", "mar"):
        rate = plan("emflow", ["air_quality"], ["mean"], mechanism)[0].rate
        splits = [emflow_split(table, mechanism, rate, seed) for seed in range(asked.folds)]
        for method in ("gaussian", "emflow", "knn"):
            errors = [error(s, METHODS[method](kinds=s.kinds).fit(s.holes_train)) for s in splits]
            found.append({"mechanism": mechanism, "rate": rate, "method": method, "folds": asked.folds,
                          "rmse": round(float(np.mean(errors)), 5)})
            print(found[-1], flush=True)
    return {"data": "air_quality", "missing": "-200, a value", "runs": found}


def share_of(rows: int, width: int, hidden: int, batch: int) -> dict:
    """Seconds of a training step, and the part of it inside matrix products and factorizations; one thread."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator) / width**0.5
    observed = torch.rand(rows, width, generator=generator) > 0.2
    run, network = TrainingRun(0, "cpu", verbose=False), EMFlow((width,), 6, hidden)
    online = OnlineBase(network, rows, batch, fit_start(network, x, observed, run), run)
    adam = run.adam(network.flow, 1e-3)
    online.begin_epoch(0, 1)

    def step(k: int) -> None:
        train_batch(network, x[k * batch : (k + 1) * batch], observed[k * batch : (k + 1) * batch], run, adam, online)

    for k in range(3):
        step(k)
    began = time.perf_counter()
    for k in range(3, 13):
        step(k)
    seconds = (time.perf_counter() - began) / 10
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for k in range(3, 13):
            step(k)
    times = [(e.key, e.self_cpu_time_total) for e in found.key_averages()]
    inside = sum(t for key, t in times if key.startswith(PRODUCTS)) / sum(t for _, t in times)
    return {"columns": width, "hidden": hidden, "batch": batch, "seconds": round(seconds, 5),
            "inside_products": round(inside, 3), "outside": round(1 - inside, 3)}


def shares(asked: argparse.Namespace) -> dict:
    """A step on tables like letter and news, and on 28 × 28 pixels."""
    steps = [share_of(256 * 14, 17, 64, 256), share_of(256 * 14, 60, 64, 256), share_of(512 * 14, 784, 784, 512)]
    return {"threads": 1, "steps": steps}


def fit_colour() -> dict:
    """A short fit on 32 × 32 colour patches, half of the pixels missing."""
    x = photo_patches(32, 8, "train").x.float() / 255
    observed = pixel_holes(x.shape, 0.5, 0)
    before = memory_mb("VmRSS")
    began = time.perf_counter()
    imputer = EMFlowImputer(**QUIET, max_epochs=3).fit(torch.where(observed, x, torch.nan))
    seconds = time.perf_counter() - began
    made = imputer.transform(torch.where(observed, x, torch.nan)[:64])
    return {"images": len(x), "shape": list(x.shape[1:]), "epochs": 3, "seconds": round(seconds, 1),
            "before_mb": before, "peak_mb": memory_mb("VmHWM"), "finite": bool(torch.isfinite(made).all())}


def memory(asked: argparse.Namespace) -> dict:
    """`fit_colour` in a process of its own."""
    code = "import json, measure_emflow as m; print(json.dumps(m.fit_colour()))"
    here = Path(__file__).parent
    out = subprocess.run([sys.executable, "-c", code], cwd=here, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def images(asked: argparse.Namespace, note: Callable[[dict], None]) -> dict:
    """Test RMSE by epoch; epoch 0 is the Gaussian's. What is known is written after each."""
    train, test, _ = pictures(asked.data)
    seen, seen_test = pixel_holes(train.shape, asked.rate, 1000), pixel_holes(test.shape, asked.rate, 2000)
    imputer = EMFlowImputer(**QUIET | {"device": asked.device}, max_epochs=asked.epochs, precision=asked.precision,
                            **json.loads(asked.options))
    given = torch.where(seen_test, test, torch.nan)
    about = {"data": asked.data, "rate": asked.rate, "train": len(train), "test": len(test), "max_epochs": asked.epochs,
             "precision": asked.precision, "options": json.loads(asked.options), "threads": torch.get_num_threads()}

    def score(imputer: EMFlowImputer) -> float:
        return ((imputer.transform(given) - test)[~seen_test]).square().mean().sqrt().item()

    curve = watched(imputer, score, asked.every, lambda c: note(about | {"curve": c, "finished": False}))
    imputer.fit(torch.where(seen, train, torch.nan))
    return about | {"curve": curve, "final": round(score(imputer), 5), "finished": True,
                    "history": json.loads(imputer.history_.round(5).to_json(orient="records"))}


def main() -> None:
    """One part, one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("curves", "congeniality", "scaling", "air", "shares", "memory", "images"))
    parser.add_argument("--data", default="news_popularity_subset")
    parser.add_argument("--mechanism", default="mcar")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--every", type=int, default=1, help="epochs between two scores (images)")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--options", default="{}", help="of EMFlowImputer, as JSON (images)")
    asked = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    name = {"curves": f"curves-{asked.data}-{asked.mechanism}", "images": f"images-{asked.data}-{asked.rate:g}"}
    path = OUT / f"{name.get(asked.part, asked.part)}.json"
    about = {"commit": commit(), "versions": {"torch": version("torch")}}

    def note(record: dict) -> None:
        write_facts(path, about | record)
        print(record.get("curve", [""])[-1], flush=True)

    note(images(asked, note) if asked.part == "images" else globals()[asked.part](asked))
    print("written:", path.name)


if __name__ == "__main__":
    main()
