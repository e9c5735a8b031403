"""Generators that are a row of linear layers: a state dict of anybody's, and the decoder of a small VAE.

Their latent is noise, z ~ N(0, I). Training the VAE is in `fldist/pretrain.py`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fldist.models.generators.pretrained import (
    KEY,
    GeneratorConfig,
    ImageShape,
    ModuleGenerator,
    find_file,
    load_into,
    read_state,
    read_weights,
)

HIDDEN = 256
"""Hidden units of the VAE's decoder, and of its encoder."""


@dataclass(frozen=True)
class Mlp(GeneratorConfig):
    """Linear layers of a file with ReLU between them, then sigmoid or tanh: latent z -> pixels in 0..1 or -1..1.

    path: a state dict that torch.save or safetensors wrote, in the working directory, FLDIST_DATA or its folder
    `pretrained`; output: what follows the last layer; layers: names of the linear layers in order, such as [fc3, fc4]
    for the decoder of a VAE (empty: the file must hold nothing but linear layers in a row); image_shape: [channels,
    height, width] of the last layer's values (None: grey and square). The latent is as wide as the first layer.
    """

    path: str
    output: Literal["sigmoid", "tanh"]
    layers: tuple[str, ...] = ()
    image_shape: ImageShape | None = None

    def load(self, device: torch.device) -> ModuleGenerator:
        """Read the file; ValueError names the layer or size that does not fit."""
        file = find_file(self.path)
        state = read_state(file)
        names = self.layers or _in_a_row(state, file)
        linears = [_linear(name, state, file) for name in names]
        for (name, one), (after, other) in itertools.pairwise(zip(names, linears, strict=True)):
            if one.out_features != other.in_features:
                raise ValueError(
                    f"{KEY}.layers: {name} of {file} gives {one.out_features} values and {after} takes "
                    f"{other.in_features}; name the layers of the decoder, from the latent to the pixels, in order"
                )
        image_shape = self._shape(linears[-1].out_features, file)
        modules: list[nn.Module] = [linears[0]]
        for linear in linears[1:]:
            modules += [nn.ReLU(), linear]
        modules += [nn.Sigmoid() if self.output == "sigmoid" else nn.Tanh(), nn.Unflatten(1, image_shape)]
        return ModuleGenerator(
            nn.Sequential(*modules),
            None,
            arch="mlp",
            z_dim=linears[0].in_features,
            latent_dim=linears[0].in_features,
            image_shape=image_shape,
            value_range=(0.0, 1.0) if self.output == "sigmoid" else (-1.0, 1.0),
            device=device,
        )

    def _shape(self, values: int, file: Path) -> tuple[int, int, int]:
        """The shape of the images that so many values make."""
        if self.image_shape is None:
            side = math.isqrt(values)
            if side * side != values:
                raise ValueError(
                    f"{KEY}.image_shape: the last layer of {file} gives {values} values, no square grey image; set it "
                    "to [channels, height, width]"
                )
            return 1, side, side
        if math.prod(self.image_shape) != values:
            raise ValueError(
                f"{KEY}.image_shape: {list(self.image_shape)} has {math.prod(self.image_shape)} values, and the last "
                f"layer of {file} gives {values}; correct it, or leave it out for a grey square"
            )
        return self.image_shape


def _in_a_row(state: Mapping[str, Tensor], file: Path) -> tuple[str, ...]:
    """The names of the linear layers of a state dict that holds nothing else, as the file orders them."""
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    if file.suffix == ".safetensors":  # which sorts by text: 10 before 2
        names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    for name in state:
        if not name.endswith((".weight", ".bias")) or state[name].dim() != (2 if name.endswith(".weight") else 1):
            raise ValueError(
                f"{KEY}.layers: {name} {list(state[name].shape)} of {file} is of no linear layer; name the linear "
                f"layers from the latent to the pixels, some of {', '.join(names)}; other networks can be used as "
                "TorchScript (name: torchscript)"
            )
    return tuple(names)


def _linear(name: str, state: Mapping[str, Tensor], file: Path) -> nn.Linear:
    """One linear layer of a state dict."""
    weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
    if weight is None or weight.dim() != 2:
        found = [key.removesuffix(".weight") for key, value in state.items() if key.endswith(".weight")]
        raise ValueError(f"{KEY}.layers: {file} has no linear layer {name!r}; it has {', '.join(found) or 'none'}")
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    load_into(linear, tensors, file)
    return linear


@dataclass(frozen=True)
class MlpVae(GeneratorConfig):
    """The decoder of a small VAE: linear from H to 256, ReLU, linear to the pixels, sigmoid.

    path: what `fldist pretrain-generator --arch mlp_vae` wrote, in the working directory, FLDIST_DATA or its folder
    `pretrained`; None: the weights that come with the package, H = 32 and 1x28x28, of 6,000 images of Fashion-MNIST.
    mlp_vae_mnist.safetensors comes with it, too: the same of MNIST, for clients that hold clothes.
    """

    path: str | None = None

    def load(self, device: torch.device) -> ModuleGenerator:
        """Read weights and side-car; ValueError names what does not fit."""
        file, car, state = read_weights(self.path, "mlp_vae", "z", (0.0, 1.0))
        with torch.device("meta"):
            network = decoder(car.latent_dim, car.image_shape)
        load_into(network, state, file)
        return ModuleGenerator(
            network,
            None,
            arch="mlp_vae",
            z_dim=car.latent_dim,
            latent_dim=car.latent_dim,
            image_shape=car.image_shape,
            value_range=car.value_range,
            device=device,
        )


def decoder(latent_dim: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """The network of `MlpVae`: z [n, latent_dim] -> pixels [n, *image_shape] in 0..1."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            hidden=nn.Linear(latent_dim, HIDDEN),
            relu=nn.ReLU(),
            pixels=nn.Linear(HIDDEN, math.prod(image_shape)),
            sigmoid=nn.Sigmoid(),
            shape=nn.Unflatten(1, image_shape),
        )
    )
