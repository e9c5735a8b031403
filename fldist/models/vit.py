"""Vision transformers: torchvision's networks, for images of any number of channels.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR 2021.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from fldist.models.layers import Head, images
from fldist.vision import torchvision

_WIDTH = 768


@dataclass(frozen=True)
class VitB16:
    """ViT-B/16: twelve layers of width 768 on patches of 16x16 pixels; torchvision's layers, names and initial values.

    representation: width of the linear layer with tanh between features and classifier, as the paper has it in
    pre-training (its layers are one head, see `layers.Head`); 0: none, as torchvision's `vit_b_16`. For images of
    3x32x32, without the head: 85,651,200 parameters, features of 768. The classifier starts at 0.
    """

    short_name: ClassVar[str] = "vit_b16"
    patch: ClassVar[int] = 16

    representation: Annotated[int, Field(ge=0)] = _WIDTH

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """shape: one sample's shape, [channels, size, size], the size a multiple of the patch's; ValueError else."""
        channels, height, width = images(self.short_name, shape)
        patch = self.patch
        if height != width or height % patch:
            raise ValueError(
                f"task.model: {self.short_name} needs square images whose size is a multiple of {patch}; the data's "
                f"are {height} x {width}; set task.resize to {patch * math.ceil(max(height, width) / patch)}"
            )
        net: nn.Module = torchvision().models.VisionTransformer(
            image_size=height,
            patch_size=patch,
            num_layers=12,
            num_heads=12,
            hidden_dim=_WIDTH,
            mlp_dim=4 * _WIDTH,
            num_classes=classes,
            representation_size=self.representation or None,
        )
        if channels != 3:
            conv = nn.Conv2d(channels, _WIDTH, kernel_size=patch, stride=patch)
            nn.init.trunc_normal_(conv.weight, std=math.sqrt(1 / (channels * patch**2)))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            net.set_submodule("conv_proj", conv)
        net.set_submodule("heads", Head(OrderedDict(net.get_submodule("heads").named_children())))
        return net


@dataclass(frozen=True)
class VitB32(VitB16):
    """ViT-B/32: patches of 32x32 pixels; fields as `VitB16`. Without the head 87,418,368 parameters on 3x32x32."""

    short_name: ClassVar[str] = "vit_b32"
    patch: ClassVar[int] = 32
