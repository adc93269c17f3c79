"""The launches of a pass as they were made before, for arguments that are alike.

A pass over arguments of the same kinds (shapes, strides, dtypes, alignment, options) makes the same
launches of the same compiled programs; only addresses and numbers differ. So its plan is asked
once, what it allocates and where its arguments go is written down, and later calls allocate, fill
in and call the programs' launchers, without Triton's binder. Whatever is not understood leaves the
pass to its plan and to Triton: a plan that computes something, arguments whose origin is unclear,
a Triton whose launchers are not known here, hooks that somebody has set. ENCNET_REPLAY=0 in the
environment leaves all of them to it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Versions whose compiled programs are launched as `_Launch` does; in another one Triton launches.
_KNOWN = ("3.6", "3.7", "3.8", "3.9")
# Bytes that tensors in one buffer begin at a multiple of.
_ALIGNED = 256

# Operators that allocate, or look at a tensor otherwise, and compute nothing.
_ALLOCATIONS = frozenset(
    ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
    + ("transpose", "view", "detach")
)


class _Number(float):
    """A number of the arguments, which is recognised where a launch takes it."""

    place: int


class _Allocations(TorchDispatchMode):
    """Sees whether nothing but allocations was done."""

    only = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Optional[dict[str, Any]] = None
    ) -> Any:
        self.only &= func.overloadpacket.__name__ in _ALLOCATIONS
        return func(*args, **(kwargs or {}))


def marked(call: Any, tensors: list[Tensor], numbers: list[float]) -> Any:
    """The pass, with tensors and numbers that are objects of their own; adds them to the lists.

    In the order of the keys that launch.py makes.
    """
    changed: dict[str, Any] = {}
    for name, value in vars(call).items():
        kind = type(value)
        if value is None or kind is bool or kind is int:
            continue
        if kind is float:
            changed[name] = number = _Number(value)
            number.place = len(numbers)
            numbers.append(number)
        elif isinstance(value, Tensor):
            changed[name] = value.detach()
            tensors.append(changed[name])
        else:
            changed[name] = marked(value, tensors, numbers)
    return dataclasses.replace(call, **changed)


@dataclass(frozen=True)
class _Launch:
    """A compiled program and its arguments, as places in the list of all values."""

    kernel: Any
    compiled: Any
    grid: tuple[int, int, int]
    arguments: Callable[[Sequence[Any]], Sequence[Any]]


class NotReplayable(Exception):
    """Why a pass is left to its plan."""


class _Values:
    """Where the arguments of launches come from, when they are written down."""

    def __init__(
        self, tensors: list[Tensor], numbers: list[float], outputs: Sequence[Tensor]
    ) -> None:
        self.inputs, self.numbers = tensors, numbers
        self.outputs = outputs
        self.scratch: list[Tensor] = []
        self.constants: list[Any] = []
        self._owners = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        storages = [t.untyped_storage().data_ptr() for t in outputs if t.numel()]
        if len(set(storages)) < len(storages) or self._owners & set(storages):
            raise NotReplayable("an output shares its memory")
        if any(t.storage_offset() or not _fills(t) for t in outputs):
            raise NotReplayable("an output is part of something else")

    def place(self, value: Any) -> tuple[str, int]:
        """The list that a launch's argument is in, and where."""
        kind = type(value)
        if kind is _Number:
            return "number", value.place
        # A number that is not the call's own may have been made from one of them.
        fixed = kind is float and not self.numbers
        if kind is int or kind is bool or value is None or fixed:
            self.constants.append(value)
            return "constant", len(self.constants) - 1
        if not isinstance(value, Tensor):
            raise NotReplayable(f"an argument is of type {kind.__name__}")
        for name, known in (("input", self.inputs), ("output", self.outputs)):
            for i, tensor in enumerate(known):
                if value is tensor or (name == "output" and _same_memory(value, tensor)):
                    return name, i
        if value.untyped_storage().data_ptr() in self._owners and value.numel():
            raise NotReplayable("an argument is part of another one")
        for i, tensor in enumerate(self.scratch):
            if value is tensor:
                return "scratch", i
            if value.numel() and _same_storage(value, tensor):
                raise NotReplayable("two arguments share their memory")
        if any(_same_storage(value, tensor) for tensor in self.outputs):
            raise NotReplayable("an argument is part of an output")
        if value.storage_offset() or not _fills(value):
            raise NotReplayable("an argument is part of something else")
        self.scratch.append(value)
        return "scratch", len(self.scratch) - 1


def _fills(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _same_storage(a: Tensor, b: Tensor) -> bool:
    pointer = a.untyped_storage().data_ptr()
    return pointer != 0 and pointer == b.untyped_storage().data_ptr()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return _same_storage(a, b) and a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _settings(knobs: Any) -> tuple[Any, ...]:
    """What Triton reads at every launch to choose or change the program."""
    return (
        knobs.runtime.debug,
        knobs.runtime.add_stages_inspection_hook,
        knobs.compilation.instrumentation_mode,
        getattr(knobs.compilation, "fpsan_homomorphic_casts", None),
    )


def _listens(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


class Replay:
    """A pass over arguments of some kinds; see the module."""

    def __init__(
        self,
        device: torch.device,
        launches: Sequence[Any],
        compiled: Sequence[Any],
        tensors: list[Tensor],
        numbers: list[float],
        outputs: Any,
    ) -> None:
        """From the launches of a pass that was `marked`, what ran, and what it returned.

        Raises NotReplayable.
        """
        from triton import knobs
        from triton.runtime import driver

        self.device, self.knobs, self.driver = device, knobs, driver
        self.settings = _settings(knobs)
        self.single = isinstance(outputs, Tensor)
        made = (outputs,) if self.single else tuple(outputs)
        values = _Values(tensors, numbers, made)
        given = [one.places(values) for one in map(_Bound, launches, compiled)]
        self.outputs = [(tuple(t.shape), t.stride(), t.dtype) for t in made]
        self.offsets, self.bytes = [], 0
        for tensor in values.scratch:
            self.offsets.append(self.bytes)
            self.bytes += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
        lengths = {
            "input": len(tensors),
            "number": len(numbers),
            "output": len(made),
            "scratch": len(values.scratch),
            "constant": len(values.constants),
        }
        starts, start = {}, 0
        for name, length in lengths.items():
            starts[name], start = start, start + length
        self.constants = values.constants
        self.launches = [
            _Launch(one.kernel, program, _three(one.grid), _getter(places, starts))
            for one, program, places in zip(launches, compiled, given)
            if all(one.grid)
        ]

    def run(self, pointers: list[int], numbers: list[float]) -> Any:
        """The outputs, or None where something has changed and Triton is to launch."""
        runtime = self.knobs.runtime
        if _listens(runtime.launch_enter_hook) or _listens(runtime.launch_exit_hook):
            return None
        if _settings(self.knobs) != self.settings:
            return None
        device = self.device
        outputs, written = [], []
        for size, stride, dtype in self.outputs:
            made = torch.empty_strided(size, stride, dtype=dtype, device=device)
            outputs.append(made)
            written.append(made.data_ptr())
        if self.bytes:
            buffer = torch.empty(self.bytes, dtype=torch.uint8, device=device)
            base = buffer.data_ptr()
            written += [base + offset for offset in self.offsets]
        for pointer in written:
            if pointer & 15:
                return None
        for launch in self.launches:
            if launch.kernel.pre_run_hooks:
                return None
        values = [*pointers, *numbers, *written, *self.constants]
        active = self.driver.active
        stream = active.get_current_stream(active.get_current_device())
        for launch in self.launches:
            program = launch.compiled
            program.run(
                *launch.grid,
                stream,
                program.function,
                program.packed_metadata,
                None,
                None,
                None,
                *launch.arguments(values),
            )
        return outputs[0] if self.single else tuple(outputs)


@dataclass(frozen=True)
class _Bound:
    """A launch and the program that ran for it."""

    launch: Any
    compiled: Any

    def places(self, values: _Values) -> list[tuple[str, int]]:
        """Of all arguments, in the order of the kernel's parameters."""
        given = {**self.launch.arguments, **self.launch.constants}
        names = self.launch.kernel.arg_names
        if set(names) != set(given):
            raise NotReplayable("an argument has a default")
        constants = self.launch.constants
        places = []
        for name in names:
            if name in constants:
                values.constants.append(constants[name])
                places.append(("constant", len(values.constants) - 1))
            else:
                places.append(values.place(given[name]))
        return places


def _three(grid: tuple[int, ...]) -> tuple[int, int, int]:
    first, second, third = (*grid, 1, 1)[:3]
    return first, second, third


def _getter(
    places: list[tuple[str, int]], starts: dict[str, int]
) -> Callable[[Sequence[Any]], Sequence[Any]]:
    return itemgetter(*(starts[name] + i for name, i in places))


def _is_known(launches: Sequence[Any], compiled: Sequence[Any]) -> bool:
    """Whether these are programs that are launched as `Replay` does it."""
    import triton
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    if os.environ.get("ENCNET_REPLAY") == "0":
        return False
    if ".".join(triton.__version__.split(".")[:2]) not in _KNOWN:
        return False
    needed = ("run", "function", "packed_metadata")
    return all(
        type(one.kernel) is JITFunction
        and type(program) is CompiledKernel
        and all(hasattr(program, name) for name in needed)
        for one, program in zip(launches, compiled)
    )


def _plain(launch: Any) -> dict[str, Any]:
    return {
        name: float(value) if type(value) is _Number else value
        for name, value in launch.arguments.items()
    }


def run_and_record(
    call: Any, launches_of: Callable[[Any], Any], run_all: Callable[[Sequence[Any]], Sequence[Any]]
) -> tuple[Any, Optional[Replay]]:
    """Run a pass by its plan; its outputs, and how to replay it, or None.

    `launches_of` makes its launches and outputs, `run_all` runs them and returns the programs.
    """
    tensors: list[Tensor] = []
    numbers: list[float] = []
    with _Allocations() as seen:
        made, outputs = launches_of(marked(call, tensors, numbers))
    # Triton asks what type a number has.
    compiled = run_all([dataclasses.replace(one, arguments=_plain(one)) for one in made])
    if not seen.only or not all(all(one.grid) for one in made) or not _is_known(made, compiled):
        return outputs, None
    try:
        return outputs, Replay(call.device, made, compiled, tensors, numbers, outputs)
    except NotReplayable:
        return outputs, None
