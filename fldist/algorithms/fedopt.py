"""FedAvg with an optimizer at the server. Delta = (mean of the clients' models) - x, buffers are averaged.

`adam`, `yogi`, `adagrad`: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2 (FedAdam, FedYogi,
FedAdagrad), without bias correction, v starting at tau^2:

    m <- beta1 m + (1 - beta1) Delta
    v <- v + Delta^2                                      adagrad
    v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)        yogi
    v <- beta2 v + (1 - beta2) Delta^2                    adam
    x <- x + lr m / (sqrt(v) + tau)

`heavy_ball`: m <- beta1 m + Delta, x <- x + lr m (FedAvgM: Hsu et al., arXiv 1909.06335).
`ema`: m <- beta1 m + (1 - beta1) Delta, x <- x + lr m; m starts at 0 without correction, so the first steps are short.
With lr = 1 and beta1 = 0 both are FedAvg up to rounding.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Mean
from fldist.kinds import Scalar, Weights
from fldist.params import Params

Momentum = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ADAPTIVE = ("adam", "yogi", "adagrad")


class Update(NamedTuple):
    """One client's reply."""

    y: Weights  # local model after training
    n: Scalar  # training examples held by the client


def heavy_ball(m: Tensor, delta: Tensor, beta1: float) -> Tensor:
    """m <- beta1 m + Delta."""
    return beta1 * m + delta


def ema(m: Tensor, delta: Tensor, beta1: float) -> Tensor:
    """m <- beta1 m + (1 - beta1) Delta."""
    return beta1 * m + (1.0 - beta1) * delta


def adagrad(v: Tensor, delta: Tensor, beta2: float) -> Tensor:
    """v <- v + Delta^2; beta2 is not used."""
    return v + delta.square()


def yogi(v: Tensor, delta: Tensor, beta2: float) -> Tensor:
    """v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)."""
    square = delta.square()
    return v - (1.0 - beta2) * square * torch.sign(v - square)


def adam(v: Tensor, delta: Tensor, beta2: float) -> Tensor:
    """v <- beta2 v + (1 - beta2) Delta^2."""
    return beta2 * v + (1.0 - beta2) * delta.square()


SECOND_MOMENT = {"adagrad": adagrad, "yogi": yogi, "adam": adam}


@dataclass(frozen=True)
class FedOpt(Algorithm):
    """FedAvg, the mean change taken as a gradient by the server's optimizer."""

    optimizer: Literal["heavy_ball", "ema", "adam", "yogi", "adagrad"] = "adam"
    lr: Positive = 0.1  # eta, the server's step size
    beta1: Momentum = 0.9
    beta2: Momentum = 0.99
    tau: Positive = 1e-3  # tau, degree of adaptivity

    def init_server(self, task: Task) -> State:
        """The model x, m = 0, and v = tau^2 where the optimizer is adaptive."""
        x = task.init_params()
        zero = x.trainable.zeros_like()
        state = State(x=x, m=zero)
        if self.optimizer in ADAPTIVE:
            state.v = Params(zero.layout, torch.full_like(zero.floats, self.tau**2))
        return state

    def round(self, server: Server, clients: Clients) -> None:
        """Send x, train, average, step."""
        got = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")})
        before = server.x.trainable
        delta = (got.y.trainable - before).floats
        first = heavy_ball if self.optimizer == "heavy_ball" else ema
        m = first(server.m.floats, delta, self.beta1)
        step = self.lr * m
        if self.optimizer in ADAPTIVE:
            v = SECOND_MOMENT[self.optimizer](server.v.floats, delta, self.beta2)
            server.v = Params(before.layout, v)
            step = step / (v.sqrt() + self.tau)
        server.m = Params(before.layout, m)
        x = got.y  # buffers are averaged already
        x.write(before + Params(before.layout, step))
        server.x = x

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        """E epochs of local SGD from x, as configured under `local`."""
        return Update(data.train(x).params, data.n)
