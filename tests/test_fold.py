"""Folds: the arithmetic, the order of arrival, what is refused, and that refusing leaves no trace."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fldist.fold import (
    CHUNK,
    Collect,
    FixedPoint,
    FixedPointTensor,
    FoldContext,
    Mean,
    Refused,
    Sum,
    collect,
    fold_limit,
    scale_exponent,
)
from fldist.params import Layout, Params, Slot

LONG = CHUNK + 4464  # 70,000 elements: a second chunk


def model(floats, ints=()):
    floats = torch.as_tensor(floats, dtype=torch.float32)
    ints = torch.as_tensor(ints, dtype=torch.int64).reshape(-1)
    layout = Layout(
        (Slot("w", tuple(floats.shape), 0, floats.numel()),), (), (Slot("count", tuple(ints.shape), 0, ints.numel()),)
    )
    return Params(layout, floats, ints)


def begin(fold, reference, bound, integers="mean"):
    return fold.begin(FoldContext(reference, bound, integers))


def random_models(count, size, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [model(torch.randn(size, generator=rng)) for _ in range(count)]


def fold_all(fold, reference, bound, contributions, integers="mean"):
    accumulator = begin(fold, reference, bound, integers)
    for client, value, weight in contributions:
        accumulator.add(client, value, weight)
    return accumulator.result()


def bits(params):
    return params.floats.numpy().tobytes(), params.ints.numpy().tobytes()


def content(accumulator):
    return accumulator.floats.numpy().tobytes(), accumulator.ints.numpy().tobytes(), dict(accumulator.weights)


# ---- arithmetic by hand
def test_weighted_mean_of_two_models():
    zero = model([0.0, 0.0, 0.0])
    contributions = [(0, model([1.0, -2.0, 0.5]), 1.0), (1, model([3.0, 2.0, 1.5]), 3.0)]
    assert fold_all(Mean(by="n"), zero, 4.0, contributions).floats.tolist() == [2.5, 1.0, 1.25]


def test_weighted_mean_of_three_models_divides_by_the_weights_that_came_and_not_by_the_bound():
    zero = model([0.0, 0.0])
    contributions = [(0, model([1.0, 10.0]), 2.0), (1, model([4.0, -10.0]), 5.0), (2, model([-1.0, 0.0]), 3.0)]
    # (2 + 20 - 3) / 10 and (20 - 50) / 10
    result = fold_all(Mean(by="n"), zero, 1000.0, contributions)
    assert result.floats.tolist() == pytest.approx([1.9, -3.0], rel=1e-7)


def test_mean_without_weights_counts_every_reply_once():
    zero = model([0.0])
    contributions = [(c, model([v]), 1.0) for c, v in enumerate([1.0, 2.0, 6.0])]
    assert fold_all(Mean(), zero, 10.0, contributions).floats.tolist() == [3.0]


def test_a_weight_of_zero_does_not_count():
    contributions = [(0, model([5.0]), 0.0), (1, model([2.0]), 3.0)]
    assert fold_all(Mean(by="n"), model([0.0]), 3.0, contributions).floats.tolist() == [2.0]


def test_the_reference_gives_the_scale_and_is_not_part_of_the_mean():
    contributions = [(0, model([1.0, 2.0]), 1.0)]
    assert fold_all(Mean(by="n"), model([7.0, -9.0]), 1.0, contributions).floats.tolist() == [1.0, 2.0]


def test_sum_adds_floats_and_integers():
    contributions = [(c, model([v, -v], [c]), 1.0) for c, v in enumerate([0.25, 0.5, 4.0])]
    result = fold_all(Sum(), model([0.0, 0.0], [9]), 5.0, contributions)
    assert result.floats.tolist() == [4.75, -4.75]
    assert result.ints.tolist() == [0 + 1 + 2]


def test_sum_of_all_clients_at_the_limit_does_not_overflow():
    num_clients = 7
    contributions = [(c, model([64.0, -64.0]), 1.0) for c in range(num_clients)]
    result = fold_all(Sum(), model([0.0, 0.0]), float(num_clients), contributions)
    assert result.floats.tolist() == [7 * 64.0, -7 * 64.0]


def test_sum_refuses_more_replies_than_its_bound():
    accumulator = begin(Sum(), model([0.0]), 2.0)
    accumulator.add(0, model([1.0]), 1.0)
    accumulator.add(1, model([1.0]), 1.0)
    with pytest.raises(Refused) as refused:
        accumulator.add(2, model([1.0]), 1.0)
    assert refused.value.reason == "range"
    assert accumulator.result().floats.tolist() == [2.0]


@pytest.mark.parametrize("weights", [[1, 1, 1], [3, 50, 7], [144, 1, 143]])
def test_identical_models_give_that_model_bit_for_bit(weights):
    (given_model,) = random_models(1, LONG)
    contributions = [(c, given_model, float(w)) for c, w in enumerate(weights)]
    assert bits(fold_all(Mean(by="n"), given_model, 1437.0, contributions)) == bits(given_model)


def test_the_error_is_one_rounding_to_float32():
    models = random_models(11, LONG, seed=1)
    weights = np.arange(1, 12, dtype=np.float64) * 13
    reference = model(torch.zeros(LONG))
    contributions = [(c, m, float(w)) for c, (m, w) in enumerate(zip(models, weights, strict=True))]
    result = fold_all(Mean(by="n"), reference, float(weights.sum()), contributions).floats.numpy()
    exact = sum(w * m.floats.numpy().astype(np.float64) for w, m in zip(weights, models, strict=True)) / weights.sum()
    half_a_step = 0.5 * np.spacing(np.abs(exact.astype(np.float32))).astype(np.float64)
    assert np.all(np.abs(result - exact) <= half_a_step + 1e-13)


# ---- order of arrival
@st.composite
def arrivals(draw):
    """Contributions in client order, and the same in another order."""
    elements = st.floats(-64.0, 64.0, width=32)
    contribution = st.tuples(st.lists(elements, min_size=4, max_size=4), st.integers(1, 1000), st.integers(-50, 50))
    drawn = draw(st.lists(contribution, min_size=2, max_size=6))
    contributions = [(c, model(f, [i]), float(w)) for c, (f, w, i) in enumerate(drawn)]
    return contributions, draw(st.permutations(contributions))


@settings(max_examples=60, deadline=None, database=None)
@given(orders=arrivals(), integers=st.sampled_from(["mean", "max", "keep"]))
def test_a_mean_has_the_same_bits_in_every_order(orders, integers):
    contributions, shuffled = orders
    zero = model([0.0] * 4, [3])
    total = sum(w for _, _, w in contributions)
    first = fold_all(Mean(by="n"), zero, total, contributions, integers)
    assert bits(fold_all(Mean(by="n"), zero, total, shuffled, integers)) == bits(first)


@settings(max_examples=30, deadline=None, database=None)
@given(orders=arrivals())
def test_a_sum_has_the_same_bits_in_every_order(orders):
    contributions, shuffled = ([(c, m, 1.0) for c, m, _ in order] for order in orders)
    zero = model([0.0] * 4, [3])
    first = fold_all(Sum(), zero, 6.0, contributions)
    assert bits(fold_all(Sum(), zero, 6.0, shuffled)) == bits(first)


def test_eleven_large_models_have_the_same_bits_in_every_order():
    reference, *models = random_models(12, LONG, seed=2)
    contributions = [(c, m, float(17 * c + 5)) for c, m in enumerate(models)]
    total = sum(w for _, _, w in contributions)
    first = bits(fold_all(Mean(by="n"), reference, total, contributions))
    rng = np.random.default_rng(0)
    for _ in range(4):
        shuffled = [contributions[i] for i in rng.permutation(11)]
        assert bits(fold_all(Mean(by="n"), reference, total, shuffled)) == first


def test_weights_that_do_not_exceed_the_bound_are_taken_in_every_order():
    weights, bound = (0.62, 0.75, 0.46), 1.83
    assert sum(Fraction(w) for w in weights) <= Fraction(bound)  # exactly, not only to rounding
    for order in itertools.permutations(enumerate(weights)):
        result = fold_all(Mean(by="w", bound=bound), model([0.0]), bound, [(c, model([1.0]), w) for c, w in order])
        assert result.floats.tolist() == [1.0]


# ---- the scale
@pytest.mark.parametrize("reference", [[0.0, 0.0], [0.5, -1.0], [3.0, -7.5], [1e20, 0.0]])
def test_the_limit_is_64_times_the_largest_magnitude_and_at_least_64(reference):
    block = torch.tensor(reference)
    expected = 64 * max(1.0, float(block.abs().max()))
    assert fold_limit(block) == expected
    assert begin(Mean(), model(reference), 1.0).limit == expected


def test_the_limit_of_an_empty_block_is_64():
    assert fold_limit(torch.empty(0)) == 64.0


LIMITS = [64.0, 65.0, 64 * 3.7, 128.0, 2.0**20, 2.0**62, 2.0**63, 2.0**100, 64 * 3e38, math.nextafter(128.0, 0.0)]


@pytest.mark.parametrize("limit", [*LIMITS, 1.0, 0.3, 2.0**-30])
def test_the_exponent_is_the_largest_that_stays_below_two_to_the_62(limit):
    k = scale_exponent(limit)
    assert Fraction(limit) * Fraction(2) ** k < 2**62
    assert Fraction(limit) * Fraction(2) ** (k + 1) >= 2**62


@settings(max_examples=100, deadline=None, database=None)
@given(st.floats(64.0, 2e40))
def test_the_exponent_is_the_largest_for_any_limit(limit):
    k = scale_exponent(limit)
    assert Fraction(limit) * Fraction(2) ** k < 2**62 <= Fraction(limit) * Fraction(2) ** (k + 1)


def test_a_contribution_is_the_rounded_product_of_the_design():
    value, weight, bound = 0.1, 3.0, 7.0
    accumulator = begin(Mean(by="n"), model([0.0]), bound)
    accumulator.add(0, model([value]), weight)
    x = float(np.float32(value))
    assert accumulator.floats.tolist() == [round(x * (weight / bound) * 2.0**55)]  # 64 2^55 = 2^61


def test_one_scale_serves_the_whole_block():
    """A tensor that was zero when it was sent may come back as large as the block's largest allows."""
    accumulator = begin(Mean(), model([10.0, 0.0]), 1.0)
    accumulator.add(0, model([0.0, 640.0]), 1.0)
    assert accumulator.result().floats.tolist() == [0.0, 640.0]


# ---- what is refused
@pytest.mark.parametrize("fold", [Mean(), Sum()])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (math.nan, "nan"),
        (math.inf, "range"),
        (-math.inf, "range"),
        (64.00001, "range"),
        (-65.0, "range"),
    ],
)
@pytest.mark.parametrize("position", [0, LONG - 7])
def test_a_bad_element_refuses_the_contribution_and_leaves_the_fold_as_it_was(fold, bad, reason, position):
    good, other = random_models(2, LONG, seed=3)
    accumulator = begin(fold, model(torch.zeros(LONG)), 3.0)
    accumulator.add(0, good, 1.0)
    before = content(accumulator)
    broken = other.clone()
    broken.floats[position] = bad
    with pytest.raises(Refused) as refused:
        accumulator.add(1, broken, 1.0)
    assert refused.value.reason == reason
    assert content(accumulator) == before
    accumulator.add(1, other, 1.0)  # the client may still be taken
    contributions = [(0, good, 1.0), (1, other, 1.0)]
    assert bits(accumulator.result()) == bits(fold_all(fold, model(torch.zeros(LONG)), 3.0, contributions))


def test_an_element_at_the_limit_is_taken():
    result = fold_all(Mean(), model([2.0, 0.0]), 1.0, [(0, model([128.0, -128.0]), 1.0)])
    assert result.floats.tolist() == [128.0, -128.0]


@pytest.mark.parametrize(
    ("weight", "reason"), [(-1.0, "range"), (math.nan, "nan"), (math.inf, "range"), (10.5, "range")]
)
def test_an_impossible_weight_is_refused(weight, reason):
    accumulator = begin(Mean(by="n"), model([0.0]), 10.0)
    before = content(accumulator)
    with pytest.raises(Refused) as refused:
        accumulator.add(0, model([1.0]), weight)
    assert refused.value.reason == reason
    assert content(accumulator) == before


def test_the_sum_of_the_weights_must_not_exceed_the_bound():
    accumulator = begin(Mean(by="n"), model([0.0]), 10.0)
    accumulator.add(0, model([1.0]), 6.0)
    with pytest.raises(Refused, match="weight") as refused:
        accumulator.add(1, model([1.0]), 5.0)
    assert refused.value.reason == "range"
    accumulator.add(1, model([6.0]), 4.0)  # exactly the bound
    assert accumulator.result().floats.tolist() == [3.0]


def test_a_contribution_of_another_layout_is_refused():
    accumulator = begin(Mean(), model([0.0, 0.0]), 2.0)
    for other in (model([0.0]), model([0.0, 0.0], [1])):
        with pytest.raises(Refused) as refused:
            accumulator.add(0, other, 1.0)
        assert refused.value.reason == "shape"
    assert not accumulator.weights


@pytest.mark.parametrize("fold", [Mean(by="n"), Sum()])
def test_without_a_reference_there_is_a_clear_error(fold):
    with pytest.raises(ValueError, match=r"like=.*collect\(\)"):
        begin(fold, None, 10.0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_reference_without_a_scale_is_a_clear_error(value):
    with pytest.raises(ValueError, match="NaN or infinity"):
        begin(Mean(), model([1.0, value, 2.0]), 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_the_bound_on_the_weights_must_be_positive_and_finite(bound):
    with pytest.raises(ValueError, match="bound"):
        begin(Mean(by="n"), model([0.0]), bound)


def test_weights_that_sum_to_zero_give_no_mean():
    accumulator = begin(Mean(by="n"), model([0.0]), 10.0)
    accumulator.add(0, model([1.0]), 0.0)
    accumulator.add(1, model([2.0]), 0.0)
    with pytest.raises(ValueError, match="sum to 0"):
        accumulator.result()


# ---- taking back
@pytest.mark.parametrize("fold", [Mean(by="n"), Sum()])
@pytest.mark.parametrize("integers", ["mean", "max", "keep"])
def test_remove_is_the_exact_inverse_of_add(fold, integers):
    rng = torch.Generator().manual_seed(4)
    models = [model(torch.randn(LONG, generator=rng), [100 * c, -c]) for c in range(3)]
    weights = [1.0, 1.0, 1.0] if isinstance(fold, Sum) else [3.0, 7.0, 19.0]
    zero = model(torch.zeros(LONG), [0, 0])
    accumulator = begin(fold, zero, 30.0, integers)
    empty = content(accumulator)
    accumulator.add(0, models[0], weights[0])
    one = content(accumulator)
    accumulator.add(2, models[2], weights[2])
    accumulator.add(1, models[1], weights[1])
    accumulator.remove(2, models[2], weights[2])
    without = fold_all(fold, zero, 30.0, [(c, models[c], weights[c]) for c in (0, 1)], integers)
    assert bits(accumulator.result()) == bits(without)
    accumulator.remove(1, models[1], weights[1])
    assert content(accumulator) == one
    accumulator.remove(0, models[0], weights[0])
    assert content(accumulator) == empty


# ---- integer buffers
@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ([1, 2], [1, 1], 1),
        ([-1, -2], [1, 1], -1),
        ([3, 4], [1, 3], 3),  # 15 / 4
        ([-3, -4], [1, 3], -3),
        ([1, 4], [1, 2], 3),  # exact
        ([5, -6], [2, 3], -1),  # -8 / 5
    ],
)
def test_the_mean_of_integers_is_truncated_towards_zero(values, weights, expected):
    contributions = [(c, model([0.0], [v]), float(w)) for c, (v, w) in enumerate(zip(values, weights, strict=True))]
    assert fold_all(Mean(by="n"), model([0.0], [77]), 100.0, contributions).ints.tolist() == [expected]


def test_max_takes_the_largest_integer_of_each_entry():
    contributions = [(0, model([0.0], [5, -9]), 1.0), (1, model([0.0], [3, -2]), 99.0)]
    assert fold_all(Mean(by="n"), model([0.0], [77, 77]), 100.0, contributions, "max").ints.tolist() == [5, -2]


def test_keep_keeps_the_integers_that_were_sent():
    contributions = [(0, model([1.0], [5]), 1.0), (1, model([3.0], [6]), 1.0)]
    result = fold_all(Mean(by="n"), model([0.0], [77]), 100.0, contributions, "keep")
    assert (result.floats.tolist(), result.ints.tolist()) == ([2.0], [77])


def test_large_integers_are_averaged_exactly():
    values = [2**53 + 1, 2**53 + 3]
    contributions = [(c, model([0.0], [v]), 1.0) for c, v in enumerate(values)]
    assert fold_all(Mean(), model([0.0], [0]), 4.0, contributions).ints.tolist() == [2**53 + 2]


def test_integers_that_could_overflow_are_refused():
    accumulator = begin(Mean(by="n"), model([0.0], [0]), 100.0)
    with pytest.raises(Refused) as refused:
        accumulator.add(0, model([0.0], [-(2**60)]), 1.0)
    assert refused.value.reason == "range"
    assert content(accumulator) == content(begin(Mean(by="n"), model([0.0], [0]), 100.0))


# ---- collect
def test_collect_keeps_every_reply_in_client_order():
    accumulator = begin(collect(), None, 1.0)
    for client in (3, 11, 1, 2):
        accumulator.add(client, f"reply {client}", 1.0)
    accumulator.remove(2, "reply 2", 1.0)
    assert list(accumulator.result().items()) == [(1, "reply 1"), (3, "reply 3"), (11, "reply 11")]


def test_mean_and_sum_keep_one_accumulator_whatever_comes():
    accumulator = begin(Mean(by="n"), model(torch.zeros(LONG)), 100.0)
    assert isinstance(accumulator, FixedPoint)
    block = accumulator.floats.data_ptr()
    for client, value in enumerate(random_models(3, LONG)):
        accumulator.add(client, value, 1.0)
    assert accumulator.floats.data_ptr() == block
    assert accumulator.floats.shape == (LONG,)


# ---- tensors, without a reference
def logits(count, shape=(7000, 10), dtype=torch.float32, seed=5):
    rng = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(shape, generator=rng)).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_are_averaged_by_weight_in_float64(dtype):
    values = logits(9, dtype=getattr(torch, dtype))
    weights = [float(17 * c + 1) for c in range(9)]
    bound, total, limit = 2000.0, sum(weights), 2.0**20
    contributions = list(zip(range(9), values, weights, strict=True))
    fold = Mean(by="n", shape=(7000, 10), dtype=dtype, limit=limit)
    result = fold_all(fold, None, bound, contributions)
    assert (result.dtype, result.shape) == (torch.float64, (7000, 10))
    exact = sum(w * v.double() for v, w in zip(values, weights, strict=True)) / total
    assert (result - exact).abs().max() <= 9 * limit * 2.0**-62 * bound / total + 1e-14
    shuffled = [contributions[i] for i in np.random.default_rng(1).permutation(9)]
    assert torch.equal(fold_all(fold, None, bound, shuffled), result)


def test_tensors_by_hand():
    contributions = [(0, torch.tensor([[1.0, -2.0]]), 1.0), (1, torch.tensor([[3.0, 2.0]]), 3.0)]
    assert fold_all(Mean(by="n", shape=(1, 2)), None, 4.0, contributions).tolist() == [[2.5, 1.0]]
    ones = [(c, v, 1.0) for c, v, _ in contributions]
    assert fold_all(Sum(shape=(1, 2)), None, 8.0, ones).tolist() == [[4.0, 0.0]]
    empty = fold_all(Mean(shape=(0, 3)), None, 8.0, [(0, torch.empty(0, 3), 1.0)])
    assert empty.shape == (0, 3)


def test_the_resolution_of_a_tensor_follows_its_limit():
    """float64 values that are apart by less than the limit's resolution are one, and two by more."""
    step = 2.0**-41  # the largest power with 2^20 2^41 < 2^62
    for apart, differ in ((0.4 * step, False), (1.0 * step, True)):
        one, other = (
            fold_all(Sum(shape=(1,), dtype="float64"), None, 1.0, [(0, torch.tensor([v], dtype=torch.float64), 1.0)])
            for v in (0.0, apart)
        )
        assert bool(one != other) is differ
    fine = fold_all(
        Sum(shape=(1,), dtype="float64", limit=1e-6), None, 1.0,
        [(0, torch.tensor([0.4 * step], dtype=torch.float64), 1.0)],
    )  # fmt: skip
    assert float(fine) == pytest.approx(0.4 * step, rel=1e-10)


@pytest.mark.parametrize("fold", [Mean(shape=(LONG,), limit=8.0), Sum(shape=(LONG,), limit=8.0)])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda v: v.index_fill(0, torch.tensor([LONG - 7]), math.nan), "nan"),
        (lambda v: v.index_fill(0, torch.tensor([LONG - 7]), -math.inf), "range"),
        (lambda v: v.index_fill(0, torch.tensor([5]), 8.00001), "range"),
        (lambda v: v[1:], "shape"),
        (lambda v: v.unsqueeze(0), "shape"),
        (lambda v: v.double(), "shape"),
        (lambda v: v.long(), "shape"),
        (lambda v: v.to_sparse(), "shape"),
        (lambda v: {"z": v}, "shape"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_and_leaves_the_fold_as_it_was(fold, spoil, reason):
    good, other = (v.clamp(-8.0, 8.0) for v in logits(2, (LONG,)))
    accumulator = begin(fold, None, 3.0)
    accumulator.add(0, good, 1.0)
    before = content(accumulator)
    with pytest.raises(Refused) as refused:
        accumulator.add(1, spoil(other), 1.0)
    assert refused.value.reason == reason
    assert content(accumulator) == before


def test_taking_a_tensor_back_is_exact_and_a_tensor_in_another_order_of_memory_is_the_same():
    shape = (300, 300)
    values, zero = logits(3, shape), begin(Mean(by="n", shape=shape), None, 30.0)
    accumulator = begin(Mean(by="n", shape=shape), None, 30.0)
    for client, value in enumerate(values):
        accumulator.add(client, value.T.contiguous().T.requires_grad_(), 3.0 * client + 1)
    accumulator.remove(1, values[1], 4.0)
    rest = fold_all(Mean(by="n", shape=shape), None, 30.0, [(c, values[c], 3.0 * c + 1) for c in (2, 0)])
    assert torch.equal(accumulator.result(), rest)
    assert not accumulator.result().requires_grad
    for client in (0, 2):
        accumulator.remove(client, values[client], 3.0 * client + 1)
    assert content(accumulator) == content(zero)


def test_the_sum_of_tensors_keeps_one_block_whatever_comes():
    accumulator = begin(Mean(shape=(LONG,), dtype="float16"), None, 100.0)
    assert isinstance(accumulator, FixedPointTensor)
    assert accumulator.reference.floats.untyped_storage().nbytes() == 4, "the layout alone is needed"
    assert accumulator.nbytes == 2 * LONG
    block = accumulator.floats.data_ptr()
    for client, value in enumerate(logits(3, (LONG,), torch.float16)):
        accumulator.add(client, value, 1.0)
    assert (accumulator.floats.data_ptr(), accumulator.floats.numel()) == (block, LONG)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shape": [3, 4]}, r"shape: \[3, 4\]"),
        ({"shape": (3, -1)}, "shape"),
        ({"shape": (3, 4.0)}, "shape"),
        ({"shape": (3,), "dtype": "int64"}, "dtype: 'int64' is not folded; give one of float16"),
        ({"shape": (3,), "dtype": torch.float32}, "dtype"),
        ({"shape": (3,), "limit": 0.0}, "limit: 0.0"),
        ({"shape": (3,), "limit": math.nan}, "limit"),
        ({"shape": (3,), "like": "x"}, "like and part are of Params"),
    ],
)
@pytest.mark.parametrize("kind", [Mean, Sum])
def test_a_fold_of_tensors_that_cannot_be_is_an_error_when_it_is_made(kind, options, match):
    with pytest.raises(ValueError, match=match):
        kind(**options)


# ---- collecting with a look
@pytest.mark.parametrize("as_params", [False, True])
@pytest.mark.parametrize(
    ("values", "dtype", "reason"),
    [
        ([0.5, 0.0, 2.0], "float32", None),
        ([0.5, -0.5, 2.0], "float32", None),
        ([0.5, 1.0], "float32", "shape"),
        ([0.5, 0.0, 2.0], "float64", "shape"),
        ([0.5, math.nan, -2.0], "float32", "nan"),
        ([0.5, math.inf, 2.0], "float32", "range"),
        ([0.5, -math.inf, 2.0], "float32", "range"),
    ],
)
def test_collect_with_a_shape_looks_at_every_reply(values, dtype, reason, as_params):
    made = torch.tensor(values, dtype=getattr(torch, dtype))
    value = Params(model(torch.zeros(len(values))).layout, made) if as_params else made
    for fold in (Collect((3,)), Collect((3,), not_negative=True)):
        accumulator = begin(fold, None, 1.0)
        why = "range" if reason is None and fold.not_negative and min(values) < 0 else reason
        if why is None:
            accumulator.add(4, value, 1.0)
            assert accumulator.result() == {4: value}
            continue
        with pytest.raises(Refused) as refused:
            accumulator.add(4, value, 1.0)
        assert refused.value.reason == why
        assert accumulator.result() == {}


@pytest.mark.parametrize("dtype", ["uint8", "int64", "bool", "float16", "bfloat16"])
def test_collect_takes_every_dtype_and_tensors_without_elements(dtype):
    for shape in ((2, 2), (0, 2)):
        accumulator = begin(Collect(shape, dtype, not_negative=True), None, 1.0)
        accumulator.add(0, torch.ones(shape, dtype=getattr(torch, dtype)), 1.0)
        for wrong in (torch.ones(shape), None):
            with pytest.raises(Refused, match="shape: "):
                accumulator.add(1, wrong, 1.0)


def test_negative_integers_are_refused_where_they_must_not_be():
    value = torch.tensor([3, -1])
    begin(Collect((2,), "int64"), None, 1.0).add(0, value, 1.0)
    with pytest.raises(Refused, match=r"range: .*negative"):
        begin(Collect((2,), "int64", not_negative=True), None, 1.0).add(0, value, 1.0)


def test_a_collection_that_cannot_be_is_an_error_when_it_is_made():
    with pytest.raises(ValueError, match="dtype: 'half a float'"):
        Collect((2,), "half a float")
    with pytest.raises(ValueError, match="shape"):
        Collect((2, -1))
    with pytest.raises(ValueError, match="not_negative"):
        Collect(not_negative=True)


def test_none_in_a_shape_is_any_number_of_entries():
    accumulator = begin(Collect((None, 2)), None, 1.0)
    accumulator.add(0, torch.zeros(3, 2), 1.0)
    accumulator.add(1, torch.zeros(0, 2), 1.0)
    for wrong in (torch.zeros(3, 3), torch.zeros(6), torch.zeros(3, 2, 1)):
        with pytest.raises(Refused, match=r"shape: .* is not torch.float32 \[any, 2\]"):
            accumulator.add(2, wrong, 1.0)
    assert {k: v.shape for k, v in accumulator.result().items()} == {0: (3, 2), 1: (0, 2)}
