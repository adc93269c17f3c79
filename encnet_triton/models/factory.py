"""Networks by name, from options that are plain JSON values."""

from __future__ import annotations

import inspect
from typing import Any

from encnet_triton.models.base import SegmentationModel
from encnet_triton.models.deeplab import DeepLabV3
from encnet_triton.models.encnet import EncNet
from encnet_triton.models.fcn import FCN
from encnet_triton.models.pspnet import PSPNet
from encnet_triton.nn.arguments import check_choice

MODELS: dict[str, type[SegmentationModel]] = {
    "encnet": EncNet,
    "fcn": FCN,
    "psp": PSPNet,
    "deeplab": DeepLabV3,
}


def create_model(name: str, num_classes: int, **options: Any) -> SegmentationModel:
    """Build a network with random weights.

    Args:
        name: "encnet", "fcn", "psp" or "deeplab".
        num_classes: n.
        options: constructor arguments of the network's class; ``backbone`` is required. A network
            built here has them all in ``model.options``, so that ``create_model(**model.options)``
            builds it again.

    Raises:
        ValueError: unknown name or option, or an option's value that is not allowed.
    """
    check_choice("model", name, tuple(MODELS))
    model = MODELS[name]
    known = [p for p in inspect.signature(model).parameters if p != "num_classes"]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; its options are {', '.join(known)}")
    if "backbone" not in options:
        raise ValueError(f"{name} needs the option 'backbone'")
    return model(num_classes=num_classes, **options)
