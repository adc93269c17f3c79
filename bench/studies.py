"""What `bench real` compares: rows of options for the trainer, and the runs that they make."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from encnet_triton.train import cli
from encnet_triton.train.config import Config


@dataclass(frozen=True)
class Variant:
    """A row of the table: options of the trainer, and how many seeds it gets."""

    options: tuple[str, ...]
    seeds: int


@dataclass(frozen=True)
class Study:
    """What is compared: variants of a recipe, each with its differences from ``bases``."""

    recipe: str
    variants: dict[str, Variant]
    bases: list[str]


def _row(seeds: int, options: str) -> Variant:
    return Variant(tuple(options.split()), seeds)


_ENCNET = "--model encnet --form released --aux false"
_RANDOM = ("--pretrained", "")
STUDIES = {
    "networks": Study(
        "_folder_lite0",
        {
            "fcn": _row(5, "--model fcn"),
            "encnet": _row(5, f"{_ENCNET} --se-loss false"),
            "encnet_se": _row(5, f"{_ENCNET} --se-loss true"),
            "psp": _row(2, "--model psp --aux false"),
            "deeplab": _row(2, "--model deeplab --aux false"),
            "fcn_random": Variant(("--model", "fcn", *_RANDOM), 2),
            "encnet_se_random": Variant((*_ENCNET.split(), *_RANDOM), 2),
        },
        ["fcn", "encnet"],
    ),
    "settings": Study(
        "folder_encnet_lite0",
        {
            "recipe": _row(1, ""),
            "lr_0.0005": _row(1, "--lr 0.0005"),
            "lr_0.001": _row(1, "--lr 0.001"),
            "lr_0.004": _row(1, "--lr 0.004"),
            "head_x5": _row(1, "--head-lr-scale 5"),
            "all_layers": _row(1, "--layer-decay 1"),
            "no_warmup": _row(1, "--warmup-steps 0"),
            "average": _row(1, "--ema 0.99"),
            "unweighted": _row(1, "--class-weight none"),
            "colour": _row(1, "--jitter 0.4,0.4,0.4"),
            "paper_form": _row(1, "--form paper --aux none"),
        },
        ["recipe"],
    ),
}


@dataclass(frozen=True)
class Run:
    """One training."""

    variant: str
    seed: int
    recipe: str
    options: list[str]
    folder: Path

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.variant}-seed{self.seed}"

    @property
    def place(self) -> Path:
        """Its folder."""
        return self.folder / self.name

    @property
    def weights(self) -> Path:
        """The last weights or their last average; not the best, which the validation chose."""
        average = self.place / "average.safetensors"
        return average if average.exists() else self.place / "last.safetensors"

    @cached_property
    def config(self) -> Config:
        """The configuration that the trainer will use."""
        given = ["--recipe", self.recipe, "--seed", str(self.seed), "--runs", str(self.folder)]
        return cli.configuration(
            cli.parse([*given, "--name", self.name, "--resume", *self.options])
        )
