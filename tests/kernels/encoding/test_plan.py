"""The Triton kernels of `encode`, in Triton's interpreter or on a GPU, against float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from bench.static.interpreter import Watch
from encnet_triton.kernels import encode, reference
from encnet_triton.kernels.encoding import plan
from encnet_triton.kernels.encoding.fused import run_of
from encnet_triton.kernels.encoding.operator import _encode_backward, _encode_forward
from encnet_triton.kernels.runtime import launch
from encnet_triton.kernels.runtime.launch import Config, Machine
from tests.support.fraction import half
from tests.support.opcheck import opcheck

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

DEVICE = "cpu" if launch.interpreting() else "cuda"
HALF = (torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.verify))
FUSED, SPLIT, WHOLE = (Config(16, 32, 4, form) for form in ("fused", "split", "whole"))

# Shape B, N, C, K and what is awkward about it.
CASES = {
    "as the tiles": (2, 64, 64, 16),
    "nothing fits a tile": (2, 37, 40, 5),
    "one pixel": (3, 1, 24, 4),
    "one codeword": (2, 21, 16, 1),
    "one channel": (2, 18, 1, 3),
    "three channels": (1, 33, 3, 32),
    "one image, many tiles": (1, 300, 16, 8),
    "two programs share the channels": (1, 20, 520, 33),
    "many codewords": (1, 19, 24, 65),
    "two groups of images": (18, 5, 16, 3),
    "several tiles read ahead": (1, 75, 136, 33),
    "read ahead both ways": (1, 75, 136, 9),
    "several tiles by descriptor": (2, 40, 136, 5),
}
WIDE = "two programs share the channels"
AHEAD = ("several tiles read ahead", "read ahead both ways")
BOXED = "several tiles by descriptor"


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


CONFIGS = {"fused": FUSED, "split": SPLIT, "whole": WHOLE, "default": None}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Config | None:
    """The configuration that every launch takes; small tiles, so that there are several."""
    if request.param is not None:
        for name in ("forward_configs", "backward_configs"):
            monkeypatch.setattr(plan, name, lambda *_: [request.param])
    return request.param


def example(case: str, dtype: torch.dtype) -> list[Tensor]:
    """x, B x N x C, codewords, scale of soft assignments, and dE."""
    images, pixels, channels, num = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    x = torch.randn(images, pixels, channels, generator=generator).to(dtype)
    codewords = torch.randn(num, channels, generator=generator)
    scale = -torch.rand(num, generator=generator) * 2 / channels
    grad = torch.randn(images, num, channels, generator=generator)
    return [t.to(DEVICE) for t in (x, codewords, scale, grad)]


def products(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """The formula as matrix products in x.dtype; norms, softmax and sums in float32."""
    xd = (x @ codewords.to(x.dtype).t()).float()
    distance = x.float().square().sum(2, keepdim=True) - 2 * xd + codewords.square().sum(1)
    weights = (scale * distance).softmax(2)
    total = (weights.to(x.dtype).transpose(1, 2) @ x).float()
    return total - weights.sum(1).unsqueeze(2) * codewords


def run(
    function: Callable[..., Any], *inputs: Tensor, grad: Tensor, **options: Any
) -> dict[str, Tensor]:
    """E and every gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    code = function(*leaves, **options)
    code.backward(grad.to(code.dtype))
    named = zip(("x", "codewords", "scale"), leaves, strict=True)
    return {"E": code.detach()} | {n: t.grad for n, t in named if t.grad is not None}


def check(
    inputs: list[Tensor], assert_accurate: Callable[..., None], ours: dict[str, Tensor]
) -> None:
    plain, exact = with_products(*inputs)
    for name, value in exact.items():
        its = plain[name]
        if name == "scale":
            # K sums that cancel: how much one draw loses is luck, of PyTorch's as of ours. Its
            # error is the largest of some draws, made until one allows for ours.
            own, most = largest_error(ours[name].cpu(), value), 0.0
            for others in (inputs, *(redrawn(inputs, seed) for seed in range(8))):
                both = (made["scale"] for made in with_products(*others))
                most = max(most, largest_error(*both))
                if own <= most:
                    break
            its = value + most
        assert_accurate(name, ours[name].cpu(), its, value)


def with_products(*inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """E and every gradient, by matrix products and by the reference in float64, on the CPU."""
    *inputs, grad = inputs
    plain = run(products, *inputs, grad=grad)
    exact = run(reference.encode, *(t.cpu().double() for t in inputs), grad=grad.cpu())
    return {name: t.cpu() for name, t in plain.items()}, exact


def redrawn(inputs: list[Tensor], seed: int) -> list[Tensor]:
    """Others like them, with the same scale."""
    generator = torch.Generator().manual_seed(seed)
    x, codewords, scale, grad = inputs
    x, codewords, grad = (
        torch.randn(t.shape, generator=generator).to(t) for t in (x, codewords, grad)
    )
    return [x, codewords, scale, grad]


def largest_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


@pytest.mark.parametrize(
    ("config", "dtype", "case"),
    half(
        CONFIGS,
        {str(dtype): dtype for dtype in (torch.float32, *HALF)},
        {case: case for case in CASES if case not in (WIDE, *AHEAD, BOXED)},
    ),
    indirect=["config"],
)
def test_error_is_at_most_twice_that_of_the_matrix_products(
    config: Config | None, case: str, dtype: torch.dtype, assert_accurate: Callable[..., None]
) -> None:
    *inputs, grad = example(case, dtype)
    watch = Watch(races=True) if launch.interpreting() else contextlib.nullcontext()
    with watch:
        ours = run(encode, *inputs, grad=grad)
    assert ours["x"].dtype == dtype
    check([*inputs, grad], assert_accurate, ours)


@pytest.mark.usefixtures("config", "watched")
@pytest.mark.parametrize("case", ["nothing fits a tile", "two groups of images"])
def test_programs_may_run_in_any_order(case: str, assert_accurate: Callable[..., None]) -> None:
    *inputs, grad = example(case, torch.bfloat16)
    check([*inputs, grad], assert_accurate, run(encode, *inputs, grad=grad))


@pytest.mark.parametrize("config", [WHOLE], ids=["whole"], indirect=True)
def test_a_program_an_image_gives_the_same_bits_in_any_order(config: Config) -> None:
    *inputs, grad = example("two groups of images", torch.bfloat16)
    orders = (None, "reverse", 3) if launch.interpreting() else (None,) * 3
    results = []
    for order in orders:
        with Watch(order=order) if launch.interpreting() else contextlib.nullcontext():
            results.append(run(encode, *inputs, grad=grad))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize("config", [WHOLE], ids=["whole"], indirect=True)
def test_many_groups_of_images(
    config: Config, assert_accurate: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the 16 rows that a program has under way at once."""
    monkeypatch.setattr(plan, "_GROUP", 1)
    *inputs, grad = example("two groups of images", torch.bfloat16)
    with Watch(races=True) if launch.interpreting() else contextlib.nullcontext():
        ours = run(encode, *inputs, grad=grad)
    check([*inputs, grad], assert_accurate, ours)


@pytest.mark.parametrize("forward", [FUSED, SPLIT, WHOLE], ids=["fused", "split", "whole"])
def test_every_forward_pass_leaves_counters_that_the_backward_pass_can_count_in(
    forward: Config, assert_accurate: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second backward pass finds them at zero too."""
    monkeypatch.setattr(plan, "forward_configs", lambda *_: [forward])
    monkeypatch.setattr(plan, "backward_configs", lambda *_: [WHOLE])
    *inputs, grad = example("two groups of images", torch.float32)
    x, codewords, scale = inputs
    features = x.transpose(1, 2)
    code, _, _, counters = _encode_forward(features, codewords, scale, None, False)
    assert not counters.any()
    passes = []
    for _ in range(2):
        made = _encode_backward(grad, features, codewords, scale, None, True, True, counters)
        assert not counters.any()
        passes.append(made)
    for one, other in zip(*passes, strict=True):
        assert torch.equal(one, other)
    gradients = dict(zip(("x", "codewords", "scale"), passes[0], strict=True))
    gradients["x"] = gradients["x"].transpose(1, 2)
    check([*inputs, grad], assert_accurate, {"E": code, **gradients})


@pytest.mark.usefixtures("watched")
def test_programs_that_share_the_channels(assert_accurate: Callable[..., None]) -> None:
    *inputs, grad = example(WIDE, torch.bfloat16)
    check([*inputs, grad], assert_accurate, run(encode, *inputs, grad=grad))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", AHEAD)
def test_a_program_that_reads_ahead_reads_the_tile_that_follows(
    case: str,
    dtype: torch.dtype,
    assert_accurate: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine of one multiprocessor gives all tiles of the image to one program."""
    one = Machine(90, 1)
    monkeypatch.setattr(launch, "machine", lambda _: one)
    *inputs, grad = example(case, dtype)
    x, codewords, scale = inputs
    call = plan.Forward(x.transpose(1, 2), codewords, scale, False)
    launches, _ = call.launches(one, call.configs(one)[0])
    first = launches[0]
    assert first.constants["AHEAD"] and first.arguments["splits"] == 1
    assert x.shape[1] > 2 * first.constants["BN"]
    if case == "read ahead both ways":
        counters = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        back = plan.Backward(grad, x.transpose(1, 2), codewords, scale, scale, True, counters)
        first = back.launches(one, back.configs(one)[0])[0][0]
        assert first.constants["AHEAD"] and first.arguments["splits"] == 1
        assert x.shape[1] > 2 * first.constants["BN"]
    with Watch(races=True) if launch.interpreting() else contextlib.nullcontext():
        ours = run(encode, *inputs, grad=grad)
    check([*inputs, grad], assert_accurate, ours)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_tensor_descriptor_reads_the_tiles_of_its_image(
    dtype: torch.dtype, assert_accurate: Callable[..., None]
) -> None:
    """Three tiles a program; the last one goes beyond the pixels and the channels of its image."""
    if not launch.interpreting() and launch.machine(torch.device(DEVICE)).arch < 90:
        pytest.skip("no tensor descriptors below sm_90")
    x, codewords, scale, grad = example(BOXED, dtype)
    around = x.new_full((2, 40, 152), torch.nan)
    around[:, :, 8:144] = x
    last = around.clone()
    last[1] = torch.nan  # what follows the first image
    codes = []
    for rows in (around, last):
        call = plan.Forward(rows[:, :, 8:144].transpose(1, 2), codewords, scale, False)
        config = Config(16, 256, 8, "boxed", stages=3)
        launches, (code, *_) = call.launches(Machine(90, 1), config)
        assert launches[0].arguments["splits"] == 1
        with Watch(races=True) if launch.interpreting() else contextlib.nullcontext():
            launch.run_all(launches)
        codes.append(code)
    plain, exact = with_products(x, codewords, scale, grad)
    assert_accurate("E", codes[0].cpu(), plain["E"], exact["E"])
    assert torch.equal(codes[1][0], codes[0][0])


def around_codewords(offset: float, dtype: torch.dtype) -> list[Tensor]:
    """Pixels at a distance of 0.7 from codewords at a distance of 1 from the offset, and dE."""
    generator = torch.Generator().manual_seed(0)
    codewords = torch.randn(8, 136, generator=generator) + offset
    nearest = codewords[torch.randint(0, 8, (1, 48), generator=generator)]
    x = (nearest + 0.7 * torch.randn(nearest.shape, generator=generator)).to(dtype)
    scale = -torch.rand(8, generator=generator) * 0.05 - 0.01
    grad = torch.randn(1, 8, 136, generator=generator)
    return [t.to(DEVICE) for t in (x, codewords, scale, grad)]


def errors(offset: float, dtype: torch.dtype) -> dict[str, float]:
    """Of E and each gradient, relative to what float64 gives."""
    *inputs, grad = around_codewords(offset, dtype)
    exact = run(reference.encode, *(t.cpu().double() for t in inputs), grad=grad.cpu())
    ours = run(encode, *inputs, grad=grad)
    return {n: ((ours[n].cpu() - v).norm() / v.norm()).item() for n, v in exact.items()}


@pytest.mark.parametrize(
    "config", [FUSED, SPLIT, WHOLE], ids=["fused", "split", "whole"], indirect=True
)
def test_a_common_offset_costs_no_digits(config: Config) -> None:
    """Weights and dx are rounded to bfloat16 whatever the offset, by 2^-9 or less."""
    without, found = errors(0.0, torch.bfloat16), errors(20.0, torch.bfloat16)
    assert found.pop("E") <= 1e-3
    assert all(error <= 2 * without[name] for name, error in found.items()), found


@pytest.mark.parametrize("config", [FUSED], ids=["fused"], indirect=True)
def test_a_common_offset_costs_few_digits_of_float32(config: Config) -> None:
    """20 has 4 binary digits that 1 has not: 16 times 2^-24 for x itself."""
    assert errors(20.0, torch.float32)["E"] <= 1e-5


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "B x C x H x W": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "every other pixel": lambda x: x[:, :, ::2, ::2],
    "half of the channels": lambda x: x[:, 8:],
    "one image for all": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = LAYOUTS[layout](torch.randn(2, 24, 6, 8, generator=generator).to(DEVICE))
    codewords = torch.randn(4, x.shape[1], generator=generator).to(DEVICE)
    scale = -torch.rand(4, generator=generator).to(DEVICE) / 8
    grad = torch.randn(x.shape[0], 4, x.shape[1], generator=generator).to(DEVICE)
    leaf = x.detach().requires_grad_()
    code = encode(leaf, codewords, scale)
    code.backward(grad)
    rows = x.flatten(2).transpose(1, 2).contiguous().requires_grad_()
    expected = encode(rows, codewords, scale)
    expected.backward(grad)
    assert torch.equal(code, expected)
    assert leaf.grad is not None and rows.grad is not None
    torch.testing.assert_close(leaf.grad.flatten(2), rows.grad.transpose(1, 2))


def test_channels_last_is_not_copied() -> None:
    x = torch.empty(2, 8, 5, 5, device=DEVICE).to(memory_format=torch.channels_last).flatten(2)
    assert plan.channels_last(x) is x
    assert plan.channels_last(x[:, :4]).data_ptr() == x.data_ptr()
    contiguous = torch.empty(2, 8, 25, device=DEVICE)
    assert plan.channels_last(contiguous).stride() == (200, 1, 8)


@pytest.mark.parametrize("case", ["nothing fits a tile", "three channels"])
def test_statistics_are_those_of_the_code(case: str) -> None:
    x, codewords, scale, _ = example(case, torch.float32)
    code, total, m2 = encode(x, codewords, scale, return_stats=True)
    torch.testing.assert_close(total, code.sum(2), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(m2, code.var(2, correction=0) * code.shape[2])


@pytest.mark.usefixtures("config")
def test_backward_scale_takes_the_place_of_scale(assert_accurate: Callable[..., None]) -> None:
    x, codewords, scale, grad = example("nothing fits a tile", torch.float32)
    other = scale * 3
    ours = run(encode, x, codewords, scale, grad=grad, backward_scale=other)
    exact = run(
        reference.encode, *(t.cpu().double() for t in (x, codewords, scale)), grad=grad.cpu(),
        backward_scale=other.cpu().double(),
    )  # fmt: skip
    assert "scale" not in ours
    for name in ("E", "x", "codewords"):
        torch.testing.assert_close(ours[name].cpu().double(), exact[name], rtol=1e-4, atol=1e-5)


def test_scales_of_zero_and_above_have_finite_gradients() -> None:
    x, codewords, _, grad = example("nothing fits a tile", torch.float32)
    scale = torch.tensor([0.0, 0.01, -0.01, 0.02, 0.0], device=DEVICE)
    ours = run(encode, x, codewords, scale, grad=grad)
    exact = run(
        reference.encode, *(t.cpu().double() for t in (x, codewords, scale)), grad=grad.cpu()
    )
    for name, value in exact.items():
        torch.testing.assert_close(ours[name].cpu().double(), value, rtol=1e-4, atol=1e-4)


def test_sharp_assignments_of_512_channels(assert_accurate: Callable[..., None]) -> None:
    """At initialisation logits are hundreds and most weights underflow."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 70, 512, generator=generator).relu().bfloat16()
    codewords = (torch.rand(32, 512, generator=generator) - 0.5) / 64
    scale = -torch.rand(32, generator=generator)
    grad = torch.randn(1, 32, 512, generator=generator)
    *inputs, grad = (t.to(DEVICE) for t in (x, codewords, scale, grad))
    check([*inputs, grad], assert_accurate, run(encode, *inputs, grad=grad))


def test_no_images_or_no_pixels() -> None:
    codewords, scale = torch.randn(3, 8, device=DEVICE), -torch.rand(3, device=DEVICE)
    for shape in ((0, 5, 8), (2, 0, 8)):
        x = torch.empty(shape, device=DEVICE)
        ours = run(encode, x, codewords, scale, grad=torch.ones(shape[0], 3, 8, device=DEVICE))
        assert torch.equal(ours["E"], torch.zeros(shape[0], 3, 8, device=DEVICE))
        assert ours["x"].shape == shape
        assert not ours["codewords"].any() and not ours["scale"].any()


@pytest.mark.parametrize(
    "config", [FUSED, SPLIT, WHOLE], ids=["fused", "split", "whole"], indirect=True
)
@pytest.mark.parametrize("far", ["images", "pixels"])
def test_offsets_beyond_32_bits(config: Config, far: str) -> None:
    """Rows that lie 2^31 elements apart in memory that is mapped but for its ends never touched."""
    torch.use_deterministic_algorithms(False)
    shape = (2, 5, 16) if far == "images" else (1, 200, 16)
    apart = (2**31 + 64, 16, 1) if far == "images" else (1, 2**24 - 16, 1)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, apart, strict=True))
    x = torch.empty(extent, dtype=torch.bfloat16, device=DEVICE).as_strided(shape, apart)
    x.copy_(torch.randn(shape))
    codewords, scale = torch.randn(3, 16, device=DEVICE), -torch.rand(3, device=DEVICE)
    grad = torch.randn(shape[0], 3, 16, device=DEVICE)
    near = run(encode, x.contiguous(), codewords, scale, grad=grad)
    launched = {
        "E": _encode_forward(x.transpose(1, 2), codewords, scale, None, False)[0],
    }
    counters = torch.zeros(shape[0] + 1, dtype=torch.int32, device=DEVICE)
    launched["x"] = _encode_backward(
        grad, x.transpose(1, 2), codewords, scale, None, True, True, counters
    )[0]
    assert torch.equal(launched["E"], near["E"])
    assert torch.equal(launched["x"].transpose(1, 2), near["x"])


@triton.jit
def _runs_kernel(Out, splits, tiles):
    begin, end = run_of(tl.program_id(0), splits, tiles)
    tl.store(Out + 2 * tl.program_id(0), begin)
    tl.store(Out + 2 * tl.program_id(0) + 1, end)


@pytest.mark.parametrize(("splits", "tiles"), [(5, 13), (5, 3), (1, 9), (528, 2**22), (64, 2**30)])
def test_runs_share_all_tiles_evenly(splits: int, tiles: int) -> None:
    runs = torch.zeros(splits, 2, dtype=torch.int64, device=DEVICE)
    _runs_kernel[(splits,)](runs, splits, tiles)
    begin, end = runs.T
    assert begin[0] == 0 and end[-1] == tiles and torch.equal(begin[1:], end[:-1])
    assert (end - begin).max() == -(-tiles // splits)


def test_too_many_codewords_take_the_pytorch_code() -> None:
    x, codewords, scale = torch.randn(1, 9, 4), torch.randn(257, 4), -torch.rand(257)
    inputs = [t.to(DEVICE) for t in (x, codewords, scale)]
    assert not plan.supports(inputs[0].transpose(1, 2), inputs[1])
    expected = reference.encode(*(t.double() for t in inputs))
    torch.testing.assert_close(encode(*inputs).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, codewords, scale, grad = example("nothing fits a tile", dtype)
    leaves = [t.requires_grad_() for t in (x.transpose(1, 2), codewords, scale)]
    opcheck(_encode_forward._opoverload, (*leaves, None, True))
    inputs = [t.detach() for t in (grad, *leaves)]
    counters = torch.zeros(len(x) + 1, dtype=torch.int32, device=DEVICE)
    opcheck(_encode_backward._opoverload, (*inputs, None, True, True, counters))


def test_compiles_in_one_graph() -> None:
    *inputs, grad = example("nothing fits a tile", torch.bfloat16)
    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
    ours, eager = run(compiled, *inputs, grad=grad), run(encode, *inputs, grad=grad)
    for name, value in eager.items():
        assert torch.equal(ours[name], value), name


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
            return encode(x, codewords, scale)

    *inputs, _ = example("nothing fits a tile", torch.float32)
    program = torch.export.export(Layer(), tuple(inputs))
    assert torch.equal(program.module()(*inputs), encode(*inputs))
