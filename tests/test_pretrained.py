"""Pretrained generators: what each decodes, by hand; what their files may hold; the command that trains one."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BeforeValidator, TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from fldist.config import _explain
from fldist.data.datasets import Dataset
from fldist.models.generators import NAMES, named
from fldist.models.generators.mini_style import MiniStyleNetwork
from fldist.models.generators.mlp import MlpVae
from fldist.models.generators.pretrained import (
    WEIGHTS,
    GeneratorConfig,
    find_file,
    fingerprint_of,
    read_sidecar,
    read_state,
    to_samples,
)
from fldist.pretrain import pretrain

CPU = torch.device("cpu")
FOREIGN = Path(os.environ.get("FLDIST_DATA", "no-data")) / "pretrained"
needs_foreign = pytest.mark.skipif(not FOREIGN.is_dir(), reason="needs FLDIST_DATA/pretrained")


def rng(seed=1):
    return torch.Generator().manual_seed(seed)


def loaded(given):
    return named(given).load(CPU)


class Pair(nn.Module):
    """A program with a mapping: w = 2 z, and an image of 2 x 3 pixels, all of tanh(sum of w)."""

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return torch.tanh(w.sum(1)).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 3)

    @torch.jit.export
    def mapping(self, z: torch.Tensor) -> torch.Tensor:
        return torch.cat([2.0 * z, z], 1)


PAIR = {"arch": "mine", "latent": "w", "z_dim": 2, "latent_dim": 4, "image_shape": [1, 2, 3], "value_range": [-1, 1]}


def scripted(folder, module=None, **said):
    """A TorchScript file with its side-car."""
    file = folder / "pair.pt"
    torch.jit.script(module or Pair()).save(file)
    file.with_suffix(".json").write_text(json.dumps({**PAIR, **said}))
    return {"name": "torchscript", "path": str(file)}


def tiny_mlp(folder, name="tiny.pth", sizes=(3, 5, 12)):
    """A state dict of linear layers 0, 2, ... with values drawn at random."""
    state = {}
    for number, (before, after) in enumerate(pairwise(sizes)):
        state[f"{2 * number}.weight"] = torch.randn(after, before, generator=rng(number))
        state[f"{2 * number}.bias"] = torch.randn(after, generator=rng(10 + number))
    save = save_file if name.endswith(".safetensors") else torch.save
    save(state, folder / name)
    return state, folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generators")


@pytest.fixture(scope="module")
def kinds(folder):
    """One configuration of each kind that needs no other package, by name."""
    tiny_mlp(folder)
    return {
        "toy": "toy",
        "colour": {"name": "toy", "latent_dim": 5, "image_shape": [3, 4, 7]},
        "mlp_vae": "mlp_vae",
        "mini_style": "mini_style",
        "mlp": {"name": "mlp", "path": str(folder / "tiny.pth"), "output": "tanh", "image_shape": [3, 2, 2]},
        "torchscript": scripted(folder),
    }


KINDS = ("toy", "colour", "mlp_vae", "mini_style", "mlp", "torchscript")


# ---- what every generator does
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_draws_it_decodes_to_images_in_0_to_1_the_same_each_time(kinds, kind):
    made = loaded(kinds[kind])
    latents = made.sample_latents(300, rng())  # more than pass through a network at a time
    images = made.decode(latents)
    assert (latents.shape, latents.dtype) == ((300, made.latent_dim), torch.float32)
    assert math.prod(made.latent_shape) == made.latent_dim
    assert (images.shape, images.dtype) == ((300, *made.image_shape), torch.float32)
    assert not latents.requires_grad and not images.requires_grad
    assert 0.0 <= float(images.min()) < float(images.max()) <= 1.0
    assert float(images.std(dim=0).max()) > 0.01  # they differ
    assert torch.equal(images, made.decode(latents))
    assert torch.equal(images, loaded(kinds[kind]).decode(latents))
    assert made.decode(latents[:0]).shape == (0, *made.image_shape)
    assert made.sample_latents(0, rng()).shape == (0, made.latent_dim)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_come_of_the_generator_that_is_given_and_of_nothing_else(kinds, kind):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    made = loaded(kinds[kind])
    first = made.sample_latents(20, rng(4))
    made.decode(first)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert torch.equal(made.sample_latents(20, rng(4)), first)
    source = rng(4)
    assert torch.equal(made.sample_latents(20, source), first)
    assert not torch.equal(made.sample_latents(20, source), first)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_another_width_are_refused(kinds, kind):
    made = loaded(kinds[kind])
    with pytest.raises(ValueError, match=rf"latents \[n, {made.latent_dim}\]"):
        made.decode(torch.zeros(2, made.latent_dim + 1))


def test_fingerprints_tell_generators_apart_and_nothing_else(kinds):
    prints = {kind: loaded(kinds[kind]).fingerprint for kind in KINDS}
    assert prints == {kind: loaded(kinds[kind]).fingerprint for kind in KINDS}
    changed = [
        {"name": "toy", "seed": 1},
        {"name": "toy", "image_shape": [1, 4, 16]},
        {**kinds["mlp"], "output": "sigmoid"},
    ]
    found = [*prints.values(), *(loaded(given).fingerprint for given in changed)]
    assert len(set(found)) == len(found) and all(re.fullmatch("[0-9a-f]{64}", one) for one in found)


def test_a_fingerprint_depends_on_names_types_shapes_and_values():
    a = torch.arange(4.0)
    all_of = [
        fingerprint_of({}, {"a": a}),
        fingerprint_of({}, {"b": a}),
        fingerprint_of({}, {"a": a.view(2, 2)}),
        fingerprint_of({}, {"a": a.view(torch.int32)}),
        fingerprint_of({}, {"a": a + 1}),
        fingerprint_of({"x": 1}, {"a": a}),
    ]
    assert len(set(all_of)) == 6
    assert fingerprint_of({"x": 1, "y": 2}, {"a": a, "b": a}) == fingerprint_of({"y": 2, "x": 1}, {"b": a, "a": a})


# ---- by hand
def test_toy_is_tanh_of_a_linear_map_of_standard_normal_values():
    made = loaded({"name": "toy", "latent_dim": 400, "image_shape": [1, 30, 30]})
    latents = made.sample_latents(50, rng())
    assert torch.equal(latents, torch.randn(50, 400, generator=rng()))
    before = torch.atanh((2 * made.decode(latents) - 1).double().clamp(-1 + 1e-9, 1 - 1e-9))
    assert float(before.std()) == pytest.approx(1.0, abs=0.05)
    halved = torch.atanh((2 * made.decode(latents / 2) - 1).double())
    few = before.abs() < 2  # where tanh has not lost digits
    torch.testing.assert_close(halved[few], before[few] / 2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_mlp_is_its_linear_layers_with_relu_between_them(tmp_path, ending):
    state, file = tiny_mlp(tmp_path, f"t.{ending}", (3, 5, 4, 9))
    made = loaded({"name": "mlp", "path": str(file), "output": "sigmoid"})
    z = torch.randn(6, 3, generator=rng())
    h = functional.relu(z @ state["0.weight"].T + state["0.bias"])
    h = functional.relu(h @ state["2.weight"].T + state["2.bias"])
    pixels = torch.sigmoid(h @ state["4.weight"].T + state["4.bias"])
    assert (made.latent_dim, made.image_shape) == (3, (1, 3, 3))
    torch.testing.assert_close(made.decode(z), pixels.view(6, 1, 3, 3))
    signed = loaded({"name": "mlp", "path": str(file), "output": "tanh"})
    logits = torch.logit(pixels.double())
    torch.testing.assert_close(
        signed.decode(z).double(), ((logits.tanh() + 1) / 2).view(6, 1, 3, 3), rtol=1e-4, atol=1e-5
    )


def test_safetensors_sort_10_before_2_and_the_layers_are_in_order_all_the_same(tmp_path):
    _, file = tiny_mlp(tmp_path, "deep.safetensors", (2, 3, 4, 5, 6, 7, 8, 9))
    names = list(load_file(file))
    assert names.index("10.weight") < names.index("2.weight")
    assert loaded({"name": "mlp", "path": str(file), "output": "tanh"}).latent_dim == 2


@needs_foreign
def test_the_vae_of_others():
    given = {"name": "mlp", "path": "mnist_vae.pth", "layers": ["fc3", "fc4"], "output": "sigmoid"}
    made = loaded(given)
    state = torch.load(FOREIGN / "mnist_vae.pth", weights_only=True, map_location="cpu")
    z = made.sample_latents(64, rng())
    assert (made.latent_dim, made.image_shape) == (20, (1, 28, 28))
    h = functional.relu(functional.linear(z, state["fc3.weight"], state["fc3.bias"]))
    pixels = torch.sigmoid(functional.linear(h, state["fc4.weight"], state["fc4.bias"]))
    torch.testing.assert_close(made.decode(z).flatten(1), pixels)
    assert _looks_like_digits(made.decode(z))


@needs_foreign
def test_the_gan_of_others():
    made = loaded({"name": "mlp", "path": "pretrained/mnist_mlp_gan.ckpt", "output": "tanh"})
    state = torch.load(FOREIGN / "mnist_mlp_gan.ckpt", weights_only=True, map_location="cpu")
    z = made.sample_latents(64, rng())
    assert (made.latent_dim, made.image_shape) == (64, (1, 28, 28))
    h = z
    for name in ("0", "2"):
        h = functional.relu(functional.linear(h, state[f"{name}.weight"], state[f"{name}.bias"]))
    pixels = torch.tanh(functional.linear(h, state["4.weight"], state["4.bias"]))
    torch.testing.assert_close(made.decode(z).flatten(1), (pixels + 1) / 2)
    assert _looks_like_digits(made.decode(z))


def _looks_like_digits(images):
    """Dark at the border, bright in the middle."""
    mean = images.mean((0, 1))
    return float(mean[:3].max()) < 0.1 and float(mean[10:18, 10:18].mean()) > 0.25


def test_the_weights_that_come_with_the_package_are_what_the_side_cars_say():
    vae, style = loaded("mlp_vae"), loaded("mini_style")
    assert (vae.latent_dim, vae.image_shape) == (32, (1, 28, 28))
    assert (style.latent_dim, style.image_shape) == (64, (1, 28, 28))
    for name in ("mlp_vae", "mini_style"):
        file = WEIGHTS / f"{name}.safetensors"
        assert file.stat().st_size < 2e6
        car = read_sidecar(file)
        assert car.made_by.startswith("fldist pretrain-generator fashion-mnist ") and car.arch == name
        images = loaded(name).decode(loaded(name).sample_latents(100, rng()))
        mean = images.mean((0, 1))
        assert float(mean[:, :2].mean()) < 0.2 < float(mean[8:20, 10:18].mean())  # clothes: dark at the sides
        assert float(images.std(0).mean()) > 0.1


def test_mlp_vae_is_two_linear_layers():
    state = load_file(WEIGHTS / "mlp_vae.safetensors")
    made = loaded("mlp_vae")
    z = made.sample_latents(5, rng())
    h = functional.relu(functional.linear(z, state["hidden.weight"], state["hidden.bias"]))
    assert h.shape == (5, 256)
    pixels = torch.sigmoid(functional.linear(h, state["pixels.weight"], state["pixels.bias"]))
    torch.testing.assert_close(made.decode(z).flatten(1), pixels)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 16, 20)])
def test_mini_style_layer_by_layer(shape):
    torch.manual_seed(3)
    network = MiniStyleNetwork(64, 64, shape)
    s = network.state_dict()
    z = torch.randn(2, 64, generator=rng())
    w = z / (z.pow(2).mean(1, keepdim=True) + 1e-8).sqrt()
    for name in ("first", "second"):
        w = functional.leaky_relu(functional.linear(w, s[f"mapping.{name}.weight"], s[f"mapping.{name}.bias"]), 0.2)
    torch.testing.assert_close(network.mapping(z), w)
    x = functional.linear(w, s["synthesis.base.weight"], s["synthesis.base.bias"]).view(2, 128, 4, 4)
    for layer, width in enumerate((64, 32, 32)):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = functional.conv2d(x, s[f"synthesis.convs.{layer}.weight"], s[f"synthesis.convs.{layer}.bias"], padding=1)
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        style = functional.linear(w, s[f"synthesis.styles.{layer}.weight"], s[f"synthesis.styles.{layer}.bias"])
        assert style.shape == (2, 2 * width)
        x = x * (1 + style[:, :width, None, None]) + style[:, width:, None, None]
        x = functional.leaky_relu(x, 0.2)
    x = torch.tanh(functional.conv2d(x, s["synthesis.to_pixels.weight"], s["synthesis.to_pixels.bias"]))
    assert x.shape == (2, shape[0], 32, 32)
    top, left = (32 - shape[1]) // 2, (32 - shape[2]) // 2
    x = x[:, :, top : top + shape[1], left : left + shape[2]]
    torch.testing.assert_close(network(z), x, rtol=1e-4, atol=1e-5)


def test_mini_style_draws_latents_by_its_mapping():
    made = loaded("mini_style")
    state = load_file(WEIGHTS / "mini_style.safetensors")
    network = MiniStyleNetwork(64, 64, (1, 28, 28)).requires_grad_(False)
    network.load_state_dict(state)
    z = torch.randn(9, 64, generator=rng())
    torch.testing.assert_close(made.sample_latents(9, rng()), network.mapping(z))
    torch.testing.assert_close(made.decode(network.mapping(z)), ((network(z) + 1) / 2).clamp(0, 1))
    assert sum(tensor.numel() for tensor in state.values()) == 259_617


def test_torchscript_with_a_mapping(kinds):
    made = loaded(kinds["torchscript"])
    z = torch.randn(3, 2, generator=rng())
    w = made.sample_latents(3, rng())
    assert torch.equal(w, torch.cat([2 * z, z], 1))
    assert torch.equal(made.decode(w)[:, 0, 1, 2], (torch.tanh(w.sum(1)) + 1) / 2)
    assert (made.latent_dim, made.image_shape) == (4, (1, 2, 3))


def test_torchscript_of_noise_and_of_a_frozen_program(tmp_path):
    given = scripted(tmp_path, latent="z", z_dim=4)
    made = loaded(given)
    assert torch.equal(made.sample_latents(3, rng()), torch.randn(3, 4, generator=rng()))
    torch.manual_seed(0)
    program = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (1, 2, 3))).eval()))
    program.save(tmp_path / "pair.pt")
    assert loaded(given).decode(torch.zeros(2, 4)).shape == (2, 1, 2, 3)
    assert loaded(given).fingerprint != made.fingerprint


# ---- samples of the clients' size
def test_grey_is_a_weighted_sum_and_colour_is_repetition():
    rgb = torch.rand(4, 3, 5, 6, generator=rng())
    grey = 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2]
    torch.testing.assert_close(to_samples(rgb, (1, 5, 6)), grey[:, None])
    again = to_samples(grey[:, None], (3, 5, 6))
    assert all(torch.equal(again[:, c], grey.clamp(0, 1)) for c in range(3))
    assert torch.equal(to_samples(rgb, (3, 5, 6)), rgb)


def test_an_image_that_is_too_wide_is_cut_to_its_centre():
    image = torch.arange(12.0).view(1, 1, 2, 6) / 12
    assert torch.equal(to_samples(image, (1, 2, 2)), image[:, :, :, 2:4])
    assert torch.equal(to_samples(image.mT, (1, 2, 2)), image.mT[:, :, 2:4])


def test_enlarging_is_bilinear():
    image = torch.tensor([[0.0, 1.0]]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    wanted = torch.tensor([0.0, 0.25, 0.75, 1.0])  # pixels' centres at -0.25, 0.25, 0.75, 1.25
    for antialias in (True, False):
        torch.testing.assert_close(to_samples(image, (1, 4, 4), antialias), wanted.expand(1, 1, 4, 4))


def test_shrinking_with_antialiasing_looks_at_all_pixels_and_without_at_the_nearest():
    row = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    image = row.expand(1, 1, 8, 8)
    # four pixels become one; the triangle about the centre, 1.5, reaches 4 to either side, weights 4 - |x - 1.5|
    weights = torch.tensor([2.5, 3.5, 3.5, 2.5, 1.5, 0.5])
    torch.testing.assert_close(to_samples(image, (1, 2, 2)), torch.full((1, 1, 2, 2), float(2.5 / weights.sum())))
    assert torch.equal(
        to_samples(image, (1, 2, 2), antialias=False), torch.zeros(1, 1, 2, 2)
    )  # pixels 1 and 2, 5 and 6


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
    st.booleans(),
)
def test_samples_have_the_shape_and_stay_in_0_to_1(images, shape, antialias):
    x = torch.rand(2, *images, generator=rng()).round()
    made = to_samples(x, shape, antialias)
    assert made.shape == (2, *shape)
    assert float(made.min()) >= 0.0 and float(made.max()) <= 1.0
    constant = to_samples(torch.full((1, *images), 0.5), shape, antialias)
    torch.testing.assert_close(constant, torch.full((1, *shape), 0.5))


@pytest.mark.parametrize(
    ("images", "shape", "said"),
    [
        ((2, 2, 4, 4), (1, 4, 4), "the generator's images have 2 channels"),
        ((2, 3, 4, 4), (4, 4, 4), "the data's images have 4 channels"),
        ((2, 3, 4, 4), (3, 0, 4), r"samples \[3, 0, 4\]"),
        ((2, 3, 4, 4), (80,), "choose data of images"),
        ((3, 4, 4), (3, 4, 4), "cannot become samples"),
    ],
)
def test_what_cannot_become_samples(images, shape, said):
    with pytest.raises(ValueError, match=said):
        to_samples(torch.zeros(images), shape)


# ---- what a user writes
@dataclass(frozen=True)
class Owner:
    generator: Annotated[GeneratorConfig, BeforeValidator(named)]


@dataclass(frozen=True)
class Own(GeneratorConfig):
    """A user's own."""

    def load(self, device):
        return loaded("toy")


def test_every_name_that_is_there_is_a_configuration():
    for name in ("toy", "mlp_vae", "mini_style"):
        assert isinstance(named(name), GeneratorConfig) and name in NAMES
    assert named({"name": "tests.test_pretrained:Own"}).load(CPU).latent_dim == 16
    made = named("toy")
    assert named(made) is made
    assert TypeAdapter(Owner).validate_python({"generator": {"name": "toy", "seed": 5}}).generator.seed == 5
    assert TypeAdapter(Owner).validate_python({"generator": made}).generator is made


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tooy", "algorithm.generator.name: unknown name 'tooy'; did you mean 'toy'?"),
        ({"name": "toy", "laten_dim": 3}, "algorithm.generator.laten_dim: toy has no such field; it has latent_dim"),
        ({"name": "toy", "latent_dim": 0}, "algorithm.generator.latent_dim: input should be greater than or equal"),
        ({"name": "toy", "image_shape": [1, 0, 4]}, "algorithm.generator.image_shape.1: input should be greater"),
        ({"name": "mlp", "path": "x"}, "algorithm.generator.output: a value is needed"),
        ({"name": "mlp", "path": "x", "output": "relu"}, "algorithm.generator.output: input should be 'sigmoid' or"),
        ({"name": "fldist.data.datasets:Digits"}, "algorithm.generator.name: it is no subclass of"),
        (7, "algorithm.generator: it must be a name such as mini_style"),
        ({"path": "x"}, "algorithm.generator: it must be a name such as mini_style"),
    ],
)
def test_errors_name_the_field(given, said):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Owner).validate_python({"generator": given})
    assert said in "\n".join(_explain(caught.value, "algorithm."))


# ---- files
def test_files_are_looked_for_in_three_places(tmp_path, monkeypatch):
    (tmp_path / "data" / "pretrained").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLDIST_DATA", str(tmp_path / "data"))
    for place in (tmp_path / "data/pretrained/x.pth", tmp_path / "data/x.pth", tmp_path / "x.pth"):
        place.touch()
        assert find_file("x.pth") == place
    with pytest.raises(ValueError, match=r"path: no file found: .*/y.pth, .*data/y.pth, .*pretrained/y.pth; put it"):
        find_file("y.pth")
    monkeypatch.delenv("FLDIST_DATA")
    with pytest.raises(ValueError, match="set FLDIST_DATA"):
        find_file("y.pth")


class Bomb:
    """Its pickle creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    torch.save({"a": torch.ones(2), "b": Bomb(tmp_path / "ran")}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds more than tensors.*safetensors\.torch\.save_file"):
        read_state(tmp_path / "x.pth")
    torch.save(nn.Linear(2, 3), tmp_path / "y.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        loaded({"name": "mlp", "path": str(tmp_path / "y.pth"), "output": "tanh"})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x02}."])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"algorithm\.generator\.path: .*{name}"):
        read_state(tmp_path / name)


def test_a_state_dict_within_a_checkpoint_is_found_and_other_things_are_not(tmp_path):
    torch.save({"epoch": 3, "state_dict": {"w": torch.ones(1)}}, tmp_path / "x.ckpt")
    assert list(read_state(tmp_path / "x.ckpt")) == ["w"]
    for other in ({}, [torch.ones(1)], {"w": 1}, torch.ones(3)):
        torch.save(other, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match="no state dict of tensors"):
            read_state(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": ["2", "0"]}, r"layers: 2 of .*m\.pth gives 12 values and 0 takes 3"),
        ({"layers": ["0", "7"]}, r"layers: .*m\.pth has no linear layer '7'; it has 0, 2"),
        ({}, r"image_shape: the last layer of .*m\.pth gives 12 values, no square"),
        ({"image_shape": [1, 3, 3]}, r"image_shape: \[1, 3, 3\] has 9 values, and the last layer of .*m\.pth gives 12"),
    ],
)
def test_layers_and_sizes_that_do_not_fit(tmp_path, fields, said):
    _, file = tiny_mlp(tmp_path, "m.pth")
    with pytest.raises(ValueError, match=r"algorithm\.generator\." + said):
        loaded({"name": "mlp", "path": str(file), "output": "tanh", **fields})


def test_layers_cannot_be_inferred_beside_other_tensors(tmp_path):
    state, file = tiny_mlp(tmp_path, "m.pth", (3, 5, 9))
    torch.save({**state, "norm.running_mean": torch.ones(3)}, file)
    given = {"name": "mlp", "path": str(file), "output": "tanh"}
    with pytest.raises(
        ValueError, match=r"norm\.running_mean \[3\] of .* is of no linear layer; name the linear layers"
    ):
        loaded(given)
    assert loaded({**given, "layers": ["0", "2"]}).latent_dim == 3


@needs_foreign
def test_an_encoder_in_the_file_needs_the_decoders_names():
    with pytest.raises(ValueError, match=r"layers: fc21 of .*mnist_vae\.pth gives 20 values and fc22 takes 400; name"):
        loaded({"name": "mlp", "path": "mnist_vae.pth", "output": "sigmoid"})


def shipped(folder, name, **changes):
    """A copy of the weights that come with the package, with entries of the side-car changed."""
    (folder / "w.safetensors").write_bytes((WEIGHTS / f"{name}.safetensors").read_bytes())
    said = json.loads((WEIGHTS / f"{name}.json").read_text())
    (folder / "w.json").write_text(json.dumps({**said, **changes}))
    return {"name": name, "path": str(folder / "w.safetensors")}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "mlp_vae",
            {"latent_dim": 31, "z_dim": 31},
            r"hidden\.weight of .*w\.safetensors is \[256, 32\] and should be",
        ),
        ("mlp_vae", {"image_shape": [1, 27, 28]}, r"pixels\.weight of .* is \[784, 256\] and should be \[756, 256\]"),
        ("mlp_vae", {"arch": "mini_style"}, r"is of arch 'mini_style'.*set algorithm\.generator\.name"),
        ("mlp_vae", {"value_range": [-1, 1]}, r"must say latent 'z' and value_range \[0\.0, 1\.0\]"),
        ("mlp_vae", {"value_range": [0, 255]}, r"value_range: it must be \[0, 1\] or \[-1, 1\]; got \[0\.0, 255\.0\]"),
        ("mlp_vae", {"latent": "x"}, r"w\.json: latent: Input should be 'z' or 'w'; got 'x'"),
        ("mlp_vae", {"z_dim": 5}, r"z_dim: with latent z .* must be latent_dim \(32\); got 5"),
        ("mlp_vae", {"image_shape": [1, 0, 28]}, r"image_shape\.1: Input should be greater than or equal to 1; got 0"),
        ("mini_style", {"latent": "z"}, "must say latent 'w'"),
        ("mini_style", {"image_shape": [1, 33, 28]}, "at most 32 x 32"),
        (
            "mini_style",
            {"image_shape": [3, 28, 28]},
            r"to_pixels\.weight of .* is \[1, 32, 1, 1\] and should be \[3, 32",
        ),
        ("mini_style", {"z_dim": 63}, r"mapping\.first\.weight of .* is \[64, 64\] and should be \[64, 63\]"),
    ],
)
def test_a_side_car_that_does_not_fit_the_weights(tmp_path, name, changes, said):
    assert loaded(shipped(tmp_path, name)).fingerprint == loaded(name).fingerprint
    with pytest.raises(ValueError, match=said):
        loaded(shipped(tmp_path, name, **changes))


def test_weights_of_another_network(tmp_path):
    given = shipped(tmp_path, "mlp_vae")
    state = load_file(tmp_path / "w.safetensors")
    save_file({**state, "more": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors has tensors that nothing is known of: more"):
        loaded(given)
    del state["pixels.bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors has no tensor 'pixels\.bias'"):
        loaded(given)


def test_a_side_car_is_needed_and_is_json(tmp_path):
    given = shipped(tmp_path, "mlp_vae")
    (tmp_path / "w.json").write_text("{")
    with pytest.raises(ValueError, match=r"w\.json cannot be read as JSON"):
        loaded(given)
    (tmp_path / "w.json").write_text("[]")
    with pytest.raises(ValueError, match=r"w\.json: the file: .*; got \[\]"):
        loaded(given)
    (tmp_path / "w.json").unlink()
    with pytest.raises(ValueError, match=r"has no w\.json beside it; write that file, for instance \{"):
        loaded(given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent_dim": 5}, r"mapping of .*pair\.pt gives \[2, 4\] for two rows of 2 values.*says \[2, 5\]"),
        ({"image_shape": [1, 3, 3]}, r"forward of .*pair\.pt gives \[2, 1, 2, 3\] .*says \[2, 1, 3, 3\]"),
    ],
)
def test_torchscript_of_other_sizes(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        loaded(scripted(tmp_path, **changes))


def test_torchscript_that_takes_other_latents_or_has_no_mapping(tmp_path):
    linear = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (1, 2, 3)))
    with pytest.raises(ValueError, match=r"pair\.pt exports no mapping"):
        loaded(scripted(tmp_path, linear))
    with pytest.raises(ValueError, match=r"forward of .*pair\.pt does not take \[n, 5\]"):
        loaded(scripted(tmp_path, linear, latent="z", z_dim=5, latent_dim=5))
    given = scripted(tmp_path)
    (tmp_path / "pair.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"pair\.pt cannot be read as TorchScript"):
        loaded(given)


# ---- training one
def clothes(n=130, shape=(1, 12, 12), dtype=torch.uint8):
    """Images of a bright stripe on black."""
    x = torch.zeros(n, *shape, dtype=dtype)
    x[..., 3:9] = 255 if dtype == torch.uint8 else 2
    y = torch.zeros(n, dtype=torch.int64).numpy()
    return Dataset(x.numpy(), y, x.numpy(), y, 1)


def bright():
    """Images of 0 and 2."""
    return clothes(dtype=torch.float32)


def trained(data, arch, out, **changes: Any):
    said: list[str] = []
    pretrain(lambda: data, arch, out, made_by={"made_by": "by hand"}, say=said.append, **changes)
    return said


@pytest.mark.parametrize(
    ("arch", "latent_dim", "shape", "made"),
    [
        ("mlp_vae", None, (1, 12, 12), (32, (1, 12, 12))),
        ("mlp_vae", 3, (3, 8, 12), (3, (3, 8, 8))),
        ("mini_style", None, (1, 12, 12), (64, (1, 16, 16))),
        ("mini_style", 5, (3, 40, 40), (5, (3, 32, 32))),
    ],
)
def test_what_is_trained_can_be_loaded_and_comes_out_the_same_again(tmp_path, arch, latent_dim, shape, made):
    out = tmp_path / "g.safetensors"
    changes = {"epochs": 1, "latent_dim": latent_dim}
    said = trained(clothes(shape=shape), arch, out, **changes)
    assert any(line.startswith("step 1 of 1") or line.startswith("step 2 of 2") for line in said)
    generator = loaded({"name": arch, "path": str(out)})
    assert (generator.latent_dim, generator.image_shape) == made
    assert read_sidecar(out).made_by == "by hand"
    assert json.loads(out.with_suffix(".json").read_text())["images"] == 130
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    first = [out.with_suffix(ending).read_bytes() for ending in (".safetensors", ".json", ".png")]
    with pytest.raises(ValueError, match=r"--out: .*g.safetensors exists, and runs may have begun with it"):
        trained(clothes(shape=shape), arch, out, **changes)
    out.unlink()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    try:
        trained(clothes(shape=shape), arch, out, **changes)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert [out.with_suffix(ending).read_bytes() for ending in (".safetensors", ".json", ".png")] == first
    assert torch.equal(torch.get_rng_state(), state)
    out.unlink()
    trained(clothes(shape=shape), arch, out, **changes, seed=1)
    assert out.read_bytes() != first[0]


def test_the_vae_learns_what_the_images_look_like(tmp_path):
    out = tmp_path / "g.safetensors"
    trained(clothes(200), "mlp_vae", out, epochs=60)
    generator = loaded({"name": "mlp_vae", "path": str(out)})
    mean = generator.decode(generator.sample_latents(50, rng())).mean((0, 1))
    assert float(mean[:, 4:8].min()) > 0.8 and float(mean[:, :2].max()) < 0.2


@pytest.mark.parametrize(
    ("arch", "out", "data", "said"),
    [
        ("vae", "g.safetensors", clothes(), "--arch: there is no 'vae'; choose mini_style or mlp_vae"),
        ("mlp_vae", "g.pth", clothes(), r"--out: .*g\.pth must end in \.safetensors"),
        ("mlp_vae", "no/g.safetensors", clothes(), "--out: there is no folder .*no; make it"),
        (
            "mlp_vae",
            "g.safetensors",
            clothes(99),
            "--images: mlp_vae is trained in batches of 100 images, and there are 99",
        ),
        ("mlp_vae", "g.safetensors", clothes(120, (9,)), r"DATA: its samples are of shape \[9\], no images"),
        ("mlp_vae", "g.safetensors", bright(), "DATA: its pixels are 0 to 2; store bytes, or float32 from 0 to 1"),
        ("mlp_vae", "g.safetensors", clothes(120, (2, 9, 9)), "the generator's images have 2 channels"),
    ],
)
def test_what_cannot_be_trained(tmp_path, arch, out, data, said):
    with pytest.raises(ValueError, match=said):
        trained(data, arch, tmp_path / out)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "fldist", "pretrain-generator", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)

    done = run("digits", "--arch", "mlp_vae", "--out", "d.safetensors", "--epochs", "1", "--images", "300")
    assert done.returncode == 0, done.stderr
    assert "step 3 of 3" in done.stderr and "d.safetensors, 0.1" in done.stderr
    said = json.loads((tmp_path / "d.json").read_text())
    assert said["made_by"] == (
        "fldist pretrain-generator digits --arch mlp_vae --out d.safetensors --images 300 --epochs 1 --seed 0"
    )
    assert (said["data"], said["images"], said["image_shape"]) == ("digits", 300, [1, 8, 8])
    failed = run("digitz", "--out", "e.safetensors")
    assert failed.returncode == 2 and "task.data.name: unknown name 'digitz'; did you mean 'digits'?" in failed.stderr


def test_an_installed_package_has_the_weights():
    text = (Path(__file__).parents[1] / "setup.py").read_text()
    globs = re.search(r'"fldist\.models\.generators": (\[.*\])', text)
    assert globs is not None
    found = {path.name for glob in json.loads(globs[1]) for path in WEIGHTS.parent.glob(glob)}
    assert found >= {f"{name}.{ending}" for name in ("mlp_vae", "mini_style") for ending in ("safetensors", "json")}


@pytest.mark.parametrize("name", ["mlp_vae_mnist.safetensors", None])
def test_weights_that_come_along_are_found_by_their_name_from_anywhere(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLDIST_DATA", raising=False)
    made = MlpVae(name).load(torch.device("cpu"))
    assert (made.latent_dim, made.image_shape) == (32, (1, 28, 28))
    assert (made.fingerprint == MlpVae().load(torch.device("cpu")).fingerprint) == (name is None)
    (tmp_path / "mlp_vae_mnist.safetensors").write_bytes(b"mine")  # what is nearer comes first
    if name is not None:
        with pytest.raises(ValueError, match=str(tmp_path)):
            MlpVae(name).load(torch.device("cpu"))
