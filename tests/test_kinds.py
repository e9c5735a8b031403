"""Kinds: a client method's signature is its wire schema."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import pytest
from torch import Tensor

from fldist.algorithm import Algorithm, on_client
from fldist.kinds import (
    DEFAULT_MAX_BYTES,
    Factors,
    Form,
    Images,
    Kind,
    Labels,
    Logits,
    MaxBytes,
    Prototypes,
    Scalar,
    Seeds,
    Variates,
    Weights,
    call_schema,
    reference_for,
    reply_schema,
    reply_type,
)


class Update(NamedTuple):
    y: Weights
    factors: Factors
    loss: Scalar | None


class BadReply(NamedTuple):
    y: Weights
    extra: Tensor


class Method(Algorithm):
    @on_client
    def update(self, me, data, x: Weights, c: Variates | None, images: Images, seed: Seeds) -> Update: ...

    @on_client
    def bounded(self, me, data, p: Annotated[Prototypes, MaxBytes(4096)], q: Prototypes) -> None: ...

    @on_client
    def nothing(self, me, data) -> None: ...

    @on_client
    def unmarked(self, me, data, x: Weights, tensor: Tensor) -> None: ...

    @on_client
    def bare(self, me, data, x) -> None: ...

    @on_client
    def two_kinds(self, me, data, x: Annotated[Weights, Kind.VARIATES]) -> None: ...

    @on_client
    def no_return(self, me, data): ...

    @on_client
    def plain_tuple(self, me, data) -> tuple[float, float]: ...

    @on_client
    def bad_reply(self, me, data) -> BadReply: ...

    @on_client
    def two_models(self, me, data, x: Weights, z: Weights, logits: Logits, labels: Labels) -> Update: ...


METHOD = Method()


@pytest.mark.parametrize("method", [METHOD.update, Method.update])
def test_the_call_schema_follows_the_signature(method):
    fields = call_schema(method).fields
    assert [(f.name, f.kind, f.form, f.optional) for f in fields] == [
        ("x", Kind.WEIGHTS, Form.PARAMS, False),
        ("c", Kind.VARIATES, Form.PARAMS, True),
        ("images", Kind.IMAGES, Form.TENSOR, False),
        ("seed", Kind.SEEDS, Form.INT, False),
    ]


@pytest.mark.parametrize("method", [METHOD.update, Method.update])
def test_the_reply_schema_follows_the_named_tuple(method):
    fields = reply_schema(method).fields
    assert [(f.name, f.kind, f.form, f.optional) for f in fields] == [
        ("y", Kind.WEIGHTS, Form.PARAMS, False),
        ("factors", Kind.FACTORS, Form.TENSORS, False),
        ("loss", Kind.SCALARS, Form.FLOAT, True),
    ]
    assert reply_type(method) is Update


def test_a_method_may_take_and_return_nothing():
    assert call_schema(METHOD.nothing).fields == ()
    assert reply_schema(METHOD.nothing).fields == ()
    assert reply_type(METHOD.nothing) is None


def test_fields_are_found_by_name():
    schema = call_schema(METHOD.update)
    assert [schema.index(n) for n in ("x", "c", "images", "seed")] == [0, 1, 2, 3]


def test_max_bytes_bounds_one_field():
    bounded, free = call_schema(METHOD.bounded).fields
    assert (bounded.kind, bounded.form, bounded.max_bytes) == (Kind.PROTOTYPES, Form.TENSOR, 4096)
    assert free.max_bytes == DEFAULT_MAX_BYTES == 2**30


@pytest.mark.parametrize(
    ("method", "field"), [(METHOD.unmarked, "tensor"), (METHOD.bare, "x"), (METHOD.two_kinds, "x")]
)
def test_an_argument_without_exactly_one_kind_is_named(method, field):
    with pytest.raises(ValueError, match=rf"Method\.{method.__name__}: '{field}' has no kind; annotate it with"):
        call_schema(method)


def test_a_reply_field_without_a_kind_is_named():
    with pytest.raises(ValueError, match=r"BadReply: 'extra' has no kind"):
        reply_schema(METHOD.bad_reply)


@pytest.mark.parametrize("method", [METHOD.no_return, METHOD.plain_tuple])
def test_the_return_annotation_must_be_a_named_tuple_or_none(method):
    with pytest.raises(ValueError, match=rf"{method.__name__}: the return annotation must be a NamedTuple"):
        reply_schema(method)


def test_a_reply_field_is_compared_with_the_only_argument_of_its_kind():
    y, factors, loss = reply_schema(METHOD.update).fields
    one = call_schema(METHOD.update)
    assert reference_for(y, one) is one.fields[0]
    assert reference_for(factors, one) is None
    assert reference_for(loss, one) is None


def test_two_arguments_of_its_kind_leave_the_reference_open():
    y = reply_schema(METHOD.two_models).fields[0]
    assert reference_for(y, call_schema(METHOD.two_models)) is None


def test_the_numbers_of_kinds_and_forms_do_not_change():
    """They travel in headers."""
    kinds = [
        *("WEIGHTS", "VARIATES", "GRADIENTS", "LOGITS", "PROTOTYPES", "MASKS", "IMAGES", "LATENTS", "LABELS"),
        *("FACTORS", "SEEDS", "HISTOGRAM", "GENERATOR", "SCALARS", "REPORT", "PLAN"),
    ]
    forms = ["NONE", "PARAMS", "TENSOR", "TENSORS", "FLOAT", "INT", "HELD", "FOLDED"]
    assert {k.name: k.value for k in Kind} == {n: i for i, n in enumerate(kinds, start=1)}
    assert {f.name: f.value for f in Form} == {n: i for i, n in enumerate(forms)}
    assert Kind.VARIATES.label == "variates"
