"""The bench refuses wrong results, compares like with like, and measures what it claims."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from bench import cases, compare, gate, peers, report
from bench.__main__ import main
from bench.timing import Measurement
from encnet_triton import kernels
from encnet_triton.kernels import reference

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.mark.float32
@pytest.mark.parametrize("case", gate.CHECKS)
def test_operators_pass_the_gate(case: str) -> None:
    assert gate.check(case, CPU) is None


def test_a_wrong_operator_gets_no_speed(monkeypatch, capsys) -> None:
    right = kernels.encode
    monkeypatch.setattr(kernels, "encode", lambda x, d, s: right(x, d, s) * 1.01)
    assert main(["encode"]) == 1
    said = capsys.readouterr()
    assert "no speed is given: output is off by" in said.err
    assert "ms" not in said.out


@pytest.mark.float32
@pytest.mark.parametrize("peer", [peers.encode_materialised, peers.encode_matmul])
def test_encode_peers_compute_the_same(peer) -> None:
    torch.manual_seed(0)
    x, d, s = (
        torch.randn(2, 12, 5, 4).double(),
        torch.randn(3, 12).double(),
        -torch.rand(3).double(),
    )
    tolerance = 1e-12 if peer is peers.encode_materialised else 1e-5  # in float32 steps: 80 eps
    torch.testing.assert_close(
        peer(x, d, s).double(), reference.encode(x, d, s), rtol=tolerance, atol=tolerance
    )


def test_upsample_peer_computes_the_same() -> None:
    logits, target = torch.randn(2, 5, 4, 6).double(), torch.randint(0, 5, (2, 13, 17))
    target[:, :3] = 255
    torch.testing.assert_close(
        peers.upsample_then_cross_entropy(logits, target),
        reference.upsample_cross_entropy(logits, target),
    )


def test_crop_peer_makes_the_same_kind_of_crop() -> None:
    from io import BytesIO

    from PIL import Image

    image, label = (Image.open(BytesIO(b)) for b in cases.made_files(0))
    crop, marks = peers.sequential_crop(
        image, label, 480, 520, cases.FILL, np.random.default_rng(1)
    )
    assert crop.shape == (480, 480, 3) and marks.shape == (480, 480)
    assert set(np.unique(marks)) <= {*range(11), 255}


def test_extra_memory_is_the_peak_of_a_fresh_process() -> None:
    code = (
        "import torch; from bench.timing import measure\n"
        "call = lambda: torch.ones(64 << 18).sum()\n"  # 64 MiB of float32
        "found = measure(call, torch.device('cpu'), seconds=0.0, warm_up=1)\n"
        "print(found.repeats, found.extra_mib)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    repeats, extra = run.stdout.split()
    assert repeats == "3"
    assert 60 < float(extra) < 110, run.stdout


def test_table_shows_ratios_to_ours_and_reasons() -> None:
    results: report.Results = {
        "ours": Measurement(10.0, 9.0, 11.0, 5, 20.0),
        "peer": Measurement(120.0, 110.0, 130.0, 5, 300.0),
        "peer, compiled": "no compiler",
    }
    console = Console(record=True, width=140)
    console.print(report.table(cases.CASES["encode"], results))
    text = console.export_text()
    assert "12.0x" in text and "15.0x" in text and "no compiler" in text


def test_results_are_json(tmp_path, monkeypatch) -> None:
    fixed = Measurement(1.0, 1.0, 1.0, 3, 1.0)
    monkeypatch.setattr(compare, "measure_apart", lambda *_: fixed)
    assert main(["upsample", "--json", str(tmp_path / "out.json")]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["results"]["ours"]["median"] == 1.0
    assert "torch" in document["machine"]
