"""The work that every program of the comparison does, and how each tells what it took. Needs torch and numpy alone.

`workload`: FedAvg on MNIST with LeNet-5, 100 clients with 600 samples each, 10 a round, batches of 32, SGD with a rate
of 0.01, no evaluation while it is timed. `exchange`: a model of the size of a ResNet-18 goes to three clients, each
adds 1, and what comes back is kept as it is; `average`: the same, and the server takes the mean of it.

This module is imported, never run: what is kept here lives as long as the process, also in processes that unpickle
the code of a script (see `flower_clients.py`).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WORKS = ("workload", "exchange", "average")
CLIENTS = 100
PER_ROUND = 10
SAMPLES = 600
BATCH = 32
LR = 0.01
MEAN, STD = 0.1307, 0.3081
"""Of MNIST's training pixels, scaled to 0..1."""
STEPS = math.ceil(SAMPLES / BATCH)
"""Local steps of a client in a round, for each epoch."""
TRAINERS = 2
"""Processes that train, beside the server's."""
RECEIVERS = 3
"""Clients, with a process each, of `exchange` and `average`."""
NUMEL = 11_173_962
"""Floats that travel in `exchange` and `average`, each way."""

torch.set_num_threads(1)


# ---- data
def read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of bytes; ValueError when it is missing or something else."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"FLDIST_DATA: {path} cannot be read ({error.strerror}); name the folder that has MNIST/raw"
        ) from None
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"FLDIST_DATA: {path} is no IDX file of bytes; get MNIST anew")
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


@functools.cache
def mnist(split: str) -> tuple[Tensor, Tensor]:
    """x [n, 1, 28, 28] float32, normalised, and y [n] int64 of `train` (60,000) or `t10k` (10,000)."""
    if "FLDIST_DATA" not in os.environ:
        raise ValueError("FLDIST_DATA: it is not set; set it to the folder that has MNIST/raw")
    folder = Path(os.environ["FLDIST_DATA"], "MNIST", "raw")
    x = torch.from_numpy(read_idx(folder / f"{split}-images-idx3-ubyte").astype(np.float32) / 255.0)
    x = (x - MEAN) / STD
    y = torch.from_numpy(read_idx(folder / f"{split}-labels-idx1-ubyte").astype(np.int64))
    return x.unsqueeze(1), y


@functools.cache
def partition() -> list[NDArray[np.int64]]:
    """Every client's rows: a random permutation in equal parts."""
    order = np.random.default_rng(0).permutation(CLIENTS * SAMPLES)
    return [np.sort(part) for part in np.array_split(order, CLIENTS)]


@functools.cache
def samples(client: int) -> tuple[Tensor, Tensor]:
    """x and y of a client's training samples."""
    x, y = mnist("train")
    rows = torch.from_numpy(partition()[client])
    return x[rows], y[rows]


# ---- model and training
def lenet5() -> nn.Sequential:
    """LeNet-5 with ReLU and max-pool, 61,706 parameters; layers and their names are those of fldist's `lenet5`."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 120, 5), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def initial_model() -> nn.Sequential:
    """The model that every program starts from."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lenet5()


def batches(client: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of a client: its samples in a new order, `STEPS` batches."""
    x, y = samples(client)
    for rows in torch.randperm(len(y)).split(BATCH):
        yield x[rows], y[rows]


def train(model: nn.Module, client: int, epochs: int) -> int:
    """Train in place on a client's samples; returns the steps that were made."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    steps = 0
    model.train()
    for _ in range(epochs):
        for x, y in batches(client):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            steps += 1
    return steps


def accuracy(model: nn.Module) -> float:
    """The part of the 10,000 test samples that a model classifies correctly."""
    x, y = mnist("t10k")
    model.eval()
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
    return right / len(y)


def check_exchanged(values: Any, rounds: int) -> None:
    """Refuse what was exchanged unless all of it came back from every round with 1 added; it began as zeros."""
    values = np.asarray(values)
    if values.size != NUMEL or not np.allclose(values, rounds, rtol=1e-5):
        low, high = float(values.min()), float(values.max())
        raise ValueError(
            f"exchange: {values.size:,} values from {low} to {high} came back; they must be {NUMEL:,} and {rounds}"
        )


# ---- what is told
class Rounds:
    """When rounds ended at the server, and what memory its process took meanwhile."""

    def __init__(self) -> None:
        self._marks: list[float] = []
        self._before = 0
        self._peak = 0

    def begin(self) -> None:
        """All is there for the first round."""
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is from here on
        self._before = memory_bytes("VmRSS")
        self._marks = [time.perf_counter()]

    def end(self) -> None:
        """A round is done."""
        self._marks.append(time.perf_counter())
        self._peak = memory_bytes("VmHWM")

    def write(self, path: Path, versions: dict[str, str], **facts: float) -> None:
        """Write the figures as JSON: `seconds` of every round, bytes of memory, versions, and further facts."""
        seconds = [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]
        told = {"seconds": seconds, "before_bytes": self._before, "peak_bytes": self._peak, "versions": versions}
        path.write_text(json.dumps(told | facts), encoding="utf-8")


def memory_bytes(field: str) -> int:
    """`VmRSS` (in memory now) or `VmHWM` (the most so far) of this process, from Linux's /proc."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that all programs take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=1, help="of local training, in `workload`")
    parser.add_argument("--out", type=Path, required=True, help="file for the figures, JSON")
    return parser
