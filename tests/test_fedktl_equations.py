"""FedKTL's equations against what they are by definition: loops over samples and pairs, automatic differentiation and
finite differences. Whole runs are in `test_fedktl.py`, bytes in `test_fedktl_bytes.py`."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fldist.algorithms.fedktl import (
    Alignment,
    Passes,
    align,
    arcface,
    centroids,
    etf,
    kernel,
    median_bandwidths,
    mmd,
    mmd_gradient,
    prototypes,
    simplex,
    squared_distances,
    transfer,
    transformer,
    unit,
)
from fldist.models.train import Network
from fldist.params import Params
from fldist.prototypes import class_means

BANDWIDTHS = (10.0, 15.0, 20.0, 50.0)
MODES = ("eval", "batch")
each_mode = pytest.mark.parametrize("mode", MODES)


def close(got: Tensor, want: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def rand(*shape: int, seed: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(rand(rows, columns, seed=seed)).Q


def gram_of_etf(c: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What V^T V is, entry by entry."""
    return torch.tensor([[1.0 if a == b else -1 / (c - 1) for b in range(c)] for a in range(c)], dtype=dtype)


# ---- the frozen classifier
@settings(max_examples=25, deadline=None, database=None)
@given(c=st.integers(2, 12), more=st.integers(0, 6), seed=st.integers(0, 10**6))
def test_columns_of_a_simplex_have_norm_one_and_equal_angles_whatever_the_basis(c: int, more: int, seed: int) -> None:
    v = simplex(orthonormal(c + more, c, seed))
    assert v.dtype == torch.float64
    assert v.shape == (c + more, c)
    close(v.T @ v, gram_of_etf(c))
    close(v.sum(dim=1), torch.zeros(c + more, dtype=torch.float64))
    close(unit(v.T), v.T)


def test_the_simplex_is_the_product_that_defines_it() -> None:
    p = orthonormal(7, 4, seed=1)
    want = math.sqrt(4 / 3) * p @ (torch.eye(4, dtype=torch.float64) - torch.ones(4, 4, dtype=torch.float64) / 4)
    close(simplex(p), want)


@pytest.mark.parametrize(("c", "d"), [(2, 1), (2, 2), (3, 2), (10, 9), (10, 10), (10, 13), (100, 99), (100, 100)])
def test_the_classifier_is_an_equiangular_tight_frame_of_every_legal_dimension(c: int, d: int) -> None:
    v = etf(c, d, 3)
    assert v.dtype == torch.float32
    assert v.shape == (d, c)
    close(v.T @ v, gram_of_etf(c, torch.float32), atol=2e-6)
    close(v.sum(dim=1), torch.zeros(d), atol=2e-6)
    assert torch.linalg.matrix_rank(v, rtol=1e-4) == c - 1


@pytest.mark.parametrize(("c", "d"), [(10, 10), (10, 9), (7, 12)])
def test_the_classifier_names_the_class_of_each_of_its_own_columns(c: int, d: int) -> None:
    v = etf(c, d, 0)
    assert (unit(v.T) @ v).argmax(dim=1).tolist() == list(range(c))


@pytest.mark.parametrize(("c", "d"), [(10, 8), (10, 2), (3, 1)])
def test_fewer_dimensions_than_a_simplex_needs_are_refused(c: int, d: int) -> None:
    with pytest.raises(ValueError, match=str(c)):
        etf(c, d, 0)


@pytest.mark.parametrize("d", [9, 10, 12])
def test_the_classifier_follows_from_its_seed_and_from_nothing_else(d: int) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = etf(10, d, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(etf(10, d, 5), first)
    if d >= 10:
        assert not torch.allclose(etf(10, d, 6), first, atol=1e-3)


# ---- unit vectors
def test_unit_vectors_are_taken_along_the_last_dimension() -> None:
    v = rand(3, 4, 5, seed=2)
    want = torch.stack([torch.stack([b / b.square().sum().sqrt() for b in a]) for a in v])
    close(unit(v), want)
    close(unit(1e6 * v), want)


def test_a_vector_below_the_bound_is_divided_by_the_bound() -> None:
    v = torch.tensor([[3e-14, 4e-14]], dtype=torch.float64)
    close(unit(v), torch.tensor([[0.03, 0.04]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vector_of_zeros_stays_zero_and_has_a_gradient(dtype: torch.dtype) -> None:
    v = torch.zeros(2, 3, dtype=dtype)
    v[1] = torch.tensor([0.0, 3.0, 4.0])
    v.requires_grad_()
    out = unit(v)
    assert out[0].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(out[1], torch.tensor([0.0, 0.6, 0.8], dtype=dtype))
    (out * torch.tensor([1.0, 2.0, 3.0], dtype=dtype)).sum().backward()
    assert v.grad is not None
    assert bool(torch.isfinite(v.grad).all())


# ---- the local loss
def spread_cosines(b: int, c: int, seed: int, top: float = 0.95) -> Tensor:
    """Cosines within -top ... top."""
    return top * torch.tanh(rand(b, c, seed=seed))


def by_angles(cosines: Tensor, y: Tensor, margin: float, scale: float) -> Tensor:
    """L_A through the angle, one sample after the other."""
    losses = []
    for row, label in zip(cosines, y.tolist(), strict=True):
        moved = torch.stack([torch.cos(torch.acos(v) + margin) if c == label else v for c, v in enumerate(row)])
        losses.append(torch.logsumexp(scale * moved, dim=0) - scale * moved[label])
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("margin", "scale"), [(0.5, 64.0), (0.3, 10.0), (1.2, 2.0), (0.0, 64.0)])
def test_the_margin_is_added_to_the_angle_of_the_true_class_alone(margin: float, scale: float) -> None:
    cosines, y = spread_cosines(9, 5, seed=3), torch.arange(9) % 5
    one, other = cosines.clone().requires_grad_(), cosines.clone().requires_grad_()
    got, want = arcface(one, y, margin, scale), by_angles(other, y, margin, scale)
    assert got.shape == ()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(got, one)[0], torch.autograd.grad(want, other)[0], rtol=1e-7, atol=1e-9
    )
    assert torch.equal(one.detach(), cosines)  # the caller's cosines are as they were


def test_without_a_margin_it_is_the_cross_entropy_of_the_scaled_cosines() -> None:
    cosines, y = spread_cosines(8, 6, seed=4), torch.tensor([5, 0, 1, 1, 2, 3, 4, 5])
    close(arcface(cosines, y, 0.0, 64.0), cross_entropy(64 * cosines, y), atol=1e-10)
    close(arcface(cosines, y, 0.0, 3.0), cross_entropy(3 * cosines, y), atol=1e-10)


@pytest.mark.parametrize("theta", [0.02, 0.4, 1.0, math.pi / 2, 2.0, 2.6])
def test_the_loss_grows_with_the_margin_as_long_as_the_angle_stays_below_pi(theta: float) -> None:
    cosines = torch.tensor([[0.1, math.cos(theta), -0.3]], dtype=torch.float64)
    margins = [m for m in torch.linspace(0, 1.5, 31).tolist() if theta + m < math.pi]
    losses = [float(arcface(cosines, torch.tensor([1]), m, 8.0)) for m in margins]
    assert len(losses) > 5
    assert all(a < b for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at", [1.0, -1.0, 1.0 + 3e-7, -1.0 - 3e-7])
def test_gradients_are_finite_where_the_angle_has_none(at: float, dtype: torch.dtype) -> None:
    cosines = torch.tensor([[at, 0.2, -0.1], [0.3, at, 0.0]], dtype=dtype, requires_grad=True)
    for y in ([0, 1], [1, 0]):
        loss = arcface(cosines, torch.tensor(y), 0.5, 64.0)
        assert bool(torch.isfinite(loss))
        assert bool(torch.isfinite(torch.autograd.grad(loss, cosines)[0]).all())


def test_at_an_angle_of_zero_the_true_class_counts_as_the_cosine_of_the_margin() -> None:
    cosines = torch.tensor([[1.0, 0.2]], dtype=torch.float64)
    want = math.log1p(math.exp(10 * (0.2 - math.cos(0.5))))
    assert float(arcface(cosines, torch.tensor([0]), 0.5, 10.0)) == pytest.approx(want, abs=2e-5)


def test_beyond_pi_no_easy_margin_is_made() -> None:
    """At theta > pi - m the cosine of theta + m rises again, and so it is left."""
    cosines, y = torch.tensor([[math.cos(3.0), 0.2, 0.1]], dtype=torch.float64), torch.tensor([0])
    close(arcface(cosines, y, 0.5, 4.0), by_angles(cosines, y, 0.5, 4.0), atol=1e-9)


def test_the_transfer_term_is_the_mean_over_samples_and_dimensions() -> None:
    predicted, vectors = rand(3, 4, seed=5).requires_grad_(), rand(3, 4, seed=6)
    want = sum((predicted[i, j] - vectors[i, j]) ** 2 for i in range(3) for j in range(4)) / 12
    got = transfer(predicted, vectors)
    assert isinstance(want, Tensor)
    close(got, want)
    close(torch.autograd.grad(got, predicted)[0], (predicted - vectors).detach() * 2 / 12)


def test_the_transfer_term_moves_the_extractor_and_leaves_the_projection_alone() -> None:
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double()
    h, g, v = nn.Linear(5, 4).double(), nn.Linear(5, 7).double(), etf(4, 4, 0).double()
    x, y, images, vectors = rand(8, 6, seed=7), torch.arange(8) % 4, rand(3, 6, seed=8), rand(3, 7, seed=9)

    def gradients(mu: float) -> list[list[Tensor]]:
        loss = arcface(unit(h(f(x))) @ v, y, 0.5, 64.0) + mu * transfer(g(f(images)), vectors)
        parts = [list(m.parameters()) for m in (f, h, g)]
        flat = torch.autograd.grad(loss, [p for part in parts for p in part])
        return [list(flat[:2]), list(flat[2:4]), list(flat[4:])]

    without, with_it = gradients(0.0), gradients(50.0)
    assert all(torch.equal(a, b) for a, b in zip(without[1], with_it[1], strict=True))
    assert all(float((a - b).abs().max()) > 1e-6 for a, b in zip(without[0], with_it[0], strict=True))
    assert all(float(a.abs().max()) == 0.0 < float(b.abs().max()) for a, b in zip(without[2], with_it[2], strict=True))


# ---- prototypes
def test_class_means_are_those_of_loops() -> None:
    values, classes = rand(11, 4, seed=10), torch.tensor([5, 1, 1, 0, 5, 5, 3, 1, 0, 0, 0])
    means, counts = class_means(values, classes, 7)
    for c in range(7):
        mine = [v for v, k in zip(values, classes.tolist(), strict=True) if k == c]
        assert int(counts[c]) == len(mine)
        close(means[c], torch.stack(mine).mean(dim=0) if mine else torch.zeros(4, dtype=torch.float64))
    assert means.dtype == torch.float64
    assert counts.dtype == torch.int64


@settings(max_examples=25, deadline=None, database=None)
@given(labels=st.lists(st.integers(0, 8), min_size=1, max_size=30), seed=st.integers(0, 10**6))
def test_prototypes_are_normalised_means_of_normalised_projections(labels: list[int], seed: int) -> None:
    z = rand(len(labels), 6, seed=seed) * torch.arange(1, len(labels) + 1)[:, None]  # lengths must not count
    p, classes = prototypes(z.float(), torch.tensor(labels), 9)
    assert classes.dtype == torch.int32
    assert classes.tolist() == sorted(set(labels))
    assert p.shape == (len(set(labels)), 6)
    assert p.dtype == torch.float32
    for row, c in zip(p, classes.tolist(), strict=True):
        mine = [v / v.norm() for v, label in zip(z, labels, strict=True) if label == c]
        mean = torch.stack(mine).mean(dim=0)
        if float(mean.norm()) > 1e-3:  # else float32 has too little left of it
            close(row, (mean / mean.norm()).float(), atol=1e-4)
            assert float(row.norm()) == pytest.approx(1.0, abs=1e-6)


def test_a_class_of_identical_samples_has_their_projection_as_its_prototype() -> None:
    z = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, -2.0], [3.0, 4.0]])
    p, classes = prototypes(z, torch.tensor([7, 7, 2, 7]), 10)
    assert classes.tolist() == [2, 7]
    close(p, torch.tensor([[0.0, -1.0], [0.6, 0.8]]), atol=1e-6)


def test_the_order_of_samples_and_their_lengths_do_not_move_a_prototype() -> None:
    z, y = rand(12, 5, seed=11).float(), torch.arange(12) % 3
    p, classes = prototypes(z, y, 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled, _ = prototypes(z[order] * torch.linspace(0.1, 50, 12)[:, None], y[order], 3)
    close(shuffled, p, atol=1e-6)
    assert classes.tolist() == [0, 1, 2]


def test_projections_of_zeros_make_no_nan() -> None:
    p, classes = prototypes(torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 1, 1]), 2)
    assert classes.tolist() == [0, 1]
    assert p.tolist() == [[0.0, 0.0], [0.0, 0.0]]


# ---- the maximum mean discrepancy
def k(a: Tensor, b: Tensor, bandwidths: tuple[float, ...] = BANDWIDTHS) -> Tensor:
    return torch.stack([torch.exp(-(a - b).square().sum() / (2 * s)) for s in bandwidths]).sum()


def by_pairs(x: Tensor, y: Tensor, bandwidths: tuple[float, ...] = BANDWIDTHS) -> Tensor:
    """The biased estimate, one pair after the other, with its diagonal."""
    b = range(len(x))
    terms = [
        k(x[j], x[i], bandwidths) + k(y[j], y[i], bandwidths) - 2 * k(x[j], y[i], bandwidths) for j in b for i in b
    ]
    return torch.stack(terms).mean()


def clouds(b: int = 6, d: int = 5, seed: int = 20) -> tuple[Tensor, Tensor]:
    """Two sets that differ in place and in spread, at distances where every bandwidth counts."""
    return rand(b, d, seed=seed, spread=1.6), 1.0 + rand(b, d, seed=seed + 1, spread=2.2)


def test_distances_and_kernels_are_those_of_loops() -> None:
    x, y = rand(3, 5, seed=12), rand(4, 5, seed=13)
    squared = squared_distances(x, y)
    want = torch.stack([torch.stack([(a - b).square().sum() for b in y]) for a in x])
    close(squared, want)
    close(kernel(squared, BANDWIDTHS), torch.stack([torch.stack([k(a, b) for b in y]) for a in x]))
    close(kernel(squared, (3.0,)), torch.exp(-want / 6))
    assert float(kernel(torch.zeros(1, dtype=torch.float64), BANDWIDTHS)) == 4.0


def test_distances_are_never_below_zero() -> None:
    x = 30 + rand(40, 16, seed=14, spread=1e-3).float()
    squared = squared_distances(x, x)
    assert float(squared.min()) >= 0.0
    close(squared, torch.zeros(40, 40), atol=0.05)


@pytest.mark.parametrize("bandwidths", [BANDWIDTHS, (0.5,), (1.0, 7.0, 200.0)])
def test_the_discrepancy_is_the_mean_over_all_pairs(bandwidths: tuple[float, ...]) -> None:
    x, y = clouds()
    got = mmd(x, y, bandwidths)
    assert got.shape == ()
    assert float(got) > 1e-3
    close(got, by_pairs(x, y, bandwidths))
    if bandwidths == BANDWIDTHS:
        close(mmd(x, y), got)


@pytest.mark.parametrize(("b", "d"), [(2, 3), (7, 64), (100, 32)])
def test_in_single_precision_it_is_as_near_as_that_allows(b: int, d: int) -> None:
    x, y = rand(b, d, seed=15), rand(b, d, seed=16)
    close(mmd(x.float(), y.float()).double(), by_pairs(x, y) if b < 10 else mmd(x, y), atol=1e-5)


@settings(max_examples=20, deadline=None, database=None)
@given(b=st.integers(1, 9), d=st.integers(1, 8), spread=st.floats(1e-3, 30), seed=st.integers(0, 10**6))
def test_laws_of_the_discrepancy(b: int, d: int, spread: float, seed: int) -> None:
    x, y = clouds(b, d, seed)
    x, y = spread * x, spread * y
    value = mmd(x, y)
    assert -1e-12 <= float(value) <= 8.0
    close(mmd(x, x), torch.zeros((), dtype=torch.float64))
    close(mmd(x, x.clone()), torch.zeros((), dtype=torch.float64))
    close(mmd(y, x), value)
    moved = rand(1, d, seed=seed + 2, spread=3.0)
    close(mmd(x + moved, y + moved), value, atol=1e-10)
    turned = orthonormal(d, d, seed + 3)
    close(mmd(x @ turned, y @ turned), value, atol=1e-10)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    close(mmd(x[order], y), value)
    close(mmd(x, y[order]), value)


@pytest.mark.parametrize("distance", [0.0, 0.1, 3.0, 8.0, 1000.0])
def test_of_one_sample_each_it_has_a_closed_form(distance: float) -> None:
    x = rand(1, 4, seed=17)
    y = x + distance * torch.tensor([[0.5, 0.5, -0.5, 0.5]], dtype=torch.float64)
    want = 2 * sum(1 - math.exp(-(distance**2) / (2 * s)) for s in BANDWIDTHS)
    assert float(mmd(x, y)) == pytest.approx(want, abs=1e-10)


def test_of_clouds_far_apart_the_terms_within_remain() -> None:
    x, y = clouds()
    n = range(len(x))
    within = sum(float(k(x[j], x[i]) + k(y[j], y[i])) for j in n for i in n) / len(x) ** 2
    far = torch.zeros(1, 5, dtype=torch.float64)
    far[0, 2] = 1e3
    assert float(mmd(x, y + far)) == pytest.approx(within, abs=1e-10)
    assert float(mmd(0 * x, 0 * y + far)) == pytest.approx(8.0, abs=1e-12)


def gradients(of: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, wanted: str) -> dict[str, Tensor]:
    leaves = {"x": x.clone().requires_grad_("x" in wanted), "y": y.clone().requires_grad_("y" in wanted)}
    (3.0 * of(leaves["x"], leaves["y"])).backward()  # type: ignore[no-untyped-call]
    assert all((leaf.grad is not None) == (name in wanted) for name, leaf in leaves.items())
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("wanted", ["x", "y", "xy"])
@pytest.mark.parametrize("bandwidths", [BANDWIDTHS, (2.0, 30.0)])
@pytest.mark.parametrize("b", [1, 2, 6])
def test_its_gradient_is_that_of_the_sum_over_pairs(b: int, bandwidths: tuple[float, ...], wanted: str) -> None:
    x, y = clouds(b)
    got = gradients(lambda x, y: mmd(x, y, bandwidths), x, y, wanted)
    want = gradients(lambda x, y: by_pairs(x, y, bandwidths), x, y, wanted)
    for name, value in want.items():
        assert float(value.abs().max()) > 1e-3
        close(got[name], value)


@pytest.mark.parametrize("wanted", ["x", "y", "xy"])
def test_its_gradient_is_that_of_finite_differences(wanted: str) -> None:
    x, y = clouds(4, 3)
    x.requires_grad_("x" in wanted)
    y.requires_grad_("y" in wanted)
    assert torch.autograd.gradcheck(mmd, (x, y), eps=1e-6, atol=1e-8, rtol=1e-6)


def test_its_gradient_reaches_what_its_arguments_were_made_from() -> None:
    """Chained, as it is used: through a linear map, beside another term, with latents that need no gradient."""
    x, y = clouds()
    a, b = rand(5, 5, seed=18).requires_grad_(), rand(6, 5, seed=19)

    def of(discrepancy: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        q = x @ a
        return torch.autograd.grad(discrepancy(q, y) + 0.7 * (q - b).square().mean(), a)[0]

    close(of(mmd), of(by_pairs))


@pytest.mark.parametrize("bandwidths", [BANDWIDTHS, (2.0, 30.0)])
@pytest.mark.parametrize("b", [1, 2, 6])
def test_the_gradient_in_closed_form_is_that_of_the_sum_over_pairs(b: int, bandwidths: tuple[float, ...]) -> None:
    x, y = clouds(b)
    before = x.clone(), y.clone()
    got, want = mmd_gradient(x, y, bandwidths), gradients(lambda x, y: by_pairs(x, y, bandwidths), x, y, "x")["x"] / 3
    assert float(want.abs().max()) > 1e-3
    close(got, want)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    if bandwidths == BANDWIDTHS:
        close(mmd_gradient(x, y), got)


def test_the_gradient_in_closed_form_is_that_of_finite_differences() -> None:
    x, y = clouds(4, 3)
    got, step = mmd_gradient(x, y), 1e-5
    for j, i in itertools.product(range(4), range(3)):
        moved = torch.zeros_like(x)
        moved[j, i] = step
        slope = (mmd(x + moved, y) - mmd(x - moved, y)) / (2 * step)
        assert float(got[j, i]) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


def test_the_gradient_in_single_precision_is_as_near_as_that_allows() -> None:
    x, y = rand(60, 32, seed=21, spread=0.3), rand(60, 32, seed=22)
    got, want = mmd_gradient(x.float(), y.float()).double(), mmd_gradient(x, y)
    close(got, want, atol=1e-4 * float(want.abs().max()))


def test_nothing_is_recorded_where_nobody_asks_for_a_gradient() -> None:
    x, y = clouds()
    assert not mmd(x, y).requires_grad
    with torch.no_grad():
        assert not mmd(x.requires_grad_(), y).requires_grad


def test_of_samples_on_one_point_the_gradient_is_zero_and_no_nan() -> None:
    x = torch.ones(3, 4, dtype=torch.float64)
    got = gradients(mmd, x, x, "xy")
    close(got["x"], torch.zeros_like(x))
    close(got["y"], torch.zeros_like(x))


def test_bandwidths_from_the_median_follow_the_scale_of_the_samples() -> None:
    x, y = clouds(8, 6)
    got = median_bandwidths(x, y)
    assert len(got) == 4
    assert all(isinstance(s, float) and s > 0 for s in got)
    assert list(got) == sorted(got)
    assert median_bandwidths(5 * x, 5 * y) == pytest.approx([25 * s for s in got], rel=1e-9)
    assert median_bandwidths(x + 2, y + 2) == pytest.approx(list(got), rel=1e-9)
    order = torch.arange(7, -1, -1)
    assert median_bandwidths(x[order], y) == pytest.approx(list(got), rel=1e-9)
    typical = float(squared_distances(x, y).median())
    assert got[0] / 50 < typical < 50 * got[-1]


def test_bandwidths_from_the_median_are_shares_of_that_of_all_pairs_of_points() -> None:
    x, y = clouds(4, 3)
    both = [*x, *y]
    between = sorted(float((a - b).square().sum()) for a, b in itertools.combinations(both, 2))
    middle = between[(len(between) - 1) // 2]  # the lower of two
    assert median_bandwidths(x, y) == pytest.approx([middle / 4, middle / 2, middle, 2 * middle], rel=1e-9)


def test_fixed_bandwidths_see_nothing_of_large_latents_and_those_from_the_median_do() -> None:
    x, near, far = rand(12, 16384, seed=30), rand(12, 16384, seed=31), 0.2 + rand(12, 16384, seed=32)
    kernels = kernel(squared_distances(x, near).float(), BANDWIDTHS)
    assert float(kernels.max()) == 0.0
    adapted = median_bandwidths(x.float(), near.float())
    values = [float(mmd(x.float(), other.float(), adapted)) for other in (near, far)]
    assert values[1] > 1.02 * values[0]
    assert float(mmd(x.float(), near.float(), BANDWIDTHS)) == pytest.approx(8 / 12, rel=1e-4)


def test_bandwidths_of_samples_on_one_point_can_be_used() -> None:
    x = torch.ones(4, 3)
    got = median_bandwidths(x, x)
    assert all(s > 0 and math.isfinite(s) for s in got)
    assert float(mmd(x, x, got)) == pytest.approx(0.0, abs=1e-6)


# ---- the transformer and the centroids
def layers(f: nn.Module) -> list[nn.Module]:
    return [m for m in f.modules() if not list(m.children())]


def moved_transformer(d: int, h: int, seed: int) -> nn.Module:
    """One whose every parameter and running statistic is away from where it begins."""
    torch.manual_seed(seed)
    f = transformer(d, h).double()
    norm = layers(f)[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3.0)
    return f


def test_the_transformer_has_two_linear_layers_and_a_batch_norm() -> None:
    f = transformer(100, 512)
    first, norm, relu, last = layers(f)
    assert isinstance(first, nn.Linear)
    assert first.weight.shape == (100, 100)
    assert first.bias is not None
    assert isinstance(norm, nn.BatchNorm1d)
    assert (norm.num_features, norm.eps, norm.momentum) == (100, 1e-5, 0.1)
    assert norm.affine
    assert norm.track_running_stats
    assert isinstance(relu, nn.ReLU)
    assert isinstance(last, nn.Linear)
    assert last.weight.shape == (512, 100)
    assert last.bias is not None
    assert sum(p.numel() for p in f.parameters()) == 62_012
    assert transformer(7, 3)(torch.rand(4, 7)).shape == (4, 3)


def test_the_transformer_begins_as_layers_of_its_kind_do() -> None:
    torch.manual_seed(4)
    first, norm, _, last = layers(transformer(50, 40))
    for layer in (first, last):
        assert isinstance(layer, nn.Linear)
        bound = 1 / math.sqrt(50)
        for value in (layer.weight, layer.bias):
            assert 0.8 * bound < float(value.detach().abs().max()) <= bound
    assert isinstance(norm, nn.BatchNorm1d)
    assert torch.equal(norm.weight.detach(), torch.ones(50))
    assert torch.equal(norm.bias.detach(), torch.zeros(50))


def by_hand(f: nn.Module, p: Tensor, mode: str) -> Tensor:
    """F(P) one layer after the other, with the running statistics or with those of the whole set."""
    first, norm, _, last = layers(f)
    assert isinstance(first, nn.Linear)
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        a = p @ first.weight.T + first.bias
        mean, var = norm.running_mean, norm.running_var
        if mode == "batch":
            mean = a.mean(dim=0)
            var = (a - mean).square().mean(dim=0)  # over n, not n - 1
        assert mean is not None
        assert var is not None
        a = (a - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias
        return a.clamp(min=0) @ last.weight.T + last.bias


@each_mode
def test_centroids_are_class_means_of_the_mapped_prototypes(mode: str) -> None:
    f, p, classes = moved_transformer(6, 5, seed=1), rand(13, 6, seed=40), torch.tensor([4, 0, 2, 2, 4, 2, 6] + [6] * 6)
    means, present = centroids(f, p, classes, 8, mode)
    assert means.shape == (8, 5)
    assert present.dtype == torch.bool
    assert present.tolist() == [c in (0, 2, 4, 6) for c in range(8)]
    mapped = by_hand(f, p, mode)
    for c in (0, 2, 4, 6):
        close(means[c], torch.stack([q for q, k in zip(mapped, classes.tolist(), strict=True) if k == c]).mean(dim=0))
    assert not means.requires_grad


def test_the_two_modes_differ_as_their_statistics_do() -> None:
    f, p, classes = moved_transformer(6, 5, seed=1), rand(13, 6, seed=40), torch.arange(13) % 4
    one, other = (centroids(f, p, classes, 4, mode)[0] for mode in MODES)
    assert float((one - other).abs().max()) > 0.05


@each_mode
@pytest.mark.parametrize("training", [True, False])
def test_making_centroids_leaves_the_transformer_as_it_was(mode: str, training: bool) -> None:
    f, p, classes = moved_transformer(6, 5, seed=2).train(training), rand(9, 6, seed=41), torch.arange(9) % 3
    before = {name: value.clone() for name, value in f.state_dict().items()}
    first, _ = centroids(f, p, classes, 3, mode)
    assert all(torch.equal(value, before[name]) for name, value in f.state_dict().items())
    assert [m.training for m in f.modules()] == [training] * len(list(f.modules()))
    assert torch.equal(centroids(f, p, classes, 3, mode)[0], first)
    norm = layers(f)[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.momentum == 0.1
    f.train()(p)  # and goes on to keep statistics
    assert norm.running_mean is not None
    assert not torch.equal(norm.running_mean, before[next(n for n in before if n.endswith("running_mean"))])


@each_mode
def test_the_order_of_the_prototypes_does_not_move_a_centroid(mode: str) -> None:
    f, p, classes = moved_transformer(6, 5, seed=4), rand(10, 6, seed=43), torch.arange(10) % 3
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    close(centroids(f, p[order], classes[order], 3, mode)[0], centroids(f, p, classes, 3, mode)[0], atol=1e-10)


# ---- the alignment
def uploaded(c: int = 5, each: int = 8, d: int = 6) -> tuple[Tensor, Tensor]:
    """Unit vectors about c directions, and their classes."""
    classes = torch.arange(c * each) % c
    return unit(etf(c, d, 0).double().T[classes] + rand(c * each, d, seed=50, spread=0.25)), classes


def network(seed: int = 0, d: int = 6, h: int = 4) -> Network:
    """F in flat blocks, float32 as in a run."""
    torch.manual_seed(seed)
    f = transformer(d, h)
    return Network(f, Params.of(f).clone())


@pytest.mark.parametrize("b", [2, 7])
def test_the_passes_written_out_are_those_of_autograd(b: int) -> None:
    p, slope, by = rand(b, 6, seed=60), rand(b, 4, seed=61), moved_transformer(6, 4, seed=6).train()
    f = copy.deepcopy(by)
    for value in f.parameters():
        value.grad = torch.full_like(value, 7.0)  # what an earlier step has left
    passes = Passes(f)
    for _ in range(2):
        by.zero_grad()
        want = by(p)
        want.backward(slope)
        got = passes.forward(p)
        close(got, want.detach())
        passes.backward(slope)
        for (name, one), other in zip(f.named_parameters(), by.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert name == "0.bias" or float(other.grad.abs().max()) > 1e-3
            close(one.grad, other.grad)
            assert torch.equal(one, other)
        for one, other in zip(f.buffers(), by.buffers(), strict=True):
            close(one, other)
        p, slope = p.flip(0) + 0.1, slope * 2


class Latents:
    """Latents of N(0, 1), and how many were drawn at a time."""

    def __init__(self, h: int = 4) -> None:
        self.rng, self.h = torch.Generator().manual_seed(9), h
        self.drawn: list[int] = []

    def __call__(self, n: int) -> Tensor:
        self.drawn.append(n)
        return torch.randn(n, self.h, generator=self.rng)


def aligned_by_definition(
    f: nn.Module, e: Tensor, p: Tensor, classes: Tensor, how: Alignment, rng: torch.Generator
) -> tuple[Tensor, list[float], list[float]]:
    """The alignment in float64 by automatic differentiation with an Adam each for F and E: E, the MMD and the MSE of
    each step."""
    f.double().train()
    kept, draw = e.double().clone().requires_grad_(), Latents()
    optimizers = [torch.optim.Adam(f.parameters(), lr=how.lr), torch.optim.Adam([kept], lr=how.lr)]
    mmds, mses = [], []
    for _ in range(how.epochs):
        order = torch.randperm(len(p), generator=rng)
        for rows in order.split(how.batch_size):  # type: ignore[no-untyped-call]
            if len(rows) == 1:
                continue
            q, w = f(p[rows].double()), draw(len(rows)).double()
            first = mmd(q, w, how.bandwidths)
            second = torch.stack(
                [(a - kept[c]).square() for a, c in zip(q, classes[rows].tolist(), strict=True)]
            ).mean()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=False)
            (first + how.lambda_ * second).backward()
            nn.utils.clip_grad_norm_(f.parameters(), how.clip)
            nn.utils.clip_grad_norm_([kept], how.clip)
            for optimizer in optimizers:
                optimizer.step()
            mmds.append(float(first.detach()))
            mses.append(float(second.detach()))
    return kept.detach(), mmds, mses


@pytest.mark.parametrize("lam", [0.0, 0.1, 1.0, 20.0])
@pytest.mark.parametrize(
    ("batch_size", "clip", "epochs"),
    [(16, 100.0, 3), (13, 100.0, 3), (13, 100.0, 1), (40, math.inf, 3), (100, 100.0, 2), (16, 0.05, 3)],
)
def test_an_alignment_is_that_of_two_optimizers_and_automatic_differentiation(
    lam: float, batch_size: int, clip: float, epochs: int
) -> None:
    """Of 40 prototypes 13 leave one alone, which no batch can be made of; a second call has new optimizers."""
    how = Alignment(0.01, epochs, batch_size, lam, clip, BANDWIDTHS if lam else (2.0, 7.0))
    p, classes = uploaded()
    p, e, f = p.float(), rand(7, 4, seed=52).float(), network()
    by, kept = copy.deepcopy(f.module), e.clone()
    rngs = [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(2):
        start, draw = e.clone(), Latents()
        moved, losses = align(f, e, p, classes, draw, how, rngs[0])
        assert torch.equal(e, start)
        assert torch.equal(moved[5:], start[5:])  # nobody has these classes
        assert torch.equal(moved[:5], start[:5]) == (lam == 0)
        kept, mmds, mses = aligned_by_definition(by, kept, p, classes, how, rngs[1])
        close(moved.double(), kept, atol=2e-5)
        ends = f.module.state_dict()
        for name, value in by.state_dict().items():
            # a bias before BatchNorm has no gradient, and Adam makes steps of the rounding; the mean follows it
            if name not in ("0.bias", "1.running_mean"):
                close(ends[name].double(), value.double(), atol=1e-4)
        assert sum(draw.drawn) == epochs * (40 - (batch_size == 13))
        assert losses["mmd"] == pytest.approx(mmds[-1], abs=1e-4)
        assert losses["mse"] == pytest.approx(mses[-1], rel=1e-4)
        e = moved


def aligned(lam: float, discrepancy: float = 1.0, epochs: int = 120) -> tuple[nn.Module, Tensor, Tensor, list[float]]:
    """F and E after L = MMD(F(P), w) + lam MSE(F(P), E[c]), E before, and the MMD of each step."""
    torch.manual_seed(5)
    p, classes = uploaded()
    f, e = transformer(6, 4).double(), rand(5, 4, seed=51).requires_grad_()
    start, values = e.detach().clone(), []
    optimizers = [torch.optim.Adam(f.parameters(), 0.01), torch.optim.Adam([e], 0.01)]
    for epoch in range(epochs):
        q = f(p)
        value = mmd(q, rand(len(p), 4, seed=100 + epoch))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=False)
        (discrepancy * value + lam * transfer(q, e[classes])).backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        values.append(float(value.detach()))
    return f, e.detach(), start, values


def spread_ratio(f: nn.Module) -> float:
    """Spread of F(P) within classes over that between them."""
    p, classes = uploaded()
    with torch.no_grad():
        q = f.eval()(p)
    means, _ = class_means(q, classes, 5)
    return float((q - means[classes]).square().mean() / (means - means.mean(dim=0)).square().mean())


def test_a_large_weight_of_the_centroid_term_draws_each_class_together() -> None:
    ratios = [spread_ratio(aligned(lam)[0]) for lam in (0.0, 1.0, 100.0)]
    assert ratios[2] < 0.4 * ratios[0]
    assert ratios[2] < ratios[1] < ratios[0]


def test_without_the_centroid_term_the_centroids_stay() -> None:
    _, e, start, _ = aligned(0.0, epochs=5)
    assert torch.equal(e, start)
    _, e, start, _ = aligned(1.0, epochs=5)
    assert float((e - start).abs().min()) > 1e-3


def test_alignment_brings_the_mapped_prototypes_to_the_latents() -> None:
    _, _, _, values = aligned(0.0)
    assert sum(values[-20:]) / 20 < 0.5 * values[0]
    assert min(values) >= 0.0
