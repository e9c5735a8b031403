"""A fixed mask that keeps the initially largest weights: magnitude pruning before training, for comparison.

M keeps the weights whose |theta_0| is above the (1 - density)-quantile of all weights together; tensors of one
dimension (biases, normalisation) are kept whole. The rounds under M and all bytes are in `fldist/masked.py`. Partition,
what travels, cohort and initial model are the task's; `rounds` counts federated rounds.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fldist.algorithm import Clients, Server
from fldist.data.task import Task
from fldist.masked import MaskedAveraging, pruned
from fldist.pruning.masks import Eligible, by_quantile, refuse_empty


@dataclass(frozen=True)
class MagnitudeMask(MaskedAveraging):
    """Federated averaging of the initially largest weights."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.7  # share of the weights that is kept
    exclude: tuple[str, ...] = ()  # parameters that are kept whole

    def check(self, task: Task) -> None:
        """Refuse names that the model does not have."""
        super().check(task)
        Eligible(one_d=False, exclude=self.exclude).check(task.init_params().layout)

    def setup(self, server: Server, clients: Clients) -> None:
        """Rank the initial weights, prune the start."""
        layout = server.x.layout
        eligible = Eligible(one_d=False, exclude=self.exclude)
        keep = by_quantile(server.x.trainable.floats.abs(), layout, 1.0 - self.density, eligible)
        refuse_empty(keep, layout, "raise algorithm.density, or name the layer in algorithm.exclude")
        server.x = pruned(server.x, keep)
        self.put_mask(server, clients, keep)
