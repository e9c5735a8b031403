"""From settings to a run: which rank this process is, which link joins the ranks, and how a run ends.

Rank 0 is the server. Hosts get the configuration from it, so that all ranks run the same whatever they were
started with.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fldist import blocks
from fldist.config import ConfigError, Settings, build, check_resumed, load, load_branch, load_resumed, make_trackers
from fldist.params import Travel
from fldist.runtime.branch import Branch
from fldist.runtime.checkpoint import ClientFiles
from fldist.runtime.device import CPU, Place, describe, nccl_problem, resolve, set_up
from fldist.runtime.host import Host, refuse_link, serve_link
from fldist.runtime.keeper import Keeper, files_seen, kept_token, owned
from fldist.runtime.launch import (
    Children,
    Spawn,
    Spawned,
    Unsupervised,
    World,
    find_world,
    own_host_environment,
    spawn_host,
)
from fldist.runtime.membership import RunStopped, Supervisor, versions
from fldist.runtime.output import Output, default_directory, discard, prepare, status_of
from fldist.runtime.server import Observer, ServerLoop, fix_threads
from fldist.runtime.signals import Interrupted, interruptible, undisturbed
from fldist.wire.carrier import GLOO, Carrier
from fldist.wire.errors import PeerLost, TransportError
from fldist.wire.link import Limits, ServerLink
from fldist.wire.network import address_of, family_of, listening_address, reachable
from fldist.wire.staging import as_it_is, pinned_empty, to_host

if TYPE_CHECKING:
    from fldist.wire.gloo import GlooServer

log = logging.getLogger("fldist")

GOODBYE_S = 10.0
_STORE_KEY = "server"
_DIRECTORY_KEY = "directory"
_DONE_KEY = "done"


class Silent:
    """An observer that shows nothing; warnings go to the log."""

    def started(self, facts: dict[str, Any]) -> None: ...  # noqa: D102
    def round(self, line: dict[str, Any]) -> None: ...  # noqa: D102
    def finished(self, result: dict[str, Any]) -> None: ...  # noqa: D102

    def warning(self, text: str) -> None:  # noqa: D102
        log.warning("%s", text)

    def stopped(self, text: str) -> None:  # noqa: D102
        log.error("%s", text)


def choose_backend(settings: Settings, world: World, nproc: int) -> str:
    """The backend that `auto` means here; ConfigError for combinations that cannot be."""
    wanted = settings.backend
    place = _place(world, nproc)
    if world.launcher in ("torchrun", "mpi", "srun"):
        name = {"mpi": "mpirun"}.get(world.launcher, world.launcher)
        own = ("mpi",) if world.launcher == "mpi" else ("gloo", "nccl")
        if nproc > 1:
            raise ConfigError(f"--nproc {nproc}: {name} has started the ranks already; leave --nproc out")
        if world.size < 2:
            raise ConfigError(f"{name} started one rank; a run needs at least two, a server and a host: start more")
        if wanted not in ("auto", *own):
            raise ConfigError(f"backend: {wanted} does not go with {name}; use backend={own[0]} or auto")
        if own == ("mpi",):
            _check_checksum(settings, "mpi")
            return "mpi"
        return _gloo_or_nccl(settings, place)
    if nproc > 1:
        if wanted in ("mpi", "in-process"):
            remedy = "start it with mpirun -n N python -m fldist run ..." if wanted == "mpi" else "leave --nproc out"
            raise ConfigError(f"backend: {wanted} does not go with --nproc {nproc}; {remedy}, or use backend=gloo")
        return _gloo_or_nccl(settings, place)
    if wanted in ("gloo", "nccl", "mpi"):
        raise ConfigError(
            f"backend: {wanted} needs at least two ranks, a server and a host, and this process is alone; "
            + ("use mpirun -n 2 or more" if wanted == "mpi" else "use --nproc 2 or more, or torchrun")
            + ", or backend=in-process"
        )
    return "in-process"


def _gloo_or_nccl(settings: Settings, place: Place) -> str:
    """NCCL where it is asked for, gloo under `auto`: what nobody has run on a GPU yet is nobody's default."""
    if settings.backend != "nccl":
        return "gloo"
    problem = nccl_problem(settings.device, place.size)
    if problem is not None:
        raise ConfigError(f"backend: {problem}")
    return "nccl"


def _place(world: World, nproc: int = 1) -> Place:
    """This rank among the ranks of its machine."""
    if world.launcher == "alone":
        return Place(0, nproc)
    if world.launcher == "torchrun" and os.environ.get("MASTER_ADDR") in ("localhost", "127.0.0.1", "::1"):
        return Place(world.rank, world.size)  # all are on this machine, however many agents started them
    return Place(world.local_rank, world.local_size)


def _device(settings: Settings, place: Place) -> torch.device:
    try:
        return resolve(settings.device, place)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_checksum(settings: Settings, backend: str) -> None:
    if backend == "mpi" and settings.network.checksum == "full":
        raise ConfigError("network.checksum: full is for gloo; MPI checks what it carries: use header")


def run_here(
    settings: Settings,
    *,
    nproc: int = 1,
    output: str | Path | None = None,
    progress: bool = False,
    observer: Observer | None = None,
    spawn: Spawn = spawn_host,
    resume: bool = False,
    branch: Branch | None = None,
) -> dict[str, Any]:
    """Be this rank of the run. The server returns the result, a host an empty one when it is done.

    spawn: how `nproc` starts a host (tests use warm processes). resume: `output` holds a run that is to go on. branch:
    `output` is made from another run, and goes on.
    """
    if nproc < 1:
        raise ConfigError(f"--nproc must be at least 1, got {nproc}")
    world = find_world()
    backend = choose_backend(settings, world, nproc)
    if world.rank != 0:
        if world.own_agents and not resume and output is not None and status_of(Path(output)) == "finished":
            log.info("rank %d: the run in %s has ended before this host was started again", world.rank, output)
            return {}
        return _be_host(world, settings)
    device = _device(settings, _place(world, nproc))
    if output is None:
        output = _torchrun_directory(settings, world) if world.launcher == "torchrun" else _directory(settings)
    if branch is not None:
        branch.make(Path(output), settings.resolved())
    directory = prepare(Path(output), settings.resolved(), resume=resume)
    if observer is None and progress:
        from fldist.console import Progress

        observer = Progress()
    observer = observer or Silent()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if settings.threads > cores:
        observer.warning(f"threads: {settings.threads} threads a rank on {cores} usable cores is slow; lower it")
    restore = _fix(settings, device)
    try:
        with owned(directory), _file_log(directory / "rank-0.log"), interruptible():
            try:
                observer = _tracked(observer, settings, directory)
                if backend == "in-process":
                    return _alone(settings, directory, observer, device)
                if backend == "mpi":
                    return _serve_mpi(settings, directory, observer, world, device)
                if world.launcher in ("torchrun", "srun"):
                    return _serve_torchrun(settings, directory, observer, world, backend, device)
                return _serve_children(settings, directory, observer, nproc, spawn, backend, device)
            except Exception as error:
                if not (directory / "config.yaml").exists():
                    discard(directory)
                    if isinstance(error, OSError):
                        raise ConfigError(
                            f"output: {directory} cannot be written to ({error.strerror or error}); make room, or "
                            "name another with --output"
                        ) from None
                raise
    finally:
        restore()


def resume_here(
    directory: Path,
    overrides: Sequence[str] = (),
    *,
    stage: str | None = None,
    output: Path | None = None,
    nproc: int = 1,
    progress: bool = False,
    observer: Observer | None = None,
    spawn: Spawn = spawn_host,
) -> dict[str, Any]:
    """Be this rank of a run that goes on, or, with `stage` and `output`, of one begun from an end of a stage of it."""
    if (stage is None) != (output is None):
        raise ConfigError(
            f"--output: a run goes on in its own directory, {directory}; --from STAGE begins another one in a new one"
            if stage is None
            else f"--from: {stage} begins a run in a new directory, since {directory} stays as it is; name it with "
            "--output"
        )
    how: dict[str, Any] = {"nproc": nproc, "progress": progress, "observer": observer, "spawn": spawn}
    if stage is None:
        return run_here(load_resumed(directory, overrides), output=directory, resume=True, **how)
    settings, branch = load_branch(directory, stage, overrides)
    return run_here(settings, output=output, branch=branch, **how)


def _tracked(observer: Observer, settings: Settings, directory: Path) -> Observer:
    """The observer and the trackers together."""
    if not settings.output.trackers:
        return observer
    from fldist.trackers import Together

    config = settings.resolved()
    return Together(observer, [tracker.open(directory, config) for tracker in make_trackers(settings)])


def _fix(settings: Settings, device: torch.device) -> Callable[[], None]:
    """What makes this rank's results repeat themselves; returns what takes it back."""
    threads, gpu = fix_threads(settings.threads), set_up(device)

    def restore() -> None:
        threads()
        gpu()

    return restore


def _directory(settings: Settings) -> Path:
    algorithm = settings.algorithm.name.rpartition(":")[2].lower()
    return default_directory(Path(settings.output.root), f"{settings.name}-{algorithm}-s{settings.seed}")


def _server_loop(
    settings: Settings,
    directory: Path,
    observer: Observer,
    link: ServerLink,
    job: Any,
    ranks: list[int],
    backend: str,
    launcher: str,
    supervisor: Supervisor,
) -> ServerLoop:
    job.algorithm.check_server(job.task)
    resolved = settings.resolved()
    keeper = None
    going_on = (directory / "checkpoints").is_dir()
    if settings.checkpoint.every:
        keeper = Keeper(directory, every=settings.checkpoint.every, keep=settings.checkpoint.keep)
        keeper.begin()
        if going_on:
            parts: tuple[Travel, ...] = ("all", "floats", "params")
            layouts = [a.layout.restricted(part) for a in job.task.architectures for part in parts]
            before = load(directory / "config.yaml") if (directory / "config.yaml").is_file() else settings
            keeper.resume(layouts, partial(check_resumed, before, settings))
    elif going_on:
        raise ConfigError("checkpoint.every: 0, but a run is to go on, which needs checkpoints; set it to 1 or more")
    output = Output(directory)
    output.config(resolved)
    facts = {
        "backend": backend,
        "world_size": len(ranks) + (backend != "in-process"),
        "launcher": launcher,
        **describe(job.task.device),
    }
    log.info("rank 0: calculates on %s", facts["device"])
    output.environment({**facts, "mpi": _mpi_library() if backend == "mpi" else None})
    return ServerLoop(
        job, link, output, observer, ranks=ranks, supervisor=supervisor, facts=facts, config=resolved, keeper=keeper
    )


def _alone(settings: Settings, directory: Path, observer: Observer, device: torch.device) -> dict[str, Any]:
    from fldist.wire.local import LocalServer

    job = build(settings, device)
    keeps = bool(settings.checkpoint.every) and job.algorithm.stateful
    host = Host(job)
    host.states.files = ClientFiles(directory / "clients") if keeps else None
    link = LocalServer(host.serve_aside, job.calls())
    nobody = Unsupervised(survives_loss=True)
    return _server_loop(settings, directory, observer, link, job, [0], "in-process", "alone", nobody).run()


def _serve_children(
    settings: Settings,
    directory: Path,
    observer: Observer,
    nproc: int,
    spawn: Spawn,
    backend: str,
    device: torch.device,
) -> dict[str, Any]:
    from fldist.wire.gloo import GlooServer

    deadlines = settings.deadlines
    limits = Limits(deadlines.join_s, deadlines.client_timeout_s, deadlines.transfer_s)
    ranks = list(range(1, nproc))
    link = GlooServer(
        ranks=ranks,
        limits=limits,
        port=settings.network.control_port or 0,
        checksum=settings.network.checksum == "full",
        survives=_survives_children(settings),
        carrier=_carrier(backend, device),
        empty=_landing(backend),
    )
    restart = settings.faults.restart == "on-failure"
    children = Children(link.address, link.token, directory, limits.join_s, spawn, restart=restart)
    try:
        # started before this process has built anything: the hosts import while it does
        children.start(ranks)
        job = build(settings, device)
        return _server_loop(settings, directory, observer, link, job, ranks, backend, "children", children).run()
    finally:
        until = time.monotonic() + (GOODBYE_S if sys.exc_info()[0] is None else 1.0)
        joined = set(link.connected)
        with undisturbed():
            link.close(until - time.monotonic())
            children.stop(max(0.5, until - time.monotonic()), joined)


def _survives_children(settings: Settings) -> str:
    faults = settings.faults
    clients = "its clients move to the others" if faults.orphans == "adopt" else "its clients wait for it"
    again = " until it has been started again" if faults.restart == "on-failure" else ""
    return f"a host may die: its replies of the round are missing, and {clients}{again}; if this process dies, go on"


def _carrier(backend: str, device: torch.device) -> Carrier:
    """What carries bodies between the server and a host and between all ranks, at either end."""
    if backend != "nccl":
        return GLOO
    from fldist.wire.nccl import nccl_carrier

    return nccl_carrier(device)


def _landing(backend: str) -> Callable[..., torch.Tensor]:
    """Where the server wants replies' bodies: in the CPU's memory, pinned where they come out of a GPU's."""
    return pinned_empty if backend == "nccl" else blocks.empty


def _serve_torchrun(
    settings: Settings, directory: Path, observer: Observer, world: World, backend: str, device: torch.device
) -> dict[str, Any]:
    link = _listen_torchrun(settings, world, directory, backend, device)
    try:
        ranks = list(range(1, world.size))
        again = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "1")) > 0
        lives_on = world.own_agents or world.launcher == "srun"
        hosts = Unsupervised(survives_loss=lives_on, returns=world.own_agents and again)
        job = build(settings, device)
        result = _server_loop(settings, directory, observer, link, job, ranks, backend, world.launcher, hosts).run()
        with contextlib.suppress(RuntimeError):  # for a host that its agent has started again and that comes too late
            link.publish(_DONE_KEY, "")
        return result
    finally:
        with undisturbed():
            link.close(GOODBYE_S if sys.exc_info()[0] is None else 1.0)


def _listen_torchrun(
    settings: Settings, world: World, directory: Path, backend: str, device: torch.device
) -> GlooServer:
    """Listen, and tell the hosts where. With own agents a server that has died is started again while the hosts wait:
    it must be found at the same port and know the same token."""
    from fldist.wire.gloo import GlooServer

    deadlines = settings.deadlines
    port = settings.network.control_port
    survives = "torchrun ends all ranks when one dies"
    if world.launcher == "srun":
        survives = "a host may die: its replies of the round are missing, the others go on unless Slurm ends the step"
    if world.own_agents:
        port = port or int(os.environ["MASTER_PORT"]) + 1
        survives = "a host or the server may die: its agent starts it again, and the others go on or wait for it"
    store = _torchrun_store(world, deadlines.join_s)
    link = GlooServer(
        ranks=list(range(1, world.size)),
        limits=Limits(deadlines.join_s, deadlines.client_timeout_s, deadlines.transfer_s),
        token=kept_token(directory) if world.own_agents else None,
        bind=listening_address(os.environ["MASTER_ADDR"], one_machine=_one_machine(world)),
        port=port or 0,
        checksum=settings.network.checksum == "full",
        survives=survives,
        carrier=_carrier(backend, device),
        empty=_landing(backend),
    )
    link.rendezvous = store
    link.publish(_STORE_KEY, f"{link.address[0]} {link.address[1]} {link.token}")
    return link


def _one_machine(world: World) -> bool:
    """Whether all ranks are on this machine, as far as the launcher tells."""
    return world.local_size == world.size


def _torchrun_store(world: World, timeout_s: float) -> Any:
    """The store at MASTER_PORT: torchrun's own, or, where there is no torchrun, the server's."""
    from datetime import timedelta

    import torch.distributed as dist

    env = os.environ
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    own: dict[str, Any] = {}
    if world.rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # left to itself the store listens on every interface, and tells the token to whoever asks
        at = address_of(address, "MASTER_ADDR") if _one_machine(world) else reachable(address, "MASTER_ADDR")
        try:
            listener = socket.create_server((at, port), family=family_of(at))
        except OSError as error:
            raise ConfigError(f"MASTER_PORT: {address} port {port} cannot be listened on ({error.strerror})") from None
        own = {"is_master": True, "master_listen_fd": listener.detach()}
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, timeout=timedelta(seconds=timeout_s), wait_for_workers=False, **own
    )
    # where one agent starts all ranks anew, what the dead ones left in its store is not for the new ones
    attempt = "" if world.own_agents else env.get("TORCHELASTIC_RESTART_COUNT", "")
    return dist.PrefixStore(f"fldist/{attempt}", store)  # type: ignore[attr-defined]


def _torchrun_directory(settings: Settings, world: World) -> Path:
    """A server that its agent starts again finds in the agent's store which directory it wrote to."""
    if not world.own_agents:
        return _directory(settings)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ConfigError(
            "--output: a server whose supervisor may start it again must be told where its run is; name a directory"
        )
    store = _torchrun_store(world, settings.deadlines.join_s)
    if not store.check([_DIRECTORY_KEY]):
        store.set(_DIRECTORY_KEY, str(_directory(settings).absolute()))
    return Path(store.get(_DIRECTORY_KEY).decode())


def _serve_mpi(
    settings: Settings, directory: Path, observer: Observer, world: World, device: torch.device
) -> dict[str, Any]:
    comm = _mpi_world(world)
    from fldist.wire.mpi import MpiServer
    from fldist.wire.ulfm import finalizes

    deadlines = settings.deadlines
    link = MpiServer(comm, Limits(deadlines.join_s, deadlines.client_timeout_s, deadlines.transfer_s))
    try:
        ranks = list(range(1, comm.Get_size()))
        again = settings.faults.restart == "on-failure"
        hosts = Spawned(link.respawn, again) if link.fault_tolerant else Unsupervised(survives_loss=False)
        job = build(settings, device)
        result = _server_loop(settings, directory, observer, link, job, ranks, "mpi", "mpirun", hosts).run()
    except BaseException as error:
        if isinstance(error, ValueError):
            print(f"fldist: {error}", file=sys.stderr, flush=True)
        elif not isinstance(error, RunStopped | Interrupted):  # of these the observer has told
            log.exception("the server failed")
        sys.stderr.flush()
        if link.fault_tolerant:
            # Abort does not end the others here, and its code is lost once a rank has died; an exit code is not
            with undisturbed():
                link.close(1.0)
            if not finalizes():
                raise
        # MPI has no other way to end ranks that may be stuck
        comm.Abort(128 + error.signal_number if isinstance(error, Interrupted) else 1)
        raise
    link.close(GOODBYE_S)
    if not link.all_left:
        log.warning("a host is still busy with an old call; the MPI job is ended without it")
        comm.Abort(0)
    if not link.intact and finalizes():
        comm.Abort(0)
    return result


def _mpi_world(world: World) -> Any:
    from fldist.wire.ulfm import prepare

    try:
        prepare()
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"backend: mpi needs mpi4py and an MPI library ({error}); pip install 'fldist[mpi]' brings both"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() != world.size:
        raise ConfigError(
            f"backend: mpi: {world.size} ranks were started, but the MPI library knows {comm.Get_size()} of them: it "
            "does not understand who started them. Under Slurm: srun --mpi=pmix (srun --mpi=list shows what there is), "
            "or MASTER_ADDR and MASTER_PORT for gloo; else the mpirun that belongs to this MPI library"
        )
    return comm


def _mpi_library() -> str:
    """Name and version of the MPI library, without the date and the options that it was built with."""
    from mpi4py import MPI

    return str(MPI.Get_library_version()).strip(" \0").splitlines()[0].partition(", package")[0][:200]


# ---- hosts
def _be_host(world: World, settings: Settings) -> dict[str, Any]:
    if world.launcher == "mpi":
        deadlines = settings.deadlines
        limits = Limits(deadlines.join_s, deadlines.client_timeout_s)
        _be_mpi_host(_mpi_world(world), world.rank, limits, Place(world.local_rank, world.local_size))
        return {}
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # schedulers send it to all ranks: the server ends the run
    store = _torchrun_store(world, settings.deadlines.join_s)
    address, port, token = store.get(_STORE_KEY).decode().split()
    if store.check([_DONE_KEY]):
        log.info("rank %d: the run has ended before this host was started again", world.rank)
        return {}
    _serve_in_turn((address, int(port)), token, world, settings.deadlines.join_s)
    return {}


def _serve_in_turn(address: tuple[str, int], token: str, world: World, wait_s: float) -> None:
    """Serve until goodbye. With agents of their own, hosts whose server is gone wait for another: TransportError when
    none comes within `wait_s`."""
    from fldist.wire.gloo import GlooHost

    built = _Built(_place(world))
    gone_since: float | None = None
    pause_s = 0.2
    while True:
        link: GlooHost | None = None
        try:
            link = GlooHost(address, world.rank, token, Limits(wait_s), built.carrier_for)
            with _log_of(link, world.rank):
                _serve_as_host(link, world.rank, built)
            return
        except TransportError as error:
            if link is not None and link.latest > (0, 0):  # it was given work; one that is sent away must not storm
                gone_since, pause_s = None, 0.2
            gone_since = gone_since or time.monotonic()
            left = gone_since + wait_s - time.monotonic()
            if left <= 0 or not world.own_agents:
                raise
            log.warning("rank %d: %s; waiting for the server, %.0f s at most", world.rank, error, left)
            time.sleep(min(pause_s, left))
            pause_s = min(5.0, 2 * pause_s)


def _be_mpi_host(comm: Any, rank: int, limits: Limits, place: Place) -> None:
    from fldist.wire.mpi import Dismissed, MpiHost
    from fldist.wire.ulfm import ulfm

    try:
        link = MpiHost(comm, limits)
        with _log_of(link, rank):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the server ends the run
            _serve_as_host(link, rank, _Built(place))
    except Dismissed:
        log.info("rank %d: the run ended before this host had joined it", rank)
    except BaseException as error:
        print(f"fldist: host {rank}: {error}", file=sys.stderr, flush=True)
        if not ulfm():
            comm.Abort(1)  # the others would wait for this rank in MPI_Finalize
            raise
        sys.stdout.flush()
        if isinstance(error, PeerLost):
            os._exit(1)
        # a process that ends with an exit code is not reported as failed to the other ranks, a killed one is
        os.kill(os.getpid(), signal.SIGKILL)


def spawned_host(comm: Any, rank: int, join_s: float) -> None:
    """What a process does that the server spawned in place of a lost host. comm: the one to its parent."""
    from mpi4py import MPI

    # alone in a world of its own, it is told no place by its launcher: its rank stands for it
    _be_mpi_host(comm, rank, Limits(join_s), Place(rank, rank + 1))
    # mpirun wants this of a spawned process. It is a world of its own, so that nobody is waited for; if it were, then
    # better a limit than a hanging job
    limit = threading.Timer(GOODBYE_S, os._exit, (0,))
    limit.daemon = True
    limit.start()
    MPI.Finalize()
    limit.cancel()


def child_host() -> None:
    """What a child started by `--nproc` does: join, serve, end with its parent."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    gloo_host(*own_host_environment())


def gloo_host(address: tuple[str, int], rank: int, token: str, join_s: float) -> None:
    """Join the server at `address`, serve until it says goodbye; TransportError when it is gone."""
    from fldist.wire.gloo import GlooHost

    built = _Built(Place(rank, rank + 1))  # a child is on its parent's machine, as are all the others
    _serve_as_host(GlooHost(address, rank, token, Limits(join_s), built.carrier_for), rank, built)


class _Built:
    """What a host has built for a server; taken again for a later one that runs the same. place: on its machine."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._config: dict[str, Any] = {}
        self._host: Host | None = None

    def carrier_for(self, welcome: dict[str, Any]) -> Carrier:
        """What carries this host's bodies. Where it has no GPU and needs one, that is said when it is ready."""
        try:
            return _carrier(str(welcome["backend"]), self.device(Settings.model_validate(welcome["config"])))
        except ConfigError:
            return _carrier(str(welcome["backend"]), CPU)

    def device(self, settings: Settings) -> torch.device:
        """What this host calculates on; ConfigError where it has not what is asked for."""
        return _device(settings, self._place)

    def host(self, welcome: dict[str, Any], settings: Settings, device: torch.device, rank: int) -> Host:
        """The host that the server's welcome asks for."""
        if self._host is None or self._config != welcome["config"]:
            job = build(settings, device)
            for note in job.task.notes:
                log.info("rank %d: %s", rank, note)
            self._config, self._host = welcome["config"], Host(job)
        host = self._host
        if settings.checkpoint.every and host.job.algorithm.stateful:
            host.states.files = files_seen(str(welcome["directory"]), str(welcome["run_id"]))
        return host


def _serve_as_host(link: Any, rank: int, built: _Built) -> None:
    settings = Settings.model_validate(link.welcome["config"])
    with contextlib.ExitStack() as last:
        last.callback(link.close)
        try:
            log.info("rank %d: joined from %s, process %d", rank, socket.gethostname(), os.getpid())
            device = _accepted(link, settings, built)
            last.callback(_fix(settings, device))
            host = built.host(link.welcome, settings, device, rank)
            by_gpu = link.welcome["backend"] == "nccl"
            host.place = as_it_is if by_gpu else to_host
            if device.type == "cuda":
                link.empty = partial(torch.empty, device=device) if by_gpu else pinned_empty
            facts = describe(device)
            log.info("rank %d: calculates on %s", rank, " ".join(facts.values()))
            files = host.states.files is not None or not host.job.algorithm.stateful
            link.about = {"files": files, "versions": versions(), **facts}
            serve_link(host, link)
            log.info("rank %d: done", rank)
        except TransportError as error:
            log.error("rank %d: %s", rank, error)
            raise


def _accepted(link: Any, settings: Settings, built: _Built) -> torch.device:
    """What this host calculates on; where it has not what the server asks for, the server is told why."""
    try:
        return built.device(settings)
    except ConfigError as error:
        link.about = {"refuses": str(error)}
        refuse_link(link)
        raise PeerLost(f"this host cannot take part: {error}") from None


def _log_of(link: Any, rank: int) -> contextlib.AbstractContextManager[None]:
    """The log of a host that no parent gave one: in the run's directory, where this machine can see that."""
    directory = Path(link.welcome["directory"])
    return _file_log(directory / f"rank-{rank}.log") if directory.is_dir() else contextlib.nullcontext()


# ---- logs
class _LogFile(logging.FileHandler):
    """A log that a full disk leaves incomplete and nothing else: the run says itself what it cannot write."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing."""


@contextlib.contextmanager
def _file_log(path: Path) -> Iterator[None]:
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("fldist")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()
