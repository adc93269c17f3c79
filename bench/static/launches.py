"""The operators' launches for the reports: listed, not run.

Each operator has a function that makes what its plan calls a pass (`launch.Pass`), for the shapes
and options of the reports; the rest is the same for all. Tensors are on the meta device or, for the
interpreter, uninitialised memory, except for counters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from bench.static.resources import LIMITS

if TYPE_CHECKING:
    from encnet_triton.kernels.runtime import launch
    from encnet_triton.kernels.runtime.launch import Config, Launch, Machine

    Pass = launch.Pass[Any]

DIRECTIONS = ("forward", "backward")


def _plan(package: str) -> Any:
    # Not at the top: it imports triton, which not every system has.
    return importlib.import_module(f"encnet_triton.kernels.{package}.plan")


def _machine(arch: int) -> Machine:
    from encnet_triton.kernels.runtime.launch import Machine

    return Machine(arch, LIMITS[arch].processors)


def configs_of(one: Pass, machine: Machine, candidates: bool = False) -> list[Config]:
    """What the launcher may choose from, the default first, and what else is worth measuring."""
    more = one.candidates(machine) if candidates else ()
    return list(dict.fromkeys([*one.configs(machine), *more]))


def launches_of(
    passes: Sequence[Pass], machine: Machine, config: int = 0, candidates: bool = False
) -> list[Launch]:
    """What these passes launch; `config` is an index into the list of each, at most its last."""
    made: list[Launch] = []
    for one in passes:
        choices = configs_of(one, machine, candidates)
        made += one.launches(machine, choices[min(config, len(choices) - 1)])[0]
    return made


@dataclass(frozen=True)
class EncodeShape:
    """Channels, codewords, pixels and images of `encode`; x is channels last."""

    C: int
    K: int
    N: int = 3600
    B: int = 16

    def __str__(self) -> str:
        return f"C{self.C} K{self.K} N{self.N}"

    def empty(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, codewords, scale and the gradient of E."""
        x = torch.empty(self.B, self.N, self.C, dtype=dtype, device=device)
        sizes = ((self.K, self.C), (self.K,), (self.B, self.K, self.C))
        codewords, scale, grad = (torch.empty(size, device=device) for size in sizes)
        return x.transpose(1, 2), codewords, scale, grad


# Segmentation networks, and the three stages of the CIFAR-10 networks.
CIFAR_ENCODE_SHAPES = (
    EncodeShape(16, 16, 1024, 128),
    EncodeShape(32, 16, 256, 128),
    EncodeShape(64, 16, 64, 128),
)
ENCODE_SHAPES = (
    EncodeShape(512, 32),
    EncodeShape(1024, 32),
    EncodeShape(512, 64),
    EncodeShape(1024, 64),
    *CIFAR_ENCODE_SHAPES,
)
# Large, small and awkward ones; the CIFAR-10 network of twice the width.
MORE_ENCODE_SHAPES = (
    EncodeShape(2048, 256),
    EncodeShape(16, 32),
    EncodeShape(64, 16),
    EncodeShape(100, 7),
    EncodeShape(16, 64),
    EncodeShape(20, 9, 100),
    EncodeShape(24, 17, 256),
    EncodeShape(32, 32, 1024, 128),
    EncodeShape(64, 32, 256, 128),
    EncodeShape(128, 32, 64, 128),
)


def encode_passes(
    shape: EncodeShape,
    dtype: torch.dtype,
    direction: str,
    device: str = "meta",
    statistics: tuple[bool, ...] = (False, True),
) -> list[Pass]:
    """Forward a pass without and one with the statistics of E; none where there are no kernels."""
    plan = _plan("encoding")
    x, codewords, scale, grad = shape.empty(dtype, device)
    if not plan.supports(x, codewords):
        return []
    if direction == "forward":
        return [plan.Forward(x, codewords, scale, asked) for asked in statistics]
    counters = x.new_zeros(shape.B + 1, dtype=torch.int32)
    return [plan.Backward(grad, x, codewords, scale, scale, True, counters)]


def encode_launches(
    shape: EncodeShape,
    dtype: torch.dtype,
    direction: str,
    arch: int,
    *,
    return_stats: bool = False,
    device: str = "meta",
) -> list[Launch]:
    """What one call launches."""
    passes = encode_passes(shape, dtype, direction, device, (return_stats,))
    return launches_of(passes, _machine(arch))


@dataclass(frozen=True)
class Variant:
    """What a layer does besides normalising.

    `frozen`: it uses the running statistics, and has gradients. `forked`: its result has two uses,
    hence two gradients. `projected`: the residual is normalised.
    """

    relu: bool = True
    residual: bool = False
    frozen: bool = False
    synchronised: bool = False
    forked: bool = False
    projected: bool = False

    def __str__(self) -> str:
        parts = ["frozen"] if self.frozen else []
        parts += ["synchronised"] if self.synchronised else []
        kind = "normalised residual" if self.projected else "residual"
        parts += [kind] if self.residual else []
        parts += ["relu"] if self.relu else []
        parts += ["forked"] if self.forked else []
        return " + ".join(parts) or "linear"


VARIANTS = (
    Variant(),
    Variant(residual=True),
    Variant(relu=False),
    Variant(frozen=True),
    Variant(frozen=True, residual=True),
    Variant(synchronised=True),
    Variant(residual=True, forked=True),
    Variant(residual=True, projected=True),
    Variant(residual=True, projected=True, forked=True),
)


@dataclass(frozen=True)
class BatchNormShape:
    """x of a batch norm, with N pixels, in one of the two layouts that the kernels read."""

    B: int
    C: int
    N: int
    channels_last: bool = True

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "contiguous"
        return f"B{self.B} C{self.C} N{self.N} {layout}"

    def empty(self, dtype: torch.dtype, device: str) -> Tensor:
        if self.channels_last:
            return torch.empty(self.B, self.N, self.C, dtype=dtype, device=device).transpose(1, 2)
        return torch.empty(self.B, self.C, self.N, dtype=dtype, device=device)


# A stage of ResNet-50 in both layouts, the codewords' B x K x C, and a stage of a CIFAR-10 network,
# where a program has a single tile.
BATCH_NORM_SHAPES = (
    BatchNormShape(16, 256, 14400),
    BatchNormShape(16, 256, 14400, channels_last=False),
    BatchNormShape(16, 32, 512, channels_last=False),
    BatchNormShape(128, 32, 256),
)
# Where sizes are not a multiple of the tiles or of 16 bytes.
MORE_BATCH_NORM_SHAPES = (
    BatchNormShape(16, 100, 900),
    BatchNormShape(16, 2048, 3481, channels_last=False),
)


def batch_norm_passes(x: Tensor, variant: Variant, direction: str) -> list[Pass]:
    """The passes of one layer over x, B x C x N; parameters in float32."""
    plan = _plan("batch_norm")
    mean, var, weight, bias = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(4))
    affine = plan.Affine(mean, var, weight, bias, 1e-5)
    relu, packed, frozen = variant.relu, variant.relu and variant.residual, variant.frozen
    made: list[Pass] = []
    if direction == "forward":
        running = plan.Running(mean, var, 0.1)
        if not frozen:
            statistics = plan.Statistics(x, None if variant.synchronised else running)
            made += [statistics] * (2 if variant.projected else 1)
        if variant.synchronised:
            sums = x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)
            made.append(plan.Moments(sums, running))
        residual = torch.empty_like(x) if variant.residual else None
        pack = packed and not frozen
        of_residual = affine if variant.projected else None
        return [*made, plan.Normalise(x, affine, residual, relu, pack, frozen, of_residual)]
    mask = x.new_empty(plan.mask_shape(x), dtype=torch.uint8) if packed else None
    given = (x, torch.empty_like(x), mask, affine, relu)
    other = torch.empty_like(x) if variant.forked else None
    residual = plan.Residual(torch.empty_like(x), affine) if variant.projected else None
    made.append(plan.BackwardSums(*given, frozen, packed, other, residual))
    if other is not None:  # that pass has written g
        given, packed = (x, torch.empty_like(x), None, affine, False), variant.projected
    if not frozen:
        sums = x.new_empty((3 if variant.projected else 2, x.shape[1]), dtype=torch.float64)
        count = x.new_empty(1, dtype=torch.float64)
        made.append(plan.BackwardInput(*given, sums, count, packed, residual))
    return made


def batch_norm_launches(x: Tensor, variant: Variant, direction: str, arch: int) -> list[Launch]:
    """What one layer launches."""
    return launches_of(batch_norm_passes(x, variant, direction), _machine(arch))


def _variants(size: BatchNormShape, dtype: torch.dtype, direction: str) -> list[Pass]:
    """The passes of every variant, which share most of their kernels."""
    x = size.empty(dtype, "meta")
    return [one for variant in VARIANTS for one in batch_norm_passes(x, variant, direction)]


@dataclass(frozen=True)
class UpsampleShape:
    """Logits B x C x h x w, channels last, and the size H x W they are upsampled to."""

    B: int
    C: int
    h: int
    w: int
    H: int
    W: int

    def __str__(self) -> str:
        return f"C{self.C} {self.h}x{self.w} to {self.H}x{self.W}"

    def logits(self, dtype: torch.dtype, device: str) -> Tensor:
        made = torch.empty(self.B, self.h, self.w, self.C, dtype=dtype, device=device)
        return made.permute(0, 3, 1, 2)


# ADE20K: a training crop.
UPSAMPLE_SHAPES = (UpsampleShape(16, 150, 60, 60, 480, 480),)
# An odd number of classes, few, many; PASCAL VOC and Cityscapes; ratios that are not integers.
MORE_UPSAMPLE_SHAPES = (
    UpsampleShape(16, 59, 65, 65, 512, 520),
    UpsampleShape(4, 21, 33, 33, 500, 375),
    UpsampleShape(4, 2, 64, 64, 100, 100),
    UpsampleShape(1, 1000, 97, 193, 776, 1544),
)


@dataclass(frozen=True)
class UpsampleOptions:
    """What changes the kernels of the cross-entropy besides the shape."""

    weighted: bool = False
    smoothing: float = 0.0
    reduction: str = "mean"
    align_corners: bool = True
    label: torch.dtype = torch.uint8


UPSAMPLE_OPTIONS = (
    UpsampleOptions(),
    UpsampleOptions(align_corners=False, label=torch.int64),
    UpsampleOptions(weighted=True),
    UpsampleOptions(weighted=True, smoothing=0.1, reduction="none"),
)


def upsample_pass(
    logits: Tensor, size: tuple[int, int], options: UpsampleOptions, direction: str
) -> Pass:
    """The pass of one cross-entropy."""
    plan = _plan("upsampling")
    target = logits.new_empty((len(logits), *size), dtype=options.label)
    weight = logits.new_empty(logits.shape[1], dtype=torch.float32) if options.weighted else None
    prepared = plan.options(weight, 255, options.align_corners, options.smoothing)
    a_map = options.reduction == "none"
    made: Pass
    if direction == "forward":
        made = plan.Forward(logits, target, prepared, True, a_map, not a_map)
    else:
        lse = target.new_empty(target.shape, dtype=torch.float32)
        grad = lse.clone() if a_map else lse.new_empty(())
        rates = None if a_map else lse.new_empty((), dtype=torch.float64)
        made = plan.Backward(grad, logits, target, lse, prepared, rates)
    return made


def upsample_launches(
    logits: Tensor, size: tuple[int, int], options: UpsampleOptions, direction: str, arch: int
) -> list[Launch]:
    """What one cross-entropy launches."""
    return launches_of([upsample_pass(logits, size, options, direction)], _machine(arch))


def _options(size: UpsampleShape, dtype: torch.dtype, direction: str) -> list[Pass]:
    """The cross-entropy with every set of options; forward, `upsample_argmax` as well."""
    logits, high = size.logits(dtype, "meta"), (size.H, size.W)
    made = [upsample_pass(logits, high, options, direction) for options in UPSAMPLE_OPTIONS]
    if direction == "forward":
        argmax = _plan("upsampling").ArgMax
        made += [argmax(logits, *high, False, with_prob) for with_prob in (False, True)]
    return made


# All passes of an operator for a size, a dtype and a direction.
_PASSES: dict[str, Callable[[Any, torch.dtype, str], list[Pass]]] = {
    "encode": encode_passes,
    "batch_norm_act": _variants,
    "upsample": _options,
}
# Operators of which only these sizes are compiled in every configuration.
_EVERY_CONFIG = {"batch_norm_act": BATCH_NORM_SHAPES, "upsample": UPSAMPLE_SHAPES}


class Size(Protocol):
    """A shape of an operator; hashable, and str() describes it."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Call:
    """One direction of an operator: all its passes at one size; `config` indexes `configs`."""

    op: str
    direction: str
    dtype: str
    arch: int
    size: Size
    config: int = 0
    candidates: bool = False

    @property
    def shape(self) -> str:
        return str(self.size)

    def passes(self) -> list[Pass]:
        return _PASSES[self.op](self.size, getattr(torch, self.dtype), self.direction)

    def configs(self) -> list[Config]:
        """Those of the first pass: see `configs_of`."""
        return configs_of(self.passes()[0], _machine(self.arch), self.candidates)

    def launches(self) -> list[Launch]:
        return launches_of(self.passes(), _machine(self.arch), self.config, self.candidates)


def calls(
    op: str, archs: list[int], dtypes: list[str], sizes: Sequence[Size], every_config: bool,
    candidates: bool = False,
) -> Iterator[Call]:  # fmt: skip
    """With only the default configuration or with every one; none where there are no kernels."""
    for direction in DIRECTIONS:
        for size in sizes:
            for dtype in dtypes:
                for arch in archs:
                    call = Call(op, direction, dtype, arch, size, candidates=candidates)
                    if not call.passes():
                        continue
                    every = every_config and size in _EVERY_CONFIG.get(op, sizes)
                    for config in range(len(call.configs()) if every else 1):
                        yield replace(call, config=config)


encode_calls = partial(calls, "encode")
batch_norm_calls = partial(calls, "batch_norm_act")
upsample_calls = partial(calls, "upsample")
