"""The processes of one run: torchrun's environment, small collectives, clean shutdown."""

from __future__ import annotations

import gc
import hashlib
import importlib
import inspect
import os
import sys
import time
import traceback
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from encnet_triton.cores import usable_cores
from encnet_triton.train.watch import FIRST, Watch

# A first step may compile for many minutes on one rank while the others wait.
TIMEOUT = timedelta(seconds=FIRST)
# `Watch` limits how long a rank is waited for, and names it.
_COLLECTIVES = timedelta(days=7)


class WorldError(RuntimeError):
    """The processes of this run cannot work together, or not on the device asked for."""


# Of the group that this process is in.
_watch: Watch | None = None
_sync_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """This process among all of them.

    Attributes:
        rank, size: number of this process and of all, over all hosts.
        local_rank, local_size: the same on this host.
        device: where this process computes.
        watch: ends this process if its run cannot continue.
        job: names the torchrun that started this process, restarts included; "" without one.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    watch: Watch = field(default_factory=lambda: Watch(0, 1, None, None), compare=False)
    job: str = ""

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def start(device: str) -> World:
    """Join the process group that torchrun describes, or run alone.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        WorldError: CUDA was requested but is not available, there are more processes than GPUs, or
            the processes do not find each other.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise WorldError("device = 'cuda' was requested, but torch sees no CUDA GPU here")
    if cuda and local_size > torch.cuda.device_count():
        raise WorldError(
            f"{local_size} processes were started on a host with {torch.cuda.device_count()} GPUs; "
            "start one per GPU, or add --device cpu"
        )
    place = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    elif "OMP_NUM_THREADS" not in os.environ:
        share = max(1, usable_cores() // local_size)
        torch.set_num_threads(min(share, torch.get_num_threads()))
    agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    if size == 1:
        watch = Watch(0, 1, None, agent)
        return World(rank, size, local_rank, local_size, place, watch.start() if agent else watch)
    try:
        # Its functions take the group that is there when it is imported as their default, and so
        # would keep that group, with its threads, beyond `stop`.
        importlib.import_module("torch.distributed.nn.functional")
        store = fresh_store()
        looking, job = second_connection(store, rank)
        global _watch
        _watch = Watch(rank, size, looking, agent).start()
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=_COLLECTIVES,
            device_id=place if cuda else None,
        )
    except dist.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise WorldError(
                f"port {address} is taken by another job; choose another (--master-port)"
            ) from error
        raise WorldError(f"rank {rank} does not reach rank 0 at {address}: {error}") from error
    return World(rank, size, local_rank, local_size, place, _watch, job)


def meeting_point() -> tuple[dist.Store, int, int]:
    """(the store that torchrun or rank 0 offers, rank, size); jobs at one address may share it."""
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    return (dist.PrefixStore(job, store) if job else store), rank, size


def second_connection(store: dist.Store, rank: int) -> tuple[dist.Store, str]:
    """A store for the `Watch`, whose calls do not wait for others, and the name of this job. The
    name is kept in torchrun's store and so outlives the processes that torchrun starts.
    """
    looking, _, _ = meeting_point()
    job = looking.compare_set("job", "", uuid.uuid4().hex).decode()
    if rank == 0:
        store.set("watch", uuid.uuid4().hex)
    return dist.PrefixStore(store.get("watch").decode(), looking), job


def fresh_store() -> dist.Store:
    """A key-value store for the processes that start now, empty whatever an earlier start left.

    torchrun's store outlives its processes: in a restarted group, gloo and NCCL would find the
    addresses of the group that died, and wait for it. The number of restarts cannot tell the two
    apart, because every agent counts its own. So rank 0 draws a name for this start and gives it to
    every rank that asks now.

    Raises:
        WorldError: some ranks did not appear in time.
    """
    store, rank, size = meeting_point()
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
            # This request may be from a process that is gone: answer until the live one confirms
            # that it has the name.
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        missing = {other for other in missing if not store.check([f"{own}/has/{other}"])}
        if time.monotonic() > deadline:
            raise WorldError(f"ranks {sorted(missing)} did not appear within {TIMEOUT}")
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


def stop() -> None:
    """Leave the process group, if there is one; after success only.

    Where another rank has failed, NCCL would wait for it here: see `fail`.

    The group's threads end with the last reference to it. A thread that outlived it would crash a
    process that is about to exit normally: freeing a tensor needs the interpreter, which is gone.
    """
    global _watch, _sync_group
    if _watch is not None:
        _watch.stop()
        _watch = None
    _sync_group = None
    if dist.is_initialized():
        gc.collect()  # DDP and its module refer to each other, and both to the group
        dist.destroy_process_group()


def sync_group() -> dist.ProcessGroup:
    """All processes again, for the sums of batch norms: all of them call this, at the same point.

    In DDP's own group these small sums, which the next layer waits for, would queue behind its
    buckets of gradients. The stages of a run share one.
    """
    global _sync_group
    if _sync_group is None:
        _sync_group = dist.new_group(timeout=_COLLECTIVES)
    return _sync_group


def in_group() -> bool:
    """Whether this process has others that would wait for it."""
    return _watch is not None


def fail(sentence: str | None, lost: bool = False, status: int = 2) -> NoReturn:
    """End this process at once, so that the others end too.

    Args:
        sentence: why; None for the exception that is being handled, which is shown as a traceback.
        lost: that the cause lies with a rank that cannot be reached.
        status: of the process.
    """
    watch = _watch
    assert watch is not None
    if sentence is None:
        traceback.print_exc()
        sentence = repr(sys.exc_info()[1])
    cause = watch.cause(sentence, lost)
    sys.stdout.flush()
    sys.stderr.flush()
    watch.end(cause, status)


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


def send_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: running statistics that each rank keeps for itself."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def digests(model: nn.Module) -> dict[str, bytes]:
    """A hash of every parameter and buffer, by name: of its values, whatever their layout."""
    return {
        name: hashlib.blake2b(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), digest_size=16
        ).digest()
        for name, tensor in model.state_dict().items()
    }


def check_same_weights(model: nn.Module) -> None:
    """Check that all ranks start from the same parameters and buffers, bit for bit.

    DDP silently sends rank 0's weights to the others, which would hide that they were built from
    another seed or read from another file.

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
