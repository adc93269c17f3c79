"""Inductor is told of our operators before it meets them, so that it never writes one down."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode

from encnet_triton.kernels import (
    batch_norm_act,
    batch_norm_act_forked,
    encode,
    upsample_argmax,
    upsample_cross_entropy,
)
from encnet_triton.kernels.batch_norm import library as batch_norm_library
from encnet_triton.kernels.upsampling import library as upsampling_library
from encnet_triton.nn import (
    BatchNormAct2d,
    ContextEncoding,
    Encoding,
    set_norm_impl,
    set_sync_group,
)

MODULES = [batch_norm_library, upsampling_library, sys.modules[encode.__module__]]
OPERATORS = {
    value._opoverload
    for module in MODULES
    for value in vars(module).values()
    if isinstance(value, CustomOpDef)
}


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def call_all(group: dist.ProcessGroup) -> None:
    """Every operator, forward and backward."""
    x, weight = torch.randn(2, 3, 4, 4, requires_grad=True), torch.ones(3, requires_grad=True)
    running = torch.zeros(3), torch.ones(3)
    common = {"momentum": 0.1, "eps": 1e-5}
    for options in ({"training": True}, {"training": True, "group": group}, {"training": False}):
        batch_norm_act(x, weight, None, *running, **options, **common).sum().backward()
    y, again = batch_norm_act_forked(x, weight, None, *running, training=True, **common)
    (y * again).sum().backward()
    encode(x, torch.randn(4, 3, requires_grad=True), torch.ones(4)).sum().backward()
    target = torch.zeros(2, 8, 8, dtype=torch.uint8)
    for reduction in ("mean", "none"):
        upsample_cross_entropy(x, target, reduction=reduction).sum().backward()
    upsample_argmax(x, (8, 8))


def test_every_operator_is_a_fallback_once_its_fake_function_has_run(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import lowering

    for operator in OPERATORS:
        monkeypatch.delitem(lowering.lowerings, operator, raising=False)
        monkeypatch.delitem(lowering._maybe_layout_constraints, operator, raising=False)
        lowering.fallbacks.discard(operator)
    with FakeTensorMode():
        call_all(group)
    assert len(OPERATORS) == 14
    assert lowering.lowerings.keys() >= OPERATORS
    assert lowering.fallbacks >= OPERATORS
    # What Inductor keeps to itself where nobody tells it otherwise.
    exact = lowering.constrain_to_fake_tensors
    assert all(lowering.maybe_layout_constraints(operator) is exact for operator in OPERATORS)


def test_a_call_loads_no_compiler_and_fake_tensors_not_inductor() -> None:
    """torch._dynamo takes as long to import as torch."""
    code = """
import sys, torch
from encnet_triton.kernels import encode
encode(torch.randn(1, 3, 2, 2), torch.randn(2, 3), torch.ones(2))
assert "torch._dynamo" not in sys.modules
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    encode(torch.randn(1, 3, 2, 2), torch.randn(2, 3), torch.ones(2))
sys.exit("torch._inductor.lowering" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Chain(nn.Module):
    """What the argument of `encode` is computed from grows with every layer."""

    def __init__(self, depth: int, head: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(depth):
            self.layers.append(nn.Conv2d(8, 8, 3, padding=1, bias=False))
            self.layers.append(BatchNormAct2d(8))
        self.head = head
        set_norm_impl(self, "fused")
        set_sync_group(self, group)

    def forward(self, x: Tensor) -> Tensor:
        made = self.head(self.layers(x))
        return sum(one.square().sum() for one in ((made,) if isinstance(made, Tensor) else made))


@pytest.mark.verify
@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="Inductor needs a C++ compiler on a CPU",
)
@pytest.mark.parametrize(
    ("depth", "head"),
    [(1, partial(Encoding, 8, 4)), (6, partial(ContextEncoding, 8, 3, num_codewords=4))],
    ids=["encode", "context, deep"],
)
def test_a_deep_synchronised_chain_compiles_without_implicit_fallbacks(
    depth: int,
    head: Callable[[], nn.Module],
    group: dist.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without them Inductor stops at an operator that it was not told of, on any version.

    Telling it itself takes torch 2.11 two gigabytes of text at a depth of 6.
    """
    from torch._inductor import config, lowering

    for operator in OPERATORS:
        monkeypatch.delitem(lowering.lowerings, operator, raising=False)
    torch._dynamo.reset()
    torch.manual_seed(0)
    chain = Chain(depth, head(), group).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    with config.patch(implicit_fallbacks=False, force_disable_caches=True):
        loss = torch.compile(chain, fullgraph=True)(x)
        loss.backward()
    gradients = [parameter.grad.clone() for parameter in chain.parameters()]
    chain.zero_grad()
    expected = chain(x)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(chain.parameters(), gradients, strict=True):
        assert (gradient - parameter.grad).norm() <= 1e-3 * (1 + parameter.grad.norm())
