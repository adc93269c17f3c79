"""Which tests run where, and small data and a recipe that several tests train on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Processes that tests start find the packages of this checkout, installed or not, and before any
# other copy that is: pytest's `pythonpath` is this process's alone.
ROOT = str(Path(__file__).parents[1])
_paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != ROOT]
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *_paths])

# The mode of a whole process: triton reads it when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure() -> None:
    if INTERPRETED:
        from tests.support.interpreter import repair_interpreter

        repair_interpreter()


def _runs_here(item: pytest.Item) -> bool:
    """Kernels run in the interpreter or on a GPU; everything else runs outside the interpreter."""
    # By marker: a parameter of that name is among the keywords as well.
    if item.get_closest_marker("triton"):
        return INTERPRETED or torch.cuda.is_available()
    return (item.get_closest_marker("interpreter") is not None) == INTERPRETED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[i for i in items if not _runs_here(i)])
    items[:] = [i for i in items if _runs_here(i)]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What this process does not run at all, then why tests were skipped, with counts."""
    say = terminalreporter.write_line
    terminalreporter.section("not run, and why")
    if INTERPRETED:
        say("everything but the tests of Triton kernels: TRITON_INTERPRET=1 is set")
    else:
        say("tests of Triton's interpreter: they need TRITON_INTERPRET=1")
        if not torch.cuda.is_available():
            say("tests of Triton kernels: they need a GPU, or TRITON_INTERPRET=1")
    skipped = (report.longrepr for report in terminalreporter.stats.get("skipped", ()))
    reasons = Counter(why[2] if isinstance(why, tuple) else str(why) for why in skipped)
    for reason, count in reasons.most_common():
        say(f"{count} of the others: {reason.removeprefix('Skipped: ')}")


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors of this process are float64, for tests that compare two trainings."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


CLASSES = ("sky", "ground", "thing")


def write_folder_data(root: Path, train: int = 8, val: int = 3, size: int = 64) -> Path:
    """Images of two halves and a square, each with ignored areas (255) of another size."""
    rng = np.random.default_rng(0)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    colours = np.array([[90, 140, 220], [90, 160, 60], [220, 60, 60]], dtype=np.int16)
    for split, count in (("train", train), ("val", val)):
        lines = []
        for i in range(count):
            label = np.zeros((size, size), dtype=np.uint8)
            label[int(rng.integers(20, 44)) :] = 1
            top, left = rng.integers(0, size - 16, 2)
            label[top : top + 16, left : left + 16] = 2
            image = colours[label] + rng.integers(-25, 25, (size, size, 3))
            label[:, : 3 * i] = 255
            (root / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / split / f"{i}.jpg")
            Image.fromarray(label).save(root / split / f"{i}.png")
            lines.append(f"{split}/{i}.jpg {split}/{i}.png\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root


@pytest.fixture
def folder_data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    return write_folder_data(root)


RECIPE = """
[model]
model = "encnet"
backbone = "demo"
num_codewords = 4
head_channels = 32
[data]
dataset = "folder"
crop = 48
base_size = "none"
scale_by = "image"
scale = [0.8, 1.25]
workers = 0
[optim]
lr = 0.02
batch_size = 4
epochs = 2
[run]
device = "cpu"
amp = "off"
log_every = 1
val_every = 1
pictures = 2
report = false
"""


@pytest.fixture
def recipe(tmp_path: Path, folder_data: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(
        RECIPE.replace('dataset = "folder"', f'dataset = "folder"\ndata = "{folder_data}"')
    )
    return path
