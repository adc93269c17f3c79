"""What a person sees on a terminal of 80 columns, and if there is none."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from encnet_triton.train.log import Log

RECORD = {
    "step": 123456, "loss": 1.2345, "segmentation": 0.987, "se": 0.12, "aux": 0.3, "lr": 0.00123,
    "images_per_second": 1234.5, "data_wait": 0.03, "skipped": 2,
}  # fmt: skip
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shown(log: Log, screen: io.StringIO) -> list[str]:
    """The lines of the last picture."""
    screen.truncate(0)
    screen.seek(0)
    assert log._progress is not None
    log._progress.refresh()
    return [
        line.rstrip() for line in ESCAPES.sub("", screen.getvalue()).replace("\r", "").split("\n")
    ]


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


def live(folder: Path, screen: io.StringIO, width: int) -> Log:
    log = Log(folder, True, Console(file=screen, force_terminal=True, width=width))
    log.begin(234_000, 123_455)
    return log


def test_80_columns_show_step_bar_loss_and_time_left(tmp_path: Path, screen: io.StringIO) -> None:
    log = live(tmp_path, screen, 80)
    log.advance(123_456)
    log.train(RECORD, 234_000, 123_456.0)
    (line,) = shown(log, screen)
    log.end()
    assert len(line) <= 80
    assert line.startswith("123456/234000 ━━━━━━━━")
    assert "loss 1.234" in line and "ETA 1 day, 10:17:36" in line


def test_a_wide_terminal_shows_all_and_a_narrow_one_the_step(
    tmp_path: Path, screen: io.StringIO
) -> None:
    for width, words in ((200, "img/s data lr segmentation se aux skipped"), (40, "/234000 ━")):
        log = live(tmp_path, screen, width)
        log.train(RECORD, 234_000, 10.0)
        (line,) = shown(log, screen)
        log.end()
        assert len(line) <= width and all(word in line for word in words.split()), line


def test_a_validation_has_a_bar_while_it_lasts(tmp_path: Path, screen: io.StringIO) -> None:
    log = live(tmp_path, screen, 80)
    for number, _ in enumerate(log.watch(range(50), 50, "validation")):
        if number == 20:
            training, validation = shown(log, screen)
            assert "123455/234000" in training
            assert re.search(r" +20/50 +━+.* validation", validation)
    assert len(shown(log, screen)) == 1
    log.end()
    assert list(log.watch([1, 2], 2, "validation")) == [1, 2]  # after the end, and without a screen


def test_figures_that_are_not_finite_are_null(tmp_path: Path, capsys) -> None:
    log = Log(tmp_path, True)
    log.train({**RECORD, "loss": None, "segmentation": None, "data_wait": float("nan")}, 9, None)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss": null' in text and '"data_wait": null' in text
    assert "loss not finite" in capsys.readouterr().out
