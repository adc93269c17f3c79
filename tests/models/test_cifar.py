"""The CIFAR-10 networks: exact sizes, and what their units compute."""

import pytest
import torch
import torch.nn.functional as F

from encnet_triton.models import CifarNet
from encnet_triton.models.cifar import EncodingAttention

NETWORKS = {
    "ResNet 64d": ({"unit": "none"}, 2_777_482, 2_777_866),
    "SE-ResNet 64d": ({"unit": "se"}, 2_799_938, 2_800_322),
    "EncNet 16k64d": ({"unit": "encoding", "num_codewords": 16}, 3_513_866, 3_514_250),
    "EncNet 32k64d": ({"unit": "encoding", "num_codewords": 32}, 4_205_674, 4_206_058),
    "EncNet 32k128d": (
        {"unit": "encoding", "num_codewords": 32, "width": 128}, 16_787_466, 16_788_234,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_exactly_those_of_table_6(name):
    options, pre, post = NETWORKS[name]
    for block, expected in (("pre", pre), ("post", post)):
        with torch.device("meta"):
            model = CifarNet(block=block, shake_scale=False, **options)
        assert sum(p.numel() for p in model.parameters()) == expected


def test_scale_regularisation_has_no_smoothing_factors_to_learn():
    with torch.device("meta"):
        model = CifarNet("encoding", num_codewords=16)
    assert sum(p.numel() for p in model.parameters()) == 3_513_866 - 6 * 16


def test_the_attention_is_the_papers_formula():
    torch.manual_seed(0)
    unit = EncodingAttention(16, 3, shake_scale=False).double().eval()
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        features = unit.bn(unit.reduce(x))
        points = features.flatten(2).transpose(1, 2)[:, :, None]  # B x N x 1 x C/4
        residual = points - unit.encoding.codewords
        weight = (unit.encoding.scale * residual.square().sum(3)).softmax(2)
        e = (weight[..., None] * residual).sum(1).flatten(1)
        e = e / e.norm(dim=1, keepdim=True)
        gate = torch.sigmoid(e @ unit.attention.weight.T + unit.attention.bias)
        torch.testing.assert_close(unit(x), x * gate[:, :, None, None])


@pytest.mark.parametrize("block", ["pre", "post"])
@pytest.mark.parametrize("unit", ["none", "se", "encoding"])
def test_training_reaches_every_parameter(unit, block):
    torch.manual_seed(0)
    model = CifarNet(unit, width=64, num_codewords=4, block=block, shake_scale=False).train()
    logits = model(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unreached


@pytest.mark.parametrize("block", ["pre", "post"])
def test_the_identity_is_kept(block):
    # With a gate of zero only the identity is left.
    torch.manual_seed(0)
    model = CifarNet("se", width=16, block=block).eval()
    first = model.blocks[0]
    with torch.no_grad():
        first.unit.excite.weight.zero_()
        first.unit.excite.bias.fill_(-200.0)
        x = torch.rand(1, 16, 8, 8)
        torch.testing.assert_close(first(x), x)


def test_the_whole_network_is_one_graph():
    torch.manual_seed(0)
    model = CifarNet("encoding", width=16, num_codewords=4).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.randn(2, 3, 32, 32)).sum().backward()
    assert model.blocks[0].unit.encoding.codewords.grad.any()


def test_bad_arguments_are_one_sentence():
    with pytest.raises(ValueError, match="unit is 'gather'"):
        CifarNet("gather")
    with pytest.raises(ValueError, match="block is 'both'"):
        CifarNet(block="both")
