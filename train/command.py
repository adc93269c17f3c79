"""The command line of the trainer, made from the fields of the configuration."""

from __future__ import annotations

import argparse
from typing import Any

from encnet_triton.train.config import (
    SECTIONS,
    Config,
    all_fields,
    build,
    field_docs,
    read_about,
    recipe_names,
)

DEFAULT_RECIPE = "scenes"


def parser() -> argparse.ArgumentParser:
    """One option per field, grouped by section, with the field's docstring as its help."""
    made = argparse.ArgumentParser(
        prog="python -m encnet_triton.train",
        description="Train EncNet or FCN. Without options: the embedded data set, on this machine.",
        allow_abbrev=False,
    )
    made.add_argument(
        "--recipe", default=DEFAULT_RECIPE, help="name from --list, or a TOML file (%(default)s)"
    )
    made.add_argument("--list", action="store_true", help="list the recipes and stop")
    made.add_argument("--dry-run", action="store_true", help="print model and steps, then stop")
    made.add_argument("--traceback", action="store_true", help="show where an error was raised")
    docs = field_docs()
    groups = {section: made.add_argument_group(section) for section in SECTIONS}
    for name, (section, field) in all_fields().items():
        flag = str(field.type) == "bool"
        groups[section].add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            nargs="?" if flag else None,
            const="true" if flag else None,
            metavar="true|false" if flag else name.upper(),
            help=docs[name].replace("%", "%%"),
        )
    return made


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(options of the command itself, fields given by the user)."""
    values = vars(parser().parse_args(arguments))
    known = all_fields()
    overrides = {name: values.pop(name) for name in list(values) if name in known}
    return argparse.Namespace(**values), overrides


def configuration(options: argparse.Namespace, overrides: dict[str, Any]) -> Config:
    """The validated configuration of this command."""
    return build(options.recipe, overrides)


def list_recipes() -> list[tuple[str, str]]:
    """(name, what it is) of every recipe that comes with the package."""
    return [(name, read_about(name)) for name in recipe_names()]
