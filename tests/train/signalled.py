"""The trainer, whose rank 1 gets SIGTERM between two epochs: run by test_signals.py."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from encnet_triton.train.__main__ import main
from encnet_triton.train.log import Log

_write = Log.write


def write(self: Log, record: dict[str, Any]) -> None:
    """All ranks come here; after a validation each does what is between two epochs."""
    _write(self, record)
    if record["kind"] == "val" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    Log.write = write  # type: ignore[method-assign]
    sys.exit(main())
