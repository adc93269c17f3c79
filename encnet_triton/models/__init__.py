"""Networks for segmentation, by name with `create_model` or by class, and for CIFAR-10."""

from encnet_triton.models.backbones import create_backbone
from encnet_triton.models.base import SegmentationModel
from encnet_triton.models.cifar import CifarNet
from encnet_triton.models.deeplab import DeepLabV3
from encnet_triton.models.encnet import EncNet
from encnet_triton.models.factory import MODELS, create_model
from encnet_triton.models.fcn import FCN
from encnet_triton.models.pspnet import PSPNet
from encnet_triton.models.resnet import BACKBONES, ResNet
from encnet_triton.nn.output import SegmentationOutput

__all__ = [
    "BACKBONES",
    "FCN",
    "MODELS",
    "CifarNet",
    "DeepLabV3",
    "EncNet",
    "PSPNet",
    "ResNet",
    "SegmentationModel",
    "SegmentationOutput",
    "create_backbone",
    "create_model",
]
