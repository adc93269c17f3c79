"""The count of bytes, through its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.static import traffic
from bench.static.launches import VARIANTS, BatchNormShape, EncodeShape

ROOT = Path(__file__).parents[3]
KEYS = (
    "op", "direction", "variant", "dtype", "shape", "programs", "requested_bytes",
    "memory_bytes", "least_bytes",
)  # fmt: skip


@pytest.fixture(scope="module")
def printed_and_rows(tmp_path_factory) -> tuple[str, list[dict]]:
    file = tmp_path_factory.mktemp("traffic") / "rows.json"
    command = [sys.executable, "-m", "bench", "static", "traffic", "--quick", "--json", str(file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads(file.read_text())


def test_rows_have_exactly_the_documented_keys(printed_and_rows) -> None:
    printed, rows = printed_and_rows
    assert rows and all(tuple(row) == KEYS for row in rows)
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    assert "memory / least" in printed and "encode backward" in printed


def test_nothing_is_below_the_least_possible(printed_and_rows) -> None:
    for row in printed_and_rows[1]:
        assert 0 < row["least_bytes"] <= row["memory_bytes"]
        assert row["least_bytes"] <= row["requested_bytes"]
        assert row["programs"] > 1


def test_the_least_reads_inputs_and_writes_outputs_once(printed_and_rows) -> None:
    size = {"bfloat16": 2, "float32": 4}
    for row in printed_and_rows[1]:
        if row["op"] != "encode":
            continue
        b, n, c, k = (row["shape"][letter] for letter in "BNCK")
        x, code, codewords = b * n * c * size[row["dtype"]], 4 * b * k * c, 4 * k * c
        least = {"forward": x + code + codewords, "backward": 2 * x + code + 2 * codewords}
        assert row["least_bytes"] == least[row["direction"]]


def test_programs_that_divide_the_channels_of_the_same_pixels_count_together() -> None:
    """Of 1024 channels, two programs take half each; later, each takes 64."""
    forward, backward = traffic.encode_cases(EncodeShape(1024, 32, 128, 1))
    assert [traffic.together(launch) for launch in forward.launches()] == [2, 1]
    counts = {launch.name: traffic.together(launch) for launch in backward.launches()}
    assert counts.pop("aggregate_kernel") == 16 and set(counts.values()) == {1}


def test_the_least_of_batch_norm_is_that_of_the_design() -> None:
    """In tensors of the layer's size; a mask of one bit per value is 1/16 of one in bfloat16."""
    whole = 2 * 16 * 256 * 14400
    shape = BatchNormShape(16, 256, 14400)
    least = {
        (case.direction, case.variant.split(",")[0]): case.least_bytes / whole
        for variant in VARIANTS
        for case in traffic.batch_norm_cases(shape, variant)
    }
    assert least["forward", "relu"] == 3 and least["backward", "relu"] == 5
    assert least["forward", "residual + relu"] == 4 + 1 / 16
    assert least["backward", "residual + relu"] == 6 + 2 / 16
    assert least["backward", "residual + relu + forked"] == 7 + 1 / 16
    assert least["forward", "normalised residual + relu"] == 5 + 1 / 16
    assert least["backward", "normalised residual + relu"] == 8 + 2 / 16
    assert least["backward", "normalised residual + relu + forked"] == 10 + 1 / 16
    assert least["forward", "frozen + relu"] == 2 and least["backward", "frozen + relu"] == 3


def test_batch_norm_reads_each_tensor_once_a_pass(printed_and_rows) -> None:
    rows = [row for row in printed_and_rows[1] if row["op"] == "batch_norm_act"]
    assert len(rows) == 6
    for row in rows:  # at this small size the partial sums are up to a tenth
        assert row["memory_bytes"] <= 1.12 * row["least_bytes"]
