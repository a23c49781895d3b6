"""Time a training step of VAEAC beside the authors' code and write results/vaeac/speed.json; run by hand, no test.

    python tests/measure_vaeac.py --public PATH

PATH: a checkout of the authors' repository that runs on today's PyTorch (bool masks in VAEAC.py and prob_utils.py). One
thread, CPU seconds, the programs in turns, the best of several rounds. Tables: one epoch over the training rows, batch
64, ten layers of 256 units, 64 latents, no judging. Pictures: one step on 16 random pictures of 32×32×3 (time does not
depend on what they show), stages of 8, 8, 16, 32, 64 and 128 channels with four blocks each, 64 latents.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from measure_simple_rivals import ROOT, commit, write_facts
from torch import Tensor, nn

from missingbook.foundations.data import load
from missingbook.foundations.imputer import Layout
from missingbook.foundations.training import TrainingRun, seeded
from missingbook.vaes.vaeac import (
    VAEAC,
    ImageNetworks,
    TableNetworks,
    VAEACImputer,
    hide_cells,
    train_vaeac,
    vaeac_bound,
)

BEGUN_AT = commit()  # of the code that is loaded
CHANNELS, CPU = (8, 8, 16, 32, 64, 128), torch.device("cpu")


def best(programs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The smallest CPU seconds of each program, run in turns after one round that does not count."""
    times = {name: [] for name in programs}
    for round_ in range(repeats + 1):
        for name, program in programs.items():
            began = time.process_time()
            program()
            if round_:
                times[name].append(time.process_time() - began)
    return {name: min(values) for name, values in times.items()}


def table(name: str) -> Tensor:
    """The numbers of a table, standardized, a fifth of the cells missing, as the paper's program reads them."""
    frame = load(name).frame.select_dtypes("number").astype("float64")
    x = ((frame - frame.mean()) / frame.std()).to_numpy("float32")
    return torch.from_numpy(np.where(np.random.default_rng(0).random(x.shape) < 0.2, np.nan, x))


def public_epoch(x: Tensor, package: ModuleType) -> Callable[[], None]:
    """One epoch as the authors' impute.py runs it: loader, masks, bound, step."""
    parts = package("imputation_networks").get_imputation_networks(x.shape[1] * [1])
    model = package("VAEAC").VAEAC(
        parts["reconstruction_log_prob"], parts["proposal_network"], parts["prior_network"], parts["generative_network"]
    )
    adam, extend = parts["optimizer"](model.parameters()), package("train_utils").extend_batch
    loader = torch.utils.data.DataLoader(x, batch_size=64, shuffle=True)

    def epoch() -> None:
        for batch in loader:
            batch = extend(batch, loader, 64)
            mask = parts["mask_generator"](batch)
            adam.zero_grad()
            bound = model.batch_vlb(batch, mask).mean()
            (-bound / parts["vlb_scale_factor"]).backward()
            adam.step()
            float(bound)

    return epoch


def our_epoch(x: Tensor, precision: str, hidden: int = 256, depth: int = 10) -> Callable[[], None]:
    """One epoch of `train_vaeac`."""
    width, observed = x.shape[1], ~x.isnan()
    layout = Layout(width, tuple(range(width)))
    with seeded(0, CPU):
        network = VAEAC(layout, TableNetworks(width, width, hidden, depth, 64), 64, sigma=1.0)

    def epoch() -> None:
        run = TrainingRun(0, CPU, precision, verbose=False)
        train_vaeac(
            network,
            x.nan_to_num(),
            observed,
            run,
            lambda o, noise: hide_cells(o, layout, 0.2, noise),
            1,
            64,
            validation_fraction=0.0,
            min_steps=1,
        )

    return epoch


def public_networks(package: ModuleType) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The authors' image networks, put together from their blocks for 32×32: proposal, prior, generative."""
    block, memory = package("nn_utils").ResBlock, package("nn_utils").MemoryLayer

    def blocks(c: int) -> list[nn.Module]:
        return [block(c, max(c // 2, 8)) for _ in range(4)]

    def down(keep: bool) -> nn.Sequential:
        layers: list[nn.Module] = [memory("#in")] if keep else []
        for k, (a, b) in enumerate(zip((6, *CHANNELS[:-1]), CHANNELS)):
            layers += ([nn.AvgPool2d(2, 2)] if k else []) + [nn.Conv2d(a, b, 1), *blocks(b)]
            layers += [memory(f"#{k}")] if keep else []
        return nn.Sequential(*layers, nn.Conv2d(CHANNELS[-1], 128, 1))

    layers: list[nn.Module] = [nn.Conv2d(64, CHANNELS[-1], 1)]
    for k in reversed(range(len(CHANNELS))):
        c, last = CHANNELS[k], k == len(CHANNELS) - 1
        layers += [] if last else [nn.Conv2d(CHANNELS[k + 1], c, 1), nn.Upsample(scale_factor=2)]
        layers += [memory(f"#{k}", True), nn.Conv2d(2 * c, c, 1), *blocks(c)]
    return down(False), down(True), nn.Sequential(*layers, memory("#in", True), nn.Conv2d(CHANNELS[0] + 6, 6, 1))


def public_step(package: ModuleType) -> Callable[[], None]:
    """One step on 16 pictures, half of the pixels hidden."""
    proposal, prior, generative = public_networks(package)
    model = package("VAEAC").VAEAC(package("prob_utils").GaussianLoss(), proposal, prior, generative)
    adam, x = torch.optim.Adam(model.parameters(), lr=2e-4), torch.rand(16, 3, 32, 32)

    def step() -> None:
        mask = (torch.rand(16, 1, 32, 32) < 0.5).float().repeat(1, 3, 1, 1)
        adam.zero_grad()
        bound = model.batch_vlb(x, mask).mean()
        (-bound / 32**2).backward()
        adam.step()
        float(bound)

    return step


def our_step(precision: str) -> Callable[[], None]:
    """The same with our networks of the same stages."""
    layout, x = Layout(3072, tuple(range(3072))), torch.rand(16, 3072)
    with seeded(0, CPU):
        network = VAEAC(layout, ImageNetworks((3, 32, 32), 6, CHANNELS, 4, 64), 64)
    run = TrainingRun(0, CPU, precision, verbose=False)
    step = run.stepper(lambda *batch: {"loss": -vaeac_bound(network, *batch).mean()}, run.adam(network, 2e-4))
    observed = torch.ones(16, 3072, dtype=torch.bool)
    return lambda: step(x, observed, hide_cells(observed, layout, 0.5, run.noise), run.noise.normal(16, 64))


def draws(n: int = 10_000, k: int = 100) -> dict[str, Callable[[], None]]:
    """k draws of n rows of yeast, in one call and one after another."""
    x = table("yeast").numpy().astype("float64")
    model = VAEACImputer(max_epochs=1, random_state=0, verbose=False).fit(x)
    rows = np.tile(x, (n // len(x) + 1, 1))[:n]
    encoded, observed = model._encode(rows)
    return {
        "one call": lambda: model._all_draws(encoded, observed, 0, k),
        "draw by draw": lambda: [model._one_draw(encoded, observed, 0, i) for i in range(k)],
    }


def main() -> None:
    """Measure all and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(asked.public))
    rows = []
    for name in ("yeast", "wine_quality_white"):
        x = table(name)
        got = best(
            {"authors": public_epoch(x, import_module)}
            | {p: our_epoch(x, p) for p in ("float32", "bf16")}
            | {"default": our_epoch(x, "float32", 128, 3)},
            asked.repeats,
        )
        rows.append({"what": f"epoch, {name}, {len(x)} rows", **got})
    programs = {"authors": public_step(import_module)} | {p: our_step(p) for p in ("float32", "bf16")}
    many = {name: partial(lambda f: [f() for _ in range(5)], program) for name, program in programs.items()}
    rows.append(
        {"what": "step, 16 pictures of 32×32×3"}
        | {name: value / 5 for name, value in best(many, asked.repeats).items()}
    )
    for row in rows:
        row |= {f"authors / {p}": row["authors"] / row[p] for p in ("float32", "bf16", "default") if p in row}
    sampling = best(draws(), 1)
    facts = {
        "commit": BEGUN_AT,
        "device": "cpu",
        "threads": 1,
        "repeats": asked.repeats,
        "torch": torch.__version__,
        "rows": rows,
        "draws": {"rows": 10_000, "draws": 100, **sampling, "ratio": sampling["draw by draw"] / sampling["one call"]},
    }
    (ROOT / "results" / "vaeac").mkdir(parents=True, exist_ok=True)
    print(write_facts(ROOT / "results" / "vaeac" / "speed.json", facts).read_text())


if __name__ == "__main__":
    main()
