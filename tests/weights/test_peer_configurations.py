"""What mmsegmentation stores beside the weights decides which network they are, or is refused."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from encnet_triton.convert import main
from encnet_triton.models import BACKBONES
from encnet_triton.weights import load_model, load_peer
from encnet_triton.weights.mmseg_config import parse_config
from tests.support import restated

PSP = "PSPHead', in_channels=128, in_index=3, channels=32, pool_scales=(1, 2, 3, 6"
ASPP = "ASPPHead', in_channels=128, in_index=3, channels=32, dilations=({rates}"
CONFIG = """
crop_size = (512, 1024)
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[51, 102, 153], std=[25.5, 51, 51], bgr_to_rgb=True),
    backbone=dict(type='{trunk}', depth=18, dilations={dilations}, strides={strides},
        norm_cfg=norm_cfg, style='pytorch', contract_dilation=True),
    decode_head=dict(type='{head}), num_classes=5, norm_cfg=norm_cfg, align_corners={corners}),
    test_cfg=dict(mode='whole'))
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(keep_ratio=True, scale=(2048, 1024), type='Resize')]
train_pipeline = [dict(type='RandomResize', scale=(640, 320), ratio_range=(0.5, 2.0))]
"""


def config(head: str, stride: int = 8, corners: bool = False, trunk: str = "ResNetV1c") -> str:
    strides, dilations = restated.LAYOUTS[stride]
    return CONFIG.format(
        head=head, trunk=trunk, dilations=dilations, strides=strides, corners=corners
    )


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(
        model(x).logits, x.shape[2:], mode="bilinear", align_corners=model.align_corners
    )


CASES: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "mmsegmentation PSP": (
        lambda: restated.MMSegPSP(5), config(PSP),
    ),
    "mmsegmentation PSP of stride 16, corners aligned": (
        lambda: restated.MMSegPSP(5, 16, True), config(PSP, 16, True),
    ),
    "mmsegmentation DeepLab": (
        lambda: restated.MMSegDeepLab(5),
        config(ASPP.format(rates="1, 12, 24, 36"), trunk="ResNet"),
    ),
    "mmsegmentation DeepLab of stride 16": (
        lambda: restated.MMSegDeepLab(5, 16),
        config(ASPP.format(rates="1, 6, 12, 18"), 16, trunk="ResNet"),
    ),
    "PyTorch-Encoding PSP": (lambda: restated.PyTorchEncodingPSP(5), None),
    "PyTorch-Encoding DeepLab": (lambda: restated.PyTorchEncodingDeepLab(5), None),
    "torchvision FCN": (lambda: restated.TorchvisionFCN(5), None),
    "torchvision DeepLab": (lambda: restated.TorchvisionDeepLab(5), None),
}  # fmt: skip


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-18 with the channels of the restated one."""
    for name in ("resnet18", "resnet18b", "resnet18c"):
        widths = tuple(restated.WIDTH * 2**i for i in range(4))
        monkeypatch.setitem(BACKBONES, name, replace(BACKBONES[name], widths=widths))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_converted_logits_equal_the_originals(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, text = CASES[case]
    theirs = restated.settled(build())
    torch.save({"state_dict": theirs.state_dict(), "meta": {"cfg": text}}, tmp_path / "in.pth")
    ours, _ = load_peer(tmp_path / "in.pth")
    ours.double(), theirs.double()
    x = torch.randn(1, 3, 72, 105, dtype=torch.float64)
    expected = theirs(x)
    scale = expected.abs().max()
    assert scale > 0.1
    assert (logits(ours, x) - expected).abs().max() < 1e-9 * scale


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(restated.MMSegPSP(5).state_dict())


def save(path: Path, weights: dict[str, torch.Tensor], text: Any) -> Path:
    torch.save({"state_dict": weights, "meta": {"cfg": text}}, path)
    return path


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("ResNetV1c", "ResNeSt", "its backbone is a ResNeSt"),
        ("ResNetV1c", "ResNeXt", "its backbone is a ResNeXt"),
        ("PSPHead", "FCNHead', dilation=6, in_index=3, x='", "FCN-D6"),
        ("PSPHead", "DAHead", "its head is a DAHead"),
        ("EncoderDecoder", "CascadeEncoderDecoder", "it is a CascadeEncoderDecoder"),
        ("(1, 1, 2, 4)", "(1, 1, 2, 2)", "dilations .1, 1, 2, 2."),
        ("contract_dilation=True", "contract_dilation=False", "is dilated in full"),
        ("contract_dilation=True", "contract_dilation=True, multi_grid=(1, 2, 4)", "multi-grid"),
        ("'pytorch'", "'caffe'", "of the style caffe"),
        ("pool_scales=(1, 2, 3, 6", "pool_scales=(1, 2, 4, 8", "grids .1, 2, 4, 8."),
        ("in_index=3", "in_index=2", "stands on the features 2"),
        ("'SyncBN'", "'GN'", "has the normalisation GN"),
        ("'SyncBN'", "'SyncBN', eps=0.001", "normalises with eps 0.001"),
        ("align_corners=False", "align_corners=torch.no", "aligns corners is not known"),
        ("bgr_to_rgb=True", "bgr_to_rgb=False", "in the order blue, green, red"),
        ("mean=[51, 102, 153]", "mean=[]", "normalised by"),
        ("mean=[51, 102, 153]", "mean=[3.0]", "normalised by"),
        ("model = ", "another = ", "describes no model"),
        ("model = ", "model = = ", "cannot be read"),
    ],
    ids=lambda text: text if text.isalnum() else None,
)
def test_another_network_is_refused_by_its_name(
    old: str, new: str, named: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    text = config(PSP)
    assert old in text
    path = save(tmp_path / "in.pth", weights, text.replace(old, new))
    with pytest.raises(ValueError, match=rf"in\.pth.*{named}") as error:
        load_peer(path)
    assert "\n" not in str(error.value)


def test_the_configuration_tells_how_images_are_cut_scaled_and_normalised(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path, output = save(tmp_path / "in.pth", weights, config(PSP)), tmp_path / "out.safetensors"
    assert main([str(path), str(output)]) == 0
    info = load_model(output)[1]
    assert (info.crop, info.base_size, info.scale_by) == ([512, 1024], 1024, "short")
    assert info.mean == [0.2, 0.4, 0.6] and info.std == [0.1, 0.2, 0.2]
    assert main([str(path), str(output), "--crop", "64x96", "--base-size", "80"]) == 0
    info = load_model(output)[1]
    assert (info.crop, info.base_size) == ([64, 96], 80)


@pytest.mark.parametrize(
    ("build", "crop", "base_size", "scale_by"),
    [
        (lambda: restated.MMSegPSP(19), [512, 1024], 1024, "short"),
        (lambda: restated.PyTorchEncodingPSP(19), [768, 768], 2048, "long"),
    ],
    ids=["mmsegmentation", "PyTorch-Encoding"],
)
def test_street_scenes_have_crops_and_scales_of_their_own(
    build: Callable[[], nn.Module], crop: list[int], base_size: int, scale_by: str, tmp_path: Path
) -> None:
    torch.save(build().state_dict(), tmp_path / "in.pth")
    output = tmp_path / "out.safetensors"
    assert main([str(tmp_path / "in.pth"), str(output), "--dataset", "cityscapes"]) == 0
    info = load_model(output)[1]
    assert (info.crop, info.base_size, info.scale_by) == (crop, base_size, scale_by)
    assert info.classes[0] == "road"


def test_classes_and_colours_are_those_in_the_file(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    colours = np.arange(15).reshape(5, 3)
    meta = {"cfg": config(PSP), "dataset_meta": {"classes": tuple("abcde"), "palette": colours}}
    torch.save({"state_dict": weights, "meta": meta}, tmp_path / "in.pth")
    assert main([str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]) == 0
    info = load_model(tmp_path / "out.safetensors")[1]
    assert info.classes == list("abcde") and info.palette == colours.tolist()


def test_without_a_configuration_what_is_assumed_is_said_and_another_can_be_given(
    weights: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": weights}, tmp_path / "in.pth")
    command = [str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]
    assert main(command) == 0
    assert "this is assumed: output stride 8, align_corners=False" in capsys.readouterr().out
    (tmp_path / "config.py").write_text(config(PSP, 16, corners=True))
    assert main([*command, "--config", str(tmp_path / "config.py")]) == 0
    assert "assumed" not in capsys.readouterr().out
    model, _ = load_model(tmp_path / "out.safetensors")
    assert model.output_stride == 16 and model.align_corners


class ConfigDict(dict[str, Any]):
    """Stores itself as the one of MMEngine."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return ConfigDict, (dict(self),)


class Config:
    """The same."""

    def __init__(self, content: ConfigDict) -> None:
        self.content = content

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copyreg.__newobj__, (Config,), (self.content, None, "", {}, True)  # type: ignore[attr-defined]

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("this is not to run")


@pytest.mark.parametrize("wrap", [ConfigDict, lambda content: Config(ConfigDict(content))])
def test_a_configuration_may_be_an_object(
    wrap: Callable[[Any], Any], weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    content = parse_config(config(PSP, 16, corners=True), "in.pth")
    content["model"] = ConfigDict(content["model"])
    model, peer = load_peer(save(tmp_path / "in.pth", weights, wrap(content)))
    assert model.output_stride == 16 and model.align_corners
    assert peer.described is not None and peer.described.image["crop"] == [512, 1024]


@pytest.mark.parametrize("value", [3, Path("config.py"), ["model"]], ids=["3", "path", "list"])
def test_a_configuration_that_cannot_be_read_is_refused(
    value: Any, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="configuration of mmsegmentation in it cannot be read"):
        load_peer(save(tmp_path / "in.pth", weights, value))


def test_files_that_go_on_from_one_another_are_merged() -> None:
    text = """/configs/_base_/fcn.py
model = dict(head=dict(type='FCNHead', align_corners=False), size=-3)
configs/fcn_769.py
_base_ = ['../_base_/fcn.py']
half = 1.5
model = dict(head=dict(align_corners=True), other={'a': [half, unknown()]})
"""
    found = parse_config(text, "in.pth")["model"]
    assert found["head"] == {"type": "FCNHead", "align_corners": True} and found["size"] == -3
    assert found["other"]["a"][0] == 1.5


def test_nothing_in_a_configuration_runs(tmp_path: Path) -> None:
    text = f"model = dict(a=__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch())"
    assert "a" in parse_config(text, "in.pth")["model"]
    assert not (tmp_path / "ran").exists()
