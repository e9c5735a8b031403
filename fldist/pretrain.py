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
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, relu
from torch.nn.utils.parametrizations import spectral_norm

from fldist.data.augment import to_unit
from fldist.data.datasets import Dataset
from fldist.models.generators import named
from fldist.models.generators.mini_style import SIDE, MiniStyleNetwork
from fldist.models.generators.mlp import HIDDEN, decoder
from fldist.models.generators.pretrained import to_samples
from fldist.runtime.pictures import MOST, grid
from fldist.seeding import forked, generator

ImageShape = tuple[int, int, int]
LEAST_SIDE = 16
"""Smaller images are enlarged to this side for `mini_style`, whose network makes 32."""
REPORT_S = 5.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Recipe:
    """What an architecture is trained with where the user says nothing else."""

    images: int
    epochs: int
    batch: int
    latent_dim: int
    latent: Literal["z", "w"]
    value_range: tuple[int, int]


RECIPES = {
    "mini_style": Recipe(60_000, 2, 64, 64, "w", (-1, 1)),
    "mlp_vae": Recipe(6_000, 6, 100, 32, "z", (0, 1)),
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
    say: Callable[[str], None],
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
        network = (_style if arch == "mini_style" else _vae)(x, latent_dim, epochs, recipe.batch, seed, say)
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
    if not out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {out.parent}; make it, or choose another place")


def _prepared(data: Dataset, count: int, arch: str) -> Tensor:
    """The first training images as float32 [n, channels, side, side] in 0..1, square, of the side to be made."""
    if data.kind != "values" or len(data.shape) != 3:
        raise ValueError(f"DATA: its samples are of shape {list(data.shape)}, no images; choose data of images")
    x = to_unit(np.asarray(data.train_x[:count]))
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

    def __init__(self, steps: int, say: Callable[[str], None]) -> None:
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


# ---- a variational autoencoder
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


def _vae(x: Tensor, latent_dim: int, epochs: int, batch: int, seed: int, say: Callable[[str], None]) -> nn.Module:
    """Binary cross-entropy plus KL divergence from N(0, I), Adam with 1e-3. Source: Kingma and Welling, ICLR 2014."""
    shape = (x.shape[1], x.shape[2], x.shape[3])
    encoder, made = _Encoder(x[0].numel(), latent_dim), decoder(latent_dim, shape)
    optimizer = torch.optim.Adam([*encoder.parameters(), *made.parameters()], lr=1e-3)
    progress = _Progress(epochs * (len(x) // batch), say)
    for done, pixels in enumerate(_batches(x, epochs, batch, seed), start=1):
        mean, log_var = encoder(pixels)
        z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        told = binary_cross_entropy(made(z), pixels, reduction="sum") / batch
        kl = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum() / batch
        optimizer.zero_grad()
        (told + kl).backward()
        optimizer.step()
        progress.step(done, {"cross-entropy": told, "KL": kl})
    return made


# ---- two networks against each other
class _Discriminator(nn.Module):
    """Three convolutions of stride 2 and a linear layer, each with spectral normalisation: x in -1..1 -> [n, 1]."""

    def __init__(self, shape: ImageShape) -> None:
        super().__init__()
        channels, height, width = shape
        widths = (channels, 32, 64, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        for _ in range(3):
            height, width = height // 2, width // 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(128 * height * width, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [n, *shape]."""
        return self.layers(x)  # type: ignore[no-any-return]


def _style(x: Tensor, latent_dim: int, epochs: int, batch: int, seed: int, say: Callable[[str], None]) -> nn.Module:
    """Hinge losses, Adam with 2e-4 and betas 0.5, 0.9, a step of either network a batch.

    The weights are their moving averages, whose images are less of an accident than the last step's. Sources: Miyato
    et al., ICLR 2018 (hinge loss, spectral normalisation); Karras et al., ICLR 2018 (averages).
    """
    shape = (x.shape[1], x.shape[2], x.shape[3])
    network, judge = MiniStyleNetwork(latent_dim, latent_dim, shape), _Discriminator(shape)
    of_steps = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)  # type: ignore[no-untyped-call]
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=of_steps)
    ours = torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.9))
    theirs = torch.optim.Adam(judge.parameters(), lr=2e-4, betas=(0.5, 0.9))
    progress = _Progress(epochs * (len(x) // batch), say)
    for done, pixels in enumerate(_batches(x, epochs, batch, seed), start=1):
        made = network(torch.randn(batch, latent_dim))
        real = relu(1.0 - judge(pixels * 2.0 - 1.0)).mean() + relu(1.0 + judge(made.detach())).mean()
        theirs.zero_grad()
        real.backward()  # type: ignore[no-untyped-call]
        theirs.step()
        judge.requires_grad_(False)  # its gradients would be thrown away
        fooled = -judge(made).mean()
        ours.zero_grad()
        fooled.backward()
        ours.step()
        judge.requires_grad_(True)
        average.update_parameters(network)
        progress.step(done, {"discriminator": real, "generator": fooled})
    return average.module


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
