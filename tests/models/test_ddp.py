from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from encnet_triton.models import SegmentationOutput, create_model
from encnet_triton.nn import SegmentationLoss, set_sync_group

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")


@pytest.fixture(scope="module")
def process_group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [
        {"name": "encnet"},
        {"name": "encnet", "form": "released", "lateral": True},
        {"name": "encnet", "num_codewords": 0, "se_loss": False},
        {"name": "fcn", "aux": True, "num_convs": 2, "concat_input": True},
    ],
    ids=["paper", "released", "pooling", "fcn"],
)
def test_wrapped_and_synchronised_it_trains_as_by_itself(
    options: dict[str, Any], process_group: Any
) -> None:
    """Two steps: DistributedDataParallel reports an unused parameter at the second."""
    torch.manual_seed(0)
    options = {"num_classes": 5, "backbone": "demo", "head_channels": 16, "dropout": 0.0, **options}
    alone = create_model(**options).double()
    inner = create_model(**options).double()
    inner.load_state_dict(alone.state_dict())
    assert set_sync_group(inner, process_group) > 10
    wrapped = DistributedDataParallel(inner)
    criterion = SegmentationLoss(5, aux_weight=0.2)
    target = torch.randint(0, 5, (2, 24, 24), dtype=torch.uint8)
    for _ in range(2):
        x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
        for model in (alone, wrapped):
            output = model(x)
            assert isinstance(output, SegmentationOutput)
            criterion(output, target).total.backward()
    ours = dict(inner.named_parameters())
    for name, parameter in alone.named_parameters():
        assert parameter.grad is not None and ours[name].grad is not None
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-8, atol=1e-10)
