"""Damaged files in the folder of a resumed run: it continues, or there is a one-sentence error."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from encnet_triton.train.__main__ import main
from encnet_triton.train.config import ConfigError
from encnet_triton.train.recipe import build
from encnet_triton.train.run_folder import finished
from encnet_triton.train.run_lock import LOCK
from tests.support.mutations import altered, mutated

FILES = (
    "config.json",
    "metrics.jsonl",
    "last.safetensors",
    "best.safetensors",
    "result.json",
    LOCK,
)
LOCKED = {"host": "elsewhere", "process": 1, "start": "1", "machine": "", "job": "", "id": "x"}


def damage(path: Path, rng: random.Random) -> str:
    """Replace a file by another, a folder or a link, or remove it; returns what was done."""
    if path.name == LOCK:
        path.write_text(json.dumps(LOCKED))
    if not path.exists():
        path.touch()
    what = rng.choice(("bytes", "bytes", "values", "values", "empty", "gone", "folder", "link"))
    if what == "bytes":
        content = path.read_bytes() or b"{}"
        path.write_bytes(mutated(content, np.random.default_rng(rng.randrange(2**32))))
    elif what == "values" and path.suffix == ".json" and path.stat().st_size:
        path.write_text(json.dumps(altered(json.loads(path.read_text()), rng)))
    elif what == "values" and path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines()]
        place = rng.randrange(len(records))
        records[place] = altered(records[place], rng)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.unlink()
        if what == "empty":
            path.touch()
        elif what == "folder":
            path.mkdir()
        elif what == "link":
            path.symlink_to("nowhere")
    return f"{path.name}: {what}"


def test_damaged_run_folders(
    seeds: Iterator[int], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--recipe", str(recipe), "--pictures", "0"]
    assert main([*options, "--name", "good"]) == 0
    good = Path("runs/good")
    for seed in seeds:
        rng = random.Random(seed)
        run = f"run{seed}"
        folder = Path("runs", run)
        shutil.copytree(good, folder)
        files = rng.sample(FILES, rng.choice((1, 1, 2)))
        done = [damage(folder / name, rng) for name in files]
        capsys.readouterr()
        more = ["--epochs", "2"] if rng.random() < 0.5 else ["--resume"]
        status = main([*options, "--name", run, "--resume", *more])
        said = capsys.readouterr().err
        assert status in (0, 2), (seed, done)
        assert len(said.splitlines()) == (status == 2), (seed, done, said)
        try:
            finished(build(str(recipe), {"name": run}))
        except (ConfigError, OSError) as error:
            assert run in str(error), (seed, done)
        shutil.rmtree(folder)
