"""Launches made again are those that the body and Triton would make, on any arguments alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

pytest.importorskip("triton")

import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver

from bench.static.driver import no_gpu
from encnet_triton.kernels import (
    batch_norm_act,
    batch_norm_act_forked,
    encode,
    upsample_argmax,
    upsample_cross_entropy,
)
from encnet_triton.kernels.batch_norm import library as norm_library
from encnet_triton.kernels.batch_norm import operator as norm_operators
from encnet_triton.kernels.batch_norm import plan as norms
from encnet_triton.kernels.encoding import fused
from encnet_triton.kernels.runtime import launch, replay
from encnet_triton.kernels.runtime.launch import Launch
from encnet_triton.kernels.runtime.replay import Repeated
from tests.support.batch_norm import OF_RESIDUAL
from tests.support.batch_norm import call as called

compiles = pytest.mark.skipif(launch.interpreting(), reason="the interpreter compiles nothing")
pytestmark = compiles

HALF = torch.bfloat16
Launched = tuple[Any, ...]
# A call and its tensors, whose gradients are asked for where they require them.
Case = tuple[Callable[..., Any], dict[str, Tensor]]


def _last(*size: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)


def _shifted(tensor: Tensor) -> Tensor:
    """The same in memory that does not begin at a multiple of 16 bytes."""
    storage = tensor.new_empty(tensor.numel() + 1)[1:]
    return storage.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


def _norm(channels: int = 16, images: int = 2, size: int = 3, **options: Any) -> Case:
    dtype, residual = options.pop("dtype", HALF), options.pop("residual", False)
    tensors = {"x": _last(images, channels, size, size, dtype=dtype)}
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensors[name] = torch.rand(channels)
    if residual:
        tensors["residual"] = _last(images, channels, size, size, dtype=dtype)
    if options.pop("normalised", False):
        tensors |= {name: torch.rand(channels) for name in OF_RESIDUAL}
    given: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": 1e-5, **options}
    function = batch_norm_act_forked if given.pop("forked", False) else batch_norm_act
    return lambda **t: called(function, t, **given), tensors


def _encode(channels: int = 16, stats: bool = True, shake: bool = False) -> Case:
    tensors = {"x": _last(2, channels, 3, 3), "codewords": torch.rand(3, channels)}
    tensors |= {"scale": torch.rand(3)}
    if shake:
        tensors["backward_scale"] = torch.rand(3)
    return lambda **t: encode(**t, return_stats=stats), tensors


def _loss(height: int = 8, **options: Any) -> Case:
    target = torch.randint(0, 6, (2, height, 10))
    tensors = {"logits": _last(2, 6, 4, 5), "target": target}
    if options.pop("weighted", False):
        tensors["weight"] = torch.rand(6)
    return lambda **t: upsample_cross_entropy(**t, **options), tensors


CASES: dict[str, Callable[[], Case]] = {
    "norm": _norm,
    "norm residual": lambda: _norm(residual=True),
    "norm residual linear": lambda: _norm(residual=True, activation=None),
    "norm forked": lambda: _norm(residual=True, forked=True),
    "norm, residual normalised": lambda: _norm(residual=True, normalised=True),
    "norm forked, residual normalised": lambda: _norm(residual=True, normalised=True, forked=True),
    "norm frozen": lambda: _norm(training=False),
    "norm frozen residual": lambda: _norm(training=False, residual=True),
    "encode": lambda: _encode(stats=False),
    "encode statistics": _encode,
    "encode shake": lambda: _encode(shake=True),
    "loss": _loss,
    "loss sum": lambda: _loss(reduction="sum", label_smoothing=0.1),
    "losses": lambda: _loss(reduction="none"),
    "argmax": lambda: (
        lambda logits: upsample_argmax(logits, (8, 10), return_prob=True),
        {"logits": _last(2, 6, 4, 5)},
    ),
}
cases = pytest.mark.parametrize("name", CASES)
# There before all that a call allocates.
GRADS = {dtype: torch.ones(2, 4096, dtype=dtype) for dtype in (HALF, torch.float32, torch.uint8)}
DIFFERENTIABLE = {"x", "weight", "bias", "residual", "codewords", "scale", "logits"}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What replays allocate stays, so that addresses tell tensors apart."""
    made: list[Tensor] = []

    def keeping(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def keep(*given: Any, **named: Any) -> Tensor:
            made.append(allocate(*given, **named))
            return made[-1]

        return keep

    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, keeping(getattr(torch, name)))
    allocator = replay._allocator
    monkeypatch.setattr(replay, "_allocator", lambda device: keeping(allocator(device)))
    return made


@pytest.fixture
def launched(kept: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launched]]:
    """Launches by whichever way, with all that Triton compiles for; none compiles.

    Those that a plan and Triton make have a mark in front.
    """
    made: list[Launched] = []

    def run(one: Launch) -> Any:
        def start(*given: Any) -> None:
            made.append((one.name, *given))

        assert all(type(v) is not replay._Number for v in one.arguments.values())
        given = {**one.arguments, **one.constants}
        made.append(("by Triton",))
        program = one.program()[1:]
        start(*replay._three(one.grid), 0, program, one.num_warps, None, None, None,
              *(given[name] for name in one.kernel.arg_names))  # fmt: skip
        return SimpleNamespace(run=start, function=program, packed_metadata=one.num_warps)

    monkeypatch.setattr(Launch, "run", run)
    monkeypatch.setattr(Launch, "obstacle", lambda _: None)
    monkeypatch.setattr(replay, "_is_known", lambda *_: True)
    with no_gpu():
        yield made


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [leaf for one in value for leaf in _leaves(one)]
    return [value] if isinstance(value, Tensor) else []


def _said(made: list[Launched], tensors: dict[str, Tensor]) -> list[Launched]:
    """The launches, with names in place of addresses."""
    names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    found = []
    for name, *given in made:
        values = [v.data_ptr() if isinstance(v, Tensor) else v for v in given]
        for value in values:
            if type(value) is int and value > 2**32:
                names.setdefault(value, f"buffer {len(names)}")
        found.append((name, *(names.get(v, v) if type(v) is int else v for v in values)))
    return found


def _runs(case: Case, launched: list[Launched]) -> tuple[list[Launched], list[Tensor]]:
    """The launches of forward and backward, and all that they return."""
    call, tensors = case
    launched.clear()
    for name in DIFFERENTIABLE & tensors.keys():
        tensors[name].requires_grad_()
    with torch.enable_grad():
        outputs = _leaves(call(**tensors))
    y = outputs[0]
    grad, other = (row.as_strided(y.shape, y.stride()) for row in GRADS[y.dtype])
    # A y that is returned for two uses has two gradients.
    uses = [t for t in outputs if t.requires_grad and t.data_ptr() == y.data_ptr()]
    if uses:
        torch.autograd.backward(uses, [grad, other][: len(uses)])
    outputs += [tensors[n].grad for n in sorted(tensors) if tensors[n].grad is not None]
    # What launches hold is alive until here, so that no memory is given out twice.
    return _said(launched, {**tensors, "grad": grad, "other": other}), outputs


def _by_triton(said: list[Launched]) -> bool:
    return ("by Triton",) in said


def _launches(said: list[Launched]) -> list[Launched]:
    return [one for one in said if one != ("by Triton",)]


@cases
def test_the_same_programs_get_the_same_arguments(name: str, launched: list[Launched]) -> None:
    planned, before = _runs(CASES[name](), launched)
    watched, _ = _runs(CASES[name](), launched)
    replayed, after = _runs(CASES[name](), launched)
    assert _by_triton(planned) and _by_triton(watched) and not _by_triton(replayed)
    assert _launches(planned) == _launches(watched) == replayed
    for one, other in zip(before, after, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("known", [True, False], ids=["torch has one", "torch has none"])
def test_what_allocates_gives_what_was_asked_for(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    empty = replay._allocator(torch.device("cpu"))
    for shape, strides, dtype in (((2, 3, 4), (12, 1, 3), HALF), ((9,), (1,), torch.uint8)):
        made = empty(shape, strides, dtype)
        assert (made.shape, made.stride(), made.dtype) == (shape, strides, dtype)
        assert made.untyped_storage().nbytes() == made.numel() * made.element_size()
        assert not made.requires_grad
    with torch.inference_mode():
        assert empty((9,), (1,), torch.float32).is_inference()


def test_operators_that_compiled_code_calls_repeat_launches(launched: list[Launched]) -> None:
    for _ in range(3):
        launched.clear()
        x, rows = _planes(), [torch.rand(16) for _ in range(4)]
        mean, var, count = norm_library.moments(x, *rows[:2], 0.1)
        given = x, mean, var, count, *rows[2:], None, True, 1e-5, False, "", False
        norm_library.normalise(*given, None, None, None, None)
    assert len(launched) == 3 and not _by_triton(launched)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Operators of a layer whose calls take the dispatcher, from now on."""
    seen: list[Any] = []

    def watched(operator: Any, dispatch: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*given: Any, **named: Any) -> Any:
            seen.append(operator)
            return dispatch(*given, **named)

        return watching

    layer = [norm_library.moments, norm_library.normalise]
    layer += [norm_library.backward_sums, norm_library.backward_input]
    for operator in layer:
        shortcut = operator._opoverload._op
        monkeypatch.setattr(shortcut, "_dispatch", watched(operator, shortcut._dispatch))
    return seen


def test_compiled_code_repeats_launches_without_the_dispatcher(
    launched: list[Launched], dispatched: list[Any]
) -> None:
    call, tensors = _norm()
    x = tensors["x"].requires_grad_()
    compiled = torch.compile(lambda x: call(**{**tensors, "x": x}), backend="aot_eager")
    for _ in range(4):
        launched.clear()
        dispatched.clear()
        compiled(x).backward(torch.ones_like(x))
    assert len(launched) == 6 and not _by_triton(launched)
    # This backend calls what changes arguments by their names, which Inductor does not.
    assert dispatched == [norm_library.moments]


def test_what_changes_arguments_says_so_without_the_dispatcher(
    launched: list[Launched], dispatched: list[Any]
) -> None:
    x, rows = _planes(), [torch.rand(16) for _ in range(2)]
    for _ in range(3):
        dispatched.clear()
        before = rows[0]._version
        norm_library.moments._opoverload(x, *rows, 0.1)
    assert not dispatched and rows[0]._version > before


def test_the_dispatcher_sees_what_autograd_records(
    launched: list[Launched], dispatched: list[Any]
) -> None:
    x, mean, count = _planes(), torch.rand(16), torch.ones(1, dtype=torch.float64)
    given = x, mean, mean + 1, count, mean + 2, mean + 3, None, True, 1e-5, False, "", False
    for _ in range(3):
        dispatched.clear()
        norm_library.normalise._opoverload(*given, None, None, None, None)
    assert not dispatched
    x.requires_grad_()
    y = norm_library.normalise._opoverload(*given, None, None, None, None)[0]
    assert y.requires_grad and dispatched == [norm_library.normalise]


def _with(case: Case, name: str, change: Callable[[Tensor], Tensor]) -> Case:
    return case[0], {**case[1], name: change(case[1][name])}


# Calls whose launches are not those of the case they are named after.
UNLIKE: dict[str, tuple[str, Callable[[], Case]]] = {
    "images": ("norm", lambda: _norm(images=3)),
    "channels": ("norm", lambda: _norm(channels=32)),
    "pixels": ("norm", lambda: _norm(size=4)),
    "dtype": ("norm", lambda: _norm(dtype=torch.float32)),
    "layout": ("norm", lambda: _with(_norm(), "x", Tensor.contiguous)),
    "activation": ("norm", lambda: _norm(activation=None)),
    "eps": ("norm", lambda: _norm(eps=0.0)),
    "x at an odd place": ("norm", lambda: _with(_norm(), "x", _shifted)),
    "weight at an odd place": ("norm", lambda: _with(_norm(), "weight", _shifted)),
    "variance at an odd place": ("norm", lambda: _with(_norm(), "running_var", _shifted)),
    "weight in half precision": ("norm", lambda: _with(_norm(), "weight", Tensor.bfloat16)),
    "no residual": ("norm residual", _norm),
    "residual at an odd place": (
        "norm residual",
        lambda: _with(_norm(residual=True), "residual", _shifted),
    ),
    "training": ("norm frozen", _norm),
    "x of encode at an odd place": ("encode", lambda: _with(_encode(stats=False), "x", _shifted)),
    "channels of encode": ("encode", lambda: _encode(channels=32, stats=False)),
    "statistics": ("encode", _encode),
    "mean": ("loss sum", lambda: _loss(label_smoothing=0.1)),
    "smoothing": ("loss", lambda: _loss(label_smoothing=0.1)),
    "ignored": ("loss", lambda: _loss(ignore_index=1)),
    "corners": ("loss", lambda: _loss(align_corners=False)),
    "height": ("loss", lambda: _loss(height=1)),
    "labels": ("loss", lambda: _with(_loss(), "target", Tensor.byte)),
    "logits at an odd place": ("loss", lambda: _with(_loss(), "logits", _shifted)),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_arguments_are_not_replayed(name: str, launched: list[Launched]) -> None:
    """The first calls decide nothing: the launches are those of a process that made no others."""
    like, unlike = CASES[UNLIKE[name][0]], UNLIKE[name][1]
    expected, _ = _runs(unlike(), launched)
    launch.forget()
    for _ in range(3):
        said, _ = _runs(like(), launched)
    assert not _by_triton(said)
    found, _ = _runs(unlike(), launched)
    assert _launches(found) == _launches(expected)


def test_tensors_that_were_one_by_chance_decide_nothing(launched: list[Launched]) -> None:
    """x itself as the residual, then two tensors."""
    call, tensors = _norm(residual=True)
    for _ in range(2):
        _runs((call, {**tensors, "residual": tensors["x"]}), launched)
    said = [_runs(_norm(residual=True), launched)[0] for _ in range(3)]
    assert not _by_triton(said[2]) and _launches(said[0]) == said[2]
    assert any("residual" in one and "x" in one for one in said[2])


def test_numbers_are_those_of_the_call(launched: list[Launched]) -> None:
    for eps, momentum in ((1e-5, 0.1), (1e-5, 0.1), (1e-3, 0.3), (2.0, 0.9)):
        said, _ = _runs(_norm(eps=eps, momentum=momentum), launched)
        assert {v for one in said for v in one if type(v) is float} == {eps, momentum}
    assert not _by_triton(said)


@pytest.mark.parametrize("options", [{"training": False}, {"momentum": None, "training": False}])
def test_a_known_call_is_not_checked_again(
    options: dict[str, Any], launched: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation nothing looks at the momentum, so it makes no other kind of call."""
    for _ in range(2):
        _runs(_norm(**options), launched)
    monkeypatch.setattr(norm_operators, "check_arguments", None)
    assert not _by_triton(_runs(_norm(**options), launched)[0])


def test_ever_new_sizes_do_not_fill_the_memory(
    launched: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MOST_KINDS", 4)
    monkeypatch.setattr(launch, "MOST_KINDS", 10)
    for size in range(2, 10):
        for _ in range(3):
            said, _ = _runs(_norm(size=size), launched)
        assert not _by_triton(said)
        forward = norm_operators._forward
        assert len(forward._replays) <= len(forward._calls) <= 4
        assert len(launch._chosen) <= 10


def test_running_statistics_count_their_changes(launched: list[Launched]) -> None:
    for _ in range(4):
        call, tensors = _norm()
        before = tensors["running_mean"]._version
        _runs((call, tensors), launched)
        assert tensors["running_mean"]._version > before
    assert not _by_triton(launched)


def test_what_is_refused_stays_refused(launched: list[Launched]) -> None:
    for _ in range(3):
        _runs(_norm(eps=0.0), launched)
        _runs(_loss(label_smoothing=0.1), launched)
    for eps in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="eps must be at least 0"):
            _runs(_norm(eps=eps), launched)
    with pytest.raises(ValueError, match="label_smoothing must be 0 to 1"):
        _runs(_loss(label_smoothing=1.5), launched)
    for training in (1, torch.tensor(True)):
        with pytest.raises(TypeError, match="training must be True or False"):
            _runs(_norm(training=training), launched)
    with pytest.raises(TypeError, match="must be a dense tensor"):
        _runs(_with(_norm(), "x", lambda x: x.detach().to_sparse()), launched)


@cases
def test_dual_numbers_stay_refused(name: str, launched: list[Launched]) -> None:
    call, tensors = CASES[name]()
    for _ in range(3):
        call(**tensors)
    given = next(n for n in ("x", "logits") if n in tensors)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[given], torch.ones_like(tensors[given]))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            call(**{**tensors, given: dual})


def test_zeros_that_have_no_memory_get_some(launched: list[Launched]) -> None:
    zeros = torch._efficientzerotensor((2, 9, 16), dtype=HALF)
    assert zeros.data_ptr() == 0
    for x in (zeros, *[torch.randn(2, 9, 16).to(HALF)] * 3, zeros):
        launched.clear()
        encode(x, torch.rand(3, 16), torch.rand(3))
        given = launched[-1][-len(fused.forward_kernel.arg_names) :]
        assert (given[0].data_ptr() if isinstance(given[0], Tensor) else given[0]) != 0


def _pass(x: Tensor, *of_channels: Tensor) -> tuple[Tensor, ...]:
    """A pass of one launch: y and an empty mask."""
    affine = norms.Affine(*of_channels, eps=1e-5)
    return launch.run(norms.Normalise(x, affine, None, True, False, False))


def _planes() -> Tensor:
    return torch.randn(2, 9, 16).to(HALF).transpose(1, 2)


OTHER = torch.rand(16)
BODIES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "computes": lambda x, y: _pass(x, y + 1, y, y, y),
    "changes": lambda x, y: _pass(x, y.add_(1), y, y, y),
    "copies": lambda x, y: _pass(x.contiguous(), y, y, y, y),
    "knows another tensor": lambda x, y: _pass(x, y, OTHER, y, y),
    "returns an argument": lambda x, y: (*_pass(x, y, y, y, y), y),
    "returns a part": lambda x, y: _pass(x, y, y, y, y)[0][:, :4],
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_not_understood_runs(name: str, launched: list[Launched]) -> None:
    repeated = Repeated(BODIES[name])
    for _ in range(6):
        launched.clear()
        repeated(_planes(), torch.rand(16))
        assert _by_triton(launched)


def _scaled(x: Tensor, y: Tensor, number: float) -> Tensor:
    affine = norms.Affine(y, y, y, y, eps=2 * number)
    return launch.run(norms.Normalise(x, affine, None, True, False, False))[0]


def _compiled_for(x: Tensor, y: Tensor, number: float) -> Tensor:
    call = norms.Normalise(x, norms.Affine(y, y, y, y, eps=number), None, True, False, False)
    here = launch.machine(x.device)
    (one,), outputs = call.launches(here, call.configs(here)[0])
    launch.run_all([replace(one, constants={**one.constants, "BP": number})])
    return outputs[0]


@pytest.mark.parametrize("body", [_scaled, _compiled_for])
def test_a_number_made_of_one_or_compiled_in_is_that_of_the_call(
    body: Callable[..., Tensor], launched: list[Launched]
) -> None:
    repeated, names = Repeated(body), norms.kernels.normalise_kernel.arg_names
    for number in (0.5, 0.5, 0.5, 0.25):
        launched.clear()
        repeated(_planes(), torch.rand(16), number)
        given = dict(zip(names, launched[-1][-len(names) :], strict=True))
        assert given["eps"] == 2 * number if body is _scaled else given["BP"] == number


def test_parts_of_arguments_and_buffers_are_found_again(launched: list[Launched]) -> None:
    def body(x: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
        kept, scratch = both.new_empty(48), both.new_empty(64)
        y, _ = _pass(x, both[:16], both[16:], kept[4:20], scratch[8:24])
        _pass(x, both[16:], kept[:16], scratch[:16], scratch[8:24])
        return y, kept

    repeated = Repeated(body)
    for _ in range(4):
        launched.clear()
        x, both = _planes(), torch.rand(32)
        y, kept = repeated(x, both)
        first, second = _launches(_said(launched, {"x": x, "y": y, "both": both, "kept": kept}))
        places = dict(zip(norms.kernels.normalise_kernel.arg_names, first[10:], strict=True))
        given = [v.data_ptr() if isinstance(v, Tensor) else v for v in launched[-1]]
        assert (places["X"], places["Y"], places["Mean"]) == ("x", "y", "both")
        assert {both.data_ptr() + 64, kept.data_ptr()} <= set(given)
        assert first[-20:] != second[-20:]
    assert not _by_triton(launched)


@pytest.mark.parametrize("changed", ["hook", "exit hook", "another hook", "debug", "pre-run hook"])
def test_triton_launches_where_somebody_listens(
    changed: str, launched: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    def listen(*_: Any, **__: Any) -> None:
        pass

    for _ in range(3):
        said, _ = _runs(_norm(), launched)
    assert not _by_triton(said)
    runtime = triton.knobs.runtime
    hooks = norms.kernels.normalise_kernel.pre_run_hooks
    if changed == "hook":
        runtime.launch_enter_hook.add(listen)
    elif changed == "exit hook":
        runtime.launch_exit_hook.add(listen)
    elif changed == "another hook":
        monkeypatch.setattr(runtime, "launch_enter_hook", listen)
    elif changed == "debug":
        monkeypatch.setattr(runtime, "debug", not runtime.debug)
    else:
        hooks.append(listen)
    try:
        said, _ = _runs(_norm(), launched)
    finally:
        runtime.launch_enter_hook.calls.clear() if changed == "hook" else None
        runtime.launch_exit_hook.remove(listen)
        hooks.clear()
    assert _by_triton(said)


def test_programs_of_an_unknown_triton_are_left_to_it(
    launched: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    for _ in range(4):
        said, _ = _runs(_norm(), launched)
        assert _by_triton(said)


def test_other_launchers_are_left_to_triton() -> None:
    one = SimpleNamespace(kernel=norms.kernels.normalise_kernel)
    compiled = object.__new__(triton.compiler.CompiledKernel)
    compiled._run, compiled.function, compiled.packed_metadata = print, 1, ()
    assert replay._is_known(one, compiled)
    assert not replay._is_known(one, None)
    assert not replay._is_known(SimpleNamespace(kernel=print), compiled)


def test_an_environment_leaves_all_to_triton(
    launched: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENCNET_REPLAY", "0")
    for _ in range(4):
        assert _by_triton(_runs(_norm(), launched)[0])


@pytest.mark.slow
def test_a_compiled_program_gets_what_triton_gives_it(kept: list[Tensor]) -> None:
    """Without a GPU: everything but the launch itself is Triton's own."""
    made: list[Launched] = []
    with no_gpu(90, made):
        said = [_runs(_norm(), made)[0] for _ in range(3)]
        assert norm_operators._forward._replays and norm_operators._backward._replays
        assert driver.active.get_current_stream(0) == 0
        # Triton unloads a program that nobody holds.
        replays = [*norm_operators._forward._replays.values()]
        assert all(type(p.compiled) is CompiledKernel for r in replays for p in r._programs)
    assert [len(one) for one in said] == [6, 6, 6]
    # Triton hands over what hooks would be told, and hooks, empty ones where there is none.
    for planned, replayed in zip(said[0] + said[1], 2 * said[2], strict=True):
        assert planned[:7] == replayed[:7] and planned[10:] == replayed[10:]
        assert replayed[7:10] == (None, None, None)
        assert not any(hook.calls for hook in planned[8:10])
