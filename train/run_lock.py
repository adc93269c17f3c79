"""One writer per run: a file in the run's folder names the process that writes there."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from encnet_triton.files import naming
from encnet_triton.train.config import ConfigError

LOCK = "lock.json"

_EVERY = 10.0  # seconds between two touches of the file
_STALE = 300.0  # seconds without a touch after which a process of another host counts as gone


class RunLock:
    """Marks a folder as written by this process, until `release`. A leftover file is taken over if
    its process is gone: on this host, if no process has its number and start time; on another, if
    the file was not touched for five minutes. A file left by processes of the same torchrun is
    taken over too, because torchrun restarts only when those have ended.

    Args:
        folder: of the run; exists.
        job: names the torchrun that started this process, or "".
        take_over: take it even from a process that runs.
        lost: called with a sentence, in a thread, when another process has taken it.

    Raises:
        ConfigError: another process writes there; names its host and number.
    """

    def __init__(self, folder: Path, job: str, take_over: bool, lost: Callable[[str], Any]) -> None:
        self.path = folder / LOCK
        self._lost = lost
        self._own = {**_this_process(), "job": job, "id": uuid.uuid4().hex}
        while not self._make():
            self._remove(take_over)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Whether the file is still this process's."""
        return bool(read(self.path).get("id") == self._own["id"])

    def release(self) -> None:
        """Release the folder; safe to call twice."""
        self._over.set()
        if self.held():
            self.path.unlink(missing_ok=True)

    def _make(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with naming(self.path), open(descriptor, "w", encoding="utf-8") as file:
                json.dump(self._own, file)
        except OSError:
            self.path.unlink(missing_ok=True)  # of a full disk: a lock that names nobody
            raise
        return True

    def _remove(self, take_over: bool) -> None:
        """Remove the existing file if its process is gone."""
        found = read(self.path)
        for _ in range(5):
            if found:
                break
            time.sleep(0.1)  # just made, and not written yet
            found = read(self.path)
        if not (take_over or self._left(found)):
            host, process = found.get("host", "unknown"), found.get("process", "unknown")
            raise ConfigError(
                f"run {self.path.parent} is being written by process {process} on host {host}; "
                "stop that process first, give another --name, or add --take-over if it is gone"
            )
        # Rename it first: a file that another process has made since must not be removed.
        aside = self.path.with_name(f".{LOCK}.{os.getpid()}.tmp")
        with suppress(FileNotFoundError):
            os.replace(self.path, aside)
            if read(aside).get("id") != found.get("id"):
                with suppress(OSError):
                    os.link(aside, self.path)
            aside.unlink()

    def _left(self, found: dict[str, Any]) -> bool:
        """Whether the process that a lock names is gone."""
        if not found and not self.path.exists():
            return True
        own = self._own
        if own["job"] and found.get("job") == own["job"]:
            return True
        if found and all(found.get(key) == own[key] for key in ("host", "machine")):
            start = start_of(found.get("process"))
            return start is None or start != found.get("start")
        with suppress(OSError):
            return self._now() - self.path.stat().st_mtime > _STALE
        return False

    def _now(self) -> float:
        """The time by the clock of the file system."""
        probe = self.path.with_name(f".{LOCK}.now.{os.getpid()}.tmp")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _keep(self) -> None:
        """Touch the file; a thread, because a network file system may block."""
        missed = 0
        while not self._over.wait(_EVERY):
            try:
                os.utime(self.path)
                found = read(self.path)
            except OSError:
                found = {}
            missed = 0 if found.get("id") == self._own["id"] else missed + 1
            taken = bool(found) and missed > 0
            if (taken or missed > 2) and not self._over.is_set():
                self._lost(self.taken(found))
                return

    def taken(self, found: dict[str, Any] | None = None) -> str:
        """The sentence for a run whose folder is no longer this process's."""
        found = read(self.path) if found is None else found
        if not found:
            return f"{self.path} is gone (was the folder moved or deleted?); this process ends"
        by = f"process {found.get('process')} on host {found.get('host')}"
        return f"run {self.path.parent} was taken over by {by}; this process ends"


def read(path: Path) -> dict[str, Any]:
    """The content of a lock file; empty if it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _this_process() -> dict[str, Any]:
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "process": process,
        "start": start_of(process),
    }


def _machine() -> str:
    """Distinguishes hosts of the same name, and containers of one host, whose process numbers mean
    different processes."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def start_of(process: Any) -> str | None:
    """When a process of this host started, because numbers are reused; "?" if the system does not
    say, None if there is no such process."""
    if not isinstance(process, int) or process <= 0:
        return None
    try:
        # After the command in parentheses: state is field 3, the start field 22.
        fields = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:
        return "?"
    return "?"
