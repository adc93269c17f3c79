"""Tables of a sweep: on the terminal, and as Markdown in its folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


def show_and_write(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], path: Path
) -> None:
    """Print a table, and write it to ``path`` atomically."""
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    lines = ["| " + " | ".join(c) + " |" for c in (header, ("---",) * len(header), *rows)]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(f"{title}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, path)
