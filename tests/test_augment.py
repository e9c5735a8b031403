"""Augmentation of batches, compared image by image with torchvision's functions of the same values."""

import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fldist import vision
from fldist.data import augment
from fldist.data.augment import (
    Augment,
    add_noise,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    crop_at,
    flip_where,
    resize,
    rotate_by,
    to_unit,
)


@pytest.fixture(scope="module")
def functional():
    """torchvision.transforms.functional."""
    try:
        vision.torchvision()
    except ImportError as error:
        pytest.skip(str(error))
    import torchvision.transforms.functional

    return torchvision.transforms.functional


def images(n, *shape, seed=0):
    """Random images in 0..1."""
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def coloured(n=40, side=9):
    """Random images, and some of few values, where channels tie and pixels are grey, black or white."""
    few = torch.randint(3, (n, 3, side, side), generator=torch.Generator().manual_seed(1)) / 2
    x = torch.cat([images(n, 3, side, side), few])
    x[0] = 0.0
    x[1] = 1.0
    x[2] = 0.3
    return x


def each(function, x, values):
    """A function of one image and one value, applied to each."""
    return torch.stack([function(image, value) for image, value in zip(x, values.tolist(), strict=True)])


def close(got, wanted, atol=1e-6):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# ---- geometry
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 8, 4)])
@pytest.mark.parametrize("pad", [1, 3])
def test_crop(functional, shape, pad):
    offsets = [(dy, dx) for dy in range(2 * pad + 1) for dx in range(2 * pad + 1)]
    x = images(len(offsets), *shape)
    dy, dx = torch.tensor(offsets).T
    padded = functional.pad(x, [pad])
    wanted = [functional.crop(image, top, left, *shape[1:]) for image, (top, left) in zip(padded, offsets, strict=True)]
    got = crop_at(x, dy, dx, pad)
    assert torch.equal(got, torch.stack(wanted))
    assert got.is_contiguous()
    assert torch.equal(crop_at(x.contiguous(memory_format=torch.channels_last), dy, dx, pad), got)
    middle = torch.full((len(x),), pad)
    assert torch.equal(crop_at(x, middle, middle, pad), x)


def test_crop_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    got = crop_at(x, torch.tensor([0]), torch.tensor([2]), 1)  # up to the corner: the image moves down and left
    assert got.tolist() == [[[[0.0, 0.0], [2.0, 0.0]]]]


def test_flip(functional):
    x = images(6, 3, 4, 5)
    mask = torch.tensor([True, False, False, True, True, False])
    wanted = [functional.hflip(image) if m else image for image, m in zip(x, mask, strict=True)]
    assert torch.equal(flip_where(x, mask), torch.stack(wanted))
    assert torch.equal(flip_where(x, torch.zeros(6, dtype=torch.bool)), x)
    assert torch.equal(flip_where(flip_where(x, ~torch.zeros(6, dtype=torch.bool)), mask | ~mask), x)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (2, 9, 14), (1, 7, 7)])
def test_rotate(functional, shape):
    degrees = torch.rand(60, generator=torch.Generator().manual_seed(2)) * 360 - 180
    degrees[:5] = torch.tensor([0.0, 10.0, -10.0, 0.5, 179.0])
    x = images(60, *shape) + 0.1  # so that zeros are the fill
    got = rotate_by(x, degrees)
    assert torch.equal(got, each(functional.rotate, x, degrees))
    assert torch.equal(got[0], x[0])
    assert (got == 0).any()


def test_rotate_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(3, 1, 2, 2)
    got = rotate_by(x, torch.tensor([90.0, -90.0, 180.0]))  # counter-clockwise first
    assert got.tolist() == [[[[2.0, 4.0], [1.0, 3.0]]], [[[3.0, 1.0], [4.0, 2.0]]], [[[4.0, 3.0], [2.0, 1.0]]]]


# ---- colour
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("channels", [1, 3])
def test_factors(functional, name, channels):
    x = coloured()[:, :channels]
    factors = torch.rand(len(x), generator=torch.Generator().manual_seed(3)) * 3
    factors[::7] = 0.0
    factors[::5] = 1.0
    got = getattr(augment, f"adjust_{name}")(x, factors)
    close(got, each(getattr(functional, f"adjust_{name}"), x, factors))
    assert got.min() >= 0
    assert got.max() <= 1
    close(got[::5], x[::5])


@pytest.mark.parametrize("shift", [0.0, 0.5, -0.5, 1 / 6, -1 / 3, None])
def test_hue(functional, shift):
    x = coloured()
    shifts = torch.rand(len(x), generator=torch.Generator().manual_seed(4)) - 0.5
    if shift is not None:
        shifts.fill_(shift).clamp_(-0.5, 0.5)
    got = adjust_hue(x, shifts)
    close(got, each(functional.adjust_hue, x, shifts), atol=1e-5)
    assert got.min() >= 0
    assert got.max() <= 1
    assert torch.equal(got[:3], x[:3])  # black, white and grey have no hue
    close(got.amax(1), x.amax(1))
    close(got.amin(1), x.amin(1))


def test_hue_by_hand():
    red_orange_violet = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.5, 0.0, 1.0]]).view(3, 3, 1, 1)
    got = adjust_hue(red_orange_violet, torch.tensor([1 / 3, -1 / 6, 0.5]))
    close(got.view(3, 3), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.5], [0.5, 1.0, 0.0]]))


def test_colours_by_hand():
    x = torch.tensor([[[[1.0]], [[0.5]], [[0.0]]]])
    grey = 0.2989 + 0.587 * 0.5
    close(adjust_saturation(x, torch.tensor([0.0])), torch.full_like(x, grey))
    close(adjust_saturation(x, torch.tensor([0.5])), (x + grey) / 2)
    close(adjust_brightness(x, torch.tensor([1.5])), torch.tensor([1.0, 0.75, 0.0]).view(1, 3, 1, 1))
    two = torch.tensor([[[[0.2, 0.6]]]])
    close(adjust_contrast(two, torch.tensor([2.0])), torch.tensor([[[[0.0, 0.8]]]]))


def test_one_channel_has_no_colour():
    x = images(4, 1, 3, 3)
    assert torch.equal(adjust_hue(x, torch.full((4,), 0.3)), x)
    assert torch.equal(adjust_saturation(x, torch.full((4,), 0.3)), x)


@pytest.mark.parametrize("function", [adjust_hue, adjust_saturation, adjust_contrast])
def test_two_channels_are_refused(function):
    with pytest.raises(ValueError, match=r"^task.augment.jitter: needs images of 1 or 3 channels; the data have 2"):
        function(images(4, 2, 3, 3), torch.full((4,), 0.3))


FUNCTIONS = ["crop_at", "flip_where", "rotate_by"] + [
    f"adjust_{n}" for n in ("brightness", "contrast", "saturation", "hue")
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_leave_their_arguments_alone(name):
    x, values = images(4, 3, 5, 5), torch.tensor([0.2, 0.0, 0.4, 0.1])
    before = x.clone()
    arguments = {
        "crop_at": (values.long() + 1, values.long(), 1),
        "flip_where": (values > 0.15,),
        "rotate_by": (300 * values,),
    }
    arguments = arguments.get(name, (values,))
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    got = getattr(augment, name)(x, *arguments)
    assert not torch.equal(got, x)
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True) if isinstance(a, torch.Tensor))


# ---- the section
ALL = Augment(crop=2, flip=0.5, rotate=20.0, jitter=0.4)


def recorded(monkeypatch, config, x, seed=0):
    """The result, and (name, drawn values) of each change that was applied, in order."""
    calls = []

    def spy(name, original):
        def wrapped(x, *arguments):
            calls.append((name, *arguments))
            return original(x, *arguments)

        return wrapped

    with monkeypatch.context() as patch:
        for name in FUNCTIONS:
            patch.setattr(augment, name, spy(name, getattr(augment, name)))
        return config(x, torch.Generator().manual_seed(seed)), calls


def test_order_and_range_of_what_is_drawn(monkeypatch):
    x = images(4000, 3, 5, 5)
    result, calls = recorded(monkeypatch, ALL, x)
    assert [name for name, *_ in calls] == FUNCTIONS
    (_, dy, dx, pad), (_, mask), *rest = calls
    assert pad == 2
    for offsets in (dy, dx):
        assert offsets.bincount().tolist() == pytest.approx([800] * 5, abs=120)
    joint = (5 * dy + dx).bincount(minlength=25)
    assert joint.tolist() == pytest.approx([160] * 25, abs=65)  # independent of each other
    assert mask.float().mean() == pytest.approx(0.5, abs=0.04)
    ranges = [(-20.0, 20.0), (0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.4, 0.4)]
    for (_, values), (low, high) in zip(rest, ranges, strict=True):
        tenth = 0.01 * (high - low)
        assert low <= values.min() < low + tenth
        assert high - tenth < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
        assert values.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.05)
    drawn = torch.stack([dy.float(), dx.float(), mask.float(), *(values for _, values in rest)])
    assert (torch.corrcoef(drawn) - torch.eye(len(drawn))).abs().max() < 0.08
    # the result is the composition of the functions with these values
    expected = x
    for name, *arguments in calls:
        expected = getattr(augment, name)(expected, *arguments)
    assert torch.equal(result, expected)
    assert result.shape == x.shape
    assert result.min() >= 0
    assert result.max() <= 1


@pytest.mark.parametrize(("jitter", "low", "high", "turn"), [(1.5, 0.0, 2.5, 0.5), (0.1, 0.9, 1.1, 0.1)])
def test_jitter_is_bounded(monkeypatch, jitter, low, high, turn):
    result, calls = recorded(monkeypatch, Augment(jitter=jitter), images(1500, 3, 2, 2))
    *factors, (_, shifts) = calls
    assert len(factors) == 3
    assert all(low <= f.min() < low + 0.03 * (high - low) for _, f in factors)
    assert all(high - 0.03 * (high - low) < f.max() <= high for _, f in factors)
    assert shifts.abs().max() <= turn
    assert shifts.abs().max() > 0.97 * turn
    assert result.isfinite().all()


def test_one_channel_draws_no_colour(monkeypatch):
    _, calls = recorded(monkeypatch, ALL, images(3, 1, 5, 5))
    assert [name for name, *_ in calls] == FUNCTIONS[:5]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (Augment(crop=1), ["crop_at"]),
        (Augment(flip=0.5), ["flip_where"]),
        (Augment(rotate=5), ["rotate_by"]),
        (Augment(jitter=0.5), FUNCTIONS[3:]),
    ],
)
def test_each_field_alone(monkeypatch, config, names):
    assert config.active
    _, calls = recorded(monkeypatch, config, images(3, 3, 5, 5))
    assert [name for name, *_ in calls] == names


def test_inactive_does_and_draws_nothing():
    x = images(3, 3, 5, 5)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert not Augment().active
    assert Augment()(x, generator) is x
    assert torch.equal(generator.get_state(), before)
    assert Augment()(torch.rand(3, 7), generator).shape == (3, 7)


def test_flip_probability():
    x = images(2000, 1, 1, 2)
    always = Augment(flip=1.0)(x, torch.Generator())
    assert torch.equal(always, x.flip(-1))
    some = Augment(flip=0.2)(x, torch.Generator().manual_seed(0))
    flipped = (some != x).flatten(1).any(1)
    assert flipped.float().mean() == pytest.approx(0.2, abs=0.04)


def test_draws_come_from_the_generator_alone():
    x = images(8, 3, 6, 6)
    state = torch.random.get_rng_state()
    first = ALL(x, torch.Generator().manual_seed(5))
    torch.rand(3)
    assert torch.equal(ALL(x, torch.Generator().manual_seed(5)), first)
    assert not torch.equal(ALL(x, torch.Generator().manual_seed(6)), first)
    torch.random.set_rng_state(state)
    ALL(x, torch.Generator())
    assert torch.equal(torch.random.get_rng_state(), state)
    same = images(1, 3, 6, 6).expand(8, 3, 6, 6)
    assert len({tuple(image.flatten().tolist()) for image in ALL(same, torch.Generator())}) == 8


def test_next_batch_is_drawn_anew_and_an_image_does_not_depend_on_the_others():
    x = images(8, 3, 6, 6)
    generator = torch.Generator().manual_seed(5)
    first, second = ALL(x, generator), ALL(x, generator)
    assert not torch.equal(first, second)
    other = x.clone()
    other[1:] = 0.5
    assert torch.equal(ALL(other, torch.Generator().manual_seed(5))[0], first[0])


@pytest.mark.parametrize("n", [0, 1])
def test_smallest_batches(n):
    assert ALL(images(n, 3, 6, 6), torch.Generator()).shape == (n, 3, 6, 6)


def test_crop_must_leave_something():
    assert Augment(crop=4)(images(2, 1, 5, 6), torch.Generator()).shape == (2, 1, 5, 6)
    with pytest.raises(ValueError, match=r"^task.augment.crop: 5 pixels .* image of 6 x 5; at most 4$"):
        Augment(crop=5)(images(2, 1, 6, 5), torch.Generator())


@pytest.mark.parametrize("x", [torch.rand(4, 7), torch.rand(3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
def test_what_is_no_batch_of_images_is_refused(x):
    with pytest.raises(ValueError, match=r"^task.augment: needs batches of images .* remove task.augment$"):
        Augment(flip=0.5)(x, torch.Generator())


def test_fields_from_a_configuration():
    adapter = TypeAdapter(Augment)
    assert adapter.validate_python({}) == Augment(0, 0.0, 0.0, 0.0)
    assert adapter.validate_python({"crop": 4, "flip": 1, "rotate": 180, "jitter": 0.5}) == Augment(4, 1.0, 180.0, 0.5)
    for wrong in (
        {"crop": -1}, {"crop": 1.5}, {"flip": -0.1}, {"flip": 1.1}, {"rotate": -1}, {"rotate": 181}, {"jitter": -0.1},
        {"jitter": math.inf}, {"jitter": math.nan}, {"colour": 1},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


# ---- preparation
@pytest.mark.parametrize(("shape", "size"), [((3, 32, 32), 24), ((1, 28, 28), 32), ((3, 9, 14), 8), ((1, 24, 8), 8)])
def test_resize(functional, monkeypatch, shape, size):
    monkeypatch.setattr(augment, "_CHUNK", 4)
    for n in (3, 4, 9):
        x = images(n, *shape)
        before = x.clone()
        got = resize(x, size)
        close(got, functional.resize(x, [size, size], antialias=True))
        assert torch.equal(x, before)
        assert got.shape == (n, shape[0], size, size)
        levels = (x * 255).round().to(torch.uint8)
        got = resize(levels, size)
        assert got.dtype == torch.float32
        wanted = functional.resize(levels, [size, size], antialias=True) / 255
        close(got, wanted, atol=0.501 / 255)  # which are rounded to bytes
        close(got, functional.resize(levels / 255, [size, size], antialias=True))


def test_resize_keeps_the_range_and_the_size():
    assert resize(torch.ones(3, 1, 13, 13), 9).max() == 1  # the plain interpolation gives 1 + 2e-7
    assert resize(torch.full((3, 1, 17, 23), 255, dtype=torch.uint8), 11).min() > 1 - 1e-6
    x = images(2, 3, 8, 8)
    assert resize(x, 8) is x
    assert torch.equal(resize((x * 255).to(torch.uint8), 8), (x * 255).to(torch.uint8) / 255)


def test_noise_everywhere():
    x = images(200, 3, 10, 12)
    before = x.clone()
    got = add_noise(x, 0.3, None, torch.Generator().manual_seed(0))
    noise = got - x
    assert noise.mean() == pytest.approx(0, abs=0.005)
    assert noise.std() == pytest.approx(0.3, rel=0.01)
    assert noise.abs().gt(0.6).float().mean() == pytest.approx(0.0455, abs=0.003)
    assert got.min() < 0
    assert got.max() > 1
    assert torch.equal(x, before)
    assert torch.equal(add_noise(x, 0.3, None, torch.Generator().manual_seed(0)), got)
    assert torch.equal(add_noise(x, 0.0, None, torch.Generator()), x)
    close(add_noise(x, 0.6, None, torch.Generator().manual_seed(0)) - x, 2 * noise)
    assert add_noise(torch.zeros(4, 7), 1.0, None, torch.Generator()).count_nonzero() == 28


@pytest.mark.parametrize(
    ("cell", "rows", "columns"),
    [((0, 0, 1), (0, 28), (0, 28)), ((1, 2, 3), (9, 18), (18, 27)), ((3, 0, 4), (21, 28), (0, 7))],
)
def test_noise_in_a_cell(cell, rows, columns):
    x = images(50, 1, 28, 28)
    before = x.clone()
    got = add_noise(x, 0.5, cell, torch.Generator().manual_seed(0))
    inside = torch.zeros(28, 28, dtype=torch.bool)
    inside[rows[0] : rows[1], columns[0] : columns[1]] = True
    assert torch.equal((got != x).any(0)[0], inside)
    assert (got - x)[..., inside].std() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(x, before)


@pytest.mark.parametrize("cell", [(3, 0, 3), (0, 3, 3), (-1, 0, 3), (0, -1, 3), (0, 0, 29)])
def test_noise_wants_a_cell_of_the_image(cell):
    with pytest.raises(ValueError, match=r"^noise: images of 28 x 28 pixels have no cell .*task.resize"):
        add_noise(images(2, 1, 28, 28), 0.5, cell, torch.Generator())


def test_noise_cells_need_images_that_are_wide_enough():
    with pytest.raises(ValueError, match="have no cell"):
        add_noise(images(2, 1, 12, 8), 0.5, (0, 1, 2), torch.Generator())
    assert add_noise(images(2, 1, 12, 12), 0.5, (0, 1, 2), torch.Generator()).shape == (2, 1, 12, 12)
    with pytest.raises(ValueError, match=r"^noise: samples of shape \(5,\) are no images"):
        add_noise(torch.rand(2, 5), 0.5, (0, 0, 1), torch.Generator())


def test_to_unit_of_bytes():
    levels = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    wanted = torch.arange(256).view(4, 1, 8, 8) / 255
    tensor = torch.from_numpy(levels.copy())
    for x in (levels, tensor):
        got = to_unit(x)
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted)
    assert torch.equal(tensor, torch.from_numpy(levels))
    assert torch.equal(to_unit(levels[::-1]), wanted.flip(0))


@pytest.mark.filterwarnings("error")
def test_to_unit_of_floats():
    x = images(2, 3, 4, 4)
    assert to_unit(x) is x
    array = x.numpy()
    assert torch.equal(to_unit(array), x)
    assert to_unit(array).data_ptr() == x.data_ptr()
    fixed = array.copy()
    fixed.setflags(write=False)
    to_unit(fixed).zero_()
    assert np.array_equal(fixed, array)


@pytest.mark.parametrize("x", [np.zeros((1, 1, 2, 2)), torch.zeros(1, 1, 2, 2, dtype=torch.int64)])
def test_to_unit_refuses_other_types(x):
    with pytest.raises(ValueError, match=r"^task.data: images must be uint8 or float32, not (float64|int64)"):
        to_unit(x)
