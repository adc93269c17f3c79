"""The card of a model, README.md: what it is, how good, and how to use it."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

import encnet_triton
from encnet_triton.models import CifarNet
from encnet_triton.models.pretrained import Pretrained
from encnet_triton.models.trunk import PREFIX
from encnet_triton.weights.info import ModelInfo

__all__ = ["UNKNOWN", "default_license", "make_card"]

UNKNOWN = "unknown"
"""The Hub's word for a licence that is not stated."""

_PAPER = "https://arxiv.org/abs/1803.08904"
_DRAWN = "scenes"  # by this package, under its own licence
_PRIVATE = ("", "folder", _DRAWN)  # data sets that nobody else has under this name


def make_card(
    model: Pretrained,
    info: ModelInfo,
    name: str,
    *,
    license: str | None = None,
    scores: Mapping[str, Any] | None = None,
    recipe: str | None = None,
) -> str:
    """Markdown below a block of YAML that the Hugging Face Hub reads.

    Args:
        model, info: as `encnet_triton.weights.load_model` returns them.
        name: the model's, or that of its folder.
        license: of the weights, as the Hub spells it, "cc-by-4.0" for example. Default: that of
            this package for data that it draws itself, else `UNKNOWN`: the data's owners have a
            say.
        scores: as ``encnet evaluate --json`` writes them.
        recipe: TOML that the network was trained by.
    """
    scores = scores or {}
    terms = license or default_license(info)
    metadata = _metadata(model, info, name, terms, scores)
    lines = [
        "---",
        *(f"{key}: {_json(value)}" for key, value in metadata),
        "---",
        f"\n# {_text(name)}\n",
        _summary(model, info),
        *_scored(scores),
        "\n## Use\n",
        *_use(model, info, name),
        "\n## Classes\n",
        *_classes(info, scores),
        *(("\n## Recipe\n", "```toml", recipe.strip(), "```") if recipe else ()),
        "\n## Licence\n",
        _licence(terms),
    ]
    return "\n".join(lines) + "\n"


def default_license(info: ModelInfo) -> str:
    """That of the weights, if nobody says which; as the Hub spells it."""
    return "mit" if info.data.get("name") == _DRAWN else UNKNOWN


def _json(value: Any) -> str:
    """JSON is YAML too."""
    return json.dumps(value, ensure_ascii=False)


def _text(value: object) -> str:
    """Any text on one line of Markdown, also in a table."""
    plain = html.escape(" ".join(str(value).split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#~" else letter for letter in plain)


def _metadata(
    model: Pretrained, info: ModelInfo, name: str, terms: str, scores: Mapping[str, Any]
) -> Iterable[tuple[str, Any]]:
    classifies = isinstance(model, CifarNet)
    task = "image-classification" if classifies else "image-segmentation"
    data = info.data.get("name", "")
    yield "license", terms
    yield "library_name", "encnet-triton"
    yield "pipeline_tag", task
    kind = [] if classifies else ["semantic-segmentation", model.options["name"]]
    yield "tags", ["pytorch", *kind]
    if data not in _PRIVATE:
        yield "datasets", [data]
    if not (metrics := list(_metrics(scores))):
        return
    yield "metrics", [kind for kind, _, _ in metrics]
    data = str(scores.get("dataset", data)) or "unknown"
    result = {
        "task": {"type": task},
        "dataset": {"type": data, "name": data, "split": str(scores.get("split", ""))},
        "metrics": [{"type": kind, "name": text, "value": value} for kind, text, value in metrics],
    }
    yield "model-index", [{"name": name, "results": [result]}]


def _metrics(scores: Mapping[str, Any]) -> Iterable[tuple[str, str, float]]:
    """Names as on the Hub, in words, and values as fractions."""
    for key, kind, text in (
        ("miou", "mean_iou", "mIoU"),
        ("pixel_accuracy", "accuracy", "pixel accuracy"),
        ("error", "accuracy", "accuracy"),
    ):
        if (value := scores.get(key)) is not None:
            yield kind, text, round(1 - value if key == "error" else value, 5)


def _summary(model: Pretrained, info: ModelInfo) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    trunk = model.options.get("backbone")
    data = info.data.get("name", "")
    where = {"": "", "folder": " on a folder of images"}.get(data, f" on {_text(data)}")
    return (
        f"{type(model).__name__}{f' with the backbone {_text(trunk)}' if trunk else ''}, "
        f"{count:,} parameters, {len(info.classes)} classes, trained{where} with "
        f"encnet-triton {encnet_triton.__version__} "
        f"([Context Encoding for Semantic Segmentation]({_PAPER}))."
    )


def _scored(scores: Mapping[str, Any]) -> Iterable[str]:
    if not (metrics := list(_metrics(scores))):
        return
    said = [str(scores[key]) for key in ("dataset", "split", "views") if scores.get(key)]
    said += [f"step {scores['step']}"] if "step" in scores else []
    yield "\n## Scores\n"
    yield f"On {_text(', '.join(said))}.\n"
    yield from ("| | |", "| --- | --- |")
    yield from (f"| {text} | {100 * value:.2f} % |" for _, text, value in metrics)


_SEGMENT = """\
```python
from pathlib import Path
import numpy as np
from encnet_triton.inference import Predictor, read_image
from encnet_triton.models import {kind}

model = {kind}.from_pretrained({name})
photo = np.asarray(read_image(Path("photo.jpg")))
labels = Predictor(model, model.info)(photo)  # H x W numbers of classes
```

The same as pictures: `encnet predict --checkpoint {place} photo.jpg`"""
_CLASSIFY = """\
```python
from pathlib import Path
import torch
from encnet_triton.inference import ImageClassifier, read_image
from encnet_triton.models import {kind}

model = {kind}.from_pretrained({name})
classifier = ImageClassifier(model, model.info, torch.device("cpu"))
print(classifier.name(read_image(Path("photo.jpg"))))
```"""


def _use(model: Pretrained, info: ModelInfo, name: str) -> Iterable[str]:
    text = _CLASSIFY if isinstance(model, CifarNet) else _SEGMENT
    place = f"hf://{name}" if "/" in name else name
    yield text.format(kind=type(model).__name__, name=_json(name), place=place)
    mean, std = (", ".join(f"{value:g}" for value in of) for of in (info.mean, info.std))
    cut = "resized to" if text is _CLASSIFY else "cut into windows of"
    if info.base_size:
        cut = f"scaled to a {info.scale_by} edge of {info.base_size} pixels and {cut}"
    yield (
        f"\nIts input is RGB / 255, less ({mean}), divided by ({std}), {cut} {info.crop[0]} x "
        f"{info.crop[1]} pixels as in training."
    )
    if str(model.options.get("backbone")).startswith(PREFIX):
        yield "The backbone needs the package timm."


def _classes(info: ModelInfo, scores: Mapping[str, Any]) -> Iterable[str]:
    iou = scores.get("iou")
    known = iou if isinstance(iou, Mapping) else {}
    yield f"| | class | colour |{' IoU % |' if known else ''}"
    yield f"| --- | --- | --- |{' --- |' if known else ''}"
    for number, (label, colour) in enumerate(zip(info.classes, info.palette, strict=True)):
        share = known.get(label)
        shown = f" {'absent' if share is None else f'{100 * share:.2f}'} |" if known else ""
        yield f"| {number} | {_text(label)} | #{bytes(colour).hex()} |{shown}"


def _licence(terms: str) -> str:
    if terms == UNKNOWN:
        terms = "not stated; terms of the data that they were learnt from may apply"
    return f"Of the weights: {_text(terms)}. Of the code that runs them: MIT."
