from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encnet_triton.kernels.batch_norm import gradients
from encnet_triton.models.backbones import create_backbone
from encnet_triton.models.resnet import (
    BACKBONES,
    BasicBlock,
    Bottleneck,
    ResNet,
    ResNetConfig,
)
from encnet_triton.nn import norm, set_norm_impl

TINY = ResNetConfig(BasicBlock, (2, 2, 2, 2), widths=(4, 4, 8, 8), stem=(4, 4, 8))


def on_meta(name: str) -> ResNet:
    with torch.device("meta"):
        return create_backbone(name)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "with_fc", "classifier_inputs"),
    [
        ("resnet18", 11_689_512, 512),
        ("resnet34", 21_797_672, 512),
        ("resnet50", 25_557_032, 2048),
        ("resnet101", 44_549_160, 2048),
        ("resnet152", 60_192_808, 2048),
    ],
)
def test_plain_resnets_have_torchvisions_size(
    name: str, with_fc: int, classifier_inputs: int
) -> None:
    assert parameters(on_meta(name)) == with_fc - 1000 * (classifier_inputs + 1)


def test_parameters_have_torchvisions_names() -> None:
    state = on_meta("resnet50").state_dict()
    assert len(state) == 318
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["bn1.running_mean"].shape == (64,)
    assert state["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert state["layer3.5.conv2.weight"].shape == (256, 256, 3, 3)
    assert state["layer4.0.downsample.1.num_batches_tracked"].shape == ()
    assert state["layer4.2.bn3.weight"].shape == (2048,)


@pytest.mark.parametrize(("name", "width"), [("resnet50c", 32), ("resnet50s", 64)])
def test_deep_stems_are_numbered_as_published(name: str, width: int) -> None:
    state = on_meta(name).state_dict()
    assert state["conv1.0.weight"].shape == (width, 3, 3, 3)
    assert state["conv1.1.running_var"].shape == (width,)
    assert state["conv1.3.weight"].shape == (width, width, 3, 3)
    assert state["conv1.4.bias"].shape == (width,)
    assert state["conv1.6.weight"].shape == (2 * width, width, 3, 3)
    assert state["bn1.weight"].shape == (2 * width,)
    assert state["layer1.0.conv1.weight"].shape == (64, 2 * width, 1, 1)
    assert len(state) == 330


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("output_stride", [4, 8, 16])
def test_dilation_keeps_what_the_strided_network_computes(
    output_stride: int, block: type[BasicBlock] | type[Bottleneck]
) -> None:
    """Every k-th pixel of the dilated network is a pixel of the strided one (paper, figure 3)."""
    torch.manual_seed(0)
    config = replace(TINY, block=block, output_stride=32)
    strided = ResNet(config).double().eval()
    dilated = ResNet(replace(config, output_stride=output_stride)).double().eval()
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    step = 32 // output_stride
    c4 = dilated(x)[2]
    assert c4.shape[2:] == (96 // output_stride, 64 // output_stride)
    torch.testing.assert_close(c4[:, :, ::step, ::step], strided(x)[2])


def test_first_block_of_a_dilated_stage_has_half_its_dilation() -> None:
    model = on_meta("resnet50")
    dilations = [
        [block.conv2.dilation[0] for block in stage]
        for stage in (model.layer2, model.layer3, model.layer4)
    ]
    assert dilations == [[1] * 4, [1] + [2] * 5, [2, 4, 4]]
    assert {block.conv1.kernel_size for block in model.layer4} == {(1, 1)}


def test_without_dilation_the_field_of_view_stays_small() -> None:
    model = ResNet(TINY, dilate=False)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {conv.dilation for conv in convs} == {(1, 1)}
    assert model(torch.zeros(2, 3, 64, 64))[2].shape[2:] == (8, 8)


@pytest.mark.parametrize("size", [(64, 64), (65, 71), (8, 8)], ids=str)
def test_features_round_sizes_up(size: tuple[int, int]) -> None:
    model = ResNet(TINY).eval()
    expected = tuple(-(-side // 8) for side in size)
    features = model(torch.zeros(1, 3, *size))
    assert [f.shape[1] for f in features] == list(model.channels) == [4, 8, 8]
    assert {tuple(f.shape[2:]) for f in features} == {expected}


def test_an_averaging_shortcut_pools_where_the_plain_one_strides() -> None:
    torch.manual_seed(0)
    shortcut = ResNet(replace(TINY, average=True)).eval().layer2[0].downsample
    x = torch.randn(1, 4, 7, 9)  # odd: the pooling rounds up and leaves out what is beyond
    pooled = nn.functional.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
    weight = shortcut[1].weight
    expected = shortcut[2](nn.functional.conv2d(pooled, weight))
    assert torch.equal(shortcut(x), expected)
    # Where the stride is taken away there is nothing to average.
    assert isinstance(ResNet(replace(TINY, average=True)).layer3[0].downsample[0], nn.Identity)


def test_demo_sees_at_most_a_third_of_the_embedded_pictures() -> None:
    torch.manual_seed(0)
    model = create_backbone("demo").double().eval()
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        conv.weight.data.abs_()  # no ReLU closes, so that the whole field shows
    x = torch.rand(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    c4 = model(x)[2]
    assert model.output_stride == 4 and c4.shape[2:] == (40, 40)
    (gradient,) = torch.autograd.grad(c4[0, :, 20, 20].sum(), x)
    rows, columns = gradient.abs().sum((0, 1)).nonzero().unbind(1)
    assert rows.max() - rows.min() + 1 == 31
    assert columns.max() - columns.min() + 1 == 31


@pytest.mark.parametrize("name", ["small", "demo"])
def test_presets_are_small(name: str) -> None:
    assert parameters(on_meta(name)) < 2e6


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_backbone_builds(name: str) -> None:
    model = on_meta(name)
    assert model.output_stride == BACKBONES[name].output_stride
    assert all(conv.bias is None for conv in model.modules() if isinstance(conv, nn.Conv2d))


def test_convolutions_start_with_fan_out_variance() -> None:
    torch.manual_seed(0)
    weight = create_backbone("resnet18").layer3[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)


def test_output_is_channels_last_if_the_input_is() -> None:
    model = ResNet(TINY).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in model(x))


@pytest.mark.parametrize("recompute", [False, True])
def test_hooks_get_pairs_in_training_and_tensors_in_evaluation(recompute: bool) -> None:
    net = create_backbone("demo")
    net.activation_checkpointing = recompute
    seen: list[object] = []
    net.layer4[0].register_forward_hook(lambda module, x, y: seen.append(y))
    images = torch.randn(2, 3, 16, 16)
    c4 = net(images)[2]
    first, second = seen.pop()  # type: ignore[misc]
    assert torch.equal(first, c4) and torch.equal(second, c4)
    seen.clear()
    c4 = net.eval()(images)[2]
    assert seen[0] is c4


def test_unknown_name_and_impossible_stride_are_named() -> None:
    with pytest.raises(ValueError, match="backbone is 'resnet51'.*'resnet50'"):
        create_backbone("resnet51")
    with pytest.raises(ValueError, match="output_stride is 6, but must be one of 4, 8, 16, 32"):
        create_backbone("resnet18", output_stride=6)
    with pytest.raises(ValueError, match="output_stride is 8, but must be one of 4"):
        create_backbone("demo", output_stride=8)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_no_gradients_are_added_at_a_block_s_input(
    block: type[BasicBlock] | type[Bottleneck], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch norm before takes both, and the gradients are those of blocks in a row."""
    joined = []
    original = gradients.direct_backward_sums

    def backward_sums(grad: Tensor, other: Tensor | None, *rest: Any) -> Any:
        if other is not None:
            joined.append(other.shape)
        return original(grad, other, *rest)

    monkeypatch.setattr(gradients, "direct_backward_sums", backward_sums)
    torch.manual_seed(0)
    network = ResNet(replace(TINY, block=block)).double()
    set_norm_impl(network, "fused")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    sum(c.square().mean() for c in network(x)).backward()
    ours = {name: parameter.grad for name, parameter in network.named_parameters()}
    # The outputs of all blocks but the last, whose path is one.
    assert len(joined) == sum(TINY.depths) - 1

    network.zero_grad()
    c2 = network.layer2(network.layer1(network.maxpool(network.bn1(network.conv1(x)))))
    c3 = network.layer3(c2)
    sum(c.square().mean() for c in (c2, c3, network.layer4(c3))).backward()
    assert len(joined) == sum(TINY.depths) - 1
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_the_last_layer_of_a_block_normalises_the_projected_shortcut(
    block: type[BasicBlock] | type[Bottleneck], recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the outputs, gradients and running statistics of two layers, each once."""
    calls = []
    for name in ("batch_norm_act", "batch_norm_act_forked"):
        original = getattr(norm, name)

        def counted(*given: Any, original: Any = original, **more: Any) -> Any:
            calls.append(more["residual_norm"] is not None)
            return original(*given, **more)

        monkeypatch.setattr(norm, name, counted)
    torch.manual_seed(0)
    network = ResNet(replace(TINY, block=block)).double()
    network.activation_checkpointing = recomputed
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = []
    for impl in ("fused", "torch"):
        one = deepcopy(network)
        set_norm_impl(one, impl)
        outputs = one(x)
        sum(c.square().mean() for c in outputs).backward()
        grads = {name: parameter.grad for name, parameter in one.named_parameters()}
        results.append((outputs, grads, one.state_dict()))
    assert sum(calls) == (6 if recomputed else 4)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_hooks_on_a_projected_shortcut_are_called() -> None:
    network = ResNet(TINY)
    set_norm_impl(network, "fused")
    seen = []
    shortcut = network.layer2[0].downsample
    for layer in (shortcut, shortcut[1]):
        layer.register_forward_hook(lambda layer, given, made: seen.append(layer))
    network(torch.randn(2, 3, 32, 32))
    assert seen == [shortcut[1], shortcut]
