"""Arguments given as `Once`: they travel to who does not hold them, and are booked once for every client."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fldist
from fldist.config import load, load_resumed
from fldist.inspection import dry_run
from fldist.kinds import HELD, Field, Form, Kind, Once
from fldist.runner import run_here
from fldist.runtime.caller import ClientCodeFailed
from fldist.runtime.once import OnceTable, OnceValues
from fldist.wire.ledger import Booked
from tests.conftest import Hosts, Recorder, small

SIZE = 2000 * 4  # of the mask of `Masked`


def masked(**changes: Any) -> dict[str, Any]:
    algorithm = {"name": "tests.own:Masked", **changes.pop("fields", {})}
    return small(algorithm=algorithm, rounds=6, clients={"num_clients": 6, "fraction": 0.5}, eval__every=0, **changes)


def rows(directory: str | Path, row: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(directory) / "messages.jsonl").read_text().splitlines()]
    return [r for r in lines if r["row"] == row and r["direction"] == "down"]


def given(directory: str | Path) -> list[tuple[int, int]]:
    """(version, client) of every mask in the ledger that counts."""
    masks = [r for r in rows(directory, "kind") if r["kind"] == "masks" and r["status"] == "delivered"]
    return sorted(((r["round"] - 1) // 3, r["client"]) for r in masks)


def sent(directory: str | Path) -> list[int]:
    """Rounds in which the mask itself was handed to the transport, once for every time."""
    travelled = []
    for r in rows(directory, "message"):
        travelled += [r["round"]] * ((r["wire_bytes"] - r["framing_bytes"]) // SIZE)
    return travelled


def test_every_client_is_given_a_version_once_wherever_it_is(tmp_path: Path, hosts: Hosts) -> None:
    alone = fldist.run(masked(), output=tmp_path / "alone")
    called = {((r["round"] - 1) // 3, r["client"]) for r in rows(alone["directory"], "kind")}
    assert len(called) > 6
    assert given(alone["directory"]) == sorted(called)
    assert alone["bytes"]["by_kind"]["masks"] == {"up": 0, "down": len(called) * SIZE}
    many = run_here(load(masked()), nproc=3, output=tmp_path / "many", spawn=hosts)
    assert many["state_hash"] == alone["state_hash"]
    assert many["bytes"]["logical"] == alone["bytes"]["logical"]
    assert given(many["directory"]) == given(alone["directory"])


def test_a_version_that_is_given_twice_in_a_round_is_booked_once(tmp_path: Path) -> None:
    result = fldist.run(masked(fields={"name": "tests.own:MaskedTwice"}), output=tmp_path / "run")
    called = {((r["round"] - 1) // 3, r["client"]) for r in rows(result["directory"], "kind")}
    assert given(result["directory"]) == sorted(called)


def test_a_version_travels_once_to_every_host(tmp_path: Path, hosts: Hosts) -> None:
    # a model of 4 bytes a parameter and 650 parameters is smaller than the mask
    config = masked()
    alone = fldist.run(config, output=tmp_path / "alone")
    assert sent(alone["directory"]) == [1, 4]
    many = run_here(load(config), nproc=3, output=tmp_path / "many", spawn=hosts)
    assert sent(many["directory"]) == [1, 1, 4, 4]


def test_without_sharing_it_travels_once_to_every_client(tmp_path: Path) -> None:
    result = fldist.run(masked(network__share=False), output=tmp_path / "run")
    assert len(sent(result["directory"])) == len(given(result["directory"])) > 6
    assert result["state_hash"] == fldist.run(masked(), output=tmp_path / "shared")["state_hash"]


def test_a_host_that_comes_back_is_sent_it_again(tmp_path: Path, hosts: Hosts) -> None:
    def after(number: int) -> None:
        if number == 1:
            hosts.send(1, signal.SIGKILL)

    again = {"min_replies": "all", "on_quorum_loss": "retry"}
    seen = Recorder(after)
    result = run_here(load(masked(faults=again)), nproc=2, output=tmp_path / "run", observer=seen, spawn=hosts)
    alone = fldist.run(masked(), output=tmp_path / "alone")
    assert result["state_hash"] == alone["state_hash"]
    assert any("has joined again" in w for w in seen.warnings)
    assert sent(result["directory"]).count(2) >= 1, "the new process had nothing to take it from"
    assert given(result["directory"]) == given(alone["directory"])
    assert result["bytes"]["logical"] == alone["bytes"]["logical"]


def test_a_run_that_goes_on_sends_it_again_and_books_it_no_more(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fldist.run({**masked(), "rounds": 2}, output=run)
    result = run_here(load_resumed(run, ["rounds=6"]), output=run, resume=True)
    alone = fldist.run(masked(), output=tmp_path / "alone")
    assert result["state_hash"] == alone["state_hash"]
    assert sent(run) == [1, 3, 4]
    assert given(run) == given(alone["directory"])
    assert result["bytes"]["logical"] == alone["bytes"]["logical"]


def test_what_a_client_changes_in_place_nobody_gets_any_more(tmp_path: Path) -> None:
    with pytest.raises(ClientCodeFailed, match="argument mask was changed in place"):
        fldist.run(masked(fields={"spoils": True}), output=tmp_path / "run")


def test_a_prediction_counts_it_apart() -> None:
    text = dry_run(load(masked()), 1)
    assert f"masked.mask (masks) goes to each client once for each version of it: {SIZE:,} down" in text
    assert "masked.other (scalars) goes to each client once for each version of it: 8 down" in text
    model = 4 * (64 * 8 + 8 + 8 * 10 + 10)
    assert re.search(rf"training +up +{3 * (model + 8):,} +down +{3 * model:,}", text)


# ---- the tables
FIELDS = [Field("x", Kind.WEIGHTS, Form.TENSOR, False, 9), Field("m", Kind.MASKS, Form.TENSOR, False, 9)]
MASK = torch.ones(4, dtype=torch.int32)


def entry(client: int) -> Booked:
    return Booked(1, 0, 1, "train", client, 1, "down", {}, 0, 0, None)


def ask(table: OnceTable, rank: int, client: int, version: int = 1) -> tuple[bool, int]:
    """(whether it travels, bytes that are booked), of a call that is then sent and acknowledged."""
    values: list[Any] = [torch.zeros(1), MASK]
    once: dict[str, Once[Any]] = {"m": Once(MASK, version)}
    kinds = table.hold_back(rank, "f", FIELDS, client, once, values)
    booked = entry(client)
    table.sent(rank, "f", once, [booked])
    booked.settle("delivered")
    table.settle()
    return values[1] is not HELD, kinds.get(Kind.MASKS, (0, 0))[0]


def test_the_table_of_a_host_and_of_its_clients() -> None:
    table = OnceTable(share=True)
    assert ask(table, 1, 0) == (True, 16)
    assert ask(table, 1, 0) == (False, 0)
    assert ask(table, 1, 1) == (False, 16), "another client is given what its host holds"
    assert ask(table, 2, 0) == (True, 0), "another host has to be sent what the client has been given"
    assert ask(table, 1, 0, version=2) == (True, 16)
    assert ask(table, 1, 0, version=1) == (True, 16), "a host holds one version"
    table.left(1)
    assert ask(table, 1, 0) == (True, 0)
    assert ask(table, 2, 0) == (False, 0)


def test_what_was_lost_or_void_was_not_given() -> None:
    table = OnceTable(share=True)
    for outcome in ("lost", "resent", "open"):
        values: list[Any] = [torch.zeros(1), MASK]
        once: dict[str, Once[Any]] = {"m": Once(MASK, 1)}
        assert table.hold_back(1, "f", FIELDS, 0, once, values)[Kind.MASKS] == (16, 16)
        booked = entry(0)
        table.sent(1, "f", once, [booked])
        booked.settle(outcome)  # type: ignore[arg-type]
        table.settle()
        assert table.given == {}
    booked.settle("delivered")
    table.settle()
    assert table.given == {"f.m": {0: 1}}


def test_a_hosts_values_are_its_own_copies() -> None:
    values = OnceValues()
    with pytest.raises(ValueError, match=r"does not hold version 1 of f\.m"):
        values.get("f.m", 1)
    mask = MASK.clone()
    values.put("f.m", 1, mask)
    mask.zero_()
    assert torch.equal(values.get("f.m", 1), MASK)
    values.spoil("f.m", "changed by client 3")
    with pytest.raises(ValueError, match="changed by client 3"):
        values.get("f.m", 1)
    values.put("f.m", 2, MASK)
    assert torch.equal(values.get("f.m", 2), MASK)
