"""Local training: every client alone, from the initial model and on its own samples; no model ever travels.

The baseline that says what the federation is worth. A client's model is its state, and stays where it is; the server
only says whose turn it is. With `clients.init: own` every client begins with weights of its own.
"""

from dataclasses import dataclass
from typing import ClassVar

from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.params import Params


@dataclass(frozen=True)
class Local(Algorithm):
    """The selected clients train on; nobody learns of it."""

    heterogeneous: ClassVar[bool] = True
    has_global_model: ClassVar[bool] = False

    def init_server(self, task: Task) -> State:
        """Nothing."""
        return State()

    def init_client(self, task: Task, client: int) -> State:
        """The client's model y."""
        return State(y=task.init_params(client, whole=True))

    def round(self, server: Server, clients: Clients) -> None:
        """Let the selected clients train."""
        clients.selected().call(self.update)

    @on_client
    def update(self, me: Me, data: ClientData) -> None:
        """E epochs of local SGD from where the client stood."""
        me.y = data.train(me.y).params

    def personal_model(self, me: Me, data: ClientData) -> Params:
        """The client's model."""
        y: Params = me.y
        return y
