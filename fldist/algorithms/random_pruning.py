"""Random pruning as the code published with AutoFLIP (arXiv 2405.10271) has it: FedAvg whose clients, after every
optimizer step, set randomly chosen parameters to 0, other ones each time; gradients are not masked.

    left = floor(ratio N); for each tensor l in order: c_l = floor(left N_l / N) of its entries are zeroed, left -= c_l

`left` shrinks on the way, so less than the ratio is hit (`zeroed`). Uploads have at least that many zeros (a parameter
without gradient stays 0 once it is), at positions of each client's own; the averaged model has hardly any. Bytes, with
B buffer entries that travel, S replies a round and z_k entries of client k that are not 0:

    weights, train    4 (N + B) S down; up, of each, 4 (N + B), or ceil(N / 8) + 4 (z_k + B) with `bitmask_values`
    scalars, train    8 S up: n_k

The server's step is that of `fldist/masked.py`. Partition, what travels, cohort and initial model are the task's;
`rounds` counts federated rounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Mean
from fldist.kinds import Scalar, SparseWeights, Weights
from fldist.masked import server_step
from fldist.sparse import Kept


class Update(NamedTuple):
    """One client's reply."""

    y: SparseWeights  # theta_k with its zeros
    n: Scalar  # n_k, training examples held by the client


def zeroed(sizes: Sequence[int], ratio: float) -> list[int]:
    """c_l: how many entries of each tensor are set to 0; sizes: N_l."""
    total = sum(sizes)
    left = math.floor(ratio * total)
    counts = []
    for size in sizes:
        counts.append(math.floor(left * size / total))
        left -= counts[-1]
    return counts


@dataclass(frozen=True)
class RandomPruning(Algorithm):
    """FedAvg with random zeros after every local step."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.45
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9  # beta, server momentum as a moving average; 0: FedAvg
    encoding: Literal["auto", "dense", "bitmask_values", "index_values"] = "auto"  # of uploads

    def init_server(self, task: Task) -> State:
        """The model x, velocity v = 0."""
        x = task.init_params()
        return State(x=x, v=x.trainable.zeros_like())

    def round(self, server: Server, clients: Clients) -> None:
        """Send the dense model, train, average, step."""
        got = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")})
        server.x, server.v = server_step(server.x, got.y, server.v, self.beta, None)

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        """E epochs, zeros after every step."""
        slots = x.layout.params
        counts = zeroed([slot.numel for slot in slots], self.ratio)
        rng = data.streams.generator("prune")

        def after_step(theta: Tensor) -> None:
            for slot, count in zip(slots, counts, strict=True):
                chosen = torch.randperm(slot.numel, generator=rng)[:count].to(theta.device)
                theta[slot.offset : slot.offset + slot.numel][chosen] = 0.0

        y = data.train(x, after_step=after_step).params
        kept: Any = Kept(y, encoding=self.encoding)
        return Update(kept, data.n)
