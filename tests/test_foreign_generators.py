"""Generators of other people's libraries: StyleGAN's pickles, what they are converted to, Stable Diffusion.

The networks are miniatures that the tests make, offline: a folder laid out as NVIDIA's code is, with the habits that
matter to a trace, and a pipeline of diffusers' own classes.
"""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fldist.cli import app
from fldist.models.generators import named
from fldist.models.generators.convert import convert
from fldist.models.generators.diffusion import Diffusion, DiffusionGenerator
from fldist.models.generators.stylegan import StyleGan, classes_of
from fldist.models.generators.torchscript import set_device
from fldist.vision import torchvision

CPU = torch.device("cpu")

# as in NVIDIA's: a number of rows kept as a constant, a mean over the batch, matrices made on the latent's device,
# noise unless it is told otherwise, truncation by a loop over the rows' classes, ops timed by a profiler
NETWORKS = """
import torch
from torch_utils import misc
import dnnlib


class Mapping(torch.nn.Module):
    def __init__(self, z_dim, c_dim, w_dim, num_ws):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.embed = torch.nn.Embedding(c_dim, z_dim) if c_dim else None
        self.fc = torch.nn.Linear(z_dim + (z_dim if c_dim else 0), w_dim)
        self.register_buffer("w_avg", torch.randn([c_dim, w_dim] if c_dim else [w_dim]))

    def forward(self, z, c, truncation_psi=1):
        x = misc.normalized(z)
        if self.c_dim:
            assert tuple(c.shape) == (len(z), self.c_dim)
            x = torch.cat([x, self.embed(c.argmax(1))], dim=1)
        x = self.fc(x).unsqueeze(1).repeat([1, self.num_ws, 1])
        if truncation_psi != 1:
            if self.c_dim:
                for i, label in enumerate(c.argmax(1)):
                    x[i, :] = self.w_avg[label].lerp(x[i, :], truncation_psi)
            else:
                x[:, :] = self.w_avg.lerp(x, truncation_psi)
        return x


class Synthesis(torch.nn.Module):
    def __init__(self, w_dim, num_ws):
        super().__init__()
        self.num_ws = num_ws
        self.affines = torch.nn.ModuleList([torch.nn.Linear(w_dim, 4) for _ in range(num_ws)])
        self.weight = torch.nn.Parameter(torch.randn(3, 4, 3, 3))
        self.register_buffer("grid", torch.randn(1, 4, 8, 8))

    def forward(self, ws, noise_mode="random"):
        rows = int(ws.shape[0])
        turn = torch.eye(4, device=ws.device).unsqueeze(0).repeat([rows, 1, 1])
        turn[:, 0, 0] = ws[:, 0, 0]
        x = self.grid
        for i, affine in enumerate(self.affines):
            style = (affine(ws[:, i]).unsqueeze(1) @ turn).squeeze(1)
            x = x * (style * style.square().mean().rsqrt())[:, :, None, None]
        weight = self.weight.unsqueeze(0).repeat(rows, 1, 1, 1, 1).reshape(-1, 4, 3, 3)
        x = torch.nn.functional.conv2d(x.reshape(1, -1, 8, 8), weight, padding=1, groups=rows).reshape(rows, 3, 8, 8)
        if noise_mode == "random":
            x = x + torch.randn_like(x)
        return dnnlib.scaled(x)


class Generator(torch.nn.Module):
    def __init__(self, z_dim, c_dim, w_dim, num_ws):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.mapping = Mapping(z_dim, c_dim, w_dim, num_ws)
        self.synthesis = Synthesis(w_dim, num_ws)
"""
MISC = """
import torch


def normalized(x):
    with torch.autograd.profiler.record_function("normalized"):
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()
"""


def write_code(folder: Path, scale: float = 0.5) -> Path:
    for name, text in {
        "dnnlib/__init__.py": f"def scaled(x):\n    return x * {scale}\n",
        "torch_utils/__init__.py": "",
        "torch_utils/misc.py": MISC,
        "training/__init__.py": "",
        "training/networks.py": NETWORKS,
    }.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def write_network(code: Path, file: Path, c_dim: int = 0, change: Any = None) -> Any:
    """Make a network with the code, as whoever trained it would have; returns it."""
    sys.path.insert(0, str(code))
    try:
        torch.manual_seed(1)
        module = importlib.import_module("training.networks")
        network = module.Generator(z_dim=4, c_dim=c_dim, w_dim=6, num_ws=3).eval().requires_grad_(False)
        if change is not None:
            change(network)
        file.write_bytes(pickle.dumps({"G": None, "G_ema": network, "training_set_kwargs": {}}))
    finally:
        sys.path.remove(str(code))
        for name in [n for n in sys.modules if n.split(".")[0] in ("dnnlib", "torch_utils", "training")]:
            del sys.modules[name]
    return network


@pytest.fixture
def code(tmp_path: Path) -> Path:
    return write_code(tmp_path / "code")


def config(code: Path, file: Path, **fields: Any) -> StyleGan:
    return StyleGan(**{"network_pkl": str(file), "code_dir": str(code), "trust_pickle": True, **fields})


# ---- StyleGAN
@pytest.mark.parametrize("c_dim", [0, 5])
@pytest.mark.parametrize(("kind", "offset"), [("stylegan3", 128.0), ("stylegan-xl", 127.5)])
def test_a_network_gives_what_its_own_code_gives(
    code: Path, tmp_path: Path, c_dim: int, kind: str, offset: float
) -> None:
    network = write_network(code, tmp_path / "n.pkl", c_dim)
    made = config(code, tmp_path / "n.pkl", kind=kind).load(CPU)
    assert (made.latent_dim, made.latent_shape, made.image_shape, made.num_classes) == (6, (6,), (3, 8, 8), c_dim)

    latents = made.sample_latents(7, torch.Generator().manual_seed(3))
    noise = torch.randn(7, 5 if c_dim else 4, generator=torch.Generator().manual_seed(3))
    onehot = torch.nn.functional.one_hot(classes_of(noise[:, 4], c_dim), c_dim) if c_dim else None
    assert torch.allclose(latents, network.mapping(noise[:, :4], onehot)[:, 0, :], atol=1e-6)
    assert latents.dtype == torch.float32 and not latents.requires_grad

    images = made.decode(latents)
    raw = torch.cat([network.synthesis(w.repeat(1, 3, 1), noise_mode="const") for w in latents.unsqueeze(1)])
    assert torch.allclose(images, (127.5 * raw + offset).clamp(0, 255) / 255, atol=1e-6)
    assert images.shape == (7, 3, 8, 8) and images.dtype == torch.float32
    assert 0 <= float(images.min()) < 0.1 and 0.9 < float(images.max()) <= 1
    assert torch.equal(images, made.decode(latents))  # no noise is drawn
    assert torch.equal(images[2:4], made.decode(latents[2:4]))  # nor does an image depend on the others
    assert made.decode(latents[:0]).shape == (0, 3, 8, 8)
    assert made.sample_latents(0, torch.Generator()).shape == (0, 6)
    with pytest.raises(ValueError, match=r"decodes latents \[n, 6\]"):
        made.decode(latents[:, :5])


def test_classes_are_uniform() -> None:
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(classes_of(normal, 5), minlength=5)
    assert int(counts.min()) > 3800 and len(counts) == 5
    assert classes_of(torch.tensor([-50.0, 0.0, 50.0]), 5).tolist() == [0, 2, 4]


def test_truncation_pulls_latents_to_their_mean(code: Path, tmp_path: Path) -> None:
    network = write_network(code, tmp_path / "n.pkl")
    free = config(code, tmp_path / "n.pkl").load(CPU)
    half = config(code, tmp_path / "n.pkl", truncation_psi=0.5).load(CPU)
    drawn = [made.sample_latents(3, torch.Generator().manual_seed(0)) for made in (free, half)]
    assert torch.allclose(drawn[1], (drawn[0] + network.mapping.w_avg) / 2, atol=1e-6)
    assert free.fingerprint != half.fingerprint
    assert free.fingerprint == config(code, tmp_path / "n.pkl").load(CPU).fingerprint


def test_loading_leaves_the_interpreter_as_it_was(code: Path, tmp_path: Path) -> None:
    write_network(code, tmp_path / "n.pkl")
    other = write_code(tmp_path / "other", scale=0.25)  # another version of the code, imported by the same names
    path, random = list(sys.path), torch.get_rng_state()
    made = [config(where, tmp_path / "n.pkl").load(CPU) for where in (code, other)]
    assert sys.path == path and torch.equal(torch.get_rng_state(), random)
    assert not [name for name in sys.modules if name.split(".")[0] in ("dnnlib", "torch_utils", "training")]
    w = torch.zeros(1, 6)
    dark, darker = (generator.decode(w) - 128 / 255 for generator in made)
    inside = dark.abs() < 0.4
    assert torch.allclose(dark[inside], 2 * darker[inside], atol=1e-6) and bool((dark[inside].abs() > 0.01).any())


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_an_untrusted_pickle_is_never_opened(code: Path, tmp_path: Path) -> None:
    bomb, went_off = tmp_path / "my bomb.pkl", tmp_path / "went-off"
    bomb.write_bytes(pickle.dumps({"G_ema": Bomb(went_off)}))
    with pytest.raises(ValueError, match="trust_pickle") as caught:
        config(code, bomb, trust_pickle=False, kind="stylegan-xl", truncation_psi=0.7).load(CPU)
    command = (
        f"fldist data convert-generator '{bomb}' --code-dir {code} --kind stylegan-xl --truncation-psi 0.7 "
        "--trust-pickle --out 'my bomb.pt'"
    )
    assert command in str(caught.value) and "run whatever program" in str(caught.value)
    got = CliRunner().invoke(
        app, ["data", "convert-generator", str(bomb), "--code-dir", str(code), "--out", str(tmp_path / "o.pt")]
    )
    assert isinstance(got.exception, ValueError) and "--trust-pickle" in str(got.exception)
    assert "is to run it" in str(got.exception) and not (tmp_path / "o.pt").exists()
    assert not went_off.exists()
    with pytest.raises(ValueError, match="is no network but a NoneType"):  # it can go off, once it is trusted
        config(code, bomb).load(CPU)
    assert went_off.exists()


def test_what_is_wrong_is_named(code: Path, tmp_path: Path) -> None:
    file = tmp_path / "n.pkl"
    write_network(code, file)

    def refused(**fields: Any) -> str:
        with pytest.raises(ValueError) as caught:
            config(code, file, **fields).load(CPU)
        return str(caught.value)

    missing = refused(network_pkl=str(tmp_path / "none.pkl"))
    assert missing.startswith("algorithm.generator.network_pkl:") and str(tmp_path / "none.pkl") in missing
    assert "algorithm.generator.code_dir" in (said := refused(code_dir=str(tmp_path))) and "'dnnlib'" in said
    assert "set algorithm.generator.key to one of" in (said := refused(key="G_best"))
    assert "'G_best'" in said and "G, G_ema" in said
    assert "set algorithm.generator.space=w" in refused(space="z")
    assert "is no network" in refused(key="training_set_kwargs")
    with pytest.raises(ValueError, match="space"):
        named({"name": "stylegan", "network_pkl": "a", "code_dir": "b", "space": "z"})
    with pytest.raises(ValueError, match="code_dir"):
        named({"name": "stylegan", "network_pkl": "a"})
    with pytest.raises(ValueError, match="truncation_psi"):
        named({"name": "stylegan", "network_pkl": "a", "code_dir": "b", "truncation_psi": 1.5})
    (code / "training" / "networks.py").unlink()
    assert "cannot be unpickled with the code in" in refused()
    file.write_bytes(pickle.dumps({"G_ema": torch.nn.Linear(2, 2)}))
    assert "it has no z_dim, w_dim" in refused()
    file.write_bytes(pickle.dumps([1]))
    assert "it is a list" in refused()


# ---- conversion
@pytest.mark.parametrize(("c_dim", "psi"), [(0, 1.0), (0, 0.7), (5, 1.0), (5, 0.7)])
def test_a_converted_network_needs_no_trust_and_gives_the_same(
    code: Path, tmp_path: Path, c_dim: int, psi: float
) -> None:
    file, out = tmp_path / "n.pkl", tmp_path / "n.pt"
    write_network(code, file, c_dim)
    original = config(code, file, truncation_psi=psi).load(CPU)
    command = ["data", "convert-generator", str(file), "--code-dir", str(code), "--trust-pickle", "--out", str(out)]
    got = CliRunner().invoke(app, [*command, "--truncation-psi", str(psi)])
    assert got.exception is None and "name: torchscript" in got.output

    car = json.loads(out.with_suffix(".json").read_text())
    assert (car["arch"], car["latent"], car["latent_dim"]) == ("stylegan3", "w", 6)
    assert (car["image_shape"], car["value_range"], car["num_classes"]) == ([3, 8, 8], [0, 1], c_dim)
    assert car["z_dim"] == (5 if c_dim else 4) and "convert-generator" in car["made_by"]

    shutil.rmtree(code)
    file.unlink()
    made = named({"name": "torchscript", "path": str(out)}).load(CPU)
    drawn = [of.sample_latents(9, torch.Generator().manual_seed(3)) for of in (original, made)]
    assert torch.allclose(drawn[0], drawn[1], atol=1e-5)
    assert torch.allclose(original.decode(drawn[0]), made.decode(drawn[0]), atol=1e-5)
    assert made.decode(drawn[0]).std() > 0.1
    assert made.decode(drawn[0][:0]).shape == (0, 3, 8, 8)


def test_a_converted_network_makes_its_matrices_on_the_device_it_is_loaded_on(code: Path, tmp_path: Path) -> None:
    write_network(code, tmp_path / "n.pkl")
    convert(config(code, tmp_path / "n.pkl"), tmp_path / "n.pt")
    w = torch.zeros(2, 6)
    program = torch.jit.load(tmp_path / "n.pt")
    set_device(program, torch.device("meta"))  # there is no GPU here; the matrix has no values there
    with pytest.raises(RuntimeError, match=r"(?i)meta"):
        program(w)
    again = torch.jit.load(tmp_path / "n.pt")
    set_device(again, torch.device("cuda:0"))
    set_device(again, CPU)
    assert torch.equal(again(w), torch.jit.load(tmp_path / "n.pt")(w))


def test_what_a_trace_does_not_follow_is_refused(code: Path, tmp_path: Path) -> None:
    text = NETWORKS.replace("x = self.grid\n", "x = self.grid if float(ws.sum()) > 0 else -self.grid\n")
    (code / "training" / "networks.py").write_text(text)
    write_network(code, tmp_path / "n.pkl")
    with pytest.raises(ValueError, match="makes other images than the original"):
        convert(config(code, tmp_path / "n.pkl"), tmp_path / "n.pt")
    assert not (tmp_path / "n.pt").exists() and not (tmp_path / "n.json").exists()


def test_where_a_conversion_is_written_is_checked_first(code: Path, tmp_path: Path) -> None:
    for out, said in (("n.safetensors", "must end in .pt"), ("no/n.pt", "there is no folder")):
        with pytest.raises(ValueError, match=f"--out: .*{said}"):
            convert(config(code, tmp_path / "n.pkl"), tmp_path / out)
    with pytest.raises(ValueError, match="--kind"):
        CliRunner().invoke(
            app,
            ["data", "convert-generator", "n", "--code-dir", "c", "--out", "o.pt", "--kind", "biggan"],
            catch_exceptions=False,
        )


# ---- Stable Diffusion
@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of the library's own classes, at random, with the tokenizer laid out as in version 1.5."""
    torchvision()
    import diffusers
    import transformers

    folder = tmp_path_factory.mktemp("diffusion")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")),
    ]
    words += ["ca", "cat</w>"]
    tokens = folder / "pipeline" / "tokenizer"
    tokens.mkdir(parents=True)
    (tokens / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tokens / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    (tokens / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 8, "pad_token": "<|endoftext|>"})
    )
    torch.manual_seed(0)
    size = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    made = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            sample_size=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            **size,
        ),
        vae=diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **size
        ),
        text_encoder=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=8,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(str(tokens)),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        getattr(made, part).save_pretrained(str(folder / "pipeline" / part))
    made.save_config(str(folder / "pipeline"))
    return folder / "pipeline"


@pytest.fixture
def copied(pipeline: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pipeline, tmp_path / "copied")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refused(*_: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refused)
    yield


def load(folder: Path, **fields: Any) -> DiffusionGenerator:
    return Diffusion(**{"path": str(folder), "steps": 3, **fields}).load(CPU)


def test_a_pipeline_gives_what_the_library_gives(pipeline: Path, offline: None) -> None:
    import diffusers

    random = torch.get_rng_state()
    made = load(pipeline)
    assert (made.latent_dim, made.latent_shape, made.image_shape) == (64, (4, 4, 4), (3, 8, 8))
    assert made.num_classes == 0
    latents = made.sample_latents(6, torch.Generator().manual_seed(1))
    assert torch.equal(latents, torch.randn(6, 64, generator=torch.Generator().manual_seed(1)))
    images = made.decode(latents)
    assert images.shape == (6, 3, 8, 8) and images.dtype == torch.float32
    assert float(images.min()) >= 0 and float(images.max()) <= 1 and float(images.std()) > 0.05
    assert torch.equal(images, made.decode(latents))
    assert made.decode(latents[:0]).shape == (0, 3, 8, 8)
    assert torch.equal(torch.get_rng_state(), random)

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(pipeline), low_cpu_mem_usage=False)
    wanted = theirs(["a cat"] * 6, latents=latents.reshape(6, 4, 4, 4), num_inference_steps=3, output_type="np").images
    assert torch.allclose(images, torch.from_numpy(wanted).permute(0, 3, 1, 2), atol=1e-4)


def test_prompt_guidance_and_steps_matter(pipeline: Path) -> None:
    latents = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    made = [
        load(pipeline),
        load(pipeline, prompt="a dog"),
        load(pipeline, guidance=1.0),
        load(pipeline, steps=4),
    ]
    images = [generator.decode(latents) for generator in made]
    for i, other in enumerate(images[1:], 1):
        assert not torch.allclose(images[0], other, atol=1e-6), i
    assert len({generator.fingerprint for generator in made}) == 4
    assert made[0].fingerprint == load(pipeline).fingerprint


def test_the_stored_scheduler_is_used_and_its_noise_scaled(copied: Path) -> None:
    import diffusers

    latents = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    before = load(copied).decode(latents)
    config = diffusers.PNDMScheduler.from_pretrained(str(copied), subfolder="scheduler").config
    ancestral = diffusers.EulerAncestralDiscreteScheduler.from_config(config)  # its first noise is not N(0, I)
    ancestral.save_pretrained(str(copied / "scheduler"))
    made = load(copied)
    images = made.decode(latents)
    assert not torch.allclose(images, before, atol=1e-3)
    assert torch.equal(images, made.decode(latents))  # although its steps draw noise
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        str(copied), scheduler=ancestral, low_cpu_mem_usage=False
    )
    wanted = theirs(
        ["a cat"] * 2,
        latents=latents.reshape(2, 4, 4, 4),
        num_inference_steps=3,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert torch.allclose(images, wanted, atol=1e-4)


def test_what_is_wrong_with_a_pipeline_is_named(copied: Path, tmp_path: Path, offline: None) -> None:
    def refused(**fields: Any) -> str:
        with pytest.raises(ValueError) as caught:
            load(copied, **fields)
        assert str(caught.value).startswith("algorithm.generator.")
        return str(caught.value)

    assert "no folder of diffusers" in (said := refused(path="runwayml/stable-diffusion-v1-5"))
    assert "generator.path" in said and "are not fetched" in said
    assert "generator.dtype: float16 needs a GPU" in refused(dtype="float16")
    assert "generator.steps: the pipeline was trained with 1000 steps; got 1001" in refused(steps=1001)
    with pytest.raises(ValueError, match="steps"):
        named({"name": "diffusion", "path": str(copied), "steps": 0})
    with pytest.raises(ValueError, match="path"):
        named("diffusion")

    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}, weights)
    assert "lacks 1 tensors" in (said := refused()) and "conv_in.bias" in said
    weights.unlink()
    torch.save(tensors, copied / "unet" / "diffusion_pytorch_model.bin")  # a pickle
    assert "only safetensors are read" in refused()
    (copied / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert "names no scheduler of diffusers" in refused()
    shutil.rmtree(copied / "vae")
    assert "it has no folder 'vae'" in refused()


def test_a_missing_library_is_named_with_its_remedy(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'fldist\[diffusion\]'"):
        load(pipeline)
