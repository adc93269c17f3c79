"""One command's runs: their folders, their stages, and what is said about them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from encnet_triton.data import DATASETS, create_dataset
from encnet_triton.data.cifar10 import COUNT, load_cifar10
from encnet_triton.files import write_json
from encnet_triton.inference import WHOLE_IMAGE_WARNING
from encnet_triton.models import CifarNet, create_model
from encnet_triton.report import report
from encnet_triton.scoring import score_table
from encnet_triton.train import checkpoint, distributed, setup
from encnet_triton.train.classify import Classifier
from encnet_triton.train.config import SECTIONS, Config, ConfigError, changed_fields
from encnet_triton.train.error_curves import draw_errors
from encnet_triton.train.forecast import peak_memory
from encnet_triton.train.log import Log
from encnet_triton.train.loop import Trainer

RESULT = "result.json"


def open_folder(config: Config, world: distributed.World) -> Path:
    """The run's folder; refused if a run is there already and --resume was not given."""
    folder = Path(config.run.runs) / config.run.name
    taken = (folder / "config.json").exists() and not config.run.resume
    if any(distributed.gather(taken)):
        raise ConfigError(f"run {folder} exists; add --resume to go on, or another --name")
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_config(config: Config, folder: Path) -> None:
    """Write ``config.json`` atomically; not before a resumed run has accepted the configuration."""
    write_json(config.as_dict(), folder / "config.json")


def summary(config: Config, parts: setup.Parts, steps: int, world: distributed.World) -> str:
    """One line about a run."""
    count = sum(p.numel() for p in parts.model.parameters())
    return (
        f"{config.model.model} {config.model.backbone}, {count:,} parameters, "
        f"{len(parts.train_set):,} training images, {steps:,} steps of {config.optim.batch_size} "
        f"images, {world.size} process{'es' if world.size > 1 else ''} on {world.device.type}"
    )


def train(config: Config, world: distributed.World) -> bool:
    """Build, restore, run, and tell what came out; returns whether the run is complete."""
    if config.classification:
        return train_classifier(config, world)
    parts = setup.build(config, world)
    steps = len(parts.loader) * config.optim.epochs
    folder = open_folder(config, world)
    log = Log(folder, world.main)
    trainer = Trainer(config, world, parts, folder, log)
    log.say(summary(config, parts, steps, world))
    if trainer.restore():
        log.say(f"resumed {folder / checkpoint.LAST} at step {trainer.progress.step}")
    if world.main:
        write_config(config, folder)
    log.write({"kind": "start", "step": trainer.progress.step, "environment": dict(report())})
    if config.run.whole_image:
        log.say(f"Warning: {WHOLE_IMAGE_WARNING}")
    try:
        scores = trainer.run()
    finally:
        log.end()
        parts.loader.close()
    if scores is None:
        return False
    if world.main:
        document = {"step": trainer.progress.step, **scores.as_dict(parts.info.classes)}
        write_json(document, folder / RESULT)
        log.console.print(score_table(scores, parts.info.classes, f"{config.run.name}, last step"))
        best = trainer.progress
        where = folder / checkpoint.BEST
        log.say(f"best mIoU {best.best_miou:.2%} at step {best.best_step}: {where}")
        log.say(f"pictures: {folder / 'predictions'}")
    return True


def train_classifier(config: Config, world: distributed.World) -> bool:
    """As `train`, for a CIFAR-10 network."""
    folder = open_folder(config, world)
    log = Log(folder, world.main)
    classifier = Classifier(config, world, folder, log)
    count = sum(p.numel() for p in classifier.model.parameters())
    log.say(
        f"{config.model.model}, {count:,} parameters, {len(classifier.train_set):,} training "
        f"images, {classifier.steps:,} steps of {config.optim.batch_size} images, {world.size} "
        f"process{'es' if world.size > 1 else ''} on {world.device.type}"
    )
    if classifier.restore():
        log.say(f"resumed {folder / checkpoint.LAST} at step {classifier.progress.step}")
    if world.main:
        write_config(config, folder)
    log.write({"kind": "start", "step": classifier.progress.step, "environment": dict(report())})
    result = classifier.run()
    if result is None:
        return False
    if world.main:
        document = {"step": classifier.progress.step, **asdict(result)}
        write_json(document, folder / RESULT)
        draw_errors({config.run.name: [folder]}, folder / "curves.png")
        log.say(
            f"test error after the last epoch {result.error:.2%} (lowest {result.best_error:.2%} "
            f"after epoch {result.best_epoch}, chosen on the test set)"
        )
    return True


def finished(config: Config) -> bool:
    """Whether this very run is complete.

    Raises:
        ConfigError: it is, but was made with other values of fields that alter a run.
    """
    folder = Path(config.run.runs) / config.run.name
    if not (folder / RESULT).is_file():
        return False
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    then = {key: value for section in SECTIONS for key, value in saved[section].items()}
    now = config.fingerprint()
    changed = changed_fields({key: value for key, value in then.items() if key in now}, now)
    if changed:
        key = changed[0]
        raise ConfigError(
            f"run {folder} is complete, but with {key} = {then.get(key)!r} where it is now "
            f"{now[key]!r}; give another --name"
        )
    return True


def train_all(configs: list[Config], world: distributed.World) -> bool:
    """Train stages one after the other; a stage that is complete is left as it is."""
    if len(configs) > 1:
        for config in configs:
            open_folder(config, world)  # before hours are spent on the first
    for number, config in enumerate(configs, start=1):
        if len(configs) > 1:
            log = Log(Path(), world.main)
            log.say(f"stage {number} of {len(configs)}: {config.run.name}")
            if config.run.resume and all(distributed.gather(finished(config))):
                log.say("complete already")
                continue
        if not train(config, world):
            return False
    return True


def dry_run(config: Config, world: distributed.World) -> None:
    """Print what a run would be, and stop. The data need not be there for published data sets."""
    log = Log(Path(), world.main)
    if config.classification:
        dry_run_classifier(config, log)
        return
    maker: Any = DATASETS.get(config.data.dataset)
    published = getattr(maker, "expected", {}).get(config.data.train_split)
    images: int | None
    if config.data.data is None and published is not None:
        images = published[0] if published else None
        classes = len(maker.labels_for(config.data.num_classes or 59)[0])
        where = "as published"
    else:
        options = config.data.dataset_options()
        data = config.data
        dataset = create_dataset(data.dataset, data.train_split, data.data, **options)
        images, classes, where = len(dataset), len(dataset.classes), "found"
    model = create_model(num_classes=classes, **config.model.options())
    count = sum(p.numel() for p in model.parameters())
    amount = "a number of images that is known once it is prepared"
    if images is not None:
        steps = images // config.optim.batch_size * config.optim.epochs
        amount = f"{images:,} images ({where}), {steps:,} steps"
    log.say(
        f"{config.run.name}: {config.model.model} {config.model.backbone}, {classes} classes, "
        f"{count:,} parameters\n"
        f"  {config.data.dataset} {config.data.train_split}: {amount}, "
        f"{config.optim.epochs} epochs in batches of {config.optim.batch_size}, "
        f"lr {config.optim.lr:g}"
    )
    if world.main:
        size = peak_memory(config, classes, world.size) / 2**30
        where = "the GPU" if world.size == 1 else f"each of {world.size} GPUs"
        log.say(
            f"  predicted, not measured: at most {size:.1f} GiB on {where}, without the workspaces "
            "of cuDNN"
        )


def dry_run_classifier(config: Config, log: Log) -> None:
    """As `dry_run`, for a CIFAR-10 network."""
    count = sum(p.numel() for p in CifarNet(**config.model.options()).parameters())
    images = COUNT["train"]
    if config.data.data is not None:
        images = len(load_cifar10(config.data.data, "train").labels)
    steps = images // config.optim.batch_size * config.optim.epochs
    log.say(
        f"{config.run.name}: {config.model.model}, {count:,} parameters\n"
        f"  cifar10: {images:,} images, {steps:,} steps, {config.optim.epochs} epochs in batches "
        f"of {config.optim.batch_size}, lr {config.optim.lr:g}, {config.optim.schedule}"
    )
