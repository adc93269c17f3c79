"""The command line of the trainer, made from the fields of the configuration."""

from __future__ import annotations

import argparse
from dataclasses import Field, dataclass
from typing import Any

from encnet_triton.options import Parser
from encnet_triton.train.config import (
    REDUCE_OVERHEAD,
    SECTIONS,
    Config,
    all_fields,
    field_docs,
)
from encnet_triton.train.recipe import build, build_stages, read_about, recipe_names
from encnet_triton.train.sweeps.plan import sweep_names

DEFAULT_RECIPE = "scenes"


def parser() -> argparse.ArgumentParser:
    """One option per field, grouped by section, with the field's docstring as its help."""
    made = Parser(
        prog="python -m encnet_triton.train",
        description="Train a network. Without options: the embedded data set, on this machine. "
        "Fields that the recipe does not set have their defaults; --print-config shows the "
        "resulting configuration.",
        allow_abbrev=False,
    )
    made.add_argument(
        "--recipe", help=f"name from --list, or a TOML file (default: {DEFAULT_RECIPE})"
    )
    made.add_argument(
        "--sweep",
        choices=sweep_names(),
        help="train or resume all rows of a table of the paper (default: none)",
    )
    made.add_argument("--list", action="store_true", help="list recipes and sweeps, then stop")
    made.add_argument(
        "--dry-run", action="store_true", help="print model, steps and memory, then stop"
    )
    made.add_argument(
        "--print-config", action="store_true", help="print every field as a recipe, then stop"
    )
    made.add_argument("--traceback", action="store_true", help="show where an error was raised")
    docs = field_docs()
    groups = {section: made.add_argument_group(section) for section in SECTIONS}
    for name, (section, field) in all_fields().items():
        flag = str(field.type).split(" ")[0] == "bool"
        groups[section].add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            nargs="?" if flag else None,
            const="true" if flag else None,
            metavar=_words(field) if flag else name.upper(),
            help=f"{docs[name]}{_default(section, field, docs[name])}".replace("%", "%%"),
        )
    return made


def _words(field: Field[Any]) -> str:
    """What a field that is true or false, and may be more, takes."""
    more = [REDUCE_OVERHEAD] if "str" in str(field.type) else []
    return "|".join(["true", "false", *more])


def _default(section: str, field: Field[Any], text: str) -> str:
    """The default, for the end of a field's help that does not state it."""
    if "default" in text:
        return ""
    value = field.default
    if value is None:
        return f" (default: {'as the network has it' if section == 'model' else 'none'})"
    if isinstance(value, tuple):
        return f" (default: {','.join(map(str, value))})"
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return f" (default: {shown or 'none'})"


@dataclass(frozen=True)
class Options:
    """What was given: the command's own options, and the fields of the configuration."""

    recipe: str
    sweep: str | None
    list: bool
    dry_run: bool
    print_config: bool
    traceback: bool
    overrides: dict[str, Any]


def parse(arguments: list[str] | None = None) -> Options:
    """Read the command line."""
    made = parser()
    values = vars(made.parse_args(arguments))
    if values["sweep"] and values["recipe"]:
        made.error("--recipe and --sweep exclude each other: a sweep names the recipes of its rows")
    values["recipe"] = values["recipe"] or DEFAULT_RECIPE
    known = all_fields()
    overrides = {name: values.pop(name) for name in list(values) if name in known}
    return Options(**values, overrides=overrides)


def configuration(options: Options) -> Config:
    """The validated configuration of a command whose recipe has no stages."""
    return build(options.recipe, options.overrides)


def stages(options: Options) -> list[Config]:
    """The validated configurations of this command's runs, one after the other."""
    return build_stages(options.recipe, options.overrides)


def list_recipes() -> list[tuple[str, str, str]]:
    """(name, published figure or "", what it is) of every recipe that comes with the package."""
    found = [(name, read_about(name)) for name in recipe_names()]
    return [(name, figure, text) for name, (text, figure) in found]
