"""Repeats the launches of a function as they were made before, for arguments of the same kind.

A body that launches kernels makes the same launches of the same compiled programs for all arguments
of the same kind (shapes, strides, dtypes, alignment, options); only addresses and numbers differ.
So its second call is watched: what it allocates, and where the arguments of its launches come from,
is written down. Later calls allocate, fill in and call the programs' launchers, without the checks,
plans and views of the body and without Triton's binder. In any unclear case the body and Triton
handle the call: a body that computes something else, arguments whose origin is unclear, a Triton
whose launchers are not known here, hooks that are set. With ENCNET_REPLAY=0 in the environment they
handle all calls.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from .dispatch import interpreting, takes_triton

# Versions whose programs `Replay` knows how to launch; in any other, Triton launches them.
_KNOWN = ("3.6", "3.7", "3.8", "3.9")
# Buffers within one allocation begin at a multiple of this many bytes.
_ALIGNED = 256
# Kinds of arguments that a body or a plan remembers; with more it begins anew. A network has some
# hundreds; images that each have another size would fill the memory, by 10 KB a layer.
MOST_KINDS = 4096
# Calls that are watched for arguments of one kind, at most: two tensors that are the same one, as
# the arguments may be by chance, are not told apart.
_WATCHED = 3

# Operators that allocate and compute nothing.
_ALLOCATE = frozenset(("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"))

_PLAIN = frozenset({type(None), bool, str, torch.dtype})
# What is kept of a number that is not a size: all that a body asks of it.
_ABOVE, _NOT_ABOVE = object(), object()

# What torch.library runs a body in: views and changes are not recorded.
_below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


def kinds_of(
    arguments: Sequence[Any], pointers: list[int], numbers: list[float]
) -> Optional[tuple[Any, ...]]:
    """Everything in the arguments that decides what is launched and how it is compiled.

    Addresses and numbers are added to the lists. None if an argument is not a plain tensor or
    value.
    """
    found: list[Any] = []
    bits = 0
    for value in arguments:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            try:
                pointer = value.data_ptr()
                # An index in place of the device, which is slow to compare: CUDA's have one.
                found += value.shape, value.stride(), value.dtype, value.get_device()
            except RuntimeError:  # one that is not dense
                return None
            if value.is_neg() or (not pointer and value._is_zerotensor()):
                return None
            pointers.append(pointer)
            bits |= pointer
        elif kind in _PLAIN:
            found.append(value)
        elif kind is float:
            found.append(_ABOVE if value > 0 else _NOT_ABOVE)
            numbers.append(value)
        elif kind is int:
            found += kind, value
        else:
            return None
    if bits & 15:
        found.append(tuple(pointer & 15 for pointer in pointers))
    return tuple(found)


class Repeated:
    """A body that launches kernels, with the record of its calls."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = body
        self._replays: dict[Any, Replay] = {}
        self._calls: dict[Any, int] = {}
        _all.append(self)

    def again(self, *arguments: Any) -> Optional[Callable[[], Any]]:
        """What to call for its outputs if such arguments were seen before, or None."""
        found = self._find(arguments)
        return None if found is None else partial(self._run, found, arguments)

    def __call__(self, *arguments: Any) -> Any:
        found = self._find(arguments)
        return self._watched(arguments) if found is None else self._run(found, arguments)

    def _find(self, arguments: Sequence[Any]) -> Optional[tuple[Replay, list[int], list[float]]]:
        if not self._replays:
            return None
        pointers: list[int] = []
        numbers: list[float] = []
        replay = self._replays.get(kinds_of(arguments, pointers, numbers))
        return None if replay is None or not replay.holds() else (replay, pointers, numbers)

    def _run(self, found: tuple[Replay, list[int], list[float]], arguments: Sequence[Any]) -> Any:
        replay, pointers, numbers = found
        made = replay.run(pointers, numbers)
        return self.plain(*arguments) if made is None else made

    def plain(self, *arguments: Any) -> Any:
        """The body itself."""
        with _below_autograd():
            return self.body(*arguments)

    def _watched(self, arguments: Sequence[Any]) -> Any:
        if watching() or not _is_known_here(arguments):
            return self.plain(*arguments)
        kinds = kinds_of(arguments, [], [])
        if kinds is None or kinds in self._replays:
            return self.plain(*arguments)
        if kinds not in self._calls and len(self._calls) >= MOST_KINDS:
            self.forget()
        calls = self._calls[kinds] = self._calls.get(kinds, 0) + 1
        # The first one chooses and compiles.
        if not 1 < calls <= 1 + _WATCHED:
            return self.plain(*arguments)
        outputs, replay = _watch(self.plain, arguments)
        if replay is not None:
            self._replays[kinds] = replay
        return outputs

    def forget(self) -> None:
        """Forget all calls."""
        self._replays.clear()
        self._calls.clear()


_all: list[Repeated] = []


def forget() -> None:
    """Forget the calls of all bodies: their plans must be asked again."""
    for one in _all:
        one.forget()


def _is_known_here(arguments: Sequence[Any]) -> bool:
    """Whether Triton compiles kernels for the first tensor, in a version that launches as here."""
    first = next((value for value in arguments if isinstance(value, Tensor)), None)
    if first is None or interpreting() or not takes_triton(first):
        return False
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    return version in _KNOWN and os.environ.get("ENCNET_REPLAY") != "0"


class _Number(float):
    """A number of the arguments, which is recognised where a launch takes it."""

    place: int


class _Watching(threading.local):
    """The launches and programs of the body that is watched on this thread, or None."""

    launches: Optional[list[tuple[Any, Any]]] = None


_watching = _Watching()


def watching() -> bool:
    """Whether this thread runs a body that is being recorded."""
    return _watching.launches is not None


def run_noted(launch: Any) -> None:
    """Run a launch, and note it where the body that makes it is watched."""
    if _watching.launches is None:
        launch.run()
        return
    # With plain numbers, because Triton looks at their type.
    plain = {n: float(v) if type(v) is _Number else v for n, v in launch.arguments.items()}
    _watching.launches.append((launch, replace(launch, arguments=plain).run()))


class _Allocations(TorchDispatchMode):
    """Keeps what is allocated, so that no address is given twice; `only` if nothing else ran."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.only = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Optional[dict[str, Any]] = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _ALLOCATE:
            self.tensors.append(made)
        elif func._schema.is_mutable or not (args and _is_view(made, args[0])):
            self.only = False
        return made


def _is_view(made: Any, tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or not isinstance(made, Tensor):
        return False
    return made.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def _launches() -> Iterator[list[tuple[Any, Any]]]:
    made: list[tuple[Any, Any]] = []
    _watching.launches = made
    try:
        yield made
    finally:
        _watching.launches = None


def _watch(body: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, Optional[Replay]]:
    """The outputs of the body, and how to make its launches again, or None."""
    tensors: list[Tensor] = []
    numbers: list[float] = []
    marked = []
    for value in arguments:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif type(value) is float:
            value = _Number(value)
            value.place = len(numbers)
            numbers.append(value)
        marked.append(value)
    with _Allocations() as allocated, _launches() as made:
        outputs = body(*marked)
    if not allocated.only or not all(_is_known(*one) for one in made):
        return outputs, None
    try:
        return outputs, Replay(made, _Places(tensors, numbers, allocated.tensors, outputs))
    except NotReplayable:
        return outputs, None


def _is_known(launch: Any, program: Any) -> bool:
    """Whether this is a program that is launched as `Replay` does it."""
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    needed = ("run", "function", "packed_metadata")
    return (
        type(launch.kernel) is JITFunction
        and type(program) is CompiledKernel
        and all(hasattr(program, name) for name in needed)
    )


class NotReplayable(Exception):
    """Why the body must handle the calls."""


class _Places:
    """Where the arguments of launches come from: places in the list of all values of a call.

    These are the addresses of the arguments, the numbers, the addresses of the outputs and that of
    one buffer for all else, constants, and addresses that lie behind one of the others.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        numbers: Sequence[float],
        allocated: Sequence[Tensor],
        outputs: Any,
    ) -> None:
        self.single = isinstance(outputs, Tensor)
        self.outputs: tuple[Optional[Tensor], ...] = (outputs,) if self.single else outputs
        self.device = tensors[0].device
        self._numbers, self._first_number = numbers, len(tensors)
        self.constants: list[Any] = []
        self.behind: list[tuple[int, int]] = []
        self.bytes = 0
        # Ranges of addresses of arguments and outputs, and the place of the first of each.
        self._known: list[tuple[int, int, int]] = []
        self._buffers = [_range(tensor.untyped_storage()) for tensor in allocated]
        # Bytes in front of an allocation in the buffer, by its address.
        self._in_buffer: dict[int, int] = {}
        for place, tensor in enumerate(tensors):
            self._know(tensor, place)
        self.buffer = len(tensors) + len(numbers)
        for output in self.outputs:
            if output is not None:
                self._know_output(output, self.buffer)
                self.buffer += 1

    def _know(self, tensor: Tensor, place: int) -> None:
        start, end = tensor.data_ptr(), tensor.data_ptr() + _span(tensor)
        if any(start < other_end and other < end for other, other_end, _ in self._known):
            raise NotReplayable("arguments or outputs share their memory")
        self._known.append((start, end, place))

    def _know_output(self, output: Tensor, place: int) -> None:
        storage = _range(output.untyped_storage())
        if storage[1] - storage[0] != _span(output) or storage not in self._buffers:
            raise NotReplayable("an output is part of something else")
        self._know(output, place)

    def of(self, value: Any) -> int:
        """The place of a launch's argument; raises NotReplayable where it is unclear."""
        kind = type(value)
        if kind is _Number:
            return self._first_number + value.place
        if kind is int or kind is bool or kind is float or value is None:
            return self.constant(value)
        if not isinstance(value, Tensor):
            raise NotReplayable(f"an argument is of type {kind.__name__}")
        if not value.numel():
            return self.constant(0)
        pointer = value.data_ptr()
        for start, end, place in self._known:
            if start <= pointer < end:
                return place if pointer == start else self._behind(place, pointer - start)
        for start, end in self._buffers:
            if start <= pointer < end:
                if start not in self._in_buffer:
                    self._in_buffer[start] = self.bytes
                    self.bytes += -(-(end - start) // _ALIGNED) * _ALIGNED
                offset = self._in_buffer[start] + pointer - start
                return self._behind(self.buffer, offset) if offset else self.buffer
        raise NotReplayable("an argument is none of the call's")

    def constant(self, value: Any) -> int:
        """Places of constants are below zero: they are counted from the end.

        Raises NotReplayable for a number that may have been computed from one of the call's.
        """
        if self._numbers and isinstance(value, float):
            raise NotReplayable("a number is none of the call's")
        self.constants.append(value)
        return -len(self.constants)

    def _behind(self, place: int, offset: int) -> int:
        if (place, offset) not in self.behind:
            self.behind.append((place, offset))
        return self.buffer + 1 + self.behind.index((place, offset))


def _range(storage: Any) -> tuple[int, int]:
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _span(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last."""
    if not tensor.numel():
        return 0
    steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    return (steps + 1) * tensor.element_size()


class _Program(NamedTuple):
    """A compiled program, its grid, and the arguments of a launch out of all values."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: Any
    metadata: Any
    arguments: Callable[[Sequence[Any]], Sequence[Any]]
    compiled: Any  # Triton may unload the function of one that nobody holds


class Replay:
    """The launches of a call; see the module."""

    def __init__(self, launches: Sequence[tuple[Any, Any]], places: _Places) -> None:
        """Raises NotReplayable."""
        from triton import knobs
        from triton.runtime import driver

        self._settings = [
            (vars(group), dict(vars(group))) for group in (knobs.runtime, knobs.compilation)
        ]
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # Lists that are empty while nobody listens.
        self._listeners: list[Any] = [_calls_of(hook) for hook in hooks if hook is not None]
        self._listeners += [one.kernel.pre_run_hooks for one, _ in launches]
        self._driver = driver.active
        index = places.device.index
        self._index = self._driver.get_current_device() if index is None else index
        self._programs = [
            _Program(
                program.run,
                _three(one.grid),
                program.function,
                program.packed_metadata,
                itemgetter(*_arguments(one, places)),
                program,
            )
            for one, program in launches
        ]
        self._empty, self._single = _allocator(places.device), places.single
        self._outputs = [
            None if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in places.outputs
        ]
        self._bytes, self._behind = places.bytes, places.behind
        self._constants = places.constants[::-1]

    def holds(self) -> bool:
        """Whether nothing that Triton looks at has changed, and the device is the current one."""
        for settings, before in self._settings:
            if settings != before:
                return False
        if any(self._listeners):
            return False
        return bool(self._driver.get_current_device() == self._index)

    def run(self, pointers: list[int], numbers: list[float]) -> Any:
        """The outputs, or None if an allocation does not begin at a multiple of 16 bytes."""
        empty = self._empty
        outputs: list[Optional[Tensor]] = []
        values: list[Any] = [*pointers, *numbers]
        bits = 0
        for made in self._outputs:
            if made is None:
                outputs.append(None)
                continue
            tensor = empty(*made)
            outputs.append(tensor)
            pointer = tensor.data_ptr()
            values.append(pointer)
            bits |= pointer
        # Held until all is launched; the allocator knows the stream.
        buffer = empty((self._bytes,), (1,), torch.uint8) if self._bytes else None
        pointer = 0 if buffer is None else buffer.data_ptr()
        values.append(pointer)
        if (bits | pointer) & 15:
            return None
        for place, offset in self._behind:
            values.append(values[place] + offset)
        values += self._constants
        stream = self._driver.get_current_stream(self._index)
        for run, grid, function, metadata, arguments, _ in self._programs:
            run(*grid, stream, function, metadata, None, None, None, *arguments(values))
        return outputs[0] if self._single else tuple(outputs)


def _allocator(device: torch.device) -> Callable[..., Tensor]:
    """What allocates on the device, the current one, by shape, strides and dtype.

    Compiled code has one of its own in torch, which takes the host half the time.
    """
    of_compiled_code = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    found = getattr(of_compiled_code, f"_empty_strided_{device.type}", None)
    if found is not None:
        return found  # type: ignore[no-any-return]
    return lambda shape, strides, dtype: torch.empty_strided(
        shape, strides, dtype=dtype, device=device
    )


def _calls_of(hook: Any) -> Any:
    """The list of hooks that are set."""
    if not hasattr(hook, "calls"):
        raise NotReplayable("a hook is set")
    return hook.calls


def _three(grid: tuple[int, ...]) -> tuple[int, int, int]:
    first, second, third = (*grid, 1, 1)[:3]
    return first, second, third


def _arguments(launch: Any, places: _Places) -> list[int]:
    """The places of all arguments, in the order of the kernel's parameters."""
    given, constants = launch.arguments, launch.constants
    names = launch.kernel.arg_names
    if set(names) != given.keys() | constants.keys():
        raise NotReplayable("an argument has a default")
    return [
        places.constant(constants[name]) if name in constants else places.of(given[name])
        for name in names
    ]
