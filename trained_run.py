"""A trained run as maps see it: how many folds, whose checkpoints, which scans each explains."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import files
import folds
from dataset import AFFINE_TOLERANCE_MM, Cohort
from errors import InputError

N_FOLDS = 5  # of a folder without run.json


@dataclass(frozen=True)
class Fold:
    """One fold to explain: its number, its checkpoint, and the cohort's rows it explains."""

    number: int
    checkpoint_path: Path
    rows: np.ndarray


def plan_folds(args: argparse.Namespace, cohort: Cohort) -> list[Fold]:
    """Return the folds of the run in --modelpath, each with the scans it explains.

    Raises
    ------
    InputError
        If the run is not of this model and these scans, or has no such folds.
    """
    n_folds = number_of_folds(args, cohort)
    if args.only_fold is not None and args.only_fold >= n_folds:
        raise InputError(f"--only-fold {args.only_fold}: the run's folds are 0 to {n_folds - 1}")
    rows_of_fold = [np.arange(len(cohort.table))] * n_folds
    if args.subjects == "test":
        splits = folds.read_splits(args.modelpath / "splits.csv", cohort)
        missing = [f for f in range(n_folds) if f"fold_{f}" not in splits]
        if missing:
            raise InputError(f"{args.modelpath / 'splits.csv'} has no column fold_{missing[0]}")
        rows_of_fold = [np.flatnonzero(splits[f"fold_{f}"] == "test") for f in range(n_folds)]
    return [
        Fold(number, args.modelpath / f"state_dict_f{number}.pth", rows)
        for number, rows in enumerate(rows_of_fold)
    ]


def number_of_folds(args: argparse.Namespace, cohort: Cohort) -> int:
    """Return how many folds --modelpath has, and hold its record against options and scans.

    Raises
    ------
    InputError
        If the run trained another model, or scans of another shape or affine.
    """
    if not args.modelpath.is_dir():
        raise InputError(f"there is no folder --modelpath {args.modelpath}")
    run_path = args.modelpath / "run.json"
    if not run_path.is_file():
        if (args.fold or 0) > len(cohort.table):
            raise InputError(f"--fold {args.fold} is more than there are scans")
        return args.fold or N_FOLDS
    run = files.read_json(run_path)
    if run.get("model") != args.model:
        raise InputError(f"{run_path} says the run trained {run.get('model')}, not {args.model}")
    if run.get("volume_shape") != list(cohort.volume_shape):
        raise InputError(
            f"{run_path} says the run's scans have shape {run.get('volume_shape')}, these have "
            f"{list(cohort.volume_shape)}"
        )
    if not is_affine(run.get("affine"), cohort.like_img.affine):
        raise InputError(f"{run_path} says the run's scans have another affine than these")
    n_folds = run.get("n_folds")
    if type(n_folds) is not int or not 1 <= n_folds <= len(cohort.table):
        raise InputError(
            f"{run_path} does not say how many folds there are (n_folds), 1 to the number of scans"
        )
    if args.fold not in (None, n_folds):
        raise InputError(f"{run_path} says the run has {n_folds} folds, not {args.fold}")
    return n_folds


def is_affine(found: object, expected: np.ndarray) -> bool:
    """Tell whether a record's entry is this affine."""
    try:
        affine = np.array(found, dtype=float)
    except (TypeError, ValueError, OverflowError):
        return False
    close = {"rtol": 0, "atol": AFFINE_TOLERANCE_MM}
    return affine.shape == (4, 4) and np.allclose(affine, expected, **close)
