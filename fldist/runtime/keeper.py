"""Who keeps a run's state in its directory, and takes it up again: one owner at a time, a checkpoint every round.

owner.lock                              held by the process that writes here
checkpoints/round-000012.safetensors    the server's state after round 12, with all that a continuation needs
checkpoints/LATEST                      the newest one's name
checkpoints/EPOCH                       how many servers this run has had before the one that writes now
clients/00003/12.0.1.0.safetensors      client 3 after call 1 of round 12, written by its host
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fldist.data.cache import sync
from fldist.params import Layout
from fldist.runtime.checkpoint import Checkpoints, ClientFiles, Damaged, read_facts
from fldist.runtime.output import LINES, cut_back, sizes, too_short

log = logging.getLogger("fldist")


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: after `round`, with the server's values; problems: newer checkpoints that are damaged."""

    round: int
    values: dict[str, Any]
    facts: dict[str, Any]
    problems: list[str]


class Keeper:
    """Writes a run's checkpoints. every: of how many rounds one outlives a power failure too (with the last one);
    keep: how many of these stay."""

    def __init__(self, directory: Path, *, every: int, keep: int) -> None:
        self.directory = directory
        self.resumed: Resumed | None = None
        self.epoch = 0
        self.clients = ClientFiles(directory / "clients")
        self._every = every
        self._checkpoints = Checkpoints(directory / "checkpoints", keep)
        self._versions: dict[int, dict[str, str]] = {}  # by round kept: every client's version
        self._secured: dict[str, str] = {}  # the versions that outlive a power failure

    def begin(self) -> None:
        """Make the place for checkpoints: its being there says that the run in this directory can go on.

        Counts this server's epoch, before any host hears of it.
        """
        folder = self._checkpoints.directory
        folder.mkdir(exist_ok=True)
        path = folder / "EPOCH"
        with contextlib.suppress(OSError, ValueError):
            self.epoch = int(path.read_text(encoding="utf-8")) + 1
        temporary = folder / "EPOCH.tmp"
        temporary.write_text(f"{self.epoch}\n", encoding="utf-8")
        temporary.replace(path)

    def give_up(self) -> None:
        """Take the place back: nothing will be kept, and this run cannot go on."""
        shutil.rmtree(self._checkpoints.directory)
        shutil.rmtree(self.clients.directory, ignore_errors=True)

    def resume(
        self, layouts: Iterable[Layout], check: Callable[[int, dict[str, Any]], None] = lambda number, facts: None
    ) -> None:
        """Find where to go on, and take the files that grow back to there. Without a checkpoint all begins anew.

        A checkpoint counts when what it names is there too; when none does for want of a client's state, the newest
        is taken, and those clients are missing. check: is given the round and the facts of what is taken, and raises
        where the run must not go on from there; then the run's files are as they were.
        """
        layouts = list(layouts)
        try:
            found = self._checkpoints.newest(layouts, self._lacking)
        except Damaged as error:
            found = self._checkpoints.newest(layouts, lambda facts: too_short(self.directory, facts["files"]))
            assert found is not None
            found[3].append(str(error))
        if found is not None:
            check(found[0], found[2])
        for name in ("result.json", "run.h5"):  # of an end that is none any more
            (self.directory / name).unlink(missing_ok=True)
        if found is None:
            for name in LINES:
                (self.directory / name).unlink(missing_ok=True)
            return
        number, values, facts, problems = found
        cut_back(self.directory, facts["files"])
        self.resumed = Resumed(number, values, facts, problems)
        self.epoch = max(self.epoch, int(facts["epoch"]) + 1)
        for kept in self._checkpoints.kept:
            with contextlib.suppress(Damaged):
                self._versions[kept] = read_facts(self._checkpoints.path(kept))["versions"]

    def _lacking(self, facts: dict[str, Any]) -> str | None:
        """What a checkpoint names and is not there."""
        short = too_short(self.directory, facts["files"])
        broken = (self.clients.broken(int(c), version) for c, version in facts["versions"].items())
        return short or next(filter(None, broken), None)

    def mark(self, run_id: bytes) -> None:
        """Leave a sign by which a host knows that it sees this directory, not another of the same name."""
        folder = self.clients.directory
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("run-*"):
            old.unlink(missing_ok=True)
        (folder / f"run-{run_id.hex()}").touch()

    def keep(
        self, number: int, values: Mapping[str, Any], facts: Mapping[str, Any], *, last: bool, lasting: bool = False
    ) -> None:
        """Write the checkpoint of a round; OSError when it cannot be written, and then the one before stays.

        last: the run ends with this round; lasting: its checkpoint stays for good.
        """
        durable = last or lasting or (number > 0 and number % self._every == 0)
        before = self._versions.get(max(self._versions, default=-1), {})
        versions: dict[str, str] = dict(facts["versions"])
        whole = {
            **facts,
            "epoch": self.epoch,
            "files": sizes(self.directory),
            "durable": [*self._checkpoints.durable, *([number] if durable else [])],
            "lasting": [*self._checkpoints.lasting, *([number] if lasting else [])],
        }
        if durable:
            self._secure_clients(versions)
            for name in LINES:
                if (self.directory / name).exists():
                    sync(self.directory / name)
        self._checkpoints.write(number, values, whole, durable=durable, lasting=lasting)
        self._versions[number] = versions
        self._versions = {n: v for n, v in self._versions.items() if n in self._checkpoints.kept}
        changed = [c for c, version in versions.items() if before.get(c) != version]
        self.clients.prune({int(c): {v[c] for v in self._versions.values() if c in v} for c in changed})

    def secure(self) -> None:
        """Have the newest checkpoint outlive a power failure; the run ends before its time."""
        with contextlib.suppress(OSError):
            self._secure_clients(self._versions.get(max(self._versions, default=-1), {}))
            self._checkpoints.secure()

    def _secure_clients(self, versions: Mapping[str, str]) -> None:
        """The same for the clients' files that a checkpoint names, as far as they are new."""
        new = {int(c): version for c, version in versions.items() if self._secured.get(c) != version}
        if new:
            self.clients.sync(new)
            self._secured = dict(versions)


def kept_token(directory: Path) -> str:
    """The run's token, the same for every server that the run has; hex, in a file that only its owner may read."""
    path = directory / "token"
    with contextlib.suppress(OSError):
        return path.read_text(encoding="ascii")
    token = secrets.token_hex(32)
    temporary = directory / f"token.tmp-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(token)
    temporary.replace(path)
    return token


def files_seen(directory: str, run_id: str) -> ClientFiles | None:
    """The clients' files of a run, where this host sees them."""
    folder = Path(directory) / "clients"
    return ClientFiles(folder) if directory and (folder / f"run-{run_id}").is_file() else None


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Be the only one that writes a run's directory; ValueError names who else does."""
    path = directory / "owner.lock"
    try:
        opened = path.open("ab+", buffering=0)
    except OSError as error:
        raise ValueError(
            f"output: {directory} cannot be written to ({error.strerror}); name another with --output"
        ) from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().decode().strip() or "unknown"
            raise ValueError(
                f"output: {directory} belongs to a run that is still going ({owner}); "
                "wait for it, end it, or name another directory with --output"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): see to it yourself that one run writes there", directory, error)
        with contextlib.suppress(OSError):  # on a full disk it is held all the same, by somebody unnamed
            file.truncate(0)
            file.write(f"{socket.gethostname()}, process {os.getpid()}\n".encode())
        yield
