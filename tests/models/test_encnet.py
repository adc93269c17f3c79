from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encnet_triton.models import FCN, EncNet
from encnet_triton.nn import SegmentationLoss


def build(**options: Any) -> EncNet:
    torch.manual_seed(0)
    return EncNet(**{"backbone": "demo", "num_classes": 5, "head_channels": 16, **options})


def images(size: int = 24, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, size, size)


def on_meta(**options: Any) -> EncNet:
    with torch.device("meta"):
        return EncNet(num_classes=59, **options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("backbone", "lateral", "count", "tensors"),
    [
        ("resnet50s", False, 36_047_825, 363),
        ("resnet50", False, 35_924_049, 351),
        ("resnet101s", True, 62_907_345, 687),
    ],
)
def test_released_form_has_the_published_size(
    backbone: str, lateral: bool, count: int, tensors: int
) -> None:
    model = on_meta(backbone=backbone, form="released", lateral=lateral)
    assert parameters(model) == count
    assert len(model.state_dict()) == tensors


def test_released_form_has_the_published_shapes() -> None:
    model = on_meta(backbone="resnet50s", form="released", lateral=True)
    shapes = {
        "head.bottleneck.conv.weight": (512, 2048, 3, 3),
        "head.lateral.0.conv.weight": (512, 512, 1, 1),
        "head.lateral.1.conv.weight": (512, 1024, 1, 1),
        "head.fusion.conv.weight": (512, 1536, 3, 3),
        "head.context.project.conv.weight": (512, 512, 1, 1),
        "head.context.project.bn.running_var": (512,),
        "head.context.encoding.codewords": (32, 512),
        "head.context.encoding.scale": (32,),
        "head.context.bn.running_mean": (32,),
        "head.context.attention.weight": (512, 512),
        "head.context.presence.weight": (59, 512),
        "head.classifier.weight": (59, 512, 1, 1),
        "aux_head.convs.0.conv.weight": (256, 1024, 3, 3),
        "aux_head.classifier.bias": (59,),
    }
    state = model.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_paper_form_has_se_branches_on_stages_4_and_3() -> None:
    model = on_meta(backbone="resnet50")
    state = model.state_dict()
    assert state["stage3.encoding.codewords"].shape == (32, 1024)
    assert sorted(k for k in state if k.startswith("stage3.") and "bn" not in k) == [
        "stage3.encoding.codewords",
        "stage3.encoding.scale",
        "stage3.presence.bias",
        "stage3.presence.weight",
    ]
    assert model.aux_head is None
    assert model.head.context.project is None


FORMS = [
    pytest.param({"form": form, "se_loss": se, "aux": aux, **more}, id="-".join([form, *words]))
    for form in ("paper", "released")
    for se in (True, False)
    for aux in (True, False)
    for more in ({}, {"lateral": True}, {"num_codewords": 0})
    for words in [
        [
            "se" if se else "no_se",
            "aux" if aux else "no_aux",
            *(["lateral"] if "lateral" in more else []),
            *(["pooling"] if "num_codewords" in more else []),
        ]
    ]
]


@pytest.mark.parametrize("options", FORMS)
def test_training_reaches_every_parameter(options: dict[str, Any]) -> None:
    """DistributedDataParallel stops at a parameter that gets no gradient."""
    model = build(**options)
    output = model(images())
    branches = [output.logits, *output.se] + ([] if output.aux is None else [output.aux])
    sum(b.square().sum() for b in branches).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []

    stage3 = options["form"] == "paper" and options["se_loss"]
    assert len(output.se) == options["se_loss"] + stage3
    assert (output.aux is not None) == options["aux"]
    assert output.logits.shape == (2, 5, 6, 6)
    assert all(s.shape == (2, 5) for s in output.se)
    groups = model.parameter_groups()
    listed = [id(p) for group in groups.values() for p in group]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert groups["backbone"] == list(model.backbone.parameters())


@pytest.mark.parametrize("weights", [(0.2, 0.2), (0.0, 0.0)], ids=str)
def test_loss_reaches_every_parameter_whatever_its_weights(weights: tuple[float, float]) -> None:
    model = build(form="released", se_stage3=True)
    criterion = SegmentationLoss(5, se_weight=weights[0], aux_weight=weights[1])
    target = torch.randint(0, 5, (2, 24, 24), dtype=torch.uint8)
    criterion(model(images()), target).total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_evaluation_skips_what_only_trains() -> None:
    model = build(aux=True).eval()
    model.stage3.forward = model.aux_head.forward = None  # type: ignore[union-attr]
    output = model(images())
    assert len(output.se) == 1
    assert output.aux is None


def test_stage3_branch_never_touches_the_prediction() -> None:
    with_branch, without = build().double(), build(se_stage3=False).double()
    shared = without.state_dict().keys()
    without.load_state_dict({k: v for k, v in with_branch.state_dict().items() if k in shared})
    with_branch.eval(), without.eval()
    x = images().double()
    torch.testing.assert_close(with_branch(x).logits, without(x).logits)

    output = with_branch.train()(x)
    gradients = torch.autograd.grad(
        output.se[1].sum(), list(with_branch.parameters()), allow_unused=True
    )
    reached = {
        name.split(".")[0] if "layer4" not in name else "layer4"
        for (name, _), gradient in zip(with_branch.named_parameters(), gradients, strict=True)
        if gradient is not None
    }
    assert reached == {"backbone", "stage3"}


def test_stride_16_with_lateral_connections_resizes_them() -> None:
    model = EncNet("small", 5, output_stride=16, head_channels=16, lateral=True).eval()
    assert model(torch.zeros(1, 3, 70, 90)).logits.shape == (1, 5, 5, 6)
    assert model.output_stride == 16


@pytest.mark.parametrize(
    "model", [build(), FCN("demo", 5, head_channels=16)], ids=["encnet", "fcn"]
)
def test_useless_images_get_a_clear_sentence(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="expected images of 3 channels, got 4"):
        model(torch.zeros(2, 4, 24, 24))
    with pytest.raises(ValueError, match=r"expected images of shape B x 3 x H x W.*\(3, 24, 24\)"):
        model(torch.zeros(3, 24, 24))
    with pytest.raises(TypeError, match=r"floating-point images, got torch.uint8"):
        model(torch.zeros(2, 3, 24, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"24 x 3 pixels are smaller .* at least 4 x 4"):
        model(torch.zeros(2, 3, 24, 3))
    with pytest.raises(ValueError, match="one value per channel"):
        model.train()(torch.zeros(1, 3, 4, 4))


def test_autocast_and_channels_last() -> None:
    model = build(form="released").to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images().to(memory_format=torch.channels_last))
    assert output.logits.dtype == torch.bfloat16
    assert output.logits.is_contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 5, (2, 24, 24), dtype=torch.uint8)
    loss = SegmentationLoss(5, aux_weight=0.2)(output, target).total
    loss.backward()
    assert torch.isfinite(loss) and loss.dtype == torch.float32
    encoding = model.head.context.encoding
    assert encoding is not None
    assert encoding.scale.dtype == encoding.scale.grad.dtype == torch.float32


def test_layout_changes_nothing() -> None:
    model = build().double()
    x = images().double()
    plain = model(x)
    model.to(memory_format=torch.channels_last)
    last = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last.se, plain.se)


@pytest.mark.parametrize(
    ("kind", "layer"), [("element", nn.Dropout), ("channel", nn.Dropout2d)], ids=str
)
def test_dropout_kind(kind: str, layer: type[nn.Module]) -> None:
    model = build(dropout=0.3, dropout_kind=kind, aux=True)
    drops = [m for m in model.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))]
    assert [type(d) for d in drops] == [layer, layer]
    assert {d.p for d in drops} == {0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "v2"}, "form is 'v2', but must be one of 'paper', 'released'"),
        ({"se_loss": False, "se_stage3": True}, "needs se_loss"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout_kind": "spatial"}, "dropout_kind is 'spatial'"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"head_channels": 0}, "head_channels is 0"),
        ({"num_codewords": -2}, "num_codewords is -2"),
        ({"combine": "max"}, "combine is 'max'"),
        ({"gate": "add"}, "gate is 'add'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("option", "value"),
    [("lateral", "yes"), ("aux", 1), ("se_loss", 0.5), ("dropout", "0.1"), ("head_channels", "64")],
)
def test_option_of_the_wrong_type_is_named(option: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{option} is {value!r}, but must be"):
        build(**{option: value})
