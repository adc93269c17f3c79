"""When and how a run's state is saved to its folder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from encnet_triton.train import run_state
from encnet_triton.train.config import Config
from encnet_triton.train.distributed import World
from encnet_triton.train.run_lock import RunLock
from encnet_triton.train.run_state import Progress, State
from encnet_triton.train.task import Task
from encnet_triton.train.writer import Writer


class TrainingError(RuntimeError):
    """The run cannot continue; the message says why, and what was saved."""


class Saver(Writer):
    """Copies the state of a run and writes the copy in a thread; a context manager like `Writer`.

    Args:
        config, world, task: of the run; every rank has a saver, but only rank 0's writes files.
        folder: of the run.
        lock: the folder's, on the main rank.

    Attributes:
        step: of the newest state that is saved or being saved; -1 before the first.
    """

    def __init__(
        self, config: Config, world: World, task: Task[Any], folder: Path, lock: RunLock | None
    ) -> None:
        super().__init__()
        self._config, self._world, self._task = config, world, task
        self._folder, self._lock = folder, lock
        self._saved: Progress | None = None  # of the state on disk
        self.step = -1

    def resumed(self, progress: Progress) -> None:
        """Take this state as the one on disk."""
        self._saved, self.step = replace(progress), progress.step

    def due(self, step: int) -> bool:
        """Whether the state is saved after a step, if nothing else asks for it."""
        run, of_epoch = self._config.run, self._task.steps_per_epoch
        epoch, rest = divmod(step, of_epoch)
        if step in (self._config.optim.epochs * of_epoch, run.stop_at):
            return True
        often = run.save_every and step % run.save_every == 0
        return bool(often) or (rest == 0 and epoch % run.save_epochs == 0)

    def save(
        self,
        progress: Progress,
        *,
        ending: bool = False,
        best: dict[str, float] | None = None,
        last: bool = True,
    ) -> None:
        """Save the state to resume from, if ``last``, and the best weights with their score, if
        any.

        If the latest losses were not finite, the state is not saved: the one on disk stays good.
        ``ending`` saves it anyway, as the process is about to end.

        Raises:
            TrainingError, CheckpointError: the previous save failed.
        """
        last = ending or (last and not progress.skipped_in_a_row)
        if not last and best is None:
            return
        progress, task = replace(progress), self._task
        with self._world.watch.patiently(f"saving step {progress.step}"):
            self.finish()  # before there is a second copy
            state = run_state.copy_state(
                self._world,
                task.model,
                task.optimizer,
                task.info,
                progress,
                self._config,
                task.training_set,
                task.average,
            )
        if last:
            self.step = progress.step
        if state is not None:
            self.start(partial(self._write, state, best, progress if last else None))
        elif last:
            self._saved = progress

    def _write(
        self, state: State, best: dict[str, float] | None, progress: Progress | None
    ) -> None:
        """Write the copy; runs in the thread."""
        if self._lock is not None and not self._lock.held():
            raise TrainingError(self._lock.taken())
        if best is not None:
            state.write_best(self._folder, best)
        if progress is not None:
            state.write(self._folder)
            state.write_average(self._folder)
            self._saved = progress

    def kept(self) -> str:
        """What the run can be resumed from, as part of a sentence."""
        self.wait()
        path = self._folder / run_state.LAST
        if self._saved is None:
            return "nothing was saved yet"
        if self._saved.skipped_in_a_row:
            return f"{path} holds step {self._saved.step}, whose loss was not finite either"
        return f"the last good state is {path}, of step {self._saved.step}"
