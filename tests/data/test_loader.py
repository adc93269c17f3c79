"""The loaders: the same samples for any number of workers, ranks and accumulation steps."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from encnet_triton.data import (
    Augment,
    Batch,
    DataError,
    Sample,
    Scenes,
    TrainLoader,
    default_palette,
    eval_samples,
)
from encnet_triton.data import loader as loader_module


class Numbers:
    """Images that carry their index; one of them may be broken."""

    classes = ("even", "odd")
    palette = default_palette(2)
    ignore_index = 255
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, length=10, broken=None):
        self.length = length
        self.broken = broken

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == self.broken:
            raise DataError(f"number {index} is broken")
        label = np.full((24, 32), index % 2, np.uint8)
        pixels = np.random.default_rng(index).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        return Sample(Image.fromarray(pixels), label)

    def open(self, index):
        return self[index]

    def name_of(self, index):
        return str(index)


class Faulty(Numbers):
    def __getitem__(self, index):
        raise ZeroDivisionError("a mistake in the program")


AUGMENT = Augment((16, 20), scale_by="image")


def make(dataset=None, **options):
    options = {"batch_size": 4, "seed": 3, "workers": 0} | options
    dataset = Numbers() if dataset is None else dataset
    return TrainLoader(dataset, AUGMENT, **options)


def samples(steps):
    """Per optimiser step: name -> bytes of image, label and draws."""
    return [
        {
            name: b"".join(
                t.contiguous().numpy().tobytes()
                for t in (batch.images[i], batch.labels[i], batch.draws[i])
            )
            for batch in micro
            for i, name in enumerate(batch.names)
        }
        for micro in steps
    ]


def test_batches():
    loader = make()
    assert len(loader) == 2  # the last two of ten images are dropped
    steps = list(loader.epoch(0))
    assert [len(micro) for micro in steps] == [1, 1]
    batch = steps[0][0]
    assert isinstance(batch, Batch)
    assert batch.images.shape == (4, 3, 16, 20)
    assert batch.labels.shape == (4, 16, 20)
    assert batch.images.dtype == batch.labels.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.draws.shape == (4, 4) and batch.draws.dtype == torch.float32
    assert len(batch.names) == 4


def test_a_batch_holds_the_augmented_samples_of_its_names():
    dataset = Numbers()
    (batch,) = next(make(dataset).epoch(5))
    for i, name in enumerate(batch.names):
        # Any of the loader's streams gives a label that is the image's own or ignored.
        assert set(batch.labels[i].unique().tolist()) <= {int(name) % 2, 255}


def test_epochs_are_shuffled_differently_and_use_each_image_at_most_once():
    loader = make()
    orders = [[n for micro in loader.epoch(e) for b in micro for n in b.names] for e in range(3)]
    for order in orders:
        assert len(set(order)) == len(order) == 8
    assert len(set(map(tuple, orders))) == 3
    seen = {name for epoch in range(20) for step in samples(loader.epoch(epoch)) for name in step}
    assert seen == set(map(str, range(10)))


def test_a_sample_is_augmented_differently_in_each_epoch_and_by_each_seed():
    first, second = ({k: v for s in samples(make().epoch(e)) for k, v in s.items()} for e in (0, 1))
    shared = first.keys() & second.keys()
    assert shared
    assert all(first[name] != second[name] for name in shared)
    other = {k: v for s in samples(make(seed=4).epoch(0)) for k, v in s.items()}
    assert all(first[name] != other[name] for name in first.keys() & other.keys())


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_samples(workers):
    expected = [samples(make().epoch(epoch)) for epoch in range(3)]
    loader = make(workers=workers)
    assert [samples(loader.epoch(epoch)) for epoch in range(3)] == expected
    loader.close()


@pytest.mark.parametrize(
    ("world_size", "accumulation"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)], ids=str
)
def test_ranks_and_accumulation_do_not_change_a_step(world_size, accumulation):
    expected = samples(make().epoch(1))
    ranks = [
        list(make(world_size=world_size, rank=rank, accumulation=accumulation).epoch(1))
        for rank in range(world_size)
    ]
    for steps in ranks:
        assert [len(micro) for micro in steps] == [accumulation] * 2
        sizes = {len(batch.names) for micro in steps for batch in micro}
        assert sizes == {4 // (world_size * accumulation)}
    for step, want in enumerate(expected):
        parts = [samples(steps)[step] for steps in ranks]
        assert sum(map(len, parts)) == 4  # nothing twice
        assert {name: data for part in parts for name, data in part.items()} == want


@pytest.mark.parametrize("workers", [0, 2])
def test_start_step_resumes_in_the_middle_of_an_epoch(workers):
    dataset = Numbers(21)
    whole = samples(make(dataset).epoch(2))
    assert len(whole) == 5
    loader = make(dataset, workers=workers)
    assert samples(loader.epoch(2, start_step=3)) == whole[3:]
    assert samples(loader.epoch(2, start_step=5)) == []
    assert samples(loader.epoch(3)) == samples(make(dataset).epoch(3))
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_epoch_does_not_leak_into_the_next(workers):
    loader = make(Numbers(21), workers=workers, accumulation=2)
    steps = loader.epoch(0)
    first = samples([next(steps)])
    steps.close()
    assert samples(loader.epoch(1)) == samples(make(Numbers(21)).epoch(1))
    assert samples(loader.epoch(0))[:1] == first
    loader.close()


def test_workers_live_on_across_epochs():
    loader = make(workers=1)
    list(loader.epoch(0))
    stream = loader._stream
    list(loader.epoch(1))
    assert loader._stream is stream  # nothing was drained or started again
    (worker,) = stream._workers
    list(loader.epoch(7))
    assert loader._stream._workers == [worker]
    assert worker.is_alive()
    loader.close()
    assert not worker.is_alive()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signals on this system")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_to_the_process_group_leave_workers_alive(name):
    loader = make(workers=1)
    epoch = loader.epoch(0)
    next(epoch)
    (worker,) = loader._stream._workers
    os.kill(worker.pid, getattr(signal, name))
    time.sleep(0.05)
    assert samples(epoch) == samples(make().epoch(0))[1:]
    assert samples(loader.epoch(1)) == samples(make().epoch(1))
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_error_reaches_the_user_as_its_sentence(workers):
    loader = make(Numbers(8, broken=6), workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader.epoch(0))
    assert str(caught.value) == "number 6 is broken"
    loader.close()


def test_a_mistake_in_a_worker_keeps_its_traceback():
    loader = make(Faulty(), workers=1)
    with pytest.raises(ZeroDivisionError, match="Original Traceback"):
        next(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"batch_size": 10, "world_size": 2, "accumulation": 3},
            "batch_size 10 cannot be divided evenly over 2 processes x 3 accumulation steps = 6",
            id="batch not divisible",
        ),
        pytest.param(
            {"batch_size": 11},
            "the training set has 10 images, fewer than one batch of 11",
            id="fewer images than a batch",
        ),
        pytest.param({"batch_size": 0}, "batch_size 0.* must be at least 1", id="no batch"),
        pytest.param({"rank": 2, "world_size": 2}, r"rank must be within 0\.\.1, got 2", id="rank"),
        pytest.param({"workers": -1}, "workers -1 must not be negative", id="workers"),
        pytest.param({"workers": 513}, "workers 513 must be at most 512", id="many workers"),
        pytest.param({"seed": -1}, "seed -1 .*must not be negative", id="seed"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("position", [(-1, 0), (0, 3), (0, -1)], ids=str)
def test_steps_that_do_not_exist(position):
    with pytest.raises(ValueError, match=r"does not exist; an epoch has steps 0\.\.1"):
        make().epoch(*position)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3, 12])
def test_evaluation_sees_each_image_once_over_all_ranks(world_size, workers):
    dataset = Numbers()
    ranks = range(world_size if workers == 0 else 1)
    seen = [list(eval_samples(dataset, rank, world_size, workers)) for rank in ranks]
    if workers == 0:
        assert sorted(index for part in seen for index, _ in part) == list(range(10))
    for rank, part in enumerate(seen):
        assert [index for index, _ in part] == list(range(rank, 10, world_size))
        for index, sample in part:
            expected = dataset[index]
            assert sample.image.tobytes() == expected.image.tobytes()
            assert sample.image.mode == "RGB"
            np.testing.assert_array_equal(sample.label, expected.label)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_errors(workers):
    with pytest.raises(DataError) as caught:
        list(eval_samples(Numbers(broken=3), workers=workers))
    assert str(caught.value) == "number 3 is broken"
    with pytest.raises(ValueError, match=r"rank must be within 0\.\.0, got 1"):
        list(eval_samples(Numbers(), rank=1))


def test_data_sets_and_augmentation_travel_to_spawned_workers():
    dataset, augment = pickle.loads(pickle.dumps((Scenes("val", size=4), AUGMENT)))
    assert dataset[3].image.tobytes() == Scenes("val")[3].image.tobytes()
    assert vars(augment) == vars(AUGMENT)


@pytest.mark.slow
def test_spawned_workers_give_the_same_samples():
    options = {"batch_size": 2, "seed": 1}
    plain = TrainLoader(Scenes("train", size=4), AUGMENT, workers=0, **options)
    spawned = TrainLoader(Scenes("train", size=4), AUGMENT, workers=1, context="spawn", **options)
    assert samples(spawned.epoch(0)) == samples(plain.epoch(0))
    spawned.close()


class Killed(Numbers):
    """A data set whose reader is killed, as the system does where memory is exhausted."""

    def open(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


class Unsendable(Numbers):
    def name_of(self, index):
        return lambda: index  # cannot be pickled


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [(Killed, "loader process [0-9]+ .*since memory"), (Unsendable, "ended unexpectedly")],
)
def test_a_worker_that_dies_or_cannot_send_is_a_sentence(dataset, sentence):
    """The loader would wait for the batch forever."""
    loader = make(dataset(), workers=1)
    with pytest.raises(DataError, match=sentence):
        next(loader.epoch(0))
    loader.close()


def test_shared_memory_that_is_exhausted_is_a_sentence(monkeypatch):
    def none_left(size):
        raise OSError("1 MiB needed, 0 MiB free")

    monkeypatch.setattr(loader_module, "_make_room", none_left)
    loader = make(workers=1)
    with pytest.raises(DataError, match="no shared memory .*1 MiB needed, .*--shm-size"):
        next(loader.epoch(0))
    loader.close()
    next(make(workers=0).epoch(0))


def test_a_worker_that_does_not_end_is_killed():
    """It heeds no SIGTERM, and would be waited for when this process ends."""
    busy = multiprocessing.Event()

    class Slow(Numbers):
        def open(self, index):
            busy.set()
            time.sleep(600)

    loader = make(Slow(), workers=1)
    loader._stream = iter(loader._loader)
    (worker,) = loader._stream._workers
    worker.join = lambda timeout=None: None  # torch waits for five seconds
    assert busy.wait(60)
    loader.close()
    type(worker).join(worker, 60)
    assert worker.exitcode == -signal.SIGKILL


KEPT = """
from encnet_triton.data import create_dataset
from encnet_triton.data.loader import eval_samples
samples = eval_samples(create_dataset("scenes", "val", size=4), workers=2)
print(next(samples)[0])
"""


def test_samples_that_are_kept_do_not_keep_the_process():
    """The workers ignore the SIGTERM that multiprocessing sends them at exit."""
    command = [sys.executable, "-c", KEPT]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0\n", "")
