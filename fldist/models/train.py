"""The local training primitive: every algorithm's local epochs run through `train`.

It knows networks, batches and optimizers; it does not know clients, rounds or what is sent. Presets (plain,
proximal, drift, mask, frozen part) are made of its hooks by `data/client_data.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from fldist import blocks
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
    order: Literal["shuffle", "fixed"] = "shuffle"  # a new permutation every epoch, or the order of the data
    tail: Literal["keep", "drop", "merge"] = "keep"  # the last, smaller batch of an epoch
    schedule: Literal["constant", "cosine"] = "constant"  # of lr over the epochs of one round
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # lr of round r: lr * lr_decay^floor((r - 1) / lr_decay_every)
    lr_decay_every: Annotated[int, Field(ge=1)] = 1

    def lr_at(self, round_number: int, epoch: int, epochs: int) -> float:
        """The learning rate of an epoch (from 0) of a round (from 1); cosine: lr (1 + cos(pi epoch / E)) / 2.

        E is the larger of `epochs`, the epochs of this training, and those configured: one that stops early and
        goes on later keeps to the schedule of the whole.
        """
        epochs = max(epochs, self.epochs)
        lr = self.lr
        if self.lr_decay != 1.0:
            lr *= self.lr_decay ** (max(0, round_number - 1) // self.lr_decay_every)  # the setup is round 0
        return lr if self.schedule == "constant" else lr * (1.0 + math.cos(math.pi * epoch / epochs)) / 2.0

    def make_optimizer(self, weights: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer over flat weights."""
        if self.optimizer == "adam":
            # fused: one pass over the weights in place of ten, and no slow square roots of zeros; a sixth of the time
            return torch.optim.Adam(weights, lr=self.lr, weight_decay=self.weight_decay, fused=True)
        return torch.optim.SGD(weights, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


class Network:
    """A module whose parameters and gradients are views into flat blocks.

    `weights` are the flat leaves that an optimizer steps: one for a module that trains whole, so that a step is
    a few operations on one tensor; one per contiguous run of trainable tensors where part of it is frozen.
    frozen: names of parameters, or of modules with all below them, that are not trained; a layer whose parameters
    are all frozen is in eval mode, so that BatchNorm's statistics stay as well. ValueError for a name that is none.
    batch_norm: in training, BatchNorm uses each batch's statistics and moves the running ones (`batch`), or uses the
    running ones and leaves them (`running`).
    """

    def __init__(
        self,
        module: nn.Module,
        params: Params,
        frozen: Sequence[str] = (),
        batch_norm: Literal["batch", "running"] = "batch",
    ) -> None:
        tensors = dict(module.named_parameters())
        closed: dict[str, nn.Parameter] = {}
        for name in frozen:
            below = {n: t for n, t in tensors.items() if n == name or n.startswith(f"{name}.")}
            if not below:
                raise ValueError(f"frozen: the model has no parameter {name!r}; it has {', '.join(tensors)}")
            closed |= below
        params.bind(module)
        self.module = module
        self.params = params
        self.gradient = blocks.zeros(params.layout.num_params, device=params.device)  # [P]
        self._frozen = tuple(frozen)
        self.batch_norm = batch_norm
        self._thawed = [t for t in closed.values() if t.requires_grad]
        for tensor in self._thawed:
            tensor.requires_grad_(False)
        self.runs: list[tuple[int, int]] = []  # [start, end) of every leaf in the blocks
        for slot in params.layout.params:
            tensor = tensors[slot.name]
            end = slot.offset + slot.numel
            if not tensor.requires_grad:
                tensor.grad = None
                continue
            tensor.grad = self.gradient[slot.offset : end].view(slot.shape)
            if self.runs and self.runs[-1][1] == slot.offset:
                self.runs[-1] = (self.runs[-1][0], end)
            else:
                self.runs.append((slot.offset, end))
        self.weights: list[nn.Parameter] = []
        for start, end in self.runs:
            leaf = nn.Parameter(params.floats[start:end])
            leaf.grad = self.gradient[start:end]
            self.weights.append(leaf)

    def train(self) -> None:
        """Enter training mode, frozen layers excepted, and BatchNorm where it keeps its statistics."""
        self.module.train()
        trains_whole = sum(end - start for start, end in self.runs) == self.params.layout.num_params
        if trains_whole and self.batch_norm == "batch":
            return
        for name, layer in self.module.named_modules():
            own = list(layer.parameters(recurse=False))
            inside = any(name == f or name.startswith(f"{f}.") for f in self._frozen)
            frozen = inside or (bool(own) and not any(t.requires_grad for t in own))
            keeps = self.batch_norm == "running" and isinstance(layer, nn.modules.batchnorm._BatchNorm)
            if frozen or keeps:
                layer.eval()

    def release(self) -> None:
        """Drop the module's gradients, so that it keeps no block alive, and thaw what was frozen."""
        for tensor in self.module.parameters():
            tensor.grad = None
        for tensor in self._thawed:
            tensor.requires_grad_(True)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a batch of one sample could reach a BatchNorm layer in training mode."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


@dataclass
class Order:
    """Mini-batches of indices: a permutation drawn anew each epoch from one generator, or without one 0, 1, 2 ...

    tail: what happens to a last batch smaller than `batch_size`, unless it is the only one; with `no_single` a
    batch of one sample is left out whatever the tail, since BatchNorm cannot train on it. steps: an epoch is so many
    batches, from as many passes over the samples as that takes, and not one pass.
    """

    num_samples: int
    batch_size: int
    generator: torch.Generator | None
    tail: Literal["keep", "drop", "merge"] = "keep"
    no_single: bool = False
    steps: int | None = None

    def epoch(self) -> Iterator[Tensor]:
        """The index batches [b] of one epoch."""
        if self.steps is None:
            yield from self._pass()
            return
        left = self.steps
        while left:
            before = left
            for batch in itertools.islice(self._pass(), left):
                left -= 1
                yield batch
            if left == before:  # there is no batch to give
                return

    def _pass(self) -> Iterator[Tensor]:
        """The index batches [b] of one pass over the samples."""
        if self.generator is None:
            indices = torch.arange(self.num_samples)
        else:
            indices = torch.randperm(self.num_samples, generator=self.generator)
        batches = list(indices.split(self.batch_size))  # type: ignore[no-untyped-call]
        if len(batches) > 1 and len(batches[-1]) < self.batch_size:
            if self.tail == "merge":
                batches[-2:] = [torch.cat(batches[-2:])]
            elif self.tail == "drop":
                batches.pop()
        for batch in batches:
            if len(batch) and not (self.no_single and len(batch) == 1):
                yield batch

    def forever(self) -> Iterator[Tensor]:
        """Index batches without end, epoch after epoch: a second loader that runs beside the first.

        ValueError when an epoch has no batch.
        """
        while True:
            empty = True
            for batch in self.epoch():
                empty = False
                yield batch
            if empty:
                raise ValueError(f"a loader over {self.num_samples} samples has no batch to give")


@dataclass
class Progress:
    """How far a training came, and what it needs to go on."""

    optimizers: Sequence[torch.optim.Optimizer]
    order: Order
    epochs: int = 0
    steps: int = 0
    samples: int = 0  # of all batches; one that was drawn twice counts twice
    losses: list[float] = field(default_factory=list)  # mean loss per sample, one entry an epoch
    last_loss: float = float("nan")  # of the last batch


def train(
    networks: Sequence[Network],
    step_loss: Callable[[Tensor], Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    epochs: int,
    order: Order,
    clip: float | Sequence[float] = 0.0,
    before_epoch: Callable[[int], None] | None = None,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    after_epoch: Callable[[Progress], None] | None = None,
    resume_from: Progress | None = None,
) -> Progress:
    """Run epochs of: zero gradients, loss of a batch, backward, clip, optimizer steps.

    networks: all that the loss trains; a joint loss of several is one `step_loss`. step_loss: index batch [b] ->
    scalar loss (mean over the batch). clip: largest norm of the gradient of all networks together, or one number
    for each network; 0 clips nothing. before_epoch: gets the epoch's number from 0 (schedules). before_step:
    after backward and before clipping (add to or mask gradients). after_step: after the optimizers (drift, masks).
    after_epoch: gets how far it came.
    epochs: the total, counted from the beginning also when resumed. resume_from: a former call's progress, whose
    optimizers and order go on where they stopped; the arguments `optimizers` and `order` are then not used.
    """
    progress = resume_from or Progress(optimizers, order)
    if isinstance(clip, int | float):
        clips = [([w for n in networks for w in n.weights], float(clip))]
    else:
        clips = [(n.weights, float(c)) for n, c in zip(networks, clip, strict=True)]
    clips = [(weights, largest) for weights, largest in clips if largest > 0.0]
    for network in networks:
        network.train()
    while progress.epochs < epochs:
        if before_epoch is not None:
            before_epoch(progress.epochs)
        losses: list[Tensor] = []
        counts: list[int] = []
        for batch in progress.order.epoch():
            for network in networks:
                network.gradient.zero_()
            loss = step_loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if before_step is not None:
                before_step()
            for weights, largest in clips:
                torch.nn.utils.clip_grad_norm_(weights, largest)
            for optimizer in progress.optimizers:
                optimizer.step()
            if after_step is not None:
                after_step()
            progress.steps += 1
            progress.samples += len(batch)
            losses.append(loss.detach())
            counts.append(len(batch))
        progress.epochs += 1
        if losses:
            # read once an epoch: no step waits for a GPU, or spends time on a sum of its own
            values = torch.stack(losses).cpu().double()
            progress.last_loss = float(values[-1])
            progress.losses.append(float(values @ torch.tensor(counts, dtype=torch.float64)) / sum(counts))
        else:
            progress.losses.append(float("nan"))
        if after_epoch is not None:
            after_epoch(progress)
    return progress


def warm_up(device: torch.device | None = None) -> None:
    """Take the first optimizer step of the process: torch imports over a second's worth of modules in it.

    On a GPU it also makes the process's context there.
    """
    weight = nn.Parameter(torch.zeros(1, device=device))
    weight.grad = torch.zeros(1, device=device)
    torch.optim.SGD([weight], lr=0.1).step()
