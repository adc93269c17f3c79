"""Watch kernels in Triton's interpreter: bounds, alignment, races, bytes, sectors, program order.

    with Watch(order="reverse", races=True) as watch:
        kernel[grid](...)
    watch.launches[-1].loads["X"].requested

An argument owns the bytes from its data_ptr over the extent of its shape and strides; where
arguments overlap, an access counts for the smallest that contains it. Interpreter mode is fixed
when triton is imported, so TRITON_INTERPRET=1 belongs in the environment of the process.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import triton
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from bench.static.races import Integers, Kind, RaceDetector

SECTOR = 32
_BUILDER = interpreter.interpreter_builder
_NOT_KERNELS = (str(Path(triton.__file__).parent), __file__)
_ACQUIRES, _RELEASES = ("ACQUIRE", "ACQUIRE_RELEASE"), ("RELEASE", "ACQUIRE_RELEASE")
_BETWEEN_PROGRAMS = ("GPU", "SYSTEM")

_Direction = Literal["load", "store"]


class OutOfBounds(RuntimeError):
    """A kernel touched an address outside every tensor it was given."""


class Misaligned(RuntimeError):
    """A kernel used an address that is not a multiple of the element's size; a GPU stops there."""


class Race(RuntimeError):
    """Programs of a launch used one address in no defined order, and one of them stored there."""


class UnwatchedOperation(RuntimeError):
    """A kernel used atomics on floats, whose sums depend on the order, or a compare-and-swap."""


@dataclass
class Traffic:
    """Bytes of the loads, or of the stores, of one argument in one launch.

    Attributes:
        requested: bytes of all elements not masked out.
        by_program: distinct 32-byte sectors of each program, or of `Watch.together` neighbouring
            ones, summed over them, in bytes.
        by_launch: distinct 32-byte sectors of the launch, in bytes.
    """

    requested: int = 0
    by_program: int = 0
    by_launch: int = 0


@dataclass(frozen=True)
class LaunchRecord:
    """What one launch did, by argument name; names without an access are left out."""

    kernel: str
    programs: int
    loads: dict[str, Traffic]
    stores: dict[str, Traffic]


class _Region:
    """The memory of one tensor argument, with the last group of programs in each sector."""

    def __init__(self, name: str, tensor: Any) -> None:
        self.name = name
        self.itemsize: int = tensor.element_size()
        self.start: int = tensor.data_ptr()
        steps = ((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.end = self.start + (sum(steps) + 1) * self.itemsize
        self.traffic: dict[_Direction, Traffic] = {"load": Traffic(), "store": Traffic()}
        self._first = self.start // SECTOR
        sectors = (self.end - 1) // SECTOR - self._first + 1
        self._last: dict[_Direction, NDArray[np.int32]] = {
            kind: np.zeros(sectors, np.int32) for kind in self.traffic
        }

    def count(self, kind: Kind, addresses: Integers, size: int, group: int) -> None:
        if kind != "atomic":
            self._count(kind, addresses, size, group)
            return
        self._count("load", addresses, size, group)
        self._count("store", addresses, size, group)

    def _count(self, kind: _Direction, addresses: Integers, size: int, group: int) -> None:
        sectors = addresses // SECTOR - self._first
        # Neighbours mostly share a sector: what is left to sort is a fraction.
        sectors = sectors[np.flatnonzero(np.diff(sectors, prepend=-1))]
        last = self._last[kind]
        new = np.unique(sectors[last[sectors] != group])
        last[new] = group
        self.traffic[kind].requested += size * addresses.size
        self.traffic[kind].by_program += SECTOR * new.size

    def finish(self) -> None:
        for kind, traffic in self.traffic.items():
            traffic.by_launch = SECTOR * int(np.count_nonzero(self._last[kind]))


class Watch:
    """A context in which every launch is checked and recorded in ``launches``.

    An access at an address that is not a multiple of its element's size raises Misaligned.

    Attributes:
        launches: what each launch did.
        together: how many neighbouring programs count as one in `Traffic.by_program`, from the next
            launch on; they must run in order.

    Args:
        order: order of the programs: None as launched, "reverse", or a seed to shuffle them.
        bounds: raise OutOfBounds at an access outside every tensor of the launch.
        races: raise Race where programs of a launch race with one another.
        values: False computes on zeros, without loads, stores, products and bfloat16 casts. It is
            twice as fast, and enough to follow the addresses of kernels that load no addresses.
            Atomics still run, because a program may do more work if it is the last one.
    """

    def __init__(
        self,
        order: Literal["reverse"] | int | None = None,
        bounds: bool = True,
        races: bool = False,
        values: bool = True,
    ) -> None:
        self.order, self.bounds, self.races, self.values = order, bounds, races, values
        self.launches: list[LaunchRecord] = []
        self.together = 1
        self._patches = ExitStack()
        self._regions: list[_Region] = []
        self._detector: RaceDetector | None = None
        self._sequence: Integers = np.zeros(0, np.int64)
        self._program = 0

    def __enter__(self) -> Watch:
        if not triton.knobs.runtime.interpret:
            raise RuntimeError("Watch needs TRITON_INTERPRET=1 before triton is imported.")
        quicken()
        self._replace(_BUILDER, "create_masked_load", self._load)
        self._replace(_BUILDER, "create_masked_store", self._store)
        self._replace(_BUILDER, "set_grid_idx", self._start_program)
        self._replace(_BUILDER, "create_atomic_rmw", self._atomic)
        self._replace(_BUILDER, "create_atomic_cas", _refuse_atomic)
        self._replace(interpreter.GridExecutor, "_init_args_hst", self._start)
        self._replace(interpreter.GridExecutor, "__call__", self._launch)
        if not self.values:
            self._replace(_BUILDER, "create_dot", lambda _, a, b, d, *options: d)
            self._replace(interpreter, "_convert_float", _convert_to_zeros)
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def _replace(self, owner: Any, name: str, function: Any) -> None:
        """Replace a method; ours gets the one it replaces as its first argument."""
        former = getattr(owner, name)
        new = lambda *values, **named: function(former, *values, **named)  # noqa: E731
        self._patches.enter_context(patch.object(owner, name, new))

    def _launch(self, former: Any, executor: Any, *values: Any, **named: Any) -> None:
        try:
            former(executor, *values, **named)
        except InterpreterError as error:
            raise _origin(error) from None
        for region in self._regions:
            region.finish()
        programs = math.prod(_BUILDER.grid_dim)
        loads, stores = self._sum("load"), self._sum("store")
        self.launches.append(LaunchRecord(executor.fn.__name__, programs, loads, stores))

    def _start(self, former: Any, executor: Any, values: Any, named: dict[str, Any]) -> Any:
        values, named = former(executor, values, named)
        arguments = dict(zip(executor.arg_names, values, strict=False)) | named
        tensors = [(n, t) for n, value in arguments.items() for t in _tensors(value)]
        regions = [_Region(name, tensor) for name, tensor in tensors if tensor.numel()]
        self._regions = sorted(regions, key=lambda region: region.end - region.start)
        self._detector = None
        return values, named

    def _sum(self, kind: _Direction) -> dict[str, Traffic]:
        found: dict[str, Traffic] = {}
        for region in self._regions:
            part = region.traffic[kind]
            if part.requested:
                total = found.setdefault(region.name, Traffic())
                total.requested += part.requested
                total.by_program += part.by_program
                total.by_launch += part.by_launch
        return found

    def _start_program(self, former: Any, x: int, y: int, z: int) -> None:
        grid = _BUILDER.grid_dim
        if (x, y, z) == (0, 0, 0):
            self._sequence = np.arange(math.prod(grid))
            if self.races:
                spans = [(region.start, region.end) for region in self._regions]
                unit = min((region.itemsize for region in self._regions), default=1)
                self._detector = RaceDetector(spans, unit, len(self._sequence))
            if self.order == "reverse":
                self._sequence = self._sequence[::-1]
            elif self.order is not None:
                self._sequence = np.random.default_rng(self.order).permutation(self._sequence)
        number = int(self._sequence[(x * grid[1] + y) * grid[2] + z])
        self._program = number + 1
        former(*_coordinates(number))

    def _load(
        self, former: Any, pointers: Any, mask: Any, other: Any, *options: Any, **named: Any
    ) -> Any:
        self._access("load", pointers, mask)
        if self.values:
            return former(pointers, mask, other, *options, **named)
        element = pointers.get_element_ty()
        zeros = np.zeros(pointers.data.shape, interpreter._get_np_dtype(element))
        return interpreter.TensorHandle(zeros, element)

    def _store(self, former: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> None:
        self._access("store", pointers, mask)
        if self.values:
            former(pointers, value, mask, *options)

    def _atomic(
        self, former: Any, operation: Any, pointers: Any, value: Any, mask: Any, sem: Any,
        scope: Any,
    ) -> Any:  # fmt: skip
        """Its result is real even with values=False."""
        if np.issubdtype(value.data.dtype, np.floating):
            _refuse_atomic(former)
        wanted = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
        addresses = pointers.data[wanted].view(np.int64).tolist()
        detector = self._detector if scope.name in _BETWEEN_PROGRAMS else None
        if detector and sem.name in _ACQUIRES:
            for address in addresses:
                detector.acquire(address, self._program)
        self._access("atomic", pointers, mask)
        result = former(operation, pointers, value, mask, sem, scope)
        if detector and sem.name in _RELEASES:
            for address in addresses:
                detector.release(address, self._program)
        return result

    def _access(self, kind: Kind, pointers: Any, mask: Any) -> None:
        wanted = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
        addresses = pointers.data[wanted].view(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self._check_alignment(kind, addresses, size)
        group = (self._program - 1) // self.together + 1
        for region, part in self._owners(kind, addresses, size):
            region.count(kind, part, size, group)
            race = self._detector and self._detector.check(kind, part, size, self._program)
            if race:
                address, other = race
                whom = f"program {_coordinates(other - 1)}" if other > 0 else "several programs"
                raise Race(
                    f"{kind} by program {_BUILDER.grid_idx}, argument {region.name}, "
                    f"byte {address - region.start}, {_line()}: used by {whom} too"
                )

    def _check_alignment(self, kind: Kind, addresses: Integers, size: int) -> None:
        if np.bitwise_or.reduce(addresses) % size:
            bad = addresses[addresses % size != 0]
            what, near = self._describe(kind, bad, size)
            raise Misaligned(f"{what} at an address that is not a multiple of {size}, {near}")

    def _owners(
        self, kind: Kind, addresses: Integers, size: int
    ) -> Iterator[tuple[_Region, Integers]]:
        """The addresses by the region they lie in; raises OutOfBounds for those in none."""
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max())
        for region in self._regions:
            if region.start <= low and high + size <= region.end:
                yield region, addresses
                return
        for region in self._regions:
            inside = (addresses >= region.start) & (addresses + size <= region.end)
            if inside.any():
                yield region, addresses[inside]
                addresses = addresses[~inside]
        if self.bounds and addresses.size:
            what, near = self._describe(kind, addresses, size)
            raise OutOfBounds(f"{what} outside every tensor, {near}")

    def _describe(self, kind: Kind, addresses: Integers, size: int) -> tuple[str, str]:
        """What was done, and the place of the first address as the nearest argument counts it."""
        bad = int(addresses[0])
        what = f"{kind} of {size} bytes by program {_BUILDER.grid_idx} at {_line()}:"
        if not self._regions:
            return what, "no tensor was given"
        near = min(self._regions, key=lambda r: max(r.start - bad, bad + size - r.end))
        return what, (
            f"nearest argument {near.name}, byte {bad - near.start} of {near.end - near.start} "
            f"({addresses.size} such elements)"
        )


def quicken() -> None:
    """Let the interpreter prepare each module once, and repair ranges; a second call does nothing.

    As shipped it replaces the functions of triton.language at every call of a kernel or of tl.sum,
    which takes a third of the time, and restores them at the end of a launch. In a process that
    interprets, only kernels call them, so they can stay replaced.
    """
    if isinstance(interpreter._patch_lang, _Once):
        return
    interpreter._patch_lang = _Once(interpreter._patch_lang)
    interpreter._patch_lang_tensor = partial(_patch_tensor, interpreter._patch_lang_tensor)
    interpreter._get_np_dtype = _by_element(interpreter._get_np_dtype)
    interpreter.InterpreterBuilder.create_splat = _splat


def _splat(builder: Any, block: Any, scalar: Any) -> Any:
    """A block of the scalar's own type. As shipped, a block of a comparison has the type of the two
    numbers compared, and Triton 3.9 refuses it as a mask.
    """
    data = np.full(block.shape, scalar.data.item(), scalar.data.dtype)
    return interpreter.TensorHandle(data, scalar.dtype.scalar)


def _by_element(former: Any) -> Any:
    """Cache a look-up for which the interpreter makes a dictionary of all types each time."""
    known = cache(former)

    def dtype_of(kind: Any) -> Any:
        element = kind.scalar
        return former(element) if element.is_ptr() else known(element)

    return dtype_of


class _Once:
    """Prepares the module of each function once, and leaves nothing to restore."""

    def __init__(self, former: Any) -> None:
        self._former = former
        self._prepared: set[int] = set()

    def __call__(self, function: Any) -> Any:
        if id(function.__globals__) not in self._prepared:
            self._prepared.add(id(function.__globals__))
            self._former(function)
        return interpreter._LangPatchScope()


def _patch_tensor(former: Any, tensor: Any, scope: Any) -> None:
    """Let a tensor of one element be the bound of a range.

    Triton 3.6 calls int() for that, which numpy 2.4 and newer refuse for an array with a dimension.
    """
    former(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _tensors(value: Any) -> Iterator[Any]:
    """Tensors of an argument: itself, those of a tuple, the base of a descriptor or a wrapper."""
    if isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "untyped_storage"):
        yield value
    elif hasattr(value, "base"):
        yield from _tensors(value.base)


def _coordinates(number: int) -> tuple[int, int, int]:
    _, y, z = _BUILDER.grid_dim
    return number // (y * z), number // z % y, number % z


def _line() -> str:
    """File and line of the kernel that is running."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_KERNELS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _origin(error: BaseException) -> BaseException:
    """Our own error without those the interpreter wraps it in; any other stays as it is."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, (OutOfBounds, Misaligned, Race, UnwatchedOperation)):
            return inner
        inner = inner.__cause__
    return error


def _convert_to_zeros(_: Any, data: Any, source: Any, target: Any, *rounding: Any) -> Any:
    return np.zeros(data.shape, f"u{target.primitive_bitwidth // 8}")


def _refuse_atomic(former: Any, *_: Any) -> None:
    raise UnwatchedOperation(
        f"{former.__name__} at {_line()}: Watch follows loads, stores and atomics on integers alone"
    )
