"""`fldist bench suite FILE`: runs methods x seeds (x tasks), each run in a process of its own, forked from one that has
imported everything. What is finished is not run again, what is not goes on, and a run that fails stops no other.

A suite is a YAML file:

    name: NAME            # default: the file's name
    base: {...}           # a configuration as for `fldist run`, or the path of one, from where the suite's file is
    tasks: {NAME: {...}}  # optional: configurations (or paths) laid over it, one a task
    methods: {NAME: {...}}  # and over these, one a method
    seeds: [0, 1, 2]
    jobs: 2               # runs at a time; default: usable cores / nproc
    nproc: 1              # ranks of a run, as in `fldist run --nproc`

A mapping that is laid over another one replaces its keys; one that has a `name` (an algorithm, a data set, a model)
replaces it whole. The run of a method and seed is written to DIR/METHOD-sSEED, with tasks to DIR/TASK/METHOD-sSEED, and
what it prints to the same name with `.log`. What is compared of the runs is `fldist/analysis`'s business.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fldist.config import ConfigError, Settings, load, meaning_changed, read_file, still_ended
from fldist.runtime.output import finished_result, status_of
from fldist.runtime.signals import Interrupted, interruptible, undisturbed

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_END_S = 60.0
"""How long runs may take to write their checkpoints when the suite is ended."""

Name = Annotated[str, Field(pattern=_NAME)]


def _each_once(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed is named twice, and a run of a method and seed has one directory")
    return seeds


Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_each_once)]


class Suite(BaseModel):
    """The file; see the module."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    base: dict[str, Any] = {}
    tasks: dict[Name, dict[str, Any]] = {}
    methods: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    seeds: Seeds = [0, 1, 2]
    jobs: Annotated[int, Field(ge=1)] | None = None
    nproc: Annotated[int, Field(ge=1)] = 1


@dataclass
class Planned:
    """One run of a suite, and how far it is."""

    name: str  # TASK/METHOD-sSEED
    method: str
    settings: Settings
    directory: Path
    state: Literal["waiting", "running", "finished", "failed", "ended"] = "waiting"
    resumes: bool = False
    skipped: bool = False
    rounds: int = 0
    """Finished rounds, of `of`."""
    of: int = 0
    seconds: float = 0.0
    """That its process took."""
    result: dict[str, Any] | None = None
    reason: str = ""
    """Why it failed."""

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.directory.with_name(f"{self.directory.name}.log")


# ---- reading
def read(path: Path, overrides: Sequence[str] = ()) -> Suite:
    """Read a suite; `key.sub=value` overrides go to `base`, and `seeds=`, `jobs=`, `nproc=` to the suite itself."""
    raw = read_file(path)
    raw.setdefault("name", path.stem)
    for text in overrides:
        key, _, value = text.partition("=")
        if key in ("seeds", "jobs", "nproc"):
            raw[key] = yaml.safe_load(value)
    raw["base"] = _opened(raw.get("base", {}), "base", path)
    if isinstance(raw.get("tasks"), dict):
        raw["tasks"] = {k: _opened(task, f"tasks.{k}", path) for k, task in raw["tasks"].items()}
    try:
        return Suite.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        known = ", ".join(Suite.model_fields)
        unknown = problem["type"] == "extra_forbidden"
        hint = f"unknown key; a suite has: {known}" if unknown else problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {key}: {hint}; got {problem['input']!r}") from None


def _opened(given: Any, key: str, suite: Path) -> Any:
    """A configuration that is given by its path, read."""
    if not isinstance(given, str):
        return given
    try:
        return read_file(suite.parent / given)
    except ConfigError as error:
        raise ConfigError(f"{suite}: {key}: {error}") from None


def plan(suite: Suite, output: Path, overrides: Sequence[str] = ()) -> list[Planned]:
    """All runs, in the order seed by seed, so that a suite that is ended has comparable ones. Every one is checked."""
    of_runs = [text for text in overrides if text.partition("=")[0] not in ("seeds", "jobs", "nproc")]
    _refuse_labels(suite, of_runs)
    runs = []
    for seed in suite.seeds:
        for task, of_task in (suite.tasks or {"": {}}).items():
            for method, of_method in suite.methods.items():
                name = f"{task}/{method}-s{seed}" if task else f"{method}-s{seed}"
                merged = laid_over(laid_over(suite.base, of_task), of_method)
                merged |= {"name": method, "seed": seed}
                try:
                    settings = load(merged, of_runs)
                except ValueError as error:
                    raise ConfigError(f"{suite.name}: {name}: {error}") from None
                runs.append(Planned(name, method, settings, output / name, of=settings.rounds))
    return runs


def _refuse_labels(suite: Suite, overrides: Sequence[str]) -> None:
    """A run's seed and name say which one it is: ConfigError where they are given for several."""
    remedy = {"seed": "seeds: [...]", "name": "the names of the methods"}
    given = [(key, text) for text in overrides if (key := text.partition("=")[0]) in remedy]
    given += [(key, f"methods.{method}.{key}") for method, of in suite.methods.items() for key in remedy if key in of]
    for key, where in given:
        raise ConfigError(f"{suite.name}: {where}: a suite gives every run its {key}, by {remedy[key]}; remove it")


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The upper mapping's keys replace the lower one's, mappings key by key; one with a `name` is taken whole."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(under, Mapping) and "name" not in value
        merged[key] = laid_over(under, value) if both else value  # type: ignore[arg-type]
    return merged


def settle(run: Planned) -> None:
    """Find out what is there of a run: nothing, a part that can go on, or all of it."""
    try:
        _settle(run)
    except (ValueError, OSError) as error:  # what is wrong with one directory stops no other run
        run.state, run.reason = "failed", f"{run.directory} cannot be read: {' '.join(str(error).split())}"


_BEGIN_ANEW = "remove it to run it from its beginning, and set checkpoint.every to 1 or more to have it go on"


def _cannot_go_on(run: Planned) -> bool:
    return (run.directory / "config.yaml").is_file() and not (run.directory / "checkpoints").is_dir()


def _settle(run: Planned) -> None:
    directory, run.resumes, run.rounds = run.directory, False, 0
    if not (directory / "config.yaml").is_file():
        return
    before = load(directory / "config.yaml")
    changed = meaning_changed(before, run.settings)
    if changed:
        run.state = "failed"
        run.reason = (
            f"{directory} holds a run with another configuration ({', '.join(changed[:5])}); "
            "remove it, or give --output another directory"
        )
        return
    run.resumes = True
    result = finished_result(directory)
    if result is not None and still_ended(result, run.settings) is not None:
        run.state, run.skipped, run.result = "finished", True, result
        run.rounds = run.of = int(result["rounds"])
        return
    if _cannot_go_on(run):
        run.state, run.reason = "failed", f"{directory} holds a run that has no checkpoints; {_BEGIN_ANEW}"
    if (directory / "rounds.jsonl").is_file():
        with (directory / "rounds.jsonl").open("rb") as lines:
            run.rounds = min(run.of, sum(line.endswith(b"\n") for line in lines))


# ---- a run's process
class _Log(io.FileIO):
    """What a run prints. On a full disk it is lost; the run goes on, and says in its own files what it cannot write."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(data)


def _be_run(
    config: dict[str, Any], directory: str, log: str, nproc: int, about: dict[str, Any], resumes: bool, wire: Connection
) -> None:
    """Do one run in this process, which was forked for it; tell of every round over `wire`, and end when it breaks."""
    from fldist.console import Progress
    from fldist.runner import run_here

    threading.Thread(target=_end_with, args=(wire,), daemon=True).start()
    file = _Log(log, "ab")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = io.TextIOWrapper(io.BufferedWriter(file), encoding="utf-8", line_buffering=True)
    os.environ["FLDIST_SUITE"] = json.dumps(about)

    class Telling(Progress):
        """Tells the suite, too."""

        def started(self, facts: dict[str, Any]) -> None:
            super().started(facts)
            _tell(wire, of=facts["rounds"])

        def round(self, line: dict[str, Any]) -> None:
            super().round(line)
            _tell(wire, round=line["round"], accuracy=line["accuracy"])

    settings = load(config)
    try:
        run_here(settings, nproc=nproc, output=directory, observer=Telling(), resume=resumes)
    except Interrupted as error:
        sys.exit(128 + error.signal_number)
    except Exception as error:
        traceback.print_exc()
        _tell(wire, reason=" ".join(f"{type(error).__name__}: {error}".split()))
        sys.exit(1)


def _tell(wire: Connection, **what: Any) -> None:
    """A message to the suite; one that is gone is noticed elsewhere."""
    try:
        wire.send_bytes(json.dumps(what).encode())
    except OSError:
        return


def _end_with(wire: Connection) -> None:
    """Wait until the suite's process is gone, and then end this one in good order."""
    try:
        wire.recv_bytes(1)
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)


# ---- running
class Shown:
    """What is seen of a suite while it goes. This one shows nothing."""

    def began(self, runs: Sequence[Planned], jobs: int) -> None:
        """Before the first run."""

    def changed(self, run: Planned) -> None:
        """A run has begun, done a round, or ended."""

    def tick(self) -> None:
        """Once in a while."""

    def close(self) -> None:
        """After the last run, whatever has ended it."""


@dataclass
class _Process:
    run: Planned
    process: Any
    wire: Connection
    began: float = field(default_factory=time.monotonic)


def execute(suite: Suite, runs: Sequence[Planned], shown: Shown, jobs: int | None = None) -> None:
    """Do all runs that are not done; their states say what came of them. Interrupted by a signal, runs can go on."""
    jobs = jobs or suite.jobs or max(1, usable_cores() // suite.nproc)
    for run in runs:
        settle(run)
    shown.began(runs, jobs)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fldist.runner", "fldist.console"])
    about = {"name": suite.name, "jobs": jobs}
    waiting = [run for run in runs if run.state == "waiting"]
    going: list[_Process] = []
    try:
        with interruptible():
            try:
                while waiting or going:
                    while waiting and len(going) < jobs:
                        run = waiting.pop(0)
                        settle(run)  # another suite may have been at it meanwhile
                        if run.state == "waiting" and _make_place(run):
                            going.append(_start(context, run, suite.nproc, about))
                        shown.changed(run)
                    _watch(going, shown)
            except Interrupted:
                with undisturbed():
                    _end(going)
                raise
    finally:
        shown.close()
        for left in going:  # an error of this process's own
            left.wire.close()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_place(run: Planned) -> bool:
    """See to it that a run can write its log, where it says what else is wrong; the run has failed where not."""
    try:
        run.directory.parent.mkdir(parents=True, exist_ok=True)
        run.log.open("ab").close()
    except OSError as error:
        run.state, run.reason = "failed", f"{run.log} cannot be written: {error.strerror}"
    return run.state == "waiting"


def _start(context: Any, run: Planned, nproc: int, about: dict[str, Any]) -> _Process:
    ours, its = context.Pipe()
    config, about = run.settings.resolved(), {**about, "method": run.method}
    arguments = (config, str(run.directory), str(run.log), nproc, about, run.resumes, its)
    process = context.Process(target=_be_run, args=arguments)
    process.start()
    its.close()
    run.state = "running"
    return _Process(run, process, ours)


def _watch(going: list[_Process], shown: Shown) -> None:
    """Wait until one of the runs has something to tell, or has ended."""
    wires: dict[Any, _Process] = {p.wire: p for p in going}
    ends: dict[Any, _Process] = {p.process.sentinel: p for p in going}
    for ready in wait([*wires, *ends], timeout=1.0):
        if ready in wires:
            _hear(wires[ready], shown)
    for sentinel, process in ends.items():
        if not process.process.is_alive():
            assert sentinel == process.process.sentinel
            _hear(process, shown)
            going.remove(process)
            _ended(process)
            shown.changed(process.run)
    shown.tick()


def _hear(process: _Process, shown: Shown) -> None:
    run = process.run
    try:
        while process.wire.poll():
            told = json.loads(process.wire.recv_bytes())
            run.of = int(told.get("of", run.of))
            run.rounds = int(told.get("round", run.rounds))
            run.reason = str(told.get("reason", ""))
            shown.changed(run)
    except (EOFError, OSError):
        return


def _ended(process: _Process, asked: bool = False) -> None:
    """Note how a run's process has ended. asked: it was told to."""
    run = process.run
    process.process.join()
    process.wire.close()
    run.seconds = time.monotonic() - process.began
    code = process.process.exitcode
    run.result = finished_result(run.directory)
    if run.result is not None and (code == 0 or still_ended(run.result, run.settings) is not None):
        run.state = "finished"
        return
    by_signal = code not in (0, 1) and status_of(run.directory) == "interrupted"
    run.state = "ended" if asked or by_signal else "failed"
    run.reason = f"{run.reason or _last_words(run.log)} ({_code_text(code)})"


def _code_text(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_words(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "it said nothing"


def _end(going: list[_Process]) -> None:
    """Have the runs write what they have, and wait for them."""
    for process in going:
        if process.process.is_alive():
            process.process.terminate()
    deadline = time.monotonic() + _END_S
    for process in going:
        if not _gone(process, deadline):
            process.process.kill()
        _ended(process, asked=True)
    going.clear()


def _gone(process: _Process, deadline: float) -> bool:
    """Wait until a process has ended, and with it its end of the wire; False when it has not by the deadline.

    Of the end of a run `multiprocessing` knows from the forkserver, which a signal to all processes has ended, too.
    """
    with contextlib.suppress(EOFError, OSError):
        while process.wire.poll(max(0.0, deadline - time.monotonic())):
            process.wire.recv_bytes()
        return False
    return True


def lines_of(runs: Sequence[Planned]) -> Iterator[str]:
    """What became of the runs that are not finished, a line each."""
    for run in runs:
        if run.state == "failed":
            log = f"; see {run.log}" if run.log.is_file() else ""
            yield f"{run.name} failed: {run.reason}{log}"
        elif run.state in ("ended", "waiting", "running"):
            lost = f"{run.directory} has no checkpoints; {_BEGIN_ANEW}"
            how = lost if _cannot_go_on(run) else "the same command goes on with it"
            yield f"{run.name}: {run.rounds} of {run.of} rounds; {how}"
