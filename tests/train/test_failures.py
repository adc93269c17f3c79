"""What libraries report in words of their own becomes a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from encnet_triton.train.__main__ import main
from encnet_triton.train.failures import explained
from encnet_triton.train.segmentation import Segmentation

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
)
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB. GPU 0 has ...")
WORKER = "DataLoader worker (pid 71) is killed by signal: Killed. "


@pytest.mark.parametrize("error", [CPU, GPU, MemoryError()])
def test_out_of_memory_names_what_helps(error: Exception) -> None:
    sentence, lost = explained(error)
    assert sentence is not None and not lost and "\n" not in sentence
    assert all(f"--{o}" in sentence for o in ("batch-size", "crop", "activation-checkpointing"))
    assert ("(4,096 MiB more" in sentence or "(4.00 GiB more" in sentence) == bool(str(error))


def test_a_tensor_beyond_any_memory_is_one_that_does_not_fit() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(8, 3, 10**10, 10**10)
    sentence, _ = explained(caught.value)
    assert sentence is not None and sentence.startswith("out of memory; a smaller --batch-size")


@pytest.mark.parametrize(
    ("text", "words", "lost"),
    [
        (WORKER, "loader process 71 was killed", False),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "loader process 7, 8 ended", False),
        ("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:9",
         "lost the connection to another rank", True),
    ],
)  # fmt: skip
def test_dead_processes_are_sentences(text: str, words: str, lost: bool) -> None:
    sentence, found = explained(RuntimeError(text))
    assert sentence is not None and sentence.startswith(words) and found is lost


def test_a_mistake_of_ours_is_left_as_it_is() -> None:
    assert explained(RuntimeError("The size of tensor a must match")) == (None, False)
    assert explained(KeyError("Connection closed")) == (None, False)


def test_a_run_that_needs_too_much_ends_with_a_sentence(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """And one whose loader dies: torch raises that wherever the trainer happens to be."""
    monkeypatch.chdir(tmp_path)
    for number, error in enumerate((CPU, GPU, RuntimeError(WORKER))):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Segmentation, "compute", fail)
        assert main(["--recipe", str(recipe), "--name", str(number)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and len(said.splitlines()) == 1
