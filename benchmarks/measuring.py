"""What the benchmarks share: their options, a network and a volume, time, peak memory, a table."""

import argparse
import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

import models
from run_folder import device as devices

QUICK = {"model": "modelA24", "shape": [110, 112, 111], "pairs": 2}  # its smallest side is 110
FULL = {"model": "modelA24", "shape": [193, 229, 193], "pairs": 1}  # the paper's
PAIRS_ON_GPU = 5
SEED = 1  # no map of either size is empty
CLOCKS = {"wall": timer, "processor": time.process_time}  # the first waits for the device
GIB = 2**30
KIB_PER_GIB = 2**20


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks of networks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    # fmt: off
    option("--full", action="store_true", help="the paper's model and size; minutes to hours")
    option("--model", help="default: modelA24")
    option("--shape", type=int, nargs=3, metavar="N", help="voxels; default: 110 112 111")
    option("--pairs", type=int, help="runs of each way; default: 2, with --full 1, on a GPU 5")
    option("--device", default="cpu", help="a GPU index, a torch device or cpu; default: cpu")
    option("--threads", type=int, help="default: one per core")
    option("--clock", choices=CLOCKS, default="wall",
           help="processor: of all threads, where other work shares the machine; default: wall")
    # fmt: on
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what it leaves out is quick, or the paper's with --full."""
    args = parser.parse_args(argv)
    device = devices.find_device(args.device)
    args.device = str(device)
    if device.type == "cuda" and args.clock != "wall":
        parser.error("--clock processor does not see what a GPU does")
    if device.type == "cuda" and args.pairs is None:
        args.pairs = PAIRS_ON_GPU
    for name, value in (FULL if args.full else QUICK).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def make_case(args: argparse.Namespace, seed: int = SEED) -> tuple[nn.Module, Tensor]:
    """Return a network and a volume with zero background, as skull-stripped scans have."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = devices.find_device(args.device)
    devices.set_precision("fp32")  # for forward passes too
    torch.manual_seed(seed)
    model = models.build_model(args.model, tuple(args.shape)).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):  # as after training: weights of either sign
            nn.init.normal_(module.weight)
            nn.init.uniform_(module.bias, 0.2, 0.6)
            nn.init.uniform_(module.running_var, 0.01, 0.05)
    volume = torch.rand(1, 1, *args.shape)
    volume[:, :, : args.shape[0] // 8] = 0
    return model.to(device), volume.to(device)


def write_cohort(
    folder: Path, shape: Sequence[int], n_scans: int, n_files: int = 1, suffix: str = ".nii"
) -> Path:
    """Write random balls on zero background, repeated by links, and their CSV; return that."""
    rng = np.random.default_rng(0)
    sides = [np.linspace(-1, 1, side, dtype=np.float32) ** 2 for side in shape]
    is_head = np.add.outer(np.add.outer(*sides[:2]), sides[2]) < 0.6
    rows = []
    for index in range(n_scans):
        path = folder / f"{index:05d}{suffix}"
        if index < n_files:
            scan_data = is_head * (1 + 0.1 * rng.standard_normal(shape, dtype=np.float32))
            nib.save(nib.Nifti1Image(scan_data, np.eye(4)), path)
        else:
            path.hardlink_to(folder / f"{index % n_files:05d}{suffix}")
        rows.append(f"{path.name},{index % 2}\n")
    (folder / "data.csv").write_text("".join(rows))
    return folder / "data.csv"


def seconds(work: Callable[[], object], clock: str) -> float:
    """Return how long one call takes, until the device is done."""
    # Timer.timeit would call it twice more to warm up, and some calls take an hour
    now = CLOCKS[clock]
    start = now()
    work()
    return now() - start


def most_resident_gib() -> float:
    """Return the most memory in GiB that this process held since its peak was reset; Linux tells.

    getrusage would not do: a fresh process starts with the peak of the one that began it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) / KIB_PER_GIB


def added_gib(device: str, work: Callable[[], object]) -> float:
    """Return the memory in GiB that a piece of work adds to this process at its peak."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        idle = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - idle) / GIB
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    idle_gib = most_resident_gib()
    work()
    return most_resident_gib() - idle_gib


def in_fresh_process(function: Callable, *arguments):
    """Call a function in a process of its own and return what it returns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def is_installed(package: str) -> bool:
    """Return whether an optional peer is there to be measured; say so where it is not."""
    is_there = importlib.util.find_spec(package) is not None
    if not is_there:
        print(f"{package} is not installed: no row of it\n")
    return is_there


def conditions(args: argparse.Namespace) -> str:
    """Return what a table was measured with."""
    shape = "×".join(map(str, args.shape))
    threads = args.threads or torch.get_num_threads()
    return f"{args.model}, {shape}, {args.device}, {threads} threads, torch {torch.__version__}"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown."""
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(cells) + " |")
    print(flush=True)
