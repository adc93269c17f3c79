"""PSPNet and DeepLabV3 against published parameter counts and by what their heads must see."""

import pytest
import torch
import torch.nn.functional as F

from encnet_triton.models import create_model


def parameters(name, backbone, classes, **options):
    with torch.device("meta"):
        model = create_model(name, classes, backbone=backbone, **options)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "backbone", "published"),
    # torchvision's tables of weights, 21 classes, auxiliary head included.
    [
        ("deeplab", "resnet50", 42_004_074),
        ("deeplab", "resnet101", 60_996_202),
        ("fcn", "resnet50", 35_322_218),
        ("fcn", "resnet101", 54_314_346),
    ],
)
def test_parameters_are_those_of_torchvision(name, backbone, published):
    assert parameters(name, backbone, 21, aux=True) == published


def test_psp_head_has_the_layers_of_its_paper():
    trunk_and_aux = parameters("fcn", "resnet50", 150, aux=True) - (2048 * 512 * 9 + 1024)
    pools = 4 * (2048 * 512 + 2 * 512)
    bottleneck = 4096 * 512 * 9 + 2 * 512
    assert parameters("psp", "resnet50", 150) == trunk_and_aux + pools + bottleneck


@pytest.mark.parametrize("name", ["psp", "deeplab"])
def test_every_output_sees_the_whole_image(name):
    # The demo trunk alone sees 47 pixels; the heads pool over all of it.
    torch.manual_seed(0)
    model = create_model(name, 4, backbone="demo", head_channels=16).eval()
    x = torch.randn(1, 3, 160, 160, requires_grad=True)
    model(x).logits[0, :, 0, 0].sum().backward()
    assert x.grad[0, :, -8:, -8:].abs().sum() > 0


@pytest.mark.parametrize("name", ["psp", "deeplab"])
def test_training_reaches_every_parameter(name):
    torch.manual_seed(0)
    model = create_model(name, 4, backbone="demo", head_channels=16).train()
    output = model(torch.randn(2, 3, 64, 64))
    assert output.logits.shape == (2, 4, 16, 16) and output.se == ()
    target = torch.randint(0, 4, (2, 16, 16))
    (F.cross_entropy(output.logits, target) + F.cross_entropy(output.aux, target)).backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unreached
    assert create_model(**model.options).state_dict().keys() == model.state_dict().keys()
