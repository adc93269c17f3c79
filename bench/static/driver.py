"""Triton's driver without a GPU: kernels compile for an architecture, and a launch does nothing.

What Triton does on the host stays as it is: binding arguments, specialising on them, finding the
program and calling its launcher. Only the launcher's work is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from bench.static.resources import LIMITS, require_compiler

Launched = tuple[Any, ...]


def _nothing(*_: Any) -> None:
    pass


def _make(arch: int, launched: list[Launched] | None) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver

    class Launcher:
        """Takes the arguments of the real launcher and launches nothing."""

        def __init__(self, src: Any, metadata: Any) -> None:
            self.name = metadata.name

        def __call__(self, *arguments: Any) -> None:
            if launched is not None:
                launched.append((self.name, *arguments))

    class Driver(GPUDriver):  # type: ignore[misc]
        launcher_cls = Launcher

        def __init__(self) -> None:
            limits = LIMITS[arch]
            properties = {
                "max_shared_mem": limits.shared_bytes_a_block,
                "multiprocessor_count": limits.processors,
                "warpSize": 32,
            }
            self.utils = SimpleNamespace(
                get_device_properties=lambda device=0: properties,
                # Module, function, registers, local memory in words, most threads of a block.
                load_binary=lambda *_: (1, 1, 0, 0, 1024),
                unload_module=_nothing,
            )
            self.get_device_capability = lambda device=0: divmod(arch, 10)
            self.get_current_stream = lambda device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = _nothing

        def is_active(self) -> bool:
            return True

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_benchmarker(self) -> Any:
            raise RuntimeError("nothing runs here, so nothing can be timed")

    return Driver()


@contextlib.contextmanager
def no_gpu(arch: int = 90, launched: list[Launched] | None = None) -> Iterator[None]:
    """Inside, operators use their kernels for CPU tensors, and launches do nothing.

    The operators return uninitialised memory. `launched` collects the name of each kernel and the
    arguments of its launcher. Raises ValueError where Triton cannot compile.
    """
    require_compiler()
    from triton.runtime import driver

    from encnet_triton.kernels.runtime import dispatch, launch

    before, interpreting = driver._active, dispatch.interpreting
    launch.forget()
    driver.set_active(_make(arch, launched))
    dispatch.interpreting = lambda: True  # makes the operators use kernels for CPU tensors
    try:
        yield
    finally:
        dispatch.interpreting = interpreting
        driver._active = before
        launch.forget()
