"""Put runs side by side: ``encnet compare RUN RUN ...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from encnet_triton import options
from encnet_triton.files import write_text
from encnet_triton.report import Html, page, section, table
from encnet_triton.report.drawings import drawn
from encnet_triton.train.curves import plot_measure
from encnet_triton.train.log import METRICS, is_number, read_records
from encnet_triton.train.run_report import progress

_MEASURES = {"miou": "mIoU %", "pixel_accuracy": "pixAcc %", "error": "test error %"}


@dataclass(frozen=True)
class Run:
    """What the folder of a run says.

    Attributes:
        name: as it was given.
        fields: of its configuration, by section and name.
        records: of its ``metrics.jsonl``.
    """

    name: str
    fields: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """The records of validations."""
        return [record for record in self.records if record["kind"] == "val"]


def read_run(folder: Path) -> Run:
    """Read a run's configuration and records.

    Raises:
        ValueError: the folder holds no run, or its configuration is damaged.
    """
    try:
        sections = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fields = {
            f"{name}.{key}": value
            for name, values in sections.items()
            if isinstance(values, dict)
            for key, value in values.items()
        }
        return Run(str(folder), fields, read_records(folder))
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} is not the folder of a run: config.json or {METRICS} is not there"
        ) from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged") from error


def figures(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Rows of a name and a figure of each run: scores, then how far and how fast it went."""
    rows = []
    for key, name in _MEASURES.items():
        found = [[v[key] for v in run.validations if is_number(v.get(key))] for run in runs]
        if any(found):
            choose = min if key == "error" else max
            rows.append((f"{name}, last", *(f"{100 * v[-1]:.2f}" if v else "" for v in found)))
            best = (f"{100 * choose(v):.2f}" if v else "" for v in found)
            rows.append((f"{name}, best", *best))
    took = [dict(progress(run.records)) for run in runs]
    names = dict.fromkeys(name for one in took for name in one)
    return rows + [(name, *(one.get(name, "") for one in took)) for name in names]


def different_fields(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Rows of a field and its value in each run, where they are not all the same."""
    names = dict.fromkeys(name for run in runs for name in run.fields)
    rows = [(name, *(str(run.fields.get(name, "")) for run in runs)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] != "run.name"]


def classes(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Rows of a class and its IoU in the last validation of each run, in percent."""
    last = [run.validations[-1].get("iou") if run.validations else None for run in runs]
    by_run = [iou if isinstance(iou, dict) else {} for iou in last]
    names = dict.fromkeys(name for iou in by_run for name in iou)
    return [(name, *(_percent(iou.get(name)) for iou in by_run)) for name in names]


def _percent(share: Any) -> str:
    return f"{100 * share:.2f}" if is_number(share) else ""


def comparison(runs: Sequence[Run]) -> str:
    """The page."""
    head, numbers = ("", *(run.name for run in runs)), range(1, len(runs) + 1)
    parts: list[tuple[str, Html]] = [("Scores", table(head, figures(runs), numbers))]
    measures = [
        k for k in _MEASURES if any(is_number(v.get(k)) for r in runs for v in r.validations)
    ]

    def curves(figure: Any) -> None:
        records = {run.name: run.records for run in runs}
        shown = [("train", "loss", 1.0, "training loss")]
        shown += [("val", key, 100.0, _MEASURES[key]) for key in measures[:1]]
        for axes, (kind, key, factor, label) in zip(
            figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
        ):
            plot_measure(axes, records, kind, key, factor, label)

    parts.append(
        ("Curves", drawn(curves, (9, 3.5), "losses and scores of the runs over the steps"))
    )
    if rows := classes(runs):
        parts.append(("IoU % of the last validation", table(head, rows, numbers)))
    if rows := different_fields(runs):
        parts.append(("Fields that differ", table(head, rows, ())))
    return page("Runs compared", [section(name, body) for name, body in parts])


def show(runs: Sequence[Run], console: Console) -> None:
    """Figures and fields that differ, as a table."""
    shown = Table()
    shown.add_column("")
    for run in runs:
        shown.add_column(Text(run.name, overflow="fold"), justify="right")
    for rows in (figures(runs), different_fields(runs)):
        for row in rows:
            shown.add_row(*map(Text, row))
        shown.add_section()
    console.print(shown)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = options.Parser(
        prog="encnet compare",
        description="Put runs side by side: scores, speed, and the fields in which they differ.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder, such as runs/a")
    parser.add_argument(
        "--output", type=Path, help="also write an HTML page with curves (default: none)"
    )
    return parser


def run(given: argparse.Namespace, console: Console) -> None:
    """Read, print and write."""
    if given.output:
        options.refuse_place(given.output, "--output")
    runs = [read_run(folder) for folder in given.runs]
    show(runs, console)
    if given.output:
        write_text(comparison(runs), given.output)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = make_parser().parse_args(arguments)
    return options.exit_status(lambda: run(given, options.make_console()))


if __name__ == "__main__":
    sys.exit(main())
