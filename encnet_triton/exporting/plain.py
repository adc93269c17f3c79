"""Operators that a file cannot hold, in terms of those that it can.

`torch.export` keeps this package's operators, which a process without the package lacks; ONNX has
no adaptive pooling of images whose size is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn

from encnet_triton.nn import Encoding, ShakeEncoding

__all__ = ["foreign_operators", "with_plain_layers", "without_adaptive_pooling"]


def foreign_operators(program: torch.export.ExportedProgram) -> list[str]:
    """The names of operators in a program that torch does not have itself."""
    return [name for name in _operators(program) if not name.startswith(("aten.", "prim."))]


def _operators(program: torch.export.ExportedProgram) -> list[str]:
    targets = (node.target for node in program.graph.nodes)
    return sorted({str(one) for one in targets if isinstance(one, torch._ops.OpOverload)})


def with_plain_layers(model: nn.Module) -> nn.Module:
    """A network in evaluation, on the same tensors, whose Encoding Layers need torch alone."""
    tensors = chain(model.parameters(), model.buffers())
    copy = deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name, layer in list(copy.named_modules()):
        if isinstance(layer, Encoding | ShakeEncoding):
            copy.set_submodule(name, PlainEncoding(layer))
    return copy


class PlainEncoding(nn.Module):
    """An Encoding Layer in evaluation, as matrix products; nothing is of size B x N x K x C.

    Shapes:
        x: B x C x H x W; returns B x K x C.
    """

    scale: Tensor

    def __init__(self, layer: Encoding | ShakeEncoding) -> None:
        super().__init__()
        self.codewords = layer.codewords
        self.register_buffer("scale", layer.scale)

    def forward(self, x: Tensor) -> Tensor:
        # The mean codeword is the origin: the square is expanded and would lose a common offset.
        center = self.codewords.mean(0)
        d = self.codewords - center
        x = x.flatten(2) - center[:, None]  # [B, C, N]
        squares = x.square().sum(1, keepdim=True) + d.square().sum(1)[:, None]
        distances = squares - 2 * torch.matmul(d, x)
        weights = (self.scale[:, None] * distances).softmax(1)  # [B, K, N]
        return torch.matmul(weights, x.transpose(1, 2)) - weights.sum(2, keepdim=True) * d


def without_adaptive_pooling(
    program: torch.export.ExportedProgram,
) -> torch.export.ExportedProgram:
    """The same program, whose adaptive pooling is a product with matrices."""
    pooling = torch.ops.aten.adaptive_avg_pool2d.default
    if str(pooling) not in _operators(program):
        return program  # this would trace it once more
    replaced: torch.export.ExportedProgram = program.run_decompositions({pooling: _adaptive_mean})
    return replaced


def _adaptive_mean(x: Tensor, size: Sequence[int]) -> Tensor:
    """Means of B x C x H x W over a grid of regions, as products with two matrices."""
    rows, columns = (_means(x.shape[2 + i], size[i], x) for i in range(2))
    return torch.matmul(torch.matmul(rows, x), columns.transpose(0, 1))


def _means(length: int, regions: int, like: Tensor) -> Tensor:
    """The matrix, regions x length, that averages over each region."""
    index = torch.arange(regions, device=like.device)[:, None]
    start = torch.div(index * length, regions, rounding_mode="floor")
    end = torch.div((index + 1) * length + regions - 1, regions, rounding_mode="floor")
    place = torch.arange(length, device=like.device)[None]
    inside = (place >= start) & (place < end)
    return inside.to(like.dtype) / (end - start).to(like.dtype)
