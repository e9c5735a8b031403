"""Devices that are simulated: how long clients take to train and to exchange, and what energy that costs. Section
`devices`.

A run on one machine says nothing about phones: all its clients compute equally fast. So every client is given a device,
a speed and a power drawn from a law, from which a simulated clock follows. It is told beside the measured one and
changes nothing that was measured. Here is the arithmetic, which knows neither messages nor ranks; who counts the bytes
is `runtime/caller.py`, who counts the epochs `ClientData`.

Source of the laws, of the seconds of an epoch and of the shared link: Plato (Li et al.,
https://github.com/TL-System/plato), which selectors of clients are commonly tried on. Joules are power times time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import NormalDist
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from fldist import resolve
from fldist.seeding import numpy_generator
from fldist.units import to_bits_per_second

NAMES = {
    "none": "fldist.devices:Unsimulated",
    "simulated": "fldist.devices:Simulated",
    "scripted": "fldist.devices:Scripted",
}
"""What simulates devices, by the name that a configuration gives it."""

LAWS = {
    "pareto": "fldist.devices:Pareto",
    "normal": "fldist.devices:Normal",
    "zipf": "fldist.devices:Zipf",
    "uniform": "fldist.devices:Uniform",
}
"""The laws of `devices.speeds` by name."""

Floats = NDArray[np.float64]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bandwidth = Annotated[float, BeforeValidator(to_bits_per_second), Field(gt=0, allow_inf_nan=False)]
Link = Literal["shared", "separate", "published"]
"""How the clients of a call share the server's link: equally; not at all, each has one of its own; or equally as Plato
has it, see `transfer_seconds`."""


# ---- arithmetic
def pareto(u: Floats, kappa: float, cap: float) -> Floats:
    """min((1 - u)^(-1/kappa) - 1, cap): the Lomax law that numpy and Plato call Pareto. u in [0, 1), any shape."""
    with np.errstate(over="ignore"):  # beyond the largest float is beyond the cap
        return np.minimum((1.0 - u) ** (-1.0 / kappa) - 1.0, cap)


def training_seconds(epochs: float, epoch_s: float, extra_s: float) -> float:
    """E (tau + x): every epoch takes tau seconds and those by which the device is slower."""
    return epochs * (epoch_s + extra_s)


def transfer_seconds(bits: float, bandwidth: float, clients: int, link: Link = "shared") -> float:
    """Seconds that one client's message takes in one direction. bandwidth: bit/s of one direction.

    shared: `clients` messages go at once and get the same part of the bandwidth; separate: this one has all of it;
    published: as shared, and a Mbit/s is 2^20 bit/s (Plato divides MiB times 8 by 100).
    """
    if link == "published":
        bandwidth = bandwidth / 1e6 * 2**20
    return bits * (1 if link == "separate" else clients) / bandwidth


def energy(watts: float, training_s: float, radio_watts: float, transfer_s: float) -> float:
    """Joules of one client: its power while it trains, its radio's while it exchanges."""
    return watts * training_s + radio_watts * transfer_s


class Cost(NamedTuple):
    """What a call, a round or a run takes: seconds (the clients of a call work at once), joules (of all of them)."""

    seconds: float = 0.0
    joules: float = 0.0

    def plus(self, other: Cost) -> Cost:
        """One after the other."""
        return Cost(self.seconds + other.seconds, self.joules + other.joules)


@dataclass(frozen=True)
class Fleet:
    """The devices of a run's clients, the same at every rank. Tuples have an entry a client.

    epoch_s: seconds of a local epoch; watts: while it trains; training_s: seconds of a training however many epochs it
    has, besides these; pauses_s: the host really sleeps as long after each epoch and training is measured, so that
    nothing but exchanges is simulated; None: training is simulated and nobody sleeps. ValueError for what cannot be.
    """

    epoch_s: tuple[float, ...]
    watts: tuple[float, ...]
    training_s: tuple[float, ...] | None = None
    pauses_s: tuple[float, ...] | None = None
    radio_watts: float = 1.0
    bandwidth: float = 1e8
    link: Link = "shared"

    def __post_init__(self) -> None:
        for name in ("epoch_s", "watts", "training_s", "pauses_s"):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) != len(self.epoch_s):
                raise ValueError(f"{name}: {len(values)} values for {len(self.epoch_s)} clients")
            wrong = [client for client, value in enumerate(values) if not 0 <= value < math.inf]
            if wrong:
                raise ValueError(f"{name}: {values[wrong[0]]} of client {wrong[0]}; it must be finite and at least 0")

    @property
    def num_clients(self) -> int:
        """How many devices there are."""
        return len(self.epoch_s)

    @property
    def sleeps(self) -> bool:
        """Whether hosts sleep, so that the seconds of a training are measured."""
        return self.pauses_s is not None

    def seconds(self, client: int, epochs: float) -> float:
        """Simulated seconds in which a client trains so many epochs; 0 for none."""
        if not epochs:
            return 0.0
        once = 0.0 if self.training_s is None else self.training_s[client]
        return once + epochs * self.epoch_s[client]

    def joules(self, client: int, seconds: float) -> float:
        """What a client spends in so many seconds of training."""
        return energy(self.watts[client], seconds, 0.0, 0.0)

    def profile(self, epochs: float) -> tuple[dict[int, float], dict[int, float]]:
        """Seconds and joules of a training of so many epochs, by client: what is known of a device beforehand."""
        seconds = {client: self.seconds(client, epochs) for client in range(self.num_clients)}
        return seconds, {client: self.joules(client, took) for client, took in seconds.items()}

    def call(
        self,
        training_s: Mapping[int, float],
        down: Mapping[int, int],
        up: Mapping[int, int],
        called: int,
        per_round: int,
    ) -> Cost:
        """What a call takes: the longest of its clients' times, the sum of their joules; 0 without a client.

        training_s: by client whose reply was used; down, up: bytes of its messages; called: the clients of the call,
        whatever came of them; per_round: how many a round is to have, by which `published` divides the way up.
        """
        longest = joules = 0.0
        for client, seconds in sorted(training_s.items()):
            ways = ((down, called), (up, per_round if self.link == "published" else called))
            transfer_s = sum(
                transfer_seconds(8 * size.get(client, 0), self.bandwidth, clients, self.link) for size, clients in ways
            )
            longest = max(longest, seconds + transfer_s)
            joules += energy(self.watts[client], seconds, self.radio_watts, transfer_s)
        return Cost(longest, joules)


# ---- laws of how much slower devices are
@dataclass(frozen=True)
class Speeds:
    """Base of the laws: by how many seconds a device's epoch is longer. A subclass's fields are its configuration."""

    def extra_s(self, u: Floats) -> Floats:
        """u [N], uniform on [0, 1) -> x [N], seconds of at least 0."""
        raise TypeError(f"{type(self).__name__} does not define extra_s(self, u)")


@dataclass(frozen=True)
class Pareto(Speeds):
    """Few devices are much slower than the others: `pareto`."""

    kappa: Positive = 1.0
    cap: NonNegative = 60.0

    def extra_s(self, u: Floats) -> Floats:
        """min((1 - u)^(-1/kappa) - 1, cap)."""
        return pareto(u, self.kappa, self.cap)


@dataclass(frozen=True)
class Normal(Speeds):
    """Normally distributed; less than 0 counts as 0."""

    mean: Annotated[float, Field(allow_inf_nan=False)]
    sd: NonNegative
    cap: NonNegative = 60.0

    def extra_s(self, u: Floats) -> Floats:
        """mean + sd times the normal quantile of u, in [0, cap]."""
        standard = NormalDist()
        quantiles = np.array([standard.inv_cdf(max(value, 2.0**-53)) for value in u.tolist()], dtype=np.float64)
        return np.clip(self.mean + self.sd * quantiles, 0.0, self.cap)


@dataclass(frozen=True)
class Zipf(Speeds):
    """1, 2, 3 ... with a probability that falls as k^-s."""

    s: Annotated[float, Field(gt=1, allow_inf_nan=False)]
    cap: NonNegative = 60.0

    def extra_s(self, u: Floats) -> Floats:
        """The least k with P(X <= k) > u, at most cap."""
        from scipy.special import zeta

        low = np.ones_like(u)
        high = np.full_like(u, max(1.0, math.ceil(self.cap)))  # what is beyond is capped
        while (low < high).any():
            middle = np.floor((low + high) / 2)
            # P(X > k) = zeta(s, k + 1) / zeta(s, 1), with Hurwitz's zeta
            beyond = zeta(self.s, middle + 1) / zeta(self.s, 1) < 1.0 - u
            low, high = np.where(beyond, low, np.minimum(middle + 1, high)), np.where(beyond, middle, high)
        return np.minimum(low, self.cap)


@dataclass(frozen=True)
class Uniform(Speeds):
    """Equally likely between two numbers of seconds."""

    low: NonNegative
    high: NonNegative

    def extra_s(self, u: Floats) -> Floats:
        """low + (high - low) u; ValueError when low is above high."""
        if self.low > self.high:
            raise ValueError(f"devices.speeds.low: {self.low:g} is above high ({self.high:g}); lower it")
        return self.low + (self.high - self.low) * u


def _law(given: Any) -> Speeds:
    """The law that `pareto` or `{name: normal, mean: 10, sd: 3}` means; without a name it is Pareto's."""
    if isinstance(given, Speeds):
        return given
    named = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else None
    name = None if named is None else named.pop("name", "pareto")
    if named is None or not isinstance(name, str):
        raise ValueError("it must be the name of a law such as pareto, or {name: normal, mean: 10, sd: 3}")
    try:
        kind = resolve.from_table(LAWS, name, "name")
    except ValueError as error:
        raise resolve.wrong("name", str(error).removeprefix("name: "), name) from None
    if not (isinstance(kind, type) and issubclass(kind, Speeds)):
        raise resolve.wrong("name", f"it is no subclass of fldist.devices.Speeds; use {', '.join(LAWS)}", name)
    made: Speeds = resolve.component(kind, named, name)
    return made


# ---- the section
@dataclass(frozen=True)
class Devices:
    """Base of what the section `devices` names; a subclass is a frozen dataclass whose fields are its configuration."""

    def fleet(self, num_clients: int, seed: int) -> Fleet | None:
        """The clients' devices, the same wherever it is asked for; None: nothing is simulated.

        seed: the run's. ValueError for what cannot be, with key, value and remedy.
        """
        raise TypeError(f"{type(self).__name__} does not define fleet(self, num_clients, seed)")


@dataclass(frozen=True)
class Unsimulated(Devices):
    """`none`: there is no simulated clock."""

    def fleet(self, num_clients: int, seed: int) -> None:
        """Nothing is simulated."""
        return None


@dataclass(frozen=True)
class Simulated(Devices):
    """Devices drawn from a law: x_i seconds slower an epoch than the fastest, which takes `epoch_s` (tau).

    speeds: the law of x; watts: classes of power, which clients are given in turn (client i has number i mod their
    count) or by lot; radio_watts: while a client sends or receives. bandwidth: of the server's link in each direction,
    in bit/s (`100 Mbit/s` may be written), `link`: how its clients share it. seed: of what is drawn; null: the run's.

    mode: `simulate`: training takes E (tau + x_i) simulated seconds; `sleep`: the host sleeps x_i after each epoch and
    training takes what the section `clock` says it took. Then tau is only what selectors know beforehand.
    """

    speeds: Annotated[Speeds, BeforeValidator(_law)] = field(default_factory=Pareto)
    epoch_s: NonNegative = 10.0
    watts: Annotated[Sequence[NonNegative], Field(min_length=1)] = (2.0, 4.0, 6.0, 8.0)
    assign: Literal["round_robin", "drawn"] = "round_robin"
    radio_watts: NonNegative = 1.0
    bandwidth: Bandwidth = 1e8
    link: Link = "shared"
    mode: Literal["simulate", "sleep"] = "simulate"
    seed: Annotated[int, Field(ge=0)] | None = None

    def fleet(self, num_clients: int, seed: int) -> Fleet:
        """A client's device depends on the seed and on its number, not on how many others there are."""
        seed = seed if self.seed is None else self.seed
        extra = self.speeds.extra_s(numpy_generator(seed, "device speeds").random(num_clients))
        if self.assign == "drawn":
            classes = numpy_generator(seed, "device watts").random(num_clients) * len(self.watts)
            chosen = [self.watts[int(number)] for number in classes]
        else:
            chosen = [self.watts[client % len(self.watts)] for client in range(num_clients)]
        return Fleet(
            tuple(training_seconds(1, self.epoch_s, x) for x in extra.tolist()),
            tuple(map(float, chosen)),
            pauses_s=tuple(extra.tolist()) if self.mode == "sleep" else None,
            radio_watts=self.radio_watts,
            bandwidth=self.bandwidth,
            link=self.link,
        )


ByClient = NonNegative | Sequence[NonNegative] | Mapping[int, NonNegative]
"""A number of all clients, a list with one a client, or {client: number}."""


@dataclass(frozen=True)
class Scripted(Devices):
    """Devices as they are written down: of a test, or measured. Each by client: a number of all, a list, a mapping.

    epoch_s: seconds of a local epoch; training_s: of a whole training, however many epochs it has (one of the two);
    watts: while it trains. radio_watts, bandwidth, link: as of `simulated`.
    """

    epoch_s: ByClient | None = None
    training_s: ByClient | None = None
    watts: ByClient = 1.0
    radio_watts: NonNegative = 1.0
    bandwidth: Bandwidth = 1e8
    link: Link = "shared"

    def fleet(self, num_clients: int, seed: int) -> Fleet:
        """Nothing is drawn."""
        if (self.epoch_s is None) == (self.training_s is None):
            told = "neither" if self.epoch_s is None else "both"
            raise ValueError(f"devices.epoch_s: {told} of epoch_s and training_s is given; give one of them")
        return Fleet(
            _of_each("epoch_s", 0.0 if self.epoch_s is None else self.epoch_s, num_clients),
            _of_each("watts", self.watts, num_clients),
            training_s=None if self.training_s is None else _of_each("training_s", self.training_s, num_clients),
            radio_watts=self.radio_watts,
            bandwidth=self.bandwidth,
            link=self.link,
        )


def _of_each(name: str, given: ByClient, num_clients: int) -> tuple[float, ...]:
    """What is given, by client; ValueError where a client has none, or one that is not there has some."""
    if isinstance(given, int | float):
        return (float(given),) * num_clients
    of = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
    lacking = [client for client in range(num_clients) if client not in of]
    if lacking:
        raise ValueError(
            f"devices.{name}: client {lacking[0]} of the {num_clients} has no value, {len(of)} have one; name it, or "
            "give one number of all"
        )
    beyond = [client for client in of if not 0 <= client < num_clients]
    if beyond:
        raise ValueError(
            f"devices.{name}: there is no client {beyond[0]}, clients are 0 to {num_clients - 1}; leave it out, or "
            "raise clients.num_clients"
        )
    return tuple(float(of[client]) for client in range(num_clients))


def known_fields() -> list[str]:
    """The keys that the section's own devices and laws take, dotted."""
    found: list[str] = []
    for table, prefix in ((NAMES, ""), (LAWS, "speeds.")):
        for name in table:
            found += [f"{prefix}{f.name}" for f in fields(resolve.from_table(table, name, "name"))]
    return found
