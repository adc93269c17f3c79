"""A small network's checkpoint, and files as they were before checksums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from encnet_triton.weights.checkpoint import FORMAT, ModelInfo

OPTIONS = {"name": "fcn", "num_classes": 2, "backbone": "demo", "head_channels": 8}
INFO = ModelInfo(
    OPTIONS, ["a", "b"], [[0, 0, 0], [9, 9, 9]], [0.5] * 3, [0.2] * 3, [32, 32],
    data={"name": "folder", "root": "/data", "split": "val", "options": {}},
)  # fmt: skip


def write_unchecked(path: Path, tensors: dict[str, Tensor], metadata: Any) -> None:
    """A file whose content nothing vouches for."""
    save_file(tensors, path, {"format": FORMAT, "metadata": json.dumps(metadata)})
