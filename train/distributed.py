"""The processes of one run: torchrun's environment, small collectives, clean shutdown."""

from __future__ import annotations

import gc
import hashlib
import importlib
import inspect
import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# A first step may compile for many minutes on one rank while the others wait.
TIMEOUT = timedelta(minutes=30)


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
        # Its functions take the group that is there when it is imported as their default, and so
        # would keep that group, with its threads, beyond `stop`.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=fresh_store(),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=place if cuda else None,
        )
    return World(rank, size, local_rank, local_size, place)


def fresh_store() -> dist.Store:
    """A key-value store of the processes that start now, empty whatever was there before.

    The store that torchrun offers outlives its processes: in a group that it starts again, gloo and
    NCCL would find the addresses of the group that died, and wait for it. The number of restarts
    would not tell the two apart, since every agent counts its own. So rank 0 draws a name for this
    start, and hands it to whoever asks now.

    Raises:
        WorldError: some ranks did not appear in time.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    own = uuid.uuid4().hex
    if rank != 0:
        store.set(f"asks/{rank}", own)
        name = store.get(f"answer/{own}").decode()
        store.set(f"{name}/has/{rank}", "")
        return dist.PrefixStore(name, store)
    missing = set(range(1, size))
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        for other in missing:
            # What stands here may have been asked by a process that is gone: answer until the
            # one that lives says that it has the name.
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        missing = {other for other in missing if not store.check([f"{own}/has/{other}"])}
        if time.monotonic() > deadline:
            raise WorldError(f"ranks {sorted(missing)} did not appear within {TIMEOUT}")
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


def stop() -> None:
    """Leave the process group, if there is one.

    The group's threads end with the last reference to it. One that outlived this would crash a
    process that is about to exit well: freeing a tensor takes the interpreter, which is gone.
    """
    if dist.is_initialized():
        gc.collect()  # DDP and its module refer to each other, and both to the group
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


def digests(model: nn.Module) -> dict[str, bytes]:
    """A hash of every parameter and buffer, by name: of its values, whatever their layout."""
    return {
        name: hashlib.blake2b(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), digest_size=16
        ).digest()
        for name, tensor in model.state_dict().items()
    }


def check_same_weights(model: nn.Module) -> None:
    """Make sure that all ranks start from the same parameters and buffers, bit for bit.

    DDP sends rank 0's weights to the others without a word, which would hide that they had been
    built from another seed or read from another file.

    Raises:
        WorldError: names the ranks and the first tensor that differ from rank 0's.
    """
    own, *others = gather(digests(model))
    different = {
        rank: next(name for name in own | other if own.get(name) != other.get(name))
        for rank, other in enumerate(others, 1)
        if other != own
    }
    if different:
        raise WorldError(
            f"ranks {list(different)} hold other weights than rank 0 at the start of the run; "
            f"the first that differs is {next(iter(different.values()))}"
        )


def data_parallel(
    model: nn.Module, device: torch.device, *, sync_buffers: bool, accumulation: int
) -> DistributedDataParallel:
    """Wrap a model so that its backward pass averages the gradients over all processes.

    Args:
        model: on ``device``, the same on every rank.
        device: of this process.
        sync_buffers: copy rank 0's buffers to the others before every forward pass; not needed
            where the batch normalisation is synchronised.
        accumulation: backward passes of one step, all but the last in ``no_sync()``.
    """
    # In torch 2.13 `forward_sync_buffers` takes the place of `broadcast_buffers`, which warns.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    buffers: dict[str, Any] = {name: sync_buffers}
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Every step uses every parameter once. But torch's static graph counts the backward passes
        # in no_sync() too: it fails an internal assertion in the first step (torch 2.13, pull
        # request 187732).
        static_graph=accumulation == 1,
        **buffers,
    )
