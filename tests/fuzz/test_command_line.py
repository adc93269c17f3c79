"""Recipes and command lines that nobody would write: a configuration, or a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from encnet_triton import convert, evaluate, predict, submit
from encnet_triton.data import __main__ as data
from encnet_triton.train import cli
from encnet_triton.train.config import Config, all_fields
from encnet_triton.train.recipe import RECIPES, as_toml, build, build_stages
from tests.support.mutations import mutated, seeds

VALUES = [
    "", "0", "-1", "1", "1.5", "nan", "inf", "-inf", "1e400", "none", "None", "true", "maybe",
    "1,2", "1,2,3", ",", "x", "480x", "99999999999999999999", "1_000", "\u0661", "a/b", "..", "\0",
    "\udce9", "[red]", "a=b", "voc=", "=", "9" * 5000,
]  # fmt: skip
OTHERS: list[object] = [
    None, True, 0, -1, 2**70, 1.5, float("nan"), float("inf"), [], [1], [[1, 2]], {"a": 1}, "x",
]  # fmt: skip
NAMES = ("scenes", "folder_small", "cifar10_encnet_16k64d", "voc_encnet_r101_coco")


def assert_configuration_or_sentence(recipe: str, overrides: dict[str, object]) -> None:
    try:
        configs = build_stages(recipe, overrides)
    except (ValueError, OSError) as error:  # what the command turns into one sentence
        assert "\n" not in str(error)
        return
    for config in configs:
        assert isinstance(config, Config)
        as_toml(config)


def test_values_of_fields(fuzz_seconds: float) -> None:
    names = list(all_fields())
    for seed in seeds(fuzz_seconds / 4):
        rng = np.random.default_rng(seed)
        given: dict[str, object] = {}
        for _ in range(int(rng.integers(1, 4))):
            pool = VALUES if rng.random() < 0.6 else OTHERS
            given[str(rng.choice(names))] = pool[int(rng.integers(len(pool)))]
        assert_configuration_or_sentence(NAMES[seed % len(NAMES)], given)


def test_damaged_recipes(tmp_path: Path, fuzz_seconds: float) -> None:
    path = tmp_path / "recipe.toml"
    for seed in seeds(fuzz_seconds / 4):
        content = (RECIPES / f"{NAMES[seed % len(NAMES)]}.toml").read_bytes()
        path.write_bytes(mutated(content, np.random.default_rng(seed)))
        assert_configuration_or_sentence(str(path), {})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        pytest.param("about = 3", "about must be", id="about"),
        pytest.param("stage = 3", "stage must be", id="stage"),
        pytest.param("stage = [3]", "needs a stage_name", id="stages"),
        pytest.param('[[stage]]\nstage_name = "../a"', "no name of a folder", id="stage name"),
        pytest.param("data = 3", "unknown section 'data'", id="section"),
        pytest.param("[optim]\nlr = " + 9000 * "[", "not valid TOML", id="deep"),
        pytest.param("[optim]\nlr = " + 9000 * "1", "not valid TOML", id="long"),
        pytest.param("[optim]\nlr = {a = 1}", "lr = ", id="table"),
    ],
)
def test_recipes_of_another_shape(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        build_stages(str(path), {})
    assert "\n" not in str(caught.value)


def test_recipes_that_build_on_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f'[about]\nextends = "{path}"\n')
    with pytest.raises(ValueError, match="builds on itself"):
        build(str(path), {})


@pytest.mark.parametrize("module", [convert, data, evaluate, predict, submit])
def test_arguments_of_commands(
    module, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str], fuzz_seconds: float
) -> None:
    """Files are missing or no checkpoints, so every call ends with a sentence."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    places = ["text", "empty.safetensors", "folder", "none", "/dev/null", "", "a\0b", "\udce9.pth"]
    flags = [
        "--checkpoint", "--data", "--split", "--output", "--batch", "--scales", "--workers",
        "--json", "--dataset", "--crop", "--every", "--label-map", "--option", "check", "prepare",
        "folder", "voc_aug", "pascal_context", "--flip", "--sbd",
    ]  # fmt: skip
    for seed in seeds(fuzz_seconds / 10):
        rng = np.random.default_rng(seed)
        pool = [*places, *flags, *flags, *VALUES]
        arguments = [pool[int(i)] for i in rng.integers(len(pool), size=rng.integers(6))]
        if module in (evaluate, predict, submit):
            arguments += ["--checkpoint", str(rng.choice(places[:5]))]
        if module is data:
            first = str(rng.choice(["check", "prepare"]))
            arguments = [first, "voc_aug" if first == "prepare" else "folder", *arguments, "--data",
                         str(rng.choice(places[:5]))]  # fmt: skip
        try:
            status = module.main(arguments)
        except SystemExit as ended:
            status = ended.code
        assert status in (0, 1, 2) and (status or "-h" in arguments), (seed, arguments)
    capsys.readouterr()


def test_arguments_of_the_trainer(capsys: pytest.CaptureFixture[str], fuzz_seconds: float) -> None:
    flags = [f"--{name.replace('_', '-')}" for name in all_fields()]
    for seed in seeds(fuzz_seconds / 4):
        rng = np.random.default_rng(seed)
        pool = [*flags, *(value for value in VALUES * 2 if value.isprintable())]
        arguments = [pool[int(i)] for i in rng.integers(len(pool), size=rng.integers(6))]
        try:
            options = cli.parse(arguments)
        except SystemExit as ended:
            assert ended.code == 2
            continue
        assert_configuration_or_sentence(options.recipe, options.overrides)
    capsys.readouterr()
