"""How the commands of the package end, and what they refuse before doing any work."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from encnet_triton import convert, evaluate, predict
from encnet_triton.data import __main__ as data
from encnet_triton.models import create_model
from encnet_triton.options import exit_status, pick_device
from encnet_triton.train import __main__ as train
from encnet_triton.weights.checkpoint import save_model
from tests.support.checkpoints import INFO, OPTIONS


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "out of memory; a smaller --batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
         2, "out of memory; a smaller --batch"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "out of memory; a smaller --batch"),
        (OSError("no"), 2, "no"),
        (RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed."), 2,
         "loader process 71 was killed"),
    ],
)  # fmt: skip
def test_what_a_person_can_put_right_is_a_sentence(
    error: BaseException, status: int, sentence: str, capsys
) -> None:
    assert exit_status(raising(error)) == status
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sentence}") and len(said.splitlines()) == 1


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="sizes of tensors"):
        exit_status(raising(RuntimeError("sizes of tensors must match")))


@pytest.mark.parametrize(
    "error", [OSError("disk"), KeyError("ours"), RuntimeError("KeyError of a matrix")]
)
def test_a_failing_process_of_several_waits_for_no_other(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("waits"))
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended):
        exit_status(raising(error))
    assert ("disk" if isinstance(error, OSError) else "KeyError") in capsys.readouterr().err


def test_a_terminal_without_utf8_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert exit_status(lambda: print("mIoU · Straße")) == 0
    sys.stdout.flush()
    assert written.getvalue() == b"mIoU \\xb7 Stra\\xdfe\n"


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (train.main, ["--lrr", "1"], "unrecognized arguments: --lrr 1 (did you mean --lr?)"),
        (train.main, ["--zebra"], "unrecognized arguments: --zebra; "),
        (train.main, ["--sweep", "table9"], "argument --sweep: invalid choice: 'table9'"),
        (evaluate.main, [], "the following arguments are required: --checkpoint; "),
        (evaluate.main, ["--checkpoint", "x", "--jsno", "y"], "--jsno y (did you mean --json?); "),
        (data.main, ["check", "folder", "--data", "x", "--evry", "2"], "(did you mean --every?)"),
        (data.main, ["chek"], "argument command: invalid choice: 'chek'"),
    ],
)
def test_a_mistyped_option_is_one_sentence(main, arguments, said, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert said in printed.err and len(printed.err.splitlines()) == 1
    assert " --help lists the options" in printed.err


def test_a_file_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.py").write_bytes(b"a = '\xe9'")
    torch.save({"head.conv5.0.weight": torch.zeros(1)}, "x.pth")
    save_model(Path("x.safetensors"), create_model(**OPTIONS), INFO)
    Image.new("RGB", (40, 40)).save("photo.jpg")
    convert_it = ["x.pth", "out.safetensors", "--config"]
    label_it = ["photo.jpg", "--checkpoint", "x.safetensors", "--device", "cpu", "--output"]
    for main, arguments, said in (
        (convert.main, [*convert_it, "latin.py"], "configuration latin.py is not UTF-8 text: line"),
        (convert.main, [*convert_it, "none.py"], "configuration none.py does not exist"),
        (convert.main, [*convert_it, "."], "configuration . is not a file"),
        (predict.main, [*label_it, "photo.jpg"], "the output folder photo.jpg cannot be made (F"),
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, capsys) -> None:
    for json, sentence in (("absent/x.json", "does not exist"), (".", "is a folder")):
        arguments = ["--checkpoint", "no/checkpoint", "--json", str(tmp_path / json)]
        assert evaluate.main(arguments) == 2
        assert sentence in capsys.readouterr().err


def test_the_gpu_of_a_process_is_its_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [pick_device("auto")] == chosen == [torch.device("cuda", 1)]
    pick_device("cpu")
    assert len(chosen) == 1
