"""MOON: Li, He, Song, "Model-Contrastive Federated Learning", CVPR 2021, eq. 3 and Algorithm 1.

    l = CE + mu mean_b -log( e^(cos(z_y, z_x) / T) / (e^(cos(z_y, z_x) / T) + e^(cos(z_y, z_v) / T)) )   `contrast`

z: what the model's classifier (its last linear layer) is given, of the local model y, the received one x, and v, the
client's own model after the last round in which it took part; without v the term is 0. x and v are in eval mode and
take no gradient; the published code leaves x in training mode, which lets the contrast spoil its statistics. A
projection head is a property of the model (`task.model.projection`). With mu = 0 it is FedAvg bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, softplus

from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.data.client_data import Batch, ClientData
from fldist.data.task import Task
from fldist.fold import Mean
from fldist.kinds import Scalar, Weights
from fldist.models.layers import features_and_logits
from fldist.params import Params


class Update(NamedTuple):
    """One client's reply."""

    y: Weights  # local model after training
    n: Scalar  # training examples held by the client


def contrast(z_y: Tensor, z_x: Tensor, z_v: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of -log softmax([cos(z_y, z_x), cos(z_y, z_v)] / T)_0; all [b, d]."""
    near = cosine_similarity(z_y, z_x, dim=1, eps=1e-8)
    far = cosine_similarity(z_y, z_v, dim=1, eps=1e-8)
    mean: Tensor = softplus((far - near) / temperature).mean()
    return mean


def pull(z_y: Tensor, z_x: Tensor) -> Tensor:
    """The variant `l2norm`: mean over the batch of ||z_x - z_y||_2; both [b, d]."""
    mean: Tensor = torch.linalg.vector_norm(z_x - z_y, dim=1).mean()
    return mean


@dataclass(frozen=True)
class Moon(Algorithm):
    """FedAvg whose local representation is drawn to the global one and away from the client's old one."""

    mu: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0  # mu, weight of the term
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5  # T
    variant: Literal["contrastive", "l2norm"] = "contrastive"

    def check(self, task: Task) -> None:
        """Refuse models without a linear classifier, before which the representation is taken."""
        if self.mu:
            features_and_logits(task.frozen_copy(task.init_params()), task.blank(2))

    def init_server(self, task: Task) -> State:
        """One model, x."""
        return State(x=task.init_params())

    def init_client(self, task: Task, client: int) -> State:
        """No model v yet."""
        return State(v=None)

    def round(self, server: Server, clients: Clients) -> None:
        """Send x, train with the contrastive term, average."""
        got = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")})
        server.x = got.y

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        """E epochs of local SGD on CE + mu times the term; keep the outcome as v."""
        local = data.train(x, loss=self.loss(data, x, me.v) if self.mu else None)
        me.v = local.whole
        return Update(local.params, data.n)

    def loss(self, data: ClientData, x: Params, v: Params | None) -> Callable[[nn.Module, Batch], Tensor]:
        """The local loss against the received model x and the former local model v."""
        if v is None and self.variant == "contrastive":
            return lambda module, batch: cross_entropy(module(batch.x), batch.y)
        z_x = representations(data, x)
        z_v = representations(data, v) if v is not None else z_x

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            z_y, logits = features_and_logits(module, batch.x)
            ce: Tensor = cross_entropy(logits, batch.y)
            if self.variant == "l2norm":
                return ce + self.mu * pull(z_y, z_x(batch))
            return ce + self.mu * contrast(z_y, z_x(batch), z_v(batch), self.temperature)

        return loss


def representations(data: ClientData, model: Params) -> Callable[[Batch], Tensor]:
    """Batch -> z [b, d] of a fixed model: computed once for all samples where these look the same in every epoch."""
    module = data.frozen_copy(model)
    if data.varies:
        return lambda batch: features_and_logits(module, batch.x)[0]
    pieces = torch.arange(data.n).split(512)  # type: ignore[no-untyped-call]
    z = torch.cat([features_and_logits(module, data.x[piece])[0] for piece in pieces])  # [n, d]
    return lambda batch: z[batch.rows]
