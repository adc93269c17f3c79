"""Model files: round trip, strictness, and that a failed save leaves the previous file whole."""

from __future__ import annotations

import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from encnet_triton import evaluate
from encnet_triton.models import CifarNet, create_model
from encnet_triton.weights import export_backbone
from encnet_triton.weights.checkpoint import CheckpointError, ModelInfo, load_model, save_model


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made = create_model("encnet", 3, backbone="demo", head_channels=32, num_codewords=4)
    return made.to(memory_format=torch.channels_last)


@pytest.fixture
def info(model: torch.nn.Module) -> ModelInfo:
    return ModelInfo(
        options=dict(model.options),
        classes=["a", "b", "c"],
        palette=[[0, 0, 0], [255, 0, 0], [0, 255, 0]],
        mean=[0.5, 0.5, 0.5],
        std=[0.25, 0.25, 0.25],
        crop=[64, 64],
    )


def test_a_file_alone_rebuilds_the_model(tmp_path: Path, model, info: ModelInfo) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, model, info, step=3)
    loaded, found = load_model(path)
    assert found == info
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).logits, model.eval()(x).logits, rtol=0, atol=0)
    assert not list(tmp_path.glob(".*")), "temporary files are removed"


def test_a_classifier_is_rebuilt_too_and_has_no_backbone(tmp_path: Path, info: ModelInfo) -> None:
    classifier = CifarNet("encoding", width=16, num_codewords=4).eval()
    about = replace(info, options={"unit": "encoding", "width": 16, "num_codewords": 4})
    path = tmp_path / "model.safetensors"
    save_model(path, classifier, about)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)[0](x), classifier(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"model\.safetensors holds a classifier"):
        export_backbone(path, tmp_path / "backbone.safetensors")


def test_a_model_of_no_data_set_is_not_scored_on_one(tmp_path: Path, model, info, capsys) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, model, replace(info, data={}))
    assert load_model(path)[1] == info
    assert evaluate.main(["--checkpoint", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, model, info: ModelInfo
) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, model, info)
    before = path.read_bytes()
    # Writing past the limit then fails like a full disk.
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=f"cannot save {path}") as failure:
            save_model(path, model, info)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    assert "the previous model.safetensors is untouched" in str(failure.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_damaged_and_foreign_files_are_named(tmp_path: Path, model, info: ModelInfo) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="model.safetensors does not exist"):
        load_model(path)
    save_model(path, model, info)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot read checkpoint .*model.safetensors"):
        load_model(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is not an encnet-triton checkpoint"):
        load_model(path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, model, info: ModelInfo) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, model, replace(info, options={**info.options, "num_classes": 4}))
    with pytest.raises(CheckpointError, match=r"is \(3,.*\) in the file and \(4,.*\) in"):
        load_model(path)
    save_model(path, model, replace(info, options={**info.options, "se_stage3": False}))
    with pytest.raises(CheckpointError, match="stage3.* in the file match nothing$"):
        load_model(path)
