"""A StyleGAN network pickle turned, once, into a TorchScript file that needs neither trust nor NVIDIA's code.

The file is for the generator `torchscript`: forward(w) gives images in 0..1, mapping(noise) gives w. Nothing is written
unless the converted network makes what the original makes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fldist.models.generators.stylegan import (
    Mapping,
    StyleGan,
    StyleGanGenerator,
    Synthesis,
    conversion,
    importable,
    load_network,
)
from fldist.seeding import generator, preserved

TOLERANCE = 1e-4
"""How far values of the converted network may lie from the original's; a grey level is 4e-3."""
TRIED = 5
"""Latents that both are tried on."""


def convert(config: StyleGan, out: Path) -> str:
    """Write `out` (.pt) and its side-car (.json); returns what was made, in lines.

    The networks are traced on the CPU: synthesis row by row, the mapping in a batch where that works. ValueError:
    without config.trust_pickle, for an ending other than .pt, for a network that cannot be traced, and for one whose
    trace makes other latents or images.
    """
    if out.suffix != ".pt":
        raise ValueError(f"--out: the file's name must end in .pt; got {out}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: there is no folder {out.absolute().parent}; make it")
    if not Path(config.network_pkl).is_file():
        raise ValueError(f"NETWORK.pkl: there is no file {config.network_pkl}; correct the name")
    if not config.trust_pickle:
        raise ValueError(
            f"--trust-pickle: {config.network_pkl} is a pickle: a program that makes objects, and to read it is to run "
            "it. It can do whatever you can do on this machine: read and delete files, send them away. It is not "
            "opened. If you trust those who made it, give --trust-pickle; what is written then needs no trust"
        )
    original = load_network(config, torch.device("cpu"), "")
    with preserved(), importable(Path(config.code_dir).expanduser().absolute()), torch.no_grad():
        program, furthest = _program(original, config)
    torch.jit.save(program, out)
    car = {
        "arch": config.kind,
        "latent": "w",
        "z_dim": original.noise_dim,
        "latent_dim": original.w_dim,
        "image_shape": list(original.image_shape),
        "value_range": [0, 1],
        "num_classes": original.num_classes,
        "truncation_psi": config.truncation_psi,
        "fingerprint": original.fingerprint,
        "made_by": conversion(config, Path(config.network_pkl)),
    }
    if original.num_classes:
        car["noise"] = "the last value of the noise stands for the class: floor(num_classes Phi(value))"
    sidecar = out.with_suffix(".json")
    sidecar.write_text(json.dumps(car, indent=2) + "\n", encoding="utf-8")
    shape = " x ".join(map(str, original.image_shape))
    classes = f", {original.num_classes} classes" if original.num_classes else ""
    return (
        f"{config.kind}: {original.w_dim} values -> {shape}{classes}\n"
        f"the same latents and images as the original's, on {TRIED} (largest difference {furthest:.1e})\n"
        f"{out} and {sidecar}; use it as algorithm.generator: {{name: torchscript, path: {out}}}"
    )


def _program(original: StyleGanGenerator, config: StyleGan) -> tuple[torch.jit.ScriptModule, float]:
    """The converted network, and the largest difference between what it and the original make."""
    named = f"network_pkl: {config.network_pkl}:"
    rng = generator(0, "convert-generator")
    noise = torch.randn(TRIED, original.noise_dim, generator=rng)
    latents = original.map(noise)
    one_by_one = torch.cat([original.map(row) for row in torch.split(noise, 1)])
    mapping = Mapping(original.network, config.truncation_psi)
    problems = []
    for rows in (2, 1):  # in a batch if the code knows no fixed number of rows, else row by row
        try:
            traced = _traced(mapping, noise[:rows])
            candidate = traced if rows == 2 else torch.jit.script(_RowByRow(traced))
            apart = max(_apart(candidate, noise, latents), _apart(candidate, noise[:1], one_by_one[:1]))
            problems.append(f"latents differ by {apart:.1e}")
            if apart <= TOLERANCE * max(1.0, float(latents.abs().max())):
                break
        except Exception as error:  # whatever the code raises when it is traced
            problems.append(_line(error))
    else:
        raise ValueError(f"{named} its mapping cannot be converted ({'; '.join(problems)})")
    images = original.decode(latents)
    try:
        synthesis = torch.jit.script(_RowByRow(_traced(Synthesis(original.network, config.kind), latents[:1])))
        off = _apart(synthesis, latents, images)
    except Exception as error:
        raise ValueError(f"{named} its synthesis cannot be traced ({_line(error)})") from error
    if not off <= TOLERANCE:
        raise ValueError(
            f"{named} the converted network makes other images than the original: they differ by {off:.1e} of 1, so "
            "nothing is written; its code computes with something that a trace does not follow"
        )
    return torch.jit.script(_Converted(synthesis, candidate)), max(apart, off)


def _traced(module: nn.Module, example: Tensor) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        # what it warns of is found by the comparison
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        traced = torch.jit.trace(module.eval(), (example,), check_trace=False)  # type: ignore[no-untyped-call]
    assert isinstance(traced, torch.jit.ScriptModule)
    return traced


def _apart(module: Callable[[Tensor], Tensor], inputs: Tensor, wanted: Tensor) -> float:
    """The largest difference; three calls, as the interpreter optimises a program in its first ones."""
    return max(float((module(inputs) - wanted).abs().max()) for _ in range(3))


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()[:160]


class _RowByRow(nn.Module):
    """A network that was traced with one row, for any number of rows: what it took from their number is then right."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, rows: Tensor) -> Tensor:
        made: list[Tensor] = []
        for i in range(rows.shape[0]):
            made.append(self.network(rows[i : i + 1]))
        return torch.cat(made)


class _Converted(nn.Module):
    """What is saved: forward(w) -> images, mapping(noise) -> w."""

    def __init__(self, synthesis: nn.Module, to_latent: nn.Module) -> None:
        super().__init__()
        self.synthesis = synthesis
        self.to_latent = to_latent

    def forward(self, w: Tensor) -> Tensor:
        images: Tensor = self.synthesis(w)
        return images

    @torch.jit.export
    def mapping(self, noise: Tensor) -> Tensor:
        latents: Tensor = self.to_latent(noise)
        return latents
