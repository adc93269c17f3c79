"""Score a checkpoint on a data set: ``python -m encnet_triton.evaluate --checkpoint FILE``.

Under torchrun the processes share the images; every image counts once. Checkpoints of classifiers
are scored by `encnet_triton.classification`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from encnet_triton import classification
from encnet_triton.classification import ImageClassifier
from encnet_triton.command_line import exit_status
from encnet_triton.data import Dataset, create_dataset, eval_samples
from encnet_triton.files import write_json
from encnet_triton.inference import PAPER_SCALES, WHOLE_IMAGE_WARNING, Predictor, Views
from encnet_triton.metrics import ConfusionMatrix, Scores
from encnet_triton.models import CifarNet
from encnet_triton.protocols import protocol_scores
from encnet_triton.weights.checkpoint import load_model


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Scores:
    """Scores over all labelled pixels of a data set; ranks share its images, each counted once."""
    return confusion(predictor, dataset, rank=rank, world_size=world_size, workers=workers).scores()


def confusion(
    predictor: Predictor,
    dataset: Dataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> ConfusionMatrix:
    """The confusion matrix over a data set, summed over all processes."""
    matrix = ConfusionMatrix(len(dataset.classes), dataset.ignore_index, predictor.device)
    for _, sample in eval_samples(dataset, rank=rank, world_size=world_size, workers=workers):
        prediction = predictor(np.asarray(sample.image))
        label = torch.as_tensor(sample.label, device=predictor.device)
        matrix.update(prediction, label)
    matrix.all_reduce()
    return matrix


def score_table(scores: Scores, classes: list[str], title: str) -> Table:
    """Per-class IoU, the mean and the pixel accuracy, as a table for a terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    table.add_column("IoU %", justify="right")
    for name, iou in zip(classes, scores.iou, strict=True):
        table.add_row(name, "absent" if iou is None else f"{iou * 100:.2f}")
    table.add_section()
    table.add_row("mIoU", f"{scores.miou * 100:.2f}", style="bold")
    table.add_row("pixAcc", f"{scores.pixel_accuracy * 100:.2f}")
    if scores.absent:
        table.caption = "mIoU is over the classes present in a label or a prediction"
    return table


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m encnet_triton.evaluate", description="Score a checkpoint on a data set."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.safetensors of a run")
    parser.add_argument("--dataset", help="name of the data set (default: the training run's)")
    parser.add_argument("--data", help="its folder (default: the training run's)")
    parser.add_argument("--split", help="split to score (default: the training run's validation)")
    parser.add_argument("--whole-image", action="store_true", help="no windows; see the warning")
    add_view_arguments(parser)
    parser.add_argument(
        "--protocol", choices=("softmax", "released"), default="softmax",
        help="released: as the published code, see docs/evaluation.md (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    return parser


def add_view_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which views of an image are averaged."""
    parser.add_argument(
        "--multi-scale", action="store_true", help="the paper's six scales, and mirror images"
    )
    parser.add_argument("--scales", type=parse_scales, help="for example 0.75,1,1.25")
    parser.add_argument("--flip", action="store_true", help="mirror images as well")
    parser.add_argument("--batch", type=int, default=8, help="windows computed at once")


def parse_scales(text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.75,1") from None


def views_of(options: argparse.Namespace, released: bool = False) -> Views:
    """The views that `add_view_arguments` has read."""
    scales = options.scales or (PAPER_SCALES if options.multi_scale else (1.0,))
    return Views(scales, options.flip or options.multi_scale, released)


def run(options: argparse.Namespace, console: Console) -> None:
    """Load, score and print; under torchrun the processes share the images."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(options.device)
    model, info = load_model(options.checkpoint, device)
    if isinstance(model, CifarNet):
        classification.refuse_segmentation_options(options, make_parser())
        if rank == 0:  # the images are few and small
            found = classification.evaluate(ImageClassifier(model, info, device), options, console)
            if options.json:
                write_json(found, options.json)
        return
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dataset = create_dataset(
        options.dataset or info.data["name"],
        options.split or info.data["split"],
        options.data or info.data["root"],
        **(info.data["options"] if options.dataset in (None, info.data["name"]) else {}),
    )
    if list(dataset.classes) != info.classes:
        raise ValueError(
            f"{options.checkpoint} was trained for {len(info.classes)} classes "
            f"({', '.join(info.classes[:3])}, ...), but the data set has {len(dataset.classes)} "
            f"({', '.join(dataset.classes[:3])}, ...)"
        )
    if options.whole_image and rank == 0:
        console.print(f"Warning: {WHOLE_IMAGE_WARNING}")
    released = options.protocol == "released"
    predictor = Predictor(
        model,
        info,
        device=device,
        whole_image=options.whole_image,
        views=views_of(options, released),
        batch=options.batch,
    )
    matrix = confusion(predictor, dataset, rank=rank, world_size=size, workers=options.workers)
    scores = matrix.scores(absent_is_zero=released)
    if rank == 0:
        name = options.dataset or info.data["name"]
        protocols = protocol_scores(matrix, name, released)
        described = describe(predictor)
        console.print(score_table(scores, info.classes, f"{options.checkpoint}, {described}"))
        for one in protocols:
            console.print(
                f"{one.text}: pixAcc {one.pixel_accuracy:.2%}, mIoU {one.miou:.2%}, "
                f"their mean {one.score:.2%}",
                highlight=False,
            )
        if options.json:
            document = {
                "checkpoint": str(options.checkpoint),
                "dataset": name,
                "split": options.split or info.data["split"],
                "images": len(dataset),
                "protocol": options.protocol,
                "views": described,
                "protocols": {
                    one.name: {
                        "counts": one.text,
                        "pixel_accuracy": one.pixel_accuracy,
                        "miou": one.miou,
                        "score": one.score,
                    }
                    for one in protocols
                },
                **scores.as_dict(info.classes),
            }
            write_json(document, options.json)


def describe(predictor: Predictor) -> str:
    """How a predictor looks at an image, in words."""
    crop, views = predictor.info.crop, predictor.views
    text = "whole images" if predictor.whole_image else f"windows of {crop[0]}x{crop[1]}"
    if views.scales != (1.0,):
        text += ", scales " + " ".join(f"{scale:g}" for scale in views.scales)
    if views.flip:
        text += ", mirrored too"
    return text + (", released protocol" if views.released else "")


def pick_device(name: str) -> torch.device:
    """ "auto" is this process's GPU if there is one, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch sees no CUDA GPU here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return exit_status(lambda: run(options, Console()))


if __name__ == "__main__":
    sys.exit(main())
