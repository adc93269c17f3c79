"""Which kernels `encode` launches on a GPU; tiles.py says with what tiles.

The form of a pass is "fused" (fused.py, paired.py: one kernel that keeps its sums in registers) or
"split" (split.py: kernels that store the weights in between); finish.py adds up partial sums. In
the "whole" form a fused program takes all pixels of an image and finishes its sums itself. In the
"boxed" one it reads x by tensor descriptor, into a ring of one tile less than there are stages. A
tile has `block_n` pixels; a product covers `block_c` channels.

x is B x C x N: images, channels, pixels; K codewords. A product of matrices needs 16 rows at least,
so K is padded to a power of two from 16 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..runtime.launch import Config, Launch, Machine, cdiv, next_power_of_2
from ..runtime.tuned import Problem, problem_of
from . import finish, fused, paired, split
from .tiles import (
    HELD_CHANNELS,
    backward_configs,
    boxed_configs,
    candidates,
    forward_configs,
    padded,
    parts,
)

# Channels beyond which `encode` runs PyTorch code.
MAX_CHANNELS = 2048
# Offsets within a tile of up to 128 pixels are 32-bit numbers.
_MOST_STRIDE = 2**31 // 128
# Images whose rows one program adds up, and entries of a row that it adds at once.
_GROUP, _ROW_ENTRIES = 16, 512
# Codewords whose mean stands in for that of all in the split form's tables; all programs read them.
_FEW = 8


def supports(x: Tensor, codewords: Tensor) -> bool:
    """Whether there are kernels; 3xTF32 products hold each operand twice, so fewer codewords."""
    num, channels = codewords.shape
    return channels <= MAX_CHANNELS and num <= (64 if x.dtype == torch.float32 else 256)


def _chunks(channels: int, config: Config, own: int = 1) -> int:
    return cdiv(cdiv(channels, config.block_c), own) * own


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


@dataclass(frozen=True)
class _Shared:
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
            KP=padded(self.num),
            BN=config.block_n,
            BC=config.block_c,
            PRECISION=_precision(self.x.dtype),
            **more,
        )

    @property
    def held(self) -> bool:
        """Whether a fused program has what it knows of the codewords in registers."""
        return self.config.form == "whole" or self.channels <= HELD_CHANNELS

    def boxes(self) -> TensorDescriptor:
        """x as a tensor descriptor: no box reaches into another image."""
        rows = self.x.transpose(1, 2)
        block = [1, self.config.block_n, self.config.block_c]
        return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), block)

    def notes(self, programs: int, numbers: int) -> Tensor:
        """Room for `numbers` numbers per program, if it does not hold them; not initialised."""
        size = (0,) if self.held else (programs, numbers)
        return self.x.new_empty(size, dtype=torch.float32)

    def partial(self, splits: int) -> Tensor:
        """Room for the sums over pixels of every program, K x C each; not initialised."""
        size = (self.images, splits, self.num, self.channels)
        return self.x.new_empty(size, dtype=torch.float32)

    def masses(self, slots: int, *kinds: int) -> Tensor:
        """Room for sums of weights, K of each kind, one slot per program or tile."""
        return self.x.new_empty((self.images, slots, *kinds, self.num), dtype=torch.float32)


@dataclass(frozen=True)
class _Code:
    """What the forward pass returns: E, its sums and M2 or two empty tensors, the counters."""

    code: Tensor
    sums: Tensor
    m2: Tensor
    counters: Tensor

    @classmethod
    def empty(cls, shared: _Shared, with_stats: bool) -> _Code:
        images, num = shared.images, shared.num
        new = shared.x.new_empty
        rows = (images, num) if with_stats else (0,)
        return cls(
            new((images, num, shared.channels), dtype=torch.float32),
            new(rows, dtype=torch.float32),
            new(rows, dtype=torch.float32),
            new(images + 1, dtype=torch.int32),
        )

    @property
    def with_stats(self) -> bool:
        return self.sums.dim() == 2

    @property
    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.code, self.sums, self.m2, self.counters

    def arguments(self) -> dict[str, Tensor]:
        return dict(E=self.code, ESUM=self.sums, EM2=self.m2, Count=self.counters)


@dataclass(frozen=True)
class _Gradient:
    """What only the backward pass has: G, the scale in w, and dx (empty unless needed)."""

    code: Tensor
    factor: Tensor
    x: Tensor
    codewords: Tensor
    scale: Tensor
    counters: Tensor

    @property
    def need_x(self) -> bool:
        return self.x.numel() > 0


def _splits(shared: _Shared, programs: int, block: int) -> int:
    """Programs along an image's pixels; `programs` run at once, more of them if small."""
    programs *= 4 if shared.channels <= 64 else 1
    return _done_earliest(shared.images, cdiv(shared.pixels, block), programs)


@cache
def _done_earliest(images: int, tiles: int, programs: int) -> int:
    """Programs along an image's tiles: the number with which the last one finishes earliest.

    Each works through its tiles in turn and spends the time of one more tile on its prologue and
    partial sums. Ties go to the smallest number.
    """

    def last_done(splits: int) -> int:
        return cdiv(images * splits, programs) * (cdiv(tiles, splits) + 1)

    return min(range(1, min(programs, tiles) + 1), key=last_done, default=1)


def _asked(name: str, x: Tensor, codewords: Tensor, **options: Any) -> Problem:
    """Channels and codewords are compiled in, images and pixels are not."""
    images, channels, pixels = x.shape
    options.update(C=channels, K=len(codewords))
    return problem_of(f"encode {name}", x.dtype, options, B=images, N=pixels)


def channels_last(x: Tensor) -> Tensor:
    """x, B x C x N, or a copy of it, with the channels of a pixel side by side."""
    if (x.stride(1) == 1 or x.shape[1] == 1) and x.stride(2) < _MOST_STRIDE:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@dataclass(frozen=True)
class Forward:
    """The forward pass over x, B x C x N and channels last.

    Outputs are E, its sums and M2 or two empty tensors, and B + 1 counters at zero for the backward
    pass. Codewords (K x C) and scale (K) are contiguous.
    """

    x: Tensor
    codewords: Tensor
    scale: Tensor
    return_stats: bool

    @property
    def device(self) -> torch.device:
        return self.x.device

    def problem(self) -> Problem:
        return _asked("forward", self.x, self.codewords)

    def configs(self, machine: Machine) -> list[Config]:
        _, channels, pixels = self.x.shape
        num = len(self.codewords)
        return forward_configs(machine.arch, self.x.dtype, channels, num, pixels)

    def candidates(self, machine: Machine) -> list[Config]:
        boxed = boxed_configs(machine.arch, self.x, len(self.codewords))
        return boxed + candidates(self.configs(machine), self.x.shape[1])

    def launches(
        self, machine: Machine, config: Config
    ) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
        shared = _Shared(self.x, self.codewords, self.scale, config, machine.processors)
        code = _Code.empty(shared, self.return_stats)
        if config.form == "whole":
            launch, _, _ = _fused_forward(shared, code)
            return [launch], code.outputs
        if config.form != "split":
            launch, partial, masses = _fused_forward(shared, code)
            launches = [launch]
        else:
            launches, partial, masses = _split_forward(shared)
        add_up = Launch(
            finish.finish_forward_kernel,
            (shared.images * shared.num,),
            dict(
                code.arguments(), P=partial, PM=masses, D=self.codewords, splits=partial.shape[1],
                mass_splits=masses.shape[1],
            ),
            dict(
                C=shared.channels, K=shared.num, CP=next_power_of_2(shared.channels), BS=8,
                STATS=self.return_stats,
            ),
            num_warps=4,
        )  # fmt: skip
        return [*launches, add_up], code.outputs


def _fused_forward(shared: _Shared, code: _Code) -> tuple[Launch, Tensor, Tensor]:
    """The walk over the pixels; the whole form needs no room for partial sums."""
    config, channels = shared.config, shared.channels
    whole, boxed = config.form == "whole", config.form == "boxed"
    sharing = 1 if whole else parts(channels, shared.num)
    chunks = _chunks(channels, config, sharing)
    splits = 1 if whole else _splits(shared, shared.processors // sharing, config.block_n)
    partial, masses = code.code, code.code
    if not whole:
        partial, masses = shared.partial(splits), shared.masses(splits)
    launch = Launch(
        fused.forward_kernel,
        (sharing * splits * shared.images,),
        dict(
            shared.walk(), **code.arguments(), D=shared.codewords, S=shared.scale, P=partial,
            PM=masses, Own=shared.notes(sharing * splits * shared.images, channels),
            splits=splits, Boxes=shared.boxes() if boxed else None,
        ),
        shared.constants(
            config,
            OWN=chunks // sharing,
            CHUNKS=chunks,
            HELD=shared.held,
            AHEAD=config.stages > 1 and not boxed,
            WHOLE=whole,
            STATS=whole and code.with_stats,
            CP=next_power_of_2(channels),
        ),
        config.num_warps,
        num_stages=config.stages if boxed else 1,
        max_registers=config.max_registers,
    )  # fmt: skip
    return launch, partial, masses


def _split_forward(shared: _Shared) -> tuple[list[Launch], Tensor, Tensor]:
    x, scale = shared.x, shared.scale
    tiles = cdiv(shared.pixels, shared.config.block_n)
    masses = shared.masses(tiles)
    # The kernel also takes the tensors of the backward pass, but reads none of them.
    unused = dict(TQ=masses, Center=masses, R=scale, dX=x)
    make_weights, weights = _weights(
        shared, tiles, dict(unused, T=shared.codewords, PM=masses), BACKWARD=False, NEED_X=False
    )
    aggregate, partial = _aggregate(shared, weights)
    return [make_weights, aggregate], partial, masses


def _weights(
    shared: _Shared, tiles: int, arguments: dict[str, Any], **constants: bool
) -> tuple[Launch, Tensor]:
    """Split form: the launch that makes the weights of every pixel, B x N x KP."""
    weights = shared.x.new_empty((shared.images, shared.pixels, padded(shared.num)))
    launch = Launch(
        split.weights_kernel,
        (shared.images * tiles,),
        shared.walk() | arguments | dict(S=shared.scale, PW=weights, tiles=tiles),
        shared.constants(shared.config, **constants),
        shared.config.num_warps,
    )
    return launch, weights


def _aggregate(shared: _Shared, weights: Tensor) -> tuple[Launch, Tensor]:
    """Split form: the launch that sums weights times x over the pixels."""
    single = shared.x.dtype == torch.float32
    block_n = 32 if single or padded(shared.num) > 64 else 64
    shape = Config(block_n, shared.config.block_c, 8)
    chunks = cdiv(shared.channels, shape.block_c)
    programs = cdiv(2 * shared.processors, chunks)
    splits = _splits(shared, programs, 4 * shape.block_n)
    partial = shared.partial(splits)
    launch = Launch(
        split.aggregate_kernel,
        (shared.images * splits * chunks,),
        dict(shared.walk(), PW=weights, P=partial, splits=splits),
        shared.constants(shape),
        shape.num_warps,
    )
    return launch, partial


@dataclass(frozen=True)
class Backward:
    """The backward pass; outputs are dx (channels last; empty unless needed), dcodewords, dscale.

    grad, dE, is B x K x C in float32, contiguous; x and the parameters are as in the forward pass;
    factor is the scale in w, K. The counters are those of the forward pass, at zero before and
    after.
    """

    grad: Tensor
    x: Tensor
    codewords: Tensor
    scale: Tensor
    factor: Tensor
    need_x: bool
    counters: Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device

    def problem(self) -> Problem:
        return _asked("backward", self.x, self.codewords, dx=self.need_x)

    def configs(self, machine: Machine) -> list[Config]:
        _, channels, pixels = self.x.shape
        num = len(self.codewords)
        return backward_configs(machine.arch, self.x.dtype, channels, num, pixels)

    def candidates(self, machine: Machine) -> list[Config]:
        return candidates(self.configs(machine), self.x.shape[1])

    def launches(
        self, machine: Machine, config: Config
    ) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
        images, channels, pixels = self.x.shape
        shared = _Shared(self.x, self.codewords, self.scale, config, machine.processors)
        grad_x = self.x.new_empty((images, pixels, channels) if self.need_x else (0,))
        gradient = _Gradient(
            self.grad,
            self.factor,
            grad_x,
            torch.empty_like(self.codewords),
            torch.empty_like(self.scale),
            self.counters,
        )
        outputs = (
            grad_x.transpose(1, 2) if self.need_x else grad_x,
            gradient.codewords,
            gradient.scale,
        )
        # Without images no program is the last one.
        if config.form == "whole" and images:
            return [_fused_backward(shared, gradient)[0]], outputs
        if config.form != "split":
            launch, partial, masses = _fused_backward(shared, gradient)
            launches = [launch]
        else:
            launches, partial, masses = _split_backward(shared, gradient)
        block_c = min(64, next_power_of_2(channels))
        add_up = Launch(
            finish.finish_backward_kernel,
            (shared.num * cdiv(channels, block_c),),
            dict(
                P=partial, PM=masses, G=self.grad, D=self.codewords, dD=gradient.codewords,
                dS=gradient.scale, images=images, splits=partial.shape[1],
                mass_splits=masses.shape[1],
            ),
            dict(C=channels, K=shared.num, BC=block_c, BS=16, BM=256),
            num_warps=4,
        )  # fmt: skip
        return [*launches, add_up], outputs


def _fused_backward(shared: _Shared, gradient: _Gradient) -> tuple[Launch, Tensor, Tensor]:
    """The walk over the pixels; the whole form has one row of sums per image and one per group."""
    config, images = shared.config, shared.images
    chunks = _chunks(shared.channels, config)
    if config.form == "whole":
        splits = 1
        rows = (images + cdiv(images, _GROUP), shared.num * (shared.channels + 1))
        partial = masses = gradient.code.new_empty(rows)
    else:
        splits = _splits(shared, shared.processors, config.block_n)
        partial, masses = shared.partial(splits), shared.masses(splits, 3)
    arguments = dict(
        shared.walk(), D=shared.codewords, S=shared.scale, R=gradient.factor, G=gradient.code,
        dX=gradient.x, P=partial, PM=masses, splits=splits,
    )  # fmt: skip
    constants = shared.constants(config, CHUNKS=chunks, NEED_X=gradient.need_x)
    if config.form == "whole" or shared.channels <= HELD_CHANNELS:
        kernel = fused.backward_kernel
        arguments.update(
            dD=gradient.codewords, dS=gradient.scale, Count=gradient.counters, images=images,
            group=_GROUP,
        )  # fmt: skip
        constants.update(BE=_ROW_ENTRIES, WHOLE=config.form == "whole")
    else:
        kernel = paired.paired_backward_kernel
        notes = (splits * images, shared.channels + 4 * padded(shared.num))
        arguments.update(Own=shared.x.new_empty(notes, dtype=torch.float32))
        constants.update(AHEAD=config.stages > 1, CP=next_power_of_2(shared.channels))
    launch = Launch(
        kernel, (shared.images * splits,), arguments, constants, config.num_warps,
        max_registers=config.max_registers,
    )  # fmt: skip
    return launch, partial, masses


def _split_backward(shared: _Shared, gradient: _Gradient) -> tuple[list[Launch], Tensor, Tensor]:
    tiles = cdiv(shared.pixels, shared.config.block_n)
    rows = (1 + shared.images) * shared.num
    tables = shared.x.new_empty((rows, shared.channels))
    products = gradient.code.new_empty(rows + 2 * shared.num)
    center = gradient.code.new_empty(shared.channels)
    masses = shared.masses(tiles, 3)
    make_tables = Launch(
        split.tables_kernel,
        (rows,),
        dict(D=shared.codewords, G=gradient.code, T=tables, TQ=products, Center=center),
        dict(
            C=shared.channels, K=shared.num, CP=next_power_of_2(shared.channels),
            FEW=min(_FEW, shared.num),
        ),
        num_warps=4,
    )  # fmt: skip
    make_weights, weights = _weights(
        shared,
        tiles,
        dict(
            T=tables,
            TQ=products,
            Center=center,
            R=gradient.factor,
            dX=gradient.x,
            PM=masses,
        ),
        BACKWARD=True,
        NEED_X=gradient.need_x,
    )
    aggregate, partial = _aggregate(shared, weights)
    return [make_tables, make_weights, aggregate], partial, masses
