from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from encnet_triton.models import create_backbone, create_model
from encnet_triton.weights import load_backbone


def model() -> Any:
    return create_model("fcn", 5, backbone="demo", head_channels=16)


def published() -> dict[str, Tensor]:
    """A state dict as torchvision publishes them: with a classifier."""
    torch.manual_seed(3)
    state = create_backbone("demo").state_dict()
    return {**state, "fc.weight": torch.randn(1000, 128), "fc.bias": torch.randn(1000)}


def assert_loaded(network: Any, state: dict[str, Tensor]) -> None:
    own = network.backbone.state_dict()
    assert all(torch.equal(own[key], state[key]) for key in own)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(published(), path)
    return path


def test_pth_with_classifier(file: Path) -> None:
    network = model()
    load_backbone(network, file)
    assert_loaded(network, published())


def test_safetensors(tmp_path: Path) -> None:
    save_file(published(), tmp_path / "weights.safetensors")
    network = model()
    load_backbone(network, str(tmp_path / "weights.safetensors"))
    assert_loaded(network, published())


def test_backbone_by_itself(file: Path) -> None:
    backbone = create_backbone("demo")
    load_backbone(backbone, file)
    assert torch.equal(backbone.conv1.weight, published()["conv1.weight"])


def test_url_is_downloaded_into_torchs_cache(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    network = model()
    load_backbone(network, file.as_uri())
    assert_loaded(network, published())
    (cached,) = (tmp_path / "cache/hub/checkpoints").iterdir()
    assert cached.name.endswith("-weights.pth")


def test_urls_of_files_with_one_name_are_not_taken_for_each_other(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "other").mkdir()
    changed = {k: v + 1 if k == "bn1.weight" else v for k, v in published().items()}
    torch.save(changed, tmp_path / "other" / file.name)
    for url, state in ((file, published()), (tmp_path / "other" / file.name, changed)):
        network = model()
        load_backbone(network, url.as_uri())
        assert torch.equal(network.backbone.bn1.weight, state["bn1.weight"])


def test_url_whose_hash_is_wrong_is_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    hashed = file.rename(tmp_path / "resnet50-0676ba61.pth")
    with pytest.raises(ValueError, match=r"resnet50-0676ba61.pth.*invalid hash"):
        load_backbone(model(), hashed.as_uri())


def test_file_from_before_batches_were_counted(tmp_path: Path) -> None:
    state = {k: v for k, v in published().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pth")
    network = model()
    load_backbone(network, tmp_path / "old.pth")
    assert torch.equal(network.backbone.bn1.weight, state["bn1.weight"])
    assert network.backbone.bn1.num_batches_tracked == 0


def without(key: str) -> dict[str, Tensor]:
    return {k: v for k, v in published().items() if k != key}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without("layer2.0.bn1.weight"), "layer2.0.bn1.weight are not in the file"),
        ({**published(), "layer9.bias": torch.zeros(1)}, "layer9.bias in the file match nothing"),
        ({**published(), "bn1.bias": torch.zeros(7)}, r"bn1.bias is \(7,\) in the file and \(32,"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_misfit_names_the_key_and_changes_nothing(
    state: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "misfit.pth")
    network = model()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(ValueError, match=f"misfit.pth does not fit the backbone.*{message}"):
        load_backbone(network, tmp_path / "misfit.pth")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_unreadable_files_are_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent.pth"):
        load_backbone(model(), tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"weights.h5: weights must be"):
        load_backbone(model(), tmp_path / "weights.h5")
    with pytest.raises(ValueError, match=r"must end in one of .pth"):
        load_backbone(model(), "https://example.org/weights.safetensors")
    for name, content in (
        ("cut.pth", file.read_bytes()[:5000]),
        ("empty.pth", b""),
        ("cut.safetensors", b"\x10"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            load_backbone(model(), tmp_path / name)
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "run.pth")
    with pytest.raises(ValueError, match=r"run.pth holds something other"):
        load_backbone(model(), tmp_path / "run.pth")
