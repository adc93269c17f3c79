"""Eager calls go round the dispatcher, to the same bits; what watches or traces gets operators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from encnet_triton.kernels import batch_norm_act, encode, upsample_argmax, upsample_cross_entropy
from encnet_triton.kernels.runtime import dispatch, eager


class Recorded(TorchDispatchMode):
    """The names of our operators that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace.startswith("encnet"):
            self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def _map(channels: int, seed: int, dtype: torch.dtype, last: bool = True) -> Tensor:
    x = torch.randn(2, channels, 3, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return x.requires_grad_()


def _row(size: int, seed: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _norm(dtype: torch.dtype, residual: bool = False, training: bool = True, **given: Any) -> Any:
    added = [_map(4, 2, dtype)] if residual else []
    inputs = [_map(4, 1, dtype, given.pop("last", True)), _row(4, 3), _row(4, 4), *added]
    moved = [torch.zeros(4), torch.ones(4)]
    options: dict[str, Any] = dict(training=training, momentum=0.1, eps=1e-5, **given)

    def call(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        options["residual"] = rest[0] if rest else None
        y = batch_norm_act(x, weight, bias, *moved, **options)
        return y + sum(moved).to(dtype)[:, None, None]  # type: ignore[union-attr]

    return call, inputs


def _encode(
    dtype: torch.dtype, stats: bool = False, shake: bool = False, flat: bool = False
) -> Any:
    x = _map(6, 1, dtype)
    if flat:
        x = x.detach().flatten(2).transpose(1, 2).requires_grad_()
    codewords = torch.randn(3, 6, generator=torch.Generator().manual_seed(5)).requires_grad_()

    def call(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
        factor = -torch.rand(3, generator=torch.Generator().manual_seed(6)) if shake else None
        made = encode(x, codewords, scale, backward_scale=factor, return_stats=stats)
        return made[0] + made[1][..., None] + made[2][..., None] if stats else made

    return call, [x, codewords, _row(3, 7)]


def _loss(dtype: torch.dtype, reduction: str = "mean", **options: Any) -> Any:
    target = torch.arange(2 * 6 * 9).reshape(2, 6, 9) % 5
    target[0, :2] = 255

    def call(logits: Tensor) -> Tensor:
        return upsample_cross_entropy(logits, target, reduction=reduction, **options)

    return call, [_map(5, 1, dtype)]


CASES: dict[str, Callable[[torch.dtype], Any]] = {
    "norm": _norm,
    "norm contiguous": lambda dtype: _norm(dtype, last=False),
    "norm residual": lambda dtype: _norm(dtype, residual=True),
    "norm residual linear": lambda dtype: _norm(dtype, residual=True, activation=None),
    "norm frozen": lambda dtype: _norm(dtype, training=False),
    "norm frozen residual": lambda dtype: _norm(dtype, residual=True, training=False),
    "encode": _encode,
    "encode statistics": lambda dtype: _encode(dtype, stats=True),
    "encode shake": lambda dtype: _encode(dtype, shake=True),
    "encode flat": lambda dtype: _encode(dtype, flat=True),
    "loss": _loss,
    "loss sum": lambda dtype: _loss(dtype, "sum", label_smoothing=0.1),
    "losses": lambda dtype: _loss(dtype, "none", weight=torch.arange(5.0)),
}
cases = pytest.mark.parametrize("name", CASES)


def _results(
    name: str, dtype: torch.dtype, within: contextlib.AbstractContextManager[Any]
) -> list[Tensor]:
    """Output and all gradients, forward and backward made within."""
    torch.manual_seed(0)
    call, inputs = CASES[name](dtype)
    with within:
        y = call(*inputs)
        grad = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
        y.backward(grad)
    return [y.detach(), *(value.grad for value in inputs if value.grad is not None)]


def _assert_as_operators(name: str, dtype: torch.dtype) -> None:
    recorded = Recorded()
    plain, watched = (_results(name, dtype, w) for w in (contextlib.nullcontext(), recorded))
    assert len(recorded.names) >= 2
    assert len(plain) == len(watched) > 1
    for ours, operators in zip(plain, watched, strict=True):
        assert torch.equal(ours, operators) and ours.dtype == operators.dtype
        assert ours.stride() == operators.stride()


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_results_are_those_of_the_operators(name: str, dtype: torch.dtype) -> None:
    """A mode that watches gets the operators."""
    _assert_as_operators(name, dtype)


@pytest.mark.triton
@pytest.mark.skipif(not dispatch.interpreting(), reason="compares kernels on tensors of the CPU")
@cases
def test_results_of_kernels_are_those_of_the_operators(name: str) -> None:
    _assert_as_operators(name, torch.bfloat16)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Operators that were called as such by `Direct`."""
    made: list[Any] = []
    original = eager.Direct.__call__

    def call(direct: eager.Direct, *arguments: Any) -> Any:
        before = len(bodies)
        result = original(direct, *arguments)
        if len(bodies) == before:
            made.append(direct)
        return result

    bodies: list[Any] = []
    body = eager.Direct.body
    monkeypatch.setattr(
        eager.Direct, "body", lambda *given: (bodies.append(given[0]), body(*given))[1]
    )
    monkeypatch.setattr(eager.Direct, "__call__", call)
    return made


@cases
@pytest.mark.parametrize(
    "within", [contextlib.nullcontext(), torch.device("cpu")], ids=["", "default device"]
)
def test_a_plain_call_dispatches_no_operator(name: str, within: Any, called: list[Any]) -> None:
    """Nor does one under a default device."""
    _results(name, torch.float32, within)
    with torch.no_grad(), within:
        call, inputs = CASES[name](torch.float32)
        call(*inputs)
    assert called == []


class Wrapped(Tensor):
    """Another class of tensors."""


class Function(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_what_watches_or_traces_is_told_of_every_call() -> None:
    x = torch.zeros(3)
    assert eager.undisturbed(x, nn.Parameter(x), None, 1, 1.0, True, "", torch.float32)
    assert not eager.undisturbed(x.as_subclass(Wrapped))
    assert not eager.undisturbed(x.to("meta"))
    assert not eager.undisturbed(torch._neg_view(x))
    assert not eager.undisturbed(torch._efficientzerotensor(3))
    modes: list[contextlib.AbstractContextManager[Any]] = [Recorded(), Function()]
    for mode in (*modes, torch._subclasses.FakeTensorMode(), forward_ad.dual_level()):
        with mode:
            assert not eager.undisturbed(x)
    with torch.device("cpu"):
        assert eager.undisturbed(x)
        with Function():
            assert not eager.undisturbed(x)
    seen = []
    torch.func.vmap(lambda row: (seen.append(eager.undisturbed(x)), row)[1])(x)
    torch.jit.trace(
        lambda row: (seen.append(eager.undisturbed(row)), row + 1)[1], x, check_trace=False
    )
    assert seen and not any(seen)
    assert eager.undisturbed(x)


@pytest.mark.parametrize("missing", ["_questions", "_below_autograd"])
def test_a_torch_that_cannot_be_asked_gets_operators(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, missing, None)
    assert not eager.undisturbed(torch.zeros(3))
    assert len(_results("norm", torch.float32, contextlib.nullcontext())) == 4


@cases
def test_second_derivatives_are_refused_as_the_operators_do(name: str) -> None:
    said = []
    for within in (contextlib.nullcontext(), Recorded()):
        call, inputs = CASES[name](torch.float32)
        with within, pytest.raises(RuntimeError) as refused:
            (grad,) = torch.autograd.grad(call(*inputs).sum(), inputs[:1], create_graph=True)
            grad.square().sum().backward()
        said.append(str(refused.value))
    # Not that the gradient is a constant: beside another loss it would then count for nothing.
    assert said[0] == said[1] and "does not require grad" not in said[0]


@cases
def test_checkpoints_and_hooks_see_what_is_kept(name: str) -> None:
    """Recomputed, and moved away and back: the same gradients."""
    plain = _results(name, torch.float32, contextlib.nullcontext())
    packed: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (packed.append(tensor), tensor.clone())[1], lambda kept: kept
    )
    assert all(map(torch.equal, plain, _results(name, torch.float32, hooks)))
    assert packed
    if "norm" in name and "frozen" not in name:
        return  # a second pass moves the running statistics, which the layer prevents
    call, inputs = CASES[name](torch.float32)
    y: Tensor = checkpoint(call, *inputs, use_reentrant=False)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
    again = [y.detach(), *(value.grad for value in inputs if value.grad is not None)]
    assert all(map(torch.equal, plain, again))


@pytest.mark.triton
@cases
def test_what_is_kept_may_come_back_with_other_strides(name: str) -> None:
    """As from `torch.autograd.graph.save_on_cpu` with pinned memory."""
    hooks = torch.autograd.graph.saved_tensors_hooks(Tensor.contiguous, lambda kept: kept)
    plain = _results(name, torch.float32, contextlib.nullcontext())
    for ours, moved in zip(plain, _results(name, torch.float32, hooks), strict=True):
        torch.testing.assert_close(moved, ours)


@cases
def test_the_output_is_no_view_and_may_be_changed(name: str) -> None:
    call, inputs = CASES[name](torch.float32)
    y = call(*inputs)
    y.mul_(2.0).sum().backward()
    assert inputs[0].grad is not None


def test_an_input_that_was_changed_since_is_refused() -> None:
    """And running statistics count their changes, for what else keeps them."""
    call, inputs = CASES["norm"](torch.float32)
    y = call(*inputs)
    with torch.no_grad():
        inputs[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    mean, var = torch.zeros(4), torch.ones(4)
    versions = mean._version, var._version
    batch_norm_act(inputs[0], None, None, mean, var, training=True, momentum=0.1, eps=1e-5)
    assert mean._version > versions[0] and var._version > versions[1]


def test_autocast_reaches_no_body() -> None:
    for name in CASES:
        plain = _results(name, torch.float32, contextlib.nullcontext())
        cast = _results(name, torch.float32, torch.autocast("cpu", torch.bfloat16))
        assert all(map(torch.equal, plain, cast))


def test_inference_mode_runs_the_body(called: list[Any]) -> None:
    with torch.inference_mode():
        for name in CASES:
            call, inputs = CASES[name](torch.float32)
            call(*inputs)
        upsample_argmax(torch.rand(1, 3, 2, 2), (4, 4), return_prob=True)
    assert called == []
