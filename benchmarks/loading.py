"""Volumes per second that reach the training: nibabel's get_fdata() against ours.

    python3 benchmarks/loading.py           # small volumes, under a minute
    python3 benchmarks/loading.py --full    # 193×229×193 voxels

Scans are random float32 inside a ball on zero background, as .nii.gz. Epochs of both ways take
turns, with what the system keeps of files in memory and without; the table has the median epoch. An
epoch of ours is that of train_cv.py on a CPU: the file of scaled volumes, shuffled, in batches of
five. Its first epoch decodes all scans before.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import dataset
import loading
import utils
import volume_cache
import volume_file
from teams import Team

BATCH = 5
WAYS = {
    "plain": "nibabel.load(file).get_fdata()",
    "first": "first epoch, decoding",
    "later": "later epochs",
}
QUICK_SHAPE, FULL_SHAPE = (97, 115, 97), (193, 229, 193)


def write_cohort(folder: Path, shape: tuple[int, int, int], n_scans: int) -> dataset.Cohort:
    """Write scans of which nothing but the background compresses well; return their cohort."""
    rng = np.random.default_rng(0)
    sides = [np.linspace(-1, 1, side, dtype=np.float32) ** 2 for side in shape]
    is_head = np.add.outer(np.add.outer(*sides[:2]), sides[2]) < 0.6
    for index in range(n_scans):
        scan_data = is_head * (1 + 0.1 * rng.standard_normal(shape, dtype=np.float32))
        nib.save(nib.Nifti1Image(scan_data, np.eye(4)), folder / f"{index}.nii.gz")
    rows = {"path": [f"{index}.nii.gz" for index in range(n_scans)]}
    pd.DataFrame(rows | {"label": np.arange(n_scans) % 2}).to_csv(folder / "data.csv", index=False)
    return dataset.read_cohort(folder / "data.csv")


def per_second(epoch: Callable, n_scans: int) -> float:
    """Return how many volumes an epoch delivers in a second."""
    start = time.perf_counter()
    epoch()
    return n_scans / (time.perf_counter() - start)


def measure(shape: tuple[int, int, int], n_scans: int, n_epochs: int, n_workers: int) -> dict:
    """Return volumes per second of each way."""
    with tempfile.TemporaryDirectory() as name:
        cohort = write_cohort(Path(name), shape, n_scans)
        folder = volume_cache.locate(cohort, Path(name), None)

        def plain() -> None:
            for file in cohort.table["file"]:
                nib.load(file).get_fdata()

        def ours(volumes: volume_file.Volumes) -> None:
            scans = dataset.ScanDataset(cohort.table, np.arange(n_scans), volumes)
            loader = loading.training_loader(
                scans, BATCH, True, 0, shape, torch.device("cpu"), Team()
            )
            loader.batch_sampler.seed(0)
            for batch, _, _ in loader:
                assert batch.dtype == torch.float32

        def first() -> None:
            with volume_cache.opened(cohort, folder, n_workers) as volumes:
                ours(volumes)

        scan_files = [Path(file) for file in cohort.table["file"]]
        forget(scan_files)
        rates = {("first", "disk"): [per_second(first, n_scans)]}
        with volume_cache.opened(cohort, folder, n_workers) as volumes:
            ways = {"plain": plain, "later": lambda: ours(volumes)}
            for _ in range(n_epochs):
                for place, (way, epoch) in itertools.product(("disk", "memory"), ways.items()):
                    if place == "disk":
                        forget([*scan_files, volumes.path])
                    rates.setdefault((way, place), []).append(per_second(epoch, n_scans))
    return {key: statistics.median(values) for key, values in rates.items()}


def forget(paths: list[Path]) -> None:
    """Have the system read files from the disk again, as where memory is too small for them."""
    for path in paths:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    shape = FULL_SHAPE if args.full else QUICK_SHAPE
    found = measure(shape, args.n, args.epochs, args.workers)
    print(
        f"{args.n} float32 .nii.gz of {'×'.join(map(str, shape))} voxels, torch {torch.__version__}"
    )
    print("\n| way | read from | volumes per second | × get_fdata |\n|---|---|---|---|")
    for (way, place), rate in found.items():
        print(f"| {WAYS[way]} | {place} | {rate:.1f} | {rate / found['plain', place]:.1f} |")


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
