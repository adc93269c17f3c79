"""The study on one's own images: what it runs, what it keeps, and what it says about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import real
from bench.__main__ import main
from bench.commands import parse
from bench.context import score_table
from bench.studies import STUDIES, Run
from encnet_triton.train.recipe import build

MIOU = {"fcn": 0.5, "encnet": 0.6, "encnet_se": 0.625}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten images to train on, four to validate on, of 64 x 48 pixels."""
    for split, count in (("train", 10), ("val", 4)):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (64, 48)).save(tmp_path / "images" / split / f"{i}.png")
            Image.fromarray(np.zeros((48, 64), np.uint8)).save(
                tmp_path / "labels" / split / f"{i}.png"
            )
    (tmp_path / "classes.txt").write_text("a\nb\n")
    return tmp_path


def planned(data: Path, *more: str) -> list[Run]:
    given = ["--data", str(data), "--out", str(data / "runs"), *more]
    return real.plan(parse("real", given))


def pretend(runs: list[Run]) -> Callable[..., None]:
    """A trainer that leaves what a complete run leaves."""
    configs = {run.name: run.config for run in runs}

    def train(recipe: str, seed: int, folder: Path, extra: list[str], name: str) -> None:
        place = folder / name
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(configs[name].as_dict()))
        (place / "result.json").write_text("{}")
        figures = {"miou": MIOU[name.partition("-")[0]] + seed / 100, "pixel_accuracy": 0.75}
        val = {"kind": "val", "step": 2, **figures}
        speed = {"kind": "train", "step": 2, "images_per_second": 4.0, "peak_memory_gib": 1.0}
        (place / "metrics.jsonl").write_text(f"{json.dumps(speed)}\n{json.dumps(val)}\n")

    return train


def test_rows_differ_in_their_options_alone_and_whole_seeds_come_first(data: Path) -> None:
    runs = planned(data, "--lr", "0.25", "--pretrained", "trunk.pth")
    names = [run.name for run in runs]
    assert names[:7] == [f"{row}-seed0" for row in STUDIES["networks"].variants]
    assert names[-3:] == [f"{row}-seed4" for row in ("fcn", "encnet", "encnet_se")]
    configs = {run.variant: run.config for run in runs if run.seed == 0}
    assert {config.optim.lr for config in configs.values()} == {0.25}
    assert all((c.model.pretrained == "") == ("random" in row) for row, c in configs.items())
    without, having = (configs[row].fingerprint() for row in ("encnet", "encnet_se"))
    assert [key for key in having if having[key] != without[key]] == ["se_loss"]


def test_the_settings_study_varies_the_recipe_it_speaks_of(data: Path) -> None:
    runs = planned(data, "--study", "settings")
    own = build("folder_encnet_lite0", {"data": str(data)}).fingerprint()
    changed = {
        run.variant: [key for key, value in run.config.fingerprint().items() if own[key] != value]
        for run in runs
    }
    assert changed["recipe"] == [] and changed["head_x5"] == ["head_lr_scale"]
    assert changed["paper_form"] == ["form", "aux"]
    assert all(len(keys) == 1 for row, keys in changed.items() if row[:5] not in ("recip", "paper"))


def test_what_is_finished_is_kept_and_an_interrupted_study_goes_on(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    given = ["--only", "fcn,encnet_se", "--seeds", "1"]
    runs = planned(data, *given)
    train, trained = pretend(runs), []

    def cut_off(*arguments: object) -> None:
        if trained:
            raise KeyboardInterrupt
        trained.append(arguments[-1])
        train(*arguments)

    monkeypatch.setattr(real, "forecast", lambda left, done: 1.5 * len(left))
    monkeypatch.setattr(real, "cost", lambda run: dict.fromkeys(
        ("parameters", "gmac", "images_per_second", "peak_memory_gib"), 1.0
    ))  # fmt: skip
    for name in ("draw", "draw_bars"):
        monkeypatch.setattr(real, name, lambda *_: None)
    monkeypatch.setattr(real, "train", cut_off)
    command = ["real", "--data", str(data), "--out", str(data / "runs"), *given]
    assert main(command) == 130
    assert "fcn-seed0; 2 of 2 runs left, 3.0 hours" in capsys.readouterr().out

    figures = data / "figures.json"
    assert main([*command, "--show", "--json", str(figures)]) == 0
    assert "1 of 2 runs are finished" in capsys.readouterr().out
    assert json.loads(figures.read_text())["val"].keys() == {"fcn"}

    monkeypatch.setattr(real, "train", train)
    assert main([*command, "--json", str(figures)]) == 0
    said = capsys.readouterr().out
    assert "encnet_se-seed0; 1 of 2 runs left, 1.5 hours" in said and "fcn-seed" not in said
    assert json.loads(figures.read_text())["val"]["encnet_se"]["0"]["miou"] == 0.625


def test_a_run_made_with_other_options_is_refused(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    runs = planned(data, "--only", "fcn", "--seeds", "1")
    pretend(runs)(runs[0].recipe, 0, runs[0].folder, [], runs[0].name)
    command = ["real", "--data", str(data), "--out", str(data / "runs"), "--only", "fcn"]
    assert main([*command, "--seeds", "1", "--lr", "0.5"]) == 2
    assert "is complete, but with lr = 0.002 where it is now 0.5" in capsys.readouterr().err


def test_differences_are_paired_by_seed_over_the_seeds_that_both_have() -> None:
    def rows(**miou: float) -> dict[int, dict[str, float]]:
        return {int(k[1:]): {"miou": v, "pixel_accuracy": 0.5} for k, v in miou.items()}

    scores = {"fcn": rows(s0=0.10, s1=0.50, s2=0.90), "encnet": rows(s1=0.54, s0=0.12)}
    table = score_table("t", scores, ["fcn", "not there"])
    cells = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns][-1] == "minus fcn"
    # 2 and 4 points: mean 3, standard deviation sqrt 2, over sqrt 2.
    assert cells[-1] == ["", "+3.00 ± 1.00"] and cells[1] == ["3", "2"]


def test_the_time_is_that_of_training_and_of_validation_windows(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--crop", "48x64", "--epochs", "10", "--val-every", "5"]
    (run,) = planned(data, "--only", "fcn", "--seeds", "1", *small)
    whole = 10 * 10 + 2 * 4 * real.FORWARD
    assert real.work(run.config) == pytest.approx(whole)
    pretend([run])(run.recipe, 0, run.folder, [], run.name)
    assert real.forecast([run, run], [run]) == pytest.approx(2 * whole / 4.0 / 3600)
    (run,) = planned(data, "--only", "fcn", "--seeds", "1", *small, "--crop", "48x48")
    assert real.work(run.config) == pytest.approx(100 + 2 * 4 * 2 * real.FORWARD)


def test_bars_of_rows_with_one_seed_and_with_several(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scores = {"fcn": {0: {"miou": 0.5}}, "encnet": {0: {"miou": 0.5}, 1: {"miou": 0.75}}}
    assert real.draw_bars(scores, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.format == "PNG" and picture.width > 300


def test_only_the_setting_that_validation_chose_is_scored_on_test(data: Path) -> None:
    runs = planned(data, "--only", "fcn,encnet", "--seeds", "2")
    scores = {
        "fcn": {0: {"miou": 0.2}, 1: {"miou": 0.6}},
        "encnet": {0: {"miou": 0.5}, 1: {"miou": 0.5}},
    }
    assert real.chosen("networks", runs, scores) == runs
    best = real.chosen("settings", runs, scores)
    assert [run.name for run in best] == ["encnet-seed0", "encnet-seed1"]


def test_a_row_that_the_study_does_not_have_is_named(data: Path, capsys) -> None:
    assert main(["real", "--data", str(data), "--only", "fcn,unet"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --only unet: the study networks has only fcn, encnet, ")
