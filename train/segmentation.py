"""Training of segmentation networks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from encnet_triton.cores import usable_cores
from encnet_triton.data import (
    DATASETS,
    Augment,
    Batch,
    Dataset,
    TrainLoader,
    create_dataset,
    mean_colour,
)
from encnet_triton.data.base import few
from encnet_triton.data.check import first_look, refuse_unlabelled
from encnet_triton.data.colour import ColourJitter
from encnet_triton.data.normalisation import Normalise
from encnet_triton.inference import WHOLE_IMAGE_WARNING, Predictor
from encnet_triton.models import create_model
from encnet_triton.models.backbones import statistics_of
from encnet_triton.models.trunk import Statistics
from encnet_triton.nn import LossTerms, SegmentationLoss
from encnet_triton.pictures import panel, save_png
from encnet_triton.report import Html
from encnet_triton.report.scored import class_sections, image_sections
from encnet_triton.scoring import evaluate, score_table
from encnet_triton.scoring.metrics import Scores
from encnet_triton.scoring.segmentation import PassOn
from encnet_triton.train import run_state
from encnet_triton.train.class_weights import balanced_weights
from encnet_triton.train.config import Config, all_fields, require
from encnet_triton.train.curves import draw_curves
from encnet_triton.train.distributed import World, all_reduce_sum
from encnet_triton.train.forecast import peak_memory
from encnet_triton.train.log import Log
from encnet_triton.train.optim import make_optimizer
from encnet_triton.train.run_folder import folder_of
from encnet_triton.train.run_report import REPORT
from encnet_triton.train.run_state import Progress
from encnet_triton.train.task import Task, initial
from encnet_triton.train.transfer import Transfer
from encnet_triton.weights import load_backbone
from encnet_triton.weights.checkpoint import ModelInfo


class Part(NamedTuple):
    """A micro-batch on the device.

    ``pixels`` is what its cross-entropies are divided by: 0-d float64.
    """

    batch: Batch
    pixels: Tensor


class Segmentation(Task[Scores]):
    """A network that classifies every pixel; its score is the mean IoU.

    Raises:
        ConfigError: fields that do not go together.
        ValueError: the data set or the model refuses its options.
    """

    datasets = tuple(DATASETS)
    terms = ("loss", "segmentation", "se", "aux")

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world)
        data, optim, device = config.data, config.optim, world.device
        options = data.dataset_options()
        self.train_set = create_dataset(data.dataset, data.train_split, data.data, **options)
        self.val_set = create_dataset(data.dataset, data.val_split, data.data, **options)
        refuse_unlabelled(self.train_set, f"train_split {data.train_split!r}")
        refuse_unlabelled(self.val_set, f"val_split {data.val_split!r}")
        self.val_every = config.run.val_every
        self.images = len(self.train_set)
        names = names_digest(self.train_set, data.data)
        self.training_set = {"images": self.images, "names": names}
        classes = len(self.train_set.classes)
        self.loader = TrainLoader(
            self.train_set,
            make_augment(config, self.train_set),
            batch_size=optim.batch_size,
            seed=config.run.seed,
            workers=worker_count(config, world),
            rank=world.rank,
            world_size=world.size,
            accumulation=optim.accumulation,
            pin_memory=device.type == "cuda",
        )
        self.steps_per_epoch = len(self.loader)
        self.model = initial(config, world, lambda: self.network(classes))
        weight = None
        if optim.class_weight == "balanced":
            weight = balanced_weights(self.train_set, classes).to(device)
        self.loss = SegmentationLoss(
            classes,
            ignore_index=self.train_set.ignore_index,
            align_corners=bool(self.model.align_corners),
            class_weight=weight,
            **optim.loss_options(),
        ).to(device)
        self.optimizer = make_optimizer(self.model, optim)
        self.info = model_info(config, self.train_set, self.model)
        self._transfer = Transfer(device)
        self._jitter = ColourJitter(data.jitter, data.hue, device)
        self._normalise = Normalise(self.info.mean, self.info.std, device)

    def network(self, classes: int) -> nn.Module:
        """What is trained, with its initial weights, unless those of a checkpoint follow."""
        resumes = self.config.run.resume and (folder_of(self.config) / run_state.LAST).is_file()
        return make_model(self.config, classes, start=not resumes)

    @classmethod
    def reads(cls, config: Config) -> frozenset[str]:
        """All fields except those of CIFAR-10 networks; `create_model` and `create_dataset` refuse
        options of another network or data set."""
        others = {"width", "block", "shake_scale", *cls.unread(config)}
        return frozenset(all_fields()) - others

    @classmethod
    def unread(cls, config: Config) -> dict[str, str]:
        """Those of the optimizer, and weights and sizes of what is not there."""
        model, data, optim = config.model, config.data, config.optim
        found = config.optim.unread()
        if optim.se_weight and (model.model != "encnet" or model.se_loss is False):
            found["se_weight"] = "se_loss = true" if model.model == "encnet" else "model = encnet"
        if optim.aux_weight and not _has_aux(config):
            found["aux_weight"] = "aux = true"
        if data.scale_by == "image" and data.base_size is not None:
            found["base_size"] = "scale_by = short or long"
        if data.scale_by != "image" and data.base_size is None:
            found["scale_by"] = "base_size"
        return found

    @classmethod
    def refuse_unread(cls, config: Config, given: Iterable[str]) -> None:
        """An auxiliary head without a weight, too, which would not be trained."""
        super().refuse_unread(config, given)
        require(
            config.optim.aux_weight > 0 or not _has_aux(config),
            "aux_weight", config.optim.aux_weight,
            "above 0 (the published code has 0.2) where the network has an auxiliary head, as in "
            'form = "released"; or leave the head out with aux = false',
        )  # fmt: skip

    @classmethod
    def outlook(cls, config: Config, world: World) -> Iterator[str]:
        """Published data sets need not exist."""
        images, classes, where = image_count(config)
        optim, data = config.optim, config.data
        model = create_model(num_classes=classes, **config.model.options())
        count = sum(p.numel() for p in model.parameters())
        amount = "an unknown number of images, until it is prepared"
        if images is not None:
            steps = images // optim.batch_size * optim.epochs
            amount = f"{images:,} images ({where}), {steps:,} steps"
        yield (
            f"{config.run.name}: {config.model.model} {config.model.backbone}, {classes} classes, "
            f"{count:,} parameters"
        )
        yield (
            f"  {data.dataset} {data.train_split}: {amount}, {optim.epochs} epochs in batches of "
            f"{optim.batch_size}, lr {optim.lr:g}"
        )
        if world.main:
            size = peak_memory(config, classes, world.size) / 2**30
            place = "the GPU" if world.size == 1 else f"each of {world.size} GPUs"
            yield (
                f"  predicted, not measured: at most {size:.1f} GiB on {place}, in training steps "
                "and in validation on windows; workspaces of cuDNN, fragmentation and the scores "
                "of a whole image come on top"
            )

    def steps(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step."""
        return self.loader.epoch(epoch, start_step=start)

    def parts(self, step: list[Batch]) -> Sequence[Part]:
        """DDP averages gradients over ranks, so each divides by its share of the global count."""
        batches = self._transfer(step)
        pixels = torch.stack([self.loss.pixels_in(batch.labels) for batch in batches]).sum()
        share = (all_reduce_sum(pixels) / self.world.size).clamp(min=1e-12)
        return [Part(batch, share) for batch in batches]

    def compute(self, network: nn.Module, part: Part) -> LossTerms:
        """The losses, divided by what is labelled in the whole batch."""
        x = part.batch.images
        if self._jitter:
            x = self._jitter(x, part.batch.draws)
        x = self._normalise(x)
        with self.autocast():
            output = network(x)
        images = self.config.optim.batch_size / self.world.size
        terms: LossTerms = self.loss(output, part.batch.labels, pixels=part.pixels, images=images)
        return terms

    def names(self, step: list[Batch]) -> list[str]:
        """The files."""
        return [name for batch in step for name in batch.names]

    def records_at(self, step: int, last: int) -> bool:
        """Every ``log_every`` steps."""
        return step % self.config.run.log_every == 0 or step == last

    def predictor(self) -> Predictor:
        """The network as it is now, as evaluate would use it."""
        return Predictor(
            self.evaluated.eval(),
            self.info,
            device=self.world.device,
            whole_image=self.config.run.whole_image,
            autocast=self.dtype,
        )

    def warm_up(self) -> None:
        """One prediction, whose result is discarded."""
        self.predictor()(np.asarray(self.val_set[0].image))

    def validate(self, watch: PassOn) -> Scores:
        """As the command evaluate counts them."""
        on_gpu = self.world.device.type == "cuda"  # a CPU has no core to spare
        return evaluate(
            self.predictor(),
            self.val_set,
            rank=self.world.rank,
            world_size=self.world.size,
            workers=worker_count(self.config, self.world) if on_gpu else 0,
            watch=watch,
        )

    def note_best(self, score: Scores, progress: Progress) -> dict[str, float] | None:
        """The highest mean IoU."""
        if score.miou <= progress.best_miou:
            return None
        progress.best_miou = score.miou
        return {"miou": score.miou}

    def tell(self, score: Scores, record: dict[str, Any], log: Log) -> None:
        """Everything goes into the file, two of the figures also to the screen."""
        log.write({"kind": "val", **record, **score.as_dict(self.info.classes)})
        log.say(
            f"validation at step {record['step']} (epoch {record['epoch']}): "
            f"mIoU {score.miou:.2%}  pixAcc {score.pixel_accuracy:.2%}  "
            f"({record['seconds']:.1f} s)"
        )

    def draw(self, folder: Path) -> None:
        """Image | label | prediction of a few validation images, and the curves."""
        draw_predictions(self.predictor(), self.val_set, self.config.run.pictures, folder)
        draw_curves(folder)

    def report(self, score: Scores) -> list[Html]:
        """Classes, what is taken for what, and images unless ``pictures`` is 0."""
        sections = class_sections(score, self.info.classes)
        if self.config.run.pictures:
            sections += image_sections(self.predictor(), self.val_set, score)
        return sections

    def result(self, score: Scores, progress: Progress) -> dict[str, Any]:
        """The scores after the last step."""
        return {"step": progress.step, **score.as_dict(self.info.classes)}

    def conclude(self, score: Scores, progress: Progress, folder: Path, log: Log) -> None:
        """A table, and where to look."""
        title = f"{self.config.run.name}, last step"
        log.console.print(score_table(score, self.info.classes, title))
        where = folder / run_state.BEST
        log.say(f"best mIoU {progress.best_miou:.2%} at step {progress.best_step}: {where}")
        report = f"; report: {folder / REPORT}" if self.config.run.report else ""
        log.say(f"pictures: {folder / 'predictions'}{report}")

    def warning(self) -> str | None:
        """Warnings about validation on whole images, and about labels that look wrong."""
        said = []
        if self.config.run.whole_image:
            said.append(f"Warning: {WHOLE_IMAGE_WARNING}")
        if self.world.main:
            said += [f"Warning: {note}" for note in first_look(self.train_set)]
            if self.config.data.dataset == "folder":  # published splits are as they are
                said += _shared_images(self.train_set, self.val_set)
        return "\n".join(said) or None

    def close(self) -> None:
        """End the loader's processes."""
        self.loader.close()


def names_digest(dataset: Dataset, root: str | None) -> str:
    """A hash of the images' names in their order, wherever the data set lies."""
    found = hashlib.blake2b(digest_size=16)
    roots = [] if root is None else [str(Path(root)), str(Path(root).resolve())]
    for index in range(len(dataset)):
        name = dataset.name_of(index)
        for prefix in roots:
            name = name.removeprefix(prefix)
        if root is not None and not name.startswith("/"):  # below "."
            name = f"/{name}"
        found.update(name.encode(errors="surrogateescape") + b"\0")
    return found.hexdigest()


def make_model(config: Config, num_classes: int, *, start: bool = True) -> nn.Module:
    """The network, with ``start`` from the weights that the configuration names, if any."""
    model = create_model(num_classes=num_classes, **config.model.options())
    model.backbone.activation_checkpointing = config.run.activation_checkpointing
    if start and config.model.pretrained:
        load_backbone(model, config.model.pretrained)
    if start and config.run.init_from:
        run_state.initialise(config.run.init_from, model, num_classes, config.run.new_head)
    return model


def make_augment(config: Config, dataset: Dataset) -> Augment:
    """The one-warp augmentation of the training set."""
    data = config.data
    black = data.outside == "black"
    return Augment(
        data.crop,
        base_size=data.base_size,
        scale=data.scale,
        scale_by=data.scale_by,
        rotation=data.rotation,
        flip=data.flip,
        ignore_index=dataset.ignore_index,
        fill=(0, 0, 0) if black else mean_colour(statistics(config, dataset)[0]),
        top_left=black,
    )


def statistics(config: Config, dataset: Dataset) -> Statistics:
    """Mean and standard deviation of the images: the backbone's own, else the data set's."""
    own = statistics_of(config.model.backbone)
    return (tuple(dataset.mean), tuple(dataset.std)) if own is None else own


def model_info(config: Config, dataset: Dataset, model: nn.Module) -> ModelInfo:
    """Metadata stored with the weights, so that they can be used without this configuration."""
    data = config.data
    mean, std = statistics(config, dataset)
    return ModelInfo(
        options=dict(model.options),  # type: ignore[arg-type]
        classes=list(dataset.classes),
        palette=np.asarray(dataset.palette).tolist(),
        mean=list(mean),
        std=list(std),
        crop=list(data.crop),
        base_size=data.base_size,
        scale_by=data.scale_by,
        ignore_index=dataset.ignore_index,
        data={
            "name": data.dataset,
            "root": None if data.data is None else str(Path(data.data).resolve()),
            "split": data.val_split,
            "options": data.dataset_options(),
        },
    )


def _shared_images(train: Dataset, val: Dataset) -> list[str]:
    """A warning about images that are trained and validated on."""
    names = {train.name_of(index) for index in range(len(train))}
    both = [name for name in map(val.name_of, range(len(val))) if name in names]
    if not both:
        return []
    return [f"Warning: {len(both)} of {len(val)} validation images are trained on: {few(both, 2)}"]


def _has_aux(config: Config) -> bool:
    """Whether the network has an auxiliary head, given or by default."""
    model = config.model
    if model.aux is not None:
        return model.aux
    return model.model in ("psp", "deeplab") or (
        model.model == "encnet" and model.form == "released"
    )


def worker_count(config: Config, world: World) -> int:
    """Loader processes of this rank: as configured, else its share of the usable cores of its host.

    On the CPU the network itself needs the cores, so one process decodes ahead.
    """
    if config.data.workers is not None:
        return config.data.workers
    if world.device.type == "cpu":
        return 1
    return max(1, min(16, usable_cores() // world.local_size - 1))


def image_count(config: Config) -> tuple[int | None, int, str]:
    """(training images or None if unknown, classes, where the figures are from)."""
    data = config.data
    maker: Any = DATASETS.get(data.dataset)
    published = getattr(maker, "expected", {}).get(data.train_split)
    if data.data is None and published is not None:
        classes = len(maker.labels_for(data.num_classes or 59)[0])
        return (published[0] if published else None), classes, "as published"
    dataset = create_dataset(data.dataset, data.train_split, data.data, **data.dataset_options())
    return len(dataset), len(dataset.classes), "found"


def draw_predictions(predictor: Predictor, dataset: Dataset, count: int, folder: Path) -> None:
    """Write image | label | prediction of ``count`` images into ``predictions``."""
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset)))
    info = predictor.info
    for number, index in enumerate(chosen.round().astype(int).tolist()):
        sample = dataset[index]
        image = np.asarray(sample.image)
        picture = panel(
            image,
            sample.label,
            predictor(image).cpu().numpy(),
            info.classes,
            info.palette,
            title=Path(dataset.name_of(index)).name,
        )
        save_png(picture, folder / "predictions" / f"{number:02d}.png")
