"""Launches made again are those that the plan and Triton would make, on any arguments alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.runtime import driver

from bench.static.driver import no_gpu
from encnet_triton.kernels.batch_norm import plan as norms
from encnet_triton.kernels.encoding import plan as codes
from encnet_triton.kernels.runtime import launch, replay
from encnet_triton.kernels.runtime.launch import Launch
from encnet_triton.kernels.upsampling import plan as maps

compiles = pytest.mark.skipif(launch.interpreting(), reason="the interpreter compiles nothing")
pytestmark = compiles

HALF = torch.bfloat16


def _planes(channels: int = 16, images: int = 2, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(images, 9, channels).to(dtype).transpose(1, 2)


def _affine(channels: int = 16, eps: float = 1e-5) -> Any:
    return norms.Affine(*(torch.rand(channels) for _ in range(4)), eps)


def _double(*size: int) -> Tensor:
    return torch.rand(*size, dtype=torch.float64)


def _running(momentum: float = 0.1) -> Any:
    return norms.Running(torch.zeros(16), torch.ones(16), momentum)


def _logits() -> Tensor:
    return torch.randn(2, 6, 4, 5).to(HALF).contiguous(memory_format=torch.channels_last)


def _target() -> Tensor:
    return torch.randint(0, 6, (2, 8, 10))


def _options(weight: Tensor | None = None, smoothing: float = 0.0) -> Any:
    return maps.options(weight, 255, True, smoothing)


CALLS: dict[str, Callable[[], Any]] = {
    "statistics": lambda: norms.Statistics(_planes(), _running()),
    "packed statistics": lambda: norms.Statistics(_planes(), None),
    "moments": lambda: norms.Moments(_double(33), _running()),
    "normalise": lambda: norms.Normalise(_planes(), _affine(), None, True, False, False),
    "residual": lambda: norms.Normalise(_planes(), _affine(), _planes(), True, True, False),
    "sums": lambda: norms.BackwardSums(
        _planes(), _planes(), torch.zeros(36, dtype=torch.uint8), _affine(), True, False, False
    ),
    "frozen": lambda: norms.BackwardSums(_planes(), _planes(), None, _affine(), True, True, True),
    "input": lambda: norms.BackwardInput(
        _planes(), _planes(), None, _affine(), True, _double(2, 16), _double(1), True
    ),
    "encode": lambda: codes.Forward(_planes(), torch.rand(3, 16), torch.rand(3), True),
    "encode backward": lambda: codes.Backward(
        torch.rand(2, 3, 16), _planes(), torch.rand(3, 16), *2 * (torch.rand(3),), True,
        torch.zeros(3, dtype=torch.int32),
    ),
    "loss": lambda: maps.Forward(_logits(), _target(), _options(), True, False),
    "losses": lambda: maps.Forward(
        _logits(), _target(), _options(torch.rand(6), 0.0), True, True
    ),
    "smooth": lambda: maps.Forward(_logits(), _target(), _options(None, 0.1), False, False),
    "loss backward": lambda: maps.Backward(
        torch.rand(()), _logits(), _target(), torch.rand(2, 8, 10), _options(None, 0.1)
    ),
    "argmax": lambda: maps.ArgMax(_logits(), 8, 10, True, True),
}  # fmt: skip

Launched = tuple[Any, ...]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launched]]:
    """Launches by whichever way, as a program of that name and those arguments; none compiles."""
    made: list[Launched] = []

    def run(one: Launch) -> Any:
        def start(*given: Any) -> None:
            made.append((one.name, *given))

        assert all(type(v) is not replay._Number for v in one.arguments.values())
        given = {**one.arguments, **one.constants}
        start(*replay._three(one.grid), 0, one.name, one.num_warps, None, None, None,
              *(given[name] for name in one.kernel.arg_names))  # fmt: skip
        return SimpleNamespace(run=start, function=one.name, packed_metadata=one.num_warps)

    monkeypatch.setattr(Launch, "run", run)
    monkeypatch.setattr(Launch, "obstacle", lambda _: None)
    monkeypatch.setattr(replay, "_is_known", lambda *_: True)
    with no_gpu():
        yield made


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [leaf for one in value for leaf in _leaves(one)]
    return (
        [leaf for one in vars(value).values() for leaf in _leaves(one)]
        if hasattr(value, "__dict__")
        else []
    )


def _said(made: list[Launched], call: Any, outputs: Any) -> list[Launched]:
    """The launches, with names of the tensors in place of addresses."""
    names: dict[int, str] = {0: "empty"}
    for kind, tensors in (("input", _leaves(call)), ("output", _leaves(outputs))):
        for i, tensor in enumerate(tensors):
            names.setdefault(tensor.data_ptr(), f"{kind} {i}")
    found = []
    for name, *given in made:
        pointers = [v.data_ptr() if isinstance(v, Tensor) else v for v in given]
        for pointer in pointers:
            if type(pointer) is int and pointer > 2**32:
                names.setdefault(pointer, f"scratch {len(names)}")
        found.append((name, *(names[v] if type(v) is int and v in names and v else v
                              for v in pointers)))  # fmt: skip
    return found


def _runs(call: Any, launched: list[Launched]) -> tuple[list[Launched], Any]:
    launched.clear()
    outputs = launch.run(call)
    return _said(list(launched), call, outputs), outputs


@pytest.mark.parametrize("name", CALLS)
def test_the_same_programs_get_the_same_arguments(name: str, launched: list[Launched]) -> None:
    make = CALLS[name]
    planned, before = _runs(make(), launched)
    recorded, _ = _runs(make(), launched)
    (chosen,) = launch._chosen.values()
    assert chosen.replay is not None
    replayed, after = _runs(make(), launched)
    assert planned == recorded == replayed
    assert isinstance(before, Tensor) == isinstance(after, Tensor)
    for one, other in zip(_leaves(before), _leaves(after), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_a_tensor_in_two_places_does_not_decide_for_two_tensors(launched: list[Launched]) -> None:
    x = _planes()
    for _ in range(2):
        launch.run(norms.Normalise(x, _affine(), x, True, True, False))
    call = norms.Normalise(_planes(), _affine(), _planes(), True, True, False)
    launched.clear()
    launch.run(call)
    (one,) = launched
    assert call.x.data_ptr() in one and call.residual.data_ptr() in one


def test_numbers_are_those_of_the_call(launched: list[Launched]) -> None:
    for eps in (1e-5, 1e-5, 1e-3, 2.0):
        launched.clear()
        launch.run(norms.Normalise(_planes(), _affine(eps=eps), None, True, False, False))
        assert [value for value in launched[0] if type(value) is float] == [eps]


UNLIKE: dict[str, Callable[[], Any]] = {
    "images": lambda: _planes(images=3),
    "channels": lambda: _planes(),
    "dtype": lambda: _planes(dtype=torch.float32),
    "layout": lambda: _planes().contiguous(),
    "alignment": lambda: torch.zeros(2 * 9 * 16 + 1, dtype=HALF)[1:].view(2, 9, 16).transpose(1, 2),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_arguments_are_not_replayed(name: str, launched: list[Launched]) -> None:
    def call(x: Tensor) -> Any:
        channels = 8 if name == "channels" else 16
        return norms.Normalise(x[:, :channels], _affine(channels), None, True, False, False)

    for _ in range(3):
        launch.run(norms.Normalise(_planes(), _affine(), None, True, False, False))
    launch.run(call(UNLIKE[name]().clone() if name == "images" else UNLIKE[name]()))
    assert len(launch._chosen) == 2


def test_what_a_plan_computes_is_computed_at_every_call(launched: list[Launched]) -> None:
    """The mean of the class weights."""
    for _ in range(3):
        launch.run(maps.Forward(_logits(), _target(), _options(torch.rand(6), 0.1), True, False))
    (chosen,) = launch._chosen.values()
    assert chosen.recorded and chosen.replay is None


@pytest.mark.parametrize("changed", ["hook", "exit hook", "debug", "pre-run hook"])
def test_triton_launches_where_somebody_listens(
    changed: str, launched: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = CALLS["normalise"]
    for _ in range(2):
        launch.run(call())
    runs: list[str] = []
    original = Launch.run
    monkeypatch.setattr(Launch, "run", lambda one: (runs.append(one.name), original(one))[1])
    launch.run(call())
    assert not runs
    runtime = triton.knobs.runtime
    if changed == "hook":
        monkeypatch.setattr(runtime.launch_enter_hook, "calls", [print])
    elif changed == "exit hook":
        monkeypatch.setattr(runtime, "launch_exit_hook", print)
    elif changed == "debug":
        monkeypatch.setattr(runtime, "debug", not runtime.debug)
    else:
        monkeypatch.setattr(norms.kernels.normalise_kernel, "pre_run_hooks", [print])
    launch.run(call())
    assert runs == ["normalise_kernel"]


def test_programs_of_an_unknown_triton_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = norms.kernels.normalise_kernel
    launches = [SimpleNamespace(kernel=kernel)]
    compiled = object.__new__(triton.compiler.CompiledKernel)
    compiled._run, compiled.function, compiled.packed_metadata = print, 1, ()
    assert replay._is_known(launches, [compiled])
    assert not replay._is_known(launches, [None])
    assert not replay._is_known([SimpleNamespace(kernel=print)], [compiled])
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    assert not replay._is_known(launches, [compiled])


@pytest.mark.slow
def test_a_compiled_program_gets_what_triton_gives_it() -> None:
    """Without a GPU: everything but the launch itself is Triton's own."""
    made: list[Launched] = []
    x, affine = _planes(), _affine()
    call = norms.Normalise(x, affine, None, True, False, False)
    with no_gpu(90, made):
        said = [_runs(call, made)[0] for _ in range(3)]
        (chosen,) = launch._chosen.values()
        assert chosen.replay is not None
        assert driver.active.get_current_stream(0) == 0
    assert len(said[0]) == 1
    # Triton hands over what hooks would be told, and hooks, empty ones where there is none.
    for planned, replayed in ((said[0][0], said[2][0]), (said[1][0], said[2][0])):
        assert planned[:7] == replayed[:7] and planned[10:] == replayed[10:]
        assert replayed[7:10] == (None, None, None)
        assert not any(hook.calls for hook in planned[8:10])
