"""Kernels with a known fault or none, compiled by a process that does not interpret them.

Run by `test_compile_report.py`; prints the reports as JSON by name.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from bench.static.resources import identity, report
from encnet_triton.kernels.runtime.launch import Launch


@triton.jit
def copy(X, Y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < N), mask=i < N)


@triton.jit
def spill(X, Y, N, BLOCK: tl.constexpr):
    """Keeps 256 values per thread through a loop; there are 255 registers."""
    i = tl.arange(0, BLOCK)
    kept = tl.load(X + i)
    for t in range(N):
        kept = kept * kept + tl.load(X + t * BLOCK + i)
    tl.store(Y + i, kept)


@triton.jit
def nothing(X, Y, N, BLOCK: tl.constexpr):
    """Stores nothing, so that no program is left."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.load(X + i, mask=i < N)


@triton.jit
def refused(X, Y, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.static_assert(BLOCK == 1, "planted")
    tl.store(Y + i, tl.load(X + i))


@triton.jit
def too_large(X, Y, N, BLOCK: tl.constexpr):
    """A product whose two operands take 256 KiB of shared memory."""
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(X + i * BLOCK + j).to(tl.float16)
    other = tl.load(X + (i + 64) * BLOCK + j).to(tl.float16)
    tl.store(Y + i * 64 + tl.arange(0, 64)[None, :], tl.dot(x, tl.trans(other)))


@triton.jit
def hasty(X, Y, N, BLOCK: tl.constexpr):
    """Says that its stores are done when only those of one thread are."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + 1 + i, tl.load(X + i, mask=i < N), mask=i < N)
    tl.atomic_add(Y.to(tl.pointer_type(tl.int32)), 1, sem="acq_rel")


@triton.jit
def patient(X, Y, N, BLOCK: tl.constexpr):
    """Waits for the stores of all threads before it says that they are done."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + 1 + i, tl.load(X + i, mask=i < N), mask=i < N)
    tl.debug_barrier()
    tl.atomic_add(Y.to(tl.pointer_type(tl.int32)), 1, sem="acq_rel")


def launch(kernel, x, n=4096, block=1024, warps=4) -> Launch:
    arguments = {"X": x, "Y": torch.empty(4096, device="meta"), "N": n}
    return Launch(kernel, (1,), arguments, {"BLOCK": block}, warps, 1)


def main() -> None:
    x = torch.empty(4100, device="meta")
    planted = {
        "copy": launch(copy, x),
        "unaligned": launch(copy, x[1:]),
        "aligned view": launch(copy, x[4:]),
        "spill": launch(spill, x, block=1 << 15),
        "nothing": launch(nothing, x),
        "refused": launch(refused, x),
        "too large": launch(too_large, x, warps=16),
        "hasty": launch(hasty, x),
        "patient": launch(patient, x),
    }
    programs = {n: identity(launch(copy, x, n), 90) for n in (1, 3600, 3601, 3602, 7200, 1 << 40)}
    found = {name: asdict(report(made, 90)) for name, made in planted.items()}
    print(json.dumps({"reports": found, "programs": programs}))


if __name__ == "__main__":
    main()
