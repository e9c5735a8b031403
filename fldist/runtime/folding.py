"""How the replies of one call become its values: an accumulator for every reply field, each reply folded whole or not
at all. The server folds what arrives; under topology `reduce` every host folds its own clients' replies first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fldist.fold import Accumulator, Collect, Collected, FixedPoint, Fold, FoldContext, Mean, Refused, Sum
from fldist.kinds import FOLDED, Each, Field, Form, Once, Schema, reference_for
from fldist.params import Params
from fldist.runtime.job import ADDED, ClientMethod, Job
from fldist.sparse import Kept, Packed, check_closed

_REDUCIBLE: dict[str, type[Mean] | type[Sum]] = {"Mean": Mean, "Sum": Sum}
"""Folds whose accumulators can be added up, by the name under which hosts are told of them."""
COLLECTED_BYTES = 4096
"""A reply field that may be larger is not collected under `reduce`."""


class Folds:
    """The accumulators of one call. partly: for the reply fields that `fold` names alone, at a host."""

    def __init__(
        self, job: Job, spec: ClientMethod, fold: Mapping[str, Fold], arguments: Mapping[str, Any], partly: bool = False
    ) -> None:
        self.weights = {name: how.by for name, how in fold.items() if how.by is not None}
        self.accumulators: dict[str, Accumulator] = {}
        self._spec = spec
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
            self.accumulators[field.name] = how.begin(_context(job, spec.call, field, how, arguments))

    def add(self, client: int, values: Sequence[Any]) -> str | None:
        """Fold a reply's fields, all or none; returns why not. values: one a field of the reply."""
        named = {f.name: v for f, v in zip(self._spec.reply.fields, values, strict=True)}
        done: list[tuple[Accumulator, Any, float]] = []
        for name, accumulator in self.accumulators.items():
            by = self.weights.get(name)
            weight = 1.0 if by is None else float("nan") if named[by] is None else float(named[by])
            value = named[name].value if isinstance(named[name], Kept) else named[name]
            try:
                if value is FOLDED:
                    assert isinstance(accumulator, FixedPoint)  # `reducible` saw to it
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
        return {name: accumulator.result() for name, accumulator in self.accumulators.items()}

    def fixed(self) -> list[FixedPoint]:
        """The accumulators that can be added up, in the order of the reply's fields."""
        return [a for a in self.accumulators.values() if isinstance(a, FixedPoint)]


def reducible(spec: ClientMethod, fold: Mapping[str, Fold], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What hosts are told of a call's folds, so that each can fold its own clients' replies: by reply field.

    ValueError where that cannot be: what is collected is small, and a fold's scale is taken from what all are sent.
    """
    told: dict[str, Any] = {}
    for field in spec.reply.fields:
        how = fold.get(field.name)
        if isinstance(how, Mean | Sum):
            if type(how) not in _REDUCIBLE.values():
                raise ValueError(f"{spec.name}.{field.name}: topology: reduce takes Mean and Sum; use star")
            reference = _reference(spec.call, field, how)
            if field.sparse is not None and (reference is None or not isinstance(arguments[reference.name], Kept)):
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
    return told


def folds_told(told: Mapping[str, Any]) -> dict[str, Fold]:
    """The folds that `reducible` described."""
    made: dict[str, Fold] = {}
    for name, how in told.items():
        kind = _REDUCIBLE[how["how"]]
        made[name] = kind(**{key: value for key, value in how.items() if key != "how"})
    return made


def plain(argument: Any) -> Any:
    """An argument without its wrapping; of `Each` the first value."""
    if isinstance(argument, Once):
        return argument.value
    if isinstance(argument, Each):
        return next(iter(argument.values.values()), None)
    return argument


def unpacked(spec: Field, value: Any, mask: Any) -> Any:
    """A value that came, a masked model as Params; ValueError where it is not as the mask (bits, or None) has it."""
    if spec.sparse is None or value is FOLDED:
        return value
    if isinstance(value, Packed):
        return value.params(mask)
    if isinstance(value, Params) and mask is not None:
        check_closed(value, mask)
    return value


def _reference(call: Schema, field: Field, how: Fold) -> Field | None:
    like = getattr(how, "like", None)
    return call.fields[call.index(like)] if like else reference_for(field, call)


def _context(job: Job, call: Schema, field: Field, how: Fold, arguments: Mapping[str, Any]) -> FoldContext:
    reference_field = _reference(call, field, how)
    reference = plain(arguments[reference_field.name]) if reference_field is not None else None
    bound = float(job.task.num_clients)
    if isinstance(how, Mean) and how.bound is not None:
        bound = how.bound
    elif isinstance(how, Mean) and how.by == "n":
        bound = float(job.task.num_train)
    elif isinstance(how, Mean) and how.by is not None:
        raise ValueError(f"Mean(by={how.by!r}) needs bound=..., a number that no sum of the weights exceeds")
    if isinstance(reference, Kept):
        reference = reference.value
    reference = reference if isinstance(reference, Params) else None
    return FoldContext(reference, bound, job.integers if not isinstance(how, Sum) else "mean")
