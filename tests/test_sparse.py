"""Masked models on the wire: every encoding byte for byte, what a receiver refuses, and that nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fldist
from fldist import sparse
from fldist.config import load
from fldist.kinds import Field, Form, Kind, Schema, Sparse
from fldist.models.cnn import CnnBn
from fldist.params import Layout, Params
from fldist.runner import run_here
from fldist.sparse import Kept, Positions, decode, encode, encoded_bytes, pack, refusal, smallest, unpack
from fldist.wire import codec
from fldist.wire.codec import Expected, FrameBuilder, FrameType, Head, Message, values_of
from fldist.wire.errors import BadMessage
from tests.conftest import Hosts, small

ENCODINGS = ("dense", "values", "bitmask_values", "index_values")


def a_vector(n: int, tail: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """floats [n + tail], of which `keep` marks about `share`, and keep [n]."""
    rng = torch.Generator().manual_seed(seed)
    keep = torch.rand(n, generator=rng) < share
    floats = torch.randn(n + tail, generator=rng)
    floats[:n][~keep] = 0.0
    return floats, keep


# ---- arithmetic
def test_bits_are_those_of_numpy_little_endian() -> None:
    keep = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
    assert pack(keep).tolist() == [0b00001001, 0b00000011]
    assert pack(keep).tolist() == np.packbits(keep.numpy(), bitorder="little").tolist()
    assert unpack(pack(keep), 10).tolist() == keep.tolist()


@pytest.mark.parametrize(
    ("bits", "what"),
    [([9, 3, 0], r"uint8 \[2\], not uint8 \[3\]"), ([9], r"not uint8 \[1\]"), ([9, 0b100], "bits set behind")],
)
def test_a_mask_of_another_size_is_refused(bits: list[int], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        unpack(torch.tensor(bits, dtype=torch.uint8), 10)


def test_each_encoding_by_hand() -> None:
    floats = torch.tensor([0.0, 1.5, 0.0, -2.0, 0.0, 0.0, 0.0, 0.0, 4.0, 9.0])  # 9 parameters and a buffer entry
    keep = floats[:9] != 0
    three = np.array([1.5, -2.0, 4.0, 9.0], "<f4").tobytes()
    wanted = {
        "dense": floats.numpy().astype("<f4").tobytes(),
        "values": three,
        "bitmask_values": bytes([0b00001010, 1]) + three,
        "index_values": np.array([1, 3, 8], "<i4").tobytes() + three,
    }
    for encoding in ENCODINGS:
        payload = encode(floats, 9, encoding, Positions.of(keep))
        assert payload.numpy().tobytes() == wanted[encoding]
        assert payload.numel() == encoded_bytes(encoding, 9, 3) + 4


@given(
    st.sampled_from(ENCODINGS), st.integers(1, 70), st.integers(0, 3), st.sampled_from([0.0, 0.3, 1.0]), st.integers()
)
def test_what_was_encoded_is_decoded_bit_for_bit(encoding: Any, n: int, tail: int, share: float, seed: int) -> None:
    floats, keep = a_vector(n, tail, share, seed % 2**31)
    if keep.any():
        floats[:n][int(keep.nonzero()[0])] = -0.0  # a kept zero keeps its sign, a kept NaN its bits
        floats[:n][int(keep.nonzero()[-1])] = float("nan")
    payload = encode(floats, n, encoding, Positions.of(keep))
    assert payload.numel() == encoded_bytes(encoding, n, int(keep.sum())) + 4 * tail
    assert refusal(encoding, n, tail, payload.numel()) is None
    for mask in (keep, None):
        if encoding == "values" and mask is None:
            continue
        got = decode(payload, n, tail, encoding, None if mask is None else Positions.of(mask))
        assert torch.equal(got.view(torch.int32), floats.view(torch.int32))


def test_which_encoding_is_the_smallest() -> None:
    assert smallest(3200, 3099, held=False) == "bitmask_values"  # density below 31/32
    assert smallest(3200, 3100, held=False) == "dense"
    assert smallest(3200, 99, held=False) == "index_values"  # density below 1/32
    assert smallest(3200, 100, held=False) == "bitmask_values"
    assert smallest(3200, 3199, held=True) == "values"
    assert smallest(3200, 3200, held=True) == "dense"


def test_at_a_third_pruned_positions_cost_more_than_they_save() -> None:
    n, z = 1_664_970, 1_165_479  # 70 % kept
    assert encoded_bytes("values", n, z) / (4 * n) == pytest.approx(0.70, abs=1e-6)
    assert encoded_bytes("bitmask_values", n, z) / (4 * n) == pytest.approx(0.73125, abs=1e-6)
    assert encoded_bytes("index_values", n, z) / (4 * n) == pytest.approx(1.40, abs=1e-6)


@pytest.mark.parametrize(
    ("encoding", "payload", "what"),
    [
        ("values", [1.0], "1 values came for 2 kept parameters"),
        ("values", [1.0, 2.0, 3.0], "3 values came for 2 kept parameters"),
        ("values", [1.0] * 6, "cannot have 24 bytes"),
        ("dense", [1.0] * 4, "cannot have 16 bytes"),
        ("dense", [1.0] * 5, "a parameter that the mask closes is not 0"),
    ],
)
def test_a_payload_that_the_mask_does_not_have_is_refused(encoding: Any, payload: list[float], what: str) -> None:
    keep = torch.tensor([True, False, True, False, False])
    with pytest.raises(ValueError, match=what):
        decode(torch.tensor(payload).view(torch.uint8), 5, 0, encoding, Positions.of(keep))


@pytest.mark.parametrize(
    ("positions", "what"),
    [
        ([0, 1], "a parameter that the mask closes was sent"),
        ([2, 0], "increase strictly"),
        ([2, 2], "increase strictly"),
        ([-1, 2], "increase strictly"),
        ([2, 5], "increase strictly"),
    ],
)
def test_positions_are_checked(positions: list[int], what: str) -> None:
    keep = torch.tensor([True, False, True, False, False])
    head = torch.tensor(positions, dtype=torch.int32).view(torch.uint8)
    payload = torch.cat([head, torch.tensor([1.0, 2.0]).view(torch.uint8)])
    with pytest.raises(ValueError, match=what):
        decode(payload, 5, 0, "index_values", Positions.of(keep))


def test_positions_are_kept_as_long_as_their_mask_is_there_and_as_it_was() -> None:
    sparse._known.clear()
    masks = [pack(torch.arange(40) % (k + 2) == 0) for k in range(6)]
    for mask in masks:
        assert sparse.positions(mask, 40, mask.device).index.tolist() == unpack(mask, 40).nonzero().flatten().tolist()
    assert len(sparse._known) == 4
    assert sparse.positions(masks[-1], 40, mask.device) is sparse.positions(masks[-1], 40, mask.device)
    masks[-1][0] = 0
    assert int(sparse.positions(masks[-1], 40, mask.device).index[0]) >= 8
    del masks, mask
    assert not sparse._known


def test_a_bit_mask_says_how_many_values_follow() -> None:
    payload = torch.cat([torch.tensor([0b111], dtype=torch.uint8), torch.ones(2).view(torch.uint8)])
    with pytest.raises(ValueError, match="2 values came for 3"):
        decode(payload, 5, 0, "bitmask_values", None)


def test_values_need_a_mask() -> None:
    params = Params.zeros(LAYOUT)
    with pytest.raises(ValueError, match="encoding: values needs a mask"):
        Kept(params)


def test_what_lies_outside_the_mask_does_not_travel() -> None:
    params = Params.zeros(LAYOUT)
    params.floats.fill_(float("nan"))
    keep = torch.zeros(LAYOUT.num_params, dtype=torch.bool)
    kept = Kept(params, pack(keep))
    assert not kept.value.trainable.floats.any()
    assert kept.nbytes == 4 * 4 + 8  # four buffer entries and a counter


# ---- frames
LAYOUT = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))  # 12 trainable, 16 floats, 1 integer
SPARSE = Schema((Field("x", Kind.WEIGHTS, Form.PARAMS, False, 2**20, Sparse()),))
PLAIN = Schema((Field("x", Kind.WEIGHTS, Form.PARAMS, False, 2**20),))


def a_frame(value: Any) -> codec.Frame:
    builder = FrameBuilder(Head(FrameType.CALL, method=1))
    builder.add(Message(0), SPARSE, [value])
    builder.add(Message(1), SPARSE, [value])
    return builder.frame


def arrived(frame: codec.Frame, schema: Schema = SPARSE) -> codec.Frame:
    got = codec.decode(codec.encode(frame), Expected(lambda number: schema, lambda client: LAYOUT))
    got.allocate()
    return got


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("travel", ["all", "floats", "params"])
def test_a_masked_model_arrives_in_every_travelling_part(encoding: Any, travel: Any) -> None:
    whole = Params.zeros(LAYOUT)
    whole.floats.copy_(torch.randn(16))
    whole.ints.fill_(7)
    mask = pack(torch.arange(12) % 3 == 0)
    kept = Kept(whole.restricted(travel), mask, encoding)
    frame = a_frame(kept)
    assert len(frame.parts) == (2 if travel == "all" else 1), "two clients share what they are sent"
    assert sum(p.bytes for p in frame.parts) == kept.nbytes
    got = arrived(frame)
    first, second = (values_of(got, message, LAYOUT)[0] for message in got.messages)
    assert first.params(mask).equals(kept.value)
    assert first.params(mask) is second.params(mask)


def test_an_encoded_model_is_refused_where_none_is_declared() -> None:
    kept = Kept(Params.zeros(LAYOUT), pack(torch.ones(12, dtype=torch.bool)))
    with pytest.raises(BadMessage, match="'x' is no masked model"):
        arrived(a_frame(kept), PLAIN)
    with pytest.raises(ValueError, match="'x' must be Params, got Kept"):
        FrameBuilder(Head(FrameType.CALL, method=1)).add(Message(0), PLAIN, [kept])


@pytest.mark.parametrize(("size", "floats"), [(4 * 17, 16), (4 * 3 + 1, 16), (4 * 3, 16), (4 * 12, 11)])
def test_a_size_that_no_mask_gives_is_refused_before_anything_is_allocated(size: int, floats: int) -> None:
    frame = a_frame(Kept(Params.zeros(LAYOUT), pack(torch.ones(12, dtype=torch.bool))))
    part = frame.parts[0]
    part.tensor = torch.zeros(size, dtype=torch.uint8)
    part.shape, part.bytes, part.logical_bytes, part.floats = (size,), size, size, floats
    with pytest.raises(BadMessage, match=rf"cannot have {size} bytes|has 11 floats"):
        arrived(frame)


# ---- runs
def masked(encoding: str = "values", lies: str = "", **changes: Any) -> dict[str, Any]:
    return small(
        algorithm={"name": "tests.own:MaskedModel", "encoding": encoding, "lies": lies},
        rounds=3,
        **{"clients__num_clients": 6, "clients__fraction": 0.5, **changes},
        task__model={"name": "cnn_bn", "widths": [4, 8]},
    )


def sizes() -> tuple[int, int, int, int]:
    """P, z, buffer bytes and counter bytes of the model of `masked`."""
    layout = Layout.of(CnnBn(widths=(4, 8)).build((1, 8, 8), 10))
    n = layout.num_params
    return n, n - -(-n // 3), 4 * (layout.num_floats - n), 8 * layout.num_ints


def test_every_encoding_gives_the_same_model_and_its_own_bytes(tmp_path: Path) -> None:
    n, z, buffers, counters = sizes()
    results = {e: fldist.run(masked(e), output=tmp_path / e) for e in (*ENCODINGS, "auto")}
    assert len({r["state_hash"] for r in results.values()}) == 1
    for encoding in ENCODINGS:
        one = encoded_bytes(encoding, n, z) + buffers + counters
        # 3 clients a round are sent the model and send theirs; all 6 are then shown the new one
        assert results[encoding]["bytes"]["by_kind"]["weights"] == {"up": 3 * 3 * one, "down": 3 * (3 + 6) * one}
        assert results[encoding]["bytes"]["by_kind"]["masks"] == {"up": 0, "down": 6 * -(-n // 8)}
    assert results["auto"]["bytes"]["by_kind"] == results["values"]["bytes"]["by_kind"]


@pytest.mark.parametrize("encoding", ["values", "bitmask_values"])
@pytest.mark.parametrize("topology", ["star", "collective", "reduce"])
def test_ranks_and_topologies_change_neither_the_model_nor_the_books(
    tmp_path: Path, hosts: Hosts, encoding: str, topology: str
) -> None:
    alone = fldist.run(masked(encoding), output=tmp_path / "alone")
    many = run_here(load(masked(encoding, topology=topology)), nproc=3, output=tmp_path / "many", spawn=hosts)
    assert many["state_hash"] == alone["state_hash"]
    assert many["bytes"]["by_kind"] == alone["bytes"]["by_kind"]


@pytest.mark.parametrize("encoding", ["values", "bitmask_values", "index_values", "dense"])
@pytest.mark.parametrize("lies", ["mask", "plain"])
def test_a_client_that_sends_what_the_mask_closes_is_refused(tmp_path: Path, encoding: str, lies: str) -> None:
    result = fldist.run(masked(encoding, lies, clients__fraction=1.0), output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    refusals = [line["missing"]["2"] for line in lines if "2" in line["missing"]]
    assert len(refusals) == 3
    for reason in refusals:
        assert reason.startswith("refused: y: shape: ")
    assert result["bytes"]["wasted"]["refused"]["up"] > 0


def test_models_with_zeros_of_their_own(tmp_path: Path, hosts: Hosts) -> None:
    changes = {"rounds": 2, "clients": {"num_clients": 4}}
    found = {}
    for encoding in ("dense", "bitmask_values", "index_values", "auto"):
        config = small(algorithm={"name": "tests.own:OwnZeros", "encoding": encoding}, **changes)
        found[encoding] = fldist.run(config, output=tmp_path / encoding)
    assert len({r["state_hash"] for r in found.values()}) == 1
    up = {e: r["bytes"]["by_kind"]["weights"]["up"] for e, r in found.items()}
    assert up["auto"] == up["bitmask_values"] < up["dense"] < up["index_values"] * 1.01
    many = run_here(load(config), nproc=3, output=tmp_path / "many", spawn=hosts)
    assert many["state_hash"] == found["auto"]["state_hash"]
    assert many["bytes"]["by_kind"] == found["auto"]["bytes"]["by_kind"]
    config["topology"] = "reduce"
    with pytest.raises(ValueError, match="under topology: reduce nothing tells how much each client would have sent"):
        run_here(load(config), nproc=3, output=tmp_path / "reduce", spawn=hosts)
