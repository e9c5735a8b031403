"""Runs fldist and its peers in turn and prints the tables of docs/peers.md. `launch/peers.sh` makes what it needs.

A pass is every program with every work once; every second pass goes backwards. Each run is a command of its own with a
limit on its time, and no process of it is left when the next one begins. Needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from table import ALONE, OURS, PEERS, WORKS, Run, flat, lines, spread

from fldist.bench.measure import machine

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MARK = "FLDIST_PEERS_RUN"
"""Environment variable by which a run's processes are known, those of Ray included."""
END_S = 10.0


class RunFailed(RuntimeError):
    """A run ended with an error, or did not end in time."""


def commands(rounds: int, epochs: int, works: list[str]) -> list[tuple[str, str, list[str]]]:
    """Work, program and command line of every run of a pass."""
    made = []
    for work in works:
        told = [work, "--rounds", str(rounds), "--epochs", str(epochs)]
        made.append((work, OURS, [str(ROOT / ".venv/bin/python"), str(HERE / "run_fldist.py"), *told]))
        for peer in PEERS:
            made.append((work, peer, [str(ROOT / f".peers/{peer}/bin/python"), str(HERE / f"run_{peer}.py"), *told]))
        if work == "workload":
            made.append((work, ALONE, [*made[-1 - len(PEERS)][2], "--processes", "1"]))
    return made


def run(command: list[str], limit_s: float, place: Path) -> dict[str, Any]:
    """Run a command to its end and return what it wrote; RunFailed with its last words."""
    out, log = place / "out.json", place / "log"
    out.unlink(missing_ok=True)
    mark = uuid.uuid4().hex
    environment = os.environ | {
        MARK: mark,
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_HOME": str(place / "flower"),
        "RAY_TMPDIR": str(place),  # short: sockets lie below it
    }
    load = os.getloadavg()[0]
    began = time.perf_counter()
    with log.open("wb") as words:
        process = subprocess.Popen(  # noqa: S603
            [*command, "--out", str(out)], stdin=subprocess.DEVNULL, stdout=words, stderr=words, env=environment
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            wall_s = time.perf_counter() - began
            end(mark, 0.0 if process.poll() is None else END_S)
            process.wait()
    if code != 0 or not out.exists():
        why = f"it did not end within {limit_s:g} s" if code is None else f"it ended with {code}"
        if code == 0:
            why += ", but told nothing"
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise RunFailed(f"{why}; its last words:\n{last}")
    return json.loads(out.read_text(encoding="utf-8")) | {"wall_s": wall_s, "load": load}


def end(mark: str, patience_s: float) -> None:
    """Return when no process with the mark is left; those that are still there after a while are killed."""
    deadline = time.monotonic() + patience_s
    while left := marked(mark):
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """Processes whose environment has the mark; one that has ended has no environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def main() -> None:
    """All passes; ends with 1 when a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10, help="of each run; the first is not counted")
    parser.add_argument("--epochs", type=int, default=1, help="of local training in `workload`")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a run may take")
    parser.add_argument("--work", choices=list(WORKS), action="append", help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    for name, least in (("passes", 1), ("rounds", 2), ("epochs", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name}: must be at least {least}, got {getattr(given, name)}")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no directory {given.json.absolute().parent}; make it, or name another file")
    todo = commands(given.rounds, given.epochs, given.work or list(WORKS))
    facts = machine()
    runs: list[Run] = []
    failed: list[str] = []
    versions: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="peers-") as place:
        for number in range(1, given.passes + 1):
            for work, who, command in todo if number % 2 else todo[::-1]:
                name = f"pass {number} of {given.passes}: {work}, {who}"
                try:
                    told = run(command, given.limit, Path(place))
                except RunFailed as error:
                    failed.append(f"{name}: {error}")
                    print(f"{name}: FAILED: {error}", file=sys.stderr, flush=True)
                    continue
                versions[who.removesuffix("-alone")] = told.pop("versions")
                runs.append(Run(number, work, who, **told))
                print(f"{name}: {runs[-1].round_s:.3f} s a round, load {told['load']:.2f}", file=sys.stderr, flush=True)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for who, found in versions.items():
        print(f"{who}: {', '.join(f'{key} {value}' for key, value in found.items())}")
    print(f"rounds of a run: {given.rounds}, the first not counted; epochs: {given.epochs}")
    if runs:
        low, _, high = spread([run.load for run in runs])
        print(f"load when runs began: {low:.2f} to {high:.2f}\n")
        print("\n".join(lines(runs)))
    for line in failed:
        print(f"\nFAILED: {line.splitlines()[0]}")
    if given.json is not None:
        told = {**facts, "rounds": given.rounds, "epochs": given.epochs, "failed": failed, "versions": versions}
        given.json.write_text(json.dumps({**told, **flat(runs)}, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
