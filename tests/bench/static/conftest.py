"""The compile report that the tests of compiled kernels read."""

from __future__ import annotations

import pytest

from tests.support.compiled import Row, compiled

# The fullest launch of each kernel by default; `make verify` compiles every launch for one
# architecture, the fullest ones for the others, and all configurations by the command itself.
QUICK = ("--quick", "--dtype", "bfloat16")
REPORTS = {
    "sm_90": ("--arch", "90", *QUICK),
    "sm_90, all": ("--arch", "90", "--dtype", "bfloat16", "float32"),
    **{f"sm_{arch}": ("--arch", str(arch), *QUICK) for arch in (80, 89, 100, 120)},
}


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(arguments, id=name, marks=[pytest.mark.verify] * (name != "sm_90"))
        for name, arguments in REPORTS.items()
    ],
)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Default configurations, as ``python -m bench static compile`` reports them."""
    return compiled(tmp_path_factory, *request.param)
