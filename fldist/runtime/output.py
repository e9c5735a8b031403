"""A run's directory: what is written, when, and in which form."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import platform
import resource
import socket
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

import fldist
from fldist.lines import Lines
from fldist.models.evaluate import Scores
from fldist.params import Params
from fldist.runtime.checkpoint import save_tensors


def prepare(directory: Path, resolved: dict[str, Any], *, resume: bool = False) -> Path:
    """Make a new run's directory, or take one whose run can go on; refuse one that holds anything else.

    A directory is taken without `resume` when it holds an unfinished run with the same configuration.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output: {directory} is a file; name a directory with --output")
    if (directory / "config.yaml").is_file() and (directory / "checkpoints").is_dir():
        if resume:
            return directory
        if status_of(directory) == "finished":
            raise ValueError(
                f"output: {directory} holds a finished run; `fldist resume {directory} rounds=N` extends it, and "
                "--output names another directory"
            )
        changed = differing(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")), resolved)
        if changed:
            raise ValueError(
                f"output: {directory} holds an unfinished run with another configuration ({', '.join(changed[:5])}); "
                f"`fldist resume {directory}` continues it as it was, and --output names another directory"
            )
        return directory
    if resume:
        raise ValueError(f"resume: {directory} holds no run that could go on (no config.yaml, no checkpoints)")
    if (directory / "config.yaml").exists() or (directory.exists() and any(map(_foreign, directory.iterdir()))):
        raise ValueError(
            f"output: {directory} exists and is not empty; nothing is overwritten: "
            "name another with --output, or remove it"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: {directory} cannot be made: {error.strerror}; name another with --output") from None
    return directory


def _foreign(path: Path) -> bool:
    """Whether a file is none of those that a run leaves that was killed before it had written its configuration."""
    ours = {"owner.lock", "token", "checkpoints", "clients", "config.yaml.tmp", *LINES}
    return path.name not in ours and not path.match("rank-*.log") and not path.match("token.tmp-*")


def status_of(directory: Path) -> str | None:
    """The status in result.json, or None while there is none."""
    try:
        return str(json.loads((directory / "result.json").read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError):
        return None


def finished_result(directory: Path) -> dict[str, Any] | None:
    """result.json of a finished run; None while it is not finished."""
    if status_of(directory) != "finished":
        return None
    found: dict[str, Any] = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    return found


def config_hash(resolved: Mapping[str, Any]) -> str:
    """SHA-256 of a resolved configuration, whatever the order of its keys; hex."""
    return hashlib.sha256(json.dumps(resolved, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differing(before: Any, now: Any, key: str = "") -> list[str]:
    """The dotted keys in which two resolved configurations differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(k for k in now if k not in before)]
        return [d for k in keys for d in differing(before.get(k), now.get(k), f"{key}.{k}" if key else str(k))]
    return [] if before == now else [key]


def discard(directory: Path) -> None:
    """Take back the directory of a run that never began: logs and lock, and the directory if then empty."""
    for left in [*directory.glob("rank-*.log"), directory / "owner.lock", directory / "token"]:
        left.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def default_directory(root: Path, name: str) -> Path:
    """A directory that does not exist yet, named after the run and the time."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    wanted = root / f"{name}-{stamp}"
    number = 1
    while wanted.exists():
        number += 1
        wanted = root / f"{name}-{stamp}-{number}"
    return wanted


LINES = ("rounds.jsonl", "clients.jsonl", "messages.jsonl", "timeline.jsonl")
"""Files that grow line by line."""


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of the files that grow, and how many messages-*.jsonl were filled: where a checkpoint was taken."""
    found = {name: path.stat().st_size for name in LINES if (path := directory / name).exists()}
    return {**found, "rotated": len(list(directory.glob("messages-*.jsonl")))}


def too_short(directory: Path, to: Mapping[str, int]) -> str | None:
    """Which of the files that grow has lost lines that a checkpoint counts on; None: none has."""
    now = sizes(directory)
    if now["rotated"] > to["rotated"]:  # what was growing then has been filled since
        filled = sorted(directory.glob("messages-*.jsonl"))[to["rotated"]]
        now["messages.jsonl"] = filled.stat().st_size
    short = (name for name, size in to.items() if now.get(name, 0) < size)
    return next((f"{directory / name} has lost lines" for name in short), None)


def cut_back(directory: Path, to: Mapping[str, int]) -> None:
    """Take the files that grow back to where they were at a checkpoint; what came later belongs to no round."""
    filled = sorted(directory.glob("messages-*.jsonl"))
    if len(filled) > to["rotated"]:  # the file that was growing then has been filled since
        for later in filled[to["rotated"] + 1 :]:  # first, so that a death in between leaves what can be done again
            later.unlink()
        filled[to["rotated"]].replace(directory / "messages.jsonl")
    for name in LINES:
        path = directory / name
        if name not in to:
            path.unlink(missing_ok=True)
        else:
            os.truncate(path, to[name])


class Output:
    """Writes the files of one run; every write is complete when the call returns."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._rounds = Lines(directory / "rounds.jsonl")
        self._timeline = Lines(directory / "timeline.jsonl")
        self._clients: Lines | None = None
        self._config: dict[str, Any] = {}
        self._environment: dict[str, Any] = {}

    def clients(self, number: int, scores: Mapping[int, Scores]) -> None:
        """clients.jsonl: one line per scored client of a round; the file exists once there is one."""
        if self._clients is None:
            self._clients = Lines(self.directory / "clients.jsonl")
        rows = [{"round": number, "client": client, "n": of.n, **of.values} for client, of in sorted(scores.items())]
        self._clients.write(json.dumps(_finite(row)) + "\n" for row in rows)

    def lines(self) -> list[dict[str, Any]]:
        """What rounds.jsonl holds."""
        text = (self.directory / "rounds.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def ledger_path(self) -> Path:
        """Where the ledger's rows go."""
        return self.directory / "messages.jsonl"

    def config(self, resolved: dict[str, Any]) -> None:
        """config.yaml: the resolved configuration."""
        self._config = resolved
        self._write("config.yaml", yaml.safe_dump(resolved, sort_keys=False))

    def environment(self, facts: dict[str, Any]) -> None:
        """environment.json: versions, settings of the libraries, machine, launch."""
        self._environment = {**machine_facts(), **facts}
        self._write("environment.json", json.dumps(self._environment, indent=2) + "\n")

    def hosts(self, by_rank: Mapping[int, Mapping[str, str]]) -> None:
        """What hosts have said of themselves, by rank, in environment.json; written when it is something new."""
        hosts = {str(rank): dict(about) for rank, about in sorted(by_rank.items())}
        if hosts != self._environment.get("hosts"):
            found = {**self._environment, "hosts": hosts}
            self._write("environment.json", json.dumps(found, indent=2) + "\n")
            self._environment = found

    def round(self, line: dict[str, Any]) -> None:
        """One line of rounds.jsonl, written at once."""
        self._rounds.write([json.dumps(_finite(line)) + "\n"])

    def timeline(self, line: dict[str, Any]) -> None:
        """One line of timeline.jsonl, written at once."""
        self._timeline.write([json.dumps(line) + "\n"])

    def images(self, number: int, pictures: Mapping[str, Any]) -> None:
        """images/round-000010-NAME.png: what an algorithm has given to look at, [H, W, channels] uint8 each."""
        from PIL import Image

        folder = self.directory / "images"
        folder.mkdir(exist_ok=True)
        for name, picture in pictures.items():
            temporary = folder / f"{name}.tmp"
            Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(temporary, format="png")
            temporary.replace(folder / f"round-{number:06d}-{name}.png")

    def tables(self, number: int, tables: Mapping[str, str]) -> None:
        """tables/round-000010-NAME.csv: what an algorithm has given to look at, the text of a file each."""
        folder = self.directory / "tables"
        folder.mkdir(exist_ok=True)
        for name, text in tables.items():
            temporary = folder / f"{name}.tmp"
            temporary.write_text(text, encoding="utf-8", newline="")
            temporary.replace(folder / f"round-{number:06d}-{name}.csv")

    @property
    def _lines(self) -> list[Lines]:
        return [lines for lines in (self._rounds, self._timeline, self._clients) if lines is not None]

    @property
    def problems(self) -> list[str]:
        """Why lines wait to be written."""
        return [lines.problem for lines in self._lines if lines.problem]

    def result(self, result: dict[str, Any]) -> None:
        """result.json."""
        self._write("result.json", json.dumps(_finite(result), indent=2) + "\n")

    def arrays(self, rounds: list[dict[str, Any]], result: dict[str, Any]) -> None:
        """run.h5: what tables and plots need, one array a column, sealed at the end of the run."""

        data = self._arrays(rounds, result)
        temporary = self.directory / "run.h5.tmp"
        try:
            temporary.write_bytes(data)
        except OSError as error:
            raise OSError(f"run.h5 cannot be written: {error.strerror}") from None
        temporary.replace(self.directory / "run.h5")

    def _arrays(self, rounds: list[dict[str, Any]], result: dict[str, Any]) -> bytes:
        """The file run.h5, made in memory: on a full disk the library may end the process."""
        import h5py
        import numpy as np

        data = io.BytesIO()
        with h5py.File(data, "w") as file:
            about = {"config": self._config, "result": result, "environment": self._environment}
            for name, value in {**about, "sha256": digests(self.directory)}.items():
                # a dataset: an attribute holds 64 kB at most
                file[name] = json.dumps(_finite(value))
            group = file.create_group("rounds")
            group["lines"] = [json.dumps(_finite(line)) for line in rounds]
            for name in ("round", "accuracy", "loss", "selected", "replied"):
                group[name] = np.array([_number(r.get(name)) for r in rounds], dtype=np.float64)
            for way in ("up", "down"):
                group[f"logical_bytes_{way}"] = np.array([r["bytes"]["logical"][way] for r in rounds], dtype=np.int64)
                group[f"wire_bytes_{way}"] = np.array([r["bytes"]["wire"][way] for r in rounds], dtype=np.int64)
            for name in ("uplink_bytes", "downlink_bytes", "wire_uplink_bytes", "wire_downlink_bytes"):
                group[f"spent_{name}"] = np.array([r["spent"][name] for r in rounds], dtype=np.int64)
            group["spent_seconds"] = np.array([r["spent"]["seconds"] for r in rounds], dtype=np.float64)
            if all("simulated" in r for r in rounds):
                for name, key in (("simulated_seconds", "seconds"), ("joules", "joules")):
                    group[name] = np.array([r["simulated"][key] for r in rounds], dtype=np.float64)
                    group[f"spent_{name}"] = np.array([r["spent"][name] for r in rounds], dtype=np.float64)
            for name in ("total", "compute", "server", "encode", "wire", "wait", "evaluate"):
                group[f"{name}_s"] = np.array([r["seconds"][name] for r in rounds], dtype=np.float64)
        return data.getvalue()

    def model(self, params: Params) -> None:
        """model/model.safetensors: the final model by tensor name."""
        folder = self.directory / "model"
        folder.mkdir(exist_ok=True)
        temporary = folder / "model.safetensors.tmp"
        save_tensors({name: tensor.clone().contiguous() for name, tensor in params.named()}, temporary)
        temporary.replace(folder / "model.safetensors")

    def catch_up(self) -> None:
        """Write the lines that wait; OSError when they still cannot be written."""
        for lines in self._lines:
            lines.write()
        for problem in self.problems:
            raise OSError(problem)

    def close(self) -> None:
        """Close what lines are written to; OSError when some cannot be written."""
        problems = []
        for lines in self._lines:
            try:
                lines.close()
            except OSError as error:
                problems.append(str(error))
        if problems:
            raise OSError("; ".join(problems))

    def _write(self, name: str, text: str) -> None:
        temporary = self.directory / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.directory / name)


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 in hex of the files that run.h5 vouches for, by name."""
    names = ["config.yaml", *LINES, "model/model.safetensors"]
    paths = [*sorted(directory.glob("messages-*.jsonl")), *(directory / name for name in names)]
    found = {}
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _finite(value: Any) -> Any:
    """The value with null for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl", "OMPI_MCA_pml"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"),
    *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_MCA_mpi_ft_enable", "PMI_SIZE"),
    *("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),
    *("SLURM_STEP_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_RESTART_COUNT"),
)
"""The environment variables that environment.json keeps: those named here and no others, since a run's directory is
passed around, and environments hold secrets."""


def machine_facts() -> dict[str, Any]:
    """Versions, machine and the library settings that decide about bits, for environment.json."""
    import numpy as np
    import torch

    return {
        "fldist": fldist.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_interop_threads": torch.get_num_interop_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cuda": torch.cuda.is_available(),
        "cuda_version": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "tf32": _tf32(),
        "cudnn": {
            "version": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "enabled": torch.backends.cudnn.enabled,
            "benchmark": torch.backends.cudnn.benchmark,
            "deterministic": torch.backends.cudnn.deterministic,
        },
        "nccl": nccl_version(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "suite": json.loads(os.environ.get("FLDIST_SUITE", "null")),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
    }


def _tf32() -> dict[str, Any]:
    """Whether single precision may be computed with fewer bits. Null where torch does not say: its older and its newer
    interface (`fp32_precision`, since torch 2.9) refuse to be read once the other one has been used."""
    import torch

    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings: dict[str, Callable[[], Any]] = {
        "matmul": lambda: cuda.allow_tf32,
        "cudnn": lambda: cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision,
        "matmul_fp32_precision": lambda: cuda.fp32_precision,
        "cudnn_conv_fp32_precision": lambda: cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    }
    found: dict[str, Any] = dict.fromkeys(settings)
    for name, read in settings.items():
        with contextlib.suppress(RuntimeError, AttributeError):
            found[name] = read()
    return found


def nccl_version() -> str | None:
    """The version of the NCCL that torch was built with; None without one."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
