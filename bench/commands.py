"""The commands of ``python -m bench``: the one place that lists them."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        title: its line in the list.
        module: has `add_options` and `run`, see `Module`. Imported when the command runs, so that a
            command needs only what it uses.
        interpreted: runs in a process with TRITON_INTERPRET=1, which triton reads when imported.
        passes_on: the command that gets the options this one does not know (`options.extra`).
    """

    title: str
    module: str
    interpreted: bool = False
    passes_on: str = ""


class Module(Protocol):
    """What a command's module must define."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own options; `parser.get_default("command")` is its name."""

    def run(self, options: argparse.Namespace) -> int:
        """Run the command named `options.command`; returns the exit status."""


COMMANDS = {
    "encode": Command("the Encoding layer against plain PyTorch", "bench.compare"),
    "batch_norm": Command("batch norm + residual + ReLU against torch's layers", "bench.compare"),
    "upsample": Command("upsampling + cross-entropy against torch's functions", "bench.compare"),
    "crop": Command("decoding and augmenting against one transform at a time", "bench.compare"),
    "cifar": Command("a CIFAR-10 network against the materialising formula", "bench.compare"),
    "step": Command(
        "a training step of the network, phase by phase, against stock code", "bench.step"
    ),
    "host": Command("host time per call and per step, ours against torch's", "bench.host"),
    "loader": Command("images per second from JPEGs to training batches", "bench.loader"),
    "evaluate": Command("scoring a data set, against one window at a time", "bench.evaluate"),
    "context": Command(
        "FCN, EncNet, EncNet+SE on the embedded data set, several seeds each",
        "bench.context",
        passes_on="python -m encnet_triton.train",
    ),
    "real": Command(
        "networks on one pretrained trunk on your own images, several seeds each",
        "bench.real",
        passes_on="python -m encnet_triton.train",
    ),
    "smp": Command(
        "a training step on a light trunk, beside segmentation_models.pytorch", "bench.smp"
    ),
    "smp_train": Command(
        "trains networks of segmentation_models.pytorch as ours are, on your own images",
        "bench.smp_train",
        passes_on="python -m encnet_triton.train",
    ),
    "versions": Command(
        "tries the kernels with other versions of Triton and torch; no GPU", "bench.versions"
    ),
    "gpu": Command("everything worth measuring on a GPU, within a time limit", "bench.gpu.session"),
    "tune": Command(
        "the fastest configuration of every kernel on a GPU, for the launcher", "bench.gpu.session"
    ),
    "static compile": Command(
        "registers, spills, memory and instructions of every kernel", "bench.static.compile"
    ),
    "static traffic": Command(
        "bytes the Triton kernels move, counted", "bench.static.traffic", interpreted=True
    ),
    # In interpreter mode fake CPU tensors take the GPU's code paths.
    "static memory": Command(
        "peak memory of a training step on a GPU, predicted",
        "bench.static.memory",
        interpreted=True,
    ),
    "static cost": Command(
        "multiply-accumulates of each form of EncNet and of the FCN", "bench.static.cost"
    ),
}


def module_of(name: str) -> Module:
    """Import the module of a command."""
    return cast(Module, importlib.import_module(COMMANDS[name].module))


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command's own options."""
    from encnet_triton.options import Parser  # not at the top: imports torch, which is slow

    module, other = module_of(name), COMMANDS[name].passes_on
    made = Parser(
        prog=f"python -m bench {name}",
        description=module.__doc__,
        epilog=f"Other options are passed to {other}." if other else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(command=name)
    module.add_options(made)
    return made


def parse(name: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command's options; a wrong one ends the process with one sentence and status 2."""
    parser = parser_of(name)
    if not COMMANDS[name].passes_on:
        return parser.parse_args(arguments)
    options, extra = parser.parse_known_args(arguments)
    options.extra = extra
    return options
