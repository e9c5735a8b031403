"""Images from networks: the terms of the objective against what they are by definition, and what an inversion does to
the images and does not do to the networks."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

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
from fldist.models.cnn import Cnn, CnnBn
from fldist.models.resnet import ResNet18Small
from fldist.seeding import forked, generator
from tests.needs import needs_gpus

SHAPE = (1, 12, 12)
CLASSES = 4


def made(seed: int, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    """A small network with BatchNorm whose running statistics are no initial values."""
    with forked(seed, "test-network"):
        net = CnnBn(widths=(4, 6, 8)).build(shape, CLASSES)
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean)
                nn.init.uniform_(layer.running_var, 0.5, 2.0)
                nn.init.uniform_(layer.weight, 0.5, 2.0)
                nn.init.normal_(layer.bias)
    return net


def noise(count: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(count, *shape, generator=generator(1, "test-noise"))


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def defined(
    u: nn.Module, g: nn.Module, x: Tensor, y: Tensor, how: Inversion, layers: list[nn.BatchNorm2d], stats: bool = True
) -> Tensor:
    """L as it is defined, by automatic differentiation alone; the networks are in eval mode."""
    seen: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for layer in layers]
    z = u(x)
    for handle in handles:
        handle.remove()
    gap = torch.zeros((), dtype=x.dtype)
    for layer, h in zip(layers, seen, strict=True):
        flat = h.permute(1, 0, 2, 3).contiguous().view(h.shape[1], -1)
        gap = (
            gap + (layer.running_var - flat.var(1, unbiased=False)).norm() + (layer.running_mean - flat.mean(1)).norm()
        )
    tv = (
        (x[:, :, :, :-1] - x[:, :, :, 1:]).norm()
        + (x[:, :, :-1, :] - x[:, :, 1:, :]).norm()
        + (x[:, :, 1:, :-1] - x[:, :, :-1, 1:]).norm()
        + (x[:, :, :-1, :-1] - x[:, :, 1:, 1:]).norm()
    )
    p, q = (g(x) / how.temperature_c).softmax(1), (z / how.temperature_c).softmax(1)
    mid = (p + q) / 2
    p, q, mid = p.clamp(0.01, 0.99), q.clamp(0.01, 0.99), mid.clamp(0.01, 0.99)
    d = 0.5 * (mid * (mid.log() - p.log())).sum() / len(x) + 0.5 * (mid * (mid.log() - q.log())).sum() / len(x)
    rest = how.alpha_c * (1 - d.clamp(0, 1)) + how.alpha_tv * tv + how.alpha_l2 * x.norm()
    return cross_entropy(z, y) + rest + how.alpha_bn * gap


# ---- the terms
def test_total_variation_and_its_gradient_are_those_of_the_definition() -> None:
    x = noise(3, (2, 5, 7)).double().requires_grad_()
    assert torch.autograd.gradcheck(total_variation, (x,))
    want = sum(
        ((x[..., a, b] - x[..., c, d]) ** 2).sum().sqrt()
        for a, b, c, d in (
            (slice(None), slice(0, 6), slice(None), slice(1, 7)),
            (slice(0, 4), slice(None), slice(1, 5), slice(None)),
            (slice(1, 5), slice(0, 6), slice(0, 4), slice(1, 7)),
            (slice(0, 4), slice(0, 6), slice(1, 5), slice(1, 7)),
        )
    )
    torch.testing.assert_close(total_variation(x), want)


def test_total_variation_of_constants_scales_and_copies() -> None:
    flat = torch.full((2, 3, 6, 6), 0.7, requires_grad=True)
    total_variation(flat).backward()
    assert total_variation(flat).item() == 0.0 and not flat.grad.any()  # no NaN where a norm is 0
    x = noise(3)
    one = total_variation(x)
    torch.testing.assert_close(total_variation(-2.5 * x), 2.5 * one)
    torch.testing.assert_close(total_variation(torch.cat([x, x])), math.sqrt(2) * one)


def test_the_gap_is_0_where_the_batch_has_the_running_statistics_and_is_never_negative() -> None:
    layer = nn.BatchNorm2d(3).eval()
    x = noise(5, (3, 4, 4))
    with Statistics(layer) as statistics:
        layer(x)
        assert statistics.gap() > 0
        layer.running_mean.copy_(x.mean((0, 2, 3)))
        layer.running_var.copy_(x.permute(1, 0, 2, 3).reshape(3, -1).var(1, correction=0))
        layer(x)
        assert statistics.gap().item() == pytest.approx(0.0, abs=1e-6)


def test_the_gap_of_one_layer_adds_two_norms() -> None:
    mean, variance = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert statistics_gap(mean, variance, torch.tensor([4.0, 6.0]), torch.tensor([3.0, 2.0])).item() == 7.0


def test_the_gap_does_not_know_the_order_of_images_nor_shifts_before_the_layer() -> None:
    net, layer, x = made(1), nn.BatchNorm2d(1).eval(), noise(6)
    net.eval()
    with Statistics(net) as deep, Statistics(layer) as first:
        net(x), layer(x)
        before = deep.gap(), first.gap()
        net(x[[3, 0, 5, 1, 2, 4]]), layer(cyclic(x, (2, -1)))
        torch.testing.assert_close((deep.gap(), first.gap()), before)
        net(cyclic(x, (1, 1)))
        assert abs(deep.gap() - before[0]) > 1e-4  # behind a convolution with zeros around it a shift is seen


def test_the_variance_is_biased_and_0_of_a_single_value() -> None:
    layer = nn.BatchNorm2d(2).eval()
    x = torch.tensor([[[[3.0]], [[4.0]]]], requires_grad=True)
    with Statistics(layer) as statistics:
        layer(x)
        gap = statistics.gap()
        assert gap.item() == pytest.approx(math.sqrt(2) + 5.0)  # |1 - 0| of two channels, |(3, 4) - 0|
        (gradient,) = torch.autograd.grad(gap, x)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([0.6, 0.8]))


def test_the_gap_goes_through_all_layers_with_the_gradient_of_the_definition() -> None:
    net, x = made(2).double().eval(), noise(3).double()
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    how = Inversion(alpha_bn=1.0, alpha_tv=0.0)
    y = torch.tensor([0, 1, 2])
    grads, values = [], []
    with Statistics(net) as statistics:
        for of in (
            lambda x: cross_entropy(net(x), y) + statistics.gap(),
            lambda x: defined(net, net, x, y, how, layers),
        ):
            leaf = x.clone().requires_grad_()
            value = of(leaf)
            values.append(value.item())
            grads += torch.autograd.grad(value, leaf)
    assert values[0] == pytest.approx(values[1], abs=1e-12)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


def test_the_gap_is_of_the_last_pass_and_0_without_layers() -> None:
    net = made(1).eval()
    a, b = noise(8).split(4)
    with Statistics(net) as statistics:
        net(b)
        want = statistics.gap()
        net(a)
        net(b)
        assert torch.equal(statistics.gap(), want)
    assert statistics.gap().item() == 0.0  # closed, it has forgotten
    plain = Cnn().build((1, 28, 28), CLASSES)
    with Statistics(plain) as statistics:
        plain(noise(2, (1, 28, 28)))
        assert statistics.gap().item() == 0.0


def test_statistics_leave_the_answers_and_no_hooks_also_after_an_exception() -> None:
    net = made(1)
    x = noise(4)
    want = net.train()(x)  # also where BatchNorm uses those of the batch
    with pytest.raises(KeyError), Statistics(net):
        assert torch.equal(net(x), want)
        raise KeyError
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_competition_is_1_with_no_gradient_between_equal_logits() -> None:
    z = torch.randn(5, CLASSES, generator=generator(1, "test-logits"), dtype=torch.float64)
    u, g = z.clone().requires_grad_(), z.clone().requires_grad_()
    value = competition(u, g)
    assert value.item() == 1.0
    for gradient in torch.autograd.grad(value, (u, g)):
        assert gradient.abs().max() < 1e-15


def test_competition_is_0_with_no_gradient_between_opposite_logits() -> None:
    u = torch.tensor([[100.0, 0.0], [100.0, 0.0]], requires_grad=True)
    g = u.detach().flip(1).requires_grad_()
    value = competition(u, g)
    assert value.item() == 0.0
    for gradient in torch.autograd.grad(value, (u, g)):
        assert not gradient.any()


def test_competition_is_symmetric_bounded_and_blind_to_constants() -> None:
    u, g = torch.randn(2, 200, CLASSES, generator=generator(1, "test-logits")) * 10
    value = competition(u, g)
    assert 0.0 < value < 1.0
    assert torch.equal(competition(g, u), value)
    shift = torch.arange(200.0).view(-1, 1)
    torch.testing.assert_close(competition(u + shift, g - 3.0), value)
    assert all(0.0 <= competition(a, b).item() <= 1.0 for a, b in zip(30 * u.split(1), 30 * g.split(1), strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_objective_is_that_of_the_definition(channels: int) -> None:
    shape = (channels, 12, 12)
    u, g = made(1, shape).double().eval(), made(2, shape).double().eval()
    layers = [m for m in u.modules() if isinstance(m, nn.BatchNorm2d)]
    how = Inversion(alpha_tv=0.3, alpha_l2=0.2, alpha_bn=2.0, alpha_c=10.0)
    x, y = noise(6, shape).double().requires_grad_(), torch.arange(6) % CLASSES
    with Statistics(u) as statistics:
        got = objective(u, g, x, y, how, statistics)
        (gradient,) = torch.autograd.grad(got, x)
    want = defined(u, g, x, y, how, layers)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, x)[0])


# ---- draws
def test_draws_are_noise_and_then_shifts_of_all_sizes() -> None:
    how = Inversion(steps=500, jitter=2)
    x0, shifts = draw(generator(1, "test-draw"), 40, (3, 8, 8), how)
    assert x0.dtype == torch.float32 and x0.shape == (40, 3, 8, 8)
    assert abs(x0.mean()) < 0.05 and abs(x0.std() - 1.0) < 0.05
    assert shifts.dtype == torch.int64 and shifts.shape == (500, 2)
    assert sorted(set(shifts[:, 0].tolist())) == sorted(set(shifts[:, 1].tolist())) == [-2, -1, 0, 1, 2]
    assert not torch.equal(shifts[:, 0], shifts[:, 1])
    alone = torch.randn(40, 3, 8, 8, generator=generator(1, "test-draw"))
    assert torch.equal(x0, alone)  # the number of steps does not move the noise
    assert not draw(generator(1, "test-draw"), 1, SHAPE, Inversion(steps=9, jitter=0))[1].any()


def test_cyclic_goes_along_height_then_width() -> None:
    x = torch.zeros(1, 1, 4, 5)
    x[0, 0, 0, 0] = 1.0
    assert cyclic(x, (1, -2))[0, 0, 1, 3] == 1.0


# ---- an inversion
def test_no_steps_return_the_noise_and_share_nothing_with_it() -> None:
    x0, y = noise(3), torch.tensor([0, 1, 2])
    how = Inversion(steps=0)
    images = invert(made(1), None, y, x0, torch.zeros(0, 2, dtype=torch.int64), how)
    assert torch.equal(images, x0)
    images.zero_()
    assert x0.any()


def test_the_first_step_moves_each_pixel_by_lr() -> None:
    u, x0, y = made(1).eval(), noise(4), torch.arange(4)
    how = Inversion(steps=1, lr=0.1, jitter=0)
    before = x0.clone()
    moved = invert(u, None, y, x0, torch.zeros(1, 2, dtype=torch.int64), how) - x0
    assert torch.equal(x0, before)
    leaf = x0.clone().requires_grad_()
    layers = [m for m in u.modules() if isinstance(m, nn.BatchNorm2d)]
    (gradient,) = torch.autograd.grad(defined(u, u, leaf, y, how, layers), leaf)
    seen = gradient.abs() > 1e-4
    assert seen.double().mean() > 0.9
    torch.testing.assert_close(moved[seen], -0.1 * gradient[seen].sign(), rtol=0, atol=2e-5)


def loop(u: nn.Module, g: nn.Module, y: Tensor, x0: Tensor, shifts: Tensor, how: Inversion) -> Iterator[Tensor]:
    """The images before each step and after the last, step by step as the equations say."""
    u.eval(), g.eval()
    layers = [m for m in u.modules() if isinstance(m, nn.BatchNorm2d)]
    x, m, v = x0.clone(), torch.zeros_like(x0), torch.zeros_like(x0)
    for t, (o1, o2) in enumerate(shifts.tolist(), start=1):
        yield x
        moved = torch.roll(x, (o1, o2), (2, 3)).requires_grad_()
        (gradient,) = torch.autograd.grad(defined(u, g, moved, y, how, layers), moved)
        gradient = torch.roll(gradient, (-o1, -o2), (2, 3))
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x = x - how.lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    yield x


@pytest.mark.parametrize("channels", [1, 3])
def test_steps_are_those_of_the_equations(channels: int) -> None:
    shape = (channels, 12, 12)
    u, g, y = made(1, shape).double(), made(2, shape).double(), torch.arange(6) % CLASSES
    how = Inversion(steps=4, alpha_tv=0.01, alpha_l2=0.02, alpha_bn=2.0, alpha_c=10.0)
    x0, shifts = draw(generator(1, "test-draw"), 6, shape, how)
    got = invert(u, g, y, x0.double(), shifts, how)
    *_, want = loop(u, g, y, x0.double(), shifts, how)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_an_inversion_leaves_the_networks_as_they_were() -> None:
    u, g = made(1).train(), made(2).eval()
    u[1].eval()
    u[0].weight.requires_grad_(False)
    g[3].weight.grad = torch.ones_like(g[3].weight)
    before = state(u), state(g)
    kept = [[(m.training, m._forward_pre_hooks.copy(), "forward" in vars(m)) for m in n.modules()] for n in (u, g)]
    wanted = [[p.requires_grad for p in n.parameters()] for n in (u, g)]

    def same() -> bool:
        values = all(torch.equal(a[k], b[k]) for a, b in zip(before, (state(u), state(g)), strict=True) for k in a)
        modes = [[(m.training, m._forward_pre_hooks, "forward" in vars(m)) for m in n.modules()] for n in (u, g)]
        grads = [[p.requires_grad for p in n.parameters()] for n in (u, g)]
        return values and kept == modes and wanted == grads

    how = Inversion(steps=2, alpha_c=1.0)
    y = torch.arange(4)
    with torch.no_grad():  # where the caller happens to be
        invert(u, g, y, *draw(generator(1, "test-draw"), 4, SHAPE, how), how)
    assert same()
    assert all(p.grad is None for p in u.parameters()) and torch.equal(g[3].weight.grad, torch.ones_like(g[3].weight))

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    handle = g[2].register_forward_hook(interrupt)
    with pytest.raises(Interrupted):
        invert(u, g, y, *draw(generator(1, "test-draw"), 4, SHAPE, how), how)
    handle.remove()
    assert same()


def test_modes_make_no_difference() -> None:
    y, how = torch.arange(4), Inversion(steps=3, alpha_c=1.0)
    drawn = draw(generator(1, "test-draw"), 4, SHAPE, how)
    images = [invert(made(1).train(mode), made(2).train(mode), y, *drawn, how) for mode in (False, True)]
    assert torch.equal(*images)


def test_without_competition_the_second_network_is_never_asked() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    y, how = torch.arange(4), Inversion(steps=3)
    drawn = draw(generator(1, "test-draw"), 4, SHAPE, how)
    assert torch.equal(invert(made(1), Never(), y, *drawn, how), invert(made(1), None, y, *drawn, how))
    with pytest.raises(AssertionError):
        invert(made(1), Never(), y, *drawn, dataclasses.replace(how, alpha_c=1e-3))


def test_competition_without_a_second_network_is_refused() -> None:
    y, how = torch.arange(4), Inversion(steps=1, alpha_c=2.0)
    with pytest.raises(ValueError, match=r"alpha_c: 2 needs a second network"):
        invert(made(1), None, y, *draw(generator(1, "test-draw"), 4, SHAPE, how), how)


def test_shapes_that_do_not_fit_are_refused() -> None:
    how = Inversion(steps=3)
    x0, shifts = draw(generator(1, "test-draw"), 4, SHAPE, how)
    with pytest.raises(ValueError, match=r"5 targets and 3 steps .* got 4 and \[3, 2\]"):
        invert(made(1), None, torch.arange(5), x0, shifts, how)
    with pytest.raises(ValueError, match=r"got 4 and \[2, 2\]"):
        invert(made(1), None, torch.arange(4), x0, shifts[:2], how)


def test_the_best_images_are_those_of_the_smallest_loss_and_stay_so() -> None:
    u, y = made(1), torch.arange(4)
    how = Inversion(steps=6, lr=3.0, jitter=0, keep="best")  # a step so large that the last one is not the best
    x0, shifts = draw(generator(1, "test-draw"), 4, SHAPE, how)
    best = invert(u, None, y, x0, shifts, how)
    layers = [m for m in u.modules() if isinstance(m, nn.BatchNorm2d)]
    passed = [x.detach() for x in loop(u, u, y, x0, shifts, how)]
    losses = [defined(u.eval(), u, x, y, how, layers).item() for x in passed[:-1]]
    lowest = losses.index(min(losses))
    assert 0 < lowest < len(losses) - 1
    torch.testing.assert_close(best, passed[lowest], rtol=0, atol=1e-3)
    assert (invert(u, None, y, x0, shifts, dataclasses.replace(how, keep="last")) - best).abs().max() > 1.0


@pytest.mark.parametrize("keep", ["last", "best"])
def test_images_that_are_not_finite_are_returned(keep: str) -> None:
    u, y = made(1), torch.arange(4)
    u[-1].weight.data[0, 0] = math.nan
    how = Inversion(steps=2, keep=keep)
    images = invert(u, None, y, *draw(generator(1, "test-draw"), 4, SHAPE, how), how)
    assert images.isnan().all()


def test_enough_steps_make_images_that_the_network_takes_for_their_classes() -> None:
    y = torch.arange(32) % CLASSES
    row = torch.tensor([1.0, -1.0]).repeat(6)
    textures = torch.stack(
        [torch.ones(12, 12), row.expand(12, 12), row.view(12, 1).expand(12, 12), torch.outer(row, row)]
    )
    real = textures[y].unsqueeze(1) + noise(32) * 0.3
    with forked(3, "test-network"):
        u = CnnBn(widths=(8, 16)).build(SHAPE, CLASSES)
    adam = torch.optim.Adam(u.parameters(), 0.02)
    for _ in range(40):
        adam.zero_grad()
        cross_entropy(u(real), y).backward()
        adam.step()
    u.eval()
    assert (u(real).argmax(1) == y).all()
    how = Inversion(steps=60, jitter=0)
    x0, shifts = draw(generator(1, "test-draw"), 32, SHAPE, how)
    images = invert(u, None, y, x0, shifts, how)
    assert (u(images).argmax(1) == y).double().mean() >= 0.9
    assert cross_entropy(u(images), y) < 0.2 * cross_entropy(u(x0), y)
    with Statistics(u) as statistics:
        u(images)
        gap = statistics.gap()
        u(x0)
        assert gap < 0.5 * statistics.gap()


def test_a_network_without_batch_norm_is_inverted_by_the_other_terms() -> None:
    with forked(1, "test-network"):
        u = Cnn(norm="group").build((1, 28, 28), CLASSES)
    y = torch.arange(4)
    how = Inversion(steps=5)
    drawn = draw(generator(1, "test-draw"), 4, (1, 28, 28), how)
    images = invert(u, None, y, *drawn, how)
    assert torch.equal(images, invert(u, None, y, *drawn, dataclasses.replace(how, alpha_bn=0.0)))
    assert cross_entropy(u(images), y) < cross_entropy(u(drawn[0]), y)


def test_one_network_in_both_places() -> None:
    u, y, how = made(1).train(), torch.arange(4), Inversion(steps=2, alpha_c=1.0)
    drawn = draw(generator(1, "test-draw"), 4, SHAPE, how)
    torch.testing.assert_close(invert(u, u, y, *drawn, how), invert(u, made(1), y, *drawn, how))
    assert u.training and all(m.training and "forward" not in vars(m) for m in u.modules())
    assert all(p.requires_grad for p in u.parameters())


def test_a_layer_with_a_forward_of_its_own_and_one_without_statistics_are_let_be() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 5.0

    with forked(1, "test-network"):
        u = nn.Sequential(Own(1), nn.BatchNorm2d(1, track_running_stats=False), nn.BatchNorm2d(1, affine=False))
        u.extend([nn.Flatten(), nn.Linear(144, CLASSES)])
    u = u.double()
    y, how = torch.arange(4), Inversion(steps=3, alpha_c=1.0)
    x0, shifts = draw(generator(1, "test-draw"), 4, SHAPE, how)
    got = invert(u, u, y, x0.double(), shifts, how)
    u.eval()
    x = x0.double().requires_grad_()
    layers = [u[0], u[2]]
    adam = torch.optim.Adam([x], how.lr)
    for shift in shifts.tolist():
        adam.zero_grad()
        defined(u, u, torch.roll(x, shift, (2, 3)), y, how, layers).backward()
        adam.step()
    torch.testing.assert_close(got, x.detach(), rtol=0, atol=1e-9)


def inverted() -> str:
    """The hash of images that are made the same way in any process."""
    how = Inversion(steps=4, alpha_c=1.0)
    with forked(1, "test-network"):
        u, g = (ResNet18Small().build((3, 8, 8), CLASSES) for _ in range(2))
    x0, shifts = draw(generator(1, "test-draw"), 6, (3, 8, 8), how)
    images = invert(u, g, torch.arange(6) % CLASSES, x0, shifts, how)
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def test_images_are_the_same_bits_in_another_process_and_from_a_slice() -> None:
    lines = "import sys, torch; torch.set_num_threads(int(sys.argv[1])); from tests.test_inversion import inverted"
    words = [sys.executable, "-c", f"{lines}; print(inverted())", str(torch.get_num_threads())]
    other = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert other.stdout.strip() == inverted()
    u, y, how = made(1), torch.arange(4), Inversion(steps=3)
    x0, shifts = draw(generator(1, "test-draw"), 4, SHAPE, how)
    sliced = torch.cat([torch.zeros(1), x0.flatten()])[1:].view(x0.shape)
    assert torch.equal(invert(u, None, y, x0, shifts, how), invert(u, None, y, sliced, shifts, how))


def test_fields_are_checked() -> None:
    check = TypeAdapter(Inversion).validate_python
    assert check({"steps": 0, "keep": "best"}) == Inversion(steps=0, keep="best")
    for wrong in ({"steps": -1}, {"lr": 0}, {"alpha_bn": -1}, {"temperature_c": 0}, {"keep": "first"}, {"step": 3}):
        with pytest.raises(ValidationError):
            check(wrong)


def test_a_compiled_objective_serves_all_networks_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Tensor]:
        graphs.append(graph)
        return graph.forward

    # what a compiler gets to see, without the minute that it takes
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    y, how = torch.arange(4), Inversion(steps=3, alpha_c=1.0)
    drawn = draw(generator(1, "test-draw"), 4, SHAPE, how)
    for seed in (1, 2):
        compiled = invert(made(seed), made(3), y, *drawn, dataclasses.replace(how, compile=True))
        torch.testing.assert_close(compiled, invert(made(seed), made(3), y, *drawn, how), rtol=0, atol=1e-3)
    assert len(graphs) == 1


def test_a_gpu_makes_nearly_the_same_images() -> None:
    needs_gpus()
    u, g, y = made(1), made(2), torch.arange(8) % CLASSES
    how = Inversion(steps=5, alpha_c=10.0, alpha_l2=0.1)
    x0, shifts = draw(generator(3, "test-gpu"), len(y), SHAPE, how)
    here = invert(u, g, y, x0, shifts, how)
    there = invert(u.cuda(), g.cuda(), y, x0, shifts, how)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)
