"""A figure of each class and of all, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.table import Table
from rich.text import Text

__all__ = ["class_table"]

Rows = Iterable[tuple[str, str]]


def class_table(title: str, figure: str, classes: Rows, all_of_them: Rows, note: str = "") -> Group:
    """Rows of names and figures: of the classes, then of all of them, the first of which is bold.

    Names and title are shown as they are, and the title in one line, for it may be a path.
    """
    table = Table(caption=note or None)
    table.add_column("class", overflow="fold")
    table.add_column(figure, justify="right")
    for name, value in classes:
        table.add_row(Text(name), value)
    table.add_section()
    for number, (name, value) in enumerate(all_of_them):
        table.add_row(name, value, style=None if number else "bold")
    return Group(Text(title, style="italic", no_wrap=True, overflow="ignore"), table)
