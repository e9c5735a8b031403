"""What a server needs of a generator of images that somebody trained before: latents to draw, images to decode.

`PretrainedGenerator` is the interface, `GeneratorConfig` what a user writes, `ModuleGenerator` the interface over one
network (and a mapping network, where there is one); `to_samples` brings images to the clients' size and channels.
Weights come as safetensors or as a state dict of torch, with a JSON side-car where the tensors do not say enough; no
file read here can run code. Nothing is trained here, and no generator needs gradients, an encoder or labels.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.functional import interpolate

KEY = "algorithm.generator"
"""Where a configuration names a pretrained generator; errors begin with it."""
GREY = (0.299, 0.587, 0.114)
"""The luma of ITU-R BT.601: what red, green and blue weigh."""
WEIGHTS = Path(__file__).with_name("weights")
"""The folder of the weights that come with the package."""
RANGES = ((0.0, 1.0), (-1.0, 1.0))
"""The values that a network's pixels may be in."""
BLOCK = 256
"""Latents that pass through a network at a time."""

Size = Annotated[int, Field(ge=1)]
ImageShape = tuple[Size, Size, Size]  # channels, height, width


class PretrainedGenerator(ABC):
    """A frozen generator in evaluation mode, held by the server alone.

    latent_dim: H, the values of one latent, flattened; latent_shape: their shape, for instance (512,) or (4, 64, 64);
    image_shape: (channels, height, width) that `decode` gives; num_classes: 0 for an unconditional generator; else
    how many classes `sample_latents` chooses from, and nobody else sees them; differentiable: whether the network
    could pass gradients on, which nobody here asks for; fingerprint: SHA-256 (hex) of weights and settings.
    """

    latent_dim: int
    latent_shape: tuple[int, ...]
    image_shape: tuple[int, int, int]
    num_classes: int
    differentiable: bool
    fingerprint: str

    @abstractmethod
    def sample_latents(self, n: int, rng: torch.Generator) -> Tensor:
        """A draw of n latents from the generator's own distribution W: float32 [n, H], without gradients.

        rng: a generator on the CPU, the only source of randomness.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, H] -> images float32 [n, channels, height, width] in 0..1, without gradients, deterministic."""


@dataclass(frozen=True)
class GeneratorConfig(ABC):
    """The fields a user may set of a kind of generator; `load` makes it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @abstractmethod
    def load(self, device: torch.device) -> PretrainedGenerator:
        """Read the weights and bring them to the device; ValueError names the field, the value and the remedy."""


class ModuleGenerator(PretrainedGenerator):
    """A generator that is a network: latent [n, H] -> pixels [n, channels, height, width] in a range of values.

    synthesis: the network; mapping: noise [n, z_dim] -> latent [n, H], None where the latent is the noise itself;
    noise is N(0, I) in either case. value_range: of the network's pixels, (0, 1) or (-1, 1); they are brought to 0..1
    and clipped. arch: what the network is, for the fingerprint; the modules are frozen and put into evaluation mode.
    """

    def __init__(
        self,
        synthesis: nn.Module,
        mapping: nn.Module | None,
        *,
        arch: str,
        z_dim: int,
        latent_dim: int,
        image_shape: tuple[int, int, int],
        value_range: tuple[float, float],
        device: torch.device,
    ) -> None:
        networks = {"synthesis": synthesis} | ({} if mapping is None else {"mapping": mapping})
        settings = {"arch": arch, "z_dim": z_dim, "image_shape": image_shape, "value_range": value_range}
        tensors = {
            f"{part}.{name}": t for part, network in networks.items() for name, t in network.state_dict().items()
        }
        self.fingerprint = fingerprint_of(settings, tensors)
        for network in networks.values():
            network.to(device).eval().requires_grad_(False)
        self._synthesis = synthesis
        self._mapping = mapping
        self._device = device
        self._z_dim = z_dim
        self._value_range = value_range
        self.latent_dim = latent_dim
        self.latent_shape = (latent_dim,)
        self.image_shape = image_shape
        self.num_classes = 0
        self.differentiable = True

    @torch.no_grad()
    def sample_latents(self, n: int, rng: torch.Generator) -> Tensor:
        """N(0, I), or the mapping of it: float32 [n, H] on the generator's device."""
        z = torch.randn(n, self._z_dim, generator=rng).to(self._device)
        mapping = self._mapping
        if mapping is None or n == 0:
            return z if mapping is None else z.new_empty(0, self.latent_dim)
        return torch.cat([mapping(part) for part in torch.split(z, BLOCK)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, H] -> images float32 [n, *image_shape] in 0..1, on the generator's device."""
        if latents.dim() != 2 or latents.shape[1] != self.latent_dim:
            raise ValueError(f"{KEY}: it decodes latents [n, {self.latent_dim}]; it was given {list(latents.shape)}")
        if not len(latents):
            return torch.empty(0, *self.image_shape, device=self._device)
        low, high = self._value_range
        inputs = latents.to(self._device, torch.float32)
        pixels = torch.cat([self._synthesis(part) for part in torch.split(inputs, BLOCK)])
        return ((pixels - low) / (high - low)).clamp(0.0, 1.0)


def to_samples(images: Tensor, shape: tuple[int, ...], antialias: bool = True) -> Tensor:
    """Images [n, channels, height, width] in 0..1 as samples [n, *shape] in 0..1, shape being (channels, h, w).

    They are scaled, with their proportions, until they just cover h x w (bilinear; `antialias` matters where they
    shrink), and cut to the centre. RGB becomes grey as 0.299 R + 0.587 G + 0.114 B, grey becomes RGB by repetition.
    ValueError for sizes below 1 and for numbers of channels other than 1 and 3.
    """
    if len(shape) != 3 or min(shape) < 1 or images.dim() != 4 or min(images.shape[1:]) < 1:
        raise ValueError(
            f"{KEY}: images {list(images.shape[1:])} cannot become samples {list(shape)}; both must be [channels, "
            "height, width] of at least 1; choose data of images"
        )
    for name, channels in (("the generator's", images.shape[1]), ("the data's", shape[0])):
        if channels not in (1, 3):
            raise ValueError(
                f"{KEY}: {name} images have {channels} channels; only grey (1) and RGB (3) can be made of one another: "
                "choose another generator or other data"
            )
    samples = images.float()
    if samples.shape[1] == 3 and shape[0] == 1:
        samples = (samples * samples.new_tensor(GREY).view(3, 1, 1)).sum(dim=1, keepdim=True)
    height, width = samples.shape[2:]
    h, w = shape[1:]
    size = (max(h, w * height // width), max(w, h * width // height))  # one side is as wanted, none is shorter
    if size != (height, width):
        samples = interpolate(samples, size, mode="bilinear", align_corners=False, antialias=antialias)
    top, left = round((size[0] - h) / 2), round((size[1] - w) / 2)
    samples = samples[:, :, top : top + h, left : left + w].clamp(0.0, 1.0)
    return samples.expand(-1, shape[0], -1, -1).contiguous()


def fingerprint_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of settings that JSON can hold and of tensors by name: their types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- files
def find_file(path: str, key: str = f"{KEY}.path") -> Path:
    """A file where it is given, else below FLDIST_DATA, else in the folder `pretrained` of that, else in `WEIGHTS`.

    ValueError, beginning with `key`, names all places that were looked at.
    """
    given = Path(path).expanduser()
    places = [given.absolute()]
    root = os.environ.get("FLDIST_DATA")
    if root and not given.is_absolute():
        places += [Path(root).absolute() / given, Path(root).absolute() / "pretrained" / given]
    for place in [*places, WEIGHTS / given]:
        if place.is_file():
            return place
    remedy = "put it there" if root else "set FLDIST_DATA to the folder that has it"
    raise ValueError(f"{key}: no file found: looked for {', '.join(map(str, places))}; {remedy}, or correct {key}")


def read_state(file: Path, key: str = f"{KEY}.path") -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU: safetensors, or a state dict that torch.save wrote.

    A file that is not `.safetensors` is read with weights_only, which builds tensors and plain containers and refuses
    everything else; what lies under its `state_dict`, as Lightning writes it, is taken. ValueError for what cannot be
    read, for a file that would run code and for one that holds other things than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, SafetensorError, RuntimeError, EOFError, ... of a damaged file
        said = " ".join(str(error).split())[:160] or type(error).__name__
        if type(error).__name__ == "UnpicklingError":
            raise ValueError(
                f"{key}: {file} holds more than tensors, and reading it would run code, so it is not read; where you "
                f"trust it, write its state_dict() with safetensors.torch.save_file and name that file ({said})"
            ) from None
        raise ValueError(f"{key}: {file} cannot be read: {said}; write it again") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise ValueError(
            f"{key}: {file} holds no state dict of tensors; save module.state_dict(), best with "
            "safetensors.torch.save_file"
        )
    return {str(name): value for name, value in state.items()}


def load_into(module: nn.Module, state: Mapping[str, Tensor], file: Path, key: str = f"{KEY}.path") -> None:
    """Give tensors to a module of the same names and shapes; ValueError names the file and what differs.

    The module may be on the device `meta`, so that no initial values are drawn from torch's global generator.
    """
    wanted = module.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise ValueError(f"{key}: {file} has no tensor {name!r}; it has {_some(state)}; choose the right file")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{key}: {name} of {file} is {list(state[name].shape)} and should be {list(tensor.shape)}; correct "
                "the sizes in its JSON file, or choose the right file"
            )
    more = sorted(set(state) - set(wanted))
    if more:
        raise ValueError(f"{key}: {file} has tensors that nothing is known of: {_some(more)}; choose the right file")
    module.load_state_dict({name: state[name].to(tensor.dtype) for name, tensor in wanted.items()}, assign=True)


def _some(names: Any) -> str:
    """Some names, for an error."""
    found = sorted(names)
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")


@dataclass(frozen=True)
class SideCar:
    """What a JSON file beside the weights says of a generator; `made_by` and other entries are for people.

    latent: `z` where the network takes noise N(0, I), `w` where it takes what a mapping network makes of it; z_dim:
    values of the noise (with latent z it is latent_dim); latent_dim: values the network takes; image_shape: [channels,
    height, width] of what it makes; value_range: of its pixels, [0, 1] or [-1, 1].
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    arch: str
    latent: Literal["z", "w"]
    latent_dim: Size
    image_shape: ImageShape
    value_range: tuple[float, float]
    z_dim: Size | None = None
    num_classes: Annotated[int, Field(ge=0)] = 0
    made_by: str = ""

    @property
    def noise_dim(self) -> int:
        """Values of the noise that a latent is made of."""
        return self.z_dim or self.latent_dim


def read_sidecar(weights: Path, key: str = f"{KEY}.path") -> SideCar:
    """The side-car of a file of weights: the file of the same name that ends in .json.

    ValueError when it is not there, is no JSON object or says what cannot be: it names the file and the entry.
    """
    file = weights.with_suffix(".json")
    if not file.is_file():
        raise ValueError(
            f'{key}: {weights} has no {file.name} beside it; write that file, for instance {{"arch": "mine", '
            '"latent": "z", "latent_dim": 64, "image_shape": [1, 28, 28], "value_range": [-1, 1]}'
        )
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{key}: {file} cannot be read as JSON ({error}); correct it") from None
    try:
        car = TypeAdapter(SideCar).validate_python(said)
    except ValidationError as error:
        problem = error.errors()[0]
        entry = ".".join(map(str, problem["loc"])) or "the file"
        raise ValueError(f"{key}: {file}: {entry}: {problem['msg']}; got {problem['input']!r}; correct it") from None
    if car.value_range not in RANGES:
        raise ValueError(f"{key}: {file}: value_range: it must be [0, 1] or [-1, 1]; got {list(car.value_range)}")
    if car.latent == "z" and car.noise_dim != car.latent_dim:
        raise ValueError(
            f"{key}: {file}: z_dim: with latent z the noise is the latent, so it must be latent_dim "
            f"({car.latent_dim}); got {car.z_dim}"
        )
    return car


def read_weights(
    path: str | None, arch: str, latent: Literal["z", "w"], value_range: tuple[float, float]
) -> tuple[Path, SideCar, dict[str, Tensor]]:
    """The file, side-car and tensors of an architecture of this package; path None: those that come with it.

    ValueError when the side-car is of another architecture, or says of its latents or pixels what is not so.
    """
    file = WEIGHTS / f"{arch}.safetensors" if path is None else find_file(path)
    car = read_sidecar(file)
    if car.arch != arch:
        raise ValueError(
            f"{KEY}.path: {file} is of arch {car.arch!r}, and the generator is {arch!r}; set {KEY}.name to what it is, "
            "or choose another file"
        )
    if (car.latent, car.value_range) != (latent, value_range):
        raise ValueError(
            f"{KEY}.path: the JSON file of {file} must say latent {latent!r} and value_range {list(value_range)}, as "
            f"{arch} has them; it says {car.latent!r} and {list(car.value_range)}; correct it"
        )
    return file, car, read_state(file)
