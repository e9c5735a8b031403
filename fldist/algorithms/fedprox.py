"""FedProx: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, Algorithm 2 and eq. 2.

The local loss is CE + (mu/2) ||y - x||^2 over the trainable parameters; the server averages as FedAvg does.
With mu = 0 it is FedAvg bit for bit.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import Field

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
class FedProx(Algorithm):
    """FedAvg with a pull towards the model that was sent."""

    mu: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01  # mu, weight of the proximal term

    def init_server(self, task: Task) -> State:
        """One model, x."""
        return State(x=task.init_params())

    def round(self, server: Server, clients: Clients) -> None:
        """Send x, train with the proximal term, average."""
        got = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")})
        server.x = got.y

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        """E epochs of local SGD on CE + (mu/2) ||y - x||^2."""
        return Update(data.train(x, proximal=self.mu).params, data.n)
