"""Parties: processes that are measured side by side. Each does one round when it is told to, and waits in between.

The measuring process has a Unix socket for each party, over which lines of JSON go: `go` down, what the round showed
up. A party waits for `go` in a blocking read, so that an idle one costs the others nothing. Whoever finds the
socket closed ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fldist.wire.errors import TransportError

START_S = 180.0
"""From a party's start to its being ready: imports and building, of several at the same time."""
ROUND_S = 120.0
END_S = 20.0


class PartyFailed(TransportError):
    """A party ended, or did not answer in time."""


# ---- at the measuring process
class Party:
    """One party. do: `module:function` that it runs with `options`; members: how many of its processes take orders.

    launcher: what its command begins with (mpirun and its flags).
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        do: str,
        options: dict[str, Any],
        *,
        launcher: Sequence[str] = (),
        members: int = 1,
    ) -> None:
        self.name = name
        self._log = directory / f"{name}.log"
        self._members: dict[int, _Lines] = {}
        self._count = members
        path = directory / f"{name}.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(members)
        command = [*launcher, sys.executable, "-m", "fldist.bench.party", do, str(path), json.dumps(options)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def ready(self, within_s: float = START_S) -> dict[str, Any]:
        """Wait until all members are ready; returns what the first one says of itself."""
        deadline = time.monotonic() + within_s
        while len(self._members) < self._count:
            self._listener.settimeout(0.5)
            try:
                lines = _Lines(self._listener.accept()[0])
            except TimeoutError:
                if self._process.poll() is not None:
                    raise self._failed("it ended before it was ready") from None
                if time.monotonic() > deadline:
                    raise self._failed(f"it was not ready within {within_s:g} s") from None
                continue
            self._members[int(self._hear(lines, deadline)["rank"])] = lines
        told = {rank: self._hear(lines, deadline) for rank, lines in self._members.items()}
        return told[min(told)]

    def go(self, within_s: float = ROUND_S) -> dict[str, float]:
        """Have one round done; returns what its first member says of it, when all members have done their parts."""
        deadline = time.monotonic() + within_s
        for rank in sorted(self._members, reverse=True):  # the first member begins: the others should be there
            try:
                self._members[rank].send({"go": True})
            except OSError:
                raise self._failed("it has ended") from None
        answers = {rank: self._hear(lines, deadline) for rank, lines in self._members.items()}
        return answers[min(answers)]

    def _hear(self, lines: _Lines, deadline: float) -> dict[str, Any]:
        try:
            told = lines.next(max(0.1, deadline - time.monotonic()))
        except TimeoutError:
            raise self._failed("it did not answer in time") from None
        if told is None:
            raise self._failed("it ended in the middle of the measurement")
        return told

    def _failed(self, what: str) -> PartyFailed:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)  # its last words are on their way
        words = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        return PartyFailed(f"bench: {self.name}: {what}; its last words:\n{words or '(none)'}")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Stop all its processes for the time of a `with`, which must be far shorter than a run's limits on silence."""
        processes = self._processes()
        try:
            for pid in processes:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _processes(self) -> list[int]:
        """Its processes: those of its session."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(int(entry.name)) == self._process.pid:
                    found.append(int(entry.name))
        return found

    def _shared_memory(self) -> set[Path]:
        """Files below /dev/shm that its processes have mapped: MPI leaves them there when a job does not end well."""
        found = set()
        for pid in self._processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
                    _, slash, name = line.partition(" /dev/shm/")
                    if slash and not name.endswith(" (deleted)"):
                        found.add(Path("/dev/shm", name))  # noqa: S108
        return found

    def end(self) -> None:
        """Let it end, or make it; returns when no process of it is left."""
        shared = self._shared_memory()
        for lines in self._members.values():
            lines.close()
        self._listener.close()
        try:
            self._process.wait(END_S if self._members else 0.0)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # mpirun ends its ranks; a run is interrupted
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
        deadline = time.monotonic() + 5.0
        while (left := self._processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()  # one that has ended is there until it is waited for
            time.sleep(0.01)
        self._process.wait()
        for file in shared:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    """A place for parties to run in; none of them, and nothing of what they wrote, is left afterwards."""
    made = Stage(Path(tempfile.mkdtemp(prefix="fldist-bench-")))
    try:
        yield made
    finally:
        made.clear()
        shutil.rmtree(made.directory, ignore_errors=True)


class Stage:
    """Starts parties and ends them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._parties: list[Party] = []

    def party(self, name: str, do: str, **options: Any) -> Party:
        """Start a party of one process that takes orders."""
        return self._started(Party(self.directory, name, do, options))

    def job(self, name: str, launcher: Sequence[str], members: int, do: str, **options: Any) -> Party:
        """Start a party of several processes under a launcher."""
        return self._started(Party(self.directory, name, do, options, launcher=launcher, members=members))

    def run(self, name: str, config: dict[str, Any], *, nproc: int = 1, launcher: Sequence[str] = ()) -> Party:
        """Start a real run that does a round at a time; `config` must name its number of rounds."""
        options = {"config": config, "nproc": nproc, "output": str(self.directory / f"{name}-run")}
        return self._started(Party(self.directory, name, "fldist.bench.party:run", options, launcher=launcher))

    def _started(self, party: Party) -> Party:
        self._parties.append(party)
        return party

    def clear(self) -> None:
        """End all parties."""
        while self._parties:
            self._parties.pop().end()


class _Lines:
    """JSON values, one a line, over a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._rest = b""

    def send(self, value: dict[str, Any]) -> None:
        self._sock.sendall(json.dumps(value).encode() + b"\n")

    def next(self, within_s: float | None) -> dict[str, Any] | None:
        """The next value, None when the other end has closed; TimeoutError."""
        self._sock.settimeout(within_s)
        while b"\n" not in self._rest:
            try:
                data = self._sock.recv(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        value: dict[str, Any] = json.loads(line)
        return value

    def close(self) -> None:
        self._sock.close()


# ---- at the party
class Orders:
    """The party's end. rank: which member this is; the lowest one's answers count."""

    def __init__(self, path: str, rank: int = 0) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        self._lines = _Lines(sock)
        self._lines.send({"rank": rank})

    def ready(self, **facts: Any) -> None:
        """Say that rounds may come."""
        self._lines.send({"ready": True, **facts})

    def wait(self) -> bool:
        """Wait for the next round; False when there is none."""
        return self._lines.next(None) is not None

    def answer(self, **figures: float) -> None:
        """Tell what the round showed."""
        self._lines.send(figures)


class Ended(RuntimeError):
    """The measuring process is gone in the middle of a run."""


class Stepwise:
    """An observer that holds a run before each round until it is told to go on, and tells what the round showed.

    `round_s` and `cpu_s` (of this process, all threads) go from the order to the moment when all of the round is
    done and written: ledger, checkpoint and rounds.jsonl.
    """

    def __init__(self, path: str) -> None:
        self._orders = Orders(path)
        self._rounds = 0
        self._began = (0.0, 0.0)
        self._memory = False  # whether the peak of the rounds alone can be told

    def started(self, facts: dict[str, Any]) -> None:
        """All hosts have joined, everything is built."""
        self._rounds = facts["rounds"]
        self._memory = forget_peak()
        self._orders.ready(**self._now())
        self._wait()

    def round(self, line: dict[str, Any]) -> None:
        """A round is done."""
        round_s, cpu_s = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        if line["missing"]:
            raise RuntimeError(f"round {line['round']} lacks replies: {line['missing']}")
        self._orders.answer(round_s=round_s, cpu_s=cpu_s, **self._now(), **line.get("log", {}))
        if line["round"] < self._rounds:
            self._wait()

    def _now(self) -> dict[str, int]:
        return memory() if self._memory else {}

    def _wait(self) -> None:
        if not self._orders.wait():
            raise Ended("the measuring process has ended")
        self._began = (time.perf_counter(), time.process_time())

    def warning(self, text: str) -> None:
        """To the party's log."""
        print(text, file=sys.stderr, flush=True)

    def stopped(self, text: str) -> None:
        """To the party's log."""
        print(text, file=sys.stderr, flush=True)

    def finished(self, result: dict[str, Any]) -> None:
        """The run ends as any other."""


def run(path: str, config: dict[str, Any], nproc: int, output: str) -> None:
    """Be a rank of a real run whose server waits for orders."""
    from fldist.config import load
    from fldist.runner import run_here
    from fldist.runtime.launch import find_world

    observer = Stepwise(path) if find_world().rank == 0 else None
    with contextlib.suppress(Ended):
        run_here(load(config), nproc=nproc, output=output, observer=observer)


def memory() -> dict[str, int]:
    """Bytes of this process that are in memory now, and the most since `forget_peak`; empty where there is no /proc."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return {}
    found = dict(line.split(":", 1) for line in text.splitlines())
    return {name: int(found[key].split()[0]) * 1024 for name, key in (("rss_bytes", "VmRSS"), ("peak_bytes", "VmHWM"))}


def forget_peak() -> bool:
    """Set the peak back to what is in memory now; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def main(arguments: Sequence[str]) -> None:
    """What a party's process does: `module:function`, the socket's path, its options as JSON."""
    from fldist.runtime.launch import die_with_parent

    die_with_parent(os.getppid())
    do, path, options = arguments
    module, _, function = do.partition(":")
    getattr(importlib.import_module(module), function)(path, **json.loads(options))


if __name__ == "__main__":
    from fldist.bench.party import main as imported

    imported(sys.argv[1:])  # not this copy's: what a run imports by name must be the same module
