"""The peer with one Triton program per channel computes what torch's layers do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench import channel_programs, peers
from encnet_triton.kernels.runtime import launch

pytestmark = pytest.mark.triton
DEVICE = "cpu" if launch.interpreting() else "cuda"


@pytest.mark.parametrize("residual", [True, False])
def test_one_program_a_channel_is_a_batch_norm(
    residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_programs, "_TILE", 64)  # several tiles per channel
    generator = torch.Generator().manual_seed(0)
    x, other, grad = (
        torch.randn(3, 4, 7, 9, generator=generator).to(DEVICE) + 3 * (i == 0) for i in range(3)
    )
    weight, bias = (torch.rand(4, generator=generator).to(DEVICE) + 0.5 for _ in range(2))
    results = []
    for layer in (channel_programs.batch_norm_add_relu, peers.batch_norm_add_relu):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, other)]
        running = [torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)]
        y = layer(*leaves[:3], *running, leaves[3] if residual else None)
        asked = leaves if residual else leaves[:3]
        results.append([y.detach(), *running, *torch.autograd.grad(y, asked, grad)])
    # Sums of 189 values in float32, in another order.
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
