"""The baseline: a linear SVM on the voxels, in the folds of the networks; weight and pattern maps.

    python3 svm.py --path ./data.csv --modelpath ./output/ --outpath ./svm/

Each fold trains on the scans that its network trained and validated on, and is tested on the same
held-out scans. Weights say how the SVM decides; patterns (Haufe et al. 2014) what changes with its
decision, and are the ones to be read as anatomy.

Every scan is decoded once, into one file of scaled volumes that is removed at the end (train_cv.py
on the same scans shares it where --cache-dir is the same). That file is read twice, a range of
voxels of all scans at a time, so memory does not grow with the cohort, but for the Gram matrix.

Written to --outpath: SVM_weights_f*.nii.gz, SVM_pattern_f*.nii.gz and their means *_all.nii.gz with
.json, .png and .html beside them, predictions.csv, metrics.csv, splits.csv, run.json, roc.png,
mean_scan.nii.gz and svm.log.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from sklearn.svm import SVC
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dataset
import files
import folds
import metrics
import pictures
import report
import runs
import utils
import volume_cache
from utils import InputError, log
from volume_file import Volumes

C = 1.0
N_FOLDS = 5
VAL_FRACTION = 0.2
BLOCK_BYTES = (
    128 * 2**20
)  # of float32 voxels held at a time; float64 copies make it three times that
TOLERANCE = 1e-9  # of the optimiser; weights are then good to a millionth of their maximum
MAPS = ("weights", "pattern")


@dataclass(frozen=True)
class FoldFit:
    """One fold's fitted SVM in terms of the scans.

    Attributes
    ----------
    weight_coefficients : array, shape (n_scans,)
        w = Σ_i of these times scan i; 0 for scans that are no support vectors.
    pattern_coefficients : array, shape (n_scans,)
        A = Σ_i of these times scan i.
    decisions : array, shape (n_scans,)
        Signed distance from the decision border, in units of the margin, of every scan.
    """

    weight_coefficients: np.ndarray
    pattern_coefficients: np.ndarray
    decisions: np.ndarray


# The SVM in terms of the Gram matrix


def voxel_ranges(volumes: Volumes) -> list[tuple[int, int]]:
    """Return the ranges of voxels that fit the block size with all scans."""
    n_at_once = max(1, BLOCK_BYTES // (4 * volumes.n_scans))
    starts = range(0, volumes.n_voxels, n_at_once)
    return [(start, min(start + n_at_once, volumes.n_voxels)) for start in starts]


def gram_matrix(volumes: Volumes) -> tuple[np.ndarray, np.ndarray]:
    """Return the Gram matrix of all scans and their mean.

    Returns
    -------
    gram : float64 array, shape (n_scans, n_scans)
        Inner products after subtracting the mean of all scans.
    mean : float32 array, shape (n_voxels,)
    """
    gram = np.zeros((volumes.n_scans, volumes.n_scans))
    mean = np.empty(volumes.n_voxels, dtype=np.float32)
    for start, stop in tqdm(voxel_ranges(volumes), "Gram matrix", unit="block", disable=None):
        block = volumes.read(start, stop).astype(np.float64)
        mean[start:stop] = block.mean(0)
        block -= block.mean(0)
        gram += block @ block.T
    return gram, mean


def centred_on(gram: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the Gram matrix after moving the origin to the mean of these rows' scans."""
    row_means = gram[:, rows].mean(1)
    return gram - row_means[:, None] - row_means[None, :] + row_means[rows].mean()


def fit_fold(gram: np.ndarray, labels: np.ndarray, train: np.ndarray, cost: float) -> FoldFit:
    """Fit a fold's SVM on its training scans.

    Parameters
    ----------
    gram : array, shape (n_scans, n_scans)
        Of all scans, whatever its origin.
    labels : int array, shape (n_scans,)
    train : int array
        Rows of the scans to train on.
    cost : float
        The SVM's C.

    Returns
    -------
    FoldFit

    Notes
    -----
    The pattern is A = Cov(X)·w / Var(X·w) over the training scans, computed as Xᵀs/((n−1)·Var(s))
    with s = X·w centred: its coefficients are s/((n−1)·Var(s)), since Xᵀs is the same for centred
    and for raw scans.

    References
    ----------
    Haufe et al., NeuroImage 87:96-110, 2014, doi:10.1016/j.neuroimage.2013.10.067
    """
    kernel = centred_on(gram, train)
    svc = SVC(C=cost, kernel="precomputed", tol=TOLERANCE)
    svc.fit(kernel[np.ix_(train, train)], labels[train])
    weights = np.zeros(len(labels))
    weights[train[svc.support_]] = svc.dual_coef_[0]
    scores = kernel @ weights
    train_scores = scores[train] - scores[train].mean()
    pattern = np.zeros(len(labels))
    pattern[train] = train_scores / ((len(train) - 1) * train_scores.var(ddof=1))
    return FoldFit(weights, pattern, scores + svc.intercept_[0])


def combine_scans(volumes: Volumes, coefficients: np.ndarray) -> np.ndarray:
    """Return weighted sums of scans, (n_maps, n_voxels), for coefficients (n_maps, n_scans)."""
    maps = np.empty((len(coefficients), volumes.n_voxels), dtype=np.float32)
    for start, stop in tqdm(voxel_ranges(volumes), "maps", unit="block", disable=None):
        maps[:, start:stop] = coefficients @ volumes.read(start, stop).astype(np.float64)
    return maps


# Folds and files


def choose_splits(args: argparse.Namespace, cohort: dataset.Cohort) -> pd.DataFrame:
    """Return the network's folds, or folds drawn as train_cv.py would."""
    if args.modelpath is None:
        return folds.draw_folds(cohort, args.fold, args.val_fraction, args.seed)
    if not args.modelpath.is_dir():
        raise InputError(f"there is no folder --modelpath {args.modelpath}")
    return folds.read_splits(args.modelpath / "splits.csv", cohort)


def predictions_table(
    cohort: dataset.Cohort, splits: pd.DataFrame, fits: list[FoldFit]
) -> pd.DataFrame:
    """Return one row a scan, predicted by the fold that held it out, in the networks' format.

    `probability` is the logistic function of the decision value: it ranks the scans, but is not
    calibrated.
    """
    parts = splits.filter(regex=folds.FOLD_COLUMN).to_numpy()
    fold_of_scan = (parts == "test").argmax(1)
    decisions = np.array([fits[fold].decisions[row] for row, fold in enumerate(fold_of_scan)])
    return pd.DataFrame(
        {
            "path": cohort.table["path"],
            "label": cohort.table["label"],
            "fold": fold_of_scan,
            "probability": 1 / (1 + np.exp(-decisions)),
            "predicted": (decisions > 0).astype(int),
            "decision": decisions,
        }
    )


def write_maps(
    args: argparse.Namespace, cohort: dataset.Cohort, maps: np.ndarray, mean: np.ndarray
) -> list[Path]:
    """Write each fold's maps and their means, with pictures; return the paths of the means."""
    shape, like_img = cohort.volume_shape, cohort.like_img
    background_path = args.outpath / "mean_scan.nii.gz"
    files.write_map(background_path, mean.reshape(shape), like_img)
    written = []
    for name, fold_maps in zip(MAPS, np.split(maps, len(MAPS)), strict=True):
        for fold, map_data in enumerate(fold_maps):
            path = args.outpath / f"SVM_{name}_f{fold}.nii.gz"
            files.write_map(path, map_data.reshape(shape), like_img)
        stem = args.outpath / f"SVM_{name}_all"
        all_path = stem.with_suffix(".nii.gz")
        files.write_map(all_path, fold_maps.mean(0, dtype=np.float64).reshape(shape), like_img)
        sidecar = {
            "method": f"SVM {name}",
            "parameters": {"C": args.C},
            "n_folds": len(fold_maps),
            "background": background_path.name,
            "versions": utils.versions(),
        }
        files.write_json(stem.with_suffix(".json"), sidecar)
        images = nib.load(all_path), nib.load(background_path)
        title = f"SVM {name}, mean over folds"
        pictures.plot_mosaic(stem.with_suffix(".png"), *images, title)
        report.write_viewer(stem.with_suffix(".html"), *images, title)
        written += [stem.with_suffix(s) for s in (".nii.gz", ".json", ".png", ".html")]
    return written


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
    option("--workers", type=number(int, at_least=0), default=utils.N_WORKERS,
           help="processes that decode scans; 0: the main process")
    # fmt: on
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Fit, test and map one SVM a fold."""
    utils.start_log()
    cohort = dataset.read_cohort(args.path)
    splits = choose_splits(args, cohort)
    parts = splits.filter(regex=folds.FOLD_COLUMN)
    labels = cohort.table["label"].to_numpy()

    run = runs.new_record(args, cohort, "svm.py", "linear SVM")
    cache_folder = volume_cache.locate(cohort, args.outpath, args.cache_dir)
    volume_cache.check_room(cohort, cache_folder)

    utils.make_outpath(args.outpath)
    utils.start_log(args.outpath / "svm.log")
    start = time.perf_counter()
    opened = volume_cache.opened(cohort, cache_folder, args.workers)
    with logging_redirect_tqdm([log]), opened as volumes:
        if volumes.n_nonfinite.any():
            log.warning("%d non-finite voxels set to 0", volumes.n_nonfinite.sum())
        gram, mean = gram_matrix(volumes)
        fits = [
            fit_fold(gram, labels, np.flatnonzero(parts[name] != "test"), args.C)
            for name in tqdm(parts, "folds", disable=None)
        ]
        weights = [fit.weight_coefficients for fit in fits]
        patterns = [fit.pattern_coefficients for fit in fits]
        maps = combine_scans(volumes, np.array(weights + patterns))
    log.info("%.1f seconds a fold", (time.perf_counter() - start) / len(fits))

    predictions = predictions_table(cohort, splits, fits)
    table = metrics.metrics_table(predictions, cohort.subjects, args.seed)
    files.write_json(args.outpath / "run.json", run | {"n_folds": len(fits), "end": utils.now()})
    files.write_csv(args.outpath / "splits.csv", splits)
    files.write_csv(args.outpath / "predictions.csv", predictions)
    files.write_csv(args.outpath / "metrics.csv", table)
    pictures.plot_roc(args.outpath / "roc.png", predictions, table)
    written = write_maps(args, cohort, maps, mean)
    volume_cache.remove(cache_folder)
    print(table.to_string(index=False, float_format="%.3f"))
    print(*written, sep="\n")


if __name__ == "__main__":
    sys.exit(utils.run_script(main, parse_args()))
