"""The Triton kernels of `batch_norm_act`, in Triton's interpreter or on a GPU, against float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("triton")

from bench.static.interpreter import Watch
from bench.static.launches import BatchNormShape, Variant, batch_norm_launches
from encnet_triton.kernels import batch_norm_act, encode, reference
from encnet_triton.kernels.batch_norm import plan
from encnet_triton.kernels.batch_norm.library import (
    backward_frozen,
    backward_input,
    backward_sums,
    moments,
    normalise,
    statistics_of,
    unpack,
)
from encnet_triton.kernels.runtime import launch
from tests.support import synchronised
from tests.support.batch_norm import (
    LAYOUTS,
    OPTIONS,
    as_dtype,
    assert_same,
    example,
    run,
    torch_formula,
)
from tests.support.fraction import half
from tests.support.opcheck import opcheck

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

DEVICE = "cpu" if launch.interpreting() else "cuda"
TILES = {"": None, "small tiles": (256, 8)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FP16 = {"fp16": pytest.param(torch.float16, marks=pytest.mark.verify)}
MODES = {"training": True, "frozen": False}
ORDERS = {"contiguous": "contiguous", "channels_last": "channels_last"}
EVERY_LAYOUT = {layout: layout for layout in LAYOUTS if layout != "two values"}
TRAINING = pytest.mark.parametrize("training", MODES.values(), ids=MODES)


@pytest.fixture(
    params=[
        pytest.param(None, marks=pytest.mark.verify, id="in order"),
        pytest.param("reverse", marks=pytest.mark.verify, id="reverse"),
        pytest.param(3, id="shuffled"),
    ]
)
def watched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs in some order, every address checked, no two programs at one address."""
    watch = Watch(order=request.param, races=True) if launch.interpreting() else None
    if watch is None and request.param is not None:
        pytest.skip("a GPU orders its programs itself")
    with watch or contextlib.nullcontext():
        yield


@pytest.fixture(params=TILES.values(), ids=TILES)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of every launch as they are, or so small that a program walks several."""
    if request.param is not None:
        size, channels = request.param
        monkeypatch.setattr(plan, "_TILE_BYTES", size)
        monkeypatch.setattr(plan, "_CHANNELS", channels)
        monkeypatch.setattr(launch, "machine", lambda _: launch.Machine(90, 1))
        plan._configs.cache_clear()


def check(
    tensors: dict[str, Tensor | None], assert_accurate: Callable[..., None], **call: Any
) -> dict[str, Tensor]:
    """Every result is at most twice as far from float64 as torch's own."""
    ours = run(batch_norm_act, tensors, **call)
    plain = run(torch_formula, tensors, **call)
    exact = run(reference.batch_norm_act, as_dtype(tensors, torch.float64), **call)
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        assert_accurate(name, ours[name], plain[name], value)
    return ours


@pytest.mark.parametrize(
    ("tiles", "dtype", "training", "layout"),
    half(TILES, DTYPES | FP16, MODES, EVERY_LAYOUT),
    indirect=["tiles"],
)
def test_error_is_at_most_twice_that_of_torch(
    tiles: None,
    layout: str,
    training: bool,
    dtype: torch.dtype,
    assert_accurate: Callable[..., None],
) -> None:
    tensors = example(layout, dtype, residual=True, device=DEVICE)
    with Watch(races=True) if launch.interpreting() else contextlib.nullcontext():
        ours = check(tensors, assert_accurate, training=training)
    assert ours["y"].dtype == ours["dx"].dtype == ours["dresidual"].dtype == dtype
    assert ours["dweight"].dtype == ours["running_var"].dtype == torch.float32


@pytest.mark.parametrize(
    ("tiles", "dtype", "layout"), half(TILES, DTYPES, EVERY_LAYOUT), indirect=["tiles"]
)
def test_a_normalised_residual_in_every_layout(
    tiles: None, layout: str, dtype: torch.dtype, assert_accurate: Callable[..., None]
) -> None:
    tensors = example(layout, dtype, residual=True, normalised=True, device=DEVICE)
    with Watch(races=True) if launch.interpreting() else contextlib.nullcontext():
        ours = check(tensors, assert_accurate, training=True)
    assert ours["y"].dtype == ours["dx"].dtype == ours["dresidual"].dtype == dtype
    assert ours["dres_weight"].dtype == ours["res_running_var"].dtype == torch.float32
    assert ours["dbias"].data_ptr() != ours["dres_bias"].data_ptr()


@TRAINING
def test_two_values_a_channel(training: bool) -> None:
    """The terms of dx cancel to a ten-thousandth: its error is that of the terms, not its own."""
    tensors = example("two values", torch.float32, residual=True, device=DEVICE)
    ours = run(batch_norm_act, tensors, training=training)
    exact = run(reference.batch_norm_act, as_dtype(tensors, torch.float64), training=training)
    assert_same({n: t.double() for n, t in ours.items()}, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tiles", "training", "layout", "options"),
    half(TILES, MODES, ORDERS, OPTIONS),
    indirect=["tiles"],
)
def test_every_option(
    tiles: None,
    options: dict[str, Any],
    layout: str,
    training: bool,
    assert_accurate: Callable[..., None],
) -> None:
    options = dict(options)
    call = {"training": training, "activation": options.pop("activation", "relu")}
    check(example(layout, torch.float32, device=DEVICE, **options), assert_accurate, **call)


@pytest.mark.usefixtures("tiles", "watched")
@TRAINING
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_programs_may_run_in_any_order(
    layout: str, training: bool, assert_accurate: Callable[..., None]
) -> None:
    tensors = example(layout, torch.float32, residual=True, device=DEVICE)
    check(tensors, assert_accurate, training=training)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_parameters_may_have_the_dtype_of_x(
    layout: str, assert_accurate: Callable[..., None]
) -> None:
    tensors = as_dtype(
        example(layout, torch.bfloat16, residual=True, device=DEVICE), torch.bfloat16
    )
    ours = check(tensors, assert_accurate, training=True)
    assert ours["dweight"].dtype == ours["running_mean"].dtype == torch.bfloat16


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "one channel", "two values", "strided channels"]
)
def test_the_mask_is_one_bit_a_value(layout: str) -> None:
    tensors = example(layout, torch.float32, residual=True, device=DEVICE)
    x = tensors["x"].flatten(2)
    residual = tensors["residual"].flatten(2)
    mean, var = tensors["running_mean"], tensors["running_var"]
    given = x, mean, var, None, None, None, residual, True, 0.0, True, "", False
    y, mask, _ = normalise(*given, None, None, None, None)
    assert mask.shape == plan.mask_shape(x)
    if plan._channels_last(x):  # planes of 64 channels or, with small tiles, of 8
        rows = y.transpose(1, 2).reshape(-1, y.shape[1])
        block = plan.configs(x)[0].block_c
        planes = [rows[:, at : at + block] for at in range(0, rows.shape[1], block)]
    else:
        planes = [y.flatten(0, 1)]
    packed = mask.view(len(planes), len(planes[0]), -1, 1) >> torch.arange(8, device=DEVICE) & 1
    for bits, values in zip(packed.flatten(2), planes, strict=True):
        assert torch.equal(bits[:, : values.shape[1]] == 1, values > 0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_mask_without_a_gradient_to_come(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = plan.Normalise

    def normalise(*arguments: Any, **named: Any) -> Any:
        asked.append(original(*arguments, **named).pack)
        return original(*arguments, **named)

    monkeypatch.setattr(plan, "Normalise", normalise)
    tensors = example(layout, torch.float32, residual=True, device=DEVICE)
    with torch.no_grad():
        batch_norm_act(**tensors, training=True, momentum=0.1, eps=1e-5)
    tensors["x"].requires_grad_()
    batch_norm_act(**tensors, training=True, momentum=0.1, eps=1e-5)
    assert asked == [False, True]


def test_without_a_residual_neither_mask_nor_output_is_saved() -> None:
    tensors = example("channels_last", torch.bfloat16, device=DEVICE)
    x = tensors["x"].requires_grad_()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch_norm_act(**tensors, training=True, momentum=0.1, eps=1e-5)
    assert [n for n in saved if n > 6] == [x.numel()]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("jump", [False, True], ids=["uniform", "first rows zero"])
def test_a_mean_far_above_the_spread_keeps_the_variance(jump: bool, layout: str) -> None:
    """Mean 1e4, standard deviation 1 in fp32: E[x^2] - E[x]^2 has no correct digit left."""
    x = torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(0)) + 1e4
    if jump:
        x[:, :, :4] = 0.0
    x = LAYOUTS[layout][1](x).to(DEVICE)
    mean, var = torch.zeros(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    y = batch_norm_act(
        x, None, None, mean, var, training=True, momentum=1.0, eps=0.0, activation=None
    )
    exact = x.double()
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3)), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0.0)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_a_constant_channel_has_variance_zero(value: float) -> None:
    x = torch.full((2, 4, 5, 7), value, device=DEVICE)
    var = torch.ones(4, device=DEVICE)
    y = batch_norm_act(
        x, None, None, None, var, training=True, momentum=1.0, eps=1e-5, activation=None
    )
    assert (var >= 0).all() and (var <= 1e-7 * value**2).all()
    assert torch.isfinite(y).all()


def test_nan_is_not_hidden_by_the_relu() -> None:
    x = torch.randn(2, 4, 3, 3, device=DEVICE)
    x[1, 2, 0, 0] = float("nan")
    y = batch_norm_act(x, None, None, None, None, training=True, momentum=0.1, eps=1e-5)
    assert y[:, 2].isnan().all() and not y[:, [0, 1, 3]].isnan().any()


def test_statistics_that_encode_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """B x K x C over the codewords: E is not read for its statistics."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 30, generator=generator).transpose(1, 2).to(DEVICE)
    codewords = torch.randn(5, 16, generator=generator).to(DEVICE)
    code, *statistics = encode(x, codewords, -torch.ones(5, device=DEVICE) / 8, return_stats=True)
    call = {"training": True, "momentum": 0.1, "eps": 1e-5}
    running = [torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)]
    others = [t.clone() for t in running]
    expected = batch_norm_act(code, None, None, *others, **call)
    monkeypatch.setattr(plan, "Statistics", None)
    ours = batch_norm_act(code, None, None, *running, statistics=tuple(statistics), **call)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(running, others)


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4)])
def test_empty_batch_in_evaluation(shape: tuple[int, ...]) -> None:
    tensors = example("contiguous", torch.float32, device=DEVICE)
    tensors["x"] = torch.empty(shape, device=DEVICE)
    result = run(batch_norm_act, tensors, training=False)
    assert result["y"].shape == result["dx"].shape == shape
    assert (result["dweight"] == 0).all()


def test_an_empty_share_of_a_group_has_sums_of_zero() -> None:
    x = torch.empty(0, 6, 20, device=DEVICE)
    assert torch.equal(statistics_of(x), torch.zeros(13, dtype=torch.float64, device=DEVICE))
    packed = torch.tensor([6.0, 0.0, 20.0, 36.0, 2.0], dtype=torch.float64, device=DEVICE)
    mean, var, count = unpack(packed, x[:, :2], None, None, 0.1)
    assert mean.tolist() == [3.0, 0.0] and var.tolist() == [1.0, 18.0] and count.tolist() == [2.0]


@pytest.mark.verify  # test_operator.py has the processes, tests of kernels what they launch
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)
def test_two_and_three_processes_equal_one(tmp_path: Path) -> None:
    found = synchronised.together(tmp_path, [torch.float32], DEVICE)
    for residual in (synchronised.ADDED, synchronised.NORMALISED):
        whole = synchronised.alone(torch.float32, DEVICE, residual)
        for share in synchronised.SHARES:
            parts = found[torch.float32][f"{share}, {residual}"]
            synchronised.check_equal(parts, whole, 1e-6)
            synchronised.check_collectives(parts, residual)


@TRAINING
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided pixels"])
def test_compiles_in_one_graph(layout: str, training: bool) -> None:
    normalised = layout == "channels_last"
    given = {"residual": True, "normalised": normalised, "device": DEVICE}
    tensors = example(layout, torch.bfloat16, **given)
    torch._dynamo.reset()
    compiled = torch.compile(batch_norm_act, fullgraph=True, backend="aot_eager")
    ours = run(compiled, tensors, training=training)
    for name, value in run(batch_norm_act, tensors, training=training).items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "spatial transpose"])
def test_opcheck(layout: str) -> None:
    tensors = example(layout, torch.float32, residual=True, device=DEVICE)
    x, residual = (tensors[n].flatten(2) for n in ("x", "residual"))
    mean, var, weight, bias = (
        tensors[n] for n in ("running_mean", "running_var", "weight", "bias")
    )
    running = mean.clone(), var.clone()
    opcheck(moments, (x, *running, 0.1))
    opcheck(statistics_of, (x,))
    opcheck(unpack, (statistics_of(x), x, *running, 0.1))
    count = torch.tensor([105.0], dtype=torch.float64, device=DEVICE)
    as_it_is = (None,) * 4
    for frozen in (True, False):
        leaves = [t.clone().requires_grad_() for t in (weight, bias, residual)]
        call = (mean, var, None if frozen else count, *leaves, True, 1e-5, True, "", False)
        opcheck(normalise, (x.clone().requires_grad_(), *call, *as_it_is))
    call = (mean, var, None, weight, bias, residual, True, 1e-5, True, "", False, *as_it_is)
    _, mask, _ = normalise(x, *call)
    backward = (torch.randn_like(x), x, mask, mean, var, weight, bias)
    for other in (None, torch.randn_like(x)):
        given = backward[0], other, *backward[1:], True, 1e-5, *as_it_is
        opcheck(backward_sums, given)
    opcheck(backward_frozen, (*backward, True, 1e-5, True))
    sums = torch.randn(2, x.shape[1], dtype=torch.float64, device=DEVICE)
    opcheck(backward_input, (*backward, sums, count, True, 1e-5, True, *as_it_is))


def test_opcheck_where_the_residual_is_normalised() -> None:
    given = {"residual": True, "normalised": True, "device": DEVICE}
    tensors = example("channels_last", torch.float32, **given)
    x, residual = (tensors[n].flatten(2) for n in ("x", "residual"))
    mean, var, res_mean, res_var = (t for n, t in tensors.items() if "running" in n)
    parameters = [tensors[n] for n in ("weight", "bias", "res_weight", "res_bias")]
    count = torch.tensor([105.0], dtype=torch.float64, device=DEVICE)
    leaves = [t.clone().requires_grad_() for t in (x, residual, *parameters)]
    call = leaves[0], mean, var, count, *leaves[2:4], leaves[1], True, 1e-5, True, "", False
    opcheck(normalise, (*call, res_mean, res_var, *leaves[4:]))
    mask = normalise(*call, res_mean, res_var, *leaves[4:])[1]
    of_x, of_residual = (mean, var, *parameters[:2]), (residual, res_mean, res_var, parameters[2])
    for other in (None, torch.randn_like(x)):
        given = torch.randn_like(x), other, x, mask, *of_x, True, 1e-5, *of_residual
        opcheck(backward_sums, given)
    sums = torch.randn(3, x.shape[1], dtype=torch.float64, device=DEVICE)
    for need_residual in (False, True):
        given = torch.randn_like(x), x, mask, *of_x, sums, count, True, 1e-5, need_residual
        opcheck(backward_input, (*given, *of_residual))


def test_launches_of_a_layer(launched: list[str]) -> None:
    """Three forward and three backward; in evaluation one, frozen two backward."""
    tensors = example("channels_last", torch.float32, residual=True, device=DEVICE)
    theirs = run(torch_formula, tensors, training=True)
    assert_same(run(batch_norm_act, tensors, training=True), theirs, rtol=1e-3, atol=1e-4)
    assert launched == [
        "statistics_kernel", "finish_statistics_kernel", "normalise_kernel",
        "backward_sums_kernel", "finish_backward_kernel", "backward_input_kernel",
    ]  # fmt: skip
    launched.clear()
    run(batch_norm_act, tensors, training=False)
    assert launched == ["normalise_kernel", "backward_sums_kernel", "finish_backward_kernel"]
    launched.clear()
    given = {"residual": True, "normalised": True, "device": DEVICE}
    run(batch_norm_act, example("channels_last", torch.float32, **given), training=True)
    assert launched == [
        "statistics_kernel", "finish_statistics_kernel",
        "statistics_kernel", "finish_statistics_kernel", "normalise_kernel",
        "backward_sums_kernel", "finish_backward_kernel", "backward_input_kernel",
    ]  # fmt: skip


@pytest.mark.parametrize("channels, pixels", [(64, 14400), (64, 57600), (2048, 3600), (8, 9)])
def test_partial_sums_are_added_in_four_rounds_of_loads(channels: int, pixels: int) -> None:
    size = BatchNormShape(16, channels, pixels)
    x = size.empty(torch.bfloat16, "meta")
    for direction in ("forward", "backward"):
        finish = batch_norm_launches(x, Variant(), direction, 90)[1]
        assert finish.kernel.__name__.startswith("finish")
        assert -(-finish.arguments["splits"] // finish.constants["BS"]) <= 4
        assert finish.grid[0] * finish.constants["BC"] >= channels


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("finish", [(2, 2, 4), (4, 16, 16)], ids=["rounds", "at once"])
def test_many_partial_sums(
    finish: tuple[int, int, int],
    layout: str,
    assert_accurate: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "_FINISH", (16, 1, 4))
    monkeypatch.setattr(plan, "_FINISH_MANY", finish)
    monkeypatch.setattr(plan, "_TILE_BYTES", 128)
    monkeypatch.setattr(plan, "_CHANNELS", 8)
    plan._configs.cache_clear()
    tensors = example(layout, torch.float32, device=DEVICE)
    x = tensors["x"].flatten(2)
    assert plan._walk(*plan._layout(x), 132, plan.configs(x)[0]).splits > 4
    check(tensors, assert_accurate, training=True)


class Walk(Watch):
    """The addresses that are loaded, in order."""

    def __enter__(self) -> Watch:
        self.walked: list[int] = []
        return super().__enter__()

    def _access(self, kind: Any, pointers: Any, mask: Any) -> None:
        super()._access(kind, pointers, mask)
        self.walked += pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].tolist()


@pytest.mark.skipif(not launch.interpreting(), reason="a GPU orders its programs itself")
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_the_second_pass_walks_back(layout: str) -> None:
    """What the first pass read last is still in the L2: as one sequence, x is read to and fro."""
    x = torch.randn(2, 32, 24, 24)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    with Walk() as walk:
        batch_norm_act(x, None, None, None, None, training=True, momentum=0.1, eps=1e-5)
    assert all(record.programs > 2 for record in walk.launches if "X" in record.loads)
    span = range(x.data_ptr(), x.data_ptr() + x.nbytes)
    read = [address for address in walk.walked if address in span]
    assert len(read) == 2 * x.numel()
    first, second = (np.argsort(part) for part in np.split(np.array(read), 2))
    assert np.corrcoef(first, second)[0, 1] < -0.99  # -1 but for the order within a tile


@TRAINING
def test_values_of_channels_may_lie_apart(training: bool) -> None:
    """Every second one of a longer row: read, moved and differentiated as side by side."""
    x, every = torch.randn(2, 4, 3, 3, device=DEVICE), torch.rand(4, 8, device=DEVICE)
    results = []
    for rows in (every.clone()[:, ::2], every[:, ::2].contiguous()):
        weight, bias = rows[0].detach().requires_grad_(), rows[1].detach().requires_grad_()
        y = batch_norm_act(x, weight, bias, *rows[2:], training=training, momentum=0.5, eps=1e-5)
        y.square().sum().backward()
        results.append([y.detach(), weight.grad, bias.grad, rows[2], rows[3]])
    for apart, beside in zip(*results, strict=True):
        assert torch.equal(apart, beside)
