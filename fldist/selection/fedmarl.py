"""FedMarl: S. Q. Zhang, J. Lin, Q. Zhang, "A Multi-agent Reinforcement Learning Approach for Efficient Client Selection
in Federated Learning", AAAI 2022, arXiv 2201.02932. M random clients train one epoch, a probe; an agent for each says
from what the probe has shown whether it goes on; those who do finish the other E - 1 epochs and send their models.

    s_n   = [loss, last probes' seconds, last uploads' seconds, B_n, n_n, r]     of agent n in round r
    Q_tot = sum_n Q(s_n, a_n)          a_n: stop or continue; Q: an MLP of two layers          `together`
    y     = r_r + gamma max_a Q_tot'   each agent's own largest, since Q_tot is additive       `best_together`
    loss  = (y - Q_tot)^2              on transitions drawn from a memory
    r_r   = w1 (V(acc_r) - V(acc_r-1)) - w2 H_r - w3 sum of the kept's B_n                     `team_reward`
    H_r   = longest probe of all M + longest rest and upload of the kept;  V(acc) = 10 acc
    S     = the agents of a_n = continue, the K of largest Q(continue) - Q(stop) where they are more, at least one;
            with probability epsilon an agent acts at random                                   `decided`

Messages of its own, in the phase `select` in each round (M = `probed`, 2 K by default; B_w bytes of a model):

    weights  down  M B_w     what the algorithm sends, to all who are probed, and to those who go on not again
    scalars  up    16 M      loss and seconds of the probe

Who goes on is told by the call that has them go on, which carries no kind. The algorithm's own call is left with its
replies: in `train`, weights up |S| B_w. A report is added to these replies (40 |S|).

Seconds are those of the section `devices` where it simulates them. H_r is then the simulated latency of the round; else
the longest probe and the longest rest by the clock, and what seconds are measured decides what is selected: only with
simulated devices or a scripted clock is a run repeated exactly. In Q and r_r they are in units of `unit_s`. What lasted
beside training in a round is taken for an upload of each of its clients; B_n = 1, since all send as much.

As a source of records: what it would do with M random clients, were their probes as they were last time; unknown ones
count as the mean. It learns from rounds that another has chosen as well: all clients that have ever reported are then
agents, of which the selected went on, and an epoch's share of their seconds stands for a probe.

How far this is certain: no code of its authors is known. Weights w are from memory; V, units, one network for all
agents (one each: `shared: false`), sizes, schedule of epsilon, target network and memory are of this project's making.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from fldist.algorithm import State
from fldist.data.task import Task
from fldist.q_learning import Mlp, improved, learner
from fldist.selection import Candidates, Outcome, Probe, Selector, uniform

LARGEST = 10.0
"""No figure of a state is larger: a loss, or a time in units of `unit_s`."""
ROUNDS = 100.0
"""Rounds that count as 1 in a state."""
UPLOAD_COST = 1.0
"""B_n, in models."""

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


# ---- what is learnt
def value(accuracy: float) -> float:
    """V."""
    return 10.0 * accuracy


def team_reward(
    accuracy: float, before: float, latency: float, costs: float, weights: tuple[float, float, float]
) -> float:
    """r_r of the accuracies after and before a round, its latency H_r, the sum of the kept's B_n, and w1, w2, w3."""
    w1, w2, w3 = weights
    return w1 * (value(accuracy) - value(before)) - w2 * latency - w3 * costs


def together(values: Tensor, actions: Tensor, there: Tensor) -> Tensor:
    """Q_tot [B] of B teams of agents' Q(s_n, .) [B, n, 2] and actions [B, n]; there [B, n]: False where no agent is."""
    return (values.gather(2, actions[:, :, None])[:, :, 0] * there).sum(dim=1)


def best_together(values: Tensor, there: Tensor) -> Tensor:
    """The largest Q_tot [B] of any joint action: the sum of each agent's largest."""
    return (values.amax(dim=2) * there).sum(dim=1)


def known(figures: Tensor) -> Tensor:
    """Figures [N, c], at most 10, of which NaN is replaced by the mean of its column's others, 0 without any."""
    there = ~figures.isnan()
    mean = figures.nansum(dim=0) / there.sum(dim=0).clamp(min=1)
    return torch.where(there, figures, mean).clamp(0.0, LARGEST)


def noted(rows: Tensor, new: Mapping[int, float]) -> Tensor:
    """Rows [N, history], newest first, with some clients' new figures; the first fills its row."""
    rows = rows.clone()
    for k, figure in new.items():
        rows[k] = torch.cat([rows.new_tensor([figure]), rows[k, :-1]]) if not rows[k, 0].isnan() else figure
    return rows


def decided(values: Tensor, at_random: Tensor, count: int) -> Tensor:
    """Which agents go on, bool [n]: at most `count`, and at least one.

    values: Q(s_n, stop) and Q(s_n, continue) [n, 2]; at_random [n]: 0 or 1 for one that acts so whatever its values
    are, -1 for the others.
    """
    advantage = values[:, 1] - values[:, 0]
    wants = torch.where(at_random < 0, advantage > 0, at_random == 1)
    order = torch.where(wants, advantage, -math.inf).argsort(descending=True, stable=True)
    number = min(int(wants.sum()), count)
    kept = torch.zeros_like(wants)
    kept[order[:number] if number else advantage.argmax()] = True
    return kept


def filled(proposed: Tensor, advantage: Tensor, count: int) -> Tensor:
    """Agents that go on, bool [n], with those of largest advantage added until they are `count`."""
    order = torch.where(proposed, math.inf, advantage).argsort(descending=True, stable=True)
    kept = torch.zeros_like(proposed)
    kept[order[:count]] = True
    return kept


class _Teams(NamedTuple):
    """The agents of B rounds, n of each, which may be fewer: their clients, what they saw and did, who is there."""

    clients: Tensor  # [B, n]
    seen: Tensor  # [B, n, F]
    actions: Tensor  # [B, n]
    there: Tensor  # bool [B, n]

    @classmethod
    def of(cls, rounds: Sequence[tuple[Tensor, Tensor, Tensor]]) -> _Teams:
        """Of each round's own clients, what they saw and did."""
        there = [torch.ones(len(clients), dtype=torch.bool) for clients, _, _ in rounds]
        return cls(*(pad_sequence(list(part), batch_first=True) for part in (*zip(*rounds, strict=True), there)))

    def drawn(self, rows: Tensor) -> _Teams:
        """Some of the rounds."""
        return _Teams(*(part[rows] for part in self))


@dataclass(frozen=True)
class FedMarl(Selector):
    """Probes, and agents that stop those who do not pay."""

    wants_accuracy: ClassVar[bool] = True
    wants_reports: ClassVar[bool] = True
    probes: ClassVar[bool] = True

    probed: Count | None = None  # M; null: 2 K, at most as many as there are
    w1: NonNegative = 1.0  # weight of the gain in accuracy, ten times its share
    w2: NonNegative = 0.2  # weight of a round's latency, in units
    w3: NonNegative = 0.1  # weight of a model's upload
    unit_s: Positive | None = None  # seconds that count as 1; null: the mean training of the first clients
    history: Count = 3  # probes and uploads whose seconds an agent sees
    shared: bool = True  # one network for all agents, or one for each client
    hidden: Count = 64  # units of the network's first layer
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.9
    lr: Positive = 1e-3  # Adam's
    memory: Count = 200  # rounds that are remembered
    batch_size: Count = 16  # of these in a step
    updates: Count = 10  # steps after each round
    copy_every: Count = 10  # steps after which Q' becomes Q
    epsilon: Share = 1.0  # in the first round
    epsilon_decay: Annotated[float, Field(gt=0, le=1)] = 0.9  # factor a round
    epsilon_min: Share = 0.05

    def check(self, task: Task) -> None:
        """Refuse a training of one epoch, of which nothing is left after a probe."""
        if task.local.epochs < 2:
            raise ValueError(
                f"local.epochs: {task.local.epochs}, but fedmarl stops clients after the first epoch, which saves "
                "nothing; use 2 or more, or another selector"
            )

    def init(self, candidates: Candidates) -> State:
        """loss [N], probe_s, upload_s [N, history], newest first: what is known of each client, NaN where nothing is;
        unit: seconds, None until the first are known; accuracy: of the last round; q: networks [A, P]; deciding: the
        agents of this round, what they saw and did; pending: those of the last one with their reward; memory: earlier
        ones with what was seen next, oldest first."""
        K, able, n = candidates.count, len(candidates.ids), candidates.num_clients
        if self.probed is not None and not K <= self.probed <= able:
            raise ValueError(
                f"selection.probed: {self.probed}, but {K} clients are selected in a round, of {able} with samples; "
                f"use a number from {K} to {able}, or leave it out"
            )
        return State(
            loss=torch.full((n,), math.nan, dtype=torch.float64),
            probe_s=torch.full((n, self.history), math.nan, dtype=torch.float64),
            upload_s=torch.full((n, self.history), math.nan, dtype=torch.float64),
            unit=self.unit_s,
            accuracy=None,
            q=learner(self._form, candidates.rng, 1 if self.shared else n),
            deciding=None,
            pending=None,
            memory=[],
        )

    @property
    def _form(self) -> Mlp:
        return Mlp((4 + 2 * self.history, self.hidden, 2))

    def _num_probed(self, candidates: Candidates) -> int:
        """M."""
        K = candidates.count
        return min(max(self.probed or 2 * K, K), len(candidates.ids))

    # ---- a round of its own
    def select(self, state: State, candidates: Candidates) -> list[int]:
        """M clients at random, to be probed."""
        return self._drawn(candidates, candidates.rng)

    def _drawn(self, candidates: Candidates, rng: Generator) -> list[int]:
        return uniform(candidates, self._num_probed(candidates), rng)

    def keep(self, state: State, candidates: Candidates, probes: Mapping[int, Probe]) -> list[int]:
        """Those of the probed whose agents have them go on."""
        clients = sorted(probes)
        self._note(state, candidates, {k: p.seconds for k, p in probes.items()}, {k: p.loss for k, p in probes.items()})
        seen = self._seen(state, candidates, clients)
        self._complete(state, clients, seen)
        at_random = self._at_random(candidates, len(clients), candidates.rng)
        goes_on = decided(self._values(state, clients, seen), at_random, candidates.count)
        state.deciding = State(round=candidates.round, clients=torch.tensor(clients), seen=seen, actions=goes_on.long())
        return [k for k, yes in zip(clients, goes_on.tolist(), strict=True) if yes]

    def _at_random(self, candidates: Candidates, agents: int, rng: Generator) -> Tensor:
        """For each agent -1, or with probability epsilon 0 or 1."""
        epsilon = max(self.epsilon_min, self.epsilon * self.epsilon_decay ** (candidates.round - 1))
        explores = torch.rand(agents, generator=rng, dtype=torch.float64) < epsilon
        return torch.where(explores, torch.randint(2, (agents,), generator=rng), -1)

    def _values(self, state: State, clients: Sequence[int], seen: Tensor) -> Tensor:
        """Q(s_n, .) [n, 2]."""
        with torch.no_grad():
            return self._q(state.q.weights, torch.tensor(clients), seen)

    def _q(self, weights: Tensor, clients: Tensor, seen: Tensor) -> Tensor:
        return self._form(weights[0] if self.shared else weights[clients], seen)

    def propose(self, state: State, candidates: Candidates, rng: Generator) -> list[int]:
        """K of M random clients, by their last probes."""
        clients = self._drawn(candidates, rng)
        values = self._values(state, clients, self._seen(state, candidates, clients))
        kept = decided(values, self._at_random(candidates, len(clients), rng), candidates.count)
        kept = filled(kept, values[:, 1] - values[:, 0], candidates.count)
        return [k for k, yes in zip(clients, kept.tolist(), strict=True) if yes]

    # ---- what agents see
    def _seen(self, state: State, candidates: Candidates, clients: Sequence[int]) -> Tensor:
        """s_n, float32 [n, 4 + 2 history]."""
        n, ids = candidates.num_clients, torch.tensor(clients, dtype=torch.int64)
        sizes = torch.zeros(n, dtype=torch.float64)
        sizes[torch.tensor(candidates.ids)] = torch.tensor(candidates.sizes, dtype=torch.float64)
        sizes *= len(candidates.sizes) / sum(candidates.sizes)
        unit = state.unit or 1.0
        heard = torch.cat([state.loss[:, None], state.probe_s / unit, state.upload_s / unit], dim=1)
        told = torch.stack([torch.full((n,), UPLOAD_COST), sizes, torch.full((n,), candidates.round / ROUNDS)], dim=1)
        return torch.cat([known(heard), told], dim=1)[ids].float()

    def _note(
        self, state: State, candidates: Candidates, seconds: Mapping[int, float], losses: Mapping[int, float]
    ) -> None:
        """Note seconds, not those that are no numbers, and losses of a first epoch of some clients."""
        seconds = {k: s for k, s in seconds.items() if math.isfinite(s)}
        state.probe_s = noted(state.probe_s, seconds)
        loss = state.loss.clone()
        for k, new in losses.items():
            loss[k] = new if math.isfinite(new) else LARGEST
        state.loss = loss
        if state.unit is None and math.fsum(seconds.values()) > 0:
            state.unit = self._epochs(candidates) * math.fsum(seconds.values()) / len(seconds)

    def _epochs(self, candidates: Candidates) -> int:
        """E."""
        return 1 if candidates.task is None else candidates.task.local.epochs

    # ---- learning
    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        """Give the agents of the round their reward, note what is known now, and learn."""
        acting, before = self._acting(state, candidates, outcome), state.accuracy
        own = state.deciding is not None
        longest_probe = float(state.probe_s[acting.clients, 0].max()) if own else 0.0
        seconds = {k: r.seconds for k, r in outcome.reports.items() if math.isfinite(r.seconds)}
        longest = max(seconds.values(), default=0.0)
        latency = longest_probe + longest if outcome.seconds is None else outcome.seconds
        upload_s = max(0.0, latency - longest_probe - longest)
        state.upload_s = noted(state.upload_s, dict.fromkeys(outcome.replied, upload_s))
        if not own:
            epoch_s = {k: s / self._epochs(candidates) for k, s in seconds.items()}
            losses = {k: r.loss for k, r in outcome.reports.items() if not math.isnan(r.loss)}
            self._note(state, candidates, epoch_s, losses)
        state.deciding = None
        if outcome.accuracy is None or not outcome.replied:
            return
        state.accuracy = outcome.accuracy
        if before is not None and len(acting.clients):
            costs = UPLOAD_COST * len(outcome.replied)
            reward = team_reward(
                outcome.accuracy, before, latency / (state.unit or 1.0), costs, (self.w1, self.w2, self.w3)
            )
            state.pending = State(clients=acting.clients, seen=acting.seen, actions=acting.actions, reward=reward)
            candidates.log(fedmarl_reward=reward)
        if state.memory and not candidates.predicting:
            state.q = self._learnt(state, candidates)

    def _acting(self, state: State, candidates: Candidates, outcome: Outcome) -> State:
        """The agents of the round, what they saw and did: its own, or in another's round all clients that are known."""
        if state.deciding is not None:
            deciding: State = state.deciding
            return deciding
        clients = [k for k in candidates.ids if not math.isnan(state.loss[k])]
        seen = self._seen(state, candidates, clients)
        if clients:
            self._complete(state, clients, seen)
        chosen = set(outcome.selected)
        actions = torch.tensor([int(k in chosen) for k in clients], dtype=torch.int64)
        return State(clients=torch.tensor(clients, dtype=torch.int64), seen=seen, actions=actions)

    def _complete(self, state: State, clients: Sequence[int], seen: Tensor) -> None:
        """Remember the last round, now that it is known what agents see after it."""
        if state.pending is not None:
            whole = State(**state.pending.values, next_clients=torch.tensor(clients), next_seen=seen)
            state.memory, state.pending = [*state.memory, whole][-self.memory :], None

    def _learnt(self, state: State, candidates: Candidates) -> State:
        """Q after some steps on rounds drawn from the memory."""
        q: State = state.q
        now = _Teams.of([(part.clients, part.seen, part.actions) for part in state.memory])
        then = _Teams.of([(p.next_clients, p.next_seen, torch.zeros_like(p.next_clients)) for p in state.memory])
        rewards = torch.tensor([part.reward for part in state.memory])
        for _ in range(self.updates):
            rows = torch.randint(len(rewards), (self.batch_size,), generator=candidates.rng)
            drawn, after = now.drawn(rows), then.drawn(rows)
            with torch.no_grad():
                best = best_together(self._of_teams(q.target, after), after.there)
                targets = rewards[rows] + self.gamma * best

            def loss(weights: Tensor) -> Tensor:
                total = together(self._of_teams(weights, drawn), drawn.actions, drawn.there)  # noqa: B023
                return (targets - total).square().mean()  # noqa: B023

            q = improved(q, loss, self.lr, self.copy_every)
        return q

    def _of_teams(self, weights: Tensor, teams: _Teams) -> Tensor:
        """Q(s_n, .) [B, n, 2]."""
        values = self._q(weights, teams.clients.flatten(), teams.seen.flatten(0, 1))
        return values.view(*teams.clients.shape, 2)
