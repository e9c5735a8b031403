"""A host: the process (or, alone, the object) that holds clients and runs their halves of an algorithm."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fldist.algorithm import State
from fldist.data.client_data import ClientData, FirstEpoch, Trained
from fldist.kinds import HELD, Form, Kind
from fldist.models.evaluate import evaluate, warm_up_metrics
from fldist.models.train import warm_up
from fldist.params import Layout, Params
from fldist.runtime.checkpoint import Damaged
from fldist.runtime.folding import Folds, folds_told, most_folded, unpacked
from fldist.runtime.job import ClientMethod, Job, Probed
from fldist.runtime.once import OnceValues, named
from fldist.runtime.state import UNKEPT, ClientStates, ClientView, Watch, version_of
from fldist.seeding import Streams, derive, forked, preserved, reseed
from fldist.selection import UtilEpochs
from fldist.wire.codec import (
    Expected,
    Frame,
    FrameBuilder,
    FrameType,
    Head,
    Message,
    Place,
    Status,
    value_of,
    values_of,
)
from fldist.wire.errors import BadMessage, PeerLost
from fldist.wire.link import HostLink, How
from fldist.wire.staging import to_device, to_host

log = logging.getLogger("fldist.host")
T = TypeVar("T")

FLUSH_BYTES = 1 << 16
FLUSH_S = 0.05
"""Small replies wait for each other this long at most, so that many ride in one frame."""
_FORGET = 0.999
"""What one client after another leaves of the longest time that one took: a hiccup is no rule for ever."""


class Host:
    """Runs calls. It knows methods and states by the job; how frames come and go is the link's business.

    The global generators are seeded anew before every client method. Clients calculate on the task's device; what a
    frame brings is moved there once, whoever of its clients shares it. place: brings a reply's bodies, and the blocks
    of folds, to where the link takes them from.
    """

    def __init__(self, job: Job, place: Callable[[torch.Tensor], torch.Tensor] = to_host) -> None:
        warm_up(job.task.device)  # before the first call, so that no round's seconds hold it
        self.place = place
        if job.evaluation.where != "server" or job.evaluation.own:
            warm_up_metrics(job.evaluation)
        self.job = job
        self.states = ClientStates(self._first_state, job.algorithm.stateful, job.task.device)
        self._streams: dict[int, Streams] = {}
        self._selector_seed = derive(job.seed, "selector")
        self._selector_streams: dict[int, Streams] = {}  # what a selector asks changes nothing of what clients draw
        self._begun: dict[int, tuple[str, Trained]] = {}  # by client: the method that a probe began, how far it came
        self._once = OnceValues()
        self._spoilt: dict[int, str] = {}  # clients whose committed state was changed in place
        self._longest_s: dict[int, float] = {}  # by method: what a client took at most, lately
        self._sent: dict[int, Params] = {}  # by client: the weights it was sent in this round, where these are scored
        self._copied: tuple[Params, Params] | None = None  # weights of a message, and the copy that outlives it
        self._kept: dict[str, Any] = {}  # arguments of the call under way, for its later frames
        self._kept_of: tuple[int, int, int] = (0, 0, 0)
        self._folds: Folds | None = None  # of the call under way
        self._most_folded = 0  # elements of the largest tensor that hosts fold in it
        self._changed: str | None = None  # what a client of this call changed although all share it

    def _first_state(self, client: int) -> State:
        """A client's state before its first call: the same on any host, whenever it is asked for."""
        with forked(self.job.seed, "init_client", client):
            return self.job.algorithm.init_client(self.job.task, client)

    def begin_session(self) -> None:
        """A server, perhaps another one than before, has welcomed this host: no round has begun."""
        self.states.forget()
        self._forget_round()
        self._once.clear()
        self._kept.clear()
        self._kept_of = (0, 0, 0)

    def _forget_round(self) -> None:
        """Another round begins, or the same again."""
        self._streams.clear()
        self._selector_streams.clear()
        self._begun.clear()
        self._sent.clear()
        self._copied = None

    def serve(self, frame: Frame, obsolete: Callable[[], bool] = lambda: False) -> Iterator[Frame]:
        """Answer a frame with frames, one after the other as the work proceeds."""
        for verdict in frame.note.get("verdicts", []):
            self.states.verdict(
                (int(verdict["round"]), int(verdict["attempt"])),
                bool(verdict["commit"]),
                {int(c): int(k) for c, k in verdict["accepted"]},
            )
        if frame.head.type is FrameType.CALL:
            yield from self._call(frame, obsolete)
        elif frame.head.type is FrameType.DIGEST:
            digests = {}
            for client, version in frame.note["versions"].items():
                try:
                    self.states.take(int(client), str(version))
                    digests[client] = self.states.digest(int(client))
                except Damaged as error:
                    log.error("%s", error)
            yield Frame(Head(FrameType.DIGEST), note={"digests": digests})

    def serve_aside(self, frame: Frame, obsolete: Callable[[], bool]) -> Iterator[Frame]:
        """As `serve`, in a process that is not the host's own: its global generators are left as they were."""
        frames = self.serve(frame, obsolete)
        while True:
            with preserved():
                reply = next(frames, None)
            if reply is None:
                return
            yield reply

    def _call(self, frame: Frame, obsolete: Callable[[], bool]) -> Iterator[Frame]:
        head = frame.head
        method = self.job.method(head.method)
        assert method is not None  # the codec checked it
        if self.states.begin((head.round, head.attempt)):
            self._forget_round()
        to_device(frame, self.job.task.device)
        self._keep_once(method, frame)
        self._keep(method, frame)
        received_ns = time.monotonic_ns()
        folds = self._folds = self._begin_folds(method, frame)
        versions = frame.note.get("versions", {})
        builder = self._builder(head)
        opened = time.monotonic()
        for message in frame.messages:
            if obsolete():
                log.info("round %d: the server has gone on; the rest of its calls is left", head.round)
                break
            reply = Message(message.client, received_ns=received_ns, started_ns=time.monotonic_ns())
            wrote = False
            if self._changed is None:
                values, self._changed, wrote = self._run(
                    method, frame, message, reply, str(versions.get(str(message.client), ""))
                )
            else:
                _fail(reply, f"{self._changed} by another client of this host; work on a clone()")
            reply.ready_ns = time.monotonic_ns()
            if reply.status is Status.OK:
                try:
                    builder.add(reply, method.reply, values if folds is None else folds.taken_out(values))
                except Exception as error:  # whatever a method returns costs that client, not its host
                    _fail(reply, f"the reply of {method.name}: {error}")
            if reply.status is Status.OK and folds is not None:
                refusal = folds.add(message.client, values)
                if refusal is not None:
                    reply.status, reply.error = Status.REFUSED, refusal
            if reply.status is Status.ERROR:
                builder.frame.messages.append(reply)
            elif wrote:
                builder.frame.note.setdefault("wrote", []).append(message.client)
            if self._due(method, reply, builder.frame, opened):
                yield builder.frame
                builder = self._builder(head)
                opened = time.monotonic()
        if builder.frame.messages:
            yield builder.frame

    def _due(self, method: ClientMethod, reply: Message, frame: Frame, opened: float) -> bool:
        """Whether a frame should go now: it is large, has waited, or the next client may take long."""
        took_s = (reply.ready_ns - reply.started_ns) / 1e9
        longest_s = max(took_s, _FORGET * self._longest_s.get(method.number, 0.0))
        self._longest_s[method.number] = longest_s
        large = bool(frame.bodies or frame.world) or sum(p.bytes for p in frame.parts) > FLUSH_BYTES
        return large or longest_s > FLUSH_S or time.monotonic() - opened > FLUSH_S

    def _builder(self, head: Head) -> FrameBuilder:
        reply = Head(
            FrameType.REPLY,
            epoch=head.epoch,
            round=head.round,
            attempt=head.attempt,
            call=head.call,
            stage=head.stage,
            method=head.method,
        )
        large: Literal[Place.BODY, Place.WORLD] = Place.WORLD if self.job.topology == "collective" else Place.BODY
        return FrameBuilder(reply, share=False, layout=self.job.layout, large=large, place=self.place)

    def _run(
        self, method: ClientMethod, frame: Frame, message: Message, reply: Message, version: str
    ) -> tuple[tuple[Any, ...], str | None, bool]:
        """Run one client's half from a version of its state.

        Returns its values, which shared argument it changed in place, if any, and whether a new version of its state
        is in its files. An exception becomes the reply's error and stages nothing.
        """
        job, client, round_number = self.job, message.client, frame.head.round
        streams = self._streams_of(method, client, round_number)
        try:
            arguments = self._arguments(method, frame, message)
        except (KeyError, ValueError) as error:
            _fail(reply, f"this host does not hold {error}" if isinstance(error, KeyError) else str(error))
            return (), None, False
        if job.evaluation.model == "sent":
            self._keep_sent(method, client, arguments)
        shared = Watch()
        for name, value in arguments.items():
            shared.add(f"argument {name}", value)
        me: ClientView | None = None
        result: Any = None
        try:
            try:
                self.states.take(client, version)
            except Damaged as error:
                raise ValueError(f"{UNKEPT}read: {error}") from None
            me = self.states.view(client, frame.head.stage)
            if method.of == "selector":
                me = ClientView(client, [], State(), may_write=False, stage=frame.head.stage)
            if client in self._spoilt:
                raise ValueError(self._spoilt[client])
            data = ClientData(
                job.task,
                client,
                streams,
                sent=self._sent.get(client),
                reports=_squares(job, method),
                own=round_number > 0 and job.scores_own(method.of_algorithm),  # the setup has no scores
                clock=job.clock,
                pause=_pause(job, client),
                begins=method.of == "probe",
                begun=self._take_begun(method, client),
            )
            reseed(job.seed, "client", *streams.next_key("client"))
            work = partial(method.run if method.of != "probe" else partial(self._begin, method), me, data, **arguments)
            result, took_s = _timed(job, method, client, work)
            if method.of == "probe":
                assert data.trained is not None
                result = Probed(data.trained.progress.losses[0], _seconds(job, data, took_s))
            if method.reply_type is not None and not isinstance(result, method.reply_type):
                raise ValueError(f"returned {type(result).__name__}, not {method.reply_type.__name__}")
            scores = None
            if method.of == "algorithm":  # whatever scoring draws: the next client's streams are its own
                scores = _own_scores(job, data)
        except Exception as error:
            log.exception("round %d: client %d: %s failed", round_number, client, method.name)
            where = traceback.extract_tb(error.__traceback__)[-1]
            _fail(reply, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})")
        own = me.watched.changed() if me is not None else None
        if own is not None:  # what was committed is gone: this client has no state to go on from
            self._spoilt[client] = f"{own} was changed in place in round {round_number}; set it to a new value instead"
            _fail(reply, self._spoilt[client])
        changed = shared.changed()
        if changed is not None:
            name, changed = changed.removeprefix("argument "), f"{changed} was changed in place"
            self._once.spoil(_once_name(method, frame, name), f"{changed} in round {round_number}; work on a clone()")
            _fail(reply, f"{changed}; all clients share it: work on a clone()")
        if reply.status is Status.ERROR or me is None:
            return (), changed, False
        wrote = False
        try:
            if method.of == "algorithm":  # other calls change no client's state
                wrote = self.states.stage(client, me.writes, version_of(frame.head))
        except OSError as error:  # a full disk costs this client's reply, not the host
            log.exception("round %d: client %d: its state cannot be written", round_number, client)
            _fail(reply, f"{UNKEPT}written: {error}")
            return (), None, False
        told = tuple(result) if result is not None else ()
        if job.reports(method.name):
            told += (_report(job, method, data, took_s),)
        if job.scores_own(method.name):
            told += (scores,)
        return told, None, wrote

    def _streams_of(self, method: ClientMethod, client: int, number: int) -> Streams:
        """What a client draws from in a call: a probe draws what the call that goes on with it would have drawn."""
        if method.of == "probe":
            return Streams(self.job.seed, number, client)
        if method.of == "selector":
            return self._selector_streams.setdefault(client, Streams(self._selector_seed, number, client))
        return self._streams.setdefault(client, Streams(self.job.seed, number, client))

    def _take_begun(self, method: ClientMethod, client: int) -> Trained | None:
        """The training that a probe has begun for this call, which takes it over."""
        begun = self._begun.get(client)
        if method.of != "algorithm" or begun is None or begun[0] != method.name:
            return None
        del self._begun[client]
        return begun[1]

    def _begin(self, method: ClientMethod, me: ClientView, data: ClientData, **arguments: Any) -> None:
        """Do a client half up to the end of its first local epoch, and keep that for the call that goes on with it."""
        try:
            method.run(me, data, **arguments)
        except FirstEpoch:
            assert data.trained is not None
            self._begun[me.client] = (method.of_algorithm, data.trained)
        else:
            raise ValueError(
                "selection.name: this selector has clients begin their training, and in this call they train no model; "
                "use another selector, such as random"
            )

    def _arguments(self, method: ClientMethod, frame: Frame, message: Message) -> dict[str, Any]:
        """A message's arguments, with what this host holds of them; masked models are Params.

        KeyError and ValueError where it does not hold them, or a model is not as its mask has it.
        """
        fields = method.call.fields
        values = values_of(frame, message, self.job.layout(message.client))
        arguments = {spec.name: value for spec, value in zip(fields, values, strict=True)}
        for spec, value in zip(fields, message.fields, strict=True):
            if value.version is not None:
                arguments[spec.name] = self._once.get(_once_name(method, frame, spec.name), value.version)
            elif arguments[spec.name] is HELD:
                arguments[spec.name] = self._kept[spec.name]
        for spec in fields:
            if spec.sparse is not None:
                mask = arguments[spec.sparse.mask] if spec.sparse.mask is not None else None
                arguments[spec.name] = unpacked(spec, arguments[spec.name], mask)
        return arguments

    def _keep_once(self, method: ClientMethod, frame: Frame) -> None:
        """Keep the `Once` values of a call, before any client runs or is left out: the server counts on it."""
        for message in frame.messages:
            for spec, value in zip(method.call.fields, message.fields, strict=True):
                if value.version is not None and value.form is not Form.HELD:
                    layout = self.job.layout(message.client)
                    name = _once_name(method, frame, spec.name)
                    self._once.put(name, value.version, value_of(frame, value, layout))

    def _begin_folds(self, method: ClientMethod, frame: Frame) -> Folds | None:
        """What folds the replies of this host's clients, where the call says how."""
        told = frame.note.get("fold")
        self._most_folded = most_folded(told) if told else 0
        if not told or not frame.messages:
            return None
        arguments = self._arguments(method, frame, frame.messages[0])
        return Folds(self.job, method, folds_told(told), arguments, partly=True)

    def blocks(self, told: Sequence[tuple[int, How]]) -> list[tuple[Tensor, How]]:
        """The int64 blocks of the call's folds, or what changes nothing where no client of this host was called.

        told: elements of every block, and how it is combined with others' (`sum`, `max`). The folds' blocks lie where
        the link takes replies from (`place`), what changes nothing on the CPU.
        """
        folds, self._folds = self._folds, None
        if folds is not None:
            blocks = [block for accumulator in folds.fixed() for block in accumulator.blocks()]
            if [(b.tensor.numel(), b.how) for b in blocks] != [(n, how) for n, how in told]:
                raise BadMessage(f"the server asks for blocks {told}, which are not those of the call")
            return [(self.place(b.tensor), b.how) for b in blocks]
        most = max((a.layout.num_floats + a.layout.num_ints for a in self.job.task.architectures), default=0)
        most = max(most, self._most_folded)
        if any(not 0 <= n <= most for n, _ in told):
            raise BadMessage(f"the server asks for blocks {told}; nothing that is folded has more than {most} elements")
        least = torch.iinfo(torch.int64).min
        return [(torch.full((n,), 0 if how == "sum" else least, dtype=torch.int64), how) for n, how in told]

    def _keep(self, method: ClientMethod, frame: Frame) -> None:
        """Keep the arguments of a call that has further frames, which do not repeat them."""
        head = frame.head
        if self._kept_of != (head.round, head.attempt, head.call):
            self._kept_of = (head.round, head.attempt, head.call)
            self._kept.clear()
            self._changed = None
        if frame.note.get("keep"):
            message = frame.messages[0]
            layout = self.job.layout(message.client)
            values = values_of(frame, message, layout)
            self._kept = {f.name: v for f, v in zip(method.call.fields, values, strict=True) if v is not HELD}

    def _keep_sent(self, method: ClientMethod, client: int, arguments: dict[str, Any]) -> None:
        """Remember the weights that a client was sent, in a copy: a message's memory is the link's."""
        for spec in method.call.fields:
            value = arguments[spec.name]
            if (spec.kind, spec.form) == (Kind.WEIGHTS, Form.PARAMS) and value is not None:
                if self._copied is None or self._copied[0].floats.data_ptr() != value.floats.data_ptr():
                    self._copied = (value, value.clone())
                self._sent[client] = self._copied[1]


def _timed(job: Job, method: ClientMethod, client: int, work: Callable[[], T]) -> tuple[T, float]:
    """Do a client's work; its value, and the seconds that the clock gives it, NaN where no reply tells them."""
    measured = job.devices is None or job.devices.sleeps
    if not measured or not (job.reports(method.name) or method.of == "probe"):
        return work(), float("nan")
    return job.clock.time(f"client {client}", work)


def _squares(job: Job, method: ClientMethod) -> UtilEpochs | None:
    """Of which epochs a client's training is to sum up squared losses, if any."""
    wanted = job.selector.wants_reports and job.reports(method.of_algorithm)
    return job.selector.util_epochs if wanted else None


def _pause(job: Job, client: int) -> Callable[[float], None] | None:
    """What makes a client as slow as its device, where hosts really sleep: gets the epochs that it has trained."""
    pauses_s = job.devices.pauses_s if job.devices is not None else None
    return None if pauses_s is None else lambda epochs: time.sleep(epochs * pauses_s[client])


def _seconds(job: Job, data: ClientData, took_s: float) -> float:
    """Seconds of a client's training: of its device, where it is simulated, or those by the clock."""
    devices = job.devices
    return took_s if devices is None or devices.sleeps else devices.seconds(data.client, data.epochs)


def _report(job: Job, method: ClientMethod, data: ClientData, took_s: float) -> torch.Tensor | None:
    """See `selection.ClientReport`: float64 [5]; None of a selector's client half that has trained nothing.

    took_s: seconds of the method by the clock, if they count.
    """
    if method.of == "selector" and not data.epochs:
        return None
    nan, trained = float("nan"), data.trained
    squares, loss = (trained.squares, trained.progress.losses[0]) if trained and trained.progress.losses else (nan, nan)
    if not job.selector.wants_reports:  # nobody has added them up
        squares = nan
    seconds = _seconds(job, data, took_s)
    joules = nan if job.devices is None else job.devices.joules(data.client, seconds)
    return torch.tensor([data.n, squares, loss, seconds, joules], dtype=torch.float64)


def _once_name(method: ClientMethod, frame: Frame, argument: str) -> str:
    """Under what name this host keeps a `Once` argument of a call."""
    names = frame.note.get("once")
    return named(method.name, argument, str(names[argument]) if isinstance(names, dict) and argument in names else None)


def _own_scores(job: Job, data: ClientData) -> torch.Tensor | None:
    """See `job.OWN`; None for a call in which no model was trained, or none is to be scored."""
    how, trained = job.evaluation, data.trained
    if trained is None or data.own_model is None:
        return None
    assert how.split != "auto"
    training = {**evaluate(nn.Identity(), trained.outputs, how).values, "loss": trained.loss}
    scores = data.evaluate(data.own_model, how.split, trained.architecture)
    rows = [values[name] for values in (training, scores.values) for name in how.names]
    return torch.tensor([scores.n, *rows], dtype=torch.float64)


def _fail(reply: Message, text: str) -> None:
    reply.status = Status.ERROR
    reply.error = text[:4000]
    reply.fields = []


def refuse_link(link: HostLink) -> None:
    """Tell the server why this host cannot take part (`link.about`), and wait until it hangs up."""
    link.expected = Expected(lambda number: None, lambda client: Layout((), (), ()))
    link.ready()
    with contextlib.suppress(PeerLost):
        while link.recv().head.type is not FrameType.BYE:
            pass


def serve_link(host: Host, link: HostLink) -> None:
    """Answer the server until it says goodbye; PeerLost when it is gone."""
    host.begin_session()
    link.expected = host.job.calls()
    link.ready()
    while True:
        frame = link.recv()
        if frame.head.type is FrameType.BYE:
            return
        if frame.head.type is FrameType.GATHER:
            link.gather(int(frame.note["bytes"]))
            continue
        if frame.head.type is FrameType.REDUCE:
            link.reduce(host.blocks([(int(n), "max" if how == "max" else "sum") for n, how in frame.note["blocks"]]))
            continue
        key = (frame.head.round, frame.head.attempt)
        for reply in host.serve(frame, obsolete=lambda key=key: link.latest > key):  # type: ignore[misc]
            link.send(reply)
            del reply
        del frame  # a host that waits holds no blocks: the next call's are these again, perhaps still in a cache
