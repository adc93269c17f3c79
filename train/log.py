"""The log of a run: a live progress line or plain lines, and ``metrics.jsonl``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from encnet_triton.files import naming, without_nan, write_text

if TYPE_CHECKING:
    from encnet_triton.train.loggers import Logger

METRICS = "metrics.jsonl"

_BAR = 16
Item = TypeVar("Item")


class _Console(Console):
    """Falls silent where nobody reads on: a closed terminal or pipe must not end a run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())  # Python flushes it once more at exit

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:  # EIO, of a terminal
            self.on_broken_pipe()


class Log:
    """Writes records to ``metrics.jsonl`` and shows them; silent on ranks other than 0.

    Args:
        folder: of the run.
        enabled: whether this process is the one that writes.
        console: where to show; a terminal gets a live line, anything else plain lines.

    Attributes:
        logger: takes the records as well, if there is one.
    """

    def __init__(self, folder: Path, enabled: bool, console: Console | None = None) -> None:
        self.folder = folder
        self.enabled = enabled
        self.console = console or _Console(quiet=not enabled, soft_wrap=True, emoji=False)
        self.logger: Logger | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """Print a line, above the progress line if there is one."""
        if self.enabled:
            self.console.print(text, markup=False, highlight=False)

    def begin(self, steps: int, done: int) -> None:
        """Start the live line of a run of ``steps`` steps, ``done`` of them already done."""
        if not self.enabled or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn(f"{{task.completed:>{len(str(steps))}}}/{{task.total}}"),
            BarColumn(bar_width=_BAR, table_column=Column(min_width=_BAR)),
            # The time left is part of the status: rich's own estimate would count compilation and
            # validation as slow steps.
            TextColumn("{task.fields[status]}", markup=False),
            console=self.console,
        )
        self._task = self._progress.add_task("train", total=steps, completed=done, status="")
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the live line to a step."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)

    def train(self, record: dict[str, Any], steps: int, eta: float | None) -> None:
        """Record the averages since the last record; ``eta`` is in seconds, None if not known."""
        self.write({"kind": "train", **record})
        parts = _parts(record, eta)
        if self._progress is None or self._task is None:
            self.say(f"step {record['step']:>6}/{steps}  {'  '.join(parts)}")
            return
        # Drop what does not fit, from the end: rich would cut the step and the bar.
        room = self.console.width - 2 * len(str(steps)) - _BAR - 4
        status = ""
        for part in parts:
            if len(status) + 2 * bool(status) + len(part) > room:
                break
            status += "  " * bool(status) + part
        self._progress.update(self._task, status=status)

    def watch(self, items: Iterable[Item], count: int, text: str) -> Iterator[Item]:
        """Iterate over the items, with a progress bar below the live line."""
        if self._progress is None:
            yield from items
            return
        progress = self._progress
        task = progress.add_task(text, total=count, status=text)
        try:
            for item in items:
                yield item
                progress.advance(task)
        finally:
            progress.remove_task(task)

    def write(self, record: dict[str, Any]) -> None:
        """Append one JSON object to ``metrics.jsonl``; figures that are not finite are null."""
        if not self.enabled:
            return
        record = without_nan({**record, "time": round(time.time(), 3)})
        path = self.folder / METRICS
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.logger is not None:
            self.logger.write(record)

    def rewind(self, step: int, validated: int) -> None:
        """Drop what a resumed run writes again: records after ``step``, validations after
        ``validated``."""
        path = self.folder / METRICS
        if not self.enabled or not path.exists():
            return
        kept = []
        for record in read_records(self.folder):
            made_again = validated if record["kind"] == "val" else step
            if record["step"] <= made_again:
                kept.append(json.dumps(record) + "\n")
        write_text("".join(kept), path)

    def end(self) -> None:
        """Remove the live line, and close the logger; safe to call twice."""
        if self.logger is not None:
            self.logger.close()
            self.logger = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, each with its kind and step.

    Anything else in the file is skipped, such as a line that a killed process did not finish.
    """
    text = (folder / METRICS).read_text(encoding="utf-8", errors="replace")
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and is_number(record.get("step")) and "kind" in record:
            records.append(record)
    return records


def is_number(value: Any) -> bool:
    """Whether it is a finite number from a JSON file, not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _parts(record: dict[str, Any], eta: float | None) -> list[str]:
    """The parts of a record's line, the most important first."""
    loss = record["loss"]
    parts = ["loss not finite" if loss is None else f"loss {loss:.3f}"]
    if eta is not None:
        parts.append(f"ETA {timedelta(seconds=round(eta))}")
    if record.get("skipped"):
        parts.append(f"skipped {record['skipped']}")
    if record["images_per_second"] is not None:
        parts.append(f"{record['images_per_second']:.1f} img/s")
        parts.append(f"data {record['data_wait']:.0%}")
    parts.append(f"lr {record['lr']:.2e}")
    if record.get("train_error") is not None:
        parts.append(f"train error {record['train_error']:.2%}")
    terms = [name for name in ("segmentation", "se", "aux") if record.get(name)]
    return parts + [f"{name} {record[name]:.3f}" for name in terms]
