"""``encnet NAME`` runs what ``python -m encnet_triton.NAME`` runs."""

from __future__ import annotations

import argparse
import importlib
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from encnet_triton.__main__ import COMMANDS, main, module_of

ROOT = Path(__file__).parent.parent


def test_pyproject_names_the_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["encnet"].split(":")
    assert getattr(importlib.import_module(module), function) is main


def test_every_module_with_a_command_line_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "encnet_triton"
    sources = [*folder.glob("*.py"), *(ROOT / "train").glob("*.py")]
    files = [p.stem for p in sources if '__name__ == "__main__"' in p.read_text()]
    packages = [p.parent.name for p in folder.glob("*/__main__.py")]
    assert {*files, *packages, "train"} - {"__main__"} == set(COMMANDS)
    assert main([]) == main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        assert find_spec(module_of(name)) is not None
        assert len([line for line in lines if line.split()[:1] == [name]]) == 2


def test_an_unknown_command_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "no command 'trian'" in said and "train" in said


def test_the_module_gets_its_arguments_and_gives_the_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["encnet", "convert", "none.pth", "out.pth"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "the output out.pth must be a .safetensors file" in capsys.readouterr().err


def test_only_the_module_that_is_asked_for_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(runpy, "run_module", lambda name, **_: ran.append((name, sys.argv)))
    assert main(["train", "--list"]) == 0
    assert ran == [("encnet_triton.train", ["encnet train", "--list"])]
    code = "import sys, encnet_triton.__main__; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr


def test_the_trainer_runs_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["encnet", "train", "--list"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("encnet_triton", run_name="__main__")
    assert not ended.value.code
    assert "ade20k_encnet_r101" in capsys.readouterr().out


WITH_OPTIONS = ("train", "evaluate", "predict", "convert", "export", "hub", "submit", "data")


def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.Action, str]]:
    """Every option of a command and of what is below it, with its help as it is shown."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from actions(below)
        elif action.option_strings:
            yield action, formatter._expand_help(action) if action.help else ""


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_help_says_what_every_option_is_and_its_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsers: list[argparse.ArgumentParser] = []

    def seen(self: argparse.ArgumentParser, *_: object) -> None:
        parsers.append(self)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", seen)
    package = module_of(name) + (".__main__" if name in ("train", "data") else "")
    with pytest.raises(SystemExit):
        importlib.import_module(package).main([])
    found = list(actions(parsers[0]))
    assert len(found) > 4
    for action, text in found:
        assert text, action.option_strings
        if action.nargs != 0 and not action.required:
            assert "default" in text, action.option_strings
