"""Weights that others have trained: ``python -m encnet_triton.convert in.pth out.safetensors``.

Read are checkpoints of PyTorch-Encoding (EncNet and FCN, with any of its backbones), of
mmsegmentation (EncNet and FCN) and ImageNet weights of torchvision's ResNets. Every tensor of a
file must find its place and every tensor of the network must be filled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from encnet_triton.checkpoint import ModelInfo, load_model, save_model
from encnet_triton.command_line import exit_status
from encnet_triton.data import DATASETS, default_palette
from encnet_triton.data.base import IMAGENET_MEAN, IMAGENET_STD
from encnet_triton.files import write_tensors
from encnet_triton.foreign import Foreign, backbone_name, identify, model_options
from encnet_triton.models import create_model
from encnet_triton.weight_files import listed, read_document, read_tensors, tensors_in

__all__ = ["convert_model", "export_backbone", "load_backbone", "load_foreign"]


def load_backbone(model: nn.Module, path_or_url: str | Path) -> None:
    """Load ImageNet weights of a torchvision ResNet into a model's backbone.

    Every tensor of the file but the classifier ``fc`` must find its place and every tensor of the
    backbone must be filled; otherwise nothing is changed.

    Args:
        model: a network of `encnet_triton.models`, or a `ResNet` itself.
        path_or_url: local .pth, .pt or .safetensors file, or the URL of a .pth file, which torch
            downloads into its hub cache once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or does not fit the backbone; names file and key.
    """
    backbone = getattr(model, "backbone", model)
    source = str(path_or_url)
    tensors = {k: v for k, v in read_tensors(source).items() if k not in ("fc.weight", "fc.bias")}
    own = backbone.state_dict()
    unknown = [key for key in tensors if key not in own]
    # Files from before PyTorch 0.4.1 do not count batches.
    missing = [k for k in own if k not in tensors and not k.endswith("num_batches_tracked")]
    if unknown or missing:
        raise ValueError(
            f"{source} does not fit the backbone: {listed(unknown)} in the file match nothing, "
            f"{listed(missing)} of the backbone are not in the file "
            f"(torchvision's weights fit resnet18, 34, 50, 101 and 152)"
        )
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{source} does not fit the backbone: {key} is {tuple(tensor.shape)} in the file "
                f"and {tuple(own[key].shape)} in the backbone"
            )
    backbone.load_state_dict({**own, **tensors})


def load_foreign(source: str | Path) -> tuple[nn.Module, Foreign]:
    """The network of a PyTorch-Encoding or mmsegmentation checkpoint, in evaluation mode.

    Args:
        source: a .pth, .pt or .safetensors file or URL: a state dict, or a training checkpoint that
            has one under ``state_dict``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, is of another origin, or does not fit; names the keys.
    """
    name = str(source)
    document = read_document(name)
    meta: Mapping[str, Any] = {}
    if isinstance(document, Mapping) and isinstance(document.get("state_dict"), Mapping):
        found = document.get("meta")
        meta = found if isinstance(found, Mapping) else {}
        document = document["state_dict"]
    tensors = tensors_in(document, name)
    foreign = identify(tensors, meta, name)
    model = create_model(**model_options(foreign, name))
    own = model.state_dict()
    missing = [k for k in own if k not in foreign.tensors and not k.endswith("_tracked")]
    extra = [foreign.origin_of[k] for k in foreign.tensors if k not in own]
    if missing or extra:
        raise ValueError(
            f"{name} does not fit the network it looks like ({foreign.kind} {model.options}): "
            f"{listed(extra)} in the file match nothing, {listed(missing)} are not in the file"
        )
    for key, tensor in foreign.tensors.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{name}: {foreign.origin_of[key]} is {tuple(tensor.shape)}, but {key} of the "
                f"network it looks like is {tuple(own[key].shape)}"
            )
    model.load_state_dict({**own, **foreign.tensors})
    return model.eval(), foreign


def convert_model(
    source: str | Path,
    output: Path,
    *,
    dataset: str | None = None,
    crop: int = 480,
    base_size: int = 520,
) -> nn.Module:
    """Write a foreign checkpoint as one of this project, which evaluate and predict take.

    Args:
        source: see `load_foreign`.
        output: the .safetensors file to write.
        dataset: name of the data set it was trained on, for class names and colours; without it
            they are what the file says, else numbers.
        crop, base_size: pixels of its training crops and of its images' long edge.
    """
    model, foreign = load_foreign(source)
    count = int(model.num_classes)  # type: ignore[arg-type]
    classes, palette = foreign.classes, default_palette(count).tolist()
    if dataset is not None:
        classes, palette = _names_of(dataset, count)
    if len(classes) != count:
        classes = [f"class {number}" for number in range(count)]
    info = ModelInfo(
        options=dict(model.options),  # type: ignore[arg-type]
        classes=classes,
        palette=palette,
        mean=list(IMAGENET_MEAN),
        std=list(IMAGENET_STD),
        crop=[crop, crop],
        base_size=base_size,
        scale_by="long",
        data={"name": dataset or "folder", "root": None, "split": "val", "options": {}},
    )
    save_model(output, model, info, converted_from=foreign.kind)
    return model


def _names_of(dataset: str, count: int) -> tuple[list[str], list[list[int]]]:
    names, colours = DATASETS[dataset].labels_for(count)  # type: ignore[attr-defined]
    if len(names) != count:
        raise ValueError(f"the network has {count} classes, but {dataset} has {len(names)}")
    return list(names), colours.tolist()


def export_backbone(checkpoint: Path, output: Path) -> None:
    """Write the backbone of a checkpoint of this project under torchvision's names.

    The file loads into torchvision's ResNet of the same depth with ``strict=False`` (it has no
    ``fc``), and into this project's networks with ``--pretrained``. A stem of three convolutions
    has the names of PyTorch-Encoding, which torchvision has no network for.
    """
    model, _ = load_model(checkpoint)
    backbone: nn.Module = model.backbone  # type: ignore[assignment]
    write_tensors(backbone.state_dict(), output)


def convert_backbone(tensors: Mapping[str, Tensor], source: str, output: Path) -> str:
    """Write ImageNet weights of a ResNet, verified, for ``--pretrained``; returns its name."""
    plain = {k: t for k, t in tensors.items() if k not in ("fc.weight", "fc.bias")}
    name = backbone_name(plain, source)
    model = create_model("fcn", 2, backbone=name)
    load_backbone(model, source)
    write_tensors(plain, output)
    return name


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m encnet_triton.convert",
        description="Convert a checkpoint of PyTorch-Encoding, mmsegmentation or torchvision.",
    )
    parser.add_argument("input", help="a .pth, .pt or .safetensors file, or the URL of a .pth")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    named = [name for name, maker in DATASETS.items() if hasattr(maker, "labels_for")]
    parser.add_argument("--dataset", choices=named, help="for class names and colours")
    parser.add_argument("--crop", type=int, default=480, help="of its training, in pixels")
    parser.add_argument("--base-size", type=int, default=520, help="of its images' long edge")
    parser.add_argument(
        "--export-backbone", action="store_true",
        help="the other way: the backbone of a checkpoint of this project, in torchvision's names",
    )  # fmt: skip
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> None:
    """Convert one file and say what it is."""
    if options.output.suffix != ".safetensors":
        raise ValueError(f"the output {options.output} must be a .safetensors file")
    if options.export_backbone:
        export_backbone(Path(options.input), options.output)
        console.print(f"wrote the backbone of {options.input} to {options.output}")
        return
    content = read_document(options.input)
    if isinstance(content, Mapping) and "layer1.0.conv1.weight" in content:
        name = convert_backbone(tensors_in(content, options.input), options.input, options.output)
        console.print(f"wrote {name} to {options.output}; use it as --pretrained {options.output}")
        return
    model = convert_model(
        options.input,
        options.output,
        dataset=options.dataset,
        crop=options.crop,
        base_size=options.base_size,
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"wrote {options.output}: {count:,} parameters, {model.options}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parse(arguments)
    return exit_status(lambda: run(options, Console()))


if __name__ == "__main__":
    sys.exit(main())
