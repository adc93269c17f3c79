"""The Encoding Layer (paper, section 2, equation 1) and its variant with random scaling factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from encnet_triton.kernels import encode
from encnet_triton.nn.arguments import check_count


def _at_least_fp32(parameter: Tensor) -> Tensor:
    # Under autocast the parameters are fp32 anyway; this serves a model cast to half as a whole.
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def _encode(
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    backward_scale: Tensor | None,
    return_stats: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    encoded: Tensor | tuple[Tensor, Tensor, Tensor]
    if return_stats:
        encoded = encode(x, codewords, scale, backward_scale=backward_scale, return_stats=True)
    else:
        encoded = encode(x, codewords, scale, backward_scale=backward_scale)
    return encoded


class _Codebook(nn.Module):
    """K codewords of C channels, uniform in +-1/sqrt(K C)."""

    def __init__(self, channels: int, num_codewords: int) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("num_codewords", num_codewords)
        self.channels = channels
        self.num_codewords = num_codewords
        self.codewords = nn.Parameter(torch.empty(num_codewords, channels))

    def reset_parameters(self) -> None:
        bound = (self.num_codewords * self.channels) ** -0.5
        nn.init.uniform_(self.codewords, -bound, bound)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, num_codewords={self.num_codewords}"


class Encoding(_Codebook):
    """Residual encoder with learnt codewords and scaling factors.

    E_k = sum_i a_ik (x_i - d_k), where a_i = softmax over k of scale_k |x_i - d_k|^2. The stored
    ``scale`` is the negative of the paper's smoothing factor s_k, as in published checkpoints.

    Args:
        channels: C.
        num_codewords: K, at least 1.

    Shapes:
        x: B x C x H x W (channels_last is the fast format) or B x N x C; fp32, bf16, fp16 or fp64.
        output: B x K x C in fp32 (fp64 for fp64 input), under autocast too; with ``return_stats``
            also its sum and M2 over C, B x K each, for a batch norm over the codewords.
    """

    def __init__(self, channels: int, num_codewords: int) -> None:
        super().__init__(channels, num_codewords)
        self.scale = nn.Parameter(torch.empty(num_codewords))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.uniform_(self.scale, -1.0, 0.0)

    def forward(
        self, x: Tensor, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        codewords, scale = _at_least_fp32(self.codewords), _at_least_fp32(self.scale)
        return _encode(x, codewords, scale, None, return_stats)


class ShakeEncoding(_Codebook):
    """Encoding Layer whose scaling factors are random in training (paper, section 3.5).

    In training each call draws s_k ~ U(0, 1) twice, once for the forward and once for the backward
    pass, from torch's generator of the input's device; in evaluation s_k = 0.5. The scaling factors
    are not parameters. Arguments and shapes as in `Encoding`.
    """

    def __init__(self, channels: int, num_codewords: int) -> None:
        super().__init__(channels, num_codewords)
        self.reset_parameters()

    @property
    def scale(self) -> Tensor:
        """K scaling factors of evaluation, the mean of the random ones."""
        return self.codewords.new_full((self.num_codewords,), -0.5)

    def forward(
        self, x: Tensor, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        codewords, scale = _at_least_fp32(self.codewords), _at_least_fp32(self.scale)
        backward_scale = None
        if self.training:
            scale = -torch.rand_like(scale)
            backward_scale = -torch.rand_like(scale)
        return _encode(x, codewords, scale, backward_scale, return_stats)
