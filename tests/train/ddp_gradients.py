"""Run by test_ddp.py, alone and under torchrun: gradients of one step, one file per case.

A case has every gradient of an EncNet with its SE losses, batch 8 over all processes, dropout 0,
synchronised batch normalisation, ignored areas of another size in every image. With accumulation
the batch is cut into micro-batches; the statistics are then frozen, which would differ by
micro-batch, and the third of three equal steps is written.

Then the buffers of a batch norm whose values were those of its rank, after `send_buffers`.

Fails if a thread of gloo outlives the process group.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from encnet_triton.models import create_model
from encnet_triton.nn import SegmentationLoss, set_sync_group
from encnet_triton.train import distributed

# Dtype, micro-batches, whether the statistics are frozen.
CASES = {
    "float64": (torch.float64, 1, False),
    "float32": (torch.float32, 1, False),
    "frozen": (torch.float64, 1, True),
    "frozen, accumulated": (torch.float64, 2, True),
}


def gradients(
    world: distributed.World, dtype: torch.dtype, accumulation: int, frozen: bool
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    options = dict(backbone="demo", head_channels=32, num_codewords=4, dropout=0.0)
    model = create_model("encnet", 5, **options).to(dtype)
    images = torch.randn(8, 3, 40, 40).to(dtype)  # the same in both dtypes, as the weights
    labels = torch.randint(0, 5, (8, 40, 40))
    for index, label in enumerate(labels):
        label[:, : 5 * index] = 255
    for module in model.modules():
        if frozen and isinstance(module, _BatchNorm):
            module.eval()
    loss = SegmentationLoss(5)
    pixels = loss.pixels_in(labels) / world.size  # the trainer all-reduces its own share
    network: torch.nn.Module = model
    if world.size > 1:
        set_sync_group(model, distributed.sync_group())
        network = distributed.data_parallel(
            model, world.device, sync_buffers=False, accumulation=accumulation
        )
    own = range(8)[world.rank * 8 // world.size : (world.rank + 1) * 8 // world.size]
    micro = torch.tensor(own).chunk(accumulation)
    for _ in range(3 if frozen else 1):
        model.zero_grad()
        for number, share in enumerate(micro, 1):
            waits = world.size > 1 and number < len(micro)
            with network.no_sync() if waits else nullcontext():
                out = network(images[share])
                loss(out, labels[share], pixels=pixels, images=8 / world.size).total.backward()
    return {name: p.grad.contiguous() for name, p in model.named_parameters()}


def main(folder: Path) -> None:
    world = distributed.start("cpu")
    for name, (dtype, accumulation, frozen) in CASES.items():
        # One process has nothing to accumulate for, and is the exact one.
        if world.size == 1 and (accumulation > 1 or dtype is not torch.float64):
            continue
        found = gradients(world, dtype, accumulation, frozen)
        if world.main:
            save_file(found, folder / f"{name}, {world.size}.safetensors")
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(world.rank + 1)
    norm.num_batches_tracked += world.rank + 3
    distributed.send_buffers(norm)
    save_file(norm.state_dict(), folder / f"buffers, {world.rank} of {world.size}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    distributed.stop()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    left = [name for name in names if "gloo" in name]
    assert not left, f"threads {left} outlived the process group and may crash this process"
