"""``encnet NAME`` runs what ``python -m encnet_triton.NAME`` runs."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from encnet_triton.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent


def test_pyproject_names_the_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["encnet"].split(":")
    assert getattr(importlib.import_module(module), function) is main


def test_every_module_with_a_command_line_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "encnet_triton"
    files = [p.stem for p in folder.glob("*.py") if '__name__ == "__main__"' in p.read_text()]
    packages = [p.parent.name for p in folder.glob("*/__main__.py")]
    assert {*files, *packages, "train"} - {"__main__"} == set(COMMANDS)
    assert main([]) == main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        assert find_spec(f"encnet_triton.{name}") is not None
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


def test_the_trainer_runs_by_name() -> None:
    command = [sys.executable, "-m", "encnet_triton", "train", "--list"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "ade20k_encnet_r101" in run.stdout
