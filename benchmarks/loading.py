"""Volumes per second that reach the training: nibabel's get_fdata() against ours.

    python3 benchmarks/loading.py           # small volumes, under a minute
    python3 benchmarks/loading.py --full    # 193×229×193 voxels

Scans are random float32 inside a ball on zero background, as .nii.gz. Epochs of both ways take
turns, with what the system keeps of files in memory and without; the table has the median epoch. An
epoch of ours is that of train_cv.py on a CPU: from the folder of decoded scans, in batches of five.
Its first epoch decodes all scans before. Where MONAI is installed, its datasets that keep decoded
scans deliver the same batches, by the faster of no and two worker processes.
"""

import argparse
import functools
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

sys.path.pop(0)  # this folder: some scripts have names of packages
sys.path.insert(0, str(Path(__file__).parent.parent))

import dataset
import utils
from benchmarks import measuring
from run_folder import device as devices
from train_cv import BATCH

WAYS = {
    "plain": "nibabel.load(file).get_fdata()",
    "first": "first epoch, decoding",
    "later": "later epochs",
    "CacheDataset": "MONAI CacheDataset, later epochs",
    "PersistentDataset": "MONAI PersistentDataset, later epochs",
}
MONAI_WORKERS = (0, 2)
PLACES = ("disk", "memory")
QUICK_SHAPE, FULL_SHAPE = (97, 115, 97), (193, 229, 193)


def per_second(epoch: Callable, n_scans: int) -> float:
    """Return how many volumes an epoch delivers in a second."""
    start = time.perf_counter()
    epoch()
    return n_scans / (time.perf_counter() - start)


def monai_loaders(scans: list[str], folder: Path) -> dict[tuple[str, str], Iterable]:
    """Return loaders of batches, by dataset and a note of the workers, with all scans decoded."""
    from monai.data import CacheDataset, DataLoader, PersistentDataset
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, ScaleIntensity

    transform = Compose([LoadImage(), EnsureChannelFirst(), ScaleIntensity()])
    persistent = PersistentDataset(scans, transform, folder)
    for index in range(len(scans)):
        persistent[index]
    sets = {
        "CacheDataset": CacheDataset(scans, transform, progress=False),
        "PersistentDataset": persistent,
    }
    return {
        (name, f", {n} workers"): DataLoader(
            scan_set, batch_size=BATCH, shuffle=True, num_workers=n, persistent_workers=n > 0
        )
        for name, scan_set in sets.items()
        for n in MONAI_WORKERS
    }


def measure(shape: tuple[int, int, int], n_scans: int, n_epochs: int, n_workers: int) -> dict:
    """Return volumes per second, by way and what is read from, with a note of the workers."""
    with tempfile.TemporaryDirectory() as name:
        csv_path = measuring.write_cohort(Path(name), shape, n_scans, n_scans, ".nii.gz")
        cohort = dataset.read_cohort(csv_path)
        volumes = cohort.volumes(Path(name) / "cache", n_workers)
        rows = devices.shuffled(np.arange(n_scans), 0)

        def plain() -> None:
            for scan in cohort.scans:
                nib.load(scan).get_fdata()

        def ours() -> None:
            volumes.fill()
            for batch, _ in volumes.batches(rows, BATCH, torch.device("cpu")):
                assert batch.dtype == torch.float32

        scan_paths = [Path(scan) for scan in cohort.scans]
        forget(scan_paths)
        rates = {("first", "disk", ""): [per_second(ours, n_scans)]}

        def theirs(loader: Iterable) -> None:
            for batch in loader:
                assert batch.dtype == torch.float32

        ways = {("plain", ""): plain, ("later", ""): ours}
        kept = Path(name) / "monai"
        if measuring.is_installed("monai"):
            for way, loader in monai_loaders(cohort.scans, kept).items():
                ways[way] = functools.partial(theirs, loader)
        for _ in range(n_epochs):
            for place, ((way, note), epoch) in itertools.product(PLACES, ways.items()):
                if (way, place) == ("CacheDataset", "disk"):
                    continue  # it holds all scans itself
                if place == "disk":
                    forget([*scan_paths, *volumes.paths, *kept.glob("*.pt")])
                rates.setdefault((way, place, note), []).append(per_second(epoch, n_scans))
    found: dict[tuple[str, str], tuple[float, str]] = {}
    for (way, place, note), values in rates.items():
        rate = statistics.median(values), note
        found[way, place] = max(found.get((way, place), rate), rate)  # the faster workers
    return found


def forget(paths: list[Path]) -> None:
    """Have the system read files from the disk again, as where memory is too small for them."""
    for path in paths:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    devices.keep_freed_memory(torch.device("cpu"), needed_gb=0)  # as train_cv.py does
    shape = FULL_SHAPE if args.full else QUICK_SHAPE
    found = measure(shape, args.n, args.epochs, args.workers)
    print(f"{args.n} float32 .nii.gz of {'×'.join(map(str, shape))} voxels\n")
    rows = [
        [WAYS[way] + note, place, f"{rate:.1f}", f"{rate / found['plain', place][0]:.1f}"]
        for (way, place), (rate, note) in found.items()
    ]
    measuring.print_table(["way", "read from", "volumes per second", "× get_fdata"], rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--full", action="store_true", help="volumes of the paper's size")
    parser.add_argument("--n", type=int, default=20, help="scans")
    parser.add_argument("--epochs", type=int, default=5, help="later epochs")
    parser.add_argument("--workers", type=int, default=utils.N_WORKERS, help="to decode with")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
