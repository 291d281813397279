"""The folds: drawn once, stratified and seeded, subjects kept whole; read back from splits.csv."""

import unicodedata
from itertools import takewhile
from pathlib import Path, PurePath

import numpy as np
import pandas as pd

import utils
from run_folder import files
from utils import InputError, derived_seed, log, some_of

N_FOLDS = 5
VAL_FRACTION = 0.2
PARTS = ("train", "val", "test")


def asked_for(n_folds: int, only_fold: int | None, overwrite: bool) -> list[int]:
    """Return the folds that --only-fold leaves to do, or say which options do not go together."""
    if only_fold is None:
        return list(range(n_folds))
    if only_fold >= n_folds:
        raise InputError(f"--only-fold {only_fold}: the folds are 0 to {n_folds - 1}")
    if overwrite:
        raise InputError("--overwrite starts a whole run anew: it does not go with --only-fold")
    return [only_fold]


def add_options(parser: utils.Parser) -> None:
    """Add the options of a script that works in the networks' folds, or in folds of its own."""
    number, option = utils.number, parser.add_argument
    # fmt: off
    option("--modelpath", type=Path, default=None, metavar="DIR",
           help="the --outpath of train_cv.py, whose folds are used; left out: folds are drawn")
    option("--fold", type=number(int, at_least=2), default=N_FOLDS,
           help="number of folds, without --modelpath")
    option("--val-fraction", type=number(float, above=0, below=1), default=VAL_FRACTION,
           help="as in train_cv.py, without --modelpath; these scans are used as those of training")
    # fmt: on


def choose(
    modelpath: Path | None, table: pd.DataFrame, scans: list[str], n_folds: int,
    val_fraction: float, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """Return the networks' folds, see `read`, or without them folds drawn as train_cv.py would."""
    if modelpath is None:
        return draw(table, n_folds, val_fraction, seed)
    if not modelpath.is_dir():
        raise InputError(f"there is no folder --modelpath {modelpath}")
    return read(modelpath / "splits.csv", table, scans)


def check_scans(modelpath: Path | None, now: pd.Series) -> None:
    """Raise an InputError if a scan is not the one that the networks were trained on.

    `now` has the scans' CRC-32 by their paths as they were in training.
    """
    path = modelpath / "scans.csv" if modelpath else None
    if path is None or not path.is_file():
        return
    trained = files.read_csv(path, {"path": str, "crc32": int}).set_index("path")["crc32"]
    differing = now.index[(trained.reindex(now.index) != now).to_numpy()]
    if len(differing):
        rule = f"{len(differing)} scans have other voxels than those in {path}"
        raise InputError(f"{rule}: {some_of(differing)}")


def draw(table: pd.DataFrame, n_folds: int, val_fraction: float, seed: int) -> pd.DataFrame:
    """Draw the folds: stratified, shuffled, seeded, with subjects kept whole.

    Returns the table (one row a scan: path, label[, subject]), then fold_0 … fold_{k−1} with
    "train", "val" or "test". Every scan is tested in exactly one fold; an InputError if scans or
    subjects are too few for that. With subjects the share of each fold's remaining scans that
    goes to validation is rounded to 1/k or 1 − 1/k, k an integer from 2.
    """
    labels, subjects = table["label"].to_numpy(), table.get("subject")
    for label in (0, 1):
        n_scans = int((labels == label).sum())
        if n_scans < n_folds:
            raise InputError(f"label {label} has {n_scans} scans, fewer than the {n_folds} folds")
    if subjects is not None and subjects.nunique() < n_folds:
        raise InputError(f"{subjects.nunique()} subjects cannot be split into {n_folds} folds")
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    splitter = StratifiedKFold if subjects is None else StratifiedGroupKFold
    outer = splitter(n_folds, shuffle=True, random_state=seed)
    columns = {}
    for fold, (others, test) in enumerate(outer.split(labels, labels, subjects)):
        part = np.full(len(labels), "train", dtype=object)
        part[test] = "test"
        part[others[_draw_validation(labels, subjects, others, val_fraction, (seed, fold))]] = "val"
        columns[f"fold_{fold}"] = part
        _check(part, labels, subjects, fold)
    return table.assign(**columns)


def _draw_validation(
    labels: np.ndarray, subjects: pd.Series | None, others: np.ndarray, fraction: float,
    keys: tuple[int, int],
) -> np.ndarray:  # fmt: skip
    """Return which of a fold's remaining scans go to validation."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedShuffleSplit

    random_state = derived_seed(*keys) % 2**32
    try:
        if subjects is None:
            inner = StratifiedShuffleSplit(1, test_size=fraction, random_state=random_state)
            return next(inner.split(others, labels[others]))[1]
        n_parts = round(1 / min(fraction, 1 - fraction))
        n_parts = max(2, min(n_parts, *np.bincount(labels[others])))  # each part needs both labels
        inner = StratifiedGroupKFold(n_parts, shuffle=True, random_state=random_state)
        larger, smaller = next(inner.split(others, labels[others], subjects.iloc[others]))
        return smaller if fraction <= 0.5 else larger
    except ValueError as error:
        raise InputError(f"fold {keys[1]} cannot set validation scans aside: {error}") from None


def _check(part: np.ndarray, labels: np.ndarray, subjects: pd.Series | None, fold: int) -> None:
    """Hold a fold to its promises: no part empty, both classes in training, no subject split."""
    for name in PARTS:
        classes = np.unique(labels[part == name])
        if len(classes) == 0 or (name == "train" and len(classes) < 2):
            advice = "use fewer folds, another --val-fraction or more subjects"
            raise InputError(f"fold {fold} leaves no {name} scans of each class: {advice}")
        if len(classes) == 1:
            log.warning("fold %d: all %s scans have label %d", fold, name, classes[0])
    if subjects is not None:
        n_parts_of_subject = pd.Series(part).groupby(subjects.to_numpy()).nunique()
        assert n_parts_of_subject.max() == 1, "a subject is split between training and testing"


def count(splits: pd.DataFrame) -> int:
    """Return how many folds a table of folds has."""
    return len([name for name in splits if name.startswith("fold_")])


def read(path: Path, table: pd.DataFrame, scans: list[str]) -> pd.DataFrame:
    """Read splits.csv in the order of the CSV's scans; an InputError if it has other scans.

    Scans that have moved since, or are spelled otherwise, are known by their names; `path` of the
    table returned is as it was then. `table` has path and label of each scan as the CSV has them
    now, `scans` their files, absolute.
    """
    if not path.is_file():
        advice = "heatmap.py --subjects all does without it"
        raise InputError(f"there is no {path} of train_cv.py; {advice}")
    splits = files.read_csv(path, {"path": str, "label": int, "fold_0": str})
    parts = splits[[f"fold_{fold}" for fold in range(count(splits)) if f"fold_{fold}" in splits]]
    is_test = parts == "test"
    are_folds = parts.isin(PARTS).all(axis=None) and (is_test.sum(axis=1) == 1).all()
    if len(parts.columns) != count(splits) or not are_folds or not is_test.any().all():
        raise InputError(f"{path} is not a table of folds of train_cv.py")
    now, then = _match(path, table["path"].tolist(), scans, splits["path"].tolist())
    for here, there, place in ((now, then, path), (then, now, "the CSV")):
        missing = sorted(set(here) - set(there))
        if missing or len(set(here)) < len(here):
            example = (missing or ["one that is listed twice"])[0]
            rule = f"the CSV's scans are not those of {path}, wherever they were moved"
            raise InputError(f"{rule}: {len(missing)} are not in {place}, such as {example!r}")
    splits = splits.set_axis(then).loc[now].reset_index(drop=True)
    differing = table["path"][splits["label"].to_numpy() != table["label"].to_numpy()]
    if len(differing):
        raise InputError(f"{differing.iloc[0]!r} has another label in {path} than in the CSV")
    return splits


def _match(
    splits_path: Path, paths: list[str], scans: list[str], old_paths: list[str]
) -> tuple[list[str], list[str]]:
    """Return names of the scans, now and then, that are equal for one scan.

    They are the paths as they stand, or the files found under them, or what the paths have below
    the folder that all share.
    """
    if set(paths) == set(old_paths):
        return paths, old_paths
    record_path = splits_path.with_name("run.json")
    record = files.read_json(record_path) if record_path.is_file() else {}
    found = [files.find(old, Path(str(record.get("csv_folder", ".")))) for old in old_paths]
    if all(found):
        now, then = ([str(Path(file).resolve()) for file in them] for them in (scans, found))
        if set(now) == set(then):
            return now, then
    (now, folder), (then, old_folder) = _below_common_folder(scans), _below_common_folder(old_paths)
    if set(now) == set(then):
        log.info("the scans of %s have moved from %s to %s", splits_path, old_folder, folder)
        return now, then
    return paths, old_paths


def _below_common_folder(paths: list[str]) -> tuple[list[str], str]:
    """Return what paths have below the folder that all share, however composed, and the folder."""
    parts = [PurePath(unicodedata.normalize("NFC", path)).parts for path in paths]
    folders = [each[:-1] for each in parts]
    pairs = zip(min(folders), max(folders), strict=False)
    n_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return ["/".join(each[n_shared:]) for each in parts], str(PurePath(*parts[0][:n_shared]))
