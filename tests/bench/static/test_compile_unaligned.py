"""No access of a tensor that begins between two multiples of 16 bytes is wider than a value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench.static.resources import LIMITS, report
from encnet_triton.kernels.batch_norm import plan as batch_norm
from encnet_triton.kernels.encoding import plan as encoding
from encnet_triton.kernels.runtime.launch import Launch, Machine, Pass

pytestmark = pytest.mark.slow
ARCH = 90
MACHINE = Machine(ARCH, LIMITS[ARCH].processors)


def unaligned(pixels: int, channels: int) -> Tensor:
    """Two images, channels last, an odd storage offset."""
    size = 2 * pixels * channels
    memory = torch.empty(size + 1, dtype=torch.bfloat16, device="meta")
    return memory[1:].view(2, pixels, channels).transpose(1, 2)


def first_launch(call: Pass) -> Launch:
    return call.launches(MACHINE, call.configs(MACHINE)[0])[0][0]


def encode_launches() -> list[Launch]:
    x, codewords, scale = unaligned(3600, 64), torch.empty(32, 64), torch.empty(32)
    grad, counters = torch.empty(2, 32, 64, device="meta"), torch.empty(3, dtype=torch.int32)
    forward = encoding.Forward(x, codewords, scale, False)
    backward = encoding.Backward(grad, x, codewords, scale, scale, True, counters)
    return [first_launch(forward), first_launch(backward)]


def batch_norm_launches() -> list[Launch]:
    """Behind a residual, with a mask of bits."""
    x = unaligned(3600, 64)
    channel = torch.empty(64, device="meta")
    affine = batch_norm.Affine(channel, channel, channel, channel, 1e-5)
    mask = channel.new_empty(batch_norm.mask_shape(x), dtype=torch.uint8)
    sums, count = channel.new_empty(2, 64).double(), channel.new_empty(1).double()
    forward = batch_norm.Normalise(x, affine, x, True, True, False)
    backward = batch_norm.BackwardInput(x, x, mask, affine, True, sums, count, True)
    return [first_launch(forward), first_launch(backward)]


@pytest.mark.parametrize("launches", [encode_launches, batch_norm_launches])
def test_an_odd_storage_offset_narrows_the_accesses(launches) -> None:
    for one in launches():
        made = report(one, ARCH)
        assert made.fits, made.note
        tensors = {n: t for n, t in one.arguments.items() if isinstance(t, Tensor)}
        odd = {n for n, t in tensors.items() if t.storage_offset() % 8}
        widths = {n: set(counted) for n, counted in made.accesses.items() if n in odd}
        assert "X" in widths
        assert set.union(*widths.values()) == {torch.bfloat16.itemsize}, f"{one.name}: {widths}"
