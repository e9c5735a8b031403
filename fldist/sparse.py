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

from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fldist import blocks
from fldist.params import Layout, Params

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


def encode(floats: Tensor, n: int, encoding: Encoding, keep: Tensor) -> Tensor:
    """The payload uint8 [bytes] of floats [n + tail] of which `keep` (bool [n]) marks what travels."""
    entries, tail = floats[:n], floats[n:]
    if encoding == "dense":
        return torch.cat([torch.where(keep, entries, 0.0), tail]).view(torch.uint8)
    index = keep.nonzero().squeeze(1)
    values = torch.cat([entries.index_select(0, index), tail])
    if encoding == "values":
        return values.view(torch.uint8)
    head = pack(keep) if encoding == "bitmask_values" else index.to(torch.int32).view(torch.uint8)
    return torch.cat([head, values.view(torch.uint8)])


def decode(payload: Tensor, n: int, tail: int, encoding: Encoding, keep: Tensor | None = None) -> Tensor:
    """The floats [n + tail] of a payload, 0 where nothing was sent.

    keep: the mask bool [n] that the receiver holds, or None; `values` needs it. ValueError for a payload of the wrong
    length, for positions that are not strictly increasing in 0..n-1, and for entries that a mask does not keep.
    """
    problem = refusal(encoding, n, tail, payload.numel())
    if problem is not None:
        raise ValueError(problem)
    if encoding == "dense":
        floats = _aligned(payload)
        if keep is not None and bool((floats[:n].view(torch.int32) != 0).logical_and_(~keep).any()):
            raise ValueError("a parameter that the mask closes is not 0")
        return floats
    fixed = {"values": 0, "bitmask_values": -(-n // 8)}.get(encoding, (payload.numel() - 4 * tail) // 2)
    values = _aligned(payload[fixed:])
    if encoding == "values":
        if keep is None:
            raise ValueError("values without positions need the mask that they belong to")
        index = keep.nonzero().squeeze(1)
    elif encoding == "bitmask_values":
        index = unpack(payload[:fixed], n).nonzero().squeeze(1)
    else:
        index = _aligned(payload[:fixed], torch.int32).to(torch.int64)
        if index.numel() and (int(index[0]) < 0 or int(index[-1]) >= n or bool((index.diff() <= 0).any())):
            raise ValueError(f"positions must increase strictly and lie in 0 to {n - 1}")
    if values.numel() - tail != index.numel():
        raise ValueError(f"{values.numel() - tail} values came for {index.numel()} kept parameters")
    if encoding != "values" and keep is not None and not bool(keep.index_select(0, index).all()):
        raise ValueError("a parameter that the mask closes was sent")
    floats = blocks.zeros(n + tail, device=payload.device)
    floats.index_copy_(0, index, values[: index.numel()])
    floats[n:] = values[index.numel() :]
    return floats


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
        self.keep = (params.floats[:n].view(torch.int32) != 0) if mask is None else unpack(mask, n).to(params.device)
        self.z = int(self.keep.sum())
        self.encoding: Encoding = smallest(n, self.z, mask is not None) if encoding == "auto" else encoding

    @cached_property
    def payload(self) -> Tensor:
        """What travels of the floats, uint8 [bytes]."""
        return encode(self.params.floats, self.params.layout.num_params, self.encoding, self.keep)

    @cached_property
    def value(self) -> Params:
        """What the receiver gets."""
        params, n = self.params, self.params.layout.num_params
        floats = blocks.copy(params.floats)
        floats[:n].masked_fill_(~self.keep, 0.0)
        return Params(params.layout, floats, params.ints)

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
            keep = None if mask is None else unpack(mask, n)
            floats = decode(self.payload, n, self.layout.num_floats - n, self.encoding, keep)
            self._made = (mask, Params(self.layout, floats, self.ints))
        return self._made[1]


def check_closed(params: Params, mask: Tensor) -> None:
    """ValueError where a parameter that the mask (bits) closes is not 0."""
    n = params.layout.num_params
    if bool((params.floats[:n].view(torch.int32) != 0).logical_and_(~unpack(mask, n).to(params.device)).any()):
        raise ValueError("a parameter that the mask closes is not 0")
