"""Tables of a sweep: on the terminal, and as Markdown in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from encnet_triton.files import write_text


def show_and_write(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], path: Path
) -> None:
    """Print a table, and write it to ``path`` atomically."""
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    lines = ["| " + " | ".join(c) + " |" for c in (header, ("---",) * len(header), *rows)]
    write_text(f"{title}\n\n" + "\n".join(lines) + "\n", path)
