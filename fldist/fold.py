"""Folds: how the replies of a call become one value, in any order of arrival with the same bits.

`Mean` and `Sum` add contributions as 64-bit fixed-point integers: those of Params on a scale taken from the reference
(the model that was sent), plain tensors on the scale of a limit that is given. Integer addition is associative, so
arrival order, placement and topology cannot change the result. `Collect` keeps every reply. Folds know nothing of
rounds, clients' whereabouts or bytes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from fldist import blocks
from fldist.params import Layout, Params, Slot, Travel

Integers = Literal["mean", "max", "keep"]

CHUNK = 1 << 16
"""Elements worked on at a time: 512 kB of int64, inside a core's second-level cache."""
CHUNK_OF_GPU = 1 << 24
"""The same on a GPU, which has its caches filled by many cores at a time."""

CPU = torch.device("cpu")
LIMIT = 2.0**20
"""The largest magnitude of a tensor's elements where a fold names none; see `FixedPointTensor` for the resolution."""

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""The dtypes of tensors that are folded."""

_HEADROOM = 64.0
_INT_LIMIT = 2**62


class Refused(ValueError):
    """A contribution that was not taken; the fold is as it was before. `reason` is `range`, `nan` or `shape`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class NoWeight(ValueError):
    """A mean whose weights sum to 0."""


@dataclass(frozen=True)
class FoldContext:
    """What a call knows before the first reply comes.

    reference: the argument that was sent (None: nothing to take a scale from);
    weight_bound: no client's weight, nor the sum of all weights, exceeds it; integers: rule for integer blocks;
    device: where tensors are folded that have no reference.
    """

    reference: Params | None
    weight_bound: float
    integers: Integers = "mean"
    device: torch.device = CPU


@dataclass(frozen=True)
class Block:
    """A block of int64 and how two of them are combined: `sum` or `max`. Empty blocks are there too."""

    tensor: Tensor
    how: Literal["sum", "max"]


class Accumulator(ABC):
    """The growing value of one fold in one call."""

    @abstractmethod
    def add(self, client: int, value: Any, weight: float) -> None:
        """Take a contribution, or raise `Refused` and be unchanged."""

    @abstractmethod
    def remove(self, client: int, value: Any, weight: float) -> None:
        """Take back a contribution that was added; exact."""

    @abstractmethod
    def result(self) -> Any:
        """The folded value."""


class Fold(ABC):
    """A way to fold one reply field."""

    by: str | None = None
    """The reply field that holds a contribution's weight; None weighs all alike."""

    @abstractmethod
    def begin(self, context: FoldContext) -> Accumulator:
        """Start a fold for one call."""


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name, such as `float16`; ValueError where torch has none of that name."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: {name!r} is no name of a dtype; give one such as 'float32'")
    return dtype


def _check_shape(shape: tuple[int, ...]) -> None:
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape: {shape!r} is no shape of a tensor; give a tuple of whole numbers, such as (100, 10)")


def _check_tensor(fold: Mean | Sum) -> None:
    """ValueError where a fold of tensors could not be begun."""
    if fold.shape is None:
        return
    _check_shape(fold.shape)
    if fold.dtype not in FLOATS:
        raise ValueError(f"dtype: {fold.dtype!r} is not folded; give one of {', '.join(FLOATS)}, or collect")
    if not 1e-100 <= fold.limit <= 1e100:
        raise ValueError(f"limit: {fold.limit} is out of 1e-100 to 1e100; give the largest magnitude to be taken")
    if fold.like is not None or (isinstance(fold, Mean) and fold.part != "all"):
        raise ValueError(
            "like and part are of Params, and shape is of a tensor, whose scale is its limit's; leave one out"
        )


@dataclass(frozen=True)
class Mean(Fold):
    """Weighted mean: sum_k w_k y_k / sum_k w_k over the replies that came; w_k is the reply field `by`, or 1.

    like: the argument that the scale is taken from (default: the only one of the same kind);
    bound: a number that no sum of weights exceeds (default for `n`: the task's training examples);
    part: of that argument, what the field has: `params` where it has no buffers.

    Where shape is given, the field is a tensor of it, not Params, and nothing needs to have been sent; see
    `FixedPointTensor`. dtype: float16, bfloat16, float32 or float64; limit: the largest magnitude of an element. The
    result is float64.
    """

    by: str | None = None
    like: str | None = None
    bound: float | None = None
    part: Travel = "all"
    shape: tuple[int, ...] | None = None
    dtype: str = "float32"
    limit: float = LIMIT

    def __post_init__(self) -> None:
        _check_tensor(self)

    def begin(self, context: FoldContext) -> Accumulator:
        """Start a mean."""
        if self.shape is not None:
            return FixedPointTensor(context, self.shape, self.dtype, self.limit, divide=True)
        reference = context.reference
        if reference is not None and self.part != "all":
            context = replace(context, reference=reference.restricted(self.part))
        return FixedPoint(context, divide=True)


@dataclass(frozen=True)
class MeanAndEach(Mean):
    """A mean of Params whose contributions are put into `into` as well, by client: those that the mean has in it.

    Memory grows with the clients.
    """

    into: dict[int, Params] = field(default_factory=dict)

    @classmethod
    def of(cls, mean: Mean, into: dict[int, Params]) -> MeanAndEach:
        """The same mean, noting what it is of."""
        return cls(**{f.name: getattr(mean, f.name) for f in fields(mean)}, into=into)

    def begin(self, context: FoldContext) -> Accumulator:
        """Start a mean."""
        if self.shape is not None or self.part != "all":
            raise ValueError("MeanAndEach is of whole Params; shape and part do not go with it")
        return _Noting(context, self.into)


@dataclass(frozen=True)
class Sum(Fold):
    """Unweighted sum over the replies that came; integer blocks are summed. shape, dtype, limit: as of `Mean`."""

    like: str | None = None
    shape: tuple[int, ...] | None = None
    dtype: str = "float32"
    limit: float = LIMIT

    def __post_init__(self) -> None:
        _check_tensor(self)

    def begin(self, context: FoldContext) -> Accumulator:
        """Start a sum."""
        if self.shape is not None:
            return FixedPointTensor(context, self.shape, self.dtype, self.limit, divide=False)
        return FixedPoint(context, divide=False)


@dataclass(frozen=True)
class Collect(Fold):
    """Keep every reply: the result is {client: value} in client order. Memory grows with the clients.

    Where shape is given, what cannot be is refused, so that it cannot spoil, or end, what is made of all replies: a
    tensor (of Params: the floats) of another shape or dtype, NaN and infinite numbers, with not_negative negative ones,
    and those of a magnitude beyond limit (reasons `shape`, `nan`, `range`). None in the shape: any number of entries.
    """

    shape: tuple[int | None, ...] | None = None
    dtype: str = "float32"
    not_negative: bool = False
    limit: float | None = None

    def __post_init__(self) -> None:
        dtype_named(self.dtype)
        if self.shape is not None:
            _check_shape(tuple(0 if n is None else n for n in self.shape))
        elif self.not_negative or self.limit is not None:
            name = "not_negative" if self.not_negative else "limit"
            raise ValueError(f"{name}: replies are looked at where their shape is given; give it too")

    def begin(self, context: FoldContext) -> Accumulator:
        """Start an empty collection."""
        return Collected() if self.shape is None else _Checked(self.shape, self.dtype, self.not_negative, self.limit)


def collect() -> Collect:
    """Keep every reply of a field: `fold={"y": collect()}` gives {client: value}."""
    return Collect()


class Collected(Accumulator):
    """Every reply of a field."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}

    def add(self, client: int, value: Any, weight: float) -> None:
        """Keep a reply."""
        self.values[client] = value

    def remove(self, client: int, value: Any, weight: float) -> None:
        """Drop a reply."""
        del self.values[client]

    def result(self) -> dict[int, Any]:
        """All replies, in client order."""
        return dict(sorted(self.values.items()))


class _Checked(Collected):
    """A collection that looks at what it gets."""

    def __init__(self, shape: tuple[int | None, ...], dtype: str, not_negative: bool, limit: float | None) -> None:
        super().__init__()
        self._shape = shape
        self._dtype = dtype_named(dtype)
        self._not_negative = not_negative
        self._limit = limit

    def add(self, client: int, value: Any, weight: float) -> None:
        """Keep a reply, or refuse it."""
        numbers = value.floats if isinstance(value, Params) else value
        _refuse_unlike(numbers, self._shape, self._dtype)
        if numbers.numel() and (self._dtype.is_floating_point or self._not_negative or self._limit is not None):
            low, high = (float(v) for v in torch.aminmax(numbers))
            if math.isnan(low) or math.isnan(high):
                raise Refused("nan", "there is a number that is NaN")
            if math.isinf(low) or math.isinf(high) or (self._not_negative and low < 0):
                beyond = "negative or infinite" if self._not_negative else "infinite"
                raise Refused("range", f"there is a number that is {beyond}")
            if self._limit is not None and max(-low, high) > self._limit:
                raise Refused("range", f"a value is beyond {self._limit:g}, the limit of this fold")
        super().add(client, value, weight)


def _refuse_unlike(value: Any, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    """Raise Refused for all but a tensor of this shape (None: any number there) and dtype."""
    wanted = str(list(shape)).replace("None", "any")
    if not isinstance(value, Tensor):
        raise Refused("shape", f"{type(value).__name__} is not {dtype} {wanted}")
    fits = len(value.shape) == len(shape) and all(n in (got, None) for n, got in zip(shape, value.shape, strict=True))
    if not fits or value.dtype is not dtype or value.layout is not torch.strided:
        raise Refused("shape", f"{value.dtype} {list(value.shape)} is not {dtype} {wanted}")


def scale_exponent(limit: float) -> int:
    """The largest k with limit * 2^k < 2^62."""
    _, exponent = math.frexp(limit)  # limit = mantissa 2^exponent, 1/2 <= mantissa < 1
    return 62 - exponent


def fold_limit(reference: Tensor) -> float:
    """L = 64 max(1, max|reference|): the largest magnitude that a contribution's element may have."""
    largest = max(abs(float(v)) for v in torch.aminmax(reference)) if reference.numel() else 0.0
    return _HEADROOM * (largest if math.isnan(largest) else max(1.0, largest))


class FixedPoint(Accumulator):
    """Order-free sum of float blocks in int64 fixed point, and of integer blocks exactly.

    A contribution is rint(float64(x) (w / w_bound) 2^k) with one k for the whole block; |x| <= L. The sum lies where
    the reference lies, CPU or GPU, and contributions are brought there. limit: L (None: `fold_limit` of the reference).
    """

    def __init__(self, context: FoldContext, *, divide: bool, limit: float | None = None) -> None:
        if context.reference is None:
            raise ValueError(
                "Mean and Sum take their scale from the argument that was sent, and this call sent none of the "
                "same kind: name one with like=..., give a tensor's shape=... and limit=..., or use collect()"
            )
        if not (math.isfinite(context.weight_bound) and context.weight_bound > 0):
            raise ValueError(f"the bound on the weights must be positive and finite, got {context.weight_bound}")
        self.reference = context.reference
        self.bound = float(context.weight_bound)
        self.integers: Integers = context.integers if divide else "mean"
        self.divide = divide
        self.limit = fold_limit(self.reference.floats) if limit is None else limit
        self._limit_is = "64 times the largest that was sent" if limit is None else "the limit of this fold"
        if not math.isfinite(self.limit):
            raise ValueError("the model that was sent holds NaN or infinity; nothing can be folded on its scale")
        self.exponent = scale_exponent(self.limit)
        device = self.reference.device
        self.floats = blocks.zeros(self.reference.floats.numel(), torch.int64, device)
        self.ints = torch.zeros(self.reference.ints.numel(), dtype=torch.int64, device=device)
        self.weights: dict[int, float] = {}
        self._total = Fraction(0)  # exact, so that no order of arrival decides whether the bound is kept
        self._largest_ints: dict[int, Tensor] = {}
        self._combined = False  # whether `ints` holds the largest of contributions that were added elsewhere
        self._chunk = CHUNK if device.type == "cpu" else CHUNK_OF_GPU
        size = min(self._chunk, max(1, self.floats.numel()))
        self._work = torch.empty(size, dtype=torch.float64, device=device)
        self._whole = torch.empty(size, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of one contribution as its client would send it."""
        return self.reference.nbytes

    def add(self, client: int, value: Params, weight: float) -> None:
        """Add one contribution; refuse NaN, elements beyond the limit and impossible weights."""
        if value.layout != self.reference.layout:
            raise Refused("shape", f"{value} does not fit the reference {self.reference}")
        value = value.to(self.reference.device)
        if math.isnan(weight):
            raise Refused("nan", "the weight is NaN")
        if not (0.0 <= weight < math.inf and self._total + Fraction(weight) <= self.bound):
            raise Refused("range", f"weight {weight} takes the sum of weights out of 0 to {self.bound:g}")
        self._check_ints(value.ints, weight)
        done = self._accumulate(value.floats, weight, +1, value.floats.numel())
        if done is not None:
            chunk_start, reason = done
            self._accumulate(value.floats, weight, -1, chunk_start)
            largest = f"a value is beyond {self.limit:g}, {self._limit_is}"
            detail = largest if reason == "range" else "a value is NaN"
            raise Refused(reason, f"{detail}; if training diverges, lower local.lr")
        self._add_ints(client, value.ints, weight, +1)
        self.weights[client] = weight
        self._total += Fraction(weight)

    def remove(self, client: int, value: Params, weight: float) -> None:
        """Subtract what `add` added; exact, since both are integers."""
        value = value.to(self.reference.device)
        self._accumulate(value.floats, weight, -1, value.floats.numel())
        self._add_ints(client, value.ints, weight, -1)
        self._total -= Fraction(self.weights.pop(client))

    def absorb(self, client: int, weight: float) -> None:
        """Take the weight of a contribution that is in the blocks of another accumulator, which `blocks` will add.

        ValueError where that breaks the bound: the contribution cannot be taken out again.
        """
        if not (0.0 <= weight < math.inf and self._total + Fraction(weight) <= self.bound):
            raise ValueError(
                f"the weights of all hosts' replies exceed the bound of the mean, {self.bound:g}, and topology: reduce "
                "cannot take back what a host has added up; give Mean a larger bound, or use topology: star"
            )
        self.weights[client] = weight
        self._total += Fraction(weight)

    def blocks(self) -> list[Block]:
        """All contributions so far, to be combined with those of other accumulators of the same call, in place.

        Nothing can be added or removed afterwards.
        """
        if self.integers != "max":
            return [Block(self.floats, "sum"), Block(self.ints, "sum")]
        if self._largest_ints:
            self.ints = torch.stack(list(self._largest_ints.values())).amax(dim=0)
            self._largest_ints.clear()
        else:
            self.ints.fill_(torch.iinfo(torch.int64).min)
        self._combined = True
        return [Block(self.floats, "sum"), Block(self.ints, "max")]

    def _accumulate(self, block: Tensor, weight: float, sign: int, end: int) -> tuple[int, str] | None:
        """Add sign * contribution for elements [0, end); return where and why a chunk cannot be taken."""
        factor = math.ldexp(weight / self.bound, self.exponent)
        for start in range(0, end, self._chunk):
            stop = min(start + self._chunk, end)
            work = self._work[: stop - start]
            work.copy_(block[start:stop])
            if sign > 0:
                low, high = (float(v) for v in torch.aminmax(work))
                if math.isnan(low) or math.isnan(high):
                    return start, "nan"
                if low < -self.limit or high > self.limit:
                    return start, "range"
            work.mul_(factor).round_()
            whole = self._whole[: stop - start]
            whole.copy_(work)
            self.floats[start:stop].add_(whole, alpha=sign)
        return None

    def _check_ints(self, ints: Tensor, weight: float) -> None:
        if not ints.numel() or self.integers != "mean":
            return
        if not float(weight).is_integer():
            raise Refused(
                "range",
                f"weight {weight} is not whole, and the mean of integer buffers needs whole weights; "
                "set aggregation.integers to max or keep",
            )
        most = max(int(ints.max()), -int(ints.min()))
        if most * max(1, int(self.bound)) >= _INT_LIMIT:
            raise Refused("range", f"integer entry {most} times the weights' bound {self.bound:g} exceeds 2^62")

    def _add_ints(self, client: int, ints: Tensor, weight: float, sign: int) -> None:
        if not ints.numel():
            return
        if self.integers == "mean":
            self.ints.add_(ints, alpha=sign * (int(weight) if self.divide else 1))
        elif self.integers == "max":
            if sign > 0:
                self._largest_ints[client] = ints.clone()
            else:
                del self._largest_ints[client]

    def result(self) -> Params:
        """The mean or sum as float32, integers by the declared rule (means truncated towards 0)."""
        floats = self._folded(torch.float32)
        return Params(self.reference.layout, floats, self._int_result(float(self._total)))

    def _folded(self, dtype: torch.dtype) -> Tensor:
        """The mean or sum of the floats, [N]; NoWeight where a mean has none."""
        total = float(self._total)
        if self.divide and total <= 0.0:
            raise NoWeight("the weights of all replies sum to 0; a mean needs at least one positive weight")
        back = self.bound / total if self.divide else self.bound
        floats = blocks.empty(self.floats.numel(), dtype, self.floats.device)
        for start in range(0, floats.numel(), self._chunk):
            stop = min(start + self._chunk, floats.numel())
            work = self._work[: stop - start]
            work.copy_(self.floats[start:stop])
            # the power of two first: exact, so the only roundings are int64 -> float64 and the last product
            floats[start:stop].copy_(work.mul_(math.ldexp(1.0, -self.exponent)).mul_(back))
        return floats

    def _int_result(self, total: float) -> Tensor:
        if not self.ints.numel() or self.integers == "keep":
            return self.reference.ints.clone()
        if self.integers == "max":
            candidates = [*self._largest_ints.values(), *([self.ints] if self._combined and self.weights else [])]
            return torch.stack(candidates).amax(dim=0) if candidates else self.reference.ints.clone()
        if not self.divide:
            return self.ints.clone()
        return torch.div(self.ints, int(total), rounding_mode="trunc")


class _Noting(FixedPoint):
    """A mean that notes its contributions."""

    def __init__(self, context: FoldContext, into: dict[int, Params]) -> None:
        super().__init__(context, divide=True)
        self._into = into

    def add(self, client: int, value: Params, weight: float) -> None:
        """Add one contribution and note it."""
        super().add(client, value, weight)
        self._into[client] = value

    def remove(self, client: int, value: Params, weight: float) -> None:
        """Subtract what `add` added, and note it no longer."""
        super().remove(client, value, weight)
        del self._into[client]


class FixedPointTensor(FixedPoint):
    """Order-free sum of tensors of one shape and dtype, on a scale that nothing needs to be sent for; see `FixedPoint`.

    limit: L, the largest magnitude that an element may have. The resolution is that of int64: beside the roundings of
    float64, the mean of K replies is off by at most K L 2^-62 w_bound / sum_k w_k, and a sum by K L 2^-62 w_bound.
    Memory is 8 bytes an element, and as much again for the result, whatever comes.
    """

    def __init__(self, context: FoldContext, shape: tuple[int, ...], dtype: str, limit: float, *, divide: bool) -> None:
        numel = math.prod(shape)
        # of the reference only the layout counts: it has no memory
        alike = torch.zeros(1, device=context.device).expand(numel)
        reference = Params(Layout((Slot("", shape, 0, numel),), (), ()), alike)
        super().__init__(replace(context, reference=reference), divide=divide, limit=limit)
        self._shape = shape
        self._dtype = dtype_named(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of one contribution as its client would send it: elements times the dtype's size."""
        return self.floats.numel() * self._dtype.itemsize

    def fits(self, value: Any) -> bool:
        """Whether this is a tensor of the fold's shape and dtype."""
        try:
            _refuse_unlike(value, self._shape, self._dtype)
        except Refused:
            return False
        return True

    def _params(self, value: Any) -> Params:
        _refuse_unlike(value, self._shape, self._dtype)
        return Params(self.reference.layout, value.detach().reshape(-1))

    def add(self, client: int, value: Any, weight: float) -> None:
        """Add one contribution; refuse another shape or dtype, and what `FixedPoint` refuses."""
        super().add(client, self._params(value), weight)

    def remove(self, client: int, value: Any, weight: float) -> None:
        """Subtract what `add` added; exact."""
        super().remove(client, self._params(value), weight)

    def result(self) -> Any:
        """The mean or sum, a float64 tensor of the fold's shape."""
        return self._folded(torch.float64).view(self._shape)
