"""The choice between configurations: what spills much or does not fit is not used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from bench.static.resources import identity
from encnet_triton.kernels.batch_norm import plan as batch_norm_plan
from encnet_triton.kernels.encoding import plan as encoding_plan
from encnet_triton.kernels.runtime import launch
from encnet_triton.kernels.runtime.launch import Config, Launch

BEST, SECOND, LAST = Config(64, 64, 8), Config(32, 64, 8), Config(32, 64, 4, "split")
CPU = torch.device("cpu")


class Kernel:
    """Stands for a kernel whose compiled form is known."""

    fn = SimpleNamespace(__name__="stand_in")

    def __init__(self, local_words: int = 0, fits: bool = True) -> None:
        self.local_words, self.fits, self.compiled, self.launched = local_words, fits, 0, 0

    def warmup(self, **_: object) -> SimpleNamespace:
        self.compiled += 1
        if not self.fits:
            raise triton.runtime.OutOfResources(200_000, 101_376, "shared memory")
        return SimpleNamespace(run=None, n_spills=self.local_words)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, **_: object) -> None:
        self.launched += 1


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_obstacles", {})


def choose(kernels: dict[Config, Kernel], device: torch.device = CPU, **arguments: Any) -> str:
    """The configuration that ran."""

    def launches(config: Config) -> tuple[list[Launch], str]:
        return [Launch(kernels[config], (1,), arguments, {}, config.num_warps)], str(config)

    with launch.on(device):
        config, made, outputs = launch.choose(list(kernels), launches, device)
        launch.run_all(made)
    assert str(config) == outputs
    return outputs


def test_the_first_configuration_is_taken_if_it_compiles_well() -> None:
    kernels = {BEST: Kernel(), SECOND: Kernel(), LAST: Kernel()}
    assert choose(kernels) == choose(kernels) == str(BEST)
    assert [k.compiled for k in kernels.values()] == [1, 0, 0]
    assert [k.launched for k in kernels.values()] == [2, 0, 0]


def test_local_and_too_much_memory_lead_to_the_next_one_and_one_line_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The driver counts local memory in words, a stack without spills too."""
    kernels = {BEST: Kernel(fits=False), SECOND: Kernel(local_words=9), LAST: Kernel(99)}
    with caplog.at_level(logging.WARNING):
        assert choose(kernels) == choose(kernels) == str(LAST)
    assert [k.compiled for k in kernels.values()] == [1, 1, 0]
    assert [k.launched for k in kernels.values()] == [0, 0, 2]
    first, second = (record.getMessage() for record in caplog.records)
    assert "does not fit" in first and "'tiles n32 c64 w8' in place of 'tiles n64 c64 w8'" in first
    assert "36 bytes of local memory (stack and spills)" in second
    assert triton.__version__ in second


def test_a_few_registers_in_local_memory_cost_less_than_the_next_configuration() -> None:
    """Triton 3.6, 3.8 and 3.9 put 24, 8 and 16 bytes of `encode`'s first one there (backward)."""
    kernels = {BEST: Kernel(local_words=8), LAST: Kernel()}
    assert choose(kernels) == str(BEST)


def test_nothing_is_launched_for_an_empty_grid() -> None:
    launched: list[tuple[int, ...]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **_: launched.append(grid)

    launches = [Launch(Recorded(), grid, {}, {}, 4) for grid in ((3,), (0,), (2, 0), (2, 2))]
    launch.run_all(launches)
    assert launched == [(3,), (2, 2)]


def test_kernels_compile_load_and_run_on_the_device_of_the_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton takes the current device, which need not be x's."""
    current = [torch.device("cuda", 0)]
    seen: list[tuple[str, torch.device]] = []

    @contextmanager
    def device(new: torch.device) -> Iterator[None]:
        current.append(new)
        yield
        current.pop()

    class Compiled:
        n_spills = 0

        @property
        def run(self) -> None:
            seen.append(("loads", current[-1]))

    class Watching(Kernel):
        def warmup(self, **_: object) -> Any:
            seen.append(("compiles", current[-1]))
            return Compiled()

        def _launch(self, **_: object) -> None:
            seen.append(("runs", current[-1]))

    monkeypatch.setattr(torch.cuda, "device", device)
    second = torch.device("cuda", 1)
    choose({BEST: Watching(), LAST: Watching()}, second)
    assert seen == [("compiles", second), ("loads", second), ("runs", second)]
    assert current == [torch.device("cuda", 0)]


def test_each_device_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of a machine need not be of one kind."""
    monkeypatch.setattr(launch, "on", lambda _: contextmanager(lambda: iter([None]))())
    kernels = {BEST: Kernel(), LAST: Kernel()}
    for index in (0, 1, 0, 1):
        choose(kernels, torch.device("cuda", index))
    assert kernels[BEST].compiled == 2


@triton.jit
def planted(X, Y, N, M):
    pass


MEMORY = torch.zeros(64, dtype=torch.bfloat16)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "another size": {"N": 17 * 16},
    "odd size": {"N": 17},
    "another odd size": {"N": 15},
    "size one": {"N": 1},
    "a long size": {"N": 2**31},
    "an odd long size": {"N": 2**31 + 1},
    "a size of 64 bits": {"N": 2**63},
    "negative": {"N": -16},
    "a long negative": {"N": -(2**31) - 16},
    "a flag": {"N": True},
    "a number": {"N": 16.0},
    "another number": {"N": 0.5},
    "nothing": {"N": None},
    "offset 1": {"X": MEMORY[1:]},
    "offset 2": {"X": MEMORY[2:]},
    "offset 8": {"X": MEMORY[8:]},
    "both offset": {"X": MEMORY[1:], "Y": MEMORY[1:]},
    "the other offset": {"Y": MEMORY[1:]},
    "another dtype": {"X": MEMORY.float()},
    "swapped": {"N": 17, "M": 16},
    "swapped back": {"M": 17},
}


@pytest.mark.skipif(launch.interpreting(), reason="the interpreter compiles nothing")
def test_what_triton_compiles_anew_is_looked_at_anew() -> None:
    """And what runs the same program is not, but where the two differ in a flag."""
    made = {
        name: Launch(planted, (1,), {"X": MEMORY, "Y": MEMORY, "N": 16, "M": 32} | given, {}, 4)
        for name, given in ARGUMENTS.items()
    }
    programs = {name: identity(one, 90) for name, one in made.items()}
    for name, program in programs.items():
        for other, another in programs.items():
            same = made[name].program() == made[other].program()
            assert same == (program == another), f"{name}, {other}"


@pytest.mark.parametrize(
    "changed",
    [
        {"num_warps": 8},
        {"num_stages": 2},
        {"max_registers": 128},
        {"constants": {"BLOCK": 64}},
        {"kernel": Kernel()},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_the_compiler_is_told_is_part_of_a_program(changed: dict[str, Any]) -> None:
    given = {"kernel": Kernel(), "constants": {"BLOCK": 32}, "num_warps": 4}
    one = Launch(grid=(1,), arguments={}, **given)
    assert one.program() == Launch(grid=(2,), arguments={}, **given).program()
    assert one.program() != Launch(grid=(1,), arguments={}, **(given | changed)).program()


@pytest.mark.skipif(launch.interpreting(), reason="the interpreter compiles nothing")
def test_sums_of_products_are_fused_whatever_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """As instructions, which Triton means to leave to those who ask for it."""
    one = Launch(planted, (1,), {"X": MEMORY, "Y": MEMORY, "N": 16, "M": 32}, {}, 4)
    program = identity(one, 90)
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    assert identity(one, 90) == program


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Launches that would have run; kernels need no GPU and none is compiled."""
    made: list[Launch] = []
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(Launch, "run", lambda one: made.append(one))
    monkeypatch.setattr(Launch, "obstacle", lambda _: None)
    return made


def backward_of_batch_norm(images: int, pixels: int, channels: int = 64) -> None:
    x = torch.zeros(images, pixels, channels, dtype=torch.bfloat16).transpose(1, 2)
    mean = torch.zeros(channels)
    affine = batch_norm_plan.Affine(mean, mean, mean, mean, 1e-5)
    sums, count = torch.zeros(2, channels, dtype=torch.float64), torch.ones(1).double()
    launch.run(batch_norm_plan.BackwardInput(x, x, None, affine, True, sums, count, False))


def test_a_small_batch_does_not_decide_the_tile_of_a_large_one(
    ran: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that takes one tile is another than one that takes several."""

    def obstacle(one: Launch) -> str | None:
        return "takes a stack" if one.arguments["per"] == 1 and one.num_warps == 8 else None

    monkeypatch.setattr(Launch, "obstacle", obstacle)
    backward_of_batch_norm(1, 64)
    backward_of_batch_norm(8, 3600)
    assert [one.arguments["per"] > 1 for one in ran] == [False, True]
    assert [one.num_warps for one in ran] == [4, 8]


def test_encode_is_looked_at_anew_for_an_odd_storage_offset(
    ran: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrower loads take other registers."""

    def obstacle(one: Launch) -> str | None:
        x = one.arguments.get("X")
        return None if x is None or x.data_ptr() % 16 == 0 else "spills"

    def kernels_of(x: Tensor) -> list[str]:
        ran.clear()
        features = x.view(2, 100, 256).transpose(1, 2)
        launch.run(encoding_plan.Forward(features, torch.zeros(32, 256), torch.zeros(32), False))
        return [one.name for one in ran]

    monkeypatch.setattr(Launch, "obstacle", obstacle)
    memory = torch.zeros(2 * 100 * 256 + 1, dtype=torch.bfloat16)
    aligned, unaligned = kernels_of(memory[:-1]), kernels_of(memory[1:])
    assert aligned == ["forward_kernel", "finish_forward_kernel"]
    assert unaligned == ["weights_kernel", "aggregate_kernel", "finish_forward_kernel"]


def test_what_was_chosen_is_not_looked_for_again(
    ran: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither are launches of a bad configuration made again, with the memory of their outputs."""
    made: list[int] = []
    original = batch_norm_plan.BackwardInput.launches

    def launches(call: Any, machine: launch.Machine, config: Config) -> Any:
        made.append(config.num_warps)
        return original(call, machine, config)

    monkeypatch.setattr(batch_norm_plan.BackwardInput, "launches", launches)
    monkeypatch.setattr(Launch, "obstacle", lambda one: "spills" if one.num_warps == 8 else None)
    for _ in range(3):
        backward_of_batch_norm(8, 3600)
    assert made == [8, 4, 4, 4]
    assert [one.num_warps for one in ran] == [4, 4, 4]


X = torch.zeros(2, 64, 256, dtype=torch.bfloat16)
NORMAL: dict[str, Any] = {"x": X, "codewords": torch.zeros(32, 64), "scale": torch.zeros(32)}
LIKE = {
    "other values": {"x": X + 1},
    "another place": {"x": X.clone()},
}
UNLIKE = {
    "images": {"x": X[:1]},
    "pixels": {"x": X[:, :, :128].contiguous()},
    "strides": {"x": X.transpose(1, 2).contiguous().transpose(1, 2)},
    "dtype": {"x": X.half()},
    "alignment": {"x": torch.zeros(X.numel() + 1, dtype=X.dtype)[1:].view(X.shape)},
    "codewords": {"codewords": torch.zeros(16, 64)},
    "an option": {"return_stats": True},
}


@pytest.mark.parametrize("changed", [*LIKE, *UNLIKE])
def test_what_is_chosen_holds_for_arguments_that_are_alike(changed: str) -> None:
    def kinds(**given: Any) -> Any:
        call = encoding_plan.Forward(**{**NORMAL, "return_stats": False, **given})
        return launch._kinds(call)

    assert (kinds() == kinds(**(LIKE | UNLIKE)[changed])) == (changed in LIKE)


def test_a_number_counts_by_whether_it_is_above_0() -> None:
    """A momentum that falls with every step needs no choice of its own."""
    sums = torch.zeros(9, dtype=torch.float64)

    def kinds(momentum: float, mean: Tensor | None = None) -> Any:
        running = batch_norm_plan.Running(mean, mean, momentum)
        return launch._kinds(batch_norm_plan.Moments(sums, running))

    assert kinds(0.1) == kinds(0.05) != kinds(0.0)
    assert kinds(0.1) != kinds(0.1, torch.zeros(4))
