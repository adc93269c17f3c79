"""Convert weights trained elsewhere: ``python -m encnet_triton.convert in.pth out.safetensors``.

It reads EncNet, FCN, PSPNet and DeepLabV3 of PyTorch-Encoding and mmsegmentation, FCN and DeepLabV3
of torchvision, all on ResNets, and ImageNet weights of ResNets under the names of torchvision, timm
and MMClassification.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from encnet_triton import options
from encnet_triton.data import DATASETS
from encnet_triton.data.files import read_text
from encnet_triton.weights import convert_backbone, convert_model, export_backbone, load_backbone
from encnet_triton.weights import load_peer as load_foreign
from encnet_triton.weights.backbone import is_trunk
from encnet_triton.weights.reading import read_document, state_dict_of

__all__ = ["convert_model", "export_backbone", "load_backbone", "load_foreign"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = options.Parser(
        prog="python -m encnet_triton.convert",
        description="Convert a checkpoint of PyTorch-Encoding, mmsegmentation or torchvision, or "
        "ImageNet weights of a ResNet.",
    )
    parser.add_argument(
        "input", help="a .pth, .pt, .pth.tar, .ckpt or .safetensors file, or the URL of one"
    )
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    named = [name for name, maker in DATASETS.items() if hasattr(maker, "labels_for")]
    parser.add_argument(
        "--dataset", choices=named, help="for class names and colours (default: none)"
    )
    parser.add_argument(
        "--crop", type=options.size, help="training crop in pixels: 480 or 512x1024 "
        "(default: from the file, else that project's usual one)",
    )  # fmt: skip
    parser.add_argument(
        "--base-size",
        type=options.whole(1),
        help="edge length that images are scaled to (default: as for --crop)",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="take the moving average of the weights, stored beside them",
    )
    parser.add_argument(
        "--config", type=Path, help="mmsegmentation's configuration, as its trainer writes it "
        "(default: the one in the file)",
    )  # fmt: skip
    parser.add_argument(
        "--export-backbone", action="store_true",
        help="the reverse: a checkpoint's backbone, with torchvision's names, or timm's",
    )  # fmt: skip
    return parser.parse_args(arguments)


def run(given: argparse.Namespace, console: Console) -> None:
    """Convert one file and say what it is."""
    if given.output.suffix != ".safetensors":
        raise ValueError(f"the output {given.output} must be a .safetensors file")
    options.refuse_place(given.output, "the output")
    if given.output.exists() and Path(given.input).exists() and given.output.samefile(given.input):
        raise ValueError(f"{given.output} is the input too, and would be lost; name another output")
    if given.export_backbone:
        export_backbone(Path(given.input), given.output)
        console.print(f"wrote the backbone of {given.input} to {given.output}")
        return
    document = read_document(given.input)
    tensors = state_dict_of(document, given.input, given.ema)
    if is_trunk(tensors):
        name = convert_backbone(tensors, given.input, given.output)
        console.print(f"wrote {name} to {given.output}; use it as --pretrained {given.output}")
        return
    model = convert_model(
        given.input,
        given.output,
        document=document,
        dataset=given.dataset,
        crop=given.crop,
        base_size=given.base_size,
        average=given.ema,
        config=None if given.config is None else read_text(given.config, "configuration"),
        note=lambda text: console.print(f"note: {text}; give --config if it is wrong"),
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    settings: Any = model.options
    said = ", ".join(f"{name} {value}" for name, value in settings.items())
    console.print(f"wrote {given.output}: {count:,} parameters; {said}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = parse(arguments)
    return options.exit_status(lambda: run(given, options.make_console()), less="")


if __name__ == "__main__":
    sys.exit(main())
