"""Scores of a model on labelled samples: the section `eval`, and the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Metric = Literal["accuracy", "loss", "top5", "f1", "precision", "recall", "auc", "accuracy_batchstat"]
_BY_LIBRARY = frozenset({"f1", "precision", "recall", "auc"})


@dataclass(frozen=True)
class Evaluation:
    """The section `eval`: who scores which model on what, how often, and by which figures.

    every: in every k-th round and the last one; 0: never. where: at the server (the global model on the global
    test set), at the clients, both; `auto`: at the server where there is a global model and test set, else at the
    clients, and at both where one of the next three keys asks for clients. clients: all of them, those selected in
    the round, or of those that were not selected a share, `fraction` (all of them where none is left). split: the
    clients' own `train`, `val` or `test` part, or the `global` test set; `auto`: `test` where clients have one, else
    `global`. model: at the clients, the `global` model (sent for it), their `personal` one, or the one `sent` to them
    last in this round (no extra traffic); `auto`: personal where the algorithm has such, else global. own: in every
    round, whatever `every` and `where` say, each client that trains scores the model that it has just trained, and
    tells how its training went; cumulative_train: in these training metrics all epochs of the training count, not the
    last one alone. weights: of clients in the headline figures. batch_norm: running statistics, or each batch's own.
    average: of f1, precision and recall over classes.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    every: Annotated[int, Field(ge=0)] = 1
    where: Literal["auto", "server", "clients", "both"] = "auto"
    clients: Literal["all", "selected", "unselected"] = "all"
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    split: Literal["auto", "train", "val", "test", "global"] = "auto"
    model: Literal["auto", "global", "personal", "sent"] = "auto"
    own: bool = False
    cumulative_train: bool = False
    weights: Literal["samples", "equal"] = "samples"
    batch_norm: Literal["running", "batch"] = "running"
    metrics: tuple[Metric, ...] = ("accuracy", "loss")
    average: Literal["weighted", "macro", "micro"] = "weighted"
    batch_size: Annotated[int, Field(ge=1)] = 512

    def __post_init__(self) -> None:
        if self.batch_norm == "batch" and self.batch_size < 2:
            raise ValueError("batch_norm: batch needs batches of at least two samples; raise eval.batch_size")
        if "accuracy_batchstat" in self.metrics and self.batch_size < 2:
            raise ValueError(
                "metrics: accuracy_batchstat needs batches of at least two samples; raise eval.batch_size, or remove it"
            )
        if self.fraction != 1.0 and self.clients != "unselected":
            raise ValueError(
                f"fraction: {self.fraction:g} is a share of the clients that were not selected; use it with "
                "eval.clients: unselected"
            )
        if self.cumulative_train and not self.own:
            raise ValueError("cumulative_train: true is about what clients tell of their training; set eval.own: true")

    @property
    def names(self) -> tuple[Metric, ...]:
        """The metrics in the order in which they are reported; accuracy and loss are always among them."""
        return tuple(dict.fromkeys(("accuracy", "loss", *self.metrics)))


@dataclass(frozen=True)
class Scores:
    """What a model reached on n samples: `accuracy` (share whose largest output is the label), `loss` (mean
    cross-entropy), and the further metrics that were asked for.

    top5: share whose label is among the 5 largest outputs; f1, precision, recall: over classes as `eval.average`
    says, 0 where undefined; auc: area under the ROC curve of the outputs as they are, every (sample, class) pair
    one decision (micro-average). accuracy_batchstat: the accuracy if BatchNorm normalised by each batch's statistics,
    the running ones neither used nor moved; the accuracy itself where there is no BatchNorm, NaN where there is and a
    batch has one sample. All are NaN without samples; loss and auc where outputs are NaN.
    """

    n: int
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Share of samples whose largest output is the label."""
        return self.values["accuracy"]

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.values["loss"]


def evaluate(module: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], how: Evaluation | None = None) -> Scores:
    """Score a module on batches of x [b, ...] and y [b]; the modes of its layers are restored.

    With `batch_norm: batch` the running statistics of the module it is given do change; for `accuracy_batchstat`, which
    takes a second pass where there is BatchNorm and the first went by running statistics, nothing of it does.
    """
    how = how or Evaluation()
    modes = [(layer, layer.training) for layer in module.modules()]
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    module.eval()
    if how.batch_norm == "batch":
        for norm in norms:
            norm.train()
    twice = bool(norms) and how.batch_norm == "running" and "accuracy_batchstat" in how.names
    correct, batchstat, top5, loss, n = 0, 0.0, 0, 0.0, 0
    kept_outputs: list[Tensor] = []
    kept_labels: list[Tensor] = []
    keeps = bool(_BY_LIBRARY & set(how.names))
    with torch.no_grad():
        for x, labels in batches:
            outputs = module(x)  # [b, C]
            correct += int((outputs.argmax(dim=1) == labels).sum())
            loss += float(cross_entropy(outputs, labels, reduction="sum"))
            if twice and len(labels) == 1:
                batchstat = float("nan")  # one sample has no statistics
            elif twice:
                batchstat += int((_by_batch_statistics(module, norms, x).argmax(dim=1) == labels).sum())
            if "top5" in how.names:
                best = outputs.topk(min(5, outputs.shape[1]), dim=1).indices  # [b, 5]
                top5 += int((best == labels[:, None]).sum())
            if keeps:
                kept_outputs.append(outputs)
                kept_labels.append(labels)
            n += len(labels)
    for layer, training in modes:
        layer.training = training
    if not n:
        return Scores(0, dict.fromkeys(how.names, float("nan")))
    values = {"accuracy": correct / n, "loss": loss / n, "top5": top5 / n}
    values["accuracy_batchstat"] = batchstat / n if twice else values["accuracy"]
    if keeps:
        values |= class_metrics(torch.cat(kept_outputs).cpu(), torch.cat(kept_labels).cpu(), how.average)
    return Scores(n, {name: values[name] for name in how.names})


def _by_batch_statistics(module: nn.Module, norms: list[nn.modules.batchnorm._BatchNorm], x: Tensor) -> Tensor:
    """Outputs of a module in eval mode, but for its BatchNorm layers `norms`, which go by x and track nothing."""
    tracked = [layer.track_running_stats for layer in norms]
    for layer in norms:
        layer.training, layer.track_running_stats = True, False
    outputs: Tensor = module(x)
    for layer, before in zip(norms, tracked, strict=True):
        layer.training, layer.track_running_stats = False, before
    return outputs


def class_metrics(
    outputs: Tensor, labels: Tensor, average: Literal["weighted", "macro", "micro"] = "weighted"
) -> dict[str, float]:
    """f1, precision, recall and auc of outputs [n, C] for labels [n], by scikit-learn."""
    from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

    precision, recall, f1, _ = precision_recall_fscore_support(
        labels.numpy(), outputs.argmax(dim=1).numpy(), average=average, zero_division=0.0
    )
    auc = float("nan")
    if bool(torch.isfinite(outputs).all()) and outputs.shape[1] > 1:
        truth = torch.nn.functional.one_hot(labels, outputs.shape[1])
        auc = float(roc_auc_score(truth.reshape(-1).numpy(), outputs.reshape(-1).numpy()))
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall), "auc": auc}


def warm_up_metrics(how: Evaluation) -> None:
    """Import what the metrics need: 1.7 s that would else be part of the first evaluation."""
    if _BY_LIBRARY & set(how.names):
        import sklearn.metrics  # noqa: F401
