"""CIFAR-10 classifiers after training: the classes of pictures."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from encnet_triton.data.cifar10 import Images
from encnet_triton.data.normalisation import Normalise
from encnet_triton.weights.checkpoint import ModelInfo

__all__ = ["ImageClassifier"]

BATCH = 500
MOST_NAMED = 3


class ImageClassifier:
    """A trained classifier in evaluation, in float32.

    Args:
        model, info: as `encnet_triton.weights.checkpoint.load_model` returns them.
        device: where the model is.
    """

    def __init__(self, model: nn.Module, info: ModelInfo, device: torch.device) -> None:
        self.model, self.info, self.device = model, info, device
        self._normalise = Normalise(info.mean, info.std, device)

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Tensor:
        """Probabilities, B x n, of uint8 images B x 3 x H x W."""
        x = self._normalise(torch.from_numpy(np.ascontiguousarray(images)).to(self.device))
        logits: Tensor = self.model(x)
        return logits.float().softmax(1)

    def errors(self, split: Images) -> NDArray[np.bool_]:
        """Which images of a split are classified wrongly."""
        parts = [
            self(split.images[start : start + BATCH]).argmax(1).cpu().numpy()
            for start in range(0, len(split.labels), BATCH)
        ]
        wrong: NDArray[np.bool_] = np.concatenate(parts) != split.labels
        return wrong

    def name(self, image: Image.Image) -> list[tuple[str, float]]:
        """The likeliest classes of a picture, scaled to the size of the training images."""
        height, width = self.info.crop
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        (found,) = self(np.asarray(small).transpose(2, 0, 1)[None])
        values, indices = found.topk(min(MOST_NAMED, len(found)))
        classes = [self.info.classes[i] for i in indices.tolist()]
        return list(zip(classes, values.tolist(), strict=True))
