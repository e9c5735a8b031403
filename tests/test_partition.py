"""Partitions: every row once, and by the documented formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fldist.data.datasets import Dataset
from fldist.data.partition import Dirichlet, Iid, dirichlet_cuts
from fldist.data.task import Task
from fldist.models.mlp import Mlp
from fldist.models.train import LocalTraining


def labels_of(counts, seed=0):
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(seed).permutation(labels)


def assert_every_row_once(parts, n):
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    for part in parts:
        assert part.dtype == np.int64
        assert np.all(np.diff(part) > 0)  # ascending


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


# ---- both
@pytest.mark.parametrize("partition", [Iid(), Dirichlet(0.5)])
def test_a_partition_is_a_function_of_labels_and_generator(partition):
    labels = labels_of([20, 30, 10])
    split = [[p.tolist() for p in partition.split(labels, 4, np.random.default_rng(s))] for s in (3, 3, 4)]
    assert split[0] == split[1]
    assert split[0] != split[2]


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


def test_the_partition_has_a_seed_of_its_own():
    one, other, third = task_of(1, 7), task_of(2, 7), task_of(1, 8)
    assert [p.tolist() for p in one.parts] == [p.tolist() for p in other.parts]
    assert [p.tolist() for p in one.parts] != [p.tolist() for p in third.parts]
    assert not one.init_params().equals(other.init_params())
    assert one.init_params().equals(third.init_params())
    assert sum(one.sizes) == one.num_train == 120
