"""The comparisons: inputs, our side and the peers; each variant runs in its own process."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bench import peers
from bench.passes import PASSES, VARIANTS, Pass, is_compiled, least_bytes
from encnet_triton.data import Augment, Dataset, create_dataset
from encnet_triton.models import CifarNet

FILL = (124, 116, 104)
CIFAR_IMAGES = 128


@dataclass(frozen=True)
class Case:
    """A comparison.

    Attributes:
        title: what is computed, with its shapes.
        variants: names in the order of the table; "ours" is first.
        build: returns the function to time, for a variant, a device and a folder of images.
        per_call: images per call, for the column images/s; 0 leaves it out.
        threads: CPU threads, None for all.
        gpu_bytes: the least bytes a call must move, at the shape used on a GPU; 0 if not known.
        reads_files: can read the images of a folder data set; runs on the CPU only.
    """

    title: str
    variants: tuple[str, ...]
    build: Callable[[str, torch.device, str | None], Callable[[], object]]
    per_call: int = 0
    threads: int | None = None
    gpu_bytes: int = 0
    reads_files: bool = False


def _build_operator(
    operator: str, shape: dict[str, Any], cpu_batch: int
) -> Callable[[str, torch.device, str | None], Pass]:
    """bfloat16 on a GPU; `cpu_batch` images in float32 on a CPU."""

    def build(variant: str, device: torch.device, _: str | None) -> Pass:
        if device.type == "cuda":
            return PASSES[operator](variant, device, torch.bfloat16, **shape)
        return PASSES[operator](variant, device, torch.float32, **{**shape, "B": cpu_batch})

    return build


def build_crop(variant: str, _: torch.device, data: str | None) -> Callable[[], object]:
    """Decode and augment `CROP_IMAGES` images to 480 x 480, from `data` or generated."""
    files = _folder_files(Path(data)) if data else [made_files(i) for i in range(CROP_IMAGES)]
    augment = Augment(480, base_size=520, scale=(0.5, 2.0), rotation=10.0, flip=0.5, fill=FILL)
    order = np.random.default_rng(0)

    def call() -> None:
        for image, label in files:
            picture, marks = Image.open(io.BytesIO(image)), Image.open(io.BytesIO(label))
            if variant == "ours":
                augment(picture, np.asarray(marks), order)
            else:
                peers.sequential_crop(picture, marks, 480, 520, FILL, order)

    return call


CROP_IMAGES = 24


def folder(root: Path) -> Dataset:
    """The training images of a folder data set; 255 and CamVid's 11 are no class."""
    return create_dataset("folder", "train", root, ignore_label="11,255")


def _folder_files(root: Path) -> list[tuple[bytes, bytes]]:
    """Images from all over a folder data set, as JPEGs and label PNGs of 683 x 512."""
    dataset = folder(root)
    chosen = np.linspace(0, len(dataset) - 1, CROP_IMAGES).astype(int).tolist()
    samples = [dataset[i] for i in chosen]
    return [_encoded(s.image, Image.fromarray(s.label)) for s in samples]


def made_files(seed: int) -> tuple[bytes, bytes]:
    """A smooth image with noise, about the entropy of a photo, and a label map of blobs."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 22, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((683, 512), Image.Resampling.BICUBIC)).astype(np.int16)
    grainy = smooth + rng.normal(0, 6, smooth.shape)
    image = Image.fromarray(grainy.clip(0, 255).astype(np.uint8))
    blobs = Image.fromarray(rng.integers(0, 11, (8, 11), dtype=np.uint8))
    return _encoded(image, blobs.resize((683, 512), Image.Resampling.NEAREST))


def _encoded(image: Image.Image, label: Image.Image) -> tuple[bytes, bytes]:
    size = (683, 512)
    picture, marks = io.BytesIO(), io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(picture, "JPEG", quality=90)
    label.resize(size, Image.Resampling.NEAREST).save(marks, "PNG")
    return picture.getvalue(), marks.getvalue()


class MaterialisedEncoding(nn.Module):
    """Replaces an Encoding layer by the formula that materialises B x N x K x C."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.codewords: Tensor = layer.codewords
        self.scale: Tensor = layer.scale

    def forward(self, x: Tensor) -> Tensor:
        return peers.encode_materialised(x, self.codewords, self.scale)


def cifar_network(device: torch.device, materialised: bool) -> nn.Module:
    """EncNet-14 with 16 codewords, 64 channels on a GPU and 16 on a CPU."""
    torch.manual_seed(0)
    width = 64 if device.type == "cuda" else 16
    model = CifarNet("encoding", width=width, num_codewords=16, shake_scale=False)
    if materialised:
        blocks: Any = model.blocks
        for block in blocks:
            block.unit.encoding = MaterialisedEncoding(block.unit.encoding)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def build_cifar(variant: str, device: torch.device, _: str | None) -> Pass:
    """A step without the optimiser: B128, bfloat16 autocast on a GPU; float32 on a CPU."""
    model = cifar_network(device, variant.startswith("materialising")).train()
    images = torch.randn(CIFAR_IMAGES, 3, 32, 32, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (CIFAR_IMAGES,), device=device)
    if is_compiled(variant):
        model.compile(fullgraph=True)

    def loss(*_: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(images)
        return F.cross_entropy(logits.float(), labels)

    return Pass(loss, list(model.parameters()))


# The shapes that have a time budget: 16 training crops of 480 x 480 in the paper's networks.
BUDGET: dict[str, dict[str, Any]] = {
    "encode": {"B": 16, "C": 512, "size": 60, "K": 32},
    "batch_norm": {"B": 16, "C": 256, "size": 120, "residual": True},
    "upsample": {"B": 16, "C": 150, "low": 60, "high": 480},
}


def _operator_case(operator: str, title: str, cpu_batch: int) -> Case:
    shape = BUDGET[operator]
    build = _build_operator(operator, shape, cpu_batch)
    least = sum(least_bytes(operator, torch.bfloat16.itemsize, shape))
    return Case(title, VARIANTS[operator], build, gpu_bytes=least)


CASES = {
    "encode": _operator_case(
        "encode",
        "Encoding layer, forward + backward (CPU: B2 C512 60x60 K32 fp32; GPU: B16 bf16)",
        2,
    ),
    "batch_norm": _operator_case(
        "batch_norm",
        "batch norm + residual + ReLU, forward + backward (C256 120x120; CPU: B2 fp32; GPU: B16 "
        "bf16)",
        2,
    ),
    "upsample": _operator_case(
        "upsample",
        "upsample + cross-entropy, forward + backward (C150 60x60 -> 480x480; CPU: B4 fp32)",
        4,
    ),
    "crop": Case(
        "decode JPEG 683x512 + label PNG, augment to 480x480, one core",
        ("ours", "resize, flip, rotate, pad, crop"),
        build_crop,
        per_call=CROP_IMAGES,
        threads=1,
        reads_files=True,
    ),
    "cifar": Case(
        "EncNet-14 on 32x32 images, forward + backward, B128 (GPU: 16k64d bf16; CPU: 16k16d fp32)",
        ("ours", "materialising, eager", "ours, compiled", "materialising, compiled"),
        build_cifar,
        per_call=CIFAR_IMAGES,
    ),
}
