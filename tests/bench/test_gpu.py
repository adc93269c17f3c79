"""`bench gpu` rehearsed on a CPU, its readers of other tools' words, and what it publishes."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.__main__ import main
from bench.cases import BUDGET
from bench.gpu import profiling, publish, report, suite, training
from bench.gpu.device import Gpu, StandIn
from bench.gpu.job import Outcome
from bench.gpu.runner import Results
from bench.gpu.stages import STAGES, jobs_of
from bench.passes import least_bytes
from encnet_triton.kernels.runtime import tuned

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_rehearsal_goes_through_all_stages(tmp_path) -> None:
    out = tmp_path / "out"
    run = [sys.executable, "-m", "bench", "gpu", "--rehearse", "--out", str(out)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    outcomes = Results(out).outcomes
    assert set(outcomes) == {job.key for job in jobs_of(list(STAGES), True, None)}
    left = {o.reason for o in outcomes.values() if o.status != "ok"}
    assert all("a rehearsal does without" in reason for reason in left)
    assert outcomes["tests", "part 1 of 1"].result["passed"] > 10
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


# The figures of DESIGN for bfloat16, in MB: encode 60.1 and 119.1; batch norm with residual and a
# packed mask 479 and 723; upsampling 36 and 53.
@pytest.mark.parametrize(
    ("operator", "megabytes"),
    [("encode", (60.1, 119.1)), ("batch_norm", (479.2, 722.5)), ("upsample", (35.7, 53.0))],
)
def test_least_bytes_of_the_budget_shapes(operator, megabytes) -> None:
    found = least_bytes(operator, 2, BUDGET[operator])
    assert tuple(round(b / 1e6, 1) for b in found) == megabytes


def test_ncu_is_read() -> None:
    (kernel,) = profiling.read_ncu(profiling.SAMPLE_NCU)
    assert kernel == {
        "kernel": "a_kernel", "grid": "(132, 1, 1)", "us": 1012.5, "memory %": 61.2,
        "registers": 244.0, "stalls": {"long_scoreboard": 7.5, "barrier": 1.25},
    }  # fmt: skip
    nanoseconds = profiling.SAMPLE_NCU.replace('"us","%"', '"ns","%"')
    assert profiling.read_ncu(nanoseconds)[0]["us"] == 1.0125
    assert profiling.read_ncu("==ERROR== ERR_NVGPUCTRPERM\n") == []


@pytest.mark.parametrize(
    ("printed", "errors"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= ERROR SUMMARY: 12 errors\n", 12),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n", 1),
        ("========= Error: Device not supported\n", None),
    ],
)
def test_the_sanitizers_count_is_read(printed, errors) -> None:
    assert profiling.read_sanitizer(printed) == errors


def test_junit_files_are_read(tmp_path) -> None:
    file = tmp_path / "junit.xml"
    file.write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/>'
        '<testcase classname="a" name="bad"><failure message="assert 1 == 2&#10;more"/></testcase>'
        '<testcase classname="a" name="other"><skipped message="needs two GPUs"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert suite.read(file) == {
        "tests": 3,
        "passed": 1,
        "failed": {"a::bad": "assert 1 == 2"},
        "skipped": {"needs two GPUs": 1},
    }


def test_a_report_leaves_out_what_was_compiled_in_vain() -> None:
    outcomes = [
        Outcome("operators", "a: ours, compile", "does not fit", reason="beside others"),
        Outcome("operators", "a: ours", "ok"),
        Outcome("operators", "b: ours, compile", "failed", reason="no compiler"),
    ]
    found = report.missing({o.key: o for o in outcomes})
    assert found[2:-1] == ["- failed: operators, b: ours, compile: no compiler"]


def test_parts_of_the_tests_are_all_tests_once(monkeypatch) -> None:
    left_out: list[object] = []
    config = SimpleNamespace(
        hook=SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    )
    kept = []
    for part in range(3):
        monkeypatch.setenv("ENCNET_TEST_PART", f"{part}/3")
        items = list("abcdefgh")
        suite.pytest_collection_modifyitems(config, items)
        kept += items
    assert sorted(kept) == list("abcdefgh") and len(left_out) == 2 * 8


def test_a_run_is_read_from_its_metrics() -> None:
    records = [
        {"kind": "start", "step": 0},
        {"kind": "train", "step": 20, "images_per_second": None},
        {"kind": "train", "step": 40, "images_per_second": 90.0},
        {"kind": "val", "step": 40, "miou": 0.9, "pixel_accuracy": 0.95},
    ]
    found = training.read("\n".join(map(json.dumps, records)))
    assert found == {"step": 40, "images/s": 90.0, "miou": 0.9, "pixel_accuracy": 0.95}


def measured(us: float) -> dict[str, object]:
    times = {"us": us / 2, "host us": 100.0}
    both = {"us": us, "host us": 200.0}
    return {"forward": times, "both": both, "backward us": us / 2, "extra MiB": 1.0,
            "least bytes": [60_000_000, 119_000_000]}  # fmt: skip


def published(tmp_path: Path) -> tuple[Path, Path]:
    """Results of two calls on one machine; the second measured one thing again."""
    folders = tmp_path / "first", tmp_path / "second"
    for folder, us in zip(folders, (200.0, 100.0), strict=True):
        folder.mkdir()
        results = Results(folder)
        results.begin({"device": "NVIDIA H100 80GB", "machine": "torch x", "date": "2027-01-01"})
        results.add(Outcome("operators", "encode C512 K32: ours", "ok", 1.0, measured(us)))
    peer = "encode C512 K32: materialising, eager"
    results.add(Outcome("operators", peer, "ok", 1.0, measured(900.0)))
    results.add(Outcome("smoke", "limits", "ok", 1.0, {"copy GB/s": 3000.0}))
    return folders


def test_results_of_one_machine_are_joined_and_make_the_tables(tmp_path) -> None:
    docs = tmp_path / "docs"
    target = publish.publish(published(tmp_path), docs, tmp_path / "tuned")
    assert target.name == "nvidia-h100-80gb"
    table = publish.tables(docs)
    assert "encode C512 K32 | 100.0 us | 900.0 us (materialising, eager) | 9.00x |" in table
    text = (target / "report.md").read_text()
    # 60 MB in 50 us are 1200 GB/s, 40 % of the copy; the bytes at the copy's rate take 20 us.
    row = next(line for line in text.splitlines() if line.startswith("| ours"))
    assert "| 50.0 / 50.0 |" in row and "| 1200 / 2380 | 40% / 79% | 2.50x / 1.26x |" in row


def test_documents_hold_what_the_results_say() -> None:
    for document in publish.DOCUMENTS:
        text = document.read_text()
        assert publish.filled(text, publish.tables(publish.FOLDER)) == text, document.name


def test_the_report_names_what_went_wrong() -> None:
    outcomes = [
        Outcome("smoke", "a", "left out", reason="no time"),
        Outcome("smoke", "b", "wrong", reason="dx is off"),
    ]
    text = report.whole({"device": "x"}, {o.key: o for o in outcomes})
    assert text.index("wrong: smoke, b: dx is off") < text.index("left out: smoke, a: no time")


class FakeCuda:
    """As much of torch.cuda as `Gpu` calls, with a clock of its own: a replay takes 2 ms."""

    def __init__(self, capture: bool) -> None:
        self.now, self.log, self.can_capture = 0.0, [], capture
        self.Event, self.Stream, self.CUDAGraph = self.event, self.current_stream, self.graph_object
        self.profiler = SimpleNamespace(
            start=lambda: self.log.append("start"), stop=lambda: self.log.append("stop")
        )

    def event(self, enable_timing: bool) -> object:
        mark = SimpleNamespace()
        mark.record = lambda: setattr(mark, "at", self.now)
        mark.elapsed_time = lambda other: other.at - mark.at
        return mark

    def graph_object(self) -> object:
        def replay() -> None:
            self.now += 2.0

        return SimpleNamespace(replay=replay)

    def current_stream(self) -> object:
        return SimpleNamespace(wait_stream=lambda other: None)

    def stream(self, side: object) -> object:
        return nullcontext()

    def graph(self, graph: object, stream: object) -> object:
        if not self.can_capture:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return nullcontext()

    def synchronize(self) -> None:
        self.log.append("wait")

    def reset_peak_memory_stats(self) -> None: ...

    def memory_allocated(self) -> int:
        return 100

    def max_memory_allocated(self) -> int:
        return 740


@pytest.mark.parametrize("capture", [True, False])
def test_a_gpu_replays_graphs_and_says_when_it_cannot(capture, monkeypatch) -> None:
    fake = FakeCuda(capture)
    monkeypatch.setattr(torch, "cuda", fake)
    gpu = Gpu()
    gpu.kind = "cpu"  # where the memory of the flush is taken

    def call() -> None:
        fake.now += 5.0

    times = gpu.times(call, seconds=0.0, host_calls=2)
    assert times.median == (2.0 if capture else 5.0) and times.repeats == 10
    note = "launched, not replayed: operation not permitted when stream is capturing"
    assert times.note == ("" if capture else note)
    assert gpu.extra_memory(call) == 640
    fake.log.clear()
    gpu.profile(lambda: fake.log.append("call"))
    assert fake.log == ["wait", "start", "call", "wait", "stop"]


def test_clocks_are_read_from_nvidia_smi(monkeypatch) -> None:
    line = "580.10, 1980 MHz, 3201 MHz, 1980 MHz, 35\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=line))
    assert Gpu().clocks()["clocks.sm"] == "1980 MHz"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="No devices"))
    assert Gpu().clocks() == {}
