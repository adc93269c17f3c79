"""The HTML of reports: it needs no other file, and shows any text as it is."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from encnet_triton import evaluate
from encnet_triton.report import facts, page, section, table
from encnet_triton.report.drawings import NO_MATPLOTLIB, confusion_matrix
from encnet_triton.train import compare
from encnet_triton.train.__main__ import main


class Reader(HTMLParser):
    """Text, pictures and references of a page; every element must be closed."""

    EMPTY = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.pictures, self.references, self._open = "", [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag not in self.EMPTY:
            self._open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "data", "action"):
                (self.pictures if tag == "img" else self.references).append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> Reader:
    """The page, of which every picture is inside it and decodes."""
    text = path.read_text(encoding="utf-8")
    found = Reader(text)
    assert not found.references and "url(" not in text and "@import" not in text
    for picture in found.pictures:
        kind, data = re.fullmatch(r"data:image/([a-z+]+);base64,(.*)", picture).groups()
        if kind == "svg+xml":
            assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
        else:
            with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                image.load()
                assert image.format.lower() == kind
    return found


def test_text_is_shown_as_it_is(tmp_path: Path) -> None:
    odd = '<img src=x> & "quoted" $a_b$ \udcff'
    text = page(odd, [section(odd, facts([(odd, odd)]), table((odd,), [(odd,)], ()), folded=True)])
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    found = read_page(tmp_path / "page.html")
    assert not found.pictures and found.text.count('<img src=x> & "quoted" $a_b$ \\udcff') == 7


@pytest.mark.parametrize("classes", [1, 3, 60])
def test_a_confusion_matrix_is_drawn_for_any_number_of_classes(classes: int) -> None:
    counts = torch.eye(classes, dtype=torch.int64)
    counts[0] = 0  # a class without pixels
    drawn = confusion_matrix(counts, [f"$class {c}$" for c in range(classes)])
    assert NO_MATPLOTLIB in drawn or drawn.count("data:image/svg+xml;base64,") == 1


def test_a_run_and_an_evaluation_have_a_report(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--recipe", str(recipe), "--epochs", "1", "--report", "true"]) == 0
    found = read_page(Path("runs/tiny/report.html"))
    for text in ("sky", "ground", "thing", "mIoU", "Worst images", "optim.lr", "torch"):
        assert text in found.text
    shown = 3  # validation images, all among the worst
    assert len(found.pictures) in (4 * shown, 4 * shown + 2)  # the two are matplotlib's
    shares = [float(share) for share in re.findall(r"([\d.]+) % right", found.text)]
    assert len(shares) == shown and shares == sorted(shares)
    checkpoint = ["--checkpoint", "runs/tiny/best.safetensors"]
    precision = ["--precision", "float32"]  # as in training, also where auto is another
    assert evaluate.main([*checkpoint, *precision, "--report", "scores.html"]) == 0
    again = read_page(Path("scores.html"))
    assert [float(s) for s in re.findall(r"([\d.]+) % right", again.text)] == shares
    assert evaluate.main([*checkpoint, "--report", "no/scores.html"]) == 2
    assert "--report no/scores.html: the folder no does not exist" in capsys.readouterr().err


def write_run(folder: Path, lr: float, miou: float | None) -> Path:
    folder.mkdir()
    config = {"recipe": "r", "optim": {"lr": lr, "epochs": 1}, "run": {"name": folder.name}}
    (folder / "config.json").write_text(json.dumps(config))
    records: list[dict[str, object]] = [{"kind": "start", "step": 0, "time": 5}]
    for step in (1, 2):
        record = {"kind": "train", "step": step, "loss": 2 - step / 2, "time": 10 * step}
        records.append(record | {"images_per_second": float(step)})
    if miou is not None:
        scores = {"epoch": 1, "miou": miou, "iou": {"sky": miou}}
        records.append({"kind": "val", "step": 2, "time": 22, **scores})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def test_runs_side_by_side(tmp_path: Path, capsys) -> None:
    runs = [str(write_run(tmp_path / "a", 0.1, 0.25)), str(write_run(tmp_path / "b", 0.2, None))]
    output = tmp_path / "compared.html"
    assert compare.main([*runs, "--output", str(output)]) == 0
    for text in (capsys.readouterr().out, read_page(output).text):
        for part in ("25.00", "0.1", "0.2", "optim.lr", "0:00:17", "1.5 (median)"):
            assert part in text
        assert "optim.epochs" not in text and "run.name" not in text
    assert compare.main([str(tmp_path)]) == 2
    assert "is not the folder of a run: config.json" in capsys.readouterr().err
    (tmp_path / "a" / "config.json").write_text("{")
    assert compare.main(runs) == 2
    assert "config.json is damaged" in capsys.readouterr().err


LOOK = """<script>addEventListener("load", () => {
document.querySelectorAll("details").forEach(one => one.open = true);
const images = [...document.images];
document.body.dataset.seen = JSON.stringify({
pictures: images.map(one => [one.naturalWidth, one.naturalHeight, one.width]),
wider: document.documentElement.scrollWidth - innerWidth});
console.log("looked");
})</script>"""


@pytest.mark.verify
def test_chromium_shows_every_picture_and_has_nothing_to_say(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the width of a telephone, where nothing is cut off."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("Chromium is not installed")
    monkeypatch.chdir(tmp_path)
    assert main(["--recipe", str(recipe), "--epochs", "1", "--report", "true"]) == 0
    report = Path("runs/tiny/report.html").read_text(encoding="utf-8")
    Path("looked.html").write_text(report.replace("</body>", LOOK + "</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800",
               f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
               "--virtual-time-budget=10000", "--dump-dom",
               f"file://{tmp_path}/looked.html"]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1 and "looked" in said[0], said
    seen = json.loads(html.unescape(re.search('data-seen="(.*?)"', shown.stdout)[1]))
    assert len(seen["pictures"]) == report.count("<img ") > 0
    assert all(size > 0 for picture in seen["pictures"] for size in picture)
    assert seen["wider"] <= 0
