"""`batch_norm_act_forked` gives the bits of `batch_norm_act` and of autograd's sum of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from encnet_triton.kernels import batch_norm_act, batch_norm_act_forked
from encnet_triton.kernels.batch_norm.library import normalise
from encnet_triton.kernels.runtime import dispatch
from tests.support.batch_norm import DIFFERENTIABLE, LAYOUTS, OPTIONS, call, example

# In Triton's interpreter the same tests meet the kernels.
pytestmark = [pytest.mark.triton] if dispatch.interpreting() else []
CALL = {"momentum": 0.2, "eps": 1e-3}


def twice(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    y = batch_norm_act(*arguments, **options)
    return y, y


def results(
    function: Callable[..., Any], tensors: dict[str, Any], used: str = "both", **options: Any
) -> dict[str, Tensor]:
    """Both outputs and the gradients from uses of either or both; running statistics move."""
    leaves = {n: None if t is None else t.detach().clone() for n, t in tensors.items()}
    differentiable = [n for n in DIFFERENTIABLE if leaves.get(n) is not None]
    for name in differentiable:
        leaves[name].requires_grad_()
    outputs = call(function, leaves, **(CALL | {"training": True} | options))
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    pairs = list(zip(outputs, grads, strict=True))
    chosen = pairs if used == "both" else pairs[:1] if used == "first" else pairs[1:]
    torch.autograd.backward(*map(list, zip(*chosen, strict=True)))
    made = {f"y {place}": y.detach() for place, y in enumerate(outputs)}
    made |= {name: leaves[name].grad for name in differentiable}
    return made | {n: t for n, t in leaves.items() if "running" in n and t is not None}


def check(tensors: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    ours = results(batch_norm_act_forked, tensors, **options)
    for name, value in results(twice, tensors, **options).items():
        assert torch.equal(ours[name], value), name
        assert ours[name].stride() == value.stride(), name
    return ours


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_bit_is_that_of_the_sum(layout: str, dtype: torch.dtype) -> None:
    check(example(layout, dtype, residual=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(options: dict[str, Any], layout: str) -> None:
    options = dict(options)
    activation = options.pop("activation", "relu")
    check(example(layout, torch.float32, **options), activation=activation)


@pytest.mark.parametrize("used", ["first", "second"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_one_output_may_be_without_a_use(used: str, training: bool) -> None:
    check(example(dtype=torch.float32, residual=True), used=used, training=training)


def test_frozen_statistics() -> None:
    check(example(dtype=torch.float32, residual=True), training=False)


@pytest.mark.parametrize("used", ["both", "second"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_in_one_graph(layout: str, used: str) -> None:
    tensors = example(layout, torch.bfloat16, residual=True)
    torch._dynamo.reset()
    compiled = torch.compile(batch_norm_act_forked, fullgraph=True, backend="aot_eager")
    ours = results(compiled, tensors, used)
    for name, value in results(batch_norm_act_forked, tensors, used).items():
        assert torch.equal(ours[name], value), name


def test_the_outputs_share_memory() -> None:
    tensors = example("channels_last", torch.float32, residual=True)
    tensors["x"].requires_grad_()
    first, second = batch_norm_act_forked(**tensors, training=True, **CALL)
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("place", [0, 1])
def test_a_change_in_place_is_noticed(place: int) -> None:
    tensors = example("channels_last", torch.float32, residual=True)
    tensors["x"].requires_grad_()
    outputs = batch_norm_act_forked(**tensors, training=True, **CALL)
    squares = [y.square().sum() for y in outputs]
    outputs[place].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(squares)


def test_synchronised() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check(example(dtype=torch.float32, residual=True), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_refuses_the_derivatives_that_batch_norm_act_refuses() -> None:
    tensors = example(dtype=torch.float32)
    x = tensors.pop("x")

    def total(x: Tensor) -> Tensor:
        return batch_norm_act_forked(x, **tensors, training=True, **CALL)[1].sum()

    with pytest.raises(NotImplementedError, match="batch_norm_act"):
        torch.func.grad(total)(x)
    with pytest.raises(NotImplementedError, match="batch_norm_act"):
        torch.func.jvp(total, (x,), (x,))


def test_opcheck() -> None:
    tensors = example("channels_last", torch.float32, residual=True)
    x, residual = (tensors[n].flatten(2) for n in ("x", "residual"))
    mean, var, weight, bias = (
        tensors[n] for n in ("running_mean", "running_var", "weight", "bias")
    )
    count = torch.tensor([105.0], dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (weight, bias, residual)]
    given = (mean, var, count, *leaves, True, 1e-5, True, "", True)
    # Not the test of values: the last output has none.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for of_residual in ((None,) * 4, (mean.clone(), var.clone(), *leaves[:2])):
        inputs = x.clone().requires_grad_(), *given, *of_residual
        torch.library.opcheck(normalise, inputs, test_utils=tests)
