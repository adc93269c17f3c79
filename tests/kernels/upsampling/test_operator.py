"""Upsampling joined with cross-entropy and arg-max, against the plain formulas in float64."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from encnet_triton.kernels import reference, upsample_argmax, upsample_cross_entropy
from encnet_triton.kernels.upsampling import library, tiles

# (B, C, h, w, H, W) with the reason for the case
SHAPES = {
    "ratio 8": (2, 5, 4, 6, 32, 48),
    "odd ratios": (2, 13, 7, 9, 56, 71),
    "equal size": (2, 3, 6, 5, 6, 5),
    "smaller target": (1, 4, 12, 11, 5, 6),
    "one low pixel": (1, 3, 1, 1, 5, 4),
    "one output pixel": (2, 3, 4, 4, 1, 1),
    "one class": (1, 1, 3, 3, 9, 9),
    "wide": (1, 2, 2, 30, 4, 400),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 6 x 5 pixels, so that small maps have many, of unequal sizes."""
    monkeypatch.setattr(
        tiles, "tile_shape", lambda height, width, *_: (min(height, 6), min(width, 5))
    )


def example(
    shape: tuple[int, ...], *, ignored: bool = True, spread: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """float64 logits and an int64 target, its first two rows ignored if there are more."""
    batch, classes, low_height, low_width, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(
        batch, classes, low_height, low_width, dtype=torch.float64, generator=generator
    )
    target = torch.randint(classes, (batch, height, width), generator=generator)
    if ignored and height > 2:
        target[:, :2] = 255
    return logits * spread, target


def value_and_gradient(
    function: Callable[..., Tensor], logits: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    loss = function(logits, target, **options)
    # Per-pixel losses get upstream gradients that differ from pixel to pixel.
    seed = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    (gradient,) = torch.autograd.grad(loss, logits, seed)
    return loss.detach(), gradient


def relative(error: Tensor, scale: Tensor) -> float:
    return float(error.double().norm() / scale.double().norm().clamp(min=1e-300))


@shapes
@pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float64_equals_the_formula(
    shape: tuple[int, ...], align_corners: bool, reduction: str, small_tiles: None
) -> None:
    logits, target = example(shape)
    for smoothing, weighted in itertools.product((0.0, 0.1), (False, True)):
        weight = torch.linspace(0, 2, shape[1], dtype=torch.float64) if weighted else None
        options = {
            "align_corners": align_corners,
            "reduction": reduction,
            "label_smoothing": smoothing,
            "weight": weight,
        }
        loss, gradient = value_and_gradient(upsample_cross_entropy, logits, target, **options)
        expected = value_and_gradient(reference.upsample_cross_entropy, logits, target, **options)
        torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids="smoothing{}".format)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_meaning_is_that_of_torch(smoothing: float, weighted: bool) -> None:
    logits, target = example(SHAPES["odd ratios"])
    weight = torch.rand(13, dtype=torch.float64) if weighted else None
    values = F.interpolate(logits, (56, 71), mode="bilinear", align_corners=True)
    expected = F.cross_entropy(
        values, target, ignore_index=255, weight=weight, label_smoothing=smoothing
    )
    loss = upsample_cross_entropy(logits, target, weight=weight, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_error_is_at_most_twice_that_of_torch(dtype: torch.dtype, reduction: str) -> None:
    logits, target = example((2, 21, 15, 12, 120, 96))
    logits = logits.to(dtype).double()
    options = {"reduction": reduction}
    exact = value_and_gradient(reference.upsample_cross_entropy, logits, target, **options)
    ours = value_and_gradient(upsample_cross_entropy, logits.to(dtype), target, **options)
    theirs = value_and_gradient(
        lambda x, t, **o: F.cross_entropy(
            F.interpolate(x, t.shape[1:], mode="bilinear", align_corners=True),
            t,
            ignore_index=255,
            **o,
        ),
        logits.to(dtype),
        target,
        **options,
    )
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    # Besides some units in the last place, as in `assert_accurate`.
    eps = torch.finfo(torch.float32).eps
    assert relative(ours[0] - exact[0], exact[0]) <= 8 * eps
    error = relative(ours[1] - exact[1], exact[1])
    assert error <= 2 * relative(theirs[1] - exact[1], exact[1]) + 4 * eps


@pytest.mark.float32
@pytest.mark.parametrize("spread", [1e-6, 30.0, 300.0, 1e4], ids="spread{:g}".format)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_far_apart_and_close_together(spread: float, reduction: str) -> None:
    """At 300 neighbouring pixels have winners so different that no exponential is left between."""
    logits, target = example((2, 7, 5, 6, 40, 48), spread=spread)
    logits = logits.float().double()
    exact = value_and_gradient(
        reference.upsample_cross_entropy, logits, target, reduction=reduction
    )
    ours = value_and_gradient(upsample_cross_entropy, logits.float(), target, reduction=reduction)
    # A loss is a difference of numbers of its own size; an exponential's relative error is the
    # absolute one of the logit, which is rounded to that part of the spread.
    eps = torch.finfo(torch.float32).eps
    assert relative(ours[0] - exact[0], exact[0]) <= 8 * eps
    assert relative(ours[1] - exact[1], exact[1]) <= eps * max(16, spread)


def test_a_common_offset_of_the_classes_changes_nothing() -> None:
    logits, target = example((1, 5, 6, 6, 48, 48))
    logits = (logits * 64).round() / 64
    shift = (torch.randn(1, 1, 6, 6, dtype=torch.float64) * 1000).round()
    plain = value_and_gradient(upsample_cross_entropy, logits.float(), target)
    shifted = value_and_gradient(upsample_cross_entropy, (logits + shift).float(), target)
    assert torch.equal(plain[0], shifted[0])
    assert torch.equal(plain[1], shifted[1])


def test_gradient_sums_to_zero_over_the_classes() -> None:
    logits, target = example((2, 9, 6, 6, 48, 48))
    _, gradient = value_and_gradient(upsample_cross_entropy, logits, target)
    assert gradient.sum(1).abs().max() < 1e-15


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction: str, small_tiles: None) -> None:
    logits, target = example((2, 3, 3, 2, 8, 7))
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: upsample_cross_entropy(
            x, target, weight=weight, label_smoothing=0.2, reduction=reduction
        ),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("ignore_index", [255, -100, 0, 1000], ids="ignore{}".format)
def test_target_types_and_ignored_values(dtype: torch.dtype, ignore_index: int) -> None:
    logits, target = example((2, 4, 4, 4, 16, 16), ignored=False)
    if dtype == torch.int64 or 0 <= ignore_index < 256:
        target[:, 3:9] = ignore_index
    loss = upsample_cross_entropy(logits, target.to(dtype), ignore_index=ignore_index)
    values = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=True)
    expected = F.cross_entropy(values, target, ignore_index=ignore_index)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, torch.zeros(3)], ids=["plain", "weights of 0"])
def test_no_labelled_pixel_gives_zero(reduction: str, weight: Tensor | None) -> None:
    target = torch.full((2, 8, 8), 255 if weight is None else 1)
    loss, gradient = value_and_gradient(
        upsample_cross_entropy, torch.randn(2, 3, 4, 4), target, reduction=reduction, weight=weight
    )
    assert not loss.any()
    assert torch.equal(gradient, torch.zeros(2, 3, 4, 4))


def test_an_empty_batch_gives_zero() -> None:
    loss, gradient = value_and_gradient(
        upsample_cross_entropy, torch.randn(0, 3, 4, 4), torch.zeros(0, 8, 8, dtype=torch.uint8)
    )
    assert loss == 0
    assert gradient.shape == (0, 3, 4, 4)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed", "expanded"])
def test_memory_formats(layout: str) -> None:
    logits, target = example((2, 5, 6, 7, 40, 44))
    logits = logits.float()
    expected = value_and_gradient(upsample_cross_entropy, logits, target)
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    elif layout == "strided":
        logits = torch.stack((logits, -logits), 4)[..., 0]
        target = target.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "transposed":
        logits = logits.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        logits, target = logits[:1].expand(2, -1, -1, -1), target[:1].expand(2, -1, -1)
        expected = value_and_gradient(upsample_cross_entropy, logits.contiguous(), target)
    variable = logits.detach().requires_grad_()
    loss = upsample_cross_entropy(variable, target)
    (gradient,) = torch.autograd.grad(loss, variable, torch.tensor(0.5))
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(gradient, expected[1])


def test_result_is_the_same_every_time_and_for_any_number_of_threads(small_tiles: None) -> None:
    logits, target = example((3, 5, 6, 7, 40, 44))
    first = value_and_gradient(upsample_cross_entropy, logits.float(), target)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = value_and_gradient(upsample_cross_entropy, logits.float(), target)
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)


def test_threads_of_others_keep_their_number() -> None:
    counts: list[int] = []

    def work(_: int) -> int:
        working.set()
        asked.wait(10)
        return torch.get_num_threads()

    def run() -> None:
        shares.extend(tiles.in_threads(work, range(4), torch.device("cpu")))
        counts.append(torch.get_num_threads())

    def ask() -> None:  # for the first time
        counts.append(torch.get_num_threads())

    working, asked, shares = Event(), Event(), list[int]()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        running, asking = Thread(target=run), Thread(target=ask)
        running.start()
        working.wait(10)
        time.sleep(0.2)
        asking.start()
        asking.join()
        asked.set()
        running.join()
        assert counts == [4, 4] and set(shares) == {1}
    finally:
        torch.set_num_threads(threads)


def test_a_default_device_is_not_that_of_the_tensors(small_tiles: None) -> None:
    logits, target = example((2, 5, 6, 7, 40, 44))
    logits.requires_grad_()
    losses = upsample_cross_entropy(logits, target)
    (expected,) = torch.autograd.grad(losses, logits)
    with torch.device("meta"):
        loss = upsample_cross_entropy(logits, target)
    (found,) = torch.autograd.grad(loss, logits)
    assert torch.equal(loss, losses) and torch.equal(found, expected)


def test_sizes_that_change_compile_once_where_gradients_are_on() -> None:
    sizes: list[int] = []

    def counting(module: torch.fx.GraphModule, _: Any) -> Any:
        sizes.append(len(module.graph.nodes))
        return module.forward

    @torch.compile(backend=counting, fullgraph=True, dynamic=True)
    def labels(z: Tensor) -> Tensor:
        return upsample_argmax(z, (z.shape[2] * 8, z.shape[3] * 8))[0]

    assert torch.is_grad_enabled()
    for size in (4, 5, 6):
        z = torch.randn(1, 5, size, size)
        assert torch.equal(labels(z), upsample_argmax(z, (8 * size, 8 * size))[0])
    assert len(sizes) == 1


def test_works_under_inference_mode_and_autocast() -> None:
    logits, target = example((2, 5, 6, 7, 40, 44))
    logits = logits.float()
    expected = value_and_gradient(upsample_cross_entropy, logits, target)
    with torch.inference_mode():
        assert torch.equal(upsample_cross_entropy(logits, target), expected[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = value_and_gradient(upsample_cross_entropy, logits, target)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


def test_nothing_of_full_size_is_allocated() -> None:
    logits, target = example((1, 64, 32, 32, 512, 512))
    logits = logits.float().requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        upsample_cross_entropy(logits, target).backward()
        upsample_cross_entropy(logits, target, reduction="none").sum().backward()
        upsample_argmax(logits, (512, 512), return_prob=True)
    largest = max(abs(e.cpu_memory_usage) for e in profile.events())
    assert largest < 64 * 512 * 512 * 4 / 8


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction: str) -> None:
    logits, target = example((2, 5, 4, 4, 16, 16))
    weight = torch.rand(5, dtype=torch.float64)

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return upsample_cross_entropy(x * 2, t, weight=weight, reduction=reduction)

    expected = value_and_gradient(loss, logits, target)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    result = value_and_gradient(compiled, logits, target)
    torch.testing.assert_close(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1])
    labels = torch.compile(upsample_argmax, fullgraph=True, backend="aot_eager")(logits, (16, 16))
    assert torch.equal(labels, upsample_argmax(logits, (16, 16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(dtype: torch.dtype) -> None:
    logits, target = example((2, 3, 3, 4, 12, 10))
    logits = logits.to(dtype).to(memory_format=torch.channels_last)
    options = (torch.rand(3), 255, True, 0.1)
    torch.library.opcheck(
        library.losses_of_pixels, (logits.clone().requires_grad_(), target, *options)
    )
    leaf = logits.clone().requires_grad_()
    torch.library.opcheck(library.reduced, (leaf, target, *options, True, True))
    torch.library.opcheck(library.reduced, (logits, target, *options, False, False))
    loss, lse = library.losses_of_pixels(logits, target, *options)
    torch.library.opcheck(
        library.backward, (torch.rand_like(loss), logits, target, lse, None, *options)
    )
    loss, rates, gradient = library.reduced(logits, target, *options, True, True)
    torch.library.opcheck(library.scale_gradient, (loss, rates, gradient, dtype))
    torch.library.opcheck(library.most_likely, (logits, 12, 10, False, True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction: str) -> None:
    logits, target = example((1, 3, 3, 3, 9, 9))
    logits.requires_grad_()
    loss = upsample_cross_entropy(logits, target, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_inside_vmap_loss_and_gradient_are_those_of_each_image(reduction: str) -> None:
    logits, target = example((3, 3, 4, 4, 8, 8))

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return upsample_cross_entropy(logits[None], target[None], reduction=reduction).sum()

    together, alone = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = torch.func.vmap(loss)(together, target)
    expected = torch.stack([loss(*pair) for pair in zip(alone, target, strict=True)])
    assert torch.equal(losses, expected)
    losses.sum().backward()
    expected.sum().backward()
    assert together.grad is not None and alone.grad is not None
    assert torch.equal(together.grad, alone.grad)


def test_flops_are_counted() -> None:
    logits, target = example((2, 3, 4, 4, 16, 16))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        upsample_cross_entropy(logits.requires_grad_(), target).backward()
    taps, images, classes = 4, 2, 3
    one_way = taps * images * classes * (4 * 16 + 16 * 16)
    assert counter.get_total_flops() == 2 * one_way


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, "B x C x h x w"),
        ({"logits": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "got torch.int64"),
        ({"logits": None}, "got NoneType"),
        ({"target": torch.zeros(2, 8, 8)}, "uint8 or int64 tensor, got torch.float32"),
        ({"target": torch.zeros(3, 8, 8, dtype=torch.uint8)}, r"B = 2 of logits.*\(3, 8, 8\)"),
        ({"target": torch.zeros(2, 8, dtype=torch.uint8)}, r"\(2, 8\)"),
        (
            {"target": torch.full((2, 8, 8), 7)},
            "value 7; for 3 classes it may hold 0 to 2 and",
        ),
        ({"target": torch.full((2, 8, 8), -1)}, "value -1;"),
        ({"target": torch.zeros(2, 8, 8, dtype=torch.uint8, device="meta")}, "target is on meta"),
        ({"weight": torch.ones(4)}, "weight must hold 3"),
        ({"weight": torch.ones(3, dtype=torch.int64)}, "got torch.int64"),
        ({"reduction": "max"}, "got 'max'"),
        ({"weight": [1.0, 1.0, 1.0]}, "weight must be a tensor or None, got list"),
        ({"weight": torch.tensor([1.0, -1.0, 1.0])}, r"at least 0, got \[1.0, -1.0, 1.0\]"),
        ({"weight": torch.tensor([1.0, math.nan, 1.0])}, "finite numbers"),
        ({"label_smoothing": 1.5}, "got 1.5"),
        ({"label_smoothing": None}, "label_smoothing must be a number, got None"),
        ({"ignore_index": None}, "ignore_index must be an integer, got None"),
        ({"ignore_index": 1.5}, "ignore_index must be an integer, got 1.5"),
        ({"align_corners": "no"}, "align_corners must be True or False, got 'no'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "logits": torch.zeros(2, 3, 4, 4),
        "target": torch.zeros(2, 8, 8, dtype=torch.uint8),
        **change,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        upsample_cross_entropy(arguments.pop("logits"), arguments.pop("target"), **arguments)


@shapes
@pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
def test_argmax_equals_the_formula(
    shape: tuple[int, ...], align_corners: bool, small_tiles: None
) -> None:
    logits, _ = example(shape)
    size = shape[4:]
    label, prob = upsample_argmax(logits, size, align_corners=align_corners, return_prob=True)
    expected, expected_prob = reference.upsample_argmax(logits, size, align_corners=align_corners)
    assert label.dtype == torch.uint8
    assert torch.equal(label.long(), expected)
    torch.testing.assert_close(prob, expected_prob, rtol=1e-12, atol=1e-12)
    assert torch.equal(upsample_argmax(logits, size, align_corners=align_corners), label)


@pytest.mark.float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_argmax_picks_a_winner_in_every_dtype(dtype: torch.dtype) -> None:
    logits = example((1, 11, 6, 6, 48, 48), spread=100)[0].to(dtype)
    label, prob = upsample_argmax(logits, (48, 48), return_prob=True)
    values = F.interpolate(logits.double(), (48, 48), mode="bilinear", align_corners=True)
    chosen = values.gather(1, label.long()[:, None])[:, 0]
    # Of classes that float32 cannot tell apart any may be named: at most 8 units in the last place
    # of the largest logit below the highest.
    undecided = 8 * torch.finfo(torch.float32).eps * float(logits.abs().max())
    assert (values.amax(1) - chosen).max() <= undecided
    assert prob.dtype == torch.float32
    assert prob.min() >= 1 / 11
    assert prob.max() <= 1


def test_argmax_of_many_classes_is_int64() -> None:
    logits = torch.zeros(1, 300, 2, 2)
    logits[:, 299] = 1
    assert upsample_argmax(logits, (4, 4)).dtype == torch.int64
    assert (upsample_argmax(logits, (4, 4)) == 299).all()


@pytest.mark.parametrize("size", [(0, 4), (4, -1)], ids=str)
def test_argmax_refuses_an_empty_size(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 x 1"):
        upsample_argmax(torch.zeros(1, 2, 3, 3), size)


@pytest.mark.parametrize("size", [None, 8, (8,), (8.0, 8), (True, 8), "88"], ids=str)
def test_argmax_names_a_size_of_another_type(size: Any) -> None:
    with pytest.raises(TypeError, match="size must be"):
        upsample_argmax(torch.zeros(1, 2, 3, 3), size)


def test_interpolation_weights_are_those_of_torch() -> None:
    for low, full, align_corners in itertools.product((1, 2, 7), (1, 3, 20), (True, False)):
        like = torch.zeros((), dtype=torch.float64)
        parts = tiles.spans(low, full, 4, align_corners, like)
        matrix = torch.zeros(full, low, dtype=torch.float64)
        for part in parts:
            matrix[part.full, part.low] = part.weight
        values = torch.randn(1, 1, low, 1, dtype=torch.float64)
        expected = F.interpolate(
            values, (full, 1), mode="bilinear", align_corners=align_corners
        ).flatten()
        torch.testing.assert_close(matrix @ values.flatten(), expected, rtol=0, atol=1e-13)
        assert math.isclose(float(matrix.sum()), full)
