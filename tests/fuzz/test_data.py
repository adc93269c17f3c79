"""Damaged pictures and data sets: what is in them, or a sentence that names the file; no hang."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encnet_triton.data import DataError, create_dataset
from encnet_triton.data.check import check_split, first_look, refuse_unlabelled
from encnet_triton.data.images import open_image, read_image, read_label
from tests.support.mutations import mutated

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
LABEL = np.random.default_rng(1).integers(0, 3, (9, 14), dtype=np.uint8)


def encoded(values: np.ndarray, kind: str, orientation: int = 6, **options: object) -> bytes:
    buffer, tag = io.BytesIO(), Image.Exif()
    tag[0x0112] = orientation
    Image.fromarray(values).save(buffer, kind, exif=tag, **options)
    return buffer.getvalue()


IMAGES = [
    encoded(PIXELS, "JPEG"),
    encoded(PIXELS, "JPEG", 1, progressive=True),
    encoded(PIXELS, "PNG"),
    encoded(PIXELS, "TIFF"),
    encoded(PIXELS, "TIFF", compression="tiff_lzw"),
    encoded(PIXELS, "WEBP"),
    encoded(PIXELS, "BMP"),
    encoded(PIXELS[..., 0].astype(np.uint16) * 200, "PNG"),
]
LABELS = [
    encoded(LABEL, "PNG"),
    encoded(LABEL == 1, "PNG"),
    encoded(LABEL.astype(np.uint16), "PNG"),
    encoded(LABEL, "TIFF"),
    encoded(LABEL.astype(np.int32), "TIFF", compression="tiff_adobe_deflate"),
    encoded(LABEL, "GIF"),
    encoded(LABEL, "BMP"),
]
pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, about what is damaged


@pytest.mark.parametrize("what", ["images", "labels"])
def test_damaged_pictures(tmp_path: Path, seeds: Iterator[int], what: str) -> None:
    path = tmp_path / "picture"
    contents = IMAGES if what == "images" else LABELS
    for seed in seeds:
        rng = np.random.default_rng(seed)
        path.write_bytes(mutated(contents[seed % len(contents)], rng, (300, 100)))
        try:
            if what == "images":
                size = open_image(path).size
                image = read_image(path)
                assert image.mode == "RGB" and image.size == size, seed
            else:
                label = read_label(path)
                assert label.ndim == 2 and label.dtype in (np.uint8, np.int64), seed
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error), seed


def write(root: Path) -> None:
    """A data set of both layouts: a list for val, folders for train."""
    for number in range(3):
        for place in (f"images/train/{number}", f"labels/train/{number}"):
            (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / f"images/train/{number}.jpg").write_bytes(encoded(PIXELS, "JPEG"))
        (root / f"labels/train/{number}.png").write_bytes(encoded(LABEL, "PNG"))
    (root / "classes.txt").write_text("sky\nroad\ncar\n", encoding="utf-8")
    pairs = (f"images/train/{i}.jpg\tlabels/train/{i}.png\n" for i in range(3))
    (root / "val.txt").write_text("".join(pairs), encoding="utf-8")


def _cut(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(mutated(path.read_bytes() or b"\0", rng))


def _linked(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.symlink_to(rng.choice([str(path), "nowhere", "..", "../..", "/dev/zero", "."]))


def _folder_link(path: Path, rng: np.random.Generator) -> None:
    link = path.with_name(f"more{rng.integers(9)}")
    link.unlink(missing_ok=True)
    link.symlink_to(rng.choice(["..", ".", "/tmp/none", str(path)]))


def _pipe(path: Path, _: np.random.Generator) -> None:
    path.unlink()
    os.mkfifo(path)


def _made_folder(path: Path, _: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


def _renamed(path: Path, rng: np.random.Generator) -> None:
    names = ["é.jpg", "e\u0301.jpg", ".hidden.jpg", "[red].png", "a b.jpg", "\udce9.jpg", "-.png"]
    path.rename(path.with_name(str(rng.choice(names))))


CHANGES: list[Callable[[Path, np.random.Generator], object]] = [
    _cut, _cut, _linked, _folder_link, _pipe, _made_folder, _renamed,
    lambda path, _: path.unlink(),
    lambda path, _: path.write_bytes(b""),
    lambda path, _: path.write_bytes(encoded(LABEL[:, :5], "PNG")),
    lambda path, _: path.write_text("caf\xe9\n" * 3, encoding="latin-1"),
    lambda path, _: path.write_text("a\tb\n", encoding="utf-16"),
]  # fmt: skip
OPTIONS: dict[str, list[object]] = {
    "ignore_label": [None, 0, -1, "0,255", (0, 2), [], "", 2**70, 1.5, {}],
    "label_offset": [0, -1, 1, "1", None, 10**30],
    "label_map": [None, "255=1", {0: 1}, "1=2,2=1", "=", "0=9", [1], "1=-1"],
    "classes_file": ["classes.txt", ".", "", "val.txt", "images/train/0.jpg", "/dev/null"],
    "mean": [(0.5, 0.5, 0.5), "0.1,0.2,0.3", None, (1, 2), "nan,nan,nan"],
}


def test_changed_data_sets(tmp_path: Path, seeds: Iterator[int]) -> None:
    for seed in seeds:
        rng = np.random.default_rng(seed)
        root = tmp_path / str(seed)
        write(root)
        for _ in range(int(rng.integers(4))):
            files = sorted(path for path in root.rglob("*") if path.is_file())
            if files:
                CHANGES[int(rng.integers(len(CHANGES)))](files[int(rng.integers(len(files)))], rng)
        name = str(rng.choice(list(OPTIONS)))
        options = {name: OPTIONS[name][int(rng.integers(len(OPTIONS[name])))]}
        for split in ("train", "val"):
            try:
                dataset = create_dataset(
                    "folder", split, root, **(options if rng.random() < 0.5 else {})
                )
                report = check_split(dataset, workers=1)
                assert report.bad <= report.looked_at == len(dataset), seed
                refuse_unlabelled(dataset, split)
                first_look(dataset)
            except DataError as error:
                assert "\n" not in str(error), seed
        shutil.rmtree(root)
