"""A small generator in the manner of StyleGAN: a mapping network, and a synthesis that its output modulates.

Its latent is w, what the mapping makes of noise. Training it is in `fldist/pretrain.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from fldist.models.generators.pretrained import KEY, GeneratorConfig, ModuleGenerator, load_into, read_weights

SIDE = 32
"""Height and width that the network makes; images of fewer pixels are its centre."""
BASE = 128
WIDTHS = (64, 32, 32)
SLOPE = 0.2


@dataclass(frozen=True)
class MiniStyle(GeneratorConfig):
    """Noise z ~ N(0, I) of 64 values -> latent w of 64 values -> images of 32 x 32 pixels or their centre.

    Mapping: z / sqrt(mean z^2 + 1e-8), then twice a linear layer 64 to 64 and LeakyReLU of 0.2. Synthesis: linear
    from w to 128 channels of 4 x 4; three times the size doubled (nearest), convolution 3x3 to 64, 32 and 32 channels,
    instance normalisation, a scale and a shift a channel that a linear layer makes of w, LeakyReLU; convolution 1x1 to
    the image's channels; tanh. Source: after Karras, Laine and Aila, CVPR 2019 (arXiv 1812.04948).

    path: what `fldist pretrain-generator --arch mini_style` wrote, in the working directory, FLDIST_DATA or its folder
    `pretrained`; None: the weights that come with the package, 1x28x28, of Fashion-MNIST.
    """

    path: str | None = None

    def load(self, device: torch.device) -> ModuleGenerator:
        """Read weights and side-car; ValueError names what does not fit."""
        file, car, state = read_weights(self.path, "mini_style", "w", (-1.0, 1.0))
        if max(car.image_shape[1:]) > SIDE:
            raise ValueError(
                f"{KEY}.path: the JSON file of {file} says image_shape {list(car.image_shape)}, and mini_style makes "
                f"at most {SIDE} x {SIDE} pixels; correct it"
            )
        with torch.device("meta"):
            network = MiniStyleNetwork(car.noise_dim, car.latent_dim, car.image_shape)
        load_into(network, state, file)
        return ModuleGenerator(
            network.synthesis,
            network.mapping,
            arch="mini_style",
            z_dim=car.noise_dim,
            latent_dim=car.latent_dim,
            image_shape=car.image_shape,
            value_range=car.value_range,
            device=device,
        )


class MiniStyleNetwork(nn.Module):
    """Noise z [n, z_dim] -> pixels [n, *image_shape] in -1..1, by `mapping` and then `synthesis`."""

    def __init__(self, z_dim: int, latent_dim: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.mapping = Mapping(z_dim, latent_dim)
        self.synthesis = Synthesis(latent_dim, image_shape)

    def forward(self, z: Tensor) -> Tensor:
        """z: float32 [n, z_dim]."""
        return self.synthesis(self.mapping(z))  # type: ignore[no-any-return]


class Mapping(nn.Module):
    """Noise z [n, z_dim] -> latent w [n, latent_dim]."""

    def __init__(self, z_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(z_dim, latent_dim)
        self.second = nn.Linear(latent_dim, latent_dim)
        for linear in (self.first, self.second):  # with PyTorch's defaults w would hardly differ from image to image
            nn.init.kaiming_normal_(linear.weight, SLOPE)

    def forward(self, z: Tensor) -> Tensor:
        """z: float32 [n, z_dim], of any length that is not 0."""
        z = z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        return leaky_relu(self.second(leaky_relu(self.first(z), SLOPE)), SLOPE)


class Synthesis(nn.Module):
    """Latent w [n, latent_dim] -> pixels [n, *image_shape] in -1..1, the centre of 32 x 32."""

    def __init__(self, latent_dim: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, self._height, self._width = image_shape
        self.base = nn.Linear(latent_dim, BASE * 4 * 4)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip((BASE, *WIDTHS[:-1]), WIDTHS, strict=True)
        )
        self.styles = nn.ModuleList(nn.Linear(latent_dim, 2 * width) for width in WIDTHS)
        self.norms = nn.ModuleList(nn.InstanceNorm2d(width) for width in WIDTHS)  # they have no parameters
        self.to_pixels = nn.Conv2d(WIDTHS[-1], channels, 1)

    def forward(self, w: Tensor) -> Tensor:
        """w: float32 [n, latent_dim]."""
        x = self.base(w).view(-1, BASE, 4, 4)
        for conv, norm, style in zip(self.convs, self.norms, self.styles, strict=True):
            scale, shift = style(w)[:, :, None, None].chunk(2, dim=1)
            x = leaky_relu(norm(conv(interpolate(x, scale_factor=2.0))) * (1.0 + scale) + shift, SLOPE)
        top, left = (SIDE - self._height) // 2, (SIDE - self._width) // 2
        return self.to_pixels(x[:, :, top : top + self._height, left : left + self._width]).tanh()  # type: ignore[no-any-return]
