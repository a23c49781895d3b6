"""Measure Gaussian conditionals and write results/conditional_speed.json; run by hand, it is no test.

    OMP_NUM_THREADS=2 python tests/measure_conditional.py [--device cuda] [--turns 5] [--part rivals …]

rivals: MNIST's covariance with a ridge, half of 784 pixels missing, 512 rows: conjugate gradients beside a solve a row,
a Cholesky factor a row, batched and padded Cholesky factors, and our packed blocks; seconds and errors of all.
memory: 3,072 features in a fresh process. scaling: seconds by features and by rows beside the bare matrix products of
the same call, replayed in the same shapes and precisions into memory that is there already. crossover: direct against
conjugate gradients by features, rate and precision. Contestants take turns; a figure is the median over the turns of
wall-clock seconds, on two threads. A turn during which other processes used more than a tenth of a processor is
repeated, up to a limit; what they used is in the file. The file holds an entry for the CPU and one for the GPU; a run
replaces its own parts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import torch
from measure_simple_rivals import ROOT, commit, write_facts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from missingbook.foundations.data import load, photo_patches
from missingbook.gaussian.conditional import Conditional, conditional_moments
from missingbook.practice.bench import forget_peak, memory_mb

RESULT = ROOT / "results" / "conditional_speed.json"
RIDGE, RATE, ROWS = 1e-2, 0.5, 512
ASKED = 9e-4  # tolerance of the rivals' part: the error of the filled cells then stays below 1e-4
PARTS = ("rivals", "memory", "scaling", "crossover")


# --- data ---------------------------------------------------------------------------------------------------


@cache
def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Mean and covariance (float64, ridge on the diagonal) of the MNIST sample, and 512 of its test pictures."""
    train = load("mnist-sample", split="train").x.flatten(1).double() / 255
    test = load("mnist-sample", split="test").x.flatten(1).double() / 255
    return train.mean(0), torch.cov(train.T) + RIDGE * torch.eye(784, dtype=torch.float64), test[:ROWS]


def patches(size: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of colour patches of two photographs, in float32; rows from the parts of them that nobody else saw."""
    train = photo_patches(size, 8, "train").x.flatten(1).float().div_(255)
    mean = train.mean(0)
    covariance = (train - mean).T @ (train - mean) / (len(train) - 1)
    covariance.diagonal().add_(RIDGE)
    test = photo_patches(size, 8, "test").x.flatten(1).float() / 255
    return mean, covariance, test.repeat(-(-rows // len(test)), 1)[:rows]


def holes(rows: int, width: int, rate: float, seed: int = 0) -> Tensor:
    """`observed`, completely at random."""
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) >= rate


# --- the clock ----------------------------------------------------------------------------------------------


def machine_seconds() -> float:
    """Seconds that all processes together have computed, of one processor. 0 where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq = (int(n) for n in stat.read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / 100


def timed(function: Callable, device: torch.device, calls: int = 1) -> float:
    """Wall-clock seconds a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / calls


def take_turns(contestants: dict[str, Callable], turns: int, device: torch.device, tries: int = 100) -> dict:
    """Median seconds a call of each over quiet turns, and the share of a processor that others used meanwhile."""
    calls = {name: max(1, round(0.2 / timed(f, device))) for name, f in contestants.items()}
    kept: list[tuple[float, dict]] = []
    for _ in range(tries):
        others, own, began = machine_seconds(), time.process_time(), time.perf_counter()
        seconds = {name: timed(f, device, calls[name]) for name, f in contestants.items()}
        used = machine_seconds() - others - (time.process_time() - own)
        kept.append((max(0.0, used / (time.perf_counter() - began)), seconds))
        if sum(share <= 0.1 for share, _ in kept) >= turns:
            break
        if kept[-1][0] > 0.1:
            time.sleep(4)
    quiet = sorted(kept, key=lambda turn: turn[0])[:turns]
    return {"seconds": {n: round(statistics.median(s[n] for _, s in quiet), 6) for n in contestants},
            "others": round(max(share for share, _ in quiet), 2)}


# --- rivals -------------------------------------------------------------------------------------------------


def by_solve(z: Tensor, observed: Tensor, mean: Tensor, covariance: Tensor, cholesky: bool) -> Tensor:
    """The textbook: a solve, or a Cholesky factor, with Σ_oo for every row."""
    filled = z.clone()
    for i, seen in enumerate(observed):
        o, m = seen.nonzero()[:, 0], (~seen).nonzero()[:, 0]
        block, side = covariance[o][:, o], (z[i, o] - mean[o])[:, None]
        if cholesky:
            weights = torch.cholesky_solve(side, torch.linalg.cholesky(block))
        else:
            weights = torch.linalg.solve(block, side)
        filled[i, m] = mean[m] + (covariance[m][:, o] @ weights)[:, 0]
    return filled


def by_padded(z: Tensor, observed: Tensor, mean: Tensor, covariance: Tensor, at_once: int = 64) -> Tensor:
    """Batched Cholesky factors of Σ with the identity where a feature is missing."""
    filled, eye = [], torch.eye(len(mean), dtype=z.dtype, device=z.device)
    for rows, seen in zip(z.split(at_once), observed.split(at_once), strict=True):
        both = seen[:, :, None] & seen[:, None, :]
        factor = torch.linalg.cholesky(torch.where(both, covariance, eye))
        d = torch.where(seen, rows - mean, 0.0)
        weights = torch.cholesky_solve(d[:, :, None], factor)[:, :, 0]
        filled.append(torch.where(seen, rows, mean + torch.where(seen, weights, 0.0) @ covariance))
    return torch.cat(filled)


def oracle(z: Tensor, observed: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """In float64, a few rows at a time: it keeps a covariance a row."""
    parts = zip(z.split(32), observed.split(32), strict=True)
    return torch.cat([conditional_moments(rows, seen, mean, covariance)[0] for rows, seen in parts])


def relative_error(filled: Tensor, truth: Tensor, observed: Tensor) -> dict:
    """Of the filled cells: all of them together, and in the worst row."""
    error = torch.where(observed, 0.0, filled.double().cpu() - truth)
    size = torch.where(observed, 0.0, truth)
    return {"all": float(f"{error.norm() / size.norm():.2g}"),
            "worst_row": float(f"{(error.norm(dim=1) / size.norm(dim=1)).max():.2g}")}


def measure_rivals(turns: int, device: torch.device) -> dict:
    """784 features, half of them missing: who fills 512 rows fastest, and how exactly."""
    mean, covariance, z = digits()
    observed = holes(ROWS, 784, RATE)
    truth = oracle(z, observed, mean.float(), covariance.float())
    single = [t.to(device) for t in (z.float(), observed, mean.float(), covariance.float())]
    double = [t.to(device) for t in (z, observed, mean.float().double(), covariance.float().double())]
    ours, packed = Conditional(*single[2:], "cg", ASKED), Conditional(*single[2:], "direct")
    contestants = {
        "conjugate gradients": partial(ours.expect, *single[:2]),
        "conjugate gradients, with preparation": lambda: Conditional(*single[2:], "cg", ASKED).expect(*single[:2]),
        "solve a row, float32": partial(by_solve, *single, cholesky=False),
        "Cholesky a row, float32": partial(by_solve, *single, cholesky=True),
        "Cholesky a row, float64": partial(by_solve, *double, cholesky=True),
        "padded batched Cholesky, float32": partial(by_padded, *single),
        "packed blocks, float32": partial(packed.expect, *single[:2]),
    }
    errors = {name: relative_error(f(), truth, observed) for name, f in contestants.items()}
    found = take_turns(contestants, turns, device)
    best = found["seconds"]["conjugate gradients"]
    found["ratios"] = {name: round(s / best, 2) for name, s in found["seconds"].items()}
    return {"features": 784, "rows": ROWS, "rate": RATE, "ridge": RIDGE, "condition": round(ours.condition),
            "tolerance": ours.tolerance, "errors": errors} | found


# --- memory -------------------------------------------------------------------------------------------------


def peak_of_fill() -> dict:
    """MB of this process at its peak while it fills 512 rows of 3,072 features: for a fresh process."""
    alone = "from pathlib import Path; import torch; print(Path('/proc/self/status').read_text())"
    status = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, check=True).stdout
    torch_kb = int(next(row for row in status.splitlines() if row.startswith("VmRSS")).split()[1])
    base = memory_mb("VmRSS")
    mean, covariance, z = patches(32, ROWS)
    observed, data = holes(ROWS, 3072, RATE), memory_mb("VmHWM")
    forget_peak()
    others, own, began = machine_seconds(), time.process_time(), time.perf_counter()
    gaussian = Conditional(mean, covariance, "cg")
    prepared = time.perf_counter()
    filled = gaussian.expect(z, observed)
    ended = time.perf_counter()
    others = max(0.0, machine_seconds() - others - (time.process_time() - own)) / (ended - began)
    seconds = {"prepare": round(prepared - began, 2), "first_fill": round(ended - prepared, 2)}
    peak, few = memory_mb("VmHWM"), slice(0, 4)
    truth = oracle(z[few], observed[few], mean, covariance)
    return {"features": 3072, "rows": ROWS, "rate": RATE, "ridge": RIDGE, "condition": round(gaussian.condition),
            "torch_alone_mb": round(torch_kb / 1024, 1), "all_imports_mb": base, "with_data_mb": data, "peak_mb": peak,
            "seconds": seconds, "others": round(others, 2),
            "error": relative_error(filled[few], truth, observed[few]),
            "padded_cholesky_gb": round(ROWS * 3072**2 * 4 / 1e9, 1)}


def measure_memory(turns: int, device: torch.device) -> dict:
    """`peak_of_fill` in a process of its own, the quietest of some; on a GPU what its allocator held at most."""
    if device.type == "cuda":
        mean, covariance, z = (t.to(device) for t in patches(32, ROWS))
        torch.cuda.reset_peak_memory_stats(device)
        Conditional(mean, covariance, "cg").expect(z, holes(ROWS, 3072, RATE).to(device))
        return {"features": 3072, "rows": ROWS, "peak_mb": round(torch.cuda.max_memory_allocated(device) / 2**20, 1)}
    command = [sys.executable, __file__, "--fresh"]
    found = []
    while len(found) < 20 and (not found or found[-1]["others"] > 0.1):
        time.sleep(5 * bool(found))
        asked = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(asked.stdout.splitlines()[-1]))
    return min(found, key=lambda one: one["others"])


# --- scaling ------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Notes shape and precision of every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[int, int, int, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.seen.append((*args[0].shape, args[1].shape[1], args[0].dtype))
        return func(*args, **(kwargs or {}))


def replay(products: list[tuple[int, int, int, torch.dtype]], device: torch.device) -> Callable:
    """A call computes these products and nothing else, into memory that is there already."""
    makers = {key: tuple(torch.rand(*shape, device=device).to(key[3]) for shape in
                         ((key[0], key[1]), (key[1], key[2]), (key[0], key[2]))) for key in set(products)}
    ready = [makers[key] for key in products]

    def call() -> None:
        for left, right, out in ready:
            torch.mm(left, right, out=out)

    return call


def measure_size(size: int, rows: int, turns: int, device: torch.device) -> dict:
    """Seconds to fill some rows of patches of this size, and seconds of the bare products of the same call."""
    mean, covariance, z = (t.to(device) for t in patches(size, rows))
    observed, gaussian = holes(rows, len(mean), RATE).to(device), Conditional(mean, covariance, "cg")
    gaussian.expect(z, observed)  # makes the preconditioner
    with Products() as noted:
        gaussian.expect(z, observed)
    flop = sum(2 * n * k * p for n, k, p, _ in noted.seen)
    both = {"fill": partial(gaussian.expect, z, observed), "products": replay(noted.seen, device)}
    found = take_turns(both, turns, device)
    seconds = found["seconds"]
    return {"features": len(mean), "rows": rows, "condition": round(gaussian.condition), "gflop": round(flop / 1e9, 2),
            "products_in": sorted({str(kind).removeprefix("torch.") for *_, kind in noted.seen}),
            "fraction_of_product_rate": round(seconds["products"] / seconds["fill"], 3)} | found


def measure_scaling(turns: int, device: torch.device) -> dict:
    """By features at 512 rows, by rows at 768 features."""
    features = [say(measure_size(size, ROWS, turns, device)) for size in (7, 12, 16, 24, 32)]
    rows = [say(measure_size(16, n, turns, device)) for n in (64, 128, 256, 512, 1024, 2048, 4096)]
    return {"by_features": features, "by_rows": rows}


# --- crossover ----------------------------------------------------------------------------------------------


def measure_pair(width: int, rate: float, dtype: torch.dtype, turns: int, device: torch.device) -> dict:
    """Microseconds a row by factorization and by conjugate gradients; pixels from the middle of MNIST's pictures."""
    mean, covariance, _ = digits()
    pixels = torch.cartesian_prod(torch.arange(4, 24), torch.arange(4, 24)) @ torch.tensor([28, 1])
    pixels = pixels[torch.randperm(400, generator=torch.Generator().manual_seed(0))[:width]]
    mean, covariance = mean[pixels].to(device, dtype), covariance[pixels][:, pixels].to(device, dtype)
    rows = max(256, min(4096, 2**18 // width))
    z = (load("mnist-sample").x.flatten(1)[:rows, pixels].double() / 255).to(device, dtype)
    observed = holes(len(z), width, rate).to(device)
    both = {method: partial(Conditional(mean, covariance, method).expect, z, observed) for method in ("direct", "cg")}
    found = take_turns(both, turns, device)
    return {"features": width, "rate": rate, "precision": str(dtype).removeprefix("torch."), "others": found["others"],
            "us_a_row": {name: round(1e6 * s / len(z), 2) for name, s in found["seconds"].items()}}


def measure_crossover(turns: int, device: torch.device) -> list[dict]:
    """Every width, rate and precision."""
    cases = [(w, r, d) for d in (torch.float32, torch.float64) for r in (0.05, 0.2, 0.5, 0.9)
             for w in (8, 16, 32, 64, 128, 256, 384)]
    return [say(measure_pair(*case, turns, device)) for case in cases]


# --- everything ---------------------------------------------------------------------------------------------


def say(record: dict) -> dict:
    """Show a record at once."""
    print(record, flush=True)
    return record


def about(device: torch.device) -> dict:
    """What was measured on, and with what."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "clock": "wall", "threads": torch.get_num_threads(), "seed": 0, "commit": commit(),
            "versions": {"torch": version("torch")}}


def main() -> None:
    """The chosen parts on one device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--fresh", action="store_true", help=argparse.SUPPRESS)  # for `measure_memory`
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.fresh:
        print(json.dumps(peak_of_fill()))
        return
    device = torch.device(args.device)
    for part in args.part:
        found = globals()[f"measure_{part}"](args.turns, device)
        print(part, found, flush=True)
        facts = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        entry = facts.get(device.type, {}) | about(device) | {part: found}
        what = "seconds, errors and memory of Gaussian conditionals; medians of turns"
        print("written:", write_facts(RESULT, facts | {"what": what, device.type: entry}).name, flush=True)


if __name__ == "__main__":
    main()
