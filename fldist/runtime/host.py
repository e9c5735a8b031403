"""A host: the process (or, alone, the object) that holds clients and runs their halves of an algorithm."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from fldist.data.client_data import ClientData
from fldist.models.train import warm_up
from fldist.runtime.job import ClientMethod, Job
from fldist.runtime.state import ClientStates, Watch
from fldist.seeding import Streams, forked
from fldist.wire.codec import Frame, FrameBuilder, FrameType, Head, Message, Status, values_of
from fldist.wire.link import HostLink

log = logging.getLogger("fldist.host")

FLUSH_BYTES = 1 << 16
FLUSH_S = 0.05
"""Small replies wait for each other this long at most, so that many ride in one frame."""


class Host:
    """Runs calls. It knows methods and states by the job; how frames come and go is the link's business."""

    def __init__(self, job: Job) -> None:
        warm_up()  # before the first call, so that no round's seconds hold it
        self.job = job
        self.states = ClientStates(lambda c: job.algorithm.init_client(job.task, c), job.algorithm.stateful)
        self._streams: dict[int, Streams] = {}

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
            digests = {str(c): self.states.digest(int(c)) for c in frame.note["clients"]}
            yield Frame(Head(FrameType.DIGEST), note={"digests": digests})

    def _call(self, frame: Frame, obsolete: Callable[[], bool]) -> Iterator[Frame]:
        head = frame.head
        method = self.job.method(head.method)
        assert method is not None  # the codec checked it
        if self.states.begin((head.round, head.attempt)):
            self._streams.clear()
        received_ns = time.monotonic_ns()
        builder = FrameBuilder(self._reply_head(head), share=False)
        opened = time.monotonic()
        for message in frame.messages:
            if obsolete():
                log.info("round %d: the server has gone on; the rest of its calls is left", head.round)
                break
            reply = Message(message.client, received_ns=received_ns, started_ns=time.monotonic_ns())
            values = self._run(method, frame, message, reply)
            reply.ready_ns = time.monotonic_ns()
            if reply.status is Status.OK:
                try:
                    builder.add(reply, method.reply, values)
                except ValueError as error:
                    _fail(reply, f"the reply of {method.name}: {error}")
            if reply.status is Status.ERROR:
                builder.frame.messages.append(reply)
            pending = sum(p.bytes for p in builder.frame.parts)
            if builder.frame.bodies or pending > FLUSH_BYTES or time.monotonic() - opened > FLUSH_S:
                yield builder.frame
                builder = FrameBuilder(self._reply_head(head), share=False)
                opened = time.monotonic()
        if builder.frame.messages:
            yield builder.frame

    def _reply_head(self, head: Head) -> Head:
        return Head(
            FrameType.REPLY,
            round=head.round,
            attempt=head.attempt,
            call=head.call,
            stage=head.stage,
            method=head.method,
        )

    def _run(self, method: ClientMethod, frame: Frame, message: Message, reply: Message) -> tuple[Any, ...]:
        """Run one client's half; an exception becomes the reply's error and stages nothing."""
        job, client, round_number = self.job, message.client, frame.head.round
        streams = self._streams.setdefault(client, Streams(job.seed, round_number, client))
        values = values_of(frame, message, job.layout(client))
        arguments = {spec.name: value for spec, value in zip(method.call.fields, values, strict=True)}
        watch = Watch()
        for name, value in arguments.items():
            watch.add(f"argument {name}", value)
        try:
            me = self.states.view(client)
            data = ClientData(job.task, client, streams)
            with forked(job.seed, "client", *streams.next_key("client")):
                result = method.run(me, data, **arguments)
            changed = watch.changed() or me.watched.changed()
            if changed is not None:
                raise ValueError(f"{changed} was changed in place; it is shared: work on a clone()")
            if method.reply_type is not None and not isinstance(result, method.reply_type):
                raise ValueError(f"returned {type(result).__name__}, not {method.reply_type.__name__}")
        except Exception as error:
            log.exception("round %d: client %d: %s failed", round_number, client, method.name)
            where = traceback.extract_tb(error.__traceback__)[-1]
            _fail(reply, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})")
            return ()
        self.states.stage(client, me.writes)
        return tuple(result) if result is not None else ()


def _fail(reply: Message, text: str) -> None:
    reply.status = Status.ERROR
    reply.error = text[:4000]
    reply.fields = []


def serve_link(host: Host, link: HostLink) -> None:
    """Answer the server until it says goodbye; PeerLost when it is gone."""
    link.expected = host.job.calls()
    link.ready()
    while True:
        frame = link.recv()
        if frame.head.type is FrameType.BYE:
            return
        key = (frame.head.round, frame.head.attempt)
        for reply in host.serve(frame, obsolete=lambda key=key: link.latest > key):  # type: ignore[misc]
            link.send(reply)
