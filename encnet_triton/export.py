"""Leave this package: ``python -m encnet_triton.export best.safetensors --format onnx``.

Writes the network as ONNX, or as torch.export's .pt2, for programs that do not have this package.
The file is compared with PyTorch before it gets its name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from encnet_triton import options
from encnet_triton.exporting import RETURNS, WRITERS, Exportable, require, trace
from encnet_triton.weights import load_model


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = options.Parser(
        prog="python -m encnet_triton.export",
        description="Write a network as a file for ONNX Runtime and others, or for any torch.",
    )
    parser.add_argument(
        "checkpoint", type=options.checkpoint,
        help="best.safetensors of a run, a model's folder, or hf://user/name",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=tuple(WRITERS), required=True,
        help="ONNX, or torch.export's .pt2",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, help="file to write (default: beside the checkpoint)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument(
        "--returns", choices=RETURNS, default="labels",
        help="class numbers; logits at the size of the image; or logits as the network gives them",
    )  # fmt: skip
    parser.add_argument(
        "--uint8", action="store_true",
        help="take uint8 RGB images and normalise inside (default: normalised float32)",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=options.size,
        help="one size for all images: 480 or 512x1024 (default: any size)",
    )  # fmt: skip
    return parser


def run(given: argparse.Namespace, console: Console) -> None:
    """Load, trace, write, compare."""
    model, info = load_model(given.checkpoint)
    output = given.output or _beside(given.checkpoint, given.format)
    if output.suffix != f".{given.format}":
        raise ValueError(f"--output {output} must be a .{given.format} file")
    options.refuse_place(output, "--output")
    if output.exists() and not given.overwrite:
        raise ValueError(f"{output} exists: give --overwrite, or another --output")
    require(given.format)
    program = trace(Exportable(model, info, given.returns, given.uint8), given.size)
    try:
        worst = WRITERS[given.format](program, output)
    except OSError as error:
        raise OSError(f"cannot write {output} ({error.strerror or error})") from error
    sizes = "any size" if given.size is None else "{}x{}".format(*given.size)
    console.print(
        f"wrote {output}: {output.stat().st_size / 2**20:.1f} MiB, images of {sizes}, differs from "
        f"PyTorch by {worst:.1e}"
    )
    if given.size is None:
        console.print("give it windows of {}x{}, as in training".format(*info.crop))


def _beside(checkpoint: Path | str, form: str) -> Path:
    """The file to write by default; of a model on the Hub, in the current folder."""
    if isinstance(checkpoint, str):
        checkpoint = Path(Path(checkpoint.partition("@")[0]).name)
    named = checkpoint if checkpoint.name else checkpoint.resolve()  # the current folder
    return named.with_suffix(f".{form}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = make_parser().parse_args(arguments)
    return options.exit_status(
        lambda: run(given, options.make_console()), less="; a smaller --size needs less"
    )


if __name__ == "__main__":
    sys.exit(main())
