"Shapes in signatures are enforced over the whole suite; the development data are found where they lie."

import inspect
import os
import re
import sys
import types
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parent.parent
_DATA = ROOT.parent / "shared" / "data"
os.environ["MISSINGBOOK_OFFLINE"] = "1"  # no test downloads anything
if "MISSINGBOOK_DATA" not in os.environ and _DATA.is_dir():
    os.environ["MISSINGBOOK_DATA"] = str(_DATA)

# every module but those of practice, whose functions are pickled into worker processes
_wings = ["missingbook.foundations", "missingbook.gaussian", "missingbook.flows", "missingbook.gans",
          "missingbook.vaes"]
_hook = install_import_hook(_wings, "beartype.beartype")


def seed(number=0):
    "A generator for torch, seeded."
    return torch.Generator().manual_seed(number)


def refuses(call, kind, words):
    "`call` raises `kind` with these words, or is stopped before it gets there, where shapes are enforced."
    with pytest.raises((kind, jaxtyping.TypeCheckError)) as caught:
        call()
    if not isinstance(caught.value, jaxtyping.TypeCheckError):
        assert re.search(words, str(caught.value)), caught.value


def copy_of(module, *edits):
    "The module without the shape hook; each edit is (before, after), and `before` stands there exactly once."
    source = Path(inspect.getsourcefile(module)).read_text(encoding="utf-8")
    for before, after in edits:
        if source.count(before) != 1:  # no AssertionError: that is what a mutant is expected to raise
            raise ValueError(f"this does not stand once in {module.__name__}: {before}")
        source = source.replace(before, after)
    copy = types.ModuleType(f"{module.__name__}_copy")
    copy.__package__ = module.__package__
    sys.modules[copy.__name__] = copy  # dataclasses look their module up
    exec(compile(source, copy.__name__, "exec"), vars(copy))
    return copy


_HELD = set()


def mutant_fails(module, check, *edits):
    "The check holds for the module, where it is run once, and fails for a copy with these edits."
    if (module, check) not in _HELD:
        check(module)
        _HELD.add((module, check))
    mutant = copy_of(module, *edits)
    with pytest.raises(AssertionError):
        check(mutant)


class Interruptible:
    "Stands before an imputer: Ctrl-C before epoch `stop`; every epoch stores a state; `begun`: the epochs run."

    stop = None

    def _train(self, network, x, observed, run):
        run.checkpoint_seconds, run._mark_steps = 0, 1
        honest, self.begun = run.epochs, []

        def epochs(n):
            for epoch in honest(n):
                if epoch == self.stop:
                    raise KeyboardInterrupt
                self.begun.append(epoch)
                yield epoch

        run.epochs = epochs
        super()._train(network, x, observed, run)


@pytest.fixture(scope="session")
def root() -> Path:
    "The project's root."
    return ROOT


def pytest_collection_modifyitems(items):
    "Long chapters first, so that no worker ends alone with one of them; every test has a time limit."
    items.sort(key=lambda item: "test_chapter" not in item.nodeid)
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300))


def with_holes(x, rate=0.3, number=0):
    """x, an array, with NaN in a random share of its cells."""
    return np.where(np.random.default_rng(number).random(x.shape) < rate, np.nan, x)
