"""The process that runs jobs: `python -m bench.gpu.worker`, one job per line on its input.

Each answer is a line of JSON on its output. A job may report what it has so far in lines before
that; everything else that it prints goes to the error output. ENCNET_JOB_UNTIL is the time at which
the job will be killed. Some CUDA errors break the whole process, so a worker on a GPU gets only one
job.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import traceback
from typing import Any

import torch

from bench.apart import first_line

# The others are imported here so that a worker has them before its job comes.
from bench.gpu import operators, step, tune  # noqa: F401
from bench.gpu.job import LeftOut, Wrong, listeners


def run(function: str, arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Run a job; returns the fields of its `Outcome`."""
    module, _, name = function.partition(":")
    try:
        call = getattr(importlib.import_module(module), name)
        return {"status": "ok", "result": call(arguments, rehearse)}
    except Wrong as error:
        return {"status": "wrong", "reason": str(error), "result": error.result}
    except LeftOut as error:
        return {"status": "left out", "reason": str(error)}
    except torch.OutOfMemoryError as error:
        return {"status": "does not fit", "reason": first_line(error)}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}


def main() -> None:
    """Answer jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep libraries' output out of the answers
    logging.basicConfig(level=logging.INFO)  # logs which file of configurations is used

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    listeners.append(lambda result: say({"so far": result}))
    for line in sys.stdin:
        job = json.loads(line)
        os.environ["ENCNET_JOB_UNTIL"] = str(job["until"])
        say(run(job["function"], job["arguments"], job["rehearse"]))


if __name__ == "__main__":
    main()
