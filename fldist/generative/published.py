"""FedGCS's generator computed as its published code computes it, to compare with: the same results in more time.

Sequences are padded to as many tokens as there are clients and nothing is masked; the decoder is asked for one position
after the other, in training too; 26 rows a set; the search encodes, derives and decodes anew for each step size, and
knows no end of a sequence. What of this changes results is a choice of `networks` and `search`, too (`mask=False`, a
length of N, `online=False`, `single`, `sigmoid`, `official`), so that this module serves measurements alone. Traps of
the published code that are mere errors (ids shifted by one, seeds reset at each call) are not repeated.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, mse_loss, nll_loss, normalize

from fldist.generative.networks import Generator, Losses, State
from fldist.generative.records import decoder_inputs, padded

COPIES = 25
"""Permutations of a set, besides its ascending order."""
EPOCHS = 200
BATCH = 1024
STEPS = 101
"""Step sizes of the search, 1, 2, ..., if it does not end before."""


def joint_loss(net: Generator, rows: Tensor, labels: Tensor, trade_off: float) -> Losses[Tensor]:
    """What `networks.joint_loss` returns without masking, to rounding; for `networks.fit`."""
    h = _encode(net, rows)
    z = _pool(h)
    score = mse_loss(net.value(z).sigmoid(), labels.to(z.dtype))
    inputs, state = decoder_inputs(rows, net.num_clients), net.initial_state(z)
    steps = []
    for t in range(rows.shape[1]):
        log_probs, state = _step(net, inputs[:, t], state, h)
        steps.append(log_probs)
    sequence = nll_loss(torch.stack(steps, dim=1).flatten(0, 1), rows.flatten())
    return Losses(trade_off * score + (1.0 - trade_off) * sequence, score, sequence)


def search(
    net: Generator,
    starts: Sequence[tuple[int, ...]],
    known: Container[tuple[int, ...]],
    *,
    steps: int = STEPS,
    wanted: int | None = None,
) -> list[tuple[int, ...]]:
    """What `search.search` finds with `single` steps of size 1, 2, ... on the `sigmoid` and `official` decoding."""
    found: dict[tuple[int, ...], None] = {}
    rows = padded(starts, net.num_clients, net.num_clients)
    for size in range(1, steps + 1):
        if len(found) == wanted or not starts:
            break
        with torch.no_grad():
            e = _encode(net, rows)
        e.requires_grad_()
        (g,) = torch.autograd.grad(net.value(_pool(e)).sigmoid().sum(), e)
        with torch.no_grad():
            moved = normalize(e + size * g, dim=2, eps=1e-12)
            tokens = _decode(net, moved).tolist()
        for row in tokens:
            ids = tuple(sorted({*row} - {net.num_clients}))
            if ids and ids not in known and len(found) != wanted:
                found[ids] = None
    return list(found)


def _encode(net: Generator, rows: Tensor) -> Tensor:
    h, _ = net.encoder.lstm(net.encoder.embedding(rows))
    return normalize(h, dim=2, eps=1e-12)


def _pool(h: Tensor) -> Tensor:
    return normalize(h.mean(1), dim=1, eps=1e-12)


def _step(net: Generator, tokens: Tensor, state: State, h: Tensor) -> tuple[Tensor, State]:
    """Log-probabilities [B, N + 1] after the tokens [B], and the state."""
    decoder = net.decoder
    o, (hidden, cell) = decoder.lstm(decoder.embedding(tokens)[:, None], (state[0][None], state[1][None]))
    weights = (decoder.query(o) @ h.transpose(1, 2)).softmax(2)
    joined = decoder.combine(torch.cat([weights @ h, o], dim=2)).tanh()
    return log_softmax(decoder.output(joined)[:, 0], dim=1), (hidden[0], cell[0])


def _decode(net: Generator, e: Tensor) -> Tensor:
    state = net.initial_state(_pool(e))
    last = torch.full((len(e),), net.num_clients, device=e.device)
    tokens = []
    for _ in range(net.num_clients):
        log_probs, state = _step(net, last, state, e)
        last = log_probs.argmax(1)
        tokens.append(last)
    return torch.stack(tokens, dim=1)
