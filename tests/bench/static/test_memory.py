"""Predicted memory: what is counted, and what the variants differ in."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.static import memory
from bench.step import Shape

SHAPE = Shape("demo", 2, 64, 5)


def test_bytes_are_counted_while_a_tensor_lives() -> None:
    with FakeTensorMode(), memory.Lifetimes() as live:
        a = torch.empty(1000, 256)
        b = a.t()[:5]
        c = a + 1
        assert live.bytes == 2 * 1000 * 256 * 4
        del a, c
        assert live.bytes == 1000 * 256 * 4, "a view keeps the whole"
        del b
        small = torch.ones(3)
        assert live.bytes == 512 and live.peak == 2 * 1000 * 256 * 4
        del small
    assert live.bytes == 0


def test_a_prediction_names_the_layers_that_keep_something() -> None:
    found = {variant: memory.predict(variant, SHAPE) for variant in memory.VARIANTS}
    stock, ours, checkpointed = found.values()
    assert stock.kept > ours.kept > checkpointed.kept > 0
    assert stock.state == ours.state == checkpointed.state
    for one in found.values():
        assert one.peak >= one.state + one.kept
        # Images and labels are alive too, and rounding adds to small tensors.
        assert 0.8 * one.kept <= sum(one.layers.values()) <= one.kept
    # 2 x 5 x 64 x 64 in float32, as log_softmax leaves it, against one number per pixel at most.
    assert memory.by_part(stock.layers)["loss"] >= 4 * 2 * 5 * 64 * 64
    assert memory.by_part(ours.layers)["loss"] < 0.5 * memory.by_part(stock.layers)["loss"]
    assert not any(name.startswith("backbone.layer4") for name in checkpointed.layers)


def test_the_state_is_weights_buffers_and_momentum() -> None:
    from encnet_triton.models import create_model

    model = create_model("encnet", SHAPE.classes, backbone=SHAPE.backbone)
    weights = sum(4 * p.numel() for p in model.parameters())
    state = memory.predict("ours", SHAPE).state
    assert 2 * weights <= state <= 2 * weights + 512 * 3 * len(list(model.state_dict()))
