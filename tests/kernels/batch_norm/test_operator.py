"""Batch normalisation with residual and ReLU against torch's, in float64, alone and in a group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from encnet_triton.kernels import ResidualNorm, batch_norm_act, reference
from encnet_triton.kernels.batch_norm.library import (
    backward_frozen,
    backward_input,
    backward_sums,
    moments,
    normalise,
    statistics_of,
    unpack,
)
from encnet_triton.kernels.runtime import tiling
from tests.support import synchronised
from tests.support.batch_norm import (
    LAYOUTS,
    OPTIONS,
    as_dtype,
    assert_same,
    example,
    gradient_of,
    run,
    terms,
    torch_formula,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@layouts
def test_float64_equals_torch_in_every_layout(layout: str, training: bool) -> None:
    tensors = example(layout, residual=True)
    ours = run(batch_norm_act, tensors, training=training)
    assert_same(ours, run(torch_formula, tensors, training=training))
    assert_same(ours, run(reference.batch_norm_act, tensors, training=training))


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float64_equals_torch_with_every_option(options: dict[str, Any], training: bool) -> None:
    options = dict(options)
    call = {"training": training, "activation": options.pop("activation", "relu")}
    tensors = example("channels_last", **options)
    assert_same(run(batch_norm_act, tensors, **call), run(torch_formula, tensors, **call))


def test_training_needs_no_running_statistics() -> None:
    tensors = example("contiguous", running=False)
    assert_same(
        run(batch_norm_act, tensors, training=True), run(torch_formula, tensors, training=True)
    )


@pytest.mark.float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "BxKxC", "strided pixels"])
def test_error_is_at_most_twice_that_of_torch(
    layout: str, training: bool, dtype: torch.dtype, assert_accurate: Callable[..., None]
) -> None:
    # Without ReLU: a value near zero may fall on either side of it in another rounding.
    tensors = example(layout, dtype, residual=True)
    call = {"training": training, "activation": None}
    ours = run(batch_norm_act, tensors, **call)
    plain = run(torch_formula, tensors, **call)
    exact = run(reference.batch_norm_act, as_dtype(tensors, torch.float64), **call)
    assert ours["y"].dtype == ours["dx"].dtype == dtype
    assert ours["running_var"].dtype == ours["dweight"].dtype == torch.float32
    summed = terms(tensors, training=training)
    for name in exact:
        assert_accurate(name, ours[name], plain[name], exact[name], summed.get(name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "BxKxC"])
@pytest.mark.parametrize("elements", [16, 6 * 20, 6 * 80])
def test_tiling_changes_nothing(
    elements: int, layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = example(layout, dtype, residual=True)
    whole = run(batch_norm_act, tensors, training=True)
    monkeypatch.setattr(tiling, "_ELEMENTS_CPU", elements)
    assert_same(run(batch_norm_act, tensors, training=True), whole)


@pytest.mark.float32
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("jump", [False, True], ids=["uniform", "first rows zero"])
def test_a_mean_far_above_the_spread_keeps_the_variance(
    jump: bool, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean 1e4, standard deviation 1 in fp32: E[x^2] - E[x]^2 has no correct digit left."""
    monkeypatch.setattr(tiling, "_ELEMENTS_CPU", 1 << 14)
    x = torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(0)) + 1e4
    if jump:
        x[:, :, :4] = 0.0
    x = x.contiguous(memory_format=memory_format)
    mean, var = torch.zeros(8), torch.zeros(8)
    y = batch_norm_act(
        x, None, None, mean, var, training=True, momentum=1.0, eps=0.0, activation=None
    )
    exact = x.double()
    # The mean is rounded once, to 6e-8. Squares of deviations are summed: 1e-6 by their rounding,
    # where E[x^2] - E[x]^2 is off by 6e-8 of 1e8.
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3)), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0.0)
    if not jump:
        normalised = (exact - mean.double()[:, None, None]) / exact.std((0, 2, 3))[:, None, None]
        assert (y - normalised).abs().max() < 2e-3  # 1e4 in fp32 is itself rounded to 1e-3


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_gradcheck(training: bool) -> None:
    torch.manual_seed(0)
    tensors = example("two values", residual=True)
    tensors["x"] = torch.randn(3, 3, 2, 2, dtype=torch.float64)
    tensors["residual"] = torch.randn(3, 3, 2, 2, dtype=torch.float64)
    names = ("x", "weight", "bias", "residual")
    inputs = [tensors[n].detach().requires_grad_() for n in names]

    def function(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        fixed = {n: tensors[n].clone() for n in ("running_mean", "running_var")}
        return batch_norm_act(**given, **fixed, training=training, momentum=0.1, eps=1e-3)

    assert torch.autograd.gradcheck(function, inputs)


def test_normalised_channels_have_mean_zero_and_variance_one() -> None:
    x = example("channels_last", torch.float64)["x"]
    y = batch_norm_act(
        x, None, None, None, None, training=True, momentum=0.1, eps=0.0, activation=None
    )
    zero, one = torch.zeros(6).double(), torch.ones(6).double()
    torch.testing.assert_close(y.mean((0, 2, 3)), zero)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), one)


def test_output_and_gradient_keep_the_memory_format() -> None:
    tensors = example("channels_last", torch.float32, residual=True)
    result = run(batch_norm_act, tensors, training=True)
    for name in ("y", "dx", "dresidual"):
        assert result[name].is_contiguous(memory_format=torch.channels_last), name


def test_evaluation_leaves_the_running_statistics() -> None:
    tensors = example("contiguous")
    result = run(batch_norm_act, tensors, training=False)
    assert torch.equal(result["running_mean"], tensors["running_mean"])
    assert torch.equal(result["running_var"], tensors["running_var"])


def test_only_the_gradients_that_are_needed() -> None:
    tensors = example("contiguous", residual=True)
    every = run(batch_norm_act, tensors, training=True)
    for needed in ("x", "weight", "bias", "residual"):
        leaves = {n: t.clone() for n, t in tensors.items()}
        leaves[needed].requires_grad_()
        y = batch_norm_act(**leaves, training=True, momentum=0.2, eps=1e-3)
        y.backward(gradient_of(y))
        torch.testing.assert_close(leaves[needed].grad, every[f"d{needed}"])


def test_empty_batch_in_evaluation() -> None:
    tensors = example("contiguous", residual=True)
    tensors |= {"x": tensors["x"][:0], "residual": tensors["residual"][:0]}
    result = run(batch_norm_act, tensors, training=False)
    assert result["y"].shape == result["dx"].shape == (0, 6, 5, 7)
    assert (result["dweight"] == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
def test_opcheck(layout: str, frozen: bool, full: bool) -> None:
    tensors = example(layout, torch.float32, residual=True)
    x = tensors["x"].flatten(2)
    mean, var = tensors["running_mean"], tensors["running_var"]
    count = None if frozen else torch.tensor([105.0], dtype=torch.float64)
    optional = [tensors["weight"], tensors["bias"], tensors["residual"].flatten(2)]
    optional = [t.requires_grad_() if full else None for t in optional]
    weight, bias, residual = optional
    inputs = (x.clone().requires_grad_(), mean, var, count, *optional, full, 1e-5, full, "", False)
    inputs = (*inputs, None, None, None, None)
    torch.library.opcheck(normalise, inputs)
    y, mask, _ = normalise(*inputs)
    kept = (mask if mask.numel() else y).detach() if full else None
    call = (torch.randn_like(x), x, kept, mean, var)
    parameters = [None if t is None else t.detach() for t in (weight, bias)]
    if frozen:
        torch.library.opcheck(backward_frozen, (*call, *parameters, full, 1e-5, full))
        return
    running = (mean.clone(), var.clone()) if full else (None, None)
    torch.library.opcheck(moments, (x, *running, 0.1))
    torch.library.opcheck(statistics_of, (x,))
    torch.library.opcheck(unpack, (statistics_of(x), x, *running, 0.1))
    as_it_is = (None,) * 4
    for other in (None, torch.randn_like(x)):
        given = call[0], other, *call[1:], *parameters, full, 1e-5, *as_it_is
        torch.library.opcheck(backward_sums, given)
    sums = torch.randn(2, 6, dtype=torch.float64)
    call = (torch.randn_like(x), x, mask if mask.numel() else None, mean, var, *parameters)
    given = *call, sums, count, full, 1e-5, bool(mask.numel()), *as_it_is
    torch.library.opcheck(backward_input, given)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
def test_opcheck_where_the_residual_is_normalised(layout: str, full: bool) -> None:
    tensors = example(layout, torch.float32, residual=True, normalised=True)
    x, residual = (tensors[n].flatten(2) for n in ("x", "residual"))
    mean, var, res_mean, res_var = (t for n, t in tensors.items() if "running" in n)
    weight, bias, res_weight, res_bias = (
        tensors[n].requires_grad_() if full else None
        for n in ("weight", "bias", "res_weight", "res_bias")
    )
    count = torch.tensor([105.0], dtype=torch.float64)
    leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
    call = (mean, var, count, weight, bias, leaves[1], full, 1e-5, full, "", False)
    given = leaves[0], *call, res_mean, res_var, res_weight, res_bias
    torch.library.opcheck(normalise, given)
    y, mask, _ = normalise(*given)
    kept = (mask if mask.numel() else y).detach() if full else None
    weight, bias, res_weight = (
        None if t is None else t.detach() for t in (weight, bias, res_weight)
    )
    of_x, of_residual = (mean, var, weight, bias), (residual, res_mean, res_var, res_weight)
    for other in (None, torch.randn_like(x)):
        given = torch.randn_like(x), other, x, kept, *of_x, full, 1e-5, *of_residual
        torch.library.opcheck(backward_sums, given)
    sums = torch.randn(3, 6, dtype=torch.float64)
    for need_residual in (False, True):
        given = torch.randn_like(x), x, None, *of_x, sums, count, False, 1e-5, need_residual
        torch.library.opcheck(backward_input, (*given, *of_residual))


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(training: bool, dynamic: bool) -> None:
    tensors = example("channels_last", torch.float32, residual=True)
    torch._dynamo.reset()
    compiled = torch.compile(batch_norm_act, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_same(
        run(compiled, tensors, training=training), run(batch_norm_act, tensors, training=training)
    )


def _bad(**changes: Any) -> dict[str, Any]:
    good = example("contiguous", torch.float32) | {"training": True, "momentum": 0.1, "eps": 1e-5}
    return good | changes


def _norm(**changes: Any) -> ResidualNorm:
    good = ResidualNorm(torch.ones(6), torch.ones(6), torch.zeros(6), torch.ones(6), 0.1)
    return good._replace(**changes)


def _projected(**changes: Any) -> dict[str, Any]:
    return _bad(residual=torch.zeros(3, 6, 5, 7), residual_norm=_norm(**changes))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (_bad(x="image"), TypeError, "x must be a tensor, got str"),
        (_bad(x=torch.zeros(3, 6, 2).int()), TypeError, "got torch.int32"),
        (_bad(x=torch.zeros(6)), ValueError, r"batch and a channel dimension .* \(6,\)"),
        (_bad(x=torch.zeros(2, 0, 3)), ValueError, "at least one channel"),
        (_bad(activation="gelu"), ValueError, "\"relu\" or None, got 'gelu'"),
        (_bad(weight=torch.ones(5)), ValueError, r"weight must have one value .* 6 .* \(5,\)"),
        (_bad(bias=torch.ones(6).double()), TypeError, "bias must be float32 or"),
        (_bad(bias=1.0), TypeError, "bias must be a tensor or None, got float"),
        (_bad(running_var=torch.ones(6, device="meta")), ValueError, "x's device cpu, got meta"),
        (_bad(residual=torch.zeros(3, 6, 5, 8)), ValueError, "residual must have x's shape"),
        (_bad(residual=torch.zeros(3, 6, 5, 7).half()), ValueError, "residual must have x's"),
        (_bad(x=torch.zeros(1, 6, 1, 1)), ValueError, "the batch is too small"),
        (_bad(x=torch.zeros(0, 6, 5, 7)), ValueError, "the batch is too small"),
        (_bad(momentum=None), TypeError, "momentum must be a number, got None"),
        (_bad(eps=None), TypeError, "eps must be a number, got None"),
        (_bad(eps=float("nan")), ValueError, "eps must be at least 0, got nan"),
        (_bad(training=None), TypeError, "training must be True or False, got None"),
        (_bad(group=3), TypeError, "group must be a process group or None, got int"),
        (_bad(statistics=torch.zeros(2, 3, 6)), TypeError, r"must be the pair \(sum, M2\)"),
        (_bad(statistics=(1, 2)), TypeError, r"must be the pair \(sum, M2\)"),
        (_bad(statistics=(torch.zeros(3, 5),) * 2), ValueError, r"\(3, 6\) on cpu, got \(3, 5\)"),
        (_bad(training=False, running_mean=None), ValueError, "needed when training is False"),
        (_bad(residual_norm=("a", "b")), TypeError, "must be a ResidualNorm or None, got tuple"),
        (_bad(residual_norm=_norm()), ValueError, "residual_norm needs a residual"),
        (_projected(weight=None), ValueError, "weight and .* both be None, got torch.float32 and"),
        (_projected(bias=torch.ones(6).bfloat16()), ValueError, "bias and .* one dtype or both"),
        (_projected(running_mean=torch.ones(5)), ValueError, "running_mean of residual_norm must"),
        (_projected(running_var=1.0), TypeError, "running_var of residual_norm must be a tensor"),
        (_projected(momentum=None), TypeError, "momentum of residual_norm must be a number"),
        (_projected() | {"training": False, "residual": 3}, TypeError, "x must be a tensor"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        batch_norm_act(**arguments)
    assert "\n" not in str(caught.value)


SYNCHRONISED = [torch.float64, torch.float32]


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[torch.dtype, dict[str, list[dict[str, Any]]]]:
    return synchronised.together(tmp_path_factory.mktemp("ranks"), SYNCHRONISED, "cpu")


needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)


@needs_gloo
@pytest.mark.float32
@pytest.mark.parametrize("dtype", SYNCHRONISED, ids=str)
@pytest.mark.parametrize("residual", [synchronised.ADDED, synchronised.NORMALISED])
@pytest.mark.parametrize("share", synchronised.SHARES)
def test_two_and_three_processes_equal_one(
    share: str, residual: str, dtype: torch.dtype, ranks: Any
) -> None:
    # Statistics are joined in float64: what is left is the rounding of each value and of sums of
    # 60 terms, a few units in the last place (8 are allowed).
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    whole = synchronised.alone(dtype, "cpu", residual)
    synchronised.check_equal(ranks[dtype][f"{share}, {residual}"], whole, tolerance)


@needs_gloo
@pytest.mark.parametrize("dtype", SYNCHRONISED, ids=str)
@pytest.mark.parametrize("residual", [synchronised.ADDED, synchronised.NORMALISED])
@pytest.mark.parametrize("share", synchronised.SHARES)
def test_one_packed_all_reduce_each_way(
    share: str, residual: str, dtype: torch.dtype, ranks: Any
) -> None:
    synchronised.check_collectives(ranks[dtype][f"{share}, {residual}"], residual)


@pytest.fixture(scope="module")
def own_group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@needs_gloo
def test_a_group_compiles_without_a_graph_break(own_group: Any) -> None:
    tensors = example("channels_last", torch.float32, residual=True)
    torch._dynamo.reset()
    compiled = torch.compile(batch_norm_act, fullgraph=True, backend="aot_eager")
    ours = run(compiled, tensors, training=True, group=own_group)
    assert_same(ours, run(batch_norm_act, tensors, training=True))


@needs_gloo
def test_a_group_is_not_asked_in_evaluation(own_group: Any) -> None:
    tensors = example("contiguous")
    with synchronised.AllReduces() as collectives:
        run(batch_norm_act, tensors, training=False, group=own_group)
    assert collectives.seen == []
