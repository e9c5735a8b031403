"""What carries tensors between the ranks of a run, made once at either end: between the server and each host, and
between all ranks at once. Here is gloo; NCCL is in `nccl.py`. MPI carries its tensors itself (`mpi.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from fldist.wire.pair import GlooPair, MakePair
from fldist.wire.world import GlooWorld, MakeWorld


@dataclass(frozen=True)
class Carrier:
    """Makes the pair of a session, and this rank's end of the group of all ranks."""

    pair: MakePair
    world: MakeWorld


GLOO = Carrier(GlooPair, GlooWorld)
