"""What a segmentation network returns."""

from typing import NamedTuple

from torch import Tensor


class SegmentationOutput(NamedTuple):
    """Low-resolution outputs of a network for B images.

    Attributes:
        logits: B x n x h x w, not upsampled: `encnet_triton.kernels.upsample_cross_entropy` and
            `upsample_argmax` take them as they are.
        se: logits of which classes each image contains, B x n each: stage 4, then stage 3 (in
            training). Empty without an SE branch.
        aux: B x n x h x w logits of the auxiliary head in training, or None.
    """

    logits: Tensor
    se: tuple[Tensor, ...]
    aux: Tensor | None
