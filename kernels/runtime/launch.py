"""Launches as data, and the choice between configurations on the user's machine.

A plan lists the kernel launches of a call without running them, so that the same list can be run,
compiled for an architecture that is not there, or counted byte by byte.

Another Triton version may compile a kernel differently. The first time a program is used, it is
compiled and checked before it runs: if it takes more than `MOST_LOCAL` bytes of local memory a
thread, or does not fit, the next configuration of the list takes its place, and one line in the log
says so. Configurations measured on the device (tuned.py) come before the list.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, NamedTuple, Optional, Protocol, TypeVar

import torch
from torch import Tensor

from . import tuned
from .dispatch import interpreting
from .replay import MOST_KINDS, run_noted
from .replay import forget as forget_replays
from .tuned import Entry, Problem

logger = logging.getLogger(__name__)

# Eight registers. If all 256 threads store and load them in every tile, that takes 128 of the 6,800
# cycles of a tile in the backward pass of `encode`; the configuration after it takes twice as long.
MOST_LOCAL = 32


@dataclass(frozen=True)
class Config:
    """Tile and warps of a kernel.

    Attributes:
        block_n, block_c: pixels and channels of a tile or of a product; see the plan.
        num_warps: warps of a program.
        form: which kernels, or parts of them, where a plan has several: its own names.
        max_registers: a limit for the compiler, of a thread, or None.
        stages: tiles in flight at once: with 2 the next one is read while one is worked on.
    """

    block_n: int
    block_c: int
    num_warps: int
    form: str = "tiles"
    max_registers: Optional[int] = None
    stages: int = 1

    def __str__(self) -> str:
        limit = "" if self.max_registers is None else f" r{self.max_registers}"
        stages = "" if self.stages == 1 else f" s{self.stages}"
        return f"{self.form} n{self.block_n} c{self.block_c} w{self.num_warps}{limit}{stages}"


def varied(config: Config, **options: Sequence[Any]) -> list[Config]:
    """The configuration with one attribute changed, to each of these values in turn."""
    return [
        replace(config, **{name: value}) for name, values in options.items() for value in values
    ]


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs in each dimension.
        arguments: run-time arguments by name.
        constants: constexpr arguments by name.
        num_warps, num_stages: compile options.
        max_registers: a limit for the compiler, of a thread, or None.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    max_registers: Optional[int] = None

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def options(self) -> dict[str, Any]:
        """Options for the compiler."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # Set because the default is to change; without it there are more instructions.
        options["enable_fp_fusion"] = True
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    def program(self) -> Any:
        """Different for launches that Triton compiles to different programs on one device."""
        return (
            id(self.kernel),  # it lives as long as its module; its hash is slow
            self.num_warps,
            self.num_stages,
            self.max_registers,
            *self.constants,
            *self.constants.values(),
            *self.arguments,
            *map(_specialised, self.arguments.values()),
        )

    def _call(self) -> dict[str, Any]:
        return {**self.arguments, **self.constants, **self.options()}

    def run(self) -> Any:
        """The program that ran, where Triton says so."""
        return self.kernel[self.grid](**self._call())

    def obstacle(self) -> Optional[str]:
        """Compile for the current device; why the result cannot be used, or None."""
        import triton  # not at the top: not every platform has it

        try:
            compiled = self.kernel.warmup(**self._call(), grid=self.grid)
            # Asking for it loads the program; only then does the driver say what it takes.
            compiled.run  # noqa: B018
        except triton.runtime.OutOfResources as error:
            return f"{self.name} does not fit: {error}"
        # Not a count of spills: a quarter of a thread's local memory, which includes the stack.
        local = 4 * compiled.n_spills
        if local > MOST_LOCAL:
            return f"{self.name} takes {local} bytes of local memory (stack and spills) a thread"
        return None


def _specialised(value: Any) -> Any:
    """What of a run-time argument makes Triton compile again: its type, and what divides it.

    This is needed for every argument of every launch, hence one small object for each kind.
    """
    kind = type(value)
    if kind is int:
        if value == 1:
            return 1  # folded in
        if -(2**31) <= value < 2**31:
            return 16 if value % 16 == 0 else kind
        return value % 16 == 0, value < 2**63
    # Asked second: isinstance is slow for what is not a tensor.
    if kind is not float and isinstance(value, Tensor):
        return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype, "unaligned")
    return kind


def cdiv(number: int, divisor: int) -> int:
    """Quotient rounded up; Triton's own, made for kernels, takes 10 us on the host."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


_ANYWHERE = contextlib.nullcontext()
# Why a program cannot be used on a device, or None.
_obstacles: dict[Any, Optional[str]] = {}
# The configuration that a pass over arguments like these used on a device.
_chosen: dict[Any, tuple[Machine, Config]] = {}

Outputs = TypeVar("Outputs")
Made = TypeVar("Made", covariant=True)


class Machine(NamedTuple):
    """What a plan must know of a GPU: its compute capability, such as 90, and multiprocessors."""

    arch: int
    processors: int


class Pass(Protocol[Made]):
    """One pass of an operator over tensors that its kernels can read; plans consist of these.

    Nothing of it runs. The tensors may be on the meta device.
    """

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""

    def problem(self) -> Problem:
        """The key for measured configurations."""

    def configs(self, machine: Machine) -> Sequence[Config]:
        """Configurations for the launches, the preferred first, the conservative one last."""

    def candidates(self, machine: Machine) -> Sequence[Config]:
        """`configs`, and what else is worth measuring."""

    def launches(self, machine: Machine, config: Config) -> tuple[list[Launch], Made]:
        """Launches in order, and the outputs they write."""


def machine(device: torch.device) -> Machine:
    if device.type != "cuda":
        return Machine(90, 132)  # an H100, for the interpreter
    properties = torch.cuda.get_device_properties(device)
    return Machine(10 * properties.major + properties.minor, properties.multi_processor_count)


def run(call: Pass[Outputs]) -> Outputs:
    """Run a call on its device with the first good configuration; its outputs.

    That is looked for once for arguments of one kind.
    """
    key = call.device, type(call), _kinds(call)
    with on(call.device):
        chosen = _chosen.get(key)
        if chosen is None:
            here = machine(call.device)
            config, made, outputs = choose(
                _preferred_first(call, here), partial(call.launches, here), call.device
            )
            if len(_chosen) >= MOST_KINDS:
                _chosen.clear()
            _chosen[key] = here, config
            if _seen is not None:
                _seen.append((call, config))
        else:
            made, outputs = call.launches(*chosen)
        run_all(made)
    return outputs


def _kinds(arguments: Any) -> tuple[Any, ...]:
    """Everything in a pass's arguments that decides what it launches and how that is compiled.

    For a number that is not a size, a plan only asks whether it is above 0.
    """
    found: list[Any] = []
    for value in vars(arguments).values():
        kind = type(value)
        if isinstance(value, Tensor):
            found += value.shape, value.stride(), value.dtype, value.data_ptr() % 16 == 0
        elif value is None or kind is bool or kind is int:
            found.append(value)
        elif kind is float or isinstance(value, float):
            found.append(value > 0)
        else:
            found.append(_kinds(value))
    return tuple(found)


def forget() -> None:
    """Forget which configurations were chosen, and how to make launches again."""
    _chosen.clear()
    forget_replays()


def _preferred_first(call: Pass[Any], here: Machine) -> Sequence[Config]:
    """The plan's list, after the configuration measured for such a call, if any."""
    configs = call.configs(here)
    found = tuned.preferred(call.problem(), partial(call.candidates, here), call.device)
    if found is None or found == configs[0]:
        return configs
    # The last one stays where it is, even if it was the fastest: it is used unchecked there.
    return [found, *(config for config in configs[:-1] if config != found), configs[-1]]


# What was chosen since a trial began, or None.
_seen: Optional[list[tuple[Pass[Any], Config]]] = None


@contextlib.contextmanager
def trial(entries: Sequence[Entry] = ()) -> Iterator[list[tuple[Pass[Any], Config]]]:
    """Choose again inside this context, with these entries in place of those of the files.

    The list gets each pass that runs, once for arguments of one kind, and its configuration. For
    tuning: this holds for all threads, since a backward pass runs in one of its own.
    """
    global _seen
    before = _seen, tuned.tried
    forget()
    _seen, tuned.tried = [], entries
    try:
        yield _seen
    finally:
        forget()
        _seen, tuned.tried = before


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton compiles for the current device, loads onto it and launches on its stream."""
    return torch.cuda.device(device) if device.type == "cuda" else _ANYWHERE


def run_all(launches: Sequence[Launch]) -> None:
    """Run them in order, except empty grids, which a GPU refuses."""
    for launch in launches:
        if all(launch.grid):
            run_noted(launch)


def choose(
    configs: Sequence[Config],
    launches: Callable[[Config], tuple[Sequence[Launch], Outputs]],
    device: torch.device,
) -> tuple[Config, Sequence[Launch], Outputs]:
    """The first good configuration, and what `launches` lists for it.

    A configuration is good if its kernels fit and need next to no local memory. The last one is
    taken unchecked: it is the conservative one, and a slow result is better than none.
    """
    for config, following in zip(configs, configs[1:]):
        made, outputs = launches(config)
        if interpreting() or _good(made, device, config, following):
            return config, made, outputs
        del made, outputs  # room for those of the next one
    return (configs[-1], *launches(configs[-1]))


def _good(
    launches: Sequence[Launch], device: torch.device, config: Config, following: Config
) -> bool:
    """Whether all of these programs can be used; checks each once, and logs what it finds."""
    good = True
    for launch in launches:
        key = device, launch.program()
        if key not in _obstacles:
            _obstacles[key] = found = launch.obstacle()
            if found is not None:
                import triton

                logger.warning(
                    "%s as compiled by Triton %s; using '%s' in place of '%s'",
                    found,
                    triton.__version__,
                    following,
                    config,
                )
        good = good and _obstacles[key] is None
    return good
