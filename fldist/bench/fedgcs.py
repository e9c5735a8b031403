"""`fldist bench fedgcs`: what a selection by FedGCS costs against its published formulation, and which set comes of it.

Published (`generative/published.py`): 100 proposals of each selector, 26 rows a set, as many tokens as clients, one
after the other, 200 epochs from new networks in every round, then the search with its 101 step sizes. Ours is
`FedGCS.select` as in a round that goes on with the networks of the round before, with all that it does in a run, the
lines in the log too. Both have the same networks, pool, reports and devices, which are simulated. They take turns, on
one thread, in CPU seconds: a few of our selections before each tenth of the published fit. With 20 clients both are
done in full; with 100 some batches of the published fit are timed, and what all of them take is extrapolated.

A set's score is told as a fraction of the best set's. No model is trained here: what a selection is worth to a run is
not measured.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fldist.algorithm import State
from fldist.bench.autoflip import over, turns
from fldist.bench.measure import Figure, Report, Say, Target, check_same, cpu_seconds, quartiles
from fldist.devices import Simulated
from fldist.generative import networks, published
from fldist.generative.networks import Generator, Losses, fit
from fldist.generative.records import Records, augment, labels
from fldist.generative.search import search
from fldist.seeding import generator
from fldist.selection import Candidates, ClientReport, Outcome
from fldist.selection.fedgcs import FedGCS, Fitting, Searching

T = TypeVar("T")
Score = Literal["client_sum", "group"]
SCORES: tuple[Score, ...] = ("client_sum", "group")
SEED = 1
REPEATS = 10
LARGE_REPEATS = 3
INSTANCES = 6
SAMPLES = 200
LOCAL_EPOCHS = 2
PROPOSALS = 100
"""Of each selector of the pool, in the published formulation."""
BATCH_SETS = published.BATCH // (published.COPIES + 1)
"""So many sets fill one of its batches."""
SAME = 1e-4
SQUARE = 512
TARGET = Target(20.0, at_most=False)
SCORE_TARGET = Target(1.0, at_most=False)


@dataclass(frozen=True)
class Case:
    """A size. rounds: the last of them is the one in which both select; epochs: of the published fit; tried: steps of
    the search that are timed; each: our selections in each turn."""

    key: str
    num_clients: int
    per_round: int
    fitting: Fitting
    searching: Searching
    rounds: int = 12
    epochs: int = published.EPOCHS
    tried: int = 10
    each: int = 3

    @property
    def what(self) -> str:
        """In words."""
        return f"N = {self.num_clients}, K = {self.per_round}, H = {self.fitting.hidden}"

    def selector(self, score: Score) -> Timed:
        """Ours: as the configuration `fedgcs/small-mnist` for 20 clients, as by default for 100."""
        return Timed(score=score, fitting=self.fitting, searching=self.searching)

    def network(self, rng: torch.Generator, *, mask: bool) -> Generator:
        """New networks."""
        how = self.fitting
        return Generator(self.num_clients, how.hidden, how.width, how.layers, mask, rng=rng)


SMALL = Case(
    "n20",
    20,
    4,
    Fitting(hidden=32, width=64, lr=0.003, epochs=120, later_epochs=20, copies=3),
    Searching(starts=20, steps=8, decode="greedy"),
)
LARGE = Case("n100", 100, 10, Fitting(), Searching(), tried=3, each=1)
QUICK_SMALL = Case(
    "n20",
    8,
    2,
    Fitting(hidden=8, width=8, epochs=4, later_epochs=2),
    Searching(starts=4, steps=2, decode="greedy"),
    rounds=5,
    epochs=2,
    tried=2,
    each=1,
)
QUICK_LARGE = Case(
    "n100",
    12,
    3,
    Fitting(hidden=8, width=8, epochs=2, later_epochs=1),
    Searching(starts=4, steps=2),
    rounds=3,
    epochs=2,
    tried=2,
    each=1,
)


# ---- what is selected from
@dataclass(frozen=True)
class Instance:
    """Clients with devices and losses that a seed makes; nobody trains."""

    case: Case
    seed: int

    @functools.cached_property
    def _profile(self) -> tuple[dict[int, float], dict[int, float]]:
        return Simulated().fleet(self.case.num_clients, self.seed).profile(LOCAL_EPOCHS)

    def candidates(self, number: int, log: Callable[..., None] = lambda **values: None) -> Candidates:
        """What a selector is given in a round."""
        seconds, joules = self._profile
        return Candidates(
            range(self.case.num_clients),
            [SAMPLES] * self.case.num_clients,
            self.case.per_round,
            number,
            seconds=seconds,
            joules=joules,
            rng=generator(self.seed, "bench-select", number),
            num_clients=self.case.num_clients,
            log=log,
        )

    def outcome(self, number: int, chosen: Sequence[int]) -> Outcome:
        """All reply: with losses that fall over the rounds, differ by client and vary by round."""
        seconds, joules = self._profile
        reports = {}
        for client in chosen:
            of_client = float(torch.randn((), generator=generator(self.seed, "bench-client", client)))
            of_round = float(torch.randn((), generator=generator(self.seed, "bench-round", number, client)))
            loss = (0.5 + 0.7 * 0.9**number) * math.exp(0.3 * of_client + 0.1 * of_round)
            reports[client] = ClientReport(SAMPLES, SAMPLES * loss**2, loss, seconds[client], joules[client])
        return Outcome(number, tuple(chosen), tuple(chosen), reports)


@dataclass(frozen=True)
class Timed(FedGCS):
    """FedGCS that adds the CPU seconds of its parts to `spent`, each without what it calls of the others."""

    spent: dict[str, float] = field(default_factory=dict, compare=False)

    def records(self, state: State, candidates: Candidates, rng: torch.Generator) -> Records:
        """As ever."""
        return self._part("records", lambda: super(Timed, self).records(state, candidates, rng))

    def scores(self, sets: Sequence[Sequence[int]], state: State, candidates: Candidates) -> Tensor:
        """As ever."""
        return self._part("scoring", lambda: super(Timed, self).scores(sets, state, candidates))

    def _fitted(self, state: State, candidates: Candidates, records: Records, rng: torch.Generator) -> Generator | None:
        return self._part("fit", lambda: super(Timed, self)._fitted(state, candidates, records, rng))

    def _new(self, net: Generator, candidates: Candidates, records: Records) -> list[tuple[int, ...]]:
        return self._part("search", lambda: super(Timed, self)._new(net, candidates, records))

    def _yardsticks(self, state: State, candidates: Candidates) -> dict[str, float]:
        return self._part("yardsticks", lambda: super(Timed, self)._yardsticks(state, candidates))

    def _part(self, name: str, do: Callable[[], T]) -> T:
        before, began = sum(self.spent.values()), time.process_time()
        result = do()
        inside = sum(self.spent.values()) - before
        self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - began - inside
        return result


PARTS = {
    "records": "records",
    "fit": "fit",
    "search": "search",
    "scoring": "scores of sets",
    "yardsticks": "what the log compares with",
}


@dataclass(frozen=True)
class Way:
    """The rounds of an instance under our selector: its state before the last of them, and what they showed.

    seconds: of the selections from round 2 on; found: by what, its score in every round from 3 on, as a fraction of the
    best set's: the choice (`ours`), the best of the records (`record`), the clients that are best one by one
    (`sorted`). best: the score of the last round's best set.
    """

    instance: Instance
    selector: Timed
    state: State
    seconds: list[float]
    found: dict[str, list[float]]
    best: float

    @classmethod
    def of(cls, case: Case, score: Score, seed: int) -> Way:
        """Go it."""
        instance, selector = Instance(case, seed), case.selector(score)
        state = selector.init(instance.candidates(1))
        seconds: list[float] = []
        found: dict[str, list[float]] = {"ours": [], "record": [], "sorted": []}
        before, best = state, math.nan
        for number in range(1, case.rounds + 1):
            told: dict[str, float] = {}
            candidates = instance.candidates(number, told.update)
            before = state.copy()
            began = time.process_time()
            chosen = selector.select(state, candidates)
            if number > 1:
                seconds.append(time.process_time() - began)
            if number > 2:
                best = told["best_score"]
                for name, key in (("ours", "set_score"), ("record", "record_score"), ("sorted", "sorted_score")):
                    found[name].append(told[key] / best)
            selector.observe(state, candidates, instance.outcome(number, chosen))
        return cls(instance, selector, before, seconds, found, best)

    @property
    def candidates(self) -> Candidates:
        """Of the last round."""
        return self.instance.candidates(self.instance.case.rounds)

    def again(self) -> float:
        """CPU seconds of the last round's selection."""
        state, candidates = self.state.copy(), self.candidates
        began = time.process_time()
        self.selector.select(state, candidates)
        return time.process_time() - began

    def records(self, proposals: int) -> Records:
        """What the pool proposes in the last round; of equal sets the first counts, as published."""
        selector = FedGCS(score=self.selector.score, proposals=proposals, repeated="first")
        candidates = self.candidates
        return selector.records(self.state, candidates, candidates.rng)


# ---- the published formulation
Loss = Callable[[Generator, Tensor, Tensor, float], Losses[Tensor]]


class Interrupted:
    """A loss for `fit` that lets something else be measured before each of `parts` parts of its batches.

    seconds: CPU seconds that each part took, brought to all batches; the pauses do not count.
    """

    def __init__(self, loss: Loss, batches: int, parts: int, pause: Callable[[], None]) -> None:
        self._loss, self._batches, self._pause = loss, batches, pause
        self._begins = [part * batches // parts for part in range(parts)]
        self._calls, self._first, self._began = 0, 0, 0.0
        self.seconds: list[float] = []
        self.spent = 0.0

    def __call__(self, net: Generator, rows: Tensor, targets: Tensor, trade_off: float) -> Losses[Tensor]:
        """The loss."""
        if self._calls in self._begins:
            self.close()
            self._pause()
            self._first, self._began = self._calls, time.process_time()
        self._calls += 1
        return self._loss(net, rows, targets, trade_off)

    def close(self) -> None:
        """End the part that is under way."""
        if self._calls > self._first:
            seconds = time.process_time() - self._began
            self.spent += seconds
            self.seconds.append(seconds * self._batches / (self._calls - self._first))


@dataclass(frozen=True)
class Published:
    """A selection as published. fits: CPU seconds of the fit by each of its parts; fit_s: of all; rest_s: of records,
    search and scores. score, record: of the set, and of the best record, as fractions of the best set of K."""

    fits: list[float]
    fit_s: float
    rest_s: float
    records: int
    new_sets: int
    size: int
    score: float
    record: float

    @classmethod
    def select(cls, way: Way, loss: Loss, parts: int = 1, pause: Callable[[], None] = lambda: None) -> Published:
        """Do it all in an instance's last round: the set of highest score among the new ones, else the best record."""
        case, candidates = way.instance.case, way.candidates
        began = time.process_time()
        records = way.records(PROPOSALS)
        sets = [ids for ids, _ in records.items()]
        targets = targets_of(records)
        rest = time.process_time() - began
        rows = len(sets) * (published.COPIES + 1)
        rng = generator(way.instance.seed, "bench-published")
        net = case.network(rng, mask=False)
        interrupted = Interrupted(loss, case.epochs * math.ceil(rows / published.BATCH), parts, pause)
        fit_as_published(net, sets, targets, case.num_clients, case.epochs, interrupted, rng)
        interrupted.close()
        began = time.process_time()
        found = published.search(net, records.best(100), set(sets), wanted=100)
        chosen_from = found or records.best(1)
        scores = way.selector.scores(chosen_from, way.state, candidates)
        rest += time.process_time() - began
        return cls(
            interrupted.seconds,
            interrupted.spent,
            rest,
            len(sets),
            len(found),
            len(chosen_from[int(scores.argmax())]),
            float(scores.max()) / way.best,
            max(y for _, y in records.items()) / way.best,
        )


def targets_of(records: Records) -> Tensor:
    """Labels of records, in their order."""
    return labels(torch.tensor([score for _, score in records.items()], dtype=torch.float64)).float()


def fit_as_published(
    net: Generator,
    sets: Sequence[tuple[int, ...]],
    targets: Tensor,
    length: int,
    epochs: int,
    loss: Loss,
    rng: torch.Generator,
    copies: int = published.COPIES,
) -> None:
    """Its optimizer, batches and rows."""
    fit(
        net,
        torch.optim.Adam(net.parameters(), lr=1e-3),
        sets,
        targets,
        epochs=epochs,
        batch=published.BATCH,
        trade_off=0.8,
        clip=5.0,
        copies=copies,
        length=length,
        online=False,
        rng=rng,
        loss=loss,
    )


# ---- measuring
def measure(
    repeats: int | None = None, instances: int | None = None, *, quick: bool = False, say: Say = lambda text: None
) -> Report:
    """Everything; see the module. instances: of each score, to which the published formulation is fitted as well."""
    for name, given in (("repeats", repeats), ("instances", instances)):
        if given is not None and given < 1:
            raise ValueError(f"--{name}: must be at least 1, got {given}")
    repeats, compared = repeats or (2 if quick else REPEATS), instances or 1
    small, large = (QUICK_SMALL, QUICK_LARGE) if quick else (SMALL, LARGE)
    report = Report("fedgcs: a selection against its published formulation", quick=quick)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        side = 64 if quick else SQUARE
        square = torch.randn(side, side, generator=generator(SEED, "bench-square"))
        product = [2e-9 * side**3 / cpu_seconds(lambda: square @ square, 5) for _ in range(repeats)]
        peak = report.add(Figure("product_gflop_per_s", f"a product of {side} x {side} matrices", product, "GFLOP/s"))
        ways = _measure_scores(report, small, max(compared, 2 if quick else INSTANCES), say)
        full = _measure_full(report, small, ways["client_sum"][0], repeats, peak, say)
        _measure_choice(report, ways, compared, full, say)
        _measure_shortcuts(report, small, ways["client_sum"][0], min(repeats, LARGE_REPEATS), say)
        _measure_large(report, large, min(repeats, LARGE_REPEATS), peak, say)
    finally:
        torch.set_num_threads(before)
    report.notes.append(
        "one thread, CPU seconds; in the published formulation the pool is `cheap`, and the networks are as large as "
        "ours; Adam's steps and the batches are its own"
    )
    return report


def _measure_scores(report: Report, case: Case, instances: int, say: Say) -> dict[Score, list[Way]]:
    """Rounds under our selector, of so many instances of each score."""
    say(f"fedgcs: {case.what}: {case.rounds} rounds of {instances} instances of each score")
    ways = {score: [Way.of(case, score, SEED + i) for i in range(instances)] for score in SCORES}
    rounds = f"rounds 3 to {case.rounds} of {instances} instances"
    for score in SCORES:
        for name, what in (
            ("ours", "the choice"),
            ("record", "  the best of its records"),
            ("sorted", "  the clients that are best one by one"),
        ):
            values = [value for way in ways[score] for value in way.found[name]]
            words = f"{what} / the best set" + (f", {score}, {rounds}" if name == "ours" else "")
            report.add(Figure(f"{score}_{name}_ratio", words, values))
    later = [seconds for score in SCORES for way in ways[score] for seconds in way.seconds[1:]]
    report.add(Figure(f"{case.key}_rounds_s", f"a selection, {rounds} of each score", later, "s"))
    first = [way.seconds[0] for score in SCORES for way in ways[score]]
    report.add(
        Figure(f"{case.key}_first_s", f"  in round 2, with the first fit ({case.fitting.epochs} epochs)", first, "s")
    )
    return ways


@dataclass
class Turns:
    """Our selections of a round, in turns with something else: CPU seconds of one, and of its parts, by turn."""

    way: Way
    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})

    def take(self) -> None:
        """A turn."""
        count, spent = self.way.instance.case.each, self.way.selector.spent
        before = dict(spent)
        self.seconds.append(sum(self.way.again() for _ in range(count)) / count)
        for name, values in self.parts.items():
            values.append((spent.get(name, 0.0) - before.get(name, 0.0)) / count)

    def report(self, report: Report, key: str) -> dict[str, float]:
        """Add what parts take, and return their shares."""
        return {
            name: report.add(Figure(f"{key}_{name}_share", f"  ours: {PARTS[name]} / all", over(values, self.seconds)))
            for name, values in self.parts.items()
        }


def _measure_full(report: Report, case: Case, way: Way, repeats: int, peak: float, say: Say) -> Published:
    """Both in full, in turns."""
    key, ours = case.key, Turns(way)
    say(f"fedgcs: {case.what}: the published formulation in full, {repeats} turns with ours")
    way.again()
    done = Published.select(way, published.joint_loss, repeats, ours.take)
    whole = [seconds + done.rest_s for seconds in done.fits]
    what = f"{case.what}: published / ours, both in full, client_sum"
    report.add(Figure(f"{key}_ratio", what, over(whole, ours.seconds), "", TARGET))
    report.add(Figure(f"{key}_s", "  ours", ours.seconds, "s"))
    words = f"  published: {done.records} records, {case.epochs} epochs"
    report.add(Figure(f"{key}_published_s", words, [done.fit_s + done.rest_s], "s"))
    report.add(Figure(f"{key}_published_rest_s", "  published: all but the fit", [done.rest_s], "s"))
    first = way.seconds[0]
    report.add(
        Figure(f"{key}_first_ratio", "  published / ours with a first fit", [(done.fit_s + done.rest_s) / first])
    )
    _report_limit(report, case, ours, peak)
    return done


def _measure_choice(
    report: Report, ways: Mapping[Score, Sequence[Way]], compared: int, full: Published, say: Say
) -> None:
    """The published formulation's choices beside ours. full: the one of client_sum's first instance."""
    for score in SCORES:
        done = [full] if score == "client_sum" else []
        for way in ways[score][len(done) : compared]:
            say(f"fedgcs: {score}, instance {len(done) + 1} of {compared}: the published fit, all positions at once")
            done.append(Published.select(way, networks.joint_loss))
        ours = [way.found["ours"][-1] for way in ways[score][:compared]]
        last = f"round {ways[score][0].instance.case.rounds} of {compared} instance{'s' if compared > 1 else ''}"
        ratio = over(ours, [one.score for one in done])
        report.add(
            Figure(f"{score}_ratio", f"score of the choice: ours / published, {score}, {last}", ratio, "", SCORE_TARGET)
        )
        report.add(Figure(f"{score}_last_ratio", "  ours / the best set", ours))
        report.add(Figure(f"{score}_published_ratio", "  published / the best set", [one.score for one in done]))
        values = [one.record for one in done]
        report.add(Figure(f"{score}_published_record_ratio", "  published: best of its records / the best set", values))
        report.add(
            Figure(f"{score}_published_size", "  published: clients in its set", [float(one.size) for one in done])
        )
        report.add(Figure(f"{score}_published_new", "  published: new sets", [float(one.new_sets) for one in done]))
    report.notes.append(
        "where its time is not measured, the published fit is computed for all positions at once, which is the same to "
        "rounding; it chooses among new sets of any size, as published, ours also among the best of its records"
    )


# ---- shortcuts
def flops(sets: int, copies: int, length: int, case: Case, *, looked_up: bool) -> float:
    """Floating-point operations of an epoch: forward, and twice that backward. looked_up: what tokens add to the gates
    is a table's, not a product."""
    h, vocabulary = case.fitting.hidden, case.num_clients + 1
    token = (16 if looked_up else 32) * h * h + 6 * h * h + 4 * length * h + 2 * h * vocabulary
    return 3.0 * sets * (copies + 1) * length * token


@dataclass(frozen=True)
class Epochs:
    """CPU seconds of an epoch of the fit in an instance's last round, from the published form to ours, one change after
    the other; the first three are those of one batch."""

    way: Way

    @functools.cached_property
    def _of(self) -> dict[int, tuple[list[tuple[int, ...]], Tensor]]:
        found = {}
        for proposals in (PROPOSALS, self.way.selector.proposals):
            records = self.way.records(proposals)
            found[proposals] = [ids for ids, _ in records.items()], targets_of(records)
        return found

    def count(self, proposals: int) -> int:
        """Records of so many proposals a selector."""
        return len(self._of[proposals][0])

    def batch(self, loss: Loss, *, mask: bool, length: int) -> float:
        """Of an epoch, from one batch of 26 rows a set."""
        sets, targets = self._of[PROPOSALS]
        some = min(BATCH_SETS, len(sets))
        net, rng = self._network(mask)
        began = time.process_time()
        fit_as_published(net, sets[:some], targets[:some], length, 1, loss, rng)
        return (time.process_time() - began) * len(sets) / some

    def epoch(self, proposals: int, epochs: int, some: int | None = None) -> float:
        """Of an epoch as ours: masked, rows short and few; of so many sets alone."""
        sets, targets = self._of[proposals]
        case = self.way.instance.case
        net, rng = self._network(True)
        length, copies = case.per_round + 1, case.fitting.copies
        began = time.process_time()
        fit_as_published(net, sets[:some], targets[:some], length, epochs, networks.joint_loss, rng, copies)
        return (time.process_time() - began) / epochs

    def searched(self, again: bool) -> float:
        """Of a step size of the search as published: by encoding, deriving and decoding anew, or once and together."""
        case = self.way.instance.case
        sets, _ = self._of[PROPOSALS]
        net, _ = self._network(False)
        began = time.process_time()
        if again:
            published.search(net, sets[:100], set(sets), steps=case.tried)
        else:
            n = case.num_clients
            search(
                net,
                sets[:100],
                set(sets),
                length=n,
                ascent="single",
                steps=case.tried,
                step=1.0,
                target="sigmoid",
                decode="official",
                width=1,
                low=1,
                high=n,
                wanted=None,
            )
        return (time.process_time() - began) / case.tried

    def check(self) -> float:
        """By how much the gradients of the two forms of the published loss are apart, relative to their norm."""
        case = self.way.instance.case
        sets, targets = self._of[PROPOSALS]
        some, found = sets[:4], []
        for loss in (networks.joint_loss, published.joint_loss):
            net, rng = self._network(False)
            rows = augment(some, 2, case.num_clients, case.num_clients, rng)
            parameters = list(net.parameters())
            total = loss(net, rows, targets[:4].repeat_interleave(3), 0.8).total
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)]))
        difference = float((found[0] - found[1]).norm() / found[1].norm())
        return check_same(difference, SAME, f"{case.what}: gradients")

    def _network(self, mask: bool) -> tuple[Generator, torch.Generator]:
        rng = generator(SEED, "bench-epochs")
        return self.way.instance.case.network(rng, mask=mask), rng

    def variants(self) -> dict[str, Callable[[], float]]:
        """All of them by name."""
        case, ours = self.way.instance.case, self.way.selector.proposals
        n, short, later = case.num_clients, case.per_round + 1, case.fitting.later_epochs
        return {
            "steps": lambda: self.batch(published.joint_loss, mask=False, length=n),
            "batched": lambda: self.batch(networks.joint_loss, mask=False, length=n),
            "short": lambda: self.batch(networks.joint_loss, mask=True, length=short),
            "rows": lambda: self.epoch(PROPOSALS, later),
            "fewer": lambda: self.epoch(ours, later),
            "single": lambda: self.epoch(ours, later, 1),
            "again": lambda: self.searched(True),
            "once": lambda: self.searched(False),
        }


def _report_shortcuts(report: Report, epochs: Epochs, found: Mapping[str, Sequence[float]]) -> None:
    case = epochs.way.instance.case
    key, ours = case.key, epochs.way.selector.proposals
    copies, length = case.fitting.copies, case.per_round + 1
    few, many = epochs.count(ours), epochs.count(PROPOSALS)
    for name, before, after, what in (
        ("batched", "steps", "batched", "all positions at once, not one by one"),
        ("short", "batched", "short", f"T = {length} and masks, not T = {case.num_clients}"),
        ("rows", "short", "rows", f"{copies + 1} rows a record, not {published.COPIES + 1}"),
        ("proposals", "rows", "fewer", f"{few} records, not {many}"),
    ):
        report.add(Figure(f"{key}_{name}_ratio", f"  shortcut: {what}", over(found[before], found[after])))
    later = case.fitting.later_epochs
    what = f"  shortcut: {later} epochs that go on, not {case.epochs} (counted)"
    report.add(Figure(f"{key}_warm_ratio", what, [case.epochs / later]))
    what = "  shortcut, search: starts encoded once, all steps decoded together"
    report.add(Figure(f"{key}_search_ratio", what, over(found["again"], found["once"])))
    report.add(
        Figure(
            f"{key}_difference",
            "  gradients of both forms of the published loss apart",
            [epochs.check()],
            "",
            Target(SAME),
        )
    )


def _measure_shortcuts(report: Report, case: Case, way: Way, repeats: int, say: Say) -> None:
    say(f"fedgcs: {case.what}: shortcuts, {repeats} turns")
    epochs = Epochs(way)
    _report_shortcuts(report, epochs, turns(epochs.variants(), repeats))


def _report_limit(report: Report, case: Case, ours: Turns, peak: float) -> None:
    """What ours consists of, and what its fit is near to."""
    key, epochs = case.key, Epochs(ours.way)
    shares = ours.report(report, key)
    proposals, later = ours.way.selector.proposals, case.fitting.later_epochs
    sets = epochs.count(proposals)
    found = turns({"all": lambda: epochs.epoch(proposals, later), "one": lambda: epochs.epoch(proposals, later, 1)}, 3)
    per_epoch = flops(sets, case.fitting.copies, case.per_round + 1, case, looked_up=True)
    rate = report.add(
        Figure(
            f"{key}_gflop_per_s", "  ours: the fit's products", [per_epoch / s / 1e9 for s in found["all"]], "GFLOP/s"
        )
    )
    fixed = report.add(
        Figure(f"{key}_overhead_share", "  ours: a fit to one record / to all", over(found["one"], found["all"]))
    )
    told = ", ".join(f"{PARTS[name]} {100 * share:.0f} %" for name, share in shares.items())
    report.limits.append(
        f"{case.what}: ours: {told}; the fit's products run at {rate:.0f} GFLOP/s, {100 * rate / peak:.0f} % of a "
        f"matrix product's rate; {100 * fixed:.0f} % of the fit is what a single record takes: the calls of small "
        "operations"
    )


# ---- many clients
def _measure_large(report: Report, case: Case, repeats: int, peak: float, say: Say) -> None:
    say(f"fedgcs: {case.what}: {case.rounds} rounds of ours, then one batch of the published fit, {repeats} turns")
    way = Way.of(case, "client_sum", SEED)
    key, ours, epochs = case.key, Turns(way), Epochs(way)

    def select() -> float:
        ours.take()
        return ours.seconds[-1]

    found = turns({"ours": select, **epochs.variants()}, repeats)
    records = epochs.count(PROPOSALS)
    extrapolated = [case.epochs * seconds for seconds in found["steps"]]
    what = f"{case.what}: published (extrapolated) / ours, client_sum"
    report.add(Figure(f"{key}_ratio", what, over(extrapolated, found["ours"]), "", TARGET))
    report.add(Figure(f"{key}_s", "  ours, in full", found["ours"], "s"))
    words = f"  published, extrapolated: fit to {records} records, {case.epochs} epochs"
    report.add(Figure(f"{key}_published_s", words, extrapolated, "s"))
    report.add(Figure(f"{key}_rounds_s", f"  ours: rounds 3 to {case.rounds}", way.seconds[1:], "s"))
    report.add(
        Figure(
            f"{key}_first_s",
            f"  ours: round 2, with the first fit ({case.fitting.epochs} epochs)",
            way.seconds[:1],
            "s",
        )
    )
    report.add(
        Figure(
            f"{key}_first_ratio", "  published / ours with a first fit", [quartiles(extrapolated)[1] / way.seconds[0]]
        )
    )
    for name, words in (("ours", "the choice"), ("record", "the best of its records")):
        report.add(Figure(f"{key}_{name}_ratio", f"  ours: {words} / the best set", way.found[name]))
    _report_shortcuts(report, epochs, found)
    _report_limit(report, case, ours, peak)
    some = min(BATCH_SETS, records)
    report.notes.append(
        f"{case.what}: the published fit is extrapolated, not measured: {repeats} batches of {some} of {records} "
        f"records were timed, and count for {case.epochs} epochs; its search, scores and records are not counted"
    )
