"""Lay these kernels out as a project of the Hugging Face kernel hub, for its kernel-builder.

    python kernels/hub/stage.py FOLDER

FOLDER is to be a git repository of its own: the build takes the operators' namespace from its
commit. What else is in it, such as the flake.lock of the build before, stays.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HUB = Path(__file__).resolve().parent
MODULE = Path("torch-ext", "encnet_kernels")  # the name in build.toml
# The build makes an _ops.py of its own and stops where it finds one.
LEFT_OUT = ("_ops.py", "hub", "README.md", "__pycache__")


def stage(folder: Path) -> None:
    """Write the project, and over the one that was staged there before."""
    shutil.rmtree(folder / MODULE, ignore_errors=True)
    shutil.copytree(HUB.parent, folder / MODULE, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(HUB / name, folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python kernels/hub/stage.py FOLDER")
    stage(Path(sys.argv[1]))
