"""Batch normalisation with the residual add and ReLU that follow it, and its synchronisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from encnet_triton.kernels import batch_norm_act
from encnet_triton.kernels.launch import takes_triton
from encnet_triton.nn.arguments import check_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Impl = Literal["auto", "fused", "torch"]
Activation = Literal["relu"] | None

IMPLS = ("auto", "fused", "torch")


class _BatchNormAct(_BatchNorm):
    """y = activation(batch_norm(x) + residual); shared by the 1d and 2d layers."""

    momentum: float

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
        """Whether `forward` can use statistics of an input on x's device that are there already."""
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
    ) -> Tensor:
        """Normalise over dimension 1 and return a tensor of x's shape and dtype.

        Args:
            x: B x num_features x ... .
            residual: added after the normalisation and before the activation; shape of ``x``.
            statistics: sum and M2 of ``x`` per image and channel, where `takes_statistics`.

        Raises:
            ValueError: wrong number of dimensions or channels, or training on a single value per
                channel, which has no variance.
        """
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        self._check_channels(x)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if not self._fused(x):
            return self._torch(x, residual)
        y: Tensor = batch_norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            residual=residual,
            activation=self.activation,
            group=self.group if self.training else None,
            statistics=statistics if self.training else None,
        )
        return y

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"activation={self.activation}, impl={self.impl}"
        )

    def _torch(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        # The backward of batch_norm reads its input and that of relu its own output, so that
        # neither step below overwrites anything autograd has kept.
        if residual is not None:
            y.add_(residual)
        return F.relu_(y) if self.activation == "relu" else y

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
            (kernels/README.md has the table), and "torch" otherwise, which is faster on the CPU:
            on 2 cores with AVX-512, fp32 channels_last, forward + backward, "fused" took 1.1 to 2.5
            times as long a layer.
    """


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    """Batch normalisation over B x K x C or B x K, per k, with optional residual add and ReLU.

    phi of the paper's section 2: the codewords' residual encoders (K of them, statistics over
    batch and channels). Arguments as in `BatchNormAct2d`.
    """


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
