"""FAVOR, FedMarl and FedCor: their formulas against what they are by definition, what they learn on made-up rounds, and
whole runs: bytes against the closed formulas, the same run again, and a run that goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import fldist
from fldist.algorithm import State, TooFewReplies
from fldist.config import build, load
from fldist.inspection import predict
from fldist.params import Layout, Params, Slot
from fldist.q_learning import Mlp, adam, improved, learner
from fldist.runner import run_here
from fldist.runtime.checkpoint import Checkpoints, read_state, write_state
from fldist.runtime.state import hash_state
from fldist.selection import Candidates, ClientReport, Outcome, Probe, favor
from fldist.selection.favor import Favor, double_targets, fit, project, reward, sampled
from fldist.selection.fedcor import Covariance, FedCor, columns, discounted_mean, likelihood, spared
from fldist.selection.fedcor import fit as fit_covariance
from fldist.selection.fedmarl import FedMarl, best_together, decided, filled, known, noted, team_reward, together
from tests.conftest import Hosts, small


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def close(got: Any, want: Any, atol: float = 1e-9) -> None:
    got = torch.as_tensor(got)
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=0, atol=atol)


def params(values: Tensor) -> Params:
    return Params(Layout((Slot("w", tuple(values.shape), 0, len(values)),), (), ()), values.float())


def candidates(n: int = 6, count: int = 2, round: int = 1, seed: int = 0, **given: Any) -> Candidates:
    ids = given.pop("ids", range(n))
    return Candidates(
        list(ids), given.pop("sizes", [10] * len(ids)), count, round, rng=rng(1000 * seed + round), **given
    )


def saved(state: State, where: Path) -> State:
    """The same after a checkpoint."""
    write_state(where, {"selector": state}, {})
    back: State = read_state(where)[0]["selector"]
    return back


# ---- Q-networks
def test_an_mlp_is_the_module_with_its_weights() -> None:
    form = Mlp((5, 7, 3, 2))
    weights = form.init(rng(), networks=4)
    assert weights.shape == (4, form.num_weights) == (4, 5 * 7 + 7 + 7 * 3 + 3 + 3 * 2 + 2)
    x = normal(4, 5).float()
    rows = form(weights, x)
    for row in range(4):
        module = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), nn.ReLU(), nn.Linear(3, 2))
        nn.utils.vector_to_parameters(weights[row], module.parameters())
        close(form(weights[row], x), module(x).detach(), 1e-6)
        close(rows[row], module(x[row]).detach(), 1e-6)


def test_weights_begin_as_those_of_linear_layers() -> None:
    weights = Mlp((100, 50)).init(rng(), networks=40)
    assert float(weights.abs().max()) <= 0.1
    assert float(weights.std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.01)


def test_adam_is_torchs() -> None:
    w = nn.Parameter(normal(9).float())
    optimizer = torch.optim.Adam([w], lr=0.03)
    ours, first, second = w.detach().clone(), torch.zeros(9), torch.zeros(9)
    for step in range(1, 30):
        gradient = normal(9, seed=step).float()
        w.grad = gradient
        optimizer.step()
        ours, first, second = adam(ours, gradient, first, second, step, 0.03)
        close(ours, w.detach(), 1e-6)


def test_a_step_goes_down_copies_the_target_when_it_is_time_and_changes_nothing_in_place() -> None:
    form = Mlp((2, 4, 1))
    q = learner(form, rng())
    x, y = normal(8, 2).float(), normal(8, seed=1).float()

    def loss(weights: Tensor) -> Tensor:
        return (form(weights[0], x)[:, 0] - y).square().mean()

    before, losses = hash_state(q.values), []
    states = [q]
    for _ in range(6):
        states.append(improved(states[-1], loss, 0.05, copy_every=3))
        losses.append(float(loss(states[-1].weights)))
    assert losses == sorted(losses, reverse=True)
    assert hash_state(q.values) == before
    same = [torch.equal(s.target, s.weights) for s in states]
    assert same == [True, False, False, True, False, False, True]
    assert torch.equal(states[5].target, states[3].weights)


# ---- FAVOR
@pytest.mark.parametrize("chunk", [3, 1 << 14])
def test_components_are_those_of_the_singular_value_decomposition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(favor, "CHUNK", chunk)
    models = normal(7, 40).float() * torch.logspace(0, -2, 40)
    mean, loadings = fit(list(models), 4)
    close(mean, models.double().mean(dim=0).float(), 1e-6)
    centred = models.double().numpy() - models.double().numpy().mean(axis=0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    for k in range(4):
        sign = np.sign(vt[k] @ loadings[k].double().numpy())
        close(loadings[k].double(), torch.from_numpy(sign * vt[k]), 1e-5)
        scores = torch.stack([project(m, mean, loadings) for m in models])[:, k]
        close(scores.double(), torch.from_numpy(sign * u[:, k] * s[k]), 1e-5)
        assert float(scores[scores.abs().argmax()]) > 0
    close(loadings @ loadings.T, torch.eye(4), 1e-5)


def test_components_beyond_the_rank_are_zero() -> None:
    line = normal(1, 30)
    models = torch.arange(4.0)[:, None].double() * line
    _, loadings = fit(list(models.float()), 6)
    assert loadings.shape == (6, 30)
    close(loadings[0].norm(), 1.0, 1e-6)
    assert not loadings[1:].any()
    assert not fit([torch.ones(5)] * 3, 2)[1].any()


def test_the_reward_of_an_accuracy() -> None:
    assert reward(0.9, 0.9) == 0.0
    assert reward(0.9 - 1 / 3, 0.9) == pytest.approx(-0.75, abs=1e-12)
    assert reward(0.0, 1.0) == pytest.approx(1 / 64 - 1)


def test_double_q_learning_chooses_by_one_network_and_values_by_the_other() -> None:
    q = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]])
    other = torch.tensor([[10.0, 20.0, 90.0], [-4.0, 80.0, 80.0]])
    close(double_targets(torch.tensor([0.5, -0.5]), q, other, 0.9), [0.5 + 0.9 * 20, -0.5 - 0.9 * 4], 1e-6)


def test_a_sample_is_drawn_without_replacement_from_the_softmax() -> None:
    values, tau = torch.tensor([0.0, 0.1, 0.3, 0.2]), 0.2
    p = torch.softmax(values.double() / tau, dim=0).tolist()
    want = {(i, j): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in itertools.combinations(range(4), 2)}
    assert math.fsum(want.values()) == pytest.approx(1.0)
    draws, generator = 20_000, rng()
    got = Counter(tuple(sampled(values, 2, tau, generator)) for _ in range(draws))
    for pair, share in want.items():
        assert got[pair] / draws == pytest.approx(share, abs=4.5 * math.sqrt(share / draws))


def favor_at(**fields: Any) -> Favor:
    return Favor(**{"hidden": (16,), "components": 3, "updates": 2, **fields})


def a_favor_state(selector: Favor, given: Candidates) -> State:
    """With the components of made-up models."""
    state = selector.init(given)
    models = normal(given.num_clients, 20, seed=3).float()
    state.mean, state.loadings = fit(list(models), selector.components)
    scores = torch.stack([project(m, state.mean, state.loadings) for m in [torch.zeros(20), *models]])
    state.scores = scores
    return state


def favor_round(selector: Favor, state: State, number: int, accuracy: float | None, **given: Any) -> tuple[int, ...]:
    """A made-up round, in which everyone selected replies but those in `silent`."""
    silent = given.pop("silent", ())
    at = candidates(round=number, model=lambda: params(normal(20, seed=100 + number)), **given)
    selected = tuple(selector.select(state, at))
    replied = tuple(k for k in selected if k not in silent)
    models = {k: selector.digest(state, params(normal(20, seed=200 + 10 * number + k))) for k in replied}
    selector.observe(state, at, Outcome(number, selected, replied, accuracy=accuracy, models=models))
    return selected


def test_only_entries_of_the_global_model_and_of_those_who_replied_change() -> None:
    selector, given = favor_at(), candidates()
    state = a_favor_state(selector, given)
    before = state.scores
    selected = favor_round(selector, state, 1, 0.5)
    changed = (state.scores != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [0, *(k + 1 for k in selected)]
    close(state.scores[0], project(normal(20, seed=101).float(), state.mean, state.loadings), 0)
    lost = dataclasses.replace(given, model=lambda: params(torch.full((20,), math.nan)))
    nan = {0: torch.full((3,), math.nan)}
    before = state.scores
    selector.observe(state, lost, Outcome(2, (0,), (0,), accuracy=0.5, models=nan))
    assert torch.equal(state.scores, before), "what is no number replaces nothing"


def test_favor_selects_the_largest_and_explores_by_chance() -> None:
    greedy = favor_at(epsilon=0.0, epsilon_min=0.0)
    given = candidates(n=9, ids=[0, 2, 3, 5, 6, 8], count=3)
    state = a_favor_state(greedy, given)
    state.q.target = Mlp((10 * 3, 16, 9)).init(rng(8))
    q = Mlp((10 * 3, 16, 9))(state.q.weights[0], state.scores.reshape(1, -1))[0]
    want = sorted(sorted(given.ids, key=lambda k: -float(q[k]))[:3])
    assert greedy.select(state, given) == want
    free = favor_at(epsilon=1.0)
    seen = Counter(tuple(free.select(state, candidates(ids=given.ids, count=3, seed=s))) for s in range(2000))
    assert len(seen) == 20
    assert min(seen.values()) > 50, "all sets are equally likely: 100 each"
    once = favor_at(epsilon=1.0, epsilon_decay=1e-9, epsilon_min=0.0)
    first = {tuple(once.select(state, candidates(ids=given.ids, count=3, seed=s))) for s in range(200)}
    assert len(first) == 20
    second = [once.select(state, candidates(ids=given.ids, count=3, round=2, seed=s)) for s in range(50)]
    assert second == [want] * 50
    late = dataclasses.replace(given, round=200)
    some = favor_at(epsilon_min=0.1)
    stays = sum(some.select(state, dataclasses.replace(late, rng=rng(s))) == want for s in range(500)) / 500
    assert stays == pytest.approx(0.9**3, abs=0.06)
    soft = favor_at(exploration="softmax", tau_q=1e-9)
    assert soft.select(state, given) == want


def test_a_silent_client_does_not_block_a_place() -> None:
    selector = favor_at(epsilon=0.0, epsilon_min=0.0, updates=1, lr=1e-9)
    state = a_favor_state(selector, candidates())
    first = selector.select(state, candidates())
    dead = first[0]
    chosen = [favor_round(selector, state, r, 0.5, silent=[dead]) for r in range(1, 9)]
    assert dead not in chosen[-1]
    assert int(state.missed[dead]) >= 1
    assert int(state.missed.sum()) == int(state.missed[dead])


@pytest.mark.parametrize(("transitions", "each"), [("each", 2), ("first", 1)])
def test_the_memory_holds_the_newest_transitions(transitions: Any, each: int) -> None:
    selector = favor_at(memory=5, transitions=transitions)
    state = a_favor_state(selector, candidates())
    scores = [state.scores.flatten()]
    acted = []
    for number in range(1, 9):
        acted.append(favor_round(selector, state, number, 0.1 * number))
        scores.append(state.scores.flatten())
    kept = 5 // each
    assert [part.actions.tolist() for part in state.memory] == [list(ids[:each]) for ids in acted[-kept:]]
    for part, number in zip(state.memory, range(9 - kept, 9), strict=True):
        assert torch.equal(part.before, scores[number - 1])
        assert torch.equal(part.after, scores[number])
        assert part.reward == pytest.approx(reward(0.1 * number, selector.target))


def test_a_round_without_a_score_or_a_reply_is_no_transition() -> None:
    selector = favor_at()
    state = a_favor_state(selector, candidates())
    favor_round(selector, state, 1, None)
    favor_round(selector, state, 2, 0.5, silent=range(6))
    assert state.memory == []


def test_favor_learns_whom_accuracy_follows() -> None:
    """Rounds with client 4 are good: in a world without a future its value is the largest, and near its reward."""
    selector = favor_at(gamma=0.0, lr=3e-3, updates=30, batch_size=16, epsilon_decay=1.0, target=0.9)
    state = a_favor_state(selector, candidates())
    at = candidates(count=1, model=lambda: params(torch.zeros(20)))
    for number in range(1, 41):
        given = dataclasses.replace(at, round=number, rng=rng(number))
        selected = selector.select(state, given)
        accuracy = 0.9 if selected == [4] else 0.4
        selector.observe(state, given, Outcome(number, tuple(selected), tuple(selected), accuracy=accuracy))
    greedy = dataclasses.replace(selector, epsilon=0.0, epsilon_min=0.0)
    assert greedy.select(state, at) == [4]
    values = greedy._values(state, at)
    close(values, [reward(0.9 if k == 4 else 0.4, 0.9) for k in range(6)], 0.15)


def test_a_step_of_favor_by_hand() -> None:
    """Client 1 holds no samples: its value, the largest in the next state, is not what comes next."""
    selector = favor_at(updates=1, batch_size=1, gamma=0.5, lr=0.01, copy_every=1)
    at = candidates(ids=[0, 2, 3], num_clients=4, count=1)
    state = a_favor_state(selector, at)
    form = Mlp((5 * 3, 16, 4))
    biases = torch.zeros(form.num_weights)
    biases[-3] = 100.0
    state.q = learner(form, rng(5))
    state.q.weights = state.q.weights + biases
    state.q.target = form.init(rng(6)) + biases
    before, after = normal(15, seed=7).float(), normal(15, seed=8).float()
    state.memory = [State(before=before, after=after, actions=torch.tensor([2]), reward=-0.25)]
    now, then = form(state.q.weights[0], after[None])[0], form(state.q.target[0], after[None])[0]
    y = -0.25 + 0.5 * float(then[max((0, 2, 3), key=lambda k: float(now[k]))])
    want = improved(state.q, lambda w: (y - form(w[0], before[None])[0, 2]) ** 2, 0.01, 1)
    got = selector._learnt(state, at)
    close(got.first, want.first, 1e-6)  # the gradient, of whose size Adam's first step tells nothing
    close(got.weights, want.weights, 1e-6)
    assert torch.equal(got.target, got.weights)


def test_favor_without_two_models_says_so() -> None:
    told: list[str] = []
    selector = favor_at()
    for values in ([torch.zeros(20)], [torch.zeros(20), torch.full((20,), math.nan)]):
        replies = {k: params(v) for k, v in enumerate(values)}
        at = candidates(
            clients=Answering({"first_epoch": lambda k, x, r=replies: r.get(k)}), warn=told.append,
            model=lambda: params(torch.zeros(20)),
        )  # fmt: skip
        state = selector.init(at)
        selector.setup(state, at)
        assert not state.scores.any()
        assert len(selector.select(state, at)) == 2
    assert told == ["selection: favor needs the models of two clients to compare, and has 1: all look alike"] * 2


def test_setup_begins_with_the_clients_models_and_those_who_are_silent_with_the_initial_one() -> None:
    models = {k: params(normal(20, seed=k)) for k in range(6) if k != 3}
    x = params(normal(20, seed=50))
    at = candidates(clients=Answering({"first_epoch": lambda k, sent: models.get(k)}), model=lambda: x)
    selector = favor_at()
    state = selector.init(at)
    selector.setup(state, at)
    mean, loadings = fit([models[k].floats for k in sorted(models)], 3)
    assert torch.equal(state.loadings, loadings)
    for k in range(6):
        close(state.scores[k + 1], project(models.get(k, x).floats, mean, loadings), 0)
    close(state.scores[0], project(x.floats, mean, loadings), 0)


# ---- FedMarl
def test_the_team_reward() -> None:
    assert team_reward(0.6, 0.5, 3.0, 4.0, (1.0, 0.0, 0.0)) == pytest.approx(1.0)
    assert team_reward(0.6, 0.5, 3.0, 4.0, (2.0, 0.5, 0.25)) == pytest.approx(2.0 - 1.5 - 1.0)


def test_the_best_joint_action_is_each_agents_own() -> None:
    values = normal(2, 4, 2)
    there = torch.tensor([[True, True, True, False], [True, True, True, True]])
    best = best_together(values, there)
    for team, number in ((0, 3), (1, 4)):
        every = {}
        for actions in itertools.product((0, 1), repeat=4):
            total = together(values[team, None], torch.tensor([actions]), there[team, None])
            close(total, [sum(float(values[team, n, a]) for n, a in enumerate(actions[:number]))])
            every[actions[:number]] = float(total)
        best_actions = max(every, key=lambda a: every[a])
        assert best_actions == tuple(values[team, :number].argmax(dim=1).tolist())
        assert float(best[team]) == pytest.approx(every[best_actions])


def decisions(advantage: Sequence[float], at_random: Sequence[int], count: int) -> list[int]:
    values = torch.stack([torch.zeros(len(advantage)), torch.tensor(advantage)], dim=1)
    return decided(values, torch.tensor(at_random), count).nonzero().flatten().tolist()


def test_who_goes_on() -> None:
    assert decisions([1.0, -1.0, 3.0, 2.0], [-1] * 4, 4) == [0, 2, 3]
    assert decisions([1.0, -1.0, 3.0, 2.0], [-1] * 4, 2) == [2, 3]
    assert decisions([-3.0, -1.0, -2.0], [-1] * 3, 2) == [1], "at least one"
    assert decisions([1.0, -1.0, 3.0], [0, 1, 0], 3) == [1]
    assert decisions([1.0, -1.0, 3.0], [0, 0, 0], 3) == [2]
    assert decisions([1.0, 1.0, 1.0], [-1] * 3, 2) == [0, 1], "ties: the first"
    assert filled(torch.tensor([False, True, False, False]), torch.tensor([1.0, -9.0, 3.0, 2.0]), 3).tolist() == [
        False, True, True, True,
    ]  # fmt: skip


def test_what_is_not_known_is_the_mean_of_what_is() -> None:
    nan = math.nan
    close(known(torch.tensor([[1.0, nan], [nan, nan], [3.0, nan], [50.0, nan]])), [[1, 0], [10, 0], [3, 0], [10, 0]])
    rows = torch.full((3, 2), nan)
    rows = noted(rows, {1: 5.0})
    rows = noted(rows, {1: 6.0, 2: 7.0})
    assert rows[1].tolist() == [6.0, 5.0]
    assert rows[2].tolist() == [7.0, 7.0]
    assert rows[0].isnan().all()


def marl(**fields: Any) -> FedMarl:
    return FedMarl(**{"hidden": 16, "updates": 3, **fields})


def marl_task(epochs: int = 5) -> Any:
    return SimpleNamespace(local=SimpleNamespace(epochs=epochs))


def marl_round(
    selector: FedMarl, state: State, number: int, accuracy: float | None, probe: Any = None, **given: Any
) -> list[int]:
    """A made-up round of its own: client k's probe has the loss k and takes k + 1 seconds, the rest four times that."""
    probe = probe or (lambda k: Probe(float(k), k + 1.0))
    simulated = given.pop("seconds_of_round", None)
    at = candidates(round=number, task=marl_task(), **given)
    probed = selector.select(state, at)
    kept = selector.keep(state, at, {k: probe(k) for k in probed})
    reports = {k: ClientReport(10.0, 1.0, 1.0, 4 * probe(k).seconds, math.nan) for k in kept}
    outcome = Outcome(number, tuple(kept), tuple(kept), reports, accuracy=accuracy, seconds=simulated)
    selector.observe(state, at, outcome)
    return kept


def test_twice_as_many_are_probed_as_are_kept() -> None:
    selector, at = marl(), candidates(n=9, count=3)
    state = selector.init(at)
    probed = selector.select(state, at)
    assert len(probed) == len(set(probed)) == 6
    assert probed == sorted(probed)
    assert len(selector.select(state, candidates(n=5, count=3))) == 5
    assert len(marl(probed=4).select(state, at)) == 4
    seen = {k for s in range(50) for k in selector.select(state, candidates(n=9, count=3, seed=s))}
    assert seen == set(range(9))
    kept = selector.keep(state, at, {k: Probe(1.0, 1.0) for k in probed})
    assert 1 <= len(kept) <= 3
    assert set(kept) <= set(probed)


@pytest.mark.parametrize("probed", [2, 10])
def test_a_number_of_probes_that_cannot_be_is_refused(probed: int) -> None:
    with pytest.raises(ValueError, match=rf"selection.probed: {probed}, .* use a number from 3 to 9"):
        marl(probed=probed).init(candidates(n=9, count=3))


def test_what_an_agent_sees() -> None:
    selector = marl(history=2, unit_s=2.0)
    at = candidates(n=4, count=2, round=7, sizes=[10, 20, 30, 40], task=marl_task())
    state = selector.init(at)
    state.loss = torch.tensor([0.5, math.nan, 1.5, math.nan], dtype=torch.float64)
    state.probe_s = torch.tensor([[4.0, 2.0], [math.nan] * 2, [8.0, 8.0], [math.nan] * 2], dtype=torch.float64)
    seen = selector._seen(state, at, [0, 1, 3])
    want = [
        [0.5, 2.0, 1.0, 0.0, 0.0, 1.0, 0.4, 0.07],
        [1.0, 3.0, 2.5, 0.0, 0.0, 1.0, 0.8, 0.07],
        [1.0, 3.0, 2.5, 0.0, 0.0, 1.0, 1.6, 0.07],
    ]
    close(seen, want, 1e-6)


def test_reward_and_latency_of_a_round() -> None:
    selector = marl(epsilon=0.0, epsilon_min=0.0, unit_s=10.0, probed=6)
    state = selector.init(candidates())
    marl_round(selector, state, 1, 0.3)
    assert state.pending is None, "the first round has no gain"
    kept = marl_round(selector, state, 2, 0.4)
    latency = 6.0 + 4 * (max(kept) + 1)  # the longest probe of all six, the longest rest of the kept
    assert state.pending.reward == pytest.approx(1.0 - 0.2 * latency / 10 - 0.1 * len(kept))
    assert state.pending.actions.tolist() == [int(k in kept) for k in range(6)]
    close(state.upload_s[kept], torch.zeros(len(kept), 3))
    kept = marl_round(selector, state, 3, 0.4, seconds_of_round=100.0)
    assert state.pending.reward == pytest.approx(-0.2 * 10 - 0.1 * len(kept))
    close(state.upload_s[kept, 0], [100.0 - 6.0 - 4 * (max(kept) + 1)] * len(kept))
    assert len(state.memory) == 1
    assert torch.equal(state.memory[0].next_seen, state.pending.seen)
    marl_round(selector, state, 4, None)
    assert state.pending is None
    assert len(state.memory) == 2
    newest = state.memory[-1]
    brief = dataclasses.replace(selector, memory=2)
    for number in (5, 6):
        marl_round(brief, state, number, 0.5)
    assert len(state.memory) == 2
    assert state.memory[0] is newest


def test_the_unit_is_a_training_of_those_who_were_probed_first() -> None:
    selector = marl()
    state = selector.init(candidates())
    assert state.unit is None
    marl_round(selector, state, 1, 0.3, probe=lambda k: Probe(1.0, 3.0))
    assert state.unit == pytest.approx(5 * 3.0)
    marl_round(selector, state, 2, 0.3, probe=lambda k: Probe(math.nan, math.nan))
    assert state.unit == pytest.approx(5 * 3.0)
    assert not state.loss.isnan().all()
    assert float(state.loss[~state.loss.isnan()].max()) == 10.0


@pytest.mark.parametrize("shared", [True, False])
def test_agents_learn_who_pays(shared: bool) -> None:
    """Each client of a large loss that goes on brings accuracy, each other one costs some."""
    selector = marl(
        shared=shared, gamma=0.0, lr=0.01, updates=40, w2=0.0, w3=0.0, probed=6, epsilon_decay=1.0, hidden=32
    )
    state = selector.init(candidates(count=6))
    accuracy = 0.5
    for number in range(1, 51):
        at = candidates(round=number, count=6, task=marl_task())
        selector.select(state, at)
        kept = selector.keep(state, at, {k: Probe(float(k), 1.0) for k in range(6)})
        accuracy += 0.05 * (sum(1 if k >= 3 else -1 for k in kept))
        reports = {k: ClientReport(10.0, 1.0, 1.0, 4.0, math.nan) for k in kept}
        selector.observe(state, at, Outcome(number, tuple(kept), tuple(kept), reports, accuracy=accuracy))
    greedy = dataclasses.replace(selector, epsilon=0.0, epsilon_min=0.0)
    at = candidates(round=51, count=6, task=marl_task())
    assert greedy.keep(state, at, {k: Probe(float(k), 1.0) for k in range(6)}) == [3, 4, 5]
    assert greedy.propose(state, candidates(round=51, count=3, task=marl_task()), rng(5)) == [3, 4, 5]


@pytest.mark.parametrize("shared", [True, False])
def test_a_step_of_the_agents_by_hand(shared: bool) -> None:
    """Two rounds of three agents and of two, in one batch."""
    selector = marl(updates=1, batch_size=40, gamma=0.5, lr=0.01, shared=shared, history=1, hidden=4)
    at = candidates()
    state = selector.init(at)
    form, networks = Mlp((6, 4, 2)), 1 if shared else 6
    state.q.target = form.init(rng(6), networks)
    teams = [([0, 2, 5], [1, 0, 1], [1, 2], -0.5), ([1, 3], [0, 1], [0, 3, 4], 0.75)]
    state.memory = [
        State(
            clients=torch.tensor(ids), seen=normal(len(ids), 6, seed=i).float(), actions=torch.tensor(actions),
            reward=r, next_clients=torch.tensor(later), next_seen=normal(len(later), 6, seed=9 + i).float(),
        )
        for i, (ids, actions, later, r) in enumerate(teams)
    ]  # fmt: skip
    rows = torch.randint(2, (40,), generator=candidates().rng).tolist()

    def of(weights: Tensor, k: int, seen: Tensor) -> Tensor:
        return form(weights[0 if shared else k], seen[None])[0]

    def loss(weights: Tensor) -> Tensor:
        gaps = []
        for i in rows:
            part, (ids, actions, later, r) = state.memory[i], teams[i]
            total = sum(of(weights, k, s)[a] for k, a, s in zip(ids, actions, part.seen, strict=True))
            best = sum(float(of(state.q.target, k, s).max()) for k, s in zip(later, part.next_seen, strict=True))
            gaps.append((r + 0.5 * best - total) ** 2)
        return torch.stack(gaps).mean()

    assert {0, 1} == set(rows)
    close(selector._learnt(state, candidates()).first, improved(state.q, loss, 0.01, 10).first, 1e-5)


def test_agents_learn_from_rounds_that_others_have_chosen() -> None:
    selector = marl()
    state = selector.init(candidates())
    accuracy = 0.3
    for number, ids in enumerate([(0, 1), (2, 3), (1, 2), (0, 4)], start=1):
        at = candidates(round=number, task=marl_task())
        reports = {k: ClientReport(10.0, 1.0, float(k), 5.0 * (k + 1), math.nan) for k in ids}
        accuracy += 0.1
        selector.observe(state, at, Outcome(number, ids, ids, reports, accuracy=accuracy))
    assert state.loss[:5].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert math.isnan(state.loss[5])
    assert state.probe_s[:5, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0], "an epoch's share of five"
    assert [part.clients.tolist() for part in state.memory] == [[0, 1], [0, 1, 2, 3]]
    assert [part.actions.tolist() for part in state.memory] == [[0, 0], [0, 1, 1, 0]]
    assert state.pending.clients.tolist() == [0, 1, 2, 3]


# ---- FedCor
def dense(x: Tensor, noise: float) -> Tensor:
    return x.T @ x + noise**2 * torch.eye(x.shape[1], dtype=x.dtype)


@pytest.mark.parametrize(("d", "n"), [(3, 8), (5, 5), (6, 4)])
def test_the_likelihood_is_that_of_the_normal_distribution(d: int, n: int) -> None:
    x, y, c, noise = normal(d, n, seed=1), normal(4, n, seed=2), torch.tensor([0.5, 0.7, 0.9, 1.0]).double(), 0.1
    x.requires_grad_(True)
    law = MultivariateNormal(torch.zeros(n, dtype=torch.float64), dense(x, noise))
    want = -(c * law.log_prob(y)).sum()
    (gradient,) = torch.autograd.grad(want, x)
    got, ours = likelihood(x.detach(), y, c, noise)
    assert float(got) == pytest.approx(float(want.detach()), rel=1e-9)
    torch.testing.assert_close(ours, gradient, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("normalised", [False, True])
def test_fitting_is_adam_on_the_likelihood(normalised: bool) -> None:
    y, c, noise = normal(5, 7, seed=2), torch.tensor([0.5, 0.7, 0.9, 0.95, 1.0]).double(), 0.3
    x0, scale0 = normal(3, 7, seed=1), torch.tensor(1.3, dtype=torch.float64)
    x, scale = nn.Parameter(x0.clone()), nn.Parameter(scale0.clone())
    optimizer = torch.optim.Adam([x, scale], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        law = MultivariateNormal(
            torch.zeros(7, dtype=torch.float64), dense(columns(x, scale) if normalised else x, noise)
        )
        (-(c * law.log_prob(y)).sum()).backward()
        optimizer.step()
    got = fit_covariance(x0, scale0, y, c, noise=noise, steps=20, lr=0.01, normalised=normalised)
    close(got[0], x.detach(), 1e-7)
    close(got[1], scale.detach() if normalised else scale0, 1e-7)
    diagonal = dense(columns(x0, scale0), noise).diagonal()
    close(diagonal, [1.3**2 + noise**2] * 7)


def test_a_fit_that_is_done_is_the_weighted_covariance() -> None:
    """Where X has as many rows as there are clients nothing keeps Sigma from it."""
    truth = torch.tensor([[0.5, 0.4, 0.0], [0.0, 0.3, 0.3], [0.2, 0.0, 0.4]]).double()
    y, c = normal(40, 3, seed=2) @ truth, torch.linspace(0.2, 1.0, 40).double()
    y -= discounted_mean(y, c)
    start, scale = normal(3, 3, seed=7) / math.sqrt(3), torch.ones((), dtype=torch.float64)
    x, _ = fit_covariance(start, scale, y, c, noise=0.01, steps=3000, lr=0.01, normalised=False)
    close(dense(x, 0.01), (y * c[:, None]).T @ y / c.sum(), 1e-4)


def test_the_mean_is_discounted() -> None:
    close(discounted_mean(torch.tensor([[1.0, 0.0], [3.0, 8.0]]).double(), torch.tensor([0.5, 1.0]).double()),
          [3.5 / 1.5, 8 / 1.5])  # fmt: skip


def test_the_chosen_ones_row_and_column_vanish_and_the_rest_is_the_conditional_covariance() -> None:
    x, noise, n = normal(3, 9), 0.2, 9
    want, sigma = dense(x, noise), Covariance.of(x, noise)
    for k in (4, 0, 7, 8):
        want = want - want[:, k, None] @ want[None, k] / want[k, k]
        sigma = sigma.given(k)
        got = torch.stack([sigma.row(i) for i in range(n)])
        close(got, want, 1e-9)
        assert not got[k].any()
        assert not got[:, k].any()


def chosen_densely(x: Tensor, noise: float, omega: Tensor, factors: Tensor, count: int) -> list[int]:
    sigma, left, chosen = dense(x, noise), list(range(x.shape[1])), []
    for _ in range(count):
        best = max(
            left,
            key=lambda k: float(factors[k] * (omega[left] @ sigma[left, k]) / sigma[k, k].sqrt()),
        )
        chosen.append(best)
        left.remove(best)
        sigma = sigma - sigma[:, best, None] @ sigma[None, best] / sigma[best, best]
    return sorted(chosen)


def cor(**fields: Any) -> FedCor:
    return FedCor(**{"warmup": 2, "interval": 3, "dimension": 3, "first_steps": 5, "steps": 5, **fields})


@pytest.mark.parametrize("normalised", [False, True])
def test_clients_are_chosen_as_with_whole_matrices(normalised: bool) -> None:
    ids = [0, 1, 3, 4, 5, 7, 8, 9, 11]
    for seed in range(5):
        selector = cor(normalised=normalised, noise=0.1)
        sizes = [int(v) for v in torch.randint(1, 50, (9,), generator=rng(seed))]
        at = candidates(ids=ids, sizes=sizes, count=4, num_clients=12, seed=seed)
        state = selector.init(at)
        state.fitted, state.factors = True, torch.rand(12, generator=rng(seed), dtype=torch.float64)
        state.scale = torch.tensor(0.7, dtype=torch.float64)
        x = state.x[:, ids]
        x = columns(x, state.scale) if normalised else x
        omega = torch.tensor(sizes).double() / sum(sizes)
        want = chosen_densely(x, 0.1, omega, state.factors[ids], 4)
        assert selector.select(state, at) == [ids[k] for k in want]


def test_independent_clients_are_chosen_by_their_weights() -> None:
    selector = cor()
    at = candidates(n=5, sizes=[30, 50, 10, 40, 20], count=3)
    state = selector.init(at)
    state.fitted, state.x = True, torch.zeros_like(state.x)
    assert selector.select(state, at) == [0, 1, 3]
    state.factors = torch.tensor([1.0, 0.1, 1.0, 1.0, 1.0]).double()
    assert selector.select(state, at) == [0, 3, 4]


def test_gains_of_the_silent_count_less() -> None:
    gains = torch.tensor([-1.0, 3.0, -math.inf, 1.0]).double()
    close(spared(gains, torch.tensor([0, 0, 5, 0])), gains)
    close(spared(gains, torch.tensor([4, 1, 0, 2])), torch.tensor([-1.0, 1.0, -math.inf, -0.5]).double())


class Answering:
    """All clients of made-up rounds: `answers[method](client, model)` is what one says, None for one that is silent."""

    def __init__(self, answers: Mapping[str, Any], ids: Sequence[int] = range(6)) -> None:
        self.answers = answers
        self.calls: list[tuple[str, list[int]]] = []
        self.num = 6
        self.to = list(ids)

    def all(self) -> Any:
        return self.only(self.to)

    def only(self, ids: Any) -> Any:
        made = Answering(self.answers, ids)
        made.calls = self.calls
        return made

    def call(self, method: Any, *, fold: Any = None, phase: Any = None, x: Params) -> Any:
        name = method.__name__
        self.calls.append((name, self.to))
        said = {k: v for k in self.to if (v := self.answers[name](k, x)) is not None}
        if not said:
            raise TooFewReplies(name, {})
        if name == "loss":
            return SimpleNamespace(loss=said)
        if name == "trial":
            return SimpleNamespace(y=next(iter(said.values())))
        return SimpleNamespace(y=said)


def cor_round(selector: FedCor, state: State, number: int, clients: Any, **given: Any) -> list[int]:
    at = candidates(round=number, clients=clients, model=lambda: params(torch.full((3,), float(number))), **given)
    selected = selector.select(state, at)
    selector.observe(state, at, Outcome(number, tuple(selected), tuple(selected)))
    return selected


def test_when_fedcor_asks_and_what_it_makes_of_the_answers() -> None:
    """Losses are 10 k + x in the k-th client: x is the round's number, and 100 times as much in a trial's model."""
    clients = Answering({"loss": lambda k, x: (10 + k) * float(x.floats[0]), "trial": lambda k, x: x.scale(2.0)})
    selector = cor(gamma=0.5, beta=0.8)
    state = selector.init(candidates())
    asked: list[list[str]] = []
    factors = []
    for number in range(1, 11):
        begun = len(clients.calls)
        selected = cor_round(selector, state, number, clients)
        asked.append([name for name, _ in clients.calls[begun:]])
        factors.append(state.factors)
        if number == 3:
            assert state.fitted
            assert state.asked == 3
            assert sorted(state.factors.tolist()) == [0.8] * 2 + [1.0] * 4
            assert sorted(k for k in range(6) if state.factors[k] < 1) == selected
    trial = ["trial", "loss", "loss"]
    assert asked == [["loss"]] * 3 + [[], [], trial, [], [], trial, []]
    assert [ids for name, ids in clients.calls if name == "loss"] == [list(range(6))] * 7
    assert all(len(ids) == 2 for name, ids in clients.calls if name == "trial")
    base = torch.arange(10.0, 16.0).double()
    close(state.changes, torch.stack([base, base, 6 * base, 9 * base]))
    assert state.of_round.tolist() == [2, 3, 6, 9]
    assert factors[1].tolist() == [1.0] * 6, "not in the warm-up"
    assert sorted(factors[4].tolist(), reverse=True) != [1.0] * 6
    assert sorted(factors[5].tolist()) == [0.8] * 2 + [1.0] * 4, "1 again before the round is selected"


def test_observations_are_forgotten_and_weighted_by_age(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    kept = fit_covariance

    def watched(x: Tensor, scale: Tensor, deviations: Tensor, weights: Tensor, **how: Any) -> Any:
        seen.append(weights)
        assert float((weights @ deviations).abs().max()) < 1e-9, "deviations from the discounted mean"
        return kept(x, scale, deviations, weights, **how)

    monkeypatch.setattr("fldist.selection.fedcor.fit", watched)
    clients = Answering({"loss": lambda k, x: (10 + k) * float(x.floats[0]), "trial": lambda k, x: x.scale(2.0)})
    selector = cor(gamma=0.5, history=6)
    state = selector.init(candidates())
    for number in range(1, 10):
        cor_round(selector, state, number, clients)
    assert [w.tolist() for w in seen] == [[0.5, 1.0], [0.5**4, 0.5**3, 1.0], [0.5**3, 1.0]]


def test_a_loss_that_is_not_known_is_as_the_others() -> None:
    silent: set[tuple[int, float]] = {(1, 1.0), (2, 2.0)}

    def loss(k: int, x: Params) -> float | None:
        value = float(x.floats[0])
        return None if (k, value) in silent else math.nan if (k, value) == (3, 3.0) else (10 + k) * value

    selector = cor(warmup=3)
    state = selector.init(candidates())
    clients = Answering({"loss": loss})
    for number in range(1, 4):
        cor_round(selector, state, number, clients)
    others = (10 + 13 + 14 + 15) / 4
    close(state.changes[0], [10, others, others, 13, 14, 15])
    others = (10 + 11 + 14 + 15) / 4
    close(state.changes[1], [10, 11, others, others, 14, 15])
    mute = Answering({"loss": lambda k, x: None, "trial": lambda k, x: None})
    told: list[str] = []
    for number in range(4, 7):
        assert len(cor_round(selector, state, number, mute, warn=told.append)) == 2
    assert len(state.changes) == 2
    assert told[0].startswith("selection: fedcor has no losses to learn from: no reply to loss")
    cor_round(selector, state, 7, clients)
    assert len(state.changes) == 2, "the losses before round 6 are not known"
    cor_round(selector, state, 8, clients)
    assert state.fitted
    assert state.asked == 8
    begun = len(mute.calls)
    for number in range(9, 17):
        cor_round(selector, state, number, mute, warn=told.append)
    assert [name for name, _ in mute.calls[begun:]] == ["trial"] * 2, "a trial that fails is not tried again at once"
    assert "selection: fedcor's trial round has failed: no reply to trial was accepted" in told
    assert len(state.changes) == 3


def test_a_change_over_several_rounds_is_no_observation() -> None:
    """Another selector has chosen rounds 2 and 3."""
    clients = Answering({"loss": lambda k, x: (10 + k) * float(x.floats[0])})
    selector = cor()
    state = selector.init(candidates())
    for number, observed in ((1, 0), (4, 0), (5, 1)):
        cor_round(selector, state, number, clients)
        assert len(state.changes) == observed


def test_a_dead_client_does_not_block_a_place_of_fedcor() -> None:
    selector = cor(beta=1.0, interval=100)
    at = candidates(n=5, sizes=[30, 50, 10, 40, 20], count=1)
    state = selector.init(at)
    state.fitted, state.x = True, torch.zeros_like(state.x)
    chosen = []
    for number in range(1, 6):
        chosen += selector.select(state, dataclasses.replace(at, round=number))
        selector.observe(state, at, Outcome(number, (chosen[-1],), ()))
    assert len(set(chosen[:3])) > 1
    assert int(state.missed.sum()) == 5
    selector.observe(state, at, Outcome(6, (1,), (1,)))
    assert int(state.missed[1]) == 0


def test_fedcor_finds_groups_and_takes_one_of_each() -> None:
    """Losses of clients 0 to 3 change together, and those of 4 and 5; a seventh's on its own."""
    loadings = torch.zeros(3, 7, dtype=torch.float64)
    loadings[0, :4], loadings[1, 4:6], loadings[2, 6] = 0.3, 0.3, 0.1
    selector = cor(warmup=25, first_steps=4000, dimension=5)
    at = candidates(n=7, count=2)
    state = selector.init(at)
    state.changes = normal(25, 3, seed=4) @ loadings + 0.01 * normal(25, 7, seed=5)
    state.of_round = torch.arange(1, 26)
    selector._fit(state, dataclasses.replace(at, round=25), selector.first_steps)
    sigma = state.x.T @ state.x
    correlation = sigma / sigma.diagonal().sqrt()[:, None] / sigma.diagonal().sqrt()
    assert float(correlation[:4, :4].min()) > 0.9
    assert float(correlation[4:6, 4:6].min()) > 0.9
    assert float(correlation[:4, 4:].abs().max()) < 0.5
    first, second = selector.select(state, at)
    assert first in range(4)
    assert second in (4, 5)
    proposed = Counter(tuple(selector.propose(state, at, rng(s))) for s in range(300))
    assert len(proposed) > 5
    apart = sum(n for (a, b), n in proposed.items() if a in range(4) and b in (4, 5)) / 300
    assert apart > 0.5, "uniformly drawn, 8 of 21"


# ---- what all three owe a run
def rounds_of(name: str, selector: Any, state: State, numbers: Sequence[int]) -> None:
    for number in numbers:
        if name == "favor":
            favor_round(selector, state, number, 0.1 * number)
        elif name == "fedmarl":
            marl_round(selector, state, number, 0.1 * number, seconds_of_round=60.0)
        else:
            clients = Answering(
                {"loss": lambda k, x: math.sin(k * float(x.floats[0])), "trial": lambda k, x: x.scale(2.0)}
            )
            cor_round(selector, state, number, clients)


def begun(name: str) -> tuple[Any, State]:
    selector: Any = {"favor": favor_at(), "fedmarl": marl(), "fedcor": cor()}[name]
    return selector, a_favor_state(selector, candidates()) if name == "favor" else selector.init(candidates())


NAMES = ["favor", "fedmarl", "fedcor"]


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_state_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    selector, state = begun(name)
    rounds_of(name, selector, state, range(1, 6))
    for other in (state.copy(), saved(state, tmp_path / "s")):
        before = hash_state(state.values)
        rounds_of(name, selector, other, range(6, 9))
        assert hash_state(state.values) == before, "a copy that goes on leaves this one alone"
        after = hash_state(other.values)
        again = state.copy()
        rounds_of(name, selector, again, range(6, 9))
        assert hash_state(again.values) == after != before


@pytest.mark.parametrize("name", NAMES)
def test_a_proposal_changes_nothing_and_draws_from_what_it_is_given(name: str) -> None:
    selector, state = begun(name)
    for numbers in ([], range(1, 6)):
        rounds_of(name, selector, state, numbers)
        before, globally = hash_state(state.values), torch.random.get_rng_state()
        own = rng(3)
        at = dataclasses.replace(candidates(round=7, task=marl_task()), rng=own)
        untouched = own.get_state()
        proposals = [selector.propose(state, at, rng(s)) for s in range(60)]
        assert all(p == sorted(set(p)) and len(p) == 2 and set(p) <= set(range(6)) for p in proposals)
        assert proposals == [selector.propose(state, at, rng(s)) for s in range(60)]
        assert len({tuple(p) for p in proposals}) > 3, "not always the same"
        assert hash_state(state.values) == before
        assert torch.equal(own.get_state(), untouched)
        assert torch.equal(torch.random.get_rng_state(), globally)


@pytest.mark.parametrize("name", NAMES)
def test_rounds_leave_the_global_generators_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    selector, state = begun(name)
    rounds_of(name, selector, state, range(1, 5))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
def test_one_client_alone_can_be_selected(name: str) -> None:
    selector, _ = begun(name)
    clients = Answering({"loss": lambda k, x: 1.0}, ids=[3])
    model = params(torch.zeros(20))
    at = candidates(ids=[3], count=1, num_clients=5, task=marl_task(), clients=clients, model=lambda: model)
    state = selector.init(at)
    assert selector.select(state, at) == [3]
    assert selector.propose(state, at, rng()) == [3]


# ---- whole runs
N, K, E = 6, 2, 2
TWO_MODELS = [{"name": "mlp", "hidden": [8]}, {"name": "mlp", "hidden": [4, 8]}]
FIELDS: dict[str, dict[str, Any]] = {
    "favor": {"hidden": [8], "components": 3, "target": 0.9},
    "fedmarl": {"probed": 5, "hidden": 8},
    "fedcor": {"warmup": 2, "interval": 2, "dimension": 3, "first_steps": 20, "steps": 10},
}


DEVICES = {"name": "scripted", "epoch_s": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}


def config(name: str, rounds: int = 5, **changes: Any) -> dict[str, Any]:
    """FedMarl goes by seconds: without devices that are simulated its runs are not repeated."""
    if name == "fedmarl":
        changes["devices"] = DEVICES
    made = small(
        rounds=rounds,
        clients={"num_clients": N, "per_round": K},
        local__epochs=E,
        selection={"name": name, **FIELDS[name]},
        **changes,
    )
    made["task"]["partition"] = {"name": "dirichlet", "alpha": 0.5}
    return made


def model_bytes(settings: dict[str, Any]) -> int:
    return 4 * build(load(settings)).task.layout.num_floats


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def kept(run: Path) -> Any:
    """What the selector keeps, of the last checkpoint."""
    found = Checkpoints(run / "checkpoints").newest()
    assert found is not None
    return found[1]["selector"]


def test_bytes_of_favor(tmp_path: Path) -> None:
    settings = config("favor")
    result = fldist.run(settings, output=tmp_path / "run")
    size, phases = model_bytes(settings), result["bytes"]["by_phase"]
    assert phases["setup"] == {"down": N * size, "up": N * size}
    assert "select" not in phases
    assert phases["train"] == {"down": 5 * K * size, "up": 5 * K * (size + 8)}
    state = kept(tmp_path / "run")
    assert state.scores.shape == (N + 1, 3)
    assert state.loadings.shape == (3, size // 4)
    assert [part.reward for part in state.memory] == [
        pytest.approx(64 ** (line["accuracy"] - 0.9) - 1) for line in lines(tmp_path / "run")
    ]
    prediction = predict(build(load(settings)))
    assert prediction.before["setup"] == phases["setup"]
    simulated = fldist.run({**config("favor", rounds=1), "devices": DEVICES}, output=tmp_path / "simulated")
    assert simulated["bytes"]["by_phase"]["setup"] == {"down": N * size, "up": N * (size + 40)}


def test_bytes_and_rewards_of_fedmarl(tmp_path: Path) -> None:
    settings = config("fedmarl", rounds=6)
    result = fldist.run(settings, output=tmp_path / "run")
    size, phases, told = model_bytes(settings), result["bytes"]["by_phase"], lines(tmp_path / "run")
    going_on = sum(line["selected"] for line in told)
    assert all(1 <= line["selected"] <= K for line in told)
    assert phases["select"] == {"down": 6 * 5 * size, "up": 6 * 5 * 16}
    assert phases["train"] == {"down": 0, "up": going_on * (size + 8 + 40)}
    state = kept(tmp_path / "run")
    rounds = [*state.memory, state.pending]
    accuracies = [line["accuracy"] for line in told]
    assert len(rounds) == 5
    for number, part in enumerate(rounds, start=1):
        probed = part.clients.tolist()
        went_on = [k for k, yes in zip(probed, part.actions.tolist(), strict=True) if yes]
        assert len(went_on) == told[number]["selected"]
        simulated = told[number]["simulated"]["seconds"]
        training = max(k + 1.0 for k in probed) + max((E - 1) * (k + 1.0) for k in went_on)
        assert training < simulated < training + 0.1, "the longest probe, the longest rest, and the exchange"
        gain = accuracies[number] - accuracies[number - 1]
        want = 10 * gain - 0.2 * simulated / state.unit - 0.1 * len(went_on)
        assert part.reward == pytest.approx(want, abs=1e-9)


def test_bytes_of_fedcor(tmp_path: Path) -> None:
    """Two rounds of warm-up: losses in rounds 1 to 3; a trial in rounds 5 and 7."""
    settings = config("fedcor", rounds=7)
    result = fldist.run(settings, output=tmp_path / "run")
    size, phases = model_bytes(settings), result["bytes"]["by_phase"]
    assert phases["select"] == {
        "down": 3 * N * size + 2 * (K * size + 2 * N * size),
        "up": 3 * N * 8 + 2 * (K * (size + 8) + 2 * N * 8),
    }
    assert phases["train"] == {"down": 7 * K * size, "up": 7 * K * (size + 8)}
    state = kept(tmp_path / "run")
    assert state.of_round.tolist() == [2, 3, 5, 7]
    assert state.asked == 7
    assert bool(state.changes.isfinite().all())
    first = lines(tmp_path / "run")[0]["bytes"]
    assert first["by_phase"]["select"] == {"down": N * size, "up": N * 8}
    assert predict(build(load(settings))).phases["select"] == {"down": N * size, "up": N * 8}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_run_again_on_several_ranks_and_after_a_resume(name: str, tmp_path: Path, hosts: Hosts) -> None:
    settings = config(name)
    alone = fldist.run(settings, output=tmp_path / "alone")
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert fldist.run(settings, output=tmp_path / "twice")["state_hash"] == alone["state_hash"]
    assert torch.equal(torch.random.get_rng_state(), before)
    ranks = run_here(load(settings), nproc=3, output=tmp_path / "ranks", spawn=hosts)
    assert ranks["state_hash"] == alone["state_hash"]
    assert ranks["bytes"]["by_phase"] == alone["bytes"]["by_phase"]
    for done in (2, 4):
        fldist.run({**settings, "rounds": done}, output=tmp_path / f"from{done}")
        resumed = fldist.resume(tmp_path / f"from{done}", ["rounds=5"])
        assert resumed["state_hash"] == alone["state_hash"]
    other = fldist.run({**settings, "seed": 1}, output=tmp_path / "other")
    assert other["state_hash"] != alone["state_hash"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("algorithm", ["scaffold", "fednova"])
def test_other_algorithms(name: str, algorithm: str, tmp_path: Path) -> None:
    result = fldist.run(config(name, rounds=4, algorithm={"name": algorithm}), output=tmp_path / "run")
    assert result["status"] == "finished"
    assert all(line["committed"] for line in lines(tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("fedmarl", {"local__epochs": 1}, r"local.epochs: 1, but fedmarl stops clients after the first epoch"),
        ("fedmarl", {"selection__probed": 1}, r"selection.probed: 1, but 2 clients .* use a number from 2 to 6"),
        ("fedmarl", {"selection__probed": 7}, r"selection.probed: 7, but 2 clients .* use a number from 2 to 6"),
        ("fedmarl", {"eval__every": 2}, r"eval.every: 2, but this selector goes by every round's accuracy"),
        ("favor", {"selection__target": 1.5}, r"selection.target: .*less than or equal to 1"),
        ("favor", {"selection__hidden": []}, r"selection.hidden"),
        ("favor", {"algorithm__name": "local"}, r"looks at the models .* Local do not"),
        (
            "favor",
            {"clients__models": TWO_MODELS, "algorithm__name": "lg_fedavg"},
            r"clients.models gives them dif",
        ),
        ("fedcor", {"clients__models": TWO_MODELS, "algorithm__name": "lg_fedavg"}, r"clients.models gives them d"),
        ("fedcor", {"algorithm__name": "local"}, r"this algorithm has no global model, which this selector goes by"),
        ("fedcor", {"selection__warmup": 0}, r"selection.warmup: .*greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused(name: str, changes: dict[str, Any], error: str, tmp_path: Path) -> None:
    settings = config(name)
    for key, value in changes.items():
        section, field = key.split("__")
        settings.setdefault(section, {})[field] = value
    with pytest.raises(ValueError, match=error):
        fldist.run(settings, output=tmp_path / "run")


def test_a_pool_of_all_three_proposes_for_fedgcs(tmp_path: Path) -> None:
    """FAVOR's setup and FedCor's warm-up travel; probes do not, and what clients report is learnt from."""
    settings = config("favor", rounds=4, devices=DEVICES)
    pool = [{"name": name, **FIELDS[name]} for name in NAMES]
    fitting = {"hidden": 8, "width": 8, "epochs": 2, "later_epochs": 1}
    settings["selection"] = {"name": "fedgcs", "pool": pool, "proposals": 4, "fitting": fitting}
    result = fldist.run(settings, output=tmp_path / "run")
    size, phases = model_bytes(settings), result["bytes"]["by_phase"]
    assert phases["setup"] == {"down": N * size, "up": N * (size + 40)}
    warm_up = FIELDS["fedcor"]["warmup"] + 1  # the losses of the initial model are the first
    assert phases["select"] == {"down": warm_up * N * size, "up": warm_up * N * 8}
    assert phases["train"] == {"down": 4 * K * size, "up": 4 * K * (size + 8 + 40)}
    of_favor, of_fedmarl, of_fedcor = kept(tmp_path / "run").pool
    assert len(of_favor.memory) == 4
    assert of_fedmarl.pending is not None
    assert not of_fedmarl.loss.isnan().all()
    assert of_fedcor.fitted
