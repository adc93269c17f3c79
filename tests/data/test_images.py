"""One reader: what a viewer shows is what training and prediction see, and labels are exact."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from encnet_triton.data import Augment, DataError, Folder
from encnet_triton.data.images import open_image, read_image, read_label
from encnet_triton.predict import read_image as read_for_predict

# A picture of four colours in blocks of 16, which survive JPEG's blocks, wider than high.
UPRIGHT = np.kron(
    np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0]] * 3], np.uint8),
    np.ones((16, 16, 1), np.uint8),
)
# How a picture is stored for each EXIF orientation, from EXIF 2.32's table of rows and columns.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


def save(path: Path, values: np.ndarray, orientation: int = 1, **options: object) -> Path:
    tag = Image.Exif()
    tag[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](values))
    Image.fromarray(stored).save(path, exif=tag, **options)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = save(tmp_path / f"a.{suffix}", UPRIGHT, orientation)
    opened = open_image(path)
    assert opened.size == (48, 32)
    for image in (read_image(path), read_for_predict(path)):
        difference = np.asarray(image).astype(int) - UPRIGHT
        assert (
            image.mode == "RGB" and np.abs(difference).mean() < (0 if suffix == "png" else 20) + 1
        )


@pytest.mark.parametrize("orientation", STORED)
def test_training_evaluation_and_prediction_see_one_picture(
    tmp_path: Path, orientation: int
) -> None:
    save(tmp_path / "a.jpg", UPRIGHT, orientation, quality=95)
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "classes.txt").write_text("one")
    (tmp_path / "val.txt").write_text("a.jpg a.png")
    dataset = Folder(tmp_path, "val")
    seen = np.asarray(read_image(tmp_path / "a.jpg"))
    np.testing.assert_array_equal(np.asarray(dataset[0].image), seen)
    plain = Augment((32, 48), scale=(1, 1), rotation=0, flip=0)
    cropped, _ = plain(*dataset.open(0), np.random.default_rng(0))
    np.testing.assert_array_equal(cropped, seen)


def test_a_label_on_its_side_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", UPRIGHT, 6)
    Image.fromarray(np.zeros((48, 32), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "classes.txt").write_text("one")
    (tmp_path / "val.txt").write_text("a.jpg a.png")
    with pytest.raises(DataError, match="48 x 32 pixels.* is 32 x 48; .* EXIF orientation"):
        Folder(tmp_path, "val")[0]


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_labels_are_turned_as_images_are(tmp_path: Path, suffix: str, orientation: int) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    path = save(tmp_path / f"a.{suffix}", values, orientation)
    np.testing.assert_array_equal(read_label(path), values)


def test_a_damaged_exif_is_left_out(tmp_path: Path) -> None:
    Image.fromarray(UPRIGHT).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff")
    assert read_image(tmp_path / "a.jpg").size == (48, 32)


def png(values: np.ndarray, bits: int, colour: int = 0) -> bytes:
    """A PNG of so many bits per sample, from its standard."""
    height, width = values.shape[:2]
    samples = values.reshape(height, -1).astype(">u2")
    unpacked = np.unpackbits(samples.view(np.uint8).reshape(height, -1, 2), axis=2)
    rows = np.packbits(unpacked[:, :, 16 - bits :].reshape(height, -1), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(range(3 * 2 ** min(bits, 4)))) if colour == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette
        + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize("width", [1, 5, 16])
@pytest.mark.parametrize(
    ("bits", "colour"),
    [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (1, 3), (2, 3), (4, 3), (8, 3)],
)
def test_label_pngs_have_the_values_in_the_file(
    tmp_path: Path, bits: int, colour: int, width: int
) -> None:
    most = 2 ** (min(bits, 4) if colour == 3 else bits)
    values = np.random.default_rng(bits).integers(0, most, (7, width))
    path = tmp_path / "a.png"
    path.write_bytes(png(values, bits, colour))
    found = read_label(path)
    np.testing.assert_array_equal(found, values)
    assert found.dtype == (np.int64 if bits == 16 else np.uint8)


def tiff(values: np.ndarray, bits: int, white_is_zero: bool) -> bytes:
    """An uncompressed TIFF of one strip, from its specification."""
    height, width = values.shape
    unpacked = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[:, :, 8 - bits :]
    body = np.packbits(unpacked.reshape(height, -1), axis=1).tobytes()
    tags = [
        (256, width), (257, height), (258, bits), (259, 1), (262, 0 if white_is_zero else 1),
        (273, 8), (277, 1), (278, height), (279, len(body)),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(body))
    return head + body + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_label_tiffs_have_the_values_in_the_file(
    tmp_path: Path, bits: int, white_is_zero: bool
) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (5, 8))
    (tmp_path / "a.tif").write_bytes(tiff(values, bits, white_is_zero))
    np.testing.assert_array_equal(read_label(tmp_path / "a.tif"), values)


@pytest.mark.parametrize(
    ("mode", "suffix", "sentence"),
    [("RGB", "png", "pixel format RGB"), ("LA", "png", "pixel format LA"),
     ("L", "jpg", "is a JPEG, which alters values"), ("F", "tif", "pixel format F")],
)  # fmt: skip
def test_labels_of_no_single_number_are_refused(
    tmp_path: Path, mode: str, suffix: str, sentence: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (4, 3)).save(path)
    with pytest.raises(DataError, match=f"label {re.escape(str(path))} .*{sentence}"):
        read_label(path)


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_16_bits_become_8_by_their_high_byte(tmp_path: Path, colour: int) -> None:
    shape = (6, 5, {0: 1, 2: 3, 4: 2, 6: 4}[colour])
    values = np.random.default_rng(colour).integers(0, 2**16, shape)
    path = tmp_path / "a.png"
    path.write_bytes(png(values, 16, colour))
    seen = np.asarray(read_image(path))
    channels = values[..., :1] if colour in (0, 4) else values[..., :3]
    # Pillow rounds where a PNG has transparency and cuts off where it has none.
    assert np.abs(seen.astype(int) - (channels >> 8)).max() <= 1


def test_a_16_bit_tiff_is_scaled_too(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 30, dtype=np.uint16).reshape(5, 6)
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.tif"))[..., 0], values >> 8)


@pytest.mark.parametrize("colour", [0, 2])
def test_16_bits_of_which_12_are_used_are_refused(tmp_path: Path, colour: int) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(np.full((4, 4, 3 if colour else 1), 4095), 16, colour))
    with pytest.raises(DataError, match=r"a\.png has 16 bits .* below 4,096 of 65,536"):
        read_image(path)
    path.write_bytes(png(np.zeros((4, 4, 3 if colour else 1)), 16, colour))
    assert not np.asarray(read_image(path)).any()


def test_16_bits_of_which_8_are_used_would_be_black_and_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(np.full((4, 4, 1), 255), 16, 0))
    with pytest.raises(DataError, match=r"a\.png has 16 bits .* below 256 of 65,536"):
        read_image(path)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_without_a_known_range_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.ones((3, 4), dtype)).save(tmp_path / "a.tif")
    for read in (read_image, open_image, read_for_predict):
        with pytest.raises(DataError, match=r"a\.tif: pixel format .* must have 8 bits"):
            read(tmp_path / "a.tif")


@pytest.mark.parametrize("read", [read_image, read_label, read_for_predict])
def test_more_pixels_than_are_read(tmp_path: Path, read) -> None:
    header = png(np.zeros((1, 1)), 8)
    bomb = bytearray(header)
    bomb[16:24] = struct.pack(">II", 14000, 14000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    (tmp_path / "a.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"a\.png has more than the 178,956,970 pixels"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("read", [read_image, read_label])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist"), (b"", "is empty"), (b"text", "is not an image"),
        # To show PostScript, Pillow would start Ghostscript.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not an image"),
    ],
    ids=["missing", "empty", "text", "program"],
)  # fmt: skip
def test_what_is_no_picture(tmp_path: Path, read, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.png {sentence}"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("present", [(0, 2), (2,), (0, 1, 2), (0, 255)])
def test_a_gif_has_the_numbers_that_were_saved(tmp_path: Path, present: tuple[int, ...]) -> None:
    """Pillow renumbers the entries of a GIF's palette by how often they occur."""
    values = np.resize(np.array(present, np.uint8), (4, 6))
    Image.fromarray(values).save(tmp_path / "a.gif")
    np.testing.assert_array_equal(read_label(tmp_path / "a.gif"), values)


@pytest.mark.parametrize("plain", [True, False], ids=["text", "bytes"])
@pytest.mark.parametrize("most", [1, 2, 18, 150, 255, 1000, 65535])
def test_a_pgm_has_the_numbers_in_the_file(tmp_path: Path, most: int, plain: bool) -> None:
    values = np.arange(12).reshape(3, 4) * most // 11
    rows = "\n".join(" ".join(map(str, row)) for row in values)
    body = rows.encode() if plain else values.astype("u1" if most < 256 else ">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P%d\n4 3\n%d\n" % (2 if plain else 5, most) + body)
    np.testing.assert_array_equal(read_label(tmp_path / "a.pgm"), values)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [("a.tif", {"compression": "jpeg"}, "TIFF of JPEGs"), ("a.webp", {}, "WEBP")],
)
def test_a_label_of_a_lossy_format_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], what: str
) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name, **options)
    with pytest.raises(DataError, match=f"is a {what}, which alters values"):
        read_label(tmp_path / name)
