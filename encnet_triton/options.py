"""Shared by the commands of this package: options, output and exit status."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from encnet_triton.cores import usable_cores
from encnet_triton.data.loader import MAX_WORKERS, worker_failure
from encnet_triton.inference import PAPER_SCALES, Predictor, Views
from encnet_triton.inference.precision import PRECISIONS, compute_dtype
from encnet_triton.weights import CheckpointError, ModelInfo
from encnet_triton.weights.remote import SCHEME

_NO_MEMORY = re.compile(
    "DefaultCPUAllocator|not enough memory|can't allocate memory|Storage size .* overflowed"
)
_LOST = re.compile(r"gloo|NCCL|Connection (reset|closed|refused)|Broken pipe")
_FOR_SEGMENTATION = (
    "multi_scale", "scales", "flip", "whole_image", "batch", "precision", "protocol", "workers",
    "output", "report", "explain",
)  # fmt: skip


def print_anything() -> None:
    """Let any text be printed: file names with bytes that are not text, terminals without UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def exit_status(
    action: Callable[[], int | None],
    less: str = "; a smaller --batch or smaller --scales need less",
) -> int:
    """Run a command: returns its status (None is 0), or 2 after one sentence for an error that a
    user can fix.

    If several processes run, a failing one does not return: it exits at once, because the others
    may be waiting for it, and torchrun then ends them.

    Args:
        action: the command.
        less: advice about its options for when memory runs out.
    """
    print_anything()
    try:
        status = action() or 0
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except (CheckpointError, OSError, ValueError) as error:
        return _failed(str(error))
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            return _failed(f"out of memory{less}")
        if sentence := worker_failure(error):
            return _failed(sentence)
        if _together() and lost_connection(error):
            # The process that failed first has reported the reason.
            return _failed(f"another process is gone ({str(error).splitlines()[0]})")
        _end_others()
        raise
    except BaseException:
        _end_others()
        raise
    if _together():
        dist.destroy_process_group()
    return status


def _together() -> bool:
    return bool(dist.is_available() and dist.is_initialized())


def print_error(sentence: str) -> None:
    """Say why a command ends, with the rank under torchrun."""
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    print(f"{rank}error: {sentence}", file=sys.stderr)


def _failed(sentence: str, status: int = 2) -> int:
    print_error(sentence)
    if _together():
        _end_at_once(status)
    return status


def _end_others() -> None:
    """After a bug of ours: print the traceback now, because this process does not return."""
    if _together():
        traceback.print_exc()
        _end_at_once(1)


def _end_at_once(status: int) -> None:
    """Leaving the group would wait for the others, and they wait for this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or this machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def lost_connection(error: BaseException) -> bool:
    """Whether torch says that another process cannot be reached."""
    kinds = (dist.DistError,) if dist.is_available() else ()
    found = isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    return found or isinstance(error, kinds)


def make_console(**options: Any) -> Console:
    """The console of a command; names and paths are plain text, whatever brackets or colons they
    have."""
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)


class Parser(argparse.ArgumentParser):
    """Refuses with one sentence and status 2, and names the option that may have been meant.

    Its help, and that of its commands, is formatted by `Help` unless told otherwise.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": Help, **options})

    def error(self, message: str) -> NoReturn:
        said = f"{message}{self._meant(message)}"
        self.exit(2, f"error: {said}; {self.prog} --help lists the options\n")

    def _meant(self, message: str) -> str:
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        below = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(one for action in below for one in action.choices.values())]
        known = [name for one in parsers for name in one._option_string_actions]
        near = difflib.get_close_matches(unknown[1], known, 1, 0.75) if unknown else []
        return f" (did you mean {near[0]}?)" if near else ""


class Help(argparse.HelpFormatter):
    """Every option that takes a value shows its default; for None and False its text does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        said = text is None or "default" in text or not action.option_strings
        if said or any(action.default is none for none in (None, False, argparse.SUPPRESS)):
            return text
        return f"{text} (default: %(default)s)"


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Argument type of a whole number within these limits."""
    allowed = f"at least {least}" if most is None else f"{least} to {most}"

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {allowed}")
        return number

    return convert


def size(text: str) -> tuple[int, int]:
    """The type of an option that is one edge in pixels, or height x width."""
    numbers = text.split("x")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 480 or 512x1024")
    return int(numbers[0]), int(numbers[-1])


def checkpoint(text: str) -> Path | str:
    """The type of an option that names a model, as `encnet_triton.weights.load_model` takes it."""
    return text if text.startswith(SCHEME) else Path(text)


def refuse_place(path: Path, option: str) -> None:
    """Raise a ValueError if a file cannot be written, before the work rather than after it."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder, but must be a file")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option} {path}: the folder {path.parent} cannot be written to")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """`--checkpoint`, which `encnet_triton.weights.load_model` reads."""
    parser.add_argument(
        "--checkpoint", type=checkpoint, required=True,
        help="best.safetensors of a run, a model's folder, or hf://user/name",
    )  # fmt: skip


def add_predictor_options(parser: argparse.ArgumentParser, whole_image: bool = True) -> None:
    """Add the options that `make_predictor` reads; without ``whole_image``, prediction is always in
    windows."""
    if whole_image:
        parser.add_argument(
            "--whole-image",
            action="store_true",
            help="each image at once; an EncNet is exact only at the size of its training crop",
        )
    else:
        parser.set_defaults(whole_image=False)
    parser.add_argument(
        "--multi-scale",
        action="store_true",
        help="six scales and their mirror images, as in the published code",
    )
    parser.add_argument(
        "--scales", type=_scales, help="for example 0.75,1,1.25 (default: 1, the trained scale)"
    )
    parser.add_argument("--flip", action="store_true", help="mirror images as well")
    parser.add_argument(
        "--batch", type=whole(1), help="windows computed at once (default: 8, on a CPU 1)"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto",
        help="auto takes bfloat16 where the device gains; float32 is without TF32",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto takes a GPU if there is one",
    )  # fmt: skip


def add_readers(parser: argparse.ArgumentParser) -> None:
    """`--workers`, which `reader_count` reads."""
    parser.add_argument(
        "--workers", type=whole(0, MAX_WORKERS),
        help="processes that read images (default: by the cores, on a CPU 1)",
    )  # fmt: skip


def make_predictor(
    options: argparse.Namespace,
    model: nn.Module,
    info: ModelInfo,
    device: torch.device,
    released: bool = False,
) -> Predictor:
    """The predictor that the options of `add_predictor_options` ask for."""
    scales = options.scales or (PAPER_SCALES if options.multi_scale else (1.0,))
    return Predictor(
        model,
        info,
        device=device,
        whole_image=options.whole_image,
        views=Views(scales, options.flip or options.multi_scale, released),
        batch=options.batch,
        autocast=compute_dtype(options.precision, device),
    )


def reader_count(given: int | None, device: torch.device) -> int:
    """Processes that read images for this one: as given, else by the cores that it may use.

    On a CPU the network needs the cores, so one process reads ahead.
    """
    if given is not None:
        return given
    if device.type == "cpu":
        return 1
    share = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, share - 1))


def pick_device(name: str) -> torch.device:
    """This process's device, made the current one: "auto" is its GPU if there is one, else the CPU.

    Raises:
        ValueError: CUDA was requested but is not available, or there are more processes than GPUs.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was requested, but torch sees no CUDA GPU here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"process {number} of this host has no GPU, there are {count}; start one process for "
            "each, or add --device cpu"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def join_others(device: torch.device) -> tuple[int, int]:
    """Join the processes that torchrun started; returns this one's rank and how many there are."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # One may have much more to do than another; torchrun ends those that wait for a dead one.
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return rank, size


def gathered(own: list[str]) -> list[str]:
    """The texts of all processes that `join_others` joined, in the order of the texts."""
    if not _together():
        return own
    parts: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return sorted(text for part in parts for text in part)


def refuse_segmentation_options(
    options: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
    """Raise a ValueError for the first option that has no meaning for a classifier."""
    for name, value in vars(options).items():
        if name in _FOR_SEGMENTATION and value != parser.get_default(name):
            raise ValueError(
                f"--{name.replace('_', '-')} is for segmentation networks, but "
                f"{options.checkpoint} holds a classifier"
            )


def _scales(text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        message = f"{text!r} is not a list of numbers such as 0.75,1"
        raise argparse.ArgumentTypeError(message) from None
