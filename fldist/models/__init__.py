"""Models, one family a file, and the local training primitive in `train.py`.

A model's configuration is a frozen dataclass with `build(shape, classes) -> nn.Module`; `NAMES` gives the short
names. A user's own may also be any callable `(shape, classes) -> nn.Module`, an nn.Module class among them.
"""

NAMES = {
    "mlp": "fldist.models.mlp:Mlp",
    "cnn_bn": "fldist.models.cnn:CnnBn",
}
