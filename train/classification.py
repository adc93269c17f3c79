"""Training of the CIFAR-10 networks (paper, section 3.5)."""

from __future__ import annotations

from typing import Any, ClassVar

from encnet_triton.train.config import Config
from encnet_triton.train.task import Task

_READ = {
    "model", "width", "block", "dataset", "data",
    "lr", "momentum", "weight_decay", "decay_norm_bias", "schedule", "power", "warmup_steps",
    "epochs", "batch_size", "label_smoothing",
    "name", "runs", "seed", "device", "amp", "compile", "sync_bn", "resume", "stop_at",
}  # fmt: skip


class Classification(Task):
    """A network that names the class of a small image."""

    datasets = ("cifar10",)
    fixed: ClassVar[dict[str, Any]] = {
        "crop": (32, 32),
        "base_size": None,
        "scale_by": "image",
        "scale": (1.0, 1.0),
        "rotation": 0.0,
        "flip": 0.5,
        "accumulation": 1,
    }

    @classmethod
    def reads(cls, config: Config) -> frozenset[str]:
        """The codebook's fields belong to the network that has one."""
        codebook = {"num_codewords", "shake_scale"}
        return frozenset(_READ | (codebook if config.model.model == "cifar_encnet" else set()))
