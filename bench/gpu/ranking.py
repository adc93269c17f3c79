"""Turns the results of the tune stage into the file that the launcher reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.gpu.job import Outcome
from encnet_triton.files import write_json
from encnet_triton.kernels.runtime import tuned

# How much faster than the plan's own a configuration must be; a smaller gain may be chance.
_MARGIN = 0.02

Measured = dict[str, Any]


def measured(outcomes: Mapping[tuple[str, str], Outcome]) -> Iterator[tuple[str, Measured]]:
    """Each measured pass with its version of Triton, also from jobs that were cut off."""
    for outcome in outcomes.values():
        if outcome.stage == "tune":
            for one in outcome.result.get("passes", {}).values():
                yield outcome.result["triton"], one


def best(one: Measured) -> str | None:
    """The fastest of the correct configurations, or None if there is none.

    The plan's own is kept unless another is clearly faster.
    """
    times: dict[str, float] = {
        name: row["us"] for name, row in one["configs"].items() if "us" in row
    }
    if not times:
        return None
    default, fastest = str(one["default"]), min(times, key=lambda name: times[name])
    close = default in times and times[fastest] > (1 - _MARGIN) * times[default]
    return default if close else fastest


def document(
    header: Mapping[str, Any], outcomes: Mapping[tuple[str, str], Outcome]
) -> dict[str, Any] | None:
    """The contents of the device's file; None if nothing was measured.

    Raises:
        ValueError: it was measured with several versions of Triton.
    """
    found = [(triton, one, name) for triton, one in measured(outcomes) if (name := best(one))]
    versions = sorted({triton for triton, _, _ in found})
    if len(versions) > 1:
        raise ValueError(f"configurations were measured with Triton {' and '.join(versions)}")
    if not found:
        return None
    return {
        "schema": tuned.SCHEMA,
        "device": header["device"],
        "triton": versions[0],
        "machine": header.get("machine", ""),
        "date": header.get("date", ""),
        "entries": [_row(one, name) for _, one, name in found],
    }


def _row(one: Measured, name: str) -> dict[str, Any]:
    row = {**one["problem"], "config": name, "us": one["configs"][name]["us"]}
    default = one["configs"].get(one["default"], {})
    return row | ({"default us": default["us"]} if "us" in default else {})


def write(
    folder: Path, header: Mapping[str, Any], outcomes: Mapping[tuple[str, str], Outcome]
) -> None:
    """Write the device's file, if anything was measured."""
    if (made := document(header, outcomes)) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(made, folder / tuned.file_name(str(header["device"])))
