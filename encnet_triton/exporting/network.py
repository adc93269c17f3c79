"""A network as it is exported: its input, its output, its graph, and what a file says about it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import encnet_triton
from encnet_triton.exporting.plain import (
    foreign_operators,
    with_plain_layers,
    without_adaptive_pooling,
)
from encnet_triton.models import CifarNet
from encnet_triton.weights import ModelInfo

__all__ = ["RETURNS", "Exportable", "Program", "describe", "require", "trace"]

PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "pt2": ()}
"""What a format needs besides torch: those of the extra ``export``."""
RETURNS = ("labels", "upsampled", "logits")
TOLERANCE = 1e-4  # of logits, relative to the largest if that is above 1
_CIFAR_STRIDE = 4


class Exportable(nn.Module):
    """A network in evaluation, from one image tensor to one result.

    Args:
        model, info: as `encnet_triton.weights.load_model` returns them.
        returns: "labels" (arg-max of the upsampled logits), "upsampled" (logits at the image's
            size), or "logits" (as the network gives them). A classifier has nothing to upsample.
        uint8: take uint8 RGB, and normalise inside.

    Shapes:
        image: B x 3 x H x W, normalised float32 or uint8; returns B x H x W int64, or
            B x n x H x W or B x n x h x w float32. Of a classifier: B int64, or B x n.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, info: ModelInfo, returns: str = "labels", uint8: bool = False
    ) -> None:
        super().__init__()
        if returns not in RETURNS:
            raise ValueError(f"returns is {returns!r}, but must be one of {RETURNS}")
        self.classifies = isinstance(model, CifarNet)
        if self.classifies and returns == "upsampled":
            raise ValueError("a classifier has no map to upsample: it returns labels or logits")
        self.model, self.info, self.returns, self.uint8 = model.eval(), info, returns, uint8
        spread = torch.tensor(info.std).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * spread), persistent=False)
        self.register_buffer(
            "shift", -torch.tensor(info.mean).view(1, 3, 1, 1) / spread, persistent=False
        )

    @property
    def least(self) -> int:
        """Smallest height and width of an exported network: two pixels of the logits."""
        stride = _CIFAR_STRIDE if self.classifies else int(self.model.output_stride)  # type: ignore[arg-type]
        return stride + 1

    def forward(self, image: Tensor) -> Tensor:
        logits = self.scores(image)
        return logits.argmax(1) if self.returns == "labels" else logits

    def scores(self, image: Tensor) -> Tensor:
        """The logits that labels are the arg-max of, or that are returned."""
        x = image.float() * self.scale + self.shift if self.uint8 else image
        if self.classifies:
            logits: Tensor = self.model(x)
            return logits
        logits = self.model(x).logits
        if self.returns == "logits":
            return logits
        align = bool(self.model.align_corners)
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=align)

    @torch.no_grad()
    def difference(self, image: Tensor, found: Tensor) -> float:
        """How far another program's result is from this network's, relative to the largest logit
        if that is above 1.

        Of labels it is how much lower the logit of the label found is than the highest one: 0
        where both are equal, small where two classes are almost equally likely.
        """
        scores = self.scores(image)
        expected = scores[:, 0] if self.returns == "labels" else scores
        if found.shape != expected.shape:
            return math.inf
        if self.returns == "labels":
            if found.min() < 0 or found.max() >= scores.shape[1]:
                return math.inf
            off = scores.amax(1) - scores.gather(1, found.long()[:, None])[:, 0]
        else:
            off = (scores - found).abs()
        worst = float(off.max()) / max(1.0, float(scores.abs().max()))
        return math.inf if math.isnan(worst) else worst

    def image(self, batch: int, height: int, width: int) -> Tensor:
        """A batch of noise of the kind that the network takes; the same every time."""
        source = torch.Generator().manual_seed(batch)
        shape = (batch, 3, height, width)
        pixels = torch.randint(0, 256, shape, generator=source, dtype=torch.uint8)
        return pixels if self.uint8 else pixels * self.scale + self.shift


def require(form: str) -> None:
    """A ValueError if a package that a format needs is missing."""
    missing = [name for name in PACKAGES[form] if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format {form} needs {' and '.join(missing)}: pip install 'encnet-triton[export]'"
        )


@dataclass(frozen=True)
class Program:
    """An exported network.

    Attributes:
        network: what was exported, with this package's operators.
        exported: its graph, of operators that any torch has.
        size: height and width it is for, or None for any.
        example: the batch it was traced with.
    """

    network: Exportable
    exported: torch.export.ExportedProgram
    size: tuple[int, int] | None
    example: Tensor

    def batches(self) -> list[Tensor]:
        """What files are compared on: two batches of different size, where that is free."""
        crop = [max(edge, self.network.least) for edge in self.network.info.crop]
        return [self.network.image(1, *(self.size or crop)), self.example]

    def check(self, results: list[Tensor], where: str) -> float:
        """The largest `Exportable.difference` of the results for `batches`.

        Raises:
            ValueError: it is above the tolerance; says ``where`` the results are from.
        """
        pairs = zip(self.batches(), results, strict=True)
        worst = max(self.network.difference(image, found) for image, found in pairs)
        if worst > TOLERANCE:
            raise ValueError(
                f"{where} differs from PyTorch by {worst:.1e}, more than {TOLERANCE:.0e}; "
                "nothing was written"
            )
        return worst


def trace(network: Exportable, size: tuple[int, int] | None = None) -> Program:
    """The graph of a network, for batches of any number of images.

    Args:
        network: on the CPU.
        size: height and width of all images; None for any from `Exportable.least` on.

    Raises:
        ValueError: the size is too small, or the network cannot be exported.
    """
    least = network.least
    if size is not None and min(size) < least:
        raise ValueError(
            f"images of {size[0]} x {size[1]} pixels are too small for this network: give at "
            f"least {least} x {least}"
        )
    dims: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if size is None:
        dims |= {2: torch.export.Dim("height", min=least), 3: torch.export.Dim("width", min=least)}
    # Two images and unequal edges, because torch.export takes equal numbers for the same number.
    example = network.image(2, *(size or (8 * least - 7, 10 * least - 9)))
    plain = Exportable(
        with_plain_layers(network.model), network.info, network.returns, network.uint8
    )
    with torch.no_grad():
        try:
            exported = torch.export.export(plain, (example,), dynamic_shapes={"image": dims})
            exported = without_adaptive_pooling(exported)
        except torch._dynamo.exc.UserError as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"torch.export cannot hold this network: {first}") from error
    if foreign := foreign_operators(exported):
        raise ValueError(f"the exported network would need operators of {', '.join(foreign)}")
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # folders of this machine
    return Program(network, exported, size, example)


def describe(program: Program) -> dict[str, Any]:
    """What a file says about its network, as JSON values."""
    network = program.network
    about = asdict(network.info)
    del about["data"]  # a folder on the machine it was trained on
    return {
        **about,
        "input": "uint8 RGB" if network.uint8 else "RGB / 255, then (x - mean) / std",
        "returns": network.returns,
        "size": None if program.size is None else list(program.size),
        "version": encnet_triton.__version__,
    }
