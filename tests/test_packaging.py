"""The package list, the two links and the direction of imports are what DESIGN promises."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("name", ["kernels", "train"])
def test_link_points_to_the_top_level_folder(name: str) -> None:
    link = ROOT / "encnet_triton" / name
    # A checkout without symbolic links holds a text file there; the build does not need the links.
    target = str(link.readlink()) if link.is_symlink() else link.read_text()
    assert target == f"../{name}"
    assert (ROOT / name / "__init__.py").is_file()


def test_package_list_equals_the_tree() -> None:
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    folders = {"encnet_triton": "encnet_triton", **mapped}
    found = set()
    for package, folder in folders.items():
        # A folder that is mapped may be linked to from another one.
        inside = {p.parent for p in (ROOT / folder).rglob("*.py") if _package(p) == package}
        for inner in inside:
            assert (inner / "__init__.py").is_file(), f"{inner} has no __init__.py"
            found.add(".".join((package, *inner.relative_to(ROOT / folder).parts)))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def _package(path: Path) -> str:
    """The package that the top-level folder of a file is installed as."""
    parts = path.relative_to(ROOT).parts
    linked = parts[0] == "encnet_triton" and parts[1] in ("kernels", "train")
    name = parts[1] if linked else parts[0]
    return f"encnet_triton.{name}" if name in ("kernels", "train") else name


def _imports(path: Path) -> set[str]:
    """Names that a file imports; relative ones resolved, with a dot before them."""
    parts = path.relative_to(ROOT).parts
    inside = [*_package(path).split("."), *parts[1:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) + 1 - node.level] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            found.add(f".{name}" if node.level else name)
    return found


def test_imports_point_one_way() -> None:
    core = [p for p in (ROOT / "encnet_triton").rglob("*.py") if _package(p) == "encnet_triton"]
    assert len(core) > 15
    for path in core:
        for name in _imports(path):
            upwards = ("encnet_triton.train", "bench", "tests")
            assert not name.lstrip(".").startswith(upwards), (path, name)
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    kernels = list((ROOT / "kernels").rglob("*.py"))
    assert len(kernels) > 15
    for path in kernels:
        for name in _imports(path):
            within = f"{name}.".startswith(".encnet_triton.kernels.")
            assert within or name.split(".")[0] in allowed, (path, name)
    for path in (ROOT / "train").rglob("*.py"):
        for name in _imports(path):
            assert not name.lstrip(".").startswith(("bench", "tests")), (path, name)


def test_the_wheel_holds_operators_that_run(tmp_path: Path) -> None:
    """What is installed, not this checkout, computes."""
    pytest.importorskip("setuptools", minversion="77")
    sources = tmp_path / "sources"
    for name in ("encnet_triton", "kernels", "train"):
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    measured = {"schema": 1, "device": "Planted GPU", "triton": "3.7.1", "entries": []}
    planted = sources / "kernels" / "runtime" / "tuned" / "planted-gpu.json"
    planted.write_text(json.dumps(measured))
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    made = subprocess.run(
        [sys.executable, "-c", build], cwd=sources, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = """
import torch
from encnet_triton import kernels
from encnet_triton.kernels import reference
inputs = torch.randn(1, 3, 4), torch.randn(2, 4), torch.randn(2)
torch.testing.assert_close(kernels.encode(*inputs), reference.encode(*inputs))
from encnet_triton.kernels.runtime import tuned
assert tuned.read(tuned.FOLDER / tuned.file_name("Planted GPU")).device == "Planted GPU"
print(kernels.__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(tmp_path / "installed")


IMPORTS = {
    "encnet_triton.convert": "convert_model export_backbone load_backbone load_foreign",
    "encnet_triton.data": "create_dataset",
    "encnet_triton.inference": "PAPER_SCALES Predictor Views resized window_starts",
    "encnet_triton.predict": "read_image",
    "encnet_triton.protocols": "ProtocolScores protocol_scores",
    "encnet_triton.weight_files": "listed read_document read_tensors tensors_in write_plain",
}
"""Names that programs of others import from where they once were."""


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_of_others_stay_valid(module: str) -> None:
    found = importlib.import_module(module)
    assert not [name for name in IMPORTS[module].split() if not hasattr(found, name)]


def test_version_is_said_once() -> None:
    import encnet_triton

    assert PROJECT["project"]["version"] == encnet_triton.__version__
    assert f"## {encnet_triton.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_satisfy_the_ranges_of_the_project() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    for dependency in PROJECT["project"]["dependencies"]:
        name, least = dependency.split(";")[0].strip().split(">=")
        pinned = tuple(int(x) for x in pins[name].split("."))
        assert pinned >= tuple(int(x) for x in least.split(".")), dependency


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_gpu_tests_run_in_the_environment_that_is_named() -> None:
    """It is taken as it is: no environment is made and nothing installed; without one they are."""
    command = ["make", "--dry-run", "--always-make", "test-gpu"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS")}
    for named in ([], ["PYTHON=some-python"]):
        done = subprocess.run(
            [*command, *named], cwd=ROOT, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert "-m pytest" in done.stdout
        assert ("pip install" in done.stdout) == (not named)
        assert ("some-python -m pytest" in done.stdout) == bool(named)


def test_processes_that_tests_start_run_this_checkout(tmp_path: Path) -> None:
    """Whether or not it, or another one, is installed."""
    code = "import bench, encnet_triton.train as t; print(bench.__file__, t.__file__, sep=chr(10))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    files = [ROOT / "bench" / "__init__.py", ROOT / "train" / "__init__.py"]
    assert [Path(name).resolve() for name in run.stdout.splitlines()] == files


def test_tests_are_collected_without_optional_packages() -> None:
    """They ask for those with pytest.importorskip."""
    optional = {"hypothesis", "matplotlib", "pycocotools", "scipy", "torchvision"}
    for path in (ROOT / "tests").rglob("*.py"):
        assert not optional & {name.split(".")[0] for name in _imports(path)}, path
