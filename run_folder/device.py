"""What torch runs on: the device and whether it works, precision, memory, random draws."""

import ctypes
import os
import platform
import random
import re
import resource
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import conv3d

from run_folder.processes import gathered
from utils import InputError, derived_seed, local_rank, log, world_size

DRIVER_PATH = Path("/proc/driver/nvidia/version")
M_TRIM_THRESHOLD, M_MMAP_MAX, LARGEST_INT = -1, -4, 2**31 - 1  # of glibc's mallopt
CONTEXT_GB = 0.65  # measured on an H200: of a process on a GPU, besides its tensors
OLDER_BUILDS = "https://pytorch.org/get-started/previous-versions/"


def find_device(name: str | None) -> torch.device:
    """Return the device of --device (None: the first GPU if any).

    An InputError, in all processes of the job, if one of them has none, or it cannot compute.
    """
    if name not in (None, "cpu") and world_size() > 1:
        raise InputError("leave --device out under torchrun: each process takes a GPU of its own")
    device, refusal = torch.device("cpu"), ""
    try:
        device = _choose(name)
        if device.type == "cuda":
            _try(device)
    except InputError as error:
        refusal = str(error)
    refusals = [text for text in gathered(refusal) if text]
    if refusals:
        raise InputError(refusals[0])
    return device


def _choose(name: str | None) -> torch.device:
    """Return the device of that name."""
    n_gpus, n_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name is None and world_size() > 1 and 0 < n_gpus < n_here:
        advice = f"use --nproc-per-node {n_gpus}"
        raise InputError(f"this host has {n_gpus} GPUs, and {n_here} processes: {advice}")
    if name is None:
        name = f"cuda:{local_rank()}" if n_gpus else "cpu"
    try:
        device = torch.device(f"cuda:{name}" if name.isdigit() else name)
    except RuntimeError:
        raise InputError(f"--device must be a GPU index, cuda:INDEX or cpu, got {name!r}") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda" or (device.index or 0) >= n_gpus:
        fault = f"--device {name}: there is no such GPU here ({n_gpus} found)"
        raise InputError(f"{fault}; use --device cpu to run on the CPU")
    return torch.device("cuda", device.index or 0)


def _try(device: torch.device) -> None:
    """Make a GPU this process's own, and let it compute; an InputError if it cannot."""
    try:
        torch.cuda.set_device(device)
        volume = torch.ones(1, 1, 4, 4, 4).to(device)
        conv3d(volume, volume).item()
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"{device} cannot be used: {reason}. torch {torch.__version__} is built for CUDA "
            f"{torch.version.cuda}, the driver is {driver_version()}: a newer driver may help, or "
            f"a build for an older CUDA ({OLDER_BUILDS}); --device cpu does without the GPU"
        ) from None
    torch.backends.cudnn.deterministic = True  # the same kernels in every run


def driver_version() -> str:
    """Return the version of NVIDIA's driver, "unknown" where it is not told."""
    text = DRIVER_PATH.read_text() if DRIVER_PATH.is_file() else ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found[0] if found else "unknown"


def describe_device(device: torch.device) -> str:
    """Return the device's name for logs and run.json."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def gpu_versions(device: torch.device) -> dict[str, str]:
    """Return what results on a GPU depend on besides packages."""
    if device.type == "cpu":
        return {}
    cudnn = torch.backends.cudnn.version()
    return {"cuda": str(torch.version.cuda), "cudnn": str(cudnn), "driver": driver_version()}


def set_precision(name: str | None) -> None:
    """Let float32 be TF32 on a GPU ("tf32"), exact ("fp32", "bf16"), or as torch has it (None)."""
    if name is None:
        return
    for kernels in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        kernels.fp32_precision = "tf32" if name == "tf32" else "ieee"


def keep_freed_memory(device: torch.device, needed_gb: float) -> None:
    """On a CPU, keep memory that is freed, if twice of what is needed is there.

    glibc gives large pieces back to the system, which hands them out again page by page and filled
    with zeros: up to half of a training step's time. Kept, the peak is up to 2.5 times as high.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    needed_gb *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free_gb = available_gb(device)
    if 2 * needed_gb > free_gb:
        log.info("freed memory is given back: of %.3g GB, %.3g GB are free", 2 * needed_gb, free_gb)
        return
    libc = ctypes.CDLL(None)
    if libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, LARGEST_INT):
        log.info("freed memory is kept: about %.3g GB, %.3g GB are free", needed_gb, free_gb)


def available_gb(device: torch.device) -> float:
    """Return the memory in GB that this process may still take: of a GPU, its host, its cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    cgroups = Path("/proc/self/cgroup")
    for folder in cgroups.read_text().splitlines() if cgroups.is_file() else []:
        path = Path("/sys/fs/cgroup", folder.rpartition(":")[2].lstrip("/"), "memory.max")
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            used = int(path.with_name("memory.current").read_text())
            free.append(int(limit) - used)
    return min(free, default=0) / 1e9


def peak_gb(device: torch.device) -> float:
    """Return the peak memory in GB so far: of this process, or what it takes of its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9 + CONTEXT_GB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def seed_everything(*keys: int, purpose: str = "") -> None:
    """Seed torch (CPU and GPU), numpy and Python as `derived_seed` says."""
    seed = derived_seed(*keys, purpose=purpose)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries may draw from the global generator)
    torch.manual_seed(seed)


def shuffled(rows: np.ndarray, *keys: int) -> np.ndarray:
    """Return rows in an order that depends on the given integers only."""
    generator = torch.Generator().manual_seed(derived_seed(*keys))
    return rows[torch.randperm(len(rows), generator=generator).numpy()]
