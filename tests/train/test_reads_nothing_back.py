"""A training step on a GPU never waits for a value: neither the network nor our operators ask."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from encnet_triton.kernels.runtime import dispatch, eager, launch
from encnet_triton.kernels.runtime.launch import Launch
from encnet_triton.models import create_model
from encnet_triton.nn import SegmentationLoss, set_norm_impl
from encnet_triton.train.config import OptimConfig
from encnet_triton.train.optim import make_optimizer

# Operators that read a value, or whose result has as many elements as values say.
READING = {"_local_scalar_dense", "item", "equal", "nonzero", "masked_select", "unique_dim",
           "_unique2", "is_nonzero", "allclose"}  # fmt: skip


class Refusing(TorchDispatchMode):
    """Notes reads, and operators as the network and the bodies of ours call them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(launch.interpreting(), reason="plans are made here, and nothing is launched")
def test_a_step_with_kernels_reads_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are left out, so that the bodies are those of a GPU on tensors of a CPU."""
    launched: list[str] = []
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    monkeypatch.setattr(Launch, "obstacle", lambda _: None)
    monkeypatch.setattr(Launch, "run", lambda one: launched.append(one.name))
    launch.forget()
    # Bodies run under the mode instead of the operators, which would hide what they do.
    monkeypatch.setattr(eager, "quiet", lambda: True)
    for module in ("batch_norm", "encoding", "upsampling"):
        monkeypatch.setattr(f"encnet_triton.kernels.{module}.operator.quiet", lambda: True)
    model = create_model("encnet", 5, backbone="resnet18", dropout=0.1).train()
    set_norm_impl(model, "fused")
    criterion, optimizer = SegmentationLoss(5), make_optimizer(model, OptimConfig(lr=0.01))
    images, target = torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.uint8)
    with Refusing() as seen:
        loss = criterion(model(images), target).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kernels = {"forward_kernel", "backward_kernel", "normalise_kernel", "backward_input_kernel"}
    assert kernels <= set(launched)
    assert {"convolution", "empty_like"} <= seen.names
    assert not seen.names & READING
