"""What a run tells: a live progress line or plain lines, and ``metrics.jsonl``."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from encnet_triton.files import write_text

METRICS = "metrics.jsonl"


class Log:
    """Writes records to ``metrics.jsonl`` and shows them to a person; silent on ranks other than 0.

    Args:
        folder: of the run.
        enabled: whether this process is the one that writes.
        console: where to show; a terminal gets a live line, anything else plain lines.
    """

    def __init__(self, folder: Path, enabled: bool, console: Console | None = None) -> None:
        self.folder = folder
        self.enabled = enabled
        self.console = console or Console(quiet=not enabled, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: Any = None
        self._status = ""

    def say(self, text: str) -> None:
        """Print a line, above the progress line if there is one."""
        if self.enabled:
            self.console.print(text, markup=False, highlight=False)

    def begin(self, steps: int, done: int) -> None:
        """Start the live line of a run of ``steps`` steps, ``done`` of them already made."""
        if not self.enabled or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.completed:>5}/{task.total}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            # The time left comes with the status: rich's own estimate would count compilation
            # and validation as steps that were slow.
            TextColumn("{task.fields[status]}"),
            console=self.console,
        )
        self._task = self._progress.add_task("train", total=steps, completed=done, status="")
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the live line to a step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def train(self, record: dict[str, Any], steps: int, eta: float | None) -> None:
        """Record the averages since the last record; ``eta`` is in seconds, None if not known."""
        self.write({"kind": "train", **record})
        losses = " ".join(
            f"{name} {record[name]:.3f}"
            for name in ("segmentation", "se", "aux")
            if record.get(name)
        )
        status = f"loss {record['loss']:.3f}" + (f" ({losses})" if losses else "")
        if "train_error" in record:
            status += f"  train error {record['train_error']:.2%}"
        status += f"  lr {record['lr']:.2e}"
        if record["images_per_second"] is not None:
            status += f"  {record['images_per_second']:.1f} img/s  data {record['data_wait']:.0%}"
        if record.get("skipped"):
            status += f"  skipped {record['skipped']}"
        if eta is not None:
            status += f"  ETA {timedelta(seconds=round(eta))}"
        if self._progress is not None:
            self._progress.update(self._task, status=status)
        else:
            self.say(f"step {record['step']:>6}/{steps}  {status}")

    def write(self, record: dict[str, Any]) -> None:
        """Append one JSON object to ``metrics.jsonl``."""
        if self.enabled:
            with open(self.folder / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the records of steps after ``step``, which a resumed run makes again."""
        path = self.folder / METRICS
        if not self.enabled or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that a killed process did not finish
            if record.get("step", 0) <= step:
                kept.append(line + "\n")
        write_text("".join(kept), path)

    def end(self) -> None:
        """Take the live line away; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
