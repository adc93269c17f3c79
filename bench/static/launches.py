"""Calls of the operators as the reports make them: lists of launches that nothing runs.

Launches are made on meta tensors or, for the interpreter, on memory that is never written but for
counters.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.static.resources import LIMITS

if TYPE_CHECKING:
    from encnet_triton.kernels.runtime.launch import Config, Launch

DIRECTIONS = ("forward", "backward")


def _module(name: str) -> Any:
    # Not at the top: it imports triton, which not every system has.
    return importlib.import_module(f"encnet_triton.kernels.{name}")


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


def encode_launches(
    shape: EncodeShape,
    dtype: torch.dtype,
    direction: str,
    arch: int,
    config: Config | None = None,
    *,
    return_stats: bool = False,
    device: str = "meta",
) -> list[Launch]:
    """What one call launches."""
    operator = _module("encoding.plan")
    x, codewords, scale, grad = shape.empty(dtype, device)
    machine = {"arch": arch, "processors": LIMITS[arch].processors, "config": config}
    if direction == "forward":
        return list(operator.forward_launches(x, codewords, scale, return_stats, **machine)[0])
    counters = x.new_zeros(shape.B + 1, dtype=torch.int32)
    return list(
        operator.backward_launches(grad, x, codewords, scale, None, True, counters, **machine)[0]
    )


@dataclass(frozen=True)
class EncodeCall:
    """`encode`; `config` counts in `configs`."""

    direction: str
    dtype: str
    arch: int
    size: EncodeShape
    config: int = 0

    op = "encode"

    @property
    def shape(self) -> str:
        return str(self.size)

    def configs(self) -> list[Config]:
        """What the launcher may choose from, the default first."""
        choose = getattr(_module("encoding.plan"), f"{self.direction}_configs")
        size = self.size
        return list(choose(self.arch, getattr(torch, self.dtype), size.C, size.K, size.N))

    def launches(self) -> list[Launch]:
        """Forward, those with statistics come after those without."""
        return [
            launch
            for return_stats in ((False, True) if self.direction == "forward" else (False,))
            for launch in encode_launches(
                self.size,
                getattr(torch, self.dtype),
                self.direction,
                self.arch,
                self.configs()[self.config],
                return_stats=return_stats,
            )
        ]


def encode_calls(
    archs: list[int], dtypes: list[str], shapes: list[EncodeShape], every_config: bool
) -> Iterator[EncodeCall]:
    """With the default configuration alone or with every one."""
    supports = _module("encoding.plan").supports
    for direction in DIRECTIONS:
        for size in shapes:
            for dtype in dtypes:
                for arch in archs if supports(getattr(torch, dtype), size.C, size.K) else ():
                    call = EncodeCall(direction, dtype, arch, size)
                    for config in range(len(call.configs()) if every_config else 1):
                        yield EncodeCall(direction, dtype, arch, size, config)


@dataclass(frozen=True)
class Variant:
    """What a layer does beside normalising; `frozen` is evaluation, with gradients backward."""

    relu: bool = True
    residual: bool = False
    frozen: bool = False
    synchronised: bool = False

    def __str__(self) -> str:
        parts = ["frozen"] if self.frozen else []
        parts += ["synchronised"] if self.synchronised else []
        parts += ["residual"] if self.residual else []
        parts += ["relu"] if self.relu else []
        return " + ".join(parts) or "linear"


VARIANTS = (
    Variant(),
    Variant(residual=True),
    Variant(relu=False),
    Variant(frozen=True),
    Variant(frozen=True, residual=True),
    Variant(synchronised=True),
)


@dataclass(frozen=True)
class BatchNormShape:
    """x of a batch norm; N pixels, in one of the two layouts that the kernels read."""

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
# Where sizes are no multiple of the tiles or of 16 bytes.
MORE_BATCH_NORM_SHAPES = (
    BatchNormShape(16, 100, 900),
    BatchNormShape(16, 2048, 3481, channels_last=False),
)


@dataclass(frozen=True)
class BatchNormCall:
    """`batch_norm_act`: the launches of every variant, which share most of their kernels."""

    direction: str
    dtype: str
    arch: int
    size: BatchNormShape
    config: int = 0

    op = "batch_norm_act"

    @property
    def shape(self) -> str:
        return str(self.size)

    def _x(self) -> Tensor:
        return self.size.empty(getattr(torch, self.dtype), "meta")

    def configs(self) -> list[Config]:
        return list(_module("batch_norm.plan").configs(self._x()))

    def launches(self) -> list[Launch]:
        processors, config = LIMITS[self.arch].processors, self.configs()[self.config]
        return [
            launch
            for variant in VARIANTS
            for launch in batch_norm_launches(
                self._x(), variant, self.direction, processors, config
            )
        ]


def batch_norm_launches(
    x: Tensor, variant: Variant, direction: str, processors: int, config: Config | None = None
) -> list[Launch]:
    """What one layer launches on x, B x C x N, parameters in float32."""
    operator = _module("batch_norm.plan")
    machine = (processors, config or operator.configs(x)[0])
    mean, var, weight, bias = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(4))
    affine = operator.Affine(mean, var, weight, bias, 1e-5)
    relu, packed = variant.relu, variant.relu and variant.residual
    made: list[Launch] = []
    if direction == "forward":
        if not variant.frozen:
            running = operator.Running(mean, var, 0.1)
            alone = None if variant.synchronised else running
            launches, outputs = operator.statistics_launches(x, alone, *machine)
            made += launches
            if variant.synchronised:
                made += operator.moments_launches(outputs[0], running)[0]
        residual = torch.empty_like(x) if variant.residual else None
        made += operator.normalise_launches(
            x, affine, residual, relu, packed and not variant.frozen, variant.frozen, *machine
        )[0]
        return made
    grad = torch.empty_like(x)
    mask = x.new_empty(operator.mask_bytes(x), dtype=torch.uint8) if packed else None
    launches, outputs = operator.sums_launches(
        grad, x, mask, affine, relu, variant.frozen, packed, *machine
    )
    made += launches
    if not variant.frozen:
        count = x.new_empty(1, dtype=torch.float64)
        made += operator.input_launches(
            grad, x, mask, affine, outputs[0], count, relu, packed, *machine
        )[0]
    return made


def batch_norm_calls(
    archs: list[int], dtypes: list[str], shapes: list[BatchNormShape], every_config: bool
) -> Iterator[BatchNormCall]:
    """With the default configuration alone; of the main shapes, if asked, with every one."""
    for direction in DIRECTIONS:
        for size in shapes:
            for dtype in dtypes:
                for arch in archs:
                    call = BatchNormCall(direction, dtype, arch, size)
                    every = every_config and size in BATCH_NORM_SHAPES
                    for config in range(len(call.configs()) if every else 1):
                        yield BatchNormCall(direction, dtype, arch, size, config)


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
# An odd number of classes, few, many; PASCAL VOC and Cityscapes; ratios that are no integers.
MORE_UPSAMPLE_SHAPES = (
    UpsampleShape(16, 59, 65, 65, 512, 520),
    UpsampleShape(4, 21, 33, 33, 500, 375),
    UpsampleShape(4, 2, 64, 64, 100, 100),
    UpsampleShape(1, 1000, 97, 193, 776, 1544),
)


@dataclass(frozen=True)
class UpsampleOptions:
    """What changes the kernels of the cross-entropy beside the shape."""

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


@dataclass(frozen=True)
class UpsampleCall:
    """`upsample_cross_entropy` with every set of options; forward, `upsample_argmax` as well."""

    direction: str
    dtype: str
    arch: int
    size: UpsampleShape
    config: int = 0

    op = "upsample"

    @property
    def shape(self) -> str:
        return str(self.size)

    def _logits(self) -> Tensor:
        return self.size.logits(getattr(torch, self.dtype), "meta")

    def configs(self) -> list[Config]:
        operator, logits = _module("upsampling.plan"), self._logits()
        if self.direction == "forward":
            return list(operator.forward_configs(logits, self.arch))
        return list(operator.backward_configs(logits, self.size.W, True))

    def launches(self) -> list[Launch]:
        made = [
            launch
            for options in UPSAMPLE_OPTIONS
            for launch in upsample_launches(
                self._logits(),
                (self.size.H, self.size.W),
                options,
                self.direction,
                self.arch,
                self.config,
            )
        ]
        if self.direction == "backward":
            return made
        operator = _module("upsampling.plan")
        choices = operator.argmax_configs(self._logits(), self.arch)
        config = choices[min(self.config, len(choices) - 1)]
        for with_prob in (False, True):
            size = (self.size.H, self.size.W)
            made += operator.argmax_launches(self._logits(), *size, False, with_prob, config)[0]
        return made


def upsample_launches(
    logits: Tensor,
    size: tuple[int, int],
    options: UpsampleOptions,
    direction: str,
    arch: int,
    config: int = 0,
) -> list[Launch]:
    """What one cross-entropy launches; `config` counts in the operator's list."""
    operator = _module("upsampling.plan")
    target = logits.new_empty((len(logits), *size), dtype=options.label)
    weight = logits.new_empty(logits.shape[1], dtype=torch.float32) if options.weighted else None
    prepared = operator.Options(weight, 255, options.align_corners, options.smoothing)
    a_map = options.reduction == "none"
    if direction == "forward":
        choices = operator.forward_configs(logits, arch, options.smoothing)
        chosen = choices[min(config, len(choices) - 1)]
        return list(operator.forward_launches(logits, target, prepared, True, a_map, chosen)[0])
    lse = target.new_empty(target.shape, dtype=torch.float32)
    grad = lse.clone() if a_map else lse.new_empty((), dtype=torch.float64)
    choices = operator.backward_configs(logits, size[1], options.align_corners, options.smoothing)
    chosen = choices[min(config, len(choices) - 1)]
    return list(
        operator.backward_launches(
            grad, logits, target, lse, prepared, LIMITS[arch].processors, chosen
        )[0]
    )


def upsample_calls(
    archs: list[int], dtypes: list[str], shapes: list[UpsampleShape], every_config: bool
) -> Iterator[UpsampleCall]:
    """With the default configuration alone; of the main shapes, if asked, with every one."""
    for direction in DIRECTIONS:
        for size in shapes:
            for dtype in dtypes:
                for arch in archs:
                    call = UpsampleCall(direction, dtype, arch, size)
                    every = every_config and size in UPSAMPLE_SHAPES
                    for config in range(len(call.configs()) if every else 1):
                        yield UpsampleCall(direction, dtype, arch, size, config)


Call = EncodeCall | BatchNormCall | UpsampleCall
