"""The tests in parts, and what pytest writes about them."""

from __future__ import annotations

from types import SimpleNamespace

from bench.gpu import suite


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
