"""Time the scripts in one process and under torchrun in two, each with one thread.

    python3 benchmarks/processes.py          # minutes
    python3 benchmarks/processes.py --full   # larger scans, more epochs and steps

A simulated cohort, four folds of modelT8; wall time as a user sees it, with the start of Python and
the pictures, which one process draws: at the small size these are most of it. Two processes that
share nothing would take half the time of one.
"""

import argparse
import functools
import tempfile
from pathlib import Path

import measuring

N_PROCESSES = 2
QUICK = {"voxel": 4, "n_scans": 32, "epochs": 2, "steps": 10}
FULL = {"voxel": 3, "n_scans": 40, "epochs": 3, "steps": 50}


def commands(folder: Path, outpath: Path, size: dict) -> dict[str, list]:
    """Return each script's command line, on the cohort in a folder."""
    cohort = ["--path", folder / "data.csv"]
    network = ["--model", "modelT8", "--device", "cpu"]
    return {
        "train_cv.py": [
            "train_cv.py", *cohort, *network, "--outpath", outpath / "run", "--fold", 4,
            "--epochs", size["epochs"], "--workers", 1,
        ],
        "heatmap.py, IG": [
            "heatmap.py", *cohort, *network, "--modelpath", outpath / "run",
            "--outpath", outpath / "maps", "--method", "IG", "--steps", size["steps"],
        ],
        "svm.py": [
            "svm.py", *cohort, "--modelpath", outpath / "run", "--outpath", outpath / "svm",
            "--workers", 1,
        ],
    }  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    size = FULL if args.full else QUICK
    run = functools.partial(measuring.run_script, threads=1)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={N_PROCESSES}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ["--n", size["n_scans"], "--voxel", size["voxel"]]
        run("simulate.py", "--outpath", folder, *options)
        alone = commands(folder, folder / "one", size)
        together = commands(folder, folder / "two", size)
        rows = []
        for work in alone:
            one_s = run(*alone[work])
            two_s = run(*torchrun, *together[work])
            rows.append([work, f"{one_s:.1f}", f"{two_s:.1f}", f"{two_s / one_s:.2f}"])
    print(f"{size['n_scans']} scans of {size['voxel']} mm, four folds, one thread a process\n")
    measuring.print_table(["", "one process, s", f"{N_PROCESSES} processes, s", "ratio"], rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--full", action="store_true", help="larger scans, more epochs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
