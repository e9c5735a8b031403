"""What a client method gets as `data`: its samples and its services, local training above all.

Training goes through `models/train.py`; the presets here (plain, proximal, drift) only set its hooks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fldist.data.task import Task
from fldist.models.train import Network, Order, Progress, has_batch_norm, train
from fldist.params import Params
from fldist.seeding import Streams


@dataclass
class Trained:
    """The outcome of a local training.

    params: the trained model, in the layout of the model that was given; steps: optimizer steps made, T_i;
    lr: the learning rate of these steps, eta; loss: mean training loss of the last epoch; progress: to go on.
    """

    params: Params
    steps: int
    lr: float
    loss: float
    progress: Progress


class ClientData:
    """One client's samples and services during one call."""

    def __init__(self, task: Task, client: int, streams: Streams) -> None:
        self.task = task
        self.client = client
        self.streams = streams
        self.n = task.sizes[client]
        self._rows: tuple[Tensor, Tensor] | None = None

    @property
    def x(self) -> Tensor:
        """Training samples [n, ...]."""
        return self._load()[0]

    @property
    def y(self) -> Tensor:
        """Training labels [n]."""
        return self._load()[1]

    def _load(self) -> tuple[Tensor, Tensor]:
        if self._rows is None:
            self._rows = self.task.rows(self.client)
        return self._rows

    def train(
        self,
        start: Params,
        *,
        epochs: int | None = None,
        proximal: float = 0.0,
        drift: Params | None = None,
        resume_from: Trained | None = None,
    ) -> Trained:
        """Train a copy of `start` on the client's samples as the section `local` says.

        epochs: the total (default `local.epochs`); proximal: mu of (mu/2) ||y - start||^2 over the trainable
        parameters; drift: d [P], y <- y - eta d after every step; resume_from: a training of this round to
        go on with (its model and optimizer are taken over and changed).
        """
        task, local = self.task, self.task.local
        if resume_from is None:
            network = Network(task.module, task.full(start))
            order = Order(
                self.n,
                local.batch_size,
                self.streams.generator("order"),
                local.tail,
                no_single=has_batch_norm(task.module),
            )
            optimizers = [local.make_optimizer(network.weights)]
        else:
            assert resume_from.progress is not None
            network = Network(task.module, task.full(resume_from.params))
            order = resume_from.progress.order
            optimizers = list(resume_from.progress.optimizers)
            # the optimizers' own state (momentum) goes on; their leaves are those of the new blocks
            for group, weights in zip(optimizers[0].param_groups, [network.weights], strict=True):
                for old, new in zip(group["params"], weights, strict=True):
                    optimizers[0].state[new] = optimizers[0].state.pop(old, {})
                group["params"] = list(weights)
        trainable = network.params.trainable.floats  # [P]
        anchor = start.trainable.floats

        def step_loss(batch: Tensor) -> Tensor:
            return cross_entropy(network.module(self.x[batch]), self.y[batch])

        def add_proximal() -> None:
            network.gradient.add_(trainable - anchor, alpha=proximal)

        def add_drift() -> None:
            assert drift is not None
            with torch.no_grad():
                trainable.add_(drift.floats, alpha=-local.lr)

        progress = train(
            [network],
            step_loss,
            optimizers,
            epochs=local.epochs if epochs is None else epochs,
            order=order,
            clip=local.clip,
            before_step=add_proximal if proximal else None,
            after_step=add_drift if drift is not None else None,
            resume_from=resume_from.progress if resume_from else None,
        )
        network.release()
        part = start.layout
        trained = Params(part, network.params.floats[: part.num_floats], network.params.ints[: part.num_ints])
        loss = progress.losses[-1] if progress.losses else float("nan")
        return Trained(trained, progress.steps, local.lr, loss, progress)
