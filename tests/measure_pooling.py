"""Measure the coverage of pooled 95% intervals and write results/pooling_coverage.json; run by hand, it is no test.

    OMP_NUM_THREADS=1 python tests/measure_pooling.py [--repeats 400] [--rows 100] [--jobs 1]

Protocol: y = 0.5 (x1 + x2 + z) + noise of variance 1, predictors of variance 1 and correlation 0.4; 40% of x1 and of x2
hidden, more often where y and z are large (MAR); regression of y on the three, 20 imputations, intervals at 95%.
"""

import argparse
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from measure_simple_rivals import ROOT, commit, write_facts
from scipy import stats
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer

from missingbook.foundations.classics import MICEImputer, NeighboursImputer
from missingbook.foundations.mechanisms import hide, mar
from missingbook.practice.pooling import impute_many, linear_regression, regress_each

M, SLOPE, RATE = 20, 0.5, 0.4
POSTERIOR = dict(sample_posterior=True, max_iter=5, tol=0.0)
# name → (imputer, refit to resampled rows). n_chains=1 where every imputation has a fit of its own.
METHODS = {
    "mice, 20 chains": (MICEImputer(n_chains=M, max_rounds=5), False),
    "mice, 5 chains": (MICEImputer(n_chains=5, max_rounds=5), False),
    "mice, bootstrap": (MICEImputer(n_chains=1, max_rounds=5), True),
    "scikit-learn, own draws": (IterativeImputer(**POSTERIOR), False),
    "scikit-learn, bootstrap": (IterativeImputer(**POSTERIOR), True),
    "neighbours, one fit": (NeighboursImputer(10), False),
    "neighbours, bootstrap": (NeighboursImputer(10), True),
}


def study(rows: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(complete, with holes): one small study."""
    rng = np.random.default_rng([seed, 1])
    x = rng.multivariate_normal(np.zeros(3), 0.6 * np.eye(3) + 0.4, size=rows)
    frame = pd.DataFrame(x, columns=["x1", "x2", "z"])
    frame["y"] = SLOPE * x.sum(1) + rng.standard_normal(rows)
    return frame, hide(frame, mar(frame, RATE, columns=["x1", "x2"], random_state=seed))


def single(frame: pd.DataFrame) -> pd.DataFrame:
    """Coefficients with their intervals from one table taken for complete."""
    fits = regress_each([frame], "y")
    half = stats.t.ppf(0.975, fits.dof) * np.sqrt(np.diagonal(fits.covariances[0]))
    return pd.DataFrame({"estimate": fits.estimates[0], "low": fits.estimates[0] - half,
                         "high": fits.estimates[0] + half}, index=fits.names)


def repeat(job: tuple[int, int]) -> list[dict]:
    """All methods on one study: a record for each method and slope."""
    warnings.simplefilter("ignore")  # scikit-learn says that 5 rounds have not converged, as draws never do
    rows, seed = job
    frame, holes = study(rows, seed)
    tables = {"complete table": (single(frame), 0.0), "complete rows": (single(holes.dropna()), 0.0)}
    for name, (imputer, bootstrap) in METHODS.items():
        began = time.perf_counter()
        drawn = impute_many(imputer, holes, M, bootstrap=bootstrap, random_state=seed, verbose=False)
        tables[name] = linear_regression(drawn, "y"), time.perf_counter() - began
        if name == "mice, 20 chains":
            tables["mice, one draw"] = single(drawn[0]), 0.0
    return [{"method": name, "slope": slope, "estimate": float(line["estimate"]), "seconds": seconds,
             "width": float(line["high"] - line["low"]), "covered": bool(line["low"] <= SLOPE <= line["high"])}
            for name, (table, seconds) in tables.items() for slope, line in table.drop(index="intercept").iterrows()]


def write(records: pd.DataFrame, rows: int) -> Path:
    """results/pooling_coverage.json, whole or not at all."""
    path = ROOT / "results" / "pooling_coverage.json"
    grouped = records.groupby(["method", "slope"], sort=False)
    runs = grouped.agg(metric_value=("covered", "mean"), repeats=("covered", "size"), bias=("estimate", "mean"),
                       width=("width", "mean"), seconds=("seconds", "mean")).reset_index()
    runs["bias"] -= SLOPE
    runs = runs.rename(columns={"metric_value": "value"}).assign(metric="coverage of the 95% interval").round(4)
    facts = {
        "what": "coverage of pooled 95% intervals", "rows": rows, "imputations": M, "mechanism": "mar", "rate": RATE,
        "seeds": f"0 to {len(records) // len(runs) - 1}", "device": "cpu", "commit": commit(),
        "versions": {p: version(p) for p in ("numpy", "scipy", "scikit-learn", "pandas")},
        "runs": runs.to_dict("records"),
    }
    return write_facts(path, facts)


def main() -> None:
    """All studies, written every 20 so that nothing is lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    records: list[dict] = []
    with ProcessPoolExecutor(asked.jobs) as pool:
        for done, lines in enumerate(pool.map(repeat, [(asked.rows, s) for s in range(asked.repeats)]), 1):
            records += lines
            if done % 20 == 0 or done == asked.repeats:
                print(done, "of", asked.repeats, write(pd.DataFrame(records), asked.rows).relative_to(ROOT), flush=True)


if __name__ == "__main__":
    main()
