"""Distillation on public samples, the classical way for clients with different networks: they train alone, answer on
samples that all have, and learn from the mean of all answers; so does a model at the server.

    e = sum_k w_k f_k(x)         `distillation.ensemble`, logits of all public samples x (`task.public`)
    E2 steps of the global model and E3 of each client on x, e       `distillation.distil`

The plain mean of logits, weighed by training samples, of FedMD (Li, Wang, arXiv 1910.03581) with the server's model of
DS-FL (Itahara et al., IEEE TMC 2023) and neither's pre-training, sharpening or digest: a control for algorithms that do
without public data, under the same distillation.

Bytes for each client and round (N public samples, C classes): logits 4 N C up (phase `answer`) and 4 N C down (phase
`distil`), scalars 8 up. The public samples never travel: both ends read them.

Options of the shared laws: any partition; nothing of a model travels; cohorts as `clients.rounding` says; every client
has a model of its own, that begins where `clients.init` says; `rounds` counts rounds of training and distillation.
"""

from dataclasses import dataclass
from typing import NamedTuple

from fldist.algorithm import Clients, Me, Server, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.distillation import LARGEST_LOGIT, Distilling
from fldist.fold import Mean
from fldist.kinds import Logits, Scalar


class Answered(NamedTuple):
    """One client's reply."""

    logits: Logits  # f_k(x) [N, C]
    n: Scalar  # n_k, training examples held by the client


@dataclass(frozen=True)
class PublicDistillation(Distilling):
    """Clients and server teach each other on public samples."""

    def check(self, task: Task) -> None:
        """Refuse a task without public samples."""
        super().check(task)
        if not len(task.public()[1]):
            raise ValueError("task.public.n: public_distillation distils on public samples; set it to 200, say")

    def round(self, server: Server, clients: Clients) -> None:
        """Train the clients, have them answer, distil at the server and at the clients."""
        task: Task = server.task
        x, _ = task.public()
        replied = clients.selected().call(self.train).clients
        mean = Mean(by=self.weighed_by, shape=(len(x), task.num_classes), limit=LARGEST_LOGIT)
        got = clients.only(replied).call(self.answer, fold={"logits": mean})
        e = got.logits.float()
        self.teach_server(server, x, e)
        if self.client_steps:
            self.log_published(server, clients.only(clients.only(got.clients).call(self.distil, e=e).clients))

    @on_client
    def answer(self, me: Me, data: ClientData) -> Answered:
        """Logits on the public samples."""
        with self.answering(me, data) as logits:
            return Answered(logits(data.public[0]), data.n)

    @on_client
    def distil(self, me: Me, data: ClientData, e: Logits) -> None:
        """E3 steps on the public samples."""
        self.teach_client(me, data, data.public[0], e)
