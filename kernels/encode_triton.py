"""Which kernels `encode` launches on a GPU, with what tiles; the kernels are in encode_kernels.py.

Letters as in encode.py; KP is K rounded up to a power of two, a product needs 16 at least.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
from torch import Tensor

from . import encode_kernels as kernels
from .launch import Config, Launch, architecture, choose, run_all

# Entries of the K x C sum that one program can hold: 64 registers a thread in 8 warps.
_FUSED_ENTRIES = 16384
# Offsets within a tile of 64 pixels are 32-bit numbers.
_MOST_STRIDE = 2**31 // 128
# Channels beyond which `encode` runs PyTorch code.
MAX_CHANNELS = 2048


def _padded(size: int) -> int:
    """Entries of a product's dimension: a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(size))


def _chunks(channels: int, config: Config, own: int = 1) -> int:
    return triton.cdiv(triton.cdiv(channels, config.block_c), own) * own


def _parts(channels: int, num: int) -> int:
    """Programs that share the channels of one image's sum in the fused forward kernel."""
    return triton.cdiv(_padded(num) * channels, _FUSED_ENTRIES)


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def supports(dtype: torch.dtype, channels: int, num: int) -> bool:
    """Whether there are kernels; 3xTF32 products hold each operand twice, so fewer codewords."""
    return channels <= MAX_CHANNELS and num <= (64 if dtype == torch.float32 else 256)


def _split_config(dtype: torch.dtype, channels: int, num: int) -> Config:
    """Small tiles: K x BC and K x BN must fit the registers beside the operands."""
    padded = _padded(num)
    if dtype == torch.float32:
        return Config(16, min(32, _padded(channels)), 4, fused=False)
    block_n = 64 if padded <= 32 else 32 if padded <= 64 else 16
    return Config(block_n, min(64 if padded <= 64 else 32, _padded(channels)), 8, fused=False)


def forward_configs(arch: int, dtype: torch.dtype, channels: int, num: int) -> list[Config]:
    """Configurations of the forward pass, the preferred one first, the conservative one last."""
    split = _split_config(dtype, channels, num)
    if dtype == torch.float32 or _padded(num) > 64 or _parts(channels, num) > 2:
        return [split]
    if channels <= 64:
        return [Config(64, _padded(channels), 4), split]
    if _padded(num) > 32 or _parts(channels, num) > 1:
        return [Config(16, 64, 8), split]
    half = Config(32, 64, 8)
    if channels <= 128 or (_little_shared(arch) and channels > 256):
        return [half, split]
    return [Config(64, 64, 8), half, split]


def _little_shared(arch: int) -> bool:
    """99 KiB of shared memory a block: not enough for a large tile of many channels."""
    return arch in (86, 89, 120)


def backward_configs(arch: int, dtype: torch.dtype, channels: int, num: int) -> list[Config]:
    """Configurations of the backward pass, the preferred one first, the conservative one last."""
    split = _split_config(dtype, channels, num)
    if dtype == torch.float32 or _padded(num) > 32 or _parts(channels, num) > 1:
        return [split]
    if channels <= 64:
        return [Config(32, _padded(channels), 1 if channels <= 16 else 4), split]
    if channels > 128 and _little_shared(arch):
        return [split]
    return [Config(32, 64, 8), split]


def _splits(processors: int, images: int, pixels: int, channels: int, block: int) -> int:
    """Programs along an image's pixels: one a multiprocessor, more if small, none without work."""
    programs = processors * (4 if channels <= 64 else 1)
    return max(1, min(programs // max(1, images), triton.cdiv(pixels, block)))


def _common(x: Tensor, config: Config, num: int) -> dict[str, Any]:
    return dict(
        C=x.shape[1],
        K=num,
        KP=_padded(num),
        BN=config.block_n,
        BC=config.block_c,
        PRECISION=_precision(x.dtype),
    )


def _walk(x: Tensor) -> dict[str, Any]:
    return dict(X=x, sxb=x.stride(0), sxn=x.stride(2), N=x.shape[2])


def channels_last(x: Tensor) -> Tensor:
    """x, B x C x N, or a copy of it, with the channels of a pixel side by side."""
    if (x.stride(1) == 1 or x.shape[1] == 1) and x.stride(2) < _MOST_STRIDE:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def forward_launches(
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    return_stats: bool,
    *,
    arch: int,
    processors: int,
    config: Optional[Config] = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """Launches of the forward pass and its outputs: E, and its sums and M2 or two empty tensors.

    x is B x C x N and channels last; nothing runs here.
    """
    images, channels, pixels = x.shape
    num = codewords.shape[0]
    config = config or forward_configs(arch, x.dtype, channels, num)[0]
    code = x.new_empty((images, num, channels), dtype=torch.float32)
    stats = [
        x.new_empty((images, num) if return_stats else (0,), dtype=torch.float32) for _ in "12"
    ]
    launches, partial, masses = (_fused_forward if config.fused else _split_forward)(
        x, codewords, scale, config, processors
    )
    finish = Launch(
        kernels.finish_forward_kernel,
        (images * num,),
        dict(
            P=partial, PM=masses, D=codewords, E=code, ESUM=stats[0], EM2=stats[1],
            splits=partial.shape[1], mass_splits=masses.shape[1],
        ),
        dict(C=channels, K=num, CP=triton.next_power_of_2(channels), BS=8, STATS=return_stats),
        num_warps=4,
    )  # fmt: skip
    return [*launches, finish], (code, stats[0], stats[1])


def _fused_forward(
    x: Tensor, codewords: Tensor, scale: Tensor, config: Config, processors: int
) -> tuple[list[Launch], Tensor, Tensor]:
    images, channels, pixels = x.shape
    num = codewords.shape[0]
    parts = _parts(channels, num)
    chunks = _chunks(channels, config, parts)
    splits = _splits(processors // parts, images, pixels, channels, config.block_n)
    partial = x.new_empty((images, splits, num, channels), dtype=torch.float32)
    masses = x.new_empty((images, splits, num), dtype=torch.float32)
    launch = Launch(
        kernels.forward_kernel,
        (parts * splits * images,),
        dict(_walk(x), D=codewords, S=scale, P=partial, PM=masses, splits=splits),
        dict(
            _common(x, config, num),
            OWN=chunks // parts,
            CHUNKS=chunks,
            PREFETCH=channels > 128 and config.block_n <= 32,
        ),
        config.num_warps,
    )
    return [launch], partial, masses


def _split_forward(
    x: Tensor, codewords: Tensor, scale: Tensor, config: Config, processors: int
) -> tuple[list[Launch], Tensor, Tensor]:
    images, _, pixels = x.shape
    num = codewords.shape[0]
    tiles = triton.cdiv(pixels, config.block_n)
    weights = x.new_empty((images, pixels, _padded(num)))
    masses = x.new_empty((images, tiles, num), dtype=torch.float32)
    launch = Launch(
        kernels.weights_kernel,
        (images * tiles,),
        dict(
            _walk(x),
            T=codewords,
            TQ=masses,
            S=scale,
            R=scale,
            dX=x,
            PW=weights,
            PM=masses,
            tiles=tiles,
        ),
        dict(_common(x, config, num), BACKWARD=False, NEED_X=False),
        config.num_warps,
    )  # fmt: skip
    aggregate, partial = _aggregate(x, weights, num, config, processors)
    return [launch, aggregate], partial, masses


def _aggregate(
    x: Tensor, weights: Tensor, num: int, config: Config, processors: int
) -> tuple[Launch, Tensor]:
    images, channels, pixels = x.shape
    block_n = 32 if x.dtype == torch.float32 or _padded(num) > 64 else 64
    shape = Config(block_n, config.block_c, 8)
    chunks = triton.cdiv(channels, shape.block_c)
    programs = triton.cdiv(2 * processors, chunks)
    splits = _splits(programs, images, pixels, channels, 4 * shape.block_n)
    partial = x.new_empty((images, splits, num, channels), dtype=torch.float32)
    launch = Launch(
        kernels.aggregate_kernel,
        (images * splits * chunks,),
        dict(_walk(x), PW=weights, P=partial, splits=splits),
        _common(x, shape, num),
        shape.num_warps,
    )
    return launch, partial


def backward_launches(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    backward_scale: Optional[Tensor],
    need_x: bool,
    *,
    arch: int,
    processors: int,
    config: Optional[Config] = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """Launches of the backward pass and its outputs: dx (empty unless needed), dcodewords, dscale.

    grad is B x K x C in float32, contiguous; x as in the forward pass; dx is channels last.
    """
    images, channels, pixels = x.shape
    num = codewords.shape[0]
    config = config or backward_configs(arch, x.dtype, channels, num)[0]
    grad_x = x.new_empty((images, pixels, channels) if need_x else (0,))
    grad_codewords, grad_scale = torch.empty_like(codewords), torch.empty_like(scale)
    factor = scale if backward_scale is None else backward_scale
    launches, partial, masses = (_fused_backward if config.fused else _split_backward)(
        grad, x, codewords, scale, factor, grad_x, config, processors
    )
    block_c = min(64, triton.next_power_of_2(channels))
    finish = Launch(
        kernels.finish_backward_kernel,
        (num * triton.cdiv(channels, block_c),),
        dict(
            P=partial, PM=masses, G=grad, D=codewords, dD=grad_codewords, dS=grad_scale,
            images=images, splits=partial.shape[1], mass_splits=masses.shape[1],
        ),
        dict(C=channels, K=num, BC=block_c, BS=16, BM=256),
        num_warps=4,
    )  # fmt: skip
    if need_x:
        grad_x = grad_x.transpose(1, 2)
    return [*launches, finish], (grad_x, grad_codewords, grad_scale)


def _fused_backward(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    factor: Tensor,
    grad_x: Tensor,
    config: Config,
    processors: int,
) -> tuple[list[Launch], Tensor, Tensor]:
    images, channels, pixels = x.shape
    num = codewords.shape[0]
    splits = _splits(processors, images, pixels, channels, config.block_n)
    partial = x.new_empty((images, splits, num, channels), dtype=torch.float32)
    masses = x.new_empty((images, splits, 3, num), dtype=torch.float32)
    launch = Launch(
        kernels.backward_kernel,
        (images * splits,),
        dict(
            _walk(x), D=codewords, S=scale, R=factor, G=grad, dX=grad_x, P=partial, PM=masses,
            splits=splits,
        ),
        dict(
            _common(x, config, num), CHUNKS=_chunks(channels, config), NEED_X=grad_x.numel() > 0
        ),
        config.num_warps,
    )  # fmt: skip
    return [launch], partial, masses


def _split_backward(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    factor: Tensor,
    grad_x: Tensor,
    config: Config,
    processors: int,
) -> tuple[list[Launch], Tensor, Tensor]:
    images, channels, pixels = x.shape
    num = codewords.shape[0]
    tiles = triton.cdiv(pixels, config.block_n)
    tables = x.new_empty(((1 + images) * num, channels))
    squares = grad.new_empty((1 + images) * num)
    weights = x.new_empty((images, pixels, _padded(num)))
    masses = x.new_empty((images, tiles, 3, num), dtype=torch.float32)
    make_tables = Launch(
        kernels.tables_kernel,
        ((1 + images) * num,),
        dict(D=codewords, G=grad, T=tables, TQ=squares),
        dict(C=channels, K=num, CP=triton.next_power_of_2(channels)),
        num_warps=4,
    )
    make_weights = Launch(
        kernels.weights_kernel,
        (images * tiles,),
        dict(
            _walk(x), T=tables, TQ=squares, S=scale, R=factor, dX=grad_x, PW=weights, PM=masses,
            tiles=tiles,
        ),
        dict(_common(x, config, num), BACKWARD=True, NEED_X=grad_x.numel() > 0),
        config.num_warps,
    )  # fmt: skip
    aggregate, partial = _aggregate(x, weights, num, config, processors)
    return [make_tables, make_weights, aggregate], partial, masses


def forward(
    x: Tensor, codewords: Tensor, scale: Tensor, return_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """E, and its sums and M2 over the channels (two empty tensors if not asked for)."""
    arch, processors = architecture(x)
    x, codewords, scale = channels_last(x), codewords.contiguous(), scale.contiguous()
    channels, num = x.shape[1], codewords.shape[0]

    def launches(config: Config) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
        return forward_launches(
            x, codewords, scale, return_stats, arch=arch, processors=processors, config=config
        )

    configs = forward_configs(arch, x.dtype, channels, num)
    key = ("encode forward", x.device, x.dtype, channels, num)
    made, outputs = launches(choose(key, configs, lambda config: launches(config)[0]))
    run_all(made, x.device)
    return outputs


def backward(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    backward_scale: Optional[Tensor],
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless needed), codewords and scale."""
    arch, processors = architecture(x)
    given, x = x, channels_last(x)
    grad, codewords, scale = grad.contiguous(), codewords.contiguous(), scale.contiguous()
    factor = None if backward_scale is None else backward_scale.contiguous()
    channels, num = x.shape[1], codewords.shape[0]

    def launches(config: Config) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
        return backward_launches(
            grad, x, codewords, scale, factor, need_x,
            arch=arch, processors=processors, config=config,
        )  # fmt: skip

    configs = backward_configs(arch, x.dtype, channels, num)
    key = ("encode backward", x.device, x.dtype, channels, num, need_x)
    made, (grad_x, grad_codewords, grad_scale) = launches(
        choose(key, configs, lambda config: launches(config)[0])
    )
    run_all(made, x.device)
    if need_x:
        out = torch.empty_like(given)
        grad_x = grad_x if grad_x.stride() == out.stride() else out.copy_(grad_x)
    return grad_x, grad_codewords, grad_scale
