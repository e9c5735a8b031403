"""The task: data, partition and model, the same at every rank because all of it follows from the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from fldist.data.datasets import Dataset
from fldist.data.partition import Rows
from fldist.models.evaluate import Scores, evaluate
from fldist.models.train import LocalTraining
from fldist.params import Layout, Params, Travel
from fldist.seeding import forked, numpy_generator


class Partition(Protocol):
    """A way to split rows; see `partition.py`."""

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """Labels [n] -> K arrays of row numbers."""


class Task:
    """What is learnt, by how many clients, on which rows.

    seed: the run's seed (initial weights); partition_seed: the partition's own; travel: which part of the
    model's state is exchanged (`all`, `floats`, `params`; what does not travel keeps its initial value).
    """

    def __init__(
        self,
        *,
        dataset: Dataset,
        partition: Partition,
        num_clients: int,
        build: Callable[[tuple[int, ...], int], nn.Module],
        local: LocalTraining,
        seed: int,
        partition_seed: int,
        travel: Travel = "all",
    ) -> None:
        self.dataset = dataset
        self.num_clients = num_clients
        self.local = local
        self.seed = seed
        self.travel: Travel = travel
        self.parts = partition.split(dataset.train_y.numpy(), num_clients, numpy_generator(partition_seed, "partition"))
        self.sizes = [len(p) for p in self.parts]
        self.num_train = sum(self.sizes)
        with forked(seed, "init"):
            self.module = build(dataset.shape, dataset.classes)
        self.layout = Layout.of(self.module)
        self._initial = Params.of(self.module, self.layout)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.dataset.classes

    def init_params(self) -> Params:
        """The initial model (the part that travels), the same wherever it is asked for."""
        return self._initial.restricted(self.travel).clone()

    def full(self, part: Params) -> Params:
        """Fresh blocks of the whole model: `part`, and initial values where it has none."""
        full = self._initial.clone() if part.layout != self.layout else part.clone()
        if part.layout != self.layout:
            full.write(part)
        return full

    def rows(self, client: int) -> tuple[Tensor, Tensor]:
        """A client's training samples x [n, ...] and labels y [n], as fresh tensors."""
        part = self.parts[client]
        return self.dataset.train_x[part], self.dataset.train_y[part]

    def evaluate(self, model: Params) -> Scores:
        """Score a model on the global test set."""
        self.full(model).bind(self.module)
        return evaluate(self.module, self.dataset.test_x, self.dataset.test_y)
