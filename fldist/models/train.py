"""The local training primitive: every algorithm's local epochs run through `train`.

It knows networks, batches and optimizers; it does not know clients, rounds or what is sent. Presets (plain,
proximal, drift) are made of its hooks by `data/client_data.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from fldist.params import Params

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class LocalTraining:
    """The section `local`: what one client does in one round unless an algorithm says otherwise."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 32
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegative = 0.0
    clip: NonNegative = 0.0  # largest total gradient norm; 0 clips nothing
    tail: Literal["keep", "drop", "merge"] = "keep"  # the last, smaller batch of an epoch

    def make_optimizer(self, weights: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer over flat weights."""
        if self.optimizer == "adam":
            return torch.optim.Adam(weights, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(weights, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


class Network:
    """A module whose parameters and gradients are views into flat blocks.

    `weights` are the flat leaves that an optimizer steps: one for a module that trains whole, so that a step is
    a few operations on one tensor; one per contiguous run of trainable tensors where part of it is frozen.
    """

    def __init__(self, module: nn.Module, params: Params) -> None:
        params.bind(module)
        self.module = module
        self.params = params
        self.gradient = torch.zeros(params.layout.num_params)  # [P]
        tensors = dict(module.named_parameters())
        runs: list[list[int]] = []
        for slot in params.layout.params:
            tensor = tensors[slot.name]
            end = slot.offset + slot.numel
            if not tensor.requires_grad:
                tensor.grad = None
                continue
            tensor.grad = self.gradient[slot.offset : end].view(slot.shape)
            if runs and runs[-1][1] == slot.offset:
                runs[-1][1] = end
            else:
                runs.append([slot.offset, end])
        self.weights: list[nn.Parameter] = []
        for start, end in runs:
            leaf = nn.Parameter(params.floats[start:end])
            leaf.grad = self.gradient[start:end]
            self.weights.append(leaf)

    def release(self) -> None:
        """Drop the module's gradients, so that it keeps no block alive."""
        for tensor in self.module.parameters():
            tensor.grad = None


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a batch of one sample could reach a BatchNorm layer in training mode."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


@dataclass
class Order:
    """Shuffled mini-batches of indices, drawn anew each epoch from one generator.

    tail: what happens to a last batch smaller than `batch_size`; with `no_single` a batch of one sample is
    left out whatever the tail, since BatchNorm cannot train on it.
    """

    num_samples: int
    batch_size: int
    generator: torch.Generator
    tail: Literal["keep", "drop", "merge"] = "keep"
    no_single: bool = False

    def epoch(self) -> Iterator[Tensor]:
        """The index batches [b] of one epoch."""
        batches = list(torch.randperm(self.num_samples, generator=self.generator).split(self.batch_size))  # type: ignore[no-untyped-call]
        if len(batches) > 1 and len(batches[-1]) < self.batch_size:
            if self.tail == "merge":
                batches[-2:] = [torch.cat(batches[-2:])]
            elif self.tail == "drop":
                batches.pop()
        for batch in batches:
            if len(batch) and not (self.no_single and len(batch) == 1):
                yield batch


@dataclass
class Progress:
    """How far a training came, and what it needs to go on."""

    optimizers: Sequence[torch.optim.Optimizer]
    order: Order
    epochs: int = 0
    steps: int = 0
    losses: list[float] = field(default_factory=list)  # mean loss per sample, one entry an epoch
    first_epoch_squares: float = 0.0  # sum over the first epoch's batches of b loss^2


def train(
    networks: Sequence[Network],
    step_loss: Callable[[Tensor], Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    epochs: int,
    order: Order,
    clip: float = 0.0,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    resume_from: Progress | None = None,
) -> Progress:
    """Run epochs of: zero gradients, loss of a batch, backward, clip, optimizer steps.

    step_loss: index batch [b] -> scalar loss (mean over the batch). before_step: after backward and before
    clipping (add to or mask gradients). after_step: after the optimizers (drift, masks). epochs: the total,
    counted from the beginning also when resumed. resume_from: a former call's progress, whose optimizers and
    order go on where they stopped; the arguments `optimizers` and `order` are then not used.
    """
    progress = resume_from or Progress(optimizers, order)
    for network in networks:
        network.module.train()
    while progress.epochs < epochs:
        total = torch.zeros((), dtype=torch.float64)
        squares = torch.zeros((), dtype=torch.float64)
        seen = 0
        for batch in progress.order.epoch():
            for network in networks:
                network.gradient.zero_()
            loss = step_loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if before_step is not None:
                before_step()
            if clip > 0.0:
                torch.nn.utils.clip_grad_norm_([w for n in networks for w in n.weights], clip)
            for optimizer in progress.optimizers:
                optimizer.step()
            if after_step is not None:
                after_step()
            progress.steps += 1
            value = loss.detach()
            total += value * len(batch)
            squares += value * value * len(batch)
            seen += len(batch)
        if progress.epochs == 0:
            progress.first_epoch_squares = float(squares)
        progress.epochs += 1
        progress.losses.append(float(total) / seen if seen else float("nan"))
    return progress


def warm_up() -> None:
    """Take the first optimizer step of the process: torch imports over a second's worth of modules in it."""
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.SGD([weight], lr=0.1).step()
