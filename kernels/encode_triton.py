"""Which kernels `encode` launches on a GPU, with what tiles; the kernels are in encode_kernels.py.

Letters as in encode.py; KP is K rounded up to a power of two, a product needs 16 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
import triton
from torch import Tensor

from . import encode_kernels as kernels
from .launch import Config, Launch, architecture, run_chosen

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


@dataclass(frozen=True)
class _Problem:
    """What the launches of both directions share; x is B x C x N and channels last."""

    x: Tensor
    codewords: Tensor
    scale: Tensor
    config: Config
    processors: int

    @property
    def images(self) -> int:
        return self.x.shape[0]

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def pixels(self) -> int:
        return self.x.shape[2]

    @property
    def num(self) -> int:
        """K, the number of codewords."""
        return self.codewords.shape[0]

    def walk(self) -> dict[str, Any]:
        """Arguments that say where x lies."""
        return dict(X=self.x, sxb=self.x.stride(0), sxn=self.x.stride(2), N=self.pixels)

    def constants(self, config: Config, **more: Any) -> dict[str, Any]:
        """Constants of a kernel whose tiles are those of `config`."""
        return dict(
            C=self.channels,
            K=self.num,
            KP=_padded(self.num),
            BN=config.block_n,
            BC=config.block_c,
            PRECISION=_precision(self.x.dtype),
            **more,
        )

    def partial(self, splits: int) -> Tensor:
        """Room for the sums over pixels of every program, K x C each; not initialised."""
        size = (self.images, splits, self.num, self.channels)
        return self.x.new_empty(size, dtype=torch.float32)

    def masses(self, slots: int, *kinds: int) -> Tensor:
        """Room for sums of weights, K of each kind, a slot a program or tile."""
        return self.x.new_empty((self.images, slots, *kinds, self.num), dtype=torch.float32)


@dataclass(frozen=True)
class _Gradient:
    """What only the backward pass has: G, the scale in w, and dx or, if not needed, nothing."""

    code: Tensor
    factor: Tensor
    x: Tensor

    @property
    def need_x(self) -> bool:
        return self.x.numel() > 0


def _splits(problem: _Problem, programs: int, block: int) -> int:
    """Programs along an image's pixels: one a multiprocessor, more if small, none without work."""
    programs *= 4 if problem.channels <= 64 else 1
    most = triton.cdiv(problem.pixels, block)
    return max(1, min(programs // max(1, problem.images), most))


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
    images, channels, _ = x.shape
    num = codewords.shape[0]
    config = config or forward_configs(arch, x.dtype, channels, num)[0]
    problem = _Problem(x, codewords, scale, config, processors)
    code = x.new_empty((images, num, channels), dtype=torch.float32)
    rows = (images, num) if return_stats else (0,)
    code_sum, code_m2 = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    launches, partial, masses = (_fused_forward if config.fused else _split_forward)(problem)
    finish = Launch(
        kernels.finish_forward_kernel,
        (images * num,),
        dict(
            P=partial, PM=masses, D=codewords, E=code, ESUM=code_sum, EM2=code_m2,
            splits=partial.shape[1], mass_splits=masses.shape[1],
        ),
        dict(C=channels, K=num, CP=triton.next_power_of_2(channels), BS=8, STATS=return_stats),
        num_warps=4,
    )  # fmt: skip
    return [*launches, finish], (code, code_sum, code_m2)


def _fused_forward(problem: _Problem) -> tuple[list[Launch], Tensor, Tensor]:
    config, channels = problem.config, problem.channels
    parts = _parts(channels, problem.num)
    chunks = _chunks(channels, config, parts)
    splits = _splits(problem, problem.processors // parts, config.block_n)
    partial, masses = problem.partial(splits), problem.masses(splits)
    launch = Launch(
        kernels.forward_kernel,
        (parts * splits * problem.images,),
        dict(
            problem.walk(), D=problem.codewords, S=problem.scale, P=partial, PM=masses,
            splits=splits,
        ),
        problem.constants(
            config,
            OWN=chunks // parts,
            CHUNKS=chunks,
            PREFETCH=channels > 128 and config.block_n <= 32,
        ),
        config.num_warps,
    )  # fmt: skip
    return [launch], partial, masses


def _split_forward(problem: _Problem) -> tuple[list[Launch], Tensor, Tensor]:
    x, scale = problem.x, problem.scale
    tiles = triton.cdiv(problem.pixels, problem.config.block_n)
    masses = problem.masses(tiles)
    # The kernel takes the backward pass's tensors too, and reads none of them.
    unused = dict(TQ=masses, R=scale, dX=x)
    make_weights, weights = _weights(
        problem, tiles, dict(unused, T=problem.codewords, PM=masses), BACKWARD=False, NEED_X=False
    )
    aggregate, partial = _aggregate(problem, weights)
    return [make_weights, aggregate], partial, masses


def _weights(
    problem: _Problem, tiles: int, arguments: dict[str, Any], **constants: bool
) -> tuple[Launch, Tensor]:
    """Split form: the launch that makes the weights of every pixel, B x N x KP."""
    weights = problem.x.new_empty((problem.images, problem.pixels, _padded(problem.num)))
    launch = Launch(
        kernels.weights_kernel,
        (problem.images * tiles,),
        problem.walk() | arguments | dict(S=problem.scale, PW=weights, tiles=tiles),
        problem.constants(problem.config, **constants),
        problem.config.num_warps,
    )
    return launch, weights


def _aggregate(problem: _Problem, weights: Tensor) -> tuple[Launch, Tensor]:
    """Split form: the launch that sums weights times x over the pixels."""
    single = problem.x.dtype == torch.float32
    block_n = 32 if single or _padded(problem.num) > 64 else 64
    shape = Config(block_n, problem.config.block_c, 8)
    chunks = triton.cdiv(problem.channels, shape.block_c)
    programs = triton.cdiv(2 * problem.processors, chunks)
    splits = _splits(problem, programs, 4 * shape.block_n)
    partial = problem.partial(splits)
    launch = Launch(
        kernels.aggregate_kernel,
        (problem.images * splits * chunks,),
        dict(problem.walk(), PW=weights, P=partial, splits=splits),
        problem.constants(shape),
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
    problem = _Problem(x, codewords, scale, config, processors)
    grad_x = x.new_empty((images, pixels, channels) if need_x else (0,))
    gradient = _Gradient(grad, scale if backward_scale is None else backward_scale, grad_x)
    grad_codewords, grad_scale = torch.empty_like(codewords), torch.empty_like(scale)
    launches, partial, masses = (_fused_backward if config.fused else _split_backward)(
        problem, gradient
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


def _fused_backward(problem: _Problem, gradient: _Gradient) -> tuple[list[Launch], Tensor, Tensor]:
    config = problem.config
    splits = _splits(problem, problem.processors, config.block_n)
    partial, masses = problem.partial(splits), problem.masses(splits, 3)
    launch = Launch(
        kernels.backward_kernel,
        (problem.images * splits,),
        dict(
            problem.walk(), D=problem.codewords, S=problem.scale, R=gradient.factor,
            G=gradient.code, dX=gradient.x, P=partial, PM=masses, splits=splits,
        ),
        problem.constants(
            config, CHUNKS=_chunks(problem.channels, config), NEED_X=gradient.need_x
        ),
        config.num_warps,
    )  # fmt: skip
    return [launch], partial, masses


def _split_backward(problem: _Problem, gradient: _Gradient) -> tuple[list[Launch], Tensor, Tensor]:
    tiles = triton.cdiv(problem.pixels, problem.config.block_n)
    rows = (1 + problem.images) * problem.num
    tables = problem.x.new_empty((rows, problem.channels))
    squares = gradient.code.new_empty(rows)
    masses = problem.masses(tiles, 3)
    make_tables = Launch(
        kernels.tables_kernel,
        (rows,),
        dict(D=problem.codewords, G=gradient.code, T=tables, TQ=squares),
        dict(C=problem.channels, K=problem.num, CP=triton.next_power_of_2(problem.channels)),
        num_warps=4,
    )
    make_weights, weights = _weights(
        problem,
        tiles,
        dict(T=tables, TQ=squares, R=gradient.factor, dX=gradient.x, PM=masses),
        BACKWARD=True,
        NEED_X=gradient.need_x,
    )
    aggregate, partial = _aggregate(problem, weights)
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
    return run_chosen(key, configs, launches, x.device)


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
    grad_x, grad_codewords, grad_scale = run_chosen(key, configs, launches, x.device)
    if need_x:
        out = torch.empty_like(given)
        grad_x = grad_x if grad_x.stride() == out.stride() else out.copy_(grad_x)
    return grad_x, grad_codewords, grad_scale
