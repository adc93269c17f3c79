"""The configuration that mmsegmentation stores beside its weights, and what network it describes.

Weights alone do not tell: the same tensors fit networks with other strides, dilations and
upsampling. A network that differs from those here is refused by name.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from encnet_triton.unpickle import Placeholder, printable
from encnet_triton.weights.reading import as_mapping

__all__ = ["Described", "describe", "parse_config"]

_HEADS = {"EncHead": "encnet", "FCNHead": "fcn", "PSPHead": "psp", "ASPPHead": "deeplab"}
_TRUNKS = ("ResNet", "ResNetV1c", "ResNetV1d")
# (strides, dilations) of the four stages, with the first block of each dilated half as much.
_LAYOUTS: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, bool]] = {
    ((1, 2, 1, 1), (1, 1, 2, 4)): (8, True),
    ((1, 2, 2, 1), (1, 1, 1, 2)): (16, True),
    ((1, 2, 2, 2), (1, 1, 1, 1)): (32, True),
    ((1, 2, 1, 1), (1, 1, 1, 1)): (8, False),
    ((1, 2, 2, 1), (1, 1, 1, 1)): (16, False),
}
_LONGEST = 2**20  # characters of a configuration


@dataclass(frozen=True)
class Described:
    """What a configuration says.

    Attributes:
        network: "encnet", "fcn", "psp" or "deeplab".
        options: arguments of `create_model` that the weights do not tell.
        image: fields of `ModelInfo` about images: mean, std, crop, base_size, scale_by.
    """

    network: str
    options: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] = field(default_factory=dict)


class _Unknown:
    """The value of an expression that is not a literal."""


def describe(meta: Mapping[Any, Any], source: str) -> Described | None:
    """The network in the ``meta`` of a checkpoint; None if no configuration is in it.

    Raises:
        ValueError: it is a network that is not here, named, or the configuration is not readable.
    """
    config = _config_in(meta, source)
    if config is None:
        return None
    model = as_mapping(config.get("model"))
    if model is None:
        raise ValueError(f"{source}: the configuration of mmsegmentation in it describes no model")
    norm = _normalisation(config, model)
    refusal = next(_refusals(model), None) or next(_image_refusals(norm), None)
    if refusal is not None:
        raise ValueError(f"{source} is a network of mmsegmentation that is not here: {refusal}")
    head = _part(model, "decode_head")
    stride, dilate = _LAYOUTS[_layout(_part(model, "backbone"))]
    options: dict[str, Any] = {
        "output_stride": stride,
        "dilate": dilate,
        "align_corners": head.get("align_corners", False),
        "dropout": head.get("dropout_ratio", 0.1),
    }
    network = _HEADS[_kind(head)]
    if network == "deeplab":
        options["rates"] = list(_tuple(head, "dilations", (1, 6, 12, 18))[1:])
    return Described(network, options, _image(config, model, norm))


def _part(model: Mapping[Any, Any], name: str) -> Mapping[Any, Any]:
    return as_mapping(model.get(name)) or {}


def _layout(trunk: Mapping[Any, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The (strides, dilations) of a trunk's stages, one of `_LAYOUTS` unless it is refused."""
    return _tuple(trunk, "strides", (1, 2, 2, 2)), _tuple(trunk, "dilations", (1,) * 4)


def _tuple(part: Mapping[Any, Any], name: str, default: tuple[int, ...]) -> tuple[Any, ...]:
    value = part.get(name, default)
    members = value if isinstance(value, list | tuple) else (value,)
    return tuple(one if isinstance(one, int | float | str) else repr(one) for one in members)


def _kind(part: Mapping[Any, Any]) -> str:
    return _word(part.get("type"))


def _refusals(model: Mapping[Any, Any]) -> Iterator[str]:
    """How it differs from the networks here, in words, the most obvious first."""
    if model.get("type", "EncoderDecoder") != "EncoderDecoder":
        yield f"it is a {_kind(model)}"
    trunk, head = _part(model, "backbone"), _part(model, "decode_head")
    if _kind(trunk) not in _TRUNKS:
        yield f"its backbone is a {_kind(trunk)}"
    if _kind(head) not in _HEADS:
        yield f"its head is a {_kind(head)}"
    auxiliary = model.get("auxiliary_head")
    if isinstance(auxiliary, list | tuple):
        yield f"it has {len(auxiliary)} auxiliary heads"
    side = as_mapping(auxiliary) or {"type": "FCNHead", "in_index": 2}
    if _kind(side) != "FCNHead":
        yield f"its auxiliary head is a {_kind(side)}"
    yield from _trunk_refusals(trunk)
    for part in (head, side):
        if _kind(part) == "FCNHead" and part.get("dilation", 1) != 1:
            yield f"FCN-D{_word(part['dilation'])}, whose head has convolutions of that dilation"
    yield from _head_refusals(head)
    if side.get("in_index", -1) not in (2, -2):
        yield f"its auxiliary head stands on the features {_word(side.get('in_index', -1))}"
    for name, part in (("backbone", trunk), ("head", head), ("auxiliary head", side)):
        yield from _layer_refusals(name, part)


def _trunk_refusals(trunk: Mapping[Any, Any]) -> Iterator[str]:
    strides, dilations = _layout(trunk)
    if (strides, dilations) not in _LAYOUTS:
        yield f"its backbone has strides {_word(strides)} and dilations {_word(dilations)}"
    elif max(dilations) > 1 and not trunk.get("contract_dilation", False):
        yield "the first block of a dilated stage is dilated in full (contract_dilation=False)"
    if trunk.get("multi_grid") is not None:
        yield f"its backbone has the multi-grid {_word(trunk['multi_grid'])}"
    if trunk.get("style", "pytorch") != "pytorch":
        yield f"its backbone is of the style {_word(trunk['style'])}"
    for name in ("dcn", "plugins"):
        if trunk.get(name):
            yield f"its backbone has {name}"


def _head_refusals(head: Mapping[Any, Any]) -> Iterator[str]:
    below = ((1, 2, 3),) if _kind(head) == "EncHead" else ((3,), (-1,))
    if _tuple(head, "in_index", (-1,)) not in below:
        yield f"its head stands on the features {_word(head.get('in_index', -1))}"
    if not isinstance(head.get("align_corners", False), bool):
        yield "whether it aligns corners is not known"
    if head.get("input_transform") not in (None, "multiple_select"):
        yield f"its head joins features ({_word(head['input_transform'])})"
    if head.get("kernel_size", 3) != 3:
        yield f"its head has convolutions of {_word(head['kernel_size'])} pixels"
    if _tuple(head, "pool_scales", (1, 2, 3, 6)) != (1, 2, 3, 6):
        yield f"its pyramid has the grids {_word(head['pool_scales'])}"
    if _kind(head) == "ASPPHead":
        rates = _tuple(head, "dilations", (1, 6, 12, 18))
        if len(rates) < 2 or rates[0] != 1 or not all(_is_count(rate) for rate in rates):
            yield f"its pyramid has the dilations {_word(rates)}"
    if head.get("out_channels", head.get("num_classes")) != head.get("num_classes"):
        yield "two classes share one output (out_channels)"
    if not isinstance(head.get("dropout_ratio", 0.1), float | int):
        yield f"its dropout is {_word(head['dropout_ratio'])}"


def _image_refusals(norm: Mapping[Any, Any]) -> Iterator[str]:
    if not norm.get("bgr_to_rgb", norm.get("to_rgb", True)):
        yield "it takes images in the order blue, green, red"
    mean, std = _tuple(norm, "mean", (0,) * 3), _tuple(norm, "std", (1,) * 3)
    numbers = all(isinstance(value, int | float) for value in (*mean, *std))
    if (
        not len(mean) == len(std) == 3
        or not numbers
        or min(mean) < 0
        or not max(*mean, *std) <= 255
        or not min(std) >= 1e-3
    ):
        yield f"images are normalised by {_word(mean)} and {_word(std)}"


def _layer_refusals(name: str, part: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in part.items():
        if value is _Unknown:
            yield f"the {_word(key)} of its {name} is not written out"
    if part.get("conv_cfg"):
        yield f"its {name} has other convolutions ({_word(part['conv_cfg'])})"
    norm = as_mapping(part.get("norm_cfg")) or {}
    if norm.get("type", "BN") not in ("BN", "SyncBN", "BN2d", "MMSyncBN", "naiveSyncBN"):
        yield f"its {name} has the normalisation {_word(norm['type'])}"
    if norm.get("eps", 1e-5) != 1e-5:
        yield f"its {name} normalises with eps {_word(norm['eps'])}"
    activation = as_mapping(part.get("act_cfg", {"type": "ReLU"})) or {}
    if activation.get("type") != "ReLU":
        yield f"its {name} has the activation {_word(activation.get('type'))}"


def _word(value: Any) -> str:
    return printable(value if isinstance(value, str) else repr(value), 80)


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1024


def _image(
    config: Mapping[Any, Any], model: Mapping[Any, Any], norm: Mapping[Any, Any]
) -> dict[str, Any]:
    """How images were normalised, cut and scaled, as far as the configuration says."""
    found: dict[str, Any] = {}
    steps = list(_steps(config))
    mean, std = _tuple(norm, "mean", ()), _tuple(norm, "std", ())
    if len(mean) == len(std) == 3:
        found |= {
            "mean": [round(v / 255, 9) for v in mean],
            "std": [round(v / 255, 9) for v in std],
        }
    crops = [config.get("crop_size"), _part(model, "test_cfg").get("crop_size")]
    crops += [step.get("crop_size") for step in steps if step.get("type") == "RandomCrop"]
    crop = next((_pair(value) for value in crops if _pair(value)), None)
    if crop:
        found["crop"] = list(crop)
    scales = [step.get("img_scale", step.get("scale")) for step in steps if _tests(step)]
    scale = next((_pair(value) for value in scales if _pair(value)), None)
    if scale:
        # Images are made as large as fits into it: of the usual ones, the short edge decides.
        by = "long" if scale[0] == scale[1] else "short"
        found |= {"base_size": min(scale), "scale_by": by}
    return found


def _normalisation(config: Mapping[Any, Any], model: Mapping[Any, Any]) -> Mapping[Any, Any]:
    norm = _part(model, "data_preprocessor") or as_mapping(config.get("img_norm_cfg")) or {}
    if "mean" in norm:
        return norm
    return next((step for step in _steps(config) if step.get("type") == "Normalize"), norm)


def _tests(step: Mapping[Any, Any]) -> bool:
    return step.get("type") == "MultiScaleFlipAug" or "ratio_range" not in step


def _steps(config: Mapping[Any, Any]) -> Iterator[Mapping[Any, Any]]:
    """The steps of the pipelines that images go through, those of the test first."""
    for name in ("test_pipeline", "train_pipeline"):
        pipeline = config.get(name)
        for step in pipeline if isinstance(pipeline, list | tuple) else ():
            known = as_mapping(step) or {}
            yield known
            inner = known.get("transforms")
            for one in inner if isinstance(inner, list | tuple) else ():
                yield as_mapping(one) or {}


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_size, value)):
        return value[0], value[1]
    return (value, value) if _is_size(value) else None


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**16


def _config_in(meta: Mapping[Any, Any], source: str) -> Mapping[Any, Any] | None:
    found = meta.get("cfg", meta.get("config"))
    if found is None:
        return None
    if isinstance(found, str):
        return parse_config(found, source)
    if isinstance(found, Placeholder) and as_mapping(found) is None:
        # An object of the class Config: its dictionary is the first thing that it stores.
        state = found.state
        first = state[0] if isinstance(state, tuple) and state else state
        found = (as_mapping(first) or {}).get("_cfg_dict", first)
    config = as_mapping(_plain(found))
    if config is None:
        raise ValueError(f"{source}: the configuration of mmsegmentation in it cannot be read")
    return config


def _plain(value: Any, depth: int = 0) -> Any:
    """Dictionaries of classes of their own as plain ones, to a depth that no configuration has."""
    if depth > 32:
        return _Unknown
    inner = as_mapping(value)
    if inner is not None:
        return {key: _plain(one, depth + 1) for key, one in inner.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(one, depth + 1) for one in value)
    return value


def parse_config(text: str, source: str) -> dict[str, Any]:
    """The assignments of a configuration in Python's syntax, of which nothing is run.

    Values that are not literals, ``dict(...)`` or earlier names are left unknown. Of two
    assignments to a name, as where one file goes on from another, the second changes the first.

    Raises:
        ValueError: it is no Python, or too long.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"{source}: the configuration in it has more than {_LONGEST} characters")
    # The raw text of MMCV 1 names each file that it comes from.
    text = re.sub(r"(?m)^[^\s=#'\"(]+\.py$", "", text)
    try:
        found: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the style of what others have written
            statements = ast.parse(text).body
        for statement in statements:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                name = statement.targets[0].id
                found[name] = _merged(found.get(name), _value(statement.value, found))
        return found
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{source}: the configuration of mmsegmentation in it cannot be read"
        ) from error


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id, _Unknown)
    if isinstance(node, ast.Tuple):
        return tuple(_value(one, names) for one in node.elts)
    if isinstance(node, ast.List):
        return [_value(one, names) for one in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, names)
        return -value if isinstance(value, int | float) else _Unknown
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key, names) for key in node.keys]
        values = [_value(value, names) for value in node.values]
        return {k: v for k, v in zip(keys, values, strict=True) if isinstance(k, str | int | float)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {one.arg: _value(one.value, names) for one in node.keywords if one.arg}
    return _Unknown


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict) or new.get("_delete_"):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
