"""Measure how time and memory grow with the volume, the cohort and the steps of IG.

    python3 benchmarks/scaling.py          # minutes
    python3 benchmarks/scaling.py --full   # up to 193×229×193 voxels and 1,000 scans; an hour

Volumes and steps: one attribution each in a fresh process, memory above the idle process. Cohorts:
heatmap.py's main on files that repeat a few scans, time above that for two scans (drawing pages),
memory of the whole process. An exponent is the slope of a line through the logarithms: 1 is linear,
0 is flat.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.pop(0)  # this folder: some scripts have names of packages
sys.path.insert(0, str(Path(__file__).parent.parent))

import attribution
import heatmap
import models
from benchmarks import measuring

QUICK = {
    "sides": [(32, 32, 32), (48, 57, 48), (64, 76, 64), (96, 114, 96)],
    "scans": [10, 30, 100],
    "steps": [5, 10, 20, 40],
}
FULL = {
    "sides": [*QUICK["sides"], (128, 152, 128), (193, 229, 193)],
    "scans": [10, 100, 1000],
    "steps": [5, 10, 25, 50, 100, 200],
}
FEWEST_SCANS = 2  # their time is what a run takes whatever the cohort
STEPS = 10  # of IG where the volume grows
STEPS_SIDES = (64, 76, 64)  # where the steps grow
COHORT_SIDES = (48, 57, 48)
N_FILES = 5  # that a cohort repeats


def measure_attribution(
    args: argparse.Namespace, method: str, sides: tuple, n_steps: int
) -> tuple[float, float]:
    """Return seconds and the memory in GiB above the idle process; for a fresh process."""
    model, volume = measuring.make_case(argparse.Namespace(**vars(args) | {"shape": sides}))
    steps = (n_steps,) if method == "IG" else ()

    def work() -> None:
        attribution.METHODS[method](model, volume, 1, *steps)

    gib = measuring.added_gib(args.device, work)
    times = [measuring.seconds(work, args.clock) for _ in range(args.pairs)]
    return statistics.median(times), gib


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


def measure_cohort(args: argparse.Namespace, n_scans: int) -> tuple[float, float]:
    """Explain a cohort by a network of one fold; return seconds and GiB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measuring.write_cohort(folder, COHORT_SIDES, n_scans, N_FILES)
        torch.manual_seed(0)
        weights = models.build_model(args.model, COHORT_SIDES).state_dict()
        torch.save(weights, folder / "state_dict_f0.pth")
        return measuring.in_fresh_process(run_heatmap, args, folder)


def print_growth(size_name: str, sizes: list[int], columns: dict[str, list[float]]) -> None:
    """Print one table; a last row holds the exponents."""
    rows = [
        [f"{size:,}", *(f"{values[row]:.3g}" for values in columns.values())]
        for row, size in enumerate(sizes)
    ]
    slopes = (np.polyfit(np.log(sizes), np.log(values), 1)[0] for values in columns.values())
    rows.append(["exponent", *(f"{slope:.2f}" for slope in slopes)])
    measuring.print_table([size_name, *columns], rows)


def main(args: argparse.Namespace) -> None:
    """Measure, and print the tables."""
    threads = args.threads or torch.get_num_threads()
    print(f"{args.model}, {args.device}, {threads} threads, torch {torch.__version__}\n")
    sizes = FULL if args.full else QUICK

    def attributions(method: str, cases: list[tuple]) -> dict[str, list[float]]:
        measured = [
            measuring.in_fresh_process(measure_attribution, args, method, *case) for case in cases
        ]
        names = (f"{method}, s", f"{method}, GiB")
        return dict(zip(names, map(list, zip(*measured, strict=True)), strict=True))

    columns = {}
    for method in attribution.METHODS:
        columns |= attributions(method, [(sides, STEPS) for sides in sizes["sides"]])
    print_growth("voxels", list(map(math.prod, sizes["sides"])), columns)
    columns = attributions("IG", [(STEPS_SIDES, n_steps) for n_steps in sizes["steps"]])
    print_growth("steps of IG", sizes["steps"], columns)
    (least_s, _), *measured = [measure_cohort(args, n) for n in (FEWEST_SCANS, *sizes["scans"])]
    cohorts_gib = [gib for _, gib in measured]
    columns = {"LRP, s": [s - least_s for s, _ in measured], "LRP, GiB": cohorts_gib}
    print_growth("scans", sizes["scans"], columns)
    kept_gib = 4 * math.prod(COHORT_SIDES) / measuring.GIB
    share = np.polyfit(sizes["scans"], cohorts_gib, 1)[0] / kept_gib
    print(f"memory grows by {share:.3f} of one volume a scan")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = measuring.make_parser(__doc__)
    parser.set_defaults(model="modelT8", pairs=3)  # the smallest volumes need a shallow network
    return measuring.parse(parser, argv)


if __name__ == "__main__":
    main(parse_args())
