"""Partitions: which client holds which training rows. Each is a pure function of labels (of owners: `natural`) and
a generator.

K clients, n rows, n_c rows of class c, C classes (those that occur, in ascending order). No row has two holders;
where the law of a partition leaves rows to nobody, its docstring says so. What is done with the rows is not said here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

NAMES = {
    "iid": "fldist.data.partition:Iid",
    "unbalanced": "fldist.data.partition:Unbalanced",
    "equal": "fldist.data.partition:Equal",
    "quantity": "fldist.data.partition:Quantity",
    "feature_noise": "fldist.data.partition:FeatureNoise",
    "dirichlet": "fldist.data.partition:Dirichlet",
    "dirichlet_min": "fldist.data.partition:DirichletMin",
    "dirichlet_client": "fldist.data.partition:DirichletClient",
    "dirichlet_equal": "fldist.data.partition:DirichletEqual",
    "classes": "fldist.data.partition:Classes",
    "mixed": "fldist.data.partition:Mixed",
    "shards": "fldist.data.partition:Shards",
    "pathological": "fldist.data.partition:Pathological",
    "natural": "fldist.data.partition:Natural",
}

Rows = NDArray[np.int64]
Shares = NDArray[np.float64]
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


# ---- every client's rows are alike
@dataclass(frozen=True)
class Iid:
    """A random permutation in K nearly equal consecutive parts, the first n mod K one row longer."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), num_clients)]


@dataclass(frozen=True)
class Unbalanced:
    """As `iid`, then client k keeps the first floor(n_k u_k) of its n_k drawn rows, u_k ~ U(low, high).

    The permutation is drawn first, then u_1 ... u_K. Rows not kept are left out. Source: the code of AutoFLIP
    (Interno et al., arXiv 2405.10271), `src/loaders/split.py`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    low: Fraction = 0.95
    high: Fraction = 0.99

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        if self.low > self.high:
            raise ValueError(f"task.partition.low: {self.low} is above high ({self.high}); lower it")
        parts = np.array_split(rng.permutation(len(labels)), num_clients)
        kept = rng.uniform(self.low, self.high, num_clients)
        return [np.sort(part[: int(len(part) * u)]) for part, u in zip(parts, kept, strict=True)]


@dataclass(frozen=True)
class Equal:
    """A random permutation dealt out like cards: client k takes positions k, k+K, ... of its first K size rows.

    The other rows are left out. Source: the IID sampler of Plato (Li et al., https://github.com/TL-System/plato),
    which repeats rows where there are too few; here that is refused.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    size: Count

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        n = len(labels)
        _refuse_larger_parts_than_rows(self.size, num_clients, n)
        dealt = rng.permutation(n)[: num_clients * self.size]
        return [np.sort(dealt[client::num_clients]) for client in range(num_clients)]


@dataclass(frozen=True)
class Quantity:
    """Quantity skew: a random permutation cut by proportions q ~ Dirichlet(alpha 1_K).

    1. Draw a permutation of all rows. 2. Draw q until n min(q) >= min_size, at most `attempts` times. 3. Cut at
    floor(cumsum(q) n); client k gets the k-th piece. Source: "iid-diff-quantity" of NIID-Bench (Li et al.,
    "Federated Learning on Non-IID Data Silos", ICDE 2022, arXiv 2102.02079).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    alpha: Alpha = 0.5
    min_size: Annotated[int, Field(ge=0)] = 10
    attempts: Count = 1000

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        n, best = len(labels), 0.0
        _refuse_min_size(self.min_size, num_clients, n, "iid, which allows empty clients")
        order = rng.permutation(n)
        for _ in range(self.attempts):
            q = rng.dirichlet(np.full(num_clients, self.alpha))
            smallest = n * float(q.min())
            if smallest >= self.min_size:
                return [np.sort(part) for part in np.split(order, dirichlet_cuts(q, n))]
            best = max(best, smallest)
        raise _attempts_spent("quantity", self, num_clients, n, int(best), "use iid")


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on a client's inputs, drawn anew at every read, after scaling to [0, 1].

    std: its standard deviation; cell: (row, column, s), the only one of s x s equal cells of the image that it
    falls on; None: the whole image.
    """

    std: float
    cell: tuple[int, int, int] | None


@dataclass(frozen=True)
class FeatureNoise:
    """Feature skew: rows as `iid`, and noise on the inputs that differs from client to client.

    all: client k = 0 ... K-1 has standard deviation noise k/(K-1) on the whole image (0 for K = 1). cell: every
    client has standard deviation `noise`, client k on the cell in row floor(k/s) and column k mod s of s x s
    cells, s = ceil(sqrt(K)). Source: NIID-Bench (Li et al., ICDE 2022, arXiv 2102.02079), whose code takes row
    and column by the side of a cell instead of s and so leaves the image.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    where: Literal["all", "cell"] = "all"

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        return Iid().split(labels, num_clients, rng)

    def noise_of(self, client: int, num_clients: int) -> Noise:
        """The noise on the inputs of client 0 ... K-1."""
        if self.where == "cell":
            side = math.isqrt(num_clients - 1) + 1  # ceil(sqrt(K)) without rounding
            return Noise(self.noise, (client // side, client % side, side))
        return Noise(self.noise * client / (num_clients - 1) if num_clients > 1 else 0.0, None)


# ---- label skew by Dirichlet draws
@dataclass(frozen=True)
class Dirichlet:
    """Label skew: every class is divided among the clients by proportions q ~ Dirichlet(alpha 1_K).

    For class c in order: shuffle its rows, draw q, cut at floor(cumsum(q) n_c); client k gets the k-th piece.
    A client may end with no row at all. Source: Hsu et al., arXiv 1909.06335, in the per-class form.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    alpha: Alpha = 0.5

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        owner = np.full(len(labels), -1)
        for rows in rows_by_class(labels):
            shuffled = rng.permutation(rows)
            q = rng.dirichlet(np.full(num_clients, self.alpha))
            owner[shuffled] = np.repeat(np.arange(num_clients), piece_sizes(dirichlet_cuts(q, len(rows)), len(rows)))
        return _parts(owner, num_clients)


@dataclass(frozen=True)
class DirichletMin:
    """As `dirichlet`, drawn again until every client holds at least min_size rows.

    1. For class c in order: shuffle its rows; draw q ~ Dirichlet(alpha 1_K); if `balanced`, set q_k = 0 for every
       client that already holds >= n/K rows and divide q by its sum (a q whose sum is 0 is drawn again, at most
       `attempts` times, then the whole attempt has failed); cut at floor(cumsum(q) n_c); client k gets the k-th
       piece.
    2. If some client holds fewer than min_size rows, start again from 1, `attempts` times in all.

    Sources: "noniid-labeldir" of NIID-Bench (Li et al., ICDE 2022, arXiv 2102.02079), min_size 10. PFLlib and
    HtFLlib (Zhang et al., arXiv 2312.04992) with their split of 3/4 for training: min_size 40, or floor(n/K/2)
    where that is less. Without the balance, until nobody has fewer than 2: balanced false, min_size 2.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    alpha: Alpha = 0.5
    min_size: Annotated[int, Field(ge=0)] = 10
    attempts: Count = 1000
    balanced: bool = True

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        n, best = len(labels), 0
        _refuse_min_size(self.min_size, num_clients, n, "dirichlet, which allows empty clients")
        classes = rows_by_class(labels)
        for _ in range(self.attempts):
            owner = self._attempt(classes, n, num_clients, rng)
            if owner is None:
                continue
            smallest = int(np.bincount(owner, minlength=num_clients).min())
            if smallest >= self.min_size:
                return _parts(owner, num_clients)
            best = max(best, smallest)
        remedy = "use dirichlet, which allows empty clients"
        raise _attempts_spent("dirichlet_min", self, num_clients, n, best, remedy)

    def _attempt(self, classes: list[Rows], n: int, num_clients: int, rng: np.random.Generator) -> Rows | None:
        owner, held = np.full(n, -1), np.zeros(num_clients, dtype=np.int64)
        for rows in classes:
            shuffled = rng.permutation(rows)
            q = self._draw(held, n, rng)
            if q is None:
                return None
            sizes = piece_sizes(dirichlet_cuts(q, len(rows)), len(rows))
            owner[shuffled] = np.repeat(np.arange(num_clients), sizes)
            held += sizes
        return owner

    def _draw(self, held: Rows, n: int, rng: np.random.Generator) -> Shares | None:
        for _ in range(self.attempts):
            q = rng.dirichlet(np.full(len(held), self.alpha))
            if not self.balanced:
                return q
            q = without_full(q, held, n)
            total = float(q.sum())
            if total > 0:
                return q / total
        return None


@dataclass(frozen=True)
class DirichletClient:
    """Label skew client by client: client k draws its own mixture p ~ Dirichlet(alpha 1) of the classes that are left.

    1. Shuffle every class's rows; ideal = floor(n/K).
    2. For client k in order: draw p over the classes with rows left; want floor(p_c ideal) rows of class c.
    3. If some class has fewer rows left than wanted: draw p again over the classes with rows left without those,
       then u_c ~ U(0, 1) for each of them, and want floor(p_c ideal u_c); repeat 3, each time leaving out the
       classes that were short in the last draw, at most `attempts` draws for a client with the one of 2.
    4. Client k takes the next rows of each class.

    No client gets more than `ideal` rows; later ones get fewer, some perhaps none, and what is left is not used.
    Source: the code of AutoFLIP (Interno et al., arXiv 2405.10271), `src/loaders/split.py`, which does not shuffle.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    alpha: Alpha = 0.5
    attempts: Count = 1000

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        n = len(labels)
        _refuse_more_clients_than_rows("dirichlet_client", num_clients, n)
        classes = [rng.permutation(rows) for rows in rows_by_class(labels)]
        left = np.array([len(rows) for rows in classes])
        owner = np.full(n, -1)
        for client in range(num_clients):
            counts = self._counts(left, n // num_clients, rng)
            if counts is None:
                raise ValueError(
                    f"task.partition: dirichlet_client (alpha {self.alpha}, attempts {self.attempts}) found no "
                    f"mixture of the rows left for client {client} of {num_clients} ({n} rows); raise alpha or "
                    "attempts, lower clients.num_clients, or use dirichlet"
                )
            for c in np.flatnonzero(counts):
                start = len(classes[c]) - left[c]
                owner[classes[c][start : start + counts[c]]] = client
            left -= counts
        return _parts(owner, num_clients)

    def _counts(self, left: Rows, ideal: int, rng: np.random.Generator) -> Rows | None:
        short = np.zeros(len(left), dtype=np.bool_)
        for attempt in range(self.attempts):
            # never empty: all that is left is at least `ideal`, so not every class can be short
            support = np.flatnonzero((left > 0) & ~short)
            wanted = rng.dirichlet(np.full(len(support), self.alpha)) * ideal
            if attempt > 0:
                wanted *= rng.uniform(size=len(support))
            counts = np.zeros(len(left), dtype=np.int64)
            counts[support] = np.floor(wanted + 1e-9)  # a share of 1 may come out as 1 - 1e-16
            short = counts > left
            if not short.any():
                return counts
        return None


@dataclass(frozen=True)
class DirichletEqual:
    """Label skew in parts of one size: client k draws p ~ Dirichlet(alpha 1) and takes `size` rows by it.

    Client after client takes rows that nobody has yet, one after the other without replacement, a row of class c with
    probability in proportion to p_c. All other rows are left out.

    Source: the sampler of Plato (Li et al., https://github.com/TL-System/plato), by which clients may have rows in
    common; here they have none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    size: Count
    alpha: Alpha = 1.0

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        n = len(labels)
        _refuse_larger_parts_than_rows(self.size, num_clients, n)
        classes = [rng.permutation(rows) for rows in rows_by_class(labels)]
        left = np.array([len(rows) for rows in classes])
        owner = np.full(n, -1)
        for client in range(num_clients):
            p = rng.dirichlet(np.full(len(left), self.alpha))
            # A row comes at its exponential clock of rate p_c; of m left in a class the next comes after a time of rate
            # m p_c. In logarithms, since p_c may be 1e-300, or 0.
            spans = rng.exponential(size=(len(left), self.size))
            there = np.maximum(left[:, None] - np.arange(self.size), 0)
            with np.errstate(divide="ignore"):
                clocks = np.log(np.cumsum(spans / np.maximum(there, 1), axis=1)) - np.log(p)[:, None]
            clocks[there == 0] = np.nan  # sorts last: there is no such row
            first = np.argsort(clocks, axis=None, kind="stable")[: self.size]
            for c, count in enumerate(np.bincount(first // self.size, minlength=len(left)).tolist()):
                start = len(classes[c]) - left[c]
                owner[classes[c][start : start + count]] = client
                left[c] -= count
        return _parts(owner, num_clients)


# ---- a few classes a client
@dataclass(frozen=True)
class Classes:
    """Label skew: every client holds k = per_client classes, each class shared equally by its holders.

    1. Client i = 0, 1, ... gets class i mod C, then k - 1 distinct others, drawn uniformly.
    2. For class c in order: shuffle its rows and split them in as many nearly equal parts as it has holders, the
       first ones longer, handed out in client order.

    A class that nobody drew (possible for K < C) is left out. Source: "noniid-#label<k>" of NIID-Bench (Li et al.,
    ICDE 2022, arXiv 2102.02079), whose code fails in that case.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    per_client: Count = 2

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        _refuse_more_clients_than_rows("classes", num_clients, len(labels))
        classes = rows_by_class(labels)
        _refuse_more_than_the_classes(self.per_client, len(classes))
        holds = np.zeros((num_clients, len(classes)), dtype=np.bool_)
        for client in range(num_clients):
            first = client % len(classes)
            others = np.delete(np.arange(len(classes)), first)
            holds[client, first] = True
            holds[client, rng.choice(others, self.per_client - 1, replace=False)] = True
        owner = np.full(len(labels), -1)
        for c, rows in enumerate(classes):
            holders = np.flatnonzero(holds[:, c])
            if len(holders) > 0:
                owner[rng.permutation(rows)] = np.repeat(holders, equal_sizes(len(rows), len(holders)))
        return _all_with_rows("classes", _parts(owner, num_clients))


@dataclass(frozen=True)
class Mixed:
    """Label and quantity skew: every client holds two classes, each divided by q ~ Dirichlet(alpha) among its holders.

    1. Client i = 0, 1, ... gets class i mod C. Then each client in order gets another class, drawn uniformly from those
       with fewer than ceil(2K/C) holders so far (with K = C, every class has two in the end).
    2. For class c in order: shuffle its rows; draw q ~ Dirichlet(alpha 1_h) for its h holders; cut at
       floor(cumsum(q) n_c); the pieces go to the holders in client order.
    3. If step 1 finds no class for a client, or some client holds fewer than min_size rows in the end, start again from
       1, `attempts` times in all.

    A class that nobody drew (possible for K < C) is left out. Source: "mixed" of NIID-Bench (Li et al., ICDE 2022,
    arXiv 2102.02079), whose code knows but two holders a class, for ever looks for a class that is not there, and
    requires the minimum (of 10) of proportions that it does not use.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    alpha: Alpha = 0.5
    min_size: Annotated[int, Field(ge=0)] = 10
    attempts: Count = 1000

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        n, best = len(labels), 0
        _refuse_min_size(self.min_size, num_clients, n, "classes, which shares each class equally")
        classes = rows_by_class(labels)
        if len(classes) < 2:
            raise ValueError(
                f"task.partition: mixed gives every client two classes, and the training rows have {len(classes)}; "
                "use quantity"
            )
        for _ in range(self.attempts):
            holds = self._holds(num_clients, len(classes), rng)
            if holds is None:
                continue
            owner = np.full(n, -1)
            for c, rows in enumerate(classes):
                holders = np.flatnonzero(holds[:, c])
                if len(holders) > 0:
                    shuffled = rng.permutation(rows)
                    q = rng.dirichlet(np.full(len(holders), self.alpha))
                    owner[shuffled] = np.repeat(holders, piece_sizes(dirichlet_cuts(q, len(rows)), len(rows)))
            smallest = int(np.bincount(owner + 1, minlength=num_clients + 1)[1:].min())
            if smallest >= self.min_size:
                return _parts(owner, num_clients)
            best = max(best, smallest)
        raise _attempts_spent("mixed", self, num_clients, n, best, "use classes")

    def _holds(self, num_clients: int, num_classes: int, rng: np.random.Generator) -> NDArray[np.bool_] | None:
        """Which client holds which class [K, C]; None where the last clients find no second class."""
        clients = np.arange(num_clients)
        holds = np.zeros((num_clients, num_classes), dtype=np.bool_)
        holds[clients, clients % num_classes] = True
        left = -(-2 * num_clients // num_classes) - holds.sum(axis=0)
        for client in clients:
            others = np.flatnonzero((left > 0) & ~holds[client])
            if len(others) == 0:
                return None
            second = rng.choice(others)
            holds[client, second] = True
            left[second] -= 1
        return holds


@dataclass(frozen=True)
class Shards:
    """Label skew: every client draws m = per_client shards, each of one class, as far as possible of distinct ones.

    1. K m shards are spread over the classes as equally as possible: floor(K m / C) for each and one more for the
       first (K m) mod C. For class c in order: shuffle its rows and split them in its number of nearly equal shards,
       the first ones longer. A class without a shard (K m < C) is left out.
    2. For client k in order: draw m distinct classes, uniformly over those with shards left, then for each of them
       one of its shards left, uniformly.
    3. If fewer than m classes have shards left, client k instead draws m times a class with shards left, uniformly,
       and one of its shards.

    So every client gets m shards, empty ones only where a class has fewer rows than shards. Source: McMahan et al.,
    AISTATS 2017, arXiv 1602.05629, in the form of the code of AutoFLIP (Interno et al., arXiv 2405.10271),
    `src/loaders/split.py`, where C must divide K m and step 3 may ask for a shard of a class that has none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    per_client: Count = 2

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        _refuse_more_clients_than_rows("shards", num_clients, len(labels))
        classes = rows_by_class(labels)
        left = equal_sizes(num_clients * self.per_client, len(classes))
        shards = [
            np.array_split(rng.permutation(rows), count) if count > 0 else []
            for rows, count in zip(classes, left, strict=True)
        ]
        owner = np.full(len(labels), -1)

        def take(c: int, client: int) -> None:
            owner[shards[c].pop(rng.integers(left[c]))] = client
            left[c] -= 1

        for client in range(num_clients):
            some = np.flatnonzero(left)
            if len(some) >= self.per_client:
                for c in rng.choice(some, self.per_client, replace=False):
                    take(c, client)
            else:
                for _ in range(self.per_client):
                    take(rng.choice(np.flatnonzero(left)), client)
        return _all_with_rows("shards", _parts(owner, num_clients))


@dataclass(frozen=True)
class Pathological:
    """Label skew: every client holds up to s = per_client classes, given to the clients in order.

    Every client has a budget of s classes. For class c in order:
    1. Its holders are the first ceil(K s / C) clients, in order, with budget left; if there are none, this class and
       the further ones are left out.
    2. With t holders and a = n_c/t, every holder but the last gets floor(a) rows if `balanced`; else a number of rows
       uniform over the integers in [max(a/10, least/C), a), least = min(40, floor(n/K/2)), or floor(a) where there
       is no such integer. The last holder gets the rest.
    3. Holders get consecutive rows of the class in the order of the data, not shuffled; their budgets fall by one.

    s = C, balanced, is PFLlib's IID. Source: "pat" of PFLlib (Zhang et al., arXiv 2312.04992) and HtFLlib.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    per_client: Count = 2
    balanced: bool = True

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        n = len(labels)
        _refuse_more_clients_than_rows("pathological", num_clients, n)
        classes = rows_by_class(labels)
        _refuse_more_than_the_classes(self.per_client, len(classes))
        num_holders = -(-num_clients * self.per_client // len(classes))  # rounded up
        least = min(40, n // (2 * num_clients))
        budget = np.full(num_clients, self.per_client)
        owner = np.full(n, -1)
        for rows in classes:
            holders = np.flatnonzero(budget)[:num_holders]
            if len(holders) == 0:
                break
            sizes = np.full(len(holders), len(rows) // len(holders))
            low, high = uneven_range(len(rows), len(holders), least, len(classes))
            if not self.balanced and low < high:
                sizes[:-1] = rng.integers(low, high, len(holders) - 1)
            sizes[-1] = len(rows) - sizes[:-1].sum()
            owner[rows] = np.repeat(holders, sizes)
            budget[holders] -= 1
        return _all_with_rows("pathological", _parts(owner, num_clients))


# ---- as the data came about
@dataclass(frozen=True)
class Natural:
    """Every client is an owner of rows (a writer, a speaker), as the data set says: it holds all rows of its owner.

    Client i is the i-th owner, in the data set's order, of those who take part: the `first` K, or K drawn uniformly at
    `random`. Owners without training rows (`task.subset` took them all) do not count. Rows of the others are left out.
    Test rows go with their owners, see `task.Task`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    by: ClassVar[str] = "owner"  # instead of labels

    choice: Literal["first", "random"] = "first"

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n], here the owner of each row -> K arrays of row numbers, each ascending."""
        owners = np.unique(labels)
        if num_clients > len(owners):
            raise ValueError(
                f"clients.num_clients: {num_clients} clients cannot each be an owner of training rows, for there are "
                f"{len(owners)}; lower it to at most {len(owners)}"
            )
        chosen = owners if self.choice == "first" else rng.permutation(owners)
        return rows_by_owner(labels, np.sort(chosen[:num_clients]))


# ---- steps
def rows_by_owner(owner: Rows, chosen: Rows) -> list[Rows]:
    """The rows of each chosen owner, ascending; owner: of each row [n]; chosen: owners [K], ascending."""
    place = np.searchsorted(chosen, owner)
    found = np.append(chosen, -1)[place] == owner
    return _parts(np.where(found, place, -1), len(chosen))


def rows_by_class(labels: Rows) -> list[Rows]:
    """The rows of each class that occurs, ascending; classes in ascending order."""
    _, counts = np.unique(labels, return_counts=True)
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1]) if len(labels) else []


def equal_sizes(total: int, parts: int) -> Rows:
    """The sizes [parts] of nearly equal parts, the first total mod parts one larger."""
    return np.full(parts, total // parts) + (np.arange(parts) < total % parts)


def dirichlet_cuts(q: Shares, size: int) -> Rows:
    """The K-1 inner cut positions floor(cumsum(q) size), q [K] summing to 1.

    1e-9 is added before flooring, so that a sum such as 0.1 + 0.2 does not lose a row to rounding. For the same
    reason all positions after the last q > 0 are `size`: who has no share gets no row.
    """
    cuts = np.floor(np.cumsum(q)[:-1] * size + 1e-9).astype(np.int64)
    cuts[len(q) - 1 - np.argmax(q[::-1] > 0) :] = size
    return cuts


def piece_sizes(cuts: Rows, size: int) -> Rows:
    """The sizes [K] of the pieces between K-1 inner cut positions."""
    return np.diff(cuts, prepend=0, append=size)


def without_full(q: Shares, held: Rows, n: int) -> Shares:
    """Shares q [K], 0 for every client that holds >= n/K rows; not normalised."""
    return np.where(held * len(q) >= n, 0.0, q)


def uneven_range(size: int, holders: int, least: int, num_classes: int) -> tuple[int, int]:
    """(low, high): low <= x < high are the integers in [max(a/10, least/C), a), a = size/holders; there may be none."""
    return max(-(-size // (10 * holders)), -(-least // num_classes)), -(-size // holders)


def _parts(owner: Rows, num_clients: int) -> list[Rows]:
    """From each row's client (-1: nobody) to each client's rows, ascending."""
    ends = np.cumsum(np.bincount(owner + 1, minlength=num_clients + 1))
    return np.split(np.argsort(owner, kind="stable"), ends[:-1])[1:]


# ---- refusals
def _refuse_larger_parts_than_rows(size: int, num_clients: int, n: int) -> None:
    if num_clients * size > n:
        raise ValueError(
            f"task.partition.size: {size} rows for each of {num_clients} clients are {num_clients * size}, but "
            f"there are {n}; lower size or clients.num_clients"
        )


def _refuse_more_clients_than_rows(name: str, num_clients: int, n: int) -> None:
    if num_clients > n:
        raise ValueError(
            f"task.partition: {name} cannot give each of {num_clients} clients a row, for there are {n}; lower "
            "clients.num_clients, or use iid or dirichlet, which allow empty clients"
        )


def _refuse_more_than_the_classes(per_client: int, num_classes: int) -> None:
    if per_client > num_classes:
        raise ValueError(
            f"task.partition.per_client: a client cannot hold {per_client} classes, for the training rows have "
            f"{num_classes}; lower it to at most {num_classes}"
        )


def _refuse_min_size(min_size: int, num_clients: int, n: int, instead: str) -> None:
    if min_size * num_clients > n:
        raise ValueError(
            f"task.partition.min_size: {min_size} rows for each of {num_clients} clients are "
            f"{min_size * num_clients}, but there are {n}; lower min_size or clients.num_clients, or use {instead}"
        )


def _attempts_spent(
    name: str, wanted: Quantity | DirichletMin | Mixed, num_clients: int, n: int, best: int, instead: str
) -> ValueError:
    return ValueError(
        f"task.partition: {name} (alpha {wanted.alpha}, min_size {wanted.min_size}) found no split of {n} rows among "
        f"{num_clients} clients in {wanted.attempts} attempts; the best one left its smallest client {best} rows. "
        f"Raise alpha, lower min_size or clients.num_clients, or {instead}"
    )


def _all_with_rows(name: str, parts: list[Rows]) -> list[Rows]:
    for client, part in enumerate(parts):
        if len(part) == 0:
            raise ValueError(
                f"task.partition: {name} leaves client {client} of {len(parts)} without a row, for its classes have "
                "too few rows; lower clients.num_clients"
            )
    return parts
