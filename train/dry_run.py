"""A dry run: what a run would do, without starting it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from encnet_triton.files import refuse_unwritable
from encnet_triton.train import loggers, run_state
from encnet_triton.train.config import Config
from encnet_triton.train.distributed import World
from encnet_triton.train.log import Log
from encnet_triton.train.recipe import task_of
from encnet_triton.train.run_folder import free_folder
from encnet_triton.weights.checkpoint import load_model
from encnet_triton.weights.trunk import FROM_TIMM


def dry_run(config: Config, world: World, before: Collection[Path] = ()) -> None:
    """Refuse what a run would refuse, else print what it would do. Published data sets need not
    exist; if they do, the run is built in full.

    Args:
        config: of the run.
        world: of this process.
        before: checkpoints that the stages before it would write.
    """
    _rehearse(config, world, before)
    log = Log(Path(), world.main)
    for line in task_of(config).outlook(config, world):
        log.say(line)


def _rehearse(config: Config, world: World, before: Collection[Path]) -> None:
    path = free_folder(config) / run_state.LAST
    loggers.require(config.run.logger)
    refuse_unwritable(path.parent, "the run's folder")
    start = config.run.init_from
    if start is not None and Path(start) in before:
        start = None
    if config.data.data is None and config.data.dataset != "scenes":
        task_of(config).refuse_batch(config, world)
        if start is not None:
            load_model(start)
        return
    pretrained = config.model.pretrained
    distant = "://" in pretrained or pretrained == FROM_TIMM
    task = task_of(config)(
        replace(
            config,
            model=replace(config.model, pretrained="" if distant else pretrained),
            run=replace(config.run, init_from=start, new_head=config.run.new_head and bool(start)),
        ),
        world,
    )
    task.close()
    if config.run.resume and run_state.on_all_ranks(path):
        run_state.load(
            path, world, task.model, task.optimizer, config, task.info, task.training_set
        )
