"""Each command of bench has only its own options; a wrong option gets one sentence."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import apart, compare, context
from bench.__main__ import main
from bench.cases import CASES
from bench.commands import COMMANDS, module_of
from bench.static import cost
from bench.timing import Measurement

ROOT = Path(__file__).parents[2]
SIZES = {"--backbone", "--batch", "--crop", "--classes"}
OPTIONS = {
    "encode": {"--device", "--json"},
    "batch_norm": {"--device", "--json"},
    "upsample": {"--device", "--json"},
    "crop": {"--data", "--json"},
    "cifar": {"--device", "--json"},
    "step": {*SIZES, "--precision", "--device", "--json"},
    "host": {"--device", "--rounds", "--backbone", "--eager", "--json"},
    "loader": {"--data"},
    "evaluate": {"--device", "--rounds", "--json"},
    "context": {"--seeds", "--runs", "--picture", "--json"},
    "real": {
        "--data",
        "--study",
        "--only",
        "--seeds",
        "--out",
        "--show",
        "--details",
        "--test",
        "--json",
    },
    "smp": {"--crop", "--batch", "--json"},
    "smp_train": {"--data", "--only", "--out", "--json"},
    "versions": {"--folder", "--triton", "--torch", "--redo", "--table", "--document"},
    "gpu": {"--out", "--minutes", "--stage", "--resume", "--rehearse", "--cifar", "--publish"},
    "tune": {"--out", "--minutes", "--resume", "--rehearse", "--publish"},
    "static compile": {
        "--all",
        "--quick",
        "--candidates",
        "--arch",
        "--dtype",
        "--shape",
        "--op",
        "--json",
    },
    "static traffic": {"--quick", "--json"},
    "static memory": {*SIZES, "--json"},
    "static cost": {"--json"},
}
STATIC = [name for name in COMMANDS if name.startswith("static ")]


# The names alone would be keywords: `gpu` says that a test needs one.
@pytest.mark.parametrize("name", COMMANDS, ids=[f"bench {name}" for name in COMMANDS])
def test_help_shows_its_own_options_and_no_others(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m bench {name} [-h]")
    assert set(re.findall(r"^  (--\w+)", said, re.MULTILINE)) == OPTIONS[name]


def test_the_list_has_a_line_for_each_command_and_imports_none() -> None:
    code = "import sys; from bench.__main__ import main; main([]); sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0
    lines = [line for line in run.stdout.splitlines() if "  " in line]
    assert [line.split("  ")[0] for line in lines] == list(COMMANDS)
    assert [line.split("  ")[-1].strip() for line in lines] == [c.title for c in COMMANDS.values()]


def test_static_alone_lists_what_needs_no_gpu(capsys) -> None:
    assert main(["static"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "  " in line]
    assert [line.split("  ")[0] for line in lines] == STATIC


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["speed"], "python -m bench has no command 'speed', only encode, batch_norm, "),
        (["static", "encode"], "python -m bench static has no command 'encode', only compile, "),
        (["--device", "cpu"], "python -m bench has no command '--device', only encode, "),
        (["encode", "--data", "x"], "unrecognized arguments: --data x; python -m bench encode --h"),
        (["crop", "--device", "cpu"], "unrecognized arguments: --device cpu; python -m bench crop"),
        (["loader", "--json", "x"], "unrecognized arguments: --json x; python -m bench loader"),
        (["gpu", "--json", "x"], "unrecognized arguments: --json x; python -m bench gpu --help"),
        (["versions", "--json", "x"], "unrecognized arguments: --json x; python -m bench versions"),
        (
            ["step", "--batch", "many"],
            "argument --batch: 'many' is not a whole number of at least 1; ",
        ),
        (
            ["host", "--rounds", "0"],
            "argument --rounds: '0' is not a whole number of at least 1; py",
        ),
        (
            ["static", "memory", "--crop", "-8"],
            "argument --crop: '-8' is not a whole number of at le",
        ),
        (
            ["context", "--seeds", "0"],
            "argument --seeds: '0' is not a whole number of at least 1; p",
        ),
        (["encode", "--json", "no/x.json"], "argument --json: file no/x.json: the folder no does"),
        (["static", "cost", "--json", "/"], "argument --json: file / is a folder, but must be a"),
        (["context", "--picture", "no/x.png"], "argument --picture: file no/x.png: the folder no"),
        (["static", "compile", "--shape", "512"], "argument --shape: '512' is not channels x code"),
        (["static", "memory", "--precision", "float32"], "unrecognized arguments: --precision"),
    ],
)
def test_what_is_unknown_gets_one_sentence(arguments: list[str], said: str, capsys) -> None:
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert printed.err.startswith(f"error: {said}") and printed.err.count("\n") == 1


@pytest.mark.parametrize("name", STATIC)
def test_an_old_name_runs_the_new_command_and_says_so(
    name: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: argparse.Namespace) -> int:
        print(options)
        return 3

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(module_of(name), "run", run)
    old = name.removeprefix("static ")
    assert main(["static", old, "--json", "x"]) == 3
    new = capsys.readouterr()
    assert new.err == ""
    assert main([old, "--json", "x"]) == 3
    said = capsys.readouterr()
    assert said.out == new.out != ""
    assert said.err == f"python -m bench {old} is now python -m bench static {old}\n"


def test_both_forms_write_the_same_figures(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "costs", lambda: [cost.Cost("FCN", "resnet50", 121.7, 0.0)])
    found = []
    for form in (["cost"], ["static", "cost"]):
        file = tmp_path / f"{len(form)}.json"
        assert main([*form, "--json", str(file)]) == 0
        found.append((capsys.readouterr().out, file.read_text()))
    assert found[0] == found[1]
    assert json.loads(found[0][1])["networks"][0]["gmac"] == 121.7


@pytest.mark.parametrize("form", [["memory"], ["static", "memory"]])
def test_what_is_interpreted_gets_a_process_for_it(
    form: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the new name, so that the old one is mended once."""
    started = []

    def start(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        started.append((command[1:], env["TRITON_INTERPRET"]))
        return SimpleNamespace(returncode=5)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(command, "subprocess", SimpleNamespace(run=start))
    assert main([*form, "--batch", "2"]) == 5
    assert started == [(["-m", "bench", "static", "memory", "--batch", "2"], "1")]


@pytest.mark.parametrize("name", CASES)
def test_a_comparison_understands_the_processes_it_starts(
    name: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = Measurement(1.0, 1.0, 1.0, 3, 1.0)
    measured = []

    def worker(*what: object) -> None:
        measured.append(what)
        print(json.dumps(fixed.as_dict()))

    def start(command: list[str], **_: object) -> SimpleNamespace:
        assert command[1:3] == ["-m", "bench"]
        return SimpleNamespace(returncode=main(command[3:]), stdout=capsys.readouterr().out)

    monkeypatch.setattr(compare, "worker", worker)
    monkeypatch.setattr(apart, "subprocess", SimpleNamespace(run=start))
    cpu = torch.device("cpu")
    data = "pictures" if name == "crop" else None
    assert compare.measure_apart(name, "ours", cpu, data) == fixed
    assert measured == [(CASES[name], "ours", cpu, data)]


@pytest.mark.parametrize(
    ("status", "what"), [(2, "with status 2"), (0, "before a validation: it has no score")]
)
def test_a_training_of_context_that_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, status: int, what: str
) -> None:
    ended = SimpleNamespace(returncode=status)
    monkeypatch.setattr(context.subprocess, "run", lambda command, **_: ended)
    (tmp_path / "scenes_fcn-seed0").mkdir()
    (tmp_path / "scenes_fcn-seed0" / "metrics.jsonl").write_text('{"kind": "train"}\n')
    assert main(["context", "--runs", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == f"error: the training scenes_fcn-seed0 ended {what}\n"


def test_context_hands_on_what_the_trainer_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options of other commands too: --device, --data and --crop are the trainer's here."""
    given = []

    def train(recipe: str, seed: int, folder: Path, extra: list[str], name: str) -> None:
        given.append((seed, folder, extra))

    monkeypatch.setattr(context, "train", train)
    scores = {"miou": 0.5, "pixel_accuracy": 0.5}
    monkeypatch.setattr(context, "last_validation", lambda folder: scores)
    extra = ["--epochs", "3", "--device", "cpu", "--data", "x", "--crop", "64"]
    assert main(["context", "--seeds", "1", "--runs", str(tmp_path), *extra]) == 0
    assert given == [(0, tmp_path, extra)] * 3
