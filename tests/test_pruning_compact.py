"""The smaller network without closed units: the same values, the same answers, the same training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fldist.data.client_data import ClientData
from fldist.data.datasets import Dataset
from fldist.data.partition import Iid
from fldist.data.task import Task
from fldist.models.mlp import Mlp
from fldist.models.train import LocalTraining
from fldist.params import Layout, Params
from fldist.pruning.compact import Compaction
from fldist.pruning.structure import Structure, close_dead_units, prune_units
from fldist.seeding import Streams
from tests.test_pruning_structure import NETWORKS, SMALL, full_mask, network, random_mask, two_cnn

CLASSES = 5


def compacted(name, seed=0, **options):
    """A network, its structure, a closed mask and what is left of it."""
    module, structure, x = network(name, seed)
    mask = close_dead_units(random_mask(structure, seed, **options), structure)
    return module, mask, Compaction.of(module, mask, structure), x


def masked(module, mask):
    """The network's values, zero outside the mask."""
    params = Params.of(module)
    params.trainable.floats.mul_(mask)
    return params


# ---- what stays where, by hand
def test_a_unit_taken_out_by_hand():
    """2-3-2 without unit 1: of the numbers 0..16 in their order, row 1, its bias and column 1 are gone."""
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    structure = Structure.of(module, (2,))
    mask = full_mask(structure)
    for span in structure.hidden[0].spans:
        span.of(mask)[:, 1] = False
    compaction = Compaction.of(module, mask, structure)
    whole = Params(structure.layout, torch.arange(17.0))
    small = compaction.shrink(whole)
    expected = [0, 1, 4, 5, 6, 8, 9, 11, 12, 14, 15, 16]
    assert small.floats.tolist() == expected
    assert [(s.name, s.shape) for s in small.layout.params] == [
        ("0.weight", (2, 2)),
        ("0.bias", (2,)),
        ("2.weight", (2, 2)),
        ("2.bias", (2,)),
    ]
    assert compaction.num_removed == 1
    assert [units.tolist() for units in compaction.survivors] == [[0, 2]]
    back = compaction.expand(small + small, whole)
    doubled = [2 * value if value in expected else value for value in range(17)]
    assert back.floats.tolist() == doubled
    assert whole.floats.tolist() == list(range(17)), "the base is left alone"
    assert compaction.shrink_mask(mask).all()
    assert compaction.shrink_mask(torch.arange(17)).tolist() == expected


def test_columns_across_a_flatten_by_hand():
    """Channel 1 of 3 with 2 x 1 pixels owns columns 2 and 3."""
    module = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2))
    structure = Structure.of(module, (1, 2, 1))
    mask = full_mask(structure)
    for span in structure.hidden[0].spans:
        span.of(mask)[:, 1] = False
    compaction = Compaction.of(module, mask, structure)
    small = compaction.shrink(Params(structure.layout, torch.arange(32.0), torch.tensor([7])))
    weights, gamma = [0, 2, 3, 5], [6, 8, 9, 11]
    linear = [12, 13, 16, 17, 18, 19, 22, 23, 24, 25]
    assert small.floats.tolist() == [*weights, *gamma, *linear, 26, 28, 29, 31]
    assert small.ints.tolist() == [7]
    net = compaction.module()
    assert (net[0].out_channels, net[1].num_features, net[4].in_features, net[4].out_features) == (2, 2, 4, 2)


def test_what_is_not_closed_whole_stays():
    """One entry of a unit, of whatever tensor, keeps it in the network."""
    module = nn.Sequential(nn.Linear(1, 3, bias=False), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    structure = Structure.of(module, (1,))
    mask = torch.zeros(structure.layout.num_params, dtype=torch.bool)
    mask[[0, 4, 8]] = True  # unit 0's weight, unit 1's gamma, unit 2's beta
    assert [units.tolist() for units in Compaction.of(module, mask, structure).survivors] == [[0, 1, 2]]
    mask[4] = False
    assert [units.tolist() for units in Compaction.of(module, mask, structure).survivors] == [[0, 2]]


def test_scattered_zeros_take_nothing_out():
    module, structure, _ = network("two_cnn")
    mask = random_mask(structure, 0, density=0.5, share=0.0)
    compaction = Compaction.of(module, close_dead_units(mask, structure), structure)
    assert compaction.num_removed == 0
    assert compaction.layout == structure.layout
    params = Params.of(module)
    assert compaction.shrink(params).equals(params)


def test_a_layer_of_which_nothing_is_left_keeps_a_unit():
    module, structure, x = network("two_cnn")
    nothing = ~full_mask(structure)
    compaction = Compaction.of(module, nothing, structure)
    assert [units.tolist() for units in compaction.survivors] == [[0], [0], [0]]
    assert not compaction.shrink_mask(nothing).any()
    net = compaction.module()
    compaction.shrink(masked(module, nothing)).bind(net)
    assert not net(x).any()


# ---- there and back
@pytest.mark.parametrize("name", NETWORKS)
def test_values_go_there_and_back(name):
    module, mask, compaction, _ = compacted(name)
    whole = Params.of(module)
    whole.ints.random_(100, generator=torch.Generator().manual_seed(1))
    assert compaction.num_removed > 0
    for travel in ("all", "floats", "params"):
        part = whole.restricted(travel)
        small = compaction.shrink(part)
        assert small.layout == compaction.layout.restricted(travel)
        assert torch.equal(small.ints, part.ints)
        assert small.floats.data_ptr() != part.floats.data_ptr()
        assert compaction.expand(small, part).equals(part)
        assert compaction.shrink(compaction.expand(small, part.zeros_like())).equals(small)
    kept = masked(module, mask)
    back = compaction.expand(compaction.shrink(kept), kept.zeros_like())
    assert back.trainable.equals(kept.trainable), "what a mask closes is zero either way"
    assert int(compaction.shrink_mask(mask).sum()) == int(mask.sum())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_module_is_the_layouts_and_a_fresh_one(name):
    module, _, compaction, x = compacted(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    net = compaction.module()
    assert Layout.of(net) == compaction.layout
    assert Params.of(net).equals(compaction.shrink(Params.of(module)))
    other = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.zero_()
        net.train()(x)
    assert any(tensor.any() for tensor in other.parameters())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    sizes = {key: value.shape for key, value in module.state_dict().items()}
    assert sizes == {key: value.shape for key, value in before.items()}
    assert "in_features" in repr(net)
    assert repr(net) != repr(module), "sizes are told as they are"


DEEP = ("residual", "bottleneck")  # random layers on random layers: what float32 rounds off grows on the way


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(2))
def test_the_smaller_network_answers_as_the_masked_one(name, seed, dtype, tolerance):
    module, mask, compaction, x = compacted(name, seed)
    for training in (False, True):
        nets = copy.deepcopy(module), compaction.module()
        masked(module, mask).bind(nets[0])
        compaction.shrink(masked(module, mask)).bind(nets[1])
        with torch.no_grad():
            whole, small = (net.to(dtype).train(training)(x.to(dtype)) for net in nets)
        allowed = tolerance * (1e3 if name in DEEP else 1.0)
        assert (whole - small).abs().max() <= allowed * whole.abs().max()


def test_other_networks_masks_and_values_are_refused():
    module, structure, _ = network("mlp")
    mask = full_mask(structure)
    compaction = Compaction.of(module, mask, structure)
    with pytest.raises(ValueError, match="another module's"):
        Compaction.of(two_cnn(), mask, structure)
    for other in (mask[1:], mask.float()):
        with pytest.raises(ValueError, match="compaction: a mask of shape"):
            Compaction.of(module, other, structure)
    with pytest.raises(ValueError, match="are not of the network expected"):
        compaction.shrink(Params.of(two_cnn()))
    with pytest.raises(ValueError, match="are not of the network expected"):
        compaction.expand(Params.of(two_cnn()), Params.of(module))
    with pytest.raises(ValueError, match="expand: the base has"):
        compaction.expand(Params.of(module), Params.of(two_cnn()))
    with pytest.raises(ValueError, match=r"^mask: shape"):
        compaction.shrink_mask(mask[1:])


# ---- training
def task_of(build, shape, local, n=40):
    """One client with n random samples."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, *shape, generator=rng), torch.randint(CLASSES, (n,), generator=rng)
    dataset = Dataset(x.numpy(), y.numpy(), x[:5].numpy(), y[:5].numpy(), CLASSES)
    return Task(
        dataset=dataset,
        partition=Iid(),
        num_clients=1,
        build=build,
        local=LocalTraining(**{"batch_size": 8, "epochs": 2, **local}),
        seed=3,
        partition_seed=0,
    )


LOCALS = {
    "sgd": {"lr": 0.05},
    "momentum": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01},
    "clipped": {"lr": 0.05, "clip": 0.5},
    "adam": {"lr": 3e-4, "optimizer": "adam"},
    "adam, clipped": {"lr": 3e-4, "optimizer": "adam", "clip": 0.5, "weight_decay": 0.01},
}
CASES = [("mlp", local) for local in LOCALS] + [(name, "momentum") for name in ("two_cnn", "cnn", "batch norm")]
CASES += [("two_cnn", "adam"), ("batch norm", "adam, clipped")]


@pytest.mark.parametrize(("name", "local"), CASES)
def test_the_smaller_network_trains_as_the_masked_one(name, local):
    """Ten steps through the local training: the same values, but for the order in which float32 is summed."""
    module, mask, compaction, _ = compacted(name, 1)
    shape = NETWORKS[name][1]
    start = masked(module, mask)
    whole = task_of(lambda *_: copy.deepcopy(module), shape, LOCALS[local])
    small = task_of(lambda *_: compaction.module(), shape, LOCALS[local])
    assert small.layout == compaction.layout
    there = ClientData(whole, 0, Streams(3, 1, 0)).train(start, mask=mask)
    here = ClientData(small, 0, Streams(3, 1, 0)).train(compaction.shrink(start), mask=compaction.shrink_mask(mask))
    assert there.steps == here.steps == 10
    assert not torch.equal(there.params.floats, start.floats), "something was trained"
    back = compaction.expand(here.params, start)
    assert not back.trainable.floats[~mask].any()
    tolerance = 1e-5 if "adam" in local else 1e-6  # Adam's first steps are as long for small gradients as for large
    assert (back.trainable.floats - there.params.trainable.floats).abs().max() <= tolerance
    x = torch.randn(20, *shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        answers = whole.frozen_copy(there.params)(x)
        smaller = small.frozen_copy(here.params)(x)
    assert (answers - smaller).abs().max() <= tolerance * answers.abs().max()
    assert here.loss == pytest.approx(there.loss, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        *((name, optimizer) for name in ("mlp", "two_cnn", "batch norm") for optimizer in ("adam", "sgd")),
        ("residual", "sgd"),
    ],
)
def test_in_float64_they_are_the_same_to_rounding(name, optimizer):
    """In double precision the difference falls with the precision: it is rounding and nothing else."""
    module, mask, compaction, x = compacted(name, 2)
    nets = [copy.deepcopy(module), compaction.module()]
    masked(module, mask).bind(nets[0])
    compaction.shrink(masked(module, mask)).bind(nets[1])
    answers = []
    y = torch.arange(len(x)) % CLASSES
    for net, kept in zip(nets, (mask, compaction.shrink_mask(mask)), strict=True):
        net.double().train()
        tensors = list(net.parameters())
        masks = [part.view(t.shape) for part, t in zip(kept.split([t.numel() for t in tensors]), tensors, strict=True)]
        make = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
        stepper = make(tensors, lr=1e-2, weight_decay=0.1)
        for _ in range(12):
            stepper.zero_grad()
            cross_entropy(net(x.double()), y).backward()
            for tensor, part in zip(tensors, masks, strict=True):
                tensor.grad.mul_(part)
            torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            stepper.step()
            with torch.no_grad():
                for tensor, part in zip(tensors, masks, strict=True):
                    tensor.mul_(part)
        with torch.no_grad():
            answers.append(net.eval()(x.double()))
    assert (answers[0] - answers[1]).abs().max() <= 1e-10 * answers[0].abs().max()


def test_pruned_units_are_gone():
    module = two_cnn()
    structure = Structure.of(module, SMALL)
    guidance = torch.rand(structure.layout.num_params, generator=torch.Generator().manual_seed(0))
    mask = close_dead_units(prune_units(full_mask(structure), guidance, structure, 0.5), structure)
    compaction = Compaction.of(module, mask, structure)
    assert compaction.num_removed == 11  # of 21 units: position 10 of the sorted scores
    assert compaction.shrink_mask(mask).all(), "no scattered zeros, nothing masked is left"


def test_an_mlp_of_the_models_takes_out_its_units():
    module = Mlp((64, 64)).build((1, 28, 28), 10)
    structure = Structure.of(module, (1, 28, 28))
    mask = full_mask(structure)
    for group, lost in zip(structure.hidden, (48, 32), strict=True):
        for span in group.spans:
            span.of(mask)[:, :lost] = False
    compaction = Compaction.of(module, mask, structure)
    assert compaction.layout.num_params == 784 * 16 + 16 + 16 * 32 + 32 + 32 * 10 + 10
