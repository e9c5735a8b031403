"""SCAFFOLD: Karimireddy et al., ICML 2020, Algorithm 1 with option II for the control variates, in the form
that keeps momentum: after every ordinary SGD step (momentum and weight decay included) y <- y - eta (c - c_i),
outside the momentum buffer. Global step size 1.

    c_i+ = c_i - c + (x - y) / (T_i eta)          `new_variate`
    c   <- c + (1/K) sum_{i in S} (c_i+ - c_i)     divided by all K clients

Variates start at zero and cover the trainable parameters only; buffers are averaged. Invariant: c is the mean
of all clients' c_k. The published code starts them at random network weights, which partial participation then
injects into every step, and gives BatchNorm's buffers and counters variates too: neither is done here.
"""

from dataclasses import dataclass
from typing import NamedTuple

from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Mean, Sum
from fldist.kinds import Scalar, Variates, Weights
from fldist.params import Params


class Update(NamedTuple):
    """One client's reply."""

    y: Weights  # local model after training
    dc: Variates  # c_i+ - c_i
    n: Scalar  # training examples held by the client


def new_variate(c_i: Params, c: Params, x: Params, y: Params, steps: int, lr: float) -> Params:
    """c_i+ = c_i - c + (x - y) / (T_i eta), all [P]; c_i itself when no step was made."""
    if steps == 0:
        return c_i
    return c_i - c + (x - y) / (steps * lr)


@dataclass(frozen=True)
class Scaffold(Algorithm):
    """FedAvg whose local steps are corrected by control variates."""

    def check(self, task: Task) -> None:
        """Refuse optimizers whose steps are no multiple of lr."""
        if task.local.optimizer != "sgd":
            raise ValueError(f"algorithm: scaffold is for SGD; local.optimizer is {task.local.optimizer}")

    def init_server(self, task: Task) -> State:
        """The model x and the server variate c = 0."""
        x = task.init_params()
        return State(x=x, c=x.trainable.zeros_like())

    def init_client(self, task: Task, client: int) -> State:
        """The client variate c_i = 0."""
        return State(c=task.init_params().trainable.zeros_like())

    def round(self, server: Server, clients: Clients) -> None:
        """Send x and c; average the models; move c by the sum of the changes over all K."""
        got = clients.selected().call(self.update, x=server.x, c=server.c, fold={"y": Mean(by="n"), "dc": Sum()})
        server.x = got.y
        server.c = server.c + got.dc / clients.num

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights, c: Variates) -> Update:
        """E epochs of corrected SGD; then the new variate."""
        local = data.train(x, drift=c - me.c)
        c_new = new_variate(me.c, c, x.trainable, local.params.trainable, local.steps, local.lr)
        dc = c_new - me.c
        me.c = c_new
        return Update(local.params, dc, data.n)
