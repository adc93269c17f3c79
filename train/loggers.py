"""Records of a run for TensorBoard or Weights & Biases, under the names of ``metrics.jsonl``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from encnet_triton.files import write_text
from encnet_triton.train.config import Config, ConfigError
from encnet_triton.train.log import is_number

_ID = "wandb.id"  # so that a resumed run goes on in the same place


class Logger(Protocol):
    """Takes the records that go into ``metrics.jsonl``."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record with its kind and step."""

    def close(self) -> None:
        """Finish what is still to be written."""


def require(kind: str) -> None:
    """Refuse a logger whose package is missing.

    Raises:
        ConfigError: says how to install it.
    """
    if kind != "none":
        try:
            importlib.import_module(kind)
        except ImportError as error:
            raise ConfigError(
                f"--logger {kind} needs a package that is not installed ({error}): "
                f"pip install 'encnet-triton[{kind}]'"
            ) from error


def open_logger(config: Config, folder: Path, step: int) -> Logger | None:
    """The logger that the configuration asks for.

    Args:
        config: of the run.
        folder: of the run.
        step: after which the run goes on.
    """
    kind = config.run.logger
    if kind == "tensorboard":
        return TensorBoard(folder, step)
    return WandB(config, folder) if kind == "wandb" else None


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record with their names, such as ("val/iou/sky", 0.5)."""
    for key, value in record.items():
        name = f"{prefix}/{key}" if prefix else key
        if isinstance(value, Mapping):
            yield from scalars(value, name)
        elif is_number(value) and key not in ("step", "time"):
            yield name, float(value)


class TensorBoard:
    """Event files in ``tensorboard`` below the run's folder; those after ``step`` are replaced."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        make: Any = SummaryWriter
        self._writer = make(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record, record["kind"]):
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project ``encnet-triton``; wandb reads its own environment variables, too."""

    def __init__(self, config: Config, folder: Path) -> None:
        wandb: Any = importlib.import_module("wandb")
        file = folder / _ID
        known = file.read_text(encoding="utf-8").strip() if file.is_file() else None
        self._run = wandb.init(
            project="encnet-triton",
            name=config.run.name,
            id=known,
            resume="allow",
            dir=str(folder),
            config=config.as_dict(),
        )
        # A resumed run repeats steps; wandb would drop them if they were its own steps.
        self._run.define_metric("*", step_metric="step")
        write_text(f"{self._run.id}\n", file)

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log({**dict(scalars(record, record["kind"])), "step": record["step"]})

    def close(self) -> None:
        self._run.finish()
