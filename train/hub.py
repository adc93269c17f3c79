"""Share a model: ``encnet hub best.safetensors --repo user/name``.

Writes a checkpoint as a folder with a card, uploads it to the Hugging Face Hub, or both. A folder
that was made so before is uploaded as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from encnet_triton import options
from encnet_triton.data.files import read_json
from encnet_triton.train.config import SECTIONS, Config
from encnet_triton.train.log import is_number, read_records
from encnet_triton.train.recipe import as_toml
from encnet_triton.weights import CheckpointError, load_model
from encnet_triton.weights.card import UNKNOWN, default_license, make_card
from encnet_triton.weights.checkpoint import read
from encnet_triton.weights.folder import CARD, CONFIG, WEIGHTS, write_folder
from encnet_triton.weights.remote import SCHEME, client, upload


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = options.Parser(
        prog="encnet hub",
        description="Write a model as a folder with a card, for others to load, or upload it to "
        "the Hugging Face Hub.",
    )
    parser.add_argument(
        "checkpoint", type=options.checkpoint, help="best.safetensors of a run, or such a folder"
    )
    parser.add_argument("--folder", type=Path, help="folder to write (default: none)")
    parser.add_argument(
        "--repo", help="repository to upload to: user/name, made if need be (default: none)"
    )
    parser.add_argument("--private", action="store_true", help="only you may see the repository")
    parser.add_argument(
        "--license", help="of the weights, as the Hub spells it, such as cc-by-4.0 (default: "
        "mit for scenes, else unknown)",
    )  # fmt: skip
    parser.add_argument(
        "--scores", type=Path,
        help="file of evaluate --json (default: the run's own validation)",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model or a card that is there"
    )
    return parser


def run(given: argparse.Namespace, console: Console) -> None:
    """Load, write, upload."""
    if not (given.folder or given.repo):
        raise ValueError("give --folder DIR, --repo user/name, or both")
    if given.repo:
        client()  # before the work
    if isinstance(given.checkpoint, Path) and given.checkpoint.is_dir():
        for option in ("folder", "license", "scores"):
            if getattr(given, option):
                raise ValueError(f"--{option} is for a checkpoint; {given.checkpoint} is a folder")
        load_model(given.checkpoint)
        publish(given.checkpoint, given, console)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made)
        write(folder, given, console)
        if given.repo:
            publish(folder, given, console)


def write(folder: Path, given: argparse.Namespace, console: Console) -> None:
    """Write the checkpoint as a folder."""
    if (folder / WEIGHTS).exists() and not given.overwrite:
        raise ValueError(f"{folder} holds a model: give --overwrite, or another --folder")
    model, info = load_model(given.checkpoint)
    scores, recipe = of_run(given.checkpoint)
    if given.scores:
        scores = read_scores(given.scores)
    name = given.repo or folder.resolve().name
    card = make_card(model, info, name, license=given.license, scores=scores, recipe=recipe)
    write_folder(folder, model, info, card, keep_card=not given.overwrite)
    if given.folder:
        console.print(f"wrote {folder}: {WEIGHTS}, {CONFIG}, {CARD}")
    if (given.license or default_license(info)) == UNKNOWN:
        console.print("note: the card states no licence; --license names one")
    if not scores:
        console.print("note: the card has no scores; --scores takes those of evaluate --json")


def publish(folder: Path, given: argparse.Namespace, console: Console) -> None:
    """Upload a folder."""
    address = upload(
        folder,
        given.repo,
        private=given.private or None,
        keep_card=not given.overwrite,
        commit_message="Upload the model",
    )
    console.print(f"uploaded to {SCHEME}{given.repo}: {address}")


def read_scores(path: Path) -> dict[str, Any]:
    """What ``evaluate --json`` wrote.

    Raises:
        ValueError: it is something else.
    """
    found = read_json(path, "file of scores")
    if not _are_scores(found):
        raise ValueError(f"{path} holds no scores as evaluate --json writes them")
    return found


def _are_scores(found: dict[str, Any]) -> bool:
    """Whether there are figures, and all of them are numbers; null is that of an absent class."""
    iou = found.get("iou")
    shares = list(iou.values()) if isinstance(iou, dict) else []
    figures = [found[key] for key in ("miou", "pixel_accuracy", "error") if key in found]
    return bool(figures) and all(one is None or is_number(one) for one in (*figures, *shares))


def of_run(checkpoint: Path | str) -> tuple[dict[str, Any] | None, str | None]:
    """The scores and the recipe of a checkpoint, if its run's files are beside it."""
    folder = Path(checkpoint).parent
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = Config(
            recipe=saved["recipe"], **{name: of(**saved[name]) for name, of in SECTIONS.items()}
        )
        _, metadata = read(Path(checkpoint), prefix="metadata alone")
        records = read_records(folder)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, CheckpointError):
        return None, None  # no run, or one of another version
    return _validated(config, metadata, records), as_toml(_anywhere(config), brief=True)


def _validated(
    config: Config, metadata: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The validation of exactly these weights."""
    step = metadata.get("step")
    if step is None and not config.optim.ema:  # else the average was validated
        step = metadata.get("progress", {}).get("step")
    for record in reversed(records):
        if record["kind"] == "val" and record["step"] == step and _are_scores(record):
            return {"dataset": config.data.dataset, "split": config.data.val_split, **record}
    return None


def _anywhere(config: Config) -> Config:
    """The configuration without folders of this machine."""
    for section in SECTIONS:
        values = getattr(config, section)
        for name, value in asdict(values).items():
            if isinstance(value, str) and Path(value).is_absolute():
                setattr(values, name, Path(value).name)
    return config


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = make_parser().parse_args(arguments)
    return options.exit_status(lambda: run(given, options.make_console()), less="")


if __name__ == "__main__":
    sys.exit(main())
