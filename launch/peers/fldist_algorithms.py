"""What fldist runs in the comparison: FedAvg with a count of its steps, and an exchange without training."""

from dataclasses import dataclass
from typing import NamedTuple

from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Mean, collect
from fldist.kinds import Scalar, Weights
from fldist.params import Params


class Update(NamedTuple):
    """One client's reply."""

    y: Weights  # local model after training
    n: Scalar  # training examples held by the client
    steps: Scalar  # local steps made


@dataclass(frozen=True)
class Counted(Algorithm):
    """FedAvg from the model that all programs start from; `steps` of a round are logged."""

    def init_server(self, task: Task) -> State:
        """One model, x."""
        from workload import initial_model  # at the server, whose script lies beside this file

        return State(x=Params.of(initial_model(), task.init_params().layout))

    def round(self, server: Server, clients: Clients) -> None:
        """Send x, train, average."""
        got = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")})
        server.x = got.y
        server.log(steps=sum(got.steps.values()))

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        """Local SGD from x, as configured under `local`."""
        local = data.train(x)
        return Update(local.params, data.n, local.steps)


class Back(NamedTuple):
    """One client's reply."""

    y: Weights  # the model as it came, and 1


@dataclass(frozen=True)
class Exchange(Algorithm):
    """The model goes to every client and comes back with 1 added; the server keeps one, or their mean."""

    average: bool = False

    def init_server(self, task: Task) -> State:
        """One model, x, of zeros."""
        return State(x=task.init_params().zeros_like())

    def round(self, server: Server, clients: Clients) -> None:
        """There and back."""
        everyone = clients.all()
        got = everyone.call(self.add, x=server.x, fold={"y": Mean() if self.average else collect()})
        server.x = got.y if self.average else got.y[everyone.ids[0]]

    @on_client
    def add(self, me: Me, data: ClientData, x: Weights) -> Back:
        """Add 1."""
        return Back(Params(x.layout, x.floats + 1.0))
