"""Models on the Hugging Face Hub, through huggingface_hub (the extra ``hub``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import encnet_triton
from encnet_triton.weights.folder import CARD, CONFIG, WEIGHTS
from encnet_triton.weights.info import CheckpointError

__all__ = ["SCHEME", "client", "download", "place_of", "upload"]

SCHEME = "hf://"
"""What the name of a model on the Hub begins with, where a file could be meant as well."""

_HERE = {"library_name": "encnet-triton", "library_version": encnet_triton.__version__}

# By the names of classes, which the package has moved about; the first that fits counts.
_WHY = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "LocalEntryNotFoundError": "it is not in the cache, and the Hub is out of reach or "
    "HF_HUB_OFFLINE is set",
    "GatedRepoError": "its owner must grant you access; then log in: hf auth login",
    "RepositoryNotFoundError": "there is none, or you may not see it; to log in: hf auth login",
    "RevisionNotFoundError": "it has no such revision",
    "EntryNotFoundError": f"{CONFIG} or {WEIGHTS} is not there",
    "LocalTokenNotFoundError": "you are not logged in: hf auth login",
}


def place_of(source: Path | str, revision: str | None = None, **options: Any) -> Path:
    """Where a model is on this machine: ``hf://user/name`` or ``hf://user/name@revision`` is
    downloaded into the Hub's cache, see `download`; anything else is a path."""
    text = str(source)
    if not text.startswith(SCHEME):
        return Path(source)
    name, _, named = text.removeprefix(SCHEME).partition("@")
    return download(name, revision or named or None, **options)


def download(name: str, revision: str | None = None, **options: Any) -> Path:
    """The folder in the Hub's cache with a model's files, which are downloaded if need be.

    Args:
        name: ``user/name``.
        revision: branch, tag or commit; None for main.
        options: further ones of ``huggingface_hub.hf_hub_download``.

    Raises:
        CheckpointError: the package is missing, or the files cannot be had; says why.
    """
    get = client().hf_hub_download
    try:
        config = Path(get(name, CONFIG, revision=revision, **_HERE, **options))
        # The cache has a folder for each commit; a newer one may come between two files.
        return Path(get(name, WEIGHTS, revision=config.parent.name, **_HERE, **options)).parent
    except Exception as error:  # whatever the Hub's client raises
        shown = f"{name}@{revision}" if revision else name
        raise CheckpointError(f"{SCHEME}{shown} cannot be loaded: {_reason(error)}") from error


def upload(
    folder: Path,
    name: str,
    *,
    private: bool | None = None,
    keep_card: bool = True,
    **options: Any,
) -> str:
    """Put a model's files on the Hub in one commit; returns its address.

    Args:
        folder: as `encnet_triton.weights.folder.write_folder` made it.
        name: ``user/name``; a new repository is made if there is none.
        private: only its owners may see it. Refused if there is a public one.
        keep_card: whether a card that is there stays.
        options: further ones of ``huggingface_hub.HfApi.upload_folder``.

    Raises:
        CheckpointError: the name is none, the package is missing, or the Hub refuses; says why.
    """
    if "/" not in name:
        raise CheckpointError(f"{name!r} is not the name of a model on the Hub: give user/name")
    hub = client()
    try:
        api = hub.HfApi(token=options.pop("token", None), **_HERE)
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        if private and not api.model_info(name).private:
            raise CheckpointError(f"{SCHEME}{name} is public already; nothing was uploaded")
        files = [WEIGHTS, CONFIG, CARD]
        if keep_card and api.file_exists(name, CARD, revision=options.get("revision")):
            files.remove(CARD)
        done = api.upload_folder(
            repo_id=name, folder_path=str(folder), allow_patterns=files, **options
        )
    except CheckpointError:
        raise
    except Exception as error:  # whatever the Hub's client raises
        raise CheckpointError(f"{SCHEME}{name} cannot be written to: {_reason(error)}") from error
    return str(done.commit_url)


def client() -> Any:
    """The package, which nothing else imports.

    Raises:
        CheckpointError: it is missing.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            "names on the Hugging Face Hub need huggingface_hub: pip install 'encnet-triton[hub]'"
        ) from None
    return huggingface_hub


def _reason(error: Exception) -> str:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    known = next((text for name, text in _WHY.items() if name in kinds), None)
    return known or (str(error).strip() or type(error).__name__).splitlines()[0]
