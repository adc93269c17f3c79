"""`bench gpu`: a rehearsal on a CPU, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.gpu import publish
from bench.gpu.device import StandIn
from bench.gpu.runner import Results
from bench.gpu.stages import STAGES, jobs_of
from encnet_triton.kernels.runtime import tuned

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_rehearsal_goes_through_all_stages(tmp_path) -> None:
    out = tmp_path / "out"
    run = [sys.executable, "-m", "bench", "gpu", "--rehearse", "--out", str(out)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    outcomes = Results(out).outcomes
    assert set(outcomes) == {job.key for job in jobs_of(list(STAGES), True, None)}
    left = {o.reason for o in outcomes.values() if o.status != "ok"}
    known = ("a rehearsal does without", "a Triton kernel, which needs a GPU")
    assert all(any(why in reason for why in known) for reason in left)
    assert outcomes["tests", "part 1 of 1"].result["passed"] >= 5
    text = (out / "report.md").read_text()
    assert "no figure here is one of a GPU" in text
    assert all(one in text for one in StandIn.stands_for)
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
        (["--out", "{folder}", "--rehearse"], "is there already: --resume, or another --out"),
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
