"""FedKTL's alignment as it runs against the same one batch by batch (that of `fldist bench fedktl`), and its parts: F's
written-out passes against automatic differentiation, latents in blocks against latents one batch at a time."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fldist.algorithms import fedktl
from fldist.algorithms.fedktl import BANDWIDTHS, Drawn, Passes, mmd, mmd_gradient, transformer
from fldist.bench.fedktl import SAME, UNDETERMINED, Aligned, Case, Start, apart, fast, plain
from fldist.bench.measure import check_same
from fldist.models.generators.toy import Toy

CPU = torch.device("cpu")


def close(one: Tensor, other: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=atol)


# ---- both forms
@pytest.mark.parametrize("total", [8, 100, 130])
@pytest.mark.parametrize(("lambda_", "clip"), [(1.0, 100.0), (0.1, math.inf), (10.0, 0.05), (0.0, 100.0)])
def test_the_alignment_is_the_one_batch_by_batch(total: int, lambda_: float, clip: float) -> None:
    start = Start.of(Case("", "", clients=10, classes=16, total=total, h=16, epochs=4))
    start = dataclasses.replace(start, how=dataclasses.replace(start.how, lambda_=lambda_, clip=clip))
    ours, other = fast(start), plain(start)
    assert apart(ours, other) < 1e-5
    assert apart(ours, plain(start, torch.float64)) < 1e-5
    assert apart(ours, Aligned(start.f.copy().state_dict(), start.e, 0.0)) > 1e-2
    for before, after in ((fast(start), ours), (plain(start), other)):
        assert apart(before, after) == 0.0, "a call leaves its start as it was"


def test_latents_of_a_mapping_network_are_the_same_in_blocks() -> None:
    start = Start.of(Case("", "", clients=4, classes=16, total=48, h=16, epochs=3, deep=True))
    assert apart(fast(start), plain(start)) < 1e-5


@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "3.bias"])
def test_a_difference_in_any_tensor_is_seen(name: str) -> None:
    start = Start.of(Case("", "", clients=2, classes=4, total=8, h=6, epochs=1))
    one = fast(start)
    seen = [one.e, *(value for key, value in one.f.items() if key not in (*UNDETERMINED, "1.num_batches_tracked"))]
    size = float(torch.cat([value.flatten() for value in seen]).norm())
    moved = {key: value.clone() for key, value in one.f.items()}
    moved[name].flatten()[0] += 0.5
    assert apart(dataclasses.replace(one, f=moved), one) == pytest.approx(0.5 / size, rel=1e-4)
    e = one.e.clone()
    e[1, 2] -= 2.0
    assert apart(dataclasses.replace(one, e=e), one) == pytest.approx(2.0 / size, rel=1e-4)
    moved = {key: value + (key in UNDETERMINED) for key, value in one.f.items()}
    assert apart(one, dataclasses.replace(one, f=moved)) == 0.0
    moved = {key: value * math.nan if key == name else value for key, value in one.f.items()}
    assert math.isnan(apart(one, dataclasses.replace(one, f=moved)))


def test_forms_that_do_not_agree_are_refused() -> None:
    assert check_same(SAME, SAME, "it") == SAME
    for bad in (2 * SAME, math.nan):
        with pytest.raises(RuntimeError, match="it: the two forms come to results that are"):
            check_same(bad, SAME, "it")


def test_the_prototypes_of_a_client_are_unit_vectors_of_distinct_classes() -> None:
    case = Case("", "", clients=7, classes=12, total=31, h=6, epochs=1)
    p, classes = case.prototypes()
    close(p.norm(dim=1), torch.ones(31), atol=1e-6)
    sizes = [5, 5, 5, 4, 4, 4, 4]
    assert all(bool((part[1:] > part[:-1]).all()) for part in classes.split(sizes))  # type: ignore[no-untyped-call]
    assert case.flops == 2 * 31 * (2 * 144 + 3 * 12 * 6) + 8 * 31**2 * 6


# ---- F's passes
@pytest.mark.parametrize("b", [2, 9])
def test_the_written_out_passes_are_those_of_automatic_differentiation(b: int) -> None:
    torch.manual_seed(0)
    f = transformer(5, 7).double().train()
    for t in f.parameters():
        t.data.normal_()
        t.grad = torch.full_like(t, 3.0)
    by = transformer(5, 7).double().train()
    by.load_state_dict(f.state_dict())
    passes = Passes(f)
    for _ in range(3):
        p, g = torch.randn(b, 5, dtype=torch.float64), torch.randn(b, 7, dtype=torch.float64)
        by.zero_grad()
        want = by(p)
        want.backward(g)
        close(passes.forward(p), want.detach())
        passes.backward(g)
        for (name, ours), other in zip(f.named_parameters(), by.parameters(), strict=True):
            assert ours.grad is not None and other.grad is not None
            close(ours.grad, other.grad, atol=1e-11)
            assert bool(ours.grad.any()) or name == "0.bias"
        for ours, other in zip(f.buffers(), by.buffers(), strict=True):
            close(ours, other)


def test_the_bias_before_batch_norm_stays() -> None:
    start = Start.of(Case("", "", clients=4, classes=8, total=30, h=6, epochs=5))
    module = start.f.copy()
    start.f.initial.clone().bind(module)
    before = module.state_dict()["0.bias"].clone()
    assert bool(before.any())
    assert torch.equal(fast(start).f["0.bias"], before)


# ---- the gradient of the MMD
def test_the_gradient_of_far_and_of_equal_points_is_exact() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64)
    x[1], x[2] = x[0], x[0] + 1e4
    x.requires_grad_()
    y = torch.cat([torch.randn(5, 4, dtype=torch.float64), torch.full((1, 4), -1e4, dtype=torch.float64)])
    (want,) = torch.autograd.grad(mmd(x, y, BANDWIDTHS), x)
    got = mmd_gradient(x.detach(), y, BANDWIDTHS)
    close(got, want, atol=1e-11)
    assert float(got[2].abs().max()) < 1e-20


@pytest.mark.parametrize("h", [64, 512])
def test_the_gradient_of_latents_in_high_dimension_is_not_rounding(h: int) -> None:
    """Kernels of N(0, I) in 512 dimensions are about e^-10: what l = j adds, of size 1, would cancel to some digits."""
    x, y = torch.randn(2, 20, h, generator=torch.Generator().manual_seed(0)).unbind()
    want = mmd_gradient(x.double(), y.double(), BANDWIDTHS)
    got = mmd_gradient(x, y, BANDWIDTHS).double()
    assert float((got - want).norm() / want.norm()) < 1e-5


# ---- latents
@pytest.mark.parametrize("sizes", [[5] * 20, [32, 1, 31, 36], [100], [7, 93]])
def test_latents_come_in_the_order_in_which_they_are_drawn(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    monkeypatch.setattr(fedktl, "LATENTS", 32)
    made = Toy(latent_dim=16).load(CPU)
    draw = Drawn(made, torch.Generator().manual_seed(3), CPU)
    want = made.sample_latents(sum(sizes), torch.Generator().manual_seed(3))
    got = [draw(n) for n in sizes]
    assert [len(part) for part in got] == sizes
    assert torch.equal(torch.cat(got), want)


def test_latents_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedktl, "LATENTS", 32)
    asked: list[int] = []
    made = Toy(latent_dim=4).load(CPU)
    monkeypatch.setattr(made, "sample_latents", lambda n, rng: (asked.append(n), torch.zeros(n, 4))[1])
    draw = Drawn(made, torch.Generator(), CPU)
    for _ in range(10):
        draw(10)
    assert asked == [32, 32, 32, 32]
    draw(200)
    assert asked[4:] == [200 - 28]
    monkeypatch.setattr(fedktl, "_LATENT_VALUES", 40)
    draw(3)
    assert asked[5:] == [10], "no more memory than that for large latents"
