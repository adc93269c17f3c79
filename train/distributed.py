"""The processes of one run: torchrun's environment, small collectives, clean shutdown."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class WorldError(RuntimeError):
    """The processes of this run cannot work together, or not on the device asked for."""


@dataclass(frozen=True)
class World:
    """This process among all of them.

    Attributes:
        rank, size: number of this process and of all, over all hosts.
        local_rank, local_size: the same on this host.
        device: where this process computes.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def start(device: str) -> World:
    """Join the process group that torchrun describes, or be a world of one.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        WorldError: CUDA was asked for and is not there, or there are more processes than GPUs.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise WorldError("device = 'cuda' was asked for, but torch sees no CUDA GPU here")
    if cuda and local_size > torch.cuda.device_count():
        raise WorldError(
            f"{local_size} processes were started on a host with {torch.cuda.device_count()} GPUs; "
            "start one per GPU, or add --device cpu"
        )
    place = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    elif local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if size > 1:
        # A first step may compile for many minutes on one rank while the others wait.
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timedelta(minutes=30),
            device_id=place if cuda else None,
        )
    return World(rank, size, local_rank, local_size, place)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; nothing to do in a world of one."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """Every rank's (small, picklable) value, in order of rank."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def check_same_weights(model: nn.Module) -> None:
    """Make sure that all ranks start from the same parameters and buffers.

    Raises:
        WorldError: names the ranks whose weights differ from rank 0's.
    """
    sums = [float(t.double().abs().sum()) for t in model.state_dict().values()]
    everyone = gather(sums)
    wrong = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
    if wrong:
        raise WorldError(f"ranks {wrong} hold other weights than rank 0 at the start of the run")
