"""Steps that a GPU records could be recorded: tested without one, on tensors that hold nothing and say they lie there.

A recording allows no wait (a number that is asked for) and no copy from the processor's memory (an index in a list).
"""

import types

import pytest
import torch
from test_contract import CASES, data
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from missingbook.foundations import imputer, training

RECORDED = ("mcflow", "prflow", "vaeac", "gsnn", "marginalizer", "missing glow")
GPU = "cuda"


def options(name, **own):
    """Table and pictures with other settings than the battery's."""
    chosen = [case for case in CASES if case.id.endswith(name)]
    return [pytest.param(*case.values, own, id=f"{case.id}, {', '.join(own)}") for case in chosen]


STEPS = [pytest.param(*case.values, {}, id=case.id) for case in CASES if case.id.split("-")[1] in RECORDED]
STEPS += options("marginalizer", weighting="chain") + options("vaeac", sigma=1.0) + options("vaeac", warm_up=2)
STEPS += options("mcflow", hide=0.3) + options("missing glow", coupling="additive")


class Copies(TorchDispatchMode):
    """Names of the operations that take numbers from the processor's memory to the GPU, or back; both wait.

    A single number of the processor's among the arguments of an operation is passed with its call, and no copy."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), result))
        homes, ends = ({t.device.type for t in part} for part in (given, made))
        wide = any(t.device.type == "cpu" and t.ndim for t in given)
        there = GPU in ends and "cpu" in homes and (wide or GPU not in homes)
        if there or (GPU in homes and "cpu" in ends):
            self.found.append(str(function))
        return result


def modules_in(function):
    """The modules in a function's closure, in containers and bound methods there too."""
    waiting, found = [cell.cell_contents for cell in function.__closure__ or ()], []
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, nn.Module):
            found.append(thing)
        elif isinstance(thing, dict | list | tuple):
            waiting += tree_leaves(thing)
        elif isinstance(thing, types.FunctionType):
            waiting += [cell.cell_contents for cell in thing.__closure__ or ()]
    return found


def copies_of(values_of, batch):
    """Copies of a step's second turn on a pretended GPU, the backward pass left out; what is prepared once is free."""
    values_of(*batch)  # for real: what starts from the first batch has started
    mode, made = FakeTensorMode(), {}

    def moved(tensor):
        if id(tensor) not in made:
            fake = mode.from_tensor(tensor.detach())
            with mode:
                fake = fake.to(GPU)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            made[id(tensor)] = tensor, fake  # the first is kept, lest another gets its id
        return made[id(tensor)][1]

    modules = [m for module in modules_in(values_of) for m in module.modules()]
    stores = [store for m in modules for store in (m._parameters, m._buffers)]
    real = [dict(store) for store in stores]
    for store in stores:
        store.update({name: moved(t) for name, t in store.items() if t is not None})
    batch = [moved(t) for t in batch]
    with mode:
        values_of(*batch)
        with Copies() as copies:
            assert values_of(*batch)["loss"].device.type == GPU
    for store, content in zip(stores, real, strict=True):
        store.update(content)
    return copies.found


class Seen(Exception):
    """Every kind of step was looked at: enough."""


def copies_in(kind, make, own):
    """What the steps of a fit would copy, each stepper looked at once."""
    found, steppers = [], []

    def look(stepper, *batch):
        if stepper in steppers:
            raise Seen
        steppers.append(stepper)
        imputer.column_index.cache_clear()
        found.extend(copies_of(stepper.values_of, batch))
        imputer.column_index.cache_clear()  # what it holds is pretended
        return stepper._ordinary(*batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Seen):
        patch.setattr(training.Stepper, "__call__", look)
        make(device="cpu", **own).fit(data(kind))
    return found


@pytest.mark.parametrize("kind, make, own", STEPS)
def test_steps_can_be_recorded(kind, make, own):
    assert copies_in(kind, make, own) == []


def test_everyone_who_takes_recorded_steps_is_here():
    "But MisGAN, whose penalty needs gradients of gradients: they cannot be pretended."
    asked = []

    def note(stepper, *batch):
        raise Seen

    for case in CASES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.Stepper, "__call__", note)
            try:
                case.values[1](device="cpu").fit(data(case.values[0]))
            except Seen:
                asked.append(case.id)
    assert sorted(asked) == sorted([case.id for case in STEPS if "," not in case.id] + ["images-misgan"])


def column_list(columns, device):
    return list(columns)


column_list.cache_clear = lambda: None


def test_a_list_as_an_index_is_found(monkeypatch):
    "Mutation: columns picked by a list, which is copied to the GPU at every use."
    (vaeac,) = (case.values for case in STEPS if case.id == "table-vaeac")
    monkeypatch.setattr(imputer, "column_index", column_list)
    assert copies_in(*vaeac)


@pytest.mark.parametrize("step", [
    lambda x, layer: layer(x).sum() * torch.tensor(2.0, device=x.device),
    lambda x, layer: layer(x).sum() * torch.tensor(2.0).to(x.device),
    lambda x, layer: layer(x).sum() + 0 * layer(x).detach().cpu().sum().item(),
    lambda x, layer: layer(x).sum() * torch.ones(3).to(x.device).sum(),
    lambda x, layer: layer(x).sum() * float(x.max() > 2),
    lambda x, layer: layer(x)[x[:, 0] > 0].sum()])
def test_copies_and_waits_are_found(step):
    "Mutations: numbers that are copied to the GPU or back in every step, or asked for, which is waiting for it."
    layer = nn.Linear(3, 3)
    assert copies_of(lambda x: {"loss": layer(x).sum() * 2.0}, [torch.ones(4, 3)]) == []
    try:
        assert copies_of(lambda x: {"loss": step(x, layer)}, [torch.ones(4, 3)])
    except (DataDependentOutputException, DynamicOutputShapeException):
        pass
