"""Residual networks: the ImageNet form, layer for layer and name for name torchvision's, one for 32x32 images, and one
with a bias in every convolution.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016. Written out here so that
building one needs no torchvision, takes any number of channels, and can do with another normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from fldist.models.layers import Init, Norm, head, images, initialised, norm_layer


def _conv(before: int, after: int, kernel: int, stride: int, norm: Norm, biased: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size but for its stride; it has a bias if asked for, or no normalisation follows."""
    return nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=biased or norm == "none")


def _shortcut(before: int, after: int, stride: int, norm: Norm, biased: bool = False) -> nn.Module:
    """The identity, or where that does not fit a 1x1 convolution; normalised, unless the convolutions are biased."""
    if stride == 1 and before == after:
        return nn.Identity()
    convolution = _conv(before, after, 1, stride, norm, biased)
    return convolution if biased else nn.Sequential(convolution, norm_layer(norm, after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, added to the shortcut: [B, before, h, w] -> [B, width, h / stride, w / stride]."""

    expansion = 1
    biased = False

    def __init__(self, before: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        # drawn first but named last, as torchvision does: initial values and the order of tensors follow
        shortcut = _shortcut(before, width, stride, norm, self.biased)
        self.conv1 = _conv(before, width, 3, stride, norm, self.biased)
        self.bn1 = norm_layer(norm, width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 3, 1, norm, self.biased)
        self.bn2 = norm_layer(norm, width)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, before, h, w]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return self.relu(y)  # type: ignore[no-any-return]


class BiasedBlock(BasicBlock):
    """As `BasicBlock`, with a bias in every convolution, and no normalisation in the shortcut."""

    biased = True


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, added to the shortcut: [B, before, h, w] -> [B, 4 width, h / stride, ...].

    The stride is on the 3x3 convolution, as in torchvision; the paper has it on the first 1x1.
    """

    expansion = 4
    biased = False

    def __init__(self, before: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        shortcut = _shortcut(before, 4 * width, stride, norm)
        self.conv1 = _conv(before, width, 1, 1, norm)
        self.bn1 = norm_layer(norm, width)
        self.conv2 = _conv(width, width, 3, stride, norm)
        self.bn2 = norm_layer(norm, width)
        self.conv3 = _conv(width, 4 * width, 1, 1, norm)
        self.bn3 = norm_layer(norm, 4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, before, h, w]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.downsample(x)
        return self.relu(y)  # type: ignore[no-any-return]


Block = type[BasicBlock] | type[Bottleneck]


class ResidualNet(nn.Module):
    """A stem, groups of blocks (64, 128, 256, 512 channels; all but the first halve the size), average, head.

    depths: blocks of each group, and with that how many groups there are. small_images: the stem is one 3x3
    convolution of stride 1 in place of a 7x7 convolution of stride 2 and a max-pool of stride 2.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        block: Block,
        depths: Sequence[int],
        small_images: bool = False,
        norm: Norm = "batch",
        projection: int = 0,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = _conv(channels, 64, kernel, stride, norm, block.biased)
        self.bn1 = norm_layer(norm, 64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        before = 64
        for i, depth in enumerate(depths):
            width = 64 * 2**i
            blocks: list[nn.Module] = []
            for j in range(depth):
                blocks.append(block(before, width, 2 if i > 0 and j == 0 else 1, norm))
                before = width * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self._groups = tuple(f"layer{i + 1}" for i in range(len(depths)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        layers = head(before, classes, projection)
        self.fc = layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, channels, h, w] -> logits [B, classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self._groups:
            x = self.get_submodule(name)(x)
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ResNet18:
    """ResNet-18 with torchvision's layers, names and initial values (for the same state of the global generator).

    init: `default` draws the convolutions from the normal law of He et al. (2015) by fan-out and the linear
    layer as PyTorch does; `xavier`: see `layers.xavier`. norm: with `none` the convolutions have biases.
    projection: see `layers.head`. Three channels, ten classes: 11,181,642 parameters, 9,600 float buffer entries.
    """

    short_name: ClassVar[str] = "resnet18"
    block: ClassVar[Block] = BasicBlock
    depths: ClassVar[tuple[int, ...]] = (2, 2, 2, 2)

    norm: Norm = "batch"
    init: Init = "default"
    projection: Annotated[int, Field(ge=0)] = 0

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """shape: one sample's shape, [channels, height, width]; any size will do."""
        channels, _, _ = images(self.short_name, shape)
        net = self._net(channels, classes)
        return initialised(net, self.init)

    def _net(self, channels: int, classes: int) -> ResidualNet:
        net = ResidualNet(
            channels, classes, block=self.block, depths=self.depths, norm=self.norm, projection=self.projection
        )
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        return net


@dataclass(frozen=True)
class ResNet34(ResNet18):
    """ResNet-34; fields as `ResNet18`. Three channels, ten classes: 21,289,802 parameters, 17,024 float buffers."""

    short_name: ClassVar[str] = "resnet34"
    depths: ClassVar[tuple[int, ...]] = (3, 4, 6, 3)


@dataclass(frozen=True)
class ResNet50(ResNet18):
    """ResNet-50; fields as `ResNet18`. Three channels, ten classes: 23,528,522 parameters, 53,120 float buffers."""

    short_name: ClassVar[str] = "resnet50"
    block: ClassVar[Block] = Bottleneck
    depths: ClassVar[tuple[int, ...]] = (3, 4, 6, 3)


@dataclass(frozen=True)
class ResNet101(ResNet18):
    """ResNet-101; fields as `ResNet18`. Three channels, ten classes: 42,520,650 parameters."""

    short_name: ClassVar[str] = "resnet101"
    block: ClassVar[Block] = Bottleneck
    depths: ClassVar[tuple[int, ...]] = (3, 4, 23, 3)


@dataclass(frozen=True)
class ResNet152(ResNet18):
    """ResNet-152; fields as `ResNet18`. Three channels, ten classes: 58,164,298 parameters."""

    short_name: ClassVar[str] = "resnet152"
    block: ClassVar[Block] = Bottleneck
    depths: ClassVar[tuple[int, ...]] = (3, 8, 36, 3)


@dataclass(frozen=True)
class ResNet4(ResNet18):
    """The stem of ResNet-18 and one basic block of 64 channels; fields as `ResNet18`.

    Three channels: 83,520 parameters without the head, features of 64. ResNet-4, 6, 8 and 10 count stem, convolutions
    and head; they are the small ones of HtFLlib's families (Zhang et al., 2025).
    """

    short_name: ClassVar[str] = "resnet4"
    depths: ClassVar[tuple[int, ...]] = (1,)


@dataclass(frozen=True)
class ResNet6(ResNet18):
    """As `ResNet4`, with a block of 128 channels behind it: 313,664 parameters without the head, features of 128."""

    short_name: ClassVar[str] = "resnet6"
    depths: ClassVar[tuple[int, ...]] = (1, 1)


@dataclass(frozen=True)
class ResNet8(ResNet18):
    """As `ResNet4`, with blocks up to 256 channels: 1,232,704 parameters without the head, features of 256."""

    short_name: ClassVar[str] = "resnet8"
    depths: ClassVar[tuple[int, ...]] = (1, 1, 1)


@dataclass(frozen=True)
class ResNet10(ResNet18):
    """As `ResNet4`, with blocks up to 512 channels: 4,905,792 parameters without the head, features of 512."""

    short_name: ClassVar[str] = "resnet10"
    depths: ClassVar[tuple[int, ...]] = (1, 1, 1, 1)


@dataclass(frozen=True)
class ResNet18Small(ResNet18):
    """ResNet-18 for 32x32 images: a 3x3 stem of stride 1 without max-pool; fields as `ResNet18`.

    The form that federated work on CIFAR uses (He et al. 2016, section 4.2, has the stem). Initial values are
    PyTorch's defaults. Three channels, ten classes: 11,173,962 parameters, 20 BatchNorm layers. The average is over
    all pixels that are left: 4x4 of 32x32.
    """

    short_name: ClassVar[str] = "resnet18_32"

    def _net(self, channels: int, classes: int) -> ResidualNet:
        return ResidualNet(
            channels,
            classes,
            block=self.block,
            depths=self.depths,
            small_images=True,
            norm=self.norm,
            projection=self.projection,
        )


@dataclass(frozen=True)
class ResNet18D2l(ResNet18):
    """A ResNet-18 of a textbook: a bias in every convolution, shortcuts without BatchNorm; fields as `ResNet18`.

    Stem and groups are those of the ImageNet form. Initial values are PyTorch's defaults. One channel, ten
    classes: 11,178,378 parameters, 7,808 float buffer entries, 17 BatchNorm layers. Source: Zhang, Lipton, Li and
    Smola, "Dive into Deep Learning", the network for Fashion-MNIST; FedF2DG's code has it for the same data set
    (Zhao et al., Neural Networks 179, 2024).
    """

    short_name: ClassVar[str] = "resnet18_d2l"
    block: ClassVar[Block] = BiasedBlock

    def _net(self, channels: int, classes: int) -> ResidualNet:
        return ResidualNet(
            channels, classes, block=self.block, depths=self.depths, norm=self.norm, projection=self.projection
        )
