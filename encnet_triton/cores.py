"""How many processors this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["usable_cores"]


def usable_cores(
    membership: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> int:
    """Processors that the affinity and the control groups of this process allow, at least 1.

    A container's limit (``docker --cpus``, a Kubernetes limit) does not change the affinity: all of
    the host's cores seem usable, but a process that uses them is paused for most of the time.

    Args:
        membership: file that names the control groups of this process.
        mounted: where control groups are mounted, version 2 or 1.
    """
    return max(1, int(min([_allowed(), *_limits(membership, mounted)])))


def _allowed() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13; heeds PYTHON_CPU_COUNT
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _limits(membership: Path, mounted: Path) -> Iterator[float]:
    """The limits of this process's control group and of those above it."""
    try:
        lines = [os.fsdecode(line) for line in membership.read_bytes().splitlines()]
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mounted / "cpu" if controllers else mounted
        # In a container the names may be those of the host, whose folders are not there.
        own = root / name.lstrip("/")
        for folder in [own, *(above for above in own.parents if above.is_relative_to(root)), root]:
            yield from _limit(folder)


def _limit(folder: Path) -> Iterator[float]:
    """How many processors one control group may use, if it has a limit."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
        share = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return  # there is no such group, or its quota is "max"
    if share > 0:  # -1 is none, in version 1
        yield share
