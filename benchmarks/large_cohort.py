"""Seconds and memory of what grows with the cohort, from the checks to the Gram matrix.

    python3 benchmarks/large_cohort.py           # 500 and 2,000 scans
    python3 benchmarks/large_cohort.py --full    # up to 50,000 scans

Scans are links to one small file, so that what is measured is the bookkeeping, not the voxels. Each
size runs in a process of its own; memory is that process's peak so far. An SVM is fitted to
invented inner products, as all the scans are one. The Gram matrix of 50,000 scans takes 20 GB and
the SVM 13 more: what the machine's memory is too small for is left out, and said.
"""

import argparse
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty

import measuring
import numpy as np

import dataset
import folds
import linear_svm
import maps
import volume_cache

SHAPE = (22, 24, 23)
QUICK_SIZES, FULL_SIZES = (500, 2000), (1000, 5000, 10_000, 50_000)
N_FEATURES = 5  # of the invented inner products, besides what each scan has alone
OWN_NORM = 20  # of the latter
TRAINING_SHARE = 0.8
ROOM_BYTES = 3e9  # beside the Gram matrix, for blocks of voxels


def measure(
    n_scans: int, shape: tuple[int, int, int], folder: Path, queue: multiprocessing.Queue
) -> None:
    """Put (step, seconds, peak memory in GB) of each step; NaN where memory is too small."""
    csv_path = measuring.write_cohort(folder, shape, n_scans)
    start = time.perf_counter()

    def done(step: str) -> None:
        nonlocal start
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        queue.put((step, time.perf_counter() - start, peak_gb))
        start = time.perf_counter()

    done("idle process")
    cohort = dataset.read_cohort(csv_path)
    done("checking")
    folds.draw_folds(cohort, 5, 0.2, 0)
    done("folds")
    with volume_cache.opened(cohort, volume_cache.locate(cohort, folder, None), 2) as volumes:
        done("decoding")
        mean = maps.RunningMean()
        for row in range(n_scans):
            mean.add(volumes[row])
        done("mean over scans")
        gram = None
        gram_bytes = 8 * n_scans**2
        if gram_bytes + ROOM_BYTES < free_bytes():
            gram, _ = linear_svm.gram_matrix(volumes)
            done("Gram matrix")
        else:
            queue.put(("Gram matrix", math.nan, gram_bytes / 1e9))
        needed_bytes = TRAINING_SHARE**2 * gram_bytes
        if gram is not None and needed_bytes + ROOM_BYTES < free_bytes():
            labels, train = invent(gram)
            start = time.perf_counter()
            linear_svm.fit_fold(gram, labels, train, 1.0)
            done("SVM of one fold")
        else:
            queue.put(("SVM of one fold", math.nan, (gram_bytes + needed_bytes) / 1e9))
    queue.put(None)


def steps_of(child: multiprocessing.Process, queue: multiprocessing.Queue) -> Iterator[tuple]:
    """Yield what a process measures; leave if it dies."""
    while True:
        try:
            step = queue.get(timeout=1)
        except Empty:
            if not child.is_alive():
                sys.exit(f"the measuring process has died ({child.exitcode})")
            continue
        if step is None:
            return
        yield step


def free_bytes() -> int:
    """Return how much memory is free; Linux tells."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))


def invent(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put invented inner products into a Gram matrix; return labels and the rows to train on."""
    rng = np.random.default_rng(0)
    labels = np.arange(len(gram)) % 2
    features = rng.standard_normal((len(gram), N_FEATURES))
    features[:, 0] += labels
    for row, own in enumerate(features):
        gram[:, row] = features @ own
    gram[np.diag_indices_from(gram)] += OWN_NORM
    return labels, np.flatnonzero(rng.random(len(gram)) < TRAINING_SHARE)


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    print("| scans | work | seconds | per 1,000 scans | peak memory, GB |\n" + "|---" * 5 + "|")
    context = multiprocessing.get_context("spawn")
    for n_scans in args.sizes or (FULL_SIZES if args.full else QUICK_SIZES):
        with tempfile.TemporaryDirectory() as name:
            queue = context.Queue()
            child = context.Process(
                target=measure, args=(n_scans, tuple(args.shape), Path(name), queue)
            )
            child.start()
            for step, seconds, peak_gb in steps_of(child, queue):
                each = f"{1000 * seconds / n_scans:.3g}"
                cells = (f"{n_scans:,}", step, f"{seconds:.3g}", each, f"{peak_gb:.2f}")
                if math.isnan(seconds):
                    cells = (f"{n_scans:,}", step, "left out", "", f"would take {peak_gb:.2f}")
                print("| " + " | ".join(cells) + " |", flush=True)
            child.join()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    option = parser.add_argument
    option("--full", action="store_true", help="up to 50,000 scans")
    option("--sizes", type=int, nargs="+", help="numbers of scans")
    option("--shape", type=int, nargs=3, default=SHAPE, help="voxels; default: 22 24 23")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
