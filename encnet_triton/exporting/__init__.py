"""Trained networks as files that run without this package: ONNX, and torch.export's .pt2."""

from encnet_triton.exporting.network import RETURNS, Exportable, Program, describe, require, trace
from encnet_triton.exporting.onnx_file import write_onnx
from encnet_triton.exporting.pt2_file import write_pt2

WRITERS = {"onnx": write_onnx, "pt2": write_pt2}
"""What writes each format, which is also the file's suffix."""

__all__ = [
    "RETURNS",
    "WRITERS",
    "Exportable",
    "Program",
    "describe",
    "require",
    "trace",
    "write_onnx",
    "write_pt2",
]
