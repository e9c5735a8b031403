"""Params: a module's state as two flat blocks, and a module bound to them."""

import math

import pytest
import torch
from torch import nn

from fldist.params import Layout, Params

NUM_PARAMS = 3 * 4 + 4 + 4 + 4 + 4 * 2 + 2
NUM_BUFFERS = 4 + 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


class WithCache(nn.Module):
    """A module with a persistent and a non-persistent buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("cache", torch.full((5,), 7.0), persistent=False)
        self.register_buffer("kept", torch.full((3,), 8.0))


def step(module, x):
    """One step of SGD that moves every parameter."""
    module.train()
    module(x).square().sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.1 * parameter.grad


# ---- layout
def test_layout_has_parameters_then_float_buffers_and_integers_apart():
    layout = Layout.of(net())
    assert [s.name for s in layout.params] == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    assert [s.name for s in layout.buffers] == ["1.running_mean", "1.running_var"]
    assert [s.name for s in layout.integers] == ["1.num_batches_tracked"]
    assert [s.offset for s in layout.params + layout.buffers] == [0, 12, 16, 20, 24, 32, 34, 38]
    assert (layout.num_params, layout.num_floats, layout.num_ints) == (NUM_PARAMS, NUM_PARAMS + NUM_BUFFERS, 1)


def test_a_model_has_4_bytes_a_float_and_8_a_counter():
    params = Params.of(net())
    assert params.nbytes == params.layout.nbytes == 4 * (NUM_PARAMS + NUM_BUFFERS) + 8 * 1
    assert params.nbytes == params.floats.numel() * 4 + params.ints.numel() * 8


def test_blocks_hold_the_modules_values():
    module = net()
    module(torch.randn(5, 3))  # moves the buffers
    for name, view in Params.of(module).named():
        assert torch.equal(view, module.state_dict()[name]), name


def test_params_of_copies():
    module = net()
    params = Params.of(module)
    before = params.clone()
    step(module, torch.ones(5, 3))
    assert params.equals(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_module_of_another_precision_is_refused(dtype):
    with pytest.raises(ValueError, match=r"0\.weight.*float32"):
        Layout.of(nn.Sequential(nn.Linear(2, 2).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_a_buffer_of_another_type_is_refused(dtype):
    module = nn.Linear(2, 2)
    module.register_buffer("extra", torch.zeros(2, dtype=dtype))
    with pytest.raises(ValueError, match="extra"):
        Layout.of(module)


def test_tied_weights_are_held_once_and_stay_tied():
    module = Tied()
    params = Params.of(module)
    assert [s.name for s in params.layout.params] == ["a.weight", "a.bias", "b.bias"]
    params.bind(module)
    assert module.b.weight.data_ptr() == module.a.weight.data_ptr() == params.floats.data_ptr()
    step(module, torch.randn(4, 3))
    assert torch.equal(module.b.weight.flatten(), params.floats[:9])


def test_non_persistent_buffers_are_left_out_and_left_alone():
    module = WithCache()
    params = Params.of(module)
    assert [s.name for s in params.layout.buffers] == ["kept"]
    params.zeros_like().bind(module)
    assert torch.equal(module.cache, torch.full((5,), 7.0))
    assert torch.equal(module.kept, torch.zeros(3))


# ---- binding
def test_a_step_of_a_bound_module_moves_the_block():
    module = net()
    params = Params.of(module)
    params.bind(module)
    before = params.clone()
    step(module, torch.randn(8, 3))
    assert not torch.equal(params.trainable.floats, before.trainable.floats)
    assert not torch.equal(params.floats[NUM_PARAMS:], before.floats[NUM_PARAMS:])  # running statistics
    assert params.ints.tolist() == [before.ints.item() + 1]
    for name, view in params.named():
        assert view.data_ptr() == module.state_dict()[name].data_ptr(), name


def test_a_bound_module_computes_with_the_blocks_values():
    module, x = net(), torch.randn(4, 3)
    Params.of(module).zeros_like().bind(module)
    module.eval()
    assert torch.equal(module(x), torch.zeros(4, 2))


def test_binding_the_trainable_part_leaves_the_buffers_as_they_are():
    module = net()
    part = Params.of(module).trainable.zeros_like()
    part.bind(module)
    assert not module[0].weight.any()
    assert torch.equal(module[1].running_var, torch.ones(4))


def test_blocks_start_at_64_bytes():
    params = Params.of(net())
    for made in (params, params.clone(), params.zeros_like(), params + params, params.trainable):
        assert made.floats.data_ptr() % 64 == 0
        assert made.ints.numel() == 0 or made.ints.data_ptr() % 64 == 0


# ---- parts
def test_trainable_is_a_view_of_the_parameters():
    params = Params.of(net())
    trainable = params.trainable
    assert trainable.floats.shape == (NUM_PARAMS,)
    assert trainable.ints.numel() == 0
    trainable.floats.fill_(3.0)
    assert torch.equal(params.floats[:NUM_PARAMS], torch.full((NUM_PARAMS,), 3.0))
    assert not torch.equal(params.floats[NUM_PARAMS:], torch.full((NUM_BUFFERS,), 3.0))


@pytest.mark.parametrize(
    ("travel", "floats", "ints"),
    [("all", NUM_PARAMS + NUM_BUFFERS, 1), ("floats", NUM_PARAMS + NUM_BUFFERS, 0), ("params", NUM_PARAMS, 0)],
)
def test_restricted_names_the_part_that_travels(travel, floats, ints):
    params = Params.of(net())
    part = params.restricted(travel)
    assert (part.layout.num_floats, part.layout.num_ints) == (floats, ints)
    assert part.floats.data_ptr() == params.floats.data_ptr()
    assert params.layout.fitting(floats, ints) == part.layout == params.layout.restricted(travel)
    assert part.nbytes == 4 * floats + 8 * ints


@pytest.mark.parametrize("sizes", [(0, 0), (NUM_PARAMS + 1, 0), (NUM_PARAMS, 1), (NUM_PARAMS + NUM_BUFFERS, 2)])
def test_sizes_that_are_no_part_fit_nothing(sizes):
    assert Layout.of(net()).fitting(*sizes) is None


def test_write_overwrites_the_leading_part():
    params = Params.of(net())
    rest = params.floats[NUM_PARAMS:].clone()
    params.write(params.trainable.zeros_like())
    assert not params.trainable.floats.any()
    assert torch.equal(params.floats[NUM_PARAMS:], rest)


# ---- arithmetic
def pair():
    layout = Layout.of(net())
    a, b = Params.zeros(layout), Params.zeros(layout)
    a.floats.copy_(torch.arange(layout.num_floats))
    b.floats.fill_(2.0)
    a.ints.fill_(10)
    b.ints.fill_(3)
    return a, b


def test_arithmetic_by_hand():
    a, b = pair()
    count = torch.arange(a.layout.num_floats, dtype=torch.float32)
    for result, floats, counter in [
        (a + b, count + 2, 13),
        (a - b, count - 2, 7),
        (-a, -count, -10),
        (a.scale(0.5), count / 2, 10),
        (a * 3.0, count * 3, 10),
        (3.0 * a, count * 3, 10),
        (a / 4.0, count / 4, 10),
    ]:
        assert torch.equal(result.floats, floats)
        assert result.ints.tolist() == [counter]
        assert result.layout == a.layout


def test_arithmetic_leaves_its_operands_alone_and_shares_nothing():
    a, b = pair()
    for make in (lambda: a + b, lambda: a - b, lambda: -a, lambda: a.scale(1.0), lambda: a / 1.0, a.clone):
        result = make()
        result.floats.fill_(99.0)
        result.ints.fill_(99)
    expected_a, expected_b = pair()
    assert a.equals(expected_a)
    assert b.equals(expected_b)


def test_different_layouts_do_not_mix():
    a, _ = pair()
    with pytest.raises(ValueError, match=r"42 and 34 floats.*\.trainable"):
        a + a.trainable
    with pytest.raises(ValueError, match="layout"):
        a - Params.of(nn.Linear(3, 2))


def test_blocks_must_fit_their_layout():
    layout = Layout.of(net())
    with pytest.raises(ValueError, match="do not fit"):
        Params(layout, torch.zeros(layout.num_floats - 1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="do not fit"):
        Params(layout, torch.zeros(layout.num_floats))


def test_the_norm_is_taken_over_the_floats_in_float64():
    params = Params.zeros(Layout.of(nn.Linear(1, 1)))
    params.floats.copy_(torch.tensor([3e30, 4e30]))  # the squares exceed float32
    assert math.isclose(params.norm(), 5e30, rel_tol=1e-6)
    a, _ = pair()
    assert a.norm() == pytest.approx(math.sqrt(sum(i * i for i in range(42))))


def test_equals_compares_both_blocks():
    a, _ = pair()
    floats, ints = a.clone(), a.clone()
    floats.floats[-1] += 1
    ints.ints += 1
    assert a.equals(a.clone())
    assert not a.equals(floats)
    assert not a.equals(ints)
