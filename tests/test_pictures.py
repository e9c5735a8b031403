"""Pictures that an algorithm gives to look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from fldist import run
from fldist.algorithms.fedavg import FedAvg
from fldist.runtime.pictures import grid
from tests.conftest import small


def test_one_picture_is_taken_as_it_is():
    pixels = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)
    assert np.array_equal(grid("a", pixels), pixels.permute(1, 2, 0).numpy())


def test_floats_are_clipped_to_0_1():
    pixels = torch.tensor([-1.0, 0.0, 0.5, 1.0, 7.0, float("nan")]).reshape(1, 1, 6)
    assert grid("a", pixels)[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]


def test_many_pictures_lie_side_by_side_with_gaps():
    pixels = torch.stack([torch.full((3, 4, 5), i / 5) for i in range(5)])
    sheet = grid("a", pixels)
    assert sheet.shape == (2 * 6 - 2, 3 * 7 - 2, 3)
    for index in range(5):
        top, left = index // 3 * 6, index % 3 * 7
        assert (sheet[top : top + 4, left : left + 5] == 51 * index).all()
    assert (sheet[4:6] == 255).all()
    assert (sheet[6:, 14:] == 255).all()  # no sixth picture


def test_at_most_64_are_shown():
    assert grid("a", torch.zeros(100, 1, 2, 2)).shape == (8 * 4 - 2, 8 * 4 - 2, 1)


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        ("../a", torch.zeros(1, 2, 2), r"images: '\.\./a' cannot be part of a file's name; use letters"),
        ("a", torch.zeros(2, 2), r"images: a must have the shape .*; got \[2, 2\]"),
        ("a", torch.zeros(2, 2, 2), r"with 1 or 3 channels; got \[2, 2, 2\]"),
        ("a", torch.zeros(0, 1, 2, 2), r"got \[0, 1, 2, 2\]"),
        ("a", torch.zeros(1, 2, 2, dtype=torch.int64), r"images: a must be floats in 0..1 or uint8, got torch.int64"),
        ("a", [1], r"images: a must be a tensor, got list"),
    ],
)
def test_what_is_no_picture_is_refused(name, pixels, message):
    with pytest.raises(ValueError, match=message):
        grid(name, pixels)


@dataclass(frozen=True)
class Painter(FedAvg):
    """Shows a picture in every second round."""

    def round(self, server, clients):
        super().round(server, clients)
        if server.round % 2 == 0:
            server.images(ramp=torch.linspace(0, 1, 6).reshape(1, 2, 3), colours=torch.ones(2, 3, 4, 4))


def test_pictures_of_a_round_are_files_of_the_run(tmp_path):
    run(small(rounds=5, algorithm={"name": "tests.test_pictures:Painter"}), output=tmp_path / "run")
    found = sorted(path.name for path in (tmp_path / "run" / "images").iterdir())
    assert found == [
        "round-000002-colours.png", "round-000002-ramp.png", "round-000004-colours.png", "round-000004-ramp.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "run" / "images" / "round-000004-ramp.png") as picture:
        assert picture.size == (3, 2)
        assert list(np.asarray(picture).ravel()) == [0, 51, 102, 153, 204, 255]


@dataclass(frozen=True)
class Early(FedAvg):
    """Shows what it begins with."""

    def setup(self, server, clients):
        server.images(first=torch.zeros(1, 2, 3))


def test_pictures_of_the_setup_are_those_of_round_0(tmp_path):
    run(small(algorithm={"name": "tests.test_pictures:Early"}), output=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "images").iterdir()] == ["round-000000-first.png"]
