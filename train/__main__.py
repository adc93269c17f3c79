"""``python -m encnet_triton.train`` and ``torchrun ... -m encnet_triton.train``."""

from __future__ import annotations

import os
import sys

from encnet_triton.train import cli, distributed
from encnet_triton.train.distributed import WorldError
from encnet_triton.train.recipe import as_toml
from encnet_triton.train.sweeps import plan
from encnet_triton.train.sweeps.run import run as run_sweep
from encnet_triton.train.trainer import TrainingError, dry_run, train_all
from encnet_triton.weights.checkpoint import CheckpointError


def show_list() -> None:
    """Recipes and sweeps, each with what it is."""
    for name, figure, about in cli.list_recipes():
        print(f"{name:<32}{about}{f'  [{figure}]' if figure else ''}")
    print("\n--sweep")
    for name in plan.sweep_names():
        print(f"{name:<32}{plan.read_sweep(name).title}")


def start(options: cli.Options) -> None:
    """Do what the command line asks for."""
    if options.sweep:
        rows = plan.configurations(options.sweep, options.overrides)
        configs = [config for row in rows for config in row.configs]
    else:
        configs = cli.stages(options)
    if options.print_config:
        print("\n".join(as_toml(config) for config in configs), end="")
        return
    world = distributed.start(configs[0].run.device)
    if options.dry_run:
        for config in configs:
            dry_run(config, world)
    elif options.sweep:
        run_sweep(options.sweep, rows, world)
    else:
        train_all(configs, world)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = cli.parse(arguments)
    try:
        if options.list:
            show_list()
        else:
            start(options)
    except (CheckpointError, TrainingError, WorldError, OSError, ValueError) as error:
        if options.traceback:
            raise
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{rank}error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
