"""What a bug report says about the kernels is what runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from encnet_triton import kernels, machine


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_the_kernels_that_run_are_named(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "versions", lambda: {"triton": "3.6.0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    said = machine.triton_status()
    assert said.startswith("Triton kernels run" if runs else "PyTorch code runs: the GPU is sm_75")
    operators = "encode", "batch_norm_act", "batch_norm_act_forked", "upsample_argmax"
    assert all((name in said) == runs for name in (*operators, "upsample_cross_entropy"))
    assert set(operators) < set(kernels.__all__) and "layers" not in said


def test_on_a_gpu_of_another_maker_pytorch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "versions", lambda: {"triton": "3.6.0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert machine.triton_status() == "PyTorch code runs: there is no NVIDIA GPU."


def test_without_a_gpu_pytorch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "versions", lambda: {"triton": "3.6.0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.triton_status() == "PyTorch code runs: there is no NVIDIA GPU."
    monkeypatch.setattr(machine, "versions", lambda: {"triton": "not installed"})
    assert "Triton has no package here" in machine.triton_status()


def test_every_gpu_has_its_own_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = [(7, 5), (9, 0)]
    monkeypatch.setattr(machine, "versions", lambda: {"triton": "3.6.0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda device: capabilities[torch.device(device).index],
    )
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(
            name="a GPU",
            major=capabilities[index][0],
            minor=capabilities[index][1],
            total_memory=2**30,
        ),
    )
    said = dict(machine.report())
    assert "the GPU is sm_75" in said["kernels 0"]
    assert said["kernels 1"].startswith("Triton kernels run")


def test_without_a_gpu_the_report_ends_with_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.report()[-1] == ("kernels", machine.triton_status())
