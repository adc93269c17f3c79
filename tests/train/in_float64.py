"""The trainer in float64, which tests start: see `assert_equal_in_float64`.

COMPILED_BY names another backend for torch.compile than Inductor.
"""

from __future__ import annotations

import os
import sys
from functools import partialmethod

import torch

from encnet_triton.train.__main__ import main

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    if backend := os.environ.get("COMPILED_BY"):
        torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend=backend)
    sys.exit(main())
