"""Files of `torch.export`, compared with PyTorch in a process that cannot import this package."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from encnet_triton.exporting.network import Program, describe
from encnet_triton.files import replacing, without_nan

__all__ = ["write_pt2"]

METADATA, EXAMPLE = "metadata.json", "example.json"
_KEPT = 1000  # values of the example's output
# None makes every import of the package fail. The file's temporary name lacks the suffix that
# torch.export.load wants, hence the open file.
_OTHER_PROCESS = """
import sys
sys.modules["encnet_triton"] = None
import torch
with open(sys.argv[1], "rb") as file:
    network = torch.export.load(file).module()
images = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save([network(image) for image in images], sys.argv[3])
"""


def write_pt2(program: Program, path: Path) -> float:
    """Write a network as a .pt2 file; returns the largest difference from PyTorch.

    `torch.export.load` gives the metadata (`describe`) as its extra file "metadata.json", and some
    of what the network returns for the stored example input as "example.json".

    Raises:
        ValueError: the file does not load without this package, or computes something else there.
            Nothing is written then.
        OSError: the file cannot be written.
    """
    extra = {METADATA: describe(program), EXAMPLE: _example(program)}
    texts = {name: json.dumps(without_nan(value), indent=1) for name, value in extra.items()}
    buffer = io.BytesIO()  # torch ends the process where a disk is full
    torch.export.save(program.exported, buffer, extra_files=texts)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        return program.check(_run_elsewhere(program, temporary), "the file in another process")


@torch.no_grad()
def _example(program: Program) -> dict[str, Any]:
    """Values of the example's output, evenly spaced in it."""
    result = program.network(program.example)
    step = -(-result.numel() // _KEPT)
    return {
        "shape": list(result.shape),
        "every": step,
        "values": result.flatten()[::step].tolist(),
    }


def _run_elsewhere(program: Program, path: Path) -> list[torch.Tensor]:
    """The results of `Program.batches` in a process that cannot import this package."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given.pt"), Path(folder, "made.pt")
        torch.save(program.batches(), given)
        command = [sys.executable, "-c", _OTHER_PROCESS, str(path), str(given), str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise ValueError(f"the exported network does not run without this package: {last}")
        results: list[torch.Tensor] = torch.load(made, weights_only=True)
        return results
