"""Does rounding in training cost accuracy? Cross-validated results by precision, over seeds.

    python3 benchmarks/precision.py                         # whether it runs, a minute
    python3 benchmarks/precision.py --full                  # fp32 and bf16, scans of 5 mm, minutes
    python3 benchmarks/precision.py --full --device 0       # a GPU: every precision, 2 mm

A simulated cohort; each seed draws folds, weights and batches, the same for all precisions, so what
a precision changes is given per seed. It is noise if it is small beside how seeds differ.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import measuring
import pandas as pd
import torch

import devices

QUICK = {"voxel": 6, "n": 20, "model": "modelT8", "epochs": 3, "seeds": 2, "fold": 2}
FULL = {
    "cpu": {"voxel": 5, "n": 80, "model": "modelT8", "epochs": 40, "seeds": 3, "fold": 5},
    "cuda": {"voxel": 2, "n": 100, "model": "modelB24", "epochs": 25, "seeds": 3, "fold": 5},
}
LEARNING_RATE = 5e-4  # these cohorts are small, and so is the number of steps
MEASURES = {"accuracy": "accuracy", "roc_auc": "ROC AUC", "valid_loss": "validation loss"}


def cross_validate(
    csv_path: Path, outpath: Path, size: dict, device: str, precision: str, seed: int
) -> dict[str, float]:
    """Return what a run of train_cv.py measures over all folds."""
    options = ["--path", csv_path, "--outpath", outpath, "--model", size["model"]]
    options += ["--epochs", size["epochs"], "--lr", LEARNING_RATE, "--device", device]
    options += ["--precision", precision, "--seed", seed, "--fold", size["fold"]]
    measuring.run_script("train_cv.py", *options)
    metrics = pd.read_csv(outpath / "metrics.csv").set_index("fold").loc["pooled"]
    histories = [pd.read_csv(path) for path in outpath.glob("history_f*.csv")]
    return {
        "accuracy": metrics["accuracy"],
        "roc_auc": metrics["roc_auc"],
        "valid_loss": statistics.mean(history["valid_loss"].min() for history in histories),
        "epoch_s": statistics.median(pd.concat(histories)["seconds"]),
    }


def spread(values: pd.Series, sign: str = "") -> str:
    """Return mean ± sd."""
    return f"{values.mean():{sign}.3f} ± {values.std():.3f}"


def measure(args: argparse.Namespace, size: dict, precisions: list[str]) -> pd.DataFrame:
    """Return the results of every precision and seed."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ["--outpath", name, "--n", size["n"], "--voxel", size["voxel"]]
        measuring.run_script("simulate.py", *options)
        for seed in range(size["seeds"]):
            for precision in precisions:
                outpath = folder / f"{precision}-{seed}"
                case = folder / "data.csv", outpath, size, args.device, precision, seed
                results.append({"precision": precision, "seed": seed} | cross_validate(*case))
    return pd.DataFrame(results).set_index(["precision", "seed"])


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    device_type = devices.find_device(args.device).type
    size = FULL[device_type] if args.full else QUICK
    # on a CPU tf32 is fp32
    precisions = [p for p in devices.PRECISIONS if (p, device_type) != ("tf32", "cpu")]
    table = measure(args, size, precisions)
    head = ["precision", "s an epoch"]
    for title in MEASURES.values():
        head += [title, "against fp32"]
    rows = []
    for precision in precisions:
        of_precision = table.loc[precision]
        rows.append([precision, f"{of_precision['epoch_s'].median():.3g}"])
        for measure_name in MEASURES:
            values = of_precision[measure_name]
            rows[-1] += [spread(values), spread(values - table.loc["fp32"][measure_name], "+")]
    print(
        f"{size['n']} scans of {size['voxel']} mm, {size['model']}, at most {size['epochs']} "
        f"epochs, seeds 0 to {size['seeds'] - 1}, {args.device}, torch {torch.__version__}; "
        "mean ± sd over seeds; against fp32: of each seed's difference\n"
    )
    measuring.print_table(head, rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--full", action="store_true", help="larger scans, more of them, epochs")
    parser.add_argument("--device", default="cpu", help="a GPU index, a torch device or cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
