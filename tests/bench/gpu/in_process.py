"""A worker of `bench gpu` without a process of its own."""

from __future__ import annotations

from bench.gpu import worker
from bench.gpu.job import Job, Outcome


class InProcess:
    """Runs jobs of a rehearsal here; in place of `runner.Worker`."""

    alive = True

    def __init__(self, environment: dict[str, str], rehearse: bool) -> None:
        self.environment = environment

    def run(self, job: Job, limit: float) -> tuple[Outcome, str]:
        found = worker.run(job.function, job.arguments, rehearse=True)
        return Outcome(job.stage, job.name, **found), ""

    def close(self) -> None: ...
