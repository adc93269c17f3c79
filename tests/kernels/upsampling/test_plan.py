"""The Triton kernels of the upsampling operators, interpreted or on a GPU, against float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from bench.static.interpreter import Watch
from encnet_triton.kernels import upsample_argmax, upsample_cross_entropy
from encnet_triton.kernels.runtime import launch
from encnet_triton.kernels.upsampling import library, plan
from encnet_triton.kernels.upsampling.axis import Axis, rows_of_part, strip_of
from tests.support.fraction import half
from tests.support.opcheck import opcheck
from tests.support.upsampling import DEVICE, example, formula

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CORNERS = pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
# (B, C, h, w, H, W) and dtypes, with the reason for the case
CASES = {
    "ratio 8": ((2, 6, 2, 3, 16, 24), (FP32, BF16, FP16)),
    "as 60 to 480": ((1, 10, 2, 9, 10, 66), (FP32, BF16)),
    "odd ratios": ((1, 21, 3, 5, 7, 23), (FP32, FP16)),
    "equal size": ((1, 4, 5, 4, 5, 4), (BF16,)),
    "smaller target": ((2, 3, 7, 6, 4, 3), (FP32,)),
    "one low pixel": ((1, 3, 1, 1, 12, 5), (FP32, FP16)),
    "one output pixel": ((2, 3, 4, 4, 1, 1), (BF16,)),
    "two classes": ((1, 2, 3, 3, 7, 7), (FP16,)),
    "several chunks of classes": ((1, 50, 2, 2, 3, 4), (FP32, BF16)),
    "two strips of columns": ((1, 4, 2, 36, 3, 72), (FP32,)),
}
cases = pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, id=f"{name}-{str(dtype)[6:]}")
        for name, (shape, dtypes) in CASES.items()
        for dtype in dtypes
    ],
)


def watching(order: Any = None) -> contextlib.AbstractContextManager[Any]:
    """Programs in some order, every address checked, no two programs at one address."""
    return Watch(order=order, races=True) if launch.interpreting() else contextlib.nullcontext()


@pytest.fixture(
    params=[
        pytest.param(None, marks=pytest.mark.verify, id="in order"),
        pytest.param("reverse", marks=pytest.mark.verify, id="reverse"),
        pytest.param(3, id="shuffled"),
    ]
)
def watched(request: pytest.FixtureRequest) -> Iterator[None]:
    if not launch.interpreting() and request.param is not None:
        pytest.skip("a GPU orders its programs itself")
    with watching(request.param):
        yield


def value_and_gradient(
    function: Callable[..., Tensor], logits: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss = function(logits, target, **options)
    # Per-pixel losses get upstream gradients that differ from pixel to pixel, in sign too.
    seed = torch.linspace(-0.5, 1.5, loss.numel(), device=DEVICE).view(loss.shape).to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, logits, seed)
    return loss.detach(), gradient


def check(
    logits: Tensor, target: Tensor, assert_accurate: Callable[..., None], **options: Any
) -> None:
    ours = value_and_gradient(upsample_cross_entropy, logits, target, **options)
    plain = value_and_gradient(formula, logits, target, **options)
    exact = value_and_gradient(formula, logits.double(), target, **options)
    assert ours[0].dtype == torch.float32
    if ours[0].dim() == 0:
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=0.0)
    assert_accurate("losses", ours[0], plain[0], exact[0])
    assert ours[1].dtype == logits.dtype and ours[1].stride() == logits.stride()
    assert_accurate("gradient", ours[1], plain[1], exact[1])


@cases
@pytest.mark.parametrize(
    "align_corners",
    [
        pytest.param(True, id="corners"),
        pytest.param(False, marks=pytest.mark.verify, id="centres"),
    ],
)
def test_error_is_at_most_twice_that_of_torch(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    align_corners: bool,
    assert_accurate: Callable[..., None],
    launched: list[str],
) -> None:
    logits, target = example(shape, dtype)
    with watching():
        check(logits, target, assert_accurate, align_corners=align_corners, reduction="sum")
    assert launched == ["forward_kernel", "finish_kernel", "backward_kernel"]


@pytest.mark.parametrize(
    ("reduction", "smoothing", "weighted"),
    half(
        {"mean": "mean", "sum": "sum", "none": "none"},
        {"": 0.0, "smoothed": 0.1},
        {"": False, "weighted": True},
    ),
)
def test_every_option(
    reduction: str, smoothing: float, weighted: bool, assert_accurate: Callable[..., None]
) -> None:
    logits, target = example((2, 3, 2, 3, 6, 9))
    weight = torch.linspace(0, 2, 3, device=DEVICE) if weighted else None
    check(
        logits,
        target,
        assert_accurate,
        reduction=reduction,
        label_smoothing=smoothing,
        weight=weight,
    )


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_programs_may_run_in_any_order(
    reduction: str, assert_accurate: Callable[..., None]
) -> None:
    logits, target = example((2, 18, 4, 3, 8, 7))
    check(logits, target, assert_accurate, reduction=reduction)


@pytest.mark.parametrize(
    "ignore_index",
    [3, -100, *(pytest.param(other, marks=pytest.mark.verify) for other in (255, 7))],
    ids="ignored {}".format,
)
def test_labels_of_eight_bytes(ignore_index: int, assert_accurate: Callable[..., None]) -> None:
    """Also where the ignored label is a class, or just not one."""
    logits, target = example((1, 5, 2, 2, 6, 7))
    target = target.long()
    target[target == 255] = ignore_index
    check(logits, target, assert_accurate, reduction="mean", ignore_index=ignore_index)


@pytest.mark.parametrize(
    "view",
    [
        lambda z: z.contiguous(),
        lambda z: z.transpose(2, 3).contiguous().transpose(2, 3),
        lambda z: torch.cat([z, z], 1)[:, : z.shape[1]],
    ],
    ids=["contiguous", "transposed", "part of a tensor"],
)
def test_any_memory_format(view: Callable[[Tensor], Tensor]) -> None:
    logits, target = example((2, 6, 2, 3, 5, 9))
    expected = value_and_gradient(upsample_cross_entropy, logits, target)
    ours = value_and_gradient(upsample_cross_entropy, view(logits), target)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


def begins_at(offset: int, tensor: Tensor) -> Tensor:
    """A copy with the same strides that lies `offset` elements from the start of its memory."""
    memory = torch.empty(offset + tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


@pytest.mark.parametrize(
    ("classes", "dtype"), [(2, BF16), (24, BF16), (7, BF16), (24, FP16), (24, FP32)], ids=str
)
def test_logits_that_begin_anywhere(
    classes: int, dtype: torch.dtype, assert_accurate: Callable[..., None]
) -> None:
    """Two classes read at once must not begin between two multiples of four bytes."""
    logits, target = example((1, classes, 2, 3, 4, 9), dtype)
    view = begins_at(1, logits)
    with watching():
        check(view, target, assert_accurate, reduction="sum")
        label = upsample_argmax(view, (5, 9))
    assert torch.equal(label, upsample_argmax(logits, (5, 9)))


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "begins anywhere": lambda t: begins_at(1, t),
    "columns of a larger one": lambda t: torch.cat([t[..., :1], t], -1)[..., 1:],
    "transposed": lambda t: t.transpose(-1, 0).contiguous().transpose(-1, 0),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("label", [torch.uint8, torch.int64], ids=str)
def test_other_arguments_that_begin_anywhere(
    part: Callable[[Tensor], Tensor], label: torch.dtype
) -> None:
    logits, target = example((2, 6, 1, 3, 2, 9), BF16)
    weight = torch.linspace(0.2, 2, 6, device=DEVICE).to(BF16)
    grad = torch.linspace(-0.5, 1.5, target.numel(), device=DEVICE).view(target.shape)

    def losses_and_gradient(*others: Tensor) -> tuple[Tensor, Tensor]:
        target, weight, grad = others
        leaf = logits.detach().requires_grad_()
        losses = upsample_cross_entropy(leaf, target, weight=weight, reduction="none")
        return losses.detach(), torch.autograd.grad(losses, leaf, grad)[0]

    others = (target.to(label), weight, grad)
    expected = losses_and_gradient(*others)
    with watching():
        ours = losses_and_gradient(*map(part, others))
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("sizes", "align_corners"),
    [
        ((40, 70, 2, 3), False),
        pytest.param((24, 70, 1, 1), True, marks=pytest.mark.verify),
        pytest.param((24, 70, 1, 1), False, marks=pytest.mark.verify),
    ],
    ids=str,
)
def test_a_much_smaller_target(sizes: tuple[int, ...], align_corners: bool) -> None:
    """Some programs own only low rows after the last output row, or columns before the first."""
    logits, target = example((1, 4, *sizes))
    options: dict[str, Any] = {"align_corners": align_corners, "reduction": "none"}
    with watching():
        ours = value_and_gradient(upsample_cross_entropy, logits, target, **options)
    exact = value_and_gradient(formula, logits.double(), target, **options)
    # A loss is the difference of two numbers as large as logits, and so is log p.
    bound = 4 * torch.finfo(FP32).eps * logits.abs().max().item()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.0, atol=bound)


@pytest.mark.parametrize(
    "gap", [12.0, 1e4, *(pytest.param(other, marks=pytest.mark.verify) for other in (80.0, 300.0))]
)
def test_neighbours_that_are_sure_of_different_classes(
    gap: float, assert_accurate: Callable[..., None]
) -> None:
    """Between them both classes are far below the maxima: exp underflows about those."""
    logits, target = example((1, 5, 3, 3, 13, 13))
    rows = torch.arange(3, device=DEVICE)
    logits[0, rows, rows] += gap
    logits[0, (rows + 1) % 3, rows] -= gap
    ours = value_and_gradient(upsample_cross_entropy, logits, target, reduction="none")
    plain = value_and_gradient(formula, logits, target, reduction="none")
    exact = value_and_gradient(formula, logits.double(), target, reduction="none")
    assert_accurate("losses", ours[0], plain[0], exact[0])
    assert_accurate("gradient", ours[1], plain[1], exact[1])


def test_nothing_labelled() -> None:
    logits, target = example((2, 4, 2, 2, 4, 4))
    loss, gradient = value_and_gradient(
        upsample_cross_entropy, logits, torch.full_like(target, 255)
    )
    assert loss == 0 and not gradient.any()


def test_one_class_has_no_loss() -> None:
    logits, target = example((1, 1, 2, 2, 4, 4))
    loss, gradient = value_and_gradient(upsample_cross_entropy, logits, target, reduction="none")
    assert loss.abs().max() < 1e-5 and gradient.abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(0, 4, 2, 2, 4, 4), (2, 4, 2, 2, 4, 4)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_empty_batch_has_no_loss(shape: tuple[int, ...], reduction: str) -> None:
    logits, target = example((2, *shape[1:]))
    logits, target = logits[: shape[0]], target[: shape[0]]
    loss, gradient = value_and_gradient(upsample_cross_entropy, logits, target, reduction=reduction)
    assert loss.shape == (() if reduction == "sum" else target.shape)
    assert bool(loss.sum() > 0) == bool(shape[0]) and gradient.shape == logits.shape


@pytest.mark.skipif(not launch.interpreting(), reason="on a GPU the context is lost")
@pytest.mark.parametrize("value", [5, -1])
def test_a_label_that_is_no_class_fails(value: int) -> None:
    logits, target = example((1, 5, 2, 2, 4, 4))
    target = target.long()
    target[0, 3, 3] = value
    with pytest.raises(Exception, match="neither a class nor ignore_index"):
        upsample_cross_entropy(logits, target)


@cases
def test_argmax(shape: tuple[int, ...], dtype: torch.dtype, launched: list[str]) -> None:
    logits, _ = example(shape, dtype)
    align_corners = dtype == FP32
    with watching():
        label, prob = upsample_argmax(
            logits, shape[4:], align_corners=align_corners, return_prob=True
        )
    upsampled = F.interpolate(
        logits.double(), shape[4:], mode="bilinear", align_corners=align_corners
    )
    highest = upsampled.gather(1, label.long()[:, None])[:, 0]
    # Of classes that are equal but for rounding any may be named.
    torch.testing.assert_close(highest, upsampled.amax(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prob.double(), upsampled.softmax(1).amax(1), rtol=1e-5, atol=1e-6)
    if dtype == FP32:
        assert torch.equal(upsample_argmax(logits, shape[4:]), label)
    assert set(launched) == {"argmax_kernel"}


@pytest.mark.parametrize("classes", [40, 300])
def test_of_equal_classes_the_first_is_named(classes: int) -> None:
    logits = torch.zeros(1, classes, 2, 2, device=DEVICE)
    logits[:, [classes - 1, 37, 21]] = 1.0
    label = upsample_argmax(logits, (5, 5))
    assert (label == 21).all()
    assert label.dtype == (torch.uint8 if classes <= 256 else torch.int64)


def test_mean_and_sum_keep_one_number_a_pixel() -> None:
    logits, target = example((2, 6, 3, 4, 24, 32), torch.bfloat16)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        upsample_cross_entropy(logits.requires_grad_(), target)
    made = [t for t in saved if t.numel() > 1 and t.shape not in (logits.shape, target.shape)]
    assert not made
    of_pixels = {t.dtype for t in saved if t.shape == target.shape}
    assert of_pixels == {torch.float32, torch.uint8}


class _New(TorchDispatchMode):
    """Shapes of what is allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if "empty" in func.__name__ and out.device.type != "meta":
            self.shapes.append(out.shape)
        return out


def test_the_gradient_of_logits_is_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.Launch, "run", lambda _: None)
    logits, target = example((1, 2, 3, 4, 5, 6))
    grad, lse = torch.ones((), device=DEVICE), torch.zeros(1, 5, 6, device=DEVICE)
    with _New() as made:
        library.backward._init_fn(grad, logits, target, lse, None, None, 255, True, 0.0)
    assert made.shapes == [logits.shape]


def test_without_gradients_nothing_is_kept() -> None:
    logits, target = example((1, 4, 3, 3, 9, 9))
    total, rates, saved = library.reduced(logits, target, None, 255, True, 0.0, False, False)
    assert saved.numel() == 0 and rates == 72
    torch.testing.assert_close(
        total.double(), formula(logits.double(), target, reduction="sum"), rtol=1e-6, atol=0.0
    )


def test_where_a_low_column_touches_too_many_pixels_pytorch_runs(launched: list[str]) -> None:
    logits, target = example((1, 3, 1, 2, 2, 600))
    assert not plan.supports(logits, 2, 600, True)
    loss, gradient = value_and_gradient(upsample_cross_entropy, logits, target)
    exact = value_and_gradient(formula, logits.double(), target, reduction="mean")
    torch.testing.assert_close((loss.double(), gradient.double()), exact, rtol=1e-5, atol=1e-6)
    assert not launched


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(reduction: str) -> None:
    logits, target = example((2, 6, 2, 2, 4, 5), torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(upsample_cross_entropy, fullgraph=True, backend="aot_eager")
    ours = value_and_gradient(compiled, logits, target, reduction=reduction)
    expected = value_and_gradient(upsample_cross_entropy, logits, target, reduction=reduction)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


def test_opcheck() -> None:
    logits, target = example((1, 3, 2, 2, 4, 3))
    options = (torch.rand(3, device=DEVICE), 255, True, 0.1)
    leaf = logits.clone().requires_grad_()
    opcheck(library.losses_of_pixels, (leaf, target, *options))
    opcheck(library.reduced, (leaf, target, *options, True, True))
    opcheck(library.reduced, (logits, target, *options, False, False))
    loss, lse = library.losses_of_pixels(logits, target, *options)
    one, rates = (torch.ones((), dtype=dtype, device=DEVICE) for dtype in (None, torch.float64))
    for grad in ((torch.rand_like(loss), None), (one, None), (one, rates)):
        given = grad[0], logits, target, lse, grad[1], *options
        opcheck(library.backward, given)
    opcheck(library.most_likely, (logits, 4, 3, False, True))


@CORNERS
@pytest.mark.parametrize("low", [1, 2, 7, 60])
@pytest.mark.parametrize("high", [1, 3, 60, 97, 480])
def test_rows_and_columns_are_where_the_formula_has_them(
    low: int, high: int, align_corners: bool
) -> None:
    axis = Axis(low, high, align_corners)
    for place in range(high):
        if align_corners:
            source = Fraction(place * (low - 1), max(high - 1, 1))
        else:
            source = Fraction(2 * place + 1, 2) * Fraction(low, high) - Fraction(1, 2)
        before = min(math.floor(source), low - 1)
        assert axis.before(place) == max(before, -1)
        assert axis.first_after(before) <= place < axis.first_after(before + 1)
    found = strip_of(axis)
    if found is None:
        return
    own, width = found
    before = [axis.before(place) for place in range(high)]
    for first in range(0, low, own):
        reach = [one for one in before if first - 1 <= one < first + own]
        assert len(reach) <= width
    rows, parts = rows_of_part(axis)
    counts = [axis.first_after(i + 1) - axis.first_after(i) for i in axis.gaps]
    assert sum(counts) == high and max(counts) <= rows * parts
