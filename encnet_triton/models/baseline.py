"""Shared by the networks without a Context Encoding Module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from encnet_triton.models.base import SegmentationModel
from encnet_triton.nn.output import SegmentationOutput


class Baseline(SegmentationModel):
    """One head on stage 4 and, in training, an auxiliary one on stage 3.

    Args:
        options: of the network and its head, as JSON values, for ``model.options``.
        make_head: builds the head for a number of input channels.
        make_aux: the same for the auxiliary head; None for none.
        arguments: the others of `SegmentationModel`.
    """

    def __init__(
        self,
        options: dict[str, Any],
        *,
        make_head: Callable[[int], nn.Module],
        make_aux: Callable[[int], nn.Module] | None,
        **arguments: Any,
    ) -> None:
        super().__init__({**options, "aux": make_aux is not None}, **arguments)
        _, c3, c4 = self.backbone.channels
        self.head = make_head(c4)
        self.aux_head = None if make_aux is None else make_aux(c3)

    def forward(self, x: Tensor) -> SegmentationOutput:
        _, c3, c4 = self.backbone(x)
        logits = self.head(c4)
        aux = None
        if self.training and self.aux_head is not None:
            aux = self.aux_head(c3)
        return SegmentationOutput(logits, (), aux)
