"""Validation of the network in training: scores over all ranks, pictures, curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from encnet_triton.inference import Predictor
from encnet_triton.pictures import panel, save_png
from encnet_triton.scoring import evaluate
from encnet_triton.scoring.metrics import Scores
from encnet_triton.train.distributed import World
from encnet_triton.train.log import METRICS
from encnet_triton.train.setup import Parts


def _predictor(parts: Parts, world: World, whole_image: bool) -> Predictor:
    return Predictor(
        parts.model.eval(),
        parts.info,
        device=world.device,
        whole_image=whole_image,
        autocast=parts.autocast,
    )


def validate(parts: Parts, world: World, whole_image: bool) -> Scores:
    """Scores of the validation split; the ranks share its images."""
    predictor = _predictor(parts, world, whole_image)
    return evaluate(predictor, parts.val_set, rank=world.rank, world_size=world.size)


def warm_up(parts: Parts, world: World, whole_image: bool) -> None:
    """Compile the network for evaluation, by one prediction that is thrown away."""
    sample = parts.val_set[0]
    _predictor(parts, world, whole_image)(np.asarray(sample.image))


def draw(parts: Parts, world: World, count: int, whole_image: bool, folder: Path) -> None:
    """Write image | label | prediction of ``count`` validation images, and the curves."""
    predictor = _predictor(parts, world, whole_image)
    chosen = np.linspace(0, len(parts.val_set) - 1, min(count, len(parts.val_set)))
    for number, index in enumerate(chosen.round().astype(int).tolist()):
        sample = parts.val_set[index]
        image = np.asarray(sample.image)
        prediction = predictor(image).cpu().numpy()
        picture = panel(
            image,
            sample.label,
            prediction,
            parts.info.classes,
            parts.info.palette,
            title=Path(parts.val_set.name_of(index)).name,
        )
        save_png(picture, folder / "predictions" / f"{number:02d}.png")
    draw_curves(folder)


def draw_curves(folder: Path) -> bool:
    """Plot ``metrics.jsonl`` into ``curves.png``; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    training = [r for r in records if r["kind"] == "train"]
    validation = [r for r in records if r["kind"] == "val"]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("segmentation", "se", "aux"):
        if any(r[name] for r in training):
            left.plot([r["step"] for r in training], [r[name] for r in training], label=name)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    left.legend()
    steps = [r["step"] for r in validation]
    for key, name in (("miou", "mIoU"), ("pixel_accuracy", "pixAcc")):
        right.plot(steps, [100 * r[key] for r in validation], marker="o", label=name)
    right.set(xlabel="step", ylabel="validation, %", ylim=(0, 100))
    right.legend()
    figure.savefig(folder / "curves.png", dpi=110)
    return True
