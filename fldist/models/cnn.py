"""Small convolutional networks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn


@dataclass(frozen=True)
class CnnBn:
    """3x3 convolutions of stride 2 without bias, each followed by BatchNorm and ReLU; global average pool; linear.

    With widths (16, 32, 64), one input channel and ten classes: 24,058 parameters, 224 float buffer entries,
    3 integer counters.
    """

    widths: tuple[Annotated[int, Field(ge=1)], ...] = (16, 32, 64)

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """shape: one sample's shape, [channels, height, width]."""
        if len(shape) != 3:
            raise ValueError(f"task.model: cnn_bn needs images [channels, height, width]; the data's shape is {shape}")
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise([shape[0], *self.widths]):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.widths[-1], classes))
