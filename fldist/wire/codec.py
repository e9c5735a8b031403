"""Messages and their bytes: a checked binary head, and flat bodies that travel as they lie in memory.

A frame carries the messages of one call to or from one host: head (fixed fields, table of parts, table of
messages, small parts inline, checksum), then the large parts as raw bodies. Everything about a body is known,
bounded and validated from the head before memory is allocated for it. No pickle; JSON only in control notes.

    head    magic, version, type, flags, length, run id, epoch, incarnation, round, attempt, call, stage, method,
            sequence number, time of sending, numbers of messages and parts, lengths of the note and of the inline data
    part    kind, dtype, encoding, place (body, inline or world), number of dimensions, bytes, logical bytes, shape;
            of an encoded float block, which is uint8 [bytes], the number of floats that it stands for
    message client, status, times (received, started, ready), fields: form and what the form needs
    end     crc32 of all that stands before it in the head

All integers are little-endian.
"""

from __future__ import annotations

import enum
import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fldist import blocks
from fldist.kinds import FOLDED, HELD, Field, Form, Kind, Schema
from fldist.params import Layout, Params
from fldist.sparse import Encoding as SparseEncoding
from fldist.sparse import Kept, Packed, refusal
from fldist.wire.errors import BadMessage

MAGIC = b"FLD1"
VERSION = 1
INLINE_BYTES = 4096
"""Parts smaller than this ride in the head."""
MAX_HEAD_BYTES = 64 * 2**20
MAX_NOTE_BYTES = 2**20
"""Bound of a head before its sender has proved who it is: a note and little else."""

MAX_ERROR_CHARACTERS = 8000

_HEAD = struct.Struct("<4sHBBI16sIIIHHHHIqIIIQ")
_PART = struct.Struct("<BBBBBQQ")
_MESSAGE = struct.Struct("<IBBqqq")
_CRC = struct.Struct("<I")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")
_NO_PART = 0xFFFFFFFF
_ONCE = 0x80
_MAX_DIMS = 8

_DTYPES: tuple[torch.dtype, ...] = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_DTYPE_CODES = {d: i for i, d in enumerate(_DTYPES)}


class FrameType(enum.IntEnum):
    """What a frame is for. The numbers travel: never renumber."""

    JOIN = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    READY = 5
    STORE = 6
    CALL = 7
    ACK = 8
    REPLY = 9
    VERDICT = 10
    DIGEST = 11
    HEARTBEAT = 12
    BYE = 14
    WORLD = 15
    GATHER = 16
    REDUCE = 17


class Status(enum.IntEnum):
    """Outcome that a client's message reports."""

    OK = 0
    ERROR = 1
    REFUSED = 2  # by the host's fold


class Encoding(enum.IntEnum):
    """How a part's bytes stand for its tensor. The numbers travel: never renumber."""

    RAW = 0
    DENSE = 1  # this and the next: floats of a masked model, see `fldist/sparse.py`
    VALUES = 2
    BITMASK_VALUES = 3
    INDEX_VALUES = 4

    @property
    def sparse(self) -> SparseEncoding:
        """The name in `fldist/sparse.py`; not for RAW."""
        return self.name.lower()  # type: ignore[return-value]


class Place(enum.IntEnum):
    """Where a part's bytes travel. The numbers travel: never renumber."""

    BODY = 0  # behind the head, between two ranks
    INLINE = 1  # in the head
    WORLD = 2  # between all ranks at once: broadcast with a call, gathered with its replies


CHECKSUMMED = 1
"""Head flag: the trailer behind the bodies holds their crc32."""


@dataclass
class Head:
    """The fixed fields of a frame."""

    type: FrameType
    run_id: bytes = bytes(16)
    epoch: int = 0
    incarnation: int = 0
    round: int = 0
    attempt: int = 0
    call: int = 0
    stage: int = 0
    method: int = 0
    seq: int = 0
    sent_ns: int = 0
    """The sender's monotonic clock when it began to send."""
    flags: int = 0


@dataclass
class Part:
    """One tensor of a frame; `tensor` is None until its body has been received."""

    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int
    logical_bytes: int
    place: Place
    encoding: Encoding = Encoding.RAW
    tensor: Tensor | None = None
    floats: int = 0
    """Floats that an encoded part stands for."""
    packed: Packed | None = None
    """What was made of an encoded part: clients that share it share that as well."""

    def flat(self) -> Tensor:
        """The part's bytes, uint8 [bytes], sharing memory with the tensor."""
        assert self.tensor is not None
        return self.tensor.reshape(-1).view(torch.uint8)


@dataclass
class FieldValue:
    """One field of a message: a form, and the indices of its parts or the number itself."""

    form: Form
    parts: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    number: int | float = 0
    version: int | None = None  # set for an argument given as Once


@dataclass
class Message:
    """One client's share of a frame. Times are the host's monotonic nanoseconds, 0 where they do not apply."""

    client: int
    fields: list[FieldValue] = field(default_factory=list)
    status: Status = Status.OK
    error: str = ""
    received_ns: int = 0
    started_ns: int = 0
    ready_ns: int = 0


@dataclass
class Frame:
    """A frame on either side of the wire."""

    head: Head
    messages: list[Message] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    note: dict[str, Any] = field(default_factory=dict)
    head_bytes: int = 0
    """Length of the encoded head with what is inline; set by `encode` and `decode`."""

    @property
    def bodies(self) -> list[Part]:
        """The parts that travel as bodies, in order."""
        return [p for p in self.parts if p.place is Place.BODY]

    @property
    def world(self) -> list[Part]:
        """The parts that travel between all ranks at once, in order."""
        return [p for p in self.parts if p.place is Place.WORLD]

    @property
    def body_bytes(self) -> int:
        """Bytes of all bodies."""
        return sum(p.bytes for p in self.parts if p.place is Place.BODY)

    def allocate(self, empty: Callable[..., Tensor] = blocks.empty) -> None:
        """Make room for the bodies, in blocks at 64-byte boundaries. empty: makes them."""
        for part in self.bodies:
            part.tensor = empty(part.shape, dtype=part.dtype)

    def allocate_world(self, empty: Callable[..., Tensor]) -> None:
        """Make room for what is broadcast. empty: makes the tensors."""
        for part in self.world:
            part.tensor = empty(part.shape, dtype=part.dtype)

    def drop(self) -> None:
        """Let go of all tensors; whoever keeps one has a reference of his own."""
        for part in self.parts:
            part.tensor = part.packed = None

    def checksum(self) -> int:
        """crc32 over the bodies in order."""
        crc = 0
        for part in self.bodies:
            crc = zlib.crc32(part.flat().cpu().numpy().data, crc)
        return crc


class FrameBuilder:
    """Collects the messages of one frame; a tensor that several clients are sent is one part.

    large: where parts travel that are too large for the head; place: brings those to where the link takes them from;
    small parts ride in the head, from the CPU's memory.
    """

    def __init__(
        self,
        head: Head,
        share: bool = True,
        layout: Callable[[int], Layout] | None = None,
        large: Literal[Place.BODY, Place.WORLD] = Place.BODY,
        place: Callable[[Tensor], Tensor] = Tensor.cpu,
    ) -> None:
        self.frame = Frame(head)
        self._large: Place = large
        self._place = place
        self._share = share
        self._layout = layout  # None: Params of any layout are taken
        self._known: dict[tuple[int, Kind], int] = {}
        self._keep: list[Tensor] = []  # ids are only unique while their tensors live

    def add(self, message: Message, schema: Schema, values: Sequence[Any], once: dict[str, int] | None = None) -> None:
        """Append a message whose fields have these values, in the schema's order; once: versions of `Once` values.

        What the receiver would refuse is a ValueError here, and adds nothing.
        """
        before = len(self.frame.parts)
        try:
            for spec, value in zip(schema.fields, values, strict=True):
                built = FieldValue(Form.HELD) if value is HELD else self._field(spec, value)
                if once and spec.name in once:
                    built.version = once[spec.name]
                message.fields.append(built)
            layout = self._layout(message.client) if self._layout is not None else None
            _validate_fields(message, schema, self.frame.parts, layout, once is not None, folded=True)
        except (ValueError, BadMessage) as error:
            del self.frame.parts[before:]
            self._known = {k: i for k, i in self._known.items() if i < before}
            message.fields.clear()
            raise ValueError(str(error)) from None
        self.frame.messages.append(message)

    def broadcast(self, schema: Schema, values: Mapping[str, Any]) -> None:
        """Begin with the parts of these values, which every frame of the call has, and have them broadcast."""
        self._large = Place.WORLD
        for spec in schema.fields:
            if spec.name in values:
                self._field(spec, values[spec.name])
        self._large = Place.BODY

    def _field(self, spec: Field, value: Any) -> FieldValue:
        name, kind, form, optional, sparse = spec.name, spec.kind, spec.form, spec.optional, spec.sparse is not None
        if value is FOLDED:
            return FieldValue(Form.FOLDED)
        if value is None:
            if not optional:
                raise ValueError(f"{name!r} is None; annotate it `| None` if there may be nothing to send")
            return FieldValue(Form.NONE)
        if form in (Form.FLOAT, Form.INT):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name!r} must be a number, got {type(value).__name__}")
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError(f"{name!r} is {value}, which does not fit 64 bits")
            return FieldValue(Form.INT if isinstance(value, int) else Form.FLOAT, number=value)
        if form is Form.PARAMS:
            encoding = Encoding.RAW
            if sparse and isinstance(value, Kept):
                encoding, payload, value = Encoding[value.encoding.upper()], value.payload, value.params
            if not isinstance(value, Params):
                raise ValueError(f"{name!r} must be Params, got {type(value).__name__}")
            floats = self._part(kind, value.floats if encoding is Encoding.RAW else payload)
            if encoding is not Encoding.RAW:
                part = self.frame.parts[floats]
                part.encoding, part.floats = encoding, value.layout.num_floats
            ints = self._part(kind, value.ints) if value.ints.numel() else _NO_PART
            return FieldValue(Form.PARAMS, (floats, ints))
        if form is Form.TENSOR:
            if not isinstance(value, Tensor):
                raise ValueError(f"{name!r} must be a tensor, got {type(value).__name__}")
            return FieldValue(Form.TENSOR, (self._part(kind, value),))
        if not (isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values())):
            raise ValueError(f"{name!r} must be a dict of tensors, got {type(value).__name__}")
        if len(value) >= 2**16 or not all(isinstance(k, str) and len(k.encode()) < 2**16 for k in value):
            raise ValueError(f"{name!r} must have fewer than 65,536 names, each a string of less than 65,536 bytes")
        return FieldValue(Form.TENSORS, tuple(self._part(kind, v) for v in value.values()), tuple(value))

    def _part(self, kind: Kind, tensor: Tensor) -> int:
        key = (id(tensor), kind)
        if self._share and key in self._known:
            return self._known[key]
        if tensor.dtype not in _DTYPE_CODES or tensor.ndim > _MAX_DIMS or tensor.layout is not torch.strided:
            raise ValueError(f"a {tensor.layout} tensor of {tensor.dtype}, {tensor.ndim} dimensions, cannot travel")
        self._keep.append(tensor)
        flat = tensor.detach().contiguous()
        size = flat.numel() * flat.element_size()
        place = Place.INLINE if size < INLINE_BYTES else self._large
        flat = flat.cpu() if place is Place.INLINE else self._place(flat)
        self.frame.parts.append(Part(kind, flat.dtype, tuple(flat.shape), size, size, place, tensor=flat))
        self._known[key] = len(self.frame.parts) - 1
        return len(self.frame.parts) - 1


def encode(frame: Frame) -> bytes:
    """The head of a frame, small parts inline; the bodies are `frame.bodies`."""
    h = frame.head
    tables = bytearray()
    inline = bytearray()
    for part in frame.parts:
        tables += _PART.pack(
            part.kind, _DTYPE_CODES[part.dtype], part.encoding, part.place, len(part.shape), part.bytes,
            part.logical_bytes,
        )  # fmt: skip
        tables += struct.pack(f"<{len(part.shape)}Q", *part.shape)
        if part.encoding is not Encoding.RAW:
            tables += _U64.pack(part.floats)
        if part.place is Place.INLINE:
            inline += part.flat().numpy().tobytes()
    for message in frame.messages:
        tables += _MESSAGE.pack(
            message.client, message.status, len(message.fields), message.received_ns, message.started_ns,
            message.ready_ns,
        )  # fmt: skip
        if message.status is not Status.OK:
            # cut by characters, so that what is left decodes
            text = message.error[:MAX_ERROR_CHARACTERS].encode("utf-8", "backslashreplace")
            tables += _U32.pack(len(text)) + text
        for value in message.fields:
            _encode_field(tables, value)
    note = json.dumps(frame.note).encode() if frame.note else b""
    length = _HEAD.size + len(tables) + len(note) + len(inline) + _CRC.size
    fixed = _HEAD.pack(
        MAGIC, VERSION, h.type, h.flags, length, h.run_id, h.epoch, h.incarnation, h.round, h.attempt, h.call,
        h.stage, h.method, h.seq, h.sent_ns, len(frame.messages), len(frame.parts), len(note), len(inline),
    )  # fmt: skip
    body = b"".join((fixed, tables, note, inline))
    frame.head_bytes = length
    return body + _CRC.pack(zlib.crc32(body))


def _encode_field(out: bytearray, value: FieldValue) -> None:
    once = 0 if value.version is None else _ONCE
    out.append(value.form | once)
    if value.version is not None:
        out += _I64.pack(value.version)
    if value.form is Form.FLOAT:
        out += _F64.pack(float(value.number))
    elif value.form is Form.INT:
        out += _I64.pack(int(value.number))
    elif value.form is Form.TENSORS:
        out += _U16.pack(len(value.names))
        for name, index in zip(value.names, value.parts, strict=True):
            text = name.encode()
            out += _U16.pack(len(text)) + text + _U32.pack(index)
    else:
        for index in value.parts:
            out += _U32.pack(index)


@dataclass(frozen=True)
class Expected:
    """What a receiver allows: the schema of a method's messages and the layout of a client's model."""

    schema: Callable[[int], Schema | None]
    layout: Callable[[int], Layout]
    num_clients: int = 2**32
    once: bool = False
    """Whether fields may be `Once` values, and stand for values that the receiver holds."""
    world: bool = False
    """Whether parts may travel between all ranks at once."""
    folded: bool = False
    """Whether fields may stand for what is in their host's fold."""


FIXED_BYTES = _HEAD.size


def head_length(fixed: bytes | bytearray | memoryview, limit: int = MAX_HEAD_BYTES) -> int:
    """The whole head's length, read from its first FIXED_BYTES bytes; BadMessage if these are no head."""
    if len(fixed) < FIXED_BYTES:
        raise BadMessage(f"a head has at least {FIXED_BYTES} bytes, not {len(fixed)}")
    magic, version, kind, _, length, *_ = _HEAD.unpack_from(fixed)
    if magic != MAGIC:
        raise BadMessage(f"magic is {bytes(magic)!r}, not {MAGIC!r}")
    if version != VERSION:
        raise BadMessage(f"message version {version}; this is version {VERSION}: all ranks must run the same fldist")
    if kind not in FrameType._value2member_map_:
        raise BadMessage(f"unknown frame type {kind}")
    if not _HEAD.size + _CRC.size <= length <= limit:
        raise BadMessage(f"a head of {length} bytes is outside {_HEAD.size + _CRC.size} to {limit}")
    return int(length)


def decode(data: bytes, expected: Expected | None) -> Frame:
    """Parse and validate a head. Bodies are described but not allocated.

    expected: None allows control frames only (no messages, no parts).
    """
    length = head_length(data)
    if length != len(data):
        raise BadMessage(f"the head says {length} bytes and has {len(data)}")
    if zlib.crc32(data[:-4]) != _CRC.unpack_from(data, length - 4)[0]:
        raise BadMessage("the head's checksum is wrong")
    try:
        return _parse(data, expected)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, struct.error) as error:
        if isinstance(error, BadMessage):
            raise
        raise BadMessage(f"the head's tables are damaged: {error!r}") from None


def _parse(data: bytes, expected: Expected | None) -> Frame:
    (_, _, kind, flags, length, run_id, epoch, incarnation, round_number, attempt, call, stage, method, seq, sent_ns,
     num_messages, num_parts, note_bytes, inline_bytes) = _HEAD.unpack_from(data)  # fmt: skip
    head = Head(
        FrameType(kind), run_id, epoch, incarnation, round_number, attempt, call, stage, method, seq, sent_ns, flags
    )
    end = length - _CRC.size
    inline_at = end - inline_bytes
    note_at = inline_at - note_bytes
    if note_at < _HEAD.size or ((num_messages or num_parts) and expected is None):
        raise BadMessage("the lengths of note and inline data do not fit, or messages where none are allowed")
    room = note_at - _HEAD.size
    if num_parts * _PART.size + num_messages * _MESSAGE.size > room:
        raise BadMessage(f"{num_parts} parts and {num_messages} messages do not fit into {room} bytes")
    frame = Frame(head, head_bytes=length)
    at = _HEAD.size
    inline_used = inline_at
    for _ in range(num_parts):
        part, at = _parse_part(data, at)
        if part.place is Place.INLINE:
            raw = data[inline_used : inline_used + part.bytes]
            inline_used += part.bytes
            if inline_used > end:
                raise BadMessage("inline data is shorter than its parts")
            buffer = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
            # a fresh tensor: 64-byte aligned whatever the address of the received bytes was
            part.tensor = torch.empty(part.shape, dtype=part.dtype)
            part.flat().copy_(buffer)
        frame.parts.append(part)
    if inline_used != end:
        raise BadMessage("inline data is longer than its parts")
    for _ in range(num_messages):
        message, at = _parse_message(data, at, num_parts)
        frame.messages.append(message)
    if at != note_at:
        raise BadMessage("the tables' length is wrong")
    if note_bytes:
        note = json.loads(data[note_at:inline_at])
        if not isinstance(note, dict):
            raise BadMessage("the note is not an object")
        frame.note = note
    if expected is not None:
        _validate(frame, expected)
    return frame


def _parse_part(data: bytes, at: int) -> tuple[Part, int]:
    kind, dtype, encoding, place, ndim, size, logical = _PART.unpack_from(data, at)
    at += _PART.size
    if kind not in Kind._value2member_map_ or dtype >= len(_DTYPES) or encoding not in Encoding._value2member_map_:
        raise BadMessage(f"unknown kind {kind}, dtype {dtype} or encoding {encoding}")
    if ndim > _MAX_DIMS or place not in Place._value2member_map_:
        raise BadMessage(f"a part with {ndim} dimensions at place {place}")
    shape = struct.unpack_from(f"<{ndim}Q", data, at)
    if any(dim >= 2**62 for dim in shape):
        raise BadMessage(f"a part of shape {shape}")
    elements = math.prod(shape)
    if size != elements * _DTYPES[dtype].itemsize or logical != size:
        raise BadMessage(f"a part of shape {shape} and {_DTYPES[dtype]} cannot have {size} bytes")
    if (place == Place.INLINE) != (size < INLINE_BYTES):
        raise BadMessage(f"a part of {size} bytes at the wrong place")
    at += 8 * ndim
    part = Part(Kind(kind), _DTYPES[dtype], tuple(shape), size, logical, Place(place), Encoding(encoding))
    if part.encoding is not Encoding.RAW:
        if part.dtype is not torch.uint8 or ndim != 1:
            raise BadMessage(f"an encoded part of {part.dtype} {shape}; it must be uint8 [bytes]")
        part.floats = _U64.unpack_from(data, at)[0]
        at += _U64.size
    return part, at


def _parse_message(data: bytes, at: int, num_parts: int) -> tuple[Message, int]:
    client, status, num_fields, received, started, ready = _MESSAGE.unpack_from(data, at)
    at += _MESSAGE.size
    if status not in Status._value2member_map_:
        raise BadMessage(f"unknown status {status}")
    message = Message(client, [], Status(status), "", received, started, ready)
    if message.status is not Status.OK:
        size = _U32.unpack_from(data, at)[0]
        at += _U32.size
        if size > MAX_NOTE_BYTES:
            raise BadMessage(f"an error text of {size} bytes")
        message.error = data[at : at + size].decode()
        at += size
    for _ in range(num_fields):
        value, at = _parse_field(data, at)
        for index in value.parts:
            if index >= num_parts and index != _NO_PART:
                raise BadMessage(f"a field names part {index} of {num_parts}")
        message.fields.append(value)
    return message, at


def _parse_field(data: bytes, at: int) -> tuple[FieldValue, int]:
    code = data[at]
    at += 1
    version = None
    if code & _ONCE:
        version = _I64.unpack_from(data, at)[0]
        at += _I64.size
        code &= ~_ONCE
    if code not in Form._value2member_map_:
        raise BadMessage(f"unknown form {code}")
    form = Form(code)
    value = FieldValue(form, version=version)
    if form is Form.FLOAT:
        value.number = _F64.unpack_from(data, at)[0]
        at += _F64.size
    elif form is Form.INT:
        value.number = _I64.unpack_from(data, at)[0]
        at += _I64.size
    elif form is Form.TENSORS:
        count = _U16.unpack_from(data, at)[0]
        at += _U16.size
        names = []
        indices = []
        for _ in range(count):
            size = _U16.unpack_from(data, at)[0]
            at += _U16.size
            names.append(data[at : at + size].decode())
            at += size
            indices.append(_U32.unpack_from(data, at)[0])
            at += _U32.size
        if len(set(names)) != count:
            raise BadMessage("a name stands twice in a field of named tensors")
        value.parts, value.names = tuple(indices), tuple(names)
    else:
        count = {Form.TENSOR: 1, Form.PARAMS: 2}.get(form, 0)
        value.parts = struct.unpack_from(f"<{count}I", data, at)
        at += 4 * count
    return value, at


def _validate(frame: Frame, expected: Expected) -> None:
    """Compare a frame with the schema of its method: kinds, forms, sizes; every part must be used."""
    if not frame.messages and not frame.parts:
        return
    schema = expected.schema(frame.head.method)
    if schema is None:
        raise BadMessage(f"there is no method number {frame.head.method}")
    used: set[int] = set()
    clients = {message.client for message in frame.messages}
    if len(clients) != len(frame.messages) or max(clients, default=0) >= expected.num_clients:
        raise BadMessage("a client is named twice, or there is no such client")
    for message in frame.messages:
        if message.status is Status.ERROR:
            if message.fields:
                raise BadMessage("an error with fields")
            continue
        layout = expected.layout(message.client)
        used |= _validate_fields(message, schema, frame.parts, layout, expected.once, expected.folded)
    for index, part in enumerate(frame.parts):
        if part.place is Place.WORLD and not expected.world:
            raise BadMessage("a part for all ranks, in a run whose ranks exchange two by two")
        # what is broadcast comes to hosts as well that have no client in the call
        broadcast = part.place is Place.WORLD and expected.once and any(_could_be(part, f) for f in schema.fields)
        if index not in used and not broadcast:
            raise BadMessage("the frame has parts that no message uses")


def _could_be(part: Part, spec: Field) -> bool:
    return part.kind is spec.kind and (spec.form is Form.PARAMS or part.bytes <= spec.max_bytes)


def _validate_fields(
    message: Message, schema: Schema, parts: list[Part], layout: Layout | None, once: bool, folded: bool = False
) -> set[int]:
    """Compare one message's fields with its schema; returns the parts they use."""
    used: set[int] = set()
    if len(message.fields) != len(schema.fields):
        raise BadMessage(f"{len(message.fields)} fields where the schema has {len(schema.fields)}")
    for spec, value in zip(schema.fields, message.fields, strict=True):
        if value.version is not None and not once:
            raise BadMessage(f"field {spec.name!r} is given as Once, which only a call's arguments are")
        if (value.form is Form.NONE and spec.optional) or (value.form is Form.HELD and once):
            continue
        if value.form is Form.FOLDED and folded and spec.form in (Form.PARAMS, Form.TENSOR):
            continue
        number = {Form.FLOAT, Form.INT}
        if value.form is not spec.form and not {value.form, spec.form} <= number:
            raise BadMessage(f"field {spec.name!r} has the form {value.form.name}, not {spec.form.name}")
        if _NO_PART in value.parts and spec.form is not Form.PARAMS:
            raise BadMessage(f"field {spec.name!r} has no tensor")
        named = [i for i in value.parts if i != _NO_PART]
        used.update(named)
        if any(parts[i].kind is not spec.kind for i in named):
            raise BadMessage(f"field {spec.name!r} must be of kind {spec.kind.label}")
        size = sum(parts[i].bytes for i in named)
        if spec.form is Form.PARAMS:
            _validate_params(spec, value, parts, layout)
        elif any(parts[i].encoding is not Encoding.RAW for i in named):
            raise BadMessage(f"field {spec.name!r} is no masked model, and comes encoded as one")
        elif size > spec.max_bytes:
            raise BadMessage(f"field {spec.name!r} has {size} bytes; allowed are {spec.max_bytes}")
    return used


def _validate_params(spec: Field, value: FieldValue, parts: list[Part], layout: Layout | None) -> None:
    name = spec.name
    floats_at, ints_at = value.parts
    if floats_at == _NO_PART:
        raise BadMessage(f"field {name!r} has no float block")
    floats = parts[floats_at]
    num_ints = 0
    if ints_at != _NO_PART:
        ints = parts[ints_at]
        if ints.dtype is not torch.int64 or len(ints.shape) != 1:
            raise BadMessage(f"field {name!r}: the integer block must be int64 [N]")
        num_ints = ints.shape[0]
    encoded = floats.encoding is not Encoding.RAW
    if encoded and spec.sparse is None:
        raise BadMessage(f"field {name!r} is no masked model, and comes encoded as one")
    if not encoded and (floats.dtype is not torch.float32 or len(floats.shape) != 1):
        raise BadMessage(f"field {name!r}: the float block must be float32 [N]")
    num_floats = floats.floats if encoded else floats.shape[0]
    if layout is not None and layout.fitting(num_floats, num_ints) is None:
        raise BadMessage(
            f"field {name!r} has {num_floats} floats and {num_ints} integers; the model has "
            f"{layout.num_params} trainable, {layout.num_floats} floats and {layout.num_ints} integers"
        )
    if encoded and layout is not None:
        tail = num_floats - layout.num_params
        problem = refusal(floats.encoding.sparse, layout.num_params, tail, floats.bytes)
        if problem is not None:
            raise BadMessage(f"field {name!r}: {problem}")


def value_of(frame: Frame, value: FieldValue, layout: Layout) -> Any:
    """Build a field's value from a complete frame; tensors share the frame's memory. HELD and FOLDED stay, and an
    encoded model is `Packed`: who has the mask makes Params of it."""
    if value.form is Form.NONE:
        return None
    if value.form is Form.HELD:
        return HELD
    if value.form is Form.FOLDED:
        return FOLDED
    if value.form in (Form.FLOAT, Form.INT):
        return value.number
    tensors = [None if i == _NO_PART else frame.parts[i].tensor for i in value.parts]
    if value.form is Form.PARAMS:
        floats, ints = tensors
        assert floats is not None
        coded = frame.parts[value.parts[0]]
        if coded.encoding is not Encoding.RAW:
            if coded.packed is None:
                whole = layout.fitting(coded.floats, 0 if ints is None else ints.numel())
                assert whole is not None  # `_validate` saw to it
                coded.packed = Packed(whole, coded.encoding.sparse, floats, ints)
            return coded.packed
        part = layout.fitting(floats.numel(), 0 if ints is None else ints.numel())
        assert part is not None  # `_validate` saw to it
        return Params(part, floats, ints)
    if value.form is Form.TENSOR:
        return tensors[0]
    return dict(zip(value.names, tensors, strict=True))


def values_of(frame: Frame, message: Message, layout: Layout) -> list[Any]:
    """All values of a message."""
    return [value_of(frame, f, layout) for f in message.fields]
