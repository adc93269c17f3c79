"""The training loop: steps, validation, checkpoints, and stopping well."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from encnet_triton.data import Batch
from encnet_triton.nn import BatchNormAct1d, BatchNormAct2d, LossTerms
from encnet_triton.scoring.metrics import Scores
from encnet_triton.train import checkpoint, optim, validate
from encnet_triton.train.checkpoint import Progress
from encnet_triton.train.config import Config
from encnet_triton.train.distributed import (
    World,
    all_reduce_sum,
    check_same_weights,
    data_parallel,
    gather,
)
from encnet_triton.train.log import Log
from encnet_triton.train.meter import Meter
from encnet_triton.train.setup import Parts, compile_obstacle
from encnet_triton.train.signals import StopRequest, agree
from encnet_triton.train.transfer import Transfer
from encnet_triton.weights.checkpoint import save_model

MAX_SKIPPED = 10


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what is safe."""


class Trainer:
    """One run, from its first or resumed step to its last.

    Args:
        config: validated configuration.
        world: this process and its device.
        parts: data, network, loss and optimiser from `setup.build`.
        folder: of the run; exists.
        log: where records go.
    """

    def __init__(self, config: Config, world: World, parts: Parts, folder: Path, log: Log) -> None:
        self.config, self.world, self.parts = config, world, parts
        self.folder, self.log = folder, log
        self.device = world.device
        self.model = parts.model
        self.steps_per_epoch = len(parts.loader)
        self.steps = self.steps_per_epoch * config.optim.epochs
        self.progress = Progress()
        self.meter = Meter(self.device)
        self._transfer = Transfer(self.device)
        self._stop = StopRequest()
        self._stopping = False  # agreed by all ranks
        self._cold = False  # validation has yet to compile its own graph
        self._statistics = [
            buffer
            for module in self.model.modules()
            if isinstance(module, (BatchNormAct1d, BatchNormAct2d, nn.modules.batchnorm._BatchNorm))
            for buffer in module.buffers(recurse=False)
        ]
        self._saved_statistics = [torch.empty_like(b) for b in self._statistics]
        mean = torch.tensor(parts.train_set.mean, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(parts.train_set.std, device=self.device).view(1, 3, 1, 1)
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def restore(self) -> bool:
        """Load ``last.safetensors`` if it is there; returns whether it was.

        Raises:
            WorldError: some ranks see the file and others do not.
        """
        path = self.folder / checkpoint.LAST
        if not checkpoint.on_all_ranks(path):
            self.log.rewind(0)  # of a run that ended before its first checkpoint
            return False
        self.progress = checkpoint.load(
            path, self.world, self.model, self.parts.optimizer, self.config
        )
        self.log.rewind(self.progress.step)
        return True

    def run(self) -> Scores | None:
        """Train to the end, or to ``stop_at``, or to a signal; returns the last validation if the
        run is complete.

        Raises:
            TrainingError: `MAX_SKIPPED` steps had a loss that is not finite.
        """
        check_same_weights(self.model)
        self.network = self._wrap(self.model)
        last = min(self.steps, self.config.run.stop_at or self.steps)
        scores = None
        with self._stop:
            self.log.begin(self.steps, self.progress.step)
            self.meter.restart()
            while self.progress.step < last and not self._stopping:
                self._epoch(last)
                if self.progress.step % self.steps_per_epoch == 0 and not self._stopping:
                    scores = self._end_of_epoch()
            self.log.end()
        if self.progress.step < self.steps:
            self.log.say(
                f"stopped at step {self.progress.step} of {self.steps}, saved in {self.folder}; "
                "go on with --resume"
            )
            return None
        if scores is None:
            scores = self._validate()
        return scores

    def _wrap(self, model: nn.Module) -> nn.Module:
        # Compiled inside of DDP, not around it: DDP's own code would only break the graph. Dynamo
        # then sees the DDP it runs in and cuts the graph where DDP's buckets end, so that gradients
        # travel while the rest is computed: docs/multi_node.md has the figures.
        if self.config.run.compile:
            obstacle = compile_obstacle(self.device)
            if obstacle is None:
                model.compile()
                self._cold = True
            else:
                self.log.say(obstacle)
        if self.world.size == 1:
            return model
        return data_parallel(
            model,
            self.device,
            sync_buffers=not self.config.run.sync_bn,
            accumulation=self.config.optim.accumulation,
        )

    def _epoch(self, last: int) -> None:
        """Steps up to the end of the epoch, to ``last``, or to a request to stop."""
        epoch, start = divmod(self.progress.step, self.steps_per_epoch)
        save_every = self.config.run.save_every
        batches = self.parts.loader.epoch(epoch, start_step=start)
        while self.progress.step < last:
            with self.meter.waiting():
                micro = next(batches, None)
            if micro is None:
                return
            stop = self._step(micro)
            step = self.progress.step
            self.log.advance(step)
            if step % self.config.run.log_every == 0 or step == last:
                self._record(epoch)
            due = step == last or (save_every and step % save_every == 0)
            if stop or (due and step % self.steps_per_epoch != 0):
                self._save()
            if stop:
                # A scheduler's grace is short: no validation, even at the end of an epoch.
                self._stopping = True
                return

    def _step(self, micro: list[Batch]) -> bool:
        """One optimiser step; returns whether any rank was asked to stop."""
        self.model.train()
        optimizer = self.parts.optimizer
        micro = self._transfer(micro)
        targets = [batch.labels for batch in micro]
        pixels = torch.stack([self.parts.loss.pixels_in(t) for t in targets]).sum()
        # DDP averages gradients over ranks, so each divides by its share of the global counts.
        share = (all_reduce_sum(pixels) / self.world.size).clamp(min=1e-12)
        images = self.config.optim.batch_size / self.world.size
        torch._foreach_copy_(self._saved_statistics, self._statistics)
        total = torch.zeros((), device=self.device)
        bad = stop = False
        for index, (batch, target) in enumerate(zip(micro, targets, strict=True)):
            final = index == len(micro) - 1
            with ExitStack() as stack:
                if not final and isinstance(self.network, DistributedDataParallel):
                    stack.enter_context(self.network.no_sync())
                terms = self._forward(batch.images, target, share, images)
                total = total + terms.total.detach()
                self.meter.add(terms)
                read = agree(total, self._stop.requested) if final else None
                terms.total.backward()  # type: ignore[no-untyped-call]
                if read is not None:
                    bad, stop = read()
        self.progress.step += 1
        if bad:
            self._skip(micro)
        else:
            rate = optim.rate_at(self.progress.step - 1, self.steps, self.config.optim)
            optim.set_rate(optimizer, rate)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.meter.count(self.config.optim.batch_size)
        return stop

    def _forward(self, images: Tensor, target: Tensor, pixels: Tensor, share: float) -> LossTerms:
        x = torch.addcmul(self._shift, images, self._scale)
        x = x.contiguous(memory_format=torch.channels_last)
        dtype = self.parts.autocast
        with torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext():
            output = self.network(x)
        terms: LossTerms = self.parts.loss(output, target, pixels=pixels, images=share)
        return terms

    def _skip(self, micro: list[Batch]) -> None:
        """Leave weights and running statistics as they were before this step, and count it."""
        torch._foreach_copy_(self._statistics, self._saved_statistics)
        self.progress.skipped += 1
        if self.progress.skipped < MAX_SKIPPED:
            self.log.say(f"step {self.progress.step}: the loss is not finite; step skipped")
            return
        names = [name for rank in gather([n for b in micro for n in b.names]) for name in rank]
        saved = self.folder / checkpoint.LAST
        raise TrainingError(
            f"the loss was not finite in {MAX_SKIPPED} steps, the last of them step "
            f"{self.progress.step} with the batch {', '.join(names)}; "
            + (f"the last good state is {saved}" if saved.exists() else "nothing was saved yet")
        )

    def _record(self, epoch: int) -> None:
        summary = self.meter.summary(self.world.size)
        step = self.progress.step
        record = {
            "step": step,
            "epoch": epoch + 1,
            "lr": optim.rate_at(step - 1, self.steps, self.config.optim),
            **summary,
            "skipped": self.progress.skipped,
        }
        rate = summary["images_per_second"]
        eta = (self.steps - step) * self.config.optim.batch_size / rate if rate else None
        self.log.train(record, self.steps, eta)
        self.meter.restart()

    def _end_of_epoch(self) -> Scores | None:
        epoch = self.progress.step // self.steps_per_epoch
        every = self.config.run.val_every
        due = self.progress.step == self.steps or (every and epoch % every == 0)
        scores = self._validate() if due else None
        self._save()
        self.meter.restart()
        return scores

    def _validate(self) -> Scores:
        parts, run = self.parts, self.config.run
        if self._cold:
            validate.warm_up(parts, self.world, run.whole_image)
            gather(None)  # the clock starts when the last rank is ready
            self._cold = False
        start = time.perf_counter()
        scores = validate.validate(parts, self.world, run.whole_image)
        self.progress.validated = self.progress.step
        record = {
            "step": self.progress.step,
            "epoch": self.progress.step // self.steps_per_epoch,
            "seconds": round(time.perf_counter() - start, 3),
        }
        self.log.validation(scores, parts.info.classes, record)
        if scores.miou > self.progress.best_miou:
            self.progress.best_miou, self.progress.best_step = scores.miou, self.progress.step
            if self.world.main:
                save_model(
                    self.folder / checkpoint.BEST,
                    self.model,
                    parts.info,
                    step=self.progress.step,
                    miou=scores.miou,
                )
        if self.world.main:
            validate.draw(parts, self.world, run.pictures, run.whole_image, self.folder)
        return scores

    def _save(self) -> None:
        checkpoint.save(
            self.folder,
            self.world,
            self.model,
            self.parts.optimizer,
            self.parts.info,
            self.progress,
            self.config,
        )
