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
    setup          what the pool's selectors send in theirs: none with `cheap`; with favor 2 N B_w; with tifl and afl as
                   their files say. Later they call nobody, but for the warm-up of fedcor: N (B_w + 8) in each of its
                   w + 1 rounds, phase `select`

How it stands to what all systems share: the partition, what of a model travels and whether clients begin with a common
model are the run's, whatever the algorithm; `clients.rounding` rounds K; `rounds` are training rounds, of which the
first chooses uniformly, since nobody has reported yet, so that 2 is the least in which the generator is used.

With `client_sum` and sets of one size the K clients of largest u are the best there is (`topk`): search can only come
near it. `group` is not additive. Where the paper (P) and the published code (C) differ, or have what cannot be meant,
the default is said at the field; `configs/fedgcs/official.yaml` has the published values, and says what they do.

Where the section `devices` simulates nothing, t is measured, and two runs choose differently, unless the section
`clock` is scripted or alpha is 0, here and in the pool: `utility: {alpha: 0}, pool: [random, {name: oort, alpha: 0},
topk]`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field
from torch import Tensor

from fldist import resolve, scoring
from fldist.algorithm import State
from fldist.data.task import Task
from fldist.generative.networks import Generator, adam, fit, hamming, load_state, net_state, pairwise_accuracy
from fldist.generative.records import Records, labels, padded
from fldist.generative.search import Ascent, Decode, Target, search
from fldist.params import Params
from fldist.scoring import Utility
from fldist.selection import Candidates, Outcome, Selector, UtilEpochs, uniform

POOLS: dict[str, tuple[str, ...]] = {"cheap": ("random", "oort", "topk"), "paper": ("oort", "fedmarl", "favor")}
"""Pools by name: `cheap` sends nothing; `paper` is what the published main program calls (the figure has TiFL too)."""

_ENTRIES = 1_000_000
"""The best set is sought among all where these, as rows over all clients, have at most so many entries."""

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def _pool(given: Any) -> Any:
    """What a pool's name stands for; lists as they are."""
    if isinstance(given, str):
        if given not in POOLS:
            raise ValueError(f"there is no pool {given!r}; use {', '.join(POOLS)}, or a list of selectors")
        return POOLS[given]
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"it must be {', '.join(POOLS)}, or a list of at least one selector, such as [random, oort]")
    return given


def _member(given: Any) -> Selector:
    """The selector that `oort` or `{name: topk, noise: 0.2}` means; one that is made is returned."""
    if isinstance(given, Selector):
        return given
    kind: Any
    wanted = "a selector such as oort, or {name: topk, noise: 0.2}"
    kind, fields, name = resolve.nested("fldist.selection", Selector, given, wanted)
    if issubclass(kind, FedGCS):
        raise resolve.wrong("name", "it cannot propose to itself; leave it out", name)
    if kind.propose is Selector.propose:
        raise resolve.wrong("name", "it has nothing to propose; define propose, or leave it out", name)
    return resolve.component(kind, fields, name)  # type: ignore[no-any-return]


# what is wrong is an error whose location is the entry, or its field
Pool = Annotated[tuple[Annotated[Selector, BeforeValidator(_member)], ...], BeforeValidator(_pool)]


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
    sigmoid(f) (C). steps: 0 for no generator at all, so that the best record is chosen.
    decode: `beam` of beam_width (P), `greedy`, or `official` (C): greedy with repeats and past the end token, of which
    few sets have the size that is asked for; the others are left out. enough: the search ends with so many new sets,
    null: after the last step. with_records: the best records may be chosen as well (C: not, so that the choice may be
    worse than what is known).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    starts: Count = 25
    ascent: Ascent = "iterated"
    steps: Annotated[int, Field(ge=0)] = 10
    step: Positive = 1.0
    target: Target = "logit"
    decode: Decode = "beam"
    beam_width: Count = 5
    enough: Count | None = None
    with_records: bool = True


@dataclass(frozen=True)
class FedGCS(Selector):
    """Fit a generator to scored sets and choose the best that it leads to. Works with every algorithm.

    `measured`: in the first `collect` rounds, and until one has been measured, the pool's selectors choose in turn;
    then networks learn from all rounds so far, and choose by their own estimate, since no new set's score is known.
    """

    wants_reports: ClassVar[bool] = True

    pool: Pool = field(default_factory=lambda: tuple(_member(name) for name in POOLS["cheap"]))
    # a selector of the pool without a `utility` of its own has the one below
    proposals: Count = 25  # m, of each selector of the pool in each round (C: 100)
    score: Literal["client_sum", "group", "measured"] = "client_sum"
    collect: Count = 10  # R_c
    size: Literal["exact", "range", "published"] = "exact"  # |S| = K; k_min..k_max; any (C), then the next round's K
    k_min: Count | None = None  # of `range`; null: 1
    k_max: Count | None = None  # of `range`; null: K
    utility: Utility = field(default_factory=Utility)
    repeated: Literal["newest", "first"] = "newest"  # which score of a set that was measured twice (C: first)
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
        """Refuse what the pool's selectors refuse, a pool of which two look at models, and bounds that are none."""
        for number, member in enumerate(self.pool):
            with _of_pool(number):
                member.check(task)
            if member.util_epochs == "all" != self.util_epochs:
                raise ValueError(
                    f"selection.pool.{number}: its utilities are of all local epochs, and selection.utility.epochs is "
                    f"{self.util_epochs}; set them alike, since clients send one sum"
                )
        if sum(member.wants_models for member in self.pool) > 1:
            raise ValueError("selection.pool: two of its selectors look at clients' models; leave one of them")
        if self.size != "range" and (self.k_min or self.k_max):
            raise ValueError(f"selection.size: {self.size}, but k_min and k_max are bounds of range; use size: range")
        if self.k_min and self.k_max and self.k_min > self.k_max:
            raise ValueError(f"selection.k_min: {self.k_min} is more than k_max ({self.k_max}); lower it")

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
        pool = []
        for number, member in enumerate(self.pool):
            with _of_pool(number):
                pool.append(member.init(dataclasses.replace(candidates, rng=_child(candidates.rng))))
        return State(
            pool=pool,
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
        self._each(state, candidates, lambda member, own, its: member.setup(own, its))

    def digest(self, state: State, model: Params) -> Tensor:
        """As the pool's selector that looks at models."""
        for member, own in zip(self.pool, state.pool, strict=True):
            if member.wants_models:
                return member.digest(own, model)
        raise AssertionError("no selector of the pool wants models")

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        """Learn from the round, and let every selector of the pool learn from it."""
        candidates = self._now(state, candidates)
        if self.score == "measured" and outcome.accuracy is not None:
            if outcome.replied and state.accuracy is not None:
                gain = outcome.accuracy - state.accuracy
                seconds, joules = self._preferred(state, candidates)
                alpha, beta = self.utility.alpha, self.utility.beta
                score = scoring.measured_score(gain, outcome.seconds, outcome.joules, seconds, joules, alpha, beta)
                state.sets = [*state.sets, list(outcome.replied)]
                state.gains = [*state.gains, score]
            state.accuracy = outcome.accuracy
        state.known = self.utility.learn(state.known, outcome)
        blind = dataclasses.replace(outcome, models={})
        self._each(
            state,
            candidates,
            lambda member, own, its: member.observe(own, its, outcome if member.wants_models else blind),
        )

    def _each(self, state: State, candidates: Candidates, step: Callable[[Selector, State, Candidates], None]) -> None:
        """Do something with every selector of the pool, each with draws of its own, and keep what it makes of its
        state."""
        states = [own.copy() for own in state.pool]
        for number, (member, own) in enumerate(zip(self.pool, states, strict=True)):
            with _of_pool(number):
                step(member, own, dataclasses.replace(candidates, rng=_child(candidates.rng)))
        state.pool = states

    # ---- the choice
    def bounds(self, count: int, num: int) -> tuple[int, int]:
        """The least and the largest set, of `num` clients, where K is `count`."""
        if self.size == "range":
            return self.k_min or 1, self.k_max or count
        return (count, count) if self.size == "exact" else (1, num)

    def _now(self, state: State, candidates: Candidates) -> Candidates:
        """The candidates with what K is by now."""
        if self.size != "published":
            return candidates
        return dataclasses.replace(candidates, count=min(state.count, len(candidates.ids)))

    def select(self, state: State, candidates: Candidates) -> list[int]:
        """Collect records, fit, search, and take the set of highest score."""
        if any(type(member).warm_up is not Selector.warm_up for member in self.pool):
            self._each(state, candidates, lambda member, own, its: member.warm_up(own, its))
        chosen = self._choose(state, self._now(state, candidates))
        if self.size == "published":
            state.count = len(chosen)
        return chosen

    def propose(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        """What it would select, were these its draws."""
        quiet = dataclasses.replace(candidates, rng=rng, log=lambda **values: None, warn=lambda text: None)
        return self._choose(state.copy(), self._now(state, quiet))

    def _choose(self, state: State, candidates: Candidates) -> list[int]:
        ids, rng = list(candidates.ids), candidates.rng
        low, high = self.bounds(candidates.count, len(ids))
        if low == len(ids):
            return ids
        if self.score == "measured" and (candidates.round <= self.collect or not state.sets):
            turn = (candidates.round - 1) % len(self.pool)
            proposed = self._proposed(turn, state, candidates, self._draws(rng))
            return list(proposed) if low <= len(proposed) <= high else self._uniform(candidates, rng)
        if not bool(state.known.last.any()):  # nobody has reported: all sets are alike
            return self._uniform(candidates, rng)
        records = self.records(state, candidates, rng)
        net = self._fitted(state, candidates, records, rng) if len(records) and self.searching.steps else None
        new = [] if net is None else self._new(net, candidates, records)
        known = [s for s in records.best(len(records)) if low <= len(s) <= high]
        sets = [*new, *known[: self.searching.starts]] if self.searching.with_records or not new else new
        if not sets:
            size = f"{low}" if low == high else f"{low} to {high}"
            candidates.warn(
                f"selection.pool: no set of {size} clients has been proposed or found; clients are drawn at random"
            )
            return self._uniform(candidates, rng)
        values = self._values(sets, state, candidates, records, net)
        best = int(values.argmax())
        scores = [score for _, score in records.items()]
        candidates.log(records=len(records), new_sets=len(new), set_score=float(values[best]), record_score=max(scores))
        candidates.log(**self._yardsticks(state, candidates))
        return list(sets[best])

    def _uniform(self, candidates: Candidates, rng: torch.Generator) -> list[int]:
        """K clients, or as many as are allowed; each set is equally likely."""
        low, high = self.bounds(candidates.count, len(candidates.ids))
        return uniform(candidates, max(low, min(candidates.count, high)), self._draws(rng))

    def _draws(self, rng: torch.Generator) -> torch.Generator:
        """A generator of its own for whoever draws next, so that how much one draws changes nothing for the others."""
        return _generator(1) if self.reseed else _child(rng)

    def records(self, state: State, candidates: Candidates, rng: torch.Generator) -> Records:
        """What the pool proposes, of clients that are there, with the score of each set; `measured`: what was measured.

        Sets that are larger than any that may be chosen, and scores that are no numbers, are left out.
        """
        _, high = self.bounds(candidates.count, len(candidates.ids))
        proposed: list[tuple[int, ...]]
        if self.score == "measured":
            proposed, scores = [tuple(members) for members in state.sets], state.gains
        else:
            each = [
                self._proposed(number, state, candidates, draws)
                for number, draws in [(number, self._draws(rng)) for number in range(len(self.pool))]
                for _ in range(self.proposals)
            ]
            proposed = list(dict.fromkeys(each))
            scores = self.scores(proposed, state, candidates).tolist()
        records = Records(self.repeated)
        for members, score in zip(proposed, scores, strict=True):
            if 0 < len(members) <= high and math.isfinite(score):
                records.add(members, score)
        return records

    def _proposed(self, number: int, state: State, candidates: Candidates, draws: torch.Generator) -> tuple[int, ...]:
        """A set that a selector of the pool proposes, ascending; empty if it has none. Where sizes have a range, it is
        asked for any of them, so that there is something to be learnt of all."""
        if self.size == "range":
            low, high = self.bounds(candidates.count, len(candidates.ids))
            count = int(torch.randint(low, high + 1, (1,), generator=draws))
            candidates = dataclasses.replace(candidates, count=count)
        ids = set(self.pool[number].propose(state.pool[number], candidates, draws))
        if strange := ids.difference(candidates.ids):
            who = type(self.pool[number]).__name__
            raise ValueError(f"selection.pool.{number}: {who} proposes client {min(strange)}, which it is not offered")
        return tuple(sorted(ids))

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

    def _values(
        self,
        sets: Sequence[tuple[int, ...]],
        state: State,
        candidates: Candidates,
        records: Records,
        net: Generator | None,
    ) -> Tensor:
        """What goes by [C]: y of the sets, or, of `measured`, what networks take it for."""
        if self.score != "measured":
            return self.scores(sets, state, candidates)
        if net is None:
            measured = dict(records.items())
            return torch.tensor([measured[members] for members in sets], dtype=torch.float64)
        return _estimates(net, self._rows(candidates, sets))

    def _yardsticks(self, state: State, candidates: Candidates) -> dict[str, float]:
        """What else there is, to compare the chosen set's score with.

        sorted_score: y of the K clients that are best one by one, by u_i, or under `group` by U_i times the penalties
        that each would have alone; best_score: the most that there is, under `group` where all sets can be tried.
        """
        if self.score == "measured":
            return {}
        ids = list(candidates.ids)
        low, high = self.bounds(candidates.count, len(ids))
        if self.score == "client_sum":
            alone = self.utility.of(state.known, candidates)[ids]
        else:
            worth = self.utility.statistical(state.known, candidates)
            seconds, joules = self.utility.costs(state.known, candidates)
            preferred_s, preferred_joules = self.utility.preferred(state.known, candidates)
            alone = worth * scoring.penalty(seconds, preferred_s, self.utility.alpha)
            alone = (alone * scoring.penalty(joules, preferred_joules, self.utility.beta))[ids]
        order = alone.argsort(descending=True, stable=True).tolist()
        largest = [ids[i] for i in order[: max(low, min(candidates.count, high))]]
        told = {"sorted_score": float(self.scores([largest], state, candidates))}
        sizes = range(low, high + 1)
        if self.score == "client_sum":  # u is never below 0
            told["best_score"] = float(self.scores([[ids[i] for i in order[:high]]], state, candidates))
        elif sum(math.comb(len(ids), size) for size in sizes) * candidates.num_clients <= _ENTRIES:
            every = [members for size in sizes for members in itertools.combinations(ids, size)]
            told["best_score"] = float(self.scores(every, state, candidates).max())
        return told

    # ---- the generator; client `ids[i]` is its token i
    def _rows(self, candidates: Candidates, sets: Sequence[tuple[int, ...]]) -> Tensor:
        """Sets of clients as rows of tokens, [B, T]."""
        return padded(_tokens(candidates, sets), self._length(candidates), len(candidates.ids))

    def _length(self, candidates: Candidates) -> int:
        """T, tokens of a row: for the largest set and an end token, or as many as clients."""
        _, high = self.bounds(candidates.count, len(candidates.ids))
        return len(candidates.ids) if self.fitting.length == "clients" else high + 1

    def _fitted(self, state: State, candidates: Candidates, records: Records, rng: torch.Generator) -> Generator | None:
        """The networks, fitted to the records where it is time; None where they have come to nothing."""
        how, number, draws = self.fitting, candidates.round, self._draws(rng)
        net = Generator(len(candidates.ids), how.hidden, how.width, how.layers, how.mask_padding, rng=draws)
        optimizer = adam(net, how.lr)
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
                _tokens(candidates, sets),
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
            if not math.isfinite(losses.total):
                candidates.warn(f"selection.fitting.lr: {how.lr:g} lets the networks diverge; lower it")
                state.networks = {}
                return None
            candidates.log(generator_loss=losses.total)
            state.fitted = number
            if self.warm_start or self.refresh_every != 1:
                state.networks = net_state(net, optimizer)
        net.eval()
        rows = self._rows(candidates, sets)
        candidates.log(
            pairwise_accuracy=pairwise_accuracy(targets, _estimates(net, rows).float()), hamming=hamming(net, rows)
        )
        return net

    def _new(self, net: Generator, candidates: Candidates, records: Records) -> list[tuple[int, ...]]:
        """Sets that the search finds from the best records, in the order found, of a size that is allowed."""
        how, ids = self.searching, candidates.ids
        low, high = self.bounds(candidates.count, len(ids))
        found = search(
            net,
            _tokens(candidates, records.best(how.starts)),
            set(_tokens(candidates, [members for members, _ in records.items()])),
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
        return [tuple(ids[token] for token in tokens) for tokens in found if low <= len(tokens) <= high]


def _tokens(candidates: Candidates, sets: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Sets of clients as sets of their places among the candidates."""
    place = {client: token for token, client in enumerate(candidates.ids)}
    return [tuple(place[client] for client in members) for members in sets]


def _estimates(net: Generator, rows: Tensor) -> Tensor:
    """What the evaluator makes of rows of tokens, [B]."""
    with torch.no_grad():
        h, m = net.encode(rows)
        return net.value(net.pool(h, m)).sigmoid().double()


def _name(selector: Selector) -> str:
    """What a selector is called: its module's name."""
    return type(selector).__module__.rpartition(".")[2]


@contextlib.contextmanager
def _of_pool(number: int) -> Iterator[None]:
    """What a selector of the pool says of the section `selection` is said of its entry."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("selection."):
            raise
        raise ValueError(f"selection.pool.{number}.{str(error).removeprefix('selection.')}") from None


def _generator(seed: int) -> torch.Generator:
    made = torch.Generator()
    made.manual_seed(seed)
    return made


def _child(rng: torch.Generator) -> torch.Generator:
    """A generator that is seeded by what another one draws."""
    return _generator(int(torch.randint(1 << 62, (1,), generator=rng)))
