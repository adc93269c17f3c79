"""Pictures of ``metrics.jsonl``: losses and scores, or errors over the epochs (paper, figure 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encnet_triton.pictures import save_figure
from encnet_triton.train.log import is_number, read_records

_TICKS = (0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 7, 10, 14, 20, 30, 40, 60, 90)
_KINDS = (("train", "train_error", "--"), ("val", "error", "-"))


def errors(folder: Path, kind: str, key: str) -> NDArray[np.float64]:
    """One error per epoch, in percent, from a run's ``metrics.jsonl``."""
    found: list[Any] = [r.get(key) for r in read_records(folder) if r["kind"] == kind]
    return np.array([100 * value if is_number(value) else np.nan for value in found])


def draw_errors(runs: Mapping[str, Sequence[Path]], path: Path) -> bool:
    """Draw the mean over the runs of each label, up to the shortest run.

    Args:
        runs: label -> folders of runs.
        path: of the picture. Returns False where matplotlib is not installed.
    """
    return save_figure(lambda figure: plot_errors(runs, figure), (7, 4.5), path)


def plot_errors(runs: Mapping[str, Sequence[Path]], figure: Any) -> None:
    """The curves of `draw_errors`, on a matplotlib figure."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    axes = figure.subplots()
    for number, (label, folders) in enumerate(runs.items()):
        for kind, key, style in _KINDS:
            curves = [errors(folder, kind, key) for folder in folders]
            length = min(map(len, curves))
            mean = np.mean([curve[:length] for curve in curves], 0)
            name = label if kind == "val" else None
            axes.plot(np.arange(1, length + 1), mean, style, color=f"C{number}", label=name)
    axes.set(xlabel="epoch", ylabel="error, % (dashed: training)", yscale="log")
    axes.yaxis.set_major_locator(FixedLocator(_TICKS))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)  # a run's name may have dollars


def _label_values(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, at least four of them however few values it spans."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = [10.0**n for n in range(-6, 7)]
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [d * s for d in decades for s in steps if low <= d * s <= high]
        if len(ticks) >= 4:
            axis.set_major_locator(FixedLocator(ticks))
            break
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FormatStrFormatter("%.4g"))
    axis.set_minor_locator(NullLocator())


def draw_curves(folder: Path) -> bool:
    """Plot ``metrics.jsonl`` into ``curves.png``; False where matplotlib is not installed."""
    records, path = read_records(folder), folder / "curves.png"
    return save_figure(lambda figure: plot_scores(records, figure), (9, 3.5), path)


def plot_scores(records: Sequence[Mapping[str, Any]], figure: Any) -> None:
    """Losses, and mIoU and pixel accuracy, on a matplotlib figure."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    training = [r for r in records if r["kind"] == "train"]
    validation = [r for r in records if r["kind"] == "val"]
    left, right = figure.subplots(1, 2, sharex=True)
    for name in ("segmentation", "se", "aux"):
        points = [(r["step"], r[name]) for r in training if is_number(r.get(name)) and r[name] > 0]
        if points:
            left.plot(*zip(*points, strict=True), label=name)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    _label_values(left.yaxis)
    if left.lines:
        left.legend()
    for key, name in (("miou", "mIoU"), ("pixel_accuracy", "pixAcc")):
        points = [(r["step"], 100 * r[key]) for r in validation if is_number(r.get(key))]
        right.plot(*zip(*points, strict=True) if points else ([], []), marker="o", label=name)
    right.set(xlabel="step", ylabel="validation, %", ylim=(0, 100))
    for axis in (left.xaxis, right.xaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    right.legend()


def plot_measure(
    axes: Any,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    kind: str,
    key: str,
    factor: float,
    label: str,
) -> None:
    """One figure of several runs over the steps.

    Args:
        axes: of matplotlib.
        runs: name -> records.
        kind, key: of the records, and of the figure in them.
        factor: that it is multiplied with.
        label: of the axis.
    """
    for name, records in runs.items():
        found = [r for r in records if r["kind"] == kind and is_number(r.get(key))]
        steps, values = [r["step"] for r in found], [factor * r[key] for r in found]
        axes.plot(steps, values, label=name, marker="o" if kind == "val" else None)
    axes.set(xlabel="step", ylabel=label)
    axes.legend()
