"""Run by test_ddp.py, alone and under torchrun: gradients of one step in float64 or float32.

Writes every gradient of an EncNet with its SE losses, batch 8 over all processes, dropout 0,
synchronised batch normalisation, ignored areas of another size in every image.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from encnet_triton.models import create_model
from encnet_triton.nn import SegmentationLoss, set_sync_group
from encnet_triton.train import distributed


def main(dtype: torch.dtype, output: str) -> None:
    world = distributed.start("cpu")
    torch.manual_seed(0)
    options = dict(backbone="demo", head_channels=32, num_codewords=4, dropout=0.0)
    model = create_model("encnet", 5, **options).to(dtype)
    images = torch.randn(8, 3, 40, 40, dtype=dtype)
    labels = torch.randint(0, 5, (8, 40, 40))
    for index, label in enumerate(labels):
        label[:, : 5 * index] = 255
    loss = SegmentationLoss(5)
    pixels = loss.pixels_in(labels) / world.size  # the trainer all-reduces its own share
    network: torch.nn.Module = model
    if world.size > 1:
        set_sync_group(model, dist.group.WORLD)
        network = DistributedDataParallel(model)
    share = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
    terms = loss(network(images[share]), labels[share], pixels=pixels, images=8 / world.size)
    terms.total.backward()
    if world.main:
        gradients = {name: p.grad.contiguous() for name, p in model.named_parameters()}
        save_file(gradients, output)
    distributed.stop()


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), sys.argv[2])
