"""Repairs of Triton's interpreter, which as shipped computes wrongly on bfloat16.

It keeps bfloat16 as uint16 bits. Everything here is about values; addresses need no repair, and
that of ranges is in bench/static/interpreter.py, which needs it too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from bench.static.interpreter import quicken

BUILDER = interpreter.interpreter_builder
ARITHMETIC = ("binary_op", "unary_op", "ternary_op", "create_fma")


def repair_interpreter() -> None:
    """Apply every repair; a second call changes nothing."""
    if "create_dot" in vars(BUILDER):
        return
    # As shipped: multiplies bfloat16 bits, and computes tf32 in full float32.
    BUILDER.create_dot = _dot
    # As shipped: adds, multiplies, compares bfloat16 bits as integers.
    for name in ARITHMETIC:
        setattr(BUILDER, name, _in_float32(getattr(InterpreterBuilder, name)))
    # As shipped: truncates float32 to bfloat16, converts other types to and from its bits.
    BUILDER.cast_impl = _cast
    # As shipped: missing, so that tl.full(..., tl.bfloat16) fails.
    BUILDER.get_bf16 = lambda value: _from_float32(np.array([value], np.float32))
    # As shipped: sums and compares bfloat16 bits.
    interpreter.ReduceOps.apply_impl = _reduce_in_float32(interpreter.ReduceOps.apply_impl)
    # As shipped: slow, and in Triton 3.6 with numpy 2.4 and newer no tensor can bound a range.
    quicken()
    # As shipped: tl.device_assert is skipped. The options are a frozen dataclass.
    object.__setattr__(BUILDER.options, "debug", True)


def _is_bfloat16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _to_float32(handle: TensorHandle) -> TensorHandle:
    bits = handle.data.astype(np.uint32) << np.uint32(16)
    return TensorHandle(bits.view(np.float32), tl.float32)


def _from_float32(data: NDArray[Any]) -> TensorHandle:
    """bfloat16 bits, rounded to nearest even."""
    data = np.ascontiguousarray(data, np.float32)
    bits = data.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    nan = np.uint16(0x7FC0)
    return TensorHandle(np.where(np.isnan(data), nan, rounded), tl.bfloat16)


def _in_float32(operation: Any) -> Any:
    """An operation of the builder that computes bfloat16 in float32 and rounds once."""

    def repaired(*operands: Any) -> TensorHandle:
        moves_bits = operands[-1] is np.where
        if moves_bits or not any(map(_is_bfloat16, operands)):
            return operation(BUILDER, *operands)
        result = operation(BUILDER, *(_to_float32(o) if _is_bfloat16(o) else o for o in operands))
        if result.data.dtype == np.bool_:  # a comparison
            return TensorHandle(result.data, tl.int1)
        return _from_float32(result.data)

    return repaired


def _cast(source: TensorHandle, target: tl.dtype) -> TensorHandle:
    if _is_bfloat16(source):
        if target.scalar == tl.bfloat16:
            return source
        source = _to_float32(source)
    if target.scalar == tl.bfloat16:
        return _from_float32(source.data)
    return InterpreterBuilder.cast_impl(BUILDER, source, target)


def _tf32(data: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to the ten bits of mantissa that a tensor core reads."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _dot(
    a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, imprecise: int
) -> TensorHandle:
    """a b + d; bfloat16 and float16 products are exact in float32, where they are added up."""
    left, right = ((_to_float32(h) if _is_bfloat16(h) else h).data for h in (a, b))
    if a.data.dtype == np.float32 and precision.name != "IEEE":
        product = _tf32_products(left, right, three=precision.name == "TF32x3")
    else:
        working = np.result_type(d.data, np.float32)
        product = np.matmul(left.astype(working), right.astype(working))
    return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def _tf32_products(
    left: NDArray[np.float32], right: NDArray[np.float32], three: bool
) -> NDArray[np.float32]:
    """Product of the rounded operands; three: with the two products that make up for it."""
    a, b = _tf32(left), _tf32(right)
    product = np.matmul(a, b)
    if three:
        product += np.matmul(_tf32(left - a), b) + np.matmul(a, _tf32(right - b))
    return product


def _reduce_in_float32(reduce: Any) -> Any:
    def repaired(self: Any, operands: tuple[tl.tensor, ...]) -> Any:
        if not any(_is_bfloat16(o.handle) for o in operands):
            return reduce(self, operands)
        if len(operands) > 1:
            raise TypeError("a reduction of several tensors at once must not hold bfloat16 here")
        wide = tl.tensor(_to_float32(operands[0].handle), _with_element(operands[0], tl.float32))
        result = reduce(self, (wide,))
        result = result[0] if isinstance(result, (list, tuple)) else result
        return tl.tensor(_from_float32(result.handle.data), _with_element(result, tl.bfloat16))

    return repaired


def _with_element(value: tl.tensor, element: tl.dtype) -> tl.dtype:
    shape = [int(n) for n in value.shape]
    return tl.block_type(element, shape) if shape else element
