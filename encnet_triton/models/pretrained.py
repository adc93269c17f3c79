"""Networks that are loaded from a folder or the Hugging Face Hub, and saved there.

The methods are those of huggingface_hub's PyTorchModelHubMixin. They are not inherited from it,
because the core install lacks that package and a folder needs nothing of it; and because the mixin
leaves out what a constructor does not take, such as class names, and loads weights that do not fit.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

if TYPE_CHECKING:
    from encnet_triton.weights.info import ModelInfo

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@.+)?")  # on the Hub


class Pretrained(nn.Module):
    """Base of the networks.

    Attributes:
        info: class names, colours, normalisation and window size, as
            `encnet_triton.inference.Predictor` takes them; None where the network was built rather
            than loaded.
        options: its constructor's arguments.
    """

    info: ModelInfo | None = None
    options: dict[str, Any]

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        map_location: torch.device | str = "cpu",
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Load a network in evaluation mode and float32; every tensor must fit.

        Args:
            source: a folder, a checkpoint, or the name of a model on the Hub, ``user/name``. What
                is on this machine comes first; ``hf://user/name`` is never here.
            revision: branch, tag or commit on the Hub.
            map_location: device to load to.
            token, cache_dir, force_download, local_files_only: as
                ``huggingface_hub.hf_hub_download`` takes them.

        Raises:
            CheckpointError: there is no such model, it is damaged or out of reach, or it is not of
                this class.
        """
        from encnet_triton.weights import checkpoint, remote

        distant = not Path(source).exists() and _NAME.fullmatch(str(source))
        try:
            place = remote.place_of(
                f"{remote.SCHEME}{source}" if distant else source,
                revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        except checkpoint.CheckpointError as error:
            said = f"{source} is not here, and {error}" if distant else str(error)
            raise checkpoint.CheckpointError(said) from error
        model, _ = checkpoint.load_model(place, map_location)
        if not isinstance(model, cls):
            kind = type(model).__name__
            raise checkpoint.CheckpointError(
                f"{source} holds a network of the class {kind}, not {cls.__name__}: "
                f"{kind}.from_pretrained loads it"
            )
        return model

    def save_pretrained(
        self, folder: str | Path, *, info: ModelInfo | None = None, **card: Any
    ) -> None:
        """Write ``model.safetensors``, ``config.json`` and, where there is none, a card
        ``README.md``.

        Args:
            folder: made if it is not there.
            info: what the network's users must know; default: the attribute ``info``.
            card: license, scores and recipe, see `encnet_triton.weights.card.make_card`.

        Raises:
            ValueError: there is no info, or its classes are not the network's.
            OSError: a file cannot be written.
        """
        from encnet_triton.weights.card import make_card
        from encnet_triton.weights.folder import write_folder

        folder, known = Path(folder), self._known(info)
        write_folder(folder, self, known, make_card(self, known, folder.resolve().name, **card))

    def push_to_hub(
        self,
        name: str,
        *,
        info: ModelInfo | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        commit_message: str = "Upload the model",
        **card: Any,
    ) -> str:
        """Upload what `save_pretrained` writes in one commit; returns its address.

        A card that is on the Hub stays as it is.

        Args:
            name: of the repository, ``user/name``; made if there is none.
            info, card: as for `save_pretrained`.
            private: only you and your organisation may see it.
            token, branch, create_pr, commit_message: as ``huggingface_hub.HfApi.upload_folder``
                takes them.

        Raises:
            CheckpointError: huggingface_hub is missing, or the Hub refuses.
            ValueError, OSError: as `save_pretrained`.
        """
        from encnet_triton.weights.card import make_card
        from encnet_triton.weights.folder import write_folder
        from encnet_triton.weights.remote import upload

        with tempfile.TemporaryDirectory() as made:
            folder = Path(made, name)
            known = self._known(info)
            write_folder(folder, self, known, make_card(self, known, name, **card))
            return upload(
                folder,
                name,
                private=private,
                token=token,
                revision=branch,
                create_pr=create_pr,
                commit_message=commit_message,
            )

    def _known(self, info: ModelInfo | None) -> ModelInfo:
        known = info or self.info
        if known is None:
            raise ValueError(
                "this network was built, not loaded: give info, an "
                "encnet_triton.weights.ModelInfo with the names of its classes and what else its "
                "users must know"
            )
        count = self.options["num_classes"]
        if not len(known.classes) == len(known.palette) == count:
            raise ValueError(
                f"info has {len(known.classes)} classes and {len(known.palette)} colours, but the "
                f"network has {count} classes"
            )
        return known
