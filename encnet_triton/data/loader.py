"""Loaders: augmented batches for training, and every image once for evaluation.

Randomness depends on counters, not on state: which samples an optimiser step sees depends on
(seed, epoch, step), and how a sample is augmented on (seed, epoch, index). Neither depends on
workers, ranks or accumulation, so a resumed run, or one with other numbers of them, sees the same
samples.
"""

from __future__ import annotations

import atexit
import multiprocessing.queues
import os
import re
import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils import data as torch_data

from encnet_triton.data.base import DataError, Dataset, Sample

__all__ = ["MAX_WORKERS", "Augmentation", "Batch", "TrainLoader", "eval_samples", "worker_failure"]

MAX_WORKERS = 512
"""Most loader processes per process: more than any machine has cores for."""

Augmentation = Callable[
    [Image.Image, NDArray[np.uint8], np.random.Generator],
    tuple[NDArray[np.uint8], NDArray[np.uint8]],
]
Key = tuple[int, int]
Item = TypeVar("Item")

# Random streams by purpose; distinct from the numbers that drawn data sets give their splits.
_ORDER, _AUGMENT = 1000, 1001


class Batch(NamedTuple):
    """One micro-batch of one rank.

    images: uint8, B x 3 x H x W, channels_last. labels: uint8, B x H x W. names: where each sample
        came from. draws: B x 4 float32 in [0, 1), for what is left to do on the device (see
        `encnet_triton.data.colour`).
    """

    images: Tensor
    labels: Tensor
    names: list[str]
    draws: Tensor


@dataclass(frozen=True)
class _Failure:
    """Carries a sentence out of a worker, where an exception would become a traceback."""

    message: str


def epoch_order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """The samples of an epoch in the order they are seen."""
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(length)


class _Keys:
    """Endless batch sampler: lists of (epoch, index) for one rank, from `start` through all epochs.

    Continuing past the end of an epoch keeps the workers busy during its last steps and its
    validation.
    """

    def __init__(
        self, length: int, steps: int, shape: tuple[int, int, int], rank: int, seed: int
    ) -> None:
        self.length = length
        self.steps = steps
        self.shape = shape  # accumulation, world size, images of one micro-batch
        self.rank = rank
        self.seed = seed
        self.start: Key = (0, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, first = self.start
        size = int(np.prod(self.shape))
        while True:
            order = epoch_order(self.seed, epoch, self.length)
            for step in range(first, self.steps):
                indices = order[step * size : (step + 1) * size].reshape(self.shape)
                for micro in indices[:, self.rank]:
                    yield [(epoch, index) for index in micro.tolist()]
            epoch, first = epoch + 1, 0


class _AugmentedBatches(torch_data.Dataset[Any]):
    """Makes the batch of a list of keys; this is what runs in the workers."""

    def __init__(self, dataset: Dataset, augment: Augmentation, seed: int) -> None:
        self.dataset = dataset
        self.augment = augment
        self.seed = seed

    def __getitems__(self, keys: list[Key]) -> Batch | _Failure:
        try:
            return _shared(self._batch(keys))
        except DataError as error:
            return _Failure(str(error))
        except MemoryError:
            return _Failure(f"a loader process has no memory left; {_FEWER}")

    def _batch(self, keys: list[Key]) -> Batch:
        images = labels = torch.empty(0, dtype=torch.uint8)
        draws = torch.empty((len(keys), 4))
        for place, (epoch, index) in enumerate(keys):
            rng = np.random.default_rng((self.seed, _AUGMENT, epoch, index))
            image, label = self.augment(*self.dataset.open(index), rng)
            if place == 0:
                images = torch.empty((len(keys), *image.shape), dtype=torch.uint8)
                labels = torch.empty((len(keys), *label.shape), dtype=torch.uint8)
            images.numpy()[place] = image
            labels.numpy()[place] = label
            draws.numpy()[place] = rng.random(4, np.float32)
        names = [self.dataset.name_of(index) for _, index in keys]
        return Batch(images.permute(0, 3, 1, 2), labels, names, draws)


_FEWER = "fewer --workers need less"


def _shared(batch: Batch) -> Batch:
    """In a worker: the batch in shared memory. Otherwise the queue would allocate it in a thread,
    where an error is lost and the trainer waits forever."""
    if torch_data.get_worker_info() is None:
        return batch
    try:
        for tensor in (batch.images, batch.labels, batch.draws):
            _make_room(tensor.untyped_storage().nbytes())
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"a loader process finds no shared memory for its batch ({error}); make /dev/shm "
            f"larger (docker run --shm-size), or --workers 0; {_FEWER}"
        ) from error
    return batch


def _make_room(size: int) -> None:
    """Raise an OSError if /dev/shm is full: a process that writes there then is killed."""
    folder = "/dev/shm"
    if os.path.isdir(folder) and hasattr(os, "statvfs"):
        found = os.statvfs(folder)
        free = found.f_bavail * found.f_frsize
        if found.f_blocks and free < size:
            raise OSError(f"{size / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free in {folder}")


def _end_of_worker(error: Exception, _: Any) -> None:
    """The trainer would wait forever for a batch that cannot be sent; it does notice a process that
    ends."""
    os.write(2, f"error: a loader process cannot send its batch: {error}\n".encode())
    os._exit(1)


def worker_failure(error: BaseException) -> str | None:
    """The sentence for torch's error about a loader process that died, None for another error.

    torch raises it wherever the trainer happens to be.
    """
    text = str(error)
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed|exited|)", text)
    if found is None:
        return None
    what = "was killed" if found[2] == "is killed" else "ended unexpectedly"
    cause = "memory was"
    if "shared memory" in text or "Bus error" in text:
        cause = "shared memory (/dev/shm) was"
    return f"loader process {found[1]} {what}, perhaps since {cause} exhausted; {_FEWER}"


def _taken(items: Iterator[Item | _Failure]) -> Iterator[Item]:
    """What workers send; DataError with its sentence for an error of theirs, or for their death."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            sentence = worker_failure(error)
            if sentence is None:
                raise
            raise DataError(sentence) from error
        if isinstance(item, _Failure):
            raise DataError(item.message)
        yield item


def _as_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    queue: Any = multiprocessing.queues.Queue
    queue._on_queue_feeder_error = staticmethod(_end_of_worker)
    # A scheduler or a terminal signals the whole process group. Only the trainer reacts: it saves
    # and then ends its workers; a worker that died first would look like a crash.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _end_workers(stream: Any) -> None:
    """End the processes of a torch loader's iterator, if it has any.

    At exit multiprocessing would send them a SIGTERM, which they ignore, and wait.
    """
    shutdown = getattr(stream, "_shutdown_workers", None)
    if shutdown is None:
        return
    workers = getattr(stream, "_workers", [])
    shutdown()
    for worker in workers:
        if worker.is_alive():
            worker.kill()  # it ignores SIGTERM, see `_start_worker`
            worker.join()


def _close(loader: weakref.ref[TrainLoader]) -> None:
    living = loader()
    if living is not None:
        living.close()


class TrainLoader:
    """Shuffled, augmented batches, with workers that live as long as the loader does.

    Args:
        dataset: what to draw from.
        augment: called with (image, label, generator), for example an `Augment`. All results have
            one size.
        batch_size: images of one optimiser step over all ranks and accumulation steps.
        seed: not negative.
        workers: processes that prepare batches for this rank; 0 prepares them in the caller's
            process.
        rank, world_size: this process and the number of processes.
        accumulation: micro-batches of one optimiser step.
        pin_memory: put batches into page-locked memory, for copies to a GPU.
        context: how worker processes start: "fork", "spawn", "forkserver", or None for the
            platform's default.

    Raises ValueError where the batch cannot be divided evenly, and DataError where the data set has
    fewer images than one batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        augment: Augmentation,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        pin_memory: bool = False,
        context: str | None = None,
    ) -> None:
        if min(batch_size, world_size, accumulation) < 1:
            raise ValueError(
                f"batch_size {batch_size}, world_size {world_size} and accumulation {accumulation} "
                "must be at least 1"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be within 0..{world_size - 1}, got {rank}")
        if seed < 0:
            raise ValueError(f"seed {seed} must not be negative")
        _check_workers(workers)
        if batch_size % (world_size * accumulation):
            raise ValueError(
                f"batch_size {batch_size} cannot be divided evenly over {world_size} processes x "
                f"{accumulation} accumulation steps = {world_size * accumulation}"
            )
        self._steps = len(dataset) // batch_size
        if self._steps == 0:
            raise DataError(
                f"the training set has {len(dataset)} images, fewer than one batch of "
                f"{batch_size}; lower batch_size or add images"
            )
        self._accumulation = accumulation
        shape = (accumulation, world_size, batch_size // (world_size * accumulation))
        self._keys = _Keys(len(dataset), self._steps, shape, rank, seed)
        self._loader = torch_data.DataLoader(
            _AugmentedBatches(dataset, augment, seed),
            batch_sampler=self._keys,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin_memory and torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            multiprocessing_context=context if workers > 0 else None,
            generator=torch.Generator(),  # else every iterator draws from the network's generator
        )
        self._stream: Iterator[Batch | _Failure] | None = None
        self._batches: Iterator[Batch] = iter(())
        self._next: Key | None = None  # what the stream yields next, if it is whole
        atexit.register(_close, weakref.ref(self))

    def __len__(self) -> int:
        """Optimiser steps of an epoch; the last partial batch is dropped."""
        return self._steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yield the `accumulation` micro-batches of each optimiser step from `start_step` on.

        Consecutive epochs are one stream: the workers prepare the next one while this one ends. A
        data set's error is raised here as DataError with its sentence.
        """
        if epoch < 0 or not 0 <= start_step <= self._steps:
            raise ValueError(
                f"epoch {epoch} step {start_step} does not exist; "
                f"an epoch has steps 0..{self._steps - 1}"
            )
        return self._epoch(epoch, start_step)

    def _epoch(self, epoch: int, start_step: int) -> Iterator[list[Batch]]:
        for step in range(start_step, self._steps):
            if self._stream is None or self._next != (epoch, step):
                self._keys.start = (epoch, step)
                self._stream = iter(self._loader)
                self._batches = _taken(self._stream)
            self._next = None
            micro = [next(self._batches) for _ in range(self._accumulation)]
            last = step + 1 == self._steps
            self._next = (epoch + 1, 0) if last else (epoch, step + 1)
            yield micro

    def close(self) -> None:
        """End the workers now rather than when the loader is garbage-collected."""
        _end_workers(self._stream)
        self._stream = self._next = None
        self._batches = iter(())
        self._loader._iterator = None


def _check_workers(workers: int) -> None:
    if workers < 0:
        raise ValueError(f"workers {workers} must not be negative")
    if workers > MAX_WORKERS:
        raise ValueError(f"workers {workers} must be at most {MAX_WORKERS}")


class _EvalSamples(torch_data.Dataset[Any]):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Sample] | _Failure:
        try:
            return index, self.dataset[index]
        except DataError as error:
            return _Failure(str(error))


def eval_samples(
    dataset: Dataset, rank: int = 0, world_size: int = 1, workers: int = 0
) -> Iterator[tuple[int, Sample]]:
    """Yield (index, decoded sample) of this rank's images; each image comes once over all ranks.

    `workers` processes read ahead. A data set's error is raised as DataError with its sentence.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be within 0..{world_size - 1}, got {rank}")
    _check_workers(workers)
    loader = torch_data.DataLoader(
        _EvalSamples(dataset),
        sampler=range(rank, len(dataset), world_size),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    stream = iter(loader)
    end = partial(_end_workers, stream)
    atexit.register(end)  # who asks for a few samples may keep this generator
    try:
        yield from _taken(stream)
    finally:
        end()
        atexit.unregister(end)
