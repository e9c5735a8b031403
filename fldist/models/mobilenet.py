"""MobileNetV2: torchvision's network, for images of any number of channels.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fldist.models.layers import images
from fldist.vision import torchvision


@dataclass(frozen=True)
class MobileNetV2:
    """Torchvision's layers, names and initial values (normal by fan-out; head 0.01); dropout 0.2 before the head.

    2,223,872 parameters without the head (three channels), features of 1280. Made for large images: of 28x28 to 32x32
    pixels one is left. Features are random in training, by the dropout.
    """

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """shape: one sample's shape, [channels, height, width]."""
        channels, _, _ = images("mobilenet_v2", shape)
        net: nn.Module = torchvision().models.MobileNetV2(classes)
        if channels != 3:
            conv = nn.Conv2d(channels, 32, kernel_size=3, stride=2, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out")
            net.set_submodule("features.0.0", conv)
        return net
