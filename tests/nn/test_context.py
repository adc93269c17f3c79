import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from encnet_triton.nn import ContextEncoding


def features(channels: int = 6) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, channels, 4, 5, dtype=torch.float64).relu_()


def build(form: str, num_codewords: int = 4, **options: object) -> ContextEncoding:
    torch.manual_seed(0)
    return ContextEncoding(6, 7, num_codewords, form, **options).double()  # type: ignore[arg-type]


def test_paper_form_is_section_2() -> None:
    module, x = build("paper"), features()
    encoded = module.encoding(x)
    e = F.relu(F.batch_norm(encoded, None, None, training=True)).sum(1)
    gamma = torch.sigmoid(e @ module.attention.weight.T + module.attention.bias)
    y, se = module(x)
    torch.testing.assert_close(y, x * gamma[:, :, None, None])
    torch.testing.assert_close(se, e @ module.presence.weight.T + module.presence.bias)
    assert module.project is None


def test_released_form_projects_averages_and_adds() -> None:
    module, x = build("released"), features()
    projected = F.conv2d(x, module.project.conv.weight)
    projected = F.relu(F.batch_norm(projected, None, None, training=True))
    e = F.relu(F.batch_norm(module.encoding(projected), None, None, training=True)).mean(1)
    gamma = torch.sigmoid(e @ module.attention.weight.T + module.attention.bias)[:, :, None, None]
    y, se = module(x)
    torch.testing.assert_close(y, F.relu(x + x * gamma))
    torch.testing.assert_close(se, e @ module.presence.weight.T + module.presence.bias)


@pytest.mark.parametrize(
    ("option", "value"), [("project", True), ("combine", "mean"), ("gate", "residual")]
)
def test_each_option_overrides_the_form(option: str, value: object) -> None:
    paper, x = build("paper"), features()
    changed = build("paper", **{option: value})
    assert changed(x)[0].shape == x.shape
    if option == "project":
        assert changed.project is not None
        return
    changed.load_state_dict(paper.state_dict())
    y, _ = changed(x)
    assert not torch.allclose(y, paper(x)[0])
    if option == "gate":
        torch.testing.assert_close(y, x + paper(x)[0])


def test_no_codewords_is_global_average_pooling() -> None:
    """Paper, figure 5, K = 0."""
    module, x = build("paper", num_codewords=0), features()
    e = x.mean((2, 3))
    y, se = module(x)
    gamma = torch.sigmoid(F.linear(e, module.attention.weight, module.attention.bias))
    torch.testing.assert_close(y, x * gamma[:, :, None, None])
    torch.testing.assert_close(se, F.linear(e, module.presence.weight, module.presence.bias))
    assert sorted(module.state_dict()) == [
        "attention.bias",
        "attention.weight",
        "presence.bias",
        "presence.weight",
    ]


def test_without_attention_features_pass_unchanged() -> None:
    module, x = build("paper", attention=False), features()
    y, se = module(x)
    assert y is x
    assert se.shape == (3, 7)
    assert module.attention is None


def test_without_classes_there_is_no_se_layer() -> None:
    module = ContextEncoding(6, None, 4)
    y, se = module(features().float())
    assert se is None
    assert y.shape == (3, 6, 4, 5)
    with pytest.raises(ValueError, match="no output"):
        ContextEncoding(6, None, 4, attention=False)


def test_order_of_pixels_does_not_matter() -> None:
    """The context is that of the whole image: shuffled pixels give the shuffled output."""
    module, x = build("released"), features()
    order = torch.randperm(20)
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    y, se = module(x)
    y_shuffled, se_shuffled = module(shuffled)
    torch.testing.assert_close(se_shuffled, se)
    torch.testing.assert_close(y_shuffled.flatten(2), y.flatten(2)[:, :, order])


def test_shake_scale_option() -> None:
    module, x = build("paper", shake_scale=True), features()
    assert "encoding.scale" not in module.state_dict()
    assert not torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("form", ["paper", "released"])
def test_gates_start_open_half_way(form: str) -> None:
    torch.manual_seed(0)
    module = ContextEncoding(64, 7, 32, form)  # type: ignore[arg-type]
    e = module.encode_context(torch.randn(4, 64, 9, 9).relu_())
    gamma = torch.sigmoid(module.attention(e))
    assert 0.2 < gamma.min() < 0.5 < gamma.max() < 0.8


def test_input_is_left_alone_and_layout_kept() -> None:
    module = build("released")
    x = features().to(memory_format=torch.channels_last)
    before = x.clone()
    y, _ = module(x)
    assert torch.equal(x, before)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("form", "official"), ("combine", "max"), ("gate", "none"), ("num_codewords", -1)],
)
def test_bad_argument_is_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{argument} is {value!r}"):
        ContextEncoding(6, 7, **{argument: value})  # type: ignore[arg-type]


def test_half_precision_model_runs() -> None:
    module = ContextEncoding(6, 7, 4).bfloat16().eval()
    y, se = module(features().bfloat16())
    assert y.dtype == torch.bfloat16
    assert se is not None and torch.isfinite(se).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batch_norm_takes_the_statistics_of_the_encoding(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pass over E for them, and the same outputs, gradients and running statistics."""
    from encnet_triton.kernels.batch_norm import operator

    torch.manual_seed(0)
    module = ContextEncoding(12, 3, num_codewords=4).double()
    other = copy.deepcopy(module)
    assert module.bn is not None and other.bn is not None
    module.bn.impl = "fused"
    x = torch.randn(3, 12, 5, 6).double().contiguous(memory_format=memory_format)

    def nothing(*_: Any) -> None:
        raise AssertionError("E was read once more")

    monkeypatch.setattr(operator, "direct_moments", nothing)
    monkeypatch.setattr(operator, "direct_statistics_of", nothing)
    results = []
    for m in (module, other):
        leaf = x.clone().requires_grad_()
        y, se = m(leaf)
        assert se is not None
        (y.square().sum() + se.sum()).backward()
        results.append([y, se, leaf.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
