"""What steps use beside the network: copies of its statistics, cuDNN's choice, process groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from encnet_triton.models import create_model
from encnet_triton.scoring.metrics import Scores
from encnet_triton.train import distributed
from encnet_triton.train.__main__ import main
from encnet_triton.train.kept_statistics import KeptStatistics
from encnet_triton.train.segmentation import Segmentation
from tests.support.scores import scores_of
from tests.train.launch import start_alone


class Copies(TorchDispatchMode):
    """The dtypes of what each call copies."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[set[torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert "copy_" not in str(func) or func is torch.ops.aten._foreach_copy_.default
        self.dtypes.append({tensor.dtype for of in args for tensor in of})
        return func(*args, **(kwargs or {}))


def test_statistics_are_copied_in_one_call_a_dtype() -> None:
    model = nn.ModuleList([create_model("fcn", 3, backbone="demo"), nn.BatchNorm2d(4)])
    kept = KeptStatistics(model)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    with Copies() as copies:
        kept.keep()
    assert sorted(map(str, copies.dtypes)) == ["{torch.float32}", "{torch.int64}"]
    for buffer in model.buffers():
        buffer.add_(1)
    kept.restore()
    assert len(before) > 30
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_steps_measure_convolutions_and_synchronise_in_a_group_of_their_own(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not validations, whose images may each have a shape; and not in the group of DDP."""
    compute = Segmentation.compute
    groups, measured = set(), []

    def step(self: Segmentation, *given: object) -> object:
        measured.append(torch.backends.cudnn.benchmark)
        layers = [m for m in self.model.modules() if isinstance(m, _BatchNorm)]
        groups.update(layer.group for layer in layers)
        assert dist.group.WORLD not in groups and self.steps_per_epoch == 2
        return compute(self, *given)

    def validate(*_: object) -> Scores:
        measured.append(torch.backends.cudnn.benchmark)
        return scores_of(0.5)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "start", start_alone)
    monkeypatch.setattr(Segmentation, "compute", step)
    monkeypatch.setattr(Segmentation, "validate", validate)
    text = recipe.read_text() + '\n[[stage]]\nstage_name = "a"\n[[stage]]\nstage_name = "b"\n'
    recipe.write_text(text)
    assert main(["--recipe", str(recipe), "--epochs", "1", "--pictures", "0"]) == 0
    assert measured == 2 * [True, True, False]
    assert len(groups) == 1 and not dist.is_initialized()
    assert not torch.backends.cudnn.benchmark
