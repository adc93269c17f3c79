"""The jobs of every stage, the most useful first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu import tune as tuning
from bench.gpu.job import Job
from bench.gpu.operators import SHAPES, variants
from bench.gpu.processes import together
from bench.passes import is_compiled
from bench.step import Shape

PREPARED = ", compile"  # end of the names of jobs that only fill the compilers' caches

# Programs with wgmma have never run yet, so they come first. Then come the shapes that have a time
# budget, then sizes that are not a multiple of the tiles.
_OPERATORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "encode C16 K16, whole images": ("encode", "bfloat16", {"B": 2, "C": 16, "size": 32, "K": 16}),
    "encode C64 K16, whole images": ("encode", "bfloat16", {"B": 2, "C": 64, "size": 8, "K": 16}),
    "encode C512 K64": ("encode", "bfloat16", {"B": 2, "C": 512, "size": 30, "K": 64}),
    "encode C512 K150": ("encode", "bfloat16", {"B": 2, "C": 512, "size": 20, "K": 150}),
    "encode C1024 K32": ("encode", "bfloat16", {"B": 2, "C": 1024, "size": 30, "K": 32}),
    "encode C512 K32": ("encode", "bfloat16", {"B": 1, "C": 512, "size": 60, "K": 32}),
    "encode C59 K7": ("encode", "bfloat16", {"B": 2, "C": 59, "size": 13, "K": 7}),
    "encode C512 K32 float32": ("encode", "float32", {"B": 2, "C": 512, "size": 30, "K": 32}),
    "batch_norm C256 residual": (
        "batch_norm", "bfloat16", {"B": 2, "C": 256, "size": 120, "residual": True},
    ),
    "batch_norm C30": ("batch_norm", "float32", {"B": 2, "C": 30, "size": 17, "residual": True}),
    "batch_norm C3": ("batch_norm", "float16", {"B": 2, "C": 3, "size": 11, "residual": False}),
    "upsample C150": ("upsample", "bfloat16", {"B": 1, "C": 150, "low": 60, "high": 480}),
    "upsample C21": ("upsample", "float32", {"B": 2, "C": 21, "low": 9, "high": 61}),
    "upsample C7, smaller": ("upsample", "float16", {"B": 2, "C": 7, "low": 40, "high": 11}),
}  # fmt: skip
# Runs the kernels on a CPU.
_INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
# Where these tests are; collecting all the others takes a minute.
_TESTS = ("tests/kernels", "tests/train/test_transfer.py")
# One of each kind is enough to rehearse.
_REHEARSED = ("encode C59 K7", "batch_norm C3", "upsample C21")


def smoke(rehearse: bool) -> list[Job]:
    """Under a minute."""
    sizes = {"bytes": 2**20, "matrix": 64} if rehearse else {"bytes": 2**30, "matrix": 8192}
    arguments: dict[str, Any]
    jobs = [
        Job("smoke", "environment", "bench.gpu.smoke:environment", seconds=5, alone=True),
        Job("smoke", "limits", "bench.gpu.smoke:limits", sizes, seconds=6, alone=True),
    ]
    for name, (operator, dtype, shape) in _OPERATORS.items():
        if rehearse and name not in _REHEARSED:
            continue
        arguments = {"operator": operator, "dtype": dtype, "shape": shape}
        jobs.append(Job("smoke", name, "bench.gpu.smoke:operator", arguments, seconds=8))
    one = {"classes": 21, "low": 9, "high": 61}
    jobs.append(Job("smoke", "upsample_argmax C21", "bench.gpu.smoke:argmax", one, seconds=8))
    # A rehearsal has only gloo, and tries torchrun in the stage `train`.
    for backend, count in (("nccl", 1), ("gloo", 2))[1 if rehearse else 0 :]:
        group = {"backend": backend, "processes": count}
        jobs.append(
            Job("smoke", f"{backend}, ranks: {count}", "bench.gpu.smoke:ranks", group, seconds=15)
        )
    few = {"recipe": "scenes", "options": ["--stop-at", "3"], "seconds": 60}
    if not rehearse:
        jobs.append(
            Job("smoke", "torchrun, 1 process", "bench.gpu.training:train", few, seconds=20)
        )
    return jobs


def operators(rehearse: bool) -> list[Job]:
    """Ours first, then the peers: compiled many at once, then measured one at a time."""
    pairs = [(s, v) for s in SHAPES for v in variants(s) if not (rehearse and not SHAPES[s].small)]
    jobs = []
    for ours in (True, False):
        these = [pair for pair in pairs if (pair[1] == "ours") == ours]
        jobs += [_prepare(*pair, rehearse) for pair in these if ours or is_compiled(pair[1])]
        jobs += [
            Job("operators", f"{shape}: {variant}", "bench.gpu.operators:measure",
                {"shape": shape, "variant": variant}, seconds=8,
                limit=300 if is_compiled(variant) else 120, alone=True)
            for shape, variant in these
        ]  # fmt: skip
    return jobs


def _prepare(shape: str, variant: str, rehearse: bool) -> Job:
    # Several jobs compile at once, and in each Inductor would start one process per core.
    compiles = is_compiled(variant) and not rehearse
    few = {"TORCHINDUCTOR_COMPILE_THREADS": "2"} if compiles else {}
    arguments = {"shape": shape, "variant": variant}
    return Job(
        "operators", f"{shape}: {variant}{PREPARED}", "bench.gpu.operators:prepare", arguments,
        seconds=20, limit=120, environment=few,
    )  # fmt: skip


def tests(rehearse: bool) -> list[Job]:
    """`pytest -m "triton or gpu"`, a share of the tests in each of several processes."""
    select = ["tests/scoring/test_metrics.py"] if rehearse else [*_TESTS, "-m", "triton or gpu"]
    parts = together(rehearse)
    return [
        Job("tests", f"part {i + 1} of {parts}", "bench.gpu.suite:run",
            {"select": select, "part": f"{i}/{parts}"}, seconds=120, limit=420)
        for i in range(parts)
    ]  # fmt: skip


def step(rehearse: bool) -> list[Job]:
    """EncNet-R50 and R101, 16 images and 2; each variant in its own process."""
    networks = [("R50", "resnet50", 16), ("R50", "resnet50", 2)]
    networks += [("R101", "resnet101", 16), ("R101", "resnet101", 2)]
    jobs, memory = [], []
    for name, backbone, batch in networks[: 1 if rehearse else None]:
        shape = asdict(Shape(backbone, batch, 480, 150))
        for how, seconds, limit in (("eager", 20, 120), ("compiled", 120, 400)):
            for side in ("ours", "stock"):
                arguments = {"shape": shape, "variant": f"{side}, {how}"}
                jobs.append(
                    Job("step", f"{name} {batch} images: {side}, {how}", "bench.gpu.step:measure",
                        arguments, seconds=seconds, limit=limit, alone=True)
                )  # fmt: skip
        memory.append(
            Job("step", f"{name} {batch} images: predicted memory", "bench.gpu.step:predict",
                {"shape": shape}, seconds=30, environment=_INTERPRETED)
        )  # fmt: skip
    return jobs + memory


def tune(rehearse: bool) -> list[Job]:
    """Every configuration of every pass, compiled many at once, then measured one at a time."""
    if rehearse:
        return [_measure_configs("encode", _INTERPRETED)]
    prepared = [
        Job("tune", f"{shape}{PREPARED}", "bench.gpu.tune:prepare", {"shape": shape}, seconds=25,
            limit=240)
        for shape in tuning.SHAPES
    ]  # fmt: skip
    return prepared + [_measure_configs(shape, {}) for shape in tuning.SHAPES]


def _measure_configs(shape: str, environment: dict[str, str]) -> Job:
    return Job(
        "tune", shape, "bench.gpu.tune:measure", {"shape": shape}, seconds=15, limit=240,
        alone=True, environment=environment, goes_on=True,
    )  # fmt: skip


def profile(rehearse: bool) -> list[Job]:
    """ncu at the shapes that are measured, compute-sanitizer at awkward ones."""
    jobs = []
    for name, shape in SHAPES.items():
        if shape.operator == "cifar" or (rehearse and not shape.small):
            continue
        arguments = {"operator": shape.operator, "dtype": "bfloat16", "shape": shape.shape}
        small = {**arguments, "dtype": "float32", "shape": shape.small}
        jobs.append(
            Job("profile", f"ncu {name}", "bench.gpu.profiling:ncu", {**arguments, "small": small},
                seconds=40, limit=180, alone=True)
        )  # fmt: skip
    awkward = (
        "encode C59 K7",
        "batch_norm C30",
        "upsample C7, smaller",
        "encode C64 K16, whole images",
    )
    for tool in ("memcheck", "racecheck", "initcheck"):
        for name in awkward[: 1 if rehearse else None]:
            operator, dtype, sizes = _OPERATORS[name]
            arguments = {"operator": operator, "dtype": dtype, "shape": sizes}
            small = {**arguments, "dtype": "float32"}
            jobs.append(
                Job("profile", f"{tool} {name}", "bench.gpu.profiling:sanitize",
                    {**arguments, "small": small, "tool": tool}, seconds=40, limit=240)
            )  # fmt: skip
    return jobs


def train(rehearse: bool, cifar: Path | None = None) -> list[Job]:
    """`scenes` for some minutes, eager, compiled and in CUDA graphs, to a score; CIFAR-10 if it is
    given."""
    runs: list[tuple[str, str, list[str], float]] = [
        ("scenes, eager", "scenes", [], 60.0),
        ("scenes, compiled", "scenes", ["--compile"], 120.0),
        ("scenes, CUDA graphs", "scenes", ["--compile", "reduce-overhead"], 120.0),
    ]
    if cifar is not None:
        options = ["--data", str(cifar.resolve())]
        runs.append(("cifar10_encnet_16k64d", "cifar10_encnet_16k64d", options, 120.0))
    return [
        Job("train", name, "bench.gpu.training:train",
            {"recipe": recipe, "options": options, "seconds": seconds},
            seconds=seconds + 20, limit=seconds + 90, alone=True)
        for name, recipe, options, seconds in runs
    ]  # fmt: skip


STAGES: dict[str, Callable[[bool], list[Job]]] = {
    "smoke": smoke,
    "operators": operators,
    "tests": tests,
    "step": step,
    "tune": tune,
    "profile": profile,
    "train": train,
}


def jobs_of(stages: list[str], rehearse: bool, cifar: Path | None) -> list[Job]:
    """The jobs of these stages, in the order of `STAGES`."""
    return [
        job
        for name, make in STAGES.items()
        if name in stages
        for job in (train(rehearse, cifar) if name == "train" else make(rehearse))
    ]
