"""What the commands of this package share: options, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from encnet_triton.inference import PAPER_SCALES, Predictor, Views
from encnet_triton.weights import CheckpointError, ModelInfo

_FOR_SEGMENTATION = (
    "multi_scale", "scales", "flip", "whole_image", "batch", "protocol", "workers", "output",
)  # fmt: skip


def exit_status(action: Callable[[], object]) -> int:
    """Run a command: 0, or 2 after one sentence for what a user can put right."""
    try:
        action()
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    return 0


def add_predictor_options(parser: argparse.ArgumentParser, whole_image: bool = True) -> None:
    """The options that `make_predictor` reads; without ``whole_image``, in windows always."""
    if whole_image:
        parser.add_argument(
            "--whole-image", action="store_true", help="no windows; see the warning"
        )
    else:
        parser.set_defaults(whole_image=False)
    parser.add_argument(
        "--multi-scale", action="store_true", help="the paper's six scales, and mirror images"
    )
    parser.add_argument("--scales", type=_scales, help="for example 0.75,1,1.25")
    parser.add_argument("--flip", action="store_true", help="mirror images as well")
    parser.add_argument("--batch", type=int, default=8, help="windows computed at once")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def make_predictor(
    options: argparse.Namespace,
    model: nn.Module,
    info: ModelInfo,
    device: torch.device,
    released: bool = False,
) -> Predictor:
    """The predictor that the options of `add_predictor_options` ask for."""
    scales = options.scales or (PAPER_SCALES if options.multi_scale else (1.0,))
    return Predictor(
        model,
        info,
        device=device,
        whole_image=options.whole_image,
        views=Views(scales, options.flip or options.multi_scale, released),
        batch=options.batch,
    )


def pick_device(name: str) -> torch.device:
    """ "auto" is this process's GPU if there is one, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch sees no CUDA GPU here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def refuse_segmentation_options(
    options: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
    """A ValueError for the first option that was given and means nothing for a classifier."""
    for name, value in vars(options).items():
        if name in _FOR_SEGMENTATION and value != parser.get_default(name):
            raise ValueError(
                f"--{name.replace('_', '-')} is for segmentation networks, but "
                f"{options.checkpoint} holds a classifier"
            )


def _scales(text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.75,1") from None
