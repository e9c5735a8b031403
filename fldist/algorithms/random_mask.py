"""A fixed mask that keeps parameters at random: what AutoFLIP must be compared with at equal density.

M keeps round(density N) of the N parameters, drawn without replacement before round 1 from the run's seed. The rounds
under M and all bytes are in `fldist/masked.py`. Partition, what travels, cohort and initial model are the task's;
`rounds` counts federated rounds.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fldist.algorithm import Clients, Server
from fldist.data.task import Task
from fldist.masked import MaskedAveraging, pruned
from fldist.pruning.masks import Eligible, random_mask, refuse_empty


@dataclass(frozen=True)
class RandomMask(MaskedAveraging):
    """Federated averaging of randomly chosen parameters."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.7  # z / N, of what takes part
    prune_1d: bool = True  # biases and normalisation take part
    exclude: tuple[str, ...] = ()  # parameters that are kept whole

    def check(self, task: Task) -> None:
        """Refuse names that the model does not have."""
        super().check(task)
        Eligible(self.prune_1d, self.exclude).check(task.init_params().layout)

    def setup(self, server: Server, clients: Clients) -> None:
        """Draw the mask, prune the start."""
        layout = server.x.layout
        slots = Eligible(self.prune_1d, self.exclude).slots(layout)
        keep = random_mask(layout, self.density, server.rng, slots)
        refuse_empty(keep, layout, "raise algorithm.density, or name the layer in algorithm.exclude")
        server.x = pruned(server.x, keep)
        self.put_mask(server, clients, keep)
