"""Whether the tensors of a file are those of a network: the same names, shapes and types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from encnet_triton.unpickle import printable
from encnet_triton.weights.reading import listed

__all__ = ["misfit", "tensor_misfit"]


def misfit(
    given: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    what: str = "the model",
    *,
    origin: Mapping[str, str] | None = None,
    uncounted: bool = False,
) -> str | None:
    """Why the tensors of a file do not fit a network, to follow the file's name in a sentence; or
    None.

    Args:
        given: of the file, under the network's names.
        own: the state dict of the network.
        what: the network, in words.
        origin: our names -> those in the file, where they differ.
        uncounted: whether a file may lack numbers of batches, as those from before PyTorch 0.4.1.
    """
    return next(_misfits(given, own, what, origin or {}, uncounted), None)


def _misfits(
    given: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    what: str,
    origin: Mapping[str, str],
    uncounted: bool,
) -> Iterator[str]:
    extra = [origin.get(name, name) for name in given if name not in own]
    missing = [
        name
        for name in own
        if name not in given and not (uncounted and name.endswith("num_batches_tracked"))
    ]
    if extra or missing:
        parts = [f"{listed(extra)} in the file match nothing"] if extra else []
        parts += [f"{listed(missing)} are not in the file"] if missing else []
        yield f"does not fit {what}: {', '.join(parts)}"
        return
    for name, tensor in given.items():
        if (found := tensor_misfit(origin.get(name, name), tensor, own[name], what)) is not None:
            yield found


def tensor_misfit(name: str, tensor: Tensor, own: Tensor, what: str = "the model") -> str | None:
    """The same of one tensor: its shape, the kind of its numbers, and values that are finite in the
    type that the network has."""
    here = f"does not fit {what}: {printable(name)}"
    if tensor.shape != own.shape:
        return f"{here} is {tuple(tensor.shape)} in the file and {tuple(own.shape)} in {what}"
    if tensor.is_floating_point() != own.is_floating_point() or tensor.is_complex():
        return f"{here} is {tensor.dtype} in the file and {own.dtype} in {what}"
    if own.is_floating_point() and not tensor.to(own.dtype).isfinite().all():
        return f"{here} holds values that are not finite"
    return None
