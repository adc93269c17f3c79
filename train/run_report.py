"""``report.html`` of a run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from encnet_triton.files import write_text
from encnet_triton.report import Html, facts, page, section
from encnet_triton.report.drawings import drawn
from encnet_triton.train.config import Config
from encnet_triton.train.curves import plot_errors, plot_scores
from encnet_triton.train.log import is_number, read_records

REPORT = "report.html"

Records = Sequence[Mapping[str, Any]]


def write_report(folder: Path, config: Config, scored: Sequence[Html]) -> None:
    """Write the report of the run as it stands.

    Args:
        folder: of the run, with its ``metrics.jsonl``.
        config: of the run.
        scored: sections about the last validation.
    """
    records = read_records(folder)

    def curves(figure: Any) -> None:
        if config.classification:
            plot_errors({config.run.name: [folder]}, figure)
        else:
            plot_scores(records, figure)

    sections = [
        facts(progress(records)),
        section("Curves", drawn(curves, (9, 3.5), "losses and scores over the steps")),
        *scored,
        section("Configuration", facts(_options(config)), folded=True),
        section("Machine", facts(_machine(records)), folded=True),
    ]
    write_text(page(f"Run {config.run.name}", sections), folder / REPORT)


def progress(records: Records) -> list[tuple[str, str]]:
    """How far a run is, how fast it was, and what it took."""
    rows = []
    if records:
        last = max(records, key=lambda record: float(record["step"]))
        epoch = f", epoch {last['epoch']}" if is_number(last.get("epoch")) else ""
        rows.append(("steps", f"{last['step']:,}{epoch}"))
        rows.append(("time", str(timedelta(seconds=round(_seconds(records))))))
    if speeds := _figures(records, "images_per_second"):
        rows.append(("training, images/s", f"{statistics.median(speeds):.1f} (median)"))
    if memory := _figures(records, "peak_memory_gib"):
        rows.append(("peak memory", f"{max(memory):.2f} GiB"))
    if skipped := _figures(records, "skipped"):
        rows.append(("skipped steps", f"{skipped[-1]:.0f}"))
    return rows


def _figures(records: Records, key: str) -> list[float]:
    return [record[key] for record in records if is_number(record.get(key))]


def _seconds(records: Records) -> float:
    """Time spent, without that between a stop and the next start."""
    timed = [record for record in records if is_number(record.get("time"))]
    between = (
        float(after["time"] - before["time"])
        for before, after in zip(timed, timed[1:], strict=False)
        if after["kind"] != "start"
    )
    return sum(max(0.0, seconds) for seconds in between)


def _options(config: Config) -> list[tuple[str, str]]:
    """Every field that has a value, as TOML would show it."""
    rows = [("recipe", config.recipe)]
    for name, section_of in config.as_dict().items():
        if isinstance(section_of, dict):
            rows += [(f"{name}.{key}", str(value)) for key, value in section_of.items()]
    return rows


def _machine(records: Records) -> list[tuple[str, str]]:
    """The machine of the last start."""
    for record in reversed(records):
        machine = record.get("environment")
        if record["kind"] == "start" and isinstance(machine, dict):
            return [(str(name), str(value)) for name, value in machine.items()]
    return []
