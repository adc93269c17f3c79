"""Training of segmentation networks."""

from __future__ import annotations

from encnet_triton.data import DATASETS
from encnet_triton.train.config import Config, all_fields
from encnet_triton.train.task import Task


class Segmentation(Task):
    """A network that names the class of every pixel."""

    datasets = tuple(DATASETS)

    @classmethod
    def reads(cls, config: Config) -> frozenset[str]:
        """All but what CIFAR-10 networks have; `create_model` and `create_dataset` refuse options
        of another network or data set."""
        return frozenset(all_fields()) - {"width", "block", "shake_scale"}
