"""One process writes to a run's folder."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest

from encnet_triton.train import run_lock
from encnet_triton.train.__main__ import main
from encnet_triton.train.config import ConfigError
from encnet_triton.train.run_lock import LOCK, RunLock, read, start_of


def take(folder: Path, job: str = "", take_over: bool = False) -> RunLock:
    return RunLock(folder, job, take_over, lambda sentence: None)


def assert_free(folder: Path) -> None:
    lock = take(folder)
    assert lock.held()
    lock.release()


def leave(folder: Path, **changes: object) -> None:
    """A lock as it is left by this process, but for some changes."""
    lock = take(folder)
    lock._over.set()
    (folder / LOCK).write_text(json.dumps({**read(folder / LOCK), **changes}))


def refused(folder: Path, process: object = os.getpid(), host: str = socket.gethostname()) -> None:
    sentence = f"is being written by process {process} on host {host}; .* --take-over"
    with pytest.raises(ConfigError, match=sentence):
        take(folder)


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    first = take(tmp_path)
    refused(tmp_path)
    assert first.held()
    first.release()
    second = take(tmp_path)
    first.release()  # once more: it is no longer its own
    assert second.held()
    second.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_process_that_is_gone_or_whose_number_another_has_holds_nothing(tmp_path: Path) -> None:
    leave(tmp_path, process=2**22 + 1)  # beyond what Linux gives
    assert_free(tmp_path)
    leave(tmp_path, start=start_of(1))
    assert_free(tmp_path)
    leave(tmp_path, process=None, start=None)
    assert_free(tmp_path)


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"machine": "a container"}])
def test_a_process_elsewhere_is_gone_after_five_minutes(
    tmp_path: Path, other: dict[str, str]
) -> None:
    leave(tmp_path, **other)
    refused(tmp_path, host=other.get("host", socket.gethostname()))
    for seconds in (280, 320):
        then = (tmp_path / LOCK).stat().st_mtime - seconds
        os.utime(tmp_path / LOCK, (then, then))
        if seconds < 300:
            refused(tmp_path, host=other.get("host", socket.gethostname()))
    assert_free(tmp_path)


def test_processes_that_the_same_torchrun_starts_again_go_on_at_once(tmp_path: Path) -> None:
    leave(tmp_path, host="elsewhere", job="one")
    with pytest.raises(ConfigError):
        take(tmp_path, job="another")
    take(tmp_path, job="one").release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"process": "x", "host": [1]}', "[" * 100_000])
def test_a_damaged_lock_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(ConfigError, match="is being written by process .* add --take-over"):
        take(tmp_path)
    take(tmp_path, take_over=True).release()


def test_a_full_disk_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        take(tmp_path)
    assert not list(tmp_path.iterdir())


def test_who_is_taken_over_learns_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_EVERY", 0.01)
    told, heard = [], threading.Event()
    first = RunLock(tmp_path, "", False, lambda sentence: (told.append(sentence), heard.set()))
    second = take(tmp_path, take_over=True)
    assert heard.wait(30) and not first.held() and second.held()
    assert told[0].startswith(f"run {tmp_path} was taken over by process {os.getpid()} on host ")
    first.release()
    assert second.held()
    second.release()


def test_a_folder_that_is_gone_is_not_said_to_be_anybodys(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = take(folder)
    (folder / LOCK).unlink()
    folder.rmdir()
    assert not lock.held()
    assert lock.taken() == (
        f"{folder / LOCK} is gone (was the folder moved or deleted?); this process ends"
    )
    lock.release()
    assert not folder.exists()


def test_a_run_is_locked_while_it_is_trained(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--recipe", str(recipe), "--stop-at", "1", "--pictures", "0"]
    folder = Path("runs/tiny")
    folder.mkdir(parents=True)
    other = take(folder)
    assert main(arguments) == 2
    assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
    assert other.held() and not (folder / "config.json").exists()
    left = folder / f".last.safetensors.{2**22 + 1}.tmp"  # of a process that was killed
    left.write_text("half")
    assert main([*arguments, "--take-over"]) == 0
    assert not left.exists() and not (folder / LOCK).exists()


def test_a_run_that_was_taken_over_saves_no_more(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunLock, "held", lambda self: False)
    assert main(["--recipe", str(recipe), "--stop-at", "1"]) == 2
    assert "runs/tiny was taken over" in capsys.readouterr().err
    assert not Path("runs/tiny/last.safetensors").exists()
