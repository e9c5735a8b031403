"""The ledger: costs worked by hand, sums that must agree, rows that say everything, and whole runs."""

import itertools
import json
import re
from collections import defaultdict

import pytest
import torch
from torch import nn

import fldist
from fldist.kinds import Field, Form, Kind, Schema
from fldist.params import Layout, Params
from fldist.wire import ledger as ledger_module
from fldist.wire.codec import Expected, Frame, FrameBuilder, FrameType, Head, Message, Status, decode, encode
from fldist.wire.ledger import Booked, Ledger, Totals, costs

LAYOUT = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
PARAMS_BYTES = 4 * 16 + 8  # 16 floats and a counter: 2 parts, both ride in the head
BODY_BYTES = 4 * 2000

X = Field("x", Kind.WEIGHTS, Form.PARAMS, False, 2**30)
C = Field("c", Kind.WEIGHTS, Form.TENSOR, True, 2**30)
BODY = Field("logits", Kind.LOGITS, Form.TENSOR, True, 2**30)
N = Field("n", Kind.SCALARS, Form.INT, False, 8)
LOSS = Field("loss", Kind.SCALARS, Form.FLOAT, False, 8)
SCHEMA = Schema((X, BODY, N, LOSS))


def model(seed=0):
    return Params(LAYOUT, torch.full((16,), float(seed)), torch.tensor([seed]))


def values(seed=0, *, params=None, body=True):
    return [params or model(seed), torch.full((2000,), float(seed)) if body else None, seed, 0.5]


def a_frame(*messages, schema=SCHEMA, share=True, **head):
    """An encoded frame with these messages: {client: values}."""
    builder = FrameBuilder(Head(FrameType.CALL, method=1, **head), share=share)
    for client, given in messages:
        builder.add(Message(client), schema, given)
    encode(builder.frame)
    return builder.frame


def part_bytes(dims):
    """What one part takes in the head's table."""
    return 21 + 8 * dims


HEAD_BYTES = 80 + 4  # fixed fields and checksum
MESSAGE_BYTES = 30
PARAMS_FIELD, TENSOR_FIELD, NONE_FIELD, NUMBER_FIELD = 9, 5, 1, 1  # a number's 8 bytes are payload


# ---- costs


def test_costs_of_one_message():
    frame = a_frame((3, values()))
    ((kinds, framing, wire, shared_with),) = costs(frame, SCHEMA)
    assert kinds == {Kind.WEIGHTS: (72, 72), Kind.LOGITS: (8000, 8000), Kind.SCALARS: (16, 16)}
    assert framing == HEAD_BYTES + 3 * part_bytes(1) + MESSAGE_BYTES + PARAMS_FIELD + TENSOR_FIELD + 2 * NUMBER_FIELD
    assert wire == framing + 72 + 8000 + 16
    assert shared_with is None


def test_costs_of_clients_that_share_a_model():
    params, body = model(), torch.zeros(2000)
    frame = a_frame(*((client, [params, body, client, 0.0]) for client in (5, 7, 2)))
    first, second, third = costs(frame, SCHEMA)
    fields = MESSAGE_BYTES + PARAMS_FIELD + TENSOR_FIELD + 2 * NUMBER_FIELD
    framing = HEAD_BYTES + 3 * part_bytes(1) + 3 * fields
    alone = {Kind.WEIGHTS: (72, 72), Kind.LOGITS: (8000, 8000), Kind.SCALARS: (16, 16)}
    assert first == (alone, framing, framing + 72 + 8000 + 16, None)
    assert second == third == (alone, 0, 16, 5)


def test_costs_of_clients_that_share_only_the_frame():
    params = model()
    frame = a_frame(*((client, values(params=params)) for client in (5, 7)), share=False)
    first, second = costs(frame, SCHEMA)
    fields = MESSAGE_BYTES + PARAMS_FIELD + TENSOR_FIELD + 2 * NUMBER_FIELD
    framing = HEAD_BYTES + 6 * part_bytes(1) + 2 * fields
    assert first[0] == second[0]
    assert first[1:] == (framing, framing + 8088, None)
    assert second[1:] == (0, 8088, 5)


def test_a_shared_part_is_booked_on_the_first_client_that_has_it():
    body = torch.zeros(2000)
    frame = a_frame((1, values(body=False)), (2, [model(), body, 0, 0.0]), (3, [model(), body, 0, 0.0]))
    first, second, third = costs(frame, SCHEMA)
    assert (first[2] - first[1], first[3]) == (72 + 16, None)
    assert (second[2], second[3]) == (72 + 8000 + 16, 1)
    assert (third[2], third[3]) == (72 + 16, 2)
    assert Kind.LOGITS not in first[0]
    assert second[0][Kind.LOGITS] == third[0][Kind.LOGITS] == (8000, 8000)


def test_a_message_that_names_a_tensor_twice_shares_with_nobody():
    schema = Schema((Field("a", Kind.LOGITS, Form.TENSOR, False, 2**30), BODY))
    tensor = torch.zeros(10)
    ((kinds, framing, wire, shared_with),) = costs(a_frame((4, [tensor, tensor]), schema=schema), schema)
    assert kinds == {Kind.LOGITS: (80, 80)}  # as if alone on its link
    assert wire - framing == 40
    assert shared_with is None


def test_two_fields_of_a_kind_are_booked_together():
    schema = Schema((X, C))
    ((kinds, _, _, _),) = costs(a_frame((0, [model(), torch.zeros(5)]), schema=schema), schema)
    assert kinds == {Kind.WEIGHTS: (72 + 20, 72 + 20)}


def test_nothing_and_errors_have_no_kind():
    schema = Schema((C,))
    frame = a_frame((0, [None]), schema=schema)
    frame.messages.append(Message(1, status=Status.ERROR, error="four"))
    encode(frame)
    first, second = costs(frame, schema)
    assert first == ({}, HEAD_BYTES + 2 * MESSAGE_BYTES + NONE_FIELD + 4 + len("four"), frame.head_bytes, None)
    assert second == ({}, 0, 0, 0)


def test_empty_tensors_have_their_kind_and_no_bytes():
    schema = Schema((C,))
    ((kinds, framing, wire, _),) = costs(a_frame((0, [torch.empty(0, 4)]), schema=schema), schema)
    assert kinds == {Kind.WEIGHTS: (0, 0)}
    assert framing == wire == HEAD_BYTES + MESSAGE_BYTES + TENSOR_FIELD + part_bytes(2)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("num_clients", [1, 2, 7])
def test_framing_and_distinct_payload_are_what_is_sent(num_clients, share):
    params, body = model(), torch.zeros(3000)
    frame = a_frame(
        *((client, [params, body if client % 2 else None, client, 1.0]) for client in range(num_clients)), share=share
    )
    booked = costs(frame, SCHEMA)
    distinct = sum(p.bytes for p in frame.parts) + 16 * num_clients
    wire = sum(cost[2] for cost in booked)
    assert wire == sum(cost[1] for cost in booked) + distinct
    assert wire == len(encode(frame)) + frame.body_bytes
    assert sum(cost[1] for cost in booked) == booked[0][1]


def test_both_ends_book_the_same():
    frame = a_frame(*((client, values(client)) for client in range(3)))
    expected = Expected(lambda number: SCHEMA, lambda client: LAYOUT)
    assert costs(decode(encode(frame), expected), SCHEMA) == costs(frame, SCHEMA)


def test_a_frame_without_messages_books_nothing():
    frame = Frame(Head(FrameType.VERDICT), note={"verdicts": []})
    encode(frame)
    assert costs(frame, SCHEMA) == []


# ---- totals


def booked(phase="train", direction="down", status="delivered", **changes):
    common = {
        "round": 1, "attempt": 0, "call": 1, "phase": phase, "client": 0, "rank": 1, "direction": direction,
        "kinds": {Kind.WEIGHTS: (100, 60), Kind.SCALARS: (8, 8)}, "framing_bytes": 30, "wire_bytes": 98,
        "shared_with": None, "status": status,
    }  # fmt: skip
    return Booked(**{**common, **changes})


def both(up=0, down=0):
    return {"up": up, "down": down}


def test_training_is_counted_by_kind_and_phase():
    totals = Totals()
    for phase, direction in [("train", "down"), ("train", "down"), ("distill", "down"), ("train", "up")]:
        totals.add(booked(phase, direction))
    assert totals.as_dict() == {
        "logical": both(108, 324),
        "encoded": both(68, 204),
        "framing": both(30, 90),
        "wire": both(98, 294),
        "by_kind": {"scalars": both(8, 24), "weights": both(100, 300)},
        "by_phase": {"distill": both(0, 108), "train": both(108, 216)},
        "wasted": {},
        "transport": both(),
        "encoded_by_phase": {"distill": both(0, 68), "train": both(68, 136)},
        "wire_by_phase": {"distill": both(0, 98), "train": both(98, 196)},
        "by_phase_and_kind": {
            "distill.scalars": both(0, 8), "distill.weights": both(0, 100),
            "train.scalars": both(8, 16), "train.weights": both(100, 200),
        },
    }  # fmt: skip
    assert totals.nested()["train"] == {"scalars": both(8, 16), "weights": both(100, 200)}


@pytest.mark.parametrize("phase", ["setup", "select", "evaluate"])
def test_other_phases_are_counted_by_phase_alone(phase):
    totals = Totals()
    totals.add(booked(phase, "up"))
    got = totals.as_dict()
    assert got["by_phase"] == {phase: both(108)}
    assert got["by_phase_and_kind"] == {f"{phase}.scalars": both(8), f"{phase}.weights": both(100)}
    assert (got["framing"], got["wire"]) == (both(30), both(98))
    assert got["logical"] == got["encoded"] == both()
    assert got["by_kind"] == got["wasted"] == {}


@pytest.mark.parametrize("status", ["late", "lost", "resent", "refused"])
def test_what_was_not_delivered_is_wasted(status):
    totals = Totals()
    totals.add(booked(status=status))
    totals.add(booked("evaluate", status=status))
    got = totals.as_dict()
    assert got["wasted"] == {status: both(0, 216)}
    assert (got["framing"], got["wire"]) == (both(0, 60), both(0, 196))
    assert got["logical"] == got["encoded"] == both()
    assert got["by_kind"] == got["by_phase"] == got["by_phase_and_kind"] == {}


def test_what_a_run_has_spent_leaves_scoring_out_and_counts_setup_and_selection():
    totals = Totals()
    for phase, direction in [("setup", "down"), ("select", "up"), ("train", "down"), ("evaluate", "down")]:
        totals.add(booked(phase, direction))
    totals.add(booked("train", "up", "late"))
    totals.add_transport(1000, 1000)
    assert totals.spent() == {
        "uplink_bytes": 68, "downlink_bytes": 136,
        "wire_uplink_bytes": 196, "wire_downlink_bytes": 196,
    }  # fmt: skip
    assert Totals.of(totals.as_dict()).spent() == totals.spent()


def test_transport_is_part_of_wire():
    totals = Totals()
    totals.add(booked())
    totals.add_transport(5, 7)
    totals.add_transport(1, 0)
    assert totals.transport == both(6, 7)
    assert totals.wire == both(6, 105)


# ---- settling


@pytest.mark.parametrize("first", ["delivered", "late", "lost", "resent", "refused"])
@pytest.mark.parametrize("second", ["delivered", "late", "lost", "resent", "refused"])
def test_the_first_outcome_counts_but_what_was_delivered_may_prove_useless(first, second):
    message = booked(status="open")
    message.settle(first, 10)
    message.settle(second, 20)
    changes = first == "delivered" and second in ("late", "refused", "resent")
    assert message.status == (second if changes else first)
    if first != "delivered":
        assert message.done_ns == 10


def test_an_outcome_without_a_time_keeps_the_time():
    message = booked(status="open", done_ns=5)
    message.settle("lost")
    assert (message.status, message.done_ns) == ("lost", 5)


# ---- the file


KIND_COLUMNS = [
    "round", "attempt", "call", "phase", "client", "rank", "direction", "kind", "codec", "logical_bytes",
    "encoded_bytes", "ready_ns", "sent_ns", "done_ns", "status",
]  # fmt: skip
MESSAGE_COLUMNS = [
    "round", "attempt", "call", "phase", "client", "rank", "direction", "framing_bytes", "wire_bytes",
    "shared_with", "started_ns", "ready_ns", "sent_ns", "done_ns", "status",
]  # fmt: skip


def rows_of(*paths):
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def sums_of(rows):
    """What `bytes` of result.json must hold, transport apart, from the rows of messages.jsonl alone."""
    sums = {name: both() for name in ("logical", "encoded", "framing", "wire")}
    by_kind, by_phase, wasted, encoded_by_phase, wire_by_phase, kinds = (defaultdict(both) for _ in range(6))
    for row in rows:
        way, delivered = row["direction"], row["status"] == "delivered"
        if row["row"] == "message":
            sums["framing"][way] += row["framing_bytes"]
            sums["wire"][way] += row["wire_bytes"]
            wire_by_phase[row["phase"]][way] += row["wire_bytes"]
            if delivered:
                encoded_by_phase[row["phase"]][way] += 0
            (by_phase[row["phase"]] if delivered else wasted[row["status"]])[way] += 0
            continue
        (by_phase[row["phase"]] if delivered else wasted[row["status"]])[way] += row["logical_bytes"]
        if delivered:
            encoded_by_phase[row["phase"]][way] += row["encoded_bytes"]
            kinds[f"{row['phase']}.{row['kind']}"][way] += row["logical_bytes"]
        if delivered and row["phase"] not in ("setup", "select", "evaluate"):
            sums["logical"][way] += row["logical_bytes"]
            sums["encoded"][way] += row["encoded_bytes"]
            by_kind[row["kind"]][way] += row["logical_bytes"]
    tables = {"by_kind": by_kind, "by_phase": by_phase, "wasted": wasted}
    tables |= {"encoded_by_phase": encoded_by_phase, "wire_by_phase": wire_by_phase, "by_phase_and_kind": kinds}
    return {**sums, **{name: dict(table) for name, table in tables.items()}}


def without_transport(totals):
    wire = {way: totals["wire"][way] - totals["transport"][way] for way in ("up", "down")}
    return {k: v for k, v in {**totals, "wire": wire}.items() if k != "transport"}


def enter(ledger, frame, schema=SCHEMA, *, direction="down", phase="train", rank=1, times=(None, 1, 2, 3)):
    return ledger.book(frame, schema, direction=direction, phase=phase, rank=rank, times=[times] * len(frame.messages))


def test_every_message_and_kind_has_a_row_with_all_columns(tmp_path):
    ledger = Ledger(tmp_path / "messages.jsonl")
    params = model()
    frame = a_frame(*((client, values(params=params)) for client in (8, 9)), round=3, attempt=1, call=2)
    for message in enter(ledger, frame, rank=4, phase="distill", times=(None, 11, 12, 0)):
        message.settle("delivered", 13)
    ledger.close()
    rows = rows_of(tmp_path / "messages.jsonl")
    kinds = [r for r in rows if r["row"] == "kind"]
    messages = [r for r in rows if r["row"] == "message"]
    assert len(rows) == len(kinds) + len(messages)
    assert [(r["client"], r["kind"]) for r in kinds] == list(
        itertools.product((8, 9), ("weights", "logits", "scalars"))
    )
    assert all(set(r) == {"row", *KIND_COLUMNS} for r in kinds)
    assert all(set(r) == {"row", *MESSAGE_COLUMNS} for r in messages)
    common = {"round": 3, "attempt": 1, "call": 2, "phase": "distill", "client": 8, "rank": 4, "direction": "down"}
    assert kinds[0] == {
        "row": "kind", **common, "kind": "weights", "codec": "raw", "logical_bytes": 72, "encoded_bytes": 72,
        "ready_ns": 11, "sent_ns": 12, "done_ns": 13, "status": "delivered",
    }  # fmt: skip
    (_, framing, wire, _), (_, _, second_wire, _) = costs(frame, SCHEMA)
    first, second = messages
    assert first == {
        "row": "message", **common, "framing_bytes": framing, "wire_bytes": wire, "shared_with": None,
        "started_ns": None, "ready_ns": 11, "sent_ns": 12, "done_ns": 13, "status": "delivered",
    }  # fmt: skip
    assert (second["framing_bytes"], second["wire_bytes"], second["shared_with"]) == (0, second_wire, 8)


def some_traffic(ledger):
    """Messages of several rounds, phases, directions and outcomes, all settled."""
    outcomes = itertools.cycle(["delivered", "delivered", "late", "delivered", "refused", "lost", "resent"])
    phases = itertools.cycle(["train", "evaluate", "distill", "setup", "select"])
    for number in range(1, 8):
        params = model(number)
        for direction in ("down", "up"):
            frame = a_frame(*((c, values(c, params=params, body=c % 2 == 0)) for c in range(3)), round=number)
            for message in enter(ledger, frame, direction=direction, phase=next(phases)):
                message.settle(next(outcomes), 5)
        ledger.flush()


def test_the_rows_of_the_file_sum_to_the_totals(tmp_path):
    ledger = Ledger(tmp_path / "messages.jsonl")
    some_traffic(ledger)
    ledger.add_transport(1000, 2000)
    ledger.close()
    totals = ledger.totals.as_dict()
    assert sums_of(rows_of(tmp_path / "messages.jsonl")) == without_transport(totals)
    assert set(totals["wasted"]) == {"late", "refused", "lost", "resent"}
    assert all(totals[name][way] for name in ("logical", "encoded", "framing", "wire") for way in ("up", "down"))


def test_rounds_are_summed_apart():
    ledger = Ledger(None)
    for number in (1, 2):
        frame = a_frame((0, values()), round=number)
        for _ in range(number):
            enter(ledger, frame)[0].settle("delivered")
        ledger.flush()
        assert ledger.take_round().logical == both(0, number * 8088)
    assert ledger.take_round().logical == both()
    assert ledger.totals.logical == both(0, 3 * 8088)


def test_rows_come_in_order_of_call_direction_and_client(tmp_path):
    ledger = Ledger(tmp_path / "messages.jsonl")
    for call, direction, client in [(2, "up", 1), (1, "up", 0), (2, "down", 3), (1, "down", 2), (1, "up", 3)]:
        frame = a_frame((client, values()), round=1, call=call)
        enter(ledger, frame, direction=direction)[0].settle("delivered")
    ledger.close()
    rows = [r for r in rows_of(tmp_path / "messages.jsonl") if r["row"] == "message"]
    assert [(r["call"], r["direction"], r["client"]) for r in rows] == [
        (1, "down", 2), (1, "up", 0), (1, "up", 3), (2, "down", 3), (2, "up", 1),
    ]  # fmt: skip


def test_open_messages_wait_and_are_lost_at_close(tmp_path):
    path = tmp_path / "messages.jsonl"
    ledger = Ledger(path)
    first, second = enter(ledger, a_frame((0, values(0)), (1, values(1))))
    ledger.flush()
    assert path.read_text() == ""
    assert ledger.totals.wire == both()
    first.settle("delivered", 9)
    ledger.flush()
    assert {r["client"] for r in rows_of(path)} == {0}
    ledger.flush()
    ledger.close()
    ledger.close()
    assert second.status == "lost"
    rows = [r for r in rows_of(path) if r["row"] == "message"]
    assert [(r["client"], r["status"]) for r in rows] == [(0, "delivered"), (1, "lost")]
    assert ledger.totals.wasted == {"lost": both(0, 8088)}
    assert sums_of(rows_of(path)) == without_transport(ledger.totals.as_dict())


def test_a_large_file_is_rotated_and_no_row_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "ROTATE_BYTES", 4000)
    ledger = Ledger(tmp_path / "messages.jsonl")
    some_traffic(ledger)
    ledger.close()
    old = sorted(tmp_path.glob("messages-*.jsonl"))
    assert [p.name for p in old] == [f"messages-{i:04d}.jsonl" for i in range(1, len(old) + 1)]
    assert len(old) >= 2
    assert all(p.stat().st_size > 4000 for p in old)
    rows = rows_of(*old, tmp_path / "messages.jsonl")
    assert [r["round"] for r in rows] == sorted(r["round"] for r in rows)
    assert len([r for r in rows if r["row"] == "message"]) == 7 * 2 * 3
    assert sums_of(rows) == without_transport(ledger.totals.as_dict())


# ---- whole runs


def config(algorithm, **changes):
    return {
        "rounds": 2,
        "clients": {"num_clients": 6, "per_round": 4},
        "task": {"data": "digits", "model": {"name": "mlp", "hidden": [8]}},
        "local": {"epochs": 1, "lr": 0.05},
        "algorithm": algorithm,
        **changes,
    }


MODEL_BYTES = 4 * (64 * 8 + 8 + 8 * 10 + 10)
MODELS = {"fedavg": {"weights": (1, 1)}, "scaffold": {"weights": (1, 1), "variates": (1, 1)}}


def check_bytes(algorithm, directory, messages=2 * 4):
    rows = rows_of(directory / "messages.jsonl")
    result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    got = result["bytes"]
    assert sums_of(rows) == without_transport(got)
    kinds = {kind: both(messages * MODEL_BYTES, messages * MODEL_BYTES) for kind in MODELS[algorithm]}
    assert got["by_kind"] == {"scalars": both(8 * messages), **kinds}
    assert got["by_phase"] == {"train": got["logical"]}
    assert got["logical"] == got["encoded"]
    assert got["wasted"] == {}
    assert {row["status"] for row in rows} == {"delivered"}
    for row in rows:
        if row["row"] == "kind":
            assert 0 < row["ready_ns"] <= row["sent_ns"]
            if row["direction"] == "down" or got["transport"]["up"] == 0:  # else another clock, known by an estimate
                assert row["sent_ns"] <= row["done_ns"]
    lines = [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]
    for name in ("logical", "encoded", "framing"):
        assert {way: sum(line["bytes"][name][way] for line in lines) for way in ("up", "down")} == got[name]
    return got, rows


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("algorithm", MODELS)
def test_a_run_books_what_its_algorithm_sends(algorithm, share, tmp_path):
    result = fldist.run(config(algorithm, network={"share": share}), output=tmp_path / "r")
    got, rows = check_bytes(algorithm, tmp_path / "r")
    assert result["bytes"] == got
    assert got["transport"] == both()
    copies = len(MODELS[algorithm]) * 2 * (1 if share else 4)  # 2 rounds, and 4 clients share a process
    assert got["wire"]["down"] - got["framing"]["down"] == copies * MODEL_BYTES
    assert got["wire"]["up"] - got["framing"]["up"] == got["logical"]["up"]
    downs = [r for r in rows if r["row"] == "message" and r["direction"] == "down"]
    for number in (1, 2):
        first, *others = [r for r in downs if r["round"] == number]
        assert first["shared_with"] is None
        assert {r["shared_with"] for r in others} == {first["client"]}
        assert {r["framing_bytes"] for r in others} == {0}


@pytest.mark.timeout(90)
def test_a_run_over_processes_books_the_same_and_its_transport(tmp_path):
    settings = config("scaffold")
    alone = fldist.run(settings, output=tmp_path / "alone")
    several = fldist.run(settings, nproc=3, output=tmp_path / "several")
    got, rows = check_bytes("scaffold", tmp_path / "several")
    assert several["bytes"] == got
    for name in ("logical", "encoded", "by_kind", "by_phase", "wasted"):
        assert got[name] == alone["bytes"][name]
    assert {r["rank"] for r in rows} == {1, 2}
    assert min(got["transport"].values()) > 0
    assert several["state_hash"] == alone["state_hash"]
    names = {p.name for p in (tmp_path / "several").iterdir()}
    assert {n for n in names if re.fullmatch(r"rank-\d+\.log", n)} == {f"rank-{i}.log" for i in range(3)}
