"""TiFL: Z. Chai, A. Ali, S. Zawad, S. Truex, A. Anwar, N. Baracaldo, Y. Zhou, H. Ludwig, F. Yan, Y. Cheng, "TiFL: A
Tier-based Federated Learning System", HPDC 2020, arXiv 2001.09249, algorithm 2. The clients of a round are of one tier,
so that none waits for a much slower one; tiers on whose data the model is bad are chosen more often.

    setup    every client trains the initial model and tells how long it took; those over `limit` are never selected;
             the others, sorted by it, make up tiers of equal size
    a round  a tier with credits left is drawn by its probability, and loses one; K of its clients are drawn uniformly
    every I  A_t = accuracy of the global model on the clients of tier t; where that of the tier of the last round has
             not risen since the last time, the n tiers with credits left are ranked by A_t, the lowest first, and
             P_t = (n - rank) / (n (n - 1) / 2)

At first all tiers are equally likely. How far this is certain: from memory of the paper. Chosen here: tiers of equal
size (there, a histogram of latencies); a tier of less than K clients is filled up from those next to it, the faster one
first; when no tier has credits left, all are given anew; a client that does not answer in the setup is over any limit,
and in the slowest tier without one; A_t is the mean by samples on the part `split` of the clients' data.

Where the section `devices` simulates how long clients take, tiers are made of that, and not of what clients tell. They
train and are asked all the same, since a real server would have to: what that costs belongs to TiFL's bill. With
`profile: devices` nothing travels. Where nothing is simulated, the section `clock` times clients, under the labels
`client 0`, `client 1` ...; with a measured one two runs make different tiers.

Bytes, with N clients that hold samples, N_t of them in tiers, and B_w of the model that travels:

    weights, setup     N B_w down     times `profile_rounds`
    scalars, setup     8 N up         times `profile_rounds`: seconds
    weights, select    N_t B_w down   before the rounds I + 1, 2 I + 1, ...
    scalars, select    8 N_t up       before the rounds I + 1, 2 I + 1, ...: accuracies
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field

from fldist import scoring
from fldist.algorithm import Me, State, TooFewReplies, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Split, Task
from fldist.kinds import Scalar, Weights
from fldist.scoring import Positive
from fldist.selection import Candidates, Selector

Credits = Annotated[int, Field(ge=0)]


class Latency(NamedTuple):
    """One client's reply in the setup."""

    latency: Scalar  # seconds of its local training


class Accuracy(NamedTuple):
    """One client's reply before a round."""

    accuracy: Scalar  # of the global model on its own samples; NaN without any


def tiers_of(seconds: Mapping[int, float], tiers: int) -> list[list[int]]:
    """Clients in tiers, the fastest first: as many as asked for, or as there are clients; sizes differ by 1 at most."""
    order = sorted(seconds, key=lambda client: (seconds[client], client))
    count = min(tiers, len(order))
    ends = [math.ceil(len(order) * number / count) for number in range(count + 1)] if count else [0]
    return [sorted(order[begin:end]) for begin, end in itertools.pairwise(ends)]


def ranked(accuracies: Sequence[float], has_credits: Sequence[bool]) -> list[float]:
    """P_t of every tier: of those that have credits the lower the accuracy the more, of the others 0.

    A tier whose accuracy nobody knows (NaN) comes after the best.
    """
    able = [tier for tier, has in enumerate(has_credits) if has]
    able.sort(key=lambda tier: math.inf if math.isnan(accuracies[tier]) else accuracies[tier])
    n = len(able)
    chances = [0.0] * len(accuracies)
    for rank, tier in enumerate(able, start=1):
        chances[tier] = (n - rank) / (n * (n - 1) / 2) if n > 1 else 1.0
    return chances


@dataclass(frozen=True)
class Tifl(Selector):
    """The clients of a round are of one tier of latency."""

    tiers: Annotated[int, Field(ge=1)] = 5  # as many as clients, at most
    interval: Annotated[int, Field(ge=0)] = 20  # I, rounds from one scoring of tiers to the next; 0: never
    credits: Credits | Annotated[list[Credits], Field(min_length=1)] | None = (
        None  # rounds of every tier, or of each, the fastest first; null: any number
    )
    limit: Positive | None = None  # seconds over which a client is never selected
    profile: Literal["train", "devices"] = "train"  # where seconds come from: see above
    profile_rounds: Annotated[int, Field(ge=1)] = 1  # trainings whose mean counts
    split: Literal["auto", "train", "val", "test"] = "auto"  # auto: test where clients have one, else val, else train

    def check(self, task: Task) -> None:
        """Refuse a part that clients do not have, and credits that fit no tiers."""
        if self.split != "auto" and not task.has_part(self.split):
            raise ValueError(
                f"selection.split: clients have no {self.split} part; set task.split.{self.split}=0.1, or use auto"
            )
        given = [self.credits] if isinstance(self.credits, int) else self.credits
        if given is not None and not any(given):
            raise ValueError(f"selection.credits: {self.credits} lets no tier be selected; give one at least 1")
        if isinstance(self.credits, list) and len(self.credits) != self.tiers:
            raise ValueError(
                f"selection.credits: {len(self.credits)} numbers for {self.tiers} tiers; give one a tier, or one of all"
            )

    def _scored(self, task: Task) -> Split:
        """The part of a client's samples that a tier's accuracy is taken on."""
        if self.split != "auto":
            return self.split
        return "test" if task.has_part("test") else "val" if task.has_part("val") else "train"

    def init(self, candidates: Candidates) -> State:
        """The tiers, their credits, probabilities and accuracies (None before the setup); the last round's tier."""
        if self.profile == "devices" and not candidates.seconds:
            raise ValueError(
                "selection.profile: devices, but nothing says how long clients take; set devices.name=simulated, or "
                "use train"
            )
        return State(tiers=None, credits=None, chances=None, accuracies=None, tier=-1)

    def setup(self, state: State, candidates: Candidates) -> None:
        """Find out how long clients take, and make tiers."""
        seconds = self._profile(candidates)
        usable = {c: s for c, s in seconds.items() if self.limit is None or s <= self.limit}
        if not usable:
            fastest = min(seconds.values())
            raise ValueError(
                f"selection.limit: {self.limit:g} s, and no client is faster; the fastest takes {fastest:g} s: raise it"
            )
        if len(usable) < len(seconds):
            dropped = ", ".join(str(c) for c in seconds if c not in usable)
            few = "" if len(usable) >= candidates.count else f"; {len(usable)} are left for {candidates.count} places"
            candidates.warn(f"selection.limit: over {self.limit:g} s, and never selected: clients {dropped}{few}")
        state.tiers = tiers_of(usable, self.tiers)
        state.credits = self._all_credits(len(state.tiers))
        state.chances = [1.0 / len(state.tiers)] * len(state.tiers)
        state.accuracies = [math.nan] * len(state.tiers)

    def _profile(self, candidates: Candidates) -> dict[int, float]:
        """Seconds of every client; infinite where it did not answer."""
        told: dict[int, list[float]] = {c: [] for c in candidates.ids}
        if self.profile == "train":
            assert candidates.clients is not None
            for _ in range(self.profile_rounds):
                got = candidates.clients.only(candidates.ids).call(self.latency, x=candidates.model())
                for client, latency in got.latency.items():
                    told[client].append(latency)
        seconds = {}
        for c in candidates.ids:
            answers = [s for s in told[c] if 0 <= s < math.inf]
            seconds[c] = math.fsum(answers) / len(answers) if answers else math.inf
            if c in candidates.seconds and (answers or self.profile == "devices"):
                seconds[c] = candidates.seconds[c]
        return seconds

    def _all_credits(self, count: int) -> list[int] | None:
        if self.credits is None or isinstance(self.credits, int):
            return None if self.credits is None else [self.credits] * count
        # where there are fewer clients than tiers the slowest tiers are those that are not there
        return self.credits[:count] if any(self.credits[:count]) else None

    def select(self, state: State, candidates: Candidates) -> list[int]:
        """Score the tiers, if it is time; draw one, and its clients."""
        if self.interval and state.tiers and candidates.round > 1 and (candidates.round - 1) % self.interval == 0:
            self._score(state, candidates)
        tier, ids = self._draw(state, candidates, candidates.rng)
        if state.credits is not None:
            left = state.credits if any(state.credits) else self._all_credits(len(state.credits))
            assert left is not None
            state.credits = [n - (number == tier) for number, n in enumerate(left)]
        state.tier = tier
        candidates.log(tier=tier)
        return ids

    def propose(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        """A draw of a tier and its clients, at no cost of credits."""
        return self._draw(state, candidates, rng)[1]

    def _draw(self, state: State, candidates: Candidates, rng: torch.Generator) -> tuple[int, list[int]]:
        """A tier and K clients, ascending."""
        tiers = state.tiers or [list(candidates.ids)]
        able = self._able(state, len(tiers))
        chances = torch.tensor([1.0 if state.chances is None else state.chances[t] for t in able])
        tier = able[scoring.draw(chances, 1, rng)[0]]
        drawn: list[int] = []
        for near in sorted(range(len(tiers)), key=lambda t: (abs(t - tier), t)):
            members = tiers[near]
            places = candidates.count - len(drawn)
            drawn += [members[i] for i in scoring.draw(torch.ones(len(members)), places, rng)]
        return tier, sorted(drawn)

    def _able(self, state: State, count: int) -> list[int]:
        """The tiers that have credits left; all that ever had some where none has."""
        left = state.credits
        if left is not None and not any(left):
            left = self._all_credits(count)
        return [tier for tier in range(count) if left is None or left[tier]]

    def _score(self, state: State, candidates: Candidates) -> None:
        """Take the tiers' accuracies, and change their probabilities if that of the last one has not risen."""
        assert candidates.clients is not None and candidates.task is not None
        task, before = candidates.task, state.accuracies
        members = [c for tier in state.tiers for c in tier]
        told: Mapping[int, float] = {}
        with contextlib.suppress(TooFewReplies):
            told = candidates.clients.only(members).call(self.accuracy, x=candidates.model()).accuracy
        split = self._scored(task)
        accuracies = []
        for number, tier in enumerate(state.tiers):
            rows = [(task.count(c, split), told[c]) for c in tier if c in told and not math.isnan(told[c])]
            total = sum(n for n, _ in rows)
            accuracies.append(math.fsum(n * value for n, value in rows) / total if total else before[number])
        state.accuracies = accuracies
        if accuracies[state.tier] <= before[state.tier]:  # no, while there is nothing to compare with
            able = self._able(state, len(accuracies))
            state.chances = ranked(accuracies, [tier in able for tier in range(len(accuracies))])

    @on_client
    def latency(self, me: Me, data: ClientData, x: Weights) -> Latency:
        """Train as the section `local` says, by the clock."""
        _, seconds = data.clock.time(f"client {data.client}", lambda: data.train(x))
        return Latency(seconds)

    @on_client
    def accuracy(self, me: Me, data: ClientData, x: Weights) -> Accuracy:
        """Score the global model."""
        return Accuracy(data.evaluate(x, self._scored(data.task)).accuracy)
