"""Exported files: they compute what the network does, without this package, or are not written."""

from __future__ import annotations

import json
import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from encnet_triton import export
from encnet_triton.data.normalisation import Normalise
from encnet_triton.exporting import Exportable, Program, network, onnx_file, pt2_file, trace
from encnet_triton.exporting.plain import PlainEncoding, _adaptive_mean, foreign_operators
from encnet_triton.kernels import reference
from encnet_triton.models import CifarNet, create_model
from encnet_triton.nn import Encoding, ShakeEncoding
from encnet_triton.weights import ModelInfo, load_model, save_model

ROOT = Path(__file__).parents[1]
SAID = {
    "classes": ["sky", "road", "wall"], "palette": [[0, 0, 0], [9, 8, 7], [255, 0, 0]],
    "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.2], "crop": [40, 40],
}  # fmt: skip


def save(path: Path, name: str = "encnet") -> Path:
    """The checkpoint of a small network, which finds several classes in noise."""
    torch.manual_seed(0)
    if name == "cifar":
        model = CifarNet(num_classes=3, width=4, num_codewords=4)
    else:
        model = create_model(name, 3, backbone="demo", head_channels=8)
        last = model.head.classifier
        with torch.no_grad():
            last.weight.normal_(std=9.0)
            last.bias -= model.eval()(torch.randn(1, 3, 64, 64)).logits.mean((0, 2, 3))
    save_model(path, model, ModelInfo(options=model.options, **SAID))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "best.safetensors")


@pytest.fixture(scope="module")
def program(checkpoint: Path) -> Program:
    """Labels of uint8 images of any size."""
    return trace(Exportable(*load_model(checkpoint), uint8=True))


def snippet(about: str) -> str:
    """The Python of docs/export.md that imports a package."""
    blocks = re.findall(r"^```py\n(.*?)^```$", (ROOT / "docs/export.md").read_text(), re.M | re.S)
    (found,) = [text for text in blocks if f"import {about}\n" in text]
    return str(found)


@pytest.mark.parametrize("kind", [Encoding, ShakeEncoding])
def test_the_encoding_layer_as_products_is_the_definition(kind: Any) -> None:
    layer = kind(7, 5).double().eval()
    with torch.no_grad():
        layer.codewords.add_(50)
    x = torch.randn(2, 7, 6, 5, dtype=torch.float64) + 50
    scale = layer.scale if kind is Encoding else torch.full((5,), -0.5, dtype=x.dtype)
    expected = reference.encode(x, layer.codewords, scale)
    torch.testing.assert_close(PlainEncoding(layer)(x), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (6, 6)])
def test_regions_are_those_of_adaptive_pooling(size: tuple[int, int]) -> None:
    for shape in ((2, 3, 13, 8), (1, 2, 4, 5), (1, 1, 1, 60)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(_adaptive_mean(x, size), F.adaptive_avg_pool2d(x, size))


def test_a_label_may_differ_only_where_two_classes_are_almost_equally_likely(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.tensor([[10.0, 9.9995, 2.0], [1.0, 3.0, 3.0]])[:, :, None, None]
    monkeypatch.setattr(program.network, "scores", lambda image: scores)

    def off(*labels: int) -> float:
        found = torch.tensor(labels).view(-1, 1, 1)
        return program.network.difference(torch.empty(0), found)

    assert off(0, 1) == off(0, 2) == 0
    assert off(1, 1) == pytest.approx(5e-5, rel=0.01)
    assert off(2, 1) == pytest.approx(0.8)
    assert off(0, 3) == off(0, -1) == off(0) == float("inf")
    assert program.network.difference(torch.empty(0), torch.zeros(2, 3, 1, 1)) == float("inf")
    monkeypatch.setattr(program.network, "scores", lambda image: scores * float("nan"))
    assert off(0, 1) == float("inf")


def test_the_graph_has_torchs_operators_alone(program: Program) -> None:
    assert foreign_operators(program.exported) == []
    other = program.network.image(3, 33, 70)
    with torch.no_grad():
        found = program.exported.module()(other)
    assert found.shape == (3, 33, 70) and found.dtype == torch.int64
    assert len(found.unique()) > 1
    assert program.network.difference(other, found) < 1e-6


def test_the_command_writes_a_file_that_another_process_runs(
    checkpoint: Path, program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    traced: list[Exportable] = []
    monkeypatch.setattr(export, "trace", lambda *given: traced.append(given[0]) or program)
    assert export.main([str(checkpoint), "--format", "pt2", "--output", "best.pt2", "--uint8"]) == 0
    assert traced[0].uint8 and traced[0].returns == "labels"
    said = capsys.readouterr().out
    assert "wrote best.pt2" in said and "windows of 40x40" in said
    (written,) = tmp_path.iterdir()
    assert written.name == "best.pt2" and str(ROOT).encode() not in written.read_bytes()
    names: dict[str, Any] = {}
    exec(snippet("torch"), names)
    about = names["about"]
    assert {name: about[name] for name in SAID} == SAID
    assert about["input"] == "uint8 RGB" and about["returns"] == "labels" and about["size"] is None
    assert names["image"].dtype == torch.uint8 and len(names["example"]["values"]) > 500
    assert capsys.readouterr().out.strip() in SAID["classes"]


def test_the_normalisation_inside_is_that_of_training(program: Program) -> None:
    whole = program.network
    pixels = whole.image(1, 30, 44)
    normalised = Normalise(whole.info.mean, whole.info.std, "cpu")(pixels)
    outside = Exportable(whole.model, whole.info)
    torch.testing.assert_close(outside.image(1, 30, 44), normalised)
    torch.testing.assert_close(
        whole.scores(pixels), outside.scores(normalised), rtol=1e-4, atol=1e-4
    )


def test_a_file_that_disagrees_is_not_written(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "best.pt2"
    path.write_text("the previous file")
    wrong = [program.network(image).fmod(2) for image in program.batches()]
    monkeypatch.setattr(pt2_file, "_run_elsewhere", lambda *_: wrong)
    with pytest.raises(ValueError, match=r"another process differs .* nothing was written"):
        pt2_file.write_pt2(program, path)
    assert path.read_text() == "the previous file" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", [pytest.param("onnx", marks=pytest.mark.verify), "pt2"])
def test_a_full_disk_is_one_sentence(
    checkpoint: Path, program: Program, tmp_path: Path, name: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if name == "onnx":
        need_onnx()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(export, "trace", lambda *_: program)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        status = export.main([str(checkpoint), f"--format={name}", f"--output={tmp_path}/a.{name}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 2 and not list(tmp_path.iterdir())
    assert f"cannot write {tmp_path}/a.{name} (" in capsys.readouterr().err


@pytest.mark.verify
def test_a_file_that_needs_this_package_is_not_written(program: Program, tmp_path: Path) -> None:
    dims = {"image": {0: torch.export.Dim("batch", min=1)}}
    whole = torch.export.export(program.network, (program.example,), dynamic_shapes=dims)
    assert foreign_operators(whole) == ["encnet_triton_kernels.encode_forward.default"]
    with pytest.raises(ValueError, match="does not run without this package"):
        pt2_file.write_pt2(replace(program, exported=whole), tmp_path / "best.pt2")
    assert not list(tmp_path.iterdir())


def test_an_operator_that_is_left_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "with_plain_layers", lambda model: model)
    with pytest.raises(ValueError, match="operators of encnet_triton_kernels.encode_forward"):
        trace(Exportable(*load_model(checkpoint)), (40, 40))


def test_what_cannot_be_exported_is_one_sentence(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    there = tmp_path / "there.pt2"
    there.write_text("kept")
    classifier = save(tmp_path / "cifar.safetensors", "cifar")
    monkeypatch.setattr(network, "find_spec", lambda name: None if "script" in name else name)
    cases = {
        ("none.safetensors", "--format", "pt2"): "does not exist",
        (checkpoint, "--format", "onnx"): "needs onnxscript: pip install 'encnet-triton[export]'",
        (checkpoint, "--format", "pt2", "--output", there): "there.pt2 exists: give --overwrite",
        (checkpoint, "--format", "pt2", "--output", "a.onnx"): "must be a .pt2 file",
        (checkpoint, "--format", "pt2", "--output", "none/a.pt2"): "none does not exist",
        (checkpoint, "--format", "pt2", "--size", "4x300"): "at least 5 x 5",
        (classifier, "--format", "pt2", "--returns", "upsampled"): "no map to upsample",
    }
    monkeypatch.chdir(tmp_path)
    for arguments, sentence in cases.items():
        assert export.main([str(argument) for argument in arguments]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("error: ") and sentence in said
    for arguments in (["--format", "pth"], ["--format", "onnx", "--size", "0"]):
        with pytest.raises(SystemExit) as ended:
            export.main([str(checkpoint), *arguments])
        assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"there.pt2", "cifar.safetensors"}
    assert there.read_text() == "kept"


def test_weights_that_a_format_cannot_hold_are_refused(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="an ONNX file holds 2 GiB"):
        onnx_file.write_onnx(program, tmp_path / "best.onnx")
    assert not list(tmp_path.iterdir())


def need_onnx() -> Any:
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def test_onnx_runtime_computes_the_same(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    runtime = need_onnx()
    monkeypatch.chdir(tmp_path)
    program = trace(Exportable(*load_model(checkpoint)))
    assert onnx_file.write_onnx(program, Path("best.onnx")) < 1e-5
    session = runtime.InferenceSession("best.onnx")
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert given.name == "image" and given.shape == ["batch", 3, "height", "width"]
    assert made.name == "labels" and made.shape == ["batch", "height", "width"]
    about = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(about[name]) for name in SAID} == SAID
    other = program.network.image(3, 33, 70)
    found = torch.from_numpy(session.run(None, {"image": other.numpy()})[0])
    assert program.network.difference(other, found) < 1e-5
    exec(snippet("onnxruntime"), {})
    assert capsys.readouterr().out.strip() in SAID["classes"]

    written = Path("best.onnx").read_bytes()
    assert str(ROOT).encode() not in written
    wrong = [program.network(image).fmod(2) for image in program.batches()]
    monkeypatch.setattr(onnx_file, "_run", lambda *_: wrong)
    with pytest.raises(ValueError, match=r"ONNX Runtime differs .* nothing was written"):
        onnx_file.write_onnx(program, Path("best.onnx"))
    assert Path("best.onnx").read_bytes() == written and len(list(tmp_path.iterdir())) == 1


@pytest.mark.verify
@pytest.mark.parametrize("name", ["fcn", "psp", "deeplab", "cifar"])
def test_other_networks(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_onnx()
    path = save(tmp_path / "best.safetensors", name)
    command = [str(path), "--format", "onnx"]
    assert export.main([*command, "--returns", "labels" if name == "cifar" else "upsampled"]) == 0
    again = [*command, "--overwrite", "--size", "32x40", "--returns", "logits", "--uint8"]
    assert export.main(again) == 0
    assert "images of 32x40" in capsys.readouterr().out
    program = trace(Exportable(*load_model(path), returns="logits"))
    image: Tensor = program.network.image(3, 33, 47)
    with torch.no_grad():
        found = program.exported.module()(image)
    assert program.network.difference(image, found) < 1e-5


def test_the_current_folder_gives_its_name_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export._beside(Path("."), "onnx") == tmp_path.with_suffix(".onnx")
    assert export._beside(Path("runs/best.safetensors"), "pt2") == Path("runs/best.pt2")
