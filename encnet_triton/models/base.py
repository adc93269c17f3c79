"""Shared by all segmentation networks."""

from __future__ import annotations

from typing import Any

from torch import nn

from encnet_triton.models.backbones import create_backbone
from encnet_triton.models.layers import parameters_of
from encnet_triton.models.pretrained import Pretrained
from encnet_triton.models.resnet import ResNet
from encnet_triton.models.trunk import TimmTrunk
from encnet_triton.nn.arguments import check_count, check_flags


class SegmentationModel(Pretrained):
    """A backbone and a head.

    Attributes:
        options: name, num_classes and every option, as JSON values with all defaults filled in:
            ``create_model(**model.options)`` builds the same network again.
        num_classes: n, the number of classes of all outputs.
        align_corners: how logits are to be upsampled.
        output_stride: pixels of the input per pixel of the logits.
        backbone: the `ResNet`, or network of timm.
    """

    def __init__(
        self,
        options: dict[str, Any],
        *,
        backbone: str,
        num_classes: int,
        output_stride: int | None,
        dilate: bool,
        align_corners: bool,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_flags(dilate=dilate, align_corners=align_corners)
        self.backbone: ResNet | TimmTrunk = create_backbone(backbone, output_stride, dilate)
        self.num_classes = num_classes
        self.align_corners = align_corners
        self.output_stride = self.backbone.output_stride
        self.options = {
            **options,
            "num_classes": num_classes,
            "backbone": backbone,
            "output_stride": self.output_stride,
            "dilate": dilate,
            "align_corners": align_corners,
        }

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of the backbone and of everything else ("head"), each exactly once."""
        rest = [child for name, child in self.named_children() if name != "backbone"]
        return {"backbone": parameters_of(self.backbone), "head": parameters_of(*rest)}
