"""Multilayer perceptrons."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from fldist.models.layers import Init, initialised


@dataclass(frozen=True)
class Mlp:
    """Flatten, then linear layers with ReLU between; `hidden` gives the widths between input and classes.

    With hidden (64, 64), 784 inputs and ten classes: 55,050 parameters. init: `default` (PyTorch's) or `xavier`.
    """

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (128,)
    init: Init = "default"

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """shape: one sample's shape, [channels, height, width]."""
        widths = [math.prod(shape), *self.hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return initialised(nn.Sequential(*layers, nn.Linear(widths[-1], classes)), self.init)
