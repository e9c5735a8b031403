"""The generative selection's equations against what they are by definition, in plain loops over numpy arrays: records,
networks, joint loss, ascent, decoding, scores, devices. Selectors are in `test_selection_equations.py`."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fldist.devices import Fleet, Simulated, energy, pareto, training_seconds, transfer_seconds
from fldist.generative import search
from fldist.generative.networks import (
    Generator,
    fit,
    hamming,
    joint_loss,
    load_state,
    net_state,
    pairwise_accuracy,
)
from fldist.generative.records import Records, augment, decoder_inputs, labels, members
from fldist.generative.search import ascend, decode_beam, decode_greedy, decode_official, gradient
from fldist.scoring import (
    Utility,
    additive_score,
    begin,
    draw,
    filled,
    group_score,
    measured_score,
    oort_utilities,
    penalty,
    repo_utility,
    statistical_utility,
    updated,
)
from fldist.selection import Candidates, ClientReport, Outcome

F64 = torch.float64


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(got: Any, want: Any, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64), rtol=0, atol=atol)


# ---- the reference: one row at a time, one position at a time
def unit(v: np.ndarray) -> np.ndarray:
    return v / max(float(np.sqrt((v * v).sum())), 1e-12)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class ByHand:
    """The networks' formulas on the parameters of a `Generator`, found by their kind and shape."""

    def __init__(self, net: Generator) -> None:
        def array(t: Tensor) -> np.ndarray:
            return t.detach().double().numpy()

        modules = list(net.modules())
        self.tables = [array(m.weight) for m in modules if isinstance(m, nn.Embedding)]
        self.cells = [
            tuple(array(getattr(m, n)) for n in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"))
            for m in modules
            if isinstance(m, nn.LSTM)
        ]
        linears = [m for m in modules if isinstance(m, nn.Linear)]
        self.v, self.hidden = self.tables[0].shape
        without = [m for m in linears if m.bias is None]
        (self.w_in,) = (array(m.weight) for m in without if m.in_features == self.hidden)
        (self.w_out,) = (array(m.weight) for m in without if m.in_features == 2 * self.hidden)
        biased = [m for m in linears if m.bias is not None]
        (last,) = (m for m in biased if m.out_features == self.v and m.in_features == self.hidden)
        self.last = (array(last.weight), array(last.bias))
        self.mlp = [(array(m.weight), array(m.bias)) for m in biased if m is not last]
        self.mask = net.mask

    def cell(self, which: int, x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w, u, b, d = self.cells[which]
        i, f, g, o = np.split(w @ x + b + u @ h + d, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    def present(self, row: Sequence[int]) -> list[bool]:
        """m_t: up to and including the first end token."""
        if not self.mask:
            return [True] * len(row)
        return [self.v - 1 not in row[:t] for t in range(len(row))]

    def encode(self, row: Sequence[int]) -> np.ndarray:
        h = c = np.zeros(self.hidden)
        out = []
        for token in row:
            h, c = self.cell(0, self.tables[0][token], h, c)
            out.append(unit(h))
        return np.array(out)

    def pool(self, e: np.ndarray, m: Sequence[bool]) -> np.ndarray:
        return unit(sum(e[t] for t in range(len(e)) if m[t]) / sum(m))

    def value(self, z: np.ndarray) -> float:
        for k, (w, b) in enumerate(self.mlp):
            z = w @ z + b
            if k < len(self.mlp) - 1:
                z = np.maximum(z, 0)
        return float(z[0])

    def start(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return z, z

    def step(
        self, token: int, state: tuple[np.ndarray, np.ndarray], e: np.ndarray, m: Sequence[bool]
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """The logits (before log-softmax) of the next token."""
        h, c = self.cell(1, self.tables[1][token], *state)
        q = self.w_in @ h
        seen = [t for t in range(len(e)) if m[t]]
        weights = np.exp([q @ e[t] for t in seen])
        weights /= weights.sum()
        context = sum(w * e[t] for w, t in zip(weights, seen, strict=True))
        o = np.tanh(self.w_out @ np.concatenate([context, h]))
        return self.last[0] @ o + self.last[1], (h, c)

    def forced(self, inputs: Sequence[int], e: np.ndarray, m: Sequence[bool], z: np.ndarray) -> np.ndarray:
        state, out = self.start(z), []
        for token in inputs:
            logits, state = self.step(token, state, e, m)
            out.append(log_softmax(logits))
        return np.array(out)

    def losses(self, rows: Sequence[Sequence[int]], scores: Sequence[float]) -> tuple[float, float]:
        """(L_score, L_seq)."""
        squares, terms = [], []
        for row, y in zip(rows, scores, strict=True):
            e, m = self.encode(row), self.present(row)
            z = self.pool(e, m)
            squares.append((float(sigmoid(np.array(self.value(z)))) - y) ** 2)
            logs = self.forced([self.v - 1, *row[:-1]], e, m, z)
            terms += [-logs[t][row[t]] for t in range(len(row)) if m[t]]
        return float(np.mean(squares)), float(np.mean(terms))

    def greedy(
        self, e: np.ndarray, m: Sequence[bool], z: np.ndarray, length: int, forbid: bool, low: int, high: int
    ) -> list[int]:
        """Decoding as `decode_greedy` is to do it, padded with the end token."""
        (best, *_), _ = self.beam(e, m, z, length, 1, forbid, low, high)
        return best

    def beam(
        self,
        e: np.ndarray,
        m: Sequence[bool],
        z: np.ndarray,
        length: int,
        width: int,
        forbid: bool,
        low: int,
        high: int,
    ) -> tuple[list[list[int]], list[float]]:
        end = self.v - 1
        alive: list[tuple[float, list[int], bool, Any]] = [(0.0, [], False, self.start(z))]
        for _ in range(length):
            grown = []
            for score, out, done, state in alive:
                if done:
                    grown.append((score, out, True, state))
                    continue
                logits, after = self.step(out[-1] if out else end, state, e, m)
                logs = log_softmax(allowed(logits, out, forbid, low, high))
                for token in range(self.v):
                    if logs[token] > -math.inf:
                        done = token == end or len(out) + 1 == high
                        tokens = out if token == end else [*out, token]
                        grown.append((score + logs[token], tokens, done, after))
            grown.sort(key=lambda b: -b[0])
            alive = grown[:width]
        return [out + [end] * (length - len(out)) for _, out, _, _ in alive], [score for score, *_ in alive]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max()
    return logits - top - np.log(np.exp(logits - top).sum())


def allowed(logits: np.ndarray, out: Sequence[int], forbid: bool, low: int, high: int) -> np.ndarray:
    """Logits after `out` was emitted: repeats and a too early end are at -inf."""
    logits = logits.copy()
    if forbid:
        logits[list(out)] = -math.inf
    if len(out) < low:
        logits[-1] = -math.inf
    return logits


def made(n: int = 6, hidden: int = 5, width: int = 9, layers: int = 2, mask: bool = True, seed: int = 0) -> Generator:
    """A float64 generator with weights large enough that its outputs differ."""
    net = Generator(n, hidden, width, layers, mask, rng=gen(seed)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)
    return net.eval()


ROWS = [[0, 2, 5, 6, 6], [3, 1, 6, 6, 6], [5, 4, 3, 2, 1], [2, 6, 6, 6, 6], [1, 0, 4, 5, 6]]
"""Token rows at N = 6 and T = 5; the third has no end token."""
LABELS = [0.0, 0.3, 1.0, 0.8, 0.55]
each_mask = pytest.mark.parametrize("mask", [True, False])
each_target = pytest.mark.parametrize("target", ["sigmoid", "logit"])


def embedded(net: Generator, rows: Sequence[Sequence[int]] = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        h, m = net.encode(torch.tensor(rows))
        return h, m, net.pool(h, m)


# ---- records, augmentation, tokens (4.3)
def test_a_record_is_a_set_and_the_newest_score_replaces_the_old_one() -> None:
    records = Records("newest")
    records.add((1, 3), 2.0)
    records.add((0, 4), 5.0)
    records.add((3, 1), 7.0)
    assert records.items() == [((1, 3), 7.0), ((0, 4), 5.0)]
    assert records.best(1) == [(1, 3)]


def test_the_first_score_stays_where_the_official_code_is_followed() -> None:
    records = Records("first")
    records.add((1, 3), 2.0)
    records.add((0, 4), 5.0)
    records.add((3, 1), 7.0)
    assert records.items() == [((1, 3), 2.0), ((0, 4), 5.0)]
    assert records.best(1) == [(0, 4)]


def test_the_best_records_come_first_ties_in_the_order_of_arrival_and_no_more_than_there_are() -> None:
    records = Records("newest")
    for s, y in [((5, 6), 1.0), ((0, 1), 3.0), ((2, 9), 3.0), ((3,), 2.0), ((1, 2), 3.0)]:
        records.add(s, y)
    assert records.best(4) == [(0, 1), (2, 9), (1, 2), (3,)]
    assert len(records.best(100)) == 5
    assert (9, 2) in records
    assert (2,) not in records
    assert (2, 9, 0) not in records


def test_sets_of_more_than_a_thousand_clients_that_differ_in_one_are_two_records() -> None:
    """A record's identity is its set, not a printed and shortened vector."""
    records = Records("newest")
    for left_out in (700, 701, 702):
        records.add([i for i in range(0, 1500) if i != left_out], float(left_out))
    assert len(records) == len(records.items()) == 3


def test_labels_reach_both_ends_in_the_order_of_the_scores() -> None:
    close(labels(torch.tensor([3.0, -1.0, 1.0, 7.0], dtype=F64)), [0.5, 0.0, 0.25, 1.0])


@pytest.mark.parametrize("scores", [[2.0, 2.0, 2.0], [4.0], [0.0, 0.0]])
def test_labels_of_equal_scores_are_one_half(scores: list[float]) -> None:
    close(labels(torch.tensor(scores, dtype=F64)), [0.5] * len(scores))


@settings(max_examples=25, deadline=None, database=None)
@given(scores=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_labels_lie_between_nought_and_one(scores: list[float]) -> None:
    got = labels(torch.tensor(scores, dtype=F64)).numpy()
    assert np.isfinite(got).all()
    assert got.min() >= 0
    assert got.max() <= 1
    if max(scores) - min(scores) > 1e-3:
        assert (got.min(), got.max()) == (0.0, 1.0)


SETS = [(0, 2, 5), (1, 3), (1, 2, 3, 4, 5), (2,)]


def test_row_nought_is_ascending_and_the_copies_are_permutations_padded_with_the_end_token() -> None:
    copies, length, pad = 4, 6, 6
    rows = augment(SETS, copies, length, pad, gen(3))
    assert rows.shape == (len(SETS) * (copies + 1), length)
    assert not rows.is_floating_point()
    by_set = rows.reshape(len(SETS), copies + 1, length).tolist()
    for s, its in zip(SETS, by_set, strict=True):
        assert its[0][: len(s)] == sorted(s)
        for row in its:
            assert sorted(row[: len(s)]) == sorted(s)
            assert row[len(s) :] == [pad] * (length - len(s))


def test_the_copies_are_independent_and_uniform() -> None:
    rows = augment([(0, 1, 2)] * 2, 3000, 4, 5, gen(0)).reshape(2, 3001, 4)[:, 1:, :3].tolist()
    for its in rows:
        counts = dict.fromkeys(itertools.permutations(range(3)), 0)
        for row in its:
            counts[tuple(row)] += 1
        assert all(abs(c - 500) < 100 for c in counts.values()), counts
    both = sum(a == b for a, b in zip(*rows, strict=True))
    assert abs(both - 500) < 100  # one in six: the second set's orders are not the first's


def test_the_copies_follow_from_their_generator() -> None:
    assert torch.equal(augment(SETS, 3, 6, 6, gen(5)), augment(SETS, 3, 6, 6, gen(5)))
    assert not torch.equal(augment(SETS, 3, 6, 6, gen(5)), augment(SETS, 3, 6, 6, gen(6)))


def test_without_copies_each_set_is_one_ascending_row() -> None:
    assert augment([(5, 0), (3,)], 0, 3, 6, gen(0)).tolist() == [[0, 5, 6], [3, 6, 6]]


def test_the_decoders_input_is_the_start_token_and_the_row_without_its_last() -> None:
    rows = torch.tensor(ROWS)
    assert decoder_inputs(rows, 6).tolist() == [[6, *row[:-1]] for row in ROWS]
    assert rows.tolist() == ROWS


def test_the_members_of_a_row_are_its_clients_before_the_first_end_token_once_each_ascending() -> None:
    for row, want in [([5, 0, 6, 6], (0, 5)), ([6, 6], ()), ([2, 2, 1], (1, 2)), ([5], (5,)), ([3, 6, 1], (3,))]:
        assert members(row, 6) == want
        assert members(torch.tensor(row), 6) == want


# ---- networks and joint loss (4.4)
def test_the_default_sizes_have_the_published_number_of_parameters() -> None:
    net = Generator(100, 64, 200, 2, True, rng=gen(0))
    assert sum(p.numel() for p in net.parameters()) == 151_742


def test_the_vocabulary_has_one_token_more_than_clients_and_heads_grow_with_layers() -> None:
    def count(layers: int) -> int:
        return sum(p.numel() for p in Generator(6, 5, 7, layers, True, rng=gen(0)).parameters())

    assert count(2) - count(1) == 7 * 7 + 7
    net = Generator(6, 5, 7, 2, True, rng=gen(0))
    assert sorted(m.num_embeddings for m in net.modules() if isinstance(m, nn.Embedding)) == [7, 7]


def test_parameters_are_drawn_as_torch_draws_them_and_from_the_generator_given() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    net = Generator(50, 40, 60, 2, True, rng=gen(1))
    assert torch.equal(torch.get_rng_state(), before)
    for m in net.modules():
        if isinstance(m, nn.Embedding):
            assert 0.9 < float(m.weight.detach().std()) < 1.1
            assert float(m.weight.detach().abs().max()) > 2.5
        elif isinstance(m, nn.Linear):
            bound = m.in_features**-0.5
            for p in m.parameters():
                assert float(p.detach().abs().max()) <= bound
            assert float(m.weight.detach().abs().max()) > 0.9 * bound
        elif isinstance(m, nn.LSTM):
            for p in m.parameters():
                assert 0.9 * 40**-0.5 < float(p.detach().abs().max()) <= 40**-0.5
    again, other = Generator(50, 40, 60, 2, True, rng=gen(1)), Generator(50, 40, 60, 2, True, rng=gen(2))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    rng = gen(1)
    first, second = (Generator(50, 40, 60, 2, True, rng=rng) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), first.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(net.parameters(), second.parameters(), strict=True))
    drawn = [p.flatten()[:5].tolist() for p in net.parameters()]
    assert all(a[: len(b)] != b[: len(a)] for a, b in itertools.combinations(drawn, 2))


@each_mask
def test_encoding_pooling_and_value_are_their_formulas(mask: bool) -> None:
    net = made(mask=mask)
    ref = ByHand(net)
    h, m, z = embedded(net)
    f = net.value(z).detach()
    assert f.shape == (len(ROWS),)
    for k, row in enumerate(ROWS):
        close(h[k], ref.encode(row))
        assert m[k].bool().tolist() == ref.present(row)
        close(z[k], ref.pool(ref.encode(row), ref.present(row)))
        close(f[k], ref.value(z[k].numpy()))


def test_a_mask_reaches_up_to_and_including_the_first_end_token() -> None:
    _, m, _ = embedded(made())
    assert m.bool().tolist() == [
        [True, True, True, True, False],
        [True, True, True, False, False],
        [True] * 5,
        [True, True, False, False, False],
        [True] * 5,
    ]
    _, m, _ = embedded(made(mask=False))
    assert m.bool().all()


def test_every_embedding_and_its_pool_have_norm_one() -> None:
    h, _, z = embedded(made())
    close(h.norm(dim=-1), np.ones(h.shape[:2]))
    close(z.norm(dim=-1), np.ones(len(ROWS)))


@each_mask
def test_teacher_forcing_is_the_formula_and_step_by_step_decoding_equals_the_batched_pass(mask: bool) -> None:
    net = made(mask=mask)
    ref = ByHand(net)
    h, m, z = embedded(net)
    inputs = decoder_inputs(torch.tensor(ROWS), 6)
    with torch.no_grad():
        at_once = net.log_probs(inputs, h, m, z)
        state, one_by_one = net.initial_state(z), []
        for t in range(inputs.shape[1]):
            logs, state = net.step(inputs[:, t], state, h, m)
            one_by_one.append(logs)
    close(torch.stack(one_by_one, dim=1), at_once)
    close(at_once.exp().sum(dim=-1), np.ones(inputs.shape))
    for k, row in enumerate(ROWS):
        want = ref.forced([6, *row[:-1]], h[k].numpy(), ref.present(row), z[k].numpy())
        close(at_once[k], want)


@each_mask
@pytest.mark.parametrize("a", [0.0, 0.3, 0.8, 1.0])
def test_the_joint_loss_is_its_formula(mask: bool, a: float) -> None:
    net = made(mask=mask)
    score, sequence = ByHand(net).losses(ROWS, LABELS)
    got = joint_loss(net, torch.tensor(ROWS), torch.tensor(LABELS, dtype=F64), a)
    close(got.score.detach(), score)
    close(got.sequence.detach(), sequence)
    close(got.total.detach(), a * score + (1 - a) * sequence)


def parts(net: Generator) -> dict[str, list[nn.Parameter]]:
    """Parameters by the network they are of."""
    embeddings = [m for m in net.modules() if isinstance(m, nn.Embedding)]
    lstms = [m for m in net.modules() if isinstance(m, nn.LSTM)]
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    decoding = [m for m in linears if m.bias is None or m.out_features == embeddings[0].num_embeddings]
    evaluating = [m for m in linears if m not in decoding]
    return {
        "encoder": [*embeddings[0].parameters(), *lstms[0].parameters()],
        "decoder": [p for m in (embeddings[1], lstms[1], *decoding) for p in m.parameters()],
        "evaluator": [p for m in evaluating for p in m.parameters()],
    }


def norms(net: Generator, a: float) -> dict[str, float]:
    net.zero_grad()
    joint_loss(net, torch.tensor(ROWS), torch.tensor(LABELS, dtype=F64), a).total.backward()
    return {name: sum(float(p.grad.abs().sum()) for p in ps if p.grad is not None) for name, ps in parts(net).items()}


@each_mask
def test_each_loss_reaches_its_own_network_and_both_reach_the_encoder(mask: bool) -> None:
    net = made(mask=mask)
    score, sequence, both = norms(net, 1.0), norms(net, 0.0), norms(net, 0.8)
    assert score["decoder"] == 0
    assert sequence["evaluator"] == 0
    assert min(score["encoder"], score["evaluator"], sequence["encoder"], sequence["decoder"], *both.values()) > 1e-4


@each_mask
@pytest.mark.parametrize("a", [0.0, 0.8, 1.0])
def test_the_gradients_of_the_joint_loss_are_those_of_its_formula(mask: bool, a: float) -> None:
    """Along a random direction in each parameter, by central differences of the formula written out."""
    net = made(mask=mask)
    joint_loss(net, torch.tensor(ROWS), torch.tensor(LABELS, dtype=F64), a).total.backward()
    for k, (name, p) in enumerate(net.named_parameters()):
        along = torch.randn(p.shape, generator=gen(k), dtype=F64)
        got = 0.0 if p.grad is None else float((p.grad * along).sum())
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p.add_(step * along)
                score, sequence = ByHand(net).losses(ROWS, LABELS)
                p.sub_(step * along)
            ends.append(a * score + (1 - a) * sequence)
        want = (ends[0] - ends[1]) / 2e-5
        assert abs(got - want) < 1e-6 * max(1.0, abs(want)), name


def test_the_sequence_loss_reaches_the_encoder_through_the_pool_and_through_the_keys() -> None:
    net = made()
    rows = torch.tensor(ROWS)
    for through in ("pool", "keys"):
        net.zero_grad()
        h, m = net.encode(rows)
        z = net.pool(h, m)
        keys, z = (h.detach(), z) if through == "pool" else (h, z.detach())
        net.log_probs(decoder_inputs(rows, 6), keys, m, z).sum().backward()
        assert sum(float(p.grad.abs().sum()) for p in parts(net)["encoder"] if p.grad is not None) > 1e-3


@each_mask
def test_with_output_weights_of_nought_every_token_is_equally_likely(mask: bool) -> None:
    net = made(mask=mask)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.Linear) and m.out_features == 7 and m.in_features == 5 and m.bias is not None:
                m.weight.zero_()
                m.bias.zero_()
    losses = joint_loss(net, torch.tensor(ROWS), torch.tensor(LABELS, dtype=F64), 0.8)
    close(losses.sequence.detach(), math.log(7))


def test_with_masks_more_padding_changes_nothing_and_without_it_does() -> None:
    longer = [row + [6] * 3 for row in ROWS if 6 in row]
    short = [row for row in ROWS if 6 in row]
    for mask in (True, False):
        net = made(mask=mask)
        (h, m, z), (h2, m2, z2) = embedded(net, short), embedded(net, longer)
        with torch.no_grad():
            logs = net.log_probs(decoder_inputs(torch.tensor(short), 6), h, m, z)
            logs2 = net.log_probs(decoder_inputs(torch.tensor(longer), 6), h2, m2, z2)[:, :5]
            f, f2 = net.value(z), net.value(z2)
        kept = m.bool()
        if mask:
            close(z2, z)
            close(f2, f)
            close(logs2[kept], logs[kept])
            y = torch.tensor(LABELS[: len(short)], dtype=F64)
            got, want = (joint_loss(net, torch.tensor(r), y, 0.8) for r in (longer, short))
            close(got.sequence.detach(), want.sequence.detach())
        else:
            assert float((z2 - z).abs().max()) > 1e-3
            assert float((logs2 - logs)[kept].abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("target", "predicted", "want"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], 0.0),
        ([5.0, 5.0, 5.0], [1.0, 2.0, 3.0], 0.0),
        ([5.0, 5.0, 5.0], [3.0, 2.0, 1.0], 1.0),
        ([1.0, 3.0, 2.0], [1.0, 2.0, 3.0], 2 / 3),
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], 0.0),
        ([3.0, 2.0, 1.0], [1.0, 1.0, 1.0], 1.0),
    ],
)
def test_pairwise_accuracy_and_its_rule_for_ties(target: list[float], predicted: list[float], want: float) -> None:
    close(pairwise_accuracy(torch.tensor(target), torch.tensor(predicted)), want, 1e-7)


def test_pairwise_accuracy_is_a_count_over_all_pairs() -> None:
    draw = random.Random(1)
    y = [draw.randrange(5) for _ in range(40)]
    p = [draw.randrange(6) for _ in range(40)]
    agree = [
        (y[i] >= y[j] and p[i] >= p[j]) or (y[i] < y[j] and p[i] < p[j])
        for i, j in itertools.combinations(range(40), 2)
    ]
    got = pairwise_accuracy(torch.tensor(y, dtype=F64), torch.tensor(p, dtype=F64))
    close(got, sum(agree) / len(agree), 1e-7)


@each_mask
def test_the_hamming_distance_counts_the_positions_in_which_the_free_running_sequence_differs(mask: bool) -> None:
    runs_on = False
    for seed in range(20):
        net = made(mask=mask, seed=seed)
        ref = ByHand(net)
        wrong = []
        for row in ROWS:
            e, m = ref.encode(row), ref.present(row)
            state, token, out = ref.start(ref.pool(e, m)), 6, []
            for _ in row:
                logits, state = ref.step(token, state, e, m)
                token = int(logits.argmax())
                out.append(token)
            if mask and 6 in out:  # what comes after the end token is not part of the sequence
                first = out.index(6)
                runs_on |= any(token != 6 == wanted for token, wanted in zip(out[first:], row[first:], strict=True))
                out[first:] = [6] * (len(out) - first)
            wrong.append(sum(a != b for a, b in zip(out, row, strict=True)))
        close(hamming(net, torch.tensor(ROWS)), float(np.mean(wrong)), 1e-6)
    assert runs_on == mask  # some case tells the two apart


def adam(net: Generator, lr: float = 1e-3) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), lr=lr)


FIT: dict[str, Any] = {
    "epochs": 3,
    "batch": 1024,
    "trade_off": 0.8,
    "clip": 5.0,
    "copies": 2,
    "length": 6,
    "online": False,
}


def test_a_full_batch_fit_is_steps_of_adam_on_the_joint_loss() -> None:
    net = made()
    twin = copy.deepcopy(net)
    y = [0.0, 0.4, 1.0, 0.7]
    fit(net, adam(net), SETS, torch.tensor(y, dtype=F64), **{**FIT, "copies": 0}, rng=gen(1))
    rows, optimizer = augment(SETS, 0, 6, 6, gen(0)), adam(twin)
    for _ in range(3):
        optimizer.zero_grad()
        joint_loss(twin, rows, torch.tensor(y, dtype=F64), 0.8).total.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 5.0)
        optimizer.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        close(a.detach(), b.detach(), 1e-9)


def test_the_total_gradient_norm_is_clipped_before_the_step() -> None:
    """With plain SGD of lr 1 the parameters move by no more than the bound."""
    net = made()
    before = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    settings_ = {**FIT, "epochs": 1, "copies": 0, "clip": 1e-3}
    fit(
        net,
        torch.optim.SGD(net.parameters(), lr=1.0),
        SETS,
        torch.rand(4, dtype=F64, generator=gen(2)),
        **settings_,
        rng=gen(1),
    )
    moved = torch.cat([p.detach().flatten() for p in net.parameters()]) - before
    close(moved.norm(), 1e-3, 1e-7)


def test_every_row_of_an_epoch_is_seen_once_and_the_batches_change_with_the_generator() -> None:
    """Gradients of single rows add up: with a tiny learning rate, an epoch of batches of one moves as all rows' sum."""
    y = torch.tensor([0.0, 0.4, 1.0, 0.7], dtype=F64)
    net = made()
    twin = copy.deepcopy(net)
    lr = 1e-9
    settings_ = {**FIT, "epochs": 1, "copies": 0, "clip": 1e9, "batch": 1}
    fit(net, torch.optim.SGD(net.parameters(), lr=lr), SETS, y, **settings_, rng=gen(1))
    twin.zero_grad()
    for k, row in enumerate(augment(SETS, 0, 6, 6, gen(0))):
        joint_loss(twin, row[None], y[k : k + 1], 0.8).total.backward()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        moved = (b.detach() - a.detach()) / lr
        assert float((moved - b.grad).abs().max()) < 1e-4 * max(1.0, float(b.grad.abs().max())), name
    ends = []
    for seed in (1, 2):
        other = copy.deepcopy(twin)
        fit(other, adam(other, 0.1), SETS, y, **{**FIT, "batch": 2}, rng=gen(seed))
        ends.append(torch.cat([p.detach().flatten() for p in other.parameters()]))
    assert not torch.equal(*ends)


def rows_of_a_fit(**changes: Any) -> list[list[tuple[list[int], float]]]:
    """The rows and labels of each batch that a fit goes through."""
    net, seen = made(), []

    def loss(net: Generator, rows: Tensor, labels: Tensor, trade_off: float) -> Any:
        seen.append(list(zip(rows.tolist(), labels.tolist(), strict=True)))
        return joint_loss(net, rows, labels, trade_off)

    y = torch.tensor([0.0, 0.4, 1.0, 0.7], dtype=F64)
    fit(net, adam(net), SETS, y, **{**FIT, **changes}, rng=gen(3), loss=loss)
    return seen


@pytest.mark.parametrize("online", [True, False])
def test_each_epoch_goes_through_all_rows_with_the_label_of_their_set_in_shuffled_batches(online: bool) -> None:
    batches = rows_of_a_fit(batch=5, online=online, copies=3)
    assert [len(b) for b in batches] == [5, 5, 5, 1] * 3
    score = dict(zip(SETS, [0.0, 0.4, 1.0, 0.7], strict=True))
    epochs = [list(itertools.chain(*batches[at : at + 4])) for at in (0, 4, 8)]
    for epoch in epochs:
        for row, y in epoch:
            close(y, score[tuple(sorted(t for t in row if t < 6))])
        for s in SETS:
            its = [row for row, _ in epoch if sorted(t for t in row if t < 6) == list(s)]
            assert len(its) == 4
            assert [*s, *[6] * (6 - len(s))] in its
    assert epochs[0] != epochs[1] != epochs[2], "the same order in each epoch"
    same = sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert same != online


@pytest.mark.parametrize("online", [True, False])
def test_a_fit_follows_from_its_generator_and_touches_no_global_one(online: bool) -> None:
    y = torch.tensor([0.0, 0.4, 1.0, 0.7])
    ends = []
    for _ in range(2):
        net = Generator(6, 5, 7, 2, True, rng=gen(0))
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        fit(net, adam(net), SETS, y, **{**FIT, "online": online, "batch": 3}, rng=gen(4))
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        torch.manual_seed(99)
    assert torch.equal(*ends)


def test_the_state_of_a_network_and_its_optimizer_goes_on_as_if_nothing_had_happened() -> None:
    y = torch.tensor([0.0, 0.4, 1.0, 0.7])
    net = Generator(6, 5, 7, 2, True, rng=gen(0))
    optimizer = adam(net, 0.01)
    fit(net, optimizer, SETS, y, **FIT, rng=gen(1))
    kept = net_state(net, optimizer)
    fit(net, optimizer, SETS, y, **FIT, rng=gen(2))
    other = Generator(6, 5, 7, 2, True, rng=gen(7))
    its = adam(other, 0.01)
    load_state(other, its, kept)
    fit(other, its, SETS, y, **FIT, rng=gen(2))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_few_records_are_learnt_by_heart() -> None:
    draw = random.Random(2)
    every = [s for k in range(1, 5) for s in itertools.combinations(range(6), k)]
    sets = draw.sample(every, 12)
    assert {len(s) for s in sets} == {1, 2, 3, 4}
    y = labels(torch.tensor([draw.random() for _ in sets]))
    net = Generator(6, 8, 16, 2, True, rng=gen(0))
    settings_ = {**FIT, "epochs": 500, "copies": 3, "length": 5}
    fit(net, adam(net, 0.01), sets, y, **settings_, rng=gen(1))
    rows = augment(sets, 0, 5, 6, gen(0))
    with torch.no_grad():
        h, m = net.encode(rows)
        predicted = net.value(net.pool(h, m)).sigmoid()
    assert float(hamming(net, rows)) == 0
    assert float(pairwise_accuracy(y, predicted)) > 0.9


# ---- gradient and ascent (4.5)
def output(ref: ByHand, e: np.ndarray, m: Sequence[bool], target: str) -> float:
    f = ref.value(ref.pool(e, m))
    return f if target == "logit" else float(sigmoid(np.array(f)))


@each_mask
@each_target
def test_the_gradient_is_that_of_the_evaluator_with_respect_to_each_position(mask: bool, target: str) -> None:
    net = made(mask=mask)
    ref = ByHand(net)
    h, m, z = embedded(net)
    g = gradient(net, h, m, target)
    for k, row in enumerate(ROWS):
        e, present, step = h[k].numpy(), ref.present(row), 1e-6
        for t in range(5):
            for j in range(5):
                plus, minus = e.copy(), e.copy()
                plus[t, j] += step
                minus[t, j] -= step
                want = (output(ref, plus, present, target) - output(ref, minus, present, target)) / (2 * step)
                full = at_every_position(g, m)[k, t, j]
                close(full, want, 1e-8)
        close((at_every_position(g, m)[k] @ z[k]), np.zeros(5), 1e-10)


def at_every_position(g: Tensor, m: Tensor) -> Tensor:
    """The gradient as [B, T, H], whether it was given so or once a row."""
    return g * m.to(g.dtype)[:, :, None] if g.dim() == 3 else g[:, None, :] * m.to(g.dtype)[:, :, None]


@each_mask
def test_the_gradient_is_the_same_at_every_position_and_nought_where_there_is_padding(mask: bool) -> None:
    net = made(mask=mask)
    h, m, _ = embedded(net)
    g = gradient(net, h, m, "sigmoid")
    for k in range(len(ROWS)):
        its = g[k]
        for t in range(5):
            if bool(m[k, t]):
                close(its[t], its[0])
                assert float(its[t].norm()) > 0
            else:
                close(its[t], np.zeros(5), 0.0)


@each_mask
@each_target
def test_a_step_of_nought_goes_nowhere_and_a_small_one_rises_by_the_squared_norm(mask: bool, target: str) -> None:
    net = made(mask=mask)
    ref = ByHand(net)
    h, m, z = embedded(net)
    e, z2 = ascend(net, h, m, 0.0, target)
    close(e, h)
    close(z2, z)
    g = at_every_position(gradient(net, h, m, target), m)
    for k, row in enumerate(ROWS):
        present, lam = ref.present(row), 1e-5
        before = output(ref, h[k].numpy(), present, target)
        gain = output(ref, (h + lam * g)[k].numpy(), present, target) - before
        squared = float(g[k].square().sum())
        assert gain > 0
        assert abs(gain - lam * squared) < 1e-3 * lam * squared
        after, _ = ascend(net, h, m, 1e-2, target)
        assert output(ref, after[k].numpy(), present, target) > before


@each_mask
@each_target
@pytest.mark.parametrize("step", [1.0, 7.0])
def test_a_step_moves_along_the_gradient_and_normalises_each_position_and_the_pool(
    mask: bool, target: str, step: float
) -> None:
    net = made(mask=mask)
    ref = ByHand(net)
    h, m, _ = embedded(net)
    g = at_every_position(gradient(net, h, m, target), m)
    e, z = ascend(net, h, m, step, target)
    for k, row in enumerate(ROWS):
        want = np.array([unit(v) for v in (h[k] + step * g[k]).numpy()])
        close(e[k], want)
        close(z[k], ref.pool(want, ref.present(row)))
    assert not e.requires_grad
    assert not z.requires_grad


def test_gradient_and_ascent_leave_the_weights_and_their_gradients_alone() -> None:
    net = made()
    before = [p.detach().clone() for p in net.parameters()]
    h, m, _ = embedded(net)
    ascend(net, h, m, 1.0, "logit")
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())


# ---- decoding
def moved(mask: bool, seed: int) -> tuple[Generator, ByHand, Tensor, Tensor, Tensor]:
    net = made(mask=mask, seed=seed)
    h, m, _ = embedded(net)
    e, z = ascend(net, h, m, 1.0, "logit")
    return net, ByHand(net), e, m, z


BOUNDS = [(3, 3), (1, 4), (0, 4), (2, 3), (4, 4), (1, 1), (6, 6)]


@each_mask
@pytest.mark.parametrize(("low", "high"), BOUNDS)
@pytest.mark.parametrize("forbid", [True, False])
def test_greedy_decoding_is_its_law(mask: bool, low: int, high: int, forbid: bool) -> None:
    for seed in range(4):
        net, ref, e, m, z = moved(mask, seed)
        got = decode_greedy(net, e, m, z, high + 1, forbid_repeats=forbid, low=low, high=high)
        for k, row in enumerate(ROWS):
            want = ref.greedy(e[k].numpy(), ref.present(row), z[k].numpy(), high + 1, forbid, low, high)
            assert got[k].tolist() == want


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_decoded_sets_are_within_bounds_and_without_repeats(low: int, high: int) -> None:
    for seed in range(4):
        net, _, e, m, z = moved(True, seed)
        tokens, _ = decode_beam(net, e, m, z, high + 1, 3, forbid_repeats=True, low=low, high=high)
        greedy = decode_greedy(net, e, m, z, high + 1, forbid_repeats=True, low=low, high=high)
        for row in [*tokens.reshape(-1, tokens.shape[-1]).tolist(), *greedy.tolist()]:
            clients = [t for t in row if t < 6]
            assert row[: len(clients)] == clients, "a client after an end token"
            assert len(set(clients)) == len(clients)
            assert low <= len(clients) <= high
            assert all(0 <= c < 6 for c in clients)


@each_mask
@pytest.mark.parametrize(("low", "high"), BOUNDS)
@pytest.mark.parametrize("width", [1, 2, 5])
def test_beam_search_is_its_law_finished_beams_kept_and_states_moved_with_their_beams(
    mask: bool, low: int, high: int, width: int
) -> None:
    for seed in range(3):
        net, ref, e, m, z = moved(mask, seed)
        tokens, scores = decode_beam(net, e, m, z, high + 1, width, forbid_repeats=True, low=low, high=high)
        for k, row in enumerate(ROWS):
            want, sums = ref.beam(e[k].numpy(), ref.present(row), z[k].numpy(), high + 1, width, True, low, high)
            its, sc = tokens[k].tolist(), scores[k].tolist()
            real = [(a, b) for a, b in zip(its, sc, strict=True) if b > -math.inf]
            assert [a for a, _ in real] == want
            close([b for _, b in real], sums, 1e-10)


@pytest.mark.parametrize(("n", "low", "high", "width"), [(5, 2, 2, 25), (4, 1, 1, 9), (2, 2, 2, 5), (3, 2, 3, 40)])
def test_more_beams_than_there_are_sequences_find_each_once_and_nothing_else(
    n: int, low: int, high: int, width: int
) -> None:
    every = [p for k in range(low, high + 1) for p in itertools.permutations(range(n), k)]
    for seed in range(4):
        net = made(n=n, seed=seed)
        h, m, _ = embedded(net, [[*range(high), n]])
        e, z = ascend(net, h, m, 1.0, "logit")
        tokens, scores = decode_beam(net, e, m, z, high + 1, width, forbid_repeats=True, low=low, high=high)
        real = [
            tuple(t for t in row if t < n)
            for row, y in zip(tokens[0].tolist(), scores[0].tolist(), strict=True)
            if y > -math.inf
        ]
        assert sorted(real) == sorted(every)
        close(scores[0].exp().sum(), 1.0, 1e-9)
        got = search.search(
            net, [tuple(range(high))], set(), length=high + 1, ascent="iterated", steps=2, step=1.0, target="logit",
            decode="beam", width=width, low=low, high=high, wanted=None,
        )  # fmt: skip
        assert sorted(got) == sorted({tuple(sorted(p)) for p in every})


@each_mask
def test_beams_of_width_one_are_greedy(mask: bool) -> None:
    for (low, high), seed in itertools.product(BOUNDS, range(3)):
        net, _, e, m, z = moved(mask, seed)
        tokens, _ = decode_beam(net, e, m, z, high + 1, 1, forbid_repeats=True, low=low, high=high)
        greedy = decode_greedy(net, e, m, z, high + 1, forbid_repeats=True, low=low, high=high)
        assert tokens[:, 0].tolist() == greedy.tolist()


@pytest.mark.parametrize("width", [7, 9])
def test_two_tokens_and_as_many_beams_as_tokens_are_an_exhaustive_enumeration(width: int) -> None:
    net, ref, e, m, z = moved(True, 1)
    tokens, scores = decode_beam(net, e, m, z, 2, width, forbid_repeats=True, low=0, high=2)
    for k, row in enumerate(ROWS):
        present, keys = ref.present(row), e[k].numpy()
        logits, state = ref.step(6, ref.start(z[k].numpy()), keys, present)
        first = log_softmax(logits)
        every = {(6, 6): first[6]}
        for a in range(6):
            logits, _ = ref.step(a, state, keys, present)
            second = log_softmax(allowed(logits, [a], True, 0, 2))
            every.update({(a, b): first[a] + second[b] for b in range(7) if b != a})
        best = sorted(every, key=lambda s: -every[s])[:width]
        assert [tuple(s) for s in tokens[k].tolist()] == best
        close(scores[k], [every[s] for s in best], 1e-10)


def test_every_client_also_the_last_can_be_decoded() -> None:
    net, _, e, m, z = moved(True, 0)
    for client in range(6):
        with torch.no_grad():
            for layer in net.modules():
                if (
                    isinstance(layer, nn.Linear)
                    and layer.out_features == 7
                    and layer.in_features == 5
                    and layer.bias is not None
                ):
                    layer.bias.zero_()
                    layer.bias[client] = 100.0
        got = decode_greedy(net, e, m, z, 3, forbid_repeats=True, low=2, high=2)
        assert (got[:, 0] == client).all()


@pytest.mark.parametrize("decode", ["greedy", "beam", "official"])
def test_networks_that_end_at_once_find_no_empty_set(decode: str) -> None:
    net = made()
    with torch.no_grad():
        net.decoder.output.bias[6] = 100.0
    got = search.search(
        net, STARTS, set(), length=4, ascent="iterated", steps=2, step=1.0, target="logit",
        decode=decode, width=1, low=0, high=3, wanted=None,
    )  # fmt: skip
    assert got == []


@each_mask
def test_official_decoding_takes_exactly_t_steps_of_argmax_and_goes_on_after_an_end_token(mask: bool) -> None:
    seen = {"after an end": False, "a repeat": False}
    for seed in range(12):
        net, ref, e, m, z = moved(mask, seed)
        got = decode_official(net, e, m, z, 8)
        for k, row in enumerate(ROWS):
            state, token, want = ref.start(z[k].numpy()), 6, []
            for _ in range(8):
                logits, state = ref.step(token, state, e[k].numpy(), ref.present(row))
                token = int(logits.argmax())
                want.append(token)
            clients = [t for t in want if t < 6]
            assert got[k] == tuple(sorted(set(clients)))
            seen["after an end"] |= 6 in want and any(t < 6 for t in want[want.index(6) :])
            seen["a repeat"] |= len(set(clients)) < len(clients)
    assert all(seen.values()), seen


# ---- search
STARTS = [(0, 2, 5), (1, 3), (4,), (0, 3, 4)]
"""Of several sizes: each keeps its own mask while it is moved."""


def found_by_hand(
    net: Generator, known: Iterable[tuple[int, ...]], ascent: str, steps: int, size: int, wanted: int, target: str
) -> list[tuple[int, ...]]:
    ref, known = ByHand(net), set(known)
    rows = [[*s] + [6] * (size + 1 - len(s)) for s in STARTS]
    h, m, _ = embedded(net, rows)
    e, out = h, []
    for n in range(1, steps + 1):
        if ascent == "single":
            e, z = ascend(net, h, m, float(n), target)
        else:
            e, z = ascend(net, e, m, 1.0, target)
        for k, row in enumerate(rows):
            tokens = ref.greedy(e[k].numpy(), ref.present(row), z[k].numpy(), size + 1, True, size, size)
            found = tuple(sorted({t for t in tokens if t < 6}))
            if found and found not in known and found not in out:
                out.append(found)
            if len(out) == wanted:
                return out
    return out


@pytest.mark.parametrize("ascent", ["single", "iterated"])
@each_target
@pytest.mark.parametrize("wanted", [100, 2])
def test_the_search_decodes_after_each_step_and_keeps_new_sets_in_their_order(
    ascent: str, target: str, wanted: int
) -> None:
    some = False
    for seed in range(6):
        net = made(seed=seed)
        known = [*STARTS, (0, 1, 2)]
        got = search.search(
            net, STARTS, set(known), length=4, ascent=ascent, steps=6, step=1.0, target=target,
            decode="greedy", width=1, low=3, high=3, wanted=wanted,
        )  # fmt: skip
        want = found_by_hand(net, known, ascent, 6, 3, wanted, target)
        assert got == want
        some |= len(want) > 1
    assert some


@pytest.mark.parametrize("ascent", ["single", "iterated"])
@pytest.mark.parametrize("at_once", [1, 150, 10**9])
def test_how_many_steps_are_decoded_at_once_changes_nothing(
    ascent: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_AT_ONCE", at_once)
    for seed in range(3):
        net = made(seed=seed)
        got = search.search(
            net, STARTS, set(STARTS), length=4, ascent=ascent, steps=7, step=1.0, target="logit",
            decode="greedy", width=1, low=3, high=3, wanted=None,
        )  # fmt: skip
        assert got == found_by_hand(net, STARTS, ascent, 7, 3, 1000, "logit")


@pytest.mark.parametrize("ascent", ["single", "iterated"])
def test_the_step_size_scales_each_step(ascent: str) -> None:
    net = made(seed=2)
    h, m, _ = embedded(net, [[*s, *[6] * (4 - len(s))] for s in STARTS])
    g = gradient(net, h, m, "logit")
    e, want = h, []
    for k in (1, 2, 3):
        moved = (
            nn.functional.normalize(h + 0.7 * k * g, dim=2)
            if ascent == "single"
            else ascend(net, e, m, 0.7, "logit")[0]
        )
        e = moved
        tokens = decode_greedy(net, e, m, net.pool(e, m), 4, low=0, high=3)
        want += [members(row, 6) for row in tokens]
    got = search.search(
        net, STARTS, set(), length=4, ascent=ascent, steps=3, step=0.7, target="logit",
        decode="greedy", width=1, low=0, high=3, wanted=None,
    )  # fmt: skip
    assert got == [s for s in dict.fromkeys(want) if s]


def test_iterated_steps_take_a_new_gradient_each_time_and_single_ones_do_not() -> None:
    """Far steps along one direction end at one point; iterated ones need not."""
    net = made(seed=3)
    h, m, _ = embedded(net)
    far, _ = ascend(net, h, m, 2.0, "logit")
    twice, _ = ascend(net, ascend(net, h, m, 1.0, "logit")[0], m, 1.0, "logit")
    assert float((far - twice).abs().max()) > 1e-4


@pytest.mark.parametrize("decode", ["greedy", "beam", "official"])
def test_a_search_from_one_start_or_one_that_finds_nothing_new_is_no_error(decode: str) -> None:
    net = made()
    every = {s for k in range(7) for s in itertools.combinations(range(6), k)}
    for starts, known in ([(0, 2)], {(0, 2)}), ([(0, 2), (1, 3)], every):
        got = search.search(
            net, starts, known, length=4, ascent="iterated", steps=3, step=1.0, target="logit",
            decode=decode, width=3, low=2, high=3, wanted=50,
        )  # fmt: skip
        assert not set(got) & known
        if decode != "official":
            assert all(2 <= len(s) <= 3 for s in got)
        assert () not in got
    assert got == []


def test_all_finished_beams_become_candidates_not_only_the_best() -> None:
    def found(width: int, seed: int) -> set[tuple[int, ...]]:
        got = search.search(
            made(seed=seed), STARTS, set(STARTS), length=4, ascent="iterated", steps=1, step=1.0, target="logit",
            decode="beam", width=width, low=3, high=3, wanted=1000,
        )  # fmt: skip
        return set(got)

    for seed in range(3):
        net = made(seed=seed)
        h, m, _ = embedded(net, [[*s, *[6] * (4 - len(s))] for s in STARTS])
        e, z = ascend(net, h, m, 1.0, "logit")
        tokens, _ = decode_beam(net, e, m, z, 4, 5, forbid_repeats=True, low=3, high=3)
        want = {tuple(sorted(t for t in row if t < 6)) for row in tokens.reshape(-1, 4).tolist()} - set(STARTS)
        assert found(5, seed) == want


# ---- utilities and scores (4.1, 4.2)
@settings(max_examples=30, deadline=None, database=None)
@given(n=st.integers(1, 500), loss=st.floats(0, 50))
def test_with_equal_losses_the_utility_is_samples_times_loss(n: int, loss: float) -> None:
    close(statistical_utility(float(n), n * loss**2), n * loss, 1e-9 * max(1.0, n * loss))


def test_the_utility_is_samples_times_the_root_mean_square_of_the_losses() -> None:
    losses = [0.5, 2.0, 1.0, 3.5]
    squares = sum(x * x for x in losses)
    close(statistical_utility(4.0, squares), 4 * math.sqrt(squares / 4))
    assert statistical_utility(0.0, 0.0) == 0


@pytest.mark.parametrize(
    ("value", "preferred", "exponent", "want"),
    [
        (50.0, 50.0, 2.0, 1.0),
        (100.0, 50.0, 2.0, 0.25),
        (100.0, 50.0, 0.0, 1.0),
        (25.0, 50.0, 2.0, 1.0),
        (200.0, 50.0, 1.0, 0.25),
        (50.0, math.inf, 2.0, 1.0),
    ],
)
def test_the_penalty(value: float, preferred: float, exponent: float, want: float) -> None:
    close(penalty(value, preferred, exponent), want)


@pytest.mark.parametrize(("seconds", "factor"), [(40.0, 1.0), (50.0, 1.0), (100.0, 0.25)])
@pytest.mark.parametrize("r", [1, 2, 30])
def test_the_utility_of_the_repository(seconds: float, factor: float, r: int) -> None:
    want = (7.5 + math.sqrt(0.1 * math.log(r) / r)) * factor
    close(repo_utility(7.5, r, r, seconds, 50.0, alpha=2.0), want)


def oort_by_hand(
    rewards: Sequence[float],
    tried: Sequence[bool],
    last: Sequence[int],
    seconds: Sequence[float],
    preferred: float,
    r: int,
) -> list[float]:
    """u_i of each client that was tried, NaN of the others, whose rewards are their sizes."""
    positive = sorted(x for x in rewards if x > 0)
    cap = positive[min(math.floor(0.98 * len(positive)), len(positive) - 1)]
    low = 0.999 * positive[0]
    spread = max(positive[-1] - low, 1e-4)
    out = []
    for x, known, at, t in zip(rewards, tried, last, seconds, strict=True):
        u = (min(x, cap) - low) / spread + math.sqrt(0.1 * math.log(r) / max(at, 1))
        u *= (preferred / max(1e-4, t)) ** 2 if t > preferred else 1.0
        out.append(u if known else math.nan)
    return out


@pytest.mark.parametrize("n", [1, 2, 7, 50, 51, 120])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_oorts_utilities_are_normalised_clipped_and_grow_while_a_client_is_away(n: int, share: float) -> None:
    """From 50 clients on the largest is clipped; the range is that before clipping, untried clients' sizes in it."""
    utility, seconds = numbers(n, 1, 2, 30), numbers(n, 2, 10, 40)
    tried = [(i + 0.5) / n < share for i in range(n)]
    sizes = [float(1 + 7 * i % 40) for i in range(n)]
    last = [1 + i % 9 if known else 0 for i, known in enumerate(tried)]
    rewards = [float(u) if known else size for u, size, known in zip(utility, sizes, tried, strict=True)]
    told = torch.tensor([u if known else math.nan for u, known in zip(rewards, tried, strict=True)], dtype=F64)
    for preferred in (25.0, math.inf):
        got = oort_utilities(told, sizes, last, 12, seconds, preferred)
        close(got, oort_by_hand(rewards, tried, last, seconds.tolist(), preferred, 12), 1e-10)


def test_equal_utilities_are_divided_by_no_less_than_a_ten_thousandth() -> None:
    got = oort_utilities(torch.tensor([0.05, 0.05], dtype=F64), [1, 1], [3, 3], 3, [1.0, 1.0], 5.0)
    close(got, [0.5 + math.sqrt(0.1 * math.log(3) / 3)] * 2, 1e-9)


def test_utilities_of_nought_are_no_part_of_the_range_and_no_client_is_worth_less_than_nothing() -> None:
    got = oort_utilities(torch.tensor([0.0, 4.0, 8.0], dtype=F64), [1.0] * 3, [2, 2, 2], 2, [1.0] * 3, 5.0)
    bonus = math.sqrt(0.1 * math.log(2) / 2)
    spread = 8 - 0.999 * 4
    close(got, [bonus, 0.001 * 4 / spread + bonus, 1.0 + bonus], 1e-9)


def test_what_a_client_has_not_told_is_that_of_its_device() -> None:
    told = torch.tensor([math.nan, 3.0, math.nan, math.nan], dtype=F64)
    assert repr(filled({1: 7.0, 3: 5.0}, told).tolist()) == repr([math.nan, 3.0, math.nan, 5.0])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_reports_that_are_no_numbers_teach_nothing(wrong: float) -> None:
    known = begin(2)
    for number, r in ((1, ClientReport(10.0, 40.0, 1.0, 5.0, 6.0)), (2, ClientReport(10.0, wrong, 1.0, wrong, wrong))):
        known = updated(known, Outcome(number, (0, 1), (0,), {0: r}))
    assert [float(known.values[name][0]) for name in ("utility", "seconds", "joules")] == [20.0, 5.0, 6.0]
    assert known.last.tolist() == [2, 0]
    assert known.chosen.tolist() == [2, 2]
    assert known.silent.tolist() == [0, 2]


def reports_of(utility: Sequence[float], seconds: Sequence[float], joules: Sequence[float]) -> dict[int, ClientReport]:
    return {
        i: ClientReport(10.0, u * u / 10, u / 10, t, e)
        for i, (u, t, e) in enumerate(zip(utility, seconds, joules, strict=True))
    }


@pytest.mark.parametrize("variant", ["oort", "repo"])
@pytest.mark.parametrize("untried", ["optimistic", "zero"])
def test_a_clients_worth_has_both_penalties_and_who_was_never_tried_is_worth_the_best(
    variant: str, untried: str
) -> None:
    """T* and E* are 1.2 times the medians of what is known."""
    u, t, e = [9.0, 4.0, 6.5, 8.0], [20.0, 22.0, 50.0, 24.0, 21.0, 90.0], [60.0, 90.0, 50.0, 200.0, 70.0, 80.0]
    of = Utility(variant=variant, untried=untried)
    known = begin(6)
    told = reports_of(u, t[:4], e[:4])
    for number, who in ((1, (0, 1, 2)), (2, (3, 1))):
        known = of.learn(known, Outcome(number, who, who, {i: told[i] for i in who}))
    last = [1, 2, 1, 2]
    # what a client has told goes before what is known of its device
    of_devices = [999.0, 1.0, 999.0, 1.0]
    candidates = Candidates(
        range(6), [10] * 6, 3, round=4,
        seconds=dict(enumerate([*of_devices, *t[4:]])), joules=dict(enumerate([*of_devices, *e[4:]])),
    )  # fmt: skip
    wanted_s, wanted_j = 1.2 * 23.0, 1.2 * 75.0
    assert of.preferred(known, candidates) == (pytest.approx(wanted_s), pytest.approx(wanted_j))

    if variant == "oort":
        low, spread = 0.999 * 4, 10.0 - 0.999 * 4  # the sizes of those untried are the largest rewards
        worth = [(x - low) / spread for x in u]
        bonus = [math.sqrt(0.1 * math.log(4) / at) for at in (*last, 1, 1)]
    else:
        worth, bonus = u, [math.sqrt(0.1 * math.log(at) / at) for at in last] + [0.0, 0.0]
    best = max(worth) if variant == "oort" else max(x + b for x, b in zip(u, bonus, strict=False))
    want = [
        (x + b) * min(1, wanted_s / t[i]) ** 2 * min(1, wanted_j / e[i])
        for i, (x, b) in enumerate(zip([*worth, best, best], bonus, strict=True))
    ]
    close(of.of(known, candidates), want if untried == "optimistic" else [*want[:4], 0.0, 0.0], 1e-10)
    raw = of.statistical(known, candidates)
    close(raw, [*u, 9.0, 9.0] if untried == "optimistic" else [*u, 0.0, 0.0], 1e-12)


def test_a_client_that_does_not_answer_counts_half_after_each_round_and_whole_when_it_does() -> None:
    of, known = Utility(alpha=0, beta=0), begin(2)
    told = reports_of([5.0, 5.0], [1.0, 1.0], [1.0, 1.0])
    known = of.learn(known, Outcome(1, (0, 1), (0, 1), told))
    candidates = Candidates(range(2), [10, 10], 1, round=5)
    for number, factor in ((2, 0.5), (3, 0.25)):
        known = of.learn(known, Outcome(number, (0, 1), (1,), {1: told[1]}))
        close(of.statistical(known, candidates), [5.0 * factor, 5.0])
    known = of.learn(known, Outcome(4, (0,), (0,), {0: told[0]}))
    close(of.statistical(known, candidates), [5.0, 5.0])


def test_draws_are_in_proportion_without_replacement_and_those_of_weight_nought_come_last() -> None:
    weights = [0.5, 2.0, 0.0, 1.0, 0.0]
    law: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations([0, 1, 3], 2):
        first = weights[order[0]] / 3.5
        law[order] = first * weights[order[1]] / (3.5 - weights[order[0]])
    counts = dict.fromkeys(law, 0)
    rng = gen(0)
    last = []
    for _ in range(4000):
        got = draw(torch.tensor(weights, dtype=F64), 5, rng)
        counts[tuple(got[:2])] += 1
        assert sorted(got[3:]) == [2, 4]
        last.append(got[4])
    assert sum((counts[s] - 4000 * p) ** 2 / (4000 * p) for s, p in law.items()) < 25
    assert 1800 < sum(x == 2 for x in last) < 2200
    assert draw(torch.tensor(weights, dtype=F64), 2, gen(3)) == draw(torch.tensor(weights, dtype=F64), 2, gen(3))
    assert all(draw(torch.tensor([math.nan, 1.0], dtype=F64), 1, gen(seed)) == [1] for seed in range(20))


def additive(sets: Sequence[Sequence[int]], n: int) -> Tensor:
    matrix = torch.zeros(len(sets), n, dtype=F64)
    for k, s in enumerate(sets):
        matrix[k, list(s)] = 1
    return matrix


def numbers(n: int, seed: int, low: float = 0.5, high: float = 9.0) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=gen(seed), dtype=F64)


def test_the_additive_score_is_the_sum_over_the_set_and_its_optimum_the_largest() -> None:
    u = numbers(7, 1)
    every = list(itertools.combinations(range(7), 3))
    got = additive_score(additive(every, 7), u)
    close(got, [sum(float(u[i]) for i in s) for s in every])
    close(got.max(), sum(sorted(u.tolist())[-3:]))


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (0.0, 0.0), (1.0, 2.0)])
def test_the_group_score_takes_the_slowest_and_the_sum_of_the_joules(alpha: float, beta: float) -> None:
    stat, t, e = numbers(7, 1), numbers(7, 2, 10, 80), numbers(7, 3, 20, 300)
    every = [s for k in (1, 2, 3, 4) for s in itertools.combinations(range(7), k)]
    longest, most = 40.0, 350.0
    got = group_score(additive(every, 7), stat, t, e, longest, most, alpha, beta)
    want = [
        sum(float(stat[i]) for i in s)
        * min(1.0, longest / max(float(t[i]) for i in s)) ** alpha
        * min(1.0, most / sum(float(e[i]) for i in s)) ** beta
        for s in every
    ]
    close(got, want, 1e-10)


def test_the_measured_score_is_the_gain_under_the_penalties() -> None:
    close(measured_score(0.12, 80.0, 300.0, 40.0, 600.0, 2.0, 1.0), 0.12 * 0.25)
    close(measured_score(0.12, 20.0, 1200.0, 40.0, 600.0, 2.0, 1.0), 0.12 * 0.5)
    close(measured_score(0.12, 80.0, 1200.0, 40.0, 600.0, 2.0, 1.0), 0.12 * 0.125)
    close(measured_score(-0.1, 20.0, 300.0, 40.0, 600.0, 2.0, 1.0), -0.1)
    close(measured_score(0.12, None, None, 40.0, 600.0, 2.0, 1.0), 0.12)


# ---- devices (4.7)
def test_extra_seconds_are_pareto_and_capped() -> None:
    u = np.array([0.0, 0.5, 0.75, 0.999])
    close(pareto(u, 1.0, 60.0), [0.0, 1.0, 3.0, 60.0])
    close(pareto(u, 2.0, 60.0)[:3], [0.0, math.sqrt(2) - 1, 1.0])
    close(pareto(u, 0.5, 60.0), [0.0, 3.0, 15.0, 60.0])
    got = pareto(np.linspace(0, 1, 1000, endpoint=False), 1.0, 60.0)
    assert (np.diff(got) >= 0).all()
    close(np.median(got), 1.0, 0.01)
    assert (got == 60).mean() == pytest.approx(1 / 61, abs=0.002)


def test_training_seconds_are_epochs_of_the_base_and_the_extra() -> None:
    close(training_seconds(5, 10.0, 3.0), 65.0)
    close(training_seconds(1, 10.0, 0.0), 10.0)


def test_a_shared_link_is_divided_by_the_clients_and_a_separate_one_is_not() -> None:
    close(transfer_seconds(8e6, 100e6, 4, "shared"), 0.32)
    close(transfer_seconds(8e6, 100e6, 4, "separate"), 0.08)
    close(transfer_seconds(8e6, 100e6, 1, "shared"), 0.08)


def test_joules_are_the_class_power_while_training_and_one_watt_on_the_radio() -> None:
    close(energy(6.0, 65.0, 1.0, 2.5), 392.5)
    close(energy(2.0, 0.0, 1.0, 2.5), 2.5)
    close(energy(2.0, 10.0, 0.0, 2.5), 20.0)


def fleet(epoch_s: Sequence[float], watts: Sequence[float], link: str = "shared") -> Fleet:
    return Fleet(tuple(epoch_s), tuple(watts), radio_watts=1.0, bandwidth=1e6, link=link)


def test_a_calls_latency_is_the_longest_and_its_energy_the_sum() -> None:
    devices = fleet([10.0, 14.0, 70.0, 11.0], [2.0, 4.0, 6.0, 8.0])
    training = {k: devices.seconds(k, 5) for k in (0, 1, 3)}
    down, up = {0: 1000, 1: 1000, 3: 1000}, {0: 500, 1: 2500, 3: 500}
    got = devices.call(training, down, up, called=3, per_round=4)
    transfer = {k: 3 * 8 * (down[k] + up[k]) / 1e6 for k in training}
    close(got.seconds, max(training[k] + transfer[k] for k in training))
    close(got.joules, sum(w * training[k] + transfer[k] for k, w in ((0, 2.0), (1, 4.0), (3, 8.0))), 1e-9)
    assert training[1] == 70.0


def test_each_clients_own_sum_counts_not_the_longest_training_and_the_longest_transfer() -> None:
    devices = fleet([10.0, 9.9], [2.0, 4.0], "separate")
    got = devices.call({0: 10.0, 1: 9.9}, {0: 0, 1: 125_000}, {0: 0, 1: 0}, called=2, per_round=2)
    close(got.seconds, 10.9)


@pytest.mark.parametrize("link", ["shared", "separate"])
def test_with_equal_devices_the_latency_is_the_same_for_whomever_is_selected(link: str) -> None:
    devices = fleet([12.0] * 5, [2.0, 4.0, 6.0, 8.0, 2.0], link)
    latencies = {
        devices.call(dict.fromkeys(s, 24.0), dict.fromkeys(s, 9000), dict.fromkeys(s, 9000), 3, 3).seconds
        for s in itertools.combinations(range(5), 3)
    }
    assert len(latencies) == 1


def test_devices_are_classes_in_turn_with_lomax_speeds_that_depend_on_seed_and_number_alone() -> None:
    few, many = Simulated().fleet(6, 3), Simulated().fleet(400, 3)
    assert few is not None
    assert few.watts == (2.0, 4.0, 6.0, 8.0, 2.0, 4.0)
    assert many.epoch_s[:6] == few.epoch_s
    assert Simulated().fleet(6, 4).epoch_s != few.epoch_s
    extra = np.array(many.epoch_s) - 10
    assert extra.min() >= 0
    assert extra.max() == 60
    close(np.median(extra), 1.0, 0.2)
    close((extra <= 3).mean(), 0.75, 0.06)
