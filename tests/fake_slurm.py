"""Stand-ins for sbatch, srun, scontrol and ssh, which do to processes and their environment what the real ones do.

`install` puts them into a folder for PATH. One job at a time, in its foreground; two nodes, both of them this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

JOB = "4242"
NAMES = ("sbatch", "srun", "scontrol", "ssh")


def install(folder: Path) -> Path:
    """Make executables of these names; `asked` in the folder gets a line for every call of scontrol and srun."""
    folder.mkdir()
    for name in NAMES:
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {name} "$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (folder / "asked").touch()
    return folder


def _ask(words: list[str]) -> None:
    with (Path(os.environ["FAKE_SLURM"]) / "asked").open("a") as file:
        file.write(" ".join(words) + "\n")


def sbatch(arguments: list[str]) -> int:
    """Run a copy of the script with the job's variables, again when it was requeued; pass USR1 to its shell alone."""
    given = [word for word in arguments if word.startswith("--")]
    arguments = arguments[len(given) :]
    script = Path(arguments[0])
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", script.read_text(), re.M))
    options |= dict(word[2:].split("=") for word in given)
    assert options["signal"].startswith("B:USR1@")
    assert {"requeue", "open-mode"} <= set(options)
    nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
    restarts = 0
    while True:
        with tempfile.TemporaryDirectory() as spool:
            copy = shutil.copy(script, Path(spool) / "slurm_script")
            env = {
                **os.environ, "SLURM_JOB_ID": JOB, "SLURM_SUBMIT_DIR": os.getcwd(),
                "SLURM_NTASKS": str(nodes * per_node),
                "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_PROCID": "0",
                "SLURM_NTASKS_PER_NODE": str(per_node), "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
                "SLURM_TASKS_PER_NODE": f"{per_node}(x{nodes})", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
                "SLURM_RESTART_COUNT": str(restarts),
            }  # fmt: skip
            shell = subprocess.Popen(["bash", copy, *arguments[1:]], env=env, cwd=spool, start_new_session=True)
            signal.signal(signal.SIGUSR1, lambda *_, shell=shell: shell.send_signal(signal.SIGUSR1))
            try:
                code = shell.wait()
            finally:
                if shell.poll() is None:
                    os.killpg(shell.pid, signal.SIGKILL)
        asked = (Path(os.environ["FAKE_SLURM"]) / "asked").read_text().count(f"scontrol requeue {JOB}")
        if asked == restarts:
            return code
        restarts = asked


def scontrol(arguments: list[str]) -> int:
    """`show hostnames` and `requeue`. Both nodes are this machine."""
    _ask(["scontrol", *arguments])
    if arguments[:2] == ["show", "hostnames"]:
        first, last = map(int, re.findall(r"\d+", arguments[2]))
        print("\n".join(["localhost"] * (last - first + 1)))
    return 0


def srun(arguments: list[str]) -> int:
    """Start the tasks of a step in blocks, hand on USR1, return the highest exit code."""
    _ask(["srun", *arguments])
    options: dict[str, str] = {}
    while arguments[0].startswith("--"):
        name, _, value = arguments.pop(0)[2:].partition("=")
        options[name] = value
    tasks = int(options.get("ntasks", os.environ["SLURM_NTASKS"]))
    nodes = min(tasks, int(os.environ["SLURM_JOB_NUM_NODES"]))
    if options["mpi"] == "pmix":
        return _pmix(arguments, tasks, nodes)
    started = [subprocess.Popen(arguments, env={**os.environ, **_task(i, tasks, nodes)}) for i in range(tasks)]
    return _wait(started)


def _task(number: int, tasks: int, nodes: int) -> dict[str, str]:
    """What a task finds in its environment."""
    per_node = -(-tasks // nodes)
    return {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(number),
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})",
        "SLURM_LOCALID": str(number % per_node),
        "SLURM_NODEID": str(number // per_node),
    }


def _pmix(command: list[str], tasks: int, nodes: int) -> int:
    """A server for PMIx is needed: Open MPI's launcher has one. Its own variables are taken away from the ranks."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{env['PATH']}")
    assert mpirun is not None
    flags = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", *(["--allow-run-as-root"] if not os.geteuid() else [])]
    task = [sys.executable, __file__, "_task", str(tasks), str(nodes)]
    return _wait([subprocess.Popen([mpirun, *flags, "-n", str(tasks), *task, *command], env=env)])


def _wait(started: list[subprocess.Popen[bytes]]) -> int:
    signal.signal(signal.SIGUSR1, lambda *_: [p.send_signal(signal.SIGUSR1) for p in started])
    codes = [process.wait() for process in started]
    return max(code if code >= 0 else 128 - code for code in codes)


def _become(arguments: list[str]) -> None:
    """In a rank of the launcher: be the task that srun would have made of it."""
    tasks, nodes, *command = arguments
    for name in [n for n in os.environ if n.startswith("OMPI_COMM_WORLD")]:
        del os.environ[name]
    os.environ.update(_task(int(os.environ["PMIX_RANK"]), int(tasks), int(nodes)))
    os.execvp(command[0], command)


def ssh(arguments: list[str]) -> int:
    """Run the command here, in a home directory of its own, with nothing of this environment but PATH."""
    *flags, host, command = arguments
    assert flags == ["-tt"]
    _ask(["ssh", host])
    env = {"PATH": os.environ["PATH"], "HOME": tempfile.gettempdir()}
    return subprocess.run(["bash", "-c", command], env=env, cwd=tempfile.gettempdir(), check=False).returncode


if __name__ == "__main__":
    if sys.argv[1] == "_task":
        _become(sys.argv[2:])
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "ssh": ssh}[sys.argv[1]](sys.argv[2:]))
