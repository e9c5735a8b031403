"""Local training, compared with a bare torch loop on an ordinary copy of the module."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fldist.data.client_data import ClientData
from fldist.data.datasets import Dataset
from fldist.data.partition import Iid
from fldist.data.task import Task
from fldist.models.cnn import CnnBn
from fldist.models.mlp import Mlp
from fldist.models.train import LocalTraining, Network, Order, train, warm_up
from fldist.params import Layout, Params
from fldist.seeding import Streams

SEED = 11
CLASSES = 3


@pytest.fixture(autouse=True, scope="module")
def _imports():
    """Let no test pay for what torch imports at its first optimizer step."""
    warm_up()


def make_task(build=None, n=30, **local):
    """One client with n random images of 1 x 4 x 4."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 4, 4, generator=rng)
    y = torch.randint(CLASSES, (n,), generator=rng)
    return Task(
        dataset=Dataset(x, y, x[:5].clone(), y[:5].clone(), CLASSES),
        partition=Iid(),
        num_clients=1,
        build=build or Mlp((6,)).build,
        local=LocalTraining(**{"batch_size": 8, "lr": 0.1, **local}),
        seed=SEED,
        partition_seed=0,
    )


def data_of(task):
    """The client's data at the start of round 1."""
    return ClientData(task, 0, Streams(SEED, 1, 0))


def ordinary(build, params):
    """A module of its own with these values."""
    module = build((1, 4, 4), CLASSES)
    module.load_state_dict({name: view.clone() for name, view in params.named()})
    return module


def bare_loop(module, task, epochs, before_step=None, after_step=None, optimizer=None):
    """Plain torch: batches by the client's stream of round 1. Returns the mean loss of every epoch."""
    local = task.local
    x, y = task.rows(0)
    order = Streams(SEED, 1, 0).generator("order")
    optimizer = optimizer or torch.optim.SGD(
        module.parameters(), lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay
    )
    module.train()
    losses = []
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(y), generator=order).split(local.batch_size):
            optimizer.zero_grad()
            loss = cross_entropy(module(x[batch]), y[batch])
            loss.backward()
            if before_step is not None:
                before_step(module)
            optimizer.step()
            if after_step is not None:
                after_step(module)
            total += float(loss.detach()) * len(batch)
        losses.append(total / len(y))
    return losses


def assert_close(params, module, tolerance=1e-6):
    for name, view in params.named():
        torch.testing.assert_close(view, module.state_dict()[name], rtol=0, atol=tolerance, msg=name)


def bits(params):
    return params.floats.numpy().tobytes(), params.ints.numpy().tobytes()


MODELS = {"mlp": Mlp((6,)).build, "cnn_bn": CnnBn((4, 5)).build}


# ---- plain
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "local", [{}, {"momentum": 0.9}, {"weight_decay": 0.05}, {"momentum": 0.8, "weight_decay": 0.02}]
)
def test_plain_training_is_a_bare_loop_of_sgd(model, local):
    build = MODELS[model]
    task = make_task(build, **local)
    start = task.init_params()
    module = ordinary(build, start)
    trained = data_of(task).train(start, epochs=3)
    losses = bare_loop(module, task, epochs=3)
    assert_close(trained.params, module)
    assert trained.steps == 3 * 4  # 8 + 8 + 8 + 6
    assert trained.lr == 0.1
    assert trained.loss == pytest.approx(losses[-1], abs=1e-6)
    assert trained.progress.losses == pytest.approx(losses, abs=1e-6)


def test_momentum_and_weight_decay_matter_in_the_comparison():
    start = make_task().init_params()
    results = [
        data_of(make_task(**local)).train(start, epochs=2).params
        for local in ({}, {"momentum": 0.9}, {"weight_decay": 0.05})
    ]
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert (results[a] - results[b]).norm() > 1e-2


def test_adam_is_torchs_adam():
    task = make_task(optimizer="adam", lr=0.01, weight_decay=0.1)
    start = task.init_params()
    module = ordinary(MODELS["mlp"], start)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01, weight_decay=0.1)
    bare_loop(module, task, epochs=2, optimizer=optimizer)
    assert_close(data_of(task).train(start, epochs=2).params, module, tolerance=1e-5)


def test_the_number_of_epochs_is_that_of_the_section_local():
    task = make_task(epochs=2)
    start = task.init_params()
    by_default, explicit, one = (data_of(task).train(start, epochs=e) for e in (None, 2, 1))
    assert bits(by_default.params) == bits(explicit.params) != bits(one.params)


def test_training_leaves_its_start_and_earlier_results_alone():
    task = make_task(MODELS["cnn_bn"])
    start = task.init_params()
    before = bits(start)
    first = data_of(task).train(start)
    kept = bits(first.params)
    data_of(task).train(first.params)
    task.evaluate(start)
    assert bits(start) == before
    assert bits(first.params) == kept


def test_the_same_training_has_the_same_bits_and_the_next_use_another_order():
    task = make_task()
    data = data_of(task)
    first, second = data.train(task.init_params()), data.train(task.init_params())
    again = data_of(task).train(task.init_params())
    assert bits(first.params) == bits(again.params) != bits(second.params)


@pytest.mark.parametrize("travel", ["floats", "params"])
def test_the_result_has_the_layout_of_what_was_given(travel):
    task = make_task(MODELS["cnn_bn"])
    start = task.init_params()
    whole = data_of(task).train(start).params
    part = data_of(task).train(start.restricted(travel)).params
    assert part.layout == start.restricted(travel).layout
    assert part.equals(whole.restricted(travel))


# ---- clipping
def test_clipping_bounds_the_total_gradient_norm():
    task = make_task(lr=1.0, clip=0.01, batch_size=100)
    start = task.init_params()
    step = data_of(task).train(start, epochs=1).params - start
    assert step.norm() == pytest.approx(0.01, rel=1e-3)
    free = data_of(make_task(lr=1.0, batch_size=100)).train(start, epochs=1).params - start
    assert free.norm() > 0.02
    cosine = float(step.floats @ free.floats) / (step.norm() * free.norm())
    assert cosine == pytest.approx(1.0, abs=1e-5)


def test_clipping_is_that_of_a_bare_loop():
    task = make_task(clip=0.75, momentum=0.9, weight_decay=0.01)
    start = task.init_params()
    module = ordinary(MODELS["mlp"], start)
    norms = []

    def clip(module):
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), 0.75)))

    bare_loop(module, task, epochs=2, before_step=clip)
    assert min(norms) < 0.75 < max(norms)  # some batches are clipped, others are not
    assert_close(data_of(task).train(start, epochs=2).params, module)


def test_a_large_clip_changes_nothing():
    start = make_task().init_params()
    clipped, free = (data_of(make_task(clip=c)).train(start).params for c in (1e6, 0.0))
    assert bits(clipped) == bits(free)


def test_before_step_sees_the_gradient_before_clipping():
    task = make_task()
    network = Network(task.module, task.init_params())
    x, y = task.rows(0)
    seen, stepped = [], []

    def scale():
        seen.append(float(network.gradient.norm()))
        network.gradient.mul_(1000.0)

    train(
        [network],
        lambda batch: cross_entropy(network.module(x[batch]), y[batch]),
        [torch.optim.SGD(network.weights, lr=0.1)],
        epochs=1,
        order=Order(30, 8, torch.Generator().manual_seed(0)),
        clip=0.05,
        before_step=scale,
        after_step=lambda: stepped.append(float(network.gradient.norm())),
    )
    assert min(seen) > 0.05
    assert stepped == pytest.approx([0.05] * 4, rel=1e-3)


# ---- batches
def orders(tail, n=10, batch_size=4, no_single=False, epochs=2):
    order = Order(n, batch_size, torch.Generator().manual_seed(0), tail, no_single)
    return [[batch.tolist() for batch in order.epoch()] for _ in range(epochs)]


@pytest.mark.parametrize(("tail", "sizes"), [("keep", [4, 4, 2]), ("drop", [4, 4]), ("merge", [4, 6])])
def test_the_tail_of_an_epoch(tail, sizes):
    first, second = orders(tail)
    for epoch in (first, second):
        rows = [i for batch in epoch for i in batch]
        assert [len(b) for b in epoch] == sizes
        assert len(set(rows)) == len(rows) == sum(sizes)
    assert first != second  # shuffled anew


@pytest.mark.parametrize("tail", ["keep", "drop", "merge"])
def test_full_batches_have_no_tail(tail):
    assert [len(b) for b in orders(tail, n=12)[0]] == [4, 4, 4]
    assert [len(b) for b in orders(tail, n=3)[0]] == [3]  # the only batch is never dropped
    assert orders(tail, n=0)[0] == []


@pytest.mark.parametrize(("tail", "sizes"), [("keep", [4, 4]), ("drop", [4, 4]), ("merge", [4, 5])])
def test_a_single_sample_is_left_out_for_batch_norm(tail, sizes):
    assert [len(b) for b in orders(tail, n=9, no_single=True)[0]] == sizes
    assert orders(tail, n=1, no_single=True)[0] == []
    assert [len(b) for b in orders(tail, n=1)[0]] == [1]


def flat_batch_norm(shape, classes):
    """BatchNorm that raises when it meets a batch of one sample in training."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 4), nn.BatchNorm1d(4), nn.Linear(4, classes))


@pytest.mark.parametrize(("tail", "steps"), [("keep", 3), ("merge", 3), ("drop", 3)])
def test_a_tail_of_one_never_reaches_batch_norm(tail, steps):
    task = make_task(flat_batch_norm, n=25, tail=tail)  # 8 + 8 + 8 + 1
    trained = data_of(task).train(task.init_params(), epochs=2)
    assert trained.steps == 2 * steps
    assert trained.params.ints.tolist() == [2 * steps]


def test_without_batch_norm_a_tail_of_one_is_trained_on():
    task = make_task(n=25)
    assert data_of(task).train(task.init_params(), epochs=2).steps == 2 * 4


def test_a_client_of_one_sample_makes_no_step_with_batch_norm():
    task = make_task(flat_batch_norm, n=1)
    start = task.init_params()
    trained = data_of(task).train(start, epochs=2)
    assert trained.steps == 0
    assert trained.params.equals(start)
    assert math.isnan(trained.loss)


# ---- frozen parts
def three_layers(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, classes))


@pytest.mark.parametrize("frozen", [(1,), (3,), (5,), (1, 5)])
def test_frozen_parameters_do_not_move_even_with_weight_decay(frozen):
    def build(shape, classes):
        module = three_layers(shape, classes)
        for index in frozen:
            module[index].requires_grad_(False)
        return module

    task = make_task(build, weight_decay=0.1, momentum=0.9, clip=0.3)
    start = task.init_params()
    trained = data_of(task).train(start, epochs=2, proximal=0.1).params
    before = dict(start.named())
    for name, view in trained.named():
        moved = not torch.equal(view, before[name])
        assert moved == (int(name[0]) not in frozen), name


@pytest.mark.parametrize("frozen", [(), (3,)])
def test_a_partly_frozen_module_trains_as_in_a_bare_loop(frozen):
    def build(shape, classes):
        module = three_layers(shape, classes)
        for index in frozen:
            module[index].requires_grad_(False)
        return module

    task = make_task(build, weight_decay=0.1, momentum=0.9, clip=0.2)
    start = task.init_params()
    module = ordinary(build, start)
    bare_loop(module, task, epochs=2, before_step=lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.2))
    assert_close(data_of(task).train(start, epochs=2).params, module)


# ---- stop and go on
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("local", [{"momentum": 0.9, "weight_decay": 0.01}, {"optimizer": "adam", "lr": 0.01}])
@pytest.mark.parametrize("preset", ["plain", "proximal", "drift"])
def test_two_and_three_epochs_are_five_epochs_bit_for_bit(model, local, preset):
    task = make_task(MODELS[model], **local)
    start = task.init_params()
    options = {
        "plain": {},
        "proximal": {"proximal": 0.5},
        "drift": {"drift": start.trainable.scale(0.1)},
    }[preset]
    at_once = data_of(task).train(start, epochs=5, **options)
    data = data_of(task)
    half = data.train(start, epochs=2, **options)
    halfway = bits(half.params)
    task.evaluate(start)  # binds the module to other blocks in between
    resumed = data.train(start, epochs=5, resume_from=half, **options)
    assert bits(resumed.params) == bits(at_once.params) != halfway
    assert resumed.steps == at_once.steps == 5 * 4
    assert resumed.loss == at_once.loss
    assert resumed.progress.losses == at_once.progress.losses
    assert resumed.progress.first_epoch_squares == at_once.progress.first_epoch_squares


def test_resuming_a_finished_training_changes_nothing():
    task = make_task(momentum=0.9)
    data = data_of(task)
    done = data.train(task.init_params(), epochs=2)
    kept = bits(done.params)
    assert bits(data.train(task.init_params(), epochs=2, resume_from=done).params) == kept


def test_first_epoch_squares_are_those_of_the_first_epoch():
    task = make_task(batch_size=100, lr=0.5)  # one batch an epoch
    data = data_of(task)
    one = data.train(task.init_params(), epochs=1)
    assert one.progress.first_epoch_squares == pytest.approx(30 * one.loss**2, rel=1e-5)
    more = data_of(task).train(task.init_params(), epochs=3)
    assert more.progress.first_epoch_squares == one.progress.first_epoch_squares


# ---- proximal
@pytest.mark.parametrize("model", MODELS)
def test_the_proximal_term_is_that_of_autograd(model):
    """Loss CE + (mu/2) sum over parameters (y - x)^2, differentiated by torch; buffers are not part of it."""
    mu = 0.7
    task = make_task(MODELS[model], momentum=0.5, weight_decay=0.01)
    start = task.init_params()
    module = ordinary(MODELS[model], start)
    anchor = [p.detach().clone() for p in module.parameters()]

    def add_proximal(module):
        loss = mu / 2 * sum((p - a).square().sum() for p, a in zip(module.parameters(), anchor, strict=True))
        loss.backward()  # adds to the gradients

    bare_loop(module, task, epochs=3, before_step=add_proximal)
    trained = data_of(task).train(start, epochs=3, proximal=mu).params
    assert_close(trained, module)
    plain = data_of(task).train(start, epochs=3).params
    assert (trained - start).trainable.norm() < (plain - start).trainable.norm() - 1e-2


def test_the_proximal_gradient_is_mu_times_the_distance():
    """The second of two full-batch steps, by hand: y2 = y1 - eta (g(y1) + mu (y1 - x))."""
    mu, eta = 2.0, 0.1
    task = make_task(batch_size=100, lr=eta)
    start = task.init_params()
    y1 = data_of(task).train(start, epochs=1, proximal=mu).params
    assert y1.equals(data_of(task).train(start, epochs=1).params)  # the first step starts at the anchor
    y2 = data_of(task).train(start, epochs=2, proximal=mu).params
    free = data_of(task).train(start, epochs=2).params
    torch.testing.assert_close((free - y2).floats, eta * mu * (y1 - start).floats, rtol=0, atol=1e-6)


def test_a_proximal_weight_of_zero_is_plain_training():
    task = make_task(momentum=0.9)
    start = task.init_params()
    assert bits(data_of(task).train(start, proximal=0.0).params) == bits(data_of(task).train(start).params)


# ---- drift
def test_the_drift_is_applied_after_every_step_outside_the_momentum():
    task = make_task(momentum=0.9, weight_decay=0.01)
    start = task.init_params()
    drift = Params(start.trainable.layout, torch.linspace(-1, 1, start.layout.num_params))
    slots = {s.name: drift.floats[s.offset : s.offset + s.numel].view(s.shape) for s in start.layout.params}
    module = ordinary(MODELS["mlp"], start)

    def correct(module):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter -= task.local.lr * slots[name]

    bare_loop(module, task, epochs=2, after_step=correct)
    trained = data_of(task).train(start, epochs=2, drift=drift).params
    assert_close(trained, module)

    inside = ordinary(MODELS["mlp"], start)

    def add_to_gradient(module):
        for name, parameter in module.named_parameters():
            parameter.grad += slots[name]

    bare_loop(inside, task, epochs=2, before_step=add_to_gradient)
    assert (Params.of(inside) - trained).norm() > 0.1


def test_the_drift_is_not_clipped_and_leaves_buffers_alone():
    task = make_task(MODELS["cnn_bn"], batch_size=100, clip=1e-6, lr=1.0)
    start = task.init_params()
    drift = Params(start.trainable.layout, torch.ones(start.layout.num_params))
    plain, drifted = (data_of(task).train(start, epochs=1, drift=d).params for d in (None, drift))
    torch.testing.assert_close((plain - drifted).trainable.floats, torch.ones(start.layout.num_params))
    assert torch.equal(plain.floats[start.layout.num_params :], drifted.floats[start.layout.num_params :])


# ---- networks
def test_a_network_trains_whole_as_one_leaf():
    module = three_layers((1, 4, 4), CLASSES)
    network = Network(module, Params.of(module))
    assert [w.numel() for w in network.weights] == [Layout.of(module).num_params]
    module[3].requires_grad_(False)
    network = Network(module, Params.of(module))
    assert [w.numel() for w in network.weights] == [16 * 5 + 5, 5 * CLASSES + CLASSES]


def test_after_training_the_module_holds_no_gradients():
    task = make_task()
    data_of(task).train(task.init_params())
    assert all(p.grad is None for p in task.module.parameters())


def test_two_networks_with_one_joint_loss():
    """Each network is stepped by an optimizer of its own on the gradient of the common loss."""
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    modules = [nn.Linear(3, 2), nn.Linear(2, 1)]
    copies = [nn.Linear(3, 2), nn.Linear(2, 1)]
    for copied, module in zip(copies, modules, strict=True):
        copied.load_state_dict(module.state_dict())
    networks = [Network(m, Params.of(m)) for m in modules]
    optimizers = [torch.optim.SGD(n.weights, lr=lr) for n, lr in zip(networks, (0.1, 0.01), strict=True)]

    def joint(batch):
        return networks[1].module(networks[0].module(x[batch])).square().mean()

    progress = train(networks, joint, optimizers, epochs=2, order=Order(12, 5, torch.Generator().manual_seed(2)))
    rng = torch.Generator().manual_seed(2)
    for _ in range(2):
        for batch in torch.randperm(12, generator=rng).split(5):
            copies[1](copies[0](x[batch])).square().mean().backward()
            with torch.no_grad():
                for module, lr in zip(copies, (0.1, 0.01), strict=True):
                    for p in module.parameters():
                        p -= lr * p.grad
                        p.grad = None
    assert progress.steps == 6
    for network, copied in zip(networks, copies, strict=True):
        assert_close(network.params, copied)
