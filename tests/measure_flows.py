"""Measure what a training step of MCFlow costs and write results/flow_speed.json; run by hand, it is no test.

    OMP_NUM_THREADS=1 python tests/measure_flows.py [--device cuda] [--public FOLDER] [--repeats 9]

Time: steps of the flow G and of the network H beside their bare matrix products: the same shapes in the same precision,
written into memory that is there already, and nothing else. H needs the forward products of G, all of its own, and of
G's inverse the forward products and the gradients of activations. Contestants take turns in one process, a short
stretch each; a figure is the median of the ratios within a turn. The clock counts the seconds this process computed.
The clipped step is measured once more, "alone": in a fresh process that holds nothing but it and the products.
There the allocator may give memory back after every step and pay to get it again, which others beside it prevent.
Memory: peak of a step, each in a fresh process on a CPU; on a GPU nothing else is measured. --public: the authors'
code in a folder, beside ours; nothing of it is kept here. The file holds one entry for the CPU and one for the GPU;
a run replaces its own.
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from measure_simple_rivals import ROOT, commit, write_facts
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from missingbook.flows.mcflow import LatentNetwork, MCFlow, flow_loss, latent_objective
from missingbook.foundations.training import TrainingRun
from missingbook.practice.bench import forget_peak, memory_mb

WIDTH, HIDDEN, COUPLINGS = 784, 784, 6
RATE, MAX_NORM = 3e-5, 10.0  # as `train_mcflow` has them
RESULT = ROOT / "results" / "flow_speed.json"


class Layer(NamedTuple):
    """A linear layer, `heads` of them side by side, and which gradients a step needs of it."""

    n_in: int
    n_out: int
    heads: int
    weights: bool
    inputs: bool


def coupling_layers(weights: bool, inputs: bool, backward: bool = True) -> list[Layer]:
    """The layers of one coupling's conditioner; inputs: whether what comes in needs a gradient."""
    half = WIDTH // 2
    return [Layer(half, 2 * HIDDEN, 1, weights, inputs), Layer(HIDDEN, HIDDEN, 2, weights, backward),
            Layer(HIDDEN, HIDDEN, 2, weights, backward), Layer(HIDDEN, half, 2, weights, backward)]


def layers_of(which: str, n_hidden: int = 3) -> list[Layer]:
    """All layers of a step of G, or of H: through G without gradients, H, and back through G to its input."""
    if which == "G":
        return [layer for k in range(COUPLINGS) for layer in coupling_layers(True, k > 0)]
    there = COUPLINGS * coupling_layers(False, False, backward=False)
    back = COUPLINGS * coupling_layers(False, True)
    return there + [Layer(HIDDEN, HIDDEN, 1, True, k > 0) for k in range(n_hidden + 1)] + back


def flop(layers: list[Layer], n: int) -> int:
    """Floating-point operations of the products, for a batch of n."""
    return sum(2 * n * la.n_in * la.n_out * la.heads * (1 + la.weights + la.inputs) for la in layers)


def bare_products(layers: list[Layer], n: int, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, ...]]:
    """(left, right, out) of every product in the order of a step; weights and results have memory of their own."""
    forward, backward = [], []
    for layer in layers:
        heads = () if layer.heads == 1 else (layer.heads,)

        def new(*shape: int, heads=heads) -> Tensor:
            return torch.rand(*heads, *shape, dtype=dtype, device=device).sub_(0.5)

        h, g, out = new(n, layer.n_in), new(n, layer.n_out), new(n, layer.n_out)
        weight = new(layer.n_in, layer.n_out) if heads else new(layer.n_out, layer.n_in).T  # as they are stored
        forward.append((h, weight, out))
        if layer.weights:  # the gradient lies as the weight does
            left, right = (h.mT, g) if heads else (g.T, h)
            backward.append((left, right, torch.empty_like(weight if heads else weight.T)))
        if layer.inputs:
            backward.append((g, weight.mT, new(n, layer.n_in)))
    return forward + backward[::-1]


def products(layers: list[Layer], n: int, precision: str, device: torch.device) -> Callable[[], None]:
    """A call computes all products of a step."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    triples = bare_products(layers, n, dtype, device)

    def compute() -> None:
        for left, right, out in triples:
            (torch.mm if left.ndim == 2 else torch.bmm)(left, right, out=out)

    return compute


class NoStep(torch.optim.SGD):
    """An optimizer that never steps: of a training step its gradients are left."""

    def step(self, closure=None) -> None:
        pass


def new_network(device: torch.device, n_hidden: int = 3) -> MCFlow:
    """G and H for 784 features; n_hidden: H's hidden layers, 3 in PRFlow, 4 in MCFlow."""
    torch.manual_seed(0)
    network = MCFlow((WIDTH,), torch.arange(WIDTH), COUPLINGS, HIDDEN, HIDDEN, "centre")
    network.latent = LatentNetwork(WIDTH, HIDDEN, n_hidden)
    return network.to(device).train()


def batch_of(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows in [0, 1] and a half of them observed; only the clock looks at them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, WIDTH, generator=generator)
    return x.to(device), (torch.rand(n, WIDTH, generator=generator) < 0.5).to(device)


def stepping(
    which: str, network: MCFlow, n: int, run: TrainingRun, optimizer: str, max_norm: float | None = None
) -> Callable:
    """A call takes a step of G or of H as `train_mcflow` does. optimizer: "adam" or "none"."""
    (x, observed), module = batch_of(n, run.device), network.flow if which == "G" else network.latent
    optimizer = run.adam(module, RATE) if optimizer == "adam" else NoStep(module.parameters(), lr=RATE)
    if which == "G":
        return partial(run.stepper(lambda rows: {"loss": flow_loss(network.flow, rows)}, optimizer, max_norm), x)
    objective = partial(latent_objective, network, likelihood_weight=1.0)
    return partial(run.stepper(objective, optimizer, max_norm), x, x, observed)


def seconds(function: Callable, calls: int) -> float:
    """Seconds a call, of this process."""
    began = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - began) / calls


def take_turns(contestants: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds a call of each, once in every turn; who begins changes. A stretch is a tenth of a second, or one call."""
    for function in contestants.values():
        seconds(function, 2)
    names, times = list(contestants), {name: [] for name in contestants}
    calls = {name: max(1, round(0.1 / seconds(f, 1))) for name, f in contestants.items()}
    for k in range(repeats):
        for name in names[k % len(names):] + names[: k % len(names)]:
            times[name].append(seconds(contestants[name], calls[name]))
    return times


def ratio(above: list[float], below: list[float]) -> dict:
    """Median and quartiles of the ratios within the turns."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    quarter = len(ratios) // 4
    return {"ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(ratios[quarter], 3), round(ratios[-1 - quarter], 3)]}


def milliseconds(times: dict[str, list[float]]) -> dict[str, float]:
    """Median milliseconds of each."""
    return {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()}


def counted_flop(function: Callable) -> int:
    """What PyTorch's own counter sees of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def only_adam(module: torch.nn.Module, run: TrainingRun) -> Callable[[], None]:
    """A call takes Adam's step over all weights, with gradients that are there."""
    adam, weights = run.adam(module, RATE), list(module.parameters())
    gradients = [torch.zeros_like(weight) for weight in weights]  # held here, for the steps drop what the weights hold

    def step() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        adam.step()

    step()  # it sets itself up
    return step


def measure_step(which: str, n: int, precision: str, repeats: int, device: torch.device) -> dict:
    """A step of G or H over its products: the gradients alone, with Adam, with Adam and clipping; and Adam in both."""
    gc.collect()  # networks and runs of the last measurement hold one another
    network, run, layers = new_network(device), TrainingRun(0, device, precision, verbose=False), layers_of(which)
    contestants = {"products": products(layers, n, precision, device),
                   "gradients": stepping(which, network, n, run, "none"),
                   "step": stepping(which, network, n, run, "adam"),
                   "clipped step": stepping(which, network, n, run, "adam", MAX_NORM)}
    done = counted_flop(contestants["gradients"])
    assert done == flop(layers, n), f"the step computes {done:,} operations in products, needed are {flop(layers, n):,}"
    contestants["adam"] = only_adam(network.flow if which == "G" else network.latent, run)
    times = take_turns(contestants, repeats)
    both = [a + b for a, b in zip(times["products"], times["adam"], strict=True)]
    ratios = {name: ratio(times[name], times["products"]) for name in ("gradients", "step", "clipped step")}
    return {"step_of": which, "batch": n, "precision": precision, "gflop": round(flop(layers, n) / 1e9, 3),
            "over_products": ratios, "step_over_products_and_adam": ratio(times["step"], both),
            "ms": milliseconds(times)}


class Together:
    """Two optimizers of which both step when the second is told to: both backward passes then precede both steps."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer):
        self.both = first, second
        self.waiting = types.SimpleNamespace(step=lambda: None, zero_grad=lambda: None)  # stands for the first

    def step(self) -> None:
        for optimizer in self.both:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.both:
            optimizer.zero_grad()


def public_step(folder: Path, n: int, device: torch.device) -> tuple[Callable, int]:
    """A call takes one step of the public code's own training function on one batch; and its number of weights."""
    sys.modules.setdefault("wget", types.ModuleType("wget"))  # it imports this to download data
    sys.path.insert(0, str(folder))
    import models
    import util
    args = argparse.Namespace(use_cuda=device.type == "cuda")
    flow = util.init_flow_model(HIDDEN, COUPLINGS // 2, models.InterpRealNVP, WIDTH, args)
    latent = models.LatentToLatentApprox(WIDTH, 5 * [HIDDEN]).to(device)
    weights = [[w for w in part.parameters() if w.requires_grad] for part in (flow, latent)]
    together = Together(*(torch.optim.Adam(part, lr=1e-4) for part in weights))
    x, observed = batch_of(n, device)
    loader = [(x, [x, (~observed).float()])]
    step = partial(util.endtoend_train, flow, latent, together.waiting, together, loader, args)
    return step, sum(w.numel() for part in weights for w in part)


def our_step(n: int, device: torch.device, precision: str = "float32") -> tuple[Callable, int]:
    """A call takes a step of G and one of H, clipped as `train_mcflow` does; and the number of weights."""
    network, run = new_network(device, n_hidden=4), TrainingRun(0, device, precision, verbose=False)
    steps = [stepping(which, network, n, run, "adam", MAX_NORM) for which in "GH"]

    def step() -> None:
        for one in steps:
            one()

    return step, sum(w.numel() for w in network.parameters())


def measure_public(folder: Path, n: int, repeats: int, device: torch.device) -> dict:
    """The public code's step over ours."""
    (theirs, their_weights), (ours, our_weights) = public_step(folder, n, device), our_step(n, device)
    operations = {"public": counted_flop(theirs), "ours": counted_flop(ours)}
    times = take_turns({"public": theirs, "ours": ours}, repeats)
    return {"batch": n, "precision": "float32", "public_over_ours": ratio(times["public"], times["ours"]),
            "ms": milliseconds(times), "weights": {"public": their_weights, "ours": our_weights},
            "gflop": {name: round(value / 1e9, 3) for name, value in operations.items()}}


def step_named(which: str, n: int, precision: str, device: torch.device, public: Path | None) -> Callable:
    """A call takes a step: of "G", of "H", of both ("ours"), of the "public" code."""
    if which == "public":
        return public_step(public, n, device)[0]
    if which == "ours":
        return our_step(n, device, precision)[0]
    return stepping(which, new_network(device), n, TrainingRun(0, device, precision, verbose=False), "adam", MAX_NORM)


def peak_memory(which: str, n: int, precision: str, device: torch.device, public: Path | None) -> dict:
    """MB that networks, gradients, Adam and a step take at their peak, above what was there before them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
    else:
        torch.rand(256, 256) @ torch.rand(256, 256)  # the library's own memory is there before we look
        before = memory_mb("VmRSS")
    step = step_named(which, n, precision, device, public)
    step()  # Adam sets itself up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()
    for _ in range(5):
        step()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory_mb("VmHWM")
    scale = 2**20 if device.type == "cuda" else 1
    return {"step_of": which, "batch": n, "precision": precision, "mb": round((peak - before) / scale, 1)}


def measure_alone(which: str, n: int, precision: str, repeats: int) -> dict:
    """The clipped step over its products with nothing else in the process, and how many pages a step asks for."""
    device, layers, pages = torch.device("cpu"), layers_of(which), []
    bare = products(layers, n, precision, device)
    step = step_named(which, n, precision, device, None)
    times = {"products": [], "clipped step": []}
    for k in range(repeats + 2):
        pair = seconds(bare, 1), resource.getrusage(resource.RUSAGE_SELF).ru_minflt, seconds(step, 1)
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pair[1])
        if k > 1:  # two warm up
            times["products"].append(pair[0])
            times["clipped step"].append(pair[2])
    return {"step_of": which, "batch": n, "precision": precision,
            "clipped_over_products": ratio(times["clipped step"], times["products"]), "ms": milliseconds(times),
            "page_faults": round(statistics.median(pages[2:]))}


def fresh(what: str, which: str, n: int, precision: str, public: Path | None, repeats: int = 9) -> dict:
    """`peak_memory` or `measure_alone` in a process of its own, where nothing that others did before counts."""
    command = [sys.executable, __file__, f"--{what}", which, str(n), precision, "--repeats", str(repeats)]
    command += ["--public", str(public)] if public else []
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def precisions(device: torch.device) -> list[str]:
    """float32, and bf16 where the processor has units for it."""
    if device.type == "cuda":
        return ["float32"] + ["bf16"] * torch.cuda.is_bf16_supported(including_emulation=False)
    info = Path("/proc/cpuinfo")
    words = info.read_text().split() if info.exists() else []
    return ["float32"] + ["bf16"] * ("amx_bf16" in words or "avx512_bf16" in words)


def say(record: dict) -> dict:
    """Show a record at once."""
    print(record, flush=True)
    return record


def write(entry: dict, device: torch.device, path: Path) -> Path:
    """The file with this device's entry replaced, whole or not at all."""
    facts = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    what = "a training step of MCFlow over its bare matrix products, the public code's step over ours; medians of turns"
    return write_facts(path, facts | {"what": what, device.type: entry})


def about(device: torch.device, public: Path | None) -> dict:
    """What was measured on, and with what."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    stamp = public / "COMMIT" if public else None
    return {"device": name, "clock": "processor seconds of the process",
            "threads": torch.get_num_threads(), "seed": 0, "commit": commit(), "versions": {"torch": version("torch")},
            "width": WIDTH, "hidden": HIDDEN, "couplings": COUPLINGS,
            "public_commit": stamp.read_text().strip() if stamp and stamp.exists() else None}


def read_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--public", type=Path, help="folder of the public code; COMMIT in it names its commit")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULT)
    for part in ("memory", "alone"):
        parser.add_argument(f"--{part}", nargs=3, help=argparse.SUPPRESS)  # for `fresh`
    return parser.parse_args()


def measure_all(device: torch.device, public: Path | None, repeats: int) -> dict:
    """Memory first, then time; on a GPU memory alone, which needs no process of its own there."""
    grid = [(which, n, precision) for precision in precisions(device) for n in (64, 512) for which in "GH"]
    extra = [(which, n, "float32") for n in (64, 512) for which in ("ours", "public")] if public else []
    entry = about(device, public) | {"repeats": repeats}
    if device.type == "cuda":
        return entry | {"memory": [say(peak_memory(*case, device, public)) for case in grid + extra]}
    entry["memory"] = [say(fresh("memory", *case, public)) for case in grid + extra]
    entry["alone"] = [say(fresh("alone", *case, None, repeats)) for case in grid]
    entry["steps"] = [say(measure_step(*case, repeats, device)) for case in grid]
    if public:
        entry["public"] = [say(measure_public(public, n, repeats, device)) for n in (64, 512)]
    return entry


def main() -> None:
    """Everything on one device."""
    args = read_arguments()
    device = torch.device(args.device)
    if args.memory or args.alone:
        which, n, precision = args.memory or args.alone
        print(json.dumps(peak_memory(which, int(n), precision, device, args.public) if args.memory
                         else measure_alone(which, int(n), precision, args.repeats)))
        return
    print("written:", write(measure_all(device, args.public, args.repeats), device, args.out))


if __name__ == "__main__":
    main()
