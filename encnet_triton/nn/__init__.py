"""Layers and losses: use them in your own network, or through ``encnet_triton.models``."""

from encnet_triton.nn.context import ContextEncoding
from encnet_triton.nn.encoding import Encoding, ShakeEncoding
from encnet_triton.nn.losses import LossTerms, SegmentationLoss, dice_loss, presence_target
from encnet_triton.nn.norm import (
    BatchNormAct,
    BatchNormAct1d,
    BatchNormAct2d,
    convert_batchnorm,
    set_norm_impl,
    set_sync_group,
)

__all__ = [
    "BatchNormAct",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "ContextEncoding",
    "Encoding",
    "LossTerms",
    "SegmentationLoss",
    "ShakeEncoding",
    "convert_batchnorm",
    "dice_loss",
    "presence_target",
    "set_norm_impl",
    "set_sync_group",
]
