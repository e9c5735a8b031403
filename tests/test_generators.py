"""Image generators: the layers of the published one, by its sizes and by hand."""

import dataclasses

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.nn import functional

from fldist.models.generators.conditional import ConditionalGenerator
from fldist.models.train import Network
from fldist.params import Layout, Params

SMALL = ConditionalGenerator(nz=5, ngf=3)


def built(config=SMALL, shape=(2, 12, 12), classes=4, seed=3):
    """A generator with the initial values of this global seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return config.build(shape, classes)


def asked(n=6, config=SMALL, classes=4, seed=1):
    """Noise and labels."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, config.nz, generator=rng), torch.randint(classes, (n,), generator=rng)


@pytest.mark.parametrize(
    ("shape", "classes", "params", "buffers"),
    [((3, 32, 32), 10, 2_043_185, 646), ((3, 32, 32), 100, 2_052_185, 646), ((1, 28, 28), 10, 1_656_107, 642)],
)
def test_number_of_values(shape, classes, params, buffers):
    with torch.device("meta"):  # sizes alone
        layout = Layout.of(ConditionalGenerator().build(shape, classes))
    assert (layout.num_params, layout.num_floats - layout.num_params, layout.num_ints) == (params, buffers, 4)


def test_without_labels_there_is_no_embedding_and_a_narrower_linear_layer():
    with torch.device("meta"):
        plain = Layout.of(ConditionalGenerator(conditional=False).build((3, 32, 32), 10))
    assert plain.num_params == 2_043_185 - 10 * 100 - 100 * 2 * 64 * 8 * 8


@pytest.mark.parametrize("side", [4, 12, 28, 32])
@pytest.mark.parametrize("conditional", [True, False])
def test_images_are_of_the_size_that_was_asked_for_and_within_1(side, conditional):
    config = dataclasses.replace(SMALL, conditional=conditional)
    x = built(config, (3, side, side))(*asked(n=7))
    assert (x.shape, x.dtype) == ((7, 3, side, side), torch.float32)
    assert 0.5 < float(x.detach().abs().max()) <= 1.0  # each channel is normalised before the tanh


def batch_norm(x, weight, bias):
    """Of x [N, C, h, w], by the statistics of x."""
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize("slope", [0.2, 0.05])
@pytest.mark.parametrize("conditional", [True, False])
def test_layer_by_layer(conditional, slope):
    config = dataclasses.replace(SMALL, conditional=conditional, slope=slope)
    module = built(config).double()
    with torch.no_grad():
        for tensor in module.parameters():  # BatchNorm's begin as ones and zeros
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
    z, y = asked()
    z = z.double()
    values = list(module.parameters())
    if conditional:
        table = values.pop(0)
        assert table.shape == (4, 5)
        inputs = torch.cat([z, table[y]], dim=1)
    else:
        inputs = z
    w, b, g0, b0, t1, g1, b1, t2, g2, b2, c, cb, g3, b3 = values
    x = (inputs @ w.T + b).view(6, 6, 3, 3)
    x = batch_norm(x, g0, b0)  # no activation before or after
    x = batch_norm(functional.conv_transpose2d(x, t1, stride=2, padding=1), g1, b1)
    x = torch.where(x > 0, x, slope * x)
    x = batch_norm(functional.conv_transpose2d(x, t2, stride=2, padding=1), g2, b2)
    x = torch.where(x > 0, x, slope * x)
    x = torch.tanh(batch_norm(functional.conv2d(x, c, cb, padding=1), g3, b3))
    assert t1.shape == (6, 6, 4, 4)
    assert t2.shape == (6, 3, 4, 4)
    torch.testing.assert_close(module(z, y), x, rtol=1e-9, atol=1e-9)


def test_initial_values_are_those_of_the_layers():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [
            nn.Embedding(4, 5),
            nn.Linear(10, 54),
            nn.BatchNorm2d(6),
            nn.ConvTranspose2d(6, 6, 4, 2, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ConvTranspose2d(6, 3, 4, 2, 1, bias=False),
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 2, 3, 1, 1),
            nn.BatchNorm2d(2),
        ]
    ours, theirs = built().state_dict().values(), nn.Sequential(*layers).state_dict().values()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_label_decides_only_where_the_generator_is_conditional():
    z, y = asked()
    for conditional in (True, False):
        module = built(dataclasses.replace(SMALL, conditional=conditional))
        assert torch.equal(module(z, y), module(z, (y + 1) % 4)) == (not conditional)


def test_flat_blocks_train_as_the_module_does():
    """A step on an image gradient, by one flat leaf and by the module's own parameters."""
    (z, y), plain, module = asked(), built(), built()
    ghat = torch.randn(6, 2, 12, 12, generator=torch.Generator().manual_seed(8))
    network = Network(module, Params.of(module))
    assert len(network.weights) == 1
    network.train()
    optimizers = [torch.optim.SGD(plain.parameters(), lr=0.1), torch.optim.SGD(network.weights, lr=0.1)]
    for generator in (plain.train(), module):
        generator(z, y).backward(ghat)
    for optimizer in optimizers:
        optimizer.step()
    assert not network.params.equals(Params.of(built()))
    trained = Params.of(plain)
    torch.testing.assert_close(network.params.floats, trained.floats)
    assert torch.equal(network.params.ints, trained.ints)
    assert trained.ints.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 30, 30), r"side 4 divides, and the data's are 30 x 30; set task\.resize, for instance to 32$"),
        ((3, 32, 28), r"the data's are 32 x 28; set task\.resize, for instance to 32$"),
        ((1, 1, 1), r"the data's are 1 x 1; set task\.resize, for instance to 4$"),
        ((80,), r"images \[channels, height, width\], and the data's shape is \(80,\); choose data of images$"),
    ],
)
def test_sizes_that_cannot_be_made_are_refused(shape, says):
    with pytest.raises(ValueError, match=r"^ConditionalGenerator makes .*" + says):
        ConditionalGenerator().build(shape, 10)


def test_fields_are_checked():
    of = TypeAdapter(ConditionalGenerator)
    assert of.validate_python({}) == ConditionalGenerator(nz=100, ngf=64, slope=0.2, conditional=True)
    for bad in ({"nz": 0}, {"ngf": 0}, {"slope": -0.1}, {"slope": 1.1}, {"slope": float("nan")}, {"ndf": 3}):
        with pytest.raises(ValidationError):
            of.validate_python(bad)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ConditionalGenerator().nz = 3
