"""Batch normalisation with the residual add and ReLU that follow it, and its synchronisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from encnet_triton.kernels import ResidualNorm, batch_norm_act, batch_norm_act_forked
from encnet_triton.kernels.runtime.dispatch import takes_triton
from encnet_triton.nn.arguments import check_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Impl = Literal["auto", "fused", "torch"]
Activation = Literal["relu"] | None

IMPLS = ("auto", "fused", "torch")


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module would call something else, too."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


class _BatchNormAct(_BatchNorm):
    """y = activation(batch_norm(x) + residual); shared by the 1d and 2d layers."""

    momentum: float
    moves_statistics = True  # whether training changes the running statistics

    def __init__(
        self,
        num_features: int,
        activation: Activation = "relu",
        eps: float = 1e-5,
        momentum: float = 0.1,
        impl: Impl = "auto",
    ) -> None:
        check_choice("activation", activation, ("relu", None))
        check_choice("impl", impl, IMPLS)
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.activation: Activation = activation
        self.impl: Impl = impl
        self.group: ProcessGroup | None = None

    def takes_statistics(self, x: Tensor) -> bool:
        """Whether `forward` would use statistics of x that were computed before."""
        return self.training and self._fused(x)

    def _fused(self, x: Tensor) -> bool:
        if self.group is not None or self.impl == "fused":
            return True
        return self.impl == "auto" and x.is_cuda and takes_triton(x)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
        fork: bool = False,
        residual_norm: _BatchNormAct | None = None,
    ) -> Any:
        """Normalise over dimension 1 and return a tensor of x's shape and dtype, or two.

        Args:
            x: B x num_features x ... .
            residual: added after the normalisation and before the activation; shape of ``x``.
            statistics: sum and M2 of ``x`` per image and channel, where `takes_statistics`.
            fork: return the result twice, sharing its memory, one for each of the two places that
                use it; backward adds their gradients as it reads them (`batch_norm_act_forked`).
            residual_norm: a layer that ``residual`` passes first; in the same kernels where both
                layers train with them and no hook is to see what it returns.

        Raises:
            TypeError: ``x`` holds integers.
            ValueError: wrong number of dimensions or channels, a residual of another shape, or
                training on a single value per channel, which has no variance.
        """
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        self._check_channels(x)
        self._check_values(x, residual)
        norm = None
        if residual is not None and residual_norm is not None:
            if self._folds(residual_norm, x):
                norm = residual_norm._as_residual_norm()
            else:
                residual = residual_norm(residual)
        mean, var = self._running()
        of_batch = self.training or mean is None
        if not self._fused(x):
            y = self._torch(x, residual, mean, var, of_batch)
            return (y, y) if fork else y
        fused = batch_norm_act_forked if fork else batch_norm_act
        return fused(
            x,
            self.weight,
            self.bias,
            mean,
            var,
            training=of_batch,
            momentum=self.momentum,
            eps=self.eps,
            residual=residual,
            residual_norm=norm,
            activation=self.activation,
            group=self.group if self.training else None,
            statistics=statistics if of_batch else None,
        )

    def _running(self) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics of a call; counts the batch where they move."""
        mean, var = self.running_mean, self.running_var
        if self.training and not self.moves_statistics:
            # Copies, so that backward keeps the same tensors as in the first pass.
            mean, var = (None if r is None else r.clone() for r in (mean, var))
        elif self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return mean, var

    def _as_residual_norm(self) -> ResidualNorm:
        return ResidualNorm(self.weight, self.bias, *self._running(), self.momentum)

    def _folds(self, other: _BatchNormAct, x: Tensor) -> bool:
        """Whether the kernels of this layer can do what another one does to the residual."""
        if not (self.training and self._fused(x)) or other.activation is not None or hooked(other):
            return False
        ours, theirs = (
            (layer.training, layer._fused(x), layer.num_features, layer.eps, layer.group)
            + tuple(None if p is None else p.dtype for p in (layer.weight, layer.bias))
            for layer in (self, other)
        )
        return ours == theirs

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"activation={self.activation}, impl={self.impl}"
        )

    def _torch(
        self,
        x: Tensor,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        of_batch: bool,
    ) -> Tensor:
        y = F.batch_norm(
            x,
            mean,
            var,
            self.weight,
            self.bias,
            of_batch,
            self.momentum,
            self.eps,
        )
        # The backward of batch_norm reads its input and that of relu its own output, so that
        # neither step below overwrites anything autograd has kept.
        if residual is not None:
            y.add_(residual)
        return F.relu_(y) if self.activation == "relu" else y

    def _check_values(self, x: Tensor, residual: Tensor | None) -> None:
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} needs floating-point numbers, got {x.dtype}")
        if residual is not None and residual.shape != x.shape:
            raise ValueError(
                f"residual must have the input's shape {tuple(x.shape)}, "
                f"got {tuple(residual.shape)}"
            )

    def _check_channels(self, x: Tensor) -> None:
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} of {self.num_features} channels got an input of "
                f"{x.shape[1]} channels, shape {tuple(x.shape)}"
            )
        if self.training and self.group is None and x.numel() == x.shape[1]:
            raise ValueError(
                f"batch normalisation has one value per channel to train on (input of shape "
                f"{tuple(x.shape)}): use a larger batch or a larger crop"
            )


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    """Batch normalisation over B x C x H x W with optional residual add and ReLU.

    The state dict is that of ``torch.nn.BatchNorm2d``: checkpoints load both ways. Do not run
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` over a model with these layers, which would
    drop the residual and the ReLU; `set_sync_group` synchronises them.

    Args:
        num_features: C.
        activation: "relu" or None.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics.
        impl: "torch" is torch's batch norm followed by in-place add and ReLU; "fused" is
            `encnet_triton.kernels.batch_norm_act`; "auto" takes "fused" where the statistics are
            synchronised over a process group and on GPUs from sm_80 on, where it moves fewer bytes
            (docs/kernels.md has the table), and "torch" otherwise, which is faster on the CPU
            (docs/benchmarks.md).
    """


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    """Batch normalisation over B x K x C or B x K, per k, with optional residual add and ReLU.

    phi of the paper's section 2: the codewords' residual encoders (K of them, statistics over
    batch and channels). Arguments as in `BatchNormAct2d`.
    """


class BatchNormAct(_BatchNormAct):
    """The same over any B x C x ... of two dimensions or more, as ``torch.nn.SyncBatchNorm``."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"expected at least two dimensions, got shape {tuple(x.shape)}")


class BatchNormThen2d(BatchNormAct2d):
    """What timm's BatchNormAct2d becomes: batch norm, then the two children that timm calls.

    Where ``drop`` does nothing and ``act`` was a ReLU, the ReLU is this layer's activation and
    ``act`` an Identity; any other activation (ReLU6, SiLU, hard-swish, ...) stays the child it is.
    """

    act: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


_CONVERTED: dict[type[nn.Module], type[_BatchNormAct]] = {
    nn.BatchNorm1d: BatchNormAct1d,
    nn.BatchNorm2d: BatchNormAct2d,
    nn.BatchNorm3d: BatchNormAct,
    nn.SyncBatchNorm: BatchNormAct,
}
# By name: timm need not be installed.
_OF_TIMM = [("timm.layers.norm_act", name) for name in ("BatchNormAct2d", "SyncBatchNormAct")]


def convert_batchnorm(
    model: nn.Module, group: ProcessGroup | None = None, impl: Impl = "auto"
) -> nn.Module:
    """Give the batch normalisation of any model this project's kernels and synchronisation.

    Every ``torch.nn.BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm`` becomes, in place, the
    layer of this module that computes the same, without activation. timm's ``BatchNormAct2d``, a
    batch norm and an activation, becomes one whose ReLU is fused; another activation follows as
    before. Parameters, buffers, hooks and state dict stay what they are, so that an optimiser that
    holds them stays valid. Layers of this module keep their activation. Unlike ``SyncBatchNorm``,
    the result also runs on the CPU, allows shares of different sizes, and compiles in one graph.

    Args:
        model: any module, also a batch normalisation itself.
        group: the processes that share statistics in training, or None for each on its own.
        impl: see `BatchNormAct2d`.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a layer is of another class derived from torch's, whose additions would be lost,
            or keeps a cumulative average (momentum None), or ``impl="torch"`` is to be
            synchronised. Nothing is converted then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_batchnorm takes a module, got {type(model).__name__}")
    check_choice("impl", impl, IMPLS)
    if impl == "torch" and group is not None:
        raise ValueError("impl='torch' cannot be synchronised: give impl='auto' or no group")
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    for name, layer in found:
        if not isinstance(layer, _BatchNormAct) and _converted(layer) is None:
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, which is neither one of torch's own "
                "classes nor timm's BatchNormAct2d: what it adds to batch normalisation would be "
                "lost"
            )
        if layer.momentum is None:
            raise ValueError(
                f"layer {name!r} keeps a cumulative average (momentum=None), which needs a number"
            )
    for _, layer in found:
        if isinstance(layer, _BatchNormAct):
            continue
        # The same object with another class: references to the layer stay valid.
        layer.__class__ = _converted(layer)  # type: ignore[assignment]
        vars(layer).update(activation=None, group=None)
        if isinstance(layer, BatchNormThen2d):
            _fuse_relu(layer)
    set_sync_group(model, None)
    set_norm_impl(model, impl)
    set_sync_group(model, group)
    return model


def _converted(layer: nn.Module) -> type[_BatchNormAct] | None:
    """What becomes of a batch norm that is not ours; None: nothing can."""
    of = type(layer)
    if (of.__module__, of.__name__) in _OF_TIMM:
        return BatchNormThen2d
    return _CONVERTED.get(of)


def _fuse_relu(layer: BatchNormThen2d) -> None:
    if type(layer.act) is nn.ReLU and type(layer.drop) is nn.Identity:
        layer.activation = "relu"
        layer.act = nn.Identity()


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of its BatchNormAct layers as they are, also in training.

    For a second pass over a batch that has moved them already.
    """
    layers = [layer for _, layer in _layers(module)]
    before = [layer.moves_statistics for layer in layers]
    for layer in layers:
        layer.moves_statistics = False
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.moves_statistics = value


def set_sync_group(model: nn.Module, group: ProcessGroup | None) -> int:
    """Synchronise the batch statistics of a model over a process group (paper, appendix A).

    Args:
        model: any module; all its BatchNormAct layers are set.
        group: the processes that share statistics in training, or None for each on its own.

    Returns:
        How many layers were set.

    Raises:
        ValueError: a layer has ``impl="torch"``, which cannot be synchronised.
    """
    layers = _layers(model)
    if group is not None:
        for name, layer in layers:
            if layer.impl == "torch":
                raise ValueError(
                    f"layer {name!r} has impl='torch', which cannot be synchronised: "
                    f"build it with impl='auto' or 'fused'"
                )
    for _, layer in layers:
        layer.group = group
    return len(layers)


def set_norm_impl(model: nn.Module, impl: Impl) -> int:
    """Choose the implementation of every BatchNormAct layer of a model; returns how many."""
    check_choice("impl", impl, IMPLS)
    layers = _layers(model)
    for name, layer in layers:
        if impl == "torch" and layer.group is not None:
            raise ValueError(f"layer {name!r} is synchronised, which impl='torch' cannot do")
        layer.impl = impl
    return len(layers)


def _layers(model: nn.Module) -> list[tuple[str, _BatchNormAct]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNormAct)]
