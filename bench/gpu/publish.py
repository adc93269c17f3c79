"""`bench gpu --publish DIR`: copies results to docs/gpu and makes the documents' tables from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.gpu import ranking
from bench.gpu.operators import SHAPES
from bench.gpu.processes import ROOT
from bench.gpu.report import Outcomes, markdown, whole
from bench.gpu.runner import Results
from encnet_triton.files import write_text
from encnet_triton.kernels.runtime import tuned

FOLDER = ROOT / "docs" / "gpu"
CONFIGURATIONS = ROOT / "kernels" / "runtime" / "tuned"  # where the launcher reads them
DOCUMENTS = (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "gpu.md")
MARKERS = (
    "<!-- gpu results: made by `bench gpu --publish` -->\n",
    "<!-- end of gpu results -->",
)
LARGEST = 300 * 1024
NOTHING = "No GPU has run this yet: every figure for a GPU in these documents is predicted."


def publish(
    sources: Sequence[Path], folder: Path = FOLDER, configurations: Path = CONFIGURATIONS
) -> Path:
    """Merge results of one machine into docs/gpu/<device>; a later folder's results win.

    The fastest configurations go to the folder from which the launcher reads them.

    Raises:
        ValueError: a folder holds no results, or those of a rehearsal or of another device; all
            results together are more than 300 KB; or configurations were measured with several
            versions of Triton.
    """
    found = [_read(source) for source in sources]
    devices = {str(results.header["device"]) for results in found}
    if len(devices) > 1:
        raise ValueError(f"the folders hold results of several devices: {', '.join(devices)}")
    outcomes = {key: one for results in found for key, one in results.outcomes.items()}
    header = found[-1].header
    lines = [header, *(one.as_dict() for one in outcomes.values())]
    made = {
        "results.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "report.md": whole(header, outcomes),
    }
    size = sum(len(text.encode()) for text in made.values())
    if size > LARGEST:
        raise ValueError(f"the results are {size} bytes; at most {LARGEST} are allowed")
    ranking.document(header, outcomes)  # refused before anything is written
    target = folder / Path(tuned.file_name(devices.pop())).stem
    target.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        write_text(text, target / name)
    ranking.write(configurations, header, outcomes)
    return target


def _read(source: Path) -> Results:
    results = Results(source)
    if "device" not in results.header:
        raise ValueError(f"{source} holds no results.jsonl of `bench gpu`")
    if results.header.get("rehearsal"):
        raise ValueError(f"{source} holds a rehearsal; only results of a GPU are published")
    return results


def write_documents() -> None:
    """Put the tables between the markers in each document."""
    for document in DOCUMENTS:
        write_text(report.filled(document, MARKERS, tables(FOLDER)), document)


def tables(folder: Path) -> str:
    """One table for all published machines, or what was predicted if there is none."""
    found = [Results(file.parent) for file in sorted(folder.glob("*/results.jsonl"))]
    if not found:
        header = ("predicted, to be measured", "forward, us", "backward, us", "measured")
        return f"{NOTHING}\n\n" + _table(header, _predictions())
    rows = [row for results in found for row in _rows(results.header, results.outcomes)]
    return _table(("measured", "ours", "best peer", "ratio"), rows)


def _predictions() -> list[tuple[str, ...]]:
    """Each operator's shape with a prediction, which is for an H100 and bfloat16."""
    return [
        (f"{name}: {', '.join(f'{k} {v}' for k, v in about.shape.items())}", *about.predicted, "-")
        for name, about in SHAPES.items()
        if about.predicted
    ]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(markdown(header, rows)).rstrip() + "\n"


def _rows(header: dict[str, Any], outcomes: Outcomes) -> list[tuple[str, ...]]:
    """Each operator's forward + backward, and images per second of each training step."""
    device, rows = str(header["device"]), []
    good = {o.key: o.result for o in outcomes.values() if o.status == "ok"}
    for stage, least in (("operators", True), ("step", False)):
        groups: dict[str, dict[str, float]] = {}
        for (of, name), result in good.items():
            group, _, variant = name.partition(": ")
            value = result["both"]["us"] if "both" in result else result.get("images/s")
            if of == stage and value is not None:
                groups.setdefault(group, {})[variant] = value
        for group, values in groups.items():
            rows += _row(f"{device}: {group}", values, "us" if least else "images/s", least)
    return rows


def _row(name: str, values: dict[str, float], unit: str, least: bool) -> list[tuple[str, ...]]:
    best = min if least else max
    ours = [v for k, v in values.items() if k.startswith("ours")]
    peers = {k: v for k, v in values.items() if not k.startswith("ours")}
    if not ours:
        return []
    mine = best(ours)
    if not peers:
        return [(name, f"{mine:.1f} {unit}", "-", "-")]
    peer = best(peers, key=lambda k: peers[k])
    ratio = peers[peer] / mine if least else mine / peers[peer]
    return [(name, f"{mine:.1f} {unit}", f"{peers[peer]:.1f} {unit} ({peer})", f"{ratio:.2f}x")]
