"""Models, one family a file, and the local training primitive in `train.py`.

A model's configuration is a frozen dataclass with `build(shape, classes) -> nn.Module`; `NAMES` gives the short
names. A user's own may also be any callable `(shape, classes) -> nn.Module`, an nn.Module class among them.
"""

NAMES = {
    "mlp": "fldist.models.mlp:Mlp",
    "cnn": "fldist.models.cnn:Cnn",
    "cnn_bn": "fldist.models.cnn:CnnBn",
    "niid_cnn": "fldist.models.cnn:NiidCnn",
    "lenet5": "fldist.models.cnn:LeNet5",
    "two_cnn": "fldist.models.cnn:TwoCnn",
    "femnist_cnn": "fldist.models.cnn:FemnistCnn",
    "next_char_lstm": "fldist.models.lstm:NextCharLstm",
    "resnet18": "fldist.models.resnet:ResNet18",
    "resnet18_32": "fldist.models.resnet:ResNet18Small",
    "resnet34": "fldist.models.resnet:ResNet34",
    "resnet50": "fldist.models.resnet:ResNet50",
}
