"""The folder of a run: its lock, its configuration, and whether the run is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from encnet_triton.files import make_folder, remove_leftovers, write_json
from encnet_triton.train.config import SECTIONS, Config, ConfigError, changed_fields
from encnet_triton.train.distributed import World, gather
from encnet_triton.train.run_lock import RunLock
from encnet_triton.train.run_state import LAST

RESULT = "result.json"
_REFUSED = "refused"  # its only key where the run did not begin


def folder_of(config: Config) -> Path:
    """Where a run's files are."""
    return Path(config.run.runs) / config.run.name


def open_folder(config: Config, world: World) -> Path:
    """The run's folder; refused if a run is there already and --resume was not given."""
    folder = free_folder(config)
    if world.main:
        make_folder(folder, "the run's folder")
    return folder


def free_folder(config: Config) -> Path:
    """Like `open_folder`, but does not create it."""
    folder = folder_of(config)
    try:
        there = any((folder / name).exists() for name in ("config.json", LAST))
        taken = there and not config.run.resume
    except OSError as error:  # a name that is too long
        raise ConfigError(f"run {folder} cannot be looked at ({error.strerror})") from error
    if any(gather(taken)):
        raise ConfigError(f"run {folder} exists; add --resume to continue, or give another --name")
    return folder


@contextmanager
def locked(folder: Path, config: Config, world: World) -> Iterator[RunLock | None]:
    """Inside, only this run writes to its folder; leftovers of dead processes are removed.

    Yields the lock, on the main rank.

    Raises:
        ConfigError: another process writes there; on all ranks.
    """
    lock, refusal = None, ""
    if world.main:
        try:
            lock = RunLock(folder, world.job, config.run.take_over, world.watch.end)
        except ConfigError as error:
            refusal = str(error)
    try:
        refusal = gather(refusal)[0]
        if refusal:
            raise ConfigError(refusal)
        if lock is not None:
            world.watch.before_end(lock.release)
            for place in (folder, folder / "predictions"):
                remove_leftovers(place)
        yield lock
    finally:
        if lock is not None:
            lock.release()


def write_config(config: Config, folder: Path) -> None:
    """Write ``config.json`` atomically; not before a resumed run has accepted the configuration."""
    write_json(config.as_dict(), folder / "config.json")


def note_refusal(config: Config, world: World, reason: str) -> None:
    """Write why a run did not begin into its result file, unless that holds another run's."""
    folder = folder_of(config)
    if world.main and not (folder / "config.json").exists():
        make_folder(folder, "the run's folder")
        write_json({_REFUSED: reason}, folder / RESULT)


def finished(config: Config) -> bool:
    """Whether this run is complete.

    Raises:
        ConfigError: it is, but was made with other values of fields that alter a run.
    """
    folder = folder_of(config)
    if not (folder / RESULT).is_file():
        return False
    try:
        if _REFUSED in json.loads((folder / RESULT).read_text(encoding="utf-8")):
            return False
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        then = {key: value for section in SECTIONS for key, value in saved[section].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"run {folder} has a {RESULT}, but it or its config.json is damaged or not "
            "there; give another --name"
        ) from error
    now = config.fingerprint()
    changed = changed_fields({key: value for key, value in then.items() if key in now}, now)
    if changed:
        key = changed[0]
        raise ConfigError(
            f"run {folder} is complete, but with {key} = {then.get(key)!r} where it is now "
            f"{now[key]!r}; give another --name"
        )
    return True
