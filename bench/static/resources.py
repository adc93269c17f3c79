"""The resources of one kernel launch, read from the compiled program: no GPU, no driver.

A launch is specialised as Triton would specialise it when run (16-byte alignment, multiples of 16,
ones folded in) and compiled to machine code. `ptxas -v` reports registers, stack and spills, the
disassembly the instructions. Nothing here is timed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from bench.static import flight

if TYPE_CHECKING:
    from encnet_triton.kernels.runtime.launch import Launch


class Limits(NamedTuple):
    """Limits of one streaming multiprocessor, and how many of them a common GPU has."""

    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_a_block: int
    processors: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; processors of
# A100, L40S, H100 SXM, B200 and RTX PRO 6000.
LIMITS = {
    80: Limits(64, 32, 164 << 10, 163 << 10, 108),
    89: Limits(48, 24, 100 << 10, 99 << 10, 142),
    90: Limits(64, 32, 228 << 10, 227 << 10, 132),
    100: Limits(64, 32, 228 << 10, 227 << 10, 148),
    120: Limits(48, 24, 100 << 10, 99 << 10, 188),
}
_REGISTERS = 65536  # 32-bit registers of a multiprocessor, on every architecture
_TENSOR_COLUMNS = 512  # of tensor memory, where there is any

_MATRIX = re.compile(r"[HDIQOB]MMA$|[HIQB]GMMA$|UTC\w*MMA$")
_LOADS = ("LDG", "LD", "LDGSTS", "UTMALDG")
_STORES = ("STG", "ST", "UTMASTG")
_ATOMICS = ("ATOM", "ATOMG", "RED", "REDG", "UTMAREDG")


@dataclass(frozen=True)
class Report:
    """One compiled kernel.

    Attributes:
        num_warps: warps per block, including those that the compiler added.
        stack_bytes: local memory per thread, which also holds what is spilled.
        spill_bytes: bytes that a thread spills, stores and loads added up.
        blocks_per_sm: resident at once, by registers, shared and tensor memory, warps and blocks.
        bytes_in_flight: bytes requested and not used yet, per multiprocessor, at most in the
            largest loop; see `flight`.
        mean_in_flight: the same on average.
        instructions: of the program, without padding.
        dots: matrix products in the kernel as written, loops not unrolled.
        mma: matrix instructions by name, counted in the program text.
        load_widths, store_widths: global accesses, "LDG.16" for 16 bytes per thread, counted.
        accesses: bytes per thread of each access to a tensor argument, counted; only plain loads,
            stores and asynchronous copies, which name an address.
        fits: it can be launched, stores something, and hands over what it stored.
        note: why not, or empty.
    """

    kernel: str
    arch: int
    num_warps: int
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    blocks_per_sm: int = 0
    bytes_in_flight: int = 0
    mean_in_flight: int = 0
    instructions: int = 0
    dots: int = 0
    mma: dict[str, int] = field(default_factory=dict)
    load_widths: dict[str, int] = field(default_factory=dict)
    store_widths: dict[str, int] = field(default_factory=dict)
    accesses: dict[str, dict[int, int]] = field(default_factory=dict)
    fits: bool = False
    note: str = ""


def require_compiler() -> None:
    """Raise a ValueError if this process cannot compile kernels; it says why."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        raise ValueError("TRITON_INTERPRET is set, so Triton compiles nothing here; unset it")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ValueError(
            "triton is not installed; kernels can only be compiled on Linux, where pip installs it"
        ) from None


def compiler_versions(archs: list[int]) -> str:
    """Versions of Triton and of the assemblers it uses for these architectures."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    assemblers = sorted({get_ptxas(arch).version for arch in archs})
    return f"triton {triton.__version__}, ptxas {' and '.join(assemblers)}"


class _Address:
    """Stands for a tensor: Triton specialises on its type and on the alignment of its address."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        # torch aligns every allocation to 512 bytes, so the offset decides; meta tensors have it.
        self._offset = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset


def _source(launch: Launch, arch: int) -> tuple[Any, Any, Any]:
    """(source, target, options) for `triton.compile`, specialised as the launch would be."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    given = {
        name: _Address(value) if isinstance(value, Tensor) else value
        for name, value in launch.arguments.items()
    }
    asked = launch.options() | {"debug": bool(kernel.debug)}
    # What JITFunction.run does before it compiles; it cannot be called, because it needs a driver.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**given, **launch.constants)
    options, signature, constants, attributes = kernel._pack_args(
        backend, asked, bound, specialization, asked
    )
    return ASTSource(kernel, signature, constants, attributes), target, options


def identity(launch: Launch, arch: int) -> str:
    """Equal for launches that run the same program."""
    source, _, options = _source(launch, arch)
    return f"{source.hash()} {options.hash()} {arch}"


@contextlib.contextmanager
def _compiler_settings() -> Iterator[io.StringIO]:
    """Yields the log of ptxas; leaves nothing in the user's cache unless one is set."""
    from triton import knobs

    log = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(knobs.compilation.scope())
        stack.enter_context(knobs.nvidia.scope())
        stack.enter_context(knobs.cache.scope())
        if "TRITON_CACHE_DIR" not in os.environ:
            knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # from a cache there is no log
        stack.enter_context(contextlib.redirect_stdout(log))
        yield log


def report(launch: Launch, arch: int) -> Report:
    """Compile one launch for one compute capability and read the program.

    Raises ValueError where nothing can be compiled; a kernel that does not compile is reported.
    """
    require_compiler()
    import triton

    name = launch.kernel.__name__
    source, target, options = _source(launch, arch)
    try:
        with _compiler_settings() as log:
            compiled = triton.compile(source, target=target, options=options.__dict__)
    except Exception as error:  # the compiler's passes can raise anything
        lines = str(error).strip().splitlines() or ["no message"]
        said = next((line for line in lines if re.search(r"error\s*:|fatal", line)), lines[-1])
        note = f"does not compile: {type(error).__name__}: {said[:200]}"
        return Report(name, arch, launch.num_warps, note=note)
    return _read(compiled, log.getvalue(), name, arch)


def _read(compiled: Any, log: str, name: str, arch: int) -> Report:
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    threads = re.search(r"\.reqntid (\d+)", ptx)
    warps = int(threads[1]) // 32 if threads else int(metadata.num_warps)
    # One line for the kernel and one for each function that was not inlined.
    registers = max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0)
    stack, spills = local_memory(log)
    listing = disassembly(compiled.asm["cubin"])
    program = instructions(listing)
    most, mean = flight.in_flight(listing)
    columns = int(getattr(metadata, "tmem_size", 0) or 0)
    blocks = blocks_per_sm(arch, warps, registers, metadata.shared, columns)
    loads, stores = widths(program, _LOADS), widths(program, _STORES)
    atomics = any(op.partition(".")[0] in _ATOMICS for op in program)
    note = ""
    if not registers:
        note = "ptxas did not report registers"
    elif not blocks:
        note = "does not fit on a multiprocessor"
    elif not stores and not atomics:
        note = f"an empty program: {len(program)} instructions, no global store"
    elif hasty_releases(ptx):
        note = "an atomic releases before the other threads' stores are known to be done"
    return Report(
        kernel=name,
        arch=arch,
        num_warps=warps,
        registers=registers,
        stack_bytes=stack,
        spill_bytes=spills,
        shared_bytes=int(metadata.shared),
        blocks_per_sm=blocks,
        bytes_in_flight=most * 32 * warps * blocks,
        mean_in_flight=round(mean * 32 * warps * blocks),
        instructions=len(program),
        dots=len(re.findall(r"\btt\.dot(?:_scaled)?\b", compiled.asm["ttir"])),
        mma=dict(Counter(op.partition(".")[0] for op in program if _is_matrix(op))),
        load_widths=loads,
        store_widths=stores,
        accesses=accesses(ptx, _pointers(compiled.src.signature)),
        fits=not note,
        note=note,
    )


def local_memory(log: str) -> tuple[int, int]:
    """Bytes of stack and of spills (stores and loads) per thread, from the log of ptxas."""
    stack = max((int(n) for n in re.findall(r"(\d+) bytes stack frame", log)), default=0)
    return stack, sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def blocks_per_sm(arch: int, warps: int, registers: int, shared: int, columns: int = 0) -> int:
    """Blocks resident on a multiprocessor at once; 0 if not even one fits."""
    limits = LIMITS[arch]
    if shared > limits.shared_bytes_a_block or columns > _TENSOR_COLUMNS:
        return 0
    # Registers go to a warp in units of 256, and each of the four schedulers has a quarter.
    a_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = _REGISTERS // 4 // a_warp * 4 // warps
    # The system takes 1 KiB of shared memory for each block, in units of 128 bytes.
    by_shared = limits.shared_bytes // (-(-shared // 128) * 128 + 1024)
    by_columns = _TENSOR_COLUMNS // columns if columns else limits.blocks
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared, by_columns)


def disassembly(cubin: bytes) -> str:
    """The program's machine code as text."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(listing: str) -> list[str]:
    """Names of the instructions of a disassembled program, modifiers included, no padding."""
    return [op for _, op, _ in flight.program(listing) if op.partition(".")[0] != "NOP"]


def _is_matrix(op: str) -> bool:
    return _MATRIX.match(op.partition(".")[0]) is not None


def widths(program: list[str], names: tuple[str, ...]) -> dict[str, int]:
    """Count of accesses by name and bytes per thread; TMA moves boxes and has only a name."""
    found: Counter[str] = Counter()
    for op in program:
        name, *modifiers = op.split(".")
        if name not in names:
            continue
        found[name if name.startswith("U") else f"{name}.{flight.width(modifiers)}"] += 1
    return dict(found)


def _pointers(signature: dict[str, Any]) -> dict[int, str]:
    """Tensor arguments by their place among the compiled kernel's parameters."""
    kept = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    return {i: name for i, (name, kind) in enumerate(kept) if str(kind).startswith("*")}


_PARAMETER = re.compile(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]")
_DERIVED = re.compile(r"^\s*(?:@!?%p\d+\s+)?(?!ld|st|atom|red)[\w.:]+\s+(%rd\d+),(.*);", re.M)
_ACCESS = re.compile(
    r"\b(?:ld|st)\.(?:\w+\.)*?global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s[^\[]*\[\s*(%rd\d+)"
    r"|\bcp\.async\.[\w.:]*global[\w.:]*\s[^\[]*\[[^\]]*\],\s*\[\s*(%rd\d+)[^\]]*\],\s*(\w+)"
)


def accesses(ptx: str, pointers: dict[int, str]) -> dict[str, dict[int, int]]:
    """Bytes per thread of each global access, by the argument that its address comes from."""
    origin: dict[str, set[str]] = {}
    for register, place in _PARAMETER.findall(ptx):
        if int(place) in pointers:
            origin[register] = {pointers[int(place)]}
    steps = [(to, re.findall(r"%rd\d+", rest)) for to, rest in _DERIVED.findall(ptx)]
    # Registers of loops are assigned further down than they are read, hence until nothing changes.
    known = -1
    while known != (known := sum(map(len, origin.values()))):
        for to, used in steps:
            for register in used:
                if register in origin:
                    origin.setdefault(to, set()).update(origin[register])
    found: dict[str, Counter[int]] = {}
    for vector, bits, address, source, size in _ACCESS.findall(ptx):
        width = int(size, 0) if source else int(vector or 1) * int(bits) // 8
        for name in origin.get(source or address, ()):
            found.setdefault(name, Counter())[width] += 1
    return {name: dict(counted) for name, counted in sorted(found.items())}


_GLOBAL_STORE = re.compile(r"\bst\.(?:\w+\.)*global")
_BARRIER = re.compile(r"\b(?:bar|barrier\.cta)\.sync")
_RELEASE = re.compile(r"\b(?:atom|red)\.[\w.:]*(?:release|acq_rel)")


def hasty_releases(ptx: str) -> int:
    """Count releasing atomics that follow a global store without a barrier of the block in between.

    A thread's release covers what the other threads stored only after a barrier with them. Counted
    in the order of the program text.
    """
    waiting, hasty = False, 0
    for line in ptx.splitlines():
        if _GLOBAL_STORE.search(line):
            waiting = True
        elif _BARRIER.search(line):
            waiting = False
        elif _RELEASE.search(line):
            hasty += waiting
    return hasty
