"""All rows of a table of the paper in one command: ``--sweep table1``.

Complete rows are skipped, others are resumed or started. Afterwards the sweep's
folder holds ``<sweep>.md`` and ``<sweep>.json`` with the paper's figures beside ours,
``<sweep>.png`` where the rows are points of curves or have curves (and matplotlib is installed),
and, of segmentation networks, ``<sweep>_grid.png``, what two of them predict for the same images.
"""

from __future__ import annotations

from rich.console import Console

from encnet_triton.train.config import Config
from encnet_triton.train.distributed import World, gather
from encnet_triton.train.run_folder import finished
from encnet_triton.train.sweeps import classification, segmentation
from encnet_triton.train.sweeps.plan import Planned, planned_folder, read_sweep
from encnet_triton.train.trainer import train_all


def run(name: str, planned: list[Planned], world: World) -> None:
    """Train what is not complete yet, then write the table and the pictures."""
    sweep = read_sweep(name)
    done: dict[str, bool] = {}
    for one in planned:
        if one.row.run not in done:
            done[one.row.run] = train_all(_unfinished(one.configs), world)
        if not done[one.row.run]:
            return  # asked to stop
    folder = planned_folder(planned)
    if planned[0].configs[-1].classification:
        if world.main:
            classification.report(name, sweep, planned, folder)
    else:
        segmentation.report(name, sweep, planned, folder, world)
    if world.main:
        Console().print(f"table and pictures: {folder}")


def _unfinished(configs: list[Config]) -> list[Config]:
    return [c for c in configs if not all(gather(finished(c)))]
