"""The folds: drawn once, stratified and seeded, subjects kept whole; read back from splits.csv."""

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, StratifiedShuffleSplit

from dataset import Cohort
from errors import InputError
from utils import derived_seed, log

FOLD_COLUMN = r"^fold_\d+$"


def draw_folds(cohort: Cohort, n_folds: int, val_fraction: float, seed: int) -> pd.DataFrame:
    """Draw the folds: stratified, shuffled, seeded, with subjects kept whole.

    Parameters
    ----------
    cohort : Cohort
    n_folds : int
    val_fraction : float
        Share of each fold's remaining scans that goes to validation. With subjects it is rounded
        to 1/k or 1 − 1/k, k an integer from 2.
    seed : int

    Returns
    -------
    DataFrame
        path, label[, subject], then fold_0 … fold_{k−1} with "train", "val" or "test". Every scan
        is tested in exactly one fold.

    Raises
    ------
    InputError
        If a class, or the subjects, are too few for this many folds.
    """
    labels, subjects = cohort.table["label"].to_numpy(), cohort.subjects
    for label in (0, 1):
        n_scans = int((labels == label).sum())
        if n_scans < n_folds:
            raise InputError(f"label {label} has {n_scans} scans, fewer than the {n_folds} folds")
    if subjects is None:
        outer = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    else:
        outer = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
        if subjects.nunique() < n_folds:
            raise InputError(f"{subjects.nunique()} subjects cannot be split into {n_folds} folds")
    splits = cohort.table.drop(columns="file")
    for fold, (rest, test) in enumerate(outer.split(labels, labels, subjects)):
        part = np.full(len(labels), "train", dtype=object)
        part[test] = "test"
        part[rest[draw_validation(labels, subjects, rest, val_fraction, fold, seed)]] = "val"
        splits[f"fold_{fold}"] = part
        check_fold(part, labels, subjects, fold)
    return splits


def draw_validation(
    labels: np.ndarray, subjects: pd.Series | None, rest: np.ndarray,
    val_fraction: float, fold: int, seed: int,
) -> np.ndarray:  # fmt: skip
    """Return which of a fold's remaining scans go to validation."""
    random_state = derived_seed(seed, fold) % 2**32
    try:
        if subjects is None:
            inner = StratifiedShuffleSplit(1, test_size=val_fraction, random_state=random_state)
            return next(inner.split(rest, labels[rest]))[1]
        n_parts = round(1 / min(val_fraction, 1 - val_fraction))
        n_parts = max(2, min(n_parts, *np.bincount(labels[rest])))  # each part needs both labels
        inner = StratifiedGroupKFold(n_parts, shuffle=True, random_state=random_state)
        larger, smaller = next(inner.split(rest, labels[rest], subjects.iloc[rest]))
        return smaller if val_fraction <= 0.5 else larger
    except ValueError as error:
        raise InputError(f"fold {fold} cannot set validation scans aside: {error}") from None


def check_fold(part: np.ndarray, labels: np.ndarray, subjects: pd.Series | None, fold: int) -> None:
    """Hold a fold to its promises: no part empty, both classes in training, no subject split."""
    for name in ("train", "val", "test"):
        classes = np.unique(labels[part == name])
        if len(classes) == 0 or (name == "train" and len(classes) < 2):
            raise InputError(
                f"fold {fold} leaves no {name} scans of each class: use fewer folds, another "
                "--val-fraction or more subjects"
            )
        if len(classes) == 1:
            log.warning("fold %d: all %s scans have label %d", fold, name, classes[0])
    if subjects is not None:
        n_parts_of_subject = pd.Series(part).groupby(subjects.to_numpy()).nunique()
        assert n_parts_of_subject.max() == 1, "a subject is split between training and testing"


def count(splits: pd.DataFrame) -> int:
    """Return how many folds a table of folds has."""
    return len(splits.filter(regex=FOLD_COLUMN).columns)


def read_splits(splits_path: Path, cohort: Cohort) -> pd.DataFrame:
    """Read a run's splits.csv, in the cohort's order.

    Raises
    ------
    InputError
        If there is no such file, or its scans or labels are not the cohort's.
    """
    if not splits_path.is_file():
        raise InputError(
            f"there is no {splits_path} of train_cv.py; heatmap.py --subjects all does without it"
        )
    try:
        splits = pd.read_csv(splits_path, dtype={"path": str, "subject": str})
        splits = splits.set_index("path", drop=False)
        if "label" not in splits or not splits.index.is_unique:
            raise ValueError("no column label, or a scan listed twice")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{splits_path} is not a table of folds of train_cv.py: {error}") from None
    paths = cohort.table["path"]
    for here, there, place in (
        (paths, splits["path"], "splits.csv"),
        (splits["path"], paths, "the CSV"),
    ):
        missing = here[~here.isin(there)]
        if len(missing):
            raise InputError(
                f"the CSV's scans are not those of {splits_path}: {len(missing)} are not in {place}"
                f", such as {missing.iloc[0]!r}"
            )
    splits = splits.loc[paths].reset_index(drop=True)
    differing = paths[(splits["label"] != cohort.table["label"]).to_numpy()]
    if len(differing):
        raise InputError(
            f"{differing.iloc[0]!r} has another label in {splits_path} than in the CSV"
        )
    try:
        check_parts(splits.filter(regex=FOLD_COLUMN), splits["label"])
    except ValueError as error:
        raise InputError(f"{splits_path} is not a table of folds of train_cv.py: {error}") from None
    return splits


def check_parts(parts: pd.DataFrame, labels: pd.Series) -> None:
    """Raise a ValueError unless these are folds as they are drawn, one column a fold."""
    if parts.empty or not parts.isin(["train", "val", "test"]).all(axis=None):
        raise ValueError("no fold columns of train, val and test")
    if list(parts) != [f"fold_{fold}" for fold in range(parts.shape[1])]:
        raise ValueError(f"its folds are not numbered from 0: {', '.join(list(parts)[:5])}")
    if ((parts == "test").sum(axis=1) != 1).any():
        raise ValueError("a scan is not tested in exactly one fold")
    for name, part in parts.items():
        if not (part == "test").any() or labels[part == "train"].nunique() < 2:
            raise ValueError(f"{name} tests no scan, or does not train on both labels")
