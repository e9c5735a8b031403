"""Configurations: YAML and overrides in, validated settings out, and the job that they describe.

What every algorithm shares stands outside the section `algorithm`, so that `algorithm.name=scaffold` alone
switches a run. Errors name the key, the value and the remedy; an unknown key is answered with the nearest one
of all sections.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn

from fldist import clock, devices, models, resolve
from fldist.algorithm import Algorithm
from fldist.clock import Clock
from fldist.data import datasets, partition
from fldist.data.augment import Augment
from fldist.data.datasets import Dataset
from fldist.data.prepare import ClientSplit, Normalize, Preparation, Public, Subset
from fldist.data.task import Build, Partition, Task, sample_type
from fldist.devices import Devices, Fleet
from fldist.fold import Integers
from fldist.models.evaluate import Evaluation
from fldist.models.train import LocalTraining
from fldist.params import Travel
from fldist.runtime.branch import Branch
from fldist.runtime.device import CPU, Wanted
from fldist.runtime.job import Job, Topology
from fldist.runtime.membership import Faults
from fldist.runtime.output import differing, finished_result
from fldist.runtime.stages import begins_after, check_fields, check_plan, plan_of
from fldist.runtime.stops import Stop
from fldist.selection import Selector
from fldist.wire.link import Limits

TRACKERS = {"tensorboard": "fldist.trackers:TensorBoard"}
"""The trackers by name; what they are is said there."""


class ConfigError(ValueError):
    """What is wrong with a configuration, one problem a line."""


def _named(value: Any) -> Any:
    """`fedavg` is short for `{name: fedavg}`."""
    return {"name": value} if isinstance(value, str) else value


class Component(BaseModel):
    """Something chosen by name, with fields of its own."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def fields(self) -> dict[str, Any]:
        """The component's own fields."""
        return dict(self.model_extra or {})


def _members(value: Any) -> Any:
    """A family's name stands for its models, in order."""
    if not isinstance(value, str):
        return value
    if value not in models.FAMILIES:
        raise ValueError(f"unknown family; known: {', '.join(models.FAMILIES)}, or a list of models such as [mlp, cnn]")
    return list(models.FAMILIES[value])


Named = Annotated[Component, BeforeValidator(_named)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of the sections: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class ClientsSection(Section):
    """Who takes part: `fraction` of `num_clients` in each round, or `per_round` of them.

    models: the clients' models, client i has number i mod their count (none: everyone has `task.model`), or the name of
    a family (`models.FAMILIES`), which stands for its list; init: one initial model for all clients of an architecture,
    or one of its own for each.
    """

    num_clients: Annotated[int, Field(ge=1)] = 10
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    per_round: Annotated[int, Field(ge=1)] | None = None
    rounding: Literal["floor", "ceil", "nearest"] = "floor"
    models: Annotated[list[Named], BeforeValidator(_members)] = []
    init: Literal["common", "own"] = "common"

    def count(self) -> int:
        """Clients per round, at least 1."""
        if self.per_round is not None:
            return self.per_round
        exact = (1.0 if self.fraction is None else self.fraction) * self.num_clients
        # 1e-9: 0.3 * 10 is 3, whatever binary fractions make of it
        if self.rounding == "floor":
            return max(1, math.floor(exact + 1e-9))
        return math.ceil(exact - 1e-9) if self.rounding == "ceil" else max(1, math.floor(exact + 0.5))


class PublicSection(Section):
    """Public rows, known to server and clients by their numbers: `n` of `data` (default: of the task's own)."""

    n: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0
    data: Named | None = None


class TaskSection(Section):
    """What is learnt: data, their partition among the clients, the model, and what of it travels.

    feature_dim: K, how many features the classifier of every model takes: it is replaced by one behind an adapter.
    """

    data: Named = Component(name="digits")
    subset: Subset = Subset()
    merged: bool = False  # training and test samples are divided among the clients together
    public: PublicSection = PublicSection()
    partition: Named = Component(name="iid")
    partition_seed: int | None = None  # default: the run's seed
    split: ClientSplit = ClientSplit()
    resize: Annotated[int, Field(ge=1)] | None = None
    augment: Augment = Augment()
    normalize: Normalize = "unit"
    model: Named = Component(name="mlp")
    feature_dim: Annotated[int, Field(ge=1)] | None = None
    travel: Travel = "all"


class DeadlinesSection(Section):
    """Limits on waiting, in seconds. `client_timeout_s` is on silence, heartbeats included."""

    join_s: Seconds = 60.0
    client_timeout_s: Seconds = 5.0
    transfer_s: Seconds = 3600.0
    round_deadline_s: Seconds | None = None


class NetworkSection(Section):
    """How messages travel: `share` sends what several clients of a host are sent once per host; `control_port` is where
    the server listens (gloo; default: MASTER_PORT + 1 where every rank has an agent of its own, else any free one).
    """

    share: bool = True
    control_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    checksum: Literal["header", "full"] = "header"


class AggregationSection(Section):
    """How integer buffers (BatchNorm's counters) are averaged."""

    integers: Integers = "mean"


class CheckpointSection(Section):
    """How a run outlives its processes. Every round is written to the run's directory; of `every` k-th one (and the
    last) the files outlive a power failure too, and `keep` of these stay. every: 0 writes nothing: a run that ends
    before its time cannot be continued."""

    every: Annotated[int, Field(ge=0)] = 10
    keep: Annotated[int, Field(ge=1)] = 2


class OutputSection(Section):
    """Where runs are written: a new directory under `root`, unless --output names it. trackers: who else is told."""

    root: str = "runs"
    trackers: list[Named] = []


class Settings(Section):
    """A whole configuration. stages: those of the algorithm's stages that are done, of all `rounds`; null: all."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    rounds: Annotated[int, Field(ge=1)] = 10
    stages: list[str] | None = None
    clients: ClientsSection = ClientsSection()
    task: TaskSection = TaskSection()
    local: LocalTraining = LocalTraining()
    algorithm: Named = Component(name="fedavg")
    selection: Named = Component(name="random")
    aggregation: AggregationSection = AggregationSection()
    eval: Evaluation = Evaluation()
    backend: Literal["auto", "in-process", "gloo", "nccl", "mpi"] = "auto"
    topology: Topology = "star"
    device: Wanted = "auto"
    threads: Annotated[int, Field(ge=1)] = 1
    network: NetworkSection = NetworkSection()
    deadlines: DeadlinesSection = DeadlinesSection()
    faults: Faults = Faults()
    stop: Stop = Stop()
    clock: Named = Component(name="measured")
    devices: Named = Component(name="none")
    checkpoint: CheckpointSection = CheckpointSection()
    output: OutputSection = OutputSection()

    def resolved(self) -> dict[str, Any]:
        """Everything spelt out, defaults included; loading it again gives the same settings."""
        return TypeAdapter(Settings).dump_python(self, mode="json")  # type: ignore[no-any-return]


# ---- loading
def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file (or take a mapping), apply `key.sub=value` overrides, validate."""
    raw = _read_one(Path(source)) if isinstance(source, str | Path) else _copied(source)
    for override in overrides:
        _override(raw, override)
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error))) from None
    _check(settings)
    components(settings)
    make_trackers(settings)
    return settings


RESUMABLE = (
    "rounds", "stages", "stop", "eval", "output", "deadlines", "faults", "checkpoint", "backend", "topology", "device",
    "network",
)  # fmt: skip
"""What may change when a run goes on: none of it changes what was computed so far."""


def load_resumed(directory: Path, overrides: Sequence[str] = ()) -> Settings:
    """The configuration of a run that is to go on, with overrides that do not change its meaning.

    Whether a stage that reads a changed field has begun is seen by `check_resumed`, where the state is.
    """
    _, now = _changed(directory, overrides)
    result = finished_result(directory)
    limit = result and still_ended(result, now)
    if result and limit:
        key, value = limit
        raise ConfigError(
            f"{key}: the run in {directory} is finished, with {result['stop']['value']} of {value}; give more to "
            "extend it"
        )
    return now


def load_branch(directory: Path, stage: str, overrides: Sequence[str] = ()) -> tuple[Settings, Branch]:
    """The configuration of a run that is begun from another one's end of a stage, and where that is.

    directory: the other run's; stage: what the new one begins with. ConfigError for what cannot be.
    """
    before, now = _changed(directory, overrides)
    if before.checkpoint.every and not now.checkpoint.every:
        raise ConfigError("checkpoint.every: 0, but a run is to go on from a checkpoint; set it to 1 or more")
    was, algorithm = make_algorithm(before.algorithm), make_algorithm(now.algorithm)
    old, new = plan_of(was, before.rounds, before.stages), plan_of(algorithm, now.rounds, now.stages)
    try:
        done, begins = begins_after(old, stage), begins_after(new, stage)
    except ValueError as error:
        raise ConfigError(f"--from: {error}") from None
    if done == 0:
        raise ConfigError(f"--from: no round comes before stage {stage}; begin a new run: fldist run")
    if begins != done:
        rounds = now.rounds + done - begins
        fits = rounds > 0 and begins_after(plan_of(algorithm, rounds, now.stages), stage) == done
        raise ConfigError(
            f"rounds: {now.rounds} would have stage {stage} begin after round {begins}, and in {directory} it begins "
            f"after round {done}; {f'set rounds={rounds}' if fits else 'change rounds, or what its stages depend on'}"
        )
    check_plan(old, new, done)
    check_fields(was, algorithm, old, done)
    if sum(rounds for _, rounds in new) <= done:
        raise ConfigError(f"--from: from stage {stage} on nothing is to be done with rounds={now.rounds}; give more")
    return now, Branch(directory, stage, done)


def check_resumed(before: Settings, now: Settings, number: int, facts: Mapping[str, Any]) -> None:
    """Refuse to go on after a round where its checkpoint has read what is changed: ValueError.

    facts: the checkpoint's.
    """
    was, algorithm = make_algorithm(before.algorithm), make_algorithm(now.algorithm)
    plan = [(str(name), int(rounds)) for name, rounds in facts["stages"]]
    check_plan(plan, plan_of(algorithm, now.rounds, now.stages), number)
    check_fields(was, algorithm, plan, number)


def _changed(directory: Path, overrides: Sequence[str]) -> tuple[Settings, Settings]:
    """A run's configuration, and the same with overrides that may be made when it goes on."""
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"resume: {directory} holds no run (no config.yaml)")
    before, now = load(path), load(path, overrides)
    later = [f"algorithm.{field}" for field in make_algorithm(now.algorithm).stage_fields]
    for key in meaning_changed(before, now):
        if any(key == field or key.startswith(f"{field}.") for field in later):
            continue
        known = f"; of the algorithm {', '.join(later)}, until a stage reads it" if later else ""
        raise ConfigError(
            f"{key}: it cannot be changed in a run that goes on; only {', '.join(RESUMABLE)} can{known}. Begin a new "
            "run"
        )
    return before, now


def meaning_changed(before: Settings, now: Settings) -> list[str]:
    """The keys in which configurations differ and must not, if a run of the one is to go on as one of the other."""
    changed = differing(before.resolved(), now.resolved())
    return [key for key in changed if key.partition(".")[0] not in RESUMABLE]


def still_ended(result: Mapping[str, Any], now: Settings) -> tuple[str, Any] | None:
    """The key and value in a configuration that end a finished run where it has ended; None when it would go on."""
    if "stop" not in result:
        raise ConfigError("result.json was written by a version of fldist that did not say `stop`; begin a new run")
    stop = result["stop"]
    rule = str(stop["rule"])
    limits = {f"stop.{rule}": getattr(now.stop, rule)}
    if rule == "rounds":
        limits["rounds"] = now.rounds
    return next(((k, v) for k, v in limits.items() if v is not None and stop["value"] >= v), None)


def _copied(value: Any) -> Any:
    return {str(k): _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _read_one(path: Path) -> dict[str, Any]:
    """A run's configuration; a suite is another thing."""
    raw = read_file(path)
    if "methods" in raw:
        raise ConfigError(f"{path} is a suite of runs; `fldist bench suite {path}` runs it")
    return raw


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, not validated; ConfigError when there is none."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration {path}; see configs/ for examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} must have the form key.sub=value")
    *path, last = key.strip().split(".")
    at = raw
    for part in path:
        inner = at.get(part)
        if isinstance(inner, str):  # `algorithm: fedavg` with an override of algorithm.name or of a field
            inner = at[part] = {"name": inner}
        if inner is None:
            inner = at[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {text!r}: {part!r} is {inner!r} and has no keys")
        at = inner
    try:
        at[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {text!r}: the value is not valid YAML") from None


def known_keys() -> list[str]:
    """Every key that a configuration may have, dotted, the fields of all packaged algorithms and selectors included."""
    keys = list(_keys_of(Settings, ""))
    for name in resolve.modules_of("fldist.algorithms"):
        component = resolve.from_package("fldist.algorithms", name, Algorithm, "algorithm.name")
        hints = typing.get_type_hints(component)
        for f in dataclasses.fields(component):
            keys.append(f"algorithm.{f.name}")
            if dataclasses.is_dataclass(hints[f.name]) and not issubclass(hints[f.name], Algorithm):
                keys += _keys_of(hints[f.name], f"algorithm.{f.name}.")
    for section, table in (("data", datasets.NAMES), ("partition", partition.NAMES), ("model", models.NAMES)):
        for name in table:
            thing = resolve.from_table(table, name, f"task.{section}.name")
            keys += [f"task.{section}.{f.name}" for f in dataclasses.fields(thing)]
    for name in resolve.modules_of("fldist.selection"):
        selector = resolve.from_package("fldist.selection", name, Selector, "selection.name")
        hints = typing.get_type_hints(selector)
        for f in dataclasses.fields(selector):
            keys.append(f"selection.{f.name}")
            if dataclasses.is_dataclass(hints[f.name]):
                keys += _keys_of(hints[f.name], f"selection.{f.name}.")
    for name in clock.NAMES:
        thing = resolve.from_table(clock.NAMES, name, "clock.name")
        keys += [f"clock.{f.name}" for f in dataclasses.fields(thing)]
    keys += [f"devices.{key}" for key in devices.known_fields()]
    return list(dict.fromkeys(keys))


def _keys_of(section: Any, prefix: str) -> Iterator[str]:
    if dataclasses.is_dataclass(section):
        yield from (f"{prefix}{f.name}" for f in dataclasses.fields(section))
        return
    for name, info in section.model_fields.items():
        yield f"{prefix}{name}"
        inner = info.annotation
        if inner is Component:
            yield f"{prefix}{name}.name"
        elif isinstance(inner, type) and (issubclass(inner, BaseModel) or dataclasses.is_dataclass(inner)):
            yield from _keys_of(inner, f"{prefix}{name}.")


def unknown_key(key: str) -> str:
    """The message for a key that means nothing, with the nearest known key of all sections."""
    known = known_keys()
    by_leaf = {k.rpartition(".")[2]: k for k in reversed(known)}
    leaf = key.rpartition(".")[2]
    # a bare name is looked for among the last parts of keys: a section's name would only blur the likeness
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75) if "." in key else []
    near_leaf = difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.6)
    best = by_leaf.get(leaf) or (near[0] if near else None) or (by_leaf[near_leaf[0]] if near_leaf else None)
    section = key.rpartition(".")[0]
    siblings = [k.rpartition(".")[2] for k in known if section and k.rpartition(".")[0] == section]
    there = f"{section} has: {', '.join(siblings)}" if siblings else f"known: {', '.join(Settings.model_fields)}"
    hint = f"did you mean {best}?" if best else there
    return f"{key}: unknown key; {hint}"


def _explain(error: ValidationError, prefix: str = "") -> list[str]:
    lines: list[str] = []
    for problem in error.errors():
        # of a union, pydantic tells what is wrong with every member, under names that are no keys
        parts = [str(part) for part in problem["loc"]]
        member = next((i for i, part in enumerate(parts) if i and _MEMBER.search(part)), None)
        if member is not None:
            key = prefix + ".".join(parts[:member])
            forms = UNIONS.get(parts[member - 1], "another value")
            line = f"{key}: it must be {forms}; got {_at(error, problem, member)!r}"
            lines += [line] if line not in lines else []
            continue
        key = prefix + ".".join(parts)
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(unknown_key(key))
        elif problem["type"] == "missing":
            lines.append(f"{key}: a value is needed")
        else:
            said = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {said[0].lower()}{said[1:]}; got {problem['input']!r}")
    return lines


_MEMBER = re.compile(r"\[|^MeanStd$|^constrained-")  # pydantic's names of a union's members
_BY_CLIENT = "a number of at least 0 for all clients, a list with one a client, or {client: number}"
UNIONS = {
    "normalize": "unit, symmetric, standard, or {mean: [...], std: [...]} with a number a channel",
    "etf_dim": "classes, least, or a whole number from 1 on",
    "bandwidths": "a list of positive numbers, or median",
    "epoch_s": _BY_CLIENT,
    "training_s": _BY_CLIENT,
    "watts": _BY_CLIENT,
    "credits": "a number of rounds for all tiers, a list with one a tier, or null for no limit",
}
"""What is said of keys that take things of several forms."""


def _at(error: ValidationError, problem: Any, member: int) -> Any:
    """The value that was given for a union: the input of the problem that stands at the union's own place."""
    same = [p for p in error.errors() if p["loc"][:member] == problem["loc"][:member] and len(p["loc"]) == member + 1]
    return same[0]["input"] if same else problem["input"]


def _check(settings: Settings) -> None:
    """Combinations that cannot be."""
    clients = settings.clients
    if clients.fraction is not None and clients.per_round is not None:
        raise ConfigError(
            f"clients: fraction ({clients.fraction}) and per_round ({clients.per_round}) exclude each other; "
            "remove one (on the command line: clients.fraction=null)"
        )
    if clients.per_round is not None and clients.per_round > clients.num_clients:
        raise ConfigError(
            f"clients.per_round: {clients.per_round} of {clients.num_clients} clients cannot be selected; "
            "lower it or raise clients.num_clients"
        )
    needed = settings.faults.min_replies
    if needed != "all" and needed > clients.count():
        raise ConfigError(
            f"faults.min_replies: {needed} replies cannot come of {clients.count()} clients a round; "
            "lower it, or raise clients.per_round or clients.fraction"
        )
    if settings.stop.accuracy is not None and settings.eval.every == 0:
        raise ConfigError(
            f"stop.accuracy: {settings.stop.accuracy:g} is never known, since eval.every is 0; set it to 1 or more"
        )
    if settings.stop.patience is not None and settings.eval.every == 0:
        raise ConfigError(
            f"stop.patience: {settings.stop.patience} scored rounds never come, since eval.every is 0; set it to 1 or "
            "more"
        )
    for rule in ("simulated_seconds", "joules"):
        limit = getattr(settings.stop, rule)
        if limit is not None and settings.devices.name == "none":
            raise ConfigError(
                f"stop.{rule}: {limit:g} is never reached, since no devices are simulated; set devices=simulated"
            )
    if settings.topology != "star":
        _check_together(settings)
    public = settings.task.public
    if public.data is not None and not public.n:
        raise ConfigError(f"task.public.data: {public.data.name} would not be used, since task.public.n is 0; set n")
    if settings.deadlines.join_s < settings.deadlines.client_timeout_s / 5:
        raise ConfigError("deadlines.join_s: shorter than a heartbeat's period; raise it")


def _check_together(settings: Settings) -> None:
    """What cannot be where all ranks exchange at once."""
    why = f"does not go with topology: {settings.topology}, where all ranks exchange at once"
    if settings.deadlines.round_deadline_s is not None:
        raise ConfigError(
            f"deadlines.round_deadline_s: {settings.deadlines.round_deadline_s:g} {why} and nobody can be left out; "
            "remove it, or use topology: star"
        )
    if not settings.network.share:
        raise ConfigError(f"network.share: false {why}; use true, or topology: star")
    if settings.network.checksum == "full":
        raise ConfigError(f"network.checksum: full {why} and only heads are checked; use header, or topology: star")


# ---- from settings to objects
def _component(kind: type, given: Component, key: str) -> Any:
    """Build a component from its dataclass, checking its fields."""
    known = [f.name for f in dataclasses.fields(kind)]
    for name in given.fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {key}.{near[0]}?" if near else (
                f"its fields: {', '.join(known)}" if known else "it has no fields"
            )  # fmt: skip
            whole = "" if near or key != "algorithm" else f"; algorithm={given.name} replaces the whole section"
            raise ConfigError(f"{key}.{name}: {given.name} has no such field; {hint}{whole}")
    try:
        return TypeAdapter(kind).validate_python(given.fields)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, f"{key}."))) from None


def _from_table(table: Mapping[str, str], given: Component, key: str) -> Any:
    thing = resolve.from_table(table, given.name, f"{key}.name")
    if isinstance(thing, type) and dataclasses.is_dataclass(thing):
        return _component(thing, given, key)
    if given.fields:
        raise ConfigError(f"{key}: {given.name} is no dataclass, so it takes no fields; got {sorted(given.fields)}")
    return thing


def make_algorithm(given: Component) -> Algorithm:
    """The algorithm that the section `algorithm` names."""
    kind = resolve.from_package("fldist.algorithms", given.name, Algorithm, "algorithm.name")
    made: Algorithm = _component(kind, given, "algorithm")
    return made


def make_trackers(settings: Settings) -> list[Any]:
    """What `output.trackers` names (`fldist.trackers.Tracker`), not opened yet."""
    keys = [f"output.trackers.{number}" for number in range(len(settings.output.trackers))]
    return [_from_table(TRACKERS, given, key) for given, key in zip(settings.output.trackers, keys, strict=True)]


def _clock(given: Component) -> Clock:
    made = _from_table(clock.NAMES, given, "clock")
    if not isinstance(made, Clock):
        raise ConfigError(
            f"clock.name: {given.name!r} is no frozen dataclass that is a subclass of fldist.clock.Clock; make it one, "
            f"or use {' or '.join(clock.NAMES)}"
        )
    return made


def _fleet(settings: Settings) -> Fleet | None:
    """The devices of the clients that the section `devices` names; None where nothing is simulated."""
    given = settings.devices
    made = _from_table(devices.NAMES, given, "devices")
    if not isinstance(made, Devices):
        raise ConfigError(
            f"devices.name: {given.name!r} is no frozen dataclass that is a subclass of fldist.devices.Devices; make "
            f"it one, or use {', '.join(devices.NAMES)}"
        )
    num_clients = settings.clients.num_clients
    try:
        fleet = made.fleet(num_clients, settings.seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if fleet is not None and fleet.num_clients != num_clients:
        raise ConfigError(f"devices.name: {given.name} gives {fleet.num_clients} devices for {num_clients} clients")
    return fleet


TriedBuild = Callable[..., nn.Module]
"""Makes a model from (shape, classes) and tries it on two blank samples, of the type `sample` (default float32)."""


@dataclasses.dataclass(frozen=True)
class Components:
    """What the names in a configuration stand for, with their fields checked; nothing is loaded yet."""

    algorithm: Algorithm
    selector: Selector
    clock: Clock
    devices: Fleet | None
    partition: Partition
    load_data: Callable[[], Dataset]
    load_public: Callable[[], Dataset] | None
    build_model: TriedBuild
    client_models: list[tuple[str, TriedBuild]]


def components(settings: Settings) -> Components:
    """Look up and check everything that is chosen by name."""
    kind = resolve.from_package("fldist.selection", settings.selection.name, Selector, "selection.name")
    section = settings.task
    public = section.public.data
    if public == section.data:
        public = None  # the same data set: its rows must be kept out of the training rows
    return Components(
        make_algorithm(settings.algorithm),
        _component(kind, settings.selection, "selection"),
        _clock(settings.clock),
        _fleet(settings),
        _from_table(partition.NAMES, section.partition, "task.partition"),
        _loader(section.data, "task.data"),
        _loader(public, "task.public.data") if public is not None else None,
        _builder(section.model, "task.model"),
        [
            (_model_name(given), _builder(given, f"clients.models.{number}"))
            for number, given in enumerate(settings.clients.models)
        ],
    )


def _loader(given: Component, key: str) -> Callable[[], Dataset]:
    data = _from_table(datasets.NAMES, given, key)
    made = data.load if hasattr(data, "load") else data
    return lambda: datasets.accepted(made(), f"{key}: {given.name}")


def _model_name(given: Component) -> str:
    fields = ", ".join(f"{name}={value}" for name, value in given.fields.items())
    return f"{given.name}({fields})" if fields else given.name


def _builder(given: Component, key: str) -> TriedBuild:
    """Makes a model, and tries it on two blank samples: one that does not fit the data is found before any round."""
    model = _from_table(models.NAMES, given, key)
    build_model: Build = model.build if hasattr(model, "build") else model

    def make(shape: tuple[int, ...], classes: int, sample: torch.dtype = torch.float32) -> nn.Module:
        try:
            made = build_model(shape, classes)
        except TypeError as error:
            raise ConfigError(f"{key}: {given.name} must be callable as (shape, classes): {error}") from None
        if not isinstance(made, nn.Module):
            raise ConfigError(f"{key}: {given.name} made a {type(made).__name__}, not an nn.Module")
        try:
            with torch.no_grad():
                outputs = made.eval()(torch.zeros(2, *shape, dtype=sample))
        except Exception as error:
            first = str(error).partition("\n")[0]
            of = "tokens [length]" if sample == torch.int64 else "[channels, height, width]"
            raise ConfigError(f"{key}: {given.name} does not take samples of shape {shape} {of}: {first}") from None
        made.train()
        if not isinstance(outputs, torch.Tensor) or outputs.shape != (2, classes):
            got = tuple(outputs.shape[1:]) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise ConfigError(f"{key}: {given.name} must give {classes} outputs a sample, one a class; it gives {got}")
        return made

    return make


def build(settings: Settings, device: torch.device = CPU) -> Job:
    """The job that settings describe; every rank builds the same. device: what this rank calculates on."""
    chosen = components(settings)
    section = settings.task
    dataset = chosen.load_data()
    sample = sample_type(dataset)
    task = Task(
        dataset=dataset,
        partition=chosen.partition,
        num_clients=settings.clients.num_clients,
        build=partial(chosen.build_model, sample=sample),
        local=settings.local,
        seed=settings.seed,
        partition_seed=settings.seed if section.partition_seed is None else section.partition_seed,
        travel=section.travel,
        subset=section.subset,
        merged=section.merged,
        split=section.split,
        preparation=Preparation(section.normalize, section.resize, section.augment),
        evaluation=settings.eval,
        public=Public(section.public.n, section.public.seed),
        public_dataset=chosen.load_public() if chosen.load_public is not None else None,
        client_models=[(name, partial(make, sample=sample)) for name, make in chosen.client_models],
        feature_dim=section.feature_dim,
        num_outputs=chosen.algorithm.outputs(dataset.classes),
        own_init=settings.clients.init == "own",
        model_name=_model_name(section.model),
        device=device,
    )
    deadlines = settings.deadlines
    return Job(
        algorithm=chosen.algorithm,
        selector=chosen.selector,
        task=task,
        seed=settings.seed,
        rounds=settings.rounds,
        per_round=settings.clients.count(),
        name=settings.name,
        integers=settings.aggregation.integers,
        share=settings.network.share,
        checksum=settings.network.checksum == "full",
        topology=settings.topology,
        limits=Limits(deadlines.join_s, deadlines.client_timeout_s, deadlines.transfer_s),
        round_deadline_s=deadlines.round_deadline_s,
        faults=settings.faults,
        stop=settings.stop,
        clock=chosen.clock,
        devices=chosen.devices,
        stages=settings.stages,
    )
