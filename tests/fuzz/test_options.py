"""Options of the trainer with values that no one meant: a run, or one sentence.

The configurations alone are in test_command_line.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from encnet_triton.train.__main__ import main
from encnet_triton.train.config import all_fields
from tests.support.mutations import WORDS

# What may take long or need much memory where it is neither small nor absurd, and what writes to or
# reads from elsewhere.
SIZES = ("crop", "base_size", "head_channels", "num_codewords", "num_convs", "width", "pictures",
         "warmup_steps", "batch_size", "accumulation", "workers")  # fmt: skip
ELSEWHERE = ("runs", "name", "compile", "device", "data", "pretrained", "init_from")


def words(rng: random.Random) -> list[str]:
    """Some options, most of them of one kind of mistake."""
    given: list[str] = []
    fields = [name for name in all_fields() if name not in ELSEWHERE]
    for name in rng.sample(fields, rng.choice((1, 1, 2, 3, 6))):
        value = rng.choice(WORDS)
        if name in SIZES and len(value) > 4 and value.isdigit():
            value = "9" * 30
        given.append(f"--{name.replace('_', '-')}={value}")
    return given


def test_running(
    seeds: Iterator[int], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A step of a small network, or its dry run."""
    monkeypatch.chdir(tmp_path)
    for seed in seeds:
        rng = random.Random(seed)
        options = [*words(rng), "--recipe", str(recipe), "--name", f"run{seed}"]
        given = {option.split("=")[0] for option in options}
        for name, value in (("stop-at", "1"), ("pictures", "0"), ("workers", "0")):
            if f"--{name}" not in given:
                options.append(f"--{name}={value}")
        if rng.random() < 0.2:
            options.append("--dry-run")
        status = main(options)
        said = capsys.readouterr().err
        assert status in (0, 2), (seed, options)
        errors = [line for line in said.splitlines() if "error" in line.lower()]
        assert len(errors) == (status == 2), (seed, options, said)
