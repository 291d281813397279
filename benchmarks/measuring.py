"""What the benchmarks share: their options, a case, times in forward passes, peak memory, a table.

The unit is one forward pass (eval, no gradient). In each pair a forward pass, the plain way and
ours run in turn in one process; figures are medians over the pairs. Peak memory is what one run
adds to the idle process, measured in a fresh process each.
"""

import argparse
import functools
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

sys.path.insert(0, str(Path(__file__).parent.parent))

import devices
import models

Work = Callable[..., Tensor]

ROOT = Path(__file__).parent.parent

QUICK = {"model": "modelA24", "shape": [110, 112, 111], "pairs": 2}  # its smallest side is 110
FULL = {"model": "modelA24", "shape": [193, 229, 193], "pairs": 1}  # the paper's
PAIRS_ON_GPU = 5
SEED = 1  # no map of either size is empty
CLOCKS = {"wall": timer, "processor": time.process_time}  # the first waits for the device
GIB = 2**30
KIB_PER_GIB = 2**20


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
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
    device = devices.select_device(args.device)
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
    device = devices.select_device(args.device)
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


def seconds(work: Callable[[], object], clock: str) -> float:
    """Return how long one call takes, until the device is done."""
    # Timer.timeit would call it twice more to warm up, and some calls take an hour
    now = CLOCKS[clock]
    start = now()
    work()
    return now() - start


def most_resident_gib() -> float:
    """Return the most memory in GiB that this process held since `forget_peak`; Linux tells.

    getrusage would not do: a fresh process starts with the peak of the one that began it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) / KIB_PER_GIB


def forget_peak() -> None:
    """Set the peak to the memory that the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def as_they_are(model: nn.Module, volume: Tensor) -> tuple:
    """Return what most ways start from."""
    return model, volume


def added_gib(device: str, work: Work, *case) -> float:
    """Return the memory in GiB that a piece of work adds to this process."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        idle = torch.cuda.memory_allocated(device)
        work(*case)
        return (torch.cuda.max_memory_allocated(device) - idle) / GIB
    forget_peak()
    idle_gib = most_resident_gib()
    work(*case)
    return most_resident_gib() - idle_gib


def measure_peak(args: argparse.Namespace, work: Work, prepare: Callable) -> float:
    """Make a case in a fresh process and return the memory in GiB that a piece of work adds."""
    return added_gib(args.device, work, *prepare(*make_case(args)))


def in_fresh_process(function: Callable, *arguments):
    """Call a function in a process of its own and return what it returns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_cohort(folder: Path, shape: Sequence[int], n_scans: int) -> Path:
    """Write one random scan, link it n_scans times, and list the links; return the CSV."""
    data = np.random.default_rng(0).random(shape, dtype=np.float32)
    nib.save(nib.Nifti1Image(data, np.eye(4)), folder / "scan.nii")
    for index in range(n_scans):
        os.link(folder / "scan.nii", folder / f"{index:05d}.nii")
    rows = "".join(f"{index:05d}.nii,{index // 2 % 2},s{index // 2}\n" for index in range(n_scans))
    (folder / "data.csv").write_text(rows)
    return folder / "data.csv"


def run_script(*command: object, threads: int | None = None) -> float:
    """Run a script of this suite with its options; return its seconds of wall time."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - start


def differences(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest difference over the expected map's maximum, and 1 − r."""
    found, expected = found.double().flatten(), expected.double().flatten()
    largest = float((found - expected).abs().max() / expected.abs().max())
    return largest, 1 - float(torch.corrcoef(torch.stack([found, expected]))[0, 1])


def compare(
    args: argparse.Namespace,
    name: str,
    ways: tuple[Work, Work],
    brief_ways: tuple[Work, Work] | None = None,
    prepare: Callable[[nn.Module, Tensor], tuple] = as_they_are,
) -> None:
    """Print a table of the plain way and ours.

    Parameters
    ----------
    args : Namespace
    name : str
        Of the work.
    ways : tuple of two callables
        The plain way and ours, from what is prepared to a map.
    brief_ways : tuple of two callables, optional
        Shorter ones that need as much memory.
    prepare : callable
        From a model and a volume to the arguments of the ways; not measured.
    """
    model, volume = make_case(args)
    case = prepare(model, volume)
    maps: dict[Work, Tensor] = {}

    @torch.no_grad()
    def forward():
        return model(volume)

    def run(work: Work):
        maps[work] = work(*case).detach()

    works = [forward, *(functools.partial(run, work) for work in ways)]
    forward()
    for work in works[1:] if torch.device(args.device).type == "cuda" else []:
        work()  # a GPU's libraries choose their kernels in the first call
    rows = [[seconds(work, args.clock) for work in works] for _ in range(args.pairs)]
    unit_s, _, ours_s = (statistics.median(column) for column in zip(*rows, strict=True))
    in_units = [statistics.median(row[column] / row[0] for row in rows) for column in (1, 2)]
    ratio = statistics.median(row[1] / row[2] for row in rows)
    expected, found = (maps[work] for work in ways)
    difference, one_minus_r = differences(found, expected)
    peaks = [in_fresh_process(measure_peak, args, work, prepare) for work in brief_ways or ways]
    print_conditions(args, unit_s)
    print_table(
        ["in forward passes", "plain", "ours", "ratio", "ours, s", "peak GiB, plain",
         "peak GiB, ours", "largest difference / maximum", "1 − r"],
        [[name, *(f"{units:.1f}" for units in in_units), f"{ratio:.1f}", f"{ours_s:.3g}",
          *(f"{peak:.2f}" for peak in peaks), f"{difference:.0e}", f"{one_minus_r:.0e}"]],
    )  # fmt: skip


def print_conditions(args: argparse.Namespace, unit_s: float) -> None:
    """Print what a table was measured with."""
    print(
        f"{args.model}, {'×'.join(map(str, args.shape))}, {args.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"pairs: {args.pairs}, {args.clock} time; "
        f"one forward pass {unit_s:.3g} s\n"
    )


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown."""
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(cells) + " |")
    print(flush=True)
