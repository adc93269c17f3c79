"""Which kernels `batch_norm_act` launches on a GPU; they are in kernels.py and finish.py.

x is B x C x N (images, channels, pixels) and dense, contiguous or with the channels innermost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Optional

import torch
from torch import Tensor

from ..runtime.launch import Config, Launch, Machine, cdiv, next_power_of_2
from ..runtime.replay import MOST_KINDS
from ..runtime.tuned import Problem, problem_of
from . import finish, kernels

# Bytes of a tile, and warps: one load of 16 bytes per thread. With more bytes, or with 4 warps, the
# compiler aims for register counts that spill a few bytes in some kernels.
_TILE_BYTES, _WARPS = 4096, 8
# Tiles, as quarters of that, with their warps: the ones to choose from, and more for `bench tune`.
_CHOICES = ((4, _WARPS), (1, _WARPS // 2))
_MORE = ((8, _WARPS), (2, _WARPS), (4, _WARPS // 2), (4, 2 * _WARPS), (8, 2 * _WARPS))
# Channels of a tile: 128 bytes of a row in half precision, four sectors.
_CHANNELS = 64
# Tiles of one run of the statistics, which are taken about the mean of its first tile.
_MOST_TILES = 32
# Programs per multiprocessor: about three times as many as are resident, so that the last wave is
# short. Runs of fewer than 4 tiles would write many partial sums, and only pay where there is
# little work.
_PROGRAMS, _FEW_TILES = 16, 4
# For programs with a single tile. Without a limit the compiler saves registers to fit more resident
# programs than there are, and spills a few bytes.
_MOST_REGISTERS = 255
# A finishing kernel: channels per program, runs read at once, warps; for few runs and for many:
# each round of loads waits for memory.
_FINISH, _FINISH_MANY = (16, 64, 4), (4, 1024, 16)


def _channels_last(x: Tensor) -> bool:
    if x.shape[2] == 1:
        return True
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """x, or a contiguous copy of it where the kernels cannot read it as it lies."""
    return x if x.transpose(1, 2).is_contiguous() else x.contiguous()


def _layout(x: Tensor) -> tuple[int, int, int, bool]:
    """Images, channels, pixels, and whether the channels lie innermost."""
    return (*x.shape, _channels_last(x))


def supports(x: Tensor, *, read: bool = True) -> bool:
    """Whether there are kernels for x; to read it they need at least one value."""
    return not read or x.numel() > 0


def configs(x: Tensor) -> list[Config]:
    """Tiles for x, the preferred one first, the conservative one last."""
    return _configs(*_layout(x), _TILE_BYTES // x.element_size(), _CHOICES)


def _block(channels: int) -> int:
    """Channels of a tile, channels last; the mask's layout depends on it."""
    return min(_CHANNELS, max(8, next_power_of_2(int(channels))))


@lru_cache(MOST_KINDS)
def _configs(
    images: int,
    channels: int,
    pixels: int,
    last: bool,
    tile: int,
    choices: tuple[tuple[int, int], ...],
) -> list[Config]:
    made = []
    for quarters, warps in choices:
        values = tile * quarters // 4
        if last:
            inner = _block(channels)
            outer = values // inner
        else:
            inner = min(values, max(8, next_power_of_2(pixels)))
            outer = min(values // inner, next_power_of_2(images))
        made.append(Config(outer, inner, warps))
    return made


def mask_shape(x: Tensor) -> tuple[int, ...]:
    """Of the packed mask of x, in bytes; of 2 dimensions where the channels lie innermost, or 3."""
    images, channels, pixels, last = _layout(x)
    if last:
        block = _block(channels)
        return cdiv(channels, block), images * pixels * (block // 8)
    return images, channels, cdiv(pixels, 8)


def as_packed(x: Tensor, mask: Tensor) -> Tensor:
    """x as it lay in memory when its mask was packed.

    What keeps x for the backward pass may give back another layout, as save_on_cpu does with
    pinned memory.
    """
    last = mask.dim() == 2
    if last == _channels_last(x):
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2) if last else x.contiguous()


@dataclass(frozen=True)
class Walk:
    """How the programs of a kernel share x: runs of tiles, `per` tiles each, for some channels."""

    splits: int
    grid: tuple[int, ...]
    arguments: dict[str, int]
    constants: dict[str, Any]
    num_warps: int
    max_registers: Optional[int]

    def launch(self, kernel: Any, arguments: dict[str, Any], **constants: Any) -> Launch:
        """The launch of a kernel that walks x this way."""
        return Launch(
            kernel,
            self.grid,
            arguments | self.arguments,
            self.constants | constants,
            self.num_warps,
            max_registers=self.max_registers,
        )


@lru_cache(MOST_KINDS)
def _walk(
    images: int, channels: int, pixels: int, last: bool, processors: int, config: Config
) -> Walk:
    if last:
        blocks, tiles = cdiv(channels, config.block_c), cdiv(images * pixels, config.block_n)
    else:
        blocks = channels
        tiles = cdiv(images, config.block_n) * cdiv(pixels, config.block_c)
    least = max(1, min(_FEW_TILES, tiles * blocks // (2 * processors)))
    per = min(_MOST_TILES, max(least, cdiv(tiles * blocks, _PROGRAMS * processors)))
    splits = cdiv(tiles, per)
    sizes = {"B": images, "C": channels, "N": pixels, "per": per, "tiles": tiles}
    sizes["packed"] = config.block_c // 8
    constants = {"BP": config.block_n, "BQ": config.block_c, "LAST": last}
    registers = _MOST_REGISTERS if per == 1 else None
    return Walk(splits, (blocks * splits,), sizes, constants, config.num_warps, registers)


@dataclass(frozen=True)
class Affine:
    """What normalises a channel: mean, var, weight and bias, each C, and eps."""

    mean: Tensor
    var: Tensor
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    eps: float

    def arguments(self) -> dict[str, Any]:
        return {
            "Mean": self.mean,
            "Var": self.var,
            "Weight": self.mean if self.weight is None else self.weight,
            "Bias": self.mean if self.bias is None else self.bias,
            "eps": self.eps,
        }

    def of_residual(self, *names: str) -> dict[str, Any]:
        """The arguments of these names, where this normalises the residual."""
        given = self.arguments()
        return {f"R{name}": given[name] for name in names}

    def constants(self) -> dict[str, bool]:
        return {"WEIGHT": self.weight is not None, "BIAS": self.bias is not None}


@dataclass(frozen=True)
class Running:
    """The running statistics to move, or None, and by how much."""

    mean: Optional[Tensor]
    var: Optional[Tensor]
    momentum: float


def _finish(
    kernel: Any, channels: int, splits: int, arguments: dict[str, Any], **constants: Any
) -> Launch:
    """The launch that adds `splits` partial sums per channel, in four rounds of loads or fewer."""
    few = splits <= 4 * _FINISH[1]
    block, runs, warps = _FINISH if few else _FINISH_MANY
    sizes = {"C": channels, "splits": splits}
    constants.update(BC=block, BS=runs)
    return Launch(kernel, (cdiv(channels, block),), arguments | sizes, constants, warps)


def _moments_arguments(
    mean: Tensor, var: Tensor, count: Tensor, running: Running
) -> tuple[dict[str, Any], dict[str, Any]]:
    arguments = {
        "Mean": mean,
        "Var": var,
        "Count": count,
        "RunningMean": mean if running.mean is None else running.mean,
        "RunningVar": var if running.var is None else running.var,
        "momentum": running.momentum,
    }
    constants = {"MEAN": running.mean is not None, "VAR": running.var is not None}
    return arguments, constants


def _new_moments(x: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance in float32, and the count in float64; not initialised."""
    mean, var = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    return mean, var, x.new_empty(1, dtype=torch.float64)


@dataclass(frozen=True)
class _Pass:
    """A pass over x, B x C x N and dense."""

    x: Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device

    def asked(self, name: str, **options: bool) -> Problem:
        """The problem to tune, without the constants that hardly change the number of registers."""
        images, channels, pixels, last = _layout(self.x)
        options.update(channels_last=last)
        return problem_of(
            f"batch_norm {name}", self.x.dtype, options, B=images, C=channels, N=pixels
        )

    def configs(self, machine: Machine) -> list[Config]:
        return configs(self.x)

    def candidates(self, machine: Machine) -> list[Config]:
        tile = _TILE_BYTES // self.x.element_size()
        return list(dict.fromkeys(_configs(*_layout(self.x), tile, _CHOICES + _MORE)))

    def walk(self, machine: Machine, config: Config) -> Walk:
        return _walk(*_layout(self.x), machine.processors, config)


@dataclass(frozen=True)
class Statistics(_Pass):
    """The statistics of this process's x.

    Without `running` the output is [sum x, sum x^2, count], to be summed over the processes of a
    group; with it mean, var and count, and the running statistics are moved.
    """

    running: Optional[Running]

    def problem(self) -> Problem:
        return self.asked("statistics")

    def launches(self, machine: Machine, config: Config) -> tuple[list[Launch], tuple[Tensor, ...]]:
        x, running = self.x, self.running
        walk = self.walk(machine, config)
        channels = x.shape[1]
        sums_of_runs = x.new_empty((walk.splits, 2, channels), dtype=torch.float32)
        counts = x.new_empty(walk.splits, dtype=torch.int32)
        mean, var, count = _new_moments(x, channels)
        packed = x.new_empty(2 * channels + 1, dtype=torch.float64)
        moved = running or Running(None, None, 0.0)
        arguments, constants = _moments_arguments(mean, var, count, moved)
        last = _finish(
            finish.finish_statistics_kernel,
            channels,
            walk.splits,
            dict(arguments, P=sums_of_runs, PN=counts, Packed=packed),
            **constants,
            ALONE=running is not None,
        )
        first = walk.launch(kernels.statistics_kernel, {"X": x, "P": sums_of_runs, "PN": counts})
        return [first, last], (packed,) if running is None else (mean, var, count)


@dataclass(frozen=True)
class Moments:
    """Mean, var and count of [sum x, sum x^2, count] over all processes."""

    packed: Tensor
    running: Running

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def problem(self) -> Problem:
        return problem_of("batch_norm moments", self.packed.dtype, {}, C=self.packed.shape[0] // 2)

    def configs(self, machine: Machine) -> list[Config]:
        return [Config(1, _FINISH[0], 1)]

    candidates = configs

    def launches(
        self, machine: Machine, config: Config
    ) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
        channels = self.packed.shape[0] // 2
        made = _new_moments(self.packed, channels)
        arguments, constants = _moments_arguments(*made, self.running)
        launch = Launch(
            finish.moments_kernel,
            (cdiv(channels, _FINISH[0]),),
            dict(arguments, Packed=self.packed, C=channels),
            dict(constants, BC=_FINISH[0]),
            num_warps=config.num_warps,
        )
        return [launch], made


@dataclass(frozen=True)
class Normalise(_Pass):
    """y, and the packed mask (else empty); residual lies as x does.

    `of_residual` normalises the residual: its weight and bias are there where those of x are.
    """

    affine: Affine
    residual: Optional[Tensor]
    relu: bool
    pack: bool
    fold: bool
    of_residual: Optional[Affine] = None

    def problem(self) -> Problem:
        name = "normalise" if self.of_residual is None else "normalise two"
        added = self.residual is not None
        return self.asked(name, residual=added, packed=self.pack, frozen=self.fold)

    def launches(
        self, machine: Machine, config: Config
    ) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
        x, residual = self.x, self.residual
        y = torch.empty_like(x)
        mask = x.new_empty(mask_shape(x) if self.pack else 0, dtype=torch.uint8)
        arguments = {"X": x, "R": x if residual is None else residual, "Y": y}
        of_residual = self.of_residual or self.affine
        arguments |= of_residual.of_residual("Mean", "Var", "Weight", "Bias")
        launch = self.walk(machine, config).launch(
            kernels.normalise_kernel,
            arguments | {"Bits": mask if self.pack else y} | self.affine.arguments(),
            **self.affine.constants(),
            RESIDUAL=residual is not None,
            NORM=self.of_residual is not None,
            RELU=self.relu,
            PACK=self.pack,
            FOLD=self.fold,
        )
        return [launch], (y, mask)


@dataclass(frozen=True)
class Residual:
    """A residual that is normalised, and by what; see `Normalise`."""

    x: Tensor
    affine: Affine


@dataclass(frozen=True)
class _BackwardPass(_Pass):
    """A pass over x and grad, dy, which lies as x does; mask: see `Normalise`."""

    grad: Tensor
    mask: Optional[Tensor]
    affine: Affine
    relu: bool

    def arguments(self) -> dict[str, Any]:
        bits = self.x if self.mask is None else self.mask
        return {"dY": self.grad, "X": self.x, "Bits": bits} | self.affine.arguments()

    def constants(self) -> dict[str, bool]:
        return {**self.affine.constants(), "RELU": self.relu, "PACKED": self.mask is not None}


@dataclass(frozen=True)
class BackwardSums(_BackwardPass):
    """Sums of g and g u s over this process; `other` is a gradient of y beside `grad`, or None.

    Outputs: sums, 2 x C in float64, the gradients of weight and bias, and for frozen statistics dx
    and, where needed, that of the residual, g; empty where there is none. Of two gradients g is
    always written. For a residual that is normalised the sums are 3 x C, with its g u s, and the
    last output is the gradient of its weight; that of its bias is the one of x.
    """

    frozen: bool
    need_residual: bool
    other: Optional[Tensor] = None
    residual: Optional[Residual] = None

    @property
    def write_residual(self) -> bool:
        return self.other is not None or (self.frozen and self.need_residual)

    def problem(self) -> Problem:
        name = "backward sums" if self.other is None else "backward sums of two"
        name += "" if self.residual is None else ", for two"
        written, packed = self.write_residual, self.mask is not None
        return self.asked(name, residual=written, packed=packed, frozen=self.frozen)

    def launches(self, machine: Machine, config: Config) -> tuple[list[Launch], tuple[Tensor, ...]]:
        x, affine, normalised = self.x, self.affine, self.residual is not None
        residual = self.residual or Residual(x, affine)
        walk = self.walk(machine, config)
        rows, channels = 3 if normalised else 2, x.shape[1]
        sums_of_runs = x.new_empty((walk.splits, rows, channels), dtype=torch.float32)
        sums = x.new_empty((rows, channels), dtype=torch.float64)
        grad_x = torch.empty_like(x) if self.frozen else x.new_empty(0)
        grad_residual = torch.empty_like(x) if self.write_residual else x.new_empty(0)
        other = self.grad if self.other is None else self.other
        weights = affine.weight, affine.bias, residual.affine.weight if normalised else None
        grad_weight, grad_bias, grad_of_residual = (
            x.new_empty(0) if t is None else torch.empty_like(t) for t in weights
        )
        first = walk.launch(
            kernels.backward_sums_kernel,
            self.arguments()
            | {"Other": other, "P": sums_of_runs, "dX": grad_x, "dR": grad_residual}
            | {"R": residual.x, **residual.affine.of_residual("Mean")},
            **self.constants(),
            FROZEN=self.frozen,
            RESIDUAL=self.write_residual,
            TWO=self.other is not None,
            NORM=normalised,
        )
        last = _finish(
            finish.finish_backward_kernel,
            channels,
            walk.splits,
            {
                "P": sums_of_runs,
                "Var": affine.var,
                "RVar": residual.affine.var,
                "eps": affine.eps,
                "Sums": sums,
                "dWeight": grad_weight,
                "dRWeight": grad_of_residual,
                "dBias": grad_bias,
            },
            **affine.constants(),
            NORM=normalised,
        )
        made = sums, grad_weight, grad_bias, grad_x, grad_residual, grad_of_residual
        return [first, last], made


@dataclass(frozen=True)
class BackwardInput(_BackwardPass):
    """dx from the sums over all processes; the residual's gradient where needed, else empty.

    The latter is g, or for a residual that is normalised as dx is for x.
    """

    sums: Tensor
    count: Tensor
    need_residual: bool
    residual: Optional[Residual] = None

    def problem(self) -> Problem:
        packed = self.mask is not None
        name = "backward input" if self.residual is None else "backward input of two"
        return self.asked(name, residual=self.need_residual, packed=packed)

    def launches(
        self, machine: Machine, config: Config
    ) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
        x, residual = self.x, self.residual or Residual(self.x, self.affine)
        grad_x = torch.empty_like(x)
        grad_residual = torch.empty_like(x) if self.need_residual else x.new_empty(0)
        launch = self.walk(machine, config).launch(
            kernels.backward_input_kernel,
            self.arguments()
            | {"Sums": self.sums, "Count": self.count, "dX": grad_x, "dR": grad_residual}
            | {"R": residual.x, **residual.affine.of_residual("Mean", "Var", "Weight")},
            **self.constants(),
            RESIDUAL=self.need_residual,
            NORM=self.residual is not None,
        )
        return [launch], (grad_x, grad_residual)
