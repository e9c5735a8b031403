"""Images from a trained network, by optimising noise until the network answers as asked.

    L(x') = CE(u(x'), y) + alpha_tv R_tv(x') + alpha_l2 |x'| + alpha_bn R_bn(u, x') + alpha_c R_comp(u, g, x')

x' are the images x, shifted cyclically by a few pixels drawn anew in each step; Adam moves x and nothing else. R_tv is
the total variation, R_bn how far the images' statistics are from those that u's BatchNorm layers have kept, R_comp how
much a second network g agrees with u. The inversion is DeepInversion (Yin et al., "Dreaming to Distill", CVPR 2020,
arXiv 1912.08795); R_comp in this form, and all norms unsquared and over the whole batch, as in FedF2DG (Zhao et al.,
Neural Networks 179, 2024). Statistics and norms couple the images of a batch: they cannot be made in parts.

It knows networks and images. How many images of which classes are made, by whom and for what, is the business of
`algorithms/`; so is what becomes of images that are not finite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy, softmax

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]

_CLAMP = (0.01, 0.99)
"""Bounds of the probabilities that R_comp compares."""
_TINY = 1e-30
"""In place of a norm of 0 as a divisor: the gradient of |0| is 0."""
_NEIGHBOURS = (
    ((..., slice(None, -1)), (..., slice(1, None))),
    ((..., slice(None, -1), slice(None)), (..., slice(1, None), slice(None))),
    ((..., slice(1, None), slice(None, -1)), (..., slice(None, -1), slice(1, None))),
    ((..., slice(None, -1), slice(None, -1)), (..., slice(1, None), slice(1, None))),
)
"""Pixels and their neighbours to the right, below, above right and below right."""


@dataclass(frozen=True)
class Inversion:
    """How images are made; the weights are those of the terms of L."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    steps: Count = 2000  # of Adam; 0: the images are the noise
    lr: Positive = 0.1  # of Adam (betas 0.9 and 0.999, eps 1e-8)
    alpha_tv: NonNegative = 1e-3  # weight of the total variation
    alpha_l2: NonNegative = 0.0  # of the norm of the images
    alpha_bn: NonNegative = 1.0  # of the distance to BatchNorm's statistics
    alpha_c: NonNegative = 0.0  # of the agreement with the second network; 0: that network is not asked
    temperature_c: Positive = 3.0  # of the softmaxes that are compared
    jitter: Count = 2  # largest shift in pixels, in both directions
    keep: Literal["last", "best"] = "last"  # the images after the last step, or those of the smallest L
    compile: bool = False  # torch.compile for L, once for a model; its results differ in the last bits


# ---- the terms
class _TotalVariation(torch.autograd.Function):
    """R_tv with its gradient, found in the same pass: half the time of the general one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gradient, total = torch.zeros_like(x), x.new_zeros(())
        for here, there in _NEIGHBOURS:
            difference = x[here] - x[there]
            norm = vector_norm(difference)
            total += norm
            difference /= norm.clamp(min=_TINY)
            gradient[here] += difference
            gradient[there] -= difference
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        return gradient * by  # type: ignore[no-any-return]


def total_variation(x: Tensor) -> Tensor:
    """R_tv, a scalar: the norms of the differences of neighbouring pixels of x [M, ch, H, W], each over the whole
    batch, added over four directions (along width, height and both diagonals)."""
    total: Tensor = _TotalVariation.apply(x)  # type: ignore[no-untyped-call]
    return total


def statistics_gap(mean: Tensor, variance: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """One layer's part of R_bn, a scalar: |running_var - variance| + |running_mean - mean|, all [c]."""
    return vector_norm(running_var - variance) + vector_norm(running_mean - mean)  # type: ignore[no-any-return]


class _Moments(torch.autograd.Function):
    """x [M, c, H, W] itself, and the mean and biased variance [c] of its channels over images and pixels.

    x goes through, so that its gradient is made in one pass with that of the moments.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        over = (0, 2, 3)
        if x.is_cuda:
            variance, mean = torch.var_mean(x, over, correction=0)
        else:  # where var_mean goes value by value, in ten times the time
            mean = x.mean(over)
            variance = (x - mean.view(-1, 1, 1)).square_().mean(over)
        ctx.save_for_backward(x, mean)
        return x.view_as(x), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_x: Tensor, by_mean: Tensor, by_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        n = x.numel() // len(mean)
        slope = by_variance * (2.0 / n)
        constant = by_mean / n - slope * mean
        return torch.addcmul(by_x, x, slope.view(-1, 1, 1)).add_(constant.view(-1, 1, 1))


class Statistics:
    """What a module's BatchNorm2d layers get to see: while this is open (`with`), every forward pass of the module
    notes mean and biased variance of the input of each layer that keeps running statistics."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._layers = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.running_var is not None]
        self._seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # as `statistics_gap` takes them
        self._handles: list[Any] = []

    def __enter__(self) -> Statistics:
        # the module's own hook comes first, so that also a module that is a layer notes after it forgets
        self._handles = [self._module.register_forward_pre_hook(self._forget)]
        self._handles += [layer.register_forward_pre_hook(self._note) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._forget()

    def _forget(self, *_: object) -> None:
        self._seen = []  # not cleared: a compiled pass would then depend on what was in it

    def _note(self, layer: nn.BatchNorm2d, inputs: tuple[Tensor]) -> Tensor:
        assert layer.running_mean is not None and layer.running_var is not None
        x, mean, variance = _Moments.apply(*inputs)  # type: ignore[no-untyped-call]
        self._seen.append((mean, variance, layer.running_mean, layer.running_var))
        return x  # type: ignore[no-any-return]

    def gap(self) -> Tensor:
        """R_bn of the module's last forward pass, a scalar with its graph: `statistics_gap` added over the layers that
        it went through, as often as it did; 0 without any."""
        total = torch.zeros(())
        for seen in self._seen:
            total = total + statistics_gap(*seen)
        return total


def competition(z_u: Tensor, z_g: Tensor, temperature: float = 3.0) -> Tensor:
    """R_comp of two networks' logits [M, C], a scalar from 0 to 1: 1 where they agree, less where they do not.

    1 - clamp(D, 0, 1) with D = (KL(A || P) + KL(A || Q)) / 2 in the mean over the images; P and Q are the softmaxes at
    the temperature, A their mean, all three then clamped to [0.01, 0.99]. Where D is above 1, the gradient is 0.
    """
    p, q = softmax(z_g / temperature, dim=1), softmax(z_u / temperature, dim=1)
    a = ((p + q) / 2.0).clamp(*_CLAMP)
    p, q = p.clamp(*_CLAMP), q.clamp(*_CLAMP)
    d = (a * (2.0 * a.log() - p.log() - q.log())).sum() / (2.0 * len(a))
    return 1.0 - d.clamp(0.0, 1.0)


def cyclic(x: Tensor, shift: tuple[int, int]) -> Tensor:
    """Images x [M, ch, H, W], shifted cyclically by so many pixels along height and along width."""
    return torch.roll(x, shift, (2, 3))


def objective(
    u: nn.Module, g: nn.Module | None, x: Tensor, y: Tensor, how: Inversion, statistics: Statistics
) -> Tensor:
    """L of images x [M, ch, H, W] for targets y [M], a scalar; of `how`, the weights and the temperature.

    statistics: of u, and open, unless `alpha_bn` is 0. g is asked only where `alpha_c` is not 0; ValueError where it
    is then missing.
    """
    z = u(x)
    loss = cross_entropy(z, y)
    if how.alpha_bn:
        loss = loss + how.alpha_bn * statistics.gap()
    if how.alpha_c:
        if g is None:
            raise ValueError(f"alpha_c: {how.alpha_c:g} needs a second network to compete with; set it to 0")
        loss = loss + how.alpha_c * competition(z, g(x), how.temperature_c)
    if how.alpha_tv:
        loss = loss + how.alpha_tv * total_variation(x)
    if how.alpha_l2:
        loss = loss + how.alpha_l2 * vector_norm(x)
    return loss


# ---- making images
def draw(rng: torch.Generator, count: int, shape: tuple[int, ...], how: Inversion) -> tuple[Tensor, Tensor]:
    """What an inversion leaves to chance: noise x0 ~ N(0, 1), float32 [count, *shape], then the shifts of all steps,
    int64 [steps, 2], uniform from -jitter to jitter. rng: a generator of the CPU."""
    x0 = torch.randn((count, *shape), generator=rng)
    return x0, torch.randint(-how.jitter, how.jitter + 1, (how.steps, 2), generator=rng)


def invert(u: nn.Module, g: nn.Module | None, y: Tensor, x0: Tensor, shifts: Tensor, how: Inversion) -> Tensor:
    """Images [M, ch, H, W] that u takes for the classes y, int64 [M]: float32, on u's device, unshifted, not clipped.

    x0, shifts: see `draw`; x0 stays as it is. u, g: both are evaluated (BatchNorm by its running statistics), whatever
    mode they are in, and are afterwards as they were, also after an exception. Images that come to be NaN or infinite
    are returned as such. ValueError where the shapes do not fit, or `alpha_c` lacks a second network.
    """
    if len(x0) != len(y) or tuple(shifts.shape) != (how.steps, 2):
        raise ValueError(
            f"{len(y)} targets and {how.steps} steps need as many images of noise and shifts [{how.steps}, 2]; "
            f"got {len(x0)} and {list(shifts.shape)}"
        )
    device = next(u.parameters(), x0).device
    y = y.to(device)
    x = x0.detach().to(device, copy=True, memory_format=torch.contiguous_format).requires_grad_()
    fused = torch.optim.Adam([x], how.lr, fused=True)  # half the time of the other forms
    best: Tensor | None = None
    lowest = math.inf
    evaluate = torch.compile(objective) if how.compile else objective
    networks = [u] if g is None or not how.alpha_c else [u, g]
    statistics = Statistics(u)
    with torch.enable_grad(), _frozen(*networks, affine=not how.compile), statistics if how.alpha_bn else nullcontext():
        for shift in shifts.tolist():
            loss = evaluate(u, g, cyclic(x, tuple(shift)), y, how, statistics)
            (x.grad,) = torch.autograd.grad(loss, x)
            if how.keep == "best" and (value := loss.item()) < lowest:
                best, lowest = x.detach().clone(), value
            fused.step()
    return x.detach() if best is None else best


@contextmanager
def _frozen(*networks: nn.Module, affine: bool = True) -> Iterator[None]:
    """Networks in evaluation without gradients of their weights; each as it was afterwards.

    affine: BatchNorm's forward is the map of each channel that it then is. torch's own goes back through it in three
    times the time, as if there were gradients of its weights; a compiler sees to that by itself.
    """
    with ExitStack() as undo:
        for network in networks:
            for module in network.modules():
                undo.callback(setattr, module, "training", module.training)
            for parameter in network.parameters():
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
            network.eval().requires_grad_(False)
            for layer in network.modules():
                plain = type(layer).forward is nn.BatchNorm2d.forward and "forward" not in vars(layer)
                if affine and plain and layer.running_var is not None:
                    layer.forward = _affine(layer)  # type: ignore[arg-type]
                    undo.callback(delattr, layer, "forward")
        yield


def _affine(layer: nn.BatchNorm2d) -> functools.partial[Tensor]:
    """x [M, c, H, W] -> scale x + shift: what a layer does that uses its running statistics."""
    assert layer.running_mean is not None and layer.running_var is not None
    scale = (layer.running_var + layer.eps).rsqrt()
    shift = -layer.running_mean * scale
    if layer.affine:
        scale, shift = scale * layer.weight, shift * layer.weight + layer.bias
    return functools.partial(torch.addcmul, shift.view(-1, 1, 1), tensor2=scale.view(-1, 1, 1))
