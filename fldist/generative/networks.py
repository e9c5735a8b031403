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
from torch.nn.functional import cross_entropy, linear, log_softmax, mse_loss, normalize

from fldist.generative.records import decoder_inputs, padded, permuted
from fldist.seeding import preserved

State = tuple[Tensor, Tensor]
"""h and c of the decoder's LSTM, [B, H] each; in a beam search [B, W, H]."""
T = TypeVar("T", Tensor, float)


class _Recurrence(torch.autograd.Function):
    """An LSTM over rows of tokens. Half the time of torch's own with H = 64, and a third with H = 32: the gates' inputs
    are looked up, all gates go through one sigmoid (tanh x = 2 sigmoid(2x) - 1, and the second x is in the weights),
    and what the backward pass multiplies by is made for all positions at once.

    table: [V, 4H], what each token adds to the gates i, f, g, o; weight: [4H, H], recurrent; in both, g's are doubled.
    h0, c0: [B, H], None for zeros. tokens: [T, B]. Returns h, [T, B, H].
    """

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, weight: Tensor, h0: Tensor | None, c0: Tensor | None, tokens: Tensor
    ) -> Tensor:
        (steps, batch), width = tokens.shape, weight.shape[1]
        gates = table.index_select(0, tokens.reshape(-1)).view(steps, batch, 4 * width)
        h, c, tanh_c = (table.new_empty(steps, batch, width) for _ in range(3))
        across = weight.t()
        for t in range(steps):
            before = h0 if t == 0 else h[t - 1]
            if before is not None:
                gates[t].addmm_(before, across)
            i, f, g, o = gates[t].sigmoid_().chunk(4, dim=1)
            torch.mul(i, g.mul_(2.0).sub_(1.0), out=c[t])
            carried = c0 if t == 0 else c[t - 1]
            if carried is not None:
                c[t].addcmul_(f, carried)
            torch.mul(c[t], 2.0, out=tanh_c[t]).sigmoid_().mul_(2.0).sub_(1.0)
            torch.mul(o, tanh_c[t], out=h[t])
        ctx.save_for_backward(weight, h0, c0, tokens, gates, c, tanh_c, h)
        ctx.rows = len(table)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_h: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None]:
        weight, h0, c0, tokens, gates, c, tanh_c, h = ctx.saved_tensors
        steps, batch, width = h.shape
        i, f, g, o = gates.chunk(4, dim=2)
        # by how much c grows with the inputs of i, f and g, and h with that of o and with c
        grown = torch.empty_like(gates)
        of_i, of_f, of_g, of_o = grown.chunk(4, dim=2)
        torch.mul(torch.addcmul(i, i, i, value=-1.0), g, out=of_i)
        if c0 is None:
            of_f[0] = 0.0
        else:
            torch.mul(torch.addcmul(f[0], f[0], f[0], value=-1.0), c0, out=of_f[0])
        torch.mul(torch.addcmul(f[1:], f[1:], f[1:], value=-1.0), c[:-1], out=of_f[1:])
        torch.mul(i, 0.5, out=of_g).mul_(1.0 - g * g)
        torch.mul(torch.addcmul(o, o, o, value=-1.0), tanh_c, out=of_o)
        of_c = torch.addcmul(o, h, tanh_c, value=-1.0)
        by_c = by_h.new_zeros(batch, width)
        by_now = by_h[steps - 1]
        for t in range(steps - 1, -1, -1):
            by_c.addcmul_(by_now, of_c[t])
            grown[t].view(batch, 4, width)[:, :3].mul_(by_c[:, None])
            of_o[t].mul_(by_now)
            by_c.mul_(f[t])
            if t:
                by_now = torch.addmm(by_h[t - 1], grown[t], weight)
        flat = grown.view(-1, 4 * width)
        by_table = flat.new_zeros(ctx.rows, 4 * width).index_add_(0, tokens.reshape(-1), flat)
        by_weight = grown[1:].view(-1, 4 * width).t() @ h[:-1].view(-1, width)
        if h0 is None:
            return by_table, by_weight, None, None, None
        by_weight.addmm_(grown[0].t(), h0)
        return by_table, by_weight, grown[0] @ weight, by_c, None


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
        """h after each of the tokens [B, T], [T, B, H], from h_0 = c_0 = initial [B, H] or zeros."""
        table, weight = self.table(), self.recurrent()
        doubled = torch.ones(4, 1, 1, dtype=table.dtype, device=table.device)
        doubled[2] = 2.0
        weight = (weight.view(4, -1, weight.shape[1]) * doubled).view_as(weight)
        table = (table.view(len(table), 4, -1) * doubled.view(1, 4, 1)).view_as(table)
        h: Tensor = _Recurrence.apply(table, weight, initial, initial, tokens.t())  # type: ignore[no-untyped-call]
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
        return self.output(self.combine(torch.cat([context, o], dim=2)).tanh())  # type: ignore[no-any-return]


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
        h = normalize(self.encoder.read(rows, None), dim=2, eps=1e-12).transpose(0, 1)
        end = rows == self.num_clients
        m = end.cumsum(1) - end.long() == 0 if self.mask else torch.ones_like(end)
        return h, m

    def pool(self, h: Tensor, m: Tensor) -> Tensor:
        """z [B, H]: the mean of h [B, T, H] over the positions m [B, T], brought to norm 1."""
        there = m.to(h.dtype)
        mean = (there[:, None] @ h)[:, 0] / there.sum(1, keepdim=True)
        return normalize(mean, dim=1, eps=1e-12)

    def value(self, z: Tensor) -> Tensor:
        """f [B] of embeddings z [B, H]; the predicted label is its sigmoid."""
        return self.evaluator(z).squeeze(-1)  # type: ignore[no-any-return]

    def log_probs(self, inputs: Tensor, h: Tensor, m: Tensor, z: Tensor) -> Tensor:
        """Log-probabilities of the next token after each of the inputs [B, T]: [B, T, N + 1], all positions at once."""
        return log_softmax(self._logits(inputs, h, m, z), dim=2)

    def _logits(self, inputs: Tensor, h: Tensor, m: Tensor, z: Tensor) -> Tensor:
        o = self.decoder.read(inputs, z).transpose(0, 1)
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
    Rows are shuffled into batches of `batch`; clip: largest total norm of a batch's gradient. NaN without an epoch.
    """
    ascending = padded(sets, length, net.num_clients)
    rows = permuted(ascending, copies, net.num_clients, rng)
    targets = labels.repeat_interleave(copies + 1)
    parameters = list(net.parameters())
    sums = torch.full((3,), torch.nan, dtype=torch.float64)
    net.train()
    for epoch in range(epochs):
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
    net.eval()
    total, score, sequence = (sums / max(len(rows), 1)).tolist()
    return Losses(total, score, sequence)


def pairwise_accuracy(target: Tensor, predicted: Tensor) -> float:
    """Of the pairs i < j of values [R], the fraction where both lists say alike whether i is at least j; 1 if none."""
    i, j = torch.triu_indices(len(target), len(target), 1)
    alike = (target[i] >= target[j]) == (predicted[i] >= predicted[j])
    return float(alike.double().mean()) if len(alike) else 1.0


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
    """In how many positions the greedy sequence that the decoder makes of rows [B, T] differs from them, in the mean.

    It runs freely: repeats are allowed; with masking it ends at its first end token.
    """
    with torch.no_grad():
        h, m = net.encode(rows)
        state: State = net.initial_state(net.pool(h, m)[:, None])
        last = torch.full_like(rows[:, :1], net.num_clients)
        done = torch.zeros_like(last, dtype=torch.bool)
        differ = 0
        for t in range(rows.shape[1]):
            logits, state = net.step_logits(last, state, h, m)
            last = logits.argmax(2).masked_fill(done, net.num_clients)
            if net.mask:
                done |= last == net.num_clients
            differ += int((last[:, 0] != rows[:, t]).sum())
    return differ / max(len(rows), 1)
