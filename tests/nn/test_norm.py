from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encnet_triton.nn import BatchNormAct1d, BatchNormAct2d, norm, set_norm_impl, set_sync_group

IMPLS = ["auto", "fused", "torch"]


def randomised(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return layer


def stock(layer: BatchNormAct2d | BatchNormAct1d) -> nn.Module:
    """torch's layer with a copy of our layer's state."""
    kind = nn.BatchNorm2d if isinstance(layer, BatchNormAct2d) else nn.BatchNorm1d
    other = kind(layer.num_features, eps=layer.eps, momentum=layer.momentum).double()
    other.load_state_dict(layer.state_dict())
    return other.train(layer.training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("activation", ["relu", None], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_2d_equals_torch_layers(impl: Any, activation: Any, residual: bool, training: bool) -> None:
    layer = randomised(BatchNormAct2d(4, activation, impl=impl).double()).train(training)
    other = stock(layer)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    r = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True) if residual else None
    y = layer(x, residual=r)
    expected = other(x)
    if r is not None:
        expected = expected + r
    if activation:
        expected = F.relu(expected)
    torch.testing.assert_close(y, expected)

    inputs = [t for t in (x, r) if t is not None]
    probe = torch.randn_like(y)
    ours = torch.autograd.grad(y, [*inputs, layer.weight, layer.bias], probe)
    theirs = torch.autograd.grad(expected, [*inputs, other.weight, other.bias], probe)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(layer.state_dict(), other.state_dict())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(3, 4, 5), (6, 4)], ids=str)
def test_1d_normalises_over_dimension_1(impl: Any, shape: tuple[int, ...]) -> None:
    layer = randomised(BatchNormAct1d(4, impl=impl).double())
    other = stock(layer)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.relu(other(x)))
    torch.testing.assert_close(layer.state_dict(), other.state_dict())


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_left_alone_and_layout_kept(impl: Any) -> None:
    x, r = (torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last) for _ in range(2))
    copies = x.clone(), r.clone()
    y = BatchNormAct2d(4, impl=impl)(x, r)
    assert torch.equal(x, copies[0])
    assert torch.equal(r, copies[1])
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_input_stays_half(impl: Any) -> None:
    layer = BatchNormAct2d(4, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 4, 3, 3, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_one_value_per_channel_is_refused(impl: Any) -> None:
    layer = BatchNormAct2d(4, impl=impl)
    with pytest.raises(ValueError, match=r"one value per channel.*\(1, 4, 1, 1\).*larger batch"):
        layer(torch.zeros(1, 4, 1, 1))
    assert torch.isfinite(layer.eval()(torch.zeros(1, 4, 1, 1))).all()


def test_wrong_channels_and_options_are_named() -> None:
    for impl in ("torch", "fused"):
        layer = BatchNormAct2d(4, impl=impl)
        with pytest.raises(TypeError, match="floating-point numbers, got torch.int64"):
            layer(torch.zeros(2, 4, 3, 3, dtype=torch.int64))
        with pytest.raises(
            ValueError, match=r"residual must have the input's shape .* \(2, 4, 3\)"
        ):
            layer(torch.zeros(2, 4, 3, 3), residual=torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match=r"BatchNormAct2d of 4 channels got .* 5 channels"):
        BatchNormAct2d(4)(torch.zeros(2, 5, 3, 3))
    with pytest.raises(ValueError, match="impl is 'triton'"):
        BatchNormAct2d(4, impl="triton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        BatchNormAct2d(4, "gelu")  # type: ignore[arg-type]


def test_group_reaches_the_operator_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(x: Tensor, *_: Any, group: Any, **__: Any) -> Tensor:
        seen.append(group)
        return x

    monkeypatch.setattr(norm, "batch_norm_act", record)
    model = nn.Sequential(BatchNormAct2d(4), nn.Sequential(BatchNormAct2d(4)), nn.BatchNorm2d(4))
    keys = list(model.state_dict())
    group: Any = object()
    assert set_sync_group(model, group) == 2
    assert list(model.state_dict()) == keys
    model(torch.randn(2, 4, 3, 3))
    model.eval()(torch.randn(2, 4, 3, 3))
    assert seen == [group, group, None, None]
    assert set_sync_group(model, None) == 2
    model(torch.randn(2, 4, 3, 3))
    assert len(seen) == 4


@pytest.mark.parametrize("change", ["none", "eval", "eps", "relu", "impl", "hook", "one frozen"])
def test_a_layer_that_the_residual_passes_first(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same call where that is the same, and else before it."""
    folded = []
    original = norm.batch_norm_act

    def call(*given: Any, **more: Any) -> Tensor:
        folded.append(more["residual_norm"] is not None)
        return original(*given, **more)

    monkeypatch.setattr(norm, "batch_norm_act", call)
    last, first = (BatchNormAct2d(4, a, impl="fused") for a in ("relu", None))
    last, first = randomised(last.double()), randomised(first.double())
    if change == "eps":
        first.eps = 1e-3
    elif change == "relu":
        first.activation = "relu"
    elif change == "impl":
        last.impl = first.impl = "torch"
    elif change == "hook":
        first.register_forward_hook(lambda *_: None)
    last.train(change != "eval"), first.train(change not in ("eval", "one frozen"))
    x, r = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    layers = stock(last), stock(first)
    expected = layers[1](r)
    expected = layers[0](x) + (expected.relu() if change == "relu" else expected)
    torch.testing.assert_close(last(x, residual=r, residual_norm=first), expected.relu())
    for ours, theirs in zip((last, first), layers, strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert any(folded) == (change == "none")


def test_torch_layers_cannot_be_synchronised() -> None:
    model = nn.Sequential(BatchNormAct2d(4), BatchNormAct2d(4, impl="torch"))
    group: Any = object()
    with pytest.raises(ValueError, match="layer '1' has impl='torch'"):
        set_sync_group(model, group)
    assert model[0].group is None
    assert set_norm_impl(model, "fused") == 2
    assert set_sync_group(model, group) == 2
    with pytest.raises(ValueError, match="layer '0' is synchronised"):
        set_norm_impl(model, "torch")
