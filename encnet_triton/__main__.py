"""The command ``encnet``, and ``python -m encnet_triton``: the package's commands by name.

``encnet train ...`` is ``python -m encnet_triton.train ...``. Only the requested module is
imported.
"""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "train": "train a network",
    "evaluate": "score a checkpoint on a data set",
    "predict": "label photos",
    "compare": "put runs side by side",
    "convert": "convert weights trained elsewhere, or export a backbone",
    "export": "write a network as ONNX or .pt2",
    "hub": "write a model as a folder, or upload it to the Hugging Face Hub",
    "submit": "write the archive of predictions that a test server takes",
    "data": "check a data set, or prepare its labels",
    "environment": "print what a bug report needs",
}
"""Commands, and what each does."""


def module_of(command: str) -> str:
    """The module that runs a command."""
    return f"encnet_triton.{'train.' if command in ('compare', 'hub') else ''}{command}"


def main(arguments: list[str] | None = None) -> int:
    """List the commands, or run one; the command's exit status is raised as SystemExit."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print("usage: encnet COMMAND ..., encnet COMMAND --help\n")
        for name, text in COMMANDS.items():
            print(f"  {name:<13}{text}")
        return 0
    name = given[0]
    if name not in COMMANDS:
        print(f"error: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [f"encnet {name}", *given[1:]]
    runpy.run_module(module_of(name), run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
