"""Which forms of the Encoding kernels there are for a problem, with what tiles.

x is B x C x N: images, channels, pixels; K codewords. A product of matrices needs 16 rows at least,
so K is padded to a power of two from 16 on.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..runtime.launch import Config, cdiv, next_power_of_2, varied

# Entries of the K x C sum that one program can hold: 64 registers per thread in 8 warps.
_FUSED_ENTRIES = 16384
# Given to the compiler where it would otherwise spill some bytes to keep more programs resident.
_MOST_REGISTERS = 255
# Entries of an image's x, and its channels, up to which one program takes the whole image.
_WHOLE_ENTRIES, _WHOLE_CHANNELS = 32768, 128

# Channels up to which a fused program has what it knows of codewords in registers.
HELD_CHANNELS = 128


def padded(size: int) -> int:
    """Entries of a product's dimension: a power of two, 16 or more."""
    return max(16, next_power_of_2(size))


def parts(channels: int, num: int) -> int:
    """Programs that share the channels of one image's sum in the fused forward kernel."""
    return cdiv(padded(num) * channels, _FUSED_ENTRIES)


def _most_parts(arch: int, channels: int) -> int:
    """Programs that may share the channels; as compiled, two of them spill on sm_100 and 120."""
    return 1 if arch >= 120 or (arch >= 100 and channels > 512) else 2


def _split_config(arch: int, dtype: torch.dtype, channels: int, num: int) -> Config:
    """Small tiles: K x BC and K x BN must fit the registers beside the operands."""
    height = padded(num)
    if dtype == torch.float32:
        return Config(16, min(32, padded(channels)), 4, "split")
    # Compiled for sm_100 and 120, 64 pixels take 8 bytes of stack.
    block_n = (64 if arch < 100 else 32) if height <= 32 else 32 if height <= 64 else 16
    return Config(block_n, min(64 if height <= 64 else 32, padded(channels)), 8, "split")


def _small_config(dtype: torch.dtype, channels: int, num: int, pixels: int) -> Config:
    """For up to 64 channels and 32 codewords.

    Where the K x C sum is wider than tall, Triton gives each warp columns of it and pixels of the
    logits; otherwise every warp computes the same. Channels that are read one by one, and 3xTF32
    products, take so many registers that fewer pixels fit.
    """
    single, height = dtype == torch.float32, padded(num)
    if channels % 8:
        return Config(
            16 if single else 32, padded(channels), 4, "fused", max_registers=_MOST_REGISTERS
        )
    block_c = max(padded(channels), 2 * height)
    if single:
        block_n = 32 if height == 16 else 16
    elif height == 16:
        block_n = 128 if pixels > 64 else 64
    else:
        # Masks of single channels take registers.
        block_n = 32 if channels % 32 else 64
    return Config(block_n, block_c, 4, "fused", max_registers=_MOST_REGISTERS)


def _is_small(dtype: torch.dtype, channels: int, num: int) -> bool:
    if dtype == torch.float32 and num > 16 and (num < 32 or channels % 8):
        return False  # masks and 3xTF32 products together spill
    return channels <= 64 and padded(num) <= 32


def _whole(configs: list[Config], channels: int, num: int, pixels: int) -> list[Config]:
    """These configurations, preceded for small images by the whole form of the first one."""
    small = channels <= _WHOLE_CHANNELS and channels * pixels <= _WHOLE_ENTRIES
    if not small or padded(num) > 32 or configs[0].form == "split":
        return configs
    return [replace(configs[0], form="whole", max_registers=_MOST_REGISTERS), *configs]


def candidates(configs: list[Config], channels: int) -> list[Config]:
    """These configurations and some that are a step away from one of them, to be measured.

    A fused sum of many channels needs 8 warps and their registers; it spills with any other number.
    """
    found = list(configs)
    if configs[0].form != "split":
        found += varied(configs[0], max_registers=(None, _MOST_REGISTERS))
    if configs[0].stages > 1:
        found += varied(configs[0], stages=(1,))
    for config in configs:
        found += varied(config, block_n=(config.block_n // 2, 2 * config.block_n))
        if 2 * config.block_c <= padded(channels):
            found += varied(config, block_c=(2 * config.block_c,))
        if config.num_warps == 4 or config.form == "split":
            found += varied(config, num_warps=(config.num_warps // 2, 2 * config.num_warps))
    return list(dict.fromkeys(config for config in found if 16 <= config.block_n <= 128))


def forward_configs(
    arch: int, dtype: torch.dtype, channels: int, num: int, pixels: int
) -> list[Config]:
    """Configurations of the forward pass, the preferred one first, the conservative one last."""
    split = _split_config(arch, dtype, channels, num)
    if _is_small(dtype, channels, num):
        fused = [_small_config(dtype, channels, num, pixels), split]
    elif (
        dtype == torch.float32
        or padded(num) > 64
        or parts(channels, num) > _most_parts(arch, channels)
    ):
        fused = [split]
    elif channels <= 64:
        fused = [Config(64, padded(channels), 4, "fused"), split]
    else:
        block_n = 16 if padded(num) > 32 or parts(channels, num) > 1 else 32
        fused = [Config(block_n, 64, 8, "fused"), split]
        # Reading ahead spills up to 24 bytes on sm_100 and 120.
        if channels > 128 and arch < 100:
            fused.insert(0, Config(block_n, 64, 8, "fused", stages=2))
    return _whole(fused, channels, num, pixels)


def boxed_configs(arch: int, x: Tensor, num: int) -> list[Config]:
    """Fused forms of the forward pass that read x, B x C x N, by tensor descriptor.

    No GPU has run them, so they are to be measured, and no plan's own. A descriptor needs addresses
    and strides that are multiples of 16 bytes, and images that do not overlap.
    """
    channels, pixels = x.shape[1:]
    between_images, _, between_pixels = x.stride()
    size = x.element_size()
    aligned = not (x.data_ptr() % 16 or between_images * size % 16 or between_pixels * size % 16)
    apart = len(x) > 0 and between_images >= pixels * between_pixels
    if arch < 90 or size != 2 or not HELD_CHANNELS < channels <= 512 or padded(num) > 32:
        return []
    if not aligned or not apart or pixels < 64:
        return []
    # Pixels of a tile, and stages: one less is the number of tiles in the ring.
    rings = [(16, 4)] if _little_shared(arch) and channels > 256 else [(64, 3), (32, 4)]
    return [Config(n, padded(channels), 8, "boxed", stages=stages) for n, stages in rings]


def _little_shared(arch: int) -> bool:
    """99 KiB of shared memory a block: not enough for a large tile of many channels."""
    return arch in (86, 89, 120)


def backward_configs(
    arch: int, dtype: torch.dtype, channels: int, num: int, pixels: int
) -> list[Config]:
    """Configurations of the backward pass, the preferred one first, the conservative one last."""
    split = _split_config(arch, dtype, channels, num)
    if _is_small(dtype, channels, num):
        fused = [_small_config(dtype, channels, num, pixels), split]
    elif dtype == torch.float32 or padded(num) > 32 or parts(channels, num) > 1:
        fused = [split]
    elif channels <= HELD_CHANNELS:
        fused = [Config(32, 64, 8, "fused"), Config(16, 64, 8, "fused"), split]
    elif arch >= 120 or (_little_shared(arch) and channels > 512):
        fused = [split]  # Compiled for sm_120, 16 pixels take 8 bytes of stack.
    else:
        fused = [split]
        # Compiled for sm_100, 16 pixels take 40 bytes of stack, and for sm_80 32 pixels 8.
        if arch < 100 or channels > 512:
            fused.insert(0, Config(16, 64, 8, "fused", stages=2))
        if arch >= 90 and channels <= 512:
            fused.insert(0, Config(32, 64, 8, "fused", stages=2))
    return _whole(fused, channels, num, pixels)
