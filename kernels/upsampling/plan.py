"""Which kernels the upsampling operators launch on a GPU.

They are in forward.py, backward.py and cells.py. Logits are B x C x h x w, targets B x H x W.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor

from ..runtime.launch import Config, Launch, Machine, cdiv, varied
from ..runtime.tuned import Problem, problem_of
from . import backward as backward_kernels
from . import cells as cells_kernels
from . import forward as forward_kernels
from .axis import LOW_COLUMNS, Axis, places_of_cell, rows_of_part, rows_of_segment, strip_of
from .pytorch import label_dtype

# Forward: columns of a program, and classes of a chunk that one thread owns.
_COLUMNS, _OWN_CLASSES = 32, 8
# Backward: classes of a program, and a limit for its registers.
_CLASSES, _REGISTERS = 16, 128
_MOST_REGISTERS = 255
# Programs a multiprocessor that the backward pass is split into, and the fewest rows of a part.
_PROGRAMS, _LEAST_ROWS = 8, 8
# Backward by cells: those of a program, and the most output rows or columns of a cell.
_CELLS, _MOST_PLACES = 16, 10
# Parts of 32 classes that a program may have; for sm_90, instructions of a cell beside its parts
# and of each part, and how many the other kernel takes for the same pixels and one class.
_PARTS, _OF_CELL, _OF_PART, _OF_CLASS = (3, 4, 5), 775, 245, 22.6
# Capability and corners for which a program of five parts needs local memory.
_FIVE_SPILL = ((80, True), (90, False))
_MOST_NUMBER = 2**31


@dataclass(frozen=True)
class Options:
    """The options of the cross-entropy operators."""

    weight: Optional[Tensor]
    ignore_index: int
    align_corners: bool
    smoothing: float

    def arguments(self, logits: Tensor) -> dict[str, Any]:
        weight = logits if self.weight is None else self.weight
        needs_mean = self.weight is not None and self.smoothing > 0
        return {
            "Weight": weight,
            # Its mean over the classes; on the device, so that nothing waits for it.
            "Mean": weight.mean(dtype=torch.float32) if needs_mean else weight,
            "smoothing": self.smoothing,
        }

    def kinds(self) -> dict[str, bool]:
        """What other programs are compiled for, and other configurations measured."""
        return {
            "align_corners": self.align_corners,
            "weighted": self.weight is not None,
            "smooth": self.smoothing > 0,
        }

    def constants(self) -> dict[str, bool]:
        return {"WEIGHT": self.weight is not None, "SMOOTH": self.smoothing > 0}


def options(
    weight: Optional[Tensor], ignore_index: int, align_corners: bool, smoothing: float
) -> Options:
    """Options with a weight that the kernels can read."""
    weight = None if weight is None else weight.detach().contiguous()
    return Options(weight, ignore_index, align_corners, smoothing)


def supports(logits: Tensor, height: int, width: int, align_corners: Optional[bool] = None) -> bool:
    """Whether the kernels take this size: positions within an image are 32-bit numbers.

    With `align_corners` those of the backward pass as well: a low column must not touch too many
    output columns.
    """
    _, classes, low_height, low_width = logits.shape
    numbers = (classes * low_height * low_width, 4 * height * low_height, 4 * width * low_width)
    if max(*numbers, height * width) >= _MOST_NUMBER:
        return False
    return align_corners is None or strip_of(Axis(low_width, width, align_corners)) is not None


def _together(classes: int, element_size: int) -> int:
    """Classes side by side that one load may read: up to 16 bytes, aligned at every pixel."""
    return min(classes & -classes, 16 // element_size)


def _lanes(classes: int) -> int:
    """Threads that share a pixel in the forward pass."""
    return 2 if classes > 8 else 1


def forward_configs() -> list[Config]:
    """Columns and classes of a program, the preferred one first, the conservative one last."""
    free = Config(_COLUMNS, _OWN_CLASSES, _COLUMNS // 32)
    return [free, replace(free, block_c=_OWN_CLASSES // 2)]


def argmax_configs(logits: Tensor, arch: int) -> list[Config]:
    """As `forward_configs`."""
    lanes = _lanes(logits.shape[1])
    columns = 2 * _COLUMNS if logits.dtype == torch.float32 or arch >= 120 else _COLUMNS
    free = Config(columns, lanes * _OWN_CLASSES, lanes * columns // 32)
    return [free, replace(free, block_c=lanes * _OWN_CLASSES // 2)]


def backward_configs(
    logits: Tensor, width: int, align_corners: bool, smoothing: float = 0.0
) -> list[Config]:
    """As `forward_configs`."""
    found = strip_of(Axis(logits.shape[3], width, align_corners))
    assert found is not None, "supports was not asked"
    free = Config(found[1], _CLASSES, found[1] // 32)
    # Left alone, the compiler takes so many registers that only 8 warps are resident. Programs of
    # one warp serve small maps, and smoothing needs the registers.
    if smoothing or free.num_warps == 1:
        return [free]
    return [replace(free, max_registers=_REGISTERS), free]


def cells_configs(
    logits: Tensor, height: int, width: int, align_corners: bool, arch: int
) -> list[Config]:
    """Configurations of the backward pass by cells that compute less than the other kernel, the
    cheapest first; none where it does not take the size."""
    classes, *low = logits.shape[1:]
    axes = [Axis(a, b, align_corners) for a, b in zip(low, (height, width))]
    most = max(places_of_cell(axis)[0] for axis in axes)
    smaller = any(axis.low > axis.high for axis in axes)
    if most > _MOST_PLACES or smaller:
        return []

    def instructions(parts: int) -> int:
        return cdiv(classes, 32 * parts) * (_OF_CELL + parts * _OF_PART)

    spills = (arch, align_corners) in _FIVE_SPILL
    return [
        Config(_CELLS, 32 * parts, _CELLS, "cells", max_registers=_REGISTERS)
        for parts in sorted(_PARTS, key=instructions)
        if instructions(parts) < _OF_CLASS * classes and not (parts == 5 and spills)
    ]


def _candidates(configs: list[Config]) -> list[Config]:
    """These configurations and some that are a step away from the first one, to be measured."""
    first = configs[0]
    others = varied(
        first,
        block_c=(2 * first.block_c,),
        num_warps=(max(1, first.num_warps // 2), 2 * first.num_warps),
        max_registers=(None, _REGISTERS, _MOST_REGISTERS),
    )
    return list(dict.fromkeys(configs + others))


def _candidates_of_columns(configs: list[Config]) -> list[Config]:
    """As `_candidates`, with half and twice the columns of a program as well."""
    first = configs[0]
    half = replace(first, block_n=first.block_n // 2, num_warps=max(1, first.num_warps // 2))
    twice = replace(first, block_n=2 * first.block_n, num_warps=2 * first.num_warps)
    return list(dict.fromkeys([*_candidates(configs), half, twice]))


def _asked(name: str, logits: Tensor, height: int, width: int, **options: bool) -> Problem:
    images, classes, h, w = logits.shape
    sizes = dict(B=images, C=classes, h=h, w=w, H=height, W=width)
    return problem_of(f"upsample {name}", logits.dtype, options, **sizes)


@dataclass(frozen=True)
class _Shared:
    """Sizes that the launches of both directions share; logits are channels last."""

    logits: Tensor
    height: int
    width: int
    align_corners: bool

    @property
    def axes(self) -> tuple[Axis, Axis]:
        low = self.logits.shape[2:]
        high = (self.height, self.width)
        rows, columns = (Axis(a, b, self.align_corners) for a, b in zip(low, high))
        return rows, columns

    def arguments(self) -> dict[str, Any]:
        _, _, h, w = self.logits.shape
        return {"Logits": self.logits, "h": h, "w": w, "H": self.height, "W": self.width}

    def constants(self, own_classes: int) -> dict[str, Any]:
        """`own_classes`: of one thread."""
        classes = self.logits.shape[1]
        together = min(_together(classes, self.logits.element_size()), own_classes)
        return {
            "C": classes,
            "ALIGN": self.align_corners,
            "VEC": together,
            "G": own_classes // together,
        }

    def new_map(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.logits.new_empty((len(self.logits), self.height, self.width), dtype=dtype)


@dataclass(frozen=True)
class Forward:
    """The forward pass of the cross-entropy over logits, channels last, and target, contiguous.

    Outputs are the sum of the losses, or their mean, float32; the sum of the label weights,
    float64; lse and loss of each pixel, or empty tensors.
    """

    logits: Tensor
    target: Tensor
    options: Options
    keep_lse: bool
    keep_losses: bool
    mean: bool = False

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def problem(self) -> Problem:
        height, width = self.target.shape[1:]
        return _asked("forward", self.logits, height, width, **self.options.kinds())

    def configs(self, machine: Machine) -> list[Config]:
        return forward_configs()

    def candidates(self, machine: Machine) -> list[Config]:
        return _candidates_of_columns(self.configs(machine))

    def launches(
        self, machine: Machine, config: Config
    ) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
        logits, options = self.logits, self.options
        _, height, width = self.target.shape
        shared = _Shared(logits, height, width, options.align_corners)
        rows = shared.axes[0]
        own_rows, parts = rows_of_part(rows)
        strips = cdiv(shared.width, config.block_n)
        programs = len(logits) * len(rows.gaps) * parts * strips
        lse, losses = (
            shared.new_map() if keep else logits.new_empty(0, dtype=torch.float32)
            for keep in (self.keep_lse, self.keep_losses)
        )
        sums = logits.new_empty((3, programs), dtype=torch.float32)
        total = logits.new_empty((), dtype=torch.float32)
        rates = logits.new_empty((), dtype=torch.float64)
        main = Launch(
            forward_kernels.forward_kernel,
            (programs,),
            {"Target": self.target, "Lse": lse, "Loss": losses, "P": sums}
            | {"parts": parts, "strips": strips, "ignore": options.ignore_index}
            | shared.arguments()
            | options.arguments(logits),
            {"R": own_rows, "BX": config.block_n}
            | {"LSE": self.keep_lse, "MAP": self.keep_losses}
            | shared.constants(config.block_c)
            | options.constants(),
            num_warps=config.num_warps,
            max_registers=config.max_registers,
        )
        finish = Launch(
            forward_kernels.finish_kernel,
            (1,),
            {"P": sums, "Total": total, "Rates": rates, "programs": programs},
            {"BN": 1024, "MEAN": self.mean},
            num_warps=4,
        )
        return [main, finish], (total, rates, lse, losses)


@dataclass(frozen=True)
class Backward:
    """The backward pass of the cross-entropy; its output is the gradient of logits.

    grad is a scalar, that of the sum of the losses, or of their mean where rates are given, or a
    map, that of each pixel's loss; the rest is as in the forward pass.
    """

    grad: Tensor
    logits: Tensor
    target: Tensor
    lse: Tensor
    options: Options
    rates: Optional[Tensor] = None

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def problem(self) -> Problem:
        height, width = self.target.shape[1:]
        kinds = self.options.kinds() | {"map": self.grad.dim() > 0}
        return _asked("backward", self.logits, height, width, **kinds)

    def configs(self, machine: Machine) -> list[Config]:
        return self._by_cells(machine) + self._by_columns()

    def candidates(self, machine: Machine) -> list[Config]:
        return self._by_cells(machine) + _candidates(self._by_columns())

    def _by_cells(self, machine: Machine) -> list[Config]:
        options = self.options
        plain = options.weight is None and not options.smoothing and not self.grad.dim()
        if not plain or self.logits.element_size() != 2:
            return []
        height, width = self.target.shape[1:]
        return cells_configs(self.logits, height, width, options.align_corners, machine.arch)

    def _by_columns(self) -> list[Config]:
        options = self.options
        width = self.target.shape[2]
        return backward_configs(self.logits, width, options.align_corners, options.smoothing)

    def launches(self, machine: Machine, config: Config) -> tuple[list[Launch], Tensor]:
        return (self._launch_cells if config.form == "cells" else self._launch_columns)(
            machine, config
        )

    def _tensors(self, result: Tensor) -> dict[str, Tensor]:
        return {
            "Target": self.target,
            "Lse": self.lse,
            "Grad": self.grad,
            "Rates": self.grad if self.rates is None else self.rates,
            "dLogits": result,
        }

    def _launch_cells(self, machine: Machine, config: Config) -> tuple[list[Launch], Tensor]:
        logits = self.logits
        images, classes, h, w = logits.shape
        _, height, width = self.target.shape
        shared = _Shared(logits, height, width, self.options.align_corners)
        (most, mostly), (columns, _) = map(places_of_cell, shared.axes)
        strips, chunks = cdiv(w, config.block_n - 1), cdiv(classes, config.block_c)
        side_by_side = images * strips * chunks
        own_rows = rows_of_segment(h, side_by_side, machine.processors)
        segments = cdiv(h, own_rows)
        programs = side_by_side * segments
        result = torch.empty_like(logits)
        moved = self.lse.new_empty(2 * programs * config.block_n * config.block_c)
        launch = Launch(
            cells_kernels.cells_kernel,
            (programs,),
            self._tensors(result)
            | {"Moved": moved}
            | {"own_rows": own_rows, "segments": segments, "strips": strips}
            | shared.arguments(),
            {
                "C": classes,
                "ALIGN": self.options.align_corners,
                "CELLS": config.block_n,
                "PARTS": config.block_c // 32,
                "R": most,
                "MOSTLY": mostly,
                "Q": columns,
                "MEAN": self.rates is not None,
            },
            num_warps=config.num_warps,
            max_registers=config.max_registers,
        )
        return [launch], result

    def _launch_columns(self, machine: Machine, config: Config) -> tuple[list[Launch], Tensor]:
        logits, options = self.logits, self.options
        _, height, width = self.target.shape
        shared = _Shared(logits, height, width, options.align_corners)
        images, classes, h, w = logits.shape
        found = strip_of(shared.axes[1])
        assert found is not None
        strips, chunks = cdiv(w, found[0]), cdiv(classes, config.block_c)
        wanted = cdiv(_PROGRAMS * machine.processors, max(1, images * strips * chunks))
        own_rows = cdiv(h, max(1, min(wanted, h // _LEAST_ROWS)))
        segments = cdiv(h, own_rows)
        result = torch.empty_like(logits)
        sizes = {
            "own_rows": own_rows,
            "own_columns": found[0],
            "segments": segments,
            "strips": strips,
        }
        # Three TF32 products, which would be exact enough for float32, need too many registers.
        precision = {torch.bfloat16: "bf16", torch.float16: "tf32"}.get(logits.dtype, "ieee")
        constants = {"BX": config.block_n, "BM": LOW_COLUMNS}
        constants |= {"MAP": self.grad.dim() > 0, "MEAN": self.rates is not None}
        launch = Launch(
            backward_kernels.backward_kernel,
            (images * segments * strips * chunks,),
            self._tensors(result) | sizes | shared.arguments() | options.arguments(logits),
            constants
            | {"PRECISION": precision}
            | shared.constants(config.block_c)
            | options.constants(),
            num_warps=config.num_warps,
            max_registers=config.max_registers,
        )
        return [launch], result


@dataclass(frozen=True)
class ArgMax:
    """`upsample_argmax`: the labels, and their probabilities or an empty tensor."""

    logits: Tensor
    height: int
    width: int
    align_corners: bool
    with_prob: bool

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def problem(self) -> Problem:
        given = self.logits, self.height, self.width
        return _asked("argmax", *given, align_corners=self.align_corners, prob=self.with_prob)

    def configs(self, machine: Machine) -> list[Config]:
        return argmax_configs(self.logits, machine.arch)

    def candidates(self, machine: Machine) -> list[Config]:
        return _candidates_of_columns(self.configs(machine))

    def launches(
        self, machine: Machine, config: Config
    ) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
        logits = self.logits
        shared = _Shared(logits, self.height, self.width, self.align_corners)
        rows = shared.axes[0]
        own_rows, parts = rows_of_part(rows)
        strips = cdiv(self.width, config.block_n)
        lanes = _lanes(logits.shape[1])
        labels = shared.new_map(label_dtype(logits.shape[1]))
        probs = shared.new_map() if self.with_prob else logits.new_empty(0, dtype=torch.float32)
        launch = Launch(
            forward_kernels.argmax_kernel,
            (len(logits) * len(rows.gaps) * parts * strips,),
            {"Labels": labels, "Probs": probs, "parts": parts, "strips": strips}
            | shared.arguments(),
            {"R": own_rows, "BX": config.block_n, "L": lanes, "PROB": self.with_prob}
            | shared.constants(config.block_c // lanes),
            num_warps=config.num_warps,
            max_registers=config.max_registers,
        )
        return [launch], (labels, probs)


def channels_last(logits: Tensor) -> Tensor:
    """logits, or a dense copy of them with the classes of a pixel side by side.

    They begin at a multiple of 16 bytes, as reads of several classes at once require. Where they do
    not, a copy of the small map saves the kernels a slower program that reads the classes one by
    one.
    """
    dense = logits.contiguous(memory_format=torch.channels_last)
    return dense.clone(memory_format=torch.channels_last) if dense.data_ptr() % 16 else dense
