"""The repaired interpreter computes rightly, and watching it sees what it should."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from bench.static.interpreter import Misaligned, OutOfBounds, Race, UnwatchedOperation, Watch

pytestmark = pytest.mark.interpreter

HALVES = (torch.bfloat16, torch.float16)


@triton.jit
def dot_kernel(A, B, C, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + m[:, None] * K + k[None, :])
    b = tl.trans(tl.load(B + n[:, None] * K + k[None, :]))
    acc = tl.zeros((M, N), tl.float32)
    tl.store(C + m[:, None] * N + n[None, :], tl.dot(a, b, acc, input_precision=PRECISION))


@triton.jit
def arithmetic_kernel(X, Y, SUM, MAX, N: tl.constexpr, M: tl.constexpr):
    n, m = tl.arange(0, N), tl.arange(0, M)
    at = n[:, None] * M + m[None, :]
    x = tl.load(X + at)
    half = tl.full((N, M), 0.5, x.dtype)
    kept = (x > half) & (m[None, :] < M - 1)
    y = tl.where(kept, x * x + half, -x)
    tl.store(Y + at, y.to(tl.float32))
    tl.store(SUM + n, tl.sum(x.to(tl.float32), 1).to(x.dtype))
    tl.store(MAX + n, tl.max(x, 1))


@triton.jit
def structure_kernel(X, Y, N: tl.constexpr, PARTS: tl.constexpr):
    n = tl.arange(0, N)
    parts = ()
    for j in tl.static_range(PARTS):
        parts = parts + (tl.load(X + j * N + n).to(tl.float32),)
    total = tl.zeros((N,), tl.float32)
    for j in tl.static_range(PARTS):
        total += parts[j]
    even, odd = tl.split(tl.reshape(total, (N // 2, 2)))
    swapped = tl.reshape(tl.join(odd, even), (N,))
    tl.store(Y + n, tl.exp2(swapped) + tl.exp(swapped * 0.0))


@triton.jit
def number_in_mask_kernel(X, Y, rows, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    for row in range(0, 3):
        mask = (at < BLOCK - 1) & (row < rows)
        tl.store(Y + row * BLOCK + at, tl.load(X + at, mask, 0.0))


@triton.jit
def copy_kernel(X, Y, N, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < N, other=0.0)
    tl.store(Y + i + SHIFT, x, mask=i < N)


@triton.jit
def pairs_kernel(X, Y, N: tl.constexpr):
    """Copies N pairs of 16-bit values from X to Y, each pair as one of 32 bits."""
    x, y = X.to(tl.pointer_type(tl.int32)), Y.to(tl.pointer_type(tl.int32))
    tl.store(y + tl.arange(0, N), tl.load(x + tl.arange(0, N)))


@triton.jit
def unaligned_counter_kernel(COUNT):
    tl.atomic_add((COUNT.to(tl.pointer_type(tl.int8)) + 2).to(tl.pointer_type(tl.int32)), 1)


@triton.jit
def range_kernel(X, Y, N):
    total = tl.load(X) * 0
    for i in range(N):
        for j in range(i, tl.load(X + 1)):
            total += tl.load(X + j)
    tl.store(Y, total)


@triton.jit
def ticket_kernel(COUNT, TICKET):
    count = tl.load(COUNT)
    tl.store(TICKET + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), count)
    tl.store(COUNT, count + 1)


@triton.jit
def neighbour_kernel(X, Y):
    """Loads what the next program stores."""
    i = tl.program_id(0)
    tl.store(X + i, tl.load(Y + i) + tl.load(X + i + 1))


@triton.jit
def shared_kernel(Y):
    tl.store(Y, 1.0)


@triton.jit
def atomic_kernel(Y):
    tl.atomic_add(Y, 1.0)


@triton.jit
def last_sums_kernel(X, Y, COUNT, N: tl.constexpr, SEM: tl.constexpr, SCOPE: tl.constexpr):
    """The program that is the last to store its X adds them up."""
    tl.store(X + tl.program_id(0), 1.0)
    if tl.atomic_add(COUNT, 1, sem=SEM, scope=SCOPE) == N - 1:
        tl.store(Y, tl.sum(tl.load(X + tl.arange(0, N)), 0))
        tl.store(COUNT, 0)


@triton.jit
def counted_kernel(COUNT, LOOK: tl.constexpr):
    """Every program counts itself; the first one may look at the count meanwhile."""
    tl.atomic_add(COUNT, 1, sem="relaxed")
    if LOOK and tl.program_id(0) == 0:
        tl.store(COUNT + 1, tl.load(COUNT))


@triton.jit
def assert_kernel(X):
    tl.device_assert(tl.load(X) > 0.0, "x must be positive")


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.bfloat16, "tf32", 1e-6),
        (torch.float16, "tf32", 1e-6),
        (torch.float32, "ieee", 1e-6),
        (torch.float32, "tf32x3", 2e-6),
        (torch.float32, "tf32", 2e-3),
    ],
)
def test_dot_is_exact_within_rounding(dtype, precision, bound) -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(32, 64).to(dtype), torch.randn(16, 64).to(dtype), torch.empty(32, 16)
    dot_kernel[(1,)](a, b, c, 32, 16, 64, precision)
    a, b = a.double(), b.double()
    error = ((c - a @ b.T).abs() / (a.abs() @ b.abs().T)).max().item()
    assert error < bound
    if bound > 1e-4:  # emulated: not more exact than the hardware
        assert error > 1e-5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_arithmetic_and_reductions_round_as_torch_does(dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16).to(dtype)
    y, total, largest = torch.empty(8, 16), torch.empty(8, dtype=dtype), torch.empty(8, dtype=dtype)
    arithmetic_kernel[(1,)](x, y, total, largest, 8, 16)
    kept = (x > 0.5) & (torch.arange(16) < 15)
    assert torch.equal(y, torch.where(kept, x * x + 0.5, -x).float())
    assert torch.equal(total, x.float().sum(1).to(dtype))
    assert torch.equal(largest, x.amax(1))


def test_tuples_static_ranges_and_reshapes() -> None:
    x, y = torch.randn(3, 8).bfloat16(), torch.empty(8)
    structure_kernel[(1,)](x, y, 8, 3)
    swapped = x.float().sum(0).reshape(4, 2).flip(1).reshape(8)
    torch.testing.assert_close(y, torch.exp2(swapped) + 1)


@pytest.mark.parametrize("values", [None, True, False], ids=["alone", "watched", "no values"])
def test_tensors_bound_a_range(values) -> None:
    """Arguments do, and without a Watch what was loaded: it is zero where nothing is loaded."""
    x, y = torch.tensor([1, 4, 2, 8]), torch.zeros(1, dtype=torch.int64)
    with nullcontext() if values is None else Watch(values=values):
        range_kernel[(1,)](x, y, 2)
    assert int(y) == (0 if values is False else 15 + 14)


def test_device_assert_fires() -> None:
    assert_kernel[(1,)](torch.ones(1))
    with pytest.raises(InterpreterError, match="x must be positive"):
        assert_kernel[(1,)](-torch.ones(1))


@pytest.mark.parametrize("values", [True, False])
def test_bytes_of_a_copy_are_exact(values) -> None:
    x, y = torch.randn(1000).bfloat16(), torch.zeros(1000)
    with Watch(values=values, races=True) as watch:
        copy_kernel[(4,)](x, y, 1000, 256, 0)
    (launch,) = watch.launches
    assert (launch.kernel, launch.programs) == ("copy_kernel", 4)
    load, store = launch.loads["X"], launch.stores["Y"]
    assert launch.loads.keys() == {"X"} and launch.stores.keys() == {"Y"}
    assert (load.requested, store.requested) == (2000, 4000)
    assert load.by_program == load.by_launch == 63 * 32  # 2000 bytes end within a sector
    assert store.by_program == store.by_launch == 4000
    assert torch.equal(y, x.float()) == values


def test_programs_are_counted_apart_and_the_launch_together() -> None:
    count, ticket = torch.zeros(1), torch.empty(6)
    with Watch() as watch:
        ticket_kernel[(2, 3)](count, ticket)
        watch.together = 3
        ticket_kernel[(2, 3)](count, ticket)
    load, shared = (launch.loads["COUNT"] for launch in watch.launches)
    assert (load.requested, load.by_program, load.by_launch) == (6 * 4, 6 * 32, 32)
    assert (shared.requested, shared.by_program, shared.by_launch) == (6 * 4, 2 * 32, 32)


@pytest.mark.parametrize("shift", [1, -1, 1 << 20])
def test_a_store_out_of_bounds_is_caught(shift) -> None:
    memory = torch.zeros(3000)
    x, y = torch.randn(1000), memory[1000:2000]
    with (
        pytest.raises(OutOfBounds, match="store of 4 bytes by program .* outside every tensor"),
        Watch(),
    ):
        copy_kernel[(4,)](x, y, 1000, 256, shift)
    assert not memory[:1000].any() and not memory[2000:].any()


def test_the_message_names_program_byte_and_line() -> None:
    with pytest.raises(OutOfBounds) as caught, Watch():
        copy_kernel[(4,)](torch.randn(1000), torch.zeros(1000), 1000, 256, 1)
    line = copy_kernel.fn.__code__.co_firstlineno + 4
    said = str(caught.value)
    assert f"by program (3, 0, 0) at {__file__.rsplit('/', 1)[-1]}:{line}: " in said
    assert "argument Y, byte 4000 of 4000 (1 such elements)" in said


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize(
    ("offsets", "said"),
    [((1, 2), "load of 4 bytes.* argument X"), ((2, 3), "store of 4 bytes.* argument Y")],
)
def test_an_address_that_is_no_multiple_of_the_element_is_caught(offsets, said, values) -> None:
    """Of the element that is accessed, not of the tensor's own."""
    x, y = (torch.zeros(18, dtype=torch.bfloat16)[offset:] for offset in offsets)
    with Watch(values=values):
        copy_kernel[(1,)](x, y, 15, 16, 0)
    with pytest.raises(Misaligned, match=f"{said}, byte 0 of"), Watch(values=values):
        pairs_kernel[(1,)](x, y, 4)


def test_a_misaligned_atomic_is_caught() -> None:
    said = r"atomic of 4 bytes.*COUNT, byte 2 of 8 \(1 such"
    with pytest.raises(Misaligned, match=said), Watch():
        unaligned_counter_kernel[(1,)](torch.zeros(2, dtype=torch.int32))


def test_parameters_that_are_views_of_one_storage() -> None:
    memory = torch.randn(2000)
    with Watch(races=True) as watch:
        copy_kernel[(4,)](memory, memory[1000:], 1000, 256, 0)
    assert torch.equal(memory[:1000], memory[1000:])
    assert watch.launches[0].loads["X"].requested == 4000
    assert watch.launches[0].stores["Y"].requested == 4000


def test_order_of_the_programs() -> None:
    def tickets(order) -> list[int]:
        count, ticket = torch.zeros(1), torch.empty(4, 3)
        with Watch(order=order):
            ticket_kernel[(4, 3)](count, ticket)
        return ticket.flatten().int().tolist()

    assert tickets(None) == list(range(12))
    assert tickets("reverse") == list(range(12))[::-1]
    shuffled = tickets(3)
    assert sorted(shuffled) == list(range(12))
    assert shuffled not in (tickets(None), tickets("reverse"))
    assert shuffled == tickets(3) != tickets(4)


@pytest.mark.parametrize("order", [None, "reverse", 5])
def test_a_load_of_what_another_program_stores_is_a_race(order) -> None:
    with pytest.raises(Race, match="argument X, byte"), Watch(order=order, races=True):
        neighbour_kernel[(4,)](torch.randn(5), torch.randn(4))


def test_two_stores_to_one_address_are_a_race() -> None:
    with Watch(races=True):
        shared_kernel[(1,)](torch.zeros(1))
    with (
        pytest.raises(Race, match=r"store by program \(1, 0, 0\).*used by program \(0, 0, 0\) too"),
        Watch(races=True),
    ):
        shared_kernel[(2,)](torch.zeros(1))


@pytest.mark.parametrize("scope", ["gpu", "sys"])
@pytest.mark.parametrize("order", [None, "reverse", 5])
def test_what_an_atomic_hands_over_is_no_race(order, scope) -> None:
    x, y, count = torch.zeros(8), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    with Watch(order=order, races=True) as watch:
        last_sums_kernel[(8,)](x, y, count, 8, "acq_rel", scope)
    assert y.item() == 8 and count.item() == 0
    # Eight atomics, each a load and a store of 4 bytes, and the last program's reset.
    assert watch.launches[0].loads["COUNT"].requested == 32
    assert watch.launches[0].stores["COUNT"].requested == 36


@pytest.mark.parametrize(
    ("sem", "scope"),
    [("relaxed", "gpu"), ("acquire", "gpu"), ("release", "gpu"), ("acq_rel", "cta")],
)
def test_an_atomic_that_orders_nothing_hands_nothing_over(sem, scope) -> None:
    x, y, count = torch.zeros(8), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Race, match="argument X"), Watch(races=True):
        last_sums_kernel[(8,)](x, y, count, 8, sem, scope)


def test_atomics_race_with_loads_and_not_with_one_another() -> None:
    count = torch.zeros(2, dtype=torch.int32)
    with Watch(races=True):
        counted_kernel[(4,)](count, False)
    assert count.tolist() == [4, 0]
    with pytest.raises(Race, match="atomic by program.*used by"), Watch(races=True):
        counted_kernel[(4,)](count, True)


def test_atomics_on_floats_are_refused_and_the_interpreter_is_put_back() -> None:
    y = torch.zeros(1)
    with pytest.raises(UnwatchedOperation, match="atomics on integers alone"), Watch():
        atomic_kernel[(1,)](y)
    atomic_kernel[(1,)](y)
    assert y.item() == 1


def test_a_mask_may_compare_numbers() -> None:
    # Triton 3.9 as shipped: "mask has unsupported dtype".
    x, y = torch.ones(8), torch.full((3, 8), 5.0)
    number_in_mask_kernel[(1,)](x, y, 2, 8)
    expected = torch.tensor([1.0, 1.0, 0.0])[:, None] * (torch.arange(8) < 7)
    assert torch.equal(y, expected)
