"""Moving batches to the device while it computes."""

from __future__ import annotations

import torch

from encnet_triton.data.loader import Batch


class Transfer:
    """Copies batches to a device, on a GPU in a stream of its own.

    The host asks for the next batch while the GPU still works on the last one; in the computation's
    own stream the copy would wait for it. From page-locked memory (`TrainLoader` with
    ``pin_memory``) it does not hold up the host either.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, micro: list[Batch]) -> list[Batch]:
        """The batches, bytes as they are, on the device; ready for the current stream."""
        if self._stream is None:
            return [self._moved(batch) for batch in micro]
        with torch.cuda.stream(self._stream):
            moved = [self._moved(batch) for batch in micro]
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for batch in moved:
            for tensor in (batch.images, batch.labels, batch.draws):
                # Else the next copy could be given this memory while it is still being read.
                tensor.record_stream(current)
        return moved

    def _moved(self, batch: Batch) -> Batch:
        return batch._replace(
            images=batch.images.to(self._device, non_blocking=True),
            labels=batch.labels.to(self._device, non_blocking=True),
            draws=batch.draws.to(self._device, non_blocking=True),
        )
