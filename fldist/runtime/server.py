"""The round loop: joins the hosts, runs the algorithm's stages, evaluates, records, and ends in good order."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

import fldist
from fldist.algorithm import Books, Stage, State, TooFewReplies
from fldist.devices import Cost
from fldist.models.evaluate import Scores, warm_up_metrics
from fldist.runtime import timeline
from fldist.runtime.caller import NOT_WAITED_FOR, Caller, RoundFacts
from fldist.runtime.device import CPU, Seats
from fldist.runtime.job import Job
from fldist.runtime.keeper import Keeper
from fldist.runtime.membership import Membership, RunStopped, Supervisor, ids_text
from fldist.runtime.output import Output, config_hash, peak_rss_bytes
from fldist.runtime.placement import Placement
from fldist.runtime.signals import Interrupted, undisturbed
from fldist.runtime.state import Watch, hash_state, moved
from fldist.runtime.summary import difference, over_clients
from fldist.runtime.views import ClientsView, ServerView
from fldist.seeding import forked
from fldist.selection import ClientReport
from fldist.wire.ledger import Ledger, Totals
from fldist.wire.link import RanksLink, ServerLink, Welcome

log = logging.getLogger("fldist.server")

SCHEMA = 1
"""Version of result.json's form."""
_REFUSED = "refused: range: its scores are not what was asked for"


class Observer(Protocol):
    """Who wants to see a run while it goes."""

    def started(self, facts: dict[str, Any]) -> None:
        """All hosts have joined. `rounds` of the facts: of the whole run; `stages`: the name and rounds of each."""

    def round(self, line: dict[str, Any]) -> None:
        """A round has been committed; `line` is what rounds.jsonl got."""

    def warning(self, text: str) -> None:
        """Something a user should know."""

    def finished(self, result: dict[str, Any]) -> None:
        """The run has ended; `result` is what result.json holds."""

    def stopped(self, text: str) -> None:
        """The run ends before its time, and why; told before anything is saved, since a launcher may not wait."""


class ServerLoop:
    """One run at the server."""

    def __init__(
        self,
        job: Job,
        link: ServerLink,
        output: Output,
        observer: Observer,
        *,
        ranks: Sequence[int],
        supervisor: Supervisor,
        facts: dict[str, Any],
        config: dict[str, Any],
        keeper: Keeper | None = None,
    ) -> None:
        self.job = job
        self.link = link
        self.output = output
        self.observer = observer
        self.ranks = list(ranks)
        self.facts = facts
        self.config = config
        together = job.topology != "star" and ranks != [0]
        self._survives_loss = supervisor.survives_loss and not together
        self._survives = link.survives
        if together:
            self._survives = f"topology {job.topology} needs every rank: if one dies, the run stops and can go on"
        self._keeper = keeper
        resumed = keeper.resumed if keeper is not None else None
        self._lines: list[dict[str, Any]] = output.lines() if resumed is not None else []
        self._seconds = dict.fromkeys(
            ("total", "compute", "server", "encode", "wire", "wait", "evaluate", "select"), 0.0
        )
        self._best: dict[str, Any] = {}
        self._ran_s = 0.0  # before this process
        self._spent_s = 0.0  # of setup and rounds, evaluation left out
        self._simulated = Cost()  # of setup and rounds
        self._ended: dict[str, Any] | None = None  # what has finished the run
        totals = None
        if resumed is not None:
            self._seconds.update(resumed.facts["seconds"])
            self._ran_s = float(resumed.facts["run_s"])
            self._spent_s = float(resumed.facts["spent_s"])
            self._simulated = Cost(*map(float, resumed.facts.get("simulated", Cost())))
            self._best = resumed.facts["best"]
            totals = Totals.of(resumed.facts["bytes"])
        self._ledger = Ledger(output.ledger_path, totals)
        self._placement = Placement(job.task.sizes, self.ranks, job.algorithm.stateful, job.faults.orphans)
        self._hosts = Membership(
            self.ranks,
            self._placement,
            link,
            supervisor,
            job.limits,
            survives=None if self._survives_loss else self._survives,
            warn=observer.warning,
            kept=self._kept,
            who=type(job.algorithm).__name__,
            seats=Seats({"hostname": socket.gethostname(), **facts}) if facts["backend"] == "nccl" else None,
        )
        self._caller = Caller(job, link, self._ledger, self._placement, self._hosts)
        if resumed is not None:
            self._caller.versions = {int(c): str(v) for c, v in resumed.facts["versions"].items()}
            self._caller.worked = set(resumed.facts["worked"])
            self._caller.once.given = {
                name: {int(c): int(v) for c, v in clients.items()} for name, clients in resumed.facts["given"].items()
            }
            self._caller.reports = {int(c): ClientReport(*row) for c, row in resumed.facts["reports"].items()}
        self._clients = ClientsView(job, self._caller)
        self._waiting: list[str] = []  # what keeps lines from being written
        self._total = 0  # rounds of all stages
        self._ends: set[int] = set()  # the last rounds of stages, where a run has several
        # after the last finished round
        self._committed = State(**resumed.values) if resumed is not None and resumed.round else None
        self._transport = (0, 0)
        self._began = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Run to the end and return the result; RunStopped and Interrupted leave a result.json that says so."""
        status, reason = "finished", None
        try:
            self._join()
            return self._run()
        except RunStopped as error:
            status, reason = "stopped", str(error)
            self.observer.stopped(reason)
            raise
        except Interrupted as error:
            hint = "" if self._survives_loss else f"; {self._survives}, and asks the others to end"
            error.text += f"{hint}; {self._kept()}"
            status, reason = "interrupted", error.text
            self.observer.stopped(reason)
            error.told = True
            raise
        except BaseException as error:
            status, reason = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            tied_up = False
            while not tied_up:
                # torchrun and mpirun send a signal soon after a rank's death; one that comes just before signals are
                # held back is forgotten like those that come after
                with contextlib.suppress(Interrupted), undisturbed():
                    self._tie_up(status, reason)
                    tied_up = True

    def _tie_up(self, status: str, reason: str | None) -> None:
        """Write what there is of a run that ends, and close its files."""
        if status != "finished":
            self._ledger.flush(final=True)
            result = self._result(status, reason, None)
            self._save(lambda: self.output.result(result))
            self._keep_what_there_is(result)
            if self._keeper is not None:
                self._keeper.secure()
        self._save(self._ledger.close)
        self._save(self.output.close)

    def _save(self, step: Callable[[], None]) -> None:
        """Do a step of a run's end; a full disk keeps neither the others nor the reason of the end from being told."""
        try:
            step()
        except OSError as error:
            self.observer.warning(str(error))

    def _save_shown(self, number: int, view: ServerView) -> None:
        """Write the pictures and the tables of a round that counts."""
        if view.pictures:
            self._save(lambda: self.output.images(number, view.pictures))
        if view.tables:
            self._save(lambda: self.output.tables(number, view.tables))

    # ---- start
    def _join(self) -> None:
        """Admit the hosts and wait until all are here."""
        job, link = self.job, self.link
        link.expected = job.replies()
        directory = str(self.output.directory.absolute())
        run_id, epoch = secrets.token_bytes(16), 0
        if self._keeper is not None:
            if self.job.algorithm.stateful:
                self._keeper.mark(run_id)
            epoch = self._keeper.epoch
        backend = self.facts["backend"]
        link.admit(Welcome(run_id, epoch, self.config, job.checksum, directory, backend))
        self._hosts.gather(self._caller.take_aside, partly=self._keeper is not None and bool(self._keeper.resumed))
        self._save(lambda: self.output.hosts(self._hosts.about))
        self._share(self._keeper is not None and self._hosts.files)
        if job.topology == "star":
            return
        if isinstance(link, RanksLink):
            link.open_world()
        else:
            self.observer.warning(f"topology: {job.topology} is for several ranks; in one process nothing is exchanged")
            job.topology = "star"

    def _share(self, shared: bool) -> None:
        """Note whether every host sees the clients' states in the run's directory."""
        self._placement.shared_files = shared
        if self._keeper is not None and self.job.algorithm.stateful and not shared:
            if self._keeper.resumed is not None:
                raise RunStopped(
                    f"not every host sees {self.output.directory}, where the clients' states are; put the run on a "
                    "file system that all machines share, or go on on one machine"
                )
            self.observer.warning(
                "not every host sees the run's directory: clients' states are not kept, so this run cannot be "
                "continued, and stops when a host is lost; put --output on a file system that all machines share"
            )
            self._keeper.give_up()
            self._keeper = None

    def _kept(self) -> str:
        """What is there of a run that ends before its time."""
        count = len(self._lines)
        if not count:
            return "no round was finished"
        rounds = "1 finished round is" if count == 1 else f"{count} finished rounds are"
        return f"{rounds} kept in {self.output.directory}"

    def _keep_what_there_is(self, result: dict[str, Any]) -> None:
        """Model and arrays of the rounds that were finished."""
        if self._committed is None or not self._lines:
            return
        try:
            self._save_model(ServerView(self.job, self._committed))
            self.output.arrays(self._lines, result)
        except Exception:  # the run ends for another reason, which must be told
            log.exception("the model could not be saved")

    # ---- rounds
    def _run(self) -> dict[str, Any]:
        job = self.job
        done = 0
        keeper = self._keeper
        if keeper is not None and keeper.resumed is not None:
            state, done = State(**keeper.resumed.values), keeper.resumed.round
        else:
            with forked(job.seed, "init_server"):
                state = moved(job.algorithm.init_server(job.task), CPU)
        view = ServerView(job, state, self.observer.warning)
        if keeper is None or keeper.resumed is None:
            self._clients.choice.begin(view)
        del state  # it would keep the first model for the whole run
        stages = job.plan()
        self._total = sum(stage.rounds for stage in stages)
        if len(stages) > 1:  # each may be begun again from the end of the one before
            self._ends = set(itertools.accumulate(stage.rounds for stage in stages))
        survives = self._survives
        if job.algorithm.stateful and self._survives_loss and self.ranks != [0] and not self._placement.shared_files:
            survives = "clients keep states of their own: if a host dies after its first round, the run stops"
        plan = [[stage.name, stage.rounds] for stage in stages]
        self.observer.started({**self.facts, "survives": survives, "rounds": self._total, "stages": plan})
        for note in job.task.notes:
            self.observer.warning(note)
        empty = [c for c in range(job.task.num_clients) if not job.task.sizes[c]]
        if empty:
            self.observer.warning(f"clients {ids_text(empty)} hold no training samples: never selected, weight 0")
        if job.evaluation.where != "clients":
            warm_up_metrics(job.evaluation)
        if keeper is not None and keeper.resumed is not None:
            for problem in keeper.resumed.problems:
                self.observer.warning(problem)
            self._committed = view.state
            self.observer.warning(f"continued after round {done}, from {self.output.directory}")
            if self._lines:
                last = self._lines[-1]
                self._ended = self._finished_by(done, last["spent"], last["accuracy"], self._lines[:-1])
        else:
            self._setup(view)
        number = 0
        for index, stage in enumerate(stages):
            for _ in range(stage.rounds):
                number += 1
                if number > done and self._ended is None:
                    self._round(number, index, stage, view)
        return self._finish(view)

    def _finished_by(
        self, number: int, spent: dict[str, Any], accuracy: float | None, before: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """What ends the run after a round, or None. before: the lines of the rounds before it."""
        if number >= self._total:
            return {"rule": "rounds", "limit": self._total, "value": number, "round": number}
        scored = [line["accuracy"] for line in before if line["accuracy"] is not None]
        return self.job.stop.reached(number, spent, accuracy, scored)

    def _spend(self, seconds: float) -> dict[str, Any]:
        """What the run has cost so far, these seconds added."""
        self._ledger.flush()
        self._spent_s += seconds
        self._simulated = self._simulated.plus(self._caller.facts.simulated)
        spent = {**self._ledger.totals.spent(), "seconds": round(self._spent_s, 6)}
        if self.job.devices is not None:
            spent |= {"simulated_seconds": self._simulated.seconds, "joules": self._simulated.joules}
        return spent

    def _setup(self, view: ServerView) -> None:
        """What an algorithm does once before round 1."""
        began = time.monotonic()

        def step() -> None:
            self.job.algorithm.setup(view, self._clients)
            self._clients.choice.setup(view)

        self._attempt(0, 0, view, step, phase="setup")
        ended = time.monotonic()
        self._spend(ended - began)
        self._ledger.take_round()
        caller = self._caller
        if caller.facts.missing:  # no line of rounds.jsonl names them
            client, reason = next(iter(sorted(caller.facts.missing.items())))
            more = f" (and {len(caller.facts.missing) - 1} more)" if len(caller.facts.missing) > 1 else ""
            self.observer.warning(f"setup: client {client}'s reply is missing: {reason}{more}")
        self._warn_of(dict(sorted(caller.facts.unanswered.items())), 0, "did not answer the selector")
        self.output.timeline(timeline.line(0, 0, began, ended, caller.facts, None, None, caller.clocks))
        self._save_shown(0, view)
        self._keep(0, view)

    def _attempt(
        self, number: int, stage: int, view: ServerView, step: Callable[[], None], phase: str | None = None
    ) -> tuple[int, TooFewReplies | None]:
        """Do a step of the algorithm, and again while `faults` says so; returns the attempt and why it is void, if so.

        Every attempt begins from the same state and draws the same.
        """
        job, caller = self.job, self._caller
        before = view.state
        attempt = 0
        while True:
            self._hosts.assemble(caller.take_aside, (lambda: True) if attempt == 0 else self._ready_again)
            self._save(lambda: self.output.hosts(self._hosts.about))  # one may have joined again, from elsewhere
            view.replace(before.copy())
            view.enter(number, job.seed)
            self._clients.enter(view, attempt)
            caller.begin_round(number, attempt, stage, phase)
            watch = Watch()
            for name, value in before.values.items():
                watch.add(f"server.{name}", value)
            failed: TooFewReplies | None = None
            try:
                with forked(job.seed, "round", number) if number else forked(job.seed, "setup"):
                    step()
            except TooFewReplies as error:
                failed = error
                view.replace(before)
            changed = watch.changed()
            if changed is not None:  # a round that is not committed could not be taken back
                raise ValueError(f"{changed} was changed in place in round {number}; set it to a new value instead")
            again = failed is not None and self._again(number, attempt, failed)
            caller.end_round(commit=failed is None, again=again)
            if not again:
                return attempt, failed
            attempt += 1

    def _ready_again(self) -> bool:
        """Whether it makes sense to do a round again: hosts take calls, and those whose clients wait are back."""
        return not self._caller.behind() and (self._hosts.complete or not self._placement.waits)

    def _again(self, number: int, attempt: int, error: TooFewReplies) -> bool:
        """Whether a round that too few answered is done again; RunStopped where the run ends with it."""
        faults = self.job.faults
        some = next(iter(error.missing.items()), None)
        why = f"; client {some[0]}: {some[1]}" if some else ""
        what = f"round {number}: {error}" if number else f"setup: {error}"
        if faults.on_quorum_loss == "skip" and number:  # no round could be done without the setup
            self.observer.warning(f"{what}; the state stays as it was{why}")
            return False
        if faults.on_quorum_loss == "stop":
            raise RunStopped(f"{what} (faults.on_quorum_loss: stop){why}; {self._kept()}")
        if all(reason.startswith(("error", "refused", NOT_WAITED_FOR)) for reason in error.missing.values()):
            raise RunStopped(f"{what}, and nothing else would come of it if it were done again{why}; {self._kept()}")
        if self._placement.waits and self._hosts.complete and len(self._hosts.present) < len(self.ranks):
            raise RunStopped(f"{what}, and a host whose clients wait for it does not come back{why}; {self._kept()}")
        if attempt + 1 >= faults.max_attempts:
            raise RunStopped(f"{what} in {attempt + 1} attempts (faults.max_attempts){why}; {self._kept()}")
        self.observer.warning(f"{what}; it is done again (attempt {attempt + 1}){why}")
        return True

    def _keep(self, number: int, view: ServerView) -> None:
        """Write the round's checkpoint: from here on it is not lost with this process."""
        if self._keeper is None:
            return
        self._count_transport()
        facts = {
            "stages": [[s.name, s.rounds] for s in self.job.plan()],
            "versions": {str(c): v for c, v in sorted(self._caller.versions.items())},
            "given": {n: {str(c): v for c, v in given.items()} for n, given in self._caller.once.given.items()},
            "worked": sorted(self._caller.worked),
            "reports": {str(c): list(r) for c, r in sorted(self._caller.reports.items())},
            "best": self._best,
            "seconds": self._seconds,
            "run_s": self._ran_s + time.monotonic() - self._began,
            "spent_s": self._spent_s,
            "simulated": list(self._simulated),
            "bytes": self._ledger.totals.as_dict(),
        }
        try:
            if self._waiting:
                raise OSError("lines of earlier rounds are not written yet")
            lasting = number in self._ends
            self._keeper.keep(number, view.state.values, facts, last=self._ended is not None, lasting=lasting)
        except OSError as error:
            self.observer.warning(f"round {number}: no checkpoint could be written ({error}); the run goes on")

    def _round(self, number: int, index: int, stage: Stage, view: ServerView) -> None:
        began = time.monotonic()
        caller = self._caller
        attempt, failed = self._attempt(number, index, view, lambda: stage.step(view, self._clients))
        committed = failed is None
        facts = caller.facts
        server_s = max(0.0, facts.ended_s - facts.began_s - facts.calls_s)
        evaluated = time.monotonic()
        spent = self._spend(evaluated - began)
        self._ended = self._finished_by(number, spent, None, self._lines)
        scores = self._evaluate(number, view, facts.own if committed else {})
        scored = time.monotonic()
        head = self._headline(scores)
        replied = facts.replied - facts.missing.keys() if committed else set()
        cost = facts.simulated if self.job.devices is not None else None
        self._clients.choice.observe(replied, facts.reports, head["accuracy"] if head else None, cost)
        ended = time.monotonic()
        server_s += ended - scored
        line = self._line(number, attempt, stage, facts, scores, server_s, scored - evaluated, began, committed)
        self._spent_s += ended - scored
        line["spent"] = {**spent, "seconds": round(self._spent_s, 6)}
        if self.job.devices is not None:
            line["simulated"] = facts.simulated._asdict()
        if 0 < len(facts.called) < self.job.task.num_clients:
            line["chosen"] = sorted(facts.called)
        self._ended = self._ended or self._finished_by(number, spent, line["accuracy"], self._lines)
        scoring = caller.facts if caller.facts is not facts else None
        self.output.timeline(
            timeline.line(number, attempt, began, ended, facts, (evaluated, scored), scoring, caller.clocks)
        )
        if view.logged:
            line["log"] = dict(view.logged)
        if committed:
            self._save_shown(number, view)
        refused = {c: r for c, r in facts.missing.items() if r.startswith(("refused", "error"))}
        if refused and committed:
            client, reason = next(iter(sorted(refused.items())))
            more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            self.observer.warning(f"round {number}: client {client}'s reply was not used: {reason}{more}")
        self._warn_of(dict(sorted(facts.unanswered.items())), number, "did not answer the selector")
        self._committed = view.state
        self._lines.append(line)
        self.output.round(line)
        problems = [p for p in (*self.output.problems, self._ledger.problem) if p]
        for problem in problems:
            if problem not in self._waiting:
                self.observer.warning(f"round {number}: {problem}")
        self._waiting = problems
        self._keep(number, view)
        self.observer.round(line)

    def _evaluate(self, number: int, view: ServerView, told: Mapping[int, Tensor]) -> dict[str, Any] | None:
        """Scores by whom they are of; None when there are none. told: by client, see `job.OWN`.

        `global` at the server, `clients` over the clients; `own`, `own_train` and `gap` as `docs/results.md` says.
        """
        how = self.job.evaluation
        scores: dict[str, Any] = {}
        at_clients: Mapping[int, Scores] = {}
        if how.every and (number % how.every == 0 or self._ended is not None):
            if how.where != "clients":
                scores["global"] = dict(self.job.task.evaluate(self.job.algorithm.model(view)).values)
            if how.where != "server":
                at_clients = self._evaluate_clients(number, view)
            if at_clients:
                scores["clients"] = over_clients(at_clients)
        head = self._headline(scores)
        if head is not None and not head["accuracy"] <= self._best.get("accuracy", -1.0):
            self._best = {"round": number, **head}
        own, training = self._own_scores(number, told)
        if own:
            scores |= {"own": over_clients(own), "own_train": over_clients(training)}
            if how.clients == "unselected" and at_clients and not at_clients.keys() & own.keys():
                scores["gap"] = difference(scores["clients"], scores["own"])
        return scores or None

    def _evaluate_clients(self, number: int, view: ServerView) -> Mapping[int, Scores]:
        how = self.job.evaluation
        self._caller.begin_evaluation()
        try:
            got = self.job.algorithm.evaluate(view, self._clients)
            self._caller.once.settle()
        except TooFewReplies as error:
            some = next(iter(error.missing.values()), f"no client has a {how.split} part")
            self.observer.warning(f"round {number}: no client could be scored: {some}")
            return {}
        assert how.split != "auto"
        missing, scores = dict(got.missing), {}
        for client, row in got.scores.items():
            n = self.job.task.num_scored(client, how.split)  # what it says is not taken for it
            if row.shape != (1 + len(how.names),) or float(row[0]) != n or not 0.0 <= float(row[1]) <= 1.0:
                missing[client] = _REFUSED
            else:
                scores[client] = Scores(n, dict(zip(how.names, row[1:].tolist(), strict=True)))
        self._warn_of(missing, number, "could not be scored")
        self.output.clients(number, scores)
        return scores

    def _own_scores(self, number: int, told: Mapping[int, Tensor]) -> tuple[dict[int, Scores], dict[int, Scores]]:
        """By client: how the model that it trained did on its part, and how its training went. told: `job.OWN`."""
        how, task = self.job.evaluation, self.job.task
        assert how.split != "auto"
        names = how.names
        refused, own, training = {}, {}, {}
        for client, row in sorted(told.items()):
            n = task.num_scored(client, how.split)
            values = row[1:].tolist() if row.shape == (1 + 2 * len(names),) and float(row[0]) == n else []
            trained, scored = values[: len(names)], values[len(names) :]
            # without a sample there is no figure: neither of a part that is empty, nor of a training of no step
            if values and _is_share(trained[0], n=0) and _is_share(scored[0], n):
                training[client] = Scores(task.sizes[client], dict(zip(names, trained, strict=True)))
                own[client] = Scores(n, dict(zip(names, scored, strict=True)))
            else:
                refused[client] = _REFUSED
        self._warn_of(refused, number, "trained a model whose scores were not used")
        return own, training

    def _warn_of(self, clients: Mapping[int, str], number: int, what: str) -> None:
        """Name one of some clients, and why."""
        if clients:
            client, reason = next(iter(clients.items()))
            more = f" (and {len(clients) - 1} more)" if len(clients) > 1 else ""
            self.observer.warning(f"round {number}: client {client} {what}: {reason}{more}")

    def _headline(self, scores: dict[str, Any] | None) -> dict[str, float] | None:
        """The accuracy and loss that stand for a round: of the global model, else over the clients."""
        of = scores and (scores.get("global") or scores.get("clients", {}).get(self.job.evaluation.weights))
        return {"accuracy": of["accuracy"], "loss": of["loss"]} if of else None

    def _line(
        self,
        number: int,
        attempt: int,
        stage: Stage,
        facts: RoundFacts,
        scores: dict[str, Any] | None,
        server_s: float,
        evaluate_s: float,
        began: float,
        committed: bool,
    ) -> dict[str, Any]:
        self._ledger.flush()
        self._count_transport()
        seconds = {
            "total": time.monotonic() - began,
            "compute": max(facts.compute_s.values(), default=0.0),
            "server": server_s,
            "encode": facts.encode_s,
            "wire": max(facts.wire_s.values(), default=0.0),
            "evaluate": evaluate_s,
        }
        spent = sum(v for k, v in seconds.items() if k != "total")
        seconds["wait"] = max(0.0, seconds["total"] - spent)
        seconds["select"] = self._clients.choice.seconds
        for name, value in seconds.items():
            self._seconds[name] += value
        head = self._headline(scores)
        return {
            "round": number,
            "attempt": attempt,
            "stage": stage.name,
            "committed": committed,
            "accuracy": head["accuracy"] if head else None,
            "loss": head["loss"] if head else None,
            "scores": scores,
            "selected": len(facts.called),
            "replied": len(facts.replied),
            "missing": {str(c): r for c, r in sorted(facts.missing.items())},
            "hosts": {"present": len(self._hosts.present), "of": len(self.ranks)},
            "bytes": {k: v for k, v in self._ledger.take_round().as_dict().items() if k != "transport"},
            "seconds": {k: round(v, 6) for k, v in seconds.items()},
        }

    def _count_transport(self) -> None:
        up, down = self.link.transport_bytes()
        self._ledger.add_transport(up - self._transport[0], down - self._transport[1])
        self._transport = (up, down)

    # ---- end
    def _finish(self, view: ServerView) -> dict[str, Any]:
        state_hash = self._state_hash(view)
        self._caller.drain()
        self._ledger.flush(final=True)
        self._count_transport()
        idle = sum(not line["committed"] for line in self._lines)
        if idle:
            self.observer.warning(
                f"in {idle} of {len(self._lines)} rounds no reply was used: the model stayed as it was"
            )
        result = self._result("finished", None, state_hash)
        try:
            self.output.catch_up()
            self._save_model(view)
            self.output.arrays(self._lines, result)
            if self._ledger.problem:
                raise OSError(self._ledger.problem)
            self.output.result(result)  # last: it says that all is there
        except OSError as error:
            raise RunStopped(
                f"all rounds are done, but their results cannot be written: {error}; make room, and go on with "
                f"`fldist resume {self.output.directory}`"
            ) from None
        self.observer.finished(result)
        return result

    def _save_model(self, view: ServerView) -> None:
        """Save the global model; what is personal stays with its client."""
        if self.job.algorithm.has_global_model:
            self.output.model(self.job.algorithm.model(view))

    def _state_hash(self, view: ServerView) -> str | None:
        """Hash of the whole state, or None when a client's cannot be had."""
        clients: list[str] = []
        if self.job.algorithm.stateful:
            everyone = range(self.job.task.num_clients)
            digests: dict[int, str | None] = {}
            while len(digests) < len(everyone):  # as often as a host is lost over it
                self._hosts.assemble(self._caller.take_aside)
                digests.update(self._caller.digests(set(everyone) - digests.keys()))
            clients = [d for c in everyone if (d := digests[c]) is not None]
            if len(clients) < len(everyone):
                absent = [c for c in everyone if digests[c] is None]
                self.observer.warning(f"no state_hash: the state of clients {ids_text(absent)} could not be asked for")
                return None
        self._caller.send_verdicts()
        return hash_state({"server": view.state, "clients": clients})

    def _summary(self) -> dict[str, float]:
        """The algorithm's own figures of the run; none where no round was committed, or where it fails over them."""
        if self._committed is None or not any(line["committed"] for line in self._lines):
            return {}
        view = ServerView(self.job, self._committed.copy(), self.observer.warning)
        view.enter(self._lines[-1]["round"], self.job.seed)
        replied = [line["replied"] for line in self._lines]
        books = Books(len(self._lines), replied, self._ledger.totals.nested())
        try:
            with forked(self.job.seed, "summary"):
                told = self.job.algorithm.summary(view, books)
            return {str(name): value if type(value) is int else float(value) for name, value in told.items()}
        except Exception as error:  # the rounds are done, and their results must be written
            log.exception("the algorithm's summary failed")
            self.observer.warning(f"no summary of the run: {type(error).__name__}: {error}")
            return {}

    def _result(self, status: str, reason: str | None, state_hash: str | None) -> dict[str, Any]:
        job = self.job
        scored = [line for line in self._lines if line["accuracy"] is not None]
        final = {k: scored[-1][k] if scored else None for k in ("accuracy", "loss", "scores")}
        return {
            "schema": SCHEMA,
            "name": job.name,
            "algorithm": self.config["algorithm"]["name"],
            "seed": job.seed,
            "rounds": len(self._lines),
            "backend": self.facts["backend"],
            "world_size": self.facts["world_size"],
            "num_clients": job.task.num_clients,
            "final": final,
            "best": self._best or None,
            "summary": self._summary(),
            "bytes": self._ledger.totals.as_dict(),
            "seconds": {
                **{k: round(v, 6) for k, v in self._seconds.items()},
                "run": round(self._ran_s + time.monotonic() - self._began, 6),
            },
            "simulated": self._simulated._asdict() if job.devices is not None else None,
            "peak_rss_bytes": peak_rss_bytes(),
            "state_hash": state_hash,
            "config_hash": config_hash(self.config),
            "status": status,
            "stop": self._ended if status == "finished" else None,
            "reason": reason,
            "version": fldist.__version__,
            "directory": str(self.output.directory),
        }


def _is_share(value: float, n: int) -> bool:
    """Whether it can be the accuracy of n samples; it may be NaN where there are none."""
    return 0.0 <= value <= 1.0 or (n == 0 and math.isnan(value))


def fix_threads(threads: int) -> Callable[[], None]:
    """Set torch's intra-op threads, which decide the order of sums; returns what puts the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    return lambda: torch.set_num_threads(before)
