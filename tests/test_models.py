"""The models: sizes that papers state, layers one by one, and torchvision's networks tensor for tensor."""

import copy
import dataclasses
import itertools
import random

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fldist import models, resolve, vision
from fldist.models.cnn import Cnn, Cnn4, CnnBn, FemnistCnn, LeNet5, NiidCnn, TwoCnn
from fldist.models.googlenet import GoogLeNet
from fldist.models.layers import (
    AdaptedHead,
    Head,
    adapted,
    feature_dim,
    features_and_logits,
    head,
    head_names,
    norm_layer,
    num_groups,
    xavier,
)
from fldist.models.lstm import NextCharLstm
from fldist.models.mlp import Mlp
from fldist.models.mobilenet import MobileNetV2
from fldist.models.resnet import (
    ResNet4,
    ResNet6,
    ResNet8,
    ResNet10,
    ResNet18,
    ResNet18D2l,
    ResNet18Small,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNet152,
)
from fldist.models.vit import VitB16, VitB32
from fldist.params import Layout, Params

MNIST = (1, 28, 28)
CIFAR = (3, 32, 32)
TEXT = (80,)
FEDZGE = Cnn(widths=(8, 16), kernels=(5, 3), strides=2, paddings=(2, 1), hidden=())


@pytest.fixture(scope="module")
def torchvision_resnets():
    """Torchvision's module of residual networks."""
    try:
        return vision.torchvision().models.resnet
    except ImportError as error:
        pytest.skip(str(error))


def seeded(config, shape, classes=10, seed=3):
    """A module with the initial values of this global seed."""
    torch.manual_seed(seed)
    return config.build(shape, classes)


def layers_of(module, kind):
    """The layers of a kind, in order."""
    return [layer for layer in module.modules() if isinstance(layer, kind)]


# ---- the table of names
OF_TOKENS = ["next_char_lstm"]
OF_IMAGES = [name for name in models.NAMES if name not in OF_TOKENS]
LARGE = ["resnet101", "resnet152", "vit_b16", "vit_b32"]  # half a second to draw


@pytest.mark.parametrize("name", [name for name in OF_IMAGES if name not in LARGE])
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("shape", [MNIST, CIFAR])
def test_every_name_builds_for_its_data(name, shape, classes):
    kind = resolve.from_table(models.NAMES, name, "task.model")
    assert dataclasses.is_dataclass(kind)
    assert getattr(kind, "short_name", name) == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().init = "xavier"
    module = kind().build(shape, classes).eval()
    with torch.no_grad():
        assert module(torch.rand(2, *shape)).shape == (2, classes)
    assert layers_of(module, nn.Linear)[-1].out_features == classes
    assert {t.dtype for t in module.state_dict().values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("channels", [1, 3])
def test_large_networks_build_for_their_data(name, channels):
    with torch.device("meta"):  # sizes alone
        module = resolve.from_table(models.NAMES, name, "task.model")().build((channels, 32, 32), 7).eval()
        assert module(torch.rand(2, channels, 32, 32)).shape == (2, 7)
        assert next(iter(layers_of(module, nn.Conv2d))).in_channels == channels


SIZES = [  # configuration, shape, classes, parameters, float buffers, counters
    (Mlp((64, 64)), MNIST, 10, 55_050, 0, 0),
    (Mlp((64,)), MNIST, 10, 50_890, 0, 0),
    (Cnn(), MNIST, 10, 20_522, 0, 0),
    (FEDZGE, MNIST, 10, 9_226, 0, 0),
    (dataclasses.replace(FEDZGE, widths=(12, 24)), MNIST, 10, 14_698, 0, 0),
    (dataclasses.replace(FEDZGE, widths=(16, 32)), MNIST, 10, 20_746, 0, 0),
    (NiidCnn(), MNIST, 10, 44_426, 0, 0),
    (NiidCnn(), CIFAR, 10, 62_006, 0, 0),
    (LeNet5(), MNIST, 10, 61_706, 0, 0),
    (LeNet5(), (1, 32, 32), 10, 61_706, 0, 0),
    (CnnBn(), MNIST, 10, 24_058, 224, 3),
    (CnnBn(norm="group"), MNIST, 10, 24_058, 0, 0),
    (CnnBn(norm="none"), MNIST, 10, 24_058 - 112, 0, 0),  # a bias in place of a weight and a bias of the norm
    (TwoCnn(), (1, 24, 24), 10, 1_663_370, 0, 0),
    (TwoCnn(), MNIST, 10, 1_663_370, 0, 0),
    (TwoCnn(), (3, 24, 24), 10, 1_664_970, 0, 0),
    (TwoCnn(width=128), (3, 24, 24), 100, 7_303_524, 0, 0),
    (FemnistCnn(), MNIST, 62, 13_180_734, 0, 0),
    (NextCharLstm(), TEXT, 80, 819_920, 0, 0),
    (NextCharLstm(symbols=90), TEXT, 80, 820_000, 0, 0),
    (ResNet18Small(), CIFAR, 10, 11_173_962, 9_600, 20),
    (ResNet18Small(), CIFAR, 100, 11_220_132, 9_600, 20),
    (ResNet18D2l(), MNIST, 10, 11_178_378, 7_808, 17),
    (ResNet18(), CIFAR, 10, 11_181_642, 9_600, 20),
    (ResNet18(), CIFAR, 100, 11_227_812, 9_600, 20),
    (ResNet34(), CIFAR, 10, 21_289_802, 17_024, 36),
    (ResNet34(), CIFAR, 100, 21_335_972, 17_024, 36),
    (ResNet50(), CIFAR, 10, 23_528_522, 53_120, 53),
    (ResNet50(), CIFAR, 100, 23_712_932, 53_120, 53),
    (ResNet101(), CIFAR, 10, 42_520_650, 105_344, 104),
    (ResNet152(), CIFAR, 10, 58_164_298, 151_424, 155),
]


@pytest.mark.parametrize(("config", "shape", "classes", "params", "buffers", "counters"), SIZES)
def test_number_of_values(config, shape, classes, params, buffers, counters):
    with torch.device("meta"):  # sizes alone
        module = config.build(shape, classes)
    layout = Layout.of(module)
    assert (layout.num_params, layout.num_floats - layout.num_params, layout.num_ints) == (params, buffers, counters)
    assert len(layers_of(module, nn.BatchNorm2d)) == counters


@pytest.mark.parametrize(
    ("config", "shape", "classes", "size"),
    [
        (Mlp((64,)), MNIST, 10, 203_560),
        (LeNet5(), MNIST, 10, 246_824),
        (CnnBn(), MNIST, 10, 97_152),
        (ResNet18(), CIFAR, 10, 44_765_128),
        (ResNet18Small(), CIFAR, 10, 44_734_408),
        (ResNet18Small(), CIFAR, 100, 44_919_088),
        (ResNet18D2l(), MNIST, 10, 44_744_880),
        (ResNet34(), CIFAR, 10, 85_227_592),
        (ResNet50(), CIFAR, 10, 94_326_992),
    ],
)
def test_bytes_of_the_state(config, shape, classes, size):
    with torch.device("meta"):
        assert Layout.of(config.build(shape, classes)).nbytes == size


WITHOUT_HEAD = [  # what is left when the head is cut off, and how many features it gives
    (Cnn4(), CIFAR, 873_408, 512),
    (Cnn4(), (3, 64, 64), 5_592_000, 512),
    (Cnn4(), MNIST, 576_896, 512),
    (GoogLeNet(), CIFAR, 5_599_904, 1024),
    (MobileNetV2(), CIFAR, 2_223_872, 1280),
    (ResNet4(), CIFAR, 83_520, 64),
    (ResNet6(), CIFAR, 313_664, 128),
    (ResNet8(), CIFAR, 1_232_704, 256),
    (ResNet10(), CIFAR, 4_905_792, 512),
    (ResNet18(), CIFAR, 11_176_512, 512),
    (ResNet34(), CIFAR, 21_284_672, 512),
    (ResNet50(), CIFAR, 23_508_032, 2048),
    (ResNet101(), CIFAR, 42_500_160, 2048),
    (ResNet152(), CIFAR, 58_143_808, 2048),
    (VitB16(), CIFAR, 85_651_200, 768),
    (VitB16(representation=0), CIFAR, 85_651_200, 768),
    (VitB32(), CIFAR, 87_418_368, 768),
]


@pytest.mark.parametrize(("config", "shape", "params", "features"), WITHOUT_HEAD)
def test_number_of_values_without_the_head(config, shape, params, features):
    with torch.device("meta"):
        module = config.build(shape, 100)
        assert feature_dim(module) == features
        sizes = [dict(module.named_parameters())[name].numel() for name in head_names(module)]
        assert sum(p.numel() for p in module.parameters()) - sum(sizes) == params
        made = adapted(module, 512, 100)
    sizes = [dict(made.named_parameters())[name].numel() for name in head_names(made)]
    assert sum(p.numel() for p in made.parameters()) - sum(sizes) == params
    two_layers = getattr(config, "representation", 0)
    assert sum(sizes) == (393_984 + 769 * 100 if two_layers else 513 * 100)
    assert feature_dim(made) == 512


# ---- names and values that recorded runs rest on
def test_mlp_is_as_it_was():
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    after = torch.rand(1)
    assert_same(seeded(Mlp((5, 6)), (2, 2, 2), 3), plain)
    assert torch.equal(torch.rand(1), after)
    assert [type(m) for m in seeded(Mlp(()), (4,), 3)] == [nn.Flatten, nn.Linear]
    assert Mlp() == Mlp((128,), "default")


def test_cnn_bn_is_as_it_was():
    torch.manual_seed(3)
    plain = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    after = torch.rand(1)
    assert_same(seeded(CnnBn((4, 5)), (2, 9, 8), 3), plain)
    assert torch.equal(torch.rand(1), after)
    assert CnnBn().widths == (16, 32, 64)


def assert_same(module, plain):
    """Layer for layer and value for value."""
    assert repr(module) == repr(plain)
    ours, theirs = module.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- the general convolutional network
def test_cnn_layers():
    config = Cnn((4, 6), (3, 5), (1, 2), (1, 2), (2, 0), (7, 8), norm="batch", projection=9)
    expected = nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 5, 2, 2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 3 * 4, 7),  # 11 x 14 -> 11 x 14 -> 5 x 7 -> 3 x 4
        nn.ReLU(),
        nn.Linear(7, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 9),
        nn.Linear(9, 5),
    )
    module = config.build((3, 11, 14), 5)
    assert repr(module) == repr(expected)
    assert module(torch.rand(2, 3, 11, 14)).shape == (2, 5)


def test_cnn_defaults_are_two_strided_convolutions_and_a_hidden_layer():
    expected = nn.Sequential(
        nn.Conv2d(1, 8, 5, 2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    assert repr(Cnn().build(MNIST, 10)) == repr(expected)


def test_niid_cnn_layers():
    expected = nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )
    assert repr(NiidCnn().build(CIFAR, 10)) == repr(expected)


@pytest.mark.parametrize(("pixels", "padding"), [(28, 2), (32, 0)])
def test_lenet5_layers(pixels, padding):
    expected = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 120, 5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )
    assert repr(LeNet5().build((1, pixels, pixels), 10)) == repr(expected)
    assert features_and_logits(LeNet5(projection=7).build((1, pixels, pixels), 10), torch.rand(2, 1, pixels, pixels))[
        0
    ].shape == (2, 7)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 32), (1, 32, 28), (3, 64, 64)])
def test_lenet5_refuses_other_sizes(shape):
    with pytest.raises(ValueError, match=r"^task\.model: lenet5 needs .* are \d+ x \d+; set task.resize to 28 or 32"):
        LeNet5().build(shape, 10)


@pytest.mark.parametrize(("pixels", "pooled"), [(24, [12, 6]), (28, [14, 7]), (32, [16, 8]), (6, [3, 1])])
def test_two_cnn_layers(pixels, pooled):
    expected = nn.Sequential(
        nn.Conv2d(3, 4, 5, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, padding=1),
        nn.Conv2d(4, 8, 5, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, padding=1),
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        nn.Linear(98 * 4, 9),
        nn.ReLU(),
        nn.Linear(9, 5),
    )
    module = TwoCnn(4, 9).build((3, pixels, pixels), 5)
    assert repr(module) == repr(expected)
    x, sizes = torch.rand(2, 3, pixels, pixels), []
    for layer in module:
        x = layer(x)
        sizes += [x.shape[-1]] if isinstance(layer, nn.MaxPool2d | nn.AdaptiveAvgPool2d) else []
    assert sizes == [*pooled, 7]
    assert x.shape == (2, 5)
    assert repr(TwoCnn().build(MNIST, 10)[8]) == repr(nn.Linear(3136, 512))
    assert repr(FemnistCnn(hidden=3).build(MNIST, 62)[8]) == repr(nn.Linear(6272, 3))


def test_two_cnn_takes_exactly_what_torch_can_run():
    for height, width in itertools.product(range(1, 9), repeat=2):
        plain = nn.Sequential(nn.Conv2d(1, 1, 5, padding=1), nn.MaxPool2d(2, padding=1), nn.Conv2d(1, 1, 5, padding=1))
        try:
            plain(torch.rand(1, 1, height, width))
        except RuntimeError:
            message = rf"^task\.model: two_cnn needs .* at least 6 x 6 .* {height} x {width};"
            with pytest.raises(ValueError, match=message):
                TwoCnn(1, 1).build((1, height, width), 3)
        else:
            assert TwoCnn(1, 1).build((1, height, width), 3)(torch.rand(1, 1, height, width)).shape == (1, 3)


def test_cnn_fits_exactly_what_torch_can_run():
    draw = random.Random(0)
    refused = 0
    for _ in range(150):
        layers = draw.randint(1, 3)
        kernels, strides, paddings, pools = (
            tuple(draw.randint(low, high) for _ in range(layers)) for low, high in ((1, 5), (1, 3), (0, 2), (0, 3))
        )
        config = Cnn((2,) * layers, kernels, strides, paddings, pools, (), global_pool=draw.random() < 0.3)
        x = torch.rand(1, 1, draw.randint(1, 14), draw.randint(1, 14))
        plain = []
        for kernel, stride, padding, pool in zip(kernels, strides, paddings, pools, strict=True):
            plain.append(nn.Conv2d(2 if plain else 1, 2, kernel, stride, padding))
            plain += [nn.MaxPool2d(pool)] if pool else []
        try:
            nn.Sequential(*plain)(x)
        except RuntimeError:
            refused += 1
            with pytest.raises(ValueError, match="leaves no pixels"):
                config.build(tuple(x.shape[1:]), 3)
        else:
            assert config.build(tuple(x.shape[1:]), 3)(x).shape == (1, 3)
    assert 20 < refused < 130


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (Cnn(), (1, 12, 16), r"convolution 2 \(kernel 5, stride 2, padding 0\) of cnn leaves no pixels of its 4 x 6"),
        (Cnn(), (1, 4, 16), r"convolution 1 \(kernel 5, stride 2, padding 0\) of cnn leaves no pixels of its 4 x 16"),
        (NiidCnn(), (1, 12, 12), r"convolution 2 .* of niid_cnn leaves no pixels of its 4 x 4"),
        (Cnn(widths=(4,), pool=3), (1, 9, 7), r"max-pool 1 \(size 3\) of cnn leaves no pixels of its 3 x 2"),
    ],
)
def test_cnn_names_the_layer_that_leaves_nothing(config, shape, message):
    with pytest.raises(ValueError, match=f"^task.model: {message}; enlarge the images with task.resize"):
        config.build(shape, 10)


@pytest.mark.parametrize("field", ["kernels", "strides", "paddings", "pool"])
def test_cnn_wants_one_value_per_convolution(field):
    message = rf"^task.model: cnn has 2 convolutions \(widths\) but 3 {field}; give {field} one number for all, or 2"
    with pytest.raises(ValueError, match=message):
        Cnn(**{field: (1, 1, 1)}).build(MNIST, 10)


@pytest.mark.parametrize("name", [n for n in OF_IMAGES if n != "mlp"])
def test_what_is_no_image_is_refused(name):
    kind = resolve.from_table(models.NAMES, name, "task.model")
    message = (
        rf"^task.model: {name} needs images \[channels, height, width\]; the data's shape is \(5,\); .* mlp, or next"
    )
    with pytest.raises(ValueError, match=message):
        kind().build((5,), 10)


# ---- sequences of tokens
def test_next_char_lstm_layers():
    config = NextCharLstm(embedding=3, hidden=5, layers=2)
    module = config.build((7,), 11)
    assert repr(module.embedding) == repr(nn.Embedding(11, 3))
    assert repr(module.lstm) == repr(nn.LSTM(3, 5, 2, batch_first=True))
    assert repr(module.linear) == repr(nn.Linear(5, 11))
    tokens = torch.randint(11, (4, 7))
    last = module.lstm(module.embedding(tokens))[1][0][1]  # [B, hidden]: of the upper layer, after the last step
    assert torch.allclose(module(tokens), module.linear(last))
    assert repr(NextCharLstm(symbols=20, embedding=3).build((7,), 11).embedding) == repr(nn.Embedding(20, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden = 6


def test_next_char_lstm_looks_at_order_and_starts_every_sample_anew():
    module = seeded(NextCharLstm(embedding=3, hidden=5), (4,), 11)
    tokens = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]])
    first, second = module(tokens)
    assert not torch.allclose(first, second)
    assert torch.allclose(module(tokens[[1, 0]]), torch.stack([second, first]))


def test_next_char_lstm_follows_the_blocks_it_is_bound_to():
    config = NextCharLstm(embedding=3, hidden=5)
    module, tokens = seeded(config, (4,), 11), torch.randint(11, (6, 4))
    other = seeded(config, (4,), 11, seed=4)
    Params.of(other).bind(module)
    assert torch.equal(module(tokens), other(tokens))
    copied = copy.deepcopy(module)
    Params.zeros(Layout.of(module)).bind(module)
    assert module(tokens).count_nonzero() == 0
    assert torch.equal(copied(tokens), other(tokens))


def test_next_char_lstm_starts_with_pytorchs_values_but_for_the_linear_layer():
    plain, drawn = seeded(NextCharLstm(), TEXT, 80), seeded(NextCharLstm(init="xavier"), TEXT, 80)
    same = {name for name, value in plain.state_dict().items() if torch.equal(value, drawn.state_dict()[name])}
    assert set(plain.state_dict()) - same == {"linear.weight", "linear.bias"}
    assert drawn.linear.bias.count_nonzero() == 0
    assert drawn.linear.weight.std().item() == pytest.approx((2 / 336) ** 0.5, rel=0.03)


@pytest.mark.parametrize("shape", [MNIST, (), (2, 80)])
def test_next_char_lstm_refuses_other_shapes(shape):
    message = (
        r"^task\.model: next_char_lstm needs sequences of tokens \[length\]; the data's shape is .*; .* cnn for images$"
    )
    with pytest.raises(ValueError, match=message):
        NextCharLstm().build(shape, 10)


def test_fields_from_a_configuration():
    made = TypeAdapter(Cnn).validate_python(
        {"widths": [4, 5], "kernels": [3, 5], "strides": 1, "hidden": [], "norm": "group"}
    )
    assert made == Cnn((4, 5), (3, 5), 1, hidden=(), norm="group")
    assert TypeAdapter(CnnBn).validate_python({"widths": [4]}) == CnnBn((4,))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Cnn, {"kernels": 0}),
        (Cnn, {"kernels": [5, 0]}),
        (Cnn, {"strides": 0}),
        (Cnn, {"strides": "2"}),
        (Cnn, {"paddings": -1}),
        (Cnn, {"paddings": True}),
        (Cnn, {"pool": [1.5]}),
        (Cnn, {"widths": []}),
        (Cnn, {"widths": [0]}),
        (Cnn, {"hidden": [0]}),
        (Cnn, {"norm": "layer"}),
        (Cnn, {"init": "kaiming"}),
        (Cnn, {"projection": -1}),
        (LeNet5, {"projection": -1}),
        (ResNet18, {"projection": -1}),
        (ResNet50, {"norm": "instance"}),
        (Mlp, {"init": "kaiming"}),
        (TwoCnn, {"width": 0}),
        (FemnistCnn, {"hidden": 0}),
        (NextCharLstm, {"layers": 0}),
        (NextCharLstm, {"symbols": 0}),
    ],
)
def test_wrong_fields_are_refused_in_one_line(kind, fields):
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(kind).validate_python(fields)
    assert len(raised.value.errors()) == 1
    assert raised.value.errors()[0]["loc"][0] in fields


# ---- normalisation and initialisation
@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (2, 1), (3, 1), (4, 2), (6, 3), (7, 1), (16, 8), (32, 16), (48, 24), (64, 32), (66, 22), (512, 32)],
)
def test_number_of_groups(channels, groups):
    assert num_groups(channels) == groups
    layer = norm_layer("group", channels)
    assert isinstance(layer, nn.GroupNorm)
    assert (layer.num_groups, layer.num_channels) == (groups, channels)


@pytest.mark.parametrize("config", [CnnBn, ResNet18, ResNet18Small])
@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm), ("none", None)])
def test_norm_and_the_bias_before_it(config, norm, kind):
    module = config(norm=norm).build((3, 16, 16), 4)
    normal = layers_of(module, nn.BatchNorm2d | nn.GroupNorm)
    convolutions = layers_of(module, nn.Conv2d)
    assert {type(layer) for layer in normal} == ({kind} if kind else set())
    assert len(normal) == (len(convolutions) if kind else 0)
    assert {c.bias is None for c in convolutions} == {norm != "none"}
    assert module(torch.rand(2, 3, 16, 16)).isfinite().all()


def test_xavier_follows_the_fans():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(32, 64, 5), nn.BatchNorm2d(64), nn.GroupNorm(2, 64), nn.Linear(300, 200), nn.Embedding(50, 40)
    )
    for layer in module:
        for parameter in layer.parameters():
            nn.init.constant_(parameter, 0.5)
    xavier(module)
    conv, batch, group, linear, embedding = module
    for layer, fans in ((conv, 25 * 32 + 25 * 64), (linear, 500)):
        n, std = layer.weight.numel(), (2 / fans) ** 0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=4 / (2 * n) ** 0.5)
        assert layer.weight.mean().item() == pytest.approx(0, abs=4 * std / n**0.5)
        # normal, not uniform: 4.55 in 100 lie beyond two deviations
        assert (layer.weight.abs() > 2 * std).float().mean().item() == pytest.approx(0.0455, abs=0.006)
        assert layer.bias.count_nonzero() == 0
    for layer in (batch, group):
        assert (layer.weight == 1).all()
        assert layer.bias.count_nonzero() == 0
    assert (embedding.weight == 0.5).all()


def test_xavier_gain_and_layers_without_bias():
    module = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm2d(3, affine=False))
    torch.manual_seed(1)
    xavier(module)
    once = module[0].weight.clone()
    torch.manual_seed(1)
    xavier(module, gain=2.0)
    assert torch.equal(module[0].weight, 2 * once)


@pytest.mark.parametrize("config", [Mlp, Cnn, CnnBn, NiidCnn, LeNet5, TwoCnn, ResNet18, ResNet18Small, ResNet18D2l])
def test_init_of_every_model(config):
    plain, drawn = seeded(config(), MNIST), seeded(config(init="xavier"), MNIST)
    xavier_after = seeded(config(), MNIST)
    xavier(xavier_after)
    assert repr(plain) == repr(drawn)
    for (_, a), (_, b) in zip(drawn.state_dict().items(), xavier_after.state_dict().items(), strict=True):
        assert torch.equal(a, b)
    last = layers_of(drawn, nn.Linear)[-1]
    assert last.bias.count_nonzero() == 0
    assert layers_of(plain, nn.Linear)[-1].bias.count_nonzero() > 0


# ---- residual networks
@pytest.mark.parametrize(
    ("config", "name", "classes"),
    [(ResNet18(), "resnet18", 10), (ResNet34(), "resnet34", 7), (ResNet50(), "resnet50", 100)],
)
def test_resnets_are_torchvisions(torchvision_resnets, config, name, classes):
    torch.manual_seed(3)
    theirs = getattr(torchvision_resnets, name)(num_classes=classes)
    after = torch.rand(1)
    ours = seeded(config, CIFAR, classes)
    assert torch.equal(torch.rand(1), after)  # as many draws
    wanted, got = theirs.state_dict(), ours.state_dict()
    assert list(got) == list(wanted)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(torch.equal(got[n], wanted[n]) for n in wanted)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 64, 48, generator=generator)
    for mode in (True, False):
        ours.train(mode)
        theirs.train(mode)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)
    # the statistics that the pass in training mode left
    torch.testing.assert_close(ours.bn1.running_var, theirs.bn1.running_var)
    torch.testing.assert_close(ours.layer4[1].bn2.running_mean, theirs.layer4[1].bn2.running_mean)


def test_resnet18_32_layers():
    module = ResNet18Small().build(CIFAR, 10)
    expected = [(3, 64, 3, 1, 1)]
    for before, width in itertools.pairwise([64, 64, 128, 256, 512]):
        first = [(before, width, 3, 1 if width == 64 else 2, 1), (width, width, 3, 1, 1)]
        shortcut = [] if width == 64 else [(before, width, 1, 2, 0)]
        expected += first + shortcut + [(width, width, 3, 1, 1)] * 2
    got = [
        (c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0])
        for c in layers_of(module, nn.Conv2d)
    ]
    assert got == expected
    sizes = {}
    for name in ("bn1", "layer1", "layer2", "layer3", "layer4", "avgpool"):
        getattr(module, name).register_forward_hook(lambda _, __, out, name=name: sizes.update({name: out.shape[1:]}))
    seen = {}
    module.fc.register_forward_pre_hook(lambda _, args: seen.update(features=args[0]))
    module.layer4.register_forward_hook(lambda _, __, out: seen.update(map=out))
    module(torch.rand(2, *CIFAR))
    assert {name: tuple(size) for name, size in sizes.items()} == {
        "bn1": (64, 32, 32),
        "layer1": (64, 32, 32),
        "layer2": (128, 16, 16),
        "layer3": (256, 8, 8),
        "layer4": (512, 4, 4),
        "avgpool": (512, 1, 1),
    }
    torch.testing.assert_close(seen["features"], nn.functional.avg_pool2d(seen["map"], 4).flatten(1))
    assert (seen["map"] >= 0).all()
    assert not layers_of(module, nn.MaxPool2d)


def test_resnet18_32_computes_by_hand():
    """The first block without and the first with a changed shape, written out."""
    module = seeded(ResNet18Small(), CIFAR).eval()
    x = torch.rand(2, 64, 6, 6)
    same, halved = module.layer1[0], module.layer2[0]
    relu = nn.functional.relu
    with torch.no_grad():
        for layer in layers_of(module, nn.BatchNorm2d):
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.uniform_(-0.5, 0.5)
        for block, shortcut in ((same, x), (halved, halved.downsample[1](halved.downsample[0](x)))):
            inner = relu(block.bn1(block.conv1(x)))
            expected = relu(block.bn2(block.conv2(inner)) + shortcut)
            before = x.clone()
            torch.testing.assert_close(block(x), expected)
            assert torch.equal(x, before)


def test_resnet18_32_starts_with_pytorchs_values():
    bound = (1 / (64 * 9)) ** 0.5  # uniform, Kaiming with a = sqrt(5)
    weight = ResNet18Small().build(CIFAR, 10).layer1[0].conv1.weight
    assert 0.99 * bound < weight.abs().max() <= bound


def test_resnet18_d2l_layers():
    """Those of resnet18 with a bias in each convolution and none but these in the shortcuts."""
    module, usual = ResNet18D2l().build(MNIST, 10), ResNet18().build(MNIST, 10)

    def told(network):
        return [
            (n, c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding) for n, c in convolutions(network)
        ]

    def convolutions(network):
        named = [(n, layer) for n, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
        return [(n.removesuffix(".0") if "downsample" in n else n, layer) for n, layer in named]

    assert told(module) == told(usual)
    assert all(layer.bias is not None for _, layer in convolutions(module))
    assert [n for n, _ in convolutions(module) if "downsample" in n] == [f"layer{i}.0.downsample" for i in (2, 3, 4)]
    norms = [n for n, layer in module.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms == ["bn1", *(f"layer{i}.{j}.bn{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2))]
    assert repr(module.maxpool) == repr(usual.maxpool)
    assert abs(module.conv1.weight).max() <= 1 / 7  # uniform, Kaiming with a = sqrt(5): PyTorch's own
    assert abs(module.conv1.bias).max() <= 1 / 7


def test_resnet18_d2l_computes_by_hand():
    module = seeded(ResNet18D2l(), MNIST).eval()
    x = torch.rand(3, *MNIST)
    relu = nn.functional.relu
    with torch.no_grad():
        for layer in layers_of(module, nn.BatchNorm2d):
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.uniform_(-0.5, 0.5)
        y = nn.functional.max_pool2d(relu(module.bn1(module.conv1(x))), 3, stride=2, padding=1)
        for group, size in zip(("layer1", "layer2", "layer3", "layer4"), (7, 4, 2, 1), strict=True):
            for block in getattr(module, group):
                inner = relu(block.bn1(block.conv1(y)))
                if y.shape[1] == block.conv2.out_channels:
                    shortcut = y
                else:  # one convolution with its bias, nothing behind it
                    weight, bias = block.downsample.parameters()
                    shortcut = nn.functional.conv2d(y, weight, bias, stride=2)
                y = relu(block.bn2(block.conv2(inner)) + shortcut)
            assert y.shape[2:] == (size, size)
        features, logits = features_and_logits(module, x)
        torch.testing.assert_close(features, y.mean((2, 3)))
        torch.testing.assert_close(logits, y.mean((2, 3)) @ module.fc.weight.T + module.fc.bias)
    assert [c.shape for c in module.eval()(torch.rand(2, 1, 65, 33)).split(1)] == [(1, 10)] * 2  # any size


@pytest.mark.parametrize(
    "config", [ResNet18(norm="none"), ResNet50(norm="none"), ResNet18Small(norm="group"), ResNet18D2l(norm="group")]
)
def test_resnets_of_other_norms_train(config):
    module = config.build((1, 20, 20), 3)
    module(torch.rand(2, 1, 20, 20)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(("config", "depth"), [(ResNet4, 1), (ResNet6, 2), (ResNet8, 3), (ResNet10, 4)])
def test_the_smallest_resnets_are_the_beginning_of_resnet18(config, depth):
    """Stem and the first block of each group; a block of 64 channels has no shortcut with values of its own."""
    small, whole = config().build(CIFAR, 10), ResNet18().build(CIFAR, 10)
    names = [name for name, _ in small.named_children()]
    assert names == ["conv1", "bn1", "relu", "maxpool", *(f"layer{i + 1}" for i in range(depth)), "avgpool", "fc"]
    for name in names[:-1]:
        mine, theirs = getattr(small, name), getattr(whole, name)
        assert repr(mine) == (repr(theirs[:1]) if name.startswith("layer") else repr(theirs))
    assert small.fc.in_features == 64 * 2 ** (depth - 1)
    weight = getattr(small, f"layer{depth}")[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.02)  # He, by fan-out
    assert abs(weight).max() > 3 * weight.std()  # normal
    x = torch.rand(2, *CIFAR)
    expected = small.maxpool(torch.relu(small.bn1(small.conv1(x))))
    for i in range(depth):
        expected = getattr(small, f"layer{i + 1}")(expected)
    assert expected.shape[1:] == (64 * 2 ** (depth - 1), 8 // 2 ** (depth - 1), 8 // 2 ** (depth - 1))
    torch.testing.assert_close(small(x), small.fc(expected.mean((2, 3))))


# ---- torchvision's other networks
@pytest.mark.parametrize(
    ("config", "first", "scale"),
    [
        (GoogLeNet(), "conv1.conv", 0.01),
        (MobileNetV2(), "features.0.0", (2 / (9 * 32)) ** 0.5),
        (VitB32(), "conv_proj", None),
    ],
)
def test_other_networks_take_grey_images(torchvision_resnets, config, first, scale):
    del torchvision_resnets  # skips without torchvision
    if scale is None:  # too large to be drawn for this
        scale = 1 / 32
        with torch.device("meta"):
            coloured, grey = config.build(CIFAR, 10), config.build((1, 32, 32), 10)
    else:
        coloured, grey = seeded(config, CIFAR), seeded(config, (1, 32, 32))
        convolution = grey.get_submodule(first)
        assert convolution.weight.std().item() == pytest.approx(scale, rel=0.1)
        same = {n for n, value in coloured.state_dict().items() if torch.equal(value, grey.state_dict()[n])}
        assert set(coloured.state_dict()) - same == {f"{first}.weight"}
    told = [repr(module.get_submodule(first)) for module in (coloured, grey)]
    assert told[0] == told[1].replace("Conv2d(1,", "Conv2d(3,")
    layers = [layer for _, layer in coloured.named_modules() if isinstance(layer, nn.Conv2d)]
    assert layers[0] is coloured.get_submodule(first)


@pytest.mark.parametrize(
    ("config", "name", "fields"),
    [
        (GoogLeNet(), "GoogLeNet", {"aux_logits": False, "init_weights": True}),
        (MobileNetV2(), "MobileNetV2", {}),
    ],
)
def test_other_networks_are_torchvisions(torchvision_resnets, config, name, fields):
    del torchvision_resnets
    torch.manual_seed(3)
    theirs = getattr(vision.torchvision().models, name)(num_classes=7, **fields)
    ours = seeded(config, CIFAR, 7)
    assert_same(ours, theirs)
    assert [layer.p for layer in layers_of(ours, nn.Dropout)] == [0.2]
    x = torch.rand(2, *CIFAR)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    ours.train()
    assert not torch.equal(features_and_logits(ours, x)[0], features_and_logits(ours, x)[0])  # by the dropout


def test_vit_is_torchvisions_with_a_marked_head(torchvision_resnets):
    del torchvision_resnets
    models_of = vision.torchvision().models
    with torch.device("meta"):
        plain = models_of.vit_b_16(image_size=32, num_classes=7)
        mine, wide = VitB16(representation=0).build(CIFAR, 7), VitB16().build(CIFAR, 7)
    shapes = {name: value.shape for name, value in plain.state_dict().items()}
    assert {name: value.shape for name, value in mine.state_dict().items()} == shapes
    assert head_names(mine) == ["heads.head.weight", "heads.head.bias"]
    before = ["heads.pre_logits.weight", "heads.pre_logits.bias"]
    assert [name for name in wide.state_dict() if name not in shapes] == before
    assert head_names(wide) == [*before, "heads.head.weight", "heads.head.bias"]


@pytest.mark.parametrize(
    ("config", "shape", "size"),
    [(VitB16(), MNIST, 32), (VitB16(), (3, 32, 48), 48), (VitB32(), (3, 48, 48), 64)],
)
def test_vit_names_the_size_that_would_do(config, shape, size):
    message = (
        rf"^task.model: {config.short_name} needs square .* multiple of {config.patch}; .*; set task.resize to {size}$"
    )
    with pytest.raises(ValueError, match=message):
        config.build(shape, 10)


# ---- heads
@pytest.mark.parametrize(
    ("config", "width"), [(Cnn, 64), (CnnBn, 64), (NiidCnn, 84), (LeNet5, 84), (ResNet18, 512), (ResNet50, 2048)]
)
def test_projection_head(config, width):
    plain = layers_of(config().build(MNIST, 10), nn.Linear)[-1]
    assert (plain.in_features, plain.out_features) == (width, 10)
    module = config(projection=16).build(MNIST, 10).eval()
    shapes = [(layer.in_features, layer.out_features) for layer in layers_of(module, nn.Linear)[-3:]]
    assert shapes == [(width, width), (width, 16), (16, 10)]
    features, logits = features_and_logits(module, torch.rand(2, *MNIST))
    assert features.shape == (2, 16)
    assert logits.shape == (2, 10)
    assert (features < 0).any()  # no ReLU after the projection


def test_head_without_projection_is_one_layer():
    assert repr(head(5, 3)) == repr([nn.Linear(5, 3)])
    assert [type(m) for m in head(5, 3, 2)] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]


# ---- features and logits
def test_features_are_the_classifiers_input():
    module = seeded(Mlp((6, 5)), (1, 2, 2), 3)
    x = torch.rand(4, 1, 2, 2)
    features, logits = features_and_logits(module, x)
    assert torch.equal(features, module[:-1](x))
    assert torch.equal(logits, module(x))
    assert features.shape == (4, 5)


def test_features_run_the_module_once_and_let_gradients_through():
    module = Mlp((5,)).build((1, 2, 2), 3)
    runs = []
    module.register_forward_hook(lambda *_: runs.append(1))
    x = torch.rand(4, 1, 2, 2, requires_grad=True)
    features, logits = features_and_logits(module, x)
    assert runs == [1]
    (gradient,) = torch.autograd.grad(features.sum(), module[1].bias, retain_graph=True)
    assert torch.equal(gradient, (features > 0).sum(0).float())
    # the logits depend on the very features that were returned
    expected = module[-1].weight.sum(0).expand(4, 5)
    torch.testing.assert_close(torch.autograd.grad(logits.sum(), features, retain_graph=True)[0], expected)
    logits.sum().backward()
    assert x.grad is not None


def test_features_are_flattened():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 9)
            self.last = nn.Linear(4, 3)

        def forward(self, x):
            return self.last(input=x).mean(1)

    features, logits = features_and_logits(Wide(), torch.rand(2, 5, 4))
    assert features.shape == (2, 20)
    assert logits.shape == (2, 3)


def test_the_last_linear_layer_counts_and_not_what_comes_after():
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    x = torch.rand(5, 4)
    features, logits = features_and_logits(module, x)
    assert torch.equal(features, module[0](x))
    assert logits.shape == (5, 2)


def test_features_leave_no_hook():
    module = Mlp((5,)).build((1, 2, 2), 3)
    features_and_logits(module, torch.rand(4, 1, 2, 2))
    with pytest.raises(RuntimeError):
        features_and_logits(module, torch.rand(4, 1, 3, 3))
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in module.modules())


def test_features_need_a_linear_layer():
    with pytest.raises(ValueError, match=r"^task.model: Sequential has no linear layer .* needs a linear classifier"):
        features_and_logits(nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten()), torch.rand(2, 1, 2, 2))

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(2, 2)
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match=r"^task.model: Unused does not call its last linear layer"):
        features_and_logits(Unused(), torch.rand(2, 2))


# ---- heads that are replaced
@pytest.mark.parametrize(
    ("width", "features", "windows"),
    [
        (8, 2, [(0, 4), (4, 8)]),  # groups of four
        (5, 3, [(0, 2), (1, 4), (3, 5)]),
        (2, 6, [(0, 1)] * 3 + [(1, 2)] * 3),  # repeated
        (4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
    ],
)
def test_the_adapter_averages_windows_of_features(width, features, windows):
    made = adapted(nn.Sequential(nn.Linear(3, width), nn.Linear(width, 7)), features, 5)
    x = torch.rand(4, 3)
    got, outputs = features_and_logits(made, x)
    z = made[0](x)
    torch.testing.assert_close(got, torch.stack([z[:, a:b].mean(1) for a, b in windows], dim=1))
    assert isinstance(made[1], AdaptedHead)
    assert torch.equal(outputs, made[1].head(got))
    assert outputs.shape == (4, 5)
    assert feature_dim(made) == features
    assert head_names(made) == ["1.head.weight", "1.head.bias"]
    assert not list(made[1].adapter.parameters())
    assert isinstance(made[1].adapter, nn.Identity) == (width == features)
    if width % features == 0:
        torch.testing.assert_close(got.mean(1), z.mean(1))


def test_gradients_flow_through_an_adapter_to_the_base():
    made = adapted(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 2, 5)
    features, _ = features_and_logits(made, torch.rand(6, 3))
    (gradient,) = torch.autograd.grad(features.sum(), made[0].bias)
    assert torch.equal(gradient, torch.full((4,), 3.0))


def test_a_new_head_is_drawn_behind_the_base_with_pytorchs_values():
    base = seeded(Mlp((6,)), (4,), 3)
    expected = nn.Linear(2, 9)  # goes on with the same generator
    made = adapted(seeded(Mlp((6,)), (4,), 3), 2, 9)
    assert torch.equal(made[-1].head.weight, expected.weight)
    assert torch.equal(made[-1].head.bias, expected.bias)
    assert torch.equal(made[1].weight, base[1].weight)


def test_without_a_number_features_stay_as_they_are():
    made = adapted(Mlp((6,)).build((4,), 3), None, 9)
    assert isinstance(made[-1].adapter, nn.Identity)
    assert (made[-1].head.in_features, made[-1].head.out_features) == (6, 9)


def test_a_marked_head_is_replaced_layer_by_layer():
    marked = Head(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    module = nn.Sequential(nn.Linear(2, 8), marked)
    x = torch.rand(4, 2)
    features, outputs = features_and_logits(module, x)
    assert torch.equal(features, module[0](x))
    assert head_names(module) == ["1.0.weight", "1.0.bias", "1.2.weight"]
    made = adapted(module, 4, 6)
    assert repr(made[1].head) == repr(Head(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6, bias=False)))
    features, outputs = features_and_logits(made, x)
    torch.testing.assert_close(features, made[0](x).view(4, 4, 2).mean(2))
    assert torch.equal(outputs, made[1].head(features))
    assert feature_dim(made) == 4
    assert head_names(made) == ["1.head.0.weight", "1.head.0.bias", "1.head.2.weight"]
    assert made[1].head[1] is not marked[1]


def test_a_linear_layer_behind_a_marked_head_is_the_classifier():
    module = nn.Sequential(Head(nn.Linear(2, 8)), nn.Linear(8, 3))
    assert head_names(module) == ["1.weight", "1.bias"]


def test_a_module_that_is_all_classifier_becomes_a_head():
    made = adapted(nn.Linear(6, 3), 2, 4)
    assert isinstance(made, AdaptedHead)
    assert head_names(made) == ["head.weight", "head.bias"]
    assert head_names(nn.Linear(6, 3)) == ["weight", "bias"]
    again = adapted(Head(nn.Linear(6, 5), nn.Linear(5, 3)), 2, 4)
    assert head_names(again) == ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]


def test_a_module_without_a_linear_layer_has_no_head():
    for look in (feature_dim, head_names, lambda module: adapted(module, 4, 3)):
        with pytest.raises(ValueError, match=r"^task\.model: Conv2d has no linear layer to take features from;"):
            look(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("config", [Cnn4(), GoogLeNet(), MobileNetV2(), ResNet4(), ResNet50(), LeNet5(projection=6)])
def test_networks_of_all_sizes_get_features_of_one_size(config):
    made = adapted(config.build(MNIST, 10), 24, 10).eval()
    features, outputs = features_and_logits(made, torch.rand(2, *MNIST))
    assert (features.shape, outputs.shape) == ((2, 24), (2, 10))
    last = next(name for name, layer in made.named_modules() if isinstance(layer, AdaptedHead))
    assert head_names(made) == [f"{last}.head.weight", f"{last}.head.bias"]
