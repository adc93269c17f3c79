"""How the commands of this package end."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch.distributed as dist

from encnet_triton.weights.checkpoint import CheckpointError


def exit_status(action: Callable[[], object]) -> int:
    """Run a command: 0, or 2 after one sentence for what a user can put right."""
    try:
        action()
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    return 0
