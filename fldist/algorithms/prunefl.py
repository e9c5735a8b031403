"""PruneFL: Y. Jiang, S. Wang, V. Valls, B. J. Ko, W.-H. Lee, K. K. Leung, L. Tassiulas, "Model Pruning Enables
Efficient Federated Learning on Edge Devices", IEEE TNNLS 2022, arXiv 1909.12326. A mask on the weights is reconfigured
again and again, so that what it keeps promises the largest decrease of the loss in a second. Described from the code
published with it (jiangyuang/PruneFL), not from the paper.

Rounds, theta under the mask M, of which the server keeps all values:

    y_k     = theta M after `steps` SGD steps under M; u_k samples seen on the way
    theta_i <- sum_k u_k y_ki / sum_k u_k        where M keeps i; elsewhere theta_i stays, and comes back with M_i
    s_ki    = sum over rounds of (sum over the round's steps of g_i)^2 u_k       also where M_i = 0

Every `reconfigure_every` rounds the clients of the round upload s_k, the server adds them up to s, and `reconfigure`s.
With f = fraction 0.5^(round / half_life), c_l the seconds of a parameter of layer l in a round, t_0 those of all else:

    certain     kept weights of layer l whose |theta_i| is not below the floor(f n)-th smallest (counted from 0) of the
                n that l keeps
    candidates  all other weights, kept or not
    A, t        = sum of s over certain weights, biases and layers that are never pruned; t_0 + sum_l c_l (certain in l)
    in decreasing order of s_i / c_l, as long as s_i / c_l > A / t, candidates are added: A += s_i, t += c_l
    M           = certain and added weights; biases and layers that are never pruned are always kept

Before round 1, one client does the same alone (`initial_client`), in passes of 10 steps: once its training accuracy,
looked at every 10 passes, exceeds 1.5 / (number of classes), it reconfigures, and again every `reconfigure_every`
passes, with f = `fraction` and s_i = the sum of the squared gradients of the steps since the last time, until the
density has changed by at most a tenth in 5 reconfigurations in a row.

    c_l = steps (seconds of l's forward and backward pass) / (weights of l) + 8 / bandwidth
    t_0 = steps (seconds of a step of the network less those of its layers) + 8 (floats of all else) / bandwidth

The seconds are those of that client's clock, by the names of the layers and `step`: what the machine takes, or what the
section `clock` says. Where they are measured, the same run has other masks on another day. They are of dense layers,
which a mask of scattered weights does not make faster.

Bytes, with N parameters of which z are kept, B buffer entries that travel (a counter is two), S replies a round and K
clients; enc(z) is of `fldist/sparse.py`, 4 z by default:

    weights, initial        4 (N + B) down and up, once
    masks, initial          ceil(N / 8) up, once
    report, initial         8 (L + 1) up, once: the seconds of a step and of L layers
    scalars, initial        8 up, once: the passes made (`initial_passes: 0` has the report alone)
    weights, train          (enc(z) + 4 B) S down and up
    scalars, train          8 S up: u_k
    gradients, reconfigure  4 N S up in every `reconfigure_every`-th round
    masks, mask             ceil(N / 8) K down after each reconfiguration (`mask_delivery: broadcast`); with
                            `first_contact` under `train`, to a client when it first takes part under a mask

Departures from that code, in which the same clients take part in every round: s_k is of those rounds since the last
reconfiguration in which client k took part, and who is not in the cohort of a reconfiguration uploads nothing. A
round's steps go over a fresh permutation of the client's samples, not over one that lasts for several rounds. A pass of
the initial stage takes 10 batches of all samples, not always the same 10. There, gradients of the initial stage are 0
where the mask is closed, so that it only prunes; here they are not. Reconfigurations are at multiples of
`reconfigure_every`, counted from round 1, wherever the initial stage ended.

Options of the shared laws: any partition; `steps` counts, not `local.epochs`; `task.travel` says whether buffers are
exchanged; cohorts are rounded down; one common initial model, from the run's seed; `rounds` counts federated rounds,
and the initial stage is before the first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fldist.algorithm import Books, Clients, Me, Server, State, TooFewReplies, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Collect, Fold, Mean, collect
from fldist.kinds import Gradients, MaskedWeights, Masks, MaxBytes, Report, Scalar, Weights
from fldist.masked import MaskedAveraging, Update, pruned, server_step
from fldist.params import Layout, Params
from fldist.pruning.masks import Eligible, refuse_empty
from fldist.sparse import pack, unpack

PASS_STEPS = 10
"""Steps of a pass of the initial stage."""
PASSES_BETWEEN_LOOKS = 10
"""Passes after which the initial stage looks whether the training accuracy is high enough to begin with."""
STEADY = 5
"""Reconfigurations in a row with hardly a change, after which the initial stage ends."""
TIMED = 5
"""How often each time is asked for; the median counts."""


# ---- the mask
def reconfigure(
    weights: Tensor, s: Tensor, mask: Tensor, c: Mapping[str, float], t_const: float, f: float, layout: Layout
) -> Tensor:
    """The new mask bool [N]: see above.

    weights: theta [N]; s: [N], not negative; mask: bool [N]; c: c_l > 0 by the name of the weight tensor, for those
    that are pruned; t_const: t_0 >= 0; f in [0, 1). Of candidates with equal s_i / c_l those in front are added first.
    """
    keep = torch.ones_like(mask)
    gain, seconds = 0.0, t_const
    candidates: list[Tensor] = []
    costs: list[Tensor] = []
    s = s.double()
    for slot in layout.params:
        place = slice(slot.offset, slot.offset + slot.numel)
        if slot.name in c:
            certain = _certain(weights[place].abs(), mask[place], f)
            keep[place] = certain
            seconds += c[slot.name] * int(certain.sum())
            candidates.append((~certain).nonzero().squeeze(1) + slot.offset)
            costs.append(torch.full((len(candidates[-1]),), c[slot.name], dtype=torch.float64, device=s.device))
            gain += float(s[place][certain].sum())
        else:
            gain += float(s[place].sum())
    index, cost = torch.cat(candidates), torch.cat(costs)
    order = (s[index] / cost).argsort(descending=True, stable=True)
    index, cost = index[order], cost[order]
    gains = s[index]
    # A and t before each candidate, if all in front of it are added; s_i / c_l > A / t without a division by 0
    before = gain + gains.cumsum(0) - gains
    until = seconds + cost.cumsum(0) - cost
    worth = gains * until > before * cost
    keep[index[: int(worth.long().cumprod(0).sum())]] = True
    return keep


def _certain(magnitudes: Tensor, mask: Tensor, f: float) -> Tensor:
    """Which of a layer's weights stay, bool [n]: those that a mask keeps, less the floor(f n) smallest."""
    kept = magnitudes[mask]
    if not len(kept):
        return mask.clone()
    threshold = kept.kthvalue(int(f * len(kept)) + 1).values
    return mask & (magnitudes >= threshold)


def density(keep: Tensor, layout: Layout, names: Collection[str]) -> float:
    """Share of the entries of these tensors that a mask bool [N] keeps."""
    slots = [slot for slot in layout.params if slot.name in names]
    kept = sum(int(keep[slot.offset : slot.offset + slot.numel].sum()) for slot in slots)
    return kept / sum(slot.numel for slot in slots)


def total(parts: Mapping[int, Params]) -> Tensor:
    """s [N], float64: added in the order of the clients."""
    return sum((parts[k].floats.double() for k in sorted(parts)), start=torch.zeros((), dtype=torch.float64))


# ---- the times
def layer_of(tensor: str) -> str:
    """The layer that a weight tensor belongs to, which is its clock's label: `model` for one of no layer."""
    return tensor.rpartition(".")[0] or "model"


class _Recorded:
    """What a layer got and gave in a forward pass."""

    def __init__(self) -> None:
        self.inputs: tuple[Any, ...] | None = None

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.inputs is None:  # in place operations behind it may change what it read
            self.inputs = tuple(
                i.detach().clone().requires_grad_(i.requires_grad) if isinstance(i, Tensor) else i for i in inputs
            )


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a layer's output through which gradients flow."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    return [t for part in value for t in _tensors(part)] if isinstance(value, tuple | list) else []


def seconds_of(data: ClientData, layers: list[str]) -> Tensor:
    """Seconds of a training step, and of the forward and backward pass of each layer in it: float64 [L + 1].

    The median of several times that the client's clock tells, on a batch of its samples. ValueError: see `Clock.time`.
    """
    rows = next(data.order().epoch(), None)
    if rows is None:  # one sample, and BatchNorm
        return torch.zeros(1 + len(layers), dtype=torch.float64)
    batch = data.reader()(rows)
    with data.task.network(data.task.init_params(data.client), data.client) as network:
        network.train()
        modules = dict(network.module.named_modules())
        recorded = {name: _Recorded() for name in layers}
        hooks = [modules[_module(name)].register_forward_pre_hook(recorded[name]) for name in layers]

        def step() -> None:
            network.gradient.zero_()
            cross_entropy(network.module(batch.x), batch.y).backward()  # type: ignore[no-untyped-call]

        step()
        for hook in hooks:
            hook.remove()
        times = [_seconds(data, "step", step)]
        for name in layers:
            layer, inputs = modules[_module(name)], recorded[name].inputs

            def run(layer: nn.Module = layer, inputs: tuple[Any, ...] | None = inputs) -> None:
                given = _tensors(layer(*inputs)) if inputs is not None else []
                torch.autograd.backward(given, [torch.ones_like(g) for g in given])

            times.append(_seconds(data, name, run))
    return torch.tensor(times, dtype=torch.float64)


def _module(layer: str) -> str:
    return "" if layer == "model" else layer


def _seconds(data: ClientData, label: str, work: Any) -> float:
    return float(statistics.median(data.clock.time(label, work)[1] for _ in range(TIMED)))


# ---- what travels
Times = Annotated[Report, MaxBytes(2**16)]
"""What `seconds_of` gives."""


class Alone(NamedTuple):
    """What the client of the initial stage has found."""

    y: Weights  # all values, of weights that the mask closes too
    mask: Masks
    times: Times
    passes: Scalar


class Measured(NamedTuple):
    """A client's times."""

    times: Times


class Squares(NamedTuple):
    """A client's share of s."""

    s: Gradients  # s_k [N]


@dataclass(frozen=True)
class PruneFl(MaskedAveraging):
    """Federated averaging under a mask that is reconfigured by squared gradients and by the seconds of each layer.

    Described from its published code. Its masks follow times: they can be repeated under a scripted clock alone.
    """

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.0  # server momentum as a moving average; the source has none
    steps: Annotated[int, Field(ge=1)] = 5  # SGD steps of a client in a round
    reconfigure_every: Annotated[int, Field(ge=1)] = 50  # rounds; passes in the initial stage
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.3  # f in round 0, of each layer's kept weights
    half_life: Annotated[float, Field(gt=0)] = 10_000.0  # rounds in which f halves
    bandwidth: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.44e6  # bytes a second; published: 5.56e-6 s for 8
    initial_client: Annotated[int, Field(ge=0)] | None = None  # of the initial stage; None: drawn by the seed
    initial_passes: Annotated[int, Field(ge=0)] = 1000  # of the initial stage, at most; 0: its times are taken alone
    exclude: tuple[str, ...] = ()  # weights that are never pruned

    def check(self, task: Task) -> None:
        """Refuse names that the model does not have, and a client without samples."""
        super().check(task)
        self.eligible.check(task.init_params().layout)
        client = self.initial_client
        if client is not None and (client >= task.num_clients or not task.sizes[client]):
            raise ValueError(f"algorithm.initial_client: there is no client {client} with samples; name another")

    @property
    def eligible(self) -> Eligible:
        """The tensors that are pruned."""
        return Eligible(one_d=False, exclude=self.exclude)

    def layers(self, layout: Layout) -> dict[str, int]:
        """The layers that are pruned, with their numbers of weights."""
        found: dict[str, int] = {}
        for slot in self.eligible.slots(layout):
            found[layer_of(slot.name)] = found.get(layer_of(slot.name), 0) + slot.numel
        return found

    def costs(self, times: Tensor, layout: Layout) -> tuple[dict[str, float], float]:
        """c_l by the name of the weight tensor, and t_0, of the times that `seconds_of` gives."""
        sizes = self.layers(layout)
        step, *each = times.tolist()
        computing = dict(zip(sizes, each, strict=True))
        c = {
            slot.name: self.steps * computing[layer_of(slot.name)] / sizes[layer_of(slot.name)] + 8 / self.bandwidth
            for slot in self.eligible.slots(layout)
        }
        others = layout.num_floats - sum(sizes.values())
        return c, self.steps * max(0.0, step - sum(each)) + 8 * others / self.bandwidth

    def init_server(self, task: Task) -> State:
        """Model, no mask yet; the times of the layers, which are measured, but decide what comes."""
        state = super().init_server(task)
        state.times = None
        state.passes = 0
        return state

    def init_client(self, task: Task, client: int) -> State:
        """s_k [N], and of which interval between two reconfigurations it is."""
        return State(s=None, interval=-1)

    # ---- before round 1
    def setup(self, server: Server, clients: Clients) -> None:
        """Let one client prune alone; take its times. Where none was named, others follow one that is of no use."""
        if self.initial_client is not None:
            return self.begin_with(server, clients, self.initial_client)
        ids = list(clients.all().ids)
        first = int(torch.randint(len(ids), (1,), generator=server.rng))
        failed: dict[int, str] = {}
        for client in [*ids[first:], *ids[:first]]:
            try:
                return self.begin_with(server, clients, client)
            except TooFewReplies as error:
                failed |= error.missing
        raise TooFewReplies("alone", failed)

    def begin_with(self, server: Server, clients: Clients, client: int) -> None:
        """The initial stage with a client; TooFewReplies where it does not reply, or with what cannot be."""
        one, layout = clients.only([client]), server.x.layout
        times = Collect((1 + len(self.layers(layout)),), "float64", not_negative=True)
        if not self.initial_passes:
            server.times = one.call(self.measure, fold={"times": times}, phase="initial").times[client]
            return
        fold: dict[str, Fold] = {"y": Mean(like="x"), "mask": collect(), "times": times}
        got = one.call(self.alone, x=server.x, fold=fold, phase="initial")
        try:
            keep = unpack(got.mask[client], layout.num_params)
            refuse_empty(keep, layout, "its mask is not used")
            if not 0 <= got.passes[client] <= self.initial_passes:
                raise ValueError(f"{got.passes[client]} passes of at most {self.initial_passes}")
        except ValueError as error:
            raise TooFewReplies("alone", {client: f"refused: {error}"}) from None
        server.x, server.times, server.passes = got.y, got.times[client], int(got.passes[client])
        self.put_mask(server, clients, keep)

    @on_client
    def measure(self, me: Me, data: ClientData) -> Measured:
        """The times alone."""
        return Measured(seconds_of(data, list(self.layers(data.task.layout))))

    @on_client
    def alone(self, me: Me, data: ClientData, x: Weights) -> Alone:
        """The initial stage."""
        layout = x.layout
        times = seconds_of(data, list(self.layers(layout)))
        c, t_const = self.costs(times, layout)
        keep = torch.ones(layout.num_params, dtype=torch.bool, device=x.device)
        s = torch.zeros(layout.num_params, device=x.device)
        passes, begun, steady, last = 0, False, 0, math.nan
        while passes < self.initial_passes and steady < STEADY:
            block = min(self.reconfigure_every if begun else PASSES_BETWEEN_LOOKS, self.initial_passes - passes)
            run = data.train(x, steps=PASS_STEPS * block, mask=keep, before_step=lambda g: s.add_(g.square()))
            x, _ = server_step(x, run.params, x.trainable, 0.0, keep)
            passes += block
            if not run.steps:
                break
            if not begun:
                begun = data.evaluate(pruned(x, keep), "train").accuracy > 1.5 / data.task.num_classes
            elif block < self.reconfigure_every:
                break
            if begun:
                keep = reconfigure(x.trainable.floats, s, keep, c, t_const, self.fraction, layout)
                s.zero_()
                now = density(keep, layout, c)
                steady = steady + 1 if abs(now / last - 1.0) <= 0.1 else 0
                last = now
        return Alone(x, pack(keep), times, passes)

    def summary(self, server: Server, books: Books) -> dict[str, float]:
        """Passes of the initial stage, which no round shows, and what is left of the weights that are pruned."""
        keep, layout = self.keep_of(server), server.x.layout
        left = 1.0 if keep is None else density(keep, layout, [s.name for s in self.eligible.slots(layout)])
        return {"initial_passes": float(server.passes), "density": left}

    # ---- rounds
    def round(self, server: Server, clients: Clients) -> None:
        """Train and average under the mask; from time to time, a new mask."""
        cohort = clients.selected()
        batch = 2 * server.task.local.batch_size  # the last batch may have been merged with the one before
        bound = float(server.task.num_clients * self.steps * batch)
        got = cohort.call(
            self.update, x=self.sent(server), mask=self.mask_of(server), fold={"y": Mean(by="n", bound=bound)}
        )
        server.x, server.v = server_step(server.x, got.y, server.v, self.beta, self.keep_of(server))
        if server.round % self.reconfigure_every == 0:
            self.reconfigure_now(server, clients, got.clients)
        self.log_sparsity(server)

    def reconfigure_now(self, server: Server, clients: Clients, ids: Any) -> None:
        """Take the new mask from what the clients of this round have gathered."""
        layout = server.x.layout
        fold = Collect((layout.num_params,), not_negative=True)
        found = clients.only(ids).call(self.squares, fold={"s": fold}, phase="reconfigure")
        c, t_const = self.costs(server.times, layout)
        before = self.keep_of(server)
        mask = torch.ones(layout.num_params, dtype=torch.bool) if before is None else before
        f = self.fraction * 0.5 ** (server.round / self.half_life)
        self.put_mask(
            server, clients, reconfigure(server.x.trainable.floats, total(found.s), mask, c, t_const, f, layout)
        )

    @on_client
    def update(self, me: Me, data: ClientData, x: MaskedWeights, mask: Masks | None) -> Update:
        """Some steps under the mask, and what their gradients add to s_k; n is u_k, the samples seen."""
        n = x.layout.num_params
        keep = None if mask is None else unpack(mask, n)
        g = torch.zeros(n, device=x.device)
        run = data.train(x, steps=self.steps, mask=keep, before_step=g.add_)
        seen = run.progress.samples
        interval = (data.round - 1) // self.reconfigure_every
        s = g.square_().mul_(seen)
        me.s, me.interval = (me.s + s if me.interval == interval and me.s is not None else s), interval
        return Update(self.kept(run.params, mask), seen)

    @on_client
    def squares(self, me: Me, data: ClientData) -> Squares:
        """s_k, which begins anew."""
        s: Tensor = me.s
        me.s = None
        return Squares(Params(data.task.init_params().layout.restricted("params"), s))
