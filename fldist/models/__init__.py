"""Models, one family a file, and the local training primitive in `train.py`.

A model's configuration is a frozen dataclass with `build(shape, classes) -> nn.Module`; `NAMES` gives the short
names. A user's own may also be any callable `(shape, classes) -> nn.Module`, an nn.Module class among them. `FAMILIES`
are the models of clients that differ.
"""

NAMES = {
    "mlp": "fldist.models.mlp:Mlp",
    "cnn": "fldist.models.cnn:Cnn",
    "cnn_bn": "fldist.models.cnn:CnnBn",
    "cnn4": "fldist.models.cnn:Cnn4",
    "niid_cnn": "fldist.models.cnn:NiidCnn",
    "lenet5": "fldist.models.cnn:LeNet5",
    "two_cnn": "fldist.models.cnn:TwoCnn",
    "femnist_cnn": "fldist.models.cnn:FemnistCnn",
    "next_char_lstm": "fldist.models.lstm:NextCharLstm",
    "resnet4": "fldist.models.resnet:ResNet4",
    "resnet6": "fldist.models.resnet:ResNet6",
    "resnet8": "fldist.models.resnet:ResNet8",
    "resnet10": "fldist.models.resnet:ResNet10",
    "resnet18": "fldist.models.resnet:ResNet18",
    "resnet18_32": "fldist.models.resnet:ResNet18Small",
    "resnet18_d2l": "fldist.models.resnet:ResNet18D2l",
    "resnet34": "fldist.models.resnet:ResNet34",
    "resnet50": "fldist.models.resnet:ResNet50",
    "resnet101": "fldist.models.resnet:ResNet101",
    "resnet152": "fldist.models.resnet:ResNet152",
    "googlenet": "fldist.models.googlenet:GoogLeNet",
    "mobilenet_v2": "fldist.models.mobilenet:MobileNetV2",
    "vit_b16": "fldist.models.vit:VitB16",
    "vit_b32": "fldist.models.vit:VitB32",
}

_HTFE8 = ("cnn4", "googlenet", "mobilenet_v2", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

FAMILIES = {
    "htfe2": ("cnn4", "resnet18"),
    "htfe3": ("resnet10", "resnet18", "resnet34"),
    "htfe4": ("cnn4", "googlenet", "mobilenet_v2", "resnet18"),
    "htfe8": _HTFE8,
    "htfe9": (
        "resnet4", "resnet6", "resnet8", "resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    ),
    "htm10": (*_HTFE8, "vit_b16", "vit_b32"),
}  # fmt: skip
"""Models for clients that differ, in order: HtFLlib's groups (Zhang et al., 2025), as in FedTGP's and FedKTL's papers.

Their features have several sizes, from 64 to 2048: `task.feature_dim` makes them one."""
