"""What `encode` chooses to launch on each architecture; nothing runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench.static.launches import CIFAR_ENCODE_SHAPES, EncodeShape, encode_launches
from encnet_triton.kernels.encoding import plan
from encnet_triton.kernels.runtime.launch import Machine

ARCHS = (80, 89, 90, 100, 120)


@pytest.mark.parametrize("images", [1, 2, 16, 48, 67, 133, 500])
def test_programs_fill_the_chip_whatever_the_number_of_images(images: int) -> None:
    """The multiprocessor that is done last has at most a fifth more than its share of the tiles."""
    x = torch.empty(images, 3600, 512, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    codewords, scale = torch.empty(32, 512, device="meta"), torch.empty(32, device="meta")
    call, h100 = plan.Forward(x, codewords, scale, False), Machine(90, 132)
    walk = call.launches(h100, call.configs(h100)[0])[0][0]
    tiles, splits = -(-3600 // walk.constants["BN"]), walk.arguments["splits"]
    rounds = -(-images * splits // 132)
    assert rounds * -(-tiles // splits) <= max(1.2 * images * tiles / 132, 1)


def test_launches_within_the_budget() -> None:
    """At most 2 forward and 4 backward, whatever the architecture and the shape's route."""
    for arch in ARCHS:
        shape = EncodeShape(512, 32)
        assert len(encode_launches(shape, torch.bfloat16, "forward", arch)) <= 2
        assert len(encode_launches(shape, torch.bfloat16, "backward", arch)) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", CIFAR_ENCODE_SHAPES, ids=str)
def test_small_images_are_one_launch_each_way(shape: EncodeShape, dtype: torch.dtype) -> None:
    for arch in ARCHS:
        for direction in ("forward", "backward"):
            (made,) = encode_launches(shape, dtype, direction, arch, return_stats=True)
            assert made.grid == (shape.B,)


@pytest.mark.parametrize(("channels", "num"), [(512, 32), (1024, 32), (512, 64), (1024, 64)])
def test_programs_share_the_channels_only_where_they_need_no_local_memory(
    channels: int, num: int
) -> None:
    """As compiled: on sm_100 two programs with 1024 channels spill, on sm_120 any two."""
    shape = EncodeShape(channels, num)
    shared = {
        arch
        for arch in ARCHS
        if encode_launches(shape, torch.bfloat16, "forward", arch)[0].name == "forward_kernel"
    }
    every, older = set(ARCHS), {80, 89, 90}
    expected = {(512, 32): every, (1024, 32): older, (512, 64): every - {120}, (1024, 64): set()}
    assert shared == expected[channels, num]


def boxed(x: Tensor, num: int, arch: int = 90) -> list[bool]:
    """Of the candidates for x, B x N x C: which read it by tensor descriptor."""
    codewords, scale = torch.empty(num, x.shape[2]), torch.empty(num)
    call, machine = plan.Forward(x.transpose(1, 2), codewords, scale, False), Machine(arch, 132)
    assert not any(config.form == "boxed" for config in call.configs(machine))
    return [config.form == "boxed" for config in call.candidates(machine)]


@pytest.mark.parametrize("arch", ARCHS)
def test_what_no_gpu_has_run_is_measured_first_and_is_no_default(arch: int) -> None:
    x = torch.empty(16, 3600, 512, dtype=torch.bfloat16, device="meta")
    found = boxed(x, 32, arch)
    assert any(found) == (arch >= 90)
    assert found == sorted(found, reverse=True)


def test_only_what_a_tensor_descriptor_can_read_is_read_by_one() -> None:
    memory = torch.empty(2 * 100 * 520 + 8, dtype=torch.bfloat16)
    rows = memory[:-8].view(2, 100, 520)
    assert any(boxed(rows[:, :, 8:], 32))
    others = {
        "32-bit numbers": rows.float()[:, :, :512],
        "few channels": rows[:, :, :128],
        "many channels": rows,
        "few pixels": rows[:, :63, :512],
        "an odd address": rows[:, :, 1:513],
        "rows of an odd length": memory[: 2 * 100 * 516].view(2, 100, 516)[:, :, :512],
        "one image for all": rows[:1, :, :512].expand(2, -1, -1),
        "no images": rows[:0, :, :512],
    }
    assert not [name for name, x in others.items() if any(boxed(x, 32))]
    assert not any(boxed(rows[:, :, 8:], 33))
