"""Q-networks as plain values of a `State`, and the steps that train them.

    an MLP     one flat tensor of weights [P]: of each layer W [out, in] row by row, then b [out]; ReLU between layers
    a learner  State(weights, target, first, second, steps): a network or several [A, P], the copy Q' that targets are
               taken from, Adam's two moments, and how many steps were made

Nothing is changed in place and nothing else is remembered, so that a learner that was saved goes on with the same bits.
What states, actions and rewards are is the business of those who use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from fldist.algorithm import State

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Mlp:
    """The form of a network: sizes are those of its input, hidden layers and output."""

    sizes: tuple[int, ...]

    @property
    def num_weights(self) -> int:
        """P."""
        return sum(outputs * (inputs + 1) for inputs, outputs in self._layers)

    @property
    def _layers(self) -> list[tuple[int, int]]:
        return list(zip(self.sizes, self.sizes[1:], strict=False))

    def init(self, rng: Generator, networks: int = 1) -> Tensor:
        """Weights [networks, P], of every layer uniform in +-1 / sqrt(inputs), as `nn.Linear` has them."""
        layers = [
            (2 * torch.rand(networks, outputs * (inputs + 1), generator=rng) - 1) / math.sqrt(inputs)
            for inputs, outputs in self._layers
        ]
        return torch.cat(layers, dim=1)

    def __call__(self, weights: Tensor, x: Tensor) -> Tensor:
        """The outputs [B, out] of inputs x [B, in] for weights [P], or [B, P] for a network of each row's own."""
        at = 0
        for number, (inputs, outputs) in enumerate(self._layers):
            if number:
                x = x.relu()
            split = at + inputs * outputs
            w, b = weights[..., at:split], weights[..., split : split + outputs]
            at = split + outputs
            if weights.dim() == 1:
                x = linear(x, w.view(outputs, inputs), b)
            else:
                x = torch.baddbmm(b[:, :, None], w.reshape(-1, outputs, inputs), x[:, :, None])[:, :, 0]
        return x


def learner(form: Mlp, rng: Generator, networks: int = 1) -> State:
    """A learner that has learnt nothing: networks [A, P] of random weights, targets equal to them."""
    weights = form.init(rng, networks)
    still = torch.zeros_like(weights)
    return State(weights=weights, target=weights, first=still, second=still, steps=0)


def adam(
    weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and moments after Adam's step number `step`, from 1 (Kingma and Ba 2015, Algorithm 1)."""
    first = torch.lerp(first, gradient, 1 - BETA1)
    second = BETA2 * second + (1 - BETA2) * gradient.square()
    root = (second / (1 - BETA2**step)).sqrt_().add_(EPS)
    return weights - lr / (1 - BETA1**step) * first / root, first, second


def improved(learnt: State, loss: Callable[[Tensor], Tensor], lr: float, copy_every: int) -> State:
    """The learner after one step down the gradient of `loss`, a function of its weights [A, P].

    The target becomes the new weights after every `copy_every`-th step.
    """
    weights = learnt.weights.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(weights), weights)
    steps = learnt.steps + 1
    with torch.no_grad():
        new, first, second = adam(learnt.weights, gradient, learnt.first, learnt.second, steps, lr)
    target = new if steps % copy_every == 0 else learnt.target
    return State(weights=new, target=target, first=first, second=second, steps=steps)
