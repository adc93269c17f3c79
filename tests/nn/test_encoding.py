import pytest
import torch
from torch import Tensor

from encnet_triton.nn import Encoding, ShakeEncoding


def equation_1(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """E_k = sum_i a_ik r_ik with all residuals written out (B x N x K x C)."""
    r = x.flatten(2).transpose(1, 2)[:, :, None] - codewords
    a = torch.softmax(scale * r.square().sum(-1), dim=-1)
    return (a[..., None] * r).sum(1)


def test_initialisation_follows_published_code() -> None:
    torch.manual_seed(0)
    layer = Encoding(64, 32)
    bound = (64 * 32) ** -0.5
    assert layer.codewords.shape == (32, 64)
    assert 0.9 * bound < layer.codewords.abs().max() <= bound
    assert -1 <= layer.scale.min() < -0.8
    assert -0.2 < layer.scale.max() <= 0


def test_forward_is_equation_1() -> None:
    torch.manual_seed(0)
    layer = Encoding(6, 5).double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), equation_1(x, layer.codewords, layer.scale))


def test_scale_has_the_published_sign() -> None:
    """With a strongly negative stored scale a pixel belongs to its nearest codeword."""
    layer = Encoding(1, 2)
    layer.load_state_dict(
        {"codewords": torch.tensor([[0.0], [10.0]]), "scale": torch.tensor([-5.0, -5.0])}
    )
    x = torch.tensor([1.0, 8.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(layer(x), torch.tensor([[[1.0], [-2.0]]]))


def test_autocast_keeps_parameters_and_code_in_fp32() -> None:
    torch.manual_seed(0)
    layer = Encoding(8, 4)
    x = torch.randn(2, 8, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        encoded = layer(x)
    encoded.sum().backward()
    assert encoded.dtype == torch.float32
    assert layer.codewords.grad is not None and layer.codewords.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [Encoding, ShakeEncoding])
def test_bad_sizes_name_the_argument(kind: type[Encoding | ShakeEncoding]) -> None:
    with pytest.raises(ValueError, match="num_codewords is 0"):
        kind(8, 0)
    with pytest.raises(TypeError, match="channels is 8.5"):
        kind(8.5, 4)  # type: ignore[arg-type]


def test_shake_evaluates_at_one_half() -> None:
    torch.manual_seed(0)
    layer = ShakeEncoding(6, 5).double().eval()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    half = torch.full((5,), -0.5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), equation_1(x, layer.codewords, half))
    assert list(layer.state_dict()) == ["codewords"]


def test_shake_draws_anew_from_the_seeded_generator() -> None:
    torch.manual_seed(0)
    layer = ShakeEncoding(6, 5).double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.manual_seed(7)
    first, second = layer(x), layer(x)
    torch.manual_seed(7)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer(x), second)
    assert not torch.equal(first, second)

    torch.manual_seed(7)
    drawn = -torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(first, equation_1(x, layer.codewords, drawn))


def test_shake_backward_uses_its_own_draw() -> None:
    """The gradient belongs to no single scale: forward and backward draws differ."""
    torch.manual_seed(0)
    layer = ShakeEncoding(3, 2).double()
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    (shaken,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.manual_seed(7)
    drawn = -torch.rand(2, dtype=torch.float64)
    exact_loss = equation_1(x, layer.codewords, drawn).square().sum()
    (exact,) = torch.autograd.grad(exact_loss, x)
    assert not torch.allclose(shaken, exact)
    assert torch.isfinite(shaken).all()


def test_shake_compiles_without_graph_break() -> None:
    torch.manual_seed(0)
    layer = ShakeEncoding(6, 5).double()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    compiled(x)
    torch.manual_seed(7)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(7)
    torch.testing.assert_close(first, layer(x))
    torch.testing.assert_close(second, layer(x))
    assert not torch.equal(first, second)
