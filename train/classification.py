"""Training of the CIFAR-10 networks (paper, section 3.5); all images live on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encnet_triton.data import default_palette
from encnet_triton.data.cifar10 import CLASSES, COUNT, MEAN, STD, load_cifar10
from encnet_triton.data.device_images import DeviceImages, Epoch
from encnet_triton.data.normalisation import Normalise
from encnet_triton.models import CifarNet
from encnet_triton.scoring.segmentation import PassOn
from encnet_triton.train.config import Config, ConfigError
from encnet_triton.train.curves import draw_errors
from encnet_triton.train.distributed import World, all_reduce_sum
from encnet_triton.train.log import Log
from encnet_triton.train.optim import make_optimizer
from encnet_triton.train.run_state import Progress
from encnet_triton.train.task import Task, initial
from encnet_triton.weights.checkpoint import ModelInfo

TEST_BATCH = 500
_READ = {
    "model", "width", "block", "dataset", "data",
    "optimizer", "lr", "momentum", "betas", "weight_decay", "decay_norm_bias", "clip_norm", "ema",
    "schedule", "power", "eta_min", "warmup_steps", "epochs", "batch_size", "label_smoothing",
    "name", "runs", "seed", "device", "amp", "compile", "sync_bn", "resume", "stop_at",
    "save_every", "save_epochs", "timeout", "take_over", "logger", "report",
}  # fmt: skip


class Samples(NamedTuple):
    """A rank's samples of a step: ``start`` to ``stop`` in an epoch's order."""

    epoch: Epoch
    start: int
    stop: int


class Classification(Task[float]):
    """A network that classifies small images; its score is the test error.

    Raises:
        ConfigError: the batch cannot be divided among the processes.
        DataError: the data are not there, or damaged.
    """

    datasets = ("cifar10",)
    fixed: ClassVar[dict[str, Any]] = {
        "crop": (32, 32),
        "base_size": None,
        "scale_by": "image",
        "scale": (1.0, 1.0),
        "rotation": 0.0,
        "flip": 0.5,
        "accumulation": 1,
    }
    terms = ("loss", "train_error")
    val_every = 1

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world)
        size = config.optim.batch_size
        self.refuse_batch(config, world)
        root, seed = data_root(config), config.run.seed
        self.train_set = DeviceImages(load_cifar10(root, "train"), world.device, seed)
        self.test_set = DeviceImages(load_cifar10(root, "test"), world.device, seed)
        self.images = len(self.train_set)
        self.training_set = {"images": self.images}
        self.steps_per_epoch = self.images // size
        if not self.steps_per_epoch:
            raise ConfigError(f"batch_size = {size} is more than {self.images} images")
        self.model = initial(config, world, lambda: CifarNet(**config.model.options()))
        self.optimizer = make_optimizer(self.model, config.optim)
        self.info = classifier_info(self.model, root)
        self._standardise = Normalise(MEAN, STD, world.device)

    @classmethod
    def reads(cls, config: Config) -> frozenset[str]:
        """The codebook's fields belong to the network that has one."""
        codebook = {"num_codewords", "shake_scale"}
        of_network = codebook if config.model.model == "cifar_encnet" else set()
        return frozenset(_READ | of_network) - cls.unread(config).keys()

    @classmethod
    def outlook(cls, config: Config, world: World) -> Iterator[str]:
        """The data need not exist."""
        count = sum(p.numel() for p in CifarNet(**config.model.options()).parameters())
        images = COUNT["train"]
        if config.data.data is not None:
            images = len(load_cifar10(config.data.data, "train").labels)
        optim = config.optim
        steps = images // optim.batch_size * optim.epochs
        yield f"{config.run.name}: {config.model.model}, {count:,} parameters"
        yield (
            f"  cifar10: {images:,} images, {steps:,} steps, {optim.epochs} epochs in batches "
            f"of {optim.batch_size}, lr {optim.lr:g}, {optim.schedule}"
        )

    def steps(self, epoch: int, start: int) -> Iterator[Samples]:
        """This rank's share of each step."""
        order = self.train_set.epoch(epoch)
        part = self.config.optim.batch_size // self.world.size
        for step in range(start, self.steps_per_epoch):
            first = (step * self.world.size + self.world.rank) * part
            yield Samples(order, first, first + part)

    def parts(self, step: Samples) -> Sequence[tuple[Tensor, Tensor]]:
        """One: the augmented images and their labels."""
        return [step.epoch.batch(step.start, step.stop)]

    def compute(self, network: nn.Module, part: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        """Mean cross-entropy of this rank's images, and the share that is classified wrongly."""
        images, labels = part
        logits = self._logits(network, images)
        smoothing = self.config.optim.label_smoothing
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        return loss, (logits.detach().argmax(1) != labels).to(loss.dtype).mean()

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        with self.autocast():
            logits: Tensor = network(self._standardise(images))
        return logits

    def names(self, step: Samples) -> list[str]:
        """The images have no names."""
        return [f"of places {step.start} to {step.stop - 1} in the epoch's order"]

    def records_at(self, step: int, last: int) -> bool:
        """At the end of each epoch: the curves of figure 7 are made of these."""
        return step % self.steps_per_epoch == 0

    @torch.no_grad()
    def warm_up(self) -> None:
        """One batch."""
        self._logits(self.evaluated.eval(), self.test_set.plain(0, TEST_BATCH)[0])

    @torch.no_grad()
    def validate(self, watch: PassOn) -> float:
        """Share of the test images that are classified wrongly."""
        network = self.evaluated.eval()
        wrong = torch.zeros((), device=self.world.device, dtype=torch.float64)
        stride = TEST_BATCH * self.world.size
        starts = range(TEST_BATCH * self.world.rank, len(self.test_set), stride)
        for start in watch(starts, len(starts)):
            images, labels = self.test_set.plain(start, start + TEST_BATCH)
            wrong += (self._logits(network, images).argmax(1) != labels).sum()
        return float(all_reduce_sum(wrong)) / len(self.test_set)

    def note_best(self, score: float, progress: Progress) -> dict[str, float] | None:
        """The lowest error."""
        if score >= progress.best_error:
            return None
        progress.best_error = score
        return {"error": score}

    def tell(self, score: float, record: dict[str, Any], log: Log) -> None:
        """One line."""
        log.write({"kind": "val", **record, "error": score})
        log.say(f"epoch {record['epoch']}/{self.config.optim.epochs}  test error {score:.2%}")

    def result(self, score: float, progress: Progress) -> dict[str, Any]:
        """The error after the last epoch, and the lowest, which was chosen on the test set."""
        return {
            "step": progress.step,
            "error": score,
            "best_error": progress.best_error,
            "best_epoch": progress.best_step // self.steps_per_epoch,
        }

    def conclude(self, score: float, progress: Progress, folder: Path, log: Log) -> None:
        """Both errors, and the curves."""
        draw_errors({self.config.run.name: [folder]}, folder / "curves.png")
        log.say(
            f"test error after the last epoch {score:.2%} (lowest {progress.best_error:.2%} after "
            f"epoch {progress.best_step // self.steps_per_epoch}, chosen on the test set)"
        )


def data_root(config: Config) -> str:
    """The folder of CIFAR-10; a ConfigError without one."""
    if config.data.data is None:
        raise ConfigError("cifar10 reads files: give its folder with --data")
    return config.data.data


def classifier_info(model: nn.Module, root: str) -> ModelInfo:
    """Metadata stored with the weights; ``root`` is the folder of CIFAR-10."""
    return ModelInfo(
        options=dict(model.options),  # type: ignore[arg-type]
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
