"""The control plane of gloo: who may join, what strangers and the silent cost, and that nothing is left behind.

Both ends live in this process; hostile peers are plain sockets on loopback.
"""

import contextlib
import gc
import json
import os
import random
import select
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest

from fldist.wire import control
from fldist.wire.codec import (
    FIXED_BYTES,
    MAX_NOTE_BYTES,
    Expected,
    Frame,
    FrameType,
    Head,
    Message,
    Status,
    decode,
    encode,
    head_length,
)
from fldist.wire.control import Connection, ControlPlane, new_token, proof
from fldist.wire.errors import DeadlineExceeded, PeerLost, TransportError
from fldist.wire.gloo import GlooHost, GlooServer
from fldist.wire.link import Joined, Limits, Lost, Welcome
from fldist.wire.pair import _listens
from fldist.wire.session import Session
from tests.conftest import TIMED, in_time

RUN_ID = bytes(range(16))
WELCOME = Welcome(RUN_ID, 3, {"name": "test"})
NOTHING = Expected(lambda number: None, lambda client: None)
CALM = Limits(join_s=2.0, silence_s=2.5)
QUICK = Limits(join_s=1, silence_s=0.6)


def own_sockets():
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            found += [target] if target.startswith("socket:") else []
    return set(found)


def own_threads():
    return {t for t in threading.enumerate() if t.name.startswith("fldist-")}


def wait_until(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def gone(before, now):
    if now() - before:
        gc.collect()
    return not now() - before


@pytest.fixture(autouse=True)
def nothing_left():
    threads, sockets = own_threads(), own_sockets()
    yield
    wait_until(lambda: gone(threads, own_threads), 1.0)
    wait_until(lambda: gone(sockets, own_sockets), 1.0)
    assert own_threads() - threads == set()
    assert own_sockets() - sockets == set()


@pytest.fixture
def serve(nothing_left):
    """Make servers that admit hosts; they are closed at the end."""
    made = []

    def make(limits=CALM, ranks=(1, 2), **options):
        made.append(GlooServer(ranks=list(ranks), limits=limits, **options))
        made[-1].expected = NOTHING
        made[-1].admit(WELCOME)
        return made[-1]

    yield make
    while made:  # what a server has of gloo's goes with it
        made.pop().close(1.0)


@pytest.fixture
def connect(nothing_left):
    """Make plain connections to an address; they are closed at the end."""
    made = []

    def make(address, sock=None):
        if sock is None:
            sock = socket.create_connection(address, timeout=3)
        made.append(Peer(sock))
        return made[-1]

    yield make
    for peer in made:
        peer.sock.close()


class Peer:
    """A raw connection that speaks frames when it wants to."""

    def __init__(self, sock):
        self.sock = sock
        sock.settimeout(3)
        self.sent_bytes = 0
        self.identity = ()

    def send(self, kind, note=None, **head):
        self.send_raw(encode(Frame(Head(kind, *self.identity, **head), note=note or {})))

    def send_raw(self, data):
        self.sock.sendall(data)

    def hear(self, *, but=(FrameType.HEARTBEAT, FrameType.STORE)):
        """The next frame but heartbeats and rendezvous; None at the end of the connection."""
        for _ in range(1000):
            data = self._exactly(FIXED_BYTES)
            if data is None:
                return None
            frame = decode(data + self._exactly(head_length(data) - FIXED_BYTES), None)
            if frame.head.type not in but:
                return frame
        raise AssertionError("the peer sends heartbeats without end")

    def tell_address(self, rank, *, world=False):
        """Tell in a rendezvous, once the server has, where this rank listens; the server's end is to be its only one.

        Of two, gloo has that one connect whose port is the larger, its bytes swapped: the other waits.
        """
        while True:
            note = self.hear(but=(FrameType.HEARTBEAT, FrameType.WORLD)).note
            if bool(note.get("world")) == world and note["k"].endswith("/0"):
                break
        told = bytes.fromhex(note["v"])
        port, _ = _listens(told)
        mine = told.replace(port.to_bytes(2, "big"), b"\xff\xff", 1)
        more = {"world": True} if world else {}
        self.send(FrameType.STORE, {"k": note["k"][:-1] + str(rank), "v": mine.hex(), **more})

    def _exactly(self, size):
        data = b""
        while len(data) < size:
            try:
                more = self.sock.recv(size - len(data))
            except ConnectionResetError:
                return None
            if not more:
                return None
            data += more
        return data

    def is_closed(self, within_s=2.0):
        """Whether the other end hangs up in time; reads what comes before that."""
        deadline = time.monotonic() + within_s
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.sock], [], [], left)[0]:
                try:
                    if not self.sock.recv(4096):
                        return True
                except ConnectionResetError:
                    return True
        return False

    def challenge(self, rank):
        self.send(FrameType.JOIN, {"rank": rank, "nonce": "mine"})
        return self.hear().note

    def join(self, rank, token):
        """Join by hand; returns the WELCOME or the BYE."""
        note = self.challenge(rank)
        assert note["proof"] == proof(bytes.fromhex(token), "server", "mine", note["nonce"])
        self.send(FrameType.PROOF, {"proof": proof(bytes.fromhex(token), "host", note["nonce"], "mine", str(rank))})
        answer = self.hear()
        if answer.head.type is FrameType.WELCOME:
            self.identity = (RUN_ID, WELCOME.epoch, answer.note["incarnation"])
        return answer


class HostThread(threading.Thread):
    """A proper host: joins, is ready, listens until BYE, closes."""

    def __init__(self, server, rank):
        super().__init__(name=f"host-{rank}", daemon=True)
        self.frames = []
        self.error = None
        self.welcome = None
        self._arguments = (server.address, rank, server.token, Limits(join_s=2.5))
        self.start()

    def run(self):
        try:
            host = GlooHost(*self._arguments)
            try:
                self.welcome = host.welcome
                host.expected = NOTHING
                host.ready()
                while FrameType.BYE not in self.frames:
                    self.frames.append(host.recv().head.type)
            finally:
                host.close()
        except Exception as error:
            self.error = error


def joined_host(server, rank):
    host = HostThread(server, rank)
    event = server.next_event(3)
    assert isinstance(event, Joined), (event, host.error)
    assert event.rank == rank
    return host


def end_well(server, hosts):
    """Give every host a verdict and say goodbye; all must have seen just that."""
    for rank in hosts:
        server.post(rank, Frame(Head(FrameType.VERDICT), note={"verdicts": []}))
    began = time.monotonic()
    server.close(10.0)
    assert time.monotonic() - began < 9.0, "the hosts did not leave by themselves"
    for host in hosts.values():
        host.join(2)
        assert not host.is_alive()
        assert host.error is None
        assert host.frames == [FrameType.VERDICT, FrameType.BYE]
    assert server.next_event(0.0) is None


# ---- joining


def test_a_host_joins_lives_and_leaves(serve):
    server = serve()
    host = HostThread(server, 2)
    event = server.next_event(3)
    assert (event.rank, event.incarnation, event.info["pid"]) == (2, 1, os.getpid())
    assert abs(event.offset_ns) < 1e9  # both ends have the same clock
    assert server.connected == {2}
    assert host.welcome == WELCOME.note(1, CALM)
    assert (host.welcome["run_id"], host.welcome["silence_s"]) == (RUN_ID.hex(), 2.5)
    end_well(server, {2: host})


def test_a_host_that_left_may_join_again(serve, connect):
    server = serve()
    for incarnation in (1, 2, 3):
        peer = connect(server.address)
        assert peer.join(1, server.token).note["incarnation"] == incarnation
        peer.sock.close()
        assert server.next_event(2) == Lost(1, "connection closed by the peer")
        assert server.connected == set()
    host = joined_host(server, 1)
    assert host.welcome["incarnation"] == 4
    end_well(server, {1: host})


# ---- strangers


JOIN = encode(Frame(Head(FrameType.JOIN), note={"rank": 1, "nonce": "mine"}))


def resealed(head):
    """The same head with the right checksum."""
    return head[:-4] + struct.pack("<I", zlib.crc32(head[:-4]))


def with_note(text, kind=FrameType.JOIN):
    """A control frame with any text where its note should be."""
    empty = bytearray(encode(Frame(Head(kind)))[:-4])
    struct.pack_into("<I", empty, 8, FIXED_BYTES + len(text) + 4)
    struct.pack_into("<I", empty, FIXED_BYTES - 12, len(text))
    return resealed(bytes(empty) + text + b"\0" * 4)


def with_messages():
    frame = Frame(Head(FrameType.REPLY, method=1))
    frame.messages.append(Message(0, status=Status.ERROR, error="x"))
    return encode(frame)


def wrong_token(peer, server):
    note = peer.challenge(1)
    peer.send(FrameType.PROOF, {"proof": proof(bytes(32), "host", note["nonce"], "mine", "1")})


def proof_for_another_rank(peer, server):
    note = peer.challenge(1)
    token = bytes.fromhex(server.token)
    peer.send(FrameType.PROOF, {"proof": proof(token, "host", note["nonce"], "mine", "3")})


def the_servers_own_proof(peer, server):
    peer.send(FrameType.PROOF, {"proof": peer.challenge(1)["proof"]})


def second_join(peer, server):
    peer.challenge(1)
    peer.send_raw(JOIN)


def note_after_challenge(note):
    def attack(peer, server):
        peer.challenge(1)
        peer.send(FrameType.PROOF, note)

    return attack


def bytes_at_once(data):
    return lambda peer, server: peer.send_raw(data)


def rank_not_expected(rank):
    def attack(peer, server):
        answer = peer.join(rank, server.token)
        assert answer.head.type is FrameType.BYE
        assert str(rank) in answer.note["reason"]

    return attack


def in_pieces(peer, server):
    for byte in JOIN[:30] + b"\xff" + JOIN[31:]:
        peer.send_raw(bytes([byte]))


ATTACKS = {
    "random bytes": bytes_at_once(random.Random(1).randbytes(200)),
    "a megabyte of random bytes": bytes_at_once(random.Random(2).randbytes(1 << 20)),
    "HTTP": bytes_at_once(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-Filler: yes\r\n" * 10 + b"\r\n"),
    "wrong magic": bytes_at_once(resealed(b"FLD2" + JOIN[4:])),
    "wrong version": bytes_at_once(resealed(JOIN[:4] + b"\2\0" + JOIN[6:])),
    "unknown type": bytes_at_once(resealed(JOIN[:6] + b"\x63" + JOIN[7:])),
    "wrong checksum": bytes_at_once(JOIN[:-1] + bytes([JOIN[-1] ^ 1])),
    "a length of 4 GiB": bytes_at_once(JOIN[:8] + b"\xff\xff\xff\xff" + JOIN[12:]),
    "a length over the limit of strangers": bytes_at_once(JOIN[:8] + struct.pack("<I", MAX_NOTE_BYTES + 1) + JOIN[12:]),
    "a damaged JOIN byte by byte": in_pieces,
    "PROOF first": bytes_at_once(encode(Frame(Head(FrameType.PROOF), note={"proof": "00"}))),
    "WELCOME first": bytes_at_once(encode(Frame(Head(FrameType.WELCOME), note={"rank": 1, "nonce": "mine"}))),
    "messages": bytes_at_once(with_messages()),
    "JOIN without a note": bytes_at_once(encode(Frame(Head(FrameType.JOIN)))),
    "JOIN without a nonce": bytes_at_once(with_note(b'{"rank": 1}')),
    "JOIN as rank null": bytes_at_once(with_note(b'{"rank": null, "nonce": "a"}')),
    "JOIN as rank text": bytes_at_once(with_note(b'{"rank": "one", "nonce": "a"}')),
    "JOIN as rank NaN": bytes_at_once(with_note(b'{"rank": NaN, "nonce": "a"}')),
    "JOIN as rank infinity": bytes_at_once(with_note(b'{"rank": 1e999, "nonce": "a"}')),
    "JOIN with half a surrogate": bytes_at_once(with_note(b'{"rank": 1, "nonce": "\\ud800"}')),
    "JOIN with no JSON": bytes_at_once(with_note(b'{"rank": 1, "nonce"')),
    "JOIN with a list": bytes_at_once(with_note(b"[1]")),
    "JOIN with a number of 5000 digits": bytes_at_once(with_note(b'{"rank": ' + b"9" * 5000 + b', "nonce": "a"}')),
    "JOIN nested 100000 deep": bytes_at_once(with_note(b'{"rank": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    "JOIN twice": second_join,
    "PROOF without a proof": note_after_challenge({}),
    "PROOF that is no text": note_after_challenge({"proof": None}),
    "PROOF that is not ASCII": note_after_challenge({"proof": "ä" * 64}),
    "wrong token": wrong_token,
    "the proof of another rank": proof_for_another_rank,
    "the server's own proof": the_servers_own_proof,
    "rank 3": rank_not_expected(3),
    "rank 0": rank_not_expected(0),
    "rank -1": rank_not_expected(-1),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_stranger_costs_its_own_connection_only(name, serve, connect):
    server = serve()
    bystander = joined_host(server, 2)
    peer = connect(server.address)
    with contextlib.suppress(ConnectionError):  # refused while it still sends
        ATTACKS[name](peer, server)
    assert peer.is_closed()
    assert server.connected == {2}
    end_well(server, {1: joined_host(server, 1), 2: bystander})


def test_a_rank_joins_once(serve, connect):
    server = serve()
    first = joined_host(server, 1)
    peer = connect(server.address)
    answer = peer.join(1, server.token)
    assert (answer.head.type, answer.note) == (FrameType.BYE, {"reason": "rank 1 has joined already"})
    assert peer.is_closed()
    with pytest.raises(PeerLost, match="refused rank 1: rank 1 has joined already"):
        GlooHost(server.address, 1, server.token, QUICK)
    end_well(server, {1: first})


@pytest.mark.parametrize(
    "greeting",
    [b"", b"F", JOIN[:FIXED_BYTES], JOIN, encode(Frame(Head(FrameType.HEARTBEAT)))],
    ids=["nothing", "a byte", "half a JOIN", "JOIN", "HEARTBEAT"],
)
def test_half_open_connections_do_not_keep_hosts_out(greeting, serve, connect):
    server = serve()
    strangers = [connect(server.address) for _ in range(20)]
    for stranger in strangers:
        stranger.send_raw(greeting)
    hosts = {rank: joined_host(server, rank) for rank in (1, 2)}
    assert not any(stranger.is_closed(0.001) for stranger in strangers)
    end_well(server, hosts)
    assert all(stranger.is_closed() for stranger in strangers)


@TIMED
def test_half_open_connections_are_closed_in_time(serve, connect, monkeypatch):
    monkeypatch.setattr(control, "HANDSHAKE_S", 0.4)
    server = serve()
    host = joined_host(server, 1)
    began = time.monotonic()
    strangers = [connect(server.address) for _ in range(20)]
    assert not strangers[0].is_closed(0.2)
    assert all(stranger.is_closed(1.0) for stranger in strangers)
    in_time(time.monotonic() - began, 1.0)
    end_well(server, {1: host})


def test_of_too_many_half_open_connections_the_oldest_are_closed(serve, connect, monkeypatch):
    monkeypatch.setattr(control, "MAX_HALF_OPEN", 3)
    server = serve()
    host = joined_host(server, 1)
    strangers = [connect(server.address) for _ in range(5)]
    assert all(stranger.is_closed() for stranger in strangers[:2])
    assert not any(stranger.is_closed(0.1) for stranger in strangers[2:])
    end_well(server, {1: host, 2: joined_host(server, 2)})


# ---- joined peers that break the rules


@pytest.mark.parametrize(
    "identity",
    [(bytes(16), 3, 1), (RUN_ID, 2, 1), (RUN_ID, 3, 2)],
    ids=["another run", "another epoch", "another incarnation"],
)
@pytest.mark.parametrize("kind", [FrameType.STORE, FrameType.ACK], ids=lambda kind: kind.name)
def test_a_frame_of_another_session_ends_this_one(kind, identity, serve, connect):
    server = serve()
    bystander = joined_host(server, 2)
    peer = connect(server.address)
    peer.join(1, server.token)
    peer.identity = identity
    peer.send(kind, {"k": "a", "v": "00"})
    event = server.next_event(2)
    assert isinstance(event, Lost)
    assert event.rank == 1
    assert "a frame of run" in event.reason
    assert peer.is_closed()
    end_well(server, {2: bystander})


@TIMED
def test_a_peer_that_falls_silent_is_lost(serve, connect):
    server = serve(QUICK)
    peer = connect(server.address)
    assert peer.join(1, server.token).head.type is FrameType.WELCOME
    began = time.monotonic()
    event = server.next_event(2)
    took = time.monotonic() - began
    assert event == Lost(1, "silent for 0.6 s")
    assert took > 0.5
    in_time(took, 0.6 + 0.3)
    assert peer.is_closed()


def test_a_peer_that_goes_before_it_connects_leaves_nobody_waiting_for_it(serve, connect):
    """It has told where it listens, so that gloo waits for its connection, which nothing of gloo's ends in time."""
    server = serve()
    peer = connect(server.address)
    peer.join(1, server.token)
    peer.tell_address(1)
    time.sleep(0.1)
    writers = [t for t in own_threads() if t.name == "fldist-writer"]
    assert len(writers) == 1
    peer.sock.close()
    assert server.next_event(2) == Lost(1, "connection closed by the peer")
    writers[0].join(5.0)
    assert not writers[0].is_alive()
    end_well(server, {1: joined_host(server, 1)})


def test_a_peer_that_goes_while_all_ranks_meet_leaves_nobody_waiting_for_it(serve, connect):
    server = serve()
    host = joined_host(server, 1)
    peer = connect(server.address)
    peer.join(2, server.token)
    server.open_world()
    peer.tell_address(2, world=True)
    time.sleep(0.2)
    peer.sock.close()
    lost = [server.next_event(4), server.next_event(4)]
    assert [event.rank for event in lost] == [2, 1]
    host.join(4)
    assert not host.is_alive()
    assert "the exchange between all ranks failed" in str(host.error) or "the server is gone" in str(host.error)
    server.close(1.0)
    assert wait_until(lambda: not own_threads(), 5.0)


@TIMED
def test_heartbeats_alone_keep_a_peer(serve, connect):
    server = serve(Limits(join_s=3, silence_s=0.6))
    peer = connect(server.address)
    peer.join(1, server.token)
    for _ in range(10):
        peer.send(FrameType.HEARTBEAT)
        assert server.next_event(0.12) is None
    began = time.monotonic()
    assert server.next_event(2) == Lost(1, "silent for 0.6 s")
    assert time.monotonic() - began > 0.3
    in_time(time.monotonic() - began, 0.6 + 0.3)


def test_a_connection_that_another_thread_closes_does_not_block_its_number(connect):
    """Sessions end in threads of their own; the next stranger may get the closed connection's descriptor."""
    accepted, heard = [], []
    turns = [threading.Event(), threading.Event()]

    def on_frame(connection, data):
        heard.append(connection)
        if len(heard) <= len(turns):
            turns[len(heard) - 1].wait(2)

    listener = socket.create_server(("127.0.0.1", 0))
    plane = ControlPlane(5.0, on_frame, lambda connection, reason: None, accepted.append)
    plane.listen(listener)
    held = []
    try:
        closing, first, second = (connect(listener.getsockname()) for _ in range(3))
        assert wait_until(lambda: len(accepted) == 3, 2)
        late = connect(None, socket.socket())
        ours = next(c for c in accepted if c.sock.getpeername() == closing.sock.getsockname())
        number = ours.sock.fileno()
        while (other := os.dup(listener.fileno())) < number:  # so that `number` will be the lowest free one
            held.append(other)
        held.append(other)
        first.send_raw(JOIN)
        assert wait_until(lambda: len(heard) == 1, 2)  # the plane is busy; these two come next, in one turn
        second.send_raw(JOIN)
        late.sock.connect(listener.getsockname())
        time.sleep(0.05)
        turns[0].set()
        assert wait_until(lambda: len(heard) == 2, 2)
        ours.close()
        turns[1].set()
        assert wait_until(lambda: len(accepted) == 4, 1)
        late.send_raw(JOIN)
        assert wait_until(lambda: len(heard) == 3, 1)
        assert heard[2] is accepted[3]
    finally:
        for turn in turns:
            turn.set()
        plane.close()
        listener.close()
        for other in held:
            os.close(other)


def test_all_that_is_no_message_is_counted_as_transport(serve, monkeypatch):
    written = Counter()
    write = Connection._write

    def counted(self, data, deadline):
        write(self, data, deadline)
        written["down" if self.sock.getsockname()[1] == server.address[1] else "up"] += len(data)

    monkeypatch.setattr(Connection, "_write", counted)
    server = serve()
    host = joined_host(server, 1)
    server.post(1, Frame(Head(FrameType.VERDICT), note={"verdicts": []}))
    assert wait_until(lambda: host.frames == [FrameType.VERDICT], 1)
    wait_until(lambda: server.transport_bytes() == (written["up"], written["down"]), 0.3)
    assert server.transport_bytes() == (written["up"], written["down"])
    server.close(2.0)
    host.join(2)


def test_a_verdict_is_counted_when_it_is_posted_and_a_call_is_not():
    """The result is written right after the last verdicts: it must not depend on when they are sent."""
    listener = socket.create_server(("127.0.0.1", 0))
    connection = Connection(socket.create_connection(listener.getsockname()))
    session = Session(
        connection,
        me=0,
        limits=CALM,
        identity=(RUN_ID, 3, 1),
        deliver=lambda session, frame: None,
        acknowledged=lambda session, head: None,
        lost=lambda session, reason: None,
    )  # not started: nothing is sent
    verdict = Frame(Head(FrameType.VERDICT, RUN_ID, 3, 1), note={"verdicts": []})
    session.put(verdict, encode(verdict))
    assert connection.transport_out == verdict.head_bytes > 0
    call = Frame(Head(FrameType.CALL, RUN_ID, 3, 1))
    session.put(call, encode(call))
    assert connection.transport_out == verdict.head_bytes
    connection.sock.close()
    listener.close()


def test_transport_bytes_of_lost_peers_stay_counted(serve, connect):
    server = serve()
    peer = connect(server.address)
    peer.join(1, server.token)
    before = server.transport_bytes()
    assert before[0] > len(JOIN)
    peer.sock.close()
    assert isinstance(server.next_event(2), Lost)
    after = server.transport_bytes()
    assert after[0] >= before[0]
    assert after[1] >= before[1]


# ---- hosts and servers that are not what they say


class FakeServer(threading.Thread):
    """Accepts one connection and answers it as told: a function of the peer."""

    def __init__(self, behave):
        super().__init__(name="fake-server", daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(3)
        self.address = self.listener.getsockname()
        self.stop = threading.Event()
        self._behave = behave
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            sock, _ = self.listener.accept()
            with sock:
                self._behave(Peer(sock))
                self.stop.wait(5)

    def close(self):
        self.stop.set()
        self.join(5)
        self.listener.close()


@pytest.fixture
def fake(nothing_left):
    """Make fake servers; they end with the test."""
    made = []

    def make(behave):
        made.append(FakeServer(behave))
        return made[-1]

    yield make
    for server in made:
        server.close()


def test_a_host_refuses_a_server_that_does_not_know_the_token(serve):
    server = serve()
    with pytest.raises(PeerLost, match="does not know this run's token"):
        GlooHost(server.address, 1, new_token(), QUICK)
    assert server.next_event(0.2) is None
    assert server.connected == set()
    end_well(server, {1: joined_host(server, 1)})


@pytest.mark.parametrize("heard", [0, 1], ids=["accept", "JOIN"])
@TIMED
def test_a_server_that_is_silent_is_given_up_in_time(heard, fake):
    server = fake(lambda peer: [peer.hear() for _ in range(heard)])
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="did not answer within 1 s"):
        GlooHost(server.address, 1, new_token(), QUICK)
    assert time.monotonic() - began > 0.9
    in_time(time.monotonic() - began, 1.5)


@TIMED
def test_no_server_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    began = time.monotonic()
    with pytest.raises(PeerLost, match="no server at"):
        GlooHost(address, 1, new_token(), QUICK)
    in_time(time.monotonic() - began, 1.5)


@TIMED
def test_a_server_that_hangs_up_is_lost(fake):
    server = fake(lambda peer: [peer.hear(), peer.sock.shutdown(socket.SHUT_RDWR)])
    began = time.monotonic()
    with pytest.raises(PeerLost, match="hung up while this host joined"):
        GlooHost(server.address, 1, new_token(), QUICK)
    in_time(time.monotonic() - began, 0.9)


@pytest.mark.parametrize(
    "challenge",
    [
        encode(Frame(Head(FrameType.CHALLENGE), note={"nonce": "a", "proof": "0" * 64})),
        encode(Frame(Head(FrameType.CHALLENGE), note={"nonce": "a", "proof": "ä"})),
        encode(Frame(Head(FrameType.CHALLENGE), note={"nonce": "a"})),
        encode(Frame(Head(FrameType.CHALLENGE))),
        encode(Frame(Head(FrameType.WELCOME), note=WELCOME.note(1, QUICK))),
        encode(Frame(Head(FrameType.CALL))),
        with_note(b"[" * 100_000, FrameType.CHALLENGE),
        with_messages(),
        random.Random(3).randbytes(500),
    ],
    ids=["wrong proof", "proof not ASCII", "no proof", "no note", "WELCOME", "CALL", "nested", "messages", "random"],
)
@TIMED
def test_a_host_takes_nothing_from_a_server_without_proof(challenge, fake):
    def behave(peer):
        peer.hear()
        peer.send_raw(challenge)

    server = fake(behave)
    began = time.monotonic()
    with pytest.raises(TransportError):
        GlooHost(server.address, 1, new_token(), QUICK)
    in_time(time.monotonic() - began, 0.9)


@TIMED
def test_a_server_that_falls_silent_is_lost(fake):
    token = new_token()
    key = bytes.fromhex(token)

    def behave(peer):
        theirs = peer.hear().note["nonce"]
        peer.send(FrameType.CHALLENGE, {"nonce": "ours", "proof": proof(key, "server", theirs, "ours")})
        assert peer.hear().note["proof"] == proof(key, "host", "ours", theirs, "1")
        peer.send(FrameType.WELCOME, WELCOME.note(1, QUICK))

    server = fake(behave)
    host = GlooHost(server.address, 1, token, Limits(join_s=3, silence_s=5))
    began = time.monotonic()
    # a host is PATIENCE times as patient with the one server as the server is with each host
    with pytest.raises(PeerLost, match=r"the server is gone: silent for 2\.4 s"):
        host.recv()
    assert time.monotonic() - began > 2.3
    in_time(time.monotonic() - began, 2.4 + 0.3)
    with pytest.raises(PeerLost):
        host.recv()
    host.close()


def test_tokens_and_proofs_are_keyed_and_bound_to_their_parts():
    assert len(bytes.fromhex(new_token())) == 32
    assert new_token() != new_token()
    right = proof(b"k" * 32, "host", "a", "b", "1")
    assert len(right) == 64
    others = [
        proof(b"l" * 32, "host", "a", "b", "1"),
        proof(b"k" * 32, "server", "a", "b", "1"),
        proof(b"k" * 32, "host", "b", "a", "1"),
        proof(b"k" * 32, "host", "a", "b", "2"),
    ]
    assert right not in others
    assert right == proof(b"k" * 32, "host", "a", "b", "1")


@TIMED
def test_a_server_closes_at_once_when_nobody_has_joined(serve, connect):
    server = serve()
    stranger = connect(server.address)
    began = time.monotonic()
    server.close(3.0)
    in_time(time.monotonic() - began, 0.5)
    assert stranger.is_closed()
    with pytest.raises(OSError):
        socket.create_connection(server.address, timeout=1)


def test_the_welcome_is_json_that_a_config_can_travel_in(serve, connect):
    server = serve()
    answer = connect(server.address).join(2, server.token)
    assert json.loads(json.dumps(answer.note)) == WELCOME.note(1, CALM)
