import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from encnet_triton.models import SegmentationOutput
from encnet_triton.nn import SegmentationLoss, dice_loss, presence_target

N = 5


def batch(size: int = 3, *, dtype: torch.dtype = torch.float64, aux: bool = True) -> Any:
    """Outputs with gradient and targets with ignored areas of unequal size."""
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    output = SegmentationOutput(
        leaf(size, N, 4, 5), (leaf(size, N), leaf(size, N)), leaf(size, N, 4, 5) if aux else None
    )
    target = torch.randint(0, N - 1, (size, 16, 20), dtype=torch.uint8)
    for image in range(size):
        target[image, : 4 * image] = 255
    return output, target


def leaves(output: SegmentationOutput) -> list[Tensor]:
    return [output.logits, *output.se] + ([] if output.aux is None else [output.aux])


def part(output: SegmentationOutput, images: slice) -> SegmentationOutput:
    aux = None if output.aux is None else output.aux[images]
    return SegmentationOutput(output.logits[images], tuple(s[images] for s in output.se), aux)


def pixel_loss(logits: Tensor, target: Tensor, align_corners: bool = True, **kw: Any) -> Tensor:
    size = target.shape[1:]
    full = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(full, target.long(), ignore_index=255, **kw)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_presence_lists_the_classes_of_each_image(dtype: torch.dtype) -> None:
    target = torch.tensor([[[0, 0], [4, 255]], [[255, 255], [255, 255]], [[3, 1], [7, 2]]])
    expected = torch.tensor([[1, 0, 0, 0, 1], [0] * 5, [0, 1, 1, 1, 0]], dtype=torch.float32)
    assert torch.equal(presence_target(target.to(dtype), N), expected)


def test_presence_leaves_out_an_ignored_class_inside_the_range() -> None:
    target = torch.tensor([[[0, 2], [-1, 4]]])
    found = presence_target(target, N, ignore_index=2)
    assert found.tolist() == [[1, 0, 0, 0, 1]]


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_terms_equal_torch_formulas(weighted: bool, align_corners: bool) -> None:
    output, target = batch()
    weights = [0.5, 1.0, 2.0, 0.1, 3.0] if weighted else None
    criterion = SegmentationLoss(
        N,
        aux_weight=0.4,
        align_corners=align_corners,
        class_weight=weights,
        label_smoothing=0.1,
    )
    terms = criterion(output, target)
    kw: dict[str, Any] = {"label_smoothing": 0.1, "align_corners": align_corners}
    if weights:
        kw["weight"] = torch.tensor(weights).double()
    present = torch.zeros(3, N, dtype=torch.float64)
    for image in range(3):
        present[image, [c for c in target[image].unique().tolist() if c != 255]] = 1
    se = sum(F.binary_cross_entropy_with_logits(s, present) for s in output.se)
    torch.testing.assert_close(terms.segmentation, pixel_loss(output.logits, target, **kw))
    torch.testing.assert_close(terms.aux, pixel_loss(output.aux, target, **kw))
    torch.testing.assert_close(terms.se, se)
    total = terms.segmentation + 0.2 * terms.se + 0.4 * terms.aux
    torch.testing.assert_close(terms.total, total)


def test_absent_branches_are_zero() -> None:
    output, target = batch()
    terms = SegmentationLoss(N)(SegmentationOutput(output.logits, (), None), target)
    assert terms.se == 0
    assert terms.aux == 0
    assert terms.total == terms.segmentation


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_parts_with_global_counts_sum_to_the_whole(weighted: bool) -> None:
    """What accumulation does, and N processes after the averaging of gradients."""
    output, target = batch()
    criterion = SegmentationLoss(
        N, aux_weight=0.2, class_weight=[0.5, 1.0, 2.0, 0.1, 3.0] if weighted else None
    )
    whole = criterion(output, target)
    expected = torch.autograd.grad(whole.total, leaves(output))
    slices = [slice(0, 1), slice(1, 3)]
    pixels = sum(criterion.pixels_in(target[s]) for s in slices)
    terms = [criterion(part(output, s), target[s], pixels=pixels, images=3.0) for s in slices]
    got = torch.autograd.grad(sum(t.total for t in terms), leaves(output))
    assert abs(sum(t.total for t in terms) - whole.total) < 1e-12
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


def test_pixels_in_counts_labelled_pixels() -> None:
    target = torch.tensor([[[0, 1, 255], [4, 4, 255]]], dtype=torch.uint8)
    assert SegmentationLoss(N).pixels_in(target) == 4
    weighted = SegmentationLoss(N, class_weight=[1.0, 2.0, 0.0, 0.0, 0.25])
    count = weighted.pixels_in(target)
    assert count == 3.5
    assert count.dtype == torch.float64 and count.shape == ()


@pytest.mark.parametrize("count", ["default", "tensor", "number"])
def test_nothing_labelled_gives_zero_and_no_nan(count: str) -> None:
    output, target = batch(aux=True)
    target.fill_(255)
    zero = {"default": None, "tensor": torch.zeros((), dtype=torch.float64), "number": 0.0}[count]
    terms = SegmentationLoss(N, aux_weight=0.2)(output, target, pixels=zero)
    terms.total.backward()
    assert terms.segmentation == 0
    assert torch.equal(output.logits.grad, torch.zeros_like(output.logits))
    assert all(torch.isfinite(t.grad).all() for t in leaves(output))


def test_float64_counts_do_not_widen_the_loss() -> None:
    output, target = batch(dtype=torch.float32)
    terms = SegmentationLoss(N, class_weight=[1.0] * N)(output, target)
    assert {t.dtype for t in terms} == {torch.float32}


@pytest.mark.float32
def test_half_precision_outputs_give_an_fp32_loss() -> None:
    output, target = batch(dtype=torch.bfloat16)
    terms = SegmentationLoss(N, aux_weight=0.2, class_weight=[1.0] * N)(output, target)
    terms.total.backward()
    assert {t.dtype for t in terms} == {torch.float32}
    reference = SegmentationLoss(N, aux_weight=0.2)(
        SegmentationOutput(
            output.logits.double(), tuple(s.double() for s in output.se), output.aux.double()
        ),
        target,
    )
    # The inputs are the same; positive terms are summed, each a few units in the last place off.
    torch.testing.assert_close(terms.total.double(), reference.total, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weight": [1.0, 2.0]}, "class_weight has shape"),
        ({"class_weight": [1.0] * (N - 1) + [-1.0]}, "class_weight is .* of at least 0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"se_weight": -0.1}, "se_weight is -0.1"),
        ({"aux_weight": -1.0}, "aux_weight is -1.0"),
        ({"dice_weight": math.inf}, "dice_weight is inf, but must be finite"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationLoss(**{"num_classes": N, **options})


@pytest.mark.parametrize("argument", ["class_weight", "ignore_index", "label_smoothing"])
def test_option_of_another_type_is_named(argument: str) -> None:
    options: dict[str, Any] = {argument: "one"}
    with pytest.raises(TypeError, match=f"{argument} is 'one'"):
        SegmentationLoss(N, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize(
    ("ohem", "least"), [(0.05, 0.01), (0.99, 0.01), (1e-9, 0.25), (1e-9, 1.0)],
    ids=["the unsure", "all but a few", "a quarter", "all"],
)  # fmt: skip
def test_hard_pixels_alone(weighted: bool, smoothing: float, ohem: float, least: float) -> None:
    """Which are hard, the probability of their class alone says."""
    output, target = batch(aux=False)
    weight = torch.linspace(0.5, 2, N) if weighted else None
    loss = SegmentationLoss(
        N, se_weight=0, ohem=ohem, ohem_least=least, class_weight=weight, label_smoothing=smoothing
    )
    found = loss(output, target).segmentation
    losses = pixel_loss(
        output.logits,
        target,
        reduction="none",
        weight=None if weight is None else weight.double(),
        label_smoothing=smoothing,
    )
    hard = pixel_loss(output.logits, target, reduction="none")
    ranked = hard.detach().flatten().sort(descending=True).values
    bound = min(float(ranked[math.ceil(least * target.numel()) - 1]), -math.log(ohem))
    kept = (hard >= bound) & (target != 255)
    assert 0 < kept.sum() <= (target != 255).sum()
    each = torch.ones(N).double() if weight is None else weight.double()
    of = each[target.long().where(kept, torch.tensor(0))] * kept
    expected = (losses * kept).sum() / of.sum()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, output.logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("align_corners", [True, False])
def test_dice_is_its_formula(align_corners: bool) -> None:
    output, target = batch(aux=False)
    logits, size = output.logits, target.shape[1:]
    found = dice_loss(logits, target, align_corners=align_corners)
    p = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners).softmax(1)
    terms = []
    for c in target.unique().tolist():
        if c != 255:
            t = (target == c).double()
            p_c = p[:, c] * (target != 255)
            terms.append(1 - 2 * (p_c * t).sum() / (p_c.sum() + t.sum()))
    assert 1 < len(terms) < N  # one class is absent, and has no term
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)
    total = SegmentationLoss(N, se_weight=0, dice_weight=0.5, align_corners=align_corners)
    plain = SegmentationLoss(N, se_weight=0, align_corners=align_corners)
    added = total(output, target).segmentation - plain(output, target).segmentation
    torch.testing.assert_close(added, 0.5 * found)


def test_nothing_labelled_has_no_hard_pixel_and_no_dice() -> None:
    output, target = batch(aux=False)
    loss = SegmentationLoss(N, se_weight=0, ohem=0.7, dice_weight=1.0)
    total = loss(output, torch.full_like(target, 255)).total
    total.backward()
    assert total.item() == 0 and not output.logits.grad.any()
    assert loss(part(output, slice(0)), target[:0]).total == 0  # not even an image


@pytest.mark.float32
def test_dice_of_a_million_pixels_is_not_rounded_away() -> None:
    logits, size = torch.tensor([0.4, 0.0]).view(1, 2, 1, 1), 1024
    found = dice_loss(logits, torch.zeros(1, size, size, dtype=torch.uint8))
    p = 1 / (1 + math.exp(-0.4))
    # A row is one sum, in which each addition rounds by half a unit at most.
    assert found.item() == pytest.approx(1 - 2 * p / (p + 1), rel=size * 2**-24)


def test_what_pixels_count_depends_on_ignored_labels_of_any_value() -> None:
    """255 in uint8 is -1 in a byte, and 300 is not there; a label out of range is named."""
    output, target = batch(aux=False)
    inside = target.where(target != 255, 0)
    for ignored in (-1, 300):
        for options in ({}, {"class_weight": [1.0, 2, 3, 4, 5]}):
            loss = SegmentationLoss(N, se_weight=0, ignore_index=ignored, ohem=0.5, **options)
            same = SegmentationLoss(N, se_weight=0, ohem=0.5, **options)
            assert loss(output, inside).total == same(output, inside).total
    with pytest.raises(ValueError, match="target holds the value 77"):
        SegmentationLoss(N, class_weight=[1.0] * N)(output, inside.where(inside != 1, 77))


@pytest.mark.parametrize(
    "wrong", [{"ohem": 1.0}, {"ohem_least": 0.0}, {"dice_weight": -1.0}], ids=str
)
def test_options_of_the_hard_pixels_and_dice_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SegmentationLoss(N, **wrong)
