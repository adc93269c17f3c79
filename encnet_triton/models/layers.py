"""Building blocks that backbones and heads share, and how they are initialised."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from encnet_triton.nn.arguments import check_choice, check_probability
from encnet_triton.nn.norm import BatchNormAct2d


def conv3x3(in_channels: int, channels: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias that keeps the size (divided by the stride, rounded up)."""
    return nn.Conv2d(
        in_channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False
    )


def conv_bn_relu(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    """Convolution without bias, batch norm and ReLU, named ``conv`` and ``bn``."""
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=BatchNormAct2d(channels)))


def create_dropout(rate: float, kind: str) -> nn.Module:
    """Dropout of single elements ("element") or of whole channels ("channel") of B x C x H x W."""
    check_probability("dropout", rate)
    check_choice("dropout_kind", kind, ("element", "channel"))
    return nn.Dropout(rate) if kind == "element" else nn.Dropout2d(rate)


class Classifier(nn.Conv2d):
    """1x1 convolution with bias to the classes, started near zero so that no class is preferred."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, 1)
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def init_convolutions(module: nn.Module) -> None:
    """Kaiming initialisation (normal, fan-out, ReLU) of every convolution but the classifiers."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and not isinstance(layer, Classifier):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def parameters_of(*modules: nn.Module | None) -> list[nn.Parameter]:
    """All parameters of the modules that are not None."""
    return [p for module in modules if module is not None for p in module.parameters()]


def check_images(x: Tensor, least: int) -> None:
    """Raise an error with one sentence for input that no network here accepts.

    Args:
        x: what should be B x 3 x H x W normalised images.
        least: smallest height and width, the output stride.
    """
    if x.ndim != 4:
        raise ValueError(f"expected images of shape B x 3 x H x W, got shape {tuple(x.shape)}")
    if x.shape[1] != 3:
        raise ValueError(f"expected images of 3 channels, got {x.shape[1]}: {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"expected normalised floating-point images, got {x.dtype}")
    if min(x.shape[2:]) < least:
        raise ValueError(
            f"images of {x.shape[2]} x {x.shape[3]} pixels are smaller than the network's output "
            f"stride: give at least {least} x {least}"
        )
