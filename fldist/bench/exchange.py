"""`fldist bench exchange`: what it costs to bring a model to three hosts and back, against a bare loop on the same
backend and plain TCP; and how many models the server holds while it does so in FedAvg.

The runtime is the real one: a run whose algorithm's clients return what they were sent. Ours and the bare loop take
turns round by round in processes of their own; whoever's turn it is not waits in a blocking read.
"""

from __future__ import annotations

import importlib.util
import subprocess
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.bench.measure import Answer, Figure, Pair, Report, Say, Target, check_pairs, interleave, quartiles, ratios
from fldist.bench.party import Party, Stage, stage
from fldist.config import components, load
from fldist.data.client_data import ClientData
from fldist.data.datasets import Dataset
from fldist.data.task import Task
from fldist.fold import Fold, Mean, collect
from fldist.inspection import find_mpirun, mpirun_flags
from fldist.kinds import Weights
from fldist.params import Layout

BACKENDS = ("all", "gloo", "mpi")
HOSTS = 3
SHAPE = (3, 32, 32)
CLASSES = 10
MODEL = "resnet18_32"
QUICK_MODEL = {"name": "mlp", "hidden": [16]}
WARM_UP = 3
"""Rounds of each party that are not counted."""
PAIRS = 15
MEMORY_ROUNDS = 3
MANY, MANY_PER_ROUND = 1000, 30

GLOO_TARGET = Target(1.25)
MPI_TARGET = Target(1.4)
MEMORY_TARGET = Target(3.0 + HOSTS)
SAME_MEMORY = 0.5
"""Models by which the server's memory with many clients may exceed that with few, for no difference to be seen."""


# ---- what runs
@dataclass(frozen=True)
class Blank:
    """Noise in the shape of CIFAR-10, `samples` of it, for runs whose result nobody looks at."""

    samples: int = 2 * HOSTS

    def load(self) -> Dataset:
        """uint8 [samples, 3, 32, 32], every class as often as any other."""
        x = np.random.default_rng(0).integers(0, 256, (self.samples, *SHAPE), dtype=np.uint8)
        y = np.arange(self.samples, dtype=np.int64) % CLASSES
        return Dataset(x, y, x[:2], y[:2], CLASSES)


class Back(NamedTuple):
    """One client's reply."""

    y: Weights  # the model as it came


@dataclass(frozen=True)
class Exchange(Algorithm):
    """The model goes to every client and back, once kept and once folded; `kept_s` and `folded_s` are logged."""

    def init_server(self, task: Task) -> State:
        """One model, x."""
        return State(x=task.init_params())

    def round(self, server: Server, clients: Clients) -> None:
        """Two calls, each timed whole, at the server."""
        kept_s, kept = self._timed(server, clients, collect())
        if server.round == 1 and not all(y.equals(server.x) for y in kept.values()):
            raise RuntimeError("what came back is not what was sent")
        del kept
        folded_s, folded = self._timed(server, clients, Mean())
        if server.round == 1 and not np.allclose(folded.floats, server.x.floats, rtol=1e-6, atol=1e-7):
            raise RuntimeError("the mean of what came back is not what was sent")
        server.log(kept_s=kept_s, folded_s=folded_s)

    def _timed(self, server: Server, clients: Clients, fold: Fold) -> tuple[float, Any]:
        everyone = clients.all()
        began = time.perf_counter()
        got = everyone.call(self.back, x=server.x, fold={"y": fold})
        return time.perf_counter() - began, got.y

    @on_client
    def back(self, me: Me, data: ClientData, x: Weights) -> Back:
        """Return it."""
        return Back(x)


def exchange_config(quick: bool, rounds: int, **network: Any) -> dict[str, Any]:
    """A run of `Exchange` with one client a host; nothing is written to the disk but its lines."""
    return {
        "name": "exchange",
        "rounds": rounds,
        "clients": {"num_clients": HOSTS},
        "task": {
            "data": {"name": "fldist.bench.exchange:Blank"},
            "model": QUICK_MODEL if quick else MODEL,
            "travel": "params",
        },
        "algorithm": "fldist.bench.exchange:Exchange",
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "network": network,
        "deadlines": {"join_s": 120.0, "round_deadline_s": 60.0},
    }


def fedavg_config(quick: bool, clients: int, per_round: int) -> dict[str, Any]:
    """A run of FedAvg with one step of two samples a client, checkpoints as by default, no evaluation."""
    config = exchange_config(quick, MEMORY_ROUNDS)
    del config["checkpoint"]
    config["clients"] = {"num_clients": clients, "per_round": per_round}
    config["task"]["data"] = {"name": "fldist.bench.exchange:Blank", "samples": 2 * clients}
    return config | {"algorithm": "fedavg", "local": {"batch_size": 2, "lr": 1e-4}}


def model_size(quick: bool) -> int:
    """Floats that travel: the model's parameters."""
    build = components(load(exchange_config(quick, 1))).build_model
    return Layout.of(build(SHAPE, CLASSES)).num_params


# ---- measuring
def measure(
    pairs: int | None = None,
    *,
    backend: str = "all",
    quick: bool = False,
    say: Say = lambda text: None,
) -> Report:
    """Exchange on the backends asked for, and the server's memory; see the module."""
    pairs = check_pairs(pairs, quick, PAIRS)
    if backend not in BACKENDS:
        raise ValueError(f"--backend: {backend!r} is none of {', '.join(BACKENDS)}")
    numel = model_size(quick)
    report = Report(
        f"exchange: {numel:,} float32 ({4 * numel / 1e6:.1f} MB) to {HOSTS} hosts and back, "
        f"{_bytes_a_round(numel) / 1e6:.1f} MB a round",
        quick=quick,
    )
    raw_s: float | None = None
    with stage() as place:
        if backend in ("all", "gloo"):
            raw_s = _measure_gloo(report, place, pairs, numel, quick, say)
        else:
            report.absent.append("gloo: not asked for")
    if backend in ("all", "mpi"):
        problem = no_mpi()
        if problem is None:
            with stage() as place:
                _measure_mpi(report, place, pairs, numel, quick, say, raw_s)
        else:
            report.absent.append(f"MPI: {problem}")
    else:
        report.absent.append("MPI: not asked for")
    if backend in ("all", "gloo"):
        _measure_memory(report, numel, quick, say)
    return report


def _bytes_a_round(numel: int) -> int:
    return 2 * HOSTS * 4 * numel


def _bare_gloo(place: Stage, numel: int, rounds: int) -> Party:
    store = str(place.directory / "store")
    return place.party("bare-gloo", "fldist.bench.bare:gloo", numel=numel, hosts=HOSTS, rounds=rounds, store=store)


def _warm(*parties: Party) -> None:
    for party in parties:
        party.ready()
    for _ in range(WARM_UP):
        for party in parties:
            party.go()


def _measure_gloo(report: Report, place: Stage, pairs: int, numel: int, quick: bool, say: Say) -> float:
    """Ours, the bare loop and TCP in turn, then ours with checksums and the bare loop; returns TCP's seconds."""
    rounds = WARM_UP + pairs
    say(f"gloo: {pairs} pairs of ours and a bare loop")
    ours = place.run("gloo", exchange_config(quick, rounds), nproc=1 + HOSTS)
    bare = _bare_gloo(place, numel, WARM_UP + 2 * pairs)
    raw = place.party("tcp", "fldist.bench.bare:tcp", numel=numel, hosts=HOSTS, rounds=rounds)
    _warm(ours, bare, raw)
    raw_s: list[float] = []
    done = interleave(ours.go, bare.go, pairs, after=lambda: raw_s.append(raw.go()["round_s"]))
    tcp_s = quartiles(raw_s)[1]
    _add_exchange(report, "gloo", done, numel, GLOO_TARGET, tcp_s)
    gb = _bytes_a_round(numel) / 1e9
    report.add(Figure("raw_tcp_gb_per_s", "plain TCP on loopback", [gb / s for s in raw_s], "GB/s"))
    say(f"gloo with full checksums: {pairs} pairs")
    checked = place.run("gloo-checksum", exchange_config(quick, rounds, checksum="full"), nproc=1 + HOSTS)
    _warm(checked)
    done = interleave(checked.go, bare.go, pairs)
    values = ratios(done, "kept_s", "round_s")
    report.add(Figure("gloo_checksum_ratio", "gloo with full checksums: ours / bare", values))
    return tcp_s


def _add_exchange(report: Report, name: str, done: list[Pair], numel: int, target: Target, tcp_s: float | None) -> None:
    gb = _bytes_a_round(numel) / 1e9
    ratio = report.add(Figure(f"{name}_ratio", f"{name}: ours / bare", ratios(done, "kept_s", "round_s"), "", target))
    report.add(Figure(f"{name}_fold_ratio", f"{name} with folding: ours / bare", ratios(done, "folded_s", "round_s")))
    ours_s = report.add(Figure(f"{name}_s", f"{name}: ours", [p.ours["kept_s"] for p in done], "s"))
    bare_s = report.add(Figure(f"{name}_bare_s", f"{name}: bare", [p.other["round_s"] for p in done], "s"))
    report.add(Figure(f"{name}_gb_per_s", f"{name}: ours", [gb / p.ours["kept_s"] for p in done], "GB/s"))
    report.add(Figure(f"{name}_bare_gb_per_s", f"{name}: bare", [gb / p.other["round_s"] for p in done], "GB/s"))
    text = (
        f"{name}: of {1e3 * ours_s:.1f} ms a round the bare loop needs {1e3 * bare_s:.1f} ms; what ours adds (packing, "
        f"memory, acknowledgements, threads) is {100 * (ratio - 1):+.0f} %"
    )
    if tcp_s is not None:
        text += f"; plain TCP would take {1e3 * tcp_s:.1f} ms, the bare loop is at {bare_s / tcp_s:.2f} of that"
    report.limits.append(text)


def no_mpi() -> str | None:
    """Why nothing can be measured on MPI here, or None."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed; pip install 'fldist[mpi]' brings it and mpirun"
    if find_mpirun() is None:
        return "there is no mpirun on PATH; activate the environment that has it"
    return None


def mpirun_command(ranks: int) -> list[str]:
    """mpirun with what it wants on this machine, without a program."""
    launcher = find_mpirun()
    assert launcher is not None
    version = subprocess.run([launcher, "--version"], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    return [launcher, "-n", str(ranks), *mpirun_flags(version.stdout, ranks)]


def _measure_mpi(
    report: Report, place: Stage, pairs: int, numel: int, quick: bool, say: Say, tcp_s: float | None
) -> None:
    rounds = WARM_UP + pairs
    say(f"MPI: {pairs} pairs of ours and a bare loop")
    launcher = mpirun_command(1 + HOSTS)
    ours = place.run("mpi", exchange_config(quick, rounds), launcher=launcher)
    bare = place.job("bare-mpi", launcher, 1 + HOSTS, "fldist.bench.bare:mpi", numel=numel, rounds=rounds)
    _warm(ours, bare)

    def bare_alone() -> Answer:
        with ours.held():  # its threads look for messages every half millisecond, which the bare loop need not pay for
            return bare.go()

    _add_exchange(report, "mpi", interleave(ours.go, bare_alone, pairs), numel, MPI_TARGET, tcp_s)
    report.notes.append("MPI between ranks of one machine is what its library chooses by default: shared memory")


# ---- the server's memory
def _measure_memory(report: Report, numel: int, quick: bool, say: Say) -> None:
    few = _models_held(report, numel, quick, HOSTS, HOSTS, say)
    if few is None:
        return
    what = f"server's memory, FedAvg, {HOSTS} clients: (peak - base) / model"
    held = report.add(Figure("server_models", what, [few], "models", MEMORY_TARGET))
    clients, per_round = (20, 6) if quick else (MANY, MANY_PER_ROUND)
    many = _models_held(report, numel, quick, clients, per_round, say)
    if many is not None:
        what = f"the same with {clients:,} clients, {per_round} a round"
        report.add(Figure("server_models_1000", what, [many], "models", Target(round(held + SAME_MEMORY, 2))))
    report.limits.append(
        "server's memory: the sums (8 bytes a parameter: 2 models), the new model and a receive buffer for each of "
        f"{HOSTS} hosts make {3 + HOSTS}; the model that is sent is in the base"
    )


def _models_held(report: Report, numel: int, quick: bool, clients: int, per_round: int, say: Say) -> float | None:
    """(peak of the rounds - before round 1) / model at a fresh server; None, and a word in the report, if not known."""
    say(f"server's memory: {MEMORY_ROUNDS} rounds of FedAvg, {clients} clients")
    with stage() as place:
        run = place.run("memory", fedavg_config(quick, clients, per_round), nproc=1 + HOSTS)
        base = run.ready()
        for _ in range(MEMORY_ROUNDS):
            last = run.go()
    if "rss_bytes" not in base:
        report.absent.append("server's memory: this system does not tell a process's peak (it needs Linux's /proc)")
        return None
    return float(last["peak_bytes"] - base["rss_bytes"]) / (4 * numel)
