"""The runs behind a table of the paper, read from its TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encnet_triton.train import run_state
from encnet_triton.train.config import Config, ConfigError
from encnet_triton.train.recipe import build_stages
from encnet_triton.train.run_folder import folder_of
from encnet_triton.train.values import closest

SWEEPS = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One training, or one way to measure it.

    Attributes:
        label: what the table calls it; classifiers with one label, which differ in their seeds, are
            one line of the table.
        recipe, fields: what is trained.
        run: folder below the sweep's; rows with one folder are one training.
        paper: pixAcc and mIoU, or the error, in percent, as the paper prints them; may be empty.
        multi_scale: six scales and mirror images.
        protocol: name in `protocol_scores` that the figure is counted by; "" for the first.
        curve, x: name of the curve and place on its axis, for a figure.
    """

    label: str
    recipe: str
    fields: dict[str, Any]
    run: str
    paper: tuple[float, ...] = ()
    multi_scale: bool = False
    protocol: str = ""
    curve: str = ""
    x: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """A table: its rows, and the two runs whose predictions are drawn side by side, if any."""

    title: str
    rows: tuple[Row, ...]
    grid: tuple[str, str] | None


@dataclass(frozen=True)
class Planned:
    """A row and the configurations of its stages."""

    row: Row
    configs: list[Config]

    @property
    def folder(self) -> Path:
        """Of the last stage."""
        return folder_of(self.configs[-1])

    @property
    def checkpoint(self) -> Path:
        """What the last stage validated last: its weights, or their average if it keeps one."""
        return self.folder / (run_state.AVERAGE if self.configs[-1].optim.ema else run_state.LAST)


def sweep_names() -> list[str]:
    """Sweeps that come with the package."""
    return sorted(path.stem for path in SWEEPS.glob("*.toml"))


def read_sweep(name: str) -> Sweep:
    """A sweep by name.

    Raises:
        ConfigError: there is none of this name.
    """
    path = SWEEPS / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"unknown sweep {name!r}{closest(name, sweep_names())}")
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    rows = tuple(row for table in document["row"] for row in _rows(table))
    grid = document.get("grid")
    return Sweep(document["title"], rows, (grid[0], grid[1]) if grid else None)


def _rows(table: dict[str, Any]) -> Iterator[Row]:
    """The rows of a table of the file: one, or one for each of its seeds."""
    seeds = table.get("seeds", [None])
    for seed in seeds:
        yield Row(
            label=table["label"],
            recipe=table["recipe"],
            fields=table.get("set", {}) | ({} if seed is None else {"seed": seed}),
            run=table["run"] if seed is None else f"{table['run']}_{seed}",
            paper=tuple(table.get("paper", ())),
            multi_scale=table.get("multi_scale", False),
            protocol=table.get("protocol", ""),
            curve=table.get("curve", ""),
            x=table.get("x", 0.0),
        )


def configurations(name: str, overrides: Mapping[str, Any]) -> list[Planned]:
    """Every row with its configurations; the overrides apply to all.

    The sweep's folder is ``runs/<name>``, or has the name that the overrides give.

    Raises:
        ConfigError: a row or an override is wrong.
    """
    shared = {k: v for k, v in overrides.items() if k not in ("name", "runs", "resume")}
    folder = Path(str(overrides.get("runs", "runs"))) / str(overrides.get("name", name))
    planned = []
    for row in read_sweep(name).rows:
        if "seed" in shared and "seed" in row.fields:
            raise ConfigError(f"sweep {name!r} has seeds of its own: leave out --seed")
        own = {"runs": str(folder), "name": row.run, "resume": True}
        planned.append(Planned(row, build_stages(row.recipe, {**row.fields, **shared, **own})))
    return planned


def planned_folder(planned: list[Planned]) -> Path:
    """The sweep's folder: that of the first row's run, or of its stages, one level up."""
    config = planned[0].configs[0].run
    folder = Path(config.runs)
    return folder.parent if len(planned[0].configs) > 1 else folder
