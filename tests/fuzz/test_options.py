"""Options of the trainer with values that no one meant: a run, or one sentence."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from encnet_triton.train import cli
from encnet_triton.train.__main__ import main
from encnet_triton.train.config import ConfigError, all_fields

WORDS = (
    "0", "1", "2", "3", "4", "7", "32", "48", "-1", "-7", "1.5", "0.3", "1e400", "-0.0", "1e-320",
    "nan", "inf", "-inf", "1_0", "0x10", " 3 ", "", "none", "true", "off", "auto", "x", "é", "٣",
    "a/b", "..", "[b]", "\udcff", "1,2", "3x4", "0x0", "48x64", "2,1", "1,2,3", "[1]", "{}", "=",
    "long", "image", "cosine", "balanced", "paper", "released", "channel", "fcn", "psp", "encnet",
    "small", "demo", "cpu", "on", "folder", "scenes", "999999999999", str(2**63), str(2**64),
    "9" * 400,
)  # fmt: skip
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


def test_reading(seeds: Iterator[int]) -> None:
    """The configuration alone, of any recipe."""
    names = [name for name, _, _ in cli.list_recipes()]
    for seed in seeds:
        rng = random.Random(seed)
        for _ in range(20):
            options = [*words(rng), f"--recipe={rng.choice(names)}"]
            if rng.random() < 0.3:
                options.append(f"--{rng.choice(ELSEWHERE).replace('_', '-')}={rng.choice(WORDS)}")
            try:
                for config in cli.stages(cli.parse(options)):
                    config.fingerprint()
            except ConfigError as error:
                assert str(error), (seed, options)


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
