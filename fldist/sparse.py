"""Masked models as they travel: bit masks, the encodings of a vector of which a part is zero, and `Kept`, which a
client method takes or returns where `kinds.Sparse` is annotated. Which entries a mask keeps is an algorithm's business.

A vector is the parameters [P] of a model, concatenated in the order of its layout; z of them are kept. Its bytes:

    dense             4 P                  all entries, zeros included
    values            4 z                  the kept entries; both ends hold the mask
    bitmask_values    ceil(P / 8) + 4 z    the mask, then the kept entries
    index_values      8 z                  positions (int32), then the kept entries

Entries are in increasing order of position. Element i of a mask is bit i mod 8, the least significant first, of byte
floor(i / 8); what is left of the last byte is 0. Float buffers follow the entries, 4 bytes each, whatever the encoding;
integer counters travel beside them. All numbers are little-endian.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fldist import blocks
from fldist.params import Layout, Params, Slot

Encoding = Literal["dense", "values", "bitmask_values", "index_values"]
Choice = Literal["dense", "values", "bitmask_values", "index_values", "auto"]

MAX_INDEX = 2**31


def pack(keep: Tensor) -> Tensor:
    """A mask bool [P] as bits, uint8 [ceil(P / 8)], on the same device."""
    bits = np.packbits(keep.cpu().numpy(), bitorder="little")
    return torch.from_numpy(bits).to(keep.device)


def unpack(bits: Tensor, n: int) -> Tensor:
    """The mask bool [n] of bits uint8 [ceil(n / 8)]; ValueError for another length, or where spare bits are set."""
    if bits.dtype is not torch.uint8 or bits.shape != (-(-n // 8),):
        raise ValueError(
            f"a mask of {n} entries is uint8 [{-(-n // 8)}], not {str(bits.dtype).removeprefix('torch.')} "
            f"{list(bits.shape)}"
        )
    if n % 8 and int(bits[-1]) >> n % 8:
        raise ValueError(f"a mask of {n} entries has bits set behind its last one")
    flat = np.unpackbits(bits.cpu().numpy(), count=n, bitorder="little")
    return torch.from_numpy(flat.view(np.bool_)).to(bits.device)


@dataclass(frozen=True)
class Positions:
    """A mask in two forms: keep, bool [n], and the positions that it keeps, int64 [z], ascending."""

    keep: Tensor
    index: Tensor

    @classmethod
    def of(cls, keep: Tensor) -> Positions:
        """The mask bool [n] and its positions."""
        return cls(keep, keep.nonzero().squeeze(1))

    @property
    def n(self) -> int:
        """How many there are."""
        return self.keep.numel()

    @property
    def z(self) -> int:
        """How many are kept."""
        return self.index.numel()


_KNOWN = 4
_known: dict[int, tuple[weakref.ref[Tensor], int, torch.device, Positions]] = {}


def positions(bits: Tensor, n: int, device: torch.device) -> Positions:
    """The positions of a mask's bits on a device; ValueError as `unpack`.

    Those of the latest masks are kept as long as these are there: a mask lives for many messages, and finding its
    positions costs ten times what taking the values there does.
    """
    key = id(bits)
    found = _known.get(key)
    if found is not None and found[0]() is bits and found[1:3] == (bits._version, device) and found[3].n == n:
        return found[3]
    made = Positions.of(unpack(bits, n).to(device))
    _known.pop(key, None)
    for oldest in list(_known)[: max(0, len(_known) + 1 - _KNOWN)]:
        _known.pop(oldest, None)
    _known[key] = (weakref.ref(bits, lambda gone: _forget(key, gone)), bits._version, device, made)
    return made


def _forget(key: int, gone: weakref.ref[Tensor]) -> None:
    """Let go of the positions of a mask that is no more, unless another one has its place."""
    found = _known.get(key)
    if found is not None and found[0] is gone:
        _known.pop(key, None)


def encoded_bytes(encoding: Encoding, n: int, z: int) -> int:
    """Bytes of n parameters of which z are kept."""
    return {"dense": 4 * n, "values": 4 * z, "bitmask_values": -(-n // 8) + 4 * z, "index_values": 8 * z}[encoding]


def smallest(n: int, z: int, held: bool) -> Encoding:
    """The encoding with the fewest bytes, the plainer one of equals. held: the receiver holds the mask."""
    able: tuple[Encoding, ...] = ("dense", "bitmask_values", "index_values")
    if held:
        able = ("dense", "values")
    return min(able, key=lambda encoding: encoded_bytes(encoding, n, z))


def refusal(encoding: Encoding, n: int, tail: int, size: int) -> str | None:
    """Why a payload of this many bytes cannot be n parameters and a tail of buffers, or None: known before it comes."""
    fixed = 4 * tail + (-(-n // 8) if encoding == "bitmask_values" else 0)
    entry = 8 if encoding == "index_values" else 4
    entries, odd = divmod(size - fixed, entry)
    if odd or not 0 <= entries <= n or (encoding == "dense" and entries != n):
        return f"{encoding} of {n} parameters and {tail} buffer entries cannot have {size} bytes"
    return None


def compact(floats: Tensor, n: int, where: Positions) -> Tensor:
    """The kept entries and the tail, [z + tail], of floats [n + tail]."""
    made = blocks.empty(where.z + floats.numel() - n, device=floats.device)
    torch.index_select(floats[:n], 0, where.index, out=made[: where.z])
    made[where.z :] = floats[n:]
    return made


def spread(values: Tensor, n: int, where: Positions) -> Tensor:
    """floats [n + tail] of the kept entries and the tail [z + tail], 0 elsewhere."""
    floats = blocks.zeros(n + values.numel() - where.z, device=values.device)
    floats.index_copy_(0, where.index, values[: where.z])
    floats[n:] = values[where.z :]
    return floats


def encode(floats: Tensor, n: int, encoding: Encoding, where: Positions) -> Tensor:
    """The payload uint8 [bytes] of floats [n + tail] of which the mask marks what travels."""
    values = compact(floats, n, where)
    if encoding == "dense":
        return spread(values, n, where).view(torch.uint8)
    if encoding == "values":
        return values.view(torch.uint8)
    head = pack(where.keep) if encoding == "bitmask_values" else where.index.to(torch.int32).view(torch.uint8)
    return torch.cat([head, values.view(torch.uint8)])


def decode(payload: Tensor, n: int, tail: int, encoding: Encoding, where: Positions | None = None) -> Tensor:
    """The floats [n + tail] of a payload, 0 where nothing was sent.

    where: the mask that the receiver holds, or None; `values` needs it. ValueError for a payload of the wrong length,
    for positions that are not strictly increasing in 0..n-1, and for entries that a mask does not keep.
    """
    problem = refusal(encoding, n, tail, payload.numel())
    if problem is not None:
        raise ValueError(problem)
    if encoding == "dense":
        floats = _aligned(payload)
        if where is not None:
            check_closed(floats, n, where)
        return floats
    fixed = {"values": 0, "bitmask_values": -(-n // 8)}.get(encoding, (payload.numel() - 4 * tail) // 2)
    values = _aligned(payload[fixed:])
    if encoding == "values":
        if where is None:
            raise ValueError("values without positions need the mask that they belong to")
        sent = where
    elif encoding == "bitmask_values":
        sent = Positions.of(unpack(payload[:fixed], n))
    else:
        index = _aligned(payload[:fixed], torch.int32).to(torch.int64)
        if index.numel() and (int(index[0]) < 0 or int(index[-1]) >= n or bool((index.diff() <= 0).any())):
            raise ValueError(f"positions must increase strictly and lie in 0 to {n - 1}")
        sent = Positions(index, index)  # the mask itself is not needed
    if values.numel() - tail != sent.z:
        raise ValueError(f"{values.numel() - tail} values came for {sent.z} kept parameters")
    if encoding != "values" and where is not None and not bool(where.keep.index_select(0, sent.index).all()):
        raise ValueError("a parameter that the mask closes was sent")
    return spread(values, n, sent)


def check_closed(floats: Tensor, n: int, where: Positions) -> None:
    """ValueError where one of n parameters that the mask closes is not 0."""
    if bool((floats[:n].view(torch.int32) != 0).logical_and_(~where.keep).any()):
        raise ValueError("a parameter that the mask closes is not 0")


def _aligned(raw: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes as numbers, in memory whose address a float may have."""
    return (raw if raw.storage_offset() == 0 and raw.data_ptr() % 64 == 0 else raw.clone()).view(dtype)


class Kept:
    """A model of which only the parameters travel that a mask keeps; the receiver gets Params, the others zero.

    mask: bits uint8 [ceil(P / 8)] (`pack`), which the receiver holds as the argument that the annotation names; None:
    whatever is not zero travels, and its positions with it. encoding: see above; `auto` takes the smallest.
    Buffers travel as they are.
    """

    def __init__(self, params: Params, mask: Tensor | None = None, encoding: Choice = "values") -> None:
        n = params.layout.num_params
        if mask is None and encoding == "values":
            raise ValueError("encoding: values needs a mask that the receiver holds; use auto, or bitmask_values")
        if n >= MAX_INDEX and encoding == "index_values":
            raise ValueError(f"encoding: index_values has positions of 32 bits, too few for {n} parameters")
        self.params = params
        self.mask = mask
        if mask is None:
            self.where = Positions.of(params.floats[:n].view(torch.int32) != 0)
        else:
            self.where = positions(mask, n, params.device)
        self.encoding: Encoding = smallest(n, self.z, mask is not None) if encoding == "auto" else encoding

    @property
    def z(self) -> int:
        """How many parameters travel."""
        return self.where.z

    @cached_property
    def payload(self) -> Tensor:
        """What travels of the floats, uint8 [bytes]."""
        return encode(self.params.floats, self.params.layout.num_params, self.encoding, self.where)

    @cached_property
    def value(self) -> Params:
        """What the receiver gets."""
        params, n = self.params, self.params.layout.num_params
        return Params(params.layout, spread(compact(params.floats, n, self.where), n, self.where), params.ints)

    @cached_property
    def compact(self) -> Params:
        """The kept entries as a model of their own, with its buffers."""
        params, n = self.params, self.params.layout.num_params
        layout = compact_layout(params.layout, self.z)
        return Params(layout, compact(params.floats, n, self.where), params.ints)

    def whole(self, part: Params) -> Params:
        """A model of kept entries, as `compact`, in the place of this one's; 0 elsewhere."""
        return Params(self.params.layout, spread(part.floats, self.params.layout.num_params, self.where), part.ints)

    @property
    def nbytes(self) -> int:
        """Bytes that travel, integer counters included."""
        layout = self.params.layout
        tail = layout.num_floats - layout.num_params
        return encoded_bytes(self.encoding, layout.num_params, self.z) + 4 * tail + 8 * layout.num_ints


class Packed:
    """A model as it came: a payload, which becomes Params once the mask is at hand, the same for all who share it."""

    def __init__(self, layout: Layout, encoding: Encoding, payload: Tensor, ints: Tensor | None) -> None:
        self.layout = layout
        self.encoding: Encoding = encoding
        self.payload = payload
        self.ints = ints
        self._made: tuple[Tensor | None, Params] | None = None

    def params(self, mask: Tensor | None) -> Params:
        """The model; mask: the bits that the receiver holds, or None. ValueError: see `decode`, `unpack`."""
        if self._made is None or self._made[0] is not mask:
            n = self.layout.num_params
            where = None if mask is None else positions(mask, n, self.payload.device)
            floats = decode(self.payload, n, self.layout.num_floats - n, self.encoding, where)
            self._made = (mask, Params(self.layout, floats, self.ints))
        return self._made[1]

    def compact(self, z: int) -> Params | None:
        """The z kept entries as a model of their own (see `Kept.compact`), where nothing else travelled; else None.

        ValueError for another number of values.
        """
        if self.encoding != "values":
            return None
        tail = self.layout.num_floats - self.layout.num_params
        came = self.payload.numel() // 4 - tail
        if came != z:
            raise ValueError(f"{came} values came for {z} kept parameters")
        return Params(compact_layout(self.layout, z), _aligned(self.payload), self.ints)


def compact_layout(layout: Layout, z: int) -> Layout:
    """The layout of z kept entries in a row, and of the buffers of the model that they are of."""
    shift = z - layout.num_params
    buffers = tuple(replace(slot, offset=slot.offset + shift) for slot in layout.buffers)
    return Layout((Slot("kept", (z,), 0, z),), buffers, layout.integers)
