"""TOML recipes by name, their stages, and what the command line changes in them.

A recipe may extend another (``extends`` in its [about] section) and may have several stages, each
started from the weights of the one before. Recipes whose name starts with an underscore exist only
to be extended.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encnet_triton.data import DATASETS
from encnet_triton.train.classification import Classification
from encnet_triton.train.config import (
    SECTIONS,
    Config,
    ConfigError,
    all_fields,
    one_of,
    require,
)
from encnet_triton.train.segmentation import Segmentation
from encnet_triton.train.values import closest, convert

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Recipes that come with the package and can be run."""
    return sorted(p.stem for p in RECIPES.glob("*.toml") if not p.stem.startswith("_"))


def read_about(name: str) -> tuple[str, str]:
    """(what a recipe is, the published figure beside it or "") from its [about] section."""
    about = _load(name)[1].get("about", {})
    return str(about.get("text", "")), str(about.get("figure", ""))


def read_recipe(
    name: str, above: tuple[str, ...] = ()
) -> tuple[str, dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """(name, fields, stages) of a recipe: one that comes with the package, or a TOML file's path.

    Each stage is its name and the fields that differ from the recipe's own. ``above`` are the
    recipes that build on this one.

    Raises:
        ConfigError: no such recipe, broken TOML, or a key that is not a field of its section.
    """
    path, document = _load(name)
    if name in above:
        raise ConfigError(f"recipe {path} extends itself, by way of {', '.join(above)}")
    about = document.get("about", {})
    own_stages = document.get("stage", [])
    for key, value, kind in (("about", about, dict), ("stage", own_stages, list)):
        if not isinstance(value, kind):
            raise ConfigError(f"recipe {path}: {key} must be [about] or [[stage]]s")
    values: dict[str, Any] = {}
    stages: list[tuple[str, dict[str, Any]]] = []
    if "extends" in about:
        _, values, stages = read_recipe(str(about["extends"]), (*above, name))
    known = all_fields()
    for section, content in document.items():
        if section in ("about", "stage"):
            continue
        if section not in SECTIONS or not isinstance(content, dict):
            raise ConfigError(
                f"recipe {path}: unknown section {section!r}{closest(section, SECTIONS)}"
            )
        own = [n for n, (s, _) in known.items() if s == section]
        for key, value in content.items():
            if key not in own:
                raise ConfigError(
                    f"recipe {path}: unknown field {key!r} in [{section}]{closest(key, own)}"
                )
            values[key] = value
    if own_stages:
        stages = [_stage(path, stage, known) for stage in own_stages]
    return path.stem, values, stages


def _stage(path: Path, stage: Any, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if not isinstance(stage, dict) or "stage_name" not in stage:
        raise ConfigError(f"recipe {path}: each [[stage]] needs a stage_name")
    name = str(stage["stage_name"])
    if not name.isprintable() or "/" in name or not name:
        raise ConfigError(f"recipe {path}: stage_name {name!r} is not the name of a folder")
    fields = {key: value for key, value in stage.items() if key != "stage_name"}
    for key in fields:
        if key not in known:
            raise ConfigError(f"recipe {path}: unknown field {key!r} in [[stage]]")
    return name, fields


def _load(name: str) -> tuple[Path, dict[str, Any]]:
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            there = "is not a file" if path.exists() else "does not exist"
            raise ConfigError(f"recipe {path} {there}")
        raise ConfigError(f"unknown recipe {name!r}{closest(name, recipe_names())}")
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # some values are too long or too deep for it
        raise ConfigError(f"recipe {path} is not valid TOML: {error}") from error


def build(recipe: str, overrides: Mapping[str, Any]) -> Config:
    """The validated configuration of a recipe without stages.

    Defaults, then the recipe, then the overrides (text or values).

    Raises:
        ConfigError: names the key and the value that are wrong.
    """
    name, values, _ = read_recipe(recipe)
    return _configuration(name, values, overrides)


def build_stages(recipe: str, overrides: Mapping[str, Any]) -> list[Config]:
    """The configurations of all stages, in order; one for a recipe without stages.

    Stages are runs ``1_<stage>``, ``2_<stage>``, ... inside the run's own folder, each started
    from the last weights of the one before. Overrides apply to every stage, but ``init_from`` and
    ``new_head`` to the first alone. The field ``data`` may name a folder for each data set:
    ``coco_voc=/data/coco,voc=/data/VOC2012``.

    Raises:
        ConfigError: names the key and the value that are wrong.
    """
    name, values, stages = read_recipe(recipe)
    if not stages:
        return [_configuration(name, values, overrides)]
    whole = _configuration(name, values, overrides)
    configs: list[Config] = []
    for number, (stage, fields) in enumerate(stages, start=1):
        start: dict[str, Any] = {}
        if configs:
            before = configs[-1].run
            start["init_from"] = str(Path(before.runs) / before.name / "last.safetensors")
            start["new_head"] = fields.get("new_head", False)
        config = _configuration(name, {**values, **fields}, {**overrides, **start})
        config.run.runs = str(Path(whole.run.runs) / whole.run.name)
        config.run.name = f"{number}_{stage}"
        configs.append(config)
    return configs


def _configuration(name: str, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
    known = all_fields()
    for key in overrides:
        if key not in known:
            raise ConfigError(f"unknown field {key!r}{closest(key, known)}")
    parts: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in {**values, **overrides}.items():
        section, f = known[key]
        hint = typing.get_type_hints(SECTIONS[section])[f.name]
        parts[section][key] = convert(key, value, hint)
    config = Config(
        recipe=name, **{section: SECTIONS[section](**values) for section, values in parts.items()}
    )
    if not config.run.name:
        config.run.name = name
    require(
        "/" not in config.run.name and config.run.name not in (".", ".."),
        "name", config.run.name, "the name of a folder, without slashes",
    )  # fmt: skip
    task = task_of(config)
    one_of("dataset", config.data.dataset, task.datasets)
    task.refuse_unread(config, {**values, **overrides})
    config.data.data = data_folder(config.data.data, config.data.dataset)
    return config


def as_toml(config: Config, brief: bool = False) -> str:
    """Every field that the run reads, as a recipe that makes this configuration.

    With ``brief``, without fields that do not alter what is computed, and those that default to
    none and are.
    """
    lines = [f"# {config.run.name}, from the recipe {config.recipe}"]
    task = task_of(config)
    read = task.reads(config) | {n for n, kept in task.fixed.items() if config.value(n) == kept}
    for section, cls in SECTIONS.items():
        lines.append(f"[{section}]")
        for f in dataclasses.fields(cls):
            value = getattr(getattr(config, section), f.name)
            left_out = brief and (f.metadata.get("free") or (value is None and f.default is None))
            if f.name in read and not left_out:
                lines.append(f"{f.name} = {_toml('none' if value is None else value)}")
    return "\n".join(lines) + "\n"


# In JSON: an escaped backslash, a character in two halves, and one that TOML wants escaped.
_NOT_TOML = re.compile(r"\\\\|\\u(d[89ab]..)\\u(d[c-f]..)|\x7f")


def _toml(value: Any) -> str:
    """A text, number, list or boolean, in ASCII: as JSON, but for the characters that differ."""

    def mended(match: re.Match[str]) -> str:
        if match[1]:
            high, low = int(match[1], 16) - 0xD800, int(match[2], 16) - 0xDC00
            return f"\\U{0x10000 + (high << 10) + low:08x}"
        return "\\u007f" if match[0] == "\x7f" else match[0]

    return _NOT_TOML.sub(mended, json.dumps(value))


def task_of(config: Config) -> type[Segmentation] | type[Classification]:
    """What kind of training this is."""
    return Classification if config.classification else Segmentation


def data_folder(given: str | None, dataset: str) -> str | None:
    """The folder of a data set, from one folder or from ``name=folder`` pairs joined by commas.

    Raises:
        ConfigError: pairs, but none for this data set.
    """
    pairs = [part.partition("=") for part in (given or "").split(",")]
    if not all(sign and name in DATASETS for name, sign, _ in pairs):
        return given
    folders = {name: folder for name, _, folder in pairs}
    # voc_aug lies in VOC's folder.
    found = folders.get(dataset, folders.get("voc") if dataset == "voc_aug" else None)
    require(found is not None, "data", given, f"one with a folder for {dataset}")
    return found
