"""Uses of the operators on a GPU, each a function that raises an error if it goes wrong.

A scenario takes a machine, which has what only a device can do (`Cuda`), or something that takes
its place without one (`StandIn`). On a GPU each runs in its own process, because an error
there ends the process's use of it: see apart.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encnet_triton.kernels import (
    batch_norm_act,
    encode,
    upsample_argmax,
    upsample_cross_entropy,
)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Images, channels (or classes), height, width, codewords."""

    images: int
    channels: int
    height: int
    width: int
    codewords: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.images, self.channels, self.height, self.width


SMALL, LARGE = Size(2, 6, 3, 4, 3), Size(4, 128, 40, 40, 32)


class StandIn:
    """A machine without a device: everything happens at once, where it is called."""

    device = torch.device("cpu")
    size, calls = SMALL, 1
    placements = (("bfloat16", 1),)

    def current(self) -> torch.device:
        return self.device

    def synchronize(self) -> None:
        pass

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def delay(self) -> None:
        pass

    def capture(self, function: Callable[[], Tensors]) -> Callable[[], Tensors]:
        return function

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend="aot_eager")


class Cuda:
    """A CUDA device, which need not be the current one."""

    size, calls = LARGE, 4
    placements = (("bfloat16", 1), ("bfloat16", 2), ("float16", 4), ("float32", 1))

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)

    def current(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """A stream of its own, behind what is under way."""
        made = torch.cuda.Stream(self.device)
        made.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(made)

    def delay(self) -> None:
        """Keeps the current stream busy for a while, some 30 ms."""
        torch.cuda._sleep(50_000_000)

    def capture(self, function: Callable[[], Tensors]) -> Callable[[], Tensors]:
        """A replay of the function, captured after it has run twice on a stream of its own."""
        with self.stream():
            for _ in range(2):
                function()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = function()

        def replay() -> Tensors:
            graph.replay()
            self.synchronize()
            return made

        return replay

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, mode="reduce-overhead")


Machine = StandIn | Cuda


def _encode(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensors:
    code, total, m2 = encode(x, codewords, scale, return_stats=True)
    return {"out": code, "sum": total, "M2": m2}


def _batch_norm(training: bool) -> Callable[..., Tensors]:
    def call(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
    ) -> Tensors:
        running = {"mean": mean.clone(), "var": var.clone()}
        y = batch_norm_act(
            x, weight, bias, *running.values(),
            training=training, momentum=0.2, eps=1e-3, residual=residual,
        )  # fmt: skip
        return {"out": y, **running}

    return call


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensors:
    return {"out": upsample_cross_entropy(logits, target)}


def _argmax(logits: Tensor) -> Tensors:
    height, width = logits.shape[2:]
    labels, prob = upsample_argmax(logits, (4 * height - 3, 3 * width + 1), return_prob=True)
    return {"labels": labels, "prob": prob}


@dataclass(frozen=True)
class Operator:
    """A call of an operator: what it takes, which of it has a gradient, what it gives ("out").

    Attributes:
        parameters: name and shape of what comes beside x, which is called `first`.
    """

    call: Callable[..., Tensors]
    first: str
    parameters: Callable[[Size], dict[str, tuple[int, ...]]]
    differentiable: tuple[str, ...]


def _affine(size: Size) -> dict[str, tuple[int, ...]]:
    each = (size.channels,)
    return {"residual": size.shape, "weight": each, "bias": each, "mean": each, "var": each}


def _codebook(size: Size) -> dict[str, tuple[int, ...]]:
    return {"codewords": (size.codewords, size.channels), "scale": (size.codewords,)}


def _labels(size: Size) -> dict[str, tuple[int, ...]]:
    return {"target": (size.images, 4 * size.height - 3, 3 * size.width + 1)}


_OF_NORM = ("x", "residual", "weight", "bias")
OPERATORS = {
    "encode": Operator(_encode, "x", _codebook, ("x", "codewords", "scale")),
    "batch_norm_act": Operator(_batch_norm(True), "x", _affine, _OF_NORM),
    "batch_norm_act, frozen": Operator(_batch_norm(False), "x", _affine, _OF_NORM),
    "upsample_cross_entropy": Operator(_cross_entropy, "logits", _labels, ("logits",)),
    "upsample_argmax": Operator(_argmax, "logits", lambda _: {}, ()),
}


def draw(
    name: str, size: Size, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """Arguments of a call; what has x's size is channels last."""
    operator, generator = OPERATORS[name], torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for argument, shape in {operator.first: size.shape, **operator.parameters(size)}.items():
        values = torch.randn(shape, generator=generator)
        if shape == size.shape:
            values = (2 * values).to(dtype).contiguous(memory_format=torch.channels_last)
        elif argument == "target":
            labels = torch.randint(size.channels + 1, shape, generator=generator)
            values = labels.masked_fill(labels == size.channels, 255).to(torch.uint8)
        elif argument == "scale":
            values = -values.abs() / size.channels
        elif argument in ("weight", "var"):
            values = values.abs() + 0.5
        made[argument] = values.to(device)
    return made


def results(
    name: str,
    inputs: Tensors,
    needs: Sequence[str] | None = None,
    call: Callable[..., Tensors] | None = None,
) -> Tensors:
    """What the operator gives, and the gradients of what needs one (all that can have one)."""
    operator = OPERATORS[name]
    needs = operator.differentiable if needs is None else needs
    leaves = {n: t.detach().requires_grad_(n in needs) for n, t in inputs.items()}
    made = (call or operator.call)(**leaves)
    gradients: Tensors = {}
    if needs:
        out = made["out"]
        # Falls off along the last dimension, so that no sum of gradients is zero.
        seed = torch.linspace(1, 0.25, out.shape[-1] if out.dim() else 1, device=out.device)
        seed = seed.to(out.dtype).expand(out.shape) if out.dim() else seed[0].to(out.dtype)
        found = torch.autograd.grad(out, [leaves[n] for n in needs], seed)
        gradients = {f"d{n}": t for n, t in zip(needs, found, strict=True)}
    return {n: t.detach() for n, t in made.items()} | gradients


def assert_equal(name: str, ours: Tensors, expected: Tensors) -> None:
    assert ours.keys() == expected.keys()
    for what, value in expected.items():
        assert torch.equal(ours[what], value), f"{name}: {what} is not what it is otherwise"


def assert_near(name: str, ours: Tensors, expected: Tensors, dtype: torch.dtype) -> None:
    """Within four roundings of x's dtype, of the length of the whole tensor."""
    for what, value in expected.items():
        exact = value.double().cpu()
        error = (ours[what].double().cpu() - exact).norm().item()
        bound = 4 * torch.finfo(dtype).eps * exact.norm().item()
        assert error <= bound, f"{name}: {what} is off by {error:.3g}, {bound:.3g} are allowed"


def assert_right(name: str, ours: Tensors, inputs: Tensors) -> None:
    """Against PyTorch code in float64 on the CPU."""
    dtype = inputs[OPERATORS[name].first].dtype
    wide = {n: t.cpu().double() if t.is_floating_point() else t.cpu() for n, t in inputs.items()}
    exact = results(name, wide)
    if name == "upsample_argmax":
        # Where classes all but tie, either is right.
        labels, ours = ours["labels"].cpu().long(), {"prob": ours["prob"]}
        high = F.interpolate(wide["logits"], labels.shape[1:], mode="bilinear", align_corners=True)
        chosen = high.gather(1, labels.unsqueeze(1)).squeeze(1)
        margin = torch.finfo(torch.float32).eps * 8 * high.abs().amax()
        assert (chosen >= high.amax(1) - margin).all(), f"{name}: a label is not the likeliest"
        exact = {"prob": exact["prob"]}
    assert_near(name, ours, exact, dtype)


def plain(machine: Machine, name: str) -> None:
    """Nothing special; on a device that is not the current one, nothing happens on that one."""
    before = machine.current()
    inputs = draw(name, machine.size, machine.device)
    assert_right(name, results(name, inputs), inputs)
    assert machine.current() == before, f"the current device is {machine.current()} afterwards"


def without_gradients(machine: Machine, name: str) -> None:
    """Each input alone has a gradient, and then none has."""
    inputs = draw(name, machine.size, machine.device)
    whole, dtype = results(name, inputs), inputs[OPERATORS[name].first].dtype
    for one in OPERATORS[name].differentiable:
        made = results(name, inputs, [one])
        assert_near(name, made, {n: whole[n] for n in made}, dtype)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            made = results(name, inputs, [])
        assert_near(name, made, {n: whole[n] for n in made}, dtype)


def empty_batch(machine: Machine, name: str) -> None:
    """Nothing in, nothing out, and parameters have a gradient of zero."""
    size = Size(0, *machine.size.shape[1:], machine.size.codewords)
    inputs = draw(name, size, machine.device)
    for what, value in results(name, inputs).items():
        if what in ("mean", "var"):  # frozen
            assert torch.equal(value, inputs[what]), f"{name}: {what} moved"
        else:
            assert not value.any(), f"{name}: {what} is not zero"
    machine.synchronize()


def _placed(tensor: Tensor, offset: int) -> Tensor:
    """The same values and strides at a storage offset."""
    memory = tensor.new_zeros(tensor.numel() + offset)
    return memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


def odd_offsets(machine: Machine, name: str) -> None:
    """Every input begins somewhere within 16 bytes; then x alone, then all but x."""
    first = OPERATORS[name].first
    for dtype, offset in machine.placements:
        inputs = draw(name, machine.size, machine.device, dtype=getattr(torch, dtype))
        for moved in (set(inputs), {first}, set(inputs) - {first}):
            placed = {n: _placed(t, offset) if n in moved else t for n, t in inputs.items()}
            assert_right(name, results(name, placed), inputs)


def other_stream(machine: Machine, name: str) -> None:
    """What runs on the default stream reads inputs that are not written yet."""
    inputs = draw(name, machine.size, machine.device)
    expected = results(name, inputs)
    late = {n: torch.zeros_like(t) for n, t in inputs.items()}
    with machine.stream():
        machine.delay()
        for n, t in inputs.items():
            late[n].copy_(t)
        made = results(name, late)
    machine.synchronize()
    assert_equal(name, made, expected)


def two_streams(machine: Machine, name: str) -> None:
    """Two calls at once have no memory in common; several times, for chance has a part in it."""
    pair = [draw(name, machine.size, machine.device, seed) for seed in (1, 2)]
    expected = [results(name, inputs) for inputs in pair]
    streams = [machine.stream() for _ in pair]
    for _ in range(machine.calls):
        made = []
        for stream, inputs in zip(streams, pair, strict=True):
            with stream:
                made.append(results(name, inputs))
        machine.synchronize()
        for ours, theirs in zip(made, expected, strict=True):
            assert_equal(name, ours, theirs)


def graph(machine: Machine, name: str) -> None:
    """A captured call computes on what its inputs hold when it is replayed."""
    static = draw(name, machine.size, machine.device)
    replay = machine.capture(lambda: results(name, static))
    for seed in range(1, machine.calls + 1):
        inputs = draw(name, machine.size, machine.device, seed)
        for n, t in inputs.items():
            static[n].copy_(t)
        made = {n: t.clone() for n, t in replay().items()}
        assert_equal(name, made, results(name, inputs))


def reduce_overhead(machine: Machine, name: str) -> None:
    """The first call compiles, the second records, those after it replay."""
    compiled = machine.compile(OPERATORS[name].call)
    for seed in range(1, machine.calls + 1):
        inputs = draw(name, machine.size, machine.device, seed)
        torch.compiler.cudagraph_mark_step_begin()
        made = {n: t.clone() for n, t in results(name, inputs, call=compiled).items()}
        dtype = inputs[OPERATORS[name].first].dtype
        assert_near(name, made, results(name, inputs), dtype)


def second_device(name: str) -> None:
    """The inputs lie on cuda:1 while cuda:0 is current, and cuda:0 holds nothing afterwards."""
    machine = Cuda(1)
    plain(machine, name)
    odd_offsets(machine, name)
    held = torch.cuda.memory_allocated(0)
    assert held == 0, f"{name}: {held} bytes lie on cuda:0"


def on_cuda(scenario: str, name: str) -> None:
    """A scenario by its name, on the first device."""
    globals()[scenario](Cuda(), name)
