"""The comparison's work in Flower's simulation engine: on Ray, with as many actors as others have client processes."""

from __future__ import annotations

import argparse
import random
import time

import flower_clients
import flwr
import numpy as np
import ray
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from workload import (
    CLIENTS,
    NUMEL,
    PER_ROUND,
    RECEIVERS,
    TRAINERS,
    Rounds,
    accuracy,
    arguments,
    check_exchanged,
    initial_model,
)

VERSIONS = {
    "flwr": flwr.__version__,
    "ray": ray.__version__,
    "torch": torch.__version__,
    "numpy": np.__version__,
}


def training(given: argparse.Namespace) -> ServerApp:
    """FedAvg as Flower's strategy has it, without evaluation."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        rounds = Rounds()

        def mark(number: int, arrays: ArrayRecord) -> None:
            """Flower calls it before round 1 and when a round is done: its place for evaluating at the server."""
            if number:
                rounds.end()
            else:
                rounds.begin()

        def add_up(replies: list[RecordDict], weight: str) -> MetricRecord:
            return MetricRecord({"steps": sum(reply["metrics"]["steps"] for reply in replies)})

        wait_for_nodes(grid, CLIENTS)
        random.seed(0)
        model = initial_model()
        strategy = FedAvg(
            fraction_train=PER_ROUND / CLIENTS,
            fraction_evaluate=0.0,
            min_train_nodes=PER_ROUND,
            min_available_nodes=CLIENTS,
            train_metrics_aggr_fn=add_up,
        )
        result = strategy.start(
            grid,
            ArrayRecord(model.state_dict()),
            given.rounds,
            train_config=ConfigRecord({"epochs": given.epochs}),
            evaluate_fn=mark,
        )
        model.load_state_dict(result.arrays.to_torch_state_dict())
        steps = sum(metrics["steps"] for metrics in result.train_metrics_clientapp.values())
        rounds.write(given.out, VERSIONS, steps=steps, accuracy=accuracy(model))

    return app


def exchange(given: argparse.Namespace) -> ServerApp:
    """One array to all clients and back; averaged, where asked for, by Flower's FedAvg."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = wait_for_nodes(grid, RECEIVERS)
        strategy = FedAvg()
        arrays = ArrayRecord([np.zeros(NUMEL, np.float32)])
        rounds = Rounds()
        rounds.begin()
        for number in range(1, given.rounds + 1):
            content = RecordDict({"arrays": arrays})
            sent = [Message(content, dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes]
            replies = list(grid.send_and_receive(sent))
            if len(replies) != RECEIVERS or any(reply.has_error() for reply in replies):
                raise RuntimeError(f"round {number}: {len(replies)} replies, of which some are errors: {replies}")
            arrays = replies[0].content["arrays"]
            if given.work == "average":
                arrays, _ = strategy.aggregate_train(number, replies)
            rounds.end()
        check_exchanged(arrays.to_numpy_ndarrays()[0], given.rounds)
        rounds.write(given.out, VERSIONS)

    return app


def wait_for_nodes(grid: Grid, count: int) -> list[int]:
    """The nodes' numbers, when all of them have been registered."""
    while len(nodes := list(grid.get_node_ids())) < count:
        time.sleep(0.1)
    return nodes


def main() -> None:
    """Run and write the figures."""
    given = arguments(__doc__ or "").parse_args()
    train = given.work == "workload"
    run_simulation(
        server_app=training(given) if train else exchange(given),
        client_app=flower_clients.training if train else flower_clients.exchange,
        num_supernodes=CLIENTS if train else RECEIVERS,
        backend_config={
            "init_args": {"num_cpus": TRAINERS if train else RECEIVERS},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main()
