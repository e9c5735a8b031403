"""LotteryFL: A. Li, J. Sun, B. Wang, L. Duan, S. Li, Y. Chen, H. Li, "LotteryFL: Personalized and
Communication-Efficient Federated Learning with Lottery Ticket Hypothesis on Non-IID Datasets", arXiv 2008.03371. Every
client has a mask of its own, which it makes sparser as long as the submodel that it gets serves its own data; only
submodels travel, and a parameter is averaged over the clients that hold it.

    x_k = x m_k                                  what client k is sent; m_k is all ones at first
    if accuracy_k(x_k) > threshold and density(m_k) > target:
        m_k <- m_k without the share `prune` of smallest weights, for each tensor        `pruned_further`
        x_k <- theta_0 m_k                       the kept ones go back to their initial values
    y_k = x_k after E epochs under m_k
    x_i <- mean of y_ki over the clients of the round with m_ki = 1; x_i stays where there is none

A client's personal model is x m_k: the global model under its own mask. `eval.where: clients` (or `both`) scores it.

How far this is certain: the steps are from memory of the paper, and were then compared with the code published for it
(charleslipku/LotteryFL). From that code come: each tensor is pruned on its own, by the linearly interpolated quantile
of its kept |x_k|, strictly below which a weight goes; biases are kept; the mean is unweighted. It takes the accuracy on
the client's test data, here it is that on the part `split`. Its commands prune 20 or 30 % at a time, from an accuracy
of 0.1 to 0.7 on, until 10 or 50 % are left; the defaults here are 10 %, 0.5 and 10 %. Density is looked at before
pruning, and so ends up to one step below the target. Tensors of one dimension (biases, normalisation) are kept whole
here, and the density is that of the others; there a normalisation's weight is pruned as well.

Bytes, with S clients a round, N parameters of which client k holds z_k, B buffer entries that travel (a counter is
two), and enc(z) = min(4 N, ceil(N / 8) + 4 z, 8 z) with `encoding: auto`:

    weights, train      (enc(z_k) + 4 B) S down, by the masks before the round, and up, by those after it
    weights, train      4 (N + B) down to a client at its first contact: theta_0, which a reset needs
    weights, evaluate   (enc(z_k) + 4 B) to every client that scores its personal model

A held weight that is exactly 0 travels as -0, so that it is not taken for one that is not held. Each client's download
is its own, and holds its mask again, which the client has: no argument differs by client and is remembered by it.

Options of the shared laws: any partition; clients need a part of their own to decide by (`task.split.val` or `.test`);
`task.travel` says whether buffers are exchanged, which all clients hold; cohorts are rounded down; one common initial
model, from the run's seed; `rounds` counts federated rounds. The server knows each client's mask, from its replies, and
the clients keep theirs; both change only where a reply was accepted and the round counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fldist.algorithm import Algorithm, Clients, ClientScores, Me, Replies, Server, State, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Split, Task
from fldist.fold import Accumulator, FixedPoint, Fold, FoldContext, collect
from fldist.kinds import Each, Once, SparseWeights, Weights
from fldist.params import Layout, Params
from fldist.pruning.masks import Eligible, quantile
from fldist.sparse import Kept, pack, unpack

Own = Literal["auto", "dense", "bitmask_values", "index_values"]

PRUNABLE = Eligible(one_d=False)


def density(keep: Tensor, layout: Layout) -> float:
    """Share of the weights that a mask bool [N] keeps, of the tensors that are pruned."""
    slots = PRUNABLE.slots(layout)
    kept = sum(int(keep[slot.offset : slot.offset + slot.numel].sum()) for slot in slots)
    return kept / sum(slot.numel for slot in slots)


def pruned_further(keep: Tensor, weights: Tensor, layout: Layout, share: float) -> Tensor:
    """The mask bool [N] without the weights [N] that are smaller than the `share`-quantile of their tensor's kept ones.

    Of n kept ones with distinct magnitudes ceil(share (n - 1)) go.
    """
    new = keep.clone()
    for slot in PRUNABLE.slots(layout):
        place = slice(slot.offset, slot.offset + slot.numel)
        magnitudes = weights[place].abs().double()
        new[place] &= magnitudes >= quantile(magnitudes[keep[place]], share)
    return new


def marked(params: Params, keep: Tensor) -> Params:
    """A model under a mask bool [N], of which what is held is told from what is not: held zeros are -0, others +0."""
    made = params.clone()
    floats = made.trainable.floats
    floats.masked_fill_(floats == 0.0, -0.0)
    floats.masked_fill_(~keep, 0.0)
    return made


def held(params: Params) -> Tensor:
    """The mask bool [N] of a marked model."""
    return params.trainable.floats.view(torch.int32) != 0


class Submodels(NamedTuple):
    """What the clients of a round sent."""

    mean: Params  # of every parameter, over the clients that hold it; 0 where there is none
    holders: Tensor  # int64 [N], how many hold it
    masks: dict[int, Tensor]  # by client: its mask, bits


@dataclass(frozen=True)
class MeanOfHolders(Fold):
    """Submodels, in any order of arrival."""

    like: str = "x0"

    def begin(self, context: FoldContext) -> Accumulator:
        """Start a mean."""
        return _Holders(context)


class _Holders(FixedPoint):
    """A sum, and how many clients have added to each of its entries."""

    def __init__(self, context: FoldContext) -> None:
        super().__init__(context, divide=True)
        self.holders = torch.zeros(self.reference.layout.num_params, dtype=torch.int64, device=self.reference.device)
        self.masks: dict[int, Tensor] = {}

    def add(self, client: int, value: Params, weight: float) -> None:
        """Add a submodel."""
        super().add(client, value, weight)
        keep = held(value)
        self.holders += keep.to(self.holders)
        self.masks[client] = pack(keep.cpu())

    def remove(self, client: int, value: Params, weight: float) -> None:
        """Take a submodel back."""
        super().remove(client, value, weight)
        self.holders -= unpack(self.masks.pop(client), len(self.holders)).to(self.holders)

    def result(self) -> Any:
        """The means and who holds what."""
        mean: Params = super().result()
        sums = self.floats[: len(self.holders)].double().mul_(math.ldexp(1.0, -self.exponent))
        mean.trainable.floats.copy_(sums.mul_(self.bound).div_(self.holders.clamp(min=1)))
        return Submodels(mean, self.holders, dict(sorted(self.masks.items())))


class Update(NamedTuple):
    """One client's reply."""

    y: SparseWeights  # y_k, marked


@dataclass(frozen=True)
class LotteryFl(Algorithm):
    """Every client prunes a mask of its own; parameters are averaged over the clients that hold them."""

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5  # accuracy of the submodel above which a client prunes
    prune: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of each tensor's kept weights that goes at a time
    target: Annotated[float, Field(ge=0, lt=1)] = 0.1  # density at which a client stops pruning
    split: Literal["auto", "val", "test"] = "auto"  # part that decides; auto: val where clients have one, else test
    encoding: Own = "auto"  # of submodels; see `fldist/sparse.py`

    def check(self, task: Task) -> None:
        """Refuse clients without a part of their own to decide by, and a model without weights to prune."""
        super().check(task)
        PRUNABLE.check(task.init_params().layout)
        split = self.decides(task)
        if not getattr(task.split, split):
            raise ValueError(
                f"algorithm.split: clients decide by their accuracy on a part of their own, and have no {split} part; "
                f"set task.split.{split}=0.1"
            )

    def decides(self, task: Task) -> Split:
        """The part of a client's samples that decides whether it prunes."""
        if self.split == "auto":
            return "val" if task.split.val or not task.split.test else "test"
        return self.split

    def init_server(self, task: Task) -> State:
        """The model x, and the masks (bits) of the clients that have taken part."""
        return State(x=task.init_params(), masks={})

    def init_client(self, task: Task, client: int) -> State:
        """The client's mask m_k, bits; None: all ones."""
        return State(mask=None)

    def submodel(self, server: Server, client: int) -> Kept:
        """x m_k, as it travels."""
        return Kept(marked(server.x, self.keep(server.masks.get(client), server.x)), encoding=self.encoding)

    def keep(self, mask: Tensor | None, x: Params) -> Tensor:
        """A mask bool [N] of its bits, for a model."""
        n = x.layout.num_params
        return torch.ones(n, dtype=torch.bool, device=x.device) if mask is None else unpack(mask, n)

    def round(self, server: Server, clients: Clients) -> None:
        """Send submodels, let clients prune and train, average what each parameter's holders sent."""
        cohort = clients.selected()
        got = cohort.call(
            self.update,
            x0=Once(server.task.init_params(), 0),
            x=Each({client: self.submodel(server, client) for client in cohort.ids}),
            fold={"y": MeanOfHolders()},
        )
        sent: Submodels = got.y
        new = sent.mean
        floats = new.trainable.floats
        floats.copy_(torch.where(sent.holders > 0, floats, server.x.trainable.floats))
        server.x, server.masks = new, {**server.masks, **sent.masks}
        layout = new.layout
        of_clients = [density(unpack(mask, layout.num_params), layout) for mask in sent.masks.values()]
        server.log(density=sum(of_clients) / len(of_clients))

    @on_client
    def update(self, me: Me, data: ClientData, x0: Weights, x: SparseWeights) -> Update:
        """Prune if the submodel is good enough; E epochs under the mask."""
        keep = self.keep(me.mask, x)
        accuracy = data.evaluate(x, self.decides(data.task)).accuracy  # NaN without samples, which exceeds nothing
        if accuracy > self.threshold and density(keep, x.layout) > self.target:
            keep = pruned_further(keep, x.trainable.floats, x.layout, self.prune)
            me.mask = pack(keep)
            x = x.clone()
            x.write(x0.trainable)
        y: Any = Kept(marked(data.train(x, mask=keep).params, keep), encoding=self.encoding)
        return Update(y)

    # ---- scoring
    def evaluate(self, server: Server, clients: Clients) -> Replies:
        """Let clients score their personal models, which are sent to them for it, or another one."""
        if self.scoring(server.task).model != "personal":
            return super().evaluate(server, clients)
        cohort = self.scored_clients(server, clients)
        model = Each({client: self.submodel(server, client) for client in cohort.ids})
        return cohort.call(self.evaluate_client, model=model, fold={"scores": collect()}, phase="evaluate")

    @on_client
    def evaluate_client(self, me: Me, data: ClientData, model: SparseWeights | None) -> ClientScores:
        """Score the model that was sent for it, or the one sent for training in this round."""
        me.scratch.model = model
        return super().evaluate_client(me, data, model)

    def personal_model(self, me: Me, data: ClientData) -> Params:
        """x m_k, as it was just sent: a client does not keep the global model."""
        model: Params = me.scratch.model
        return model
