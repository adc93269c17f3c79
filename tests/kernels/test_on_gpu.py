"""What people do with the operators on a GPU; without one the same, as far as that goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from tests.support import ends, scenarios
from tests.support.apart import assert_passes_apart
from tests.support.scenarios import OPERATORS, StandIn

operators = pytest.mark.parametrize("name", OPERATORS)
# A training needs two values per channel.
of_nothing = pytest.mark.parametrize("name", [n for n in OPERATORS if n != "batch_norm_act"])
SCENARIOS = [
    scenarios.plain,
    scenarios.odd_offsets,
    scenarios.without_gradients,
    scenarios.other_stream,
    scenarios.two_streams,
    scenarios.graph,
    scenarios.reduce_overhead,
]
ON_KERNELS = SCENARIOS[:3]
each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)


@pytest.mark.gpu
@operators
@each_scenario
def test_on_a_gpu(scenario: Callable[..., None], name: str) -> None:
    assert_passes_apart(scenarios.on_cuda, scenario.__name__, name)


@pytest.mark.gpu
@of_nothing
def test_an_empty_batch_on_a_gpu(name: str) -> None:
    assert_passes_apart(scenarios.on_cuda, "empty_batch", name)


@pytest.mark.gpu
@operators
def test_on_a_gpu_that_is_not_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert_passes_apart(scenarios.second_device, name)


def assert_holds(scenario: Callable[..., None], name: str) -> None:
    """Scenarios compare by themselves and raise AssertionError where something differs."""
    scenario(StandIn(), name)


@operators
@pytest.mark.parametrize(
    "scenario",
    [
        # The others repeat a call, which shows the same without the interpreted kernels.
        pytest.param(s, marks=[pytest.mark.interpreter] * (s in ON_KERNELS), id=s.__name__)
        for s in SCENARIOS
    ],
)
def test_the_scenarios_without_a_gpu(scenario: Callable[..., None], name: str) -> None:
    assert_holds(scenario, name)


@pytest.mark.interpreter
@of_nothing
def test_an_empty_batch(name: str) -> None:
    assert_holds(scenarios.empty_batch, name)


def test_a_process_of_its_own_says_in_a_sentence_what_went_wrong() -> None:
    assert_passes_apart(ends.good)
    for function, arguments, sentence in (
        (ends.bad, ("this",), "bad('this',): ValueError: this is wrong."),
        (ends.crash, (), "crash(): killed by signal 6"),
    ):
        with pytest.raises(pytest.fail.Exception) as failure:
            assert_passes_apart(function, *arguments)
        assert str(failure.value) == sentence
    with pytest.raises(pytest.fail.Exception, match="no end after 0.5 s"):
        assert_passes_apart(ends.endless, limit=0.5)
