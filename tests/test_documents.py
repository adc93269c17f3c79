"""Links and anchors of the documents resolve, their commands parse, their Python snippets run; the
walk-through of your own data runs as a whole.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bench import __main__ as bench_main
from bench import commands as bench_commands
from encnet_triton import __main__ as console
from encnet_triton import convert, evaluate, export, predict, submit
from encnet_triton.data import __main__ as data
from encnet_triton.train import __main__ as train_main
from encnet_triton.train import cli, compare, hub, segmentation

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "kernels/**/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name not in ("report.md",)  # of a machine, made by `bench gpu --publish`
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PLACEHOLDERS = {"NAME": "voc", "HOST:29500": "host:29500"}


def each(find: Callable[[str], list[str]]) -> Any:
    """A test's parameter: what is found in the documents, with the document's name."""
    found = [
        pytest.param(path, text, id=f"{path.relative_to(ROOT)}: {' '.join(text.split())[:60]}")
        for path in DOCUMENTS
        for text in dict.fromkeys(find(path.read_text(encoding="utf-8")))
    ]
    return pytest.mark.parametrize(("path", "text"), found)


def links(text: str) -> list[str]:
    """Targets in this repository."""
    return [link for link in LINK.findall(FENCE.sub("", text)) if "://" not in link]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def command_lines(text: str) -> list[str]:
    """Commands of ours, in blocks of shell and in the text."""
    blocks = [body.replace("\\\n", " ") for kind, body in FENCE.findall(text) if kind == "sh"]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    ours = re.compile(r"-m (encnet_triton|bench)\b|^(encnet|make) \w")
    return [line for line in lines if ours.search(line) and "..." not in line]


def snippets(text: str) -> list[str]:
    """Blocks of Python."""
    return [body for kind, body in FENCE.findall(text) if kind == "python"]


@each(links)
def test_a_link_resolves(path: Path, text: str) -> None:
    file, _, anchor = text.partition("#")
    target = (path.parent / file) if file else path
    assert target.exists()
    assert not anchor or anchor in anchors(target)


def parse_bench(arguments: list[str]) -> None:
    """`python -m bench` with these arguments, as far as they are parsed."""
    count = 2 if arguments[:1] == [bench_main.GROUP] else 1
    name = " ".join(arguments[:count])
    if arguments and name != bench_main.GROUP:
        assert name in bench_commands.COMMANDS
        options = bench_commands.parse(name, arguments[count:])
        if bench_commands.COMMANDS[name].passes_on:
            parse_train(options.extra)


def parse_train(arguments: list[str]) -> None:
    """The trainer's options, and the configuration that they make."""
    options = cli.parse(arguments)
    if options.sweep is None:
        assert cli.stages(options)


PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "train": parse_train,
    "evaluate": lambda given: evaluate.make_parser().parse_args(given),
    "predict": lambda given: predict.make_parser().parse_args(given),
    "compare": lambda given: compare.make_parser().parse_args(given),
    "submit": lambda given: submit.make_parser().parse_args(given),
    "convert": convert.parse,
    "export": lambda given: export.make_parser().parse_args(given),
    "hub": lambda given: hub.make_parser().parse_args(given),
    "data": data.parse,
}


MAINS: dict[str, Callable[[list[str]], int]] = {
    "train": train_main.main,
    "evaluate": evaluate.main,
    "predict": predict.main,
    "data": data.main,
}


@each(command_lines)
def test_a_command_parses(
    path: Path, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parse_line(text)
    assert capsys.readouterr() == ("", "")  # neither an error nor a warning


def parse_line(text: str) -> None:
    """Any command of this project; an option it does not know raises SystemExit."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(text, comments=True)]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert next(word for word in words[1:] if "=" not in word) in targets
        return
    if words[0] == "encnet":
        words = ["-m", f"encnet_triton.{words[1]}", *words[2:]]
    start = next(i for i, w in enumerate(words) if w.split(".")[0] in ("encnet_triton", "bench"))
    module, arguments = words[start], words[start + 1 :]
    if "--help" in arguments:
        arguments.remove("--help")
    if module == "bench":
        parse_bench(arguments)
        return
    assert module.partition(".")[2] in console.COMMANDS
    if arguments:
        PARSERS[module.partition(".")[2]](arguments)


def executed(path: Path, text: str) -> dict[str, Any]:
    """The names that a block of Python leaves."""
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(text, str(path), "exec"), names)
    return names


@each(snippets)
def test_a_snippet_runs(
    path: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = executed(path, text)
    made = [value for value in names.values() if isinstance(value, Tensor)]
    assert all(value.isfinite().all() for value in made)


# What makes it quick; commands and code are otherwise as they stand there. The forecast of memory
# and the curves have tests of their own.
LEFT_OUT = ("peak_memory", "draw_curves")
FEWER = {"40": "8", "8": "2"}  # images
SMALLER = ["--backbone", "demo", "--epochs", "1", "--workers", "0", "--device", "cpu"]


def test_the_walk_through_of_own_data_ends_where_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in LEFT_OUT:
        monkeypatch.setattr(segmentation, name, lambda *_: 0)
    path = ROOT / "docs" / "own_data.md"
    walked = path.read_text(encoding="utf-8").partition("## Better results")[0]
    defined: dict[str, Any] = {}
    ran = []
    for kind, body in FENCE.findall(walked):
        if kind == "python":
            fewer = re.sub(r"(?<=\", )\d+(?=\))", lambda count: FEWER[count[0]], body)
            defined |= executed(path, fewer)
        for line in body.splitlines() if kind == "sh" else ():
            command, name, *arguments = shlex.split(line)
            if command == "encnet":
                smaller = SMALLER if name == "train" else []
                assert MAINS[name]([*arguments, *smaller]) == 0, line
                ran.append(name)
    assert ran == ["data", "train", "train", "evaluate", "predict"]
    assert capsys.readouterr().out.count("each can be used") == 2
    for file in re.findall(r"`((?:runs|predictions)[\w/.]*)`", walked):
        assert Path(file).exists() or "curves" in file, file
    photos = sorted(Path("mydata/images/val").iterdir())
    assert len(list(Path("predictions").glob("*.png"))) == 2 * len(photos) == 4
    labels = defined["labels_of"]("runs/mine/best.safetensors", str(photos[0]))
    assert labels.shape == (96, 128) and labels.max() < 3
