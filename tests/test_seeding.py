"""Random streams: keyed by what they are for, not by when they are asked for."""

import random

import numpy as np
import pytest
import torch

from fldist.seeding import Streams, derive, forked, generator, numpy_generator


def draw(rng, count=8):
    return torch.rand(count, generator=rng).tolist()


def global_draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


KEYS = [
    (0, "order"),
    (1, "order"),
    (0, "client"),
    (0, "order", 0),
    (0, "order", 1),
    (0, "order", 0, 1),
    (0, "order", 1, 0),
    (0, "order", 1, 0, 0),
    (0, "order", 10),
    (0, "order", 1, 2, 3),
    (0, "order", 12, 3),
]


# ---- keys
def test_every_part_of_the_key_counts():
    assert len({derive(*k) for k in KEYS}) == len(KEYS)
    assert len({tuple(draw(generator(*k))) for k in KEYS}) == len(KEYS)
    assert len({tuple(numpy_generator(*k).random(4)) for k in KEYS}) == len(KEYS)


def test_a_key_gives_the_same_stream_whatever_was_drawn_before():
    alone = {k: draw(generator(*k)) for k in KEYS}
    torch.rand(17)
    for k in reversed(KEYS):
        assert draw(generator(*k)) == alone[k]


def test_derived_seeds_are_fixed_for_ever():
    """A golden value: another one would change every published run."""
    seed = derive(0, "order", 1, 2, 0)
    assert 0 <= seed < 2**63
    assert seed == 559650192328491946


def test_generators_leave_the_global_ones_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = global_draws()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    draw(generator(0, "x"))
    numpy_generator(0, "x").random(5)
    assert global_draws() == expected


# ---- forked
def test_forked_gives_the_global_generators_a_stream_and_restores_them():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = global_draws()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    with forked(0, "client", 1):
        inside = global_draws()
    assert global_draws() == expected
    assert all(a != b for a, b in zip(inside, expected, strict=True))


def test_forked_restores_after_an_exception():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = global_draws()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    with pytest.raises(RuntimeError), forked(0, "client", 1):
        global_draws()
        raise RuntimeError
    assert global_draws() == expected


def test_the_stream_inside_forked_depends_only_on_its_key():
    def inside(*key):
        with forked(*key):
            return global_draws()

    first = inside(0, "client", 1, 2)
    torch.manual_seed(99)
    random.random()
    assert inside(0, "client", 1, 2) == first
    for a, b in zip(inside(0, "client", 1, 3), first, strict=True):
        assert a != b


def test_forked_may_be_nested():
    with forked(0, "a"):
        torch.rand(1)
        expected = global_draws()
    with forked(0, "a"):
        torch.rand(1)
        with forked(0, "b"):
            global_draws()
        assert global_draws() == expected


# ---- a client's streams
def test_the_nth_use_of_a_stream_differs():
    streams = Streams(0, 1, 2)
    drawn = [draw(streams.generator("order")) for _ in range(4)]
    assert len({tuple(d) for d in drawn}) == 4
    for use, values in enumerate(drawn):
        assert values == draw(generator(0, "order", 1, 2, use))


def test_a_stream_is_independent_of_the_uses_of_others():
    alone = Streams(0, 1, 2)
    expected = [draw(alone.generator("order")) for _ in range(2)]
    mixed = Streams(0, 1, 2)
    mixed.generator("noise")
    first = draw(mixed.generator("order"))
    draw(mixed.generator("noise"), 100)
    assert [first, draw(mixed.generator("order"))] == expected


def test_streams_start_over_with_a_new_round():
    """A repeated attempt draws what the first one drew."""
    first, repeated = Streams(3, 7, 1), Streams(3, 7, 1)
    assert draw(first.generator("order")) == draw(repeated.generator("order"))
    assert first.next_key("order") == repeated.next_key("order") == (7, 1, 1)


@pytest.mark.parametrize("other", [Streams(1, 1, 1), Streams(0, 2, 1), Streams(0, 1, 2)])
def test_streams_differ_by_seed_round_and_client(other):
    assert draw(Streams(0, 1, 1).generator("order")) != draw(other.generator("order"))
