"""fldist: federated learning that really runs distributed, with every byte counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__version__ = "0.1.0"

__all__ = ["RunStopped", "__version__", "resume", "run"]


def __getattr__(name: str) -> Any:
    if name == "RunStopped":  # imported when it is asked for: torch comes with it
        from fldist.runtime.membership import RunStopped

        return RunStopped
    raise AttributeError(f"module 'fldist' has no attribute {name!r}")


def run(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    nproc: int = 1,
    output: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Run a configuration and return what `result.json` holds.

    config: a YAML file's path, or the mapping that it would hold; overrides: `"key.sub=value"` strings;
    nproc: 1 runs in this process, N > 1 starts N - 1 hosts as children and makes this process the server;
    output: the run's directory itself (default: a new one under `output.root`).
    Raises ValueError for what is wrong with the configuration, `fldist.RunStopped` when the run cannot go on.
    """
    from fldist.config import load
    from fldist.runner import run_here

    return run_here(load(config, overrides), nproc=nproc, output=output, progress=progress)


def resume(
    directory: str | Path,
    overrides: Sequence[str] = (),
    *,
    from_stage: str | None = None,
    output: str | Path | None = None,
    nproc: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Go on with the run in `directory` and return what `result.json` holds.

    from_stage, output: begin another run instead, in the new directory `output`, from where that one was before this
    stage; that one is left as it is. The rest is as in `run`, and of the overrides those that a run that goes on takes.
    """
    from pathlib import Path

    from fldist.runner import resume_here

    where = Path(output) if output is not None else None
    return resume_here(Path(directory), overrides, stage=from_stage, output=where, nproc=nproc, progress=progress)
