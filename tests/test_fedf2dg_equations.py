"""FedF2DG's equations against what they are by definition: exact fractions, NumPy in float64, and networks and loops
written out here. Whole runs are in `test_fedf2dg.py`."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fldist.algorithms.fedf2dg import Kd, distil, kd_loss, nominal, quotas, targets
from fldist.inversion import (
    Inversion,
    Statistics,
    competition,
    cyclic,
    draw,
    invert,
    objective,
    statistics_gap,
    total_variation,
)
from fldist.models.cnn import CnnBn
from fldist.models.resnet import ResNet4, ResNet18Small
from fldist.models.train import Network, Order
from fldist.params import Layout, Params

CLASSES = 5
MANY = settings(max_examples=60, deadline=None, database=None)


def close(got: Tensor, want: Tensor | float, atol: float = 1e-9) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=0, atol=atol)


def rand(*shape: int, seed: int = 0, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def ints(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    x = at.clone().requires_grad_(True)
    function(x).backward()
    assert x.grad is not None
    return x.grad


# ---- quotas
HISTOGRAMS = [[30, 0, 10, 0], [5, 5, 5, 5], [0, 1, 0, 79], [7, 0, 0, 0]]


@st.composite
def histograms(draw_of: Any) -> list[list[int]]:
    clients, classes = draw_of(st.integers(1, 7)), draw_of(st.integers(1, 8))
    count = st.one_of(st.just(0), st.integers(0, 500))
    rows = draw_of(st.lists(st.lists(count, min_size=classes, max_size=classes), min_size=clients, max_size=clients))
    assume(all(any(row) for row in rows))
    return rows  # type: ignore[no-any-return]


def nominal_by_hand(rows: Any, b: int, losses: Any, sharpness: float = 1.0, mix: float = 1 / 3) -> Any:
    n = np.array(rows, dtype=np.float64).sum(axis=1)
    p = n / n.sum()
    if losses is None:
        return b * len(n) * p
    e = np.exp(sharpness * (np.array(losses, dtype=np.float64) - max(losses)))
    return b * len(n) * (mix * e / e.sum() + (1 - mix) * p)


def quotas_by_hand(rows: list[list[int]], amounts: Any) -> list[list[int]]:
    counts = []
    for row, amount in zip(rows, amounts, strict=True):
        counts.append([math.floor(h / sum(row) * amount + 1e-9) for h in row])
        if not any(counts[-1]):
            counts[-1][row.index(max(row))] = 1
    return counts


def test_numbers_of_images_by_hand() -> None:
    """Shares 0.5, 0.25, 0.25 of 3 x 8 images; with losses ln 2, 0, 0 a third of them by 0.5, 0.25, 0.25, too."""
    rows = ints([[4, 4], [4, 0], [1, 3]])
    close(nominal(rows, 8), [12.0, 6.0, 6.0])
    assert quotas(rows, 8).tolist() == [[6, 6], [6, 0], [1, 4]]
    close(nominal(rows, 8, doubles([0.0, 0.0, math.log(2)])), [24 * (1 / 12 + 1 / 3), 6.0, 24 * (1 / 6 + 1 / 6)])
    assert quotas(rows, 8, doubles([0.0, 0.0, math.log(2)])).tolist() == [[5, 5], [6, 0], [2, 6]]


@MANY
@given(rows=histograms(), b=st.integers(1, 300))
def test_without_losses_the_quota_is_the_exact_floor_of_the_share(rows: list[list[int]], b: int) -> None:
    """floor(b K h_i[c] / n), in whole numbers: what divides exactly is not lost to binary fractions."""
    total, clients = sum(map(sum, rows)), len(rows)
    want = [[math.floor(Fraction(b * clients * h, total)) for h in row] for row in rows]
    for counts, row in zip(want, rows, strict=True):
        if not any(counts):
            counts[row.index(max(row))] = 1
    got = quotas(ints(rows), b)
    assert got.dtype == torch.int64
    assert got.tolist() == want


@MANY
@given(rows=histograms(), b=st.integers(1, 300), seed=st.integers(0, 10**6), sharpness=st.sampled_from([0.0, 1.0, 2.5]))
def test_with_losses_the_budget_is_kept_and_the_quotas_are_the_formula(
    rows: list[list[int]], b: int, seed: int, sharpness: float
) -> None:
    losses = rand(len(rows), seed=seed, spread=3.0).abs()
    for mix in (0.0, 1 / 3, 1.0):
        got = nominal(ints(rows), b, losses, sharpness, mix)
        assert got.dtype == torch.float64
        assert float(got.sum()) == pytest.approx(b * len(rows), abs=1e-6)
        want = nominal_by_hand(rows, b, losses.tolist(), sharpness, mix)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)
        share = np.array(rows) / np.array(rows).sum(axis=1, keepdims=True) * want[:, None]
        counts = quotas(ints(rows), b, losses, sharpness, mix)
        if (np.abs(share - np.round(share)) > 1e-7)[np.array(rows) > 0].all():
            assert counts.tolist() == quotas_by_hand(rows, want)
        for made, amount, row in zip(counts.tolist(), want, rows, strict=True):
            assert sum(made) >= 1
            assert all(h > 0 for h, m in zip(row, made, strict=True) if m)
            assert sum(made) == 1 or abs(sum(made) - amount) < len(row)


def test_equal_losses_count_as_equal_shares() -> None:
    n = np.array(HISTOGRAMS).sum(axis=1)
    want = 64 * 4 * ((1 / 3) / 4 + (2 / 3) * n / n.sum())
    for value in (0.0, 2.3, 5000.0):
        np.testing.assert_allclose(nominal(ints(HISTOGRAMS), 64, torch.full((4,), value).double()).numpy(), want)


@pytest.mark.parametrize("more", [-3.0, 17.0, 1e4, -1e4])
def test_a_constant_added_to_all_losses_changes_nothing(more: float) -> None:
    losses = doubles([0.3, 1.7, 0.0, 2.2])
    close(nominal(ints(HISTOGRAMS), 64, losses + more), nominal(ints(HISTOGRAMS), 64, losses), atol=1e-8)


def test_a_client_gets_more_images_the_higher_its_loss() -> None:
    before = None
    for value in (0.0, 0.5, 1.0, 2.0, 8.0):
        now = nominal(ints(HISTOGRAMS), 64, doubles([1.0, value, 1.0, 1.0]))
        if before is not None:
            assert now[1] > before[1]
            assert (now[[0, 2, 3]] < before[[0, 2, 3]]).all()
        before = now


def test_a_huge_loss_takes_the_whole_third_and_nothing_overflows() -> None:
    n = doubles(HISTOGRAMS).sum(dim=1)
    for value in (1e4, 1e8):
        got = nominal(ints(HISTOGRAMS), 64, doubles([0.1, 0.2, value, 0.3]))
        close(got, 256 * ((2 / 3) * n / n.sum() + doubles([0, 0, 1 / 3, 0])), atol=1e-7)
        assert (quotas(ints(HISTOGRAMS), 64, doubles([0.1, 0.2, value, 0.3])) >= 0).all()
    close(
        nominal(ints(HISTOGRAMS), 64, doubles([-1e4, -1e4, -1e4, -1e4])),
        nominal(ints(HISTOGRAMS), 64, torch.zeros(4).double()),
    )


def test_sharpness_multiplies_the_losses() -> None:
    losses = doubles([0.3, 1.7, 0.0, 2.2])
    rows = ints(HISTOGRAMS)
    close(nominal(rows, 64, losses, 2.0), nominal(rows, 64, 2 * losses))
    close(nominal(rows, 64, losses, 0.0), nominal(rows, 64, torch.zeros(4, dtype=torch.float64)))
    close(nominal(rows, 64, losses, mix=0.0), nominal(rows, 64))


def test_a_client_whose_quota_is_nothing_makes_one_image_of_its_most_frequent_class() -> None:
    rows = [[1000, 0, 0, 0], [0, 1, 2, 1]]
    assert nominal_by_hand(rows, 1, None)[1] < 0.01
    assert quotas(ints(rows), 1).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    losses = doubles([50.0, 0.0])
    assert quotas(ints(rows), 1, losses).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


def test_whole_numbers_are_not_lost_in_fractions() -> None:
    """6 images times 5 / 10, times 10 / 15 and times 11 / 33 come to a little less in float64, in any order."""
    assert quotas(ints([[5, 2], [3, 0]]), 3).tolist() == [[3, 1], [1, 0]]
    assert quotas(ints([[10, 1], [4, 0]]), 3).tolist() == [[4, 0], [1, 0]]
    assert quotas(ints([[11, 1], [21, 0]]), 3).tolist() == [[2, 0], [3, 0]]
    for k in (3, 7, 10, 29, 49):
        assert quotas(ints([[1] * k]), k).tolist() == [[1] * k]


def test_targets_are_the_classes_in_ascending_order() -> None:
    got = targets(ints([2, 0, 3, 1]))
    assert got.dtype == torch.int64
    assert got.tolist() == [0, 0, 2, 2, 2, 3]
    assert targets(ints([0, 0, 0, 0, 1])).tolist() == [4]


# ---- total variation, L2
def test_total_variation_by_hand() -> None:
    """Differences along a row 3 and 4, along a column 4 and 3, on the diagonals 1 and 0: 5 + 5 + 1 + 0."""
    close(total_variation(doubles([[[[0.0, 3.0], [4.0, 0.0]]]])), 11.0)


def variation(x: Any) -> float:
    steps = [(0, 1), (1, 0), (1, -1), (1, 1)]
    total = 0.0
    for down, right in steps:
        squares = 0.0
        for m, c, i, j in np.ndindex(*x.shape):
            if i + down < x.shape[2] and 0 <= j + right < x.shape[3]:
                squares += (x[m, c, i, j] - x[m, c, i + down, j + right]) ** 2
        total += math.sqrt(squares)
    return total


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (1, 1, 2, 7), (2, 3, 6, 2)])
def test_total_variation_is_four_norms_over_the_whole_batch(shape: tuple[int, ...]) -> None:
    close(total_variation(rand(*shape)), variation(rand(*shape).numpy()))


def test_total_variation_of_constant_images_is_0_and_has_a_gradient() -> None:
    x = doubles([2.0, -1.0]).reshape(1, 2, 1, 1).expand(3, 2, 4, 4).clone()
    close(total_variation(x), 0.0)
    assert not gradient(total_variation, x).any()


def test_the_gradient_of_the_total_variation_is_the_same_for_fainter_images() -> None:
    x = rand(3, 2, 5, 5)
    want = gradient(total_variation, x)
    for faint in (1e-3, 1e-9):
        close(gradient(total_variation, faint * x), want)


def test_total_variation_is_linear_and_grows_with_the_root_of_the_batch() -> None:
    x = rand(3, 2, 5, 5)
    close(total_variation(-2.5 * x), 2.5 * total_variation(x))
    close(total_variation(torch.cat([x, x])), math.sqrt(2) * total_variation(x))


# ---- cyclic shifts
@pytest.mark.parametrize("shift", [(0, 0), (2, 1), (-1, 2), (-2, -2)])
def test_a_shift_is_cyclic_the_first_number_down_the_second_to_the_right(shift: tuple[int, int]) -> None:
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).double()
    got = cyclic(x, shift)
    for m, c, i, j in np.ndindex(2, 3, 4, 5):
        assert got[m, c, (i + shift[0]) % 4, (j + shift[1]) % 5] == x[m, c, i, j]


# ---- statistics of BatchNorm
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in float64."""
    flat = x.detach().double().transpose(0, 1).flatten(1).numpy()
    return torch.from_numpy(flat.mean(axis=1)), torch.from_numpy(flat.var(axis=1))


def normalised(channels: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.BatchNorm2d:
    """A layer whose statistics and weights are drawn."""
    layer = nn.BatchNorm2d(channels).to(dtype).eval()
    with torch.no_grad():
        layer.running_mean.copy_(rand(channels, seed=seed))  # type: ignore[union-attr]
        layer.running_var.copy_(0.5 + rand(channels, seed=seed + 1).abs())  # type: ignore[union-attr]
        layer.weight.copy_(1 + 0.3 * rand(channels, seed=seed + 2))
        layer.bias.copy_(0.3 * rand(channels, seed=seed + 3))
    return layer


def gap_of(module: nn.Module, x: Tensor) -> Tensor:
    with Statistics(module) as statistics:
        module(x)
        return statistics.gap()


def gap_at(module: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float(gap_of(module, x))


def test_the_gap_of_a_layer_is_the_sum_of_two_norms() -> None:
    got = statistics_gap(doubles([1.0, 2.0]), doubles([4.0, 9.0]), doubles([4.0, 6.0]), doubles([1.0, 5.0]))
    close(got, 5.0 + 5.0)  # (3, 4) between the means, (3, 4) between the variances


def test_the_gap_takes_the_biased_variance_of_a_layers_input() -> None:
    layer = normalised(3)
    x = rand(2, 3, 2, 1, spread=2.0)
    mean, variance = moments(x)
    want = torch.linalg.vector_norm(layer.running_var - variance) + torch.linalg.vector_norm(layer.running_mean - mean)
    close(gap_of(layer, x), want)
    unbiased = torch.linalg.vector_norm(layer.running_var - variance * 4 / 3)
    assert abs(float(want - unbiased - torch.linalg.vector_norm(layer.running_mean - mean))) > 0.1
    assert gap_at(layer, x) > 0


def test_a_single_pixel_has_variance_0() -> None:
    layer = normalised(3)
    x = rand(1, 3, 1, 1)
    want = torch.linalg.vector_norm(layer.running_var) + torch.linalg.vector_norm(layer.running_mean - x.flatten())
    close(gap_of(layer, x), want)
    assert torch.isfinite(gradient(lambda t: gap_of(layer, t), x)).all()


def test_the_variance_stands_on_a_large_mean() -> None:
    """In float32, where a mean of squares less a square of means would have lost it."""
    layer = nn.BatchNorm2d(2).eval()
    x = rand(8, 2, 6, 6, dtype=torch.float32) + 300.0
    mean, variance = moments(x)
    layer.running_mean, layer.running_var = mean.float(), variance.float()
    assert gap_at(layer, x) < 2e-3


def in_step(module: nn.Module, x: Tensor) -> None:
    """Give every layer the statistics of what reaches it, the first ones first."""
    for layer in [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]:
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda m, i, seen=seen: seen.append(i[0]))
        module(x)
        handle.remove()
        layer.running_mean, layer.running_var = moments(seen[0])


def test_the_gap_is_0_for_a_batch_that_reproduces_the_statistics_and_its_gradient_is_finite() -> None:
    module, x = cnn(seed=4).double(), rand(6, 1, 8, 8)
    assert gap_at(module, x) > 0.1
    in_step(module, x)
    close(gap_of(module, x), 0.0)
    assert torch.isfinite(gradient(lambda t: gap_of(module, t), x)).all()
    assert gap_at(module, x * 1.1) > 1e-3


def test_the_gap_does_not_know_the_order_of_the_images_nor_at_the_images_themselves_their_place() -> None:
    x = rand(5, 3, 4, 4)
    permuted = x[[3, 0, 4, 1, 2]]
    layer = normalised(3)
    close(gap_of(layer, permuted), gap_of(layer, x))
    close(gap_of(layer, torch.roll(x, (1, -2), (2, 3))), gap_of(layer, x))
    module = cnn(channels=3).double()
    close(gap_of(module, permuted), gap_of(module, x))
    assert abs(gap_at(module, torch.roll(x, (1, -1), (2, 3))) - gap_at(module, x)) > 1e-6


def test_the_gap_sums_over_2d_layers_only_and_is_that_of_the_last_pass() -> None:
    module = nn.Sequential(normalised(3), nn.Flatten(), nn.BatchNorm1d(12).double().eval())
    x, other = rand(5, 3, 2, 2), rand(2, 3, 2, 2, seed=7)
    want = gap_of(normalised(3), x)
    close(gap_of(module, x), want)
    with Statistics(module) as statistics:
        module(other)
        module(x)
        close(statistics.gap(), want)
    plain = nn.Sequential(nn.Conv2d(3, 2, 2), nn.Flatten()).double()
    nothing = gap_of(plain, x)
    assert nothing.shape == ()
    assert float(nothing) == 0.0


# ---- the competition
def compete(z_u: Any, z_g: Any, temperature: float = 3.0, joint: str = "unclamped") -> float:
    """R_comp, entry by entry."""
    distributions = []
    for z in (z_g, z_u):
        e = np.exp(z / temperature - (z / temperature).max(axis=1, keepdims=True))
        distributions.append(e / e.sum(axis=1, keepdims=True))
    p, q = distributions
    d = 0.0
    for a, b in zip(p.flatten(), q.flatten(), strict=True):
        small, large = 0.01, 0.99
        mean = (a + b) / 2
        a, b = min(max(a, small), large), min(max(b, small), large)
        if joint == "clamped":
            mean = (a + b) / 2
        mean = min(max(mean, small), large)
        d += 0.5 * mean * (math.log(mean) - math.log(a)) + 0.5 * mean * (math.log(mean) - math.log(b))
    return 1 - min(max(d / len(z_u), 0.0), 1.0)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("spread", [0.5, 4.0, 20.0])
@pytest.mark.parametrize("classes", [2, 5, 100])
def test_the_competition_entry_by_entry(classes: int, spread: float, temperature: float) -> None:
    z_u, z_g = rand(7, classes, seed=1, spread=spread), rand(7, classes, seed=2, spread=spread)
    close(competition(z_u, z_g, temperature), compete(z_u.numpy(), z_g.numpy(), temperature))
    close(competition(z_g, z_u, temperature), competition(z_u, z_g, temperature))
    assert 0.0 <= float(competition(z_u, z_g, temperature)) <= 1.0
    by_image = rand(7, 1, seed=3, spread=5.0)
    close(competition(z_u + by_image, z_g, temperature), competition(z_u, z_g, temperature))
    close(competition(z_u, z_g - by_image, temperature), competition(z_u, z_g, temperature))


def test_the_default_temperature_of_the_competition_is_3() -> None:
    z_u, z_g = rand(4, 5, seed=1), rand(4, 5, seed=2)
    close(competition(z_u, z_g), competition(z_u, z_g, 3.0), atol=0)


def logits_for(*rows: list[float], temperature: float = 3.0) -> Tensor:
    return temperature * doubles(rows).log()


def test_the_mean_is_of_distributions_before_they_are_clamped() -> None:
    z_g, z_u = logits_for([0.0001, 0.9999]), logits_for([0.4, 0.6])
    want = compete(z_u.numpy(), z_g.numpy())
    close(competition(z_u, z_g), want)
    assert abs(want - compete(z_u.numpy(), z_g.numpy(), joint="clamped")) > 1e-3
    # by hand: the divergences of the mean (0.20005, 0.79995) from (0.01, 0.99) and from (0.4, 0.6)
    m = (0.20005, 0.79995)
    d = 0.5 * sum(a * math.log(a / b) for a, b in zip(m, (0.01, 0.99), strict=True))
    d += 0.5 * sum(a * math.log(a / b) for a, b in zip(m, (0.4, 0.6), strict=True))
    close(competition(z_u, z_g), 1 - d)


def test_the_divergence_is_that_of_the_mean_from_each_and_not_jensen_and_shannons() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
    m = (p + q) / 2
    d = 0.5 * (m * np.log(m / p)).sum() + 0.5 * (m * np.log(m / q)).sum()
    close(competition(logits_for(q.tolist()), logits_for(p.tolist())), 1 - d)
    assert abs(d - 0.5 * (p * np.log(p / m)).sum() - 0.5 * (q * np.log(q / m)).sum()) > 1e-3


def test_equal_outputs_compete_with_exactly_1_and_no_gradient() -> None:
    for spread in (0.1, 1.0, 30.0):  # the last with entries at both clamps
        for dtype in (torch.float32, torch.float64):
            z = rand(6, 5, spread=spread, dtype=dtype)
            assert float(competition(z, z.clone())) == 1.0
            for grad in (gradient(lambda t, z=z: competition(t, z), z), gradient(lambda t, z=z: competition(z, t), z)):
                assert float(grad.abs().max()) < 1e-7


@pytest.mark.parametrize("classes", [2, 10])
def test_opposite_outputs_saturate_without_gradient(classes: int) -> None:
    """D is 1.61: 1/2 (log(.5/.01) + log(.5/.99)), over the two classes; what is shared by both clamps adds nothing."""
    one_hot = 200.0 * torch.eye(classes, dtype=torch.float64)
    d = 0.5 * math.log(0.5 / 0.01) + 0.5 * math.log(0.5 / 0.99)
    assert d == pytest.approx(1.61, abs=0.005)
    z_u, z_g = one_hot[:1], one_hot[1:2]
    assert float(competition(z_u, z_g)) == 0.0
    assert not gradient(lambda t: competition(t, z_g), z_u).any()
    assert not gradient(lambda t: competition(z_u, t), z_g).any()
    # half of the images agree: D is halved, and the term is there again
    both = competition(torch.cat([z_u, z_g]), torch.cat([z_g, z_g]))
    close(both, 1 - d / 2)


def test_below_saturation_the_gradient_is_that_of_the_clamped_entries_through_the_mean() -> None:
    """Finite differences; the first image has entries at the clamps, through which only the mean moves."""
    z_u, z_g = logits_for([0.004, 0.596, 0.4], [0.3, 0.3, 0.4]), logits_for([0.5, 0.3, 0.2], [0.1, 0.6, 0.3])
    for which in (0, 1):

        def term(t: Tensor, which: int = which) -> Tensor:
            return competition(t, z_g) if which == 0 else competition(z_u, t)

        at = (z_u, z_g)[which]
        got = gradient(term, at)
        assert got.abs().max() > 1e-3
        for index in np.ndindex(*at.shape):
            step = torch.zeros_like(at)
            step[index] = 1e-6
            values = [(z_u + s, z_g) if which == 0 else (z_u, z_g + s) for s in (step, -step)]
            slope = [compete(a.numpy(), b.numpy()) for a, b in values]
            assert float(got[index]) == pytest.approx((slope[0] - slope[1]) / 2e-6, abs=1e-8)


def test_a_step_against_the_gradient_of_the_competition_sets_the_outputs_apart() -> None:
    z_u, z_g = rand(6, 5, seed=1), rand(6, 5, seed=2)
    moved = z_u - 300.0 * gradient(lambda t: competition(t, z_g), z_u)
    assert float(competition(moved, z_g)) < float(competition(z_u, z_g)) - 1e-3


# ---- networks: fldist's modules, and the same written out
def unsettled(module: nn.Module, seed: int) -> nn.Module:
    """Drawn statistics and weights in BatchNorm, so that no layer is at its initial values."""
    for number, layer in enumerate(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        layer.load_state_dict(normalised(layer.num_features, seed + 10 * number, torch.float32).state_dict())
    return module.eval()


def cnn(seed: int = 0, channels: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return unsettled(CnnBn((4, 6)).build((channels, 8, 8), CLASSES), seed)


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return unsettled(ResNet4().build((1, 8, 8), CLASSES), seed)


class Plain:
    """A network in eval mode by formulas, in float64; remembers what its BatchNorm layers were given."""

    def __init__(self, module: nn.Module) -> None:
        self.state = {name: tensor.detach().double().clone() for name, tensor in module.state_dict().items()}
        self.given: list[tuple[str, Tensor]] = []

    def norm(self, name: str, x: Tensor) -> Tensor:
        s = {
            k: self.state[f"{name}.{k}"].reshape(1, -1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias")
        }
        self.given.append((name, x))
        return (x - s["running_mean"]) / (s["running_var"] + 1e-5).sqrt() * s["weight"] + s["bias"]

    def conv(self, name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], stride=stride, padding=padding)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def gap(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name, x in self.given:
            mean = x.mean(dim=(0, 2, 3), keepdim=True)
            variance = ((x - mean) ** 2).mean(dim=(0, 2, 3))
            total = total + ((self.state[f"{name}.running_var"] - variance) ** 2).sum().sqrt()
            total = total + ((self.state[f"{name}.running_mean"] - mean.flatten()) ** 2).sum().sqrt()
        return total

    def __call__(self, x: Tensor) -> Tensor:
        self.given = []
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class PlainCnn(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm("1", self.conv("0", x, 2, 1)).clamp(min=0)
        x = self.norm("4", self.conv("3", x, 2, 1)).clamp(min=0)
        return self.linear("8", x.mean(dim=(2, 3)))


class PlainResidual(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm("bn1", self.conv("conv1", x, 2, 3)).clamp(min=0), 3, 2, 1)
        y = self.norm("layer1.0.bn1", self.conv("layer1.0.conv1", x, 1, 1)).clamp(min=0)
        y = self.norm("layer1.0.bn2", self.conv("layer1.0.conv2", y, 1, 1))
        return self.linear("fc", (x + y).clamp(min=0).mean(dim=(2, 3)))


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], type[Plain]]] = {
    "cnn": (cnn, PlainCnn),
    "residual": (residual, PlainResidual),
}


def held(p: Tensor) -> Tensor:
    """An entry within [0.01, 0.99] itself, else the nearer end, without a gradient."""
    inside = (p >= 0.01) & (p <= 0.99)
    return torch.where(inside, p, torch.where(p < 0.01, 0.01, 0.99).to(p.dtype))


def plain_objective(u: Plain, g: Plain | None, x: Tensor, y: Tensor, how: Inversion) -> Tensor:
    z = u(x)
    loss = -z.log_softmax(dim=1)[torch.arange(len(y)), y].mean() + how.alpha_bn * u.gap()
    sides = [
        x[:, :, :, :-1] - x[:, :, :, 1:],
        x[:, :, :-1] - x[:, :, 1:],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
        x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
    ]
    loss = loss + how.alpha_tv * sum((side**2).sum().sqrt() for side in sides)
    loss = loss + how.alpha_l2 * (x**2).sum().sqrt()
    if how.alpha_c:
        assert g is not None
        p, q = ((net / how.temperature_c).softmax(dim=1) for net in (g(x), z))
        m = held((p + q) / 2)
        kl = [(m * (m.log() - held(side).log())).sum() / len(y) for side in (p, q)]
        loss = loss + how.alpha_c * (1 - (0.5 * kl[0] + 0.5 * kl[1]).clamp(0, 1))
    return loss


SETTINGS = [
    {},
    {"alpha_c": 10.0},
    {"alpha_c": 10.0, "temperature_c": 1.0, "alpha_l2": 0.3, "alpha_tv": 0.05, "alpha_bn": 2.5},
    {"alpha_bn": 0.0, "alpha_tv": 0.0},
]


def labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


@pytest.mark.parametrize("fields", SETTINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_objective_and_its_gradient_are_those_of_the_formulas(name: str, fields: dict[str, float]) -> None:
    make, plain = NETWORKS[name]
    u, g = make(1).double(), make(2).double()
    x, y, how = rand(6, 1, 8, 8, seed=3), labels(6), Inversion(**fields)  # type: ignore[arg-type]
    with Statistics(u) as statistics:
        got = objective(u, g if how.alpha_c else None, x, y, how, statistics)
        grad = gradient(lambda t: objective(u, g if how.alpha_c else None, t, y, how, statistics), x)
    want = plain_objective(plain(u), plain(g), x, y, how)
    close(got, want, atol=1e-10)
    want_grad = gradient(lambda t: plain_objective(plain(u), plain(g), t, y, how), x)
    close(grad, want_grad, atol=1e-10)
    assert want_grad.abs().max() > 1e-3


def test_every_weight_of_the_objective_counts_its_term() -> None:
    """The objective is linear in the four weights, and without them it is the cross-entropy."""
    u, g = cnn(1).double(), cnn(2).double()
    x, y = rand(6, 1, 8, 8, seed=3), labels(6)

    def at(tv: float = 0.0, l2: float = 0.0, bn: float = 0.0, c: float = 0.0) -> float:
        how = Inversion(alpha_tv=tv, alpha_l2=l2, alpha_bn=bn, alpha_c=c)
        with Statistics(u) as statistics:
            return float(objective(u, g, x, y, how, statistics).detach())

    ce = float(F.cross_entropy(u(x), y).detach())
    assert at() == pytest.approx(ce, abs=1e-12)
    assert at(tv=2.0) == pytest.approx(ce + 2 * variation(x.numpy()), abs=1e-9)
    assert at(l2=2.0) == pytest.approx(ce + 2 * float(x.norm()), abs=1e-9)
    assert at(bn=2.0) == pytest.approx(ce + 2 * gap_at(u, x), abs=1e-9)
    c = compete(u(x).detach().numpy(), g(x).detach().numpy())
    assert c < 0.999
    assert at(c=2.0) == pytest.approx(ce + 2 * c, abs=1e-9)


# ---- the inversion
def test_the_defaults_are_those_of_the_published_scripts() -> None:
    how = Inversion()
    assert (how.steps, how.lr, how.alpha_tv, how.alpha_l2, how.alpha_bn) == (2000, 0.1, 1e-3, 0.0, 1.0)
    assert (how.alpha_c, how.temperature_c, how.jitter, how.keep) == (0.0, 3.0, 2, "last")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_is_normal_and_shifts_are_uniform_and_independent() -> None:
    how = Inversion(steps=4000, jitter=2)
    x0, shifts = draw(generator(), 40, (3, 10, 10), how)
    assert (x0.dtype, tuple(x0.shape)) == (torch.float32, (40, 3, 10, 10))
    assert (shifts.dtype, tuple(shifts.shape)) == (torch.int64, (4000, 2))
    assert abs(float(x0.mean())) < 0.05
    assert abs(float(x0.std()) - 1) < 0.05
    pairs = np.bincount((5 * (shifts[:, 0] + 2) + shifts[:, 1] + 2).numpy(), minlength=25)
    assert pairs.shape == (25,)
    assert pairs.min() > 100  # of 160
    assert pairs.max() < 225


def test_draws_are_those_of_the_generator_the_noise_first() -> None:
    x0, shifts = draw(generator(5), 3, (1, 4, 4), Inversion(steps=6))
    again, more = draw(generator(5), 3, (1, 4, 4), Inversion(steps=20))
    assert torch.equal(x0, again)
    assert torch.equal(x0, torch.randn(3, 1, 4, 4, generator=generator(5)))
    assert torch.equal(shifts, more[:6])
    other, _ = draw(generator(6), 3, (1, 4, 4), Inversion(steps=6))
    assert not torch.equal(x0, other)
    assert not draw(generator(), 1, (1, 4, 4), Inversion(steps=9, jitter=0))[1].any()
    assert set(draw(generator(), 1, (1, 4, 4), Inversion(steps=99, jitter=1))[1].flatten().tolist()) == {-1, 0, 1}


def plain_invert(u: Plain, g: Plain | None, y: Tensor, x0: Tensor, shifts: Tensor, how: Inversion) -> list[Tensor]:
    """Adam written out, in float64: the images before every step and after the last; and with that the losses."""
    x = x0.double().clone()
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    path = [x.clone()]
    for step, (down, right) in enumerate(shifts.tolist(), start=1):
        slope = gradient(lambda t, d=down, r=right: plain_objective(u, g, torch.roll(t, (d, r), (2, 3)), y, how), x)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        x = x - how.lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        path.append(x.clone())
    return path


SHIFTS = ints([[2, -1], [0, 1], [-2, 2], [1, 0], [-1, -2]])


@pytest.mark.parametrize("alpha_c", [0.0, 10.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_few_steps_are_those_of_a_plain_loop(name: str, alpha_c: float) -> None:
    make, plain = NETWORKS[name]
    u, g = make(1), make(2)
    how = Inversion(steps=len(SHIFTS), alpha_c=alpha_c, alpha_l2=0.01, alpha_tv=0.01)
    x0, y = rand(6, 1, 8, 8, seed=3, dtype=torch.float32), labels(6)
    before = x0.clone()
    got = invert(u, g, y, x0, SHIFTS, how)
    assert (got.dtype, got.shape, got.requires_grad) == (torch.float32, x0.shape, False)
    assert torch.equal(x0, before)
    want = plain_invert(plain(u), plain(g), y, x0, SHIFTS, how)[-1]
    close(got.double(), want, atol=2e-4)
    for other in (SHIFTS.flip(1), -SHIFTS, torch.zeros_like(SHIFTS)):  # what makes the comparison able to fail
        assert float((invert(u, g, y, x0, other, how) - got).abs().max()) > 0.01
    if alpha_c:
        without = dataclasses.replace(how, alpha_c=0.0)
        assert float((invert(u, g, y, x0, SHIFTS, without) - got).abs().max()) > 0.01


def test_without_steps_the_noise_comes_back() -> None:
    x0 = rand(4, 1, 8, 8, dtype=torch.float32)
    for keep in ("last", "best"):
        got = invert(cnn(), None, labels(4), x0, torch.zeros(0, 2, dtype=torch.int64), Inversion(steps=0, keep=keep))
        assert torch.equal(got, x0)


@pytest.mark.parametrize("lr", [0.1, 0.02])
def test_the_first_step_moves_every_pixel_by_lr_against_its_gradient(lr: float) -> None:
    u, y, x0 = cnn(1), labels(6), rand(6, 1, 8, 8, seed=3, dtype=torch.float32)
    how = Inversion(steps=1, lr=lr)
    got = invert(u, None, y, x0, ints([[1, -1]]), how) - x0
    slope = gradient(lambda t: plain_objective(PlainCnn(u), None, torch.roll(t, (1, -1), (2, 3)), y, how), x0.double())
    clear = slope.abs() > 1e-4
    assert clear.double().mean() > 0.9
    close(got[clear].double(), (-lr * slope.sign())[clear], atol=lr * 2e-3)


class Untouchable(nn.Module):
    """A network that nobody may evaluate."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the student was evaluated")


def test_without_competition_the_student_is_not_evaluated() -> None:
    u, y, x0 = cnn(1), labels(4), rand(4, 1, 8, 8, seed=3, dtype=torch.float32)
    how = Inversion(steps=3)
    got = [invert(u, g, y, x0, SHIFTS[:3], how) for g in (None, Untouchable(), cnn(2), u)]
    assert all(torch.equal(each, got[0]) for each in got)
    with pytest.raises(AssertionError, match="was evaluated"):
        invert(u, Untouchable(), y, x0, SHIFTS[:3], dataclasses.replace(how, alpha_c=1.0))


def test_a_client_that_is_its_own_student_has_nobody_to_compete_with() -> None:
    u, y, x0 = cnn(1), labels(4), rand(4, 1, 8, 8, seed=3, dtype=torch.float32)
    alone = invert(u, None, y, x0, SHIFTS, Inversion(steps=5))
    for g in (u, copy.deepcopy(u)):
        close(invert(u, g, y, x0, SHIFTS, Inversion(steps=5, alpha_c=10.0)), alone, atol=1e-3)


def test_the_best_images_are_those_of_the_smallest_loss_and_no_alias_of_the_last() -> None:
    """A learning rate that is much too large: the loss falls, if at all, in the first steps."""
    u, y, x0 = cnn(1), labels(6), rand(6, 1, 8, 8, seed=3, dtype=torch.float32)
    found = set()
    for lr in (0.3, 3.0, 50.0):
        how = Inversion(steps=len(SHIFTS), lr=lr)
        path = plain_invert(PlainCnn(u), None, y, x0, SHIFTS, how)
        losses = [
            float(plain_objective(PlainCnn(u), None, torch.roll(x, tuple(shift), (2, 3)), y, how))
            for x, shift in zip(path, SHIFTS.tolist(), strict=False)
        ]
        best = int(np.argmin(losses))
        assert sorted(losses)[1] - min(losses) > 1e-3
        found.add(best)
        got = invert(u, None, y, x0, SHIFTS, dataclasses.replace(how, keep="best"))
        close(got.double(), path[best], atol=1e-3 * lr)
        assert float((got - invert(u, None, y, x0, SHIFTS, how)).abs().max()) > 0.1
    assert len(found) > 1


def fingerprint(module: nn.Module) -> list[Any]:
    values = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in module.modules()]
    modes = [m.training for m in module.modules()]
    return [values, hooks, modes, [(p.requires_grad, p.grad is None) for p in module.parameters()]]


def assert_untouched(module: nn.Module, before: list[Any]) -> None:
    values, *facts = fingerprint(module)
    assert facts == before[1:]
    assert all(torch.equal(values[name], tensor) for name, tensor in before[0].items())


def unusual(module: nn.Module) -> nn.Module:
    """In training mode but for one layer, with one frozen weight."""
    module.train()
    next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    list(module.parameters())[1].requires_grad_(False)
    return module


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_evaluated_in_eval_mode_and_come_back_as_they_were(name: str) -> None:
    make, _ = NETWORKS[name]
    y, x0 = labels(4), rand(4, 1, 8, 8, seed=3, dtype=torch.float32)
    how = Inversion(steps=3, alpha_c=10.0)
    want = invert(make(1).eval(), make(2).eval(), y, x0, SHIFTS[:3], how)
    u, g = unusual(make(1)), unusual(make(2))
    u[0].register_forward_hook(lambda *_: None) if isinstance(u, nn.Sequential) else None
    before = fingerprint(u), fingerprint(g)
    assert torch.equal(invert(u, g, y, x0, SHIFTS[:3], how), want)
    assert_untouched(u, before[0])
    assert_untouched(g, before[1])
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        invert(u, g, labels(3), x0, SHIFTS[:3], how)  # fewer labels than images
    assert_untouched(u, before[0])
    assert_untouched(g, before[1])


class Watched(nn.Module):
    """Notes whether a pass was in eval mode with frozen weights."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        frozen = not any(p.requires_grad for p in self.parameters())
        self.seen.append(frozen and not any(m.training for m in self.modules()))
        return self.inside(x)  # type: ignore[no-any-return]


def test_no_gradient_of_weights_is_ever_computed() -> None:
    u, g = Watched(cnn(1)), Watched(cnn(2))
    u.train()
    g.train()
    invert(u, g, labels(4), rand(4, 1, 8, 8, dtype=torch.float32), SHIFTS[:2], Inversion(steps=2, alpha_c=1.0))
    assert u.seen == g.seen == [True] * 2


def patterns(per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose class is a pattern in noise."""
    shapes = rand(CLASSES, 1, 8, 8, seed=99, spread=1.5, dtype=torch.float32)
    y = torch.arange(CLASSES).repeat_interleave(per_class)
    return shapes[y] + 0.3 * rand(len(y), 1, 8, 8, seed=seed, dtype=torch.float32), y


def overfitted() -> nn.Module:
    torch.manual_seed(1)
    module = CnnBn((12, 16)).build((1, 8, 8), CLASSES)
    x, y = patterns(12)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    module.eval()
    assert float((module(x).argmax(1) == y).double().mean()) > 0.95
    return module


@pytest.mark.parametrize(("jitter", "alpha_bn", "steps"), [(0, 1.0, 80), (1, 0.1, 200)])
def test_images_of_a_trained_network_are_what_they_were_asked_to_be(jitter: int, alpha_bn: float, steps: int) -> None:
    u = overfitted()
    how = Inversion(steps=steps, jitter=jitter, alpha_bn=alpha_bn)
    y = torch.arange(CLASSES).repeat_interleave(4)
    x0, shifts = draw(generator(), len(y), (1, 8, 8), how)
    got = invert(u, None, y, x0, shifts, how)
    with torch.no_grad():
        before, after = (float(F.cross_entropy(u(x), y)) for x in (x0, got))
        assert float((u(got).argmax(1) == y).double().mean()) >= 0.9
        assert after < 0.5 * before
        assert gap_at(u, got) < 0.5 * gap_at(u, x0)


# ---- the loss of the distillation
def kd_by_hand(student: Any, teacher: Any, temperature: float, weight: float) -> float:
    total = 0.0
    for f, s in zip(student / temperature, teacher / temperature, strict=True):
        t = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        log_p = f - f.max() - math.log(np.exp(f - f.max()).sum())
        total += sum(float(a) * (math.log(a) - float(b)) for a, b in zip(t, log_p, strict=True))
    return weight * temperature**2 * total / len(student)


@pytest.mark.parametrize(("temperature", "weight"), [(3.0, 1e-3), (1.0, 0.3), (7.5, 2.0)])
def test_the_loss_of_distillation_and_its_gradient_by_hand(temperature: float, weight: float) -> None:
    f, s = rand(6, 4, seed=1, spread=3.0), rand(6, 4, seed=2, spread=3.0)
    close(kd_loss(f, s, temperature, weight), kd_by_hand(f.numpy(), s.numpy(), temperature, weight), atol=1e-12)
    want = weight * temperature * ((f / temperature).softmax(1) - (s / temperature).softmax(1)) / 6
    close(gradient(lambda t: kd_loss(t, s, temperature, weight), f), want, atol=1e-12)
    assert abs(float(kd_loss(f, s, temperature, weight) - kd_loss(s, f, temperature, weight))) > 1e-6


def test_the_loss_has_temperature_3_and_weight_a_thousandth_unless_told() -> None:
    f, s = rand(6, 4, seed=1), rand(6, 4, seed=2)
    close(kd_loss(f, s), kd_loss(f, s, 3.0, 1e-3), atol=0)


def test_a_student_that_differs_by_a_constant_in_each_image_has_nothing_to_learn() -> None:
    s = rand(6, 4, seed=2, spread=3.0)
    f = s + rand(6, 1, seed=3, spread=10.0)
    close(kd_loss(f, s, 3.0, 0.3), 0.0, atol=1e-12)
    close(gradient(lambda t: kd_loss(t, s, 3.0, 0.3), f), torch.zeros_like(f), atol=1e-12)


def test_at_a_high_temperature_the_loss_is_half_the_mean_square_of_the_centred_difference() -> None:
    f, s = rand(6, 4, seed=1, spread=2.0), rand(6, 4, seed=2, spread=2.0)
    centred = (f - s) - (f - s).mean(dim=1, keepdim=True)
    want = 0.3 / (2 * 4) * float((centred**2).sum(dim=1).mean())
    assert float(kd_loss(f, s, 1e3, 0.3)) == pytest.approx(want, rel=1e-2)
    assert float(kd_loss(f, s, 1e4, 0.3)) == pytest.approx(want, rel=1e-3)


def test_the_teacher_learns_nothing_and_extreme_logits_stay_finite() -> None:
    f, s = rand(3, 4, seed=1).requires_grad_(True), rand(3, 4, seed=2, spread=1e4)
    s[0] = doubles([1e4, -1e4, 0.0, 0.0])
    loss = kd_loss(f, s, 3.0, 0.3)
    loss.backward()
    assert torch.isfinite(loss)
    assert f.grad is not None
    assert torch.isfinite(f.grad).all()


# ---- the distillation
COUNT = 22


def student(how: Kd) -> tuple[Network, nn.Module]:
    """A network to distil, made for what `how.bn` says, and a plain module of the same values."""
    module = cnn(1).train()
    batch_norm: Any = {"train": "batch", "eval": "running"}[how.bn]
    return Network(module, Params.of(module), batch_norm=batch_norm), copy.deepcopy(module)


def pool(count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Images and a teacher's logits for them."""
    return rand(count, 1, 8, 8, seed=5, dtype=torch.float32), rand(
        count, CLASSES, seed=6, spread=3.0, dtype=torch.float32
    )


def recipe(**fields: Any) -> Kd:
    usual = {"epochs": 3, "lr": 0.05, "weight_decay": 1e-2, "batch_size": 8, "weight": 0.3}
    return Kd(**{**usual, **fields})


def order(how: Kd, count: int = COUNT, seed: int = 9) -> Order:
    return Order(count, how.batch_size, generator(seed))


def values(network: Network) -> dict[str, Tensor]:
    return {name: view.clone() for name, view in network.params.named()}


def assert_close(network: Network, plain: nn.Module, atol: float = 2e-6) -> None:
    mine, state = values(network), plain.state_dict()
    assert mine.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=atol, msg=name)


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def plain_distil(module: nn.Module, x: Tensor, s: Tensor, how: Kd, shuffle: torch.Generator | None = None) -> None:
    """The published loop with torch's own SGD and divergence."""

    def fresh() -> torch.optim.SGD:
        return torch.optim.SGD(
            module.parameters(), how.lr, how.momentum, weight_decay=how.weight_decay, nesterov=how.momentum > 0
        )

    shuffle, optimizer = shuffle or generator(9), fresh()
    module.train()
    if how.bn == "eval":
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
    for _ in range(how.epochs):
        if how.reset:
            optimizer = fresh()
        for rows in torch.randperm(len(x), generator=shuffle).split(how.batch_size):
            optimizer.zero_grad()
            f = (module(x[rows]) / how.temperature).log_softmax(1)
            loss = F.kl_div(f, (s[rows] / how.temperature).softmax(1), reduction="batchmean")
            (how.weight * how.temperature**2 * loss).backward()
            optimizer.step()


def test_the_defaults_of_distillation_are_those_of_the_published_code() -> None:
    how = Kd()
    assert (how.epochs, how.lr, how.momentum, how.weight_decay, how.batch_size) == (30, 0.01, 0.9, 1e-4, 256)
    assert (how.temperature, how.weight, how.bn, how.reset) == (3.0, 1e-3, "train", True)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bn": "eval"},
        {"reset": False},
        {"reset": False, "bn": "eval", "temperature": 1.5, "momentum": 0.5},
        {"batch_size": 100},
        {"momentum": 0.0, "weight_decay": 0.0},
    ],
)
def test_a_distillation_is_a_plain_loop(fields: dict[str, Any]) -> None:
    """22 images in batches of 8, 8 and 6: the last smaller batch counts as its 6 images."""
    how = recipe(**fields)
    network, plain = student(how)
    start = values(network)
    x, s = pool()
    assert list(distil(network, x, s, how, order(how))) == [1, 2, 3]
    plain_distil(plain, x, s, how)
    assert_close(network, plain)
    assert furthest(values(network), start) > 1e-2


@pytest.mark.parametrize("field", [{"reset": False}, {"bn": "eval"}, {"momentum": 0.0}, {"weight_decay": 0.0}])
def test_every_choice_of_the_distillation_shows(field: dict[str, Any]) -> None:
    """What makes the comparison above able to fail."""
    ends = []
    for how in (recipe(), recipe(**field)):
        network, _ = student(how)
        for _ in distil(network, *pool(), how, order(how)):
            pass
        ends.append(values(network))
    assert furthest(*ends) > 1e-4


def test_the_last_batch_of_one_image_is_kept() -> None:
    how = recipe(batch_size=7)
    network, plain = student(how)
    for _ in distil(network, *pool(), how, order(how)):
        pass
    plain_distil(plain, *pool(), how)
    assert_close(network, plain)
    assert int(values(network)["1.num_batches_tracked"]) == 3 * 4


def test_a_look_at_the_student_between_epochs_changes_nothing() -> None:
    """Who scores it after each epoch puts it in eval mode and runs it."""
    ends = []
    for look in (False, True):
        how = recipe()
        network, _ = student(how)
        for _ in distil(network, *pool(), how, order(how)):
            if look:
                network.module.eval()
                with torch.no_grad():
                    network.module(pool()[0])
        ends.append(values(network))
    assert furthest(*ends) == 0.0


def test_after_every_epoch_the_student_is_that_of_so_many_epochs() -> None:
    how = recipe()
    network, _ = student(how)
    for number in distil(network, *pool(), how, order(how)):
        plain = student(how)[1]
        plain_distil(plain, *pool(), dataclasses.replace(how, epochs=number))
        assert_close(network, plain)


def test_without_epochs_the_student_stays() -> None:
    how = recipe(epochs=0)
    network, _ = student(how)
    start = values(network)
    assert list(distil(network, *pool(), how, order(how))) == []
    assert furthest(values(network), start) == 0.0


@pytest.mark.parametrize("bn", ["train", "eval"])
def test_without_weight_and_decay_only_statistics_move(bn: str) -> None:
    how = recipe(weight=0.0, weight_decay=0.0, bn=bn)
    network, _ = student(how)
    start = values(network)
    for _ in distil(network, *pool(), how, order(how)):
        pass
    moved = {name for name, tensor in values(network).items() if not torch.equal(tensor, start[name])}
    running = {name for name in start if "running" in name or "tracked" in name}
    assert len(running) == 6
    assert moved == (running if bn == "train" else set())


def test_in_eval_mode_the_statistics_stay_and_all_parameters_learn() -> None:
    how = recipe(bn="eval", weight_decay=0.0)
    network, _ = student(how)
    start = values(network)
    for _ in distil(network, *pool(), how, order(how)):
        pass
    for name, tensor in values(network).items():
        assert torch.equal(tensor, start[name]) == ("running" in name or "tracked" in name), name


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_student_that_is_its_own_teacher_only_decays(decay: float) -> None:
    """One client holding everything: with the statistics left alone there is nothing to learn."""
    how = recipe(bn="eval", weight_decay=decay, epochs=2)
    network, plain = student(how)
    x, _ = pool()
    with torch.no_grad():
        s = plain.eval()(x)
    for _ in distil(network, x, s, how, order(how)):
        pass
    if not decay:
        assert_close(network, plain, atol=1e-5)
        return
    # with decay the student changes first, and only then has something to learn: the first step is decay alone
    network, plain = student(how)
    how = dataclasses.replace(how, epochs=1, batch_size=COUNT)
    for _ in distil(network, x, s, how, order(how)):
        pass
    for parameter in plain.parameters():
        parameter.grad = decay * parameter.detach()
    optimizer = torch.optim.SGD(plain.parameters(), how.lr, how.momentum, nesterov=True)
    optimizer.step()
    assert_close(network, plain, atol=1e-5)


def test_distillation_comes_nearer_to_the_teacher() -> None:
    how = recipe(epochs=20, lr=0.2, weight_decay=0.0, bn="eval")
    network, plain = student(how)
    x, s = pool()
    plain.eval()
    before = float(kd_loss(plain(x), s, 3.0, 0.3).detach())
    for _ in distil(network, x, s, how, order(how)):
        pass
    network.module.eval()
    assert float(kd_loss(network.module(x), s, 3.0, 0.3).detach()) < 0.8 * before


# ---- sizes
@pytest.mark.parametrize(
    ("made", "shape", "classes", "sizes"),
    [
        (ResNet18Small(), (3, 32, 32), 10, (11_173_962, 9_600, 20, 44_734_408)),
        (ResNet18Small(), (3, 32, 32), 100, (11_220_132, 9_600, 20, 44_919_088)),
        (CnnBn(), (1, 28, 28), 10, (24_058, 224, 3, 97_152)),
    ],
)
def test_sizes_of_the_models(made: Any, shape: tuple[int, ...], classes: int, sizes: tuple[int, ...]) -> None:
    """Parameters P, float buffers B, counters N, and bytes 4 (P + B) + 8 N."""
    with torch.device("meta"):
        layout = Layout.of(made.build(shape, classes))
    assert (layout.num_params, layout.num_floats - layout.num_params, layout.num_ints, layout.nbytes) == sizes
