"""Networks for semantic segmentation, built by name with `create_model` or from their classes."""

from encnet_triton.models.deeplab import DeepLabV3
from encnet_triton.models.encnet import EncNet
from encnet_triton.models.factory import MODELS, create_model
from encnet_triton.models.fcn import FCN
from encnet_triton.models.output import SegmentationOutput
from encnet_triton.models.pspnet import PSPNet
from encnet_triton.models.resnet import BACKBONES, ResNet, create_backbone

__all__ = [
    "BACKBONES",
    "FCN",
    "MODELS",
    "DeepLabV3",
    "EncNet",
    "PSPNet",
    "ResNet",
    "SegmentationOutput",
    "create_backbone",
    "create_model",
]
