"""The ledger against the kernel: `bytes.wire` of a run is what went over the server's TCP connections.

Wire is what this process handed to the transport. What gloo and MPI add to it is small where messages are of 16 kB and
more, and known where they are not.

gloo: 144 bytes a message, trailers included. Every message is announced (48 bytes), answered by the receiver's own
announcement (48 bytes, the other way) and has a head (48 bytes), whatever its size. Parts under 4096 bytes ride in the
control connection's frames and are no messages of gloo's. A pair is opened with 8 bytes from one of the two sides.

Open MPI (ob1 over tcp): 22 bytes a message that goes at once; above 64 kB some 160 in all for the announcement, the
answer and the heads of its fragments.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fldist
from fldist.config import load
from fldist.runner import run_here
from fldist.wire.gloo import GlooServer
from fldist.wire.link import Limits
from tests.conftest import Hosts, small
from tests.kernel import Seen, Watcher, connections, messages_counted, needs_tcp_info, sockets
from tests.test_launch import BIN, ROOT, mpirun, outcome, write

TOLERANCE = 0.03
GLOO_THERE = 96  # bytes that gloo adds to a message's own direction: announcement and head
GLOO_BACK = 48  # and to the other: the receiver's announcement
MPI_HEAD = 22  # bytes that Open MPI adds to a message of up to 64 kB
MPI_START = 300  # and to each connection before the first
MEANWHILE = 400
"""Bytes a host and direction: heartbeats and the like between the ledger's last look and ours."""


def settings(hidden: int, **changes: Any) -> dict[str, Any]:
    """Two clients with a model of one block of 4 * (75 * hidden + 10) bytes."""
    return small(clients={"num_clients": 2}, task__model={"name": "mlp", "hidden": [hidden]}, **changes)


def model_bytes(hidden: int) -> int:
    return 4 * (64 * hidden + hidden + 10 * hidden + 10)


def assert_close(kernel: dict[str, int], counted: dict[str, int]) -> None:
    """Each direction within 3 %."""
    for way in ("up", "down"):
        assert kernel[way] == pytest.approx(counted[way], rel=TOLERANCE), f"{way}: {kernel} {counted}"


def by_direction(seen: Seen) -> dict[str, int]:
    return {"up": seen.received, "down": seen.sent}


def with_gloo(wire: dict[str, int], seen: Seen) -> dict[str, int]:
    """Wire bytes and what gloo adds."""
    return {
        "up": wire["up"] + GLOO_THERE * seen.messages_received + GLOO_BACK * seen.messages_sent,
        "down": wire["down"] + GLOO_THERE * seen.messages_sent + GLOO_BACK * seen.messages_received,
    }


def assert_to_the_byte(seen: Seen, wire: dict[str, int], hosts: int) -> None:
    """Nothing but what came after the ledger's last look is unexplained."""
    assert len(seen.connections) > 1
    kernel, explained = by_direction(seen), with_gloo(wire, seen)
    for way in ("up", "down"):
        assert abs(kernel[way] - explained[way]) <= MEANWHILE * hosts, f"{way}: {kernel} {explained}"


def watched_run(tmp_path: Path, hosts: Hosts, config: dict[str, Any]) -> tuple[Seen, dict[str, Any]]:
    """A run with two hosts over gloo."""
    needs_tcp_info()
    seen = Seen()
    watcher = Watcher(seen)
    with messages_counted(seen):
        result = run_here(load(config), nproc=3, output=tmp_path / "run", observer=watcher, spawn=hosts)
    return watcher.seen, result


@pytest.mark.parametrize("hidden", [56, 1024])
def test_gloo_with_messages_of_16_kB_and_more(tmp_path: Path, hosts: Hosts, hidden: int) -> None:
    assert model_bytes(hidden) >= 16_000
    seen, result = watched_run(tmp_path, hosts, settings(hidden, rounds=30))
    wire = result["bytes"]["wire"]
    assert (seen.messages_sent, seen.messages_received) == (120, 120), "a model and a trailer, two hosts, thirty rounds"
    assert len(seen.connections) == 4, "control and bodies, two hosts"
    assert_close(by_direction(seen), wire)
    assert_to_the_byte(seen, wire, 2)


def test_gloo_with_small_messages_adds_144_bytes_to_each(tmp_path: Path, hosts: Hosts) -> None:
    seen, result = watched_run(tmp_path, hosts, settings(16, rounds=30))
    wire = result["bytes"]["wire"]
    assert 4096 <= model_bytes(16) < 5000
    messages = seen.messages_sent + seen.messages_received
    assert messages == 240
    both = seen.sent + seen.received
    assert both > (1 + TOLERANCE) * sum(wire.values()), "the messages are too large for this test"
    assert both == pytest.approx(sum(wire.values()) + 144 * messages, rel=TOLERANCE)
    assert_close(by_direction(seen), with_gloo(wire, seen))
    assert_to_the_byte(seen, wire, 2)


def test_what_rides_in_control_frames_is_no_message_of_gloos(tmp_path: Path, hosts: Hosts) -> None:
    seen, result = watched_run(tmp_path, hosts, settings(8, rounds=30))
    assert model_bytes(8) < 4096
    assert (seen.messages_sent, seen.messages_received) == (0, 0)
    assert_close(by_direction(seen), result["bytes"]["wire"])
    assert_to_the_byte(seen, result["bytes"]["wire"], 2)


def test_clients_with_a_state_and_messages_of_their_own(tmp_path: Path, hosts: Hosts) -> None:
    """Nothing shared, several bodies a frame, verdicts and digests, a checksum in every trailer."""
    config = settings(56, rounds=5, algorithm="scaffold", network={"share": False, "checksum": "full"})
    config["clients"] = {"num_clients": 6, "per_round": 4}
    seen, result = watched_run(tmp_path, hosts, config)
    assert min(seen.messages_sent, seen.messages_received) >= 5 * 4 * 2, "model and variates for each client"
    assert_close(by_direction(seen), result["bytes"]["wire"])
    assert_to_the_byte(seen, result["bytes"]["wire"], 2)


def test_mpi_with_messages_of_16_kB(tmp_path: Path) -> None:
    needs_tcp_info()
    path, run = write(tmp_path, settings(56, rounds=20)), tmp_path / "run"
    flags = ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self"]
    done = mpirun(3, ["-m", "tests.kernel", path, str(run)], flags=flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert (result["backend"], result["world_size"]) == ("mpi", 3)
    seen = Seen.read(run / "kernel.json")
    assert None not in {c.peer for c in seen.connections}, "all of them end on this machine"
    between_ranks = seen.only(c for c in seen.connections if c.peer != seen.launcher)  # the launcher's is PMIx's
    assert len({c.peer for c in between_ranks.connections}) == 2
    kernel, wire = by_direction(between_ranks), result["bytes"]["wire"]
    assert_close(kernel, wire)
    for way, messages in (("up", seen.messages_received), ("down", seen.messages_sent)):
        assert messages > 2 * 20 * 2, "a head and a body, two hosts, twenty rounds"
        assert abs(kernel[way] - wire[way] - MPI_HEAD * messages) <= 2 * (MPI_START + MEANWHILE), way


def test_what_the_server_publishes_in_torchruns_store_is_counted() -> None:
    import torch.distributed as dist

    needs_tcp_info()
    known = set(sockets())
    master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    link = GlooServer(ranks=[1], limits=Limits())
    try:
        link.rendezvous = dist.PrefixStore("fldist/", dist.TCPStore("127.0.0.1", master.port, wait_for_workers=False))

        def sent() -> int:
            return sum(c.sent for c in connections(known) if c.remote[1] == master.port)

        before, value = sent(), "127.0.0.1 29401 " + 64 * "a"
        link.publish("server", value)
        link.rendezvous.get("server")  # the store has taken it
        counted = link.transport_bytes()[1]
        assert counted == len("server") + len(value)
        assert counted < sent() - before < counted + 100, "prefixes, lengths and the question of `get`"
    finally:
        link.close(0.1)


# ---- two machines


FRAME_HEADS = 66
"""Bytes a packet: Ethernet 14, IPv4 20, TCP with time stamps 32. An acknowledgement is a packet of nothing else."""


class TwoNodes:
    """Two network namespaces, joined by a pair of veth interfaces: two machines as far as the network goes."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        self.names = tuple(f"fl{os.getpid()}{side}" for side in "ab")  # of namespaces and of interfaces

    def make(self) -> None:
        """Make them, or skip the test where that is not allowed."""
        if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("needs root on Linux and `ip` (iproute2): makes two network namespaces")
        for name in self.names:
            added = _ip("netns", "add", name)
            if added.returncode:
                pytest.skip(f"needs network namespaces, which this machine refuses: {added.stderr.strip()}")
        first, second = self.names
        joined = _ip("link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second)
        if joined.returncode:
            pytest.skip(f"needs veth interfaces, which this machine refuses: {joined.stderr.strip()}")
        for name, address in zip(self.names, self.addresses, strict=True):
            for words in (
                ("addr", "add", f"{address}/24", "dev", name),
                ("link", "set", "lo", "up"),
                ("link", "set", name, "up"),
            ):
                done = _ip("-n", name, *words)
                assert done.returncode == 0, done.stderr

    def start(self, node: int, command: list[str]) -> subprocess.Popen[str]:
        """Start a command on a node."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        inside = ["ip", "netns", "exec", self.names[node], *command]
        return subprocess.Popen(inside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT)

    def bytes_and_packets(self, node: int, way: str) -> tuple[int, int]:
        """What a node's interface has sent (`tx`) or received (`rx`)."""
        shown = _ip("-n", self.names[node], "-s", "-j", "link", "show", "dev", self.names[node])
        counters = json.loads(shown.stdout)[0]["stats64"][way]
        return counters["bytes"], counters["packets"]

    def remove(self) -> None:
        """End what still runs on the nodes, and remove them."""
        for name in self.names:
            for pid in _ip("netns", "pids", name).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", name)


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)


@pytest.fixture
def two_nodes() -> Iterator[TwoNodes]:
    nodes = TwoNodes()
    try:
        nodes.make()
        yield nodes
    finally:
        nodes.remove()


@pytest.mark.timeout(180)
def test_two_nodes(tmp_path: Path, two_nodes: TwoNodes) -> None:
    """torchrun on two machines: the bits of one process, the bytes of the kernel, and those of the interface."""
    needs_tcp_info()
    config = settings(512, rounds=8)
    path, run = write(tmp_path, config), tmp_path / "run"
    (here, there), port = two_nodes.addresses, 29400
    torchrun = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", here]
    ranks = [
        two_nodes.start(
            node,
            [*torchrun, "--master-port", str(port), "--node-rank", str(node), "-m", "tests.kernel", path, str(run)],
        )
        for node in (0, 1)
    ]
    deadline = time.monotonic() + 120
    outputs = []
    try:
        for process in ranks:
            outputs.append(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0])
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(outputs)
    result = json.loads((run / "result.json").read_text())
    assert outcome(result) == outcome(fldist.run(config, output=tmp_path / "alone"))

    wire, seen = result["bytes"]["wire"], Seen.read(run / "kernel.json")
    ours = {(c.local, c.remote[0]) for c in seen.connections}
    assert ((here, port + 1), there) in ours, "the control connection"
    bodies = [c for c in seen.connections if port not in (c.remote[1], c.local[1] - 1)]
    assert [(c.local[0], c.remote[0]) for c in bodies] == [(here, there)], "gloo's pair takes another way"
    assert len(seen.connections) == 3, "control, bodies, torchrun's store"
    assert_close(by_direction(seen), wire)
    assert_to_the_byte(seen, wire, 1)

    # The interface has what goes to the other node, here a thousandth more than that: the agents' own traffic and the
    # end of the run. It counts a packet before it is cut into segments, so the heads are fewer than on a cable.
    abroad = seen.only(c for c in seen.connections if c.remote[0] == there)
    interface = {}
    for way, counter in (("up", "rx"), ("down", "tx")):
        size, packets = two_nodes.bytes_and_packets(0, counter)
        assert size > by_direction(abroad)[way] > 0.9 * wire[way]
        interface[way] = size - FRAME_HEADS * packets
    assert_close(interface, by_direction(abroad))
