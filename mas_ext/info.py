"""What runs on this machine: backend, why not a better one, versions, threads, GPU."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from mas_ext.kernels import backends


def info() -> dict[str, Any]:
    """The backend in use and everything that decided it.

    Returns:
        backend: "native" or "reference" (plain PyTorch); cpu_instruction_set: the CPU kernels' choice;
        threads: of the CPU kernels; cuda_kernels: whether the extension has them; cuda_architectures: what they
        were built for, such as "90-real", or "75-virtual" (PTX, which a GPU's driver translates); gpu: its name
        or None; why_not: reasons why something better is not in use; versions of mas_ext, torch, CUDA, Python.
    """
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    reasons = [backends.why_not(cpu)] if backends.WHY_NOT else [backends.why_not(cuda)]
    if gpu is None:
        reasons.append(
            "torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        )
    return {
        "mas_ext": version("mas_ext"),
        "backend": "reference" if backends.WHY_NOT else "native",
        "why_not": [reason for reason in reasons if reason],
        "cpu_instruction_set": backends.instruction_set(),
        "threads": torch.get_num_threads(),
        "cuda_kernels": backends.why_not(cuda) is None,
        "cuda_architectures": backends.cuda_architectures(),
        "gpu": gpu,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
