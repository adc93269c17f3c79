"""Damaged batches of CIFAR-10: images of the right shape, or a sentence that names the file."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from encnet_triton.data.base import DataError
from encnet_triton.data.cifar10 import load_cifar10
from encnet_triton.unpickle import NUMBERS, load_pickle
from tests.support.mutations import mutated

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
BATCHES = [
    pickle.dumps(document, protocol)
    for protocol in (2, 3, 4, 5)
    for document in (
        {b"data": IMAGES, b"labels": [3, 9], b"filenames": [b"a.png", b"b.png"]},
        {"data": IMAGES, "labels": np.array([3, 9])},
        {"data": IMAGES.astype(">i4"), "labels": np.array([3, 9], np.uint8)},
    )
]
RECORDS = np.concatenate([np.array([[3], [9]], np.uint8), IMAGES], 1).tobytes()


def assert_images_or_sentence(root: Path, path: Path) -> None:
    try:
        found = load_cifar10(root, "test")
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    count = len(found.labels)
    assert count > 0 and found.labels.max() <= 9 and found.labels.dtype == np.uint8
    assert found.images.shape == (count, 3, 32, 32) and found.images.dtype == np.uint8


def test_damaged_pickles(tmp_path: Path, seeds: Iterator[int]) -> None:
    path = tmp_path / "test_batch"
    for seed in seeds:
        content = BATCHES[seed % len(BATCHES)]
        path.write_bytes(mutated(content, np.random.default_rng(seed), (200, 120)))
        assert_images_or_sentence(tmp_path, path)


def test_damaged_records(tmp_path: Path, seeds: Iterator[int]) -> None:
    path = tmp_path / "test_batch.bin"
    for seed in seeds:
        path.write_bytes(mutated(RECORDS, np.random.default_rng(seed)))
        assert_images_or_sentence(tmp_path, path)


def test_programs_that_nobody_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: Iterator[int]
) -> None:
    """Opcodes of honest pickles in another order, and globals that attacks are made of."""
    monkeypatch.chdir(tmp_path)
    honest = [_opcodes(content) for content in BATCHES]
    words = [
        *(bytes([byte]) for byte in b"().0NQ]}Rabdeloqstu12"),
        *(bytes([byte]) for byte in b"\x81\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94"),
        b"K\x00", b"J\xff\xff\xff\xff", b"h\x00", b"h\x01", b"q\x00", b"C\x02ab", b"U\x02O8",
        b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n",
        b"cnumpy._core.multiarray\nscalar\n", b"cnumpy._core.numeric\n_frombuffer\n",
        b"c_codecs\nencode\n", b"ccollections\nOrderedDict\n", b"cbuiltins\nexec\n",
        b"cbuiltins\nopen\nX\x04\0\0\0madeX\x01\0\0\0w\x86R",
    ]  # fmt: skip
    for seed in seeds:
        rng = np.random.default_rng(seed)
        program = list(honest[int(rng.integers(len(honest)))])
        for _ in range(int(rng.integers(1, 6))):
            place, other = (int(i) for i in rng.integers(len(program), size=2))
            match int(rng.integers(4)):
                case 0:
                    program.insert(place, words[int(rng.integers(len(words)))])
                case 1:
                    program[place] = words[int(rng.integers(len(words)))]
                case 2:
                    program[place], program[other] = program[other], program[place]
                case 3:
                    del program[place]
        for placeholders in (False, True):
            try:
                load_pickle(io.BytesIO(b"".join(program)), NUMBERS, placeholders=placeholders)
            except pickle.UnpicklingError as error:
                assert "\n" not in str(error)
    assert not list(tmp_path.iterdir())


def _opcodes(content: bytes) -> list[bytes]:
    starts = [place for _, _, place in pickletools.genops(content) if place is not None]
    return [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
