import json
from typing import Any

import pytest
import torch

from encnet_triton.models import EncNet, create_model

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("encnet", {}),
    ("encnet", {"form": "released", "lateral": True, "num_codewords": 7, "gate": "multiply"}),
    ("encnet", {"num_codewords": 0, "se_loss": False, "dropout_kind": "channel"}),
    ("fcn", {}),
    ("fcn", {"num_convs": 2, "concat_input": True, "aux": True, "align_corners": False}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_options_survive_json_and_rebuild_the_network(name: str, options: dict[str, Any]) -> None:
    model = create_model(name, 5, backbone="demo", head_channels=16, **options)
    assert json.loads(json.dumps(model.options)) == model.options
    assert options.items() <= model.options.items()
    again = create_model(**model.options)
    assert again.options == model.options
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 24, 24)
    assert torch.equal(again.eval()(x).logits, model.eval()(x).logits)


def test_options_hold_every_constructor_argument() -> None:
    import inspect

    for name in ("encnet", "fcn"):
        model = create_model(name, 5, backbone="demo", head_channels=16)
        arguments = inspect.signature(type(model)).parameters
        assert model.options.keys() == {"name", *arguments}
        assert None not in model.options.values()


def test_model_tells_what_its_user_needs() -> None:
    model = create_model("encnet", 5, backbone="small", head_channels=16, align_corners=False)
    assert isinstance(model, EncNet)
    assert (model.num_classes, model.align_corners, model.output_stride) == (5, False, 8)


def test_unknown_names_are_errors_that_list_the_known() -> None:
    with pytest.raises(ValueError, match="model is 'unet', but must be one of 'encnet', 'fcn'"):
        create_model("unet", 5, backbone="demo")
    with pytest.raises(ValueError, match="fcn has no option 'lateral'.*num_convs"):
        create_model("fcn", 5, backbone="demo", lateral=True)
    with pytest.raises(ValueError, match="backbone is 'vgg16'.*'demo'"):
        create_model("fcn", 5, backbone="vgg16")
    with pytest.raises(ValueError, match="needs the option 'backbone'"):
        create_model("encnet", 5)
