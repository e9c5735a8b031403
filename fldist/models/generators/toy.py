"""A generator for tests and dry runs: a random linear map that nobody trained, with tanh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fldist.models.generators.pretrained import GeneratorConfig, ImageShape, ModuleGenerator, Size
from fldist.seeding import generator


@dataclass(frozen=True)
class Toy(GeneratorConfig):
    """Latent z ~ N(0, I) of latent_dim values -> tanh(A z), brought to 0..1; image_shape: [channels, height, width].

    A's values are drawn from N(0, 1 / latent_dim) by the seed, so that A z has values of N(0, 1).
    """

    latent_dim: Size = 16
    image_shape: ImageShape = (1, 8, 8)
    seed: int = 0

    def load(self, device: torch.device) -> ModuleGenerator:
        """The generator; reads nothing."""
        channels, height, width = self.image_shape
        with torch.device("meta"):  # without initial values, which would be drawn from torch's global generator
            linear = nn.Linear(self.latent_dim, channels * height * width, bias=False)
        values = torch.randn(linear.weight.shape, generator=generator(self.seed, "toy-generator"))
        linear.load_state_dict({"weight": values * self.latent_dim**-0.5}, assign=True)
        return ModuleGenerator(
            nn.Sequential(linear, nn.Tanh(), nn.Unflatten(1, self.image_shape)),
            None,
            arch="toy",
            z_dim=self.latent_dim,
            latent_dim=self.latent_dim,
            image_shape=self.image_shape,
            value_range=(-1.0, 1.0),
            device=device,
        )
