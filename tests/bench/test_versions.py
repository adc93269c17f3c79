"""`bench versions` writes each result at once, repeats none, and makes a table of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import versions
from bench.__main__ import main
from bench.versions import STAGES, Pair, Row

PAIR = Pair("2.13.0", "3.9.0", sys.executable)
INSTEAD = {"call": "backward bfloat16 C8", "config": "n32", "why": "spills 96 bytes", "next": "n16"}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that were run, each at once and with a result given by its name."""
    stages: list[str] = []

    def make(pair: Pair, place: Path, stage: str) -> Row:
        stages.append(stage)
        if stage == "compile encode":
            return {"kernels": 7, "instead": [INSTEAD]}
        if stage.startswith("compile"):
            return {"kernels": 5, "instead": []}
        return {"passed": 3, "skipped": 0, "failed": ["test_x"] if "upsampling" in stage else []}

    monkeypatch.setattr(versions, "make", make)
    monkeypatch.setattr(versions, "sources", lambda: "abc")
    monkeypatch.setattr(versions, "triton_of", lambda folder, triton, python: tmp_path)
    return stages


def test_a_second_run_does_what_is_missing(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions.run_pair(PAIR, tmp_path, STAGES, redo=False)
    assert made == list(STAGES)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == list(STAGES)
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    made.clear()
    versions.run_pair(PAIR, tmp_path, STAGES, redo=False)
    assert made == [STAGES[-1]]
    monkeypatch.setattr(versions, "sources", lambda: "def")
    versions.run_pair(PAIR, tmp_path, STAGES, redo=False)
    assert made == [STAGES[-1], *STAGES]


def test_the_table_says_what_failed_and_what_comes_instead(tmp_path: Path, made: list[str]) -> None:
    versions.run_pair(PAIR, tmp_path, STAGES, redo=False)
    document = tmp_path / "versions.md"
    document.write_text("before\n" + "old\n".join(versions.MARKERS) + "after\n")
    versions.publish(tmp_path / "results.jsonl", document)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 2.13.0 | 3.9.0 |" in text
    assert "| 7, 1 bad | 5, none bad | 5, none bad | 3 passed |" in text
    assert "| 3 passed, 1 failed | abc |" in text
    assert "backward bfloat16 C8: 'n32' spills 96 bytes; then comes 'n16'." in text
    assert "upsampling/test_plan.py: test_x failed." in text


def test_a_document_without_markers_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.md").write_text("text")
    with pytest.raises(ValueError, match="text.md has no part between"):
        versions.publish(tmp_path / "results.jsonl", tmp_path / "text.md")


def test_a_table_of_no_results_replaces_none(tmp_path: Path, capsys) -> None:
    document = tmp_path / "versions.md"
    document.write_text("old".join(versions.MARKERS))
    given = ["versions", "--table", "--folder", str(tmp_path / "new"), "--document", str(document)]
    assert main(given) == 2
    assert "there are no results for a table" in capsys.readouterr().err
    assert "old" in document.read_text() and not (tmp_path / "new").exists()


def test_the_documents_markers_are_there() -> None:
    text = (versions.ROOT / "docs" / "versions.md").read_text()
    assert all(text.count(marker) == 1 for marker in versions.MARKERS)


def test_the_sources_of_a_result_are_there() -> None:
    assert all(any(versions.ROOT.glob(pattern)) for pattern in versions.SOURCES)


def test_kernels_are_compiled_by_the_other_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"kernels": 7, "instead": []}
    monkeypatch.setattr(versions, "compiled_calls", lambda op: found | {"op": op})
    monkeypatch.setattr(versions, "_process", lambda command, _: main(command[3:]))
    assert versions.compile_apart(PAIR, tmp_path, "upsample") == found | {"op": "upsample"}
