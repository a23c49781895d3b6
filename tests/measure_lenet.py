"""Train the LeNet that `fid` and `scc` look with on complete MNIST, and record it; run by hand, it is no test.

    OMP_NUM_THREADS=1 MISSINGBOOK_DATA=… python tests/measure_lenet.py [--epochs 20] [--seed 0] [--out FOLDER]

Writes missingbook/_data/lenet_mnist.safetensors and results/lenet.json (or both into FOLDER). One thread of one
processor gives the same bytes again; another processor may differ in the last digits, and so in the hash. Then the hash
in nbs/01_foundations/06_metrics.ipynb has to follow, and every FID in results/ has to be measured again.
"""

import argparse
import hashlib
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save

from missingbook.foundations.data import load
from missingbook.foundations.metrics import LeNet, accuracy, fid, train_classifier, unit_features

ROOT = Path(__file__).resolve().parents[1]
BATCH, LR, DROPOUT = 128, 4e-3, 0.25


def train(seed: int, epochs: int) -> tuple[LeNet, list[float], float]:
    """The network, its mean loss in every epoch, and the seconds it took."""
    data, generator = load("mnist", split="train"), torch.Generator().manual_seed(seed)
    network = LeNet(dropout=DROPOUT, generator=generator)
    began = time.perf_counter()
    losses = train_classifier(network, data.x, data.y, epochs=epochs, batch_size=BATCH, lr=LR, generator=generator)
    return unit_features(network, data.x), losses, time.perf_counter() - began


def facts(network: LeNet, content: bytes) -> dict:
    """What the network reaches on the test digits, and its own zero: the FID of true digits against true digits."""
    train_set, test_set = load("mnist", split="train"), load("mnist", split="test")
    first = train_set.x[: len(test_set.x)]
    return {
        "test_accuracy": accuracy(network, test_set.x, test_set.y),
        "train_accuracy": accuracy(network, train_set.x, train_set.y),
        "train_pictures": len(train_set.x), "test_pictures": len(test_set.x),
        "fid_test_against_train": {"value": round(fid(test_set.x, first, network), 5), "test": len(test_set.x),
                                   "train": len(first), "which": "the first training digits"},
        "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
    }


def write(path: Path, content: bytes) -> None:
    """The file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_bytes(content)
    os.replace(draft, path)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write both files here instead, to try something")
    asked = parser.parse_args()
    network, losses, seconds = train(asked.seed, asked.epochs)
    content = save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    record = {
        "what": "LeNet trained on complete MNIST, the feature network of fid and the classifier of scc",
        "command": "python tests/measure_lenet.py", "file": "missingbook/_data/lenet_mnist.safetensors",
        "seed": asked.seed, "epochs": asked.epochs, "batch_size": BATCH, "lr": LR, "dropout": DROPOUT,
        "optimizer": "Adam, one-cycle step size", "augmentation": "none", "dtype": "float32",
        "features": "50, average variance 1 over the training digits",
        **facts(network, content),
        "losses": [round(loss, 5) for loss in losses],
        "device": "cpu", "threads": torch.get_num_threads(), "processor": platform.machine(),
        "seconds": round(seconds, 1),
        "versions": {p: version(p) for p in ("torch", "numpy", "safetensors")},
    }
    write((asked.out or ROOT / "missingbook" / "_data") / "lenet_mnist.safetensors", content)
    write((asked.out or ROOT / "results") / "lenet.json", (json.dumps(record, indent=1) + "\n").encode())
    print(f"test accuracy {record['test_accuracy']:.4f}, {record['seconds']} s; put this hash into the chapter:")
    print(record["sha256"])


if __name__ == "__main__":
    main()
