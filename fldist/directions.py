"""Random directions that every rank and device makes again from a key of 16 bytes, instead of sending them.

A zeroth-order estimate asks for a function's values at x_i + eps u_ij, for N samples and q unit directions u_ij in R^d
with E[u u^T] = I/d. Sending the directions costs q N d values; here u_ij is a function of (key, stream, j, i) that is
computed in integer arithmetic, whatever else was drawn before, in whatever order and wherever.

The numbers are those of Philox-4x32-10 (J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel Random
Numbers: As Easy as 1, 2, 3", SC 2011). All words have 32 bits. One call makes four words w_0..w_3 of a counter and key:

    counter = (block b, sample i, direction j, stream)      b, i, j from 0
    key     = (key mod 2^32, key div 2^32)

and the components c = 0..d-1 of u_ij are made of the words like this:

    rademacher   -1/sqrt(d) where bit c mod 32 (the least significant is bit 0) of word w_((c div 32) mod 4) of the call
                 with b = c div 128 is 1, and +1/sqrt(d) where it is 0; 1/sqrt(d) is rounded to float32.
    sphere       g_c / sqrt(sum_c g_c^2), where g is Gaussian by Box and Muller: with B = ceil(d/4) calls b = 0..B-1,
                     R(w) = sqrt(-2 ln((w div 2^9) 2^-23 + 2^-24))      the logarithm is of 2^-24 to 1 - 2^-24
                     T(w) = (w - 2^31) 2 pi / 2^32                       -pi to pi
                     g_b      = R(w_0) cos T(w_1)      g_(B+b)  = R(w_0) sin T(w_1)
                     g_(2B+b) = R(w_2) cos T(w_3)      g_(3B+b) = R(w_2) sin T(w_3)
                 in float32, the components from d on left out; norm and quotient are of float64, then rounded.

`rademacher` is the same to the bit everywhere. `sphere` uses log, cos and sin, whose last bit depends on the device and
its library: between two machines its components may differ by some 1e-7 of their size; on one machine they are the
same to the bit, whatever the number of threads. The two laws share their words: do not mix them under one key.

This file knows neither messages nor models. Keys come from `fldist/seeding.py`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from fldist import blocks

Law = Literal["rademacher", "sphere"]
Words = tuple[Tensor, Tensor, Tensor, Tensor]

CPU = torch.device("cpu")
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
CALLS = {"cpu": 1 << 16, "cuda": 1 << 20}
"""Calls made at once: on a CPU what its caches hold, on a GPU what keeps it busy. The bits do not depend on it."""


def philox(key: int, counter: Words) -> Words:
    """Philox-4x32-10: four random words for each counter of four words.

    counter: int64 tensors of 0 to 2^32-1 whose shapes broadcast; key: 64 bits, the lower word first. Returns four int64
    tensors of the common shape, of 0 to 2^32-1. A product of two words wraps in int64, which keeps all of its 64 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, key >> 32
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (p1 >> 32) ^ c1  # the shift fills with the sign, c1 may have more than 32 bits: the last step cuts both
        c2 = (p0 >> 32) ^ c3
        c0.bitwise_xor_(k0).bitwise_and_(WORD)
        c2.bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3 = p1, p0
        k0, k1 = (k0 + INCREMENTS[0]) & WORD, (k1 + INCREMENTS[1]) & WORD
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)


@dataclass(frozen=True)
class Directions:
    """q unit directions u_ij in R^d for each of n samples: those of (key, stream), block by block.

    key: 64 bits; stream: 32 bits that name one use of the key, e.g. the round and the step in it; q: 0 to 2^32-1;
    n, d: from 1, to 2^32 samples and 2^32 calls a sample (2^39 components of `rademacher`, 2^34 of `sphere`);
    device: where the blocks are made and lie.
    """

    key: int
    stream: int
    q: int
    n: int
    d: int
    law: Law = "rademacher"
    device: torch.device = CPU

    def __post_init__(self) -> None:
        for name, last in (("key", 2**64 - 1), ("stream", WORD), ("q", WORD)):
            if not 0 <= getattr(self, name) <= last:
                raise ValueError(f"{name}: {getattr(self, name)} is out of range; use 0 to {last}")
        if self.law not in get_args(Law):
            raise ValueError(f"law: {self.law!r} is none; use {' or '.join(get_args(Law))}")
        for name, last in (("n", 2**32), ("d", 2**32 * self._per_call)):
            if not 1 <= getattr(self, name) <= last:
                raise ValueError(f"{name}: {getattr(self, name)} is out of range; use 1 to {last}")

    def block(self, j: int) -> Tensor:
        """u_j [n, d], float32: direction j (0 to q-1) of every sample. Not to be changed: others may hold it."""
        return self._finished(self._raw(j))

    @property
    def _per_call(self) -> int:
        """Components that one call of Philox makes."""
        return 128 if self.law == "rademacher" else 4

    def _raw(self, j: int) -> Tensor:
        """Direction j as it is kept: signs in words int32 [n, ceil(d / 32)], or float32 [n, d]."""
        if not 0 <= j < self.q:
            raise ValueError(f"j: {j} is no direction; there are {self.q}, from 0")
        return self._signs(j) if self.law == "rademacher" else self._normals(j)

    def _finished(self, raw: Tensor) -> Tensor:
        if self.law == "sphere":
            return raw
        # the bit becomes the sign bit of 1/sqrt(d): faster than a table of bytes, and independent of their order
        size = int(torch.tensor(1 / math.sqrt(self.d), dtype=torch.float32).view(torch.int32))
        shifts = torch.arange(31, -1, -1, dtype=torch.int32, device=self.device)
        wide = blocks.empty((self.n, raw.shape[1], 32), torch.int32, self.device)
        torch.bitwise_left_shift(raw.unsqueeze(2), shifts, out=wide)
        wide.bitwise_and_(-(2**31)).bitwise_or_(size)
        values = wide.view(torch.float32).view(self.n, -1)
        return values if values.shape[1] == self.d else blocks.copy(values[:, : self.d])

    def _signs(self, j: int) -> Tensor:
        """Words int32 [n, ceil(d / 32)] of direction j."""
        signs = blocks.empty((self.n, -(-self.d // 128), 4), torch.int32, self.device)
        for rows, words in self._calls(j):
            for k, word in enumerate(words):
                signs[rows, :, k] = word  # conversion keeps the lower 32 bits
        return signs.view(self.n, -1)[:, : -(-self.d // 32)]

    def _normals(self, j: int) -> Tensor:
        """Normalised Gaussians, float32 [n, d], of direction j."""
        made = blocks.empty((self.n, self.d), device=self.device)
        for rows, words in self._calls(j):
            planes = [plane for pair in (words[:2], words[2:]) for plane in _box_muller(*pair)]
            g = torch.cat(planes, 1)[:, : self.d].double()
            made[rows] = g / _squares(g).sqrt_()
        return made

    def _calls(self, j: int) -> Iterator[tuple[slice, Words]]:
        """The words of direction j for some samples at a time: these samples, and four int64 [samples, calls]."""
        calls = -(-self.d // self._per_call)
        step = max(1, CALLS.get(self.device.type, CALLS["cuda"]) // calls)
        block = torch.arange(calls, device=self.device)
        direction, stream = (torch.tensor(word, device=self.device) for word in (j, self.stream))
        for first in range(0, self.n, step):
            last = min(first + step, self.n)
            sample = torch.arange(first, last, device=self.device).unsqueeze(1)
            yield slice(first, last), philox(self.key, (block, sample, direction, stream))


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals, float32, of two words each; none is 0 in the first place, so no row is."""
    uniform = (radius >> 9).to(torch.float32).mul_(2.0**-23).add_(2.0**-24)  # exact, in (0, 1)
    r = uniform.log_().mul_(-2).sqrt_()
    t = (angle - 2**31).to(torch.float32).mul_(math.tau / 2**32)
    return r * t.cos(), r * t.sin_()


def _squares(rows: Tensor) -> Tensor:
    """Sums of squares [n, 1] of rows [n, d], added in an order of their own: torch's depends on threads and device."""
    terms = rows.square()
    while (width := terms.shape[1]) > 1:
        half = (width + 1) // 2
        terms[:, : width - half] += terms[:, half:]
        terms = terms[:, :half]
    return terms


@dataclass(frozen=True)
class Held(Directions):
    """Directions whose blocks are drawn at their first use and kept; safe to use from several threads. See `held`."""

    _raws: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def _raw(self, j: int) -> Tensor:
        with self._lock:
            if j not in self._raws:
                self._raws[j] = super()._raw(j)
            return self._raws[j]


_held: dict[torch.device, Held] = {}
_held_lock = threading.Lock()


def held(directions: Directions) -> Held:
    """The same directions, drawn once in this process and kept until others are asked for on their device.

    For a host with several clients, and for hosts that are threads of one process. Kept are n d / 8 bytes a direction
    of `rademacher`, 4 n d of `sphere`. Who still has directions that were asked for earlier may go on using them.
    """
    asked = Held(**{f.name: getattr(directions, f.name) for f in fields(Directions)})
    with _held_lock:
        if _held.get(asked.device) != asked:
            _held[asked.device] = asked
        return _held[asked.device]
