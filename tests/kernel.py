"""What the kernel has counted of this process's TCP connections, and how many messages gloo or MPI was handed.

No tests. `python -m tests.kernel CONFIG OUTPUT` is `fldist run` as one rank of a launcher's, whose server leaves what
it has seen in OUTPUT/kernel.json. Linux only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Recorder

Address = tuple[str, int]

_INFO_BYTES = 216
"""struct tcp_info of linux/tcp.h as far as tcpi_bytes_retrans."""
_BYTES_RECEIVED, _BYTES_SENT = 128, 200  # where they stand in it; tcpi_bytes_retrans stands behind the latter


@dataclass(frozen=True)
class Connection:
    """A TCP connection of this process and the payload bytes that went over it.

    inode: of the socket; sent: every byte once, however often it was repeated; peer: the process that holds the other
    end, None where that is in no process of this network namespace.
    """

    inode: int
    local: Address
    remote: Address
    sent: int
    received: int
    peer: int | None = None


@dataclass
class Seen:
    """What a server saw when its run had finished and its connections were still open."""

    connections: list[Connection] = field(default_factory=list)
    messages_sent: int = 0
    """Of gloo or MPI."""
    messages_received: int = 0
    launcher: int = 0
    """The process that started this one."""

    @property
    def sent(self) -> int:
        """Bytes sent over all connections."""
        return sum(c.sent for c in self.connections)

    @property
    def received(self) -> int:
        """Bytes received over all connections."""
        return sum(c.received for c in self.connections)

    def only(self, connections: Iterable[Connection]) -> Seen:
        """The same with some of the connections."""
        return dataclasses.replace(self, connections=list(connections))

    @classmethod
    def read(cls, path: Path) -> Seen:
        """What `Watcher` has written."""
        saved = json.loads(path.read_text())
        connections = [
            Connection(**{**c, "local": tuple(c["local"]), "remote": tuple(c["remote"])})
            for c in saved.pop("connections")
        ]
        return cls(connections, **saved)


def needs_tcp_info() -> None:
    """Skip the test where the kernel does not say how many bytes a connection has sent."""
    if sys.platform != "linux":
        pytest.skip("needs Linux: reads TCP_INFO and /proc")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        if len(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)) < _INFO_BYTES:
            pytest.skip("needs Linux 4.19 or newer: this kernel's TCP_INFO has no bytes_sent")


def sockets(pid: int | str = "self") -> dict[int, int]:
    """Inode and descriptor of every socket of a process."""
    found = {}
    with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                kind, _, number = os.readlink(entry).partition(":")
                if kind == "socket":
                    found[int(number.strip("[]"))] = int(entry.name)
    return found


def connections(known: Iterable[int] = ()) -> list[Connection]:
    """The open TCP connections of this process, whichever library made them; known: inodes to leave out."""
    ends = _ends()
    inode_at = {pair: inode for inode, pair in ends.items()}
    found = []
    for inode, descriptor in sockets().items():
        if inode in known or inode not in ends:
            continue
        local, remote = ends[inode]
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        (received,) = struct.unpack_from("<Q", info, _BYTES_RECEIVED)
        sent, repeated = struct.unpack_from("<QQ", info, _BYTES_SENT)
        peer = _holder(inode_at.get((remote, local)))
        found.append(Connection(inode, local, remote, sent - repeated, received, peer))
    return found


def _ends() -> dict[int, tuple[Address, Address]]:
    """Local and remote address of every established TCP socket of this network namespace, by inode."""
    established = "01"
    found = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
            _, local, remote, state, *_, inode = line.split()[:10]
            if state == established:
                found[int(inode)] = (_address(local), _address(remote))
    return found


def _address(text: str) -> Address:
    """`0100007F:1F90`: 32-bit words in the machine's order, and the port."""
    words, _, port = text.partition(":")
    raw = (int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8))
    address = ipaddress.ip_address(b"".join(raw))
    return str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)


def _holder(inode: int | None) -> int | None:
    if inode is None:
        return None
    pids = (int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit())
    return next((pid for pid in pids if inode in sockets(pid)), None)


class _Counted:
    """A process group of gloo or a communicator of MPI, with every message counted that is sent or received with it."""

    def __init__(self, over: Any, seen: Seen) -> None:
        self._over = over
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._over, name)

    def send(self, *arguments: Any) -> Any:  # gloo's
        self._seen.messages_sent += 1
        return self._over.send(*arguments)

    def recv(self, *arguments: Any) -> Any:  # gloo's
        self._seen.messages_received += 1
        return self._over.recv(*arguments)

    def Isend(self, *arguments: Any) -> Any:
        self._seen.messages_sent += 1
        return self._over.Isend(*arguments)

    def Irecv(self, *arguments: Any) -> Any:
        self._seen.messages_received += 1
        return self._over.Irecv(*arguments)

    def Improbe(self, *arguments: Any) -> Any:
        message = self._over.Improbe(*arguments)
        self._seen.messages_received += message is not None
        return message


@contextlib.contextmanager
def messages_counted(seen: Seen) -> Iterator[None]:
    """Count the messages of the links that this process makes meanwhile."""
    from fldist.wire import mpi, pair

    gloo_group, channel = pair.gloo_group, mpi._channel
    pair.gloo_group = lambda *arguments: _Counted(gloo_group(*arguments), seen)
    mpi._channel = lambda comm: _Counted(channel(comm), seen)
    try:
        yield
    finally:
        pair.gloo_group = gloo_group
        mpi._channel = channel


class Watcher(Recorder):
    """An observer that looks at the connections when the run has finished: the hosts have not been sent away yet."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen
        self._known = set(sockets())

    def finished(self, result: dict[str, Any]) -> None:
        super().finished(result)
        # sends and receives go on until here, so both are taken at the same time
        self.seen = dataclasses.replace(self.seen, connections=connections(self._known), launcher=os.getppid())


def main(config: str, output: str) -> None:
    """Be this rank; the server writes kernel.json."""
    from fldist.config import load
    from fldist.runner import run_here

    seen = Seen()
    watcher = Watcher(seen)
    with messages_counted(seen):
        if run_here(load(config), output=output, observer=watcher):
            Path(output, "kernel.json").write_text(json.dumps(dataclasses.asdict(watcher.seen)))


if __name__ == "__main__":
    main(*sys.argv[1:])
