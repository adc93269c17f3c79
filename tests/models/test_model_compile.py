from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encnet_triton.models import create_model
from encnet_triton.nn import LossTerms, SegmentationLoss, set_norm_impl


class TrainingStep(nn.Module):
    def __init__(self, model: nn.Module, criterion: SegmentationLoss) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion

    def forward(self, x: Tensor, target: Tensor) -> LossTerms:
        terms: LossTerms = self.criterion(self.model(x), target)
        return terms


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_codewords": 8}, id="paper"),
        pytest.param({"form": "released", "num_codewords": 8, "lateral": True}, id="released"),
        pytest.param({"num_codewords": 0}, id="pooling"),
    ],
)
def test_training_step_is_one_graph(options: dict[str, Any], impl: Any) -> None:
    """Forward, loss and backward trace without a graph break and give the eager gradients."""
    torch.manual_seed(0)
    model = create_model("encnet", 59, backbone="demo", head_channels=16, dropout=0.0, **options)
    set_norm_impl(model, impl)
    step = TrainingStep(model, SegmentationLoss(59, aux_weight=0.2))
    x = torch.randn(2, 3, 24, 24)
    target = torch.randint(0, 59, (2, 24, 24), dtype=torch.uint8)
    target[0, :10] = 255

    eager = step(x, target)
    eager.total.backward()
    expected = [p.grad.clone() for p in step.parameters()]
    step.zero_grad()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, target)
    compiled.total.backward()
    torch.testing.assert_close(compiled, eager)
    for parameter, gradient in zip(step.parameters(), expected, strict=True):
        error = (parameter.grad - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-6
