"""Multilayer perceptrons."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn


@dataclass(frozen=True)
class Mlp:
    """Flatten, then linear layers with ReLU between; `hidden` gives the widths between input and classes."""

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (128,)

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """shape: one sample's shape, [channels, height, width]."""
        widths = [math.prod(shape), *self.hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], classes))
