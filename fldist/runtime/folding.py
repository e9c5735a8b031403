"""How the replies of one call become its values: an accumulator for every reply field, each reply folded whole or not
at all. The server folds what arrives; under topology `reduce` every host folds its own clients' replies first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fldist.fold import (
    Accumulator,
    Collect,
    Collected,
    FixedPoint,
    FixedPointTensor,
    Fold,
    FoldContext,
    Mean,
    Refused,
    Sum,
    dtype_named,
)
from fldist.kinds import FOLDED, Each, Field, Form, Once, Schema, reference_for
from fldist.params import Params
from fldist.runtime.job import ADDED, ClientMethod, Job
from fldist.sparse import Kept, Packed, check_closed, positions

_REDUCIBLE: dict[str, type[Mean] | type[Sum]] = {"Mean": Mean, "Sum": Sum}
"""Folds whose accumulators can be added up, by the name under which hosts are told of them."""
_TOLD: dict[str, Callable[..., Fold]] = {**_REDUCIBLE, "Collect": Collect}
"""All that hosts are told of: what they do not fold they look at, since what is folded with it cannot be taken back."""
COLLECTED_BYTES = 4096
"""A reply field that may be larger is not collected under `reduce`."""


class Folds:
    """The accumulators of one call. partly: for the reply fields that `fold` names alone, at a host."""

    def __init__(
        self, job: Job, spec: ClientMethod, fold: Mapping[str, Fold], arguments: Mapping[str, Any], partly: bool = False
    ) -> None:
        self.weights = {name: how.by for name, how in fold.items() if how.by is not None}
        self.accumulators: dict[str, Accumulator] = {}
        self.kept: dict[str, Kept] = {}  # by reply field: the masked model that was sent; what it keeps alone is folded
        self._spec = spec
        self._arguments = arguments
        for field in spec.reply.fields:
            how = fold.get(field.name)
            if how is None:
                if partly:
                    continue
                if field.form not in (Form.FLOAT, Form.INT) and field not in ADDED:
                    raise ValueError(
                        f"{spec.name}: the reply field {field.name!r} ({field.kind.label}) needs a fold: "
                        "Mean, Sum, or collect() to keep every reply"
                    )
                how = Collect()
            _check_form(spec, field, how)
            kept = _masked(spec.call, field, how, arguments)
            if kept is not None:
                self.kept[field.name] = kept
            context = _context(job, spec.call, field, how, arguments, kept)
            if partly:  # a host folds where its clients calculate; the server on the CPU
                context = dataclasses.replace(context, device=job.task.device)
            self.accumulators[field.name] = how.begin(context)

    def add(self, client: int, values: Sequence[Any]) -> str | None:
        """Fold a reply's fields, all or none; returns why not. values: one a field of the reply."""
        named = {f.name: v for f, v in zip(self._spec.reply.fields, values, strict=True)}
        done: list[tuple[Accumulator, Any, float]] = []
        for name, accumulator in self.accumulators.items():
            by = self.weights.get(name)
            weight = 1.0 if by is None else float("nan") if named[by] is None else float(named[by])
            try:
                value = self._unpacked(client, name, named[name])
                if value is FOLDED:
                    if not isinstance(accumulator, FixedPoint):
                        raise Refused("shape", "its host has folded what is to be collected")
                    accumulator.absorb(client, weight)
                    continue
                if value is None and not isinstance(accumulator, Collected):
                    raise Refused("shape", "there is nothing to fold")
                accumulator.add(client, value, weight)
            except Refused as error:
                for other, other_value, other_weight in done:
                    other.remove(client, other_value, other_weight)
                return f"refused: {name}: {error}"
            done.append((accumulator, value, weight))
        return None

    def _unpacked(self, client: int, name: str, value: Any) -> Any:
        """A reply's value as its accumulator takes it; Refused for a masked model that is not as its mask has it."""
        spec = self._spec.reply.fields[self._spec.reply.index(name)]
        if spec.sparse is None or value is None or value is FOLDED:
            return value
        try:
            if name in self.kept:
                return _kept_part(value, self.kept[name])
            mask = spec.sparse.mask
            bits = None if mask is None else argument_for(self._arguments[mask], client, mask)
            return unpacked(spec, value.value if isinstance(value, Kept) else value, bits)
        except ValueError as error:
            raise Refused("shape", str(error)) from None

    def taken_out(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """A reply's values without those that are folded here; ValueError for one that cannot be."""
        left = []
        for field, value in zip(self._spec.reply.fields, values, strict=True):
            if field.name not in self.accumulators:
                left.append(value)
                continue
            if value is None and field.optional:
                left.append(None)  # `add` refuses it, as the server would
                continue
            accumulator = self.accumulators[field.name]
            if isinstance(accumulator, Collected):
                left.append(value)
                continue
            if isinstance(accumulator, FixedPointTensor):
                # what does not fit is refused too, but goes and is booked as it is, as in a star
                left.append(FOLDED if accumulator.fits(value) else value)
                continue
            params = value.params if isinstance(value, Kept) else value
            if not isinstance(params, Params):
                raise ValueError(f"{field.name!r} must be Params, got {type(value).__name__}")
            if params.floats.dtype is not torch.float32 or params.ints.dtype is not torch.int64:
                raise ValueError(
                    f"field {field.name!r}: the blocks must be float32 and int64, not {params.floats.dtype} and "
                    f"{params.ints.dtype}"
                )
            left.append(FOLDED)
        return tuple(left)

    def results(self) -> dict[str, Any]:
        """The value of every reply field; NoWeight where a mean has none."""
        values = {name: accumulator.result() for name, accumulator in self.accumulators.items()}
        return values | {name: kept.whole(values[name]) for name, kept in self.kept.items()}

    def fixed(self) -> list[FixedPoint]:
        """The accumulators that can be added up, in the order of the reply's fields."""
        return [a for a in self.accumulators.values() if isinstance(a, FixedPoint)]


def reducible(spec: ClientMethod, fold: Mapping[str, Fold], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What hosts are told of a call's folds, so that each can fold its own clients' replies, or refuse them: by field.

    ValueError where that cannot be: what is collected is small, and a fold's scale is taken from what all are sent.
    """
    told: dict[str, Any] = {}
    for field in spec.reply.fields:
        how = fold.get(field.name)
        if isinstance(how, Mean | Sum):
            if type(how) not in _REDUCIBLE.values():
                raise ValueError(f"{spec.name}.{field.name}: topology: reduce takes Mean and Sum; use star")
            reference = _reference(spec.call, field, how)
            sparse = field.sparse
            if sparse is not None and (sparse.mask is None or isinstance(arguments[sparse.mask], Each)):
                raise ValueError(
                    f"{spec.name}.{field.name}: under topology: reduce nothing tells how much each client would have "
                    "sent of a model with zeros of its own; use topology: star or collective"
                )
            if reference is not None and isinstance(arguments[reference.name], Each | Once):
                raise ValueError(
                    f"{spec.name}.{field.name}: under topology: reduce its scale must come from an argument that all "
                    "clients are sent in the call: name one with like=..., or use star"
                )
            told[field.name] = {"how": type(how).__name__, **dataclasses.asdict(how)}
        elif field.form not in (Form.FLOAT, Form.INT) and field.max_bytes >= COLLECTED_BYTES:
            raise ValueError(
                f"{spec.name}.{field.name}: topology: reduce needs Mean or Sum, and this field ({field.kind.label}) is "
                f"{'collected' if isinstance(how, Collect) else 'folded otherwise'}; use topology: star or collective"
            )
        elif type(how) is Collect and how.shape is not None:
            told[field.name] = {"how": "Collect", **dataclasses.asdict(how)}
    return told


def folds_told(told: Mapping[str, Any]) -> dict[str, Fold]:
    """The folds that `reducible` described."""
    made: dict[str, Fold] = {}
    for name, how in told.items():
        kind = _TOLD[how["how"]]
        options = {key: value for key, value in how.items() if key != "how"}
        if options["shape"] is not None:
            options["shape"] = tuple(options["shape"])  # JSON knows no tuples
        made[name] = kind(**options)
    return made


def most_folded(told: Mapping[str, Any]) -> int:
    """The elements of the largest tensor of which `reducible` told; 0 where there are Params alone."""
    shapes = [how["shape"] for how in told.values() if how["shape"] is not None]
    return max((math.prod(shape) for shape in shapes if None not in shape), default=0)


def plain(argument: Any) -> Any:
    """An argument without its wrapping; of `Each` the first value."""
    if isinstance(argument, Once):
        return argument.value
    if isinstance(argument, Each):
        return next(iter(argument.values.values()), None)
    return argument


def argument_for(argument: Any, client: int, name: str) -> Any:
    """What one client is sent as this argument."""
    if isinstance(argument, Once):
        return argument.value
    if isinstance(argument, Each):
        if client not in argument.values:
            raise ValueError(f"argument {name!r}: Each has no value for client {client}")
        return argument.values[client]
    return argument


def unpacked(spec: Field, value: Any, mask: Any) -> Any:
    """A value that came, a masked model as Params; ValueError where it is not as the mask (bits, or None) has it."""
    if spec.sparse is None or value is FOLDED:
        return value
    if isinstance(value, Packed):
        return value.params(mask)
    if isinstance(value, Params) and mask is not None:
        n = value.layout.num_params
        check_closed(value.floats, n, positions(mask, n, value.device))
    return value


def _masked(call: Schema, field: Field, how: Fold, arguments: Mapping[str, Any]) -> Kept | None:
    """The masked model that a reply field is compared with, where one mask is all clients': folds then take z entries,
    not N. Server and hosts decide it alike."""
    if field.sparse is None or field.sparse.mask is None or not isinstance(how, Mean | Sum):
        return None
    reference, mask = _reference(call, field, how), arguments[field.sparse.mask]
    if reference is None or isinstance(mask, Each) or plain(mask) is None:
        return None
    sent = plain(arguments[reference.name])
    if isinstance(sent, Kept):
        return sent if sent.mask is plain(mask) else Kept(sent.value, plain(mask))
    return Kept(sent, plain(mask)) if isinstance(sent, Params) else None


def _kept_part(value: Any, like: Kept) -> Params:
    """What a mask keeps of a reply; ValueError where there is something else, or another number of values."""
    if isinstance(value, Packed):
        made = value.compact(like.where.z)
        if made is not None:
            return made
        value = value.params(like.mask)
    elif isinstance(value, Kept):
        if value.mask is like.mask:
            return value.compact
        value = value.value
    if isinstance(value, Params):
        check_closed(value.floats, like.where.n, like.where)
    return Kept(value, like.mask).compact


def _check_form(spec: ClientMethod, field: Field, how: Fold) -> None:
    """ValueError for a fold of a shape on a field that has none, or that may not be so large."""
    if not isinstance(how, Mean | Sum | Collect) or how.shape is None:
        return
    name = f"{spec.name}.{field.name}"
    size = math.prod(n or 1 for n in how.shape) * dtype_named(how.dtype).itemsize  # None: one there is at least
    if field.form is not Form.TENSOR and not (isinstance(how, Collect) and field.form is Form.PARAMS):
        raise ValueError(f"{name}: {type(how).__name__} with a shape is of a tensor, and this field is none")
    if field.form is Form.TENSOR and size > field.max_bytes:
        raise ValueError(
            f"{name}: {how.dtype} {list(how.shape)} has {size:,} bytes, and the field is allowed {field.max_bytes:,}; "
            "annotate it with MaxBytes"
        )


def _reference(call: Schema, field: Field, how: Fold) -> Field | None:
    if getattr(how, "shape", None) is not None:  # a tensor's scale is its limit's
        return None
    like = getattr(how, "like", None)
    return call.fields[call.index(like)] if like else reference_for(field, call)


def _context(
    job: Job, call: Schema, field: Field, how: Fold, arguments: Mapping[str, Any], kept: Kept | None
) -> FoldContext:
    reference_field = _reference(call, field, how)
    reference = plain(arguments[reference_field.name]) if reference_field is not None else None
    bound = float(job.task.num_clients)
    if isinstance(how, Mean) and how.bound is not None:
        bound = how.bound
    elif isinstance(how, Mean) and how.by == "n":
        bound = float(job.task.num_train)
    elif isinstance(how, Mean) and how.by is not None:
        raise ValueError(f"Mean(by={how.by!r}) needs bound=..., a number that no sum of the weights exceeds")
    if kept is not None:
        reference = kept.compact
    elif isinstance(reference, Kept):
        reference = reference.value
    reference = reference if isinstance(reference, Params) else None
    return FoldContext(reference, bound, job.integers if not isinstance(how, Sum) else "mean")
