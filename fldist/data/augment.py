"""Augmentation of whole batches of images on tensors, and what prepares images: scaling, resizing, noise.

`Augment` draws one set of changes per image from a generator; the functions below it take the drawn values, so
that each is a plain function of its arguments. Definitions follow torchvision's, image by image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, pad

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_CHUNK = 1024  # images resized at a time: the rest of a data set stays bytes


@dataclass(frozen=True)
class Augment:
    """The section `task.augment`: random changes of training images, drawn anew for each image of each batch.

    crop: pad with this many black pixels all around and cut a random window of the old size; flip: probability of
    mirroring left and right; rotate: angle in degrees, uniform in [-rotate, rotate]; jitter: factors of brightness,
    contrast and saturation, uniform in [max(0, 1 - jitter), 1 + jitter], and a shift of hue (in turns), uniform in
    [-min(jitter, 0.5), min(jitter, 0.5)]. 0 leaves a change out, and it draws nothing.

    They are applied in this order. torchvision's ColorJitter shuffles its four for every image; a fixed order
    changes a whole batch at once.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    crop: Annotated[int, Field(ge=0)] = 0
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    jitter: NonNegative = 0.0

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self.crop or self.flip or self.rotate or self.jitter)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x: [B, c, h, w] floats in 0..1 -> the same shape and range; ValueError for what are no such images.

        x is not written to; it is returned itself when nothing is active or there is no image.
        """
        if not self.active or not len(x):
            return x
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"task.augment: needs batches of images [B, channels, height, width] of floats, not {x.dtype} "
                f"{tuple(x.shape)}; remove task.augment"
            )
        size = len(x)

        def uniform(low: float, high: float) -> Tensor:
            drawn = torch.rand(size, generator=generator, device=generator.device)
            return (low + (high - low) * drawn).to(x.device)

        if self.crop:
            smallest = min(x.shape[2:])
            if self.crop >= smallest:
                raise ValueError(
                    f"task.augment.crop: {self.crop} pixels can cut away all of an image of {x.shape[2]} x "
                    f"{x.shape[3]}; at most {smallest - 1}"
                )
            offsets = torch.randint(2 * self.crop + 1, (2, size), generator=generator, device=generator.device)
            dy, dx = offsets.to(x.device)
            x = crop_at(x, dy, dx, self.crop)
        if self.flip:
            x = flip_where(x, uniform(0.0, 1.0) < self.flip)
        if self.rotate:
            x = rotate_by(x, uniform(-self.rotate, self.rotate))
        if self.jitter:
            low, high, turn = max(0.0, 1.0 - self.jitter), 1.0 + self.jitter, min(self.jitter, 0.5)
            x = adjust_brightness(x, uniform(low, high))
            x = adjust_contrast(x, uniform(low, high))
            if _has_colour(x):
                x = adjust_saturation(x, uniform(low, high))
                x = adjust_hue(x, uniform(-turn, turn))
        return x


# ---- geometry
def crop_at(x: Tensor, dy: Tensor, dx: Tensor, padding: int) -> Tensor:
    """Windows of the old size from images padded with zeros: rows dy.., columns dx.. of the padded image.

    x: [B, c, h, w]; dy, dx: integers [B] in 0..2 padding (padding: the image as it was); B >= 1.
    """
    size, channels, height, width = x.shape
    padded = pad(x, (padding, padding, padding, padding))
    _, _, rows, columns = padded.shape
    # a window's rows are runs of the flat batch: copying runs is faster than indexing by image, row and column
    corner = torch.arange(size * channels, device=x.device).view(size, channels) * (rows * columns)
    corner += (dy * columns + dx).unsqueeze(1)
    starts = corner.unsqueeze(2) + torch.arange(height, device=x.device) * columns  # [B, c, h]
    return padded.reshape(-1).unfold(0, width, 1).index_select(0, starts.view(-1)).view(x.shape)


def flip_where(x: Tensor, mask: Tensor) -> Tensor:
    """Mirror left and right the images whose mask is true; x: [B, c, h, w], mask: bool [B]."""
    rows = mask.nonzero().squeeze(1)
    return x.index_copy(0, rows, x.index_select(0, rows).flip(-1))


def rotate_by(x: Tensor, degrees: Tensor) -> Tensor:
    """Rotate images about their centre, counter-clockwise; nearest pixel, zeros from outside.

    x: [B, c, h, w]; degrees: [B].
    """
    _, _, height, width = x.shape
    angle = torch.deg2rad(degrees.double())
    cos, sin = angle.cos(), angle.sin()
    # where each pixel comes from: the inverse rotation of its offset (right, down) from the centre
    source = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1).to(x.dtype)  # [B, 2, 2]
    rows = torch.arange(height, dtype=x.dtype, device=x.device) - (height - 1) / 2
    columns = torch.arange(width, dtype=x.dtype, device=x.device) - (width - 1) / 2
    down, right = torch.meshgrid(rows, columns, indexing="ij")
    offsets = torch.stack([right, down], 2).view(1, -1, 2).expand(len(x), -1, -1)  # [B, h w, 2]
    half = torch.tensor([width / 2, height / 2], dtype=x.dtype, device=x.device)
    grid = offsets.bmm(source / half).view(len(x), height, width, 2)
    return grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


# ---- colour
def adjust_brightness(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply each image by its factor (0: black), cut off at 1; x: [B, c, h, w] in 0..1, factors: [B] >= 0."""
    return (x * factors.view(-1, 1, 1, 1)).clamp(0.0, 1.0)


def adjust_contrast(x: Tensor, factors: Tensor) -> Tensor:
    """Stretch each image about its mean grey value (0: all grey), cut off at 0 and 1; arguments as brightness."""
    grey = _grey(x) if _has_colour(x) else x
    return torch.lerp(grey.mean((1, 2, 3), keepdim=True), x, factors.view(-1, 1, 1, 1)).clamp(0.0, 1.0)


def adjust_saturation(x: Tensor, factors: Tensor) -> Tensor:
    """Stretch each pixel about its own grey value (0: grey), cut off at 0 and 1; one channel has none to change."""
    if not _has_colour(x):
        return x
    return torch.lerp(_grey(x), x, factors.view(-1, 1, 1, 1)).clamp(0.0, 1.0)


def adjust_hue(x: Tensor, shifts: Tensor) -> Tensor:
    """Turn the hue of HSV by a part of the circle; x: [B, 3, h, w] in 0..1, shifts: [B]; one channel has no hue."""
    if not _has_colour(x):
        return x
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    spread = value - least
    # hue in sixths of the circle, from red, by the purest channel; 0 and 1 as floats, since masks are slow here
    not_red, not_green = (value - red).sign_(), (value - green).sign_()
    hue = torch.lerp(green - blue, torch.lerp(blue - red, red - green, not_green), not_red)
    hue /= spread.clamp_(min=torch.finfo(x.dtype).tiny)  # a pixel without colour has the difference 0
    hue += not_red * (2.0 + 2.0 * not_green)
    hue += 6.0 * shifts.view(-1, 1, 1)
    hue -= 6.0 * torch.floor(hue / 6.0)
    # along the circle a channel is at its largest within one sixth of its corner, at its least beyond two
    shares = torch.stack([(hue - 3.0).abs_().sub_(1.0), 2.0 - (hue - 2.0).abs_(), 2.0 - (hue - 4.0).abs_()], 1)
    return torch.lerp(least.unsqueeze(1), value.unsqueeze(1), shares.clamp_(0.0, 1.0))


def _has_colour(x: Tensor) -> bool:
    if x.shape[1] not in (1, 3):
        raise ValueError(
            f"task.augment.jitter: needs images of 1 or 3 channels; the data have {x.shape[1]}; set it to 0"
        )
    return x.shape[1] == 3


def _grey(x: Tensor) -> Tensor:
    """Luma of ITU-R 601 as torchvision rounds it: [B, 3, h, w] -> [B, 1, h, w]."""
    return (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]).unsqueeze(1)


# ---- preparation
def to_unit(x: NDArray[Any] | Tensor) -> Tensor:
    """Images as float32: bytes divided by 255, float32 as it is (without a copy); ValueError for other types."""
    tensor = x if isinstance(x, Tensor) else torch.from_numpy(np.require(x, requirements=["C", "W"]))
    if tensor.dtype == torch.uint8:
        return torch.div(tensor, 255.0)
    if tensor.dtype == torch.float32:
        return tensor
    raise ValueError(f"task.data: images must be uint8 or float32, not {str(tensor.dtype).removeprefix('torch.')}")


def resize(x: Tensor, size: int) -> Tensor:
    """Images of size x size pixels, whatever their sides were: [n, c, h, w] -> float32 [n, c, size, size] in 0..1.

    x: uint8, or float32 in 0..1. Bilinear with antialiasing, as torchvision's Resize on tensors, but bytes are
    scaled first and not rounded to bytes again. x is returned itself when it is such images already.
    """
    if x.shape[2:] == (size, size):
        return to_unit(x)
    resized = torch.empty(*x.shape[:2], size, size, device=x.device)
    for start in range(0, len(x), _CHUNK):
        part = slice(start, start + _CHUNK)
        resized[part] = interpolate(to_unit(x[part]), (size, size), mode="bilinear", antialias=True)
    return resized.clamp_(0.0, 1.0)  # the weights of a pixel add up to 1 only within rounding


def add_noise(x: Tensor, std: float, cell: tuple[int, int, int] | None, generator: torch.Generator) -> Tensor:
    """x [n, ...] with Gaussian noise added, of standard deviation `std`; not clipped to 0..1.

    cell: (row, column, s) restricts the noise of images [n, c, h, w] to one square of the s x s that they are cut
    into, of side h // s: the feature skew of NIID-Bench (Li et al., ICDE 2022). None: everywhere. ValueError for a
    cell that is not in the images.
    """
    noisy = x.clone()
    target = noisy
    if cell is not None:
        if x.ndim != 4:
            raise ValueError(f"noise: samples of shape {tuple(x.shape[1:])} are no images and have no cells")
        row, column, count = cell
        side = x.shape[2] // count
        top, left = row * side, column * side
        if side == 0 or not (0 <= row < count and 0 <= column < count) or left + side > x.shape[3]:
            raise ValueError(
                f"noise: images of {x.shape[2]} x {x.shape[3]} pixels have no cell ({row}, {column}) of {count} x "
                f"{count}; take fewer clients or larger images (task.resize)"
            )
        target = noisy[:, :, top : top + side, left : left + side]
    noise = torch.randn(target.shape, generator=generator, dtype=x.dtype, device=generator.device)
    target += std * noise.to(x.device)
    return noisy
