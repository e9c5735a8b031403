"""The generator of sets of clients: its records by hand, its networks against torch's own modules, and its laws."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize

from fldist.generative import published, search
from fldist.generative.networks import (
    Generator,
    Losses,
    adam,
    fit,
    hamming,
    joint_loss,
    load_state,
    net_state,
    pairwise_accuracy,
)
from fldist.generative.records import Records, augment, decoder_inputs, labels, members, padded
from fldist.generative.search import ascend, decode_beam, decode_greedy, decode_official, gradient
from fldist.seeding import generator

N = 6
ROWS = torch.tensor([[0, 2, 5, 6, 6], [3, 1, 6, 6, 6], [5, 4, 3, 2, 1], [6, 6, 6, 6, 6], [1, 0, 4, 5, 6]])
"""Rows of five tokens of six clients; the third has no end token, the fourth is the empty set."""
LABELS = torch.tensor([0.0, 0.3, 1.0, 0.8, 0.55], dtype=torch.float64)

each_mask = pytest.mark.parametrize("mask", [True, False])
each_target = pytest.mark.parametrize("target", ["logit", "sigmoid"])


def rng(key: int = 0) -> torch.Generator:
    return generator(1, "test-generative", key)


def made(
    n: int = N, hidden: int = 5, mask: bool = True, key: int = 0, dtype: torch.dtype = torch.float64, layers: int = 2
) -> Generator:
    net = Generator(n, hidden, 20, layers, mask, rng=rng(key)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)  # so that the outputs of different inputs differ clearly
    return net


def embedded(net: Generator, rows: Tensor = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        h, m = net.encode(rows)
        return h, m, net.pool(h, m)


def plain(net: Generator, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, m, z and the logits by torch's own modules and, for the decoder, in one pass of torch's LSTM."""
    h, _ = net.encoder.lstm(net.encoder.embedding(rows))
    h = normalize(h, dim=2)
    before = torch.cat([torch.zeros(len(rows), 1), (rows == net.num_clients).double()[:, :-1]], dim=1).cumsum(1)
    m = before == 0 if net.mask else torch.ones_like(rows, dtype=torch.bool)
    z = normalize((h * m[:, :, None]).sum(1) / m.sum(1)[:, None], dim=1)
    o, _ = net.decoder.lstm(net.decoder.embedding(decoder_inputs(rows, net.num_clients)), (z[None], z[None]))
    scores = (net.decoder.query(o) @ h.transpose(1, 2)).masked_fill(~m[:, None], -math.inf)
    joined = net.decoder.combine(torch.cat([scores.softmax(2) @ h, o], dim=2)).tanh()
    return h, m, z, net.decoder.output(joined)


def plain_loss(net: Generator, rows: Tensor, y: Tensor, trade_off: float) -> Losses[Tensor]:
    _, m, z, logits = plain(net, rows)
    score = mse_loss(net.evaluator(z)[:, 0].sigmoid(), y)
    sequence = cross_entropy(logits[m], rows[m])
    return Losses(trade_off * score + (1 - trade_off) * sequence, score, sequence)


def gradients(net: Generator, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True))


def differ(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))


# ---- records
def test_a_record_is_its_set_in_any_order_and_keeps_the_place_where_it_was_found() -> None:
    records = Records()
    for ids, score in [((4, 1), 1.0), ((0, 2), 3.0), ((1, 4), 2.0)]:
        records.add(ids, score)
    assert records.items() == [((1, 4), 2.0), ((0, 2), 3.0)]
    assert len(records) == 2
    assert (4, 1) in records
    assert (1,) not in records


def test_the_first_score_can_be_kept() -> None:
    records = Records("first")
    records.add((1, 4), 1.0)
    records.add((4, 1), 2.0)
    assert records.items() == [((1, 4), 1.0)]


def test_of_equally_good_records_the_first_found_is_the_best_and_there_are_no_more_than_there_are() -> None:
    records = Records()
    for ids, score in [((0,), 1.0), ((1,), 2.0), ((2,), 2.0), ((3,), 0.5)]:
        records.add(ids, score)
    assert records.best(3) == [(1,), (2,), (0,)]
    assert records.best(9) == [(1,), (2,), (0,), (3,)]
    assert records.best(0) == []
    assert Records().best(3) == []


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_no_record(score: float) -> None:
    with pytest.raises(ValueError, match=r"score: .* is not finite"):
        Records().add((1,), score)


def test_labels_go_from_the_least_score_to_the_greatest_and_equal_scores_are_one_half() -> None:
    assert labels(torch.tensor([3.0, -1.0, 1.0])).tolist() == [1.0, 0.0, 0.5]
    assert labels(torch.tensor([7.0, 7.0])).tolist() == [0.5, 0.5]
    assert labels(torch.tensor([7.0])).tolist() == [0.5]
    assert labels(torch.tensor([])).tolist() == []


def test_rows_are_the_ascending_set_and_its_permutations_filled_up() -> None:
    rows = augment([(5, 0, 2), (3,)], 4, 4, N, rng()).view(2, 5, 4).tolist()
    assert rows[0][0] == [0, 2, 5, N]
    assert all(sorted(row[:3]) == [0, 2, 5] and row[3] == N for row in rows[0])
    assert rows[1] == [[3, N, N, N]] * 5
    assert all(members(row, N) == (0, 2, 5) for row in rows[0])


def test_all_permutations_are_equally_frequent_and_independent_between_sets() -> None:
    rows = augment([(0, 1, 2), (0, 1, 2)], 6000, 3, N, rng()).view(2, 6001, 3)[:, 1:]
    first, second = ([tuple(row) for row in its] for its in rows.tolist())
    for its in (first, second):
        assert sorted(set(its)) == list(itertools.permutations(range(3)))
        assert all(abs(its.count(order) - 1000) < 130 for order in set(its))  # 4.5 standard deviations
    assert abs(sum(a == b for a, b in zip(first, second, strict=True)) - 1000) < 130


def test_a_set_as_long_as_the_row_has_no_end_token_and_a_longer_one_is_refused() -> None:
    assert augment([(2, 1)], 0, 2, N, rng()).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="length: 2 tokens cannot hold a set of 3 clients; use at least 3"):
        augment([(1,), (0, 1, 2)], 1, 2, N, rng())
    assert augment([], 3, 2, N, rng()).shape == (0, 2)


def test_the_decoder_starts_with_the_start_token() -> None:
    assert decoder_inputs(torch.tensor([[4, 2, N], [1, N, N]]), N).tolist() == [[N, 4, 2], [N, 1, N]]


@pytest.mark.parametrize(
    ("row", "ids"), [([5, 0, N, 3], (0, 5)), ([N, 1], ()), ([3, 1, 3], (1, 3)), (torch.tensor([2, N]), (2,))]
)
def test_members_are_the_ids_before_the_first_end_token(row: list[int] | Tensor, ids: tuple[int, ...]) -> None:
    assert members(row, N) == ids


# ---- networks
def test_all_parameters_are_drawn_as_torch_draws_them_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    used = rng()
    net = Generator(N, 5, 7, 2, rng=used)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(rng().get_state())
        theirs: list[nn.Module] = [nn.Embedding(N + 1, 5), nn.LSTM(5, 5)]
        theirs += [nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 1)]
        theirs += [nn.Embedding(N + 1, 5), nn.LSTM(5, 5), nn.Linear(5, 5, bias=False)]
        theirs += [nn.Linear(10, 5, bias=False), nn.Linear(5, N + 1)]
        after = torch.get_rng_state()
    expected = [p for module in theirs for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), expected, strict=True))
    assert torch.equal(used.get_state(), after)  # what is drawn next is not drawn twice


def test_the_published_size_has_so_many_parameters() -> None:
    assert sum(p.numel() for p in Generator(100, rng=rng()).parameters()) == 151_742


@each_mask
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_encoding_and_teacher_forcing_in_one_pass_are_those_of_torchs_modules(
    mask: bool, dtype: torch.dtype, close: float
) -> None:
    net = made(mask=mask)
    h, m, z, logits = plain(net, ROWS)
    net = net.to(dtype)
    got_h, got_m = net.encode(ROWS)
    got_z = net.pool(got_h, got_m)
    log_probs = net.log_probs(decoder_inputs(ROWS, N), got_h, got_m, got_z)
    assert torch.equal(got_m, m)
    assert differ([got_h, got_z, log_probs], [h, z, logits.log_softmax(2)]) < close


@each_mask
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_step_by_step_is_the_same_as_in_one_pass(mask: bool, dtype: torch.dtype, close: float) -> None:
    net = made(mask=mask, dtype=dtype)
    h, m, z = embedded(net)
    inputs, state, steps = decoder_inputs(ROWS, N), net.initial_state(z), []
    for t in range(ROWS.shape[1]):
        log_probs, state = net.step(inputs[:, t], state, h, m)
        steps.append(log_probs)
    assert differ([torch.stack(steps, dim=1)], [net.log_probs(inputs, h, m, z)]) < close


@each_mask
@pytest.mark.parametrize("trade_off", [0.8, 0.0, 1.0])
def test_the_joint_loss_and_all_gradients_are_those_of_torchs_modules(mask: bool, trade_off: float) -> None:
    net = made(mask=mask)
    got, expected = joint_loss(net, ROWS, LABELS, trade_off), plain_loss(net, ROWS, LABELS, trade_off)
    assert differ(got, expected) < 1e-12
    assert differ(gradients(net, got.total), gradients(net, expected.total)) < 1e-12


def test_gradients_flow_through_long_sequences_of_more_than_a_megabyte() -> None:
    """Large intermediate results come from memory that is used again."""
    net = made(30, hidden=32, dtype=torch.float64)
    rows = augment([tuple(range(k, k + 9)) for k in range(20)], 9, 12, 30, rng())
    y = torch.rand(len(rows), dtype=torch.float64, generator=rng())
    for _ in range(2):
        got, expected = joint_loss(net, rows, y, 0.5), plain_loss(net, rows, y, 0.5)
        assert differ(gradients(net, got.total), gradients(net, expected.total)) < 1e-11


@each_mask
def test_the_published_form_has_the_same_loss_and_gradients_without_masks(mask: bool) -> None:
    net = made(mask=mask)
    got, expected = joint_loss(net, ROWS, LABELS, 0.8), published.joint_loss(net, ROWS, LABELS, 0.8)
    assert (differ(got, expected) < 1e-12) is not mask
    assert (differ(gradients(net, got.total), gradients(net, expected.total)) < 1e-12) is not mask


def test_each_loss_trains_its_part_and_both_the_encoder() -> None:
    net = made()
    for trade_off, idle in ((1.0, net.decoder), (0.0, net.evaluator)):
        net.zero_grad()
        joint_loss(net, ROWS, LABELS, trade_off).total.backward()
        assert all(p.grad is None or not p.grad.any() for p in idle.parameters())
        assert all(p.grad is not None and p.grad.any() for p in net.encoder.parameters())


def test_without_output_weights_all_tokens_are_equally_likely() -> None:
    net = made()
    nn.init.zeros_(net.decoder.output.weight)
    nn.init.zeros_(net.decoder.output.bias)
    assert abs(joint_loss(net, ROWS, LABELS, 0.5).sequence.item() - math.log(N + 1)) < 1e-12


@each_mask
def test_more_padding_changes_nothing_with_masks_and_something_without(mask: bool) -> None:
    net = made(mask=mask)
    rows = ROWS[[0, 1, 3, 4]]
    longer = torch.cat([rows, torch.full((len(rows), 3), N)], dim=1)

    def results(rows: Tensor) -> list[Tensor]:
        h, m, z = embedded(net, rows)
        return [z, net.value(z), net.log_probs(decoder_inputs(rows, N), h, m, z)[:, : ROWS.shape[1]]]

    for before, after in zip(results(rows), results(longer), strict=True):
        assert (differ([before], [after]) < 1e-12) is mask
    y = LABELS[[0, 1, 3, 4]]
    both = joint_loss(net, rows, y, 0.5), joint_loss(net, longer, y, 0.5)
    assert (differ(*both) < 1e-12) is mask


# ---- fitting
SETS = [(0,), (1, 4), (0, 3, 5), (2, 3), (0, 1, 2, 4), (5,), (3, 4, 5), (1, 2, 3, 5), (0, 5), (2, 4, 5), (1, 3), (4,)]


def fitted(
    net: Generator, optimizer: torch.optim.Optimizer, key: int, epochs: int, online: bool = True, batch: int = 20
) -> Losses[float]:
    y = torch.linspace(0, 1, len(SETS))
    how = {"trade_off": 0.8, "clip": 5.0, "copies": 3, "length": 5, "online": online}
    return fit(net, optimizer, SETS, y, epochs=epochs, batch=batch, rng=rng(key), **how)


def test_a_few_records_are_learned_by_heart() -> None:
    net = Generator(N, 8, rng=rng(3))
    last = fitted(net, adam(net, 0.01), 4, 500, online=False, batch=1024)
    rows = padded(SETS, 5, N)
    _, _, z = embedded(net, rows)
    assert hamming(net, rows) == 0.0
    assert pairwise_accuracy(torch.linspace(0, 1, len(SETS)), net.value(z).detach().sigmoid()) > 0.9
    assert last.total == pytest.approx(0.8 * last.score + 0.2 * last.sequence)
    assert 0 < last.sequence < 0.02


def test_the_losses_are_means_over_the_rows_of_the_last_epoch() -> None:
    net = made()
    rows = augment(SETS, 0, 5, N, rng())
    y = torch.linspace(0, 1, len(SETS))
    still = torch.optim.SGD(net.parameters(), lr=0.0)
    how = {"trade_off": 0.7, "clip": 5.0, "copies": 0, "length": 5, "online": False, "rng": rng()}
    got = fit(net, still, SETS, y, epochs=1, batch=1024, **how)
    assert got == pytest.approx([x.item() for x in joint_loss(net, rows, y, 0.7)])
    in_parts = fit(net, still, SETS, y, epochs=1, batch=7, **how)
    assert in_parts.score == pytest.approx(got.score)


def test_the_gradients_norm_is_bounded() -> None:
    net = made()
    before = [p.detach().clone() for p in net.parameters()]
    y = torch.linspace(0, 1, len(SETS))
    one = torch.optim.SGD(net.parameters(), lr=1.0)
    how = {"trade_off": 0.5, "copies": 0, "length": 5, "online": False, "rng": rng()}
    fit(net, one, SETS, y, epochs=1, batch=1024, clip=1e-3, **how)
    moved = math.sqrt(sum(((p - b) ** 2).sum().item() for p, b in zip(net.parameters(), before, strict=True)))
    assert moved == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("online", [True, False])
def test_rows_are_permuted_anew_in_each_epoch_only_if_asked(online: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[int, ...]]] = []

    def loss(net: Generator, rows: Tensor, y: Tensor, trade_off: float) -> Losses[Tensor]:
        seen.append(sorted(tuple(row) for row in rows.tolist()))
        return joint_loss(net, rows, y, trade_off)

    net = made(dtype=torch.float32)
    how = {"trade_off": 0.8, "clip": 5.0, "copies": 3, "length": 5, "online": online, "loss": loss}
    fit(net, adam(net, 0.01), SETS, torch.linspace(0, 1, 12), epochs=3, batch=1024, rng=rng(), **how)
    assert [len(rows) for rows in seen] == [48] * 3
    assert (seen[0] == seen[1]) is not online
    assert (seen[1] == seen[2]) is not online
    assert all(set(map(tuple, padded(SETS, 5, N).tolist())) <= set(rows) for rows in seen)


def test_nothing_to_learn_from_changes_nothing() -> None:
    net = made()
    before = net_state(net, adam(net, 0.01))
    how = {"epochs": 2, "batch": 8, "trade_off": 0.8, "clip": 5.0, "copies": 3, "length": 5, "online": True}
    assert all(math.isnan(x) for x in fit(net, adam(net, 0.01), [], torch.tensor([]), rng=rng(), **how))
    assert all(torch.equal(p, before[f"net.{name}"]) for name, p in net.named_parameters())


def test_a_fit_that_goes_on_from_a_kept_state_is_the_one_that_never_stopped() -> None:
    net = Generator(N, 8, rng=rng())
    optimizer = adam(net, 0.01)
    fitted(net, optimizer, 1, 3)
    kept = net_state(net, optimizer)
    copies = {key: value.clone() for key, value in kept.items()}
    fitted(net, optimizer, 2, 3)
    assert all(torch.equal(kept[key], copies[key]) for key in kept)  # the state is not the networks' own memory

    other = Generator(N, 8, rng=rng(7))
    others = adam(other, 0.01)
    fitted(other, others, 5, 1)  # whatever it did before
    load_state(other, others, kept)
    fitted(other, others, 2, 3)
    assert all(torch.equal(kept[key], copies[key]) for key in kept)
    ends = net_state(net, optimizer), net_state(other, others)
    assert ends[0].keys() == ends[1].keys()
    assert {key.partition(".")[0] for key in ends[0]} == {"net", "optimizer"}
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_the_state_of_a_new_optimizer_brings_back_a_new_optimizer() -> None:
    net = Generator(N, 8, rng=rng())
    optimizer = adam(net, 0.01)
    new = net_state(net, optimizer)
    fitted(net, optimizer, 1, 2)
    first = net_state(net, optimizer)
    load_state(net, optimizer, new)
    fitted(net, optimizer, 1, 2)
    assert all(torch.equal(first[key], value) for key, value in net_state(net, optimizer).items())


def test_the_global_generators_are_left_alone_and_the_given_one_decides() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    ends = []
    for key in (1, 1, 2):
        net = Generator(N, 8, rng=rng())
        fitted(net, adam(net, 0.01), key, 2)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    found(net)
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("target", "predicted", "accuracy"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], 0.0),
        ([5, 5, 5], [1, 2, 3], 0.0),
        ([5, 5, 5], [3, 2, 1], 1.0),
        ([1, 2, 3], [1, 3, 2], 2 / 3),
        ([1], [2], 1.0),
    ],
)
def test_pairwise_accuracy(target: list[float], predicted: list[float], accuracy: float) -> None:
    got = pairwise_accuracy(torch.tensor(target, dtype=torch.float64), torch.tensor(predicted, dtype=torch.float64))
    assert got == pytest.approx(accuracy)


@each_mask
def test_hamming_counts_the_positions_that_the_free_decoder_gets_wrong(mask: bool) -> None:
    net = made(mask=mask)
    nn.init.zeros_(net.decoder.output.weight)
    net.decoder.output.bias.data.copy_(torch.arange(N + 1.0) == 2)  # 2, 2, 2, ... whatever it is given
    assert hamming(net, torch.tensor([[2, N, N], [0, 2, N], [1, 3, 4]])) == pytest.approx((2 + 2 + 3) / 3)
    net.decoder.output.bias.data.copy_(torch.arange(N + 1.0) == N)
    assert hamming(net, torch.tensor([[2, N, N], [N, N, N]])) == pytest.approx(0.5)


# ---- ascent
@each_mask
@each_target
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_gradient_is_that_of_the_evaluator_and_the_same_at_all_positions(
    mask: bool, target: search.Target, layers: int
) -> None:
    net = made(mask=mask, layers=layers)
    e, m, z = embedded(net)
    g = gradient(net, e, m, target)
    x = e.clone().requires_grad_()
    f = net.value(normalize((x * m[:, :, None]).sum(1), dim=1))
    (expected,) = torch.autograd.grad((f if target == "logit" else f.sigmoid()).sum(), x)
    assert differ([g], [expected]) < 1e-13
    assert all(torch.equal(row[on], row[:1].expand(int(on.sum()), -1)) for row, on in zip(g, m, strict=True))
    assert not g[~m].any()
    assert float((g[:, 0] * z).sum(1).abs().max()) < 1e-14
    assert float(g[:, 0].abs().sum(1).min()) > 0


@each_target
def test_a_step_of_nought_moves_nothing_and_a_small_one_upwards_by_the_gradients_square(target: search.Target) -> None:
    net = made()
    e, m, z = embedded(net)
    still, pooled = ascend(net, e, m, 0.0, target)
    assert differ([still, pooled], [e, z]) < 1e-15

    def value(e: Tensor) -> Tensor:
        f = net.value(net.pool(e, m)).detach()
        return f if target == "logit" else f.sigmoid()

    g = gradient(net, e, m, target)
    small = 1e-6
    rise = (value(e + small * g) - value(e)) / small
    assert torch.allclose(rise, (g**2).sum((1, 2)), rtol=1e-3, atol=1e-8)
    moved, pooled = ascend(net, e, m, 1e-4, target)
    assert bool((value(moved) > value(e)).all())
    assert differ([moved.norm(dim=2), pooled.norm(dim=1)], [torch.ones(5, 5), torch.ones(5)]) < 1e-12


# ---- decoding
EXACT = {"low": 3, "high": 3}


@each_mask
@pytest.mark.parametrize(("low", "high"), [(3, 3), (1, 4), (0, 6), (5, 5), (2, 9)])
@pytest.mark.parametrize("width", [1, 4])
def test_decoded_sets_have_no_repeats_and_sizes_within_the_bounds(mask: bool, low: int, high: int, width: int) -> None:
    net = made(mask=mask)
    tokens, scores = decode_beam(net, *embedded(net), 5, width, low=low, high=high)
    assert tokens.shape == (len(ROWS), width, 5)
    assert bool((scores[:, 1:] <= scores[:, :-1]).all())
    for row in tokens.flatten(0, 1).tolist():
        ids = members(row, N)
        out = row.index(N) if N in row else 5
        assert len(ids) == out  # no repeats
        assert low <= out <= min(high, 5)
        assert row[out:] == [N] * (5 - out)


def test_every_client_can_be_chosen_also_the_last_and_all_at_once() -> None:
    net = made()
    everybody = decode_greedy(net, *embedded(net), N + 1, low=N, high=N)
    assert all(members(row, N) == tuple(range(N)) for row in everybody)
    for client in range(N):
        nn.init.zeros_(net.decoder.output.weight)
        net.decoder.output.bias.data.copy_(torch.arange(N + 1.0) == client)
        assert decode_greedy(net, *embedded(net), 3, low=1, high=1)[:, 0].tolist() == [client] * len(ROWS)


def test_repeats_can_be_allowed() -> None:
    net = made()
    nn.init.zeros_(net.decoder.output.weight)
    net.decoder.output.bias.data.copy_(torch.tensor([0.0, 3.0, 0.0, 0.0, 2.0, 0.0, 1.0]))
    e = embedded(net)
    assert decode_greedy(net, *e, 4, forbid_repeats=False, **EXACT)[0].tolist() == [1, 1, 1, N]
    assert decode_greedy(net, *e, 4, **EXACT)[0, :2].tolist() == [1, 4]
    assert decode_greedy(net, *e, 4, low=0, high=4)[0].tolist() == [1, 4, N, N]


def all_sequences(net: Generator, length: int, low: int, high: int) -> list[dict[tuple[int, ...], float]]:
    """The log-probability of every sequence that may be, for each embedding, step by step through the public step."""
    e, m, z = embedded(net)
    result: list[dict[tuple[int, ...], float]] = []
    for k in range(len(z)):
        ended: dict[tuple[int, ...], float] = {}
        open_ = [((), 0.0, net.initial_state(z[k : k + 1]))]
        for _ in range(length):
            grown = []
            for out, score, state in open_:
                last = torch.tensor([out[-1] if out else N])
                log_probs, after = net.step(last, state, e[k : k + 1], m[k : k + 1])
                allowed = [i for i in range(N) if i not in out] + [N] * (len(out) >= low)
                share = log_probs[0, allowed].log_softmax(0)
                for token, part in zip(allowed, share.tolist(), strict=True):
                    if token == N:
                        ended[out] = score + part
                    elif len(out) + 1 == high:
                        ended[(*out, token)] = score + part
                    else:
                        grown.append(((*out, token), score + part, after))
            open_ = grown
        result.append(ended | {out: score for out, score, _ in open_})
    return result


@pytest.mark.parametrize(("low", "high"), [(0, 2), (1, 2), (2, 2), (1, 1)])
@pytest.mark.parametrize("width", [N + 1, 40])
def test_with_two_tokens_a_wide_beam_search_is_an_exhaustive_one(low: int, high: int, width: int) -> None:
    net = made()
    tokens, scores = decode_beam(net, *embedded(net), 2, width, low=low, high=high)
    for its, values, every in zip(tokens.tolist(), scores.tolist(), all_sequences(net, 2, low, high), strict=True):
        best = sorted(every.items(), key=lambda item: -item[1])[:width]
        assert abs(sum(math.exp(v) for v in every.values()) - 1) < 1e-12
        rows = [tuple(i for i in row if i != N) for row in its]
        assert rows[: len(best)] == [out for out, _ in best]
        assert values[: len(best)] == pytest.approx([v for _, v in best], abs=1e-12)
        assert values[len(best) :] == [-math.inf] * (width - len(best))
        assert rows[len(best) :] == [()] * (width - len(best))


def test_a_beam_that_holds_every_sequence_finds_the_best_of_three_tokens_with_their_states() -> None:
    """Recurrent states go along with their beams."""
    net = made()
    tokens, scores = decode_beam(net, *embedded(net), 4, 200, low=0, high=3)
    for its, values, every in zip(tokens.tolist(), scores.tolist(), all_sequences(net, 4, 0, 3), strict=True):
        best = sorted(every.items(), key=lambda item: -item[1])
        assert len(best) == 157  # 1 + 6 + 6 * 5 + 6 * 5 * 4
        assert [tuple(i for i in row if i != N) for row in its[:157]] == [out for out, _ in best]
        assert values[:157] == pytest.approx([v for _, v in best], abs=1e-12)


@pytest.mark.parametrize(("low", "high"), [(3, 3), (0, 6)])
def test_a_beam_of_one_is_greedy(low: int, high: int) -> None:
    net = made()
    e, m, z = embedded(net)
    greedy = decode_greedy(net, e, m, z, 5, low=low, high=high)
    beam, _ = decode_beam(net, e, m, z, 5, 1, low=low, high=high)
    assert torch.equal(greedy, beam[:, 0])
    for k in range(len(z)):
        out: list[int] = []
        state = net.initial_state(z[k : k + 1])
        while N not in out and len(out) < min(high, 5):
            log_probs, state = net.step(torch.tensor([out[-1] if out else N]), state, e[k : k + 1], m[k : k + 1])
            log_probs[0, out + [N] * (len(out) < low)] = -math.inf
            out.append(int(log_probs.argmax()))
        assert greedy[k].tolist() == (out + [N] * 5)[:5]


@pytest.mark.parametrize(
    ("length", "low", "high"), [(5, 4, 3), (3, 4, 4), (9, 7, 7), (5, -1, 2)], ids=["order", "length", "clients", "sign"]
)
def test_bounds_that_no_sequence_keeps_are_refused(length: int, low: int, high: int) -> None:
    net = made()
    with pytest.raises(ValueError, match=f"low: {low} clients at least and high: {high} at most"):
        decode_greedy(net, *embedded(net), length, low=low, high=high)


def test_the_official_decoding_goes_on_after_the_end_and_repeats_itself() -> None:
    net = made(mask=False, key=2)
    e, m, z = embedded(net)
    sets = decode_official(net, e, m, z, 9)
    for k, ids in enumerate(sets):
        state, last, out = net.initial_state(z[k : k + 1]), torch.tensor([N]), []
        for _ in range(9):
            log_probs, state = net.step(last, state, e[k : k + 1], m[k : k + 1])
            last = log_probs.argmax(1)
            out.append(int(last))
        assert ids == tuple(i for i in range(N) if i in out)


# ---- search
def found(
    net: Generator, starts: Sequence[tuple[int, ...]] = SETS, known: object = (), **changes: object
) -> list[tuple[int, ...]]:
    how: dict[str, object] = {"length": 5, "ascent": "iterated", "steps": 4, "step": 1.0, "target": "logit"}
    how |= {"decode": "beam", "width": 3, "low": 1, "high": 4, "wanted": None}
    return search.search(net, starts, known, **{**how, **changes})  # type: ignore[arg-type]


@functools.cache
def learned(mask: bool) -> Generator:
    """Networks that have learned something: others make the same set of everything."""
    net = Generator(N, 8, mask=mask, rng=rng())
    fitted(net, adam(net, 0.01), 1, 40)
    return net


@pytest.mark.parametrize("decode", ["beam", "greedy", "official"])
@pytest.mark.parametrize("ascent", ["iterated", "single"])
def test_new_sets_come_step_after_step_and_start_after_start(
    decode: search.Decode, ascent: search.Ascent, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = learned(mask=decode != "official")
    start, m, _ = embedded(net, padded(SETS, 5, N))
    expected: list[tuple[int, ...]] = []
    e = start
    for k in range(1, 5):
        if ascent == "iterated":
            e, z = ascend(net, e, m, 1.0, "logit")
        else:
            e, z = ascend(net, start, m, float(k), "logit")
        if decode == "official":
            expected += decode_official(net, e, m, z, 5)
        else:
            tokens, _ = decode_beam(net, e, m, z, 5, 3 if decode == "beam" else 1, low=1, high=4)
            expected += [members(row, N) for row in tokens.flatten(0, 1)]
    expected = [ids for ids in dict.fromkeys(expected) if ids]
    assert len(expected) > 3
    assert found(net, decode=decode, ascent=ascent) == expected
    assert found(net, decode=decode, ascent=ascent, wanted=2) == expected[:2]
    assert found(net, expected, decode=decode, ascent=ascent, steps=0) == []
    assert found(net, known=expected[1:2], decode=decode, ascent=ascent) == [expected[0], *expected[2:]]
    records = Records()
    records.add(reversed(expected[0]), 1.0)
    assert found(net, known=records, decode=decode, ascent=ascent) == expected[1:]
    monkeypatch.setattr(search, "_AT_ONCE", 1)
    assert found(net, decode=decode, ascent=ascent) == expected


def test_empty_sets_are_no_sets() -> None:
    net = made()
    nn.init.zeros_(net.decoder.output.weight)
    net.decoder.output.bias.data.copy_(torch.arange(N + 1.0) == N)
    assert found(net, low=0, decode="greedy") == []
    assert found(net, decode="official") == []


def test_a_search_without_starts_finds_nothing_and_one_start_is_enough() -> None:
    net = made()
    assert found(net, []) == []
    assert found(net, [(2,)])
    assert found(net, [tuple(range(5))])


def test_the_size_can_be_exact() -> None:
    assert {len(ids) for ids in found(made(), low=3, high=3)} == {3}


@pytest.mark.parametrize("wanted", [None, 3])
def test_the_published_search_finds_the_same_in_the_same_order(wanted: int | None) -> None:
    net = made(mask=False, hidden=8, key=4)
    starts = SETS[:6]
    how = {"length": N, "ascent": "single", "steps": 25, "target": "sigmoid", "decode": "official"}
    got = found(net, starts, starts, wanted=wanted, **how)
    assert got == published.search(net, starts, starts, steps=25, wanted=wanted)
    assert len(got) >= 3
    assert published.search(net, [], ()) == []


def test_networks_that_diverged_find_nothing() -> None:
    net = made()
    net.decoder.output.bias.data.fill_(math.nan)
    assert found(net) == found(net, decode="greedy", low=3, high=3) == []


def test_moving_upwards_finds_sets_of_higher_score() -> None:
    """Twelve clients, each with a value; a set's score is their sum, and the best ones are no records."""
    value = torch.linspace(0.0, 1.0, 12).tolist()

    def score(ids: Sequence[int]) -> float:
        return sum(value[i] for i in ids)

    sets = [ids for ids in itertools.combinations(range(12), 3) if score(ids) < 2.0]
    sets = [sets[k] for k in torch.randperm(len(sets), generator=rng(9))[:60].tolist()]
    scores = torch.tensor([score(ids) for ids in sets])
    net = Generator(12, 16, 32, rng=rng(9))
    how = {"trade_off": 0.8, "clip": 5.0, "copies": 3, "length": 4, "online": True, "rng": rng(9)}
    fit(net, adam(net, 0.01), sets, labels(scores), epochs=30, batch=64, **how)
    starts = [sets[k] for k in scores.topk(10).indices.tolist()]
    new = found(net, starts, sets, length=4, low=3, high=3, steps=8)
    assert not set(new) & set(sets)
    assert sum(map(score, new)) / len(new) > float(scores.mean()) + 0.2
    assert max(map(score, new)) > 2.2
