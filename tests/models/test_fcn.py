import pytest
import torch

from encnet_triton.models import FCN
from encnet_triton.models.fcn import FCNHead


@pytest.mark.parametrize(
    ("backbone", "count", "tensors"),
    [("resnet50s", 35_475_254, 346), ("resnet50", 35_351_478, 334)],
)
def test_with_auxiliary_head_it_has_the_published_size(
    backbone: str, count: int, tensors: int
) -> None:
    with torch.device("meta"):
        model = FCN(backbone, 59, aux=True)
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(model.state_dict()) == tensors


@pytest.mark.parametrize("aux", [True, False], ids=["aux", "no_aux"])
@pytest.mark.parametrize("num_convs", [1, 2])
@pytest.mark.parametrize("concat_input", [True, False], ids=["concat", "no_concat"])
def test_training_reaches_every_parameter(concat_input: bool, num_convs: int, aux: bool) -> None:
    model = FCN(
        "demo", 5, head_channels=16, num_convs=num_convs, concat_input=concat_input, aux=aux
    )
    output = model(torch.randn(2, 3, 24, 24))
    loss = output.logits.sum() + (0 if output.aux is None else output.aux.sum())
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert output.se == ()
    assert (output.aux is not None) == aux
    assert model.eval()(torch.randn(2, 3, 24, 24)).aux is None


def test_concatenated_head_has_mmsegmentations_shapes() -> None:
    """Two 3x3 convolutions and a third over [features, result]."""
    head = FCNHead(32, 8, 5, num_convs=2, concat_input=True)
    shapes = {k: tuple(v.shape) for k, v in head.state_dict().items() if v.ndim == 4}
    assert shapes == {
        "convs.0.conv.weight": (8, 32, 3, 3),
        "convs.1.conv.weight": (8, 8, 3, 3),
        "concat.conv.weight": (8, 40, 3, 3),
        "classifier.weight": (5, 8, 1, 1),
    }


def test_bad_number_of_convolutions_is_named() -> None:
    with pytest.raises(ValueError, match="num_convs is 3, but must be one of 1, 2"):
        FCN("demo", 5, num_convs=3)
