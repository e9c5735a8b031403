"""Random directions: Philox as published, the documented layout, the laws' moments, the same bits however asked."""

import hashlib
import math
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from fldist import directions as module
from fldist.directions import Directions, held, philox
from tests.needs import needs_gpus

LAWS = ["rademacher", "sphere"]
SIZES = [1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 784, 1000]
KEY = 0x0123456789ABCDEF
LAST = 2**32 - 1
GOLDEN = "57b7f031fb9a0fe20bcbf44430b9da5b5bf96327a776a54ac5fe83b252b29b77"


def plain_philox(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The definition, in Python's integers."""
    x, k = counter, (key % 2**32, key // 2**32)
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = (b // 2**32 ^ x[1] ^ k[0], b % 2**32, a // 2**32 ^ x[3] ^ k[1], a % 2**32)
        k = ((k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32)
    return x


def plain_row(asked: Directions, j: int, i: int) -> list[float]:
    """Row u_ij of the documented layout, in Python's floats."""
    per_call = 128 if asked.law == "rademacher" else 4
    calls = [plain_philox(asked.key, (b, i, j, asked.stream)) for b in range(math.ceil(asked.d / per_call))]
    if asked.law == "rademacher":
        bits = [calls[c // 128][c // 32 % 4] >> c % 32 & 1 for c in range(asked.d)]
        return [(-1 if bit else 1) / math.sqrt(asked.d) for bit in bits]
    planes: list[list[float]] = [[], [], [], []]
    for w in calls:
        for pair in (0, 2):
            radius = math.sqrt(-2 * math.log((w[pair] >> 9) * 2**-23 + 2**-24))
            angle = (w[pair + 1] - 2**31) * 2 * math.pi / 2**32
            planes[pair].append(radius * math.cos(angle))
            planes[pair + 1].append(radius * math.sin(angle))
    g = [value for plane in planes for value in plane][: asked.d]
    return [value / math.sqrt(sum(v * v for v in g)) for value in g]


def digest(block: torch.Tensor) -> str:
    return hashlib.sha256(block.numpy().tobytes()).hexdigest()


def stacked(asked: Directions) -> torch.Tensor:
    return torch.stack([asked.block(j) for j in range(asked.q)])  # [q, n, d]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


# ---- Philox
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_answers_published_with_random123(counter, key, words):
    low, high = (int(k, 16) for k in key.split())
    c = tuple(torch.tensor([int(w, 16)]) for w in counter.split())
    made = philox(low | high << 32, c)
    assert [f"{int(w):08x}" for w in made] == words.split()
    assert plain_philox(low | high << 32, tuple(int(w) for w in c)) == tuple(int(w) for w in made)


def test_philox_is_its_definition_on_any_counters_and_leaves_them_alone():
    rng = random.Random(5)
    key = rng.getrandbits(64) | 1 << 63
    counters = [tuple(rng.getrandbits(32) for _ in range(4)) for _ in range(100)] + [
        (LAST, 0, LAST, 1),
        (0, LAST, 1, 0),
    ]
    columns = tuple(torch.tensor(counters).T.contiguous())
    before = [c.clone() for c in columns]
    made = torch.stack(philox(key, columns), 1)
    assert made.dtype == torch.int64
    assert [tuple(row) for row in made.tolist()] == [plain_philox(key, c) for c in counters]
    assert all(torch.equal(a, b) for a, b in zip(columns, before, strict=True))


@pytest.mark.parametrize(
    "shapes", [((3,), (2, 1), (), ()), ((), (), (3,), (2, 1)), ((2, 1), (), (), (3,)), ((), (2, 3), (), ())]
)
def test_counters_broadcast(shapes):
    rng = torch.Generator().manual_seed(1)
    counter = tuple(torch.randint(0, 2**32, s, generator=rng) for s in shapes)
    full = tuple(c.expand(2, 3).contiguous() for c in counter)
    for words, expected in zip(philox(KEY, counter), philox(KEY, full), strict=True):
        assert words.shape == (2, 3)
        assert torch.equal(words, expected)


# ---- the layout
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("law", LAWS)
def test_rows_are_the_documented_ones(law, d):
    asked = Directions(KEY, 0xFEDCBA98, 4, 3, d, law)
    for j in (0, 3):
        block = asked.block(j)
        assert block.shape == (3, d)
        assert block.dtype == torch.float32
        assert block.is_contiguous()
        expected = torch.tensor([plain_row(asked, j, i) for i in range(3)], dtype=torch.float64)
        if law == "rademacher":
            assert torch.equal(block, expected.float())
        else:  # an angle is rounded to 24 bits; a component near 0 of a short row feels that most
            torch.testing.assert_close(block.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_bits_of_rademacher_are_fixed_for_ever():
    """A golden value: another one would change every published run."""
    assert digest(Directions(KEY, 9, 2, 40, 1000).block(1)) == GOLDEN


@pytest.mark.parametrize("law", LAWS)
def test_extreme_keys_streams_and_numbers_of_directions(law):
    asked = Directions(2**64 - 1, LAST, LAST, 2, 5, law)
    expected = torch.tensor([plain_row(asked, LAST - 1, i) for i in range(2)], dtype=torch.float64)
    torch.testing.assert_close(asked.block(LAST - 1).double(), expected, rtol=1e-5, atol=1e-6)


def test_no_word_makes_a_logarithm_of_0_or_a_row_of_0():
    edges = torch.tensor([0, 1, 511, 512, 2**31 - 1, 2**31, 2**31 + 1, LAST - 512, LAST - 511, LAST])
    radius, angle = (e.flatten() for e in torch.meshgrid(edges, edges, indexing="ij"))
    cosine, sine = module._box_muller(radius, angle)
    assert torch.isfinite(cosine).all() and torch.isfinite(sine).all()
    assert (cosine != 0).all()  # component 0 of a row is of a cosine
    assert float(cosine.abs().max()) == pytest.approx(math.sqrt(-2 * math.log(2**-24)), rel=1e-6)


def test_norms_are_summed_in_an_order_that_no_thread_changes():
    """The halves are added, element by element, until one is left."""
    rows = torch.randn(2, 1001, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for row, made in zip(rows.tolist(), module._squares(rows).flatten().tolist(), strict=True):
        terms = [v * v for v in row]
        while len(terms) > 1:
            half = (len(terms) + 1) // 2
            terms = [a + b for a, b in zip(terms[:half], [*terms[half:], 0.0], strict=False)]
        assert made == terms[0]


# ---- the laws
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("law", LAWS)
def test_every_row_has_norm_1(law, d):
    norms = Directions(KEY, 1, 2, 50, d, law).block(1).double().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("d", [6, 40])
def test_the_mean_of_d_u_u_is_the_identity(law, d):
    u = stacked(Directions(KEY, 2, 10, 10_000, d, law)).flatten(0, 1).double()
    size = 5 / math.sqrt(len(u))  # five standard deviations of an entry off the diagonal, whose variance is below 1
    assert float((d * u.T @ u / len(u) - torch.eye(d)).abs().max()) < size * (2 if law == "sphere" else 1)
    assert float(u.mean(0).abs().max()) * math.sqrt(d) < size


def test_the_components_of_sphere_are_those_of_a_uniform_point():
    """Fourth moment 3 / (d (d + 2)), and for d = 3 each component is uniform on -1 to 1."""
    u = Directions(KEY, 3, 1, 200_000, 3, "sphere").block(0).double()
    quantiles = u.sort(0).values  # Kolmogorov and Smirnov, at about 1e-5
    distance = (quantiles - torch.linspace(-1, 1, len(u), dtype=torch.float64).unsqueeze(1)).abs().max() / 2
    assert float(distance) * math.sqrt(len(u)) < 2.5
    v = Directions(KEY, 3, 1, 20_000, 20, "sphere").block(0).double()
    assert float((v**4).mean()) == pytest.approx(3 / (20 * 22), rel=0.02)


@pytest.mark.parametrize("law", LAWS)
def test_neighbours_have_nothing_in_common(law):
    first = Directions(KEY, 5, 3, 200, 500, law)
    u = stacked(first)
    pairs = {
        "sample": (u[:, 1:], u[:, :-1]),
        "direction": (u[1:], u[:-1]),
        "component": (u[..., 1:], u[..., :-1]),
        "word": (u[..., 32:], u[..., :-32]),
        "half a pair": (u[..., 125:], u[..., :-125]),
        "call": (u[..., 128:], u[..., :-128]),
        "sample and direction": (u[1:, :-1], u[:-1, 1:]),
        "stream": (stacked(replace(first, stream=6)), u),
        "key": (stacked(replace(first, key=KEY + 1)), u),
        "key, upper word": (stacked(replace(first, key=KEY + 2**32)), u),
    }
    for name, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < 5 / math.sqrt(a.numel()), name
        assert abs(correlation(a.square(), b.square())) < 5 / math.sqrt(a.numel()) or law == "rademacher", name


# ---- the same bits however they are asked for
@pytest.mark.parametrize("law", LAWS)
def test_neither_order_nor_number_nor_chunks_count(law, monkeypatch):
    asked = Directions(KEY, 7, 4, 30, 300, law)
    forwards = [asked.block(j) for j in range(4)]
    torch.rand(3)
    for j in (3, 1, 1, 0, 2):
        assert torch.equal(replace(asked).block(j), forwards[j])
    assert torch.equal(replace(asked, q=2).block(1), forwards[1])
    assert torch.equal(replace(asked, n=7).block(1), forwards[1][:7])
    for calls in (1, 100, 1 << 20):  # a row at a time, some rows, all
        monkeypatch.setitem(module.CALLS, "cpu", calls)
        assert torch.equal(asked.block(2), forwards[2])


def test_processes_with_other_numbers_of_threads_make_the_same_bytes():
    cases = [(n, d, law) for n, d in ((200, 1000), (1, 100_003)) for law in LAWS]
    expected = [digest(Directions(KEY, 11, 2, *case).block(1)) for case in cases]
    for threads in (1, 3):
        program = (
            "import hashlib, torch\n"
            "from fldist.directions import Directions\n"
            f"torch.set_num_threads({threads})\n"
            f"for case in {cases}:\n"
            f"    print(hashlib.sha256(Directions({KEY}, 11, 2, *case).block(1).numpy().tobytes()).hexdigest())\n"
            f"assert torch.get_num_threads() == {threads}\n"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.split() == expected, threads


@pytest.mark.parametrize("law", LAWS)
def test_a_gpu_makes_the_same_directions(law):
    needs_gpus()
    there = Directions(KEY, 13, 3, 100, 1000, law, torch.device("cuda:0"))
    block = there.block(2)
    assert block.device == there.device
    expected = replace(there, device=torch.device("cpu")).block(2)
    if law == "rademacher":
        assert torch.equal(block.cpu(), expected)
    else:
        torch.testing.assert_close(block.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(held(there).block(2), block)


# ---- held
@pytest.mark.parametrize("d", [5, 33, 784, 1000])
@pytest.mark.parametrize("law", LAWS)
def test_held_ones_are_the_same(law, d):
    asked = Directions(KEY, 17, 3, 20, d, law)
    kept = held(asked)
    for j in (2, 0, 1, 2):
        assert torch.equal(kept.block(j), asked.block(j))
    assert (kept.key, kept.stream, kept.q, kept.n, kept.d, kept.law) == (KEY, 17, 3, 20, d, law)
    with pytest.raises(ValueError, match="j: 3 is no direction"):
        kept.block(3)


def test_they_are_held_until_others_are_asked_for():
    asked = Directions(KEY, 19, 2, 20, 50)
    kept = held(asked)
    assert held(replace(asked)) is kept
    assert held(kept) is kept
    block = kept.block(1)
    other = held(replace(asked, stream=20))
    assert other is not kept
    assert not torch.equal(other.block(1), block)
    assert torch.equal(kept.block(1), block)  # who has them may go on
    assert held(asked) is not kept
    for changed in ({"key": 1}, {"q": 3}, {"n": 21}, {"d": 51}, {"law": "sphere"}):
        assert held(replace(asked, **changed)) is not held(asked)


def test_rademacher_is_held_as_bits():
    kept = held(Directions(KEY, 21, 1, 10, 1024))
    kept.block(0)
    assert kept._raws[0].untyped_storage().nbytes() == 10 * 1024 // 8


@pytest.mark.parametrize("law", LAWS)
def test_threads_draw_each_direction_once(law, monkeypatch):
    asked = Directions(KEY, 23, 8, 20, 100, law)
    expected = [asked.block(j) for j in range(8)]
    drawn = []
    monkeypatch.setattr(module, "philox", lambda *a: drawn.append(1) or philox(*a))
    start, failures = threading.Barrier(4), []

    def host(number: int) -> None:
        start.wait()
        for j in sorted(range(8), key=lambda k: k ^ number):
            if not torch.equal(held(asked).block(j), expected[j]):
                failures.append(j)

    threads = [threading.Thread(target=host, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(drawn) == 8


# ---- refusals
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": -1}, r"key: -1 is out of range; use 0 to 18446744073709551615"),
        ({"key": 2**64}, r"key: 18446744073709551616 is out of range"),
        ({"stream": -1}, r"stream: -1 is out of range; use 0 to 4294967295"),
        ({"stream": 2**32}, r"stream: 4294967296 is out of range"),
        ({"q": -1}, r"q: -1 is out of range"),
        ({"q": 2**32}, r"q: 4294967296 is out of range"),
        ({"n": 0}, r"n: 0 is out of range; use 1 to 4294967296"),
        ({"n": 2**32 + 1}, r"n: 4294967297 is out of range"),
        ({"d": 0}, r"d: 0 is out of range"),
        ({"d": 2**39 + 1}, r"d: .* is out of range; use 1 to 549755813888"),
        ({"d": 2**34 + 1, "law": "sphere"}, r"d: .* is out of range; use 1 to 17179869184"),
        ({"law": "gaussian"}, r"law: 'gaussian' is none; use rademacher or sphere"),
    ],
)
def test_what_is_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Directions(**{"key": 1, "stream": 2, "q": 3, "n": 4, "d": 5, **changes})


@pytest.mark.parametrize("j", [-1, 3])
def test_a_direction_that_is_none_is_refused(j):
    with pytest.raises(ValueError, match=f"^j: {j} is no direction; there are 3, from 0"):
        Directions(1, 2, 3, 4, 5).block(j)
