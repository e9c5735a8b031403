"""EFLPrune: T. Wu, C. Song, P. Zeng, "Efficient federated learning on resource-constrained edge devices based on model
pruning", Complex & Intelligent Systems 9, 2023, 6999-7013. Before each round the server selects the hidden units
(neurons, filters) that take part; clients train the smaller dense network, so that both their work and their traffic
shrink; the server writes what comes back into the whole model, where all other units keep their values.

    score_u = sum_i |w_ui|                          over the incoming weights of unit u      `unit_norms`
    A_l     = the round(keep U_l) units of hidden layer l with the largest scores, at least one      `select`
    x_A     = x without the other units: their incoming weights, biases, BatchNorm entries, outgoing weights
    y_A     = sum_k n_k y_k / sum_k n_k             y_k: client k's network, trained from x_A
    x       <- y_A inside of A, x elsewhere         so a unit that was left out can come back

How far this is certain: that the name EFLPrune means this paper is an inference, and the steps are those of its
abstract. The score is not known; the L1 norm of a unit's incoming weights is a choice made here. Since units in use
tend to grow, others come back only where those shrink (`local.weight_decay`). The authors' schedule of how much is
pruned is not known either: `keep` is the same in every round.

Bytes, with S replies a round, U hidden units, P_A parameters of the smaller network, and B_A buffer entries of it that
travel:

    weights, train    4 (P_A + B_A) S down and up
    masks, train      ceil(U / 8) S down: a bit for each hidden unit, from which both ends make the smaller network
    scalars, train    8 S up: n_k
    weights, evaluate 4 (P + B) and the counters to every client that scores the global model, which is whole

Options of the shared laws: any partition; `task.travel` says whether float buffers are exchanged, integer counters are
not; cohorts are rounded down; one common initial model, from the run's seed; `rounds` counts federated rounds.
`eval.model: sent` cannot be had: what is sent is no model of the task's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Architecture, Task
from fldist.fold import Accumulator, FixedPoint, Fold, FoldContext, Refused
from fldist.kinds import Kind, Masks, MaxBytes, Scalar
from fldist.models.train import has_batch_norm
from fldist.params import Layout, Params, Travel
from fldist.pruning.compact import Compaction
from fldist.pruning.structure import Structure
from fldist.sparse import pack, unpack

Floats = Annotated[Tensor, Kind.WEIGHTS, MaxBytes(2**33)]
"""The floats of a smaller network: float32 [P_A + B_A]."""


def unit_norms(weights: Tensor, structure: Structure) -> list[Tensor]:
    """The L1 norm of each hidden unit's incoming weights, float64 [units] for every layer; weights: [P]."""
    return [group.weight.of(weights).abs().sum(dim=(0, 2), dtype=torch.float64) for group in structure.hidden]


def select(scores: Sequence[Tensor], keep: float) -> Tensor:
    """Of every layer's units [U_l] the round(keep U_l) with the largest scores, at least one: bool [sum of U_l].

    Of equal ones the first.
    """
    chosen = []
    for score in scores:
        units = torch.zeros(len(score), dtype=torch.bool)
        units[score.argsort(descending=True, stable=True)[: max(1, round(keep * len(score)))]] = True
        chosen.append(units)
    return torch.cat(chosen)


@functools.lru_cache(maxsize=2)  # the clients of one host train the same network
def smaller(architecture: Architecture, structure: Structure, units: bytes) -> tuple[Compaction, Architecture]:
    """The network with these hidden units (bits, in the order of `Structure.hidden`) alone. ValueError for bits that do
    not fit, and where a layer has none."""
    bits = torch.frombuffer(bytearray(units), dtype=torch.uint8)
    chosen = unpack(bits, structure.num_units)
    survivors: list[Tensor] = []
    start = 0
    for group in structure.hidden:
        survivors.append(chosen[start : start + group.units].nonzero().flatten())
        start += group.units
        if not len(survivors[-1]):
            raise ValueError(f"no unit of {group.layer} was selected")
    compaction = Compaction(architecture.template, structure, tuple(survivors))
    module = compaction.module()
    initial = Params.of(module, compaction.layout)
    made = Architecture(
        architecture.name, module, compaction.layout, initial, has_batch_norm(module), architecture.device
    )
    return compaction, made


def floats_only(travel: Travel) -> Travel:
    """Of what travels of a model, what travels of a smaller one."""
    return "params" if travel == "params" else "floats"


class Update(NamedTuple):
    """One client's reply."""

    y: Floats  # y_k
    n: Scalar  # n_k, training examples held by the client


@dataclass(frozen=True)
class MeanOfSmaller(Fold):
    """y_A, in any order of arrival. reference: x_A, its floats alone; bound: no sum of weights exceeds it."""

    reference: Params
    bound: float
    by: str | None = "n"

    def begin(self, context: FoldContext) -> Accumulator:
        """Start a mean."""
        return _Smaller(FoldContext(self.reference, self.bound, context.integers))


class _Smaller(Accumulator):
    """A mean of floats of one layout."""

    def __init__(self, context: FoldContext) -> None:
        assert context.reference is not None
        self._layout: Layout = context.reference.layout
        self._mean = FixedPoint(context, divide=True)

    def _params(self, value: Any) -> Params:
        if value.dtype is not torch.float32 or value.shape != (self._layout.num_floats,):
            raise Refused("shape", f"{value.dtype} {list(value.shape)} is not float32 [{self._layout.num_floats}]")
        return Params(self._layout, value)

    def add(self, client: int, value: Any, weight: float) -> None:
        self._mean.add(client, self._params(value), weight)

    def remove(self, client: int, value: Any, weight: float) -> None:
        self._mean.remove(client, self._params(value), weight)

    def result(self) -> Any:
        return self._mean.result().floats


@dataclass(frozen=True)
class EflPrune(Algorithm):
    """Federated averaging of the hidden units with the largest weights, selected anew for each round.

    The score, the L1 norm of a unit's incoming weights, is not known from the paper's abstract, but chosen here.
    """

    keep: Annotated[float, Field(gt=0, le=1)] = 0.5  # share of every hidden layer's units that takes part

    def check(self, task: Task) -> None:
        """Refuse a model without hidden units, or none that can be followed."""
        super().check(task)
        structure = task.structure()
        if not structure.hidden:
            why = "; ".join(structure.unanalysed) or "it has no hidden layer"
            raise ValueError(f"algorithm.keep: no hidden unit of this model can be left out ({why}); use another model")

    def init_server(self, task: Task) -> State:
        """The whole model, x."""
        return State(x=task.init_params())

    def round(self, server: Server, clients: Clients) -> None:
        """Select units, send the smaller model, train, average, write back."""
        task: Task = server.task
        x: Params = server.x
        units = pack(select(unit_norms(x.trainable.floats, task.structure()), self.keep))
        compaction, _ = smaller(task.architecture(), task.structure(), units.numpy().tobytes())
        travels = x.restricted(floats_only(task.travel))
        small = compaction.shrink(travels)  # x_A
        got = clients.selected().call(
            self.update,
            x=small.floats,
            units=units,
            fold={"y": MeanOfSmaller(small, float(task.num_train))},
        )
        new = x.clone()
        new.write(compaction.expand(Params(small.layout, got.y), travels))
        server.x = new
        whole, part = x.layout.num_params, small.layout.num_params
        server.log(sparsity=1.0 - part / whole, compression_rate=whole / part)

    @on_client
    def update(self, me: Me, data: ClientData, x: Floats, units: Masks) -> Update:
        """E epochs of the smaller network, all of it."""
        task = data.task
        compaction, architecture = smaller(task.architecture(), task.structure(), units.cpu().numpy().tobytes())
        layout = compaction.layout.restricted(floats_only(task.travel))
        y = data.train(Params(layout, x), architecture=architecture).params
        return Update(y.floats, data.n)
