"""The results of a training, read from its files."""

from __future__ import annotations

from bench.gpu import training


def test_a_run_is_read_from_its_metrics() -> None:
    records = [
        {"kind": "start", "step": 0},
        {"kind": "train", "step": 20, "images_per_second": None},
        {"kind": "train", "step": 40, "images_per_second": 90.0},
        {"kind": "val", "step": 40, "miou": 0.9, "pixel_accuracy": 0.95},
    ]
    found = training.read(records)
    assert found == {"step": 40, "images/s": 90.0, "miou": 0.9, "pixel_accuracy": 0.95}
