"""The trainer in float64, which tests start: see `assert_equal_in_float64`."""

from __future__ import annotations

import sys

import torch

from encnet_triton.train.__main__ import main

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    sys.exit(main())
