"""Measure how time and memory grow with the volume, the cohort and the steps of IG.

    python3 benchmarks/scaling.py          # minutes
    python3 benchmarks/scaling.py --full   # up to 193×229×193 voxels and 1,000 scans; an hour

Volumes and steps: one attribution each in a fresh process, memory above the idle process. Cohorts:
heatmap.py's main on files that repeat a few scans, time above that for two scans (drawing pages),
memory of the whole process. An exponent is the slope of a line through the logarithms: 1 is linear,
0 is flat. Tables go to standard output, a picture to --plot.
"""

import argparse
import math
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import measuring
import nibabel as nib
import numpy as np
import torch

import attribution
import heatmap
import models

QUICK_SIDES = [(32, 32, 32), (48, 57, 48), (64, 76, 64), (96, 114, 96)]
FULL_SIDES = [*QUICK_SIDES, (128, 152, 128), (193, 229, 193)]
QUICK_SCANS = [10, 30, 100]
FULL_SCANS = [10, 100, 1000]
FEWEST_SCANS = 2  # their time is what a run takes whatever the cohort
QUICK_STEPS = [5, 10, 20, 40]
FULL_STEPS = [5, 10, 25, 50, 100, 200]
STEPS = 10  # of IG where the volume grows
STEPS_SIDES = (64, 76, 64)  # where the steps grow
COHORT_SIDES = (48, 57, 48)
N_FILES = 5  # that a cohort repeats


@dataclass
class Series:
    """One method's seconds and memory over a size.

    Attributes
    ----------
    method : str
    sizes, seconds, gib : list of float
    """

    method: str
    sizes: list[float]
    seconds: list[float]
    gib: list[float]

    def exponents(self) -> tuple[float, float]:
        """Return the log–log slopes of seconds and memory."""
        return tuple(
            float(np.polyfit(np.log(self.sizes), np.log(values), 1)[0])
            for values in (self.seconds, self.gib)
        )


# One attribution


def explain(model, volume, method: str, n_steps: int) -> torch.Tensor:
    """Return the map of class 1 by a method."""
    more = {"n_steps": n_steps} if method == "IG" else {}
    return attribution.METHODS[method](model, volume, 1, **more)


def measure_attribution(args: argparse.Namespace, method: str, n_steps: int) -> tuple[float, float]:
    """Return seconds and the memory in GiB above the idle process; for a fresh process."""
    model, volume = measuring.make_case(args)

    def work(*case):
        return explain(*case, method, n_steps)

    gib = measuring.added_gib(args.device, work, model, volume)
    times = [measuring.seconds(lambda: work(model, volume), args.clock) for _ in range(args.pairs)]
    return statistics.median(times), gib


def over_volumes(args: argparse.Namespace, method: str) -> Series:
    """Measure a method on growing volumes."""
    sizes, measured = [], []
    for sides in FULL_SIDES if args.full else QUICK_SIDES:
        case = argparse.Namespace(**vars(args) | {"shape": list(sides)})
        sizes.append(math.prod(sides))
        measured.append(measuring.in_fresh_process(measure_attribution, case, method, STEPS))
    return Series(method, sizes, *map(list, zip(*measured, strict=True)))


def over_steps(args: argparse.Namespace) -> Series:
    """Measure IG with growing numbers of steps."""
    case = argparse.Namespace(**vars(args) | {"shape": list(STEPS_SIDES)})
    sizes = FULL_STEPS if args.full else QUICK_STEPS
    measured = [measuring.in_fresh_process(measure_attribution, case, "IG", n) for n in sizes]
    return Series("IG", sizes, *map(list, zip(*measured, strict=True)))


# Cohorts


def make_cohort(folder: Path, model_name: str, n_scans: int) -> None:
    """Write scans that repeat a few, their CSV, and the checkpoint of a network of one fold."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(n_scans):
        path = folder / f"scan-{number:04d}.nii"
        if number < N_FILES:
            nib.save(nib.Nifti1Image(rng.random(COHORT_SIDES, np.float32), np.eye(4)), path)
        else:
            shutil.copy(folder / f"scan-{number % N_FILES:04d}.nii", path)
        rows.append(f"{path.name},{number % 2}\n")
    (folder / "data.csv").write_text("".join(rows))
    torch.manual_seed(0)
    weights = models.build_model(model_name, COHORT_SIDES).state_dict()
    torch.save(weights, folder / "state_dict_f0.pth")


def run_heatmap(args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Return the seconds and the peak memory in GiB of heatmap.py's main; for a fresh process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    options = ["--path", folder / "data.csv", "--modelpath", folder, "--model", args.model]
    options += ["--method", "LRP", "--fold", 1, "--subjects", "all", "--workers", 0]
    options += ["--outpath", folder / "maps", "--device", args.device]
    heatmap_args = heatmap.parse_args(list(map(str, options)))
    with (folder / "log").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
        seconds = measuring.seconds(lambda: heatmap.main(heatmap_args), args.clock)
    return seconds, measuring.most_resident_gib()


def over_cohorts(args: argparse.Namespace) -> Series:
    """Measure heatmap.py on growing cohorts."""
    sizes = FULL_SCANS if args.full else QUICK_SCANS
    measured = []
    with tempfile.TemporaryDirectory() as temporary:
        for n_scans in [FEWEST_SCANS, *sizes]:
            folder = Path(temporary) / str(n_scans)
            make_cohort(folder, args.model, n_scans)
            measured.append(measuring.in_fresh_process(run_heatmap, args, folder))
    (least_s, _), *larger = measured
    return Series("LRP", sizes, [s - least_s for s, _ in larger], [gib for _, gib in larger])


# What is shown


def print_series(all_series: list[Series], size_name: str) -> None:
    """Print one table; a last row holds the exponents."""
    head = [size_name, *(f"{s.method}, {unit}" for s in all_series for unit in ("s", "GiB"))]
    rows = [
        [f"{size:,}", *(f"{v[row]:.3g}" for s in all_series for v in (s.seconds, s.gib))]
        for row, size in enumerate(all_series[0].sizes)
    ]
    rows.append(["exponent", *(f"{slope:.2f}" for s in all_series for slope in s.exponents())])
    measuring.print_table(head, rows)


def plot(tables: dict[str, list[Series]], path: Path) -> None:
    """Draw seconds above memory, one column for each table, on logarithmic axes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    layout = {"figsize": (12, 7), "sharex": "col", "sharey": "row"}  # so that flat looks flat
    figure, axes = pyplot.subplots(2, len(tables), **layout)
    for column, (size_name, all_series) in enumerate(tables.items()):
        for series in all_series:
            measures = zip((series.seconds, series.gib), series.exponents(), strict=True)
            for row, (values, slope) in enumerate(measures):
                label = f"{series.method}: exponent {slope:.2f}"
                axes[row, column].loglog(series.sizes, values, "o-", label=label)
                axes[row, column].legend(loc="upper left")
        axes[1, column].set_xlabel(size_name)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, GiB")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(args: argparse.Namespace) -> None:
    """Measure, print the tables and draw the picture."""
    threads = args.threads or torch.get_num_threads()
    print(f"{args.model}, {args.device}, {threads} threads, torch {torch.__version__}\n")
    tables = {
        "voxels": [over_volumes(args, method) for method in attribution.METHODS],
        "scans": [over_cohorts(args)],
        "steps of IG": [over_steps(args)],
    }
    for size_name, all_series in tables.items():
        print_series(all_series, size_name)
    (cohorts,) = tables["scans"]
    kept_gib = 4 * math.prod(COHORT_SIDES) / measuring.GIB
    share = np.polyfit(cohorts.sizes, cohorts.gib, 1)[0] / kept_gib
    print(f"memory grows by {share:.3f} of one volume a scan")
    if args.plot is not None:
        plot(tables, args.plot)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = measuring.make_parser(__doc__)
    parser.set_defaults(model="modelT8", pairs=3)  # the smallest volumes need a shallow network
    option = parser.add_argument
    option("--plot", type=Path, help="file for the picture; left out: none")
    return measuring.parse(parser, argv)


if __name__ == "__main__":
    main(parse_args())
