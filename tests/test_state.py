"""Client state that is transactional, and the hash of a state."""

import pytest
import torch
from torch import nn

from fldist.algorithm import State
from fldist.params import Params
from fldist.runtime.checkpoint import ClientFiles
from fldist.runtime.state import ClientStates, Watch, hash_state, version_of
from fldist.wire.codec import FrameType, Head


def states(stateful=True):
    """Client k starts with v = 10 k and an empty log."""
    made = ClientStates(lambda client: State(v=10 * client, log=[]), stateful)
    made.begin((1, 0))
    return made


def call(clients, client, **writes):
    """One call of a client method that writes these values; returns what it saw before as v."""
    me = clients.view(client)
    seen = me.v
    for name, value in writes.items():
        setattr(me, name, value)
    clients.stage(client, me.writes)
    return seen


# ---- staged writes
def test_a_call_sees_the_committed_state_and_its_own_writes():
    me = states().view(3)
    assert me.client == 3
    assert me.v == 30
    me.v = 31
    me.other = "x"
    assert (me.v, me.other) == (31, "x")


def test_later_calls_of_the_round_see_what_earlier_ones_staged():
    clients = states()
    assert call(clients, 1, v=11) == 10
    assert call(clients, 1, v=12) == 11
    assert clients.view(1).v == 12
    assert clients.view(2).v == 20  # another client
    assert clients.committed(1)["v"] == 10


def test_what_a_failed_call_wrote_is_not_seen():
    clients = states()
    clients.view(1).v = 99  # never staged: the host drops the writes of a call that raised
    assert clients.view(1).v == 10


def test_a_new_name_may_be_written():
    clients = states()
    call(clients, 1, fresh=5)
    clients.verdict((1, 0), True, {})
    assert clients.committed(1) == {"v": 10, "log": [], "fresh": 5}


# ---- the verdict
@pytest.mark.parametrize(("accepted", "v"), [({1: 0}, 10), ({1: 1}, 11), ({1: 2}, 12), ({1: 3}, 13), ({}, 13)])
def test_the_verdict_commits_the_accepted_prefix(accepted, v):
    clients = states()
    for value in (11, 12, 13):
        call(clients, 1, v=value, **{f"call_{value}": True})
    clients.verdict((1, 0), True, accepted)
    assert clients.committed(1)["v"] == v
    assert {n for n in clients.committed(1) if n.startswith("call")} == {f"call_{x}" for x in range(11, v + 1)}
    assert clients.view(1).v == v


def test_the_verdict_is_given_by_client():
    clients = states()
    for client in (1, 2, 3):
        call(clients, client, v=-client)
    clients.verdict((1, 0), True, {2: 0})
    assert [clients.committed(c)["v"] for c in (1, 2, 3)] == [-1, 20, -3]


def test_a_round_that_is_not_committed_leaves_nothing():
    clients = states()
    digest = clients.digest(1)
    call(clients, 1, v=11, fresh=1)
    clients.view(1).scratch.batch = 5
    clients.verdict((1, 0), False, {})
    assert clients.committed(1) == {"v": 10, "log": []}
    assert clients.digest(1) == digest
    assert clients.view(1).scratch.values == {}


def test_an_aborted_attempt_leaves_nothing():
    clients = states()
    call(clients, 1, v=11)
    clients.view(1).scratch.batch = 5
    assert clients.begin((1, 1))
    assert clients.view(1).v == 10
    assert clients.view(1).scratch.values == {}
    call(clients, 1, v=12)
    clients.verdict((1, 0), True, {})  # late, and of the other attempt
    assert clients.committed(1)["v"] == 10
    clients.verdict((1, 1), True, {})
    assert clients.committed(1)["v"] == 12


def test_a_verdict_commits_once():
    clients = states()
    call(clients, 1, v=11)
    clients.verdict((1, 0), True, {})
    clients.committed(1)["v"] = 10
    clients.verdict((1, 0), True, {})
    assert clients.committed(1)["v"] == 10


def test_begin_says_whether_the_attempt_is_a_new_one():
    clients = states()
    assert not clients.begin((1, 0))
    call(clients, 1, v=11)
    assert not clients.begin((1, 0))
    assert clients.view(1).v == 11
    assert clients.begin((2, 0))


# ---- scratch
def test_scratch_lives_within_a_round_and_is_not_committed():
    clients = states()
    clients.view(1).scratch.batch = 5
    assert clients.view(1).scratch.batch == 5
    assert clients.view(2).scratch.values == {}
    clients.verdict((1, 0), True, {})
    assert clients.committed(1) == {"v": 10, "log": []}
    assert clients.view(1).scratch.batch == 5, "the round's scoring may want it"
    clients.begin((2, 0))
    assert clients.view(1).scratch.values == {}


def test_scratch_needs_no_client_state():
    clients = states(stateful=False)
    clients.view(1).scratch.batch = 5
    assert clients.view(1).scratch.batch == 5


# ---- errors
def test_a_write_without_init_client_is_a_clear_error():
    me = states(stateful=False).view(1)
    with pytest.raises(AttributeError, match=r"me\.c cannot be set.*init_client"):
        me.c = 1
    assert me.writes == {}


def test_an_unknown_name_is_answered_with_what_there_is():
    me = states().view(1)
    me.mine = 1
    with pytest.raises(AttributeError, match=r"client 1 has no state 'w'; it holds log, mine, v"):
        _ = me.w


@pytest.mark.parametrize("name", ["client", "stage", "scratch", "writes", "watched"])
def test_reserved_names_cannot_be_written(name):
    with pytest.raises(AttributeError, match="is taken"):
        setattr(states().view(1), name, 1)


# ---- changes in place
def weights():
    return Params.of(nn.Linear(2, 2))


IN_PLACE = {
    "tensor": (lambda: torch.zeros(3), lambda t: t.add_(1)),
    "element": (lambda: torch.zeros(3), lambda t: t.__setitem__(0, 5.0)),
    "floats": (weights, lambda p: p.floats.mul_(2)),
    "trainable": (weights, lambda p: p.trainable.floats.zero_()),
    "named": (weights, lambda p: dict(p.named())["bias"].fill_(1)),
    "write": (weights, lambda p: p.write(p.zeros_like())),
    "dict": (lambda: {"a": torch.zeros(2)}, lambda d: d["a"].add_(1)),
    "list": (lambda: [torch.zeros(2), torch.zeros(1)], lambda x: x[1].add_(1)),
    "nested dict": (lambda: {"a": {"b": (torch.zeros(2),)}}, lambda d: d["a"]["b"][0].add_(1)),
    "state": (lambda: State(m=torch.zeros(2)), lambda s: s.m.add_(1)),
}


@pytest.mark.parametrize("how", IN_PLACE)
def test_a_state_that_was_changed_in_place_is_noticed(how):
    make, change = IN_PLACE[how]
    clients = ClientStates(lambda client: State(c=make(), d=torch.zeros(1)), stateful=True)
    clients.begin((1, 0))
    me = clients.view(0)
    _ = me.d
    assert me.watched.changed() is None
    value = me.c
    assert me.watched.changed() is None
    change(value)
    assert me.watched.changed() == "me.c"


@pytest.mark.parametrize("how", [h for h in IN_PLACE if h != "state"])  # no State is ever an argument
def test_a_changed_argument_is_noticed(how):
    make, change = IN_PLACE[how]
    watch, value = Watch(), make()
    watch.add("argument x", value)
    watch.add("argument y", torch.zeros(1))
    assert watch.changed() is None
    change(value)
    assert watch.changed() == "argument x"


def test_work_on_a_clone_is_no_change():
    clients = ClientStates(lambda client: State(c=weights()), stateful=True)
    me = clients.view(0)
    mine = me.c.clone()
    mine.floats.add_(1)
    me.c = mine
    assert me.watched.changed() is None
    assert not clients.committed(0)["c"].equals(mine)


# ---- hash
VALUES = {
    "x": torch.arange(6, dtype=torch.float32),
    "p": Params.zeros(weights().layout),
    "n": 3,
    "f": 0.5,
    "s": "text",
    "none": None,
    "flag": True,
    "list": [1, 2.0, [torch.zeros(2)]],
    "dict": {"a": 1, "b": torch.ones(1)},
    "state": State(m=torch.zeros(1)),
}


def test_the_hash_does_not_depend_on_the_order_of_insertion():
    reverse = dict(reversed(VALUES.items()))
    reverse["dict"] = {"b": torch.ones(1), "a": 1}
    assert list(reverse) != list(VALUES)
    assert hash_state(reverse) == hash_state(VALUES)


def test_equal_values_in_other_memory_have_the_same_hash():
    strided = torch.zeros(6, 2)
    strided[:, 0] = torch.arange(6)
    same = {**VALUES, "x": strided[:, 0], "p": VALUES["p"].clone()}
    assert not same["x"].is_contiguous()
    assert hash_state(same) == hash_state(VALUES)


def changed_params(floats=0, ints=0):
    module = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    params = Params.zeros(Params.of(module).layout)
    params.floats[-1] = floats
    params.ints[0] = ints
    return params


DIFFERENT = {
    "value": [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])],
    "last bit": [torch.tensor(1.0), torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))],
    "shape": [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(6, 1)],
    "dtype": [torch.zeros(2, dtype=t) for t in (torch.float32, torch.int32, torch.float64, torch.int64)],
    "params": [changed_params(), changed_params(floats=1), changed_params(ints=1)],
    "type": [0, 0.0, False, None, "0", [0], {"0": 0}, torch.tensor(0)],
    "list": [[1, 2], [2, 1], [[1], 2], [1, [2]], [1, 2, 3], [12], []],
    "nesting": [{"a": {"b": 1}}, {"a": 1, "b": 1}, {"b": {"a": 1}}],
    "text": ["ab", "ba", "abc", ""],
    "split texts": [["a", "bc"], ["ab", "c"], ["abc"]],
    "number": [1, 12, -1, 2**70],
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_the_hash_tells_values_apart(case):
    hashes = {hash_state({"v": value}) for value in DIFFERENT[case]}
    assert len(hashes) == len(DIFFERENT[case])


def test_the_hash_tells_names_apart():
    assert len({hash_state(v) for v in ({"a": 1}, {"b": 1}, {}, {"a": 1, "b": 1}, {"a": 1, "c": 1})}) == 5


@pytest.mark.parametrize("values", [{"b": torch.tensor([True, False])}, {"e": torch.empty(0)}, {"z": torch.tensor(3)}])
def test_unusual_tensors_can_be_hashed(values):
    assert hash_state(values) == hash_state({k: v.clone() for k, v in values.items()})


def test_what_cannot_be_hashed_is_named():
    with pytest.raises(TypeError, match=r"a state .*\bset\b"):
        hash_state({"v": {1, 2}})


def test_the_digest_is_the_hash_of_the_committed_state():
    clients = states()
    assert clients.digest(2) == hash_state({"log": [], "v": 20})
    call(clients, 2, v=21)
    assert clients.digest(2) == hash_state({"log": [], "v": 20})
    clients.verdict((1, 0), True, {})
    assert clients.digest(2) == hash_state({"log": [], "v": 21})


# ---- State
def test_a_state_holds_named_values():
    state = State(a=1)
    state.b = 2
    assert (state.a, state.b, list(state.values)) == (1, 2, ["a", "b"])
    with pytest.raises(AttributeError, match=r"no 'c'; it holds a, b"):
        _ = state.c


def test_a_copy_of_a_state_does_not_see_later_writes():
    state = State(a=1)
    copied = state.copy()
    state.a = 2
    copied.b = 3
    assert copied.a == 1
    assert list(state.values) == ["a"]


def test_what_was_written_for_a_dead_server_is_not_taken_for_its_successors(tmp_path):
    """A host that slept through its server's death writes the same call of the same round after the one that counts."""
    old, new = Head(FrameType.CALL, epoch=0, round=3, call=1), Head(FrameType.CALL, epoch=1, round=3, call=1)
    mine, late = (ClientStates(lambda client: State(v=0), stateful=True) for _ in range(2))
    mine.files = late.files = ClientFiles(tmp_path)
    mine.begin((3, 0))
    late.begin((3, 0))
    assert mine.stage(5, {"v": 1}, version_of(new))
    assert late.stage(5, {"v": 2}, version_of(old))
    reader = ClientStates(lambda client: State(v=0), stateful=True)
    reader.files = ClientFiles(tmp_path)
    reader.take(5, version_of(new))
    assert reader.committed(5) == {"v": 1}


def test_another_server_finds_no_round_begun():
    clients = ClientStates(lambda client: State(v=0), stateful=True)
    assert clients.begin((3, 0))
    clients.stage(1, {"v": 9})
    assert clients.view(1).v == 9
    clients.forget()
    assert clients.begin((3, 0)), "the same round of another server is another round"
    assert clients.view(1).v == 0
