"""Open MPI's fault tolerance (`mpirun --with-ft ulfm`): whether it is on, what must be set before MPI is imported."""

from __future__ import annotations

import os
import sys


def ulfm() -> bool:
    """Whether this job survives the death of a rank: it was started by Open MPI's `mpirun --with-ft ulfm`."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable") in ("1", "true")  # noqa: SIM112 (Open MPI's own spelling)


def prepare() -> None:
    """Set what a fault tolerant MPI needs; nothing where that is off, or where MPI has been imported already."""
    if not ulfm() or "mpi4py.MPI" in sys.modules:
        return
    import mpi4py

    # MPI_Finalize waits as long as another rank is busy, and for ever for one that ended with an exit code (not for
    # one that was killed). mpirun is content with ranks that end without it.
    mpi4py.rc.finalize = False
    # With "put" a large message to a process that dies deadlocks the sender in Open MPI 5.0: on the error the TCP
    # module reports the message's end while it holds the endpoint's lock, and the answer to that report wants the
    # lock again. Spawned processes and other machines are reached by TCP.
    os.environ.setdefault("OMPI_MCA_btl_tcp_flags", "send,inplace")


def finalizes() -> bool:
    """Whether the end of this process calls MPI_Finalize."""
    import mpi4py

    return mpi4py.rc.finalize is not False
