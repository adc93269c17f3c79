"""ONNX files, compared with PyTorch in ONNX Runtime before they get their name."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from encnet_triton.exporting.network import Program, describe, require
from encnet_triton.files import replacing

__all__ = ["write_onnx"]

INPUT = "image"
_MOST_BYTES = 2**31 - 2**24  # a protobuf's limit, less the graph itself


def write_onnx(program: Program, path: Path) -> float:
    """Write a network as one .onnx file; returns the largest difference from PyTorch.

    The names of its input and output are "image" and what the network returns; the metadata
    (`describe`) are its properties, each value as JSON.

    Raises:
        ValueError: a package is missing, ONNX cannot hold the network, or ONNX Runtime computes
            something else. Nothing is written then.
        OSError: the file cannot be written.
    """
    tensors = program.exported.state_dict.values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > _MOST_BYTES:
        raise ValueError(
            f"an ONNX file holds 2 GiB, but the weights have {size / 2**30:.1f}; --format pt2 has "
            "no such limit"
        )
    require("onnx")
    made = _converted(program)
    made.model.metadata_props.update(
        {name: json.dumps(value) for name, value in describe(program).items()}
    )
    with replacing(path) as temporary:
        made.save(temporary, external_data=False)
        return program.check(_run(program, temporary), "ONNX Runtime")


def _converted(program: Program) -> Any:
    with _quiet():
        try:
            made = torch.onnx.export(
                program.exported,
                input_names=[INPUT],
                output_names=[program.network.returns],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            last = str(error).strip().splitlines()[-1]
            raise ValueError(f"ONNX cannot hold this network: {last}") from error
    assert made is not None
    # torch.export's own symbols stand for the dimensions.
    names = {0: "batch"} if program.size else {0: "batch", 2: "height", 3: "width"}
    shape = made.model.graph.inputs[0].shape
    made.rename_axes({str(shape[place]): name for place, name in names.items()})
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """The converter warns of what concerns torch's developers, and that torchvision is missing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _run(program: Program, path: Path) -> list[torch.Tensor]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            str(path), settings, providers=["CPUExecutionProvider"]
        )
        given = [{INPUT: image.numpy()} for image in program.batches()]
        return [torch.from_numpy(session.run(None, one)[0]) for one in given]
    except Exception as error:  # its classes are not public
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"ONNX Runtime refuses the network: {first}") from error
