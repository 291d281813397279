"""What train_cv.py left, as heatmap.py sees it: whose checkpoints explain which scans."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from run_folder import checkpoints, files, folds
from utils import InputError, RunError, is_first, log, some_of

MAX_STATISTICS = 100  # scans that the batch-norm statistics of an untrained network are taken from
EXACT_TOLERANCE, ROUNDED_TOLERANCE = 0.01, 0.05  # of a probability, for fp32; for tf32 and bf16
SEEN = {"path": str, "bytes": int, "crc32": int}  # of scans.csv
BATCH = 5  # scans per training step: the paper's, and that of a folder without run.json


@dataclass(frozen=True)
class TrainedFold:
    """One fold to explain: arrays have an entry for each of the scans it explains."""

    number: int
    checkpoint_path: Path
    rows: np.ndarray  # int, of the scans in the cohort
    parts: np.ndarray  # train, val or test, as the fold had them; "" without splits.csv
    probabilities: np.ndarray  # of label 1, as the fold's predictions have them; NaN without
    train_rows: np.ndarray  # of at most MAX_STATISTICS scans of its training, or any if unknown
    seen: pd.DataFrame  # bytes and crc32 of the run's scans, where a new cohort is explained

    def load_weights(self, model: nn.Module, expected_sha256: dict[str, str]) -> None:
        """Give a model the fold's weights; they must be those that the maps' run began with."""
        if files.sha256(self.checkpoint_path) != expected_sha256[self.checkpoint_path.name]:
            changed = f"{self.checkpoint_path} has changed since these maps were begun"
            raise RunError(f"{changed}: when training is done, start anew with --overwrite")
        checkpoints.load_weights(self.checkpoint_path, model)

    def check_probability(self, modelpath: Path, path: str, found: float, expected: float) -> None:
        """Raise an InputError unless the weights see in a scan what they saw when it was tested."""
        _, precision = arithmetic(modelpath)
        if abs(found - expected) > (EXACT_TOLERANCE if precision == "fp32" else ROUNDED_TOLERANCE):
            differing = f"{found:.3f}, and {expected:.3f} in the predictions of {modelpath}"
            rule = f"{path} is not the scan that fold {self.number} was tested on"
            raise InputError(f"{rule}: its probability is {differing}")


def plan(
    modelpath: Path, facts: dict, n_folds: int | None, table: pd.DataFrame, scans: list[str],
    subjects: str,
) -> list[TrainedFold]:  # fmt: skip
    """Return the folds to explain; an InputError if the run is of another model, scans or folds.

    Parameters
    ----------
    modelpath : Path
        The --outpath of train_cv.py, or a folder of checkpoints without run.json.
    facts : dict
        Of the scans and the model to explain: model, volume_shape, affine as run.json has them.
    table, scans : DataFrame, list of str
        The scans' path and label, and their files, absolute.
    subjects : str
        "test": each fold explains its test scans, as splits.csv has them; "all": every scan; "new":
        every scan, of a cohort that the run has not seen.
    """
    only_held_out = subjects == "test"
    n_folds = _count_folds(modelpath, facts, n_folds)
    if subjects == "new":
        last_path = checkpoints.weights_path(modelpath, n_folds - 1)
        if not last_path.is_file():
            raise InputError(f"the run in {modelpath} is not finished: there is no {last_path}")
    elif n_folds > len(table):
        raise InputError(f"{n_folds} folds are more than there are scans")
    splits_path = modelpath / "splits.csv"
    unknown = table[["path"]].assign(
        **{f"fold_{fold}": "new" if subjects == "new" else "" for fold in range(n_folds)}
    )
    try:
        splits = unknown if subjects == "new" else folds.read(splits_path, table, scans)
        if folds.count(splits) != n_folds:
            raise InputError(f"{splits_path} has {folds.count(splits)} folds, not {n_folds}")
    except InputError:
        if only_held_out:
            raise
        splits = unknown
    seen = seen_scans(modelpath) if subjects == "new" else pd.DataFrame(columns=[*SEEN])
    planned = []
    for number in range(n_folds):
        parts = splits[f"fold_{number}"].to_numpy().astype(str)
        rows = np.flatnonzero(parts == "test") if only_held_out else np.arange(len(table))
        if not len(rows):
            raise InputError(f"{splits_path}: fold {number} tests no scan")
        train_rows = np.flatnonzero(parts == "train") if "train" in parts else np.arange(len(table))
        is_new = subjects == "new"  # whose paths may be names of other scans in the run
        known = pd.Series(dtype=float) if is_new else _read_predictions(modelpath, number)
        predicted = known.reindex(splits["path"]).to_numpy()
        path, train_rows = checkpoints.weights_path(modelpath, number), train_rows[:MAX_STATISTICS]
        of_rows = (rows, parts[rows], predicted[rows])
        planned.append(TrainedFold(number, path, *of_rows, train_rows, seen))
    return planned


def _read_predictions(modelpath: Path, fold: int) -> pd.Series:
    """Return the probabilities that a fold gave its test scans, by path; none without its file."""
    columns = {"path": str, "fold": int, "probability": float}
    for path in (modelpath / "predictions.csv", modelpath / f"predictions_f{fold}.csv"):
        if path.is_file():
            table = files.read_csv(path, columns)
            table = table[table["fold"] == fold].drop_duplicates("path")
            return table.set_index("path")["probability"]
    return pd.Series(dtype=float)


def arithmetic(modelpath: Path) -> tuple[int, str]:
    """Return the batch size and the precision that a run was trained with, or the defaults."""
    path = modelpath / "run.json"
    run = files.read_json(path) if path.is_file() else {}
    arguments = run.get("arguments") if isinstance(run.get("arguments"), dict) else {}
    batch = arguments.get("batch")
    is_size = type(batch) is int and batch > 0
    by_itself = "tf32" if str(run.get("device", "")).startswith("cuda") else "fp32"
    return batch if is_size else BATCH, str(arguments.get("precision") or by_itself)


def _count_folds(modelpath: Path, facts: dict, n_folds: int | None) -> int:
    """Return how many folds a trained run has, after comparing its record with the facts."""
    if not modelpath.is_dir():
        raise InputError(f"there is no folder --modelpath {modelpath}")
    path = modelpath / "run.json"
    if not path.is_file():
        return n_folds or folds.N_FOLDS
    run = files.read_json(path)
    for key, value in facts.items():
        if not _is_same(run.get(key), value):
            raise InputError(f"{path} says that {key} is {run.get(key)}, not {value}")
    if type(run.get("n_folds")) is not int or run["n_folds"] < 1:
        raise InputError(f"{path} does not say how many folds there are (n_folds)")
    if n_folds not in (None, run["n_folds"]):
        raise InputError(f"{path} says that the run has {run['n_folds']} folds, not {n_folds}")
    return run["n_folds"]


def seen_scans(modelpath: Path) -> pd.DataFrame:
    """Return bytes and crc32 of the scans that a run was trained on; none where it does not say."""
    path = modelpath / "scans.csv"
    if path.is_file():
        return files.read_csv(path, SEEN)
    if is_first():
        log.warning("there is no %s: nothing tells whether the run has seen these scans", path)
    return pd.DataFrame(columns=[*SEEN])


def warn_of_subjects(modelpath: Path, subjects: pd.Series | None) -> None:
    """Say which subjects of a new cohort have the names of the run's."""
    path = modelpath / "splits.csv"
    if subjects is None or not path.is_file():
        return
    splits = files.read_csv(path, {"path": str})
    both = sorted(set(subjects.astype(str)) & set(splits.get("subject", pd.Series()).astype(str)))
    if both:
        log.warning(
            "%d subjects have names that occur in the run, too: %s", len(both), some_of(both)
        )


def grid(modelpath: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Return shape and affine of a run's scans; an InputError where its record does not say."""
    run = files.read_json(modelpath / "run.json")
    try:
        shape, affine = tuple(map(int, run["volume_shape"])), np.array(run["affine"], dtype=float)
    except (KeyError, TypeError, ValueError):
        shape, affine = (), np.empty(0)
    if len(shape) != 3 or affine.shape != (4, 4):
        raise InputError(f"{modelpath / 'run.json'} does not say on which grid the run's scans are")
    return shape, affine


def _is_same(then: object, now: object) -> bool:
    """Tell whether an entry of run.json is this value; numbers may differ by rounding."""
    try:
        return then == now or np.allclose(then, now, rtol=0, atol=1e-3)
    except (TypeError, ValueError, ArithmeticError):
        return False


def checksums(modelpath: Path, plan: list[TrainedFold], only_held_out: bool) -> dict[str, str]:
    """Return the SHA-256 of each file that maps depend on, by its name."""
    paths = [fold.checkpoint_path for fold in plan] + [modelpath / "splits.csv"] * only_held_out
    return {path.name: files.sha256(path) for path in paths}
