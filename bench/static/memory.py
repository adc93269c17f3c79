"""Peak memory of a training step on a GPU, predicted: ``python -m bench static memory``.

The step runs on fake tensors, which have shapes and lifetimes but no values, so this takes seconds
and little memory on any machine. It counts the bytes of all tensors that are alive at once, as an
allocator without waste would need them; workspaces of cuDNN and cuBLAS, fragmentation and the CUDA
context are not counted. Eager, bfloat16 autocast, three variants:

- stock: the stock code of `bench step`.
- ours: the operators of this project.
- ours, checkpointed: the backward pass recomputes stages 3 and 4.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import report
from bench.options import add_json
from bench.step import Shape, our_loss, stock, stock_loss
from encnet_triton.files import write_json
from encnet_triton.models import create_model
from encnet_triton.nn import SegmentationLoss, set_norm_impl
from encnet_triton.options import whole
from encnet_triton.train.config import OptimConfig
from encnet_triton.train.forecast import Lifetimes
from encnet_triton.train.optim import make_optimizer

VARIANTS = ("stock", "ours", "ours, checkpointed")
DEFAULT = Shape("resnet101", 16, 480, 150)
SIZES = ("backbone", "batch", "crop", "classes")


@dataclass(frozen=True)
class Prediction:
    """Bytes of one variant.

    Attributes:
        state: weights, buffers and momentum.
        kept: what forward pass and loss keep for the backward pass.
        peak: of the whole step, including the state.
        layers: what each layer keeps, by the name of its module; shared tensors count where they
            are kept first.
    """

    state: int
    kept: int
    peak: int
    layers: dict[str, int]


class Kept:
    """What autograd keeps during a forward pass, by module."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: Counter[str] = Counter()
        self._state = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._seen: set[int] = set()
        self._inside = ["loss"]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name))
            module.register_forward_hook(lambda *_: self._leave())

    def _leave(self) -> None:
        self._inside.pop()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen and key not in self._state:
            self._seen.add(key)
            self.layers[self._inside[-1] or "model"] += storage.nbytes()
        return tensor

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch a forward pass."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


def predict(variant: str, shape: Shape) -> Prediction:
    """Run two steps on fake tensors; the second one has momentum and is counted."""
    with FakeTensorMode(), Lifetimes() as live:
        model = create_model("encnet", shape.classes, backbone=shape.backbone)
        criterion = SegmentationLoss(shape.classes)
        if variant == "stock":
            stock(model)
        else:
            set_norm_impl(model, "fused")
            model.backbone.activation_checkpointing = variant.endswith("checkpointed")
        optimizer = make_optimizer(model, OptimConfig(lr=0.01))
        kept = Kept(model)
        for second in (False, True):
            state = live.bytes
            live.peak = state
            images = torch.empty(shape.batch, 3, shape.crop, shape.crop, dtype=torch.uint8)
            target = torch.empty(shape.batch, shape.crop, shape.crop, dtype=torch.uint8)
            x = images.float().contiguous(memory_format=torch.channels_last)
            with kept.watch() if second else _nothing():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    output = model(x)
                    if variant == "stock":
                        loss = stock_loss(output, target.long())
                if variant != "stock":
                    loss = our_loss(criterion, output, target)
            del output, x
            after_forward = live.bytes
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del loss, images, target
        return Prediction(state, after_forward - state, live.peak, dict(kept.layers))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def by_part(layers: dict[str, int]) -> dict[str, int]:
    """Bytes kept by each part of the network: stem, stages, head, loss."""
    parts: defaultdict[str, int] = defaultdict(int)
    for name, size in layers.items():
        first, _, rest = name.partition(".")
        part = rest.partition(".")[0] if first == "backbone" else first
        part = "stem" if part in ("conv1", "bn1", "maxpool") else part or "inputs of blocks"
        parts[part] += size
    return dict(parts)


def tables(shape: Shape, found: dict[str, Prediction]) -> list[Table]:
    """Peaks, and what each part of the network keeps."""
    title = f"{shape.batch} x {shape.crop} x {shape.crop}, EncNet {shape.backbone}"
    peaks = Table(
        title=f"PREDICTED memory of a training step on a GPU, GiB: {title}, "
        f"{shape.classes} classes, bfloat16 autocast",
        title_justify="left",
    )
    peaks.add_column("", no_wrap=True)
    for column in ("weights and momentum", "kept for backward", "peak", "against stock"):
        peaks.add_column(column, justify="right")
    base = found["stock"].peak
    for variant, one in found.items():
        cells = [f"{size / 2**30:.2f}" for size in (one.state, one.kept, one.peak)]
        peaks.add_row(variant, *cells, f"{one.peak / base:.0%}")
    parts = Table(title="PREDICTED, kept for backward, MiB", title_justify="left")
    parts.add_column("", no_wrap=True)
    for variant in found:
        parts.add_column(variant, justify="right")
    kept = {variant: by_part(one.layers) for variant, one in found.items()}
    for part in dict.fromkeys(name for sizes in kept.values() for name in sizes):
        parts.add_row(part, *(f"{sizes.get(part, 0) / 2**20:.0f}" for sizes in kept.values()))
    return [peaks, parts]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    for name in SIZES:
        default = getattr(DEFAULT, name)
        parser.add_argument(
            f"--{name}", type=str if name == "backbone" else whole(1), default=default,
            help="default %(default)s",
        )  # fmt: skip
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Predict every variant and print the tables; returns the exit status."""
    shape = Shape(**{name: getattr(options, name) for name in SIZES})
    found = {variant: predict(variant, shape) for variant in VARIANTS}
    console = report.console(150)
    for table in tables(shape, found):
        console.print(table)
    if options.json is not None:
        document = {"shape": asdict(shape), "predicted": {v: asdict(p) for v, p in found.items()}}
        write_json(document, options.json)
    return 0
