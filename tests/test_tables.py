"""Small tables that an algorithm gives to look at, and what it has to say to the user."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fldist.algorithm import Clients, Server, TooFewReplies
from fldist.config import load
from fldist.fold import Mean
from fldist.runner import run_here
from fldist.runtime.tables import csv_text
from fldist.runtime.views import ServerView
from tests.conftest import Recorder, small
from tests.own import Base, NanFrom


def test_numbers_and_strings_in_full() -> None:
    rows = [{"client": 3, "share": 0.1 + 0.2, "name": "a,b"}, {"client": True, "share": float("nan"), "name": '"'}]
    assert csv_text("t", rows) == 'client,share,name\n3,0.30000000000000004,"a,b"\n1,nan,""""\n'


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("../t", [{"a": 1}], r"table: '\.\./t' cannot be part of a file's name; use letters"),
        ("t", [], r"table: t must be a list of at least one row; got \[\]"),
        ("t", {"a": 1}, r"table: t must be a list of at least one row"),
        ("t", [{"a": 1}, {"b": 1}], r"table: t: .* same columns, and row 1 is \{'b': 1\}, row 0 \{'a': 1\}"),
        ("t", [{}], r"table: t: .* row 0 is \{\}"),
        ("t", [[1, 2]], r"table: t: .* row 0 is \[1, 2\]"),
        ("t", [{"a": None}], r"table: t: a must be a number or a string, got NoneType"),
    ],
)
def test_what_is_no_table_is_refused(name: str, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        csv_text(name, rows)


@dataclass(frozen=True)
class Shows(NanFrom):
    """Gives a table and a word in the setup and in every round; in round 2 no reply can be used."""

    def setup(self, server: Server, clients: Clients) -> None:
        server.table(begun=[{"round": server.round}])
        server.warn("about to begin")

    def round(self, server: Server, clients: Clients) -> None:
        server.table(quotas=[{"client": c, "images": 2.5} for c in (0, 1)], other=[{"a": "b"}])
        server.warn("client 1 is slow")
        server.warn("client 1 is slow")
        if server.round == 2:
            clients.only([self.client]).call(self.update, x=server.x, fold={"y": Mean(by="n")})
        Base.round(self, server, clients)


def test_tables_of_rounds_that_count_are_files_and_words_are_told_at_once(tmp_path: Path) -> None:
    seen = Recorder()
    run_here(load(small(rounds=3, algorithm={"name": "tests.test_tables:Shows"})), output=tmp_path, observer=seen)
    found = sorted(path.name for path in (tmp_path / "tables").iterdir())
    assert found == [
        "round-000000-begun.csv", "round-000001-other.csv", "round-000001-quotas.csv", "round-000003-other.csv",
        "round-000003-quotas.csv",
    ]  # fmt: skip
    assert (tmp_path / "tables" / "round-000003-quotas.csv").read_bytes() == b"client,images\n0,2.5\n1,2.5\n"
    told = [text for text in seen.warnings if "slow" in text or "about" in text]
    assert told == ["setup: about to begin", *(f"round {n}: client 1 is slow" for n in (1, 2, 3))]


@dataclass(frozen=True)
class Again(Base):
    """Says something before it calls anybody."""

    def round(self, server: Server, clients: Clients) -> None:
        server.warn("once for both attempts")
        Base.round(self, server, clients)


def test_an_attempt_that_is_made_again_says_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []
    whole = Base.round

    def void_once(self: Base, server: Server, clients: Clients) -> None:
        attempts.append(server.round)
        if len(attempts) == 1:
            raise TooFewReplies("update", {0: "lost"})
        whole(self, server, clients)

    monkeypatch.setattr(Base, "round", void_once)
    seen = Recorder()
    config = small(rounds=2, algorithm={"name": "tests.test_tables:Again"}, faults={"on_quorum_loss": "retry"})
    run_here(load(config), output=tmp_path / "run", observer=seen)
    assert attempts == [1, 1, 2]
    assert [t for t in seen.warnings if "once" in t] == [f"round {n}: once for both attempts" for n in (1, 2)]


@pytest.mark.parametrize("name", ["table", "warn"])
def test_the_names_are_taken(name: str) -> None:
    view = ServerView.__new__(ServerView)
    with pytest.raises(AttributeError, match=f"server.{name} is taken"):
        setattr(view, name, 1)
