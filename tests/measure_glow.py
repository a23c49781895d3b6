"""Measure Glow: speed, memory, and what its parts are worth; writes results/glow/*.json; run by hand, it is no test.

    OMP_NUM_THREADS=1 python tests/measure_glow.py ablation|memory|speed [--public FOLDER] [--repeats 9]

ablation: bits per dimension of held-out 8 × 8 digits, affine and additive couplings, with the 1 × 1 convolutions
learned, held at their random rotation, or replaced by a permutation; three seeds; the best epoch by digits kept aside.
memory: bytes that a step keeps for its backward pass, by distinct storages, weights left out; and how far the peak of a
fresh process rises in one step.
speed: a step (forward, backward, Adam) beside the public code's and beside the bare convolutions of the same shapes,
in turns in one process; a figure is the median of the ratios within a turn. --public: a folder with the model.py of
rosinality/glow-pytorch, measured beside ours; nothing of it is kept here. The clock is the processor seconds of the
process with one thread, and the wall's with two.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from measure_simple_rivals import ROOT, commit, write_facts
from sklearn.datasets import load_digits
from torch import Tensor

from missingbook.flows.coupling import Flow, bits_per_dimension, dequantize
from missingbook.flows.glow import Glow
from missingbook.flows.realnvp import ImageRealNVP, train_flow
from missingbook.foundations.training import TrainingRun
from missingbook.practice.bench import forget_peak, memory_mb

FOLDER = ROOT / "results" / "glow"
LEVELS, STEPS, HIDDEN, BATCH, SHAPE = 3, 8, 512, 16, (3, 32, 32)  # what public code is compared on


def seed(number: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(number)


def facts(**more) -> dict:
    """Where and with what this was measured."""
    return {"device": "cpu", "commit": commit(), "versions": {"torch": version("torch")}, **more}


def fix_mixing(flow: Glow, mixing: str, generator: torch.Generator) -> None:
    """Every W of a flow built with lu=False: "learned", "rotation" (as it began, fixed), "shuffle" or "reversal"."""
    for conv in (conv for level in flow.levels for conv in level.convs):
        n = conv.channels
        order = {"shuffle": torch.randperm(n, generator=generator), "reversal": torch.arange(n).flip(0)}.get(mixing)
        if order is not None:
            conv.weight.data.copy_(torch.eye(n)[order])
        conv.weight.requires_grad_(mixing == "learned")


def train_and_judge(flow: Flow, number: int, epochs: int) -> dict:
    """Bits per dimension of 300 held-out digits, after training on 1,297 with 200 aside."""
    order = torch.randperm(1797, generator=seed())
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[order, None]
    run, began = TrainingRun(seed=number, device="cpu", verbose=False), time.process_time()
    train_flow(flow, digits[:1297], run, epochs, 64, x_judge=digits[1297:1497], levels=17)
    with torch.no_grad():
        log_prob = flow.log_prob(dequantize(digits[1497:], 17, seed(1)))
    return {"seed": number, "bits": round(bits_per_dimension(log_prob, 64, 17).mean().item(), 4),
            "weights": sum(w.numel() for w in flow.parameters() if w.requires_grad),
            "seconds": round(time.process_time() - began, 1)}


def ablation(epochs: int = 60, seeds: int = 3) -> None:
    """results/glow/ablation.json, rewritten after every run."""
    runs = []
    for number in range(seeds):
        contestants = {(c, m): Glow((1, 8, 8), 2, 4, 32, c, lu=False, generator=seed(number))
                       for c in ("affine", "additive") for m in ("learned", "rotation", "shuffle", "reversal")}
        for (coupling, mixing), flow in contestants.items():
            fix_mixing(flow, mixing, seed(number))
            runs.append({"coupling": coupling, "mixing": mixing} | train_and_judge(flow, number, epochs))
            print(runs[-1], flush=True)
        realnvp = ImageRealNVP((1, 8, 8), 2, 4, 32, generator=seed(number))
        runs.append({"coupling": "RealNVP", "mixing": "none"} | train_and_judge(realnvp, number, epochs))
        write_facts(FOLDER / "ablation.json", facts(what="bits per dimension of 300 digits", epochs=epochs, runs=runs))


def saved_bytes(function: Callable[[], Tensor], weights: set[int]) -> int:
    """Bytes of the distinct storages that are kept for the backward pass, those in `weights` left out."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = function()  # alive until the count is done, or a storage's place would be given away again
    del loss
    return sum(kept.values())


def one_step(n_steps: int, reversible: bool, coupling: str, batch: int = 128, hidden: int = 64) -> dict:
    """In this process, which should be fresh: bytes kept, and how far the peak rises in a step."""
    torch.set_num_threads(1)
    flow = Glow(SHAPE, LEVELS, n_steps, hidden, coupling, reversible=reversible, generator=seed())
    x = torch.rand(batch, *SHAPE, generator=seed(1))
    flow.start(x[:2])
    flow.log_prob(x[:2]).mean().backward()  # kernels and gradients are there
    forget_peak()
    before = memory_mb("VmRSS")
    (-flow.log_prob(x).mean()).backward()
    peak = memory_mb("VmHWM") - before
    weights = {w.untyped_storage().data_ptr() for w in flow.parameters()}
    return {"n_steps": n_steps, "reversible": reversible, "coupling": coupling, "batch": batch, "hidden": hidden,
            "saved_mb": round(saved_bytes(lambda: flow.log_prob(x).mean(), weights) / 2**20, 2),
            "peak_mb": round(peak, 1)}


def memory() -> None:
    """results/glow/memory.json."""
    runs = []
    for coupling in ("affine", "additive"):
        for reversible in (False, True):
            for n_steps in (8, 16, 32):
                command = [sys.executable, __file__, "step", str(n_steps), str(int(reversible)), coupling]
                runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
                print(runs[-1], flush=True)
    write_facts(FOLDER / "memory.json", facts(what="MiB a training step keeps for its backward pass, and its peak",
                                              shape=SHAPE, n_levels=LEVELS, runs=runs))


def our_step(coupling: str, x: Tensor, reversible: bool = False, bf16: bool = False) -> Callable[[], None]:
    """A call takes a step as `train_flow` does, without clipping."""
    flow = Glow(SHAPE, LEVELS, STEPS, HIDDEN, coupling, reversible=reversible, generator=seed())
    flow.start(x)
    adam = torch.optim.Adam(flow.parameters(), lr=1e-4)

    def step() -> None:
        adam.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = -flow.log_prob(x).mean()
        loss.backward()
        adam.step()

    return step


def public_step(coupling: str, x: Tensor) -> Callable[[], None]:
    """A call takes a step of the public model, as its own script does."""
    import model
    flow = model.Glow(3, STEPS, LEVELS, affine=coupling == "affine", conv_lu=True)
    with torch.no_grad():
        flow(x - 0.5)
    adam = torch.optim.Adam(flow.parameters(), lr=1e-4)

    def step() -> None:
        log_p, log_det, _ = flow(x - 0.5)
        adam.zero_grad()
        (-(log_p + log_det).mean()).backward()
        adam.step()

    return step


def bare_convolutions(coupling: str) -> Callable[[], None]:
    """A call computes the couplings' convolutions and their gradients, and nothing else."""
    layers = []
    for k in range(LEVELS):
        channels, side = SHAPE[0] * 2 ** (k + 2), SHAPE[1] // 2 ** (k + 1)
        n_out = channels if coupling == "affine" else channels // 2
        for a, b, width in STEPS * [(channels // 2, HIDDEN, 3), (HIDDEN, HIDDEN, 1), (HIDDEN, n_out, 3)]:
            h, gradient = (torch.randn(BATCH, n, side, side).to(memory_format=torch.channels_last) for n in (a, b))
            weight, bias = torch.randn(b, a, width, width).requires_grad_(), torch.zeros(b).requires_grad_()
            layers.append((h.requires_grad_(), weight, bias, width // 2, gradient))

    def compute() -> None:
        for h, weight, bias, padding, gradient in layers:
            torch.autograd.grad(F.conv2d(h, weight, bias, padding=padding), [h, weight, bias], gradient)

    return compute


def turns(contestants: dict[str, Callable], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of one call of each, once in every turn; who begins changes."""
    times, names = {name: [] for name in contestants}, list(contestants)
    for function in contestants.values():
        function()
    for k in range(repeats):
        for name in names[k % len(names):] + names[: k % len(names)]:
            began = clock()
            contestants[name]()
            times[name].append(clock() - began)
    return times


def ratio(above: list[float], below: list[float]) -> dict:
    """Median and quartiles of the ratios within the turns."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    quarter = len(ratios) // 4
    return {"ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(ratios[quarter], 3), round(ratios[-1 - quarter], 3)]}


def speed_of(coupling: str, threads: int, repeats: int) -> dict:
    """One entry: steps of ours, reversible and in bf16 too, of the public code, and the bare convolutions."""
    torch.set_num_threads(threads)
    x = torch.rand(BATCH, *SHAPE, generator=seed())
    contestants = {"public": public_step(coupling, x), "ours": our_step(coupling, x),
                   "bare": bare_convolutions(coupling), "reversible": our_step(coupling, x, reversible=True),
                   "bf16": our_step(coupling, x, bf16=True)}
    times = turns(contestants, repeats, time.process_time if threads == 1 else time.perf_counter)
    pairs = {"public_over_ours": ("public", "ours"), "public_over_bare": ("public", "bare"),
             "ours_over_bare": ("ours", "bare"), "reversible_over_ours": ("reversible", "ours"),
             "public_over_bf16": ("public", "bf16")}
    return {"coupling": coupling, "threads": threads,
            "seconds": {name: round(statistics.median(t), 4) for name, t in times.items()}} | {
            name: ratio(times[a], times[b]) for name, (a, b) in pairs.items()}


def sampling(n: int = 1000) -> dict:
    """Processor seconds for n pictures, one thread: ours in chunks, the public code's in one go."""
    import model
    torch.set_num_threads(1)
    ours, public = Glow(SHAPE, LEVELS, STEPS, HIDDEN, generator=seed()), model.Glow(3, STEPS, LEVELS, affine=True)
    sizes = [(6, 16, 16), (12, 8, 8), (48, 4, 4)]
    z = [torch.randn(n, *size, generator=seed()) for size in sizes]
    with torch.no_grad():
        public(torch.rand(16, *SHAPE) - 0.5)
    ours.start(torch.rand(16, *SHAPE))
    result = {}
    for name, draw in (("ours", lambda: ours.sample(n, generator=seed())), ("public", lambda: public.reverse(z))):
        with torch.no_grad():
            began = time.process_time()
            draw()
            result[name] = round(time.process_time() - began, 2)
    return {"n": n, "seconds": result}


def speed(public: Path, repeats: int) -> None:
    """results/glow/speed.json."""
    sys.path.insert(0, str(public))
    runs = [speed_of(coupling, threads, repeats) for threads in (1, 2) for coupling in ("affine", "additive")]
    print(json.dumps(runs, indent=1), flush=True)
    write_facts(FOLDER / "speed.json", facts(
        what="a training step (forward, backward, Adam), float32, in turns", public="rosinality/glow-pytorch",
        shape=SHAPE, n_levels=LEVELS, n_steps=STEPS, hidden=HIDDEN, batch=BATCH, repeats=repeats, runs=runs,
        sampling=sampling()))


def main() -> None:
    """One of the three measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["ablation", "memory", "speed", "step"])
    parser.add_argument("step", nargs="*", help="n_steps reversible coupling, for one process of memory")
    parser.add_argument("--public", type=Path, help="folder of rosinality/glow-pytorch")
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if given.what == "step":
        print(json.dumps(one_step(int(given.step[0]), bool(int(given.step[1])), given.step[2])))
    elif given.what == "speed":
        speed(given.public, given.repeats)
    else:
        {"ablation": ablation, "memory": memory}[given.what]()


if __name__ == "__main__":
    main()
