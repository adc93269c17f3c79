"""The least bytes of an operator are those of the design."""

from __future__ import annotations

import pytest

from bench.cases import BUDGET
from bench.passes import least_bytes


# The figures of DESIGN for bfloat16, in MB: encode 60.1 and 119.1; batch norm with residual and a
# packed mask 479 and 723; upsampling 36 and 53.
@pytest.mark.parametrize(
    ("operator", "megabytes"),
    [("encode", (60.1, 119.1)), ("batch_norm", (479.2, 722.5)), ("upsample", (35.7, 53.0))],
)
def test_least_bytes_of_the_budget_shapes(operator, megabytes) -> None:
    found = least_bytes(operator, 2, BUDGET[operator])
    assert tuple(round(b / 1e6, 1) for b in found) == megabytes
