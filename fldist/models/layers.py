"""What several models share: normalisation, initialisation, the head, and reading a classifier's input."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

Norm = Literal["batch", "group", "none"]
Init = Literal["default", "xavier"]

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """The normalisation of a convolution's output [B, channels, h, w]; `none` is the identity."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(num_groups(channels), channels)
    return nn.Identity()


def num_groups(channels: int) -> int:
    """The largest number of groups up to 32 that divides the channels and leaves a group at least two of them.

    32 is the default of Wu and He, "Group Normalization", ECCV 2018. A group of one channel would be instance
    normalisation, which turns a feature map of a single pixel into zeros.
    """
    return max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 2))


def images(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """One sample's channels, height and width; ValueError when the data are no images."""
    if len(shape) != 3:
        raise ValueError(
            f"task.model: {name} needs images [channels, height, width]; the data's shape is {tuple(shape)}; "
            "choose another model: mlp, or next_char_lstm for text"
        )
    channels, height, width = shape
    return channels, height, width


def head(width: int, classes: int, projection: int = 0) -> list[nn.Module]:
    """From features [B, width] to logits [B, classes]: a linear layer, after a projection head if one is asked for.

    projection: output width p of Linear(width, width), ReLU, Linear(width, p) before the classifier, as in Li, He
    and Song, "Model-Contrastive Federated Learning", CVPR 2021; 0: none.
    """
    if projection == 0:
        return [nn.Linear(width, classes)]
    return [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection), nn.Linear(projection, classes)]


def initialised(module: nn.Module, init: Init) -> nn.Module:
    """The module itself, its values drawn anew where `init` is not the default of its layers."""
    if init == "xavier":
        xavier(module)
    return module


def xavier(module: nn.Module, gain: float = 1.0) -> None:
    """Draw all linear and convolution weights from Xavier's normal law; biases 0, normalisation weights 1.

    Standard deviation gain sqrt(2 / (fan_in + fan_out)): Glorot and Bengio, AISTATS 2010. Draws from torch's
    global generator, in the order of `modules()`. Other layers (embeddings, LSTM) keep their values.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            nn.init.xavier_normal_(layer.weight, gain)
        elif not isinstance(layer, _NORMS):
            continue
        elif layer.weight is not None:
            nn.init.ones_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def features_and_logits(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run a module once on x [B, ...]: the input of its classifier, flattened to [B, d], and its output [B, C].

    The classifier is the last `nn.Linear` of `named_modules()`. Gradients flow through both. ValueError when the
    module has no linear layer, or does not use its last one.
    """
    classifier = None
    for _, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            classifier = layer
    if classifier is None:
        raise ValueError(
            f"task.model: {type(module).__name__} has no linear layer to take features from; "
            "the model needs a linear classifier (nn.Linear) as its last layer"
        )
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["input"])

    handle = classifier.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        logits: Tensor = module(x)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(
            f"task.model: {type(module).__name__} does not call its last linear layer; "
            "the model needs a linear classifier (nn.Linear) as its last layer"
        )
    return seen[-1].flatten(1), logits
