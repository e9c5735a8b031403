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

    def check(self, task: Task) -> None:
        """Refuse data that differ by client in more than who holds them."""
        if any(task.noise_of(client) for client in range(task.num_clients)):
            raise ValueError(
                "algorithm: centralised has no common data under task.partition feature_noise; use another"
            )

    def init_server(self, task: Task) -> State:
        """One model, x."""
        return State(x=task.init_params(whole=True))

    def round(self, server: Server, clients: Clients) -> None:
        """E epochs of SGD on everything."""
        server.x = server.data.train(server.x).params
