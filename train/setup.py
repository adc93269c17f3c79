"""Everything a run is made of, built from its configuration: data, network, loss, optimiser."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from encnet_triton.data import Augment, Dataset, TrainLoader, create_dataset
from encnet_triton.models import create_model
from encnet_triton.nn import SegmentationLoss, set_sync_group
from encnet_triton.train import checkpoint
from encnet_triton.train.config import Config, ConfigError
from encnet_triton.train.distributed import World
from encnet_triton.train.optim import make_optimizer
from encnet_triton.weights import load_backbone
from encnet_triton.weights.checkpoint import ModelInfo

# What a cross-entropy weight may be at most or at least: a class with a handful of pixels would
# otherwise decide the gradient of a whole batch.
WEIGHT_LIMITS = (0.2, 5.0)
WEIGHT_IMAGES = 500


@dataclass
class Parts:
    """The pieces of a run, before any checkpoint is loaded into them."""

    train_set: Dataset
    val_set: Dataset
    loader: TrainLoader
    model: nn.Module
    loss: SegmentationLoss
    optimizer: torch.optim.SGD
    info: ModelInfo
    autocast: torch.dtype | None


def build(config: Config, world: World) -> Parts:
    """Build all parts on ``world.device``.

    Raises:
        ConfigError: fields that do not go together.
        ValueError: the data set or the model refuses its options.
    """
    data, optim = config.data, config.optim
    options = data.dataset_options()
    train_set = create_dataset(data.dataset, data.train_split, data.data, **options)
    val_set = create_dataset(data.dataset, data.val_split, data.data, **options)
    num_classes = len(train_set.classes)
    loader = TrainLoader(
        train_set,
        make_augment(config, train_set),
        batch_size=optim.batch_size,
        seed=config.run.seed,
        workers=worker_count(config, world),
        rank=world.rank,
        world_size=world.size,
        accumulation=optim.accumulation,
        pin_memory=world.device.type == "cuda",
    )
    model = make_model(config, world, num_classes)
    weight = None
    if optim.class_weight == "balanced":
        weight = balanced_weights(train_set, num_classes).to(world.device)
    loss = SegmentationLoss(
        num_classes,
        ignore_index=train_set.ignore_index,
        se_weight=optim.se_weight,
        aux_weight=optim.aux_weight,
        align_corners=bool(model.align_corners),
        class_weight=weight,
        label_smoothing=optim.label_smoothing,
    ).to(world.device)
    return Parts(
        train_set=train_set,
        val_set=val_set,
        loader=loader,
        model=model,
        loss=loss,
        optimizer=make_optimizer(model, optim),
        info=model_info(config, train_set, model),
        autocast=autocast_dtype(config, world.device),
    )


def make_model(config: Config, world: World, num_classes: int) -> nn.Module:
    """The network with its initial weights, the same on every rank, channels_last on the device."""
    torch.manual_seed(config.run.seed)
    model = create_model(num_classes=num_classes, **config.model.options())
    model.backbone.activation_checkpointing = config.run.activation_checkpointing
    if config.model.pretrained:
        load_backbone(model, config.model.pretrained)
    if config.run.init_from:
        path = Path(config.run.init_from)
        checkpoint.initialise(path, model, num_classes, config.run.new_head)
    model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.run.sync_bn and world.size > 1:
        set_sync_group(model, dist.group.WORLD)
    # From here on dropout draws its own numbers on each rank.
    torch.manual_seed((config.run.seed << 16) + world.rank + 1)
    return model


def make_augment(config: Config, dataset: Dataset) -> Augment:
    """The one-warp augmentation of the training set; outside of images is its mean colour."""
    data = config.data
    return Augment(
        data.crop,
        base_size=data.base_size,
        scale=data.scale,
        scale_by=data.scale_by,
        rotation=data.rotation,
        flip=data.flip,
        ignore_index=dataset.ignore_index,
        fill=tuple(round(255 * m) for m in dataset.mean),
    )


def model_info(config: Config, dataset: Dataset, model: nn.Module) -> ModelInfo:
    """What is stored beside the weights so that they can be used without this configuration."""
    data = config.data
    return ModelInfo(
        options=dict(model.options),  # type: ignore[arg-type]
        classes=list(dataset.classes),
        palette=np.asarray(dataset.palette).tolist(),
        mean=list(dataset.mean),
        std=list(dataset.std),
        crop=list(data.crop),
        base_size=data.base_size,
        scale_by=data.scale_by,
        ignore_index=dataset.ignore_index,
        data={
            "name": data.dataset,
            "root": None if data.data is None else str(Path(data.data).resolve()),
            "split": data.val_split,
            "options": data.dataset_options(),
        },
    )


def worker_count(config: Config, world: World) -> int:
    """Loader processes of this rank: as configured, else the host's cores shared by its ranks.

    On the CPU the network itself needs the cores, so one process decodes ahead.
    """
    if config.data.workers is not None:
        return config.data.workers
    if world.device.type == "cpu":
        return 1
    return max(1, min(16, (os.cpu_count() or 1) // world.local_size - 1))


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """bfloat16 where it is asked for or gains: GPUs that compute in it, CPUs with matrix tiles."""
    if config.run.amp == "off":
        return None
    if config.run.amp == "on":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else None


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, in one sentence, or None.

    It looks for what Inductor and Triton look for: they fail in the middle of the first step.
    """
    what = None
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            what = "Triton is not installed"
        else:
            if not _program("CC", "gcc", "clang"):
                what = "Triton finds no C compiler (gcc or clang on PATH, or CC)"
            elif torch.cuda.get_device_capability(device) < (7, 0):
                what = f"{torch.cuda.get_device_name(device)} is older than Triton supports"
    else:
        name = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
        if not _program("CXX", name):
            what = f"there is no C++ compiler ({name} on PATH, or CXX)"
    return what and f"--compile is left out: {what}; the network runs eagerly"


def _program(variable: str, *names: str) -> bool:
    """Whether the program that an environment variable names, else one of ``names``, is there."""
    given = os.environ.get(variable)
    return any(shutil.which(name) for name in ([given] if given else names))


def balanced_weights(dataset: Dataset, num_classes: int) -> Tensor:
    """Median-frequency weights of the classes, from at most `WEIGHT_IMAGES` labels, evenly spaced.

    A class's frequency is its pixels over all labelled pixels of the images it occurs in; its
    weight is the median frequency over its own, kept within `WEIGHT_LIMITS`. float32, n of them.

    Raises:
        ConfigError: no label has a class.
    """
    count = min(len(dataset), WEIGHT_IMAGES)
    indices: Sequence[int] = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    pixels, around = np.zeros(num_classes), np.zeros(num_classes)
    for index in indices:
        histogram = np.bincount(dataset[index].label.ravel(), minlength=256)[:num_classes]
        pixels += histogram
        around += np.where(histogram > 0, histogram.sum(), 0)
    seen = pixels > 0
    if not seen.any():
        raise ConfigError("class_weight = 'balanced' needs labels, but no pixel has a class")
    frequency = pixels[seen] / around[seen]
    weights = np.ones(num_classes)
    weights[seen] = np.clip(np.median(frequency) / frequency, *WEIGHT_LIMITS)
    return torch.tensor(weights, dtype=torch.float32)
