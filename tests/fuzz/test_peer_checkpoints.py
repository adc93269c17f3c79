"""Checkpoints of others, damaged at random: the network, or one sentence that says why not."""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from encnet_triton.models import BACKBONES, create_backbone
from encnet_triton.weights import convert_model, load_backbone, load_model
from tests.support import restated
from tests.support.mutations import mutated

CONFIG = """
crop_size = (64, 96)
model = dict(type='EncoderDecoder',
    data_preprocessor=dict(mean=[51, 102, 153], std=[25.5, 51, 51], bgr_to_rgb=True),
    backbone=dict(type='ResNetV1c', dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1),
        norm_cfg=dict(type='SyncBN'), style='pytorch', contract_dilation=True),
    decode_head=dict(type='{head}', in_index=3, dropout_ratio=0.1, align_corners=True,
        dilations=(1, 12, 24, 36)),
    test_cfg=dict(mode='whole'))
test_pipeline = [dict(type='Resize', scale=(2048, 1024), keep_ratio=True)]
"""


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-18 with few channels, in the files and here."""
    monkeypatch.setattr(restated, "WIDTH", 2)
    monkeypatch.setattr(restated, "LAST", 16)
    monkeypatch.setattr(restated, "PART", 4)
    for name in ("resnet18", "resnet18b", "resnet18c"):
        widths = tuple(2 * 2**i for i in range(4))
        monkeypatch.setitem(BACKBONES, name, replace(BACKBONES[name], widths=widths))


def documents() -> dict[str, dict[str, Any]]:
    """A checkpoint of each origin, as its trainer writes it."""
    torch.manual_seed(0)
    mmseg = {
        "PSPHead": restated.MMSegPSP(3, corners=True),
        "ASPPHead": restated.MMSegDeepLab(3, corners=True),
    }
    made: dict[str, dict[str, Any]] = {
        head: {
            "state_dict": dict(model.state_dict()),
            "meta": {"cfg": CONFIG.format(head=head), "dataset_meta": {"classes": ("a", "b", "c")}},
            "message_hub": {"loss": np.arange(3.0)},
        }
        for head, model in mmseg.items()
    }
    encoding = restated.PyTorchEncodingDeepLab(3).state_dict()
    made["encoding"] = {"epoch": 3, "state_dict": dict(encoding), "best_pred": np.float64(0.5)}
    made["vision"] = {"model": dict(restated.TorchvisionFCN(3).state_dict()), "epoch": 2}
    trunk = restated.Trunk18(openmmlab=False).state_dict()
    made["trunk"] = {"state_dict": {"module." + key: tensor for key, tensor in trunk.items()}}
    return made


def attempt(path: Path, name: str) -> bool:
    """Whether it was read; anything but a ValueError of one line fails the test."""
    try:
        LOAD.get(name, _convert)(path)
    except ValueError as error:
        text = str(error)
        assert path.name in text and "\n" not in text and len(text) < 2000
        assert "weights_only" not in text and "\x1b" not in text
        return False
    return True


def assert_leaves_what_it_read(path: Path, name: str) -> None:
    """A file that is refused leaves no converted one behind."""
    made = path.with_suffix(".safetensors")
    made.unlink(missing_ok=True)
    read = attempt(path, name)
    assert made.exists() == (read and name not in LOAD)


def _load_trunk(path: Path) -> object:
    return load_backbone(create_backbone("resnet18"), path)


def _convert(path: Path) -> object:
    """What is converted can be read back."""
    convert_model(path, path.with_suffix(".safetensors"), note=str)
    return load_model(path.with_suffix(".safetensors"))


LOAD: dict[str, Callable[[Path], object]] = {"trunk": _load_trunk}


def _saved(document: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(document, buffer, **options)
    return buffer.getvalue()


def _inside(content: bytes, rng: np.random.Generator) -> bytes:
    """The archive with another pickle in it, its checksum right: what a disk does not do."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            wrong = entry.filename.endswith("data.pkl")
            new.writestr(entry.filename, mutated(data, rng) if wrong else data)
    return buffer.getvalue()


def test_mutated_bytes(seeds: Iterator[int], tmp_path: Path) -> None:
    forms: dict[str, dict[str, Any]] = {"zip": {}, "old": {"_use_new_zipfile_serialization": False}}
    contents = [
        (name, form, _saved(document, **options))
        for name, document in documents().items()
        for form, options in forms.items()
    ]
    path = tmp_path / "in.pth"
    for name, _, content in contents:
        path.write_bytes(content)
        assert attempt(path, name)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        name, form, content = contents[seed % len(contents)]
        if form == "zip" and rng.random() < 0.7:
            damaged = _inside(content, rng)
        else:
            damaged = mutated(content, rng, (8000, 4000))
        path.write_bytes(damaged)
        assert_leaves_what_it_read(path, name)


def _pick(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _other_tensor(tensor: Tensor, rng: np.random.Generator) -> Any:
    shape = list(tensor.shape)
    match int(rng.integers(9)):
        case 0:
            return tensor.new_zeros([*shape, 1])
        case 1:
            return tensor.new_zeros(shape[1:])
        case 2:
            return tensor.new_zeros([0, *shape[1:]])
        case 3:
            return torch.full(shape, float("nan"))
        case 4:
            return tensor.to(_pick(rng, torch.int64, torch.bool, torch.float16, torch.complex64))
        case 5:
            return _pick(rng, "text", None, 3, [tensor], {"a": tensor})
        case 6:
            return tensor.new_zeros([size + int(rng.integers(3)) for size in shape])
        case 7:
            # One number that claims to be many.
            return tensor.new_zeros(()).expand([2**20, *shape])
        case _:
            return torch.zeros([int(2 ** rng.integers(18)) for _ in shape[:1]], dtype=tensor.dtype)


VALUES = (
    "None", "True", "-1", "0", "2**70", "1e400", "[]", "()", "{}", "dict()", "(1, 2, 2, 1)",
    "(1, 1, 1, 2)", "(1, 1, 1, 1)", "[[1]]", "'ResNeSt'", "'EncHead'", "'text'", "float('nan')",
    "-" * 3000 + "1", "(" * 150 + ")" * 150, "dict(type=dict(type='BN'))", "dict(a=",
)  # fmt: skip


def _other_config(text: str, rng: np.random.Generator) -> Any:
    if rng.random() < 0.1:
        return _pick(rng, text.encode(), [text], {"model": text}, 3, "")
    if rng.random() < 0.3:
        return mutated(text.encode(), rng).decode("utf-8", "replace")
    start = _pick(rng, *(i for i, letter in enumerate(text) if letter == "=")) + 1
    ends = [i for i in range(start, len(text)) if text[i] in ",)\n"]
    return text[:start] + str(rng.choice(VALUES)) + text[ends[int(rng.integers(2))] :]


def _mutate(document: dict[str, Any], rng: np.random.Generator) -> None:
    name = "model" if "model" in document else "state_dict"
    tensors = document[name]
    key = _pick(rng, *tensors)
    match int(rng.integers(8)):
        case 0:
            del tensors[key]
        case 1:
            tensors[mutated(key.encode(), rng).decode("utf-8", "replace")] = tensors.pop(key)
        case 2:
            tensors[key.replace(".0.", ".1.", 1)] = tensors[key]
        case 3:
            document[_pick(rng, "module", "network", "model", "ema", "meta")] = tensors
        case 4 if "meta" in document:
            document["meta"]["cfg"] = _other_config(str(document["meta"]["cfg"]), rng)
        case 5 if "meta" in document:
            data = _pick(rng, None, 3, {"classes": 3}, {"palette": [[1]]}, {})
            document["meta"]["dataset_meta"] = data
        case 6:
            start = _pick(rng, "backbone.", "decode_head.", "pretrained.", "head.")
            for one in [one for one in tensors if one.startswith(start)]:
                tensors.pop(one)
        case _:
            tensors[key] = _other_tensor(tensors[key], rng)


def test_mutated_keys_shapes_and_configurations(seeds: Iterator[int], tmp_path: Path) -> None:
    originals = documents()
    names = list(originals)
    path = tmp_path / "in.pth"
    for seed in seeds:
        rng = np.random.default_rng(seed)
        name = names[seed % len(names)]
        document = copy.deepcopy(originals[name])
        _mutate(document, rng)
        torch.save(document, path)
        assert_leaves_what_it_read(path, name)
