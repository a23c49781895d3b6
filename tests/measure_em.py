"""Measure GaussianImputer beside its rivals and write results/gaussian_em.json; run by hand, it is no test.

    OMP_NUM_THREADS=1 MISSINGBOOK_DATA=… python tests/measure_em.py [--seeds 3] [--skip-large]

Tables: the protocol of tests/measure_simple_rivals.py (features without the target, min–max over the whole column, 20%
of all cells hidden completely at random, 20% of the rows held out; fitted on the other rows; RMSE over the hidden cells
of the held-out rows). Contestants take turns in one process, on one thread.
Large: 200,000 rows of 50 columns that ten hidden causes make, 20% hidden; fitted to all rows, whose cells are filled;
scikit-learn's IterativeImputer with its own settings, two threads each. "posterior" is what the first call of `sample`
adds to a fit: 20 sets of parameters.
"""

import argparse
import time
from importlib.metadata import version

import numpy as np
import torch
from measure_simple_rivals import ROOT, commit, features, write_facts
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from threadpoolctl import threadpool_limits

from missingbook.foundations.classics import ExtraTreesImputer, LinearICEImputer, MeanImputer
from missingbook.gaussian.em import GaussianImputer

TABLES = ("yeast", "ctg", "wine_quality", "google_reviews", "letter")
QUIET = {"verbose": False, "device": "cpu"}
METHODS = {
    "mean": lambda seed: MeanImputer(),
    "gaussian": lambda seed: GaussianImputer(random_state=seed, **QUIET),
    "gaussian, normal marginals": lambda seed: GaussianImputer(random_state=seed, marginals="normal", **QUIET),
    "linear ICE": lambda seed: LinearICEImputer(max_rounds=10),
    "ExtraTrees": lambda seed: ExtraTreesImputer(50, min_samples_leaf=2, max_rounds=4, random_state=seed),
}


def on_table(name: str, seeds: int) -> dict[str, dict[str, list[float]]]:
    """RMSE and seconds of every method, seed by seed."""
    x, kept = features(name), ("rmse", "seconds_fit", "seconds_fill")
    found = {method: {what: [] for what in kept} for method in METHODS}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        rows, observed = rng.permutation(len(x)), rng.random(x.shape) >= 0.2
        held, train = rows[: len(x) // 5], rows[len(x) // 5 :]
        holes = np.where(observed, x, np.nan)
        for method, make in METHODS.items():
            began = time.perf_counter()
            imputer = make(seed).fit(holes[train])
            fitted = time.perf_counter()
            filled = imputer.transform(holes[held])
            error = (filled - x[held])[~observed[held]]
            record = found[method]
            record["seconds_fill"].append(round(time.perf_counter() - fitted, 4))
            record["seconds_fit"].append(round(fitted - began, 4))
            record["rmse"].append(round(float(np.sqrt(np.mean(error**2))), 5))
    return found


def large(rows: int, columns: int, rate: float) -> dict:
    """Seconds to fit and fill, and the RMSE in standard deviations, of the Gaussian and of IterativeImputer."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 10)) @ rng.normal(size=(10, columns)) + 2.0 * rng.normal(size=(rows, columns))
    x /= x.std(0)
    observed = rng.random(x.shape) >= rate
    holes, seconds, rmse = np.where(observed, x, np.nan), {}, {}
    rivals = {"gaussian": GaussianImputer(random_state=0, **QUIET),
              "IterativeImputer": IterativeImputer(random_state=0)}
    torch.set_num_threads(2)
    for name, imputer in rivals.items():
        with threadpool_limits(2):
            began = time.perf_counter()
            imputer.fit(holes)
            seconds[f"{name}, fit"] = round(time.perf_counter() - began, 2)
            began = time.perf_counter()
            filled = imputer.transform(holes)
            seconds[f"{name}, fill"] = round(time.perf_counter() - began, 2)
        rmse[name] = round(float(np.sqrt(np.mean((filled - x)[~observed] ** 2))), 5)
        print(name, seconds, rmse, flush=True)
    began = time.perf_counter()
    rivals["gaussian"].sample(holes[:1], 1)
    seconds["gaussian, posterior"] = round(time.perf_counter() - began, 2)
    rounds = {"gaussian": len(rivals["gaussian"].history_), "IterativeImputer": int(rivals["IterativeImputer"].n_iter_)}
    return {"rows": rows, "columns": columns, "rate": rate, "threads": 2, "seconds": seconds, "rmse": rmse,
            "iterations": rounds}


def main() -> None:
    """All tables, then the large one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--skip-large", action="store_true", help="leave out the 200,000 rows: a quarter of an hour")
    asked = parser.parse_args()
    facts = {"what": "RMSE on hidden cells of held-out rows, seconds to fit and to fill", "mechanism": "mcar",
             "rate": 0.2, "device": "cpu", "commit": commit(),
             "versions": {p: version(p) for p in ("numpy", "scikit-learn", "torch")}, "tables": {}}
    torch.set_num_threads(1)
    for name in TABLES:
        with threadpool_limits(1):
            facts["tables"][name] = on_table(name, asked.seeds)
        print(name, {m: (round(float(np.mean(r["rmse"])), 4), round(float(np.mean(r["seconds_fit"])), 3))
                     for m, r in facts["tables"][name].items()}, flush=True)
    if not asked.skip_large:
        facts["large"] = large(200_000, 50, 0.2)
    print("written:", write_facts(ROOT / "results" / "gaussian_em.json", facts).relative_to(ROOT))


if __name__ == "__main__":
    main()
