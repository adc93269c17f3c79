"""The kernels as a package of the Hugging Face kernel hub: what its build is given, and layers."""

from __future__ import annotations

import ast
import importlib.util
import json
import pkgutil
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encnet_triton import kernels
from encnet_triton.kernels import layers, reference
from encnet_triton.kernels.hub.stage import stage

FOLDER = Path(kernels.__file__).resolve().parent
GENERAL = tomllib.loads((FOLDER / "hub" / "build.toml").read_text())["general"]
MODULE = GENERAL["name"].replace("-", "_")
BUILT_OPS = """\
import torch

_OPS_NAME = "{0}"
ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_OPS_NAME}}::{{op_name}}"
"""


def build(project: Path, backend: str, unique: str) -> Path:
    """What kernel-builder makes of a staged project for one backend."""
    built = project / "build" / f"torch-{backend}"
    shutil.copytree(project / "torch-ext" / MODULE, built)
    name = f"_{MODULE}_{backend}_{unique}"
    (built / "_ops.py").write_text(BUILT_OPS.format(name))
    said = {key: GENERAL[key] for key in ("name", "version", "license")}
    said |= {"id": name, "python-depends": [], "backend": {"type": backend}}
    (built / "metadata.json").write_text(json.dumps(said))
    return built


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is staged, and built."""
    folder = tmp_path_factory.mktemp("hub")
    stage(folder)
    for backend in GENERAL["backends"]:
        build(folder, backend, "5ce1f00")
    return folder


def test_what_is_staged(tmp_path: Path) -> None:
    left = tmp_path / "torch-ext" / MODULE / "left_over.py"
    left.parent.mkdir(parents=True)
    for file in (left, tmp_path / "flake.lock"):
        file.touch()
    stage(tmp_path)
    found = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    module = Path("torch-ext", MODULE)
    sources = {p.relative_to(FOLDER) for p in FOLDER.rglob("*.py") if p.parent.name != "hub"}
    assert len(sources) > 30
    about = {Path(name) for name in ("build.toml", "flake.nix", "CARD.md", "flake.lock")}
    tuned = {p.relative_to(FOLDER) for p in FOLDER.rglob("*.json")}
    assert found == about | {module / path for path in (sources | tuned) - {Path("_ops.py")}}


DECORATORS = ("custom_op", "triton_op", "register_kernel", "register_fake", "register_vmap",
              "register_torch_dispatch")  # fmt: skip


def test_the_build_finds_every_name_of_an_operator_prefixed() -> None:
    """It looks at decorators by their names, and refuses other names than those of `_ops`."""
    prefixed = 0
    for path in FOLDER.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            for call in getattr(node, "decorator_list", ()):
                called = ast.unparse(call.func).split(".")[-1] if isinstance(call, ast.Call) else ""
                if called in DECORATORS and call.args:
                    name = ast.unparse(call.args[0])
                    assert name.startswith("add_op_namespace_prefix("), (path, node.name)
                    prefixed += 1
    assert prefixed == 14


def test_a_built_package_needs_nothing_of_this_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    for name in ("kernels", *sys.modules):
        if name.partition(".")[0] in ("kernels", "encnet_triton", "train", "bench"):
            monkeypatch.setitem(sys.modules, name, None)  # an ImportError
    stage(tmp_path)
    built = build(tmp_path, "cpu", "a10ne00")
    name = f"_{MODULE}_cpu_a10ne00"
    spec = importlib.util.spec_from_file_location(name, built / "__init__.py")
    assert spec is not None and spec.loader is not None
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    parts = [part.name for part in pkgutil.walk_packages(loaded.__path__, f"{name}.")]
    assert len(parts) > 30
    for part in parts:
        importlib.import_module(part)
    inputs = torch.randn(2, 4, 5, 6), torch.randn(3, 4), -torch.rand(3)
    torch.testing.assert_close(loaded.encode(*inputs), reference.encode(*inputs))


class PlainEncoding(nn.Module):
    """An Encoding layer as others have it."""

    def __init__(self) -> None:
        super().__init__()
        self.codewords = nn.Parameter(torch.randn(3, 4))
        self.scale = nn.Parameter(-torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return reference.encode(x, self.codewords, self.scale)


class PlainNormAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d."""

    def __init__(self, act: nn.Module, drop: nn.Module) -> None:
        super().__init__(4)
        self.act, self.drop = act, drop

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


PIXELS = (2, 4, 5, 6)
REPLACED = {
    "Encoding": (layers.Encoding, PlainEncoding, PIXELS),
    "BatchNorm1d": (layers.BatchNorm, lambda: nn.BatchNorm1d(4), (6, 4)),
    "BatchNorm2d": (layers.BatchNorm, lambda: nn.BatchNorm2d(4), PIXELS),
    "BatchNorm3d": (layers.BatchNorm, lambda: nn.BatchNorm3d(4), (2, 4, 3, 2, 2)),
    "cumulative": (layers.BatchNorm, lambda: nn.BatchNorm2d(4, momentum=None), PIXELS),
    "plain": (layers.BatchNorm, lambda: nn.BatchNorm2d(4, affine=False), PIXELS),
    "untracked": (
        layers.BatchNorm,
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        PIXELS,
    ),
    "ReLU": (layers.BatchNormAct2d, lambda: PlainNormAct(nn.ReLU(), nn.Identity()), PIXELS),
    "SiLU": (layers.BatchNormAct2d, lambda: PlainNormAct(nn.SiLU(), nn.Identity()), PIXELS),
    "ReLU6": (layers.BatchNormAct2d, lambda: PlainNormAct(nn.ReLU6(), nn.Identity()), PIXELS),
    "drop": (layers.BatchNormAct2d, lambda: PlainNormAct(nn.ReLU(), nn.Softmax(1)), PIXELS),
}


def used(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What two steps of training and an evaluation give, and leave in the layer."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        trained = layer(x)
        trained.square().sum().backward()
    found = {"trained": trained, "evaluated": layer.eval()(x), "x": x.grad, **layer.state_dict()}
    return found | {f"gradient of {n}": p.grad for n, p in layer.named_parameters()}


@pytest.mark.parametrize("case", REPLACED)
def test_a_layer_computes_what_the_one_it_replaces_does(case: str, float64: None) -> None:
    ours, build, shape = REPLACED[case]
    plain = build()
    replaced = deepcopy(plain)
    replaced.forward = MethodType(ours.forward, replaced)
    x = torch.randn(shape)
    torch.testing.assert_close(used(replaced, x), used(plain, x))


def test_codes_have_the_dtype_of_the_layer_that_is_replaced() -> None:
    layer = PlainEncoding()
    for layer_dtype in (torch.float32, torch.bfloat16):
        layer.to(layer_dtype)
        x = torch.randn(PIXELS, dtype=torch.bfloat16)
        assert layers.Encoding.forward(layer, x).dtype == layer(x).dtype == layer_dtype


@pytest.fixture
def hub() -> Any:
    package = pytest.importorskip("kernels", reason="the package of the kernel hub is not there")
    # The root of this checkout, where a folder has the same name, is on the path.
    assert not Path(package.__file__).is_relative_to(FOLDER)
    return package


def computed(package: Any, wrap: Callable[..., Any] = lambda function: function) -> list[Tensor]:
    """Results of each operator and their gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 6, 5, generator=generator, requires_grad=True)
    codewords, scale = torch.randn(3, 4, generator=generator), -torch.rand(3, generator=generator)
    mean, var = torch.zeros(4), torch.ones(4)
    target = torch.randint(4, (2, 12, 9), generator=generator)

    def all_of_them(x: Tensor) -> tuple[Tensor, ...]:
        y = package.batch_norm_act(
            x, None, None, mean, var, training=True, momentum=0.1, eps=1e-5, residual=x
        )
        loss = package.upsample_cross_entropy(y, target)
        codes = package.encode(y, codewords, scale)
        return loss + codes.square().sum(), codes, package.upsample_argmax(y, (12, 9))

    loss, *others = wrap(all_of_them)(x)
    return [loss, *others, mean, var, *torch.autograd.grad(loss, x)]


def test_a_loaded_package_beside_the_installed_one(hub: Any, project: Path) -> None:
    loaded = hub.get_local_kernel(project, backend="cpu")
    assert loaded is not kernels and loaded.__all__ == kernels.__all__
    installed = computed(kernels)
    torch.testing.assert_close(computed(loaded), installed, rtol=0, atol=0)
    compile_all = torch.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(computed(loaded, compile_all), installed)
    of_space: dict[str, set[str]] = {}
    for operator in torch._C._dispatch_get_all_op_names():
        space, _, name = operator.partition("::")
        of_space.setdefault(space, set()).add(name)
    assert of_space[loaded.__name__] == of_space["encnet_triton_kernels"]
    encode = getattr(torch.ops, loaded.__name__).encode_forward.default
    given = torch.randn(2, 4, 5, requires_grad=True), torch.randn(3, 4), torch.randn(3)
    torch.library.opcheck(encode, (*given, None, False))


def test_layers_are_put_into_a_model(hub: Any, project: Path, float64: None) -> None:
    """They are of the kind that the hub admits, or this refuses them."""
    of_layers = {"Encoding": PlainEncoding, "BatchNorm": nn.BatchNorm2d,
                 "BatchNormAct2d": PlainNormAct}  # fmt: skip
    mapping = {}
    for name, plain in of_layers.items():
        own = type(f"Plain{name}", (plain,), {})
        of_layers[name] = hub.use_kernel_forward_from_hub(name)(own)
        mapping[name] = {"cpu": hub.LocalLayerRepository(project, layer_name=name)}
    norm = of_layers["BatchNormAct2d"](nn.ReLU(), nn.Identity())
    plain = nn.Sequential(of_layers["BatchNorm"](4), norm, of_layers["Encoding"]())
    model = deepcopy(plain)
    mode = hub.Mode.TRAINING | hub.Mode.TORCH_COMPILE
    with hub.use_kernel_mapping(mapping):
        hub.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    assert {type(layer).forward for layer in model} & {x.forward.__func__ for x in model} == set()
    x = torch.randn(PIXELS)
    torch.testing.assert_close(used(deepcopy(model), x), used(deepcopy(plain), x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))


def test_the_build_file_is_read_and_the_card_shows_what_runs(
    hub: Any, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = importlib.import_module("kernels._rust").Build.open(project).general
    assert {str(backend) for backend in read.backends} == set(GENERAL["backends"])
    repository = GENERAL["hub"]["repo-id"]
    monkeypatch.setenv("LOCAL_KERNELS", f"{repository}={project}")
    monkeypatch.setattr(nn.BatchNorm2d, "kernel_layer_name", None, raising=False)  # is set below
    values = {"repo_id": repository, "version": str(GENERAL["version"])}
    card = (project / "CARD.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(re.sub(r"{{ ?(\w+) ?}}", lambda found: values[found[1]], block), {})
