"""Training of the CIFAR-10 networks (paper, section 3.5); all images live on the device."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from encnet_triton.data import default_palette
from encnet_triton.data.cifar10 import CLASSES, MEAN, STD, load_cifar10
from encnet_triton.data.device_images import DeviceImages
from encnet_triton.data.normalisation import Normalise
from encnet_triton.models import CifarNet
from encnet_triton.nn import set_sync_group
from encnet_triton.train import checkpoint, optim
from encnet_triton.train.checkpoint import Progress
from encnet_triton.train.config import Config, ConfigError
from encnet_triton.train.distributed import (
    World,
    all_reduce_sum,
    check_same_weights,
    data_parallel,
)
from encnet_triton.train.log import Log
from encnet_triton.train.loop import TrainingError
from encnet_triton.train.meter import peak_memory
from encnet_triton.train.setup import autocast_dtype, compile_obstacle
from encnet_triton.train.signals import StopRequest, agree
from encnet_triton.weights.checkpoint import ModelInfo, save_model

TEST_BATCH = 500


@dataclass(frozen=True)
class Result:
    """Test error of the last epoch, and the lowest of all, which was chosen on the test set."""

    error: float
    best_error: float
    best_epoch: int


class Classifier:
    """One run of a CIFAR-10 network.

    Args:
        config: its configuration; ``data`` is the folder of CIFAR-10.
        world: this process and its device.
        folder: of the run; exists.
        log: where records go.

    Raises:
        ConfigError: the batch cannot be divided among the processes.
        DataError: the data are not there, or damaged.
    """

    def __init__(self, config: Config, world: World, folder: Path, log: Log) -> None:
        size = config.optim.batch_size
        if config.optim.accumulation != 1 or size % world.size:
            raise ConfigError(
                f"batch_size = {size} must be divisible by the number of processes, {world.size}, "
                "and accumulation must be 1 for CIFAR-10 networks"
            )
        self.config, self.world, self.folder, self.log = config, world, folder, log
        self.device = world.device
        root = data_root(config)
        seed = config.run.seed
        self.train_set = DeviceImages(load_cifar10(root, "train"), self.device, seed)
        self.test_set = DeviceImages(load_cifar10(root, "test"), self.device, seed)
        self.steps_per_epoch = len(self.train_set) // size
        if not self.steps_per_epoch:
            raise ConfigError(f"batch_size = {size} is more than {len(self.train_set)} images")
        self.steps = self.steps_per_epoch * config.optim.epochs
        self.model = make_classifier(config, world)
        self.optimizer = optim.make_optimizer(self.model, config.optim)
        self.info = classifier_info(self.model, root)
        self.autocast = autocast_dtype(config, self.device)
        self.progress = Progress()
        self._stop = StopRequest()
        self._stopping = False  # agreed by all ranks
        self._standardise = Normalise(MEAN, STD, self.device)

    def restore(self) -> bool:
        """Load ``last.safetensors`` if it is there; returns whether it was.

        Raises:
            WorldError: some ranks see the file and others do not.
        """
        path = self.folder / checkpoint.LAST
        if not checkpoint.on_all_ranks(path):
            self.log.rewind(0)
            return False
        self.progress = checkpoint.load(path, self.world, self.model, self.optimizer, self.config)
        self.log.rewind(self.progress.step)
        return True

    def run(self) -> Result | None:
        """Train to the end, to ``stop_at``, or to a signal; the result if the run is complete."""
        check_same_weights(self.model)
        network: nn.Module = self.model
        if self.config.run.compile:
            obstacle = compile_obstacle(self.device)
            if obstacle is None:
                self.model.compile()
            else:
                self.log.say(obstacle)
        if self.world.size > 1:
            network = data_parallel(
                self.model, self.device, sync_buffers=not self.config.run.sync_bn, accumulation=1
            )
        last = min(self.steps, self.config.run.stop_at or self.steps)
        error = None
        with self._stop:
            while self.progress.step < last and not self._stopping:
                error = self._epoch(network, last)
        if self.progress.step < self.steps:
            self.log.say(
                f"stopped at step {self.progress.step} of {self.steps}, saved in {self.folder}; "
                "go on with --resume"
            )
            return None
        if error is None:
            error = self.test()
        best = self.progress
        return Result(error, best.best_error, best.best_step // self.steps_per_epoch)

    def _epoch(self, network: nn.Module, last: int) -> float | None:
        """Steps to the end of the epoch, to ``last``, or to a request to stop; then a test."""
        number, first = divmod(self.progress.step, self.steps_per_epoch)
        epoch = self.train_set.epoch(number)
        sums = torch.zeros(3, device=self.device)  # loss, wrong, images
        start, done = time.perf_counter(), 0
        for index in range(first, self.steps_per_epoch):
            sums += self._step(network, epoch.batch(*self._share(index)))
            done += 1
            if (self._stopping or self.progress.step == last) and index < self.steps_per_epoch - 1:
                self._save()
                return None
        loss, wrong, images = all_reduce_sum(sums).tolist()
        if not loss == loss:  # not a number
            raise TrainingError(f"the loss is not finite in epoch {number + 1}; try a lower lr")
        seconds = time.perf_counter() - start
        record = {
            "step": self.progress.step,
            "epoch": number + 1,
            "lr": self._rate(self.progress.step - 1),
            "loss": loss / images,
            "train_error": wrong / images,
            "images_per_second": done * self.config.optim.batch_size / seconds,
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        self.log.write({"kind": "train", **record})
        error = self.test()
        self._record_test(error, record)
        self._save()
        return error

    def _step(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One optimiser step; returns (summed loss, wrong predictions, images) of this rank."""
        self.model.train()
        images, labels = batch
        optim.set_rate(self.optimizer, self._rate(self.progress.step))
        logits = self._logits(network, images)
        loss = F.cross_entropy(
            logits.float(), labels, label_smoothing=self.config.optim.label_smoothing
        )
        self.optimizer.zero_grad(set_to_none=True)
        read = agree(loss.detach(), self._stop.requested)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        _, self._stopping = read()
        self.progress.step += 1
        wrong = (logits.detach().argmax(1) != labels).sum()
        count = torch.full_like(loss, len(labels))
        return torch.stack([loss.detach() * len(labels), wrong.to(loss.dtype), count])

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        x = self._standardise(images)
        kind, dtype = self.device.type, self.autocast
        with torch.autocast(kind, dtype=dtype) if dtype else nullcontext():
            logits: Tensor = network(x)
        return logits

    def _rate(self, step: int) -> float:
        return optim.rate_at(step, self.steps, self.config.optim)

    def _share(self, index: int) -> tuple[int, int]:
        """This rank's part of the samples of a step."""
        size = self.config.optim.batch_size
        part = size // self.world.size
        start = index * size + self.world.rank * part
        return start, start + part

    @torch.no_grad()
    def test(self) -> float:
        """Share of the test images that are named wrongly; the ranks share them."""
        self.model.eval()
        wrong = torch.zeros((), device=self.device, dtype=torch.float64)
        stride = TEST_BATCH * self.world.size
        for start in range(TEST_BATCH * self.world.rank, len(self.test_set), stride):
            images, labels = self.test_set.plain(start, start + TEST_BATCH)
            wrong += (self._logits(self.model, images).argmax(1) != labels).sum()
        return float(all_reduce_sum(wrong)) / len(self.test_set)

    def _record_test(self, error: float, record: dict[str, float]) -> None:
        progress, epoch = self.progress, int(record["epoch"])
        if error < progress.best_error:
            progress.best_error, progress.best_step = error, progress.step
            if self.world.main:
                path = self.folder / checkpoint.BEST
                save_model(path, self.model, self.info, step=progress.step, error=error)
        self.log.write({"kind": "val", "step": progress.step, "epoch": epoch, "error": error})
        self.log.say(
            f"epoch {epoch}/{self.config.optim.epochs}  loss {record['loss']:.3f}  "
            f"train error {record['train_error']:.2%}  test error {error:.2%}  "
            f"{record['images_per_second']:.0f} img/s"
        )

    def _save(self) -> None:
        checkpoint.save(
            self.folder, self.world, self.model, self.optimizer, self.info, self.progress,
            self.config,
        )  # fmt: skip


def data_root(config: Config) -> str:
    """The folder of CIFAR-10; a ConfigError without one."""
    if config.data.data is None:
        raise ConfigError("cifar10 reads files: give its folder with --data")
    return config.data.data


def make_classifier(config: Config, world: World) -> CifarNet:
    """The network with its initial weights, the same on every rank."""
    torch.manual_seed(config.run.seed)
    model = CifarNet(**config.model.options())
    model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.run.sync_bn and world.size > 1:
        set_sync_group(model, dist.group.WORLD)
    # From here on the smoothing factors are drawn by each rank for itself.
    torch.manual_seed((config.run.seed << 16) + world.rank + 1)
    return model


def classifier_info(model: CifarNet, root: str) -> ModelInfo:
    """What is stored beside the weights; ``root`` is the folder of CIFAR-10."""
    return ModelInfo(
        options=dict(model.options),
        classes=list(CLASSES),
        palette=default_palette(len(CLASSES)).tolist(),
        mean=list(MEAN),
        std=list(STD),
        crop=[32, 32],
        data={
            "name": "cifar10",
            "root": str(Path(root).resolve()),
            "split": "test",
            "options": {},
        },
    )
