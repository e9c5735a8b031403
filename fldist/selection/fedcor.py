"""FedCor: M. Tang, X. Ning, Y. Wang, J. Sun, Y. Wang, H. Li, Y. Chen, "FedCor: Correlation-Based Active Client
Selection Strategy for Heterogeneous Federated Learning", CVPR 2022. How the losses of all clients change in a round is
a Gaussian process, whose covariance tells which clients' training brings down the losses of many.

    y_e   = l(x') - l(x)                      the N clients' losses after and before a round, in observation e
    mu    = sum_e c_e y_e / sum_e c_e         c_e = gamma^(age of e in rounds)                    `discounted_mean`
    Sigma = X'X + s^2 I                       X [15, N], s = 0.01; `normalised`: of columns sigma_f X_i / |X_i|
    X     <- argmin sum_e -c_e ln N(y_e; mu, Sigma)      by Adam                                  `likelihood`, `fit`
    k     = argmax a_k sum_i omega_i Sigma_ik / sqrt(Sigma_kk)    K times, over those left        `Covariance.gains`
    Sigma <- Sigma - Sigma_.k Sigma_k. / Sigma_kk                 after each                      `Covariance.given`
    a_k   <- beta a_k                         after each round in which k ran; 1 when X is fitted

omega_i is client i's share of the samples. Selection is at random while there are fewer than w observations (warm-up).

Messages of its own, in the phase `select` (N clients with samples, B_w bytes of a model):

    weights  down  N B_w          in rounds 1 to w + 1: the global model; after that every Delta rounds, twice: the
                                  global model and the trial's, 2 N B_w
    scalars  up    8 N            with each: the losses on the clients' training samples
    weights  both  2 K B_w        every Delta rounds: K random clients train as the section `local` has it; their mean
    scalars  up    8 K            with each: n_i, the weights of this mean, which is the trial model; a report, 40 K,
                                  where the section `devices` simulates

So w + 1 times N (B_w + 8), the losses of the initial model being the first, and every Delta rounds 2 N (B_w + 8) +
K (2 B_w + 8); the published count leaves out the losses of the global model, from which the trial's are the change.

State: X, sigma_f, all observations that are younger than `history` rounds, and the annealing factors.

As a source of records, each of the K is drawn with the probabilities softmax(gains / (tau times their deviation)) from
the present covariance in place of the largest gain, and Sigma is conditioned on it as above; in the warm-up, uniformly.
Where another chooses it has its warm-up, and no trial rounds after it.

How far this is certain: the authors' code was read. There the warm-up has one round more, the trial's models are
averaged without weights, and N x N matrices are inverted; here all of it is of rank 15 and the same to rounding. A
client whose loss is not known is taken to have changed as the others have in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor

from fldist.algorithm import Me, State, TooFewReplies, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Mean
from fldist.kinds import Scalar, Weights
from fldist.params import Params
from fldist.selection import Candidates, Outcome, Selector, uniform

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, le=1)]


# ---- the Gaussian process
def discounted_mean(changes: Tensor, weights: Tensor) -> Tensor:
    """mu [N] of observations y [E, N] with weights c [E]."""
    return weights @ changes / weights.sum()


def likelihood(x: Tensor, deviations: Tensor, weights: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """-sum_e c_e ln N(y_e; mu, X'X + s^2 I), and its gradient with respect to X [d, N]; all float64.

    deviations: y_e - mu [E, N]; weights: c [E]; noise: s. With A = XX' + s^2 I [d, d], B = A^-1 X and the rows
    z_e = (y_e - X'B y_e) / s^2 of Sigma^-1 y_e, the gradient is sum_e c_e (B - B y_e z_e'), and ln|Sigma| =
    ln|A| + (N - d) ln s^2.
    """
    d, n = x.shape
    root = torch.linalg.cholesky(x @ x.T + noise**2 * torch.eye(d, dtype=x.dtype))
    b = torch.cholesky_solve(x, root)
    along = b @ deviations.T  # [d, E]
    z = (deviations - along.T @ x) / noise**2
    total = weights.sum()
    log_det = 2 * root.diagonal().log().sum() + (n - d) * 2 * math.log(noise)
    value = 0.5 * (weights @ (deviations * z).sum(dim=1) + total * (log_det + n * math.log(2 * math.pi)))
    return value, total * b - (along * weights) @ z


def columns(x: Tensor, scale: Tensor) -> Tensor:
    """The X of the normalised variant: sigma_f X_i / |X_i|, so that every Sigma_ii is sigma_f^2 + s^2."""
    return x / x.square().sum(dim=0).sqrt() * scale


def fit(
    x: Tensor, scale: Tensor, deviations: Tensor, weights: Tensor, *, noise: float, steps: int, lr: float,
    normalised: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """X [d, N] and sigma_f [] after Adam steps down `likelihood`, of which sigma_f is only moved if `normalised`."""
    x, scale = x.clone(), scale.clone()
    optimizer = torch.optim.Adam([x, scale] if normalised else [x], lr=lr)
    for _ in range(steps):
        if normalised:
            lengths = x.norm(dim=0)
            unit = x / lengths
            _, gradient = likelihood(scale * unit, deviations, weights, noise)
            scale.grad = (gradient * unit).sum()
            x.grad = scale * (gradient - unit * (gradient * unit).sum(dim=0)) / lengths
        else:
            _, x.grad = likelihood(x, deviations, weights, noise)
        optimizer.step()
    return x.detach(), scale.detach()


@dataclass(frozen=True)
class Covariance:
    """Sigma = X'PX + s^2 I of the N clients, of which the rows and columns of those not `left` are 0.

    x: X [d, N]; px: PX, where P = I until it is conditioned on a client; noise: s.
    """

    x: Tensor
    px: Tensor
    left: Tensor  # bool [N]
    noise: float

    @classmethod
    def of(cls, x: Tensor, noise: float) -> Covariance:
        """X'X + s^2 I."""
        return cls(x, x, torch.ones(x.shape[1], dtype=torch.bool), noise)

    def row(self, k: int) -> Tensor:
        """Sigma_k. [N]."""
        row = self.x[:, k] @ self.px
        row[k] += self.noise**2
        return row * (self.left & self.left[k])

    def given(self, k: int) -> Covariance:
        """Sigma - Sigma_.k Sigma_k. / Sigma_kk."""
        row = self.row(k)
        left = self.left.clone()
        left[k] = False
        return replace(self, px=self.px - self.px[:, k, None] * (row / row[k]), left=left)

    def gains(self, weights: Tensor, factors: Tensor) -> Tensor:
        """a_k sum_i omega_i Sigma_ik / sqrt(Sigma_kk) [N], the sum over those left; -inf for the others."""
        omega = weights * self.left
        together = (self.x @ omega) @ self.px + self.noise**2 * omega
        diagonal = (self.x * self.px).sum(dim=0) + self.noise**2
        return torch.where(self.left, factors * together / diagonal.sqrt(), -math.inf)


def spared(gains: Tensor, silent: Tensor) -> Tensor:
    """Gains [N] of which 2^-f is left above the least after f rounds of silence; -inf stays."""
    least = gains[gains > -math.inf].min()
    return torch.where(gains > -math.inf, least + (gains - least) * 0.5**silent, -math.inf)


# ---- what travels
class Loss(NamedTuple):
    """How a model does on a client's training samples."""

    loss: Scalar


class Trained(NamedTuple):
    """A client's model of a trial round."""

    y: Weights
    n: Scalar


@dataclass(frozen=True)
class FedCor(Selector):
    """Clients whose loss changes go with those of many."""

    warmup: Count = 15  # w, observations before the covariance selects; published: 15 and 20
    interval: Count = 10  # Delta, rounds between trial rounds; published: 10 and 50
    dimension: Count = 15  # d, rows of X
    normalised: bool = False  # correlations of one common variance
    noise: Positive = 0.01  # s
    gamma: Factor = 0.95  # discount of an observation by round; published: 0.95 and 0.99
    history: Count = 100  # rounds after which an observation is forgotten; published: 100 and 500
    beta: Factor = 0.9  # annealing of a client that has run
    first_steps: Count = 1000  # Adam's, after the warm-up
    steps: Count = 100  # Adam's, after each trial round
    lr: Positive = 0.01  # Adam's
    tau: Positive = 0.5  # of the draw of records, in deviations of the gains

    def check(self, task: Task) -> None:
        """Refuse clients without the global model's losses."""
        if len(task.architectures) > 1:
            raise ValueError(
                "selection.name: fedcor asks all clients for the loss of one model, and clients.models gives them "
                "different networks; give all the same, or use another selector, such as oort"
            )

    def init(self, candidates: Candidates) -> State:
        """x [d, N], scale []: X and sigma_f at random; changes [E, N], of_round [E]: the observations; losses [N]: of
        the global model before the round `at` (None: not known; NaN: of a client that has not said); fitted: the round
        before which X was last fitted, 0: never; factors [N]: a; missed [N]: how often in a row a client was selected
        and did not reply. By client, float64."""
        n = candidates.num_clients
        x = torch.randn(self.dimension, n, dtype=torch.float64, generator=candidates.rng)
        return State(
            x=x / math.sqrt(self.dimension),
            scale=torch.ones((), dtype=torch.float64),
            changes=torch.zeros(0, n, dtype=torch.float64),
            of_round=torch.zeros(0, dtype=torch.int64),
            losses=None,
            at=0,
            fitted=False,
            asked=0,
            factors=torch.ones(n, dtype=torch.float64),
            missed=torch.zeros(n, dtype=torch.int64),
        )

    # ---- observations
    @on_client
    def loss(self, me: Me, data: ClientData, x: Weights) -> Loss:
        """The loss of a model on the training samples."""
        return Loss(data.evaluate(x, "train").values["loss"])

    @on_client
    def trial(self, me: Me, data: ClientData, x: Weights) -> Trained:
        """A local training of a trial round."""
        return Trained(data.train(x).params, data.n)

    def _losses(self, candidates: Candidates, x: Params) -> Tensor | None:
        """The losses [N] of a model at all clients; NaN: not known; None: too few have answered."""
        assert candidates.clients is not None
        try:
            told: Mapping[int, float] = candidates.clients.all().call(self.loss, x=x).loss
        except TooFewReplies as error:
            candidates.warn(f"selection: fedcor has no losses to learn from: {error}")
            return None
        losses = torch.full((candidates.num_clients,), math.nan, dtype=torch.float64)
        for k, value in told.items():
            losses[k] = value if math.isfinite(value) else math.nan
        return losses

    def _listen(self, state: State, candidates: Candidates) -> None:
        """In the warm-up, and every Delta rounds after it: hear the losses, and fit X to how they change."""
        if not state.fitted:
            self.warm_up(state, candidates)
        elif candidates.round - state.asked >= self.interval:
            state.asked = candidates.round
            if self._hear_trial(state, candidates):
                self._fit(state, candidates, self.steps)

    def warm_up(self, state: State, candidates: Candidates) -> None:
        """While it lasts, hear how the losses have changed; fit X at its end."""
        if not state.fitted:
            self._hear_round(state, candidates)
            if len(state.changes) >= self.warmup:
                self._fit(state, candidates, self.first_steps)

    def _hear_round(self, state: State, candidates: Candidates) -> None:
        """The change of the last round, if the losses before it are known as well."""
        before, at = state.losses, state.at
        state.losses, state.at = self._losses(candidates, candidates.model()), candidates.round
        if before is not None and state.losses is not None and at == candidates.round - 1:
            self._note(state, candidates, state.losses - before)

    def _hear_trial(self, state: State, candidates: Candidates) -> bool:
        """The change of a round of random clients that is not done; whether it could be had."""
        assert candidates.clients is not None
        x = candidates.model()
        cohort = candidates.clients.only(uniform(candidates, candidates.count, candidates.rng))
        try:
            y: Params = cohort.call(self.trial, x=x, fold={"y": Mean(by="n")}).y
        except TooFewReplies as error:
            candidates.warn(f"selection: fedcor's trial round has failed: {error}")
            return False
        before, after = self._losses(candidates, x), self._losses(candidates, y)
        if before is None or after is None:
            return False
        return self._note(state, candidates, after - before)

    def _note(self, state: State, candidates: Candidates, change: Tensor) -> bool:
        """Add an observation; False where no client's change is known."""
        known = change.isfinite()
        if not bool(known.any()):
            return False
        change = torch.where(known, change, change[known].mean())
        of_round = torch.cat([state.of_round, torch.tensor([candidates.round])])
        kept = candidates.round - of_round < self.history
        state.changes, state.of_round = torch.cat([state.changes, change[None]])[kept], of_round[kept]
        return True

    def _fit(self, state: State, candidates: Candidates, steps: int) -> None:
        """Fit X from where it is; annealing begins anew."""
        ids = torch.tensor(candidates.ids)
        weights = self.gamma ** (candidates.round - state.of_round).double()
        changes = state.changes[:, ids]
        deviations = changes - discounted_mean(changes, weights)
        if not candidates.predicting:
            x, scale = fit(
                state.x[:, ids], state.scale, deviations, weights,
                noise=self.noise, steps=steps, lr=self.lr, normalised=self.normalised,
            )  # fmt: skip
            state.x, state.scale = state.x.index_copy(1, ids, x), scale
        state.factors, state.losses = torch.ones_like(state.factors), None
        state.fitted, state.asked = True, candidates.round

    # ---- selection
    def select(self, state: State, candidates: Candidates) -> list[int]:
        """The K of largest gain, one after the other; at random in the warm-up."""
        self._listen(state, candidates)
        if not state.fitted:
            return uniform(candidates, candidates.count, candidates.rng)
        return self._one_after_the_other(state, candidates, None)

    def propose(self, state: State, candidates: Candidates, rng: Generator) -> list[int]:
        """The same with each of the K drawn by its gain."""
        return (
            self._one_after_the_other(state, candidates, rng)
            if state.fitted
            else uniform(candidates, candidates.count, rng)
        )

    def _one_after_the_other(self, state: State, candidates: Candidates, rng: Generator | None) -> list[int]:
        """K clients; without rng those of largest gain."""
        ids = torch.tensor(candidates.ids)
        x = state.x[:, ids]
        sigma = Covariance.of(columns(x, state.scale) if self.normalised else x, self.noise)
        sizes = torch.tensor(candidates.sizes, dtype=torch.float64)
        chosen = []
        for _ in range(candidates.count):
            gains = spared(sigma.gains(sizes / sizes.sum(), state.factors[ids]), state.missed[ids])
            if rng is not None:
                deviation = float(gains[sigma.left].std(correction=0).clamp(min=1e-30))
                noise = -torch.empty(len(gains), dtype=torch.float64).exponential_(generator=rng).log()
                gains = gains / (self.tau * deviation) + noise  # the largest is a draw from the softmax
            k = int(gains.argmax())
            chosen.append(k)
            sigma = sigma.given(k)
        return sorted(candidates.ids[k] for k in chosen)

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        """Anneal those who have run, and note who has not replied."""
        factors, missed = state.factors.clone(), state.missed.clone()
        if state.fitted:
            factors[list(outcome.selected)] *= self.beta
        missed[list(outcome.selected)] += 1
        missed[list(outcome.replied)] = 0
        state.factors, state.missed = factors, missed
