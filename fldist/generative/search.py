"""New sets of clients: records moved along the evaluator's gradient in the space of embeddings, and decoded.

    g = df/de,  e <- unit(e + step g) at each position,  z = unit(mean_t e_t)

e are the encoder's outputs of a record. f depends on them through their mean alone, so that g is the same vector at all
positions, and orthogonal to z. FedGCS: Ning et al., IJCAI 2024, arXiv 2405.06312: the published ascent is one step of
growing size on sigmoid(f); beam search, without repeats, with the end token as the end, is what the paper says; the
published code decodes greedily without these (`decode_official`). Which sets are good is not asked here.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fldist.generative.networks import Generator
from fldist.generative.records import members, padded

Ascent = Literal["iterated", "single"]
Target = Literal["logit", "sigmoid"]
Decode = Literal["beam", "greedy", "official"]

_AT_ONCE = 1 << 22
"""So many values of embeddings are decoded as one batch, 16 MiB in float32."""


# ---- ascent
def gradient(net: Generator, e: Tensor, m: Tensor, target: Target) -> Tensor:
    """g [B, T, H]: of f (`logit`) or sigmoid(f) with respect to embeddings e [B, T, H]; 0 where m [B, T] is False."""
    there = m.to(e.dtype)
    return there[:, :, None] * _direction(net, e, there, target)[:, None]


@torch.no_grad()
def _direction(net: Generator, e: Tensor, there: Tensor, target: Target) -> Tensor:
    """The vector [B, H] that the gradient is at every position."""
    count = there.sum(1, keepdim=True)
    mean = (there[:, None] @ e)[:, 0] / count
    norm: Tensor = torch.linalg.vector_norm(mean, dim=1, keepdim=True).clamp(min=1e-12)
    z = mean / norm
    *layers, last = (layer for layer in net.evaluator if isinstance(layer, nn.Linear))
    x, active = z, []
    for layer in layers:
        x = layer(x).relu()
        active.append(x > 0)
    by: Tensor = last.weight.expand(len(z), -1)
    if target == "sigmoid":
        s = last(x).sigmoid()
        by = by * (s * (1.0 - s))
    for layer, on in zip(reversed(layers), reversed(active), strict=True):
        by = (by * on) @ layer.weight
    along = (by * z).sum(1, keepdim=True) * z
    return (by - along) / (norm * count)


def ascend(net: Generator, e: Tensor, m: Tensor, step: float | Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Embeddings e [B, T, H] after one step along the gradient, and their pooled embedding z [B, H]."""
    moved = normalize(e + step * gradient(net, e, m, target), dim=2, eps=1e-12)
    return moved, net.pool(moved, m)


# ---- decoding
def decode_greedy(
    net: Generator,
    e: Tensor,
    m: Tensor,
    z: Tensor,
    length: int,
    *,
    forbid_repeats: bool = True,
    low: int,
    high: int,
) -> Tensor:
    """The likeliest token after each other, [B, length], padded with N from the end token on; see `decode_beam`."""
    tokens, _ = decode_beam(net, e, m, z, length, 1, forbid_repeats=forbid_repeats, low=low, high=high)
    return tokens[:, 0]


@torch.no_grad()
def decode_beam(
    net: Generator,
    e: Tensor,
    m: Tensor,
    z: Tensor,
    length: int,
    width: int,
    *,
    forbid_repeats: bool = True,
    low: int,
    high: int,
) -> tuple[Tensor, Tensor]:
    """The `width` sequences of highest probability that a beam search finds for each of the embeddings.

    e: [B, T, H]; m: bool [B, T]; z: [B, H]. Returns tokens [B, width, length], padded with N from the end token on, and
    their log-probabilities [B, width], descending; a beam for which there is no sequence is empty, at -inf.
    The end token has probability 0 until `low` clients are out, and 1 when `high` are; with `forbid_repeats`, a client
    that is out has 0. The other tokens share what these leave. Networks whose parameters are not finite give empty
    beams. ValueError for bounds that no sequence can keep.
    """
    end, batch = net.num_clients, len(z)
    most = min(length, end) if forbid_repeats else length
    if not 0 <= low <= min(high, most):
        raise ValueError(
            f"low: {low} clients at least and high: {high} at most are no bounds for sequences of {length} tokens and "
            f"{end} clients; use 0 <= low <= high and low <= {most}"
        )
    tokens = torch.full((batch, width, length), end, device=z.device)
    scores = z.new_full((batch, width), -torch.inf)
    scores[:, 0] = 0.0
    done = torch.zeros(batch, width, dtype=torch.bool, device=z.device)
    out = torch.zeros(batch, width, end + 1, dtype=torch.bool, device=z.device)  # tokens that may not come (again)
    state = net.initial_state(z[:, None].expand(-1, width, -1))
    last = tokens[:, :, 0]
    for t in range(min(length, high)):
        logits, state = net.step_logits(last, state, e, m)
        out[:, :, end] = t < low
        logp = logits.masked_fill_(out, -torch.inf).log_softmax(2)
        logp.masked_fill_(done[:, :, None], -torch.inf)
        logp[:, :, end].masked_fill_(done, 0.0)
        if width == 1:
            best, last = logp[:, 0].max(1, keepdim=True)
            scores = scores + best
        else:
            scores, chosen = (scores[:, :, None] + logp).flatten(1).topk(width, dim=1)
            parent, last = chosen // (end + 1), chosen % (end + 1)
            at = parent[:, :, None]
            state = (_rows(state[0], at), _rows(state[1], at))
            tokens, out, done = _rows(tokens, at), _rows(out, at), done.gather(1, parent)
        tokens[:, :, t] = last
        done |= last == end
        if bool(done.all()):
            break
        if forbid_repeats:
            out.scatter_(2, last[:, :, None], True)
    return tokens.masked_fill_(~scores.isfinite()[:, :, None], end), scores


def _rows(values: Tensor, at: Tensor) -> Tensor:
    """Values [B, W, X] of the beams at [B, W, 1]."""
    return values.gather(1, at.expand(-1, -1, values.shape[2]))


def decode_official(net: Generator, e: Tensor, m: Tensor, z: Tensor, length: int) -> list[tuple[int, ...]]:
    """The sets as the published code decodes them: the likeliest token at each of exactly `length` steps, and of these
    every client that occurs anywhere, ascending: repeats make sets small, and what follows an end token counts."""
    tokens = net.run_freely(e, m, z, length).tolist()
    return [tuple(sorted({*row} - {net.num_clients})) for row in tokens]


# ---- both
def search(
    net: Generator,
    starts: Sequence[tuple[int, ...]],
    known: Container[tuple[int, ...]],
    *,
    length: int,
    ascent: Ascent,
    steps: int,
    step: float,
    target: Target,
    decode: Decode,
    width: int,
    low: int,
    high: int,
    wanted: int | None,
) -> list[tuple[int, ...]]:
    """New sets, ids ascending, in the order found: after one step all starts in their order, then after the next.

    Starts are encoded once. `iterated`: `steps` steps of size `step`, each from where the last led; `single`: each
    from the start, of sizes `step`, 2 `step`, ... Every step is decoded: by `beam` (of `width`, all its sequences) or
    `greedy`, within the bounds `low` and `high` of a set's size, or as `official`. Empty sets, those in `known` and
    repeats are left out; `wanted`, from 1: the search ends with so many (None: after the last step).
    """
    found: dict[tuple[int, ...], None] = {}
    if not starts:
        return []
    with torch.no_grad():
        e, m = net.encode(padded(starts, length, net.num_clients))
        for moved, masks, z in _path(net, e, m, ascent, steps, step, target):
            for ids in _sets(net, moved, masks, z, length, decode, width, low, high):
                if ids and ids not in known:
                    found[ids] = None
                    if len(found) == wanted:
                        return list(found)
    return list(found)


def _path(
    net: Generator, e: Tensor, m: Tensor, ascent: Ascent, steps: int, step: float, target: Target
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Embeddings, masks and pooled embeddings after the steps, several steps' at once, as many as memory lets."""
    at_once = max(1, _AT_ONCE // e.numel())
    g = gradient(net, e, m, target) if ascent == "single" else None
    for first in range(0, steps, at_once):
        moved = []
        for k in range(first, min(first + at_once, steps)):
            if g is None:
                e, _ = ascend(net, e, m, step, target)
                moved.append(e)
            else:
                moved.append(normalize(e + (k + 1) * step * g, dim=2, eps=1e-12))
        together, masks = torch.cat(moved), m.repeat(len(moved), 1)
        yield together, masks, net.pool(together, masks)


def _sets(
    net: Generator, e: Tensor, m: Tensor, z: Tensor, length: int, decode: Decode, width: int, low: int, high: int
) -> Iterator[tuple[int, ...]]:
    if decode == "official":
        yield from decode_official(net, e, m, z, length)
        return
    tokens, _ = decode_beam(net, e, m, z, length, 1 if decode == "greedy" else width, low=low, high=high)
    for row in tokens.flatten(0, 1).tolist():
        yield members(row, net.num_clients)
