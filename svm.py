"""The baseline: a linear SVM on the voxels, in the folds of the networks; weight and pattern maps.

    python3 svm.py --path ./data.csv --modelpath ./output/ --outpath ./svm/

Each fold trains on the scans that its network trained and validated on, and is tested on the same
held-out scans. Weights say how the SVM decides; patterns (Haufe et al. 2014) what changes with its
decision, and are the ones to be read as anatomy.

Every scan is decoded once, into one file of scaled volumes that is removed at the end (train_cv.py
on the same scans shares it where --cache-dir is the same). That file is read twice, a range of
voxels of all scans at a time, so memory grows little with the cohort, but for the Gram matrix.
Folds that are finished are not fitted again; --only-fold and torchrun work as for train_cv.py.

Written to --outpath: SVM_weights_f*.nii.gz, SVM_pattern_f*.nii.gz and their means *_all.nii.gz with
.json, .png and .html beside them, predictions.csv, metrics.csv, splits.csv, run.json, roc.png,
mean_scan.nii.gz and svm.log.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

import dataset
import files
import fold_state
import folds
import linear_svm
import map_files
import metrics
import pictures
import ranks
import report
import run_record
import runs
import utils
import volume_cache
from errors import InputError
from linear_svm import FoldFit
from locks import one_writer
from utils import log
from volume_file import Volumes

C = 1.0
N_FOLDS = 5
VAL_FRACTION = 0.2
MAPS = ("weights", "pattern")

RUN = runs.RunKind(
    record_name="run.json",
    options=("C", "fold", "val_fraction", "seed"),
    results=(
        r"predictions(_f\d+)?\.csv",
        r"SVM_(weights|pattern)_(f\d+\.nii\.gz|all\.(nii\.gz|json|png|html))",
        r"metrics\.csv",
        r"roc\.png",
    ),
    shared=r"mean_scan\.nii\.gz",
)


# Runs and folds


def choose_splits(args: argparse.Namespace, cohort: dataset.Cohort) -> pd.DataFrame:
    """Return the network's folds, or folds drawn as train_cv.py would."""
    if args.modelpath is None:
        return folds.draw_folds(cohort, args.fold, args.val_fraction, args.seed)
    if not args.modelpath.is_dir():
        raise InputError(f"there is no folder --modelpath {args.modelpath}")
    return folds.read_splits(args.modelpath / "splits.csv", cohort)


def start_run(
    args: argparse.Namespace, cohort: dataset.Cohort, cache_folder: Path
) -> tuple[dict, pd.DataFrame, list[int]]:
    """Take up the run in --outpath, or begin one; return record, splits and folds to fit."""
    splits = choose_splits(args, cohort)
    n_folds = folds.count(splits)
    if args.only_fold is not None and args.only_fold >= n_folds:
        raise InputError(f"--only-fold {args.only_fold}: the folds are 0 to {n_folds - 1}")
    record = run_record.new_record(args, cohort, "svm.py", "linear SVM") | {"n_folds": n_folds}
    if args.modelpath is not None:
        splits_path = args.modelpath / "splits.csv"
        record["modelpath_sha256"] = {splits_path.name: files.sha256(splits_path)}
    _, is_new = runs.open_run(args, cohort, record, RUN)
    wanted = range(n_folds) if args.only_fold is None else [args.only_fold]

    def unfinished() -> list[int]:
        return [i for i in wanted if not fold_state.is_finished(args.outpath, i)]

    if is_new or unfinished():
        volume_cache.check_room(cohort, cache_folder)
    record, splits = runs.start_run(args, cohort, record, RUN, splits)
    return record, splits, unfinished()


def fit_folds(
    args: argparse.Namespace, cohort: dataset.Cohort, splits: pd.DataFrame, todo: list[int],
    volumes: Volumes,
) -> None:  # fmt: skip
    """Fit, test and map one SVM a fold, and write each fold's files."""
    if volumes.n_nonfinite.any():
        log.warning("%d non-finite voxels set to 0", volumes.n_nonfinite.sum())
    labels = cohort.table["label"].to_numpy()
    gram, mean = linear_svm.gram_matrix(volumes)
    mine = {
        fold: linear_svm.fit_fold(
            gram, labels, np.flatnonzero(splits[f"fold_{fold}"] != "test"), args.C
        )
        for fold in utils.progress(todo[ranks.rank() :: ranks.world_size()], "folds")
    }
    fits = {fold: fit for part in ranks.gathered(mine) for fold, fit in part.items()}
    coefficients = [
        of_fold
        for fold in todo
        for of_fold in (fits[fold].weight_coefficients, fits[fold].pattern_coefficients)
    ]
    maps = linear_svm.combine_scans(volumes, np.array(coefficients))
    if ranks.is_first():
        shape, like_img = cohort.volume_shape, cohort.like_img
        files.write_map(args.outpath / "mean_scan.nii.gz", mean.reshape(shape), like_img)
        for fold, fold_maps in zip(todo, maps.reshape(len(todo), len(MAPS), *shape), strict=True):
            rows = np.flatnonzero(splits[f"fold_{fold}"] == "test")
            predictions = predictions_table(cohort, fold, rows, fits[fold])
            write_fold(args.outpath, cohort, fold, fold_maps, predictions)


def predictions_table(
    cohort: dataset.Cohort, fold: int, rows: np.ndarray, fit: FoldFit
) -> pd.DataFrame:
    """Return one row a test scan of a fold, in the networks' format.

    `probability` is the logistic function of the decision value: it ranks the scans, but is not
    calibrated.
    """
    decisions = fit.decisions[rows]
    return pd.DataFrame(
        {
            "path": cohort.table["path"].iloc[rows].to_numpy(),
            "label": cohort.table["label"].iloc[rows].to_numpy(),
            "fold": fold,
            "probability": 1 / (1 + np.exp(-decisions)),
            "predicted": (decisions > 0).astype(int),
            "decision": decisions,
        }
    )


def write_fold(
    outpath: Path, cohort: dataset.Cohort, fold: int, fold_maps: np.ndarray,
    predictions: pd.DataFrame,
) -> None:  # fmt: skip
    """Write a fold's maps and, last, its predictions, which say that it is finished."""
    for name, map_data in zip(MAPS, fold_maps, strict=True):
        files.write_map(outpath / f"SVM_{name}_f{fold}.nii.gz", map_data, cohort.like_img)
    files.write_csv(outpath / f"predictions_f{fold}.csv", predictions)


# All folds


def assemble(
    args: argparse.Namespace, cohort: dataset.Cohort, n_folds: int
) -> tuple[pd.DataFrame, list[Path]]:
    """Put the folds together from their files; return the metrics and the paths of the maps."""
    columns = metrics.PREDICTION_COLUMNS | {"decision": float}
    paths = cohort.table["path"]
    predictions = metrics.gather_predictions(args.outpath, range(n_folds), paths, columns)
    table = metrics.metrics_table(predictions, cohort.subjects, args.seed)
    files.write_csv(args.outpath / "predictions.csv", predictions)
    files.write_csv(args.outpath / "metrics.csv", table)
    pictures.plot_roc(args.outpath / "roc.png", predictions, table)
    background_path = args.outpath / "mean_scan.nii.gz"
    background_data = map_files.read_map(background_path, cohort.volume_shape)
    background_img = nib.Nifti1Image(background_data, cohort.like_img.affine)
    written = []
    for name in MAPS:
        stem = args.outpath / f"SVM_{name}_all"
        all_path = stem.with_suffix(".nii.gz")
        parts = [(args.outpath / f"SVM_{name}_f{fold}.nii.gz", 1) for fold in range(n_folds)]
        map_files.write_mean(all_path, cohort, parts)
        sidecar = {
            "method": f"SVM {name}",
            "parameters": {"C": args.C},
            "n_folds": n_folds,
            "background": background_path.name,
            "versions": utils.versions(),
        }
        files.write_json(stem.with_suffix(".json"), sidecar)
        images = nib.load(all_path), background_img
        title = f"SVM {name}, mean over folds"
        pictures.plot_mosaic(stem.with_suffix(".png"), *images, title)
        report.write_viewer(stem.with_suffix(".html"), *images, title)
        written += [stem.with_suffix(s) for s in (".nii.gz", ".json", ".png", ".html")]
    return table, written


def finish(args: argparse.Namespace, cohort: dataset.Cohort, record: dict, n_folds: int) -> None:
    """Put the folds together, if all are finished; print metrics and what was written."""
    missing = [fold for fold in range(n_folds) if not fold_state.is_finished(args.outpath, fold)]
    if missing:
        log.info("folds still to be fitted: %s", missing)
        return
    with one_writer(args.outpath, "assemble_run", wait=True):
        table, written = assemble(args, cohort, n_folds)
        runs.end_run(args.outpath, RUN, record)
    volume_cache.remove_all(args.outpath)
    print(table.to_string(index=False, float_format="%.3f"))
    print(*written, sep="\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    number = utils.number
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    utils.add_cohort_options(parser)
    utils.add_cache_option(parser)
    option = parser.add_argument
    # fmt: off
    option("--modelpath", type=Path, default=None, metavar="DIR",
           help="the --outpath of train_cv.py, whose folds are used; left out: folds are drawn")
    option("--C", type=number(float, above=0), default=C, help="cost of margin violations")
    option("--fold", type=number(int, at_least=2), default=N_FOLDS,
           help="number of folds, without --modelpath")
    option("--val-fraction", type=number(float, above=0, below=1), default=VAL_FRACTION,
           help="as in train_cv.py, without --modelpath; the SVM trains on these scans too")
    option("--only-fold", type=number(int, at_least=0), default=None, metavar="FOLD",
           help="fit this fold only; whoever finishes the last one puts all together")
    option("--overwrite", action="store_true", help="start anew where --outpath holds another run")
    option("--workers", type=number(int, at_least=0), default=utils.N_WORKERS,
           help="processes that decode scans; 0: the main process")
    # fmt: on
    return parser.parse_args(argv)


def check_input(args: argparse.Namespace) -> tuple[dataset.Cohort, Path]:
    """Return the cohort and the folder of its cache, or say what is wrong."""
    cohort = dataset.read_cohort(args.path)
    return cohort, volume_cache.locate(cohort, args.outpath, args.cache_dir)


def main(args: argparse.Namespace) -> None:
    """Fit, test and map one SVM a fold, then put the folds together."""
    utils.start_log()
    cohort, cache_folder = ranks.agreed(lambda: check_input(args))
    record, splits, todo = ranks.from_first(lambda: start_run(args, cohort, cache_folder))
    utils.start_log(args.outpath / utils.log_name("svm", args.only_fold))
    start = time.perf_counter()
    if todo:
        with contextlib.ExitStack() as stack:
            stack.enter_context(utils.log_above_bars())
            if ranks.is_first():
                stack.enter_context(runs.at_work(args.outpath, RUN, todo, record))
            volumes = stack.enter_context(volume_cache.opened(cohort, cache_folder, args.workers))
            fit_folds(args, cohort, splits, todo, volumes)
        log.info("%.1f seconds a fold", (time.perf_counter() - start) / len(todo))

    ranks.wait_for_all()
    if args.cache_dir is not None:  # below --outpath it stays until all folds are done
        volume_cache.remove(cache_folder)
    if ranks.is_first():
        finish(args, cohort, record, folds.count(splits))


if __name__ == "__main__":
    arguments = parse_args()
    advice = f"Finished folds and decoded scans are kept: {runs.how_to_go_on(arguments)}."
    sys.exit(utils.run_script(main, arguments, advice))
