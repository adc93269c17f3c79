"""From results to report and tables."""

from __future__ import annotations

from pathlib import Path

from bench.gpu import publish, report
from bench.gpu.job import Outcome
from bench.gpu.runner import Results
from bench.report import filled


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
        made = publish.tables(publish.FOLDER)
        assert filled(document, publish.MARKERS, made) == text, document.name


def test_the_report_names_what_went_wrong() -> None:
    outcomes = [
        Outcome("smoke", "a", "left out", reason="no time"),
        Outcome("smoke", "b", "wrong", reason="dx is off"),
    ]
    text = report.whole({"device": "x"}, {o.key: o for o in outcomes})
    assert text.index("wrong: smoke, b: dx is off") < text.index("left out: smoke, a: no time")


def test_a_report_leaves_out_what_was_compiled_in_vain() -> None:
    outcomes = [
        Outcome("operators", "a: ours, compile", "does not fit", reason="beside others"),
        Outcome("operators", "a: ours", "ok"),
        Outcome("operators", "b: ours, compile", "failed", reason="no compiler"),
    ]
    found = report.missing({o.key: o for o in outcomes})
    assert found[2:-1] == ["- failed: operators, b: ours, compile: no compiler"]
