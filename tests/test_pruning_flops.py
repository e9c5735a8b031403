"""Multiply-accumulates: by hand, as published, and as torch's own counter has them."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fldist.models.cnn import CnnBn, LeNet5
from fldist.models.lstm import NextCharLstm
from fldist.models.mlp import Mlp
from fldist.models.resnet import ResNet18
from fldist.params import Layout
from fldist.pruning.compact import Compaction
from fldist.pruning.flops import Macs, TrainingFlops, training_flops
from fldist.pruning.structure import Structure, close_dead_units
from tests.test_pruning_structure import NETWORKS, full_mask, network, next_character, random_mask, two_cnn


def test_macs_by_hand():
    """A 3x3 convolution to 4x4 pixels, 2 to 5 channels, and a linear layer: 90 weights 16 times, 240 once."""
    module = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    macs = Macs.of(module, (2, 6, 6))
    assert macs.uses == {"0.weight": 16, "3.weight": 1}
    assert macs.by_weight == {"0.weight": 1440, "3.weight": 240}
    assert macs.total == 1680
    assert macs.uncounted == ()


@pytest.mark.parametrize(
    ("channels", "width", "classes", "linear", "size", "published"),
    [
        (1, 32, 10, 512, 24, 7.12),
        (3, 32, 10, 512, 24, 7.89),
        (3, 128, 100, 512, 24, 93.0),
        (1, 64, 62, 2048, 28, 43.5),
    ],
)
def test_macs_of_two_cnn_as_published(channels, width, classes, linear, size, published):
    macs = Macs.of(two_cnn(channels, width, classes, linear, size), (channels, size, size))
    assert macs.total / 1e6 == pytest.approx(published, rel=2e-3)


def test_the_parts_of_two_cnn():
    macs = Macs.of(two_cnn(1, 32, 10, 512), (1, 24, 24))
    assert macs.by_weight == {
        "0.weight": 22 * 22 * 25 * 32,
        "3.weight": 10 * 10 * 25 * 32 * 64,
        "8.weight": 3136 * 512,
        "10.weight": 512 * 10,
    }


def test_a_recurrent_network_multiplies_at_every_step():
    """Embedding 80 x 8: no product; LSTM 8 -> 6 -> 6, 4 gates, 5 steps; linear on the last one."""
    macs = Macs.of(next_character(), (5,), torch.int64)
    assert macs.total == 5 * 4 * 6 * (8 + 6 + 6 + 6) + 6 * 80
    assert macs.uncounted == ()
    published = NextCharLstm().build((80,), 80)
    assert Macs.of(published, (80,), torch.int64).total == 80 * 4 * 256 * (8 + 256 + 2 * 256) + 256 * 80
    time_first = nn.LSTM(8, 6, bidirectional=True)
    assert Macs.of(_OverTime(time_first), (5, 8)).total == 2 * 5 * 4 * 6 * (8 + 6)
    assert Macs.of(_OverTime(nn.GRU(8, 6)), (5, 8)).total == 5 * 3 * 6 * (8 + 6)


class _OverTime(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(0, 1))[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_those_of_torchs_counter(name):
    module, _, x = network(name)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module.eval()(x[:1])
    assert 2 * Macs.of(module, x.shape[1:]).total == counter.get_total_flops()


def test_grouped_and_transposed_convolutions_and_a_layer_that_is_called_twice():
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 5, 2, stride=2))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        net(torch.zeros(1, 4, 7, 8))
    assert 2 * Macs.of(net, (4, 7, 8)).total == counter.get_total_flops()
    layer = nn.Linear(3, 3)
    assert Macs.of(nn.Sequential(layer, nn.ReLU(), layer), (3,)).uses == {"0.weight": 2}


def test_what_is_not_counted_is_named():
    attention = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 2))
    macs = Macs.of(attention, (3, 4))
    assert "0.self_attn.in_proj_weight" in macs.uncounted
    assert "1.weight" not in macs.uncounted


def test_weights_that_are_calculated_are_refused():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="its weight is no parameter of the model"):
        Macs.of(nn.Sequential(layer), (3,))


def test_a_large_network_is_counted_without_being_run():
    module = ResNet18().build((3, 224, 224), 1000)
    state = torch.random.get_rng_state()
    macs = Macs.of(module.train(), (3, 224, 224))
    assert macs.total == 1_814_073_344  # 1.81 G, as torchvision says
    assert torch.equal(state, torch.random.get_rng_state())
    assert module.training
    assert not any(layer._forward_hooks for layer in module.modules())


# ---- masks and training
def test_density_by_hand():
    """Half of the convolution's weights and a third of the linear layer's; biases cost nothing."""
    module = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    mask = torch.zeros(Layout.of(module).num_params, dtype=torch.bool)
    mask[:45] = True
    mask[95 : 95 + 80] = True
    mask[90:92] = True
    macs = Macs.of(module, (2, 6, 6))
    assert macs.under(mask) == 720 + 80
    assert training_flops(module, (2, 6, 6), mask) == TrainingFlops(6 * 1680, 6 * 800, 6 * 1680)
    assert training_flops(module, (2, 6, 6)) == TrainingFlops(6 * 1680, 6 * 1680, 6 * 1680)
    with pytest.raises(ValueError, match=r"^mask: shape"):
        macs.under(mask[1:])


def test_a_full_mask_is_dense_and_an_empty_one_free():
    _, structure, x = network("two_cnn")
    macs = Macs.of(two_cnn(), x.shape[1:])
    assert macs.under(full_mask(structure)) == macs.total
    assert macs.under(~full_mask(structure)) == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_what_the_mask_allows_is_less_than_what_compaction_does(name):
    module, structure, x = network(name)
    mask = close_dead_units(random_mask(structure, 0), structure)
    compaction = Compaction.of(module, mask, structure)
    flops = training_flops(module, x.shape[1:], mask, compaction)
    assert flops.theoretical < flops.realised < flops.dense
    small = Macs.of(compaction.module(), x.shape[1:])
    assert small.under(compaction.shrink_mask(mask)) * 6 == flops.theoretical, "what was taken out was closed"


def test_half_of_the_units_by_hand():
    """784-64-64-10 with 16 and 32 units left."""
    module = Mlp((64, 64)).build((1, 28, 28), 10)
    structure = Structure.of(module, (1, 28, 28))
    mask = full_mask(structure)
    for group, lost in zip(structure.hidden, (48, 32), strict=True):
        for span in group.spans:
            span.of(mask)[:, :lost] = False
    flops = training_flops(module, (1, 28, 28), mask, Compaction.of(module, mask, structure))
    assert flops.dense == 6 * (784 * 64 + 64 * 64 + 640)
    assert flops.realised == flops.theoretical == 6 * (784 * 16 + 16 * 32 + 320)


def test_samples_and_epochs():
    """Twenty explorers of 150 epochs against 200 rounds of five clients and five epochs: 60 % more."""
    each = TrainingFlops(100, 50, 70)
    exploration = TrainingFlops(100, 100, 100).times(20 * 10, 150)
    rounds = each.times(200 * 5 * 10, 5)
    assert rounds == TrainingFlops(5_000_000, 2_500_000, 3_500_000)
    assert (exploration + rounds).dense == 8_000_000
    assert exploration.dense / rounds.dense == 0.6


@pytest.mark.parametrize("model", [LeNet5(), CnnBn()])
def test_counts_are_whole_numbers(model):
    macs = Macs.of(model.build((1, 28, 28), 10), (1, 28, 28))
    assert all(type(count) is int and count > 0 for count in macs.by_weight.values())
    assert sum(macs.by_weight.values()) == macs.total
