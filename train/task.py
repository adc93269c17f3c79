"""The trainer's view of a task: what it builds, computes and measures, the fields it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from encnet_triton.inference.precision import fast_dtype
from encnet_triton.nn import set_sync_group
from encnet_triton.report import Html
from encnet_triton.scoring.segmentation import PassOn
from encnet_triton.train.average import Average
from encnet_triton.train.config import Config, ConfigError, require
from encnet_triton.train.distributed import World, sync_group
from encnet_triton.train.log import Log
from encnet_triton.train.run_state import Progress
from encnet_triton.weights.checkpoint import ModelInfo

Score = TypeVar("Score")
"""What a validation finds."""


class Task(ABC, Generic[Score]):
    """One kind of training, built from a configuration on ``world.device``.

    Attributes:
        datasets: names of the data sets it can be trained on.
        fixed: fields that it does not read, each with the only value it may have, which
            describes what the task does.
        terms: names of what `compute` returns; the first is the loss.
        model, optimizer: before any checkpoint is loaded into them.
        average: of the weights, if the run keeps one.
        info: what is stored beside the weights.
        images: how many there are to train on.
        steps_per_epoch: optimiser steps.
        training_set: what a resumed run must find again: how many images, and which.
        val_every: epochs between two validations; 0: after the last epoch only.
    """

    datasets: ClassVar[tuple[str, ...]]
    fixed: ClassVar[Mapping[str, Any]] = {}
    terms: ClassVar[tuple[str, ...]]

    model: nn.Module
    optimizer: torch.optim.Optimizer
    info: ModelInfo
    images: int
    steps_per_epoch: int
    training_set: Mapping[str, Any]
    val_every: int
    average: Average | None = None

    @property
    def evaluated(self) -> nn.Module:
        """What is validated and used: the average of the weights where there is one."""
        return self.model if self.average is None else self.average.model

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.dtype = autocast_dtype(config, world.device)

    @classmethod
    @abstractmethod
    def reads(cls, config: Config) -> frozenset[str]:
        """Names of the fields that change something for this configuration's network."""

    @classmethod
    def unread(cls, config: Config) -> dict[str, str]:
        """Fields that change nothing beside the values of others, and what they need."""
        return config.optim.unread()

    @classmethod
    def refuse_unread(cls, config: Config, given: Iterable[str]) -> None:
        """Refuse a field that was given but would not be read.

        Raises:
            ConfigError: names the fields.
        """
        given, reads = set(given), cls.reads(config)
        for name, where in cls.unread(config).items():
            if name in given and where.split()[0] in reads:
                raise ConfigError(
                    f"the training of {config.model.model} reads {name} only with {where}; "
                    "leave it out"
                )
        unread = sorted(given - reads)
        free = [name for name in unread if name not in cls.fixed]
        if free:
            raise ConfigError(
                f"the training of {config.model.model} does not read {', '.join(free)}; "
                f"leave {'it' if len(free) == 1 else 'them'} out"
            )
        for name in unread:
            value, kept = config.value(name), cls.fixed[name]
            require(value == kept, name, value, f"{kept} for {config.model.model}")

    @classmethod
    @abstractmethod
    def outlook(cls, config: Config, world: World) -> Iterator[str]:
        """Lines about a run that is not started, for ``--dry-run``."""

    @classmethod
    def refuse_batch(cls, config: Config, world: World) -> None:
        """Refuse a batch that the processes cannot share.

        Raises:
            ConfigError: says how many there are.
        """
        size, shares = config.optim.batch_size, world.size * config.optim.accumulation
        if size % shares:
            raise ConfigError(
                f"batch_size = {size} cannot be divided evenly over {world.size} processes x "
                f"{config.optim.accumulation} accumulation steps = {shares}"
            )

    @abstractmethod
    def steps(self, epoch: int, start: int) -> Iterator[Any]:
        """What each step of an epoch takes, from step ``start`` on."""

    @abstractmethod
    def parts(self, step: Any) -> Sequence[Any]:
        """The micro-batches of a step, on the device; every rank calls it."""

    @abstractmethod
    def compute(self, network: nn.Module, part: Any) -> Sequence[Tensor]:
        """The `terms` of a micro-batch, 0-d, the first to be differentiated.

        Their sums over a step's micro-batches, averaged over the ranks, are those of the whole
        batch, and so are the gradients.
        """

    @abstractmethod
    def names(self, step: Any) -> list[str]:
        """Names of the images in this rank's part of a step, for messages."""

    @abstractmethod
    def records_at(self, step: int, last: int) -> bool:
        """Whether the averages since the last record are recorded after a step."""

    @abstractmethod
    def warm_up(self) -> None:
        """Compile the network for validation."""

    @abstractmethod
    def validate(self, watch: PassOn) -> Score:
        """Score on the validation images, which the ranks share; each batch of them passes through
        ``watch``, which may end them early."""

    @abstractmethod
    def note_best(self, score: Score, progress: Progress) -> dict[str, float] | None:
        """If it is the best yet, keep it in ``progress`` and return it under its name."""

    @abstractmethod
    def tell(self, score: Score, record: dict[str, Any], log: Log) -> None:
        """Record a validation and show it."""

    def draw(self, folder: Path) -> None:  # noqa: B027
        """Pictures after a validation; on the main rank only."""

    def report(self, score: Score) -> list[Html]:
        """Sections of the run's report about a validation; on the main rank only."""
        return []

    @abstractmethod
    def result(self, score: Score, progress: Progress) -> dict[str, Any]:
        """What ``result.json`` holds."""

    @abstractmethod
    def conclude(self, score: Score, progress: Progress, folder: Path, log: Log) -> None:
        """Show the results of a complete run; on the main rank only."""

    def warning(self) -> str | None:
        """Warnings to show before the run starts."""
        return None

    def close(self) -> None:  # noqa: B027
        """End worker processes, if there are any."""

    def autocast(self) -> AbstractContextManager[object]:
        """The autocast context of the network's forward pass."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self.dtype)


def initial(config: Config, world: World, make: Callable[[], nn.Module]) -> nn.Module:
    """A network with its initial weights, the same on every rank, channels_last on the device."""
    torch.manual_seed(config.run.seed)
    model = make()
    model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.run.sync_bn and world.size > 1:
        set_sync_group(model, sync_group())
    # From here on each rank draws for itself: for dropout, or smoothing factors.
    torch.manual_seed((config.run.seed << 16) + world.rank + 1)
    return model


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in; None: float32, no autocast."""
    if config.run.amp == "auto":
        return fast_dtype(device)
    return torch.bfloat16 if config.run.amp == "on" else None
