"""A run that begins where another one had come to at the end of a stage: its directory, made from the other's.

The other directory is only read. What is copied are the checkpoint of that round and those before it that stay for
good, the clients' states that they name, the files that grow as they were then, and pictures and tables of rounds up
to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import fldist
from fldist.runtime.checkpoint import Checkpoints, ClientFiles, Damaged, read_facts, read_state
from fldist.runtime.output import LINES, cut_back, too_short

ORIGIN = "origin.json"
"""The file that says which run this one was begun from."""


@dataclass(frozen=True)
class Branch:
    """Where a run is begun from: `source`, after `round` rounds, which is before its stage `stage`."""

    source: Path
    stage: str
    round: int

    def make(self, directory: Path, resolved: dict[str, Any]) -> None:
        """Make the new run's directory, whole or not at all; ValueError where it cannot be.

        One that this has made before is left as it is, so that the same command goes on.
        """
        origin = {"run": str(self.source.absolute()), "stage": self.stage, "round": self.round}
        if directory.exists():
            with contextlib.suppress(OSError, ValueError):
                found = json.loads((directory / ORIGIN).read_text(encoding="utf-8"))
                if {key: found.get(key) for key in origin} == origin:
                    return
            raise ValueError(
                f"output: {directory} exists, and a run that is begun from another one needs a new directory: name "
                "another with --output, or remove it"
            )
        facts = self._checkpoint()
        made = directory.with_name(f"{directory.name}.making-{os.getpid()}")
        try:
            made.mkdir(parents=True)
            self._copy(made, facts)
            (made / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
            text = json.dumps({**origin, "fldist": fldist.__version__}, indent=2)
            (made / ORIGIN).write_text(f"{text}\n", encoding="utf-8")
            made.replace(directory)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            raise ValueError(
                f"output: {directory} cannot be made from {self.source}: {error}; make room, or name another with "
                "--output"
            ) from None

    def _checkpoint(self) -> dict[str, Any]:
        """The facts of the checkpoint to begin from; ValueError says why there is none and what to do."""
        folder = self.source / "checkpoints"
        where = f"stage {self.stage} begins after round {self.round}"
        anew = "run it anew: ends of stages are kept then"
        if not folder.is_dir():
            raise ValueError(
                f"--from: {self.source} keeps no checkpoints (checkpoint.every: 0); {anew}, with checkpoint.every=1 or "
                "more"
            )
        checkpoints = Checkpoints(folder)
        newest = max(checkpoints.numbers(), default=-1)
        if newest < self.round:
            raise ValueError(
                f"--from: {where}, and {self.source} has come to round {max(newest, 0)}; go on with it first: "
                f"`fldist resume {self.source}`"
            )
        path = checkpoints.path(self.round)
        try:
            _, facts = read_state(path)
        except FileNotFoundError:
            raise ValueError(
                f"--from: {where}, and {self.source} does not have the checkpoint of that round any more (it was begun "
                f"by a version of fldist that did not keep it, or the disk was full); {anew}"
            ) from None
        except Damaged as error:
            raise ValueError(f"--from: {error}; {anew}") from None
        clients = ClientFiles(self.source / "clients")
        lacks = (clients.broken(int(c), version) for c, version in facts["versions"].items() if version)
        lack = too_short(self.source, facts["files"]) or next(filter(None, lacks), None)
        if lack is not None:
            raise ValueError(f"--from: the checkpoint of round {self.round} cannot be used: {lack}; {anew}")
        return facts

    def _copy(self, made: Path, facts: dict[str, Any]) -> None:
        """Copy what there was after the round; OSError."""
        ours, theirs = Checkpoints(made / "checkpoints"), Checkpoints(self.source / "checkpoints")
        ours.directory.mkdir()
        needed: set[tuple[int, str]] = set()
        for number in sorted({self.round, *facts.get("lasting", [])}):
            path = theirs.path(number)
            if path.exists():
                shutil.copyfile(path, ours.path(number))
                needed |= _named(path)
        (ours.directory / "LATEST").write_text(f"{ours.path(self.round).name}\n", encoding="utf-8")
        into, out_of = ClientFiles(made / "clients"), ClientFiles(self.source / "clients")
        for client, version in sorted(needed):
            into.path(client, version).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out_of.path(client, version), into.path(client, version))
        filled = sorted(self.source.glob("messages-*.jsonl"))[: facts["files"]["rotated"] + 1]
        for path in (*filled, *(self.source / name for name in LINES)):
            if path.exists():
                shutil.copyfile(path, made / path.name)
        if lack := too_short(made, facts["files"]):
            raise OSError(f"{lack} while they were copied")  # a run that is going has filled its ledger
        cut_back(made, facts["files"])
        for path in self._shown():
            (made / path.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(path, made / path.parent.name / path.name)

    def _shown(self) -> Iterator[Path]:
        """Pictures and tables of the rounds up to the one to begin from."""
        for folder in ("images", "tables"):
            for path in sorted((self.source / folder).glob("round-*")):
                number = re.match(r"round-(\d+)-", path.name)
                if number is not None and int(number[1]) <= self.round:
                    yield path


def _named(path: Path) -> set[tuple[int, str]]:
    """The clients' states that a checkpoint names: client and version."""
    return {(int(client), str(version)) for client, version in read_facts(path)["versions"].items() if version}
