"""What is installed, the two links, the version, and the direction of imports."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("name", ["kernels", "train"])
def test_package_is_the_top_level_folder(name: str) -> None:
    link = ROOT / "encnet_triton" / name
    if link.is_symlink() or link.exists():  # an sdist has none
        # A checkout without symbolic links holds a text file there; the build needs no links.
        target = str(link.readlink()) if link.is_symlink() else link.read_text()
        assert target == f"../{name}"
    found = importlib.import_module(f"encnet_triton.{name}").__file__
    assert found is not None and Path(found).resolve() == ROOT / name / "__init__.py"


@pytest.mark.parametrize("left", ["nothing", "text"])
def test_sources_without_symbolic_links_are_imported(tmp_path: Path, left: str) -> None:
    inside = tmp_path / "encnet_triton"
    inside.mkdir()
    shutil.copy(ROOT / "encnet_triton" / "__init__.py", inside)
    for name in ("kernels", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("print(__file__)")
        if left == "text":
            (inside / name).write_text(f"../{name}")
    code = "import encnet_triton.kernels, encnet_triton.train"
    command = [sys.executable, "-S", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True
    )
    assert run.stdout.split() == [str(tmp_path / n / "__init__.py") for n in ("kernels", "train")]


def copied_sources(tmp_path: Path) -> Path:
    """What a build reads, without the links that a build may not have."""
    sources = tmp_path / "sources"
    for name in ("encnet_triton", "kernels", "train"):
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=left_out)
    for name in ("kernels", "train"):
        (sources / "encnet_triton" / name).unlink(missing_ok=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    return sources


def forgotten(sources: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Files of these sources that setuptools puts into no wheel, or into one twice."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    monkeypatch.chdir(sources)
    distribution = setuptools.Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    made = build.get_outputs(include_bytecode=False)
    installed = Counter(str(Path(name).relative_to(build.build_lib)) for name in made)
    wanted = Counter(
        str(path if top == "encnet_triton" else Path("encnet_triton", path))
        for top in ("encnet_triton", "kernels", "train")
        for path in Path(top).rglob("*")
        if path.is_file() and path.name != "README.md" and path.parts[:2] != ("kernels", "hub")
    )
    assert len(wanted) > 150
    return {name for name in {*installed, *wanted} if installed[name] != wanted[name]}


def test_the_wheel_lists_every_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = copied_sources(tmp_path)
    (sources / "kernels" / "runtime" / "tuned" / "planted-gpu.json").write_text("{}")
    assert forgotten(sources, monkeypatch) == set()
    for name in ("kernels/new/__init__.py", "encnet_triton/models/table.json"):
        (sources / name).parent.mkdir(exist_ok=True)
        (sources / name).touch()
    assert forgotten(sources, monkeypatch) == {
        "encnet_triton/kernels/new/__init__.py",
        "encnet_triton/models/table.json",
    }


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


def test_version_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the package; metadata are made from it, without importing anything else."""
    import encnet_triton

    setuptools = pytest.importorskip("setuptools", minversion="77")
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution()
    distribution.parse_config_files()
    assert distribution.get_version() == encnet_triton.__version__
    assert "version" in PROJECT["project"]["dynamic"]
    assert f"## {encnet_triton.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_satisfy_the_ranges_of_the_project() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    for dependency in PROJECT["project"]["dependencies"]:
        name, least = dependency.split(";")[0].strip().split(">=")
        pinned = tuple(int(x) for x in pins[name].split("."))
        assert pinned >= tuple(int(x) for x in least.split(".")), dependency


def test_the_image_takes_all_that_the_build_reads(tmp_path: Path) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    taken = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    built = {path.name for path in copied_sources(tmp_path).iterdir()}
    assert taken == built | {"constraints.txt"}


def test_ci_tries_what_the_documents_list() -> None:
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if not workflow.exists():
        pytest.skip("not a checkout")
    row = re.compile(r"{ torch: (\S+), triton: (\S+), numpy: (\S+), python: \"(\S+)\" }")
    rows = row.findall(workflow.read_text())
    assert len(rows) == 5
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    names = ("torch", "triton", "numpy")
    assert all(
        f"{name}=={version}" in pins for name, version in zip(names, rows[0][:3], strict=True)
    )
    listed = (ROOT / "docs" / "versions.md").read_text()
    for versions in rows:
        assert all(version in listed for version in versions), versions


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
    optional = {
        "huggingface_hub", "hypothesis", "matplotlib", "pycocotools", "scipy", "torchvision"
    }  # fmt: skip
    for path in (ROOT / "tests").rglob("*.py"):
        assert not optional & {name.split(".")[0] for name in _imports(path)}, path


def test_the_makefile_knows_where_the_interpreters_tests_are() -> None:
    """It collects no others there."""
    (given,) = re.findall(r"(?m)^INTERPRETED := (.+)$", (ROOT / "Makefile").read_text())
    marked = re.compile(r"mark\.(interpreter|triton)\b")
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        if marked.search(file.read_text(encoding="utf-8")):
            assert any(file.is_relative_to(ROOT / place) for place in given.split()), file
