"""Accuracy and loss of a model on labelled samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Scores:
    """accuracy: share of samples whose largest logit is the label; loss: mean cross-entropy; n: samples."""

    accuracy: float
    loss: float
    n: int


def evaluate(module: nn.Module, x: Tensor, y: Tensor, batch_size: int = 512) -> Scores:
    """Score a module in eval mode; x [n, ...], y [n]. The module's mode is restored."""
    was_training = module.training
    module.eval()
    correct = 0
    loss = 0.0
    with torch.no_grad():
        for start in range(0, len(y), batch_size):
            labels = y[start : start + batch_size]
            # a fresh tensor: a slice's address could change the bits of a matrix product
            logits = module(x[start : start + batch_size].clone())  # [b, C]
            correct += int((logits.argmax(dim=1) == labels).sum())
            loss += float(cross_entropy(logits, labels, reduction="sum"))
    module.train(was_training)
    n = len(y)
    return Scores(correct / n if n else float("nan"), loss / n if n else float("nan"), n)
