"""Computing stages 3 and 4 again changes what is kept, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from encnet_triton.models import create_model
from encnet_triton.nn import SegmentationLoss, set_norm_impl
from tests.support.tolerance import assert_equal_in_float64, gradients

IMPLS = pytest.mark.parametrize("impl", ["torch", "fused"])


def network(
    checkpointing: bool, impl: str = "torch", dtype: torch.dtype = torch.float32
) -> nn.Module:
    torch.manual_seed(0)
    model = create_model("encnet", 5, backbone="small", head_channels=32).to(dtype)
    set_norm_impl(model, impl)
    model.backbone.activation_checkpointing = checkpointing
    return model


def step(model: nn.Module) -> tuple[Tensor, int]:
    """Loss of a step with its backward pass, and the bytes of tensors kept for that."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 48, 48, generator=generator).to(model.backbone.bn1.weight)
    target = torch.randint(0, 5, (2, 48, 48), generator=generator, dtype=torch.uint8)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(2)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = SegmentationLoss(5)(model(x), target).total
    total = sum(kept.values())
    loss.backward()
    return loss.detach(), total


@IMPLS
def test_gradients_and_running_statistics_are_the_same_bits(impl: str) -> None:
    plain, checkpointed = network(False, impl), network(True, impl)
    for _ in range(2):
        expected, kept = step(plain)
        loss, less = step(checkpointed)
        assert torch.equal(loss, expected) and less < 0.75 * kept
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert checkpointed.backbone.bn1.num_batches_tracked == 2
    assert checkpointed.backbone.layer4[0].bn1.num_batches_tracked == 2


def test_evaluation_is_untouched() -> None:
    model = network(True).eval()
    x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(model(x).logits, network(False).eval()(x).logits, rtol=0, atol=0)


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    plain, checkpointed = (network(c, dtype=torch.float64) for c in (False, True))
    expected, _ = step(plain)
    checkpointed.compile(fullgraph=True, backend="aot_eager")
    loss, _ = step(checkpointed)
    assert_equal_in_float64({"loss": loss}, {"loss": expected})
    assert_equal_in_float64(gradients(checkpointed), gradients(plain))
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)
