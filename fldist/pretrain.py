"""`fldist pretrain-generator`: train a small generator of images from a data set, in minutes on a CPU.

It writes weights (safetensors), the JSON side-car that `models/generators/pretrained.py` reads, and a picture of some
images the generator makes. The networks are in `models/generators`; labels are not looked at. One thread computes, so
that a command gives the same bytes again on one machine with one version of torch, however many cores it may use.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, relu

from fldist.data.augment import to_unit
from fldist.data.datasets import Dataset
from fldist.models.generators import named
from fldist.models.generators.mini_style import SIDE, MiniStyleNetwork
from fldist.models.generators.mlp import HIDDEN, decoder
from fldist.models.generators.pretrained import to_samples
from fldist.runtime.pictures import MOST, grid
from fldist.seeding import forked, generator

ImageShape = tuple[int, int, int]
Say = Callable[[str], None]
LEAST_SIDE = 16
"""Smaller images are enlarged to this side for `mini_style`, whose network makes 32."""
REPORT_S = 5.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Recipe:
    """What an architecture is trained with where the user says nothing else."""

    network: Callable[[int, ImageShape], nn.Module]  # of H and the images' shape: z [n, H] -> pixels in value_range
    latent: Literal["z", "w"]
    value_range: tuple[int, int]
    latent_dim: int
    images: int
    epochs: int
    batch: int = 100


RECIPES = {
    "mini_style": Recipe(lambda h, shape: MiniStyleNetwork(h, h, shape), "w", (-1, 1), 64, 24_000, 4),
    "mlp_vae": Recipe(decoder, "z", (0, 1), 32, 6_000, 6),
}


def pretrain(
    load: Callable[[], Dataset],
    arch: str,
    out: Path,
    *,
    made_by: Mapping[str, str],
    images: int | None = None,
    epochs: int | None = None,
    latent_dim: int | None = None,
    seed: int = 0,
    say: Say,
) -> None:
    """Train a generator from the first `images` training images of a data set and write its three files.

    load: gives the data set; arch: a name of `RECIPES`; out: of the weights, ends in .safetensors; made_by: what the
    side-car says of the command and the data; images, epochs, latent_dim: None takes the recipe's; say: told how far
    it is. ValueError for data that are no images and for an `out` that cannot be.
    """
    if arch not in RECIPES:
        raise ValueError(f"--arch: there is no {arch!r}; choose {' or '.join(RECIPES)}")
    recipe = RECIPES[arch]
    _check_out(out)
    data = load()
    for note in data.notes:
        say(note)
    epochs, latent_dim = epochs or recipe.epochs, latent_dim or recipe.latent_dim
    x = _prepared(data, images or recipe.images, arch)
    if len(x) < recipe.batch:
        raise ValueError(
            f"--images: {arch} is trained in batches of {recipe.batch} images, and there are {len(x)}; give more"
        )
    shape: ImageShape = (x.shape[1], x.shape[2], x.shape[3])
    say(f"{arch}: {len(x):,} images of {' x '.join(map(str, shape))}, {epochs} epochs, latent of {latent_dim} values")
    with _one_thread(), forked(seed, f"pretrain-{arch}"):
        network = recipe.network(latent_dim, shape)
        _train(network, x, recipe, latent_dim, epochs, seed, say)
    said: dict[str, Any] = {
        "arch": arch,
        "latent": recipe.latent,
        "z_dim": latent_dim,
        "latent_dim": latent_dim,
        "image_shape": list(shape),
        "value_range": list(recipe.value_range),
        "num_classes": 0,
        **made_by,
        "images": len(x),
        "epochs": epochs,
        "seed": seed,
    }
    _write(network, said, out)
    _draw(arch, out, seed)
    say(f"{out}, {out.stat().st_size / 1e6:.2f} MB; {out.with_suffix('.json').name} and {out.with_suffix('.png').name}")


def _check_out(out: Path) -> None:
    """ValueError for an --out that cannot be written, before anything is trained."""
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: {out} must end in .safetensors; a .json and a .png are written beside it")
    if out.exists():
        raise ValueError(f"--out: {out} exists, and runs may have begun with it; remove it, or choose another name")
    if not out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {out.parent}; make it, or choose another place")


def _prepared(data: Dataset, count: int, arch: str) -> Tensor:
    """The first training images as float32 [n, channels, side, side] in 0..1, square, of the side to be made."""
    if data.kind != "values" or len(data.shape) != 3:
        raise ValueError(f"DATA: its samples are of shape {list(data.shape)}, no images; choose data of images")
    x = to_unit(np.asarray(data.train_x[:count]))
    if float(x.min()) < 0.0 or float(x.max()) > 1.0:
        raise ValueError(
            f"DATA: its pixels are {float(x.min()):g} to {float(x.max()):g}; store bytes, or float32 from 0 to 1"
        )
    side = min(x.shape[2:])
    if arch == "mini_style":
        side = min(max(side, LEAST_SIDE), SIDE)
    return to_samples(x, (x.shape[1], side, side))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: how a sum is split over threads changes its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Progress:
    """Says every few seconds how far a training is."""

    def __init__(self, steps: int, say: Say) -> None:
        self._steps = steps
        self._say = say
        self._began = self._said = time.monotonic()

    def step(self, done: int, losses: Mapping[str, Tensor]) -> None:
        """After a step; losses: of this batch, by name."""
        now = time.monotonic()
        if now - self._said < REPORT_S and done < self._steps:
            return
        self._said = now
        seconds = now - self._began
        left = seconds / done * (self._steps - done)
        told = ", ".join(f"{name} {loss.item():.3g}" for name, loss in losses.items())
        self._say(f"step {done:,} of {self._steps:,}  {told}  {seconds:.0f} s, {left:.0f} s left")


def _batches(x: Tensor, epochs: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches in an order of their own in each epoch; what is left of an epoch is dropped."""
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator(seed, "pretrain-order", epoch))
        for first in range(0, len(x) - batch + 1, batch):
            yield x[order[first : first + batch]]


class _Encoder(nn.Module):
    """The decoder of `mlp_vae` mirrored: x [n, ...] -> mean and logarithm of the variance, [n, H] each."""

    def __init__(self, pixels: int, latent_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(pixels, HIDDEN)
        self.mean = nn.Linear(HIDDEN, latent_dim)
        self.log_var = nn.Linear(HIDDEN, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: in 0..1."""
        hidden = relu(self.hidden(x.flatten(1)))
        return self.mean(hidden), self.log_var(hidden)


def _train(network: nn.Module, x: Tensor, recipe: Recipe, latent_dim: int, epochs: int, seed: int, say: Say) -> None:
    """Train a network from z to pixels as the decoder of a variational autoencoder.

    Binary cross-entropy plus KL divergence from N(0, I), Adam with 1e-3. Source: Kingma and Welling, ICLR 2014.
    """
    encoder = _Encoder(x[0].numel(), latent_dim)
    low, high = recipe.value_range
    optimizer = torch.optim.Adam([*encoder.parameters(), *network.parameters()], lr=1e-3)
    progress = _Progress(epochs * (len(x) // recipe.batch), say)
    for done, pixels in enumerate(_batches(x, epochs, recipe.batch, seed), start=1):
        mean, log_var = encoder(pixels)
        z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        made = (network(z) - low) / (high - low)
        told = binary_cross_entropy(made, pixels, reduction="sum") / len(pixels)
        kl = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum() / len(pixels)
        optimizer.zero_grad()
        (told + kl).backward()
        optimizer.step()
        progress.step(done, {"cross-entropy": told, "KL": kl})


# ---- files
def _write(network: nn.Module, said: dict[str, Any], out: Path) -> None:
    """The weights and their side-car."""
    from safetensors.torch import save

    out.write_bytes(save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}))
    entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in said.items())
    out.with_suffix(".json").write_text(f"{{\n{entries}\n}}\n", encoding="utf-8")


def _draw(arch: str, out: Path, seed: int) -> None:
    """A picture of images that the generator makes, read back as a run reads it."""
    from PIL import Image

    made = named({"name": arch, "path": str(out.absolute())}).load(torch.device("cpu"))
    images = made.decode(made.sample_latents(MOST, generator(seed, "pretrain-picture")))
    picture = grid("samples", images)
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(out.with_suffix(".png"))
