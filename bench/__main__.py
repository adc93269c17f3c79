"""``python -m bench NAME [options]``; without a name, prints the list of commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from bench.commands import COMMANDS, module_of, parse

GROUP = "static"


def _list(group: str) -> None:
    names = [name for name in COMMANDS if name.startswith(group)]
    width = max(map(len, names)) + 2
    for name in names:
        print(f"{name:<{width}}{COMMANDS[name].title}")
    print(f"\npython -m bench {group}NAME --help shows the options of a command")


def _refuse(group: str, name: str) -> int:
    names = [known.removeprefix(group) for known in COMMANDS if known.startswith(group)]
    print(
        f"error: python -m bench {group}has no command {name!r}, only {', '.join(names)}",
        file=sys.stderr,
    )
    return 2


def _run(name: str, arguments: Sequence[str]) -> int:
    options = parse(name, arguments)
    if COMMANDS[name].interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, "-m", "bench", *name.split(), *arguments]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    from encnet_triton.options import exit_status  # not at the top: imports torch, which is slow

    return exit_status(lambda: module_of(name).run(options), less="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and f"{GROUP} {given[0]}" in COMMANDS:
        old, new = (f"python -m bench {name}" for name in (given[0], f"{GROUP} {given[0]}"))
        print(f"{old} is now {new}", file=sys.stderr)
        given.insert(0, GROUP)
    group = f"{GROUP} " if given[:1] == [GROUP] else ""
    rest = given[1:] if group else given
    if not rest or rest[0] in ("-h", "--help"):
        _list(group)
        return 0
    name = group + rest[0]
    return _run(name, rest[1:]) if name in COMMANDS else _refuse(group, rest[0])


if __name__ == "__main__":
    sys.exit(main())
