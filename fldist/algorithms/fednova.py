"""FedNova: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
NeurIPS 2020, eqs. 3 to 7, for local SGD with momentum rho.

    a_i = (tau_i - rho (1 - rho^tau_i) / (1 - rho)) / (1 - rho)     `normaliser`; tau_i: the client's steps
    d_i = (x - y_i) / a_i                                           the client's mean direction
    x  <- x - a_eff sum_i p_i d_i,   a_eff = sum_i p_i a_i          p_i = n_i / sum_j n_j, n_i samples

A client sends x - s d_i in place of its model, so that the mean by samples gives x - s sum_i p_i d_i for the parameters
and the ordinary average for the buffers, and a_i is all that travels beside FedAvg's. s is a number that both ends
know, the normaliser of the mean client's steps (`common_scale`): without it d_i, which is a_i times smaller than a
model's change, would lose digits in float32. With equal a_i it is FedAvg. The published code takes the number of
mini-batches for n_i (`weights: batches`) and normalises BatchNorm's buffers too, which is not done.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Mean
from fldist.kinds import Scalar, Weights
from fldist.params import Params


class Update(NamedTuple):
    """One client's reply."""

    y: Weights  # parameters x - s d_i, buffers of the local model
    a: Scalar  # a_i
    n: Scalar  # training examples held by the client, or mini-batches of an epoch


def normaliser(tau: int, rho: float) -> float:
    """a_i of tau steps with momentum rho: sum over the steps s of (1 - rho^(tau - s)) / (1 - rho); tau if rho is 0."""
    return (tau - rho * (1.0 - rho**tau) / (1.0 - rho)) / (1.0 - rho)


def direction(x: Params, y: Params, a: float, s: float = 1.0) -> Params:
    """s d_i = (x - y_i) s / a_i; 0 when no step was made."""
    return (x - y) * (s / a) if a else x.zeros_like()


def common_scale(task: Task) -> float:
    """s: the normaliser of the mean number of steps of a client that has samples."""
    local = task.local
    steps = [local.epochs * math.ceil(n / local.batch_size) for n in task.sizes if n]
    return normaliser(max(1, round(sum(steps) / max(1, len(steps)))), local.momentum)


@dataclass(frozen=True)
class FedNova(Algorithm):
    """FedAvg whose clients' changes are normalised by the steps they took."""

    weights: Literal["samples", "batches"] = (
        "samples"  # n_i; batches: an epoch's mini-batches, as in the published code
    )

    def check(self, task: Task) -> None:
        """Refuse optimizers that a_i does not describe."""
        if task.local.optimizer != "sgd" or task.local.schedule != "constant":
            raise ValueError(
                f"algorithm: fednova is for SGD with a constant lr in a round; local has optimizer "
                f"{task.local.optimizer}, schedule {task.local.schedule}"
            )

    def init_server(self, task: Task) -> State:
        """One model, x."""
        return State(x=task.init_params())

    def round(self, server: Server, clients: Clients) -> None:
        """Average the normalised models; stretch the mean direction by a_eff."""
        got = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")})
        total = sum(got.n.values())
        a_eff = sum(got.n[k] / total * got.a[k] for k in got.clients)
        x = got.y  # buffers are averaged already
        before = server.x.trainable
        x.write(before - (a_eff / common_scale(server.task)) * (before - got.y.trainable))
        server.x = x

    def local_model(self, task: Task, x: Params, reply: Any) -> Params:
        """y_i = x - d_i a_i of the x - s d_i that was sent; the buffers are the local model's already."""
        y: Params = reply.y.clone()
        y.write(x.trainable - (x.trainable - y.trainable) * (reply.a / common_scale(task)))
        return y

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        """E epochs of local SGD; the model is sent as x - s d_i."""
        local = data.train(x)
        a = normaliser(local.steps, data.task.local.momentum)
        y = local.params
        y.write(x.trainable - direction(x.trainable, y.trainable, a, common_scale(data.task)))
        n = data.n if self.weights == "samples" else math.ceil(data.n / data.task.local.batch_size)
        return Update(y, a, n)
