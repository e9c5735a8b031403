"""`fldist bench workload`: FedAvg on MNIST with LeNet-5, as it is used to compare programs with each other.

100 clients with 600 samples each, 10 a round, batches of 32, one epoch, SGD with a rate of 0.01, no evaluation. One
process against a server with two hosts, in seconds; and one process against `loop`, a bare training loop over tensors
of the same clients, in CPU seconds. Ours is timed from the order to begin a round to the moment when all of it is done
and written: selection, both ways through the codec, training, averaging, ledger, checkpoint, rounds.jsonl.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fldist.bench.measure import Figure, Report, Say, Target, check_pairs, interleave, ratios
from fldist.bench.party import Orders, stage
from fldist.config import build, load

HOSTS = 2
PAIRS = 15
WARM_UP = 2
SPEEDUP_TARGET = Target(1.7, at_most=False)
LOOP_TARGET = Target(1.05)
LR = 0.01
BATCH = 32


def config(rounds: int, quick: bool) -> dict[str, Any]:
    """The workload; when quick, on the digits that are always there and with fewer clients."""
    return {
        "name": "workload",
        "rounds": rounds,
        "clients": {"num_clients": 20, "per_round": 4} if quick else {"num_clients": 100, "per_round": 10},
        "task": {"data": "digits" if quick else "mnist", "model": "lenet5", **({"resize": 28} if quick else {})},
        "local": {"epochs": 1, "batch_size": BATCH, "lr": LR},
        "eval": {"every": 0},
        "deadlines": {"join_s": 120.0},
    }


# ---- the bare loop
def loop(path: str, config: dict[str, Any], rounds: int) -> None:
    """Be the party that trains the same clients in a bare loop. What it needs is made before the first round."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    job = build(load(config))
    model = job.task.architecture().template
    clients = [job.task.rows(client) for client in range(job.per_round)]
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    orders = Orders(path)
    orders.ready(samples=sum(len(y) for _, y in clients))
    for _ in range(rounds):
        if not orders.wait():
            break
        began, cpu = time.perf_counter(), time.process_time()
        average = bare_round(model, average, clients)
        orders.answer(round_s=time.perf_counter() - began, cpu_s=time.process_time() - cpu)


def bare_round(model: Any, start: dict[str, Any], clients: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Train every client from `start`, one after the other; the mean of their models, weighted by samples.

    clients: x [n, ...] float32 and y [n] of each; nothing is kept between rounds, nothing is checked or counted.
    """
    samples = sum(len(y) for _, y in clients)
    average = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    model.train()
    for x, y in clients:
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for rows in torch.randperm(len(y)).split(BATCH):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for name, tensor in model.state_dict().items():
            average[name].add_(tensor, alpha=len(y) / samples)
    return average


# ---- measuring
def measure(pairs: int | None = None, *, quick: bool = False, say: Say = lambda text: None) -> Report:
    """Both comparisons; see the module."""
    pairs = check_pairs(pairs, quick, PAIRS)
    repeats = 2 * pairs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = "20 clients of digits, 4 a round" if quick else "100 clients of MNIST, 10 a round"
    report = Report(f"workload: FedAvg, LeNet-5, {name}, batch {BATCH}, 1 epoch", quick=quick)
    build(load(config(1, quick)))  # refuses what the parties would: no MNIST, above all
    with stage() as place:
        say(f"workload: {pairs} pairs of one process and two hosts, {repeats} of one process and a bare loop")
        alone = place.run("alone", config(WARM_UP + pairs + repeats, quick))
        hosts = place.run("hosts", config(WARM_UP + pairs, quick), nproc=1 + HOSTS)
        bare = place.party("loop", "fldist.bench.workload:loop", config=config(1, quick), rounds=WARM_UP + repeats)
        for party in (alone, hosts, bare):
            party.ready()
        for _ in range(WARM_UP):
            for party in (alone, hosts, bare):
                party.go()
        spread = interleave(alone.go, hosts.go, pairs)
        looped = interleave(alone.go, bare.go, repeats)
    alone_s = [pair.ours["round_s"] for pair in (*spread, *looped)]
    round_s = report.add(Figure("round_s", "one process: a round", alone_s, "s"))
    hosts_s = report.add(Figure("hosts_round_s", f"{HOSTS} hosts: a round", [p.other["round_s"] for p in spread], "s"))
    values = ratios(spread, "round_s", "round_s")
    report.add(Figure("speedup_ratio", f"one process / {HOSTS} hosts", values, "", SPEEDUP_TARGET))
    values = ratios(looped, "cpu_s", "cpu_s")
    ratio = report.add(Figure("loop_ratio", "one process / bare loop, CPU seconds", values, "", LOOP_TARGET))
    cpu_s = report.add(Figure("cpu_s", "one process: CPU of a round", [p.ours["cpu_s"] for p in looped], "s"))
    loop_s = report.add(Figure("loop_cpu_s", "bare loop: CPU of a round", [p.other["cpu_s"] for p in looped], "s"))
    if cores < HOSTS:
        report.notes.append(f"{cores} usable core: {HOSTS} hosts cannot be quicker than one process")
    share = 1e3 * round_s / HOSTS
    report.limits.append(
        f"{HOSTS} hosts with a core each could take {share:.0f} ms a round, one process's time divided by {HOSTS}; "
        f"they take {1e3 * hosts_s:.0f} ms"
    )
    report.limits.append(
        f"of {1e3 * cpu_s:.1f} ms of CPU a round a bare loop's training and averaging are {1e3 * loop_s:.1f} ms; "
        f"all else is {100 * (ratio - 1):+.1f} %"
    )
    return report
