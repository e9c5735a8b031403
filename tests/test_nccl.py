"""NCCL's pair and its group of all ranks against a stand-in for ProcessGroupNCCL (`stand_in.py`), which shows NCCL's
manners without a GPU: what is polled, aborted, and never used afterwards; whole sessions and runs over it. The last
tests are of the real one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fldist
from fldist.config import load
from fldist.kinds import Field, Form, Kind, Schema
from fldist.runner import run_here
from fldist.runtime import device as device_module
from fldist.runtime.membership import RunStopped
from fldist.wire.codec import Expected, FieldValue, Frame, FrameType, Head, Message, Part, Place
from fldist.wire.errors import DeadlineExceeded, PeerLost
from fldist.wire.gloo import GlooHost, GlooServer
from fldist.wire.link import Combined, Joined, Limits, Lost, Received, Sent, Welcome
from fldist.wire.nccl import ENVIRONMENT, NcclPair, NcclWorld, nccl_carrier
from fldist.wire.pair import Ends
from fldist.wire.world import Members, packed, room, unpacked
from tests import stand_in
from tests.conftest import CONTEXT, TIMED, Recorder, WarmProcess, in_time, small
from tests.needs import needs_gpus
from tests.stand_in import ProcessGroupNCCL

CPU = torch.device("cpu")
QUICK = Limits(join_s=5.0, silence_s=2.0, transfer_s=0.3)
CALM = Limits(join_s=10.0, silence_s=5.0, transfer_s=10.0)
BODY = 50_000


@pytest.fixture(autouse=True)
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in in place, in this process; what it sets in the environment is taken back."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "as it was")
    monkeypatch.setattr(dist, "ProcessGroupNCCL", ProcessGroupNCCL, raising=False)
    ProcessGroupNCCL.made.clear()
    yield
    ProcessGroupNCCL.made.clear()


@pytest.fixture
def pairs(nccl: None) -> Iterator[Callable[..., list[NcclPair]]]:
    """Makes two ends of a pair; they are aborted at the end."""
    made: list[NcclPair] = []

    def make(limits: Limits = CALM) -> list[NcclPair]:
        store = dist.HashStore()
        made.extend(NcclPair(Ends(me, store, lambda: "127.0.0.1", limits), CPU) for me in (0, 1))
        for pair in made:
            pair.open()
        return made

    yield make
    for pair in made:
        pair.unblock()


def body(value: int) -> torch.Tensor:
    return torch.full((BODY,), value, dtype=torch.uint8)


def trailer(number: int = 0) -> torch.Tensor:
    return torch.tensor([number, BODY, 0], dtype=torch.int64)


def together(*steps: Callable[[], Any]) -> list[Any]:
    """Do these at the same time; what each returned or raised."""
    results: list[Any] = [None] * len(steps)

    def run(index: int) -> None:
        try:
            results[index] = steps[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(steps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a thread is stuck"
    return results


def transfer(source: NcclPair, target: NcclPair, value: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Two steps: send a body with this value, and receive it."""

    def send() -> None:
        source.sent(source.send([body(value)], trailer(value)))

    def receive() -> tuple[int, list[int]]:
        into, last = body(0), trailer()
        target.received(target.receive([into], last))
        assert int(into.min()) == int(into.max())
        return int(into[0]), last.tolist()

    return send, receive


# ---- a pair
def test_torch_is_told_to_end_nothing_whatever_the_launcher_has_set(pairs: Callable[..., list[NcclPair]]) -> None:
    server, host = pairs()
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    together(*transfer(server, host, 1))
    for group in ProcessGroupNCCL.made:
        assert group.environment.items() >= ENVIRONMENT.items()
        assert group.options.config.blocking == 0


def test_nothing_is_connected_before_there_is_something_to_send(pairs: Callable[..., list[NcclPair]]) -> None:
    pairs()
    assert ProcessGroupNCCL.made == []


def test_bodies_go_both_ways_at_once_each_in_a_group_of_its_own(pairs: Callable[..., list[NcclPair]]) -> None:
    server, host = pairs()
    for value in (1, 2, 3):
        got = together(*transfer(server, host, value), *transfer(host, server, value + 100))
        assert got[1::2] == [(value, [value, BODY, 0]), (value + 100, [value + 100, BODY, 0])], got
    assert len(ProcessGroupNCCL.made) == 4  # two ends of two directions
    assert all(work.waited for group in ProcessGroupNCCL.made for work in group.works), "a stream was not synchronised"


@TIMED
def test_a_transfer_has_a_limit(pairs: Callable[..., list[NcclPair]]) -> None:
    server, host = pairs(QUICK)
    together(*transfer(server, host, 1))  # connected, so that only the body is late
    into = body(0)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="a transfer did not end in time"):
        host.received(host.receive([into], trailer()))
    assert time.monotonic() - began > 0.25
    in_time(time.monotonic() - began, 2.0)


@TIMED
def test_an_abort_frees_who_waits_and_nothing_is_used_that_says_it_is_complete(
    pairs: Callable[..., list[NcclPair]],
) -> None:
    server, host = pairs()
    together(*transfer(server, host, 1))
    into = body(0)
    waiting = host.receive([into], trailer())
    results: list[Any] = []

    def wait() -> None:
        try:
            host.received(waiting)
            results.append("used")
        except PeerLost as error:
            results.append(str(error))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.1)
    began = time.monotonic()
    host.unblock()
    thread.join(2)
    in_time(time.monotonic() - began, 1.0)
    assert results == ["the session has ended"]
    assert all(work.is_completed() for work in waiting.works)
    assert int(into[0]) == 0xEE  # what was there is not


def test_an_abort_at_the_last_moment_spoils_a_complete_transfer(
    pairs: Callable[..., list[NcclPair]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, host = pairs()
    wait = stand_in.Work.wait

    def abort_first(self: stand_in.Work, timeout: Any = None) -> bool:
        if self._received:
            host.unblock()
        return wait(self, timeout)

    monkeypatch.setattr(stand_in.Work, "wait", abort_first)
    got = together(*transfer(server, host, 1))
    assert isinstance(got[1], PeerLost), got


def test_after_an_abort_nothing_is_begun(pairs: Callable[..., list[NcclPair]]) -> None:
    server, host = pairs()
    together(*transfer(server, host, 1))
    host.unblock()
    host.unblock()
    for begin in (host.send, host.receive):
        with pytest.raises(PeerLost, match="the session has ended"):
            begin([body(1)], trailer())


def test_an_error_of_nccl_is_told_in_one_line(pairs: Callable[..., list[NcclPair]]) -> None:
    server, host = pairs()
    together(*transfer(server, host, 1))
    waiting = host.receive([body(0)], trailer())
    waiting.works[0].fail("NCCL error: remote process exited\nand a stack of calls")
    with pytest.raises(PeerLost, match=r"^nccl: NCCL error: remote process exited$"):
        host.received(waiting)


def test_an_abort_that_fails_does_not_keep_the_other_group(
    pairs: Callable[..., list[NcclPair]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, host = pairs()
    together(*transfer(server, host, 1), *transfer(host, server, 2))
    groups = list(host._groups.values())
    abort = groups[0].abort

    def failing() -> None:
        abort()
        raise dist.DistBackendError("Future for ProcessGroup abort timed out")

    monkeypatch.setattr(groups[0], "abort", failing)
    host.unblock()
    assert groups[1].aborted
    assert "could not be aborted" in caplog.text


def test_bodies_that_belong_on_the_cpu_are_received_beside_them(
    pairs: Callable[..., list[NcclPair]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's side: everything on the CPU is away from the GPU."""
    server, host = pairs()
    monkeypatch.setattr(NcclPair, "_is_away", lambda self, tensor: self is server)
    settled: list[torch.device] = []
    monkeypatch.setattr("fldist.wire.nccl.settle", settled.append)
    got = together(*transfer(host, server, 7))
    assert got[1] == (7, [7, BODY, 0])
    assert settled == [CPU], "a copy out of the GPU's memory was not waited for"
    waiting = server.receive([body(0)], trailer())
    assert all(here is not there for there, here in waiting.landed)
    assert len(waiting.landed) == 2


# ---- all ranks
RANKS = 3


@pytest.fixture
def worlds(nccl: None) -> Iterator[Callable[..., list[NcclWorld]]]:
    """Makes the ends of a world of three; they are released at the end."""
    made: list[NcclWorld] = []

    def make(limits: Limits = CALM) -> list[NcclWorld]:
        store = dist.HashStore()
        made.extend(NcclWorld(Members(rank, RANKS, store, lambda: "127.0.0.1", limits), CPU) for rank in range(RANKS))
        for world in made:
            world.open()
        return made

    yield make
    for world in made:
        world.release()


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a small piece, instead of 64 MB."""
    monkeypatch.setattr("fldist.wire.nccl.PIECE_BYTES", 1024)
    return 1024


@pytest.fixture(params=[False, True], ids=["everywhere on the GPU", "the root's and the last one's on the CPU"])
def away(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where the ranks' tensors lie; gathers what came back to the CPU."""
    brought: list[Any] = []
    monkeypatch.setattr("fldist.wire.nccl.to_host", lambda tensor: brought.append(tensor) or tensor.clone())
    monkeypatch.setattr(NcclWorld, "_is_away", lambda self, tensor: request.param and self.rank != 1)
    return brought


def begun(rank: int) -> list[tuple[str, int]]:
    """What this rank has asked its group for."""
    (group,) = [g for g in ProcessGroupNCCL.made if g._arguments[1] == rank]
    return group.begun


def test_a_broadcast_reaches_all_piece_by_piece(worlds: Callable[..., list[NcclWorld]], pieces: int, away: Any) -> None:
    ranks = worlds()
    assert ProcessGroupNCCL.made == []  # nothing is made before there is something to exchange
    sent = torch.randint(0, 256, (2 * pieces + 100,), dtype=torch.uint8)
    tensors = [sent.clone(), torch.zeros_like(sent), torch.zeros_like(sent)]
    results = together(*(lambda w=w, t=t: w.broadcast(t) for w, t in zip(ranks, tensors, strict=True)))
    assert results == [None] * RANKS
    assert all(torch.equal(t, sent) for t in tensors)
    assert begun(0) == begun(1) == begun(2) == [("broadcast", pieces), ("broadcast", pieces), ("broadcast", 100)]
    for group in ProcessGroupNCCL.made:
        assert group.environment.items() >= ENVIRONMENT.items()
        assert group.options.config.blocking == 0
        assert all(work.waited for work in group.works), "a stream was not synchronised"
    assert not any(w._under_way for w in ranks)


def test_a_gather_brings_every_ranks_parts_to_the_root_piece_by_piece(
    worlds: Callable[..., list[NcclWorld]], pieces: int, away: Any
) -> None:
    ranks = worlds()
    sizes = {1: [700, 0, 1500], 2: [3]}
    parts = {r: [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in each] for r, each in sizes.items()}
    capacity = room(sizes[1])
    got = together(*(lambda w=w: w.gather(parts.get(w.rank, []), capacity) for w in ranks))
    assert got[1:] == [{}, {}]
    assert set(got[0]) == {1, 2}
    for rank, buffer in got[0].items():
        assert torch.equal(buffer, packed(parts[rank], capacity))
        for part, out in zip(parts[rank], unpacked(buffer, sizes[rank]), strict=True):
            assert torch.equal(part, out)
    assert begun(0) == [("gather", RANKS * pieces)] * 2 + [("gather", RANKS * (capacity - 2 * pieces))]
    assert begun(1) == [("gather", 0)] * 3
    assert len(away) == 3 * (RANKS - 1)  # every piece is brought to the CPU, whatever the root's GPU is


def test_with_many_ranks_less_of_each_is_gathered_at_a_time(
    worlds: Callable[..., list[NcclWorld]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fldist.wire.nccl.GATHERED_BYTES", 3 * 640 + 50)
    ranks = worlds()
    part = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    got = together(*(lambda w=w: w.gather([part] if w.rank else [], room([1000])) for w in ranks))
    assert torch.equal(got[0][2][:1000], part)
    assert begun(0) == [("gather", 3 * 640), ("gather", 3 * 384)]


@pytest.mark.parametrize("how", ["sum", "max"])
def test_a_reduction_of_int64_gives_the_root_what_it_should(
    worlds: Callable[..., list[NcclWorld]], pieces: int, away: Any, how: Any
) -> None:
    ranks = worlds()
    blocks = [torch.randint(-(2**60), 2**60, (300,)) for _ in range(RANKS)]
    stacked = torch.stack(blocks)
    wanted = stacked.sum(dim=0) if how == "sum" else stacked.amax(dim=0)
    assert together(*(lambda w=w, b=b: w.reduce(b, how) for w, b in zip(ranks, blocks, strict=True))) == [None] * RANKS
    assert torch.equal(blocks[0], wanted)
    assert begun(0) == [("reduce", pieces)] * 2 + [("reduce", 300 * 8 - 2 * pieces)]


@TIMED
def test_an_exchange_that_somebody_stays_away_from_has_a_limit(worlds: Callable[..., list[NcclWorld]]) -> None:
    ranks = worlds(QUICK)
    blocks = [torch.ones(2000, dtype=torch.int64) for _ in range(RANKS)]
    together(*(lambda w=w, b=b: w.reduce(b, "sum") for w, b in zip(ranks, blocks, strict=True)))  # connected
    began = time.monotonic()
    root, second = together(lambda: ranks[0].reduce(blocks[0], "sum"), lambda: ranks[1].broadcast(torch.ones(9)))
    assert isinstance(root, DeadlineExceeded), root
    assert isinstance(second, DeadlineExceeded), second
    assert time.monotonic() - began > 0.25
    in_time(time.monotonic() - began, 2.0)


@TIMED
def test_a_world_that_is_released_frees_who_waits_and_begins_nothing(worlds: Callable[..., list[NcclWorld]]) -> None:
    ranks = worlds()
    together(*(lambda w=w: w.broadcast(torch.ones(5000, dtype=torch.uint8)) for w in ranks))
    into = torch.zeros(5000, dtype=torch.uint8)

    def release() -> None:
        time.sleep(0.1)
        ranks[1].release_aside()
        ranks[1].release_aside()
        ranks[1].wait_released(5.0)

    began = time.monotonic()
    waiting, _ = together(lambda: ranks[1].broadcast(into), release)
    in_time(time.monotonic() - began, 1.5)
    assert isinstance(waiting, PeerLost), waiting
    assert str(waiting) == "the session has ended"
    assert int(into[0]) == 0xEE  # spoilt, and kept until the group is gone
    assert [t.data_ptr() for kept in ranks[1]._under_way.values() for t in kept] == [into.data_ptr()]
    with pytest.raises(PeerLost, match="the session has ended"):
        ranks[1].reduce(torch.ones(3, dtype=torch.int64), "sum")


# ---- a session
def frame(kind: FrameType, value: int) -> Frame:
    tensor = torch.full((BODY,), value, dtype=torch.uint8)
    parts = [Part(Kind.LOGITS, torch.uint8, (BODY,), BODY, BODY, Place.BODY, tensor=tensor)]
    return Frame(Head(kind, method=1), [Message(0, [FieldValue(Form.TENSOR, (0,))])], parts)


def expected() -> Expected:
    return Expected(
        lambda number: Schema((Field("x", Kind.LOGITS, Form.TENSOR, False, 10 * BODY),)),
        lambda client: None,  # type: ignore[arg-type,return-value]
        once=True,
    )


@pytest.fixture
def session(nccl: None) -> Iterator[tuple[GlooServer, GlooHost]]:
    """A server and a host that has joined, in this process."""
    server = GlooServer(ranks=[1], limits=CALM, carrier=nccl_carrier(CPU))
    server.expected = expected()
    server.admit(Welcome(bytes(16), 1, {}, backend="nccl"))
    seen: list[str] = []

    def carrier_for(welcome: dict[str, Any]) -> Any:
        seen.append(welcome["backend"])
        return nccl_carrier(CPU)

    host = GlooHost(server.address, 1, server.token, CALM, carrier_for)
    assert seen == ["nccl"]
    host.expected = expected()
    host.ready()
    assert isinstance(server.next_event(5), Joined)
    yield server, host
    closing = threading.Thread(target=host.close, daemon=True)
    closing.start()
    server.close(2.0)
    closing.join(10)
    assert not closing.is_alive()


def test_a_session_over_the_pair(session: tuple[GlooServer, GlooHost]) -> None:
    server, host = session
    for value in (1, 2):
        assert server.post(1, frame(FrameType.CALL, value))
        got = host.recv()
        assert int(got.parts[0].tensor.min()) == int(got.parts[0].tensor.max()) == value
        host.send(frame(FrameType.REPLY, value + 10))
        events = [server.next_event(5), server.next_event(5)]
        assert {type(e) for e in events} == {Sent, Received}
        reply = next(e for e in events if isinstance(e, Received))
        assert int(reply.frame.parts[0].tensor[-1]) == value + 10
        reply.release()
    for group in ProcessGroupNCCL.made:
        assert len(group.threads) == 1, "a group is used by two threads"


@TIMED
def test_a_session_that_ends_in_the_middle_of_a_transfer_leaves_nobody_waiting(
    session: tuple[GlooServer, GlooHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, host = session
    monkeypatch.setattr(stand_in.Work, "_run", lambda self, begin: None)  # a transfer that never ends
    server.post(1, frame(FrameType.CALL, 1))
    deadline = time.monotonic() + 5
    while len(ProcessGroupNCCL.made) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    began = time.monotonic()
    server.abort(1, "for the test")
    assert server.next_event(2) == Lost(1, "for the test")
    with pytest.raises(PeerLost):
        host.recv()
    in_time(time.monotonic() - began, 1.0)
    while not all(g.aborted for g in ProcessGroupNCCL.made) and time.monotonic() - began < 2:
        time.sleep(0.01)
    assert all(g.aborted for g in ProcessGroupNCCL.made)


@contextlib.contextmanager
def exchange(limits: Limits) -> Iterator[tuple[GlooServer, GlooHost]]:
    """A server and a host that have added up blocks already, so that their group of all ranks is connected."""
    server = GlooServer(ranks=[1], limits=limits, carrier=nccl_carrier(CPU))
    server.expected = expected()
    server.admit(Welcome(bytes(16), 1, {}, backend="nccl"))
    host = GlooHost(server.address, 1, server.token, limits, lambda welcome: nccl_carrier(CPU))
    host.expected = expected()
    host.ready()
    try:
        assert isinstance(server.next_event(5), Joined)
        server.open_world()
        block = torch.full((3000,), 2)
        server.reduce([(block, "sum")])
        assert host.recv().head.type is FrameType.REDUCE
        host.reduce([(torch.full((3000,), 3), "sum")])
        assert isinstance(server.next_event(5), Combined)
        assert block.unique().tolist() == [5]
        yield server, host
    finally:
        host.close()
        server.close(2.0)


def all_aborted(within_s: float) -> bool:
    """Whether both ends of the group of all ranks, and nothing else, were made and are aborted by then."""
    deadline = time.monotonic() + within_s
    while not all(g.aborted for g in ProcessGroupNCCL.made) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [g.aborted for g in ProcessGroupNCCL.made] == [True, True]


@TIMED
def test_an_exchange_whose_limit_is_over_ends_the_session_and_aborts_the_group(nccl: None) -> None:
    with exchange(Limits(join_s=10.0, silence_s=1.0, transfer_s=0.5)) as (server, host):
        server.reduce([(torch.ones(3000, dtype=torch.int64), "sum")])
        assert host.recv().head.type is FrameType.REDUCE  # and does not take part
        began = time.monotonic()
        lost = server.next_event(10)
        assert lost == Lost(1, "the exchange between all ranks failed: a transfer did not end in time")
        with pytest.raises(PeerLost):
            host.recv()
        in_time(time.monotonic() - began, 4.0)
        assert all_aborted(2.0)


@pytest.mark.parametrize("who", ["the host", "the server"])
@TIMED
def test_a_session_that_ends_within_an_exchange_frees_both_ends(nccl: None, who: str) -> None:
    """Long before the limit on a transfer."""
    with exchange(CALM) as (server, host):
        block = torch.ones(3000, dtype=torch.int64)
        alone = host if who == "the host" else server  # takes part, and the other one does not

        def end() -> None:
            time.sleep(0.1)
            server.abort(1, "for the test")

        began = time.monotonic()
        error, _ = together(lambda: alone.reduce([(block, "sum")]), end)
        if who == "the host":
            assert isinstance(error, PeerLost), error
            assert str(error) == "the exchange between all ranks failed: the session has ended"
        assert server.next_event(2) == Lost(1, "for the test")
        assert all_aborted(1.0)
        in_time(time.monotonic() - began, 2.0)


# ---- runs
class Hosts:
    """A `spawn` whose hosts have the stand-in and a GPU of this name."""

    def __init__(self, gpu: str) -> None:
        self._gpu = gpu
        self.moments: dict[int, tuple[Any, ...]] = {}  # what happens to which rank, see `moments.py`
        self.all: list[WarmProcess] = []
        self.newest: dict[int, WarmProcess] = {}

    def __call__(self, address: tuple[str, int], rank: int, token: str, log: Path, join_s: float) -> WarmProcess:
        made = WarmProcess.__new__(WarmProcess)
        arguments = (self._gpu, address, rank, token, str(log), join_s, self.moments.get(rank))
        made.process = CONTEXT.Process(target=stand_in.host, args=arguments, daemon=True)
        made.process.start()
        self.all.append(made)
        self.newest[rank] = made
        return made


@pytest.fixture
def armed(nccl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as `arm` makes a host's; taken back at the end."""
    monkeypatch.setattr(device_module, "nccl_problem", lambda wanted, local_size: None)
    monkeypatch.setattr(fldist.runner, "nccl_problem", lambda wanted, local_size: None)
    monkeypatch.setattr(fldist.runner, "describe", stand_in.described("GPU-0"))
    monkeypatch.setattr(fldist.runner, "pinned_empty", torch.empty)


def large(algorithm: str, **changes: Any) -> dict[str, Any]:
    """Models that travel as bodies, not in the head."""
    config = small(algorithm=algorithm, rounds=3, **changes)
    config["task"]["model"] = {"name": "mlp", "hidden": [64]}
    return config


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_a_run_over_the_pair_gives_the_same_bits(armed: None, tmp_path: Path, algorithm: str) -> None:
    hosts = Hosts("GPU-{rank}")
    alone = fldist.run(large(algorithm), output=tmp_path / "alone")
    settings = load(large(algorithm, backend="nccl", network={"checksum": "full"}))
    there = run_here(settings, nproc=3, output=tmp_path / "there", spawn=hosts)
    assert there["backend"] == "nccl"
    assert there["state_hash"] == alone["state_hash"]
    assert there["bytes"]["logical"] == alone["bytes"]["logical"]
    assert all(process.poll() == 0 for process in hosts.all)
    assert len(ProcessGroupNCCL.made) == 4  # the server's: two hosts, two directions


def test_a_host_that_is_killed_costs_its_round_alone(armed: None, tmp_path: Path) -> None:
    hosts = Hosts("GPU-{rank}")
    config = large("fedavg", backend="nccl", deadlines={"client_timeout_s": 2.0})
    config["rounds"] = 5
    seen = Recorder(lambda number: os.kill(hosts.newest[1].pid, signal.SIGKILL) if number == 1 else None)
    result = run_here(load(config), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert result["status"] == "finished"
    assert any("host 1 lost (killed by SIGKILL)" in w for w in seen.warnings)
    assert [line["committed"] for line in seen.lines] == [True] * 5


def world_of(size: int) -> ProcessGroupNCCL:
    """This process's end of the group of all ranks."""
    (group,) = [g for g in ProcessGroupNCCL.made if g.size == size]
    return group


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
@pytest.mark.parametrize(("topology", "back"), [("collective", "gather"), ("reduce", "reduce")])
def test_a_run_over_the_group_of_all_ranks_gives_the_same_bits(
    armed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, topology: str, back: str
) -> None:
    hosts = Hosts("GPU-{rank}")
    alone = fldist.run(large(algorithm), output=tmp_path / "alone")
    monkeypatch.setattr(NcclWorld, "_is_away", lambda self, tensor: True)  # as all is at the server
    settings = load(large(algorithm, backend="nccl", topology=topology))
    there = run_here(settings, nproc=3, output=tmp_path / "there", spawn=hosts)
    assert there["backend"] == "nccl"
    assert there["state_hash"] == alone["state_hash"]
    for what in ("logical", "encoded", "by_kind"):
        assert there["bytes"][what] == alone["bytes"][what]
    assert all(process.poll() == 0 for process in hosts.all)
    group = world_of(3)
    assert {way for way, _ in group.begun} == {"broadcast", back}
    assert all(work.waited for work in group.works)
    assert group.aborted  # as a run's end does it


@pytest.mark.parametrize("topology", ["collective", "reduce"])
def test_a_host_killed_within_an_exchange_ends_the_run_and_nobody_hangs(
    armed: None, tmp_path: Path, topology: str
) -> None:
    hosts = Hosts("GPU-{rank}")
    hosts.moments[2] = ("in the world", int(signal.SIGKILL), 2, str(tmp_path / "mark"))
    settings = load(large("fedavg", backend="nccl", topology=topology, deadlines={"client_timeout_s": 2.0}))
    with pytest.raises(RunStopped, match=rf"host \d lost \(.*\); topology {topology} needs every rank"):
        run_here(settings, nproc=4, output=tmp_path / "run", spawn=hosts)
    struck = float((tmp_path / "mark").read_text())
    assert time.monotonic() - struck < 10.0
    assert hosts.newest[2].poll() == -signal.SIGKILL
    assert all(process.poll() is not None for process in hosts.all)
    assert world_of(4).aborted


def test_two_ranks_on_one_gpu_are_refused_by_name(armed: None, tmp_path: Path) -> None:
    hosts = Hosts("GPU-9")
    with pytest.raises(
        RunStopped, match=r"ranks [12] and [12] have the same GPU \(cuda:0 of .*, GPU-9\).*backend=gloo"
    ):
        run_here(load(large("fedavg", backend="nccl")), nproc=3, output=tmp_path / "run", spawn=hosts)


def test_the_servers_own_gpu_is_taken_too(armed: None, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="ranks 0 and 1 have the same GPU"):
        run_here(load(large("fedavg", backend="nccl")), nproc=2, output=tmp_path / "run", spawn=Hosts("GPU-0"))


# ---- the real one
def test_nccl_between_gpus_gives_what_gloo_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_gpus(2)
    monkeypatch.undo()
    config = large("scaffold", device="cuda")
    by_gloo = fldist.run({**config, "backend": "gloo"}, output=tmp_path / "gloo", nproc=2)
    by_nccl = fldist.run({**config, "backend": "nccl"}, output=tmp_path / "nccl", nproc=2)
    assert by_nccl["backend"] == "nccl"
    assert by_nccl["state_hash"] == by_gloo["state_hash"]  # the same GPUs, the same arithmetic
    assert by_nccl["bytes"]["logical"] == by_gloo["bytes"]["logical"]


@pytest.mark.parametrize("topology", ["collective", "reduce"])
def test_nccl_between_all_ranks_gives_what_a_star_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, topology: str
) -> None:
    needs_gpus(2)
    monkeypatch.undo()
    nproc = min(4, torch.cuda.device_count())
    config = large("scaffold", device="cuda", backend="nccl")
    star = fldist.run(config, output=tmp_path / "star", nproc=nproc)
    there = fldist.run({**config, "topology": topology}, output=tmp_path / topology, nproc=nproc)
    assert there["state_hash"] == star["state_hash"]
    assert there["bytes"]["logical"] == star["bytes"]["logical"]
