"""The codec: what is sent arrives as it was, and nothing but a sound head is ever more than a BadMessage.

Hostile heads are packed by hand here, from the format as it is written down, not with the code under test.
"""

import math
import struct
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fldist.kinds import HELD, Field, Form, Kind, Schema
from fldist.params import Layout, Params
from fldist.wire.codec import (
    FIXED_BYTES,
    INLINE_BYTES,
    MAX_HEAD_BYTES,
    MAX_NOTE_BYTES,
    Expected,
    Frame,
    FrameBuilder,
    FrameType,
    Head,
    Message,
    Place,
    Status,
    decode,
    encode,
    head_length,
    values_of,
)
from fldist.wire.errors import BadMessage

LAYOUT = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))  # 12 trainable, 16 floats, 1 integer
MAX_BYTES = 2 * INLINE_BYTES
NO_PART = 0xFFFFFFFF


def a_field(name, kind, form, optional=False, max_bytes=MAX_BYTES):
    return Field(name, kind, form, optional, max_bytes)


TENSOR, PARAMS, TENSORS, FLOAT, OPTIONAL, RICH, NOTHING = range(1, 8)  # method numbers
SCHEMAS = {
    TENSOR: Schema((a_field("logits", Kind.LOGITS, Form.TENSOR),)),
    PARAMS: Schema((a_field("x", Kind.WEIGHTS, Form.PARAMS),)),
    TENSORS: Schema((a_field("factors", Kind.FACTORS, Form.TENSORS),)),
    FLOAT: Schema((a_field("n", Kind.SCALARS, Form.FLOAT),)),
    OPTIONAL: Schema((a_field("logits", Kind.LOGITS, Form.TENSOR, optional=True),)),
    RICH: Schema(
        (
            a_field("x", Kind.WEIGHTS, Form.PARAMS),
            a_field("logits", Kind.LOGITS, Form.TENSOR),
            a_field("factors", Kind.FACTORS, Form.TENSORS),
            a_field("n", Kind.SCALARS, Form.INT),
            a_field("loss", Kind.SCALARS, Form.FLOAT),
            a_field("masks", Kind.MASKS, Form.TENSOR, optional=True),
        )
    ),
    NOTHING: Schema(()),
}
EXPECTED = Expected(SCHEMAS.get, lambda client: LAYOUT, once=True)


def some_params(seed=0):
    params = Params.zeros(LAYOUT)
    params.floats.copy_(torch.randn(16, generator=torch.Generator().manual_seed(seed)))
    params.ints.fill_(7 + seed)
    return params


def build(method, values, *, clients=(0,), share=True, once=None, **head):
    builder = FrameBuilder(Head(FrameType.CALL, method=method, **head), share=share)
    for client in clients:
        builder.add(Message(client), SCHEMAS[method], values, once)
    return builder.frame


def carried(frame):
    """What the other end gets: the decoded head, its bodies allocated and filled."""
    arrived = decode(encode(frame), EXPECTED)
    arrived.allocate()
    for source, target in zip(frame.bodies, arrived.bodies, strict=True):
        target.flat().copy_(source.flat())
    return arrived


def sent_and_received(method, *values, once=None):
    arrived = carried(build(method, values, once=once))
    return values_of(arrived, arrived.messages[0], LAYOUT)


def rich_frame():
    frame = FrameBuilder(Head(FrameType.CALL, method=RICH, round=3))
    factors = {"a": torch.arange(3), "b": torch.tensor([1.5])}
    values = [some_params(), torch.ones(2, 3), factors, -5, 0.25, None]
    frame.add(Message(4), SCHEMAS[RICH], values, {"x": 9})
    values = [some_params(1), torch.ones(1050), {}, 2**40, float("inf"), torch.zeros(2, dtype=torch.bool)]
    frame.add(Message(9, ready_ns=11), SCHEMAS[RICH], values)
    frame.frame.messages.append(Message(12, status=Status.ERROR, error="kaputt ä"))
    frame.frame.note = {"verdicts": [{"round": 2, "commit": True}]}
    return frame.frame


# ---- what is sent arrives


@pytest.mark.parametrize("travel", ["all", "floats", "params"])
def test_params_arrive_in_every_travelling_part(travel):
    sent = some_params().restricted(travel)
    (got,) = sent_and_received(PARAMS, sent)
    assert got.layout == sent.layout
    assert got.equals(sent)
    assert got.floats.data_ptr() != sent.floats.data_ptr()


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("size", [24, 4096], ids=["inline", "body"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_arrives(dtype, size):
    sent = (torch.arange(size // dtype.itemsize) % 3 * -1).to(dtype)  # -1 is 255 as uint8 and true as bool
    (got,) = sent_and_received(TENSOR, sent)
    assert got.dtype is dtype
    assert torch.equal(got, sent)
    assert sent.any()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(24.0)[::2],
        torch.ones(3, requires_grad=True),
        torch.zeros(1, 1, 1, 1, 1, 1, 1, 2),
    ],
    ids=["scalar", "transposed", "strided", "requires grad", "8 dimensions"],
)
def test_tensors_of_any_shape_arrive(tensor):
    (got,) = sent_and_received(TENSOR, tensor)
    assert got.shape == tensor.shape
    assert torch.equal(got, tensor)
    assert not got.requires_grad


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 5)])
def test_empty_tensors_arrive(shape):
    (got,) = sent_and_received(TENSOR, torch.empty(shape, dtype=torch.int16))
    assert got.shape == shape
    assert got.dtype is torch.int16


def test_named_tensors_arrive_in_order():
    sent = {"a.b": torch.randn(3, 2), "ü": torch.empty(0), "": torch.randn(1030)}
    (got,) = sent_and_received(TENSORS, sent)
    assert list(got) == list(sent)
    assert all(torch.equal(got[name], sent[name]) for name in sent)
    assert sent_and_received(TENSORS, {}) == [{}]


@pytest.mark.parametrize("number", [0, -1, 2**63 - 1, -(2**63), 0.0, -0.5, 1e308, 5e-324, float("inf"), float("-inf")])
def test_numbers_arrive_with_their_type(number):
    (got,) = sent_and_received(FLOAT, number)
    assert got == number
    assert type(got) is type(number)


def test_nan_arrives():
    (got,) = sent_and_received(FLOAT, float("nan"))
    assert math.isnan(got)


def test_none_arrives_where_the_schema_allows_it():
    assert sent_and_received(OPTIONAL, None) == [None]
    (got,) = sent_and_received(OPTIONAL, torch.ones(2))
    assert torch.equal(got, torch.ones(2))


@pytest.mark.parametrize("version", [0, -1, 2**63 - 1])
@pytest.mark.parametrize(("method", "value"), [(TENSOR, torch.ones(2)), (FLOAT, 1.0), (PARAMS, some_params())])
def test_the_version_of_once_arrives(method, value, version):
    name = SCHEMAS[method].fields[0].name
    arrived = carried(build(method, [value], once={name: version}))
    assert arrived.messages[0].fields[0].version == version
    assert carried(build(method, [value])).messages[0].fields[0].version is None
    held = carried(build(method, [HELD], once={name: version}))
    assert held.parts == []
    assert held.messages[0].fields[0].version == version
    assert values_of(held, held.messages[0], LAYOUT) == [HELD]


def test_only_calls_have_values_given_once():
    data = encode(build(FLOAT, [HELD], once={SCHEMAS[FLOAT].fields[0].name: 1}))
    with pytest.raises(BadMessage, match="given as Once, which only a call's arguments are"):
        decode(data, Expected(SCHEMAS.get, lambda client: LAYOUT))


def test_what_is_held_needs_a_version():
    with pytest.raises(ValueError, match="has the form HELD"):
        build(FLOAT, [HELD])


def test_everything_of_head_and_messages_arrives():
    frame = rich_frame()
    head = frame.head
    head.run_id, head.epoch, head.incarnation, head.round, head.attempt = bytes(range(16)), 1, 2, 3, 4
    head.call, head.stage, head.seq, head.sent_ns, head.flags = 5, 6, 2**32 - 1, -(2**63), 1
    frame.messages[1].received_ns, frame.messages[1].started_ns = 2**62, 17
    arrived = carried(frame)
    assert arrived.head == head
    assert arrived.note == {"verdicts": [{"round": 2, "commit": True}]}
    assert [m.client for m in arrived.messages] == [4, 9, 12]
    second, third = arrived.messages[1:]
    assert (second.received_ns, second.started_ns, second.ready_ns) == (2**62, 17, 11)
    assert (third.status, third.error, third.fields) == (Status.ERROR, "kaputt ä", [])
    assert arrived.head_bytes == frame.head_bytes == len(encode(frame))


def test_a_head_is_packed_as_written_down():
    frame = build(TENSOR, [torch.tensor([1.0, 2.0])], clients=[7])
    assert encode(frame) == a_head([a_part(shape=(2,))], [a_message(a_tensor(0), client=7)], inline=two_floats())


def test_an_error_text_of_any_length_stays_decodable():
    frame = Frame(Head(FrameType.REPLY, method=NOTHING))
    frame.messages.append(Message(0, status=Status.ERROR, error="x" + "ä" * MAX_NOTE_BYTES))
    arrived = decode(encode(frame), EXPECTED)
    assert arrived.messages[0].error.startswith("xää")


# ---- parts


def test_a_tensor_that_several_clients_are_sent_is_one_part():
    params = some_params()
    assert len(build(PARAMS, [params], clients=range(5)).parts) == 2  # floats and integers
    assert len(build(PARAMS, [params], clients=range(5), share=False).parts) == 10
    arrived = carried(build(PARAMS, [params], clients=range(5)))
    got = [values_of(arrived, m, LAYOUT)[0] for m in arrived.messages]
    assert len(got) == 5
    assert all(g.equals(params) for g in got)


def test_equal_tensors_and_other_kinds_are_parts_of_their_own():
    schema = Schema((a_field("a", Kind.LOGITS, Form.TENSOR), a_field("b", Kind.MASKS, Form.TENSOR)))
    tensor = torch.ones(3)
    builder = FrameBuilder(Head(FrameType.CALL))
    builder.add(Message(0), schema, [tensor, tensor])
    builder.add(Message(1), schema, [tensor, tensor.clone()])
    assert [p.kind for p in builder.frame.parts] == [Kind.LOGITS, Kind.MASKS, Kind.MASKS]


@pytest.mark.parametrize(("size", "inline"), [(4095, True), (4096, False), (4097, False)])
def test_parts_of_4096_bytes_and_more_are_bodies(size, inline):
    frame = build(TENSOR, [torch.arange(size).to(torch.uint8)])
    (part,) = frame.parts
    assert (part.bytes, part.place is Place.INLINE) == (size, inline)
    assert (frame.body_bytes, len(frame.bodies)) == ((0, 0) if inline else (size, 1))
    assert (len(encode(frame)) > size) == inline
    arrived = decode(encode(frame), EXPECTED)
    assert (arrived.parts[0].tensor is not None) == inline
    arrived = carried(frame)
    assert torch.equal(arrived.parts[0].tensor, part.tensor)


def test_decoded_and_allocated_tensors_lie_at_64_byte_boundaries():
    sizes = [1, 2, 3, 5, 7, 11, 63, 4095, 4096, 4097, 5001]
    builder = FrameBuilder(Head(FrameType.CALL, method=TENSOR))
    for client, size in enumerate(sizes):
        builder.add(Message(client), SCHEMAS[TENSOR], [torch.zeros(size, dtype=torch.uint8)])
    arrived = decode(encode(builder.frame), EXPECTED)
    arrived.allocate()
    assert [p.tensor.data_ptr() % 64 for p in arrived.parts] == [0] * len(sizes)
    assert [p.place is Place.INLINE for p in arrived.parts] == [s < 4096 for s in sizes]


def test_the_checksum_covers_the_bodies_in_order():
    first, second = torch.randn(2000), torch.randn(4000).to(torch.bfloat16)
    builder = FrameBuilder(Head(FrameType.CALL, method=TENSOR))
    for client, tensor in enumerate([first, torch.ones(3), second]):
        builder.add(Message(client), SCHEMAS[TENSOR], [tensor])
    raw = first.numpy().tobytes() + second.view(torch.int16).numpy().tobytes()
    assert builder.frame.checksum() == zlib.crc32(raw)
    first[0] += 1
    assert builder.frame.checksum() != zlib.crc32(raw)


# ---- what cannot be sent


@pytest.mark.parametrize(
    ("method", "value"),
    [
        (TENSOR, None),
        (TENSOR, 1.0),
        (TENSOR, torch.zeros(2, dtype=torch.complex64)),
        (TENSOR, torch.zeros([1] * 9)),
        (TENSOR, torch.zeros(MAX_BYTES + 1, dtype=torch.uint8)),
        (PARAMS, torch.zeros(16)),
        (TENSORS, torch.zeros(1)),
        (TENSORS, {"a": 1.0}),
        (TENSORS, {0: torch.ones(1)}),
        (FLOAT, True),
        (FLOAT, "1"),
        (FLOAT, torch.tensor(1.0)),
        (FLOAT, 2**63),
        (FLOAT, -(2**63) - 1),
    ],
)
def test_a_value_that_cannot_travel_is_refused_and_adds_nothing(method, value):
    with pytest.raises(ValueError):
        build(method, [value])


def test_a_refused_message_leaves_the_frame_as_it_was():
    schema = Schema((*SCHEMAS[TENSOR].fields, *SCHEMAS[FLOAT].fields))
    tensor = torch.ones(3)
    builder = FrameBuilder(Head(FrameType.CALL))
    for values in ([tensor, "no number"], [tensor], [tensor, 1.0, 2.0]):
        with pytest.raises(ValueError):
            builder.add(Message(0), schema, values)
        assert (builder.frame.parts, builder.frame.messages) == ([], [])
    builder.add(Message(0), schema, [tensor, 1.0])
    assert len(builder.frame.parts) == len(builder.frame.messages) == 1


# ---- damage


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_flipped_byte_of_a_head_is_a_bad_message(data):
    head = bytearray(RICH_HEAD)
    head[data.draw(st.integers(0, len(head) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BadMessage):
        decode(bytes(head), EXPECTED)


def test_every_single_flipped_bit_of_a_control_frame_is_a_bad_message():
    head = encode(Frame(Head(FrameType.JOIN), note={"rank": 1}))
    for bit in range(8 * len(head)):
        damaged = bytearray(head)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadMessage):
            decode(bytes(damaged), None)


def test_a_head_cut_off_behind_its_fixed_fields_is_a_bad_message():
    for length in range(FIXED_BYTES, len(RICH_HEAD)):
        with pytest.raises(BadMessage):
            decode(RICH_HEAD[:length], EXPECTED)
        with pytest.raises(BadMessage):
            decode(repaired(RICH_HEAD[:length]), EXPECTED)


def test_a_head_cut_off_within_its_fixed_fields_is_a_bad_message():
    for length in range(FIXED_BYTES):
        with pytest.raises(BadMessage):
            decode(RICH_HEAD[:length], EXPECTED)


def test_a_head_with_bytes_after_it_is_a_bad_message():
    with pytest.raises(BadMessage):
        decode(RICH_HEAD + b"\0", EXPECTED)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=FIXED_BYTES, max_size=400))
def test_random_bytes_are_a_bad_message(data):
    for expected in (EXPECTED, None):
        with pytest.raises(BadMessage):
            decode(data, expected)
        with pytest.raises(BadMessage):
            decode(repaired(b"FLD1" + struct.pack("<HB", 1, FrameType.CALL) + data), expected)


def is_sound(frame):
    """Whether a frame that was let through keeps the promises that receivers build on."""
    used = set()
    for message in frame.messages:
        if message.status is Status.ERROR:
            continue
        schema = SCHEMAS[frame.head.method]
        for spec, value in zip(schema.fields, message.fields, strict=True):
            used.update(i for i in value.parts if i != NO_PART)
            if spec.form in (Form.TENSOR, Form.TENSORS) and value.form is not Form.NONE:
                assert sum(frame.parts[i].bytes for i in value.parts) <= spec.max_bytes
        frame.allocate()
        for spec, got in zip(schema.fields, values_of(frame, message, LAYOUT), strict=True):
            kinds = {Form.TENSOR: torch.Tensor, Form.PARAMS: Params, Form.TENSORS: dict}
            assert isinstance(got, kinds.get(spec.form, int | float)) or (got is None and spec.optional)
    return used == set(range(len(frame.parts)))


INTERESTING = st.sampled_from([0, 1, 2, 3, 5, 8, 16, 0x7F, 0x80, 0x81, 0xFE, 0xFF]) | st.integers(0, 255)


@settings(max_examples=600, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), INTERESTING), min_size=1, max_size=6))
def test_a_head_with_other_contents_and_a_right_checksum_is_bad_or_sound(changes):
    head = bytearray(RICH_HEAD)
    for at, value in changes:
        head[FIXED_BYTES + at % (len(head) - FIXED_BYTES - 4)] = value
    assert_bad_or_sound(repaired(bytes(head)))


@settings(max_examples=300, deadline=None)
@given(st.integers(26, FIXED_BYTES - 1), INTERESTING)
def test_fixed_fields_with_other_contents_and_a_right_checksum_are_bad_or_sound(at, value):
    head = bytearray(RICH_HEAD)
    head[at] = value
    assert_bad_or_sound(repaired(bytes(head)))


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.binary(max_size=12))
def test_a_head_with_a_piece_replaced_and_a_right_checksum_is_bad_or_sound(at, cut, put):
    at = FIXED_BYTES + at % (len(RICH_HEAD) - FIXED_BYTES - 4)
    assert_bad_or_sound(repaired(RICH_HEAD[:at] + put + RICH_HEAD[at + cut :]))


def assert_bad_or_sound(head):
    try:
        frame = decode(head, EXPECTED)
    except BadMessage:
        return
    assert is_sound(frame)


# ---- hostile heads with a right checksum


def a_part(*, kind=Kind.LOGITS, dtype=0, encoding=0, inline=1, shape=(2,), size=None, logical=None, ndim=None):
    """dtype 0 is float32."""
    width = {0: 4, 1: 8, 4: 8, 5: 4, 8: 1}.get(dtype, 4)
    size = math.prod(shape) * width if size is None else size
    fixed = struct.pack(
        "<BBBBBQQ", kind, dtype, encoding, inline, len(shape) if ndim is None else ndim, size,
        size if logical is None else logical,
    )  # fmt: skip
    return fixed + struct.pack(f"<{len(shape)}Q", *shape)


def a_message(*fields, client=0, status=0, num_fields=None):
    num_fields = len(fields) if num_fields is None else num_fields
    return struct.pack("<IBBqqq", client, status, num_fields, 0, 0, 0) + b"".join(fields)


def a_tensor(index):
    return struct.pack("<BI", Form.TENSOR, index)


def a_params(floats, ints=NO_PART):
    return struct.pack("<BII", Form.PARAMS, floats, ints)


def named_tensors(*named, count=None):
    out = struct.pack("<BH", Form.TENSORS, len(named) if count is None else count)
    for name, index in named:
        out += struct.pack("<H", len(name)) + name + struct.pack("<I", index)
    return out


ENCODED = a_part(kind=Kind.WEIGHTS, dtype=8, shape=(4,), encoding=2) + struct.pack("<Q", 16)

ENCODED_LOGITS = a_part(dtype=8, shape=(4,), encoding=2) + struct.pack("<Q", 16)


def two_floats():
    return struct.pack("<2f", 1.0, 2.0)


def a_head(
    parts=(), messages=(), *, inline=b"", note=b"", magic=b"FLD1", version=1, kind=FrameType.CALL, method=TENSOR,
    length=None, num_parts=None, num_messages=None, note_bytes=None, inline_bytes=None,
):  # fmt: skip
    body = b"".join([*parts, *messages]) + note + inline
    fixed = struct.pack(
        "<4sHBBI16sIIIHHHHIqIIIQ", magic, version, kind, 0, FIXED_BYTES + len(body) + 4 if length is None else length,
        bytes(16), 0, 0, 0, 0, 0, 0, method, 0, 0,
        len(messages) if num_messages is None else num_messages, len(parts) if num_parts is None else num_parts,
        len(note) if note_bytes is None else note_bytes, len(inline) if inline_bytes is None else inline_bytes,
    )  # fmt: skip
    return fixed + body + struct.pack("<I", zlib.crc32(fixed + body))


def repaired(head):
    """The same head with the right length and checksum; the last four bytes are taken for the old checksum."""
    head = head[:8] + struct.pack("<I", len(head)) + head[12:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def one_tensor(part, index=0, *, inline=b"", **head):
    return a_head([part], [a_message(a_tensor(index))], inline=inline, **head)


def one_params(parts, field, inline=b""):
    return a_head(parts, [a_message(field)], inline=inline, method=PARAMS)


def an_error(text, size=None, fields=0):
    size = len(text) if size is None else size
    return a_message(struct.pack("<I", size) + text, status=1, num_fields=fields)


GOOD = {"parts": [a_part()], "messages": [a_message(a_tensor(0))], "inline": two_floats()}
RICH_HEAD = encode(rich_frame())
HUGE = 2**62
FLOATS = a_part(kind=Kind.WEIGHTS, shape=(16,))
INTS = a_part(kind=Kind.WEIGHTS, dtype=4, shape=(1,))

HOSTILE = {
    "magic": (a_head(**GOOD, magic=b"FLD2"), "magic"),
    "version": (a_head(**GOOD, version=2), "version"),
    "type 0": (a_head(**GOOD, kind=0), "frame type"),
    "type 99": (a_head(**GOOD, kind=99), "frame type"),
    "length too small": (a_head(**GOOD, length=FIXED_BYTES), "outside"),
    "length one short": (a_head(**GOOD, length=len(a_head(**GOOD)) - 1), "says"),
    "length one more": (a_head(**GOOD, length=len(a_head(**GOOD)) + 1), "says"),
    "length 4 GiB": (a_head(**GOOD, length=2**32 - 1), "outside"),
    "kind 0": (one_tensor(a_part(kind=0), inline=two_floats()), "kind"),
    "kind 17": (one_tensor(a_part(kind=17), inline=two_floats()), "kind"),
    "dtype 10": (one_tensor(a_part(dtype=10), inline=two_floats()), "dtype"),
    "dtype 255": (one_tensor(a_part(dtype=255), inline=two_floats()), "dtype"),
    "encoding 5": (one_tensor(a_part(encoding=5), inline=two_floats()), "encoding"),
    "an encoded part of floats": (one_tensor(a_part(encoding=1), inline=two_floats()), "must be uint8"),
    "an encoded tensor": (one_tensor(ENCODED_LOGITS, inline=bytes(4)), "no masked model"),
    "an encoded model where none is declared": (
        a_head([ENCODED], [a_message(a_params(0))], method=PARAMS, inline=bytes(4)),
        "no masked model",
    ),
    "an encoded model of 2^64 - 1 floats": (
        a_head(
            [a_part(kind=Kind.WEIGHTS, dtype=8, shape=(4,), encoding=2) + struct.pack("<Q", 2**64 - 1)],
            [a_message(a_params(0))], method=PARAMS, inline=bytes(4),
        ),
        "no masked model",
    ),
    "an encoded part that ends before its number of floats": (one_tensor(a_part(dtype=8, shape=(4,), encoding=2)), ""),
    "place 3": (one_tensor(a_part(inline=3), inline=two_floats()), "place"),
    "small body": (one_tensor(a_part(inline=0)), "wrong place"),
    "large inline": (one_tensor(a_part(shape=(1024,)), inline=bytes(4096)), "wrong place"),
    "9 dimensions": (one_tensor(a_part(shape=(1,) * 9), inline=bytes(4)), "9 dimensions"),
    "200 dimensions": (one_tensor(a_part(shape=(1,) * 200), inline=bytes(4)), "200 dimensions"),
    "200 dimensions that are not there": (one_tensor(a_part(ndim=200), inline=two_floats()), "200 dimensions"),
    "8 dimensions that are not there": (one_tensor(a_part(ndim=8)), ""),
    "shape 2^62 bytes": (one_tensor(a_part(dtype=8, shape=(HUGE,), inline=0)), "allowed|part of shape"),
    "shape 2^62 floats": (one_tensor(a_part(shape=(HUGE,), size=0)), "cannot have|part of shape"),
    "shape 2^64 - 1": (one_tensor(a_part(dtype=8, shape=(2**64 - 1,), size=2**64 - 1, inline=0)), "allowed|shape"),
    "shape product 2^64 is not 0": (one_tensor(a_part(dtype=8, shape=(2**32, 2**32), size=0)), "cannot have"),
    "shape product 2^64 + 8 is not 8": (one_tensor(a_part(dtype=8, shape=(2**61 + 1, 8), size=8)), "cannot have"),
    "an empty shape with 2^63": (one_tensor(a_part(shape=(2**63, 0), size=0)), ""),
    "an empty shape with 2^64 - 1": (one_tensor(a_part(shape=(0, 2**64 - 1), size=0)), ""),
    "an empty shape with 2^80": (one_tensor(a_part(shape=(2**40, 2**40, 0), size=0)), ""),
    "one byte more than the shape": (one_tensor(a_part(size=9), inline=bytes(9)), "cannot have"),
    "one byte less than the shape": (one_tensor(a_part(size=7), inline=bytes(7)), "cannot have"),
    "logical bytes differ": (one_tensor(a_part(logical=9), inline=two_floats()), "cannot have"),
    "part index out of range": (one_tensor(a_part(), 1, inline=two_floats()), "part 1 of 1"),
    "a tensor without a part": (a_head([], [a_message(a_tensor(NO_PART))]), ""),
    "named tensors without a part": (a_head([], [a_message(named_tensors((b"a", NO_PART)))], method=TENSORS), ""),
    "an optional tensor without a part": (a_head([], [a_message(a_tensor(NO_PART))], method=OPTIONAL), ""),
    "unused part": (a_head([a_part()] * 2, [a_message(a_tensor(0))], inline=two_floats() * 2), "no message uses"),
    "a client named twice": (a_head([a_part()], [a_message(a_tensor(0), client=3)] * 2, inline=two_floats()), "twice"),
    "parts without messages": (a_head([a_part()], inline=two_floats()), "no message uses"),
    "wrong kind for the field": (one_tensor(a_part(kind=Kind.WEIGHTS), inline=two_floats()), "of kind logits"),
    "a number for a tensor": (a_head([], [a_message(struct.pack("<Bd", Form.FLOAT, 1.0))]), "form"),
    "a tensor for a number": (one_tensor(a_part(), inline=two_floats(), method=FLOAT), "form"),
    "params for a tensor": (
        a_head([FLOATS, INTS], [a_message(a_params(0, 1))], inline=bytes(72)), "form"),
    "none for a tensor": (a_head([], [a_message(bytes([Form.NONE]))]), "form"),
    "form 9": (a_head([], [a_message(b"\x09")]), "form"),
    "form 127 with a version": (a_head([], [a_message(b"\xff" + bytes(8))]), "form"),
    "more bytes than MaxBytes": (
        one_tensor(a_part(dtype=8, shape=(MAX_BYTES + 1,), inline=0)), str(MAX_BYTES)),
    "more bytes than MaxBytes in all": (
        a_head(
            [a_part(kind=Kind.FACTORS, dtype=8, shape=(MAX_BYTES,), inline=0),
             a_part(kind=Kind.FACTORS, dtype=8, shape=(1,))],
            [a_message(named_tensors((b"a", 0), (b"b", 1)))], inline=b"\0", method=TENSORS,
        ), str(MAX_BYTES)),
    "no fields": (a_head([], [a_message()]), "0 fields"),
    "a field too many": (a_head([a_part()], [a_message(a_tensor(0), a_tensor(0))], inline=two_floats()), "2 fields"),
    "255 fields that are not there": (a_head([a_part()], [a_message(a_tensor(0), num_fields=255)]), ""),
    "unknown method": (a_head(**GOOD, method=77), "method number 77"),
    "method 65535": (a_head(**GOOD, method=65535), "method number"),
    "params of 15 floats": (
        one_params([a_part(kind=Kind.WEIGHTS, shape=(15,)), INTS], a_params(0, 1), bytes(68)), "15 floats"),
    "params of 2^60 floats": (
        one_params([a_part(kind=Kind.WEIGHTS, shape=(2**60,), inline=0), INTS], a_params(0, 1), bytes(8)), "floats"),
    "params of 2^59 integers": (
        one_params([FLOATS, a_part(kind=Kind.WEIGHTS, dtype=4, shape=(2**59,), inline=0)], a_params(0, 1), bytes(64)),
        "integers"),
    "trainable params with integers": (
        one_params([a_part(kind=Kind.WEIGHTS, shape=(12,)), INTS], a_params(0, 1), bytes(56)), "12 floats"),
    "params without floats": (one_params([INTS], a_params(NO_PART, 0), bytes(8)), "no float block"),
    "params of float64": (
        one_params([a_part(kind=Kind.WEIGHTS, dtype=1, shape=(16,)), INTS], a_params(0, 1), bytes(136)), "float32"),
    "params with int32": (
        one_params([FLOATS, a_part(kind=Kind.WEIGHTS, dtype=5, shape=(1,))], a_params(0, 1), bytes(68)), "int64"),
    "params of two dimensions": (
        one_params([a_part(kind=Kind.WEIGHTS, shape=(4, 4)), INTS], a_params(0, 1), bytes(72)), "float32"),
    "params whose floats are its integers": (one_params([FLOATS], a_params(0, 0), bytes(64)), "int64"),
    "note longer than the head": (a_head(**GOOD, note_bytes=2**32 - 1), "note"),
    "inline longer than the head": (a_head(**GOOD, inline_bytes=2**64 - 1), "inline"),
    "inline a byte short": (a_head([a_part()], [a_message(a_tensor(0))], inline=bytes(7)), "shorter"),
    "inline a byte long": (a_head([a_part()], [a_message(a_tensor(0))], inline=bytes(9)), "longer"),
    "bytes between tables and note": (a_head([a_part()], [a_message(a_tensor(0)), b"!"], inline=two_floats(),
                                             num_messages=1), "length"),
    "note a list": (a_head(note=b"[1]"), "object"),
    "note a number": (a_head(note=b"1"), "object"),
    "note no JSON": (a_head(note=b"{"), "damaged"),
    "note not UTF-8": (a_head(note=b'{"a": "\xff\xfe"}'), "damaged"),
    "note nested 100000 deep": (a_head(note=b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), ""),
    "note with a number of 5000 digits": (a_head(note=b'{"a": ' + b"9" * 5000 + b"}"), ""),
    "2^32 - 1 parts": (a_head(**GOOD, num_parts=2**32 - 1), "do not fit"),
    "2^32 - 1 messages": (a_head(**GOOD, num_messages=2**32 - 1), "do not fit"),
    "a message that is not there": (a_head(**GOOD, num_messages=2), ""),
    "a part that is not there": (a_head(**GOOD, num_parts=2), ""),
    "status 3": (a_head([], [a_message(status=3)], method=NOTHING), "status"),
    "an error with fields": (a_head([], [an_error(b"no", fields=1) + b"\0"], method=NOTHING), "error with fields"),
    "an error text of 4 GiB": (a_head([], [an_error(b"no", size=2**32 - 1)], method=NOTHING), "error text"),
    "an error text that is cut off": (a_head([], [an_error(b"no", size=3)], method=NOTHING), ""),
    "an error text not UTF-8": (a_head([], [an_error(b"\xff")], method=NOTHING), "damaged"),
    "65535 names that are not there": (a_head([], [a_message(named_tensors(count=65535))], method=TENSORS), ""),
    "a name not UTF-8": (
        a_head([a_part(kind=Kind.FACTORS)], [a_message(named_tensors((b"\xff", 0)))], inline=two_floats(),
               method=TENSORS), "damaged"),
    "a name that is cut off": (
        a_head([], [a_message(struct.pack("<BHH", Form.TENSORS, 1, 65535))], method=TENSORS), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_head_with_a_right_checksum_is_a_bad_message_before_memory_is_taken(name, monkeypatch):
    head, why = HOSTILE[name]
    taken = []
    empty = torch.empty

    def watched(shape, **options):
        taken.append(shape if isinstance(shape, int) else math.prod(shape))
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", watched)
    tracemalloc.start()
    try:
        with pytest.raises(BadMessage, match=why or None):
            decode(head, EXPECTED)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(taken, default=0) <= INLINE_BYTES
    assert peak < 2 * 2**20


def test_only_a_call_may_say_that_a_value_is_held():
    head = a_head([], [a_message(bytes([Form.HELD]))])
    frame = decode(head, EXPECTED)
    assert values_of(frame, frame.messages[0], LAYOUT) == [HELD]
    with pytest.raises(BadMessage, match="has the form HELD"):
        decode(head, Expected(SCHEMAS.get, lambda client: LAYOUT))


def test_the_hostile_heads_differ_from_good_ones_by_their_fault_alone():
    assert is_sound(decode(a_head(**GOOD), EXPECTED))
    assert is_sound(decode(one_params([FLOATS, INTS], a_params(0, 1), bytes(72)), EXPECTED))
    assert is_sound(decode(one_params([FLOATS], a_params(0), bytes(64)), EXPECTED))
    good = a_head(
        [a_part(kind=Kind.FACTORS)], [a_message(named_tensors((b"a", 0)))], inline=two_floats(), method=TENSORS
    )
    assert is_sound(decode(good, EXPECTED))
    assert decode(a_head([], [an_error(b"no")], method=NOTHING), EXPECTED).messages[0].error == "no"
    assert is_sound(decode(one_tensor(a_part(shape=(1,) * 8), inline=bytes(4)), EXPECTED))
    assert decode(one_tensor(a_part(dtype=8, shape=(MAX_BYTES,), inline=0)), EXPECTED).body_bytes == MAX_BYTES
    assert decode(a_head(note=b'{"a": [1]}'), None).note == {"a": [1]}


def test_a_client_that_there_is_not_is_a_bad_message():
    expected = Expected(SCHEMAS.get, lambda client: LAYOUT, num_clients=3)
    heads = [a_head([a_part()], [a_message(a_tensor(0), client=c)], inline=two_floats()) for c in (2, 3, 2**32 - 1)]
    assert decode(heads[0], expected).messages[0].client == 2
    for head in heads[1:]:
        with pytest.raises(BadMessage, match="no such client"):
            decode(head, expected)


def test_a_head_longer_than_its_limit_is_refused_from_its_first_bytes():
    first = a_head(length=MAX_NOTE_BYTES + 1)[:FIXED_BYTES]
    assert head_length(first) == MAX_NOTE_BYTES + 1
    with pytest.raises(BadMessage, match="outside"):
        head_length(first, MAX_NOTE_BYTES)
    assert head_length(a_head(length=MAX_HEAD_BYTES)[:FIXED_BYTES]) == MAX_HEAD_BYTES
    with pytest.raises(BadMessage, match="outside"):
        head_length(a_head(length=MAX_HEAD_BYTES + 1)[:FIXED_BYTES])


@pytest.mark.parametrize(
    "head",
    [
        a_head(**GOOD),
        a_head([], [a_message()], method=NOTHING),
        a_head([], [an_error(b"no")], method=NOTHING),
        a_head([a_part()], inline=two_floats()),
    ],
    ids=["message with a part", "empty message", "error", "part"],
)
def test_where_nothing_is_expected_messages_are_refused(head):
    with pytest.raises(BadMessage, match="none are allowed"):
        decode(head, None)


def test_where_nothing_is_expected_control_frames_pass():
    arrived = decode(encode(Frame(Head(FrameType.JOIN), note={"rank": 3})), None)
    assert (arrived.head.type, arrived.note) == (FrameType.JOIN, {"rank": 3})
