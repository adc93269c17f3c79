"""What the Context Encoding module of an EncNet sees in an image, in numbers and as a picture.

The module encodes one window as a whole, so one window is explained: the image at the scale of
prediction, or as much smaller as it must be to fit into the training crop.
"""

from __future__ import annotations

from colorsys import hsv_to_rgb
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from encnet_triton.data.normalisation import Normalise
from encnet_triton.inference.windows import filled, resized
from encnet_triton.models import EncNet, SegmentationOutput
from encnet_triton.nn import ContextEncoding
from encnet_triton.pictures import overlay, palette_image
from encnet_triton.weights.checkpoint import ModelInfo

__all__ = ["Explainer", "Explanation", "explanation_picture"]

_MARGIN, _TEXT = 8, 18
_MAPS, _COLUMNS = 8, 4  # codewords that are drawn at most, the heaviest first
_LEAST = 0.001  # of the mean share: a map is brightened, which would make much of nothing


@dataclass(frozen=True)
class Explanation:
    """What the module made of one window; without the filled border, where there is one.

    Attributes:
        image: h x w x 3 uint8, as the network saw it.
        label: h x w classes.
        assignment: K x h' x w', the share a_ik that each codeword k has in each feature pixel i
            (paper, equation 1); they sum to 1 over k. None for a network without codewords.
        gates: C, what each channel of the features is multiplied by, in 0..1; the released form
            multiplies by 1 more.
        presence: n, the probability that each class is in the image, from the SE loss's layer; None
            for a network without it.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.integer]
    assignment: NDArray[np.floating] | None
    gates: NDArray[np.floating]
    presence: NDArray[np.floating] | None


class Explainer:
    """Explains one image at a time.

    Args:
        model: an EncNet in evaluation mode, on ``device``.
        info: normalisation, crop and scale it was trained with.
        device: where images are processed.

    Raises:
        ValueError: another network, which has no Context Encoding module.
    """

    def __init__(self, model: nn.Module, info: ModelInfo, device: torch.device | str) -> None:
        if not isinstance(model, EncNet):
            raise ValueError(
                f"only an EncNet has codewords and gates to explain; this is {info.options['name']}"
            )
        self.model, self.info = model, info
        self.device = torch.device(device)
        self._normalise = Normalise(info.mean, info.std, self.device)

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8]) -> Explanation:
        """Explain an H x W x 3 uint8 RGB image."""
        height, width = self._size(image.shape[0], image.shape[1])
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        seen = np.array(small)
        x = self._normalise(torch.tensor(seen, device=self.device).permute(2, 0, 1)[None])
        crop = (self.info.crop[0], self.info.crop[1])
        output, features, gates = self._seen(filled(x, crop))
        logits = F.interpolate(
            output.logits.float(), crop, mode="bilinear", align_corners=self.model.align_corners
        )
        shares = assignment(self.model.head.context, features)
        if shares is not None:
            rows = max(1, round(shares.shape[1] * height / crop[0]))
            columns = max(1, round(shares.shape[2] * width / crop[1]))
            shares = shares[:, :rows, :columns]
        return Explanation(
            image=seen,
            label=logits[0, :, :height, :width].argmax(0).cpu().numpy(),
            assignment=None if shares is None else shares.cpu().numpy(),
            gates=gates[0].float().sigmoid().cpu().numpy(),
            presence=output.se[0][0].float().sigmoid().cpu().numpy() if output.se else None,
        )

    def _seen(self, window: Tensor) -> tuple[SegmentationOutput, Tensor, Tensor]:
        """The network's output, and what its module is given and computes: the features and the
        gates before their sigmoid."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, given: tuple[Tensor, ...], result: Any) -> None:
            caught.append(given[0] if module is context else result)

        context = self.model.head.context
        # The gates' layer is inside the module, so it is done first.
        parts = [module for module in (context.attention, context) if module is not None]
        hooks = [module.register_forward_hook(catch) for module in parts]
        try:
            output = self.model(window.contiguous(memory_format=torch.channels_last))
        finally:
            for hook in hooks:
                hook.remove()
        gates, features = caught
        return output, features, gates

    def _size(self, height: int, width: int) -> tuple[int, int]:
        edges = resized(height, width, self.info.base_size, self.info.scale_by)
        fit = min(1.0, *(full / edge for full, edge in zip(self.info.crop, edges, strict=True)))
        return max(1, round(edges[0] * fit)), max(1, round(edges[1] * fit))


def assignment(context: ContextEncoding, x: Tensor) -> Tensor | None:
    """K x h x w shares of the codewords in 1 x C x h x w features; None without codewords."""
    if context.encoding is None:
        return None
    if context.project is not None:
        x = context.project(x)
    pixels = x[0].flatten(1).T.double()  # [N, C]
    codewords, scale = context.encoding.codewords.double(), context.encoding.scale.double()
    weights = (scale * torch.cdist(pixels, codewords).square()).softmax(1)  # [N, K]
    return weights.T.reshape(-1, *x.shape[2:])


def explanation_picture(found: Explanation, info: ModelInfo, width: int = 288) -> Image.Image:
    """Image, labels and codewords side by side, the shares of single codewords, gates and presence.

    Args:
        found: to be drawn.
        info: names and colours of the classes.
        width: of each of the first pictures, in pixels.
    """
    height = max(1, round(width * found.label.shape[0] / found.label.shape[1]))
    photo = Image.fromarray(found.image)
    first = [
        (photo, "image"),
        (overlay(photo, palette_image(found.label, info.palette)), "labels"),
    ]
    if found.assignment is None:
        parts = [_row(first, (width, height))]
    else:
        first.append((_codeword_picture(found.assignment), "heaviest codeword"))
        parts = [
            _row(first, (width, height)),
            *_shares(found.assignment, 3 * width, height / width),
        ]
    parts.append(_bars(np.sort(found.gates)[::-1], f"{len(found.gates)} gates, sorted", 3 * width))
    if found.presence is not None:
        parts.append(_presence(found.presence, info))
    return _stacked(parts)


def _shares(shares: NDArray[np.floating], width: int, shape: float) -> list[Image.Image]:
    """Rows of the codewords with the largest shares; ``shape`` is a picture's height / width."""
    of_all = shares.mean((1, 2))
    heaviest = [k for k in np.argsort(-of_all)[:_MAPS] if of_all[k] >= _LEAST]
    tiles = [(_heat(shares[k]), f"codeword {k}: {of_all[k]:.1%}") for k in heaviest]
    edge = (width - _MARGIN) // _COLUMNS
    size = (edge, max(1, round(edge * shape)))
    starts = range(0, len(tiles), _COLUMNS)
    return [_row(tiles[start : start + _COLUMNS], size) for start in starts]


def _row(tiles: list[tuple[Image.Image, str]], size: tuple[int, int]) -> Image.Image:
    """Pictures of one size side by side under their captions."""
    font = ImageFont.load_default(12)
    whole = Image.new("RGB", (len(tiles) * (size[0] + _MARGIN), size[1] + _TEXT), "white")
    draw = ImageDraw.Draw(whole)
    for i, (tile, caption) in enumerate(tiles):
        left = i * (size[0] + _MARGIN)
        draw.text((left, 2), caption, fill="black", font=font)
        smooth = Image.Resampling.BILINEAR if tile.width > size[0] else Image.Resampling.NEAREST
        whole.paste(tile.convert("RGB").resize(size, smooth), (left, _TEXT))
    return whole


def _codeword_picture(shares: NDArray[np.floating]) -> Image.Image:
    """The heaviest codeword of each pixel, in colours that tell neighbours apart."""
    turns = np.arange(len(shares)) * 0.618034 % 1.0  # around the colour wheel, by the golden ratio
    colours = [[int(255 * part) for part in hsv_to_rgb(turn, 0.7, 0.9)] for turn in turns]
    return palette_image(shares.argmax(0), colours)


def _heat(share: NDArray[np.floating]) -> Image.Image:
    """A share of 0..1 from black to white, brightened to the largest of it."""
    return Image.fromarray((255 * share / max(float(share.max()), 1e-12)).astype(np.uint8))


def _bars(values: NDArray[np.floating], caption: str, width: int) -> Image.Image:
    """Values of 0..1 as bars from left to right; the line is at one half."""
    tall = 60
    picture = Image.new("RGB", (width, tall + _TEXT + 2), "white")
    draw = ImageDraw.Draw(picture)
    words = f"{caption}: {values.min():.2f} to {values.max():.2f}, mean {values.mean():.2f}"
    draw.text((0, 2), words, fill="black", font=ImageFont.load_default(12))
    for i, value in enumerate(values):
        left, right = i * width // len(values), (i + 1) * width // len(values) - 1
        top = _TEXT + tall - round(tall * float(value))
        draw.rectangle((left, top, max(left, right), _TEXT + tall), fill=(70, 110, 170))
    draw.line((0, _TEXT + tall // 2, width, _TEXT + tall // 2), fill="black")
    draw.rectangle((0, _TEXT, width - 1, _TEXT + tall), outline="grey")
    return picture


def _presence(presence: NDArray[np.floating], info: ModelInfo) -> Image.Image:
    """A bar for the probability of each class, the likeliest first."""
    font, wide = ImageFont.load_default(12), 300
    order = np.argsort(-presence)[:20]
    picture = Image.new("RGB", (wide + 240, (len(order) + 1) * _TEXT + 4), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((0, 2), "classes that the context predicts (SE loss)", fill="black", font=font)
    for i, k in enumerate(order, start=1):
        top = i * _TEXT
        right = 130 + round(wide * float(presence[k]))
        draw.text((0, top + 2), info.classes[k][:20], fill="black", font=font)
        draw.rectangle((130, top + 3, right, top + 15), fill=tuple(info.palette[k]))
        draw.text((right + 4, top + 2), f"{presence[k]:.1%}", fill="black", font=font)
    return picture


def _stacked(parts: list[Image.Image]) -> Image.Image:
    """Pictures below each other on white."""
    width = max(part.width for part in parts) + _MARGIN
    height = sum(part.height + _MARGIN for part in parts) + _MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    top = _MARGIN
    for part in parts:
        canvas.paste(part, (_MARGIN, top))
        top += part.height + _MARGIN
    return canvas
