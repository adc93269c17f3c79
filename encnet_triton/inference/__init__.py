"""Trained networks on new images: label maps, classes of pictures, archives for test servers."""

from encnet_triton.inference.classifier import ImageClassifier
from encnet_triton.inference.comparing import compare_checkpoints
from encnet_triton.inference.photos import find_images, read_image
from encnet_triton.inference.predictor import Predictor
from encnet_triton.inference.views import PAPER_SCALES, Views
from encnet_triton.inference.windows import WHOLE_IMAGE_WARNING, resized, window_starts

__all__ = [
    "PAPER_SCALES",
    "WHOLE_IMAGE_WARNING",
    "ImageClassifier",
    "Predictor",
    "Views",
    "compare_checkpoints",
    "find_images",
    "read_image",
    "resized",
    "window_starts",
]
