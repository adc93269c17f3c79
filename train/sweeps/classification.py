"""Tables and figures of the paper that hold test errors on CIFAR-10 (table 6, figure 7)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encnet_triton.files import write_json
from encnet_triton.models import CifarNet
from encnet_triton.train.curves import draw_errors
from encnet_triton.train.run_folder import RESULT
from encnet_triton.train.sweeps.plan import Planned, Sweep
from encnet_triton.train.sweeps.table import show_and_write

HEADER = (
    "", "parameters", "runs", "test error % after the last epoch",
    "lowest % (chosen on the test set)", "paper",
)  # fmt: skip


def report(name: str, sweep: Sweep, planned: list[Planned], folder: Path) -> None:
    """Write ``<name>.md`` and ``.json``, one line per label, and ``<name>.png``, their curves."""
    labels = dict.fromkeys(one.row.label for one in planned)
    groups = {label: [one for one in planned if one.row.label == label] for label in labels}
    lines = [_line(label, group) for label, group in groups.items()]
    rows = [
        (
            line["label"],
            f"{line['parameters']:,}",
            str(len(line["errors"])),
            mean_and_error(line["errors"]),
            mean_and_error(line["lowest_errors"]),
            " / ".join(f"{value:g}" for value in line["paper"]),
        )
        for line in lines
    ]
    show_and_write(sweep.title, HEADER, rows, folder / f"{name}.md")
    write_json({"title": sweep.title, "rows": lines}, folder / f"{name}.json")
    curves = {label: [one.folder for one in group] for label, group in groups.items()}
    draw_errors(curves, folder / f"{name}.png")


def _line(label: str, group: Sequence[Planned]) -> dict[str, Any]:
    results = [json.loads((one.folder / RESULT).read_text(encoding="utf-8")) for one in group]
    model = CifarNet(**group[0].configs[-1].model.options())
    return {
        "label": label,
        "runs": [one.row.run for one in group],
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": group[0].configs[-1].optim.epochs,
        "errors": [100 * result["error"] for result in results],
        "lowest_errors": [100 * result["best_error"] for result in results],
        "paper": list(group[0].row.paper),
    }


def mean_and_error(values: Sequence[float]) -> str:
    """Mean and, of several values, its standard error."""
    mean = f"{np.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}"
