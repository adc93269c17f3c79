"""The tune stage: what it measures, ranks, writes and publishes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from torch import nn

from bench.gpu import exact, publish, ranking, report, tune
from bench.gpu.device import StandIn, Times
from bench.gpu.job import LeftOut, Outcome, Wrong, listeners
from bench.gpu.runner import Results
from bench.static import launches
from encnet_triton.kernels.runtime import launch, tuned
from encnet_triton.kernels.runtime.launch import Config, Launch, Machine
from encnet_triton.kernels.runtime.tuned import Problem, problem_of
from encnet_triton.models import CifarNet, create_model
from encnet_triton.nn import Encoding, ShakeEncoding
from encnet_triton.nn.norm import BatchNormAct2d
from encnet_triton.train.recipe import build_stages, recipe_names

OWN, FASTER, BROKEN, SPILLS = (Config(n, 8, 4) for n in (16, 32, 64, 128))
MICROSECONDS = {OWN: 100.0, FASTER: 50.0, BROKEN: 10.0, SPILLS: 20.0}


class Kernel:
    """Doubles X, but for the last tile where its tile is that of BROKEN."""

    fn = SimpleNamespace(__name__="doubling_kernel")
    ran: Config | None = None

    def warmup(self, BN: int, **_: object) -> SimpleNamespace:
        return SimpleNamespace(run=None, n_spills=9 if SPILLS.block_n == BN else 0)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, X: Tensor, Y: Tensor, BN: int, **_: object) -> None:
        Kernel.ran = Config(BN, 8, 4)
        stop = len(X) - BN if BROKEN.block_n == BN else len(X)
        Y[:stop] = 2 * X[:stop]


@dataclass(frozen=True)
class Doubling:
    """A pass whose kernel is `Kernel`."""

    x: Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device

    def problem(self) -> Problem:
        return problem_of("planted doubling", self.x.dtype, {}, N=len(self.x))

    def configs(self, machine: Machine) -> list[Config]:
        return [OWN]

    def candidates(self, machine: Machine) -> list[Config]:
        return [OWN, BROKEN, SPILLS, FASTER]

    def launches(self, machine: Machine, config: Config) -> tuple[list[Launch], Tensor]:
        y = torch.empty_like(self.x)
        constants = {"BN": config.block_n}
        return [Launch(KERNEL, (1,), {"X": self.x, "Y": y}, constants, config.num_warps)], y


KERNEL = Kernel()


class Subject:
    """As those of `tune`, of one pass."""

    def __init__(self) -> None:
        self.x = torch.arange(256.0)

    def check(self) -> dict[str, float]:
        # Else what the right one left in memory would pass for what BROKEN does not write.
        with exact.unwritten_is_nan():
            y = launch.run(Doubling(self.x))
        if not torch.equal(y, 2 * self.x):
            raise Wrong("y is off by 1.0e+00 of its norm (2e-05)")
        return {"y": 1e-6}


class Device(StandIn):
    """A device on which every configuration has its own time, and the compiler is the kernel's."""

    def obstacle(self, launches: Any) -> str | None:
        return next((reason for one in launches if (reason := one.obstacle())), None)

    def times(self, call: Callable[[], object], seconds: float, host_calls: int = 20) -> Times:
        call()
        assert Kernel.ran is not None
        median = MICROSECONDS[Kernel.ran] / 1e3
        return Times(median, median, median, 1, median)


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch, "_obstacles", {})
    monkeypatch.setattr(tune, "place", lambda rehearse: Device())
    monkeypatch.setattr(tune, "_subject", lambda arguments, rehearse: Subject())


def outcomes(result: dict[str, Any], status: Any = "ok") -> dict[tuple[str, str], Outcome]:
    made = Outcome("tune", "planted", status, result=result)
    return {made.key: made}


def test_the_fastest_right_configuration_wins() -> None:
    """Not the one that leaves a tile out, though it is faster, nor the one that spills."""
    found = tune.measure({"shape": "planted"}, False)
    (one,) = found["passes"].values()
    rows = one["configs"]
    assert {name: row.get("us") for name, row in rows.items()} == {
        str(OWN): 100.0, str(BROKEN): None, str(SPILLS): None, str(FASTER): 50.0,
    }  # fmt: skip
    assert rows[str(BROKEN)]["reason"].startswith("wrong: y is off by")
    assert "36 bytes of local memory" in rows[str(SPILLS)]["reason"]
    assert ranking.best(one) == str(FASTER)
    document = ranking.document({"device": "NVIDIA H100"}, outcomes(found))
    assert document["entries"][0]["config"] == str(FASTER)
    text = "\n".join(report.tune(outcomes(found)))
    assert f"| {OWN} | 100.0 | {FASTER} | 50.0 | 2.00x |" in text
    assert f"N256: {BROKEN}: wrong: y is off" in text


def test_what_was_measured_is_not_measured_again() -> None:
    """Neither is one tried again that ended its process."""
    first = tune.measure({"shape": "planted"}, False)
    rows = first["passes"]["planted doubling"]["configs"]
    del rows[str(FASTER)]
    rows[str(OWN)]["us"] = 77.0
    rows[str(BROKEN)] = {"reason": "its process died or hung"}
    again = tune.measure({"shape": "planted", "before": first}, False)
    now = again["passes"]["planted doubling"]["configs"]
    assert [now[str(c)].get("us") for c in (OWN, BROKEN, FASTER)] == [77.0, None, 50.0]


def test_what_ends_the_process_is_named_before_it_begins(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("bench.gpu.job.listeners", [lambda r: said.append(json.dumps(r))])

    def times(*_: object) -> Times:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(Device, "times", times)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.measure({"shape": "planted"}, False)
    before, after = (json.loads(text)["passes"]["planted doubling"]["configs"] for text in said)
    assert before == {str(OWN): {"reason": "its process died or hung"}}
    assert after[str(OWN)]["reason"].startswith("RuntimeError: CUDA error: an illegal memory")


def test_nothing_is_begun_when_the_time_is_over(monkeypatch) -> None:
    monkeypatch.setenv("ENCNET_JOB_UNTIL", "0")
    with pytest.raises(LeftOut, match="before all configurations were measured"):
        tune.measure({"shape": "planted"}, False)


def test_a_plan_that_is_wrong_fails_the_job(monkeypatch) -> None:
    monkeypatch.setattr(Doubling, "configs", lambda *_: [BROKEN])
    with pytest.raises(Wrong, match="y is off"):
        tune.measure({"shape": "planted"}, False)


def measured(us: dict[str, float], triton: str = triton.__version__, **sizes: int) -> Any:
    about = {"name": "encode forward", "dtype": "bfloat16", "options": {"C": 512, "K": 32}}
    about |= {"sizes": {"B": 16, "N": 3600, **sizes}}
    configs = {name: {"us": value} for name, value in us.items()}
    one = {"problem": about, "default": "own", "configs": configs}
    return {"triton": triton, "passes": {"encode forward": one}}


@pytest.mark.parametrize(
    ("us", "wanted"),
    [
        ({"own": 100.0, "other": 90.0}, "other"),
        ({"own": 100.0, "other": 99.0}, "own"),  # chance
        ({"own": 100.0}, "own"),
        ({"other": 90.0}, "other"),  # the own one was wrong, or was not reached
        ({}, None),
    ],
)
def test_the_plans_own_stays_unless_another_is_clearly_faster(us, wanted) -> None:
    assert ranking.best(measured(us)["passes"]["encode forward"]) == wanted


HEADER = {"device": "NVIDIA H100 80GB", "machine": "torch x", "date": "2027-01-01"}


def folders(tmp_path: Path, *results: Any) -> list[Path]:
    made = []
    for index, result in enumerate(results):
        made.append(tmp_path / str(index))
        made[-1].mkdir()
        kept = Results(made[-1])
        kept.begin(HEADER)
        kept.add(Outcome("tune", f"shape {index}", "ok", 1.0, result))
    return made


def test_published_configurations_are_where_the_launcher_reads_them(tmp_path, monkeypatch) -> None:
    sources = folders(
        tmp_path, measured({"own": 100.0, "other": 90.0}), measured({"own": 30.0}, N=900)
    )
    place = tmp_path / "tuned"
    publish.publish(sources, tmp_path / "docs", place)
    monkeypatch.setattr(tuned, "FOLDER", place)
    monkeypatch.setattr(tuned, "_tables", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: HEADER["device"])
    for pixels, wanted in ((3600, "other"), (900, "own")):
        given = problem_of("encode forward", torch.bfloat16, {"C": 512, "K": 32}, B=16, N=pixels)
        found = tuned.preferred(given, lambda: ["own", "other"], torch.device("cuda", 0))
        assert found == wanted
    assert publish.tables(tmp_path / "docs")  # of a machine without other results, too


def test_configurations_of_two_versions_of_triton_are_not_mixed(tmp_path) -> None:
    sources = folders(
        tmp_path, measured({"own": 1.0}, triton="3.6.0"), measured({"own": 1.0}, triton="3.7.1")
    )
    with pytest.raises(ValueError, match="measured with Triton 3.6.0 and 3.7.1"):
        publish.publish(sources, tmp_path / "docs", tmp_path / "tuned")
    assert not (tmp_path / "docs").exists() and not (tmp_path / "tuned").exists()


def test_the_file_is_there_while_measuring_goes_on(tmp_path) -> None:
    """Of jobs that were cut off as well; and none where there is nothing to say."""
    cut = outcomes(measured({"own": 100.0}), "left out")
    ranking.write(tmp_path / "tuned", HEADER, cut)
    assert len(tuned.read(tmp_path / "tuned" / "nvidia-h100-80gb.json").entries) == 1
    ranking.write(tmp_path / "none", HEADER, outcomes({}, "failed"))
    assert not (tmp_path / "none").exists()
    assert listeners == []


@functools.cache  # of layers alike, and of the shapes that are measured
def problems(operator: str, B: int, C: int, size: int, **more: Any) -> list[Problem]:
    """Those of a training step of an operator on B x C x size x size in bfloat16."""
    found: list[Any] = []
    for direction in launches.DIRECTIONS:
        if operator == "encode":
            shape = launches.EncodeShape(C, more["K"], size**2, B)
            found += launches.encode_passes(shape, torch.bfloat16, direction)
        else:
            x = launches.BatchNormShape(B, C, size**2).empty(torch.bfloat16, "meta")
            variant = launches.Variant(residual=more["residual"], frozen=more.get("frozen", False))
            found += launches.batch_norm_passes(x, variant, direction)
    return [one.problem() for one in found]


def asked_by(config: Any) -> list[Problem]:
    """What a training step of a recipe's network asks of `encode` and `batch_norm_act`."""
    found: dict[str, Problem] = {}

    def hook(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = given[0]
        if x.dim() == 4:  # the codewords' normalisation is of 16 x 32 x 512
            operator, more = "encode", {}
            if isinstance(layer, BatchNormAct2d):
                operator, more = "batch_norm", {"residual": named.get("residual") is not None}
            else:
                more = {"K": len(layer.codewords)}
            for one in problems(operator, len(x), x.shape[1], x.shape[2], **more):
                found[str(one)] = one

    options = config.model.options()
    with torch.device("meta"):
        if config.classification:
            model: nn.Module = CifarNet(**options)
        else:
            # The stages of ResNet-101 have the shapes of ResNet-50's.
            model = create_model(num_classes=150, **{**options, "backbone": "resnet50"})
        for layer in model.modules():
            if isinstance(layer, BatchNormAct2d | Encoding | ShakeEncoding):
                layer.register_forward_pre_hook(hook, with_kwargs=True)
        model(torch.empty(config.optim.batch_size, 3, *config.data.crop))
    return list(found.values())


NETWORKS = (
    "ade20k_encnet_r101",
    "ade20k_encnet_r101_released",
    "pcontext_encnet_r50_released",
    "cifar10_encnet_16k64d",
    "cifar10_encnet_32k64d",
    "cifar10_encnet_32k128d",
)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_the_networks_of_recipes_ask_for_is_measured_or_near_to_it(name: str) -> None:
    measured = [
        one
        for shape in tune.SHAPES.values()
        if shape.operator in ("encode", "batch_norm")
        for one in problems(shape.operator, **shape.sizes)
    ]
    wanted = asked_by(build_stages(name, {"data": "x"})[0])
    assert len(wanted) > 10 and any("encode" in one.name for one in wanted)
    for one in wanted:
        assert min(one.distance(other) for other in measured) <= 2, one


def test_the_networks_of_all_recipes_have_these_sizes() -> None:
    def sizes(name: str) -> tuple[Any, ...]:
        config = build_stages(name, {"data": "x"})[0]
        model = config.model
        return model.form, tuple(config.data.crop), config.optim.batch_size, model.width

    large = [name for name in recipe_names() if "encnet_r" in name or "cifar10_encnet" in name]
    assert len(large) > len(NETWORKS)
    assert {sizes(name) for name in large} <= {sizes(name) for name in NETWORKS}
