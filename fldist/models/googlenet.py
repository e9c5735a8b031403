"""GoogLeNet: torchvision's network, for images of any number of channels.

Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, with BatchNorm and without the auxiliary classifiers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fldist.models.layers import images
from fldist.vision import torchvision


@dataclass(frozen=True)
class GoogLeNet:
    """Torchvision's layers, names and initial values (truncated normal of deviation 0.01); dropout 0.2 before the head.

    5,599,904 parameters without the head (three channels), features of 1024. Made for large images: of 28x28 to 32x32
    pixels one is left. Features are random in training, by the dropout. Building one takes a tenth of a second.
    """

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """shape: one sample's shape, [channels, height, width]."""
        channels, _, _ = images("googlenet", shape)
        net: nn.Module = torchvision().models.GoogLeNet(classes, aux_logits=False, init_weights=True)
        if channels != 3:
            conv = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.trunc_normal_(conv.weight, std=0.01, a=-2, b=2)
            net.set_submodule("conv1.conv", conv)
        return net
