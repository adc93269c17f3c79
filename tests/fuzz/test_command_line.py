"""Absurd recipes and command lines give a configuration or a one-sentence error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from encnet_triton import convert, evaluate, export, predict, submit
from encnet_triton.data import __main__ as data
from encnet_triton.train import cli
from encnet_triton.train.config import Config, all_fields
from encnet_triton.train.recipe import RECIPES, as_toml, build, build_stages
from tests.support.mutations import WORDS, mutated

VALUES = [*WORDS, "99999999999999999999", "1_000", "\0", "[red]"]
OTHERS: list[object] = [
    None, True, 0, -1, 2**70, 1.5, float("nan"), float("inf"), [], [1], [[1, 2]], {"a": 1}, "x",
]  # fmt: skip
COMMANDS = (convert, data, evaluate, export, predict, submit)
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
        config.fingerprint()


def test_values_of_fields(seeds: Iterator[int]) -> None:
    names = list(all_fields())
    for seed in seeds:
        rng = np.random.default_rng(seed)
        given: dict[str, object] = {}
        for _ in range(int(rng.integers(1, 4))):
            pool = VALUES if rng.random() < 0.6 else OTHERS
            given[str(rng.choice(names))] = pool[int(rng.integers(len(pool)))]
        assert_configuration_or_sentence(NAMES[seed % len(NAMES)], given)


def test_damaged_recipes(tmp_path: Path, seeds: Iterator[int]) -> None:
    path = tmp_path / "recipe.toml"
    for seed in seeds:
        content = (RECIPES / f"{NAMES[seed % len(NAMES)]}.toml").read_bytes()
        path.write_bytes(mutated(content, np.random.default_rng(seed)))
        assert_configuration_or_sentence(str(path), {})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        pytest.param("about = 3", "about must be", id="about"),
        pytest.param("stage = 3", "stage must be", id="stage"),
        pytest.param("stage = [3]", "needs a stage_name", id="stages"),
        pytest.param('[[stage]]\nstage_name = "../a"', "not the name of a folder", id="stage name"),
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
    with pytest.raises(ValueError, match="extends itself"):
        build(str(path), {})


def test_arguments_of_commands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seeds: Iterator[int],
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
    for seed in seeds:
        rng = np.random.default_rng(seed)
        module = COMMANDS[seed % len(COMMANDS)]
        pool = [*places, *flags, *flags, *VALUES]
        arguments = [pool[int(i)] for i in rng.integers(len(pool), size=rng.integers(6))]
        if module in (evaluate, predict, submit):
            arguments += ["--checkpoint", str(rng.choice(places[:5]))]
        if module is export:
            arguments = [str(rng.choice(places[:5])), "--format", "pt2", *arguments]
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


def test_arguments_of_the_trainer(capsys: pytest.CaptureFixture[str], seeds: Iterator[int]) -> None:
    flags = [f"--{name.replace('_', '-')}" for name in all_fields()]
    recipes = [name for name, _, _ in cli.list_recipes()]
    values = [value for value in VALUES if value.isprintable()]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        pool = [*flags, *values, *(f"{flag}={values[rng.integers(len(values))]}" for flag in flags)]
        arguments = [pool[int(i)] for i in rng.integers(len(pool), size=rng.integers(6))]
        try:
            options = cli.parse([*arguments, f"--recipe={recipes[seed % len(recipes)]}"])
        except SystemExit as ended:
            assert ended.code == 2
            continue
        assert_configuration_or_sentence(options.recipe, options.overrides)
    capsys.readouterr()
