"""Which measured configuration a pass takes, and what is said of files that are not taken."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from encnet_triton.kernels.encoding import plan
from encnet_triton.kernels.runtime import launch, tuned
from encnet_triton.kernels.runtime.launch import Config, Launch
from encnet_triton.kernels.runtime.tuned import Entry, Problem, problem_of

DEVICE = torch.device("cuda", 0)
NAME = "NVIDIA H100 80GB HBM3"
SMALL, LARGE = (Config(n, 64, 8, "fused") for n in (16, 64))
OPTIONS = {"C": 512, "K": 32}


def asked(images: int, pixels: int, **changed: Any) -> Problem:
    given = {"name": "encode forward", "dtype": torch.bfloat16, "options": OPTIONS} | changed
    return problem_of(**given, B=images, N=pixels)


ENTRIES = [Entry(asked(16, 3600), str(LARGE)), Entry(asked(16, 900), str(SMALL))]


def row(entry: Entry, **more: Any) -> dict[str, Any]:
    of = entry.problem
    found = {"name": of.name, "dtype": of.dtype, "options": of.options, "sizes": of.sizes}
    return {**found, "config": entry.config, "us": 1.0, **more}


def document(**changed: Any) -> dict[str, Any]:
    made = {"schema": 1, "device": NAME, "triton": triton.__version__}
    return {**made, "entries": [row(entry) for entry in ENTRIES], **changed}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files of devices are; this one is an H100."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "_tables", {})
    monkeypatch.setattr(tuned, "tried", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: NAME)
    return tmp_path


def put(folder: Path, text: str) -> None:
    (folder / "nvidia-h100-80gb-hbm3.json").write_text(text)


def found(of: Problem, device: torch.device = DEVICE) -> Config | None:
    return tuned.preferred(of, lambda: [LARGE, SMALL], device)


@pytest.mark.parametrize(
    ("of", "wanted"),
    [
        (asked(16, 3600), LARGE),
        (asked(16, 4000), LARGE),
        (asked(4, 3000), LARGE),
        (asked(8, 1000), SMALL),
        (asked(16, 900), SMALL),
        (asked(1, 100), None),  # too far from both
        (asked(0, 3600), None),
        (asked(16, 3600, name="encode backward"), None),
        (asked(16, 3600, dtype=torch.float16), None),
        (asked(16, 3600, options={"C": 1024, "K": 32}), None),
    ],
    ids=str,
)
def test_the_nearest_shape_of_the_same_pass_counts(folder, of, wanted) -> None:
    put(folder, json.dumps(document()))
    assert found(of) == wanted


def test_a_file_is_read_once_and_a_line_says_so(folder, caplog) -> None:
    put(folder, json.dumps(document()))
    with caplog.at_level(logging.INFO):
        assert found(asked(16, 3600)) == LARGE
        (folder / "nvidia-h100-80gb-hbm3.json").unlink()
        assert found(asked(16, 900)) == SMALL
    (line,) = (record.getMessage() for record in caplog.records)
    assert "nvidia-h100-80gb-hbm3.json: 2 measured configurations are preferred" in line


@pytest.mark.parametrize("text", [None, json.dumps(document(entries=[]))], ids=["none", "empty"])
def test_without_entries_nothing_is_preferred_or_wrong(folder, caplog, text) -> None:
    if text is not None:
        put(folder, text)
    with caplog.at_level(logging.WARNING):
        assert found(asked(16, 3600)) is None
    assert not caplog.records


def test_a_cpu_and_a_variable_leave_files_unread(folder, monkeypatch) -> None:
    put(folder, json.dumps(document()))
    assert found(asked(16, 3600), torch.device("cpu")) is None
    monkeypatch.setenv("ENCNET_TUNED", "0")
    assert found(asked(16, 3600)) is None


GOOD = row(ENTRIES[0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read"),
        ('{"schema": 1, "entr', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "is not of schema 1"),
        (json.dumps(document(schema=2)), "is not of schema 1"),
        (json.dumps(document(device=None)), "must name device, triton and entries"),
        (json.dumps(document(entries={})), "must name device, triton and entries"),
        (json.dumps(document(entries=[GOOD, 3])), "entry 2 is none"),
        (json.dumps(document(entries=[{**GOOD, "config": 64}])), "entry 1 is none"),
        (json.dumps(document(entries=[{**GOOD, "options": [1]}])), "entry 1 is none"),
        (json.dumps(document(entries=[{**GOOD, "sizes": {"B": 16.5}}])), "entry 1 is none"),
        (json.dumps(document(entries=[{**GOOD, "sizes": {"B": True}}])), "entry 1 is none"),
        (json.dumps(document(entries=[{**GOOD, "sizes": {"B": -1}}])), "entry 1 is none"),
        (json.dumps(document(triton="3.0.0")), "with Triton 3.0.0, and this is NVIDIA H100"),
        (json.dumps(document(device="NVIDIA H100 80GB HBM2")), "on NVIDIA H100 80GB HBM2 with"),
    ],
)
def test_a_file_that_is_not_used_gets_one_sentence(folder, caplog, text, said) -> None:
    put(folder, text)
    with caplog.at_level(logging.INFO):
        assert found(asked(16, 3600)) is None and found(asked(16, 900)) is None
    (line,) = (record.getMessage() for record in caplog.records)
    assert said in line and "nvidia-h100-80gb-hbm3.json" in line


def test_a_file_that_cannot_be_opened_gets_a_sentence_too(folder, caplog) -> None:
    (folder / "nvidia-h100-80gb-hbm3.json").mkdir()
    assert found(asked(16, 3600)) is None
    assert "cannot be read" in caplog.text


def test_a_configuration_that_the_plan_does_not_have_is_left_out_with_a_line(
    folder, caplog
) -> None:
    unknown = row(Entry(asked(16, 3600), "fused n512 c512 w64"))
    put(folder, json.dumps(document(entries=[unknown, row(ENTRIES[1])])))
    assert found(asked(16, 3600)) == SMALL
    assert "'fused n512 c512 w64', measured for encode forward on cuda:0, is no" in caplog.text
    caplog.clear()
    # Another shape may well have other configurations.
    assert found(asked(16, 3000)) == SMALL and not caplog.records


@pytest.mark.parametrize(
    "device", ["NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090", "A/../B", "Tesla (TM)  V"]
)
def test_names_of_files_hold_letters_digits_and_dashes(device) -> None:
    name = tuned.file_name(device)
    assert name.endswith(".json") and name[:-5].replace("-", "").isalnum() and "--" not in name


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Launches that would have run; kernels need no GPU and none is compiled."""
    made: list[Launch] = []
    monkeypatch.setattr(launch, "_obstacles", {})
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(Launch, "run", lambda one: made.append(one))
    monkeypatch.setattr(Launch, "obstacle", lambda _: None)
    return made


def forward(memory: Tensor | None = None, pixels: int = 100) -> plan.Forward:
    memory = torch.zeros(2 * pixels * 256, dtype=torch.bfloat16) if memory is None else memory
    x = memory.view(2, pixels, 256).transpose(1, 2)
    return plan.Forward(x, torch.zeros(32, 256), torch.zeros(32), False)


def block_of(ran: list[Launch]) -> list[int]:
    return [one.constants["BN"] for one in ran if one.name == "forward_kernel"]


def test_a_measured_configuration_runs_before_the_plans_own(ran) -> None:
    call = forward()
    wanted = Config(64, 64, 8, "fused")
    assert wanted not in call.configs(launch.machine(call.device))
    with launch.trial([Entry(call.problem(), str(wanted))]) as seen:
        launch.run(call)
    launch.run(call)
    assert block_of(ran) == [64, 32]
    assert seen == [(call, wanted)]


def test_a_trial_leaves_nothing_behind(ran) -> None:
    call = forward()
    launch.run(call)
    before = tuned.tried
    with (
        pytest.raises(ZeroDivisionError),
        launch.trial([Entry(call.problem(), str(Config(64, 64, 8, "fused")))]),
    ):
        launch.run(call)
        raise ZeroDivisionError
    assert tuned.tried is before
    launch.run(call)
    assert block_of(ran) == [32, 64, 32]


def test_a_measured_configuration_that_spills_gives_way_to_the_plans_own(
    ran, monkeypatch, caplog
) -> None:
    def obstacle(one: Launch) -> str | None:
        return "spills" if one.constants.get("BN") == 64 else None

    monkeypatch.setattr(Launch, "obstacle", obstacle)
    with launch.trial([Entry(forward().problem(), str(Config(64, 64, 8, "fused")))]):
        launch.run(forward())
    assert block_of(ran) == [32]
    assert "using 'fused n32 c64 w8 s2' in place of 'fused n64 c64 w8'" in caplog.text


def test_the_conservative_configuration_stays_last_when_it_was_the_fastest(ran) -> None:
    call = forward()
    configs = call.configs(launch.machine(call.device))
    with launch.trial([Entry(call.problem(), str(configs[-1]))]):
        listed = launch._preferred_first(call, launch.machine(call.device))
    assert listed == [configs[-1], *configs]
