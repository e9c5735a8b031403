"""Partitions: no row twice, by the documented law, equal row for row to a plain loop over the same draws."""

import dataclasses
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fldist import resolve
from fldist.data.datasets import Dataset
from fldist.data.partition import (
    NAMES,
    Classes,
    Dirichlet,
    DirichletClient,
    DirichletEqual,
    DirichletMin,
    Equal,
    FeatureNoise,
    Iid,
    Mixed,
    Natural,
    Noise,
    Pathological,
    Quantity,
    Shards,
    Unbalanced,
    dirichlet_cuts,
    equal_sizes,
    piece_sizes,
    rows_by_class,
    rows_by_owner,
    uneven_range,
    without_full,
)
from fldist.data.task import Task
from fldist.models.mlp import Mlp
from fldist.models.train import LocalTraining


def labels_of(counts, seed=0):
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(seed).permutation(labels)


def assert_no_row_twice(parts, n):
    rows = np.concatenate(parts).tolist()
    assert len(rows) == len(set(rows))
    assert set(rows) <= set(range(n))
    for part in parts:
        assert part.dtype == np.int64
        assert np.all(np.diff(part) > 0)  # ascending


def assert_every_row_once(parts, n):
    assert_no_row_twice(parts, n)
    assert sum(len(part) for part in parts) == n


def table(parts, labels):
    """How many rows [K, C] of each class each client holds."""
    return np.array([[int((labels[part] == c).sum()) for c in np.unique(labels)] for part in parts])


def as_lists(parts):
    return [part.tolist() for part in parts]


def rows_of(labels, c):
    return np.array([row for row in range(len(labels)) if labels[row] == c])


def nearly_equal(rows, parts):
    """Consecutive parts, the first ones one longer."""
    made, start = [], 0
    for part in range(parts):
        stop = start + len(rows) // parts + (1 if part < len(rows) % parts else 0)
        made.append([int(row) for row in rows[start:stop]])
        start = stop
    return made


def cut(rows, q):
    """The pieces between floor(cumsum(q) n), the last one with the rest."""
    made, start, total = [], 0, 0.0
    for client, share in enumerate(q):
        total += share
        stop = len(rows) if client == len(q) - 1 else math.floor(total * len(rows) + 1e-9)
        made.append([int(row) for row in rows[start:stop]])
        start = stop
    return made


class Scripted:
    """A generator whose Dirichlet and uniform draws are given; permutations leave everything as it is."""

    def __init__(self, *shares, uniform=()):
        self.shares, self.uniforms, self.asked = list(shares), list(uniform), []

    def permutation(self, rows):
        return np.arange(rows) if isinstance(rows, int) else np.array(rows)

    def dirichlet(self, alpha):
        self.asked.append(len(alpha))
        drawn = np.array(self.shares.pop(0) if len(self.shares) > 1 else self.shares[0], dtype=float)
        assert len(drawn) == len(alpha)
        return drawn

    def uniform(self, size):
        return np.array([self.uniforms.pop(0) for _ in range(size)])


class NoDraws:
    """What is refused at once is refused before anything is drawn."""


# ---- iid
@pytest.mark.parametrize(
    ("n", "num_clients", "sizes"),
    [(23, 4, [6, 6, 6, 5]), (20, 4, [5, 5, 5, 5]), (3, 5, [1, 1, 1, 0, 0]), (7, 1, [7])],
)
def test_iid_parts_are_nearly_equal_the_first_ones_longer(n, num_clients, sizes):
    parts = Iid().split(np.zeros(n, dtype=np.int64), num_clients, np.random.default_rng(0))
    assert [len(p) for p in parts] == sizes
    assert_every_row_once(parts, n)


def test_iid_is_consecutive_parts_of_a_permutation():
    parts = Iid().split(np.zeros(23, dtype=np.int64), 4, np.random.default_rng(5))
    order = np.random.default_rng(5).permutation(23)
    for part, (start, stop) in zip(parts, [(0, 6), (6, 12), (12, 18), (18, 23)], strict=True):
        assert part.tolist() == sorted(order[start:stop].tolist())


# ---- dirichlet
@settings(max_examples=40, deadline=None, database=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    num_clients=st.integers(1, 12),
    alpha=st.sampled_from([1e-3, 0.05, 0.5, 10.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_dirichlet_gives_every_row_to_one_client(counts, num_clients, alpha, seed):
    labels = labels_of(counts)
    parts = Dirichlet(alpha).split(labels, num_clients, np.random.default_rng(seed))
    assert len(parts) == num_clients
    assert_every_row_once(parts, len(labels))


def test_dirichlet_equals_the_formula_for_the_same_draws():
    labels, num_clients, alpha = labels_of([30, 1, 17, 52]), 6, 0.4
    parts = Dirichlet(alpha).split(labels, num_clients, np.random.default_rng(9))
    rng = np.random.default_rng(9)
    expected = [[] for _ in range(num_clients)]
    for label in range(4):
        rows = rng.permutation(np.flatnonzero(labels == label))
        q = rng.dirichlet([alpha] * num_clients)
        start = 0
        for client in range(num_clients):
            stop = len(rows) if client == num_clients - 1 else int(np.floor(q[: client + 1].sum() * len(rows) + 1e-9))
            expected[client] += rows[start:stop].tolist()
            start = stop
    assert [p.tolist() for p in parts] == [sorted(e) for e in expected]


def test_a_huge_alpha_gives_nearly_equal_shares_of_every_class():
    counts, num_clients = [103, 50, 205], 5
    labels = labels_of(counts)
    parts = Dirichlet(1e8).split(labels, num_clients, np.random.default_rng(1))
    for part in parts:
        for label, count in enumerate(counts):
            assert abs(int((labels[part] == label).sum()) - count / num_clients) <= 1.01


def test_a_small_alpha_is_skewed_and_may_leave_clients_without_rows():
    labels = labels_of([100] * 3)
    parts = Dirichlet(0.01).split(labels, 20, np.random.default_rng(2))
    sizes = [len(p) for p in parts]
    assert min(sizes) == 0
    assert max(sizes) >= 90
    assert_every_row_once(parts, 300)


def test_cuts_are_floors_of_the_cumulated_shares():
    assert dirichlet_cuts(np.array([0.25, 0.3, 0.45]), 10).tolist() == [2, 5]
    assert dirichlet_cuts(np.array([0.999, 0.0005, 0.0005]), 100).tolist() == [99, 99]
    assert dirichlet_cuts(np.array([1.0]), 10).tolist() == []


def test_a_cut_does_not_lose_a_row_to_binary_fractions():
    q = np.full(10, 0.1)
    assert np.floor(np.cumsum(q)[:-1] * 10).tolist() != list(range(1, 10))  # what plain flooring would do
    assert dirichlet_cuts(q, 10).tolist() == list(range(1, 10))


def test_who_has_no_share_gets_no_row():
    q = np.array([0.1] * 10 + [0.0])
    assert math.floor(np.cumsum(q)[9] * 10**8 + 1e-9) == 10**8 - 1  # what rounding would leave for the last
    assert piece_sizes(dirichlet_cuts(q, 10**8), 10**8)[10] == 0
    assert dirichlet_cuts(np.array([0.0, 1.0, 0.0, 0.0]), 7).tolist() == [0, 7, 7]


def test_piece_sizes():
    assert piece_sizes(np.array([2, 5, 5]), 9).tolist() == [2, 3, 0, 4]
    assert piece_sizes(np.array([], dtype=np.int64), 9).tolist() == [9]


# ---- steps
def test_rows_by_class_are_ascending_and_classes_those_that_occur():
    labels = np.array([7, 3, 7, 7, 0, 3])
    assert as_lists(rows_by_class(labels)) == [[4], [1, 5], [0, 2, 3]]
    assert rows_by_class(labels[:0]) == []


@pytest.mark.parametrize(("total", "parts"), [(10, 3), (2, 5), (0, 4), (12, 4), (7, 1)])
def test_equal_sizes(total, parts):
    assert equal_sizes(total, parts).tolist() == [len(part) for part in nearly_equal(list(range(total)), parts)]


# ---- unbalanced
@pytest.mark.parametrize(("n", "num_clients", "low", "high"), [(103, 4, 0.95, 0.99), (57, 7, 0.2, 0.9), (3, 5, 0.5, 1)])
def test_unbalanced_keeps_the_first_part_of_each_part(n, num_clients, low, high):
    parts = Unbalanced(low, high).split(np.zeros(n, dtype=np.int64), num_clients, np.random.default_rng(4))
    rng = np.random.default_rng(4)
    drawn = nearly_equal(rng.permutation(n), num_clients)
    kept = rng.uniform(low, high, num_clients)
    expected = [sorted(part[: int(len(part) * u)]) for part, u in zip(drawn, kept, strict=True)]
    assert as_lists(parts) == expected
    assert_no_row_twice(parts, n)


def test_unbalanced_sizes_are_truncated_and_its_limits_ordered():
    labels = np.zeros(30, dtype=np.int64)
    parts = Unbalanced(0.75, 0.75).split(labels, 3, np.random.default_rng(0))
    assert [len(part) for part in parts] == [7, 7, 7]  # 7.5
    defaults = Unbalanced().split(np.zeros(10**4, dtype=np.int64), 10, np.random.default_rng(0))
    assert all(950 <= len(part) < 990 for part in defaults)
    with pytest.raises(ValueError, match=r"^task\.partition\.low: 0\.9 is above high \(0\.5\); lower it"):
        Unbalanced(0.9, 0.5).split(labels, 3, NoDraws())


# ---- equal
@pytest.mark.parametrize(("n", "num_clients", "size"), [(50, 4, 7), (28, 4, 7), (9, 1, 9), (9, 9, 1)])
def test_equal_deals_out_a_permutation(n, num_clients, size):
    parts = Equal(size).split(np.zeros(n, dtype=np.int64), num_clients, np.random.default_rng(3))
    order = np.random.default_rng(3).permutation(n)
    expected = [sorted(int(order[client + num_clients * j]) for j in range(size)) for client in range(num_clients)]
    assert as_lists(parts) == expected
    assert_no_row_twice(parts, n)


def test_equal_refuses_to_repeat_rows():
    message = (
        r"^task\.partition\.size: 8 rows for each of 4 clients are 32, but there are 31; lower size or "
        r"clients\.num_clients$"
    )
    with pytest.raises(ValueError, match=message):
        Equal(8).split(np.zeros(31, dtype=np.int64), 4, NoDraws())


# ---- quantity
def quantity_by_hand(n, num_clients, alpha, min_size, rng):
    order, draws = rng.permutation(n), 0
    while True:
        q, draws = rng.dirichlet([alpha] * num_clients), draws + 1
        if n * min(q) >= min_size:
            return [sorted(part) for part in cut(order, q)], draws


@pytest.mark.parametrize(
    ("n", "num_clients", "alpha", "min_size"),
    [(500, 5, 0.5, 10), (200, 6, 0.7, 10), (300, 10, 2.0, 7), (40, 1, 0.5, 10), (90, 3, 0.05, 0)],
)
def test_quantity_equals_the_law_for_the_same_draws(n, num_clients, alpha, min_size):
    draws = 0
    for seed in range(5):
        parts = Quantity(alpha, min_size).split(np.zeros(n, dtype=np.int64), num_clients, np.random.default_rng(seed))
        expected, drawn = quantity_by_hand(n, num_clients, alpha, min_size, np.random.default_rng(seed))
        assert as_lists(parts) == expected
        assert_every_row_once(parts, n)
        assert min(len(part) for part in parts) >= min_size
        draws += drawn
    if min_size > 0 and num_clients > 1:
        assert draws > 5  # some were refused


def test_quantity_takes_a_draw_that_just_meets_the_minimum():
    labels = np.zeros(8, dtype=np.int64)
    parts = Quantity(min_size=2).split(labels, 3, Scripted([0.25, 0.375, 0.375], [0.5, 0.25, 0.25]))
    assert as_lists(parts) == [[0, 1], [2, 3, 4], [5, 6, 7]]
    parts = Quantity(min_size=2).split(labels, 3, Scripted([0.24, 0.38, 0.38], [0.5, 0.25, 0.25]))
    assert as_lists(parts) == [[0, 1, 2, 3], [4, 5], [6, 7]]


def test_quantity_gives_up_after_its_attempts():
    rng = Scripted([0.1, 0.9], [0.37, 0.63], [0.2, 0.8])
    message = (
        r"^task\.partition: quantity \(alpha 0\.5, min_size 4\) found no split of 10 rows among 2 clients in 5 "
        r"attempts; the best one left its smallest client 3 rows\. Raise alpha, lower min_size or "
        r"clients\.num_clients, or use iid$"
    )
    with pytest.raises(ValueError, match=message):
        Quantity(0.5, 4, attempts=5).split(np.zeros(10, dtype=np.int64), 2, rng)
    assert len(rng.asked) == 5


@pytest.mark.parametrize(
    ("partition", "instead"),
    [(Quantity(0.5, 11), "iid"), (DirichletMin(0.5, 11), "dirichlet")],
)
def test_a_minimum_that_cannot_be_is_refused_at_once(partition, instead):
    message = (
        r"^task\.partition\.min_size: 11 rows for each of 3 clients are 33, but there are 32; lower min_size or "
        rf"clients\.num_clients, or use {instead}, which allows empty clients$"
    )
    with pytest.raises(ValueError, match=message):
        partition.split(np.zeros(32, dtype=np.int64), 3, NoDraws())
    parts = partition.split(np.zeros(33, dtype=np.int64), 3, Scripted(np.full(3, 1 / 3)))
    assert [len(part) for part in parts] == [11, 11, 11]


# ---- feature noise
def test_feature_noise_splits_as_iid():
    labels = labels_of([20, 31])
    parts = FeatureNoise(0.3, "cell").split(labels, 4, np.random.default_rng(8))
    assert as_lists(parts) == as_lists(Iid().split(labels, 4, np.random.default_rng(8)))


def test_noise_grows_from_client_to_client():
    noisy = FeatureNoise(0.4)
    assert [noisy.noise_of(client, 5) for client in range(5)] == [
        Noise(std, None) for std in (0.0, 0.1, 0.2, pytest.approx(0.3), 0.4)
    ]
    assert noisy.noise_of(0, 1) == Noise(0.0, None)


def test_noise_in_one_cell():
    noisy = FeatureNoise(0.4, "cell")
    assert [noisy.noise_of(client, 5).cell for client in range(5)] == [
        (0, 0, 3),
        (0, 1, 3),
        (0, 2, 3),
        (1, 0, 3),
        (1, 1, 3),
    ]
    for num_clients in range(1, 120):
        side = math.ceil(math.sqrt(num_clients))
        cells = [noisy.noise_of(client, num_clients) for client in range(num_clients)]
        assert cells == [Noise(0.4, (client // side, client % side, side)) for client in range(num_clients)]
        assert all(max(row, column) < side for row, column, _ in (noise.cell for noise in cells))
        assert len(set(cells)) == num_clients


# ---- dirichlet_min
def dirichlet_min_by_hand(labels, num_clients, alpha, min_size, balanced, rng):
    n, attempts, redraws = len(labels), 0, 0
    while True:
        attempts += 1
        held = [[] for _ in range(num_clients)]
        for c in sorted(set(labels.tolist())):
            rows = rng.permutation(rows_of(labels, c))
            while True:
                q = rng.dirichlet([alpha] * num_clients)
                if not balanced:
                    break
                q = np.array([0.0 if len(held[i]) >= n / num_clients else q[i] for i in range(num_clients)])
                if q.sum() > 0:
                    q = q / q.sum()
                    break
                redraws += 1
            for mine, piece in zip(held, cut(rows, q), strict=True):
                mine += piece
        if min(len(mine) for mine in held) >= min_size:
            return [sorted(mine) for mine in held], attempts, redraws


@pytest.mark.parametrize(
    ("counts", "num_clients", "alpha", "min_size", "balanced"),
    [
        ([40, 31, 29, 50], 5, 0.5, 10, True),
        ([40, 31, 29, 50], 5, 0.2, 12, True),
        ([20] * 10, 8, 0.1, 5, True),
        ([20] * 10, 4, 1e-3, 40, True),
        ([20] * 10, 5, 0.3, 20, False),
        ([30, 30], 4, 0.5, 2, False),
        ([25, 25], 1, 0.5, 10, True),
        ([64], 4, 1.0, 5, True),
    ],
)
def test_dirichlet_min_equals_the_law_for_the_same_draws(counts, num_clients, alpha, min_size, balanced):
    labels = labels_of(counts) * 3 + 2  # classes need not be 0 ... C-1
    again = redrawn = 0
    for seed in range(8):
        partition = DirichletMin(alpha, min_size, balanced=balanced)
        parts = partition.split(labels, num_clients, np.random.default_rng(seed))
        expected, attempts, redraws = dirichlet_min_by_hand(
            labels, num_clients, alpha, min_size, balanced, np.random.default_rng(seed)
        )
        assert as_lists(parts) == expected
        assert_every_row_once(parts, len(labels))
        assert min(len(part) for part in parts) >= min_size
        again, redrawn = again + attempts - 1, redrawn + redraws
    if num_clients > 1:
        assert again > 0
    if alpha == 1e-3:
        assert redrawn > 0


@settings(max_examples=60, deadline=None, database=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    num_clients=st.integers(1, 12),
    alpha=st.sampled_from([1e-5, 1e-3, 0.05, 0.5, 10.0, 1e6]),
    min_size=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_a_client_with_its_share_gets_no_further_class(counts, num_clients, alpha, min_size, seed):
    labels = labels_of(counts)
    try:
        parts = DirichletMin(alpha, min_size, attempts=50).split(labels, num_clients, np.random.default_rng(seed))
    except ValueError as error:
        assert min_size > 0 or "left its smallest client 0 rows" in str(error)
        assume(False)
    assert_every_row_once(parts, len(labels))
    assert min(len(part) for part in parts) >= min_size
    got = table(parts, labels)
    for c in range(1, len(counts)):
        full = got[:, :c].sum(axis=1) >= len(labels) / num_clients
        assert not got[full, c].any()


def test_a_client_with_exactly_its_share_is_full():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    parts = DirichletMin(min_size=4).split(labels, 2, Scripted([1, 0], [0.5, 0.5]))
    assert as_lists(parts) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert without_full(np.array([0.2, 0.3, 0.5]), np.array([3, 2, 4]), 8).tolist() == [0, 0.3, 0]
    assert without_full(np.array([0.2, 0.3, 0.5]), np.array([3, 2, 4]), 9).tolist() == [0, 0.3, 0]
    assert without_full(np.array([0.2, 0.3, 0.5]), np.array([3, 2, 4]), 10).tolist() == [0.2, 0.3, 0]


def test_shares_are_normalised_after_the_full_clients_have_gone():
    labels = np.array([0] * 4 + [1] * 8)
    parts = DirichletMin(min_size=2).split(labels, 3, Scripted([1, 0, 0], [0.5, 0.125, 0.375]))
    assert [len(part) for part in parts] == [4, 2, 6]


def test_shares_without_sum_are_drawn_again():
    labels = np.array([0] * 4 + [1] * 4)
    rng = Scripted([1, 0], [1, 0], [1, 0], [0.25, 0.75])
    parts = DirichletMin(min_size=1).split(labels, 2, rng)
    assert as_lists(parts) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(rng.asked) == 4


def test_dirichlet_min_gives_up_after_its_attempts():
    labels = np.array([0] * 6 + [1] * 4)
    rng = Scripted([1, 0])
    with pytest.raises(ValueError, match="in 5 attempts; the best one left its smallest client 0 rows"):
        DirichletMin(0.5, 1, attempts=5, balanced=False).split(labels, 2, rng)
    assert len(rng.asked) == 5 * 2
    rng = Scripted([1, 0])
    with pytest.raises(ValueError, match="in 3 attempts; the best one left its smallest client 0 rows"):
        DirichletMin(0.5, 1, attempts=3).split(labels, 2, rng)
    assert len(rng.asked) == 3 * (1 + 3)  # client 0 is full after the first class: no share left for the second
    rng = Scripted([0.9, 0.1], [0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [1, 0], [0.25, 0.75])
    message = (
        r"^task\.partition: dirichlet_min \(alpha 0\.01, min_size 5\) found no split of 11 rows among 2 clients in 3 "
        r"attempts; the best one left its smallest client 4 rows\. Raise alpha, lower min_size or "
        r"clients\.num_clients, or use dirichlet, which allows empty clients$"
    )
    with pytest.raises(ValueError, match=message):  # 9 and 2; 7 and 4; 8 and 3 rows
        DirichletMin(0.01, 5, attempts=3, balanced=False).split(np.array([0] * 7 + [1] * 4), 2, rng)


def test_dirichlet_min_with_a_huge_alpha_gives_nearly_equal_shares():
    counts = [103, 50, 205]
    labels = labels_of(counts)
    got = table(DirichletMin(1e8).split(labels, 5, np.random.default_rng(1)), labels)
    assert np.all(abs(got - np.array(counts) / 5) <= 1.01)


# ---- dirichlet_equal
@pytest.mark.parametrize(("counts", "num_clients", "size"), [([20, 30, 10], 4, 7), ([5, 5], 2, 5), ([9], 3, 2)])
def test_dirichlet_equal_takes_rows_by_their_clocks(counts, num_clients, size):
    labels = labels_of(counts)
    parts = DirichletEqual(size, alpha=0.4).split(labels, num_clients, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    left = [rng.permutation(rows).tolist() for rows in rows_by_class(labels)]
    for part in parts:
        p = rng.dirichlet([0.4] * len(counts))
        spans = rng.exponential(size=(len(counts), size))
        clocks = []
        for c, rows in enumerate(left):
            now = 0.0
            for j in range(min(size, len(rows))):
                now += spans[c, j] / ((len(rows) - j) * p[c])
                clocks.append((now, c))
        taken = []
        for _, c in sorted(clocks)[:size]:
            taken.append(left[c].pop(0))
        assert part.tolist() == sorted(taken)
    assert_no_row_twice(parts, len(labels))


def test_dirichlet_equal_follows_its_mixtures():
    """Of a class with share p among plenty of rows a client has about p size rows."""
    labels = labels_of([5000] * 4)
    parts = DirichletEqual(200, alpha=0.5).split(labels, 3, np.random.default_rng(2))
    rng = np.random.default_rng(2)
    for _ in range(4):
        rng.permutation(5000)
    for part in parts:
        p = rng.dirichlet([0.5] * 4)
        rng.exponential(size=(4, 200))
        assert np.bincount(labels[part], minlength=4) / 200 == pytest.approx(p, abs=0.12)
    few = DirichletEqual(5, alpha=1e-3).split(labels_of([5, 5]), 2, np.random.default_rng(0))  # mixtures of one class
    assert sorted(len(part) for part in few) == [5, 5]
    with pytest.raises(
        ValueError, match=r"^task\.partition\.size: 6 rows for each of 2 clients are 12, but there are 10"
    ):
        DirichletEqual(6).split(labels_of([5, 5]), 2, NoDraws())


# ---- dirichlet_client
def dirichlet_client_by_hand(labels, num_clients, alpha, rng):
    names = sorted(set(labels.tolist()))
    lists = {c: rng.permutation(rows_of(labels, c)).tolist() for c in names}
    ideal, parts, redraws = len(labels) // num_clients, [], 0
    for _ in range(num_clients):
        remaining = [c for c in names if lists[c]]
        p = rng.dirichlet([alpha] * len(remaining))
        wanted = {c: int(share * ideal + 1e-9) for c, share in zip(remaining, p, strict=True)}
        while any(wanted[c] > len(lists[c]) for c in wanted):
            redraws += 1
            support = [c for c in remaining if wanted.get(c, 0) <= len(lists[c])]
            p = rng.dirichlet([alpha] * len(support))
            factors = [rng.uniform() for _ in support]
            wanted = {c: int(share * ideal * u + 1e-9) for c, share, u in zip(support, p, factors, strict=True)}
        mine = []
        for c, count in wanted.items():
            mine += lists[c][:count]
            lists[c] = lists[c][count:]
        parts.append(sorted(mine))
    return parts, redraws


@pytest.mark.parametrize(
    ("counts", "num_clients", "alpha"),
    [
        ([40, 31, 29, 50], 5, 0.5),
        ([20] * 10, 8, 0.1),
        ([20] * 10, 4, 1e-3),
        ([3] * 10, 3, 0.3),
        ([5, 80, 5], 20, 1.0),
        ([50], 7, 0.5),
        ([9, 9, 9], 1, 0.5),
        ([2, 2], 4, 0.5),
    ],
)
def test_dirichlet_client_equals_the_law_for_the_same_draws(counts, num_clients, alpha):
    labels = labels_of(counts) * 2 + 1
    redrawn = 0
    for seed in range(8):
        parts = DirichletClient(alpha).split(labels, num_clients, np.random.default_rng(seed))
        expected, redraws = dirichlet_client_by_hand(labels, num_clients, alpha, np.random.default_rng(seed))
        assert as_lists(parts) == expected
        assert_no_row_twice(parts, len(labels))
        assert max(len(part) for part in parts) <= len(labels) // num_clients
        redrawn += redraws
    if len(counts) > 2 and num_clients > 1:
        assert redrawn > 0


def test_one_class_is_dealt_out_in_ideal_portions():
    drawn = [np.random.default_rng(seed).dirichlet([0.5])[0] for seed in range(40)]
    assert {1.0, 1.0 - 2**-53} <= set(drawn)  # rounding must not cost a row
    for seed in range(40):
        parts = DirichletClient(0.5).split(np.zeros(23, dtype=np.int64), 4, np.random.default_rng(seed))
        assert [len(part) for part in parts] == [5, 5, 5, 5]


def test_only_the_classes_short_in_the_last_draw_are_left_out():
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])  # ideal 10 for one client
    rng = Scripted([0.4, 0.3, 0.3], [0.4, 0.6], [1.0], uniform=[1.0, 1.0, 0.25])
    parts = DirichletClient().split(labels, 1, rng)
    assert rng.asked == [3, 2, 1]  # 4 of class 0 are too many; then 4 of class 1 and 6 of class 2; class 0 is back
    assert as_lists(parts) == [[0, 1]]  # 2.5


def test_exactly_what_is_left_is_not_short():
    labels = np.array([0, 0, 0, 1, 1, 1])
    rng = Scripted([1.0, 0.0], [1.0])
    assert as_lists(DirichletClient().split(labels, 2, rng)) == [[0, 1, 2], [3, 4, 5]]
    assert rng.asked == [2, 1]  # class 0 is exhausted, hence not in the second support


def test_dirichlet_client_gives_up_after_its_attempts():
    labels = np.repeat(np.arange(4), 3)  # ideal 12
    rng = Scripted([0.4, 0.2, 0.2, 0.2], [0.4, 0.3, 0.3], [0.4, 0.3, 0.3], uniform=[1.0] * 9)
    message = (
        r"^task\.partition: dirichlet_client \(alpha 0\.5, attempts 4\) found no mixture of the rows left for client 0 "
        r"of 1 \(12 rows\); raise alpha or attempts, lower clients\.num_clients, or use dirichlet$"
    )
    with pytest.raises(ValueError, match=message):
        DirichletClient(attempts=4).split(labels, 1, rng)
    assert rng.asked == [4, 3, 3, 3]


# ---- classes
def classes_by_hand(labels, num_clients, per_client, rng):
    names = sorted(set(labels.tolist()))
    contain = []
    for client in range(num_clients):
        first = names[client % len(names)]
        others = [c for c in names if c != first]
        contain.append([first, *(others[j] for j in rng.choice(len(others), per_client - 1, replace=False))])
    parts = [[] for _ in range(num_clients)]
    for c in names:
        holders = [client for client in range(num_clients) if c in contain[client]]
        if holders:
            pieces = nearly_equal(rng.permutation(rows_of(labels, c)), len(holders))
            for client, piece in zip(holders, pieces, strict=True):
                parts[client] += piece
    return [sorted(part) for part in parts], contain


@pytest.mark.parametrize(
    ("counts", "num_clients", "per_client"),
    [
        ([40, 31, 29, 50], 6, 2),
        ([40, 31, 29, 50], 6, 1),
        ([20] * 10, 25, 3),
        ([23, 17, 20], 5, 3),
        ([20] * 10, 2, 3),
        ([30], 4, 1),
        ([9, 9, 9], 1, 2),
    ],
)
def test_classes_equal_the_law_for_the_same_draws(counts, num_clients, per_client):
    labels = labels_of(counts) * 2 + 5
    for seed in range(5):
        parts = Classes(per_client).split(labels, num_clients, np.random.default_rng(seed))
        expected, contain = classes_by_hand(labels, num_clients, per_client, np.random.default_rng(seed))
        assert as_lists(parts) == expected
        assert_no_row_twice(parts, len(labels))
        for part, wanted in zip(parts, contain, strict=True):
            assert set(labels[part].tolist()) == set(wanted)
            assert len(set(wanted)) == per_client
        held = set().union(*contain)
        assert sum(len(part) for part in parts) == sum(int(c in held) for c in labels.tolist())


def test_further_classes_are_drawn_uniformly():
    labels = np.repeat(np.arange(4), 900)
    got = table(Classes(2).split(labels, 1200, np.random.default_rng(0)), labels) > 0
    for first in range(4):
        second = got[first::4].sum(axis=0)
        assert second[first] == 300
        assert all(70 <= second[c] <= 130 for c in range(4) if c != first)


def test_all_classes_for_everyone_splits_every_class_evenly():
    labels = labels_of([23, 17, 20])
    got = table(Classes(3).split(labels, 5, np.random.default_rng(0)), labels)
    assert got.tolist() == [[5, 4, 4], [5, 4, 4], [5, 3, 4], [4, 3, 4], [4, 3, 4]]


@pytest.mark.parametrize("kind", [Classes, Pathological])
def test_more_classes_a_client_than_there_are(kind):
    labels = labels_of([10, 10, 10])
    message = (
        r"^task\.partition\.per_client: a client cannot hold 4 classes, for the training rows have 3; lower it to "
        "at most 3$"
    )
    with pytest.raises(ValueError, match=message):
        kind(4).split(labels, 2, NoDraws())


# ---- mixed
def mixed_by_hand(labels, num_clients, alpha, min_size, rng):
    """The split, who holds what, and how often the holders and the whole were drawn."""
    names = sorted(set(labels.tolist()))
    most = math.ceil(2 * num_clients / len(names))
    draws = dead_ends = 0
    while True:
        draws += 1
        contain = [[names[client % len(names)]] for client in range(num_clients)]
        for held in contain:
            count = {c: sum(c in other for other in contain) for c in names}
            others = [c for c in names if count[c] < most and c not in held]
            if not others:
                dead_ends += 1
                break
            held.append(int(rng.choice(others)))
        else:
            parts = [[] for _ in range(num_clients)]
            for c in names:
                holders = [client for client in range(num_clients) if c in contain[client]]
                if holders:
                    shuffled = rng.permutation(rows_of(labels, c))
                    for client, piece in zip(
                        holders, cut(shuffled, rng.dirichlet([alpha] * len(holders))), strict=True
                    ):
                        parts[client] += piece
            if min(map(len, parts)) >= min_size:
                return [sorted(part) for part in parts], contain, draws, dead_ends


@pytest.mark.parametrize(
    ("counts", "num_clients", "alpha", "min_size"),
    [
        ([40, 31, 29, 50], 4, 0.5, 10),
        ([40, 31, 29, 50], 7, 1.0, 5),
        ([20] * 10, 10, 0.3, 2),
        ([20] * 10, 3, 0.5, 10),
        ([23, 17], 1, 0.5, 10),
        ([30, 30, 30], 12, 5.0, 0),
    ],
)
def test_mixed_equals_the_law_for_the_same_draws(counts, num_clients, alpha, min_size):
    labels = labels_of(counts) * 2 + 5
    for seed in range(8):
        parts = Mixed(alpha, min_size).split(labels, num_clients, np.random.default_rng(seed))
        expected, contain, _, _ = mixed_by_hand(labels, num_clients, alpha, min_size, np.random.default_rng(seed))
        assert as_lists(parts) == expected
        assert_no_row_twice(parts, len(labels))
        assert min(map(len, parts)) >= min_size
        held = set().union(*contain)
        assert sum(len(part) for part in parts) == sum(int(c in held) for c in labels.tolist())


def test_mixed_has_two_classes_a_client_and_two_clients_a_class():
    labels = np.repeat(np.arange(10), 500)
    for seed in range(20):
        got = table(Mixed(5.0).split(labels, 10, np.random.default_rng(seed)), labels) > 0
        assert got.sum(axis=0).tolist() == got.sum(axis=1).tolist() == [2] * 10
        assert got.diagonal().all()


def test_mixed_draws_again_where_a_client_finds_no_second_class():
    """Of three clients and three classes, the last client may be left with its own class alone."""
    labels, dead_ends = labels_of([30, 30, 30]), 0
    for seed in range(30):
        expected, contain, draws, missed = mixed_by_hand(labels, 3, 50.0, 1, np.random.default_rng(seed))
        assert as_lists(Mixed(50.0, 1).split(labels, 3, np.random.default_rng(seed))) == expected
        assert [len(set(held)) for held in contain] == [2] * 3
        assert draws - missed == 1
        dead_ends += missed
    assert dead_ends > 0


def test_mixed_gives_up_after_its_attempts():
    labels = labels_of([10, 10])
    with pytest.raises(
        ValueError,
        match=r"^task\.partition: mixed \(alpha 0\.001, min_size 9\) found no split of 20 rows among 2 clients in 3 "
        r"attempts; the best one left its smallest client 0 rows\. Raise alpha, lower min_size or "
        r"clients\.num_clients, or use classes$",
    ):
        Mixed(0.001, 9, 3).split(labels, 2, BothToOne())


class BothToOne:
    """A generator that gives everything to the first holder."""

    def permutation(self, rows):
        return np.array(rows)

    def dirichlet(self, alpha):
        return np.eye(len(alpha))[0]

    def choice(self, values):
        return values[0]


def test_mixed_needs_two_classes():
    message = r"^task\.partition: mixed gives every client two classes, and the training rows have 1; use quantity$"
    with pytest.raises(ValueError, match=message):
        Mixed().split(labels_of([90]), 3, NoDraws())


# ---- shards
def shards_by_hand(labels, num_clients, per_client, rng):
    names = sorted(set(labels.tolist()))
    total = num_clients * per_client
    shards = {}
    for position, c in enumerate(names):
        count = total // len(names) + (1 if position < total % len(names) else 0)
        shards[c] = nearly_equal(rng.permutation(rows_of(labels, c)), count) if count else []
    parts, chosen, fallbacks = [], [], 0
    for _ in range(num_clients):
        some = [c for c in names if shards[c]]
        if len(some) >= per_client:
            drawn = [(int(c), None) for c in rng.choice(some, per_client, replace=False)]
        else:
            drawn, fallbacks = [(None, None)] * per_client, fallbacks + 1
        mine, classes = [], []
        for c, _ in drawn:
            if c is None:
                c = int(rng.choice([c for c in names if shards[c]]))
            mine += shards[c].pop(rng.integers(len(shards[c])))
            classes.append(c)
        parts.append(sorted(mine))
        chosen.append(classes)
    return parts, chosen, fallbacks, shards


@pytest.mark.parametrize(
    ("counts", "num_clients", "per_client"),
    [
        ([60] * 10, 10, 2),
        ([60] * 4, 5, 3),  # 15 shards of 4 classes: 4, 4, 4 and 3
        ([61, 47, 80], 7, 2),
        ([60] * 3, 4, 3),
        ([60] * 3, 3, 5),  # more shards a client than classes
        ([40] * 10, 3, 2),  # more classes than shards
        ([60], 5, 2),
        ([30, 30], 1, 1),
    ],
)
def test_shards_equal_the_law_for_the_same_draws(counts, num_clients, per_client):
    labels = labels_of(counts) * 2 + 1
    for seed in range(6):
        parts = Shards(per_client).split(labels, num_clients, np.random.default_rng(seed))
        expected, chosen, fallbacks, left = shards_by_hand(labels, num_clients, per_client, np.random.default_rng(seed))
        assert as_lists(parts) == expected
        assert_no_row_twice(parts, len(labels))
        assert not any(left.values())  # every client got its shards, and none is left
        assert all(len(classes) == per_client for classes in chosen)
        assert sum(len(set(classes)) < per_client for classes in chosen) <= fallbacks
        if num_clients * per_client >= len(counts):
            assert_every_row_once(parts, len(labels))


def test_shards_run_out_unevenly_in_some_draws():
    labels = labels_of([60] * 4)
    seen = [shards_by_hand(labels, 5, 3, np.random.default_rng(seed))[2] for seed in range(6)]
    assert sum(seen) > 0


@settings(max_examples=40, deadline=None, database=None)
@given(
    num_classes=st.integers(1, 7),
    num_clients=st.integers(1, 9),
    per_client=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_every_client_gets_all_its_shards(num_classes, num_clients, per_client, seed):
    counts = equal_sizes(num_clients * per_client, num_classes)
    labels = labels_of((counts * 7).tolist() if counts.min() > 0 else [7] * num_classes)
    parts = Shards(per_client).split(labels, num_clients, np.random.default_rng(seed))
    assert [len(part) for part in parts] == [7 * per_client] * num_clients
    assert_no_row_twice(parts, len(labels))


# ---- pathological
def pathological_by_hand(labels, num_clients, per_client, balanced, rng):
    names, n = sorted(set(labels.tolist())), len(labels)
    budget, parts = [per_client] * num_clients, [[] for _ in range(num_clients)]
    least = int(min(10 / (1 - 0.75), n / num_clients / 2))
    for c in names:
        rows = rows_of(labels, c)
        holders = [client for client in range(num_clients) if budget[client] > 0]
        holders = holders[: math.ceil(num_clients * per_client / len(names))]
        if not holders:
            continue
        a = len(rows) / len(holders)
        sizes = [int(a)] * (len(holders) - 1)
        if not balanced:
            fits = [x for x in range(len(rows) + 1) if max(a / 10, least / len(names)) <= x < a]
            if fits:
                sizes = [int(x) for x in rng.integers(fits[0], fits[-1], len(holders) - 1, endpoint=True)]
        start = 0
        for client, size in zip(holders, [*sizes, len(rows) - sum(sizes)], strict=True):
            parts[client] += rows[start : start + size].tolist()
            start += size
            budget[client] -= 1
    return [sorted(part) for part in parts]


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(
    ("counts", "num_clients", "per_client"),
    [
        ([60, 47, 80, 33, 51, 90, 44, 60, 71, 52], 20, 2),
        ([40, 31, 29, 50, 44], 6, 2),
        ([40, 31, 29, 50], 6, 4),
        ([101, 99], 3, 1),
        ([10, 9, 8, 7], 4, 3),
        ([30], 4, 1),
        ([9, 9, 9], 1, 2),
        ([500, 501], 7, 2),
        ([1000], 4, 1),  # least is 40, not n/K/2
        ([4, 4], 4, 2),  # no integer below a = 1: floor(a) rows
    ],
)
def test_pathological_equals_the_law_for_the_same_draws(counts, num_clients, per_client, balanced):
    labels = labels_of(counts) * 2 + 1
    for seed in range(3):
        parts = Pathological(per_client, balanced).split(labels, num_clients, np.random.default_rng(seed))
        expected = pathological_by_hand(labels, num_clients, per_client, balanced, np.random.default_rng(seed))
        assert as_lists(parts) == expected
        assert_no_row_twice(parts, len(labels))
        assert all(1 <= len(set(labels[part].tolist())) <= per_client for part in parts)


def test_pathological_by_hand_with_a_class_left_over():
    labels = np.repeat(np.arange(5), [9, 10, 11, 12, 13])
    parts = Pathological(2).split(labels, 6, NoDraws())
    assert table(parts, labels).tolist() == [
        [3, 3, 0, 0, 0],
        [3, 3, 0, 0, 0],
        [3, 4, 0, 0, 0],
        [0, 0, 3, 4, 0],
        [0, 0, 3, 4, 0],
        [0, 0, 5, 4, 0],
    ]
    assert parts[0].tolist() == [0, 1, 2, 9, 10, 11]
    assert parts[5].tolist() == [25, 26, 27, 28, 29, 38, 39, 40, 41]


def test_all_classes_for_everyone_is_the_balanced_split():
    labels = labels_of([23, 17, 20])
    got = table(Pathological(3).split(labels, 5, NoDraws()), labels)
    assert got.tolist() == [[4, 3, 4]] * 4 + [[7, 5, 4]]


def test_the_number_of_holders_is_not_rounded_in_binary_fractions():
    assert math.ceil(28 / 50 * 25) == 15  # the exact value is 14
    labels = np.repeat(np.arange(50), 28)
    got = table(Pathological(25).split(labels, 28, NoDraws()), labels)
    assert set((got > 0).sum(axis=0).tolist()) == {14}
    assert set((got > 0).sum(axis=1).tolist()) == {25}


@pytest.mark.parametrize(
    ("size", "holders", "least", "num_classes", "integers"),
    [
        (100, 4, 40, 10, range(4, 25)),  # least/C = 4 is more than a/10 = 2.5
        (100, 4, 10, 10, range(3, 25)),
        (101, 4, 10, 10, range(3, 26)),  # a = 25.25
        (100, 5, 20, 10, range(2, 20)),  # both limits whole: the lower belongs to it, the upper does not
        (41, 4, 41, 10, range(5, 11)),
        (4, 4, 0, 10, range(1, 1)),
        (3, 4, 1, 10, range(1, 1)),
        (20, 4, 40, 5, range(8, 5)),
    ],
)
def test_the_range_of_uneven_sizes(size, holders, least, num_classes, integers):
    low, high = uneven_range(size, holders, least, num_classes)
    assert range(low, high) == integers
    a = size / holders
    assert list(range(low, high)) == [x for x in range(size + 1) if max(a / 10, least / num_classes) <= x < a]


def test_uneven_sizes_reach_both_ends_of_their_range():
    labels = np.zeros(20, dtype=np.int64)  # two holders, a = 10, least 5: 5 ... 9 rows
    sizes = {len(Pathological(1, False).split(labels, 2, np.random.default_rng(seed))[0]) for seed in range(200)}
    assert sizes == {5, 6, 7, 8, 9}


# ---- all of them
EXAMPLES = {
    "iid": {},
    "unbalanced": {},
    "equal": {"size": 5},
    "quantity": {"min_size": 2},
    "feature_noise": {"noise": 0.2, "where": "cell"},
    "dirichlet": {"alpha": 0.3},
    "dirichlet_min": {"min_size": 2},
    "dirichlet_client": {"alpha": 0.3},
    "dirichlet_equal": {"size": 5, "alpha": 0.3},
    "classes": {"per_client": 2},
    "mixed": {"alpha": 2.0, "min_size": 2},
    "shards": {"per_client": 2},
    "pathological": {"per_client": 2, "balanced": False},
    "natural": {"choice": "random"},
}
LAWS = EXAMPLES.keys() - {"natural"}  # by labels


def made(name, **fields):
    return TypeAdapter(resolve.from_table(NAMES, name, "task.partition")).validate_python(fields)


def test_every_name_has_an_example():
    assert EXAMPLES.keys() == NAMES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_partition_is_a_function_of_labels_and_generator(name):
    labels = labels_of([20, 30, 10, 24] if name in LAWS else [9] * 20)
    copy, partition = labels.copy(), made(name, **EXAMPLES[name])
    split = [as_lists(partition.split(labels, 4, np.random.default_rng(s))) for s in (3, 3, 4)]
    assert split[0] == split[1]
    assert split[0] != split[2]
    assert np.array_equal(labels, copy)
    assert_no_row_twice(partition.split(labels, 4, np.random.default_rng(5)), len(labels))


@pytest.mark.parametrize("name", sorted(LAWS))
def test_one_client_of_all_rows_or_of_those_its_law_gives_it(name):
    labels = labels_of([20, 30])
    parts = made(name, **EXAMPLES[name]).split(labels, 1, np.random.default_rng(0))
    assert len(parts) == 1
    assert_no_row_twice(parts, 50)
    fewer = {"unbalanced": range(47, 50), "equal": [5], "dirichlet_equal": [5], "dirichlet_client": range(51)}
    assert len(parts[0]) in fewer.get(name, [50])


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_config_keys_with_limits(name):
    kind = resolve.from_table(NAMES, name, "task.partition")
    assert kind.__dataclass_params__.frozen
    assert made(name, **EXAMPLES[name]) == kind(**EXAMPLES[name])
    with pytest.raises(ValidationError, match="zzz"):
        made(name, **EXAMPLES[name], zzz=1)
    limits = {
        "alpha": [0, -1, math.inf, math.nan],
        "min_size": [-1, 1.5],
        "attempts": [0],
        "per_client": [0],
        "size": [0],
        "low": [-0.1, 1.1],
        "high": [-0.1, 1.1],
        "noise": [-0.1, math.inf],
        "where": ["some"],
        "balanced": [7],
        "choice": ["last"],
    }
    for field in dataclasses.fields(kind):
        for value in limits[field.name]:
            with pytest.raises(ValidationError, match=field.name):
                made(name, **{**EXAMPLES[name], field.name: value})


def test_defaults():
    assert (Unbalanced(), Quantity(), FeatureNoise()) == (
        Unbalanced(0.95, 0.99),
        Quantity(0.5, 10, 1000),
        FeatureNoise(0.1, "all"),
    )
    assert (DirichletMin(), DirichletClient()) == (DirichletMin(0.5, 10, 1000, True), DirichletClient(0.5, 1000))
    assert Mixed() == Mixed(0.5, 10, 1000)
    assert (Classes(), Shards(), Pathological()) == (Classes(2), Shards(2), Pathological(2, True))
    assert Natural() == Natural("first")
    with pytest.raises(ValidationError, match="size"):
        made("equal")


@pytest.mark.parametrize("name", ["iid", "unbalanced", "feature_noise", "dirichlet"])
def test_more_clients_than_rows_leaves_some_without(name):
    labels = labels_of([3, 2])
    parts = made(name, **EXAMPLES[name]).split(labels, 9, np.random.default_rng(0))
    assert len(parts) == 9
    assert_no_row_twice(parts, 5)
    if name != "unbalanced":  # floor(0.95 x 1) is 0
        assert_every_row_once(parts, 5)


@pytest.mark.parametrize("name", sorted(LAWS - {"iid", "unbalanced", "feature_noise", "dirichlet"}))
def test_more_clients_than_rows_is_refused_where_everyone_is_to_have_one(name):
    with pytest.raises(ValueError, match=r"^task\.partition.* 9 clients .* there are 8; lower .*clients\.num_clients"):
        made(name, **EXAMPLES[name]).split(labels_of([4, 4]), 9, NoDraws())


@pytest.mark.parametrize("name", sorted({"classes", "shards", "pathological"}))
def test_as_many_clients_as_rows(name):
    parts = made(name, per_client=1).split(labels_of([4, 4]), 8, np.random.default_rng(0))
    assert [len(part) for part in parts] == [1] * 8


def test_dirichlet_client_may_have_as_many_clients_as_rows():
    parts = DirichletClient().split(np.zeros(8, dtype=np.int64), 8, np.random.default_rng(0))
    assert [len(part) for part in parts] == [1] * 8


@pytest.mark.parametrize("name", ["classes", "shards", "pathological"])
def test_a_client_whose_classes_have_too_few_rows(name):
    labels = labels_of([1, 29])
    message = (
        rf"^task\.partition: {name} leaves client \d+ of 6 without a row, for its classes have too few rows; lower "
        r"clients\.num_clients$"
    )
    with pytest.raises(ValueError, match=message):
        made(name, per_client=1).split(labels, 6, np.random.default_rng(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_clients_take_no_time(name):
    labels = np.random.default_rng(0).integers(0, 100 if name in LAWS else 1200, 60_000)
    feasible = {"quantity": {"alpha": 5.0, "min_size": 1}, "mixed": {"alpha": 5.0}}
    start = time.perf_counter()
    made(name, **feasible.get(name, EXAMPLES[name])).split(labels, 1000, np.random.default_rng(1))
    assert time.perf_counter() - start < 5  # 0.2 s alone on a core


# ---- natural
def test_natural_gives_every_client_an_owners_rows():
    owner = np.array([5, 2, 2, 9, 5, 0, 9, 9])
    assert as_lists(Natural().split(owner, 4, NoDraws())) == [[5], [1, 2], [0, 4], [3, 6, 7]]
    assert as_lists(Natural().split(owner, 2, NoDraws())) == [[5], [1, 2]]
    assert as_lists(Natural().split(np.array([3, 3]), 1, NoDraws())) == [[0, 1]]


def test_natural_draws_owners_uniformly_and_keeps_their_order():
    owner, seen = labels_of([3, 1, 4, 2, 6]) * 10, np.zeros(5)
    for seed in range(200):
        parts = Natural("random").split(owner, 2, np.random.default_rng(seed))
        chosen = sorted(np.random.default_rng(seed).permutation([0, 10, 20, 30, 40])[:2])
        assert as_lists(parts) == [rows_of(owner, c).tolist() for c in chosen]
        seen[np.array(chosen) // 10] += 1
    assert np.all(abs(seen - 80) < 28)  # four deviations of 6.9


def test_natural_refuses_more_clients_than_owners():
    message = (
        r"^clients\.num_clients: 4 clients cannot each be an owner of training rows, for there are 3; lower it to at "
        r"most 3$"
    )
    with pytest.raises(ValueError, match=message):
        Natural("random").split(labels_of([2, 1, 5]), 4, NoDraws())


def test_rows_by_owner():
    owner = np.array([4, -1, 7, 4, 0, 9])
    assert as_lists(rows_by_owner(owner, np.array([0, 4, 8]))) == [[4], [0, 3], []]
    assert as_lists(rows_by_owner(owner, np.array([0, 4, 9]))) == [[4], [0, 3], [5]]
    assert as_lists(rows_by_owner(owner[:0], np.array([0, 4]))) == [[], []]


def task_of(seed, partition_seed):
    labels = torch.from_numpy(labels_of([40, 30, 50]))
    images = torch.zeros(120, 1, 2, 2)
    return Task(
        dataset=Dataset(images, labels, images[:1], labels[:1], classes=3),
        partition=Dirichlet(0.5),
        num_clients=4,
        build=Mlp((3,)).build,
        local=LocalTraining(),
        seed=seed,
        partition_seed=partition_seed,
    )


def test_the_global_test_set_is_one_noisy_copy_for_every_client():
    labels = labels_of([40, 30, 50])
    images = torch.arange(120.0).view(120, 1, 1, 1).expand(120, 1, 20, 20) / 120
    task = Task(
        dataset=Dataset(images.contiguous(), labels, images[:50].contiguous(), labels[:50], classes=3),
        partition=FeatureNoise(0.6),
        num_clients=3,
        build=Mlp((3,)).build,
        local=LocalTraining(),
        seed=1,
        partition_seed=1,
    )
    batches = list(task.test_batches(20))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(y) == task.num_scored(0, "global") == 150
    assert y.tolist() == labels[:50].tolist() * 3
    noise = x - images[:50].repeat(3, 1, 1, 1)
    deviations = [part.std().item() for part in noise.split(50)]
    assert deviations[0] == 0
    assert deviations[1:] == pytest.approx([0.3, 0.6], rel=0.03)  # of 20,000 draws
    assert abs(noise.mean().item()) < 0.01
    again = torch.cat([part for part, _ in task.test_batches(20)])
    assert torch.equal(again, x)  # so that rounds compare


def test_the_partition_has_a_seed_of_its_own():
    one, other, third = task_of(1, 7), task_of(2, 7), task_of(1, 8)
    assert [p.tolist() for p in one.parts] == [p.tolist() for p in other.parts]
    assert [p.tolist() for p in one.parts] != [p.tolist() for p in third.parts]
    assert not one.init_params().equals(other.init_params())
    assert one.init_params().equals(third.init_params())
    assert sum(one.sizes) == one.num_train == 120
