"""The package list, the two links and the direction of imports are what DESIGN promises."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
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
    found = {
        "encnet_triton." + ".".join(p.parent.relative_to(ROOT / "encnet_triton").parts)
        for p in (ROOT / "encnet_triton").rglob("__init__.py")
        if p.parent.name not in ("kernels", "train", "encnet_triton")
    }
    for package, folder in mapped.items():
        inside = [p.parent for p in (ROOT / folder).rglob("__init__.py")]
        assert inside == [ROOT / folder], f"{folder}/ must stay flat"
        found.add(package)
    assert found | {"encnet_triton"} == set(PROJECT["tool"]["setuptools"]["packages"])


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


def test_imports_point_one_way() -> None:
    core = [
        p
        for p in (ROOT / "encnet_triton").rglob("*.py")
        if not {"kernels", "train"} & set(p.relative_to(ROOT / "encnet_triton").parts[:1])
    ]
    assert len(core) > 15
    for path in core:
        for name in _imports(path):
            assert not name.startswith(("encnet_triton.train", "bench", "tests")), (path, name)
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for path in (ROOT / "kernels").glob("*.py"):
        for name in _imports(path):
            assert name.split(".")[0] in allowed, (path, name)
    for path in (ROOT / "train").glob("*.py"):
        for name in _imports(path):
            assert not name.startswith(("bench", "tests")), (path, name)


def test_kernels_refuse_to_be_a_top_level_package() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "encnet_triton.kernels" in run.stderr.splitlines()[-1]


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
