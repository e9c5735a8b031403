"""FedAvg: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, Algorithm 1. Every entry of the model's state is averaged with weights n_k: parameters and
float buffers as real numbers, integer counters as `aggregation.integers` says.
"""

from dataclasses import dataclass
from typing import NamedTuple

from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Mean
from fldist.kinds import Scalar, Weights


class Update(NamedTuple):
    """One client's reply."""

    y: Weights  # local model after training
    n: Scalar  # training examples held by the client


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """x <- sum_k n_k y_k / sum_k n_k over the clients that replied."""

    def init_server(self, task: Task) -> State:
        """One model, x."""
        return State(x=task.init_params())

    def round(self, server: Server, clients: Clients) -> None:
        """Send x, train, average."""
        got = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")})
        server.x = got.y

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        """E epochs of local SGD from x, as configured under `local`."""
        return Update(data.train(x).params, data.n)
