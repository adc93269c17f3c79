"""Checkpoints of other projects give the same logits here, and nothing is left out unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from encnet_triton.convert import main
from encnet_triton.models import create_backbone, create_model
from encnet_triton.weights import load_peer
from encnet_triton.weights.checkpoint import load_model
from encnet_triton.weights.peers import peer_in
from encnet_triton.weights.reading import read_tensors
from tests.support import restated

CASES = {
    "PyTorch-Encoding R50s lateral": lambda: restated.PyTorchEncodingEncNet(59, "deep", True),
    "PyTorch-Encoding R50s": lambda: restated.PyTorchEncodingEncNet(150, "deep", False),
    "PyTorch-Encoding FCN R50": lambda: restated.PyTorchEncodingFCN(59, "plain", False),
    "mmsegmentation EncNet V1c": lambda: restated.MMSegEncNet(150, "v1c"),
    "mmsegmentation EncNet deep stem": lambda: restated.MMSegEncNet(19, "deep"),
    "mmsegmentation FCN": lambda: restated.MMSegFCN(21),
}


# The others have the parts of these.
_VERIFIED = ("PyTorch-Encoding R50s", "mmsegmentation EncNet V1c")


@torch.no_grad()
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.verify] * (case in _VERIFIED)) for case in CASES],
)
def test_converted_logits_equal_the_originals(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = restated.settled(CASES[case]())
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "in.pth")
    ours, _ = load_peer(tmp_path / "in.pth")
    ours.double(), theirs.double()
    x = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    logits, se = theirs(x)
    output = ours(x)
    mine = F.interpolate(
        output.logits, x.shape[2:], mode="bilinear", align_corners=ours.align_corners
    )
    scale = logits.abs().max()
    assert scale > 0.1
    assert (mine - logits).abs().max() < 1e-9 * scale
    if se is not None:
        assert (output.se[0] - se).abs().max() < 1e-9 * se.abs().max()


@pytest.mark.parametrize(
    ("build", "keys", "parameters"),
    [
        (lambda: restated.PyTorchEncodingEncNet(59, "deep", False), 363, 36.05e6),
        (lambda: restated.PyTorchEncodingEncNet(150, "deep", False), 363, 36.16e6),
        (lambda: restated.PyTorchEncodingEncNet(59, "plain", False), 351, 35.92e6),
        (lambda: restated.PyTorchEncodingFCN(59, "deep", True), 346, 35.48e6),
        (lambda: restated.PyTorchEncodingFCN(59, "plain", True), 334, 35.35e6),
    ],
)
def test_restated_networks_have_the_published_sizes(build, keys, parameters) -> None:
    # Otherwise equal logits would say little.
    with torch.device("meta"):
        model = build()
    assert len(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-4)


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    """The state dict of an FCN of PyTorch-Encoding."""
    return dict(restated.PyTorchEncodingFCN(21, "plain", False).state_dict())


def refused(tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(ValueError) as error:
        peer_in(tensors, "in.pth")
    return str(error.value)


def test_every_key_is_used_or_named(small: dict[str, torch.Tensor]) -> None:
    extra = {**small, "head.surprise.weight": torch.zeros(3)}
    assert "head.surprise.weight of PyTorch-Encoding have no place" in refused(extra)
    deep = {**small, "pretrained.layer4.2.conv9.weight": torch.zeros(3)}
    assert "pretrained.layer4.2.conv9.weight in the file match nothing" in refused(deep)
    lacking = {k: t for k, t in small.items() if k != "head.conv5.1.running_mean"}
    assert "head.convs.0.bn.running_mean are not in the file" in refused(lacking)
    other = {**small, "head.conv5.1.weight": torch.zeros(7)}
    assert "head.conv5.1.weight is (7,)" in refused(other)
    shallow = {k: t for k, t in small.items() if not k.startswith("pretrained.layer4.2")}
    assert "depths (3, 4, 6, 2)" in refused(shallow)
    assert "is not a checkpoint of" in refused({"weight": torch.zeros(2)})


def test_the_classifier_that_early_files_keep_is_left_out(small: dict[str, torch.Tensor]) -> None:
    fc = {"pretrained.fc.weight": torch.zeros(1000, 2048), "pretrained.fc.bias": torch.zeros(1000)}
    model, _ = peer_in({**small, **fc}, "in.pth")
    assert not any(".fc." in name for name in model.state_dict())


def test_the_layer_that_normalised_over_pixels_is_refused() -> None:
    early = {
        "pretrained.conv1.weight": torch.zeros(64, 3, 7, 7),
        "head.encmodule.encoding.0.codewords": torch.zeros(32, 512),
    }
    assert "normalised over the pixels" in refused(early)


def test_command_writes_a_checkpoint_that_others_load(
    small: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    # As DataParallel saves it.
    torch.save({f"module.{k}": t for k, t in small.items()}, tmp_path / "in.pth")
    output = tmp_path / "out.safetensors"
    assert main([str(tmp_path / "in.pth"), str(output), "--dataset", "voc"]) == 0
    model, info = load_model(output)
    assert info.classes[15] == "person" and info.scale_by == "long"
    found = model.state_dict()["head.convs.0.conv.weight"]
    assert torch.equal(found, small["head.conv5.0.weight"])

    exported = tmp_path / "backbone.safetensors"
    assert main([str(output), str(exported), "--export-backbone"]) == 0
    kept = output.read_bytes()
    assert main([str(output), str(output), "--export-backbone"]) == 2  # it would lose the head
    assert output.read_bytes() == kept
    prefix = "pretrained."
    trunk = {k.removeprefix(prefix): t for k, t in small.items() if k.startswith(prefix)}
    back = read_tensors(str(exported))
    assert back.keys() == trunk.keys()
    assert all(torch.equal(back[k], trunk[k]) for k in trunk)

    # A torchvision file is such a backbone with a classifier.
    torch.save({**trunk, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)},
               tmp_path / "resnet50.pth")  # fmt: skip
    again = tmp_path / "again.safetensors"
    assert main([str(tmp_path / "resnet50.pth"), str(again)]) == 0
    assert read_tensors(str(again)).keys() == trunk.keys()


def test_command_errors_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none.pth"), str(tmp_path / "out.safetensors")]) == 2
    assert main([str(tmp_path / "none.pth"), str(tmp_path / "out.pth")]) == 2
    torch.save(create_backbone("demo").state_dict(), tmp_path / "in.pth")
    assert main([str(tmp_path / "in.pth"), str(tmp_path / "absent" / "out.safetensors")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "no weights at" in said[0] and "must be a .safetensors" in said[1]
    assert "out.safetensors: the folder" in said[2] and "does not exist" in said[2]


@pytest.mark.parametrize("form", [pytest.param("paper", marks=pytest.mark.verify), "released"])
def test_the_inference_network_can_be_exported(form: str) -> None:
    model: nn.Module = create_model("encnet", 5, backbone="demo", form=form, head_channels=16)
    model.double().eval()
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    other = torch.randn(3, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        expected, found = model(other), program.module()(other)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.se[0], expected.se[0])
