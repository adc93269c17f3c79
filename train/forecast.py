"""What a training step will need on a GPU, predicted from the lifetimes of its tensors."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from encnet_triton.models import create_model
from encnet_triton.nn import SegmentationLoss, set_norm_impl
from encnet_triton.train.average import Average, network_like
from encnet_triton.train.config import Config
from encnet_triton.train.optim import make_optimizer

WINDOWS = 8  # `Predictor` computes this many at once
_ROUNDED = 512  # bytes: the smallest block of torch's allocator


class Lifetimes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors made inside it that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = -(-storage.nbytes() // _ROUNDED) * _ROUNDED
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.bytes -= size


def peak_memory(config: Config, num_classes: int, processes: int) -> int:
    """Predicted peak memory of one process on a GPU, in bytes, optimizer state included.

    Two steps run on fake tensors, which have shapes and lifetimes but no values; the second one has
    momentum and is counted. So is a validation of a batch of windows. Workspaces of cuDNN and
    cuBLAS, fragmentation, and the scores of a whole image are not.
    """
    micro = max(1, config.optim.batch_size // (processes * config.optim.accumulation))
    mixed = config.run.amp != "off"
    with torch.device("meta"):  # and not fake: networks of timm read tensors while they are made
        plan = create_model(num_classes=num_classes, **config.model.options())
    with FakeTensorMode(), Lifetimes() as live:
        model: Any = network_like(plan, lambda t: torch.empty(t.shape, dtype=t.dtype))
        set_norm_impl(model, "fused")
        model.backbone.activation_checkpointing = config.run.activation_checkpointing
        average = Average(model, config.optim.ema) if config.optim.ema else None
        criterion = SegmentationLoss(num_classes, **config.optim.loss_options())
        optimizer = make_optimizer(model, config.optim)
        for _ in range(2):
            live.peak = live.bytes
            images = torch.empty(micro, 3, *config.data.crop, dtype=torch.uint8)
            target = torch.empty(micro, *config.data.crop, dtype=torch.uint8)
            x = images.float().contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16) if mixed else nullcontext():
                output = model(x)
            criterion(output, target, pixels=1.0, images=1.0).total.backward()
            optimizer.step()
            if average is not None:
                average.update(0)
            optimizer.zero_grad(set_to_none=True)
            del output, x, images, target
        model.eval()
        with torch.no_grad():
            windows = torch.empty(WINDOWS, 3, *config.data.crop).contiguous(
                memory_format=torch.channels_last
            )
            with torch.autocast("cpu", dtype=torch.bfloat16) if mixed else nullcontext():
                logits = model(windows).logits
            F.interpolate(logits.float(), size=config.data.crop, mode="bilinear").softmax(1)
    peak: int = live.peak
    return peak
