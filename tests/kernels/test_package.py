"""The folder as a package: its exports, its syntax, and that copies do not disturb each other."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from encnet_triton import kernels

FOLDER = Path(kernels.__file__).resolve().parent
# As they are in torch's registry: exported programs hold these names.
OPERATORS = {
    "batch_norm_backward_frozen",
    "batch_norm_backward_input",
    "batch_norm_backward_sums",
    "batch_norm_moments",
    "batch_norm_normalise",
    "batch_norm_statistics",
    "batch_norm_unpack",
    "encode_backward",
    "encode_forward",
    "upsample_argmax",
    "upsample_cross_entropy_backward",
    "upsample_cross_entropy_map",
    "upsample_cross_entropy_reduced",
    "upsample_cross_entropy_scale_grad",
}
SOURCES = sorted(FOLDER.rglob("*.py"))
OPERATIONS = [name for name in kernels.__all__ if name != "layers"]


def test_exports_the_operators() -> None:
    assert kernels.__all__ == [
        "ResidualNorm",
        "batch_norm_act",
        "batch_norm_act_forked",
        "encode",
        "layers",
        "upsample_argmax",
        "upsample_cross_entropy",
    ]
    assert all(callable(getattr(kernels, name)) for name in OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_module_has_the_name_of_an_operator(name: str) -> None:
    """`import encnet_triton.kernels.encode as m` would give the function."""
    assert importlib.util.find_spec(f"{kernels.__name__}.{name}") is None


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_syntax_is_that_of_python_3_9(source: Path) -> None:
    assert ast.parse(source.read_text(), feature_version=(3, 9)).body


def import_kernels(*folders: Path) -> subprocess.CompletedProcess[str]:
    """The package of that name, where only these folders are searched."""
    code = (
        f"import sys; sys.path[:0] = {[str(f) for f in folders]}; import kernels; kernels.hello()"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    return subprocess.run(command, capture_output=True, text=True)


def test_refuses_the_top_level_name() -> None:
    done = import_kernels(FOLDER.parent)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError")
    assert "import it under that name" in done.stderr.splitlines()[-1]


def test_hides_no_other_package_of_the_top_level_name(tmp_path: Path) -> None:
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("from .inner import hello\n")
    (other / "inner.py").write_text("def hello():\n    print('hello from', __name__)\n")
    done = import_kernels(FOLDER.parent, tmp_path)
    assert done.stdout == "hello from kernels.inner\n", done.stderr


def test_a_second_copy_has_its_own_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FOLDER, tmp_path / "vendored_kernels")
    source = tmp_path / "vendored_kernels" / "encoding" / "operator.py"
    marked = source.read_text().replace("code = pytorch.forward(", "code = 2 * pytorch.forward(")
    assert marked != source.read_text()
    source.write_text(marked)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(registered())
    import vendored_kernels  # type: ignore[import-not-found]

    inputs = torch.randn(1, 3, 2, 2), torch.randn(2, 3), torch.randn(2)
    torch.testing.assert_close(vendored_kernels.encode(*inputs), 2 * kernels.encode(*inputs))
    # One namespace a copy, whatever folder an operator is in.
    assert {name.split("::")[0] for name in {*registered()} - before} == {"vendored_kernels"}
    ours = {name for name in before if name.startswith("encnet_triton_kernels::")}
    assert {name.split("::")[1] for name in ours} == OPERATORS


def registered() -> list[str]:
    """Names of all operators, without their overloads."""
    return [name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()]
