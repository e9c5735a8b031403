"""Small convolutional networks: one general form, and published ones as its instances.

Residual networks are in `resnet.py`, larger networks in `googlenet.py`, `mobilenet.py` and `vit.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field
from torch import nn

from fldist.models.layers import Init, Norm, head, images, initialised, norm_layer

Width = Annotated[int, Field(ge=1)]


def _not_empty(widths: tuple[int, ...]) -> tuple[int, ...]:
    if not widths:
        raise ValueError("needs the width of at least one convolution")
    return widths


def _per_layer(smallest: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        entries = value if isinstance(value, list | tuple) else [value]
        if any(type(entry) is not int or entry < smallest for entry in entries):
            raise ValueError(f"needs a whole number of at least {smallest}, or a list of such, one per convolution")
        return tuple(value) if isinstance(value, list) else value

    return BeforeValidator(check)


Widths = Annotated[tuple[Width, ...], AfterValidator(_not_empty)]
PerLayer = int | tuple[int, ...]
Positive = Annotated[PerLayer, _per_layer(1)]
NonNegative = Annotated[PerLayer, _per_layer(0)]

_SMALLEST = 6
"""Pixels a side that the layers of `TwoCnn` need: 6, 4, 3, 1, 1."""


@dataclass(frozen=True)
class Cnn:
    """Convolutions with ReLU, then linear layers with ReLU between, then the classifier.

    kernels, strides, paddings and pool are one number for all convolutions, or one for each. pool: size (and
    stride) of the max-pool after the ReLU, 0 for none. hidden: widths of the linear layers before the classifier.
    global_pool: average over all pixels before them. norm: the layer between convolution and ReLU; a convolution
    has a bias where none follows. projection: see `layers.head`.

    The defaults: 5x5 of stride 2 to 8 channels, 5x5 of stride 2 to 16, linear 256-64-10 on 28x28 (20,522
    parameters on one channel).
    """

    short_name: ClassVar[str] = "cnn"

    widths: Widths = (8, 16)
    kernels: Positive = 5
    strides: Positive = 2
    paddings: NonNegative = 0
    pool: NonNegative = 0
    hidden: tuple[Width, ...] = (64,)
    global_pool: bool = False
    norm: Norm = "none"
    init: Init = "default"
    projection: Annotated[int, Field(ge=0)] = 0

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """shape: one sample's shape, [channels, height, width]; ValueError when the layers leave no pixels of it."""
        channels, *size = images(self.short_name, shape)
        kernels, strides = self._each("kernels"), self._each("strides")
        paddings, pools = self._each("paddings"), self._each("pool")
        layers: list[nn.Module] = []
        for i, width in enumerate(self.widths):
            kernel, stride, padding, pool = kernels[i], strides[i], paddings[i], pools[i]
            layers.append(nn.Conv2d(channels, width, kernel, stride, padding, bias=self.norm == "none"))
            what = f"convolution {i + 1} (kernel {kernel}, stride {stride}, padding {padding})"
            size = self._left(size, [(pixels + 2 * padding - kernel) // stride + 1 for pixels in size], what)
            if self.norm != "none":
                layers.append(norm_layer(self.norm, width))
            layers.append(nn.ReLU())
            if pool:
                layers.append(nn.MaxPool2d(pool))
                size = self._left(size, [pixels // pool for pixels in size], f"max-pool {i + 1} (size {pool})")
            channels = width
        if self.global_pool:
            layers.append(nn.AdaptiveAvgPool2d(1))
            size = [1, 1]
        layers.append(nn.Flatten())
        features = channels * size[0] * size[1]
        for width in self.hidden:
            layers += [nn.Linear(features, width), nn.ReLU()]
            features = width
        return initialised(nn.Sequential(*layers, *head(features, classes, self.projection)), self.init)

    def _each(self, field: str) -> tuple[int, ...]:
        """A field's values, one per convolution."""
        value: PerLayer = getattr(self, field)
        values = (value,) * len(self.widths) if isinstance(value, int) else tuple(value)
        if len(values) != len(self.widths):
            raise ValueError(
                f"task.model: {self.short_name} has {len(self.widths)} convolutions (widths) but {len(values)} "
                f"{field}; give {field} one number for all, or {len(self.widths)}"
            )
        return values

    def _left(self, before: list[int], after: list[int], what: str) -> list[int]:
        if min(after) < 1:
            raise ValueError(
                f"task.model: {what} of {self.short_name} leaves no pixels of its {before[0]} x {before[1]}; "
                "enlarge the images with task.resize, or give the model fewer or smaller layers"
            )
        return after


@dataclass(frozen=True)
class CnnBn(Cnn):
    """3x3 convolutions of stride 2 without bias, each followed by BatchNorm and ReLU; global average pool; linear.

    With widths (16, 32, 64), one input channel and ten classes: 24,058 parameters, 224 float buffer entries,
    3 integer counters. The fields are those of `Cnn`.
    """

    short_name: ClassVar[str] = "cnn_bn"

    widths: Widths = (16, 32, 64)
    kernels: Positive = 3
    strides: Positive = 2
    paddings: NonNegative = 1
    hidden: tuple[Width, ...] = ()
    global_pool: bool = True
    norm: Norm = "batch"


@dataclass(frozen=True)
class NiidCnn(Cnn):
    """Two 5x5 convolutions (6, 16) with ReLU and 2x2 max-pool each, linear layers of 120, 84 and the classes.

    The simple CNN of NIID-Bench (Li et al., ICDE 2022): 44,426 parameters on 1x28x28, 62,006 on 3x32x32, ten
    classes. The fields are those of `Cnn`.
    """

    short_name: ClassVar[str] = "niid_cnn"

    widths: Widths = (6, 16)
    strides: Positive = 1
    pool: NonNegative = 2
    hidden: tuple[Width, ...] = (120, 84)


@dataclass(frozen=True)
class Cnn4(Cnn):
    """Two 5x5 convolutions (32, 64) with ReLU and 2x2 max-pool each, a linear layer of 512 with ReLU, and the classes.

    Without the head 873,408 parameters on 3x32x32, 576,896 on 1x28x28; features of 512. The network of FedAvg's paper
    (McMahan et al. 2017) without padding, as PFLlib and HtFLlib have it (Zhang et al., arXiv 2312.04992). The fields
    are those of `Cnn`.
    """

    short_name: ClassVar[str] = "cnn4"

    widths: Widths = (32, 64)
    strides: Positive = 1
    pool: NonNegative = 2
    hidden: tuple[Width, ...] = (512,)


@dataclass(frozen=True)
class LeNet5:
    """LeNet-5 with ReLU and max-pool, as in Plato: 5x5 convolutions (6, 16, 120), linear 120-84-classes.

    61,706 parameters on 1x28x28 and ten classes. The first convolution pads 28x28 by 2 pixels, to the 32x32 of
    LeCun et al. (1998), so that the third leaves one pixel. Plato's ends in a log-softmax, which is left out: the
    cross-entropy that follows contains it, and softmax after softmax in logarithms changes nothing.
    """

    init: Init = "default"
    projection: Annotated[int, Field(ge=0)] = 0

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """shape: one sample's shape, [channels, 28, 28] or [channels, 32, 32]; ValueError for other sizes."""
        _, height, width = images("lenet5", shape)
        if (height, width) not in ((28, 28), (32, 32)):
            raise ValueError(
                f"task.model: lenet5 needs images of 28 x 28 or 32 x 32 pixels; the data's are {height} x {width}; "
                "set task.resize to 28 or 32"
            )
        layers = Cnn(
            widths=(6, 16, 120),
            kernels=5,
            strides=1,
            paddings=(2 if height == 28 else 0, 0, 0),
            pool=(2, 2, 0),
            hidden=(84,),
            init=self.init,
            projection=self.projection,
        )
        return layers.build(shape, classes)


@dataclass(frozen=True)
class TwoCnn:
    """Two 5x5 convolutions with ReLU and max-pool each, brought to 7x7 pixels, and two linear layers.

    Convolution to `width` channels, padding 1; ReLU; max-pool 2, padding 1; convolution to 2 width, padding 1; ReLU;
    max-pool 2, padding 1; adaptive average pool to 7x7; linear 98 width-hidden, ReLU, linear hidden-classes. The
    adaptive pool enlarges what is smaller: 24x24 pixels leave 6x6, 28x28 leave 7x7.

    With hidden 512: 1,663,370 parameters on 1x24x24, ten classes, width 32; 1,664,970 on 3x24x24; 7,303,524 with
    width 128 and 100 classes. Source: the code of AutoFLIP (Interno et al., arXiv 2405.10271), `TwoCNN`.
    projection: see `layers.head`.
    """

    short_name: ClassVar[str] = "two_cnn"

    width: Width = 32
    hidden: Width = 512
    init: Init = "default"
    projection: Annotated[int, Field(ge=0)] = 0

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """shape: one sample's shape, [channels, height, width] of at least 6 x 6 pixels; ValueError below."""
        channels, *size = images(self.short_name, shape)
        if min(size) < _SMALLEST:
            raise ValueError(
                f"task.model: {self.short_name} needs images of at least {_SMALLEST} x {_SMALLEST} pixels; the data's "
                f"are {size[0]} x {size[1]}; enlarge them with task.resize"
            )
        layers: list[nn.Module] = []
        for before, after in ((channels, self.width), (self.width, 2 * self.width)):
            layers += [nn.Conv2d(before, after, 5, padding=1), nn.ReLU(), nn.MaxPool2d(2, padding=1)]
        layers += [nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(2 * self.width * 7 * 7, self.hidden), nn.ReLU()]
        return initialised(nn.Sequential(*layers, *head(self.hidden, classes, self.projection)), self.init)


@dataclass(frozen=True)
class FemnistCnn(TwoCnn):
    """`TwoCnn` of width 64 and hidden 2048: 13,180,734 parameters on FEMNIST's 1x28x28 and 62 classes.

    Source: the code of AutoFLIP (Interno et al., arXiv 2405.10271), `FEMNISTCNN`. The fields are those of `TwoCnn`.
    """

    short_name: ClassVar[str] = "femnist_cnn"

    width: Width = 64
    hidden: Width = 2048
