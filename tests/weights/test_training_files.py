"""Files as trainers write them: their state dict is found, and nothing in them runs."""

from __future__ import annotations

import argparse
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from encnet_triton.models import create_backbone
from encnet_triton.weights import load_backbone
from encnet_triton.weights.backbone import backbone_name, trunk_of
from encnet_triton.weights.reading import read_document, read_tensors, state_dict_of
from encnet_triton.weights.torch_file import read_torch_file


def state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"layer.weight": torch.randn(3, 4), "layer.bias": torch.randn(3)}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in expected
    )


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Objects beside the weights, of a module that is not there when the file is read."""
    module = types.ModuleType("mmengine_like")
    monkeypatch.setitem(sys.modules, "mmengine_like", module)
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": "mmengine_like"})
    history = module.HistoryBuffer()
    history.log = np.array([1.0, 2.0])
    return {
        "best_pred": np.float64(0.61),
        "scores": np.arange(6, dtype=np.float32).reshape(2, 3),
        "message_hub": {"log_scalars": OrderedDict(loss=history)},
        "args": argparse.Namespace(lr=0.1),
        "where": Path("runs"),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
    }


FORMS: dict[str, dict[str, Any]] = {
    "zip": {},
    "before torch 1.6": {"_use_new_zipfile_serialization": False},
    "protocol 4": {"pickle_protocol": 4},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["checkpoint.pth.tar", "last.ckpt", "model.bin"])
def test_objects_beside_the_weights_are_left_alone(
    form: str, name: str, strangers: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    torch.save({"epoch": 3, **strangers, "state_dict": state()}, tmp_path / name, **FORMS[form])
    monkeypatch.delitem(sys.modules, "mmengine_like")
    document = read_document(str(tmp_path / name))
    assert equal(state_dict_of(document, name), state())
    assert document["best_pred"] == 0.61 and document["scores"][1, 2] == 5
    assert repr(document["args"]) == "<argparse.Namespace>"


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_every_kind_come_back(form: str, tmp_path: Path) -> None:
    shared = torch.randn(6, 5)
    tensors = {
        "view": shared.t()[1:, ::2],
        "shared": shared,
        "parameter": nn.Parameter(torch.randn(2)),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "bool": torch.tensor([True, False]),
    }
    torch.save(tensors, tmp_path / "in.pth", **FORMS[form])
    assert equal(read_tensors(str(tmp_path / "in.pth")), tensors)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state().items()}


@pytest.mark.parametrize(
    "document",
    [
        state(),
        {"state_dict": state()},
        {"model": state(), "epoch": 2, "ema": {}},
        {"model_state_dict": state(), "best": torch.tensor(0.5)},
        {"model": {"state_dict": prefixed("module.")}},
        {"state_dict": prefixed("module.model.")},
        {"state_dict": prefixed("_orig_mod.module.")},
        {"state_dict": {"layer._orig_mod." + k[6:]: t for k, t in state().items()}},
    ],
)
def test_wrappers_and_prefixes_are_taken_off(document: Any) -> None:
    assert equal(state_dict_of(document, "in.pth"), state())


@pytest.mark.parametrize(
    "document",
    [
        {"state_dict": {}, "state_dict_ema": state()},
        {"model": {}, "model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.")}},
        # MMEngine stores the average as the state dict itself, and the weights in its place.
        {"state_dict": state(), "ema_state_dict": {"steps": torch.tensor(1)}, "message_hub": {}},
        {
            "state_dict": {
                **{key: torch.zeros_like(tensor) for key, tensor in state().items()},
                **{"ema_" + key.replace(".", "_"): tensor for key, tensor in state().items()},
            }
        },
    ],
    ids=["timm", "torchvision", "MMEngine", "MMCV"],
)
def test_the_moving_average_is_taken_on_request(document: Any) -> None:
    assert equal(state_dict_of(document, "in.pth", average=True), state())


def test_without_a_moving_average_the_request_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"in\.pth has no moving average"):
        state_dict_of({"state_dict": state()}, "in.pth", average=True)


class Opens:
    """Would make a file if it were loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_what_a_pickle_calls_is_not_called_and_no_advice_is_given(tmp_path: Path) -> None:
    torch.save(Opens(tmp_path / "ran"), tmp_path / "in.pth")
    with pytest.raises(ValueError, match=r"holds an object of the class .*open") as error:
        read_tensors(str(tmp_path / "in.pth"))
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(error.value) and "\x1b" not in str(error.value)


def test_other_files_are_refused_with_a_sentence(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "network.pth")
    with pytest.raises(ValueError, match="object of the class torch.nn.modules.linear.Linear"):
        read_tensors(str(tmp_path / "network.pth"))
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", pickle.dumps({}))
        archive.writestr("script/constants.pkl", pickle.dumps({}))
    with pytest.raises(ValueError, match="TorchScript program"):
        read_tensors(str(tmp_path / "script.pt"))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"not a file of torch\.save"):
        read_tensors(str(tmp_path / "plain.pth"))
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("notes.txt", "nothing")
    with pytest.raises(ValueError, match="ZIP archive of something other"):
        read_tensors(str(tmp_path / "other.pth"))
    torch.save({"a": torch.zeros(2), "b": "text"}, tmp_path / "mixed.pth")
    with pytest.raises(ValueError, match="other than a state dict of tensors: b is a str"):
        read_tensors(str(tmp_path / "mixed.pth"))


def test_a_flipped_bit_in_the_weights_is_found(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "in.pth")
    content = bytearray((tmp_path / "in.pth").read_bytes())
    at = content.index(state()["layer.weight"].numpy().tobytes())
    content[at + 2] ^= 4
    (tmp_path / "in.pth").write_bytes(content)
    with pytest.raises(ValueError, match="it is damaged: Bad CRC-32"):
        read_torch_file(tmp_path / "in.pth")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_compression_byte_is_found(method: int, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "in.pth")
    content = bytearray((tmp_path / "in.pth").read_bytes())
    for signature, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        place = content.find(signature)
        while place >= 0:
            content[place + at] = method
            place = content.find(signature, place + 1)
    (tmp_path / "in.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"in\.pth is damaged"):
        read_document(str(tmp_path / "in.pth"))


TRUNKS = {
    "torchvision": lambda trunk: {**trunk, "fc.weight": torch.zeros(10, 128)},
    "DataParallel": lambda trunk: {"module." + key: tensor for key, tensor in trunk.items()},
    "MMClassification": lambda trunk: {
        **{"backbone." + key: tensor for key, tensor in trunk.items()},
        "head.fc.weight": torch.zeros(10, 128),
    },
    "OpenMMLab's stem": lambda trunk: {
        key.replace("bn1.", "stem.7.", 1) if key.startswith("bn1.")
        else key.replace("conv1.", "stem.", 1) if key.startswith("conv1.") else key: tensor
        for key, tensor in trunk.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("origin", TRUNKS)
def test_trunks_of_others_load(origin: str, tmp_path: Path) -> None:
    trunk = create_backbone("small")
    torch.save({"state_dict": TRUNKS[origin](trunk.state_dict())}, tmp_path / "in.pth")
    other = create_backbone("small")
    load_backbone(other, tmp_path / "in.pth")
    assert equal(other.state_dict(), trunk.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "resnet18c", "resnet50", "resnet50c", "resnet50d"])
def test_a_trunk_is_known_by_its_stem_and_shortcuts(name: str) -> None:
    with torch.device("meta"):
        tensors = create_backbone(name).state_dict()
    assert backbone_name(trunk_of(tensors), "in.pth") == name


@pytest.mark.parametrize(
    ("key", "shape", "family"),
    [
        ("layer1.0.conv2.weight", (128, 4, 3, 3), "ResNeXt"),
        ("layer1.0.conv2.weight", (128, 128, 3, 3), "Wide ResNet"),
        ("layer1.0.conv2.conv.weight", (128, 32, 3, 3), "ResNeSt"),
        ("layer1.0.conv2.fc1.weight", (32, 64, 1, 1), "ResNeSt"),
        ("layer1.0.se.fc1.weight", (16, 256, 1, 1), "SE-ResNet"),
    ],
)
def test_other_families_are_refused_by_name(key: str, shape: Any, family: str) -> None:
    with torch.device("meta"):
        tensors = {**create_backbone("resnet50").state_dict(), key: torch.empty(shape)}
    with pytest.raises(ValueError, match=rf"in\.pth has a {family} for its backbone"):
        backbone_name(tensors, "in.pth")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.full((32,), float("nan")), "bn1.bias holds values that are not finite"),
        (torch.full((32,), 1e300, dtype=torch.float64), "bn1.bias holds values that are not fin"),
        (torch.zeros(32, dtype=torch.int64), "bn1.bias is torch.int64 in the file"),
    ],
    ids=["NaN", "beyond float32", "integers"],
)
def test_weights_that_are_no_numbers_are_refused(value: Tensor, words: str, tmp_path: Path) -> None:
    trunk = create_backbone("demo")
    torch.save({**trunk.state_dict(), "bn1.bias": value}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=words):
        load_backbone(trunk, tmp_path / "in.pth")
