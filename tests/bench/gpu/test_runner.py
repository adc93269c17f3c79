"""The runner of `bench gpu`: one job's end is not another's, and nothing is lost or left behind."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from bench.gpu import runner
from bench.gpu.job import Job, Outcome, Status
from bench.gpu.processes import Worker
from bench.gpu.runner import Results, Runner, _groups
from bench.gpu.session import plan
from tests.bench.gpu.in_process import InProcess
from tests.support.processes import runs


def job(name: str, **options: object) -> Job:
    function = f"tests.bench.gpu.planted_jobs:{name}"
    return Job(stage="planted", name=name, function=function, **{"seconds": 0, **options})


def run(folder: Path, jobs: list[Job], seconds: float = 600.0) -> list[Outcome]:
    seen: list[Outcome] = []
    results = Results(folder)
    Runner(results, time.monotonic() + seconds, True, 2, seen.append).run(jobs)
    return seen


@pytest.mark.slow
def test_each_end_of_a_job_is_told_and_the_next_job_runs(tmp_path) -> None:
    names = ("wrong", "left_out", "fails", "out_of_memory", "dies", "fine")
    arguments = {"n": 3}
    outcomes = run(tmp_path, [job(name, alone=True, arguments=arguments) for name in names])
    told = {o.name: (o.status, o.reason) for o in outcomes}
    assert list(told) == list(names)
    assert told["wrong"] == ("wrong", "dx is off by 1.0e+00")
    assert told["left_out"] == ("left out", "there is no such tool")
    cuda = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert told["fails"] == ("failed", cuda)
    assert told["out_of_memory"][0] == "does not fit" and "96.00 GiB" in told["out_of_memory"][1]
    assert told["dies"] == ("failed", "the process ended with SIGABRT: Aborted by the driver")
    assert outcomes[-1].result == {"given": arguments, "rehearse": True}
    # What a run wrote down is what the next one reads, and the log shows why a job failed.
    again = Results(tmp_path)
    assert [o.status for o in again.outcomes.values()] == [o.status for o in outcomes]
    assert "RuntimeError: CUDA error" in (tmp_path / "log.txt").read_text()


def test_a_job_that_hangs_is_ended_with_all_it_started(tmp_path) -> None:
    file = tmp_path / "pid"
    before = set(os.listdir("/proc/self/fd"))
    made = Worker({}, rehearse=True)
    made.run(job("fine"), 120.0)  # now its imports are done
    outcome, _ = made.run(job("hangs", arguments={"file": str(file)}), 2.0)
    assert (outcome.status, outcome.reason) == ("timed out", "ended after 2 s")
    assert outcome.result == {"found": 2}
    pid = int(file.read_text())
    assert pid != os.getpid() and not runs(pid)
    made.close()
    assert set(os.listdir("/proc/self/fd")) == before


class Scripted:
    """A worker whose jobs have one more thing each time, and end with what the script says."""

    script: list[Status] = []

    def __init__(self, *_: object) -> None:
        self.environment, self.alive = {}, True

    def run(self, job: Job, limit: float) -> tuple[Outcome, str]:
        status = self.script.pop(0)
        found = {**job.arguments["before"]}
        if status != "failed" or len(found) < 2:
            found[f"try {len(found) + 1}"] = status
        return Outcome(job.stage, job.name, status, result=found), ""

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("script", "tries"),
    [
        (["failed", "timed out", "ok"], 3),
        (["failed", "wrong"], 2),
        (["failed", "failed", "failed"], 3),  # the third found nothing more
        (["does not fit"], 1),
    ],
    ids=str,
)
def test_a_job_that_goes_on_is_tried_again_while_it_finds_more(
    script, tries, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(runner, "Worker", Scripted)
    Scripted.script = [*script, "ok"]
    outcomes = run(tmp_path, [job("fine", goes_on=True)])
    assert [o.status for o in outcomes] == script[:tries]
    assert Scripted.script == ["ok"]
    assert Results(tmp_path).outcomes["planted", "fine"].result == outcomes[-1].result
    # A later run begins with what this one had.
    if outcomes[-1].status != "ok":
        (again,) = run(tmp_path, [job("fine", goes_on=True)])
        assert again.result == {**outcomes[-1].result, f"try {len(outcomes[-1].result) + 1}": "ok"}


def test_resume_runs_what_did_not_end_well(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "Worker", InProcess)
    results = Results(tmp_path)
    results.begin({"device": "some GPU"})
    results.add(Outcome("planted", "fine", "failed", reason="the machine was taken away"))
    results.add(Outcome("planted", "wrong", "ok"))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"stage": "planted", "na')  # cut off while it was written
    outcomes = run(tmp_path, [job("wrong"), job("fine")])
    assert [(o.name, o.status) for o in outcomes] == [("fine", "ok")]


def test_a_cut_line_does_not_swallow_the_next_one(tmp_path) -> None:
    (tmp_path / "results.jsonl").write_text('{"device": "some GPU"}\n{"stage": "planted", "na')
    Results(tmp_path).add(Outcome("planted", "fine", "ok"))
    assert list(Results(tmp_path).outcomes) == [("planted", "fine")]


@pytest.mark.parametrize("line", ["3", '{"stage": "smoke", "new": 1}'])
def test_a_line_that_is_no_result_is_named(line: str, tmp_path) -> None:
    (tmp_path / "results.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="results.jsonl has a line that is not a result: "):
        Results(tmp_path)


def test_what_there_is_no_time_for_is_named(tmp_path) -> None:
    (outcome,) = run(tmp_path, [job("fine", seconds=30)], seconds=10.0)
    assert outcome.status == "left out"
    assert outcome.reason in ("needs about 30 s, 10 s were left", "needs about 30 s, 9 s were left")


def test_jobs_that_measure_time_run_alone() -> None:
    jobs = [job("a"), job("b"), job("c", alone=True), job("d", alone=True), job("e")]
    assert [[j.name for j in group] for group in _groups(jobs)] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_the_plan_says_what_fits() -> None:
    jobs = [job("a", seconds=20, alone=True), Job("later", "b", "m:f", seconds=40)]
    first, second = plan(jobs, 30, at_once=2)
    assert first.endswith("about   20 s: fits") and second.endswith("about   20 s: only 10 s left")


def test_records_are_small_lines_of_json(tmp_path) -> None:
    Results(tmp_path).add(Outcome("planted", "fine", "ok", 1.5, {"us": 3.0}))
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    wanted = {"stage": "planted", "name": "fine", "status": "ok", "seconds": 1.5}
    assert json.loads(line) == {**wanted, "result": {"us": 3.0}}
