"""A model's state as two flat blocks: one of floats, one of integers.

A module's tensors are views into the blocks (`bind`), so packing a model copies nothing and a received
body is usable where it lies. Nothing here knows what a block means to an algorithm or how it travels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from fldist import blocks

Travel = Literal["all", "floats", "params"]


@dataclass(frozen=True)
class Slot:
    """Where one named tensor lies in its block."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """The order of a model's tensors: trainable parameters, then float buffers; integer buffers apart.

    Parameters come first in the float block, so that all trainable scalars are one contiguous view.
    """

    params: tuple[Slot, ...]
    buffers: tuple[Slot, ...]
    integers: tuple[Slot, ...]

    @cached_property
    def num_params(self) -> int:
        """Trainable scalars, P."""
        return sum(s.numel for s in self.params)

    @cached_property
    def num_floats(self) -> int:
        """Trainable scalars and float buffer entries, P + B."""
        return self.num_params + sum(s.numel for s in self.buffers)

    @cached_property
    def num_ints(self) -> int:
        """Entries of integer buffers (BatchNorm's counters)."""
        return sum(s.numel for s in self.integers)

    @property
    def nbytes(self) -> int:
        """Bytes of the two blocks: 4 (P + B) + 8 N_c."""
        return 4 * self.num_floats + 8 * self.num_ints

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """Read the layout of a module; its tensors must be float32 or int64."""
        persistent = set(module.state_dict().keys())
        params: list[Slot] = []
        buffers: list[Slot] = []
        integers: list[Slot] = []
        floats_at = 0
        ints_at = 0
        for name, parameter in module.named_parameters():
            _require_dtype(name, parameter, (torch.float32,))
            params.append(Slot(name, tuple(parameter.shape), floats_at, parameter.numel()))
            floats_at += parameter.numel()
        for name, buffer in module.named_buffers():
            if name not in persistent:
                continue
            _require_dtype(name, buffer, (torch.float32, torch.int64))
            if buffer.is_floating_point():
                buffers.append(Slot(name, tuple(buffer.shape), floats_at, buffer.numel()))
                floats_at += buffer.numel()
            else:
                integers.append(Slot(name, tuple(buffer.shape), ints_at, buffer.numel()))
                ints_at += buffer.numel()
        return cls(tuple(params), tuple(buffers), tuple(integers))

    def restricted(self, travel: Travel) -> Layout:
        """The part that `travel` names: everything, the floats, or the trainable parameters."""
        return self if travel == "all" else self._parts[travel]

    @cached_property
    def _parts(self) -> dict[Travel, Layout]:
        return {"params": Layout(self.params, (), ()), "floats": Layout(self.params, self.buffers, ())}

    def fitting(self, num_floats: int, num_ints: int) -> Layout | None:
        """The part of this layout that has these sizes, or None."""
        parts: tuple[Travel, ...] = ("all", "floats", "params")
        for travel in parts:
            part = self.restricted(travel)
            if (part.num_floats, part.num_ints) == (num_floats, num_ints):
                return part
        return None


def _require_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"model tensor {name!r} is {tensor.dtype}; a model's tensors must be {names}")


class Params:
    """The values of a model (or of its trainable part): `floats` [P + B] float32 and `ints` [N_c] int64.

    Arithmetic returns new blocks and leaves its operands alone. Server and client states hold Params as
    values: replace them, do not change them in place.
    """

    __slots__ = ("floats", "ints", "layout")

    def __init__(self, layout: Layout, floats: Tensor, ints: Tensor | None = None) -> None:
        if ints is None:
            ints = torch.empty(0, dtype=torch.int64, device=floats.device)
        if floats.shape != (layout.num_floats,) or ints.shape != (layout.num_ints,):
            raise ValueError(
                f"blocks of {tuple(floats.shape)} floats and {tuple(ints.shape)} integers do not fit a layout "
                f"of {layout.num_floats} floats and {layout.num_ints} integers"
            )
        self.layout = layout
        self.floats = floats
        self.ints = ints

    @classmethod
    def of(cls, module: nn.Module, layout: Layout | None = None) -> Params:
        """Copy a module's values into fresh blocks."""
        layout = layout or Layout.of(module)
        params = cls.zeros(layout)
        tensors: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, view in params.named():
            view.copy_(tensors[name].detach())
        return params

    @classmethod
    def zeros(cls, layout: Layout, device: torch.device | None = None) -> Params:
        """All zeros in the given layout, on the CPU unless a device is named."""
        floats = blocks.zeros(layout.num_floats, device=device)
        return cls(layout, floats, torch.zeros(layout.num_ints, dtype=torch.int64, device=device))

    @property
    def trainable(self) -> Params:
        """The trainable scalars alone, as a view (P floats, no integers)."""
        return Params(self.layout.restricted("params"), self.floats[: self.layout.num_params])

    @property
    def nbytes(self) -> int:
        """Bytes of both blocks."""
        return self.layout.nbytes

    def restricted(self, travel: Travel) -> Params:
        """The part that `travel` names, as views."""
        part = self.layout.restricted(travel)
        return Params(part, self.floats[: part.num_floats], self.ints[: part.num_ints])

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Name and view of every tensor, parameters first."""
        for slot in self.layout.params + self.layout.buffers:
            yield slot.name, self.floats[slot.offset : slot.offset + slot.numel].view(slot.shape)
        for slot in self.layout.integers:
            yield slot.name, self.ints[slot.offset : slot.offset + slot.numel].view(slot.shape)

    def bind(self, module: nn.Module) -> None:
        """Make the module's tensors views into these blocks; what the layout leaves out stays as it is."""
        tensors: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, view in self.named():
            tensors[name].data = view

    def write(self, part: Params) -> None:
        """Overwrite the leading part of these blocks with `part` (a part of the same layout)."""
        self.floats[: part.floats.numel()].copy_(part.floats)
        self.ints[: part.ints.numel()].copy_(part.ints)

    def clone(self) -> Params:
        """A copy in blocks of its own."""
        return Params(self.layout, blocks.copy(self.floats), self.ints.clone())

    @property
    def device(self) -> torch.device:
        """Where both blocks lie."""
        return self.floats.device

    def to(self, device: torch.device | str) -> Params:
        """The values on a device: these blocks themselves where they lie there already, else copies."""
        if self.floats.device == torch.device(device):
            return self
        return Params(self.layout, self.floats.to(device), self.ints.to(device))

    def zeros_like(self) -> Params:
        """Zeros in the same layout, on the same device."""
        return Params.zeros(self.layout, self.device)

    def norm(self) -> float:
        """Euclidean norm over the floats, accumulated in float64."""
        return float(torch.linalg.vector_norm(self.floats, dtype=torch.float64))

    def equals(self, other: Params) -> bool:
        """True when both blocks hold the same values."""
        return torch.equal(self.floats, other.floats) and torch.equal(self.ints, other.ints)

    def _with(self, other: Params, op: Callable[[Tensor, Tensor], Tensor]) -> Params:
        if self.layout != other.layout:
            raise ValueError(
                f"these Params differ in layout ({self.layout.num_floats} and {other.layout.num_floats} floats, "
                f"{self.layout.num_ints} and {other.layout.num_ints} integers); "
                "take `.trainable` of both to calculate with the trainable part"
            )
        if self.device != other.device:
            raise ValueError(f"these Params lie on {self.device} and {other.device}; bring one over with `.to(device)`")
        return Params(self.layout, op(self.floats, other.floats), op(self.ints, other.ints))

    def __add__(self, other: Params) -> Params:
        return self._with(other, torch.add)

    def __sub__(self, other: Params) -> Params:
        return self._with(other, torch.sub)

    def scale(self, factor: float) -> Params:
        """Multiply the floats by a number; integers are counters and stay as they are."""
        return Params(self.layout, self.floats * factor, self.ints.clone())

    def __mul__(self, factor: float) -> Params:
        return self.scale(factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Params:
        return Params(self.layout, self.floats / divisor, self.ints.clone())

    def __neg__(self) -> Params:
        return Params(self.layout, -self.floats, -self.ints)

    def __repr__(self) -> str:
        return f"Params({self.layout.num_floats} floats, {self.layout.num_ints} integers)"
