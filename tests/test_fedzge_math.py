"""FedZGE's equations against what they are by definition: sums over pairs, automatic differentiation, all directions,
and rounds seen from within. Bytes and wires are in `test_fedzge.py`, the laws of directions in `test_directions.py`."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fldist
from fldist.algorithm import Clients, Me, Server, on_client
from fldist.algorithms import fedzge
from fldist.algorithms.fedzge import FedZge, Loss, Whole, combine, diversity, from_bytes, from_int8, to_bytes, to_int8
from fldist.data.client_data import ClientData
from fldist.directions import Directions
from fldist.distillation import LARGEST_LOGIT, Targets, distil, distillation_loss, ensemble
from fldist.kinds import Images, Logits, Seeds
from fldist.models.train import Network
from fldist.params import Params
from tests.conftest import small

N, D, C, NZ = 4, 6, 3, 5
WEIGHTS = {0: 30.0, 1: 70.0}
LOSSES = [Loss(2.5, 0.7, 1.3, 0.9), Loss(5.0, 0.0, 2.0, 0.0), Loss(0.5, 3.0, 0.0, 1.0), Loss(2.0, 0.0, 0.0, 0.0)]
each_loss = pytest.mark.parametrize("loss", LOSSES)


def close(got: Tensor, want: Tensor, atol: float) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# ---- the definitions
def logs(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def terms(e: Tensor, f: Tensor, x: Tensor, y: Tensor, z: Tensor, tau: float, log: Tensor | None = None) -> list[Tensor]:
    """L_fid, L_adv, L_div, L_info, one sample and one pair after the other; log: in place of log Pbar."""
    n, p, q = len(e), logs(e / tau), logs(f / tau)
    fid = -torch.stack([logs(e)[i, int(y[i])] for i in range(n)]).mean()
    adv = -torch.stack([p[i].exp() @ (p[i] - q[i]) for i in range(n)]).mean()
    pairs = [(x[a] - x[b]).square().mean() * (z[a] - z[b]).square().mean() for a in range(n) for b in range(n)]
    pbar = logs(e).exp().mean(dim=0)
    return [fid, adv, (-torch.stack(pairs).mean()).exp(), pbar @ (pbar.log() if log is None else log)]


def total(e: Tensor, f: Tensor, x: Tensor, y: Tensor, z: Tensor, loss: Loss, log: Tensor | None = None) -> Tensor:
    fid, adv, div, info = terms(e, f, x, y, z, loss.tau, log)
    return fid + loss.beta1 * adv + loss.beta2 * div + loss.beta3 * info


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tanh_net(seed: int, d: int) -> Callable[[Tensor], Tensor]:
    first, offset, last = rand(d, 7, seed=seed), rand(7, seed=seed + 1), rand(7, C, seed=seed + 2)
    return lambda x: torch.tanh(x.reshape(len(x), -1) @ first * 0.6 + offset) @ last


def weighed(s: Tensor, u: Tensor) -> Tensor:
    return combine(lambda j, _: s[j], u.__getitem__, len(u))


@dataclass
class Case:
    """Images, labels, noise, the global model and two clients."""

    n: int = N
    d: int = D
    seed: int = 0

    def __post_init__(self) -> None:
        self.x, self.z = 0.6 * rand(self.n, self.d, seed=self.seed + 90), rand(self.n, NZ, seed=self.seed + 91)
        self.y = torch.arange(self.n) % C
        self.model = tanh_net(self.seed + 10, self.d)
        self.clients = {k: tanh_net(self.seed + 20 + 10 * k, self.d) for k in WEIGHTS}

    def e(self, x: Tensor) -> Tensor:
        return 0.3 * self.clients[0](x) + 0.7 * self.clients[1](x)

    def truth(self, loss: Loss) -> Tensor:
        x = self.x.clone().requires_grad_()
        return torch.autograd.grad(total(self.e(x), self.model(x), x, self.y, self.z, loss), x)[0]

    def estimate(self, u: Tensor, loss: Loss = LOSSES[0], **fields: Any) -> Tensor:
        """What the algorithm makes of the clients' answers along directions [q, N, d]."""
        zge: Any = FedZge(q=len(u), tau=loss.tau, synthetic=self.n, **fields)
        images = [self.x, *zge.moved(self.x, SimpleNamespace(block=u.__getitem__))]
        logits = torch.stack([ensemble({k: model(m) for k, model in self.clients.items()}, WEIGHTS) for m in images])
        delta, e = zge.deltas(logits), logits[0]
        known, f = fedzge.known_gradient(self.model, e, self.x, self.z, loss)
        if zge.scope == "all":
            whole = Whole(self.model, e, f, self.x, self.y, self.z, loss)
            return combine(lambda j, u_j: zge.whole_share(whole, e, delta, self.x, j, u_j), u.__getitem__, zge.q)
        s = fedzge.client_scalars(fedzge.logit_gradient(e, f, self.y, loss), delta)
        return known + weighed(s, u)


def bases(n: int, d: int) -> Tensor:
    """An orthonormal basis for each of n samples [d, n, d]."""
    return torch.stack([torch.linalg.qr(rand(d, d, seed=700 + i)).Q for i in range(n)], dim=1)


def all_signs(n: int, d: int) -> Tensor:
    """Every u that the Rademacher law has for n samples at once [2^(n d), n, d]: their mean is the expectation."""
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n * d)), dtype=torch.float64)
    return every.reshape(-1, n, d) / math.sqrt(d)


# ---- ensemble and the four terms
def test_the_ensemble_is_a_mean_by_weights_whatever_the_clients_are_called() -> None:
    logits = {k: rand(N, C, seed=k) for k in range(3)}
    weights = {0: 10.0, 1: 70.0, 2: 20.0, 3: 1000.0}  # 3 has not answered
    e = ensemble(logits, weights)
    close(e, 0.1 * logits[0] + 0.7 * logits[1] + 0.2 * logits[2], 1e-15)
    close(ensemble(dict.fromkeys(range(3), logits[0]), weights), logits[0], 1e-15)
    assert torch.equal(ensemble(dict(reversed(logits.items())), weights), e)
    close(ensemble({9 - k: t for k, t in logits.items()}, {9 - k: w for k, w in weights.items()}), e, 1e-15)
    assert ensemble({0: logits[0].float()}, weights).dtype == torch.float64


@each_loss
def test_the_loss_is_the_definition(loss: Loss) -> None:
    case = Case()
    e, f = case.e(case.x), case.model(case.x)
    want = [float(t) for t in terms(e, f, case.x, case.y, case.z, loss.tau)]
    assert float(fedzge.divergences(e, f, loss.tau).mean()) == pytest.approx(-want[1], rel=1e-13)
    assert list(loss.parts(e, f, case.x, case.y, case.z).values()) == pytest.approx(want, rel=1e-13)
    close(loss(e, f, case.x, case.y, case.z), total(e, f, case.x, case.y, case.z, loss), 1e-14)
    shift = 10 * rand(N, 1, seed=3)  # a constant on all logits of a sample
    assert list(loss.parts(e + shift, f, case.x, case.y, case.z).values()) == pytest.approx(want, rel=1e-11)
    assert float(fedzge.adversarial(e, f - shift, loss.tau)) == pytest.approx(want[1], rel=1e-11)
    v = fedzge.logit_gradient(e, f, case.y, loss)
    close(fedzge.logit_gradient(e + shift, f, case.y, loss), v, 1e-14)


def test_diversity() -> None:
    x, z = rand(9, 3, 4, 4, seed=1), rand(9, NZ, seed=2)
    want = float(terms(rand(9, C, seed=1), rand(9, C, seed=1), x, torch.zeros(9), z, 1.0)[2])
    assert float(diversity(x, z)) == pytest.approx(want, rel=1e-14)
    assert float(diversity(x + rand(3, 4, 4, seed=3), z - 100 * rand(NZ, seed=4))) == pytest.approx(want, rel=1e-11)
    for alike in ((x[:1].expand_as(x), z), (x, z[:1].expand_as(z)), (x[:1], z[:1])):
        assert float(diversity(*alike)) == pytest.approx(1.0, abs=1e-14)


def test_information_and_adversarial_are_least_and_zero_where_they_are_to_be() -> None:
    certain = 200 * torch.eye(C, dtype=torch.float64)
    assert float(fedzge.information(certain)) == pytest.approx(-math.log(C), rel=1e-14)  # of certain rows, balanced
    assert float(fedzge.information(certain[:1].expand(N, C))) == pytest.approx(0.0, abs=1e-14)
    e = rand(N, C, seed=1)
    assert float(fedzge.adversarial(e, e + rand(N, 1, seed=2), 2.0)) == pytest.approx(0.0, abs=1e-15)
    for other in (rand(N, C, seed=seed) for seed in range(50, 70)):
        assert -math.log(C) + 1e-4 < float(fedzge.information(other)) < 0
        assert float(fedzge.adversarial(e, other, 2.0)) < -1e-4
        assert bool((fedzge.divergences(e, other, 2.0) >= 0).all())


def test_the_logarithm_of_the_unmoved_mean_leaves_a_divergence_out() -> None:
    for eps in (1.0, 0.1):
        e, moved = rand(N, C, seed=1), rand(N, C, seed=1) + eps * rand(N, C, seed=2)
        pbar, new = logs(e).exp().mean(dim=0), logs(moved).exp().mean(dim=0)
        linear = fedzge.information(moved, fedzge.mean_log_probability(e)) - fedzge.information(e)
        close(linear, ((new - pbar) * pbar.log()).sum(), 1e-15)
        close(fedzge.information(moved) - fedzge.information(e) - linear, (new * (new / pbar).log()).sum(), 1e-15)


def test_a_class_that_underflows_gives_numbers() -> None:
    e = torch.tensor([[0.0, -2000.0, 0.0], [0.0, -1000.0, 0.0]], dtype=torch.float64)
    want = [math.log(0.5), -1000 - 2 * math.log(2), math.log(0.5)]
    assert fedzge.mean_log_probability(e).tolist() == pytest.approx(want, rel=1e-14)
    assert float(fedzge.information(e)) == pytest.approx(-math.log(2), rel=1e-14)
    huge = LARGEST_LOGIT * torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0, 0.5]]).double()
    y = torch.tensor([0, 1])
    for logits in (e, huge):
        for f in (logits, logits.flip(1), torch.zeros_like(logits)):
            v = fedzge.logit_gradient(logits, f, y, LOSSES[0])
            close(v.sum(dim=1), torch.zeros(2).double(), 1e-9)
            assert bool(LOSSES[0](logits, f, y[:, None].double(), y, y[:, None].double()).isfinite())


# ---- what is known without a direction
@each_loss
@pytest.mark.parametrize("seed", [0, 100, 200])
def test_the_gradients_that_are_known(loss: Loss, seed: int) -> None:
    case = Case(seed=seed)
    e, x = case.e(case.x).requires_grad_(), case.x.clone().requires_grad_()
    on_logits, on_images = torch.autograd.grad(total(e, case.model(x), x, case.y, case.z, loss), (e, x))
    known, f = fedzge.known_gradient(case.model, e.detach(), case.x, case.z, loss)
    close(known, on_images, 1e-14)
    assert torch.equal(f, case.model(case.x))
    v = fedzge.logit_gradient(e.detach(), f, case.y, loss)
    close(v, on_logits, 1e-14)
    close(v.sum(dim=1), torch.zeros(N).double(), 1e-14)
    close(known + fedzge.exact_gradient(case.clients, WEIGHTS, v, case.x), case.truth(loss), 1e-14)
    # without beta1 the global model has no say
    other = fedzge.known_gradient(tanh_net(50, D), e.detach(), case.x, case.z, loss)
    assert torch.equal(other[0], known) == (loss.beta1 == 0)
    assert torch.equal(fedzge.logit_gradient(e.detach(), other[1], case.y, loss), v) == (loss.beta1 == 0)


@each_loss
@pytest.mark.parametrize("eps", [0.5, 1e-3])
@pytest.mark.parametrize("n", [1, N])
def test_how_much_larger_the_loss_is_elsewhere(loss: Loss, eps: float, n: int) -> None:
    """All images moved at once, and each alone; with one image that is the same."""
    case = Case(n=n)
    e, f, moved = case.e(case.x), case.model(case.x), case.x + eps * bases(n, D)[0]
    log = logs(e).exp().mean(dim=0).log()

    def larger(x: Tensor) -> Tensor:
        there = total(case.e(x), case.model(x), x, case.y, case.z, loss, log)
        return there - total(e, f, case.x, case.y, case.z, loss, log)

    whole = Whole(case.model, e, f, case.x, case.y, case.z, loss)
    assert float(whole.batch(case.e(moved), moved)) == pytest.approx(float(larger(moved)), rel=1e-10, abs=1e-14)
    want = torch.stack([larger(torch.where(torch.arange(n)[:, None] == i, moved, case.x)) for i in range(n)])
    torch.testing.assert_close(whole.per_sample(case.e(moved), moved), want, rtol=1e-10, atol=1e-14)


def test_differences_are_not_lost_in_single_precision() -> None:
    """Images come in float32; a difference of 1e-5 of a loss of about 1 would keep two digits there."""
    case, loss = Case(n=20, d=768), Loss(5.0, 0.0, 1.0, 0.0)
    x, z = case.x.float(), case.z.float()
    moved = torch.add(x, Directions(3, 0, 1, 20, 768).block(0), alpha=1e-3)
    e, e_j = case.e(x.double()), case.e(moved.double())
    whole = Whole(lambda _: e, e, e, x, case.y, z, loss)

    def larger(rows: Tensor) -> float:
        there = total(torch.where(rows, e_j, e), e, torch.where(rows, moved, x).double(), case.y, z.double(), loss)
        return float(there - total(e, e, x.double(), case.y, z.double(), loss))

    rows = torch.arange(20)[:, None]
    assert float(whole.batch(e_j, moved)) == pytest.approx(larger(rows >= 0), rel=1e-6)
    want = [larger(rows == i) for i in range(20)]
    assert whole.per_sample(e_j, moved).tolist() == pytest.approx(want, rel=1e-6, abs=1e-11)


# ---- the estimate
@pytest.mark.parametrize("eps", [1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_linear_clients_are_differenced_exactly(eps: float, difference: Any) -> None:
    a, b, x, v = rand(C, D, seed=1), rand(C, seed=2), rand(N, D, seed=3), rand(N, C, seed=4)
    u = all_signs(1, D).expand(-1, N, D)
    zge: Any = FedZge(q=len(u), eps=eps, difference=difference)
    moved = zge.moved(x, SimpleNamespace(block=u.__getitem__))
    delta = zge.deltas(torch.stack([m @ a.T + b for m in (x, *moved)]))
    close(delta, u @ a.T, 1e-14 / eps)
    s = fedzge.client_scalars(v, delta)
    close(s, (v * (u @ a.T)).sum(dim=2), 1e-13 / eps)
    close(weighed(s, u), v @ a, 1e-13 / eps)  # the mean over all directions that there are


@each_loss
@pytest.mark.parametrize("scope", ["clients", "all"])
def test_an_orthonormal_basis_gives_the_gradient(scope: str, loss: Loss) -> None:
    case, basis = Case(), bases(N, D)
    want = case.truth(loss)
    for difference, eps, order in (("forward", 1e-3, 1), ("central", 2e-2, 2)):
        found = [case.estimate(basis, loss, scope=scope, difference=difference, eps=eps / k) for k in (1, 2)]
        errors = [float((g - want).norm()) for g in found]
        assert errors[0] < 0.02 * float(want.norm())
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize(("scope", "reduction"), [("clients", "per_sample"), ("all", "per_sample"), ("all", "batch")])
def test_scopes_and_reductions_have_one_expectation(scope: str, reduction: str) -> None:
    """Over all directions that the Rademacher law has; their symmetry takes what is of first order in eps away."""
    case, every = Case(n=2, d=4), all_signs(2, 4)
    want = case.truth(LOSSES[0])
    found = case.estimate(every, scope=scope, reduction=reduction, eps=1e-4)
    close(found, want, 1e-7 * float(want.norm()))


def test_the_error_of_one_direction_is_that_of_theory() -> None:
    """(d - 1) |g|^2, or (d N - 1) |g|^2 where the batch has one difference; over all directions that there are."""
    v, a = rand(N, C, seed=1), rand(C, D, seed=2)

    def error(u: Tensor, batch: bool = False) -> float:
        n = u.shape[1]
        s = fedzge.client_scalars(v[:n], u @ a.T)
        s = s.sum(dim=1, keepdim=True).expand_as(s) if batch else s
        found = torch.stack([weighed(s[j : j + 1], u[j : j + 1]) for j in range(len(u))])
        return float((found - v[:n] @ a).square().sum() / len(u) / (v[:n] @ a).square().sum())

    assert error(all_signs(1, D).expand(-1, N, D)) == pytest.approx(D - 1, rel=1e-12)
    assert error(bases(N, D)) == pytest.approx(D - 1, rel=1e-12)
    assert error(all_signs(2, D), batch=True) == pytest.approx(2 * D - 1, rel=1e-12)


@pytest.mark.parametrize("law", ["rademacher", "sphere"])
def test_the_error_and_the_angle_of_several_directions_are_those_of_theory(law: Any) -> None:
    for n, d, q in ((20000, 24, 6), (100, 24, 960), (400, 400, 20)):
        a, v = rand(8, d, seed=1), rand(n, 8, seed=2)
        v /= (v @ a).norm(dim=1, keepdim=True)
        directions = Directions(5, 1, q, n, d, law)
        u = torch.stack([directions.block(j) for j in range(q)]).double()
        found = weighed(fedzge.client_scalars(v, u @ a.T), u)
        error = float((found - v @ a).square().sum(dim=1).mean())
        # a sample's is about d / q^2 times a chi-square of q degrees: of standard deviation d / q sqrt(2 / q)
        sigma = d / q * math.sqrt(2 / min(q, d)) / math.sqrt(n)
        assert error == pytest.approx((d - 1) / q, abs=5 * sigma)
        if q > 6:  # the mean of a root of chi-squares is lower than the root of the mean: by a share of 1 / (4 q)
            cosine = float(torch.cosine_similarity(found, v @ a, dim=1).mean())
            assert cosine == pytest.approx(math.sqrt(q / (q + d - 1)), rel=0.03)


# ---- distillation
@pytest.mark.parametrize("tau", [0.5, 1.0, 5.0])
def test_the_distillation_loss(tau: float) -> None:
    for seed in range(10):
        s, e = rand(N, C, seed=seed).requires_grad_(), 3 * rand(N, C, seed=seed + 20)
        p, r = logs(e / tau), logs(s / tau).detach()
        loss = distillation_loss(s, e, tau)
        assert loss.item() == pytest.approx(tau**2 * float((p.exp() * (p - r)).sum()) / N, rel=1e-12)
        assert loss.item() > 0
        close(torch.autograd.grad(loss, s)[0], tau / N * (r.exp() - p.exp()), 1e-14)
        same = (e + rand(N, 1, seed=seed)).requires_grad_()
        loss = distillation_loss(same, e, tau)
        assert loss.item() == pytest.approx(0.0, abs=1e-13)
        assert float(torch.autograd.grad(loss, same)[0].norm()) < 1e-13


@pytest.mark.parametrize("over", [None, 8])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_steps_of_a_distillation(kind: Any, over: int | None) -> None:
    """They are those of PyTorch's own optimizers on all samples at once, at rates along a cosine."""
    x, e, lr = rand(N, D, seed=1).float(), rand(N, C, seed=2), 0.1
    torch.manual_seed(1)
    made, mine = (nn.Sequential(nn.Linear(D, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, C)) for _ in range(2))
    mine.load_state_dict(made.state_dict())
    network = Network(made, Params.of(made))
    last = distil(network, x, Targets(e, 2.0), steps=3, lr=lr, optimizer=kind, cosine_over=over)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(mine.parameters(), lr=lr)
    if kind == "sgd":
        optimizer = torch.optim.SGD(mine.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    p = logs(e / 2).float()
    for s in (1, 2, 3):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * (s - 1) / (over or 3))) / 2
        optimizer.zero_grad()
        loss = 4 * (p.exp() * (p - logs(mine(x) / 2))).sum() / N
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(network.params.floats, Params.of(mine).floats, rtol=1e-5, atol=1e-6)
    assert last == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)


# ---- what travels coarsely
def test_images_in_bytes() -> None:
    every = torch.arange(256).to(torch.uint8)
    close(from_bytes(every).double(), torch.arange(256).double() / 127.5 - 1, 1e-7)
    assert torch.equal(to_bytes(from_bytes(every)), every)
    x = torch.cat([torch.tensor([-1.0, 1.0]), torch.rand(5000, generator=torch.Generator().manual_seed(1)) * 2 - 1])
    assert torch.equal(to_bytes(x)[:2], every[[0, 255]])
    close(from_bytes(to_bytes(x)), x, 1 / 255 + 1e-6)
    assert torch.equal(from_bytes(x), x)


def test_differences_in_bytes_are_right_in_the_mean_and_off_by_little() -> None:
    delta = rand(3, N, C, seed=1) * torch.tensor([1.0, 1e-3, 50.0])[:, None, None]
    rng, draws = torch.Generator().manual_seed(2), 4000
    values, scale = to_int8(delta, rng)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (3,))
    mean = sum((from_int8(*to_int8(delta, rng)) for _ in range(draws)), torch.zeros_like(delta)) / draws
    far = (mean - delta).abs() / delta.abs().amax(dim=(1, 2), keepdim=True)  # in steps of 1 / 127: half of it at most
    assert float(far.max()) < 5 / 254 / math.sqrt(draws) + 1e-7
    delta = rand(4, 500, 10, seed=1) * 10.0 ** torch.arange(-4, 4, 2)[:, None, None]
    back = from_int8(*to_int8(delta, torch.Generator().manual_seed(1)))
    step = delta.abs().amax(dim=(1, 2), keepdim=True) / 127
    assert bool(((back - delta).abs() <= step * 1.0001).all())
    error = (back - delta).square().mean(dim=(1, 2))
    # f (1 - f) steps^2 for a fraction f that is uniform: a sixth
    torch.testing.assert_close(error, step[:, 0, 0].square() / 6, rtol=0.1, atol=0)


def test_differences_in_bytes_at_the_edge() -> None:
    delta = rand(3, N, C, seed=1)
    delta[1] = 0.0
    assert torch.equal(from_int8(*to_int8(delta, torch.Generator()))[1], torch.zeros(N, C).double())
    # 7e-6 above 127 scales: some, rounded up, would wrap
    full = torch.full((1, 1000, 1000), 1.031, dtype=torch.float64)
    close(from_int8(*to_int8(full, torch.Generator().manual_seed(1))), full, 0.01)
    for size in (1e-30, 1e-42, 1e-46):
        close(from_int8(*to_int8(size * delta, torch.Generator())), torch.zeros_like(delta), 5 * size)


# ---- rounds, from within
SEEN: dict[str, list[Any]] = defaultdict(list)


@dataclass(frozen=True)
class Watched(FedZge):
    """FedZGE that shows what it has and does; `scale` multiplies the gradient on the images."""

    scale: float = 1.0

    def round(self, server: Server, clients: Clients) -> None:
        SEEN["task"].append((server.task, self.generator_of(server.task)))
        before = server.x, server.generator
        super().round(server, clients)
        SEEN["round"].append((before, (server.x, server.generator)))

    def image_gradient(self, server: Server, batch: Any, answers: Any, revealed: Any) -> Tensor:
        directions = self.drawn(server, batch.step)
        u = torch.stack([directions.block(j) for j in range(self.q)]).double()
        g = super().image_gradient(server, batch, answers, revealed)
        SEEN["gradient"].append((batch, answers, u, server.task.frozen_copy(server.x).double(), g))
        return g * self.scale

    def teach_server(self, server: Server, x: Tensor, e: Tensor) -> None:
        SEEN["server"].append((x.clone(), e.clone()))
        super().teach_server(server, x, e)

    def move_generator(self, server: Server, network: Network, made: Tensor, g: Tensor) -> None:
        weights = network.params.floats[: len(network.gradient)]
        before, leaves, cotangent = weights.clone(), list(network.module.parameters()), g.float().view_as(made)
        want = torch.autograd.grad(made, leaves, cotangent, retain_graph=True)
        super().move_generator(server, network, made, g)
        SEEN["move"].append((before, torch.cat([part.flatten() for part in want]), weights.clone()))

    @on_client
    def train(self, me: Me, data: ClientData) -> None:
        SEEN["start"].append((data.client, me.y))
        super().train(me, data)
        SEEN["trained"].append((data.client, me.y))

    @on_client
    def query(self, me: Me, data: ClientData, x: Images, key: Seeds, stream: Seeds) -> fedzge.Answered:
        got = super().query(me, data, x, key, stream)
        SEEN["asked"].append((data.client, me.y.clone(), got.logits.clone(), data.n))
        return got

    @on_client
    def distil(self, me: Me, data: ClientData, x: Images, e: Logits) -> None:
        super().distil(me, data, x, e)
        SEEN["taught"].append((data.client, me.y, from_bytes(x), e.clone()))


CNN = {"name": "cnn", "widths": [4], "kernels": 3, "paddings": 1, "hidden": []}


def watch(directory: Path, fields: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A run of three clients on 8x8 digits with 12 images, 3 queries."""
    algorithm = {"name": "tests.test_fedzge_math:Watched", "synthetic": 12, "q": 3, "generator": {"nz": 8, "ngf": 2}}
    steps = {"server_steps": 3, "client_steps": 2, "show_every": 0}
    task = {"task__model": CNN, "task__subset": {"train": 300, "test": 100}, "eval": {"every": 0}}
    clients = {"clients": {"num_clients": 3, "init": "own"}, "task__partition": {"name": "dirichlet", "alpha": 1.0}}
    SEEN.clear()
    config = small(algorithm=algorithm | steps | (fields or {}), **(task | clients | changes))
    result: dict[str, Any] = fldist.run(config, output=directory)
    assert result["status"] == "finished"
    return result


def parts(model: Params) -> tuple[list[float], list[float], list[int]]:
    split = model.layout.num_params
    return model.floats[:split].tolist(), model.floats[split:].tolist(), model.ints.tolist()


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("reduction", ["batch", "per_sample"])
@pytest.mark.parametrize("scope", ["clients", "all"])
@pytest.mark.parametrize("n", [1, 12])
def test_the_gradient_of_a_round(tmp_path: Path, n: int, scope: str, reduction: str, difference: str) -> None:
    """What a round makes of the answers is the equation; eps is large, so that float32 of the global model suffices."""
    eps, loss, batch_wise = 0.05, Loss(2.0, 0.5, 1.5, 0.7), reduction == "batch"
    fields = {"scope": scope, "reduction": reduction, "difference": difference, "eps": eps, "divide_by_n": batch_wise}
    watch(tmp_path / "run", {**fields, **asdict(loss), "synthetic": n})
    batch, answers, u, model, g = SEEN["gradient"][1]
    x, y, z = batch.x.double(), batch.y, batch.z.double()
    e, delta, (q, _, d) = answers.e.double(), answers.delta.double(), u.shape
    log, signs = logs(e).exp().mean(dim=0).log(), (1, -1) if difference == "central" else (1,)

    def share(j: int, rows: Any) -> Tensor:
        """Of the whole loss, where these images are moved along direction j."""
        value = torch.tensor(0.0)
        for sign in signs:
            e_j, x_j = e.clone(), x.clone()
            e_j[rows] += sign * eps * delta[j][rows]
            x_j[rows] += sign * eps * u[j].view_as(x)[rows]
            value = value + sign * total(e_j, model(x_j), x_j, y, z, loss, log)
        return (value if len(signs) == 2 else value - total(e, model(x), x, y, z, loss)) / eps / len(signs)

    if scope == "clients":
        leaf, through = e.clone().requires_grad_(), x.clone().requires_grad_()
        v, known = torch.autograd.grad(total(leaf, model(through), through, y, z, loss), (leaf, through))
        s = (v * delta).sum(dim=2)
        s = s.sum(dim=1, keepdim=True).expand(q, n) if batch_wise else s
    else:
        known, rows = torch.zeros_like(x), [slice(None)] * n if batch_wise else [[i] for i in range(n)]
        s = torch.stack([torch.stack([share(j, row) for row in rows]) for j in range(q)])
    want = (known.reshape(n, d) + d / q * (s[:, :, None] * u).sum(dim=0)) / (n if batch_wise else 1)
    close(g.double(), want, 1e-4 * float(want.abs().max()))
    logged = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[1])["log"]
    names = ("fidelity", "adversarial", "diversity", "information")
    for name, term in zip(names, terms(e, model(x), x, y, z, loss.tau), strict=True):
        assert logged[name] == pytest.approx(float(term), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("wire", ["f2", "f4"])
def test_answers_are_the_mean_of_what_the_selected_said(tmp_path: Path, wire: str) -> None:
    watch(tmp_path / "run", {"wire": wire}, clients={"num_clients": 6, "init": "own", "fraction": 0.5})
    task, _ = SEEN["task"][0]
    for r, (batch, answers, u, _, _) in enumerate(SEEN["gradient"]):
        made = batch.made.detach()
        close(batch.x, ((made + 1) * 127.5).round() / 127.5 - 1 if wire == "f4" else made, 1e-6)
        said, taught = (SEEN[what][3 * r : 3 * r + 3] for what in ("asked", "taught"))
        assert {k for k, *_ in said} == {k for k, *_ in taught} == set(answers.clients)
        means = sum(n * logits.double() for _, _, logits, n in said) / sum(n for *_, n in said)
        close(answers.e.double(), means[0], 1e-6)
        close(answers.delta.double(), (means[1:] - means[0]) / 1e-3, 1e-6)
        for client, y, logits, _ in said:
            model = task.frozen_copy(y, client)
            moved = [batch.x, *(batch.x + 1e-3 * u_j.float().view_as(batch.x) for u_j in u)]
            close(logits, torch.stack([model(x) for x in moved]), 1e-6)
        for x, e in (SEEN["server"][r], *((x, e) for _, _, x, e in taught)):
            assert torch.equal(x, batch.x)
            close(e.double(), answers.e.double(), 1e-6)
    assert len({client for client, *_ in SEEN["asked"]}) > 3  # cohorts differ


def test_a_generator_without_a_learning_rate_only_sees_other_noise(tmp_path: Path) -> None:
    watch(tmp_path / "run", {"lr_generator": 0.0, "generator_steps": 2})
    _, architecture = SEEN["task"][0]
    for (a, _, u, *_), (b, _, w, *_) in itertools.combinations(SEEN["gradient"], 2):
        assert not torch.equal(a.z, b.z)
        assert not torch.equal(u, w)
    for (_, before), (_, after) in SEEN["round"]:
        assert parts(after)[0] == parts(before)[0] == parts(architecture.initial)[0]
    with architecture.module() as module, torch.no_grad():
        architecture.initial.clone().bind(module)
        for batch, *_ in SEEN["gradient"]:
            assert torch.equal(module.train()(batch.z, batch.y), batch.x)


def test_the_generator_moves_by_its_rate_against_the_sign(tmp_path: Path) -> None:
    lr, moves = 0.002, []
    for scale in (1.0, 1000.0):
        watch(tmp_path / str(scale), {"lr_generator": lr, "scale": scale})
        for before, g, now in SEEN["move"]:
            clear = g.abs() > 1e-6
            assert int(clear.sum()) > 200
            slack = lr * 1e-8 / g.abs() + 2e-7 * (1 + before.abs())
            assert bool(((now - before + lr * g.sign()).abs() <= slack)[clear].all())
            assert torch.equal(now[g == 0], before[g == 0])
        moves.append(SEEN["move"][0])
    (_, g, one), (_, many, thousand) = moves
    close(many, 1000 * g, float(g.abs().max()))
    close(one[g.abs() > 1e-6], thousand[g.abs() > 1e-6], 0.011 * lr)


def test_an_optimizer_of_the_generator_that_persists(tmp_path: Path) -> None:
    watch(tmp_path / "run", {"generator_optimizer": "persistent"}, rounds=3)
    weight = nn.Parameter(SEEN["move"][0][0].clone())
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    for _, weight.grad, now in SEEN["move"]:
        optimizer.step()
        close(now, weight.detach(), 2e-6)


def test_without_steps_of_distillation_models_stay(tmp_path: Path) -> None:
    watch(tmp_path / "server", {"server_steps": 0})
    assert all(parts(before) == parts(after) for (before, _), (after, _) in SEEN["round"])
    assert all(parts(a[1]) != parts(b[1]) for a, b in zip(SEEN["trained"], SEEN["taught"], strict=True))
    watch(tmp_path / "clients", {"client_steps": 0})
    assert "taught" not in SEEN or not SEEN["taught"], "clients have no use for e"
    assert all(parts(before) != parts(after) for (before, _), (after, _) in SEEN["round"])


def test_clients_of_any_architecture_are_changed_by_training_and_distillation_alone(tmp_path: Path) -> None:
    """Not by answers, nor by scores; distillation leaves the statistics of BatchNorm alone; nobody is given a model."""
    normed = {"name": "cnn_bn", "widths": [4]}
    models = {"task__model": normed, "clients__models": [normed, CNN, {"name": "cnn_bn", "widths": [6]}]}
    result = watch(tmp_path / "run", **models, rounds=3)
    whats = ("start", "trained", "asked", "taught")
    models_of = [{(k, i // 3): parts(y) for i, (k, y, *_) in enumerate(SEEN[what])} for what in whats]
    assert len({len(weights) for weights, *_ in models_of[0].values()}) == 3
    for k, r in itertools.product(range(3), range(3)):
        start, trained, asked, taught = (found[k, r] for found in models_of)
        assert trained not in (start, taught)
        assert asked == trained
        assert taught[0] != trained[0]
        assert taught[1:] == trained[1:]
        assert (trained[1:] == ([], [])) == (k == 1)
        assert r == 0 or start == models_of[3][k, r - 1]
    (before, _), (after, _) = SEEN["round"][0]
    assert parts(before)[1] != parts(after)[1]  # the global model trains on x
    scored = watch(tmp_path / "scored", **models, rounds=3, eval={"every": 1, "where": "both"})
    assert scored["state_hash"] == result["state_hash"]
