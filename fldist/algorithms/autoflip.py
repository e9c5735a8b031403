"""AutoFLIP: C. Internò, E. Raponi, N. van Stein, T. Bäck, M. Olhofer, Y. Jin, B. Hammer, "Adaptive Hybrid Model Pruning
in Federated Learning through Loss Exploration", arXiv 2405.10271. Clients explore first: each trains the common start
theta_0 alone, and how far every parameter moved says how much the losses want it. What moved little is pruned; the
rounds train, send and average the rest.

    d_k = (e_k - a_k)^2                          `deviation`; a_k, e_k: explorer k at the start and at the end
    D   = mean of d_k over the explorers         unweighted
    G   = (D - min D) / (max D - min D)          `guidance`, for each tensor; or (D - median D) / (Q_0.75 D - Q_0.25 D)
    tau = Q_T(G)                                 the T-quantile over all tensors together
    M   = 1 where G > tau, else 0                `mask_from`; units without input or output are closed as well

The rounds under M, the server's momentum and their bytes are in `fldist/masked.py`. Added to these, with N parameters,
B buffer entries that travel, n_X explorers and K clients:

    weights, explore    (4 N + 4 B) n_X down, 4 N n_X up, once (2 N up with `deviation_dtype: fp16`)
    scalars, explore    8 n_X up: the epochs that each explorer ran
    masks, train        ceil(N / 8) S down in every round, with `mask_schedule: per_round`

Options of the shared laws: any partition (published: `shards` with two classes, `dirichlet_client`); `task.travel` says
whether buffers are exchanged (`params` keeps them at their initial values, as published); cohorts are rounded down; one
common initial model, from the run's seed; `rounds` counts federated rounds, the exploration is before the first.

How far this is certain: the steps are those of the code published for the first two versions and of the abstracts; the
paper's body was not at hand. Choices made here: one mask for the run (a later version is said to make one each round,
`per_round`), `T_s` and the closing of units (the abstracts claim structured pruning, the code has none), `regrow`,
deviations in half precision.

Departures from the published code, which can be had with `start: chain`, `warmup_epochs: 1`, `prune_rounds: false`:
explorers there share one model, one after the other, over-trained before round 1, and the rounds are dense. A tensor
that never moved, for which G is 0/0, is kept; there it prunes everything. T = 0 prunes nothing; without a quantile
there is nothing to explore for, and nothing is. A problem of two classes has two outputs here as any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fldist.algorithm import Clients, Me, Replies, Server, State, TooFewReplies, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Accumulator, Collect, FixedPoint, Fold, FoldContext, Mean, Refused, collect
from fldist.kinds import Kind, MaxBytes, Scalar, Weights
from fldist.masked import MaskedAveraging, pruned
from fldist.params import Layout, Params
from fldist.pruning.flops import TrainingFlops
from fldist.pruning.masks import Eligible, by_quantile, quantile, refuse_empty
from fldist.pruning.structure import Structure, close_dead_units, prune_units

HALF_SCALE = 1024.0
"""Movements are sent as float16 times this: from 6e-8 to 60 they keep their 11 bits."""

Halves = Annotated[Tensor, Kind.WEIGHTS, MaxBytes(2**33)]


def deviation(start: Tensor, end: Tensor) -> Tensor:
    """d_k = (e_k - a_k)^2, element by element; both [N]."""
    return (end - start).square()


def deviation_of(start: Params, end: Params) -> Params:
    """d_k of two models."""
    a, e = start.trainable, end.trainable
    return Params(a.layout, deviation(a.floats, e.floats))


def to_half(start: Tensor, end: Tensor) -> Tensor:
    """|e_k - a_k| in float16, scaled; its square is d_k within 0.1 %."""
    return ((end - start).abs() * HALF_SCALE).half()


def from_half(movement: Tensor) -> Tensor:
    """d_k of a scaled movement."""
    return (movement.float() / HALF_SCALE).square()


def _origin_and_spread(values: Tensor, normalization: str) -> tuple[float, float]:
    """What a tensor's deviations are measured from, and by: see `guidance`."""
    if normalization == "minmax":
        return float(values.min()), float(values.max() - values.min())
    between = quantile(values, 0.75) - quantile(values, 0.25)
    return float(values.median()), float(torch.tensor(between, dtype=values.dtype))  # 0 if it is too small to divide by


def guidance(mean: Tensor, layout: Layout, normalization: str = "minmax") -> Tensor:
    """G [N] of the mean deviation D [N]: every tensor scaled on its own, 1 where its deviations have no spread.

    `minmax`: to 0..1. `robust`: by the median (the lower one of two) and the distance of the quartiles.
    """
    scaled = torch.empty_like(mean)
    for slot in layout.params:
        place = slice(slot.offset, slot.offset + slot.numel)
        origin, spread = _origin_and_spread(mean[place], normalization)
        scaled[place] = (mean[place] - origin) / spread if spread > 0 else 1.0
    return scaled


def without_spread(mean: Tensor, layout: Layout, normalization: str = "minmax") -> Tensor:
    """Which entries [N] are of a tensor whose deviations have no spread: there is no order to prune it by."""
    found = torch.zeros(layout.num_params, dtype=torch.bool)
    for slot in layout.params:
        place = slice(slot.offset, slot.offset + slot.numel)
        found[place] = not _origin_and_spread(mean[place], normalization)[1] > 0
    return found


def mean_deviation(deviations: Mapping[int, Tensor], explorers: Sequence[int]) -> Tensor:
    """D [N]: the unweighted mean over these explorers, added in the order of their numbers, in float64."""
    total = torch.zeros(len(next(iter(deviations.values()))), dtype=torch.float64)
    for k in sorted(explorers):
        d = deviations[k]
        total += from_half(d) if d.dtype is torch.float16 else d
    return total.div_(len(explorers)).float()


class Explored(NamedTuple):
    """One explorer's reply."""

    d: Weights  # d_k [N]
    epochs: Scalar  # that it ran


class ExploredHalf(NamedTuple):
    """One explorer's reply in half the bytes."""

    m: Halves  # |e_k - a_k| HALF_SCALE, float16 [N]
    epochs: Scalar


class Linked(NamedTuple):
    """What a client passes on in a chain."""

    e: Weights  # the model after its training
    d: Weights | None  # d_k, of the last explorer alone
    epochs: Scalar


@dataclass(frozen=True)
class MeanOfHalves(Fold):
    """D of movements that were sent as float16, in any order of arrival."""

    like: str = "x"

    def begin(self, context: FoldContext) -> Accumulator:
        """Start a mean."""
        return _Halves(context)


class _Halves(Accumulator):
    """A mean of d_k, each made of its movement when it is added."""

    def __init__(self, context: FoldContext) -> None:
        assert context.reference is not None
        self._layout = context.reference.trainable.layout
        self._mean = FixedPoint(dataclasses.replace(context, reference=context.reference.trainable), divide=True)

    def _params(self, value: Tensor) -> Params:
        if value.dtype is not torch.float16 or value.shape != (self._layout.num_params,):
            raise Refused("shape", f"{value.dtype} {list(value.shape)} is not float16 [{self._layout.num_params}]")
        return Params(self._layout, from_half(value))

    def add(self, client: int, value: Any, weight: float) -> None:
        self._mean.add(client, self._params(value), weight)

    def remove(self, client: int, value: Any, weight: float) -> None:
        self._mean.remove(client, self._params(value), weight)

    def result(self) -> Any:
        return self._mean.result()


@dataclass(frozen=True)
class AutoFlip(MaskedAveraging):
    """Federated averaging of the parameters that exploring clients moved most."""

    T: Annotated[float, Field(ge=0, lt=1)] = 0.3  # quantile of the guidance that is pruned; 0: nothing
    T_s: Annotated[float, Field(ge=0, lt=1)] = 0.0  # quantile of hidden units' scores that is pruned whole; 0: off
    mask_schedule: Literal["static", "per_round"] = "static"  # one mask, or one from each round's explorers
    regrow: Literal["freeze", "zero"] = "freeze"  # per_round: what is outside of a mask keeps its value, or is set to 0
    normalization: Literal["minmax", "robust"] = "minmax"  # scaling of each tensor's deviations
    invert: bool = False  # a control: prune what moved most
    close_dead_units: bool = True  # units that have lost all inputs or all readers go as well
    prune_1d: bool = True  # biases and normalisation take part
    exclude: tuple[str, ...] = ()  # parameters that are kept whole
    per_tensor_threshold: bool = False  # the T-quantile of each tensor's guidance, not of all together
    prune_rounds: bool = True  # false: the mask is applied to the start alone, and the rounds are dense

    rho: Annotated[float, Field(gt=0, le=1)] = 1.0  # rho, share of the clients that explore
    explore_epochs: Annotated[int, Field(ge=0)] = 150  # E_x, at most
    patience: Annotated[int, Field(ge=1)] = 40  # P_x, epochs without a new lowest loss
    warmup_epochs: Annotated[int, Field(ge=0)] = 0  # W_x, before a_k is taken
    stop_on: Literal["last_batch", "epoch_mean"] = "last_batch"  # the loss that patience looks at
    deviation_dtype: Literal["fp32", "fp16"] = "fp32"  # how d_k travels; the mask is the same but for some ties
    start: Literal["common", "chain"] = "common"  # explorers start from theta_0, or each from where the last one ended
    chain_epochs: Annotated[int, Field(ge=0)] = 2  # chain: epochs on every client in turn once the mask is applied

    def check(self, task: Task) -> None:
        """Refuse what cannot be pruned, and combinations without a meaning."""
        super().check(task)
        layout = task.init_params().layout
        self.eligible.check(layout)
        if self.mask_schedule == "per_round" and (self.start == "chain" or not self.prune_rounds):
            raise ValueError(
                "algorithm.mask_schedule: per_round makes each round's mask from that round's explorers; it needs "
                "start: common and prune_rounds: true"
            )
        if self.start == "chain" and self.deviation_dtype == "fp16":
            raise ValueError(
                "algorithm.deviation_dtype: fp16 is for start: common; one explorer of a chain tells its d_k"
            )
        if self.regrow == "zero" and self.mask_schedule == "static":
            task.notes.append("algorithm.regrow: zero changes nothing with mask_schedule: static")
        if self.T_s and not self.structure(task).hidden:
            reasons = "; ".join(self.structure(task).unanalysed)
            raise ValueError(f"algorithm.T_s: no hidden unit of this model can be pruned ({reasons}); set it to 0")

    @property
    def eligible(self) -> Eligible:
        """The tensors that take part."""
        return Eligible(self.prune_1d, self.exclude)

    @property
    def mask_each_round(self) -> bool:
        """Whether masks are part of what a round sends."""
        return self.mask_schedule == "per_round"

    @property
    def explores(self) -> bool:
        """Whether anything depends on an exploration."""
        return self.T > 0.0 or self.T_s > 0.0 or self.start == "chain"

    def structure(self, task: Task) -> Structure:
        """The hidden units of the task's model, without those that touch what is kept whole."""
        return task.structure().without(self.exclude)

    def init_server(self, task: Task) -> State:
        """Model and velocity; what explorers found, where each round makes a mask of it; what exploring cost."""
        state = super().init_server(task)
        state.deviations = {}
        state.explored_epochs = {}
        return state

    # ---- before round 1
    def setup(self, server: Server, clients: Clients) -> None:
        """Explore, make the mask, prune the start."""
        if not self.explores:
            return
        ids = list(clients.all().ids)
        count = max(1, round(self.rho * len(ids)))
        drawn = torch.randperm(len(ids), generator=server.rng)[:count].tolist()
        explorers = sorted(ids[i] for i in drawn)
        mean = (
            self.chain(server, clients, explorers)
            if self.start == "chain"
            else self.exploration(server, clients, explorers)
        )
        keep = self.mask_from(mean, server.task)  # with per_round, to see that it can be made
        if self.mask_schedule == "static":
            server.x = pruned(server.x, keep)
        if self.prune_rounds and self.mask_schedule == "static":
            self.put_mask(server, clients, keep)
        elif self.start == "chain" and not self.prune_rounds:
            for k in ids:
                self.pass_on(server, clients, k, epochs=self.chain_epochs)

    def exploration(self, server: Server, clients: Clients, explorers: list[int]) -> Tensor:
        """D over the explorers that replied, each from theta_0.

        The mean is taken in fixed point on the scale of theta_0: of K clients, differences of d_k below 3e-17 K are
        lost, so movements below about 5e-9 sqrt(K), and a client that moved a parameter by more than 8 is refused.
        """
        half = self.deviation_dtype == "fp16"
        method, field = (self.explore_half, "m") if half else (self.explore, "d")
        mean: Fold = MeanOfHalves() if half else Mean(like="x", part="params")
        each = Collect((server.x.layout.num_params,), "float16" if half else "float32", not_negative=True)
        fold: Fold = each if self.mask_schedule == "per_round" else mean
        got = clients.only(explorers).call(method, x=server.x, fold={field: fold}, phase="explore")
        server.explored_epochs = {k: int(got.epochs[k]) for k in got.clients}
        found = getattr(got, field)
        if self.mask_schedule == "static":
            d: Params = found
            return d.floats
        server.deviations = {k: d if half else d.floats for k, d in found.items()}
        return mean_deviation(server.deviations, list(server.deviations))

    def chain(self, server: Server, clients: Clients, explorers: list[int]) -> Tensor:
        """D as published: of the last explorer of a chain, whose end is the start of the rounds.

        A client that does not answer, or sends NaN, is left out of the chain; the last one must answer.
        """
        server.explored_epochs = {}
        for k in explorers[:-1]:
            self.pass_on(server, clients, k, epochs=-1)
        got = self.pass_on(server, clients, explorers[-1], epochs=-1, last=True)
        if got is None:
            raise TooFewReplies("chain_link", {explorers[-1]: "the last explorer of the chain"})
        d: Params = got.d[explorers[-1]]
        return d.floats

    def pass_on(self, server: Server, clients: Clients, k: int, epochs: int, last: bool = False) -> Replies | None:
        """Let a client train the model on: so many epochs, or (-1) as long as it explores; None if it did not."""
        fold: dict[str, Fold] = {"e": Mean(like="x"), "d": collect()}
        try:
            got = clients.only([k]).call(
                self.chain_link, x=server.x, epochs=epochs, last=int(last), fold=fold, phase="explore"
            )
        except TooFewReplies:
            return None
        server.x = got.e
        if epochs < 0:
            server.explored_epochs = {**server.explored_epochs, k: int(got.epochs[k])}
        return got

    def mask_from(self, mean: Tensor, task: Task) -> Tensor:
        """M bool [N] of the mean deviation D [N]; ValueError where it leaves a layer nothing."""
        layout = task.init_params().layout
        if self.T == 0.0 and self.T_s == 0.0:
            return torch.ones(layout.num_params, dtype=torch.bool)
        g = guidance(mean, layout, self.normalization)
        g = -g if self.invert else g
        keep = by_quantile(g, layout, self.T, self.eligible, self.per_tensor_threshold)
        keep |= without_spread(mean, layout, self.normalization)  # also where the threshold has come to 1
        if self.T_s:
            try:
                keep = prune_units(keep, g, self.structure(task), self.T_s)
            except ValueError as error:
                raise ValueError(f"algorithm.T_s: {error}") from None
        if self.close_dead_units:
            keep = close_dead_units(keep, self.structure(task))
        refuse_empty(keep, layout, "lower algorithm.T or algorithm.T_s, or name the layer in algorithm.exclude")
        return keep

    # ---- rounds
    def round(self, server: Server, clients: Clients) -> None:
        """A round under the mask of the setup, or under one from the explorers of its cohort: from all explorers where
        it has none, and where theirs would leave a layer nothing."""
        if self.mask_schedule == "per_round" and server.deviations:
            everyone = list(server.deviations)
            here = [k for k in clients.selected().ids if k in server.deviations] or everyone
            try:
                keep = self.mask_from(mean_deviation(server.deviations, here), server.task)
            except ValueError:  # theirs alone leaves a layer nothing; that of all was looked at before round 1
                here = everyone
                keep = self.mask_from(mean_deviation(server.deviations, here), server.task)
            server.log(explorers=len(here))
            if self.regrow == "zero":
                server.x = pruned(server.x, keep)
            self.mask_for_round(server, keep)
        self.masked_round(server, clients)

    def flops_before(self, server: Server) -> int:
        """Of the exploration and its warm-ups, which train the dense network."""
        task = server.task
        epochs = {k: e + self.warmup_epochs for k, e in server.explored_epochs.items()}
        if self.start == "chain" and not self.prune_rounds:
            epochs = {k: epochs.get(k, 0) + self.chain_epochs for k in range(task.num_clients) if task.sizes[k]}
        one = TrainingFlops.of(task.macs())
        return sum(one.times(task.sizes[k], e).dense for k, e in epochs.items())

    # ---- clients
    @on_client
    def explore(self, me: Me, data: ClientData, x: Weights) -> Explored:
        """Train a copy of theta_0 until patience ends; d_k [N]."""
        a, e, epochs = self.train_until_patience(data, x)
        return Explored(deviation_of(a, e), epochs)

    @on_client
    def explore_half(self, me: Me, data: ClientData, x: Weights) -> ExploredHalf:
        """The same; |e_k - a_k| in float16."""
        a, e, epochs = self.train_until_patience(data, x)
        return ExploredHalf(to_half(a.trainable.floats, e.trainable.floats), epochs)

    @on_client
    def chain_link(self, me: Me, data: ClientData, x: Weights, epochs: Scalar, last: Scalar) -> Linked:
        """A link of a chain: so many epochs, or (-1) an exploration, of which the last one tells d_k."""
        if epochs >= 0:
            e = data.train(x, epochs=int(epochs)).params if epochs else x.clone()
            return Linked(e, None, epochs)
        a, e, ran = self.train_until_patience(data, x)
        return Linked(e, deviation_of(a, e) if last else None, ran)

    def train_until_patience(self, data: ClientData, x: Params) -> tuple[Params, Params, int]:
        """An exploration: the models of a_k and e_k, and the epochs of which there were at most E_x."""
        start = data.train(x, epochs=self.warmup_epochs, clip=0.0).params if self.warmup_epochs else x
        run, best, idle, epochs = None, float("inf"), 0, 0
        while epochs < self.explore_epochs and idle < self.patience:
            epochs += 1
            run = data.train(start, epochs=epochs, clip=0.0, schedule_over=self.explore_epochs, resume_from=run)
            loss = run.progress.last_loss if self.stop_on == "last_batch" else run.progress.losses[-1]
            best, idle = (loss, 0) if loss < best else (best, idle + 1)
        return start, run.params if run is not None else start, epochs
