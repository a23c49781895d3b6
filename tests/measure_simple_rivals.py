"""Measure the simple rivals on the public tables and write results/simple_rivals.json; run by hand, it is no test.

    MISSINGBOOK_DATA=… python tests/measure_simple_rivals.py [--seeds 2]

Protocol: features without the target, min–max over the whole column, 20% of all cells hidden completely at random, 20%
of the rows held out; fitted on the other rows with their holes; RMSE over the hidden cells of the held-out rows.
"""

import argparse
import json
import os
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from missingbook.foundations.classics import ExtraTreesImputer, LinearICEImputer, MeanImputer, NeighboursImputer
from missingbook.foundations.data import load

ROOT = Path(__file__).resolve().parents[1]
# For letter and ctg "without the target" is EMFlow's own count (16 and 21). Its 12 columns of wine include the target
# `quality`: the rivals' table leaves it out (11), and `wine_quality+target` measures what including it changes.
TABLES = ("ctg", "wine_quality", "wine_quality+target", "letter")  # the slowest last
METHODS = {
    "mean": lambda seed: MeanImputer(),
    "knn": lambda seed: NeighboursImputer(5, scale="minmax"),
    "ice": lambda seed: LinearICEImputer(max_rounds=10),
    # IterativeImputer keeps the forests of all rounds, so this does; our default keeps the last round's ("trees_last").
    "trees": lambda seed: ExtraTreesImputer(50, min_samples_leaf=2, max_rounds=4, keep_rounds=True, random_state=seed),
}


def features(name: str) -> np.ndarray:
    """The measured columns of a table as float64, each scaled to [0, 1] over all of its rows."""
    table = load(name.split("+")[0])
    dropped = () if name.endswith("+target") else table.target
    kept = [c for c, kind in table.kinds.items() if kind == "number" and c not in dropped]
    x = table.frame[kept].to_numpy("float64")
    return (x - x.min(0)) / (x.max(0) - x.min(0))


def run(name: str, method: str, seed: int, x: np.ndarray, all_rows: bool = False) -> list[dict]:
    """One seed of one method on one table; two records for the trees, with all rounds and with the last one alone.

    all_rows: fit on the held-out rows (with their holes) as well, which the protocol does not."""
    rng = np.random.default_rng(seed)
    rows, observed = rng.permutation(len(x)), rng.random(x.shape) >= 0.2
    held, train = rows[: len(x) // 5], rows[len(x) // 5 :]
    holes = np.where(observed, x, np.nan)
    began = time.perf_counter()
    imputer = METHODS[method](seed).fit(holes if all_rows else holes[train])

    def record(label: str) -> dict:
        error = (imputer.transform(holes[held]) - x[held])[~observed[held]]
        return {"table": name, "features": x.shape[1], "rows": len(x), "method": label, "seed": seed, "metric": "rmse",
                "value": round(float(np.sqrt(np.mean(error**2))), 5), "seconds": round(time.perf_counter() - began, 1)}

    records = [record(method)]
    if method == "trees":
        imputer.chain_.models = imputer.chain_.models[-1:]
        records.append(record("trees_last"))
    return records


def checks(x: np.ndarray, seeds: int) -> list[dict]:
    """Why ctg is hard to repeat: ten seeds of the quick methods; what fitting on the held-out rows too would give."""
    quick = [run("ctg, ten seeds", m, seed, x) for m in ("mean", "knn", "ice") for seed in range(10)]
    leaky = [run("ctg, fitted on all rows", m, seed, x, all_rows=True) for m in METHODS for seed in range(seeds)]
    return sum(quick + leaky, [])


def commit() -> str | None:
    """The git commit of this checkout, with "-dirty" where files differ from it; None where git does not know one.

    A copy without git is told by the variable MISSINGBOOK_COMMIT."""
    if told := os.environ.get("MISSINGBOOK_COMMIT"):
        return told
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return asked.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: str | torch.device) -> str:
    """"cpu", or what the GPU calls itself."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def write_facts(path: Path, facts: dict) -> Path:
    """Write measured facts as JSON, whole or not at all; returns the path."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)
    return path


def write(records: list[dict], extra: list[dict]) -> Path:
    """results/simple_rivals.json, whole or not at all."""
    path = ROOT / "results" / "simple_rivals.json"
    path.parent.mkdir(exist_ok=True)
    facts = {
        "what": "RMSE on hidden cells of held-out rows", "mechanism": "mcar", "rate": 0.2, "heldout_rows": 0.2,
        "scaling": "min-max over the whole column", "device": "cpu", "commit": commit(),
        "versions": {p: version(p) for p in ("numpy", "scipy", "scikit-learn", "pandas")},
        "runs": records, "checks": extra,
    }
    return write_facts(path, facts)


def main() -> None:
    """All tables, all methods, all seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    seeds = parser.parse_args().seeds
    records, extra = [], checks(features("ctg"), seeds)
    for name in TABLES:
        x = features(name)
        for seed in range(seeds):
            for method in METHODS:
                records += run(name, method, seed, x)
                print(records[-1], flush=True)
        print("written:", write(records, extra).relative_to(ROOT), flush=True)


if __name__ == "__main__":
    main()
