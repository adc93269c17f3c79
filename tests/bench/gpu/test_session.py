"""`bench gpu`: a rehearsal on a CPU, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.gpu import publish, runner, session
from bench.gpu.device import StandIn
from bench.gpu.job import Job
from bench.gpu.runner import Results
from bench.gpu.stages import STAGES, jobs_of
from encnet_triton.kernels.runtime import tuned
from tests.bench.gpu.in_process import InProcess

ROOT = Path(__file__).parents[3]
# What these do is to start processes.
STARTERS = ("bench.gpu.smoke:ranks", "bench.gpu.suite:run", "bench.gpu.training:train")


def report_of(out: Path, jobs: list[Job]) -> str:
    """Of a rehearsal in which every job ended well, or was left out because it is one."""
    outcomes = Results(out).outcomes
    assert set(outcomes) == {job.key for job in jobs}
    left = {o.reason for o in outcomes.values() if o.status != "ok"}
    known = ("a rehearsal skips it", "a Triton kernel, which needs a GPU")
    assert all(any(why in reason for why in known) for reason in left)
    text = (out / "report.md").read_text()
    assert "no figure here comes from a GPU" in text
    assert all(one in text for one in StandIn.stands_for)
    return text


def test_what_one_process_can_rehearse(tmp_path, monkeypatch) -> None:
    """`make verify` rehearses the jobs that start processes or need Triton's interpreter, too."""

    def jobs(*given: Any) -> list[Job]:
        return [j for j in jobs_of(*given) if not j.environment and j.function not in STARTERS]

    monkeypatch.setattr(session, "jobs_of", jobs)
    monkeypatch.setattr(runner, "Worker", InProcess)
    monkeypatch.setattr(session.signal, "signal", lambda *_: None)
    assert main(["gpu", "--rehearse", "--out", str(tmp_path / "out")]) == 0
    text = report_of(tmp_path / "out", jobs(list(STAGES), True, None))
    sections = {line.removeprefix("## ") for line in text.splitlines()}
    assert {"Smoke", "Operators", "Training step", "Profile"} <= sections


@pytest.mark.verify
def test_a_rehearsal_goes_through_all_stages(tmp_path) -> None:
    out = tmp_path / "out"
    run = [sys.executable, "-m", "bench", "gpu", "--rehearse", "--out", str(out)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    text = report_of(out, jobs_of(list(STAGES), True, None))
    assert Results(out).outcomes["tests", "part 1 of 1"].result["passed"] >= 5
    sections = {"Smoke", "Operators", "Tests", "Training step", "Configurations", "Profile"}
    assert {*sections, "Training"} <= {line.removeprefix("## ") for line in text.splitlines()}
    made = tuned.read(out / "tuned" / "rehearsal.json")
    assert {entry.problem.name for entry in made.entries} == {"encode forward", "encode backward"}
    assert all(file.stat().st_size < publish.LARGEST for file in out.rglob("*"))


def test_every_job_has_its_own_name_and_a_limit_above_what_it_takes() -> None:
    jobs = jobs_of(list(STAGES), False, Path("cifar"))
    assert len({job.key for job in jobs}) == len(jobs)
    assert all(job.seconds <= job.limit for job in jobs)
    assert [j.stage for j in jobs] == sorted((j.stage for j in jobs), key=list(STAGES).index)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rehearse"], "--out must name a folder"),
        (["--out", "{folder}", "--rehearse"], "exists: add --resume, or choose another --out"),
        (["--rehearse", "--out", "{folder}/results.jsonl"], "results.jsonl is a file"),
        (["--rehearse", "--out", "{folder}", "--minutes", "-1"], "must be above 0, got -1"),
        (["--rehearse", "--out", "{folder}", "--minutes", "nan"], "must be above 0, got nan"),
        (["--rehearse", "--out", "{folder}", "--cifar", "{folder}/no"], "must name a folder"),
        (["--publish", "{folder}"], "holds a rehearsal; only results of a GPU are published"),
        (["--publish", "{folder}/nothing"], "holds no results.jsonl"),
    ],
)
def test_bad_requests_get_a_sentence(arguments, said, tmp_path, capsys) -> None:
    Results(tmp_path).begin({"device": "rehearsal", "rehearsal": True})
    assert main(["gpu", *(a.format(folder=tmp_path) for a in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_results_of_another_machine_are_not_continued(tmp_path, capsys) -> None:
    Results(tmp_path).begin({"device": "NVIDIA H100", "rehearsal": False})
    assert main(["gpu", "--rehearse", "--resume", "--out", str(tmp_path)]) == 2
    assert "was made by NVIDIA H100" in capsys.readouterr().err
