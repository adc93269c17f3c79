"""One run of any task: steps, validation, checkpoints, and stopping well."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from encnet_triton.data.check import UnlabelledError
from encnet_triton.files import write_json
from encnet_triton.inference.precision import measured_convolutions
from encnet_triton.machine import report
from encnet_triton.train import loggers, optim, run_state
from encnet_triton.train.average import Average
from encnet_triton.train.compiling import compile_obstacle, fix_gradients, records_graphs
from encnet_triton.train.config import REDUCE_OVERHEAD, Config
from encnet_triton.train.distributed import (
    World,
    check_same_weights,
    data_parallel,
    gather,
    send_buffers,
)
from encnet_triton.train.kept_statistics import KeptStatistics
from encnet_triton.train.log import Log
from encnet_triton.train.meter import Meter
from encnet_triton.train.recipe import task_of
from encnet_triton.train.run_folder import (
    RESULT,
    finished,
    locked,
    note_refusal,
    open_folder,
    write_config,
)
from encnet_triton.train.run_lock import RunLock
from encnet_triton.train.run_report import write_report
from encnet_triton.train.run_state import Progress
from encnet_triton.train.saver import Saver, TrainingError
from encnet_triton.train.signals import StopRequest, agree
from encnet_triton.train.task import Task
from encnet_triton.train.watch import FIRST

MAX_SKIPPED = 10
_STOPPING = "leaving the validation out"


class Trainer:
    """One run, from its first or resumed step to its last.

    Args:
        config: validated configuration.
        world: this process and its device.
        task: what is trained, and on what.
        folder: of the run; exists.
        log: where records go.
        lock: of the folder, on the main rank.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        task: Task[Any],
        folder: Path,
        log: Log,
        lock: RunLock | None = None,
    ) -> None:
        self.config, self.world, self.task = config, world, task
        self.folder, self.log = folder, log
        self.model = task.model
        if config.optim.ema:
            task.average = Average(task.model, config.optim.ema)
        self.steps = task.steps_per_epoch * config.optim.epochs
        self.progress = Progress()
        self.meter = Meter(world.device, task.terms)
        self._stop = StopRequest()
        self._stopping = False  # agreed by all ranks
        self._saver = Saver(config, world, task, folder, lock)
        self._left_out = False  # this rank has not seen all of a validation
        self._gradients_stay = False  # where they are, from step to step
        self._cold = False  # validation has yet to compile its own graph
        self._statistics = KeptStatistics(self.model)

    def restore(self) -> bool:
        """Load ``last.safetensors`` if it is there; returns whether it was.

        Raises:
            WorldError: some ranks see the file and others do not.
        """
        path = self.folder / run_state.LAST
        if not run_state.on_all_ranks(path):
            self.log.rewind(0, 0)  # of a run that ended before its first checkpoint
            return False
        self.progress = run_state.load(
            path,
            self.world,
            self.model,
            self.task.optimizer,
            self.config,
            self.task.info,
            self.task.training_set,
            average=self.task.average,
        )
        self._saver.resumed(self.progress)
        self.log.rewind(self.progress.step, self.progress.validated)
        return True

    def run(self) -> Any:
        """Train to the end, to ``stop_at``, or until a signal; returns the last score if the run is
        complete, None otherwise.

        Raises:
            TrainingError: the loss was not finite in `MAX_SKIPPED` steps in a row, or the
                weights are not finite.
        """
        check_same_weights(self.model)
        self.network = self._wrap(self.model)
        last = min(self.steps, self.config.run.stop_at or self.steps)
        score = None
        with self._stop, self._saver:
            self.log.begin(self.steps, self.progress.step)
            if self._due() and self.progress.validated != self.progress.step:
                score = self._score()  # a signal or an error prevented it
            self.meter.restart()
            while self.progress.step < last and not self._stopping:
                with measured_convolutions():  # all steps have one shape
                    self._epoch(last)
                if self.progress.step % self.task.steps_per_epoch == 0 and not self._stopping:
                    # Before anything that takes long and may fail.
                    if self._saver.due(self.progress.step):
                        self._saver.save(self.progress, ending=self.progress.step == last)
                    score = self._score() if self._due() else None
                    self.meter.restart()
            known = self.progress.validated == self.progress.step
            if self.progress.step == self.steps and not (known and score is not None):
                # Asked to stop in the very last step, or resumed when already complete.
                score = self._measured() if known else self._score()
            if self._saver.step != self.progress.step:
                self._saver.save(self.progress, ending=True)  # asked to stop in a validation
            with self.world.watch.patiently(f"saving step {self._saver.step}"):
                self._saver.finish()
                gather(None)  # on every rank, a next stage starts from the file
            self.log.end()
        if self.progress.step < self.steps or score is None:
            self.log.say(
                f"stopped at step {self.progress.step} of {self.steps}, saved in {self.folder}; "
                "continue with --resume"
            )
            return None
        return score

    def _wrap(self, model: nn.Module) -> nn.Module:
        # Compiled inside DDP, not around it: DDP's own code would only break the graph. Dynamo
        # then sees the DDP it runs in and cuts the graph where DDP's buckets end, so that gradients
        # travel while the rest is computed: docs/multi_node.md has the figures.
        run = self.config.run
        if run.compile:
            obstacle = compile_obstacle(self.world.device)
            if obstacle is None:
                mode = {"mode": REDUCE_OVERHEAD} if run.compile == REDUCE_OVERHEAD else {}
                model.compile(**mode)
                if self.task.average is not None:
                    self.task.average.model.compile(**mode)
                self._cold = True
                if records_graphs(run.compile, self.world.device):
                    # A backward pass comes before the next forward pass, and a validation has none:
                    # torch sees by itself where an iteration ends.
                    self._gradients_stay = self.config.optim.accumulation > 1
            else:
                self.log.say(obstacle)
        if self._gradients_stay:
            fix_gradients(model)
        if self.world.size == 1:
            return model
        return data_parallel(
            model,
            self.world.device,
            sync_buffers=not run.sync_bn,
            accumulation=self.config.optim.accumulation,
        )

    def _epoch(self, last: int) -> None:
        """Steps up to the end of the epoch, to ``last``, or to a request to stop."""
        epoch, start = divmod(self.progress.step, self.task.steps_per_epoch)
        taken = self.task.steps(epoch, start)
        watch = self.world.watch
        while self.progress.step < last:
            watch.mark(f"waiting for the data of step {self.progress.step + 1}")
            with self.meter.waiting():
                given = next(taken, None)
            if given is None:
                return
            stop = self._step(given)
            step = self.progress.step
            watch.mark(f"step {step + 1}", self.config.run.timeout)
            self.log.advance(step)
            if self.task.records_at(step, last):
                self._record(epoch)
            inside = step % self.task.steps_per_epoch != 0
            if stop or (inside and self._saver.due(step)):
                self._saver.save(self.progress, ending=stop or step == last)
            if stop:
                # A scheduler's grace period is short: no validation, even at the end of an epoch.
                self._stopping = True
                return

    def _step(self, given: Any) -> bool:
        """One optimiser step; returns whether any rank was asked to stop."""
        self._saver.look()
        self.model.train()
        optimizer = self.task.optimizer
        parts = self.task.parts(given)
        self._statistics.keep()
        total = torch.zeros((), device=self.world.device)
        bad = stop = False
        for number, part in enumerate(parts, 1):
            final = number == len(parts)
            self.world.watch.mark(f"step {self.progress.step + 1}")
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
            self._skip(given, total)
        else:
            self.progress.skipped_in_a_row = 0
            rate = optim.rate_at(self.progress.step - 1, self.steps, self.config.optim)
            optim.set_rate(optimizer, rate)
            if self.config.optim.clip_norm is not None:  # of the same gradient on every rank
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
            optimizer.step()
            if self.task.average is not None:
                self.task.average.update(self.progress.step - 1)
        optimizer.zero_grad(set_to_none=not self._gradients_stay)
        self.meter.count(self.config.optim.batch_size, finite=not bad)
        return stop

    def _skip(self, given: Any, loss: Tensor) -> None:
        """Undo the step: weights and running statistics stay as they were; count it as skipped."""
        self._statistics.restore()
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if broken := run_state.not_finite(dict(self.model.named_parameters())):
            # No later step can repair them, and naming the images would not help.
            raise TrainingError(
                f"the weights are not finite at step {progress.step} ({broken} for one); a smaller "
                f"--lr or --amp off may help; {self._saver.kept()}"
            )
        if progress.skipped_in_a_row < MAX_SKIPPED:
            self.log.say(f"step {progress.step}: the loss is not finite; step skipped")
            return
        own = [] if torch.isfinite(loss) else self.task.names(given)
        names = [name for rank in gather(own) for name in rank]
        raise TrainingError(
            f"the loss was not finite in {MAX_SKIPPED} steps in a row, the last of them "
            f"step {progress.step} with the batch {', '.join(names)}; {self._saver.kept()}"
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

    def _measured(self) -> Any:
        """The score now; None, and sets `_stopping`, if any rank was asked to stop meanwhile."""
        self._left_out = False
        with self.world.watch.patiently("validation"):
            if not self.config.run.sync_bn:
                send_buffers(self.task.evaluated)  # the score is that of the saved weights
            score = self.task.validate(self._watched)
            self._stopping = any(gather(self._left_out))
        return None if self._stopping else score

    def _watched(self, items: Iterable[Any], count: int) -> Iterator[Any]:
        """The items of a validation, with progress on the screen, until the run is asked to
        stop."""
        for item in self.log.watch(items, count, "validation"):
            if self._stop.requested or self.world.watch.somebody_is(_STOPPING):
                self._left_out = True
                self.world.watch.mark(_STOPPING)
                return
            self.world.watch.mark("validation")
            yield item

    def _score(self) -> Any:
        """Validate, keep the best weights, and save what is known now; None if it was stopped."""
        if self._cold:
            with self.world.watch.patiently("compiling for validation"):
                self.task.warm_up()
                gather(None)  # the clock starts when the last rank is ready
            self._cold = False
        start = time.perf_counter()
        score = self._measured()
        if score is None:
            return None
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
        self._saver.save(progress, best=best, last=self._saver.due(progress.step))
        if self.world.main:
            with self.world.watch.patiently("drawing"):
                self.task.draw(self.folder)
                if self.config.run.report:
                    write_report(self.folder, self.config, self.task.report(score))
        return score


def train(
    config: Config, world: World, make: Callable[[Config, World], Task[Any]] | None = None
) -> bool:
    """Build, restore and run, then report the result; returns whether the run is complete.

    Args:
        config: validated configuration.
        world: this process and its device.
        make: what is trained; default the task of the configuration's data set.
    """
    loggers.require(config.run.logger)
    try:
        task = (make or task_of(config))(config, world)
    except UnlabelledError as error:
        note_refusal(config, world, str(error))
        raise
    folder = open_folder(config, world)
    world.watch.mark("starting", FIRST)
    try:
        with locked(folder, config, world) as lock:
            return _train(config, world, task, folder, lock)
    finally:
        world.watch.mark("ending", FIRST)


def _train(
    config: Config, world: World, task: Task[Any], folder: Path, lock: RunLock | None
) -> bool:
    log = Log(folder, world.main)
    trainer = Trainer(config, world, task, folder, log, lock)
    log.say(summary(config, task, trainer.steps, world))
    try:
        if trainer.restore():
            log.say(f"resumed {folder / run_state.LAST} at step {trainer.progress.step}")
        if world.main:
            write_config(config, folder)
            log.logger = loggers.open_logger(config, folder, trainer.progress.step)
        log.write({"kind": "start", "step": trainer.progress.step, "environment": dict(report())})
        if warning := task.warning():
            log.say(warning)
        score = trainer.run()
    except BaseException:
        log.end()
        if world.size == 1:
            task.close()
        # With several processes, a failing one does not wait for its loader while others wait for
        # it; the workers notice its end.
        raise
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
    """Train stages one after the other; a stage that is complete is skipped."""
    if len(configs) > 1:
        for config in configs:
            open_folder(config, world)  # before spending hours on the first
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
