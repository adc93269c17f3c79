"""Recipes and overrides: what is accepted, and what a mistake is answered with."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from encnet_triton.train import cli
from encnet_triton.train.__main__ import main
from encnet_triton.train.config import ConfigError, all_fields, changed_fields, field_docs
from encnet_triton.train.recipe import as_toml, build, build_stages, recipe_names


def test_every_field_is_documented_and_has_one_name() -> None:
    fields = all_fields()
    assert set(field_docs()) == set(fields)
    assert len(fields) > 50


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    config = build(name, {})
    assert config.run.name == name
    assert {n: about for n, _, about in cli.list_recipes()}[name]


def test_help_shows_a_default_of_0_as_it_is() -> None:
    said = " ".join(cli.parser().format_help().split())
    assert "--seed SEED Seed of weights, sampling and augmentation. (default: 0)" in said
    assert "none starts from random weights. (default: none)" in said


def test_command_line_overrides_the_recipe() -> None:
    options = cli.parse(
        ["--lr", "0.5", "--crop", "96x128", "--scale", "0.5,1.5", "--compile", "--sync-bn", "false",
         "--base-size", "none", "--num-codewords", "0", "--pretrained", "none"]
    )  # fmt: skip
    config = cli.configuration(options)
    assert config.model.pretrained == ""
    assert config.optim.lr == 0.5
    assert config.data.crop == (96, 128)
    assert config.data.scale == (0.5, 1.5)
    assert config.run.compile is True and config.run.sync_bn is False
    assert build("scenes", {"compile": "off"}).run.compile is False
    graphs = cli.parse(["--compile", "reduce-overhead", "--lr", "0.5"])
    assert cli.configuration(graphs).run.compile == "reduce-overhead"
    assert config.data.base_size is None
    assert config.model.options()["num_codewords"] == 0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"lr": "fast"}, r"lr = 'fast' is not allowed; it must be a number"),
        ({"lr": "-1"}, r"lr = -1.0 is not allowed; it must be positive"),
        ({"lr": "1e39"}, r"lr = 1e\+39 is not allowed; it must be positive, and at most 1e9"),
        ({"epochs": "2.5"}, r"epochs = '2.5' is not allowed; it must be a whole number"),
        (
            {"model": "unet"},
            r"model = 'unet' is not allowed; it must be one of encnet, fcn, psp, deeplab",
        ),
        ({"crop": "1,2,3"}, r"crop = '1,2,3' is not allowed; it must be 2 whole numbers"),
        ({"crop": "48x"}, r"crop = '48x' is not allowed; it must be 2 whole numbers"),
        ({"scale": "x,2"}, r"scale = 'x,2' is not allowed; it must be 2 numbers"),
        (
            {"ignore_label": "0,x"},
            r"'0,x' is not .* must be whole numbers joined by commas",
        ),
        ({"seed": "-1"}, r"seed = -1 is not allowed; it must be 0 to 4294967295"),
        ({"seed": 2**32}, r"seed = \d+ is not allowed; it must be 0 to 4294967295"),
        ({"num_codewords": 2**70}, r"num_codewords = \d+ is not .* of at most 18 digits"),
        (
            {"dice_weight": "inf"},
            "dice_weight = inf is not .* at least 0, and finite",
        ),
        ({"weight_decay": "inf"}, "weight_decay = inf is not allowed"),
        ({"scale": "1,inf"}, r"scale = \(1.0, inf\) is not allowed"),
        ({"data": ""}, r"data = '' is not allowed; it must be a folder"),
        ({"compile": "maybe"}, r"compile = 'maybe' is not allowed; it must be true, false or red"),
        ({"learning_rate": 1}, r"unknown field 'learning_rate'"),
        ({"batchsize": 1}, r"unknown field 'batchsize'; did you mean 'batch_size'\?"),
        ({"new_head": "true"}, r"new_head = True is not allowed; it must be given with init_from"),
        ({"optimizer": "adamw", "momentum": 0.8}, "reads momentum only with optimizer = sgd"),
        ({"betas": "0.9,0.99"}, "encnet reads betas only with optimizer = adamw"),
        ({"ohem_least": "0.5"}, "reads ohem_least only with ohem"),
        ({"power": "0.5", "schedule": "cosine"}, "reads power only with schedule = poly"),
        ({"aux_weight": "0.4"}, "reads aux_weight only with aux = true"),
        ({"aux": "true"}, r"aux_weight = 0.0 is not .* above 0 .* has an auxiliary head"),
        ({"form": "released"}, r"aux_weight = 0.0 is not allowed"),
        ({"se_weight": "0.9", "se_loss": "false"}, "reads se_weight only with se_loss = true"),
        (
            {"model": "fcn", "form": "none", "se_weight": "0.9"},
            "fcn reads se_weight only with model = encnet",
        ),
        ({"scale_by": "image", "base_size": "40"}, "reads base_size only with scale_by = short or"),
        ({"scale_by": "long", "base_size": "none"}, "reads scale_by only with base_size"),
        ({"init_from": ""}, "init_from = '' is not allowed; it must be a checkpoint, a folder or"),
        ({"val_split": ""}, "val_split = '' is not allowed; it must be the name of a split"),
        ({"jitter": "0.2,0.3"}, "jitter = '0.2,0.3' is not allowed; it must be 3 numbers"),
        ({"clip_norm": "0"}, "clip_norm = 0.0 is not allowed; it must be positive or none"),
        ({"name": "a/b"}, r"name = 'a/b' is not allowed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_answered_with_key_and_value(overrides: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build("scenes", overrides)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'scene'; did you mean 'scenes'"):
        build("scene", {})


def test_mistakes_in_a_recipe_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[optim]\nlrr = 1\n")
    with pytest.raises(ConfigError, match=r"mine.toml: unknown field 'lrr' in \[optim\]; did you"):
        build(str(path), {})
    path.write_text("[optimiser]\nlr = 1\n")
    with pytest.raises(ConfigError, match="unknown section 'optimiser'; did you mean 'optim'"):
        build(str(path), {})
    path.write_text("lr = = 1\n")
    with pytest.raises(ConfigError, match="mine.toml is not valid TOML"):
        build(str(path), {})


def test_fingerprint_leaves_out_what_does_not_alter_the_run() -> None:
    first = build("scenes", {}).fingerprint()
    same = build("scenes", {"workers": 3, "stop_at": 7, "resume": True, "name": "x"}).fingerprint()
    other = build("scenes", {"lr": 0.3}).fingerprint()
    assert first == same
    assert first != other


def test_a_field_that_is_newer_than_a_run_had_its_default() -> None:
    now = build("scenes", {}).fingerprint()
    older = {key: value for key, value in now.items() if key != "schedule"}
    assert changed_fields(older, now) == []
    assert changed_fields(older, {**now, "schedule": "cosine"}) == ["schedule"]
    assert changed_fields(now, {**now, "lr": 1.0}) == ["lr"]
    assert changed_fields({**now, "ignore_label": 11}, {**now, "ignore_label": [11]}) == []
    assert changed_fields({**now, "ignore_label": 11}, {**now, "ignore_label": [0, 11]}) != []


@pytest.mark.parametrize("name", recipe_names())
def test_a_printed_configuration_is_a_recipe_that_makes_it_again(name: str, tmp_path: Path) -> None:
    given = {"data": 'a "b" [/c]', "lr": "3e-7"} if name.startswith("folder") else {}
    for number, config in enumerate(build_stages(name, given)):
        path = tmp_path / f"{number}.toml"
        path.write_text(as_toml(config), encoding="utf-8")
        config.run.runs = ""  # a stage's is made of the run's name
        again = build(str(path), {})
        again.run.runs = ""
        again.recipe = config.recipe
        assert again == config


def test_print_config_shows_what_a_recipe_and_the_options_make(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--recipe", "scenes", "--print-config", "--lr", "0.125", "--compile"]) == 0
    said = capsys.readouterr().out
    found = tomllib.loads(said)
    assert main(["--recipe", "scenes", "--print-config", "--compile", "reduce-overhead"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["run"]["compile"] == "reduce-overhead"
    assert found["optim"]["lr"] == 0.125 and found["run"]["compile"] is True
    assert found["data"]["dataset"] == "scenes" and found["data"]["crop"] == [160, 160]
    assert not Path("runs").exists()


def test_options_of_two_values_work_bare() -> None:
    """Also those whose default is the network's."""
    flags = [name for name, (_, f) in all_fields().items() if "bool" in str(f.type)]
    assert {"aux", "se_loss", "compile", "resume", "sync_bn"} <= set(flags)
    options = cli.parse([f"--{name.replace('_', '-')}" for name in flags])
    assert options.overrides == dict.fromkeys(flags, "true")
    assert cli.parse(["--aux", "false"]).overrides == {"aux": "false"}


def test_several_label_values(tmp_path: Path) -> None:
    for given in ("0,255", [0, 255]):
        data = build("folder_small", {"ignore_label": given, "label_map": "7=1"}).data
        assert data.dataset_options() == {"ignore_label": (0, 255), "label_map": "7=1"}
    assert build("folder_small", {"ignore_label": "11"}).data.ignore_label == (11,)


@pytest.mark.parametrize(
    "name", ["é", "\U0001f600 \U00020bb7", "a\x7f", "\\ud83d\\ude00", 'a"\\', "\t"]
)
def test_a_printed_recipe_is_toml_whatever_the_characters(name: str) -> None:
    text = as_toml(build("scenes", {"runs": name}))
    assert text.isascii() and tomllib.loads(text)["run"]["runs"] == name
