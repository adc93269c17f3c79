"""The step's variants compute the same, and no speed is shown where they do not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import step
from bench.__main__ import main
from bench.commands import parse

CPU = torch.device("cpu")
SHAPE = step.Shape("demo", 2, 32, 5, "float32")
FIXED = step.StepTimes(
    host=1.0,
    losses=[2.0, 1.9, 1.8],
    phases=dict.fromkeys(step.PHASES, 20.0),
    total=100.0,
    first=1.0,
    peak_mib=50.0,
)


def test_stock_code_is_the_same_network_without_our_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same loss and gradients; our operators are not called."""
    found = {}
    for variant in ("ours, eager", "stock, eager"):
        made = step.Step(variant, SHAPE, CPU)
        made.model.double()
        if variant == "stock, eager":
            for operator in ("nn.encoding.encode", "nn.norm.batch_norm_act"):
                refuse = partial(pytest.fail, f"stock code called {operator}")
                monkeypatch.setattr(f"encnet_triton.{operator}", lambda *_, r=refuse, **__: r())
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
        loss = made.loss(made.model(x), made.labels)
        loss.backward()
        gradients = [p.grad for group in made.optimizer.param_groups for p in group["params"]]
        found[variant] = (loss.detach(), gradients)
    ours, stock = found.values()
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-6, atol=0)
    assert len(ours[1]) > 30
    # The presence losses are in float32 on both sides, 6e-8 off: the rest is in float64.
    for a, b in zip(ours[1], stock[1], strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-8


def test_the_phases_add_up_to_the_step() -> None:
    found = step.measure("ours, eager", SHAPE, CPU, seconds=0.0)
    assert tuple(found.phases) == step.PHASES and min(found.phases.values()) > 0
    assert sum(found.phases.values()) == pytest.approx(found.total, rel=0.5)
    assert found.losses[2] < found.losses[0], "three steps on one batch make its loss smaller"


def answer(monkeypatch: pytest.MonkeyPatch, **results: step.StepTimes | str) -> None:
    names = {name.replace(", ", "_"): name for name in step.VARIANTS}
    given = dict.fromkeys(step.VARIANTS, FIXED) | {names[k]: v for k, v in results.items()}
    monkeypatch.setattr(step, "measure_apart", lambda variant, *_: given[variant])


def test_another_loss_gets_no_speed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """In the third step, after two updates: the first would not show a wrong gradient."""
    answer(monkeypatch, ours_compiled=replace(FIXED, losses=[2.0, 1.9, 2.01]))
    assert main(["step", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert "the loss of ours, compiled in step 3 is 2.01" in said.err
    assert said.out == ""


def test_a_loss_that_is_not_a_number_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, ours_eager=replace(FIXED, losses=[float("nan")] * 3))
    assert main(["step", "--device", "cpu"]) == 1


def test_the_table_shows_rates_and_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    fast = replace(FIXED, total=25.0)
    answer(monkeypatch, ours_eager=fast, stock_compiled="stock, compiled failed: too old")
    file = tmp_path / "out.json"
    assert main(["step", "--device", "cpu", "--batch", "3", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "4.00x" in printed and "120.0" in printed and "too old" in printed
    document = json.loads(file.read_text())
    assert document["shape"] == {**asdict(step.DEFAULTS["cpu"]), "batch": 3}
    assert document["results"]["ours, eager"]["total"] == 25.0


def test_the_options_reach_the_process_that_measures() -> None:
    options = parse("step", SHAPE.arguments())
    assert {k: getattr(options, k) for k in asdict(SHAPE)} == asdict(SHAPE)


def test_a_missing_variant_leaves_the_rest() -> None:
    results: step.Results = dict.fromkeys(step.VARIANTS, FIXED)
    results["ours, compiled"] = "no compiler"
    assert step.disagreement(results, 1e-3) is None
    console = Console(record=True, width=150)
    console.print(step.table(SHAPE, CPU, results))
    assert "no compiler" in console.export_text()
