"""One rank of a group that shares a device: `torchrun ... -m bench.gpu.ranks`.

Synchronised batch norm on shares of a batch must equal batch norm on the batch, forward and
backward; a step of a network in DDP must leave the same weights on all ranks.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from encnet_triton.kernels import batch_norm_act
from encnet_triton.models import create_model
from encnet_triton.nn import SegmentationLoss, convert_batchnorm

# Relative to the largest value: float32 sums in another order.
TOLERANCE = 1e-5


def _normalised(x: Tensor, factor: Tensor, group: object) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = batch_norm_act(
        x, None, None, None, None, training=True, momentum=0.1, eps=1e-5, group=group
    )
    return y.detach(), torch.autograd.grad(y, x, factor)[0]


def check_batch_norm(device: str, rank: int, size: int) -> str:
    """Every rank holds a share of the images; the last one holds one more."""
    torch.manual_seed(0)
    whole, factor = (torch.randn(2 * size + 1, 24, 9, 7, device=device) for _ in range(2))
    share = slice(2 * rank, 2 * rank + 2 + (rank == size - 1))
    wanted = _normalised(whole, factor, None)
    got = _normalised(whole[share], factor[share], dist.group.WORLD)
    for name, a, b in zip(("y", "dx"), got, wanted, strict=True):
        error = float((a - b[share]).abs().max() / b.abs().max())
        if not error <= TOLERANCE:
            raise SystemExit(f"error: {name} of synchronised batch norm is off by {error:.1e}")
    return "batch norm"


def check_ddp(device: str, rank: int, size: int) -> str:
    """One step; the weights of all ranks are compared with those of the first."""
    torch.manual_seed(0)
    plain = create_model("encnet", 5, backbone="demo", num_codewords=4, head_channels=16)
    model = convert_batchnorm(plain, dist.group.WORLD).to(device)
    ddp = DistributedDataParallel(model)
    torch.manual_seed(rank)
    images = torch.randn(2, 3, 48, 48, device=device)
    labels = torch.randint(0, 5, (2, 48, 48), device=device)
    SegmentationLoss(5).to(device)(ddp(images), labels).total.backward()
    torch.optim.SGD(ddp.parameters(), 0.1).step()
    for name, weight in model.named_parameters():
        first = weight.detach().clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, weight.detach()):
            raise SystemExit(f"error: {name} differs between ranks after a step")
    return "DDP"


def main() -> None:
    """Run the checks on this rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--backend", required=True)
    options = parser.parse_args()
    if options.device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(options.backend)
    rank, size = dist.get_rank(), dist.get_world_size()
    done = [check(options.device, rank, size) for check in (check_batch_norm, check_ddp)]
    dist.barrier()
    if rank == 0:
        print(f"{' and '.join(done)} correct on {size} processes over {options.backend}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
