"""Image generators, one family a file.

`conditional` makes images from noise and labels and is trained in a run. The others are pretrained and frozen
(`pretrained` says what they can do): `NAMES` gives their configurations' short names, `named` reads what a user wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fldist.models.generators.pretrained import GeneratorConfig

NAMES = {
    "mini_style": "fldist.models.generators.mini_style:MiniStyle",
    "mlp_vae": "fldist.models.generators.mlp:MlpVae",
    "mlp": "fldist.models.generators.mlp:Mlp",
    "torchscript": "fldist.models.generators.torchscript:TorchScript",
    "stylegan": "fldist.models.generators.stylegan:StyleGan",
    "diffusion": "fldist.models.generators.diffusion:Diffusion",
    "toy": "fldist.models.generators.toy:Toy",
}
"""The configurations of pretrained generators by name."""


def named(given: str | Mapping[str, Any] | GeneratorConfig) -> GeneratorConfig:
    """The configuration that `mini_style` or `{name: mini_style, path: ...}` means; one that is made is returned.

    A name is one of `NAMES`, or a user's own subclass of `GeneratorConfig` as mypkg.mine:Thing or path/mine.py:Thing.
    Made for pydantic's BeforeValidator: what is wrong is a ValidationError (a ValueError) whose location is the field,
    so that the configuration's errors name `algorithm.generator.FIELD`. Nothing is read or loaded yet.
    """
    from fldist import resolve
    from fldist.models.generators.pretrained import GeneratorConfig

    if isinstance(given, GeneratorConfig):
        return given
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ValueError(
            f"it must be a name such as mini_style, or {{name: mini_style, ...}}; names: {', '.join(NAMES)}"
        )
    name = given["name"]
    try:
        kind = resolve.from_table(NAMES, name, "name")
    except ValueError as error:
        raise resolve.wrong("name", str(error).removeprefix("name: "), name) from None
    if not (isinstance(kind, type) and issubclass(kind, GeneratorConfig)):
        raise resolve.wrong("name", f"it is no subclass of {GeneratorConfig.__module__}.GeneratorConfig", name)
    made: GeneratorConfig = resolve.component(kind, {k: v for k, v in given.items() if k != "name"}, name)
    return made
