"""``encnet hub``: a run's checkpoint as a folder with a card, which other commands take."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from encnet_triton import evaluate, export, predict
from encnet_triton.files import write_json
from encnet_triton.models import EncNet
from encnet_triton.train import hub, run_state
from encnet_triton.train.recipe import build
from encnet_triton.train.segmentation import make_model, model_info
from encnet_triton.weights import CheckpointError, load_model
from encnet_triton.weights.checkpoint import save_model
from encnet_triton.weights.folder import CARD, CONFIG, WEIGHTS
from tests.conftest import CLASSES
from tests.support.hub_client import HubInFolder, stand_in

ROOT = Path(__file__).parents[2]
SCORES = {"miou": 0.5, "pixel_accuracy": 0.75, "iou": dict.fromkeys(CLASSES, 0.5)}


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Path:
    """The folder of a run as the trainer leaves it, with two validations."""
    from encnet_triton.data import Folder

    config = build(str(recipe), {"pretrained": ""})
    data = Folder(root=config.data.data, split="val")
    torch.manual_seed(0)
    model = make_model(config, len(data.classes))
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    write_json(config.as_dict(), folder / "config.json")
    records = [{"kind": "val", "step": 2, **SCORES}, {"kind": "val", "step": 4, "miou": 0.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    info = model_info(config, data, model)
    save_model(folder / run_state.BEST, model, info, step=2, miou=0.5)
    save_model(folder / run_state.LAST, model, info, progress={"step": 4})
    return folder


def said(capsys: pytest.CaptureFixture[str], arguments: list[Any], status: int = 0) -> str:
    assert hub.main([str(one) for one in arguments]) == status
    shown = capsys.readouterr()
    return shown.err if status else shown.out


def test_a_run_becomes_a_folder_that_other_commands_take(
    run: Path, folder_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, best = tmp_path / "shared", run / run_state.BEST
    out = said(capsys, [best, "--folder", place])
    assert f"wrote {place}: {WEIGHTS}, {CONFIG}, {CARD}" in out
    assert "no licence" in out and "no scores" not in out
    card = (place / CARD).read_text()
    assert "| mIoU | 50.00 % |" in card and "On folder, val, step 2." in card
    assert str(tmp_path) not in card + (place / CONFIG).read_text()

    (text,) = re.findall(r"^```toml\n(.*?)^```$", card, re.M | re.S)
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert "workers" not in text and "form" not in text and 'base_size = "none"' in text
    config = build(str(again), {"data": str(folder_data)})
    assert config.fingerprint() == build(str(tmp_path / "tiny.toml"), {}).fingerprint()

    photo = next((folder_data / "val").glob("*.jpg"))
    pictures = []
    for source in (best, place):
        output = tmp_path / f"of_{source.name}"
        given = ["--checkpoint", str(source), "--device", "cpu", "--output", str(output)]
        assert predict.main([*given, str(photo)]) == 0
        pictures.append((output / f"{photo.stem}_label.png").read_bytes())
    assert pictures[0] == pictures[1]
    scores = tmp_path / "scores.json"
    given = ["--checkpoint", str(place), "--device", "cpu", "--workers", "0"]
    assert evaluate.main([*given, "--json", str(scores)]) == 2
    assert "give its folder with --data" in capsys.readouterr().err
    assert evaluate.main([*given, "--data", str(folder_data), "--json", str(scores)]) == 0
    found = json.loads(scores.read_text())
    capsys.readouterr()

    (place / CARD).write_text("mine")
    assert "give --overwrite" in said(capsys, [best, "--folder", place], 2)
    out = said(capsys, [best, "--folder", place, "--overwrite", "--scores", scores])
    assert f"| mIoU | {100 * found['miou']:.2f} % |" in (place / CARD).read_text()


def test_only_the_validation_of_these_weights_is_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, shown in ((run_state.BEST, "50.00"), (run_state.LAST, "25.00")):
        said(capsys, [run / name, "--folder", tmp_path / name])
        assert f"| mIoU | {shown} % |" in (tmp_path / name / CARD).read_text()
    saved = json.loads((run / "config.json").read_text())
    saved["optim"]["ema"] = 0.9
    write_json(saved, run / "config.json")
    out = said(capsys, [run / run_state.LAST, "--folder", tmp_path / "averaged"])
    assert "no scores" in out and "ema = 0.9" in (tmp_path / "averaged" / CARD).read_text()
    alone = shutil.copy(run / run_state.BEST, tmp_path / "alone.safetensors")
    assert "no scores" in said(capsys, [alone, "--folder", tmp_path / "of_alone"])
    assert "## Recipe" not in (tmp_path / "of_alone" / CARD).read_text()
    (run / "config.json").write_text('{"recipe": "of another version"}')
    assert "no scores" in said(capsys, [run / run_state.BEST, "--folder", tmp_path / "old"])


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubInFolder:
    monkeypatch.chdir(tmp_path)
    return stand_in(tmp_path / "hub", monkeypatch)


def test_a_run_is_uploaded_and_used_by_name(
    run: Path, there: HubInFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, there.private = run / run_state.BEST, True
    out = said(capsys, [best, "--repo", "user/name", "--private", "--license", "mit"])
    assert "uploaded to hf://user/name: https://hub/user/name/commit/1" in out
    assert not list(tmp_path.glob("*/" + WEIGHTS))
    (created,) = (options for call, _, options in there.calls if call == "create_repo")
    assert created["private"]
    expected, info = load_model(best)
    found, about = load_model("hf://user/name")
    assert about.classes == info.classes and 'license: "mit"' in uploaded(there)

    model = make_model(build(str(tmp_path / "tiny.toml"), {}), 3)
    assert run_state.initialise("hf://user/name", model, 3, False) == []
    for one in (found, model):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="hf://user/name was trained for 3 classes"):
        run_state.initialise("hf://user/name", model, 4, False)

    # What the card and the document say, as it stands there.
    photo = next((tmp_path / "data" / "val").glob("*.jpg"))
    shutil.copy(photo, "photo.jpg")
    document = (ROOT / "docs" / "hub.md").read_text()
    for text in (uploaded(there), document):
        names: dict[str, Any] = {}
        (snippet,) = re.findall(r"^```py(?:thon)?\n(.*?)^```$", text, re.M | re.S)
        exec(snippet, names)
        assert names["labels"].shape == (64, 64) and names["labels"].max() < 3
    assert {path.name for path in Path("copy").iterdir()} == {WEIGHTS, CONFIG, CARD}
    assert (there.root / "user" / "other" / "commit" / WEIGHTS).exists()

    # A folder goes as it is, with the card that its owner has written.
    said(capsys, [best, "--folder", "shared"])
    Path("shared", CARD).write_text("mine")
    said(capsys, ["shared", "--repo", "user/name"])
    assert uploaded(there) != "mine"
    said(capsys, ["shared", "--repo", "user/name", "--overwrite"])
    assert uploaded(there) == "mine"


def uploaded(there: HubInFolder) -> str:
    return (there.root / "user/name/commit" / CARD).read_text()


def test_what_cannot_be_shared_is_one_sentence(
    run: Path, there: HubInFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / run_state.BEST
    EncNet.from_pretrained(best).save_pretrained("shared")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "text.json").write_text('{"miou": 0.5, "iou": {"sky": "0.5"}}')
    there.error = OSError("no route")
    cases = {
        (best,): "give --folder DIR, --repo user/name, or both",
        (best, "--folder", tmp_path / "shared"): "holds a model: give --overwrite",
        (best, "--folder", best): "cannot be made",
        (best, "--folder", "new", "--scores", "empty.json"): "holds no scores",
        (best, "--folder", "new", "--scores", "text.json"): "holds no scores",
        (best, "--folder", "new", "--scores", "none.json"): "none.json does not exist",
        ("shared", "--folder", "new"): "--folder is for a checkpoint; shared is a folder",
        ("shared", "--repo", "u/n", "--license", "mit"): "--license is for a checkpoint",
        (run, "--repo", "u/n"): f"a run's is {run}/best.safetensors",
        (best, "--repo", "u/n"): "hf://u/n cannot be written to: no route",
        ("none", "--folder", "new"): "checkpoint none does not exist",
        ("hf://u/n", "--folder", "new"): "hf://u/n cannot be loaded: no route",
    }
    for arguments, sentence in cases.items():
        (line,) = said(capsys, list(arguments), 2).splitlines()
        assert line.startswith("error: ") and sentence in line
    assert not Path("new").exists() and not there.root.exists()


def test_a_network_on_the_hub_is_exported_into_this_folder() -> None:
    beside = export._beside
    assert beside(Path("runs/best.safetensors"), "onnx") == Path("runs/best.onnx")
    assert beside("hf://user/name@v1.0", "pt2") == Path("name.pt2")
