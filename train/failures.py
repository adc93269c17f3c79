"""Sentences for failures that libraries report in their own words."""

from __future__ import annotations

import re

from encnet_triton.data.loader import worker_failure
from encnet_triton.options import lost_connection, out_of_memory

_AMOUNT = re.compile(r"[Tt]ried to allocate ([\d.]+) ([KMG]?i?B|bytes)")


def explained(error: BaseException) -> tuple[str | None, bool]:
    """(the sentence for an error of a library, or None; whether another rank cannot be reached)."""
    text = str(error)
    if out_of_memory(error):
        amount = _AMOUNT.search(text)
        what = f" ({_size(amount[1], amount[2])} more were requested)" if amount else ""
        return (
            f"out of memory{what}; a smaller --batch-size (or the same with --accumulation), a "
            "smaller --crop or --activation-checkpointing need less"
        ), False
    if not isinstance(error, RuntimeError):
        return None, False
    if sentence := worker_failure(error):
        return sentence, False
    if lost_connection(error):
        return f"lost the connection to another rank: {text.splitlines()[0][:300]}", True
    return None, False


def _size(number: str, unit: str) -> str:
    return f"{float(number) / 2**20:,.0f} MiB" if unit == "bytes" else f"{number} {unit}"
