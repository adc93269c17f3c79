"""The configuration of a training run, as dataclasses.

Field names are unique over all sections, so ``--lr 0.01`` needs no section. A wrong key or value
raises a `ConfigError` that names it.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import PurePath
from typing import Any

from encnet_triton.data.loader import MAX_WORKERS

SEGMENTATION_MODELS = ("encnet", "fcn", "psp", "deeplab")
CIFAR_UNITS = {"cifar_encnet": "encoding", "cifar_seresnet": "se", "cifar_resnet": "none"}
"""CIFAR-10 networks and their unit, see `encnet_triton.models.CifarNet`."""


REDUCE_OVERHEAD = "reduce-overhead"
"""The mode of torch.compile that records CUDA graphs."""


class ConfigError(ValueError):
    """A field is unknown, has a value of the wrong kind, or one that is not allowed."""


def free(default: Any) -> Any:
    """A field that may change when a run is resumed: it does not alter what is computed."""
    return field(default=default, metadata={"free": True})


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise a `ConfigError` that says what was given and what is allowed, unless ``condition``."""
    if not condition:
        raise ConfigError(f"{key} = {value!r} is not allowed; it must be {allowed}")


def one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
    require(value in allowed, key, value, "one of " + ", ".join(allowed))


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Arguments of `encnet_triton.models.create_model`; None leaves the model's own default."""

    model: str = "encnet"
    """Network: encnet, fcn, psp or deeplab; for cifar10: cifar_encnet, cifar_seresnet or
    cifar_resnet."""
    backbone: str = "resnet50"
    """Name of the backbone, for example resnet50, resnet101s, small, demo; or timm:NAME for a
    network of timm (the extra timm), whose own normalisation of images is then used."""
    pretrained: str = ""
    """ImageNet weights of the backbone: a file or a URL, or timm for those that timm has for its
    network; none starts from random weights."""
    form: str | None = None
    """Context Encoding module as in the "paper" or as "released"; sets the options below."""
    num_codewords: int | None = None
    """K, the size of the codebook; 0 is global average pooling."""
    se_loss: bool | None = None
    """Predict which classes are present (Semantic Encoding loss)."""
    se_stage3: bool | None = None
    """A second Context Encoding module on stage 3, for its SE loss alone."""
    aux: bool | None = None
    """Auxiliary FCN head on stage 3."""
    lateral: bool | None = None
    """Concatenate stages 2 and 3 to the features that are encoded."""
    head_channels: int | None = None
    """Channels of the head's features (512 in the paper)."""
    dropout: float | None = None
    """Probability of dropout before the last convolution."""
    dropout_kind: str | None = None
    """Dropout of single elements ("element") or whole channels ("channel")."""
    output_stride: int | None = None
    """Image pixels per feature pixel: 8 in the paper."""
    align_corners: bool | None = None
    """Convention of the bilinear upsampling."""
    num_convs: int | None = None
    """Convolutions in the FCN's head."""
    concat_input: bool | None = None
    """Concatenate the FCN head's input before its last convolution."""
    width: int | None = None
    """Channels of the first stage (CIFAR-10 networks: 64 in the paper's 64d)."""
    block: str | None = None
    """Order in the blocks, pre or post activation (CIFAR-10 networks)."""
    shake_scale: bool | None = None
    """Random smoothing factors in training (CIFAR-10 EncNet, paper section 3.5)."""

    def __post_init__(self) -> None:
        one_of("model", self.model, (*SEGMENTATION_MODELS, *CIFAR_UNITS))
        if self.pretrained.lower() == "none":
            object.__setattr__(self, "pretrained", "")
        fits = self.pretrained != "timm" or self.backbone.startswith("timm:")
        require(fits, "pretrained", self.pretrained, f"a file or a URL for {self.backbone}")
        if self.num_codewords is not None:
            require(self.num_codewords >= 0, "num_codewords", self.num_codewords, "at least 0")
        if self.dropout is not None:
            require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `create_model` or `CifarNet`, without the number of classes."""
        values = asdict(self)
        del values["pretrained"]
        name = values.pop("model")
        if name in CIFAR_UNITS:
            del values["backbone"]
            given = {k: v for k, v in values.items() if v is not None}
            return {"unit": CIFAR_UNITS[name], **given}
        return {"name": name, **{k: v for k, v in values.items() if v is not None}}


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which images, and how training samples are cut from them."""

    dataset: str = "scenes"
    """Data set: scenes (embedded, drawn from a seed), folder (your own images), ade20k,
    pascal_context, voc, voc_aug, coco_voc or cityscapes; or cifar10, for classification."""
    data: str | None = free(None)
    """Folder that holds the data set; not needed for scenes."""
    train_split: str = "train"
    """Split that is trained on."""
    val_split: str = "val"
    """Split that is validated on."""
    ignore_label: tuple[int, ...] | None = None
    """Label values in the files that mean "no class", such as 0,255 (folder data sets; default
    255)."""
    label_offset: int | None = None
    """Added to label values in the files, -1 if classes start at 1 (folder data sets)."""
    label_map: str | None = None
    """Label values in the files and their classes, such as 255=1,7=0 (folder data sets)."""
    classes_file: str | None = None
    """File with one class name per line (folder data sets; default classes.txt)."""
    labels_folder: str | None = None
    """Folder of the label PNGs (pascal_context)."""
    label_order: str | None = None
    """Order of the label values: alphabetical, voc_first or stanford (pascal_context)."""
    background_label: int | None = None
    """Value of the background in the label PNGs, 0 or 255 (pascal_context)."""
    num_classes: int | None = None
    """59, or 60 to train the background as a class too (pascal_context)."""
    crop: tuple[int, int] = (480, 480)
    """Height and width of training crops in pixels: 480, 360x480 or [360, 480]."""
    base_size: int | None = 520
    """Edge length that scale 1 stands for; none keeps the image's own size."""
    scale_by: str = "short"
    """Which edge base_size sets: short, long, or image (each image's own size)."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of random scaling."""
    rotation: float = 10.0
    """Random rotation, in degrees either way."""
    flip: float = 0.5
    """Probability of mirroring left and right."""
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Largest random change of brightness, contrast and saturation: 0.4 is 40 % either way."""
    hue: float = 0.0
    """Largest random hue shift in either direction, as a fraction of the colour wheel."""
    outside: str = "mean"
    """Around an image that is smaller than the crop: the "mean" colour on all sides, or "black"
    below and on the right, as in the published code."""
    workers: int | None = free(None)
    """Processes that prepare samples for each rank; none picks from the number of cores."""

    def __post_init__(self) -> None:
        require(self.data != "", "data", self.data, "a folder")
        for key in ("train_split", "val_split"):
            require(getattr(self, key) != "", key, "", "the name of a split")
        one_of("scale_by", self.scale_by, ("short", "long", "image"))
        require(min(self.crop) >= 1, "crop", self.crop, "positive")
        one_of("outside", self.outside, ("mean", "black"))
        low, high = self.scale
        fine = 0 < low <= high < math.inf
        require(fine, "scale", self.scale, "two positive numbers, the smaller first")
        require(0 <= self.rotation <= 180, "rotation", self.rotation, "in [0, 180] degrees")
        require(0 <= self.flip <= 1, "flip", self.flip, "in [0, 1]")
        fine = all(0 <= amount <= 1 for amount in self.jitter)
        require(fine, "jitter", self.jitter, "three numbers in [0, 1]")
        require(0 <= self.hue <= 0.5, "hue", self.hue, "in [0, 0.5]")
        if self.base_size is not None:
            require(self.base_size >= 1, "base_size", self.base_size, "positive or none")
        if self.workers is not None:
            allowed = 0 <= self.workers <= MAX_WORKERS
            require(allowed, "workers", self.workers, f"0 to {MAX_WORKERS} or none")

    def dataset_options(self) -> dict[str, Any]:
        """Options of `encnet_triton.data.create_dataset` that were given."""
        names = (
            "ignore_label", "label_offset", "label_map", "classes_file",
            "labels_folder", "label_order", "background_label", "num_classes",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in names}
        return {k: v for k, v in given.items() if v is not None}


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Losses, the optimizer and its schedule (paper, section 3.1)."""

    optimizer: str = "sgd"
    """sgd, as in the paper, or adamw."""
    lr: float = 0.001
    """Base learning rate for the global batch; never scaled automatically."""
    momentum: float = 0.9
    """SGD momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's averages of the gradient and of its square."""
    weight_decay: float = 1e-4
    """L2 penalty (sgd), or decoupled weight decay (adamw, where 0.01 to 0.05 is usual)."""
    decay_norm_bias: bool = True
    """Apply the penalty to batch-norm parameters and biases too, as the paper's code does."""
    layer_decay: float = 1.0
    """Learning rate of each backbone stage relative to the next one's, and of the last stage
    relative to lr; 1 trains all stages at the same rate."""
    clip_norm: float | None = None
    """Maximum gradient norm; larger gradients are scaled down to it."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999; the average is
    validated and saved too. 0 turns it off; at step t the decay is at most (1 + t) / (10 + t)."""
    schedule: str = "poly"
    """Learning-rate schedule: poly, or cosine (half a period, to zero)."""
    power: float = 0.9
    """Exponent of the poly schedule lr (1 - step / steps)^power."""
    eta_min: float = 0.0
    """Rate at the end of the schedule, which runs from lr to it; 1e-4 in mmsegmentation."""
    warmup_steps: int = 0
    """Steps of linear warm-up, half of all at most; the schedule counts from their end."""
    head_lr_scale: float = 1.0
    """Learning rate of everything outside the backbone, relative to lr."""
    epochs: int = 50
    """Passes over the training images."""
    batch_size: int = 16
    """Images of one optimiser step over all processes and accumulation steps."""
    accumulation: int = 1
    """Micro-batches whose gradients are summed in one step."""
    se_weight: float = 0.2
    """alpha, the weight of the SE losses."""
    aux_weight: float = 0.0
    """Weight of the auxiliary head's cross-entropy."""
    class_weight: str = "none"
    """Weights of the cross-entropy: none, or balanced (median frequency, capped)."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    ohem: float = 0.0
    """Online hard example mining: average the cross-entropy, per micro-batch, only over pixels
    whose class has a probability below this (0.7 is usual); 0 uses every pixel."""
    ohem_least: float = 0.0625
    """Share of a micro-batch's pixels, the hardest, that ohem always keeps."""
    dice_weight: float = 0.0
    """Weight of the Dice loss, for which all probabilities are computed at full resolution."""

    def __post_init__(self) -> None:
        for key in ("lr", "head_lr_scale", "power"):
            value = getattr(self, key)
            require(0 < value <= 1e9, key, value, "positive, and at most 1e9")
        for key in ("weight_decay", "se_weight", "aux_weight", "warmup_steps", "dice_weight"):
            value = getattr(self, key)
            require(0 <= value < math.inf, key, value, "at least 0, and finite")
        require(0 <= self.eta_min <= self.lr, "eta_min", self.eta_min, "in [0, lr]")
        for key in ("momentum", "label_smoothing", "ema", "ohem"):
            require(0 <= getattr(self, key) < 1, key, getattr(self, key), "in [0, 1)")
        for key in ("layer_decay", "ohem_least"):
            require(0 < getattr(self, key) <= 1, key, getattr(self, key), "in (0, 1]")
        fine = all(0 <= beta < 1 for beta in self.betas)
        require(fine, "betas", self.betas, "two numbers in [0, 1)")
        if self.clip_norm is not None:
            fine = math.isfinite(self.clip_norm) and self.clip_norm > 0
            require(fine, "clip_norm", self.clip_norm, "positive or none")
        for key in ("epochs", "batch_size", "accumulation"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        one_of("optimizer", self.optimizer, ("sgd", "adamw"))
        one_of("schedule", self.schedule, ("poly", "cosine"))
        one_of("class_weight", self.class_weight, ("none", "balanced"))

    def loss_options(self) -> dict[str, Any]:
        """Keyword arguments of `encnet_triton.nn.SegmentationLoss` that are not the model's."""
        names = (
            "se_weight", "aux_weight", "label_smoothing", "ohem", "ohem_least", "dice_weight"
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def unread(self) -> dict[str, str]:
        """Fields that belong to another optimizer, schedule or loss than this one, and to which."""
        others = {} if self.ohem else {"ohem_least": "ohem"}
        if self.schedule != "poly":
            others["power"] = "schedule = poly"
        if self.optimizer == "sgd":
            return {"betas": "optimizer = adamw", **others}
        return {"momentum": "optimizer = sgd", **others}


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where and how the run executes."""

    name: str = free("")
    """Folder of the run below runs; the recipe's name by default."""
    runs: str = free("runs")
    """Folder of all runs."""
    seed: int = 0
    """Seed of weights, sampling and augmentation."""
    device: str = free("auto")
    """auto, cpu or cuda."""
    amp: str = "auto"
    """bf16 autocast: on, off, or auto (on for GPUs that compute in bf16)."""
    compile: bool | str = free(False)
    """torch.compile the network; with reduce-overhead, also replay it as CUDA graphs on a GPU,
    which saves the host most launches."""
    activation_checkpointing: bool = free(False)
    """Compute stages 3 and 4 of the backbone again in the backward pass: less memory, more time."""
    sync_bn: bool = True
    """Synchronise batch normalisation over the processes."""
    resume: bool = free(False)
    """Continue from the run's last checkpoint if there is one, else start."""
    stop_at: int | None = free(None)
    """Save and stop after this many steps; the schedule stays that of the whole run."""
    init_from: str | None = None
    """Start from the weights of this checkpoint, folder or model on the Hub (hf://user/name)."""
    new_head: bool = False
    """With init_from: leave out the tensors that depend on the number of classes."""
    val_every: int = free(5)
    """Validate after this many epochs (and after the last); 0: after the last only."""
    save_every: int = free(0)
    """Also save a checkpoint every this many steps; 0: at the end of epochs only."""
    save_epochs: int = free(1)
    """Save a checkpoint every this many epochs; the last step, a stop and the best weights are
    always saved."""
    log_every: int = free(20)
    """Steps between two records in metrics.jsonl."""
    logger: str = free("none")
    """Also send the records of metrics.jsonl to tensorboard or wandb (an extra of that name)."""
    report: bool = free(True)
    """Write report.html after each validation."""
    pictures: int = free(6)
    """Validation images drawn into predictions/; 0 also leaves images out of report.html."""
    timeout: float = free(180.0)
    """Seconds without progress after which several processes give up. It applies after the first
    step; that step, a validation and a save may take 30 minutes each."""
    take_over: bool = free(False)
    """Take over the run's folder although its lock names another process; use it when that is
    gone."""
    whole_image: bool = free(False)
    """Validate on whole images instead of windows of the crop."""

    def __post_init__(self) -> None:
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        one_of("amp", self.amp, ("auto", "on", "off"))
        one_of("logger", self.logger, ("none", "tensorboard", "wandb"))
        allowed = self.compile in (True, False, REDUCE_OVERHEAD)
        require(allowed, "compile", self.compile, f"true, false or {REDUCE_OVERHEAD}")
        for key in ("val_every", "save_every", "pictures"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "at least 0")
        for key in ("log_every", "save_epochs"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 4294967295")
        limit = self.timeout
        require(10 <= limit < 1e6, "timeout", limit, "at least 10 and less than a million seconds")
        require(self.init_from != "", "init_from", "", "a checkpoint, a folder or hf://user/name")
        require(
            self.new_head <= (self.init_from is not None), "new_head", True, "given with init_from"
        )
        if self.stop_at is not None:
            require(self.stop_at >= 1, "stop_at", self.stop_at, "at least 1")


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "run": RunConfig,
}


@dataclass(kw_only=True, slots=True)
class Config:
    """All sections of one run, and the recipe they came from."""

    recipe: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig

    @property
    def classification(self) -> bool:
        """Whether this trains a CIFAR-10 network."""
        return self.model.model in CIFAR_UNITS

    def value(self, name: str) -> Any:
        """A field's value by its name alone."""
        return getattr(getattr(self, all_fields()[name][0]), name)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, sections as dictionaries."""
        return asdict(self)

    def fingerprint(self) -> dict[str, Any]:
        """Every field that alters what the run computes, by name."""
        return {
            f.name: _plain(getattr(getattr(self, section), f.name))
            for section, cls in SECTIONS.items()
            for f in fields(cls)
            if not f.metadata.get("free")
        }


def changed_fields(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the fields of two fingerprints that differ.

    A field that is newer than one of them counts as having had its default, and a field that now
    takes several values may have held a single one. A file may have been moved, with its folder.
    """
    known = all_fields()
    defaults = {name: _plain(f.default) for name, (_, f) in known.items()}
    found = []
    for key in sorted(saved.keys() | now.keys()):
        before, after = (of.get(key, defaults.get(key)) for of in (saved, now))
        moved = key in _ENDS and _same_end(before, after, _ENDS[key])
        if after not in (before, [before]) and not moved:
            found.append(key)
    return found


# How many of the last parts of a path tell a file from another.
_ENDS = {"pretrained": 1, "init_from": 2}


def _same_end(before: Any, after: Any, parts: int) -> bool:
    if not (before and after):
        return False
    ends = [PurePath(path).parts[-parts:] for path in (before, after)]
    shared = min(map(len, ends))
    return shared > 0 and ends[0][-shared:] == ends[1][-shared:]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def all_fields() -> dict[str, tuple[str, Field[Any]]]:
    """name -> (section, field), over all sections."""
    return {f.name: (section, f) for section, cls in SECTIONS.items() for f in fields(cls)}


def field_docs() -> dict[str, str]:
    """The docstring below each field, read from this file."""
    docs = {}
    for cls in SECTIONS.values():
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(node.target, ast.Name) and isinstance(after.value, ast.Constant)
                docs[node.target.id] = str(after.value.value)
    return docs
