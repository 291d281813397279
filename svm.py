"""The baseline: a linear SVM on the voxels, in the folds of the networks; weight and pattern maps.

    python3 svm.py --path ./data.csv --modelpath ./output/ --outpath ./svm/

Each fold trains on the scans that its network trained and validated on, and is tested on the same
held-out scans. Weights say how the SVM decides; patterns (Haufe et al. 2014) what changes with its
decision, and are the ones to be read as anatomy.

Every scan is decoded once, into a folder that is removed at the end (train_cv.py on the same scans
shares it where --cache-dir is the same). It is read twice, a range of voxels of all scans at a
time, so memory grows little with the cohort, but for the Gram matrix.

Written to --outpath: SVM_weights_f*.nii.gz, SVM_pattern_f*.nii.gz and their means *_all.nii.gz with
.json, .png and .html beside them, intercepts.csv, predictions.csv, metrics.csv, splits.csv,
run.json, roc.png, mean_scan.nii.gz and svm.log.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import dataset
import utils
from comparing import linear_svm
from reporting import maps, mean_maps, metrics, pictures
from run_folder import files, folds
from run_folder.processes import run_script
from run_folder.run import RunFolder, new_record
from utils import InputError

C = 1.0
MAPS = ("weights", "pattern")
RESULTS = (
    "predictions.csv", "intercepts.csv", "metrics.csv", "roc.png", "splits.csv", maps.MEAN_SCAN,
    maps.COVERAGE,
    *(f"SVM_{name}_f*.nii.gz" for name in MAPS),
    *(f"SVM_{name}_all.{suffix}" for name in MAPS for suffix in maps.SUFFIXES),
)  # fmt: skip


def fit_folds(
    args: argparse.Namespace, cohort: dataset.Cohort, splits: pd.DataFrame, gram: np.ndarray
) -> tuple[list[linear_svm.FoldFit], pd.DataFrame]:
    """Fit and test one SVM a fold; return the fits, and a row a scan in the networks' format.

    `probability` is the logistic function of the decision: it ranks scans, but is not calibrated.
    """
    fits, tables = [], []
    for fold in utils.progress(range(folds.count(splits)), "folds"):
        is_test = (splits[f"fold_{fold}"] == "test").to_numpy()
        fits.append(linear_svm.fit_fold(gram, cohort.labels, np.flatnonzero(~is_test), args.C))
        decisions = fits[-1].decisions[is_test]
        of_fold = {"fold": fold, "probability": 1 / (1 + np.exp(-decisions)),
                   "predicted": (decisions > 0).astype(int), "decision": decisions}  # fmt: skip
        tables.append(cohort.table.loc[is_test, ["path", "label"]].assign(**of_fold))
    return fits, pd.concat(tables).sort_index()


def write_maps(
    args: argparse.Namespace, cohort: dataset.Cohort, fold_maps: np.ndarray
) -> list[Path]:
    """Write each fold's maps, (folds, kinds, D, H, W), and their means; return the latter."""
    written = []
    for name, of_folds in zip(MAPS, fold_maps.swapaxes(0, 1), strict=True):
        sidecar = {"parameters": {"C": args.C}}
        written += mean_maps.write_baseline(
            args.outpath, f"SVM_{name}", of_folds, cohort.like_img, f"SVM {name}", sidecar
        )
    return written


def write_tables(
    args: argparse.Namespace, cohort: dataset.Cohort, fits: list[linear_svm.FoldFit],
    predictions: pd.DataFrame,
) -> pd.DataFrame:  # fmt: skip
    """Write intercepts, metrics and, last, predictions; return the metrics."""
    table = metrics.metrics_table(predictions, cohort.table.get("subject"), args.seed)
    intercepts = pd.DataFrame({"intercept": [fit.intercept for fit in fits]}).rename_axis("fold")
    files.write_csv(args.outpath / "intercepts.csv", intercepts.reset_index())
    files.write_csv(args.outpath / "metrics.csv", table)
    pictures.plot_roc(args.outpath / "roc.png", predictions, table)
    files.write_csv(args.outpath / "predictions.csv", predictions)
    return table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    number = utils.number
    parser = utils.make_parser(
        __doc__, "support vector machine", *utils.OF_COHORT, "--outpath", "--seed", "--workers",
        "--cache-dir", "--overwrite",
    )  # fmt: skip
    option = parser.add_argument
    option("--C", type=number(float, above=0), default=C, help="cost of margin violations")
    folds.add_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Fit, test and map one SVM a fold, then put the folds together."""
    utils.start_log()
    if utils.world_size() > 1:
        raise InputError("svm.py runs as one process: start it without torchrun")
    cohort = dataset.read_cohort(args.path, dataset.Wanted.of(vars(args)))
    splits = folds.choose(
        args.modelpath, cohort.table, cohort.scans, args.fold, args.val_fraction, args.seed
    )
    facts = {"model": "linear SVM", "n_folds": folds.count(splits), **cohort.facts(args.path)}
    record = new_record("svm.py", vars(args), **facts)
    run = RunFolder(args.outpath, "run", record, (), RESULTS)
    if run.check(args.overwrite):
        raise InputError(f"{args.outpath} holds an SVM: choose another --outpath, or --overwrite")
    volumes = cohort.volumes(args.cache_dir or args.outpath / ".cache", args.workers)
    volumes.check_room()
    run.start(args.overwrite, {"splits.csv": splits.assign(path=cohort.table["path"])})
    utils.start_log(args.outpath / "svm.log")

    with utils.log_above_bars():
        volumes.fill()
        folds.check_scans(args.modelpath, volumes.table()["crc32"].set_axis(splits["path"]))
        gram, mean, coverage = linear_svm.gram_matrix(volumes)
        fits, predictions = fit_folds(args, cohort, splits, gram)
        coefficients = [c for f in fits for c in (f.weight_coefficients, f.pattern_coefficients)]
        fold_maps = linear_svm.combine_scans(volumes, np.array(coefficients))
        fold_maps = fold_maps.reshape(len(fits), len(MAPS), *cohort.volume_shape)
    volumes.remove(is_own=args.cache_dir is None)

    mean_maps.write_background(args.outpath, mean, coverage, cohort.like_img)
    written = write_maps(args, cohort, fold_maps)
    table = write_tables(args, cohort, fits, predictions)
    of_maps = [path for path in written if path.name.endswith(".nii.gz")]
    following = utils.command(
        "compare.py", args, maps=of_maps, run=args.outpath, outpath=args.outpath / "comparison",
    )  # fmt: skip
    with run.finish():
        finding = metrics.verdict(table).sentence
        utils.conclude(metrics.as_text(table), *written, finding, f"next: {following}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
