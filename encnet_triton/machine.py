"""Facts about this machine, for the records of runs and measurements and for bug reports."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from inspect import isfunction

import torch

import encnet_triton
from encnet_triton import kernels
from encnet_triton.cores import usable_cores

PACKAGES = (
    "torch", "triton", "numpy", "pillow", "rich", "safetensors", "matplotlib", "timm",
    "huggingface_hub",
)  # fmt: skip
MINIMUM_CAPABILITY = (8, 0)  # the oldest architecture that the Triton kernels are compiled for


def versions() -> dict[str, str]:
    """Installed version of each package of interest, "not installed" if it is missing."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def triton_status(device: torch.device | None = None) -> str:
    """One sentence: whether the Triton kernels or the PyTorch code run on this machine, and why."""
    if versions()["triton"] == "not installed":
        return f"PyTorch code runs: Triton has no package here ({platform.system()})."
    if not torch.cuda.is_available() or torch.version.hip is not None:  # ROCm's are AMD's
        return "PyTorch code runs: there is no NVIDIA GPU."
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return (
            f"PyTorch code runs: the GPU is sm_{capability[0]}{capability[1]}, "
            "the Triton kernels need sm_80 or newer."
        )
    operators = (name for name in kernels.__all__ if isfunction(getattr(kernels, name)))
    return f"Triton kernels run for {', '.join(operators)}."


def cpu_name() -> str:
    """Model name of the processor, if the system provides it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def report() -> list[tuple[str, str]]:
    """(name, value) rows of everything a maintainer would ask for."""
    cores = f"{usable_cores()} of {os.cpu_count()} cores"
    rows = [
        ("encnet-triton", encnet_triton.__version__),
        ("python", platform.python_version()),
        ("system", platform.platform()),
        *versions().items(),
        ("cpu", f"{cpu_name()}, {cores}, {torch.get_num_threads()} torch threads"),
    ]
    if torch.cuda.is_available():
        rows.append(("cuda", str(torch.version.cuda)))
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            rows.append(
                (
                    f"gpu {index}",
                    f"{properties.name}, sm_{properties.major}{properties.minor}, "
                    f"{properties.total_memory / 2**30:.0f} GiB",
                )
            )
            rows.append((f"kernels {index}", triton_status(torch.device("cuda", index))))
    else:
        rows += [("gpu", "none"), ("kernels", triton_status())]
    return rows
