"""Writes directories that look like runs', of any size, in a moment: for tests of what reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fldist.config import load

MODEL_BYTES = 38_440
HEAD_BYTES = 115
BOOT_NS = 7_000_000_000_000
"""The server's monotonic clock when a made run begins."""
WALL_NS = 1_790_000_000_000_000_000
MS = 1_000_000


@dataclass
class Made:
    """What a made run is like. ranks: 1 is one process; lost: share of the replies; changes: of the configuration;
    simulated: it tells of devices, whatever the configuration says."""

    algorithm: dict[str, Any] = field(default_factory=lambda: {"name": "fedavg"})
    seed: int = 0
    rounds: int = 5
    clients: int = 6
    per_round: int | None = None
    ranks: int = 3
    lost: float = 0.0
    best: float = 0.9
    speed: float = 0.2
    name: str = "made"
    data: str = "digits"
    alpha: float = 0.3
    finished: bool = True
    every: int = 1
    simulated: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Write the run into a new directory."""
        path.mkdir(parents=True)
        rng = random.Random(f"{self.seed} {self.algorithm}")
        config = load({
            "name": self.name,
            "seed": self.seed,
            "rounds": self.rounds,
            "clients": {"num_clients": self.clients, "per_round": self.per_round},
            "task": {"data": self.data, "partition": {"name": "dirichlet", "alpha": self.alpha}},
            "algorithm": self.algorithm,
            **self.changes,
        }).resolved()  # fmt: skip
        (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        hosts = {str(rank): {"hostname": "vm", "device": "cpu"} for rank in self._hosts()}
        facts = {"fldist": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "hostname": "vm", "cpus": 2}
        facts |= {"processor": "AMD EPYC", "backend": "gloo" if self.ranks > 1 else "in-process"}
        facts |= {"world_size": self.ranks, "launcher": "children", "device": "cpu", "hosts": hosts}
        facts["command"] = ["fldist", "run", "configs/quickstart.yaml", f"seed={self.seed}"]
        (path / "environment.json").write_text(json.dumps({**facts, **self.environment}))
        clock, spent = _Clock(), dict.fromkeys(("up", "down", "wire_up", "wire_down"), 0)
        rounds: list[dict[str, Any]] = []
        with (
            (path / "messages.jsonl").open("w") as letters,
            (path / "timeline.jsonl").open("w") as timeline,
            (path / "rounds.jsonl").open("w") as lines,
        ):
            for number in range(1, self.rounds + 1):
                called = sorted(rng.sample(range(self.clients), self.per_round or self.clients))
                gone = [client for client in called if rng.random() < self.lost]
                line, rows = self._round(number, called, gone, clock, rng)
                letters.writelines(json.dumps(row) + "\n" for row in rows)
                timeline.write(json.dumps(line) + "\n")
                rounds.append(self._line(number, called, gone, line, spent, rng))
                lines.write(json.dumps(rounds[-1]) + "\n")
        if self.finished:
            (path / "result.json").write_text(json.dumps(self._result(rounds, rng)))
        return path

    def _hosts(self) -> list[int]:
        return list(range(1, self.ranks)) or [0]

    def _round(
        self, number: int, called: list[int], gone: list[int], clock: _Clock, rng: random.Random
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A round's line of timeline.jsonl and its rows of messages.jsonl."""
        began = clock.now
        spans: list[tuple[str, int, int]] = [("server", 0, MS // 2)]
        at, rows, arrivals = began + MS // 2, [], []
        for index, rank in enumerate(self._hosts()):
            mine = called[index :: len(self._hosts())]
            spans.append(("encode", at - began, at - began + MS // 2))
            at += MS // 2
            sent, done = at, at + 2 * MS
            rows += [
                _rows(number, c, rank, "down", None, at - 1000, sent, done, c != mine[0], "delivered") for c in mine
            ]
            free, wire = done, 0
            for client in mine:
                started = free + 200_000
                ready = free = started + int(rng.uniform(8, 14) * MS) * (1 + index % 2)
                sent = max(ready + 100_000, wire)
                wire = sent + int(1.5 * MS)
                status = "lost" if client in gone else "delivered"
                rows.append(_rows(number, client, rank, "up", started, ready, sent, wire, False, status))
                arrivals.append(wire)
        for arrived in sorted(arrivals):
            at = max(at, arrived)
            spans.append(("encode", at - began, at - began + 300_000))
            at += 300_000
        spans.append(("server", at - began, at - began + 2 * MS))
        spans.append(("evaluate", at - began + 2 * MS, at - began + 6 * MS))
        clock.now = at + 7 * MS
        clocks = {str(r): {"offset_ns": 2_000_000 * r, "uncertainty_ns": 90_000 * r} for r in self._hosts() if r}
        line = {"round": number, "attempt": 0, "began_ns": began, "ended_ns": at + 6 * MS + 500_000}
        line |= {"unix_ns": began - BOOT_NS + WALL_NS, "spans": [list(s) for s in spans], "clocks": clocks}
        return line, [row for of in rows for row in of]

    def _line(
        self, number: int, called: list[int], gone: list[int], timed: dict[str, Any], spent: dict[str, int], rng: Any
    ) -> dict[str, Any]:
        """A round's line of rounds.jsonl."""
        replied = len(called) - len(gone)
        size = {"up": replied * (MODEL_BYTES + 8), "down": len(called) * MODEL_BYTES}
        framing = {way: len(called) * HEAD_BYTES for way in size}
        wire = {"up": size["up"] + framing["up"], "down": len(self._hosts()) * MODEL_BYTES + framing["down"]}
        spent["up"], spent["down"] = spent["up"] + size["up"], spent["down"] + size["down"]
        spent["wire_up"], spent["wire_down"] = spent["wire_up"] + wire["up"], spent["wire_down"] + wire["down"]
        scored = number % self.every == 0 or number == self.rounds
        accuracy = self.best * (1 - 2.718 ** (-self.speed * number)) + rng.uniform(-0.01, 0.01)
        loss = 2.3 * 2.718 ** (-self.speed * number) + rng.uniform(0, 0.02)
        by_kind = {"scalars": {"up": 8 * replied, "down": 0}}
        by_kind["weights"] = {"up": size["up"] - 8 * replied, "down": size["down"]}
        sums = {"logical": size, "encoded": size, "framing": framing, "wire": wire, "by_kind": by_kind}
        sums |= {"by_phase": {"train": size}, "encoded_by_phase": {"train": size}, "wire_by_phase": {"train": wire}}
        sums["by_phase_and_kind"] = {f"train.{kind}": ways for kind, ways in by_kind.items()}
        sums["wasted"] = {"lost": {"up": len(gone) * MODEL_BYTES, "down": 0}} if gone else {}
        total = (timed["ended_ns"] - timed["began_ns"]) / 1e9
        devices: dict[str, Any] = {}
        if self.simulated:
            devices = {"simulated": {"seconds": 20.0 + self.seed, "joules": 90.0 * len(called)}}
        if len(called) < self.clients:
            devices["chosen"] = called
        so_far = {"simulated_seconds": number * (20.0 + self.seed), "joules": number * 90.0 * len(called)}
        return {
            **devices,
            "round": number,
            "attempt": 0,
            "stage": "train",
            "committed": True,
            "accuracy": accuracy if scored else None,
            "loss": loss if scored else None,
            "selected": len(called),
            "replied": replied,
            "missing": {str(client): "host 2 lost: it was stopped" for client in gone},
            "hosts": {"present": len(self._hosts()), "of": len(self._hosts())},
            "bytes": sums,
            "seconds": {"total": total, "evaluate": 0.004},
            "spent": {
                "uplink_bytes": spent["up"],
                "downlink_bytes": spent["down"],
                "wire_uplink_bytes": spent["wire_up"],
                "wire_downlink_bytes": spent["wire_down"],
                "seconds": (timed["ended_ns"] - BOOT_NS) / 1e9,
                **(so_far if self.simulated else {}),
            },
        }

    def _result(self, rounds: list[dict[str, Any]], rng: random.Random) -> dict[str, Any]:
        last, transport = rounds[-1], {"up": 6504, "down": 10850}
        sums: dict[str, Any] = {}
        for line in rounds:
            _add(sums, line["bytes"])
        _add(sums["wire"], transport)
        best = max((line for line in rounds if line["accuracy"]), key=lambda line: line["accuracy"])
        return {
            "schema": 1,
            "name": self.name,
            "algorithm": self.algorithm["name"],
            "seed": self.seed,
            "rounds": last["round"],
            "backend": "gloo" if self.ranks > 1 else "in-process",
            "world_size": self.ranks,
            "num_clients": self.clients,
            "final": {"accuracy": last["accuracy"], "loss": last["loss"]},
            "best": {"round": best["round"], "accuracy": best["accuracy"], "loss": best["loss"]},
            "summary": {},
            "bytes": {**sums, "transport": transport},
            "seconds": {"total": sum(line["seconds"]["total"] for line in rounds), "run": 9.5},
            "state_hash": f"{rng.getrandbits(256):064x}",
            "config_hash": f"{rng.getrandbits(256):064x}",
            "status": "finished",
            "reason": None,
            "stop": {"rule": "rounds", "limit": self.rounds, "value": self.rounds, "round": self.rounds},
        }


@dataclass
class _Clock:
    now: int = BOOT_NS


def _rows(
    number: int,
    client: int,
    rank: int,
    direction: str,
    started: int | None,
    ready: int,
    sent: int,
    done: int,
    shared: bool,
    status: str,
) -> list[dict[str, Any]]:
    common = {"round": number, "attempt": 0, "call": 1, "phase": "train", "client": client, "rank": rank}
    common["direction"] = direction
    times = {"ready_ns": ready, "sent_ns": sent, "done_ns": done, "status": status}
    size = {"weights": MODEL_BYTES} | ({"scalars": 8} if direction == "up" else {})
    kinds = [
        {"row": "kind", **common, "kind": kind, "codec": "raw", "logical_bytes": n, "encoded_bytes": n, **times}
        for kind, n in size.items()
    ]
    wire = HEAD_BYTES if shared else HEAD_BYTES + sum(size.values())
    message = {"row": "message", **common, "framing_bytes": HEAD_BYTES, "wire_bytes": wire, "shared_with": None}
    return [*kinds, {**message, "started_ns": started, **times}]


def _add(total: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict):
            _add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


def picture(size: int = 16, shade: int = 128) -> bytes:
    """A small PNG."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (size, size), shade).save(file, "PNG")
    return file.getvalue()


FAMILY = ("fedavg", "fedprox", "scaffold", "fednova", "moon", "local")


def family(root: Path, seeds: int, **changes: Any) -> Iterator[Path]:
    """Runs of several algorithms and seeds."""
    for number, name in enumerate(FAMILY):
        for seed in range(seeds):
            made = Made(algorithm={"name": name}, seed=seed, best=0.8 + 0.02 * number, speed=0.1 + 0.03 * number)
            for key, value in changes.items():
                setattr(made, key, value)
            yield made.write(root / f"{name}-s{seed}")
