"""Steps that a GPU records could be recorded: tested without one, on tensors that hold nothing and say they lie there.

A recording allows no wait (a number that is asked for) and no copy from the processor's memory (an index in a list).
"""

import itertools
import types

import pytest
import torch
from test_contract import CASES, data
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from missingbook.foundations import imputer, training

RECORDED = ("mcflow", "prflow", "vaeac", "gsnn", "marginalizer", "missing glow")
STEPS = [case for case in CASES if any(case.id.endswith(name) for name in RECORDED)]
GPU = "cuda"


class Copies(TorchDispatchMode):
    """Names of the operations that take something of more than one number from the processor's memory to the GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), result))
        if any(t.device.type == "cpu" and t.ndim for t in given) and any(t.device.type == GPU for t in (*given, *made)):
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

    for module in itertools.chain(*(m.modules() for m in modules_in(values_of))):
        for store in (module._parameters, module._buffers):
            store.update({name: moved(t) for name, t in store.items() if t is not None})
    batch = [moved(t) for t in batch]
    with mode:
        values_of(*batch)
        with Copies() as copies:
            assert values_of(*batch)["loss"].device.type == GPU
    return copies.found


class Seen(Exception):
    """The first step was looked at: enough."""


def first_step(kind, make):
    """What the first step of a fit would copy."""
    found = []

    def look(stepper, *batch):
        imputer.column_index.cache_clear()
        found.extend(copies_of(stepper.values_of, batch))
        raise Seen

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Seen):
        patch.setattr(training.Stepper, "__call__", look)
        make(device="cpu").fit(data(kind))
    imputer.column_index.cache_clear()  # what it holds is pretended
    return found


@pytest.mark.parametrize("kind, make", STEPS)
def test_steps_can_be_recorded(kind, make):
    assert first_step(kind, make) == []


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
    assert sorted(asked) == sorted([case.id for case in STEPS] + ["images-misgan"])


def column_list(columns, device):
    return list(columns)


column_list.cache_clear = lambda: None


def test_a_list_as_an_index_is_found(monkeypatch):
    "Mutation: columns picked by a list, which is copied to the GPU at every use."
    (vaeac,) = (case.values for case in STEPS if case.id == "table-vaeac")
    monkeypatch.setattr(imputer, "column_index", column_list)
    assert first_step(*vaeac)


def test_a_number_that_is_asked_for_is_found():
    "Mutation: a step that looks at a value, for which a GPU has to be waited for."
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    assert copies_of(lambda x: {"loss": one(x).sum()}, [torch.ones(4, 3)]) == []
    with pytest.raises(DataDependentOutputException):
        copies_of(lambda x: {"loss": other(x).sum() * float(x.max() > 2)}, [torch.ones(4, 3)])
