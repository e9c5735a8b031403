"""Tensors as pictures to look at: one, or many side by side."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

MOST = 64
"""Pictures of one grid; more are left out."""
_GAP = 2


def file_part(what: str, name: str) -> str:
    """The name of something that an algorithm gives, where it can be part of a file's name; ValueError where not."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) is None:
        raise ValueError(f"{what}: {name!r} cannot be part of a file's name; use letters, digits, _ and -")
    return name


def grid(name: str, pixels: Tensor) -> Any:
    """Pictures side by side, as an array [H, W, channels] of uint8.

    pixels: [channels, height, width] or [number, channels, height, width], floats in 0..1 (clipped; NaN is black) or
    uint8; ValueError for anything else.
    """
    file_part("images", name)
    if not isinstance(pixels, Tensor):
        raise ValueError(f"images: {name} must be a tensor, got {type(pixels).__name__}")
    many = pixels.detach().cpu()
    many = many.unsqueeze(0) if many.dim() == 3 else many
    if many.dim() != 4 or many.shape[1] not in (1, 3) or 0 in many.shape:
        raise ValueError(
            f"images: {name} must have the shape [channels, height, width] or [number, channels, height, width] with 1 "
            f"or 3 channels; got {list(pixels.shape)}"
        )
    if many.is_floating_point():
        many = (many[:MOST].float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    elif many.dtype != torch.uint8:
        raise ValueError(f"images: {name} must be floats in 0..1 or uint8, got {many.dtype}")
    many = many[:MOST]
    number, channels, height, width = many.shape
    across = math.ceil(math.sqrt(number))
    down = math.ceil(number / across)
    size = (down * (height + _GAP) - _GAP, across * (width + _GAP) - _GAP, channels)
    sheet = torch.full(size, 255, dtype=torch.uint8)
    for index, picture in enumerate(many):
        top, left = index // across * (height + _GAP), index % across * (width + _GAP)
        sheet[top : top + height, left : left + width] = picture.permute(1, 2, 0)
    return sheet.numpy()
