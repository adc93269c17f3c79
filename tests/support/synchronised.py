"""`batch_norm_act` synchronised over processes, each with its share of one batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from encnet_triton.kernels import batch_norm_act
from tests.support.batch_norm import DIFFERENTIABLE, as_dtype, call, example, gradient_of

# Images of the batch of four that each rank begins with, and the end.
SHARES = {
    "two, equal": (0, 2, 4),
    "two, unequal": (0, 3, 4),
    "two, one empty": (0, 4, 4),
    "three, unequal": (0, 1, 2, 4),
    "three, one empty": (0, 3, 3, 4),
}
# What happens to the residual.
ADDED, NORMALISED = "added", "normalised"
CALL = {"training": True, "momentum": 0.2, "eps": 1e-3}


class AllReduces(TorchDispatchMode):
    """The dtype and number of elements of every all-reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.seen.append((str(args[0].dtype), args[0].numel()))
        return func(*args, **(kwargs or {}))


def shared_batch(dtype: torch.dtype, device: str, residual: str) -> dict[str, Tensor]:
    """Four images whose means differ, so that unsynchronised statistics are far off."""
    normalised = residual == NORMALISED
    tensors = example("channels_last", torch.float64, residual=True, normalised=normalised)
    extra = tensors["x"][:1] * 3 + 5
    tensors["x"] = torch.cat([tensors["x"], extra]).contiguous(memory_format=torch.channels_last)
    tensors["residual"] = torch.cat([tensors["residual"], extra.flip(2)])
    return {name: t.to(device) for name, t in as_dtype(tensors, dtype).items()}


def _results(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    running = {name: tensor for name, tensor in leaves.items() if "running" in name}
    gradients = {f"d{n}": leaves[n].grad for n in DIFFERENTIABLE if n in leaves}
    return {"y": y.detach(), **running, **gradients}


def _require_gradients(leaves: dict[str, Tensor]) -> None:
    for name in DIFFERENTIABLE:
        if name in leaves:
            leaves[name].requires_grad_()


def alone(dtype: torch.dtype, device: str, residual: str = ADDED) -> dict[str, Tensor]:
    """What one process makes of the joined batch."""
    leaves = shared_batch(dtype, device, residual)
    _require_gradients(leaves)
    y = call(batch_norm_act, leaves, **CALL)
    y.backward(gradient_of(y))
    return _results(y, leaves)


def _rank(rank: int, folder: str, dtypes: list[torch.dtype], device: str) -> None:
    """One of three processes: its part of every split, with the all-reduces it made."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.support.interpreter import repair_interpreter

        repair_interpreter()
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3)
    groups = {2: dist.new_group([0, 1]), 3: dist.group.WORLD}
    results: dict[torch.dtype, dict[str, Any]] = {dtype: {} for dtype in dtypes}
    for dtype in dtypes:
        for residual in (ADDED, NORMALISED):
            found = _shares(rank, groups, shared_batch(dtype, device, residual))
            results[dtype] |= {f"{share}, {residual}": one for share, one in found.items()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _shares(
    rank: int, groups: dict[int, Any], whole: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    grad = gradient_of(whole["x"])
    results = {}
    for share, bounds in SHARES.items():
        size = len(bounds) - 1
        if rank >= size:
            continue
        own = slice(bounds[rank], bounds[rank + 1])
        leaves = {n: t.clone() for n, t in whole.items()}
        leaves |= {n: whole[n][own].clone() for n in ("x", "residual")}
        _require_gradients(leaves)
        with AllReduces() as forward:
            y = call(batch_norm_act, leaves, **CALL, group=groups[size])
        with AllReduces() as backward:
            y.backward(grad[own])
        collectives = {"forward": forward.seen, "backward": backward.seen}
        results[share] = collectives | _results(y, leaves)
    return results


Shares = dict[str, list[dict[str, Any]]]


def together(folder: Path, dtypes: list[torch.dtype], device: str) -> dict[torch.dtype, Shares]:
    """For every split and kind of residual, "split, kind", what each rank has at the end."""
    torch.multiprocessing.spawn(_rank, args=(str(folder), dtypes, device), nprocs=3)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(3)]
    return {
        dtype: {share: [r[dtype][share] for r in ranks if share in r[dtype]] for share in shares}
        for dtype, shares in ranks[0].items()
    }


def check_equal(parts: list[dict[str, Any]], whole: dict[str, Tensor], tolerance: float) -> None:
    """Joined outputs and summed parameter gradients are those of one process."""

    def same(name: str, ours: Tensor) -> None:
        error = (ours - whole[name]).norm() / whole[name].norm()
        assert error <= tolerance, f"{name}: relative error {error:.2g}"

    for name in whole:
        if name in ("y", "dx", "dresidual"):
            same(name, torch.cat([part[name] for part in parts]))
        elif name.startswith("d"):
            same(name, sum(part[name] for part in parts))
        else:
            for part in parts:
                same(name, part[name])


def check_collectives(parts: list[dict[str, Any]], residual: str) -> None:
    """One packed all-reduce each way: of sums for x, or for x and the residual."""
    forward, backward = {ADDED: (2 * 6 + 1, 2 * 6), NORMALISED: (2 * (2 * 6 + 1), 3 * 6)}[residual]
    for part in parts:
        assert part["forward"] == [("torch.float64", forward)]
        assert part["backward"] == [("torch.float64", backward)]
