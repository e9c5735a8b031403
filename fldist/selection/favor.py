"""FAVOR: H. Wang, Z. Kaplan, D. Niu, B. Li, "Optimizing Federated Learning on Non-IID Data with Reinforcement
Learning", INFOCOM 2020. A deep Q-network chooses by what the clients' models look like: weights tell of the data.

    z_i = L (w_i - m)                          d principal components of weights w_i; L, m are fitted once, on the N
                                               models of one epoch from the initial one               `fit`, `project`
    s   = [z_0, z_1 .. z_N]                    of the global model, and of every client's model last seen
    r   = 64^(acc - target) - 1                in (-1, 0] up to the target                            `reward`
    y   = r + gamma Q'(s', argmax_a Q(s', a))  double Q-learning; Q is an MLP of N outputs            `double_targets`
    S   = the K clients of largest Q(s, .)     each place is drawn uniformly with probability epsilon

Messages of its own, once, in the phase `setup` (N clients with samples, B_w bytes of a model):

    weights  down  N B_w    the initial model
    weights  up    N B_w    after one epoch as the section `local` has it; a report, 40 N, where `devices` simulates

After that it reads what comes back anyway: only the entries of the global model and of those who replied change. The
training parameters are w, buffers are left out. Before the first round the models of clients that have not answered
are taken to be the initial one.

State: L and m (4 (d + 1) P bytes for P weights: to keep the N models instead would be no smaller, and L cannot be made
again without them), the scores [N + 1, d], Q, Q', Adam's moments and the memory, all of which decide what comes next.

As a source of records it samples without replacement from softmax(Q / tau_q). It learns from every round, whoever has
chosen its clients: one transition for each client that replied, or for the first alone (`transitions: first`).

How far this is certain: sizes of layers, gamma, memory and learning rate are those of public re-implementations, the
agent there being trained over many runs; here it learns within the run, from its first round on. They keep as many
components as there are clients; here `components` are kept, at most N. Exploration is of this project's making: the
paper's agent picks one client a round while it is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor

from fldist.algorithm import Me, State, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import collect
from fldist.kinds import Weights
from fldist.params import Params
from fldist.q_learning import Mlp, improved, learner
from fldist.selection import Candidates, Outcome, Selector

CHUNK = 1 << 14
"""Weights that are worked on at a time, of all models, while components are fitted."""

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


# ---- what models look like
def fit(models: Sequence[Tensor], components: int) -> tuple[Tensor, Tensor]:
    """The mean m [P] and the loadings L [d, P] of n models [P], float32: the principal components, largest first.

    They are had from the n x n matrix of inner products, so that P may be large. Rows beyond the rank are 0. Of each
    component, the model that lies farthest along it lies on its positive side.
    """
    gram = sum(part @ part.T for _, part in _centred(models))
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    farthest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))[0]
    least = float(values[0]) * len(models) * torch.finfo(torch.float64).eps
    scale = torch.where(values > least, farthest.sign() / values.clamp(min=1e-300).sqrt(), 0.0)
    turned = (vectors * scale).T  # [d, n]
    means, loadings = [], []
    for mean, part in _centred(models):
        means.append(mean.float())
        loadings.append((turned @ part).float())
    missing = torch.zeros(components - len(turned), len(models[0]))
    return torch.cat(means), torch.cat([torch.cat(loadings, dim=1), missing])


def _centred(models: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The means [c] of some weights, and the models' differences from them [n, c], float64, until all were given."""
    for start in range(0, len(models[0]), CHUNK):
        part = torch.stack([model[start : start + CHUNK] for model in models]).double()
        mean = part.mean(dim=0)
        yield mean, part - mean


def project(model: Tensor, mean: Tensor, loadings: Tensor) -> Tensor:
    """z, float32 [d], of a model [P]."""
    return loadings @ (model - mean)


# ---- what is learnt
def reward(accuracy: float, target: float) -> float:
    """r of a round that ended with this accuracy."""
    return float(64.0 ** (accuracy - target)) - 1.0


def double_targets(rewards: Tensor, after: Tensor, after_target: Tensor, gamma: float) -> Tensor:
    """y [B] of rewards [B] and of Q(s', .) and Q'(s', .) [B, A]: Q chooses the next action, Q' values it."""
    best = after.argmax(dim=1, keepdim=True)
    return rewards + gamma * after_target.gather(1, best)[:, 0]


def sampled(values: Tensor, count: int, temperature: float, rng: Generator) -> list[int]:
    """Positions of `count` of the values [A], drawn without replacement from softmax(values / temperature), ascending.

    The largest of values / temperature + Gumbel noise are such a draw.
    """
    noise = -torch.empty(len(values), dtype=torch.float64).exponential_(generator=rng).log()
    return sorted((values.double() / temperature + noise).topk(count).indices.tolist())


class Trained(NamedTuple):
    """A client's model after one epoch."""

    y: Weights


@dataclass(frozen=True)
class Favor(Selector):
    """The K clients of largest Q, explored by chance."""

    wants_accuracy: ClassVar[bool] = True
    wants_models: ClassVar[bool] = True

    target: Annotated[float, Field(gt=0, le=1)] = 0.99  # accuracy; published: 0.99 for MNIST
    components: Count = 10  # d, at most as many as there are clients
    hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (512, 512)
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.95
    lr: Positive = 1e-4  # Adam's
    memory: Count = 200  # transitions that are remembered
    batch_size: Count = 4
    updates: Count = 10  # steps of the Q-network after each round
    copy_every: Count = 10  # c, steps after which Q' becomes Q
    transitions: Literal["each", "first"] = "each"  # of a round: one for each client that replied, or for the first
    exploration: Literal["epsilon", "softmax"] = "epsilon"  # softmax: sample as for records
    epsilon: Share = 1.0  # in the first round
    epsilon_decay: Annotated[float, Field(gt=0, le=1)] = 0.9  # factor a round
    epsilon_min: Share = 0.05
    tau_q: Positive = 0.1  # temperature of softmax(Q / tau_q)

    def check(self, task: Task) -> None:
        """Refuse clients with networks of several forms, whose weights have no common components."""
        if len(task.architectures) > 1:
            raise ValueError(
                "selection.name: favor compares the clients' weights, and clients.models gives them different "
                "networks; give all the same, or use another selector, such as oort"
            )

    def init(self, candidates: Candidates) -> State:
        """Random Q; m, L: None until they are fitted; scores [N + 1, d], the global model's first; memory: of every
        round, oldest first, the state before and after, who acted and the reward; missed [N]: how often in a row a
        client was selected and did not reply."""
        d = min(self.components, len(candidates.ids))
        return State(
            mean=None,
            loadings=None,
            scores=torch.zeros(candidates.num_clients + 1, d),
            memory=[],
            missed=torch.zeros(candidates.num_clients, dtype=torch.int64),
            q=learner(self._form(candidates), candidates.rng),
        )

    def _form(self, candidates: Candidates) -> Mlp:
        d = min(self.components, len(candidates.ids))
        return Mlp(((candidates.num_clients + 1) * d, *self.hidden, candidates.num_clients))

    def setup(self, state: State, candidates: Candidates) -> None:
        """Fit the components on the models that all clients make of the initial one in an epoch."""
        assert candidates.clients is not None
        x = candidates.model()
        got = candidates.clients.all().call(self.first_epoch, x=x, fold={"y": collect()})
        models = {k: y.trainable.floats for k, y in got.y.items() if bool(y.trainable.floats.isfinite().all())}
        if candidates.predicting:
            return
        if len(models) < 2:
            candidates.warn(
                f"selection: favor needs the models of two clients to compare, and has {len(models)}: all look alike"
            )
            return
        state.mean, state.loadings = fit(list(models.values()), state.scores.shape[1])
        scores = self.digest(state, x).repeat(candidates.num_clients + 1, 1)
        for k, model in models.items():
            scores[k + 1] = project(model, state.mean, state.loadings)
        state.scores = scores

    @on_client
    def first_epoch(self, me: Me, data: ClientData, x: Weights) -> Trained:
        """One epoch of local training."""
        return Trained(data.train(x, epochs=1).params)

    def select(self, state: State, candidates: Candidates) -> list[int]:
        """The K largest, or a draw."""
        values, rng, K = self._values(state, candidates), candidates.rng, candidates.count
        if self.exploration == "softmax":
            chosen = sampled(values, K, self.tau_q, rng)
        else:
            epsilon = max(self.epsilon_min, self.epsilon * self.epsilon_decay ** (candidates.round - 1))
            free = int((torch.rand(K, generator=rng, dtype=torch.float64) < epsilon).sum())
            best = values.argsort(descending=True, stable=True).tolist()
            left = sorted(best[K - free :])
            drawn = torch.randperm(len(left), generator=rng)[:free].tolist()
            chosen = sorted([*best[: K - free], *(left[i] for i in drawn)])
        return [candidates.ids[i] for i in chosen]

    def propose(self, state: State, candidates: Candidates, rng: Generator) -> list[int]:
        """A sample from softmax(Q / tau_q)."""
        values = self._values(state, candidates)
        return [candidates.ids[i] for i in sampled(values, candidates.count, self.tau_q, rng)]

    def _values(self, state: State, candidates: Candidates) -> Tensor:
        """Q(s, .) of the candidates, float64; f rounds of silence leave 2^-f of what a client is above the least."""
        ids = torch.tensor(candidates.ids)
        with torch.no_grad():
            values = self._form(candidates)(state.q.weights[0], state.scores.reshape(1, -1))[0, ids].double()
        silent: Tensor = state.missed[ids]
        return values.min() + (values - values.min()) * 0.5**silent

    def digest(self, state: State, model: Params) -> Tensor:
        """z of a model, float32 [d]; zeros while there are no components."""
        if state.loadings is None:
            return torch.zeros(state.scores.shape[1])
        return project(model.trainable.floats, state.mean, state.loadings)

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        """Renew the entries of those who replied, remember the round, and learn."""
        before = state.scores.flatten()
        scores, missed = state.scores.clone(), state.missed.clone()
        for k, z in outcome.models.items():
            if bool(z.isfinite().all()):
                scores[k + 1] = z
        z = self.digest(state, candidates.model())
        if bool(z.isfinite().all()):
            scores[0] = z
        missed[list(outcome.selected)] += 1
        missed[list(outcome.replied)] = 0
        state.scores, state.missed = scores, missed
        acted = outcome.replied if self.transitions == "each" else outcome.replied[:1]
        if acted and outcome.accuracy is not None:
            of_round = State(
                before=before,
                after=scores.flatten(),
                actions=torch.tensor(acted),
                reward=reward(outcome.accuracy, self.target),
            )
            candidates.log(favor_reward=of_round.reward)
            state.memory = self._remembered([*state.memory, of_round])
        if state.memory and not candidates.predicting:
            state.q = self._learnt(state, candidates)

    def _remembered(self, memory: list[State]) -> list[State]:
        """The newest rounds that have no more transitions together than are remembered, and at least the last."""
        total = sum(len(part.actions) for part in memory)
        while len(memory) > 1 and total > self.memory:
            total -= len(memory[0].actions)
            memory = memory[1:]
        return memory

    def _learnt(self, state: State, candidates: Candidates) -> State:
        """Q after some steps on transitions drawn from the memory."""
        form, able = self._form(candidates), torch.tensor(candidates.ids)
        q: State = state.q
        actions = torch.cat([part.actions for part in state.memory])
        of_round = torch.cat([torch.full_like(part.actions, i) for i, part in enumerate(state.memory)])
        before = torch.stack([part.before for part in state.memory])
        after = torch.stack([part.after for part in state.memory])
        rewards = torch.tensor([part.reward for part in state.memory])
        for _ in range(self.updates):
            rows = torch.randint(len(actions), (self.batch_size,), generator=candidates.rng)
            rounds, chosen = of_round[rows], actions[rows]
            with torch.no_grad():
                now, then = form(q.weights[0], after[rounds]), form(q.target[0], after[rounds])
                targets = double_targets(rewards[rounds], now[:, able], then[:, able], self.gamma)

            def loss(weights: Tensor) -> Tensor:
                values = form(weights[0], before[rounds]).gather(1, chosen[:, None])[:, 0]  # noqa: B023
                return (targets - values).square().mean()  # noqa: B023

            q = improved(q, loss, self.lr, self.copy_every)
        return q
