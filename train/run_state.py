"""The state of a run on disk: weights, optimizer and random states in one safetensors file.

Resuming from it gives the weights that an undisturbed run would have had; on the CPU, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encnet_triton.models import create_model
from encnet_triton.train.average import Average
from encnet_triton.train.config import Config, ConfigError, changed_fields
from encnet_triton.train.distributed import World, WorldError, gather
from encnet_triton.train.writer import copied
from encnet_triton.weights import checkpoint
from encnet_triton.weights.checkpoint import CheckpointError, ModelInfo
from encnet_triton.weights.fitting import tensor_misfit

LAST, BEST, AVERAGE = "last.safetensors", "best.safetensors", "average.safetensors"

AVERAGED = "average."
"""Prefix of the names of the average's tensors."""

# What an optimizer keeps for a parameter, and what a file calls it.
_KEPT = {
    "momentum_buffer": "momentum", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "step"
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """A copy of the state of a run, which a thread may write while the run goes on.

    Attributes:
        tensors, metadata: of ``last.safetensors``.
        wait: returns once the tensors are complete.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]
    wait: Callable[[], None]

    def write(self, folder: Path) -> None:
        """Write ``last.safetensors``.

        Raises:
            CheckpointError: see `check`, or the file could not be written. The one on disk then
                stays the last good one.
        """
        self.check(folder)
        checkpoint.write(folder / LAST, self.tensors, self.metadata)

    def check(self, folder: Path) -> None:
        """Wait for the tensors, and refuse to write any that are not finite.

        Raises:
            CheckpointError: names one of them, and what stays in the folder.
        """
        self.wait()
        if broken := not_finite(self.tensors):
            path, step = folder / LAST, self.metadata["progress"]["step"]
            kept = f"{path} stays the last good state" if path.exists() else "nothing was saved yet"
            raise CheckpointError(
                f"the weights are not finite at step {step} ({broken} for one); {kept}"
            )

    def write_best(self, folder: Path, figure: Mapping[str, float]) -> None:
        """Write ``best.safetensors``: the validated weights, their step and their score.

        Raises:
            CheckpointError: as `write`.
        """
        self.check(folder)
        self._write_validated(folder / BEST, figure)

    def write_average(self, folder: Path) -> None:
        """Write ``average.safetensors``, a model like any other, if there is an average."""
        if self._averaged:
            self._write_validated(folder / AVERAGE, {})

    @property
    def _averaged(self) -> bool:
        return any(name.startswith(AVERAGED) for name in self.tensors)

    def _write_validated(self, path: Path, figure: Mapping[str, float]) -> None:
        start = AVERAGED if self._averaged else checkpoint.MODEL_PREFIX
        model = {
            checkpoint.MODEL_PREFIX + name.removeprefix(start): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(start)
        }
        about = {"model": self.metadata["model"], "step": self.metadata["progress"]["step"]}
        checkpoint.write(path, model, about | dict(figure))


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimiser steps done (skipped ones included).
        skipped, skipped_in_a_row: steps skipped because their loss was not finite; how many of
            them since the last good step.
        best_miou, best_step: best validation so far.
        validated: step of the last validation.
        best_error: lowest test error of a classifier so far.
    """

    step: int = 0
    skipped: int = 0
    best_miou: float = -1.0
    best_step: int = 0
    validated: int = -1
    best_error: float = 1.0
    skipped_in_a_row: int = 0


def on_all_ranks(path: Path) -> bool:
    """Whether the ranks see a file: all of them or none.

    Raises:
        WorldError: names the ranks that do not see it while others do.
    """
    found = gather(path.exists())
    blind = [rank for rank, there in enumerate(found) if not there]
    if blind and any(found):
        raise WorldError(
            f"ranks {blind} do not see {path}, which other ranks do; "
            "the folder of runs must be one that all hosts share (--runs)"
        )
    return not blind


def copy_state(
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    info: ModelInfo,
    progress: Progress,
    config: Config,
    training_set: Mapping[str, Any] | None = None,
    average: Average | None = None,
) -> State | None:
    """The state of a run as it is now; every rank calls it, rank 0 gets it."""
    states = gather(_random_state(world))
    if not world.main:
        return None
    tensors = checkpoint.model_tensors(model) | _optimizer_state(model, optimizer)
    if average is not None:
        averaged = average.model.state_dict()
        tensors |= {AVERAGED + name: tensor for name, tensor in averaged.items()}
    for rank, state in enumerate(states):
        tensors |= {f"random.{rank}.{name}": t for name, t in state.items()}
    metadata = {
        "model": asdict(info),
        "progress": asdict(progress),
        "fingerprint": config.fingerprint(),
        "recipe": config.recipe,
        "training_set": dict(training_set or {}),
    }
    copies, wait = copied(tensors)
    return State(copies, metadata, wait)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds a value that is not finite, or None."""
    if not tensors:
        return None
    names = list(tensors)
    finite = torch.stack([torch.isfinite(t.detach()).all() for t in tensors.values()])
    if finite.all():
        return None
    return names[finite.tolist().index(False)]


def load(
    path: Path,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    info: ModelInfo | None = None,
    training_set: Mapping[str, Any] | None = None,
    average: Average | None = None,
) -> Progress:
    """Restore a run in place: weights, their average, the optimizer's and this rank's random state.

    Raises:
        ConfigError: a field that alters the run, or the data set, differs from that of its start.
        CheckpointError: the file is damaged or does not fit.
    """
    tensors, metadata = checkpoint.read(path)
    if "progress" not in metadata:
        raise CheckpointError(f"{path} holds a model but no state of a run to resume")
    progress = _progress(path, metadata["progress"])
    fingerprint = metadata.get("fingerprint")
    if not isinstance(fingerprint, dict):
        raise CheckpointError(f"{path} is damaged: it does not say which fields it was made with")
    _check_fingerprint(path, fingerprint, config.fingerprint())
    if info is not None:
        _check_data(path, metadata, info, training_set or {})
    checkpoint.load_weights(model, tensors, path)
    if average is not None:
        averaged = {
            checkpoint.MODEL_PREFIX + name.removeprefix(AVERAGED): tensor
            for name, tensor in tensors.items()
            if name.startswith(AVERAGED)
        }
        checkpoint.load_weights(average.model, averaged, path)
    _load_optimizer_state(path, model, optimizer, tensors)
    _restore_random_state(path, world, tensors)
    if progress.validated < 0 < progress.best_step:
        progress.validated = progress.step  # older classifiers did not save this
    return progress


def initialise(path: Path | str, model: nn.Module, num_classes: int, new_head: bool) -> list[str]:
    """Start from another run's weights; returns the names of tensors that kept their initial
    values.

    With ``new_head`` the tensors whose shape depends on the number of classes (last convolutions
    and SE layers) are left at their initial values.

    Raises:
        CheckpointError: tensors do not fit, or the class count differs without new_head.
    """
    tensors, info = checkpoint.read_model(path)
    wanted: Any = model.options
    kind, own = (of.get("name", "classifier") for of in (info.options, wanted))
    if kind != own:
        raise CheckpointError(f"{path} holds a network of another kind: {kind}, not {own}")
    theirs = len(info.classes)
    if theirs != num_classes and not new_head:
        raise CheckpointError(
            f"{path} was trained for {theirs} classes, this data set has {num_classes}; "
            "add --new-head to start with a new last layer"
        )
    if not new_head:
        checkpoint.load_weights(model, tensors, path)
        return []
    kept = _of_classes(model)
    own = model.state_dict()
    merged = tensors | {checkpoint.MODEL_PREFIX + name: own[name] for name in kept}
    checkpoint.load_weights(model, merged, path)
    return kept


def _of_classes(model: nn.Module) -> list[str]:
    """Names of the tensors whose shape depends on the number of classes."""
    options: Any = dict(model.options)  # type: ignore[arg-type]
    with torch.device("meta"):
        other = create_model(**options | {"num_classes": options["num_classes"] + 1})
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    return [name for name, t in model.state_dict().items() if t.shape != shapes[name]]


def _progress(path: Path, found: Any) -> Progress:
    """The progress in a file, checked to be finite numbers of the right kind."""
    kinds = {field.name: type(field.default) for field in fields(Progress)}
    if not isinstance(found, dict) or not found.keys() <= kinds.keys():
        raise CheckpointError(f"{path} is damaged: its progress is {found!r}"[:300])
    for name, value in found.items():
        known = (int, float) if kinds[name] is float else int
        if isinstance(value, bool) or not isinstance(value, known) or not abs(value) < 2**62:
            raise CheckpointError(f"{path} is damaged: its {name} is {value!r}"[:300])
    if found.get("step", 0) < 0:
        raise CheckpointError(f"{path} is damaged: its step is {found['step']}")
    return Progress(**found)


def _check_data(
    path: Path, metadata: Mapping[str, Any], info: ModelInfo, training_set: Mapping[str, Any]
) -> None:
    """Refuse a data set other than the one the run started with.

    Raises:
        ConfigError: says what has changed.
    """
    then = checkpoint.model_info(metadata, path)
    changed = []
    if then.classes != info.classes:
        changed.append(_classes_changed(then.classes, info.classes))
    for name in ("mean", "std", "ignore_index"):
        before, now = getattr(then, name), getattr(info, name)
        if before != now:
            changed.append(f"its {name} was {before} and is now {now}")
    saved = metadata.get("training_set")
    saved = saved if isinstance(saved, dict) else {}
    before, now = saved.get("images"), training_set.get("images")
    if before is not None and before != now:
        changed.append(f"it had {before} training images and now has {now}")
    elif saved.get("names") is not None and saved["names"] != training_set.get("names"):
        changed.append("its training images have other names or another order")
    if changed:
        raise ConfigError(
            f"cannot resume {path}: the data set has changed: {'; '.join(changed)} "
            "(start a new run with another --name)"
        )


def _classes_changed(before: list[str], now: list[str]) -> str:
    if len(before) != len(now):
        return f"it had {len(before)} class names and now has {len(now)}"
    place = next(i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b)
    return f"its class names differ, class {place} was {before[place]!r} and is now {now[place]!r}"


def _check_fingerprint(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"{key} was {saved.get(key)!r} and is now {now.get(key)!r}"
        for key in changed_fields(saved, now)
    ]
    if changed:
        raise ConfigError(
            f"cannot resume {path}: {'; '.join(changed)}; a resumed run keeps the fields that "
            "alter what it computes (start a new run with another --name)"
        )


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{_KEPT[kind]}.{name}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
        if tensor is not None
    }


def _load_optimizer_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    for name, parameter in model.named_parameters():
        found = {kind: tensors.get(f"{start}.{name}") for kind, start in _KEPT.items()}
        kinds = {kind: tensor for kind, tensor in found.items() if tensor is not None}
        for kind, tensor in kinds.items():
            if kind == "step":  # a number, which stays on the CPU
                own, made = torch.empty(()), torch.empty(())
            else:
                own, made = parameter, torch.empty_like(parameter)
            if (misfit := tensor_misfit(f"{_KEPT[kind]}.{name}", tensor, own)) is not None:
                raise CheckpointError(f"{path} {misfit}")
            if kind in ("step", "exp_avg_sq") and (tensor < 0).any():
                raise CheckpointError(
                    f"{path} is damaged: {_KEPT[kind]}.{name} has a negative value"
                )
            optimizer.state[parameter][kind] = made.copy_(tensor)
        if isinstance(optimizer, torch.optim.AdamW) and len(kinds) not in (0, 3):
            raise CheckpointError(f"{path} is damaged: the optimizer's state of {name} has gaps")


def _random_state(world: World) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def _restore_random_state(path: Path, world: World, tensors: dict[str, Tensor]) -> None:
    """A rank that the saved run did not have keeps the state it was seeded with."""
    cpu = tensors.get(f"random.{world.rank}.cpu")
    cuda = tensors.get(f"random.{world.rank}.cuda")
    try:
        if cpu is not None:
            torch.set_rng_state(cpu)
        if cuda is not None and world.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, world.device)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged: random.{world.rank} is not a random state ({error})"
        ) from error
