"""``python -m encnet_triton.train`` and ``torchrun ... -m encnet_triton.train``."""

from __future__ import annotations

import sys

from encnet_triton.options import print_anything, print_error
from encnet_triton.train import cli, distributed
from encnet_triton.train.distributed import WorldError
from encnet_triton.train.dry_run import dry_run
from encnet_triton.train.failures import explained
from encnet_triton.train.recipe import as_toml
from encnet_triton.train.run_folder import folder_of
from encnet_triton.train.run_state import LAST
from encnet_triton.train.saver import TrainingError
from encnet_triton.train.sweeps import plan
from encnet_triton.train.sweeps.run import run as run_sweep
from encnet_triton.train.trainer import train_all
from encnet_triton.weights.checkpoint import CheckpointError

_ONE_SENTENCE = (CheckpointError, TrainingError, WorldError, OSError, ValueError)


def show_list() -> None:
    """Recipes and sweeps, each with what it is."""
    for name, figure, about in cli.list_recipes():
        print(f"{name:<32}{about}{f'  [{figure}]' if figure else ''}")
    print("\n--sweep")
    for name in plan.sweep_names():
        print(f"{name:<32}{plan.read_sweep(name).title}")


def start(options: cli.Options) -> None:
    """Run what the command line asks for."""
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
        before = {folder_of(config) / LAST for config in configs}
        for config in configs:
            dry_run(config, world, before)
    elif options.sweep:
        run_sweep(options.sweep, rows, world)
    else:
        train_all(configs, world)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status.

    If other processes wait for this one, a failure ends it at once instead of returning.
    """
    print_anything()
    options = cli.parse(arguments)
    try:
        if options.list:
            show_list()
        else:
            start(options)
    except KeyboardInterrupt:
        return failed("interrupted", status=130)
    except BaseException as error:
        known = isinstance(error, _ONE_SENTENCE)
        sentence, lost = (str(error), False) if known else explained(error)
        if sentence is None or options.traceback:
            if distributed.in_group():
                distributed.fail(None, lost)
            distributed.stop()
            raise
        return failed(sentence, lost)
    distributed.stop()
    return 0


def failed(sentence: str, lost: bool = False, status: int = 2) -> int:
    """Print the reason; returns the exit status if no other process waits for this one."""
    if distributed.in_group():
        distributed.fail(sentence, lost, status)
    print_error(sentence)
    distributed.stop()
    return status


if __name__ == "__main__":
    sys.exit(main())
