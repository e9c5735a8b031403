"""Local training, compared with a bare torch loop on an ordinary copy of the module."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fldist.data.augment import Augment
from fldist.data.client_data import ClientData
from fldist.data.datasets import Dataset
from fldist.data.partition import Iid
from fldist.data.prepare import Preparation
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


def make_task(build=None, n=30, preparation=None, **local):
    """One client with n random images of 1 x 4 x 4."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 4, 4, generator=rng)
    y = torch.randint(CLASSES, (n,), generator=rng)
    return Task(
        dataset=Dataset(x.numpy(), y.numpy(), x[:5].numpy(), y[:5].numpy(), CLASSES),
        partition=Iid(),
        num_clients=1,
        build=build or Mlp((6,)).build,
        local=LocalTraining(**{"batch_size": 8, "lr": 0.1, **local}),
        seed=SEED,
        partition_seed=0,
        preparation=preparation,
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


def half_mask(params):
    """Keeps every other parameter."""
    return torch.arange(params.layout.num_params) % 2 == 0


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
    network = Network(task.architecture().template, task.init_params())
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
@pytest.mark.parametrize("preset", ["plain", "proximal", "drift", "mask", "frozen"])
def test_two_and_three_epochs_are_five_epochs_bit_for_bit(model, local, preset):
    task = make_task(MODELS[model], **local)
    start = task.init_params()
    options = {
        "plain": {},
        "proximal": {"proximal": 0.5},
        "drift": {"drift": start.trainable.scale(0.1)},
        "mask": {"mask": half_mask(start)},
        "frozen": {"frozen": [next(iter(start.named()))[0]]},
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
    assert resumed.lr == at_once.lr


def test_augmentation_goes_on_where_it_stopped():
    task = make_task(preparation=Preparation(augment=Augment(flip=0.5, crop=1)), momentum=0.9)
    start = task.init_params()
    at_once = data_of(task).train(start, epochs=4)
    data = data_of(task)
    resumed = data.train(start, epochs=4, resume_from=data.train(start, epochs=1))
    assert bits(resumed.params) == bits(at_once.params)
    assert bits(at_once.params) != bits(data_of(make_task(momentum=0.9)).train(start, epochs=4).params)


def test_resuming_a_finished_training_changes_nothing():
    task = make_task(momentum=0.9)
    data = data_of(task)
    done = data.train(task.init_params(), epochs=2)
    kept = bits(done.params)
    assert bits(data.train(task.init_params(), epochs=2, resume_from=done).params) == kept


def test_squares_are_those_of_every_sample_before_its_step_in_the_first_epoch():
    """Sum over the samples of their squared cross-entropy, whatever loss is trained, only where reports are wanted."""
    task = make_task(batch_size=8, lr=0.5)
    start = task.init_params()
    module = ordinary(Mlp((6,)).build, start)
    x, y = task.rows(0)
    order = Streams(SEED, 1, 0).generator("order")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    expected = 0.0
    for batch in torch.randperm(30, generator=order).split(8):
        losses = cross_entropy(module(x[batch]), y[batch], reduction="none")
        expected += float((losses.detach().double() ** 2).sum())
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    wanted = ClientData(task, 0, Streams(SEED, 1, 0), reports="first")
    trained = wanted.train(start, epochs=2)
    assert trained.squares == pytest.approx(expected, rel=1e-5)
    assert wanted.trained is trained
    assert bits(trained.params) == bits(data_of(task).train(start, epochs=2).params)
    assert data_of(task).train(start, epochs=2).squares == 0.0

    def own(module, batch):
        return 2.0 * cross_entropy(module(batch.x), batch.y)

    halved = make_task(batch_size=8, lr=0.25)
    other = ClientData(halved, 0, Streams(SEED, 1, 0), reports="first").train(start, epochs=1, loss=own)
    assert other.squares == pytest.approx(expected, rel=1e-5)


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
    with task.architecture().module() as module:
        assert all(p.grad is None for p in module.parameters())


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


# ---- mask
@pytest.mark.parametrize("local", [{}, {"momentum": 0.9, "weight_decay": 0.05}, {"optimizer": "adam"}])
def test_a_mask_closes_gradients_and_parameters(local):
    """theta (*) M, then grad <- grad (*) M before the step and theta <- theta (*) M after it."""
    task = make_task(**local)
    start, keep = task.init_params(), half_mask(task.init_params())
    trained = data_of(task).train(start, epochs=3, mask=keep)
    masked = start.clone()
    masked.floats.mul_(keep)
    module = ordinary(Mlp((6,)).build, masked)
    pieces = keep.split([p.numel() for p in module.parameters()])

    def close(gradients):
        def at(module):
            for p, piece in zip(module.parameters(), pieces, strict=True):
                target = p.grad if gradients else p.data
                target.mul_(piece.view(p.shape))

        return at

    settings = task.local
    adam = torch.optim.Adam(module.parameters(), lr=settings.lr) if settings.optimizer == "adam" else None
    bare_loop(module, task, 3, before_step=close(True), after_step=close(False), optimizer=adam)
    assert_close(trained.params, module)
    assert not trained.params.trainable.floats[~keep].any()
    assert trained.params.trainable.floats[keep].all()
    assert start.floats[~keep].any(), "the start is not changed"


def test_a_mask_counts_in_the_clipping_norm_only_where_it_is_open():
    task = make_task(clip=0.01, batch_size=100)
    start = task.init_params()
    closed = torch.ones(start.layout.num_params)
    closed[: start.layout.num_params // 2] = 0
    trained = data_of(task).train(start, epochs=1, mask=closed)
    begun = start.floats * closed
    assert float((trained.params.floats - begun).norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_mask_of_ones_is_plain_training_and_a_wrong_one_is_refused():
    task = make_task(momentum=0.9)
    start = task.init_params()
    plain = data_of(task).train(start, epochs=2)
    open_everywhere = data_of(task).train(start, epochs=2, mask=torch.ones(start.layout.num_params))
    assert bits(plain.params) == bits(open_everywhere.params)
    with pytest.raises(ValueError, match=r"mask: shape \(3,\), not \["):
        data_of(task).train(start, mask=torch.ones(3))


# ---- frozen part
def test_a_frozen_part_stays_and_the_rest_trains_as_in_torch():
    task = make_task(momentum=0.9, weight_decay=0.05)
    start = task.init_params()
    first = next(iter(start.named()))[0].rpartition(".")[0]
    trained = data_of(task).train(start, epochs=3, frozen=[first])
    module = ordinary(Mlp((6,)).build, start)
    module.get_submodule(first).requires_grad_(False)
    optimizer = torch.optim.SGD(
        [p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.05
    )
    bare_loop(module, task, 3, optimizer=optimizer)
    assert_close(trained.params, module)
    after = dict(trained.params.named())
    for name, before in start.named():
        assert torch.equal(before, after[name]) == name.startswith(f"{first}.")
    with task.architecture().module() as module:
        assert all(p.requires_grad for p in module.parameters()), "thawed again"


def test_drift_moves_no_frozen_parameter():
    task = make_task()
    start = task.init_params()
    first = next(iter(start.named()))[0]
    drift = start.trainable.scale(0.0)
    drift.floats.fill_(1.0)
    trained = data_of(task).train(start, epochs=1, frozen=[first], drift=drift)
    assert torch.equal(dict(trained.params.named())[first], dict(start.named())[first])


def test_frozen_batch_norm_keeps_its_statistics_and_the_others_do_not():
    task = make_task(CnnBn((4, 5)).build)
    start = task.init_params()
    names = [n for n, _ in start.named() if n.endswith("running_mean")]
    frozen = names[0].rpartition(".")[0]
    trained = dict(data_of(task).train(start, frozen=[frozen]).params.named())
    before = dict(start.named())
    assert [torch.equal(before[n], trained[n]) for n in names] == [True, False]
    plain = dict(data_of(task).train(start).params.named())
    assert not any(torch.equal(before[n], plain[n]) for n in names), "the next training is not frozen"


def test_an_unknown_frozen_name_is_refused_with_the_known_ones():
    task = make_task()
    first = next(iter(task.init_params().named()))[0]
    with pytest.raises(ValueError, match=r"frozen: the model has no parameter 'head'; it has .*weight"):
        data_of(task).train(task.init_params(), frozen=[first, "head"])
    plain = data_of(make_task()).train(task.init_params())
    assert bits(data_of(task).train(task.init_params()).params) == bits(plain.params), "nothing stays frozen"


def test_batch_norm_may_keep_its_running_statistics_while_its_weights_train():
    task = make_task(CnnBn((4, 5)).build)
    start = task.init_params()
    trained = data_of(task).train(start, epochs=2, batch_norm="running")
    module = ordinary(CnnBn((4, 5)).build, start)
    module.eval()
    module.train = lambda mode=True: module  # stays in eval mode
    bare_loop(module, task, 2)
    assert_close(trained.params, module)
    after = dict(trained.params.named())
    for name, before in start.named():
        assert torch.equal(before, after[name]) == ("running" in name or "num_batches" in name), name


def test_batch_norm_without_weights_inside_a_frozen_part_keeps_its_statistics():
    def build(shape, classes):
        part = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False))
        return nn.Sequential(part, nn.Flatten(), nn.Linear(8, classes))

    task = make_task(build)
    trained = dict(data_of(task).train(task.init_params(), frozen=["0"]).params.named())
    assert not trained["0.1.running_mean"].any()
    assert dict(data_of(task).train(task.init_params()).params.named())["0.1.running_mean"].any()


def test_scoring_in_the_midst_of_a_training_changes_nothing():
    task = make_task(CnnBn((4, 5)).build, momentum=0.9)
    start = task.init_params()
    data = data_of(task)

    def own(module, batch):
        task.evaluate(start)
        data.evaluate(start, "train")
        data_of(task).train(start)
        return cross_entropy(module(batch.x), batch.y)

    assert bits(data.train(start, loss=own).params) == bits(data_of(task).train(start).params)


def test_two_networks_of_one_architecture_are_two():
    task = make_task()
    start = task.init_params()
    with task.network(start) as one, task.network(start.scale(2.0)) as other:
        assert one.module is not other.module
        assert torch.equal(other.params.floats, 2.0 * one.params.floats)
        out = one.module(task.rows(0)[0])
    assert torch.equal(out, task.frozen_copy(start)(task.rows(0)[0]))


def test_batches_of_one_are_refused_where_batch_norm_would_see_them():
    with pytest.raises(ValueError, match=r"local\.batch_size: BatchNorm cannot train on batches of 1"):
        make_task(CnnBn((4, 5)).build, batch_size=1)
    make_task(batch_size=1)
    noted = make_task(CnnBn((4, 5)).build, n=1).notes
    assert any("clients with one sample" in note and note.endswith(": 0") for note in noted)
    loader = data_of(make_task(CnnBn((4, 5)).build)).second_loader(5, 2)
    assert [len(next(loader)) for _ in range(4)] == [2, 2, 2, 2]


def test_the_loss_of_the_last_batch_is_kept():
    task = make_task()
    losses = []

    def own(module, batch):
        losses.append(cross_entropy(module(batch.x), batch.y))
        return losses[-1]

    trained = data_of(task).train(task.init_params(), epochs=2, loss=own)
    assert trained.progress.last_loss == float(losses[-1].detach())


# ---- order and schedule
def test_fixed_order_takes_the_batches_as_the_data_lie():
    task = make_task(order="fixed", batch_size=7, tail="drop")
    seen = []

    def own(module, batch):
        seen.append(batch.rows.tolist())
        assert torch.equal(batch.x, task.rows(0)[0][batch.rows])
        assert torch.equal(batch.y, task.rows(0)[1][batch.rows])
        return cross_entropy(module(batch.x), batch.y)

    data_of(task).train(task.init_params(), epochs=2, loss=own)
    assert seen == [list(range(at, at + 7)) for at in (0, 7, 14, 21)] * 2


def test_an_own_loss_that_is_cross_entropy_is_plain_training_bit_for_bit():
    task = make_task(momentum=0.9)
    start = task.init_params()

    def own(module, batch):
        return cross_entropy(module(batch.x), batch.y)

    assert bits(data_of(task).train(start, loss=own).params) == bits(data_of(task).train(start).params)


def test_the_learning_rate_follows_rounds_and_epochs():
    local = LocalTraining(lr=0.2, epochs=4, schedule="cosine", lr_decay=0.5, lr_decay_every=2)
    assert [local.lr_at(1, e, 4) for e in range(4)] == pytest.approx(
        [0.2, 0.1 * (1 + math.sqrt(0.5)), 0.1, 0.1 * (1 - math.sqrt(0.5))]
    )
    assert [LocalTraining(lr=0.2, lr_decay=0.5, lr_decay_every=2).lr_at(r, 3, 4) for r in (1, 2, 3, 4, 5)] == [
        0.2, 0.2, 0.1, 0.1, 0.05,
    ]  # fmt: skip
    assert local.lr_at(1, 1, 2) == local.lr_at(1, 1, 4), "a training that stops early keeps to the whole's schedule"


def test_a_schedule_steps_as_torch_does_and_reports_the_mean_rate():
    task = make_task(schedule="cosine", epochs=4, momentum=0.9)
    start = task.init_params()
    module = ordinary(Mlp((6,)).build, start)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    x, y = task.rows(0)
    order = Streams(SEED, 1, 0).generator("order")
    rates = []
    for _ in range(4):
        for batch in torch.randperm(30, generator=order).split(8):
            optimizer.zero_grad()
            cross_entropy(module(x[batch]), y[batch]).backward()
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    trained = data_of(task).train(start)
    assert_close(trained.params, module)
    assert trained.lr == pytest.approx(sum(rates) / len(rates))
    halfway = data_of(task)
    half = halfway.train(start, epochs=2)
    assert bits(halfway.train(start, resume_from=half).params) == bits(data_of(task).train(start).params)


# ---- second loader, clipping of several networks
def test_a_second_loader_runs_on_over_epochs_and_shuffles_at_each_pass():
    task = make_task()
    loader = data_of(task).second_loader(5, 2)
    passes = [[next(loader).tolist() for _ in range(3)] for _ in range(4)]
    for one in passes:
        assert [len(b) for b in one] == [2, 2, 1]
        assert sorted(i for b in one for i in b) == list(range(5))
    assert len({str(one) for one in passes}) > 1
    again = data_of(task).second_loader(5, 2)
    assert [next(again).tolist() for _ in range(12)] == [b for one in passes for b in one]
    with pytest.raises(ValueError, match="0 samples has no batch"):
        next(data_of(task).second_loader(0, 2))


def test_networks_are_clipped_together_or_each_by_its_own_norm():
    def grown(clip):
        modules = [nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)]
        for m in modules:
            nn.init.ones_(m.weight)
        networks = [Network(m, Params.of(m)) for m in modules]
        optimizers = [torch.optim.SGD(n.weights, lr=1.0) for n in networks]

        def loss(batch):
            return 3.0 * networks[0].module.weight.sum() + 40.0 * networks[1].module.weight.sum()

        train(networks, loss, optimizers, epochs=1, order=Order(1, 1, None), clip=clip)
        return [float((n.params.floats - 1).norm()) for n in networks]

    assert grown(0.0) == pytest.approx([6.0, 80.0])
    assert grown([5.0, 100.0]) == pytest.approx([5.0, 80.0], rel=1e-4)
    together = math.hypot(6.0, 80.0)
    assert grown(10.0) == pytest.approx([6.0 * 10 / together, 80.0 * 10 / together], rel=1e-4)


# ---- a number of steps, another network
def test_steps_go_over_as_many_passes_as_they_take():
    task = make_task()
    start = task.init_params()
    module = ordinary(MODELS["mlp"], start)
    trained = data_of(task).train(start, steps=6)
    x, y = task.rows(0)
    order = Streams(SEED, 1, 0).generator("order")
    batches = [b for _ in range(2) for b in torch.randperm(len(y), generator=order).split(8)][:6]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for rows in batches:
        optimizer.zero_grad()
        cross_entropy(module(x[rows]), y[rows]).backward()
        optimizer.step()
    assert_close(trained.params, module)
    assert (trained.steps, trained.progress.epochs, trained.progress.samples) == (6, 1, 8 + 8 + 8 + 6 + 8 + 8)
    assert data_of(task).train(start, epochs=3).progress.samples == 90
    assert data_of(task).train(start, steps=2, epochs=3).steps == 6


def test_steps_that_make_one_pass_are_an_epoch_bit_for_bit():
    task = make_task(momentum=0.9)
    start = task.init_params()
    assert bits(data_of(task).train(start, steps=4).params) == bits(data_of(task).train(start, epochs=1).params)


def test_without_a_batch_there_is_no_step():
    task = make_task(MODELS["cnn_bn"], n=1)
    trained = data_of(task).train(task.init_params(), steps=5)
    assert (trained.steps, trained.progress.samples) == (0, 0)


def test_a_hook_sees_the_gradient_before_it_is_masked_and_clipped():
    task = make_task()
    start, keep = task.init_params(), half_mask(task.init_params())
    start.trainable.floats.mul_(keep)
    seen = []
    data_of(task).train(start, steps=1, mask=keep, clip=1e-3, before_step=lambda g: seen.append(g.clone()))
    module = ordinary(MODELS["mlp"], start)
    rows = torch.randperm(30, generator=Streams(SEED, 1, 0).generator("order"))[:8]
    x, y = task.rows(0)
    cross_entropy(module(x[rows]), y[rows]).backward()
    gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
    torch.testing.assert_close(seen[0], gradient, rtol=0, atol=1e-6)
    assert seen[0][~keep].abs().max() > 1e-3


def test_a_network_of_another_architecture_is_trained_and_scored():
    task, other = make_task(), make_task(Mlp((3,)).build)
    smaller = other.architecture()
    trained = data_of(task).train(smaller.initial, epochs=2, architecture=smaller)
    assert bits(trained.params) == bits(data_of(other).train(smaller.initial, epochs=2).params)
    assert trained.architecture is smaller
    assert data_of(task).train(task.init_params(), epochs=1).architecture is None
    scores = data_of(task).evaluate(trained.params, "train", smaller)
    assert scores == data_of(other).evaluate(trained.params, "train")


def test_networks_beside_are_trained_by_the_same_loss_and_clipped_apart():
    task = make_task(epochs=2, clip=0.05)
    start = task.init_params()
    target = torch.ones(2)

    def joint(module, beside, batch):
        logits = module(batch.x)
        return cross_entropy(logits, batch.y) + 3 * (beside(logits) - target).square().mean()

    module, other = ordinary(Mlp((6,)).build, start), nn.Linear(CLASSES, 2)
    torch.manual_seed(0)
    again = nn.Linear(CLASSES, 2)
    network = Network(again, Params.of(again))
    other.load_state_dict({name: view.clone() for name, view in network.params.named()})
    got = data_of(task).train(start, loss=lambda m, batch: joint(m, again, batch), beside=[network])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, other)]
    x, y = task.rows(0)
    order = Streams(SEED, 1, 0).generator("order")
    clipped = 0
    for _ in range(2):
        for rows in torch.randperm(len(y), generator=order).split(8):
            for optimizer in optimizers:
                optimizer.zero_grad()
            logits = module(x[rows])
            (cross_entropy(logits, y[rows]) + 3 * (other(logits) - target).square().mean()).backward()
            clipped += sum(float(nn.utils.clip_grad_norm_(m.parameters(), 0.05)) > 0.05 for m in (module, other))
            for optimizer in optimizers:
                optimizer.step()
    assert clipped == 16  # both networks, at all 8 steps
    for (name, view), tensor in zip(got.params.named(), module.state_dict().values(), strict=True):
        torch.testing.assert_close(view, tensor, msg=name)
    for (name, view), tensor in zip(network.params.named(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(view, tensor, msg=name)


def test_a_readout_is_what_is_scored():
    class Turned(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return -self.module(x)

    task = make_task()
    data = data_of(task)
    model = task.init_params()
    with task.architecture(0).module() as module:
        task.full(model, 0).bind(module)
        want = float((module(data.x).argmin(dim=1) == data.y).double().mean())
    assert data.evaluate(model, "train", readout=Turned).accuracy == want
    assert data.evaluate(model, "train").accuracy != want
