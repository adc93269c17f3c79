"""Predictions for a test server: ``python -m encnet_triton.submit --checkpoint FILE --data DIR``.

Writes one zip archive in the layout that the server of VOC 2012 or ADE20K asks for, and reads it
back before it is given its name.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from encnet_triton.command_line import exit_status
from encnet_triton.data import Dataset, create_dataset
from encnet_triton.data.voc import voc_palette
from encnet_triton.evaluate import add_view_arguments, pick_device, views_of
from encnet_triton.files import replacing
from encnet_triton.inference import Predictor
from encnet_triton.weights.checkpoint import load_model

SERVERS = {"voc": 21, "voc_aug": 21, "ade20k": 150}
"""Data sets with a test server, and their number of classes."""


def file_name(dataset: str, stem: str, competition: str) -> str:
    """Where the server looks for the prediction of an image, inside the archive."""
    if dataset == "ade20k":
        return f"{stem}.png"
    return f"results/VOC2012/Segmentation/{competition}_test_cls/{stem}.png"


def encode_png(label: NDArray[np.uint8], dataset: str) -> bytes:
    """A label map of classes 0..n-1 as the PNG that the server reads.

    VOC: palette PNG, values 0..20. ADE20K: single channel, values 1..150.
    """
    if dataset == "ade20k":
        picture = Image.fromarray(label + np.uint8(1))
    else:
        picture = Image.fromarray(label)
        picture.putpalette(voc_palette(256).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def write_archive(
    predictor: Predictor,
    dataset: Dataset,
    name: str,
    path: Path,
    *,
    competition: str = "comp6",
    indices: Iterable[int] | None = None,
) -> int:
    """Predict all images and write the archive; returns how many files it has.

    Args:
        predictor: of a network with the data set's classes.
        dataset: its test split.
        name: of the data set, a key of `SERVERS`.
        path: of the archive; nothing is there until it is complete and verified.
        competition: VOC's "comp5" (trained on VOC alone) or "comp6" (other data too).
        indices: order of the images; wrap it to show progress.
    """
    sizes: dict[str, tuple[int, int]] = {}
    with replacing(path) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for index in range(len(dataset)) if indices is None else indices:
                image = np.asarray(dataset[index].image)
                label = predictor(image).cpu().numpy().astype(np.uint8)
                inside = file_name(name, Path(dataset.name_of(index)).stem, competition)
                archive.writestr(inside, encode_png(label, name))
                sizes[inside] = image.shape[:2]
        verify(temporary, name, sizes)
    return len(sizes)


def verify(path: Path, dataset: str, sizes: dict[str, tuple[int, int]]) -> None:
    """Read an archive back: exactly these files, each of its image's size and allowed values.

    Raises:
        ValueError: names the file that is wrong.
    """
    first = 1 if dataset == "ade20k" else 0
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sorted(names) != sorted(sizes):
            raise ValueError(f"{path} has {len(names)} files, but {len(sizes)} were written")
        for name in names:
            picture = Image.open(io.BytesIO(archive.read(name)))
            label = np.asarray(picture)
            mode = "L" if dataset == "ade20k" else "P"
            if picture.mode != mode or label.shape != sizes[name]:
                raise ValueError(f"{name} is {picture.mode} {label.shape}, not {sizes[name]}")
            if not first <= label.min() <= label.max() < SERVERS[dataset] + first:
                raise ValueError(f"{name} has values {label.min()}..{label.max()}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m encnet_triton.submit",
        description="Predict a test split and write the archive that its server takes.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dataset", choices=tuple(SERVERS), help="default: the training run's")
    parser.add_argument("--data", help="its folder (default: the training run's)")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", type=Path, default=Path("submission.zip"))
    parser.add_argument("--competition", choices=("comp5", "comp6"), default="comp6")
    add_view_arguments(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> None:
    """Load, predict, write."""
    device = pick_device(options.device)
    model, info = load_model(options.checkpoint, device)
    name = options.dataset or info.data["name"]
    if name not in SERVERS:
        raise ValueError(f"{name} has no test server; --dataset must be {', '.join(SERVERS)}")
    if len(info.classes) != SERVERS[name]:
        raise ValueError(
            f"{options.checkpoint} has {len(info.classes)} classes, but {name} has {SERVERS[name]}"
        )
    dataset = create_dataset(name, options.split, options.data or info.data["root"])
    if list(dataset.classes) != info.classes:
        raise ValueError(f"{options.checkpoint} was trained for other classes than {name}'s")
    predictor = Predictor(model, info, device=device, views=views_of(options), batch=options.batch)

    def progress() -> Iterator[int]:
        yield from track(range(len(dataset)), "predicting", console=console, transient=True)

    count = write_archive(
        predictor, dataset, name, options.output,
        competition=options.competition, indices=progress(),
    )  # fmt: skip
    console.print(f"wrote {count} predictions to {options.output}, read back and verified")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parse(arguments)
    return exit_status(lambda: run(options, Console()))


if __name__ == "__main__":
    sys.exit(main())
