"""LG-FedAvg: Liang et al., "Think Locally, Act Globally: Federated Learning with Local and Global Representations",
arXiv 2001.01523, in the form of the library HtFLlib. Every client has a network of its own; of it the classifier, the
head, is averaged.

    y_i <- E epochs of local SGD on CE from y_i, all of it, with the head h          the selected clients
    h   <- sum_i n_i head(y_i) / sum_i n_i                                           over those that replied
    head(y_i) <- h                                                                   all clients, selected or not

h: the classifier's parameters, weight [C, K] and bias [C], in one tensor; at first those of client 0's initial model.
Clients are scored with the new head on top of what they have learnt.

Bytes, for a head of K C + C numbers:

    weights, setup    4 (K C + C) down to each client with samples, once
    weights, train    4 (K C + C) up from each selected client, and scalars 8 up: n_i
    weights, load     4 (K C + C) down to each client with samples, selected or not
    the same once more, phase train, to a selected client whose last replies were missing; nothing else travels

Options of the shared laws: any partition; of a model the head travels alone, whatever `task.travel` says; cohorts as
`clients.rounding` says; every client has a model of its own, that begins where `clients.init` says, but for its head;
all heads must be of one shape (`task.feature_dim`); `rounds` counts rounds of local training. Any topology.

How far this is certain: the steps are those of HtFLlib, from a description of its code. The paper shares any number of
the upper layers of one common architecture.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Architecture, Task
from fldist.fold import Mean, fold_limit
from fldist.kinds import Each, Kind, Scalar
from fldist.models.layers import head_names
from fldist.params import Params, Slot

Head = Annotated[Tensor, Kind.WEIGHTS]


class Update(NamedTuple):
    """One client's reply."""

    head: Head  # of the local model after training, float32 [K C + C]
    n: Scalar  # n_i, training examples held by the client


def head_slots(made: Architecture) -> list[Slot]:
    """Where the head lies in models of an architecture."""
    names = set(head_names(made.template))
    return [slot for slot in made.layout.params if slot.name in names]


def head_of(y: Params, slots: list[Slot]) -> Tensor:
    """A model's head, in one tensor of its own."""
    return torch.cat([y.floats[slot.offset : slot.offset + slot.numel] for slot in slots])


def with_head(y: Params, head: Tensor, slots: list[Slot]) -> Params:
    """The model with another head, in blocks of its own."""
    made = y.clone()
    start = 0
    for slot in slots:
        made.floats[slot.offset : slot.offset + slot.numel].copy_(head[start : start + slot.numel])
        start += slot.numel
    return made


@dataclass(frozen=True)
class LgFedAvg(Algorithm):
    """Representations are the clients' own, the classifier on top of them is common."""

    heterogeneous: ClassVar[bool] = True
    has_global_model: ClassVar[bool] = False

    def check(self, task: Task) -> None:
        """Refuse models whose heads differ in shape, or that have none."""
        super().check(task)
        shapes = {made.name: [slot.shape for slot in head_slots(made)] for made in task.client_architectures}
        first = next(iter(shapes.values()))
        if any(shape != first for shape in shapes.values()):
            shown = ", ".join(f"{' and '.join(str(list(s)) for s in shape)} in {n}" for n, shape in shapes.items())
            least = min(shape[0][-1] for shape in shapes.values())
            raise ValueError(
                f"clients.models: lg_fedavg averages classifiers, and their shapes differ: {shown}; set "
                f"task.feature_dim={least}, which brings their inputs to one width, or choose models whose classifiers "
                "are alike"
            )

    def init_server(self, task: Task) -> State:
        """The head of client 0's initial model; clients that lack the head that was sent last."""
        head = head_of(task.init_params(0, whole=True), head_slots(task.architecture(0)))
        return State(head=head, behind=[])

    def init_client(self, task: Task, client: int) -> State:
        """The client's model y."""
        return State(y=task.init_params(client, whole=True))

    def setup(self, server: Server, clients: Clients) -> None:
        """Send the initial head to all clients."""
        self.give(server, clients)

    def round(self, server: Server, clients: Clients) -> None:
        """Let clients train, average their heads, send the mean to all clients."""
        cohort = clients.selected()
        late = set(server.behind)
        got = cohort.call(
            self.update,
            head=Each({c: server.head if c in late else None for c in cohort.ids}),
            fold={"head": Mean(by="n", shape=tuple(server.head.shape), limit=fold_limit(server.head))},
        )
        server.head = got.head.float()
        self.give(server, clients, got.missing)

    def give(self, server: Server, clients: Clients, without: Collection[int] = ()) -> None:
        """Send the head to all clients. without: those whose replies of this round were missing: no write of theirs in
        it counts."""
        able = clients.all().ids
        loaded = clients.only([c for c in able if c not in without]).call(self.load, head=server.head).clients
        server.behind = sorted(set(able) - set(loaded))

    @on_client
    def update(self, me: Me, data: ClientData, head: Head | None) -> Update:
        """E epochs of local SGD from where the client stood. head: where it does not have the latest."""
        slots = head_slots(data.architecture)
        y = data.train(me.y if head is None else with_head(me.y, head, slots)).params
        me.y = y
        return Update(head_of(y, slots), data.n)

    @on_client
    def load(self, me: Me, data: ClientData, head: Head) -> None:
        """Put the common head on top of the client's model."""
        me.y = with_head(me.y, head, head_slots(data.architecture))

    def personal_model(self, me: Me, data: ClientData) -> Params:
        """The client's model, with the common head."""
        y: Params = me.y
        return y
