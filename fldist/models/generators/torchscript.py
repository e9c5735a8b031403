"""Generators that somebody saved as TorchScript, with a JSON side-car that says what they take and give."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fldist.models.generators.pretrained import KEY, GeneratorConfig, ModuleGenerator, SideCar, find_file, read_sidecar


@dataclass(frozen=True)
class TorchScript(GeneratorConfig):
    """A file of torch.jit.save whose forward(latent [n, H]) gives images [n, channels, height, width].

    With latent `w` in the side-car (the file of the same name that ends in .json) it exports `mapping(z [n, z_dim])`,
    too, which makes latents of noise; with `z` the latent is the noise. path: in the working directory, FLDIST_DATA or
    its folder `pretrained`.

    Trust: TorchScript is a program of its own, of tensor operations, which torch.jit interprets; reading it unpickles
    no Python and imports no modules. It can still compute for ever, take all memory, or make use of a flaw of torch's
    interpreter, so take such files from those whose programs you would run.
    """

    path: str

    def load(self, device: torch.device) -> ModuleGenerator:
        """Read program and side-car and try both on two latents; ValueError names what does not fit."""
        file = find_file(self.path)
        car = read_sidecar(file)
        try:
            program = torch.jit.load(file, map_location=device)  # type: ignore[no-untyped-call]
        except Exception as error:  # RuntimeError and others, of files that are none of torch.jit
            said = " ".join(str(error).split())[:160]
            raise ValueError(
                f"{KEY}.path: {file} cannot be read as TorchScript ({said}); write it with torch.jit.save"
            ) from None
        program.eval()
        set_device(program, device)
        mapping = None
        if car.latent == "w":
            if not hasattr(program, "mapping"):
                raise ValueError(
                    f"{KEY}.path: {file} exports no mapping(z), which latent w needs; mark it with torch.jit.export, "
                    "or say latent z in the JSON file"
                )
            mapping = _Method(program, "mapping")
        synthesis = _Method(program, "forward")
        _try(synthesis, mapping, car, file, device)
        return ModuleGenerator(
            synthesis,
            mapping,
            arch=f"torchscript {hashlib.sha256(file.read_bytes()).hexdigest()}",  # tensors do not tell what it does
            z_dim=car.noise_dim,
            latent_dim=car.latent_dim,
            image_shape=car.image_shape,
            value_range=car.value_range,
            device=device,
        )


def set_device(program: Any, device: torch.device) -> None:
    """Write a device into a program's instructions where it names one.

    What a traced program makes itself, such as an identity matrix, it makes on the device it was traced on, and
    map_location moves its tensors alone.
    """
    for module in program.modules():
        for name in module._c._method_names():
            for node in module._c._get_method(name).graph.findAllNodes("prim::Constant"):
                if node.output().type().kind() == "DeviceObjType":
                    node.s_("value", str(device))


class _Method(nn.Module):
    """A method of a program, as a module without tensors of its own.

    The interpreter may not optimise it: after two calls it would run other kernels, which round otherwise.
    """

    def __init__(self, program: Any, name: str) -> None:
        super().__init__()
        self._call = getattr(program, name)

    def forward(self, values: Tensor) -> Tensor:
        """values: float32 [n, latents or noise]."""
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return self._call(values)  # type: ignore[no-any-return]


@torch.no_grad()
def _try(synthesis: nn.Module, mapping: nn.Module | None, car: SideCar, file: Path, device: torch.device) -> None:
    """Refuse a program whose sizes are not those of the side-car."""
    parts: list[tuple[nn.Module, str, int, list[int]]] = [(synthesis, "forward", car.latent_dim, [2, *car.image_shape])]
    if mapping is not None:
        parts.append((mapping, "mapping", car.noise_dim, [2, car.latent_dim]))
    for call, name, width, wanted in parts:
        try:
            made = call(torch.ones(2, width, device=device))
        except Exception as error:
            last = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"{KEY}.path: {name} of {file} does not take [n, {width}] ({last}); correct latent_dim or z_dim in its "
                "JSON file"
            ) from None
        got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
        if got != wanted:
            raise ValueError(
                f"{KEY}.path: {name} of {file} gives {got} for two rows of {width} values, and its JSON file says "
                f"{wanted}; correct the file"
            )
