"""What a client method gets as `data`: its samples and its services, local training above all.

Training goes through `models/train.py`; the presets here (plain, proximal, drift, mask, frozen part, a loss of
the algorithm's own) only set its hooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fldist.clock import Clock, Measured
from fldist.data.augment import add_noise, to_unit
from fldist.data.partition import Noise
from fldist.data.task import CPU, Architecture, Readout, Split, Task
from fldist.models.evaluate import Scores
from fldist.models.train import Network, Order, Progress, train
from fldist.params import Params
from fldist.seeding import Streams


class Batch(NamedTuple):
    """A mini-batch: which of the client's samples, x [b, ...] as the model sees them, y [b]."""

    rows: Tensor
    x: Tensor
    y: Tensor


Loss = Callable[[nn.Module, Batch], Tensor]
"""A loss of an algorithm's own: the module being trained and a batch -> scalar, the mean over the batch."""


@dataclass
class Trained:
    """The outcome of a local training.

    params: the trained model, in the layout of the model that was given; whole: all of it, what does not travel
    included; steps: optimizer steps made, T_i;
    lr: the mean learning rate of these steps, so that steps * lr is their sum; loss: mean training loss of the
    last epoch; squares: sum over the samples of the first epoch, or of all epochs, of their squared cross-entropy
    before their step (0 unless the selector wants reports); outputs: what the model gave for each batch of the last
    epoch before its step, [b, C], and the labels [b] (under `eval.cumulative_train` of all epochs; none without
    `eval.own`); progress: to go on; architecture: of the model, where it is not the client's own.
    """

    params: Params
    whole: Params
    steps: int
    lr: float
    loss: float
    progress: Progress
    squares: float = 0.0
    outputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    lr_sum: float = 0.0
    rng: torch.Generator | None = None  # draws augmentation
    architecture: Architecture | None = None


@dataclass(frozen=True)
class _Plan:
    """What `ClientData.train` was asked for, on the client's device; keep: 1 and 0 by parameter."""

    epochs: int
    order: Order
    proximal: float
    drift: Params | None
    keep: Tensor | None
    loss: Loss | None
    clip: float
    before_step: Callable[[Tensor], object] | None
    after_step: Callable[[Tensor], None] | None
    schedule_over: int
    beside: Sequence[Network]


class FirstEpoch(Exception):
    """A training that was only to be begun has had its first epoch."""


class ClientData:
    """One client's samples and services during one call.

    sent: the weights that it was sent last; reports: of which epochs `squares` of a training are wanted, if any; own:
    whether the model that it has trained is to be scored, and its outputs are wanted; clock: where durations come from
    that decide; begins: the first training stops after one epoch, by `FirstEpoch`, with what it has reached in
    `trained`; begun: such a one, which the first training goes on with; pause: gets every epoch's length in passes over
    the samples, when it is over (devices that are slower).
    """

    def __init__(
        self,
        task: Task,
        client: int,
        streams: Streams,
        *,
        sent: Params | None = None,
        reports: Literal["first", "all"] | None = None,
        own: bool = False,
        clock: Clock | None = None,
        begins: bool = False,
        begun: Trained | None = None,
        pause: Callable[[float], None] | None = None,
    ) -> None:
        self.task = task
        self.client = client
        self.streams = streams
        self.sent = sent
        self.clock = clock or Measured()
        self.trained: Trained | None = None
        self.own_model: Params | None = None  # as the last training left it, whatever is done to its outcome
        self.epochs = 0.0  # that `train` has run, those of `steps` in passes over the samples
        self._pause = pause
        self._reports = reports
        self._own = own
        self._begins = begins
        self._begun = begun
        self._unit: tuple[Tensor, Tensor] | None = None
        self._normal: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where samples, networks, the arguments of a client method and the values of `me` lie."""
        return self.task.device

    @property
    def architecture(self) -> Architecture:
        """The client's architecture."""
        return self.task.architecture(self._model_of)

    @property
    def n(self) -> int:
        """How many training samples there are."""
        return self.task.sizes[self.client]

    @property
    def round(self) -> int:
        """The round's number, from 1."""
        return self.streams.round

    @property
    def x(self) -> Tensor:
        """Training samples [n, ...] as the model sees them, without augmentation; under feature noise, one draw."""
        if self._normal is None:
            noisy = self._noise is not None
            self._normal = self.task.rows(self.client)[0] if noisy else self.task.normal(self._load()[0])
        return self._normal

    @property
    def y(self) -> Tensor:
        """Training labels [n]."""
        return self._load()[1]

    def _load(self) -> tuple[Tensor, Tensor]:
        if self._unit is None:
            self._unit = self._read()
        return self._unit

    def _read(self) -> tuple[Tensor, Tensor]:
        return self.task.unit_rows(self.client)

    @property
    def varies(self) -> bool:
        """Whether a sample looks different each time it is read: augmentation or feature noise."""
        return self.task.preparation.augment.active or self._noise is not None

    @property
    def _noise(self) -> Noise | None:
        return self.task.noise_of(self.client)

    @property
    def _model_of(self) -> int | None:
        """Whose architecture is trained; None: the server's."""
        return self.client

    @property
    def public(self) -> tuple[Tensor, Tensor]:
        """The task's public samples and labels, which server and clients share without sending them."""
        return self.task.public()

    def reader(self, rng: torch.Generator | None = None) -> Callable[[Tensor], Batch]:
        """Row numbers [b], on any device -> Batch, in fresh tensors on the client's; rng draws augmentation and noise
        (default: a new stream)."""
        if not self.varies:
            x, y = self.x, self.y

            def pick(rows: Tensor) -> Batch:
                rows = rows.to(y.device)
                # what x[rows] gives, in a quarter of the time
                return Batch(rows, x.index_select(0, rows), y.index_select(0, rows))

            return pick
        unit, y = self._load()
        rng = rng or self.streams.generator("augment")
        augment, noise = self.task.preparation.augment, self._noise

        def read(rows: Tensor) -> Batch:
            rows = rows.to(y.device)
            x = to_unit(unit[rows])
            if augment.active:
                x = augment(x, rng)
            if noise is not None:
                x = add_noise(x, noise.std, noise.cell, rng)
            return Batch(rows, self.task.normal(x), y[rows])

        return read

    def order(self, num_samples: int | None = None, batch_size: int | None = None, steps: int | None = None) -> Order:
        """Mini-batches of the client's samples (or of `num_samples` others) as the section `local` says.

        steps: an epoch is so many batches instead of one pass.
        """
        local = self.task.local
        return Order(
            self.n if num_samples is None else num_samples,
            batch_size or local.batch_size,
            self.streams.generator("order") if local.order == "shuffle" else None,
            local.tail,
            no_single=self._no_single,
            steps=steps,
        )

    @property
    def _no_single(self) -> bool:
        return self.architecture.batch_norm

    def second_loader(self, num_samples: int, batch_size: int) -> Iterator[Tensor]:
        """Shuffled index batches of other samples without end; it runs on over steps and epochs."""
        rng = self.streams.generator("second")
        return Order(num_samples, batch_size, rng, no_single=self._no_single).forever()

    def train(
        self,
        start: Params,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        proximal: float = 0.0,
        drift: Params | None = None,
        mask: Tensor | None = None,
        frozen: Sequence[str] = (),
        batch_norm: Literal["batch", "running"] = "batch",
        loss: Loss | None = None,
        clip: float | None = None,
        before_step: Callable[[Tensor], object] | None = None,
        after_step: Callable[[Tensor], None] | None = None,
        compact: bool = False,
        schedule_over: int | None = None,
        beside: Sequence[Network] = (),
        architecture: Architecture | None = None,
        resume_from: Trained | None = None,
    ) -> Trained:
        """Train a copy of `start` on the client's samples as the section `local` says.

        epochs: the total (default `local.epochs`); steps: an epoch is so many steps, from as many passes over the
        samples as that takes, and by default there is one; proximal: mu of (mu/2) ||y - start||^2 over the trainable
        parameters; drift: d [P], y <- y - eta d after every step, frozen parameters excepted; mask: [P], 1 where a
        parameter is kept, 0 where it stays zero (start is masked, then gradients and parameters at every step);
        frozen: names of parameters or modules that are not trained; batch_norm: see `Network`; loss: instead of
        cross-entropy; clip: largest gradient norm (default `local.clip`, 0: any);
        before_step: gets the gradient [P] of the loss before every step, as it is before it is masked or clipped;
        after_step: gets the parameters [P] after every step, to change them in place; compact: train the network that
        is left when the hidden units are taken out of which the mask keeps nothing;
        schedule_over: epochs that `local.schedule` spans, where this is the beginning of a longer training;
        beside: further networks that the loss trains, each with an optimizer of its own as the section `local` says;
        `clip` then bounds the gradient of each network on its own; mask, drift, hooks are of the client's model alone;
        architecture: of `start` and what is trained, instead of the client's: a smaller network;
        resume_from: a training of this round to go on with (its model and optimizer are taken over and changed).
        """
        task, local = self.task, self.task.local
        if epochs is None:
            epochs = local.epochs if steps is None else 1
        start = start.to(self.device)
        whole = epochs
        if self._begins or self._begun is not None:
            if beside or compact or resume_from is not None:
                raise ValueError(
                    "selection.name: this selector has clients begin their training before it chooses among them, and "
                    "this algorithm's training cannot be begun (beside, compact or resumed); use another selector"
                )
            resume_from, self._begun = self._begun, None
            epochs = 1 if self._begins else epochs
        plan = _Plan(
            epochs,
            self.order(steps=steps) if resume_from is None else resume_from.progress.order,
            proximal,
            None if drift is None else drift.to(self.device),
            None if mask is None else mask.to(self.device, torch.float32),
            loss,
            local.clip if clip is None else clip,
            before_step,
            after_step,
            max(whole, schedule_over or 0),
            beside,
        )
        if beside and resume_from is not None:
            raise ValueError("beside: a training with further networks goes on with no earlier one")
        if plan.keep is not None and plan.keep.shape != (start.layout.num_params,):
            raise ValueError(f"mask: shape {tuple(plan.keep.shape)}, not [{start.layout.num_params}], the parameters")
        if compact:
            if plan.keep is None or resume_from is not None or architecture is not None:
                raise ValueError("compact needs a mask of the own network, and goes on with no earlier training")
            return self._train_compacted(start, plan, frozen, batch_norm)
        from_here = start if resume_from is None else resume_from.whole
        with task.network(from_here, architecture or self._model_of, frozen, batch_norm) as network:
            if plan.keep is not None:
                network.params.trainable.floats.mul_(plan.keep)
            trained = self._train(network, start, plan, resume_from)
        trained.architecture = architecture
        if self._begins:
            raise FirstEpoch
        return trained

    def _train_compacted(
        self, start: Params, plan: _Plan, frozen: Sequence[str], batch_norm: Literal["batch", "running"]
    ) -> Trained:
        """Train the compacted network; its outcome in the layout of the whole one."""
        assert plan.keep is not None
        compacted = self.task.compacted(plan.keep != 0, self._model_of)
        compaction = compacted.compaction
        whole = self.task.full(start, self._model_of)
        whole.trainable.floats.mul_(plan.keep)
        small = compaction.shrink(whole)
        drift = None if plan.drift is None else compaction.shrink(plan.drift)
        plan = dataclasses.replace(plan, keep=compaction.shrink_mask(plan.keep), drift=drift)
        with self.task.network(small, compacted.architecture, frozen, batch_norm) as network:
            trained = self._train(network, small, plan, None)
        trained.whole = compaction.expand(trained.whole, whole)
        part = start.layout
        trained.params = Params(part, trained.whole.floats[: part.num_floats], trained.whole.ints[: part.num_ints])
        if self.own_model is not None:
            self.own_model = trained.whole.clone()
        return trained

    def _train(self, network: Network, start: Params, plan: _Plan, resume_from: Trained | None) -> Trained:
        local, epochs, drift, keep = self.task.local, plan.epochs, plan.drift, plan.keep
        if resume_from is None:
            optimizers = [local.make_optimizer(n.weights) for n in (network, *plan.beside)]
        else:
            optimizers = list(resume_from.progress.optimizers)
            take_over(optimizers[0], network)
        rng = resume_from.rng if resume_from is not None else self.streams.generator("augment") if self.varies else None
        read = self.reader(rng)
        trainable = network.params.trainable.floats  # [P]
        anchor = start.trainable.floats
        constant = local.schedule == "constant"
        lr_sum = 0.0 if resume_from is None else resume_from.lr_sum
        lr = local.lr_at(self.round, 0, plan.schedule_over)
        watched = _Outputs(resume_from)
        cumulative = self.task.evaluation.cumulative_train

        drawn = 0 if resume_from is None else resume_from.progress.samples

        def after_epoch(progress: Progress) -> None:
            nonlocal drawn
            passes = 1.0 if progress.order.steps is None else (progress.samples - drawn) / max(1, self.n)
            drawn = progress.samples
            self.epochs += passes
            if self._pause is not None:
                self._pause(passes)

        def before_epoch(number: int) -> None:
            nonlocal lr
            watched.sums = self._reports == "all" or (self._reports == "first" and number == 0)
            watched.keeps = self._own and (cumulative or number == epochs - 1)
            if not cumulative:
                watched.kept.clear()
            lr = local.lr_at(self.round, number, plan.schedule_over)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr

        def step_loss(rows: Tensor) -> Tensor:
            batch = read(rows)
            if plan.loss is None:
                value: Tensor = cross_entropy(network.module(batch.x), batch.y)
            else:
                value = plan.loss(network.module, batch)
            if watched.on:
                watched.take(batch.y)
            return value

        def before_step() -> None:
            if plan.before_step is not None:
                plan.before_step(network.gradient)
            if plan.proximal:
                network.gradient.add_(trainable - anchor, alpha=plan.proximal)
            if keep is not None:
                network.gradient.mul_(keep)

        def after_step() -> None:
            nonlocal lr_sum
            lr_sum += lr
            with torch.no_grad():
                if drift is not None:
                    for (begin, end), weights in zip(network.runs, network.weights, strict=True):
                        weights.add_(drift.floats[begin:end], alpha=-lr)
                if plan.after_step is not None:
                    plan.after_step(trainable)
                if keep is not None:
                    trainable.mul_(keep)  # weight decay and momentum may have moved what the mask closes

        touched = bool(plan.proximal) or any(hook is not None for hook in (keep, plan.before_step))
        hooked = not constant or any(hook is not None for hook in (drift, keep, plan.after_step))
        with watched.watching(network.module, self._reports is not None or self._own):
            progress = train(
                [network, *plan.beside],
                step_loss,
                optimizers,
                epochs=epochs,
                order=plan.order,
                clip=[plan.clip] * (1 + len(plan.beside)) if plan.beside else plan.clip,
                before_epoch=before_epoch,
                before_step=before_step if touched else None,
                after_step=after_step if hooked else None,
                after_epoch=after_epoch,
                resume_from=resume_from.progress if resume_from else None,
            )
        part = start.layout
        trained = Params(part, network.params.floats[: part.num_floats], network.params.ints[: part.num_ints])
        last = progress.losses[-1] if progress.losses else float("nan")
        mean_lr = lr if constant or not progress.steps else lr_sum / progress.steps
        self.trained = Trained(
            trained, network.params, progress.steps, mean_lr, last, progress, watched.squares, watched.kept, lr_sum, rng
        )
        self.own_model = network.params.clone() if self._own else None
        return self.trained

    def frozen_copy(self, model: Params) -> nn.Module:
        """A module of its own with these values, in eval mode, that takes no gradients."""
        return self.task.frozen_copy(model, self._model_of)

    def evaluate(
        self,
        model: Params,
        split: Split | Literal["global"],
        architecture: Architecture | None = None,
        readout: Readout | None = None,
    ) -> Scores:
        """Score a model on the client's own part, or on the global test set.

        architecture: if not the client's own; readout: makes of the model's module the one whose outputs are scored.
        """
        return self.task.evaluate_client(model, self.client, split, architecture, readout)


class _Outputs:
    """Watches what a training's module gives for the batches, whatever loss is trained: sums the squared cross-entropy
    of their samples, or keeps them with the labels."""

    def __init__(self, so_far: Trained | None) -> None:
        self.squares = 0.0 if so_far is None else so_far.squares
        self.kept = [] if so_far is None else list(so_far.outputs)
        self.sums = False
        self.keeps = False
        self._outputs: Tensor | None = None

    @property
    def on(self) -> bool:
        """Whether the outputs of this epoch are wanted."""
        return self.sums or self.keeps

    @contextlib.contextmanager
    def watching(self, module: nn.Module, wanted: bool) -> Iterator[None]:
        """Keep the module's outputs of each step, if wanted."""
        handle = module.register_forward_hook(self._keep) if wanted else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def _keep(self, module: nn.Module, inputs: object, outputs: Tensor) -> None:
        if self.on and self._outputs is None:  # the first pass of a step is the one on the client's samples
            self._outputs = outputs.detach()

    def take(self, labels: Tensor) -> None:
        """Take a step's batch. ValueError when its loss did not run the module."""
        outputs, self._outputs = self._outputs, None
        if outputs is None or len(outputs) < len(labels):
            raise ValueError(
                "eval.own and selectors that want reports need the model's outputs for each batch, which this "
                "training's loss does not compute; let it call module(batch.x), or do without them"
            )
        outputs = outputs[: len(labels)]  # behind them may be those of samples that are not the client's
        if self.sums:
            self.squares += float(cross_entropy(outputs, labels, reduction="none").double().square().sum())
        if self.keeps:
            self.kept.append((outputs, labels))


class PooledData(ClientData):
    """All clients' training samples together, at the server: what centralised training uses.

    Training calculates on the task's device; `params` come back on the CPU, where the server's state is.
    """

    def __init__(self, task: Task, streams: Streams, *, clock: Clock | None = None) -> None:
        super().__init__(task, -1, streams, clock=clock)

    def enter(self, streams: Streams) -> None:
        """Begin a round: its random streams; the samples stay as they were read."""
        self.streams = streams

    def train(self, start: Params, **options: Any) -> Trained:
        """As a client's."""
        trained = super().train(start, **options)
        trained.params = trained.params.to(CPU)
        return trained

    def evaluate(
        self,
        model: Params,
        split: Split | Literal["global"],
        architecture: Architecture | None = None,
        readout: Readout | None = None,
    ) -> Scores:
        """Score a model on the global test set; ValueError for the splits, which only clients have."""
        if split != "global":
            raise ValueError(f"the pooled data have no split {split!r}; use global")
        return self.task.evaluate(model)

    @property
    def n(self) -> int:
        """All training samples."""
        return self.task.num_train

    @property
    def _noise(self) -> None:
        return None

    @property
    def _model_of(self) -> None:
        return None

    def _read(self) -> tuple[Tensor, Tensor]:
        return self.task.pooled()


def take_over(optimizer: torch.optim.Optimizer, network: Network) -> None:
    """Let an optimizer go on, with its own state (momentum), on the leaves of another network of the same form."""
    old = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    for before, after in zip(old, network.weights, strict=True):
        optimizer.state[after] = optimizer.state.pop(before, {})
    optimizer.param_groups[0]["params"] = list(network.weights)
