"""Find the fastest configuration of each pass of an operator: each is checked, then timed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from bench.apart import first_line
from bench.gpu import exact
from bench.gpu.device import Gpu, StandIn, place
from bench.gpu.job import LeftOut, Wrong, so_far
from bench.passes import PASSES
from encnet_triton.kernels import upsample_argmax
from encnet_triton.kernels.runtime import launch
from encnet_triton.kernels.runtime.dispatch import interpreting
from encnet_triton.kernels.runtime.tuned import Entry

if TYPE_CHECKING:
    Pass = launch.Pass[Any]

_SECONDS = 0.1  # of replays for each configuration
_TO_END = 15.0  # the last seconds of a job, in which nothing new is started


@dataclass(frozen=True)
class Shape:
    """An operator at a shape of a recipe.

    Attributes:
        operator: a name in `passes.PASSES`, or "argmax".
        sizes: arguments of its pass.
    """

    operator: str
    sizes: dict[str, Any] = field(default_factory=dict)


def _encode(B: int, C: int, size: int, K: int) -> dict[str, Shape]:
    return {f"encode C{C} K{K}": Shape("encode", {"B": B, "C": C, "size": size, "K": K})}


def _batch_norm(
    B: int, C: int, size: int, residual: bool = False, frozen: bool = False
) -> dict[str, Shape]:
    sizes = {"B": B, "C": C, "size": size, "residual": residual, "frozen": frozen}
    more = (" residual" if residual else "") + (" frozen" if frozen else "")
    return {f"batch_norm C{C} {size}x{size}{more}": Shape("batch_norm", sizes)}


def _upsample(C: int, low: int, high: int) -> dict[str, Shape]:
    sizes = {"B": 16, "C": C, "low": low, "high": high}
    return {f"upsample C{C} {high}x{high}": Shape("upsample", sizes)}


def _argmax(C: int) -> dict[str, Shape]:
    sizes = {"B": 1, "C": C, "low": 60, "high": 480}
    return {f"upsample_argmax C{C}": Shape("argmax", sizes)}


# Training crops of 480 x 480 (576 of the released ADE20K recipes) at output stride 8, 16 images, on
# ResNet-50 and -101; 128 images of CIFAR-10. A shape near another one uses what was measured there.
SHAPES: dict[str, Shape] = {
    **_encode(16, 512, 60, 32),  # the Context Encoding Module
    **_encode(16, 1024, 60, 32),  # that of the SE loss on stage 3
    **_encode(128, 16, 32, 16),  # the stages of EncNet-14 16k64d,
    **_encode(128, 32, 16, 16),
    **_encode(128, 64, 8, 16),
    **_encode(128, 16, 32, 32),  # of 32k64d,
    **_encode(128, 32, 16, 32),
    **_encode(128, 64, 8, 32),
    **_encode(128, 128, 8, 32),  # and the last one of 32k128d
    **_batch_norm(16, 64, 240),
    **_batch_norm(16, 64, 120),
    **_batch_norm(16, 128, 120),
    **_batch_norm(16, 128, 60),
    **_batch_norm(16, 256, 60),
    **_batch_norm(16, 512, 60),
    **_batch_norm(16, 2048, 60),
    **_batch_norm(16, 256, 120, residual=True),
    **_batch_norm(16, 512, 60, residual=True),
    **_batch_norm(16, 1024, 60, residual=True),
    **_batch_norm(16, 2048, 60, residual=True),
    **_batch_norm(16, 512, 60, frozen=True),
    **_batch_norm(16, 256, 120, residual=True, frozen=True),
    **_batch_norm(128, 64, 32),
    **_batch_norm(128, 128, 16),
    **_batch_norm(128, 256, 8),
    **_batch_norm(128, 16, 32),
    **_batch_norm(128, 64, 8),
    **_upsample(150, 60, 480),  # ADE20K, PASCAL-Context, PASCAL VOC
    **_upsample(59, 60, 480),
    **_upsample(21, 60, 480),
    **_upsample(150, 72, 576),
    **_argmax(150),
    **_argmax(59),
    **_argmax(21),
}
SMALL = Shape("encode", {"B": 1, "C": 8, "size": 3, "K": 2})  # for a rehearsal: one tile
_REHEARSED = 2  # configurations of a pass in a rehearsal


class _Operator:
    """Forward and backward of an operator."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self._name, self._dtype = shape.operator, dtype
        self._ours = PASSES[shape.operator]("ours", device, dtype, **shape.sizes)
        self._ours.grad  # noqa: B018  # made now, so that no trial records it

    def run(self) -> None:
        self._ours()

    @cached_property
    def _wanted(self) -> list[torch.Tensor]:
        return exact.exact(self._name, self._ours)

    def check(self) -> dict[str, float]:
        """Errors against float64; raises Wrong."""
        return exact.compared(self._name, exact.results(self._ours), self._wanted, self._dtype)


class _ArgMax:
    """`upsample_argmax`."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        images, classes, low, high = (shape.sizes[key] for key in ("B", "C", "low", "high"))
        logits = torch.randn(images, classes, low, low, device=device).to(dtype)
        self._logits = logits.contiguous(memory_format=torch.channels_last)
        self._size = (high, high)

    def run(self) -> None:
        upsample_argmax(self._logits, self._size)

    def check(self) -> dict[str, float]:
        with exact.unwritten_is_nan():
            labels = upsample_argmax(self._logits, self._size)
        assert isinstance(labels, torch.Tensor)
        return exact.compared_labels(self._logits, labels)


def _subject(arguments: dict[str, Any], rehearse: bool) -> _Operator | _ArgMax:
    if interpreting():
        from bench.static.interpreter import quicken  # not at the top: it needs Triton

        quicken()
    shape = SMALL if rehearse else SHAPES[arguments["shape"]]
    made = _ArgMax if shape.operator == "argmax" else _Operator
    dtype = torch.float32 if rehearse else torch.bfloat16
    return made(shape, torch.device(place(rehearse).kind), dtype)


def prepare(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Compile every candidate, so that the measuring process finds it in Triton's cache."""
    device, subject = place(rehearse), _subject(arguments, rehearse)
    with launch.trial() as ran:
        subject.run()
    for call, _ in ran:
        here = launch.machine(call.device)
        for config in call.candidates(here):
            _obstacle(device, call.launches(here, config)[0])
    return {}


def measure(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Microseconds of each candidate of each pass, or why it is left out.

    Continues from arguments["before"]. A candidate that killed its process is not tried again.
    """
    try:
        import triton  # not at the top: not every platform has it
    except ImportError:
        raise LeftOut("Triton has no package for this platform") from None
    device, subject = place(rehearse), _subject(arguments, rehearse)
    with launch.trial() as ran:
        subject.check()
    found = {"triton": triton.__version__, "passes": {}, **arguments.get("before", {})}
    for call, default in ran:
        candidates = call.candidates(launch.machine(call.device))
        if len(candidates) == 1:
            continue
        problem = call.problem()
        about = {"problem": asdict(problem), "default": str(default), "configs": {}}
        rows = found["passes"].setdefault(problem.name, about)["configs"]
        for config in candidates[: _REHEARSED if rehearse else None]:
            if str(config) not in rows:
                _keep(rows, found, str(config), partial(_tried, device, subject, call, config))
    return found


def _keep(
    rows: dict[str, Any], found: dict[str, Any], name: str, tried: Callable[[], dict[str, Any]]
) -> None:
    """Record a candidate's outcome, whatever happens to this process."""
    if time.time() > float(os.environ.get("ENCNET_JOB_UNTIL", "inf")) - _TO_END:
        raise LeftOut("the time ran out before all configurations were measured")
    rows[name] = {"reason": "its process died or hung"}
    so_far(found)
    try:
        rows[name] = tried()
    except Exception as error:
        rows[name] = {"reason": f"{type(error).__name__}: {first_line(error)}"}
        raise
    finally:
        so_far(found)


def _obstacle(device: Gpu | StandIn, launches: list[launch.Launch]) -> str | None:
    try:
        return device.obstacle(launches)
    except Exception as error:  # Triton's passes fail in many ways
        return f"does not compile: {type(error).__name__}: {first_line(error)}"


def _tried(
    device: Gpu | StandIn, subject: _Operator | _ArgMax, call: Pass, config: launch.Config
) -> dict[str, Any]:
    """The outcome of one candidate of a pass."""
    made, _ = call.launches(launch.machine(call.device), config)
    if obstacle := _obstacle(device, made):
        return {"reason": obstacle}
    problem = call.problem()
    with launch.trial([Entry(problem, str(config))]) as ran:
        try:
            errors = subject.check()
        except Wrong as error:
            return {"reason": f"wrong: {error}"}
    if config not in [used for one, used in ran if one.problem() == problem]:
        return {"reason": "the launcher did not use it"}
    times = device.times(lambda: launch.run_all(made), _SECONDS)
    largest = float(f"{max(errors.values()):.1e}")
    found: dict[str, Any] = {"us": round(1e3 * times.median, 2), "error": largest}
    return found | ({"note": times.note} if times.note else {})
