"""Which device computes, in which precision, and with how much memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from detok_pipe.latents.errors import ConfigError
from detok_pipe.pipelines.config import Precision


def resolve_device(name: str | None) -> torch.device:
    """The device of ``--device``; without one this process's GPU (CUDA, MPS), else the CPU.

    A CUDA device becomes the current one; "cuda" is the one of this process on its machine.

    Raises:
        ConfigError: torch does not know the device, or it is not there.
    """
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = "cuda"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if device.index is None:
                local = int(os.environ.get("LOCAL_RANK", "0"))
                # Some launchers show each process its own GPU only.
                device = torch.device("cuda", local % max(1, torch.cuda.device_count()))
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0].split(". ")[0]
        raise ConfigError(f"--device {name} cannot be used here: {first}") from None
    return device


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """ "bf16" or "fp32": "auto" is bf16 on CUDA and on CPUs that multiply in it (AMX, AVX-512)."""
    if precision != "auto":
        return precision
    if device.type == "cpu":
        # torch.cpu.get_capabilities is younger than the oldest torch that is supported.
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
        return "bf16" if fast else "fp32"
    return "bf16" if device.type == "cuda" else "fp32"


@contextmanager
def compute_threads(number: int | None) -> Iterator[None]:
    """Compute on a CPU with so many threads (None: as it is); the number is given back."""
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def compile_errors() -> Iterator[None]:
    """Where compiled networks run: a failure to compile becomes an error that says what to do.

    Raises:
        ConfigError: torch.compile failed; names the reason.
    """
    from torch._dynamo.exc import TorchDynamoException  # seconds to import

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).strip().split("\n\n")[0].split()).rstrip(".")
        raise ConfigError(
            f"--compile does not work here: {reason}. It needs a C++ compiler on a CPU and Triton "
            "on a GPU; leave it out to go on without"
        ) from error


def memory_used(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors have taken so far, else what the process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
