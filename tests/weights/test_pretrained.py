"""Models as folders and on the Hub: the same network back, or one sentence."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from encnet_triton.models import CifarNet, EncNet, SegmentationModel, create_model
from encnet_triton.weights import CheckpointError, ModelInfo, load_model, save_model
from encnet_triton.weights.folder import CARD, CONFIG, WEIGHTS
from encnet_triton.weights.remote import _WHY
from tests.support.hub_client import HubInFolder, stand_in

OPTIONS = {"name": "encnet", "num_classes": 3, "backbone": "demo", "head_channels": 8}
SAID: dict[str, Any] = {
    "classes": ["sky", "a|b <i>", "wall"], "palette": [[0, 0, 0], [9, 8, 7], [255, 0, 0]],
    "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.2], "crop": [40, 48], "base_size": 60,
}  # fmt: skip
DATA = {
    "name": "folder", "root": "/home/me/data", "split": "val",
    "options": {"classes_file": "/home/me/names.txt", "label_offset": -1},
}  # fmt: skip


def logits(model: Any, size: int = 32) -> torch.Tensor:
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found = model(torch.randn(1, 3, size, size, generator=source))
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a network with running statistics of its own."""
    torch.manual_seed(0)
    model = create_model(**OPTIONS)
    model(torch.randn(2, 3, 32, 32))
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    save_model(path, model, ModelInfo(options=model.options, **SAID, data=DATA))
    return path


@pytest.fixture(scope="module")
def folder(checkpoint: Path) -> Path:
    """The same network as a folder, which tests copy before they change it."""
    place = checkpoint.with_name("shared")
    load_model(checkpoint)[0].save_pretrained(place)
    return place


def test_a_folder_gives_the_same_network(checkpoint: Path, folder: Path) -> None:
    model, info = load_model(checkpoint)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, CARD}
    for kind, source in ((EncNet, folder), (SegmentationModel, str(folder)), (EncNet, checkpoint)):
        loaded = kind.from_pretrained(source)
        assert type(loaded) is EncNet and not loaded.training
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert torch.equal(logits(loaded), logits(model))
    elsewhere = {**DATA, "root": None, "options": {"label_offset": -1}}
    assert EncNet.from_pretrained(folder).info == replace(info, data=elsewhere)
    assert load_model(folder)[1] == load_model(str(folder))[1]
    written = json.loads((folder / CONFIG).read_text())
    assert {name: written[name] for name in SAID} == SAID
    assert {name: written[name] for name in model.options} == model.options
    assert all("/home/me" not in (folder / name).read_text() for name in (CONFIG, CARD))


@pytest.mark.parametrize(
    "name",
    ["fcn", "cifar", *(pytest.param(n, marks=pytest.mark.verify) for n in ("psp", "deeplab"))],
)
def test_every_network_goes_through_a_folder(name: str, tmp_path: Path) -> None:
    if name == "cifar":
        model: Any = CifarNet(num_classes=3, width=4, num_codewords=4)
    else:
        model = create_model(**{**OPTIONS, "name": name})
    info = ModelInfo(options=model.options, **SAID)
    model.eval().save_pretrained(tmp_path, info=info)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and loaded.info == info
    cut = "resized to" if name == "cifar" else "cut into windows of"
    assert f"{cut} 40 x 48 pixels" in (tmp_path / CARD).read_text()
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == model.state_dict().keys()
    with pytest.raises(CheckpointError, match=rf"class {type(model).__name__}, not EncNet: "):
        EncNet.from_pretrained(tmp_path)


def test_a_trunk_of_timm_goes_through_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="the extra timm is not installed")
    model = create_model(**{**OPTIONS, "backbone": "timm:test_efficientnet"}).eval()
    model.save_pretrained(tmp_path, info=ModelInfo(options=model.options, **SAID))
    assert torch.equal(logits(EncNet.from_pretrained(tmp_path)), logits(model))
    assert "needs the package timm" in (tmp_path / CARD).read_text()


def test_half_precision_is_loaded_as_float32(checkpoint: Path, tmp_path: Path) -> None:
    model, _ = load_model(checkpoint)
    model.bfloat16().save_pretrained(tmp_path)
    kinds = {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()}
    assert kinds == {torch.bfloat16, torch.int64}
    assert torch.equal(logits(EncNet.from_pretrained(tmp_path)), logits(model.float()))


def copied(folder: Path, to: Path, **changes: Any) -> Path:
    """A folder whose configuration has other values; None takes a key out."""
    to.mkdir(parents=True)
    config = json.loads((folder / CONFIG).read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (to / CONFIG).write_text(json.dumps(kept))
    (to / WEIGHTS).symlink_to(folder / WEIGHTS)
    return to


def test_a_folder_that_does_not_fit_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "best.safetensors").touch()
    text = copied(folder, tmp_path / "text")
    (text / CONFIG).write_text("{")
    damaged = copied(folder, tmp_path / "damaged")
    (damaged / WEIGHTS).unlink()
    (damaged / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    fewer = copied(folder, tmp_path / "fewer")
    tensors = load_file(folder / WEIGHTS)
    del tensors["head.classifier.bias"]
    (fewer / WEIGHTS).unlink()
    save_file(tensors, fewer / WEIGHTS)
    cases = {
        tmp_path: f"holds no model: {CONFIG} is not there",
        run: r"config.json is not there; a run's is .*run/best.safetensors",
        tmp_path / "none" / "deep" / "er": "does not exist",
        text: "config.json is damaged",
        damaged: "cannot read .*damaged/model.safetensors",
        fewer: "does not fit the model: head.classifier.bias are not in the file",
        copied(folder, tmp_path / "key", colour=3): "encnet has no option 'colour'; its options",
        copied(folder, tmp_path / "value", form="x"): "form is 'x', but must be one of",
        copied(folder, tmp_path / "long", form="x" * 5000): r"form is 'x+ \.\.\.$",
        copied(folder, tmp_path / "missing", crop=None): "field 'crop' of its model is missing",
        copied(folder, tmp_path / "wrong", std=[1]): "field 'std' of its model is",
        copied(folder, tmp_path / "other", name="segformer"): "does not describe a network of enc",
        copied(folder, tmp_path / "size", num_classes=4): r"in the file and \(4,",
    }
    for place, sentence in cases.items():
        with pytest.raises(CheckpointError, match=sentence) as raised:
            EncNet.from_pretrained(place)
        assert len(str(raised.value).splitlines()) == 1 and len(str(raised.value)) < 1000


def test_what_users_must_know_is_asked_for(tmp_path: Path) -> None:
    model = create_model(**OPTIONS)
    with pytest.raises(ValueError, match="was built, not loaded: give info"):
        model.save_pretrained(tmp_path / "new")
    info = ModelInfo(options=model.options, **{**SAID, "classes": ["a"]})
    with pytest.raises(ValueError, match="info has 1 classes and 3 colours, but the network has 3"):
        model.save_pretrained(tmp_path / "new", info=info)
    assert not list(tmp_path.iterdir())


def metadata(card: str) -> dict[str, Any]:
    """The block above a card."""
    _, block, _ = card.split("---\n", 2)
    lines = (line.partition(": ") for line in block.splitlines())
    return {key: json.loads(value) for key, _, value in lines}


def test_the_card_says_what_is_known(folder: Path, tmp_path: Path) -> None:
    model, text = EncNet.from_pretrained(folder), (folder / CARD).read_text()
    about = metadata(text)
    assert about["license"] == "unknown" and about["pipeline_tag"] == "image-segmentation"
    assert "model-index" not in about and "datasets" not in about
    assert "## Scores" not in text and "## Recipe" not in text
    assert r"| 1 | a\|b &lt;i&gt; | #090807 |" in text
    assert 'EncNet.from_pretrained("shared")' in text and "40 x 48 pixels" in text
    assert "scaled to a short edge of 60 pixels" in text
    assert about["tags"] == ["pytorch", "semantic-segmentation", "encnet"]

    scores = {
        "dataset": "voc", "split": "val", "miou": 0.51234567, "pixel_accuracy": 0.9,
        "iou": {"sky": 0.5, "a|b <i>": None, "wall": 0.25}, "views": "windows of 40x48",
    }  # fmt: skip
    info = replace(model.info, data={**DATA, "name": "voc"})
    card = {"license": "cc-by-4.0", "scores": scores, "recipe": "[optim]\nlr = 0.1"}
    model.save_pretrained(tmp_path, info=info, **card)
    text = (tmp_path / CARD).read_text()
    about = metadata(text)
    assert about["license"] == "cc-by-4.0" and about["datasets"] == ["voc"]
    (index,) = about["model-index"]
    (result,) = index["results"]
    assert result["dataset"] == {"type": "voc", "name": "voc", "split": "val"}
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [
        ("mean_iou", 0.51235),
        ("accuracy", 0.9),
    ]
    for line in (
        "| mIoU | 51.23 % |", "On voc, val, windows of 40x48.", "| 0 | sky | #000000 | 50.00 |",
        r"| 1 | a\|b &lt;i&gt; | #090807 | absent |", "lr = 0.1",
    ):  # fmt: skip
        assert line in text.splitlines()

    (tmp_path / CARD).write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubInFolder:
    monkeypatch.chdir(tmp_path)
    return stand_in(tmp_path / "hub", monkeypatch)


def test_a_network_goes_to_the_hub_and_back(folder: Path, hub: HubInFolder) -> None:
    model = EncNet.from_pretrained(folder)
    address = model.push_to_hub("user/name", token="t", branch="dev", license="mit")
    assert address == "https://hub/user/name/commit/1"
    calls = {call: options for call, _, options in hub.calls}
    assert calls["HfApi"]["token"] == "t" and calls["create_repo"]["exist_ok"]
    assert calls["upload_folder"]["revision"] == "dev"
    place = hub.root / "user" / "name" / "commit"
    assert {path.name for path in place.iterdir()} == {WEIGHTS, CONFIG, CARD}
    assert '.from_pretrained("user/name")' in (place / CARD).read_text()
    assert metadata((place / CARD).read_text())["license"] == "mit"

    hub.calls.clear()
    loaded = EncNet.from_pretrained("user/name", revision="v1", cache_dir="c")
    with pytest.raises(TypeError, match="strict"):
        EncNet.from_pretrained("user/name", strict=False)
    assert torch.equal(logits(loaded), logits(model))
    (_, first, one), (_, second, other) = hub.calls
    assert (first, second) == (("user/name", CONFIG), ("user/name", WEIGHTS))
    assert one["revision"] == "v1" and one["cache_dir"] == other["cache_dir"] == "c"
    assert other["revision"] == "commit", "both files are of one commit"
    hub.calls.clear()
    assert load_model("hf://user/name@v1")[1] == loaded.info
    for named in ("user/name@v1", "hf://user/name@v1", "hf://user/name"):
        EncNet.from_pretrained(named, revision=None if "@" in named else "v1", token="t")
        assert hub.calls[-2][2]["token"] == hub.calls[-1][2]["token"] == "t"
    assert [options["revision"] for _, (_, file), options in hub.calls if file == CONFIG] == [
        "v1"
    ] * 4

    (place / CARD).write_text("mine")
    loaded.push_to_hub("user/name")
    assert (place / CARD).read_text() == "mine"
    hub.calls.clear()
    loaded.save_pretrained("user/name")  # a folder here
    assert EncNet.from_pretrained("user/name").info == loaded.info and not hub.calls


def test_private_weights_do_not_go_to_a_public_repository(folder: Path, hub: HubInFolder) -> None:
    model = EncNet.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="user/name is public already; nothing was uploaded"):
        model.push_to_hub("user/name", private=True)
    assert not hub.root.exists()
    hub.private = True
    model.push_to_hub("user/name", private=True)
    assert (hub.root / "user/name/commit" / WEIGHTS).exists()


def test_what_the_hub_refuses_is_one_sentence(folder: Path, hub: HubInFolder) -> None:
    with pytest.raises(
        CheckpointError, match="u/n is not here, and hf://u/n cannot be loaded: .* is not"
    ):
        EncNet.from_pretrained("u/n")
    with pytest.raises(CheckpointError, match="checkpoint name does not exist"):
        EncNet.from_pretrained("name")
    hub.calls.clear()
    model = EncNet.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="'name' is not the name .* give user/name"):
        model.push_to_hub("name")
    assert not hub.calls
    for name, sentence in {**_WHY, "OSError": "no route"}.items():
        below = type("HTTPError", (OSError,), {})
        hub.error = (
            type(name, (below,), {})("no route\nmore") if name in _WHY else OSError(sentence)
        )
        for act in (lambda: load_model("hf://u/n@v"), lambda: model.push_to_hub("u/n")):
            with pytest.raises(CheckpointError) as raised:
                act()
            assert str(raised.value).startswith("hf://u/n") and str(raised.value).endswith(sentence)


def test_without_the_package_a_folder_is_loaded_and_a_name_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = EncNet.from_pretrained(folder)
    needs = r"need huggingface_hub: pip install 'encnet-triton\[hub\]'"
    for act in (
        lambda: EncNet.from_pretrained("user/name"),
        lambda: load_model("hf://user/name"),
        lambda: model.push_to_hub("user/name"),
    ):
        with pytest.raises(CheckpointError, match=needs):
            act()


class TestWithThePackage:
    """Against huggingface_hub itself, without a network."""

    def test_its_mixin_reads_a_folder_and_writes_one_with_our_names(
        self, folder: Path, tmp_path: Path
    ) -> None:
        mixin = pytest.importorskip("huggingface_hub").PyTorchModelHubMixin
        kind = type("Theirs", (mixin, EncNet), {"__init__": EncNet.__init__})
        theirs = kind.from_pretrained(str(folder), strict=True).eval()  # of 1.0 and older too
        assert torch.equal(logits(theirs), logits(EncNet.from_pretrained(folder)))
        theirs.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG, CARD}
        ours, found = load_file(folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
        assert ours.keys() == found.keys()
        with pytest.raises(CheckpointError, match="does not describe a network"):
            EncNet.from_pretrained(tmp_path)

    def test_its_reader_of_cards_finds_the_scores(self, folder: Path, tmp_path: Path) -> None:
        card = pytest.importorskip("huggingface_hub").ModelCard
        scores = {"dataset": "voc", "split": "val", "miou": 0.5, "pixel_accuracy": 0.75}
        EncNet.from_pretrained(folder).save_pretrained(tmp_path / "é 1", scores=scores)
        found = card.load(tmp_path / "é 1" / CARD)
        assert found.data.license == "unknown" and found.data.library_name == "encnet-triton"
        assert found.data.model_name == "é 1"
        results = {one.metric_type: one.metric_value for one in found.data.eval_results}
        assert results == {"mean_iou": 0.5, "accuracy": 0.75}

    def test_it_takes_what_the_stand_in_was_given(self, folder: Path, hub: HubInFolder) -> None:
        model = EncNet.from_pretrained(folder)
        hub.private = True
        model.push_to_hub("user/name", private=True)
        EncNet.from_pretrained("user/name", token="t", force_download=True)
        del sys.modules["huggingface_hub"]
        package = pytest.importorskip("huggingface_hub")
        methods = {"create_repo", "model_info", "file_exists", "upload_folder"}
        assert {call for call, *_ in hub.calls} == {"hf_hub_download", "HfApi", *methods}
        for call, arguments, options in hub.calls:
            own = (None,) if call in methods else ()
            takes = inspect.signature(getattr(package.HfApi if own else package, call))
            try:
                bound = takes.bind(*own, *arguments, **options).arguments
            except TypeError as error:
                pytest.fail(f"{call}: {error}")
            assert options.keys() <= bound.keys() | bound.get("kwargs", {}).keys(), call

    def test_offline_is_one_sentence(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(package.constants, "HF_HUB_OFFLINE", True)
        for asked in ({}, {"local_files_only": True}):
            with pytest.raises(
                CheckpointError, match="not in the cache, .* HF_HUB_OFFLINE is set$"
            ):
                EncNet.from_pretrained("user/name", cache_dir=tmp_path, **asked)
