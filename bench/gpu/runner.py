"""Run jobs within the given time; results are written to disk at once."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from bench.gpu.job import Job, Outcome
from bench.gpu.processes import Worker

_LOG_BYTES = 8_000_000  # the most that goes into log.txt
# With less time left, in seconds, no job is started, whatever its estimate.
_LEAST = 5.0


class Results:
    """results.jsonl: a line for the run, then one per job; the last one of a job counts."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "results.jsonl"
        self.log = folder / "log.txt"
        self._logged = 0
        self.header: dict[str, object] = {}
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        if self.file.exists():
            self._read()

    def _read(self) -> None:
        text = self.file.read_text()
        if text and not text.endswith("\n"):
            self._append(self.file, "\n")  # end the line that an interruption cut off
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line that was cut off
            try:
                outcome = Outcome(**record) if "stage" in record else None
            except TypeError:
                what = f"{self.file} has a line that is not a result: {line[:80]}"
                raise ValueError(what) from None
            if outcome is None:
                self.header = record
            else:
                self.outcomes[outcome.key] = outcome

    def begin(self, header: dict[str, object]) -> None:
        self.header = header
        self._append(self.file, json.dumps(header) + "\n")

    def add(self, outcome: Outcome, printed: str = "") -> None:
        """Write one outcome down before anything else runs."""
        self.outcomes[outcome.key] = outcome
        self._append(self.file, json.dumps(outcome.as_dict()) + "\n")
        if printed.strip() and self._logged < _LOG_BYTES:
            text = f"==== {outcome.stage}: {outcome.name}: {outcome.status}\n{printed}\n"
            self._logged += len(text)
            self._append(self.log, text)

    def _append(self, file: Path, text: str) -> None:
        with file.open("a") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())


class Runner:
    """Gives jobs to workers; those that measure time run one by one. A worker is started early, so
    that its imports overlap with the previous job. In a rehearsal, where no CUDA error can poison
    it, it is reused.
    """

    def __init__(
        self,
        results: Results,
        deadline: float,
        rehearse: bool,
        together: int,
        after: Callable[[Outcome], None],
    ) -> None:
        self._results = results
        self._deadline = deadline
        self._rehearse = rehearse
        self._together = together
        self._after = after
        self._waiting: list[Worker] = []
        self._workers: list[Worker] = []
        self._lock = threading.Lock()
        self._written = threading.Lock()

    def left(self) -> float:
        return self._deadline - time.monotonic()

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the remaining jobs in order; neighbours run together where they may."""
        todo = [job for job in jobs if not self._done(job)]
        try:
            for group in _groups(todo):
                if group[0].alone:
                    self._run_one(group[0])
                    continue
                self._run_together(group)
        finally:
            for worker in self._workers:
                worker.close()

    def _run_together(self, group: list[Job]) -> None:
        with ThreadPoolExecutor(self._together) as pool:
            try:
                list(pool.map(self._run_one, group))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()  # else the threads would wait for their workers
                raise

    def _stop(self) -> None:
        with self._lock:
            for worker in self._workers:
                worker.stop()

    def _done(self, job: Job) -> bool:
        found = self._results.outcomes.get(job.key)
        return found is not None and found.status == "ok"

    def _run_one(self, job: Job) -> None:
        had: dict[str, object] = {}
        while True:
            if job.goes_on:
                before = self._results.outcomes.get(job.key)
                had = before.result if before else {}
                job = replace(job, arguments={**job.arguments, "before": had})
            outcome, printed = self._tried(job)
            with self._written:
                self._results.add(outcome, printed)
                self._after(outcome)
            more = outcome.result != had
            if not (job.goes_on and more and outcome.status in ("failed", "timed out")):
                return

    def _tried(self, job: Job) -> tuple[Outcome, str]:
        """A job's outcome and the end of its output; if there is no time for it, its earlier
        results."""
        left = self.left()
        if left < max(job.seconds, _LEAST):
            need = f"needs about {job.seconds:.0f} s, {max(left, 0):.0f} s were left"
            had = job.arguments.get("before", {})
            return Outcome(job.stage, job.name, "left out", result=had, reason=need), ""
        worker = self._take(job.environment)
        outcome, printed = worker.run(job, min(job.limit, left))
        if outcome.status == "timed out" and left < job.limit:
            outcome = replace(outcome, status="left out", reason="the time ran out")
        self._give_back(worker)
        return outcome, printed

    def _take(self, environment: dict[str, str]) -> Worker:
        with self._lock:
            fitting = [w for w in self._waiting if w.environment == environment and w.alive]
            for worker in fitting[:1]:
                self._waiting.remove(worker)
            if not self._rehearse and len(fitting) <= 1 and self.left() > _LEAST:
                self._waiting.append(self._started(environment))
            return fitting[0] if fitting else self._started(environment)

    def _started(self, environment: dict[str, str]) -> Worker:
        self._workers.append(Worker(environment, self._rehearse))
        return self._workers[-1]

    def _give_back(self, worker: Worker) -> None:
        if self._rehearse and worker.alive:
            with self._lock:
                self._waiting.append(worker)
            return
        worker.close()
        with self._lock:
            self._workers.remove(worker)


def _groups(jobs: Iterable[Job]) -> list[list[Job]]:
    """Groups of adjacent jobs of one stage that may run together; each other job by itself."""
    groups: list[list[Job]] = []
    for job in jobs:
        last = groups[-1][-1] if groups else None
        if last is None or job.alone or last.alone or last.stage != job.stage:
            groups.append([job])
        else:
            groups[-1].append(job)
    return groups
