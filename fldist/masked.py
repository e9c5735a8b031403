"""Federated averaging of a model of which a mask keeps a part: what the algorithms with masks have in common.

    Delta = sum_k p_k (theta - theta_k)     p_k = n_k / sum_j n_j; theta is the model that was sent
    v     = beta v + (1 - beta) Delta       v = Delta where beta is 0; v starts at 0, without correction
    theta = theta - v                       no step size of the server's

over the parameters that the mask keeps; the others stay as they are, theta and v alike, and clients get them as 0.
Buffers are averaged. How a mask comes to be is the business of `algorithms/`; what travels of a masked model, of
`fldist/sparse.py`.

Bytes (N parameters, z of them kept, B buffer entries that travel, S clients that reply, 4 bytes a value):

    weights, train      (enc(z) + 4 B) S up and down, each round; enc(z) = 4 z (`values`), see `fldist/sparse.py`
    masks, mask         ceil(N / 8) to every client, once for each mask (`mask_delivery: broadcast`)
    masks, train        ceil(N / 8) to a client at its first contact with a mask (`mask_delivery: first_contact`)
    scalars, train      8 S up: n_k
    weights, evaluate   (enc(z) + 4 B) to every client that scores the global model
    masks, evaluate     ceil(N / 8) to a client whose first contact with a mask this is
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fldist.algorithm import (
    Algorithm,
    Books,
    Clients,
    ClientScores,
    Me,
    Replies,
    Server,
    State,
    TooFewReplies,
    on_client,
)
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Mean, collect
from fldist.kinds import MaskedWeights, Masks, Once, Scalar
from fldist.params import Params
from fldist.pruning.flops import TrainingFlops
from fldist.pruning.masks import num_zeros
from fldist.sparse import Choice, Kept, pack, unpack


class Update(NamedTuple):
    """One client's reply."""

    y: MaskedWeights  # theta_k, 0 where the mask closes
    n: Scalar  # n_k, training examples held by the client


def server_step(x: Params, mean: Params, v: Params, beta: float, keep: Tensor | None) -> tuple[Params, Params]:
    """The new model and velocity: the equations above with Delta = x - mean, where keep [N] (None: everywhere).

    x: the model of the server; mean: of the clients' models, buffers included; v: velocity [N].
    """
    before, new = x.trainable.floats, mean.clone()
    after = new.trainable.floats  # becomes the new theta in place: with millions of them, memory is what takes time
    velocity = before - after
    if beta != 0.0:
        velocity = velocity.mul_(1.0 - beta).add_(beta * v.floats)
        torch.sub(before, velocity, out=after)
    if keep is not None:
        torch.where(keep, after, before, out=after)
        velocity = torch.where(keep, velocity, v.floats)
    return new, Params(v.layout, velocity)


def break_even(before: float, dense: float, sent: float) -> float:
    """R* = before / (dense - sent): rounds until what was sent before them is saved; infinite where nothing is saved.

    All in bytes: before round 1, of a round of FedAvg, of a round.
    """
    return before / (dense - sent) if dense > sent else math.inf


def numbered(last: int, mask: Tensor | None) -> int:
    """The version of a mask (bits) that follows the one of this version: a count, and 40 bits of a hash of the mask.

    The count alone would not do: an attempt that is done again may find another mask, since others replied, and hosts
    hold the one of the attempt that is void.
    """
    digest = b"" if mask is None else hashlib.sha256(mask.numpy().tobytes()).digest()[:5]
    return ((last >> 40) + 1) << 40 | int.from_bytes(digest, "little")


def pruned(x: Params, keep: Tensor) -> Params:
    """The model with 0 where a mask bool [N] does not keep."""
    made = x.clone()
    made.trainable.floats.masked_fill_(~keep, 0.0)
    return made


@dataclass(frozen=True)
class MaskedAveraging(Algorithm):
    """Base: a subclass gives a mask in `setup` (`put_mask`), or for each round (`mask_for_round`); or all is kept."""

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9  # beta, server momentum as a moving average; 0: FedAvg
    encoding: Choice = "values"  # of masked models; see `fldist/sparse.py`
    mask_delivery: Literal["broadcast", "first_contact"] = "broadcast"  # to all clients at once, or to who takes part
    compact: bool = False  # clients train the network that is left when units without weights are taken out

    def init_server(self, task: Task) -> State:
        """The model x, velocity v = 0, no mask yet; says it where the operations of training cannot be counted."""
        try:
            task.macs()
        except ValueError as error:
            task.notes.append(f"the operations of training are not counted: {error}")
        x = task.init_params()
        return State(x=x, v=x.trainable.zeros_like(), mask=None, version=0, flops={})

    def round(self, server: Server, clients: Clients) -> None:
        """A round under the mask of the setup."""
        self.masked_round(server, clients)

    def put_mask(self, server: Server, clients: Clients, keep: Tensor) -> None:
        """Take a mask bool [N] for the rounds to come; it is told to everybody, or goes to who takes part."""
        self.mask_for_round(server, keep)
        if server.mask is not None and self.mask_delivery == "broadcast":
            # who does not answer (for want of time, say) is sent the mask with the next message that rests on it
            with contextlib.suppress(TooFewReplies):
                clients.all().call(self.hold, mask=self.mask_of(server), phase="mask")

    def mask_for_round(self, server: Server, keep: Tensor) -> None:
        """Take a mask bool [N] that goes with the messages of this round."""
        server.mask = None if bool(keep.all()) else pack(keep)
        server.version = numbered(server.version, server.mask)

    def mask_of(self, server: Server) -> Once[Tensor] | None:
        """The mask as an argument: sent to who does not hold it."""
        return None if server.mask is None else Once(server.mask, server.version, "mask")

    def sent(self, server: Server) -> Kept | Params:
        """The model as it travels."""
        return server.x if server.mask is None else Kept(server.x, server.mask, self.encoding)

    def keep_of(self, server: Server) -> Tensor | None:
        """The mask bool [N], or None where all is kept."""
        return None if server.mask is None else unpack(server.mask, server.x.layout.num_params)

    def model(self, server: Server) -> Params:
        """theta under the mask."""
        return server.x if server.mask is None else Kept(server.x, server.mask).value

    def masked_round(self, server: Server, clients: Clients) -> Replies:
        """Send the kept part, train, average, step."""
        got = clients.selected().call(
            self.update, x=self.sent(server), mask=self.mask_of(server), fold={"y": Mean(by="n")}
        )
        server.x, server.v = server_step(server.x, got.y, server.v, self.beta, self.keep_of(server))
        self.log_sparsity(server)
        self.count_flops(server, sum(int(n) for n in got.n.values()))
        return got

    def log_sparsity(self, server: Server) -> None:
        """Zeros among the N parameters of the global model, N over those that are not, and the share that is kept."""
        total, zeros, keep = server.x.layout.num_params, num_zeros(self.model(server)), self.keep_of(server)
        density = 1.0 if keep is None else int(keep.count_nonzero()) / total
        server.log(density=density, sparsity=zeros / total, compression_rate=total / max(1, total - zeros))

    def count_flops(self, server: Server, samples: int) -> None:
        """Log what a round of training on so many samples costs, and add it up; nothing where it cannot be counted."""
        task, keep = server.task, self.keep_of(server)
        try:
            macs = task.macs()
        except ValueError:  # `init_server` has said so
            return
        compacted = task.macs(keep) if self.compact and keep is not None else None
        cost = TrainingFlops.of(macs, keep, compacted).times(samples, task.local.epochs)
        told = {f"flops_{name}": value for name, value in dataclasses.asdict(cost).items()}
        server.log(**told)
        server.flops = {name: value + server.flops.get(name, 0) for name, value in told.items()}

    def summary(self, server: Server, books: Books) -> dict[str, float]:
        """What the masks cost and save, in bytes of weights and masks, and the operations of all training.

        break_even_round: after how many rounds less was sent than by FedAvg with as many replies; beyond the last
        round it is where the run would have come to. flops_*: see `fldist/pruning/flops.py`; exploration is in them.
        """
        masks, weights = books.total("train", kind="masks"), books.total("train", kind="weights")
        if not self.mask_each_round:  # a client that scores first trains under the mask that it got for that
            masks += books.total("evaluate", kind="masks")
        before = books.total("explore", kind="weights") + books.total("mask", kind="masks")
        rounds = max(1, books.rounds)
        each = weights + (masks if self.mask_each_round else 0)
        before += masks if not self.mask_each_round else 0
        dense = 2 * server.x.nbytes * sum(books.replied)
        explored = {"flops_exploration": self.flops_before(server)} if server.flops else {}
        return {
            "bytes_before_rounds": before,
            "bytes_per_round": each / rounds,
            "fedavg_bytes_per_round": dense / rounds,
            "break_even_round": break_even(before, dense / rounds, each / rounds),
            **{name: value + explored["flops_exploration"] for name, value in server.flops.items()},
            **explored,
        }

    @property
    def mask_each_round(self) -> bool:
        """Whether masks are part of what a round sends."""
        return False

    def flops_before(self, server: Server) -> int:
        """Operations of training before round 1."""
        return 0

    @on_client
    def hold(self, me: Me, data: ClientData, mask: Masks) -> None:
        """Get a mask that later messages rest on."""

    @on_client
    def update(self, me: Me, data: ClientData, x: MaskedWeights, mask: Masks | None) -> Update:
        """E epochs under the mask: gradients and, after every step, parameters are multiplied by it."""
        keep = None if mask is None else unpack(mask, x.layout.num_params)
        y = data.train(x, mask=keep, compact=self.compact and keep is not None).params
        return Update(self.kept(y, mask), data.n)

    def kept(self, y: Params, mask: Tensor | None) -> Any:
        """A client's model as it travels."""
        return y if mask is None else Kept(y, mask, self.encoding)

    def evaluate(self, server: Server, clients: Clients) -> Replies:
        """Let clients score the global model, of which the kept part is sent."""
        if self.scoring(server.task).model != "global":
            return super().evaluate(server, clients)
        return self.scored_clients(server, clients).call(
            self.evaluate_masked,
            x=self.sent(server),
            mask=self.mask_of(server),
            fold={"scores": collect()},
            phase="evaluate",
        )

    @on_client
    def evaluate_masked(self, me: Me, data: ClientData, x: MaskedWeights, mask: Masks | None) -> ClientScores:
        """Score the model that was sent."""
        return self.evaluate_client(me, data, x)
