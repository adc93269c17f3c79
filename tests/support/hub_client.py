"""A stand-in for huggingface_hub: a Hub in a folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class HubInFolder:
    """What `encnet_triton.weights.remote` calls, with files below a folder.

    Attributes:
        calls: (name of the function, positional arguments, keyword arguments), in order.
        private: of every repository.
        error: raised by every call, if there is one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.private = False
        self.error: Exception | None = None

    def _note(self, call: str, *arguments: Any, **options: Any) -> None:
        self.calls.append((call, arguments, options))
        if self.error is not None:
            raise self.error

    def hf_hub_download(self, name: str, file: str, **options: Any) -> str:
        self._note("hf_hub_download", name, file, **options)
        found = self.root / name / "commit" / file
        if not found.is_file():
            raise type("EntryNotFoundError", (Exception,), {})
        return str(found)

    def HfApi(self, **options: Any) -> HubInFolder:  # noqa: N802
        self._note("HfApi", **options)
        return self

    def create_repo(self, name: str, **options: Any) -> Any:
        self._note("create_repo", name, **options)
        return SimpleNamespace(repo_id=name)

    def model_info(self, name: str, **options: Any) -> Any:
        self._note("model_info", name, **options)
        return SimpleNamespace(private=self.private)

    def file_exists(self, name: str, file: str, **options: Any) -> bool:
        self._note("file_exists", name, file, **options)
        return (self.root / name / "commit" / file).exists()

    def upload_folder(self, **options: Any) -> Any:
        self._note("upload_folder", **options)
        place = self.root / options["repo_id"] / "commit"
        place.mkdir(parents=True, exist_ok=True)
        for file in options["allow_patterns"]:
            shutil.copy(Path(options["folder_path"], file), place)
        return SimpleNamespace(commit_url=f"https://hub/{options['repo_id']}/commit/1")


def stand_in(root: Path, patch: pytest.MonkeyPatch) -> HubInFolder:
    """The Hub that ``import huggingface_hub`` gives until the test ends."""
    hub, module = HubInFolder(root), ModuleType("huggingface_hub")
    vars(module).update(HfApi=hub.HfApi, hf_hub_download=hub.hf_hub_download)
    patch.setitem(sys.modules, "huggingface_hub", module)
    return hub
