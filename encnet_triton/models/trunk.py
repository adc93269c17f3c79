"""Any convolutional network of timm that gives features, as a backbone: ``timm:NAME``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from encnet_triton.models.layers import check_images
from encnet_triton.nn.arguments import check_choice
from encnet_triton.nn.norm import convert_batchnorm
from encnet_triton.nn.recompute import recomputed

PREFIX = "timm:"
OUTPUT_STRIDES = (8, 16, 32)

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class TimmTrunk(nn.Module):
    """A network of timm that returns its features of stages 2, 3 and 4, the last three of timm's.

    Its batch norms are this package's (`convert_batchnorm`). Where stages lose their stride they
    are dilated as timm does it.

    Args:
        name: of timm, with or without a tag: "tf_efficientnet_lite0", "resnet50d.ra2_in1k".
        output_stride: 8, 16 or 32, as far as the network allows.

    Attributes:
        name, output_stride: as given.
        channels: of the three outputs.
        net: what timm made, with random weights.

    Shapes:
        x: B x 3 x H x W; returns c2, c3, c4, each B x channels x about H / stride x W / stride:
        timm's networks round up or down.

    Raises:
        ValueError: timm is not installed, has no such network, or cannot give its features at this
            stride.
    """

    def __init__(self, name: str, output_stride: int = 8) -> None:
        super().__init__()
        check_choice("output_stride", output_stride, OUTPUT_STRIDES)
        self.name, self.output_stride = name, output_stride
        self.net = _features(name, output_stride)
        c2, c3, c4 = self.net.feature_info.channels()
        self.channels: tuple[int, int, int] = (c2, c3, c4)
        self._recomputing: list[nn.Module] = []
        convert_batchnorm(self.net)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_images(x, self.output_stride)
        c2, c3, c4 = self.net(x)
        return c2, c3, c4

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        """All parameters, up to and including each feature that timm names, in their order."""
        stages: list[list[nn.Parameter]] = [[]]
        known: set[int] = set()
        for number, module in self._by_stage():
            while len(stages) <= number:
                stages.append([])
            new = [p for p in module.parameters(recurse=False) if id(p) not in known]
            known.update(map(id, new))
            stages[number] += new
        return [stage for stage in stages if stage]

    @property
    def activation_checkpointing(self) -> bool:
        """In training keep only what the blocks after stage 2 are given, as `ResNet` does."""
        return bool(self._recomputing)

    @activation_checkpointing.setter
    def activation_checkpointing(self, wanted: bool) -> None:
        for block in self._recomputing:
            del block.forward
        self._recomputing = self._blocks() if wanted else []
        for block in self._recomputing:
            block.forward = partial(_again, block, type(block).forward)

    def _blocks(self) -> list[nn.Module]:
        """The modules after stage 2 that are no mere sequences, the outermost ones."""
        boundary = len(self.net.feature_info.info) - 3
        blocks: list[nn.Module] = []
        inside: set[nn.Module] = set()
        for number, module in self._by_stage():
            mere = type(module).forward in (nn.Sequential.forward, nn.Module.forward)
            mere = mere or next(module.parameters(), None) is None
            if number > boundary and module not in inside and not mere:
                blocks.append(module)
                inside.update(module.modules())
        if not blocks or hasattr(self.net, "hooks"):
            raise ValueError(
                "activation_checkpointing needs a trunk that is a sequence of stages, which "
                f"timm's {self.name} is not"
            )
        return blocks

    def _by_stage(self) -> Iterator[tuple[int, nn.Module]]:
        """Every module below ``net``, and the number of the feature it leads to."""
        modules = list(self.net.named_modules())[1:]
        names = dict(modules)
        ends = [_own_name(info["module"], names) for info in self.net.feature_info.info]
        number, reached = 0, False
        for name, module in modules:
            within = f"{name}.".startswith(f"{ends[number]}.")
            if reached and not within and number + 1 < len(ends):
                number, reached = number + 1, False
                within = f"{name}.".startswith(f"{ends[number]}.")
            reached = reached or within
            yield number, module


def _own_name(name: str, modules: dict[str, nn.Module]) -> str:
    """What timm's wrapper calls the module ``name`` of the network that it wraps."""
    candidates = (name, name.replace(".", "_", 1), f"body.{name}", f"model.{name}")
    return next((one for one in candidates if one in modules), name)


def _again(block: nn.Module, forward: Callable[..., Any], x: Tensor) -> Any:
    if block.training and torch.is_grad_enabled():
        return recomputed(block, x, partial(forward, block))
    return forward(block, x)


def import_timm() -> Any:
    """timm, or a `ValueError` that says how to get it."""
    try:
        import timm
    except ImportError as error:
        missing = "timm" if error.name == "timm" else f"timm's {error.name}"
        raise ValueError(
            f"{missing} is not installed, which backbones called {PREFIX}NAME need; it comes with "
            "the extra: pip install 'encnet-triton[timm]'"
        ) from None
    except RuntimeError as error:  # a torchvision whose operators are for another torch
        raise ValueError(
            f"timm cannot be imported ({str(error).splitlines()[0]}): torchvision must be built "
            f"for torch {torch.__version__}"
        ) from error
    return timm


def own_statistics(name: str) -> Statistics | None:
    """Mean and standard deviation, in 0..1, of the images that timm's network was trained on; None
    where timm does not say."""
    known = _known(name).get_pretrained_cfg(name)
    return known and (tuple(known.mean), tuple(known.std))


def _known(name: str) -> Any:
    """timm, if it has a network of this name."""
    timm = import_timm()
    here = f"timm {timm.__version__}"
    architecture, _, tag = name.partition(".")
    if not timm.is_model(name):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = "timm.list_models() lists those it has"
        if near:
            hint = f"did you mean {' or '.join(PREFIX + one for one in near)}?"
        raise ValueError(f"{here} has no network called {architecture!r}; {hint}")
    tags = list(timm.models.get_arch_pretrained_cfgs(architecture))
    if tag and name not in tags:
        raise ValueError(
            f"{here} has no weights {tag!r} of {architecture}; it knows {', '.join(tags) or 'none'}"
        )
    return timm


def whole_network(name: str, **options: Any) -> nn.Module:
    """The image classifier, for the names of its tensors and, with ``pretrained``, the weights."""
    network: nn.Module = _known(name).create_model(name, **options)
    return network


def _features(name: str, output_stride: int) -> Any:
    timm = _known(name)
    given = {"features_only": True, "out_indices": (-3, -2, -1), "output_stride": output_stride}
    try:
        # On the CPU even where a caller says "meta": timm computes buffers that no file holds.
        with torch.device("cpu"):
            net = timm.create_model(name, **given)
        reached = net.feature_info.reduction()
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{_refusal(name, output_stride)} ({reason})") from error
    if reached[-1] != output_stride:
        raise ValueError(_refusal(name, output_stride))
    return net


def _refusal(name: str, output_stride: int) -> str:
    return (
        f"timm's {name} does not give the features of three stages at an output stride of "
        f"{output_stride}; networks such as resnet50d, convnext_tiny and tf_efficientnet_lite0 do"
    )
