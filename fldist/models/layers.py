"""What several models share: normalisation, initialisation, the head, replacing it, and reading its input."""

from __future__ import annotations

import copy
from collections import OrderedDict
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


class Head(nn.Sequential):
    """A classifier of several layers, from features [B, L] to outputs: marks where features end, and is replaced whole.

    Without this mark the classifier of a model is its last linear layer alone.
    """

    def anew(self, width: int, outputs: int) -> Head:
        """The same layers for features [B, width] and so many outputs; linear layers have PyTorch's initial values."""
        linear = [layer for layer in self if isinstance(layer, nn.Linear)]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear):
                before = width if layer is linear[0] else layer.in_features
                after = outputs if layer is linear[-1] else layer.out_features
                layers[name] = nn.Linear(before, after, layer.bias is not None)
            else:
                layers[name] = copy.deepcopy(layer)
        return Head(layers)


class AdaptedHead(nn.Module):
    """A classifier behind a dimension adapter: features [B, L] -> [B, K] -> outputs.

    adapter: adaptive average over the features, which has no parameters; entry j of K is the mean of the entries
    floor(j L / K) to ceil((j + 1) L / K) - 1 of L, so that 4 K become K by groups of four and fewer than K are
    repeated; the identity where L is K. Source: HtFLlib (Zhang et al., 2025), whose clients' networks differ.
    """

    def __init__(self, adapter: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """x: features [B, L] -> outputs [B, d]."""
        outputs: Tensor = self.head(self.adapter(x))
        return outputs


def adapted(module: nn.Module, feature_dim: int | None, outputs: int) -> nn.Module:
    """The module with an `AdaptedHead` in its classifier's place, changed itself; a new one where it is all classifier.

    feature_dim: K; None: as many features as the classifier takes now. The new head is linear from K to `outputs`,
    or where the classifier is a `Head`, its layers with these sizes; its initial values are PyTorch's, drawn now.
    ValueError when the module has no linear layer.
    """
    name, classifier = _classifier(module)
    width = _width(classifier)
    features = width if feature_dim is None else feature_dim
    adapter = nn.Identity() if features == width else nn.AdaptiveAvgPool1d(features)
    bottom = classifier.anew(features, outputs) if isinstance(classifier, Head) else nn.Linear(features, outputs)
    head = AdaptedHead(adapter, bottom)
    if not name:
        return head
    module.set_submodule(name, head)
    return module


def feature_dim(module: nn.Module) -> int:
    """How many features a module's classifier takes, K behind an adapter; ValueError when it has no linear layer."""
    return _width(_classifier(module)[1])


def head_names(module: nn.Module) -> list[str]:
    """Names of the parameters of a module's classifier, in the module's order; ValueError when it has none.

    The classifier: the layers from features to outputs of `features_and_logits`.
    """
    name, classifier = _classifier(module)
    return [f"{name}.{own}" if name else own for own, _ in classifier.named_parameters()]


def _width(classifier: nn.Module) -> int:
    return next(layer.in_features for layer in classifier.modules() if isinstance(layer, nn.Linear))


def _classifier(module: nn.Module) -> tuple[str, nn.Module]:
    """Name and layers of a module's classifier: its last `nn.Linear`, or the `Head` that this is part of."""
    found: tuple[str, nn.Module] | None = None
    inside: tuple[str, nn.Module] | None = None  # the last head
    for name, layer in module.named_modules():
        if isinstance(layer, Head):
            inside = name, layer
        elif isinstance(layer, nn.Linear):
            below = inside is not None and (not inside[0] or name.startswith(f"{inside[0]}."))
            found = inside if below else (name, layer)
    if found is None:
        raise ValueError(
            f"task.model: {type(module).__name__} has no linear layer to take features from; "
            "the model needs a linear classifier (nn.Linear) as its last layer"
        )
    return found


def features_and_logits(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run a module once on x [B, ...]: the input of its classifier, flattened to [B, K], and its output [B, d].

    The classifier is the last `nn.Linear` of `named_modules()`, or the `Head` that this is part of; the features are
    those behind the adapter, where there is one (`adapted`). Gradients flow through both. ValueError when the module
    has no linear layer, or does not use its last one.
    """
    _, classifier = _classifier(module)
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
