"""Encoding Layer against the formula with all residuals, in float64, and what must hold of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from encnet_triton.kernels import encode, reference
from encnet_triton.kernels.encoding import pytorch
from encnet_triton.kernels.encoding.operator import _encode_backward, _encode_forward
from encnet_triton.kernels.runtime import tiling

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES: dict[str, tuple[tuple[int, ...], int, Callable[[Tensor], Tensor]]] = {
    "contiguous": ((2, 20, 7, 9), 6, lambda x: x),
    "channels_last": ((2, 20, 7, 9), 6, lambda x: x.to(memory_format=torch.channels_last)),
    "BxNxC": ((2, 30, 20), 6, lambda x: x),
    "one pixel": ((3, 5, 1, 1), 4, lambda x: x),
    "one codeword": ((2, 5, 4, 3), 1, lambda x: x),
    "one channel": ((2, 1, 4, 3), 3, lambda x: x),
    "three channels": ((1, 3, 5, 7), 32, lambda x: x),
    "strided pixels": ((2, 6, 8, 10), 3, lambda x: x[:, :, ::2, 1::3]),
    "strided channels": ((2, 12, 4, 5), 3, lambda x: x[:, 1::2]),
    "spatial transpose": ((2, 6, 4, 5), 3, lambda x: x.transpose(2, 3)),
    "transposed BxNxC": ((2, 6, 20), 3, lambda x: x.transpose(1, 2)),
    "expanded batch": ((1, 6, 4, 5), 3, lambda x: x.expand(3, -1, -1, -1)),
    "more than 65535 pixels": ((1, 2, 70_000, 1), 2, lambda x: x),
}
SMALL_TILE_CASES = ("contiguous", "channels_last", "BxNxC", "strided pixels")
ids = pytest.mark.parametrize("case", CASES)


def example(
    case: str, dtype: torch.dtype, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x in the layout of the case, codewords and scale of soft assignments, and dE."""
    shape, num, layout = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    channels = shape[1] if len(shape) == 4 else shape[2]
    x = layout((torch.randn(shape, generator=generator) + offset).to(dtype))
    channels = x.shape[1] if x.dim() == 4 else x.shape[2]
    codewords = torch.randn(num, channels, generator=generator) + offset
    scale = -torch.rand(num, generator=generator) * 2 / channels
    grad = torch.randn(x.shape[0], num, channels, generator=generator)
    if dtype == torch.float64:
        codewords, scale, grad = codewords.double(), scale.double(), grad.double()
    return x, codewords, scale, grad


def run(
    function: Callable[..., Tensor],
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    grad: Tensor,
    **options: Any,
) -> dict[str, Tensor]:
    """E and every gradient; x keeps its strides."""
    leaves = [t.detach().requires_grad_() for t in (x, codewords, scale)]
    code = function(*leaves, **options)
    code.backward(grad.to(code.dtype))
    named = zip(("x", "codewords", "scale"), leaves, strict=True)
    return {"E": code.detach()} | {n: t.grad for n, t in named if t.grad is not None}


def wide(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [t.to(dtype) for t in tensors]


def terms(x: Tensor, codewords: Tensor, scale: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """What E and the gradients are summed from, in absolute values: dscale is 200 times smaller."""
    pixels = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
    residuals = (pixels[:, :, None] - codewords).abs()  # [B, N, K, C]
    distances = residuals.square().sum(3)
    a = (scale * distances).softmax(2)
    da = (residuals * grad.abs()[:, None]).sum(3)
    dl = a * (da + (a * da).sum(2, keepdim=True))
    w = 2 * scale.abs() * dl
    found = {
        "E": a[..., None] * residuals,
        "x": a[..., None] * grad.abs()[:, None] + w[..., None] * residuals,
        "scale": dl * distances,
    }
    summed = {"E": 1, "x": 2, "scale": (0, 1)}
    sums = {name: value.sum(summed[name]) for name, value in found.items()}
    return sums | {"codewords": found["x"].sum((0, 1))}


def check(inputs: tuple[Tensor, ...], assert_accurate: Callable[..., None]) -> dict[str, Tensor]:
    """E and every gradient against float64 and the formula in float32."""
    ours = run(encode, *inputs)
    plain = run(reference.encode, *wide(torch.float32, *inputs))
    exact = run(reference.encode, *wide(torch.float64, *inputs))
    summed = terms(*wide(torch.float64, *inputs))
    for name in exact:
        assert_accurate(name, ours[name], plain[name], exact[name], summed[name])
    return ours


@ids
def test_float64_equals_the_formula(case: str) -> None:
    inputs = example(case, torch.float64)
    ours, exact = run(encode, *inputs), run(reference.encode, *inputs)
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@ids
def test_error_is_at_most_twice_that_of_the_formula(
    case: str, dtype: torch.dtype, assert_accurate: Callable[..., None]
) -> None:
    inputs = example(case, dtype)
    ours = check(inputs, assert_accurate)
    assert ours["E"].dtype == torch.float32
    assert ours["x"].dtype == dtype


@pytest.mark.parametrize("case", SMALL_TILE_CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("elements", [16, 26 * 48, 26 * 130], ids=["16 px", "48 px", "2 images"])
def test_tiling_changes_nothing(
    case: str, dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = example(case, dtype)
    whole = run(encode, *inputs)
    monkeypatch.setattr(tiling, "_ELEMENTS_CPU", elements)
    tiled = run(encode, *inputs)
    for name, value in whole.items():
        torch.testing.assert_close(tiled[name], value, msg=name)


@pytest.mark.float32
@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_a_common_offset_costs_no_accuracy(
    offset: float, assert_accurate: Callable[..., None]
) -> None:
    inputs = example("contiguous", torch.float32, offset)
    check(inputs, assert_accurate)


@pytest.mark.float32
def test_realistic_size_with_sharp_assignments(assert_accurate: Callable[..., None]) -> None:
    """512 channels at initialisation: logits of hundreds, most weights underflow."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 512, 15, 20, generator=generator).relu()
    codewords = (torch.rand(32, 512, generator=generator) - 0.5) / 64
    scale = -torch.rand(32, generator=generator)
    inputs = (x, codewords, scale, torch.randn(1, 32, 512, generator=generator))
    check(inputs, assert_accurate)


@pytest.mark.float32
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_many_pixels_of_one_sign(
    memory_format: torch.memory_format, assert_accurate: Callable[..., None]
) -> None:
    """Sums over 9,216 values that never cancel are where sequential addition shows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 32, 96, 96, generator=generator).contiguous(memory_format=memory_format)
    codewords = -torch.rand(4, 32, generator=generator)
    scale = -torch.rand(4, generator=generator) / 16
    inputs = (x, codewords, scale, torch.randn(2, 4, 32, generator=generator))
    check(inputs, assert_accurate)


@pytest.mark.parametrize("case", ["contiguous", "BxNxC"])
def test_gradcheck(case: str) -> None:
    x, codewords, scale, _ = example(case, torch.float64)
    x = x[..., :3].contiguous()
    codewords = codewords[:, : x.shape[1 if x.dim() == 4 else 2]]
    inputs = [t.detach().requires_grad_() for t in (x, codewords, scale)]
    assert torch.autograd.gradcheck(encode, inputs)


def test_weights_of_a_pixel_sum_to_one() -> None:
    """With equal codewords, sum_k E_k is the sum of all residuals whatever the scales are."""
    x, codewords, scale, _ = example("contiguous", torch.float64)
    codewords = codewords[:1].expand_as(codewords)
    residuals = (x.flatten(2) - codewords[0][:, None]).sum(2)
    torch.testing.assert_close(encode(x, codewords, 10 * scale).sum(1), residuals)


def test_scale_zero_assigns_evenly_and_has_finite_gradients() -> None:
    x, codewords, scale, grad = example("contiguous", torch.float64)
    inputs = (x, codewords, torch.zeros_like(scale), grad)
    result = run(encode, *inputs)
    total = x.flatten(2).sum(2)[:, None] - x[0, 0].numel() * codewords
    torch.testing.assert_close(result["E"], total / len(scale))
    torch.testing.assert_close(result["scale"], run(reference.encode, *inputs)["scale"])
    assert result["scale"].abs().min() > 0


def test_permuting_pixels_leaves_the_code_and_permutes_the_gradient() -> None:
    x, codewords, scale, grad = example("BxNxC", torch.float64)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))
    plain = run(encode, x, codewords, scale, grad)
    permuted = run(encode, x[:, order], codewords, scale, grad)
    torch.testing.assert_close(permuted["E"], plain["E"])
    torch.testing.assert_close(permuted["x"], plain["x"][:, order])


def test_shifting_features_and_codewords_together_changes_nothing() -> None:
    x, codewords, scale, grad = example("BxNxC", torch.float64)
    shift = torch.linspace(-3, 3, x.shape[2], dtype=torch.float64)
    plain = run(encode, x, codewords, scale, grad)
    shifted = run(encode, x + shift, codewords + shift, scale, grad)
    for name, value in plain.items():
        torch.testing.assert_close(shifted[name], value, msg=name)


@pytest.mark.parametrize("factor", [-1e4, 1e4, 1e30])
def test_extreme_scales_stay_finite(factor: float) -> None:
    x, codewords, scale, grad = example("contiguous", torch.float32)
    result = run(encode, x, codewords, scale.sign() * factor / 1e3, grad)
    assert result["E"].isfinite().all()
    if factor < 1e30:
        assert all(value.isfinite().all() for value in result.values())


def test_backward_scale_replaces_scale_in_the_gradient_alone() -> None:
    x, codewords, scale, grad = example("channels_last", torch.float64)
    other = scale.flip(0) * 3
    ours = run(encode, x, codewords, scale, grad, backward_scale=other)
    exact = run(reference.encode, x, codewords, scale, grad, backward_scale=other)
    plain = run(encode, x, codewords, scale, grad)
    assert "scale" not in ours
    torch.testing.assert_close(ours["E"], plain["E"])
    torch.testing.assert_close(ours["x"], exact["x"])
    torch.testing.assert_close(ours["codewords"], exact["codewords"])
    assert (ours["x"] - plain["x"]).abs().max() > 1e-3


def test_statistics_are_those_of_the_code() -> None:
    x, codewords, scale, _ = example("contiguous", torch.float64)
    code, total, m2 = encode(x.requires_grad_(), codewords, scale, return_stats=True)
    exact_total, exact_m2 = reference.code_statistics(code)
    torch.testing.assert_close(total, exact_total.detach())
    torch.testing.assert_close(m2, exact_m2.detach())
    assert code.requires_grad and not total.requires_grad and not m2.requires_grad
    torch.testing.assert_close(code, encode(x, codewords, scale))


def test_the_gradient_of_x_is_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(2, 5, 5, 8).permute(0, 3, 1, 2).flatten(2)
    grad = torch.empty(2, 25, 8).transpose(1, 2)
    with _Largest() as made:
        assert tiling.laid_out_as(x, grad) is grad
    assert made.allocated == 0
    contiguous = torch.empty(2, 8, 25)
    assert tiling.laid_out_as(contiguous, grad).stride() == contiguous.stride()


def test_layout_of_the_input_gradient_follows_the_input() -> None:
    x, codewords, scale, grad = example("channels_last", torch.float32)
    assert run(encode, x, codewords, scale, grad)["x"].stride() == x.stride()


@pytest.mark.parametrize("needed", ["x", "codewords", "scale"])
def test_only_the_gradient_that_is_needed(needed: str) -> None:
    x, codewords, scale, grad = example("contiguous", torch.float64)
    every = run(encode, x, codewords, scale, grad)
    inputs = {"x": x, "codewords": codewords, "scale": scale}
    inputs[needed].requires_grad_()
    encode(**inputs).backward(grad)
    for name, tensor in inputs.items():
        assert (tensor.grad is None) == (name != needed)
    torch.testing.assert_close(inputs[needed].grad, every[needed])


def test_half_precision_parameters_get_gradients_in_their_dtype() -> None:
    x, codewords, scale, grad = example("contiguous", torch.bfloat16)
    result = run(encode, x, codewords.bfloat16(), scale.bfloat16(), grad)
    assert result["codewords"].dtype == result["scale"].dtype == torch.bfloat16
    assert result["E"].dtype == torch.float32


def test_autocast_does_not_lower_the_precision() -> None:
    inputs = example("contiguous", torch.bfloat16)
    plain = run(encode, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(encode, *inputs)
    for name, value in plain.items():
        assert torch.equal(under[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    x, codewords, scale, _ = example("contiguous", dtype)
    inputs = (x[:0], codewords, scale)
    result = run(encode, *inputs, torch.empty(0, *codewords.shape))
    assert result["E"].shape == (0, *codewords.shape)
    assert result["x"].shape == x[:0].shape
    assert (result["codewords"] == 0).all() and (result["scale"] == 0).all()


def test_runs_are_bit_identical() -> None:
    inputs = example("contiguous", torch.float32)
    first, second = run(encode, *inputs), run(encode, *inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


class _Largest(TorchDispatchMode):
    """Most elements of any tensor made, views of `known` tensors excepted."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.elements = 0
        self.allocated = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.itemsize)
            self.allocated += out.device.type != "meta"
        return out


def test_temporaries_are_those_of_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    images, channels, pixels, num, elements = 2, 32, 4096, 16, 1 << 14
    monkeypatch.setattr(tiling, "_ELEMENTS_CPU", elements)
    x = torch.randn(images, channels, pixels)
    codewords, scale = torch.randn(num, channels), -torch.rand(num)
    grad = torch.randn(images, num, channels)
    with _Largest(x) as largest:
        pytorch.forward(x, codewords, scale)
    assert largest.elements <= elements
    with _Largest(x) as largest:
        pytorch.backward(grad, x, codewords, scale, None, False, True)
    assert largest.elements <= elements
    with _Largest(x) as largest:
        pytorch.backward(grad, x, codewords, scale, None, True, True)
    assert largest.elements == x.numel()


def test_only_x_the_parameters_and_counters_are_saved() -> None:
    x, codewords, scale, _ = example("channels_last", torch.float32)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        encode(x.requires_grad_(), codewords, scale)
    owned = {t.untyped_storage().data_ptr() for t in (x, codewords, scale)}
    copies = [t for t in saved if t.untyped_storage().data_ptr() not in owned]
    # Counters for up to as many groups as there are images, and one for the groups.
    assert [(t.dtype, t.numel()) for t in copies] == [(torch.int32, len(x) + 1)]


@pytest.mark.parametrize("case", ["contiguous", "channels_last"])
@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("regularised", [False, True])
def test_opcheck(case: str, return_stats: bool, regularised: bool) -> None:
    x, codewords, scale, grad = example(case, torch.float32)
    features = x.flatten(2).requires_grad_()
    other = scale.clone() if regularised else None
    inputs = (features, codewords.requires_grad_(), scale.requires_grad_(), other, return_stats)
    torch.library.opcheck(_encode_forward, inputs)
    plain = [t.detach() for t in (grad, features, codewords, scale)]
    counters = torch.zeros(len(x) + 1, dtype=torch.int32)
    torch.library.opcheck(_encode_backward, (*plain, other, True, not return_stats, counters))


@pytest.mark.parametrize("case", ["contiguous", "channels_last", "BxNxC", "spatial transpose"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(case: str, dynamic: bool) -> None:
    inputs = example(case, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ours, eager = run(compiled, *inputs), run(encode, *inputs)
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value, msg=name)


def test_flops_are_counted() -> None:
    x, codewords, scale, grad = example("contiguous", torch.float32)
    with FlopCounterMode(display=False) as counter:
        run(encode, x, codewords, scale, grad)
    products = x.numel() * codewords.shape[0]
    assert counter.get_total_flops() == 2 * (2 + 5) * products


def _bad(**changes: Any) -> dict[str, Any]:
    good = {"x": torch.zeros(2, 4, 3, 3), "codewords": torch.zeros(5, 4), "scale": torch.zeros(5)}
    return good | changes


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (_bad(x=[1.0]), TypeError, "x must be a tensor, got list"),
        (_bad(x=torch.zeros(2, 4)), ValueError, "B x C x H x W or B x N x C, got shape"),
        (_bad(x=torch.zeros(2, 4, 3, 3, dtype=torch.int32)), TypeError, "got torch.int32"),
        (_bad(codewords=None), TypeError, "codewords must be a tensor, got NoneType"),
        (_bad(codewords=torch.zeros(5, 3)), ValueError, r"C = 4 .* got shape \(5, 3\)"),
        (_bad(codewords=torch.zeros(5, 4, 1)), ValueError, "codewords must be K x C"),
        (_bad(codewords=torch.zeros(5, 4).half()), TypeError, "codewords must be float32 or"),
        (_bad(codewords=torch.zeros(0, 4), scale=torch.zeros(0)), ValueError, "at least one"),
        (_bad(scale=torch.zeros(4)), ValueError, r"scale must have one value .* 5 .* \(4,\)"),
        (_bad(scale=torch.zeros(5, 1)), ValueError, "scale must have one value"),
        (_bad(scale=torch.zeros(5, device="meta")), ValueError, "x's device cpu, got meta"),
        (_bad(backward_scale=torch.zeros(1)), ValueError, "backward_scale must have one value"),
        (_bad(return_stats="yes"), TypeError, "return_stats must be True or False, got 'yes'"),
        (_bad(backward_scale=0.5), TypeError, "backward_scale must be a tensor, got float"),
        (_bad(x=torch.zeros(2, 3, 4, device="meta")), ValueError, "x's device meta, got cpu"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        encode(**arguments)
    assert "\n" not in str(caught.value)


def test_the_operator_itself_refuses_mixed_devices() -> None:
    x, codewords = torch.zeros(2, 4, 9), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="scale must be on x's device"):
        _encode_forward(x, codewords, torch.zeros(5, device="meta"), None, False)
