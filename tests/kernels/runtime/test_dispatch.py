"""Which code runs an operator, as one place says for all of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from encnet_triton.kernels.runtime import dispatch

PACKAGE = "encnet_triton.kernels"
X, CODEWORDS = torch.zeros(1, 4, 9), torch.zeros(3, 4)


def test_float64_and_cpu_tensors_take_the_pytorch_code() -> None:
    assert not dispatch.takes_triton(X.double())
    assert dispatch.takes_triton(X) == dispatch.interpreting()
    assert dispatch.plan_of(f"{PACKAGE}.encoding", X.double(), CODEWORDS) is None


def test_the_capability_is_a_constant_to_the_compiler_as_torch_marks_one() -> None:
    def marked() -> None: ...

    torch.compiler.assume_constant_result(marked)
    assert vars(marked).items() <= vars(dispatch._is_sm_80_or_newer).items()


def test_without_triton_the_pytorch_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton", None)
    assert not dispatch.interpreting()
    assert dispatch.plan_of(f"{PACKAGE}.encoding", X, CODEWORDS) is None


def test_gpus_of_others_take_the_pytorch_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    x = SimpleNamespace(dtype=torch.float32, is_cuda=True, device=torch.device("cuda"))
    assert dispatch.takes_triton(x)
    monkeypatch.setattr(torch.version, "hip", "6.3")  # where an AMD GPU is a CUDA device
    assert not dispatch.takes_triton(x)


@pytest.mark.parametrize(
    ("operator", "taken", "refused"),
    [
        ("encoding", (X, CODEWORDS), (X, torch.zeros(257, 4))),
        ("batch_norm", (X,), (X[:0],)),
        ("upsampling", (X[None], 9, 90, True), (X[None], 9, 6000, True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_plan_runs_what_it_supports(
    operator: str, taken: tuple, refused: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "takes_triton", lambda _: True)
    package = f"{PACKAGE}.{operator}"
    assert dispatch.plan_of(package, *taken).__name__ == f"{package}.plan"
    assert dispatch.plan_of(package, *refused) is None
