"""Measure what the training tools cost and write results/training_overhead.json; run by hand, it is no test.

    OMP_NUM_THREADS=1 python tests/measure_training.py [--repeats 15]

The same network, batches of the same size and the same optimizer, once in a bare loop of PyTorch and once with every
tool: seeds, batches, autocast, guard, history, early stopping, progress bar, checkpoint. The two take turns in one
process, a short stretch each, so that whatever else the machine does meets both; a repeat is one pair, and the figure
is the median of the ratios of the pairs, plus what writing a checkpoint every 30 seconds takes. On a CPU the clock
counts the seconds this process computed, which other processes disturb less; on a GPU, seconds on the wall.
"""

import argparse
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from measure_simple_rivals import ROOT, commit, write_facts
from torch import Tensor, nn

from missingbook.foundations.training import TrainingRun, choose_device, write_state

SETTINGS = {  # rows, width, hidden, batch, epochs of a stretch
    "images": dict(rows=60_000, width=784, hidden=256, batch_size=256, epochs=1),
    "table": dict(rows=1_000, width=11, hidden=256, batch_size=128, epochs=50),
}


def clock(device: torch.device) -> float:
    """Seconds: of this process on a CPU, on the wall with a GPU."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def network_and_optimizer(width: int, hidden: int, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A denoiser like that of the next chapter: values and their pattern in, values out."""
    torch.manual_seed(0)
    sizes = [2 * width, hidden, hidden]
    layers = [layer for a, b in zip(sizes[:-1], sizes[1:], strict=True) for layer in (nn.Linear(a, b), nn.ReLU())]
    network = nn.Sequential(*layers, nn.Linear(hidden, width)).to(device)
    return network, torch.optim.Adam(network.parameters(), lr=1e-3)


def loss_of(network: nn.Module, x: Tensor, lot: Tensor) -> Tensor:
    """Hide half of the cells, ask for all."""
    seen = lot < 0.5
    return ((network(torch.cat([torch.where(seen, x, 0.0), seen.float()], 1)) - x) ** 2).mean()


def bare(x: Tensor, judge: Tensor, hidden: int, batch_size: int, epochs: int) -> float:
    """Seconds a step of a loop without any tool; it judges every epoch and reports the mean loss, as the other does."""
    network, optimizer = network_and_optimizer(x.shape[1], hidden, x.device)
    steps, losses, began = 0, [], clock(x.device)
    for _ in range(epochs):
        total = 0.0
        for index in torch.randperm(len(x)).to(x.device).split(batch_size):
            batch = x[index]
            loss = loss_of(network, batch, torch.rand(batch.shape, device=x.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, steps = total + loss.detach(), steps + 1
        with torch.no_grad():
            losses.append((float(total), float(loss_of(network, judge, torch.rand(judge.shape, device=x.device)))))
    return (clock(x.device) - began) / steps


def with_tools(x: Tensor, judge: Tensor, hidden: int, batch_size: int, epochs: int, folder: str) -> float:
    """Seconds a step of the same loop with every tool."""
    network, optimizer = network_and_optimizer(x.shape[1], hidden, x.device)
    steps, began = 0, clock(x.device)
    run = TrainingRun(0, x.device, checkpoint=Path(folder) / "checkpoint", patience=1000)
    run.keep(network=network, optimizer=optimizer)
    for _ in run.epochs(epochs):
        for (batch,) in run.batches(run.place(x), batch_size=batch_size):
            with run.autocast():
                loss = loss_of(network, batch, run.noise.uniform(*batch.shape))
            run.step(loss, optimizer)
            run.log(loss=loss)
            steps += 1
        with torch.no_grad():
            score = loss_of(network, judge, run.noise.uniform(*judge.shape))
        run.log(validation=score)
        run.watch(score)
    return (clock(x.device) - began) / steps


def checkpoint_seconds(x: Tensor, hidden: int, folder: str) -> float:
    """Seconds on the wall to write what a run of this size remembers."""
    network, optimizer = network_and_optimizer(x.shape[1], hidden, x.device)
    run, seconds = TrainingRun(0, x.device, patience=1000, verbose=False), []
    run.keep(network=network, optimizer=optimizer)
    for _ in run.epochs(1):
        run.step(loss_of(network, x[:64], run.noise.uniform(*x[:64].shape)), optimizer)
        run.watch(1.0)
    for _ in range(5):
        began = time.perf_counter()
        write_state(Path(folder) / "state", "checkpoint", run._state())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(name: str, repeats: int, device: torch.device) -> dict:
    """One setting: the median over pairs of seconds with tools over seconds bare; who goes first changes every time."""
    setting = dict(SETTINGS[name])
    rows, width = setting.pop("rows"), setting.pop("width")
    x = torch.rand(rows, width, generator=torch.Generator().manual_seed(0)).to(device)  # only the clock looks at it
    judge, pairs = x[: rows // 10][:2000], []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(repeats + 1):
            order = [lambda: bare(x, judge, **setting), lambda: with_tools(x, judge, **setting, folder=folder)]
            seconds = [f() for f in order] if k % 2 else [f() for f in order[::-1]][::-1]
            pairs += [seconds] if k else []  # the first pair warms up
        writing = checkpoint_seconds(x, setting["hidden"], folder) / 30
    ratios = sorted(tools / plain + writing for plain, tools in pairs)
    quarter = len(ratios) // 4
    return {"setting": name, "rows": rows, "width": width, **setting, "repeats": repeats,
            "ratio": round(statistics.median(ratios), 4),
            "quartiles": [round(ratios[quarter], 4), round(ratios[-1 - quarter], 4)],
            "of_which_checkpoints": round(writing, 5),
            "bare_ms_a_step": round(1e3 * statistics.median(p for p, _ in pairs), 4),
            "tools_ms_a_step": round(1e3 * statistics.median(t for _, t in pairs), 4)}


def write(records: list[dict], device: torch.device) -> Path:
    """results/training_overhead.json, whole or not at all."""
    path = ROOT / "results" / "training_overhead.json"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts = {"what": "seconds a step with every training tool over seconds a step of a bare loop, median over pairs",
             "clock": "processor seconds of the process" if device.type == "cpu" else "wall",
             "device": name, "threads": torch.get_num_threads(), "seed": 0, "commit": commit(),
             "versions": {p: version(p) for p in ("torch", "accelerate")}, "runs": records}
    return write_facts(path, facts)


def main() -> None:
    """Both settings on the device that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats, device, records = parser.parse_args().repeats, choose_device(), []
    for name in SETTINGS:
        records.append(measure(name, repeats if name == "images" else 4 * repeats, device))
        print(records[-1], flush=True)
    print("written:", write(records, device).relative_to(ROOT))


if __name__ == "__main__":
    main()
