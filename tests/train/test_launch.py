"""Nothing of what a test starts outlives it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import runs
from tests.train.launch import ended_well, running

# As torchrun starts its processes: in a session of its own. This one does not heed SIGTERM.
STARTS_ANOTHER = """
import subprocess, sys
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)"
code += "; time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_command_that_takes_too_long_is_killed_with_what_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(AssertionError, match="(?s)still running after 0 s.*up"),
        running([sys.executable, "-c", STARTS_ANOTHER], log) as process,
    ):
        while "up" not in log.read_text() and process.poll() is None:
            time.sleep(0.02)
        child = next(int(line) for line in log.read_text().split() if line.isdigit())
        assert runs(process.pid) and runs(child)
        ended_well(process, log, seconds=0)
    deadline = time.monotonic() + 60  # the system takes a moment
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not runs(process.pid) and not runs(child)
