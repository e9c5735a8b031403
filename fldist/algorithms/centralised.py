"""Centralised training: one model on all clients' samples together, at the server.

The baseline that no federation can have, since the samples would have to leave the clients: nothing travels and
nothing is counted. A round is `local.epochs` epochs over all training samples.
"""

from dataclasses import dataclass

from fldist.algorithm import Algorithm, Clients, Server, State
from fldist.data.task import Task


@dataclass(frozen=True)
class Centralised(Algorithm):
    """Plain training on the pooled samples."""

    def init_server(self, task: Task) -> State:
        """One model, x."""
        return State(x=task.init_params())

    def round(self, server: Server, clients: Clients) -> None:
        """E epochs of SGD on everything."""
        server.x = server.data.train(server.x).params
