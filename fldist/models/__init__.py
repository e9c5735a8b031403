"""Models, one family a file, and the local training primitive in `train.py`.

A model's configuration is a frozen dataclass with `build(shape, classes) -> nn.Module`; `NAMES` gives the short
names. A user's own may also be any callable `(shape, classes) -> nn.Module`, an nn.Module class among them.
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
    "resnet34": "fldist.models.resnet:ResNet34",
    "resnet50": "fldist.models.resnet:ResNet50",
    "resnet101": "fldist.models.resnet:ResNet101",
    "resnet152": "fldist.models.resnet:ResNet152",
    "googlenet": "fldist.models.googlenet:GoogLeNet",
    "mobilenet_v2": "fldist.models.mobilenet:MobileNetV2",
    "vit_b16": "fldist.models.vit:VitB16",
    "vit_b32": "fldist.models.vit:VitB32",
}
