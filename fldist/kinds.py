"""Kinds of messages and the annotations by which a signature becomes a wire schema.

A client method's arguments and the fields of its reply (a NamedTuple) are annotated with the aliases below;
`call_schema` and `reply_schema` read them. How a value becomes bytes is the business of `wire/codec.py`.
"""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from torch import Tensor

from fldist.params import Params

T = TypeVar("T")


class Kind(enum.IntEnum):
    """What a message is. The numbers travel in headers: never renumber."""

    WEIGHTS = 1
    VARIATES = 2
    GRADIENTS = 3
    LOGITS = 4
    PROTOTYPES = 5
    MASKS = 6
    IMAGES = 7
    LATENTS = 8
    LABELS = 9
    FACTORS = 10
    SEEDS = 11
    HISTOGRAM = 12
    GENERATOR = 13
    SCALARS = 14
    REPORT = 15
    PLAN = 16

    @property
    def label(self) -> str:
        """The name in ledgers and results."""
        return self.name.lower()


class Form(enum.IntEnum):
    """How a value is built from tensors. The numbers travel in headers: never renumber."""

    NONE = 0
    PARAMS = 1
    TENSOR = 2
    TENSORS = 3
    FLOAT = 4
    INT = 5
    HELD = 6  # what the receiver holds: a version of a `Once` argument, or this call's value
    FOLDED = 7  # what the sender has folded with others


@dataclass(frozen=True)
class MaxBytes:
    """Annotation: the most bytes that a value of free shape may have."""

    bytes: int


@dataclass(frozen=True)
class Sparse:
    """Annotation: Params of which the sender may leave out zeros: it gives `sparse.Kept`, the receiver gets Params.

    mask: the argument of the call (bits, see `sparse.pack`) that both ends hold, and that nothing may lie outside of;
    None where every sender has zeros of its own.
    """

    mask: str | None = None


DEFAULT_MAX_BYTES = 2**30
"""Bound of a value of free shape that declares none (1 GiB)."""

Weights = Annotated[Params, Kind.WEIGHTS]
MaskedWeights = Annotated[Params, Kind.WEIGHTS, Sparse("mask")]
SparseWeights = Annotated[Params, Kind.WEIGHTS, Sparse()]
Variates = Annotated[Params, Kind.VARIATES]
Gradients = Annotated[Params, Kind.GRADIENTS]
Generator = Annotated[Params, Kind.GENERATOR]
Logits = Annotated[Tensor, Kind.LOGITS]
Prototypes = Annotated[Tensor, Kind.PROTOTYPES]
Masks = Annotated[Tensor, Kind.MASKS]
Images = Annotated[Tensor, Kind.IMAGES]
Latents = Annotated[Tensor, Kind.LATENTS]
Labels = Annotated[Tensor, Kind.LABELS]
Factors = Annotated[dict[str, Tensor], Kind.FACTORS]
Seeds = Annotated[int, Kind.SEEDS]
Histogram = Annotated[Tensor, Kind.HISTOGRAM]
Report = Annotated[Tensor, Kind.REPORT]
Scalar = Annotated[float, Kind.SCALARS]
"""A number: an int travels as int64, a float as float64; 8 bytes either way."""


@dataclass(frozen=True)
class Each(Generic[T]):
    """An argument that differs by client: `Each({client: value})`."""

    values: Mapping[int, T]


@dataclass(frozen=True)
class Once(Generic[T]):
    """An argument that is the same for all clients, and is sent only to those that do not hold this version yet.

    version: any integer that another value does not have, one of a void attempt at the round included (which may have
    had other replies, and so another value). A client's host holds one version of each argument of each method; after a
    rejoin it is sent again. In the ledger a client is given a version once. name: arguments of several methods that are
    given under one name are one to a host: what came with one is not sent for another.
    """

    value: T
    version: int
    name: str | None = None


class Held:
    """Stands in a message where a value would stand that the receiver holds: a `Once` argument's, or this call's."""


HELD = Held()


class Folded:
    """Stands in a reply where a value would stand that its host has folded with those of its other clients."""


FOLDED = Folded()


@dataclass(frozen=True)
class Field:
    """One argument or reply field of a client method."""

    name: str
    kind: Kind
    form: Form
    optional: bool
    max_bytes: int
    sparse: Sparse | None = None


@dataclass(frozen=True)
class Schema:
    """The fields of one direction of a client method, in order."""

    fields: tuple[Field, ...]

    def index(self, name: str) -> int:
        """Position of a field."""
        return next(i for i, f in enumerate(self.fields) if f.name == name)


_FORMS: dict[object, Form] = {Params: Form.PARAMS, Tensor: Form.TENSOR, float: Form.FLOAT, int: Form.INT}


def _field(owner: str, name: str, hint: Any) -> Field:
    optional = False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        rest = [a for a in typing.get_args(hint) if a is not type(None)]
        optional = len(rest) < len(typing.get_args(hint))
        if len(rest) == 1:
            hint = rest[0]
    metadata = getattr(hint, "__metadata__", ())
    kinds = [m for m in metadata if isinstance(m, Kind)]
    base = typing.get_args(hint)[0] if metadata else hint
    form = Form.TENSORS if typing.get_origin(base) is dict else _FORMS.get(base)
    if len(kinds) != 1 or form is None:
        raise ValueError(
            f"{owner}: {name!r} has no kind; annotate it with Weights, Logits, Scalar ... of fldist.kinds "
            "(what travels must say what it is)"
        )
    bounds = [m.bytes for m in metadata if isinstance(m, MaxBytes)]
    sparse = next((m for m in metadata if isinstance(m, Sparse)), None)
    return Field(name, kinds[0], form, optional, bounds[-1] if bounds else DEFAULT_MAX_BYTES, sparse)


def call_schema(method: Callable[..., Any]) -> Schema:
    """The arguments of a client method, without `self`, `me` and `data`."""
    hints = typing.get_type_hints(method, include_extras=True)
    names = list(inspect.signature(method).parameters)[2 if inspect.ismethod(method) else 3 :]
    return Schema(tuple(_field(method.__qualname__, n, hints.get(n)) for n in names))


def reply_type(method: Callable[..., Any]) -> type[tuple[Any, ...]] | None:
    """The NamedTuple that a client method returns, or None for a method without reply fields."""
    hint = typing.get_type_hints(method, include_extras=True).get("return", inspect.Parameter.empty)
    if hint is type(None):
        return None
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return hint
    raise ValueError(f"{method.__qualname__}: the return annotation must be a NamedTuple of kinds, or None")


def reply_schema(method: Callable[..., Any]) -> Schema:
    """The fields of a client method's reply."""
    reply = reply_type(method)
    if reply is None:
        return Schema(())
    return reply_fields(reply)


def reply_fields(reply: type[tuple[Any, ...]]) -> Schema:
    """The fields of a NamedTuple of kinds."""
    hints = typing.get_type_hints(reply, include_extras=True)
    return Schema(tuple(_field(reply.__qualname__, n, hints[n]) for n in reply._fields))  # type: ignore[attr-defined]


def reference_for(field: Field, schema: Schema) -> Field | None:
    """The argument that a reply field is compared with: the only one of the same kind and form."""
    same = [f for f in schema.fields if (f.kind, f.form) == (field.kind, field.form)]
    return same[0] if len(same) == 1 else None
