"""Hidden units: which a network has, what a mask does to whole ones, and that no answer of the network changes."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fldist.models.cnn import Cnn, CnnBn, LeNet5, NiidCnn, TwoCnn
from fldist.models.lstm import NextCharLstm
from fldist.models.mlp import Mlp
from fldist.models.resnet import BasicBlock, Bottleneck, ResidualNet, ResNet18, ResNet18D2l, ResNet18Small, ResNet50
from fldist.params import Layout, Params
from fldist.pruning.structure import Structure, close_dead_units, prune_units, unit_scores

MNIST = (1, 28, 28)
SMALL = (2, 12, 12)


def two_cnn(channels=2, width=4, classes=5, hidden=9, size=12):
    """Two padded convolutions with padded pooling, an average that enlarges, two linear layers."""
    return TwoCnn(width, hidden).build((channels, size, size), classes)


class Stack(nn.Module):
    """A network whose forward pass is a function of its layers; for what nn.Sequential cannot say."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.way = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.way(self, x)


NETWORKS = {
    "mlp": (lambda: Mlp((7, 6)).build(SMALL, 5), SMALL),
    "two_cnn": (two_cnn, SMALL),
    "cnn": (lambda: Cnn(widths=(4, 6), kernels=3, hidden=(8,), projection=5).build(SMALL, 5), SMALL),
    "pooled": (lambda: Cnn(widths=(4, 6), kernels=3, strides=1, pool=2, paddings=1, hidden=()).build(SMALL, 5), SMALL),
    "batch norm": (lambda: CnnBn(widths=(4, 6, 5)).build(SMALL, 5), SMALL),
    "batch norm, flattened": (lambda: Cnn(widths=(4, 6), norm="batch", kernels=3).build(SMALL, 5), SMALL),
    "residual": (lambda: ResidualNet(1, 5, block=BasicBlock, depths=(1, 1, 1, 1), small_images=True), (1, 8, 8)),
    "bottleneck": (lambda: ResidualNet(1, 5, block=Bottleneck, depths=(1, 1, 1, 1)), (1, 32, 32)),
    "lenet5": (lambda: LeNet5().build(MNIST, 5), MNIST),
}


def network(name, seed=0):
    """A network with random values, its structure, and random inputs."""
    build, shape = NETWORKS[name]
    torch.manual_seed(seed)
    module = build()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):  # whatever training may have made of it
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return module, Structure.of(module, shape), torch.randn(6, *shape)


def masked_outputs(module, mask, x, training=False):
    """What the network with these parameters masked answers."""
    params = Params.of(module)
    params.trainable.floats.mul_(mask)
    params.bind(module)
    with torch.no_grad():
        return module.train(training)(x)


def full_mask(structure):
    return torch.ones(structure.layout.num_params, dtype=torch.bool)


def random_mask(structure, seed, density=0.7, share=0.25):
    """Scattered zeros, and in each layer units without inputs, without readers, without gamma and beta."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(structure.layout.num_params, generator=rng) < density
    for group in structure.hidden:
        for spans in (group.incoming, (group.outgoing,), *(norm.spans for norm in group.norms)):
            units = torch.rand(group.units, generator=rng) < share
            for span in spans:
                span.of(mask)[:, units] = False
    return mask


# ---- which units there are
def groups_of(structure):
    return [(g.layer, g.next_layer, g.units, g.columns, g.functions, g.zero) for g in structure.hidden]


def test_the_units_of_two_cnn():
    structure = Structure.of(two_cnn(1, 32, 10, 512), (1, 24, 24))
    way = ("ReLU", "MaxPool2d")
    assert groups_of(structure) == [
        ("0", "3", 32, 1, way, True),
        ("3", "8", 64, 49, (*way, "AdaptiveAvgPool2d", "Flatten"), True),
        ("8", "10", 512, 1, ("ReLU",), True),
    ]
    assert structure.num_units == 608
    assert structure.unanalysed == ()
    assert structure.layout.num_params == 1_663_370
    second = structure.hidden[1]
    assert second.weight.of(torch.arange(1_663_370)).shape == (1, 64, 32 * 25)
    assert second.outgoing.of(torch.arange(1_663_370)).shape == (512, 64, 49)
    # channel 2 owns columns 98..146 of the linear layer, whose rows are 3136 long
    offset = next(slot.offset for slot in structure.layout.params if slot.name == "8.weight")
    assert second.outgoing.of(torch.arange(1_663_370))[3, 2].tolist() == list(
        range(offset + 3 * 3136 + 98, offset + 3 * 3136 + 147)
    )


@pytest.mark.parametrize(
    ("model", "shape", "units"),
    [
        (Mlp(()), MNIST, []),
        (Mlp((64, 32)), MNIST, [64, 32]),
        (Cnn(), MNIST, [8, 16, 64]),
        (Cnn(hidden=(), global_pool=True, projection=3), MNIST, [8, 16, 16, 3]),
        (Cnn(norm="batch"), MNIST, [8, 16, 64]),
        (CnnBn(), MNIST, [16, 32, 64]),
        (NiidCnn(), MNIST, [6, 16, 120, 84]),
        (LeNet5(), MNIST, [6, 16, 120, 84]),
    ],
)
def test_models_without_branches_are_analysed_whole(model, shape, units):
    structure = Structure.of(model.build(shape, 10), shape)
    assert [group.units for group in structure.hidden] == units
    assert structure.unanalysed == ()


def test_batch_norm_belongs_to_the_units_before_it():
    structure = Structure.of(CnnBn().build(MNIST, 10), MNIST)
    last = structure.hidden[2]
    assert [norm.layer for norm in last.norms] == ["7"]
    assert [span.name for span in last.spans] == ["6.weight", "7.weight", "7.bias", "11.weight"]
    assert last.bias is None
    assert last.functions == ("ReLU", "AdaptiveAvgPool2d", "Flatten")


def test_group_norm_mixes_channels_and_leaves_no_units():
    structure = Structure.of(CnnBn(norm="group").build(MNIST, 10), MNIST)
    assert structure.hidden == ()
    assert structure.unanalysed[0] == "0: its output goes through 1 (GroupNorm), which is not analysed"
    assert len(structure.unanalysed) == 3


@pytest.mark.parametrize(
    ("model", "inside"), [(ResNet18(), 8), (ResNet18Small(), 8), (ResNet18D2l(), 8), (ResNet50(), 32)]
)
def test_of_residual_networks_only_what_no_addition_reads(model, inside):
    structure = Structure.of(model.build((3, 32, 32), 10), (3, 32, 32))
    assert len(structure.hidden) == inside
    assert structure.hidden[0].layer == "layer1.0.conv1"
    assert structure.hidden[0].next_layer == "layer1.0.conv2"
    assert {group.layer.split(".")[2] for group in structure.hidden} <= {"conv1", "conv2"}
    reasons = "\n".join(structure.unanalysed)
    assert "conv1: its output goes to 2 places (layer1.0.conv1, layer1.0.downsample" in reasons
    assert "its output goes into add_ together with something else" in reasons
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in model.build((3, 32, 32), 10).modules())
    assert len(structure.unanalysed) == convolutions - inside


def next_character():
    """Embedding 80 x 8, two LSTM layers of 6, linear to 80; reads tokens."""
    return NextCharLstm(hidden=6).build((5,), 80)


def test_a_recurrent_network_has_no_units_and_says_so():
    structure = Structure.of(next_character(), (5,), torch.int64)
    assert structure.hidden == ()
    assert structure.unanalysed == ("embedding: Embedding is not analysed", "lstm: LSTM is not analysed")


def _shared(net, x):
    return net.c(net.b(net.b(functional.relu(net.a(x)))))


def _branches(training_only):
    def way(net, x):
        y = net.a(x)
        return net.b(y) + (y[:, :3] if net.training or not training_only else 0.0)

    return way


def _scaled(net, x):
    return net.b(net.a(x) * 2.0)


def _weights(net, x):
    return net.b(functional.relu(functional.linear(x, net.a.weight, net.a.bias)))


def _penalised(net, x):
    return net.b(functional.relu(net.a(x))) + net.a.weight.sum()


def _returned(net, x):
    y = net.a(x)
    return net.b(y), y


def _sequence(net, x):
    return net.b(net.a(x.view(2, 2, 2)).mean(dim=1))


def _viewed(net, x):
    return net.b(net.a(x).view(-1, 3))


def _item(net, x):
    return net.b(net.a(x)) * float(x.sum())


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (_shared, "a: its output goes to b, which cannot lose inputs: it is called more than once"),
        (_branches(False), "a: its output goes to 2 places (b, __getitem__)"),
        (_branches(True), "a: its output takes another way in training"),
        (_scaled, "a: its output goes through mul, which is not analysed"),
        (_weights, "a: Linear is not analysed"),
        (_penalised, "a: its weights are used elsewhere too"),
        (_returned, "a: its output goes to 2 places (b, the output)"),
        (_sequence, "a: it reads 3 dimensions instead of 2"),
        (_viewed, "a: its output goes through view, which is not analysed"),
        (_item, "Stack cannot be followed in evaluation mode: "),
    ],
)
def test_what_cannot_be_followed_has_no_units(way, reason):
    inputs = 2 if way is _sequence else 4
    net = Stack(way, a=nn.Linear(inputs, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 3))
    structure = Structure.of(net, (4,))
    assert structure.hidden == ()
    assert any(told.startswith(reason) for told in structure.unanalysed), structure.unanalysed


def test_tied_weights_grouped_convolutions_hooks_and_norms_of_another_size_have_no_units():
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    assert Structure.of(tied, (3,)).hidden == ()
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    structure = Structure.of(grouped, (2, 8, 8))
    assert structure.hidden == ()
    assert "1: its channels are in 2 groups" in structure.unanalysed
    hooked = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    hooked[1].register_forward_hook(lambda layer, x, y: y + 1.0)
    assert Structure.of(hooked, (3,)).unanalysed == ("0: its output goes through 1, which has forward hooks",)
    behind = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert Structure.of(behind, (1, 4, 4)).hidden == ()
    across = nn.Sequential(nn.Linear(4, 4), nn.MaxPool1d(2), nn.Linear(2, 2))  # pools units, not pixels
    assert Structure.of(across, (4,)).hidden == ()


def test_functions_do_as_well_as_modules_and_in_place_ones_too():
    def way(net, x):
        y = functional.max_pool2d(functional.relu(net.a(x), inplace=True), 2)
        y = functional.dropout(torch.tanh(net.b(y)), training=net.training)
        return net.c(functional.adaptive_avg_pool2d(y, (1, 2)).flatten(1))

    net = Stack(way, a=nn.Conv2d(1, 3, 3), b=nn.Conv2d(3, 4, 3), c=nn.Linear(8, 2))
    structure = Structure.of(net, (1, 12, 12))
    assert groups_of(structure) == [
        ("a", "b", 3, 1, ("relu", "max_pool2d"), True),
        ("b", "c", 4, 2, ("tanh", "dropout", "adaptive_avg_pool2d", "flatten"), True),
    ]


@pytest.mark.parametrize(
    ("function", "zero"),
    [
        *((nn.Tanh(), True), (nn.GELU(), True), (nn.LeakyReLU(), True), (nn.Dropout(), True), (nn.Identity(), True)),
        *((nn.Sigmoid(), False), (nn.Softplus(), False), (nn.Hardtanh(0.5, 1.0), False)),
    ],
)
def test_whether_an_activation_keeps_zero(function, zero):
    structure = Structure.of(nn.Sequential(nn.Linear(3, 2), function, nn.Linear(2, 1)), (3,))
    assert [group.zero for group in structure.hidden] == [zero]


def test_following_leaves_the_module_and_the_random_numbers_alone():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 1)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    Structure.of(module, (3,))
    assert torch.equal(state, torch.random.get_rng_state())
    assert module.training
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_tensors_that_are_kept_dense_have_no_units():
    structure = Structure.of(two_cnn(), SMALL)
    without = structure.without(["3.bias"])
    assert [group.layer for group in without.hidden] == ["0", "8"]
    assert without.unanalysed == ("3: 3.bias is kept dense",)
    assert [group.layer for group in structure.without(["8.weight"]).hidden] == ["0"]
    with pytest.raises(ValueError, match=r"exclude: the model has no parameter '3.gamma'; it has 0.bias"):
        structure.without(["3.gamma"])


# ---- dead units, by hand
def mlp_mask(*tensors):
    """A flat mask from the tensors of weight, bias, weight, bias ..., written as nested lists of 0 and 1."""
    return torch.cat([torch.tensor(tensor, dtype=torch.bool).flatten() for tensor in tensors])


def test_a_chain_of_dead_units_by_hand():
    """2-3-2-1: unit 0 of the first layer is dead, and was all that unit 0 of the second read; its reader goes too."""
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    mask = mlp_mask(
        *([[0, 0], [1, 0], [1, 1]], [0, 0, 1]),  # unit 0: no input, no bias
        *([[1, 0, 0], [0, 1, 1]], [0, 1]),  # unit 0 reads unit 0 alone and has no bias
        *([[1, 1]], [1]),
    )
    expected = mlp_mask(
        *([[0, 0], [1, 0], [1, 1]], [0, 0, 1]),
        *([[0, 0, 0], [0, 1, 1]], [0, 1]),
        *([[0, 1]], [1]),
    )
    structure = Structure.of(module, (2,))
    assert close_dead_units(mask, structure).tolist() == expected.tolist()
    # a bias alone keeps it alive: it is a constant, not 0
    mask[6] = True
    assert close_dead_units(mask, structure).tolist() == mask.tolist()


def test_units_that_nobody_reads_by_hand():
    """Backwards over two layers: unit 1 of the second is read by nobody, and was the only reader of unit 2."""
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    mask = mlp_mask(
        *([[1, 1], [1, 1], [1, 1]], [1, 1, 1]),
        *([[1, 1, 0], [1, 1, 1]], [1, 1]),
        *([[1, 0]], [1]),
    )
    expected = mlp_mask(
        *([[1, 1], [1, 1], [0, 0]], [1, 1, 0]),
        *([[1, 1, 0], [0, 0, 0]], [1, 0]),
        *([[1, 0]], [1]),
    )
    assert close_dead_units(mask, Structure.of(module, (2,))).tolist() == expected.tolist()


def test_a_dead_channel_across_a_flatten_by_hand():
    """One pixel becomes 2 channels of 2 x 1: channel 1 owns columns 2 and 3."""
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    mask = mlp_mask([1, 0], [1, 0], [[1, 1, 1, 1]] * 3, [0, 0, 0])
    closed = close_dead_units(mask, Structure.of(module, (1, 2, 1)))
    assert closed.tolist() == mlp_mask([1, 0], [1, 0], [[1, 1, 0, 0]] * 3, [0, 0, 0]).tolist()


def test_the_output_layer_keeps_its_units():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    mask = mlp_mask([[1, 1], [1, 1]], [1, 1], [[1, 1], [0, 0]], [1, 0])
    assert close_dead_units(mask, Structure.of(module, (2,))).tolist() == mask.tolist()


def test_an_activation_that_makes_something_of_zero_is_not_closed_forwards():
    module = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 1))
    structure = Structure.of(module, (2,))
    mask = mlp_mask([[0, 0], [1, 1]], [0, 1], [[1, 1]], [1])
    assert close_dead_units(mask, structure).tolist() == mask.tolist()
    unread = mlp_mask([[1, 1], [1, 1]], [1, 1], [[0, 1]], [1])
    assert close_dead_units(unread, structure).tolist() == mlp_mask([[0, 0], [1, 1]], [0, 1], [[0, 1]], [1]).tolist()


@pytest.mark.parametrize(
    ("weight", "gamma", "beta", "closed"),
    [(0, 1, 1, False), (0, 1, 0, False), (0, 0, 1, False), (0, 0, 0, True), (1, 0, 0, True), (1, 0, 1, False)],
)
def test_behind_batch_norm_a_unit_is_dead_when_gamma_and_beta_are(weight, gamma, beta, closed):
    module = nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 1))
    mask = mlp_mask([[weight], [1]], [gamma, 1], [beta, 1], [[1, 1]], [1])
    expected = mlp_mask([[0], [1]], [0, 1], [0, 1], [[0, 1]], [1]) if closed else mask
    assert close_dead_units(mask, Structure.of(module, (1,))).tolist() == expected.tolist()


def test_gamma_and_beta_of_a_unit_that_nobody_reads_are_masked():
    module = nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 1))
    mask = mlp_mask([[1], [1]], [1, 1], [1, 1], [[0, 1]], [1])
    expected = mlp_mask([[0], [1]], [0, 1], [0, 1], [[0, 1]], [1])
    assert close_dead_units(mask, Structure.of(module, (1,))).tolist() == expected.tolist()


def test_batch_norm_without_gamma_is_never_silent():
    module = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2, affine=False), nn.ReLU(), nn.Linear(2, 1))
    mask = mlp_mask([[0], [1]], [0, 1], [[1, 1]], [1])
    assert close_dead_units(mask, Structure.of(module, (1,))).tolist() == mask.tolist()


# ---- dead units, at random
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_closing_dead_units_changes_no_answer(name, seed):
    module, structure, x = network(name, seed)
    mask = random_mask(structure, seed)
    closed = close_dead_units(mask, structure)
    assert not (closed & ~mask).any()
    assert int(closed.sum()) < int(mask.sum())
    assert torch.equal(close_dead_units(closed, structure), closed)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    for training in (False, True):
        module.load_state_dict(state)
        before = masked_outputs(module, mask, x, training)
        module.load_state_dict(state)
        after = masked_outputs(module, closed, x, training)
        assert before.abs().max() > 1e-3, "the answers must depend on something"
        assert torch.allclose(before, after, rtol=1e-6, atol=1e-6 * float(before.abs().max()))


@pytest.mark.parametrize("name", ["mlp", "two_cnn", "batch norm"])
def test_a_closed_unit_is_closed_whole(name):
    _, structure, _ = network(name)
    closed = close_dead_units(random_mask(structure, 4), structure)
    for group in structure.hidden:
        incoming = torch.stack([span.of(closed).any(dim=2).any(dim=0) for span in group.incoming]).any(dim=0)
        outgoing = group.outgoing.of(closed).any(dim=2).any(dim=0)
        assert not (incoming & ~outgoing).any(), "what nobody reads is not calculated"
        assert not (outgoing & group.silent(closed)).any(), "what is always 0 is not read"
        assert 0 < int(outgoing.sum()) < group.units


def test_a_full_mask_stays_full_and_an_empty_one_empty():
    _, structure, _ = network("two_cnn")
    full = full_mask(structure)
    assert close_dead_units(full, structure).all()
    assert not close_dead_units(~full, structure).any()


def test_a_layer_that_is_cut_off_closes_all_hidden_layers():
    """Nothing goes through the second layer: the answers are the last bias."""
    _, structure, _ = network("mlp")
    mask = full_mask(structure)
    for span in structure.hidden[1].incoming:
        span.of(mask).fill_(False)
    closed = close_dead_units(mask, structure)
    kept = {s.name for s in structure.layout.params if closed[s.offset : s.offset + s.numel].any()}
    assert kept == {"5.bias"}


@pytest.mark.parametrize("mask", [torch.ones(3, dtype=torch.bool), torch.ones(1_000_000)])
def test_masks_of_another_form_are_refused(mask):
    structure = Structure.of(nn.Linear(999, 1000), (999,))
    assert structure.layout.num_params == 1_000_000
    with pytest.raises(ValueError, match=r"^mask: "):
        close_dead_units(mask, structure)


# ---- whole units by their scores
def test_scores_by_hand():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    structure = Structure.of(module, (2,))
    guidance = torch.tensor([0.1, 0.5, 1.0, 0.0, 0.9, 0.2, 7.0, 7.0])  # weight rows, bias, outgoing
    (scores,) = unit_scores(guidance, structure)
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx([1.5 / 3, 1.2 / 3])


def test_units_pruned_by_hand():
    """Scores 5, 2, 2 of the first hidden layer and 4, 5 of the second."""
    module = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    structure = Structure.of(module, (1,))
    guidance = torch.tensor([9, 3, 2, 1, 1, 2, *[4] * 3, *[5] * 3, 4, 5, 0, 0, 0], dtype=torch.float32)
    assert [s.tolist() for s in unit_scores(guidance, structure)] == [[5.0, 2.0, 2.0], [4.0, 5.0]]
    mask = full_mask(structure)
    pruned = prune_units(mask, guidance, structure, 0.4)  # position 1.6 of 2 2 4 5 5: 3.2
    expected = mlp_mask([1, 0, 0], [1, 0, 0], [[1, 0, 0]] * 2, [1, 1], [[1, 1]], [1])
    assert pruned.tolist() == expected.tolist()
    assert mask.all(), "the mask given is left alone"
    pruned = prune_units(mask, guidance, structure, 0.5)  # position 2: 4, and at most means at most
    assert pruned.tolist() == mlp_mask([1, 0, 0], [1, 0, 0], [[0] * 3, [1, 0, 0]], [0, 1], [[0, 1]], [1]).tolist()


def test_the_units_of_a_layer_are_not_all_pruned():
    module = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    structure = Structure.of(module, (1,))
    guidance = torch.arange(17, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"unit quantile: 0.6 would prune all 3 units of 0; lower it"):
        prune_units(full_mask(structure), guidance, structure, 0.6)


@pytest.mark.parametrize("quantile", [0.3, 0.77, 0.05, 0.5])
def test_units_pruned_are_those_that_numpy_says(quantile):
    _, structure, _ = network("two_cnn")
    guidance = torch.rand(structure.layout.num_params, generator=torch.Generator().manual_seed(5))
    scores = []
    tensors = dict(zip([s.name for s in structure.layout.params], _split(guidance, structure.layout), strict=True))
    for layer in ("0", "3", "8"):
        rows = torch.cat([tensors[f"{layer}.weight"].flatten(1), tensors[f"{layer}.bias"][:, None]], dim=1)
        scores.append(rows.double().mean(dim=1).numpy())
    threshold = np.quantile(np.concatenate(scores), quantile)
    pruned = prune_units(full_mask(structure), guidance, structure, quantile)
    for group, score in zip(structure.hidden, scores, strict=True):
        assert group.kept(pruned).tolist() == (score > threshold).tolist()
        assert not group.kept(pruned).all() or (score > threshold).all()
    assert pruned[-5:].all(), "the output layer's bias"
    lost = sum(int((score <= threshold).sum()) for score in scores)
    assert lost == math.floor(quantile * (structure.num_units - 1)) + 1


def _split(flat, layout):
    return [flat[s.offset : s.offset + s.numel].view(s.shape) for s in layout.params]


def test_scattered_zeros_stay_and_zero_prunes_nothing():
    _, structure, _ = network("batch norm")
    mask = random_mask(structure, 1, share=0.0)
    guidance = torch.rand(structure.layout.num_params)
    assert torch.equal(prune_units(mask, guidance, structure, 0.0), mask)
    pruned = prune_units(mask, guidance, structure, 0.3)
    assert not (pruned & ~mask).any()
    lost = ~full_mask(structure)
    for group in structure.hidden:
        gone = ~group.kept(pruned)
        assert gone.any()
        for span in group.spans:
            span.of(lost)[:, gone] = True
    assert torch.equal(pruned, mask & ~lost), "of a unit that stays only what it shared with others is gone"


def test_guidance_that_is_no_number_and_quantiles_out_of_range_are_refused():
    _, structure, _ = network("mlp")
    mask = full_mask(structure)
    guidance = torch.rand(len(mask))
    for quantile in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"unit quantile: .* is not in \[0, 1\)"):
            prune_units(mask, guidance, structure, quantile)
    with pytest.raises(ValueError, match=r"^guidance: shape"):
        prune_units(mask, guidance[1:], structure, 0.5)
    structure.hidden[1].weight.of(guidance)[0, 3, 1] = math.nan
    with pytest.raises(ValueError, match="guidance: the scores of 3 are not all finite"):
        prune_units(mask, guidance, structure, 0.5)


def test_a_network_without_units_refuses_to_lose_some():
    structure = Structure.of(next_character(), (5,), torch.int64)
    guidance = torch.rand(structure.layout.num_params)
    with pytest.raises(ValueError, match=r"no units to prune .*lstm: LSTM is not analysed"):
        prune_units(full_mask(structure), guidance, structure, 0.1)
    with pytest.raises(ValueError, match="it has no hidden layer"):
        prune_units(torch.ones(6, dtype=torch.bool), torch.rand(6), Structure.of(nn.Linear(2, 2), (2,)), 0.1)


@pytest.mark.timeout(60)
def test_more_parameters_than_single_precision_counts():
    """2^24 + parameters: sizes at which torch.quantile gives up and float32 sums of ones stop."""
    module = nn.Sequential(nn.Linear(4097, 4096), nn.ReLU(), nn.Linear(4096, 1, bias=False))
    structure = Structure.of(module, (4097,))
    assert structure.layout.num_params > 1 << 24
    (group,) = structure.hidden
    guidance = torch.ones(structure.layout.num_params)
    group.weight.of(guidance)[0, 7] = 0.25
    (scores,) = unit_scores(guidance, structure)
    assert scores.unique().tolist() == pytest.approx([(0.25 * 4097 + 1) / 4098, 1.0])
    pruned = prune_units(full_mask(structure), guidance, structure, 1e-5)
    assert int(pruned.sum()) == structure.layout.num_params - 4097 - 1 - 1
    assert torch.equal(close_dead_units(pruned, structure), pruned)


def test_the_layout_is_the_modules():
    module = two_cnn()
    assert Structure.of(module, SMALL).layout == Layout.of(module)
