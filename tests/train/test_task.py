"""A field that a task does not read is refused, wherever it was given."""

from __future__ import annotations

from pathlib import Path

import pytest

from encnet_triton.train.__main__ import main
from encnet_triton.train.config import ConfigError, all_fields
from encnet_triton.train.recipe import build, build_stages, task_of

CIFAR = "cifar10_resnet_64d"


def test_fields_that_a_classifier_would_ignore_are_named(data: Path, capsys) -> None:
    command = ["--recipe", CIFAR, "--data", str(data), "--width", "16", "--epochs", "1"]
    ignored = ["--init-from", "/no/such/file", "--class-weight", "balanced", "--flip", "0"]
    assert main([*command, *ignored]) == 2
    assert capsys.readouterr().err == (
        "error: the training of cifar_resnet does not read class_weight, init_from; "
        "leave them out\n"
    )
    assert main([*command, "--flip", "0"]) == 2
    said = capsys.readouterr().err
    assert said == "error: flip = 0.0 is not allowed; it must be 0.5 for cifar_resnet\n"


@pytest.mark.parametrize("recipe", [CIFAR, "cifar10_encnet_16k64d", "scenes", "pcontext_fcn_r50"])
def test_each_field_is_read_or_refused(recipe: str) -> None:
    """Also where it has the default value: who gives it expects that it means something."""
    config = build(recipe, {})
    task = task_of(config)
    refused = set()
    for name in all_fields():
        try:
            task.refuse_unread(config, [name])
        except ConfigError as error:
            assert name in str(error) and config.model.model in str(error)
            refused.add(name)
    assert not refused & task.reads(config)
    assert refused == set(all_fields()) - task.reads(config) - {
        name for name, kept in task.fixed.items() if config.value(name) == kept
    }


@pytest.mark.parametrize(
    ("recipe", "name", "value"),
    [
        (CIFAR, "crop", 7),
        (CIFAR, "accumulation", 2),
        (CIFAR, "backbone", "resnet101"),
        (CIFAR, "form", "paper"),
        (CIFAR, "val_every", 5),
        (CIFAR, "num_codewords", 8),
        (CIFAR, "ohem_least", 0.5),
        ("cifar10_seresnet_64d", "shake_scale", "true"),
        ("scenes", "width", 64),
        ("scenes", "shake_scale", "false"),
    ],
)
def test_what_is_not_read_is_refused(recipe: str, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"does not read {name};|{name} = .+ is not allowed"):
        build(recipe, {name: value})


def test_what_describes_a_classifiers_augmentation_may_be_given() -> None:
    given = {"crop": "32", "flip": "0.5", "base_size": "none"}
    assert build(CIFAR, given) == build(CIFAR, {})


def test_a_classifier_has_no_stages(tmp_path: Path) -> None:
    """The second would start from random weights, since init_from is not read."""
    path = tmp_path / "staged.toml"
    path.write_text(
        f'[about]\nextends = "{CIFAR}"\n[[stage]]\nstage_name = "a"\n[[stage]]\nstage_name = "b"\n'
    )
    with pytest.raises(ConfigError, match="does not read init_from"):
        build_stages(str(path), {})
