"""EncNet: a dilated ResNet with the Context Encoding Module (paper, sections 2 and 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encnet_triton.models.base import SegmentationModel
from encnet_triton.models.fcn import DropoutKind, aux_head
from encnet_triton.models.layers import (
    Classifier,
    conv_bn_relu,
    create_dropout,
    init_convolutions,
)
from encnet_triton.nn.arguments import check_choice, check_count, check_flags
from encnet_triton.nn.context import FORMS, Combine, ContextEncoding, Form, Gate
from encnet_triton.nn.output import SegmentationOutput

# What a form means besides the Context Encoding Module itself.
_TRAINING_BRANCHES = {
    "paper": {"aux": False, "se_stage3": True},
    "released": {"aux": True, "se_stage3": False},
}


class EncNetHead(nn.Module):
    """3x3 convolution, optional lateral connections, Context Encoding Module, classifier.

    Args:
        in_channels: of stages 2, 3 and 4.
        channels: of the head.
        num_classes: n.
        context: the module that stands on ``channels`` features.
        lateral: join 1x1-convolved features of stages 2 and 3 by a 3x3 convolution.
        dropout: layer before the classifier.
        align_corners: of the resizing of lateral features, where their size differs.

    Shapes:
        c2, c3, c4 as the backbone gives them; returns B x n x h x w logits of c4's size and the
        B x n SE logits or None.
    """

    def __init__(
        self,
        in_channels: tuple[int, int, int],
        channels: int,
        num_classes: int,
        *,
        context: ContextEncoding,
        lateral: bool,
        dropout: nn.Module,
        align_corners: bool,
    ) -> None:
        super().__init__()
        c2, c3, c4 = in_channels
        self.align_corners = align_corners
        self.bottleneck = conv_bn_relu(c4, channels, 3)
        self.lateral: nn.ModuleList | None = None
        self.fusion: nn.Sequential | None = None
        if lateral:
            self.lateral = nn.ModuleList(conv_bn_relu(c, channels, 1) for c in (c2, c3))
            self.fusion = conv_bn_relu(3 * channels, channels, 3)
        self.context = context
        self.dropout = dropout
        self.classifier = Classifier(channels, num_classes)
        init_convolutions(self)

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.bottleneck(c4)
        if self.lateral is not None and self.fusion is not None:
            sides = [conv(c) for conv, c in zip(self.lateral, (c2, c3), strict=True)]
            size = x.shape[2:]
            sides = [s if s.shape[2:] == size else self._resize(s, size) for s in sides]
            x = self.fusion(torch.cat([x, *sides], dim=1))
        x, se = self.context(x)
        return self.classifier(self.dropout(x)), se

    def _resize(self, x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=self.align_corners)


def _resolve(
    form: Form,
    given: dict[str, Any],
    se_loss: bool,
    se_stage3: bool | None,
    aux: bool | None,
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Options of the context module, and branches in training; None is what the form has."""
    check_choice("form", form, tuple(FORMS))
    of_form: Mapping[str, Any] = FORMS[form]
    context = {name: of_form[name] if value is None else value for name, value in given.items()}
    check_flags(project=context["project"])
    branches = _TRAINING_BRANCHES[form]
    if se_stage3 is None:
        se_stage3 = branches["se_stage3"] and se_loss
    if se_stage3 and not se_loss:
        raise ValueError("se_stage3 is an SE branch and needs se_loss=True")
    return context, {"se_stage3": se_stage3, "aux": branches["aux"] if aux is None else aux}


class EncNet(SegmentationModel):
    """Context Encoding Network.

    ``form`` sets the defaults of project, combine, gate, se_stage3 and aux, each of which can also
    be set by itself:

    ========== ======= ======= ========== ========= =====
    form       project combine gate       se_stage3 aux
    ========== ======= ======= ========== ========= =====
    "paper"    False   "sum"   "multiply" se_loss   False
    "released" True    "mean"  "residual" False     True
    ========== ======= ======= ========== ========= =====

    Args:
        backbone: name in `encnet_triton.models.BACKBONES`, or ``timm:NAME``.
        num_classes: n.
        output_stride: pixels of the input per pixel of the logits; None for the backbone's default.
        dilate: dilate the stages that lose their stride.
        form: see above.
        head_channels: C of the Context Encoding Module and the convolutions around it.
        num_codewords: K; 0 is global average pooling instead of the Encoding.
        project, combine, gate: see `encnet_triton.nn.ContextEncoding`.
        se_loss: predict which classes the image contains, for the SE loss. Without it the context
            is learnt from the pixels alone.
        se_stage3: a second Context Encoding Module directly on stage 3, which serves its SE loss
            alone and is used in training only.
        aux: auxiliary FCN head on stage 3, used in training only.
        lateral: lateral connections from stages 2 and 3.
        dropout: rate before the classifiers.
        dropout_kind: "element" or "channel".
        align_corners: how logits are to be upsampled.

    Shapes:
        x: B x 3 x H x W; returns a `SegmentationOutput`.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        output_stride: int | None = None,
        dilate: bool = True,
        form: Form = "paper",
        head_channels: int = 512,
        num_codewords: int = 32,
        project: bool | None = None,
        combine: Combine | None = None,
        gate: Gate | None = None,
        se_loss: bool = True,
        se_stage3: bool | None = None,
        aux: bool | None = None,
        lateral: bool = False,
        dropout: float = 0.1,
        dropout_kind: DropoutKind = "element",
        align_corners: bool = True,
    ) -> None:
        check_count("head_channels", head_channels)
        given = {"project": project, "combine": combine, "gate": gate}
        of_context, branches = _resolve(form, given, se_loss, se_stage3, aux)
        check_flags(se_loss=se_loss, lateral=lateral, **branches)
        options = {
            "name": "encnet",
            "form": form,
            "head_channels": head_channels,
            "num_codewords": num_codewords,
            **of_context,
            "se_loss": se_loss,
            **branches,
            "lateral": lateral,
            "dropout": dropout,
            "dropout_kind": dropout_kind,
        }
        super().__init__(
            options,
            backbone=backbone,
            num_classes=num_classes,
            output_stride=output_stride,
            dilate=dilate,
            align_corners=align_corners,
        )
        c3 = self.backbone.channels[1]
        classes = num_classes if se_loss else None
        self.head = EncNetHead(
            self.backbone.channels,
            head_channels,
            num_classes,
            context=ContextEncoding(head_channels, classes, num_codewords, form, **of_context),
            lateral=lateral,
            dropout=create_dropout(dropout, dropout_kind),
            align_corners=align_corners,
        )
        self.stage3 = None
        if branches["se_stage3"]:
            of_stage3 = {"project": False, "combine": of_context["combine"], "attention": False}
            self.stage3 = ContextEncoding(c3, num_classes, num_codewords, form, **of_stage3)
        self.aux_head = None
        if branches["aux"]:
            self.aux_head = aux_head(c3, num_classes, dropout, dropout_kind)

    def forward(self, x: Tensor) -> SegmentationOutput:
        c2, c3, c4 = self.backbone(x)
        logits, se4 = self.head(c2, c3, c4)
        se = () if se4 is None else (se4,)
        aux = None
        if self.training:
            if self.stage3 is not None:
                _, se3 = self.stage3(c3)
                se = (*se, se3)
            if self.aux_head is not None:
                aux = self.aux_head(c3)
        return SegmentationOutput(logits, se, aux)
