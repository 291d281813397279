"""The device that computes, and how it rounds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import ranks
from errors import InputError

PRECISIONS = ("fp32", "tf32", "bf16")
FLOAT32_KERNELS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # may round to TF32


def find_device(name: str | None) -> torch.device:
    """Return the torch device that `--device` asks for.

    Parameters
    ----------
    name : str or None
        A GPU index ("0"), a torch device ("cuda:1"), "cpu", or None for the first GPU if any.

    Raises
    ------
    InputError
        If there is no such device; a GPU that is not there is never replaced by the CPU.
    """
    n_gpus, local_rank = torch.cuda.device_count(), ranks.local_rank()
    if name is None:
        if 0 < n_gpus <= local_rank:
            raise InputError(f"this host has {n_gpus} GPUs: use --nproc-per-node {n_gpus}")
        return torch.device(f"cuda:{local_rank}" if n_gpus else "cpu")
    try:
        device = torch.device(f"cuda:{name}" if name.isdigit() else name)
    except RuntimeError:
        raise InputError(f"--device must be a GPU index, cuda:INDEX or cpu, got {name!r}") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: there is no such GPU here ({torch.cuda.device_count()} found); "
            "use --device cpu to run on the CPU"
        )
    if ranks.world_size() > 1:
        raise InputError("leave --device out under torchrun: each process takes a GPU of its own")
    return torch.device("cuda", device.index or 0)


def select_device(name: str | None) -> torch.device:
    """Return the device that `--device` asks for; from now on "the GPU" is that one.

    Parameters
    ----------
    name : str or None
        See `find_device`.
    """
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def describe_device(device: torch.device) -> str:
    """Return the device's name for logs and run.json."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def set_precision(name: str) -> None:
    """Let convolutions and matrix products of float32 round to TF32 on a GPU, or keep them exact.

    Parameters
    ----------
    name : str
        "tf32", or "fp32" or "bf16": both keep float32 exact where it is used.
    """
    rounding = "tf32" if name == "tf32" else "ieee"
    for kernels in FLOAT32_KERNELS:
        kernels.fp32_precision = rounding


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep float32 exact on a GPU for the time of a block."""
    before = [kernels.fp32_precision for kernels in FLOAT32_KERNELS]
    set_precision("fp32")
    try:
        yield
    finally:
        for kernels, rounding in zip(FLOAT32_KERNELS, before, strict=True):
            kernels.fp32_precision = rounding
