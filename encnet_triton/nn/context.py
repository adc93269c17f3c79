"""The Context Encoding Module (paper, section 2 and figure 2)."""

from __future__ import annotations

from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encnet_triton.nn.arguments import check_choice, check_count
from encnet_triton.nn.encoding import Encoding, ShakeEncoding
from encnet_triton.nn.norm import BatchNormAct1d, BatchNormAct2d

Form = Literal["paper", "released"]
Combine = Literal["sum", "mean"]
Gate = Literal["multiply", "residual"]


class _FormDefaults(TypedDict):
    project: bool
    combine: Combine
    gate: Gate


FORMS: dict[str, _FormDefaults] = {
    "paper": {"project": False, "combine": "sum", "gate": "multiply"},
    "released": {"project": True, "combine": "mean", "gate": "residual"},
}


class ContextEncoding(nn.Module):
    """Weights the channels of a feature map by the content of the whole image.

    Features X -> Encoding -> batch norm over the K codewords + ReLU -> combine over K -> e (B x C);
    attention gamma = sigmoid(W e) scales the channels of X; V e are the logits of which classes the
    image contains, for the SE loss.

    Args:
        channels: C of the features.
        num_classes: number of classes the SE logits predict, or None for no SE layer.
        num_codewords: K; 0 replaces the Encoding by global average pooling (paper, figure 5).
        form: defaults of the three options that follow. "paper" is section 2 as written; "released"
            is what the published checkpoints have.
        project: 1x1 convolution + batch norm + ReLU before the Encoding (released form).
        combine: "sum" (paper) or "mean" (released form) over the codewords; no effect for K = 0.
        gate: "multiply": X gamma (paper), or "residual": relu(X + X gamma) (released form).
        attention: False leaves X as it is: the module then serves the SE loss alone.
        shake_scale: random scaling factors in training, see `ShakeEncoding`.

    Shapes:
        x: B x C x H x W; returns (y, se): y of x's shape, se B x num_classes or None.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int | None,
        num_codewords: int = 32,
        form: Form = "paper",
        *,
        project: bool | None = None,
        combine: Combine | None = None,
        gate: Gate | None = None,
        attention: bool = True,
        shake_scale: bool = False,
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("num_codewords", num_codewords, least=0)
        check_choice("form", form, tuple(FORMS))
        defaults = FORMS[form]
        self.combine = defaults["combine"] if combine is None else combine
        self.gate = defaults["gate"] if gate is None else gate
        check_choice("combine", self.combine, ("sum", "mean"))
        check_choice("gate", self.gate, ("multiply", "residual"))
        if num_classes is None and not attention:
            raise ValueError("without attention and without num_classes the module has no output")

        self.num_codewords = num_codewords
        self.project: nn.Sequential | None = None
        if defaults["project"] if project is None else project:
            self.project = nn.Sequential()
            self.project.add_module("conv", nn.Conv2d(channels, channels, 1, bias=False))
            self.project.add_module("bn", BatchNormAct2d(channels))
        self.encoding: Encoding | ShakeEncoding | None = None
        self.bn: BatchNormAct1d | None = None
        if num_codewords:
            layer = ShakeEncoding if shake_scale else Encoding
            self.encoding = layer(channels, num_codewords)
            self.bn = BatchNormAct1d(num_codewords)
        self.attention = nn.Linear(channels, channels) if attention else None
        self.presence: nn.Linear | None = None
        if num_classes is not None:
            check_count("num_classes", num_classes)
            self.presence = nn.Linear(channels, num_classes)
        self._start_unsaturated()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        e = self.encode_context(x)
        se = None if self.presence is None else self.presence(e)
        if self.attention is None:
            return x, se
        gamma = self.attention(e).sigmoid()[:, :, None, None]
        if self.gate == "multiply":
            return x * gamma, se
        return F.relu_(x * (1 + gamma)), se

    def weights_of_sums(self) -> list[Tensor]:
        """The weights whose input is a sum over the codewords, and not their mean."""
        if not self.num_codewords or self.combine == "mean":
            return []
        return [linear.weight for linear in (self.attention, self.presence) if linear is not None]

    @torch.no_grad()
    def _start_unsaturated(self) -> None:
        # The sum over codewords is K times their mean: under the usual initialisation every gate
        # would start at 0 or 1, the same for all images.
        for weight in self.weights_of_sums():
            weight.div_(self.num_codewords)

    def encode_context(self, x: Tensor) -> Tensor:
        """The encoded semantics e of B x C x H x W features: B x C."""
        if self.project is not None:
            x = self.project(x)
        if self.encoding is None or self.bn is None:
            return x.mean((2, 3))
        if self.bn.takes_statistics(x):
            encoded, *statistics = self.encoding(x, return_stats=True)
            phi: Tensor = self.bn(encoded.to(self.bn.weight.dtype), statistics=statistics)
        else:
            phi = self.bn(self.encoding(x).to(self.bn.weight.dtype))
        return phi.sum(1) if self.combine == "sum" else phi.mean(1)
