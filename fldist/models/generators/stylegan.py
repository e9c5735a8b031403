"""StyleGAN3 and StyleGAN-XL networks as pretrained generators, by NVIDIA's own code in a folder that the user gives.

Such a network comes as a pickle, and unpickling runs whatever the file says. This is the one place of the package that
unpickles, and it does so only where the user has said so; `convert` makes a file of it that needs no trust.
"""

from __future__ import annotations

import inspect
import math
import pickle
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fldist.models.generators.pretrained import (
    BLOCK,
    KEY,
    GeneratorConfig,
    PretrainedGenerator,
    find_file,
    fingerprint_of,
)
from fldist.seeding import preserved

PACKAGES = ("dnnlib", "torch_utils", "training", "legacy", "pg_modules", "feature_networks")
"""The names by which the code of these networks imports its own parts."""

Kind = Literal["stylegan3", "stylegan-xl"]


@dataclass(frozen=True)
class StyleGan(GeneratorConfig):
    """A network pickle of StyleGAN3 (Karras et al., NeurIPS 2021) or StyleGAN-XL (Sauer et al., SIGGRAPH 2022).

    network_pkl: the file; in the working directory, FLDIST_DATA or its folder `pretrained`. code_dir: a checkout of the
    network's code: the folder that holds dnnlib and torch_utils. kind: stylegan3 or stylegan-xl, which differ in the
    range of the pixels. key: which of the file's networks. space: w, the one there is. truncation_psi: pulls latents
    that are drawn towards their mean; 1 pulls none. trust_pickle: true says that the file may run any code here.

    The latent is w = mapping(z, class)[:, 0, :] of w_dim values; the class is uniform where the network has classes,
    and nobody else sees it. An image is synthesis(w repeated num_ws times), with constant noise, in float32 on a CPU:
    127.5 raw + 128 of 255 for stylegan3, 127.5 (raw + 1) for stylegan-xl, clipped.
    """

    network_pkl: str
    code_dir: str
    kind: Kind = "stylegan3"
    key: str = "G_ema"
    space: str = "w"
    truncation_psi: Annotated[float, Field(ge=0, le=1)] = 1.0
    trust_pickle: bool = False

    def __post_init__(self) -> None:
        if self.space != "w":
            raise ValueError(f"space: the latents are those of the space w; got {self.space!r}; set {KEY}.space=w")

    def load(self, device: torch.device) -> StyleGanGenerator:
        """Unpickle the network and make one image with it; ValueError, without trust_pickle before it is opened."""
        return load_network(self, device, f"{KEY}.")


def load_network(config: StyleGan, device: torch.device, prefix: str) -> StyleGanGenerator:
    """The generator of a configuration; errors name `prefix` and the field."""
    file = find_file(config.network_pkl, f"{prefix}network_pkl")
    if not config.trust_pickle:
        raise ValueError(
            f"{prefix}trust_pickle: {file} is a pickle, and to read a pickle is to run whatever program it holds, so "
            "it is not opened. If you trust those who made it, convert it once to a file that needs no trust, and name "
            f"that one under generator torchscript: {conversion(config, file)} (or set {prefix}trust_pickle=true)"
        )
    code_dir = Path(config.code_dir).expanduser().absolute()
    for package in ("dnnlib", "torch_utils"):
        if not (code_dir / package).is_dir():
            raise ValueError(
                f"{prefix}code_dir: {code_dir} has no folder {package!r}; give a checkout of the network's code (for "
                "instance of NVlabs/stylegan3 or autonomousvision/stylegan-xl), which holds dnnlib and torch_utils"
            )
    with preserved(), importable(code_dir):
        network = _unpickle(file, config.key, code_dir, prefix).to(device).eval().requires_grad_(False)
        return StyleGanGenerator(config, network, device, prefix)


def conversion(config: StyleGan, file: Path) -> str:
    """The command that converts a configuration's network."""
    words = ["fldist", "data", "convert-generator", str(file), "--code-dir", config.code_dir]
    for option, value, default in (
        ("--kind", config.kind, "stylegan3"),
        ("--key", config.key, "G_ema"),
        ("--truncation-psi", config.truncation_psi, 1.0),
    ):
        if value != default:
            words += [option, str(value)]
    return shlex.join([*words, "--trust-pickle", "--out", f"{file.stem}.pt"])


class StyleGanGenerator(PretrainedGenerator):
    """The generator of a `StyleGan`: latents are w [n, w_dim], images have the network's channels and size.

    network: a module with z_dim, w_dim, c_dim, num_ws, mapping(z, one-hot classes or None) and synthesis(ws).
    """

    def __init__(self, config: StyleGan, network: Any, device: torch.device, prefix: str) -> None:
        needed = ("z_dim", "w_dim", "c_dim", "num_ws", "mapping", "synthesis")
        lacking = [name for name in needed if not hasattr(network, name)]
        if lacking:
            raise ValueError(
                f"{prefix}key: {config.key!r} of {config.network_pkl} is no generator of StyleGAN: it has no "
                f"{', '.join(lacking)}; choose another key"
            )
        self.config = config
        self.network = network
        self._device = device
        self.z_dim, self.w_dim = int(network.z_dim), int(network.w_dim)
        self.num_classes = int(network.c_dim)
        self.latent_dim = self.w_dim
        self.latent_shape = (self.w_dim,)
        self.differentiable = True
        self._synthesis = Synthesis(network, config.kind)
        self._mapping = Mapping(network, config.truncation_psi)
        try:
            with torch.no_grad():
                image = self._synthesis(torch.zeros(1, self.w_dim, device=device))
            channels, height, width = image.shape[1:]
        except Exception as error:
            raise ValueError(
                f"{prefix}code_dir: the network of {config.network_pkl} cannot make an image with the code in "
                f"{config.code_dir} ({_said(error)}); check out the version that the network was made with"
            ) from error
        self.image_shape = (int(channels), int(height), int(width))
        settings = {"arch": config.kind, "truncation_psi": config.truncation_psi, "num_ws": int(network.num_ws)}
        self.fingerprint = fingerprint_of(settings, network.state_dict())

    @property
    def noise_dim(self) -> int:
        """Values of the noise of one latent: z, and one more where the network has classes."""
        return self.z_dim + (1 if self.num_classes else 0)

    def sample_latents(self, n: int, rng: torch.Generator) -> Tensor:
        """w of noise N(0, I) and, where the network has classes, of uniform ones: float32 [n, w_dim]."""
        return self.map(torch.randn(n, self.noise_dim, generator=rng))

    @torch.no_grad()
    def map(self, noise: Tensor) -> Tensor:
        """Noise [n, noise_dim] -> w [n, w_dim], on the generator's device."""
        if not len(noise):
            return torch.empty(0, self.w_dim, device=self._device)
        return torch.cat([self._mapping(part) for part in torch.split(noise.to(self._device), BLOCK)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, w_dim] -> images float32 [n, *image_shape] in 0..1, on the generator's device.

        They are made one by one: the code's layers scale by means over the batch, so that in the last bits an image
        would depend on its neighbours, and without a compiler for its CUDA operators a batch takes much memory.
        """
        if latents.dim() != 2 or latents.shape[1] != self.latent_dim:
            raise ValueError(f"{KEY}: it decodes latents [n, {self.latent_dim}]; it was given {list(latents.shape)}")
        if not len(latents):
            return torch.empty(0, *self.image_shape, device=self._device)
        inputs = latents.to(self._device, torch.float32)
        with preserved():
            return torch.cat([self._synthesis(part) for part in torch.split(inputs, 1)])


class Mapping(nn.Module):
    """Noise [n, noise_dim] -> w [n, w_dim]: z, and where there are classes the class of `classes_of` the last value."""

    def __init__(self, network: Any, truncation_psi: float) -> None:
        super().__init__()
        self.mapping = network.mapping
        self.z_dim, self.num_classes = int(network.z_dim), int(network.c_dim)
        # only where it is asked for: at 1 the code must not be led through its truncation
        self.options = {} if truncation_psi == 1.0 else {"truncation_psi": truncation_psi}

    def forward(self, noise: Tensor) -> Tensor:
        """float32, all of them."""
        onehot = None
        if self.num_classes:
            classes = classes_of(noise[:, self.z_dim], self.num_classes)
            onehot = nn.functional.one_hot(classes, self.num_classes).to(torch.float32)
        w: Tensor = self.mapping(noise[:, : self.z_dim], onehot, **self.options)[:, 0, :]
        return w.to(torch.float32)


def classes_of(normal: Tensor, num_classes: int) -> Tensor:
    """Standard normal values [n] -> classes int64 [n], uniform over 0 ... num_classes - 1: by the normal distribution.

    So a network with classes takes noise alone, and its converted file, which nobody passes classes to, draws the same.
    """
    uniform = 0.5 * (1.0 + torch.erf(normal / math.sqrt(2.0)))
    return (uniform * num_classes).floor().clamp(0, num_classes - 1).to(torch.int64)


class Synthesis(nn.Module):
    """w [n, w_dim] -> images float32 [n, channels, height, width] in 0..1."""

    def __init__(self, network: Any, kind: Kind) -> None:
        super().__init__()
        self.synthesis = network.synthesis
        self.num_ws = int(network.num_ws)
        self.offset = 128.0 if kind == "stylegan3" else 127.5
        parameters = inspect.signature(network.synthesis.forward).parameters.values()
        takes = any(of.name == "noise_mode" or of.kind is inspect.Parameter.VAR_KEYWORD for of in parameters)
        self.options = {"noise_mode": "const"} if takes else {}  # else an image would not depend on its latent alone

    def forward(self, w: Tensor) -> Tensor:
        """float32 in and out, whatever the network computes with."""
        raw: Tensor = self.synthesis(w.unsqueeze(1).repeat(1, self.num_ws, 1), **self.options)
        return (127.5 * raw.to(torch.float32) + self.offset).clamp(0.0, 255.0) / 255.0


@contextmanager
def importable(code_dir: Path) -> Iterator[None]:
    """Put a folder of code first on the import path, and leave path and imported modules as they were.

    Modules of `PACKAGES` that were imported before, perhaps from another version of the code, stand aside meanwhile.
    """
    path = list(sys.path)
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in PACKAGES}
    sys.path.insert(0, str(code_dir))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in list(sys.modules):
            if name.partition(".")[0] in PACKAGES:
                del sys.modules[name]
        sys.modules.update(aside)


def _unpickle(file: Path, key: str, code_dir: Path, prefix: str) -> nn.Module:
    """The network under `key` of a pickle that the user trusts."""
    try:
        with file.open("rb") as stream:
            held = pickle.load(stream)  # noqa: S301  (the user has said that it may run code)
    except Exception as error:
        raise ValueError(
            f"{prefix}network_pkl: {file} cannot be unpickled with the code in {code_dir} ({_said(error)}); check that "
            "it is the code that the network was made with, and that what it imports is installed"
        ) from error
    if not isinstance(held, dict) or key not in held:
        known = ", ".join(map(str, held)) if isinstance(held, dict) else f"no keys (it is a {type(held).__name__})"
        raise ValueError(f"{prefix}key: {file} has no network {key!r}; it has {known}; set {prefix}key to one of them")
    network = held[key]
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{prefix}key: {key!r} of {file} is no network but a {type(network).__name__}; choose another key"
        )
    return network


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text}"
