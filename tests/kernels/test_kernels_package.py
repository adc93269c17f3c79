"""The folder as a package: its exports, its syntax, and that copies do not disturb each other."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from encnet_triton import kernels

FOLDER = Path(kernels.__file__).resolve().parent
SOURCES = sorted(FOLDER.glob("*.py"))


def test_exports_the_operators() -> None:
    assert kernels.__all__ == [
        "batch_norm_act",
        "encode",
        "upsample_argmax",
        "upsample_cross_entropy",
    ]
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_syntax_is_that_of_python_3_9_and_imports_are_relative(source: Path) -> None:
    tree = ast.parse(source.read_text(), feature_version=(3, 9))
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").split(".")[0] in allowed


def test_refuses_the_top_level_name() -> None:
    code = "import kernels"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parent, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "import it under that name" in done.stderr.splitlines()[-1]


def test_a_second_copy_has_its_own_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FOLDER, tmp_path / "vendored_kernels")
    source = tmp_path / "vendored_kernels" / "encode.py"
    marked = source.read_text().replace("        code = _forward(", "        code = 2 * _forward(")
    assert marked != source.read_text()
    source.write_text(marked)
    monkeypatch.syspath_prepend(tmp_path)
    import vendored_kernels  # type: ignore[import-not-found]

    inputs = torch.randn(1, 3, 2, 2), torch.randn(2, 3), torch.randn(2)
    torch.testing.assert_close(vendored_kernels.encode(*inputs), 2 * kernels.encode(*inputs))
