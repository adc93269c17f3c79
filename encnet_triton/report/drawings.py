"""Diagrams as SVG, with matplotlib; grey lines and text are readable on white and on black."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from encnet_triton.report.page import Html, svg, text

__all__ = ["NO_MATPLOTLIB", "confusion_matrix", "drawn"]

NO_MATPLOTLIB = Html("<p>Diagrams need matplotlib: pip install 'encnet-triton[plots]'.</p>")

_GREY = "#808080"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "encnet-triton",  # the same file for the same figures
    "savefig.transparent": True,
    "legend.framealpha": 0.0,
    "text.parse_math": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _GREY
    ),
}
_NAMED = 40  # classes that have room for their names


def drawn(draw: Callable[[Any], None], size: tuple[float, float], alt: str) -> Html:
    """What a function draws on a figure of so many inches, or `NO_MATPLOTLIB`."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return NO_MATPLOTLIB
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return svg(buffer.getvalue(), alt)


def confusion_matrix(counts: Tensor, classes: Sequence[str]) -> Html:
    """Shares of each class's labelled pixels by what they were taken for.

    Args:
        counts: n x n; rows are labels.
        classes: their n names.
    """
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axes.set(xlabel="prediction", ylabel="label")
        if len(classes) <= _NAMED:
            axes.set_xticks(np.arange(len(classes)), classes, rotation=90)
            axes.set_yticks(np.arange(len(classes)), classes)
        figure.colorbar(image, ax=axes, label="share of the label's pixels", shrink=0.7)

    edge = min(9.0, 4.0 + 0.16 * len(classes))
    caption = "Confusion matrix: rows are labels, columns predictions, each row sums to one"
    made = drawn(draw, (edge + 1, edge), caption)
    return Html(f"<figure><figcaption>{text(caption)}.</figcaption>{made}</figure>")
