"""What a rank calculates on: which GPU, what is refused, how values go to a device and back. A machine's GPUs are put
in place by hand; the device `meta`, which holds no values, stands for one where only the way of things is looked at.
The last tests need a GPU and are skipped without one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fldist
from fldist.algorithm import State
from fldist.config import ConfigError, build, load, load_resumed
from fldist.fold import FixedPoint, FoldContext
from fldist.kinds import Kind
from fldist.params import Layout, Params, Slot
from fldist.runner import choose_backend, run_here
from fldist.runtime import device as devices
from fldist.runtime.device import CPU, Place, Seats, nccl_problem, resolve
from fldist.runtime.host import Host
from fldist.runtime.launch import World
from fldist.runtime.membership import RunStopped
from fldist.runtime.state import ClientStates, moved
from fldist.seeding import forked, reseed
from fldist.wire import staging
from fldist.wire.codec import Frame, FrameBuilder, FrameType, Head, Part
from fldist.wire.codec import Place as Where
from tests.conftest import Hosts, small
from tests.needs import needs_gpus
from tests.test_launch import ROOT, mpirun

META = torch.device("meta")
LAYOUT = Layout((Slot("w", (3,), 0, 3),), (), ())


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts so many GPUs, and a torch with NCCL, into this machine."""

    def put(count: int, nccl: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)

    return put


# ---- which device
@pytest.mark.parametrize(
    ("wanted", "count", "place", "found"),
    [
        ("auto", 0, Place(), "cpu"),
        ("auto", 1, Place(), "cuda:0"),
        ("auto", 4, Place(2, 4), "cuda:2"),
        ("auto", 2, Place(5, 8), "cuda:1"),
        ("cuda", 1, Place(3, 4), "cuda:0"),
        ("cpu", 4, Place(1, 4), "cpu"),
    ],
)
def test_a_rank_finds_its_device_by_its_place(gpus: Any, wanted: Any, count: int, place: Place, found: str) -> None:
    gpus(count)
    assert str(resolve(wanted, place)) == found


def test_cuda_without_a_gpu_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"^device: cuda, but .* on this machine .*; use device=cpu or auto$"):
        fldist.run(small(device="cuda"), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_torch_for_cuda_that_finds_no_gpu_says_so(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match="device: cuda, but torch finds no GPU it can use"):
        resolve("cuda", Place())


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"device: input should be 'auto', 'cpu' or 'cuda'; got 'tpu'"):
        load(small(device="tpu"))


def test_a_host_that_has_no_gpu_says_why_it_cannot_take_part(
    tmp_path: Path, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's machine has what is asked for, the host's has not."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(fldist.runner, "resolve", lambda wanted, place: torch.device("cpu"))
    with pytest.raises(RunStopped, match=r"host 1 cannot take part: device: cuda, but .* use device=cpu or auto"):
        run_here(load(small(device="cuda")), nproc=2, output=tmp_path / "run", spawn=hosts)
    assert "this host cannot take part" in (tmp_path / "run" / "rank-1.log").read_text()


def test_a_run_says_what_every_rank_calculates_on(tmp_path: Path, hosts: Hosts) -> None:
    run_here(load(small(device="cpu")), nproc=3, output=tmp_path / "run", spawn=hosts)
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert facts["device"] == "cpu"
    assert {rank: host["device"] for rank, host in facts["hosts"].items()} == {"1": "cpu", "2": "cpu"}
    assert "rank 0: calculates on cpu" in (tmp_path / "run" / "rank-0.log").read_text()
    assert "rank 1: calculates on cpu" in (tmp_path / "run" / "rank-1.log").read_text()


# ---- which backend
ALONE = World(0, 1, "alone")


@pytest.mark.parametrize(
    ("count", "nproc", "changes", "backend"),
    [
        (0, 3, {}, "gloo"),
        (2, 3, {}, "gloo"),
        (3, 3, {}, "gloo"),
        (3, 3, {"backend": "nccl"}, "nccl"),
        (4, 3, {"device": "cpu"}, "gloo"),
        (4, 3, {"backend": "gloo"}, "gloo"),
        (4, 3, {"backend": "nccl", "device": "cuda"}, "nccl"),
        (4, 1, {}, "in-process"),
    ],
)
def test_auto_means_gloo_and_nccl_is_asked_for(
    gpus: Any, count: int, nproc: int, changes: dict[str, Any], backend: str
) -> None:
    gpus(count)
    assert choose_backend(load(small(**changes)), ALONE, nproc) == backend


@pytest.mark.parametrize(
    ("local", "address", "ranks"), [(2, "node7", 0), (5, "node7", 5), (1, "127.0.0.1", 8)], ids=["fits", "five", "all"]
)
def test_under_torchrun_it_depends_on_the_ranks_of_the_machine(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, local: int, address: str, ranks: int
) -> None:
    """Agents of their own on one machine each say that they have one rank; the address tells that all are here."""
    gpus(4)
    monkeypatch.setenv("MASTER_ADDR", address)
    settings, world = load(small(backend="nccl")), World(0, 8, "torchrun", False, 0, local)
    if not ranks:
        assert choose_backend(settings, world, 1) == "nccl"
        return
    with pytest.raises(ConfigError, match=f"this machine has {ranks} ranks on 4; .* use backend=gloo"):
        choose_backend(settings, world, 1)


def test_mpi_carries_bodies_itself(gpus: Any) -> None:
    gpus(4)
    assert choose_backend(load(small()), World(0, 3, "mpi"), 1) == "mpi"
    with pytest.raises(ConfigError, match="backend: nccl does not go with mpirun; use backend=mpi or auto"):
        choose_backend(load(small(backend="nccl")), World(0, 3, "mpi"), 1)


@pytest.mark.parametrize(
    ("count", "nccl", "nproc", "device", "reason"),
    [
        (4, True, 1, "auto", "backend: nccl needs at least two ranks, a server and a host"),
        (4, True, 3, "cpu", "backend: nccl moves bodies between GPUs, and device is cpu; use backend=gloo, or"),
        (0, True, 3, "auto", "backend: nccl needs a GPU for every rank, and torch finds none .*; use backend=gloo"),
        (4, False, 3, "auto", "backend: this torch was built without NCCL; install a CUDA build .* or use backend"),
        (2, True, 3, "cuda", "has 3 ranks on 2; start fewer, or use backend=gloo: .* several ranks may share a GPU"),
    ],
)
def test_nccl_is_refused_with_a_remedy(gpus: Any, count: int, nccl: bool, nproc: int, device: str, reason: str) -> None:
    gpus(count, nccl)
    with pytest.raises(ConfigError, match=reason):
        choose_backend(load(small(backend="nccl", device=device)), ALONE, nproc)
    assert (nccl_problem("auto", 3) is None) == (count >= 3 and nccl)


# ---- who has which GPU
def seat(hostname: str, gpu: str | None) -> dict[str, Any]:
    return {"hostname": hostname, "device": "cuda:0", **({"gpu": gpu} if gpu else {})}


def test_a_gpu_is_one_ranks_only() -> None:
    seats = Seats(seat("a", "GPU-1"))
    assert seats.take(1, seat("a", "GPU-2")) is None
    assert seats.take(2, seat("b", "GPU-1")) is None  # another machine
    assert seats.take(1, seat("a", "GPU-2")) is None  # back on its own
    assert "ranks 0 and 3 have the same GPU (cuda:0 of a, GPU-1)" in str(seats.take(3, seat("a", "GPU-1")))
    assert "ranks 1 and 3 have the same GPU" in str(seats.take(3, seat("a", "GPU-2")))
    seats.leave(1)
    assert seats.take(3, seat("a", "GPU-2")) is None
    assert seats.take(4, seat("c", None)) == "rank 4 has no GPU, and nccl needs one for every rank; use backend=gloo"


# ---- there and back
def params(*values: float, device: torch.device | None = None) -> Params:
    return Params(LAYOUT, torch.tensor(values, device=device))


def test_params_go_to_a_device_with_both_blocks() -> None:
    here = params(1.0, 2.0, 3.0)
    there = here.to(META)
    assert (there.floats.device, there.ints.device, there.device) == (META, META, META)
    assert here.to("cpu") is here
    assert there.zeros_like().device == META
    assert there.trainable.ints.device == META
    with pytest.raises(ValueError, match=r"these Params lie on cpu and meta; bring one over with `\.to\(device\)`"):
        here + there


def test_a_state_is_moved_whole_or_not_at_all() -> None:
    values = {"x": params(1.0, 2.0, 3.0), "n": [torch.ones(2), 3], "s": State(t=(torch.zeros(1), "a")), "none": None}
    assert moved(values, torch.device("cpu")) is values
    there = moved(values, META)
    assert there["x"].device == there["n"][0].device == there["s"].t[0].device == META
    assert (there["n"][1], there["s"].t[1], there["none"]) == (3, "a", None)
    assert values["x"].device.type == values["n"][0].device.type == "cpu"  # what is kept stays as it was


def test_what_a_client_reads_is_brought_to_its_device_once_and_watched_there() -> None:
    states = ClientStates(lambda client: State(c=params(1.0, 2.0, 3.0), calls=1), True, META)
    me = states.view(0)
    assert me.c.device == META
    assert me.c is me.c
    assert me.calls == 1
    assert states.committed(0)["c"].device.type == "cpu"
    assert me.watched.changed() is None
    me.c.floats.add_(1.0)
    assert me.watched.changed() == "me.c"


def test_what_a_client_writes_comes_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, torch.device]] = []

    def back(value: Any, device: torch.device) -> Any:
        asked.append((value, device))
        return {"c": params(7.0, 7.0, 7.0)} if isinstance(value, dict) and "c" in value else value

    states = ClientStates(lambda client: State(c=None), True, META)
    states.begin((1, 0))
    me = states.view(0)
    me.c = params(1.0, 2.0, 3.0, device=META)
    assert me.c.device == META  # as it was set, for the rest of the call
    monkeypatch.setattr("fldist.runtime.state.moved", back)
    states.stage(0, me.writes, "v")
    states.verdict((1, 0), True, {})
    assert asked[-1][1] == torch.device("cpu")
    assert states.committed(0)["c"].floats.tolist() == [7.0, 7.0, 7.0]


def part(tensor: torch.Tensor) -> Part:
    size = tensor.numel() * tensor.element_size()
    return Part(Kind.WEIGHTS, tensor.dtype, tuple(tensor.shape), size, size, size < 4096, tensor=tensor)


def test_a_frame_is_moved_part_by_part_whoever_shares_them() -> None:
    frame = Frame(Head(FrameType.CALL), parts=[part(torch.zeros(2000)), part(torch.zeros(2))])
    before = [p.tensor for p in frame.parts]
    staging.to_device(frame, torch.device("cpu"))
    assert all(p.tensor is t for p, t in zip(frame.parts, before, strict=True))
    staging.to_device(frame, META)
    assert all(p.tensor is not None and p.tensor.device == META for p in frame.parts)
    once = [p.tensor for p in frame.parts]
    staging.to_device(frame, META)
    assert all(p.tensor is t for p, t in zip(frame.parts, once, strict=True))


def test_what_is_broadcast_is_received_where_the_link_receives_bodies() -> None:
    asked: list[Any] = []

    def empty(shape: Any, *, dtype: torch.dtype) -> torch.Tensor:
        asked.append((shape, dtype))
        return torch.empty(shape, dtype=dtype, device=META)

    body, everybodys = part(torch.zeros(2000)), part(torch.zeros(3000))
    body.place, everybodys.place = Where.BODY, Where.WORLD
    frame = Frame(Head(FrameType.CALL), parts=[body, everybodys])
    frame.allocate_world(empty)
    assert asked == [((3000,), torch.float32)]
    assert everybodys.tensor is not None and everybodys.tensor.device == META


def test_what_a_host_has_folded_is_brought_to_where_the_link_takes_it_from() -> None:
    """gloo and MPI take blocks from the CPU's memory, NCCL from a GPU's."""
    brought: list[torch.Tensor] = []

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
        brought.append(tensor)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    fold = FixedPoint(FoldContext(params(1.0, 2.0, 3.0), 10.0), divide=True)
    fold.floats, fold.ints = fold.floats.to(META), fold.ints.to(META)
    told: list[Any] = [(3, "sum"), (0, "sum")]
    for place, device in ((to_cpu, CPU), (staging.as_it_is, META)):
        host = Host(build(load(small(topology="reduce")), CPU), place)
        host._folds = SimpleNamespace(fixed=lambda: [fold])  # type: ignore[assignment]
        assert [(b.device, b.dtype, b.numel(), how) for b, how in host.blocks(told)] == [
            (device, torch.int64, n, how) for n, how in told
        ]
        assert [b.device for b, _ in host.blocks([(3, "sum"), (0, "max")])] == [CPU, CPU]  # nobody was called
    assert len(brought) == 2


def test_a_result_is_given_out_only_when_its_copy_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Pinned:
        def copy_(self, source: Any, non_blocking: bool = False) -> None:
            assert non_blocking
            done.append(f"copy from {source.device}")

    made = Pinned()
    monkeypatch.setattr(staging, "pinned_empty", lambda shape, dtype: made)
    monkeypatch.setattr(staging, "settle", lambda device: done.append(f"settle {device}"))
    on_gpu = SimpleNamespace(device=torch.device("cuda", 1), shape=(3,), dtype=torch.float32)
    assert staging.to_host(on_gpu) is made  # type: ignore[arg-type,comparison-overlap]
    assert done == ["copy from cuda:1", "settle cuda:1"]
    here = torch.ones(3)
    assert staging.to_host(here) is here
    assert len(done) == 2


def test_everything_a_task_gives_out_is_on_its_device() -> None:
    task = build(load(small(task__normalize="standard", task__public={"n": 10})), META).task
    x, y = task.rows(0)
    assert x.device == y.device == META
    assert task.public()[0].device == META
    assert next(iter(task.test_batches(8)))[0].device == META
    assert task.pooled()[0].device == META
    assert task.init_params().device.type == "cpu"
    with task.network(task.init_params()) as network:
        leaves = [*network.module.parameters(), *network.module.buffers(), network.gradient, *network.weights]
        assert {t.device for t in leaves} == {META}
    assert next(task.frozen_copy(task.init_params()).parameters()).device == META


def test_a_gpu_that_is_in_use_is_seeded_and_put_back_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seen.append(seed))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: "before")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: seen.append(state))
    reseed(1, "client", 0)
    assert seen == []  # none is in use
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with forked(1, "client", 0):
        pass
    with forked(1, "client", 1):
        pass
    assert seen[1] == seen[3] == "before"
    assert seen[0] != seen[2]


def test_the_cpu_is_left_as_it_is() -> None:
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    devices.set_up(torch.device("cpu"))()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == before
    assert devices.describe(torch.device("cpu")) == {"device": "cpu"}


def test_a_gpu_is_set_up_to_repeat_itself_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32)
    restore = devices.set_up(torch.device("cuda", 2))
    assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32) == (True, False, False, False)
    restore()
    assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32) == before
    assert chosen == [torch.device("cuda", 2)]


# ---- with a GPU
def model(directory: Path) -> torch.Tensor:
    return torch.cat(
        [t.double().flatten() for _, t in sorted(load_file(directory / "model/model.safetensors").items())]
    )


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
@pytest.mark.parametrize("nproc", [1, 3])
def test_a_gpu_gives_what_the_cpu_gives_up_to_rounding(tmp_path: Path, algorithm: str, nproc: int) -> None:
    """Two hosts and the server share one GPU; batches are the same on both, so results differ by rounding alone."""
    needs_gpus()
    backend = "gloo" if nproc > 1 else "in-process"
    results = {}
    for device in ("cpu", "cuda"):
        config = small(algorithm=algorithm, rounds=3, device=device, backend=backend)
        results[device] = fldist.run(config, output=tmp_path / device, nproc=nproc)
    assert results["cuda"]["bytes"]["logical"] == results["cpu"]["bytes"]["logical"]
    torch.testing.assert_close(model(tmp_path / "cuda"), model(tmp_path / "cpu"), rtol=1e-3, atol=1e-4)
    again = fldist.run(
        small(algorithm=algorithm, rounds=3, device="cuda", backend=backend), output=tmp_path / "again", nproc=nproc
    )
    assert again["state_hash"] == results["cuda"]["state_hash"]


@pytest.mark.parametrize("topology", ["collective", "reduce"])
def test_on_gpus_all_topologies_give_the_same_bits_over_gloo_and_mpi(tmp_path: Path, topology: str) -> None:
    """What the ranks exchange at once is staged like bodies. All share one GPU."""
    needs_gpus()
    settings = small(algorithm="scaffold", rounds=3, device="cuda", task__model={"name": "mlp", "hidden": [64]})
    star = fldist.run({**settings, "backend": "gloo"}, output=tmp_path / "star", nproc=3)
    there = fldist.run({**settings, "backend": "gloo", "topology": topology}, output=tmp_path / "gloo", nproc=3)
    jobs = [{"config": {**settings, "topology": topology}, "output": str(tmp_path / "mpi")}]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = mpirun(3, [str(ROOT / "tests" / "mpi_runs.py"), str(tmp_path / "jobs.json")])
    assert done.returncode == 0, done.stderr
    by_mpi = json.loads((tmp_path / "mpi" / "result.json").read_text())
    assert there["state_hash"] == by_mpi["state_hash"] == star["state_hash"]
    assert there["bytes"]["logical"] == by_mpi["bytes"]["logical"] == star["bytes"]["logical"]


def test_a_run_on_a_gpu_goes_on_from_its_files(tmp_path: Path) -> None:
    needs_gpus()
    config = small(algorithm="scaffold", rounds=4, device="cuda")
    straight = fldist.run(config, output=tmp_path / "straight")
    fldist.run({**config, "rounds": 2}, output=tmp_path / "run")
    resumed = run_here(load_resumed(tmp_path / "run", ["rounds=4"]), output=tmp_path / "run", resume=True)
    assert resumed["state_hash"] == straight["state_hash"]


def test_a_fold_gives_the_same_bits_on_a_gpu() -> None:
    needs_gpus()
    layout = Layout((Slot("w", (300_000,), 0, 300_000),), (), ())
    drawn = [Params(layout, torch.randn(300_000, generator=torch.Generator().manual_seed(i))) for i in range(4)]
    results = []
    for device in ("cpu", "cuda:0"):
        fold = FixedPoint(FoldContext(drawn[0].to(device), 10.0), divide=True)
        for client, value in enumerate(drawn):
            fold.add(client, value, client + 1.0)
        fold.remove(2, drawn[2], 3.0)
        results.append(fold.result().to("cpu"))
    assert results[0].equals(results[1])


def test_pinned_memory_is_used_again() -> None:
    needs_gpus()
    source = torch.arange(100_000, dtype=torch.float32, device="cuda:0")
    addresses = set()
    for _ in range(5):
        copy = staging.to_host(source)
        assert copy.is_pinned()
        assert torch.equal(copy, torch.arange(100_000, dtype=torch.float32))
        addresses.add(copy.data_ptr())
        del copy
    assert len(addresses) == 1


def test_small_parts_of_a_gpu_ride_in_the_head() -> None:
    needs_gpus()
    builder = FrameBuilder(Head(FrameType.REPLY), place=staging.as_it_is)
    index = builder._part(Kind.LOGITS, torch.ones(3, device="cuda:0"))
    small_part = builder.frame.parts[index].tensor
    large_part = builder.frame.parts[builder._part(Kind.LOGITS, torch.ones(5000, device="cuda:0"))].tensor
    assert small_part is not None and small_part.device.type == "cpu"
    assert large_part is not None and large_part.device.type == "cuda"
