"""The processors that a process may use, by affinity and by control groups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from encnet_triton.cores import usable_cores


@pytest.fixture(autouse=True)
def twelve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 12, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)


def cores(tmp_path: Path, membership: str, files: dict[str, str]) -> int:
    (tmp_path / "cgroup").write_text(membership)
    for name, content in files.items():
        path = tmp_path / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return usable_cores(tmp_path / "cgroup", tmp_path / "mounted")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        pytest.param("0::/\n", {"cpu.max": "400000 100000\n"}, 4, id="container"),
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, 12, id="no limit"),
        pytest.param("0::/\n", {"cpu.max": "6400000 100000\n"}, 12, id="more than the affinity"),
        pytest.param("0::/\n", {"cpu.max": "250000 100000\n"}, 2, id="a fraction"),
        pytest.param("0::/\n", {"cpu.max": "50000 100000\n"}, 1, id="less than one"),
        pytest.param(
            "0::/job/step\n",
            {"job/cpu.max": "300000 100000", "job/step/cpu.max": "max 100000"},
            3,
            id="of the group above",
        ),
        pytest.param("0::/gone/host\n", {"cpu.max": "200000 100000"}, 2, id="the host's names"),
        pytest.param(
            "5:memory:/a\n4:cpu,cpuacct:/a/b\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "800000", "cpu/a/cpu.cfs_period_us": "100000",
             "cpu/a/b/cpu.cfs_quota_us": "-1\n", "cpu/a/b/cpu.cfs_period_us": "100000\n"},
            8,
            id="version 1",
        ),
        pytest.param("4:cpuset:/a\n", {"cpu/a/cpu.cfs_quota_us": "1"}, 12, id="another controller"),
        pytest.param("0::/\n", {"cpu.max": "what"}, 12, id="unknown words"),
    ],
)  # fmt: skip
def test_control_groups(
    tmp_path: Path, membership: str, files: dict[str, str], expected: int
) -> None:
    assert cores(tmp_path, membership, files) == expected


def test_a_group_may_have_a_name_in_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_bytes(b"0::/caf\xe9\n")
    group = tmp_path / "mounted" / os.fsdecode(b"caf\xe9")
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("300000 100000")
    assert usable_cores(tmp_path / "cgroup", tmp_path / "mounted") == 3


def test_without_control_groups_the_affinity_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert usable_cores(tmp_path / "none", tmp_path) == 12
    monkeypatch.delattr(os, "process_cpu_count")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert usable_cores(tmp_path / "none", tmp_path) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores(tmp_path / "none", tmp_path) == 96
