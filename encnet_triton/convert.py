"""Weights that others have trained: ``python -m encnet_triton.convert in.pth out.safetensors``.

Read are checkpoints of PyTorch-Encoding (EncNet and FCN, with any of its backbones), of
mmsegmentation (EncNet and FCN) and ImageNet weights of torchvision's ResNets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from encnet_triton import options
from encnet_triton.data import DATASETS
from encnet_triton.weights import convert_backbone, convert_model, export_backbone, load_backbone
from encnet_triton.weights import load_peer as load_foreign
from encnet_triton.weights.reading import read_document, tensors_in

__all__ = ["convert_model", "export_backbone", "load_backbone", "load_foreign"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m encnet_triton.convert",
        description="Convert a checkpoint of PyTorch-Encoding, mmsegmentation or torchvision.",
        formatter_class=options.Help,
    )
    parser.add_argument("input", help="a .pth, .pt or .safetensors file, or the URL of a .pth")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    named = [name for name, maker in DATASETS.items() if hasattr(maker, "labels_for")]
    parser.add_argument(
        "--dataset", choices=named, help="for class names and colours (default: none)"
    )
    parser.add_argument(
        "--crop", type=options.whole(1), default=480, help="of its training, in pixels"
    )
    parser.add_argument(
        "--base-size", type=options.whole(1), default=520, help="of its images' long edge"
    )
    parser.add_argument(
        "--export-backbone", action="store_true",
        help="the other way: the backbone of a checkpoint of this project, in torchvision's names",
    )  # fmt: skip
    return parser.parse_args(arguments)


def run(given: argparse.Namespace, console: Console) -> None:
    """Convert one file and say what it is."""
    if given.output.suffix != ".safetensors":
        raise ValueError(f"the output {given.output} must be a .safetensors file")
    options.refuse_place(given.output, "the output")
    if given.export_backbone:
        export_backbone(Path(given.input), given.output)
        console.print(f"wrote the backbone of {given.input} to {given.output}")
        return
    content = read_document(given.input)
    if isinstance(content, Mapping) and "layer1.0.conv1.weight" in content:
        name = convert_backbone(tensors_in(content, given.input), given.input, given.output)
        console.print(f"wrote {name} to {given.output}; use it as --pretrained {given.output}")
        return
    model = convert_model(
        given.input,
        given.output,
        dataset=given.dataset,
        crop=given.crop,
        base_size=given.base_size,
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"wrote {given.output}: {count:,} parameters, {model.options}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = parse(arguments)
    return options.exit_status(lambda: run(given, options.make_console()))


if __name__ == "__main__":
    sys.exit(main())
