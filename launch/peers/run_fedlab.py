"""The comparison's work in FedLab over torch.distributed (gloo): a server and client processes on this machine."""

from __future__ import annotations

import fedlab_first  # noqa: F401

# isort: split

import argparse
import logging
import multiprocessing
import random
import socket
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import workload
from fedlab.contrib.algorithm.basic_client import SGDClientTrainer, SGDSerialClientTrainer
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.core.client.manager import PassiveClientManager
from fedlab.core.network import DistNetwork
from fedlab.core.server.manager import SynchronousServerManager
from fedlab.utils.aggregator import Aggregators
from torch import Tensor

VERSIONS = {"fedlab": version("fedlab"), "torch": torch.__version__, "numpy": np.__version__}
END_S = 20.0

logging.disable(logging.CRITICAL)  # FedLab logs every message to stdout


# ---- processes of clients
class Loader:
    """One client's batches, an epoch each time it is gone through; `steps` counts them."""

    def __init__(self, client: int) -> None:
        self.client = client
        self.steps = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in workload.batches(self.client):
            self.steps += 1
            yield batch


class Loaders:
    """What FedLab's trainer asks for batches."""

    def get_dataloader(self, client: int, batch_size: int) -> Loader:
        """A client's batches, which are of one size in this work."""
        assert batch_size == workload.BATCH
        return Loader(client)


class Trainer(SGDSerialClientTrainer):
    """FedLab's own training of a process's clients, one after the other; a reply has the steps beside the model."""

    def train(self, model_parameters: Tensor, train_loader: Loader) -> list[Tensor]:
        """The trained model, flat, and the number of steps."""
        (trained,) = super().train(model_parameters, train_loader)
        return [trained, torch.tensor([float(train_loader.steps)])]


class Adder(SGDClientTrainer):
    """A client that adds 1 to what it is sent."""

    @property
    def uplink_package(self) -> list[Tensor]:
        """The reply."""
        return [self.reply]

    def local_process(self, payload: list[Tensor], id: int) -> None:
        """Add 1."""
        self.reply = payload[0] + 1


def client(work: str, rank: int, port: int, epochs: int) -> None:
    """Be a process of clients until the server ends it."""
    if work == "workload":
        trainer = Trainer(workload.lenet5(), workload.CLIENTS // workload.TRAINERS)
        trainer.setup_dataset(Loaders())
        trainer.setup_optim(epochs, workload.BATCH, workload.LR)
    else:
        trainer = Adder(torch.nn.Identity())
    PassiveClientManager(network(work, rank, port), trainer).run()


# ---- the server
class Averaging(SyncServerHandler):
    """FedLab's FedAvg, with marks at the ends of rounds and a sum of the steps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rounds = workload.Rounds()
        self.steps = 0

    def global_update(self, buffer: list[list[Tensor]]) -> None:
        """The mean of the clients' models."""
        super().global_update(buffer)
        self.steps += int(sum(reply[1].item() for reply in buffer))
        self.rounds.end()


class Exchanging(SyncServerHandler):
    """Sends one tensor, and keeps one of those that come back, or their mean."""

    def __init__(self, average: bool, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rounds = workload.Rounds()
        self.average = average
        self.values = torch.zeros(workload.NUMEL)

    @property
    def downlink_package(self) -> list[Tensor]:
        """What clients are sent; FedLab's own would put it together of a model's layers."""
        return [self.values]

    def global_update(self, buffer: list[list[Tensor]]) -> None:
        """The first reply, or FedLab's mean of all."""
        replies = [reply[0] for reply in buffer]
        self.values = Aggregators.fedavg_aggregate(replies) if self.average else replies[0]
        self.rounds.end()


class Manager(SynchronousServerManager):
    """FedLab's own; all clients have joined when its loop begins."""

    def main_loop(self) -> None:
        """Rounds until the handler has done all."""
        self._handler.rounds.begin()
        super().main_loop()


def server(given: argparse.Namespace, port: int) -> None:
    """Be the server and write the figures."""
    random.seed(0)
    if given.work == "workload":
        ratio = workload.PER_ROUND / workload.CLIENTS
        handler = Averaging(workload.initial_model(), given.rounds, ratio)
    else:
        handler = Exchanging(given.work == "average", torch.nn.Identity(), given.rounds, 1.0)
    Manager(network(given.work, 0, port), handler, mode="GLOBAL").run()
    if given.work == "workload":
        facts = {"steps": handler.steps, "accuracy": workload.accuracy(handler.model)}
        handler.rounds.write(given.out, VERSIONS, **facts)
    else:
        workload.check_exchanged(handler.values, given.rounds)
        handler.rounds.write(given.out, VERSIONS)


# ---- all of them
def others(work: str) -> int:
    """Processes beside the server's."""
    return workload.TRAINERS if work == "workload" else workload.RECEIVERS


def network(work: str, rank: int, port: int) -> DistNetwork:
    """FedLab's network of all processes of a work; rank 0 is the server."""
    return DistNetwork(("127.0.0.1", port), 1 + others(work), rank)


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def main() -> None:
    """Start the clients' processes and be the server."""
    given = workload.arguments(__doc__ or "").parse_args()
    port = free_port()
    context = multiprocessing.get_context("spawn")
    clients = [
        context.Process(target=client, args=(given.work, rank, port, given.epochs), daemon=True)
        for rank in range(1, 1 + others(given.work))
    ]
    for process in clients:
        process.start()
    server(given, port)
    for process in clients:
        process.join(END_S)
        if process.exitcode != 0:
            raise RuntimeError(f"a process of clients ended with {process.exitcode}")


if __name__ == "__main__":
    main()
