"""The generator of class-conditional images that FedZGE trains at its server.

It is a module like any other: nothing here knows losses, queries or how a gradient comes about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

Width = Annotated[int, Field(ge=1)]
Slope = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class ConditionalGenerator:
    """Noise z of nz values and a label y -> an image in -1..1, by two transposed convolutions that double the size.

    With h0 a quarter of the image's side: z beside the label's embedding (nz values); linear to 2 ngf h0 h0, read as
    2 ngf channels of h0 x h0 pixels; BatchNorm; twice a transposed convolution (4x4, stride 2, padding 1, no bias; to
    2 ngf, then ngf channels), BatchNorm, LeakyReLU of `slope`; convolution 3x3 to the image's channels; BatchNorm;
    tanh. conditional: false leaves the embedding out, and the linear layer takes z alone. Initial values are PyTorch's
    defaults.

    With the defaults: 2,043,185 parameters for 3x32x32 and ten classes, 2,052,185 for a hundred, 1,656,107 for 1x28x28
    and ten. Source: the code of FedZGE (Ma, Wang and Zhang, AAAI 2025, arXiv 2503.06028).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    nz: Width = 100
    ngf: Width = 64
    slope: Slope = 0.2
    conditional: bool = True

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A `ConditionalImages`. shape: of one image, [channels, side, side]; ValueError unless 4 divides the side."""
        if len(shape) != 3:
            raise ValueError(
                f"ConditionalGenerator makes images [channels, height, width], and the data's shape is {tuple(shape)}; "
                "choose data of images"
            )
        channels, height, width = shape
        if height != width or height % 4:
            near = max(4, 4 * round(max(height, width) / 4))
            raise ValueError(
                "ConditionalGenerator makes square images whose side 4 divides, and the data's are "
                f"{height} x {width}; set task.resize, for instance to {near}"
            )
        return ConditionalImages(self, channels, height // 4, classes)


class ConditionalImages(nn.Module):
    """The network of a `ConditionalGenerator`: z [N, nz], y [N] of 0 ... classes - 1 -> [N, channels, 4 h0, 4 h0]."""

    def __init__(self, config: ConditionalGenerator, channels: int, h0: int, classes: int) -> None:
        super().__init__()
        nz, ngf = config.nz, config.ngf
        self.embedding = nn.Embedding(classes, nz) if config.conditional else None
        self.linear = nn.Linear(2 * nz if config.conditional else nz, 2 * ngf * h0 * h0)
        self.to_pixels = nn.Unflatten(1, (2 * ngf, h0, h0))
        self.layers = nn.Sequential(
            nn.BatchNorm2d(2 * ngf),
            nn.ConvTranspose2d(2 * ngf, 2 * ngf, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * ngf),
            nn.LeakyReLU(config.slope),
            nn.ConvTranspose2d(2 * ngf, ngf, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.LeakyReLU(config.slope),
            nn.Conv2d(ngf, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.Tanh(),
        )

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """z: float32 [N, nz], y: int64 [N], not looked at where the generator is not conditional."""
        if self.embedding is not None:
            z = torch.cat([z, self.embedding(y)], dim=1)
        return self.layers(self.to_pixels(self.linear(z)))  # type: ignore[no-any-return]
