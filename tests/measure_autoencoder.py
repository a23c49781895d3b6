"""Measure the autoencoder beside the simple rivals and write results/autoencoder.json; run by hand, it is no test.

    MISSINGBOOK_DATA=… python tests/measure_autoencoder.py [--seeds 2]

Protocol, features and rivals: tests/measure_simple_rivals.py. Beside the RMSE: how many of the hidden cells lie inside
the central 90% of 40 draws.
"""

import argparse
import time
from importlib.metadata import version

import numpy as np
from measure_simple_rivals import ROOT, commit, features, write_facts

from missingbook.foundations.autoencoder import AutoencoderImputer
from missingbook.foundations.metrics import interval_coverage

TABLES = ("ctg", "wine_quality", "letter")
SETTINGS = {"default": {}, "dropout 0": {"dropout": 0.0}, "dropout 0.3": {"dropout": 0.3}}


def run(name: str, label: str, seed: int, x: np.ndarray) -> dict:
    """One seed of one setting on one table, as `measure_simple_rivals.run` splits and hides it."""
    rng = np.random.default_rng(seed)
    rows, observed = rng.permutation(len(x)), rng.random(x.shape) >= 0.2
    held, train = rows[: len(x) // 5], rows[len(x) // 5 :]
    holes = np.where(observed, x, np.nan)
    began = time.perf_counter()
    imputer = AutoencoderImputer(random_state=seed, **SETTINGS[label]).fit(holes[train])
    error = (imputer.transform(holes[held]) - x[held])[~observed[held]]
    seconds = time.perf_counter() - began
    draws = imputer.sample(holes[held], 40)
    return {"table": name, "features": x.shape[1], "rows": len(x), "method": "autoencoder", "setting": label,
            "seed": seed, "metric": "rmse", "value": round(float(np.sqrt(np.mean(error**2))), 5),
            "coverage_90": round(float(interval_coverage(draws, x[held], ~observed[held], level=0.9)), 4),
            "epochs": len(imputer.history_), "seconds": round(seconds, 1)}


def main() -> None:
    """All tables and seeds; the settings other than the default on the small tables only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    seeds, records = parser.parse_args().seeds, []
    for name in TABLES:
        x = features(name)
        for label in SETTINGS if name != "letter" else ["default"]:
            records += [run(name, label, seed, x) for seed in range(seeds)]
            print(records[-1], flush=True)
    facts = {"what": "RMSE on hidden cells of held-out rows", "mechanism": "mcar", "rate": 0.2, "heldout_rows": 0.2,
             "scaling": "min-max over the whole column", "device": "cpu", "threads": 1, "commit": commit(),
             "versions": {p: version(p) for p in ("numpy", "scikit-learn", "pandas", "torch")}, "runs": records}
    path = ROOT / "results" / "autoencoder.json"
    write_facts(path, facts)
    print("written:", path.relative_to(ROOT))


if __name__ == "__main__":
    main()
