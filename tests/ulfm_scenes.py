"""Run under `mpirun --with-ft ulfm` by test_ulfm.py: hosts die at every moment and are replaced, in one MPI job.

Rank 0 drives a MpiServer by hand and writes what it saw to a JSON file. The other ranks, and the processes spawned
for those that died, do what the calls' notes say. Rank 1 is never touched: it answers small calls all the time, and
how long it takes shows whether the others' deaths disturb it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from fldist.wire.ulfm import prepare

prepare()
from mpi4py import MPI  # noqa: E402  (before all that takes long: the server's spawn waits for it)

SPAWNED = MPI.Comm.Get_parent() != MPI.COMM_NULL
import torch  # noqa: E402

from fldist.config import load  # noqa: E402
from fldist.kinds import Field, Form, Kind, Schema  # noqa: E402
from fldist.wire import mpi  # noqa: E402
from fldist.wire.codec import Expected, Frame, FrameBuilder, FrameType, Head, Message  # noqa: E402
from fldist.wire.link import Joined, Limits, Lost, Received, Sent, Welcome  # noqa: E402
from tests.conftest import small  # noqa: E402

SCHEMA = Schema((Field("x", Kind.LOGITS, Form.TENSOR, False, 2**30),))
EXPECTED = Expected(lambda number: SCHEMA, lambda client: None)  # type: ignore[arg-type,return-value]
LARGE = 100_000_000
LIMITS = Limits(join_s=20.0, silence_s=2.0)
WITHIN_S = 20.0


def frame_of(kind: FrameType, note: dict[str, Any], size: int = 0) -> Frame:
    builder = FrameBuilder(Head(kind))
    if size:
        builder.add(Message(0), SCHEMA, [torch.full((size // 4,), 1.0)])
    builder.frame.note = note
    return builder.frame


# ---- hosts


class DyingEngine(mpi.Engine):
    """Kills its process at a moment of a transfer; the file says when."""

    moment = ""
    stamp = Path()

    def die(self) -> None:
        self.stamp.write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    def _take(self, peer: mpi.Peer, data: bytes) -> None:
        super()._take(peer, data)
        if self.moment == "head" and peer.waiting:
            self.die()

    def die_soon(self) -> None:
        """While the I/O thread copies: 100 MB take ten times as long."""
        self.moment = ""
        threading.Timer(0.003, self.die).start()

    def _receive_bodies(self, peer: mpi.Peer) -> bool:
        if self.moment == "download" and peer.waiting and peer.waiting[0].bodies:
            self.die_soon()
        return super()._receive_bodies(peer)

    def _finish_sends(self) -> bool:
        if self.moment == "upload" and any(len(entry.requests) > 1 for entry in self._sending):
            self.die_soon()
        return super()._finish_sends()


def be_host(comm: Any, rank: int) -> None:
    mpi.Engine = DyingEngine  # type: ignore[misc]
    link = mpi.MpiHost(comm, LIMITS)
    engine: Any = link._engine
    link.expected = EXPECTED
    link.ready()
    while True:
        frame = link.recv()
        if frame.head.type is FrameType.BYE:
            break
        note = frame.note
        engine.stamp = Path(note.get("stamp", "/dev/null"))
        engine.moment = note.get("moment", "")
        if engine.moment == "exit":
            engine.stamp.write_text(str(time.monotonic()))
            os._exit(7)
        if engine.moment == "compute":
            torch.randn(400, 400) @ torch.randn(400, 400)
            time.sleep(0.05)
            engine.die()
        if not note.get("silent"):
            link.send(frame_of(FrameType.REPLY, {"to": note.get("number")}, int(note.get("up", 0))))
    link.close()


# ---- the server


def usage() -> dict[str, Any]:
    receivers = [t for t in threading.enumerate() if t.name.startswith("fldist-mpi-receive")]
    return {
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * 4096,
        "threads": len(os.listdir("/proc/self/task")) - len(receivers),
        "own_threads": sorted(t.name for t in threading.enumerate() if t not in receivers),
        "receivers": len(receivers),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


class Server:
    def __init__(self, comm: Any, directory: Path) -> None:
        self.directory = directory
        self.link = mpi.MpiServer(comm, LIMITS)
        self.engine: Any = self.link._engine
        self.ranks = list(range(1, comm.Get_size()))
        self.number = 0
        self.events: list[tuple[float, Any]] = []
        self.trips: list[float] = []
        self.pids: dict[int, int] = {}
        self.incarnations: dict[int, int] = {}
        self.seen: dict[str, Any] = {"survives": self.link.survives, "fault_tolerant": self.link.fault_tolerant}
        self._asked: tuple[int, float] | None = None
        maps = Path("/proc/self/maps").read_text().split()
        self.seen["files"] = sorted(
            {word for word in maps if "sm_segment" in word} | {os.environ["PMIX_SERVER_TMPDIR"]}
        )

    def call(self, rank: int, size: int = 0, **note: Any) -> int:
        self.number += 1
        assert self.link.post(rank, frame_of(FrameType.CALL, {"number": self.number, **note}, size))
        return self.number

    def turn(self) -> None:
        """Take an event; keep rank 1 answering."""
        if self._asked is None and 1 in self.incarnations:
            self._asked = (self.call(1), time.monotonic())
        event = self.link.next_event(0.005)
        if event is None:
            return
        now = time.monotonic()
        if isinstance(event, Received) and event.rank == 1 and self._asked and event.frame.note["to"] == self._asked[0]:
            event.release()
            self.trips.append(now - self._asked[1])
            self._asked = None
            return
        if isinstance(event, Sent) and event.rank == 1:
            return
        if isinstance(event, Joined):
            self.pids[event.rank] = event.info["pid"]
            self.incarnations[event.rank] = event.incarnation
        if isinstance(event, Received):
            event.release()
            whole = all(bool((p.tensor == 1).all()) for p in event.frame.bodies)
            event = Received(event.rank, Frame(event.frame.head, note={"whole": whole}), event.done_ns, event.release)
        self.events.append((now, event))

    def until(self, done: Any, timeout_s: float = WITHIN_S) -> bool:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                return False
            self.turn()
        return True

    def took(self, since: int, kind: type, rank: int) -> list[tuple[float, Any]]:
        return [(at, e) for at, e in self.events[since:] if isinstance(e, kind) and e.rank == rank]

    def start(self) -> None:
        self.link.expected = EXPECTED
        self.link.admit(Welcome(bytes(range(16)), 0, load(small()).resolved(), directory=str(self.directory)))
        assert self.until(lambda: set(self.incarnations) == set(self.ranks))
        self.seen["first"] = dict(self.incarnations)

    def quiet(self) -> None:
        """Round trips with nothing else going on, to compare with."""
        self.trips.clear()
        self.until(lambda: len(self.trips) >= 150)
        self.seen["quiet"] = sorted(self.trips)

    def kill(self, rank: int, moment: str) -> dict[str, Any]:
        """Have a host die at a moment; what was seen of it."""
        since = len(self.events)
        self.trips.clear()
        stamp = self.directory / f"stamp-{len(os.listdir(self.directory))}"
        stamp.write_text("")
        if moment == "idle":
            os.kill(self.pids[rank], signal.SIGKILL)
            stamp.write_text(str(time.monotonic()))
        else:
            self.call(rank, moment=moment, stamp=str(stamp), up=LARGE if moment == "upload" else 0)
            if moment in ("download", "head"):  # of the next call, which comes when the host is ready to die
                self.until(lambda: bool(self.took(since, Received, rank)))
                since = len(self.events)
                self.call(rank, LARGE if moment == "download" else 0)
        noticed = self.until(lambda: bool(self.took(since, Lost, rank)), 6.0)
        lost = self.took(since, Lost, rank)
        self.until(lambda: False, 0.1)
        return {
            "rank": rank,
            "moment": moment,
            "incarnation": self.incarnations[rank],
            "noticed_s": lost[0][0] - float(stamp.read_text() or "nan") if noticed else None,
            "reason": lost[0][1].reason if noticed else None,
            "times_lost": len(self.took(since, Lost, rank)),
            "acknowledged": len(self.took(since, Sent, rank)),
            "received": len(self.took(since, Received, rank)),
            "half": sum(not e.frame.note["whole"] for _, e in self.took(since, Received, rank)),
            "others_lost": [e.rank for _, e in self.events[since:] if isinstance(e, Lost) and e.rank != rank],
            "trips": sorted(self.trips),
            "unsent": self.engine._unsent,
            "sending": sum(entry.peer.rank == rank for entry in self.engine._sending),
            "refused": not self.link.post(rank, frame_of(FrameType.CALL, {})),
        }

    def respawn(self, *ranks: int) -> dict[str, Any]:
        """Replace lost hosts, all at once; each must answer a small and a large call."""
        since = len(self.events)
        before = {rank: self.incarnations[rank] for rank in ranks}
        self.trips.clear()
        began = time.monotonic()
        for rank in ranks:
            self.link.respawn(rank)
        took = time.monotonic() - began
        joined = self.until(lambda: all(self.took(since, Joined, rank) for rank in ranks))
        back = time.monotonic() - began
        numbers = {}
        if joined:
            numbers = {rank: self.call(rank, LARGE // 10, up=LARGE // 10) for rank in ranks}
        answered = self.until(lambda: all(self.took(since, Received, rank) for rank in numbers))
        kinds = [(type(e).__name__, e.rank) for _, e in self.events[since:]]
        return {
            "ranks": list(ranks),
            "respawn_took_s": took,
            "back_s": back,
            "before": before,
            "after": {rank: self.incarnations[rank] for rank in ranks},
            "joined": joined,
            "answered": answered,
            "stray": [k for k in kinds if k[1] not in ranks or k[0] == "Lost"],
            "first": [next((k[0] for k in kinds if k[1] == rank), "") for rank in ranks],
            "trips": sorted(self.trips),
        }

    def end(self) -> None:
        began = time.monotonic()
        self.link.close(10.0)
        self.seen["close_s"] = time.monotonic() - began
        self.seen["all_left"] = self.link.all_left


def replacement(*arguments: str) -> None:
    mpi.SPAWNED = (str(Path(__file__)), *arguments)


def many_deaths(server: Server, seen: dict[str, Any]) -> None:
    """Ranks 2 to 6 die at one moment each, first as ranks of the job, then as spawned processes."""
    moments = {2: "idle", 3: "download", 4: "compute", 5: "upload", 6: "head"}
    seen["deaths"] = [server.kill(rank, moment) for rank, moment in moments.items()]
    seen["respawns"] = [server.respawn(*moments)]
    seen["deaths"] += [server.kill(rank, moment) for rank, moment in moments.items()]


def in_a_row(server: Server, seen: dict[str, Any]) -> None:
    """Rank 2 is replaced and killed again and again; the server's usage after each time."""
    seen["row"] = []
    times = int(os.environ.get("ULFM_TIMES", "3"))
    for k in range(times):
        again = server.respawn(2)
        server.until(lambda: False, 0.6)  # what is freed at a heartbeat
        seen["row"].append({**again, "usage": usage()})
        if k < times - 1:
            seen["deaths"].append(server.kill(2, ("download", "upload")[k % 2]))


def stopped(server: Server, seen: dict[str, Any]) -> None:
    """A host is stopped in the middle of a download, and replaced."""
    since = len(server.events)
    pid = server.pids[2]
    os.kill(pid, signal.SIGSTOP)
    server.call(2, LARGE)
    began = time.monotonic()
    server.until(lambda: bool(server.took(since, Lost, 2)))
    lost = server.took(since, Lost, 2)
    seen["stopped"] = {
        "noticed_s": time.monotonic() - began,
        "reason": lost[0][1].reason if lost else None,
        "kept": len(server.engine._stuck),
        **server.respawn(2),
        "still_there": Path(f"/proc/{pid}/cwd").exists() and "python" in Path(f"/proc/{pid}/cmdline").read_text(),
    }


def failing_starts(server: Server, seen: dict[str, Any]) -> None:
    """Replacements that end before MPI_Init, between it and joining, and for which there is no program."""
    server.kill(2, "idle")
    seen["failing"] = []
    normal = mpi.SPAWNED
    limits = server.link.limits
    for (name, join_s), spawned in {
        ("before MPI", 1.0): ("-c", "pass"),
        ("before joining", 6.0): ("-c", "import mpi4py.MPI, os, time; time.sleep(0.5); os.kill(os.getpid(), 9)"),
    }.items():
        since = len(server.events)
        server.trips.clear()
        mpi.SPAWNED = spawned
        server.link.limits = Limits(join_s=join_s, silence_s=2.0)
        server.link.respawn(2)
        began = time.monotonic()
        server.until(lambda since=since: bool(server.took(since, Lost, 2)))
        lost = server.took(since, Lost, 2)
        seen["failing"].append(
            {
                "name": name,
                "took_s": time.monotonic() - began,
                "reason": lost[0][1].reason if lost else None,
                "trips": sorted(server.trips),
            }
        )
    server.link.limits = limits
    mpi.SPAWNED = normal


def the_real_one(server: Server, seen: dict[str, Any]) -> None:
    """What `fldist _spawned` does."""
    since = len(server.events)
    mpi.SPAWNED = ("-m", "fldist", "_spawned")
    server.link.respawn(2)
    joined = server.until(lambda: bool(server.took(since, Joined, 2)))
    seen["real"] = {
        "joined": joined,
        "incarnation": server.incarnations[2],
        "log": (server.directory / "rank-2.log").read_text() if joined else "",
    }
    server.kill(2, "idle")
    server.link.respawn(2)  # and the end comes before it has joined


def serve(comm: Any, directory: Path) -> None:
    replacement()
    server = Server(comm, directory)
    seen = server.seen
    out = directory / "seen.json"
    try:
        server.start()
        server.quiet()
        if os.environ.get("ULFM_END") == "server dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("ULFM_END") == "host exits":
            seen["exits"] = server.kill(2, "exit")
            server.end()
            print("the server has ended", flush=True)
            return
        for scene in (many_deaths, in_a_row, stopped, failing_starts, the_real_one):
            began = time.monotonic()
            scene(server, seen)
            seen.setdefault("scenes", {})[scene.__name__] = time.monotonic() - began
            out.write_text(json.dumps(seen))
        server.end()
    except BaseException:
        traceback.print_exc()
        server.link.close(1.0)
        comm.Abort(1)
    out.write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if SPAWNED:
        try:
            be_host(MPI.Comm.Get_parent(), int(sys.argv[-2]))
        except Exception as error:
            print(f"replacement: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        MPI.Finalize()
    elif MPI.COMM_WORLD.Get_rank() == 0:
        serve(MPI.COMM_WORLD, Path(sys.argv[1]))
    else:
        try:
            be_host(MPI.COMM_WORLD, MPI.COMM_WORLD.Get_rank())
        except Exception as error:
            print(f"host: {error}", file=sys.stderr, flush=True)
            os._exit(1)
