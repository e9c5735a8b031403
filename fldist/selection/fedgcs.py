"""FedGCS: Z. Ning, C. Tian, M. Xiao, W. Fan, P. Wang, L. Li, P. Wang, Y. Zhou, "FedGCS: A Generative Framework for
Efficient Client Selection in Federated Learning via Gradient-based Optimization", IJCAI 2024, pages 4760-4768, arXiv
2405.06312. Who takes part in a round is generated, as text is, from what other selectors would choose.

    P   = sets proposed by the selectors of `pool`, each with its score y           `propose`
    fit   encoder, evaluator and decoder on P, every set in several orders          `generative/networks.py`
    e  <- unit(e + step df/de) from the embeddings of the best of P, decoded        `generative/search.py`
    S   = the set of highest y among the new sets and the best of P                 `select`

    y(S) = sum of u_i over S                                                        `client_sum`
    y(S) = (sum of U_i) min(1, T* / max t_i)^alpha min(1, E* / sum of e_i)^beta     `group`
    y(S) = gain in accuracy of a real round, times the same penalties               `measured`

All of this is at the server and sends nothing: with S clients a round moves what it moves under any other selector, the
algorithm's own messages and a report, and the generator's settings do not change a byte (B_w: bytes of the model):

    weights  down  |S| B_w,  up |S| B_w             (FedAvg; other algorithms: theirs)
    report   up    40 |S|
    setup          what the pool's selectors send in theirs: none with `cheap`; with favor 2 N B_w; with tifl, afl and
                   fedcor as their files say. Later the pool's selectors call nobody.

How it stands to what all systems share: the partition, what of a model travels and whether clients begin with a common
model are the run's, whatever the algorithm; `clients.rounding` rounds K; `rounds` are training rounds, of which the
first chooses uniformly, since nobody has reported yet, so that 2 is the least in which the generator is used.

With `client_sum` and sets of one size the K clients of largest u are the best there is (`topk`): search can only come
near it. `group` is not additive. Where the paper (P) and the published code (C) differ, or have what cannot be meant,
the default is said at the field; `configs/fedgcs/official.yaml` has the published values, and says what they do.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field
from torch import Tensor

from fldist import resolve, scoring
from fldist.algorithm import State
from fldist.data.task import Task
from fldist.generative.networks import Generator, fit, hamming, load_state, net_state, pairwise_accuracy
from fldist.generative.records import Records, labels, padded
from fldist.generative.search import Ascent, Decode, Target, search
from fldist.params import Params
from fldist.scoring import Utility
from fldist.selection import Candidates, Outcome, Selector, UtilEpochs

POOLS: dict[str, tuple[Any, ...]] = {
    "cheap": ("random", "oort", {"name": "topk"}),
    "paper": ("oort", "fedmarl", "favor"),
}
"""Pools by name: `cheap` sends nothing; `paper` is what the published main program calls (the figure has TiFL too)."""

ENUMERATED = 10_000
"""Up to so many sets of K clients all are scored, so that the log tells how near to the best the choice comes."""

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def pool_of(given: Any) -> tuple[Selector, ...]:
    """The selectors that `cheap`, or a list of `oort` and `{name: topk, noise: 0.2}`, means; made ones are returned.

    Made for pydantic's BeforeValidator: what is wrong is a ValueError whose location is the entry.
    """
    if isinstance(given, str):
        if given not in POOLS:
            raise ValueError(f"there is no pool {given!r}; use {', '.join(POOLS)}, or a list of selectors")
        given = POOLS[given]
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"it must be {', '.join(POOLS)}, or a list of at least one selector, such as [random, oort]")
    return tuple(_member(entry, number) for number, entry in enumerate(given))


def _member(given: Any, number: int) -> Selector:
    if isinstance(given, Selector):
        return given
    fields = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    name = fields.pop("name", None)
    at = str(number)
    if not isinstance(name, str):
        raise resolve.wrong(at, "it must be a selector such as oort, or {name: topk, noise: 0.2}", given)
    try:
        kind = resolve.from_package("fldist.selection", name, Selector, "name")
    except ValueError as error:
        raise resolve.wrong(at, str(error).removeprefix("name: "), name) from None
    if issubclass(kind, FedGCS):
        raise resolve.wrong(at, "fedgcs cannot propose to itself; leave it out", name)
    return resolve.component(kind, fields, name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Fitting:
    """How the networks are made and fitted.

    hidden: H; width, layers: M and how many hidden layers of the evaluator; lr, batch, clip: Adam's, a batch's rows,
    largest gradient norm; trade_off: a, the weight of the score's loss. epochs, later_epochs: of the first fit, and of
    those that go on from the one before. copies: permuted rows of a record besides the ascending one; online: drawn
    anew in each epoch. mask_padding: what stands behind a set's end is not pooled, attended to or learned (C: it is).
    length: tokens of a row, for the largest set and an end (`sets`), or as many as there are clients (`clients`: C).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    hidden: Count = 64
    width: Count = 200
    layers: Count = 2
    lr: Positive = 1e-3
    batch: Count = 1024
    clip: Positive = 5.0
    trade_off: Share = 0.8
    epochs: Count = 200
    later_epochs: Count = 20
    copies: Annotated[int, Field(ge=0)] = 3
    online: bool = True
    mask_padding: bool = True
    length: Literal["sets", "clients"] = "sets"


@dataclass(frozen=True)
class Searching:
    """How new sets are sought.

    starts: so many of the best records; ascent: `iterated` (P, figure): each step from where the last one led, or
    `single` (C): each from the start, of sizes step, 2 step, ...; target: the gradient is that of f (`logit`), or of
    sigmoid(f) (C).
    decode: `beam` of beam_width (P), `greedy`, or `official` (C): greedy with repeats and past the end token. enough:
    the search ends with so many new sets, null: after the last step. with_records: the best records may be chosen as
    well (C: not, so that the choice may be worse than what is known).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    starts: Count = 25
    ascent: Ascent = "iterated"
    steps: Count = 10
    step: Positive = 1.0
    target: Target = "logit"
    decode: Decode = "beam"
    beam_width: Count = 5
    enough: Count | None = None
    with_records: bool = True


@dataclass(frozen=True)
class FedGCS(Selector):
    """Fit a generator to scored sets and choose the best that it leads to. Works with every algorithm.

    `measured`: in the first `collect` rounds the pool's selectors choose in turn; then networks learn from all rounds
    so far, and choose by their own estimate, since no new set's score is known.
    """

    wants_reports: ClassVar[bool] = True

    pool: Annotated[tuple[Selector, ...], BeforeValidator(pool_of)] = field(default_factory=lambda: pool_of("cheap"))
    # a selector of the pool without a `utility` of its own has the one below
    proposals: Count = 25  # m, of each selector of the pool, in each round in which networks are fitted (C: 100)
    score: Literal["client_sum", "group", "measured"] = "client_sum"
    collect: Count = 10  # R_c
    size: Literal["exact", "range", "published"] = "exact"  # |S| = K; k_min..k_max; any (C), then the next round's K
    k_min: Count | None = None  # of `range`; null: 1
    k_max: Count | None = None  # of `range`; null: K
    utility: Utility = field(default_factory=Utility)
    repeated: Literal["newest", "first"] = "newest"  # which score of a set that is proposed twice (C: first)
    refresh_every: Annotated[int, Field(ge=0)] = 1  # rounds from fit to fit; 0: fitted once, then only searched with
    warm_start: bool = True  # a fit goes on with the networks of the one before (C: new ones)
    reseed: bool = False  # the same draws in every round (C: global seeds are set to 1 at each call)
    fitting: Fitting = field(default_factory=Fitting)
    searching: Searching = field(default_factory=Searching)

    def __post_init__(self) -> None:
        """Let selectors of the pool go by the same utility, where they go by one and none is set for them."""
        same: list[Selector] = []
        for member in self.pool:
            goes_by: Any = member
            takes = getattr(member, "utility", None) == Utility()
            same.append(dataclasses.replace(goes_by, utility=self.utility) if takes else member)
        object.__setattr__(self, "pool", tuple(same))

    # ---- what the pool needs
    @property
    def util_epochs(self) -> UtilEpochs:
        """As the utility says, for the pool's selectors as well."""
        return self.utility.epochs

    @property
    def wants_accuracy(self) -> bool:  # type: ignore[override]
        """Whether a score, or a selector of the pool, goes by it."""
        return self.score == "measured" or any(member.wants_accuracy for member in self.pool)

    @property
    def wants_models(self) -> bool:  # type: ignore[override]
        """Whether a selector of the pool looks at them."""
        return any(member.wants_models for member in self.pool)

    def client_methods(self) -> dict[str, Callable[..., Any]]:
        """The client halves of the pool's selectors."""
        return {
            f"{_name(member)}{number}.{name}": method
            for number, member in enumerate(self.pool)
            for name, method in member.client_methods().items()
        }

    def check(self, task: Task) -> None:
        """Refuse what the pool's selectors refuse, and a pool of which two look at models."""
        for member in self.pool:
            member.check(task)
        if sum(member.wants_models for member in self.pool) > 1:
            raise ValueError("selection.pool: two of its selectors look at clients' models; leave one of them")
        if self.size != "range" and (self.k_min or self.k_max):
            raise ValueError(f"selection.size: {self.size}, but k_min and k_max are bounds of range; use size: range")
        if self.searching.decode == "official" and self.size == "range":
            raise ValueError("selection.searching.decode: official keeps no bounds; use beam or greedy with range")

    def init(self, candidates: Candidates) -> State:
        """pool: the states of its selectors; known: what clients have reported (`scoring.begin`); networks: weights and
        Adam's moments, or none; fitted: the round of the last fit, 0: none; count: K; sets, gains: what `measured` has
        measured; accuracy: of the round before."""
        low, high = self.bounds(candidates.count, len(candidates.ids))
        if not low <= high <= len(candidates.ids):
            raise ValueError(
                f"selection.k_min, k_max: {low} to {high} of {len(candidates.ids)} clients that hold samples; use "
                "1 <= k_min <= k_max, and no more than there are"
            )
        return State(
            pool=[member.init(candidates) for member in self.pool],
            known=scoring.begin(candidates.num_clients),
            networks={},
            fitted=0,
            count=candidates.count,
            sets=[],
            gains=[],
            accuracy=None,
        )

    def setup(self, state: State, candidates: Candidates) -> None:
        """What the pool's selectors do in theirs."""
        self._each(state, lambda member, own: member.setup(own, candidates))

    def digest(self, state: State, model: Params) -> Tensor:
        """As the pool's selector that looks at models."""
        for member, own in zip(self.pool, state.pool, strict=True):
            if member.wants_models:
                return member.digest(own, model)
        raise AssertionError("no selector of the pool wants models")

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        """Learn from the round, and let every selector of the pool learn from it."""
        if self.score == "measured" and outcome.accuracy is not None:
            if outcome.replied and state.accuracy is not None:
                state.sets = [*state.sets, list(outcome.replied)]
                gain = outcome.accuracy - state.accuracy
                seconds, joules = self._preferred(state, candidates)
                alpha, beta = self.utility.alpha, self.utility.beta
                score = scoring.measured_score(gain, outcome.seconds, outcome.joules, seconds, joules, alpha, beta)
                state.gains = [*state.gains, score]
            state.accuracy = outcome.accuracy
        state.known = self.utility.learn(state.known, outcome)
        self._each(
            state,
            lambda member, own: member.observe(
                own, candidates, outcome if member.wants_models else dataclasses.replace(outcome, models={})
            ),
        )

    def _each(self, state: State, step: Callable[[Selector, State], None]) -> None:
        """Do something with every selector of the pool, and keep what it makes of its state."""
        states = [own.copy() for own in state.pool]
        for member, own in zip(self.pool, states, strict=True):
            step(member, own)
        state.pool = states

    # ---- the choice
    def bounds(self, count: int, num: int) -> tuple[int, int]:
        """The least and the largest set, of `num` clients, where K is `count`."""
        if self.size == "range":
            return self.k_min or 1, self.k_max or count
        return (count, count) if self.size == "exact" else (1, num)

    def select(self, state: State, candidates: Candidates) -> list[int]:
        """Collect records, fit, search, and take the set of highest score."""
        if self.size == "published":
            candidates = dataclasses.replace(candidates, count=min(state.count, len(candidates.ids)))
        chosen = self._choose(state, candidates)
        if self.size == "published":
            state.count = len(chosen)
        return chosen

    def propose(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        """What it would select, were these its draws."""
        return self.select(state.copy(), dataclasses.replace(candidates, rng=rng))

    def _choose(self, state: State, candidates: Candidates) -> list[int]:
        ids, number = list(candidates.ids), candidates.round
        low, high = self.bounds(candidates.count, len(ids))
        rng = candidates.rng if not self.reseed else _generator(1)
        if low == len(ids):
            return ids
        if self.score == "measured" and number <= self.collect:
            turn = (number - 1) % len(self.pool)
            return self.pool[turn].propose(state.pool[turn], candidates, _child(rng)) or _uniform(candidates, rng)
        if number == 1 or bool((state.known.last == 0).all()):  # nobody has reported: all sets are alike
            return _uniform(candidates, rng)
        records = self.records(state, candidates, rng)
        if not len(records):
            candidates.warn(
                "no selector of the pool has proposed a set that can be scored; clients are drawn at random"
            )
            return _uniform(candidates, rng)
        if candidates.predicting:
            return list(records.best(1)[0])
        place = {client: token for token, client in enumerate(ids)}
        tokens = Records(self.repeated)
        for members, score in records.items():
            tokens.add([place[c] for c in members], score)
        net, scores = self._fitted(state, candidates, tokens, rng)
        found = self._found(net, tokens, candidates)
        sets = [tuple(ids[t] for t in members) for members in found if low <= len(members) <= high]
        best = [s for s in records.best(self.searching.starts) if low <= len(s) <= high]
        if self.searching.with_records or not sets:
            sets = [*sets, *best]
        if not sets:
            return _uniform(candidates, rng)
        if self.score == "measured":
            rows = padded([tuple(place[c] for c in s) for s in sets], self._length(candidates), len(ids))
            values = _estimates(net, rows)
        else:
            values = self.scores(sets, state, candidates)
        chosen = list(sets[int(values.argmax())])
        self._log(candidates, state, records, chosen, float(values.max()), len(found), scores, net, tokens)
        return chosen

    def records(self, state: State, candidates: Candidates, rng: torch.Generator) -> Records:
        """What the pool proposes, of clients that are there, with the score of each set; `measured`: what was measured.

        Sets that the generator's rows cannot hold, and scores that are no numbers, are left out.
        """
        records = Records(self.repeated)
        if self.score == "measured":
            for members, score in zip(state.sets, state.gains, strict=True):
                if math.isfinite(score) and len(members) < self._length(candidates):
                    records.add(members, score)
            return records
        proposed: list[tuple[int, ...]] = []
        for member, own in zip(self.pool, state.pool, strict=True):
            draws = _child(rng) if not self.reseed else _generator(1)
            for _ in range(self.proposals):
                proposed.append(tuple(sorted(member.propose(own, candidates, draws))))
        longest = self._length(candidates)
        fits = [s for s in proposed if s and (len(s) < longest or longest == len(candidates.ids))]
        for members, score in zip(fits, self.scores(fits, state, candidates).tolist(), strict=True):
            if math.isfinite(score):
                records.add(members, score)
        return records

    def scores(self, sets: Sequence[Sequence[int]], state: State, candidates: Candidates) -> Tensor:
        """y [C] of sets of clients, from what they have reported; not of `measured`, which is known of rounds alone."""
        matrix = torch.zeros(len(sets), candidates.num_clients, dtype=torch.float64)
        at = [row for row, members in enumerate(sets) for _ in members]
        matrix[at, [client for members in sets for client in members]] = 1.0
        if self.score == "client_sum":
            return scoring.additive_score(matrix, self.utility.of(state.known, candidates))
        worth = self.utility.statistical(state.known, candidates)
        seconds, joules = self.utility.costs(state.known, candidates)
        preferred = self._preferred(state, candidates)
        return scoring.group_score(matrix, worth, seconds, joules, *preferred, self.utility.alpha, self.utility.beta)

    def _preferred(self, state: State, candidates: Candidates) -> tuple[float, float]:
        """T* of a round, and E* of all its clients: K times that of one."""
        seconds, joules = self.utility.preferred(state.known, candidates)
        return seconds, candidates.count * joules

    # ---- the generator
    def _length(self, candidates: Candidates) -> int:
        """T, tokens of a row: for the largest set and an end token, or as many as clients."""
        _, high = self.bounds(candidates.count, len(candidates.ids))
        return len(candidates.ids) if self.fitting.length == "clients" else high + 1

    def _fitted(
        self, state: State, candidates: Candidates, records: Records, rng: torch.Generator
    ) -> tuple[Generator, Tensor]:
        """The networks, fitted to the records where it is time; and the records' labels."""
        how, number = self.fitting, candidates.round
        draws = _child(rng) if not self.reseed else _generator(1)
        net = Generator(len(candidates.ids), how.hidden, how.width, how.layers, how.mask_padding, rng=draws)
        optimizer = torch.optim.Adam(net.parameters(), lr=how.lr)
        sets = [members for members, _ in records.items()]
        targets = labels(torch.tensor([score for _, score in records.items()], dtype=torch.float64)).float()
        held = bool(state.networks)
        due = not held or (self.refresh_every > 0 and number - state.fitted >= self.refresh_every)
        if held and (self.warm_start or not due):
            load_state(net, optimizer, state.networks)
        if due:
            losses = fit(
                net,
                optimizer,
                sets,
                targets,
                epochs=how.later_epochs if held and self.warm_start else how.epochs,
                batch=how.batch,
                trade_off=how.trade_off,
                clip=how.clip,
                copies=how.copies,
                length=self._length(candidates),
                online=how.online,
                rng=draws,
            )
            candidates.log(generator_loss=losses.total)
            state.fitted = number
            if self.warm_start or self.refresh_every != 1:
                state.networks = net_state(net, optimizer)
        net.eval()
        return net, targets

    def _found(self, net: Generator, records: Records, candidates: Candidates) -> list[tuple[int, ...]]:
        how = self.searching
        low, high = self.bounds(candidates.count, len(candidates.ids))
        return search(
            net,
            records.best(how.starts),
            {members for members, _ in records.items()},
            length=self._length(candidates),
            ascent=how.ascent,
            steps=how.steps,
            step=how.step,
            target=how.target,
            decode=how.decode,
            width=how.beam_width,
            low=low,
            high=high,
            wanted=how.enough,
        )

    def _log(
        self,
        candidates: Candidates,
        state: State,
        records: Records,
        chosen: list[int],
        score: float,
        found: int,
        targets: Tensor,
        net: Generator,
        tokens: Records,
    ) -> None:
        """What the round's line of rounds.jsonl tells of the generator.

        sorted_score: y of the K clients of largest u, which is the most that there is under client_sum, or under group of
        largest U_i times the penalties of each, which is what a sort can make of it; best_score: the most that there is
        under group, where all sets of K can be tried.
        """
        ids, count = list(candidates.ids), candidates.count
        rows = padded([members for members, _ in tokens.items()], self._length(candidates), len(ids))
        values = {
            "records": len(records),
            "new_sets": found,
            "set_score": score,
            "record_score": max(y for _, y in records.items()),
            "pairwise_accuracy": pairwise_accuracy(targets, _estimates(net, rows).float()),
            "hamming": hamming(net, rows),
        }
        if self.score != "measured":
            # a set of one client is worth its u, or its U_i times its penalties
            alone = self.scores([[c] for c in ids], state, dataclasses.replace(candidates, count=1))
            largest = [ids[i] for i in alone.topk(count).indices.tolist()]
            values["sorted_score"] = float(self.scores([largest], state, candidates))
        if self.score == "group" and math.comb(len(ids), count) <= ENUMERATED:
            every = list(itertools.combinations(ids, count))
            values["best_score"] = float(self.scores(every, state, candidates).max())
        candidates.log(**values)


def _estimates(net: Generator, rows: Tensor) -> Tensor:
    """What the evaluator makes of rows of tokens, [B]."""
    with torch.no_grad():
        h, m = net.encode(rows)
        return net.value(net.pool(h, m)).sigmoid().double()


def _name(selector: Selector) -> str:
    """What a selector is called: its module's name."""
    return type(selector).__module__.rpartition(".")[2]


def _uniform(candidates: Candidates, rng: torch.Generator) -> list[int]:
    """K clients, each set equally likely."""
    order = torch.randperm(len(candidates.ids), generator=rng)[: candidates.count]
    return sorted(candidates.ids[i] for i in order.tolist())


def _generator(seed: int) -> torch.Generator:
    made = torch.Generator()
    made.manual_seed(seed)
    return made


def _child(rng: torch.Generator) -> torch.Generator:
    """A generator of its own, so that how much one draws changes nothing for the next."""
    return _generator(int(torch.randint(1 << 62, (1,), generator=rng)))
