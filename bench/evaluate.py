"""Scoring a data set: ``python -m bench evaluate``.

EncNet, 150 classes, 8 images of 683 x 512 in windows of 480 x 480, one scale, from JPEGs to a
confusion matrix: R18 in float32 on a CPU, R50 under bfloat16 autocast on a GPU.

- ours: `encnet_triton.scoring.confusion`, as the command evaluate calls it.
- a window at a time: reads each image in the loop, runs each window in channels_last, interpolates
  its logits, adds their softmax to the scores of the image, and takes the arg-max at the end.

The two take turns, each time in a fresh process, and the fastest round of each counts. First the
label maps of two images are compared: where they differ, the two best scores must be equal up to
rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from bench import apart, peers, report, timing
from bench.loader import write_folder
from bench.options import add_device, add_json
from encnet_triton.data import Dataset, create_dataset
from encnet_triton.files import write_json
from encnet_triton.inference import Predictor
from encnet_triton.inference.precision import fast_dtype
from encnet_triton.models import create_model
from encnet_triton.options import pick_device, whole
from encnet_triton.scoring import confusion
from encnet_triton.scoring.metrics import ConfusionMatrix
from encnet_triton.weights import ModelInfo

CLASSES, CROP, IMAGES, CHECKED = 150, 480, 8, 2
BACKBONES = {"cpu": "resnet18", "cuda": "resnet50"}
VARIANTS = ("ours", "a window at a time")
# As a share of the best score. In float32 the two ways differ by rounding, 1e-6, after 20 layers
# perhaps 1e-5; bfloat16 keeps eight bits.
TIE = {"cpu": 1e-4, "cuda": 5e-2}


@dataclass(frozen=True)
class Result:
    """Time and memory for all images.

    Attributes:
        seconds: wall-clock time.
        busy: processor time of this process, which other work on the machine changes less.
        extra_mib: peak memory above what was in use before the first image: resident memory of this
            process on a CPU, allocated memory on a GPU.
    """

    seconds: float
    busy: float
    extra_mib: float


def make_predictor(device: torch.device) -> Predictor:
    """The network of both sides, in evaluation mode, with weights that give clear winners."""
    torch.manual_seed(0)
    model = create_model("encnet", CLASSES, backbone=BACKBONES[device.type]).eval()
    head: Any = model.head
    nn.init.normal_(head.classifier.weight, std=0.1)
    info = ModelInfo(
        options=model.options, classes=[f"class {k}" for k in range(CLASSES)],
        palette=[[0] * 3] * CLASSES, mean=[0.5] * 3, std=[0.25] * 3, crop=[CROP, CROP],
    )  # fmt: skip
    autocast = None if device.type == "cpu" else fast_dtype(device)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Predictor(model, info, device=device, autocast=autocast)


def plain_scores(predictor: Predictor, image: np.ndarray) -> Tensor:
    """Class scores of an image the plain way, 1 x n x H x W."""
    device, dtype, info = predictor.device, predictor.autocast, predictor.info
    x = torch.tensor(image, device=device).permute(2, 0, 1)[None].float().div(255)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (info.mean, info.std))
    x = (x - mean) / std
    with torch.no_grad(), torch.autocast(device.type, dtype) if dtype else nullcontext():
        return peers.window_scores(predictor.model, x, CROP, CLASSES)


def plain_confusion(predictor: Predictor, dataset: Dataset) -> ConfusionMatrix:
    """The confusion matrix the plain way."""
    matrix = ConfusionMatrix(CLASSES, device=predictor.device)
    for index in range(len(dataset)):
        sample = dataset[index]
        label = plain_scores(predictor, np.asarray(sample.image)).argmax(1)[0]
        matrix.update(label, torch.as_tensor(sample.label, device=predictor.device))
    return matrix


def measure(variant: str, dataset: Dataset, device: torch.device) -> Result:
    """Predict one image to warm up, then time all of them."""
    predictor = make_predictor(device)
    ours = variant == "ours"
    count = partial(confusion, workers=1) if ours else plain_confusion
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        timing.forget_peak()
        before = timing.resident()
    image = np.asarray(dataset[0].image)
    (predictor(image) if ours else plain_scores(predictor, image)).cpu()
    start, busy = time.perf_counter(), time.process_time()
    count(predictor, dataset).counts.cpu()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = torch.cuda.max_memory_allocated(device) if cuda else timing.peak_resident()
    return Result(seconds, busy, (peak - before) / 2**20)


def differing(dataset: Dataset, device: torch.device) -> Iterator[tuple[int, float]]:
    """For each of the first images: how many labels differ, and the largest gap between the two
    best scores there, as a share of the best."""
    predictor = make_predictor(device)
    for index in range(CHECKED):
        image = np.asarray(dataset[index].image)
        scores, ours = plain_scores(predictor, image)[0], predictor(image)
        differ = scores.argmax(0) != ours
        best, second = scores[:, differ].topk(2, 0).values
        yield int(differ.sum()), float(((best - second) / best).max()) if differ.any() else 0.0


def measure_apart(variant: str, folder: str, device: torch.device) -> Result:
    """Measure one variant in a fresh process; raises `apart.Failed`."""
    arguments = ["evaluate", "--worker", variant, "--folder", folder, "--device", device.type]
    return Result(**apart.measured(arguments))


def table(results: dict[str, Result], device: torch.device, ties: str) -> Table:
    """Times, memory, and both as multiples of ours."""
    network, ours = BACKBONES[device.type], results["ours"]
    made = Table(
        title=f"EncNet {network}, {CLASSES} classes, {IMAGES} images of 683 x 512, windows of "
        f"{CROP}",
        title_justify="left",
        caption=ties,
    )
    made.add_column("", no_wrap=True)
    columns = ("images/s", "seconds", "CPU seconds", "extra MiB")
    for column in (*columns, "time / ours", "CPU / ours", "memory / ours"):
        made.add_column(column, justify="right", no_wrap=True)
    for name, one in results.items():
        cells = [f"{IMAGES / one.seconds:.2f}", f"{one.seconds:.1f}", f"{one.busy:.1f}"]
        ratios = (v / w for v, w in zip(astuple(one), astuple(ours), strict=True))
        made.add_row(name, *cells, f"{one.extra_mib:.0f}", *(f"{r:.2f}x" for r in ratios))
    return made


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_device(parser)
    parser.add_argument(
        "--rounds", type=whole(1), default=2, help="how often each side is measured (default 2)"
    )
    add_json(parser)
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Compare labels, measure both in turns, print the table; returns the exit status."""
    device = pick_device(options.device)
    if options.worker:
        dataset = create_dataset("folder", "val", options.folder)
        print(json.dumps(asdict(measure(options.worker, dataset, device))))
        return 0
    rounds: dict[str, list[Result]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), IMAGES, CLASSES)
        found = list(differing(create_dataset("folder", "val", folder), device))
        count, distance = sum(number for number, _ in found), max(far for _, far in found)
        if distance > TIE[device.type]:
            print(
                f"error: the label maps differ, so no speed is given: at {count} pixels, where the "
                f"two best scores are up to {distance:.1e} of the best apart",
                file=sys.stderr,
            )
            return 1
        for _ in range(options.rounds):
            for variant in VARIANTS:
                rounds[variant].append(measure_apart(variant, folder, device))
    ties = (
        f"in {CHECKED} images {count} labels differ, where the two best scores are at most "
        f"{distance:.0e} of the best apart"
    )
    results = {
        name: Result(
            min(r.seconds for r in all_), min(r.busy for r in all_), max(r.extra_mib for r in all_)
        )
        for name, all_ in rounds.items()
    }
    console = report.console(130)
    console.print(report.machine(device), highlight=False)
    console.print(table(results, device, ties))
    if options.json is not None:
        rows = {name: [asdict(r) for r in all_] for name, all_ in rounds.items()}
        document = {"machine": report.machine(device), "differing": found, "rounds": rows}
        write_json(document, options.json)
    return 0
