"""What is measured: inputs, our side and the peers, each variant for a process of its own."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bench import peers
from encnet_triton.data import Augment, create_dataset
from encnet_triton.kernels import encode, upsample_cross_entropy
from encnet_triton.models import CifarNet

FILL = (124, 116, 104)
CIFAR_IMAGES = 128


@dataclass(frozen=True)
class Case:
    """A comparison.

    Attributes:
        title: what is computed, with its shapes.
        variants: names in the order of the table; "ours" is first, the peer that ratios refer to
            second.
        build: makes the call of a variant on a device.
        per_call: things done a call (images), for a rate; 0 for none.
        threads: CPU threads, None for all.
        gpu_bytes: bytes a call must move at least, at the shape used on a GPU; 0 for none.
    """

    title: str
    variants: tuple[str, ...]
    build: Callable[[str, torch.device, str | None], Callable[[], object]]
    per_call: int = 0
    threads: int | None = None
    gpu_bytes: int = 0


def compiled(variant: str) -> bool:
    """Whether a variant needs torch.compile, hence a compiler."""
    return variant.endswith("compiled")


def _step(function: Callable[..., Tensor], inputs: list[Tensor], rest: list[Tensor]) -> None:
    """Forward and backward; gradients are dropped before, as an optimiser does."""
    for tensor in inputs:
        tensor.grad = None
    loss = function(*inputs, *rest)
    loss.backward(torch.ones_like(loss))  # type: ignore[no-untyped-call]


def build_encode(variant: str, device: torch.device, _: str | None) -> Callable[[], object]:
    """B2 C512 60x60 K32 float32 on a CPU; B16 bfloat16 on a GPU."""
    torch.manual_seed(0)
    batch, dtype = (16, torch.bfloat16) if device.type == "cuda" else (2, torch.float32)
    x = torch.randn(batch, 512, 60, 60, device=device).relu().to(dtype)
    if device.type == "cuda":
        x = x.contiguous(memory_format=torch.channels_last)
    codewords = (torch.rand(32, 512, device=device) - 0.5) / 64
    scale = -torch.rand(32, device=device)
    functions: dict[str, Callable[..., Tensor]] = {
        "ours": encode,
        "materialising, eager": peers.encode_materialised,
        "materialising, compiled": peers.encode_materialised,
        "matrix products, compiled": peers.encode_matmul,
    }
    function = functions[variant]
    if compiled(variant):
        function = torch.compile(function, fullgraph=True)
    inputs = [t.requires_grad_() for t in (x, codewords, scale)]
    return partial(_step, function, inputs, [])


def build_upsample(variant: str, device: torch.device, _: str | None) -> Callable[[], object]:
    """B4 (GPU: B16) C150 60x60 -> 480x480, a tenth of the pixels ignored."""
    torch.manual_seed(0)
    batch, dtype = (16, torch.bfloat16) if device.type == "cuda" else (4, torch.float32)
    logits = torch.randn(batch, 150, 60, 60, device=device, dtype=dtype) * 3
    logits = logits.contiguous(memory_format=torch.channels_last).requires_grad_()
    target = torch.randint(0, 150, (batch, 480, 480), device=device)
    target[:, :48] = 255
    function: Callable[..., Tensor] = upsample_cross_entropy
    if variant != "ours":
        function = peers.upsample_then_cross_entropy
    if compiled(variant):
        function = torch.compile(function, fullgraph=True)
    if variant == "ours":
        target = target.to(torch.uint8)
    return partial(_step, function, [logits], [target])


def build_crop(variant: str, _: torch.device, data: str | None) -> Callable[[], object]:
    """Decode and augment `CROP_IMAGES` images to 480 x 480, from `data` or made here."""
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


def _folder_files(root: Path) -> list[tuple[bytes, bytes]]:
    """The first images of a folder data set's list, brought to 683 x 512 JPEGs and label PNGs."""
    dataset = create_dataset("folder", "train", root, ignore_label=11)
    chosen = np.linspace(0, len(dataset) - 1, CROP_IMAGES).astype(int).tolist()
    samples = [dataset[i] for i in chosen]
    return [_encoded(s.image, Image.fromarray(s.label)) for s in samples]


def made_files(seed: int) -> tuple[bytes, bytes]:
    """A smooth picture with grain, and a label of blobs: about the entropy of a photo."""
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
    """The Encoding layer of a network, replaced by the formula that materialises B x N x K x C."""

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


def build_cifar(variant: str, device: torch.device, _: str | None) -> Callable[[], object]:
    """A step without the optimiser: B128, bfloat16 autocast on a GPU; float32 on a CPU."""
    model = cifar_network(device, variant.startswith("materialising")).train()
    images = torch.randn(CIFAR_IMAGES, 3, 32, 32, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (CIFAR_IMAGES,), device=device)
    if compiled(variant):
        model.compile(fullgraph=True)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]

    return step


CASES = {
    "encode": Case(
        "Encoding layer, forward + backward (CPU: B2 C512 60x60 K32 fp32; GPU: B16 bf16)",
        ("ours", "materialising, eager", "materialising, compiled", "matrix products, compiled"),
        build_encode,
        # bfloat16 x three times (forward reads it, backward reads it and writes dx), float32 E and
        # its gradient, codewords once forward and twice backward.
        gpu_bytes=3 * 2 * 16 * 3600 * 512 + 2 * 4 * 16 * 32 * 512 + 3 * 4 * 32 * 512,
    ),
    "upsample": Case(
        "upsample + cross-entropy, forward + backward (C150 60x60 -> 480x480; CPU: B4 fp32)",
        ("ours", "interpolate + cross_entropy, eager", "interpolate + cross_entropy, compiled"),
        build_upsample,
    ),
    "crop": Case(
        "decode JPEG 683x512 + label PNG, augment to 480x480, one core",
        ("ours", "resize, flip, rotate, pad, crop"),
        build_crop,
        per_call=CROP_IMAGES,
        threads=1,
    ),
    "cifar": Case(
        "EncNet-14 on 32x32 images, forward + backward, B128 (GPU: 16k64d bf16; CPU: 16k16d fp32)",
        ("ours", "materialising, eager", "ours, compiled", "materialising, compiled"),
        build_cifar,
        per_call=CIFAR_IMAGES,
    ),
}
