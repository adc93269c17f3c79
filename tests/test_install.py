"""The sdist gives a wheel, which works from an empty folder with and without Triton.

Nothing is downloaded: the new environment sees the packages of the one that runs, but not this
checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCES = (
    ".git",
    ".venv*",
    ".*_cache",
    ".hypothesis",
    "__pycache__",
    "build",
    "dist",
    "runs",
    "*.egg-info",
)
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}

pytestmark = [pytest.mark.verify, pytest.mark.timeout(900)]  # installs and trains, twice


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def make(kind: str, sources: Path, into: Path) -> Path:
    """The wheel or the sdist of these sources."""
    into.mkdir()
    code = f"from setuptools.build_meta import build_{kind} as build; build({str(into)!r})"
    run(sys.executable, "-c", code, cwd=sources)
    (made,) = into.iterdir()
    return made


@dataclass
class Built:
    unpacked: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist unpacked, and the wheel that was built from it."""
    pytest.importorskip("setuptools", minversion="77")
    base = tmp_path_factory.mktemp("built")
    sources = base / "sources"
    shutil.copytree(ROOT, sources, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    sdist = make("sdist", sources, base / "sdist")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
        archive.extractall(base / "unpacked")  # its filter needs Python 3.11.4
    assert all(member.isfile() or member.isdir() for member in members)  # no links
    assert max(Counter(member.name for member in members).values()) == 1
    (unpacked,) = (base / "unpacked").iterdir()
    return Built(unpacked, make("wheel", unpacked, base / "wheel"))


def test_the_sdist_holds_all_that_is_tracked_but_hidden_files_and_links(built: Built) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a checkout")
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    wanted = {n for n in tracked if not n.startswith(".") and not (ROOT / n).is_symlink()}
    assert len(wanted) > 300
    assert [name for name in sorted(wanted) if not (built.unpacked / name).is_file()] == []


def test_tests_run_in_the_unpacked_sdist(built: Built) -> None:
    """It has no symbolic links."""
    tests = ("-q", "-p", "no:cacheprovider", "tests/test_packaging.py")
    said = run(sys.executable, "-m", "pytest", *tests, cwd=built.unpacked)
    assert " passed" in said and "failed" not in said


def seen_packages(folder: Path, *, triton: bool) -> None:
    """Links to all that is installed but this project, and Triton if it is not wanted."""
    folder.mkdir()
    for key in ("platlib", "purelib"):
        for path in Path(sysconfig.get_path(key)).iterdir():
            unwanted = ("encnet", "__editable__", *(() if triton else ("triton",)))
            if not path.name.startswith(unwanted) and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)


@pytest.fixture(scope="module", params=[True, False], ids=["triton", "no_triton"])
def installed(
    request: pytest.FixtureRequest, built: Built, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The commands' folder of an environment in which the wheel was installed."""
    pytest.importorskip("pip")
    if request.param:
        pytest.importorskip("triton")
    base = tmp_path_factory.mktemp("installed")
    environment = base / "environment"
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    names = {"base": str(environment), "platbase": str(environment)}
    commands, packages = (
        Path(sysconfig.get_path(n, "venv", names)) for n in ("scripts", "purelib")
    )
    python = commands / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", built.wheel, cwd=base)
    seen_packages(base / "packages", triton=request.param)
    (packages / "seen.pth").write_text(f"{base / 'packages'}\n")
    return commands


CODE = """
import sys
import torch
from importlib.util import find_spec
from PIL import Image
from encnet_triton import kernels
from encnet_triton.kernels import reference
from encnet_triton.kernels.runtime import tuned
assert kernels.__file__.startswith(sys.prefix) and tuned.__file__.startswith(sys.prefix)
inputs = torch.randn(1, 3, 4), torch.randn(2, 4), torch.randn(2)
torch.testing.assert_close(kernels.encode(*inputs), reference.encode(*inputs))
Image.new("RGB", (160, 160), (90, 140, 220)).save("photo.jpg")
print("triton" if find_spec("triton") else "no_triton")
"""


def test_the_wheel_computes_trains_and_predicts(
    installed: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    said = run(installed / "python", "-c", CODE, cwd=tmp_path)
    assert f"[{said.strip()}]" in request.node.name
    few = ("--stop-at", "2", "--batch-size", "2", "--workers", "0", "--device", "cpu")
    run(installed / "encnet", "train", *few, cwd=tmp_path)
    checkpoint = ("--checkpoint", "runs/scenes/last.safetensors")
    run(installed / "encnet", "predict", *checkpoint, "photo.jpg", cwd=tmp_path)
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 2
    shown = run(installed / "encnet", "environment", cwd=tmp_path)
    assert ("Triton has no package here" in shown) == (said.strip() == "no_triton")


def test_the_wheel_holds_no_file_twice(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"encnet_triton"}
