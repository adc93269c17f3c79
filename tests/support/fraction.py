"""Half of all combinations of parameters in `make test`, the others in `make verify`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest


def half(*axes: Mapping[str, Any]) -> list[Any]:
    """Every combination of a value of each axis; those whose places add up to an odd number have
    the marker ``verify``.

    Of three axes or more, with two values or more each, every pair of two axes is among the others.

    Args:
        axes: values by their ids, or `pytest.param` with marks of their own.
    """
    made = []
    for chosen in product(*(list(enumerate(axis.items())) for axis in axes)):
        values, marks = [], [pytest.mark.verify] * (sum(place for place, _ in chosen) % 2)
        for _, (_, value) in chosen:
            marked = isinstance(value, type(pytest.param()))
            values.append(value.values[0] if marked else value)
            marks += value.marks if marked else ()
        made.append(
            pytest.param(*values, marks=marks, id="-".join(name for _, (name, _) in chosen))
        )
    return made
