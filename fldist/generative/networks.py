"""The generator of FedGCS: a sequence encoder, an evaluator of its embeddings and a decoder, and how they are fitted.

    h_t = unit(LSTM_enc(tokens)_t),  z = unit(mean_t h_t),  f = MLP(z),  s = sigmoid(f)
    o_t = LSTM_dec(start, token_1 ... token_{t-1}) from h_0 = c_0 = z
    log p_t = log_softmax(W tanh(W_out [sum_j softmax_j(W_in o_t . h_j) h_j ; o_t]) + b)
    L = a mean (s - y)^2 - (1 - a) mean log p_t(token_t)

FedGCS: Ning et al., IJCAI 2024, arXiv 2405.06312; the networks are those of GAINS, arXiv 2302.13221. Departures from
the published code: a token is a client's id; padding is masked out of pooling, attention and loss (`mask=False`: as
published); and all positions of the teacher-forced decoder are computed at once, with the same result.

The search among the embeddings is in `search`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear, log_softmax, mse_loss

from fldist.blocks import empty
from fldist.generative.records import decoder_inputs, padded, permuted
from fldist.seeding import preserved

State = tuple[Tensor, Tensor]
"""h and c of the decoder's LSTM, [B, H] each; in a beam search [B, W, H]."""
T = TypeVar("T", Tensor, float)


class _Recurrence(torch.autograd.Function):
    """An LSTM over rows of tokens, in half the time of torch's own with H = 64 on one thread.

    What the tokens add to the gates is looked up, not multiplied. All gates go through one sigmoid, by tanh(x) =
    2 sigmoid(2x) - 1: what g gets comes doubled, c is kept doubled, and g, tanh(c) and h are kept halved. What the
    backward pass multiplies by is made for all positions at once.

    table: [V, 4H], what each token adds to the gates i, f, g, o; weight: [4H, H], what h adds; in both, g's part is
    doubled. h0, c0: [B, H], None for zeros. tokens: [B, T]. Returns h, [B, T, H].
    """

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, weight: Tensor, h0: Tensor | None, c0: Tensor | None, tokens: Tensor
    ) -> Tensor:
        (batch, steps), width = tokens.shape, weight.shape[1]
        order = tokens.t().reshape(-1)
        gates = empty((steps, batch, 4 * width), table.dtype, table.device)
        torch.index_select(table, 0, order, out=gates.view(-1, 4 * width))
        c, tanh_c, h = empty((3, steps, batch, width), table.dtype, table.device).unbind(0)
        h_before, c_before, times = h0, None if c0 is None else 2.0 * c0, 1.0
        across = weight.t()
        for a, (i, f, g, o), c_t, tanh_t, h_t in zip(gates, _gates(gates), c, tanh_c, h, strict=True):
            if h_before is not None:
                a.addmm_(h_before, across, alpha=times)
            a.sigmoid_()
            g.sub_(0.5)
            if c_before is None:
                torch.mul(i, g, out=c_t).mul_(4.0)
            else:
                torch.mul(f, c_before, out=c_t).addcmul_(i, g, value=4.0)
            torch.sigmoid(c_t, out=tanh_t).sub_(0.5)
            torch.mul(o, tanh_t, out=h_t)
            h_before, c_before, times = h_t, c_t, 2.0
        ctx.save_for_backward(weight, h0, c0, order, gates, c, tanh_c, h)
        ctx.vocabulary = len(table)
        returned = empty((batch, steps, width), table.dtype, table.device)
        torch.mul(h, 2.0, out=returned.transpose(0, 1))
        return returned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_h: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None]:
        weight, h0, c0, order, gates, c, tanh_c, h = ctx.saved_tensors
        steps, batch, width = h.shape
        # by how much c grows with the inputs of i, f and g, and h with the input of o, but for these factors
        factors = weight.new_tensor([4.0, 1.0, -4.0, 2.0]).repeat_interleave(width)
        grown, of_c = (empty(like.shape, like.dtype, like.device) for like in (gates, h))
        torch.addcmul(gates, gates, gates, value=-1.0, out=grown)
        (i, f, g, o), (of_i, of_f, of_g, of_o) = gates.chunk(4, dim=2), grown.chunk(4, dim=2)
        of_i.mul_(g)
        of_f[1:].mul_(c[:-1])
        of_f[0].mul_(0.0 if c0 is None else 2.0 * c0)
        torch.mul(g, g, out=of_g).sub_(0.25).mul_(i)
        of_o.mul_(tanh_c)
        torch.mul(tanh_c, tanh_c, out=of_c).mul_(-2.0).add_(0.5).mul_(o)  # h, with c as it is kept
        back = weight * factors[:, None]
        by_c, by_now = by_h.new_zeros(batch, width), by_h[:, -1]
        at_gates, at_f, by_steps = _gates(grown), f.unbind(0), by_h.unbind(1)
        for t in range(steps - 1, -1, -1):
            of_i, of_f, of_g, of_o = at_gates[t]
            by_c.addcmul_(by_now, of_c[t])
            for gate in (of_i, of_f, of_g):
                gate.mul_(by_c)
            of_o.mul_(by_now)
            by_c.mul_(at_f[t])
            if t:
                by_now = torch.addmm(by_steps[t - 1], grown[t], back)
        flat = grown.view(-1, 4 * width)
        by_table = flat.new_zeros(ctx.vocabulary, 4 * width).index_add_(0, order, flat).mul_(factors)
        by_weight = (grown[1:].view(-1, 4 * width).t() @ h[:-1].view(-1, width)).mul_(2.0)
        if h0 is None:
            return by_table, by_weight.mul_(factors[:, None]), None, None, None
        by_weight.addmm_(grown[0].t(), h0).mul_(factors[:, None])
        return by_table, by_weight, grown[0] @ back, by_c.mul_(2.0), None


def _gates(values: Tensor) -> list[tuple[Tensor, ...]]:
    """i, f, g and o of each step, for values [T, B, 4H]."""
    return list(zip(*(part.unbind(0) for part in values.chunk(4, dim=2)), strict=True))


class _Unit(torch.autograd.Function):
    """Vectors, the last dimension, brought to norm 1; those shorter than 1e-12 are divided by that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12)
        unit: Tensor = x / norm
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> Tensor:
        unit, norm = ctx.saved_tensors
        along = (by * unit).sum(-1, keepdim=True)
        return torch.addcmul(by, unit, along, value=-1.0).div_(norm)


def unit(x: Tensor) -> Tensor:
    """Vectors [..., H] brought to norm 1, x / max(|x|, 1e-12)."""
    return _Unit.apply(x)  # type: ignore[no-untyped-call, no-any-return]


class _Reader(nn.Module):
    """Embeds tokens and runs an LSTM over them; the modules hold the parameters under torch's names."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)

    def table(self) -> Tensor:
        """What each token adds to the four gates before their activation, [V, 4H]."""
        ((of_input, _, bias, bias_too),) = self.lstm.all_weights
        return linear(self.embedding.weight, of_input, bias + bias_too)

    def recurrent(self) -> Tensor:
        """What h adds to them, [4H, H]."""
        return self.lstm.all_weights[0][1]

    def read(self, tokens: Tensor, initial: Tensor | None) -> Tensor:
        """h after each of the tokens [B, T]: [B, T, H], from h_0 = c_0 = initial [B, H] or zeros."""
        table, weight = self.table(), self.recurrent()
        doubled = torch.ones(4, 1, 1, dtype=table.dtype, device=table.device)
        doubled[2] = 2.0
        weight = (weight.view(4, -1, weight.shape[1]) * doubled).view_as(weight)
        table = (table.view(len(table), 4, -1) * doubled.view(1, 4, 1)).view_as(table)
        h: Tensor = _Recurrence.apply(table, weight, initial, initial, tokens)  # type: ignore[no-untyped-call]
        return h


class _Decoder(_Reader):
    """The LSTM of the decoder with its attention to the encoder's outputs."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__(vocabulary, hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)  # W_in
        self.combine = nn.Linear(2 * hidden, hidden, bias=False)  # W_out
        self.output = nn.Linear(hidden, vocabulary)

    def logits(self, o: Tensor, h: Tensor, hidden: Tensor | None) -> Tensor:
        """Of the next token, [B, Q, V], for outputs o [B, Q, H] of the LSTM that attend to h [B, T, H].

        hidden: bool [B, T], where there is nothing to attend to; None for nowhere.
        """
        scores = h @ self.query(o).transpose(1, 2)  # [B, T, Q]: a softmax along the last, short dimension is slow
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, :, None], -torch.inf)
        context = scores.softmax(1).transpose(1, 2) @ h
        of_context, of_o = self.combine.weight.chunk(2, dim=1)
        joined = linear(context, of_context) + linear(o, of_o)
        return self.output(joined.tanh_())  # type: ignore[no-any-return]


class Generator(nn.Module):
    """Encoder, evaluator and decoder of sets of clients.

    num_clients: N, and the vocabulary is N + 1; hidden: H of encoder and decoder; width, layers: of the evaluator's
    hidden layers; mask: whether padding is left out of pooling, attention and loss (published: it is not).
    rng: a CPU generator, from which all parameters come as torch draws them by default; the global one is left alone.
    """

    def __init__(
        self,
        num_clients: int,
        hidden: int = 64,
        width: int = 200,
        layers: int = 2,
        mask: bool = True,
        *,
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        self.num_clients = num_clients
        self.mask = mask
        with preserved():
            torch.random.set_rng_state(rng.get_state())
            self.encoder = _Reader(num_clients + 1, hidden)
            sizes = [hidden, *[width] * layers]
            heads: list[nn.Module] = []
            for i in range(layers):
                heads += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
            self.evaluator = nn.Sequential(*heads, nn.Linear(sizes[-1], 1))
            self.decoder = _Decoder(num_clients + 1, hidden)
            rng.set_state(torch.random.get_rng_state())

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """h [B, T, H], of norm 1 at each position, and m, bool [B, T], of rows of tokens [B, T].

        m: the positions up to and including the first end token; without masking all.
        """
        h = unit(self.encoder.read(rows, None))
        end = rows == self.num_clients
        m = end.cumsum(1) - end.long() == 0 if self.mask else torch.ones_like(end)
        return h, m

    def pool(self, h: Tensor, m: Tensor) -> Tensor:
        """z [B, H]: the mean of h [B, T, H] over the positions m [B, T], brought to norm 1."""
        there = m.to(h.dtype)
        return unit((there[:, None] @ h)[:, 0] / there.sum(1, keepdim=True))

    def value(self, z: Tensor) -> Tensor:
        """f [B] of embeddings z [B, H]; the predicted label is its sigmoid."""
        return self.evaluator(z).squeeze(-1)  # type: ignore[no-any-return]

    def log_probs(self, inputs: Tensor, h: Tensor, m: Tensor, z: Tensor) -> Tensor:
        """Log-probabilities of the next token after each of the inputs [B, T]: [B, T, N + 1], all positions at once."""
        return log_softmax(self._logits(inputs, h, m, z), dim=2)

    def _logits(self, inputs: Tensor, h: Tensor, m: Tensor, z: Tensor) -> Tensor:
        o = self.decoder.read(inputs, z)
        return self.decoder.logits(o, h, None if bool(m.all()) else ~m)

    def initial_state(self, z: Tensor) -> State:
        """The decoder's state before its first step: h_0 = c_0 = z."""
        return z, z

    def step(self, tokens: Tensor, state: State, h: Tensor, m: Tensor) -> tuple[Tensor, State]:
        """Log-probabilities [B, N + 1] of what follows the tokens [B], and the state then."""
        logits, state = self.step_logits(tokens[:, None], (state[0][:, None], state[1][:, None]), h, m)
        return log_softmax(logits[:, 0], dim=1), (state[0][:, 0], state[1][:, 0])

    def step_logits(self, tokens: Tensor, state: State, h: Tensor, m: Tensor) -> tuple[Tensor, State]:
        """One step of W sequences for each of B embeddings: logits [B, W, N + 1] after tokens [B, W], and the state.

        state: h and c, [B, W, H] each; h: [B, T, H], and m: bool [B, T], are shared by the W sequences.
        """
        gates = self.decoder.table()[tokens] + linear(state[0], self.decoder.recurrent())
        i, f, g, o = gates.chunk(4, dim=2)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        out = o.sigmoid() * c.tanh()
        return self.decoder.logits(out, h, None if bool(m.all()) else ~m), (out, c)

    @torch.no_grad()
    def run_freely(self, h: Tensor, m: Tensor, z: Tensor, length: int) -> Tensor:
        """The likeliest token after each other, for exactly `length` steps: [B, length], repeats and all."""
        tokens = torch.full((len(z), length + 1, 1), self.num_clients, device=z.device)
        state = self.initial_state(z[:, None])
        for t in range(length):
            logits, state = self.step_logits(tokens[:, t], state, h, m)
            tokens[:, t + 1] = logits.argmax(2)
        return tokens[:, 1:, 0]


# ---- fitting
class Losses(NamedTuple, Generic[T]):
    """L = a score + (1 - a) sequence, and its two terms."""

    total: T
    score: T
    sequence: T


def joint_loss(net: Generator, rows: Tensor, labels: Tensor, trade_off: float) -> Losses[Tensor]:
    """L of rows of tokens [B, T] with labels [B] from 0 to 1, in means over the rows and over the rows' positions.

    trade_off: a, the weight of the score. Masked positions do not count.
    """
    h, m = net.encode(rows)
    z = net.pool(h, m)
    score = mse_loss(net.value(z).sigmoid(), labels.to(z.dtype))
    logits = net._logits(decoder_inputs(rows, net.num_clients), h, m, z)
    sequence = cross_entropy(logits.flatten(0, 1), rows.masked_fill(~m, -100).flatten(), ignore_index=-100)
    return Losses(trade_off * score + (1.0 - trade_off) * sequence, score, sequence)


def fit(
    net: Generator,
    optimizer: torch.optim.Optimizer,
    sets: Sequence[tuple[int, ...]],
    labels: Tensor,
    *,
    epochs: int,
    batch: int,
    trade_off: float,
    clip: float,
    copies: int,
    length: int,
    online: bool,
    rng: torch.Generator,
    loss: Callable[[Generator, Tensor, Tensor, float], Losses[Tensor]] = joint_loss,
) -> Losses[float]:
    """Train the networks on sets with labels [R]; returns the losses of the last epoch, in means over its rows.

    Each set is `copies + 1` rows of `length` tokens, ascending and permuted; `online`: permuted anew in each epoch.
    Rows are shuffled into batches of `batch`; clip: largest total norm of a batch's gradient. Without a set or an
    epoch nothing is done, and the losses are NaN.
    """
    ascending = padded(sets, length, net.num_clients)
    rows = permuted(ascending, copies, net.num_clients, rng)
    targets = labels.repeat_interleave(copies + 1)
    parameters = list(net.parameters())
    sums = torch.full((3,), torch.nan, dtype=torch.float64)
    for epoch in range(epochs if sets else 0):
        if online and epoch:
            rows = permuted(ascending, copies, net.num_clients, rng)
        sums = torch.zeros(3, dtype=torch.float64)
        for chosen in torch.split(torch.randperm(len(rows), generator=rng), batch):
            losses = loss(net, rows[chosen], targets[chosen], trade_off)
            optimizer.zero_grad()
            losses.total.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            sums += torch.stack(losses).detach() * len(chosen)
    total, score, sequence = (sums / max(len(rows), 1)).tolist()
    return Losses(total, score, sequence)


def pairwise_accuracy(target: Tensor, predicted: Tensor) -> float:
    """Of the pairs i < j of values [R], the fraction where both lists say alike whether i is at least j; 1 if none."""
    i, j = torch.triu_indices(len(target), len(target), 1)
    alike = (target[i] >= target[j]) == (predicted[i] >= predicted[j])
    return float(alike.double().mean()) if len(alike) else 1.0


def adam(net: Generator, lr: float) -> torch.optim.Adam:
    """Adam (betas 0.9 and 0.999, eps 1e-8) in its fused form, a fourth of the time of torch's default on a CPU."""
    return torch.optim.Adam(net.parameters(), lr, fused=True)


def net_state(net: Generator, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all that goes on in the next fit: `net.*`, the parameters, and `optimizer.<entry>.*`, what it keeps."""
    state = {f"net.{name}": p.detach().clone() for name, p in net.named_parameters()}
    for name, p in net.named_parameters():
        for entry, value in optimizer.state.get(p, {}).items():
            state[f"optimizer.{entry}.{name}"] = value.clone()
    return state


def load_state(net: Generator, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Bring networks and optimizer, made as those that `net_state` was asked of, to its state; it is copied."""
    parameters = dict(net.named_parameters())
    optimizer.state.clear()
    for key, value in state.items():
        kind, _, rest = key.partition(".")
        if kind == "net":
            with torch.no_grad():
                parameters[rest].copy_(value)
        else:
            entry, _, name = rest.partition(".")
            optimizer.state[parameters[name]][entry] = value.clone()


def hamming(net: Generator, rows: Tensor) -> float:
    """In how many positions rows [B, T] and what the decoder makes of them, running freely, differ in the mean.

    Repeats are allowed; with masking, a sequence ends at its first end token.
    """
    with torch.no_grad():
        h, m = net.encode(rows)
        made = net.run_freely(h, m, net.pool(h, m), rows.shape[1])
    if net.mask:
        ended = (made == net.num_clients).cumsum(1) > 0
        made = made.masked_fill(ended, net.num_clients)
    return float((made != rows).sum()) / max(len(rows), 1)
