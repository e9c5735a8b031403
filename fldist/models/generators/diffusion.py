"""Stable Diffusion as a pretrained generator: from the initial noise to an image, under one prompt for all latents.

The networks are those of the library `diffusers` (extra `diffusion`), read from a local folder: nothing is fetched,
only safetensors are read, and no code that lies in the folder is run. Nothing is trained here, and the prompt never
depends on a class.
"""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fldist.models.generators.pretrained import KEY, GeneratorConfig, PretrainedGenerator, fingerprint_of
from fldist.seeding import preserved
from fldist.vision import torchvision

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
"""The folders of a pipeline that are read."""
BATCH = 4
"""Latents that are denoised at a time; guidance doubles them."""


@dataclass(frozen=True)
class Diffusion(GeneratorConfig):
    """A Stable Diffusion pipeline (Rombach et al., CVPR 2022) in a folder that `save_pretrained` wrote.

    path: the folder with unet, vae, text_encoder, tokenizer and scheduler; their weights as safetensors. prompt: the
    text that all images are made for; it is encoded once, when the pipeline is loaded, and the empty text with it as
    what guidance leads away from. steps: denoising steps of the scheduler that is stored (PNDM in version 1.5).
    guidance: the scale of classifier-free guidance, none at 1 or below. dtype: of the networks; float16 needs a GPU.

    The latent is the initial noise, N(0, I) of H = in_channels * sample_size^2 values (16384 in version 1.5); the
    pipeline multiplies it by the scheduler's init_noise_sigma. There is no safety checker, which would return black
    images in the place of some.
    """

    path: str
    prompt: str = "a cat"
    steps: Annotated[int, Field(ge=1)] = 50
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 7.5
    dtype: Literal["float32", "float16"] = "float32"

    def load(self, device: torch.device) -> DiffusionGenerator:
        """Read the folder. ValueError: no such pipeline, no safetensors, no library, float16 without a GPU."""
        if self.dtype == "float16" and device.type == "cpu":
            raise ValueError(f"{KEY}.dtype: float16 needs a GPU; set float32, or a GPU under `device`")
        folder = _find(self.path)
        diffusers, transformers = _libraries()
        scheduler = _scheduler(diffusers, folder)
        trained = int(scheduler.config.num_train_timesteps)
        if self.steps > trained:
            raise ValueError(f"{KEY}.steps: the pipeline was trained with {trained} steps; got {self.steps}; lower it")
        with preserved():  # the networks' own initial values, which are overwritten, draw from the global generators
            dtype: torch.dtype = getattr(torch, self.dtype)
            theirs = {"torch_dtype": dtype, "low_cpu_mem_usage": False}  # the other way needs one more library
            networks = {
                "unet": _network(diffusers.UNet2DConditionModel, folder, "unet", **theirs),
                "vae": _network(diffusers.AutoencoderKL, folder, "vae", **theirs),
                "text_encoder": _network(transformers.CLIPTextModel, folder, "text_encoder", dtype=dtype),
            }
        for network in networks.values():
            network.to(device).eval().requires_grad_(False)
        tokenizer = _read("tokenizer", folder, transformers.CLIPTokenizer, {})
        pipeline = diffusers.StableDiffusionPipeline(
            **networks,
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return DiffusionGenerator(self, pipeline, device)


class DiffusionGenerator(PretrainedGenerator):
    """The generator of a `Diffusion`: latents are noise N(0, I) [n, H], images RGB in 0..1."""

    def __init__(self, config: Diffusion, pipeline: Any, device: torch.device) -> None:
        size = pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        factor = pipeline.vae_scale_factor
        self._config = config
        self._pipeline = pipeline
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self.latent_shape = (int(pipeline.unet.config.in_channels), int(height), int(width))
        self.latent_dim = math.prod(self.latent_shape)
        self.image_shape = (int(pipeline.vae.config.out_channels), int(height) * factor, int(width) * factor)
        self.num_classes = 0
        self.differentiable = False
        with torch.no_grad():
            embeds = pipeline.encode_prompt(config.prompt, device, 1, config.guidance > 1)
        self._embeds: list[Tensor | None] = [None if of is None else of.detach() for of in embeds]  # [1, tokens, width]
        self.fingerprint = self._fingerprint()
        pipeline.text_encoder = None  # it has done its work, and is half a gigabyte in version 1.5

    def _fingerprint(self) -> str:
        config, pipeline = self._config, self._pipeline
        tensors = {f"prompt.{i}": of for i, of in enumerate(self._embeds) if of is not None}
        for part in ("unet", "vae"):
            tensors |= {f"{part}.{name}": tensor for name, tensor in getattr(pipeline, part).state_dict().items()}
        scheduler = {k: repr(v) for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
        settings = {
            "arch": "diffusion",
            "steps": config.steps,
            "guidance": config.guidance,
            "scheduler": [type(pipeline.scheduler).__name__, scheduler],
            "scaling": pipeline.vae.config.scaling_factor,
        }
        return fingerprint_of(settings, tensors)

    def sample_latents(self, n: int, rng: torch.Generator) -> Tensor:
        """N(0, I): float32 [n, H] on the generator's device, not scaled by the scheduler's init_noise_sigma."""
        return torch.randn(n, self.latent_dim, generator=rng).to(self._device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, H] -> images float32 [n, *image_shape] in 0..1, on the generator's device.

        They are denoised four at a time with eta 0. A scheduler that draws noise in its steps draws the same each time.
        """
        if latents.dim() != 2 or latents.shape[1] != self.latent_dim:
            raise ValueError(f"{KEY}: it decodes latents [n, {self.latent_dim}]; it was given {list(latents.shape)}")
        if not len(latents):
            return torch.empty(0, *self.image_shape, device=self._device)
        noise = latents.to(self._device, self._dtype).reshape(-1, *self.latent_shape)
        with preserved():
            return torch.cat([self._denoised(part) for part in torch.split(noise, BATCH)])

    def _denoised(self, noise: Tensor) -> Tensor:
        prompt, away = (None if of is None else of.repeat(len(noise), 1, 1) for of in self._embeds)
        images: Tensor = self._pipeline(
            latents=noise,
            prompt_embeds=prompt,
            negative_prompt_embeds=away,
            num_inference_steps=self._config.steps,
            guidance_scale=self._config.guidance,
            eta=0.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        return images.float().clamp(0.0, 1.0)


def _libraries() -> tuple[Any, Any]:
    """Diffusers and transformers, imported; ValueError says how to install them."""
    torchvision()  # they import it themselves, which can fail where this has not been done before
    try:
        return importlib.import_module("diffusers"), importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f"{KEY}: diffusion needs the libraries diffusers and transformers ({error}); install them with: "
            "pip install 'fldist[diffusion]'"
        ) from None


def _find(path: str) -> Path:
    """The folder of a pipeline, all its parts being there; ValueError says what is missing."""
    folder = Path(path).expanduser().absolute()
    remedy = "give the folder that save_pretrained wrote; names of pipelines on a hub are not fetched"
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{KEY}.path: {folder} is no folder of diffusers: it has no model_index.json; {remedy}")
    for part in PARTS:
        if not (folder / part).is_dir():
            raise ValueError(
                f"{KEY}.path: {folder} holds no Stable Diffusion pipeline: it has no folder {part!r}; {remedy}"
            )
    return folder


def _read(part: str, folder: Path, kind: Any, options: dict[str, Any]) -> Any:
    """What a part's folder holds, by its class's from_pretrained; ValueError for what cannot be read."""
    try:
        return kind.from_pretrained(str(folder), subfolder=part, local_files_only=True, **options)
    except Exception as error:  # OSError, ValueError, SafetensorError, ... of a damaged or foreign folder
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{KEY}.path: {folder / part} cannot be read as {kind.__name__}: {said}; only safetensors are read: save "
            "the pipeline with save_pretrained(folder, safe_serialization=True)"
        ) from None


def _network(kind: Any, folder: Path, part: str, **options: Any) -> torch.nn.Module:
    """A network with all its weights: the libraries would leave missing ones at random, with a mere warning."""
    options |= {"use_safetensors": True, "output_loading_info": True}
    network, info = _read(part, folder, kind, options)
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise ValueError(
            f"{KEY}.path: {folder / part} lacks {len(missing)} tensors of {kind.__name__} or has them in another size, "
            f"first {missing[0]}; save the pipeline again"
        )
    assert isinstance(network, torch.nn.Module)
    return network


def _scheduler(diffusers: Any, folder: Path) -> Any:
    """The scheduler as stored, of the class of the library that its file names."""
    file = folder / "scheduler" / "scheduler_config.json"
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["_class_name"]
        kind = getattr(diffusers, name)
        if not issubclass(kind, diffusers.SchedulerMixin):
            raise TypeError(f"{name} is no scheduler")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{KEY}.path: {file} names no scheduler of diffusers ({error!r}); save the pipeline again"
        ) from None
    return _read("scheduler", folder, kind, {})
