"""Placement: which host does a client's work."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fldist.runtime.placement import Placement, balance

SIZES = [100, 30, 80, 5, 60, 60, 20, 45, 0, 10]
EVERYONE = range(len(SIZES))


def loads(placed, sizes, ranks):
    total = dict.fromkeys(ranks, 0)
    for client, rank in placed.items():
        total[rank] += sizes[client]
    return total


# ---- balance
def test_balance_by_hand():
    # largest first, each to the least loaded: 100 -> 1; 80 -> 2; 60 -> 2 (140); 30 -> 1 (130); 20 -> 1 (150)
    sizes = [100, 30, 80, 60, 20]
    assert balance(range(5), sizes, [1, 2]) == {0: 1, 2: 2, 3: 2, 1: 1, 4: 1}


def test_ties_go_to_the_lower_client_and_rank():
    assert balance(range(4), [5, 5, 5, 5], [3, 7]) == {0: 3, 1: 7, 2: 3, 3: 7}


def test_balance_counts_what_hosts_have_already():
    given_loads = {1: 50, 2: 0}
    assert balance([0, 1], [10, 10], [1, 2], given_loads) == {0: 2, 1: 2}
    assert given_loads == {1: 50, 2: 0}  # not changed


@settings(max_examples=60, deadline=None, database=None)
@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=30), num_hosts=st.integers(1, 5))
def test_loads_differ_by_no_more_than_the_largest_client(sizes, num_hosts):
    ranks = list(range(1, num_hosts + 1))
    placed = balance(range(len(sizes)), sizes, ranks)
    assert sorted(placed) == list(range(len(sizes)))
    load = loads(placed, sizes, ranks).values()
    assert max(load) - min(load) <= max(sizes)


@settings(max_examples=30, deadline=None, database=None)
@given(order=st.permutations(list(EVERYONE)), ranks=st.permutations([1, 2, 3]))
def test_placement_does_not_depend_on_the_order_in_which_it_is_asked(order, ranks):
    assert balance(order, SIZES, [1, 2, 3]) == balance(EVERYONE, SIZES, [1, 2, 3])
    for stateful in (True, False):
        expected = Placement(SIZES, [1, 2, 3], stateful).place(list(EVERYONE))
        assert Placement(SIZES, ranks, stateful).place(order) == expected


# ---- within a round
@pytest.mark.parametrize("stateful", [True, False])
def test_a_client_stays_within_a_round(stateful):
    placement = Placement(SIZES, [1, 2, 3], stateful)
    placement.begin_round()
    first = placement.place([3, 6, 9])
    both = placement.place([0, 2, 3, 4, 6, 9])
    assert {c: both[c] for c in first} == first
    assert placement.this_round == both


def test_clients_without_state_are_placed_anew_each_round():
    placement = Placement([10, 10, 10, 10], [1, 2], stateful=False)
    first = placement.place([0, 1])
    assert first == {0: 1, 1: 2}
    placement.begin_round()
    assert placement.this_round == {}
    assert placement.place([1, 3]) == {1: 1, 3: 2}


def test_later_calls_of_a_round_fill_up_the_hosts_with_less_work():
    placement = Placement([100, 10, 10, 10], [1, 2], stateful=False)
    assert placement.place([0]) == {0: 1}
    assert placement.place([1, 2, 3]) == {1: 2, 2: 2, 3: 2}


# ---- homes
def test_clients_with_state_have_one_home_for_ever():
    placement = Placement(SIZES, [1, 2, 3], stateful=True)
    homes = {c: rank for rank, clients in placement.homes().items() for c in clients}
    assert sorted(homes) == list(EVERYONE)
    for cohort in ([0, 1], [5, 9, 2], list(EVERYONE)):
        placement.begin_round()
        assert placement.place(cohort) == {c: homes[c] for c in cohort}
    load = loads(homes, SIZES, [1, 2, 3]).values()
    assert max(load) - min(load) <= max(SIZES)


def test_clients_without_state_have_no_home():
    assert Placement(SIZES, [1, 2], stateful=False).homes() == {}


# ---- a lost host
def test_the_work_of_a_lost_host_moves_when_nothing_is_lost_with_it():
    placement = Placement(SIZES, [1, 2, 3], stateful=True)
    before = placement.homes()
    assert placement.lose(2) == []
    after = placement.homes()
    assert placement.alive == [1, 3]
    assert sorted(after) == [1, 3]
    assert sorted(after[1] + after[3]) == list(EVERYONE)
    assert set(before[1]) <= set(after[1])  # nobody else moves
    assert set(before[3]) <= set(after[3])
    load = loads({c: r for r, clients in after.items() for c in clients}, SIZES, [1, 3])
    assert abs(load[1] - load[3]) <= max(SIZES)


def test_clients_whose_state_was_committed_there_are_lost_with_a_host():
    placement = Placement(SIZES, [1, 2, 3], stateful=True)
    homes = placement.homes()
    placement.commit([homes[2][0], homes[1][0], homes[2][-1]])
    assert sorted(placement.lose(2)) == sorted({homes[2][0], homes[2][-1]})
    assert placement.lose(3) == []


def test_untouched_clients_of_a_lost_host_find_new_homes_also_when_others_are_lost():
    placement = Placement(SIZES, [1, 2, 3], stateful=True)
    touched, *untouched = placement.homes()[2]
    placement.commit([touched])
    assert placement.lose(2) == [touched]
    homes = placement.homes()
    moved = [c for rank in (1, 3) for c in homes[rank]]
    assert set(untouched) <= set(moved)
    assert touched not in moved


def test_commits_of_clients_without_state_lose_nothing():
    placement = Placement(SIZES, [1, 2], stateful=False)
    placement.place(list(EVERYONE))
    placement.commit(EVERYONE)
    assert placement.lose(1) == []


def test_the_clients_of_a_lost_host_keep_it_for_the_rest_of_the_round():
    placement = Placement([10] * 6, [1, 2], stateful=False)
    first = placement.place([0, 1, 2, 3])
    placement.lose(1)
    second = placement.place([0, 1, 2, 3, 4, 5])
    assert {c: second[c] for c in first} == first
    assert (second[4], second[5]) == (2, 2)
    placement.begin_round()
    assert Counter(placement.place([0, 1, 2, 3]).values()) == {2: 4}


def test_losing_a_host_twice_is_losing_it_once():
    placement = Placement(SIZES, [1, 2, 3], stateful=True)
    placement.lose(2)
    homes = placement.homes()
    assert placement.lose(2) == []
    assert placement.homes() == homes


def test_losing_the_last_host_leaves_nobody():
    placement = Placement(SIZES, [1], stateful=False)
    assert placement.lose(1) == []
    assert placement.alive == []


# ---- a host that comes back
@pytest.mark.parametrize("stateful", [True, False])
def test_a_host_that_comes_back_gets_what_it_had(stateful):
    placement = Placement(SIZES, [1, 2, 3], stateful)
    placement.shared_files = True
    before, first = placement.homes(), placement.place(list(EVERYONE))
    placement.begin_round()
    placement.lose(2)
    placement.join(2)
    placement.join(2)  # joining twice is joining once
    assert placement.alive == [1, 2, 3]
    assert placement.homes() == before
    placement.begin_round()
    assert placement.place(list(EVERYONE)) == first


def test_clients_whose_state_is_only_where_they_are_do_not_move_to_a_host_that_comes_back():
    placement = Placement(SIZES, [1, 2, 3], stateful=True)
    placement.lose(2)
    stay = [placement.homes()[1][0], placement.homes()[3][-1]]
    placement.commit(stay)
    placement.join(2)
    homes = {c: rank for rank, clients in placement.homes().items() for c in clients}
    assert (homes[stay[0]], homes[stay[1]]) == (1, 3)
    assert sorted(homes) == list(EVERYONE)
    assert placement.homes()[2]


@pytest.mark.parametrize("stateful", [True, False])
def test_clients_that_wait_keep_their_home(stateful):
    placement = Placement(SIZES, [1, 2, 3], stateful, "wait")
    placement.shared_files = True
    before = placement.homes()
    assert placement.waits
    assert sorted(c for clients in before.values() for c in clients) == list(EVERYONE)
    assert placement.lose(2) == []
    assert placement.alive == [1, 3]
    placement.begin_round()
    assert placement.place(list(EVERYONE)) == {c: rank for rank, clients in before.items() for c in clients}
    placement.join(2)
    assert placement.homes() == before
