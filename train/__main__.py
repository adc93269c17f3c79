"""``python -m encnet_triton.train`` and ``torchrun ... -m encnet_triton.train``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from encnet_triton.checkpoint import CheckpointError
from encnet_triton.environment import report
from encnet_triton.evaluate import score_table
from encnet_triton.inference import WHOLE_IMAGE_WARNING
from encnet_triton.train import checkpoint, command, distributed, setup
from encnet_triton.train.config import Config, ConfigError
from encnet_triton.train.log import Log
from encnet_triton.train.loop import Trainer, TrainingError


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
    temporary = folder / ".config.json.tmp"
    temporary.write_text(json.dumps(config.as_dict(), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "config.json")


def train(config: Config, world: distributed.World, dry_run: bool) -> None:
    """Build, restore, run, and tell what came out."""
    parts = setup.build(config, world)
    steps = len(parts.loader) * config.optim.epochs
    count = sum(p.numel() for p in parts.model.parameters())
    summary = (
        f"{config.model.model} {config.model.backbone}, {count:,} parameters, "
        f"{len(parts.train_set):,} training images, {steps:,} steps of {config.optim.batch_size} "
        f"images, {world.size} process{'es' if world.size > 1 else ''} on {world.device.type}"
    )
    if dry_run:
        Log(Path(), world.main).say(summary)
        return
    folder = open_folder(config, world)
    log = Log(folder, world.main)
    trainer = Trainer(config, world, parts, folder, log)
    log.say(summary)
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
    if scores is None or not world.main:
        return
    log.console.print(score_table(scores, parts.info.classes, f"{config.run.name}, last step"))
    best = trainer.progress
    log.say(f"best mIoU {best.best_miou:.2%} at step {best.best_step}: {folder / checkpoint.BEST}")
    log.say(f"pictures: {folder / 'predictions'}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options, overrides = command.parse(arguments)
    try:
        if options.list:
            for name, about in command.list_recipes():
                print(f"{name:<32}{about}")
            return 0
        config = command.configuration(options, overrides)
        world = distributed.start(config.run.device)
        train(config, world, options.dry_run)
    except (CheckpointError, TrainingError, distributed.WorldError, OSError, ValueError) as error:
        if options.traceback:
            raise
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{rank}error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
