"""No access of a tensor that begins between two multiples of 16 bytes is wider than a value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench.static.resources import LIMITS, report
from encnet_triton.kernels.batch_norm import plan as batch_norm_plan
from encnet_triton.kernels.encoding import plan as encoding_plan
from encnet_triton.kernels.runtime.launch import Launch

pytestmark = pytest.mark.slow
ARCH = 90
PROCESSORS = LIMITS[ARCH].processors


def unaligned(pixels: int, channels: int) -> Tensor:
    """Two images, channels last, an odd storage offset."""
    size = 2 * pixels * channels
    memory = torch.empty(size + 1, dtype=torch.bfloat16, device="meta")
    return memory[1:].view(2, pixels, channels).transpose(1, 2)


def encode_launches() -> list[Launch]:
    x, codewords, scale = unaligned(3600, 64), torch.empty(32, 64), torch.empty(32)
    machine = {"arch": ARCH, "processors": PROCESSORS}
    forward, outputs = encoding_plan.forward_launches(x, codewords, scale, False, **machine)
    code, counters = outputs[0], outputs[-1]
    backward, _ = encoding_plan.backward_launches(
        code, x, codewords, scale, None, True, counters, **machine
    )
    return [forward[0], backward[0]]


def batch_norm_launches() -> list[Launch]:
    """Behind a residual, with a mask of bits."""
    x = unaligned(3600, 64)
    channel = torch.empty(64, device="meta")
    affine = batch_norm_plan.Affine(channel, channel, channel, channel, 1e-5)
    machine = PROCESSORS, batch_norm_plan.configs(x)[0]
    forward, (_, mask) = batch_norm_plan.normalise_launches(
        x, affine, x, True, True, False, *machine
    )
    sums, count = channel.new_empty(2, 64).double(), channel.new_empty(1).double()
    backward, _ = batch_norm_plan.input_launches(
        x, x, mask, affine, sums, count, True, True, *machine
    )
    return [forward[0], backward[0]]


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
