"""``python -m encnet_triton.train`` and ``torchrun ... -m encnet_triton.train``."""

from __future__ import annotations

import os
import sys

from encnet_triton.train import command, distributed, run, sweep
from encnet_triton.train.loop import TrainingError
from encnet_triton.weights.checkpoint import CheckpointError


def show_list() -> None:
    """Recipes and sweeps, each with what it is."""
    for name, figure, about in command.list_recipes():
        print(f"{name:<32}{about}{f'  [{figure}]' if figure else ''}")
    print("\n--sweep")
    for name in sweep.sweep_names():
        print(f"{name:<32}{sweep.read_sweep(name).title}")


def start(options: command.Options) -> None:
    """Do what the command line asks for."""
    if options.sweep:
        rows = sweep.configurations(options.sweep, options.overrides)
        configs = [config for row in rows for config in row.configs]
    else:
        configs = command.stages(options)
    world = distributed.start(configs[0].run.device)
    if options.dry_run:
        for config in configs:
            run.dry_run(config, world)
    elif options.sweep:
        sweep.run(options.sweep, rows, world)
    else:
        run.train_all(configs, world)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = command.parse(arguments)
    try:
        if options.list:
            show_list()
        else:
            start(options)
    except (CheckpointError, TrainingError, distributed.WorldError, OSError, ValueError) as error:
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
