"""What ncu and compute-sanitizer say is read."""

from __future__ import annotations

import pytest

from bench.gpu import profiling


def test_ncu_is_read() -> None:
    (kernel,) = profiling.read_ncu(profiling.SAMPLE_NCU)
    assert kernel == {
        "kernel": "a_kernel", "grid": "(132, 1, 1)", "us": 1012.5, "memory %": 61.2,
        "registers": 244.0, "stalls": {"long_scoreboard": 7.5, "barrier": 1.25},
    }  # fmt: skip
    nanoseconds = profiling.SAMPLE_NCU.replace('"us","%"', '"ns","%"')
    assert profiling.read_ncu(nanoseconds)[0]["us"] == 1.0125
    assert profiling.read_ncu("==ERROR== ERR_NVGPUCTRPERM\n") == []


@pytest.mark.parametrize(
    ("printed", "errors"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= ERROR SUMMARY: 12 errors\n", 12),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n", 1),
        ("========= Error: Device not supported\n", None),
    ],
)
def test_the_sanitizers_count_is_read(printed, errors) -> None:
    assert profiling.read_sanitizer(printed) == errors
