"""One run of any task: steps, validation, checkpoints, and stopping well."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from encnet_triton.files import write_json
from encnet_triton.nn import BatchNormAct1d, BatchNormAct2d
from encnet_triton.report import report
from encnet_triton.train import optim, run_state
from encnet_triton.train.compiling import compile_obstacle
from encnet_triton.train.config import Config
from encnet_triton.train.distributed import World, check_same_weights, data_parallel, gather
from encnet_triton.train.log import Log
from encnet_triton.train.meter import Meter
from encnet_triton.train.recipe import task_of
from encnet_triton.train.run_folder import RESULT, finished, open_folder, write_config
from encnet_triton.train.run_state import Progress
from encnet_triton.train.signals import StopRequest, agree
from encnet_triton.train.task import Task
from encnet_triton.weights.checkpoint import save_model

MAX_SKIPPED = 10


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what is safe."""


class Trainer:
    """One run, from its first or resumed step to its last.

    Args:
        config: validated configuration.
        world: this process and its device.
        task: what is trained, and on what.
        folder: of the run; exists.
        log: where records go.
    """

    def __init__(
        self, config: Config, world: World, task: Task[Any], folder: Path, log: Log
    ) -> None:
        self.config, self.world, self.task = config, world, task
        self.folder, self.log = folder, log
        self.model = task.model
        self.steps = task.steps_per_epoch * config.optim.epochs
        self.progress = Progress()
        self.meter = Meter(world.device, task.terms)
        self._stop = StopRequest()
        self._stopping = False  # agreed by all ranks
        self._cold = False  # validation has yet to compile its own graph
        self._statistics = [
            buffer
            for module in self.model.modules()
            if isinstance(module, (BatchNormAct1d, BatchNormAct2d, nn.modules.batchnorm._BatchNorm))
            for buffer in module.buffers(recurse=False)
        ]
        self._saved_statistics = [torch.empty_like(b) for b in self._statistics]

    def restore(self) -> bool:
        """Load ``last.safetensors`` if it is there; returns whether it was.

        Raises:
            WorldError: some ranks see the file and others do not.
        """
        path = self.folder / run_state.LAST
        if not run_state.on_all_ranks(path):
            self.log.rewind(0)  # of a run that ended before its first checkpoint
            return False
        self.progress = run_state.load(
            path, self.world, self.model, self.task.optimizer, self.config
        )
        self.log.rewind(self.progress.step)
        return True

    def run(self) -> Any:
        """Train to the end, or to ``stop_at``, or to a signal; returns the last score if the run is
        complete, None otherwise.

        Raises:
            TrainingError: `MAX_SKIPPED` steps had a loss that is not finite.
        """
        check_same_weights(self.model)
        self.network = self._wrap(self.model)
        last = min(self.steps, self.config.run.stop_at or self.steps)
        score = None
        with self._stop:
            self.log.begin(self.steps, self.progress.step)
            if self._due() and self.progress.validated != self.progress.step:
                score = self._end_of_epoch()  # a signal left that out
            self.meter.restart()
            while self.progress.step < last and not self._stopping:
                self._epoch(last)
                if self.progress.step % self.task.steps_per_epoch == 0 and not self._stopping:
                    score = self._end_of_epoch()
            self.log.end()
        if self.progress.step < self.steps:
            self.log.say(
                f"stopped at step {self.progress.step} of {self.steps}, saved in {self.folder}; "
                "go on with --resume"
            )
            return None
        if self.progress.validated != self.progress.step:
            return self._end_of_epoch()  # asked to stop in the very last step
        return self.task.validate() if score is None else score

    def _wrap(self, model: nn.Module) -> nn.Module:
        # Compiled inside of DDP, not around it: DDP's own code would only break the graph. Dynamo
        # then sees the DDP it runs in and cuts the graph where DDP's buckets end, so that gradients
        # travel while the rest is computed: docs/multi_node.md has the figures.
        if self.config.run.compile:
            obstacle = compile_obstacle(self.world.device)
            if obstacle is None:
                model.compile()
                self._cold = True
            else:
                self.log.say(obstacle)
        if self.world.size == 1:
            return model
        return data_parallel(
            model,
            self.world.device,
            sync_buffers=not self.config.run.sync_bn,
            accumulation=self.config.optim.accumulation,
        )

    def _epoch(self, last: int) -> None:
        """Steps up to the end of the epoch, to ``last``, or to a request to stop."""
        epoch, start = divmod(self.progress.step, self.task.steps_per_epoch)
        save_every = self.config.run.save_every
        taken = self.task.steps(epoch, start)
        while self.progress.step < last:
            with self.meter.waiting():
                given = next(taken, None)
            if given is None:
                return
            stop = self._step(given)
            step = self.progress.step
            self.log.advance(step)
            if self.task.records_at(step, last):
                self._record(epoch)
            due = step == last or (save_every and step % save_every == 0)
            if stop or (due and step % self.task.steps_per_epoch != 0):
                self._save()
            if stop:
                # A scheduler's grace is short: no validation, even at the end of an epoch.
                self._stopping = True
                return

    def _step(self, given: Any) -> bool:
        """One optimiser step; returns whether any rank was asked to stop."""
        self.model.train()
        optimizer = self.task.optimizer
        parts = self.task.parts(given)
        torch._foreach_copy_(self._saved_statistics, self._statistics)
        total = torch.zeros((), device=self.world.device)
        bad = stop = False
        for number, part in enumerate(parts, 1):
            final = number == len(parts)
            with ExitStack() as stack:
                if not final and isinstance(self.network, DistributedDataParallel):
                    stack.enter_context(self.network.no_sync())
                terms = self.task.compute(self.network, part)
                total = total + terms[0].detach()
                self.meter.add(terms)
                read = agree(total, self._stop.requested) if final else None
                terms[0].backward()  # type: ignore[no-untyped-call]
                if read is not None:
                    bad, stop = read()
        self.progress.step += 1
        if bad:
            self._skip(given)
        else:
            rate = optim.rate_at(self.progress.step - 1, self.steps, self.config.optim)
            optim.set_rate(optimizer, rate)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.meter.count(self.config.optim.batch_size)
        return stop

    def _skip(self, given: Any) -> None:
        """Leave weights and running statistics as they were before this step, and count it."""
        torch._foreach_copy_(self._statistics, self._saved_statistics)
        self.progress.skipped += 1
        if self.progress.skipped < MAX_SKIPPED:
            self.log.say(f"step {self.progress.step}: the loss is not finite; step skipped")
            return
        names = [name for rank in gather(self.task.names(given)) for name in rank]
        saved = self.folder / run_state.LAST
        raise TrainingError(
            f"the loss was not finite in {MAX_SKIPPED} steps, the last of them step "
            f"{self.progress.step} with the batch {', '.join(names)}; "
            + (f"the last good state is {saved}" if saved.exists() else "nothing was saved yet")
        )

    def _record(self, epoch: int) -> None:
        summary = self.meter.summary(self.world.size)
        step = self.progress.step
        record = {
            "step": step,
            "epoch": epoch + 1,
            "lr": optim.rate_at(step - 1, self.steps, self.config.optim),
            **summary,
            "skipped": self.progress.skipped,
        }
        rate = summary["images_per_second"]
        eta = (self.steps - step) * self.config.optim.batch_size / rate if rate else None
        self.log.train(record, self.steps, eta)
        self.meter.restart()

    def _due(self) -> bool:
        """Whether this step ends an epoch that is validated."""
        epoch, rest = divmod(self.progress.step, self.task.steps_per_epoch)
        every = self.task.val_every
        chosen = self.progress.step == self.steps or (every and epoch % every == 0)
        return bool(epoch and not rest and chosen)

    def _end_of_epoch(self) -> Any:
        """Validate if it is due, and save; returns the score, or None."""
        score = self._validate() if self._due() else None
        self._save()
        self.meter.restart()
        return score

    def _validate(self) -> Any:
        if self._cold:
            self.task.warm_up()
            gather(None)  # the clock starts when the last rank is ready
            self._cold = False
        start = time.perf_counter()
        score = self.task.validate()
        progress = self.progress
        progress.validated = progress.step
        record = {
            "step": progress.step,
            "epoch": progress.step // self.task.steps_per_epoch,
            "seconds": round(time.perf_counter() - start, 3),
        }
        self.task.tell(score, record, self.log)
        best = self.task.note_best(score, progress)
        if best is not None:
            progress.best_step = progress.step
            if self.world.main:
                path = self.folder / run_state.BEST
                save_model(path, self.model, self.task.info, step=progress.step, **best)
        if self.world.main:
            self.task.draw(self.folder)
        return score

    def _save(self) -> None:
        run_state.save(
            self.folder,
            self.world,
            self.model,
            self.task.optimizer,
            self.task.info,
            self.progress,
            self.config,
        )


def train(config: Config, world: World) -> bool:
    """Build, restore, run, and tell what came out; returns whether the run is complete."""
    task = task_of(config)(config, world)
    folder = open_folder(config, world)
    log = Log(folder, world.main)
    trainer = Trainer(config, world, task, folder, log)
    log.say(summary(config, task, trainer.steps, world))
    try:
        if trainer.restore():
            log.say(f"resumed {folder / run_state.LAST} at step {trainer.progress.step}")
        if world.main:
            write_config(config, folder)
        log.write({"kind": "start", "step": trainer.progress.step, "environment": dict(report())})
        if warning := task.warning():
            log.say(warning)
        score = trainer.run()
    finally:
        log.end()
        task.close()
    if score is None:
        return False
    if world.main:
        write_json(task.result(score, trainer.progress), folder / RESULT)
        task.conclude(score, trainer.progress, folder, log)
    return True


def summary(config: Config, task: Task[Any], steps: int, world: World) -> str:
    """One line about a run."""
    count = sum(p.numel() for p in task.model.parameters())
    network = config.model.model
    if "backbone" in task.reads(config):
        network += f" {config.model.backbone}"
    return (
        f"{network}, {count:,} parameters, {task.images:,} training images, {steps:,} steps of "
        f"{config.optim.batch_size} images, {world.size} "
        f"process{'es' if world.size > 1 else ''} on {world.device.type}"
    )


def train_all(configs: list[Config], world: World) -> bool:
    """Train stages one after the other; a stage that is complete is left as it is."""
    if len(configs) > 1:
        for config in configs:
            open_folder(config, world)  # before hours are spent on the first
    for number, config in enumerate(configs, start=1):
        if len(configs) > 1:
            log = Log(Path(), world.main)
            log.say(f"stage {number} of {len(configs)}: {config.run.name}")
            if config.run.resume and all(gather(finished(config))):
                log.say("complete already")
                continue
        if not train(config, world):
            return False
    return True


def dry_run(config: Config, world: World) -> None:
    """Print what a run would be, and stop."""
    log = Log(Path(), world.main)
    for line in task_of(config).outlook(config, world):
        log.say(line)
